"""Nothing a client sends is worse than a 4xx, and it means the same on every road."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import GatewayError, InvalidRequest, Unsupported
from gateway.protocol.oip_json import LARGE_BYTES, RequestDecoder

from .oip_samples import (
    PATIENT,
    binary_body,
    decoded,
    model,
    of_x,
    packed,
    padded,
    request_body,
    tensor_spec,
)

VALID = request_body()
FUZZED = model([tensor_spec("X"), tensor_spec("B", "BYTES", optional=True), tensor_spec("I", "INT64", optional=True)])
SEEDS = [
    (VALID, None),
    (request_body(extra='"id":"a\\u00e9",', data="[[1,-0.5],[1e3]]"), None),
    (padded(request_body(data=str([[n * 0.5] for n in range(700)]), shape="[1,700]"), LARGE_BYTES + 500), None),
    (request_body(data="[NaN,-Infinity,-0]", extra='"parameters":{"timeout":5,"a":"b"},'), None),
    (VALID[:-1] + b',"outputs":[{"name":"Y","parameters":{"binary_data":true}}]}', None),
    binary_body(("X", "FP32", [1, 3], bytes(12)), ("B", "BYTES", [1, 2], packed([b"a", b""]))),
    binary_body(("I", "INT64", [1, 1], "[9007199254740993]"), ("X", "FP32", [1, 3], bytes(12)), extra='"id":"q",'),
    (bytes(12), 0),
]
TOKENS = [
    b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"-", b"-0", b"1e400", b"NaN", b"Infinity", b"null", b"true",
    b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\xef\xbb\xbf", b"\0", b"9" * 400, b"18446744073709551616",
    b"[" * 200, b"]" * 200, b".5",
    b'"inputs"', b'"data"', b'"shape"', b'"parameters"', b'{"triton_a":1}', b"-9223372036854775808", b"\\u0000", b" ",
]  # fmt: skip


def survives(decoder: RequestDecoder, body: bytes, length: int | None) -> None:
    """Either a request whose books balance, or an error the caller is to blame for."""
    refusal: GatewayError | None = None
    try:
        request = decoder.decode(body, length)
    except GatewayError as error:
        refusal = error
    if refusal is None:
        decoded(decoder.spec, request)
        if request.request_id is not None:
            request.request_id.encode()
    else:
        assert refusal.status < 500 or isinstance(refusal, Unsupported)
        assert len(str(refusal).encode()) < 10_000  # fit for the wire, and short


@settings(PATIENT, max_examples=500)
@given(st.binary(max_size=200), st.none() | st.integers(-5, 220))
def test_random_bytes(body: bytes, length: int | None) -> None:
    survives(RequestDecoder(FUZZED), body, length)


@settings(PATIENT, max_examples=500)
@given(
    st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5), st.sampled_from(TOKENS)), max_size=4)
)
def test_changed_requests(seed: tuple[bytes, int | None], edits: list[tuple[float, int, bytes]]) -> None:
    body, length = seed
    for where, cut, token in edits:
        at = int(where * len(body))
        body = body[:at] + token + body[at + cut :]
    decoder = RequestDecoder(FUZZED)
    survives(decoder, body, length)
    survives(decoder, body, None)


WORDS = ["inputs", "name", "shape", "datatype", "data", "parameters", "outputs", "id", "binary_data_size"]
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
DOCUMENT = st.recursive(
    LEAF | st.sampled_from(["X", "FP32", "BYTES"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
)


@settings(PATIENT, max_examples=300)
@given(DOCUMENT)
def test_any_json_with_the_protocols_words(document: Any) -> None:
    body = json.dumps(document).encode()
    decoder = RequestDecoder(FUZZED)
    for sent in (body, body + b" " * LARGE_BYTES):
        survives(decoder, sent, None)
    survives(decoder, b'{"inputs":[{"name":"X","shape":[1,1],"datatype":"FP32","data":[%b]}]}' % body, None)


def mutations(rng: random.Random) -> Any:
    decoders = [
        RequestDecoder(FUZZED),
        RequestDecoder(of_x()),
        RequestDecoder(of_x("BYTES")),
        RequestDecoder(of_x("INT64")),
    ]
    while True:
        body, length = rng.choice(SEEDS)
        changed = bytearray(body)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            at = rng.randrange(len(changed) + 1)
            kind = rng.randrange(5)
            if kind == 0 and at < len(changed):
                changed[at] = rng.randrange(256)
            elif kind == 1:
                del changed[at : at + rng.randrange(1, 9)]
            elif kind == 2:
                changed[at:at] = rng.choice(TOKENS)
            elif kind == 3:
                start = rng.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + rng.randrange(40)]
            else:
                del changed[at:]
        if length is not None and rng.random() < 0.3:
            length = max(-1, length + rng.randrange(-5, 6))
        yield rng.choice(decoders), bytes(changed), length


@pytest.mark.slow
def test_300000_mutations() -> None:
    for decoder, body, length in itertools.islice(mutations(random.Random(20)), 300_000):
        survives(decoder, body, length)


def test_2000_mutations() -> None:
    for decoder, body, length in itertools.islice(mutations(random.Random(7)), 2_000):
        survives(decoder, body, length)


@pytest.mark.slow
def test_100000_mutations_mean_the_same_on_every_road() -> None:
    """A mutated body that is still a request says the same small and large, plain and with an unknown key."""
    accepted = 0
    for decoder, body, _ in itertools.islice(mutations(random.Random(5)), 100_000):
        outcomes = []
        for sent in (body, body + b" " * LARGE_BYTES, b" " * LARGE_BYTES + body):
            try:
                outcomes.append(decoded(decoder.spec, decoder.decode(sent)))
                accepted += 1
            except InvalidRequest:
                outcomes.append({})
            except Unsupported:
                outcomes.append({"": ((), b"")})
        assert outcomes[0] == outcomes[1] == outcomes[2], body
    assert accepted > 1_000
