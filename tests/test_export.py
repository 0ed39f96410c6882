"""The export: the graph's numbers, the files it writes, and that no crash can leave half of them."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from export import build, config, graph, reference
from export.__main__ import main
from export.candidate import Candidate
from export.config import Serving
from export.repository import RECORD, Repository, RepositoryError
from export.spec import Spec
from export.steps import Step, load_module
from tests.conftest import EXAMPLES, ROOT
from tests.offline import PREPROCESSING

CHECKPOINT = ROOT / "export" / "checkpoints" / "defect"
SERVING = Serving.read(ROOT / "export" / "serving.toml")


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def run(model: onnx.ModelProto, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    probabilities, digest = session.run([graph.PROBABILITIES, graph.DIGEST], {graph.PIXELS: pixels})
    return probabilities, digest


# ---- the graph of the project's own checkpoint ----


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return load_file(CHECKPOINT / "model.safetensors")


@pytest.fixture(scope="module")
def card() -> dict:
    return json.loads((CHECKPOINT / "card.json").read_text())


def test_the_graph_agrees_with_an_independent_forward_pass(weights: dict, card: dict) -> None:
    model = graph.from_checkpoint(weights, card["labels"], card["temperature"])
    pixels = np.stack([PREPROCESSING.preprocess(path.read_bytes(), 224) for path in EXAMPLES])
    got, digest = run(model, pixels)
    expected = reference.checkpoint_probabilities(weights, card["temperature"], pixels)
    assert np.abs(got - expected).max() < 1e-4
    np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-6)
    assert digest[0].tobytes().hex() == digest[1].tobytes().hex() == graph.content_digest(model)


def test_the_graph_stays_within_the_target_server(weights: dict, card: dict) -> None:
    model = graph.from_checkpoint(weights, card["labels"], card["temperature"])
    assert model.opset_import[0].version <= graph.MAX_OPSET
    assert model.ir_version <= graph.MAX_IR_VERSION
    assert onnxruntime.__version__.startswith("1.19."), "tests must meet the limits of the target's own runtime"
    assert not any("BatchNormalization" in node.op_type for node in model.graph.node)


def test_the_digest_covers_weights_labels_and_temperature(weights: dict, card: dict) -> None:
    def digest(
        change: Callable[[dict], None] = lambda _: None, labels: list[str] = card["labels"], t: float = 1.0
    ) -> str:
        changed = dict(weights)
        change(changed)
        return graph.content_digest(graph.from_checkpoint(changed, labels, t))

    def nudge(changed: dict) -> None:
        changed["_fc.bias"] = changed["_fc.bias"] + np.float16(0.01)

    same = digest()
    assert same == digest()
    assert len({same, digest(nudge), digest(labels=card["labels"][::-1]), digest(t=1.1)}) == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("_conv_head.weight"), "has no _conv_head.weight"),
        (lambda w: w.update({"_fc.bias": np.zeros(3, np.float16)}), "has the shape"),
    ],
)
def test_a_wrong_checkpoint_is_named(weights: dict, damage: Callable[[dict], object], message: str) -> None:
    changed = dict(weights)
    damage(changed)
    with pytest.raises(graph.GraphError, match=message):
        graph.from_checkpoint(changed, ["a", "b"], 1.0)


# ---- publishing ----


def test_loading_a_step_leaves_no_byte_code(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python writes it by default: its appearing makes a running Triton reload the step."""
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    assert load_module(repository / "defect_preprocess/1/preprocessing.py").preprocess
    assert not list(repository.rglob("__pycache__"))
    assert not sys.dont_write_bytecode


def test_exporting_twice_changes_nothing(repository: Path) -> None:
    before = snapshot(repository)
    assert main(["--repository", str(repository)]) == 0
    assert snapshot(repository) == before


def test_a_clone_gets_back_the_file_that_git_does_not_keep(repository: Path) -> None:
    before = snapshot(repository)
    shutil.rmtree(repository / "defect_classifier" / "1")
    assert main(["--repository", str(repository), "--if-missing"]) == 0
    assert snapshot(repository) == before


