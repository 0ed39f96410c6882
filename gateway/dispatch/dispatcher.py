"""From requests to calls: who waits, who goes together, to which Triton, and what happens when a call fails.

Each release has a queue, a limit on its length and a retry budget of its own: a release that hangs or fails delays
only its own clients. Each replica gets as many concurrent calls as its limiter allows. While there is room, a request
is sent at once. The others wait here, where an abandoned request costs nothing, and those that wait together share a
call: Triton and gRPC cost time per call, not per picture. A request that would be answered too late is refused on
arrival.

Inference has no side effects, so a failed call is retried within its deadline: a few times, and free, if the server
failed; within the retry budget if a group failed; a suspect until its trial decides.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from functools import partial

import grpc

from contract import Manifest
from gateway.dispatch.release_queue import RETRIES_SAVED, ReleaseQueue
from gateway.dispatch.suspects import GUILTY, SUSPECT, AbandonedCalls, Record, Records, digest_of
from gateway.dispatch.work import Call, PendingItem, TimedInference
from gateway.metrics import Metrics
from gateway.problems import Failure
from gateway.settings import Settings
from gateway.supervision import failed
from gateway.triton.client import MalformedAnswer, TritonError
from gateway.triton.deaths import step_of, steps_of
from gateway.triton.fleet import Fleet, Replica

_ATTEMPTS = 4
_TRIAL_S, _PUT_OFF_S = 1.0, 0.2
"""Timeout of a golden picture before a trial, and the pause before the next trial if it was not answered."""
_VERDICT_S = 5.0
"""Shortest timeout of a trial, whatever its request's deadline: without a verdict the picture could end one process
after another."""
_ATTEMPTS_AT_PROCESSES = 16
"""While one of a step's two processes is dead, every other call may meet it."""
_RETRIES_EARNED = 0.1
"""Retries that each answer earns: a failing server must not be buried under them."""
_PATIENCE = 0.1
"""Hold a partial batch for up to this fraction of the mean call time, while Triton has other calls to work on: clients
that were answered together ask again one by one, and each would get a call of its own."""
_CAUTION = 1.5
"""Safety factor on the predicted latency at admission: half of the answers take longer than predicted."""


logger = logging.getLogger("gateway.dispatch")


