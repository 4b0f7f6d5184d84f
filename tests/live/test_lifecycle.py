"""Start and end of the gateway process: ports, exit codes, draining, and that nothing survives it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.live import models
from tests.live.alone import Alone, check
from tests.live.gateway_process import GatewayProcess, gateway, until
from tests.live.in_process import gather_all
from tests.live.oip_wire import Answer, Request, Tensor, connect

MODELS = {"whole": models.whole_linear(), "heavy": models.slow(512, 24)}
HEAVY_WIDTH = 512
END_S = 60.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.repository(tmp_path_factory.mktemp("lifecycle"), MODELS)


@pytest.fixture
def served(root: Path, tmp_path: Path) -> Iterator[GatewayProcess]:
    """Drains at once; what happens in the delay before is tests/live/test_found_by_attack.py's."""
    config = tmp_path / "gateway.yaml"
    config.write_text("server: {drain_delay_s: 0}\n")
    with gateway("serve", str(root), "-c", str(config), "--workers", "2") as process:
        yield process


def alive(pid: int) -> bool:
    """Whether a process exists and is more than a zombie waiting for its parent."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def all_gone(pids: list[int]) -> Callable[[], bool]:
    return lambda: not any(alive(pid) for pid in pids)


def worker_pids(served: GatewayProcess) -> list[int]:
    pids = [worker["pid"] for worker in served.workers()]
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    return pids


def heavy(rows: int, request_id: str) -> Request:
    """Some ten milliseconds and more of work."""
    rng = np.random.default_rng(rows)
    array = rng.standard_normal((rows, HEAVY_WIDTH)).astype(np.float32)
    return Request("heavy", [Tensor("x", "FP32", array, binary=True)], [("y", True)], request_id=request_id)


READY = b"GET /v2/health/ready HTTP/1.1\r\nHost: test\r\n\r\n"


# -- ending ----------------------------------------------------------------------------------------------------------


def test_sigterm_under_load_answers_everything_accepted(served: GatewayProcess) -> None:
    """Each connection holds several requests when the signal comes. All are answered; ready is 503 meanwhile."""
    pids = worker_pids(served)
    alone = Alone(MODELS["heavy"])
    body = len(heavy(48, "0-0").encode().partition(b"\r\n\r\n")[2])

    async def client(number: int) -> list[Answer]:
        async with connect(served.port) as connection:
            for turn in range(4):
                await connection.send(heavy(48, f"{number % 10}-{turn}").encode())
            return [await connection.receive() for _ in range(4)]

    def all_accepted() -> bool:
        answered = served.metric("gateway_requests_total")  # first: what moves in between is missed, not doubled
        return answered + served.metric("gateway_http_held_bytes") // body >= 4 * 16

    async def story() -> None:
        async with connect(served.port) as observer:
            # A request of which a part has arrived may still be finished; others find the connection closed.
            await observer.send(READY[:-2])
            for pid in pids:  # so that requests are still unanswered when the signal comes, on a slow machine too
                os.kill(pid, signal.SIGSTOP)
            try:
                clients = [asyncio.create_task(client(number)) for number in range(16)]
                await wait_until(all_accepted)
                served.process.send_signal(signal.SIGTERM)
                await wait_until(lambda: "stopping: answering" in served.output())
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
            await observer.send(READY[-2:])
            not_ready = await observer.receive()
            assert await observer.closed()
            answers = await gather_all(list(clients))
        assert not_ready.status == 503
        assert not_ready.header("Connection") == "close"
        for number, own in enumerate(answers):
            for turn, answer in enumerate(own):
                check(heavy(48, f"{number % 10}-{turn}"), answer, alone, 1e-5)
        assert any(own[-1].header("Connection") == "close" for own in answers)

    asyncio.run(story())
    found = re.search(r"stopping: answering (\d+) accepted requests", served.output())
    assert found is not None
    assert int(found[1]) > 0, "nothing was under way, so nothing was put to the test"
    assert served.process.wait(END_S) == 0
    until(all_gone(pids), END_S, "workers outlived the gateway")


async def wait_until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(until, condition, END_S, "it did not come about")


def test_a_stopping_gateway_takes_no_new_connections(served: GatewayProcess) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as held:
        held.sendall(heavy(60, "x").encode() * 20)
        until(lambda: served.metric("gateway_queue_rows") > 0, END_S, "nothing waits")
        served.process.send_signal(signal.SIGTERM)
        until(lambda: "stopping: answering" in served.output(), END_S, "no drain")
        assert not takes_connections(served.port)
    assert served.process.wait(END_S) == 0


def takes_connections(port: int) -> bool:
    """Whether a new connection is taken; one that the kernel took and the gateway never will is not."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=END_S) as connection:
            connection.sendall(READY)
            return connection.recv(1) != b""
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_gateway_ends_with_0(served: GatewayProcess, number: int) -> None:
    pids = worker_pids(served)
    with socket.create_connection(("127.0.0.1", served.port)) as idle:
        assert served.stop(number) == 0
        assert idle.recv(1) == b""
    until(all_gone(pids), END_S, "workers outlived the gateway")
    assert "Traceback" not in served.output()