def test_what_git_tracks_is_what_the_export_writes(pristine: Path) -> None:
    """The committed text is the export's own, so a change of a template cannot be forgotten."""
    for path in sorted(ROOT.glob("model_repository/*/config.pbtxt")):
        assert (pristine / path.relative_to(ROOT / "model_repository")).read_bytes() == path.read_bytes(), path


@pytest.fixture(scope="module")
def built(pristine: Path) -> Candidate:
    """What this checkout would publish."""
    return build.from_checkpoint(CHECKPOINT, "defect", Repository(pristine), lambda _: None)


@pytest.fixture(scope="module")
def other(built: Candidate, weights: dict, card: dict) -> Candidate:
    """The same pipeline with slightly different weights."""
    nudged = {**weights, "_fc.bias": weights["_fc.bias"] + np.float16(0.5)}
    model = graph.from_checkpoint(nudged, card["labels"], card["temperature"])
    return replace(built, steps={**built.steps, "classifier": Step.of_graph(model)})


def release_names(root: Path) -> list[str]:
    return [release.name for release in Repository(root).releases("defect")]


def test_another_classifier_becomes_the_next_release_and_touches_no_other(repository: Path, other: Candidate) -> None:
    before = snapshot(repository)
    Repository(repository).publish(other, SERVING)
    first, second = Repository(repository).releases("defect")
    assert second.steps["classifier"].version == first.steps["classifier"].version + 1
    assert second.steps["preprocess"] == first.steps["preprocess"]
    assert second.steps["postprocess"] == first.steps["postprocess"]
    after = snapshot(repository)
    assert {path for path in before if after[path] != before[path]} == {"defect_classifier/config.pbtxt", RECORD}
    policy = config.parse((repository / "defect_classifier/config.pbtxt").read_text()).version_policy
    assert list(policy.specific.versions) == [1, 2]


def test_other_thresholds_are_a_new_number_of_the_postprocessing_alone(repository: Path, built: Candidate) -> None:
    settings = json.dumps({"labels": built.labels, "thresholds": {"damaged": 0.31, "intact": 0.69}}).encode()
    postprocess = built.steps["postprocess"].with_file("settings.json", settings)
    Repository(repository).publish(replace(built, steps={**built.steps, "postprocess": postprocess}), SERVING)
    first, second = Repository(repository).releases("defect")
    assert {step for step in first.steps if first.steps[step] != second.steps[step]} == {"postprocess"}


