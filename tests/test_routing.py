"""Who answers: shares, sticky keys, pins, edits of the routing file, rollback, and what happens when a release goes."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import trustme
from prometheus_client.parser import text_string_to_metric_families

from contract import Manifest
from gateway.problems import Failure
from gateway.routing.catalogue import Catalogue
from gateway.routing.rollback import RollbackError
from gateway.routing.rollback import _target as target_of
from gateway.routing.router import Router, draw
from gateway.routing.routing_file import RoutingFile
from gateway.triton.client import TritonClient
from gateway.triton.inventory import CHECKING, Inventory, Known
from tests.asking import Asking
from tests.conftest import ROOT, GatewayProcess, free_endpoint, free_port, http, wait_for
from tests.test_outages import MANIFEST, predict
from tests.test_problems import IMAGE, assert_problem
from triton_runtime.server import Endpoint, TritonServer

LATEST = 'stable = "latest"\n'
ON_V1 = 'stable = "defect-v1"\n'


def canary(percent: float, sticky: str = "") -> str:
    return f'{ON_V1}[canary]\nrelease = "defect-v2"\npercent = {percent}\n' + f'sticky = "{sticky}"\n' * bool(sticky)


class Routed:
    """A gateway in front of both releases, and the file that it follows."""

    def __init__(self, gateway: GatewayProcess, file: Path) -> None:
        self.gateway = gateway
        self.file = file
        self.http = httpx.Client(base_url=gateway.url, timeout=60)
        self._put = ""

    def routing(self) -> dict[str, Any]:
        return dict(self.http.get("/version").json()["pipeline"]["routing"])

    def write(self, text: str, until: Callable[[dict[str, Any]], bool]) -> None:
        self._put = ""
        self.file.write_text(text)
        wait_for(lambda: until(self.routing()), 5)

    def put(self, text: str) -> None:
        """Bring a good routing into force: another one first, so that waiting for a change works."""
        if text == self._put == (self.file.read_text() if self.file.exists() else ""):
            return
        self.write(f'{ON_V1}[shadow]\nrelease = "defect-v1"\n', lambda r: r["shadow"] is not None and not r["error"])
        self.write(text, lambda r: r["shadow"] is None and not r["error"])
        self._put = text

    def ask(self, jpeg: bytes, **options: Any) -> dict[str, Any]:
        headers = {**IMAGE, **options.pop("headers", {})}
        response = self.http.post("/v1/predict", content=jpeg, headers=headers, **options)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def samples(self, name: str) -> dict[tuple[str, ...], float]:
        """The values of a metric, by the values of its labels in the order of the labels' names."""
        return {
            tuple(value for _, value in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.http.get("/metrics").text)
            for sample in family.samples
            if sample.name == name
        }


@pytest.fixture(scope="module")
def followed(pair_triton: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routed]:
    folder = tmp_path_factory.mktemp("routing")
    file = folder / "routing.toml"
    with GatewayProcess(pair_triton, folder / "log", deadline_s=60, routing=file) as gateway:
        routed = Routed(gateway, file)
        wait_for(lambda: len(routed.samples("gateway_release_active")) == 2)
        wait_for(lambda: set(routed.samples("gateway_release_active").values()) == {1.0})
        yield routed
        routed.http.close()


@pytest.fixture
def routed(followed: Routed) -> Routed:
    followed.put(LATEST)
    return followed


# ---- shares ----


def test_the_draw_is_even_and_the_same_for_the_same_key() -> None:
    draws = [draw(f"parcel-{number}") for number in range(20_000)]
    assert draws == [draw(f"parcel-{number}") for number in range(20_000)]
    assert 0 <= min(draws) < max(draws) < 100
    for percent in (1, 5, 50, 99):
        share = sum(value < percent for value in draws) / len(draws) * 100
        assert share == pytest.approx(percent, abs=4 * (percent * (100 - percent) / len(draws)) ** 0.5)
    assert len({draw(None) for _ in range(100)}) == 100


