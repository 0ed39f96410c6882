"""The number of calls at once settles where more would only wait, on simulated servers: calls at once -> seconds."""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections import deque

import pytest

from gateway.dispatch.limiter import Limiter


class Server:
    """Works on `workers` calls at once, the others wait; a call of eight pictures takes about `seconds`.

    Of these, `fixed` is the part that a call takes whatever is in it. After an answer it takes `turnaround` until the
    next call is there.
    """

    def __init__(
        self,
        workers: int,
        noise: float,
        seconds: float = 0.1,
        fixed: float = 0.0,
        turnaround: float = 0.0,
        seed: int = 7,
    ) -> None:
        self.workers, self.seconds, self.fixed, self.turnaround = workers, seconds, fixed, turnaround
        self._noise = noise
        self._random = random.Random(seed)
        self._waiting: deque[tuple[float, int]] = deque()
        self._working: list[tuple[float, float, int]] = []
        self._now = 0.0

    @property
    def capacity(self) -> float:
        """Calls of eight pictures a second."""
        return self.workers / (self.seconds * math.exp(self._noise**2 / 2))

    def run(self, limiter: Limiter, calls: int, clients: int | None = None, most: int = 8) -> tuple[float, float]:
        """Keep it at the limit for so many calls: the mean limit, and pictures / 8 a second, of the last third.

        Without `clients` each call has the `most` pictures that it may have; with them, each call its share of theirs.
        """
        limits, done, began = [], 0.0, 0.0
        for number in range(calls):
            while len(self._waiting) + len(self._working) < limiter.limit:
                share = most if clients is None else math.ceil(clients / limiter.limit)
                self._waiting.append((self._now + self.turnaround, limiter.size(share, most)))
            while self._waiting and len(self._working) < self.workers:
                sent, pictures = self._waiting.popleft()
                usual = self.seconds * (self.fixed + (1 - self.fixed) * pictures / 8)
                takes = usual * self._random.lognormvariate(0, self._noise)
                heapq.heappush(self._working, (max(self._now, sent) + takes, sent, pictures))
            self._now, sent, pictures = heapq.heappop(self._working)
            limiter.observe(self._now, self._now - sent, pictures)
            if number < calls * 2 // 3:
                began = self._now
            else:
                limits.append(limiter.limit)
                done += pictures / 8
        return statistics.mean(limits), done / (self._now - began)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("workers", [1, 2, 4, 16, 64])
def test_the_limit_settles_at_the_knee(workers: int, noise: float) -> None:
    server = Server(workers, noise)
    limit, rate = server.run(Limiter(), 6000)
    assert limit <= workers * 1.3 + 3
    assert rate >= 0.8 * server.capacity


def test_the_limit_follows_a_server_that_changes() -> None:
    limiter, server = Limiter(), Server(16, noise=0.1)
    before, _ = server.run(limiter, 3000)
    server.workers = 4
    after, rate = server.run(limiter, 3000)
    assert before > 12
    assert after < 8
    assert rate >= 0.8 * server.capacity
    server.workers = 16
    again, rate = server.run(limiter, 5000)
    assert again > 12
    assert rate >= 0.8 * server.capacity


def test_the_limit_survives_a_server_that_gets_slower_for_good() -> None:
    """Another model takes four times as long: that is no queue, once it was seen with few calls at once."""
    limiter, server = Limiter(), Server(8, noise=0.1)
    server.run(limiter, 3000)
    server.seconds *= 4
    limit, rate = server.run(limiter, 8000)
    assert limit <= 8 * 1.3 + 3
    assert rate >= 0.8 * server.capacity


@pytest.mark.parametrize("fixed", [0.0, 0.2, 0.8])
@pytest.mark.parametrize(("workers", "clients"), [(2, 16), (2, 64), (8, 32)])
def test_calls_that_get_smaller_as_there_are_more_hide_no_queue(workers: int, clients: int, fixed: float) -> None:
    limit, _ = Server(workers, noise=0.1, fixed=fixed).run(Limiter(), 6000, clients)
    assert workers <= limit <= workers * 1.3 + 3


def test_the_limit_settles_again_where_more_clients_make_the_calls_larger() -> None:
    limiter, server = Limiter(), Server(8, noise=0.1, fixed=0.2)
    server.run(limiter, 3000, clients=10)
    limit, rate = server.run(limiter, 3000)
    assert limit <= 8 * 1.3 + 3
    assert rate >= 0.8 * server.capacity


def test_calls_of_one_picture_are_made_at_once_as_any_others() -> None:
    limit, rate = (server := Server(8, noise=0.1)).run(Limiter(), 3000, clients=64, most=1)
    assert 7 < limit <= 8 * 1.3 + 3
    assert rate >= 0.8 * server.capacity


def test_a_third_call_is_worth_it_where_two_are_late_to_come_back() -> None:
    """The workers have nothing to do for a fifth of the time, though no call takes longer for that."""
    limit, _ = Server(2, noise=0.1, turnaround=0.025).run(Limiter(), 6000, clients=16)
    assert limit > 2.9


def test_a_third_call_that_is_worth_little_is_kept_as_a_rule() -> None:
    """It brings a fourteenth, and calls differ by more: one look that says otherwise must not count for long."""
    limits = []
    for seed in range(10):
        limiter, server = Limiter(), Server(2, noise=0.15, turnaround=0.008, seed=seed)
        server.run(limiter, 500, clients=16)
        limits += [server.run(limiter, 30, clients=16)[0] for _ in range(200)]
    assert statistics.fmean(limits) > 2.8


@pytest.mark.parametrize("clients", [16, 64])
def test_more_calls_that_bring_nothing_are_seldom_tried(clients: int) -> None:
    limiter, server = Limiter(), Server(2, noise=0.1, fixed=0.1)
    server.run(limiter, 500, clients)
    limits = [server.run(limiter, 10, clients)[0] for _ in range(300)]
    assert statistics.fmean(limits) < 2.1
    server.workers = 8
    limit, _ = server.run(limiter, 12000, clients)
    assert limit > 6


def test_a_full_queue_halves_the_limit() -> None:
    limiter = Limiter()
    Server(32, noise=0.0).run(limiter, 3000)
    before = limiter.limit
    limiter.full()
    assert before > 20
    assert limiter.limit == before // 2
    for _ in range(10):
        limiter.full()
    assert limiter.limit == 2


def test_the_more_often_it_finds_what_it_knew_the_less_often_it_learns() -> None:
    """Learning has its price: with few calls at once, and of two sizes, some pictures wait longer."""
    limiter, server = Limiter(), Server(3, noise=0.1)

    def learning(calls: int) -> int:
        """How often, of so many calls, it looked at one while it learnt."""
        limits = []
        for _ in range(calls // 5):
            server.run(limiter, 5)
            limits.append(limiter.limit)
        return limits.count(2)

    first, second = learning(5000), learning(5000)
    assert 0 < 2 * second < first
    server.seconds *= 2
    server.run(limiter, 3000)
    limit, rate = server.run(limiter, 3000)
    assert 3 <= limit < 5
    assert rate >= 0.9 * server.capacity
