"""The exam's bounds hold, whatever a candidate starts, holds open or writes; none passes by what it says of itself."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from export import bounded
from export.config import Serving
from export.exam import Rules
from export.publish import Examiner, Refused
from export.repository import Repository
from tests import drops
from tests.conftest import ROOT, wait_for

SERVING = Serving.read(ROOT / "export/serving.toml")
IMPORT = "import json\n"
EXECUTE = '        """Answer each request of a batch on its own."""\n'


def preprocess(repository: Repository, *edits: tuple[str, str]) -> None:
    """Drop version 2 of the preprocessing, with something behind each of these lines of its model.py."""
    folder = repository.step_folder("tiny", "preprocess", 2)
    folder.mkdir()

    def edited(text: str) -> str:
        for line, code in edits:
            text = text.replace(line, line + code, 1)
        return text

    drops.python_step("preprocess", {"model.py": edited})(folder)


def examine(repository: Repository, timeout_s: float = 60, *, force: bool = False) -> str:
    """The name of the release, or why there is none."""
    examiner = Examiner(repository, SERVING, Rules(timeout_s=timeout_s, nice=0), force=force)
    try:
        return examiner.publish_drop("tiny", {"preprocess": 2}, lambda _: None).manifest.name
    except Refused as refusal:
        return str(refusal)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def grandchild(folder: Path, leave: str) -> str:
    """Code that starts a process which lives for a minute, holding all that is open, and says when it was let."""
    return f"""
import os, time
if os.fork() == 0:
    {leave}
    open({str(folder / "pid")!r}, "w").write(str(os.getpid()))
    time.sleep(60)
    open({str(folder / "ended")!r}, "w").close()
    os._exit(0)
while not os.path.exists({str(folder / "pid")!r}):
    time.sleep(0.01)
"""


LEAVING = {
    "in the group": "pass",
    "in a session of its own": "os.setsid()",
    "twice removed": "os.setsid(); os.fork() and os._exit(0)",
    "another program": "os.setsid(); open({pid}, 'w').write(str(os.getpid())); os.execlp('sleep', 'sleep', '60')",
}


@pytest.mark.parametrize("how", LEAVING)
@pytest.mark.parametrize("main", ["ends", "hangs"])
def test_what_a_candidate_leaves_behind_neither_holds_up_the_exam_nor_outlives_it(
    tiny: Repository, tmp_path: Path, how: str, main: str
) -> None:
    leave = LEAVING[how].replace("{pid}", repr(str(tmp_path / "pid")))
    edits = [(IMPORT, grandchild(tmp_path, leave))]
    if main == "hangs":
        edits.append((EXECUTE, "        time.sleep(600)\n"))
    preprocess(tiny, *edits)
    if main == "hangs":
        assert examine(tiny, timeout_s=8).startswith("answers: not done after 8 s")
    else:
        assert examine(tiny) == "tiny-v2"
    assert not (tmp_path / "ended").exists(), "nobody waited for it"
    wait_for(lambda: not is_running(int((tmp_path / "pid").read_text())))
    assert not (tmp_path / "ended").exists()


def writing(data: bytes, then: str = "") -> str:
    """Code that writes into whatever is open beside stdin, stdout and stderr: the exam's protocol is among it."""
    return f"""
import os
for fd in range(3, 30):
    try:
        os.write(fd, {data!r})
    except OSError:
        pass
{then}
"""


