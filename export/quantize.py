"""A classifier in eight-bit integers: ONNX Runtime's static QDQ quantization, calibrated through our preprocessing.

Weights per channel, signed; activations unsigned. Weights use seven of their eight bits: processors without VNNI add
two products in sixteen bits, which eight would overflow.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from export import graph
from export.build import ExportError, Report
from export.candidate import Candidate
from export.steps import Step, is_picture, load_module

MIN_PICTURES, MAX_PICTURES = 8, 256
MIN_AGREEMENT = 0.9
"""Share of the calibration pictures on which the decision must be that of the original."""

_SMALLEST = 1e-3
"""Weights of a channel below this make a scale so small that the bias, counted in it, does not fit into 32 bits."""

_OPERATORS = ["Conv", "Gemm", "MatMul", "Add", "Clip", "Relu", "GlobalAveragePool", "Softmax"]


def int8(candidate: Candidate, folder: Path, report: Report) -> Candidate:
    """The same pipeline with its classifier in int8, calibrated on the pictures in `folder`, at any depth.

    The figures of the model card are the original's and are left out; what was measured here takes their place.

    Raises:
        ExportError: too few pictures, a graph that cannot be quantized, or one that then decides differently.
    """
    chosen = pictures(folder, at_least=MIN_PICTURES)
    report(f"calibrating int8 on {len(chosen)} pictures")
    pixels = prepare(candidate, chosen)
    original = onnx.load_from_string(candidate.steps["classifier"].files["model.onnx"])
    try:
        model = graph.seal(_quantize(graph.unseal(original), pixels))
    except graph.GraphError:
        raise
    except Exception as error:  # the quantizer raises whatever its parts raise
        raise ExportError(f"the graph cannot be quantized: {type(error).__name__}: {error}") from error
    before, after = probabilities(original, pixels), probabilities(model, pixels)
    agreement = float(np.mean(before.argmax(1) == after.argmax(1)))
    difference = float(np.abs(before - after).mean())
    report(f"agrees with fp32 on {agreement:.3f} (at least {MIN_AGREEMENT:g}), mean difference {difference:.3f}")
    if not agreement >= MIN_AGREEMENT:
        raise ExportError(f"int8 agrees with fp32 on only {agreement:.3f} of the calibration pictures")
    return replace(
        candidate,
        steps={**candidate.steps, "classifier": Step.of_graph(model)},
        built_from=f"{candidate.built_from}, int8",
        evaluation={
            "precision": "int8",
            "agreement_with_fp32": round(agreement, 4),
            "mean_difference_to_fp32": round(difference, 4),
        },
    )


def pictures(folder: Path, at_least: int) -> list[Path]:
    """Pictures from all over a folder, `MAX_PICTURES` at most.

    Raises:
        ExportError: there are fewer than `at_least`.
    """
    found = sorted(path for path in folder.rglob("*") if is_picture(path))
    if len(found) < at_least:
        raise ExportError(f"{folder} holds {len(found)} pictures; {at_least} or more are needed")
    return found[:: -(-len(found) // MAX_PICTURES)]


def prepare(candidate: Candidate, paths: Sequence[Path]) -> list[np.ndarray]:
    """The pictures as this very candidate prepares them, uint8 (1, size, size, 3) each.

    Raises:
        ExportError: one of them is no picture.
    """
    with tempfile.TemporaryDirectory(prefix="quantize-") as folder:
        for name, content in candidate.steps["preprocess"].files.items():
            Path(folder, name).write_bytes(content)
        preprocess = load_module(Path(folder, "preprocessing.py")).preprocess
        try:
            return [preprocess(path.read_bytes(), candidate.size)[None] for path in paths]
        except ValueError as error:
            raise ExportError(f"a picture to try it with cannot be used: {error}") from error


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, pixels: Sequence[np.ndarray]) -> None:
        self._rest = iter(pixels)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._rest, None)
        return None if batch is None else {graph.PIXELS: batch}


def _quantize(model: ModelProto, pixels: Sequence[np.ndarray]) -> ModelProto:
    labels = {entry.key: entry.value for entry in model.metadata_props}
    opsets, ir_version = list(model.opset_import), model.ir_version
    logging.disable(logging.WARNING)  # it advises steps that batch normalisation, folded here already, would need
    try:
        with tempfile.TemporaryDirectory(prefix="quantize-") as folder:
            source, target = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
            source.write_bytes(_without_dead_channels(model).SerializeToString())
            quantize_static(
                str(source),
                str(target),
                _Reader(pixels),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
                calibrate_method=CalibrationMethod.MinMax,
                op_types_to_quantize=_OPERATORS,
                # Probabilities in 256 steps would be too coarse; the operator is listed so that its range is known.
                nodes_to_exclude=[node.name for node in model.graph.node if node.op_type == "Softmax"],
            )
            quantized = onnx.load(target)
    finally:
        logging.disable(logging.NOTSET)
    quantized.ir_version = ir_version
    quantized.producer_name = model.producer_name
    quantized.producer_version = ""
    helper.set_model_props(quantized, labels)
    del quantized.opset_import[:]
    quantized.opset_import.extend(opsets)
    return quantized


def _without_dead_channels(model: ModelProto) -> ModelProto:
    """The graph with every output channel of a convolution having a weight of at least `_SMALLEST`."""
    model = onnx.load_from_string(model.SerializeToString())
    kernels = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    for tensor in model.graph.initializer:
        if tensor.name in kernels:
            weights = numpy_helper.to_array(tensor).copy()
            rows = weights.reshape(len(weights), -1)
            rows[np.abs(rows).max(axis=1) < _SMALLEST, 0] = _SMALLEST
            tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
    return model


def probabilities(model: ModelProto, pixels: Sequence[np.ndarray]) -> np.ndarray:
    """What a sealed graph answers, float32 (pictures, labels)."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run([graph.PROBABILITIES], {graph.PIXELS: each})[0] for each in pixels])
