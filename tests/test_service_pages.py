"""What people and machines look at beside predictions: health, version, errors, documents, logs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urljoin

import httpx
import pytest

from gateway import __version__
from gateway.app import create_app
from gateway.comparison import Comparisons
from gateway.metrics import Metrics
from gateway.problems import PROBLEMS
from gateway.service import Service
from gateway.settings import Settings
from tests.conftest import ROOT, GatewayProcess, wait_for
from tests.offline import Offline


def test_health(client: httpx.Client, release: str) -> None:
    assert client.get("/health/live").json() == {"status": "live"}
    expected = {"status": "ready", "model_version": release, "triton": "2.51.0"}
    assert client.get("/health/ready").json() == expected
    assert client.get("/health").json() == expected


def test_version_names_every_release_with_its_steps_and_digests(
    client: httpx.Client, release: str, offline: Offline
) -> None:
    version = client.get("/version").json()
    assert version["gateway"] == __version__
    assert version["contract"] == "v1"
    assert version["triton"] == "2.51.0"
    pipeline = version["pipeline"]
    assert pipeline["name"] == "defect"
    assert pipeline["stable"] == release
    (described,) = pipeline["releases"]
    assert (described["name"], described["state"], described["reason"]) == (release, "ready", "")
    assert described["labels"] == ["damaged", "intact"]
    assert described["evaluation"]["accuracy"] > 0.5
    assert described["exam"] == offline.manifest.exam
    for step, pin in offline.manifest.steps.items():
        expected = {"model": f"defect_{step}", "version": pin.version, "digest": pin.digest}
        assert described["steps"][step] == expected


def test_the_version_is_the_projects() -> None:
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_what_is_known_of_a_release_that_is_gone_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, comparisons, forgotten = Metrics(), Comparisons(), []
    there = [SimpleNamespace(name="defect-v1"), SimpleNamespace(name="defect-v2")]
    service = SimpleNamespace(
        metrics=metrics,
        comparisons=comparisons,
        dispatcher=SimpleNamespace(forget=forgotten.append),
        releases=SimpleNamespace(known=there),
        _seen={},
    )
    for release in there:
        metrics.predicted(release.name, "stable")
        metrics.compared(release.name, "agreed")
        comparisons.between(release.name, "defect-v0")
    Service._forget_what_is_gone(service)
    del there[0]
    Service._forget_what_is_gone(service)
    assert b'release="defect-v1"' in metrics.page(), "it may be back in a moment"
    monkeypatch.setattr("gateway.service._GONE_S", -1.0)
    there.clear()
    service._seen.pop("defect-v2")
    Service._forget_what_is_gone(service)
    assert forgotten == ["defect-v1"]
    assert b'release="defect-v1"' not in metrics.page()
    assert b'gateway_predictions_total{release="defect-v2",route="stable"} 1.0' in metrics.page()
    assert comparisons.report("defect-v1").against is None
    metrics.predicted("defect-v1", "stable")
    assert b'gateway_predictions_total{release="defect-v1",route="stable"} 1.0' in metrics.page(), "it begins again"


def test_the_root_leads_to_the_documents(client: httpx.Client) -> None:
    answer = client.get("/")
    assert (answer.status_code, answer.headers["location"]) == (307, "/docs"), "without a host"


def test_every_answer_is_documented_with_its_headers(client: httpx.Client) -> None:
    for path in client.get("/openapi.json").json()["paths"].values():
        for operation in path.values():
            assert all("X-Request-ID" in response["headers"] for response in operation["responses"].values())
            is_timed = "Server-Timing" in operation["responses"]["200"]["headers"]
            assert is_timed == operation["operationId"].startswith("predict")


def test_every_error_has_a_page(client: httpx.Client) -> None:
    listed = client.get("/errors").json()
    assert [kind["code"] for kind in listed] == list(PROBLEMS)
    for kind in listed:
        assert client.get(f"/errors/{kind['code']}").json() == kind


def test_every_error_can_be_understood() -> None:
    for code, kind in PROBLEMS.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]+", code)
        assert 400 <= kind.status <= 504
        assert kind.title
        assert kind.advice.endswith(".")


def test_the_documents_need_no_internet(client: httpx.Client) -> None:
    page = client.get("/docs").text
    for source in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert "//" not in source, source
        assert client.get(urljoin("/docs", source)).status_code == 200
    assert "SwaggerUIBundle" in client.get("/static-offline-docs/swagger-ui-bundle.js").text


def test_openapi_documents_every_form_and_every_error(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/v1/predict"]["post"]
    assert set(operation["requestBody"]["content"]) == {
        "application/json",
        "multipart/form-data",
        "image/*",
        "application/octet-stream",
    }
    documented = {
        code
        for path in document["paths"].values()
        for each in path.values()
        for response in each["responses"].values()
        for code in response.get("content", {}).get("application/problem+json", {}).get("examples", {})
    }
    assert documented == set(PROBLEMS) - {
        "method_not_allowed",
        "client_gone",
    }  # no place for it in OpenAPI; nobody to tell
    for status, response in operation["responses"].items():
        for code in response["content"].get("application/problem+json", {}).get("examples", {}):
            assert PROBLEMS[code].status == int(status)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])
    assert "HTTPValidationError" not in json.dumps(document)


def lines(gateway: GatewayProcess, request_id: str) -> list[dict]:
    """The log's lines about a request, of which there is one shortly after its answer."""

    def found() -> list[dict]:
        entries = [json.loads(line) for line in gateway.log.read_text().splitlines(keepends=True) if line[-1:] == "\n"]
        return [entry for entry in entries if entry.get("request_id") == request_id]

    wait_for(lambda: bool(found()))
    return found()


