"""Following a source and changing hands, with the real catalog and data port; the test plays the source and workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace

import pytest

from gateway.core.model import Artifact, ModelState
from gateway.core.release import Happened
from gateway.errors import ConfigError, GatewayError, LoadFailed, ModelError, NotFound, SourceUnavailable
from gateway.loading import WantedVersion
from gateway.releases import NothingToDo, Releases
from gateway.releases_model import check_fit
from gateway.releases_sources import Following, Meant
from tests.ingress.oip_bench import Bench, NumberModel, check, infer, oip_bench, replica_of

Load = Callable[[Artifact], Awaitable[NumberModel]]


class Source:
    """A registry: the test says what its reference means, and what a version's load comes to."""

    def __init__(self, first: WantedVersion) -> None:
        self._first = first
        self.version = "3"
        self.trouble: GatewayError | None = None
        self.loads: dict[str, Load] = {}
        self.reads: list[str] = []
        self.freed: list[str] = []
        self.confirmed: list[str] = []
        self.noted: list[tuple[str, str, str]] = []
        """Version, reference, and what it serves instead of."""
        self.broken_reads: dict[str, Exception] = {}

    def look(self) -> Meant:
        if self.trouble is not None:
            raise self.trouble
        version = self.version
        return Meant(
            f"models:/numbers/{version}", version, f"models:/numbers/{version}", lambda: [self.wanted(version)]
        )

    def wanted(self, version: str) -> WantedVersion:
        def confirm(reference: str, instead_of: str) -> None:
            self.confirmed.append(version)
            self.noted.append((version, reference, instead_of))

        def read() -> tuple[Artifact, bytes | None]:
            if version in self.broken_reads:
                raise self.broken_reads[version]
            self.reads.append(version)
            artifact, sidecar = self._first.read()
            return replace(artifact, version=version, digest=f"sha256:{version * 64}"), sidecar

        async def load(artifact: Artifact) -> NumberModel:
            model = await self.loads.get(version, healthy)(artifact)

            async def unload() -> None:
                self.freed.append(version)

            model.unload = unload  # type: ignore[method-assign]
            return model

        return replace(
            self._first,
            version=version,
            read=read,
            load=load,
            identity=f"models:/numbers/{version}",
            uri=f"models:/numbers/{version}",
            confirm=confirm,
        )


async def healthy(artifact: Artifact) -> NumberModel:
    return NumberModel()


async def other_input(artifact: Artifact) -> NumberModel:
    model = NumberModel()
    model.inputs = [replace(model.inputs[0], name="figure")]
    return model


@dataclass
class Case:
    bench: Bench
    source: Source
    releases: Releases
    told: list[Happened]

    def version(self) -> str:
        return self.bench.catalog.resolve("numbers", None).version

    def loaded(self) -> dict[str, str]:
        return {v.version: v.role for v in self.bench.catalog.of("numbers") if v.state is ModelState.READY}


@contextlib.asynccontextmanager
async def followed(
    keep: int = 1, interval_s: float = 3600.0, *, remembers: bool = True, instead_of: str = ""
) -> AsyncIterator[Case]:
    """`numbers` version 3 serves, from a source that is followed. `instead_of`: what an operator decided against."""
    async with oip_bench(models=False) as bench:
        await bench.serve()
        source = Source(bench.catalog.find("numbers", "1").wanted)
        found = Following(interval_s, keep, source, "models:/numbers@champion", remembers)
        releases = Releases(bench.catalog, lambda name: found, clock=lambda: 1000.0)
        told: list[Happened] = []
        releases.on_happened = lambda name, happened: told.append(happened)
        async with releases.turn("numbers"):
            assert await releases.replace([replace(source.wanted("3"), instead_of=instead_of)], "start") == []
        try:
            yield Case(bench, source, releases, told)
        finally:
            await releases.close()


async def moved(case: Case, version: str) -> None:
    case.source.version = version
    await case.releases.refresh("numbers", "poll")


async def test_a_new_meaning_is_loaded_beside_and_takes_the_name() -> None:
    async with followed() as case:
        case.source.version = "4"
        result = await case.releases.refresh("numbers", "poll")
        assert (result.outcome, result.version, result.digest) == ("swapped", "4", f"sha256:{'4' * 64}")
        assert case.loaded() == {"4": "champion", "3": "previous"}
        check(await case.bench.ask(infer([7])), [7])
        assert case.source.confirmed == ["3", "4"]
        assert [one.outcome for one in case.told] == ["loaded", "swapped"]


