"""One fault does not become everybody's: a release, a server or a picture that fails beside others that do not.

What Triton does is scripted, so that it does it at the right moment; `make chaos` does the same to real ones.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc
import pytest

from contract import Golden
from gateway import supervision
from gateway.dispatch.dispatcher import Dispatcher
from gateway.dispatch.release_queue import ReleaseQueue
from gateway.metrics import Metrics
from gateway.predict import Answer, RequestInfo, predict
from gateway.problems import Failure
from gateway.routing.router import Choice
from gateway.settings import Settings
from gateway.supervision import Tasks
from gateway.triton.client import Inference, ModelState, TritonError
from gateway.triton.fleet import Fleet, Replica
from gateway.triton.inventory import Known
from tests.test_outages import GOOD, MANIFEST

GOLDEN = Golden("golden", b"golden", GOOD.label, dict(GOOD.scores))
SOUND, OTHER = (replace(MANIFEST, number=number, golden=(GOLDEN,), tolerance=0.01) for number in (1, 2))
POISON = b"poison"
UNAVAILABLE, INTERNAL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL


def dead(process: str) -> TritonError:
    return TritonError(INTERNAL, f"in ensemble 'defect-v2', Stub process '{process}' is not healthy.")


class Server:
    """A Triton: `do` is what happens to a call of a release; nothing, and it is answered at once.

    The step that `POISON` ends has two processes, which are asked in turns and stay dead until `heal`.
    """

    def __init__(self, **settings: Any) -> None:
        self.do: dict[str, Callable[[], Awaitable[None]]] = {}
        self.calls: Counter[str] = Counter()
        self.deaths = 0
        self.late = 0
        """So many questions are not answered in time."""
        self.index_error: TritonError | None = None
        self._alive = [True, True]
        self._turn = 0

    def heal(self) -> None:
        self._alive = [True, True]

    async def infer(self, release: str, pictures: Sequence[bytes], _: str, timeout: float) -> list[Inference]:
        self.calls[release] += 1
        if release in self.do:
            try:
                async with asyncio.timeout(timeout):
                    await self.do[release]()
            except TimeoutError:
                raise TritonError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from None
        self._turn += 1
        process = self._turn % 2
        if not self._alive[process]:
            raise dead(f"defect_preprocess_0_{process}")
        if POISON in pictures:
            await asyncio.sleep(0.01)
            self._alive[process] = False
            self.deaths += 1
            raise dead(f"defect_preprocess_0_{process}")
        await asyncio.sleep(0)
        return [GOOD for _ in pictures]

    async def instances(self, model: str, *_: object) -> int:
        return 2 if model == "defect_preprocess" else 1

    async def version(self, _: float) -> str:
        return "2.51.0"

    async def index(self, timeout: float) -> list[ModelState]:
        if self.late:
            self.late -= 1
            await asyncio.sleep(timeout)
            raise TritonError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        if self.index_error:
            raise self.index_error
        await asyncio.sleep(timeout / 2)
        return [ModelState(SOUND.name, True, "ready"), ModelState(OTHER.name, True, "ready")]

    async def config(self, name: str, _: float) -> tuple[dict[str, str], int]:
        return (SOUND if name == SOUND.name else OTHER).to_parameters(), 16

    async def close(self) -> None:
        pass


class World:
    """A dispatcher in front of these servers, which have both releases."""

    def __init__(self, *servers: Server, **settings: Any) -> None:
        self.settings = Settings(**{"outage_wait_s": 0.5, "refresh_s": 0.05, "probe_timeout_s": 0.2, **settings})
        self.servers = servers
        self.fleet = Fleet(self.settings)
        self.metrics = Metrics()
        self.dispatcher = Dispatcher(self.fleet, self.settings, self.metrics)
        for number, server in enumerate(servers):
            replica = Replica(f"127.0.0.1:{number + 1}", self.settings, self.fleet._changed)
            replica.triton = replica.releases._triton = server  # type: ignore[assignment]
            replica.releases.known = tuple(
                Known(each.name, each.number, each, "", max_batch=16) for each in (SOUND, OTHER)
            )
            replica.releases.triton_version = "2.51.0"
            replica.has_joined = True
            self.fleet.replicas.append(replica)
        self.fleet._changed()

    async def __aenter__(self) -> World:
        for replica in self.fleet.replicas:
            await replica.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.dispatcher.close()
        await self.fleet.close()

    async def ask(self, release: str, picture: bytes = b"picture", seconds: float = 20.0, client: str = "one") -> str:
        """How a request ended: answered, or the code or status that it failed with."""
        try:
            await self.dispatcher.infer(release, picture, "id", client, time.monotonic() + seconds)
        except Failure as failure:
            return failure.code
        except TritonError as error:
            return error.status.name
        return "answered"

    async def predict(self, *releases: Any, picture: bytes = b"picture") -> Answer:
        choices = [Choice(release, "stable" if not i else "fallback") for i, release in enumerate(releases)]
        return await predict(self.dispatcher, choices, picture, RequestInfo("id", "one", time.monotonic() + 20))


async def fails() -> None:
    raise dead("defect_classifier_0_0")


async def hangs() -> None:
    await asyncio.sleep(3600)


# ---- releases ----


@pytest.mark.parametrize("servers", [1, 2])
def test_a_release_whose_step_died_takes_no_other_one_with_it(servers: int) -> None:
    async def check() -> None:
        async with World(*(Server() for _ in range(servers))) as world:
            for server in world.servers:
                server.do[OTHER.name] = fails
            broken = [asyncio.create_task(world.ask(OTHER.name, seconds=2)) for _ in range(20)]
            ends = Counter([await world.ask(SOUND.name) for _ in range(300)])
            assert ends == {"answered": 300}
            # Those that were alone with a process when it died are not abandoned before their time.
            assert set(await asyncio.gather(*broken)) <= {"NOT_FOUND", "deadline_exceeded"}
            assert all(replica.is_available for replica in world.fleet.replicas)
            assert await world.ask(SOUND.name) == "answered"
            with pytest.raises(Failure, match="defect_classifier_0_0"):
                await world.fleet.require_ready(OTHER.name)

    asyncio.run(check())


def test_a_release_that_failed_is_asked_again_once_it_answers_a_golden_picture() -> None:
    async def check() -> None:
        async with World(Server(), outage_wait_s=30) as world:
            (server,) = world.servers
            server.do[OTHER.name] = fails
            item = [asyncio.create_task(world.ask(OTHER.name)) for _ in range(10)]
            await asyncio.sleep(0.3)
            assert world.fleet.is_down(OTHER.name)
            calls = server.calls[OTHER.name]
            await asyncio.sleep(0.3)
            assert server.calls[OTHER.name] - calls <= 4, "golden pictures, less and less often"
            del server.do[OTHER.name]
            assert Counter(await asyncio.gather(*item)) == {"answered": 10}

    asyncio.run(check())


def test_while_a_release_is_down_another_one_is_asked_at_once() -> None:
    async def check() -> None:
        async with World(Server(), outage_wait_s=30) as world:
            world.servers[0].do[OTHER.name] = fails
            first = asyncio.create_task(world.predict(OTHER, SOUND))  # alone with the process when it dies, so it waits
            while not world.fleet.is_down(OTHER.name):
                await asyncio.sleep(0.01)
            answers = await asyncio.gather(*(world.predict(OTHER, SOUND) for _ in range(20)))
            first.cancel()
            assert {(answer.release.name, answer.route) for answer in answers} == {(SOUND.name, "fallback")}
            assert (await world.predict(OTHER, SOUND)).passed_over is not None

    asyncio.run(check())


def test_a_failing_release_spends_no_retries_of_another_one() -> None:
    async def check() -> None:
        async with World(Server()) as world:
            (server,) = world.servers

            async def aborts() -> None:
                raise TritonError(grpc.StatusCode.ABORTED, "no")

            async def aborts_once() -> None:
                del server.do[SOUND.name]
                await aborts()

            server.do[OTHER.name] = aborts
            await asyncio.gather(*(world.ask(OTHER.name) for _ in range(200)))
            server.do[SOUND.name] = aborts_once
            crowd = await asyncio.gather(*(world.ask(SOUND.name) for _ in range(40)))
            assert crowd.count("ABORTED") <= 1, "one that was alone in its call is not sent again"

    asyncio.run(check())


def test_a_release_that_hangs_takes_no_room_of_another_one() -> None:
    async def check() -> None:
        async with World(Server(), max_waiting=20) as world:
            world.servers[0].do[OTHER.name] = hangs
            hanging = [asyncio.create_task(world.ask(OTHER.name, client="crowd")) for _ in range(100)]
            await asyncio.sleep(0.05)
            assert world.dispatcher.waiting >= 20
            ends = Counter(await asyncio.gather(*(world.ask(SOUND.name) for _ in range(20))))
            assert ends == {"answered": 20}
            for task in hanging:
                task.cancel()

    asyncio.run(check())


def test_a_release_that_hangs_with_large_pictures_makes_room_for_another_one() -> None:
    async def check() -> None:
        async with World(Server(), max_waiting_bytes=1000, group_bytes=100) as world:
            world.servers[0].do[OTHER.name] = hangs
            hanging = [asyncio.create_task(world.ask(OTHER.name, bytes(100), client=f"{i}")) for i in range(30)]
            await asyncio.sleep(0.05)
            ends = Counter(await asyncio.gather(*(world.ask(SOUND.name, bytes(50)) for _ in range(8))))
            assert ends == {"answered": 8}
            assert world.dispatcher.waiting >= 5, "no more of them had to go than there was need for"
            for task in hanging:
                task.cancel()

    asyncio.run(check())


# ---- servers ----


def test_what_is_lost_with_a_server_is_sent_again_however_much_it_is() -> None:
    async def check() -> None:
        async with World(Server(), Server(), max_waiting=1000) as world:
            lost, _ = world.servers
            is_gone = asyncio.Event()

            async def goes() -> None:
                await is_gone.wait()
                lost.index_error = TritonError(UNAVAILABLE, "failed to connect to all addresses")
                raise TritonError(UNAVAILABLE, "Socket closed")

            lost.do[SOUND.name] = goes
            queue = world.dispatcher._queues[SOUND.name] = ReleaseQueue(SOUND.name)
            limiter = queue.limiters[world.fleet.replicas[0]]
            limiter._limit, limiter._is_learning = 60.0, False  # as it is found where calls cost nothing
            asked = [asyncio.create_task(world.ask(SOUND.name)) for _ in range(600)]
            await asyncio.sleep(0.05)
            assert world.fleet.replicas[0].calls * 16 > 300
            is_gone.set()
            assert Counter(await asyncio.gather(*asked)) == {"answered": 600}
            assert [replica.is_available for replica in world.fleet.replicas] == [False, True]

    asyncio.run(check())


def test_one_late_answer_ends_no_call_and_two_send_them_elsewhere() -> None:
    async def check() -> None:
        async with World(Server(), Server()) as world:
            late, _ = world.servers
            slow = world.fleet.replicas[0]
            answered = asyncio.Event()
            late.do[SOUND.name] = answered.wait  # type: ignore[assignment]
            asked = [asyncio.create_task(world.ask(SOUND.name)) for _ in range(2)]
            await asyncio.sleep(0.02)
            assert slow.calls == 1
            late.late = 1
            while not slow.is_late:
                await asyncio.sleep(0.005)
            calls = late.calls[SOUND.name]
            assert await world.ask(SOUND.name) == await world.ask(SOUND.name) == "answered"
            assert late.calls[SOUND.name] == calls, "what is new goes to the other one"
            while slow.is_late:
                await asyncio.sleep(0.005)
            assert slow.is_available
            assert slow.calls == 1, "what it had in work goes on"
            answered.set()
            assert await asyncio.gather(*asked) == ["answered"] * 2

            late.do[SOUND.name] = hangs
            asked = [asyncio.create_task(world.ask(SOUND.name)) for _ in range(4)]
            late.late = 3
            assert await asyncio.gather(*asked) == ["answered"] * 4
            assert not slow.is_available
            late.do.clear()
            while not (slow.is_available and not slow.suspicions):
                await asyncio.sleep(0.01)

    asyncio.run(check())


@pytest.mark.parametrize(
    ("error", "is_gone"),
    [
        (dead("defect_classifier_0_0"), False),
        (TritonError(UNAVAILABLE, "in ensemble 'defect-v2', defect_classifier has no available versions"), False),
        (TritonError(grpc.StatusCode.NOT_FOUND, "unknown model defect-v2"), False),
        (TritonError(UNAVAILABLE, "Socket closed"), True),
        (TritonError(UNAVAILABLE, "recvmsg: Connection reset by peer"), True),
    ],
    ids=["a process died", "a step is not loaded", "unloaded", "closed", "reset"],
)
def test_only_what_says_that_the_server_is_gone_takes_it_out(error: TritonError, is_gone: bool) -> None:
    async def check() -> None:
        async with World(Server()) as world:
            (server,) = world.servers
            (replica,) = world.fleet.replicas

            async def once() -> None:
                server.do[OTHER.name] = hangs
                if is_gone:
                    server.index_error = TritonError(UNAVAILABLE, "failed to connect to all addresses")
                raise error

            server.do[OTHER.name] = once
            asked = asyncio.create_task(world.ask(OTHER.name))
            while server.do[OTHER.name] is once:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            assert replica.is_available is not is_gone
            assert OTHER.name in replica.suspicions or error.dead_process, "it may have another process"
            assert (SOUND.name in replica.suspicions) is is_gone
            asked.cancel()

    asyncio.run(check())


# ---- pictures ----


def test_a_picture_that_ends_processes_is_refused_after_the_second_and_remembered() -> None:
    async def check() -> None:
        async with World(*(Server() for _ in range(3))) as world:
            with pytest.raises(Failure) as refused:
                await world.predict(OTHER, SOUND, picture=POISON)
            assert refused.value.code == "image_crashes_server"
            assert sum(server.deaths for server in world.servers) == 2
            assert all(server.calls[SOUND.name] == 0 for server in world.servers), "another release is not tried"
            for server in world.servers:
                server.heal()
            for release in (OTHER, SOUND):  # they share the step whose process it ended
                assert await world.ask(release.name, POISON) == "image_crashes_server"
            assert sum(server.deaths for server in world.servers) == 2
            assert await world.ask(OTHER.name) == "answered"

    asyncio.run(check())


def test_a_picture_that_ends_processes_is_known_again_by_who_asks_next() -> None:
    """Whether its first client left before there was a verdict, or before the death was known."""

    async def check(is_known: bool) -> None:
        async with World(*(Server() for _ in range(3))) as world:
            first = asyncio.create_task(world.ask(OTHER.name, POISON))
            while not any(server.deaths if is_known else server.calls[OTHER.name] for server in world.servers):
                await asyncio.sleep(0)
            first.cancel()
            await asyncio.sleep(0.05)
            for server in world.servers:
                server._alive = [not server.calls[OTHER.name]] * 2  # so that its death is met with
            for _ in range(6):
                await world.ask(OTHER.name)
            before = sum(server.deaths for server in world.servers)
            assert await world.ask(OTHER.name, POISON) == "image_crashes_server"
            assert sum(server.deaths for server in world.servers) == before + 1

    asyncio.run(check(True))
    asyncio.run(check(False))


def test_a_suspect_is_sent_to_no_other_release_while_it_waits() -> None:
    async def check() -> None:
        async with World(Server(), outage_wait_s=0.1) as world:
            (server,) = world.servers
            server.do[OTHER.name] = fails  # what it is sent to after the first death

            async def ends_one() -> None:
                server.do[OTHER.name] = fails
                raise dead("defect_preprocess_0_0")

            server.do[OTHER.name] = ends_one
            asked = asyncio.create_task(world.predict(OTHER, SOUND))
            await asyncio.sleep(1.0)
            assert not asked.done()
            del server.do[OTHER.name]
            assert (await asked).release == OTHER

    asyncio.run(check())


def test_copies_of_a_picture_that_ends_processes_are_refused_with_the_first_of_them() -> None:
    async def check() -> None:
        async with World(*(Server() for _ in range(3)), group=1, outage_wait_s=30) as world:
            asked = [asyncio.create_task(world.ask(OTHER.name, POISON)) for _ in range(40)]
            while not all(task.done() for task in asked):
                await asyncio.sleep(1.2)  # as long as nothing comes back in less
                for server in world.servers:
                    server.heal()
            assert Counter(task.result() for task in asked) == {"image_crashes_server": 40}
            assert sum(server.deaths for server in world.servers) <= 7, "those on their way at once, and one more"

    asyncio.run(check())


def test_a_picture_that_ends_processes_costs_nobody_else_an_answer() -> None:
    async def check() -> None:
        async with World(Server(), outage_wait_s=30) as world:
            (server,) = world.servers
            await asyncio.gather(*(world.ask(OTHER.name) for _ in range(40)))  # from now on they share calls
            asked = [asyncio.create_task(world.ask(OTHER.name, POISON if i == 17 else b"%d" % i)) for i in range(60)]
            while not all(task.done() for task in asked):
                await asyncio.sleep(0.5)
                server.heal()
            assert Counter(task.result() for task in asked) == {"answered": 59, "image_crashes_server": 1}
            assert server.deaths == 2

    asyncio.run(check())


def test_a_picture_that_only_finds_processes_dead_is_never_blamed() -> None:
    async def check() -> None:
        async with World(Server(), outage_wait_s=30) as world:
            (server,) = world.servers
            for alive in ([False, True], [True, False], [False, False]) * 2:
                server._alive = list(alive)
                asked = [asyncio.create_task(world.ask(OTHER.name, b"%d" % i)) for i in range(12)]
                await asyncio.sleep(0.3)
                server.heal()
                assert Counter(await asyncio.gather(*asked)) == {"answered": 12}

    asyncio.run(check())


class Scripted(Server):
    """What happens to calls of one picture each, by the picture; nothing, and it is answered at once."""

    def __init__(self, **steps: list[Callable[[], Awaitable[None]]]) -> None:
        super().__init__()
        self.steps = {picture.encode(): iter(what) for picture, what in steps.items()}

    async def infer(self, release: str, pictures: Sequence[bytes], ids: str, timeout: float) -> list[Inference]:
        for picture in pictures:
            if step := next(self.steps.get(picture, iter(())), None):
                await step()
        return await super().infer(release, pictures, ids, timeout)


async def finds_a_dead_process() -> None:
    raise dead("defect_preprocess_0_0")


def test_a_suspect_is_not_guilty_of_a_death_that_another_call_met_with_during_its_trial() -> None:
    """Others are at work while it is tried, so a golden picture may have missed the process that is dead."""

    async def check() -> None:
        async def goes_to_the_dead_one_after_another_call() -> None:
            other = asyncio.create_task(world.ask(OTHER.name, b"other"))
            await asyncio.sleep(0.1)
            others.append(other)
            await finds_a_dead_process()

        others: list[asyncio.Task[str]] = []
        trial = goes_to_the_dead_one_after_another_call
        server = Scripted(innocent=[finds_a_dead_process, trial], other=[finds_a_dead_process])
        async with World(server) as world:
            assert await world.ask(OTHER.name, b"innocent") == "answered"
            assert await others[0] == "answered"

    asyncio.run(check())


def test_a_suspect_whose_trial_took_too_long_is_not_guilty_of_what_died_later() -> None:
    async def check() -> None:
        async def hangs_for_a_while() -> None:
            hanging.set()
            await asyncio.sleep(0.5)

        hanging = asyncio.Event()
        server = Scripted(innocent=[finds_a_dead_process, hangs_for_a_while], other=[finds_a_dead_process])
        async with World(server) as world:
            asked = asyncio.create_task(world.ask(OTHER.name, b"innocent"))
            await hanging.wait()
            asked.cancel()
            assert await world.ask(OTHER.name, b"other") == "answered"
            assert await world.ask(OTHER.name, b"innocent") == "answered"

    asyncio.run(check())


def test_a_picture_that_ends_processes_costs_no_more_of_them_where_its_clients_are_in_a_hurry() -> None:
    async def check() -> None:
        async with World(Server()) as world:
            (server,) = world.servers
            ends: list[str] = []
            while "image_crashes_server" not in ends and len(ends) < 100:
                ends.append(await world.ask(OTHER.name, POISON, seconds=0.005 if server.deaths else 1))
                server.heal()
                await asyncio.sleep(0.1)
            assert server.deaths == 2

    asyncio.run(check())


# ---- background tasks ----


def test_a_background_task_goes_on_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_FIRST_PAUSE_S", 0.001)
    rounds = []

    async def work() -> bool:
        rounds.append(1)
        if len(rounds) % 2:
            raise ZeroDivisionError
        return len(rounds) == 6

    async def check() -> None:
        before = supervision.failures["a test"]
        tasks = Tasks()
        tasks.repeat("a test", work)
        async with asyncio.timeout(10):
            while len(rounds) < 6:
                await asyncio.sleep(0.001)
        await tasks.close()
        assert supervision.failures["a test"] - before == 3

    asyncio.run(check())


def test_a_listener_that_fails_ends_neither_the_others_nor_who_noticed() -> None:
    async def check() -> None:
        async with World(Server()) as world:
            told: list[int] = []

            def fails() -> None:
                raise ZeroDivisionError

            world.fleet._listeners.insert(0, fails)
            world.fleet.on_change(lambda: told.append(1))
            before = supervision.failures["tell of a change"]
            async with asyncio.timeout(10):
                while len(told) < 5:  # it is followed all the same
                    await asyncio.sleep(0.01)
            assert supervision.failures["tell of a change"] - before >= 5
            assert await world.ask(SOUND.name) == "answered"

    asyncio.run(check())


def test_a_replica_is_followed_though_looking_at_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with World(Server()) as world:
            (server,) = world.servers
            looked: list[int] = []
            index = server.index

            async def fails(timeout: float) -> list[ModelState]:
                looked.append(1)
                if len(looked) < 3:
                    raise ZeroDivisionError
                return await index(timeout)

            monkeypatch.setattr(server, "index", fails)
            async with asyncio.timeout(10):
                while len(looked) < 5:
                    await asyncio.sleep(0.01)
            assert await world.ask(SOUND.name) == "answered"

    asyncio.run(check())
