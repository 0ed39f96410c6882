"""What a release has to do: a picture that waits, a call with some of them on its way, what came of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from gateway.dispatch.suspects import Record
from gateway.triton.client import Inference
from gateway.triton.fleet import Replica


@dataclass(frozen=True)
class TimedInference:
    """An inference, and when its call was sent (monotonic seconds)."""

    inference: Inference
    sent: float


@dataclass(eq=False)
class PendingItem:
    """A picture. `deadline` is in monotonic seconds; `answer` is cancelled where nobody waits for it any more."""

    picture: bytes
    request_id: str
    client: str
    deadline: float
    answer: asyncio.Future[TimedInference] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    has_other: bool = False
    """Should the release be down, another one will be asked: there is no point in waiting for it."""
    attempts: int = 0
    is_alone: bool = False
    """Not to be grouped: a call with this one in it failed."""
    record: Record = field(default_factory=Record)
    """What is held against its picture."""
    was_alone: bool = False
    """It was alone in a call that may have ended a process, so it is sent to no other release."""
    call: Call | None = None


@dataclass(eq=False)
class Call:
    """Pictures on their way through one replica."""

    replica: Replica
    group: list[PendingItem]
    had_to_wait: bool
    """It is a group, or others still waited when it was sent."""
    sent: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] | None = None
    is_trial: bool = False
    """Of a suspect, which goes alone."""
    probed: float = 0.0
    """When the check before a trial began: are all processes alive?"""
    is_lost: bool = False
    """Cancelled because of its replica: its pictures go to another one."""
    is_abandoned: bool = False
    """Nobody waits for it any more."""