@pytest.mark.parametrize("kind", ["metadata", "header"])
def test_a_sticky_canary_keeps_its_keys_as_it_grows(routed: Routed, jpeg: bytes, kind: str) -> None:
    keys = [f"parcel-{number}" for number in range(40)]
    sticky = {"metadata": "metadata:parcel", "header": "header:X-Client-Id"}[kind]

    def went_to_the_canary() -> set[str]:
        chosen = set()
        for key in keys:
            if kind == "metadata":
                body = {"image": base64.b64encode(jpeg).decode(), "metadata": {"parcel": key}}
                answer = routed.http.post("/v1/predict", json=body).json()
            else:
                answer = routed.ask(jpeg, headers={"x-client-id": key})
            assert (answer["model_version"], answer["route"]) in (("defect-v1", "stable"), ("defect-v2", "canary"))
            if answer["route"] == "canary":
                chosen.add(key)
        return chosen

    routed.put(canary(20, sticky))
    few = went_to_the_canary()
    assert few == went_to_the_canary()
    routed.put(canary(60, sticky))
    many = went_to_the_canary()
    assert few < many
    assert {key for key in keys if draw(key) < 20} == few
    assert {key for key in keys if draw(key) < 60} == many


def test_without_a_key_chance_decides(routed: Routed, jpeg: bytes) -> None:
    routed.put(canary(50, "metadata:parcel"))  # a raw picture has no metadata
    routes = [routed.ask(jpeg)["route"] for _ in range(120)]
    assert set(routes) == {"stable", "canary"}
    assert 30 <= routes.count("canary") <= 90  # misses once in 20 million runs


@pytest.mark.parametrize(("percent", "route"), [(0, "stable"), (100, "canary")])
def test_nothing_and_everything_are_shares(routed: Routed, jpeg: bytes, percent: int, route: str) -> None:
    routed.put(canary(percent))
    assert {routed.ask(jpeg)["route"] for _ in range(20)} == {route}


def test_releases_says_what_each_is_used_for(routed: Routed) -> None:
    routed.put(canary(30))
    listed = routed.http.get("/v1/releases").json()
    assert (listed["pipeline"], listed["stable"]) == ("defect", "defect-v1")
    assert listed["routing"] == routed.routing()
    assert [(r["name"], r["state"], r["reason"], r["share"], r["roles"]) for r in listed["releases"]] == [
        ("defect-v1", "ready", "", 70.0, ["stable"]),
        ("defect-v2", "ready", "", 30.0, ["canary"]),
    ]
    assert routed.samples("gateway_release_share") == {("defect-v1",): 70.0, ("defect-v2",): 30.0}


def test_a_release_on_trial_is_not_the_latest(routed: Routed, jpeg: bytes) -> None:
    assert routed.ask(jpeg)["model_version"] == "defect-v2"
    routed.put(LATEST + '[canary]\nrelease = "defect-v2"\npercent = 0\n')
    answer = routed.ask(jpeg)
    assert (answer["model_version"], answer["route"]) == ("defect-v1", "stable")


# ---- pins ----

Pin = Callable[[httpx.Client, bytes, str], httpx.Response]
PINS: dict[str, Pin] = {
    "json": lambda http, jpeg, name: http.post(
        "/v1/predict", json={"image": base64.b64encode(jpeg).decode(), "model_version": name}
    ),
    "form": lambda http, jpeg, name: http.post(
        "/v1/predict", files={"image": ("p.jpg", jpeg), "model_version": (None, name)}
    ),
    "raw, query": lambda http, jpeg, name: http.post(
        "/v1/predict", params={"model_version": name}, content=jpeg, headers=IMAGE
    ),
    "json, query": lambda http, jpeg, name: http.post(
        "/v1/predict", params={"model_version": name}, json={"image": base64.b64encode(jpeg).decode()}
    ),
    "form, query": lambda http, jpeg, name: http.post(
        "/v1/predict", params={"model_version": name}, files={"image": ("p.jpg", jpeg)}
    ),
}


