"""ONNX Runtime as a Python-based Triton backend, on the processor or on a GPU, for the embedded server.

The wheel that the embedded server comes from has no ONNX Runtime backend. This one answers to the same name
and reads the same `config.pbtxt`, so the same repository runs here and on the C++ backend of NVIDIA's image.
TensorRT is ignored. Understood are the kind of the instances, `default_model_filename` and these parameters, of which
the C++ backend knows the first three:

    intra_op_thread_count        processors that an instance uses, 1 by default; 0: all
    inter_op_thread_count        1 by default
    graph_optimization_level     -1 basic, 0 or 1 all
    items_per_run                a batch goes through the model in pieces of so many; 0: all at once

Pieces of a batch run side by side, each on one processor, which wastes less than several processors on one piece.
Only a batch that is one piece gets them all, where they are idle.

On a GPU a batch goes through whole, with ONNX Runtime's CUDA provider, filled up to a power of two (`SizedSessions`),
and `items_per_run` and the threads say nothing.
Products are computed in fp32 there, not in TF32 as CUDA would by default: TF32 keeps ten bits of a factor, no more than
fp16 does, and then the answers of a release would not be those that it was examined with. Whoever wants tensor cores
exports in fp16, which is a release of its own.

A request that is given no answer hangs forever, and so does all of this process if `execute` does not return. So
nothing that fails, whatever it is, ends a thread or keeps one request's answer from the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_HOW = "install requirements/gpu.lock, and a driver that its CUDA runs on"
_TYPES = {"TYPE_UINT8": np.uint8, "TYPE_FP16": np.float16, "TYPE_FP32": np.float32, "TYPE_INT64": np.int64}
"""Of inputs that batches can be tried with before the first request."""


class TritonPythonModel:
    """One instance of the model, in a process of its own, with a thread for each processor that it uses, or for a GPU.

    One process, because two of them that take turns on a processor empty its caches for each other: that costs a
    twentieth of the time of the model.
    """

    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        """Add nothing: a configuration is complete, or it is wrong."""
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model file of this version.

        Raises:
            onnxruntime.capi.onnxruntime_pybind11_state.Fail and its kin: the file is missing or broken;
                Triton reports the message as the reason why the version is unavailable.
            ValueError: a parameter is no number, or less than 0; likewise.
            NoGpu: the configuration says KIND_GPU, and ONNX Runtime cannot use the GPU; likewise.
        """
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        file = config["default_model_filename"] or "model.onnx"
        path = str(Path(args["model_repository"], args["model_version"], file))
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.items_per_run = _count(parameters, "items_per_run", 0)
        self.processors = Processors()
        wanted = _count(parameters, "intra_op_thread_count", 1) or self.processors.count
        session, where = _on_gpu(path, parameters, config, args)
        if session is not None:
            self.items_per_run = 0
            self.threads, self.session, self.wide_session = 1, session, None
        else:
            self.threads = min(wanted, self.processors.count)
            self.session = _session(path, parameters, 1)
            self.wide_session = _session(path, parameters, self.threads) if self.threads > 1 else None
        name = f"{Path(args['model_repository']).name} {args['model_version']}"
        print(f"{name}: {where}", file=sys.stderr, flush=True)
        self.pieces: queue.SimpleQueue[tuple[Batch, slice] | None] = queue.SimpleQueue()
        self.workers: list[threading.Thread] = []
        self._staff()

    def execute(self, requests: list) -> list | None:
        """Run all requests that Triton batched together as one batch; they are answered when the last piece is done.

        It returns once the last piece has begun (one that has all processors: is done), so that Triton sends the next
        batch for those that are idle. Triton counts only the time until then.
        """
        try:
            batch = Batch(requests, self.inputs, self.outputs, self.items_per_run)
            wide = self.wide_session
            is_alone = len(batch.pieces) == 1 and wide is not None and self.processors.are_idle(self.threads)
        except Exception as error:
            return [_failure(error) for _ in requests]
        if is_alone:
            batch.run(batch.pieces[0], wide)
            return None
        for piece in batch.pieces:
            self.pieces.put((batch, piece))
        self._staff()
        while not batch.has_begun.wait(1):
            self._staff()
        return None

    def finalize(self) -> None:
        """Answer what is left, and end."""
        for _ in self.workers:
            self.pieces.put(None)
        for worker in self.workers:
            worker.join()

    def _staff(self) -> None:
        """Have a thread for each processor; none of them should have ended."""
        self.workers = [worker for worker in self.workers if worker.is_alive()]
        while len(self.workers) < self.threads:
            worker = threading.Thread(target=self._work, daemon=True)
            worker.start()
            self.workers.append(worker)

    def _work(self) -> None:
        while True:
            try:
                work = self.pieces.get()
                if work is None:
                    return
                batch, piece = work
                batch.run(piece, self.session)
            except BaseException:  # the next batch deserves this thread nevertheless
                _report()


