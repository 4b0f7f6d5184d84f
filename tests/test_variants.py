"""Variants beside a champion: how they come, what keeps them out, and how they go, with callers on the data port."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from gateway import variants_metrics
from gateway.catalog import ServedVersion
from gateway.config import Config, ModelEntry
from gateway.config_release import Canary, Shadow
from gateway.core.batchability import SignatureTensor
from gateway.core.model import Artifact, ModelState
from gateway.core.tensor import DATATYPE
from gateway.errors import ConfigError, ModelError, NotReady, SourceError, SourceUnavailable
from gateway.loading_trial import RunTimedOut
from gateway.provenance.headers import ModelReference, parse
from gateway.traffic_shadow import Mirror
from gateway.variants import AT_ONCE, POLL_S, Variants
from gateway.variants_sources import Target
from gateway.variants_wanted import AGAIN_S, MOST_PAUSE_S
from tests.ingress.oip_bench import Bench, NumberModel, check, infer, oip_bench
from tests.test_catalog_changes import Loads, again

INT64 = DATATYPE["INT64"]


class Rig:
    """`numbers` version 1 as champion, and variants that the test hands out."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.loads = Loads()
        self.now = 0.0
        self.offers: dict[str, Target | Exception] = {}
        """What each source means, or how asking for it fails."""
        self.asked: list[str] = []
        self.locks: dict[str, asyncio.Lock] = {}
        self.variants = Variants(
            bench.catalog,
            self.find,
            partial(bench.pipeline.infer, past_cache=True),
            self.turn,
            random.Random(1),
            lambda: self.now,
            self.look,
        )
        self.looks: object = None
        """How the files of every source look; None: they are on no disk."""

    @contextlib.asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        async with self.locks.setdefault(name, asyncio.Lock()):
            yield

    async def look(self, config: Config, entry: ModelEntry, keys: Canary | Shadow) -> object:
        return self.looks

    async def find(self, config: Config, name: str, entry: ModelEntry, keys: Canary | Shadow, role: str) -> Target:
        assert (name, entry.name) == ("numbers", "numbers")
        self.asked.append(keys.source)
        await asyncio.sleep(0)
        offer = self.offers[keys.source]
        if isinstance(offer, Exception):
            raise offer
        return offer

    def offer(
        self, source: str, version: str, model: type[NumberModel] = NumberModel, *, mutable: bool = False
    ) -> None:
        """`source` means this version from now on."""

        async def load(artifact: Artifact) -> NumberModel:
            made = await self.loads(artifact)
            made.inputs, made.outputs = model().inputs, model().outputs
            return made

        found = self.bench.catalog.champions("numbers")[-1].version
        wanted = again(self.bench, load, version, found)
        self.offers[source] = Target(f"{source} {version} {model.__name__}", wanted, mutable)

    async def want(self, canary: dict[str, Any] | None = None, shadow: dict[str, Any] | None = None) -> None:
        entry = ModelEntry(
            source="champion",
            name="numbers",
            canary=Canary(**canary) if canary is not None else None,
            shadow=Shadow(**shadow) if shadow is not None else None,
        )
        await self.variants.configure(Config(models=(entry,)))
        await self.variants.settle()

    async def ask(self, *headers: str) -> ModelReference:
        answer = await self.bench.ask(infer([1, 2], *headers))
        check(answer, [1, 2])
        told = parse(answer.headers).model
        assert told is not None
        return told

    def reason(self, role: str = "canary") -> str:
        status = self.variants.status("numbers")
        seen = status.canary if role == "canary" else status.shadow
        assert seen is not None
        return seen.reason

    @property
    def champion(self) -> ServedVersion:
        return self.bench.catalog.resolve("numbers", None)

    async def become(self, version: str, model: type[NumberModel] = NumberModel) -> None:
        """Another champion."""
        self.offer("champion", version, model)
        offer = self.offers["champion"]
        assert isinstance(offer, Target)
        async with self.turn("numbers"):
            assert await self.bench.catalog.replace([offer.wanted]) == []


