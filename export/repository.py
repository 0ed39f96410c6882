"""A model repository on disk: which releases it holds, publishing another one, and retiring one.

Publishing goes version folders first, then the steps' `config.pbtxt`, then the ensemble, each atomically, so
a crash at any point leaves every earlier release servable, and running again finishes the job. Retiring goes the
other way.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from tritonclient.grpc import model_config_pb2 as pb

import contract
from contract import Manifest, StepPin
from export import config, rights, walk
from export.atomic import Staging
from export.candidate import Candidate
from export.steps import NoModel, Step


class RepositoryError(ValueError):
    """The repository is not what its releases say; the message names the place and what to do."""


def told(error: Exception) -> str:
    """An exception in one line: its type as well, where its text is not written for people."""
    text = " ".join(str(error).split())
    if isinstance(error, RepositoryError | OSError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Overtaken(RepositoryError):
    """A release came or went since a candidate was put together: what it takes from the newest one is out of date."""


@dataclass(frozen=True)
class Published:
    """The outcome of publishing: the release, and the paths that were written (none: nothing was to do)."""

    manifest: Manifest
    written: tuple[Path, ...]


def is_version(name: str) -> bool:
    """Whether a folder's name is a plain version number. Triton itself is content with a leading digit."""
    return name.isascii() and name.isdigit() and name[0] != "0"


RECORD = "releases.json"
"""What every release pins that was ever published: a number names one release forever, and what was published once is,
unchanged, never a drop again, however its release went."""
_OLD_RECORD = "retired.json"
"""Earlier exports wrote down the retired ones alone. Both lie in the root, where Triton looks for folders only."""


# Reading failed, and not because of what was to be read: no reason to take a version out of sight.
_OURS = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO}


BARE = "a folder without config.pbtxt: Triton fails on it at every poll"


def bare_folders(root: Path) -> list[Path]:
    """The folders in a repository that Triton takes for models, and that have no configuration."""
    return [path for path in sorted(root.iterdir()) if path.is_dir() and not holds_config(path)]


def holds_config(folder: Path) -> bool:
    """Whether a folder has a config.pbtxt; one that must not be looked into may have, and reading it says so."""
    try:
        return (folder / "config.pbtxt").is_file()
    except PermissionError:
        return True