@pytest.mark.parametrize("form", PINS)
def test_a_pin_is_kept(routed: Routed, jpeg: bytes, form: str) -> None:
    routed.put(canary(100))
    for name in ("defect-v1", "defect-v2"):
        answer = PINS[form](routed.http, jpeg, name).json()
        assert (answer["model_version"], answer["route"]) == (name, "pinned")


@pytest.mark.parametrize("form", PINS)
@pytest.mark.parametrize("name", ["defect-v3", "fruit-v1", "newest", "defect-v01"])
def test_a_pin_to_what_was_never_there(routed: Routed, jpeg: bytes, form: str, name: str) -> None:
    problem = assert_problem(PINS[form](routed.http, jpeg, name), "unknown_release")
    assert "defect-v1, defect-v2" in problem["detail"]


@pytest.mark.parametrize("form", PINS)
def test_an_empty_pin_is_none(routed: Routed, jpeg: bytes, form: str) -> None:
    routed.put(canary(100))
    assert PINS[form](routed.http, jpeg, "").json()["route"] == "canary"


def test_a_pin_must_be_one(routed: Routed, jpeg: bytes) -> None:
    encoded = base64.b64encode(jpeg).decode()
    body = {"image": encoded, "model_version": "defect-v1"}
    for response in (
        routed.http.post("/v1/predict", params={"model_version": "defect-v2"}, json=body),
        routed.http.post("/v1/predict?model_version=defect-v1&model_version=defect-v2", json={"image": encoded}),
    ):
        assert_problem(response, "invalid_request")
    same = routed.http.post("/v1/predict", params={"model_version": "defect-v1"}, json=body)
    assert same.json()["model_version"] == "defect-v1"
    assert_problem(routed.http.post("/v1/predict", json={"image": encoded, "model_version": 1}), "invalid_request")


# ---- edits ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stable = ", "is not TOML"),
        ('stabel = "latest"', "stabel"),
        ('stable = "newest"', "latest"),
        ('stable = "fruit-v1"', "fruit-v1 is no release of the pipeline defect"),
        (canary(120), "percent"),
        ("[canary]\npercent = 5", "release"),
        (canary(5) + '[shadow]\nrelease = "defect-v2"\n', "defect-v2 is canary and shadow"),
        (f"x = {'[' * 5000}", ""),
    ],
)
def test_a_bad_edit_keeps_the_last_good_routing(routed: Routed, jpeg: bytes, text: str, said: str) -> None:
    routed.put(canary(100))
    since = routed.routing()["since"]
    assert routed.samples("gateway_routing_valid") == {(): 1.0}
    logged = routed.gateway.log.read_text().count("bad routing")
    routed.write(text, lambda routing: routing["error"] != "")
    routing = routed.routing()
    assert said in routing["error"]
    assert routing["canary"] == {"release": "defect-v2", "percent": 100.0, "sticky": None}
    assert routing["since"] == since
    assert routed.ask(jpeg)["route"] == "canary"
    assert routed.samples("gateway_routing_valid") == {(): 0.0}
    time.sleep(1)
    assert routed.gateway.log.read_text().count("bad routing") == logged + 1, "said once"
    routed.write(ON_V1, lambda routing: routing["error"] == "" and routing["canary"] is None)
    assert routed.samples("gateway_routing_valid") == {(): 1.0}
    assert routed.ask(jpeg)["route"] == "stable"


def test_a_file_that_vanishes_changes_nothing_but_is_reported(routed: Routed, jpeg: bytes) -> None:
    routed.put(ON_V1)
    routed.file.unlink()
    wait_for(lambda: "is missing" in routed.routing()["error"], 5)
    assert routed.routing()["stable"] == "defect-v1"
    assert routed.ask(jpeg)["model_version"] == "defect-v1"
    routed.write(ON_V1, lambda routing: routing["error"] == "")


