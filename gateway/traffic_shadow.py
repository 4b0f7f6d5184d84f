"""The mirror of one champion: a share of its requests is sent to a shadow too, and the two answers are compared.

Nobody waits for a shadow, and nobody is answered by it. Rules:
  * a copy is made when the champion's answer is written, and begins behind it: the caller has what it asked for, and
    what failed is not repeated. What the caller is told (`Inference-Shadow`) means: a copy was made;
  * copies are bounded in rows and bytes, from the champion's answer to the comparison. Beyond that a request is not
    mirrored, but counted (`full`): a slow or hanging shadow costs copies, nothing else;
  * making and comparing copies is for the event loop's leisure (traffic_leisure.py); where it has none, a request is
    not mirrored (`busy`). So a gateway under full load mirrors few requests, and answers hardly fewer;
  * a copy has the shadow's own deadline, no priority, and no place in the response cache;
  * requests of sequences are not mirrored: a shadow that sees only some of the steps would answer nonsense.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from gateway.catalog import ServedVersion
from gateway.core.assembly import slice_rows
from gateway.core.inner_request import inner_request
from gateway.core.model import ModelSpec
from gateway.core.ragged import Ragged
from gateway.core.request import InferRequest, InputTensor, OutputTensor, Settle
from gateway.core.shadow_comparison import ComparisonStatistics, ShadowComparison, Tolerance
from gateway.errors import Cancelled, GatewayError
from gateway.provenance.headers import UUID7_RANDOM_BYTES, shadow_header, uuid7_block
from gateway.traffic import TOLD_EVERY_S, Chance
from gateway.traffic_leisure import Leisure

log = logging.getLogger("gateway.traffic")

MAX_ROWS: Final = 1024
"""Of copies that are not compared yet; one request of more rows may stand alone."""
MAX_BYTES: Final = 64 * 1024 * 1024
"""Inputs and outputs of copies that are not compared yet."""
LOT_BYTES: Final = 1024 * 1024
"""Outputs that are compared in one turn of the event loop: about two milliseconds."""

Dropped = Literal["full", "busy", "unready", "refused"]
DROPPED: Final[tuple[Dropped, ...]] = ("full", "busy", "unready", "refused")
"""`full`: too many copies were waiting for the shadow; `busy`: the event loop had no time; `unready`: the shadow could
not answer; `refused`: it did not take the copy, its queue being full."""


@dataclass(frozen=True, slots=True)
class ShadowRule:
    """`share`: 0 to 1, of the champion's requests."""

    share: float
    tolerance: Tolerance


@dataclass(frozen=True, slots=True)
class MirrorStatistics:
    champion: str
    """Version whose answers are the measure."""
    share: float
    mirrored: int
    """Requests that were copied."""
    dropped: dict[Dropped, int]
    """Requests of the share that were not."""
    failed: int
    """Copies that the shadow gave no answer to."""
    pending_rows: int
    pending_bytes: int
    compared: ComparisonStatistics


