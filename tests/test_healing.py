"""A Python process of Triton that dies is replaced without a person, and without a request more than those it had."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import pytest

import contract
from export.repository import Repository
from tests.conftest import ROOT, free_endpoint, wait_for
from tests.test_triton_runtime import infer
from triton_runtime import healing, server, stubs
from triton_runtime.healing import Healer, Kill, Reload, Restart, Say
from triton_runtime.server import Endpoint, TritonServer
from triton_runtime.stubs import Process, Seen

POLL_S = 1
RELEASE = "tiny-v1"
FILE = Path("/models/a_preprocess/1/model.py")
OTHER = Path("/models/a_classifier/1/model.onnx")
ANOTHER = Path("/models/a_preprocess/2/model.py")


def process(number: int) -> Process:
    return Process(number, 1000 + number)


class Clock:
    """A healer and what it sees, at times that the test chooses."""

    def __init__(self) -> None:
        self.healer = Healer(POLL_S, 5)
        self.now = 100.0
        self.living: dict[Process, Path] = {}
        self.dead: set[Process] = set()
        self.said: list[str] = []
        self.is_serving = True
        self.is_short = False

    def look(self, seconds: float = 0.5) -> list[healing.Action]:
        """What is to be done after so many seconds, but for what is said."""
        self.now += seconds
        seen = Seen(dict(self.living), frozenset(self.dead))
        actions = self.healer.look(self.now, seen, is_serving=self.is_serving, is_short=self.is_short)
        self.said += [action.text for action in actions if isinstance(action, Say)]
        return [action for action in actions if not isinstance(action, Say)]

    def start(self, number: int, file: Path = FILE) -> None:
        self.living[process(number)] = file

    def die(self, number: int) -> None:
        self.living.pop(process(number), None)
        self.dead.add(process(number))

    def run_two_versions(self) -> None:
        """Of one step, in processes 1 and 2, and for a while."""
        self.start(1)
        self.start(2, ANOTHER)
        self.look(10)
        self.look(10)

    def until(self, wanted: Callable[[list[healing.Action]], bool], seconds: float = 2000) -> float:
        """Seconds until something is to be done."""
        began = self.now
        while not wanted(self.look(0.1)):
            assert self.now - began < seconds, self.said
        return self.now - began


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_step_that_lost_a_process_is_loaded_again_once(clock: Clock) -> None:
    clock.start(1)
    clock.start(2, OTHER)
    assert clock.look() == []
    clock.die(1)
    assert clock.look() == [], "it may be dead because it is unloaded right now"
    assert clock.look() == [Reload(FILE)]
    assert clock.look() == clock.look() == []
    clock.start(3)
    assert clock.look() == []
    assert clock.said == [
        "a_preprocess/1 lost process 1: it is to be loaded again",
        "a_preprocess/1 is loaded again, in process 3",
    ]


def test_what_triton_unloads_did_not_die(clock: Clock) -> None:
    clock.start(1)
    clock.look()
    clock.die(1)
    clock.look(0.1)
    clock.dead.clear()
    assert clock.look() == [] and not clock.said


def test_steps_that_die_together_are_loaded_again_together(clock: Clock) -> None:
    clock.start(1)
    clock.start(2)
    clock.start(3, OTHER)
    clock.look()
    for number in (1, 2, 3):
        clock.die(number)
    clock.look()
    assert set(clock.look()) == {Reload(FILE), Reload(OTHER)}


def test_one_that_dies_again_and_again_is_loaded_ever_later_and_that_is_forgotten(clock: Clock) -> None:
    def die_and_wait(number: int) -> int:
        clock.start(number)
        clock.look()
        clock.die(number)
        return int(clock.until(lambda actions: Reload(FILE) in actions))

    assert [die_and_wait(number) for number in range(1, 12)] == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    clock.start(99)
    for _ in range(40):
        clock.look(10)
    assert die_and_wait(100) == 0


def test_a_step_that_cannot_be_loaded_is_tried_again_ever_later(clock: Clock) -> None:
    clock.start(1)
    clock.look()
    clock.die(1)
    clock.until(lambda actions: Reload(FILE) in actions)
    waits = []
    for number in range(2, 7):
        clock.start(number)
        clock.look(0.1)
        del clock.living[process(number)]  # Triton reaps one that could not load
        waits.append(int(clock.until(lambda actions: Reload(FILE) in actions)))
    assert waits == [1, 2, 4, 8, 16]
    assert "a_preprocess/1 could not be loaded, see Triton's log: it is to be loaded again in 1 s" in clock.said


def test_pictures_that_end_the_only_process_now_and_then_do_not_delay_the_next_one(clock: Clock) -> None:
    """Each ends two: the first, and the one that it is tried on."""
    waits = []
    for number in range(1, 20, 2):
        for each in (number, number + 1):
            clock.start(each)
            clock.look(3)
            clock.die(each)
            clock.look(0.1)
            waits.append(round(clock.until(lambda actions: Reload(FILE) in actions)))
        clock.start(number + 2)
        clock.look(25)
    assert waits == [0, 1] * 10
    assert not any("could not be loaded" in each for each in clock.said)


def test_what_nobody_needs_any_more_is_ended(clock: Clock) -> None:
    """Triton keeps the siblings of a process that died under a request."""
    clock.start(1)
    clock.start(2)
    clock.look()
    clock.die(1)
    clock.until(lambda actions: Reload(FILE) in actions)
    clock.start(3)
    clock.start(4)
    assert clock.until(lambda actions: Kill(process(2)) in actions) >= 60 - 1
    clock.die(2)
    assert [action for _ in range(20) for action in clock.look(10)] == []
    assert clock.healer.replaced == {process(1), process(2)}


def test_a_step_that_cannot_be_loaded_keeps_its_other_processes(clock: Clock) -> None:
    clock.start(1)
    clock.start(2)
    clock.look()
    clock.die(1)
    for _ in range(2000):
        assert Kill(process(2)) not in clock.look(0.1)


def test_a_repository_that_cannot_be_written_has_the_server_restarted_ever_later(clock: Clock) -> None:
    waits = []
    for number in range(1, 8):
        clock.start(number)
        clock.look()
        clock.die(number)
        clock.until(lambda actions: Reload(FILE) in actions)
        clock.healer.refused(FILE, "Read-only file system")
        waits.append(int(clock.until(lambda actions: Restart() in actions)))
        clock.healer.begin()
        clock.dead.clear()
    assert waits == [0, 60, 120, 240, 480, 900, 900]
    assert "a_preprocess/1 cannot be loaded again (Read-only file system): the server is restarted" in clock.said


def test_a_triton_that_does_not_load_it_again_is_restarted(clock: Clock) -> None:
    clock.start(1)
    clock.look()
    clock.die(1)
    clock.until(lambda actions: Reload(FILE) in actions)
    assert 10 < clock.until(lambda actions: Restart() in actions) < 20


def test_a_triton_that_loads_nothing_any_more_is_restarted_though_others_answer(clock: Clock) -> None:
    """One that lived for a while was not killed in its first moment: Triton may be busy with something large."""
    clock.start(1)
    clock.start(2, ANOTHER)
    clock.look()
    clock.look(1)
    clock.die(1)
    asked = [clock.until(lambda actions: Reload(FILE) in actions) for _ in range(3)]
    assert clock.until(lambda actions: Restart() in actions) + sum(asked) < 60
    assert clock.said[-1].endswith("within 12 s, 3 times: the server is restarted")


def test_another_pipelines_answers_are_spared_like_another_versions(clock: Clock) -> None:
    clock.start(1)
    clock.start(2, Path("/models/b_preprocess/1/model.py"))
    clock.look()
    clock.look(1)
    clock.die(1)
    for _ in range(3):
        clock.until(lambda actions: Reload(FILE) in actions)
    clock.until(lambda actions: Restart() in actions)


def test_a_triton_that_loads_again_late_is_not_restarted(clock: Clock) -> None:
    clock.start(1)
    clock.start(2, ANOTHER)
    clock.look()
    clock.look(1)
    for number in range(3, 9):  # each dies, and takes two tries to be replaced
        clock.die(1 if number == 3 else number - 1)
        for _ in range(2):
            clock.until(lambda actions: Reload(FILE) in actions)
        clock.start(number)
        assert clock.look() == clock.look(1) == []


def test_a_triton_that_waits_for_a_process_killed_in_its_first_moment_is_restarted(clock: Clock) -> None:
    """It would load nothing any more, whoever still answers."""
    clock.run_two_versions()
    clock.die(3)
    assert 3 <= clock.until(lambda actions: Restart() in actions) < 4
    assert clock.said == ["process 3 died in its first moment, and Triton waits for it: the server is restarted"]


def test_one_that_was_seen_only_just_has_the_server_restarted_when_nothing_takes_its_place(clock: Clock) -> None:
    clock.run_two_versions()
    clock.die(1)
    clock.until(lambda actions: Reload(FILE) in actions)
    clock.start(3)
    clock.look(0.1)
    clock.die(3)
    again = clock.until(lambda actions: Reload(FILE) in actions)
    assert 10 < clock.until(lambda actions: Restart() in actions) < 20 - again


def test_a_server_that_never_serves_because_a_process_died_is_restarted_soon_and_again(clock: Clock) -> None:
    clock.is_serving = False
    waits = []
    for number in range(1, 8):
        clock.start(number)
        clock.start(100 + number, ANOTHER)
        clock.look()
        clock.die(number)
        waits.append(int(clock.until(lambda actions: actions == [Restart()])))
        clock.healer.begin()
        clock.dead.clear()
        clock.living.clear()
    assert waits == [3, 4, 5, 7, 11, 19, 35]
    assert clock.said[0] == "process 1 died while the server started: the server is restarted"


def test_a_slow_start_is_left_alone(clock: Clock) -> None:
    clock.is_serving = False
    clock.start(1)
    assert [action for _ in range(600) for action in clock.look(1)] == []
    clock.is_serving = True
    assert clock.look() == []


def test_what_lost_its_processes_while_the_server_started_is_loaded_once_more(clock: Clock) -> None:
    """Triton takes it for a step that cannot be loaded, and cleans up. Perhaps it cannot."""
    clock.is_serving = False
    clock.start(1)
    clock.start(2, OTHER)
    clock.start(3, ANOTHER)
    clock.look()
    for number in (1, 2, 3):
        del clock.living[process(number)]
    clock.start(4, ANOTHER)
    clock.look()
    clock.is_serving = True
    assert clock.look() == [Reload(OTHER), Reload(FILE)]
    clock.healer.refused(FILE, "Read-only file system")
    assert [action for _ in range(100) for action in clock.look(1)] == []


@pytest.mark.parametrize(("is_short", "most"), [(True, 17), (False, 65)])
def test_a_triton_full_of_remains_is_restarted(clock: Clock, is_short: bool, most: int) -> None:
    clock.is_short = is_short
    number = 1
    clock.start(number)
    clock.look()

    def step(actions: list[healing.Action]) -> bool:
        nonlocal number
        if Reload(FILE) in actions:
            number += 1
            clock.start(number)
        elif process(number) in clock.living:
            clock.die(number)
        return Restart() in actions

    clock.until(step, 20_000)
    assert len(clock.dead) == most
    assert f"{most} processes that died" in clock.said[-1]


def test_a_version_that_was_taken_back_is_not_missed(clock: Clock) -> None:
    clock.start(1)
    clock.look()
    clock.die(1)
    clock.until(lambda actions: Reload(FILE) in actions)
    clock.healer.gone(FILE)
    assert [action for _ in range(100) for action in clock.look(1)] == []


# ---- the real thing ----


class Clients:
    """A light load on a release, over gRPC, and what became of it."""

    def __init__(self, endpoint: Endpoint, picture: bytes, release: str = RELEASE, number: int = 2) -> None:
        self._endpoint, self._picture, self._release = endpoint, picture, release
        self._done = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._ask) for _ in range(number)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._done.wait(0.02):
            try:
                infer(self._endpoint, self._release, [self._picture])
                self.outcomes["answered"] += 1
            except grpc.RpcError as error:
                self.outcomes[f"{error.code().name}: {error.details()}"] += 1


def answers(endpoint: Endpoint, picture: bytes, release: str = RELEASE) -> bool:
    """Whether a release answers several times on end, so that each process of its steps has been asked."""
    try:
        for _ in range(6):
            infer(endpoint, release, [picture])
    except grpc.RpcError:
        return False
    return True


def of_step(found: Sequence[Process] | dict[Process, Path], step: str, living: dict[Process, Path]) -> set[Process]:
    return {each for each in found if living[each].parent.parent.name.endswith(f"_{step}")}


def lose_and_regain(triton: TritonServer, step: str, picture: bytes, release: str = RELEASE) -> None:
    """Kill a process of a step, and wait until as many new ones as it has run, and the release answers."""
    before = stubs.look(triton.process.pid).living
    of_before = of_step(before, step, before)
    os.kill(min(of_before, key=lambda each: each.pid).pid, signal.SIGKILL)

    def is_whole() -> bool:
        now = stubs.look(triton.process.pid).living
        return len(of_step(now, step, now) - of_before) == len(of_before) and answers(triton.endpoint, picture, release)

    wait_for(is_whole, 120)


@pytest.fixture
def triton(tiny: Repository) -> TritonServer:
    """Not started: a Triton on the test's own repository. It would take long to stop if it had to wait."""
    return TritonServer(tiny.root, free_endpoint(), poll_seconds=POLL_S, grace_seconds=100)


