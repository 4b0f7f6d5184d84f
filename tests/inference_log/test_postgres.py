"""The Postgres sink against a real PostgreSQL: what arrives, arrives once, whatever goes wrong between."""

from __future__ import annotations

import asyncio
import json
import shutil
import struct
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from gateway.errors import ConfigError
from gateway.inference_log import frame, postgres_schema, private_files, segments
from gateway.inference_log.frame import NO_BATCH, Column, Detail, Event, Requests
from gateway.inference_log.postgres import Postgres, PostgresSettings, read_dsn
from gateway.inference_log.segments import Layout, Segment
from gateway.inference_log.sink_feed import Feed
from gateway.inference_log.sinks import Shipment, TooSlow, Unavailable
from tests.inference_log.log_rows import BATCH, NOON, encoded, new_epoch, requests, row, segment_bytes
from tests.ingress.certificates import Certificates
from tests.live.postgres_server import PASSWORD, PostgresServer, postgres

MANIFEST: dict[str, object] = {
    "digest": "sha256:aa",
    "source": "models:/digits@champion",
    "run_id": "8f3a",
    "git_commit": "0a1b",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return segments.prepare(tmp_path / "log").directory


def write(directory: Path, *frames: tuple[bytes, int], epoch: str = "") -> str:
    """One segment with these frames; its epoch."""
    layout, epoch = Layout(directory), epoch or new_epoch()
    private_files.make_directory(layout.epoch(epoch))
    layout.segment(Segment(epoch, 0)).write_bytes(segment_bytes(epoch, 0, 0, frames, end=True))
    return epoch


def event(stream: Any, kind: str, details: dict[str, object] | str, model: str = "digits") -> tuple[bytes, int]:
    text = details if isinstance(details, str) else json.dumps(details)
    return frame.encode(Event(NOON * 10**9, stream, kind, model, "3", text)), 1


def ship(directory: Path, dsn: str, rows: int = 5000, **settings: Any) -> list[Shipment]:
    """Open a sink, ship all there is, close it."""

    async def shipped() -> list[Shipment]:
        sink = Postgres(PostgresSettings(lambda: dsn, **settings))
        try:
            positions = dict(await sink.open())
            found = []
            for piece in Feed(directory, rows=rows).pieces(positions):
                found.append(await sink.ship(piece))
                positions[piece.epoch] = piece.next
            return found
        finally:
            await sink.close()

    return asyncio.run(shipped())


def test_every_column_arrives_as_it_was(directory: Path, dsn: str, server: PostgresServer) -> None:
    ids = [b"01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e77", b"01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e78"]
    detail = Detail(parameters='{"a": 1}', executions=((0, 0), (0, 5)))
    good = row(ids[0], detail=detail)._replace(
        client_request_id="mine", oip_id="42", trace_id="0" * 32, grpc_code=0, protocol="grpc", rows=2, sampling=0.5
    )
    failed = row(ids[1], detail=Detail(error="no\0room", reason="overloaded", asked_model="d?"), batch=NO_BATCH)
    columns = [
        Column("x", "FP32", [0], [(2, 1)], struct.pack("<2f", 1.5, -2), None, "keep", None),
        Column("s", "BYTES", [0], [(2,)], b"\x01\0\0\0\xff\0\0\0\0", None, "truncate", [900]),
    ]
    write(
        directory,
        (
            frame.encode(
                Requests(
                    NOON * 10**9, 100.0, "digits", "3", "sha256:aa", "canary", [BATCH], [good, failed], columns, []
                )
            ),
            2,
        ),
    )
    assert ship(directory, dsn) == [Shipment(2, 0, 0)]
    found = server.rows(
        dsn,
        "SELECT request_id, client_request_id, oip_id, trace_id, extract(epoch FROM received)::text, "
        "extract(epoch FROM dispatched - received)::text, extract(epoch FROM done - received)::text, "
        "model, asked_model, version, digest, variant, "
        "protocol, endpoint, status, grpc_code, error, reason, backend, attempt, batch_id, batch_size, batch_row, "
        "rows, round(queue_ms::numeric, 6)::text, round(infer_ms::numeric, 6)::text, total_ms, parameters::text, "
        "sampling, position FROM gateway_requests ORDER BY position",
    )
    assert found == [
        (
            *(ids[0].decode(), "mine", "42", "0" * 32, f"{NOON}.000000", "0.001000", "0.004000", "digits", None, "3"),
            *("sha256:aa", "canary", "grpc", "infer", 200, 0, None, None, "onnx-1", 1, "a1f3-000042", 64, 0, 2),
            *("1.000000", "2.000000", 4.0, '{"a": 1}', 0.5, 0),
        ),
        (
            *(ids[1].decode(), None, None, None, f"{NOON}.000000", None, "0.004000", "digits", "d?", "3"),
            *("sha256:aa", "canary", "http", "infer", 503, None, "no\ufffdroom", "overloaded", None, None, None, None),
            *(None, 1, None, None, 4.0, None, 1.0, 1),
        ),
    ]
    ((inputs, data, outputs, executions),) = server.rows(
        dsn, "SELECT inputs::text, input_data, outputs, executions::text FROM gateway_requests WHERE position = 0"
    )
    assert json.loads(inputs) == [
        {"name": "x", "datatype": "FP32", "shape": [2, 1], "policy": "keep", "bytes": 8},
        {"name": "s", "datatype": "BYTES", "shape": [2], "policy": "truncate", "bytes": 900},
    ]
    assert (data, outputs) == ([struct.pack("<2f", 1.5, -2), b"\x01\0\0\0\xff\0\0\0\0"], None)
    assert [one["row"] for one in json.loads(executions)] == [0, 5]


def test_what_arrives_twice_is_there_once(directory: Path, dsn: str, server: PostgresServer) -> None:
    epoch = write(directory, (encoded([0, 1, 2]), 3), event("gap", "dropped", {"rows": 3}), (encoded([3]), 1))
    assert ship(directory, dsn) == [Shipment(5, 0, 0)]
    assert ship(directory, dsn) == []
    server.execute(dsn, "DELETE FROM gateway_shipped; DELETE FROM gateway_requests WHERE position = 1")
    assert ship(directory, dsn, rows=1) == [Shipment(1, 2, 0), Shipment(0, 1, 0), Shipment(0, 1, 0)]
    assert server.rows(dsn, "SELECT position FROM gateway_requests ORDER BY 1") == [(0,), (1,), (2,), (4,)]
    assert server.rows(dsn, "SELECT epoch::text, position FROM gateway_shipped") == [(epoch, 5)]


def test_the_cursor_is_never_ahead_of_the_rows(directory: Path, dsn: str, server: PostgresServer) -> None:
    assert ship(directory, dsn) == []  # makes the tables
    write(directory, (encoded([0, 1, 2]), 3), event("gap", "dropped", {"rows": 3}))
    for table in ("gateway_requests", "gateway_events"):
        server.execute(
            dsn,
            "CREATE OR REPLACE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'no space' USING ERRCODE = '53100'; END $$; "
            f"CREATE TRIGGER full_disk BEFORE INSERT ON {table} EXECUTE FUNCTION full_disk()",
        )
        with pytest.raises(Unavailable, match="disk is full"):
            ship(directory, dsn)
        assert server.rows(dsn, "SELECT position FROM gateway_shipped") == []
        assert server.rows(dsn, "SELECT position FROM gateway_requests") == []
        server.execute(dsn, f"DROP TRIGGER full_disk ON {table}")
    assert ship(directory, dsn) == [Shipment(4, 0, 0)]


def test_the_cursor_does_not_go_back(directory: Path, dsn: str, server: PostgresServer) -> None:
    write(directory, (encoded([0]), 1), (encoded([1]), 1), (encoded([2]), 1))
    assert ship(directory, dsn, rows=1) == [Shipment(1, 0, 0)] * 3

    async def again() -> Shipment:
        sink = Postgres(PostgresSettings(lambda: dsn))
        try:
            await sink.open()
            return await sink.ship(next(Feed(directory, rows=1).pieces({})))
        finally:
            await sink.close()

    assert asyncio.run(again()) == Shipment(0, 1, 0)
    assert server.rows(dsn, "SELECT position FROM gateway_shipped") == [(3,)]


def test_events_and_feedback_and_what_is_joined_from_them(directory: Path, dsn: str, server: PostgresServer) -> None:
    one = requests([1, 2])
    ids = [found.request_id.decode() for found in one.rows]

    def said(number: int, request_id: str, **more: object) -> tuple[bytes, int]:
        kind = "override" if "old" in more else "label"
        common = {"request_id": request_id, "row": None, "who": None, "note": None, "at_us": number}
        return event("feedback", kind, {**common, "idempotency_key": f"k{number}", **more}, model="")

    write(
        directory,
        said(1, ids[0], label="cat"),
        (frame.encode(one), 2),
        said(2, ids[0], label="dog", who="ada"),
        said(9, ids[0], label="cow", idempotency_key="k1"),  # a key that was used
        said(3, ids[1], old=1, new={"a": "x\0"}, row=0, note="seen\0"),
        said(4, "01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e77", label=0),
        event("lifecycle", "serving", MANIFEST),
        event("access", "show", "no JSON \0", model="\0"),
    )
    assert ship(directory, dsn, showcase_tables=True) == [Shipment(9, 0, 0)]
    labelled = server.rows(
        dsn,
        "SELECT request_id, feedback_item, feedback_kind, feedback_label::text, feedback_old::text, "
        "feedback_new::text, feedback_who, feedback_note, model FROM gateway_labelled ORDER BY position",
    )
    assert labelled == [
        (ids[0], None, "label", '"dog"', None, None, "ada", None, "digits"),
        (ids[1], 0, "override", None, "1", '{"a": "x\ufffd"}', None, "seen\ufffd", "digits"),
    ]
    assert server.rows(dsn, "SELECT request_id FROM gateway_unmatched_feedback") == [
        ("01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e77",)
    ]
    events = server.rows(dsn, "SELECT stream, kind, model, details::text FROM gateway_events ORDER BY position")
    assert [(*found[:3], json.loads(found[3])) for found in events] == [
        ("lifecycle", "serving", "digits", MANIFEST),
        ("access", "show", "\ufffd", "no JSON \ufffd"),
    ]


def test_the_showcases_tables_are_filled_with_metadata(directory: Path, dsn: str, server: PostgresServer) -> None:
    good = requests([2])
    ids = [
        good.rows[0].request_id.decode(),
        "01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e78",
        "01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e79",
    ]
    failed = row(ids[1].encode(), detail=Detail(error="queue full", reason="overloaded"), batch=NO_BATCH)
    undrawn = row(ids[2].encode(), batch=0)
    inputs = [Column("x", "FP64", [0], [(1,)], struct.pack("<d", 3), None, "keep", None)]
    others = Requests(NOON * 10**9, 100.0, "digits", "3", "sha256:aa", "", [BATCH], [failed, undrawn], inputs, [])
    write(directory, event("lifecycle", "serving", MANIFEST), (frame.encode(good), 1), (frame.encode(others), 2))
    ship(directory, dsn, showcase_tables=True)

    def table(name: str) -> list[tuple[Any, ...]]:
        return server.rows(dsn, f"SELECT * FROM {name} ORDER BY id")

    tensor = {"name": "x", "shape": [1], "datatype": "FP64", "parameters": {}, "data": [2.0]}
    requested = {found[0]: found for found in table("inference_requests")}
    assert set(requested) == {ids[0], ids[1]}, "what was not drawn has no values that could stand there"
    assert json.loads(requested[ids[0]][3]) == [tensor]
    assert json.loads(requested[ids[0]][5]) == {"id": ids[0], "parameters": {}, "inputs": [tensor]}
    ((name, version, answered, _, parameters, outputs, raw),) = table("inference_responses")
    assert (name, version, answered, parameters) == ("digits", "3", ids[0], "{}")
    assert json.loads(outputs) == [tensor | {"name": "y", "data": [4.0]}] == json.loads(raw)["outputs"]
    ((wrong, text, response),) = table("inference_errors")
    assert (wrong, text, json.loads(response)["status_code"]) == (ids[1], "queue full", 503)
    assert set(json.loads(response)) == {"status_code", "url", "duration", "method", "headers", "body"}
    metadata = {found[0]: json.loads(found[1]) for found in table("inference_metadata")}
    assert set(metadata) == set(ids)
    assert metadata[ids[0]] | MANIFEST == metadata[ids[0]]
    assert metadata[ids[0]]["batch"] == {"id": "a1f3-000042", "size": 64, "row": 0}
    assert metadata[ids[0]]["timings_ms"]["total"] == 4.0
    assert metadata[ids[0]]["experiment"] is None, "unknown is null"
    write(directory, (encoded([5]), 1))  # a new process: what is known of the version comes from the database
    ship(directory, dsn, showcase_tables=True)
    rest = [json.loads(found[1]) for found in table("inference_metadata") if found[0] not in ids]
    assert [one["run_id"] for one in rest] == ["8f3a"]


def test_a_row_that_the_tables_refuse_is_noted_and_the_others_go_on(
    directory: Path, dsn: str, server: PostgresServer
) -> None:
    ship(directory, dsn)  # the tables
    server.execute(dsn, "ALTER TABLE gateway_requests ADD CHECK (position % 7 <> 3)")
    epoch = write(directory, (encoded(range(20)), 20))
    (done,) = ship(directory, dsn)
    assert done == Shipment(17, 0, 3)
    refused = server.rows(dsn, "SELECT stream, position, why FROM gateway_refused ORDER BY position")
    assert server.rows(dsn, "SELECT DISTINCT epoch::text FROM gateway_refused") == [(epoch,)]
    assert [found[:2] for found in refused] == [("requests", 3), ("requests", 10), ("requests", 17)]
    assert "check constraint" in refused[0][2]
    assert server.rows(dsn, "SELECT position FROM gateway_shipped") == [(20,)]


def test_a_value_that_cannot_be_copied_is_noted_too(directory: Path, dsn: str, server: PostgresServer) -> None:
    common = {"request_id": "01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e77", "label": 1, "at_us": 0, "idempotency_key": "k"}
    good, bad = (event("feedback", "label", common | {"row": number}) for number in (1, 2**40))
    broken = event("feedback", "label", {"request_id": 5})
    write(directory, (encoded([1, 2, 3]), 3), bad, good, broken, (encoded([4]), 1))
    assert ship(directory, dsn) == [Shipment(5, 0, 2)]
    assert server.rows(dsn, "SELECT stream, position FROM gateway_refused ORDER BY 2") == [
        ("feedback", 3),
        ("feedback", 5),
    ]


def test_steps_run_once_and_only_forwards(directory: Path, dsn: str, server: PostgresServer) -> None:
    write(directory, (encoded([1]), 1))

    async def together() -> None:
        sinks = [Postgres(PostgresSettings(lambda: dsn, showcase_tables=True)) for _ in range(4)]
        await asyncio.gather(*(sink.open() for sink in sinks))
        await asyncio.gather(*(sink.close() for sink in sinks))

    asyncio.run(together())
    assert server.rows(dsn, "SELECT version FROM gateway_schema") == [(len(postgres_schema.STEPS),)]
    server.execute(dsn, "INSERT INTO gateway_schema VALUES (99)")
    with pytest.raises(Unavailable, match="newer gateway"):
        ship(directory, dsn)


def test_the_printed_script_makes_what_the_sink_needs(directory: Path, dsn: str, server: PostgresServer) -> None:
    server.execute(dsn, postgres_schema.script(showcase=True))
    server.execute(
        dsn,
        "DROP ROLE IF EXISTS little; CREATE ROLE little LOGIN PASSWORD 'little';"
        "GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA public TO little; GRANT UPDATE ON gateway_shipped TO little",
    )
    write(directory, (encoded([1, 2]), 2))
    little = dsn.replace("gateway_sink:" + PASSWORD, "little:little")
    assert ship(directory, little, showcase_tables=True) == [Shipment(2, 0, 0)]
    server.execute(dsn, "REVOKE INSERT ON gateway_requests FROM little")
    write(directory, (encoded([3]), 1))
    with pytest.raises(Unavailable, match=r"permission denied.*grant"):
        ship(directory, little)
    server.execute(dsn, "DROP OWNED BY little; DROP ROLE little")


def test_another_schema_is_made_and_used(directory: Path, dsn: str, server: PostgresServer) -> None:
    write(directory, (encoded([1]), 1))
    ship(directory, dsn, schema="audit")
    assert server.rows(dsn, "SELECT count(*) FROM audit.gateway_requests") == [(1,)]
    assert server.rows(dsn, "SELECT to_regclass('public.gateway_requests') IS NULL") == [(True,)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((PASSWORD, "wr0ng-secret"), "password authentication failed"),
        (("/test_", "/nothing_"), "does not exist.*create the database"),
        (("/test_", f"/is_{PASSWORD}_"), r"\*\*\*.*does not exist"),
        (("127.0.0.1:", "127.0.0.1:1"), "cannot be used"),
        (("127.0.0.1:", "127.0.0.9:"), "cannot be reached"),
        (("?", "?"), None),
    ],
)
def test_what_is_wrong_is_said_without_the_password(
    directory: Path, dsn: str, change: tuple[str, str], says: str | None
) -> None:
    changed = dsn.replace(*change)
    if says is None:
        changed = dsn + "?sslmode=verify-full"
        says = "SSL|cannot be"
    with pytest.raises(Unavailable, match=says) as told:
        ship(directory, changed)
    assert "secret" not in str(told.value)
    assert PASSWORD not in str(told.value)


