"""The gateway's end of one worker process: start it, talk to it, notice its end.

One channel is one process: it is born with the process and never reconnects. Everything that was asked of it ends in
exactly one answer: attempts in `settle`, control questions in their future.

Rules:
- The end is noticed through the end of the stream, at once; the process is reaped through its pidfd, without a
  thread and without waiting. What it had answered by then counts, wherever it still lies.
- A channel is marked lost, and its instances unavailable, before anyone is told: whoever reacts to a lost attempt
  already sees the world without this worker.
- An attempt over its deadline is told to end, and the process is killed if it has not done so `END_S` later. There
  is no timer per attempt, only one `Sweep` for all channels.
- An answer that fails a check, or that this side cannot take in, is worse than none: the process is killed and its
  attempts are broken.
- What goes wrong while a batch is made ready is the batch's fault (SUSPECT), not the worker's: it must not be sent
  around for ever.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from gateway.core.assembly import AssemblyError, write_parts
from gateway.core.outcome import Failure, FailureKind, Success
from gateway.core.request import BatchInput
from gateway.protocol import ipc
from gateway.workers.attempt import Attempt, End, Hosted, LoadRefused, NotSent, WorkerLost, fate, one_line
from gateway.workers.board import Board, Progress
from gateway.workers.deadlines import Sweep
from gateway.workers.shm import AreaError, Buffer
from gateway.workers.spawn import out_of_memory_kills, spawn
from gateway.workers.supervision import FAULTS

TRIM_BYTES: Final = 64 * 1024 * 1024
"""A buffer that grew beyond this is given back instead of being kept for the next batch."""
END_S: Final = 0.1
"""What a run that takes too long is given to end by itself. onnxruntime looks between the nodes of a model: one that is
a single long node does not, and its process has to be killed."""
EXIT_MS: Final = 20
"""Most that is waited for the exit of a process whose stream has ended; it follows within 0.1 ms."""

_log = logging.getLogger("gateway.workers")
_SCM: Final = (socket.SOL_SOCKET, socket.SCM_RIGHTS)


class Channel:
    """See the head of this file. Built by `start`; all methods on the loop's thread."""

    def __init__(
        self,
        sweep: Sweep,
        name: str,
        generation: int,
        process: subprocess.Popen[bytes],
        connection: socket.socket,
        board: Board,
    ) -> None:
        self.name = name
        self.generation = generation
        self.pid = process.pid
        self.lost = False
        self.cause = ""
        """Why it was lost, in words; set by the time `ended` is."""
        self.killed = False
        """We killed it because it hung or talked nonsense."""
        self.on_lost: Callable[[Channel], None] = _ignore
        """Called once when it is lost, before anyone else hears of it."""
        self.suspects: list[Any] = []
        """Models that executed or loaded in the process when it was lost."""
        self.warm: set[Any] = set()
        """Models that answered their warm-up batches in this process."""
        self.in_flight: dict[int, Attempt] = {}
        self.instances: dict[int, Hosted] = {}
        """By the number they have in this process."""
        loop = self._loop = sweep.loop
        self.hello: asyncio.Future[ipc.Hello] = loop.create_future()
        self.ended: asyncio.Future[int] = loop.create_future()
        """Exit code (negative: signal), once the process is gone and reaped."""
        self.out_of_memory_kills = out_of_memory_kills()
        """The kernel's count when the process was started: more at its end may explain it."""
        self._board = board
        self._sweep = sweep
        self._process = process
        self._socket = connection
        self._closing = False
        self._identity = 0
        self._buffers = 0
        self._free: list[Buffer] = []
        self._questions: dict[int, tuple[asyncio.Future[bytes], Any]] = {}
        self._unsent: deque[tuple[bytes, Sequence[int]]] = deque()
        self._drains: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._frame = memoryview(bytearray(ipc.FRAME_LIMIT))
        self._pidfd = os.pidfd_open(process.pid)
        sweep.channels.add(self)
        loop.add_reader(connection.fileno(), self._readable)
        loop.add_reader(self._pidfd, self._exited)

    def __repr__(self) -> str:
        state = "lost" if self.lost else "open"
        return f"<Channel {self.name} pid={self.pid} {state} in_flight={len(self.in_flight)}>"

    @classmethod
    def start(cls, sweep: Sweep, name: str, generation: int) -> Channel:
        """Start a worker process. Raises OSError."""
        board = Board()
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                with theirs:
                    process = spawn(name, generation, theirs, board.fd)
            except BaseException:
                ours.close()
                raise
        finally:
            board.release()
        ours.setblocking(False)
        return cls(sweep, name, generation, process, ours, board)

    # --- Batches --------------------------------------------------------------------------------------------------

    def run(
        self, attempt: Attempt, number: int, inputs: Sequence[BatchInput], outputs: tuple[int, ...], timeout_s: float
    ) -> None:
        """Send a batch to instance `number`.

        A batch that cannot be made ready is settled as SUSPECT, soon and not from inside this call.

        Raises:
            NotSent: the worker is gone or takes nothing more now. The attempt is not in flight and never settled.
        """
        if self.lost:
            raise NotSent(f"worker {self.name} is not running")
        buffer = None
        try:
            buffer = self._free.pop() if self._free else self._new_buffer()
            frame = self._prepare(number, buffer, inputs, outputs)
            deadline = self._loop.time() + timeout_s
            self._sweep.watch(deadline)
            self._deliver(frame, buffer)
        except NotSent:
            if buffer is not None:
                self._release(buffer)
            raise
        except Exception as error:
            self._refuse(attempt, buffer, error)
            return
        attempt.sent(self._identity, buffer, timeout_s, deadline)
        self.in_flight[self._identity] = attempt

    def cancel(self, attempt: Attempt) -> None:
        """End `attempt` early if the model allows it, that is, between two of its nodes. It is settled once, whatever
        it comes to. Harmless if it is not in flight."""
        if not self.lost and self.in_flight.get(attempt.identity) is attempt:
            self._send(ipc.encode(ipc.CANCEL, self.generation, attempt.identity))

    def _refuse(self, attempt: Attempt, buffer: Buffer | None, error: Exception) -> None:
        if not isinstance(error, (OSError, MemoryError, AssemblyError, ipc.FrameTooLargeError)):
            _log.error("a batch for worker %s could not be made ready", self.name, exc_info=error)
        failure = Failure(FailureKind.SUSPECT, f"the batch could not be made ready: {one_line(error)}")
        self._loop.call_soon(self._settle, attempt, failure)
        if buffer is not None:
            self._discard(buffer)  # it may have grown halfway: nobody knows how much memory it holds

    def _deliver(self, frame: bytes, buffer: Buffer) -> None:
        """Raises NotSent; OSError: no worker would be given this frame."""
        try:
            if buffer.announced:
                self._socket.send(frame)
            else:
                self._socket.sendmsg([frame], _rights(buffer.input.fd, buffer.output.fd))
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                raise
            raise NotSent(f"worker {self.name} could not be given the batch: {error}") from None
        buffer.announced = True

    def _prepare(self, number: int, buffer: Buffer, inputs: Sequence[BatchInput], outputs: tuple[int, ...]) -> bytes:
        """Write the inputs into shared memory; returns the RUN frame."""
        places = []
        size = end = 0
        for item in inputs:
            places.append((item.index, size, item.nbytes, item.shape))
            end = size + item.nbytes
            size = ipc.aligned(end)
        area = buffer.input
        if end > area.size:
            area.reserve(end)
        view = area.view
        for item, (_, offset, nbytes, _) in zip(inputs, places, strict=True):
            write_parts(item, view[offset : offset + nbytes])
        self._identity = identity = self._identity + 1
        return ipc.encode_run(
            self.generation, identity,
            instance=number, buffer=buffer.identity, input_size=area.size, inputs=places, outputs=outputs,
        )  # fmt: skip

    def _new_buffer(self) -> Buffer:
        self._buffers += 1
        return Buffer.create(self._buffers)

    def _release(self, buffer: Buffer) -> None:
        if buffer.size > TRIM_BYTES:
            self._discard(buffer)
        else:
            self._free.append(buffer)

    def _discard(self, buffer: Buffer) -> None:
        if buffer.announced:
            self._send(ipc.encode(ipc.DETACH, self.generation, 0, ipc.encode_number(buffer.identity)))
        buffer.close()

    def expire(self, now: float) -> float:
        """Act on attempts over their deadline: first end the run, then the process. Returns the earliest deadline left.

        An answer may lie here unread, if it was this side that was late: it is taken first.
        """
        while not self.lost and self._read():
            pass
        expired = [attempt for attempt in self.in_flight.values() if attempt.deadline <= now]
        if expired:
            progress = self._board.progress()
            running = [a for i, a in self.in_flight.items() if progress.get(i) is Progress.EXECUTING]
            busy = {attempt.instance.number for attempt in running}
            for attempt in expired:
                if attempt not in running and attempt.instance.number in busy:
                    attempt.deadline = now + attempt.timeout_s  # it waits for the one before it
                elif attempt.overdue:
                    blamed = [a.instance.model for a in running if a.overdue]
                    self._end(End.HUNG, "did not answer in time", blamed)
                    return float("inf")
                else:
                    attempt.overdue = True
                    attempt.deadline = now + END_S
                    if attempt in running:
                        self.cancel(attempt)
        return min([attempt.deadline for attempt in self.in_flight.values()], default=float("inf"))

    # --- Questions ------------------------------------------------------------------------------------------------

    async def ask(
        self, kind: int, payload: bytes, fds: Sequence[int] = (), model: Any = None, *, timeout_s: float
    ) -> bytes:
        """Send a control frame and wait for its answer. `model`: who is to blame if the process dies of it.

        Raises:
            WorkerLost: the process ended; if it did not answer in time it is killed.
            LoadRefused: it answered FAILED.
        """
        if self.lost:
            raise WorkerLost(f"worker {self.name} is not running")
        self._identity = identity = self._identity + 1
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._questions[identity] = (answer, model)
        try:
            self._send(ipc.encode(kind, self.generation, identity, payload), fds)
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            self.kill(f"did not answer within {timeout_s:g} s", [] if model is None else [model])
            raise WorkerLost(f"worker {self.name} {self.cause}") from None

    def _send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Send a control frame now, or as soon as the socket takes it: unlike batches they must arrive."""
        if not self._unsent:
            try:
                self._socket.sendmsg([frame], _rights(*fds) if fds else ())
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._writable)
            except OSError:
                return  # the stream has ended: noticed by the reader
            else:
                return
        self._unsent.append((frame, fds))

    def _writable(self) -> None:
        unsent, self._unsent = self._unsent, deque()
        self._loop.remove_writer(self._socket.fileno())
        for frame, fds in unsent:
            self._send(frame, fds)

    async def drained(self, number: int | None = None) -> None:
        """Returns when no attempt on instance `number` (or on any) is in flight."""

        def clear() -> bool:
            if number is None:
                return not self.in_flight
            return all(attempt.instance.number != number for attempt in self.in_flight.values())

        if not clear():
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._drains.append((clear, waiter))
            await waiter

    def _look_at_drains(self) -> None:
        waiting = self._drains
        self._drains = []
        for clear, waiter in waiting:
            if not clear():
                self._drains.append((clear, waiter))
            elif not waiter.done():
                waiter.set_result(None)

    # --- What the worker says -------------------------------------------------------------------------------------

    def _readable(self) -> None:
        self._read()

    def _receive(self) -> int:
        """Bytes of the next frame; 0: the stream has ended, -1: there is nothing now."""
        for _ in range(2):
            try:
                return self._socket.recv_into(self._frame)
            except (BlockingIOError, InterruptedError):
                return -1
            except ConnectionResetError:
                continue  # said once, if the process left something unread; what it had sent comes after that
            except OSError:
                break
        return 0

    def _read(self) -> bool:
        """Take one frame, or the end; returns whether there was one."""
        size = self._receive()
        if size <= 0:
            if size == 0:
                self._died()
            return False
        outcome: Success | Failure | None = None
        try:
            kind, identity, payload = ipc.decode(self._frame[:size], self.generation)
            if kind == ipc.RESULT:
                outcome = self._result(identity, ipc.decode_result(payload))
            elif kind == ipc.FAILED and identity in self.in_flight:
                outcome = Failure(FailureKind.SUSPECT, str(payload, "utf-8", "replace"))
            elif kind == ipc.CANCELLED:
                outcome = self._cancelled(identity)
            else:
                self._answered(kind, identity, payload)
        except Exception as error:
            if not isinstance(error, (ipc.FrameError, AreaError, OSError, MemoryError)):
                _log.error("an answer of worker %s could not be read", self.name, exc_info=error)
            self._end(End.NONSENSE, f"sent an answer that cannot be used ({one_line(error)})", None)
            return False
        if outcome is not None:
            self._finish(identity, outcome)
        return True

    def _cancelled(self, identity: int) -> Failure:
        attempt = self.in_flight.get(identity)
        if attempt is None:
            raise ipc.FrameError("CANCELLED for a batch that is not in flight")
        if attempt.overdue:
            return Failure(FailureKind.TIMEOUT, f"worker {self.name} did not answer in time")
        return Failure(FailureKind.CANCELLED, "nobody waited for it any more")

    def _result(self, identity: int, result: ipc.Result) -> Success | Failure:
        attempt = self.in_flight.get(identity)
        if attempt is None:
            raise ipc.FrameError("RESULT for a batch that is not in flight")
        area = attempt.buffer.output
        if result.output_size > area.size:
            area.follow(result.output_size)
        return attempt.result(result, area.view)

    def _finish(self, identity: int, outcome: Success | Failure) -> None:
        attempt = self.in_flight.pop(identity)
        try:
            # Before the attempt is settled, because settling may send the next batch, which can use the same buffer.
            self._release(attempt.buffer)
            if self._drains:
                self._look_at_drains()
        finally:
            self._settle(attempt, outcome)

    def _settle(self, attempt: Attempt, outcome: Success | Failure) -> None:
        """What listeners get wrong is no fault of the worker."""
        try:
            attempt.settle(outcome)
        except Exception:
            _log.exception("the outcome of a batch on worker %s could not be delivered", self.name)

    def _answered(self, kind: int, identity: int, payload: memoryview) -> None:
        if kind == ipc.HELLO:
            if not self.hello.done():
                self.hello.set_result(ipc.decode_hello(payload))
            return
        question = self._questions.pop(identity, None)
        if question is None:
            raise ipc.FrameError("answer to a question that was not asked")
        answer, _ = question
        if answer.done():
            return
        if kind == ipc.FAILED:
            answer.set_exception(LoadRefused(str(payload, "utf-8", "replace")))
        else:
            answer.set_result(bytes(payload))

    # --- The end --------------------------------------------------------------------------------------------------

    def kill(self, cause: str, suspects: list[Any]) -> None:
        """End a process that misbehaves in what it was asked. `suspects`: the models to blame."""
        self._end(End.HUNG, cause, suspects)

    def _end(self, end: End, cause: str, suspects: list[Any] | None) -> None:
        """Kill it. `suspects`: None for all that were running."""
        if not self.lost:
            self.killed = True
            self._lose(end, cause, suspects)

    def _died(self) -> None:
        if out_of_memory_kills() > self.out_of_memory_kills:
            end = End.NO_MEMORY
        else:
            end = End.CRASHED if self._crashed() else End.DIED
        self._lose(end, "died", None)

    def _crashed(self) -> bool:
        """Whether it ended itself while it executed one batch, and neither loaded nor freed anything: then there is no
        doubt of what."""
        running = [identity for identity, how in self._board.progress().items() if how is Progress.EXECUTING]
        if len(running) != 1 or self._questions:
            return False
        exit_code = self._process.poll()
        if exit_code is None:
            exiting = select.poll()
            exiting.register(self._pidfd, select.POLLIN)
            exiting.poll(EXIT_MS)
            exit_code = self._process.poll()
        return exit_code is not None and -exit_code in FAULTS

    def close(self) -> None:
        """End the process in peace: it exits when its stream does. Attempts still in flight are lost."""
        if not self.lost:
            self._closing = True
            self._lose(End.WISH, "was stopped", [])

    def make_sure(self) -> None:
        """SIGKILL, if the process is still there after `close`."""
        if not self.ended.done():
            self._process.kill()

    @property
    def closing(self) -> bool:
        """Whether the end was our wish."""
        return self._closing

    def _lose(self, end: End, cause: str, suspects: list[Any] | None) -> None:
        self.lost = True
        self.cause = cause
        text = f"worker {self.name} {cause}{' for lack of memory' if end is End.NO_MEMORY else ''}"
        progress = self._board.progress()  # before anybody can go on: a process that hangs is still there
        running = [
            attempt.instance.model
            for identity, attempt in self.in_flight.items()
            if end is End.NONSENSE or progress.get(identity) is Progress.EXECUTING
        ]
        loading = [model for _, model in self._questions.values() if model is not None]
        self.suspects = list(dict.fromkeys(running + loading if suspects is None else suspects))
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._sweep.channels.discard(self)
        self.on_lost(self)
        if not self._closing:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        gone = [instance for instance in self.instances.values() if instance.channel is self]
        for instance in gone:
            instance.channel = None
        self.instances.clear()
        self._fail_all(end, text, progress)
        for instance in gone:
            self._loop.call_soon(instance.changed)

    def _fail_all(self, end: End, text: str, progress: dict[int, Progress]) -> None:
        attempts = list(self.in_flight.items())
        self.in_flight.clear()
        for buffer in [*self._free, *[attempt.buffer for _, attempt in attempts]]:
            buffer.close()
        self._free.clear()
        for answer, _ in self._questions.values():
            if not answer.done():
                answer.set_exception(WorkerLost(text))
        self._questions.clear()
        if not self.hello.done():
            self.hello.set_exception(WorkerLost(text))
            self.hello.exception()  # whoever waited has heard it; nobody need have waited
        self._look_at_drains()
        for identity, attempt in attempts:
            failure = fate(end, progress.get(identity, Progress.NOT_BEGUN), text, overdue=attempt.overdue)
            self._loop.call_soon(self._settle, attempt, failure)

    def _exited(self) -> None:
        """The pidfd is readable: the process is gone, and can be reaped without waiting."""
        exit_code = self._process.wait()
        while not self.lost and self._read():
            pass
        if not self.lost:
            self._died()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.ended.set_result(exit_code)


def _ignore(_: Channel) -> None:
    pass


def _rights(*fds: int) -> list[tuple[int, int, array.array[int]]]:
    return [(*_SCM, array.array("i", fds))]
