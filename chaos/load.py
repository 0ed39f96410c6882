"""Clients that never stop: good pictures, bad ones, answers that nobody waits for; and how each request ended.

What is right is known beforehand: good pictures are the golden ones, whose answers the export recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from chaos.stack import DEADLINE_S
from contract import Manifest
from harness.gateway import GatewayProcess
from harness.load import Pool, Response, post

_HANG_S = 15.0
"""After its deadline, a client waits so much longer before it calls that a hang."""
_TIMEOUTS_MS = (None, None, None, 400, 1500)

End = Literal["answered", "rejected", "refused", "wrong", "untyped", "left"]
"""Answered as recorded, rejected as a bad picture deserves, refused by the service with a problem of its table ..."""


@dataclass(frozen=True)
class Ask:
    """One request: `codes` are the problems that it deserves; a good picture deserves none."""

    body: bytes
    media_type: str
    codes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Ended:
    """How a request ended for its client; times in monotonic seconds.

    `is_ordinary`: a good picture with the deadline that everybody has, so nothing but a fault can fail it.
    """

    sent: float
    ended: float
    deadline_s: float
    end: End
    detail: str
    is_ordinary: bool

    @property
    def late_s(self) -> float:
        """So long after the deadline the client had its answer; negative: before it."""
        return self.ended - self.sent - self.deadline_s

    @property
    def has_failed(self) -> bool:
        """Whether it should have been answered, and was not."""
        return self.is_ordinary and self.end != "answered"


@dataclass
class Known:
    """What may be asked of the releases of a pipeline, and what the answer is.

    `silent` is a release that may not answer: whatever it says is wrong.
    """

    releases: Sequence[Manifest]
    silent: str = ""
    good: list[Ask] = field(init=False)
    bad: list[Ask] = field(init=False)

    def __post_init__(self) -> None:
        pictures = [golden.image for golden in self.releases[-1].golden]
        self.good = [Ask(picture, "image/jpeg") for picture in pictures]
        largest = max(pictures, key=len)
        broken = frozenset({"image_truncated", "image_corrupt", "image_unsupported"})
        self.bad = [
            Ask(largest[: len(largest) // 2], "image/jpeg", broken),
            Ask(random.Random(5).randbytes(5000), "image/png", broken),  # noqa: S311 - no secret
            Ask(b'{"image": 7}', "application/json", frozenset({"invalid_request"})),
            Ask(b'{"image": ', "application/json", frozenset({"invalid_json"})),
        ]

    def difference(self, ask: Ask, answer: Mapping[str, Any]) -> str:
        """What is wrong with an answer; empty where it is the one that is recorded of the release that it names."""
        release = next((each for each in self.releases if each.name == answer["model_version"]), None)
        if release is None:
            return f"there is no release {answer['model_version']}"
        if release.name == self.silent:
            return f"{release.name} answered, as {answer['route']}"
        golden = next((each for each in release.golden if each.image == ask.body), None)
        if golden is None:
            return "a bad picture was answered"
        scores = {score["label"]: score["confidence"] for score in answer["scores"]}
        return golden.difference(answer["label"], scores, release.tolerance)


class Clients:
    """Clients in a thread of their own, from entering the context until leaving it or until `most` requests.

    Args:
        known: what is asked, and what the answers are.
        gateway: what is asked.
        clients: connections at once.
        pause_s: how long each client rests between two requests, on average.
        most: requests in all.
        pin: the release to ask; by default the routing decides.
        only: what to ask; by default good pictures, bad ones, and some answers that nobody waits for.
    """

    def __init__(
        self,
        known: Known,
        gateway: GatewayProcess,
        *,
        clients: int = 12,
        pause_s: float = 0.2,
        most: int | None = None,
        pin: str = "",
        only: Sequence[Ask] = (),
    ) -> None:
        self.seen: list[Ended] = []
        self._known, self._port = known, gateway.port
        self._problems = {kind["code"]: kind["status"] for kind in gateway.page("/errors")}
        self._clients, self._pause_s = clients, pause_s
        self._left = most
        self._pin, self._only = pin, only
        self._chance = random.Random(7)  # noqa: S311 - no secret
        self._is_ending = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ending = True
        self._thread.join()

    def wait(self) -> None:
        """Until `most` requests were made."""
        self._thread.join()

    def is_clean(self, seconds: float) -> bool:
        """Whether good pictures were answered, and none was not, in the last seconds."""
        since = time.monotonic() - seconds
        recent = [each for each in list(self.seen) if each.ended > since and each.is_ordinary]
        return bool(recent) and not any(each.has_failed for each in recent)

    async def _run(self) -> None:
        await asyncio.gather(*(self._client() for _ in range(self._clients)))

    async def _client(self) -> None:
        pool = Pool("127.0.0.1", self._port)
        while not self._is_ending and self._left != 0:
            if self._left is not None:
                self._left -= 1
            drawn = self._chance.random()
            if self._only:
                await self._ask(pool, self._chance.choice(self._only))
            elif drawn < 0.1:
                await self._leave(pool)
            elif drawn < 0.3:
                await self._ask(pool, self._chance.choice(self._known.bad))
            else:
                await self._ask(pool, self._chance.choice(self._known.good))
            await asyncio.sleep(self._pause_s * 2 * self._chance.random())
        pool.close()

    def _request(self, ask: Ask, timeout_ms: int | None) -> bytes:
        path = f"/v1/predict?model_version={self._pin}" if self._pin else "/v1/predict"
        timeout = [] if timeout_ms is None else [f"X-Timeout-Ms: {timeout_ms}"]
        return post("chaos", path, ask.body, f"Content-Type: {ask.media_type}", *timeout)

    async def _leave(self, pool: Pool) -> None:
        """Send the head and none, a half or all of the body, and be gone."""
        sent = time.monotonic()
        share = self._chance.choice((0.0, 0.5, 1.0, 1.0))
        ask = self._chance.choice(self._known.good)
        request = self._request(ask, None)
        with contextlib.suppress(OSError):
            connection = await pool.take()
            connection.write(request[: len(request) - round(len(ask.body) * (1 - share))])
            await asyncio.sleep(0.02 * self._chance.random())
            connection.close()
        self.seen.append(Ended(sent, time.monotonic(), DEADLINE_S, "left", "", False))

    async def _ask(self, pool: Pool, ask: Ask) -> None:
        timeout_ms = None if self._only else self._chance.choice(_TIMEOUTS_MS)
        deadline_s = DEADLINE_S if timeout_ms is None else timeout_ms / 1000
        sent = time.monotonic()
        try:
            connection = await pool.take()
            answer = await connection.ask(self._request(ask, timeout_ms), deadline_s + _HANG_S)
            pool.give(connection)
            end, detail = self._judge(ask, answer)
        except TimeoutError:
            end, detail = "untyped", "no answer"
        except (OSError, EOFError) as error:
            end, detail = "untyped", f"{type(error).__name__}"
        is_ordinary = timeout_ms is None and not ask.codes
        self.seen.append(Ended(sent, time.monotonic(), deadline_s, end, detail, is_ordinary))

    def _judge(self, ask: Ask, answer: Response) -> tuple[End, str]:
        status, body = answer.status, answer.body
        try:
            content = json.loads(body)
            if status == 200:
                difference = self._known.difference(ask, content)
                return ("wrong", difference) if difference else ("answered", "")
            code = content["code"]
            if b"content-type: application/problem+json" not in answer.head or self._problems[code] != status:
                return "untyped", f"{status} {answer.head!r} {code}"
        except (ValueError, KeyError, TypeError):
            return "untyped", f"{status} {body[:60]!r}"
        if status in (408, 429) or status >= 500:
            return "refused", code
        return ("rejected" if code in ask.codes else "wrong"), code


def refusals(seen: Sequence[Ended]) -> Counter[str]:
    """How often the service refused, by the problem's code."""
    return Counter(each.detail for each in seen if each.end == "refused")
