"""Two who publish or retire at once: whoever is later builds on what the other one did, and undoes nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from export import publish
from export.__main__ import main
from export.exam import Rules
from export.publish import Examiner, Refused
from export.repository import Overtaken, Repository
from export.steps import Step
from tests import drops
from tests.conftest import ROOT
from tests.test_drops import drop
from tests.test_export import SERVING

SPEC = "[input]\nsize = 64\nscale = 0.00392156862745098\n"


def examiner_of(repository: Repository) -> Examiner:
    """As a process of its own would have it."""
    return Examiner(Repository(repository.root), SERVING, Rules(nice=0))


def other_preprocessing(repository: Repository, number: int = 2) -> None:
    folder = repository.step_folder("tiny", "preprocess", number)
    folder.mkdir()
    drops.python_step("preprocess", {"model.py": lambda text: text + f"# {number}\n"})(folder)


def pins(repository: Repository, name: str) -> dict[str, int]:
    return {step: pin.version for step, pin in repository.release(name).steps.items()}


class Meeting:
    """Reports of several exams, none of which goes on after its first check before all are there."""

    def __init__(self, parties: int) -> None:
        self._barrier = threading.Barrier(parties, timeout=60)
        self.lines: list[str] = []

    def report(self) -> Callable[[str], None]:
        first = iter([True])

        def say(line: str) -> None:
            self.lines.append(line)
            if next(first, False):
                self._barrier.wait()

        return say


def test_two_drops_at_once_are_both_in_the_later_release(tiny: Repository) -> None:
    drop(tiny, 2)
    other_preprocessing(tiny)
    meeting = Meeting(2)
    with ThreadPoolExecutor(2) as pool:
        for numbers in ({"classifier": 2}, {"preprocess": 2}):
            pool.submit(examiner_of(tiny).publish_drop, "tiny", numbers, meeting.report())
    assert [each.name for each in tiny.releases("tiny")] == ["tiny-v1", "tiny-v2", "tiny-v3"]
    assert pins(tiny, "tiny-v3") == {"preprocess": 2, "classifier": 2, "postprocess": 1}
    again = [line for line in meeting.lines if line.startswith("AGAIN")]
    why = "tiny-v2 is the newest now, and this was put together with tiny-v1"
    assert again == [f"AGAIN: {why}; it is put together and examined again"]
    assert tiny.release("tiny-v3").built_from in ("tiny_classifier/2", "tiny_preprocess/2")


def test_two_commands_at_once_lose_nothing(tiny: Repository) -> None:
    """The same with processes, as two people would; which of them is the later one, nobody knows."""
    drop(tiny, 2)
    other_preprocessing(tiny)
    command = [sys.executable, "-m", "export", "release", "--pipeline", "tiny", "--repository", str(tiny.root)]
    steps = (["--classifier", "2"], ["--preprocess", "2"])
    processes = [subprocess.Popen([*command, *step], cwd=ROOT, stderr=subprocess.DEVNULL) for step in steps]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert pins(tiny, "tiny-v3") == {"preprocess": 2, "classifier": 2, "postprocess": 1}


def test_a_drop_does_not_bring_back_what_was_retired_meanwhile(tiny: Repository) -> None:
    other_preprocessing(tiny)
    examiner_of(tiny).publish_drop("tiny", {"preprocess": 2}, lambda _: None)
    drop(tiny, 2)
    retiring = iter([True])

    def report(_: str) -> None:
        if next(retiring, False):
            Repository(tiny.root).retire("tiny-v2")

    published = examiner_of(tiny).publish_drop("tiny", {"classifier": 2}, report).manifest
    assert published.name == "tiny-v3"
    assert pins(tiny, "tiny-v3") == {"preprocess": 1, "classifier": 2, "postprocess": 1}


def test_the_same_content_dropped_twice_is_one_release(tiny: Repository) -> None:
    drop(tiny, 2)
    drop(tiny, 3)
    meeting = Meeting(2)
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(examiner_of(tiny).publish_drop, "tiny", {"classifier": number}, meeting.report())
            for number in (2, 3)
        ]
        refusals = [error for run in runs if (error := run.exception())]
    assert [each.name for each in tiny.releases("tiny")] == ["tiny-v1", "tiny-v2"]
    assert [type(refusal) for refusal in refusals] == [Refused]
    assert "tiny-v2 serves it" in str(refusals[0])


def test_an_export_takes_the_code_that_was_published_while_it_was_examined(
    tiny: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_preprocessing(tiny)
    onnx.save(drops.network(-0.2), tmp_path / "tiny.onnx")
    (tmp_path / "tiny.toml").write_text('name = "tiny"\nlabels = ["dark", "light"]\n' + SPEC)
    publishing = iter([True])
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        if line.startswith("ok  files") and next(publishing, False):
            examiner_of(tiny).publish_drop("tiny", {"preprocess": 2}, lambda _: None)

    monkeypatch.setattr(publish, "reporter", lambda _: report)
    options = ["--onnx", str(tmp_path / "tiny.onnx"), "--spec", str(tmp_path / "tiny.toml")]
    assert main([*options, "--repository", str(tiny.root)]) == 0
    assert pins(tiny, "tiny-v3") == {"preprocess": 2, "classifier": 2, "postprocess": 1}
    assert sum(line.startswith("AGAIN: tiny-v2 is the newest now") for line in lines) == 1


def test_what_is_retired_at_that_moment_is_not_published_again_unexamined(
    tiny: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A candidate that is a release already needs no exam; one that just stopped to be one does."""
    drop(tiny, 2)
    examiner = examiner_of(tiny)
    examiner.publish_drop("tiny", {"classifier": 2}, lambda _: None)
    drop(tiny, 3, -0.3)
    examiner.publish_drop("tiny", {"classifier": 3}, lambda _: None)
    candidate = examiner._drop("tiny", {"classifier": 2})
    real = Repository.published

    def retired_at_once(self: Repository, of: object) -> object:
        found = real(self, of)  # type: ignore[arg-type]
        self.retire("tiny-v2")
        return found

    monkeypatch.setattr(Repository, "published", retired_at_once)
    with pytest.raises(Overtaken):
        examiner.publish(candidate, lambda _: None)
    assert [each.name for each in tiny.releases("tiny")] == ["tiny-v1", "tiny-v3"]


