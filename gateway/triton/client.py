"""Triton over gRPC: one long-lived channel, and the few questions that the gateway asks.

Talks protobuf directly. A picture travels as one BYTES element: four bytes of length, then the file.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

import contract

_MAX_MESSAGE = 2**31 - 1
_OPTIONS = [
    ("grpc.max_send_message_length", _MAX_MESSAGE),
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    # gRPC's own defaults wait up to two minutes before it looks at a restarted server again.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A connection that swallows everything looks idle to TCP for a quarter of an hour, and gRPC itself waits a minute
    # for the answer to a ping. Triton bears pings this often because it answers questions in between.
    ("grpc.keepalive_time_ms", 3000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.ping_timeout_ms", 3000),
]
_RAW_INPUT = bytes([pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2])
"""Tag of the field; 2 stands for bytes whose length comes first."""
_NUMBERS = {"FP32": "<f4", "INT64": "<i8"}
_DEAD_PROCESS = re.compile(r"Stub process(?: '([^']+)')?")
_BROKEN_CONNECTION = ("Socket closed", "Connection reset", "Broken pipe")
"""Texts of gRPC's own, on this side: the server went while a call was on its way."""


class TritonError(Exception):
    """Triton refused or failed; `status` is gRPC's."""

    def __init__(self, status: grpc.StatusCode, detail: str) -> None:
        super().__init__(f"{status.name}: {detail}")
        self.status = status
        self.detail = detail

    @property
    def is_of_the_server(self) -> bool:
        """Whether the server failed, not the request: it is going, gone, or one of its processes died or was abandoned.

        NOT_FOUND is what Triton says of every model while it shuts down.
        """
        if self.status is grpc.StatusCode.UNAVAILABLE:
            return not self.is_queue_full
        died = bool(self.dead_process)
        # Between two steps of a release: what the first one's process returned was cut short, as it had been abandoned.
        lost = self.status is grpc.StatusCode.INVALID_ARGUMENT and "missing required input" in self.detail
        return died or lost or self.status is grpc.StatusCode.NOT_FOUND

    @property
    def dead_process(self) -> str:
        """The process of a step that died, by the name of its instance (defect_preprocess_0_1); empty: none did."""
        match = _DEAD_PROCESS.search(self.detail) if self.status is grpc.StatusCode.INTERNAL else None
        return match[1] or "a process of a step" if match else ""

    @property
    def is_broken_connection(self) -> bool:
        """Whether the server itself went while the call was on its way."""
        return self.status is grpc.StatusCode.UNAVAILABLE and any(text in self.detail for text in _BROKEN_CONNECTION)

    @property
    def is_queue_full(self) -> bool:
        """Whether Triton's own queue refused it."""
        return "maximum queue size" in self.detail


class MalformedAnswer(Exception):
    """Triton answered, but not with the tensors of a release."""


@dataclass(frozen=True)
class ModelState:
    """A line of Triton's repository index. `reason` says why it is not ready."""

    name: str
    is_ready: bool
    reason: str


@dataclass(frozen=True)
class Inference:
    """A release's outputs for one picture.

    `times_ns` are the start and end of preprocessing, then of postprocessing, on Triton's monotonic clock.
    `error` is empty, or `<code>: <detail>` of the preprocessing; the rest is then without meaning.
    """

    label: str
    confidence: float
    scores: tuple[tuple[str, float], ...]
    digest: str
    error: str
    times_ns: tuple[int, int, int, int]


