"""`python -m gateway.routing.rollback`: have an earlier release answer, by one edit of the routing file.

A canary that gets requests is ended first, and the stable release goes on answering. Without one, the newest active
release before the stable one answers instead, or the one that --to names. Everything else of the file stays, with its
comments. Then it waits until every gateway says that it follows. Nothing is loaded or unloaded: the earlier release is
running already.
"""

from __future__ import annotations

import argparse
import json
import os
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import Comment, Table, Whitespace

from contract import parse_release_name
from contract.routing import Routing
from gateway.settings import Settings

_PATIENCE_S = 2.0
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # listened on; this is where to ask
_EPILOG = """examples:
  python -m gateway.routing.rollback
      end the canary; without one, go back to the release before the stable one
  python -m gateway.routing.rollback --to defect-v2
      to this one, without a canary
  python -m gateway.routing.rollback --forward
      take the last rollback back: the file is as it was before it
  python -m gateway.routing.rollback --gateway https://a:8080 --gateway https://b:8080
      several gateways follow the file

--to also works while no gateway can be reached: the file is written, and followed once one runs.
"""


class RollbackError(Exception):
    """Nothing was rolled back, or nobody confirmed it; the message says why and what to do."""


class Unreachable(RollbackError):
    """A gateway gives no answer."""


@dataclass(frozen=True)
class Gateway:
    """Where to ask what is in force. `tls` says whom to trust there."""

    url: str
    tls: ssl.SSLContext

    @classmethod
    def of_settings(cls, settings: Settings) -> Gateway:
        """The gateway that these settings start, asked on this machine."""
        scheme, tls = "http", ssl.create_default_context()
        if settings.tls_certificate:
            scheme = "https"
            try:
                tls.load_verify_locations(settings.tls_certificate)
            except OSError as error:
                raise RollbackError(f"GATEWAY_TLS_CERTIFICATE={settings.tls_certificate}: {error}") from None
            tls.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # this very certificate, whoever signed it
            tls.check_hostname = False  # it is made for others, who know the machine by another name
        host = _ANYWHERE.get(settings.host, settings.host)
        return cls(f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}", tls)

    @classmethod
    def at(cls, url: str, authority: Path | None) -> Gateway:
        """A gateway elsewhere; `authority` is a file of certificates (PEM) to trust, instead of the system's."""
        try:
            return cls(url.rstrip("/"), ssl.create_default_context(cafile=authority))
        except OSError as error:
            raise RollbackError(f"--cacert {authority}: {error}") from None

    def ask(self) -> dict[str, Any]:
        """What is in force there.

        Raises:
            Unreachable: it says nothing.
        """
        try:
            with urllib.request.urlopen(f"{self.url}/version", timeout=_PATIENCE_S, context=self.tls) as response:
                return dict(json.load(response)["pipeline"])
        except (OSError, ValueError, KeyError) as error:  # URLError is an OSError
            raise Unreachable(f"the gateway at {self.url} cannot be asked ({error})") from None