def test_a_second_signal_ends_it_at_once(served: GatewayProcess) -> None:
    """A client in the middle of an upload holds the drain open; the second signal does not wait for it."""
    pids = worker_pids(served)
    with socket.create_connection(("127.0.0.1", served.port)) as held:
        request = heavy(60, "x").encode()
        held.sendall(request * 30)
        until(lambda: served.metric("gateway_queue_rows") > 0, END_S, "nothing waits")
        served.process.send_signal(signal.SIGTERM)
        until(lambda: "stopping: answering" in served.output(), END_S, "no drain")
        assert served.process.poll() is None
        assert served.stop(signal.SIGTERM) != 0
    until(all_gone(pids), END_S, "workers outlived the gateway")


def test_workers_do_not_outlive_a_killed_gateway(served: GatewayProcess) -> None:
    pids = worker_pids(served)
    assert served.stop(signal.SIGKILL) == -signal.SIGKILL
    until(all_gone(pids), END_S, "workers outlived the gateway")


def test_a_signal_while_models_load_ends_it(root: Path) -> None:
    process = GatewayProcess("serve", str(root), "--log-level", "debug")
    try:
        # The handlers stand before the ports are bound, which the first output does not tell; a port does.
        until(lambda: bool(listening(process.process.pid)) or process.process.poll() is not None, END_S, "no port")
        assert process.stop(signal.SIGTERM) == 0, process.output()
        assert "Traceback" not in process.output()
    finally:
        process.close()


def listening(pid: int) -> list[str]:
    """Inodes of the TCP sockets a process listens on."""
    sockets = set()
    try:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            target = str(fd.readlink())
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    except OSError:
        return []
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return [line.split()[9] for line in lines if line.split()[3] == "0A" and line.split()[9] in sockets]


# -- starting --------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A gateway that is expected to end by itself."""
    command = [sys.executable, "-m", "gateway", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)


ANY_PORTS = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")


@pytest.mark.parametrize("taken", ["--http-port", "--grpc-port", "--metrics-port"])
def test_a_taken_port_is_exit_3_and_one_line(root: Path, taken: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        port = owner.getsockname()[1]
        done = run("serve", str(root), *ANY_PORTS, taken, str(port))  # the last of several wins
    assert done.returncode == 3, done
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert f"127.0.0.1:{port}" in line
    assert taken in line, "it should say which option to change"


def test_a_broken_model_is_exit_4_and_named(tmp_path: Path) -> None:
    models.repository(tmp_path, {"whole": models.whole_linear(), "broken": b"this is not an ONNX file"})
    done = run("serve", str(tmp_path), *ANY_PORTS)
    assert done.returncode == 4, done
    assert "error: model 'broken' version 1" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server: {http_prot: 8000}\nmodels: [{source: .}]\n", "http_port"),
        ("server: {workers: 0}\n", "workers"),
        ("models: [\n", "gateway.yaml"),
        ("models:\n  - {source: ./nowhere}\n", "nowhere"),
    ],
)
def test_a_bad_configuration_is_exit_2_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text(text)
    done = run("serve", "-c", str(config))
    assert done.returncode == 2, done
    assert "gateway.yaml" in done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_nothing_to_serve_is_exit_2() -> None:
    done = run("serve")
    assert done.returncode == 2
    assert "nothing to serve" in done.stderr


def test_it_starts_again_on_the_port_it_just_left(root: Path) -> None:
    """Even though connections of the first run linger in TIME_WAIT on the gateway's side."""
    with socket.create_server(("127.0.0.1", 0)) as finder:
        port = finder.getsockname()[1]
    arguments = ("serve", str(root / "whole"), "--http-port", str(port))
    for _ in range(2):
        with gateway(*arguments) as served:
            assert served.port == port
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(READY.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
                assert client.makefile("rb").read().startswith(b"HTTP/1.1 200")
            assert served.stop() == 0


# -- idling ----------------------------------------------------------------------------------------------------------


def cpu_s(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def test_an_idle_gateway_uses_no_processor(served: GatewayProcess) -> None:
    """Not even with connections open and requests behind it: under 2 % of one core."""
    for _ in range(20):
        served.infer("whole", {"inputs": [{"name": "x", "shape": [1, 6], "datatype": "FP32", "data": [1.0] * 6}]})
    pids = [served.process.pid, *worker_pids(served)]
    used = []
    with socket.create_connection(("127.0.0.1", served.port)) as idle:
        idle.sendall(READY)
        assert idle.recv(4096)
        for _ in range(3):  # the best of three: what is finished off after the requests above is not idling
            before = cpu_s(pids)
            time.sleep(2.0)  # the measurement itself
            used.append(cpu_s(pids) - before)
            if used[-1] < 0.04:
                break
    assert min(used) < 0.04, used
