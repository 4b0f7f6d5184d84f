"""The rig itself: it sees what it claims to see. One negative control for each thing that the checker looks for."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from tests.faults import nonce
from tests.faults.backend import Backend
from tests.faults.backend_log import ARRIVED, EXECUTED, ExecutionLog, read
from tests.faults.behaviour import Behaviour, Fault, Pace
from tests.faults.checker import check
from tests.faults.history import BROKEN_OFF, LEFT, MALFORMED, OPEN, RIGHT, TWICE, UNSENT, WRONG, History
from tests.faults.load import Load, Profile
from tests.faults.load_grpc import GrpcLoad
from tests.faults.processes import Child, left_behind
from tests.faults.proxy import Proxy, Toxic
from tests.faults.registry import SCENARIOS as REGISTERED
from tests.faults.report import cells, summary, verdict
from tests.faults.results import Result
from tests.faults.servers import eventually, metric


@contextlib.asynccontextmanager
async def backend(folder: Path, pace: Pace | None = None) -> AsyncIterator[Backend]:
    made = Backend(folder / "log", pace or Pace(0.0005, 0.0))
    await made.start()
    try:
        yield made
    finally:
        await made.close()


async def ask(port: int, requests: int = 20, **more: float) -> Load:
    """A closed loop of a few requests."""
    load = Load(port, Profile(rate=0.0, connections=4, **more))  # type: ignore[arg-type]
    load.start()
    await eventually(lambda: len(load.history) >= requests, 30.0, "the load stands still", every_s=0.001)
    await load.stop()
    return load


# --- Clients and backend ----------------------------------------------------------------------------------------------


async def test_a_healthy_backend_answers_every_row_and_logs_it(tmp_path: Path) -> None:
    async with backend(tmp_path) as made:
        load = await ask(made.http_port, json=0.5)
    window = load.history.window()
    assert window.right == window.requests >= 20
    verdict_ = check(load.history, [read(tmp_path / "log")], idempotent=False)
    assert verdict_.clean
    assert verdict_.executions == verdict_.rows == verdict_.answered
    assert (verdict_.amplification, verdict_.most_executions) == (1.0, 1)


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Fault.RESET_BEFORE, BROKEN_OFF),
        (Fault.RESET_AFTER, BROKEN_OFF),
        (Fault.RESET_MID, BROKEN_OFF),
        (Fault.CLOSE_MID, BROKEN_OFF),
        (Fault.GARBAGE, BROKEN_OFF),
        (Fault.BAD_JSON, MALFORMED),
        (Fault.ROW_MORE, WRONG),
        (Fault.ROW_LESS, WRONG),
        (Fault.NO_ROWS, WRONG),
        (Fault.WRONG_DATATYPE, WRONG),
        (Fault.WRONG_SHAPE, WRONG),
        (Fault.WRONG_NAME, WRONG),
        (Fault.MISSING_OUTPUT, MALFORMED),
        (Fault.LIE, WRONG),
        (Fault.SLICED, RIGHT),
        (Fault.STATUS, 500),
    ],
)
async def test_a_client_without_a_gateway_sees_every_fault(tmp_path: Path, fault: Fault, outcome: int) -> None:
    async with backend(tmp_path) as made:
        await made.behave(Behaviour(fault))
        load = await ask(made.http_port, json=0.0)
        assert made.counters()["injected"] >= 20
    outcomes = load.history.window().outcomes
    # A binary answer of no rows has no blob: it cannot be told from JSON without `data`.
    assert set(outcomes) <= {outcome, MALFORMED if outcome == WRONG else outcome}
    assert load.leaks == 0


async def test_a_backends_text_in_a_refusal_is_a_leak_unless_its_model_refused(tmp_path: Path) -> None:
    async with backend(tmp_path) as made:
        for status, leaks in ((502, True), (503, True), (500, False)):
            await made.behave(Behaviour(Fault.STATUS, status=status))
            load = await ask(made.http_port)
            assert load.leaks == (len(load.history) if leaks else 0)


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Fault.NONE, RIGHT),
        (Fault.SLICED, RIGHT),
        (Fault.LIE, WRONG),
        (Fault.ROW_LESS, WRONG),
        (Fault.WRONG_NAME, WRONG),
        (Fault.MISSING_OUTPUT, MALFORMED),
        (Fault.STATUS, 500),
        (Fault.RESET_MID, 503),
        (Fault.GOAWAY, 503),
        (Fault.REFUSED_STREAM, 503),
    ],
)
async def test_grpcs_own_client_sees_every_fault(tmp_path: Path, fault: Fault, outcome: int) -> None:
    async with backend(tmp_path) as made:
        await made.behave(Behaviour(fault))
        load = GrpcLoad(made.grpc_port, callers=2)
        load.start()
        await eventually(lambda: len(load.history) >= 8, 30.0, "the load stands still", every_s=0.001)
        await load.stop()
    assert set(load.history.window().outcomes) == {outcome}


async def test_faults_end_after_so_many_times_and_hit_a_share(tmp_path: Path) -> None:
    async with backend(tmp_path) as made:
        await made.behave(Behaviour(Fault.STATUS, times=3))
        assert (await ask(made.http_port)).history.window().outcomes[500] == 3
        await made.behave(Behaviour(Fault.STATUS, share=0.5))
        window = (await ask(made.http_port, 100)).history.window()
        assert 0.2 * window.requests < window.outcomes[500] < 0.8 * window.requests


async def test_a_backend_that_does_not_listen_refuses_and_comes_back_on_its_port(tmp_path: Path) -> None:
    async with backend(tmp_path) as made:
        port = made.http_port
        await made.behave(Behaviour(listening=False))
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)
        await made.behave(Behaviour())
        assert (await ask(port)).history.window().errors == 0


async def test_a_poisoned_row_fails_its_request_alone(tmp_path: Path) -> None:
    async with backend(tmp_path) as made:
        load = await ask(made.http_port, 60, poison=0.2)
    outcome = load.history.column("outcome")
    guilty = np.isin(np.arange(len(outcome)), list(load.poisoned))
    assert guilty.any()
    assert set(outcome[guilty]) == {500}
    assert set(outcome[~guilty]) == {RIGHT}


async def test_clients_that_leave_are_counted_apart(tmp_path: Path) -> None:
    async with backend(tmp_path, Pace(0.05, 0.0)) as made:
        load = await ask(made.http_port, 12, leave=1.0, leave_after_s=0.001)
    window = load.history.window()
    assert window.left > 0
    assert window.errors == 0
    assert int((load.history.column("outcome") == LEFT).sum()) == window.left


# --- The checker ------------------------------------------------------------------------------------------------------


def history(*outcomes: int, rows: int = 2) -> History:
    made = History()
    for number, outcome in enumerate(outcomes):
        index = made.new(float(number), 1000 + rows * number, rows)
        if outcome:
            made.end(index, number + 0.5, outcome, "b1", 1)
    return made


def log(folder: Path, *executed: list[int]) -> Path:
    path = folder / "log"
    writer = ExecutionLog(path)
    for nonces in executed:
        writer.write(ARRIVED, np.array(nonces, np.int64))
        writer.write(EXECUTED, np.array(nonces, np.int64))
    writer.close()
    return path


def test_the_checker_passes_what_is_right(tmp_path: Path) -> None:
    logs = [read(log(tmp_path, [1000, 1001, 1002, 1003]))]
    assert check(history(RIGHT, RIGHT), logs, idempotent=False).clean


def test_the_checker_finds_a_lost_request(tmp_path: Path) -> None:
    assert check(history(RIGHT, 0), [read(log(tmp_path, [1000, 1001]))]).lost == 2


def test_the_checker_finds_a_wrong_answer_and_a_second_one(tmp_path: Path) -> None:
    logs = [read(log(tmp_path, [1000, 1001, 1002, 1003]))]
    assert check(history(RIGHT, WRONG), logs).wrong == 2
    twice = history(RIGHT, RIGHT)
    twice.end(0, 2.0, RIGHT)
    assert twice.outcome[0] == TWICE
    assert check(twice, logs).wrong == 2


def test_the_checker_finds_a_row_that_ran_twice(tmp_path: Path) -> None:
    logs = [read(log(tmp_path, [1000, 1001], [1001, 1002, 1003]))]
    verdict_ = check(history(RIGHT, RIGHT), logs, idempotent=False)
    assert (verdict_.duplicated, verdict_.most_executions, verdict_.amplification) == (1, 2, 1.25)
    assert check(history(RIGHT, RIGHT), logs, idempotent=True).clean


def test_the_checker_finds_an_answer_that_nobody_computed(tmp_path: Path) -> None:
    logs = [read(log(tmp_path, [1000, 1001]))]
    assert check(history(RIGHT, RIGHT), logs).unexplained == 2
    assert check(history(RIGHT, RIGHT), None).clean, "workers keep no log"


def test_probes_and_poison_flags_do_not_disturb_the_count(tmp_path: Path) -> None:
    logs = [read(log(tmp_path, [7], [1000 | nonce.POISON, 1001], [-3, 99_999]))]
    verdict_ = check(history(RIGHT), logs, idempotent=False)
    assert verdict_.clean
    assert verdict_.executions == 2


def test_a_log_that_a_kill_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = log(tmp_path, [1, 2, 3], [4, 5])
    path.write_bytes(path.read_bytes()[:-4])
    assert [record.nonces.tolist() for record in read(path)] == [[1, 2, 3], [1, 2, 3], [4, 5]]
    assert read(tmp_path / "none") == []


# --- The rest of the rig ----------------------------------------------------------------------------------------------


def test_a_window_counts_by_the_instant_a_request_was_due() -> None:
    made = history(RIGHT, 503, RIGHT, LEFT)
    window = made.window(1.0, 3.0)
    assert (window.requests, window.right, window.errors, window.shares) == (2, 1, 1, {"b1": 1.0})
    assert (window.p50_s, window.worst_s) == (0.5, 0.5)
    assert made.window().errors == 1, "who left is no error"


def test_what_was_never_sent_is_neither_lost_nor_an_error() -> None:
    made = history(RIGHT, UNSENT, RIGHT)
    verdict = check(made, None, idempotent=True)
    assert (verdict.lost, verdict.rows, made.window().errors, made.window().requests, made.unsent) == (0, 4, 0, 2, 1)
    assert check(history(RIGHT, OPEN), None, idempotent=True).lost == 2


async def test_a_proxy_passes_everything_on_and_a_black_hole_nothing(tmp_path: Path) -> None:
    async with backend(tmp_path) as made:
        proxy = Proxy(made.http_port)
        await proxy.start()
        assert (await ask(proxy.port)).history.window().errors == 0
        for toxic in (Toxic(slice_bytes=3), Toxic(latency_s=0.002, jitter_s=0.001)):
            proxy.poison(toxic)
            assert (await ask(proxy.port)).history.window().errors == 0
        proxy.poison(Toxic(limit_bytes=900))
        assert BROKEN_OFF in (await ask(proxy.port)).history.window().outcomes
        proxy.poison(Toxic(black_hole=True))
        load = Load(proxy.port, Profile(rate=0.0, connections=3))
        load.start()
        await eventually(lambda: proxy.connections == 3, 30.0, "no connection came through")
        assert load.outstanding == 3
        stopping = asyncio.create_task(load.stop())
        await asyncio.sleep(0)  # it asks no more
        proxy.reset_all()
        await stopping
        assert load.history.window().right == 0
        await proxy.close()


async def test_children_are_found_and_ended(tmp_path: Path) -> None:
    nested = "import subprocess,sys,time; subprocess.Popen([sys.executable,'-c','import time; time.sleep(600)']);"
    child = Child([sys.executable, "-c", nested + "time.sleep(600)"], tmp_path / "out")
    await eventually(lambda: len(left_behind()) == 2, 30.0, "the mark is not inherited")
    child.close()
    await eventually(lambda: not left_behind(), 30.0, "not ended")


def test_a_child_dies_with_the_rig(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time; from tests.faults.processes import Child;"
        "child = Child([sys.executable, '-c', 'import time; time.sleep(600)'], pathlib.Path(sys.argv[1]));"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    rig = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert rig.stdout is not None
    stat = Path(f"/proc/{int(rig.stdout.readline())}/stat")
    assert stat.exists()
    rig.kill()
    rig.wait(30)
    rig.stdout.close()

    def dead() -> bool:
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"

    asyncio.run(eventually(dead, 30.0, "it outlives its rig"))


def test_metrics_are_summed_over_the_labels_asked_for() -> None:
    text = 'a_total{m="x",o="ok"} 2\na_total{m="x",o="bad"} 3\na_total{m="y",o="ok"} 5\nb 7\n'
    assert metric(text, "a_total", m="x") == 5
    assert metric(text, "a_total", o="ok") == 7
    assert metric(text, "b") == 7
    assert metric(text, "c") == 0


def test_the_table_says_what_does_not_hold() -> None:
    result = Result("99", "a fault", "nothing", requests=10, rows=30, injected=2, p99_before_s=0.01, p99_during_s=0.02)
    result.at_most("failed requests", 0, 0)
    assert verdict(result) == "as expected"
    result.at_most("seconds", None, 1.0, hard=False)
    assert verdict(result).startswith("missed: seconds: inf")
    result.at_least("answers", 1, 2)
    assert verdict(result).startswith("BROKEN: answers: 1 (wanted ≥ 2)")
    assert "2.00" in cells(result)
    assert "0 lost, 0 wrong, 0 duplicated; 1 scenarios broken. With 0 of 30" in summary([result])


def test_the_onnx_model_is_the_backends_model() -> None:
    import onnxruntime

    x = np.random.default_rng(3).integers(0, 1 << 60, (9, 1))
    for poison in ("none", "error", "memory", "loop", "crash"):
        session = onnxruntime.InferenceSession(nonce.graph(poison, work=1))
        assert np.array_equal(session.run(None, {"x": x})[0], nonce.answers(x)), poison


def test_scenarios_are_registered_once() -> None:
    from tests.faults.every import SCENARIOS

    assert SCENARIOS is REGISTERED
    assert len(SCENARIOS) > 60
    assert {name[:2] for name in SCENARIOS} >= {f"{n:02}" for n in (*range(1, 13), *range(16, 28))}
