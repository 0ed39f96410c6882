"""A second release that can be told from the first one: the same model, leaning the other way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from safetensors.numpy import load_file
from tritonclient.grpc import model_config_pb2 as pb

from export import build, graph
from export.config import Serving
from export.exam import Rules
from export.publish import Examiner
from export.repository import Repository
from export.steps import Step

EXPORT = Path(__file__).resolve().parent.parent / "export"
CHECKPOINT = EXPORT / "checkpoints" / "defect"


def publish_contrary(root: Path) -> str:
    """Publish a release whose answers lean towards `damaged`; returns its name."""
    repository = Repository(root)
    built = build.from_checkpoint(CHECKPOINT, "defect", repository, lambda _: None)
    weights = load_file(CHECKPOINT / "model.safetensors")
    weights["_fc.bias"] = weights["_fc.bias"][::-1] + np.array([2, 0], np.float16)
    contrary = Step.of_graph(graph.from_checkpoint(weights, built.labels, 1.0))
    # Forced: it disagrees with the release before it, which is what it is for.
    examiner = Examiner(repository, Serving.read(EXPORT / "serving.toml"), Rules.read(EXPORT / "exam.toml"), force=True)
    changed = replace(built, steps={**built.steps, "classifier": contrary}, numbers={})
    return examiner.publish(changed, lambda _: None).manifest.name


def edit_release(root: Path, name: str, parameters: dict[str, str | None]) -> None:
    """Change what a release says of itself (None: remove), as nobody should."""
    path = root / name / "config.pbtxt"
    config = text_format.Parse(path.read_text(), pb.ModelConfig())
    for key, value in parameters.items():
        if value is None:
            del config.parameters[key]
        else:
            config.parameters[key].string_value = value
    path.write_text(text_format.MessageToString(config))
