"""`python -m export`: a trained checkpoint, or an ONNX file of your own, becomes a release in the repository."""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path

from rich.console import Console

import contract
from export import build, diff, doctor, graph, links, publish, retire, status, watch
from export.candidate import Candidate
from export.exam import Report
from export.publish import Refused
from export.repository import Repository, RepositoryError
from export.spec import Spec

_EPILOG = """examples:
  python -m export                                         the checkpoint of this project -> defect-v<n>
  python -m export --checkpoint runs/7                     another checkpoint (model.safetensors, card.json)
  python -m export --onnx fruit.onnx --spec fruit.toml     a model of your own -> <name in the spec>-v<n>
  python -m export --precision int8 --calibration photos   the same in eight-bit integers, as a release of its own
  python -m export --precision fp16                        the same in half precision, for GPUs, likewise
  python -m export --to model.onnx                         the classifier alone, to be dropped into a repository
  python -m export release --classifier 4                  examine a dropped version, publish it if it passes
  python -m export watch                                   do that with whatever is dropped, forever
  python -m export status                                  what is published, refused and routed
  python -m export diff defect-v1 defect-v2                what changed, in the steps and in the answers
  python -m export retire defect-v1                        take a release back
  python -m export doctor                                  look at a repository for what would hurt Triton

Content that is published already keeps its number: running twice changes nothing.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        prog="python -m export", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    root = Path(__file__).resolve().parent
    source = parse.add_argument_group("what to export")
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="model.safetensors and card.json")
    source.add_argument("--pipeline", default="defect", metavar="NAME", help="of a checkpoint (default: defect)")
    source.add_argument("--onnx", type=Path, metavar="FILE", help="a model of your own, with --spec")
    source.add_argument("--spec", type=Path, metavar="FILE", help="TOML: name, labels, input, output")
    source.add_argument(
        "--precision", choices=["fp32", "fp16", "int8"], default="fp32", help="int8 needs --calibration"
    )
    source.add_argument(
        "--calibration", type=Path, metavar="DIR", help="pictures as in production: 8 or more, better 100"
    )
    target = parse.add_argument_group("where to")
    target.add_argument("--to", type=Path, metavar="FILE", help="write the ONNX file here, and publish nothing")
    target.add_argument(
        "--if-missing", action="store_true", help="export only if the newest release of --pipeline is incomplete"
    )
    target.add_argument("--force", action="store_true", help="overrule agreement, accuracy and cost in the exam")
    publish.add_options(parse)
    parse.set_defaults(default_checkpoint=root / "checkpoints" / "defect")
    return parse


def main(arguments: list[str] | None = None) -> int:
    """Run the command, or export and publish; 0 when it is done, 1 when it was refused (the reason is on stderr)."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # it was closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need be no text
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code
    except OSError as error:  # what goes wrong with a repository is told by each command
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes what is left of it
        if not isinstance(error, BrokenPipeError):  # whoever reads has read enough: `status | head`
            print(f"export: cannot write what there is to say: {error.strerror}", file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    commands = {
        "diff": diff.main,
        "doctor": doctor.main,
        "release": publish.main,
        "retire": retire.main,
        "status": status.main,
        "watch": watch.main,
    }
    for name, command in commands.items():
        if arguments[:1] == [name]:
            return command(arguments[1:])
    parse = parser()
    options = parse.parse_args(arguments)
    if (options.onnx is None) != (options.spec is None):
        parse.error("--onnx and --spec go together")
    if options.onnx and options.checkpoint:
        parse.error("give --checkpoint or --onnx, not both")
    if (options.precision == "int8") != (options.calibration is not None):
        parse.error("--precision int8 and --calibration go together")
    if not contract.PIPELINE_NAME.fullmatch(options.pipeline):
        parse.error("--pipeline must be lower-case letters, digits and _, starting with a letter")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    report = publish.reporter(console)

    try:
        examiner = publish.examiner_of(options)
        repository = examiner.repository
        try:
            cleared = links.clear(repository)
            for folder, verdict in cleared.refused.items():
                report(f"NO  {folder}: {verdict.cause}")
            for path, target in cleared.removed.items():
                report(f"removed {path}, a link to {target}: {links.WHY}")
        except (RepositoryError, OSError) as error:
            report(f"trouble: {error}")
        for pipeline in repository.pipelines():
            try:
                repository.reconcile(pipeline)
            except (RepositoryError, OSError) as error:  # perhaps another pipeline's; if not, it is met again below
                report(f"trouble: {pipeline}: {error}")
        if options.if_missing and repository.is_complete(options.pipeline):
            return 0
        if options.to:
            built = _built(options, repository, report)
            options.to.write_bytes(built.steps["classifier"].files["model.onnx"])
            print(options.to)
            return 0
        published = publish.until_current(lambda: examiner.publish(_built(options, repository, report), report), report)
    except (build.ExportError, graph.GraphError, Refused, RepositoryError, ValueError, OSError) as error:
        console.print(f"not exported: {error}", style="red", markup=False)
        return 1

    for path in published.written:
        report(f"wrote {path}")
    if not published.written:
        report("everything is in place already")
    print(published.manifest.name)
    return 0


def _built(options: argparse.Namespace, repository: Repository, report: Report) -> Candidate:
    """The candidate that the options describe, with the code of the newest release's other steps."""
    if options.onnx:
        if not options.onnx.exists():  # before the spec is read: it is the first thing that was asked for
            raise build.ExportError(f"{options.onnx} is missing")
        built = build.from_onnx(options.onnx, Spec.read(options.spec), repository, report)
    else:
        folder = options.checkpoint or options.default_checkpoint
        built = build.from_checkpoint(folder, options.pipeline, repository, report)
    # Imported where they are needed: what is behind them takes most of a second, also of `status` and `watch`.
    if options.calibration:
        from export import quantize

        built = quantize.int8(built, options.calibration, report)
    if options.precision == "fp16":
        from export import fp16

        built = fp16.convert(built, options.data or options.golden, report)
    return built


if __name__ == "__main__":
    sys.exit(main())
