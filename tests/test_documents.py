"""The documents say what the code does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from gateway.api.schemas import PredictResponse, Timing
from gateway.problems import PROBLEMS, Problem
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_paths_and_targets_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    for target in re.findall(
        r"\bmake ([a-z-]+)\b(?! me\b| poll\b)", " ".join(re.findall(r"`[^`]+`|^\$? ?make .*", text, re.M))
    ):
        assert target in TARGETS, target
    for path in re.findall(r"`((?:export|gateway|perf|triton_runtime|tests|examples|deploy)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    assert not re.search(r"\b[A-Z]+_HERE\b", text)


def test_the_clients_page_is_the_table_of_errors() -> None:
    text = (ROOT / "docs/clients.md").read_text()
    documented = []
    for statuses, codes, again, turn in re.findall(r"^\| ([\d, ]+) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE):
        for code in re.findall(r"`(\w+)`", codes):
            documented.append(code)
            kind = PROBLEMS[code]
            assert str(kind.status) in statuses.split(", "), code
            seconds = f"after {kind.retry_after} s" if kind.retry_after else "at once"
            assert again == (seconds if kind.retryable else "no"), code
            assert turn.startswith("yours" if kind.fault == "client" else "ours"), code
    assert sorted(documented) == sorted(PROBLEMS)
    assert all(f"`{kind.step}`" in text for kind in PROBLEMS.values())


def test_the_clients_page_shows_the_answer_and_a_problem_as_they_are() -> None:
    answer, problem = (
        json.loads(block) for block in re.findall(r"```json\n(.*?)```", (ROOT / "docs/clients.md").read_text(), re.S)
    )
    assert list(answer) == list(PredictResponse.model_fields)
    assert list(answer["timing_ms"]) == list(Timing.model_fields)
    kind = PROBLEMS[problem["code"]]
    assert list(problem) == list(Problem.model_fields)
    assert asdict(kind).items() - {("retry_after", None)} <= problem.items()


def test_the_operations_page_shows_the_settings_as_help_does() -> None:
    text = subprocess.run([sys.executable, "-m", "gateway", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    page = (ROOT / "docs/operations.md").read_text()
    for line in text[text.index("environment:\n") :].splitlines()[1:]:
        assert line.strip() in page


def test_the_models_page_shows_the_figures_of_the_card() -> None:
    figures = json.loads((ROOT / "export/checkpoints/defect/card.json").read_text())["valid"]
    page = (ROOT / "docs/models.md").read_text()
    assert f"| accuracy | {figures['accuracy']:.3f} |" in page
    assert f"| {figures['expected_calibration_error']:.3f} |" in page