def test_what_cannot_be_had_is_said_and_the_newest_answers(routed: Routed, jpeg: bytes) -> None:
    wish = 'stable = "defect-v9"\n[canary]\nrelease = "defect-v7"\npercent = 50\n[shadow]\nrelease = "defect-v8"\n'
    routed.write(wish, lambda routing: routing["stable"] == "defect-v9")
    warning = routed.routing()["warning"]
    for said in ("stable defect-v9 is not active: defect-v2 answers", "canary defect-v7", "shadow defect-v8"):
        assert said in warning
    assert routed.routing()["error"] == ""
    assert {routed.ask(jpeg)["model_version"] for _ in range(5)} == {"defect-v2"}


def test_no_file_at_the_start_means_the_latest(pair_triton: Endpoint, tmp_path: Path, jpeg: bytes) -> None:
    file = tmp_path / "routing.toml"
    with GatewayProcess(pair_triton, tmp_path / "log", deadline_s=60, routing=file) as gateway:
        wait_for(gateway.is_ready)
        routed = Routed(gateway, file)
        wait_for(lambda: routed.ask(jpeg)["model_version"] == "defect-v2")
        assert (routed.routing()["stable"], routed.routing()["error"]) == ("latest", "")
        routed.write(ON_V1, lambda routing: routing["stable"] == "defect-v1")
        assert routed.ask(jpeg)["model_version"] == "defect-v1"


@pytest.mark.parametrize(
    ("text", "active", "expected"),
    [
        ("", (), "no_release"),
        ('[shadow]\nrelease = "defect-v2"\n', (2,), "no_release"),
        (ON_V1 + '[shadow]\nrelease = "defect-v2"\n', (2,), "no_release"),
        (ON_V1 + '[shadow]\nrelease = "defect-v2"\n', (1, 2), "v1 stable"),
        (ON_V1 + '[shadow]\nrelease = "defect-v3"\n', (2, 3), "v2 stable"),
        (ON_V1 + '[shadow]\nrelease = "defect-v3"\n', (1, 2, 3), "v1 stable, v2 fallback"),
        ('stable = "defect-v3"\n', (1, 2, 4), "v2 stable, v1 fallback, v4 fallback"),
        ('stable = "defect-v3"\n', (4, 5), "v5 stable, v4 fallback"),
        ('[shadow]\nrelease = "defect-v1"\n', (1, 2), "v2 stable"),
        ('[canary]\nrelease = "defect-v2"\npercent = 0\n[shadow]\nrelease = "defect-v1"\n', (1, 2), "v2 stable"),
        ('[canary]\nrelease = "defect-v2"\npercent = 100\n[shadow]\nrelease = "defect-v3"\n', (1, 2, 3),
         "v2 canary, v1 fallback"),
    ],
)  # fmt: skip
def test_a_shadow_never_answers(tmp_path: Path, text: str, active: tuple[int, ...], expected: str) -> None:
    """Not in the place of the stable release either, whichever of the others are there."""
    file = tmp_path / "routing.toml"
    file.write_text(text)
    catalogue = SimpleNamespace(
        active=lambda: [replace(MANIFEST, number=number) for number in sorted(active, reverse=True)],
        coming=list,
        triton_version="2.51.0",
        pipeline="defect",
        known=tuple(Known(f"defect-v{number}", number, None, "") for number in active),
    )
    router = Router(RoutingFile(file, "defect"), cast(Catalogue, catalogue))
    try:
        candidates = router.choose(None, {}, {})
        got = ", ".join(f"v{candidate.release.number} {candidate.route}" for candidate in candidates)
    except Failure as failure:
        got, said = failure.code, str(failure)
        assert bool(active) == bool(router.in_force().warning) == ("the shadow" in said)
    assert got == expected


