"""Triton gone, gone for long, back again; a stuck server; a gateway that is stopped while it works."""

from __future__ import annotations

import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest

from contract import Manifest, StepPin
from gateway.predict import verify
from gateway.problems import Failure
from gateway.triton.client import Inference, MalformedAnswer, decode, pb
from tests.conftest import GatewayProcess, free_endpoint, http, wait_for
from tests.test_problems import IMAGE, assert_problem
from triton_runtime.server import Endpoint, TritonServer


def predict(gateway: GatewayProcess, jpeg: bytes) -> httpx.Response:
    return http.post(f"{gateway.url}/v1/predict", content=jpeg, headers=IMAGE, timeout=60)


def test_triton_may_come_late_go_and_come_back(pristine: Path, jpeg: bytes, tmp_path: Path) -> None:
    endpoint = free_endpoint()
    with GatewayProcess(endpoint, tmp_path / "log", deadline_s=10) as gateway:
        for _ in range(2):
            started = time.monotonic()
            assert_problem(predict(gateway, jpeg), "triton_unavailable")
            assert time.monotonic() - started < 10
            assert_problem(http.get(f"{gateway.url}/health/ready"), "triton_unavailable")
            assert http.get(f"{gateway.url}/health/live").status_code == 200
            assert http.get(f"{gateway.url}/version").json()["triton"] is None
            with TritonServer(pristine, endpoint) as server:
                server.wait_until_ready()
                wait_for(gateway.is_ready)
                assert predict(gateway, jpeg).json()["model_version"] == "defect-v1"
        # Gone once more: what was known is kept, so the call is tried, and fails fast.
        assert_problem(predict(gateway, jpeg), "triton_unavailable")
        listed = http.get(f"{gateway.url}/v1/releases").json()["releases"]
        assert [(each["state"], each["reason"]) for each in listed] == [("unavailable", "no Triton answers")]
    assert f"127.0.0.1:{endpoint.grpc}: " in gateway.log.read_text(), "the log says which server failed it"


def test_a_stuck_server_costs_no_more_than_the_deadline(jpeg: bytes, pristine: Path, tmp_path: Path) -> None:
    endpoint = free_endpoint()
    with (
        TritonServer(pristine, endpoint) as server,
        GatewayProcess(endpoint, tmp_path / "log", deadline_s=1) as gateway,
    ):
        server.wait_until_ready()
        wait_for(gateway.is_ready)
        server.process.send_signal(signal.SIGSTOP)
        try:
            started = time.monotonic()
            assert_problem(predict(gateway, jpeg), "deadline_exceeded")
            assert time.monotonic() - started < 5
            assert http.get(f"{gateway.url}/health/ready", timeout=10).status_code == 503
        finally:
            server.process.send_signal(signal.SIGCONT)
        wait_for(gateway.is_ready)
        wait_for(lambda: predict(gateway, jpeg).status_code == 200)


def test_a_slow_body_is_ended(triton: Endpoint, tmp_path: Path) -> None:
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 5000\r\n\r\n"
    with (
        GatewayProcess(triton, tmp_path / "log", body_timeout_s=0.5) as gateway,
        socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection,
    ):
        connection.sendall(head + b"\xff\xd8")
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


def test_stopping_finishes_what_was_admitted(triton: Endpoint, jpeg: bytes, tmp_path: Path) -> None:
    gateway = GatewayProcess(triton, tmp_path / "log", deadline_s=60)
    with gateway, httpx.Client(base_url=gateway.url, timeout=60) as client, ThreadPoolExecutor(16) as pool:
        wait_for(gateway.is_ready)

        def ask(_: int) -> int:
            return client.post("/v1/predict", content=jpeg, headers=IMAGE).status_code

        assert set(pool.map(ask, range(16))) == {200}  # connections are open now
        waiting = [pool.submit(ask, number) for number in range(16)]
        time.sleep(0.05)
        gateway.process.terminate()
        statuses = []
        for future in waiting:
            try:
                statuses.append(future.result())
            except httpx.TransportError:
                statuses.append(0)  # had not been admitted: the connection was closed before it was sent
        assert set(statuses) <= {200, 0}
        assert 200 in statuses
        assert gateway.process.wait(40) == 0