class Batch:
    """Requests that go through the model together, in pieces, and are answered together.

    Args:
        requests: Triton's.
        inputs, outputs: names of the model's tensors.
        items_per_run: how many items a piece has; 0: all.

    Raises:
        ValueError: the tensors of the requests make no batch, or one of no items.
    """

    def __init__(self, requests: list, inputs: Sequence[str], outputs: Sequence[str], items_per_run: int) -> None:
        tensors = {
            name: [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in inputs
        }
        # A copy even of one request: the tensors are Triton's memory, which it may take back when `execute` returns.
        self._feed = {name: np.concatenate(parts) for name, parts in tensors.items()}
        self._ends = np.cumsum([len(part) for part in tensors[inputs[0]]])
        self._outputs = outputs
        size = int(self._ends[-1])
        if not size:
            raise ValueError("no items to run the model on")
        step = items_per_run or size
        self.pieces = [slice(start, start + step) for start in range(0, size, step)]
        self.has_begun = threading.Event()
        """The last piece has."""
        self._results: dict[int, list[np.ndarray]] = {}
        """By where the piece starts."""
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._left = len(self.pieces)
        self._senders = [request.get_response_sender() for request in requests]

    def run(self, piece: slice, session: onnxruntime.InferenceSession | SizedSessions) -> None:
        """Send a piece through the model; with the last of them, answer. Raises nothing."""
        try:
            if piece is self.pieces[-1]:
                self.has_begun.set()
            self._results[piece.start] = session.run(
                self._outputs, {name: items[piece] for name, items in self._feed.items()}
            )
        except BaseException as error:
            self._error = error
        with self._lock:
            self._left -= 1
            is_done = self._left == 0
        if is_done:
            for sender, response in zip(self._senders, self._responses(), strict=True):
                _send(sender, response)

    def _responses(self) -> list:
        try:
            if self._error is not None:
                raise self._error
            results = [self._results[piece.start] for piece in self.pieces]
            whole = [np.concatenate(parts) for parts in zip(*results, strict=True)]
            if any(len(items) != self._ends[-1] for items in whole):
                raise ValueError("the model's outputs are not one for each item")
            splits = {name: np.split(items, self._ends[:-1]) for name, items in zip(self._outputs, whole, strict=True)}
            return [
                pb_utils.InferenceResponse([pb_utils.Tensor(name, parts[i]) for name, parts in splits.items()])
                for i in range(len(self._senders))
            ]
        except BaseException as error:  # nobody else would answer
            return [_failure(error) for _ in self._senders]


def _send(sender, response) -> None:
    """Answer one request: with an error where its answer cannot be sent. Raises nothing, for the others' sake."""
    try:
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    except BaseException as error:
        _report()
        try:
            sender.send(_failure(error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except BaseException:  # Triton takes no answer to it any more
            _report()


def _report() -> None:
    with contextlib.suppress(BaseException):
        traceback.print_exc()


def _failure(error: BaseException):
    return pb_utils.InferenceResponse([], pb_utils.TritonError(f"onnxruntime: {error}"))


def _count(parameters: dict[str, str], name: str, default: int) -> int:
    value = int(parameters.get(name, default))
    if value < 0:
        raise ValueError(f"{name} is {value}: give 0 or more")
    return value


class NoGpu(RuntimeError):
    """The configuration demands a GPU, and there is none that ONNX Runtime can use; the message says why."""


def _on_gpu(
    path: str, parameters: dict[str, str], config: dict, args: dict[str, str]
) -> tuple[SizedSessions | None, str]:
    """The model on the GPU that Triton chose for this instance, and where it runs, in words.

    None means the processor: Triton chose that, or chose a GPU by KIND_AUTO that ONNX Runtime cannot use.

    Raises:
        NoGpu: ONNX Runtime cannot use it, and the configuration says KIND_GPU.
    """
    if args.get("model_instance_kind") != "GPU":
        return None, "on the processor"
    number = args["model_instance_device_id"]
    reason = f"the installed ONNX Runtime {onnxruntime.__version__} has no CUDA"
    if CUDA in onnxruntime.get_available_providers():
        cuda = {
            "device_id": number,
            "use_tf32": "0",
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",  # instances and pipelines share the GPU's memory
        }
        try:
            make = partial(onnxruntime.InferenceSession, path, _options(parameters, 1), providers=[(CUDA, cuda), CPU])
            if (first := make()).get_providers()[0] == CUDA:
                return SizedSessions(first, make, config), f"on GPU {number} (CUDA)"
        except Exception as error:  # whatever CUDA and cuDNN raise; a broken model fails again below, or is NoGpu
            reason = str(error)
        else:
            reason = "ONNX Runtime could not load its CUDA provider, as it says above"
    # Triton tells a backend the kind that it decided on. What was asked for is in the file alone.
    if "KIND_GPU" in Path(args["model_repository"], "config.pbtxt").read_text():
        raise NoGpu(f"config.pbtxt says KIND_GPU, and GPU {number} cannot be used: {reason}: {_HOW}")
    return None, f"on the processor, though there is GPU {number}: {reason}: {_HOW}"


class SizedSessions:
    """A model on a GPU: a session for each power of two up to the largest batch; a batch is filled up to the next one.

    ONNX Runtime's CUDA provider makes cuDNN's plans anew whenever a shape is not that of the run before. For a small
    network on an H200 that took half a second in fp32 and three in fp16, and batches of changing sizes 2 requests a
    second where equal ones had 1,600. A session that always gets the same size plans once: here, before the first
    request.

    Args:
        first: one of the sessions.
        make: makes another one.
        config: the model's configuration, as Triton says it.
    """

    def __init__(
        self,
        first: onnxruntime.InferenceSession,
        make: Callable[[], onnxruntime.InferenceSession],
        config: dict,
    ) -> None:
        most = config["max_batch_size"]
        sizes = sorted({most, *(1 << power for power in range(most.bit_length()))} - {0})
        self._sessions = {size: make() if size > 1 else first for size in sizes}
        inputs = [(i["name"], list(map(int, i["dims"])), _TYPES.get(i["data_type"])) for i in config["input"]]
        if any(min(dims) < 0 or dtype is None for _, dims, dtype in inputs):
            return  # it shows with the first requests
        for size, session in self._sessions.items():
            session.run(None, {name: np.zeros((size, *dims), dtype) for name, dims, dtype in inputs})

    def run(self, outputs: Sequence[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """As a session's, for as many items as the largest batch has at most."""
        items = len(next(iter(feed.values())))
        size = next(size for size in self._sessions if size >= items)
        if size > items:
            feed = {name: np.concatenate([x, np.repeat(x[-1:], size - items, axis=0)]) for name, x in feed.items()}
        return [output[:items] for output in self._sessions[size].run(outputs, feed)]


def _session(path: str, parameters: dict[str, str], threads: int) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, _options(parameters, threads), providers=[CPU])


def _options(parameters: dict[str, str], threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", 1))
    if parameters.get("graph_optimization_level") == "-1":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # Threads that sleep between two operators take longer to wake than an operator takes; threads that spin between two
    # runs steal processors from others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class Processors:
    """The processors that this process may use, and how many of them are idle."""

    def __init__(self, load: Path = Path("/proc/loadavg")) -> None:
        self.count = len(os.sched_getaffinity(0))
        self._file = os.open(load, os.O_RDONLY)  # its fourth field: how many run or could, of how many there are

    def are_idle(self, wanted: int) -> bool:
        """Whether so many are idle, counting the caller's."""
        missing = wanted - self._idle()
        if missing == 1:
            # Perhaps whoever woke us, who is done but for going to sleep, and waits for our processor to do so.
            os.sched_yield()
            missing = wanted - self._idle()
        return missing <= 0

    def _idle(self) -> int:
        running = os.pread(self._file, 64, 0).split()[3].partition(b"/")[0]
        return self.count - int(running) + 1
