"""Faults on real servers under load: `make chaos` in small, two Tritons and a gateway for the rows that matter most."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from chaos.faults import FAULTS
from chaos.load import Clients, Known
from chaos.releases import Pair
from chaos.stack import Triton
from chaos.trial import servers, stack_for, try_out
from export.repository import Repository

ALLOWANCE_S = 5.0
"""For the way to the client, on a machine that others keep busy; `make chaos` itself is strict."""


@pytest.fixture(scope="module")
def tritons(tiny_only: Path) -> Iterator[list[Triton]]:
    with servers(tiny_only, [FAULTS["replica-kill"]]) as started:
        yield started


@pytest.fixture(scope="module")
def known(tiny_only: Path) -> Known:
    return Known(Repository(tiny_only).releases("tiny"))


@pytest.mark.parametrize(
    "name",
    [
        "replica-kill",
        "replica-hang",
        "replica-drain",
        "replica-late",
        "black-hole",
        "clients-vanish",
        "clients-trickle",
    ],
)
def test_a_fault_costs_no_more_than_is_promised(name: str, tritons: list[Triton], known: Known, tmp_path: Path) -> None:
    with stack_for(FAULTS[name], tritons, "tiny", tmp_path / "log") as stack:
        report = try_out(FAULTS[name], stack, known, hold_s=2.0, allowance_s=ALLOWANCE_S)
    assert report.problems == [], report
    assert report.answered > 0


def test_the_clients_notice_an_answer_that_is_not_the_recorded_one(
    tritons: list[Triton], known: Known, tmp_path: Path
) -> None:
    release = known.releases[-1]
    golden = [
        replace(each, scores={label: 1 - score for label, score in each.scores.items()}) for each in release.golden
    ]
    misled = Known([replace(release, golden=tuple(golden))])
    with stack_for(FAULTS["flood"], tritons, "tiny", tmp_path / "log") as stack:
        with Clients(misled, stack.gateway) as load:
            time.sleep(1)
        ends = {each.end for each in load.seen if each.is_ordinary}
    assert "wrong" in ends
    assert not load.is_clean(60)


@pytest.fixture(scope="module")
def pair(tiny_only: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tiny_only, tmp_path_factory.mktemp("pair"), "tiny")


@pytest.fixture(scope="module")
def paired(pair: Pair) -> Iterator[list[Triton]]:
    with servers(pair.root, [FAULTS["poison"]]) as started:
        yield started


@pytest.mark.parametrize("name", ["poison", "release-kill", "release-hang", "shadow-alone"])
def test_what_happens_to_one_release_is_felt_by_nobody_else(
    name: str, pair: Pair, paired: list[Triton], tmp_path: Path
) -> None:
    fault = FAULTS[name]
    known = Known(Repository(pair.root).releases("tiny"), silent=fault.silent(pair))
    with stack_for(fault, paired, "tiny", tmp_path / "log", pair) as stack:
        report = try_out(fault, stack, known, hold_s=1.5, allowance_s=ALLOWANCE_S)
    assert report.problems == [], report
    assert report.answered > 0