class Starting:
    """The releases of a gateway that starts: those that it tries, in any order."""

    triton_version, pipeline = "2.51.0", "defect"

    def __init__(self, *numbers: int) -> None:
        self.releases = Inventory(cast(TritonClient, None), "defect", 1.0)
        self.add(*numbers)

    def add(self, *numbers: int) -> None:
        self.releases.known += tuple(
            Known(f"defect-v{number}", number, replace(MANIFEST, number=number), "", is_tried=False)
            for number in numbers
        )
        for known in self.releases.known[-len(numbers) :]:
            known.reason = CHECKING

    def judge(self, number: int, reason: str = "") -> None:
        self.releases.judge(self._of(number), reason)

    def postpone(self, number: int) -> None:
        self.releases.postpone(self._of(number), "Deadline Exceeded")

    def _of(self, number: int) -> Known:
        return next(known for known in self.known if known.number == number)

    def find(self, name: str) -> Known | None:
        return self.releases.find(name)

    def active(self) -> list[Manifest]:
        return self.releases.active()

    def coming(self) -> list[Known]:
        return [known for known in self.releases.known if known.is_coming]

    @property
    def known(self) -> tuple[Known, ...]:
        return self.releases.known


@pytest.mark.parametrize("stable", ["latest", "defect-v3"])
@pytest.mark.parametrize("end", ["answers", "is refused", "hangs"])
def test_at_the_start_nobody_answers_in_the_place_of_what_is_still_tried(tmp_path: Path, stable: str, end: str) -> None:
    file = tmp_path / "routing.toml"
    file.write_text(f'stable = "{stable}"\n[canary]\nrelease = "defect-v2"\npercent = 100\n')
    starting = Starting(1, 2, 3)
    router = Router(RoutingFile(file, "defect"), cast(Catalogue, starting))

    def answers() -> str:
        try:
            return router.stable().name
        except Failure as failure:
            return failure.code

    assert answers() == "no_release"
    starting.judge(2)
    starting.judge(1)
    assert answers() == "no_release"
    with pytest.raises(Failure):
        router.choose(None, {}, {})
    assert router.choose("defect-v2", {}, {})[0].route == "pinned"
    assert router.in_force().warning == ""
    if end == "answers":
        starting.judge(3)
    elif end == "is refused":
        starting.judge(3, "its labels moved")
    else:
        starting.postpone(3)
    assert answers() == ("defect-v3" if end == "answers" else "defect-v1")

    starting.add(4)
    assert answers() == ("defect-v3" if end == "answers" else "defect-v1"), "later, what is there goes on"
    starting.judge(4)
    assert answers() == ("defect-v4" if stable == "latest" else answers())


# ---- rollback ----