class TritonClient:
    """All calls raise `TritonError` where Triton cannot be reached, refuses, or takes longer than `timeout` seconds."""

    def __init__(self, url: str) -> None:
        self._channel = grpc.aio.insecure_channel(url, options=_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        # The stub's method of that name, but without a serializer: the request is bytes already (`encode`).
        self._infer = self._channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer", response_deserializer=pb.ModelInferResponse.FromString
        )

    async def close(self) -> None:
        """Close the channel; calls in flight are cancelled."""
        await self._channel.close()

    async def infer(self, release: str, pictures: Sequence[bytes], request_id: str, timeout: float) -> list[Inference]:
        """Run pictures through a release as one call: an inference for each, in their order.

        Raises:
            MalformedAnswer: the outputs are not those of a release, or not for as many pictures.
        """
        request = encode(release, pictures, request_id)
        return decode(await self._call(self._infer, request, timeout), len(pictures))

    async def version(self, timeout: float) -> str:
        """Triton's own version."""
        return str((await self._call(self._stub.ServerMetadata, pb.ServerMetadataRequest(), timeout)).version)

    async def is_ready(self, model: str, timeout: float) -> bool:
        """Whether a model would answer now."""
        response = await self._call(self._stub.ModelReady, pb.ModelReadyRequest(name=model), timeout)
        return bool(response.ready)

    async def index(self, timeout: float) -> list[ModelState]:
        """Every model that Triton knows of."""
        response = await self._call(self._stub.RepositoryIndex, pb.RepositoryIndexRequest(), timeout)
        return [
            ModelState(model.name, model.state == "READY", model.reason or model.state.lower())
            for model in response.models
        ]

    async def config(self, model: str, timeout: float) -> tuple[dict[str, str], int]:
        """The `parameters` of a model's configuration, and the most items that a call may have."""
        response = await self._call(self._stub.ModelConfig, pb.ModelConfigRequest(name=model), timeout)
        parameters = {key: value.string_value for key, value in response.config.parameters.items()}
        return parameters, max(1, response.config.max_batch_size)

    async def instances(self, model: str, version: int, timeout: float) -> int:
        """How many instances, and so processes where it is a Python model, a version of a model has."""
        request = pb.ModelConfigRequest(name=model, version=str(version))
        response = await self._call(self._stub.ModelConfig, request, timeout)
        return sum(group.count for group in response.config.instance_group) or 1

    async def _call(self, method: Any, request: Any, timeout: float) -> Any:
        try:
            return await method(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise TritonError(error.code(), error.details() or "no details") from None


def encode(release: str, pictures: Sequence[bytes], request_id: str) -> bytes:
    """A `ModelInferRequest` of pictures as it goes over the wire.

    Its last field, the pictures, is appended to the serialized rest: protobuf itself would copy them twice more.
    """
    request = pb.ModelInferRequest(model_name=release, id=request_id)
    request.inputs.add(name=contract.IMAGE, datatype="BYTES", shape=[len(pictures), 1])
    elements = [part for picture in pictures for part in (struct.pack("<I", len(picture)), picture)]
    size = sum(map(len, elements))
    return b"".join((request.SerializeToString(), _RAW_INPUT, _varint(size), *elements))


def decode(response: pb.ModelInferResponse, count: int) -> list[Inference]:
    """The outputs of a release for `count` pictures, from the wire.

    Raises:
        MalformedAnswer: an output is missing, or has another type or length than a release's.
    """
    try:
        raw = dict(zip((output.name for output in response.outputs), response.raw_output_contents, strict=True))
        types = {output.name: output.datatype for output in response.outputs}
        times = zip(*[iter(_numbers(raw, types, contract.TIMES))] * 4, strict=True)
        labels, digests, errors, ranked = (
            _texts(raw[name]) for name in (contract.LABEL, contract.DIGEST, contract.ERROR, contract.LABELS)
        )
        scores = list(zip(ranked, _numbers(raw, types, contract.SCORES), strict=True))
        width = len(scores) // count
        rows = [tuple(scores[i : i + width]) for i in range(0, width * count, width or 1)]
        confidences = _numbers(raw, types, contract.CONFIDENCE)
        inferences = [
            Inference(label, confidence, row, digest, error, (int(a), int(b), int(c), int(d)))
            for label, confidence, row, digest, error, (a, b, c, d) in zip(
                labels, confidences, rows, digests, errors, times, strict=True
            )
        ]
        if len(inferences) != count or width * count != len(scores):
            raise ValueError(f"{len(inferences)} answers for {count} pictures")
        return inferences
    except (KeyError, ValueError, struct.error) as error:
        raise MalformedAnswer(f"{type(error).__name__}: {error}") from None


def _varint(number: int) -> bytes:
    """Protobuf's form of a number: seven bits a byte, the lowest first; all but the last byte have the eighth bit."""
    septets = bytearray()
    while number > 0x7F:
        septets.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*septets, number))


def _numbers(raw: dict[str, bytes], types: dict[str, str], name: str) -> list[float]:
    return list(np.frombuffer(raw[name], _NUMBERS[types[name]]).tolist())


def _texts(raw: bytes) -> list[str]:
    texts, position = [], 0
    while position < len(raw):
        (length,) = struct.unpack_from("<I", raw, position)
        position += 4 + length
        if position > len(raw):
            raise ValueError("a BYTES element is longer than its tensor")
        texts.append(raw[position - length : position].decode())
    return texts
