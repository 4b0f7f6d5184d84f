"""Small texts of the command line: counted nouns, and usage faults without options that only exist to be refused."""

from __future__ import annotations

from typing import Any, Final

from typer.core import TyperCommand

LATER_OPTIONS: Final = frozenset(("--processes",))


def count(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def harmless(text: str) -> str:
    """What strangers wrote, unable to move a terminal's cursor."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


class Verb(TyperCommand):
    """A command whose "no such option" does not suggest options of later versions."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            possible = getattr(error, "possibilities", None)
            if possible:
                # Part of click's interface, whichever copy of click typer carries.
                error.possibilities = [name for name in possible if name not in LATER_OPTIONS]  # type: ignore[attr-defined]
            raise
