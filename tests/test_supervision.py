"""Parts of a stack that end by themselves come back, and those that do not want to end are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import ROOT
from harness.ports import free_endpoint
from tests.conftest import wait_for
from triton_runtime import signals, supervision
from triton_runtime.backoff import Backoff
from triton_runtime.child import Child
from triton_runtime.installation import Missing
from triton_runtime.supervision import MOST_FAILURES, Supervisor


def is_running(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ---- what ends by itself ----


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "Backoff", lambda **_: Backoff(first=0.01, most=0.05, calm=60))


class Failing(Child):
    """`python -m` something that ends at once, so many times; after that, something that runs."""

    def __init__(self, failures: int) -> None:
        self.starts, self._failures = 0, failures
        super().__init__("json.tool", "/nowhere")

    def _start(self) -> None:
        self.starts += 1
        if self.starts > self._failures:
            self._command = [sys.executable, "-c", "import time; time.sleep(1000)"]
        super()._start()


@pytest.mark.usefixtures("impatient")
def test_a_part_that_cannot_run_ends_the_rest_with_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    with Failing(1000) as part, Child("tests.stubborn", stdout=subprocess.PIPE, grace_seconds=0) as other:
        status = Supervisor({"gateway": part, "watcher": other}).run()
        assert other.poll() is None
    assert status == part.process.returncode != 0
    assert part.starts == MOST_FAILURES
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("serve: ")]
    assert [f"gateway ended by itself with status {status}" in line for line in said] == [True] * MOST_FAILURES
    assert said[0].endswith("it is started again")
    assert said[-1].endswith("it is not started again")


class Enough(Exception):
    pass


class Restless:
    """Ends as soon as it was started; `Enough` is raised where that was `most` times."""

    def __init__(self, most: int) -> None:
        self._left = most

    def poll(self) -> int | None:
        return -9

    def restart(self) -> None:
        self._left -= 1
        if not self._left:
            raise Enough


@pytest.mark.usefixtures("impatient")
def test_a_part_that_ends_now_and_then_is_started_again_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is the test's own: each run of the part is a calm one."""
    now = [1000.0]
    monkeypatch.setattr(supervision.time, "monotonic", lambda: now[0])

    def sleep(_: float) -> None:
        now[0] += supervision.CALM_S

    monkeypatch.setattr(supervision.time, "sleep", sleep)
    with pytest.raises(Enough):
        Supervisor({"watcher": Restless(3 * MOST_FAILURES)}).run()


@pytest.mark.usefixtures("impatient")
def test_a_part_that_lacks_something_is_tried_again_and_then_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    class Part:
        def poll(self) -> int | None:
            return 7

        def restart(self) -> None:
            raise Missing("cannot listen on 127.0.0.1:8000")

    assert Supervisor({"triton": Part()}).run() == 7
    assert capsys.readouterr().err.count("triton cannot be started: cannot listen on 127.0.0.1:8000") == 5


@pytest.mark.usefixtures("impatient")
def test_what_others_go_on_without_is_never_given_up() -> None:
    """A drop may end the watcher each time: that is no reason to stop what answers."""

    with pytest.raises(Enough):
        Supervisor({"watcher": Restless(2 * MOST_FAILURES)}, spare={"watcher"}).run()


# ---- what does not want to end ----


def test_a_child_that_ignores_being_stopped_is_killed_with_what_it_started() -> None:
    with Child("tests.stubborn", stdout=subprocess.PIPE, grace_seconds=0.5) as child:
        assert child.process.stdout is not None
        grandchild = int(child.process.stdout.readline())
    assert child.poll() == -signal.SIGKILL
    wait_for(lambda: not is_running(grandchild))


def interrupt(process: subprocess.Popen, until: Callable[[], bool]) -> None:
    """Press Ctrl-C again and again."""

    def again() -> bool:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        return until()

    wait_for(again, 60)


def test_a_second_ctrl_c_waits_for_nobody() -> None:
    script = (
        "import subprocess, sys, time\n"
        "from triton_runtime.signals import Stopped, unwind_on_signals\n"
        "from triton_runtime.child import Child\n"
        "unwind_on_signals()\n"
        "try:\n"
        "    with Child('tests.stubborn', grace_seconds=1000):\n"
        "        time.sleep(1000)\n"
        "except Stopped:\n"
        "    print('cleaned up', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    grandchild = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None, "one alone leaves it its time"
    interrupt(process, lambda: process.poll() is not None)
    assert process.returncode in (0, -signal.SIGINT), "one may come when Python itself is ending"
    assert process.stdout.read() == "cleaned up\n"
    wait_for(lambda: not is_running(grandchild))


def test_a_second_ctrl_c_ends_a_triton_that_hangs_and_nothing_of_it_is_left(pristine: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "triton_runtime", "--repository", str(pristine), "--grace-seconds", "1000"]
    environment = {**os.environ, **free_endpoint().to_environment(), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready: ")
    (server,) = (int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.kill(server, signal.SIGSTOP)
    interrupt(process, lambda: process.poll() is not None)
    assert process.returncode in (0, -signal.SIGINT), "one may come when Python itself is ending"
    assert not is_running(server)
    assert list(tmp_path.iterdir()) == []
    assert not list(Path("/dev/shm").glob(f"triton_{process.pid}_*"))


def test_waiting_ends_in_time_and_with_the_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    assert not signals.wait_for_end(process, 0.1)
    signals.kill_group(process)
    assert signals.wait_for_end(process, 0)