def test_who_is_overtaken_again_and_again_gives_up_and_says_so(tiny: Repository) -> None:
    def overtaken() -> None:
        raise Overtaken("tiny-v9 is the newest now")

    lines: list[str] = []
    with pytest.raises(Overtaken, match="tiny-v9"):
        publish.until_current(overtaken, lines.append)  # type: ignore[arg-type]
    assert len(lines) == 4


def test_of_two_who_retire_the_second_is_asked_about_what_the_first_left(tiny: Repository) -> None:
    """Whether a release is the latest is decided while nobody else can publish or retire."""
    drop(tiny, 2)
    examiner_of(tiny).publish_drop("tiny", {"classifier": 2}, lambda _: None)
    inside, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        inside.set()
        assert go_on.wait(60)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(Repository(tiny.root).retire, "tiny-v1", slow)
        assert inside.wait(60)
        second = pool.submit(main, ["retire", "tiny-v2", "--repository", str(tiny.root), "--routing", "/nowhere"])
        go_on.set()
        assert first.result().name == "tiny-v1"
        assert second.result() == 1
    assert [each.name for each in tiny.releases("tiny")] == ["tiny-v2"]


def test_a_number_that_a_retired_release_pinned_is_not_given_again(tiny: Repository) -> None:
    """Also when somebody removed the version's folder since: a number names one content forever."""
    drop(tiny, 2)
    examiner_of(tiny).publish_drop("tiny", {"classifier": 2}, lambda _: None)
    tiny.retire("tiny-v2")
    shutil.rmtree(tiny.step_folder("tiny", "classifier", 2))
    candidate = examiner_of(tiny)._drop("tiny", {})
    new = replace(candidate, numbers={}, steps={**candidate.steps, "classifier": Step.of_graph(drops.sealed(-0.3))})
    published = examiner_of(tiny).publish(new, lambda _: None).manifest
    assert published.steps["classifier"].version == 3
