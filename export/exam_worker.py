"""The part of the exam that runs what is examined, in a process of its own: it may hang, crash or lie.

`python -m export.exam_worker` reads a `Job` as JSON from stdin and writes a JSON object a line to stdout: `{"begin":
name}` and then `{"check": {...}}` for every check, `{"progress": text}` in between, `{"recorded": {...}}` at last.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import onnx
from onnx import checker
from onnx.external_data_helper import uses_external_data
from pydantic import BaseModel
from tritonclient.grpc import model_config_pb2 as pb

import contract
from export import config, graph
from export.backend import Answers, Pipeline

_SAME = 1e-3
"""Largest difference of a probability between runs that must agree: other batches, and again."""
_ROUNDS, _ROUND_S = 5, 0.1
_BROKEN = {"empty": b"", "text": b"no picture", "half a JPEG": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00"}


class Job(BaseModel):
    """What to examine: version folders by step, `config.pbtxt` texts by step, and what to hold it against."""

    candidate: dict[str, Path]
    current: dict[str, Path] | None
    configs: dict[str, str]
    labels: list[str]
    pictures: list[Path]
    labelled: dict[str, list[Path]]
    has_own_golden: bool = True
    min_agreement: float
    min_accuracy: float
    max_cost: float | None


class Check(BaseModel):
    """One line of a verdict. `detail` names the cause: which picture, which delta, how much of what is allowed."""

    name: str
    passed: bool
    detail: str
    seconds: float = 0.0


class CheckFailed(Exception):
    """A check that was not passed; the message says why."""


class ExamWorker:
    """Runs the checks on one candidate, in the order of `CHECKS`."""

    def __init__(self, job: Job, say: Callable[[dict[str, Any]], None]) -> None:
        self.job = job
        self.say = say
        self.configs = {step: config.parse(text) for step, text in job.configs.items()}
        self.pictures = {path.name: path.read_bytes() for path in job.pictures}
        self.candidate: Pipeline
        self.current: Pipeline | None = None
        self.model: onnx.ModelProto
        self.answers: dict[str, tuple[str, dict[str, float]]] = {}
        self.evaluation: dict[str, Any] = {}

    def graph(self) -> str:
        """The ONNX file is valid, whole, and within what the target server can load."""
        path = self.job.candidate["classifier"] / "model.onnx"
        self.model = model = onnx.load(path, load_external_data=False)
        if any(uses_external_data(tensor) for tensor in model.graph.initializer):
            raise CheckFailed("its weights lie outside of model.onnx: save them in the file itself")
        opset = graph.opset_of(model)
        if opset > graph.MAX_OPSET:
            raise CheckFailed(f"opset {opset}: the server knows up to {graph.MAX_OPSET}")
        if model.ir_version > graph.MAX_IR_VERSION:
            raise CheckFailed(f"IR version {model.ir_version}: the server knows up to {graph.MAX_IR_VERSION}")
        try:
            checker.check_model(model, full_check=True)
        except Exception as error:  # shape inference raises types of its own
            raise CheckFailed(f"not valid ONNX: {_line(error)}") from None
        return f"opset {opset}, IR version {model.ir_version}"

    def signature(self) -> str:
        """The graph's inputs and outputs are those that Triton is configured with."""
        declared = self.configs["classifier"]
        for kind, expected, tensors in (
            ("input", declared.input, self.model.graph.input),
            ("output", declared.output, self.model.graph.output),
        ):
            found = {value.name: _tensor(value) for value in tensors}
            wanted = {tensor.name: (pb.DataType.Name(tensor.data_type), ["N", *tensor.dims]) for tensor in expected}
            for name, tensor in wanted.items():
                if name not in found:
                    raise CheckFailed(
                        f"the {kind} {name} is missing; there are {', '.join(found)}: was it exported here?"
                    )
                if found[name] != tensor:
                    raise CheckFailed(f"the {kind} {name} is {_text(found[name])}, the pipeline has {_text(tensor)}")
            if unknown := sorted(set(found) - set(wanted)):
                raise CheckFailed(f"the {kind} {unknown[0]} is none of the pipeline's")
        return f"as in {declared.name}/config.pbtxt"

    def labels(self) -> str:
        """The labels that the graph was exported with are the pipeline's, in the same order."""
        properties = {entry.key: entry.value for entry in self.model.metadata_props}
        if "labels" not in properties:
            return "the graph names none"
        found = properties["labels"].split("\n")
        if found != self.job.labels:
            raise CheckFailed(
                f"the graph's outputs are {', '.join(found)}, the pipeline's {', '.join(self.job.labels)}"
            )
        return ", ".join(found)

    def load(self) -> str:
        """Every step loads."""
        self.candidate = Pipeline(self.job.candidate, self.configs)
        if self.job.current:
            self.current = Pipeline(self.job.current, self.configs)
        return "model, preprocessing and postprocessing"

    def answers_well_formed(self) -> str:
        """Every golden picture is answered: finite, summing to one, with the pipeline's labels."""
        for name, picture in self.pictures.items():
            self.answers[name] = self._answer(self.candidate, name, picture)
        return f"{len(self.answers)} golden pictures"

    def digest(self) -> str:
        """The digest that comes with an answer is that of the graph's content."""
        expected = graph.content_digest(self.model)
        answers = self.candidate.run(list(self.pictures.values())[:2])
        for row in answers.outputs[contract.DIGEST]:
            if row[0].decode() != expected:
                raise CheckFailed(
                    f"the graph says {row[0].decode()[:12]}, its content is {expected[:12]}: export it again"
                )
        return expected[:12]

    def deterministic(self) -> str:
        """The same picture gives the same answer again."""
        for name, picture in self.pictures.items():
            self._compare(name, self._answer(self.candidate, name, picture), self.answers[name], "a second time")
        return "twice the same"

    def batching(self) -> str:
        """A batch answers as its pictures do alone."""
        size = self.configs["classifier"].max_batch_size
        names = list(itertools.islice(itertools.cycle(self.pictures), size))
        batch = self.candidate.run([self.pictures[name] for name in names])
        for i, name in enumerate(names):
            self._compare(name, self._read(batch, i, name), self.answers[name], f"in a batch of {size}")
        return f"a batch of {size} equals {size} of 1"

    def bad_pictures(self) -> str:
        """What is no picture is reported as such, and costs its neighbours nothing."""
        name, picture = next(iter(self.pictures.items()))
        for kind, broken in _BROKEN.items():
            answers = self.candidate.run([picture, broken])
            if not answers.error(1).startswith("image_"):
                raise CheckFailed(f"{kind} is answered as if it were a picture: {answers.label(1) or 'no error'}")
            self._compare(name, self._read(answers, 0, name), self.answers[name], f"beside {kind}")
        return f"{len(_BROKEN)} kinds reported"

    def agreement(self) -> str:
        """It decides mostly as the release that it would follow."""
        if self.current is None:
            return "no release to compare with"
        differing, pictures = [], 0
        judges = [*(self.pictures.items() if self.job.has_own_golden else ()), *self._labelled()]
        if not judges:
            return "not judged: the golden pictures are another pipeline's; --golden names pictures of this one"
        for name, picture in self._progress("agreement", judges):
            pictures += 1
            now, was = self._answer(self.candidate, name, picture), self._answer(self.current, name, picture)
            if now[0] != was[0]:
                differing.append(f"{name}: {was[0]} {was[1][was[0]]:.2f} became {now[0]} {now[1][now[0]]:.2f}")
        share = 1 - len(differing) / pictures
        self.evaluation["agreement"] = round(share, 4)
        text = f"{share:.3f} of {pictures} pictures (at least {self.job.min_agreement:g})"
        if share < self.job.min_agreement:
            raise CheckFailed(f"{text}: {'; '.join(differing[:5])}")
        return text

    def accuracy(self) -> str:
        """On labelled pictures, where some are given, it is right often enough."""
        pictures = [(path, label) for label, paths in self.job.labelled.items() for path in paths]
        if not pictures:
            return "no labelled pictures given"
        right = {"candidate": 0, "current": 0}
        for path, truth in self._progress("accuracy", pictures):
            for which, pipeline in (("candidate", self.candidate), ("current", self.current)):
                if pipeline:
                    right[which] += self._answer(pipeline, path.name, path.read_bytes())[0] == truth
        share = right["candidate"] / len(pictures)
        self.evaluation |= {"accuracy": round(share, 4), "pictures": len(pictures)}
        text = f"{share:.3f} of {len(pictures)} pictures (at least {self.job.min_accuracy:g})"
        if self.current:
            text += f"; the current release {right['current'] / len(pictures):.3f}"
        if share < self.job.min_accuracy:
            raise CheckFailed(text)
        return text

    def cost(self) -> str:
        """It does not need much more processor time than the release that it would follow."""
        pipelines = [pipeline for pipeline in (self.candidate, self.current) if pipeline]
        passes = [self._passes(pipeline) for pipeline in pipelines]
        best = [float("inf")] * len(pipelines)
        for _ in range(_ROUNDS):  # in turns, so that a busy machine slows both
            for i, pipeline in enumerate(pipelines):
                start = time.process_time()
                for picture in list(self.pictures.values()) * passes[i]:
                    pipeline.run([picture])
                best[i] = min(best[i], (time.process_time() - start) / passes[i])
        seconds = best[0]
        text = f"{seconds / len(self.pictures) * 1e3:.1f} ms of processor a picture"
        if self.current is None:
            return f"{text}; no release to compare with"
        ratio = seconds / max(best[1], 1e-9)
        self.evaluation["cost"] = round(ratio, 2)
        text += f", {ratio:.2f} of the current release's"
        if self.job.max_cost is None:
            return f"{text} (not judged here)"
        text += f" (at most {self.job.max_cost:g})"
        if ratio > self.job.max_cost:
            raise CheckFailed(text)
        return text

    def _passes(self, pipeline: Pipeline) -> int:
        """How often to run the golden pictures, so that a coarse clock of processor time can tell."""
        start = time.monotonic()
        for picture in self.pictures.values():
            pipeline.run([picture])
        return 1 + int(_ROUND_S / (time.monotonic() - start))

    def _answer(self, pipeline: Pipeline, name: str, picture: bytes) -> tuple[str, dict[str, float]]:
        return self._read(pipeline.run([picture]), 0, name)

    def _read(self, answers: Answers, i: int, name: str) -> tuple[str, dict[str, float]]:
        """Label and scores of a picture that must be answered."""
        if answers.error(i):
            raise CheckFailed(f"{name}: {answers.error(i)}")
        label, scores = answers.label(i), answers.scores(i)
        if not np.isfinite(list(scores.values())).all():
            raise CheckFailed(f"{name}: the probabilities are not finite: {scores}")
        if abs(sum(scores.values()) - 1) > 1e-3 or min(scores.values()) < -1e-6:
            raise CheckFailed(f"{name}: the probabilities sum to {sum(scores.values()):.4f}: is the softmax missing?")
        if unknown := sorted({label, *scores} - set(self.job.labels)):
            raise CheckFailed(f"{name}: answered with {unknown[0]!r}, which the pipeline's contract lacks")
        if len(scores) != len(self.job.labels):
            raise CheckFailed(f"{name}: scores for {', '.join(scores)} only")
        return label, scores

    @staticmethod
    def _compare(
        name: str, got: tuple[str, dict[str, float]], expected: tuple[str, dict[str, float]], when: str
    ) -> None:
        golden = contract.Golden(name, b"", expected[0], expected[1])
        if difference := golden.difference(got[0], got[1], _SAME):
            raise CheckFailed(f"{when}, {difference}")

    def _labelled(self) -> list[tuple[str, bytes]]:
        return [(path.name, path.read_bytes()) for paths in self.job.labelled.values() for path in paths]

    def _progress(self, name: str, items: list[Any]) -> Iterator[Any]:
        for i, item in enumerate(items):
            if i % 10 == 0:
                self.say({"progress": f"{name}: {i} of {len(items)} pictures"})
            yield item


