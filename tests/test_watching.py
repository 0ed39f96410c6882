"""The watcher outlives what it meets: one pipeline's or one drop's trouble is said, and is nobody else's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError

from export import doctor, exam
from export.__main__ import main
from export.publish import Examiner, verdict_of
from export.repository import Repository, RepositoryError
from export.steps import VERDICT
from tests.conftest import ROOT
from tests.drops import python_step
from tests.test_drops import drop, names, watcher_of


@pytest.fixture
def two(tiny: Repository) -> Repository:
    """A second pipeline, `aside`, which is looked at before `tiny`."""
    for path in sorted(tiny.root.glob("tiny*")):
        copy = Path(shutil.copytree(path, tiny.root / path.name.replace("tiny", "aside")))
        config = copy / "config.pbtxt"
        config.write_text(config.read_text().replace("tiny", "aside"))
    assert tiny.pipelines() == ["aside", "tiny"]
    return tiny


def nonsense(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text("nonsense {")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a step's configuration is nonsense": nonsense("aside_preprocess/config.pbtxt"),
    "the classifier's configuration is nonsense": nonsense("aside_classifier/config.pbtxt"),
    "a release's configuration is nonsense": nonsense("aside-v1/config.pbtxt"),
    "a configuration is no text": lambda root: (root / "aside-v1/config.pbtxt").write_bytes(b"\xff\xfe\x00"),
    "a configuration is nested without end": lambda root: (root / "aside_postprocess/config.pbtxt").write_text(
        "ensemble_scheduling { step { " + "input_map { " * 50_000
    ),
    "a release has no manifest": lambda root: (root / "aside-v1/config.pbtxt").write_text('name: "aside-v1"\n'),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_broken_pipeline_is_said_once_and_holds_up_no_other(
    two: Repository, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    DAMAGES[kind](two.root)
    drop(two, 2)
    watcher = watcher_of(two, events := [])
    for _ in range(4):
        watcher.look()
    assert names(events).count("published") == 1, events
    troubles = [event for event in events if event["event"] == "trouble"]
    assert {event["pipeline"] for event in troubles} == {"aside"}
    assert all("config.pbtxt" in event["error"] for event in troubles)
    said = [(event["pipeline"], event["error"]) for event in troubles]
    watcher.look()
    assert [(e["pipeline"], e["error"]) for e in events if e["event"] == "trouble"] == said, "once"

    monkeypatch.setenv("COLUMNS", "200")
    assert main(["status", "--repository", str(two.root)]) == 1
    shown = capsys.readouterr().out
    assert "tiny-v2" in shown
    assert "error: aside: " in shown
    assert main(["doctor", "--repository", str(two.root)]) == 1
    assert "config.pbtxt" in capsys.readouterr().out


def test_a_step_that_cannot_be_repaired_keeps_no_other_step_from_it(two: Repository) -> None:
    """A damaged version beside it would fail every release at the next cold start."""
    drop(two, 2)
    watcher = watcher_of(two, events := [])
    watcher.look()
    watcher.look()
    nonsense("tiny_preprocess/config.pbtxt")(two.root)
    (two.step_folder("tiny", "classifier", 2) / "model.onnx").write_bytes(b"half")
    watcher.look()
    (repaired,) = (event for event in events if event["event"] == "repaired")
    assert repaired["path"] == "tiny_classifier/config.pbtxt"
    assert "tiny_classifier/2 is edited" in repaired["how"]
    assert any("tiny_preprocess/config.pbtxt" in event.get("error", "") for event in events)


ERRORS = [MemoryError(), RecursionError("too deep"), DecodeError("Error parsing message"), RuntimeError("odd")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["looked at", "examined", "repaired"])
def test_whatever_goes_wrong_with_a_drop_is_said_once_and_the_next_is_looked_at(
    two: Repository, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    drop(two, 2)
    drop(two, 3, -0.3)

    def failing(real: Callable, is_it: Callable[..., bool]) -> Callable:
        def call(*arguments: object) -> object:
            if is_it(*arguments):
                raise error
            return real(*arguments)

        return call

    if where == "looked at":
        monkeypatch.setattr(exam, "state_of", failing(exam.state_of, lambda folder: folder.name == "2"))
    elif where == "examined":
        is_it = lambda _self, _pipeline, numbers, _report: numbers == {"classifier": 2}  # noqa: E731
        monkeypatch.setattr(Examiner, "publish_drop", failing(Examiner.publish_drop, is_it))
    else:
        is_it = lambda _self, pipeline: pipeline == "aside"  # noqa: E731
        monkeypatch.setattr(Repository, "reconcile", failing(Repository.reconcile, is_it))
    monkeypatch.setattr("export.watch._RETRY_S", 0.0)
    watcher = watcher_of(two, events := [])
    for _ in range(4):
        watcher.look()
    (trouble,) = (event for event in events if event["event"] == "trouble")
    assert type(error).__name__ in trouble["error"]
    assert str(error) in trouble["error"]
    if where == "repaired":
        assert trouble["pipeline"] == "aside"
        assert names(events).count("published") == 2
    else:
        assert trouble["drop"] == "tiny_classifier/2"
        assert [e["drop"] for e in events if e["event"] == "published"] == ["tiny_classifier/3"]


def test_one_drop_that_cannot_be_read_is_no_other_ones_trouble(
    tiny: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are retired releases, whose versions are told from drops by their content."""
    drop(tiny, 2)
    watcher = watcher_of(tiny, events := [])
    watcher.look()
    watcher.look()
    drop(tiny, 3, -0.3)
    watcher.look()
    watcher.look()
    tiny.retire("tiny-v2")
    drop(tiny, 4, -0.5)
    drop(tiny, 5, -0.6)
    real = Repository._digest

    def too_large(self: Repository, folder: Path) -> str:
        if folder.name == "4":
            raise MemoryError
        return real(self, folder)

    monkeypatch.setattr(Repository, "_digest", too_large)
    watcher.look()
    watcher.look()
    assert "tiny_classifier/5" in [event["drop"] for event in events if event["event"] == "published"]


