from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.model import TRANSITIONS, BatchPolicy, ModelEvent, ModelSpec, ModelState, next_state


def test_what_the_table_does_not_list_is_refused() -> None:
    for state, event in itertools.product(ModelState, ModelEvent):
        if (state, event) in TRANSITIONS:
            assert next_state(state, event) is TRANSITIONS[state, event]
        else:
            with pytest.raises(KeyError):
                next_state(state, event)


def test_only_loading_and_recovery_make_a_version_ready() -> None:
    into_ready = {key for key, state in TRANSITIONS.items() if state is ModelState.READY}
    assert into_ready == {(ModelState.LOADING, ModelEvent.LOADED), (ModelState.FAILED, ModelEvent.RECOVERED)}


@given(st.lists(st.sampled_from(ModelEvent), max_size=12))
def test_unavailable_is_the_end_and_a_ready_version_is_drained_first(events: list[ModelEvent]) -> None:
    path = [ModelState.LOADING]
    for event in events:
        if (path[-1], event) in TRANSITIONS:
            path.append(next_state(path[-1], event))
    assert ModelState.UNAVAILABLE not in path[:-1]
    for before, after in itertools.pairwise(path):
        assert (before, after) != (ModelState.READY, ModelState.UNAVAILABLE)


def test_every_state_can_be_left_except_the_last() -> None:
    leaves = {state for state, _ in TRANSITIONS}
    assert leaves == set(ModelState) - {ModelState.UNAVAILABLE}


@pytest.mark.parametrize(("size", "batched"), [(0, False), (1, True), (64, True)])
def test_a_model_batches_when_it_has_a_batch_size(size: int, batched: bool) -> None:
    spec = ModelSpec("m", "1", "sha256:0", "onnxruntime_onnx", (), (), BatchPolicy(size))
    assert spec.batched is batched