def test_a_statement_that_takes_too_long_ends(directory: Path, dsn: str, server: PostgresServer) -> None:
    ship(directory, dsn)
    server.execute(
        dsn,
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(20); RETURN NEW; END';"
        "CREATE TRIGGER slow BEFORE INSERT ON gateway_requests FOR EACH ROW EXECUTE FUNCTION slow()",
    )
    write(directory, (encoded([1]), 1))
    with pytest.raises(TooSlow, match="did not answer within"):
        ship(directory, dsn, timeout_s=0.3)
    assert server.rows(dsn, "SELECT count(*) FROM gateway_requests") == [(0,)]


@pytest.mark.slow
def test_tls_is_what_the_data_source_name_says(directory: Path, tmp_path: Path) -> None:
    Certificates(tmp_path)
    write(directory, (encoded([1]), 1))
    with postgres() as own:
        dsn = own.database()
        for name in ("server.pem", "server-key.pem"):
            copy = Path(shutil.copy(tmp_path / name, own.directory))
            copy.chmod(0o600)
            own.own(copy)
        with pytest.raises(Unavailable):
            ship(directory, f"{dsn}?sslmode=require")  # it cannot, and nothing goes over the wire in clear
        own.configure(
            *("ssl = on", f"ssl_cert_file = '{own.directory}/server.pem'"),
            f"ssl_key_file = '{own.directory}/server-key.pem'",
        )
        own.stop()
        own.start()
        with pytest.raises(Unavailable, match="cannot be reached"):
            ship(directory, f"{dsn}?sslmode=verify-full&sslrootcert={tmp_path}/stranger.pem")
        assert ship(directory, f"{dsn}?sslmode=verify-full&sslrootcert={tmp_path}/ca.pem") == [Shipment(1, 0, 0)]


