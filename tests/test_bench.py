"""The yardsticks: each does the work that it claims to do, and a verdict is one only where every round agrees."""

from __future__ import annotations

import asyncio
import json
import operator
import shutil
from pathlib import Path
from xml.etree import ElementTree

import httpx
import psutil
import pytest
from PIL import Image

from export.repository import Repository
from perf import plots
from perf.analyzer import PerfError
from perf.bench import __main__ as bench
from perf.bench import pictures, services, targets
from perf.bench.contenders import inprocess, limit
from perf.bench.services import BENTOML, LITSERVE, MOSEC, PLAIN, STACK, TUNED
from perf.bench.targets import BARE, LIMIT, TRITON, Target
from perf.bench.wrk import Bodies, ContenderRun, WrkLoad
from tests.conftest import EXAMPLES, http, wait_for
from tests.offline import Offline

SIXTEEN = WrkLoad(16, "raw")


def files(root: Path) -> tuple[Path, Path]:
    return root / "defect_preprocess/1/preprocessing.py", root / "defect_classifier/1/model.onnx"


def ask(kind: str, root: Path, jpeg: bytes) -> dict:
    transport = httpx.ASGITransport(inprocess.create_app(kind, *files(root)))

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            return await client.post("/v1/predict", content=jpeg, headers={"Content-Type": "image/jpeg"})

    return dict(asyncio.run(post()).json())


def test_the_tuned_app_gives_the_same_answer(pristine: Path, offline: Offline, jpeg: bytes) -> None:
    answer = ask("tuned", pristine, jpeg)
    label, scores = offline.answer(jpeg)
    assert answer["label"] == label
    assert answer["scores"] == pytest.approx(scores, abs=1e-5)
    assert answer["confidence"] == pytest.approx(scores[label], abs=1e-5)


def test_the_plain_app_answers_nearly_so(pristine: Path, offline: Offline, jpeg: bytes) -> None:
    """It decodes at full size and resizes otherwise, which is what comes of writing preprocessing twice."""
    answer = ask("plain", pristine, jpeg)
    _, scores = offline.answer(jpeg)
    assert answer["scores"] == pytest.approx(scores, abs=0.2)
    assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.skipif(not services.PYTHON.exists(), reason="an environment of their own: make contenders")
@pytest.mark.parametrize("name", [LITSERVE, BENTOML, MOSEC])
def test_the_other_servers_give_the_same_answer(
    name: str, pristine: Path, offline: Offline, jpeg: bytes, tmp_path: Path
) -> None:
    with services.app(name, *files(pristine)) as service:
        for form in ("raw", "json"):
            body = Bodies.of(form, EXAMPLES[:1], tmp_path)
            headers = {"Content-Type": body.media_type}
            with service.awake():
                response = http.post(service.url, content=body.files[0].read_bytes(), headers=headers, timeout=60)
            assert response.status_code == 200
            answer = response.json()[0] if name == BENTOML else response.json()
            assert answer["label"] == offline.answer(jpeg)[0]
            assert answer["scores"] == pytest.approx(offline.answer(jpeg)[1], abs=1e-5)
        # It costs the others nothing.
        wait_for(lambda: {process.status() for _, process in service.parts()} == {psutil.STATUS_STOPPED})
        assert service.memory_mib() > 50, "the workers are counted"
        processes = [process for _, process in service.parts()]
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_a_missing_environment_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setitem(services._COMMANDS, MOSEC, ["/nowhere/python"])
    with pytest.raises(PerfError, match=r"mosec: not installed, run 'make contenders'"):
        services.require([LIMIT, STACK, MOSEC])
    services.require([LIMIT, TRITON])


def test_the_limit_is_measured(pristine: Path) -> None:
    assert limit.measure(*files(pristine), EXAMPLES, batch=2, seconds=0.5, processes=2) > 0


def runs(*stack: float) -> list[ContenderRun]:
    """A limit of 100 requests a second and 10 ms in every round; of the stack, these numbers of both."""
    return [
        run
        for number, rate in enumerate(stack)
        for run in (
            ContenderRun(LIMIT, SIXTEEN, number, 100.0, p50=10, p99=10),
            ContenderRun(STACK, SIXTEEN, number, rate, p50=rate, p99=rate),
        )
    ]


@pytest.mark.parametrize(
    ("target", "met", "missed"),
    [
        (Target(STACK, LIMIT, (16,), 0.9), (90, 91, 95), (80, 85, 89)),
        (Target(STACK, LIMIT, (16,), 1.3, "p50", at_least=False), (10, 12, 13), (14, 15, 20)),
        (Target(STACK, LIMIT, (16,), 1.0, "p99", at_least=False, compare=operator.sub), (9, 11, 10), (11.1, 12, 13)),
    ],
    ids=["ratio at least", "ratio at most", "difference at most"],
)
def test_a_verdict_needs_every_round(target: Target, met: tuple[float, ...], missed: tuple[float, ...]) -> None:
    for rates, expected in ((met, "met"), (missed, "missed"), ((*met, *missed), "inconclusive")):
        values = target.values(runs(*rates), SIXTEEN)
        assert len(values) == len(rates)
        assert target.verdict(values) == expected


