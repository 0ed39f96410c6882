"""From a trained checkpoint, or an ONNX file of the user's, to a candidate whose numbers were compared.

The Python steps are those of the pipeline's newest release with this candidate's settings beside them, so a
new number is published only where the content differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from export import efficientnet, graph, reference
from export.candidate import Candidate
from export.repository import Repository
from export.spec import Spec
from export.steps import Step

TOLERANCE = 1e-4
"""Largest difference of a probability from the independent reference that is accepted."""
HALF_TOLERANCE = 5e-3
"""The same for a graph in half precision: its input alone is rounded by 5e-4 of its value."""

Report = Callable[[str], None]


class ExportError(ValueError):
    """What was given cannot be exported; the message says why and what to do."""


def from_checkpoint(folder: Path, pipeline: str, repository: Repository, report: Report) -> Candidate:
    """A candidate from `folder`/model.safetensors and card.json, as `export.train` writes them.

    Raises:
        ExportError, graph.GraphError: a file is missing or malformed, or the graph's numbers are off.
    """
    try:
        card: dict[str, Any] = json.loads((folder / "card.json").read_text())
        weights = load_file(folder / "model.safetensors")
        labels = tuple(card["labels"])
        thresholds = [float(card["thresholds"][label]) for label in labels]
        temperature = float(card["temperature"])
    except FileNotFoundError as error:
        raise ExportError(f"{error.filename} is missing: 'make train' writes a checkpoint and its card") from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{folder} holds no checkpoint that can be read: {type(error).__name__}: {error}") from None
    report("building the ONNX graph")
    model = graph.from_checkpoint(weights, labels, temperature)
    report("comparing it with a forward pass in numpy")
    _compare(
        model,
        efficientnet.INPUT_SIZE,
        lambda pixels: reference.checkpoint_probabilities(weights, temperature, pixels),
        report,
    )
    return _candidate(
        repository,
        pipeline=pipeline,
        labels=labels,
        size=efficientnet.INPUT_SIZE,
        thresholds=thresholds,
        model=model,
        built_from=f"{card.get('architecture', 'checkpoint')}, data {card['data']['digest'][:12]}",
        evaluation=card.get("valid", {}),
    )


def from_onnx(file: Path, spec: Spec, repository: Repository, report: Report) -> Candidate:
    """A candidate from an ONNX file of the user's and its spec.

    Raises:
        ExportError, graph.GraphError: the file is missing, no ONNX, does not fit its spec or the target
            server, or the wrapped graph's numbers are off.
    """
    user = read_onnx(file)
    report(f"wrapping {file.name} to the signature of a pipeline")
    model = graph.from_onnx(user, spec)
    report("comparing it with the graph as it came")

    def expected_of(pixels: np.ndarray) -> np.ndarray:
        values = reference.onnx_outputs(user, spec, pixels)
        _require_kind(user, spec, values)
        return reference.probabilities_of(values, spec)

    allowed = HALF_TOLERANCE if graph.uses_half(user) else TOLERANCE
    _compare(model, spec.input.size, expected_of, report, allowed)
    return _candidate(
        repository,
        pipeline=spec.name,
        labels=spec.labels,
        size=spec.input.size,
        thresholds=[spec.thresholds.get(label, 1 / len(spec.labels)) for label in spec.labels],
        model=model,
        built_from=file.name,
        evaluation={},
    )


def read_onnx(file: Path) -> onnx.ModelProto:
    """A graph of the user's, with its weights.

    Raises:
        ExportError: the file is missing or no ONNX.
    """
    try:
        return onnx.load(file)
    except FileNotFoundError as error:
        raise ExportError(f"{error.filename or file} is missing (weights may lie in a file of their own)") from None
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ExportError(f"{file} is not a complete ONNX file: {error}") from None


def _require_kind(user: onnx.ModelProto, spec: Spec, values: np.ndarray) -> None:
    """Refuse an `output.kind` that is not what the graph returns: its answers would be wrong, and look right."""
    name = spec.output.name or user.graph.output[0].name
    totals = values.sum(axis=1)
    if spec.output.kind == "logits":
        last = graph.last_operator(user, name, skipping=("QuantizeLinear", "DequantizeLinear", "Clip"))
        sums_to_one = values.shape[1] > 1 and values.min() >= 0 and np.abs(totals - 1).max() < 1e-3
        if last in ("Softmax", "Sigmoid", "HardSigmoid") or sums_to_one:
            raise ExportError(
                f"the outputs are probabilities already{f' ({last})' if last else ''}: set output.kind to "
                f"'probabilities', or leave that operator out"
            )
        return
    rounding = 0.0
    if graph.uses_half(user) or graph.last_operator(user, name) == "DequantizeLinear":
        rounding = min(0.1, values.shape[1] / 255)
    of_one = values.shape[1] == 1 or np.abs(totals - 1).max() <= 1e-3 + rounding
    if not np.isfinite(values).all() or values.min() < -1e-6 or values.max() > 1 + 1e-3 + rounding or not of_one:
        raise ExportError("the outputs are not probabilities: is output.kind right, logits or probabilities?")


def _candidate(
    repository: Repository,
    *,
    pipeline: str,
    labels: tuple[str, ...],
    size: int,
    thresholds: Sequence[float],
    model: onnx.ModelProto,
    built_from: str,
    evaluation: dict[str, Any],
) -> Candidate:
    newest = repository.newest(pipeline)  # before its code is read: see Candidate.base
    decisions = {"labels": labels, "thresholds": dict(zip(labels, thresholds, strict=True))}
    steps = {
        "preprocess": repository.template(pipeline, "preprocess").with_file("settings.json", _json({"size": size})),
        "classifier": Step.of_graph(model),
        "postprocess": repository.template(pipeline, "postprocess").with_file("settings.json", _json(decisions)),
    }
    return Candidate(pipeline, labels, size, steps, built_from, evaluation, base=newest.name if newest else "")


def _compare(
    model: onnx.ModelProto,
    size: int,
    expected_of: Callable[[np.ndarray], np.ndarray],
    report: Report,
    allowed: float = TOLERANCE,
) -> None:
    """Run the graph on ONNX Runtime, one picture and a batch, and hold it against the reference."""
    pixels = sample_pixels(size)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        got, digest = session.run([graph.PROBABILITIES, graph.DIGEST], {graph.PIXELS: pixels})
        alone = session.run([graph.PROBABILITIES], {graph.PIXELS: pixels[:1]})[0]
        expected = expected_of(pixels)
    except ExportError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise ExportError(f"ONNX Runtime {onnxruntime.__version__} cannot run the graph: {error}") from error
    if not np.isfinite(got).all() or np.abs(got.sum(axis=1) - 1).max() > 1e-3:
        raise ExportError("the outputs are not probabilities: is output.kind right, logits or probabilities?")
    difference = max(float(np.abs(got - expected).max()), float(np.abs(alone - expected[:1]).max()))
    if difference > allowed:
        raise ExportError(f"probabilities differ from the reference by {difference:.2e}, allowed are {allowed:.0e}")
    content = graph.content_digest(model)
    if any(row.tobytes().hex() != content for row in digest):
        raise ExportError("the graph does not return the digest of its content")
    report(f"largest difference {difference:.1e} (allowed {allowed:.0e}) on {len(pixels)} pictures")


def sample_pixels(size: int) -> np.ndarray:
    """Four deterministic pictures, uint8 (4, size, size, 3): noise, a gradient, a black and a white one."""
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    gradient = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], ramp[::-1, None]), axis=2)
    return np.stack([noise, gradient, np.zeros_like(noise), np.full_like(noise, 255)])


def _json(settings: dict[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2) + "\n").encode()
