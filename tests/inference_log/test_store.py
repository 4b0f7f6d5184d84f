"""Reading: each row once, whether it is WAL or Parquet, whatever the sealer does meanwhile; and nothing but the log."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import duckdb
import pytest
from msgspec.structs import replace

from gateway.errors import ConfigError
from gateway.inference_log import frame, merging, sealing, segments, store
from gateway.inference_log.frame import Detail, Event, Requests
from gateway.inference_log.segments import Layout, Segment, Snapshot
from gateway.inference_log.store import Store
from tests.inference_log.log_on_disk import event, ids, new_log, seal, write
from tests.inference_log.log_rows import DAY_S, NOON, requests, row


def rows(found: Store, sql: str) -> list[dict[str, Any]]:
    with found.opened() as connection:
        read: list[dict[str, Any]] = connection.sql(sql).to_arrow_table().to_pylist()
        return read


def ids_in(found: Store) -> list[str]:
    return [one["request_id"] for one in rows(found, "select request_id from requests")]


def test_a_directory_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no inference log; name its directory with --dir"):
        Store(tmp_path)


def test_rows_of_wal_and_parquet_are_one_table(tmp_path: Path) -> None:
    first, second = requests(range(5)), requests(range(5, 9), "salary")
    write(tmp_path, [first])
    seal(tmp_path)
    write(tmp_path, [second, event("lifecycle", "loaded", {})])
    found = Store(tmp_path)
    assert sorted(ids_in(found)) == sorted(ids(first) + ids(second))
    counted = rows(found, "select model, count(*) as n, min(date) as day from requests group by model order by model")
    assert [(one["model"], one["n"], str(one["day"])) for one in counted] == [
        ("digits", 5, "2026-09-21"),
        ("salary", 4, "2026-09-21"),
    ]
    assert [one["kind"] for one in rows(found, "select kind from lifecycle")] == ["loaded"]


@pytest.mark.parametrize("killed_at", ["shown", "committed"])
def test_what_is_spilt_is_read_once_wherever_its_sealer_was_killed(tmp_path: Path, killed_at: str) -> None:
    class Killed(BaseException):
        """The sealer's end."""

    def step(name: str) -> None:
        if name == killed_at:
            raise Killed

    main, spill = new_log(tmp_path / "main"), tmp_path / "spill"
    made = requests(range(3))
    epoch = write(spill, [made])
    with pytest.raises(Killed):
        sealing.seal(Layout(main, spill), Segment(epoch, 0), NOON * 10**6, step)
    assert len(Layout(main).parquet("requests")) == 1
    assert Layout(spill).segments(epoch) == [Segment(epoch, 0)]
    found = Store(main, spill)
    assert sorted(ids_in(found)) == sorted(ids(made))
    assert [one["request_id"] for one in found.find(ids(made)[1])] == [ids(made)[1]]
    if killed_at == "committed":  # its rows may be merged with others' before anybody removes the WAL file
        (file,) = Layout(main).parquet("requests")
        file.rename(file.with_name("merged-with-others.parquet"))
        assert sorted(ids_in(Store(main, spill))) == sorted(ids(made))


def test_what_is_spilt_is_read_too_and_once(tmp_path: Path) -> None:
    main, spill = new_log(tmp_path / "main"), tmp_path / "spill"
    first, second = requests(range(3)), requests(range(3, 5))
    write(main, [first])
    write(spill, [second])
    assert sorted(ids_in(Store(main, spill))) == sorted(ids(first) + ids(second))
    sealed_into_main, wals = Layout(main), Layout(spill)
    sealed_into_main.wal = wals.wal
    for epoch in wals.epochs():
        for segment in wals.segments(epoch):
            sealing.seal(sealed_into_main, segment, 1)
    # Its WAL file is still there: the commit record alone decides.
    assert sorted(ids_in(Store(main, spill))) == sorted(ids(first) + ids(second))


@pytest.mark.parametrize("removed", [False, True], ids=["wal still there", "wal removed"])
def test_a_segment_sealed_while_it_is_read_is_seen_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    """The sealer commits at the worst moment: after the snapshot, before the files are listed."""
    written = requests(range(6))
    write(tmp_path, [written])
    snapshot, times = Layout.snapshot, iter(range(100))

    def late(layout: Layout) -> Snapshot:
        before = snapshot(layout)
        if next(times) == 0:
            for segment in before.wal:
                sealing.seal(layout, segment, 1)
                if removed:
                    sealing.remove(layout, segment)
        return before

    monkeypatch.setattr(Layout, "snapshot", late)
    assert sorted(ids_in(Store(tmp_path))) == sorted(ids(written))
    assert next(times) > 2, "it looked again"


