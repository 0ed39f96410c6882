"""ONNX Runtime on the CPU as a Python-based Triton backend, for the embedded server.

The wheel that the embedded server comes from has no ONNX Runtime backend. This one answers to the same name
and reads the same `config.pbtxt`, so the same repository runs here and on the C++ backend of NVIDIA's image.
Understood: `default_model_filename` and the parameters `intra_op_thread_count`, `inter_op_thread_count` (both
default to 1 here: one thread an instance, more throughput from more instances) and `graph_optimization_level`
(-1 basic, 0 or 1 all). Accelerators are ignored: there is no GPU where this backend runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One session in a process of its own."""

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
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", 1))
        options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", 1))
        if parameters.get("graph_optimization_level") == "-1":
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        # A spinning thread steals a core from the other instances.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        file = config["default_model_filename"] or "model.onnx"
        path = Path(args["model_repository"], args["model_version"], file)
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests: list) -> list:
        """Run all requests that Triton batched together as one batch, and split the outputs again."""
        try:
            tensors = [self._inputs_of(request) for request in requests]
            feed = {
                name: parts[0] if len(parts) == 1 else np.concatenate(parts)
                for name, parts in zip(self.inputs, zip(*tensors, strict=True), strict=True)
            }
            results = self.session.run(self.outputs, feed)
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

    def _inputs_of(self, request) -> list[np.ndarray]:
        return [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs]
