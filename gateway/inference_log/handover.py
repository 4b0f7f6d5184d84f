"""From settled requests to frames: the part of the inference log that runs on the event loop.

Who writes an answer says so here (`answered`, `refused`): one call, which adds one tuple to what is noted for that
model version. At the end of the event loop's turn what was noted becomes one frame (rare: several, where tensors are
large), which goes to the outlet.

Rules and invariants:
* Each settled request is noted once, by whoever counts it; a request that was noted becomes a row of exactly one frame.
* Tensors are read when the frame is made. Nobody changes them after they were handed over: inputs are views of bytes
  that their request owns, outputs belong to the finished batch.
* Every row is written. `sampling` is about payloads only, of answered requests; others always keep theirs.
* A request that is refused because the log is full has no row: a gap record counts it (outlet.py).
* Texts of a client are bounded before they are kept.
* `flush` raises nothing: a frame that cannot be made is counted as lost, and what others noted is written.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast

from gateway.core.batch import FinishedBatch
from gateway.core.log_policy import LOG_POLICY, LogPolicy
from gateway.core.model import ModelSpec
from gateway.core.request import NO_PARAMETERS, InferRequest, OutputTensor
from gateway.errors import GatewayError, LogUnavailable
from gateway.inference_log import frame
from gateway.inference_log.draft import Draft
from gateway.inference_log.frame import NO_BATCH, Detail, Row, Stream
from gateway.inference_log.outlet import Outlet, OutletStatistics

log = logging.getLogger("gateway.inference_log")

FRAME_BYTES: Final = 1024 * 1024
"""Of tensors in one frame, roughly; a single row may have more."""
MAX_TEXT: Final = 1024
"""Characters kept of an error's text, of an OIP `id`, and of the name of a model that is not served."""


class Caller(NamedTuple):
    """What a request's headers or metadata say about it; looked up once per remembered head."""

    request_id: str | None = None
    """The client's own X-Request-Id."""
    trace_id: str | None = None


NOBODY: Final = Caller()


@dataclass(frozen=True, slots=True)
class Wall:
    """The wall clock and the monotonic one, to be read together."""

    wall_ns: Callable[[], int]
    monotonic: Callable[[], float]


class VersionLog:
    """Notes what happens to the requests of one model version, and makes frames of it."""

    def __init__(self, owner: InferenceLog, spec: ModelSpec | None, policy: LogPolicy) -> None:
        """`spec`: None for requests that mean no version."""
        self.variant = ""
        """champion, canary or shadow; empty: the model's traffic is not split."""
        self.policy = policy
        self._owner = owner
        self._spec = spec
        self._name = spec.name if spec is not None else ""
        self._version = spec.version if spec is not None else ""
        self._draft = Draft()
        self._named = {"": self}
        self._sampling = policy.sampling
        self._blocks = policy.overflow == "block"

    def __repr__(self) -> str:
        return f"<VersionLog {self._name or 'unresolved'}/{self._version} noted={self.noted}>"

    def named(self, variant: str) -> VersionLog:
        """Where requests are noted that are answered under this name: a frame has one, and a version that is promoted
        still answers requests of its time as a canary."""
        found = self._named.get(variant)
        if found is None:
            found = self._named[variant] = VersionLog(self._owner, self._spec, self.policy)
            found.variant, found._named = variant, self._named
        return found

    @property
    def noted(self) -> int:
        """Requests that are in no frame yet."""
        return len(self._draft.rows)

    @property
    def blocked(self) -> bool:
        """Whether requests are refused now for want of room."""
        return self._blocks and self._owner.outlet.blocked

    def check(self) -> None:
        """To be asked before a request is decoded.

        Raises:
            LogUnavailable: its row would find no room, and the model does not answer without one.
        """
        if self.blocked:
            raise LogUnavailable(
                "the inference log cannot take more at present, and this model does not answer without it; retry later"
            )

    # -- what is noted -----------------------------------------------------------------------------------------------

    def answered(
        self,
        request: InferRequest,
        request_id: bytes,
        total_s: float,
        protocol: str,
        endpoint: str,
        grpc_code: int | None,
        caller: Caller,
        served: Sequence[OutputTensor] | None = None,
        cause: str | None = None,
    ) -> None:
        """A request was answered from its batch.

        Args:
            total_s: from `request.received` until now.
            served: the answer's tensors, where they are not the request's rows of the batch's outputs.
            cause: see `Detail.cause`.
        """
        if request.nbytes > FRAME_BYTES:
            self.flush()  # where there is no room for this one there may be for those before it
        draft = self._draft
        rows = draft.rows
        if not rows:
            self._owner.arm(self)
        batch: FinishedBatch = request.batch
        detail = None
        row, attempt = request.row, request.attempt
        if batch.parts is None:
            place = draft.place if batch is draft.batch else draft.enter(batch, len(rows))
        else:
            attempt = attempt or batch.attempt  # the parts were tried, not the whole
            place, row, detail = draft.enter_parts(batch, row, request.received, len(rows))
        if cause is not None or (
            request.parameters is not NO_PARAMETERS
            or request.unused is not NO_PARAMETERS
            or request.sequence is not None
            or request.priority
            or request.stated_timeout_s
        ):
            detail = _with(detail or Detail(), _parameters(request), cause)
        sampling = self._sampling
        kept = request if sampling >= 1.0 or self._owner.draw() < sampling else None
        oip_id = request.request_id
        if oip_id is not None and len(oip_id) > MAX_TEXT:
            oip_id = oip_id[:MAX_TEXT]
        rows.append(
            (
                request_id, request.received, total_s, protocol, endpoint, 200, grpc_code, request.rows,
                attempt, place, row, sampling, caller[0], oip_id, caller[1], detail,
            )
        )  # fmt: skip
        # Nothing before this line may leave a trace if it fails: the next row would get this one's tensors.
        draft.requests.append(kept)
        if served is not None:
            draft.served[len(rows) - 1] = served
        draft.nbytes += request.nbytes + draft.row_bytes * request.rows
        if draft.nbytes > FRAME_BYTES:
            self.flush()

    def refused(
        self,
        error: GatewayError,
        request: InferRequest | None,
        request_id: bytes,
        received: float,
        total_s: float,
        protocol: str,
        endpoint: str,
        grpc_code: int | None,
        caller: Caller,
        asked: tuple[str, str] | None = None,
        cause: str | None = None,
    ) -> None:
        """A request ended without an answer. Raises nothing: the caller may not have been told yet.

        Args:
            request: None: it was refused before it was decoded.
            received: monotonic seconds.
            asked: model and version as the client wrote them, where they mean none that is served.
        """
        if isinstance(error, LogUnavailable):
            self._owner.outlet.refused(self._name, self._version)
            return
        try:
            self._refused(
                error, request, request_id, received, total_s, protocol, endpoint, grpc_code, caller, asked, cause
            )
        except Exception:
            self.failed()

    def _refused(
        self,
        error: GatewayError,
        request: InferRequest | None,
        request_id: bytes,
        received: float,
        total_s: float,
        protocol: str,
        endpoint: str,
        grpc_code: int | None,
        caller: Caller,
        asked: tuple[str, str] | None,
        cause: str | None,
    ) -> None:
        if request is not None and request.nbytes > FRAME_BYTES:
            self.flush()
        draft = self._draft
        if not draft.rows:
            self._owner.arm(self)
        model, version = asked if asked is not None else (None, None)
        detail = Detail(
            str(error)[:MAX_TEXT],
            error.reason,
            request.avoid if request is not None else None,
            None if model is None else model[:MAX_TEXT],
            None if version is None else version[:MAX_TEXT],
            None if request is None else _parameters(request),
            cause=cause,
        )
        oip_id = request.request_id if request is not None else None
        draft.rows.append(
            Row(
                request_id,
                received,
                total_s,
                protocol,
                endpoint,
                error.status,
                grpc_code,
                request.rows if request is not None else 0,
                request.attempt if request is not None else 0,
                NO_BATCH,
                0,
                1.0,
                caller.request_id,
                None if oip_id is None else oip_id[:MAX_TEXT],
                caller.trace_id,
                detail,
            )
        )
        draft.requests.append(request)
        draft.failed.add(len(draft.rows) - 1)
        draft.nbytes += request.nbytes if request is not None else 0
        if draft.nbytes > FRAME_BYTES:
            self.flush()

    def shadowed(self, request: InferRequest, request_id: bytes, ended_s: float, cause: str | None) -> None:
        """A copy of another version's request was settled here, for comparison; nobody was answered with it.

        `ended_s`: monotonic seconds; `cause`: request id of the original's row, where it is known.
        """
        shadow = self.named("shadow")
        total_s = ended_s - request.received
        if request.error is None:
            try:
                shadow.answered(request, request_id, total_s, "", "shadow", None, NOBODY, None, cause)
            except Exception:  # what waits for the comparison must not wait for ever
                shadow.failed()
            return
        error = request.error
        known = error if isinstance(error, GatewayError) else GatewayError("the shadow failed on this request")
        shadow.refused(known, request, request_id, request.received, total_s, "", "shadow", None, NOBODY, None, cause)

    def failed(self) -> None:
        """Called where noting a request raised: its caller has the answer all the same, and its row counts as lost."""
        log.exception("%r: a request could not be noted; its row is lost", self)
        self._owner.outlet.lose(self._name, self._version, "faulty", 1, 0)

    # -- frames ------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Make a frame of what was noted. A fault in one request's tensors costs no other's."""
        draft = self._draft
        if not draft.rows:
            return
        self._draft = Draft()
        try:
            self._put(draft)
        except Exception:  # whatever it is, no caller and no other version's rows pay for it
            log.exception("%r: %d rows could not be noted and are lost", self, len(draft.rows))
            self._owner.outlet.lose(self._name, self._version, "faulty", len(draft.rows), draft.nbytes)

    def _put(self, draft: Draft) -> None:
        spec, policy = self._spec, self.policy
        try:
            inputs, outputs = draft.columns(spec, policy) if spec is not None else ([], [])
        except Exception:
            log.exception("%r: the tensors of %d rows could not be read together", self, len(draft.rows))
            draft.keep_readable(spec, policy)
            inputs, outputs = draft.columns(spec, policy) if spec is not None else ([], [])
        wall = self._owner.wall
        made = frame.Requests(
            wall.wall_ns(),
            wall.monotonic(),
            self._name,
            self._version,
            spec.digest if spec is not None else "",
            self.variant,
            draft.batches,
            cast("list[Row]", draft.rows),
            inputs,
            outputs,
        )
        self._owner.outlet.put(frame.encode(made), len(draft.rows), policy.overflow, self._name, self._version)


