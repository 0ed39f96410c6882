"""The `config.pbtxt` files of a pipeline, rendered from Triton's own protobuf types.

`tritonclient` carries the `ModelConfig` message; protobuf's text format is what Triton reads. A field that
does not exist or has the wrong type fails here, not on a server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal

from google.protobuf import text_format
from pydantic import Field
from tritonclient.grpc import model_config_pb2 as pb

import contract
from contract.tables import Table
from export import graph

Tensors = Mapping[str, tuple[int, list[int]]]
"""Tensor name -> (Triton data type, shape without the batch axis)."""

WIRING: Mapping[str, tuple[dict[str, str], dict[str, str]]] = {
    "preprocess": (
        {contract.IMAGE: contract.IMAGE},
        {graph.PIXELS: "PIXELS", contract.ERROR: "PICTURE_ERROR", contract.TIMES: "PREPROCESS_TIMES"},
    ),
    "classifier": (
        {graph.PIXELS: "PIXELS"},
        {graph.PROBABILITIES: "PROBABILITIES", graph.DIGEST: "CLASSIFIER_DIGEST"},
    ),
    "postprocess": (
        {
            graph.PROBABILITIES: "PROBABILITIES",
            graph.DIGEST: "CLASSIFIER_DIGEST",
            contract.ERROR: "PICTURE_ERROR",
            contract.TIMES: "PREPROCESS_TIMES",
        },
        {name: name for name in contract.OUTPUTS},
    ),
}
"""Step -> its inputs and its outputs, each a tensor of the step: the ensemble's name for it."""

KINDS: Mapping[str, int] = {
    "auto": pb.ModelInstanceGroup.KIND_AUTO,
    "gpu": pb.ModelInstanceGroup.KIND_GPU,
    "cpu": pb.ModelInstanceGroup.KIND_CPU,
}
"""`device` of the classifier -> Triton's kind of its instances."""

_HEADER = "# Written by `python -m export`. Change export/serving.toml and export again.\n"
_FROZEN_HEADER = "# A published release: written once by `python -m export`, never edited.\n"


class PythonStep(Table):
    """How a Python step runs."""

    instances: int = Field(default=1, ge=1, le=64)


class ClassifierStep(Table):
    """How the ONNX model runs."""

    device: Literal["auto", "gpu", "cpu"] = "auto"
    instances: int = Field(default=1, ge=1, le=64)
    threads: int = Field(default=2, ge=1, le=256)
    pictures_per_run: int = Field(default=1, ge=0, le=256)
    accelerator: Literal["cuda", "tensorrt"] = "cuda"
    precision: Literal["fp32", "fp16"] = "fp32"
    engine_cache: str = "/var/cache/tensorrt"


class Serving(Table):
    """Serving settings of a pipeline's steps: `export/serving.toml`."""

    max_batch_size: int = Field(default=16, ge=1, le=256)
    queue_delay_us: int = Field(default=0, ge=0, le=1_000_000)
    max_queue_size: int = Field(default=0, ge=0, le=100_000)
    preprocess: PythonStep = PythonStep()
    classifier: ClassifierStep = ClassifierStep()
    postprocess: PythonStep = PythonStep()


def render(config: pb.ModelConfig) -> bytes:
    """The file's content."""
    header = _FROZEN_HEADER if config.HasField("ensemble_scheduling") else _HEADER
    return (header + text_format.MessageToString(config)).encode()


def parse(text: str) -> pb.ModelConfig:
    """Read a config.pbtxt.

    Raises:
        ValueError: the text is not a model configuration.
    """
    return pb.ModelConfig.FromString(_parsed(text))


@lru_cache(maxsize=64)
def _parsed(text: str) -> bytes:
    """Whoever follows a repository reads the same few files again and again, and parsing text takes 16 ms a release."""
    try:
        return bytes(text_format.Parse(text, pb.ModelConfig()).SerializeToString())
    except (text_format.ParseError, RecursionError) as error:
        raise ValueError(f"not a config.pbtxt: {error}") from None


def preprocess(pipeline: str, versions: Iterable[int], size: int, serving: Serving) -> pb.ModelConfig:
    """The preprocessing step, for pictures of size x size pixels."""
    config = _step(pipeline, "preprocess", versions, serving)
    _declare(config.input, {contract.IMAGE: (pb.TYPE_STRING, [1])})
    _declare(
        config.output,
        {
            graph.PIXELS: (pb.TYPE_UINT8, [size, size, 3]),
            contract.ERROR: (pb.TYPE_STRING, [1]),
            contract.TIMES: (pb.TYPE_INT64, [2]),
        },
    )
    _on_cpu(config, serving.preprocess)
    return config


