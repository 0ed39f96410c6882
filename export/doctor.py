"""`python -m export doctor`: look at a model repository for what would hurt Triton, without running anything.

Each trap here was met on a real server or is documented in Triton's sources; the remedy says what to do. Works on
any repository; what only releases have (digests, pins) is looked at where there are releases.
"""

from __future__ import annotations

import argparse
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import uses_external_data
from rich.console import Console
from tritonclient.grpc import model_config_pb2 as pb

import contract
from export import config, graph, rights
from export.repository import BARE, bare_folders, holds_config, is_version, told
from export.steps import REPOSITORY, NoModel, Step, is_hidden

_CLOCK_SLACK_S = 60


@dataclass(frozen=True)
class Finding:
    """A trap: `place` is relative to the repository. An error hurts now or at the next start, a warning may."""

    severity: str
    place: str
    problem: str
    remedy: str


def inspect(root: Path) -> list[Finding]:
    """Every trap in the repository at `root`, errors first.

    Raises:
        OSError: the repository itself cannot be read.
    """
    found: list[Finding] = list(_entries(root))
    models = {}
    for folder in sorted(p for p in root.iterdir() if holds_config(p)):
        try:
            models[folder.name] = config.parse((folder / "config.pbtxt").read_text())
        except Exception as error:  # whatever it is: the other models are looked at
            found.append(_error(f"{folder.name}/config.pbtxt", told(error), "write it again"))
    for name, model in models.items():
        try:
            found += _model(root, name, model, models)
        except Exception as error:
            found.append(_error(name, f"cannot be looked at: {told(error)}", "look at it by hand"))
    return sorted(found, key=lambda finding: (finding.severity != "error", finding.place))


def above(root: Path) -> list[Finding]:
    """The folders above the repository that others cannot enter. In a container, they may not matter."""
    problem = "others cannot enter it, nor reach the repository: a Triton that runs as another user, say"
    closed = [folder for folder in root.resolve().parents if not folder.stat().st_mode & stat.S_IXOTH]
    return [_warning(str(folder), problem, f"chmod o+x {folder}") for folder in closed]


def _model(root: Path, name: str, model: pb.ModelConfig, models: dict[str, pb.ModelConfig]) -> Iterator[Finding]:
    yield from _folder(root / name)
    yield from _configuration(name, model)
    if model.HasField("ensemble_scheduling"):
        yield from _ensemble(root, name, model, models)
    else:
        yield from _versions(root / name, model)


def _error(place: str, problem: str, remedy: str) -> Finding:
    return Finding("error", place, problem, remedy)


def _warning(place: str, problem: str, remedy: str) -> Finding:
    return Finding("warning", place, problem, remedy)


def _entries(root: Path) -> Iterator[Finding]:
    """What lies where: links, dates, rights, byte code."""
    if rights.is_closed(root):
        yield _error(".", rights.WHY, rights.remedy(root))
    for folder, names, files in os.walk(root):
        if Path(folder) != root:  # in a model, what is hidden is read by nobody; but Triton stumbles over any link
            is_model = Path(folder).parent == root
            for each in (names, files):
                each[:] = [n for n in each if not is_hidden(n) or (is_model and Path(folder, n).is_symlink())]
        for path in (Path(folder, name) for name in (*names, *files)):
            try:
                yield from _entry(root, path)
            except FileNotFoundError:
                pass  # removed meanwhile
            except OSError as error:  # so deep that its path is too long, say
                place = str(path.relative_to(root))
                yield _error(place[:200], f"cannot be looked at: {error.strerror}", "move it out")
    for path in bare_folders(root):
        yield _error(path.name, BARE, "move it out")


def _entry(root: Path, path: Path) -> Iterator[Finding]:
    place = str(path.relative_to(root))
    if path.is_symlink():
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(root.resolve()) or not target.exists() or path.is_relative_to(target):
            yield _error(place, f"a link that leads to {target}", "copy what it stands for")
        return
    if rights.is_closed(path):
        yield _error(place, rights.WHY, rights.remedy(path))
    if path.stat().st_mtime > time.time() + _CLOCK_SLACK_S:
        yield _error(place, "dated in the future: Triton will not see later changes", f"touch {place}")
    if path.name == "__pycache__":
        yield _warning(place, "byte code: its appearing makes Triton reload", "remove it; mount read-only")


def _folder(folder: Path) -> Iterator[Finding]:
    """What lies beside a model's versions."""
    for path in sorted(folder.iterdir()):
        place = f"{folder.name}/{path.name}"
        if path.is_dir():
            if path.name[0].isdigit() and not is_version(path.name):
                yield _error(place, "Triton takes it for a version: it starts with a digit", "stage outside of it")
        elif path.name != "config.pbtxt" and not path.is_symlink():
            yield _warning(place, "a loose file: each change of it reloads the model's live versions", "move it out")


