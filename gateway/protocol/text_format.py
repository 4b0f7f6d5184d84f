"""Protobuf text format → a plain tree: the syntax of `config.pbtxt`, with no schema and no protobuf library.

    field   = name [":"] (message | list of messages)  |  name ":" (scalar | list)   then an optional "," or ";"
    message = "{" field* "}"  |  "<" field* ">"
    list    = "[" [ value ("," value)* ] "]"
    scalar  = string+ | ["-"] number | word          (words are enum values, true, false, inf, nan)

Rules: sans-I/O; linear in the input (one compiled token pattern without overlapping alternatives); nesting
and size are bounded; everything keeps its line and column. Any text either parses or raises `TextFormatError`.
Not accepted: extension names (`[a.b]`), `Any` expansion, bytes that are not UTF-8 text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

MAX_CHARACTERS: Final = 1024 * 1024
MAX_DEPTH: Final = 32


class TextFormatError(ValueError):
    """Text that cannot be read. `line` and `column` are 1-based."""

    def __init__(self, line: int, column: int, message: str) -> None:
        super().__init__(f"{line}:{column}: {message}")
        self.line = line
        self.column = column
        self.message = message


@dataclass(frozen=True, slots=True)
class Word:
    """A bare word: an enum value, `true`, `false`, `inf` or `nan`."""

    text: str


class Based(int):
    """An integer in octal or hexadecimal digits; protobuf takes no such one where a float is wanted."""


@dataclass(slots=True)
class Message:
    """Fields in order of appearance; a repeated field has several values."""

    fields: dict[str, list[Value]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Value:
    """One value of a field and where it starts."""

    content: str | int | float | Word | Message
    line: int
    column: int


_TOKEN: Final = re.compile(
    r"""(?P<space>[ \t\r\n\f\v]+|\#[^\n]*)
      | (?P<word>[A-Za-z_][A-Za-z0-9_.]*)
      | (?P<number>\.?[0-9][A-Za-z0-9_.]*(?:(?<=[eE])[+-][A-Za-z0-9_]*)?)
      | (?P<string>"(?:[^"\\\n]|\\[^\n])*" | '(?:[^'\\\n]|\\[^\n])*')
      | (?P<mark>[{}<>\[\]:,;-])""",
    re.VERBOSE,
)
_ESCAPE: Final = re.compile(r"\\([0-7]{1,3}|[xX][0-9A-Fa-f]{1,2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)", re.DOTALL)
_PLAIN_ESCAPES: Final = {
    "a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92, "'": 39, '"': 34, "?": 63
}  # fmt: skip
_INTEGER: Final = re.compile(r"0|[1-9][0-9]{0,19}|0[xX][0-9A-Fa-f]{1,16}|0[0-7]{1,22}")
_FLOAT: Final = re.compile(r"(?:[0-9]{1,400}\.?[0-9]{0,400}|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,5})?[fF]?")
_CLOSING: Final = {"{": "}", "<": ">"}


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    line: int
    column: int

    def fault(self, message: str) -> TextFormatError:
        return TextFormatError(self.line, self.column, message)

    def __str__(self) -> str:
        return "the end of the file" if self.kind == "end" else f"'{self.text[:40]}'"


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    at, line, line_start = 0, 1, 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            wrong = text[at]
            hint = "this string is not closed on its line" if wrong in "\"'" else f"unexpected character {wrong!r}"
            raise TextFormatError(line, at - line_start + 1, hint)
        kind, piece = match.lastgroup or "", match[0]
        if kind != "space":
            tokens.append(_Token(kind, piece, line, at - line_start + 1))
        elif "\n" in piece:
            line += piece.count("\n")
            line_start = at + piece.rindex("\n") + 1
        at = match.end()
    tokens.append(_Token("end", "", line, at - line_start + 1))
    return tokens


def parse(text: str) -> Message:
    """Read a whole document.

    Raises:
        TextFormatError: with the place of the first thing that cannot be read.
    """
    if len(text) > MAX_CHARACTERS:
        raise TextFormatError(1, 1, f"the file is longer than {MAX_CHARACTERS} characters")
    reader = _Reader(_tokens(text))
    return reader.message(end=None, depth=0)


class _Reader:
    """Recursive descent over tokens; `at` is the next one."""

    def __init__(self, tokens: list[_Token]) -> None:
        self.tokens = tokens
        self.at = 0

    def take(self) -> _Token:
        token = self.tokens[self.at]
        if token.kind != "end":
            self.at += 1
        return token

    def take_if(self, *marks: str) -> _Token | None:
        token = self.tokens[self.at]
        return self.take() if token.kind == "mark" and token.text in marks else None

    def message(self, end: str | None, depth: int) -> Message:
        found = Message()
        while True:
            token = self.take()
            if token.kind == "end" if end is None else token.text == end and token.kind == "mark":
                return found
            if token.kind != "word" or "." in token.text:
                wanted = "a field name" if end is None else f"a field name or '{end}'"
                raise token.fault(f"expected {wanted}, found {token}")
            self.values(found.fields.setdefault(token.text, []), token, depth)
            self.take_if(",", ";")

    def values(self, into: list[Value], name: _Token, depth: int) -> None:
        """The right-hand side of one field; a list is the same as the field repeated."""
        colon = self.take_if(":")
        if self.take_if("[") is None:
            into.append(self.value(name, depth, needs_colon=colon is None))
            return
        if self.take_if("]"):
            return
        while True:
            into.append(self.value(name, depth, needs_colon=colon is None))
            if self.take_if("]"):
                return
            if not self.take_if(","):
                token = self.take()
                raise token.fault(f"expected ',' or ']' in the list of '{name.text}', found {token}")

    def value(self, before: _Token, depth: int, *, needs_colon: bool) -> Value:
        token = self.take()
        if token.kind == "mark" and token.text in _CLOSING:
            if depth >= MAX_DEPTH:
                raise token.fault(f"nested deeper than {MAX_DEPTH} levels")
            return Value(self.message(_CLOSING[token.text], depth + 1), token.line, token.column)
        if needs_colon:
            raise token.fault(f"expected ':' or '{{' after '{before.text}', found {token}")
        return Value(self.scalar(token), token.line, token.column)

    def scalar(self, token: _Token) -> str | int | float | Word:
        if token.kind == "string":
            return self.string(token)
        if token.kind == "word":
            return Word(token.text)
        if token.kind == "number":
            return _number(token)
        if token.text == "-" and token.kind == "mark":
            operand = self.take()
            if (operand.line, operand.column) != (token.line, token.column + 1):
                raise token.fault("a minus sign stands directly before its number")
            if operand.kind == "number":
                number = _number(operand)
                return Based(-number) if isinstance(number, Based) else -number
            if operand.text.lower() in ("inf", "infinity", "nan") and operand.kind == "word":
                return Word("-" + operand.text)
            raise operand.fault(f"expected a number after '-', found {operand}")
        raise token.fault(f"expected a value, found {token}")

    def string(self, first: _Token) -> str:
        """Adjacent literals are one string, as in C."""
        content = bytearray(_unescape(first))
        while self.tokens[self.at].kind == "string":
            content += _unescape(self.take())
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise first.fault("the escapes of this string do not form UTF-8 text") from None


def _number(token: _Token) -> int | float:
    text = token.text
    if _INTEGER.fullmatch(text):
        if text[:2] in ("0x", "0X"):
            return Based(text, 16)
        return Based(text, 8) if text[0] == "0" and len(text) > 1 else int(text)
    if _FLOAT.fullmatch(text) and not (text[0] == "0" and text[1:2].isdigit()):
        return float(text.rstrip("fF"))
    raise token.fault(f"{token} is not a number")


def _unescape(token: _Token) -> bytes:
    def replace(match: re.Match[str]) -> str:
        code = match[1]
        if code[0] in "01234567":
            value = int(code, 8)
        elif code[0] in "xX" and len(code) > 1:
            value = int(code[1:], 16)
        elif code[0] in "uU" and len(code) > 1:
            point = int(code[1:], 16)
            if point > 0x10FFFF or 0xD800 <= point <= 0xDFFF:
                raise token.fault(f"\\{code} is not a character")
            return chr(point).encode().decode("latin-1")
        else:
            value = _PLAIN_ESCAPES.get(code, 256)
        if value > 255:
            raise token.fault(f"unknown escape \\{code[:1]} in a string; write \\\\ for a backslash")
        return chr(value)

    inner = token.text[1:-1]
    try:
        # Escapes denote bytes, plain characters denote themselves: both meet as bytes in a Latin-1 string.
        return _ESCAPE.sub(replace, inner.encode().decode("latin-1")).encode("latin-1")
    except UnicodeEncodeError:
        raise token.fault("a lone surrogate is not a character") from None