PASSED = b'{"begin": "%s"}\n{"check": {"name": "%s", "passed": true, "detail": "fine"}}\n'
FORGED = {
    "no JSON": b"garbage\n",
    "half of JSON": b'{"check": {"name"\n',
    "no object": b"[]\n",
    "an empty object": b"{}\n",
    "no text": b"\xff\xfe\n",
    "nested without end": b"[" * 100_000 + b"\n",
    "a check of another shape": b'{"check": 5}\n',
    "a check before its turn": PASSED % (b"cost", b"cost"),
    "a check a second time": PASSED % (b"graph", b"graph"),
    "a check that is none": PASSED % (b"beauty", b"beauty"),
    "the check in hand": b'{"check": {"name": "load", "passed": true, "detail": "fine"}}\n',
    "a record before its turn": b'{"recorded": {"golden": {}, "evaluation": {}}}\n',
    "a record of another shape": b'{"recorded": 5}\n',
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_line_that_the_exam_does_not_ask_for_is_a_refusal(tiny: Repository, kind: str) -> None:
    preprocess(tiny, (IMPORT, writing(FORGED[kind])))
    cause = examine(tiny)
    assert "the process wrote what the exam does not ask for" in cause
    assert len(tiny.releases("tiny")) == 1


def test_an_end_without_every_check_is_no_pass(tiny: Repository) -> None:
    preprocess(tiny, (IMPORT, "import os; os._exit(0)\n"))
    assert examine(tiny) == "load: the process ended without a word on load"


def test_all_checks_without_a_record_are_no_pass(tiny: Repository) -> None:
    names = (b"answers", b"digest", b"deterministic", b"batching", b"bad pictures", b"agreement", b"accuracy", b"cost")
    rest = b"".join(PASSED % (name, name) for name in names)
    load = b'{"check": {"name": "load", "passed": true, "detail": "fine"}}\n'
    preprocess(tiny, (IMPORT, writing(load + rest, "os._exit(0)")))
    assert examine(tiny) == "cost: the process ended without a record of its answers"
    assert len(tiny.releases("tiny")) == 1


def test_force_does_not_overrule_an_exam_that_did_not_end(tiny: Repository) -> None:
    """Although it broke off in a check that is a matter of judgement."""
    names = (b"answers", b"digest", b"deterministic", b"batching", b"bad pictures", b"agreement", b"accuracy")
    rest = b"".join(PASSED % (name, name) for name in names)
    load = b'{"check": {"name": "load", "passed": true, "detail": "fine"}}\n'
    preprocess(tiny, (IMPORT, writing(load + rest + b'{"begin": "cost"}\n', "os._exit(3)")))
    assert examine(tiny, force=True) == "cost: the process ended with status 3"


@pytest.mark.parametrize("fd", [2, 3])
def test_endless_text_is_bounded_and_a_refusal(tiny: Repository, fd: int) -> None:
    preprocess(tiny, (IMPORT, f"import os\nwhile True: os.write({fd}, b'x' * 65536)\n"))
    cause = examine(tiny, timeout_s=8)
    assert cause.startswith(("load: not done after 8 s", "load: wrote more than 64 MiB"))
    assert len(cause) < 5000


def test_only_the_end_of_what_it_complains_of_is_kept() -> None:
    command = ["sh", "-c", "yes complaint | head -c 5000000 >&2; echo last >&2; exit 7"]
    limits = {"folder": ROOT, "environment": dict(os.environ), "limit": lambda: None}
    ending = bounded.run(command, b"", 60, lambda _: "", **limits)
    assert (ending.status, ending.last) == (7, "last")


def test_it_may_not_start_processes_without_end() -> None:
    """These start nothing themselves, lest a fault of the bound harms the machine."""
    command = ["sh", "-c", "for i in $(seq 300); do sleep 300 & done; wait"]
    limits = {"folder": ROOT, "environment": dict(os.environ), "limit": lambda: None}
    ending = bounded.run(command, b"", 60, lambda _: "", **limits)
    assert (ending.status, ending.stopped) == (None, "had more than 128 processes at once")


def test_every_line_is_taken_also_those_before_a_quick_end() -> None:
    taken: list[bytes] = []
    limits = {"folder": ROOT, "environment": dict(os.environ), "limit": lambda: None}
    command = ["sh", "-c", "cat; seq 50000"]
    ending = bounded.run(command, b"given\n", 60, lambda line: taken.append(line) or "", **limits)
    assert (ending.status, ending.stopped) == (0, "")
    assert taken == [b"given", *(str(i).encode() for i in range(1, 50_001))]


def test_a_fork_bomb_of_the_slow_kind_is_swept_up(tmp_path: Path) -> None:
    """Each process starts its successor, in a session of its own, and ends."""
    # It ends at some time: should this run be killed, nobody is left to end it.
    once = " os.fork() and os._exit(0)\n os.setsid()\n time.sleep(.1)\n"
    script = f"import os, time\nend = time.time() + 120\nwhile time.time() < end:\n{once}"
    # As in an exam, where what examines goes before what is examined.
    limits = {"folder": ROOT, "environment": {**os.environ, "WHO": str(tmp_path)}, "limit": lambda: os.nice(10)}
    bounded.run([sys.executable, "-c", script], b"", 1, lambda _: "", **limits)

    def left() -> list[str]:
        found = []
        for each in Path("/proc").glob("[0-9]*"):
            try:
                if str(tmp_path).encode() in (each / "environ").read_bytes():
                    found.append(each.name)
            except OSError:
                continue
        return found

    for _ in range(5):
        assert not left()
        time.sleep(0.1)
