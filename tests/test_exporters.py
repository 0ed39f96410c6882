"""ONNX files as exporters write them: wrapped and compared, or refused with what to change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from PIL import Image

from export import build, fp16, graph, reference
from export.__main__ import main
from export.repository import Repository
from export.spec import Spec
from tests.conftest import ROOT
from tests.test_export import run

CASES = ROOT.parent / "shared/cases/models"
SIZE = 32


def network(
    labels: int = 3,
    *,
    channels: int = 3,
    kind: int = TensorProto.FLOAT,
    batch: object = "N",
    opset: int = 17,
    ir_version: int = 8,
    weights_as_inputs: bool = False,
    tail: tuple[str, ...] = (),
    squeeze: bool = False,
    declared: bool = True,
) -> ModelProto:
    """A small convolution, mean over the picture, and a matrix; `tail` are operators of one input behind it."""
    chance = np.random.default_rng(3)
    number = helper.tensor_dtype_to_np_dtype(kind)
    weights = {
        "W1": chance.normal(0, 0.4, (8, channels, 3, 3)).astype(number),
        "W2": chance.normal(0, 1.5, (8, labels)).astype(number),
    }
    nodes = [
        helper.make_node("Conv", ["input", "W1"], ["a"], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
    ]
    if squeeze:  # as PyTorch exports x.squeeze(): the branches take from around them
        nodes += [
            helper.make_node("Shape", ["c"], ["shape"]),
            helper.make_node("Gather", ["shape", "three"], ["side"]),
            helper.make_node("Equal", ["side", "one"], ["is_one"]),
        ]
        thin = helper.make_graph(
            [helper.make_node("Flatten", ["c"], ["thin"])],
            "then",
            [],
            [helper.make_tensor_value_info("thin", kind, None)],
        )
        same = helper.make_graph(
            [helper.make_node("Identity", ["c"], ["same"])],
            "else",
            [],
            [helper.make_tensor_value_info("same", kind, None)],
        )
        nodes.append(helper.make_node("If", ["is_one"], ["e"], then_branch=thin, else_branch=same))
        nodes.append(helper.make_node("Reshape", ["e", "rows"], ["d"]))
        weights |= {"three": np.array(3), "one": np.array(1), "rows": np.array([-1, 8])}
    else:
        nodes.append(helper.make_node("Flatten", ["c"], ["d"]))
    nodes.append(helper.make_node("MatMul", ["d", "W2"], ["x0"]))
    for i, operator in enumerate(tail):
        nodes.append(helper.make_node(operator, [f"x{i}"], [f"x{i + 1}"]))
    nodes.append(helper.make_node("Identity", [f"x{len(tail)}"], ["scores"]))
    inputs = [helper.make_tensor_value_info("input", kind, [batch, channels, SIZE, SIZE])]
    if weights_as_inputs:
        inputs += [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in weights.items()
        ]
    body = helper.make_graph(
        nodes,
        "user",
        inputs,
        [helper.make_tensor_value_info("scores", kind, [batch, labels] if declared else None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def spec(labels: int = 3, kind: str = "logits", **picture: object) -> Spec:
    scaled = {"size": SIZE, "scale": 1 / 255, "mean": 0.45, "std": 0.22, **picture}
    names = ["apple", "pear", "plum"][:labels]
    return Spec.model_validate({"name": "fruit", "labels": names, "input": scaled, "output": {"kind": kind}})


def export(model: ModelProto, described: Spec, folder: Path) -> ModelProto:
    """The classifier, after the comparison with the graph as it came."""
    onnx.save(model, folder / "user.onnx")
    repository = Repository(ROOT / "model_repository")
    built = build.from_onnx(folder / "user.onnx", described, repository, lambda _: None)
    return onnx.load_from_string(built.steps["classifier"].files["model.onnx"])


FORMS: dict[str, dict] = {
    "IR 10": {"ir_version": 10},
    "IR 11": {"ir_version": 11},
    "IR 13": {"ir_version": 13},
    "weights as inputs, IR 3": {"ir_version": 3, "opset": 13, "weights_as_inputs": True},
    "weights as inputs, IR 3, an old opset": {"ir_version": 3, "opset": 9, "weights_as_inputs": True},
    "weights as inputs, IR 8": {"weights_as_inputs": True},
    "a squeeze of unknown shape": {"squeeze": True},
    "a squeeze of unknown shape, undeclared": {"squeeze": True, "declared": False},
    "a squeeze and an old opset": {"squeeze": True, "opset": 11},
    "a batch of -1": {"batch": -1},
    "a batch of 0": {"batch": 0},
    "a batch without a name": {"batch": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_what_exporters_write_is_exported_with_the_same_numbers(form: str, tmp_path: Path) -> None:
    wrapped = export(network(**FORMS[form]), spec(), tmp_path)
    pixels = build.sample_pixels(SIZE)
    expected = reference.onnx_probabilities(network(), spec(), pixels)
    assert np.abs(run(wrapped, pixels)[0] - expected).max() < 1e-4
    assert graph.MAX_IR_VERSION >= wrapped.ir_version >= 4


def test_half_precision_is_compared_with_what_it_rounds(tmp_path: Path) -> None:
    for kind, tail in (("logits", ()), ("probabilities", ("Softmax",))):
        wrapped = export(network(kind=TensorProto.FLOAT16, tail=tail), spec(kind=kind), tmp_path)
        got = run(wrapped, build.sample_pixels(SIZE))[0]
        assert (
            np.abs(got - run(export(network(tail=tail), spec(kind=kind), tmp_path), build.sample_pixels(SIZE))[0]).max()
            < 0.02
        )
        assert np.abs(got.sum(axis=1) - 1).max() < 1e-6


@pytest.mark.parametrize("tail", [("Sigmoid",), ()])
def test_one_value_is_that_of_the_second_of_two_labels(tail: tuple[str, ...], tmp_path: Path) -> None:
    kind = "probabilities" if tail else "logits"
    pixels = build.sample_pixels(SIZE)
    got = run(export(network(1, tail=tail), spec(2, kind), tmp_path), pixels)[0]
    raw = reference.onnx_outputs(network(1, tail=("Sigmoid",)), spec(2), pixels)[:, 0]
    assert got.shape == (4, 2)
    assert np.abs(got[:, 1] - raw).max() < 1e-5
    assert np.abs(got.sum(axis=1) - 1).max() < 1e-6
    halved = fp16._convert(graph.unseal(export(network(1, tail=tail), spec(2, kind), tmp_path)))
    assert np.abs(run(graph.seal(halved), pixels)[0] - got).max() < 0.02


def test_one_value_cannot_tell_three_labels_apart(tmp_path: Path) -> None:
    with pytest.raises(graph.GraphError, match="one value a picture, enough for two labels; the spec has 3"):
        export(network(1), spec(3), tmp_path)


@pytest.mark.parametrize("tail", [("Softmax",), ("Softmax", "Identity"), ("Sigmoid",)])
def test_probabilities_are_not_taken_for_logits(tail: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(build.ExportError, match=r"probabilities already .*set output\.kind to 'probabilities'"):
        export(network(tail=tail), spec(), tmp_path)


def test_a_logarithm_of_probabilities_is_as_good_as_logits(tmp_path: Path) -> None:
    pixels = build.sample_pixels(SIZE)
    got = run(export(network(tail=("LogSoftmax",)), spec(), tmp_path), pixels)[0]
    assert np.abs(got - reference.onnx_probabilities(network(), spec(), pixels)).max() < 1e-5


@pytest.mark.parametrize("tail", [(), ("Sigmoid",)])
def test_what_does_not_sum_to_one_is_no_probabilities(tail: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(build.ExportError, match="not probabilities"):
        export(network(tail=tail), spec(kind="probabilities"), tmp_path)


def quantized(model: ModelProto, scale: float) -> ModelProto:
    """With the output rounded to eight bits."""
    nodes = model.graph.node
    last = nodes[-1].input[0]
    del nodes[-1]
    nodes.append(helper.make_node("QuantizeLinear", [last, "scale", "zero"], ["q"]))
    nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["scores"]))
    constants = {"scale": np.float32(scale), "zero": np.uint8(0)}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v), k) for k, v in constants.items())
    return model


def test_a_quantized_softmax_sums_to_one_in_the_release(tmp_path: Path) -> None:
    described = spec(kind="probabilities")
    user = quantized(network(tail=("Softmax",)), 0.00712)
    pixels = build.sample_pixels(SIZE)
    assert np.abs(reference.onnx_outputs(user, described, pixels).sum(axis=1) - 1).max() > 1e-3
    wrapped = export(user, described, tmp_path)
    assert np.abs(run(wrapped, pixels)[0].sum(axis=1) - 1).max() < 1e-6
    with pytest.raises(build.ExportError, match="not probabilities"):
        export(quantized(network(tail=("Sigmoid",)), 1 / 255), described, tmp_path)


@pytest.mark.parametrize("layout", ["NCHW"])
def test_one_channel_is_grey_as_pillow_has_it(layout: str, tmp_path: Path) -> None:
    described = spec(channels="grey", layout=layout)
    wrapped = export(network(channels=1), described, tmp_path)
    pixels = np.random.default_rng(1).integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
    grey = np.asarray(Image.fromarray(pixels[0]).convert("L").convert("RGB"))[None]
    assert (run(wrapped, pixels)[0] == run(wrapped, grey)[0]).all(), "the very same whole numbers"
    with pytest.raises(graph.GraphError, match="channels RGB"):
        export(network(channels=1), spec(), tmp_path)
    with pytest.raises(ValueError, match="one number each where channels is grey"):
        spec(channels="grey", mean=(0.4, 0.4, 0.4))


def test_channels_may_be_turned_round(tmp_path: Path) -> None:
    pixels = build.sample_pixels(SIZE)
    turned = run(export(network(), spec(channels="BGR"), tmp_path), pixels[..., ::-1].copy())[0]
    assert np.abs(turned - run(export(network(), spec(), tmp_path), pixels)[0]).max() < 1e-6


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is not here; the kinds are made above")
@pytest.mark.parametrize(
    ("model", "described", "outcome"),
    [
        ("ir11", "fruit", ""),
        ("opset13_ir3_init_inputs", "fruit", ""),
        ("torch_squeeze_if", "fruit", ""),
        ("fp16_whole", "fruit", ""),
        ("dim_minus1", "fruit", ""),
        ("sigmoid_one_output", "binary", ""),
        ("softmax_left_default_logits", "fruit", "probabilities already (Softmax)"),
        ("qdq_sm", "fruit-probabilities", ""),
        ("grey", "fruit", "channels RGB"),
        ("grey", "grey", ""),
    ],
)
def test_each_file_of_the_field_has_its_outcome(
    model: str,
    described: str,
    outcome: str,
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With its exam, from the command line."""
    text = (CASES / f"{'fruit' if described == 'grey' else described}.toml").read_text()
    if described == "grey":
        text = text.split("mean")[0] + 'mean = 0.45\nstd = 0.22\nchannels = "grey"\n'
    (tmp_path / "spec.toml").write_text(text)
    command = ["--onnx", str(CASES / f"{model}.onnx"), "--spec", str(tmp_path / "spec.toml")]
    assert main([*command, "--repository", str(repository)]) == bool(outcome)
    assert outcome in " ".join(capsys.readouterr().err.split())
