"""Where tables go."""

from __future__ import annotations

import os
import sys

from rich.console import Console

_WIDTH = 160
"""Of what goes into a file, which nobody can widen afterwards."""


def wide_console() -> Console:
    """Standard output, as wide as the terminal, as COLUMNS says, or wide enough."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH)
