"""Reading one message of text format against expectations: typed access to its fields, and its faults.

Rules: a reader asks for each field it knows, then calls `finish`, which reports every field nobody asked for.
A wrong value is noted as a fault and read as absent, so that all faults of a file are found in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping

from gateway.errors import Fault
from gateway.protocol.spelling import nearest, unknown_key
from gateway.protocol.text_format import Based, Message, Value, Word

_INT32 = 2**31 - 1


class Section:
    """One message while it is read: hands out its fields by name, then reports those nobody asked for."""

    def __init__(self, message: Message, where: str, line: int, faults: list[Fault], ignored: list[str]) -> None:
        self._fields = message.fields
        self._asked: set[str] = set()
        self._where = where
        self._faults = faults
        self._ignored = ignored
        self.line = line

    def path(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def fault(self, line: int, name: str, message: str) -> None:
        self._faults.append(Fault("", line, self.path(name), message))

    def has(self, name: str) -> bool:
        return name in self._fields

    def values(self, name: str) -> list[Value]:
        self._asked.add(name)
        return self._fields.get(name, [])

    def single(self, name: str) -> Value | None:
        values = self.values(name)
        if len(values) > 1:
            self.fault(values[1].line, name, "stands twice; keep one of them")
        return values[0] if values else None

    def check_integer(self, value: Value, name: str, low: int, high: int) -> int | None:
        content = value.content
        if isinstance(content, int) and not isinstance(content, bool) and low <= content <= high:
            return content
        self.fault(value.line, name, f"expected a whole number from {low} to {high}, found {_shown(content)}")
        return None

    def integer(self, name: str, low: int, high: int = _INT32) -> int | None:
        value = self.single(name)
        return None if value is None else self.check_integer(value, name, low, high)

    def integers(self, name: str, low: int, high: int) -> tuple[int, ...]:
        checked = [self.check_integer(value, name, low, high) for value in self.values(name)]
        return tuple(number for number in checked if number is not None)

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.single(name)
        return None if value is None else self._check_number(value, name, low, high)

    def numbers(self, name: str, low: float, high: float) -> tuple[float, ...]:
        checked = [self._check_number(value, name, low, high) for value in self.values(name)]
        return tuple(number for number in checked if number is not None)

    def _check_number(self, value: Value, name: str, low: float, high: float) -> float | None:
        content = value.content
        based = isinstance(content, Based)
        if isinstance(content, int | float) and not based and low <= content <= high:
            return float(content)
        wanted = f"a number from {low:g} to {high:g}{' in decimal digits' if based else ''}"
        self.fault(value.line, name, f"expected {wanted}, found {_shown(content)}")
        return None

    def text(self, name: str) -> str | None:
        value = self.single(name)
        return None if value is None else self._check_text(value, name)

    def texts(self, name: str) -> tuple[str, ...]:
        checked = [self._check_text(value, name) for value in self.values(name)]
        return tuple(text for text in checked if text is not None)

    def _check_text(self, value: Value, name: str) -> str | None:
        if isinstance(value.content, str):
            return value.content
        hint = f'expected text in quotes, for example {name}: "…", found {_shown(value.content)}'
        self.fault(value.line, name, hint)
        return None

    def flag(self, name: str) -> bool:
        value = self.single(name)
        return False if value is None else self._check_flag(value, name)

    def flags(self, name: str) -> tuple[bool, ...]:
        return tuple(self._check_flag(value, name) for value in self.values(name))

    def _check_flag(self, value: Value, name: str) -> bool:
        if isinstance(value.content, Word) and value.content.text in ("true", "false"):
            return value.content.text == "true"
        if value.content in (0, 1) and isinstance(value.content, int):
            return value.content == 1
        self.fault(value.line, name, f"expected true or false, found {_shown(value.content)}")
        return False

    def word(self, name: str, known: tuple[str, ...]) -> str | None:
        value = self.single(name)
        if value is None:
            return None
        content = value.content
        if isinstance(content, Word) and content.text in known:
            return content.text
        meant = nearest(content.text, [k.lower() for k in known]) if isinstance(content, Word) else None
        hint = f"did you mean {meant.upper()}?" if meant else f"write one of {', '.join(known)}"
        self.fault(value.line, name, f"{_shown(content)} is not known here; {hint}")
        return None

    def sections(self, name: str) -> list[Section]:
        found = []
        for index, value in enumerate(self.values(name)):
            where = f"{name}[{index}]"
            if isinstance(value.content, Message):
                found.append(Section(value.content, self.path(where), value.line, self._faults, self._ignored))
            else:
                self.fault(value.line, where, f"expected a block {{ … }}, found {_shown(value.content)}")
        return found

    def entries(self, name: str) -> list[tuple[str, Section]]:
        """A map of texts to texts or blocks: its keys, each with the entry it stands in; a repeated key is a fault."""
        found: list[tuple[str, Section]] = []
        seen: set[str] = set()
        for entry in self.sections(name):
            key = entry.text("key") or ""
            if key in seen:
                entry.fault(entry.line, "key", f"'{key[:64]}' stands twice; keep one of them")
            seen.add(key)
            found.append((key, entry))
        return found

    def section(self, name: str) -> Section | None:
        value = self.single(name)
        if value is None:
            return None
        if isinstance(value.content, Message):
            return Section(value.content, self.path(name), value.line, self._faults, self._ignored)
        self.fault(value.line, name, f"expected a block {{ … }}, found {_shown(value.content)}")
        return None

    def refuse_unless(self, name: str, neutral: tuple[object, ...], hint: str) -> None:
        """A key that may only stand with a value that changes nothing."""
        value = self.single(name)
        if value is None:
            return
        content = value.content.text if isinstance(value.content, Word) else value.content
        if content not in neutral:
            self.fault(value.line, name, hint)

    def ignore(self, *names: str) -> None:
        """Fields that have no effect here; those that stand are noted."""
        for name in names:
            if self.values(name):
                self._ignored.append(self.path(name))

    def note_ignored(self, path: str) -> None:
        """Something without effect here that is not a field, such as one entry of a map."""
        self._ignored.append(path)

    def finish(self, unsupported: Mapping[str, str] | None = None) -> None:
        """Report the keys not asked for: `unsupported` ones with the text given, others as unknown."""
        for name, values in self._fields.items():
            line = values[0].line if values else self.line
            if name in self._asked:
                continue
            if unsupported and name in unsupported:
                self.fault(line, name, unsupported[name])
            else:
                self.fault(line, name, unknown_key(name, self._asked))


def _shown(content: object) -> str:
    if isinstance(content, Message):
        return "a block"
    text = content.text if isinstance(content, Word) else repr(content)
    return f"{text[:60]}…" if len(text) > 60 else text
