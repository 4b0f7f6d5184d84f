"""Changes of a model's serving version that meet each other, or are cut off: nothing is lost, doubled or left behind.

Invariant: whatever happened, the name means a version that can answer, what is loaded is what the releases know, and
everything else was freed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Any

import pytest

from gateway.catalog import ServedVersion
from gateway.core.model import Artifact
from gateway.errors import LoadFailed
from gateway.releases import TRIED_AT_ONCE, NothingToDo
from gateway.releases_model import ModelReleasesStatus, Result
from gateway.releases_sources import Following
from tests.cut_off import CutOff
from tests.ingress.oip_bench import NumberModel, check, infer
from tests.test_releases import Case, followed, healthy, moved, other_input


class Gate:
    """A load that waits until the test lets it go on."""

    def __init__(self) -> None:
        self.started, self.go = asyncio.Event(), asyncio.Event()

    async def __call__(self, artifact: Artifact) -> NumberModel:
        self.started.set()
        await self.go.wait()
        return await healthy(artifact)


def status(case: Case) -> ModelReleasesStatus:
    found = case.releases.status("numbers")
    assert found is not None
    return found


async def consistent(case: Case) -> None:
    """The invariant of this file's header."""
    catalog = case.bench.catalog
    await catalog.freed("numbers")
    check(await case.bench.ask(infer([7])), [7])
    known = {(one.role, one.version) for one in status(case).releases}
    loaded = {("live" if v.role == "champion" else v.role, v.version) for v in catalog.of("numbers") if v.loaded}
    assert known == loaded


async def beside(case: Case, version: str) -> ServedVersion:
    """A canary."""
    (found,) = await case.bench.catalog.stage([case.source.wanted(version)], "canary")
    return found


async def test_a_canary_that_is_promoted_twice_serves_on() -> None:
    async with followed() as case:
        canary = await beside(case, "4")

        async def promote() -> str:
            async with case.releases.turn("numbers"):
                return (await case.releases.promote("numbers", [canary], "operator")).outcome

        outcomes = await asyncio.gather(promote(), promote(), return_exceptions=True)
        assert outcomes[0] == "promoted"
        assert isinstance(outcomes[1], NothingToDo)
        await consistent(case)
        assert case.loaded() == {"4": "champion", "3": "previous"}


async def test_a_trial_given_up_before_it_began_leaves_nothing() -> None:
    async with followed() as case:
        await moved(case, "4")
        case.source.version = "5"
        async with contextlib.AsyncExitStack() as busy:
            for _ in range(TRIED_AT_ONCE):
                await busy.enter_async_context(case.releases._trying)
            trying = asyncio.create_task(case.releases.refresh("numbers", "poll"))
            while not any(one.role == "trial" for one in status(case).releases):
                await asyncio.sleep(0)
            trying.cancel()
            await asyncio.wait({trying})
        await consistent(case)
        assert case.told[-1].outcome == "failed"


async def test_a_kept_release_that_cannot_answer_is_loaded_anew_when_its_source_means_it() -> None:
    async with followed() as case:
        await moved(case, "4")
        case.bench.catalog.failed("numbers", "3", "its workers crash", None)
        case.source.version = "3"
        assert (await case.releases.refresh("numbers", "poll")).outcome == "swapped"
        assert case.version() == "3"
        assert case.source.freed == ["3"]
        await consistent(case)


async def test_a_rollback_during_a_trial_is_not_undone_by_the_source() -> None:
    async with followed() as case:
        await moved(case, "4")
        gate = case.source.loads["5"] = Gate()
        case.source.version = "5"
        trying = asyncio.create_task(case.releases.refresh("numbers", "poll"))
        await gate.started.wait()
        await case.releases.rollback("numbers", "operator")
        with pytest.raises(NothingToDo):
            await trying
        del case.source.loads["5"]
        assert (await case.releases.refresh("numbers", "poll")).outcome == "withheld"
        assert case.version() == "3"
        await consistent(case)


async def test_a_rollback_does_not_wait_for_other_loads_of_the_model() -> None:
    async with followed() as case:
        await moved(case, "4")
        gate = case.source.loads["6"] = Gate()

        async def load() -> None:
            async with case.releases.turn("numbers"):
                await beside(case, "6")

        loading = asyncio.create_task(load())
        await gate.started.wait()
        async with asyncio.timeout(5):
            assert (await case.releases.rollback("numbers", "operator")).outcome == "rolled_back"
        assert case.version() == "3"
        gate.go.set()
        await loading
        assert case.loaded() == {"3": "champion", "4": "previous", "6": "canary"}


async def test_what_cannot_be_looked_up_is_known_before_the_name_changes_hands() -> None:
    async with followed() as case:
        await moved(case, "4")

        def broken(name: str) -> Following:
            raise OSError("the disk is gone")

        case.releases._find = broken
        with pytest.raises(OSError, match="the disk is gone"):
            async with case.releases.turn("numbers"):
                await case.releases.replace([case.source.wanted("6")], "request")
        assert case.version() == "4"
        await consistent(case)


async def test_what_was_refused_is_tried_again_when_the_configuration_is_read_anew() -> None:
    async with followed() as case:
        case.source.loads["4"] = other_input
        with pytest.raises(LoadFailed):
            await moved(case, "4")
        del case.source.loads["4"]
        await case.releases.look("numbers", "poll")
        assert case.version() == "3"
        await case.releases.refresh_all("SIGHUP")
        assert case.version() == "4"


async def swap_cut_off(case: Case, at: int, ends: str) -> int:
    """Version 2 serves and 3 is kept; then 4 is tried. Returns how often that waited."""
    await moved(case, "2")
    case.source.version = "4"
    look = case.releases._look
    rollbacks: set[asyncio.Task[Result]] = set()

    def cut() -> None:
        if ends == "cancelled":
            trying.cancel()
        else:
            rollbacks.add(asyncio.ensure_future(case.releases.rollback("numbers", "operator")))

    seen: list[CutOff] = []

    async def cut_off(*arguments: Any, **more: Any) -> Any:
        seen.append(CutOff(look(*arguments, **more), at, cut))
        return await seen[0]

    case.releases._look = cut_off  # type: ignore[method-assign]
    trying = asyncio.create_task(case.releases.refresh("numbers", "poll"))
    await asyncio.wait({trying})
    for rollback in rollbacks:
        assert (await rollback).outcome == "rolled_back"
    case.releases._look = look  # type: ignore[method-assign]
    return seen[0].awaits


@pytest.mark.parametrize("ends", ["cancelled", "rolled back"])
async def test_a_swap_that_is_cut_off_at_any_await_is_done_or_not_begun(ends: str) -> None:
    found = []
    for at in itertools.count(1):
        async with followed() as case:
            awaits = await swap_cut_off(case, at, ends)
            found.append(case.version())
            await consistent(case)
            case.source.version = "5"
            assert (await case.releases.refresh("numbers", "poll")).outcome == "swapped"
            await consistent(case)
            assert sorted(case.source.freed)[:1] in (["2"], ["3"])
        if awaits < at:
            break
    assert len(found) > 4
    assert set(found[:-1]) == ({"2", "4"} if ends == "cancelled" else {"2", "3"}), found
    assert found[-1] == "4"