async def test_what_was_taken_is_answered_by_the_version_it_was_decoded_for() -> None:
    async with followed(keep=0) as case:
        old = case.bench.catalog.resolve("numbers", None)
        replica_of(old).held = []
        early = await case.bench.client()
        early.send(infer([1, 2]))
        while not old.scheduler.pending:  # type: ignore[union-attr]
            await asyncio.sleep(0)
        await moved(case, "4")
        late = await case.bench.ask(infer([7]))
        check(late, [7])
        assert late["Inference-Model"].startswith('"numbers";version="4"')
        assert case.source.freed == []
        replica_of(old).release()
        answer = await early.answer()
        check(answer, [1, 2])
        assert answer["Inference-Model"].startswith('"numbers";version="3"')
        await case.bench.catalog.freed("numbers")
        assert case.source.freed == ["3"]


async def test_a_kept_version_answers_who_names_it_and_nobody_else() -> None:
    async with followed() as case:
        await moved(case, "4")
        pinned = await case.bench.ask(infer([5], model="numbers/versions/3"))
        check(pinned, [5])
        assert pinned["Inference-Model"].startswith('"numbers";version="3"')
        assert case.bench.catalog.ready_versions("numbers") == ["3", "4"]
        await moved(case, "5")
        await case.bench.catalog.freed("numbers")
        assert case.source.freed == ["3"]
        with pytest.raises(NotFound):
            case.bench.catalog.resolve("numbers", "3")


async def test_what_an_operator_chose_is_noted_until_the_source_means_something_else() -> None:
    champion = "models:/numbers@champion"
    async with followed() as case:
        await moved(case, "4")
        await case.releases.rollback("numbers", "operator")
        await moved(case, "4")
        assert case.source.noted == [
            ("3", champion, ""),
            ("4", champion, ""),
            ("3", champion, "models:/numbers/4"),
        ]
        del case.source.noted[:]
        case.source.loads["5"] = other_input
        with pytest.raises(LoadFailed):
            await moved(case, "5")
        assert case.source.noted == [("3", champion, "")], "5 is refused, and 4 would be served if it were meant again"


async def test_what_cannot_be_remembered_is_not_noted_as_a_choice() -> None:
    async with followed(remembers=False) as case:
        await moved(case, "4")
        await case.releases.rollback("numbers", "operator")
        assert case.source.noted[-1] == ("3", "", "")
        assert [one.remembers for one in case.releases.statistics()] == [False]


async def test_what_was_chosen_before_a_restart_stays_until_the_source_means_something_else() -> None:
    async with followed(instead_of="models:/numbers/4") as case:
        assert case.source.noted == [("3", "models:/numbers@champion", "models:/numbers/4")]
        case.source.version = "4"
        assert (await case.releases.refresh("numbers", "poll")).outcome == "withheld"
        assert case.version() == "3"
        await moved(case, "5")
        assert case.version() == "5"
        assert case.source.noted[-1] == ("5", "models:/numbers@champion", "")
        await moved(case, "4")
        assert case.version() == "4"


async def test_a_rollback_is_instant_and_not_undone_by_the_source() -> None:
    async with followed() as case:
        await moved(case, "4")
        case.source.reads.clear()
        result = await case.releases.rollback("numbers", "operator")
        assert (result.outcome, case.version()) == ("rolled_back", "3")
        assert "version 3 serves now, version 4 before; models:/numbers@champion is not followed" in result.text
        assert "gateway models refresh numbers --force" in result.text
        assert case.releases.statistics()[0].withheld == "version 4 (models:/numbers/4)"
        assert (await case.releases.refresh("numbers", "poll")).outcome == "withheld"
        assert (case.version(), case.source.reads) == ("3", [])
        assert (await case.releases.refresh("numbers", "operator", insist=True)).outcome == "swapped"
        assert (case.version(), case.source.reads) == ("4", [])
        assert case.source.confirmed == ["3", "4", "3", "3", "4"], "nothing is withheld any more, then 4 serves"


async def test_without_a_former_version_there_is_nothing_to_go_back_to() -> None:
    async with followed(keep=0) as case:
        await moved(case, "4")
        with pytest.raises(NothingToDo, match="no former version"):
            await case.releases.rollback("numbers", "operator")
        assert case.version() == "4"


