"""Compressed bodies: what is inflated, how much of it at most, and which answers are compressed."""

from __future__ import annotations

import contextlib
import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import InvalidRequest, TooLarge
from gateway.protocol.content_coding import DEFLATE, GZIP, Inflation, choose_coding, deflate

from .oip_samples import PATIENT

LIMIT = 1_000_000


def inflate(coding: bytes, body: bytes, limit: int = LIMIT, step: int = 4096) -> bytes:
    inflation = Inflation(coding, body, limit)
    while not inflation.step(step):
        pass
    return inflation.result


@PATIENT
@given(st.sampled_from([GZIP, DEFLATE]), st.binary(max_size=3000), st.integers(1, 4000), st.integers(0, 9))
def test_what_went_in_comes_out(coding: bytes, body: bytes, step: int, level: int) -> None:
    packed = deflate([body[:7], memoryview(body)[7:]], coding, level)
    assert inflate(coding, packed, step=step) == body
    assert (gzip.decompress(packed) if coding == GZIP else zlib.decompress(packed)) == body


@pytest.mark.parametrize("coding", [GZIP, DEFLATE])
@pytest.mark.parametrize("step", [1, 65_536, LIMIT * 3])
def test_exactly_the_limit_passes_and_one_byte_more_does_not(coding: bytes, step: int) -> None:
    size = 5000
    assert len(inflate(coding, deflate([bytes(size)], coding, 9), size, step)) == size
    with pytest.raises(TooLarge, match=r"maximum allowed input size of 5000 bytes.*max_body_bytes"):
        inflate(coding, deflate([bytes(size + 1)], coding, 9), size, step)


def test_a_bomb_is_only_inflated_to_the_limit() -> None:
    bomb = deflate([bytes(50_000_000)], GZIP, 9)
    inflation = Inflation(GZIP, bomb, LIMIT)
    for _ in range(LIMIT // 10_000):
        assert not inflation.step(10_000)
    with pytest.raises(TooLarge):
        inflation.step(10_000)
    assert len(inflation.result) == LIMIT + 1


def test_one_step_makes_no_more_than_it_was_told() -> None:
    inflation = Inflation(GZIP, deflate([bytes(500_000)], GZIP, 9), LIMIT)
    assert not inflation.step(1000)
    assert len(inflation.result) == 1000


RAW = zlib.compressobj(6, zlib.DEFLATED, -15)
RAW_DEFLATE = RAW.compress(b"hello hello hello") + RAW.flush()
WHOLE = gzip.compress(b"hello " * 100, mtime=0)


@pytest.mark.parametrize(
    ("coding", "body", "words"),
    [
        (DEFLATE, RAW_DEFLATE, "is not valid"),
        (GZIP, b"{}", "is not valid"),
        (GZIP, b"", "ends before"),
        (GZIP, WHOLE[:-1], "ends before"),
        (GZIP, WHOLE[:20], "ends before"),
        (GZIP, WHOLE[:-5] + b"\0" + WHOLE[-4:], "is not valid"),
        (GZIP, WHOLE + b"x", "goes on"),
        (GZIP, WHOLE + WHOLE, "goes on"),
        (GZIP, WHOLE + bytes(200_000), "goes on"),
    ],
)
def test_broken_streams(coding: bytes, body: bytes, words: str) -> None:
    for step in (1, 100, LIMIT):
        with pytest.raises(InvalidRequest, match=words) as caught:
            inflate(coding, body, step=step)
        assert "Content-Encoding" in str(caught.value)


def test_a_stream_says_itself_which_it_is() -> None:
    for coding, other in ((GZIP, DEFLATE), (DEFLATE, GZIP)):
        assert inflate(coding, deflate([b"hello"], other, 6)) == b"hello"


@PATIENT
@given(st.sampled_from([GZIP, DEFLATE]), st.binary(max_size=200), st.integers(0, 60), st.integers(0, 255))
def test_damage_is_noticed_or_harmless(coding: bytes, body: bytes, place: int, byte: int) -> None:
    packed = bytearray(deflate([body], coding, 6))
    packed[place % len(packed)] = byte
    with contextlib.suppress(InvalidRequest, TooLarge):
        assert inflate(coding, bytes(packed), limit=10_000) == body  # header fields without meaning may change


@pytest.mark.parametrize(
    ("accepted", "chosen"),
    [
        (b"gzip", GZIP),
        (b"deflate", DEFLATE),
        (b"gzip, deflate, br", GZIP),
        (b"deflate, gzip", DEFLATE),
        (b"gzip;q=0.5, deflate;q=0.8", DEFLATE),
        (b"gzip; q=0.5 ,deflate;q=0.5", GZIP),
        (b"br, gzip;q=0.1", GZIP),
        (b"GZIP", None),
        (b"gzip;q=0", None),
        (b"gzip;q=0.000, deflate;q=0.0", None),
        (b"gzip;q=0, deflate;q=0.001", DEFLATE),
        (b"br", None),
        (b"*", None),
        (b"identity", None),
        (b"identity, gzip;q=0.5", None),
        (b"identity;q=0.5, gzip", GZIP),
        (b"", None),
        (b"gzip;q=x", None),
        (b"gzip;level=1", None),
        (b"gzip;q=7", None),
        (b",,;,=", None),
        (b"x," * 100_000 + b"gzip", None),
    ],
)
def test_which_answers_are_compressed(accepted: bytes, chosen: bytes | None) -> None:
    assert choose_coding(accepted) == chosen
