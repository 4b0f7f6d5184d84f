"""The fuzz targets' short runs: what they know, what once broke them, and a few thousand changes to both.

Long, coverage-guided campaigns: README.md.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.target import SPECS, Finding, Target, outcome
from tests.fuzz.targets import TARGETS
from tests.live.test_hostile import rss_bytes
from tests.protocol.oip_samples import PATIENT

SHORT_RUNS = 1_500
LONG_RUNS = 20_000
GROWTH_BYTES = 20 * 1024 * 1024

each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


@each_target
def test_what_it_knows_and_what_once_broke_it(target: Target) -> None:
    inputs = [b"", *target.seeds, *target.found()]
    for data in inputs:
        target.run(data)
        target.run(data[: len(data) // 2])


def mutations(target: Target, rng: random.Random) -> Iterator[bytes]:
    known = [*target.seeds, *target.found()]
    words = [*target.words, b"\0", b"\xff", b"\x80" * 9]
    while True:
        changed = bytearray(rng.choice(known))
        for _ in range(rng.choice((1, 1, 2, 3, 6))):
            at = rng.randrange(len(changed) + 1)
            match rng.randrange(6):
                case 0:
                    changed[at : at + 1] = bytes([rng.randrange(256)])
                case 1:
                    del changed[at : at + rng.randrange(1, 9)]
                case 2:
                    changed[at:at] = rng.choice(words)
                case 3:
                    start = rng.randrange(len(changed) + 1)
                    changed[at:at] = changed[start : start + rng.randrange(40)]
                case 4:
                    other = rng.choice(known)
                    changed[at:] = other[rng.randrange(len(other) + 1) :]
                case _:
                    if at < len(changed):
                        changed[at] ^= 1 << rng.randrange(8)
        yield bytes(changed[: target.max_bytes])


def broken_by(target: Target, runs: int, seed: int) -> None:
    for count, data in enumerate(mutations(target, random.Random(seed)), 1):
        try:
            target.run(data)
        except BaseException as error:
            error.add_note(f"target {target.name}, input {data!r}")
            raise
        if count == runs:
            return


@each_target
def test_changed_inputs(target: Target) -> None:
    broken_by(target, SHORT_RUNS, 11)


@pytest.mark.slow
@each_target
def test_many_changed_inputs_leave_no_memory_behind(target: Target) -> None:
    broken_by(target, LONG_RUNS // 4, 1)
    before = rss_bytes(os.getpid())
    broken_by(target, LONG_RUNS, 2)
    assert rss_bytes(os.getpid()) - before < GROWTH_BYTES


@each_target
@settings(PATIENT, max_examples=60)
@given(data=st.data())
def test_inputs_made_of_its_words(target: Target, data: st.DataObject) -> None:
    part = st.sampled_from([*target.seeds, *target.words, b" "]) | st.binary(max_size=6)
    target.run(b"".join(data.draw(st.lists(part, max_size=6)))[: target.max_bytes])


# -- the oracle itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["json", "binary", "protobuf", "generate"])
def test_most_seeds_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the targets would compare one refusal with another."""
    accepted = {True: 0, False: 0}

    def counted(decode: object, spec: object) -> object:
        found = outcome(decode, spec)  # type: ignore[arg-type]
        accepted[found[0] != "refused"] += 1
        return found

    target = TARGETS[name]
    monkeypatch.setitem(target.run.__globals__, "outcome", counted)
    for seed in target.seeds:
        target.run(seed)
    assert accepted[True] > 2 * accepted[False]


def test_a_wrong_decoder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["protobuf"]
    seen = iter(range(10**9))
    monkeypatch.setitem(target.run.__globals__, "outcome", lambda decode, spec: (next(seen),))
    with pytest.raises(Finding, match="the two roads differ"):
        target.run(target.seeds[0])


def test_a_tensor_that_is_no_tensor_is_found() -> None:
    spec = SPECS[0]
    target = TARGETS["json"]
    decoder = target.run.__globals__["_DECODERS"][0]
    request = decoder.decode(target.seeds[0][1:])
    request.nbytes += 1
    with pytest.raises(Finding, match="nbytes"):
        outcome(lambda: request, spec)