async def broken(artifact: Artifact) -> NumberModel:
    raise ModelError("this file is broken")


@pytest.mark.parametrize(
    ("load", "why"), [(broken, "this file is broken"), (other_input, "it has no input 'number', which clients send")]
)
async def test_a_refused_release_changes_nothing_is_told_once_and_not_tried_again(
    load: Load, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with followed() as case:
        case.source.loads["4"] = load
        case.source.version = "4"
        with caplog.at_level(logging.ERROR), pytest.raises(LoadFailed, match=why):
            await case.releases.refresh("numbers", "poll")
        assert (case.version(), case.loaded()) == ("3", {"3": "champion"})
        check(await case.bench.ask(infer([7])), [7])
        status = case.releases.status("numbers")
        assert status is not None
        assert why in status.refused
        for _ in range(3):
            with pytest.raises(LoadFailed, match="not tried again"):
                await case.releases.refresh("numbers", "poll")
        assert case.source.reads.count("4") == 1
        assert sum(why in record.getMessage() for record in caplog.records) == 1
        case.source.loads.clear()
        assert (await case.releases.refresh("numbers", "operator", insist=True)).outcome == "swapped"


async def test_the_wrong_digest_is_refused_and_both_are_named() -> None:
    async with followed() as case:
        wanted = case.source.wanted
        case.source.wanted = lambda version: replace(wanted(version), digest_pin="sha256:" + "0" * 64)  # type: ignore[method-assign]
        case.source.version = "4"
        with pytest.raises(LoadFailed, match=f"have digest sha256:{'4' * 64}, but .* sha256:{'0' * 64}"):
            await case.releases.refresh("numbers", "poll")
        assert case.version() == "3"


async def test_a_source_that_is_down_changes_nothing_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async with followed() as case:
        case.source.trouble = SourceUnavailable("connection refused")
        for _ in range(3):
            with caplog.at_level(logging.INFO), pytest.raises(SourceUnavailable):
                await case.releases.refresh("numbers", "poll")
        status = case.releases.status("numbers")
        assert status is not None
        assert status.trouble == "connection refused"
        case.source.trouble = None
        with caplog.at_level(logging.INFO):
            assert (await case.releases.refresh("numbers", "poll")).outcome == "serves"
        texts = [record.getMessage() for record in caplog.records]
        assert sum("cannot be asked" in text for text in texts) == 1
        assert sum("can be asked again" in text for text in texts) == 1


@pytest.mark.parametrize("error", [SourceUnavailable("the download broke off"), OSError(28, "No space left on device")])
async def test_what_broke_for_other_reasons_is_tried_again(error: Exception) -> None:
    async with followed() as case:
        case.source.broken_reads["4"] = error
        case.source.version = "4"
        with pytest.raises(LoadFailed):
            await case.releases.refresh("numbers", "poll")
        assert case.told[-1].outcome == "failed"
        assert case.version() == "3"
        case.source.broken_reads.clear()
        assert (await case.releases.refresh("numbers", "poll")).outcome == "swapped"


async def test_a_rollback_ends_a_trial_instead_of_waiting_for_it() -> None:
    async with followed() as case:
        await moved(case, "4")
        started, never = asyncio.Event(), asyncio.Event()

        async def slow(artifact: Artifact) -> NumberModel:
            started.set()
            await never.wait()
            return NumberModel()

        case.source.loads["5"] = slow
        case.source.version = "5"
        trying = asyncio.create_task(case.releases.refresh("numbers", "poll"))
        await started.wait()
        assert (await case.releases.rollback("numbers", "operator")).outcome == "rolled_back"
        with pytest.raises(NothingToDo, match="rolled back meanwhile"):
            await trying
        assert case.loaded() == {"3": "champion", "4": "previous"}
        assert [one.outcome for one in case.told[-2:]] == ["failed", "rolled_back"]


async def test_while_a_release_is_tried_clients_see_nothing_of_it() -> None:
    async with followed() as case:
        started, go = asyncio.Event(), asyncio.Event()

        async def slow(artifact: Artifact) -> NumberModel:
            started.set()
            await go.wait()
            return NumberModel()

        case.source.loads["4"] = slow
        case.source.version = "4"
        trying = asyncio.create_task(case.releases.refresh("numbers", "poll"))
        await started.wait()
        check(await case.bench.ask(infer([7])), [7])
        with pytest.raises(NotFound):
            case.bench.catalog.resolve("numbers", "4")
        assert case.bench.catalog.ready()
        go.set()
        assert (await trying).outcome == "swapped"


async def test_a_load_by_request_waits_for_its_turn_and_keeps_what_served() -> None:
    async with followed() as case:
        await moved(case, "4")
        async with case.releases.turn("numbers"):
            assert await case.releases.replace([case.source.wanted("6")], "request") == []
        assert case.loaded() == {"6": "champion", "4": "previous"}
        await case.releases.rollback("numbers", "operator")
        assert case.version() == "4"


async def test_what_somebody_sent_is_not_replaced_by_what_the_source_has() -> None:
    async with followed() as case:
        async with case.releases.turn("numbers"):
            assert await case.releases.replace([case.source.wanted("6")], "request", follow=False) == []
        assert not case.releases.follows("numbers")
        case.source.version = "4"
        with pytest.raises(NothingToDo, match="not followed"):
            await case.releases.refresh("numbers", "poll")
        await case.releases.refresh_all("SIGHUP")
        assert case.version() == "6"


async def test_a_release_that_is_lost_before_it_has_the_name_does_not_get_it() -> None:
    async with followed() as case:
        staged = await case.bench.catalog.stage([case.source.wanted("4")], "standby")
        case.bench.catalog.failed("numbers", "4", "its workers crash", staged[0].loaded)
        with pytest.raises(LoadFailed, match=r"version 4 was lost again: .*its workers crash"):
            check_fit(case.bench.catalog.champions("numbers"), staged)


async def test_loading_what_serves_again_does_not_keep_it_twice() -> None:
    async with followed() as case:
        await moved(case, "4")
        async with case.releases.turn("numbers"):
            assert await case.releases.replace([case.source.wanted("4")], "request") == []
        await case.bench.catalog.freed("numbers")
        assert case.loaded() == {"4": "champion", "3": "previous"}
        assert case.source.freed == ["4"]


async def test_an_unload_frees_everything_and_ends_the_following() -> None:
    async with followed() as case:
        await moved(case, "4")
        async with case.releases.turn("numbers"):
            await case.bench.catalog.unload("numbers")
            case.releases.unloaded("numbers", "request")
        assert sorted(case.source.freed) == ["3", "4"]
        assert case.releases.status("numbers") is None
        with pytest.raises(NothingToDo):
            await case.releases.refresh("numbers", "poll")


async def test_a_kept_release_that_lost_its_workers_is_not_brought_back() -> None:
    async with followed() as case:
        await moved(case, "4")
        case.bench.catalog.failed("numbers", "3", "its workers crash", None)
        with pytest.raises(LoadFailed, match="cannot answer"):
            await case.releases.rollback("numbers", "operator")
        assert case.version() == "4"


async def test_what_cannot_answer_is_not_promoted() -> None:
    async with followed() as case:
        (canary,) = await case.bench.catalog.stage([case.source.wanted("4")], "canary")
        case.bench.catalog.failed("numbers", "4", "its workers crash", canary.loaded)
        async with case.releases.turn("numbers"):
            with pytest.raises(NothingToDo, match="version 4 cannot answer"):
                await case.releases.promote("numbers", [canary], "operator")
        assert case.version() == "3"
        check(await case.bench.ask(infer([7])), [7])


async def test_what_was_not_well_when_it_was_displaced_is_not_kept() -> None:
    async with followed() as case:
        case.bench.catalog.failed("numbers", "3", "its workers crash", None)
        await moved(case, "4")
        await case.bench.catalog.freed("numbers")
        assert (case.loaded(), case.source.freed) == ({"4": "champion"}, ["3"])
        with pytest.raises(NothingToDo):
            await case.releases.rollback("numbers", "operator")


async def test_a_followed_source_is_asked_by_itself() -> None:
    async with followed(interval_s=0.01) as case:
        assert case.releases.follows("numbers")
        case.source.version = "4"
        while case.version() != "4":
            await asyncio.sleep(0.001)
        assert case.told[-1].by == "poll"


async def test_a_file_that_cannot_be_used_at_all_is_a_refusal() -> None:
    async with followed() as case:
        case.source.broken_reads["4"] = ConfigError("model.onnx is missing")
        case.source.version = "4"
        with pytest.raises(LoadFailed, match="is missing"):
            await case.releases.refresh("numbers", "poll")
        assert case.told[-1].outcome == "refused"
