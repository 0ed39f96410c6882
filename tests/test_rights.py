"""What is published can be read by everybody, whoever wrote it and however: Triton is somebody else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest

from export import doctor, rights
from export.__main__ import main
from export.build import from_onnx
from export.exam import Rules
from export.publish import Examiner
from export.repository import Repository
from tests import drops
from tests.conftest import ROOT
from tests.test_drops import drop, names, watcher_of
from tests.test_export import SERVING

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def private() -> Iterator[None]:
    """A user who keeps everything to herself."""
    before = os.umask(0o077)
    yield
    os.umask(before)


def require_readable_by_somebody_else(root: Path) -> None:
    """By the bits; and, where this user may become another one, by reading all of it as `nobody`."""
    assert rights.closed(root) == []
    if os.geteuid() != 0:
        return
    for _ in range(5):  # beside other tests tar died of SIGSEGV three times, which says nothing of what it may read
        status = subprocess.run(["tar", "-cf", "/dev/null", "."], cwd=root, user=NOBODY, group=NOBODY).returncode
        if status >= 0:
            break
    assert status == 0


CLOSED: dict[str, Callable[[Path], object]] = {
    "a file": lambda folder: (folder / "model.onnx").chmod(0o600),
    "a file that the group may read": lambda folder: (folder / "model.onnx").chmod(0o640),
    "a folder": lambda folder: folder.chmod(0o700),
    "a folder that can be listed and not entered": lambda folder: folder.chmod(0o754),
    "both": lambda folder: [(folder / "model.onnx").chmod(0o400), folder.chmod(0o700)],
}


@pytest.mark.parametrize("kind", CLOSED)
def test_a_drop_that_others_cannot_read_is_opened_before_it_is_published(tiny: Repository, kind: str) -> None:
    folder = drop(tiny, 2)
    CLOSED[kind](folder)
    watcher = watcher_of(tiny, events := [])
    for _ in range(3):
        watcher.look()
    assert names(events)[-1] == "published", events
    assert {"repaired"} <= set(names(events))
    require_readable_by_somebody_else(tiny.root)
    assert [finding for finding in doctor.inspect(tiny.root) if finding.severity == "error"] == []


def test_a_file_that_is_linked_elsewhere_is_not_opened_there_too(tiny: Repository, tmp_path: Path) -> None:
    private = tmp_path / "private"
    folder = drop(tiny, 2)
    os.link(folder / "model.onnx", private)
    private.chmod(0o600)
    watcher = watcher_of(tiny, events := [])
    for _ in range(3):
        watcher.look()
    assert private.stat().st_mode & 0o777 == 0o600
    assert f"chmod -R a+rX {folder}" in next(event["cause"] for event in events if event["event"] == "refused")


def test_a_refused_drop_of_other_rights_is_examined_once(tiny: Repository) -> None:
    folder = drop(tiny, 2)
    (folder / "model.onnx").write_bytes(b"half")
    (folder / "model.onnx").chmod(0o600)
    watcher = watcher_of(tiny, events := [])
    for _ in range(4):
        watcher.look()
    assert names(events).count("examining") == 1
    again = watcher_of(tiny, events)
    again.look()
    assert names(events)[-1] == "refused"


def test_a_drop_that_cannot_be_opened_is_refused_and_taken_once_somebody_did(
    tiny: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = drop(tiny, 2)
    CLOSED["both"](folder)
    watcher = watcher_of(tiny, events := [])
    with monkeypatch.context() as patch:
        _forbid_changes(patch)
        watcher.look()
        watcher.look()
    assert names(events)[-1] == "refused"
    assert f"chmod -R a+rX {folder}" in events[-1]["cause"]
    assert events[-1]["cause"].startswith("files: tiny_classifier/2")
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
    watcher.look()
    watcher.look()
    assert names(events)[-1] == "published"


def _forbid_changes(patch: pytest.MonkeyPatch) -> None:
    """As for a user who is not the owner."""

    def forbidden(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(self))

    patch.setattr(Path, "chmod", forbidden)


def test_what_is_written_can_be_read_whatever_the_umask(
    pristine: Path, tmp_path: Path, private: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new pipeline with its folders, a release, a retired one, a verdict, and the command."""
    root = tmp_path / "made" / "model_repository"
    shutil.copytree(pristine, root)
    root.chmod(0o700)
    (root / "defect-v1").chmod(0o700)
    (root / "defect_classifier/1/model.onnx").chmod(0o600)
    repository = Repository(root)
    onnx.save(drops.network(0.0), tmp_path / "tiny.onnx")
    built = from_onnx(tmp_path / "tiny.onnx", drops.SPEC, repository, lambda _: None)
    examiner = Examiner(repository, SERVING, Rules(nice=0))
    examiner.publish(built, lambda _: None)
    for place in sorted(root.glob("tiny*")):
        assert rights.closed(place) == []
    drop(repository, 2)
    examiner.publish_drop("tiny", {"classifier": 2}, lambda _: None)
    repository.retire("tiny-v1")
    drop(repository, 3)  # what 2 holds already
    assert main(["release", "--pipeline", "tiny", "--classifier", "3", "--repository", str(root)]) == 1
    assert (repository.step_folder("tiny", "classifier", 3) / "verdict.json").exists()
    assert main(["--if-missing", "--repository", str(root)]) == 0
    require_readable_by_somebody_else(root)


def test_the_verdict_of_a_closed_folder_can_be_written(tiny: Repository, private: None) -> None:
    folder = drop(tiny, 2)
    (folder / "model.onnx").write_bytes(b"half")
    watcher = watcher_of(tiny, [])
    watcher.look()
    watcher.look()
    assert rights.closed(folder) == []


