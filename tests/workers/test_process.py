"""The worker process itself, spoken to over its socket, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway.protocol import ipc
from gateway.workers.board import SEATS, Board
from gateway.workers.process import EXIT_BAD_FRAME, Host, Hosted, Plan
from gateway.workers.session import Session
from gateway.workers.shm import Buffer, sealed_file
from gateway.workers.spawn import spawn
from tests.workers.rig import PATIENCE_S, alive, matmul

GENERATION = 3


class Worker:
    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE_S)
        with theirs:
            board = Board()
            self.process = spawn("test", GENERATION, theirs, board.fd)
            board.release()

    def hear(self) -> tuple[int, int, memoryview]:
        return ipc.decode(memoryview(self.socket.recv(ipc.FRAME_LIMIT)), GENERATION)

    def say(self, kind: int, payload: bytes, fds: list[int] | None = None) -> None:
        frame = ipc.encode(kind, GENERATION, 1, payload)
        socket.send_fds(self.socket, [frame], fds or [])

    def end(self) -> int:
        return self.process.wait(PATIENCE_S)


@contextmanager
def greeted() -> Iterator[Worker]:
    worker = Worker()
    kind, _, payload = worker.hear()
    assert kind == ipc.HELLO
    assert ipc.decode_hello(payload).pid == worker.process.pid
    yield worker
    worker.socket.close()
    worker.end()


@pytest.fixture
def worker() -> Iterator[Worker]:
    with greeted() as worker:
        yield worker


def load(worker: Worker, content: bytes) -> tuple[int, memoryview]:
    fd = sealed_file("test", content)
    worker.say(ipc.LOAD, ipc.encode_load(ipc.Load(1, 1, 1)), [fd])
    os.close(fd)
    kind, _, payload = worker.hear()
    return kind, payload


def test_the_end_of_the_stream_ends_it(worker: Worker) -> None:
    worker.socket.close()
    assert worker.end() == 0


def test_it_answers_a_load_with_the_signature(worker: Worker) -> None:
    kind, payload = load(worker, matmul())
    assert kind == ipc.LOADED
    assert ipc.decode_signature(payload).inputs[0].name == "x"


def test_it_answers_a_bad_load_with_the_reason(worker: Worker) -> None:
    kind, payload = load(worker, b"junk")
    assert kind == ipc.FAILED
    assert b"not an ONNX model" in bytes(payload)


def run_frame(instance: int = 1, inputs: int = 0, outputs: tuple[int, ...] = (0,)) -> bytes:
    places = [(index + 7, 0, 0, (0,)) for index in range(inputs)]
    return ipc.encode_run(GENERATION, 1, instance=instance, buffer=1, input_size=0, inputs=places, outputs=outputs)


@pytest.mark.parametrize(
    ("frame", "fds"),
    [
        pytest.param(b"noise", 0, id="noise"),
        pytest.param(ipc.encode(ipc.RESULT, GENERATION, 1), 0, id="not for workers"),
        pytest.param(ipc.encode(ipc.RUN, GENERATION + 1, 1), 0, id="stale"),
        pytest.param(ipc.encode(ipc.LOAD, GENERATION, 1, ipc.encode_load(ipc.Load(1, 1, 1))), 0, id="no model"),
        pytest.param(run_frame(), 0, id="unknown buffer"),
        pytest.param(run_frame(instance=99), 2, id="unknown instance"),
        pytest.param(run_frame(inputs=1), 2, id="unknown input"),
        pytest.param(run_frame(outputs=(5,)), 2, id="unknown output"),
        pytest.param(run_frame(), 1, id="half a buffer"),
    ],
)
def test_a_frame_it_cannot_believe_ends_it(frame: bytes, fds: int, capfd: pytest.CaptureFixture[str]) -> None:
    with greeted() as worker:
        assert load(worker, matmul())[0] == ipc.LOADED
        opened = [os.memfd_create("test") for _ in range(fds)]
        socket.send_fds(worker.socket, [frame], opened)
        for fd in opened:
            os.close(fd)
        assert worker.end() == EXIT_BAD_FRAME
    err = capfd.readouterr().err
    assert err.startswith("worker test: frame refused: ")
    assert err.count("\n") == 1


def test_it_works_nowhere(worker: Worker) -> None:
    """Relative paths, which models may contain, lead nowhere."""
    assert Path(f"/proc/{worker.process.pid}/cwd").readlink().name.endswith("(deleted)")


def test_a_module_in_the_working_directory_shadows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit(99)")
    monkeypatch.chdir(tmp_path)
    worker = Worker()
    assert worker.hear()[0] == ipc.HELLO
    worker.socket.close()
    assert worker.end() == 0


def run_payload(generation: int) -> memoryview:
    frame = ipc.encode_run(generation, 1, instance=1, buffer=1, input_size=0, inputs=[], outputs=(0,))
    return ipc.decode(memoryview(frame), generation)[2]


def test_one_instance_runs_one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    host = Host("test", theirs, GENERATION, memoryview(bytearray(8 * SEATS)).cast("Q"))
    host._hosted[1] = Hosted(Session(matmul(), 1), 2)
    buffer = Buffer.create(1)
    host._buffers[1] = buffer
    inside: list[int] = []
    release = threading.Event()

    def execute(plan: Plan, began: int, generation: int, identity: int, interrupt: object) -> bytes:
        inside.append(identity)
        assert release.wait(PATIENCE_S)
        return b"answer"

    monkeypatch.setattr("gateway.workers.process._execute", execute)
    payload = run_payload(host._generation)
    runs = [threading.Thread(target=host._run, args=(host._sit(), n, payload, [])) for n in range(2)]
    for thread in runs:
        thread.start()
    time.sleep(0.05)  # long enough for a second one to get in, if anything lets it
    assert len(inside) == 1
    release.set()
    for thread in runs:
        thread.join(PATIENCE_S)
    assert sorted(inside) == [0, 1]
    assert [ours.recv(100) for _ in runs] == [b"answer"] * 2
    buffer.close()
    ours.close()
    theirs.close()


ORPHANING_PARENT = """
import os, socket, sys
from gateway.workers.board import Board
from gateway.workers.spawn import spawn
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
process = spawn("orphan", 1, theirs, Board().fd)
os.set_inheritable(ours.fileno(), True)
ours.recv(1000)
print(process.pid, flush=True)
if sys.argv[1] == "stopped":
    os.kill(process.pid, 19)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_it_dies_with_its_parent(state: str) -> None:
    """`stopped`: a process that cannot react is killed by the kernel."""
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHANING_PARENT, state],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == "ready\n"
        assert alive(pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait(PATIENCE_S)
        give_up = time.monotonic() + PATIENCE_S
        while alive(pid):
            assert time.monotonic() < give_up, "an orphan is left"
            time.sleep(0.01)
