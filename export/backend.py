"""Runs the steps of a pipeline in this process, as Triton would: each Python step by its own `model.py`.

The exam needs to know what Triton will meet, without a Triton at hand: the classes here stand in for the module
`triton_python_backend_utils`, which exists only inside Triton's stub processes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2 as pb

import contract
from export import config, graph
from export.steps import load_module

Tensors = Mapping[str, np.ndarray]

_DTYPES = {pb.TYPE_STRING: np.object_, pb.TYPE_UINT8: np.uint8, pb.TYPE_FP32: np.float32, pb.TYPE_INT64: np.int64}


class StepError(Exception):
    """A step does not do what its configuration says; the message names the step and what it did."""


@dataclass(frozen=True)
class Tensor:
    """`pb_utils.Tensor`: BYTES are arrays of objects."""

    _name: str
    _array: np.ndarray

    def name(self) -> str:
        """As the step named it."""
        return self._name

    def as_numpy(self) -> np.ndarray:
        """The values."""
        return self._array


@dataclass(frozen=True)
class InferenceRequest:
    """What `execute` gets a list of."""

    tensors: Sequence[Tensor]


@dataclass(frozen=True)
class InferenceResponse:
    """What `execute` returns a list of."""

    output_tensors: Sequence[Tensor] = field(default=())
    error: object = None


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    """An input of a request; None where it has no such input."""
    return next((tensor for tensor in request.tensors if tensor.name() == name), None)


def utilities() -> ModuleType:
    """The stand-in for the module `triton_python_backend_utils`."""
    module = ModuleType("triton_python_backend_utils")
    for each in (Tensor, InferenceRequest, InferenceResponse, get_input_tensor_by_name):
        setattr(module, each.__name__, each)
    module.TritonError = module.TritonModelException = StepError  # type: ignore[attr-defined]
    return module


class PythonStep:
    """One version of a Python step, initialised from its folder.

    Raises:
        Exception: whatever `model.py` raises when it is imported or initialised.
    """

    def __init__(self, folder: Path, declared: pb.ModelConfig) -> None:
        self._folder, self._declared = folder, declared
        with self._importable():
            module = load_module(folder / "model.py")
            self._model = module.TritonPythonModel()
            if hasattr(self._model, "initialize"):
                self._model.initialize(
                    {
                        "model_config": json_format.MessageToJson(declared, preserving_proto_field_name=True),
                        "model_name": declared.name,
                        "model_version": folder.name,
                        "model_repository": str(folder.parent),
                        "model_instance_name": f"{declared.name}_0",
                        "model_instance_kind": "CPU",
                        "model_instance_device_id": "0",
                    }
                )

    def run(self, inputs: Tensors) -> dict[str, np.ndarray]:
        """The outputs for one request.

        Raises:
            StepError: an output is missing, or has another type or shape than `config.pbtxt` says.
        """
        request = InferenceRequest([Tensor(name, array) for name, array in inputs.items()])
        with self._importable():
            (response,) = self._model.execute([request])
        if response.error is not None:
            raise StepError(f"{self._declared.name}: {response.error}")
        outputs = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors}
        batch = len(next(iter(inputs.values())))
        return {declared.name: self._checked(declared, outputs, batch) for declared in self._declared.output}

    def _checked(self, declared: pb.ModelOutput, outputs: Tensors, batch: int) -> np.ndarray:
        place = f"{self._declared.name} {declared.name}"
        if declared.name not in outputs:
            raise StepError(f"{place}: is missing; there are {', '.join(outputs) or 'no outputs'}")
        array = outputs[declared.name]
        expected = (batch, *declared.dims)
        if array.dtype != _DTYPES[declared.data_type] or array.shape != expected:
            kind = np.dtype(_DTYPES[declared.data_type])
            raise StepError(f"{place}: is {array.dtype} {array.shape}, config.pbtxt says {kind} {expected}")
        return array

    @contextlib.contextmanager
    def _importable(self) -> Iterator[None]:
        """The folder's modules by their plain names, and for this version alone: others have the same names."""
        names = {path.stem for path in self._folder.glob("*.py")} | {"triton_python_backend_utils"}
        before = {name: sys.modules.pop(name, None) for name in names}
        sys.modules["triton_python_backend_utils"] = utilities()
        sys.path.insert(0, str(self._folder))
        writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            yield
        finally:
            sys.dont_write_bytecode = writes
            sys.path.remove(str(self._folder))
            for name, module in before.items():
                sys.modules.pop(name, None)
                if module is not None:
                    sys.modules[name] = module


@dataclass(frozen=True)
class Answers:
    """What a pipeline made of n pictures: its outputs by name, as an ensemble returns them."""

    outputs: Tensors

    def error(self, i: int) -> str:
        """Why picture i could not be used; empty where it could."""
        return str(self.outputs[contract.ERROR][i, 0].decode())

    def label(self, i: int) -> str:
        """The decision on picture i."""
        return str(self.outputs[contract.LABEL][i, 0].decode())

    def scores(self, i: int) -> dict[str, float]:
        """Every label's probability for picture i, the most probable first."""
        names, values = self.outputs[contract.LABELS][i], self.outputs[contract.SCORES][i]
        return {name.decode(): float(value) for name, value in zip(names, values, strict=True)}


class Pipeline:
    """Preprocessing, classifier and postprocessing from their version folders, wired as the ensemble wires them.

    Args:
        folders: the version folder of each step.
        configs: the configuration of each step's model.

    Raises:
        Exception: a step cannot be loaded; what it raises says why.
    """

    def __init__(self, folders: Mapping[str, Path], configs: Mapping[str, pb.ModelConfig]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.preprocess = PythonStep(folders["preprocess"], configs["preprocess"])
        self.session = onnxruntime.InferenceSession(
            str(folders["classifier"] / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.postprocess = PythonStep(folders["postprocess"], configs["postprocess"])

    def run(self, pictures: Sequence[bytes]) -> Answers:
        """Answer pictures as one batch.

        Raises:
            StepError: a step returned something else than its configuration says.
            Exception: whatever a step raises.
        """
        known = self.tensors(pictures)
        return Answers({name: known[name] for name in contract.OUTPUTS})

    def tensors(self, pictures: Sequence[bytes]) -> dict[str, np.ndarray]:
        """All that passes between the steps for these pictures, by the ensemble's names; raises as `run`."""
        wiring = config.WIRING
        known: dict[str, np.ndarray] = {contract.IMAGE: np.array([[picture] for picture in pictures], np.object_)}
        for step, run in {
            "preprocess": self.preprocess.run,
            "classifier": self._classify,
            "postprocess": self.postprocess.run,
        }.items():
            taken, given = wiring[step]
            outputs = run({name: known[of] for name, of in taken.items()})
            known |= {of: outputs[name] for name, of in given.items()}
        return known

    def _classify(self, inputs: Tensors) -> dict[str, np.ndarray]:
        names = [graph.PROBABILITIES, graph.DIGEST]
        outputs = dict(zip(names, self.session.run(names, dict(inputs)), strict=True))
        batch = len(inputs[graph.PIXELS])
        for name, array in outputs.items():
            if len(array) != batch:
                raise StepError(f"the classifier's {name} has {len(array)} rows for {batch} pictures")
        return outputs
