"""fp16: the same signature and the same decisions, in half the bytes; what does not fit into it is not exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import build, exam, fp16, graph
from export.__main__ import main
from export.candidate import Candidate
from export.quantize import prepare, probabilities
from export.repository import Repository
from export.steps import is_picture
from tests import drops
from tests.test_export import CHECKPOINT
from tests.test_quantize import model_of


@pytest.fixture(scope="module")
def original(pristine: Path) -> Candidate:
    return build.from_checkpoint(CHECKPOINT, "defect", Repository(pristine), lambda _: None)


@pytest.fixture(scope="module")
def halved(original: Candidate) -> Candidate:
    return fp16.convert(original, exam.GOLDEN, lambda _: None)


def test_the_signature_stays_and_the_digest_is_its_own(original: Candidate, halved: Candidate) -> None:
    before, after = model_of(original), model_of(halved)
    for field in ("input", "output"):
        assert [str(value) for value in getattr(after.graph, field)] == [
            str(value) for value in getattr(before.graph, field)
        ]
    assert {entry.key: entry.value for entry in after.metadata_props}["labels"] == "\n".join(original.labels)
    assert graph.opset_of(after) == graph.opset_of(before)
    assert graph.content_digest(after) == halved.steps["classifier"].digest != original.steps["classifier"].digest
    sizes = [len(built.steps["classifier"].files["model.onnx"]) for built in (halved, original)]
    assert sizes[0] < 0.52 * sizes[1]


def test_everything_but_temperature_and_softmax_is_in_half_precision(halved: Candidate) -> None:
    model = onnx.shape_inference.infer_shapes(model_of(halved))
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    kinds |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Clip", "Add", "Gemm"):
            assert {kinds[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT16}, node.name
        if node.op_type in ("Div", "Softmax"):
            assert {kinds[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT}, node.name


def test_it_answers_nearly_the_same_and_says_how_nearly(original: Candidate, halved: Candidate) -> None:
    pixels = prepare(original, [path for path in sorted(exam.GOLDEN.glob("*")) if is_picture(path)])
    before, after = (probabilities(model_of(built), pixels) for built in (original, halved))
    assert 0 < np.abs(before - after).max() < 0.01
    assert np.abs(after.sum(axis=1) - 1).max() < 1e-6
    assert halved.evaluation == {
        "precision": "fp16",
        "agreement_with_fp32": 1.0,
        "mean_difference_to_fp32": round(float(np.abs(before - after).mean()), 4),
    }
    assert halved.built_from.endswith(", fp16")


def test_a_halved_release_is_published_beside_the_original(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--repository", str(repository), "--precision", "fp16"]
    assert main(command) == 0
    assert fp16._GPU.exists() or "slower than fp32" in capsys.readouterr().err
    first, second = Repository(repository).releases("defect")
    assert {step for step in first.steps if first.steps[step] != second.steps[step]} == {"classifier"}
    assert second.evaluation["precision"] == "fp16"
    assert second.evaluation["cost"] > 0
    assert "not judged" in second.exam["checks"]["cost"]
    assert (first.tolerance, second.tolerance) == (0.005, exam.HALF_DIFFERENCE)
    assert main(command) == 0
    assert len(Repository(repository).releases("defect")) == 2, "converting twice gives the same graph"


def test_the_cost_of_a_halved_drop_is_not_judged_either(halved: Candidate, repository: Path) -> None:
    """On a processor it is more than twice that of the original."""
    folder = Repository(repository).step_folder("defect", "classifier", 2)
    folder.mkdir()
    (folder / "model.onnx").write_bytes(halved.steps["classifier"].files["model.onnx"])
    assert main(["release", "--repository", str(repository), "--classifier", "2"]) == 0
    (_, second) = Repository(repository).releases("defect")
    assert "not judged" in second.exam["checks"]["cost"]


def own_model(pristine: Path, folder: Path, network: onnx.ModelProto) -> Candidate:
    onnx.save(network, folder / "own.onnx")
    return build.from_onnx(folder / "own.onnx", drops.SPEC, Repository(pristine), lambda _: None)


def test_a_model_of_ones_own_can_be_halved(pristine: Path, tmp_path: Path) -> None:
    own = own_model(pristine, tmp_path, drops.network())
    assert fp16.convert(own, exam.GOLDEN, lambda _: None).evaluation["agreement_with_fp32"] == 1.0


def test_numbers_that_do_not_fit_are_refused(pristine: Path, tmp_path: Path) -> None:
    network = drops.network()
    mean, product, add = network.graph.node
    there = helper.make_node("Mul", ["product", "large"], ["much"])
    back = helper.make_node("Div", ["much", "large"], ["again"])
    add.input[0] = "again"
    del network.graph.node[:]
    network.graph.node.extend([mean, product, there, back, add])
    network.graph.initializer.append(numpy_helper.from_array(np.float32([6e4]), "large"))
    with pytest.raises(build.ExportError, match="fp16 ends at 65504"):
        fp16.convert(own_model(pristine, tmp_path, network), exam.GOLDEN, lambda _: None)


def test_without_pictures_there_is_nothing_to_compare(original: Candidate, tmp_path: Path) -> None:
    with pytest.raises(build.ExportError, match="holds 0 pictures"):
        fp16.convert(original, tmp_path, lambda _: None)
