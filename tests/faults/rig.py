"""A scenario's rig: backends or workers, a gateway in front, clients, a watch; and the phases that all scenarios share.

    before (fault-free, measured) → during (from `inject`) → after (from `heal`) → `finish`: checked and added up

Rules: the load never stops between the phases; everything that was started is ended, whatever happens; bounds on times
are figures (`hard=False`), bounds on counts are claims that must hold on any machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.faults import nonce
from tests.faults.behaviour import Pace
from tests.faults.checker import Verdict, check
from tests.faults.history import RIGHT, Window, outcome_name
from tests.faults.load import Load, Profile
from tests.faults.processes import left_behind, open_files, resident_mib
from tests.faults.proxy import Proxy
from tests.faults.results import Result
from tests.faults.servers import BackendProcess, GatewayServer, Where, eventually, metric
from tests.faults.watch import Watch

PACE: Final = Pace(0.008, 0.0002)
"""A backend's ordinary pace: 64 rows in 21 ms, 3,070 rows a second at most."""
UTILISATION: Final = 0.6
FLOOR_ROWS: Final = 1024
"""Retries that the budget allows whatever the load: 2 · max_batch_size · slots."""
FULL_SHARE: Final = 0.7
"""Of a fair share of the rows: a replica that has it back has recovered."""