def classifier(pipeline: str, versions: Iterable[int], size: int, labels: int, serving: Serving) -> pb.ModelConfig:
    """The ONNX model: where its `device` says, by default on a GPU where there is one."""
    config = _step(pipeline, "classifier", versions, serving)
    config.backend = "onnxruntime"
    config.default_model_filename = "model.onnx"
    _declare(config.input, {graph.PIXELS: (pb.TYPE_UINT8, [size, size, 3])})
    _declare(
        config.output,
        {graph.PROBABILITIES: (pb.TYPE_FP32, [labels]), graph.DIGEST: (pb.TYPE_UINT8, [32])},
    )
    settings = serving.classifier
    config.instance_group.add(count=settings.instances, kind=KINDS[settings.device])
    config.parameters["intra_op_thread_count"].string_value = str(settings.threads)
    config.parameters["inter_op_thread_count"].string_value = "1"
    config.parameters["items_per_run"].string_value = str(settings.pictures_per_run)
    if settings.accelerator == "tensorrt":
        tensorrt = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
        tensorrt.parameters["precision_mode"] = settings.precision.upper()
        tensorrt.parameters["trt_engine_cache_enable"] = "true"
        tensorrt.parameters["trt_engine_cache_path"] = f"{settings.engine_cache}/{pipeline}"
    for batch in sorted({1, serving.max_batch_size}):
        warmup = config.model_warmup.add(name=f"batch of {batch}", batch_size=batch)
        pixels = warmup.inputs[graph.PIXELS]
        pixels.data_type, pixels.random_data = pb.TYPE_UINT8, True
        pixels.dims.extend([size, size, 3])
    return config


def postprocess(pipeline: str, versions: Iterable[int], labels: int, serving: Serving) -> pb.ModelConfig:
    """The postprocessing step."""
    config = _step(pipeline, "postprocess", versions, serving)
    _declare(
        config.input,
        {
            graph.PROBABILITIES: (pb.TYPE_FP32, [labels]),
            graph.DIGEST: (pb.TYPE_UINT8, [32]),
            contract.ERROR: (pb.TYPE_STRING, [1]),
            contract.TIMES: (pb.TYPE_INT64, [2]),
        },
    )
    _declare(config.output, _answer(labels))
    _on_cpu(config, serving.postprocess)
    return config


def ensemble(manifest: contract.Manifest, max_batch_size: int) -> pb.ModelConfig:
    """The release itself: each step pinned to a version, and the manifest as parameters."""
    config = pb.ModelConfig(name=manifest.name, platform="ensemble", max_batch_size=max_batch_size)
    config.version_policy.specific.versions.append(1)
    _declare(config.input, {contract.IMAGE: (pb.TYPE_STRING, [1])})
    _declare(config.output, _answer(len(manifest.labels)))
    for step in contract.STEPS:
        entry = config.ensemble_scheduling.step.add(
            model_name=contract.step_model(manifest.pipeline, step), model_version=manifest.steps[step].version
        )
        inputs, outputs = WIRING[step]
        entry.input_map.update(inputs)
        entry.output_map.update(outputs)
    for key, value in manifest.to_parameters().items():
        config.parameters[key].string_value = value
    return config


def manifest_of(name: str, ensemble: pb.ModelConfig) -> contract.Manifest:
    """The manifest that `ensemble` wrote for the release `name`.

    Raises:
        ValueError: it is no release, or its manifest is missing or malformed.
    """
    return contract.Manifest.from_parameters(name, {k: v.string_value for k, v in ensemble.parameters.items()})


def _answer(labels: int) -> Tensors:
    return {
        contract.LABEL: (pb.TYPE_STRING, [1]),
        contract.CONFIDENCE: (pb.TYPE_FP32, [1]),
        contract.LABELS: (pb.TYPE_STRING, [labels]),
        contract.SCORES: (pb.TYPE_FP32, [labels]),
        contract.DIGEST: (pb.TYPE_STRING, [1]),
        contract.ERROR: (pb.TYPE_STRING, [1]),
        contract.TIMES: (pb.TYPE_INT64, [4]),
    }


def _step(pipeline: str, step: str, versions: Iterable[int], serving: Serving) -> pb.ModelConfig:
    """What all steps share. Only versions that a release pins are visible to Triton."""
    config = pb.ModelConfig(
        name=contract.step_model(pipeline, step), backend="python", max_batch_size=serving.max_batch_size
    )
    config.version_policy.specific.versions.extend(sorted(versions))
    config.dynamic_batching.max_queue_delay_microseconds = serving.queue_delay_us
    if serving.max_queue_size:  # not even an empty policy otherwise: see serving.toml
        config.dynamic_batching.default_queue_policy.max_queue_size = serving.max_queue_size
    return config


def _on_cpu(config: pb.ModelConfig, settings: PythonStep) -> None:
    config.instance_group.add(count=settings.instances, kind=pb.ModelInstanceGroup.KIND_CPU)


def _declare(field: Any, tensors: Tensors) -> None:
    for name, (kind, dims) in tensors.items():
        field.add(name=name, data_type=kind, dims=dims)