class Dispatcher:
    """The queues of all releases, and the limits that they share. Made inside a running event loop."""

    def __init__(self, fleet: Fleet, settings: Settings, metrics: Metrics) -> None:
        self._fleet = fleet
        self._settings = settings
        self._metrics = metrics
        self._queues: dict[str, ReleaseQueue] = {}
        self._records = Records()
        self._abandoned = AbandonedCalls()
        fleet.on_change(self._changed)

    @property
    def waiting(self) -> int:
        """Pictures that wait for a call."""
        return sum(len(queue.pending) for queue in self._queues.values())

    def calls(self) -> dict[str, int]:
        """Calls on their way, by release."""
        return {name: len(queue.calls) for name, queue in self._queues.items()}

    def limits(self) -> dict[str, int]:
        """Calls at once that are allowed, by release, over all replicas."""
        there = self._fleet.available()
        return {name: sum(queue.limiters[each].limit for each in there) for name, queue in self._queues.items()}

    def require_room(self, release: str, client: str, deadline: float) -> None:
        """Refuse a request that would wait too long, or with too many others.

        Raises:
            Failure: overloaded, deadline_exceeded.
        """
        left = deadline - time.monotonic()
        if left <= 0:
            raise _over()
        queue = self._queues.get(release)
        if queue is None:
            return
        if queue.is_hopeless(left):
            raise _too_late(queue.call_s, left)
        if not queue.pending:
            return
        expected = queue.expected(client, self._fleet.available()) * _CAUTION
        if self._is_full(queue, 1) and queue.pending.eviction_candidate(client, coming=1) is None:
            raise Failure("overloaded", f"the queue of {release} is full", retry_after=expected)
        if expected > left:
            raise _too_late(expected, left)

    def _is_full(self, queue: ReleaseQueue, more: int = 0) -> bool:
        """Whether a release is over its own count, or all are over the bytes and it holds the most of them."""
        if len(queue.pending) + more > self._settings.max_waiting:
            return True
        return self._are_too_large() and queue is self._largest()

    def _largest(self) -> ReleaseQueue:
        return max(self._queues.values(), key=lambda each: each.pending.bytes)

    def _are_too_large(self) -> bool:
        return sum(queue.pending.bytes for queue in self._queues.values()) > self._settings.max_waiting_bytes

    def _make_room(self, queue: ReleaseQueue, client: str) -> None:
        """Let others go where one came for whom there is no room: of another release, or of another client."""
        if not queue.pending:
            return
        while self._are_too_large():
            largest = self._largest()
            if largest is queue or (other := largest.pending.last()) is None:
                break
            largest.pending.remove(other)
            _fail(other, Failure("overloaded", "another release needed room", retry_after=largest.call_s))
        while self._is_full(queue) and (other := queue.pending.eviction_candidate(client)):
            queue.pending.remove(other)
            _fail(other, Failure("overloaded", "another client needed room", retry_after=queue.call_s))

    async def infer(
        self,
        release: str,
        picture: bytes,
        request_id: str,
        client: str,
        deadline: float,
        has_other: bool = False,
    ) -> TimedInference:
        """Run one picture through a release, together with others where they wait together.

        `has_other`: the caller would ask another release, so this one is not waited for while it is down.

        Cancelled, or at the deadline, it is abandoned: it leaves the queue, or its call, which is cancelled with the
        last of its pictures.

        Raises:
            TritonError: no replica could do it.
            MalformedAnswer: the outputs are not those of a release.
            Failure: overloaded, deadline_exceeded, image_crashes_server.
        """
        self._fleet.replicas_for(release)  # refuses at once what would only wait for a server that is gone
        record = self._records.of(picture)
        if self._is_forbidden(release, record):
            raise _known_poison(release)
        self.require_room(release, client, deadline)
        queue = self._queues.setdefault(release, ReleaseQueue(release))
        item = PendingItem(picture, request_id, client, deadline, has_other=has_other, record=record)
        queue.join(item)
        self._dispatch_ready(queue)
        self._make_room(queue, client)
        alarm = asyncio.get_running_loop().call_later(deadline - time.monotonic(), _expire, item)
        try:
            ran = await item.answer
        except BaseException:
            if item.call is None:
                queue.pending.remove(item)
            else:
                _abandon(item.call)
            raise
        finally:
            alarm.cancel()
            # Else there are reference cycles, which keep the picture in memory: a call has its group, and an error the
            # variables of where it was raised.
            item.call = None
            del item
        if time.monotonic() > deadline:  # it came while the process was busy, and before its alarm
            raise _over()
        return ran

    def forget(self, release: str) -> None:
        """What was learnt of a release that is gone."""
        if (queue := self._queues.get(release)) and not queue.calls and not queue.pending:
            del self._queues[release]

    async def close(self) -> None:
        """Cancel all calls."""
        tasks = [call.task for queue in self._queues.values() for call in queue.calls if call.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _dispatch_ready(self, queue: ReleaseQueue, is_overdue: bool = False) -> None:
        """Send what can be sent; `is_overdue`: its first call has waited for more pictures long enough."""
        if is_overdue:
            queue.alarm = None
        if not queue.pending:
            return
        try:
            replicas = self._fleet.replicas_for(queue.release)
        except TritonError as error:
            self._turn_away(queue, error)
            return
        if not replicas and self._fleet.is_down(queue.release):
            down = TritonError(grpc.StatusCode.NOT_FOUND, self._fleet.suspicions(queue.release))
            self._turn_away(queue, down, only=lambda item: item.has_other)
        while queue.pending:
            free = [replica for replica in replicas if queue.room(replica) > 0]
            if not free:
                return
            replica = min(free, key=lambda each: (each.is_deprioritised(queue.release), each.calls, each.called_at))
            if not queue.trials and (suspect := queue.pending.take_suspect()):
                self._send(queue, replica, [suspect], had_to_wait=False)
                continue
            if not queue.pending.has_unsuspected:
                return
            fitting = queue.pending.fitting(self._settings.group_bytes)
            most = min(self._settings.group, replica.max_batch(queue.release), fitting)
            most = queue.limiters[replica].size(queue.share(replicas), most)
            # While the replica has one free slot left, the call that takes it may wait for more pictures.
            if len(queue.pending) < min(most, queue.expected_soon()) and queue.room(replica) == 1 and not is_overdue:
                if queue.alarm is None:
                    wait = _PATIENCE * queue.call_s
                    queue.alarm = asyncio.get_running_loop().call_later(wait, self._dispatch_ready, queue, True)
                return
            if queue.alarm is not None:
                queue.alarm.cancel()
            queue.alarm, is_overdue = None, False
            group = queue.pending.take(most, self._settings.group_bytes)
            self._send(queue, replica, group, had_to_wait=len(group) > 1 or bool(queue.pending))

    def _is_forbidden(self, release: str, record: Record) -> bool:
        manifest = self._fleet.manifest(release) if record.ended else None
        return manifest is not None and record.forbids(manifest)

    def _turn_away(
        self, queue: ReleaseQueue, error: TritonError, only: Callable[[PendingItem], bool] = lambda _: True
    ) -> None:
        for item in filter(only, queue.pending.everyone()):
            if not item.was_alone:  # else it may not go to another release, so it waits
                queue.pending.remove(item)
                _fail(item, error)

    def _send(self, queue: ReleaseQueue, replica: Replica, group: list[PendingItem], *, had_to_wait: bool) -> None:
        group = self._worth_sending(queue, group)
        if not group:
            return
        call = Call(replica, group, had_to_wait, is_trial=group[0].record.is_suspect)
        for item in group:
            item.call = call
        queue.begin(call)
        replica.calls, replica.called_at = replica.calls + 1, call.sent
        self._metrics.called(len(group))
        call.task = asyncio.create_task(self._run(queue, call))
        # No `finally` in the task: one that is cancelled before it begins would never come to it.
        call.task.add_done_callback(partial(self._ended, queue, call))

    def _worth_sending(self, queue: ReleaseQueue, group: list[PendingItem]) -> list[PendingItem]:
        """Those who still want an answer and can have one; the others are refused, and suspects wait for their turn."""
        for item in group:
            if self._records:  # a copy of it may have been marked while it waited
                item.record = self._records.of(item.picture)
            if queue.is_too_late(item):
                _fail(item, _too_late(queue.call_s, item.deadline - time.monotonic()))
            elif self._is_forbidden(queue.release, item.record):
                _fail(item, _known_poison(queue.release))
        wanted = [item for item in group if not item.answer.done()]
        if len(wanted) == 1 and not queue.trials:
            return wanted
        for item in wanted:
            if item.record.is_suspect:  # because of a copy of it
                queue.pending.put_back(item)
        return [item for item in wanted if not item.record.is_suspect]

    async def _run(self, queue: ReleaseQueue, call: Call) -> None:
        group = call.group
        try:
            if call.is_trial:
                if not await self._is_sound(queue, call):
                    put_off = TritonError(grpc.StatusCode.UNAVAILABLE, "its trial was put off")
                    self._retry(queue, call, put_off, is_free=True)
                    return
                call.probed, call.sent = call.sent, time.monotonic()
            timeout = max(item.deadline for item in group) - call.sent
            if call.is_trial:
                timeout = max(timeout, _VERDICT_S)
            ids = ",".join(item.request_id for item in group)
            inferences = await call.replica.triton.infer(queue.release, [item.picture for item in group], ids, timeout)
            for item, inference in zip(group, inferences, strict=True):
                if not item.answer.done():
                    item.answer.set_result(TimedInference(inference, call.sent))
            call.replica.answered(queue.release)
            if call.is_trial:
                group[0].record.acquit()
                queue.pending.regroup()
            queue.retries = min(RETRIES_SAVED, queue.retries + _RETRIES_EARNED * len(group))
            queue.learn(call)
        except TritonError as error:
            if error.dead_process:
                await call.replica.count_instances(queue.release, error.dead_process)
            self._failed(queue, call, error)
        except MalformedAnswer as error:
            for item in group:
                _fail(item, error)

    def _ended(self, queue: ReleaseQueue, call: Call, task: asyncio.Task[None]) -> None:
        call.task = None  # else another reference cycle: if it was cancelled, the call is one of the variables
        try:
            left = self._settle(queue, call, task)
        except Exception as error:  # its place is free all the same
            failed("settle a call")
            left = 0.0
            for item in call.group:
                _fail(item, error)
        if left:
            asyncio.get_running_loop().call_later(left, self._free, queue, call)
        else:
            self._free(queue, call)

    def _settle(self, queue: ReleaseQueue, call: Call, task: asyncio.Task[None]) -> float:
        """See to it that each picture of a call that ended has an answer or waits again; returns how long the call
        keeps its place, in seconds.
        """
        if task.cancelled() and call.is_lost:
            self._retry(queue, call, TritonError(grpc.StatusCode.UNAVAILABLE, "its server was lost"), is_free=True)
        elif task.cancelled():
            call.is_abandoned = True
        elif error := task.exception():
            logger.error("unexpected failure", exc_info=error)
            for item in call.group:
                _fail(item, error)
        if not call.is_abandoned:
            return 0.0
        queue.learn(call)
        pictures = [each.picture for each in call.group]
        self._abandoned.add(call.replica.url, queue.release, call.sent, pictures)
        return queue.seconds_until_free(call)

    def _free(self, queue: ReleaseQueue, call: Call) -> None:
        queue.end(call)
        call.replica.calls -= 1
        self._dispatch_ready(queue)

    def _failed(self, queue: ReleaseQueue, call: Call, error: TritonError) -> None:
        if error.status is grpc.StatusCode.DEADLINE_EXCEEDED:
            call.is_abandoned = True
            for item in call.group:
                _fail(item, _over())
        elif error.is_queue_full:  # by others than this gateway: each of the group alone would make it worse
            queue.limiters[call.replica].full()
            for item in call.group:
                said = f"{call.replica.url}: {error.detail}"
                _fail(item, Failure("overloaded", "the queue of a step is full", queue.call_s, said))
        elif error.is_of_the_server:
            self._mark(queue, call, error)
            if error.is_broken_connection:
                call.replica.lose(str(error))
            elif error.dead_process:
                call.replica.stumble(queue.release, str(error))
            else:
                call.replica.mark_unhealthy(queue.release, str(error))
                call.replica.ask_now()  # it may be the server
            died = bool(error.dead_process)
            self._retry(
                queue, call, error, alone=died, is_free=True, most=_ATTEMPTS_AT_PROCESSES if died else _ATTEMPTS
            )
        elif len(call.group) > 1:  # one of them may be the cause
            self._retry(queue, call, error, alone=True)
        else:
            _fail(call.group[0], error)

    async def _is_sound(self, queue: ReleaseQueue, call: Call) -> bool:
        """Whether the replica answers without the suspect: it may be failing, whatever the picture.

        A golden picture for each process, since Triton asks them in turns: one that is dead already must be met now, or
        by others lately.
        """
        manifest, deaths = self._fleet.manifest(queue.release), call.replica.deaths
        try:
            if manifest is not None and deaths.were_met_lately(steps_of(manifest)):
                await asyncio.sleep(_PUT_OFF_S)
                return False
            for _ in range(call.replica.deaths.most_instances):
                await call.replica.answer_golden(queue.release, _TRIAL_S)
            return True
        except (TritonError, MalformedAnswer) as error:
            if manifest is not None and isinstance(error, TritonError) and (process := error.dead_process):
                deaths.may_be_due_to(_blamed(manifest, process), process, -math.inf)
            call.replica.stumble(queue.release, str(error))
            await asyncio.sleep(_PUT_OFF_S)
            return False

    def _mark(self, queue: ReleaseQueue, call: Call, error: TritonError) -> None:
        """Suspect the pictures of a call that may have ended a process; refuse the one that did so on trial."""
        manifest, process, deaths = self._fleet.manifest(queue.release), error.dead_process, call.replica.deaths
        if manifest is None:
            return
        blamed = _blamed(manifest, process)
        if process:
            # On trial it is, since every process was alive just before: unless another call met with its death first.
            is_proven = call.is_trial and not deaths.was_met(blamed, process, call.probed)
            may_be = deaths.may_be_due_to(blamed, process, call.sent) and not call.is_trial
            marks = SUSPECT if is_proven or may_be else 0
        else:
            marks = int(error.is_broken_connection)
        if marks == SUSPECT:
            for digest in self._abandoned.take(call.replica.url, queue.release):
                self._records.keep(digest).mark(marks)
        for item in call.group if marks else ():
            item.record = self._records.keep(digest_of(item.picture))
            item.record.mark(marks)
            item.was_alone |= len(call.group) == 1 and item.record.is_suspect
            if call.is_trial and (process or item.record.marks >= GUILTY):
                item.record.ended.add(blamed)
                _fail(item, _poison(f"{process or call.replica.url} ended while it worked on this picture alone"))
                queue.pending.acquit_company()

    def _retry(
        self,
        queue: ReleaseQueue,
        call: Call,
        error: TritonError,
        *,
        alone: bool = False,
        is_free: bool = False,
        most: int = _ATTEMPTS,
    ) -> None:
        """Queue the pictures of a call again that failed fewer than `most` times, and suspects always.

        `is_free`: it failed with its server, or a process of it. That may be many at once, so no budget is spent.
        """
        for item in call.group:
            if item.answer.done() or item.call is not call:  # it may be on its way again already
                continue
            item.is_alone |= alone
            item.attempts += 1
            if (item.attempts >= most and not item.record.is_suspect) or (not is_free and queue.retries < 1):
                _fail(item, error)
                continue
            queue.retries -= not is_free
            self._metrics.retried()
            item.call = None
            queue.pending.put_back(item)

    def _changed(self) -> None:
        """Replicas may have changed."""
        there = self._fleet.available()
        for queue in self._queues.values():
            for call in queue.calls:
                if there and not call.replica.is_available and call.task:
                    call.is_lost = True
                    call.task.cancel()
            for replica in [replica for replica in queue.limiters if replica not in there]:
                del queue.limiters[replica]  # it starts slowly, should it come back
            self._dispatch_ready(queue)


def _blamed(release: Manifest, process: str) -> str:
    """The digest of the step that a process belongs to; the release's name where it is none of its steps."""
    step = step_of(release, process)
    return release.steps[step].digest if step else release.name


def _abandon(call: Call) -> None:
    """End a call that nobody waits for any more; not a trial, whose verdict is wanted."""
    if call.task and not call.is_trial and all(each.answer.done() for each in call.group):
        call.task.cancel()


def _poison(detail: str) -> Failure:
    return Failure("image_crashes_server", detail)


def _known_poison(release: str) -> Failure:
    return _poison(f"it is not sent to {release} again for a while")


def _over() -> Failure:
    return Failure("deadline_exceeded", "the time for this request is over")


def _too_late(expected: float, left: float) -> Failure:
    detail = f"an answer may take {expected:.2g} s, {max(0.0, left):.2g} s are left"
    return Failure("overloaded", detail, retry_after=max(0.0, expected - left))


def _expire(item: PendingItem) -> None:
    _fail(item, _over())


def _fail(item: PendingItem, error: BaseException) -> None:
    if not item.answer.done():
        item.answer.set_exception(error)
