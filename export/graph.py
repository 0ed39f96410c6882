"""ONNX graphs with the one signature that a pipeline's classifier has, whatever network is inside.

    PIXELS        uint8   [N, size, size, 3]  RGB
    PROBABILITIES float32 [N, labels]         rows sum to one
    DIGEST        uint8   [N, 32]             SHA-256 of everything else in the graph, a constant

Normalisation, temperature and softmax are nodes of the graph, so nothing about the numbers lives outside it.
`from_checkpoint` builds the project's own network; `from_onnx` wraps a graph of the user's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper, shape_inference, version_converter

from export import efficientnet as net
from export.spec import Spec

PIXELS, PROBABILITIES, DIGEST = "PIXELS", "PROBABILITIES", "DIGEST"

OPSET, IR_VERSION = 17, 8
"""What is written: old enough for every server since 22.07."""
MAX_OPSET, MAX_IR_VERSION = 21, 10
"""What the target can load: the 24.10 release holds ONNX Runtime 1.19."""

TEMPERATURE, ONE, TOTAL_OF = "temperature", "one", "total of"
CLOSING = (TEMPERATURE, ONE, TOTAL_OF)
"""Constants that only the nodes behind a network take, which make probabilities of what it returns."""

_SEAL = "seal/"
"""Prefix of the nodes and constants that only produce DIGEST; they are left out of what is digested."""


class GraphError(ValueError):
    """A graph that cannot be served; the message says what is wrong and what to do."""


def from_checkpoint(weights: Mapping[str, np.ndarray], labels: Sequence[str], temperature: float) -> ModelProto:
    """The graph of an EfficientNet-Lite0 checkpoint, with batch normalisation folded into the convolutions.

    Args:
        weights: the arrays of a checkpoint by name (see `export.efficientnet`), of any float type.
        labels: of the classifier's outputs, in order.
        temperature: divides the logits, so that the probabilities are calibrated.

    Raises:
        GraphError: a weight is missing or has the wrong shape.
    """
    build = _Builder()
    x = build.add("Cast", [PIXELS], to=TensorProto.FLOAT)
    x = build.add("Sub", [x, build.constant("mean", np.float32(net.MEAN))])
    x = build.add("Mul", [x, build.constant("scale", np.float32(1 / net.SCALE))])
    x = build.add("Transpose", [x], perm=[0, 3, 1, 2])
    x = _convolve(build, net.STEM, x, weights)
    for block in net.BLOCKS:
        y = x
        for conv in block.convs:
            y = _convolve(build, conv, y, weights)
        x = build.add("Add", [x, y]) if block.residual else y
    x = _convolve(build, net.HEAD, x, weights)
    x = build.add("Flatten", [build.add("GlobalAveragePool", [x])], axis=1)
    kernel = _weight(weights, f"{net.CLASSIFIER}.weight", (len(labels), net.FEATURES))
    bias = _weight(weights, f"{net.CLASSIFIER}.bias", (len(labels),))
    x = build.add("Gemm", [x, build.constant("fc.weight", kernel), build.constant("fc.bias", bias)], transB=1)
    x = build.add("Div", [x, build.constant(TEMPERATURE, np.float32(temperature))])
    build.add("Softmax", [x], output=PROBABILITIES, axis=1)
    model = _model(build, net.INPUT_SIZE, labels, [helper.make_opsetid("", OPSET)], IR_VERSION)
    return seal(model)


def from_onnx(user: ModelProto, spec: Spec) -> ModelProto:
    """Wrap a graph of the user's to the common signature, as the spec describes it.

    Raises:
        GraphError: the graph's inputs, outputs, opset or IR do not fit the spec or the target server.
    """
    user = _within_limits(user)
    taken = _user_input(user, spec)
    result = _user_output(user, spec)
    is_pair, is_rounded = _is_pair(result), returns_rounded(user, result)
    _prefix_names(user.graph, "user/")
    taken_name, result_name = taken.name, result.name

    build = _Builder()
    x = build.add("Cast", [PIXELS], to=TensorProto.FLOAT)
    if spec.input.channels == "grey":
        x = _grey(build, x)
    elif spec.input.channels == "BGR":
        x = build.add("Gather", [x, build.constant("order", np.array([2, 1, 0]))], axis=3)
    scale, mean, std = (np.asarray(v, np.float32) for v in (spec.input.scale, spec.input.mean, spec.input.std))
    x = build.add("Mul", [x, build.constant("scale", scale)])
    x = build.add("Sub", [x, build.constant("mean", mean)])
    x = build.add("Div", [x, build.constant("std", std)])
    if spec.input.layout == "NCHW":
        x = build.add("Transpose", [x], perm=[0, 3, 1, 2])
    build.add("Cast", [x], output=taken_name, to=taken.type.tensor_type.elem_type)

    build.nodes.extend(user.graph.node)
    build.initializers.extend(user.graph.initializer)
    x = build.add("Cast", [result_name], to=TensorProto.FLOAT)
    rows = 0 if len(_dims(result)) > 1 else -1  # of a shape that is not known, a batch of one may be squeezed away
    x = build.add(
        "Reshape", [x, build.constant("flat", np.array([rows, 1 if is_pair else len(spec.labels)], np.int64))]
    )
    if spec.output.kind == "logits":
        x = build.add("Div", [x, build.constant(TEMPERATURE, np.float32(spec.output.temperature))])
        if is_pair:
            x = build.add("Concat", [build.add("Mul", [x, build.constant(ONE, np.float32(0))]), x], axis=1)
        build.add("Softmax", [x], output=PROBABILITIES, axis=1)
    elif is_pair:
        other = build.add("Sub", [build.constant(ONE, np.float32(1)), x])
        build.add("Concat", [other, x], output=PROBABILITIES, axis=1)
    elif is_rounded:
        total = build.add("ReduceSum", [x, build.constant(TOTAL_OF, np.array([1], np.int64))], keepdims=1)
        build.add("Div", [x, total], output=PROBABILITIES)
    else:
        build.add("Identity", [x], output=PROBABILITIES)
    model = _model(build, spec.input.size, spec.labels, user.opset_import, user.ir_version)
    model.functions.extend(user.functions)
    model.graph.sparse_initializer.extend(user.graph.sparse_initializer)
    return seal(model)


def seal(model: ModelProto) -> ModelProto:
    """Add the constant output DIGEST, and check the graph strictly.

    Raises:
        GraphError: the checker or shape inference refuses the graph.
    """
    model = _copy(model)
    graph = model.graph
    digest = np.frombuffer(bytes.fromhex(content_digest(model)), np.uint8).reshape(1, 32)
    graph.initializer.append(numpy_helper.from_array(digest.copy(), _SEAL + "digest"))
    for name, values in {"start": [0], "end": [1], "width": [32]}.items():
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), _SEAL + name))
    graph.node.extend(
        [
            helper.make_node("Shape", [PIXELS], [_SEAL + "shape"], _SEAL + "Shape"),
            helper.make_node("Slice", [_SEAL + n for n in ("shape", "start", "end")], [_SEAL + "n"], _SEAL + "Slice"),
            helper.make_node("Concat", [_SEAL + "n", _SEAL + "width"], [_SEAL + "to"], _SEAL + "Concat", axis=0),
            helper.make_node("Expand", [_SEAL + "digest", _SEAL + "to"], [DIGEST], _SEAL + "Expand"),
        ]
    )
    graph.output.append(helper.make_tensor_value_info(DIGEST, TensorProto.UINT8, ["N", 32]))
    try:
        checker.check_model(model, full_check=True)
        shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise GraphError(f"the graph is not valid ONNX: {error}") from error
    return model


def unseal(model: ModelProto) -> ModelProto:
    """The graph without what `seal` added: to be changed, and sealed again."""
    bare = _copy(model)
    for field in (bare.graph.node, bare.graph.initializer):
        kept = [item for item in field if not item.name.startswith(_SEAL)]
        del field[:]
        field.extend(kept)  # type: ignore[arg-type]
    outputs = [output for output in bare.graph.output if output.name != DIGEST]
    del bare.graph.output[:]
    bare.graph.output.extend(outputs)
    return bare


def content_digest(model: ModelProto) -> str:
    """SHA-256, in hexadecimal, of a graph without its seal: the same before and after `seal`.

    Source of the bytes: protobuf's serialisation, which is stable for messages without maps, as ONNX's are.
    """
    return hashlib.sha256(unseal(model).SerializeToString(deterministic=True)).hexdigest()


def opset_of(model: ModelProto) -> int:
    """The version of ONNX's own operators that a graph asks for; 0 where it names none."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


