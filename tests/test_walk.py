"""docs/walk.md, followed to the letter in a copy of the project: each command as it stands, and what it shows."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, free_endpoint, free_port, http, wait_for

BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "docs/walk.md").read_text(), re.DOTALL)
TIME = re.compile(r"\d+\.\d+ s")


@pytest.fixture
def clone(pristine: Path, tmp_path: Path) -> Path:
    """The project, with what takes long to build."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "model_repository", "build", "results"))
    shutil.copytree(pristine, folder / "model_repository")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    os.utime(folder / "requirements/dev.lock", (0, 0))  # the environment is newer
    return folder


@pytest.fixture
def port(clone: Path) -> Iterator[int]:
    """The gateway's of the stack that the first command starts."""
    with pytest.MonkeyPatch.context() as patch:
        port = free_port()
        for name, value in {**free_endpoint().to_environment(), "GATEWAY_PORT": str(port)}.items():
            patch.setenv(name, value)
        with (clone.parent / "serve.log").open("wb") as log:
            serve = subprocess.Popen(["make", "serve"], cwd=clone, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(lambda: "\nready: " in (clone.parent / "serve.log").read_text(), 120)
            yield port
        finally:
            os.killpg(serve.pid, signal.SIGINT)
            serve.wait(90)


def follow(block: str, clone: Path, port: int) -> str:
    """Run a block of commands; where it sleeps, until the gateway follows the routing file, at least."""
    printed = ""
    for part in re.split(r"^sleep \d+\n", block.replace(":8080/", f":{port}/"), flags=re.MULTILINE):
        run = subprocess.run(["bash", "-ec", part], cwd=clone, capture_output=True, text=True, check=False, timeout=200)
        assert run.returncode == 0, f"{part}\n{run.stdout}{run.stderr}"
        printed += run.stdout + run.stderr
        wait_for(lambda: is_followed(clone / "routing/routing.toml", port))
    return printed


def is_followed(file: Path, port: int) -> bool:
    routing = http.get(f"http://127.0.0.1:{port}/version").json()["pipeline"]["routing"]
    trials = {role: routing[role] for role in ("canary", "shadow") if routing[role]}
    said = {role: {key: value for key, value in rule.items() if value is not None} for role, rule in trials.items()}
    return tomllib.loads(file.read_text()) == {"stable": routing["stable"], **said}


def test_the_walk_goes_as_the_page_says(clone: Path, port: int) -> None:
    (serve, *blocks) = BLOCKS
    assert serve == ("sh", "make serve\n")
    printed = ""
    for language, block in blocks:
        if language == "sh":
            printed = follow(block.replace("git checkout routing\n", ""), clone, port)
        elif language == "json":
            assert re.search('"(model_version|release)":"defect-v[12]"', printed), printed
        else:
            lines = [line for line in TIME.sub("", block).splitlines() if not line.startswith("│")]
            assert not [line for line in lines if line not in TIME.sub("", printed)], printed