def test_connections_that_are_cut_change_nothing(directory: Path, dsn: str, server: PostgresServer) -> None:
    write(directory, (encoded(range(200)), 200))

    async def cut() -> None:
        sink = Postgres(PostgresSettings(lambda: dsn))
        await sink.open()
        (piece,) = Feed(directory).pieces({})
        await asyncio.to_thread(
            server.execute,
            dsn,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'gateway inference log'",
        )
        with pytest.raises(Unavailable, match=r"terminating|cannot be reached|closed"):
            await sink.ship(piece)
        with pytest.raises(AttributeError):
            await sink.ship(piece)  # it has to be opened first

    asyncio.run(cut())
    assert server.rows(dsn, "SELECT count(*) FROM gateway_requests") == [(0,)]
    assert ship(directory, dsn) == [Shipment(200, 0, 0)]


def test_reading_the_data_source_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "dsn"
    file.write_text("postgresql://u:s3cret@h/d\n")
    monkeypatch.setenv("GOOD", "postgres://u:s3cret@h/d")
    monkeypatch.setenv("BAD", "s3cret")
    assert read_dsn(f"file:{file}") == "postgresql://u:s3cret@h/d"
    assert read_dsn("env:GOOD") == "postgres://u:s3cret@h/d"
    for reference in ("env:BAD", "env:NOT_THERE", f"file:{tmp_path}/none", "postgresql://u:s3cret@h/d", "env:"):
        with pytest.raises(ConfigError, match=r"inference_log\.postgres\.dsn") as told:
            read_dsn(reference)
        assert "s3cret" not in str(told.value)


def test_an_epoch_is_a_uuid_in_the_tables(directory: Path, dsn: str, server: PostgresServer) -> None:
    epoch = write(directory, (encoded([1]), 1))
    ship(directory, dsn)
    ((found,),) = server.rows(dsn, "SELECT epoch FROM gateway_requests")
    assert UUID(str(found)) == UUID(epoch)
