"""ONNX Runtime on the CPU as a Python-based Triton backend, for the embedded server.

The wheel that the embedded server comes from has no ONNX Runtime backend. This one answers to the same name
and reads the same `config.pbtxt`, so the same repository runs here and on the C++ backend of NVIDIA's image.
Accelerators are ignored: there is no GPU where this backend runs. Understood are `default_model_filename` and these
parameters, of which the C++ backend knows the first three:

    intra_op_thread_count, inter_op_thread_count   1 by default: more throughput comes from more instances
    graph_optimization_level                       -1 basic, 0 or 1 all
    items_per_run                                  a batch goes through the model so many at a time; 0: all at once
    idle_thread_count                              threads of a run that finds so many processors idle
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of the model, in a process of its own."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        """Add nothing: a configuration is complete, or it is wrong."""
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model file of this version.

        Raises:
            onnxruntime.capi.onnxruntime_pybind11_state.Fail and its kin: the file is missing or broken;
                Triton reports the message as the reason why the version is unavailable.
        """
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        file = config["default_model_filename"] or "model.onnx"
        path = str(Path(args["model_repository"], args["model_version"], file))
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.items_per_run = int(parameters.get("items_per_run", 0))
        threads = int(parameters.get("intra_op_thread_count", 1))
        self.session = _session(path, parameters, threads)
        self.processors = Processors()
        self.idle_threads = min(int(parameters.get("idle_thread_count", 1)), self.processors.count)
        self.idle_session = _session(path, parameters, self.idle_threads) if self.idle_threads > threads else None

    def execute(self, requests: list) -> list:
        """Run all requests that Triton batched together as one batch, and split the outputs again."""
        try:
            tensors = [self._inputs_of(request) for request in requests]
            feed = {
                name: parts[0] if len(parts) == 1 else np.concatenate(parts)
                for name, parts in zip(self.inputs, zip(*tensors, strict=True), strict=True)
            }
            results = self._run(feed)
        except Exception as error:
            failure = pb_utils.TritonError(f"onnxruntime: {error}")
            return [pb_utils.InferenceResponse([], failure) for _ in requests]
        ends = np.cumsum([len(parts[0]) for parts in tensors])
        splits = [np.split(result, ends[:-1]) for result in results]
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, part) for name, part in zip(self.outputs, parts, strict=True)]
            )
            for parts in zip(*splits, strict=True)
        ]

    def _run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        size = len(feed[self.inputs[0]])
        step = self.items_per_run or size
        runs = [
            self._best_session().run(self.outputs, {name: items[i : i + step] for name, items in feed.items()})
            for i in range(0, size, step)
        ]
        return [np.concatenate(parts) for parts in zip(*runs, strict=True)]

    def _best_session(self) -> onnxruntime.InferenceSession:
        if self.idle_session is not None and self.processors.are_idle(self.idle_threads):
            return self.idle_session
        return self.session

    def _inputs_of(self, request) -> list[np.ndarray]:
        return [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs]


def _session(path: str, parameters: dict[str, str], threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", 1))
    if parameters.get("graph_optimization_level") == "-1":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # Threads that sleep between two operators take longer to wake than an operator takes; threads that spin between two
    # runs steal processors from others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Processors:
    """The processors that this process may use, and how many of them are idle."""

    def __init__(self, load: Path = Path("/proc/loadavg")) -> None:
        self.count = len(os.sched_getaffinity(0))
        self._file = os.open(load, os.O_RDONLY)  # its fourth field: how many run or could, of how many there are

    def are_idle(self, wanted: int) -> bool:
        """Whether nobody else wants so many, that of the caller included."""
        missing = wanted - self._idle()
        if missing == 1:
            # Perhaps whoever woke us, who is done but for going to sleep, and waits for our processor to do so.
            os.sched_yield()
            missing = wanted - self._idle()
        return missing <= 0

    def _idle(self) -> int:
        running = os.pread(self._file, 64, 0).split()[3].partition(b"/")[0]
        return self.count - int(running) + 1
