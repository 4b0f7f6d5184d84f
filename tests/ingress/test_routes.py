"""The route table: which path is which operation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.ingress.http_server import Exchange
from gateway.ingress.routes import VERSIONED, Operation, Route, RouteTable, split_path
from gateway.protocol.http1 import Head


def action(route: Route, head: Head, body: bytes, exchange: Exchange) -> None:
    raise AssertionError("only looked up here")


def table() -> RouteTable:
    made = RouteTable()
    for method, pattern in (
        (b"GET", "/v2/models/stats"),
        (b"GET", f"/v2/models/{{model}}{VERSIONED}"),
        (b"GET", f"/v2/models/{{model}}{VERSIONED}/stats"),
        (b"GET", "/v2/models/{model}/trace/setting"),
        (b"POST", "/v2/models/{model}/trace/setting"),
        (b"POST", "/v2/repository/models/{model}/load"),
        (b"POST", "/v2/repository/{repository}/models/{model}/load"),
    ):
        made.add(method, pattern, Operation(action, "metadata", pattern))
    return made


@pytest.mark.parametrize(
    ("path", "summary", "names"),
    [
        ("/v2/models/stats", "/v2/models/stats", {}),
        ("/v2/models/stats/stats", f"/v2/models/{{model}}{VERSIONED}/stats", {"model": "stats"}),
        ("/v2/models/stats/versions/1", f"/v2/models/{{model}}{VERSIONED}", {"model": "stats", "version": "1"}),
        ("/v2/models/versions/versions/stats", f"/v2/models/{{model}}{VERSIONED}", {"model": "versions"}),
        ("/v2/models/m/versions/v10/stats", f"/v2/models/{{model}}{VERSIONED}/stats", {"version": "v10"}),
        ("/v2/models/trace/trace/setting", "/v2/models/{model}/trace/setting", {"model": "trace"}),
        ("/v2/repository/models/m/load", "/v2/repository/models/{model}/load", {"model": "m"}),
        ("/v2/repository/r/models/m/load", "/v2/repository/{repository}/models/{model}/load", {"repository": "r"}),
        ("/v2/models/%2e%2e%2Fx", f"/v2/models/{{model}}{VERSIONED}", {"model": "../x"}),
    ],
)
def test_what_a_path_means(path: str, summary: str, names: dict[str, str]) -> None:
    segments = split_path(path.encode())
    assert segments is not None
    match = table().match(segments)
    assert match is not None
    (operation, *_) = match.operations.values()
    assert operation.summary == summary
    assert names.items() <= match.names.items()


@pytest.mark.parametrize(
    "path",
    ["/", "", "v2/models/stats", "/v2/models/", "/v2/models//stats", "/v2/models/m/versions/", "/v2/models/m/x",
     "/v2/models/m/versions/1/trace/setting", "/v2/models/{model}/nope", "/V2/models/stats"],
)  # fmt: skip
def test_what_is_no_path(path: str) -> None:
    segments = split_path(path.encode())
    assert segments is None or table().match(segments) is None


def test_one_path_may_have_several_methods() -> None:
    match = table().match(("v2", "models", "m", "trace", "setting"))
    assert match is not None
    assert set(match.operations) == {b"GET", b"POST"}


@given(st.lists(st.sampled_from(["v2", "models", "stats", "versions", "1", "", "{model}", "é"]), max_size=7))
def test_a_match_spells_its_pattern(segments: list[str]) -> None:
    made = table()
    match = made.match(tuple(segments))
    if match is None:
        return
    (pattern,) = [path for path, operations in made.paths.items() if operations is match.operations]
    for name, value in match.names.items():
        pattern = pattern.replace(f"{{{name}}}", value)
    assert pattern == "/" + "/".join(segments)
    assert all(match.names.values())