CHECKS: Mapping[str, Callable[[ExamWorker], str]] = {
    "graph": ExamWorker.graph,
    "signature": ExamWorker.signature,
    "labels": ExamWorker.labels,
    "load": ExamWorker.load,
    "answers": ExamWorker.answers_well_formed,
    "digest": ExamWorker.digest,
    "deterministic": ExamWorker.deterministic,
    "batching": ExamWorker.batching,
    "bad pictures": ExamWorker.bad_pictures,
    "agreement": ExamWorker.agreement,
    "accuracy": ExamWorker.accuracy,
    "cost": ExamWorker.cost,
}
"""In this order. The first ones decide whether the later ones can run at all."""
REQUIRED = ("graph", "signature", "load", "answers")
"""The exam ends with one of these that is not passed."""


def _tensor(value: onnx.ValueInfoProto) -> tuple[str, list[int | str]]:
    kinds: dict[int, str] = {onnx.TensorProto.UINT8: "TYPE_UINT8", onnx.TensorProto.FLOAT: "TYPE_FP32"}
    kind = value.type.tensor_type.elem_type
    dims = value.type.tensor_type.shape.dim
    shape: list[int | str] = [d.dim_value if d.HasField("dim_value") else "N" for d in dims]
    return kinds.get(kind, onnx.TensorProto.DataType.Name(kind)), shape