def rollback(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway.routing.rollback", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)


def to_files(routed: Routed) -> tuple[object, ...]:
    return "--file", routed.file, "--gateway", routed.gateway.url


def test_a_rollback_takes_effect_within_two_seconds(routed: Routed, jpeg: bytes) -> None:
    text = (
        "# who answers\n"
        'stable = "latest"  # since Monday\n\n'
        '[canary]\nrelease = "defect-v7"\npercent = 5\n\n'
        "# watches\n"
        '[shadow]\nrelease = "defect-v9"  # soon\npercent = 10\n'
    )
    routed.write(text, lambda routing: routing["canary"] is not None)
    routed.file.chmod(0o640)
    assert routed.ask(jpeg)["model_version"] == "defect-v2"
    run = rollback(*to_files(routed))
    assert routed.ask(jpeg)["model_version"] == "defect-v1", run.stderr
    assert run.returncode == 0
    assert run.stdout.startswith("defect-v1 answers instead of defect-v2, ")
    assert float(run.stdout.split(", ")[1].split(" s ")[0]) < 2
    assert len(run.stdout.splitlines()) == 1
    edited = routed.file.read_text()
    for kept in ("# who answers", "# since Monday", "# watches", "# soon", "percent = 10"):
        assert kept in edited
    assert "canary" not in edited
    assert routed.file.stat().st_mode & 0o777 == 0o640
    left = {path.name for path in routed.file.parent.iterdir() if "routing" in path.name}
    assert left == {"routing.toml", ".routing.toml.before-defect-v1"}

    again = rollback(*to_files(routed))
    assert again.returncode == 1
    assert again.stderr == "rollback: nothing to roll back to: no active release is older than defect-v1\n"
    forward = rollback("--forward", *to_files(routed))
    assert forward.stdout.startswith("defect-v2 answers, defect-v7 is the canary, "), forward.stderr
    assert routed.file.read_text() == text
    assert routed.file.stat().st_mode & 0o777 == 0o640
    assert routed.ask(jpeg)["model_version"] == "defect-v2"
    twice = rollback("--forward", *to_files(routed))
    assert twice.returncode == 1
    assert twice.stderr.startswith(f"rollback: there is no rollback of {routed.file} to take back")


def test_a_rollback_ends_the_canary_first(routed: Routed, jpeg: bytes) -> None:
    routed.put(canary(100))
    assert routed.ask(jpeg)["route"] == "canary"
    run = rollback(*to_files(routed))
    assert run.stdout.startswith("defect-v2 was the canary and gets no more requests, defect-v1 answers, "), run.stderr
    assert routed.ask(jpeg)["model_version"] == "defect-v1"
    assert rollback("--forward", *to_files(routed)).returncode == 0
    assert routed.ask(jpeg)["route"] == "canary"
    assert rollback(*to_files(routed)).returncode == 0
    for text in (f"# mine\n{ON_V1}", LATEST):
        routed.write(text, lambda routing, text=text: routing["stable"] in text)
        assert rollback("--forward", *to_files(routed)).returncode == 1, "it was edited since"
        assert routed.file.read_text() == text


def test_a_rollback_of_the_latest_ends_its_canary_for_good(routed: Routed, jpeg: bytes) -> None:
    """As `latest` it would become the stable release otherwise."""
    routed.put(LATEST + '[canary]\nrelease = "defect-v2"\npercent = 50\n')
    assert rollback(*to_files(routed)).returncode == 0
    assert {routed.ask(jpeg)["model_version"] for _ in range(5)} == {"defect-v1"}
    assert routed.file.read_text() == ON_V1.rstrip("\n") + "\n"


def test_a_rollback_asks_every_gateway(routed: Routed, pair_triton: Endpoint, tmp_path: Path) -> None:
    others = [GatewayProcess(pair_triton, tmp_path / name, routing=routed.file) for name in ("a", "b")]
    urls = [argument for gateway in (*others, routed.gateway) for argument in ("--gateway", gateway.url)]
    with others[0], others[1]:
        for gateway in others:
            wait_for(gateway.is_ready)
        run = rollback("--file", routed.file, *urls)
        assert run.returncode == 0, run.stderr
        for gateway in (*others, routed.gateway):
            assert http.get(f"{gateway.url}/version").json()["pipeline"]["stable"] == "defect-v1"
    run = rollback("--file", routed.file, "--gateway", routed.gateway.url, "--gateway", others[0].url, "--forward")
    assert run.returncode == 1
    assert f"not everybody confirmed it: the gateway at {others[0].url} cannot be asked" in run.stderr


def test_a_rollback_finds_a_gateway_with_tls_by_its_settings(pair_triton: Endpoint, tmp_path: Path) -> None:
    """Also where its certificate is signed by somebody unknown here, for another name."""
    certificate, file = tmp_path / "gateway.pem", tmp_path / "routing.toml"
    issued = trustme.CA().issue_cert("gateway.example")
    certificate.write_bytes(issued.private_key_pem.bytes() + issued.cert_chain_pems[0].bytes())
    gateway = GatewayProcess(pair_triton, tmp_path / "log", tls_certificate=certificate, routing=file, host="0.0.0.0",
                             allow_anonymous=True)  # fmt: skip
    try:
        url = f"https://127.0.0.1:{gateway.port}"
        wait_for(lambda: httpx.get(f"{url}/health/ready", verify=False).status_code == 200)
        wait_for(lambda: httpx.get(f"{url}/version", verify=False).json()["pipeline"]["stable"] == "defect-v2")
        settings = {"TLS_CERTIFICATE": certificate, "HOST": "0.0.0.0", "PORT": gateway.port, "ROUTING": file}
        environment = {f"GATEWAY_{name}": str(value) for name, value in settings.items()}
        command = [sys.executable, "-m", "gateway.routing.rollback"]
        run = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
        )
        assert run.stdout.startswith("defect-v1 answers instead of defect-v2"), run.stderr
        other = tmp_path / "other.pem"
        other.write_bytes(trustme.CA().cert_pem.bytes())
        for trusted in ((), ("--cacert", other)):
            run = rollback("--file", file, "--gateway", url, *trusted)
            assert "CERTIFICATE_VERIFY_FAILED" in run.stderr, "elsewhere, whoever answers has to be who it should be"
    finally:
        gateway.__exit__()