def test_it_ends_where_nobody_takes_what_it_says(tiny: Repository) -> None:
    drop(tiny, 2)
    watcher = watcher_of(tiny, [])

    def closed(_: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    watcher._say = closed
    with pytest.raises(SystemExit, match="Broken pipe"):
        watcher.follow(0)


def test_the_command_ends_when_its_output_is_closed(tiny: Repository) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    drop(tiny, 2)
    process = subprocess.Popen(
        [sys.executable, "-m", "export", "watch", "--repository", str(tiny.root)],
        cwd=ROOT,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert errors.splitlines() == ["watch: cannot say what happens: [Errno 32] Broken pipe"]


def test_doctor_looks_at_the_other_models_where_one_cannot_be_looked_at(
    two: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    (two.root / "tiny_classifier/2.tmp").mkdir()
    real = doctor._folder

    def failing(folder: Path) -> object:
        if folder.name == "aside_classifier":
            raise MemoryError
        return real(folder)

    monkeypatch.setattr(doctor, "_folder", failing)
    problems = {finding.place: finding.problem for finding in doctor.inspect(two.root)}
    assert problems["aside_classifier"] == "cannot be looked at: MemoryError"
    assert "starts with a digit" in problems["tiny_classifier/2.tmp"]


def test_a_file_in_the_staging_folder_is_in_nobodys_way(tiny: Repository) -> None:
    staging = tiny.root.parent / f".{tiny.root.name}.staging"
    staging.mkdir(exist_ok=True)
    (staging / "notes.txt").write_text("x")
    drop(tiny, 2)
    watcher = watcher_of(tiny, events := [])
    watcher.look()
    watcher.look()
    assert names(events)[-1] == "published", json.dumps(events)


def test_a_pipe_where_a_file_should_be_is_waited_for_by_nobody(tiny: Repository) -> None:
    folder = tiny.step_folder("tiny", "classifier", 1)
    os.mkfifo(folder / VERDICT)
    assert verdict_of(folder) is None
    config = tiny.root / "tiny_classifier" / "config.pbtxt"
    config.unlink()
    os.mkfifo(config)
    tiny.reconcile("tiny")
    with pytest.raises(RepositoryError, match="no plain file"):
        tiny.size("tiny")


def test_a_name_that_is_no_text_is_refused(tiny: Repository) -> None:
    folder = drop(tiny, 2)
    (folder / os.fsdecode(b"weights-\xff.bin")).write_bytes(b"x")
    watcher = watcher_of(tiny, events := [])
    watcher.look()
    watcher.look()
    assert names(events)[-1] == "refused", json.dumps(events)
    assert r"weights-\xff.bin" in events[-1]["cause"]


def test_a_drop_that_kills_its_examiner_is_refused_and_the_others_are_published(tiny: Repository) -> None:
    folder = tiny.step_folder("tiny", "preprocess", 2)
    folder.mkdir()
    kill = "\nimport os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n"
    python_step("preprocess", {"model.py": lambda text: text + kill})(folder)
    drop(tiny, 2)  # looked at later
    command = [sys.executable, "-m", "export", "watch", "--repository", str(tiny.root), "--settle-s", "0"]
    for _ in range(3):
        assert verdict_of(folder) is None or verdict_of(folder).is_open
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    watcher = watcher_of(tiny, events := [])
    watcher.look()
    watcher.look()
    (refused,) = (event for event in events if event["event"] == "refused")
    assert refused["drop"] == "tiny_preprocess/2"
    assert "its exam began 3 times and has not ended" in refused["cause"]
    assert names(events)[-1] == "published"
    (folder / "model.py").write_text((folder / "model.py").read_text().removesuffix(kill) + "\n# mended\n")
    watcher.look()
    watcher.look()
    assert names(events)[-1] == "published", json.dumps(events)
    assert verdict_of(folder) is None


def test_what_stopped_an_exam_and_was_no_verdict_leaves_none(tiny: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = drop(tiny, 2)

    def stopped(*_: object, **__: object) -> None:
        assert verdict_of(folder).is_open
        raise KeyboardInterrupt

    monkeypatch.setattr(exam, "examine", stopped)
    watcher = watcher_of(tiny, [])
    with pytest.raises(KeyboardInterrupt):
        watcher.look()
    assert verdict_of(folder) is None


def test_a_signal_that_is_lost_on_its_way_ends_it_nevertheless(tiny: Repository) -> None:
    watcher = watcher_of(tiny, [])

    def look() -> None:
        with contextlib.suppress(KeyboardInterrupt):  # as Python does in a destructor
            watcher.stop()

    watcher.look = look
    watcher.follow(0)
