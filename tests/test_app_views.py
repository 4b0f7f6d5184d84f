from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from gateway.agreement_sampling import AgreementSamplers
from gateway.app_views import Views
from gateway.catalog import Catalog
from gateway.core.model import ModelState
from gateway.core.outcome import Failure, FailureKind
from gateway.core.resilience import Resilience
from gateway.errors import ModelError
from tests.ingress.oip_bench import oip_bench, replica_of
from tests.scripted import Bench, simulated


class Never:
    def random(self) -> float:
        return 1.0


def version_of(bench: Bench | None, **changed: Any) -> Any:
    """A `ServedVersion`, as far as views look at one."""
    seen = {
        "name": "m", "version": "1", "state": ModelState.READY, "reason": "", "artifact": None, "replicas": (),
        "statistics": None, "load_s": 0.5, "config_document": {"metric_tags": {"team": "a"}}, "dependencies": (),
        "scheduler": None, "spec": None, "fleets": (), "ready": True, "role": "champion", "refusal": "",
        "wanted": SimpleNamespace(uri="", facts=None, stale=""),
    }  # fmt: skip
    if bench is not None:
        seen |= {
            "scheduler": bench.scheduler, "spec": bench.spec, "fleets": bench.scheduler.fleets,
            "statistics": bench.statistics,
        }  # fmt: skip
    return type("Version", (), seen | changed)()


def views_of(*versions: Any, samplers: AgreementSamplers | None = None) -> Views:
    return Views(lambda: versions, samplers or AgreementSamplers(Never()), asyncio.get_running_loop().time)


@simulated
async def test_a_backend_is_shown_to_scrapers_and_to_people_in_the_same_state() -> None:
    bench = Bench(replicas=2, kinds=["onnx", "oip"])
    fleet, now = bench.scheduler.fleets[0], bench.loop.time()
    for _ in range(5):
        fleet.began(fleet.members[1], 1, now)
        fleet.failed(fleet.members[1], 1, Failure(FailureKind.BROKEN, "status 500"), 0.0, now)
    views = views_of(version_of(bench))
    (view,), (status,) = views.for_metrics(), views.for_people()
    assert [(one.name, one.state) for one in view.replicas] == [("onnx-1", "closed"), ("host-2", "open")]
    assert [(one.name, one.state, one.available) for one in status.backends] == [
        ("onnx-1", "closed", True),
        ("host-2", "open", True),
    ]
    assert view.replicas[1].ejections == {"consecutive": 1}
    assert status.backends[1].cause.endswith("the last: status 500")
    assert status.backends[1].seconds_left is not None
    assert view.retry_budget_rows >= 100
    assert not view.panic
    assert view.tags == {"team": "a"}
    assert view.agreement is None
    await bench.finish()


@simulated
async def test_people_are_told_why_a_loaded_version_is_not_ready() -> None:
    bench = Bench(replicas=1)
    well, lost = views_of(version_of(bench), version_of(bench, refusal="no worker is available")).for_people()
    assert (well.state, well.reason) == ("READY", "")
    assert (lost.state, lost.reason) == ("UNAVAILABLE", "no worker is available")
    await bench.finish()


@simulated
async def test_panic_of_the_fleet_is_shown() -> None:
    bench = Bench(replicas=3)
    fleet, now = bench.scheduler.fleets[0], bench.loop.time()
    for member in fleet.members[:2]:
        for _ in range(5):
            fleet.began(member, 1, now)
            fleet.failed(member, 1, Failure(FailureKind.BROKEN, "status 500"), 0.0, now)
    (view,) = views_of(version_of(bench)).for_metrics()
    assert view.panic
    await bench.finish()


@simulated
async def test_agreement_is_shown_where_it_is_measured() -> None:
    bench = Bench(replicas=2, kinds=["onnx", "oip"], resilience=Resilience(agreement=0.5))
    samplers, version = AgreementSamplers(Never()), version_of(bench)
    samplers.attach(version)
    views = views_of(version, samplers=samplers)
    (view,), (status,) = views.for_metrics(), views.for_people()
    assert view.agreement is not None
    assert view.agreement == status.agreement
    await bench.finish()


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Catalog, Views]]:
    """`numbers` (two versions) from scripted replicas, and a model that could not be loaded."""
    async with oip_bench() as bench:
        await bench.serve("broken", refuse=ModelError("the graph is odd"))
        yield bench.catalog, Views(bench.catalog.versions, AgreementSamplers(Never()))


async def test_the_status_of_every_version() -> None:
    async with served() as (_, views):
        broken, old, new = views.for_people()
        assert (broken.name, broken.state, broken.reason) == ("broken", "FAILED", "the graph is odd")
        assert (broken.backends, broken.max_batch_size, broken.batching) == ([], 0, "")
        assert broken.digest == "sha256:" + "12" * 32, "its files were read before it was refused"
        assert (old.version, new.version, new.state, new.reason) == ("1", "2", "READY", "")
        assert (new.max_batch_size, new.digest) == (8, "sha256:" + "12" * 32)
        assert new.batching.startswith("batches up to 8 rows")
        assert [(b.name, b.available, b.in_flight) for b in new.backends] == [("onnx-1", True, 0)]


async def test_metrics_are_of_versions_that_have_served() -> None:
    async with served() as (catalog, views):
        _, shown = views.for_metrics()
        assert (shown.name, shown.version) == ("numbers", "2")
        assert [replica.state for replica in shown.replicas] == ["closed"]
        replica = replica_of(catalog.find("numbers", "2"))
        replica.available = False
        replica._changed()
        assert [one.state for one in views.for_metrics()[1].replicas] == ["unavailable"]


async def test_an_ensemble_is_shown_as_its_own_backend() -> None:
    async with served() as (catalog, views):
        catalog.find("numbers", "2").dependencies = ("a",)
        *_, shown = views.for_people()
        assert [(b.name, b.available, b.in_flight, b.state) for b in shown.backends] == [("ensemble", True, 0, "")]
