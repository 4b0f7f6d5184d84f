"""What may serve, what is kept and what is not tried again, for every order of events."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.core.release import (
    HISTORY,
    TRANSITIONS,
    ModelReleases,
    Prepare,
    Release,
    ReleaseEvent,
    ReleaseState,
    Restore,
    Stay,
)


def serving(identity: str = "id-3", version: str = "3", keep: int = 1) -> ModelReleases:
    """Version 3 was loaded at start."""
    track = ModelReleases(keep)
    assert (
        track.installed(Release(identity, version, f"models:/m/{version}", 1.0, f"sha-{version}"), "start", 1.0) == ()
    )
    return track


def means(track: ModelReleases, version: str, *, insist: bool = False) -> Any:
    return track.noticed(f"id-{version}", version, f"models:/m/{version}", 2.0, insist=insist)


def tried(track: ModelReleases, version: str) -> Release:
    """The source means a version, and it passes."""
    decision = means(track, version)
    assert isinstance(decision, Prepare)
    for event in (ReleaseEvent.VERIFIED, ReleaseEvent.LOADED, ReleaseEvent.CHECKED):
        track.tried(event, 3.0, digest=f"sha-{version}")
    return decision.release


def swapped(track: ModelReleases, version: str) -> tuple[Release, ...]:
    return track.swapped(tried(track, version), "poll", 4.0)


def test_the_same_again_is_nothing_to_do() -> None:
    track = serving()
    assert means(track, "3") == Stay("serves", "version 3 serves, and the source means no other")
    assert track.trial is None


def test_a_new_version_is_tried_and_then_serves_and_the_former_one_is_kept() -> None:
    track = serving()
    assert swapped(track, "4") == ()
    assert (track.live.version, [one.version for one in track.previous]) == ("4", ["3"])  # type: ignore[union-attr]
    assert track.live.state is ReleaseState.LIVE  # type: ignore[union-attr]
    happened = track.history[-1]
    assert (happened.outcome, happened.by, happened.from_version, happened.to_version) == ("swapped", "poll", "3", "4")
    assert (happened.from_digest, happened.to_digest, happened.took_s) == ("sha-3", "sha-4", 2.0)


def test_only_as_many_as_wanted_are_kept() -> None:
    track = serving()
    swapped(track, "4")
    (dropped,) = swapped(track, "5")
    assert (dropped.version, dropped.state) == ("3", ReleaseState.GONE)
    none = serving(keep=0)
    (dropped,) = swapped(none, "4")
    assert (dropped.version, none.previous, none.back()) == ("3", (), None)


@pytest.mark.parametrize("steps", range(4))
def test_nothing_serves_that_was_not_checked(steps: int) -> None:
    track = serving()
    decision = means(track, "4")
    for event in (ReleaseEvent.VERIFIED, ReleaseEvent.LOADED, ReleaseEvent.CHECKED)[:steps]:
        track.tried(event, 3.0)
    if steps == 3:
        track.swapped(decision.release, "poll", 4.0)
        assert track.live is decision.release
        return
    with pytest.raises(KeyError):
        track.swapped(decision.release, "poll", 4.0)
    assert track.live.version == "3"  # type: ignore[union-attr]


def test_what_was_refused_is_not_tried_again_until_the_source_moves_or_somebody_insists() -> None:
    track = serving()
    means(track, "4")
    happened = track.refused("its digest is another", "poll", 3.0)
    assert (happened.outcome, happened.why, happened.from_version) == ("refused", "its digest is another", "3")
    assert means(track, "4") == Stay("refused", "its digest is another")
    assert isinstance(means(track, "4", insist=True), Prepare)
    track.refused("still", "operator", 3.0)
    means(track, "3")
    assert track.refusal is None
    assert isinstance(means(track, "4"), Prepare)


def test_what_was_refused_is_tried_again_once_it_is_forgiven() -> None:
    track = serving()
    means(track, "4")
    track.refused("its golden inputs are answered otherwise", "poll", 3.0)
    track.forgive()
    assert isinstance(means(track, "4"), Prepare)


def test_what_could_not_be_tried_is_tried_again() -> None:
    track = serving()
    means(track, "4")
    assert track.abandoned("the disk is full", "poll", 3.0).outcome == "failed"
    assert (track.trial, track.refusal) == (None, None)
    assert isinstance(means(track, "4"), Prepare)


def test_a_rollback_is_not_undone_by_the_source_that_stays_where_it_was() -> None:
    track = serving()
    swapped(track, "4")
    back = track.back()
    assert back is not None
    track.swapped(back.release, "operator", 5.0, "rolled_back")
    assert track.live.version == "3"  # type: ignore[union-attr]
    decision = means(track, "4")
    assert isinstance(decision, Stay)
    assert decision.why == "withheld"
    assert isinstance(means(track, "5"), Prepare)


def test_a_rollback_goes_back_one_release_and_not_to_the_oldest() -> None:
    track = serving(keep=2)
    swapped(track, "4")
    swapped(track, "5")
    back = track.back()
    assert back is not None
    assert back.release.version == "4"


def test_a_swap_that_the_source_asked_for_withholds_nothing() -> None:
    track = serving()
    track.meant = "id-3"
    release = tried(track, "4")
    track.meant = "id-3"  # it was moved back while version 4 was on trial
    track.swapped(release, "poll", 4.0)
    assert track.withheld == ""
    assert isinstance(means(track, "3"), Restore)


def test_after_a_rollback_a_source_that_moved_away_and_back_is_followed() -> None:
    track = serving()
    swapped(track, "4")
    track.swapped(track.back().release, "operator", 5.0, "rolled_back")  # type: ignore[union-attr]
    assert isinstance(means(track, "3"), Stay)
    assert isinstance(means(track, "4"), Restore)


def test_whoever_insists_gets_what_was_rolled_back_from() -> None:
    track = serving()
    swapped(track, "4")
    track.swapped(track.back().release, "operator", 5.0, "rolled_back")  # type: ignore[union-attr]
    decision = means(track, "4", insist=True)
    assert isinstance(decision, Restore)
    track.swapped(decision.release, "operator", 6.0)
    assert (track.live.version, track.withheld) == ("4", "")  # type: ignore[union-attr]


def test_going_back_to_what_the_source_means_withholds_nothing() -> None:
    track = serving()
    swapped(track, "4")
    for _ in range(2):
        track.swapped(track.back().release, "operator", 5.0, "rolled_back")  # type: ignore[union-attr]
    assert (track.live.version, track.withheld) == ("4", "")  # type: ignore[union-attr]
    assert isinstance(means(track, "3"), Restore)


def test_what_was_on_its_way_when_somebody_went_back_does_not_come_by_itself() -> None:
    track = serving()
    swapped(track, "4")
    tried(track, "5")
    track.abandoned("given up", "operator", 5.0)
    back = track.back()
    assert back is not None
    track.swapped(back.release, "operator", 5.0, "rolled_back")
    decision = means(track, "5")
    assert isinstance(decision, Stay)
    assert decision.why == "withheld"
    assert isinstance(means(track, "6"), Prepare)


def test_what_was_promoted_is_not_kept_twice() -> None:
    track = serving(keep=2)
    swapped(track, "4")
    again = Release("id-3", "3", "", 5.0)
    for event in (ReleaseEvent.VERIFIED, ReleaseEvent.LOADED, ReleaseEvent.CHECKED):
        again.go(event, 5.0)
    (dropped,) = track.swapped(again, "operator", 5.0, "promoted")
    assert dropped.identity == "id-3"
    assert [one.version for one in track.previous] == ["4"]


def test_a_source_that_means_the_kept_release_again_gets_it_without_a_load() -> None:
    track = serving()
    swapped(track, "4")
    kept = track.previous[0]
    assert means(track, "3") == Restore(kept)


def test_loading_the_same_again_does_not_keep_it_twice() -> None:
    track = serving()
    swapped(track, "4")
    live = track.live
    dropped = track.installed(Release("id-4", "4", "", 5.0), "request", 5.0)
    assert dropped == (live,)
    assert [one.version for one in track.previous] == ["3"]


def test_after_an_unload_nothing_is_left_but_the_history() -> None:
    track = serving()
    swapped(track, "4")
    means(track, "5")
    track.unloaded("request", 9.0)
    assert (track.live, track.trial, track.previous) == (None, None, ())
    assert [one.outcome for one in track.history] == ["loaded", "swapped", "unloaded"]


def test_every_state_ends() -> None:
    reached = {ReleaseState.NOTICED} | set(TRANSITIONS.values())
    assert reached == set(ReleaseState)
    ends = {state for state in ReleaseState if not any(state is start for start, _ in TRANSITIONS)}
    assert ends == {ReleaseState.REFUSED, ReleaseState.GONE}


class Life(RuleBasedStateMachine):
    """Any order of what sources, clients and operators do."""

    def __init__(self) -> None:
        super().__init__()
        self.track = ModelReleases(1)
        self.numbers = itertools.count()
        self.refused: set[str] = set()
        self.withheld = ""
        self.now = 0.0

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    @rule(keep=st.integers(0, 3), identity=st.sampled_from("abcd"))
    def installed(self, keep: int, identity: str) -> None:
        if self.track.trial is None:
            self.track.keep = keep
            self.track.installed(Release(identity, "1", "", self.tick()), "request", self.now)
            self.refused.clear()
            self.withheld = ""

    @precondition(lambda self: self.track.live is not None and self.track.trial is None)
    @rule(identity=st.sampled_from("abcd"), insist=st.booleans())
    def asked(self, identity: str, insist: bool) -> None:
        live = self.track.live
        decision = self.track.noticed(identity, "1", "", self.tick(), insist=insist)
        if insist or identity not in self.refused:
            self.refused.clear()
        if insist or self.withheld != identity:
            self.withheld = ""
        match decision:
            case Stay("serves"):
                assert live is not None
                assert live.identity == identity
            case Stay("refused"):
                assert identity in self.refused
            case Stay():
                assert identity == self.withheld
            case Restore(release):
                assert release in self.track.previous
                assert release.identity == identity
                self.track.swapped(release, "poll", self.tick())
            case Prepare():
                assert identity not in self.refused | {self.withheld}

    @precondition(lambda self: self.track.trial is not None)
    @rule(steps=st.integers(0, 3), ends=st.sampled_from(["refused", "abandoned", "swapped", "under way"]))
    def tried(self, steps: int, ends: str) -> None:
        trial = self.track.trial
        assert trial is not None
        order = [ReleaseState.NOTICED, ReleaseState.VERIFIED, ReleaseState.LOADED, ReleaseState.CHECKED]
        events = [ReleaseEvent.VERIFIED, ReleaseEvent.LOADED, ReleaseEvent.CHECKED]
        for event in events[order.index(trial.state) :][:steps]:
            self.track.tried(event, self.tick())
        if ends == "refused":
            self.track.refused("no", "poll", self.tick())
            self.refused = {trial.identity}
        elif ends == "abandoned":
            self.track.abandoned("later", "poll", self.tick())
        elif ends == "swapped" and trial.state is ReleaseState.CHECKED:
            self.track.swapped(trial, "poll", self.tick())
            self.withheld = ""

    @precondition(lambda self: self.track.previous and self.track.trial is None)
    @rule()
    def rolled_back(self) -> None:
        before, back = self.track.live, self.track.back()
        assert before is not None
        assert back is not None
        self.track.swapped(back.release, "operator", self.tick(), "rolled_back")
        self.withheld = self.track.meant if back.release.identity != self.track.meant else ""

    @precondition(lambda self: self.track.live is not None and self.track.trial is None)
    @rule(identity=st.sampled_from("abcd"))
    def promoted(self, identity: str) -> None:
        release = Release(identity, "1", "", self.tick())
        for event in (ReleaseEvent.VERIFIED, ReleaseEvent.LOADED, ReleaseEvent.CHECKED):
            release.go(event, self.now)
        self.track.swapped(release, "operator", self.tick(), "promoted")
        self.withheld = self.track.meant if identity != self.track.meant else ""

    @precondition(lambda self: self.track.previous)
    @rule()
    def lost(self) -> None:
        self.track.lost(self.track.previous[-1], self.tick())

    @rule()
    def unloaded(self) -> None:
        self.track.unloaded("request", self.tick())

    @invariant()
    def what_serves_and_what_is_kept_is_loaded_once(self) -> None:
        track = self.track
        here = [one for one in (track.live, *track.previous) if one is not None]
        assert len({one.identity for one in here}) == len(here)
        assert track.live is None or track.live.state is ReleaseState.LIVE
        assert all(one.state is ReleaseState.PREVIOUS for one in track.previous)
        assert len(track.previous) <= track.keep
        assert len(track.history) <= HISTORY


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
