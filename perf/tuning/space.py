"""The settings that can be tuned, as `export/serving.toml` names them, and which of them to try. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from export.config import Serving

NAMES = (
    "max_batch_size",
    "queue_delay_us",
    "preprocess.instances",
    "postprocess.instances",
    "classifier.instances",
    "classifier.threads",
    "classifier.pictures_per_run",
)

Grid = Mapping[str, Sequence[int]]
"""Setting -> the values to try first."""

_PROMISING = 3
"""How many of the changes that did best are combined and refined."""


def default_grid(serving: Serving, cores: int) -> dict[str, list[int]]:
    """Few values far apart, for a machine with so many cores."""
    parallel = sorted({1, max(1, cores // 2), cores, cores + 1})
    batch = serving.max_batch_size
    return {
        "max_batch_size": [batch, 2 * batch],  # below it, releases that are published could not run any more
        "queue_delay_us": [0, 500, 2000],
        "preprocess.instances": parallel,
        "postprocess.instances": [1, 2],
        "classifier.instances": parallel,
        "classifier.threads": sorted({1, cores}),
        "classifier.pictures_per_run": [1, 2, 4],
    }


def value(serving: Serving, name: str) -> int:
    """A setting by its dotted name."""
    table, _, key = name.rpartition(".")
    return int(getattr(getattr(serving, table) if table else serving, key))


def changed(serving: Serving, values: Mapping[str, int]) -> Serving:
    """These settings with some values replaced.

    Raises:
        ValueError: a value is out of its bounds.
    """
    content = serving.model_dump()
    for name, new in values.items():
        table, _, key = name.rpartition(".")
        (content[table] if table else content)[key] = new
    return Serving.model_validate(content)


def difference(serving: Serving, default: Serving) -> dict[str, int]:
    """What is set otherwise than by default."""
    return {name: value(serving, name) for name in NAMES if value(serving, name) != value(default, name)}


def coarse(default: Serving, grid: Grid) -> list[Serving]:
    """Every value of the grid alone; and one classifier with all the threads, or many with one each."""
    changes = [{name: new} for name, values in grid.items() for new in values]
    together = ("classifier.instances", "classifier.threads")
    if all(len(grid.get(name, ())) > 1 for name in together):
        few, many = min(grid[together[1]]), max(grid[together[1]])
        pairs = [pair for pair in ((few, many), (many, few)) if pair[0] in grid[together[0]]]
        changes += [dict(zip(together, pair, strict=True)) for pair in pairs]
    return _new((changed(default, change) for change in changes), known=[default])


def refined(default: Serving, ranked: Sequence[Serving], known: Iterable[Serving]) -> list[Serving]:
    """The most promising changes combined, and their neighbours: closer values of what the best one changes.

    Args:
        default: the settings that everything is a change of.
        ranked: what was tried, the best first.
        known: what need not be tried again.
    """
    promising = [difference(each, default) for each in ranked[:_PROMISING]]
    changes = []
    merged: dict[str, int] = {}
    for change in promising:
        merged = {**change, **merged}  # of two values for one setting, the better one
        changes.append(merged)
    for name, best in promising[0].items() if promising else ():
        changes += [{**promising[0], name: close} for close in _neighbours(name, best, value(default, name))]
    return _new((changed(default, change) for change in changes), known=[default, *known])


def _neighbours(name: str, best: int, before: int) -> list[int]:
    """The middle between a value and the one that it replaced, and as far again on the other side."""
    if name == "max_batch_size":
        return [2 * best]
    step = max(1, abs(best - before) // 2)
    return [near for near in (best - step, best + step) if near >= (0 if name == "queue_delay_us" else 1)]


def _new(settings: Iterable[Serving], known: Iterable[Serving]) -> list[Serving]:
    seen = set(known)
    return [each for each in dict.fromkeys(settings) if each not in seen]
