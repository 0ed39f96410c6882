"""A command that measures: what all of them take, and how they end.

With the reason in one line, and with everything cleaned up after a signal.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from harness import ROOT
from triton_runtime.installation import Missing
from triton_runtime.server import TritonFailed
from triton_runtime.signals import Stopped, unwind_on_signals


def parser(module: str, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """Of `python -m <module>`, which takes a `--repository`; both texts are shown as they are written."""
    result = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--repository", type=Path, default=ROOT / "model_repository", help="default: model_repository")
    return result


def command(name: str, failed: int, *errors: type[Exception]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """For a `main`: where it is stopped or one of the errors happens, and is printed, the status is `failed`.

    The errors are those of the stack, of the system, and `errors`.
    """
    expected: tuple[type[Exception], ...] = (Missing, TritonFailed, OSError, *errors)

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(arguments: list[str] | None = None) -> int:
            unwind_on_signals()
            try:
                return main(arguments)
            except expected as error:
                print(f"{name}: {error}", file=sys.stderr)
            except Stopped:
                pass
            return failed

        return run

    return decorate