def test_a_request_is_one_line_of_json(
    client: httpx.Client, gateway: GatewayProcess, release: str, jpeg: bytes
) -> None:
    headers = {"Content-Type": "image/jpeg", "X-Request-ID": "log-test-good"}
    answer = client.post("/v1/predict", content=jpeg, headers=headers).json()
    (entry,) = lines(gateway, "log-test-good")
    assert entry["message"] == "request"
    assert (entry["method"], entry["path"], entry["status"]) == ("POST", "/v1/predict", 200)
    assert (entry["release"], entry["route"]) == (release, "stable")
    assert entry["timing_ms"] == answer["timing_ms"]
    assert entry["total_ms"] >= answer["timing_ms"]["total"] - 0.01


def test_a_problem_is_logged_with_its_code(client: httpx.Client, gateway: GatewayProcess) -> None:
    client.post("/v1/predict", content=b"x", headers={"Content-Type": "image/png", "X-Request-ID": "log-test-bad"})
    (entry,) = lines(gateway, "log-test-bad")
    assert "detail" not in entry, "it is the client's to mend"
    assert (entry["code"], entry["status"]) == ("image_unsupported", 422)


def test_pictures_are_never_logged(client: httpx.Client, gateway: GatewayProcess) -> None:
    secret = "c2VjcmV0LXBpY3R1cmUtYnl0ZXM="
    client.post("/v1/predict", json={"image": secret, "metadata": {"who": "do-not-log-me"}})
    client.post("/v1/predict", json={"image": secret + "!"})
    log = gateway.log.read_text()
    assert secret[:12] not in log
    assert "secret-picture" not in log
    assert "do-not-log-me" not in log


def test_help_lists_every_setting() -> None:
    text = subprocess.run([sys.executable, "-m", "gateway", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    for name, field in Settings.model_fields.items():
        assert f"GATEWAY_{name.upper()}" in text
        assert field.description


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GATEWAY_PORT", "eighty"),
        ("GATEWAY_DEADLINE_S", "-1"),
        ("GATEWAY_PIPELINE", "../x"),
        ("GATEWAY_LOG_LEVEL", "x"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"{name}='{re.escape(value)}'"):
        Settings.read()


def test_a_setting_is_known_by_its_former_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_PATIENCE_S", "7")
    assert Settings.read().outage_wait_s == 7
    assert Settings.unknown() == {}
    monkeypatch.setenv("GATEWAY_OUTAGE_WAIT_S", "8")
    assert Settings.read().outage_wait_s == 8
    monkeypatch.setenv("GATEWAY_OUTAGE_WAIT_S", "x")
    with pytest.raises(SystemExit, match="GATEWAY_OUTAGE_WAIT_S='x'"):
        Settings.read()


def test_an_app_can_be_made_without_anything_running() -> None:
    assert create_app(Settings()).openapi()["info"]["version"] == "v1"


def test_nothing_imports_the_gateway_and_the_steps_import_nothing() -> None:
    """Imports point one way (tests excepted)."""
    for path in [
        *ROOT.glob("*.py"),
        *(p for f in ("export", "triton_runtime", "harness", "perf", "chaos") for p in (ROOT / f).rglob("*.py")),
    ]:
        assert not re.search(r"^(from|import) gateway\b", path.read_text(), re.MULTILINE), path
    for path in (ROOT / "gateway").rglob("*.py"):
        assert not re.search(r"^(from|import) (export|triton_runtime|perf)\b", path.read_text(), re.MULTILINE), path
    for path in Path(ROOT / "model_repository").rglob("*.py"):
        found = re.search(r"^(from|import) (contract|export|gateway|triton_runtime)\b", path.read_text(), re.MULTILINE)
        assert not found, path
