"""A little of `make fuzz`: bad pictures, and requests made from the OpenAPI document, leave the stack as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rich.console import Console

from gateway.problems import PROBLEMS
from tests.conftest import process_of
from tests.fuzzing import api
from tests.fuzzing.corpus import specimen
from tests.fuzzing.pictures import ANSWERED, fuzz
from tests.fuzzing.seeds import TYPES, seeds
from tests.fuzzing.stack import FuzzedStack, running
from tests.offline import PREPROCESSING
from triton_runtime.server import Endpoint


@pytest.fixture(scope="module")
def stack(triton: Endpoint) -> Iterator[FuzzedStack]:
    with running(triton, process_of(triton).pid) as stack:
        yield stack


def test_every_seed_is_a_good_picture_and_every_format_has_some() -> None:
    for seed in seeds():
        assert PREPROCESSING.preprocess(seed.data, 224).std() > 10, seed.name  # not blank either
    assert {seed.format for seed in seeds()} == set(TYPES)


def test_a_file_of_a_corpus_can_be_made_again_without_the_others() -> None:
    assert [specimen(3, number) for number in (7, 50, 19)] == [specimen(3, number) for number in (7, 50, 19)]
    assert specimen(3, 7) != specimen(4, 7)


@pytest.mark.alone
def test_bad_pictures_are_refused_and_felt_by_nobody(stack: FuzzedStack) -> None:
    findings = fuzz(stack, (specimen(1, number) for number in range(90)), 90, (), Console(stderr=True))
    assert findings.wrong == {}
    assert findings.lost == []
    assert findings.good == 9
    outcomes = {outcome for _, outcome in findings.outcomes}
    assert outcomes >= {ANSWERED, "image_corrupt", "image_truncated", "image_unsupported", "image_too_large"}
    assert outcomes <= {ANSWERED, *PROBLEMS}


@pytest.mark.alone
def test_requests_made_from_the_document_find_nothing(stack: FuzzedStack) -> None:
    before = stack.vitals()
    cases, found = api.schemathesis(stack.url, 1, 10, "--phases=examples,coverage,fuzzing")
    assert found == ""
    assert cases > 100
    assert stack.vitals().worsened(before) == []
