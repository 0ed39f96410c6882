"""EfficientNet-Lite0 as one table, walked by training (torch), the graph builder (ONNX) and the reference (numpy).

Source: M. Tan and Q. Le, "EfficientNet", ICML 2019, and the Lite variant published with TensorFlow's TPU
models: no squeeze-and-excitation, ReLU6 for swish, stem and head not scaled. The parameter names are
those of the public PyTorch port whose ImageNet weights training starts from.
"""

from __future__ import annotations

from dataclasses import dataclass

INPUT_SIZE = 224
MEAN, SCALE = 127.0, 128.0
"""Normalisation of the ImageNet weights: (pixel - MEAN) / SCALE, the same for each channel."""
BN_EPSILON = 1e-3
FEATURES = 1280


@dataclass(frozen=True)
class Conv:
    """A bias-free convolution with batch normalisation, and ReLU6 where `activation` says so.

    `weight` and `norm` are the prefixes of its parameters in a checkpoint; the weight has the shape
    (outputs, inputs / groups, kernel, kernel).
    """

    weight: str
    norm: str
    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    activation: bool = True

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros (before, after) each spatial axis: TensorFlow's SAME for the even sizes met here."""
        total = self.kernel - self.stride
        return total // 2, total - total // 2


@dataclass(frozen=True)
class Block:
    """An inverted residual: expand, depthwise, project; `residual` adds the block's input to its output."""

    convs: tuple[Conv, ...]
    residual: bool


def _blocks() -> tuple[Block, ...]:
    blocks: list[Block] = []
    stages = [  # repeats, kernel, stride of the first, expansion, inputs, outputs
        (1, 3, 1, 1, 32, 16),
        (2, 3, 2, 6, 16, 24),
        (2, 5, 2, 6, 24, 40),
        (3, 3, 2, 6, 40, 80),
        (3, 5, 1, 6, 80, 112),
        (4, 5, 2, 6, 112, 192),
        (1, 3, 1, 6, 192, 320),
    ]
    for repeats, kernel, first_stride, expansion, inputs, outputs in stages:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            width = inputs if repeat == 0 else outputs
            wide = width * expansion
            name = f"_blocks.{len(blocks)}"
            convs = [
                Conv(f"{name}._depthwise_conv", f"{name}._bn1", wide, wide, kernel, stride, groups=wide),
                Conv(f"{name}._project_conv", f"{name}._bn2", wide, outputs, activation=False),
            ]
            if expansion != 1:
                convs.insert(0, Conv(f"{name}._expand_conv", f"{name}._bn0", width, wide))
            blocks.append(Block(tuple(convs), residual=stride == 1 and width == outputs))
    return tuple(blocks)


STEM = Conv("_conv_stem", "_bn0", 3, 32, kernel=3, stride=2)
BLOCKS = _blocks()
HEAD = Conv("_conv_head", "_bn1", 320, FEATURES)
CLASSIFIER = "_fc"