def test_draining_answers_until_everybody_knows(triton: Endpoint, jpeg: bytes, tmp_path: Path) -> None:
    """Clients that go elsewhere once they see that it is not ready do not notice the end."""
    gateway = GatewayProcess(triton, tmp_path / "log", deadline_s=60, drain_s=300)
    with gateway, ThreadPoolExecutor(8) as pool:
        wait_for(gateway.is_ready)
        sent_away, ending = threading.Event(), threading.Event()

        def ask(_: int) -> list[httpx.Response]:
            """Until it is seen, somewhere, that the gateway is not ready, and twice after that."""
            answers = []
            with httpx.Client(base_url=gateway.url, timeout=60) as client:
                while not sent_away.is_set():
                    answers.append(client.post("/v1/predict", content=jpeg, headers=IMAGE))
                for _ in range(2):
                    answers.append(client.post("/v1/predict", content=jpeg, headers=IMAGE))
                ending.wait(60)
            return answers

        asking = [pool.submit(ask, number) for number in range(8)]
        gateway.process.terminate()
        wait_for(lambda: http.get(f"{gateway.url}/health/ready").status_code == 503)
        refusal = http.get(f"{gateway.url}/health/ready")
        sent_away.set()
        assert_problem(refusal, "shutting_down")
        assert refusal.headers["connection"] == "close"
        assert http.get(f"{gateway.url}/health/live").status_code == 200
        wait_for(lambda: "draining" in gateway.log.read_text())
        ending.set()
        answers = [future.result() for future in asking]
        assert {answer.status_code for each in answers for answer in each} == {200}
        assert all(each[-1].headers.get("connection") == "close" for each in answers)
        gateway.process.terminate()  # nobody is left: a second signal ends it now
        assert gateway.process.wait(40) == 0


def test_a_gateway_whose_port_is_taken_says_so(gateway: GatewayProcess, triton: Endpoint, tmp_path: Path) -> None:
    second = GatewayProcess(triton, tmp_path / "log", port=gateway.port)
    assert second.process.wait(30) != 0
    assert "address already in use" in second.log.read_text()


# ---- answers that must not be trusted: faults that the real server cannot be made to show ----

MANIFEST = Manifest(
    pipeline="defect",
    number=3,
    labels=("damaged", "intact"),
    steps={step: StepPin(1, step * 8) for step in ("preprocess", "classifier", "postprocess")},
    built_from="",
    built_at="",
)
GOOD = Inference("damaged", 0.9, (("damaged", 0.9), ("intact", 0.1)), "classifier" * 8, "", (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"digest": "another" * 9}, "provenance_mismatch"),
        ({"digest": "another" * 9, "error": "image_corrupt: x"}, "provenance_mismatch"),
        ({"error": "image_corrupt: x"}, "image_corrupt"),
        ({"error": "made_up: x"}, "invalid_answer"),
        ({"confidence": float("nan")}, "invalid_answer"),
        ({"scores": (("damaged", 1.7), ("intact", -0.7))}, "invalid_answer"),
        ({"label": "torn"}, "invalid_answer"),
        ({"scores": (("damaged", 0.9), ("torn", 0.1))}, "invalid_answer"),
    ],
)
def test_an_answer_that_cannot_be_trusted_is_refused(change: dict, code: str) -> None:
    verify(GOOD, MANIFEST)
    fields = {name: getattr(GOOD, name) for name in GOOD.__dataclass_fields__}
    with pytest.raises(Failure) as caught:
        verify(Inference(**{**fields, **change}), MANIFEST)
    assert caught.value.code == code


@pytest.mark.parametrize("raw", [b"", b"\xff\xff\xff\xff", b"\x01"])
def test_tensors_that_are_no_answer_are_refused(raw: bytes) -> None:
    response = pb.ModelInferResponse()
    for name in ("LABEL", "CONFIDENCE", "LABELS", "SCORES", "DIGEST", "ERROR", "TIMES"):
        response.outputs.add(name=name, datatype="BYTES")
        response.raw_output_contents.append(raw)
    with pytest.raises(MalformedAnswer):
        decode(response, 1)
    with pytest.raises(MalformedAnswer):
        decode(pb.ModelInferResponse(), 1)


def test_grpc_is_the_one_that_triton_speaks() -> None:
    assert grpc.StatusCode.UNAVAILABLE.name == "UNAVAILABLE"
