"""The CPU ONNX backend, without Triton around it: batches in pieces, and runs that take idle processors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from export import backend
from export.steps import load_module
from triton_runtime.stack import ROOT

SIZE = 224


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    """The backend, with the exam's stand-in for what exists only inside of Triton's processes."""
    sys.modules["triton_python_backend_utils"] = backend.utilities()
    yield load_module(ROOT / "triton_runtime/backends/onnxruntime/model.py")
    del sys.modules["triton_python_backend_utils"]


@pytest.fixture
def model(module: ModuleType, pristine: Path) -> Callable[..., Any]:
    """An instance of the shipped classifier, with these parameters in its configuration."""

    def load(**parameters: int) -> Any:
        config = {
            "max_batch_size": 8,
            "default_model_filename": "model.onnx",
            "input": [{"name": "PIXELS"}],
            "output": [{"name": "PROBABILITIES"}, {"name": "DIGEST"}],
            "parameters": {name: {"string_value": str(value)} for name, value in parameters.items()},
        }
        instance = module.TritonPythonModel()
        instance.initialize(
            {
                "model_config": json.dumps(config),
                "model_repository": str(pristine / "defect_classifier"),
                "model_version": "1",
            }
        )
        return instance

    return load


def requests(*sizes: int) -> list[backend.InferenceRequest]:
    """Requests for so many pictures each."""
    generator = np.random.default_rng(7)
    pixels = [generator.integers(0, 256, (size, SIZE, SIZE, 3), np.uint8) for size in sizes]
    return [backend.InferenceRequest([backend.Tensor("PIXELS", each)]) for each in pixels]


def outputs(response: backend.InferenceResponse) -> dict[str, np.ndarray]:
    assert response.error is None
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors}


@pytest.mark.parametrize("items_per_run", [0, 1, 3])
def test_a_batch_in_pieces_is_answered_as_each_picture_alone(model: Callable[..., Any], items_per_run: int) -> None:
    batch = requests(3, 1, 4)
    plain = onnxruntime.InferenceSession(
        str(ROOT / "model_repository/defect_classifier/1/model.onnx"), providers=["CPUExecutionProvider"]
    )
    responses = model(items_per_run=items_per_run).execute(batch)
    assert len(responses) == len(batch)
    for request, response in zip(batch, responses, strict=True):
        (pixels,) = (tensor.as_numpy() for tensor in request.tensors)
        found = outputs(response)
        for i, picture in enumerate(pixels):
            probabilities, digest = plain.run(["PROBABILITIES", "DIGEST"], {"PIXELS": picture[None]})
            np.testing.assert_allclose(found["PROBABILITIES"][i], probabilities[0], atol=1e-5)
            assert (found["DIGEST"][i] == digest[0]).all()
        assert len(found["PROBABILITIES"]) == len(pixels)


@pytest.mark.parametrize(("running", "takes_them"), [(1, True), (2, False), (5, False)])
def test_a_run_takes_the_processors_that_are_idle_and_no_others(
    module: ModuleType, model: Callable[..., Any], tmp_path: Path, running: int, takes_them: bool
) -> None:
    instance = model(idle_thread_count=2)
    if instance.processors.count < 2:
        pytest.skip("there is one processor")
    load = tmp_path / "loadavg"
    load.write_text(f"0.52 0.58 0.59 {running}/467 12345\n")
    instance.processors = module.Processors(load)
    instance.processors.count = 2
    used = []
    for name in ("session", "idle_session"):
        session = getattr(instance, name)
        run = lambda *given, session=session, name=name: (used.append(name), session.run(*given))[1]  # noqa: E731
        setattr(instance, name, SimpleNamespace(run=run))
    (response,) = instance.execute(requests(1))
    assert outputs(response)["PROBABILITIES"].sum() == pytest.approx(1)
    assert used == ["idle_session" if takes_them else "session"]


def test_more_threads_than_processors_are_not_tried(module: ModuleType, model: Callable[..., Any]) -> None:
    processors = module.Processors()
    assert not processors.are_idle(processors.count + 1)
    assert model(idle_thread_count=1).idle_session is None
    assert model(idle_thread_count=64).idle_threads == processors.count


def test_a_tensor_that_the_model_refuses_is_an_error_of_each_request(model: Callable[..., Any]) -> None:
    wrong = backend.InferenceRequest([backend.Tensor("PIXELS", np.zeros((1, 5, 5, 3), np.uint8))])
    responses = model().execute([wrong, wrong])
    assert all("onnxruntime" in str(response.error) for response in responses)
    assert len(responses) == 2
