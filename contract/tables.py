"""Settings and specs in TOML: read into frozen types that know no other keys, with errors that name the key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError


class Table(BaseModel):
    """A TOML table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            ValueError: it is not TOML, or a key is unknown, missing or wrong; the message names each.
            OSError: it cannot be read.
        """
        try:
            return cls.model_validate(tomllib.loads(path.read_text()))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not TOML: {error}") from None
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
            raise ValueError(f"{path}: {'; '.join(problems)}") from None
