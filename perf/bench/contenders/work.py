"""The work that every contender does: this project's preprocessing and ONNX file, and the part of the answer they give.

Needs nothing of the project, so that it runs in the environment of each contender.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

Preprocess = Callable[[bytes, int], np.ndarray]
"""The bytes of a picture and a size -> uint8 of shape (size, size, 3)."""

CORES = os.cpu_count() or 1


class Work:
    """Pictures in, answers out, in this process.

    Args:
        preprocess: what prepares a picture.
        model: the release's model.onnx.
        threads: of one call, without spinning; None leaves every default as a newcomer finds it.
    """

    def __init__(self, preprocess: Preprocess, model: Path, threads: int | None = 1) -> None:
        self._preprocess = preprocess
        self._session = session(model, threads)
        self._size = self._session.get_inputs()[0].shape[1]
        self._labels = self._session.get_modelmeta().custom_metadata_map["labels"].split("\n")

    @classmethod
    def from_environment(cls) -> Work:
        """The files that `environment` names."""
        return cls(load_preprocess(Path(os.environ["PREPROCESSING"])), Path(os.environ["MODEL"]))

    def probabilities(self, pictures: Sequence[bytes]) -> np.ndarray:
        """float32 of shape (pictures, labels), from one call of the model."""
        pixels = np.stack([self._preprocess(picture, self._size) for picture in pictures])
        return np.asarray(self._session.run(["PROBABILITIES"], {"PIXELS": pixels})[0])

    def answers(self, pictures: Sequence[bytes]) -> list[dict]:
        """Label, confidence and scores of each picture: the part of the answer that a model alone can give."""
        return [self._answer(row) for row in self.probabilities(pictures).tolist()]

    def _answer(self, row: list[float]) -> dict:
        best = max(range(len(row)), key=row.__getitem__)
        scores = dict(zip(self._labels, row, strict=True))
        return {"label": self._labels[best], "confidence": row[best], "scores": scores}


def environment(preprocessing: Path, model: Path) -> dict[str, str]:
    """The variables that name a release's files to another process."""
    return {"PREPROCESSING": str(preprocessing), "MODEL": str(model)}


def session(model: Path, threads: int | None = 1) -> onnxruntime.InferenceSession:
    """The model on the processor; `threads` None leaves every default as a newcomer finds it."""
    options = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def load_preprocess(path: Path) -> Preprocess:
    """The function of a release's preprocessing.py; no byte code is left beside it, which would reload the model."""
    spec = importlib.util.spec_from_file_location("preprocessing", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    preprocess: Preprocess = module.preprocess
    return preprocess


def picture_of(body: bytes, content_type: str) -> bytes:
    """The picture in a request: the body itself, or base64 in JSON."""
    return base64.b64decode(json.loads(body)["image"]) if content_type == "application/json" else body
