"""The sealer as a process: what it may touch, when it ends, and what it tells."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.inference_log import private_files, sealer_settings, sealing, segments
from gateway.inference_log.retention import RetentionPolicy
from gateway.inference_log.sealer import Sealer, SealerBusy, seal_by_hand
from gateway.inference_log.sealer_settings import SealerSettings
from gateway.inference_log.segments import Commit, Layout, SealerState, Segment
from gateway.inference_log.writer import LogWriter, WriterSettings
from tests.inference_log.log_rows import NOON, encoded, new_epoch, numbers_in_parquet, numbers_in_wal
from tests.inference_log.test_writer import killed_writers
from tests.live.gateway_process import until


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "log")


FAST = WriterSettings(sync_ms=1.0)


def now_us() -> int:
    return NOON * 10**6


def written(directory: Path, numbers: range, settings: WriterSettings = FAST) -> LogWriter:
    """A living epoch with these rows synced."""
    one = LogWriter(directory, new_epoch(), settings)
    one.start()
    for number in numbers:
        assert one.offer(encoded([number]), 1)
    until(lambda: one.pending_bytes == 0, 30.0, "the writer did not sync")
    return one


def test_a_living_epoch_keeps_its_open_segment(layout: Layout) -> None:
    one = written(layout.directory, range(5))
    seal_by_hand(SealerSettings(layout.directory))
    assert (numbers_in_parquet(layout.directory), numbers_in_wal(layout.directory)) == ([], list(range(5)))
    assert segments.is_alive(layout, one.epoch)
    one.close()
    assert not segments.is_alive(layout, one.epoch)
    state = seal_by_hand(SealerSettings(layout.directory))
    assert (state.sealed_segments, state.sealed_rows, state.failing) == (1, 5, None)
    assert numbers_in_parquet(layout.directory) == list(range(5))
    assert layout.epochs() == []


def test_a_living_epochs_finished_segments_are_sealed(layout: Layout) -> None:
    one = written(layout.directory, range(5), WriterSettings(sync_ms=1.0, segment_bytes=1))
    until(lambda: not layout.segments(one.epoch) or _last_is_final(layout, one.epoch), 30.0, "it was not closed")
    seal_by_hand(SealerSettings(layout.directory))
    assert numbers_in_parquet(layout.directory) == list(range(5))
    assert layout.epochs() == [one.epoch]
    assert one.offer(encoded([5]), 1)
    one.close()
    seal_by_hand(SealerSettings(layout.directory))
    assert sorted(numbers_in_parquet(layout.directory)) == list(range(6))


def _last_is_final(layout: Layout, epoch: str) -> bool:
    return segments.is_final(layout, layout.segments(epoch)[-1])


def test_what_was_spilt_is_sealed_into_the_logs_own_directory(layout: Layout, tmp_path: Path) -> None:
    written(layout.directory, range(3)).close()
    written(tmp_path / "spill", range(3, 6)).close()
    seal_by_hand(SealerSettings(layout.directory, tmp_path / "spill"))
    assert sorted(numbers_in_parquet(layout.directory)) == list(range(6))
    assert Layout(tmp_path / "spill").epochs() == []
    assert len(layout.commits()) == 2


def test_a_sealed_segment_whose_file_stayed_is_not_sealed_again(layout: Layout) -> None:
    """Its sealer was killed behind the commit record, and its rows may have been merged since."""
    one = written(layout.directory, range(5))
    one.close()
    segment = Segment(one.epoch, 0)
    data = private_files.read_file(layout.segment(segment))
    seal_by_hand(SealerSettings(layout.directory))
    (file,) = layout.parquet("requests")
    file.rename(file.with_name("merged-elsewhere.parquet"))
    private_files.make_directory(layout.epoch(one.epoch))
    layout.segment(segment).write_bytes(data)
    before = layout.commits()
    state = seal_by_hand(SealerSettings(layout.directory))
    assert (state.sealed_segments, state.sealed_rows, state.failing) == (0, 0, None)
    assert layout.commits() == before
    assert numbers_in_parquet(layout.directory) == list(range(5))
    assert layout.epochs() == []


def test_what_somebody_else_put_beside_a_segment_stays(layout: Layout) -> None:
    one = written(layout.directory, range(5))
    one.close()
    note = layout.epoch(one.epoch) / "note.txt"
    note.write_bytes(b"mine")
    state = seal_by_hand(SealerSettings(layout.directory))
    assert (state.sealed_rows, state.failing) == (5, None)
    assert note.read_bytes() == b"mine"
    assert (note.parent / "lock").exists()


def test_what_a_sink_has_not_shipped_is_not_deleted(layout: Layout) -> None:
    written(layout.directory, range(5)).close()
    later = NOON * 10**6 + 400 * 86_400 * 10**6
    for sinks, left in ((("postgres",), list(range(5))), ((), [])):
        sealer = Sealer(SealerSettings(layout.directory, sinks=sinks), lambda: later)
        sealer.open()
        sealer.seal()
        sealer.keep()
        sealer.close()
        assert numbers_in_parquet(layout.directory) == left


def test_only_one_seals(layout: Layout) -> None:
    first = Sealer(SealerSettings(layout.directory), now_us)
    first.open()
    with pytest.raises(SealerBusy, match="its sealer is running"):
        seal_by_hand(SealerSettings(layout.directory))
    first.close()
    assert seal_by_hand(SealerSettings(layout.directory)).failing is None


def test_one_segment_that_fails_does_not_hold_up_the_others(layout: Layout) -> None:
    first, second = written(layout.directory, range(3)), written(layout.directory, range(3, 5))
    first.close()
    second.close()
    path = layout.segment(layout.segments(first.epoch)[0])
    path.rename(path.with_suffix(".aside"))
    path.symlink_to(path.with_suffix(".aside"))  # links are not followed
    state = seal_by_hand(SealerSettings(layout.directory))
    assert "symbolic link" in (state.failing or "")
    assert numbers_in_parquet(layout.directory) == [3, 4]
    path.unlink()
    path.with_suffix(".aside").rename(path)
    assert seal_by_hand(SealerSettings(layout.directory)).failing is None
    assert sorted(numbers_in_parquet(layout.directory)) == list(range(5))
    assert layout.epochs() == []


def test_a_fault_of_ours_does_not_hold_up_the_others_either(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = written(layout.directory, range(3)), written(layout.directory, range(3, 5))
    first.close()
    second.close()
    whole = sealing.seal

    def seal(wals: Layout, segment: Segment, *rest: Any) -> Commit | None:
        if segment.epoch == first.epoch:
            raise KeyError("nobody thought of this")
        return whole(wals, segment, *rest)

    monkeypatch.setattr(sealing, "seal", seal)
    assert "nobody thought" in (seal_by_hand(SealerSettings(layout.directory)).failing or "")
    assert numbers_in_parquet(layout.directory) == [3, 4]


def test_an_epoch_without_a_lock_file_is_recovered_too(layout: Layout) -> None:
    one = written(layout.directory, range(3))
    one.close()
    (layout.epoch(one.epoch) / "lock").unlink()
    private_files.make_directory(layout.epoch(new_epoch()))
    seal_by_hand(SealerSettings(layout.directory))
    assert numbers_in_parquet(layout.directory) == [0, 1, 2]
    assert layout.epochs() == []


def test_the_process_seals_and_ends_with_whoever_started_it(layout: Layout) -> None:
    """Its parent is killed: it seals what that one has left, and ends."""
    settings = SealerSettings(layout.directory, policy=RetentionPolicy(200, {"digits": 400}), sinks=("postgres",))
    script = (
        "import subprocess, sys, time\n"
        "from gateway.inference_log import sealer_settings as s\n"
        "import msgspec\n"
        f"settings = s.SealerSettings(s.Path({str(layout.directory)!r}))\n"
        "child = subprocess.Popen(s.command(settings))\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    assert str(layout.directory) in sealer_settings.command(settings)
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.stdout.close()

    def state() -> SealerState | None:
        return private_files.read_json(layout.sealer_state, SealerState)

    until(lambda: (found := state()) is not None and found.pid == pid, 60.0, "it did not report")
    assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    one = written(layout.directory, range(4), WriterSettings(sync_ms=1.0, segment_bytes=1))
    until(lambda: len(numbers_in_parquet(layout.directory)) == 4, 60.0, "it did not seal")
    one.close()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not _runs(pid), 60.0, "it outlived its parent")
    found = state()
    assert found is not None
    assert (found.sealed_rows, found.failing) == (4, None)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_sigterm_ends_it_with_everything_sealed(layout: Layout) -> None:
    written(layout.directory, range(4)).close()
    child = subprocess.Popen(sealer_settings.command(SealerSettings(layout.directory)))
    until(layout.sealer_state.exists, 60.0, "it did not report")
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 0
    assert numbers_in_parquet(layout.directory) == list(range(4))


def test_a_directory_that_cannot_be_used_is_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"")
    command = sealer_settings.command(SealerSettings(tmp_path / "log"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not a directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_hundred_killed_writers_keep_every_synced_row_exactly_once(tmp_path: Path) -> None:
    """All in one directory, with a sealer that works on it meanwhile and is killed now and then too."""
    rng = random.Random(5)
    directory = tmp_path / "log"
    command = sealer_settings.command(SealerSettings(directory))
    sealing = subprocess.Popen(command)
    synced: dict[str, int] = {}
    for epoch, rows in killed_writers(directory, [rng.random() * 0.03 for _ in range(100)]):
        synced[epoch] = rows
        if len(synced) % 10 == 0:
            sealing.send_signal(signal.SIGKILL)
            sealing.wait()
            sealing = subprocess.Popen(command)
    sealing.send_signal(signal.SIGKILL)
    sealing.wait()
    assert len(synced) == 100
    seal_by_hand(SealerSettings(directory))
    layout = Layout(directory)
    assert layout.epochs() == []
    rows_of: dict[str, int] = dict.fromkeys(synced, 0)
    for commit in layout.commits().values():
        rows_of[commit.epoch] += commit.rows
        assert not [loss for loss in commit.losses if not loss.torn]
    numbers = sorted(numbers_in_parquet(directory))
    expected = sorted(n for rows in rows_of.values() for n in range(rows))
    assert numbers == expected, "a hole, or something twice"
    assert all(rows_of[epoch] >= rows for epoch, rows in synced.items())