class _Builder:
    """Collects nodes and constants, and names what nobody else names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, operator: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output or name], name, **attributes))
        return output or name


def _convolve(build: _Builder, conv: net.Conv, x: str, weights: Mapping[str, np.ndarray]) -> str:
    shape = (conv.outputs, conv.inputs // conv.groups, conv.kernel, conv.kernel)
    kernel = _weight(weights, f"{conv.weight}.weight", shape)
    gamma, beta, mean, variance = (
        _weight(weights, f"{conv.norm}.{name}", (conv.outputs,))
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    # In float64, so that folding itself costs no precision; elementwise, so that every CPU gets the same bits.
    scale = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + net.BN_EPSILON)
    folded = (kernel * scale[:, None, None, None]).astype(np.float32)
    bias = (beta - mean * scale).astype(np.float32)
    before, after = conv.padding
    x = build.add(
        "Conv",
        [x, build.constant(f"{conv.weight}.weight", folded), build.constant(f"{conv.weight}.bias", bias)],
        kernel_shape=[conv.kernel] * 2,
        strides=[conv.stride] * 2,
        pads=[before, before, after, after],
        group=conv.groups,
    )
    if not conv.activation:
        return x
    if not any(i.name == "six" for i in build.initializers):
        build.constant("zero", np.float32(0))
        build.constant("six", np.float32(6))
    return build.add("Clip", [x, "zero", "six"])


def _weight(weights: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in weights:
        raise GraphError(f"the checkpoint has no {name}: is it an EfficientNet-Lite0?")
    value = weights[name]
    if value.shape != shape:
        raise GraphError(f"the checkpoint's {name} has the shape {value.shape}, expected {shape}")
    return value.astype(np.float32)


def _model(
    build: _Builder, size: int, labels: Sequence[str], opsets: Sequence[onnx.OperatorSetIdProto], ir_version: int
) -> ModelProto:
    graph = helper.make_graph(
        build.nodes,
        "classifier",
        [helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, ["N", size, size, 3])],
        [helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, ["N", len(labels)])],
        build.initializers,
    )
    model = helper.make_model(graph, opset_imports=list(opsets), ir_version=ir_version)
    model.producer_name = "parcel-defect-service"
    helper.set_model_props(model, {"labels": "\n".join(labels)})
    return model


def _within_limits(model: ModelProto) -> ModelProto:
    """The model at an opset that has the operators used for wrapping, and within the target's limits."""
    opset = opset_of(model)
    if opset > MAX_OPSET:
        raise GraphError(
            f"opset {opset} is newer than the {MAX_OPSET} of the target server: export it with an older one"
        )
    model = _copy(model)
    if model.ir_version < 4:  # weights were inputs with a default
        constants = {tensor.name for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in constants]
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        model.ir_version = IR_VERSION
    if opset < 13:  # Softmax and Slice as used here
        try:
            model = version_converter.convert_version(model, OPSET)
        except Exception as error:
            raise GraphError(
                f"opset {opset} cannot be brought to {OPSET}: export it again with it ({error})"
            ) from error
    if model.ir_version > MAX_IR_VERSION:
        # The container format is newer than the server's, its content may not be: the checker decides.
        model.ir_version = MAX_IR_VERSION
    return model