@pytest.mark.parametrize(
    "place",
    [
        *("tiny_classifier/1/model.onnx", "tiny_preprocess/1", "tiny_postprocess", "tiny_classifier/config.pbtxt"),
        *("tiny-v1", "tiny-v1/config.pbtxt", "tiny-v1/1", "."),
    ],
)
def test_what_was_closed_after_it_was_published_is_opened_and_said(tiny: Repository, place: str) -> None:
    path = tiny.root / place
    path.chmod(path.stat().st_mode & 0o700)
    before = (tiny.root / "tiny_classifier/config.pbtxt").read_bytes()
    assert any(rights.WHY in finding.problem for finding in doctor.inspect(tiny.root) if finding.severity == "error")
    watcher = watcher_of(tiny, events := [])
    watcher.look()
    watcher.look()
    assert [(event["event"], event["path"], event["how"]) for event in events] == [
        ("repaired", place, "everybody may read it now")
    ]
    require_readable_by_somebody_else(tiny.root)
    assert (tiny.root / "tiny_classifier/config.pbtxt").read_bytes() == before


def test_what_cannot_be_opened_is_taken_out_of_sight_and_comes_back(
    tiny: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a cold start it would fail every release; so it fails the one that pins it."""
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table leaves words out
    folder = drop(tiny, 2)
    watcher = watcher_of(tiny, events := [])
    watcher.look()
    watcher.look()
    (folder / "model.onnx").chmod(0o600)
    events.clear()
    shown = tiny.root / "tiny_classifier/config.pbtxt"
    with monkeypatch.context() as patch:
        _forbid_changes(patch)
        patch.setattr("export.repository.rights.open_up", _not_ours)
        for _ in range(3):
            watcher.look()
        assert names(events) == ["repaired", "trouble"]
        assert events[0]["how"] == "shows what is sound; tiny_classifier/2 is unreadable"
        assert f"chmod -R a+rX {folder / 'model.onnx'}" in events[1]["error"]
        assert "versions: 2" not in shown.read_text()
        assert main(["status", "--repository", str(tiny.root)]) == 1
        assert "unreadable" in capsys.readouterr().out
        assert tiny.newest("tiny") == tiny.release("tiny-v1"), "nothing is built on it"
    (folder / "model.onnx").chmod(0o644)
    watcher.look()
    assert "versions: 2" in shown.read_text()
    assert names(events)[2:] == ["repaired"]


def _not_ours(place: Path, **_: object) -> list[Path]:
    if rights.closed(place):
        raise PermissionError(1, "Operation not permitted", str(place))
    return []


DOCTORED = {
    "a file": ("defect_classifier/1/model.onnx", 0o640),
    "a version": ("defect_preprocess/1", 0o750),
    "a model's folder": ("defect_postprocess", 0o711),
    "a configuration": ("defect-v1/config.pbtxt", 0o600),
    "the repository": (".", 0o700),
}


@pytest.mark.parametrize("kind", DOCTORED)
def test_doctor_looks_at_what_others_may_not_at_what_it_may(
    repository: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place, mode = DOCTORED[kind]
    (repository / place).chmod(mode)
    assert main(["doctor", "--repository", str(repository)]) == 1
    said = capsys.readouterr().out
    assert f"error: {place}: {rights.WHY}; chmod -R a+rX " in said


def test_doctor_warns_of_a_closed_folder_above(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository.parent.chmod(0o700)
    assert main(["doctor", "--repository", str(repository)]) == 0
    assert f"warning: {repository.parent}: others cannot enter it" in capsys.readouterr().out


UNPRIVILEGED = """
import sys
from pathlib import Path
from tests.conftest import free_endpoint, wait_for
from triton_runtime.server import TritonServer
with TritonServer(Path(sys.argv[1]), free_endpoint(), poll_seconds=1) as server:
    for release in ("tiny-v1", "tiny-v2", "tiny-v3"):
        wait_for(lambda: server._ready(release), 120)
        print("ready:", release, flush=True)
"""


@as_root
@pytest.mark.skipif(not shutil.which("setpriv"), reason="util-linux is missing")
def test_a_real_triton_that_may_not_read_everything_serves_what_was_published(tiny: Repository, tmp_path: Path) -> None:
    """The drop is another user's, and private; Triton lacks what lets root read that."""
    folder = drop(tiny, 2)
    CLOSED["both"](folder)
    for path in (folder, folder / "model.onnx"):
        os.chown(path, NOBODY, NOBODY)
    unopened = drop(tiny, 3, -0.3)  # not examined yet: Triton does not see it, and goes on to follow what it sees
    CLOSED["both"](unopened)
    os.chown(unopened, NOBODY, NOBODY)
    examiner = Examiner(tiny, SERVING, Rules(nice=0))
    examiner.publish_drop("tiny", {"classifier": 2}, lambda _: None)
    drop(tiny, 4, -0.5)
    command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-c", UNPRIVILEGED]
    with (tmp_path / "log").open("w+") as log:
        output = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
        with subprocess.Popen([*command, str(tiny.root)], cwd=ROOT, **output) as process:
            lines = (line for line in process.stdout if line.startswith("ready"))
            try:
                for release in ("tiny-v1", "tiny-v2"):
                    assert next(lines, None) == f"ready: {release}\n", (tmp_path / "log").read_text()[-2000:]
                examiner.publish_drop("tiny", {"classifier": 4}, lambda _: None)
                assert next(lines, None) == "ready: tiny-v3\n"
            finally:
                process.terminate()
