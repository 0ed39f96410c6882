"""A release (the newest, if none is given) without Triton: its preprocessing, its ONNX file, its decision."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime

from contract import Manifest
from export.repository import Repository
from export.steps import REPOSITORY, load_module

PREPROCESSING: ModuleType = load_module(REPOSITORY / "defect_preprocess/1/preprocessing.py")
DECISION: ModuleType = load_module(REPOSITORY / "defect_postprocess/1/decision.py")


class Offline:
    """What the service must answer, computed in this process."""

    def __init__(self, root: Path, pipeline: str = "defect", release: Manifest | None = None) -> None:
        repository = Repository(root)
        self.manifest = release or repository.releases(pipeline)[-1]
        folders = {
            step: repository.step_folder(pipeline, step, pin.version) for step, pin in self.manifest.steps.items()
        }
        self.module = load_module(folders["preprocess"] / "preprocessing.py")
        decision = load_module(folders["postprocess"] / "decision.py")
        self.policy = decision.Policy.read(folders["postprocess"] / "settings.json")
        self.session = onnxruntime.InferenceSession(
            str(folders["classifier"] / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        self.size = self.session.get_inputs()[0].shape[1]

    def pixels(self, data: bytes) -> np.ndarray:
        """uint8 (size, size, 3)."""
        return np.asarray(self.module.preprocess(data, self.size))

    def answer(self, data: bytes) -> tuple[str, dict[str, float]]:
        """The label, and the probability of each label."""
        probabilities = self.session.run(["PROBABILITIES"], {"PIXELS": self.pixels(data)[None]})[0]
        decision = self.policy.decide(probabilities)
        names = [name.decode() for name in decision.ranked[0]]
        return decision.label[0].decode(), dict(zip(names, decision.scores[0].tolist(), strict=True))
