"""The keys that say how a model's source is followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import load
from gateway.config_following import following_faults
from gateway.errors import ConfigError
from gateway.releases_sources import Following, following
from tests.live import models

FILES = ["source: ./m", "name: m, source: ./m, backends: [{url: 'http://a:8000'}]"]
SERVERS = ["name: m, backends: [{url: 'http://a:8000'}]", "source: 'http://a:8000'"]


async def _nothing(artifact: object, settings: object) -> object:
    raise AssertionError("nothing is loaded")


def written(root: Path, entry: str, defaults: str = "") -> Path:
    file = root / "gateway.yaml"
    file.write_text(f"defaults: {{{defaults}}}\nmodels:\n  - {{{entry}}}\n")
    return file


@pytest.mark.parametrize("entry", SERVERS)
@pytest.mark.parametrize("key", ["golden: {file: g.json}", "poll_interval_s: 30", "keep_previous: 1"])
def test_what_remote_servers_serve_is_not_followed(tmp_path: Path, entry: str, key: str) -> None:
    with pytest.raises(ConfigError, match="remote servers load their own") as caught:
        load(written(tmp_path, f"{entry}, {key}"), {}, {})
    assert caught.value.faults[0].line == 3


@pytest.mark.parametrize("entry", FILES)
def test_files_are(tmp_path: Path, entry: str) -> None:
    (tmp_path / "m").mkdir()
    config = load(
        written(tmp_path, f"{entry}, golden: {{rtol: 1, atol: 0}}, poll_interval_s: 1, keep_previous: 2"), {}, {}
    )
    assert (config.models[0].golden.file, config.models[0].keep_previous) == ("golden.json", 2)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "key", ["poll_interval_s: -1", "keep_previous: 5", "golden: {rtol: -1}", "golden: {files: x}", "golden: yes"]
)
def test_values_out_of_range_are_faults(tmp_path: Path, key: str) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, f"source: ./m, {key}"), {}, {})
    assert [fault.where.partition(".")[2].partition(".")[0] for fault in caught.value.faults] == [key.partition(":")[0]]


@pytest.mark.parametrize("item", [None, 3, "x", [], {}, {"source": 3, "golden": 1}, {"source": "ftp://x", "golden": 1}])
def test_whatever_stands_there_is_looked_at_in_peace(item: object) -> None:
    assert all("remove it" in fault.message for fault in following_faults(item))


@pytest.mark.parametrize(
    ("entry", "defaults", "interval_s", "keep"),
    [
        ("", "", 0.0, 0),
        ("poll_interval_s: 5", "", 5.0, 1),
        ("poll_interval_s: 5, keep_previous: 0", "", 5.0, 0),
        ("keep_previous: 2", "", 0.0, 2),
        ("", "poll_interval_s: 7", 7.0, 1),
        ("poll_interval_s: 0", "poll_interval_s: 7", 0.0, 0),
    ],
)
def test_files_are_followed_where_that_is_asked_for(
    tmp_path: Path, entry: str, defaults: str, interval_s: float, keep: int
) -> None:
    models.repository(tmp_path / "models", {"m": b"not looked at"})
    config = load(written(tmp_path, f"source: ./models{', ' if entry else ''}{entry}", defaults), {}, {})
    found = following(config, _nothing, "m")  # type: ignore[arg-type]
    assert (found.interval_s, found.keep, found.source is not None) == (interval_s, keep, interval_s > 0)
    assert following(config, _nothing, "other") == Following()  # type: ignore[arg-type]
