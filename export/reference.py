"""Independent recomputations that an exported graph is compared with.

For the project's own network: a forward pass in numpy, straight from the checkpoint, with batch normalisation
as its own step. It shares with the graph builder only the table of layers. For a user's graph: the graph as it
came, run on pictures normalised here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
from PIL import Image

from export import efficientnet as net
from export.evaluation import softmax
from export.graph import MAX_IR_VERSION
from export.spec import Spec

Array = np.ndarray


def checkpoint_probabilities(weights: Mapping[str, Array], temperature: float, pixels: Array) -> Array:
    """Probabilities (n, labels), float64, of uint8 pixels (n, 224, 224, 3)."""
    x = (pixels.astype(np.float32) - net.MEAN) / net.SCALE
    x = _layer(net.STEM, x, weights)
    for block in net.BLOCKS:
        y = x
        for conv in block.convs:
            y = _layer(conv, y, weights)
        x = x + y if block.residual else y
    features = _layer(net.HEAD, x, weights).mean(axis=(1, 2), dtype=np.float64)
    kernel, bias = (weights[f"{net.CLASSIFIER}.{name}"].astype(np.float64) for name in ("weight", "bias"))
    return softmax((features @ kernel.T + bias) / temperature)


def onnx_outputs(user: onnx.ModelProto, spec: Spec, pixels: Array) -> Array:
    """What the user's graph returns for uint8 pixels (n, size, size, 3), unchanged: float64 (n, values)."""
    copy = onnx.ModelProto()
    copy.CopyFrom(user)
    copy.ir_version = min(user.ir_version, MAX_IR_VERSION)  # a newer container for the same content
    for value in (*copy.graph.input, *copy.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_value <= 0:  # any, as some exporters write it
                dimension.ClearField("dim_value")
    user = copy
    session = onnxruntime.InferenceSession(user.SerializeToString(), providers=["CPUExecutionProvider"])
    if spec.input.channels == "grey":
        pixels = np.stack([np.asarray(Image.fromarray(picture).convert("L")) for picture in pixels])[..., None]
    elif spec.input.channels == "BGR":
        pixels = pixels[..., ::-1]
    x = (pixels.astype(np.float64) * spec.input.scale - np.asarray(spec.input.mean)) / np.asarray(spec.input.std)
    if spec.input.layout == "NCHW":
        x = x.transpose(0, 3, 1, 2)
    taken = session.get_inputs()[0]
    kinds = {"tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(uint8)": np.uint8}
    result = spec.output.name or session.get_outputs()[0].name
    (values,) = session.run([result], {taken.name: x.astype(kinds.get(taken.type, np.float32))})
    return np.asarray(values, np.float64).reshape(len(pixels), -1)


def probabilities_of(values: Array, spec: Spec) -> Array:
    """Probabilities (n, labels), float64, of what a user's graph returned."""
    if spec.output.kind == "logits":
        values = values / spec.output.temperature
        if values.shape[1] == 1 and len(spec.labels) == 2:
            values = np.concatenate([np.zeros_like(values), values], axis=1)
        return softmax(values)
    if values.shape[1] == 1 and len(spec.labels) == 2:
        return np.concatenate([1 - values, values], axis=1)
    return np.asarray(values / values.sum(axis=1, keepdims=True))


def onnx_probabilities(user: onnx.ModelProto, spec: Spec, pixels: Array) -> Array:
    """Probabilities (n, labels), float64, of uint8 pixels (n, size, size, 3), by the user's unchanged graph."""
    return probabilities_of(onnx_outputs(user, spec, pixels), spec)


def _layer(conv: net.Conv, x: Array, weights: Mapping[str, Array]) -> Array:
    """Convolution, normalisation and activation of x (n, rows, columns, channels)."""
    kernel = weights[f"{conv.weight}.weight"].astype(np.float32)
    x = _depthwise(conv, x, kernel) if conv.groups > 1 else _dense(conv, x, kernel)
    gamma, beta, mean, variance = (
        weights[f"{conv.norm}.{name}"].astype(np.float32) for name in ("weight", "bias", "running_mean", "running_var")
    )
    x = (x - mean) / np.sqrt(variance + np.float32(net.BN_EPSILON)) * gamma + beta
    return x.clip(0, 6) if conv.activation else x


def _taps(conv: net.Conv, x: Array) -> list[tuple[int, int, Array]]:
    """The input as each tap (row, column) of the kernel sees it."""
    before, after = conv.padding
    x = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    rows, columns = ((side - conv.kernel) // conv.stride + 1 for side in x.shape[1:3])
    step = conv.stride
    return [
        (i, j, x[:, i : i + step * (rows - 1) + 1 : step, j : j + step * (columns - 1) + 1 : step])
        for i in range(conv.kernel)
        for j in range(conv.kernel)
    ]


def _dense(conv: net.Conv, x: Array, kernel: Array) -> Array:
    return np.asarray(sum(tap @ kernel[:, :, i, j].T for i, j, tap in _taps(conv, x)))


def _depthwise(conv: net.Conv, x: Array, kernel: Array) -> Array:
    return np.asarray(sum(tap * kernel[:, 0, i, j] for i, j, tap in _taps(conv, x)))
