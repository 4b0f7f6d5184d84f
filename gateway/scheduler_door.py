"""Why a request is not let in by a scheduler: what it is told, in the order in which the reasons are looked at.

  1. the scheduler is closed, or nobody is left who could execute anything;
  2. it broke backends by itself a short while ago (core/poison.py);
  3. a bound is reached (core/admission.py): of the queue, of it together with whoever waits for another attempt, of
     answers that are held back, of a priority level.
The scheduler asks only where there is reason to: most requests are let in without a look in here.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.core.admission import Rejected, admit, admit_beside, admit_in_order, admit_to_level
from gateway.core.arrival_order import ArrivalOrder
from gateway.core.batch_queue import BatchQueue
from gateway.core.model import ModelSpec
from gateway.core.policy_queue import PolicyQueue
from gateway.core.request import InferRequest
from gateway.dispatcher import Dispatcher
from gateway.errors import GatewayError, PoisonRequest
from gateway.observe.record import ModelStatistics
from gateway.scheduler_replicas import BackendWatch


class Door:
    """Of one scheduler."""

    def __init__(
        self,
        spec: ModelSpec,
        queue: BatchQueue,
        order: ArrivalOrder | None,
        dispatcher: Dispatcher,
        watch: BackendWatch,
        statistics: ModelStatistics,
        clock: Callable[[], float],
        bounded: bool,
    ) -> None:
        """`bounded`: False where somebody before it decides who may wait."""
        self.closed: GatewayError | None = None
        """What newcomers are told; None: they may come in."""
        self.plain = bounded and order is None and not isinstance(queue, PolicyQueue)
        """Whether the queue itself is all that bounds who may wait, as long as its lanes are empty."""
        self._spec = spec
        self._queue = queue
        self._order = order
        self._dispatcher = dispatcher
        self._watch = watch
        self._statistics = statistics
        self._now = clock
        self._bounded = bounded

    def refuse(self) -> None:
        """Raises what newcomers are told, unless it was for want of a backend and one has become usable by itself."""
        if self._watch.since is not None:
            self._watch.look(self._now())
        refusal = self.closed or self._watch.hopeless
        if refusal is not None:
            self._statistics.reject(refusal.reason)
            raise type(refusal)(str(refusal))

    def keep_out(self, request: InferRequest) -> None:
        """Raises PoisonRequest: it broke backends before, all by itself."""
        if self._dispatcher.failures.denied(request, self._now()):
            self._statistics.reject(PoisonRequest.reason)
            raise PoisonRequest(
                f"model '{self._spec.name}' failed on this very input alone a short while ago; it is not executed again"
            )

    def why_not(self, request: InferRequest) -> Rejected | None:
        """The bound that stands in its way; None: none does."""
        if not self._bounded:
            return None
        queue, policy, lanes = self._queue, self._spec.policy, self._dispatcher.lanes
        rejected = admit(queue, policy, request)
        if rejected is None and lanes.count:
            rejected = admit_beside(queue, lanes.rows, lanes.nbytes, policy, request)
        if rejected is None and self._order is not None:
            rejected = admit_in_order(queue, self._order, policy, request)
        if rejected is None and isinstance(queue, PolicyQueue):
            rejected = admit_to_level(queue, request)
        return rejected

    def __repr__(self) -> str:
        return f"<Door of {self._spec.name}/{self._spec.version}{' closed' if self.closed is not None else ''}>"
