"""The limit: processes that do nothing but prepare pictures and run the model. No server, no protocol, no waiting.

`python -m perf.contenders.limit --seconds 5 --batch 4 RELEASE_FOLDERS... PICTURES` prints pictures a second.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnxruntime

from export.steps import load_module


def session(model: Path, threads: int | None = 1) -> onnxruntime.InferenceSession:
    """The model on the processor; `threads` None leaves every default as a newcomer finds it."""
    options = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def _work(job: tuple[Path, Path, list[Path], int, float, float]) -> tuple[int, float]:
    """One process: pictures done between the common start and `seconds` later, and its processor time."""
    preprocessing, model, paths, batch, start, seconds = job
    preprocess = load_module(preprocessing).preprocess
    run = session(model)
    size = run.get_inputs()[0].shape[1]
    pictures = itertools.cycle([path.read_bytes() for path in paths])

    def step() -> None:
        pixels = np.stack([preprocess(next(pictures), size) for _ in range(batch)])
        run.run(["PROBABILITIES"], {"PIXELS": pixels})

    for _ in range(3):
        step()
    time.sleep(max(0.0, start - time.time()))
    done, spent = 0, time.process_time()
    while time.time() < start + seconds:
        step()
        done += batch
    return done, time.process_time() - spent


def measure(
    preprocessing: Path, model: Path, pictures: list[Path], *, batch: int, seconds: float, processes: int | None = None
) -> float:
    """Pictures a second of one process a core, each preparing and running `batch` pictures at a time."""
    count = processes or os.cpu_count() or 1
    with get_context("spawn").Pool(count) as pool:
        start = time.time() + 4.0
        jobs = [(preprocessing, model, pictures[i:] + pictures[:i], batch, start, seconds) for i in range(count)]
        return sum(done for done, _ in pool.map(_work, jobs)) / seconds


def main() -> None:
    """One measurement."""
    parse = argparse.ArgumentParser(prog="python -m perf.contenders.limit", description=__doc__)
    parse.add_argument("preprocessing", type=Path, help="preprocessing.py")
    parse.add_argument("model", type=Path, help="model.onnx")
    parse.add_argument("pictures", type=Path, nargs="+")
    parse.add_argument("--batch", type=int, default=4)
    parse.add_argument("--seconds", type=float, default=5.0)
    options = parse.parse_args()
    rate = measure(options.preprocessing, options.model, options.pictures, batch=options.batch, seconds=options.seconds)
    print(f"{rate:.1f}")


if __name__ == "__main__":
    main()
