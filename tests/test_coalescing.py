"""Writes that are joined: how many system calls they become, and that nothing is lost, reordered or kept back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from gateway.http.coalescing import Joined


class Recorder(asyncio.Transport):
    """A transport that keeps what is written to it, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[bytes] = []

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.calls.append(data)

    def close(self) -> None:
        self.calls.append(b"closed")

    def abort(self) -> None:
        self.calls.append(b"aborted")


def written(act: Callable[[Joined], None]) -> tuple[list[bytes], list[bytes]]:
    """What was sent when `act` returned, and all that was sent once the event loop went on."""

    async def run() -> tuple[list[bytes], list[bytes]]:
        recorder = Recorder()
        act(Joined(recorder, asyncio.get_running_loop()))
        at_once = list(recorder.calls)
        await asyncio.sleep(0)
        return at_once, recorder.calls

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("pieces", "at_once", "later"),
    [
        ([b"head", b"body"], [b"headbody"], []),
        ([b"head"], [], [b"head"]),
        ([b"head", b"body", b"next"], [b"headbody"], [b"next"]),
        ([b"1", b"2", b"3", b"4"], [b"12", b"34"], []),
        ([b"head", b""], [b"head"], []),
        ([], [], []),
    ],
)
def test_every_other_write_goes_with_the_one_before(
    pieces: list[bytes], at_once: list[bytes], later: list[bytes]
) -> None:
    assert written(lambda joined: [joined.write(piece) for piece in pieces] and None) == (at_once, at_once + later)


def test_what_was_written_before_closing_is_sent() -> None:
    def act(joined: Joined) -> None:
        joined.write(b"head")
        joined.close()

    assert written(act) == ([b"head", b"closed"], [b"head", b"closed"])


def test_everything_else_is_the_transports_own() -> None:
    assert written(lambda joined: joined.abort())[0] == [b"aborted"]
