from __future__ import annotations

import contextlib
import string
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.provenance.headers import (
    HeaderError,
    Member,
    ModelReference,
    Provenance,
    backend_header,
    batch_template,
    finish,
    model_header,
    parse,
    quote,
    request_id_header,
    shadow_header,
    split_headers,
    uuid7_block,
)

DIGEST = "sha256:" + "ab" * 32
UUID = b"01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e77"

NAMES = st.text(st.characters(codec="utf-8"), max_size=40)
COUNTS = st.integers(0, 10**6)
MILLISECONDS = st.floats(0, 10**6, allow_nan=False)
MEMBERS = st.builds(Member, NAMES, COUNTS, NAMES, COUNTS, COUNTS)


def pairs(block: bytes) -> list[tuple[str, str]]:
    """Header lines as a client sees them; insists on CR LF at every end and nowhere else."""
    assert block.endswith(b"\r\n")
    lines = block.decode("ascii").removesuffix("\r\n").split("\r\n")
    assert not any(set(line) & {"\r", "\n", "\0"} for line in lines)
    return [(name, value) for name, _, value in (line.partition(": ") for line in lines)]


def test_the_block_is_exactly_what_the_contract_shows() -> None:
    template = batch_template(model_header("digits", "3", DIGEST), "onnx-1", 1, "a1f3-000042", size=32, infer_ms=1.43)
    assert finish(template, 17, 0.81, 2.4, UUID) == (
        b'Inference-Model: "digits";version="3";digest="' + DIGEST.encode() + b'"\r\n'
        b'Inference-Backend: "onnx-1";attempt=1\r\n'
        b'Inference-Batch: "a1f3-000042";size=32;row=17\r\n'
        b"Server-Timing: queue;dur=0.81, infer;dur=1.43, total;dur=2.40\r\n"
        b"X-Request-Id: 01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e77\r\n"
    )


def test_where_no_digest_is_known_none_is_named() -> None:
    template = batch_template(model_header("digits", "3", ""), "triton-a:8000", 1, "a1f3-000042", 32, 1.43)
    (name, value), *_ = pairs(finish(template, 17, 0.81, 2.4, UUID))
    assert (name, value) == ("Inference-Model", '"digits";version="3"')
    assert parse([(name, value)]).model == ModelReference("digits", "3", "")


def test_a_split_request_lists_its_members_in_order() -> None:
    members = [Member("onnx-1", 1, "a1f3-000007", 64, 0), Member("onnx-2", 2, "a1f3-000008", 36, 12)]
    block = split_headers(
        model_header("digits", "3", DIGEST),
        members,
        queue_ms=0.5,
        infer_ms=3.0,
        total_ms=4.25,
        request_id=UUID,
    )
    lines = dict(pairs(block))
    assert lines["Inference-Backend"] == '"onnx-1";attempt=1, "onnx-2";attempt=2'
    assert lines["Inference-Batch"] == '"a1f3-000007";size=64;row=0, "a1f3-000008";size=36;row=12'
    assert parse(pairs(block)).members == tuple(members)


@given(NAMES, NAMES, MEMBERS, MILLISECONDS, MILLISECONDS, MILLISECONDS)
def test_whatever_the_names_the_headers_read_back(
    name: str, version: str, member: Member, queue_ms: float, infer_ms: float, total_ms: float
) -> None:
    template = batch_template(
        model_header(name, version, DIGEST),
        member.backend,
        member.attempt,
        member.batch_id,
        size=member.size,
        infer_ms=infer_ms,
    )
    read = parse(pairs(finish(template, member.row, queue_ms, total_ms, UUID)))
    assert read.request_id == UUID.decode()
    assert read.model == ModelReference(name, version, DIGEST)
    assert read.members == (member,)
    assert read.timings_ms == {
        "queue": float(f"{queue_ms:.2f}"),
        "infer": float(f"{infer_ms:.2f}"),
        "total": float(f"{total_ms:.2f}"),
    }


@given(st.lists(MEMBERS, min_size=1, max_size=5))
def test_split_headers_read_back(members: list[Member]) -> None:
    block = split_headers(model_header("m", "1", DIGEST), members, queue_ms=1, infer_ms=2, total_ms=3, request_id=UUID)
    assert parse(pairs(block)).members == tuple(members)


def test_quoting() -> None:
    assert quote('a"b\\c') == '"a\\"b\\\\c"'
    assert quote("café") == '%"caf%c3%a9"'
    assert quote("a\r\nb") == '%"a%0d%0ab"'
    assert quote('%"é') == '%"%25%22%c3%a9"'
    assert quote("") == '""'
    with pytest.raises(ValueError):
        quote("\ud800")


def test_a_percent_sign_in_a_name_is_not_a_format() -> None:
    template = batch_template(model_header("100%d", "%s", DIGEST), "%b", 1, "%%", size=1, infer_ms=0.0)
    read = parse(pairs(finish(template, 0, 0.0, 0.0, UUID)))
    assert read.model == ModelReference("100%d", "%s", DIGEST)
    assert (read.members[0].backend, read.members[0].batch_id) == ("%b", "%%")


def test_headers_of_an_error_may_be_few() -> None:
    assert parse(pairs(request_id_header(UUID))) == Provenance(UUID.decode(), None, (), {})
    assert parse([]) == Provenance(None, None, (), {})


