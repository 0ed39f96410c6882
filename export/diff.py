"""`python -m export diff defect-v1 defect-v2`: what changed between two releases, and in what they answer."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

import contract
from contract import Manifest
from export.printing import wide_console
from export.repository import Repository, RepositoryError
from export.steps import REPOSITORY


def facts(old: Manifest, new: Manifest) -> Table:
    """What each says of itself; only what differs, and the steps."""
    table = Table(title="releases", title_justify="left")
    for header in ("", old.name, new.name):
        table.add_column(header)
    for step in contract.STEPS:
        table.add_row(
            contract.step_model(old.pipeline, step),
            *(f"{release.steps[step].version} ({release.steps[step].digest[:8]})" for release in (old, new)),
            style="bold" if old.steps[step].digest != new.steps[step].digest else "dim",
        )
    for name in ("labels", "built_from", "built_at", "tolerance"):
        if getattr(old, name) != getattr(new, name):
            table.add_row(name, _text(getattr(old, name)), _text(getattr(new, name)))
    for name in sorted({*old.evaluation, *new.evaluation}):
        values = [release.evaluation.get(name, "-") for release in (old, new)]
        if values[0] != values[1] and not any(isinstance(value, dict) for value in values):
            table.add_row(name.replace("_", " "), *map(_text, values))
    if old.exam.get("forced") or new.exam.get("forced"):
        table.add_row("forced", _text(old.exam.get("forced")), _text(new.exam.get("forced")), style="red")
    return table


def answers(old: Manifest, new: Manifest) -> Table:
    """What each answered to the golden pictures of its exam."""
    table = Table(title="golden pictures", title_justify="left")
    for header in ("picture", old.name, new.name, "largest difference"):
        table.add_column(header)
    before = {golden.name: golden for golden in old.golden}
    for golden in new.golden:
        was = before.get(golden.name)
        if was is None or was.image != golden.image:
            table.add_row(golden.name, "-", f"{golden.label} {golden.scores[golden.label]:.3f}", "another picture")
            continue
        differences = [abs(score - was.scores.get(label, 0.0)) for label, score in golden.scores.items()]
        table.add_row(
            golden.name,
            *(f"{each.label} {each.scores[each.label]:.3f}" for each in (was, golden)),
            f"{max(differences):.3f}",
            style="bold" if was.label != golden.label else None,
        )
    return table


def sources(repository: Repository, old: Manifest, new: Manifest) -> Iterator[str]:
    """The text files of the steps, as a unified diff."""
    for step in ("preprocess", "postprocess"):
        folders = [repository.step_folder(r.pipeline, step, r.steps[step].version) for r in (old, new)]
        if old.steps[step].digest == new.steps[step].digest:
            continue
        for name in sorted({path.name for folder in folders for path in folder.glob("[!.]*") if path.is_file()}):
            before, after = (folder / name for folder in folders)
            places = [str(path.relative_to(repository.root)) for path in (before, after)]
            yield from difflib.unified_diff(_lines(before), _lines(after), places[0], places[1], lineterm="")


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def main(arguments: list[str] | None = None) -> int:
    """Print the differences; 1 where a release cannot be read."""
    parse = argparse.ArgumentParser(prog="python -m export diff", description=__doc__)
    parse.add_argument("old", help="such as defect-v1")
    parse.add_argument("new", help="such as defect-v2")
    parse.add_argument("--repository", type=Path, default=REPOSITORY, metavar="DIR", help="default: model_repository")
    options = parse.parse_args(arguments)
    repository, console = Repository(options.repository), wide_console()
    try:
        old, new = (repository.release(name) for name in (options.old, options.new))
        lines = list(sources(repository, old, new))
    except (RepositoryError, OSError) as error:
        print(f"no comparison: {error}", file=sys.stderr)
        return 1
    console.print(facts(old, new))
    console.print(answers(old, new))
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0
