"""The steps of a pipeline as content: files and their digest, whether on disk or about to be written."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import onnx
from google.protobuf.message import DecodeError

from export.graph import content_digest

REPOSITORY = Path(__file__).resolve().parent.parent / "model_repository"
"""The repository of this checkout."""

VERDICT = "verdict.json"
"""What the exam says of a dropped version, in its folder; no part of its content."""


_MOST_BYTES = 1 << 31
"""Of one file of a version, all of which is read at once. More no ONNX file has."""


class NoModel(ValueError):
    """A version's file is too large, or no ONNX file; the message begins with its name."""


@dataclass(frozen=True)
class Step:
    """One version of one step: its files by name, and the SHA-256 of its content in hexadecimal."""

    files: Mapping[str, bytes]
    digest: str

    @classmethod
    def of_files(cls, files: Mapping[str, bytes]) -> Step:
        """A Python step, digested by its files' names and contents."""
        return cls(files, digest_of((name, files[name]) for name in sorted(files)))

    @classmethod
    def of_graph(cls, model: onnx.ModelProto) -> Step:
        """A classifier step, digested by its graph's content (the digest that the graph itself returns)."""
        return cls({"model.onnx": model.SerializeToString(deterministic=True)}, content_digest(model))

    @classmethod
    def read(cls, folder: Path) -> Step | None:
        """The version in `folder`; None where the folder is missing or empty.

        Raises:
            NoModel: its model.onnx is no ONNX file, or a file is larger than one can be.
        """
        paths = [p for p in sorted(folder.glob("[!.]*")) if p.is_file() and p.name != VERDICT]
        if not paths:
            return None
        for path in paths:
            if (size := path.stat().st_size) > _MOST_BYTES:
                raise NoModel(f"{path.name} has {size / 2**30:.1f} GiB: {_MOST_BYTES >> 30} at most")
        files = {path.name: path.read_bytes() for path in paths}
        if "model.onnx" in files:
            try:
                return cls(files, content_digest(onnx.load_from_string(files["model.onnx"])))
            except DecodeError:
                raise NoModel("model.onnx is no ONNX file, or only a part of one") from None
        return cls.of_files(files)

    def with_file(self, name: str, content: bytes) -> Step:
        """This Python step with one file replaced."""
        return Step.of_files({**self.files, name: content})


def digest_of(files: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256, in hexadecimal, over names and contents, in the order given."""
    digest = hashlib.sha256()
    for name, content in files:
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def is_hidden(name: str) -> bool:
    """Whether a file is somebody else's in a drop: .DS_Store, ._model.onnx, .nfs..., rsync's while it copies."""
    return name.startswith(".")


def is_picture(path: Path) -> bool:
    """Whether a file may be a picture: plain, and not hidden."""
    return path.is_file() and not is_hidden(path.name)


def load_module(path: Path) -> ModuleType:
    """Import one Python file of a model repository without making its folder importable.

    Leaves no byte code behind: __pycache__ in a live repository would make Triton reload the step.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: is this a complete model repository?")
    name = "_".join(("step", *path.with_suffix("").parts[-3:]))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look a module up by its name
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module
