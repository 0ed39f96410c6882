"""The model alone in ONNX Runtime, in a process of its own: pictures a second, and what it answers.

`python -m perf.gpu.bare gpu MODEL PIXELS` prints JSON. Pixels come from the processor and probabilities go back to it
with each run, as in the service; nothing else happens in between. So this is the limit of what one GPU can be fed with
by one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from export import graph
from harness import ROOT
from perf.analyzer import PerfError
from triton_runtime.installation import Installation

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Bare:
    """Pictures a second by pictures in a run, and float32 probabilities of shape (pictures, labels)."""

    rates: dict[int, float]
    probabilities: np.ndarray


def measure(
    model: Path, pixels: Path, *, device: str, batches: Sequence[int], seconds: float, tf32: bool = False
) -> Bare:
    """Run `model` on the pixels in a .npy file (uint8, of shape (pictures, height, width, 3)), in another process.

    Args:
        model: the release's model.onnx.
        pixels: what it is fed with.
        device: "gpu" or "cpu", where all processors work on one run.
        batches: pictures in a run.
        seconds: of one measurement.
        tf32: let a GPU multiply fp32 with ten bits of a factor.

    Raises:
        PerfError: it did not finish, or ONNX Runtime could not use the GPU; the message has its last words.
    """
    command = [sys.executable, "-m", "perf.gpu.bare", device, str(model), str(pixels), f"--seconds={seconds}"]
    command += ["--batches", *map(str, batches)] + ["--tf32"] * tf32
    environment = Installation.find().stub_environment()
    try:
        run = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        raise PerfError(f"ONNX Runtime alone took more than {_PATIENCE_S:g} s") from None
    if run.returncode:
        raise PerfError(f"ONNX Runtime alone: {run.stderr.strip()[-1500:]}")
    found = json.loads(run.stdout)
    return Bare(
        {int(batch): rate for batch, rate in found["rates"].items()}, np.array(found["probabilities"], np.float32)
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure in this process; 1 where ONNX Runtime cannot use the GPU."""
    parse = argparse.ArgumentParser(prog="python -m perf.gpu.bare", description=__doc__)
    parse.add_argument("device", choices=["gpu", "cpu"])
    parse.add_argument("model", type=Path)
    parse.add_argument("pixels", type=Path)
    parse.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parse.add_argument("--seconds", type=float, default=1.0)
    parse.add_argument("--tf32", action="store_true")
    options = parse.parse_args(arguments)
    cuda = {"use_tf32": str(int(options.tf32)), "cudnn_conv_algo_search": "HEURISTIC"}
    providers = [(CUDA, cuda), CPU] if options.device == "gpu" else [CPU]
    session = onnxruntime.InferenceSession(str(options.model), providers=providers)
    if options.device == "gpu" and session.get_providers()[0] != CUDA:
        print(
            f"ONNX Runtime {onnxruntime.__version__} did not take the GPU: {session.get_providers()}", file=sys.stderr
        )
        return 1
    pixels = np.load(options.pixels)
    rates = {}
    for batch in options.batches:
        feed = {graph.PIXELS: pixels[np.arange(batch) % len(pixels)]}
        for _ in range(3):
            session.run(None, feed)
        runs, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < options.seconds:
            session.run(None, feed)
            runs += 1
        rates[batch] = runs * batch / spent
    probabilities = [session.run([graph.PROBABILITIES], {graph.PIXELS: each[None]})[0][0].tolist() for each in pixels]
    print(json.dumps({"rates": rates, "probabilities": probabilities}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
