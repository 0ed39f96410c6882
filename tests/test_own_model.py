"""A model of the user's own: another architecture, three classes, NCHW float input, logits - one command, one spec."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from export import reference
from export.spec import Spec
from tests.conftest import EXAMPLES, ROOT, GatewayProcess, free_endpoint, http, wait_for
from tests.offline import PREPROCESSING, Offline
from tests.test_export import user_model
from triton_runtime.server import TritonServer


def test_a_users_model_is_served_under_its_own_name(repository: Path, tmp_path: Path) -> None:
    onnx.save(user_model(size=160), tmp_path / "fruit.onnx")
    text = (ROOT / "examples/own-model.toml").read_text()
    (tmp_path / "fruit.toml").write_text(text)
    command = [sys.executable, "-m", "export", "--onnx", str(tmp_path / "fruit.onnx")]
    command += ["--spec", str(tmp_path / "fruit.toml"), "--repository", str(repository)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "fruit-v1\n"

    spec = Spec.read(tmp_path / "fruit.toml")
    endpoint = free_endpoint()
    picture = EXAMPLES[0].read_bytes()
    with TritonServer(repository, endpoint) as server:
        assert server.wait_until_ready() == ["defect-v1", "fruit-v1"]
        with GatewayProcess(endpoint, tmp_path / "log", pipeline="fruit", deadline_s=60) as gateway:
            wait_for(gateway.is_ready)
            headers = {"Content-Type": "image/jpeg"}
            answer = http.post(f"{gateway.url}/v1/predict", content=picture, headers=headers, timeout=60).json()
    pixels = PREPROCESSING.preprocess(picture, spec.input.size)[None]
    (expected,) = reference.onnx_probabilities(onnx.load(tmp_path / "fruit.onnx"), spec, pixels)
    scores = {score["label"]: score["confidence"] for score in answer["scores"]}
    assert answer["model_version"] == "fruit-v1"
    label, offline = Offline(repository, "fruit").answer(picture)
    assert answer["label"] == label == max(scores, key=scores.__getitem__)
    assert scores == pytest.approx(offline, abs=1e-5)
    # The user's own graph averages 25,600 values in float32, so it is that exact and no more.
    assert scores == pytest.approx(dict(zip(spec.labels, expected, strict=True)), abs=1e-3)
