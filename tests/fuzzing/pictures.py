"""`python -m tests.fuzzing.pictures`: thousands of bad pictures to a real stack, and whether it took them well.

Each file must be answered, or refused with a code of the preprocessing; nothing may fail, die or grow, and good
pictures sent among the bad ones must get the answer they always get.
"""

from __future__ import annotations

import argparse
import base64
import collections
import itertools
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gateway.api.schemas import PredictResponse
from harness import ROOT
from tests.fuzzing.bombs import largest
from tests.fuzzing.corpus import Specimen, specimen
from tests.fuzzing.seeds import TYPES, Seed, seeds
from tests.fuzzing.stack import FuzzedStack, started
from tests.offline import PREPROCESSING

AT_ONCE = 8
GOOD_EVERY = 10
"""One request in so many is a good picture."""
ANSWERED = "answered"
FORMS = ("bytes", "JSON", "form")
OFFENDERS = ROOT / "build" / "fuzz"


@dataclass
class Findings:
    """What came out. `wrong` names each file that was not taken well, and why."""

    outcomes: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    wrong: dict[int, str] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    good: int = 0
    lost: list[str] = field(default_factory=list)
    """Good pictures that got no answer, or another one than before; and what worsened in the servers."""


def send(http: httpx.Client, data: bytes, form: str, content_type: str) -> httpx.Response:
    """Ask for a prediction, in one of `FORMS`."""
    if form == "JSON":
        return http.post("/v1/predict", json={"image": base64.b64encode(data).decode()})
    if form == "form":
        return http.post("/v1/predict", files={"image": ("picture", data, content_type)})
    return http.post("/v1/predict", content=data, headers={"Content-Type": content_type})


def outcome(response: httpx.Response) -> str:
    """`ANSWERED`, or the code of the problem.

    Raises:
        ValueError: it is neither a whole answer nor a problem with the picture.
    """
    if response.status_code == 200:
        PredictResponse.model_validate(response.json())
        return ANSWERED
    if response.headers.get("content-type") != "application/problem+json":
        raise ValueError(f"{response.status_code}, no problem: {response.text[:200]}")
    problem = response.json()
    if not 400 <= response.status_code < 500 or problem["code"] not in PREPROCESSING.PictureError.CODES:
        raise ValueError(f"{response.status_code} {problem['code']}: {problem['detail']}")
    return str(problem["code"])


