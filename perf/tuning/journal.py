"""Trials on disk, a JSON object a line, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from export.config import Serving
from perf.analyzer import Measurement
from perf.machine import facts
from perf.tuning.choice import Round, Trial


class Journal:
    """The trials in a file that were made under the same conditions as this run's.

    Args:
        path: the file; it is appended to.
        conditions: everything beside the settings that a figure depends on.
        fresh: start over, with an empty file.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any], *, fresh: bool = False) -> None:
        self._path = path
        if fresh:
            path.unlink(missing_ok=True)
        self._conditions = dict(conditions)
        lines = path.read_text().splitlines() if path.is_file() else []
        self._trials: dict[str, Trial] = {}
        for line in lines:
            try:
                entry = json.loads(line)
                self._trials[entry["key"]] = _trial(entry)
            except (ValueError, KeyError, TypeError):
                continue  # a line that was cut short, or of another version: it is measured again

    def get(self, serving: Serving, **effort: float) -> Trial | None:
        """The trial of these settings with that effort (rounds, seconds)."""
        return self._trials.get(self._key(serving, effort))

    def add(self, trial: Trial, **effort: float) -> None:
        """Write a trial down."""
        key = self._key(trial.serving, effort)
        self._trials[key] = trial
        entry = {
            "key": key,
            "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "settings": trial.serving.model_dump(),
            "rounds": [asdict(each) for each in trial.rounds],
            "error": trial.error,
            "effort": effort,
            "conditions": self._conditions,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _key(self, serving: Serving, effort: Mapping[str, float]) -> str:
        facts = [serving.model_dump(), self._conditions, effort]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def machine() -> str:
    """The processor that this machine names, and how many cores we may use."""
    known = facts()
    return f"{known['cores']} x {known['processor']}"


def _trial(entry: Mapping[str, Any]) -> Trial:
    rounds = (Round(Measurement(**each["tried"]), Measurement(**each["present"])) for each in entry["rounds"])
    return Trial(Serving.model_validate(entry["settings"]), tuple(rounds), entry["error"])