def test_names_in_any_case_and_repeated_fields_are_joined() -> None:
    read = parse(
        [
            ("INFERENCE-BACKEND", '"a";attempt=1'),
            ("inference-backend", '"b";attempt=2'),
            ("Inference-Batch", '"x";size=1;row=0,\t"y" ;size=2;row=1'.replace('" ;', '";')),
        ]
    )
    assert [(m.backend, m.batch_id) for m in read.members] == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Inference-Model", '"digits'),
        ("Inference-Model", '"digits";digest="sha256:0"'),
        ("Inference-Model", '"digits";version="3";digest=3'),
        ("Inference-Model", '"digits";version=3;digest="x"'),
        ("Inference-Model", '"a";version="1";digest="x", "b";version="1";digest="x"'),
        ("Inference-Model", '"a\\x"'),
        ("Inference-Model", '%"a%zz"'),
        ("Inference-Model", '%"a%ff"'),
        ("Inference-Model", "3"),
        ("Inference-Batch", '"a-1";size=1;row=0'),
        ("Server-Timing", "queue;dur=fast"),
        ("Server-Timing", "queue;dur=1 infer;dur=2"),
        ("Server-Timing", "queue;dur=1,"),
        ("Server-Timing", "queue;dur"),
        ("Server-Timing", "queue;=1"),
        ("Server-Timing", "queue;dur=1.2.3"),
    ],
)
def test_malformed_headers_are_refused(name: str, value: str) -> None:
    with pytest.raises(HeaderError):
        parse([(name, value)])


@given(
    st.sampled_from(["Inference-Model", "Inference-Backend", "Inference-Batch", "Server-Timing"]),
    st.text(string.printable, max_size=60),
)
def test_hostile_headers_raise_nothing_else(name: str, value: str) -> None:
    with contextlib.suppress(HeaderError):
        parse([(name, value)])


@given(st.integers(0, 2**48 - 1), st.binary(min_size=10, max_size=10), st.integers(1, 600))
def test_request_ids_are_uuid7_unique_and_increasing(unix_ms: int, rand: bytes, n: int) -> None:
    ids = uuid7_block(unix_ms, rand, n)
    assert len(ids) == n
    assert ids == sorted(set(ids))
    for text in (ids[0], ids[-1]):
        read = uuid.UUID(text.decode("ascii"))
        assert str(read) == text.decode("ascii")
        assert (read.version, read.variant) == (7, uuid.RFC_4122)
        assert read.int >> 80 == unix_ms


@pytest.mark.parametrize("start", [0, 0xF0, 0xFFF0, 0x7FFF_FFFF_FFF0])
def test_ids_of_a_block_count_up_over_every_carry(start: int) -> None:
    ids = uuid7_block(1, bytes(4) + (start << 1).to_bytes(6, "big"), 600)
    assert [uuid.UUID(text.decode()).node for text in ids] == list(range(start, start + 600))
    assert len({text[:24] for text in ids}) == 1


@given(st.binary(min_size=10, max_size=10), st.integers(0, 2**48 - 2))
def test_ids_of_a_later_millisecond_are_greater(rand: bytes, unix_ms: int) -> None:
    assert uuid7_block(unix_ms, rand, 3)[-1] < uuid7_block(unix_ms + 1, bytes(10), 1)[0]


def test_ids_use_at_least_73_random_bits() -> None:
    plain = uuid.UUID(uuid7_block(0, bytes(10), 1)[0].decode()).int
    seen = 0
    for bit in range(80):
        rand = (1 << bit).to_bytes(10, "big")
        seen |= uuid.UUID(uuid7_block(0, rand, 1)[0].decode()).int ^ plain
    assert seen.bit_count() == 73


@pytest.mark.parametrize("length", [0, 9, 11])
def test_ids_need_exactly_ten_random_bytes(length: int) -> None:
    with pytest.raises(ValueError, match="10 random bytes"):
        uuid7_block(0, bytes(length), 1)


def test_an_error_names_who_failed_and_no_batch() -> None:
    line = backend_header("onnx-1", 3)
    assert line == b'Inference-Backend: "onnx-1";attempt=3\r\n'
    name, _, value = line.decode().rstrip().partition(": ")
    assert parse([(name, value)]).members == ()


def test_variant_and_shadow_are_read_back() -> None:
    model = model_header("digits", "4", "sha256:" + "0" * 64, "canary")
    assert model.endswith(b';variant="canary"\r\n')
    lines = (model + shadow_header('dig"its', "5", "")).decode().splitlines()
    told = parse([(name.lower(), value) for name, _, value in (line.partition(": ") for line in lines)])
    assert told.model is not None
    assert (told.model.version, told.model.variant) == ("4", "canary")
    assert told.shadow == ModelReference('dig"its', "5", "")


def test_without_variants_the_line_is_what_it_always_was() -> None:
    assert model_header("digits", "3", "") == b'Inference-Model: "digits";version="3"\r\n'
    told = parse([("Inference-Model", '"digits";version="3"')])
    assert told.model == ModelReference("digits", "3", "")
    assert told.shadow is None


@pytest.mark.parametrize(
    "value", ['"a";version="1";variant=3', '"a";variant="canary"', '"a";version="1", "b";version="2"']
)
@pytest.mark.parametrize("name", ["Inference-Model", "Inference-Shadow"])
def test_what_names_no_one_version_is_refused(name: str, value: str) -> None:
    with pytest.raises(HeaderError, match=name):
        parse([(name, value)])
