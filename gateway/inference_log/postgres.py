"""The Postgres sink: takes pieces of the log, each in one transaction with the note of how far it is.

A piece is copied into tables of the session (COPY, binary) and moved from there with ON CONFLICT DO NOTHING, so what
arrives twice is there once. `gateway_shipped` moves in the same transaction: it is never ahead of the rows, and a
commit whose answer was lost is found out when the database is asked again.

Rules:
* Whatever a server, a network or a disk can do is `Unavailable`: waited out by `sinks.Shipper`. Every statement has a
  time limit.
* A row that the tables refuse whatever is done (a value that the database cannot hold, a check that its owner added)
  must not hold up the others: the piece is halved until it stands alone, and then noted in `gateway_refused`.
* The data source name holds a password: it is read where it is used, never logged, never on a command line. Text of the
  server is passed on, without the password in it.
* A schema that is newer than this version knows is left alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NoReturn
from uuid import UUID

import pyarrow.compute as pc

from gateway.errors import ConfigError
from gateway.inference_log import postgres_rows as rows
from gateway.inference_log import postgres_schema as tables
from gateway.inference_log.sink_feed import Piece
from gateway.inference_log.sinks import Shipment, TooSlow, Unavailable

try:
    import asyncpg
except ImportError:  # pragma: no cover - the extra is not installed
    asyncpg = None

log = logging.getLogger("gateway.inference_log")

CONNECT_S: Final = 10.0
MAX_DSN: Final = 4096
MAX_REMEMBERED: Final = 10_000
"""Versions whose provenance is at hand for `inference_metadata`."""
_HINTS: Final = {
    "28P01": "check the user and the password of inference_log.postgres.dsn",
    "28000": "check pg_hba.conf, and the user of inference_log.postgres.dsn",
    "3D000": "create the database, or name another in inference_log.postgres.dsn",
    "42501": "grant the role what it needs, see gateway log ship --print-sql",
    "42P01": "a table is gone: restore it, or drop gateway_schema so that all are made again",
    "53100": "the database server's disk is full",
}


@dataclass(frozen=True, slots=True)
class PostgresSettings:
    """`dsn` is read anew for each connection, so that a password may be changed while serving."""

    dsn: Callable[[], str]
    schema: str = "public"
    showcase_tables: bool = False
    timeout_s: float = 60.0


def read_dsn(reference: str) -> str:
    """What `env:NAME` or `file:PATH` holds; blocks on the disk. A secret.

    Raises:
        ConfigError: it is not there or cannot be a data source name; the text does not repeat it.
    """
    kind, _, name = reference.partition(":")
    if kind == "env" and name:
        found, origin = os.environ.get(name, ""), f"the variable {name}"
    elif kind == "file" and name:
        origin = f"the file {name}"
        try:
            with Path(name).open(encoding="utf-8") as stream:
                found = stream.read(MAX_DSN + 1).strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(f"inference_log.postgres.dsn: {origin} cannot be read: {why}") from None
    else:
        raise ConfigError("inference_log.postgres.dsn: write env:NAME or file:PATH; it holds a password")
    if not found.startswith(("postgresql://", "postgres://")) or len(found) > MAX_DSN or not found.isprintable():
        raise ConfigError(
            f"inference_log.postgres.dsn: {origin} holds no data source name; it looks like "
            "postgresql://user:password@host:5432/database"
        )
    return found


class Postgres:
    """A `sinks.Target`. One connection at a time; after `Unavailable` it is closed and has to be opened again."""

    def __init__(self, settings: PostgresSettings) -> None:
        if asyncpg is None:
            raise ConfigError("inference_log.postgres needs asyncpg: pip install 'oip-gateway[postgres]'")
        self._settings = settings
        self._connection: Any = None
        self._known: dict[tuple[str, str | None, str | None], Mapping[str, Any]] = {}
        self._password = ""

    def __repr__(self) -> str:
        return f"<Postgres schema={self._settings.schema} connected={self._connection is not None}>"

    async def open(self) -> Mapping[str, int]:
        await self.close()
        try:
            dsn = self._settings.dsn()
        except ConfigError as error:
            raise Unavailable(str(error)) from None
        self._password = _password(dsn)
        async with self._explained():
            self._connection = await self._connect(dsn)
            await self._prepare()
            found = await self._connection.fetch("SELECT epoch::text, position FROM gateway_shipped")
            if self._settings.showcase_tables:
                await self._recall()
        return {row["epoch"]: row["position"] for row in found}

    def check(self) -> None:
        if self._connection is None or self._connection.is_closed():
            raise Unavailable("PostgreSQL cannot be reached: it closed the connection")

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()  # nothing is under way that would be worth waiting for

    async def ship(self, piece: Piece) -> Shipment:
        try:
            async with self._explained():
                return await self._transaction(piece)
        except _Refused as refused:
            cause = str(refused)
        if piece.rows <= 1:
            return await self._note_refused(piece, cause)
        middle = _middle(piece)
        done = [await self.ship(half) for half in (_part(piece, piece.first, middle), _part(piece, middle, piece.next))]
        return Shipment(
            *(sum(counts) for counts in zip(*((d.rows, d.duplicates, d.refused) for d in done), strict=True))
        )

    # -- one connection ------------------------------------------------------------------------------------------------

    async def _connect(self, dsn: str) -> Any:
        try:
            return await asyncpg.connect(
                dsn,
                timeout=CONNECT_S,
                command_timeout=self._settings.timeout_s,
                server_settings={
                    "application_name": "gateway inference log",
                    "search_path": f'"{self._settings.schema}", pg_temp',
                },
            )
        except OSError:  # a certificate that is not trusted is a ValueError besides
            raise
        except (ValueError, OverflowError, asyncpg.InterfaceError) as error:  # its text may repeat the data source name
            raise Unavailable(
                f"the data source name of inference_log.postgres.dsn cannot be used ({type(error).__name__})"
            ) from None

    async def _prepare(self) -> None:
        """Tables of the schema as this version needs them, and those of the session."""
        connection, schema = self._connection, self._settings.schema
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", tables.LOCK)
            if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)", schema):
                await connection.execute(f'CREATE SCHEMA "{schema}"')
            if await self._missing("gateway_schema"):
                await connection.execute(tables.first_step())
            version = await connection.fetchval("SELECT coalesce(max(version), 0) FROM gateway_schema")
            if version > len(tables.STEPS):
                raise Unavailable(
                    f"the tables in schema {schema} are of version {version}, made by a newer gateway; this one knows "
                    f"version {len(tables.STEPS)}: update it, or name another schema in inference_log.postgres"
                )
            for number, step in enumerate(tables.STEPS[version:], version + 1):
                await connection.execute(step)
                await connection.execute("INSERT INTO gateway_schema (version) VALUES ($1)", number)
            if self._settings.showcase_tables and [n for n in tables.SHOWCASE_TABLES if await self._missing(n)]:
                await connection.execute(tables.SHOWCASE)
        for staged in (tables.REQUESTS, tables.EVENTS, tables.FEEDBACK, tables.FOUR):
            await connection.execute(staged.create)

    async def _missing(self, table: str) -> bool:
        return (
            await self._connection.fetchval("SELECT to_regclass($1) IS NULL", f'"{self._settings.schema}".{table}')
            is True
        )

    async def _recall(self) -> None:
        """What was shipped of the lifecycle stream about versions: rows to come refer to it."""
        found = await self._connection.fetch(
            "SELECT DISTINCT ON (1, 2, 3) model, version, details->>'digest' AS digest, details FROM gateway_events "
            "WHERE stream = 'lifecycle' AND kind = $1 ORDER BY 1, 2, 3, at DESC LIMIT $2",
            rows.SERVING,
            MAX_REMEMBERED,
        )
        self._known = {(row["model"], row["version"], row["digest"]): rows.stated(row["details"]) for row in found}

    # -- one piece -----------------------------------------------------------------------------------------------------

    async def _transaction(self, piece: Piece) -> Shipment:
        staged = list(self._staged(piece))
        new = 0
        async with self._connection.transaction():
            for number, (table, records) in enumerate(staged):
                taken = await self._take(table, records)
                new += taken if table is not tables.FOUR else 0
                staged[number] = (table, [])  # what was sent need not be held until the end
            await self._advance(UUID(piece.epoch), piece.next)
        return Shipment(new, piece.rows - new, 0)

    def _staged(self, piece: Piece) -> Iterator[tuple[tables.Staged, list[rows.Record]]]:
        """What is copied where. Raises _Refused."""
        epoch = UUID(piece.epoch)
        try:
            if (table := piece.tables.get("lifecycle")) is not None:
                self._learn(rows.provenance(table))
            for stream, table in piece.tables.items():
                if stream == "requests":
                    of_piece = rows.RequestRows(table, epoch)
                    yield tables.REQUESTS, list(of_piece.records(tables.REQUESTS.names))
                    if self._settings.showcase_tables:
                        yield tables.FOUR, list(of_piece.four(tables.FOUR.names, self._known))
                elif stream == "feedback":
                    yield tables.FEEDBACK, rows.feedback_records(table, epoch)
                else:
                    yield tables.EVENTS, rows.event_records(stream, table, epoch)
        except (TypeError, ValueError, LookupError, AttributeError) as error:  # what no writer of ours would write
            raise _Refused(f"{type(error).__name__}: {error}") from None

    async def _take(self, staged: tables.Staged, records: list[rows.Record]) -> int:
        """Copy, then move to where they belong; how many of them were new."""
        if not records:
            return 0
        try:
            await self._connection.copy_records_to_table(
                staged.name, records=records, columns=staged.names, timeout=self._settings.timeout_s
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise _Refused(f"{staged.name}: {error}") from None
        counts = [int((await self._connection.execute(insert)).rpartition(" ")[2]) for insert in staged.inserts]
        return counts[0]

    async def _advance(self, epoch: UUID, position: int) -> None:
        await self._connection.execute(
            "INSERT INTO gateway_shipped AS s (epoch, position) VALUES ($1, $2) ON CONFLICT (epoch) "
            "DO UPDATE SET position = greatest(s.position, excluded.position), at = now()",
            epoch,
            position,
        )

    async def _note_refused(self, piece: Piece, why: str) -> Shipment:
        epoch = UUID(piece.epoch)
        async with self._explained(), self._connection.transaction():
            for stream, table in piece.tables.items():
                await self._connection.execute(
                    "INSERT INTO gateway_refused (stream, epoch, position, why) VALUES ($1, $2, $3, $4) "
                    "ON CONFLICT DO NOTHING",
                    *(stream, epoch, table["position"][0].as_py(), rows.text(why)),
                )
            await self._advance(epoch, piece.next)
        return Shipment(0, 0, piece.rows)

    def _learn(self, stated: Mapping[tuple[str, str | None, str | None], Mapping[str, Any]]) -> None:
        self._known.update(stated)
        for key in list(self._known)[: max(0, len(self._known) - MAX_REMEMBERED)]:
            del self._known[key]

    # -- what can go wrong ---------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _explained(self) -> AsyncIterator[None]:
        """Errors of the server and the network as `Unavailable`, those of a row's values as `_Refused`."""
        try:
            yield
        except (Unavailable, _Refused):
            raise
        except (
            asyncpg.DataError,
            asyncpg.IntegrityConstraintViolationError,
            asyncpg.ProgramLimitExceededError,
        ) as error:
            raise _Refused(self._without_password(str(error))) from None
        except asyncpg.QueryCanceledError as error:
            await self._fail(TooSlow(f"PostgreSQL was too slow: {error}"))
        except TimeoutError:
            text = f"PostgreSQL did not answer within {self._settings.timeout_s:g} s"
            await self._fail(TooSlow(text) if self._connection is not None else Unavailable(text))
        except asyncpg.PostgresError as error:
            hint = _HINTS.get(error.sqlstate or "", "")
            await self._fail(Unavailable(f"PostgreSQL: {self._without_password(str(error))}{hint and f'; {hint}'}"))
        except (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            text = self._without_password(str(error)) or type(error).__name__
            await self._fail(Unavailable(f"PostgreSQL cannot be reached: {text}"))

    async def _fail(self, error: Unavailable) -> NoReturn:
        await self.close()
        raise error from None

    def _without_password(self, text: str) -> str:
        return text.replace(self._password, "***") if self._password else text


class _Refused(Exception):
    """The tables do not take a value, whatever is done; the transaction was rolled back."""


def _password(dsn: str) -> str:
    found = re.match(r"postgres(?:ql)?://[^:@/]*:([^@/]+)@", dsn)
    return found[1] if found else ""


def _middle(piece: Piece) -> int:
    """A position that parts the piece's rows into halves; more than one row, so neither is empty."""
    positions: Sequence[int] = sorted(
        position for table in piece.tables.values() for position in table["position"].to_pylist()
    )
    return positions[len(positions) // 2]


def _part(piece: Piece, first: int, end: int) -> Piece:
    chosen = {
        stream: table.filter(pc.and_(pc.greater_equal(table["position"], first), pc.less(table["position"], end)))
        for stream, table in piece.tables.items()
    }
    chosen = {stream: table for stream, table in chosen.items() if table.num_rows}
    rows_ = sum(table.num_rows for table in chosen.values())
    return replace(piece, first=first, next=end, tables=chosen, rows=rows_, missing=0)
