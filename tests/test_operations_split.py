"""The pages of a split, and what the command line makes of them."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import orjson
import pytest

from gateway.catalog import ServedVersion
from gateway.cli_split import status_lines
from gateway.core.shadow_comparison import ComparisonStatistics, OutputComparison
from gateway.errors import ConfigError, NotReady
from gateway.operations_page import Asked, Page, PageFault
from gateway.operations_split import ALL, PATH, PROMOTE, split_pages
from gateway.traffic_shadow import MirrorStatistics
from gateway.variants import Variants
from gateway.variants_status import CanaryStatus, ShadowStatus, TrafficStatus

COMPARED = ComparisonStatistics(90, 10, (OutputComparison("y", 100, 10, 200, 180, 0.5, 0.1),))
MIRROR = MirrorStatistics("3", 1.0, 101, {"full": 4, "busy": 0, "unready": 0, "refused": 0}, 1, 0, 0, COMPARED)
STATUS = TrafficStatus(
    "digits",
    "3",
    95,
    CanaryStatus("./new", "4", "sha256:1", "READY", "", 25.0, 5.0, 5, {"X-Variant": "canary"}, "X-User", 2),
    ShadowStatus("./other", "5", "sha256:2", "READY", "", 100.0, 100.0, 101, MIRROR),
)


class Known:
    """As much of `Variants` as the pages ask."""

    def __init__(self) -> None:
        self.shares: list[Any] = []

    def share(self, name: str, percents: Any) -> TrafficStatus:
        self.shares.append((name, dict(percents)))
        return self.status(name)

    def status(self, name: str) -> TrafficStatus:
        if name != "digits":
            raise ConfigError(f"model '{name}' has neither a canary nor a shadow")
        return STATUS

    def statuses(self) -> dict[str, TrafficStatus]:
        return {"digits": STATUS}

    def candidate(self, name: str) -> object:
        self.status(name)
        return "the canary"


class Pages:
    def __init__(self, refuse: Exception | None = None) -> None:
        self.known = Known()

        async def promote(name: str, version: ServedVersion) -> object:
            if refuse is not None:
                raise refuse
            return {"text": f"{name} is {cast('str', version)} now"}

        self.pages: dict[tuple[str, str], Page] = {
            (page.method, page.path): page for page in split_pages(cast("Variants", self.known), promote)
        }

    def ask(self, method: str, path: str, body: bytes = b"", name: str = "digits") -> Any:
        return asyncio.run(self.pages[method, path].answer(Asked({"name": name}, {}, body)))  # type: ignore[arg-type]


def test_a_split_is_shown_and_changed() -> None:
    pages = Pages()
    assert pages.ask("GET", PATH) is STATUS
    assert pages.ask("GET", ALL) == [STATUS]
    assert pages.ask("POST", PATH, json.dumps({"canary": 25, "shadow": 0}).encode()) is STATUS
    assert pages.known.shares == [("digits", {"canary": 25, "shadow": 0})]
    assert pages.ask("POST", PROMOTE, b"{}") == {"text": "digits is the canary now"}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"canary=5", "not JSON"),
        (b"", "not JSON"),
        (b"[" * 4000, "not JSON"),
        (b"{}", "names no share"),
        (b"[5]", "names no share"),
        (b'{"champion": 5}', "'champion' is no share"),
        (b'{"canary": "5"}', "number of percent"),
        (b'{"canary": true}', "number of percent"),
        (b'{"canary": 100.5}', "number of percent"),
        (b'{"canary": NaN}', "number of percent"),
        (b'{"canary": -1}', "number of percent"),
    ],
)
def test_what_is_no_share_is_refused(body: bytes, told: str) -> None:
    pages = Pages()
    with pytest.raises(PageFault, match=told) as refused:
        pages.ask("POST", PATH, body)
    assert refused.value.status == 400
    assert pages.known.shares == []


def test_a_model_without_variants_is_not_found() -> None:
    for method, path, body in (("GET", PATH, b""), ("POST", PROMOTE, b"{}")):
        with pytest.raises(PageFault, match="neither") as refused:
            Pages().ask(method, path, body, "other")
        assert refused.value.status == 404


def test_a_promotion_that_is_refused_says_so() -> None:
    with pytest.raises(PageFault, match="not now") as refused:
        Pages(NotReady("not now")).ask("POST", PROMOTE, b"{}")
    assert refused.value.status == 503


def test_people_are_told_in_a_few_lines() -> None:
    lines = dict(status_lines(orjson.loads(orjson.dumps(STATUS))))
    assert lines["champion"] == "version 3, 95 requests"
    assert lines["canary"] == (
        "version 4 from ./new, 25 % (configured: 5 %), 5 requests, on demand with X-Variant: canary, by X-User, "
        "2 of its requests went to the champion"
    )
    assert lines["shadow"] == (
        "version 5 from ./other, 100 %, 101 copies, 10 of 100 answers differ, 4 not copied, "
        "y: 90.0% of the rows equal, at most 0.5 apart"
    )


def test_what_takes_no_part_says_why() -> None:
    lost = {"source": "./new", "version": "", "percent": 5.0, "configured_percent": 5.0, "reason": "it is gone"}
    lines = dict(status_lines({"champion": "", "canary": lost, "shadow": {**lost, "mirror": None}}))
    assert lines["champion"] == "version none, 0 requests"
    assert lines["canary"].endswith("; takes no part: it is gone")
    assert lines["shadow"] == "./new, 5 %; takes no part: it is gone"
