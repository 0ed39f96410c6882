"""`make serve` as a newcomer runs it: ready, answers, and Ctrl-C leaves nothing."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.conftest import ROOT, free_endpoint, free_port, http, wait_for
from tests.test_triton_runtime import left_by


def test_serve_gets_ready_from_a_clone_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    repository = Path(shutil.copytree(ROOT / "model_repository", tmp_path / "model_repository"))
    for built in repository.glob("*/*/model.onnx"):
        shutil.rmtree(built.parent)  # as in a clone: git keeps no built model
    files = {p for p in repository.rglob("*") if p.is_file()}
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "triton_runtime.stack", "--repository", str(repository)],
        cwd=ROOT,
        env={**os.environ, **free_endpoint().to_environment(), "GATEWAY_PORT": str(port)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line.strip())
            if line.startswith("try: "):
                break
        assert f"ready: http://127.0.0.1:{port}" in printed
        assert any("parcel-damaged.jpg is " in line for line in printed)
        curl = shlex.split(printed[-1].removeprefix("try: "))
        answer = subprocess.run([*curl, "--silent"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert '"model_version":"defect-v1"' in answer
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0
    finally:
        process.terminate()
        process.communicate()
    assert left_by(process) == set()
    added = {p.name for p in repository.rglob("*") if p.is_file()} - {p.name for p in files}
    assert added == {"model.onnx"}
    try:
        http.get(f"http://127.0.0.1:{port}/health/live")
    except httpx.ConnectError:
        pass
    else:
        raise AssertionError("the gateway still answers")


@contextlib.contextmanager
def stack(repository: Path, log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """What `make serve` runs, and says to a file. At the end Ctrl-C ends it, in order, and nothing is left."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "triton_runtime.stack", "--repository", str(repository)],
            cwd=ROOT,
            env={**os.environ, **free_endpoint().to_environment(), **environment},
            stdout=output,
            stderr=output,
        )
    try:
        yield process
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0
    finally:
        process.terminate()
        process.wait(120)
    assert left_by(process) == set()


def test_a_terminal_gets_stages_and_news_and_a_file_all_lines(pristine: Path, tmp_path: Path) -> None:
    repository = Path(shutil.copytree(pristine, tmp_path / "model_repository"))
    log = tmp_path / "log"
    with stack(repository, log, GATEWAY_PORT=str(free_port()), GATEWAY_LOG_FORMAT="text"):
        wait_for(lambda: "logs: " in log.read_text(), 120)
        shown = log.read_text()
        assert re.fullmatch(
            r"starting Triton \.\.\. [\d.]+ s\n"
            r"starting the gateway, which tries each release \.\.\. [\d.]+ s\n"
            r"defect-v1: parcel-damaged\.jpg is damaged \(0\.\d\d\)\nready: \S+\ndocs: \S+/docs\ntry: curl .*\n"
            r"logs: build/serve\.log; Ctrl-C stops everything\n",
            shown,
        ), shown
        drop = repository / "defect_classifier" / "2"
        drop.mkdir()
        (drop / "model.onnx").write_bytes(b"no model")
        refused = "watcher: defect_classifier/2 is refused: files: defect_classifier/2/model.onnx is no ONNX file"
        wait_for(lambda: refused in log.read_text(), 60)
    everything = (ROOT / "build" / "serve.log").read_text()
    assert '"event": "refused"' in everything and '"path": "/v1/predict"' in everything
    assert "defect_classifier 1: on the processor" in everything, "Triton's lines, too"


def children(pid: int) -> dict[str, int]:
    """The parts of a stack, by name, and their process ids."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        line = Path("/proc", child, "cmdline").read_text()
        for name, mark in (("triton", "tritonserver"), ("gateway", "-m\0gateway"), ("watcher", "export\0watch")):
            if mark in line:
                found[name] = int(child)
    return found


def test_a_part_that_is_killed_comes_back_and_says_so(pristine: Path, tmp_path: Path) -> None:
    repository = Path(shutil.copytree(pristine, tmp_path / "model_repository"))
    port = free_port()
    log = tmp_path / "log"
    with stack(repository, log, GATEWAY_PORT=str(port)) as process:

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()
            return http.get(f"http://127.0.0.1:{port}/health/ready", timeout=10).status_code == 200

        wait_for(lambda: "try: " in log.read_text(), 120)
        for name in ("watcher", "gateway", "triton"):
            parts = children(process.pid)
            assert parts.keys() == {"watcher", "gateway", "triton"}
            os.kill(parts[name], signal.SIGKILL)
            wait_for(lambda: children(process.pid).get(name, parts[name]) != parts[name], 60)  # noqa: B023 - at once
            assert f"serve: {name} ended by itself with status -9: it is started again" in log.read_text()
            wait_for(is_ready, 120)
        os.kill(children(process.pid)["gateway"], signal.SIGTERM)  # nobody asked for its end but somebody else
        wait_for(lambda: log.read_text().count("gateway ended by itself") == 2, 60)
        wait_for(is_ready, 60)


def test_serve_names_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = subprocess.run(
            [sys.executable, "-m", "triton_runtime.stack"],
            cwd=ROOT,
            env={**os.environ, "GATEWAY_PORT": str(taken.getsockname()[1])},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert run.returncode == 1
    assert "GATEWAY_PORT" in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_serve_names_a_port_that_is_none() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "triton_runtime.stack"],
        cwd=ROOT,
        env={**os.environ, "GATEWAY_PORT": "eighty"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 1
    assert run.stderr == "serve: GATEWAY_PORT='eighty' is not a port: give a number from 1 to 65535\n"


def test_make_alone_lists_the_targets() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("serve", "test", "lint", "export", "train", "perf", "perf-tools"):
        assert f"make {target} " in listed


def test_torch_is_not_needed() -> None:
    run = subprocess.run([sys.executable, "-m", "export.train", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "make train" in run.stderr