def fuzz(
    stack: FuzzedStack, specimens: Iterable[Specimen], total: int, warm_up: Iterable[Seed], console: Console
) -> Findings:
    """Send them all, `AT_ONCE` at a time, with good pictures in between.

    Args:
        stack: where to.
        specimens: the bad pictures, made as they are needed.
        total: how many they are.
        warm_up: good pictures that come before memory is first looked at.
        console: for the progress.
    """
    findings = Findings()
    good = [seed for seed in seeds() if seed.name in ("baseline", "EXIF and ICC", "lossless", "tiff_lzw")]
    with httpx.Client(base_url=stack.url, timeout=150) as http, ThreadPoolExecutor(AT_ONCE) as pool:
        expected = {seed: _scores(send(http, seed.data, "bytes", TYPES[seed.format])) for seed in good}
        for seed in warm_up:
            send(http, seed.data, "bytes", TYPES[seed.format]).raise_for_status()
        before = stack.vitals()

        def one(bad: Specimen) -> None:
            start = time.monotonic()
            try:
                response = send(http, bad.data, FORMS[bad.number % len(FORMS)], bad.content_type)
                findings.outcomes[bad.format, outcome(response)] += 1
            except (ValueError, ValidationError, KeyError, httpx.HTTPError) as error:
                findings.wrong[bad.number] = f"{type(error).__name__}: {error}"
                _keep(bad, OFFENDERS)
            findings.seconds[bad.number] = time.monotonic() - start
            if bad.number % GOOD_EVERY == 0:
                seed = good[bad.number // GOOD_EVERY % len(good)]
                findings.good += 1
                got = _scores(send(http, seed.data, FORMS[bad.number % len(FORMS)], TYPES[seed.format]))
                if got != expected[seed]:
                    findings.lost.append(f"{seed.format} {seed.name}, a good picture beside file {bad.number}: {got}")

        # In slices: the bad files are made as they are needed, not all at once.
        numbered = iter(specimens)
        slices = iter(lambda: list(itertools.islice(numbered, 4 * AT_ONCE)), [])
        length = -(-total // (4 * AT_ONCE))
        for slice_ in track(slices, f"{total} bad pictures", total=length, console=console):
            list(pool.map(one, slice_))
    answers = sum(findings.outcomes.values()) + findings.good
    findings.lost += stack.vitals().worsened(before, answers)
    return findings


def _scores(response: httpx.Response) -> Any:
    """What a picture's answer must have in common with another answer to it; of anything else, all of it."""
    if response.status_code != 200:
        return response.text
    body = response.json()
    # In a batch the last digits of a float may differ.
    return body["label"], [(score["label"], round(score["confidence"], 5)) for score in body["scores"]]


def _keep(bad: Specimen, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{bad.number:05}.{bad.format.lower()}").write_bytes(bad.data)


def report(findings: Findings, console: Console, corpus: int) -> None:
    """Tables of what became of each format, of the slowest files, and of what went wrong."""
    codes = [ANSWERED, *PREPROCESSING.PictureError.CODES]
    table = Table("format", *(code.removeprefix("image_") for code in codes), "files")
    for format_ in TYPES:
        counts = [findings.outcomes[format_, code] for code in codes]
        table.add_row(format_, *map(str, counts), str(sum(counts)))
    console.print(table)
    console.print(f"{findings.good} good pictures among them; the slowest bad ones:")
    for number in sorted(findings.seconds, key=lambda n: -findings.seconds[n])[:5]:
        bad = specimen(corpus, number)
        console.print(f"  {findings.seconds[number]:5.1f} s  file {number}: {bad.format} {bad.seed}, {bad.mutation}")
    for number, why in findings.wrong.items():
        bad = specimen(corpus, number)
        console.print(f"file {number}: {bad.format} {bad.seed}, {bad.mutation}: {why}", style="red", markup=False)
        console.print(f"  repeat: python -m tests.fuzzing.pictures --seed {corpus} --only {number}")
    for line in findings.lost:
        console.print(line, style="red", markup=False)
    if findings.wrong:
        console.print(f"kept in {OFFENDERS}")


def main(arguments: list[str] | None = None) -> int:
    """0 where nothing was found, 1 where something was."""
    parse = argparse.ArgumentParser(prog="python -m tests.fuzzing.pictures", description=__doc__)
    parse.add_argument("--files", type=int, default=2000, help="how many bad pictures (2000)")
    parse.add_argument("--seed", type=int, default=1, help="of the corpus: the same seed, the same files (1)")
    parse.add_argument("--only", type=int, metavar="N", help="send file N of the corpus alone")
    parse.add_argument("--keep", type=Path, metavar="DIR", help="write the files there as well")
    options = parse.parse_args(arguments)
    console = Console(highlight=False)  # Triton's stubs write to the other stream, a line or two a file
    numbers = range(options.files) if options.only is None else range(options.only, options.only + 1)
    specimens = (specimen(options.seed, number) for number in numbers)
    if options.keep:
        for bad in (specimen(options.seed, number) for number in numbers):
            _keep(bad, options.keep)
    with started() as stack:
        # For each stub: it has then grown as far as it may.
        findings = fuzz(stack, specimens, len(numbers), 2 * largest(), console)
    report(findings, console, options.seed)
    return 1 if findings.wrong or findings.lost else 0


if __name__ == "__main__":
    sys.exit(main())