@dataclass(frozen=True, slots=True)
class LogStatistics:
    outlet: OutletStatistics
    noted: int
    """Requests noted in this turn and not yet in a frame."""


class InferenceLog:
    """The log as the serving process sees it; one for the process, used on the event loop's thread."""

    def __init__(
        self, outlet: Outlet, call_soon: Callable[[Callable[[], None]], object], wall: Wall, draw: Callable[[], float]
    ) -> None:
        """`call_soon`: the event loop's. `draw`: a number from 0 to 1, for sampling."""
        self.outlet = outlet
        self.wall = wall
        self.draw = draw
        self._call_soon = call_soon
        self._due: list[VersionLog] = []
        self.unresolved = VersionLog(self, None, LOG_POLICY)
        """For requests that mean no version which is served here."""

    def __repr__(self) -> str:
        return f"<InferenceLog due={len(self._due)} {self.outlet!r}>"

    def of(self, spec: ModelSpec, policy: LogPolicy) -> VersionLog | None:
        """Where the requests of one version are noted; None: its owner wants none of it."""
        return VersionLog(self, spec, policy) if policy.enabled else None

    def event(self, stream: Stream, kind: str, model: str, version: str, details: Mapping[str, object]) -> bool:
        """An entry of a side stream: `details` are JSON values. False: there was no room; it is counted as lost."""
        return self.outlet.event(stream, kind, model, version, details)

    def feedback(self, kind: str, model: str, version: str, details: Mapping[str, object]) -> bool:
        """A label or a human's override for a request; as `event`."""
        return self.outlet.event("feedback", kind, model, version, details)

    def arm(self, version: VersionLog) -> None:
        """`version` has something noted: make frames when this turn is over."""
        if not self._due:
            self._call_soon(self.flush)
        self._due.append(version)

    def flush(self) -> None:
        """Make frames of everything that was noted."""
        due, self._due = self._due, []
        for version in due:
            version.flush()

    def statistics(self) -> LogStatistics:
        return LogStatistics(self.outlet.statistics(), sum(version.noted for version in self._due))


def _parameters(request: InferRequest) -> str | None:
    """What the request's parameters said, as far as it is kept: JSON text; None where it said nothing."""
    own = request.parameters or request.unused
    found: dict[str, Any] = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in own.items()
    }
    if request.sequence is not None:
        step = request.sequence
        found |= {"sequence_id": step.id, "sequence_start": step.start, "sequence_end": step.end}
    if request.priority:
        found["priority"] = request.priority
    if request.stated_timeout_s:
        found["timeout"] = round(request.stated_timeout_s * 1e6)
    return json.dumps(found, ensure_ascii=False) if found else None


def _with(detail: Detail, parameters: str | None, cause: str | None) -> Detail:
    return Detail(
        detail.error, detail.reason, detail.backend, None, None, parameters, detail.executions, detail.queued_s,
        detail.infer_s, cause,
    )  # fmt: skip
