"""A classifier in half precision, for GPUs: weights and activations in fp16, temperature and softmax in fp32.

The signature stays: uint8 in, float32 out. On the processor such a graph runs too, converting to and fro, so it can be
examined anywhere. It is not rounded after every operator there, so the range of the numbers is looked at apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, shape_inference
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from export import graph
from export.build import ExportError, Report
from export.candidate import Candidate
from export.exam import HALF_DIFFERENCE
from export.quantize import pictures, prepare, probabilities
from export.steps import Step

_LARGEST = float(np.finfo(np.float16).max)

_GPU = Path("/dev/nvidiactl")


def convert(candidate: Candidate, folder: Path, report: Report) -> Candidate:
    """The same pipeline with its classifier in fp16, tried on the pictures in `folder`, at any depth.

    The figures of the model card are the original's and are left out; what was measured here takes their place.

    Raises:
        ExportError: no pictures, a graph that cannot be converted, numbers beyond fp16, or other answers.
    """
    pixels = prepare(candidate, pictures(folder, at_least=1))
    original = onnx.load_from_string(candidate.steps["classifier"].files["model.onnx"])
    _require_range(original, pixels)
    try:
        model = graph.seal(_convert(graph.unseal(original)))
        before, after = probabilities(original, pixels), probabilities(model, pixels)
    except Exception as error:  # the converter raises whatever its parts raise, and so does ONNX Runtime
        raise ExportError(f"the graph cannot be converted: {type(error).__name__}: {error}") from error
    agreement = float(np.mean(before.argmax(1) == after.argmax(1)))
    differences = np.abs(before - after)
    report(
        f"agrees with fp32 on {agreement:.3f} of {len(pixels)} pictures, "
        f"largest difference {differences.max():.4f} (at most {HALF_DIFFERENCE:g})"
    )
    if not differences.max() <= HALF_DIFFERENCE:  # NaN is no answer either
        raise ExportError(f"fp16 differs from fp32 by {differences.max():.3f}: stay with fp32")
    if not _GPU.exists():
        report("there is no GPU here: on the processor, fp16 is slower than fp32")
    return replace(
        candidate,
        steps={**candidate.steps, "classifier": Step.of_graph(model)},
        built_from=f"{candidate.built_from}, fp16",
        evaluation={
            "precision": "fp16",
            "agreement_with_fp32": round(agreement, 4),
            "mean_difference_to_fp32": round(float(differences.mean()), 4),
        },
    )


def _require_range(model: ModelProto, pixels: Sequence[np.ndarray]) -> None:
    """Refuse a network that computes, in fp32 and on these pictures, what fp16 cannot hold."""
    open_model = shape_inference.infer_shapes(model)
    inner = [v for v in open_model.graph.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    open_model.graph.output.extend(inner)
    session = onnxruntime.InferenceSession(open_model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in inner]
    for picture in pixels:
        for name, value in zip(names, session.run(names, {graph.PIXELS: picture}), strict=True):
            if not np.abs(value).max() <= _LARGEST:
                raise ExportError(
                    f"{name} reaches {np.abs(value).max():.3g}, fp16 ends at {_LARGEST:g}: stay with fp32"
                )


def _convert(model: ModelProto) -> ModelProto:
    """The graph in fp16 up to what the temperature divides; what follows is cut off, and put back as it was."""
    nodes, (output,) = list(model.graph.node), model.graph.output
    behind = [i for i, n in enumerate(nodes) if {*graph.CLOSING} & {*n.input} or graph.PROBABILITIES in n.output]
    tail = nodes[min(behind) :]
    body = ModelProto()
    body.CopyFrom(model)
    del body.graph.node[:]
    body.graph.node.extend(nodes[: min(behind)])
    body.graph.output[0].name = next(name for name in tail[0].input if name not in graph.CLOSING)
    converted: ModelProto = convert_float_to_float16(
        body, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, "Softmax"]
    )
    ordered = _in_order(converted.graph.node)
    del converted.graph.node[:]
    del converted.graph.value_info[:]  # types that were inferred on the way
    converted.graph.node.extend([*ordered, *tail])
    converted.graph.output[0].CopyFrom(output)
    return converted


def _in_order(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Every node after those that it takes from: the converter puts its own ones last."""
    producers = {name: i for i, node in enumerate(nodes) for name in node.output}
    takes = {i: [producers[name] for name in node.input if name in producers] for i, node in enumerate(nodes)}
    return [nodes[i] for i in TopologicalSorter(takes).static_order()]
