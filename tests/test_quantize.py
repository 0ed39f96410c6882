"""int8: the same signature and nearly the same decisions, with less arithmetic; its figures are its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from export import build, exam, graph, quantize
from export.__main__ import main
from export.candidate import Candidate
from export.repository import Repository
from tests.conftest import PARCELS
from tests.offline import PREPROCESSING
from tests.test_export import CHECKPOINT


@pytest.fixture(scope="module")
def original(pristine: Path) -> Candidate:
    return build.from_checkpoint(CHECKPOINT, "defect", Repository(pristine), lambda _: None)


@pytest.fixture(scope="module")
def quantized(original: Candidate) -> Candidate:
    """Calibrated on photographs where the data is at hand, on the golden drawings elsewhere."""
    photographs = PARCELS / "train"
    return quantize.int8(original, photographs if photographs.is_dir() else exam.GOLDEN, lambda _: None)


def model_of(built: Candidate) -> onnx.ModelProto:
    return onnx.load_from_string(built.steps["classifier"].files["model.onnx"])


def probabilities(built: Candidate, pixels: np.ndarray) -> np.ndarray:
    content = built.steps["classifier"].files["model.onnx"]
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([graph.PROBABILITIES], {graph.PIXELS: pixels})[0])


def test_the_signature_stays_and_the_digest_is_its_own(original: Candidate, quantized: Candidate) -> None:
    before, after = model_of(original), model_of(quantized)
    for field in ("input", "output"):
        assert [str(value) for value in getattr(after.graph, field)] == [
            str(value) for value in getattr(before.graph, field)
        ]
    assert {entry.key: entry.value for entry in after.metadata_props}["labels"] == "\n".join(original.labels)
    assert graph.opset_of(after) <= graph.MAX_OPSET
    assert after.ir_version <= graph.MAX_IR_VERSION
    assert graph.content_digest(after) == quantized.steps["classifier"].digest != original.steps["classifier"].digest
    assert {step: quantized.steps[step] for step in ("preprocess", "postprocess")} == {
        step: original.steps[step] for step in ("preprocess", "postprocess")
    }


def test_every_convolution_is_quantized_and_a_quarter_of_the_size_is_left(
    original: Candidate, quantized: Candidate
) -> None:
    model = model_of(quantized)
    producers = {output: node.op_type for node in model.graph.node for output in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert convolutions
    assert all(producers[name] == "DequantizeLinear" for node in convolutions for name in node.input[:2])
    sizes = [len(built.steps["classifier"].files["model.onnx"]) for built in (quantized, original)]
    assert sizes[0] < 0.3 * sizes[1]


def test_its_figures_are_those_that_were_measured(original: Candidate, quantized: Candidate) -> None:
    assert "accuracy" in original.evaluation
    assert set(quantized.evaluation) == {"precision", "agreement_with_fp32", "mean_difference_to_fp32"}
    assert quantized.evaluation["agreement_with_fp32"] >= quantize.MIN_AGREEMENT
    assert quantized.built_from.endswith(", int8")


@pytest.mark.skipif(not (PARCELS / "valid").is_dir(), reason="the labelled photographs are not at hand")
def test_accuracy_is_within_a_point_of_the_originals(original: Candidate, quantized: Candidate) -> None:
    paths = sorted((PARCELS / "valid").glob("*/*.jpg"))
    truth = np.array([original.labels.index(path.parent.name) for path in paths])
    pixels = np.stack([PREPROCESSING.preprocess(path.read_bytes(), 224) for path in paths])
    accuracy = [np.mean(probabilities(built, pixels).argmax(1) == truth) for built in (original, quantized)]
    assert abs(accuracy[0] - accuracy[1]) <= 0.0103, "two pictures of 195"


def test_a_quantized_release_is_published_beside_the_original(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--repository", str(repository), "--precision", "int8", "--calibration", str(exam.GOLDEN)]
    assert main(command) == 0, capsys.readouterr().err
    first, second = Repository(repository).releases("defect")
    assert {step for step in first.steps if first.steps[step] != second.steps[step]} == {"classifier"}
    assert second.evaluation["precision"] == "int8"
    assert main(command) == 0
    assert len(Repository(repository).releases("defect")) == 2, "quantizing twice gives the same graph"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--precision", "int8"], "go together"), (["--calibration", "photos"], "go together")],
)
def test_precision_and_calibration_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_too_few_or_broken_pictures_are_refused(original: Candidate, tmp_path: Path) -> None:
    with pytest.raises(build.ExportError, match="holds 0 pictures; 8 or more are needed"):
        quantize.int8(original, tmp_path, lambda _: None)
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(b"no picture")
    with pytest.raises(build.ExportError, match="cannot be used"):
        quantize.int8(original, tmp_path, lambda _: None)
