"""Links to folders among what was dropped: replaced at first sight, because Triton follows them.

At each poll Triton dates a model by everything below its folder, through links. With one that leads to a large tree
it answers nothing until the walk is over, and a server that starts does not come up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import contract
from export import exam
from export.exam import Verdict
from export.exam_worker import Check
from export.publish import write_verdict
from export.repository import Repository


def refuse(repository: Repository, pipeline: str) -> dict[Path, Verdict]:
    """Take links to folders out of every version that no release pins. Returns the verdicts that this left there.

    A version that is itself a link becomes a folder. Where a link led is in the verdict.

    Raises:
        OSError: the repository cannot be written.
    """
    refused = {}
    for step in contract.STEPS:
        for number in repository.unpinned(pipeline, step):
            folder = repository.step_folder(pipeline, step, number)
            links = {path: os.readlink(path) for path in _to_folders(folder)}
            if not links:
                continue
            for path in links:
                path.unlink()
            folder.mkdir(exist_ok=True)
            places = [
                f"{path.relative_to(repository.root)} is a link to {target}: copy what it stands for instead"
                for path, target in links.items()
            ]
            check = Check(name="files", passed=False, detail="; ".join(places))
            refused[folder] = Verdict(passed=False, checks=[check], seen=exam.state_of(folder))
            write_verdict(repository, folder, refused[folder])
    return refused


def _to_folders(folder: Path) -> Iterator[Path]:
    if folder.is_symlink():
        yield folder
        return
    for parent, names, _ in os.walk(folder):  # which names links to folders, and does not follow them
        yield from (path for name in names if (path := Path(parent, name)).is_symlink())
