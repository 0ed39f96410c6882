"""`python -m perf.overload`: what is still answered in time when far more is asked than can be.

In each round first the capacity, with clients that wait for each answer; then multiples of it from clients that do not
wait, each request with a deadline. Goodput is what is answered within it. Making the load takes a share of the machine,
which clients elsewhere do not: that is set off before goodputs are compared. The table shows the last round; what is
kept is judged by its interval over all of them, and is inconclusive where the bound is within it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from export.printing import wide_console
from harness import ROOT
from harness.commands import command, parser
from harness.gateway import whole_stack
from perf.confidence import Interval
from perf.generator import Generator, Offered
from triton_runtime.server import TritonFailed

_CORES = os.cpu_count() or 1
LEAST = 0.9
"""Of the best goodput, what has to be left at the highest load."""
_WARM_UP_S = 3.0


@command("overload", 2)
def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, write the figures.

    1 where less goodput than `LEAST` is left, by the whole interval over the rounds; 2 where nothing could be measured.
    """
    parse = parser("perf.overload", __doc__)
    parse.add_argument("--pictures", type=Path, default=ROOT / "examples", help="folder of JPEGs (default: examples)")
    parse.add_argument("--rounds", type=int, default=4, help="at least 2 (default: %(default)s)")
    parse.add_argument("--seconds", type=float, default=6.0, help="of each load in a round (default: %(default)s)")
    parse.add_argument("--deadline", type=float, default=1.0, metavar="SECONDS", help="default: %(default)s")
    parse.add_argument("--connections", type=int, default=32, help="that find the capacity (default: %(default)s)")
    parse.add_argument("--loads", type=float, nargs="+", default=[1, 2, 5], help="times the capacity (default: 1 2 5)")
    parse.add_argument("--json", type=Path, default=ROOT / "perf/results/overload.json", help="default: perf/results/")
    options = parse.parse_args(arguments)
    if options.rounds < 2:
        parse.error("--rounds: at least 2, which an interval is made of")
    console = wide_console()
    rounds = _measure(options, console)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps([{name: vars(load) for name, load in loads.items()} for loads in rounds]) + "\n")
    console.print(table(rounds[-1], options.deadline))
    kept, raw = (share_kept(rounds, cores) for cores in (_CORES, math.inf))
    outcome = kept.is_at_least(LEAST)
    print(
        f"goodput at {list(rounds[-1])[-1]}: {kept.middle:.0%} ({kept.low:.0%} to {kept.high:.0%}) of the best over "
        f"{len(rounds)} rounds, {LEAST:.0%} is asked for: {outcome} "
        f"({raw.middle:.0%} if what the generator takes is not set off)"
    )
    return int(outcome == "fail")


def _measure(options: argparse.Namespace, console: Console) -> list[dict[str, Offered]]:
    """The loads by their name, in each round."""
    pictures = [path.read_bytes() for path in sorted(options.pictures.rglob("*.jpg"))[:64]]
    if not pictures:
        raise TritonFailed(f"{options.pictures} holds no JPEGs")
    rounds: list[dict[str, Offered]] = []
    with (
        console.status("starting Triton") as status,
        whole_stack(options.repository, log_level="error") as (_, gateway),
    ):
        generator = Generator("127.0.0.1", gateway.port, pictures, options.deadline)
        status.update("warming up")
        generator.closed(options.connections, _WARM_UP_S)
        for number in range(1, options.rounds + 1):
            prefix = f"round {number} of {options.rounds}:"
            status.update(f"{prefix} finding the capacity")
            loads = {"capacity": generator.closed(options.connections, options.seconds)}
            for times in options.loads:
                status.update(f"{prefix} {times:g} times the capacity")
                loads[f"{times:g}x"] = generator.open(times * loads["capacity"].goodput, options.seconds)
            rounds.append(loads)
    return rounds


def share_kept(rounds: Sequence[Mapping[str, Offered]], cores: float = _CORES) -> Interval:
    """Goodput of the last load as a share of the best one's, each for what the generator left of the machine."""
    goodputs = {name: [_goodput(loads[name], cores) for loads in rounds] for name in rounds[0]}
    best = max(goodputs.values(), key=statistics.geometric_mean)
    return Interval.of_rounds([here / there for here, there in zip(list(goodputs.values())[-1], best, strict=True)])


def _goodput(load: Offered, cores: float) -> float:
    return max(load.goodput, 1e-3) / (1 - load.generator_s / load.seconds / cores)


def table(loads: dict[str, Offered], deadline_s: float) -> Table:
    """One row a load."""
    result = Table(title=f"answers within {deadline_s:g} s", title_justify="left", caption_justify="left")
    for header in ("", "offered/s", "in time/s", "late", "p50 ms", "p99 ms", "refused/s", "p50 ms", "p99 ms"):
        result.add_column(header, justify="right" if header else "left")
    result.add_column("problems")
    result.add_column("cores for it", justify="right")
    for name, load in loads.items():
        result.add_row(
            name,
            f"{load.offered / load.seconds:.0f}",
            f"{load.goodput:.1f}",
            str(load.late),
            *_percentiles(load.answered_s),
            f"{len(load.refused_s) / load.seconds:.0f}",
            *_percentiles(load.refused_s),
            ", ".join(f"{code} {count}" for code, count in load.codes.most_common()),
            f"{load.generator_s / load.seconds:.2f}",
        )
    return result


def _percentiles(seconds: list[float]) -> tuple[str, str]:
    if len(seconds) < 2:
        return "", ""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return f"{cuts[49] * 1e3:.1f}", f"{cuts[98] * 1e3:.1f}"


if __name__ == "__main__":
    sys.exit(main())