def main(arguments: list[str] | None = None) -> int:
    """Roll back and print one line; 1 where it did not take effect."""
    settings = Settings.read()
    parse = argparse.ArgumentParser(
        prog="python -m gateway.routing.rollback",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parse.add_mutually_exclusive_group()
    where.add_argument("--to", metavar="NAME", help="release to go back to")
    where.add_argument("--forward", action="store_true", help="take the last rollback back")
    parse.add_argument("--file", type=Path, default=settings.routing, help="routing file (default: %(default)s)")
    parse.add_argument(
        "--gateway",
        action="append",
        metavar="URL",
        help="a gateway that follows the file; may be repeated (default: the one that GATEWAY_HOST, GATEWAY_PORT and "
        "GATEWAY_TLS_CERTIFICATE describe)",
    )
    parse.add_argument("--cacert", type=Path, metavar="FILE", help="certificates (PEM) to trust at --gateway")
    options = parse.parse_args(arguments)
    try:
        gateways = [Gateway.at(url, options.cacert) for url in options.gateway or ()]
        gateways = gateways or [Gateway.of_settings(settings)]
        print(go_forward(options.file, gateways) if options.forward else roll_back(options.to, options.file, gateways))
    except RollbackError as error:
        print(f"rollback: {error}", file=sys.stderr)
        return 1
    return 0


def roll_back(to: str | None, file: Path, gateways: Sequence[Gateway]) -> str:
    """Do it; returns what happened.

    Raises:
        RollbackError: there is nothing to roll back to, the file cannot be written, or a gateway did not follow.
    """
    if to is not None and parse_release_name(to) is None:
        raise RollbackError(f"{to!r} is not the name of a release, such as defect-v2")
    try:
        now = gateways[0].ask()
    except Unreachable as error:
        if to is None:
            raise RollbackError(f"{error}; with --to NAME the file is written all the same") from None
        write(file, to)
        raise RollbackError(f"{file} names {to} now, but nobody confirmed it: {error}") from None
    canary = _canary_of(now) if to is None and now["stable"] else ""
    target = now["stable"] if canary else _target(now, to)
    write(file, target)
    took = _wait(file, gateways, lambda now: _follows(now, target), f"{file} names {target} now")
    if canary:
        done = f"{canary} was the canary and gets no more requests, {target} answers"
    elif target == now["stable"]:
        done = f"{target} goes on answering"
    else:
        done = f"{target} answers instead of {now['stable']}"
    return f"{done}, {took:.2f} s after the edit of {file}"


def go_forward(file: Path, gateways: Sequence[Gateway]) -> str:
    """Have the routing file be what it was before the last rollback; returns what happened.

    Raises:
        RollbackError: there was none, or the file was edited since; it cannot be written; a gateway did not follow.
    """
    try:
        stable = Routing.read(file).stable
        before = _before(file, stable)
        text, now = before.read_bytes().decode(), file.read_bytes().decode()
        is_ours = rolled_back(text, stable) == now
    except FileNotFoundError:
        raise RollbackError(f"there is no rollback of {file} to take back: say there what you want") from None
    except (TOMLKitError, ValueError, OSError) as error:
        raise RollbackError(f"{file} cannot be edited, correct it: {error}") from None
    if not is_ours:
        raise RollbackError(f"{file} was edited after the rollback: say there what you want")
    _replace(file, text)
    before.unlink(missing_ok=True)
    wanted = Routing.read(file)
    canary = wanted.canary.release if wanted.canary else None

    def follows(now: dict[str, Any]) -> bool:
        routing = now["routing"]
        return bool(routing["stable"] == wanted.stable and (routing["canary"] or {}).get("release") == canary)

    took = _wait(file, gateways, follows, f"{file} is as it was before the rollback")
    now_stable = gateways[0].ask()["stable"]
    return f"{now_stable} answers{f', {canary} is the canary' if canary else ''}, {took:.2f} s after the edit of {file}"


def _wait(file: Path, gateways: Sequence[Gateway], follows: Callable[[dict[str, Any]], bool], done: str) -> float:
    """Wait until all gateways follow; returns after how many seconds."""
    started, waiting = time.monotonic(), list(gateways)
    while waiting:
        answers: list[tuple[Gateway, dict[str, Any]]] = []
        for gateway in waiting:
            try:
                answers.append((gateway, gateway.ask()))
            except Unreachable as error:
                raise RollbackError(f"{done}, but not everybody confirmed it: {error}") from None
        behind = [(gateway, now) for gateway, now in answers if not follows(now)]
        if behind and time.monotonic() - started > _PATIENCE_S:
            gateway, now = behind[0]
            routing = now["routing"]
            reason = routing["error"] or routing["warning"] or "does it follow this file (GATEWAY_ROUTING)?"
            answers_now = f"{now['stable']} answers at {gateway.url}"
            raise RollbackError(f"{done}, but after {_PATIENCE_S:g} s {answers_now}: {reason}")
        waiting = [gateway for gateway, _ in behind]
        if waiting:
            time.sleep(0.02)
    return time.monotonic() - started


def _before(file: Path, release: str) -> Path:
    """Where the file is kept as it was before a rollback to a release; a rollback after it is to another one."""
    return file.with_name(f".{file.name}.before-{release}")


def rolled_back(text: str, release: str) -> str:
    """The text of a routing file with `release` as stable and without a canary.

    Raises:
        TOMLKitError: it is not TOML.
    """
    document = tomlkit.parse(text)
    document["stable"] = release
    _remove_canary(document)
    return tomlkit.dumps(document)


def write(file: Path, release: str) -> None:
    """Name `release` as stable in the routing file and remove a canary: the whole edit, or none of it.

    Raises:
        RollbackError: the file is malformed or cannot be written.
    """
    try:
        text = file.read_bytes().decode() if file.exists() else ""
        edited = rolled_back(text, release)
    except (TOMLKitError, ValueError) as error:
        raise RollbackError(f"{file} cannot be edited, correct it or move it away: {error}") from None
    except OSError as error:
        raise RollbackError(f"{file} cannot be read: {error}") from None
    if edited == text:  # what was before the last rollback is still what to go forward to
        return
    _replace(_before(file, release), text, check=False)
    _replace(file, edited)


def _replace(file: Path, text: str, *, check: bool = True) -> None:
    """Write the file, whole or not at all, where the gateway would not refuse it."""
    try:
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o644
        # In the same folder, so that the rename is atomic.
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as output:
                output.write(text.encode())
                output.flush()
                os.fchmod(output.fileno(), mode)
                os.fsync(output.fileno())
            if check:
                Routing.read(temporary)
            temporary.rename(file)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except ValueError as error:
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


def _canary_of(now: dict[str, Any]) -> str:
    """The canary, where it gets requests; else nothing is gained by ending it."""
    canary, active = now["routing"]["canary"], _active(now)
    return str(canary["release"]) if canary and canary["percent"] and canary["release"] in active else ""


def _active(now: dict[str, Any]) -> list[str]:
    """The releases that answer; while none does, all: whichever is named is to answer once Triton is back."""
    releases = now["releases"]
    return [each["name"] for each in releases if each["state"] == "ready"] or [each["name"] for each in releases]


def _target(now: dict[str, Any], to: str | None) -> str:
    active, shadow = _active(now), (now["routing"].get("shadow") or {}).get("release")
    if to is not None:
        if to == shadow:
            raise RollbackError(f"{to} is the shadow, which never answers: take [shadow] out of the routing file first")
        if to in active:
            return to
        reasons = {release["name"]: release["reason"] for release in now["releases"]}
        raise RollbackError(f"{to} may not answer: {reasons.get(to, 'it is not there')}; active: {_listed(active)}")
    if now["stable"] is None:
        raise RollbackError("no release answers now: name one with --to")
    older = [name for name in active if _number(name) < _number(now["stable"]) and name != shadow]
    if not older:
        but = f" but the shadow, {shadow}" if shadow and _number(shadow) < _number(now["stable"]) else ""
        raise RollbackError(f"nothing to roll back to: no active release is older than {now['stable']}{but}")
    return max(older, key=_number)


def _number(name: str) -> int:
    parsed = parse_release_name(name)
    return parsed[1] if parsed else 0


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _follows(now: dict[str, Any], release: str) -> bool:
    routing = now["routing"]
    return bool(now["stable"] == routing["stable"] == release and routing["canary"] is None)


if __name__ == "__main__":
    sys.exit(main())
