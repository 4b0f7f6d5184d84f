"""What a model's owner says about scheduling beyond batch sizes, as plain data (Triton's config.pbtxt, wire notes §5).

One `Scheduling` stands in each `ModelSpec`; its neutral values mean "nothing of this". Times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gateway.core.tensor import Datatype

TimeoutAction = Literal["REJECT", "DELAY"]


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """Bounds on the waiting of one priority level."""

    timeout_action: TimeoutAction = "REJECT"
    """REJECT: 503 when its time is up. DELAY: served after everybody whose time is not."""
    default_timeout_s: float = 0.0
    """0: no timeout."""
    allow_timeout_override: bool = False
    """Whether a request's own `timeout` may shorten `default_timeout_s`."""
    max_queue_size: int = 0
    """Requests, not rows; 0: no bound."""


ControlKind = Literal[
    "CONTROL_SEQUENCE_START", "CONTROL_SEQUENCE_READY", "CONTROL_SEQUENCE_END", "CONTROL_SEQUENCE_CORRID"
]


@dataclass(frozen=True, slots=True)
class ControlInput:
    """An input that the gateway fills to tell a model where in a sequence a row stands."""

    name: str
    kind: ControlKind
    datatype: Datatype
    false_value: float = 0.0
    true_value: float = 1.0
    """Unused for CORRID, whose value is the sequence's id."""


@dataclass(frozen=True, slots=True)
class StateTensor:
    """An implicit state: `output_name` of one row is `input_name` of the sequence's next."""

    input_name: str
    output_name: str
    datatype: Datatype
    dims: tuple[int, ...]
    """Without the batch dimension."""
    initial: bytes | None = None
    """First value in OIP binary form; None: zeros, and empty strings."""


@dataclass(frozen=True, slots=True)
class SequencePolicy:
    """Requests with the same correlation id go, in order, to the same instance."""

    strategy: Literal["direct", "oldest"] = "direct"
    max_sequence_idle_s: float = 1.0
    max_queue_delay_s: float = 0.0
    minimum_slot_utilization: float = 0.0
    """Direct: share of the slots that must be filled before a batch goes without waiting for the delay."""
    max_candidate_sequences: int = 0
    """Oldest: sequences in work at once for each instance; others wait for one to end. 0: no bound."""
    preferred_batch_sizes: tuple[int, ...] = ()
    preserve_ordering: bool = False
    controls: tuple[ControlInput, ...] = ()
    states: tuple[StateTensor, ...] = ()
    iterative: bool = False


@dataclass(frozen=True, slots=True)
class EnsembleStep:
    """One model of an ensemble. Maps are (tensor of the step's model, tensor of the ensemble)."""

    model: str
    version: str | None
    """None: the newest that is ready."""
    input_map: tuple[tuple[str, str], ...]
    output_map: tuple[tuple[str, str], ...]


BatchInputKind = Literal[
    "BATCH_ELEMENT_COUNT",
    "BATCH_ACCUMULATED_ELEMENT_COUNT",
    "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO",
    "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE",
    "BATCH_ITEM_SHAPE",
    "BATCH_ITEM_SHAPE_FLATTEN",
]


@dataclass(frozen=True, slots=True)
class BatchInputTensor:
    """An input that the gateway makes for each batch of ragged requests."""

    kind: BatchInputKind
    target_names: tuple[str, ...]
    datatype: Datatype
    source_inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BatchOutputTensor:
    """Outputs that are cut by the shape of an input rather than by rows (BATCH_SCATTER_WITH_INPUT_SHAPE)."""

    target_names: tuple[str, ...]
    source_inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WarmUpInput:
    """Exactly one of the three kinds of data."""

    name: str
    datatype: Datatype
    dims: tuple[int, ...]
    data: Literal["zero", "random", "file"]
    file: str = ""
    """Name of a file in the model's `warmup` directory, OIP binary form."""


@dataclass(frozen=True, slots=True)
class WarmUpSample:
    """A request that every instance answers before the model is ready."""

    name: str
    batch_size: int
    """Rows; 0 or 1: one, where the model batches."""
    count: int
    """How many times it is run; 0 and 1 mean once."""
    inputs: tuple[WarmUpInput, ...]


@dataclass(frozen=True, slots=True)
class Scheduling:
    """Everything above for one model; see the types for what the fields mean."""

    priority_levels: int = 0
    """0: there are none. 1 is served first; strictly."""
    default_priority_level: int = 0
    default_queue_policy: QueuePolicy | None = None
    """None: not stated; the model's own bounds and callers' deadlines hold."""
    priority_queue_policies: tuple[tuple[int, QueuePolicy], ...] = ()
    preserve_ordering: bool = False
    sequence: SequencePolicy | None = None
    ensemble: tuple[EnsembleStep, ...] = ()
    response_cache: bool = False
    batch_inputs: tuple[BatchInputTensor, ...] = ()
    batch_outputs: tuple[BatchOutputTensor, ...] = ()
    warm_up: tuple[WarmUpSample, ...] = ()
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Output name → its classification labels, by index."""

    @property
    def states_queue_policy(self) -> bool:
        """Whether the model states any; then OIP's `timeout` is about queueing, as with Triton."""
        return self.default_queue_policy is not None or bool(self.priority_queue_policies)

    def queue_policy(self, level: int) -> QueuePolicy | None:
        """The policy of a priority level (0 where there are no levels)."""
        for stated, policy in self.priority_queue_policies:
            if stated == level:
                return policy
        return self.default_queue_policy


PLAIN = Scheduling()
