"""`sequence_batching` of a config.pbtxt: strategy, control inputs and implicit state, with Triton's conditions.

Rules: START, READY and END have two values (false, true) in exactly one of the three lists, CORRID has a datatype
instead; no kind stands twice. An idle time of 0 means one second. Without a strategy it is `direct`. `oldest` without
preferred sizes prefers `max_batch_size`.
"""

from __future__ import annotations

from typing import Final, Literal, cast, get_args

from gateway.core.scheduling import ControlInput, ControlKind, SequencePolicy, StateTensor
from gateway.core.tensor import DATATYPE
from gateway.protocol.model_config_batching import MAX_DELAY_US, MAX_TIMEOUT_US, read_preferred
from gateway.protocol.model_config_tensors import DATA_TYPES, INT32, read_data_type, read_dims, read_file_name
from gateway.protocol.text_section import Section

IDLE_US: Final = 1_000_000
_CORRID_TYPES: Final = ("TYPE_UINT64", "TYPE_INT64", "TYPE_UINT32", "TYPE_INT32", "TYPE_STRING")
_LISTS: Final = {"int32_false_true": "INT32", "fp32_false_true": "FP32", "bool_false_true": "BOOL"}
_FP32_MAX: Final = 3.4028235677973366e38

StateFiles = tuple[tuple[str, str], ...]


def read_sequences(top: Section, limit: int | None) -> tuple[SequencePolicy | None, StateFiles]:
    """The block, and (state input, file below `initial_state`) for each state that starts with a file's content."""
    block = top.section("sequence_batching")
    if block is None:
        return None, ()
    idle_us = block.integer("max_sequence_idle_microseconds", 0, MAX_TIMEOUT_US) or IDLE_US
    direct, oldest = block.section("direct"), block.section("oldest")
    if direct is not None and oldest is not None:
        block.fault(oldest.line, "oldest", "only one of direct and oldest may stand")
    delay_us, utilization, candidates = 0, 0.0, 0
    preferred: tuple[int, ...] = ()
    ordered = False
    if direct is not None:
        delay_us = direct.integer("max_queue_delay_microseconds", 0, MAX_DELAY_US) or 0
        utilization = direct.number("minimum_slot_utilization", 0, 1) or 0.0
        direct.finish()
    if oldest is not None:
        delay_us = oldest.integer("max_queue_delay_microseconds", 0, MAX_DELAY_US) or 0
        candidates = oldest.integer("max_candidate_sequences", 0) or 0
        preferred = read_preferred(oldest, limit) or ((limit,) if limit else ())
        ordered = oldest.flag("preserve_ordering")
        oldest.finish()
    states, files = _read_states(block)
    strategy: Literal["direct", "oldest"] = "direct" if oldest is None else "oldest"
    policy = SequencePolicy(
        strategy, idle_us / 1e6, delay_us / 1e6, utilization, candidates, preferred, ordered,
        _read_controls(block), states, block.flag("iterative_sequence"),
    )  # fmt: skip
    block.finish()
    return policy, files


def _read_controls(block: Section) -> tuple[ControlInput, ...]:
    found: list[ControlInput] = []
    for tensor in block.sections("control_input"):
        name = tensor.text("name")
        if not name:
            tensor.fault(tensor.line, "name", 'is missing; write name: "…" as in the model')
        controls = tensor.sections("control")
        if len(controls) != 1:
            tensor.fault(tensor.line, "control", f"one control a tensor is supported, {len(controls)} stand there")
        for control in controls:
            read = _read_control(control, name or "")
            if read is not None and any(known.kind == read.kind for known in found):
                control.fault(control.line, "kind", f"sequence batching specifies multiple {read.kind} tensors")
            found += [read] if read is not None else []
        tensor.finish()
    return tuple(found)


def _read_control(control: Section, name: str) -> ControlInput | None:
    word = control.word("kind", get_args(ControlKind))
    if control.has("kind") and word is None:
        return None
    kind = cast("ControlKind", word or "CONTROL_SEQUENCE_START")
    lists: dict[str, tuple[float, ...]] = {
        "int32_false_true": control.integers("int32_false_true", -INT32 - 1, INT32),
        "fp32_false_true": control.numbers("fp32_false_true", -_FP32_MAX, _FP32_MAX),
        "bool_false_true": control.flags("bool_false_true"),
    }
    stated = [key for key in lists if control.values(key)]
    datatype = control.word("data_type", ("TYPE_INVALID", *DATA_TYPES))
    control.finish()
    if kind == "CONTROL_SEQUENCE_CORRID":
        if stated:
            control.fault(control.line, stated[0], f"sequence batching must not specify it for {kind}; remove it")
        if datatype not in _CORRID_TYPES:
            hint = f"unexpected data type for control {kind}; write one of {', '.join(_CORRID_TYPES)}"
            control.fault(control.line, "data_type", hint)
            return None
        return ControlInput(name, kind, DATA_TYPES[datatype])
    if datatype not in (None, "TYPE_INVALID"):
        control.fault(control.line, "data_type", f"belongs to CONTROL_SEQUENCE_CORRID, not to {kind}; remove it")
    if len(stated) != 1:
        how = "must specify one of" if not stated else "specifies more than one of"
        hint = f"sequence batching {how} int32_false_true, fp32_false_true and bool_false_true for {kind}"
        control.fault(control.line, "kind", hint)
        return None
    values = lists[stated[0]]
    if len(values) != 2:
        control.fault(control.line, stated[0], f"must have exactly 2 entries for {kind}, found {len(values)}")
        return None
    return ControlInput(name, kind, DATATYPE[_LISTS[stated[0]]], float(values[0]), float(values[1]))


def _read_states(block: Section) -> tuple[tuple[StateTensor, ...], StateFiles]:
    found, files = [], []
    for state in block.sections("state"):
        names = {}
        for key in ("input_name", "output_name"):
            names[key] = state.text(key) or ""
            if not names[key]:
                state.fault(state.line, key, "is missing; name the model's tensor")
        kind = read_data_type(state)
        dims = read_dims(state)
        file = _read_initial(state)
        # Where a state is kept changes no answer.
        for hint in ("use_same_buffer_for_input_output", "use_growable_memory"):
            if state.flag(hint):
                state.note_ignored(state.path(hint))
        state.finish()
        if kind is not None:
            found.append(StateTensor(names["input_name"], names["output_name"], kind, dims))
            files += [(names["input_name"], file)] if file else []
    return tuple(found), tuple(files)


def _read_initial(state: Section) -> str:
    """Name of the file with the first value; empty: zeros."""
    blocks = state.sections("initial_state")
    if len(blocks) > 1:
        state.fault(blocks[1].line, "initial_state", "stands twice; one first value is supported for all sequences")
    file = ""
    for block in blocks[:1]:
        if not block.text("name"):
            block.fault(block.line, "name", 'is missing; write name: "…"')
        read_data_type(block)
        read_dims(block, 1)
        file = read_file_name(block, "data_file")
        zero = block.has("zero_data")
        block.refuse_unless("zero_data", ("true", 1), "write true, or name a data_file")
        if zero == bool(file):
            block.fault(block.line, "zero_data", "write exactly one of zero_data: true and data_file")
        block.finish()
    return file