def test_targets_are_judged_where_both_sides_were_measured() -> None:
    measured = runs(95, 96)
    ((target, load, values),) = targets.judged(measured, targets.TARGETS)
    assert (target.against, load, values) == (LIMIT, SIXTEEN, [0.95, 0.96])
    assert not list(targets.judged([run for run in measured if run.contender == STACK], targets.TARGETS))


def test_pictures_are_made_to_the_size_of_a_camera(tmp_path: Path) -> None:
    (path,) = pictures.KINDS["12mp"](EXAMPLES[:1], tmp_path)
    with Image.open(path) as picture:
        assert picture.size == (4000, 3000)
    assert 2e6 < path.stat().st_size < 12e6, "as large as a camera's, and JSON stays below the gateway's limit"


def test_a_mixed_load_has_every_size(tmp_path: Path) -> None:
    sizes = set()
    for path in pictures.KINDS["mixed"](EXAMPLES, tmp_path):
        with Image.open(path) as picture:
            sizes.add(picture.size)
    assert {size for size in pictures.SIZES if size} < sizes
    assert len(sizes) > len(pictures.SIZES) - 1, "and the given ones as they are"


def test_a_release_that_decodes_at_full_size_is_published(repository: Path) -> None:
    found = Repository(repository)
    (release,) = found.releases("defect")
    name = bench.publish_full_decode(found, release, lambda _: None)
    full = found.release(name)
    assert {step for step in full.steps if full.steps[step] != release.steps[step]} == {"preprocess"}
    code = repository / "defect_preprocess" / str(full.steps["preprocess"].version) / "preprocessing.py"
    assert "draft(" not in code.read_text()
    with pytest.raises(PerfError, match="no line"):
        bench.publish_full_decode(found, full, lambda _: None)


def test_a_plot_has_a_line_a_name() -> None:
    lines = {"a": [(1.0, 5.0), (4.0, 80.0)], "b & c": [(1.0, 0.0), (4.0, 0.0)]}
    drawn = ElementTree.fromstring(plots.charts([plots.Chart("first", "connections", lines, steps=(1, 4)),
                                                 plots.Chart("second", "requests", {"a": lines["a"]})]))  # fmt: skip
    assert sum(element.tag.endswith("polyline") for element in drawn.iter()) == 3
    texts = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert {"first", "second", "a", "b & c", "80"} <= set(texts)


@pytest.fixture
def figures(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`python -m perf.bench` for a second; what it wrote, by contender and form."""
    monkeypatch.setattr("harness.commands.unwind_on_signals", lambda: None)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str) -> dict[tuple[str, str], dict]:
        command = ["--repository", str(pristine), "--seconds", "1", "--rounds", "1", "--results", str(tmp_path / "x")]
        assert bench.main([*command, *arguments]) == 0
        ElementTree.parse(tmp_path / "x.svg")
        return {(run["contender"], run["load"]["form"]): run for run in json.loads((tmp_path / "x.json").read_text())}

    return run


def test_what_does_not_listen_is_measured_without_a_load_generator(figures, capsys) -> None:
    measured = figures("--contenders", "bare", "triton", "--connections", "1")
    assert {contender for contender, _ in measured} == {BARE, TRITON}
    assert all(run["throughput"] > 0 and run["p50"] > 0 for run in measured.values())
    assert "1 connection, raw" in capsys.readouterr().out


@pytest.mark.skipif(
    not shutil.which("wrk"), reason="the load generator is a package of the system: apt-get install wrk"
)
def test_the_whole_comparison_runs(figures, capsys) -> None:
    measured = figures("--connections", "16", "--form", "raw", "json", "--contenders", "stack", "tuned", "plain")
    assert set(measured) == {(contender, form) for contender in (STACK, TUNED, PLAIN) for form in ("raw", "json")}
    assert all(run["throughput"] > 0 and run["p50"] > 0 for run in measured.values())
    assert {run["failed"] for run in measured.values()} == {0}
    assert set(measured[STACK, "raw"]["cpu_ms"]) == {"gateway", "triton", "preprocess", "classifier", "postprocess"}
    assert measured[STACK, "raw"]["memory_mib"] > 100
    printed = capsys.readouterr().out
    assert "16 connections, json" in printed
    assert "≤ 1.00" in printed
