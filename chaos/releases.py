"""A repository with a second release, whose preprocessing is a version of its own and can be ended by a picture."""

from __future__ import annotations

import shutil
from pathlib import Path

from export import config
from export.candidate import Candidate
from export.repository import Repository
from export.steps import Step
from harness import ROOT

_FUSE = b"chaos: end this process"
_CODE = '''

_as_trained = preprocess


def preprocess(data, size):
    """As above, but for a picture that ends this process."""
    import os
    if data.endswith({fuse!r}):
        with open({log!r}, "ab") as log:
            log.write(b"x")
        os.kill(os.getpid(), 9)
    return _as_trained(data, size)
'''


def poisoned(picture: bytes) -> bytes:
    """The same picture, but it ends the process of the second release that prepares it."""
    return picture + _FUSE


class Pair:
    """A copy of `repository` in `folder` with its newest release and another one that answers alike.

    Attributes:
        root: the copy.
        sound, other: the names of the two releases.
    """

    def __init__(self, repository: Path, folder: Path, pipeline: str) -> None:
        self.root = Path(shutil.copytree(repository, folder / "model_repository"))
        self._log = folder / "deaths"
        copy = Repository(self.root)
        sound = copy.releases(pipeline)[-1]
        steps = {name: Step.read(copy.step_folder(pipeline, name, pin.version)) for name, pin in sound.steps.items()}
        found = {name: step for name, step in steps.items() if step is not None}
        code = found["preprocess"].files["preprocessing.py"] + _CODE.format(fuse=_FUSE, log=str(self._log)).encode()
        candidate = Candidate(
            pipeline=pipeline,
            labels=sound.labels,
            size=copy.size(pipeline),
            steps={**found, "preprocess": found["preprocess"].with_file("preprocessing.py", code)},
            built_from=f"{sound.name}, with a fuse",
            evaluation=sound.evaluation,
            exam=sound.exam,
            golden=sound.golden,
            tolerance=sound.tolerance,
        )
        self.sound = sound.name
        self.other = copy.publish(candidate, config.Serving.read(ROOT / "export" / "serving.toml")).manifest.name

    def drop(self, number: int, code: str, mode: int) -> Path:
        """Put another version of preprocessing beside the others: the sound one's, with `code` at its end."""
        repository = Repository(self.root)
        sound = repository.release(self.sound)
        folder = repository.step_folder(sound.pipeline, "preprocess", sound.steps["preprocess"].version)
        drop = Path(shutil.copytree(folder, folder.with_name(str(number))))
        with (drop / "preprocessing.py").open("a") as file:
            file.write(f"\n{code}\n")
        for path in drop.iterdir():
            path.chmod(mode)
        return drop

    def deaths(self) -> int:
        """How many processes were ended by a picture until now."""
        return self._log.stat().st_size if self._log.exists() else 0