def test_files_merged_while_they_are_read_are_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sealer merges after the files were listed: the names that were found mean nothing any more."""
    made = [requests(range(n, n + 3)) for n in range(0, 12, 3)]
    for one in made:
        write(tmp_path, [one])
    seal(tmp_path)
    load, times = Store._load, iter(range(100))

    def late(self: Store, *arguments: Any) -> None:
        load(self, *arguments)
        if next(times) == 0:
            layout = Layout(tmp_path)
            assert merging.merge_all(layout, [layout], (NOON + 1000 * DAY_S) * 10**6, {}) == 3

    monkeypatch.setattr(Store, "_load", late)
    assert sorted(ids_in(Store(tmp_path))) == sorted(text for one in made for text in ids(one))
    assert next(times) == 2, "it looked again"


def test_half_sealed_parquet_does_not_count(tmp_path: Path) -> None:
    """Killed between the Parquet file and the commit record."""
    written = requests(range(4))
    write(tmp_path, [written])
    layout = Layout(tmp_path)
    (segment,) = layout.snapshot().wal
    sealing.seal(layout, segment, 1)
    layout.commit(segment).unlink()
    found = Store(tmp_path)
    assert sorted(ids_in(found)) == sorted(ids(written))
    assert [len(found.find(one)) for one in ids(written)] == [1, 1, 1, 1]


def test_changing_for_ever_is_an_error_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [requests([1])])
    monkeypatch.setattr(Store, "_is_still", lambda *_: False)
    with pytest.raises(store.LogReadError, match="changes faster than it can be read"), Store(tmp_path).opened():
        pass


@pytest.mark.parametrize("sealed", [False, True])
def test_a_request_is_found_by_each_of_its_ids(tmp_path: Path, sealed: bool) -> None:
    written = requests(range(20))
    named = [one._replace(client_request_id=f"mine-{n}", oip_id=f"oip-{n}") for n, one in enumerate(written.rows)]
    written = replace(written, rows=named)
    write(tmp_path, [written])
    if sealed:
        seal(tmp_path)
    found = Store(tmp_path)
    wanted = ids(written)[7]
    for text in (wanted, wanted.upper(), "mine-7", "oip-7"):
        (one,) = found.find(text)
        assert (one["request_id"], one["position"]) == (wanted, 7)
    assert found.find("mine-99") == []
    assert found.find("'; drop table requests; --") == []


def test_a_request_id_wins_over_a_client_that_took_it_for_its_own(tmp_path: Path) -> None:
    honest, thief = requests([1]), requests([2])
    stolen = [thief.rows[0]._replace(client_request_id=ids(honest)[0])]
    write(
        tmp_path,
        [honest, replace(thief, rows=stolen)],
    )
    (one,) = Store(tmp_path).find(ids(honest)[0])
    assert one["client_request_id"] is None


def test_a_client_s_uuid_of_another_time_is_found_all_the_same(tmp_path: Path) -> None:
    written = requests([1])
    old = "01000000-0000-7000-8000-000000000000"
    renamed = [written.rows[0]._replace(oip_id=old)]
    frames = [replace(written, rows=renamed)]
    write(tmp_path, frames)
    seal(tmp_path)
    assert [one["oip_id"] for one in Store(tmp_path).find(old)] == [old]


@pytest.mark.parametrize("sealed", [False, True])
def test_mates_are_those_of_the_same_batch_and_epoch(tmp_path: Path, sealed: bool) -> None:
    """Two processes may call their batches alike; a split request has a piece in another's batch."""
    written = requests(range(6))
    batches = [written.batches[0]._replace(batch_id=text) for text in ("a-1", "a-2")]
    split = Detail(executions=((1, 0), (0, 3)))
    placed = [one._replace(batch=n // 3, detail=split if n == 3 else None) for n, one in enumerate(written.rows)]
    frames = [Requests(written.wall_ns, 100.0, "digits", "3", "sha256:aa", "", batches, placed, [], [])]
    write(tmp_path, frames)
    write(
        tmp_path,
        [Requests(written.wall_ns, 100.0, "digits", "3", "sha256:aa", "", batches, requests([9]).rows, [], [])],
    )
    if sealed:
        seal(tmp_path)
    found = Store(tmp_path)
    one, three = (found.find(ids(written)[n])[0] for n in (1, 3))
    assert {mate["position"] for mate in found.mates(one)} == {0, 2, 3}
    assert {mate["position"] for mate in found.mates(three)} == {0, 1, 2, 4, 5}
    assert store.batches_of(three) == ["a-2", "a-1"]


def test_a_damaged_or_newer_frame_costs_only_itself(tmp_path: Path) -> None:
    good, bad = requests(range(3)), requests([7])
    lying = Requests(bad.wall_ns, 100.0, "digits", "3", "", "", [], bad.rows, [], [])  # names a batch that is not there
    write(tmp_path, [good, lying, requests([8])])
    assert len(ids_in(Store(tmp_path))) == 4


def test_nothing_but_the_log_can_be_read_and_nothing_be_changed(tmp_path: Path) -> None:
    log, secret = new_log(tmp_path / "log"), tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    write(log, [requests([1])])
    seal(log)
    with Store(log).opened() as connection:
        for sql in (
            f"select * from read_csv('{secret}')",
            f"select * from '{secret}'",
            f"copy (select 1) to '{tmp_path}/out.csv'",
            f"attach '{tmp_path}/x.db' as x",
            "install httpfs",
            "load httpfs",
            "set enable_external_access = true",
            "set memory_limit = '100GB'",
            "select * from duckdb_secrets()",
            "select * from 'https://example.org/x.parquet'",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(sql).fetchall()
    assert not (tmp_path / "out.csv").exists()


def test_python_s_variables_cannot_be_seen(tmp_path: Path) -> None:
    import pyarrow as pa

    write(tmp_path, [requests([1])])
    hidden = pa.table({"a": [1]})
    with Store(tmp_path).opened() as connection, pytest.raises(duckdb.Error, match="hidden"):
        connection.sql("select * from hidden")
    assert hidden.num_rows == 1


def test_reading_leaves_the_directory_as_it_was(tmp_path: Path) -> None:
    written = requests(range(3))
    write(tmp_path, [written])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = Store(tmp_path)
    ids_in(found)
    found.mates(found.find(ids(written)[0])[0])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_any_mixture_of_sealed_and_unsealed_gives_every_row_once(tmp_path: Path) -> None:
    dice, expected = random.Random(7), []
    new_log(tmp_path)
    for turn in range(12):
        frames: list[frame.Frame] = [
            requests(range(dice.randrange(1, 9)), dice.choice(["digits", "salary", ""]), NOON + turn * 40_000)
        ]
        write(tmp_path, frames)
        expected += [one for made in frames if isinstance(made, Requests) for one in ids(made)]
        if dice.random() < 0.5:
            seal(tmp_path)
        assert sorted(ids_in(Store(tmp_path))) == sorted(expected)
    found = Store(tmp_path)
    assert all([one["request_id"] for one in found.find(text)] == [text] for text in expected[:10])


def test_its_own_tables_do_not_show(tmp_path: Path) -> None:
    write(tmp_path, [requests([1]), Event(1, "access", "show", "", "", "{}"), requests([2])])
    found = rows(Store(tmp_path), "show tables")
    assert sorted(one["name"] for one in found) == [
        *("access", "feedback", "gaps", "labelled", "labels", "lifecycle", "requests", "unmatched_feedback")
    ]


def test_an_id_of_an_impossible_time_is_merely_not_found(tmp_path: Path) -> None:
    write(tmp_path, [requests([1])])
    assert Store(tmp_path).find("ffffffff-ffff-7fff-bfff-ffffffffffff") == []


def test_refused_requests_have_no_batch_and_no_mates(tmp_path: Path) -> None:
    refused = requests([1])
    bare = [row(refused.rows[0].request_id, batch=frame.NO_BATCH, detail=Detail(error="no", asked_model="nope"))]
    write(tmp_path, [Requests(refused.wall_ns, 100.0, "", "", "", "", [], bare, [], [])])
    (one,) = Store(tmp_path).find(ids(refused)[0])
    assert (one["model"], one["asked_model"], Store(tmp_path).mates(one)) == (segments.UNRESOLVED, "nope", [])
