"""API keys: whose they are, kept as hashes, from a file that is followed and from the environment.

A key is 256 random bits, so a plain SHA-256 keeps it: there is no dictionary to try, and a slow hash, made for
passwords, would only let callers spend our processor time. `make key NAME=scanner` makes one.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import Iterable
from datetime import date, datetime, time, timezone
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field

from contract.tables import Table
from gateway.problems import Failure
from gateway.settings import Settings
from gateway.watched_file import FollowedFile

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_EPILOG = """example:
  python -m gateway.auth.api_keys new scanner >> access/keys.toml        (make key NAME=scanner)

The key is shown once, on standard error; the file gets its hash. A client may have several keys: to rotate one, add
the new one, hand it over, and remove the old one. The gateway follows the file (GATEWAY_API_KEYS_FILE)."""


class Key(Table):
    """One key of a client. `expires` ends it (a date: at its first moment, UTC); `rate` is in pictures a second."""

    client: Annotated[str, Field(pattern=rf"^{_NAME.pattern}$")]
    sha256: Annotated[str, Field(pattern=rf"^{_HASH.pattern}$")]
    expires: datetime | date | None = None
    rate: Annotated[float, Field(gt=0)] | None = None

    def has_expired(self) -> bool:
        """Whether its time is over."""
        if self.expires is None:
            return False
        end = self.expires if isinstance(self.expires, datetime) else datetime.combine(self.expires, time())
        return datetime.now(timezone.utc) >= (end if end.tzinfo else end.replace(tzinfo=timezone.utc))


class KeysTable(Table):
    """The file as a whole. An empty one is valid: nobody is let in."""

    keys: tuple[Key, ...] = ()


class ApiKeys:
    """Every key that is accepted now: those of the file, as it is, and `fixed`.

    Raises:
        ValueError: the file cannot be used, and there is no last good one yet.
    """

    def __init__(self, fixed: tuple[Key, ...] = (), path: Path | None = None) -> None:
        self._fixed = fixed
        self.file = None
        if path:
            self.file = FollowedFile[tuple[Key, ...]](path, (), _read, _clients, "keys")
            if self.file.error or not path.exists():
                raise ValueError(self.file.error or f"{path} is missing: 'make key NAME=scanner' makes a key")

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The keys that the settings name.

        Raises:
            ValueError: they cannot be used; the message shows none.
        """
        return cls(_parse(settings.api_keys), settings.api_keys_file)

    @property
    def are_needed(self) -> bool:
        """Whether a request needs a key at all."""
        return self.file is not None or bool(self._fixed)

    @property
    def error(self) -> str:
        """What is wrong with the file as it is now."""
        return self.file.error if self.file else ""

    async def follow(self) -> bool:
        """Look at the file after a moment; returns whether there is none to follow."""
        if self.file is None:
            return True
        await self.file.follow()
        return False

    def owner(self, presented: str) -> Key:
        """The key whose secret was presented. Looks at all of them, in a time that does not depend on which it is.

        Raises:
            Failure: invalid_api_key.
        """
        digest = hash_of(presented)
        accepted = self._fixed + (self.file.value if self.file else ())
        found = [key for key in accepted if hmac.compare_digest(key.sha256, digest)]
        if not found:
            raise Failure("invalid_api_key", "there is no such key")
        valid = [key for key in found if not key.has_expired()]
        if not valid:
            raise Failure("invalid_api_key", f"the key of {found[0].client} expired on {found[0].expires}")
        return valid[0]


def hash_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def _parse(text: str) -> tuple[Key, ...]:
    keys = []
    for entry in filter(None, map(str.strip, text.split(","))):
        client, _, digest = entry.partition(":")
        if not _NAME.fullmatch(client) or not _HASH.fullmatch(digest):
            raise ValueError("GATEWAY_API_KEYS: expected name:sha256, the hash in lower-case hexadecimal, and commas")
        keys.append(Key(client=client, sha256=digest))
    return tuple(keys)


def _read(path: Path) -> tuple[Key, ...]:
    return KeysTable.read(path).keys


def _clients(keys: Iterable[Key]) -> list[str]:
    return sorted({key.client for key in keys})


def main(arguments: list[str] | None = None) -> int:
    """Make a key."""
    parser = argparse.ArgumentParser(
        prog="python -m gateway.auth.api_keys",
        description="Make an API key.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    new = commands.add_parser("new", help="make a key for a client")
    new.add_argument("client", metavar="NAME", help="letters, digits, . _ -; shown in logs")
    new.add_argument("--expires", type=date.fromisoformat, metavar="YYYY-MM-DD", help="default: never")
    options = parser.parse_args(arguments)
    if not _NAME.fullmatch(options.client):
        parser.error(f"{options.client!r} is no name: letters, digits, . _ -, up to 64")
    key = f"gwk_{secrets.token_urlsafe(32)}"
    print(f"{options.client}: {key}\nIt is not shown again.", file=sys.stderr)
    print(f'\n[[keys]]\nclient = "{options.client}"\nsha256 = "{hash_of(key)}"')
    if options.expires:
        print(f"expires = {options.expires}")
        if options.expires <= datetime.now(timezone.utc).date():
            print(f"{options.expires} is over already, so nobody can use it.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
