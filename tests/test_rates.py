"""A client gets the rate of its key, and is told when to come back."""

from __future__ import annotations

import contextlib
import random

import pytest

from gateway.auth.rate_limit import Rates
from gateway.problems import Failure


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
    clock = Clock()
    rates = Rates(clock)
    rates.spend("scanner", 2.0)
    rates.lend("scanner", 2.0, 8)
    with pytest.raises(Failure) as caught:
        rates.spend("scanner", 2.0)
    assert caught.value.retry_after == 4  # seven owed, and one more
    clock.now += 4.0
    rates.spend("scanner", 2.0)


def test_one_request_at_a_time_is_lent_to_and_who_is_refused_owes_no_more() -> None:
    clock = Clock()
    rates = Rates(clock)
    for _ in range(5):  # as many as a second earns, all at once
        rates.spend("scanner", 5.0)
    rates.lend("scanner", 5.0, 31)
    for _ in range(4):
        with pytest.raises(Failure, match="rate_limited") as caught:
            rates.lend("scanner", 5.0, 31)
        assert caught.value.retry_after == 7  # 31 owed, and one more
    clock.now += 7
    rates.spend("scanner", 5.0)
    rates.lend("scanner", None, 1000)


def test_in_the_long_run_batches_get_the_rate_however_they_come() -> None:
    clock = Clock()
    rates, chance = Rates(clock), random.Random(2)
    pictures = 0
    for _ in range(20_000):
        clock.now += chance.expovariate(1.0)
        together = chance.randrange(1, 5)
        begun = sum(is_let_in(rates, "scanner", 4) for _ in range(together))
        for _ in range(begun):
            with contextlib.suppress(Failure):
                rates.lend("scanner", 4, 31)
                pictures += 31
            pictures += 1
    assert 0.9 < pictures / (4 * (clock.now - 1000)) < 1.01  # what is earned while it is quiet for long is lost