def test_every_step_that_loses_a_process_under_load_comes_back_and_what_is_published_stays(
    triton: TritonServer, tiny: Repository, jpeg: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    content = {path: path.read_bytes() for path in tiny.root.rglob("*") if path.is_file()}
    with triton:
        triton.wait_until_ready()
        pid = triton.process.pid
        with Clients(triton.endpoint, jpeg) as clients:
            for step in contract.STEPS:
                lose_and_regain(triton, step, jpeg)
        assert triton.process.pid == pid, "the server was not restarted"
        assert clients.outcomes["answered"] > 0
        stopping = time.monotonic()
    # The requests that failed keep Triton from unloading what they ran in; nobody waits for that.
    assert time.monotonic() - stopping < 90
    assert {path: path.read_bytes() for path in tiny.root.rglob("*") if path.is_file()} == content
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("triton: ")]
    for step in contract.STEPS:
        assert sum(f"tiny_{step}/1 lost process" in line for line in said) == 1
        assert sum(f"tiny_{step}/1 is loaded again, in process" in line for line in said) == 1


def test_all_that_die_together_while_nobody_asks_come_back_and_leave_nothing(triton: TritonServer, jpeg: bytes) -> None:
    with triton:
        triton.wait_until_ready()
        before, segments = stubs.look(triton.process.pid).living, len(list(triton.shared_memory()))
        for each in before:
            os.kill(each.pid, signal.SIGKILL)

        def is_whole() -> bool:
            now = stubs.look(triton.process.pid)
            return not now.dead and len(now.living) == len(before) and not now.living.keys() & before.keys()

        wait_for(is_whole, 60)
        wait_for(lambda: len(list(triton.shared_memory())) == segments, 60)
        assert answers(triton.endpoint, jpeg)


