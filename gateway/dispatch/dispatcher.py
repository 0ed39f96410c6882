"""From requests to calls: who waits, who goes together, to which Triton, and what happens when a call fails.

Each release has a lane of its own, with room to wait and retries of its own, so that one that hangs or fails holds up
nobody but those who asked for it. In a lane each replica gets as many calls at once as its knee allows. While there is
room a request goes at once; the others wait here, where an abandoned one costs nothing, and those that wait together
share a call: what Triton and gRPC cost is paid by call, not by picture. A request is refused on arrival where it would
be answered too late.

Inference has no effects, so a call that failed is made again within the deadline: as often as it takes where a server
was lost with it, within a budget where it failed otherwise, and hardly at all where its picture may be the cause.
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
from gateway.dispatch.release_queue import RETRIES_SAVED, Lane
from gateway.dispatch.suspects import GUILTY, SUSPECT, GivenUp, Record, Records, digest_of
from gateway.dispatch.work import Call, Ran, Waiting
from gateway.metrics import Metrics
from gateway.problems import Failure
from gateway.settings import Settings
from gateway.supervision import failed
from gateway.triton.client import MalformedAnswer, TritonError
from gateway.triton.deaths import step_of, steps_of
from gateway.triton.fleet import Fleet, Replica

_ATTEMPTS = 4
_TRIAL_S, _PUT_OFF_S = 1.0, 0.2
"""For a golden picture before a suspect; and until the next try where it was not answered."""
_VERDICT_S = 5.0
"""For a suspect at least, whatever its own deadline: a trial without a verdict would cost one process after another."""
_ATTEMPTS_AT_PROCESSES = 16
"""Where one of two processes of a step died, every other call may find it dead."""
_RETRIES_EARNED = 0.1
"""Retries are a tenth of the answers at most, so that a failing server is not buried under them; some are saved up."""
_PATIENCE = 0.1
"""For so much of what a call takes, a call waits for more pictures while Triton has others to work on: clients that
were answered together ask again one by one, and would each get a call of their own."""
_CAUTION = 1.5
"""So many times longer than expected an answer may take: who is let in on the edge is answered late as often as not."""


logger = logging.getLogger("gateway.dispatch")


class Dispatcher:
    """All lanes, and what bounds them together. Made inside a running event loop."""

    def __init__(self, fleet: Fleet, settings: Settings, metrics: Metrics) -> None:
        self._fleet = fleet
        self._settings = settings
        self._metrics = metrics
        self._lanes: dict[str, Lane] = {}
        self._records = Records()
        self._given_up = GivenUp()
        fleet.on_change(self._changed)

    @property
    def waiting(self) -> int:
        """Pictures that wait for a call."""
        return sum(len(lane.line) for lane in self._lanes.values())

    def calls(self) -> dict[str, int]:
        """Calls on their way, by release."""
        return {name: len(lane.calls) for name, lane in self._lanes.items()}

    def limits(self) -> dict[str, int]:
        """Calls at once that are allowed, by release, over all replicas."""
        there = self._fleet.available()
        return {name: sum(lane.knees[each].limit for each in there) for name, lane in self._lanes.items()}

    def require_room(self, release: str, client: str, deadline: float) -> None:
        """Refuse a request that would wait too long, or with too many others.

        Raises:
            Failure: overloaded, deadline_exceeded.
        """
        left = deadline - time.monotonic()
        if left <= 0:
            raise _over()
        lane = self._lanes.get(release)
        if lane is None:
            return
        if lane.is_hopeless(left):
            raise _too_late(lane.call_s, left)
        if not lane.line:
            return
        expected = lane.expected(client, self._fleet.available()) * _CAUTION
        if self._is_full(lane, 1) and lane.line.last_of_longer(client) is None:
            raise Failure("overloaded", f"{len(lane.line)} requests wait for {release} already", retry_after=expected)
        if expected > left:
            raise _too_late(expected, left)

    def _is_full(self, lane: Lane, more: int = 0) -> bool:
        """Whether a release has no room left: each has its own for requests; that for bytes goes to who has less."""
        if len(lane.line) + more > self._settings.max_waiting:
            return True
        return self._are_too_large() and lane is self._largest()

    def _largest(self) -> Lane:
        return max(self._lanes.values(), key=lambda each: each.line.bytes)

    def _are_too_large(self) -> bool:
        return sum(lane.line.bytes for lane in self._lanes.values()) > self._settings.max_waiting_bytes

    def _make_room(self, lane: Lane, client: str) -> None:
        """Let others go where one came for whom there is no room: of another release, or of another client."""
        if not lane.line:
            return
        while self._are_too_large():
            largest = self._largest()
            if largest is lane or (other := largest.line.last()) is None:
                break
            largest.line.remove(other)
            _fail(other, Failure("overloaded", "another release's turn came first", retry_after=largest.call_s))
        while self._is_full(lane) and (other := lane.line.last_of_longer(client)):
            lane.line.remove(other)
            _fail(other, Failure("overloaded", "another client's turn came first", retry_after=lane.call_s))

    async def infer(
        self,
        release: str,
        picture: bytes,
        request_id: str,
        client: str,
        deadline: float,
        has_other: bool = False,
    ) -> Ran:
        """Run one picture through a release, together with others where they wait together.

        `has_other`: the caller would ask another release, so this one is not waited for while it is down.

        Cancelled, or at the deadline, it is abandoned: it leaves the line, or its call, which is cancelled with the
        last of its pictures.

        Raises:
            TritonError: no replica could do it.
            MalformedAnswer: the outputs are not those of a release.
            Failure: overloaded, deadline_exceeded, image_crashes_server.
        """
        self._fleet.having(release)  # refuses at once what would only wait for a server that is gone
        record = self._records.of(picture)
        if self._is_forbidden(release, record):
            raise _known_poison(release)
        self.require_room(release, client, deadline)
        lane = self._lanes.setdefault(release, Lane(release))
        waiting = Waiting(picture, request_id, client, deadline, has_other=has_other, record=record)
        lane.join(waiting)
        self._pump(lane)
        self._make_room(lane, client)
        alarm = asyncio.get_running_loop().call_later(deadline - time.monotonic(), _expire, waiting)
        try:
            ran = await waiting.answer
        except BaseException:
            if waiting.call is None:
                lane.line.remove(waiting)
            else:
                _abandon(waiting.call)
            raise
        finally:
            alarm.cancel()
            # Else there are circles, which keep the picture in memory: a call has its group, and an error the variables
            # of where it was raised.
            waiting.call = None
            del waiting
        if time.monotonic() > deadline:  # it came while the process was busy, and before its alarm
            raise _over()
        return ran

    def forget(self, release: str) -> None:
        """What was learnt of a release that is gone."""
        if (lane := self._lanes.get(release)) and not lane.calls and not lane.line:
            del self._lanes[release]

    async def close(self) -> None:
        """Give up all calls."""
        tasks = [call.task for lane in self._lanes.values() for call in lane.calls if call.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _pump(self, lane: Lane, is_overdue: bool = False) -> None:
        """Send what can be sent; `is_overdue`: its first call has waited for more pictures long enough."""
        if is_overdue:
            lane.alarm = None
        if not lane.line:
            return
        try:
            having = self._fleet.having(lane.release)
        except TritonError as error:
            self._turn_away(lane, error)
            return
        if not having and self._fleet.is_down(lane.release):
            down = TritonError(grpc.StatusCode.NOT_FOUND, self._fleet.suspicions(lane.release))
            self._turn_away(lane, down, only=lambda waiting: waiting.has_other)
        while lane.line:
            free = [replica for replica in having if lane.room(replica) > 0]
            if not free:
                return
            replica = min(free, key=lambda each: (each.is_shunned(lane.release), each.calls, each.called_at))
            if not lane.trials and (suspect := lane.line.take_suspect()):
                self._send(lane, replica, [suspect], had_to_wait=False)
                continue
            if not lane.line.is_ready:
                return
            fitting = lane.line.fitting(self._settings.group_bytes)
            most = min(self._settings.group, replica.max_batch(lane.release), fitting)
            most = lane.knees[replica].size(lane.share(having), most)
            # As long as the replica has as many calls but one as it works on, the last one can wait for its share.
            if len(lane.line) < min(most, lane.coming()) and lane.room(replica) == 1 and not is_overdue:
                if lane.alarm is None:
                    wait = _PATIENCE * lane.call_s
                    lane.alarm = asyncio.get_running_loop().call_later(wait, self._pump, lane, True)
                return
            if lane.alarm is not None:
                lane.alarm.cancel()
            lane.alarm, is_overdue = None, False
            group = lane.line.take(most, self._settings.group_bytes)
            self._send(lane, replica, group, had_to_wait=len(group) > 1 or bool(lane.line))

    def _is_forbidden(self, release: str, record: Record) -> bool:
        manifest = self._fleet.manifest(release) if record.ended else None
        return manifest is not None and record.forbids(manifest)

    def _turn_away(self, lane: Lane, error: TritonError, only: Callable[[Waiting], bool] = lambda _: True) -> None:
        for waiting in filter(only, lane.line.everyone()):
            if not waiting.was_alone:  # else it may not go to another release, so it waits
                lane.line.remove(waiting)
                _fail(waiting, error)

    def _send(self, lane: Lane, replica: Replica, group: list[Waiting], *, had_to_wait: bool) -> None:
        group = self._worth_sending(lane, group)
        if not group:
            return
        call = Call(replica, group, had_to_wait, is_trial=group[0].record.is_suspect)
        for waiting in group:
            waiting.call = call
        lane.begin(call)
        replica.calls, replica.called_at = replica.calls + 1, call.sent
        self._metrics.called(len(group))
        call.task = asyncio.create_task(self._run(lane, call))
        # No `finally` in the task: one that is cancelled before it begins would never come to it.
        call.task.add_done_callback(partial(self._ended, lane, call))

    def _worth_sending(self, lane: Lane, group: list[Waiting]) -> list[Waiting]:
        """Those who still want an answer and can have one; the others are refused, and suspects wait for their turn."""
        for waiting in group:
            if self._records:  # a copy of it may have been marked while it waited
                waiting.record = self._records.of(waiting.picture)
            if lane.is_too_late(waiting):
                _fail(waiting, _too_late(lane.call_s, waiting.deadline - time.monotonic()))
            elif self._is_forbidden(lane.release, waiting.record):
                _fail(waiting, _known_poison(lane.release))
        wanted = [waiting for waiting in group if not waiting.answer.done()]
        if len(wanted) == 1 and not lane.trials:
            return wanted
        for waiting in wanted:
            if waiting.record.is_suspect:  # because of a copy of it
                lane.line.put_back(waiting)
        return [waiting for waiting in wanted if not waiting.record.is_suspect]

    async def _run(self, lane: Lane, call: Call) -> None:
        group = call.group
        try:
            if call.is_trial:
                if not await self._is_sound(lane, call):
                    put_off = TritonError(grpc.StatusCode.UNAVAILABLE, "its trial was put off")
                    self._again(lane, call, put_off, is_free=True)
                    return
                call.probed, call.sent = call.sent, time.monotonic()
            timeout = max(waiting.deadline for waiting in group) - call.sent
            if call.is_trial:
                timeout = max(timeout, _VERDICT_S)
            ids = ",".join(waiting.request_id for waiting in group)
            inferences = await call.replica.triton.infer(
                lane.release, [waiting.picture for waiting in group], ids, timeout
            )
            for waiting, inference in zip(group, inferences, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(Ran(inference, call.sent))
            call.replica.answered(lane.release)
            if call.is_trial:
                group[0].record.acquit()
                lane.line.regroup()
            lane.retries = min(RETRIES_SAVED, lane.retries + _RETRIES_EARNED * len(group))
            lane.learn(call)
        except TritonError as error:
            if error.dead_process:
                await call.replica.count_instances(lane.release, error.dead_process)
            self._failed(lane, call, error)
        except MalformedAnswer as error:
            for waiting in group:
                _fail(waiting, error)

    def _ended(self, lane: Lane, call: Call, task: asyncio.Task[None]) -> None:
        call.task = None  # else another circle: where it was cancelled, the call is one of the variables
        try:
            left = self._settle(lane, call, task)
        except Exception as error:  # its place is free all the same
            failed("settle a call")
            left = 0.0
            for waiting in call.group:
                _fail(waiting, error)
        if left:
            asyncio.get_running_loop().call_later(left, self._free, lane, call)
        else:
            self._free(lane, call)

    def _settle(self, lane: Lane, call: Call, task: asyncio.Task[None]) -> float:
        """See to it that each picture of a call that ended has an answer or waits again; returns how long the call
        keeps its place, in seconds.
        """
        if task.cancelled() and call.is_lost:
            self._again(lane, call, TritonError(grpc.StatusCode.UNAVAILABLE, "its server was given up"), is_free=True)
        elif task.cancelled():
            call.is_given_up = True
        elif error := task.exception():
            logger.error("unexpected failure", exc_info=error)
            for waiting in call.group:
                _fail(waiting, error)
        if not call.is_given_up:
            return 0.0
        lane.learn(call)
        pictures = [each.picture for each in call.group]
        self._given_up.add(call.replica.url, lane.release, call.sent, pictures)
        return lane.left_after_giving_up(call)

    def _free(self, lane: Lane, call: Call) -> None:
        lane.end(call)
        call.replica.calls -= 1
        self._pump(lane)

    def _failed(self, lane: Lane, call: Call, error: TritonError) -> None:
        if error.status is grpc.StatusCode.DEADLINE_EXCEEDED:
            call.is_given_up = True
            for waiting in call.group:
                _fail(waiting, _over())
        elif error.is_queue_full:  # by others than this gateway: each of the group alone would make it worse
            lane.knees[call.replica].full()
            for waiting in call.group:
                said = f"{call.replica.url}: {error.detail}"
                _fail(waiting, Failure("overloaded", "the queue of a step is full", lane.call_s, said))
        elif error.is_of_the_server:
            self._mark(lane, call, error)
            if error.is_broken_connection:
                call.replica.lose(str(error))
            elif error.dead_process:
                call.replica.stumble(lane.release, str(error))
            else:
                call.replica.suspect(lane.release, str(error))
                call.replica.ask_now()  # it may be the server
            died = bool(error.dead_process)
            self._again(lane, call, error, alone=died, is_free=True, most=_ATTEMPTS_AT_PROCESSES if died else _ATTEMPTS)
        elif len(call.group) > 1:  # one of them may be the cause
            self._again(lane, call, error, alone=True)
        else:
            _fail(call.group[0], error)

    async def _is_sound(self, lane: Lane, call: Call) -> bool:
        """Whether what a suspect is tried on answers without it; it may be going down, whatever the picture.

        A golden picture for each process, since Triton asks them in turns: one that is dead already must be met now, or
        by others lately.
        """
        manifest, deaths = self._fleet.manifest(lane.release), call.replica.deaths
        try:
            if manifest is not None and deaths.were_met_of_late(steps_of(manifest)):
                await asyncio.sleep(_PUT_OFF_S)
                return False
            for _ in range(call.replica.deaths.most_instances):
                await call.replica.answer_golden(lane.release, _TRIAL_S)
            return True
        except (TritonError, MalformedAnswer) as error:
            if manifest is not None and isinstance(error, TritonError) and (process := error.dead_process):
                deaths.may_be_due_to(_blamed(manifest, process), process, -math.inf)
            call.replica.stumble(lane.release, str(error))
            await asyncio.sleep(_PUT_OFF_S)
            return False

    def _mark(self, lane: Lane, call: Call, error: TritonError) -> None:
        """Suspect the pictures of a call that may have ended a process; refuse the one that did so on trial."""
        manifest, process, deaths = self._fleet.manifest(lane.release), error.dead_process, call.replica.deaths
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
            for digest in self._given_up.take(call.replica.url, lane.release):
                self._records.keep(digest).mark(marks)
        for waiting in call.group if marks else ():
            waiting.record = self._records.keep(digest_of(waiting.picture))
            waiting.record.mark(marks)
            waiting.was_alone |= len(call.group) == 1 and waiting.record.is_suspect
            if call.is_trial and (process or waiting.record.marks >= GUILTY):
                waiting.record.ended.add(blamed)
                _fail(waiting, _poison(f"{process or call.replica.url} ended while it worked on this picture alone"))
                lane.line.acquit_company()

    def _again(
        self,
        lane: Lane,
        call: Call,
        error: TritonError,
        *,
        alone: bool = False,
        is_free: bool = False,
        most: int = _ATTEMPTS,
    ) -> None:
        """Put the pictures of a call back into the line, those that were sent less than `most` times.

        `is_free`: it failed with its server, or a process of it. That may be many at once, so no budget is spent.
        """
        for waiting in call.group:
            if waiting.answer.done() or waiting.call is not call:  # it may be on its way again already
                continue
            waiting.is_alone |= alone
            waiting.attempts += 1
            if (waiting.attempts >= most and not waiting.record.is_suspect) or (not is_free and lane.retries < 1):
                _fail(waiting, error)
                continue
            lane.retries -= not is_free
            self._metrics.retried()
            waiting.call = None
            lane.line.put_back(waiting)

    def _changed(self) -> None:
        """A replica was lost or came back."""
        there = self._fleet.available()
        for lane in self._lanes.values():
            for call in lane.calls:
                if there and not call.replica.is_available and call.task:
                    call.is_lost = True
                    call.task.cancel()
            for replica in [replica for replica in lane.knees if replica not in there]:
                del lane.knees[replica]  # it starts slowly, should it come back
            self._pump(lane)


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


def _expire(waiting: Waiting) -> None:
    _fail(waiting, _over())


def _fail(waiting: Waiting, error: BaseException) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
