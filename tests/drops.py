"""Versions that somebody might drop into a repository, nearly all of them bad, for a small pipeline named `tiny`."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export import graph
from export.exam import GOLDEN
from export.spec import Spec
from export.steps import VERDICT

SIZE = 64
SPEC = Spec.model_validate({"name": "tiny", "labels": ("dark", "light"), "input": {"size": SIZE, "scale": 1 / 255}})


def golden(repository: Path) -> Path:
    """Golden pictures that are this pipeline's own, beside its repository: those of the exam are another's."""
    own = repository.parent / "golden"
    if not own.is_dir():
        shutil.copytree(GOLDEN, own)
    return own


def network(bias: float = -0.1, *, slow: bool = False) -> onnx.ModelProto:
    """Decides by brightness; `slow` does a lot of arithmetic on the way, to the same effect."""
    weight = np.array([[-24, 24]] * 3, np.float32) / 3
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["scores"]),
    ]
    constants = {"weight": weight, "bias": np.array([15.5 - bias, -15.5 + bias], np.float32)}
    if slow:
        nodes[0].input[0] = "product0"
        nodes.insert(0, helper.make_node("Identity", ["input"], ["x0"]))
        constants["eye"] = np.eye(SIZE, dtype=np.float32)
        for i in range(600):
            last = f"x{i + 1}" if i < 599 else "product0"
            nodes.insert(1 + i, helper.make_node("MatMul", [f"x{i}", "eye"], [last]))
    body = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def sealed(bias: float = -0.1, change: Callable[[onnx.ModelProto], object] = lambda _: None) -> onnx.ModelProto:
    """As the export would write it, but for `change`, which is made before the seal: the digest covers it."""
    model = graph.from_onnx(network(bias), SPEC)
    change(model)
    return reseal(model)


def reseal(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a changed graph the digest of its content, without a look at whether it is valid."""
    content = np.frombuffer(bytes.fromhex(graph.content_digest(model)), np.uint8).reshape(1, 32)
    for tensor in model.graph.initializer:
        if tensor.name == "seal/digest":
            tensor.CopyFrom(numpy_helper.from_array(content.copy(), tensor.name))
    return model


def initializer(model: onnx.ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def before_output(
    model: onnx.ModelProto, *nodes: onnx.NodeProto, constants: dict[str, np.ndarray] | None = None
) -> None:
    """Put nodes between the graph's own probabilities, from now on called `own`, and its output."""
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            if name == graph.PROBABILITIES:
                node.output[i] = "own"
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in (constants or {}).items())


@dataclass(frozen=True)
class Drop:
    """`make` fills the version's folder; `cause` is a regular expression that the verdict must match."""

    step: str
    make: Callable[[Path], object]
    cause: str


