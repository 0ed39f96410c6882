"""Each trap, planted in a good repository, is found and named; the good repository has none."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from export import doctor
from export.__main__ import main
from tests.conftest import ROOT


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def save_changed(path: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())


def externalise(path: Path) -> None:
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    path.with_name("weights.bin").unlink()


TRAPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a stray copy of a version": (lambda r: (r / "defect_classifier/2.tmp").mkdir(), "starts with a digit"),
    "a version with a leading zero": (lambda r: (r / "defect_classifier/01").mkdir(), "starts with a digit"),
    "a folder without configuration": (lambda r: (r / ".hidden").mkdir(), "without config.pbtxt"),
    "a broken configuration": (
        lambda r: (r / "defect_preprocess/config.pbtxt").write_text("nonsense {"),
        "not a config.pbtxt",
    ),
    "another name": (
        lambda r: edit(r / "defect_preprocess/config.pbtxt", "defect_preprocess", "x"),
        "names the model x",
    ),
    "every version is visible": (
        lambda r: (r / "defect_classifier/config.pbtxt").write_text(
            re.sub(
                r"version_policy \{.*?\n\}\n", "", (r / "defect_classifier/config.pbtxt").read_text(), flags=re.DOTALL
            )
        ),
        "every version that appears",
    ),
    "a listed version is missing": (lambda r: shutil.rmtree(r / "defect_classifier/1"), "at a cold start"),
    "half of a model": (
        lambda r: os.truncate(r / "defect_classifier/1/model.onnx", 1_000_000),
        "only a part of one",
    ),
    "an opset from the future": (
        lambda r: save_changed(
            r / "defect_classifier/1/model.onnx", lambda m: setattr(m.opset_import[0], "version", 25)
        ),
        "opset 25",
    ),
    "an IR from the future": (
        lambda r: save_changed(r / "defect_classifier/1/model.onnx", lambda m: setattr(m, "ir_version", 13)),
        "IR 13",
    ),
    "weights elsewhere": (lambda r: externalise(r / "defect_classifier/1/model.onnx"), "weights in weights.bin"),
    "an edited step": (
        lambda r: edit(r / "defect_preprocess/1/preprocessing.py", "52_000_000", "90_000_000"),
        "edited after it was published",
    ),
    "other weights": (
        lambda r: save_changed(r / "defect_classifier/1/model.onnx", lambda m: setattr(m, "producer_name", "else")),
        "edited after it was published",
    ),
    "a pin that is not shown": (
        lambda r: edit(r / "defect-v1/config.pbtxt", "model_version: 1", "model_version: 7"),
        "which Triton is not shown",
    ),
    "no pin": (lambda r: edit(r / "defect-v1/config.pbtxt", "model_version: 1", "model_version: -1"), "is the newest"),
    "a step that is gone": (lambda r: shutil.rmtree(r / "defect_postprocess"), "which is not here"),
    "an ensemble without version folder": (lambda r: shutil.rmtree(r / "defect-v1/1"), "without a version folder"),
    "a manifest that lacks something": (
        lambda r: edit(r / "defect-v1/config.pbtxt", "classifier_digest", "classifier_dijest"),
        "classifier_digest",
    ),
    "a cached ensemble": (
        lambda r: (r / "defect-v1/config.pbtxt").open("a").write("response_cache { enable: true }\n"),
        "caches an ensemble",
    ),
    "a date in the future": (
        lambda r: os.utime(r / "defect_preprocess/config.pbtxt", (time.time(), time.time() + 9e6)),
        "dated in the future",
    ),
    "a link that leads out": (lambda r: (r / "defect_classifier/1/more").symlink_to("/etc"), "a link that leads to"),
    "a loop of links": (
        lambda r: (r / "defect_classifier/1/loop").symlink_to(r / "defect_classifier"),
        "a link that leads to",
    ),
    "a dead link": (lambda r: (r / "defect_classifier/1/dead").symlink_to(r / "nowhere"), "a link that leads to"),
}

WARNINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a loose file": (lambda r: (r / "defect_classifier/notes.txt").write_text("x"), "loose file"),
    "byte code": (lambda r: (r / "defect_preprocess/1/__pycache__").mkdir(), "byte code"),
    "a Python step on the GPU": (
        lambda r: edit(r / "defect_preprocess/config.pbtxt", "KIND_CPU", "KIND_GPU"),
        "GPU memory",
    ),
    "a default queue timeout": (
        lambda r: edit(
            r / "defect_preprocess/config.pbtxt",
            "dynamic_batching {",
            "dynamic_batching { default_queue_policy { default_timeout_microseconds: 5 }",
        ),
        "queue timeout",
    ),
}


def test_a_good_repository_has_no_traps(pristine: Path) -> None:
    assert doctor.inspect(pristine) == []
    assert main(["doctor", "--repository", str(pristine)]) == 0


def test_this_checkout_has_no_traps_but_what_git_does_not_keep() -> None:
    problems = {finding.problem for finding in doctor.inspect(ROOT / "model_repository")}
    assert all("has no model.onnx" in problem for problem in problems)


@pytest.mark.parametrize("case", TRAPS)
def test_an_error_is_found_and_named(repository: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    plant, message = TRAPS[case]
    plant(repository)
    assert any(message in f.problem for f in doctor.inspect(repository) if f.severity == "error")
    assert main(["doctor", "--repository", str(repository)]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("case", WARNINGS)
def test_a_warning_is_found_and_does_not_fail(repository: Path, case: str) -> None:
    plant, message = WARNINGS[case]
    plant(repository)
    (finding,) = doctor.inspect(repository)
    assert finding.severity == "warning"
    assert message in finding.problem
    assert main(["doctor", "--repository", str(repository)]) == 0


def test_a_repository_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert main(["doctor", "--repository", str(tmp_path / "nowhere")]) == 1