@dataclass
class Run:
    """How scenarios are to be run."""

    quick: bool = False
    """A few seconds each, at a low rate: for counts, not for figures."""
    minutes: float = 5.0
    """Length of the scenarios that are a matter of minutes."""
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="faults-")))

    def seconds(self, full: float, quick: float) -> float:
        return quick if self.quick else full

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Rig:
    """What a scenario works with. Made by `remote` or `workers`."""

    def __init__(self, run: Run, gateway: GatewayServer, backends: Sequence[BackendProcess], profile: Profile) -> None:
        self.run = run
        self.gateway = gateway
        self.backends = list(backends)
        self.profile = profile
        self.watch = Watch(gateway.operations_port)
        self.load = Load(gateway.port, profile)
        self.proxies: dict[int, Proxy] = {}
        """By the index of the backend behind."""
        self.idempotent = True
        self.notes: list[str] = []
        self.utilisation = UTILISATION
        """Of what the rig is measured to bear; the load's rate in full runs, unless the profile is a closed loop."""
        self._began = self._injected = self._healed = 0.0
        self._files = open_files(gateway.child.pid)
        self._memory_mib = resident_mib(gateway.child.pid)

    async def before(self, full_s: float = 4.0, quick_s: float = 1.0) -> None:
        """Find out what the rig bears (not in quick runs); start the load; let it warm up; measure it without fault."""
        if self.profile.rate and not self.run.quick:
            capacity = await self._capacity()
            self.profile = replace(self.profile, rate=min(self.profile.rate, self.utilisation * capacity))
            self.load = Load(self.gateway.port, self.profile)
            self.notes.append(f"{self.profile.rate:.0f} requests/s of {capacity:.0f} that it bears")
        self.load.start()
        await asyncio.sleep(self.run.seconds(2.0, 0.5))
        await self.watch.start()
        self._began = time.monotonic()
        await asyncio.sleep(self.run.seconds(full_s, quick_s))

    async def _capacity(self) -> float:
        """Requests per second that clients in a closed loop get answered."""
        profile = replace(self.profile, rate=0.0, connections=48, leave=0.0, poison=0.0, seed=99)
        greedy = Load(self.gateway.port, profile)
        greedy.start()
        await asyncio.sleep(1.5)
        began = time.monotonic()
        await asyncio.sleep(2.5)
        answered = greedy.history.window(began).right / (time.monotonic() - began)
        await greedy.stop()
        return answered

    async def inject(self, action: Awaitable[object] | None = None) -> None:
        """From here on the fault is there."""
        self._injected = time.monotonic()
        if action is not None:
            await action

    async def hold(self, full_s: float, quick_s: float = 1.5) -> None:
        await asyncio.sleep(self.run.seconds(full_s, quick_s))

    async def heal(self, action: Awaitable[object] | None = None) -> None:
        """From here on the fault is gone."""
        self._healed = time.monotonic()
        if action is not None:
            await action

    async def after(self, full_s: float = 15.0, quick_s: float = 2.0) -> None:
        await asyncio.sleep(self.run.seconds(full_s, quick_s))

    async def close(self) -> None:
        """End what asks the gateway, whatever the scenario has come to."""
        await self.watch.stop()
        self.load.close()
        await asyncio.sleep(0)  # the loop closes the sockets

    # --- What was seen ----------------------------------------------------------------------------------------------

    @property
    def during(self) -> Window:
        """From the fault to its end, or to now."""
        return self.load.history.window(self._injected, self._healed or time.monotonic())

    @property
    def afterwards(self) -> Window:
        return self.load.history.window(self._healed)

    @property
    def baseline(self) -> Window:
        return self.load.history.window(self._began, self._injected)

    @property
    def injected_at(self) -> float:
        return self._injected

    @property
    def healed_at(self) -> float:
        return self._healed

    def detected_s(self, backend: str) -> float | None:
        """From the fault until the gateway says that it sends `backend` nothing more."""
        change = self.watch.first(backend, self._injected, usable=False)
        return None if change is None else change.at - self._injected

    def recovered_s(self, backend: str, of: int) -> float | None:
        """From the end of the fault until `backend` has its full share of a second's rows, as one of `of`."""
        history = self.load.history
        ended, rows = history.column("ended"), history.column("rows")
        mine = history.column("backend") == (history.backends.index(backend) if backend in history.backends else -1)
        chosen = (history.column("outcome") == RIGHT) & (ended >= self._healed)
        if not chosen.any():
            return None
        bins = ((ended[chosen] - self._healed) / 0.5).astype(int)
        everyone = np.bincount(bins, rows[chosen])
        his = np.bincount(bins[mine[chosen]], rows[chosen][mine[chosen]], len(everyone))
        for n in range(len(everyone) - 1):
            if his[n : n + 2].sum() >= FULL_SHARE / of * everyone[n : n + 2].sum() > 0:
                return 0.5 * (n + 1)
        return None

    def arrivals(self, backend: BackendProcess, since: float, until: float = float("inf")) -> int:
        """Clients' batches that reached a backend within [since, until)."""
        first = self.load.history.nonce[0]
        return sum(
            since <= record.at < until and bool((record.nonces & ~np.int64(nonce.POISON) >= first).all())
            for record in backend.executions()
            if record.kind == 1 and len(record.nonces)
        )

    # --- The end ----------------------------------------------------------------------------------------------------

    async def finish(self, result: Result, *, errors: int | None = 0, victim: str = "") -> Result:
        """Stop the load and add everything up.

        Args:
            result: where it goes.
            errors: most requests that may fail; None: the scenario says so itself.
            victim: backend whose detection and recovery are measured.
        """
        await self.load.stop()
        await self.watch.stop()
        history = self.load.history
        whole = history.window()
        verdict = self._verdict()
        result.requests, result.rows, result.errors = whole.requests, whole.rows, whole.errors
        result.lost, result.wrong, result.duplicated = verdict.lost, verdict.wrong, verdict.duplicated
        result.outcomes = {outcome_name(kind): count for kind, count in whole.outcomes.items()}
        result.texts = dict(history.texts)
        result.p99_before_s = self.baseline.p99_s
        if self._injected:
            result.p99_during_s = self.during.p99_s
        if self.backends:
            result.amplification = verdict.amplification
        if victim:
            result.detect_s = self.detected_s(victim)
            if self._healed:
                result.recover_s = self.recovered_s(victim, len(self.backends) or 3)
        result.notes += self.notes
        self._claims(result, verdict, errors)
        await self._quiet(result)
        return result

    def _verdict(self) -> Verdict:
        logs = [backend.executions() for backend in self.backends] if self.backends else None
        return check(self.load.history, logs, idempotent=self.idempotent)

    def _claims(self, result: Result, verdict: Verdict, errors: int | None) -> None:
        result.at_most("rows lost", verdict.lost, 0)
        result.at_most("rows answered wrong", verdict.wrong, 0)
        result.at_most("rows answered without an execution", verdict.unexplained, 0)
        result.at_most("malformed or undocumented answers", verdict.malformed, 0)
        result.at_most("requests for which no client was free", self.load.history.unsent, 0, hard=False)
        result.at_most("answers that leak a backend's text", self.load.leaks, 0)
        if errors is not None:
            result.at_most("failed requests", result.errors, errors)
        if not self.idempotent:
            result.at_most("rows executed twice", verdict.duplicated, 0)
        if self.backends:
            again = verdict.executions - verdict.rows
            result.at_most("rows executed again", again, 0.1 * verdict.rows + FLOOR_ROWS)

    async def _quiet(self, result: Result) -> None:
        """Ten seconds after the load everything is as it was: nothing waits, no descriptors are left over (I5)."""
        pid = self.gateway.child.pid
        if not self.gateway.child.alive:
            result.at_most("gateways that ended by themselves", 1, 0)
            return
        spare = 8 + 9 * max(1, len(self.backends))
        with contextlib.suppress(AssertionError):
            await eventually(lambda: self._waiting() == 0, 10.0, "rows still wait")
        with contextlib.suppress(AssertionError):
            await eventually(lambda: open_files(pid) <= self._files + spare, 10.0, "descriptors are still open")
        result.at_most("rows that still wait 10 s later", self._waiting(), 0)
        result.at_most("descriptors left over", open_files(pid) - self._files, spare)
        result.at_most("MiB of memory gained", resident_mib(pid) - self._memory_mib, 300)
        text = self.gateway.metrics()
        slow = metric(text, "gateway_event_loop_lag_seconds_count") - metric(
            text, "gateway_event_loop_lag_seconds_bucket", le="0.05"
        )
        result.at_most("event loop stalls over 50 ms", slow, 0, hard=False)

    def _waiting(self) -> float:
        return metric(self.gateway.metrics(), "gateway_queue_rows")