@contextlib.asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    async with oip_bench(models=False) as bench:
        await bench.serve(version="1")
        rig = Rig(bench)
        try:
            yield rig
        finally:
            rig.variants.close()


class Renamed(NumberModel):
    """Another signature: its input has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = (SignatureTensor("figure", INT64, (None, 1)),)


async def test_a_canary_answers_its_share_and_says_so() -> None:
    async with rig() as r:
        assert (await r.ask()).variant == "", "nothing is said of variants where there are none"
        r.offer("new", "2")
        await r.want({"source": "new", "percent": 0, "header": {"X-Variant": "canary"}})
        assert (await r.ask()).version == "1"
        assert (await r.ask()).variant == "champion"
        told = await r.ask("X-Variant: canary")
        assert (told.version, told.variant) == ("2", "canary")
        r.variants.share("numbers", {"canary": 100.0})
        assert (await r.ask()).version == "2"
        status = r.variants.status("numbers")
        assert status.canary is not None
        assert (status.champion, status.champion_requests, status.canary.requests) == ("1", 2, 2)
        assert (status.canary.percent, status.canary.configured_percent) == (100.0, 0.0)
        assert r.bench.catalog.ready(), "variants are nobody's readiness"


async def test_a_share_set_at_run_time_holds_until_the_configured_one_changes() -> None:
    async with rig() as r:
        r.offer("new", "2")
        await r.want({"source": "new", "percent": 0})
        r.variants.share("numbers", {"canary": 100.0})
        await r.want({"source": "new", "percent": 0, "sticky": "X-User"})
        assert (await r.ask()).version == "2", "the same share as before was configured"
        await r.want({"source": "new", "percent": 1})
        status = r.variants.status("numbers").canary
        assert status is not None
        assert status.percent == 1.0
        assert len(r.loads.models) == 1, "nothing was loaded again"


@pytest.mark.parametrize(
    ("percents", "told"),
    [({"shadow": 5.0}, "no shadow"), ({"canary": 101.0}, "from 0 to 100"), ({"canary": -1.0}, "from 0 to 100")],
)
async def test_shares_that_make_no_sense_change_nothing(percents: dict[Any, float], told: str) -> None:
    async with rig() as r:
        r.offer("new", "2")
        await r.want({"source": "new", "percent": 5})
        with pytest.raises(ConfigError, match=told):
            r.variants.share("numbers", percents)
        status = r.variants.status("numbers").canary
        assert status is not None
        assert status.percent == 5.0
        with pytest.raises(ConfigError, match="no canary"):
            r.variants.share("unknown", {"canary": 1.0})


async def test_a_source_that_cannot_be_asked_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    async with rig() as r:
        r.offers["new"] = SourceUnavailable("the registry does not answer")
        await r.want({"source": "new", "percent": 100})
        r.now += AGAIN_S
        await r.variants.settle()
        assert caplog.text.count("the registry does not answer") == 1, "told once"
        r.asked.clear()
        r.now += AGAIN_S
        await r.variants.settle()
        assert (await r.ask()).version == "1"
        assert r.reason() == "the registry does not answer"
        assert r.variants.status("numbers").canary is not None
        await r.variants.settle()
        assert r.asked == ["new"], "not before its time"
        r.offer("new", "2")
        r.now += AGAIN_S
        await r.variants.settle()
        assert (await r.ask()).version == "2"
        assert r.variants.status("numbers").canary.fallbacks == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("fails", [False, True])
async def test_what_serves_is_noted_once_it_does(fails: bool, caplog: pytest.LogCaptureFixture) -> None:
    async with rig() as r:
        noted: list[str] = []

        def confirm(reference: str, instead_of: str) -> None:
            assert (reference, instead_of) == ("", "")
            noted.append(r.bench.catalog.beside("numbers", "canary")[0].variant)
            if fails:
                raise OSError(28, "No space left on device")

        r.offer("new", "2")
        offer = r.offers["new"]
        assert isinstance(offer, Target)
        r.offers["new"] = replace(offer, wanted=replace(offer.wanted, confirm=confirm))
        await r.want({"source": "new", "percent": 100})
        assert noted == ["canary"]
        assert (await r.ask()).version == "2"
        assert ("could not be noted" in caplog.text) == fails


async def test_what_was_refused_is_not_tried_again_by_itself() -> None:
    async with rig() as r:
        r.offers["new"] = SourceError("it is no ONNX model")
        await r.want({"source": "new", "percent": 100})
        r.now += 1e6
        await r.variants.settle()
        assert r.asked == ["new"]
        r.offer("new", "2")
        await r.want({"source": "new", "percent": 100})  # SIGHUP
        assert (await r.ask()).version == "2"


async def test_a_version_that_does_not_fit_takes_no_part() -> None:
    async with rig() as r:
        r.offer("new", "2", Renamed)
        await r.want({"source": "new", "percent": 100})
        assert (await r.ask()).version == "1"
        assert "it has no input 'number', which clients send" in r.reason()
        await r.bench.catalog.freed("numbers")
        assert r.loads.freed == r.loads.models


async def test_what_does_not_fit_is_loaded_once_however_often_its_source_is_asked() -> None:
    async with rig() as r:
        r.offer("new", "2", Renamed, mutable=True)
        await r.want({"source": "new", "percent": 100})
        for _ in range(3):
            r.now += 1e6
            await r.variants.settle()
        assert r.asked == ["new"] * 4
        assert len(r.loads.models) == 1


async def test_a_former_champion_has_neither_split_nor_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Mirror] = []
    close = Mirror.close

    def noted(mirror: Mirror) -> None:
        closed.append(mirror)
        close(mirror)

    monkeypatch.setattr(Mirror, "close", noted)
    async with rig() as r:
        r.offer("new", "2")
        r.offer("other", "5")
        await r.want({"source": "new", "percent": 50}, {"source": "other"})
        first, mirror = r.champion, r.champion.mirror
        assert mirror is not None
        await r.become("3")
        assert (first.split, first.mirror, first.variant) == (None, None, "")
        assert closed == [mirror]
        second = r.champion.mirror
        assert second is not None
        await r.want({"source": "new", "percent": 50})
        assert second in closed, "what it has copied is given up"


async def test_the_champion_s_own_version_is_not_loaded_twice() -> None:
    async with rig() as r:
        r.offer("new", "1")
        await r.want({"source": "new", "percent": 100})
        assert (await r.ask()).variant == "champion"
        assert r.loads.models == []
        assert "version 1 is what the model's name means already" in r.reason()
        assert r.variants.status("numbers").canary.fallbacks == 0  # type: ignore[union-attr]


async def test_a_canary_whose_version_becomes_champion_makes_room_and_comes_back() -> None:
    async with rig() as r:
        r.offer("new", "2")
        await r.want({"source": "new", "percent": 100})
        await r.become("2")
        assert [(await r.ask()).variant for _ in range(3)] == ["champion"] * 3
        await r.bench.catalog.freed("numbers")
        assert r.loads.models[0] in r.loads.freed
        await r.become("1")
        await r.variants.settle()
        told = await r.ask()
        assert (told.version, told.variant) == ("2", "canary")


async def test_a_champion_that_a_canary_does_not_fit_any_more_loses_it() -> None:
    async with rig() as r:
        r.offer("new", "2")
        await r.want({"source": "new", "percent": 100})
        await r.become("3", Renamed)
        assert r.champion.split is not None
        assert r.champion.split.canary is None
        assert "cannot stand beside version 3" in r.reason()
        await r.bench.catalog.freed("numbers")
        assert r.loads.models[0] in r.loads.freed


async def test_a_shadow_is_mirrored_to_and_follows_the_champion() -> None:
    async with rig() as r:
        r.offer("other", "5")
        await r.want(shadow={"source": "other"})
        answer = await r.bench.ask(infer([1, 2]))
        check(answer, [1, 2])
        told = parse(answer.headers)
        assert told.shadow is not None
        assert (told.shadow.version, told.model.variant if told.model else "") == ("5", "champion")

        async def compared(n: int) -> None:
            while (
                (seen := r.variants.status("numbers").shadow) is None
                or seen.mirror is None
                or (seen.mirror.compared.agreed < n)
            ):
                await asyncio.sleep(0)

        await compared(1)
        first = r.champion.mirror
        assert (await r.bench.ask(infer([1], model="numbers/versions/5"))).status == 404, "it answers nobody"
        await r.become("2")
        assert r.champion.mirror is not first
        check(await r.bench.ask(infer([3])), [3])
        await compared(1)
        await r.want()
        assert r.champion.mirror is None
        assert (await r.ask()).variant == ""


async def test_what_is_not_wanted_any_more_leaves_without_a_trace() -> None:
    async with rig() as r:
        r.offer("new", "2")
        r.offer("other", "3")
        await r.want({"source": "new", "percent": 100}, {"source": "other"})
        assert (await r.ask()).version == "2"
        await r.want()
        assert (await r.ask()) == replace(await r.ask(), variant="")
        await r.bench.catalog.freed("numbers")
        assert len(r.loads.freed) == 2
        assert [version.version for version in r.bench.catalog.of("numbers")] == ["1"]
        with pytest.raises(ConfigError, match="neither"):
            r.variants.status("numbers")
        assert r.variants.statuses() == {}


async def test_another_source_takes_the_place_of_the_first() -> None:
    async with rig() as r:
        r.offer("new", "2")
        await r.want({"source": "new", "percent": 100})
        r.offer("newer", "3")
        await r.want({"source": "newer", "percent": 100})
        assert (await r.ask()).version == "3"
        await r.bench.catalog.freed("numbers")
        assert r.loads.freed == r.loads.models[:1]
        r.offers["broken"] = ConfigError("there is no such file")
        await r.want({"source": "broken", "percent": 100})
        assert (await r.ask()).version == "3", "what serves goes on until something better is there"


async def test_a_moving_reference_is_followed() -> None:
    async with rig() as r:
        r.offer("alias", "2", mutable=True)
        await r.want({"source": "alias", "percent": 100})
        following = asyncio.ensure_future(r.variants.follow())
        await asyncio.sleep(0)
        r.offer("alias", "3", mutable=True)
        r.now += 1000.0
        r.variants._wake.set()
        while r.bench.catalog.beside("numbers", "canary")[-1].version != "3":
            await asyncio.sleep(0)
        while (await r.ask()).version != "3":
            await asyncio.sleep(0)
        following.cancel()


async def test_variants_go_and_come_with_their_model() -> None:
    async with rig() as r:
        r.offer("new", "2")
        await r.want({"source": "new", "percent": 100})
        await r.bench.catalog.unload("numbers")
        assert len(r.loads.freed) == 1
        r.variants.elected("numbers")
        assert r.reason() in ("it was unloaded with the model", "the model does not serve", "unloaded")
        await r.variants.settle()
        await r.become("1")
        await r.variants.settle()
        assert (await r.ask()).version == "2"


async def test_a_canary_that_crashed_is_covered_by_the_champion_until_it_is_back() -> None:
    async with rig() as r:
        r.offer("new", "2")
        await r.want({"source": "new", "percent": 100})
        (canary,) = r.bench.catalog.beside("numbers", "canary")
        r.bench.catalog.failed("numbers", "2", "its worker process crashed 4 times in a minute", canary.loaded)
        assert canary.state is ModelState.FAILED
        assert (await r.ask()).version == "1"
        assert "crashed" in r.reason()
        r.bench.catalog.recovered("numbers", "2", canary.loaded)
        assert (await r.ask()).version == "2"


async def test_a_candidate_for_promotion_is_ready() -> None:
    async with rig() as r:
        with pytest.raises(ConfigError, match="has no canary"):
            r.variants.candidate("numbers")
        r.offers["new"] = SourceError("it is gone")
        await r.want({"source": "new", "percent": 100})
        with pytest.raises(ConfigError, match="it is gone"):
            r.variants.candidate("numbers")
        r.offer("new", "2")
        await r.want({"source": "new", "percent": 100})
        canary = r.variants.candidate("numbers")
        r.bench.catalog.failed("numbers", "2", "its workers crash", canary.loaded)
        with pytest.raises(ConfigError, match=r"cannot be promoted: .*its workers crash"):
            r.variants.candidate("numbers")
        r.bench.catalog.recovered("numbers", "2", canary.loaded)
        assert r.variants.candidate("numbers") is canary
        r.bench.catalog.flip("numbers", [canary], keep=False)
        told = await r.ask()
        assert (told.version, told.variant) == ("2", "champion")


async def test_metrics_name_every_variant() -> None:
    async with rig() as r:
        r.offer("new", "2")
        r.offer("other", "3")
        await r.want({"source": "new", "percent": 25}, {"source": "other", "percent": 50})
        check(await r.bench.ask(infer([1])), [1])
        lines = [line for family in variants_metrics.families(r.variants.statuses()) for line in family.lines]
        text = "".join(lines)
        assert 'gateway_variant_share{model="numbers",variant="canary"} 0.25' in text
        assert 'gateway_variant_ready{model="numbers",variant="shadow"} 1' in text
        assert 'gateway_variant_requests_total{model="numbers",variant="champion",version="1"}' in text
        assert 'gateway_shadow_dropped_total{model="numbers",reason="busy",version="3"}' in text
        assert list(variants_metrics.families({})) == []


async def test_what_could_not_be_fetched_is_tried_again() -> None:
    async with rig() as r:
        r.offer("new", "2")
        good = r.offers["new"]
        assert isinstance(good, Target)

        def unreachable() -> Any:
            raise SourceUnavailable("the registry went away")

        r.offers["new"] = replace(good, wanted=replace(good.wanted, read=unreachable))
        await r.want({"source": "new", "percent": 100})
        assert "went away" in r.reason()
        r.offers["new"] = good
        r.now = AGAIN_S
        await r.variants.settle()
        assert (await r.ask()).version == "2"


async def test_other_settings_of_a_variant_load_it_anew() -> None:
    async with rig() as r:
        r.offer("new", "2")
        await r.want({"source": "new", "percent": 100})
        first = r.variants.candidate("numbers")
        await r.want({"source": "new", "percent": 50})
        assert r.variants.candidate("numbers") is first
        await r.want({"source": "new", "percent": 50, "instances": 2})
        assert r.variants.candidate("numbers") is not first


async def test_a_version_that_clients_can_reach_is_listed_before_one_that_they_cannot() -> None:
    async with rig() as r:
        r.offer("s", "2")
        r.offer("c", "2")
        await r.want(None, {"source": "s"})
        await r.want({"source": "c"}, {"source": "s"})
        assert [v.role for v in r.bench.catalog.distinct()] == ["champion", "canary"]


class Trouble:
    """A pool that fails to load as often as it is told to."""

    def __init__(self, loads: Loads, error: Exception, times: int) -> None:
        self.loads, self.error, self.left, self.tried = loads, error, times, 0

    async def __call__(self, artifact: Artifact) -> NumberModel:
        self.tried += 1
        if self.left:
            self.left -= 1
            raise self.error
        return await self.loads(artifact)

    def stand_before(self, rig: Rig, source: str) -> None:
        offer = rig.offers[source]
        assert isinstance(offer, Target)
        rig.offers[source] = replace(offer, wanted=replace(offer.wanted, load=self))


@pytest.mark.parametrize("error", [NotReady("no worker came up"), RunTimedOut("it took too long")])
async def test_a_load_that_failed_for_the_moment_is_tried_again_after_pauses_that_grow(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig() as r:
        r.offer("new", "2")
        trouble = Trouble(r.loads, error, 9)
        trouble.stand_before(r, "new")
        await r.want({"source": "new", "percent": 100})
        pauses = [r.variants._models["numbers"].variants["canary"].due]
        while trouble.left:
            r.now += pauses[-1] - 0.1
            await r.variants.settle()
            assert trouble.tried == len(pauses), "not before its time"
            r.now += 0.1
            await r.variants.settle()
            pauses.append(r.variants._models["numbers"].variants["canary"].due - r.now)
        assert [round(pause) for pause in pauses] == [15, 30, 60, 120, 240, 480, 900, 900, 900]
        assert (AGAIN_S, MOST_PAUSE_S) == (15, 900)
        assert str(error) in r.reason()
        assert caplog.text.count("takes no part") == 1, "told once"
        assert (await r.ask()).version == "1"
        r.now += 900
        await r.variants.settle()
        assert (await r.ask()).version == "2"
        assert r.variants._models["numbers"].variants["canary"].failures == 0


async def test_files_that_were_refused_are_tried_again_once_they_look_different() -> None:
    async with rig() as r:
        r.looks = "as they were"
        r.offer("new", "2")
        trouble = Trouble(r.loads, ModelError("this file is broken"), 1)
        trouble.stand_before(r, "new")
        await r.want({"source": "new", "percent": 100})
        for _ in range(5):
            r.now += POLL_S
            await r.variants.settle()
        assert (trouble.tried, r.asked) == (1, ["new"]), "files are looked at, and neither read nor loaded"
        assert "this file is broken" in r.reason()
        r.looks = "others"  # perhaps the golden inputs: the model's own are the same
        r.now += POLL_S
        await r.variants.settle()
        assert trouble.tried == 2
        assert (await r.ask()).version == "2"


async def test_a_source_that_hangs_holds_up_nobody_else() -> None:
    async with rig() as r:
        hanging, find = asyncio.Event(), r.variants._find

        async def hangs(config: Config, name: str, entry: ModelEntry, keys: Any, role: Any) -> Target:
            if keys.source == "silent":
                await hanging.wait()
            return await find(config, name, entry, keys, role)

        r.variants._find = hangs
        r.offer("silent", "2")
        r.offer("prompt", "3")
        canary, shadow = Canary(source="silent", percent=100), Shadow(source="prompt")
        entry = ModelEntry(source="champion", name="numbers", canary=canary, shadow=shadow)
        await r.variants.configure(Config(models=(entry,)))
        settling = asyncio.ensure_future(r.variants.settle())
        following = asyncio.ensure_future(r.variants.follow())
        while not r.bench.catalog.beside("numbers", "shadow"):
            await asyncio.sleep(0)
        assert not r.bench.catalog.beside("numbers", "canary")
        r.offer("prompt", "4")
        await r.variants.configure(
            Config(models=(entry.model_copy(update={"shadow": Shadow(source="prompt", instances=2)}),))
        )
        while [version.version for version in r.bench.catalog.beside("numbers", "shadow")] != ["4"]:
            await asyncio.sleep(0)
        hanging.set()
        await settling
        assert (await r.ask()).version == "2"
        following.cancel()


async def test_no_more_than_a_few_sources_are_asked_at_once_and_none_after_the_end() -> None:
    async with rig() as r:
        assert r.variants._trying._value == AT_ONCE
        for _ in range(AT_ONCE):
            await r.variants._trying.acquire()
        r.offer("new", "2")
        entry = ModelEntry(source="champion", name="numbers", canary=Canary(source="new"))
        await r.variants.configure(Config(models=(entry,)))
        settling = asyncio.ensure_future(r.variants.settle())
        await asyncio.sleep(0)
        r.variants.close()
        await settling
        assert r.asked == []


async def test_what_did_not_fit_one_champion_is_tried_beside_the_next_with_the_same_files() -> None:
    async with rig() as r:
        r.looks = "always the same"
        r.offer("new", "2", Renamed)
        await r.want({"source": "new", "percent": 100})
        assert "cannot stand beside version 1" in r.reason()
        await r.become("3", Renamed)
        await r.variants.settle()
        assert [version.version for version in r.bench.catalog.beside("numbers", "canary")] == ["2"]
