"""Who is let in: API keys that come and go while the gateway runs, TLS, and nobody from elsewhere by mistake."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gateway.auth.api_keys import ApiKeys, Key, hash_of
from gateway.auth.middleware import require_safe
from gateway.problems import Failure
from gateway.settings import Settings
from tests.conftest import ROOT, GatewayProcess, free_endpoint, free_port, http, wait_for
from tests.raw_http import exchange
from tests.test_errors import BROWSER
from tests.test_problems import IMAGE, assert_problem
from triton_runtime.server import TritonFailed
from triton_runtime.stack import SAMPLE, Gateway

CLOSED = ("/v1/releases", "/v1/releases/defect-v1/report", "/nothing")
OPEN = ("/health/live", "/version", "/metrics", "/errors", "/errors/no_release", "/docs", "/openapi.json")


def new_key(*arguments: str) -> tuple[str, str]:
    """(key, lines for the file), from the command line as people use it."""
    command = [sys.executable, "-m", "gateway.auth.api_keys", "new", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (key,) = re.findall(r"gwk_\S+", run.stderr)
    assert key not in run.stdout
    return key, run.stdout


class Guarded(GatewayProcess):
    """A gateway without Triton that follows a file of keys; `first` is a key of the client `scanner`."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "keys.toml"
        self.first, lines = new_key("scanner")
        self.put(lines)
        fixed = f"fixed:{hash_of('from the environment')}, "
        super().__init__(free_endpoint(), folder / "log", api_keys_file=self.file, api_keys=fixed)

    def put(self, text: str) -> None:
        """Replace the file at once, as a secret in a container is."""
        beside = self.file.with_suffix(".new")
        beside.write_text(text)
        beside.replace(self.file)

    def ask(self, key: str, path: str = "/v1/releases") -> httpx.Response:
        return http.get(f"{self.url}{path}", headers={"X-API-Key": key})

    def accepts(self, key: str) -> bool:
        return self.ask(key).status_code == 200

    def access(self) -> dict:
        return dict(http.get(f"{self.url}/version").json()["access"])


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with Guarded(tmp_path_factory.mktemp("guarded")) as gateway:
        yield gateway


@pytest.mark.parametrize("path", CLOSED)
def test_a_key_is_needed(guarded: Guarded, path: str) -> None:
    response = http.get(f"{guarded.url}{path}")
    assert_problem(response, "missing_api_key")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert_problem(guarded.ask("gwk_wrong", path), "invalid_api_key")


def test_a_prediction_is_refused_before_its_body_is_read(guarded: Guarded) -> None:
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 1000000\r\n\r\n"
    assert_problem(exchange(guarded.port, head), "missing_api_key")
    assert_problem(http.post(f"{guarded.url}/predict", content=b"x", headers=IMAGE), "missing_api_key")
    response = http.post(f"{guarded.url}/predict", content=b"x", headers={**IMAGE, "X-API-Key": guarded.first})
    assert_problem(response, "triton_unavailable")


@pytest.mark.parametrize("path", OPEN)
def test_what_probes_and_people_look_at_needs_none(guarded: Guarded, path: str) -> None:
    assert http.get(f"{guarded.url}{path}").status_code == 200


def test_a_key_is_taken_from_either_header(guarded: Guarded) -> None:
    def status(*headers: tuple[str, str]) -> int:
        return http.get(f"{guarded.url}/v1/releases", headers=list(headers)).status_code

    key = guarded.first
    for good in (("X-API-Key", key), ("Authorization", f"Bearer {key}"), ("authorization", f"bearer  {key}")):
        assert status(good) == 200
    assert status(("X-API-Key", key), ("Authorization", f"Bearer {key}")) == 200
    assert status(("X-API-Key", "from the environment")) == 200
    for bad in ("", "a" * 5000, key[:-1], f"{key}x", hash_of(key)):
        assert status(("X-API-Key", bad)) == 401
    assert status(("X-API-Key", key), ("X-API-Key", "another")) == 401
    assert status(("X-API-Key", key), ("Authorization", "Bearer another")) == 401
    assert status(("Authorization", f"Basic {key}")) == 401


def test_a_key_that_comes_after_the_body_is_none(guarded: Guarded) -> None:
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n"
    trailer = f"1\r\nx\r\n0\r\nX-API-Key: {guarded.first}\r\n\r\n".encode()
    assert_problem(exchange(guarded.port, head + trailer), "missing_api_key")


def test_keys_are_rotated_without_a_restart(guarded: Guarded) -> None:
    before = guarded.file.read_text()
    second, lines = new_key("scanner")
    assert not guarded.accepts(second)
    guarded.put(before + lines)
    wait_for(lambda: guarded.accepts(second))
    assert guarded.accepts(guarded.first), "both, while the client changes over"
    guarded.put(lines)
    wait_for(lambda: not guarded.accepts(guarded.first))
    assert guarded.accepts(second)
    guarded.put("")
    wait_for(lambda: not guarded.accepts(second))
    assert guarded.accepts("from the environment")
    guarded.put(before)
    wait_for(lambda: guarded.accepts(guarded.first))


