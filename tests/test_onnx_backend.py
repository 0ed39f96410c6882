"""The ONNX backend, without Triton around it: batches in pieces that run side by side, and idle processors."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import json_format

from export import backend, config
from export.steps import load_module
from harness import ROOT

SIZE = 224
FINAL = 1


@dataclass(frozen=True)
class Request(backend.InferenceRequest):
    """A request that is answered through its sender, once."""

    responses: list[backend.InferenceResponse] = field(default_factory=list)
    refusals: list[BaseException] = field(default_factory=list)
    """What `send` raises, the first time and the next ones."""
    is_answered: threading.Event = field(default_factory=threading.Event)

    def get_response_sender(self) -> Request:
        """As Triton's."""
        return self

    def send(self, response: backend.InferenceResponse, flags: int) -> None:
        """As Triton's."""
        assert flags == FINAL
        if self.refusals:
            raise self.refusals.pop(0)
        self.responses.append(response)
        self.is_answered.set()

    def response(self) -> backend.InferenceResponse:
        """Wait for it."""
        assert self.is_answered.wait(30)
        (response,) = self.responses
        return response


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    """The backend, with the exam's stand-in for what exists only inside of Triton's processes."""
    sys.modules["triton_python_backend_utils"] = utilities = backend.utilities()
    utilities.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL  # type: ignore[attr-defined]
    yield load_module(ROOT / "triton_runtime/backends/onnxruntime/model.py")
    del sys.modules["triton_python_backend_utils"]


@pytest.fixture
def model(module: ModuleType, pristine: Path) -> Iterator[Callable[..., Any]]:
    """An instance of the shipped classifier, with these parameters in its configuration."""
    instances = []

    def load(**parameters: int) -> Any:
        served = {
            "max_batch_size": 8,
            "default_model_filename": "model.onnx",
            "input": [{"name": "PIXELS"}],
            "output": [{"name": "PROBABILITIES"}, {"name": "DIGEST"}],
            "parameters": {name: {"string_value": str(value)} for name, value in parameters.items()},
        }
        instance = module.TritonPythonModel()
        instance.initialize(
            {
                "model_config": json.dumps(served),
                "model_repository": str(pristine / "defect_classifier"),
                "model_version": "1",
            }
        )
        instances.append(instance)
        return instance

    yield load
    for instance in instances:
        instance.finalize()


def requests(*sizes: int) -> list[Request]:
    """Requests for so many pictures each."""
    generator = np.random.default_rng(7)
    pixels = [generator.integers(0, 256, (size, SIZE, SIZE, 3), np.uint8) for size in sizes]
    return [Request([backend.Tensor("PIXELS", each)]) for each in pixels]


def outputs(response: backend.InferenceResponse) -> dict[str, np.ndarray]:
    assert response.error is None
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors}


class Gate:
    """A session whose runs wait until they may go on."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.begun = threading.Semaphore(0)
        self.may_go_on = threading.Semaphore(0)

    def run(self, *given: Any) -> Any:
        """As the session's."""
        self.begun.release()
        assert self.may_go_on.acquire(timeout=30)
        return self._session.run(*given)


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("items_per_run", [0, 1, 3])
def test_a_batch_in_pieces_is_answered_as_each_picture_alone(
    model: Callable[..., Any], items_per_run: int, threads: int
) -> None:
    batch = requests(3, 1, 4)
    plain = onnxruntime.InferenceSession(
        str(ROOT / "model_repository/defect_classifier/1/model.onnx"), providers=["CPUExecutionProvider"]
    )
    model(items_per_run=items_per_run, intra_op_thread_count=threads).execute(batch)
    for request in batch:
        (pixels,) = (tensor.as_numpy() for tensor in request.tensors)
        found = outputs(request.response())
        for i, picture in enumerate(pixels):
            probabilities, digest = plain.run(["PROBABILITIES", "DIGEST"], {"PIXELS": picture[None]})
            np.testing.assert_allclose(found["PROBABILITIES"][i], probabilities[0], atol=1e-5)
            assert (found["DIGEST"][i] == digest[0]).all()
        assert len(found["PROBABILITIES"]) == len(pixels)


def with_processors(instance: Any, module: ModuleType, load: Path, running: int) -> Any:
    """The instance, on two processors with so many threads that run or could."""
    if instance.processors.count < 2:
        pytest.skip("there is one processor")
    load.write_text(f"0.52 0.58 0.59 {running}/467 12345\n")
    instance.processors = module.Processors(load)
    instance.processors.count = 2
    return instance


