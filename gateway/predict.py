"""One picture to one verified answer: call the release, check that it is what it says it is, or ask the next one.

Knows nothing of HTTP; what goes wrong is a `Failure` with a code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import grpc

from contract import Manifest
from gateway.dispatch.dispatcher import Dispatcher
from gateway.problems import Failure
from gateway.routing.router import Choice, Route
from gateway.triton.client import Inference, MalformedAnswer, TritonError
from gateway.triton.verification import verify

_FAILURES = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline_exceeded",
    grpc.StatusCode.UNAVAILABLE: "triton_unavailable",
    grpc.StatusCode.NOT_FOUND: "no_release",  # unknown, unloaded, or Triton is stopping
}
_SAID = {
    "deadline_exceeded": "gave no answer in time",
    "triton_unavailable": "cannot be reached on any server",
    "no_release": "answers on no server",
    "release_unavailable": "answers on no server",
    "inference_failed": "failed on it",
}
"""To clients. What exactly a server said is in the log."""
_FAULTS_OF_A_RELEASE = frozenset(
    ("triton_unavailable", "no_release", "inference_failed", "invalid_answer", "provenance_mismatch")
)
"""What another release may do better. A bad picture is bad for every release, one that ends the processes which work on
it most of all, and a deadline is over for all."""


@dataclass(frozen=True)
class Answer:
    """An inference, the release that made it, and why that one.

    `sent` is when its call to Triton began (monotonic seconds); `passed_over` is what the release before it failed
    with.
    """

    release: Manifest
    route: Route
    inference: Inference
    sent: float
    passed_over: Failure | None = None


@dataclass(frozen=True)
class RequestInfo:
    """Who asks, and until when (monotonic seconds) an answer is of use."""

    request_id: str
    client: str
    deadline: float


async def predict(
    dispatcher: Dispatcher,
    choices: Sequence[Choice],
    picture: bytes,
    caller: RequestInfo,
    may_answer: Callable[[str], bool] = lambda _: True,
) -> Answer:
    """Answer one picture in time, by the first choice or, if that release is at fault, by one other.

    Raises:
        Failure: nothing could answer, the picture cannot be used, or the answer cannot be trusted.
    """
    try:
        return await _ask(dispatcher, choices[0], picture, caller, has_other=len(choices) > 1)
    except Failure as failure:
        others = [choice for choice in choices[1:] if may_answer(choice.release.name)]
        if not others or failure.code not in _FAULTS_OF_A_RELEASE or time.monotonic() >= caller.deadline:
            raise
        passed_over = failure
    return replace(await _ask(dispatcher, others[0], picture, caller), passed_over=passed_over)


async def _ask(
    dispatcher: Dispatcher,
    choice: Choice,
    picture: bytes,
    caller: RequestInfo,
    has_other: bool = False,
) -> Answer:
    release = choice.release
    try:
        ran = await dispatcher.infer(
            release.name, picture, caller.request_id, caller.client, caller.deadline, has_other
        )
    except TritonError as error:
        code = _FAILURES.get(error.status, "inference_failed")
        if code == "no_release" and choice.route == "pinned":
            code = "release_unavailable"
        raise Failure(code, f"{release.name} {_SAID[code]}", cause=str(error)) from error
    except MalformedAnswer as error:
        raise Failure(
            "invalid_answer", f"{release.name} gave other tensors than a release", cause=str(error)
        ) from error
    verify(ran.inference, release)
    return Answer(release, choice.route, ran.inference, ran.sent)