@pytest.mark.parametrize("bad", ["[[keys", '[[keys]]\nclient = "x"\nsha256 = "short"', None])
def test_a_bad_edit_keeps_the_last_good_keys_and_says_so(guarded: Guarded, bad: str | None) -> None:
    before = guarded.file.read_text()
    guarded.file.unlink() if bad is None else guarded.put(bad)
    wait_for(lambda: bool(guarded.access()["error"]))
    assert guarded.access()["required"] is True
    assert "keys.toml" in guarded.access()["error"]
    assert "gateway_keys_valid 0.0" in http.get(f"{guarded.url}/metrics").text
    assert guarded.accepts(guarded.first)
    guarded.put(before)
    wait_for(lambda: not guarded.access()["error"])


def test_logs_have_the_client_and_never_a_key(guarded: Guarded) -> None:
    guarded.ask(guarded.first)
    guarded.ask("gwk_guessed")
    log = guarded.log.read_text()
    assert '"client": "scanner"' in log
    for secret in (guarded.first, hash_of(guarded.first), "gwk_guessed"):
        assert secret not in log


def test_a_key_ends_when_it_says() -> None:
    _, lines = new_key("scanner", "--expires", "2020-02-29")
    assert lines.endswith("expires = 2020-02-29\n")

    def owner(*expires: str | None) -> Key:
        keys = [Key.model_validate({"client": "c", "sha256": hash_of("k"), "expires": each}) for each in expires]
        return ApiKeys(tuple(keys)).owner("k")

    for past in ("2020-02-29", "2020-02-29T12:00:00", "2020-02-29T12:00:00+02:00"):
        with pytest.raises(Failure, match="invalid_api_key: the key of c expired on 2020-02-29"):
            owner(past)
        assert owner(past, None).expires is None
    assert owner("2999-01-01").client == "c"


# ---- who may reach it ----


def refusal(**environment: object) -> str:
    """What a gateway that does not start says."""
    settings = {f"GATEWAY_{name.upper()}": str(value) for name, value in environment.items()}
    run = subprocess.run(
        [sys.executable, "-m", "gateway"], cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True,
        timeout=30,
    )  # fmt: skip
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    return line


@pytest.mark.parametrize("reached_at", ["0.0.0.0", "::", "192.0.2.7", "gateway.example"])
def test_it_does_not_answer_everybody_on_a_network_unasked(reached_at: str) -> None:
    keys, nobody = ApiKeys((Key(client="c", sha256=hash_of("k")),)), ApiKeys()
    for settings in (Settings(host=reached_at), Settings(host="0.0.0.0", published_on=reached_at)):
        with pytest.raises(ValueError, match=f"^{reached_at} can be reached from other machines, and there are no API"):
            require_safe(settings, nobody)
        require_safe(settings, keys)
        require_safe(settings.model_copy(update={"allow_anonymous": True}), nobody)
    for address in ("127.0.0.1", "::1", "localhost"):
        require_safe(Settings(host=address), nobody)
        require_safe(Settings(host=reached_at, published_on=address), nobody)


def test_it_says_so_in_one_line_and_starts_once_that_is_meant(tmp_path: Path) -> None:
    assert "GATEWAY_ALLOW_ANONYMOUS=true to answer everybody" in refusal(host="0.0.0.0")
    with GatewayProcess(free_endpoint(), tmp_path / "log", host="0.0.0.0", allow_anonymous=True) as gateway:
        assert http.get(f"{gateway.url}/v1/releases").status_code == 200


def test_keys_that_cannot_be_used_stop_the_start_and_are_not_shown(tmp_path: Path) -> None:
    assert "missing.toml is missing: 'make key NAME=scanner' makes a key" in refusal(
        api_keys_file=tmp_path / "missing.toml"
    )
    (tmp_path / "bad.toml").write_text("[[keys]]\nclient = 'x'\n")
    assert "keys.0.sha256: Field required" in refusal(api_keys_file=tmp_path / "bad.toml")
    said = refusal(api_keys="scanner:my-plain-key")
    assert "GATEWAY_API_KEYS: expected name:sha256" in said
    assert "my-plain-key" not in said


# ---- TLS ----


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=gateway"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    return certificate, key


