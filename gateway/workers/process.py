"""The worker process: hosts instances of models and runs batches. Started by the gateway, never by people.

Leader and followers: every thread blocks in `recvmsg` on the same socket, and the thread that receives a
frame does what it asks and answers it itself. A batch therefore never hops between threads, an idle worker
uses no CPU at all, and there is always one thread more than batches that may be in flight, so that a long
run blocks nobody else.

Rules:
- A frame that cannot be believed ends the process: its gateway sees the end of the stream and starts a
  fresh one.
- The end of the stream ends the process at once; so does the death of the parent (PR_SET_PDEATHSIG).
- Signals that end a service (SIGTERM, SIGINT, SIGHUP) are ignored: the gateway drains first, then closes
  the stream.
- The working directory is one that no longer exists: onnxruntime resolves external data against it, and
  must not be talked into reading files that nobody verified.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final, NoReturn

from gateway.protocol import ipc
from gateway.workers.board import SEATS, Seat, adopt
from gateway.workers.bundle import BundleError, read_bundle
from gateway.workers.session import (
    RUNTIME_VERSION,
    Feed,
    ModelRefusedError,
    Output,
    RunError,
    Session,
    clean_text,
    new_interrupt,
)
from gateway.workers.shm import AreaError, Buffer, read_file

EXIT_BAD_FRAME: Final = 70
"""sysexits.h EX_SOFTWARE."""

_PR_SET_PDEATHSIG: Final = 1
PLANS_KEPT: Final = 256
"""Distinct RUN payloads remembered: batch sizes times buffers."""
_ANCILLARY: Final = socket.CMSG_SPACE(8 * array.array("i").itemsize)


class Hosted:
    """One instance: its session and the lock that keeps its runs apart."""

    __slots__ = ("lock", "session", "slots")

    def __init__(self, session: Session, slots: int) -> None:
        self.session = session
        self.slots = slots
        self.lock = threading.Lock()


class Plan:
    """A RUN, worked out: which session, which outputs, and its inputs as views of shared memory.

    The same payload means the same memory in the same form, so a plan serves every batch with that payload as long
    as its buffer stays mapped. Only inputs that are views can: strings are read out of the memory anew each time.

    Raises:
        FrameError: the batch names inputs or outputs that the model does not have.
        RunError: shapes and bytes contradict each other.
    """

    __slots__ = ("_feeds", "_run", "_session", "buffer", "hosted", "lasting", "names", "outputs")

    def __init__(self, run: ipc.Run, hosted: Hosted, buffer: Buffer) -> None:
        session = hosted.session
        if max((item.index for item in run.inputs), default=0) >= max(1, len(session.signature.inputs)):
            raise ipc.FrameError("RUN names an input that the model does not have")
        if max(run.outputs, default=0) >= len(session.signature.outputs):
            raise ipc.FrameError("RUN names an output that the model does not have")
        self.hosted = hosted
        self.buffer = buffer
        self.outputs = run.outputs
        self.names = session.output_names(run.outputs)
        self.lasting = session.views_only
        self._run = run
        self._session = session
        self._feeds = self._read() if self.lasting else None

    def feeds(self) -> dict[str, Feed]:
        return self._read() if self._feeds is None else self._feeds

    def _read(self) -> dict[str, Feed]:
        view = self.buffer.input.view
        return self._session.feeds(
            [(item.index, item.shape, view[item.offset : item.offset + item.nbytes]) for item in self._run.inputs]
        )


class Host:
    """Everything the process holds. `serve` is run by every thread."""

    def __init__(self, name: str, connection: socket.socket, generation: int, board: memoryview) -> None:
        self._name = name
        self._socket = connection
        self._generation = generation
        self._hosted: dict[int, Hosted] = {}
        self._buffers: dict[int, Buffer] = {}
        self._plans: dict[bytes, Plan] = {}
        self._board = board
        self._seats: list[Seat] = []
        self._threads = 1
        self._growing = threading.Lock()

    def greet(self) -> None:
        hello = ipc.encode_hello(ipc.Hello(os.getpid(), RUNTIME_VERSION))
        self._answer(ipc.HELLO, 0, hello)

    def serve(self) -> NoReturn:
        """Receive and obey until the stream ends."""
        frame = memoryview(bytearray(ipc.FRAME_LIMIT))
        seat = self._sit()
        try:
            while True:
                size, ancillary, flags, _ = self._socket.recvmsg_into([frame], _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
                if size == 0:
                    os._exit(0)
                if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                    raise ipc.FrameError("frame or its descriptors were cut off")
                self._obey(seat, frame[:size], _descriptors(ancillary) if ancillary else [])
        except ConnectionError:
            os._exit(0)
        except ipc.FrameError as error:
            self._give_up(f"frame refused: {error}")
        except BaseException as error:
            self._give_up(f"internal error: {type(error).__name__}: {clean_text(str(error))}")

    def _sit(self) -> Seat:
        with self._growing:
            seat = Seat(self._board, len(self._seats), new_interrupt())
            self._seats.append(seat)
        return seat

    def _give_up(self, why: str) -> NoReturn:
        with contextlib.suppress(OSError):
            os.write(2, f"worker {self._name}: {why}; it is restarted\n".encode())
        os._exit(EXIT_BAD_FRAME)

    def _obey(self, seat: Seat, frame: memoryview, fds: list[int]) -> None:
        kind, identity, payload = ipc.decode(frame, self._generation)
        if kind == ipc.RUN:
            self._run(seat, identity, payload, fds)
        elif kind == ipc.CANCEL:
            self._cancel(identity)
        elif kind == ipc.LOAD:
            self._load(identity, ipc.decode_load(payload), fds)
        elif kind == ipc.UNLOAD:
            self._plans.clear()
            self._hosted.pop(ipc.decode_number(payload), None)
            self._answer(ipc.UNLOADED, identity)
        elif kind == ipc.DETACH:
            self._plans.clear()
            buffer = self._buffers.pop(ipc.decode_number(payload), None)
            if buffer is not None:
                buffer.close()
        else:
            raise ipc.FrameError(f"frame kind {kind} is not for workers")

    def _answer(self, kind: int, identity: int, payload: bytes = b"") -> None:
        self._socket.send(ipc.encode(kind, self._generation, identity, payload))

    # --- Loading --------------------------------------------------------------------------------------

    def _load(self, identity: int, load: ipc.Load, fds: list[int]) -> None:
        if len(fds) not in (1, 2):
            raise ipc.FrameError("LOAD brings one descriptor, or two for a model with external data")
        try:
            model, external = _read(fds)
            session = Session(model, load.intra_op_threads, external)
            reply = ipc.encode(ipc.LOADED, self._generation, identity, ipc.encode_signature(session.signature))
        except (ModelRefusedError, BundleError, ipc.FrameTooLargeError) as error:
            self._answer(ipc.FAILED, identity, str(error).encode())
            return
        self._hosted[load.instance] = Hosted(session, load.slots)
        self._follow_slots()
        self._socket.send(reply)

    def _follow_slots(self) -> None:
        """One thread per batch that may be in flight, and one that is free for everything else."""
        with self._growing:
            wanted = min(SEATS, 1 + sum(hosted.slots for hosted in list(self._hosted.values())))
            while self._threads < wanted:
                threading.Thread(target=self.serve, daemon=True).start()
                self._threads += 1

    # --- Running --------------------------------------------------------------------------------------

    def _run(self, seat: Seat, identity: int, payload: memoryview, fds: list[int]) -> None:
        began = time.perf_counter_ns()
        seat.take(identity)
        form = bytes(payload)
        plan = None if fds else self._plans.get(form)
        try:
            if plan is None:
                plan = self._plan(form, fds)
            with plan.hosted.lock:
                seat.begin(identity)
                reply = _execute(plan, began, self._generation, identity, seat.interrupt)
        except (RunError, ipc.FrameTooLargeError) as error:
            seat.finish(identity)
            if seat.cancelled:
                self._answer(ipc.CANCELLED, identity)
            else:
                self._answer(ipc.FAILED, identity, str(error).encode())
            return
        seat.finish(identity)
        self._socket.send(reply)

    def _cancel(self, identity: int) -> None:
        """Another thread may have received the batch this very moment and not said so yet: look twice."""
        for pause in (0.001, 0.0):
            if any(seat.cancel(identity) for seat in list(self._seats)):
                return
            time.sleep(pause)

    def _plan(self, form: bytes, fds: list[int]) -> Plan:
        run = ipc.decode_run(memoryview(form))
        buffer = self._buffer(run, fds)
        hosted = self._hosted.get(run.instance)
        if hosted is None:
            raise ipc.FrameError(f"RUN names instance {run.instance}, which is not loaded")
        plan = Plan(run, hosted, buffer)
        if plan.lasting:
            if len(self._plans) >= PLANS_KEPT:
                self._plans.clear()
            self._plans[form] = plan
        return plan

    def _buffer(self, run: ipc.Run, fds: list[int]) -> Buffer:
        if fds:
            if len(fds) != 2 or run.buffer in self._buffers:
                raise ipc.FrameError("RUN brings exactly two descriptors, once per buffer")
            self._buffers[run.buffer] = Buffer.adopt(run.buffer, *fds)
        try:
            buffer = self._buffers[run.buffer]
            if run.input_size > buffer.input.size:
                self._plans.clear()  # they look at the old mapping
                buffer.input.follow(run.input_size)
        except KeyError:
            raise ipc.FrameError(f"RUN names buffer {run.buffer}, which is not attached") from None
        except AreaError as error:
            raise ipc.FrameError(str(error)) from None
        return buffer


def _execute(plan: Plan, began: int, generation: int, identity: int, interrupt: Any) -> bytes:
    """Run one batch and leave its outputs in the buffer; returns the RESULT frame. `began`: `perf_counter_ns`.

    Raises:
        RunError, FrameTooLargeError: the batch failed, the instance is unharmed.
    """
    session, buffer = plan.hosted.session, plan.buffer
    feeds = plan.feeds()
    fed = time.perf_counter_ns()
    values = session.run(feeds, plan.names, interrupt)
    inferred = time.perf_counter_ns()
    places = _store(session.collect(plan.outputs, values), buffer)
    stored = time.perf_counter_ns()
    result = ipc.Result(buffer.output.size, fed - began, inferred - fed, stored - inferred, places)
    return ipc.encode_result(generation, identity, result)


def _store(outputs: list[Output], buffer: Buffer) -> tuple[ipc.ResultOutput, ...]:
    places = []
    at = 0
    for output in outputs:
        places.append(ipc.ResultOutput(output.index, output.datatype, output.shape, at, len(output.data)))
        at = ipc.aligned(at + len(output.data))
    try:
        buffer.output.reserve(at)
    except OSError as error:
        raise RunError(f"no shared memory for {at} bytes of output: {error.strerror}") from None
    view = buffer.output.view
    for place, output in zip(places, outputs, strict=True):
        if place.nbytes:
            view[place.offset : place.offset + place.nbytes] = output.data
    return tuple(places)


def _read(fds: list[int]) -> tuple[bytes, dict[str, memoryview]]:
    """A model's bytes and its external data; the descriptors are closed. Raises BundleError."""
    try:
        return read_file(fds[0]), read_bundle(fds[1]) if len(fds) == 2 else {}
    finally:
        for fd in fds:
            os.close(fd)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


# --- Start --------------------------------------------------------------------------------------------


def _die_with(parent: int) -> None:
    """Arrange for SIGKILL when the parent dies; it may have died already, before the arrangement."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def _die_first() -> None:
    """When memory runs out, a worker is to go and not the gateway, nor anything else on the machine: its batches are
    run again, and it is started again."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def _leave_directories() -> None:
    directory = Path(tempfile.mkdtemp(prefix="gateway-worker-"))
    os.chdir(directory)
    directory.rmdir()


def main(arguments: list[str]) -> NoReturn:
    """Arguments: name, descriptor of the socket, generation, process id of the parent, descriptor of the board."""
    name, descriptor, generation, parent, board = arguments
    _die_with(int(parent))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _leave_directories()
    _die_first()
    connection = socket.socket(fileno=int(descriptor))
    connection.setblocking(True)
    connection.set_inheritable(False)
    host = Host(name, connection, int(generation), adopt(int(board)))
    with contextlib.suppress(ConnectionError):  # a gateway that is gone already: `serve` sees it too
        host.greet()
    host.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
