"""A client gets the rate of its key, and is told when to come back."""

from __future__ import annotations

import random

import pytest

from gateway.errors import Failure
from gateway.rates import Rates


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def is_let_in(rates: Rates, client: str, rate: float | None) -> bool:
    try:
        rates.spend(client, rate)
    except Failure:
        return False
    return True


@pytest.mark.parametrize("rate", [3.0, 50.0])
def test_in_the_long_run_a_client_gets_its_rate(rate: float) -> None:
    clock = Clock()
    rates, chance = Rates(clock), random.Random(1)
    let_in = 0
    for _ in range(20_000):
        clock.now += chance.expovariate(rate * 4)
        let_in += is_let_in(rates, "scanner", rate)
    assert let_in == pytest.approx(rate * (clock.now - 1000), rel=0.02)


def test_a_quiet_client_may_send_a_second_s_worth_at_once() -> None:
    clock = Clock()
    rates = Rates(clock)
    assert sum(is_let_in(rates, "scanner", 5) for _ in range(20)) == 5
    clock.now += 3600
    assert sum(is_let_in(rates, "scanner", 5) for _ in range(20)) == 5
    assert is_let_in(rates, "another", 5)


def test_who_comes_back_when_told_is_let_in() -> None:
    clock = Clock()
    rates = Rates(clock)
    for rate in (0.01, 0.3, 7.0):
        while is_let_in(rates, "scanner", rate):
            pass
        with pytest.raises(Failure, match="rate_limited") as caught:
            rates.spend("scanner", rate)
        assert caught.value.code == "rate_limited"
        assert caught.value.retry_after is not None
        clock.now += caught.value.retry_after
        assert is_let_in(rates, "scanner", rate)


def test_a_rate_that_changes_holds_from_then_on() -> None:
    clock = Clock()
    rates = Rates(clock)
    assert sum(is_let_in(rates, "scanner", 100) for _ in range(50)) == 50
    assert sum(is_let_in(rates, "scanner", 2) for _ in range(50)) == 2
    assert all(is_let_in(rates, "scanner", None) for _ in range(50))


def test_the_pictures_of_one_request_are_lent_and_earned_back() -> None:
    clock = [0.0]
    rates = Rates(now=lambda: clock[0])
    rates.spend("scanner", 2.0, pictures=9)
    with pytest.raises(Failure) as caught:
        rates.spend("scanner", 2.0)
    assert caught.value.retry_after == 4  # seven owed, and one more
    clock[0] = 4.0
    rates.spend("scanner", 2.0)
