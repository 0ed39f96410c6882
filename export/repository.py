"""A model repository on disk: which releases it holds, and publishing another one.

Publishing goes version folders first, then the steps' `config.pbtxt`, then the ensemble, each atomically, so
a crash at any point leaves every earlier release servable, and running again finishes the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

import contract
from contract import Manifest, StepPin
from export import config
from export.atomic import Staging
from export.steps import Step


class RepositoryError(ValueError):
    """The repository is not what its releases say; the message names the place and what to do."""


@dataclass(frozen=True)
class Candidate:
    """A pipeline that is ready to be published: `size` is the classifier's input side in pixels."""

    pipeline: str
    labels: tuple[str, ...]
    size: int
    steps: Mapping[str, Step]
    built_from: str
    evaluation: Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    """The outcome of publishing: the release, and the paths that were written (none: nothing was to do)."""

    manifest: Manifest
    written: tuple[Path, ...]


def is_version(name: str) -> bool:
    """Whether a folder's name is a plain version number. Triton itself is content with a leading digit."""
    return name.isascii() and name.isdigit() and name[0] != "0"


class Repository:
    """The folder that Triton serves."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def pipelines(self) -> list[str]:
        """The names of the pipelines that have a release."""
        names = (contract.parse_release_name(path.parent.name) for path in self.root.glob("*/config.pbtxt"))
        return sorted({parsed[0] for parsed in names if parsed})

    def releases(self, pipeline: str) -> list[Manifest]:
        """The published releases of a pipeline, oldest first.

        Raises:
            RepositoryError: a release's config.pbtxt cannot be read.
        """
        manifests = []
        for path in self.root.glob(f"{pipeline}-v*/config.pbtxt"):
            parsed = contract.parse_release_name(path.parent.name)
            if parsed is None or parsed[0] != pipeline:
                continue
            try:
                manifests.append(config.manifest_of(path.parent.name, config.parse(path.read_text())))
            except ValueError as error:
                raise RepositoryError(f"{path}: {error}") from None
        return sorted(manifests, key=lambda manifest: manifest.number)

    def step_folder(self, pipeline: str, step: str, version: int) -> Path:
        """Where one version of a step lies."""
        return self.root / contract.step_model(pipeline, step) / str(version)

    def is_complete(self, pipeline: str) -> bool:
        """Whether a release is published, and every version that the newest one pins is on disk."""
        releases = self.releases(pipeline)
        return bool(releases) and all(
            pin.version in self.complete_versions(pipeline, step) for step, pin in releases[-1].steps.items()
        )

    def complete_versions(self, pipeline: str, step: str) -> set[int]:
        """The numbered folders of a step that hold what Triton loads first."""
        file = "model.onnx" if step == "classifier" else "model.py"
        versions = self.versions(pipeline, step)
        return {version for version in versions if (self.step_folder(pipeline, step, version) / file).is_file()}

    def versions(self, pipeline: str, step: str) -> list[int]:
        """The numbered folders of a step, whether or not a release pins them."""
        folder = self.root / contract.step_model(pipeline, step)
        return sorted(int(path.name) for path in folder.glob("*") if path.is_dir() and is_version(path.name))

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
        raise RepositoryError(f"{self.root} has no defect_{step} to take the code of the step from")

    def publish(self, candidate: Candidate, serving: config.Serving) -> Published:
        """Publish `candidate` as a release, or complete the release that it already is.

        Raises:
            RepositoryError: a published version differs from what its release recorded, or the candidate or
                the serving settings do not fit the pipeline's earlier releases.
        """
        with Staging.beside(self.root) as staging:
            releases = self.releases(candidate.pipeline)
            pins = {
                step: self._pin(candidate.pipeline, step, candidate.steps[step], releases) for step in contract.STEPS
            }
            known = next((r for r in releases if r.steps == pins and r.labels == candidate.labels), None)
            manifest = known or Manifest(
                pipeline=candidate.pipeline,
                number=releases[-1].number + 1 if releases else 1,
                labels=candidate.labels,
                steps=pins,
                built_from=candidate.built_from,
                built_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                evaluation=candidate.evaluation,
            )
            live = releases if known else [*releases, manifest]
            self._require_same_signature(candidate, serving, releases)
            written = []
            for step, pin in pins.items():
                written += self._complete_version(staging, candidate, step, pin)
            for step, content in self._step_configs(candidate, serving, live).items():
                path = self.root / contract.step_model(candidate.pipeline, step) / "config.pbtxt"
                if not path.is_file() or path.read_bytes() != content:
                    staging.write_file(path, content)
                    written.append(path)
            folder = self.root / manifest.name
            if known is None:
                rendered = config.render(config.ensemble(manifest, serving.max_batch_size))
                # An ensemble needs a version folder, and git keeps no empty ones.
                staging.write_folder(folder, {"config.pbtxt": rendered, "1/.keep": b""})
                written.append(folder)
        return Published(manifest, tuple(written))

    def _pin(self, pipeline: str, step: str, content: Step, releases: list[Manifest]) -> StepPin:
        """The number under which this content is published already, or the next free one."""
        pinned = {release.steps[step].version: release.steps[step].digest for release in releases}
        for version, digest in pinned.items():
            if digest == content.digest:
                return StepPin(version, digest)
        on_disk = self.versions(pipeline, step)
        for version in sorted(set(on_disk) - set(pinned)):
            try:
                found = Step.read(self.step_folder(pipeline, step, version))
            except DecodeError:
                continue  # somebody's unfinished or broken drop: not ours to touch
            if found and found.digest == content.digest:
                return StepPin(version, content.digest)
        return StepPin(max([0, *on_disk, *pinned]) + 1, content.digest)

    def _complete_version(self, staging: Staging, candidate: Candidate, step: str, pin: StepPin) -> list[Path]:
        folder = self.step_folder(candidate.pipeline, step, pin.version)
        try:
            found = Step.read(folder)
        except DecodeError:
            found = Step({}, "unreadable")
        if found is None:  # absent, or a clone: git does not keep the built model.onnx
            if folder.is_dir():
                folder.rmdir()
            staging.write_folder(folder, candidate.steps[step].files)
            return [folder]
        self._require_unchanged(folder, found, pin)
        return []

    @staticmethod
    def _require_unchanged(folder: Path, found: Step, pin: StepPin) -> None:
        if found.digest != pin.digest:
            raise RepositoryError(
                f"{folder} is not what its release recorded ({found.digest[:12]} instead of {pin.digest[:12]}): "
                f"published versions are never edited; restore it, or move the new content to a new number"
            )

    def _require_same_signature(self, candidate: Candidate, serving: config.Serving, releases: list[Manifest]) -> None:
        for release in releases:
            path = self.root / release.name / "config.pbtxt"
            batch = config.parse(path.read_text()).max_batch_size
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
        path = self.root / contract.step_model(candidate.pipeline, "classifier") / "config.pbtxt"
        if releases and path.is_file():
            size = config.parse(path.read_text()).input[0].dims[0]
            if size != candidate.size:
                raise RepositoryError(
                    f"{candidate.pipeline} takes {size} pixels a side and this model {candidate.size}: "
                    f"another signature needs another pipeline name"
                )

    def _step_configs(self, candidate: Candidate, serving: config.Serving, live: list[Manifest]) -> dict[str, bytes]:
        pipeline, labels = candidate.pipeline, len(candidate.labels)
        # A pinned version that is not on disk (a clone has no old model.onnx) would fail the whole model at a cold
        # start, and every release with it; left out, it fails the release that pins it alone.
        pinned = {
            step: {release.steps[step].version for release in live} & self.complete_versions(pipeline, step)
            for step in contract.STEPS
        }
        configs = {
            "preprocess": config.preprocess(pipeline, pinned["preprocess"], candidate.size, serving),
            "classifier": config.classifier(pipeline, pinned["classifier"], candidate.size, labels, serving),
            "postprocess": config.postprocess(pipeline, pinned["postprocess"], labels, serving),
        }
        return {step: config.render(rendered) for step, rendered in configs.items()}
