"""Text format: the values it reads, the places of its faults, and that no text does anything else."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.text_format import MAX_CHARACTERS, MAX_DEPTH, Message, TextFormatError, Word, parse


def plain(message: Message) -> dict[str, list[Any]]:
    return {
        name: [plain(v.content) if isinstance(v.content, Message) else v.content for v in values]
        for name, values in message.fields.items()
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# only a comment", {}),
        ("a: 1 b: -2, c: 0x1F; d: 017", {"a": [1], "b": [-2], "c": [31], "d": [15]}),
        (
            "a: 1.5 b: -.5e1 c: 2f d: 1e+3 e: 1.",
            {"a": [1.5], "b": [-5.0], "c": [2.0], "d": [1000.0], "e": [1.0]},
        ),
        ("a: true b: KIND_CPU c: -inf", {"a": [Word("true")], "b": [Word("KIND_CPU")], "c": [Word("-inf")]}),
        ("a: 1 a: 2 a: [3, 4]", {"a": [1, 2, 3, 4]}),
        ("a: [] b []", {"a": [], "b": []}),
        ("a { b: 1 } a: { b: 2 } a < b: 3 > a: < b: 4 >", {"a": [{"b": [n]} for n in ([1, 2, 3, 4])]}),
        ("a [ { b: 1 }, { } ]", {"a": [{"b": [1]}, {}]}),
        ('a: \'x\' b: "y\\n\\"\\x41\\101\\u00e9" ', {"a": ["x"], "b": ['y\n"AAé']}),
        ('a: "one" "two"\n\'three\'', {"a": ["onetwothree"]}),
        ('a: "é \\303\\251"', {"a": ["é é"]}),
        ('a: "#no comment" # comment "\nb: 1', {"a": ["#no comment"], "b": [1]}),
        ("a{b{c{}}}", {"a": [{"b": [{"c": [{}]}]}]}),
    ],
)
def test_what_is_read(text: str, expected: dict[str, list[Any]]) -> None:
    assert plain(parse(text)) == expected


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("a 1", (1, 3), "expected ':' or '{' after 'a', found '1'"),
        ("a:", (1, 3), "expected a value, found the end of the file"),
        ("a {\n  b: 1", (2, 7), "expected a field name or '}', found the end of the file"),
        ("a { > ", (1, 5), "found '>'"),
        ("}", (1, 1), "expected a field name, found '}'"),
        ("a: [1 2]", (1, 7), "expected ',' or ']' in the list of 'a', found '2'"),
        ("a: [1,]", (1, 7), "expected a value"),
        ("a: [[1]]", (1, 5), "expected a value, found '['"),
        ("\n\n  a: 'x\n'", (3, 6), "this string is not closed on its line"),
        ("a: @", (1, 4), "unexpected character '@'"),
        ("a: 0x", (1, 4), "'0x' is not a number"),
        ("a: 1x", (1, 4), "'1x' is not a number"),
        ("a: --1", (1, 5), "expected a number after '-'"),
        ("a: - 1", (1, 4), "a minus sign stands directly before its number"),
        ("a: 09", (1, 4), "'09' is not a number"),
        ('a: "\\q"', (1, 4), "unknown escape \\q"),
        ('a: "\\777"', (1, 4), "unknown escape"),
        ('a: "\\xff"', (1, 4), "do not form UTF-8 text"),
        ('a: "\\ud800"', (1, 4), "not a character"),
        ('a: "\ud800"', (1, 4), "a lone surrogate is not a character"),
        ("a.b: 1", (1, 1), "expected a field name"),
        ("[a.b]: 1", (1, 1), "expected a field name"),
        ("a{" * (MAX_DEPTH + 1), (1, 2 * MAX_DEPTH + 2), f"nested deeper than {MAX_DEPTH} levels"),
    ],
)
def test_where_and_why_it_fails(text: str, place: tuple[int, int], message: str) -> None:
    with pytest.raises(TextFormatError) as caught:
        parse(text)
    assert (caught.value.line, caught.value.column) == place
    assert message in caught.value.message


def test_values_know_their_place() -> None:
    (value,) = parse("# x\n  a:\n     7").fields["a"]
    assert (value.line, value.column) == (3, 6)


def test_size_is_bounded() -> None:
    with pytest.raises(TextFormatError, match="longer than"):
        parse(" " * (MAX_CHARACTERS + 1))


@pytest.mark.parametrize("piece", ["a{", '"\\', "'", "a:1 ", "1", "#", "e-", "a:[", "-", ".", "\n", '""'])
def test_cost_grows_with_the_length_only(piece: str) -> None:
    """A pattern that backtracks would need hours here; the bound is generous on purpose."""
    text = piece * (200_000 // len(piece))
    began = time.process_time()
    for candidate in (text, "a: " + text, 'a: "' + text):
        with contextlib.suppress(TextFormatError):
            parse(candidate)
    assert time.process_time() - began < 60


PIECES = st.sampled_from(
    [
        "a",
        "b",
        ":",
        "{",
        "}",
        "[",
        "]",
        "<",
        ">",
        ",",
        ";",
        "-",
        "1",
        "0x",
        "1.5",
        '"',
        "'",
        "\\",
        "#",
        "\n",
        " ",
        "é",
    ]
)


@given(st.one_of(st.text(), st.lists(PIECES).map("".join)))
def test_any_text_parses_or_fails_with_a_place(text: str) -> None:
    outcome: Message | TextFormatError
    try:
        outcome = parse(text)
    except TextFormatError as error:
        outcome = error
    if isinstance(outcome, TextFormatError):
        assert 1 <= outcome.line <= text.count("\n") + 1
        assert outcome.column >= 1


@given(st.text())
def test_a_string_written_as_escapes_is_read_back(text: str) -> None:
    try:
        octets = text.encode()
    except UnicodeEncodeError:
        return
    escaped = "".join(f"\\{octet:03o}" for octet in octets)
    assert plain(parse(f'a: "{escaped}"')) == {"a": [text]}


@given(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_read_exactly(integer: int, number: float) -> None:
    assert plain(parse(f"a: {integer} b: {number!r}")) == {"a": [integer], "b": [number]}