def test_another_triton_on_the_same_repository_answers_every_request_meanwhile(
    triton: TritonServer, tiny: Repository, jpeg: bytes
) -> None:
    with triton, TritonServer(tiny.root, free_endpoint(), poll_seconds=POLL_S) as other:
        triton.wait_until_ready()
        other.wait_until_ready()
        before = stubs.look(other.process.pid).living
        with Clients(other.endpoint, jpeg) as clients:
            for step in contract.STEPS:
                lose_and_regain(triton, step, jpeg)
            wait_for(lambda: not stubs.look(other.process.pid).living.keys() & before.keys(), 60)  # it followed
        assert clients.outcomes.keys() == {"answered"}, clients.outcomes


def test_a_file_from_the_future_hides_nothing(triton: TritonServer, tiny: Repository, jpeg: bytes) -> None:
    stray = tiny.root / "tiny_postprocess" / "notes.txt"
    stray.write_text("from another clock")
    os.utime(stray, (time.time() + 86400,) * 2)
    with triton:
        triton.wait_until_ready()
        lose_and_regain(triton, "postprocess", jpeg)
        lose_and_regain(triton, "postprocess", jpeg)


def test_the_versions_beside_it_come_along(pair: Path, jpeg: bytes) -> None:
    with TritonServer(pair, free_endpoint(), poll_seconds=POLL_S) as triton:
        triton.wait_until_ready()
        with Clients(triton.endpoint, jpeg, "defect-v2") as clients:
            before = stubs.look(triton.process.pid).living
            os.kill(next(p.pid for p, file in before.items() if "defect_classifier/1/" in str(file)), signal.SIGKILL)
            wait_for(lambda: not answers(triton.endpoint, jpeg, "defect-v1"))
            wait_for(lambda: answers(triton.endpoint, jpeg, "defect-v1"), 120)
        assert clients.outcomes.keys() == {"answered"}, "the release beside it lost nothing"
        assert answers(triton.endpoint, jpeg, "defect-v2")


