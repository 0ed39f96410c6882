"""`export status`: what is there, what is missing, what no release pins."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.__main__ import main
from export.repository import Repository


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
