"""`python -m tests.fuzzing.api`: Schemathesis, with all its checks, on the OpenAPI document of a real gateway.

Runs with one seed after the other until there were as many cases as asked for; `hooks` says what it must be told.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ROOT
from tests.fuzzing.stack import started

_GENERATED = re.compile(r"^\s+(\d+) generated", re.MULTILINE)


def schemathesis(url: str, seed: int, examples: int, *options: str) -> tuple[int, str]:
    """One run: the number of its cases, and what it reported if it found something.

    Args:
        url: of the gateway.
        seed: the same seed makes the same requests.
        examples: at most so many random requests an operation, in each of the phases.
        options: more of `st run`.
    """
    command = [Path(sys.executable).with_name("st"), "--no-color", "run", f"{url}/openapi.json", *options]
    command += ["--checks=all", f"--seed={seed}", f"--max-examples={examples}", "--continue-on-failure"]
    # One worker: Python 3.11 cannot parse source in two threads at once (SystemError), as Hypothesis does.
    command += ["--generation-database=none", "--request-timeout=60", "--workers=1"]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzzing.hooks", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:  # it leaves notes for a replay where it runs
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    generated = _GENERATED.search(done.stdout)
    return int(generated[1]) if generated else 0, "" if done.returncode == 0 else done.stdout + done.stderr


def main(arguments: list[str] | None = None) -> int:
    """0 where nothing was found, 1 where something was."""
    parse = argparse.ArgumentParser(prog="python -m tests.fuzzing.api", description=__doc__)
    parse.add_argument("--cases", type=int, default=5000, help="at least so many requests (5000)")
    parse.add_argument("--seed", type=int, default=1, help="of the first run (1)")
    parse.add_argument("--examples", type=int, default=30, help="random requests an operation in each run (30)")
    options = parse.parse_args(arguments)
    seed, total = options.seed, 0
    with started() as stack:
        before = stack.vitals()
        while total < options.cases:
            cases, found = schemathesis(stack.url, seed, options.examples)
            total += cases
            print(f"seed {seed}: {cases} requests, {total} in all", flush=True)
            if found or not cases:
                print(found or "Schemathesis made no requests")
                return 1
            seed += 1
        worse = stack.vitals().worsened(before)
    print(*worse or ["nothing found"], sep="\n")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