@pytest.mark.parametrize(("running", "takes_them"), [(1, True), (2, False), (5, False)])
def test_a_run_takes_the_processors_that_are_idle_and_no_others(
    module: ModuleType, model: Callable[..., Any], tmp_path: Path, running: int, takes_them: bool
) -> None:
    instance = with_processors(model(intra_op_thread_count=2), module, tmp_path / "loadavg", running)
    used = []
    for name in ("session", "wide_session"):
        session = getattr(instance, name)
        run = lambda *given, session=session, name=name: (used.append(name), session.run(*given))[1]  # noqa: E731
        setattr(instance, name, SimpleNamespace(run=run))
    (request,) = requests(1)
    instance.execute([request])
    assert outputs(request.response())["PROBABILITIES"].sum() == pytest.approx(1)
    assert used == ["wide_session" if takes_them else "session"]


def test_pieces_run_side_by_side_and_the_next_batch_comes_when_the_last_one_has_begun(
    module: ModuleType, model: Callable[..., Any], tmp_path: Path
) -> None:
    instance = with_processors(model(intra_op_thread_count=2, items_per_run=1), module, tmp_path / "loadavg", running=2)
    gate = instance.session = Gate(instance.session)
    (first,), (second,) = requests(3), requests(2)
    executing = threading.Thread(target=instance.execute, args=([first],))
    executing.start()
    for _ in range(2):
        assert gate.begun.acquire(timeout=30), "two pieces at once"
    executing.join(0.2)
    assert executing.is_alive(), "there are more pieces than processors"
    gate.may_go_on.release()
    executing.join(30)
    assert not executing.is_alive(), "the last piece has begun"
    assert not first.is_answered.is_set()
    executing = threading.Thread(target=instance.execute, args=([second],))
    executing.start()
    gate.may_go_on.release(4)
    assert len(outputs(first.response())["PROBABILITIES"]) == 3
    assert len(outputs(second.response())["PROBABILITIES"]) == 2
    executing.join(30)


def test_what_has_begun_is_answered_before_the_end(model: Callable[..., Any]) -> None:
    instance = model(intra_op_thread_count=2, items_per_run=1)
    batch = requests(2, 2)
    instance.execute(batch)
    instance.finalize()
    assert all(request.is_answered.is_set() for request in batch)


def test_more_threads_than_processors_are_not_tried(module: ModuleType, model: Callable[..., Any]) -> None:
    processors = module.Processors()
    assert not processors.are_idle(processors.count + 1)
    assert model(intra_op_thread_count=64).threads == processors.count
    assert model(intra_op_thread_count=0).threads == processors.count
    assert model().threads == 1


def test_a_tensor_that_the_model_refuses_is_an_error_of_each_request(model: Callable[..., Any]) -> None:
    instance = model(items_per_run=1)
    wrong = [Request([backend.Tensor("PIXELS", np.zeros((2, 5, 5, 3), np.uint8))]) for _ in range(2)]
    instance.execute(wrong)
    assert all("onnxruntime" in str(request.response().error) for request in wrong)
    (right,) = requests(1)
    instance.execute([right])
    assert outputs(right.response())


def test_an_output_without_a_batch_is_an_error_of_each_request(model: Callable[..., Any]) -> None:
    instance = model(items_per_run=1)
    instance.session = SimpleNamespace(run=lambda *_: [np.float32(1), np.float32(1)])
    batch = requests(1, 1)
    instance.execute(batch)
    assert all("onnxruntime" in str(request.response().error) for request in batch)


def test_tensors_that_make_no_batch_are_an_error_of_each_request(model: Callable[..., Any]) -> None:
    sizes = (5, SIZE)
    mixed = [Request([backend.Tensor("PIXELS", np.zeros((1, size, size, 3), np.uint8))]) for size in sizes]
    responses = model().execute(mixed)
    assert all("onnxruntime" in str(response.error) for response in responses)
    assert len(responses) == len(mixed)


# ---- whatever fails, every request is answered ----


def answers(instance: Any, pictures: int = 1) -> bool:
    """Whether a request for so many pictures still gets its answer."""
    (request,) = requests(pictures)
    executing = threading.Thread(target=instance.execute, args=([request],), daemon=True)
    executing.start()
    return bool(outputs(request.response()))


@pytest.fixture(params=[0, 1, 2], ids=["at once", "in pieces", "wide"])
def instance(request: Any, module: ModuleType, model: Callable[..., Any], tmp_path: Path) -> Any:
    """One that runs a batch in a worker, in pieces in its workers, or in `execute` itself."""
    if request.param < 2:
        return model(intra_op_thread_count=1, items_per_run=request.param)
    return with_processors(model(intra_op_thread_count=2), module, tmp_path / "loadavg", running=1)


