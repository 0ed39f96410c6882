"""No engine runs here: the container files are held against the Compose schema, and against the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_viz.spec.compose_spec import ComposeSpecification

from contract.routing import Routing
from export import config
from export.steps import REPOSITORY
from gateway.auth.api_keys import KeysTable
from gateway.settings import Settings
from tests.conftest import ROOT
from triton_runtime.installation import SERVER_VERSION, SharedMemory
from triton_runtime.server import LOCK, RESTRICTED, Endpoint, TritonServer


class _Loader(yaml.SafeLoader):
    """YAML with Compose's own tag for taking something out of the file below."""


_Loader.add_constructor("!reset", lambda loader, node: None)


def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    return dict(yaml.load((ROOT / name).read_text(), _Loader))


SERVICES = compose()["services"]


def dockerfile(service: str) -> str:
    return (ROOT / SERVICES[service]["build"]["dockerfile"]).read_text()


@pytest.mark.parametrize("name", ["docker-compose.yml", "docker-compose.cpu.yml"])
def test_the_files_follow_the_compose_schema(name: str) -> None:
    ComposeSpecification.model_validate(compose(name))


def test_the_override_only_takes_the_gpu_away() -> None:
    devices = SERVICES["triton"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert list(SERVICES["triton"]["deploy"]) == ["resources"], "the override resets all of deploy"
    assert compose("docker-compose.cpu.yml") == {"services": {"triton": {"deploy": None}}}
    assert "deploy: !reset" in (ROOT / "docker-compose.cpu.yml").read_text()


def test_containers_and_the_embedded_server_run_the_same_release() -> None:
    tag = f"tritonserver:{SERVER_VERSION}-py3"
    assert tag in dockerfile("triton")
    assert tag in SERVICES["triton"]["build"]["args"]["TRITON_IMAGE"]
    wheel = next(line for line in (ROOT / "requirements/dev.lock").read_text().splitlines() if "pytriton" in line)
    assert wheel.startswith("nvidia-pytriton==0.7.0"), "another wheel may carry another server: adapt SERVER_VERSION"


def triton_command(tmp_path: Path) -> list[str]:
    """What the container runs: its shell is run here, with something in place of Triton that writes its arguments."""
    server = tmp_path / "tritonserver"
    server.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    server.chmod(0o755)
    command = [part.replace("$$", "$") for part in SERVICES["triton"]["command"]]
    environment = {"PATH": f"{tmp_path}:{os.defpath}"}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return printed.rstrip("\0").split("\0")


def test_triton_gets_the_embedded_servers_flags(tmp_path: Path) -> None:
    server = TritonServer(tmp_path, Endpoint())
    ours = set(server.command(Path("tritonserver"), tmp_path)[1:])
    ours -= {flag for flag in ours if "address=" in flag or flag.startswith(("--backend-", "--model-repository="))}
    theirs = {flag for flag in triton_command(tmp_path) if not flag.startswith("--model-repository=")}
    locks = [{flag for flag in flags if "-restricted-" in flag} for flags in (ours, theirs)]
    assert theirs - locks[1] == ours - locks[0]
    for lock in locks:
        keys = {flag.rpartition("=")[2] for flag in lock}
        assert {flag.rpartition("=")[0] for flag in lock} == {
            f"--{api}={RESTRICTED}:{LOCK}" for api in ("http-restricted-api", "grpc-restricted-protocol")
        }
        assert len(keys) == 1
        key, end = keys.pop().split("\n")
        assert (len(key) >= 32, end) == (True, ".")
    assert locks[0] != locks[1]
    assert triton_command(tmp_path)[-1] not in locks[1], "another key each time"


def test_ports_agree_with_the_code() -> None:
    triton = Endpoint()
    assert SERVICES["triton"]["expose"] == [str(port) for port in (triton.http, triton.grpc, triton.metrics)]
    assert "ports" not in SERVICES["triton"], "Triton's ports stay inside"
    environment = SERVICES["gateway"]["environment"]
    assert environment["GATEWAY_TRITON_URLS"] == f"triton:{triton.grpc}"
    assert environment["GATEWAY_PORT"] == str(Settings.model_fields["port"].default)
    (published,) = SERVICES["gateway"]["ports"]
    assert published.startswith("${GATEWAY_ADDRESS:-127.0.0.1}:")
    assert published.endswith(f":{environment['GATEWAY_PORT']}")


def test_the_health_check_of_triton_can_end_it() -> None:
    """What it does to a server is tested in test_healing.py."""
    triton = SERVICES["triton"]
    assert triton["healthcheck"]["test"] == ["CMD", "python3", "/opt/stubs.py"]
    assert "COPY triton_runtime/stubs.py /opt/stubs.py\n" in dockerfile("triton")
    assert triton["restart"] == "unless-stopped"
    assert triton["init"] is True, "the server must not be process 1, which nothing in its container can kill"
    assert f":{Endpoint().http}/v2/health/live" in (ROOT / "triton_runtime/stubs.py").read_text()
    assert "tmpfs" not in triton and "read_only" not in triton, "the check remembers in /tmp what it saw"


def test_the_health_check_needs_the_standard_library_alone() -> None:
    imports = re.findall(r"^(?:import|from) (\w+)", (ROOT / "triton_runtime/stubs.py").read_text(), re.MULTILINE)
    assert set(imports) <= sys.stdlib_module_names


def test_nobody_is_let_in_from_other_machines_unless_that_is_said() -> None:
    environment = SERVICES["gateway"]["environment"]
    assert environment["GATEWAY_PUBLISHED_ON"] == "${GATEWAY_ADDRESS:-127.0.0.1}"
    assert environment["GATEWAY_ALLOW_ANONYMOUS"] == "${GATEWAY_ALLOW_ANONYMOUS:-false}"
    assert environment["GATEWAY_API_KEYS_FILE"] == "${GATEWAY_API_KEYS_FILE:-}"
    assert "./access:/etc/gateway/access:ro" in SERVICES["gateway"]["volumes"]
    assert KeysTable.read(ROOT / "access/keys.toml") == KeysTable()


def test_every_setting_named_exists() -> None:
    known = {f"GATEWAY_{name.upper()}" for name in Settings.model_fields}
    assert set(SERVICES["gateway"]["environment"]) <= known


def test_stopping_waits_for_requests_in_flight() -> None:
    def seconds(text: str) -> int:
        return int(text.removesuffix("s"))

    environment = SERVICES["gateway"]["environment"]
    drain = int(environment["GATEWAY_DRAIN_S"].partition(":-")[2].removesuffix("}"))
    assert seconds(SERVICES["gateway"]["stop_grace_period"]) > drain + int(environment["GATEWAY_GRACE_S"])
    flag = next(f for f in SERVICES["triton"]["command"] if f.startswith("--exit-timeout-secs="))
    assert seconds(SERVICES["triton"]["stop_grace_period"]) > int(flag.partition("=")[2])


@pytest.mark.parametrize("service", SERVICES)
def test_services_hold_no_privileges(service: str) -> None:
    assert SERVICES[service]["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in SERVICES[service]["security_opt"]
    assert re.search(r"^USER (?!root)\S+$", dockerfile(service), re.MULTILINE)
    if service != "triton":
        assert SERVICES[service]["read_only"] is True


@pytest.mark.parametrize("service", SERVICES)
def test_base_images_are_build_arguments_with_the_same_defaults(service: str) -> None:
    (name, value), *more = SERVICES[service]["build"]["args"].items()
    assert not more
    default = re.fullmatch(rf"\${{{name}:-(.+)}}", value)
    assert default
    assert f"ARG {name}={default[1]}\nFROM ${{{name}}}\n" in dockerfile(service)


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_copied_exists_and_is_let_through(service: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for source in re.findall(r"^COPY (\S+) ", dockerfile(service), re.MULTILINE):
        assert (ROOT / source).exists(), source
        assert {source, source.split("/")[0]} & allowed, source


def test_the_steps_have_what_they_need_in_nvidias_image() -> None:
    imports = set()
    for path in REPOSITORY.glob("*/*/*.py"):
        imports |= set(re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
        imports -= {sibling.stem for sibling in path.parent.glob("*.py")}
    locked = set(re.findall(r"^(\S+)==", (ROOT / "requirements/steps.lock").read_text(), re.MULTILINE))
    standard = {
        "__future__",
        "collections",
        "dataclasses",
        "io",
        "json",
        "pathlib",
        "re",
        "struct",
        "time",
        "traceback",
    }
    standard |= {"typing", "triton_python_backend_utils"}
    assert imports - standard - sys.stdlib_module_names == {"numpy", "PIL"}
    assert locked == {"numpy", "pillow"}


def test_environments_agree_on_what_decides_the_numbers() -> None:
    def versions(lock: str) -> dict[str, str]:
        return dict(re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements" / lock).read_text(), re.MULTILINE))

    for package in ("numpy", "pillow", "onnxruntime", "onnx", "pydantic", "grpcio", "tritonclient"):
        found = {lock: versions(f"{lock}.lock").get(package) for lock in ("dev", "gateway", "steps", "export", "train")}
        assert len({version for version in found.values() if version}) == 1, (package, found)


def test_no_lock_file_names_a_host() -> None:
    for path in (ROOT / "requirements").glob("*.lock"):
        assert "://" not in path.read_text(), path


def test_triton_and_its_repository_share_one_volume() -> None:
    assert "models:/models" in SERVICES["export"]["volumes"]
    assert "models:/models:ro" in SERVICES["triton"]["volumes"]
    assert "--model-repository=/models/model_repository" in SERVICES["triton"]["command"]
    assert "--repository /models/model_repository" in dockerfile("export")
    assert SERVICES["triton"]["depends_on"]["export"]["condition"] == "service_completed_successfully"
    serving = tomllib.loads((ROOT / "export/serving.toml").read_text())
    assert f"engines:{serving['classifier']['engine_cache']}" in SERVICES["triton"]["volumes"]


def test_triton_has_shared_memory_for_the_largest_pictures() -> None:
    assert SERVICES["triton"]["shm_size"] == "1gb"
    memory = SharedMemory.from_settings()
    assert memory.needed < 2**30
    assert memory.largest == Settings.model_fields["max_body_bytes"].default
    step = config.parse((REPOSITORY / "defect_preprocess/config.pbtxt").read_text())
    assert memory.processes == sum(group.count for group in step.instance_group)
    assert memory.pictures == step.max_batch_size


def test_the_watcher_follows_the_same_volume() -> None:
    watch = SERVICES["watch"]
    assert watch["build"] == SERVICES["export"]["build"]
    assert "models:/models" in watch["volumes"]
    assert watch["command"] == ["python", "-m", "export", "watch", "--repository", "/models/model_repository"]
    assert watch["depends_on"]["export"]["condition"] == "service_completed_successfully"


def test_the_gateway_follows_the_routing_file_of_this_checkout() -> None:
    gateway = SERVICES["gateway"]
    assert "./routing:/etc/gateway/routing:ro" in gateway["volumes"]
    assert gateway["environment"]["GATEWAY_ROUTING"] == "/etc/gateway/routing/routing.toml"
    assert Settings.model_fields["routing"].default == Path("routing/routing.toml")
    assert Routing.read(ROOT / "routing/routing.toml") == Routing()