def _read(path: Path) -> pb.ModelConfig:
    """A config.pbtxt.

    Raises:
        RepositoryError: it is none; the message names it.
        OSError: it cannot be read.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise RepositoryError(f"{path} is no plain file")
    try:
        return config.parse(path.read_text())
    except ValueError as error:
        raise RepositoryError(f"{path}: {error}") from None


class Repository:
    """The folder that Triton serves."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._digests: dict[Path, tuple[object, str]] = {}
        self._newest: dict[Path, int] = {}

    def pipelines(self) -> list[str]:
        """The names of the pipelines that have a release."""
        parsed = (contract.parse_release_name(path.name) for path in self.root.glob("*-v*") if holds_config(path))
        return sorted({each[0] for each in parsed if each})

    def releases(self, pipeline: str) -> list[Manifest]:
        """The published releases of a pipeline, oldest first.

        Raises:
            RepositoryError: a release's config.pbtxt cannot be read.
        """
        manifests = []
        for folder in self.root.glob(f"{pipeline}-v*"):
            parsed = contract.parse_release_name(folder.name)
            if parsed is None or parsed[0] != pipeline or not holds_config(folder):
                continue
            release = _read(folder / "config.pbtxt")
            try:
                manifests.append(config.manifest_of(folder.name, release))
            except ValueError as error:
                raise RepositoryError(f"{folder / 'config.pbtxt'}: {error}") from None
        return sorted(manifests, key=lambda manifest: manifest.number)

    def release(self, name: str) -> Manifest:
        """A release by its name.

        Raises:
            RepositoryError: there is none of that name.
        """
        parsed = contract.parse_release_name(name)
        releases = self.releases(parsed[0]) if parsed else []
        for release in releases:
            if release.name == name:
                return release
        there = ", ".join(release.name for release in releases) or "none of its pipeline"
        raise RepositoryError(f"there is no release {name}; there is {there}")

    def gone(self, pipeline: str) -> dict[str, dict[str, StepPin]]:
        """The pins of the releases of a pipeline that were retired, or removed by hand, by name.

        Raises:
            RepositoryError: the record cannot be read.
        """
        return {
            name: pins
            for name, pins in self._recorded().items()
            if (parsed := contract.parse_release_name(name))
            and parsed[0] == pipeline
            and not holds_config(self.root / name)
        }

    def _recorded(self) -> dict[str, dict[str, StepPin]]:
        recorded: dict[str, dict[str, StepPin]] = {}
        for path in (self.root / _OLD_RECORD, self.root / RECORD):
            try:
                found = json.loads(path.read_text()) if path.is_file() else {}
                recorded |= {
                    name: {step: StepPin(**pins[step]) for step in contract.STEPS} for name, pins in found.items()
                }
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise RepositoryError(f"{path}: not the record of releases: {error}") from None
        return recorded

    def _record(self, staging: Staging, releases: Iterable[Manifest]) -> list[Path]:
        """Write down what these releases pin, where that is not there yet."""
        recorded = self._recorded()
        new = recorded | {release.name: dict(release.steps) for release in releases}
        if new == recorded:
            return []
        path = self.root / RECORD
        content = {name: {step: vars(pin) for step, pin in pins.items()} for name, pins in sorted(new.items())}
        staging.write_file(path, (json.dumps(content, indent=2) + "\n").encode())
        return [path]

    def step_folder(self, pipeline: str, step: str, version: int) -> Path:
        """Where one version of a step lies."""
        return self.root / contract.step_model(pipeline, step) / str(version)

    def is_complete(self, pipeline: str) -> bool:
        """Whether a release is published, and everything that the newest one pins is on disk."""
        releases = self.releases(pipeline)
        return bool(releases) and not self.lacks(releases[-1])

    def newest(self, pipeline: str) -> Manifest | None:
        """The newest release whose versions are all there."""
        return next((release for release in reversed(self.releases(pipeline)) if not self.lacks(release)), None)

    def lacks(self, release: Manifest) -> dict[str, str]:
        """The models whose version is not as the release recorded it, and how: "missing", "edited" or "unreadable"."""
        return {
            contract.step_model(release.pipeline, step): fault
            for step, pin in release.steps.items()
            if (fault := self._fault(release.pipeline, step, pin))
        }

    def _fault(self, pipeline: str, step: str, pin: StepPin) -> str:
        """What would keep Triton from the version that a release pins; empty where nothing would."""
        folder = self.step_folder(pipeline, step, pin.version)
        try:
            if rights.closed(folder):
                return "unreadable"
        except PermissionError:
            return "unreadable"
        except (FileNotFoundError, NotADirectoryError):
            return "missing"
        digest = self._digest(folder)
        if digest == pin.digest:
            return ""
        return "edited" if digest else "missing"

    def _digest(self, folder: Path) -> str:
        """The digest of a version: empty if missing, "unreadable" if broken. Read again only where a file changed.

        Raises:
            OSError: this process cannot read just now, whatever lies there: that says nothing of the version.
        """
        try:
            seen = [
                (p.name, s.st_size, s.st_mtime_ns, s.st_ino) for p in sorted(folder.glob("[!.]*")) for s in [p.stat()]
            ]
            if (known := self._digests.get(folder)) and known[0] == seen:
                return known[1]
            step = Step.read(folder)
            digest = step.digest if step else ""
        except NoModel:
            digest = "unreadable"
        except OSError as error:
            if error.errno in _OURS:
                raise
            return ""
        self._digests[folder] = (seen, digest)
        return digest

    def versions(self, pipeline: str, step: str) -> list[int]:
        """The numbered folders of a step, whether or not a release pins them."""
        folder = self.root / contract.step_model(pipeline, step)
        return sorted(int(path.name) for path in folder.glob("*") if path.is_dir() and is_version(path.name))

    def unpinned(self, pipeline: str, step: str) -> dict[int, list[str]]:
        """The versions of a step that no release pins, each with the gone releases that pinned it as it is.

        One without any is a drop.
        """
        pinned = {release.steps[step].version for release in self.releases(pipeline)}
        gone = self.gone(pipeline)
        return {
            version: [
                name
                for name, pins in gone.items()
                if pins[step].version == version
                and pins[step].digest == self._digest(self.step_folder(pipeline, step, version))
            ]
            for version in self.versions(pipeline, step)
            if version not in pinned
        }

    def template(self, pipeline: str, step: str) -> Step:
        """The code of a Python step to start from: that of the newest release, of this pipeline or else of `defect`.

        Raises:
            RepositoryError: there is none, or it was edited after its release.
        """
        for name in dict.fromkeys((pipeline, "defect")):
            releases = self.releases(name)
            if releases:
                pin = releases[-1].steps[step]
                found = Step.read(self.step_folder(name, step, pin.version))
                if found:
                    self._require_unchanged(self.step_folder(name, step, pin.version), found, pin)
                    return found
            elif (versions := self.versions(name, step)) and (
                found := Step.read(self.step_folder(name, step, versions[-1]))
            ):
                return found
        remedy = "begin with a copy of this checkout's model_repository"
        raise RepositoryError(f"{self.root} has no defect_{step} to take the code of the step from: {remedy}")

    def publish(self, candidate: Candidate, serving: config.Serving, *, new: bool = True) -> Published:
        """Publish `candidate` as a release, or complete the release that it already is; without `new`, only that.

        Raises:
            Overtaken: the newest release is not the candidate's `base` any more, or, without `new`, it was retired.
            RepositoryError: a published version differs from what its release recorded, or the candidate or
                the serving settings do not fit the pipeline's earlier releases.
        """
        with Staging.beside(self.root) as staging:
            releases = self.releases(candidate.pipeline)
            pins = self._pins(candidate, releases)
            known = self._same(candidate, pins, releases)
            if known is None:
                self._require_current(candidate, new)
            manifest = known or Manifest(
                pipeline=candidate.pipeline,
                number=self._next_number(candidate.pipeline, releases),
                labels=candidate.labels,
                steps=pins,
                built_from=candidate.built_from,
                built_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                evaluation=candidate.evaluation,
                exam=candidate.exam,
                golden=candidate.golden,
                tolerance=candidate.tolerance,
            )
            live = releases if known else [*releases, manifest]
            self.require_fit(candidate, serving)
            self._open_parents(candidate.pipeline)
            written = []
            for step, pin in pins.items():
                written += self._complete_version(staging, candidate, step, pin)
            for step, content in self._step_configs(candidate, serving, live).items():
                path = self.root / contract.step_model(candidate.pipeline, step) / "config.pbtxt"
                if not path.is_file() or path.read_bytes() != content:
                    staging.write_file(path, content, later_than_ns=self._newest_date(path.parent))
                    written.append(path)
            folder = self.root / manifest.name
            if known is None:
                rendered = config.render(config.ensemble(manifest, serving.max_batch_size))
                # An ensemble needs a version folder, and git keeps no empty ones.
                staging.write_folder(folder, {"config.pbtxt": rendered, "1/.keep": b""})
                written.append(folder)
            written += self._record(staging, [manifest])
        return Published(manifest, tuple(written))

    def _require_current(self, candidate: Candidate, new: bool) -> None:
        """With the lock held: whoever published or retired a release meanwhile must not be undone by this one."""
        newest = self.newest(candidate.pipeline)
        name = newest.name if newest else ""
        if candidate.base not in (None, name):
            was = candidate.base or "no release"
            raise Overtaken(f"{name or 'no release'} is the newest now, and this was put together with {was}")
        if not new:
            raise Overtaken("the release that this was is retired")

    def published(self, candidate: Candidate) -> Manifest | None:
        """The release that this candidate is already."""
        releases = self.releases(candidate.pipeline)
        return self._same(candidate, self._pins(candidate, releases), releases)

    @staticmethod
    def _same(candidate: Candidate, pins: Mapping[str, StepPin], releases: list[Manifest]) -> Manifest | None:
        return next((r for r in releases if r.steps == pins and r.labels == candidate.labels), None)

    def _next_number(self, pipeline: str, releases: list[Manifest]) -> int:
        """One more than was ever given: a number names one release forever."""
        gone = (contract.parse_release_name(name) for name in self.gone(pipeline))
        return 1 + max([0, *(r.number for r in releases), *(parsed[1] for parsed in gone if parsed)])

    def retire(self, name: str, allow: Callable[[], None] = lambda: None) -> Manifest:
        """Take a release back. Its versions stay on disk, where Triton does not see them any more.

        `allow` is asked first, while nobody else publishes or retires: it raises where the release has to stay.

        Raises:
            RepositoryError: there is no such release, or it is the pipeline's only one.
        """
        with Staging.beside(self.root) as staging:
            allow()
            manifest = self.release(name)
            if len(self.releases(manifest.pipeline)) == 1:
                raise RepositoryError(f"{name} is the only release: publish another one first")
            self._record(staging, [manifest])
            staging.remove_folder(self.root / name)
            self._show_what_is_sound(staging, manifest.pipeline)
        return manifest

    def reconcile(self, pipeline: str) -> dict[Path, str]:
        """Show Triton exactly the versions that releases pin and that are what those recorded.

        Finishes what a crash interrupted, lets everybody read what is published, and takes out what was removed,
        edited or closed after it was published: at a cold start it would fail every release. What cannot be mended
        here is left, for `require_servable` to say. Returns what was changed, and how.
        """
        for step in contract.STEPS:
            self._newest_date(self.root / contract.step_model(pipeline, step))
        done: dict[Path, str] = {}
        for place, deep in self._places(pipeline):
            with contextlib.suppress(OSError):  # not ours to change
                done |= dict.fromkeys(rights.open_up(place, deep=deep), "everybody may read it now")
        releases = self.releases(pipeline)
        if self._unsound(pipeline) or not {release.name for release in releases} <= self._recorded().keys():
            with Staging.beside(self.root) as staging:
                self._record(staging, releases)
                done |= self._show_what_is_sound(staging, pipeline)
        return done

    def require_servable(self, pipeline: str) -> None:
        """What would fail more than one release at Triton's next start, and that `reconcile` could not mend.

        Raises:
            RepositoryError: the message names every place, and what to do.
        """
        problems = []
        for place, deep in self._places(pipeline):
            with contextlib.suppress(FileNotFoundError, PermissionError):  # in a closed folder, which is named
                problems += [f"{path}: {rights.WHY}: {rights.remedy(path)}" for path in rights.closed(place, deep=deep)]
        for step in contract.STEPS:
            path = self.root / contract.step_model(pipeline, step) / "config.pbtxt"
            try:
                if path.is_file():
                    _read(path)
            except (RepositoryError, OSError) as error:
                problems.append(str(error))
        if problems:
            raise RepositoryError("; ".join(problems))

    def _places(self, pipeline: str) -> Iterator[tuple[Path, bool]]:
        """Everything that Triton reads for a pipeline, and whether all that is in it belongs to that."""
        yield self.root, False
        releases = self.releases(pipeline)
        for step in contract.STEPS:
            folder = self.root / contract.step_model(pipeline, step)
            yield folder, False
            yield folder / "config.pbtxt", False
            for version in sorted({release.steps[step].version for release in releases}):
                yield folder / str(version), True
        for release in releases:
            yield self.root / release.name, True

    def _open_parents(self, pipeline: str) -> None:
        """Open the folders above what is about to be written; `reconcile` sees to the rest."""
        for folder in (self.root, *(self.root / contract.step_model(pipeline, step) for step in contract.STEPS)):
            self._open(folder, deep=False)

    @staticmethod
    def _open(place: Path, *, deep: bool) -> None:
        try:
            rights.open_up(place, deep=deep)
        except FileNotFoundError:
            pass  # written in a moment
        except OSError:
            raise RepositoryError(f"{place}: {rights.WHY}: {rights.remedy(place)}") from None

    def _show_what_is_sound(self, staging: Staging, pipeline: str) -> dict[Path, str]:
        changed = self._unsound(pipeline)
        faults = {
            f"{contract.step_model(pipeline, step)}/{pin.version} is {fault}"
            for release in self.releases(pipeline)
            for step, pin in release.steps.items()
            if (fault := self._fault(pipeline, step, pin))
        }
        for path, content in changed.items():
            staging.write_file(path, content, later_than_ns=self._newest_date(path.parent))
        return dict.fromkeys(changed, "; ".join(["shows what is sound", *sorted(faults)]))

    def _newest_date(self, folder: Path) -> int:
        """The newest date that Triton may have met in a model's folder, in nanoseconds.

        It takes notice of what is newer than that and of nothing else, so what is written here has to be: one drop
        that is dated in the future, even after it was removed, would hide every later release.
        """
        dates = [self._newest.get(folder, 0)]
        for path in walk.below(folder):
            with contextlib.suppress(OSError):
                dates.append(path.lstat().st_mtime_ns)
        self._newest[folder] = max(dates)
        return self._newest[folder]

    def _unsound(self, pipeline: str) -> dict[Path, bytes]:
        """The steps' configurations that show other versions than they should, and what they should be."""
        changed = {}
        for step, versions in self._sound_versions(pipeline, self.releases(pipeline)).items():
            path = self.root / contract.step_model(pipeline, step) / "config.pbtxt"
            if not versions:
                continue  # an empty list is no valid configuration; there is nothing left to protect
            try:
                rendered = _read(path)
            except (RepositoryError, OSError):
                continue  # `require_servable` says so, and the other steps are not to suffer
            if sorted(rendered.version_policy.specific.versions) != sorted(versions):
                rendered.version_policy.specific.versions[:] = sorted(versions)
                changed[path] = config.render(rendered)
        return changed

    def _sound_versions(self, pipeline: str, releases: list[Manifest]) -> dict[str, set[int]]:
        """By step, the versions that releases pin, whose content is what they recorded, and that Triton can read."""
        return {
            step: {
                pin.version
                for pin in (release.steps[step] for release in releases)
                if not self._fault(pipeline, step, pin)
            }
            for step in contract.STEPS
        }

    def _pins(self, candidate: Candidate, releases: list[Manifest]) -> dict[str, StepPin]:
        return {step: self._pin(candidate, step, releases) for step in contract.STEPS}

    def _pin(self, candidate: Candidate, step: str, releases: list[Manifest]) -> StepPin:
        """The number under which this content is published already, or was dropped, or the next free one."""
        pipeline, content = candidate.pipeline, candidate.steps[step]
        pinned = {release.steps[step].version: release.steps[step].digest for release in releases}
        for version, digest in pinned.items():
            if digest == content.digest:
                return StepPin(version, digest)
        if step in candidate.numbers:
            return StepPin(candidate.numbers[step], content.digest)
        on_disk = self.versions(pipeline, step)
        for version in sorted(set(on_disk) - set(pinned)):
            try:
                found = Step.read(self.step_folder(pipeline, step, version))
            except NoModel:
                continue  # somebody's unfinished or broken drop: not ours to touch
            if found and found.digest == content.digest:
                return StepPin(version, content.digest)
        gone = (pins[step].version for pins in self.gone(pipeline).values())
        return StepPin(max([0, *on_disk, *pinned, *gone]) + 1, content.digest)

    def _complete_version(self, staging: Staging, candidate: Candidate, step: str, pin: StepPin) -> list[Path]:
        folder = self.step_folder(candidate.pipeline, step, pin.version)
        try:
            found = Step.read(folder)
        except NoModel:
            found = Step({}, "unreadable")
        if found is None:  # absent, or a clone: git does not keep the built model.onnx
            if folder.is_dir():
                shutil.rmtree(folder)  # with no more in it than `Step.read` ignores
            staging.write_folder(folder, candidate.steps[step].files)
            return [folder]
        self._require_unchanged(folder, found, pin)
        self._open(folder, deep=True)
        return []

    @staticmethod
    def _require_unchanged(folder: Path, found: Step, pin: StepPin) -> None:
        if found.digest != pin.digest:
            raise RepositoryError(
                f"{folder} is not what its release recorded ({found.digest[:12]} instead of {pin.digest[:12]}): "
                f"published versions are never edited; restore it, or move the new content to a new number"
            )

    def require_fit(self, candidate: Candidate, serving: config.Serving) -> None:
        """Refuse what cannot be a release of its pipeline, whatever its answers.

        Raises:
            RepositoryError: the signature, the labels or the largest batch are not those of the earlier releases.
        """
        releases = self.releases(candidate.pipeline)
        for release in releases:
            batch = self.max_batch_size(release.name)
            if batch > serving.max_batch_size:
                raise RepositoryError(
                    f"{release.name} was published with max_batch_size {batch}; its steps cannot go below that: "
                    f"raise it in the serving settings, or retire the release"
                )
            if len(release.labels) != len(candidate.labels):
                raise RepositoryError(
                    f"{release.name} has {len(release.labels)} labels and this model has {len(candidate.labels)}: "
                    f"another signature needs another pipeline name"
                )
        if releases and (size := self.size(candidate.pipeline)) != candidate.size:
            raise RepositoryError(
                f"{candidate.pipeline} takes {size} pixels a side and this model {candidate.size}: "
                f"another signature needs another pipeline name"
            )

    def size(self, pipeline: str) -> int:
        """The side, in pixels, of what a published pipeline's classifier takes."""
        path = self.root / contract.step_model(pipeline, "classifier") / "config.pbtxt"
        try:
            return int(_read(path).input[0].dims[0])
        except IndexError:
            raise RepositoryError(f"{path} does not say what size of picture it takes: write it again") from None

    def max_batch_size(self, name: str) -> int:
        """How many pictures a call to a release may carry; its steps must take as many."""
        return int(_read(self.root / name / "config.pbtxt").max_batch_size)

    def rendered(self, candidate: Candidate, serving: config.Serving) -> dict[str, str]:
        """The steps' configurations as they would be with this candidate, but for the versions."""
        return {step: content.decode() for step, content in self._step_configs(candidate, serving, []).items()}

    def _step_configs(self, candidate: Candidate, serving: config.Serving, live: list[Manifest]) -> dict[str, bytes]:
        pipeline, labels = candidate.pipeline, len(candidate.labels)
        # A pinned version that is not on disk (a clone has no old model.onnx), or was edited, would fail the whole
        # model at a cold start, and every release with it; left out, it fails the release that pins it alone.
        pinned = self._sound_versions(pipeline, live)
        configs = {
            "preprocess": config.preprocess(pipeline, pinned["preprocess"], candidate.size, serving),
            "classifier": config.classifier(pipeline, pinned["classifier"], candidate.size, labels, serving),
            "postprocess": config.postprocess(pipeline, pinned["postprocess"], labels, serving),
        }
        return {step: config.render(rendered) for step, rendered in configs.items()}
