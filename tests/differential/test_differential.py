"""The corpus, sent to a real Triton and to the gateway: no difference that the allow-list does not explain.

All of it is asked once; then every case is a test of its own, so that a failure names its request. `-s` shows the
table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from tests.differential.allowed import ALLOWED
from tests.differential.campaign import CORPUS, Tally, run
from tests.differential.exchange import Case
from tests.differential.triton_process import TritonProcess
from tests.live.gateway_process import GatewayProcess

pytestmark = pytest.mark.slow


@dataclass
class Campaign:
    tally: Tally
    metrics: tuple[str, str]
    """/metrics of Triton and of the gateway after the corpus."""


@pytest.fixture(scope="module")
def campaign(servers: tuple[TritonProcess, GatewayProcess]) -> Campaign:
    real, ours = servers
    tally = run(CORPUS, real, ours)
    print(f"\n{tally.table()}")  # noqa: T201
    return Campaign(tally, (real.metrics(), ours.operations("/metrics").decode()))


@pytest.mark.parametrize("case", CORPUS, ids=[case.name for case in CORPUS])
def test_answers_are_equal_or_their_difference_is_explained(campaign: Campaign, case: Case) -> None:
    found = campaign.tally.unexplained[case.name]
    assert not found, "\n".join(map(str, found))


ENTRIES = [entry for entry in ALLOWED if not entry.cases[0].startswith(("shm/", "sequence/"))]
"""Those of this corpus; shared memory and sequences have tests of their own."""


@pytest.mark.parametrize("entry", ENTRIES, ids=[f"{entry.path} of {entry.cases[0]}" for entry in ENTRIES])
def test_every_entry_of_the_allow_list_explains_something(campaign: Campaign, entry: object) -> None:
    assert entry not in campaign.tally.stale, "this difference is gone: delete the entry"


def test_names_of_cases_are_unique() -> None:
    assert len({case.name for case in CORPUS}) == len(CORPUS)


SERIES = re.compile(r"(nv_inference_\w+|nv_cache_\w+)\{(.*?)\} ")
VALUE = re.compile(r'"[^"]*"')


def labels(text: str) -> dict[str, set[str]]:
    """Metric families about models, with their labels in the order they are written."""
    found: dict[str, set[str]] = {}
    for name, given in SERIES.findall(text):
        found.setdefault(name, set()).add(VALUE.sub("", given))
    return found


def test_metric_families_and_labels_are_tritons(campaign: Campaign) -> None:
    theirs, ours = map(labels, campaign.metrics)
    assert theirs
    assert {name: ours.get(name) for name in theirs} == theirs