def test_a_rollback_to_what_cannot_answer_is_refused(routed: Routed) -> None:
    before = routed.file.read_text()
    for name, said in (("defect-v9", "it is not there; active: defect-v1, defect-v2"), ("newest", "not the name")):
        run = rollback("--to", name, *to_files(routed))
        assert run.returncode == 1
        assert said in run.stderr
        assert len(run.stderr.splitlines()) == 1
    assert routed.file.read_text() == before


def test_a_rollback_that_nobody_follows_says_so(routed: Routed, tmp_path: Path) -> None:
    run = rollback("--file", tmp_path / "another.toml", "--gateway", routed.gateway.url)
    assert run.returncode == 1
    assert "after 2 s defect-v2 answers" in run.stderr
    assert "GATEWAY_ROUTING" in run.stderr


def test_a_rollback_of_a_broken_file_leaves_it(routed: Routed) -> None:
    for text in ("stable = ", 'stabel = "x"'):
        routed.write(text, lambda routing: routing["error"] != "")
        run = rollback(*to_files(routed))
        assert run.returncode == 1
        assert "cannot be edited" in run.stderr
        assert routed.file.read_text() == text


def test_a_rollback_without_a_gateway_needs_a_name(tmp_path: Path) -> None:
    file, url = tmp_path / "routing.toml", f"http://127.0.0.1:{free_port()}"
    run = rollback("--file", file, "--gateway", url)
    assert run.returncode == 1
    assert url in run.stderr
    assert not file.exists()
    run = rollback("--file", file, "--gateway", url, "--to", "defect-v1")
    assert run.returncode == 1, "perhaps there is no such release"
    assert "nobody confirmed" in run.stderr
    assert file.read_text() == 'stable = "defect-v1"\n'


def test_while_triton_is_away_a_rollback_goes_to_any_release() -> None:
    """One of them may be what keeps Triton away."""
    away = {"state": "unavailable", "reason": "no Triton answers"}
    now = {
        "stable": "defect-v3",
        "releases": [{"name": f"defect-v{number}", **away} for number in (1, 2, 3)],
        "routing": {"canary": None},
    }
    assert target_of(now, None) == "defect-v2"
    assert target_of(now, "defect-v1") == "defect-v1"
    now["releases"][0]["state"] = "ready"
    assert target_of(now, None) == "defect-v1"


