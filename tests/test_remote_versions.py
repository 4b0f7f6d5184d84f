"""Which versions a model of remote servers has, who has which, and what is settled before loading."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.backends.remote_endpoint import RemoteModel
from gateway.config import Backend, Config, ModelEntry, ModelSettings
from gateway.core.batchability import SignatureTensor
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.tensor import DATATYPE
from gateway.errors import ConfigError
from gateway.remote_versions import ONLY, Offer, advice, asked_as, facts_of, signature_of, version_order, versions_of

FP32 = DATATYPE["FP32"]
X = SignatureTensor("x", FP32, (None, 4))
Y = SignatureTensor("y", FP32, (None, 2))
MODEL = RemoteModel("m", "", ("1",), "onnxruntime_onnx", (X,), (Y,))


def offer(*versions: str, pinned: str = "") -> Offer:
    return Offer(pinned, versions)


SILENT = Offer("", None)


@pytest.mark.parametrize(
    ("offers", "expected"),
    [
        ([], []),
        ([SILENT], []),
        ([offer()], [ONLY]),
        ([offer("2", "10", "1")], ["1", "2", "10"]),
        ([offer("1"), offer("2"), SILENT], ["1", "2"]),
        ([offer("1"), offer()], ["1"]),
        ([offer("1", "2"), offer("9", pinned="9")], ["1", "2"]),
        ([offer("9", pinned="9")], ["9"]),
        ([offer("v2", "v1")], ["v1", "v2"]),
    ],
)
def test_versions(offers: list[Offer], expected: list[str]) -> None:
    assert versions_of(offers) == expected


@pytest.mark.parametrize(
    ("one", "version", "asked"),
    [
        (offer("1", "2"), "2", "2"),
        (offer("1", "2"), "1", "1"),
        (offer("1"), "2", None),
        (offer(), "2", ""),
        (offer(), "1", None),
        (offer("7", pinned="7"), "2", "7"),
        (offer("7", pinned="7"), "1", None),
        (SILENT, "2", "2"),
        (SILENT, "1", None),
        (Offer("7", None), "2", "7"),
    ],
)
def test_who_has_a_version_where_2_is_the_newest(one: Offer, version: str, asked: str | None) -> None:
    assert asked_as(one, version, "2") == asked


NUMBERS = st.lists(st.sampled_from(["1", "2", "3", "10"]), max_size=3, unique=True).map(tuple)
OFFERS = st.builds(Offer, st.sampled_from(["", "", "5"]), st.none() | NUMBERS)


@given(st.lists(OFFERS, min_size=1, max_size=4))
def test_every_server_that_was_heard_of_has_one_of_the_versions_and_every_version_has_a_server(
    offers: list[Offer],
) -> None:
    versions = versions_of(offers)
    assert versions == sorted(versions, key=version_order)
    heard = [one for one in offers if one.versions is not None]
    assert bool(versions) == bool(heard)
    for one in heard:
        assert any(asked_as(one, version, versions[-1]) is not None for version in versions)
    for version in versions:
        assert any(asked_as(one, version, versions[-1]) is not None for one in heard)


def settings(**keys: object) -> ModelSettings:
    return Config().settings(ModelEntry.model_validate({"name": "m", **keys}))


def test_a_size_that_the_server_states_needs_no_proof() -> None:
    facts = facts_of(settings(), [replace(MODEL, max_batch_size=8), replace(MODEL, max_batch_size=4), MODEL])
    assert (facts.max_batch_size, facts.size_is_stated) == (4, True)
    assert facts.independent == "its server batches it too (max_batch_size 4)"
    assert facts.stated_inputs == (TensorSpec("x", FP32, (4,)),)
    assert (facts.apart, facts.untried, facts.platform) == ("", "", "onnxruntime_onnx")


def test_without_one_the_proof_decides_or_the_configuration() -> None:
    facts = facts_of(settings(), [MODEL])
    assert (facts.max_batch_size, facts.size_is_stated, facts.independent, facts.untried) == (None, False, "", "")
    assert facts.stated_inputs == ()
    on = facts_of(settings(batching="on", max_batch_size=16), [MODEL])
    assert (on.max_batch_size, on.independent) == (16, "batching is on")


def test_a_server_that_does_not_batch_is_taken_at_its_word_unless_the_configuration_knows_better() -> None:
    whole = replace(MODEL, max_batch_size=0)
    facts = facts_of(settings(), [whole])
    assert (facts.max_batch_size, facts.independent) == (0, "")
    assert facts.stated_inputs == (TensorSpec("x", FP32, (-1, 4)),)
    forced = facts_of(settings(max_batch_size=8), [whole])
    assert (forced.max_batch_size, forced.stated_inputs) == (8, ())


def test_more_rows_than_a_server_takes_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_batch_size is 16, but the model's server takes at most 8 rows"):
        facts_of(settings(max_batch_size=16), [replace(MODEL, max_batch_size=8)])


def test_what_keeps_state_or_may_not_run_twice_is_not_tried() -> None:
    sequence = facts_of(settings(), [replace(MODEL, sequence=True, max_batch_size=8)])
    assert (sequence.independent, sequence.untried) == ("", "the model keeps state")
    assert "each request runs alone" in sequence.apart
    once = facts_of(settings(idempotent=False), [MODEL])
    assert once.untried == "idempotent is false, so it is not run on made-up input"


def test_metadata_without_tensors_are_refused() -> None:
    with pytest.raises(ConfigError, match="names no outputs"):
        facts_of(settings(), [replace(MODEL, outputs=())])


@pytest.mark.parametrize(("size", "lead"), [(8, (None,)), (0, ())])
def test_the_signature_that_servers_must_show(size: int, lead: tuple[None, ...]) -> None:
    inputs = (TensorSpec("a", FP32, (-1, 3)), TensorSpec("b", FP32, (), optional=True))
    spec = ModelSpec("m", "1", "", "p", inputs, (TensorSpec("y", FP32, (2,)),), BatchPolicy(size))
    assert signature_of(spec) == (
        (SignatureTensor("a", FP32, (*lead, None, 3)), SignatureTensor("b", FP32, lead, optional=True)),
        (SignatureTensor("y", FP32, (*lead, 2)),),
    )


def test_a_second_queue_is_advised_against() -> None:
    assert advice(Backend(url="http://a"), MODEL) == ""
    text = advice(Backend(url="http://a"), replace(MODEL, max_queue_delay_us=500))
    assert text.startswith("backend http://a holds requests of model 'm' back for up to 500 µs")
