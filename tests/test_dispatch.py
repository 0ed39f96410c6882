"""Requests that wait share calls of a real Triton, in a fair order, and what is abandoned costs it nothing."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest

from gateway.dispatch.dispatcher import Dispatcher
from gateway.dispatch.fair_queue import FairQueue
from gateway.dispatch.release_queue import ReleaseQueue
from gateway.dispatch.work import Call, PendingItem, TimedInference
from gateway.metrics import Metrics
from gateway.problems import Failure
from gateway.settings import Settings
from gateway.triton.client import Inference, TritonError, encode, pb
from gateway.triton.fleet import Fleet, Replica
from tests.conftest import http
from tests.test_preprocessing import bad_pictures
from triton_runtime.server import Endpoint

RELEASE = "defect-v1"


class Lab:
    """Fleet and dispatcher as the gateway has them, without HTTP in front."""

    def __init__(self, triton: Endpoint, **settings: Any) -> None:
        self.settings = Settings(triton_urls=(triton.grpc_url,), **settings)
        self.metrics = Metrics()
        self.triton = triton
        self.fleet = Fleet(self.settings)
        self.dispatcher = Dispatcher(self.fleet, self.settings, self.metrics)

    async def ask(self, picture: bytes, client: str = "one", within: float = 60.0) -> Inference:
        ran = await self.dispatcher.infer(RELEASE, picture, "request", client, time.monotonic() + within)
        assert isinstance(ran, TimedInference)
        return ran.inference

    def sizes(self) -> tuple[int, int]:
        """Calls made, and pictures in them."""
        lines = dict(line.split() for line in self.metrics.page().decode().splitlines() if line[0] != "#")
        return int(float(lines["gateway_call_pictures_count"])), int(float(lines["gateway_call_pictures_sum"]))

    async def rest(self) -> None:
        """Wait until nothing waits and nothing is on its way, as must be soon after the last request ended."""
        async with asyncio.timeout(5):
            while self.dispatcher.waiting or any(self.dispatcher.calls().values()):
                await asyncio.sleep(0.01)
        assert [replica.calls for replica in self.fleet.replicas] == [0]


def inferred(triton: Endpoint, step: str) -> int:
    """Pictures that a step of this Triton worked on, by its own statistics."""
    stats = http.get(f"http://127.0.0.1:{triton.http}/v2/models/defect_{step}/versions/1/stats").json()
    return int(stats["model_stats"][0]["inference_count"])


@pytest.fixture
def lab(triton: Endpoint) -> Callable[..., None]:
    """Run a coroutine with a lab of these settings; afterwards nothing is left over."""

    def run(work: Callable[[Lab], Coroutine[Any, Any, None]], **settings: Any) -> None:
        async def main() -> None:
            lab = Lab(triton, **settings)
            await lab.fleet.start()
            try:
                async with asyncio.timeout(20):
                    while not lab.fleet.replicas[0].serves(RELEASE):
                        await asyncio.sleep(0.05)
                await work(lab)
                await lab.rest()
            finally:
                await lab.dispatcher.close()
                await lab.fleet.close()

        asyncio.run(main())

    return run


async def outcome(answer: Awaitable[Inference]) -> Inference | str:
    try:
        return await answer
    except Failure as failure:
        return failure.code


def test_each_picture_in_a_crowd_gets_its_own_answer(lab: Callable[..., None], photographs: list[Path]) -> None:
    good = [path.read_bytes() for path in photographs[:24]]
    bad = [data for _, data in bad_pictures().values() if data][:8]
    pictures = [*good, *bad] * 2
    random.Random(3).shuffle(pictures)

    async def work(lab: Lab) -> None:
        alone = {picture: await lab.ask(picture) for picture in dict.fromkeys(pictures)}
        calls, asked = lab.sizes()
        assert calls == asked == len(alone)
        together = await asyncio.gather(*(lab.ask(picture) for picture in pictures))
        calls, asked = lab.sizes()
        assert asked == len(alone) + len(pictures)
        assert calls - len(alone) <= len(pictures) / 2
        for picture, inference in zip(pictures, together, strict=True):
            expected = alone[picture]
            assert inference.error == expected.error
            if not expected.error:
                assert inference.label == expected.label
                assert inference.confidence == pytest.approx(expected.confidence, abs=1e-4)
        assert sum(bool(inference.error) for inference in together) == 2 * len(bad)

    lab(work)


def test_a_group_that_fails_is_split(lab: Callable[..., None], jpeg: bytes) -> None:
    async def work(lab: Lab) -> None:
        (known,) = [each for each in lab.fleet.replicas[0].releases.known if each.name == RELEASE]
        known.max_batch = 64  # Triton takes 16: it refuses the call
        answers = await asyncio.gather(*(lab.ask(jpeg) for _ in range(48)))
        assert all(not answer.error for answer in answers)
        assert "gateway_retries_total 0.0" not in lab.metrics.page().decode()

    lab(work, group=64)


@pytest.mark.parametrize("sizes", [(0,), (1,), (123,), (124,), (16379,), (16380,), (3_200_000,), (0, 5, 40_000, 300)])
def test_a_request_made_by_hand_is_what_protobuf_makes(sizes: tuple[int, ...]) -> None:
    pictures = [random.randbytes(size) for size in sizes]
    request = pb.ModelInferRequest(model_name=RELEASE, id="one,two")
    request.inputs.add(name="IMAGE", datatype="BYTES", shape=[len(pictures), 1])
    request.raw_input_contents.append(b"".join(struct.pack("<I", len(picture)) + picture for picture in pictures))
    assert encode(RELEASE, pictures, "one,two") == request.SerializeToString()


@pytest.mark.parametrize(
    ("settings", "max_batch", "most"),
    [({"group": 1}, 8, 1), ({"group": 3}, 8, 3), ({}, 1, 1), ({"group_bytes": 1}, 8, 1)],
    ids=["never", "three", "a model without batches", "large pictures"],
)
def test_groups_have_bounds(
    lab: Callable[..., None], jpeg: bytes, settings: dict[str, int], max_batch: int, most: int
) -> None:
    async def work(lab: Lab) -> None:
        (known,) = [each for each in lab.fleet.replicas[0].releases.known if each.name == RELEASE]
        known.max_batch = max_batch
        await asyncio.gather(*(lab.ask(jpeg) for _ in range(18)))
        assert lab.sizes()[0] >= 18 / most
        buckets = dict(line.split() for line in lab.metrics.page().decode().splitlines() if "pictures_bucket" in line)
        assert (
            buckets[f'gateway_call_pictures_bucket{{le="{most}.0"}}']
            == buckets['gateway_call_pictures_bucket{le="+Inf"}']
        )

    lab(work, **settings)


def test_clients_that_ask_again_at_once_share_calls(lab: Callable[..., None], jpeg: bytes) -> None:
    """They come back one by one; a call each would cost several times what their pictures do."""

    async def work(lab: Lab) -> None:
        async def client(name: str) -> None:
            for _ in range(12):
                await lab.ask(jpeg, name)

        await asyncio.gather(*(client(f"{i}") for i in range(12)))
        calls, pictures = lab.sizes()
        assert pictures >= 2 * calls

    lab(work)


def test_a_flood_of_one_client_leaves_the_others_their_share(lab: Callable[..., None], jpeg: bytes) -> None:
    async def work(lab: Lab) -> None:
        flood = [asyncio.create_task(outcome(lab.ask(jpeg, "flood"))) for _ in range(150)]
        await asyncio.sleep(0.05)
        few = await asyncio.gather(*(lab.ask(jpeg, "few") for _ in range(10)))
        assert len(few) == 10  # there was no room for them: the flood made it
        done = [task.result() for task in flood if task.done()]
        assert sum(isinstance(result, Inference) for result in done) < 75
        assert done.count("overloaded") > 150 - 100 - 20
        await asyncio.gather(*flood)

    lab(work, max_waiting=100)


def test_a_full_room_refuses_at_once(lab: Callable[..., None], jpeg: bytes) -> None:
    async def work(lab: Lab) -> None:
        async def timed() -> tuple[Inference | str, float]:
            started = time.monotonic()
            return await outcome(lab.ask(jpeg)), time.monotonic() - started

        results = await asyncio.gather(*(timed() for _ in range(60)))
        refused = [seconds for result, seconds in results if result == "overloaded"]
        answered = [seconds for result, seconds in results if isinstance(result, Inference)]
        assert len(refused) + len(answered) == 60
        assert 5 <= len(answered) <= 20
        assert max(refused) < min(answered)

    lab(work, max_waiting=5)
    lab(work, max_waiting_bytes=5 * len(jpeg))


def test_what_is_abandoned_while_it_waits_costs_nothing(lab: Callable[..., None], jpeg: bytes) -> None:
    async def work(lab: Lab) -> None:
        before = inferred(lab.triton, "classifier")
        tasks = [asyncio.create_task(lab.ask(jpeg)) for _ in range(120)]
        await asyncio.sleep(0.03)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await lab.rest()
        assert inferred(lab.triton, "classifier") - before <= 20

    lab(work)


def test_whenever_requests_are_abandoned_nothing_is_left_over(lab: Callable[..., None], jpeg: bytes) -> None:
    async def work(lab: Lab) -> None:
        chance = random.Random(5)

        async def leave_early() -> None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(lab.ask(jpeg), chance.choice([0.0, 0.001, 0.02, 0.1, 30]))

        for _ in range(6):
            await asyncio.gather(*(leave_early() for _ in range(30)))
            await lab.rest()
        assert not (await lab.ask(jpeg)).error

    lab(work)


@pytest.mark.parametrize(
    ("settings", "within", "stay", "ends"),
    [
        ({}, 60, 60, ["answered"]),
        ({"max_waiting": 5}, 60, 60, ["answered", "overloaded"]),
        ({}, 0.05, 60, ["deadline_exceeded"]),
        ({}, 60, 0.05, ["abandoned"]),
    ],
    ids=["answered", "refused", "late", "abandoned"],
)
@pytest.mark.usefixtures("without_collector")
def test_a_picture_is_let_go_of_with_its_request(
    lab: Callable[..., None], jpeg: bytes, settings: dict[str, int], within: float, stay: float, ends: list[str]
) -> None:
    """At once, and not when Python looks for reference cycles: that takes hundreds of requests, of megabytes each."""

    async def work(lab: Lab) -> None:
        async def ask() -> str:
            task = asyncio.create_task(outcome(lab.ask(jpeg, within=within)))
            await asyncio.wait({task}, timeout=stay)
            if task.cancel():
                return "abandoned"
            answer = task.result()
            return answer if isinstance(answer, str) else "answered"

        before = sys.getrefcount(jpeg)
        seen = set(await asyncio.gather(*(ask() for _ in range(60))))
        await lab.rest()
        await asyncio.sleep(0)
        assert seen.issuperset(ends)
        assert sys.getrefcount(jpeg) == before

    lab(work, **settings)


def test_a_deadline_ends_the_work_in_triton_too(lab: Callable[..., None], jpeg: bytes) -> None:
    async def work(lab: Lab) -> None:
        await asyncio.gather(*(lab.ask(jpeg) for _ in range(16)))  # how long it takes is known now
        before = inferred(lab.triton, "classifier")

        async def timed() -> tuple[Inference | str, float]:
            started = time.monotonic()
            return await outcome(lab.ask(jpeg, within=0.3)), time.monotonic() - started

        results = await asyncio.gather(*(timed() for _ in range(200)))
        await lab.rest()
        answered = [seconds for result, seconds in results if isinstance(result, Inference)]
        refused = [seconds for result, seconds in results if result == "overloaded"]
        late = [seconds for result, seconds in results if result == "deadline_exceeded"]
        assert len(answered) + len(refused) + len(late) == 200
        assert all(seconds <= 0.3 for seconds in answered)
        assert sorted(refused)[len(refused) // 2] < 0.1
        assert len(refused) > 100
        assert inferred(lab.triton, "classifier") - before <= len(answered) + len(late)
        with pytest.raises(Failure, match="deadline_exceeded"):
            await lab.ask(jpeg, within=-1)

    lab(work)


def test_an_unknown_release_is_refused(lab: Callable[..., None], jpeg: bytes) -> None:
    async def work(lab: Lab) -> None:
        with pytest.raises(TritonError, match="NOT_FOUND"):
            await lab.dispatcher.infer("defect-v9", jpeg, "request", "one", time.monotonic() + 5)

    lab(work)


@pytest.mark.parametrize(
    ("status", "detail", "is_of_the_server"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Server is stopping, scheduler for model has stopped accepting", True),
        (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size", False),
        (grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'defect-v1' is not found", True),
        (grpc.StatusCode.INTERNAL, "Stub process 'defect_classifier_0_0' is not healthy.", True),
        (grpc.StatusCode.INTERNAL, "onnxruntime: the shape is wrong", False),
        # Seen when a process that was abandoned had been stopped in the middle of its answer, and went on.
        (
            grpc.StatusCode.INVALID_ARGUMENT,
            "in ensemble 'defect-v1', expected 4 inputs but got 3 inputs for model 'defect_postprocess'. Got input(s) "
            "['PROBABILITIES','ERROR','TIMES'], but missing required input(s) ['DIGEST'].",
            True,
        ),
        (grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape for input 'IMAGE'", False),
    ],
)
def test_what_failed_because_of_the_server_is_told_from_the_rest(
    status: grpc.StatusCode, detail: str, is_of_the_server: bool
) -> None:
    assert TritonError(status, detail).is_of_the_server is is_of_the_server


# ---- the crowd ----


class Crowd:
    """A queue that may have two calls at once, and those who ask it, one after the other."""

    def __init__(self) -> None:
        self.queue = ReleaseQueue(RELEASE)
        self.replicas: list[Replica] = [object()]  # type: ignore[list-item]

    def come(self, many: int) -> None:
        for item in fair_queue(*[("a", 1)] * many).everyone():
            self.queue.join(item)

    def send(self) -> Call:
        """As many as a call should have."""
        call = Call(self.replicas[0], self.queue.pending.take(self.queue.share(self.replicas), 99), had_to_wait=True)
        self.queue.begin(call)
        return call


def test_who_was_answered_is_expected_back() -> None:
    crowd = Crowd()
    crowd.come(15)
    first, second = crowd.send(), crowd.send()
    assert (len(first.group), len(second.group), crowd.queue.expected_soon()) == (8, 7, 0)
    crowd.queue.end(first)
    crowd.come(7)
    assert (len(crowd.queue.pending), crowd.queue.expected_soon()) == (7, 8)  # one is missing still
    crowd.come(1)
    third = crowd.send()
    crowd.queue.end(second)
    crowd.come(7)
    assert (len(third.group), crowd.queue.expected_soon(), len(crowd.queue.pending)) == (8, 7, 7)  # nobody is


def test_who_does_not_come_back_is_soon_forgotten() -> None:
    crowd = Crowd()
    crowd.come(64)
    first, second = crowd.send(), crowd.send()
    for _ in range(20):
        crowd.queue.end(first)
        crowd.come(4)
        first, second = second, crowd.send()
    assert len(second.group) == 4
    assert crowd.queue.expected_soon() == 0


def test_after_a_pause_nobody_is_expected() -> None:
    crowd = Crowd()
    crowd.come(64)
    for call in (crowd.send(), crowd.send()):
        crowd.queue.end(call)
    crowd.come(1)
    assert (crowd.queue.expected_soon(), crowd.queue.share(crowd.replicas)) == (1, 1)


# ---- the fair queue ----


def fair_queue(*item: tuple[str, int]) -> FairQueue:
    made = FairQueue()
    for client, size in item:
        made.add(PendingItem(bytes(size), f"{client}{size}", client, 0.0, answer=None))  # type: ignore[arg-type]
    return made


def names(group: list[PendingItem]) -> list[str]:
    return [item.request_id for item in group]


def test_clients_take_turns() -> None:
    item = fair_queue(("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2), ("c", 1))
    assert names(item.take(4, 99)) == ["a1", "b1", "c1", "a2"]
    assert names(item.take(4, 99)) == ["b2", "a3"]
    assert len(item) == item.bytes == 0


def test_who_does_not_fit_into_a_group_begins_the_next() -> None:
    item = fair_queue(("b", 1), ("a", 50), ("c", 1), ("b", 2), ("c", 2), ("b", 3), ("c", 3))
    assert names(item.take(2, 9)) == ["b1", "c1"]
    assert names(item.take(2, 9)) == ["a50"]
    assert names(item.take(9, 9)) == ["b2", "c2", "b3"]
    assert names(item.take(9, 9)) == ["c3"]


def test_how_many_fit_into_a_call_is_told_from_their_mean_size() -> None:
    assert fair_queue(("a", 2), ("a", 4), ("b", 6)).fitting(9) == 2
    assert fair_queue(("a", 10)).fitting(9) == 1
    assert fair_queue(("a", 0)).fitting(9) == 9


def test_what_is_put_back_is_next_and_alone_where_it_must() -> None:
    item = fair_queue(("a", 1), ("b", 2), ("b", 3))
    first, second = item.take(2, 99)
    second.is_alone = True
    item.put_back(second)
    item.put_back(first)
    assert (len(item), item.bytes) == (3, 6)
    assert names(item.take(9, 99)) == ["b2"]
    assert names(item.take(9, 99)) == ["a1", "b3"]


def test_what_leaves_is_forgotten_wherever_it_waits() -> None:
    item = fair_queue(("a", 1), ("b", 2), ("b", 3))
    (first,) = item.take(1, 99)
    item.put_back(first)
    for each in item.everyone():
        item.remove(each)
        item.remove(each)
    assert (len(item), item.bytes, item.clients) == (0, 0, 0)


def test_the_room_is_made_by_who_has_the_most_of_it() -> None:
    item = fair_queue(("a", 1), ("a", 2), ("a", 3), ("b", 4))
    last = item.eviction_candidate("c")
    assert last is not None
    assert last.request_id == "a3"
    assert item.eviction_candidate("b") is not None
    assert item.eviction_candidate("a") is None
    assert item.eviction_candidate("b", coming=1) is None, "with it, nobody has more than one more than b"
    assert fair_queue(("a", 1), ("a", 2)).eviction_candidate("c", coming=1) is None
    assert fair_queue(("a", 1), ("a", 2), ("a", 3)).eviction_candidate("c", coming=1) is not None


def test_who_gives_less_time_than_any_answer_takes_is_told_so_at_once(lab: Callable[..., None], jpeg: bytes) -> None:
    async def work(lab: Lab) -> None:
        for _ in range(5):
            await lab.ask(jpeg)
        outcomes = [await outcome(lab.ask(jpeg, within=0.001)) for _ in range(20)]
        assert set(outcomes) <= {"overloaded", "deadline_exceeded"}
        assert outcomes.count("overloaded") > 10
        queue = lab.dispatcher._queues[RELEASE]
        queue._quickest_s, queue._tried_at = 60.0, 0.0  # as if the first call of all had been slow
        assert not isinstance(await outcome(lab.ask(jpeg)), str), "one finds out"
        assert not isinstance(await outcome(lab.ask(jpeg)), str), "and the others profit"

    lab(work)