def _text(tensor: tuple[str, list[int | str]]) -> str:
    return f"{tensor[0].removeprefix('TYPE_')} [{', '.join(map(str, tensor[1]))}]"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def examine(job: Job, say: Callable[[dict[str, Any]], None]) -> None:
    """Run every check that can be run, and record what a passing release needs."""
    worker = ExamWorker(job, say)
    for name, check in CHECKS.items():
        say({"begin": name})
        start = time.monotonic()
        try:
            passed, detail = True, check(worker)
        except CheckFailed as refusal:
            passed, detail = False, str(refusal)
        except Exception as error:  # what is examined may raise anything
            passed, detail = False, f"{type(error).__name__}: {_line(error)}"
        seconds = round(time.monotonic() - start, 3)
        say({"check": Check(name=name, passed=passed, detail=detail, seconds=seconds).model_dump()})
        if not passed and name in REQUIRED:
            return
    golden = {
        name: contract.Golden(name, worker.pictures[name], label, scores).to_json()
        for name, (label, scores) in worker.answers.items()
    }
    say({"recorded": {"golden": golden, "evaluation": worker.evaluation}})


def main() -> int:
    """One job from stdin."""
    protocol: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a step prints is no part of the protocol

    def say(message: dict[str, Any]) -> None:
        protocol.write(json.dumps(message) + "\n")
        protocol.flush()

    examine(Job.model_validate_json(sys.stdin.read()), say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
