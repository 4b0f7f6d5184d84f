"""`ensemble_scheduling` and `model_warmup` of a config.pbtxt: steps of other models, and samples run before READY."""

from __future__ import annotations

from typing import Final, Literal

from gateway.core.scheduling import EnsembleStep, WarmUpInput, WarmUpSample
from gateway.protocol.model_config_tensors import INT32, INT64, read_data_type, read_dims, read_file_name
from gateway.protocol.text_section import Section

MAX_RUNS: Final = 10_000
"""Of one sample: a warm-up of more runs is a mistake."""
_KINDS: Final[tuple[Literal["zero", "random"], ...]] = ("zero", "random")


def read_ensemble(top: Section) -> tuple[EnsembleStep, ...]:
    block = top.section("ensemble_scheduling")
    if block is None:
        return ()
    # It bounds how far a step that answers several times runs ahead; no such model is served.
    if block.integer("max_inflight_requests", 0):
        block.note_ignored(block.path("max_inflight_requests"))
    steps = tuple(_read_step(step) for step in block.sections("step"))
    if not steps:
        block.fault(block.line, "step", "is missing; an ensemble needs at least one step")
    block.finish()
    return steps


def _read_step(step: Section) -> EnsembleStep:
    model = step.text("model_name") or ""
    if not model:
        step.fault(step.line, "model_name", "is missing; name the model of this step")
    version = step.integer("model_version", -1, INT64)
    if version == 0:
        step.fault(step.line, "model_version", "is 0, which no version is; write -1 for the newest")
    step.refuse_unless("model_namespace", ("",), "namespaces are not supported; remove it")
    inputs, outputs = _read_map(step, "input_map"), _read_map(step, "output_map")
    step.finish()
    return EnsembleStep(model, None if version is None or version < 1 else str(version), inputs, outputs)


def _read_map(step: Section, name: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for key, entry in step.entries(name):
        value = entry.text("value") or ""
        if not key or not value:
            entry.fault(
                entry.line, "value", "name a tensor of the step's model as key and one of the ensemble as value"
            )
        entry.finish()
        pairs.append((key, value))
    if not pairs:
        step.fault(step.line, name, "must hold at least one tensor")
    return tuple(pairs)


def read_warm_up(top: Section) -> tuple[WarmUpSample, ...]:
    samples = []
    for block in top.sections("model_warmup"):
        name = block.text("name") or ""
        if not name:
            block.fault(block.line, "name", "is missing; it stands in the error if the sample fails")
        rows = block.integer("batch_size", 0, INT32) or 0
        count = block.integer("count", 0, MAX_RUNS) or 0
        inputs = []
        for key, entry in block.entries("inputs"):
            value = entry.section("value")
            read = None if value is None else _read_sample_input(value, key)
            if value is None:
                entry.fault(entry.line, "value", "is missing; write data_type, dims and the kind of data")
            entry.finish()
            inputs += [read] if read is not None else []
        block.finish()
        samples.append(WarmUpSample(name, rows, count, tuple(inputs)))
    return tuple(samples)


def _read_sample_input(value: Section, name: str) -> WarmUpInput | None:
    datatype = read_data_type(value)
    dims = read_dims(value, 1)
    chosen: list[Literal["zero", "random", "file"]] = []
    for kind in _KINDS:
        if value.has(f"{kind}_data"):
            chosen.append(kind)
        value.refuse_unless(f"{kind}_data", ("true", 1), "write true, or choose another kind of data")
    file = read_file_name(value, "input_data_file")
    if file:
        chosen.append("file")
    if len(chosen) != 1:
        hint = "write exactly one of zero_data: true, random_data: true and input_data_file"
        value.fault(value.line, "zero_data", f"is how '{name[:64]}' gets its data: {hint}")
    value.finish()
    if datatype is None or len(chosen) != 1:
        return None
    return WarmUpInput(name, datatype, dims, chosen[0], file)