@contextlib.asynccontextmanager
async def remote(
    run: Run,
    count: int = 3,
    *,
    protocol: str = "http",
    pace: Pace = PACE,
    model: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
    proxied: Sequence[int] = (),
    edit: Callable[[list[dict[str, Any]]], None] | None = None,
    profile: Profile | None = None,
    utilisation: float = UTILISATION,
    where: Where | None = None,
) -> AsyncIterator[Rig]:
    """Programmable backends `b1`, `b2`, … in front of which a gateway stands.

    Args:
        protocol: `http`, `grpc` or `mixed` (by turns).
        model: further keys of the model's entry.
        server: further keys of the server's section.
        proxied: backends, by index, that the gateway reaches through a proxy only.
        edit: changes the entries of the backends before the gateway reads them.
        profile: of the load; its rate is replaced unless it is 0.
        utilisation: of what the backends can do.
        where: the gateway's surroundings.
    """
    folder = Path(tempfile.mkdtemp(dir=run.folder))
    async with contextlib.AsyncExitStack() as stack:
        backends = [BackendProcess(f"b{n + 1}", folder, pace, seed=n + 1) for n in range(count)]
        for backend in backends:
            stack.callback(backend.close)
        for backend in backends:
            await backend.wait_started()
        entries, proxies = [], {}
        for n, backend in enumerate(backends):
            scheme = "grpc" if protocol == "grpc" or (protocol == "mixed" and n % 2) else "http"
            port = backend.grpc_port if scheme == "grpc" else backend.http_port
            if n in proxied:
                proxies[n] = Proxy(port)
                stack.push_async_callback(proxies[n].close)
                await proxies[n].start()
                port = proxies[n].port
            entries.append({"name": backend.name, "url": f"{scheme}://127.0.0.1:{port}"})
        if edit is not None:
            edit(entries)
        entry = {"name": nonce.MODEL, "backends": entries, **(model or {})}
        gateway = GatewayServer(folder, [], {"server": server or {}, "models": [entry]}, where)
        stack.callback(gateway.close)
        await gateway.wait_started()
        profile = profile or Profile(rate=1.0)
        capacity = count * nonce.MAX_BATCH / pace.time_s(nonce.MAX_BATCH) / profile.mean_rows
        rig = Rig(run, gateway, backends, with_rate(run, profile, utilisation * capacity))
        rig.proxies, rig.utilisation = proxies, utilisation
        stack.push_async_callback(rig.close)
        yield rig


@contextlib.asynccontextmanager
async def workers(
    run: Run,
    count: int = 3,
    *,
    poison: str = "none",
    work: int = 10,
    rate: float = 2000.0,
    model: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
    profile: Profile | None = None,
    where: Where | None = None,
) -> AsyncIterator[Rig]:
    """The model on `count` of the gateway's own workers.

    Args:
        poison, work: of `nonce.graph`.
        rate: requests per second at most.
    """
    folder = Path(tempfile.mkdtemp(dir=run.folder))
    repository = nonce.repository(folder / "models", poison=poison, work=work)
    entry = {"name": nonce.MODEL, "source": str(repository / nonce.MODEL), "instances": count, **(model or {})}
    config = {"server": {"workers": count, **(server or {})}, "models": [entry]}
    with contextlib.closing(GatewayServer(folder, [], config, where)) as gateway:
        await gateway.wait_started()
        rig = Rig(run, gateway, [], with_rate(run, profile or Profile(rate=1.0), rate))
        try:
            yield rig
        finally:
            await rig.close()


def with_rate(run: Run, profile: Profile, rate: float) -> Profile:
    """The profile at `rate`, at a low one for quick runs; one without a rate (closed loop) stays so."""
    return replace(profile, rate=min(rate, 120.0) if run.quick else rate) if profile.rate else profile


async def none_left(timeout_s: float = 10.0) -> int:
    """Processes of the rig that are alive although all scenarios have ended: must come to 0."""
    await asyncio.sleep(0)  # connections to them are closed
    with contextlib.suppress(AssertionError):
        await eventually(lambda: not left_behind(), timeout_s, "processes are left")
    return len(left_behind())
