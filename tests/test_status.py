"""`export status`: what is there, what is missing, what no release pins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from export.__main__ import main
from export.repository import Repository
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def status(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["status", "--repository", str(root)])
    return code, capsys.readouterr().out


def test_a_release_is_listed_with_its_pins(pristine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = status(pristine, capsys)
    assert code == 0
    (release,) = Repository(pristine).releases("defect")
    (row,) = (line for line in text.splitlines() if release.name in line)
    for pin in release.steps.values():
        assert f"{pin.version} ({pin.digest[:8]})" in row
    assert "complete" in row
    assert release.built_at in row
    assert "not in a release" not in text


def test_what_is_missing_and_what_no_release_pins_is_said(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "defect_classifier/1/model.onnx").unlink()
    (repository / "defect_preprocess/4").mkdir()
    code, text = status(repository, capsys)
    assert code == 0
    assert "defect_classifier missing" in text
    assert "not in a release: defect_preprocess/4" in text


def test_an_empty_repository_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = status(tmp_path, capsys)
    assert code == 1
    assert "make export" in text


def test_a_release_that_cannot_be_read_is_an_error(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "defect-v1/config.pbtxt").write_text("nonsense {")
    code, text = status(repository, capsys)
    assert code == 1
    assert "not a config.pbtxt" in text


def run_status(root: Path, stdout: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export", "status", "--repository", str(root)]
    return subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120)


def test_names_that_are_no_text_are_shown(repository: Path) -> None:
    (repository / "defect_classifier" / os.fsdecode(b"4\xff")).mkdir()
    command = [sys.executable, "-m", "export", "doctor", "--repository", str(repository)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "defect_classifier/4\\udcff" in run.stdout
    assert run.stderr == ""


def test_output_that_nobody_takes_is_no_crash(pristine: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full, open(writing, "w") as closed:
        runs = {name: run_status(pristine, file.fileno()) for name, file in {"full": full, "closed": closed}.items()}
    assert [run.returncode for run in runs.values()] == [1, 1]
    assert runs["closed"].stderr == ""
    assert runs["full"].stderr == "export: cannot write what there is to say: No space left on device\n"
    without = ['exec "$0" -m export status --repository "$1" >&-', sys.executable, str(pristine)]
    run = subprocess.run(["bash", "-c", *without], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