def test_an_answer_that_cannot_be_sent_is_an_error_of_its_request_alone(instance: Any) -> None:
    """And one that Triton takes no answer for costs the others nothing either."""
    batch = requests(1, 1, 1, 1)
    batch[0].refusals.append(RuntimeError("no shared memory"))
    batch[2].refusals.extend([RuntimeError("cancelled"), SystemExit("cancelled")])
    instance.execute(batch)
    assert "no shared memory" in str(batch[0].response().error)
    assert outputs(batch[1].response())
    assert outputs(batch[3].response())
    assert not batch[2].responses
    assert answers(instance)


@pytest.mark.parametrize("fault", [MemoryError("none left"), SystemExit("ended"), KeyboardInterrupt("ended")])
def test_whatever_a_run_raises_is_an_error_of_each_request(instance: Any, fault: BaseException) -> None:
    def fail(*_: object) -> None:
        raise fault

    sessions = instance.session, instance.wide_session
    instance.session = SimpleNamespace(run=fail)
    instance.wide_session = instance.wide_session and instance.session
    batch = requests(1, 2)
    executing = threading.Thread(target=instance.execute, args=(batch,), daemon=True)
    executing.start()
    assert all(str(fault) in str(request.response().error) for request in batch)
    executing.join(30)
    assert not executing.is_alive()
    instance.session, instance.wide_session = sessions
    assert answers(instance)


def test_a_thread_that_ended_is_replaced(model: Callable[..., Any]) -> None:
    instance = model(intra_op_thread_count=2, items_per_run=1)
    ended = instance.workers
    instance.finalize()
    assert answers(instance, pictures=2), "one alone could be run without a worker"
    assert not set(ended) & set(instance.workers)


