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
from export.repository import Candidate, Repository
from export.spec import Spec
from export.steps import Step

TOLERANCE = 1e-4
"""Largest difference of a probability from the independent reference that is accepted."""

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
    try:
        user = onnx.load(file)
    except FileNotFoundError as error:
        raise ExportError(f"{error.filename or file} is missing (weights may lie in a file of their own)") from None
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ExportError(f"{file} is not a complete ONNX file: {error}") from None
    report(f"wrapping {file.name} to the signature of a pipeline")
    model = graph.from_onnx(user, spec)
    report("comparing it with the graph as it came")
    _compare(model, spec.input.size, lambda pixels: reference.onnx_probabilities(user, spec, pixels), report)
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
    model: onnx.ModelProto, size: int, expected_of: Callable[[np.ndarray], np.ndarray], report: Report
) -> None:
    """Run the graph on ONNX Runtime, one picture and a batch, and hold it against the reference."""
    pixels = sample_pixels(size)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        got, digest = session.run([graph.PROBABILITIES, graph.DIGEST], {graph.PIXELS: pixels})
        alone = session.run([graph.PROBABILITIES], {graph.PIXELS: pixels[:1]})[0]
        expected = expected_of(pixels)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise ExportError(f"ONNX Runtime {onnxruntime.__version__} cannot run the graph: {error}") from error
    if not np.isfinite(got).all() or np.abs(got.sum(axis=1) - 1).max() > 1e-3:
        raise ExportError("the outputs are not probabilities: is output.kind right, logits or probabilities?")
    difference = max(float(np.abs(got - expected).max()), float(np.abs(alone - expected[:1]).max()))
    if difference > TOLERANCE:
        raise ExportError(f"probabilities differ from the reference by {difference:.2e}, allowed are {TOLERANCE:.0e}")
    content = graph.content_digest(model)
    if any(row.tobytes().hex() != content for row in digest):
        raise ExportError("the graph does not return the digest of its content")
    report(f"largest difference {difference:.1e} (allowed {TOLERANCE:.0e}) on {len(pixels)} pictures")


def sample_pixels(size: int) -> np.ndarray:
    """Four deterministic pictures, uint8 (4, size, size, 3): noise, a gradient, a black and a white one."""
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    gradient = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], ramp[::-1, None]), axis=2)
    return np.stack([noise, gradient, np.zeros_like(noise), np.full_like(noise, 255)])


def _json(settings: dict[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2) + "\n").encode()
