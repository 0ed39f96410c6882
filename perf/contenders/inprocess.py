"""FastAPI with ONNX Runtime in its own process: `python -m perf.contenders.inprocess plain|tuned`.

`plain` is how one writes it at first: default session, Pillow's full decode, the work in FastAPI's thread pool.
`tuned` is what careful work makes of it: this project's preprocessing, one thread a call without spinning, as many
calls at once as there are cores. Both take the picture as the body, or JSON with base64, and answer label and scores.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from PIL import Image
from pydantic import BaseModel

from export.steps import load_module
from perf.contenders.limit import session


class Answer(BaseModel):
    """The part of the project's answer that a model alone can give."""

    label: str
    confidence: float
    scores: dict[str, float]


def create_app(kind: str, preprocessing: Path, model: Path) -> FastAPI:
    """The app; `kind` is plain or tuned."""
    tuned = kind == "tuned"
    run = session(model, 1 if tuned else None)
    size = run.get_inputs()[0].shape[1]
    labels = run.get_modelmeta().custom_metadata_map["labels"].split("\n")
    preprocess: Callable[[bytes, int], np.ndarray] = load_module(preprocessing).preprocess if tuned else _full_decode
    pool = ThreadPoolExecutor(os.cpu_count() if tuned else None)

    def judge(data: bytes) -> Answer:
        (row,) = run.run(["PROBABILITIES"], {"PIXELS": preprocess(data, size)[None]})[0].tolist()
        best = max(range(len(labels)), key=row.__getitem__)
        return Answer(label=labels[best], confidence=row[best], scores=dict(zip(labels, row, strict=True)))

    app = FastAPI()

    @app.post("/v1/predict")
    async def predict(request: Request) -> Answer:
        data = await request.body()
        if request.headers["content-type"] == "application/json":
            data = base64.b64decode(json.loads(data)["image"])
        return await asyncio.get_running_loop().run_in_executor(pool, judge, data)

    return app


def _full_decode(data: bytes, size: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((size, size)))


def main() -> None:
    """Serve on a port of the loopback interface."""
    kind, preprocessing, model, port = sys.argv[1:]
    app = create_app(kind, Path(preprocessing), Path(model))
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error", access_log=False)


if __name__ == "__main__":
    main()
