"""`python -m chaos`: break a running stack in every way there is, under load, and say what its clients saw."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from chaos.faults import FAULTS, Fault
from chaos.load import Known
from chaos.releases import Pair
from chaos.stack import shared_memory
from chaos.trial import FaultReport, servers, stack_for, try_out
from export.printing import wide_console
from export.repository import Repository
from harness.commands import command, parser
from triton_runtime.installation import Missing

_EPILOG = """In every row no answer may be wrong, later than its deadline, or an error without a type, and all gauges
must be back at zero; in the rows with replicas and with bad clients no ordinary request may fail either. `failed`
counts good pictures with the default deadline that were not answered, `recovery` the seconds from the end of the
fault to the last of them."""


@command("chaos", 1)
def main(arguments: list[str] | None = None) -> int:
    """Run the faults and print a table; 1 where a promise was not kept."""
    parse = parser("chaos", __doc__, _EPILOG)
    parse.add_argument("--only", nargs="+", choices=FAULTS, metavar="ROW", help=", ".join(FAULTS))
    parse.add_argument("--seconds", type=float, default=3.0, metavar="S", help="that a fault lasts (default: 3)")
    parse.add_argument("--pipeline", default="defect", help="default: defect")
    parse.add_argument(
        "--allowance-ms", type=float, default=250, metavar="MS", help="for the way to the client (default: 250)"
    )
    parse.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parse.add_argument("--log", type=Path, metavar="FILE", help="the gateways' log")
    options = parse.parse_args(arguments)
    faults = sorted((FAULTS[name] for name in options.only or FAULTS), key=lambda fault: bool(fault.routing))
    console = wide_console()
    reports = _run(faults, options, console)
    if options.json:
        options.json.write_text(json.dumps([report.to_json() for report in reports], indent=2) + "\n")
    console.print(table(reports))
    if left := shared_memory():
        console.print(f"left in /dev/shm: {', '.join(sorted(left))}")
    return 0 if all(report.has_passed for report in reports) and not left else 1


def _run(faults: list[Fault], options: argparse.Namespace, console: Console) -> list[FaultReport]:
    if not Repository(options.repository).releases(options.pipeline):
        raise Missing(f"{options.repository} holds no release of {options.pipeline}: run 'make export'")
    reports: list[FaultReport] = []
    if options.log:
        options.log.unlink(missing_ok=True)
    with contextlib.ExitStack() as context:
        status = context.enter_context(console.status("starting Triton"))
        folder = Path(context.enter_context(TemporaryDirectory(prefix="chaos-")))
        for is_on_two, group in itertools.groupby(faults, lambda fault: bool(fault.routing)):
            pair = Pair(options.repository, folder, options.pipeline) if is_on_two else None
            root = pair.root if pair else options.repository
            with servers(root, same := list(group)) as tritons:
                for fault in same:
                    status.update(f"{fault.name} ({len(reports) + 1} of {len(faults)})")
                    with stack_for(fault, tritons, options.pipeline, options.log, pair) as stack:
                        known = Known(Repository(root).releases(options.pipeline), silent=fault.silent(pair))
                        reports.append(try_out(fault, stack, known, options.seconds, options.allowance_ms / 1000))
                    outcome = "; ".join(reports[-1].problems) or "passed"
                    console.print(f"{fault.name}: {'; '.join([outcome, *reports[-1].notes])}")
    return reports


def table(reports: list[FaultReport]) -> Table:
    """A row a fault."""
    result = Table(title="faults, and what the clients saw", title_justify="left")
    for header in ("fault", "sent", "answered", "wrong", "late", "untyped", "failed", "recovery s", "longest s", "MB"):
        result.add_column(header, justify="left" if header == "fault" else "right")
    result.add_column("refused with")
    result.add_column("")
    for report in reports:
        refused = ", ".join(f"{code} {count}" for code, count in report.refused.items())
        result.add_row(
            report.fault,
            *(str(n) for n in (report.sent, report.answered, report.wrong, report.late, report.untyped, report.failed)),
            "never" if report.recovery_s is None else f"{report.recovery_s:.1f}",
            f"{report.longest_s:.1f}",
            f"{report.memory_mb:+.0f}",
            refused,
            "passed" if report.has_passed else "FAILED",
        )
    return result


if __name__ == "__main__":
    sys.exit(main())
