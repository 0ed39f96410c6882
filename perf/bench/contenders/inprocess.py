"""FastAPI with ONNX Runtime in its own process: `python -m perf.bench.contenders.inprocess plain|tuned PORT`.

`plain` is how one writes it at first: default session, Pillow's full decode, the work in FastAPI's thread pool.
`tuned` is what careful work makes of it: this project's preprocessing, one thread a call without spinning, as many
calls at once as there are cores. Both take the picture as the body, or JSON with base64, and answer label and scores.
"""

from __future__ import annotations

import asyncio
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from PIL import Image
from pydantic import BaseModel

from perf.bench.contenders.work import CORES, Work, load_preprocess, picture_of


class Answer(BaseModel):
    """The part of the project's answer that a model alone can give."""

    label: str
    confidence: float
    scores: dict[str, float]


def create_app(kind: str, preprocessing: Path, model: Path) -> FastAPI:
    """The app; `kind` is plain or tuned."""
    tuned = kind == "tuned"
    work = Work(load_preprocess(preprocessing), model) if tuned else Work(_full_decode, model, threads=None)
    pool = ThreadPoolExecutor(CORES if tuned else None)

    def judge(data: bytes) -> Answer:
        return Answer(**work.answers([data])[0])

    app = FastAPI()

    @app.post("/v1/predict")
    async def predict(request: Request) -> Answer:
        data = picture_of(await request.body(), request.headers["content-type"])
        return await asyncio.get_running_loop().run_in_executor(pool, judge, data)

    return app


def _full_decode(data: bytes, size: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((size, size)))


def main() -> None:
    """Serve on a port of the loopback interface."""
    kind, port = sys.argv[1:]
    app = create_app(kind, Path(os.environ["PREPROCESSING"]), Path(os.environ["MODEL"]))
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error", access_log=False)


if __name__ == "__main__":
    main()
