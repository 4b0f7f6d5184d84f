"""Header blocks (HPACK, RFC 7541): reading them with the `hpack` library, and writing ours without any state.

Reading. A client sends the same block again and again, because after the first calls all its fields are indices into
the table both sides keep. `Blocks` remembers what a block came to mean, as long as the table stands: only blocks
whose decoding left the table unchanged are kept, and any block that changes it clears what is kept. So a remembered
block means what decoding it again would yield, and no check is weakened: the whole block is the key.

Writing. Only static indices and literals without indexing, so a block does not depend on those before it and can be
made once for all connections. A client that shrinks its table must be told of our (empty) one: `EMPTY_TABLE`.
"""

from __future__ import annotations

from typing import Any, Final

from hpack import Decoder, HPACKError
from hpack.table import HeaderTable

from gateway.protocol.http2_frames import ConnectionFault, ErrorCode

Fields = list[tuple[bytes, bytes]]

MAX_REMEMBERED_BLOCKS: Final = 256
MAX_REMEMBERED_BLOCK_BYTES: Final = 1024
FIELD_OVERHEAD_BYTES: Final = 32
HARD_FACTOR: Final = 4
"""A header list this many times over the limit is not even decoded to its end."""
EMPTY_TABLE: Final = b"\x20"
"""Dynamic table size update to 0; stands at the beginning of a block."""


class _Table(HeaderTable):
    """The library's table, which also tells that it was changed."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = False

    def add(self, name: bytes, value: bytes) -> None:
        self.changed = True
        super().add(name, value)

    @property
    def maxsize(self) -> int:
        return self._maxsize

    @maxsize.setter
    def maxsize(self, size: int) -> None:
        self.changed = True
        HeaderTable.maxsize.fset(self, size)  # type: ignore[attr-defined]  # mypy sees no property object


class Blocks:
    """The receiving side's header blocks of one connection. `remembered`: block → whatever `remember` was given."""

    __slots__ = ("_decoder", "_table", "remembered")

    def __init__(self, max_list_bytes: int) -> None:
        self._table = _Table()
        self._decoder = Decoder(max_header_list_size=max_list_bytes * HARD_FACTOR)
        self._decoder.header_table = self._table
        self.remembered: dict[bytes, Any] = {}

    def decode(self, block: bytes) -> tuple[Fields, bool]:
        """The fields, and whether the block may be remembered.

        Raises:
            ConnectionFault: the block cannot be decoded, or its list is far too large; the table is lost with it.
        """
        table = self._table
        table.changed = False
        try:
            fields = [(name, value) for name, value in self._decoder.decode(block, raw=True)]
        except (HPACKError, IndexError, ValueError) as error:
            if type(error).__name__ == "OversizedHeaderListError":
                raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "the header list is far too large") from None
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, "a header block cannot be decoded") from None
        if table.changed:
            self.remembered.clear()
        return fields, not table.changed and len(block) <= MAX_REMEMBERED_BLOCK_BYTES

    def remember(self, block: bytes, meaning: object) -> None:
        if len(self.remembered) >= MAX_REMEMBERED_BLOCKS:
            self.remembered.clear()
        self.remembered[block] = meaning


def list_bytes(fields: Fields) -> int:
    """Size of a header list as RFC 9113 §6.5.2 counts it."""
    return sum(len(name) + len(value) + FIELD_OVERHEAD_BYTES for name, value in fields)


def _integer(value: int, prefix_bits: int, pattern: int) -> bytes:
    top = (1 << prefix_bits) - 1
    if value < top:
        return bytes((pattern | value,))
    out = bytearray((pattern | top,))
    value -= top
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


_STATIC_NAMES: Final = {name: index for index, (name, _) in reversed(list(enumerate(HeaderTable.STATIC_TABLE, 1)))}


def metadata_literal(name: bytes, value: bytes) -> bytes:
    """One header field as a literal without indexing. `name` in lower case; neither is checked here."""
    index = _STATIC_NAMES.get(name)
    if index is not None:
        return _integer(index, 4, 0) + _integer(len(value), 7, 0) + value
    return b"\0" + _integer(len(name), 7, 0) + name + _integer(len(value), 7, 0) + value


def status_literal(status: int) -> bytes:
    """The `:status` pseudo-header."""
    return b"\x88" if status == 200 else metadata_literal(b":status", b"%d" % status)