def uses_half(model: ModelProto) -> bool:
    """Whether a graph computes in half precision, if only in part."""
    return any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer) or any(
        value.type.tensor_type.elem_type == TensorProto.FLOAT16 for value in (*model.graph.input, *model.graph.output)
    )


def returns_rounded(model: ModelProto, result: onnx.ValueInfoProto) -> bool:
    """Whether an output was rounded to few bits, so that probabilities sum to one but for that."""
    last = last_operator(model, result.name)
    return result.type.tensor_type.elem_type == TensorProto.FLOAT16 or last == "DequantizeLinear"


def last_operator(model: ModelProto, name: str, skipping: Sequence[str] = ()) -> str:
    """The operator that computes a value, apart from those that only change its shape or type; "" where none does."""
    makers = {output: node for node in model.graph.node for output in node.output}
    passed = {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", *skipping}
    while name in makers and makers[name].op_type in passed:
        name = makers[name].input[0]
    return makers[name].op_type if name in makers else ""


def _prefix_names(graph: onnx.GraphProto, prefix: str) -> None:
    """Rename, in place, whatever has a name; what an inner graph takes from around it is found under its new one."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = prefix + value.name
    for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
        tensor.name = prefix + tensor.name
    for node in graph.node:
        node.name = prefix + node.name if node.name else ""
        for names in (node.input, node.output):
            names[:] = [prefix + name if name else "" for name in names]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                _prefix_names(inner, prefix)


def _grey(build: _Builder, x: str) -> str:
    """One channel of three, as Pillow's "L": whole numbers below 2 ** 24, which float32 holds exactly."""
    weights = build.constant("luma", np.array([[19595], [38470], [7471]], np.float32))
    x = build.add("Add", [build.add("MatMul", [x, weights]), build.constant("half", np.float32(2**15))])
    return build.add("Floor", [build.add("Div", [x, build.constant("unit", np.float32(2**16))])])


def _user_input(user: ModelProto, spec: Spec) -> onnx.ValueInfoProto:
    constants = {tensor.name for tensor in user.graph.initializer}
    inputs = {value.name: value for value in user.graph.input if value.name not in constants}
    name = spec.input.name or (next(iter(inputs)) if len(inputs) == 1 else None)
    if name not in inputs:
        raise GraphError(f"set input.name in the spec to one of the graph's inputs: {', '.join(inputs)}")
    if len(inputs) > 1:
        raise GraphError(f"the graph needs several inputs ({', '.join(inputs)}); only a picture can be served")
    taken = inputs[name]
    kind = taken.type.tensor_type.elem_type
    if kind not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8):
        raise GraphError(f"the input {name} is {TensorProto.DataType.Name(kind)}; expected a float or uint8 tensor")
    size = spec.input.size
    channels = 1 if spec.input.channels == "grey" else 3
    wanted = [None, channels, size, size] if spec.input.layout == "NCHW" else [None, size, size, channels]
    _require_shape(taken, wanted, f"layout {spec.input.layout}, channels {spec.input.channels} and size {size}")
    return taken