def test_a_crash_at_any_point_hurts_no_release_and_running_again_finishes(
    pristine: Path, other: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail at the n-th rename or flush, for every n: what was published stays, and a second run completes."""
    real = {name: getattr(os, name) for name in ("rename", "replace", "fsync")}
    for crash_at in itertools.count(1):
        repository = Path(shutil.copytree(pristine, tmp_path / str(crash_at) / "model_repository"))
        before, calls = snapshot(repository), itertools.count(1)

        def crashing(name: str, calls: itertools.count = calls, crash_at: int = crash_at) -> Callable[..., object]:
            def call(*arguments: object) -> object:
                if next(calls) == crash_at:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real[name](*arguments)

            return call

        for name in real:
            monkeypatch.setattr(os, name, crashing(name))
        try:
            Repository(repository).publish(other, SERVING)
        except OSError:
            monkeypatch.undo()
        else:
            monkeypatch.undo()
            break
        after = snapshot(repository)
        written = {"defect_classifier/config.pbtxt", RECORD}
        assert all(after[path] == before[path] for path in before.keys() - written)
        steps = {"defect_preprocess", "defect_classifier", "defect_postprocess"}
        assert {path.name for path in repository.iterdir()} <= {*steps, "defect-v1", "defect-v2", RECORD}
        pinned = config.parse((repository / "defect_classifier/config.pbtxt").read_text()).version_policy.specific
        for version in pinned.versions:  # whatever Triton may see is complete
            onnx.checker.check_model(str(repository / "defect_classifier" / str(version) / "model.onnx"))
        Repository(repository).publish(other, SERVING)
        assert release_names(repository) == ["defect-v1", "defect-v2"]
        shutil.rmtree(repository.parent)
    assert crash_at > 8, "the loop must have crashed at every step"


def test_an_edited_version_is_refused_not_overwritten(
    repository: Path, built: Candidate, capsys: pytest.CaptureFixture[str]
) -> None:
    path = repository / "defect_preprocess/1/preprocessing.py"
    path.write_text(path.read_text() + "\n# edited in place\n")
    before = snapshot(repository)
    with pytest.raises(RepositoryError, match="never edited"):
        Repository(repository).publish(built, SERVING)
    with pytest.raises(RepositoryError, match="never edited"):
        Repository(repository).template("defect", "preprocess")
    assert snapshot(repository) == before


def test_somebody_elses_numbered_folder_is_left_alone(repository: Path, other: Candidate) -> None:
    drop = repository / "defect_classifier" / "2"
    drop.mkdir()
    (drop / "model.onnx").write_bytes(b"half of a file")
    Repository(repository).publish(other, SERVING)
    assert (drop / "model.onnx").read_bytes() == b"half of a file"
    assert Repository(repository).releases("defect")[-1].steps["classifier"].version == 3


def test_a_clone_with_an_old_release_serves_the_one_that_can_be_rebuilt(repository: Path, other: Candidate) -> None:
    """git keeps no model.onnx, and this checkout has the checkpoint of one release only."""
    Repository(repository).publish(other, SERVING)
    shutil.rmtree(repository / "defect_classifier/1")
    shutil.rmtree(repository / "defect_classifier/2")
    assert not Repository(repository).is_complete("defect")
    Repository(repository).publish(other, SERVING)
    policy = config.parse((repository / "defect_classifier/config.pbtxt").read_text()).version_policy
    assert list(policy.specific.versions) == [2]
    assert release_names(repository) == ["defect-v1", "defect-v2"]


def test_two_exports_at_once_publish_one_release(repository: Path, other: Candidate) -> None:
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda _: Repository(repository).publish(other, SERVING), range(4)))
    assert {outcome.manifest.name for outcome in outcomes} == {"defect-v2"}
    assert sum(bool(outcome.written) for outcome in outcomes) == 1
    assert release_names(repository) == ["defect-v1", "defect-v2"]


def test_smaller_batches_than_a_release_was_published_with_are_refused(repository: Path, built: Candidate) -> None:
    with pytest.raises(RepositoryError, match="max_batch_size"):
        Repository(repository).publish(built, SERVING.model_copy(update={"max_batch_size": 2}))


@pytest.mark.parametrize(("change", "message"), [({"size": 192}, "192"), ({"labels": ("a", "b", "c")}, "3")])
def test_another_signature_needs_another_pipeline(
    repository: Path, other: Candidate, change: dict, message: str
) -> None:
    with pytest.raises(RepositoryError, match=f"{message}: another signature"):
        Repository(repository).publish(replace(other, **change), SERVING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "card.json is missing"),
        (["--onnx", "nowhere.onnx", "--spec", "nowhere.toml"], "nowhere.onnx is missing"),
        (["--serving", str(ROOT / "Makefile")], "not TOML"),
    ],
)
def test_the_command_says_what_is_wrong(
    repository: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = snapshot(repository)
    assert main(["--repository", str(repository), *arguments]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert snapshot(repository) == before


# ---- a model of the user's own ----


def user_model(
    *,
    size: int = 32,
    labels: int = 3,
    layout: str = "NCHW",
    kind: int = TensorProto.FLOAT,
    batch: object = "batch",
    softmax: bool = False,
    opset: int = 17,
    ir_version: int = 8,
) -> onnx.ModelProto:
    """A small network: mean over the pixels, then a linear layer."""
    shape = [batch, 3, size, size] if layout == "NCHW" else [batch, size, size, 3]
    weight = np.random.default_rng(5).normal(0, 1, (3, labels)).astype(np.float32)
    numpy_type = helper.tensor_dtype_to_np_dtype(kind)
    axes = [2, 3] if layout == "NCHW" else [1, 2]
    nodes = [
        helper.make_node("Cast", ["input"], ["as_float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["as_float"], ["mean"], axes=axes, keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], ["scores" if not softmax else "raw"]),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["raw"], ["scores"], axis=1))
    assert numpy_type is not None
    body = helper.make_graph(
        nodes,
        "user",
        [helper.make_tensor_value_info("input", kind, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, labels])],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def spec(size: int = 32, labels: tuple[str, ...] = ("apple", "pear", "plum"), **tables: dict) -> Spec:
    picture = {"size": size, "scale": 1 / 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return Spec.model_validate(
        {"name": "fruit", "labels": labels, "input": picture | tables.pop("input", {}), **tables}
    )


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("opset", [11, 13, 17])
def test_a_users_graph_is_wrapped_to_the_same_signature(layout: str, kind: int, softmax: bool, opset: int) -> None:
    user = user_model(layout=layout, kind=kind, softmax=softmax, opset=opset)
    fitting = spec(
        input={"layout": layout}, output={"kind": "probabilities" if softmax else "logits", "temperature": 1.5}
    )
    pixels = build.sample_pixels(32)
    wrapped = graph.from_onnx(user, fitting)
    got, digest = run(wrapped, pixels)
    assert np.abs(got - reference.onnx_probabilities(user, fitting, pixels)).max() < (5e-3 if kind == 10 else 1e-5)
    assert digest[3].tobytes().hex() == graph.content_digest(wrapped)
    assert wrapped.ir_version <= graph.MAX_IR_VERSION


@pytest.mark.parametrize(
    ("user", "options", "message"),
    [
        ({"opset": 23, "ir_version": 10}, {}, "opset 23 is newer"),
        ({"batch": 1}, {}, "fixed batch of 1"),
        ({"size": 64}, {}, "size 32"),
        ({"layout": "NHWC"}, {}, "layout NCHW"),
        ({"labels": 4}, {}, "4 values a picture, but the spec has 3"),
        ({"kind": TensorProto.INT64}, {}, "INT64"),
        ({}, {"input": {"name": "picture"}}, "one of the graph's inputs: input"),
        ({}, {"output": {"name": "logits"}}, "one of the graph's outputs: scores"),
    ],
)
def test_a_graph_that_does_not_fit_its_spec_is_refused(user: dict, options: dict, message: str) -> None:
    with pytest.raises(graph.GraphError, match=message):
        graph.from_onnx(user_model(**user), spec(**options))


def test_logits_declared_as_probabilities_are_caught(repository: Path, tmp_path: Path) -> None:
    onnx.save(user_model(), tmp_path / "fruit.onnx")
    declared = spec(output={"kind": "probabilities"})
    with pytest.raises(build.ExportError, match=r"output\.kind"):
        build.from_onnx(tmp_path / "fruit.onnx", declared, Repository(repository), lambda _: None)


def test_missing_external_weights_are_named(repository: Path, tmp_path: Path) -> None:
    onnx.save(
        user_model(), tmp_path / "fruit.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(build.ExportError, match=r"missing|not a complete ONNX"):
        build.from_onnx(tmp_path / "fruit.onnx", spec(), Repository(repository), lambda _: None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not TOML"),
        ("name = 'x'", "labels: Field required"),
        ("name = '../x'\nlabels = ['a', 'b']\n[input]\nsize = 32", "name"),
        ("name = 'x'\nlabels = ['a', 'a']\n[input]\nsize = 32", "different"),
        ("name = 'x'\nlabels = ['a', 'b']\n[input]\nsize = 32\nlayuot = 'NCHW'", "layuot"),
        ("name = 'x'\nlabels = ['a', 'b']\n[input]\nsize = 32\nstd = 0", "std"),
        ("name = 'x'\nlabels = ['a', 'b']\n[input]\nsize = 32\n[thresholds]\na = 0.5", "every label"),
    ],
)
def test_a_wrong_spec_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "spec.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Spec.read(tmp_path / "spec.toml")