def test_where_the_repository_cannot_be_written_the_server_is_restarted(
    triton: TritonServer, jpeg: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Root may write where others may not, so the refusal is made."""

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(server, "_date_later", refuse)
    with triton:
        triton.wait_until_ready()
        first = triton.process
        os.kill(next(iter(stubs.look(first.pid).living)).pid, signal.SIGKILL)
        wait_for(lambda: triton.process is not first, 60)
        assert triton.poll() is None
        wait_for(lambda: answers(triton.endpoint, jpeg), 120)
        assert first.poll() is not None
    assert "Read-only file system" in capfd.readouterr().err


def test_a_triton_that_crashes_while_it_loads_the_step_is_restarted(triton: TritonServer, jpeg: bytes) -> None:
    """It does so now and then, too seldom to be waited for."""
    with triton:
        triton.wait_until_ready()
        first = triton.process
        os.kill(next(iter(stubs.look(first.pid).living)).pid, signal.SIGKILL)
        wait_for(lambda: triton._healer.is_replacing)
        os.kill(first.pid, signal.SIGSEGV)
        wait_for(lambda: triton.process is not first, 60)
        assert triton.poll() is None
        wait_for(lambda: answers(triton.endpoint, jpeg), 120)
        assert triton.crashes == 1
        wait_for(lambda: not triton._forgives_a_crash)  # whoever restarted it saw that it serves, too
        os.kill(triton.process.pid, signal.SIGSEGV)
        wait_for(lambda: triton.poll() == -signal.SIGSEGV)  # another crash is for others to decide about


@pytest.mark.parametrize("after_s", [0.0, 0.1])
def test_a_process_killed_while_the_server_starts_keeps_nobody_waiting(triton: TritonServer, after_s: float) -> None:
    """Killed in its first moment, or later, when Triton notices."""
    with triton:
        found: set[Process] = set()
        while not found:
            assert triton.poll() is None
            found = {*stubs.look(triton.process.pid).living}
        time.sleep(after_s)
        os.kill(found.pop().pid, signal.SIGKILL)
        wait_for(lambda: all(triton._ready(name) for name in triton.releases()), 60)


def test_one_that_hangs_is_not_dead(triton: TritonServer) -> None:
    with triton:
        triton.wait_until_ready()
        before = stubs.look(triton.process.pid).living
        hung = next(iter(before))
        os.kill(hung.pid, signal.SIGSTOP)
        try:
            time.sleep(3)
            assert stubs.look(triton.process.pid) == Seen(before, frozenset())
        finally:
            os.kill(hung.pid, signal.SIGCONT)


def test_it_goes_on_after_an_error_of_its_own(
    triton: TritonServer, jpeg: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with triton:
        triton.wait_until_ready()
        with monkeypatch.context() as broken:
            broken.setattr(server.stubs, "look", lambda *_: 1 / 0)
            time.sleep(2 * healing.LOOK_S)
        lose_and_regain(triton, "postprocess", jpeg)
    assert "could not look after its processes, and tries again: ZeroDivisionError" in capfd.readouterr().err


def healers() -> set[threading.Thread]:
    """The threads that look after Tritons: other tests of this process may have some."""
    return {thread for thread in threading.enumerate() if thread.name == "triton-healing"}


def test_it_can_be_left_to_others_and_is_over_when_the_server_is_stopped(tiny: Repository) -> None:
    before = healers()
    with TritonServer(tiny.root, free_endpoint(), poll_seconds=POLL_S, grace_seconds=100, heals=False) as triton:
        triton.wait_until_ready()
        assert healers() == before
    with TritonServer(tiny.root, free_endpoint()):
        assert len(healers() - before) == 1
    assert healers() == before


def test_a_process_that_died_before_it_became_a_stub_is_dead_too() -> None:
    """It has its parent's name until then. Triton waits for it forever."""
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        assert child in {each.pid for each in stubs.look(os.getpid()).ending}
        os.kill(child, signal.SIGKILL)
        wait_for(lambda: child in {each.pid for each in stubs.look(os.getpid()).dead}, 10)
    finally:
        os.waitpid(child, 0)
    assert child not in {each.pid for each in stubs.look(os.getpid()).dead}


# ---- in a container ----


def test_the_health_check_ends_a_server_that_keeps_a_dead_process(tiny: Repository, tmp_path: Path) -> None:
    memory = tmp_path / "stubs.json"
    with TritonServer(tiny.root, free_endpoint(), grace_seconds=100, heals=False) as triton:
        triton.wait_until_ready()

        def check() -> subprocess.CompletedProcess[str]:
            options = {"--server": triton.process.pid, "--memory": memory, "--patience": 0.5, "--grace": 1}
            command = [sys.executable, "triton_runtime/stubs.py", "--url", triton.endpoint.url("/v2/health/live")]
            command += [str(part) for option in options.items() for part in option]
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

        well = check()
        assert (well.returncode, well.stderr) == (0, "")
        os.kill(next(iter(stubs.look(triton.process.pid).living)).pid, signal.SIGKILL)
        time.sleep(0.2)
        assert check().returncode == 0, "what is being unloaded looks the same for a moment"
        time.sleep(0.6)
        told = check()
        assert told.returncode == 1
        assert "died" in told.stderr and "the server is told to end" in told.stderr

        def is_over() -> bool:
            check()
            return triton.process.poll() is not None

        wait_for(is_over, 60)
        after = check()
        assert after.returncode == 1 and "does not answer" in after.stderr


def test_the_health_check_does_not_take_the_next_server_for_the_last(tmp_path: Path) -> None:
    """A container that is restarted keeps its files, and its server has the same number."""
    memory = tmp_path / "stubs.json"
    with subprocess.Popen(["sleep", "60"]) as server_:
        memory.write_text(f'{{"server": "{server_.pid}, 1", "dead": {{}}, "told": 0}}')
        assert stubs.check(server_.pid, memory, patience=0, grace=0) == ""
        memory.write_text("not JSON")
        assert stubs.check(server_.pid, memory, patience=0, grace=0) == ""
        server_.kill()
