"""Programs that come as packages, against a real stack: `make clients` installs them in an environment of their own."""

from __future__ import annotations

import os
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import EXAMPLES, ROOT, GatewayProcess, free_port, wait_for

HERE = Path(__file__).parent
BIN = ROOT / ".venv-clients/bin"
IDLE_S = 8
"""Longer than uvicorn keeps a connection by itself, which is 5 s."""


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("python", "urllib3"), [(BIN / "python", "1."), (sys.executable, "2.")])
def test_requests_sends_a_name_that_is_not_ascii(gateway: GatewayProcess, python: Path, urllib3: str) -> None:
    printed = run(python, HERE / "form.py", f"{gateway.url}/v1/predict", EXAMPLES[0])
    assert printed.startswith(urllib3)
    assert printed.endswith(" 200 {'parcel': 'Müller'} None\n")


def test_aiohttp_keeps_its_pool_over_idle_times(gateway: GatewayProcess) -> None:
    printed = run(BIN / "python", HERE / "pool.py", f"{gateway.url}/v1/predict", EXAMPLES[0], IDLE_S, 3 * IDLE_S)
    assert printed == "{'opened': 4, '200': 12, 'used again': 8}\n"


def test_go_sends_forms_with_and_without_a_file_name(gateway: GatewayProcess, tmp_path: Path) -> None:
    folders = {name: str(tmp_path / name) for name in ("GOCACHE", "GOPATH")}
    printed = run(BIN / "go", "run", HERE / "form.go", f"{gateway.url}/v1/predict", EXAMPLES[0], **folders)
    lines = printed.splitlines()
    assert [line[:13] for line in lines] == ["200 HTTP/1.1 "] * 4, printed
    assert all('"metadata":{"parcel":"7"}' in line for line in lines)


@pytest.fixture
def envoy(gateway: GatewayProcess, tmp_path: Path) -> Iterator[str]:
    port, config = free_port(), tmp_path / "envoy.yaml"
    text = string.Template((HERE / "envoy.yaml").read_text())
    config.write_text(text.substitute(port=port, gateway=gateway.port))
    command = [BIN / "envoy", "--config-path", config, "--use-dynamic-base-id", "--log-level", "warning"]
    with subprocess.Popen(command) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(lambda: httpx.get(f"{url}/health/ready").status_code == 200, 60)
            yield url
        finally:
            process.terminate()


def test_behind_envoy_no_idle_connection_fails(envoy: str) -> None:
    picture = EXAMPLES[0].read_bytes()
    with httpx.Client(base_url=envoy, timeout=60, headers={"Content-Type": "image/jpeg"}) as client:
        for pause in (0, IDLE_S, 3 * IDLE_S):
            time.sleep(pause)
            for _ in range(20):
                assert client.post("/v1/predict", content=picture).status_code == 200
    printed = run("curl", "-sS", "--http2-prior-knowledge", "-H", "Content-Type: image/jpeg", "-w", "%{http_version}",
                  "--data-binary", f"@{EXAMPLES[0]}", f"{envoy}/v1/predict")  # fmt: skip
    assert printed.endswith("}2") and '"route":"stable"' in printed
    chunks = (picture[i : i + 5000] for i in range(0, len(picture), 5000))
    assert httpx.post(f"{envoy}/v1/predict", content=chunks, timeout=60).status_code == 200
    refused = httpx.post(f"{envoy}/v1/predict", content=bytes(30 << 20), timeout=60)
    assert (refused.status_code, refused.json()["code"]) == (413, "body_too_large")
