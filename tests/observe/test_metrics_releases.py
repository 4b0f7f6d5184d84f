from __future__ import annotations

from gateway.observe.exposition import render
from gateway.observe.metrics_releases import ReleasesView, families

VIEW = ReleasesView(
    "m", {"swapped": 2, "refused": 1}, 1000.5, 1001.0, trouble=False, refused=True,
    loaded=[("4", "sha256:b", "live"), ("3", "sha256:a", "previous")],
)  # fmt: skip


def lines(*views: ReleasesView) -> set[str]:
    return set(render(families(views), openmetrics=False).decode().splitlines())


def test_swaps_and_what_is_loaded_are_shown() -> None:
    assert {
        'gateway_model_swaps_total{model="m",outcome="swapped"} 2',
        'gateway_model_swaps_total{model="m",outcome="refused"} 1',
        'gateway_model_last_swap_timestamp_seconds{model="m"} 1000.5',
        'gateway_model_release_info{digest="sha256:b",model="m",role="live",version="4"} 1',
        'gateway_model_release_info{digest="sha256:a",model="m",role="previous",version="3"} 1',
        'gateway_model_source_asked_timestamp_seconds{model="m"} 1001.0',
        'gateway_model_source_unreachable{model="m"} 0',
        'gateway_model_release_refused{model="m"} 1',
    } <= lines(VIEW)


def test_what_never_happened_has_no_sample_and_no_series_appears_twice() -> None:
    twice = ReleasesView("m", {}, 0.0, None, trouble=True, refused=False, loaded=[("1", "", "live"), ("1", "", "live")])
    found = [line for line in sorted(lines(twice)) if not line.startswith("#")]
    assert found == [
        'gateway_model_release_info{digest="",model="m",role="live",version="1"} 1',
        'gateway_model_release_refused{model="m"} 0',
        'gateway_model_source_unreachable{model="m"} 1',
    ]
