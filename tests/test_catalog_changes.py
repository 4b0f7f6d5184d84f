"""Replacing and unloading models that serve: nobody who was let in is lost, nobody is let in who should not be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import pytest

from gateway.core.model import Artifact, ModelState
from gateway.errors import ModelError, NotFound
from gateway.loading import WantedVersion
from tests.ingress.oip_bench import Bench, NumberModel, NumberReplica, check, infer, oip_bench, replica_of

UNLOADED = "Request for unknown model: 'numbers' has no available versions"


class Loads:
    """Plays the worker pool for one version after another; a load waits for `go` if there is one."""

    def __init__(self) -> None:
        self.models: list[NumberModel] = []
        self.freed: list[NumberModel] = []
        self.go: asyncio.Event | None = None
        self.started = asyncio.Event()

    async def __call__(self, artifact: Artifact) -> NumberModel:
        self.started.set()
        if self.go is not None:
            await self.go.wait()
        model = NumberModel()

        async def unload() -> None:
            self.freed.append(model)

        model.unload = unload  # type: ignore[method-assign]
        self.models.append(model)
        return model


def again(
    bench: Bench, load: Callable[[Artifact], Awaitable[NumberModel]], version: str = "1", like: str = "1"
) -> WantedVersion:
    """The version `like`, as it was served first, loaded by `load`."""
    wanted = bench.catalog.find("numbers", like).wanted
    artifact, sidecar = wanted.read()
    renamed = replace(artifact, version=version)
    return replace(wanted, version=version, read=lambda: (renamed, sidecar), load=load)


async def refuse(artifact: Artifact) -> NumberModel:
    raise ModelError("this file is broken")


async def serve(bench: Bench) -> Loads:
    """`numbers` version 1, loaded through `Loads`."""
    await bench.serve()
    loads = Loads()
    assert await bench.catalog.replace([again(bench, loads)]) == []
    return loads


async def test_a_replaced_version_answers_what_it_had_taken_and_the_new_one_everything_after() -> None:
    async with oip_bench(models=False) as bench:
        loads = await serve(bench)
        old = bench.catalog.resolve("numbers", None)
        replica_of(old).held = []
        early, late = await bench.client(), await bench.client()
        early.send(infer([1, 2]))
        while not old.scheduler.pending:  # type: ignore[union-attr]
            await asyncio.sleep(0)
        assert await bench.catalog.replace([again(bench, loads)]) == []
        new = bench.catalog.resolve("numbers", None)
        assert new is not old
        assert (new.state, old.state, old.reason) == (ModelState.READY, ModelState.UNLOADING, "unloaded")
        check(await late.ask(infer([7])), [7])
        assert loads.freed == []
        assert bench.catalog.ready()
        replica_of(old).release()
        check(await early.answer(), [1, 2])
        await bench.catalog.drain()
        assert (loads.freed, old.state) == ([loads.models[0]], ModelState.UNAVAILABLE)
        assert (old.scheduler, old.loaded) == (None, None)


async def test_until_the_new_version_is_ready_the_old_one_serves() -> None:
    async with oip_bench(models=False) as bench:
        loads = await serve(bench)
        loads.go = asyncio.Event()
        loads.started.clear()
        loading = asyncio.create_task(bench.catalog.replace([again(bench, loads)]))
        await loads.started.wait()
        old = bench.catalog.resolve("numbers", None)
        check(await bench.ask(infer([3])), [3])
        assert bench.catalog.versions() == [old]
        loads.go.set()
        assert await loading == []
        assert bench.catalog.resolve("numbers", None) is not old
        check(await bench.ask(infer([4])), [4])


async def test_a_load_that_fails_leaves_everything_as_it_was() -> None:
    async with oip_bench(models=False) as bench:
        loads = await serve(bench)
        old = bench.catalog.resolve("numbers", None)
        (failed,) = await bench.catalog.replace([again(bench, refuse)])
        assert "this file is broken" in failed.reason
        assert bench.catalog.resolve("numbers", None) is old
        assert bench.catalog.versions() == [old]
        assert bench.catalog.ready()
        check(await bench.ask(infer([3])), [3])
        # All versions or none: the good one of two is freed again.
        (failed,) = await bench.catalog.replace([again(bench, loads), again(bench, refuse, "2")])
        assert failed.version == "2"
        assert bench.catalog.versions() == [old]
        assert loads.freed == [loads.models[1]]
        check(await bench.ask(infer([5])), [5])


async def test_a_failed_first_load_is_known_and_does_not_make_the_server_unready() -> None:
    async with oip_bench(models=False) as bench:
        await bench.serve()
        wanted = replace(again(bench, refuse), name="other")
        (failed,) = await bench.catalog.replace([wanted])
        assert bench.catalog.of("other") == [failed]
        assert (failed.state, failed.reason) == (ModelState.UNAVAILABLE, "this file is broken")
        assert bench.catalog.ready()


async def test_versions_that_are_not_wanted_any_more_leave_with_the_old_ones() -> None:
    async with oip_bench() as bench:
        loads = Loads()
        assert await bench.catalog.replace([again(bench, loads), again(bench, loads, "3")]) == []
        assert bench.catalog.ready_versions("numbers") == ["1", "3"]
        assert bench.catalog.resolve("numbers", None).version == "3"
        with pytest.raises(NotFound, match="version 2 is not found"):
            bench.catalog.resolve("numbers", "2")


async def test_a_version_loaded_again_goes_on_counting_and_a_new_one_begins() -> None:
    async with oip_bench(models=False) as bench:
        loads = await serve(bench)
        check(await bench.ask(infer([1])), [1])
        assert await bench.catalog.replace([again(bench, loads), again(bench, loads, "2")]) == []
        assert bench.catalog.resolve("numbers", "1").statistics.success == 1
        assert bench.catalog.resolve("numbers", "2").statistics.success == 0
        await bench.catalog.unload("numbers")
        assert await bench.catalog.replace([again(bench, loads)]) == []
        assert bench.catalog.resolve("numbers", "1").statistics.success == 0


async def test_unloading_answers_those_inside_and_refuses_the_others() -> None:
    async with oip_bench(models=False) as bench:
        loads = await serve(bench)
        version = bench.catalog.resolve("numbers", None)
        replica: NumberReplica = replica_of(version)
        replica.held = []
        client = await bench.client()
        client.send(infer([1, 2]))
        while not version.scheduler.pending:  # type: ignore[union-attr]
            await asyncio.sleep(0)
        unloading = asyncio.create_task(bench.catalog.unload("numbers"))
        await asyncio.sleep(0)
        assert version.state is ModelState.UNLOADING
        refused = await bench.ask(infer([9]))
        assert (refused.status, refused.error) == (404, UNLOADED)
        assert not unloading.done()
        replica.release()
        check(await client.answer(), [1, 2])
        await unloading
        assert (version.state, version.reason) == (ModelState.UNAVAILABLE, "unloaded")
        assert loads.freed == loads.models
        assert bench.catalog.ready()  # nobody wants it to serve
        refused = await bench.ask(infer([9]))
        assert (refused.status, refused.error) == (404, UNLOADED)
        await bench.catalog.unload("numbers")
        await bench.catalog.unload("unknown")
        assert bench.catalog.of("numbers") == [version]


async def test_a_load_that_is_given_up_frees_what_it_had() -> None:
    async with oip_bench(models=False) as bench:
        loads = await serve(bench)
        old = bench.catalog.resolve("numbers", None)
        slow = Loads()
        slow.go = asyncio.Event()
        loading = asyncio.create_task(bench.catalog.replace([again(bench, loads), again(bench, slow, "2")]))
        await slow.started.wait()
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        assert loads.freed == [loads.models[1]]
        assert bench.catalog.versions() == [old]
        check(await bench.ask(infer([5])), [5])


async def test_events_about_other_workers_of_the_same_version_are_not_about_the_one_that_serves() -> None:
    async with oip_bench(models=False) as bench:
        await serve(bench)
        version = bench.catalog.resolve("numbers", None)
        states = []
        for report in (
            partial(bench.catalog.failed, "numbers", "1", "it crashed", NumberModel()),
            partial(bench.catalog.failed, "numbers", "1", "it crashed", version.loaded),
            partial(bench.catalog.recovered, "numbers", "1", NumberModel()),
        ):
            report()
            states.append(version.state)
        assert states == [ModelState.READY, ModelState.FAILED, ModelState.FAILED]
        bench.catalog.recovered("numbers", "1", version.loaded)
        check(await bench.ask(infer([5])), [5])


async def test_a_failed_model_is_replaced_and_its_workers_freed() -> None:
    async with oip_bench(models=False) as bench:
        loads = await serve(bench)
        version = bench.catalog.resolve("numbers", None)
        bench.catalog.failed("numbers", "1", "its worker crashed", version.loaded)
        (failed,) = await bench.catalog.replace([again(bench, refuse)])
        assert isinstance(failed.reason, str)
        assert bench.catalog.find("numbers", None) is version  # it may still recover
        assert await bench.catalog.replace([again(bench, loads)]) == []
        await bench.catalog.drain()
        assert loads.freed == [loads.models[0]]
        check(await bench.ask(infer([5])), [5])
