"""Several Tritons as one: which are found, which are asked, and what there is when they hold different releases."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import grpc
import pytest

from gateway.dispatch.dispatcher import Dispatcher
from gateway.metrics import Metrics
from gateway.routing import catalogue as catalogue_module
from gateway.routing.catalogue import Catalogue
from gateway.settings import Settings
from gateway.triton.client import Inference, TritonError
from gateway.triton.fleet import Fleet, Replica
from gateway.triton.inventory import Known
from tests.test_outages import GOOD, MANIFEST

NAME = MANIFEST.name


def release(number: int, reason: str = "", **changes: Any) -> Known:
    manifest = replace(MANIFEST, number=number, **changes)
    return Known(manifest.name, number, manifest, reason)


def fleet_of(*held: Sequence[Known] | None, **settings: Any) -> Fleet:
    """Replicas that were looked at and hold these releases; None: it cannot be reached."""
    fleet = Fleet(Settings(**settings))
    for number, releases in enumerate(held):
        replica = Replica(f"127.0.0.1:{number + 1}", Settings(**settings), fleet._changed)
        replica.releases.triton_version = None if releases is None else "2.51.0"
        replica.releases.known = tuple(releases or ())
        replica.has_joined = releases is not None
        fleet.replicas.append(replica)
    fleet._changed()
    return fleet


def names(catalogue: Catalogue) -> list[str]:
    return [release.name for release in catalogue.active()]


# ---- what there is ----


async def _new_release(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = fleet_of([release(1), release(2)], [release(1)])
    catalogue = Catalogue(fleet, "defect")
    assert names(catalogue) == ["defect-v1"]
    item = catalogue.find("defect-v2")
    assert item is not None and item.reason == "not yet on 127.0.0.1:2"
    fleet.replicas[1].releases.known = (release(1), release(2))
    assert names(catalogue) == ["defect-v2", "defect-v1"]
    fleet.replicas[1].releases.known = (release(1),)  # it was admitted: one that loses it takes nothing away
    assert names(catalogue) == ["defect-v2", "defect-v1"]

    monkeypatch.setattr(catalogue_module, "_WAIT_FOR_OTHERS_S", 0.0)
    alone = Catalogue(fleet_of([release(1), release(2)], [release(1), release(2, "it cannot be loaded")]), "defect")
    await asyncio.sleep(0.01)
    assert names(alone) == ["defect-v2", "defect-v1"]


def test_a_new_release_waits_for_the_others_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(_new_release(monkeypatch))


def test_what_did_not_change_is_not_put_together_again() -> None:
    async def check() -> None:
        first, second = release(1), release(2)
        fleet = fleet_of([first, second], [release(1), release(2)])
        catalogue = Catalogue(fleet, "defect")
        known = catalogue.known
        fleet.replicas[0].releases.known = (first, second)  # as another look at Triton leaves it
        assert catalogue.known is known
        fleet.replicas[0].releases.judge(second, "golden-00.jpg: another label")
        fleet.replicas[1].releases.known = (release(1),)
        assert names(catalogue) == ["defect-v1"]
        fleet.replicas[1].releases.triton_version = None
        assert names(catalogue) == ["defect-v1"]
        fleet.replicas[0].releases.judge(second, "")
        assert names(catalogue) == ["defect-v2", "defect-v1"]

    asyncio.run(check())


def test_two_releases_of_one_name_are_refused() -> None:
    async def check() -> None:
        catalogue = Catalogue(fleet_of([release(1)], [release(1, built_from="elsewhere")]), "defect")
        assert names(catalogue) == []
        known = catalogue.find("defect-v1")
        assert known is not None and known.reason == "the servers hold different releases of this name"

    asyncio.run(check())


@pytest.mark.parametrize("other", [None, [release(1, "it cannot be loaded")], [release(1), release(2, "broken")]])
def test_a_replica_that_is_lost_or_broken_takes_no_release_away(other: list[Known] | None) -> None:
    async def check() -> None:
        fleet = fleet_of([release(1)], [release(1)])
        catalogue = Catalogue(fleet, "defect")
        assert names(catalogue) == ["defect-v1"]
        second = fleet.replicas[1].releases
        second.triton_version, second.known = (None, second.known) if other is None else ("2.51.0", tuple(other))
        assert names(catalogue) == ["defect-v1"]
        assert catalogue.triton_version == "2.51.0"

    asyncio.run(check())


# ---- who is asked ----


def test_without_any_replica_requests_wait_a_moment_and_are_then_refused() -> None:
    async def check() -> None:
        fleet = fleet_of([release(1)], outage_wait_s=0.2)
        assert fleet.replicas_for("defect-v1") == fleet.replicas
        with pytest.raises(TritonError) as none_has_it:
            fleet.replicas_for("defect-v9")
        assert none_has_it.value.status is grpc.StatusCode.NOT_FOUND
        told: list[bool] = []
        fleet.on_change(lambda: told.append(True))
        fleet.replicas[0].lose("it broke")
        assert fleet.replicas_for("defect-v1") == []
        assert not told, "whoever noticed goes on first"
        await asyncio.sleep(0)
        assert told
        told.clear()
        await asyncio.sleep(0.3)
        assert told  # that it has lasted long enough
        with pytest.raises(TritonError) as refused:
            fleet.replicas_for("defect-v1")
        assert refused.value.status is grpc.StatusCode.UNAVAILABLE
        assert "127.0.0.1:1: it broke" in refused.value.detail

    asyncio.run(check())


def test_each_address_of_a_name_is_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        addresses: list[str] | None = ["127.0.0.2", "127.0.0.1"]

        async def getaddrinfo(host: str, port: str, **_: Any) -> list[tuple]:
            if addresses is None:
                raise socket.gaierror("the name server is away")
            assert host == "triton"
            four = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, int(port))) for each in addresses]
            return [*four, *four, (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", int(port), 0, 0))]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        fleet = Fleet(Settings(triton_urls=("triton:1",), probe_timeout_s=0.1))
        await fleet._find()
        assert [each.url for each in fleet.replicas] == ["127.0.0.1:1", "127.0.0.2:1"]
        first = fleet.replicas[0]
        addresses = None
        await fleet._find()
        assert len(fleet.replicas) == 2  # a name that fails takes nothing away
        addresses = ["127.0.0.1", "127.0.0.3"]
        await fleet._find()
        assert [each.url for each in fleet.replicas] == ["127.0.0.1:1", "127.0.0.3:1"]
        assert fleet.replicas[0] is first
        await fleet.close()

    asyncio.run(check())


# ---- calls; what Triton does is scripted, where it cannot be made to do it at the right moment ----


class Scripted:
    """Answers each call after `seconds`, or fails."""

    def __init__(self, seconds: float = 0.0, error: TritonError | None = None) -> None:
        self.calls = self.pictures = 0
        self._seconds, self._error = seconds, error

    async def infer(self, release: str, pictures: Sequence[bytes], ids: str, timeout: float) -> list[Inference]:
        self.calls += 1
        self.pictures += len(pictures)
        await asyncio.sleep(self._seconds)
        if self._error:
            raise self._error
        return [GOOD for _ in pictures]


def dispatcher_on(*scripts: Scripted) -> tuple[Fleet, Dispatcher]:
    fleet = fleet_of(*([release(3)] for _ in scripts))
    for replica, script in zip(fleet.replicas, scripts, strict=True):
        replica.triton = script  # type: ignore[assignment]
    return fleet, Dispatcher(fleet, Settings(), Metrics())


async def ask(dispatcher: Dispatcher, seconds: float = 5.0) -> Inference:
    ran = await dispatcher.infer(NAME, b"picture", "id", "anonymous", time.monotonic() + seconds)
    return ran.inference


def test_replicas_take_turns_where_none_has_less_to_do() -> None:
    async def check() -> None:
        scripts = Scripted(), Scripted()
        _, dispatcher = dispatcher_on(*scripts)
        for _ in range(6):
            assert await ask(dispatcher) == GOOD
        assert [script.calls for script in scripts] == [3, 3]

    asyncio.run(check())


def test_a_call_that_fails_with_its_server_is_made_on_another() -> None:
    async def check() -> None:
        broken = Scripted(error=TritonError(grpc.StatusCode.UNAVAILABLE, "Socket closed"))
        fleet, dispatcher = dispatcher_on(broken, Scripted())
        for _ in range(4):
            assert await ask(dispatcher) == GOOD
        assert broken.calls == 1
        assert [each.is_available for each in fleet.replicas] == [False, True]

    asyncio.run(check())


def test_what_is_in_a_replica_that_is_lost_goes_to_another() -> None:
    async def check() -> None:
        fleet, dispatcher = dispatcher_on(Scripted(60.0), Scripted())
        asked = [asyncio.create_task(ask(dispatcher)) for _ in range(4)]
        await asyncio.sleep(0.05)
        fleet.replicas[0].lose("it does not answer")
        assert await asyncio.gather(*asked) == [GOOD] * 4

    asyncio.run(check())


def test_retries_are_bounded() -> None:
    async def check() -> None:
        script = Scripted(error=TritonError(grpc.StatusCode.ABORTED, "no"))
        _, dispatcher = dispatcher_on(script)
        outcomes = await asyncio.gather(*(ask(dispatcher) for _ in range(200)), return_exceptions=True)
        assert all(isinstance(outcome, TritonError) for outcome in outcomes)
        assert script.pictures <= 200 + 100  # each once, and the retries that are saved up

    asyncio.run(check())


def test_clients_that_leave_cannot_fill_triton_with_work_for_nobody() -> None:
    async def check() -> None:
        script = Scripted(0.2)
        _, dispatcher = dispatcher_on(script)
        await ask(dispatcher)  # from now on a call usually takes 0.2 s
        started = time.monotonic()
        for _ in range(100):
            leaving = asyncio.create_task(ask(dispatcher))
            await asyncio.sleep(0.005)
            leaving.cancel()
        seconds = time.monotonic() - started
        assert script.calls <= 1 + 2 * (1 + seconds / 0.2)  # two at once, as at the start
        await asyncio.sleep(0.3)
        assert dispatcher.calls() == {NAME: 0}
        assert dispatcher.waiting == 0

    asyncio.run(check())


def test_a_client_that_leaves_before_its_call_begins_takes_no_place() -> None:
    async def check() -> None:
        _, dispatcher = dispatcher_on(Scripted())
        for _ in range(10):
            leaving = asyncio.create_task(ask(dispatcher))
            await asyncio.sleep(0)  # it has asked; its call has not begun
            leaving.cancel()
        await asyncio.sleep(0.05)
        assert dispatcher.calls() == {NAME: 0}
        assert await ask(dispatcher) == GOOD

    asyncio.run(check())
