"""`python -m gateway.rollback`: have an earlier release answer, by one edit of the routing file.

Asks the gateway which release is stable and takes the newest active one before it, or takes --to. Writes
`stable = "..."`, removes a canary, keeps everything else of the file with its comments, and waits until the gateway
says that it follows. Nothing is loaded or unloaded: the earlier release is running already.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import Comment, Table, Whitespace

from contract import parse_release_name
from contract.routing import Routing
from gateway.settings import Settings

_PATIENCE_S = 2.0
_EPILOG = """examples:
  python -m gateway.rollback                   to the newest active release before the stable one
  python -m gateway.rollback --to defect-v2    to this one

--to also works while the gateway cannot be reached: the file is written, and followed once a gateway runs.
To go forward again, set `stable = "latest"` in the file, or name a release there.
"""


class RollbackError(Exception):
    """Nothing was rolled back, or nobody confirmed it; the message says why and what to do."""


class Unreachable(RollbackError):
    """The gateway gives no answer."""


def main(arguments: list[str] | None = None) -> int:
    """Roll back and print one line; 1 where it did not take effect."""
    settings = Settings.read()
    parse = argparse.ArgumentParser(
        prog="python -m gateway.rollback",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("--to", metavar="NAME", help="release to go back to")
    parse.add_argument("--file", type=Path, default=settings.routing, help="routing file (default: %(default)s)")
    parse.add_argument(
        "--gateway",
        metavar="URL",
        default=f"http://{settings.host}:{settings.port}",
        help="default: %(default)s, from GATEWAY_HOST and GATEWAY_PORT",
    )
    options = parse.parse_args(arguments)
    try:
        print(roll_back(options.to, options.file, options.gateway.rstrip("/")))
    except RollbackError as error:
        print(f"rollback: {error}", file=sys.stderr)
        return 1
    return 0


def roll_back(to: str | None, file: Path, gateway: str) -> str:
    """Do it; returns what happened.

    Raises:
        RollbackError: there is nothing to roll back to, the file cannot be written, or the gateway did not follow.
    """
    if to is not None and parse_release_name(to) is None:
        raise RollbackError(f"{to!r} is not the name of a release, such as defect-v2")
    try:
        before = _ask(gateway)
    except Unreachable as error:
        if to is None:
            raise RollbackError(f"{error}; with --to NAME the file is written all the same") from None
        write(file, to)
        return f"{file} names {to} now, but nobody confirmed it: {error}"
    target = _target(before, to)
    started = time.monotonic()
    write(file, target)
    while not _follows(now := _ask(gateway), target):
        if time.monotonic() - started > _PATIENCE_S:
            reason = (
                now["routing"]["error"] or now["routing"]["warning"] or "does it follow this file (GATEWAY_ROUTING)?"
            )
            raise RollbackError(
                f"{file} names {target} now, but after {_PATIENCE_S:g} s {now['stable']} answers at {gateway}: {reason}"
            )
        time.sleep(0.02)
    took = time.monotonic() - started
    return f"{target} answers instead of {before['stable']}, {took:.2f} s after the edit of {file}"


def write(file: Path, release: str) -> None:
    """Name `release` as stable in the routing file and remove a canary: the whole edit, or none of it.

    Raises:
        RollbackError: the file is malformed or cannot be written.
    """
    try:
        text = file.read_text() if file.exists() else ""
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o644
        document = tomlkit.parse(text)
        document["stable"] = release
        _remove_canary(document)
        # In the same folder, so that the rename is atomic.
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w") as output:
                output.write(tomlkit.dumps(document))
                output.flush()
                os.fchmod(output.fileno(), mode)
                os.fsync(output.fileno())
            Routing.read(temporary)  # what the gateway would refuse is not worth writing
            temporary.rename(file)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except (TOMLKitError, ValueError) as error:
        raise RollbackError(f"{file} cannot be edited, correct it or move it away: {error}") from None
    except OSError as error:
        raise RollbackError(f"{file} cannot be written: {error}") from None


def _remove_canary(document: tomlkit.TOMLDocument) -> None:
    """Remove the table, but not the comments below it: they are about what comes next."""
    canary = document.get("canary")
    below = ""
    if isinstance(canary, Table):
        items = [item for _, item in canary.value.body]
        while items and isinstance(items[-1], (Comment, Whitespace)):
            below = items.pop().as_string() + below
    position = next((n for n, (key, _) in enumerate(document.body) if key and key.key == "canary"), None)
    document.pop("canary", None)
    if position is not None and below:
        document.body[position] = (None, Whitespace(below))


def _target(now: dict[str, Any], to: str | None) -> str:
    active: list[str] = [release["name"] for release in now["releases"] if release["state"] == "ready"]
    if to is not None:
        if to in active:
            return to
        reasons = {release["name"]: release["reason"] for release in now["releases"]}
        raise RollbackError(f"{to} may not answer: {reasons.get(to, 'it is not there')}; active: {_listed(active)}")
    if now["stable"] is None:
        raise RollbackError("no release answers now: name one with --to")
    older = [name for name in active if _number(name) < _number(now["stable"])]
    if not older:
        raise RollbackError(f"nothing to roll back to: no active release is older than {now['stable']}")
    return max(older, key=_number)


def _number(name: str) -> int:
    parsed = parse_release_name(name)
    return parsed[1] if parsed else 0


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _follows(now: dict[str, Any], release: str) -> bool:
    routing = now["routing"]
    return bool(now["stable"] == routing["stable"] == release and routing["canary"] is None)


def _ask(gateway: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"{gateway}/version", timeout=_PATIENCE_S) as response:
            return dict(json.load(response)["pipeline"])
    except (OSError, ValueError, KeyError) as error:  # URLError is an OSError
        raise Unreachable(f"the gateway at {gateway} cannot be asked ({error})") from None


if __name__ == "__main__":
    sys.exit(main())
