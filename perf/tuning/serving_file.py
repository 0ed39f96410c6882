"""`export/serving.toml`, edited: values change, comments and order stay."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

import tomlkit


def edited(text: str, values: Mapping[str, int]) -> str:
    """The file's text with settings replaced, by their dotted names; what it does not hold yet is added."""
    document = tomlkit.parse(text)
    for name, value in values.items():
        table, _, key = name.rpartition(".")
        if table and table not in document:
            document[table] = tomlkit.table()
        (document[table] if table else document)[key] = value
    return tomlkit.dumps(document)


def diff(path: Path, text: str) -> str:
    """What writing `text` to the file would change; empty where it would change nothing."""
    lines = difflib.unified_diff(path.read_text().splitlines(), text.splitlines(), str(path), str(path), lineterm="")
    return "\n".join(lines)