def _configuration(name: str, model: pb.ModelConfig) -> Iterator[Finding]:
    place = f"{name}/config.pbtxt"
    if model.name and model.name != name:
        yield _error(place, f"names the model {model.name}, not {name}", "give both the same name")
    if model.HasField("ensemble_scheduling") and model.response_cache.enable:
        yield _error(place, "caches an ensemble: the key does not see its steps change", "cache steps, if at all")
    if model.dynamic_batching.default_queue_policy.default_timeout_microseconds:
        yield _warning(place, "a default queue timeout: throughput may degrade slowly", "use the deadline of the call")
    kinds = {group.kind for group in model.instance_group}
    if model.backend == "python" and kinds != {pb.ModelInstanceGroup.KIND_CPU}:
        yield _warning(place, "a Python step that is not KIND_CPU takes GPU memory for nothing", "say KIND_CPU")


def _versions(folder: Path, model: pb.ModelConfig) -> Iterator[Finding]:
    """The versions that Triton may see, and whether it could load them."""
    place = f"{folder.name}/config.pbtxt"
    if not model.version_policy.HasField("specific"):
        yield _error(place, "shows Triton every version that appears, verified or not", "list them: specific")
        return
    file = model.default_model_filename or ("model.onnx" if model.backend == "onnxruntime" else "model.py")
    for version in model.version_policy.specific.versions:
        path = folder / str(version) / file
        if not path.is_file():
            problem = f"lists version {version}, which has no {file}: at a cold start the whole model fails"
            yield _error(place, problem, "'make export' restores it; else take it off the list")
        elif path.suffix == ".onnx" and os.access(path, os.R_OK):
            yield from _graph(path, f"{folder.name}/{version}/{file}")


def _graph(path: Path, place: str) -> Iterator[Finding]:
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        yield _error(place, "is no ONNX file, or only a part of one", "restore it")
        return
    opset = graph.opset_of(model)
    if opset > graph.MAX_OPSET or model.ir_version > graph.MAX_IR_VERSION:
        limits = f"opset {graph.MAX_OPSET}, IR {graph.MAX_IR_VERSION}"
        yield _error(place, f"opset {opset}, IR {model.ir_version}: the server knows {limits}", "export it for those")
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            location = next((e.value for e in tensor.external_data if e.key == "location"), "")
            if not (path.parent / location).is_file():
                yield _error(place, f"its weights in {location} are missing", "put them into the file itself")
                return


def _ensemble(root: Path, name: str, model: pb.ModelConfig, models: dict[str, pb.ModelConfig]) -> Iterator[Finding]:
    """What a release pins, and whether that is what lies there."""
    place = f"{name}/config.pbtxt"
    if not any(path.is_dir() and path.name.isdigit() for path in (root / name).iterdir()):
        yield _error(name, "an ensemble without a version folder is not loaded", "make an empty folder 1")
    for step in model.ensemble_scheduling.step:
        if step.model_name not in models:
            yield _error(place, f"needs {step.model_name}, which is not here", "restore it, or retire the release")
        elif step.model_version < 1:
            problem = f"takes whatever version of {step.model_name} is the newest"
            yield _error(place, problem, "pin a number: it changes under a request otherwise")
        elif step.model_version not in models[step.model_name].version_policy.specific.versions:
            problem = f"pins {step.model_name} {step.model_version}, which Triton is not shown"
            remedy = "restore it if it was edited, then 'make export' lists it again; or retire the release"
            yield _error(place, problem, remedy)
    if contract.parse_release_name(name) is None:
        return
    try:
        manifest = config.manifest_of(name, model)
    except ValueError as error:
        yield _error(place, str(error), "publish it with 'python -m export'")
        return
    for step_name, pin in manifest.steps.items():
        folder = root / contract.step_model(manifest.pipeline, step_name) / str(pin.version)
        try:
            found = Step.read(folder)
        except (NoModel, OSError):
            continue  # said above
        if found and found.digest != pin.digest:
            problem = f"is not what {name} recorded: it was edited after it was published"
            yield _error(str(folder.relative_to(root)), problem, "restore it; new content needs a new number")


def main(arguments: list[str] | None = None) -> int:
    """Print what was found; 1 where there is an error."""
    parse = argparse.ArgumentParser(prog="python -m export doctor", description=__doc__)
    parse.add_argument("--repository", type=Path, default=REPOSITORY, metavar="DIR", help="default: model_repository")
    options = parse.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        findings = inspect(options.repository) + above(options.repository)
    except OSError as error:
        console.print(f"error: {error}", markup=False)
        return 1
    for finding in findings:
        line = f"{finding.severity}: {finding.place}: {finding.problem}; {finding.remedy}"
        console.print(line, markup=False, style="red" if finding.severity == "error" else "yellow")
    errors = sum(finding.severity == "error" for finding in findings)
    counts = ((errors, "error"), (len(findings) - errors, "warning"))
    told = ", ".join(f"{count} {name}{'s' if count != 1 else ''}" for count, name in counts)
    console.print(f"{told} in {options.repository}", markup=False)
    return 1 if errors else 0