def classifier(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.onnx").write_bytes(sealed(change=change).SerializeToString())


def file(content: bytes | Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        data = content(sealed().SerializeToString()) if callable(content) else content
        (folder / "model.onnx").write_bytes(data)

    return make


def python_step(step: str, edits: dict[str, Callable[[str], str]]) -> Callable[[Path], object]:
    """Version 1 of the step with some of its files edited."""

    def make(folder: Path) -> None:
        for path in (folder.parent / "1").iterdir():
            if path.name != VERDICT:
                text = path.read_text()
                edited = edits.get(path.name, str)(text)
                assert path.name not in edits or edited != text, "the edit must have found its place"
                (folder / path.name).write_text(edited)

    return make


def _external(folder: Path, keep: bool) -> None:
    location = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(sealed(), folder / "model.onnx", **location)
    if not keep:
        (folder / "weights.bin").unlink()


def _rename_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "picture"
    for node in model.graph.node:
        node.input[:] = ["picture" if name == graph.PIXELS else name for name in node.input]


def _set_dim(value: onnx.ValueInfoProto, axis: int, size: int) -> None:
    value.type.tensor_type.shape.dim[axis].dim_value = size


def _swap_labels(model: onnx.ModelProto) -> None:
    model.metadata_props[0].value = "light\ndark"


def _swap_outputs(model: onnx.ModelProto) -> None:
    node = helper.make_node("Gather", ["own", "order"], [graph.PROBABILITIES], axis=1)
    before_output(model, node, constants={"order": np.array([1, 0], np.int64)})


def _fill(name: str, value: float) -> Callable[[onnx.ModelProto], object]:
    def change(model: onnx.ModelProto) -> None:
        tensor = initializer(model, name)
        tensor.CopyFrom(numpy_helper.from_array(np.full(tuple(tensor.dims), value, np.float32), name))

    return change


def _random(model: onnx.ModelProto) -> None:
    before_output(
        model,
        helper.make_node("RandomNormalLike", ["own"], ["noise"], scale=0.3),
        helper.make_node("Add", ["own", "noise"], ["noisy"]),
        helper.make_node("Softmax", ["noisy"], [graph.PROBABILITIES], axis=1),
    )


def _depend_on_the_batch(model: onnx.ModelProto) -> None:
    before_output(
        model,
        helper.make_node("ReduceMean", ["own"], ["average"], axes=[0], keepdims=1),
        helper.make_node("Add", ["own", "average"], ["mixed"]),
        helper.make_node("Softmax", ["mixed"], [graph.PROBABILITIES], axis=1),
    )


def _triple(model: onnx.ModelProto) -> None:
    node = helper.make_node("Mul", ["own", "three"], [graph.PROBABILITIES])
    before_output(model, node, constants={"three": np.array(3, np.float32)})


def _unknown_operator(model: onnx.ModelProto) -> None:
    before_output(model, helper.make_node("Sharpen", ["own"], [graph.PROBABILITIES], domain="vendor"))
    model.opset_import.append(helper.make_opsetid("vendor", 1))


def _no_digest(model: onnx.ModelProto) -> None:
    del model.graph.output[1]


def _three_classes(model: onnx.ModelProto) -> None:
    _set_dim(model.graph.output[0], 1, 3)
    third = helper.make_node("Concat", ["own", "own1"], [graph.PROBABILITIES], axis=1)
    first = helper.make_node("Gather", ["own", "first"], ["own1"], axis=1)
    before_output(model, first, third, constants={"first": np.array([0], np.int64)})


def _edited_after_the_seal(folder: Path) -> None:
    model = sealed()
    _fill("user/bias", 0.01)(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def _slow(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(graph.from_onnx(network(slow=True), SPEC).SerializeToString())


def _in_the_future(folder: Path) -> None:
    file(lambda good: good)(folder)
    later = time.time() + 7 * 24 * 3600
    os.utime(folder / "model.onnx", (later, later))


def _sparse(folder: Path) -> None:
    with (folder / "model.onnx").open("wb") as file:
        file.truncate(3 << 30)


def _linked_file(folder: Path) -> None:
    (folder / "model.onnx").symlink_to(folder.parent / "1" / "model.onnx")


def _linked_folder(folder: Path) -> None:
    folder.rmdir()
    folder.symlink_to(folder.parent / "1")


def _loop(folder: Path) -> None:
    file(lambda good: good)(folder)
    (folder / "again").symlink_to(folder)


def _dangling(folder: Path) -> None:
    (folder / "model.onnx").symlink_to("nowhere.onnx")


def _nested(folder: Path) -> None:
    (folder / "model").mkdir()
    file(lambda good: good)(folder / "model")


def _elsewhere(folder: Path) -> None:
    file(lambda good: good)(folder)
    (folder / "model.onnx").rename(folder / "best.onnx")


def _copy(folder: Path) -> None:
    shutil.copy(folder.parent / "1" / "model.onnx", folder)


def _replace(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


_EXECUTE = '        """Answer each request of a batch on its own."""\n'
_LABELS = '"dark",\n    "light"'

BROKEN: dict[str, Drop] = {
    # The file.
    "sparse": Drop("classifier", _sparse, r"^files: .*model\.onnx has 3\.0 GiB: 2 at most"),
    "truncated": Drop("classifier", file(lambda good: good[: len(good) // 2]), r"^files: .*no ONNX file, or only a"),
    "empty": Drop("classifier", file(b""), "^files: .*is empty"),
    "text": Drop("classifier", file(b"version https://git-lfs.github.com/spec/v1\n"), "^files: .*no ONNX file"),
    "external weights, missing": Drop("classifier", lambda f: _external(f, keep=False), "weights lie outside"),
    "external weights, beside": Drop("classifier", lambda f: _external(f, keep=True), r"holds weights\.bin beside"),
    "another name": Drop("classifier", _elsewhere, r"has no model\.onnx; it holds best\.onnx"),
    "in a folder of its own": Drop("classifier", _nested, "model is no plain file"),
    "linked file": Drop("classifier", _linked_file, "is a link"),
    "linked folder": Drop("classifier", _linked_folder, "is a link"),
    "link in a loop": Drop("classifier", _loop, "again is a link"),
    "dangling link": Drop("classifier", _dangling, r"link to nowhere\.onnx"),
    "dated in the future": Drop("classifier", _in_the_future, "dated in the future"),
    "what is served already": Drop("classifier", _copy, "^new: .*classifier/1 holds: tiny-v1 serves it"),
    # The graph.
    "newer opset": Drop("classifier", classifier(lambda m: setattr(m.opset_import[0], "version", 22)), "opset 22"),
    "newer IR": Drop("classifier", classifier(lambda m: setattr(m, "ir_version", 11)), "IR version 11"),
    "invalid graph": Drop("classifier", classifier(lambda m: m.graph.node.pop(3)), "^graph: not valid ONNX"),
    "unknown operator": Drop("classifier", classifier(_unknown_operator), "vendor"),
    "other input name": Drop("classifier", classifier(_rename_input), "^signature: the input PIXELS is missing"),
    "other input type": Drop(
        "classifier",
        classifier(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.FLOAT)),
        r"signature: the input PIXELS is FP32|not valid ONNX",
    ),
    "other input size": Drop(
        "classifier",
        classifier(lambda m: [_set_dim(m.graph.input[0], axis, 32) for axis in (1, 2)]),
        r"signature: the input PIXELS is UINT8 \[N, 32, 32, 3\]|not valid ONNX",
    ),
    "fixed batch": Drop(
        "classifier", classifier(lambda m: _set_dim(m.graph.input[0], 0, 1)), r"PIXELS is UINT8 \[1, 64, 64, 3\]"
    ),
    "another input": Drop(
        "classifier",
        classifier(lambda m: m.graph.input.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, ["N", 1]))),
        "input extra is none",
    ),
    "three classes": Drop("classifier", classifier(_three_classes), r"PROBABILITIES is FP32 \[N, 3\]"),
    "swapped labels": Drop("classifier", classifier(_swap_labels), "^labels: the graph's outputs are light, dark"),
    "no digest": Drop("classifier", classifier(_no_digest), "the output DIGEST is missing"),
    "edited after its seal": Drop("classifier", _edited_after_the_seal, "digest: the graph says"),
    # What it answers.
    "swapped outputs": Drop("classifier", classifier(_swap_outputs), r"^agreement: 0\.\d+ of 8 pictures"),
    "not a number": Drop("classifier", classifier(_fill("user/weight", np.nan)), "answers: .*not finite"),
    "infinite": Drop("classifier", classifier(_fill("user/bias", np.inf)), "answers: .*not finite"),
    "random": Drop("classifier", classifier(_random), "deterministic: a second time"),
    "depends on the batch": Drop("classifier", classifier(_depend_on_the_batch), "batching: in a batch of 16"),
    "no softmax": Drop("classifier", classifier(_triple), r"answers: .*sum to 3\.0000"),
    "slow": Drop("classifier", _slow, r"^cost: .*of the current release's \(at most 2\)"),
    # The Python steps.
    "syntax error": Drop(
        "preprocess", python_step("preprocess", {"model.py": _replace("def execute", "def def")}), "load: SyntaxError"
    ),
    "fails to start": Drop(
        "postprocess",
        python_step("postprocess", {"settings.json": _replace('"thresholds"', '"limits"')}),
        "load: KeyError.*thresholds",
    ),
    "missing import": Drop(
        "preprocess",
        python_step("preprocess", {"model.py": _replace("import json\n", "import json\nimport torch_serving\n")}),
        "load: ModuleNotFoundError: .*torch_serving",
    ),
    "wrong type": Drop(
        "preprocess",
        python_step(
            "preprocess",
            {
                "model.py": _replace(
                    "np.zeros((len(pictures), self.size, self.size, 3), np.uint8)",
                    "np.zeros((len(pictures), self.size, self.size, 3))",
                )
            },
        ),
        r"answers: StepError: tiny_preprocess PIXELS: is float64",
    ),
    "fails on every picture": Drop(
        "preprocess",
        python_step("preprocess", {"model.py": _replace(_EXECUTE, "        raise RuntimeError('no profile')\n")}),
        "answers: RuntimeError: no profile",
    ),
    "crashes": Drop(
        "preprocess",
        python_step("preprocess", {"model.py": _replace(_EXECUTE, "        import os; os.abort()\n")}),
        "answers: the process was ended by signal 6",
    ),
    "ends the process": Drop(
        "preprocess",
        python_step("preprocess", {"model.py": _replace(_EXECUTE, "        import os; os._exit(3)\n")}),
        "answers: the process ended with status 3",
    ),
    "hangs": Drop(
        "preprocess",
        python_step("preprocess", {"model.py": _replace(_EXECUTE, "        time.sleep(3600)\n")}),
        "answers: not done after",
    ),
    "takes all memory": Drop(
        "preprocess",
        python_step("preprocess", {"model.py": _replace(_EXECUTE, "        np.ones(2**40, np.uint8)\n")}),
        "answers: .*MemoryError",
    ),
    "answers what is no picture": Drop(
        "preprocess",
        python_step("preprocess", {"model.py": _replace("errors[i] = str(error).encode()", "pass")}),
        "bad pictures: empty is answered as if it were a picture",
    ),
    "a label that the contract lacks": Drop(
        "postprocess",
        python_step("postprocess", {"settings.json": _replace("light", "bright")}),
        "answers: .*'bright', which the pipeline's contract lacks",
    ),
    "swapped decisions": Drop(
        "postprocess",
        python_step("postprocess", {"settings.json": _replace(_LABELS, '"light",\n    "dark"')}),
        "agreement: 0",
    ),
    "no proof of origin": Drop(
        "postprocess",
        python_step("postprocess", {"model.py": _replace("row.tobytes().hex()", "bytes(32).hex()")}),
        "digest: the graph says 000000000000",
    ),
}