def _user_output(user: ModelProto, spec: Spec) -> onnx.ValueInfoProto:
    outputs = {value.name: value for value in user.graph.output}
    name = spec.output.name or (next(iter(outputs)) if len(outputs) == 1 else None)
    if name not in outputs:
        raise GraphError(f"set output.name in the spec to one of the graph's outputs: {', '.join(outputs)}")
    dims = [d for d in _dims(outputs[name])[1:] if d != 1]
    if _is_pair(outputs[name]) and len(spec.labels) != 2:
        raise GraphError(
            f"the output {name} has one value a picture, enough for two labels; the spec has {len(spec.labels)}"
        )
    if dims and isinstance(dims[-1], int) and dims != [len(spec.labels)]:
        raise GraphError(
            f"the output {name} has {dims[-1]} values a picture, but the spec has {len(spec.labels)} labels"
        )
    _require_batch(outputs[name])
    return outputs[name]


def _is_pair(result: onnx.ValueInfoProto) -> bool:
    """Whether there is one value a picture, which is that of the second of two labels."""
    dims = _dims(result)
    return len(dims) > 1 and all(d == 1 for d in dims[1:])


def _dims(value: onnx.ValueInfoProto) -> list[int | None]:
    """The sizes of a tensor; None: any, which exporters also write as 0 or -1."""
    return [d.dim_value if d.dim_value > 0 else None for d in value.type.tensor_type.shape.dim]


def _require_shape(value: onnx.ValueInfoProto, wanted: list[int | None], why: str) -> None:
    dims = _dims(value)
    if len(dims) != len(wanted) or not all(None in (d, w) or d == w for d, w in zip(dims, wanted, strict=True)):
        raise GraphError(f"the input {value.name} has the shape {dims}, but the spec says {wanted} ({why})")
    _require_batch(value)


def _require_batch(value: onnx.ValueInfoProto) -> None:
    dims = _dims(value)
    if dims and dims[0] is not None:
        raise GraphError(
            f"{value.name} has a fixed batch of {dims[0]}: export the model again with a dynamic first axis "
            f"(torch.onnx.export takes dynamic_axes)"
        )


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy
