"""Bad drops: refused with their cause, and felt by nobody - not by a running Triton, not by its next cold start."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc

from export import config, doctor, exam
from export.__main__ import main
from export.exam import Rules, Verdict
from export.publish import Examiner, verdict_of
from export.repository import RECORD, Repository
from export.steps import VERDICT
from export.watch import Watcher
from tests import drops
from tests.conftest import EXAMPLES, ROOT, free_endpoint, wait_for
from tests.test_export import SERVING, snapshot
from triton_runtime import server
from triton_runtime.server import TritonServer

PICTURE = EXAMPLES[0].read_bytes()
DROPS_A_START = 10


def watcher_of(repository: Repository, events: list[dict], settle_s: float = 0.0, **rules: float) -> Watcher:
    rules = {"timeout_s": 12, "nice": 0, **rules}
    examiner = Examiner(repository, SERVING, Rules(**rules), golden=drops.golden(repository.root))
    return Watcher(examiner, settle_s, lambda line: events.append(json.loads(line)))


def names(events: list[dict]) -> list[str]:
    return [event["event"] for event in events if event["event"] != "check"]


def drop(repository: Repository, number: int, bias: float = -0.1) -> Path:
    folder = repository.step_folder("tiny", "classifier", number)
    folder.mkdir()
    (folder / "model.onnx").write_bytes(drops.sealed(bias).SerializeToString())
    return folder


def answer(server: TritonServer, release: str = "tiny-v1") -> str:
    """The label of a release, straight from Triton."""
    client = triton_grpc.InferenceServerClient(server.endpoint.grpc_url)
    tensor = triton_grpc.InferInput("IMAGE", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[PICTURE]], np.object_))
    result = client.infer(release, [tensor], client_timeout=30)
    assert result.as_numpy("ERROR")[0, 0] == b""
    return str(result.as_numpy("LABEL")[0, 0].decode())


class Served:
    """A repository that gathers drop after drop, and a Triton on it that is started again after each."""

    def __init__(self, root: Path) -> None:
        self.repository = Repository(root)
        self.events: list[dict] = []
        self.watcher = watcher_of(self.repository, self.events)
        self.visible = self.what_triton_may_see()
        self.start()

    def what_triton_may_see(self) -> dict[str, bytes]:
        files = snapshot(self.repository.root)
        pattern = re.compile(r"[^/]+/config\.pbtxt|tiny_\w+/1/.*|tiny-v1/.*")
        return {name: content for name, content in files.items() if pattern.fullmatch(name)}

    def start(self) -> None:
        self.server = TritonServer(self.repository.root, free_endpoint(), poll_seconds=1)
        self.server.__enter__()
        assert self.server.wait_until_ready() == ["tiny-v1"]

    def start_cold(self) -> None:
        self.kill()
        self.start()

    def kill(self) -> None:
        self.server.process.kill()
        self.server.__exit__()


@pytest.fixture(scope="module")
def served(tiny_only: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served") / "model_repository"
    each = Served(Path(shutil.copytree(tiny_only, root)))
    yield each
    each.kill()


@pytest.mark.parametrize("kind", list(drops.BROKEN))
def test_a_broken_drop_is_refused_with_its_cause_and_hurts_nobody(served: Served, kind: str) -> None:
    """All drops stay, so a cold start has every earlier one to live with: after each few, and at the end."""
    broken = drops.BROKEN[kind]
    number = 1 + max(served.repository.versions("tiny", broken.step))
    folder = served.repository.step_folder("tiny", broken.step, number)
    folder.mkdir()
    broken.make(folder)
    served.events.clear()
    served.watcher.look()  # sees it
    served.watcher.look()  # and, unchanged since, examines it
    assert names(served.events)[-1] == "refused", served.events
    assert re.search(broken.cause, served.events[-1]["cause"])
    if not folder.is_symlink():
        verdict = Verdict.model_validate_json((folder / VERDICT).read_bytes())
        assert verdict.cause == served.events[-1]["cause"]

    assert served.what_triton_may_see() == served.visible
    assert answer(served.server)
    if list(drops.BROKEN).index(kind) % DROPS_A_START == 0:
        served.start_cold()
        assert answer(served.server)


def test_a_good_drop_among_all_the_bad_ones_is_served(served: Served) -> None:
    """Links in a loop and files that cannot be dated are in the way of Triton's poll; releases come through."""
    served.start_cold()
    assert answer(served.server)
    number = 1 + max(served.repository.versions("tiny", "classifier"))
    drop(served.repository, number)
    served.watcher.look()
    served.watcher.look()
    assert names(served.events)[-1] == "published"
    wait_for(lambda: served.server._ready("tiny-v2"))
    assert answer(served.server, "tiny-v2")


def test_the_corpus_is_as_large_as_it_claims() -> None:
    assert len(drops.BROKEN) >= 45


def test_a_refused_drop_is_examined_once_also_after_a_restart_and_again_when_it_changes(tiny: Repository) -> None:
    events: list[dict] = []
    folder = drop(tiny, 2)
    good = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(good[:500])
    watcher = watcher_of(tiny, events)
    for _ in range(4):
        watcher.look()
    assert names(events) == ["seen", "examining", "refused"]
    again = watcher_of(tiny, events)
    for _ in range(3):
        again.look()
    assert names(events) == ["seen", "examining", "refused"]
    (folder / "model.onnx").write_bytes(good)
    for _ in range(3):
        again.look()
    assert names(events)[3:] == ["changed", "examining", "published"]
    assert not (folder / VERDICT).exists()
    assert [r.name for r in tiny.releases("tiny")] == ["tiny-v1", "tiny-v2"]


def test_a_drop_is_left_alone_while_it_is_being_copied(tiny: Repository) -> None:
    """Slowly, in several writes; nothing is examined before it stood still for the time to settle."""
    events: list[dict] = []
    watcher = watcher_of(tiny, events, settle_s=1.0)
    content = drops.sealed().SerializeToString()
    folder = tiny.step_folder("tiny", "classifier", 2)
    folder.mkdir()
    with (folder / "model.onnx").open("wb") as file:
        for start in range(0, len(content), 1 + len(content) // 10):
            file.write(content[start : start + 1 + len(content) // 10])
            file.flush()
            watcher.look()
            time.sleep(0.25)
    assert "examining" not in names(events)
    wait_for(lambda: watcher.look() or "published" in names(events), 30)
    assert tiny.releases("tiny")[-1].steps["classifier"].version == 2


def test_a_drop_that_is_taken_away_is_forgotten(tiny: Repository) -> None:
    events: list[dict] = []
    watcher = watcher_of(tiny, events, settle_s=60)
    folder = drop(tiny, 2)
    watcher.look()
    shutil.rmtree(folder)
    watcher.look()
    assert names(events) == ["seen", "gone"]


def test_several_drops_at_once_become_one_release_each(tiny: Repository) -> None:
    for number, bias in ((2, -0.1), (3, -0.2), (4, -0.3)):
        drop(tiny, number, bias)
    events: list[dict] = []
    watcher = watcher_of(tiny, events)
    watcher.look()
    watcher.look()
    assert [event["release"] for event in events if event["event"] == "published"] == ["tiny-v2", "tiny-v3", "tiny-v4"]
    assert [r.steps["classifier"].version for r in tiny.releases("tiny")] == [1, 2, 3, 4]


def test_what_only_looks_like_a_version_is_named_and_harms_nothing(tiny: Repository, tmp_path: Path) -> None:
    step = tiny.root / "tiny_classifier"
    for stray in ("2.tmp", "1.old", "03", "4 copy"):
        (step / stray).mkdir()
        (step / stray / "model.onnx").write_bytes(b"half")
    events: list[dict] = []
    watcher = watcher_of(tiny, events)
    watcher.look()
    watcher.look()
    assert {event["path"] for event in events} == {
        f"tiny_classifier/{stray}" for stray in ("2.tmp", "1.old", "03", "4 copy")
    }
    assert names(events) == ["stray"] * 4
    assert all(event["cause"].endswith("move it out") for event in events)
    assert any("starts with a digit" in finding.problem for finding in doctor.inspect(tiny.root))
    with TritonServer(tiny.root, free_endpoint(), poll_seconds=1) as server:
        server.wait_until_ready()
        assert answer(server)
        drop(tiny, 5)
        watcher.look()
        watcher.look()
        assert names(events)[-1] == "published"
        wait_for(lambda: server._ready("tiny-v2"))
        assert answer(server, "tiny-v2")


def test_a_full_disk_while_publishing_leaves_all_as_it_was_and_is_tried_again(
    tiny: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[dict] = []
    watcher = watcher_of(tiny, events)
    folder = drop(tiny, 2)
    before = snapshot(tiny.root)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("export.atomic._write", full)
        watcher.look()
        watcher.look()
    assert names(events)[-1] == "trouble"
    assert "No space left" in events[-1]["error"]
    assert snapshot(tiny.root) == before
    os.utime(folder / "model.onnx")  # as if copied once more; by itself it would be tried again after a while
    watcher.look()
    watcher.look()
    assert names(events)[-1] == "published"


def publish_and_die(root: Path, step: int) -> None:
    """Publish what passed its exam, and be killed before one of the calls that change the disk."""
    calls = itertools.count(1)

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return call

    for name in ("rename", "replace", "fsync"):
        setattr(os, name, dying(getattr(os, name)))
    examiner = Examiner(Repository(root), SERVING, Rules())
    examiner.repository.publish(examiner._drop("tiny", {"classifier": 2}), examiner.serving)


def test_killed_at_every_step_of_publishing(tiny: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL before each rename and each flush: a cold start serves what was there, and the watcher finishes."""
    examine, outcomes = exam.examine, list[exam.Outcome]()

    def examine_once(*arguments: Any, **options: Any) -> exam.Outcome:
        if not outcomes:  # it is the same drop each time
            outcomes.append(examine(*arguments, **options))
        return outcomes[0]

    monkeypatch.setattr(exam, "examine", examine_once)
    drop(tiny, 2)
    pristine = Path(shutil.copytree(tiny.root, tiny.root.parent / "pristine"))
    killed, served = 0, set[frozenset[tuple[str, bytes]]]()
    processes = multiprocessing.get_context("forkserver")  # which imports everything once
    processes.set_forkserver_preload([__name__])
    for step in range(1, 100):
        shutil.rmtree(tiny.root)
        shutil.copytree(pristine, tiny.root)
        process = processes.Process(target=publish_and_die, args=(tiny.root, step))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        files = frozenset((str(p), p.read_bytes()) for p in tiny.root.rglob("*") if p.is_file())
        if files not in served:  # a flush changes nothing that Triton sees
            served.add(files)
            with TritonServer(tiny.root, free_endpoint(), poll_seconds=1) as server:
                server.wait_until_ready()
                assert answer(server)
                server.process.kill()
        watcher = watcher_of(Repository(tiny.root), events := [])
        watcher.look()
        watcher.look()
        assert [r.name for r in tiny.releases("tiny")] == ["tiny-v1", "tiny-v2"], events
        assert not [finding for finding in doctor.inspect(tiny.root) if finding.severity == "error"]
    assert killed >= 5


@pytest.mark.parametrize("damage", ["removed", "edited", "truncated"])
def test_a_published_version_that_is_damaged_is_taken_out_of_sight(
    tiny: Repository, damage: str, tmp_path: Path
) -> None:
    """At a cold start it would fail the model, and every release with it."""
    folder = drop(tiny, 2)
    events: list[dict] = []
    watcher = watcher_of(tiny, events)
    watcher.look()
    watcher.look()
    good = (folder / "model.onnx").read_bytes()
    if damage == "removed":
        shutil.rmtree(folder)
    elif damage == "edited":
        (folder / "model.onnx").write_bytes(drops.sealed(-0.4).SerializeToString())
    else:
        (folder / "model.onnx").write_bytes(good[:300])
    watcher.look()
    assert "repaired" in names(events)
    with TritonServer(tiny.root, free_endpoint(), poll_seconds=1) as server:
        wait_for(lambda: server._ready("tiny-v1"))
        assert answer(server, "tiny-v1")
        folder.mkdir(exist_ok=True)
        (folder / "model.onnx").write_bytes(good)
        watcher.look()
        wait_for(lambda: server._ready("tiny-v2"))
        assert answer(server, "tiny-v2")


@pytest.mark.parametrize("where", ["", "data", "data/all"])
def test_a_link_to_a_folder_is_replaced_at_first_sight_by_the_verdict_on_it(tiny: Repository, where: str) -> None:
    """Triton would follow it, perhaps to all of a file system, at each poll."""
    folder = tiny.step_folder("tiny", "classifier", 20)
    link = folder / where
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to("/proc")
    watcher = watcher_of(tiny, events := [])
    for _ in range(3):
        watcher.look()
    assert names(events) == ["refused"]
    assert events[0]["drop"] == "tiny_classifier/20"
    assert events[0]["cause"].startswith(f"files: {link.relative_to(tiny.root)} is a link to /proc: copy")
    assert not link.is_symlink()
    assert folder.is_dir()
    verdict = verdict_of(folder)
    assert verdict is not None and verdict.cause == events[0]["cause"]
    watcher_of(tiny, events).look()
    assert names(events) == ["refused"], "once, also after a restart"

    (folder / "model.onnx").write_bytes(drops.sealed(-0.1).SerializeToString())
    for _ in range(3):
        watcher.look()
    assert names(events)[1:3] == ["changed", "examining"], "what is put in its place is taken for a drop"


def test_the_exam_of_a_drop_that_was_removed_ends_at_once(tiny: Repository) -> None:
    """The next ones wait for it."""
    folder = tiny.step_folder("tiny", "preprocess", 2)
    shutil.copytree(tiny.step_folder("tiny", "preprocess", 1), folder)
    drops.BROKEN["hangs"].make(folder)
    watcher = watcher_of(tiny, events := [], timeout_s=3600)

    def remove_it() -> None:
        wait_for(lambda: "examining" in names(events))
        time.sleep(1)
        shutil.rmtree(folder)

    remover = threading.Thread(target=remove_it)
    remover.start()
    for _ in range(3):
        watcher.look()
    remover.join()
    assert names(events) == ["seen", "examining", "gone"]


def test_a_folder_without_a_configuration_is_named_once_it_stays(tiny: Repository) -> None:
    """Triton fails on it at every poll."""
    watcher = watcher_of(tiny, events := [])
    folder = tiny.root / "notes"
    folder.mkdir()
    watcher.look()
    assert events == [], "it may be on its way"
    for _ in range(3):
        watcher.look()
    assert [(event["event"], event["path"]) for event in events] == [("stray", "notes")]
    folder.rmdir()
    watcher.look()
    folder.mkdir()
    watcher.look()
    watcher.look()
    assert names(events) == ["stray"] * 2


def test_a_drop_with_a_path_that_is_too_long_is_in_nobodys_way(tiny: Repository) -> None:
    folder = tiny.step_folder("tiny", "classifier", 20)
    folder.mkdir()
    here = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(20):  # step by step, since no call takes all of it
            os.mkdir("b" * 250, dir_fd=here)
            below = os.open("b" * 250, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        with open(os.open("deep", os.O_CREAT | os.O_WRONLY, dir_fd=here), "w") as deep:
            deep.write("deep")
    finally:
        os.close(here)
    drop(tiny, 21)
    watcher = watcher_of(tiny, events := [])
    for _ in range(3):
        watcher.look()
    assert "trouble" not in names(events), events
    ends = {event["drop"]: event["event"] for event in events if event["event"] in ("refused", "published")}
    assert ends == {"tiny_classifier/20": "refused", "tiny_classifier/21": "published"}
    server._date_later(tiny.step_folder("tiny", "classifier", 1) / "model.onnx")
    assert any("File name too long" in finding.problem for finding in doctor.inspect(tiny.root))


@pytest.mark.parametrize("where", ["notes", "tiny_classifier/data", "tiny_classifier/1/data", "tiny-v1/data"])
def test_a_link_to_a_folder_is_removed_wherever_it_lies(tiny: Repository, where: str) -> None:
    link = tiny.root / where
    link.symlink_to("/proc")
    watcher = watcher_of(tiny, events := [])
    for _ in range(3):
        watcher.look()
    assert [(event["event"], event["path"]) for event in events] == [("repaired", where)]
    assert events[0]["how"].startswith("the link to /proc is removed")
    assert not link.is_symlink()
    assert tiny.lacks(tiny.releases("tiny")[0]) == {}


def test_a_model_may_lie_elsewhere(tiny: Repository, tmp_path: Path) -> None:
    folder = tiny.root / "tiny_postprocess"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    watcher_of(tiny, events := []).look()
    assert events == []
    assert folder.is_symlink()


@pytest.mark.parametrize(("name", "target"), [("31", "/nonexistent"), ("30", "30"), (".#config.pbtxt", "me@host.1:2")])
def test_a_link_that_leads_nowhere_is_removed_before_it_hides_a_step_from_triton(
    tiny: Repository, name: str, target: str
) -> None:
    link = tiny.root / "tiny_classifier" / name
    link.symlink_to(target)
    assert [f.place for f in doctor.inspect(tiny.root)] == [f"tiny_classifier/{name}"]
    watcher = watcher_of(tiny, events := [])
    watcher.look()
    assert not link.is_symlink()
    text = json.dumps(events)
    assert target in text and ("refused" if name.isdigit() else "repaired") in text
    with TritonServer(tiny.root, free_endpoint(), poll_seconds=1) as server:
        assert server.wait_until_ready() == ["tiny-v1"]


def test_a_drop_that_changes_while_it_is_examined_is_examined_again(
    tiny: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = drop(tiny, 2)
    examine = exam.examine

    def slowly(*arguments: Any, **options: Any) -> Any:
        outcome = examine(*arguments, **options)
        if len(events) < 30:
            drops.BROKEN["truncated"].make(folder)
        return outcome

    monkeypatch.setattr("export.publish.exam.examine", slowly)
    watcher = watcher_of(tiny, events := [])
    for _ in range(5):
        watcher.look()
    said = [name for name in names(events) if name != "check"]
    assert said == ["seen", "examining", "changed", "examining", "refused"]


def test_links_to_folders_are_gone_before_triton_starts(tiny: Repository) -> None:
    """Else it would not come up."""
    link = tiny.step_folder("tiny", "classifier", 20)
    link.symlink_to("/proc")
    command = [sys.executable, "-m", "export", "--if-missing", "--pipeline", "tiny", "--repository", str(tiny.root)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "20 is a link to /proc" in ended.stderr
    assert not link.is_symlink()


def test_what_a_release_pins_may_be_a_link(tiny: Repository, tmp_path: Path) -> None:
    """Somebody moved it to another disk: it is what was published."""
    folder = tiny.step_folder("tiny", "classifier", 1)
    folder.rename(tmp_path / "1")
    folder.symlink_to(tmp_path / "1")
    watcher_of(tiny, events := []).look()
    assert events == []
    assert folder.is_symlink()


# ---- the command, and what a release records ----


def test_force_overrules_a_judgement_loudly_and_is_recorded(
    tiny: Repository, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table leaves words out
    folder = tiny.step_folder("tiny", "classifier", 2)
    folder.mkdir()
    drops.BROKEN["swapped outputs"].make(folder)
    command = ["release", "--pipeline", "tiny", "--classifier", "2", "--repository", str(tiny.root)]
    command += ["--golden", str(drops.golden(tiny.root))]
    assert main(command) == 1
    assert "refused: agreement" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    said = capsys.readouterr()
    assert said.out == "tiny-v2\n"
    assert "FORCED: published although it failed agreement" in said.err
    assert tiny.release("tiny-v2").exam["forced"] is True
    assert main(command) == 0
    assert "tiny-v2 is published already: nothing was examined" in capsys.readouterr().err
    assert main(["status", "--repository", str(tiny.root)]) == 0
    assert "forced" in capsys.readouterr().out


def test_another_pipelines_golden_pictures_are_no_judge_of_agreement(tiny: Repository) -> None:
    """Eight photographs of parcels say nothing of fruit: it may decide there as it likes."""
    folder = tiny.step_folder("tiny", "classifier", 2)
    folder.mkdir()
    drops.BROKEN["swapped outputs"].make(folder)
    said: list[str] = []
    Examiner(tiny, SERVING, Rules(nice=0)).publish_drop("tiny", {"classifier": 2}, said.append)
    assert any(
        line.startswith("ok  agreement: not judged: the golden pictures are another pipeline's") for line in said
    )
    assert "agreement" not in tiny.release("tiny-v2").evaluation


def test_hidden_files_in_a_drop_are_ignored(tiny: Repository) -> None:
    """Finder's, tar's, NFS's, and rsync's while it copies; unreadable, empty, linked or growing as they may be."""
    events: list[dict] = []
    watcher = watcher_of(tiny, events)
    folder = tiny.step_folder("tiny", "classifier", 2)
    folder.mkdir()
    (folder / ".model.onnx.Xk29Qz").write_bytes(b"half")
    watcher.look()
    assert "examining" not in names(events), "nothing is there yet"
    (folder / ".model.onnx.Xk29Qz").unlink()
    for name in (".DS_Store", "._model.onnx", ".nfs000000000123"):
        (folder / name).touch(mode=0o600)
    (folder / ".rsync-partial").mkdir(mode=0o700)
    (folder / ".link").symlink_to("nowhere")
    drops.classifier(lambda _: None)(folder)
    watcher.look()
    watcher.look()
    assert names(events)[-1] == "published", events
    assert (folder / ".DS_Store").stat().st_mode & 0o777 == 0o600
    (folder / ".DS_Store").write_bytes(b"looked at")
    before = len(events)
    watcher.look()
    assert len(events) == before
    assert not tiny.lacks(tiny.release("tiny-v2"))
    assert doctor.main(["--repository", str(tiny.root)]) == 0


def test_force_does_not_overrule_a_fact(tiny: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.step_folder("tiny", "classifier", 2)
    folder.mkdir()
    drops.BROKEN["not a number"].make(folder)
    command = ["release", "--pipeline", "tiny", "--classifier", "2", "--repository", str(tiny.root), "--force"]
    assert main(command) == 1
    assert "answers" in capsys.readouterr().err
    assert len(tiny.releases("tiny")) == 1


def test_steps_that_belong_together_are_one_release(tiny: Repository) -> None:
    """Alone, either would be refused: together they mean the same as before."""
    for step, kind in (("classifier", "swapped outputs"), ("postprocess", "swapped decisions")):
        folder = tiny.step_folder("tiny", step, 2)
        folder.mkdir()
        drops.BROKEN[kind].make(folder)
    command = ["release", "--pipeline", "tiny", "--repository", str(tiny.root)]
    command += ["--golden", str(drops.golden(tiny.root))]
    assert main([*command, "--classifier", "2"]) == 1
    assert main([*command, "--postprocess", "2"]) == 1
    assert main([*command, "--classifier", "2", "--postprocess", "2"]) == 0
    assert {step: pin.version for step, pin in tiny.release("tiny-v2").steps.items()} == {
        "preprocess": 1,
        "classifier": 2,
        "postprocess": 2,
    }


def test_labelled_pictures_decide_on_accuracy(tiny: Repository, tmp_path: Path) -> None:
    def labelled(right: bool) -> Path:
        folder = tmp_path / str(right)
        for path in exam.GOLDEN.iterdir():
            label = next(g.label for g in tiny.release("tiny-v1").golden if g.name == path.name)
            if not right:
                label = "dark" if label == "light" else "light"
            (folder / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / label)
        for label in ("dark", "light"):
            (folder / label).mkdir(exist_ok=True)
        return folder

    drop(tiny, 2, 0.01)
    command = ["release", "--pipeline", "tiny", "--repository", str(tiny.root), "--classifier", "2", "--data"]
    kinds = {golden.label for golden in tiny.release("tiny-v1").golden}
    assert kinds == {"dark", "light"}, "the golden pictures must tell the labels apart"
    assert main([*command, str(labelled(False))]) == 1
    verdict = Verdict.model_validate_json((tiny.step_folder("tiny", "classifier", 2) / VERDICT).read_bytes())
    assert "accuracy: 0.000 of 8 pictures" in verdict.cause
    assert main([*command, str(labelled(True))]) == 0
    assert tiny.release("tiny-v2").evaluation["accuracy"] == 1.0


def test_a_release_carries_its_golden_pictures_and_answers(tiny: Repository) -> None:
    release = tiny.release("tiny-v1")
    assert {golden.name: golden.image for golden in release.golden} == {
        path.name: path.read_bytes() for path in exam.GOLDEN.iterdir()
    }
    for golden in release.golden:
        assert golden.difference(golden.label, golden.scores, 0.0) == ""
        nearly = {label: score + 0.004 for label, score in golden.scores.items()}
        assert golden.difference(golden.label, nearly, release.tolerance) == ""
        off = {label: score + 0.01 for label, score in golden.scores.items()}
        assert f"{golden.name}: " in golden.difference(golden.label, off, release.tolerance)
        assert golden.difference(golden.label, {**golden.scores, "dark": float("nan")}, release.tolerance)
        assert golden.difference(golden.label, {"dark": 1.0}, release.tolerance)


def test_a_graph_can_be_written_for_a_drop(pristine: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    before = snapshot(pristine)
    assert main(["--to", str(target), "--repository", str(pristine)]) == 0
    assert target.read_bytes() == (pristine / "defect_classifier/1/model.onnx").read_bytes()
    assert snapshot(pristine) == before


# ---- retiring ----


def test_a_retired_release_is_gone_its_number_is_not_given_again_and_its_version_is_no_drop(
    tiny: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    drop(tiny, 2)
    watcher = watcher_of(tiny, events := [])
    watcher.look()
    watcher.look()
    routing = tiny.root.parent / "routing.toml"
    routing.write_text('stable = "tiny-v1"\n')
    command = ["retire", "--repository", str(tiny.root), "--routing", str(routing)]
    assert main([*command, "tiny-v1"]) == 1
    assert "routed to (stable)" in capsys.readouterr().err
    assert main([*command, "tiny-v2"]) == 0
    assert [r.name for r in tiny.releases("tiny")] == ["tiny-v1"]
    policy = config.parse((tiny.root / "tiny_classifier/config.pbtxt").read_text()).version_policy.specific
    assert list(policy.versions) == [1]
    for _ in range(3):
        watcher.look()
    assert names(events)[-1] == "published", "the retired version is not examined again"
    assert main(["status", "--repository", str(tiny.root), "--routing", str(routing)]) == 0
    assert "tiny_classifier/2: of tiny-v2, which is not there any more" in capsys.readouterr().out

    drop(tiny, 3, -0.3)
    for _ in range(2):
        watcher.look()
    assert [r.name for r in tiny.releases("tiny")] == ["tiny-v1", "tiny-v3"]
    assert main([*command, "tiny-v2"]) == 1
    assert "there is no release tiny-v2; there is tiny-v1, tiny-v3" in capsys.readouterr().err


@pytest.mark.parametrize("removed", ["tiny-v1", "tiny-v2"])
@pytest.mark.parametrize("record", ["kept", "of earlier exports", "none before"])
def test_what_is_left_of_a_release_that_was_removed_by_hand_is_no_drop(
    tiny: Repository, removed: str, record: str
) -> None:
    """It would come back under a new number, as the newest, and answer everything."""
    drop(tiny, 2)
    watcher = watcher_of(tiny, [])
    watcher.look()
    watcher.look()
    written = tiny.root / RECORD
    assert json.loads(written.read_text()).keys() >= {"tiny-v1", "tiny-v2"}
    if record == "none before":
        written.unlink()
        watcher.look()
    elif record == "of earlier exports":  # of retired releases alone
        known = json.loads(written.read_text())
        written.unlink()
        (tiny.root / "retired.json").write_text(json.dumps({removed: known[removed]}))
    shutil.rmtree(tiny.root / removed)
    restarted = watcher_of(Repository(tiny.root), events := [])
    for _ in range(3):
        restarted.look()
    assert "published" not in names(events)
    assert "examining" not in names(events)
    (left,) = {"tiny-v1", "tiny-v2"} - {removed}
    assert [r.name for r in tiny.releases("tiny")] == [left]
    drop(tiny, 3, -0.3)
    for _ in range(2):
        restarted.look()
    assert [r.name for r in tiny.releases("tiny")] == [left, "tiny-v3"]


def test_the_only_and_the_latest_release_are_not_retired(tiny: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = ["--routing", str(tiny.root / "nowhere.toml"), "--repository", str(tiny.root)]
    with pytest.raises(ValueError, match="only release"):
        tiny.retire("tiny-v1")
    drop(tiny, 2)
    watcher = watcher_of(tiny, [])
    watcher.look()
    watcher.look()
    assert main(["retire", "tiny-v2", *nowhere]) == 1
    assert "is the latest, which answers" in capsys.readouterr().err
    assert main(["retire", "tiny-v1", *nowhere]) == 0


def test_diff_says_what_changed(
    tiny: Repository, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    folder = tiny.step_folder("tiny", "postprocess", 2)
    folder.mkdir()
    drops.python_step("postprocess", {"settings.json": lambda text: text.replace("0.5", "0.45", 1)})(folder)
    command = ["--repository", str(tiny.root)]
    assert main(["release", "--pipeline", "tiny", "--postprocess", "2", *command]) == 0
    capsys.readouterr()
    assert main(["diff", "tiny-v1", "tiny-v2", *command]) == 0
    said = capsys.readouterr().out
    assert re.search(r"tiny_postprocess\s+│ 1 \(\w{8}\)\s+│ 2 \(\w{8}\)", said)
    assert '-    "dark": 0.5,' in said
    assert '+    "dark": 0.45,' in said
    for golden in tiny.release("tiny-v1").golden:
        assert golden.name in said
    assert main(["diff", "tiny-v1", "tiny-v9", *command]) == 1


def test_the_watcher_runs_as_a_command_and_ends_in_order(tiny: Repository) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "export", "watch", "--repository", str(tiny.root), "--settle-s", "0.5"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    timer = threading.Timer(60, process.kill)
    timer.start()
    try:
        drop(tiny, 2)
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "published":
                break
        assert json.loads(line)["release"] == "tiny-v2"
        process.terminate()
        assert process.wait(20) == 0
    finally:
        timer.cancel()
        process.kill()
        process.communicate()
