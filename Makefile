# Two commands matter: `make serve` and `make test`. Each sets up what it needs; `make` lists the rest.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
DATA ?= ../shared/data/parcels

.DEFAULT_GOAL := help
.PHONY: help setup serve rollback test fuzz lint export openapi train perf perf-drops perf-tools bench lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## Create the environment from the lock file
$(VENV)/.installed: requirements/dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "needs Python 3.11, '$(PYTHON)' is another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/dev.lock
	@touch $@

serve: setup ## Run Triton and the gateway; Ctrl-C stops both
	@$(RUN) -m triton_runtime.stack

rollback: setup ## Have the release before the stable one answer again
	@$(RUN) -m gateway.rollback

test: setup export perf-tools ## Run all tests
	$(RUN) -m pytest

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

perf: setup export perf-tools ## Run perf_analyzer on the newest release
	@$(RUN) -m perf

bench: setup export perf-tools ## Measure the stack beside the machine's limit and in-process apps (needs wrk)
	@$(RUN) -m perf.bench $(if $(wildcard $(DATA)/valid),--pictures $(DATA)/valid)

perf-drops: setup export ## Measure the time from a dropped version to its first answer
	@$(RUN) -m perf.drops

lock: setup ## Resolve pyproject.toml into requirements/*.lock again
	$(RUN) requirements/lock.py

clean: ## Remove environments and caches; models stay, some cannot be built again
	rm -rf $(VENV) $(VENV)-train $(VENV)-perf .pytest_cache .mypy_cache .ruff_cache .model_repository.staging