class Mirror:
    """Of one champion and one shadow; hangs on the champion as `ServedVersion.mirror`."""

    def __init__(
        self,
        champion: ServedVersion,
        shadow: ServedVersion,
        rule: ShadowRule,
        infer: Callable[[ServedVersion, InferRequest], None],
        chance: Chance | None = None,
        clock: Callable[[], float] = time.monotonic,
        leisure: Leisure | None = None,
    ) -> None:
        """`infer`: the entry of every request (`Pipeline.infer`, past the cache). `clock`: the schedulers'."""
        self.shadow = shadow
        self.rule = rule
        """Its share may be changed at any time; its tolerance belongs to this mirror."""
        self.header = shadow_header(shadow.spec.name, shadow.spec.version, shadow.spec.digest)
        self.comparison = ShadowComparison(rule.tolerance)
        self.mirrored = self.failed = 0
        self.dropped: dict[Dropped, int] = dict.fromkeys(DROPPED, 0)
        self._champion = champion.spec
        self._wiring = _Wiring(champion.spec, shadow.spec)
        self._infer = infer
        self._draw = (chance or random.Random()).random  # noqa: S311  # a sample
        self._now = clock
        self._loop = asyncio.get_running_loop()
        self._under_way: dict[int, InferRequest] = {}
        self._rows = self._nbytes = 0
        self._lot: deque[tuple[_Copy, list[OutputTensor]]] = deque()
        self._leisure = leisure or Leisure(clock)
        self._closed = False
        self._told = -math.inf
        self._differing = self._compared = 0

    # -- what the pipeline does ------------------------------------------------------------------------------------

    def consider(self, request: InferRequest) -> None:
        """The champion is about to take `request`: draw it, or not."""
        if self._draw() >= self.rule.share or request.sequence is not None or self._closed:
            return
        if self._leisure.left():
            request.settle = _Mirrored(self, request.settle)
        else:
            self.dropped["busy"] += 1

    def copy(self, request: InferRequest) -> _Copy | None:
        """A copy of a request that was answered; None: there is no room for one, which is counted."""
        reason = self._obstacle(request)
        if reason is not None:
            self.dropped[reason] += 1
            return None
        begun = self._now()
        copy = _Copy(request, self._answer(request))
        self._leisure.spent(begun)
        self.mirrored += 1
        self._rows += copy.rows
        self._nbytes += copy.nbytes
        return copy

    def begin(self, copy: _Copy) -> None:
        """The caller's answer is written: send the copy, in a turn of its own."""
        self._loop.call_soon(self._send, copy)

    # -- in between ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Mirror no more, and give up what is under way. The counters stay."""
        self._closed = True
        for request in list(self._under_way.values()):
            request.abort()
        self._lot.clear()

    def statistics(self) -> MirrorStatistics:
        return MirrorStatistics(
            self._champion.version,
            self.rule.share,
            self.mirrored,
            dict(self.dropped),
            self.failed,
            self._rows,
            self._nbytes,
            self.comparison.statistics(),
        )

    def _obstacle(self, request: InferRequest) -> Dropped | None:
        if self._closed or not self.shadow.ready:
            return "unready"
        if self._rows and self._rows + request.rows > MAX_ROWS:
            return "full"
        if self._nbytes and self._nbytes + request.nbytes > MAX_BYTES:
            return "full"
        return None

    def _answer(self, request: InferRequest) -> list[OutputTensor]:
        """What the caller got, of the outputs it asked for, copied: it keeps nothing of the batch alive."""
        outputs = []
        for index in request.outputs:
            whole = request.batch.outputs[index]
            own = slice_rows(whole, request.row, request.rows) if self._champion.batched else whole
            outputs.append(OutputTensor(own.name, own.datatype, own.shape, bytes(own.data)))
        return outputs

    def _send(self, copy: _Copy) -> None:
        begun = self._now()
        try:
            if self._closed:
                raise Cancelled("the mirror is closed")
            request = self._wiring.request(copy)
            request.received = begun
            request.settle = partial(self._ended, copy)
            self._under_way[id(request)] = request
            try:
                self._infer(self.shadow, request)
            except BaseException:
                del self._under_way[id(request)]
                raise
        except Exception as error:
            if not isinstance(error, GatewayError):
                log.error("model %s: a copy could not be sent to the shadow", self._champion.name, exc_info=error)
            self.dropped["refused"] += 1
            self._over(copy)
        self._leisure.spent(begun)

    def _ended(self, copy: _Copy, request: InferRequest) -> None:
        """The shadow answered, or did not."""
        del self._under_way[id(request)]
        if self.shadow.log is not None and not self._closed:
            block = uuid7_block(time.time_ns() // 1_000_000, os.urandom(UUID7_RANDOM_BYTES), 1)
            self.shadow.log.shadowed(request, block[0], self._now(), copy.cause.decode() or None)
        if self._closed or request.error is not None:
            self.failed += not self._closed
            self._over(copy)
            return
        outputs = [request.batch.outputs[index] for index in self._wiring.outputs_of(copy)]
        if self.shadow.spec.batched:
            outputs = [slice_rows(output, request.row, request.rows) for output in outputs]
        # Of its batch-mates nothing is kept alive for longer than until the next turn.
        self._lot.append((copy, outputs))
        if len(self._lot) == 1:
            self._loop.call_soon(self._compare)

    def _compare(self) -> None:
        begun = self._now()
        lot: list[tuple[_Copy, list[OutputTensor]]] = []
        nbytes = 0
        while self._lot and nbytes < LOT_BYTES:
            copy, outputs = self._lot.popleft()
            lot.append((copy, outputs))
            nbytes += copy.nbytes
        if self._lot:
            self._loop.call_soon(self._compare)
        try:
            agreed = self.comparison.compare([(copy.answer, outputs) for copy, outputs in lot])
        except ValueError as error:
            log.error("model %s: answers of the shadow could not be compared: %s", self._champion.name, error)
            self.failed += len(lot)
        else:
            self._compared += len(agreed)
            self._differing += len(agreed) - sum(agreed)
        for copy, _ in lot:
            self._over(copy)
        self._leisure.spent(begun)
        self._tell(begun)

    def _over(self, copy: _Copy) -> None:
        self._rows -= copy.rows
        self._nbytes -= copy.nbytes

    def _tell(self, now: float) -> None:
        if not self._differing or now - self._told < TOLD_EVERY_S:
            return
        worst = max(self.comparison.statistics().outputs, key=lambda seen: seen.differing)
        spread = "" if worst.max_absolute is None else f", by up to {worst.max_absolute:.4g}"
        log.warning(
            "model %s: of %d answers of the shadow (version %s), %d differ from those of version %s; output %s differs "
            "most often%s", self._champion.name, self._compared, self.shadow.version, self._differing,
            self._champion.version, worst.output, spread,
        )  # fmt: skip
        self._told, self._differing, self._compared = now, 0, 0

    def __repr__(self) -> str:
        return f"<Mirror {self._champion.name} {self._champion.version}→{self.shadow.version} mirrored={self.mirrored}>"


class _Mirrored:
    """In place of a drawn request's `settle`."""

    __slots__ = ("_mirror", "_settle")

    def __init__(self, mirror: Mirror, settle: Settle) -> None:
        self._mirror = mirror
        self._settle = settle

    def __call__(self, request: InferRequest, /) -> None:
        mirror, copy = self._mirror, None
        if request.error is None:
            try:
                copy = mirror.copy(request)
            except Exception:  # whatever it was, the caller gets an answer
                log.exception("an answer could not be copied for the shadow")
        if copy is not None:
            request.told = mirror.header
        self._settle(request)
        if copy is not None:
            copy.cause = getattr(request, "answer_id", b"")
            mirror.begin(copy)


class _Copy:
    """What is kept of a request until its copy is compared."""

    __slots__ = ("answer", "cause", "inputs", "nbytes", "outputs", "rows")

    def __init__(self, request: InferRequest, answer: list[OutputTensor]) -> None:
        self.cause = b""
        """Request id that the inference log knows the original by; empty: it does not."""
        self.inputs = request.inputs
        self.rows = request.rows
        self.outputs = request.outputs
        self.answer = answer
        self.nbytes = request.nbytes + sum([len(output.data) for output in answer])


class _Wiring:
    """Which input and output of the champion is which of the shadow."""

    def __init__(self, champion: ModelSpec, shadow: ModelSpec) -> None:
        """The two are compatible (core/signature_compatibility.py)."""
        self._spec = shadow
        places = {tensor.name: place for place, tensor in enumerate(champion.inputs)}
        self._inputs = [places.get(tensor.name) for tensor in shadow.inputs]
        places = {tensor.name: place for place, tensor in enumerate(shadow.outputs)}
        self._outputs = [places[tensor.name] for tensor in champion.outputs]

    def outputs_of(self, copy: _Copy) -> list[int]:
        """The shadow's outputs to compare, in the champion's order."""
        return [self._outputs[index] for index in copy.outputs]

    def request(self, copy: _Copy) -> InferRequest:
        inputs: tuple[InputTensor | None, ...] = tuple(
            [None if place is None else copy.inputs[place] for place in self._inputs]
        )
        first = next(tensor for tensor in inputs if tensor is not None)
        rows = first.shape[0] if self._spec.batched else 1
        return inner_request(self._spec, inputs, rows, tuple(sorted(self.outputs_of(copy))), _NOBODY)


_NOBODY: Final = InferRequest((), 0, 0, None, (), None)
"""Whose place in line copies have: the last priority that nobody stated."""


def unmirrorable(champion: ModelSpec) -> str:
    """Why no request to this model can be mirrored, in words; empty: they can."""
    if champion.scheduling.sequence is not None:
        return "its requests are steps of sequences, and a shadow that sees only some of them would answer nonsense"
    if Ragged.of(champion) is not None:
        return "its rows differ in shape, and such answers cannot be compared row by row"
    return ""