def test_a_rollback_never_goes_to_the_shadow() -> None:
    now = {
        "stable": "defect-v3",
        "releases": [{"name": f"defect-v{number}", "state": "ready", "reason": ""} for number in (1, 2, 3)],
        "routing": {"canary": None, "shadow": {"release": "defect-v2", "percent": 100}},
    }
    assert target_of(now, None) == "defect-v1"
    with pytest.raises(RollbackError, match="is the shadow"):
        target_of(now, "defect-v2")
    del now["releases"][0]
    with pytest.raises(RollbackError, match="no active release is older than defect-v3 but the shadow, defect-v2"):
        target_of(now, None)


# ---- a release that goes ----


def test_no_request_fails_when_a_release_goes_under_load(pair: Path, tmp_path: Path, jpeg: bytes) -> None:
    """First the canary, then, without a canary, the stable release itself; pinned requests say that it is gone."""
    endpoint, file = free_endpoint(), tmp_path / "routing.toml"
    file.write_text(canary(50))
    with (
        TritonServer(pair, endpoint, poll_seconds=1) as server,
        # A gateway that looks at Triton rarely: what hides the loss is the fallback, not the inventory.
        GatewayProcess(endpoint, tmp_path / "log", deadline_s=60, refresh_s=4, routing=file) as gateway,
    ):
        server.wait_until_ready()
        routed = Routed(gateway, file)
        wait_for(lambda: list(routed.samples("gateway_release_active").values()) == [1.0, 1.0])
        with Asking(gateway.url, jpeg, 8) as load:
            answers = load.answers
            wait_for(lambda: {answer.get("route") for _, answer in answers} == {"stable", "canary"})
            shutil.rmtree(pair / "defect-v2")
            wait_for(lambda: any(answer.get("route") == "fallback" for _, answer in answers))
            wait_for(lambda: len(routed.samples("gateway_release_active")) == 1)
            load.wait_for_more(50)
            gone = routed.http.post("/v1/predict?model_version=defect-v2", content=jpeg, headers=IMAGE)
        log = gateway.log.read_text()

    assert {status for status, _ in answers} == {200}
    assert {(a["model_version"], a["route"]) for _, a in answers} == {
        ("defect-v1", "stable"),
        ("defect-v2", "canary"),
        ("defect-v1", "fallback"),
    }
    assert '"passed_over": "no_release: defect-v2 answers on no server: NOT_FOUND' in log
    assert answers[-1][1]["route"] == "stable", "the canary is out once the inventory is current"
    # Its number is above all that are there, but not above all that this gateway has seen.
    assert_problem(gone, "retired_release")


def test_the_stable_release_may_go_as_well(pair: Path, tmp_path: Path, jpeg: bytes) -> None:
    """What is older answers; once it is gone for good a pin to a smaller number than the newest says retired."""
    endpoint = free_endpoint()
    with (
        TritonServer(pair, endpoint, poll_seconds=1) as server,
        GatewayProcess(endpoint, tmp_path / "log", deadline_s=60, routing=tmp_path / "routing.toml") as gateway,
    ):
        server.wait_until_ready()
        routed = Routed(gateway, tmp_path / "routing.toml")
        wait_for(lambda: list(routed.samples("gateway_release_active").values()) == [1.0, 1.0])
        assert predict(gateway, jpeg).json()["model_version"] == "defect-v2"
        aside = shutil.move(pair / "defect-v2", tmp_path / "aside")

        def older_answers() -> bool:
            answer = predict(gateway, jpeg)
            assert answer.status_code == 200, answer.text
            return bool(answer.json()["model_version"] == "defect-v1")

        wait_for(older_answers)
        shutil.move(aside, pair / "defect-v2")
        wait_for(lambda: predict(gateway, jpeg).json()["model_version"] == "defect-v2")
        shutil.rmtree(pair / "defect-v1")
        ask = lambda: http.post(  # noqa: E731
            f"{gateway.url}/v1/predict?model_version=defect-v1", content=jpeg, headers=IMAGE, timeout=60
        )
        wait_for(lambda: ask().status_code == 410)
        assert "there are defect-v2" in assert_problem(ask(), "retired_release")["detail"]