def test_no_fault_ends_a_thread(module: ModuleType, model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the fault cannot be written down."""

    def closed(*_: object) -> None:
        raise BrokenPipeError("standard error is closed")

    instance = model(intra_op_thread_count=1)
    monkeypatch.setattr(module.traceback, "print_exc", closed)
    instance.pieces.put("no work")
    assert answers(instance)
    assert all(worker.is_alive() for worker in instance.workers)


@pytest.mark.parametrize("items_per_run", [0, 1])
def test_a_batch_of_no_items_is_an_error_of_each_request(model: Callable[..., Any], items_per_run: int) -> None:
    responses = model(items_per_run=items_per_run).execute(requests(0, 0))
    assert ["no items" in str(response.error) for response in responses] == [True, True]


def test_outputs_that_are_not_one_for_each_item_are_an_error_of_each_request(model: Callable[..., Any]) -> None:
    """They could be split, but into others' answers."""
    instance = model()
    instance.session = SimpleNamespace(run=lambda *_: [np.zeros((5, 2), np.float32), np.zeros((5, 32), np.uint8)])
    batch = requests(1, 1)
    instance.execute(batch)
    assert all("not one for each item" in str(request.response().error) for request in batch)


@pytest.mark.parametrize("name", ["items_per_run", "intra_op_thread_count"])
def test_a_number_below_zero_is_refused_at_the_start(model: Callable[..., Any], name: str) -> None:
    """There would be no piece, or no thread to run it: every request would wait forever."""
    with pytest.raises(ValueError, match=f"{name} is -1"):
        model(**{name: -1})


# ---- a GPU, of which only what is decided without one can be tried ----


class Cuda(onnxruntime.InferenceSession):
    """The model on the processor, which says that it is on the GPU, and remembers how it was asked for."""

    providers: list = []  # noqa: RUF012
    sizes: list[int] = []  # noqa: RUF012
    sized: list[tuple[int, int]] = []  # noqa: RUF012
    fault: Exception | None = None

    def __init__(self, path: str, options: Any, providers: list) -> None:
        if providers != ["CPUExecutionProvider"]:
            type(self).providers = providers
        super().__init__(path, options, providers=["CPUExecutionProvider"])
        self.is_on_gpu = providers != ["CPUExecutionProvider"]

    def get_providers(self) -> list[str]:
        """As a session that CUDA was loaded for."""
        return ["CUDAExecutionProvider", "CPUExecutionProvider"] if self.is_on_gpu else super().get_providers()

    def run(self, names: Any, feed: dict[str, np.ndarray]) -> Any:
        """As the session's; on a GPU without cuDNN, only this fails."""
        if self.is_on_gpu:
            type(self).sizes.append(len(feed["PIXELS"]))
            type(self).sized.append((id(self), len(feed["PIXELS"])))
            if self.fault:
                raise self.fault
        return super().run(names, feed)


@pytest.fixture
def cuda(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> type[Cuda]:
    """An ONNX Runtime with CUDA, as far as it can be told from outside."""
    monkeypatch.setattr(Cuda, "sizes", [])
    monkeypatch.setattr(Cuda, "sized", [])
    found = SimpleNamespace(
        **{name: getattr(onnxruntime, name) for name in ("SessionOptions", "GraphOptimizationLevel")}
    )
    found.__version__ = onnxruntime.__version__
    found.InferenceSession = Cuda
    found.get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(module, "onnxruntime", found)
    return Cuda


@pytest.fixture
def loaded(module: ModuleType, pristine: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A classifier whose serving settings say a `device`, on a machine whose Triton gives it a `kind`."""
    instances = []

    def load(device: str, kind: str) -> Any:
        rendered = config.classifier("defect", [1], SIZE, 2, config.Serving.model_validate({
            "max_batch_size": 6, "classifier": {"device": device, "threads": 2}
        }))  # fmt: skip
        folder = tmp_path / "defect_classifier"
        shutil.copytree(pristine / "defect_classifier" / "1", folder / "1")
        (folder / "config.pbtxt").write_bytes(config.render(rendered))
        as_triton_says_it = json_format.MessageToDict(rendered, preserving_proto_field_name=True)
        as_triton_says_it["parameters"] = {k: dict(v) for k, v in as_triton_says_it["parameters"].items()}
        instance = module.TritonPythonModel()
        instance.initialize(
            {
                "model_config": json.dumps(as_triton_says_it),
                "model_repository": str(folder),
                "model_version": "1",
                "model_instance_kind": kind,
                "model_instance_device_id": "3",
            }
        )
        instances.append(instance)
        return instance

    yield load
    for instance in instances:
        instance.finalize()


@pytest.mark.parametrize("device", ["auto", "gpu"])
def test_a_gpu_that_triton_gives_is_used_for_whole_batches_in_full_precision(
    loaded: Callable[..., Any], cuda: type[Cuda], capfd: pytest.CaptureFixture[str], device: str
) -> None:
    instance = loaded(device, "GPU")
    (name, options), last = cuda.providers
    assert (name, last) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert (options["device_id"], options["use_tf32"]) == ("3", "0")
    assert "defect_classifier 1: on GPU 3 (CUDA)" in capfd.readouterr().err
    assert cuda.sizes == [1, 2, 4, 6], "each size was tried before a request pays for it"
    for items, size in ((3, 4), (1, 1), (6, 6), (5, 6)):
        (request,) = requests(items)
        instance.execute([request])
        found = outputs(request.response())["PROBABILITIES"]
        assert cuda.sizes[-1] == size, "one run for the batch, filled up"
        assert len(found) == items
        assert len({session for session, _ in cuda.sized}) == len({size for _, size in cuda.sized}) == 4
    assert len(cuda.sized) == len(cuda.sizes) == 8


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_a_gpu_or_where_it_is_left_to_others_the_processor_runs_it(
    loaded: Callable[..., Any], cuda: type[Cuda], capfd: pytest.CaptureFixture[str], device: str
) -> None:
    instance = loaded(device, "CPU")
    assert "defect_classifier 1: on the processor\n" in capfd.readouterr().err
    assert answers(instance)
    assert not cuda.sizes


def test_a_gpu_that_cannot_be_used_is_a_line_where_it_is_not_demanded(
    loaded: Callable[..., Any], cuda: type[Cuda], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Cuda, "fault", RuntimeError("libcudnn.so.9: cannot open shared object file"))
    instance = loaded("auto", "GPU")
    said = capfd.readouterr().err
    assert "on the processor, though there is GPU 3: libcudnn.so.9" in said
    assert "requirements/gpu.lock" in said
    assert answers(instance)


def test_a_gpu_that_is_demanded_and_cannot_be_used_is_the_reason_why_the_version_is_unavailable(
    loaded: Callable[..., Any], module: ModuleType
) -> None:
    """With the ONNX Runtime that is installed here, which is the processor's."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(
        module.NoGpu, match=r"KIND_GPU, and GPU 3 cannot be used: .* has no CUDA: install requirements/gpu"
    ):
        loaded("gpu", "GPU")
