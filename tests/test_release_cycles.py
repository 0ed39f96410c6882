"""Again and again: publish, activate, canary, promote, roll back, retire - under load that must never notice."""

from __future__ import annotations

import contextlib
import os
from itertools import pairwise
from pathlib import Path

import pytest

from export.exam import Rules
from export.publish import Examiner
from export.repository import Repository
from gateway.routing.rollback import Gateway, roll_back
from tests import drops
from tests.asking import Asking
from tests.conftest import EXAMPLES, GatewayProcess, free_endpoint, http, wait_for
from tests.offline import Offline
from tests.test_export import SERVING
from triton_runtime.server import TritonServer

CYCLES, CONNECTIONS = int(os.environ.get("CYCLES", "4")), 16
"""`make test` runs a few cycles, `CYCLES=20` as many as wanted."""
PAUSE_S = 0.2
PICTURE = EXAMPLES[0].read_bytes()
RESTARTS = ("gateway", "both")
"""After each second cycle, in turns."""


class Stack:
    """A gateway in front of a Triton. A restart begins the new one before it ends the old one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._triton = self._start_triton()
        self._gateway = self._start_gateway()

    @property
    def url(self) -> str:
        return self._gateway.url

    def restart(self, load: Asking, *, with_triton: bool) -> None:
        old_triton, old_gateway = self._triton, self._gateway
        if with_triton:
            self._triton = self._start_triton()
        self._gateway = self._start_gateway()
        load.move(self.url)
        old_gateway.__exit__()
        if with_triton:
            old_triton.stop()

    def stop(self) -> None:
        self._gateway.__exit__()
        self._triton.stop()

    def _start_triton(self) -> TritonServer:
        triton = TritonServer(self._folder / "model_repository", free_endpoint(), poll_seconds=1).__enter__()
        triton.wait_until_ready()
        return triton

    def _start_gateway(self) -> GatewayProcess:
        settings = {"pipeline": "tiny", "deadline_s": 60, "refresh_s": 0.3, "routing": self._folder / "routing.toml"}
        gateway = GatewayProcess(self._triton.endpoint, self._folder / "gateway.log", **settings).__enter__()
        wait_for(gateway.is_ready)
        return gateway


@pytest.mark.timeout(1200)
def test_cycles_without_a_failed_request_or_a_wrong_name(tiny: Repository) -> None:
    repository, folder = tiny, tiny.root.parent
    routing = folder / "routing.toml"
    examiner = Examiner(repository, SERVING, Rules(nice=0))
    expected: dict[str, dict[str, float]] = {}

    def route(text: str) -> None:
        staged = folder / "routing.new"
        staged.write_text(text)
        staged.rename(routing)

    def releases() -> dict:
        return dict(http.get(f"{stack.url}/v1/releases").json())

    def remember(release: str) -> None:
        expected[release] = Offline(repository.root, "tiny", repository.release(release)).answer(PICTURE)[1]

    def answered_by(release: str, way: str) -> int:
        return sum(
            1 for _, each in list(load.answers) if (each.get("model_version"), each.get("route")) == (release, way)
        )

    def wait_for_answers(release: str, way: str, more_than: int) -> None:
        wait_for(lambda: answered_by(release, way) > more_than or bool(load.failures), 60)

    def wait_until_active(release: str) -> None:
        wait_for(lambda: any((r["name"], r["state"]) == (release, "ready") for r in releases()["releases"]), 60)

    def wait_until_stable(release: str) -> None:
        wait_for(lambda: releases()["stable"] == release)

    remember("tiny-v1")
    route('stable = "tiny-v1"\n')
    stack = Stack(folder)
    stable = "tiny-v1"
    with contextlib.ExitStack() as running:
        running.callback(stack.stop)
        load = running.enter_context(Asking(stack.url, PICTURE, CONNECTIONS, PAUSE_S))
        for cycle in range(1, CYCLES + 1):
            number = 1 + max(repository.versions("tiny", "classifier"))
            drop = repository.step_folder("tiny", "classifier", number)
            drop.mkdir()
            (drop / "model.onnx").write_bytes(drops.sealed(0.315 - 0.03 * cycle).SerializeToString())
            new = examiner.publish_drop("tiny", {"classifier": number}, lambda _: None).manifest.name
            remember(new)
            wait_until_active(new)
            load.wait_for_more(5)
            assert answered_by(new, "stable") == 0, "published is not routed to"

            route(f'stable = "{stable}"\n[canary]\nrelease = "{new}"\npercent = 30\n')
            wait_for_answers(new, "canary", 3)
            route(f'stable = "{new}"\n')
            wait_for_answers(new, "stable", 10)

            roll_back(None, routing, [Gateway.at(stack.url, None)])
            before = answered_by(new, "stable")
            load.wait_for_more(CONNECTIONS + 20)
            # What was in flight at the moment of the rollback may still come back.
            assert answered_by(new, "stable") - before <= CONNECTIONS
            assert releases()["stable"] == stable

            route(f'stable = "{new}"\n')
            wait_until_stable(new)
            if cycle > 1:
                repository.retire(f"tiny-v{cycle - 1}")
            stable = new
            if cycle % 2 == 0:
                stack.restart(load, with_triton=RESTARTS[cycle // 2 % 2] == "both")
            assert not load.failures, load.failures[:3]
    assert load.failures == []
    answers = [answer for _, answer in load.answers]
    assert {answer["route"] for answer in answers} <= {"stable", "canary", "fallback"}
    assert {answer["model_version"] for answer in answers} == set(expected)
    for answer in answers:
        scores = {score["label"]: score["confidence"] for score in answer["scores"]}
        assert scores == pytest.approx(expected[answer["model_version"]], abs=1e-4), answer
    apart = sorted(scores["dark"] for scores in expected.values())
    assert min(b - a for a, b in pairwise(apart)) > 5e-3, "the releases can be told apart"
