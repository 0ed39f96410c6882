"""Faults that a healthy Triton cannot be made to show: a gRPC proxy before the real one, which spoils what is asked.

A prediction whose request id is a key of `FAULTS` gets that fault; every other call passes through untouched, but for
the index, which also names a release that is not there: `defect-v9`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from tritonclient.grpc import service_pb2 as pb

from tests.conftest import free_port
from triton_runtime.server import Endpoint

Spoil = Callable[[grpc.ServicerContext, pb.ModelInferResponse], None]


def _wrong_digest(_: grpc.ServicerContext, answer: pb.ModelInferResponse) -> None:
    position = [output.name for output in answer.outputs].index("DIGEST")
    answer.raw_output_contents[position] = (64).to_bytes(4, "little") + b"0" * 64


_crashed = itertools.count()


def _crash(context: grpc.ServicerContext, _: pb.ModelInferResponse) -> None:
    """Each time another process dies."""
    message = f"in ensemble 'defect-v1', Stub process 'defect_preprocess_0_{next(_crashed)}' is not healthy."
    context.abort(grpc.StatusCode.INTERNAL, message)


FAULTS: dict[str, Spoil] = {
    "inference_failed": lambda context, _: context.abort(grpc.StatusCode.INTERNAL, "onnxruntime: out of range"),
    "image_crashes_server": _crash,
    "no_release": lambda context, _: context.abort(grpc.StatusCode.NOT_FOUND, "unknown model"),
    "overloaded": lambda context, _: context.abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size"),
    "deadline_exceeded": lambda *_: time.sleep(2),
    "invalid_answer": lambda _, answer: answer.ClearField("outputs"),
    "provenance_mismatch": _wrong_digest,
}


class TamperingProxy(grpc.GenericRpcHandler):
    """Listens at `endpoint` while the context is open."""

    def __init__(self, triton: Endpoint) -> None:
        self.endpoint = Endpoint(grpc=free_port())
        self._channel = grpc.insecure_channel(triton.grpc_url)
        self._server = grpc.server(ThreadPoolExecutor(8), handlers=[self])
        self._server.add_insecure_port(self.endpoint.grpc_url)

    def __enter__(self) -> TamperingProxy:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()
        self._channel.close()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        forward = self._channel.unary_unary(details.method)

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                response = forward(request, timeout=60)
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())
            if details.method.endswith("/RepositoryIndex"):
                index = pb.RepositoryIndexResponse.FromString(response)
                index.models.add(name="defect-v9", version="1", state="UNAVAILABLE", reason="made up")
                return bytes(index.SerializeToString())
            if details.method.endswith("/ModelInfer"):
                fault = FAULTS.get(pb.ModelInferRequest.FromString(request).id)
                if fault:
                    inference = pb.ModelInferResponse.FromString(response)
                    fault(context, inference)
                    return bytes(inference.SerializeToString())
            return bytes(response)

        return grpc.unary_unary_rpc_method_handler(answer)