def test_tls(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    class OverTls(GatewayProcess):
        def __enter__(self) -> GatewayProcess:
            wait_for(lambda: client.get("/health/live").status_code == 200)
            return self

    path, key = certificate
    gateway = OverTls(free_endpoint(), tmp_path / "log", tls_certificate=path, tls_key=key, headers_timeout_s=1)
    context = ssl.create_default_context(cafile=str(path))
    with httpx.Client(base_url=f"https://127.0.0.1:{gateway.port}", verify=context) as client, gateway:
        answer = client.get("/version")
        assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
        assert_problem(client.get("/nothing"), "not_found")
        with pytest.raises(httpx.RemoteProtocolError):
            http.get(f"http://127.0.0.1:{gateway.port}/health/live")  # not a word in the clear
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"https://127.0.0.1:{gateway.port}/health/live")


def test_a_certificate_that_cannot_be_used_is_one_line(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    path, key = certificate
    assert "No such file" in refusal(tls_certificate=tmp_path / "none.pem", tls_key=key)
    assert "GATEWAY_TLS_CERTIFICATE, GATEWAY_TLS_KEY: " in refusal(tls_certificate=key, tls_key=path)
    assert "GATEWAY_TLS_CERTIFICATE, GATEWAY_TLS_KEY: None" in refusal(tls_key=key)


def is_listening(url: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 10):
        return True
    return False


def test_make_serve_proves_itself_with_keys_and_tls_too(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_TLS_CERTIFICATE", str(certificate[0]))
    monkeypatch.setenv("GATEWAY_TLS_KEY", str(certificate[1]))
    monkeypatch.setenv("GATEWAY_API_KEYS", f"c:{hash_of('k')}")
    monkeypatch.setenv("GATEWAY_PATIENCE_S", "0")
    with Gateway(free_endpoint(), "127.0.0.1", free_port()) as gateway:
        wait_for(lambda: is_listening(gateway.url))
        with pytest.raises(TritonFailed, match="triton_unavailable"):  # so it was let in
            gateway.predict(SAMPLE, timeout=4)
        command = shlex.split(gateway.example(SAMPLE))
        shown = [part.replace("$KEY", "k") for part in command]
        answer = subprocess.run([*shown, "--silent"], capture_output=True, text=True, check=True).stdout
        assert json.loads(answer)["code"] == "triton_unavailable"
    assert gateway.url.startswith("https://")


def test_a_variable_that_is_no_setting_is_named(tmp_path: Path) -> None:
    """But not those that Kubernetes sets for the service itself."""
    linked = {"service_host": "10.0.0.1", "service_port_http": "80", "port_8080_tcp_addr": "10.0.0.1"}
    with GatewayProcess(free_endpoint(), tmp_path / "log", deadlines_s=5, group_byte=1, colour="red", **linked):
        pass
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    named = {line["variable"]: line["did_you_mean"] for line in lines if line["message"] == "no such setting"}
    assert named == {
        "GATEWAY_DEADLINES_S": "GATEWAY_DEADLINE_S",
        "GATEWAY_GROUP_BYTE": "GATEWAY_GROUP_BYTES",
        "GATEWAY_COLOUR": "",
    }
    assert "enableServiceLinks: false" in refusal(port="tcp://10.0.0.1:80")


def test_make_key_appends_a_key_that_is_let_in(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    for name in ("scanner", "router"):
        made = subprocess.run(
            ["make", "key", f"NAME={name}", f"KEYS={file}"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        key = re.search(rf"{name}: (gwk_\S+)", made.stderr)
        assert key
        keys = ApiKeys.of(Settings(api_keys_file=file))
        assert keys.owner(key[1]).client == name
    before = file.read_text()
    for wrong in ([], ["NAME=not a name"], ["NAME=x", "EXPIRES=soon"]):
        run = subprocess.run(["make", "key", f"KEYS={file}", *wrong], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode != 0
    assert file.read_text() == before


# ---- headers ----


@pytest.mark.parametrize("path", ["/version", "/nothing", "/metrics", "/errors", "/docs"])
def test_every_answer_has_the_security_headers(guarded: Guarded, path: str) -> None:
    headers = http.get(f"{guarded.url}{path}", headers=BROWSER).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert "Server" not in headers
    assert "Strict-Transport-Security" not in headers


def test_predictions_are_not_kept_by_caches(client: httpx.Client, jpeg: bytes) -> None:
    assert client.post("/v1/predict", content=jpeg, headers=IMAGE).headers["Cache-Control"] == "no-store"


def test_the_documents_may_run_their_own_script_and_no_other(guarded: Guarded) -> None:
    page = http.get(f"{guarded.url}/docs")
    policy = page.headers["Content-Security-Policy"]
    assert page.text.count("<script>") == policy.count("'sha256-") == 1
    assert "script-src 'self' 'sha256-" in policy
    assert "'unsafe-inline'" not in policy.partition("style-src")[0]


def test_openapi_says_how_to_send_a_key() -> None:
    document = json.loads((ROOT / "gateway/openapi.json").read_text())
    assert set(document["components"]["securitySchemes"]) == {"X-API-Key", "Bearer"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == path.startswith("/v1/"), path
