"""Triton's `config.pbtxt` → `ModelConfig`: what this gateway does with each key, decided in one place.

Rules: every key is either obeyed, refused with what to do instead, or listed in `ModelConfig.ignored`; the
last only if it cannot change an answer, a refusal or a batch (hints about memory, labels of metrics, free-form
parameters). A refused key may stand with its neutral value (`model_transaction_policy { decoupled: false }`). All
faults are reported at once. `None`: the file does not say. Sans-I/O; any text gives a result or `ConfigError`. Files
that a configuration names (labels, first states) are read by whoever found it, and put in with `with_files`.
Chapters: model_config_tensors, _batching, _sequences, _samples; model_config_json reads the JSON form.
Keys: wire notes §5, Triton's model_config.proto.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from gateway.core.model import TensorSpec
from gateway.core.scheduling import PLAIN, Scheduling
from gateway.errors import ConfigError, Fault
from gateway.protocol.model_config_batching import read_dynamic_batching
from gateway.protocol.model_config_samples import read_ensemble, read_warm_up
from gateway.protocol.model_config_sequences import read_sequences
from gateway.protocol.model_config_tensors import (
    INT64,
    read_batch_inputs,
    read_batch_outputs,
    read_inputs,
    read_outputs,
)
from gateway.protocol.spelling import nearest
from gateway.protocol.text_format import TextFormatError
from gateway.protocol.text_format import parse as parse_text
from gateway.protocol.text_section import Section

ENSEMBLE: Final = "ensemble"
"""The platform of a model that is made of other models."""


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """Which versions are served: the `count` highest, all, or exactly `versions`."""

    kind: Literal["latest", "all", "specific"] = "latest"
    count: int = 1
    versions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The keys of a config.pbtxt that are obeyed. None: not stated."""

    name: str | None = None
    max_batch_size: int | None = None
    """Rows; 0: shapes are used as written and requests are not batched."""
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    preferred_batch_sizes: tuple[int, ...] | None = None
    max_queue_delay_us: int | None = None
    instances: int | None = None
    intra_op_threads: int | None = None
    version_policy: VersionPolicy = VersionPolicy()
    default_model_filename: str | None = None
    scheduling: Scheduling = PLAIN
    label_files: tuple[tuple[str, str], ...] = ()
    """(output, file in the model's directory) with the classification labels of an output, one a line."""
    state_files: tuple[tuple[str, str], ...] = ()
    """(state input, file in `initial_state` of the model's directory) with a sequence's first state."""
    metric_tags: tuple[tuple[str, str], ...] = ()
    """Labels of the model's metrics."""
    ignored: tuple[str, ...] = ()
    """Keys without effect here, for the log."""
    text: str = field(default="", repr=False, compare=False)
    """What was read; empty: nothing stated."""

    @property
    def ensemble(self) -> bool:
        """Whether it is made of other models, and has no file of its own."""
        return bool(self.scheduling.ensemble)

    def with_files(self, labels: Mapping[str, tuple[str, ...]], states: Mapping[str, bytes]) -> ModelConfig:
        """With the contents of `label_files` (by output) and `state_files` (by state input)."""
        sequence = self.scheduling.sequence
        if sequence is not None and states:
            changed = [replace(state, initial=states.get(state.input_name)) for state in sequence.states]
            sequence = replace(sequence, states=tuple(changed))
        return replace(self, scheduling=replace(self.scheduling, sequence=sequence, labels=tuple(labels.items())))


_LABEL: Final = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]{0,63}")
_OWN_LABELS: Final = frozenset(("model", "version", "reason", "gpu_uuid", "namespace", "le", "quantile"))
_UNSUPPORTED: Final = {
    "model_operations": "operator libraries are not supported; use operators onnxruntime has built in",
    "model_repository_agents": "repository agents are not supported; remove the block",
    "cc_model_filenames": "one file per GPU kind is not supported; name one file in default_model_filename",
    "scheduling_choice": "write dynamic_batching { } instead",
    "rate_limiter": "the rate limiter is not supported; remove it",
    "gpus": "GPUs are not supported in this version; remove it",
    "secondary_devices": "secondary devices are not supported; remove it",
    "profile": "TensorRT profiles are not supported; remove it",
    "execution_accelerators": "accelerators are not supported in this version; remove it",
    "cuda": "GPUs are not supported in this version; remove it",
}
_RUNTIME_PARAMETERS: Final = (
    "inter_op_thread_count",
    "execution_mode",
    "enable_mem_arena",
    "enable_mem_pattern",
    "arena_extend_strategy",
    "memory.enable_memory_arena_shrinkage",
    "session.use_device_allocator_for_initializers",
    "max_partition_iterations",
    "min_subgraph_size",
)


def parse(text: str, file: str = "config.pbtxt") -> ModelConfig:
    """Read a config.pbtxt. `file` names it in faults.

    Raises:
        ConfigError: syntax errors, unknown, mistyped or unsupported keys; all of them, with lines.
    """
    try:
        message = parse_text(text)
    except TextFormatError as error:
        raise ConfigError([Fault(file, error.line, "", f"column {error.column}: {error.message}")]) from None
    faults: list[Fault] = []
    ignored: list[str] = []
    config = replace(_read_model(Section(message, "", 1, faults, ignored)), ignored=tuple(ignored), text=text)
    if faults:
        raise ConfigError([Fault(file, f.line, f.where, f.message) for f in sorted(faults, key=lambda f: f.line)])
    return config


def _read_model(top: Section) -> ModelConfig:
    steps = read_ensemble(top)
    _check_platform(top, ensemble=bool(steps) or top.has("ensemble_scheduling"))
    batch_size = top.integer("max_batch_size", 0)
    batching = read_dynamic_batching(top, batch_size)
    sequence, state_files = read_sequences(top, batch_size)
    inputs = read_inputs(top, batch_size)
    outputs, label_files = read_outputs(top, batch_size)
    scheduling = Scheduling(
        priority_levels=batching.priority_levels,
        default_priority_level=batching.default_priority_level,
        default_queue_policy=batching.default_queue_policy,
        priority_queue_policies=batching.priority_queue_policies,
        preserve_ordering=batching.preserve_ordering,
        sequence=sequence,
        ensemble=steps,
        response_cache=_read_cache(top),
        batch_inputs=read_batch_inputs(top, inputs),
        batch_outputs=read_batch_outputs(top, inputs, outputs),
        warm_up=read_warm_up(top),
    )
    _check_choice(top)
    _check_hints(top)
    config = ModelConfig(
        name=top.text("name"),
        max_batch_size=batch_size,
        inputs=inputs,
        outputs=outputs,
        preferred_batch_sizes=batching.preferred_batch_sizes,
        max_queue_delay_us=batching.max_queue_delay_us,
        instances=_read_instances(top),
        intra_op_threads=_read_parameters(top),
        version_policy=_read_versions(top),
        default_model_filename=_read_filename(top),
        scheduling=scheduling,
        label_files=label_files,
        state_files=state_files,
        metric_tags=_read_metric_tags(top),
    )
    if steps:
        config = _check_ensemble(top, config)
    top.finish(_UNSUPPORTED)
    return config


def _check_platform(top: Section, *, ensemble: bool) -> None:
    if ensemble:
        hint = f'an ensemble has no model file of its own; write platform: "{ENSEMBLE}"'
        top.refuse_unless("platform", (ENSEMBLE,), hint)
        top.refuse_unless("backend", ("",), hint)
        return
    if (value := top.single("platform")) is not None and value.content == ENSEMBLE:
        top.fault(value.line, "platform", "an ensemble needs an ensemble_scheduling block with its steps")
        return
    for name, accepted in (("platform", "onnxruntime_onnx"), ("backend", "onnxruntime")):
        hint = f'only ONNX models are served; write {name}: "{accepted}" and export the model to ONNX'
        top.refuse_unless(name, ("", accepted), hint)


def _check_choice(top: Section) -> None:
    """The three ways to schedule exclude each other; so do some of them and the response cache."""
    choices = ("dynamic_batching", "sequence_batching", "ensemble_scheduling")
    stated = [top.values(name)[0] for name in choices if top.values(name)]
    if len(stated) > 1:
        names = [name for name in choices if top.has(name)]
        top.fault(stated[1].line, names[1], f"only one of {', '.join(choices)} may stand; {names[0]} does already")


def _read_cache(top: Section) -> bool:
    cache = top.section("response_cache")
    if cache is None:
        return False
    enabled = cache.flag("enable")
    if enabled and top.has("sequence_batching"):
        cache.fault(cache.line, "enable", "answers within a sequence cannot be cached; write enable: false")
    cache.finish()
    return enabled


def _check_hints(top: Section) -> None:
    transactions = top.section("model_transaction_policy")
    if transactions is not None:
        hint = "models that answer a request several times are not supported; write decoupled: false"
        transactions.refuse_unless("decoupled", ("false", 0), hint)
        transactions.finish()
    _check_optimization(top)
    top.refuse_unless("runtime", ("",), "runtimes of their own are not supported; remove it")
    top.ignore("model_metrics")


def _read_metric_tags(top: Section) -> tuple[tuple[str, str], ...]:
    tags = []
    for key, entry in top.entries("metric_tags"):
        tags.append((key, entry.text("value") or ""))
        if not _LABEL.fullmatch(key):
            entry.fault(entry.line, "key", f"'{key[:64]}' cannot be a label; write letters, digits and _")
        elif key in _OWN_LABELS:
            entry.fault(entry.line, "key", f"'{key}' is a label already; choose another name")
        entry.finish()
    return tuple(tags)


def _check_ensemble(top: Section, config: ModelConfig) -> ModelConfig:
    """An ensemble runs nothing itself: what says how to run a file cannot stand. Unstated, its batch size is 0."""
    for name in ("instance_group", "default_model_filename", "model_warmup", "batch_input", "batch_output"):
        if top.values(name):
            hint = "should not be specified for an ensemble; state it for the models of its steps"
            top.fault(top.values(name)[0].line, name, hint)
    for name, tensors in (("input", config.inputs), ("output", config.outputs)):
        if not tensors:
            top.fault(1, name, f"is missing; state every {name} of the ensemble")
    return replace(config, max_batch_size=config.max_batch_size or 0)


def _read_filename(top: Section) -> str | None:
    line = next((value.line for value in top.values("default_model_filename")), 0)
    name = top.text("default_model_filename")
    if name and ("/" in name or "\0" in name or name in (".", "..")):
        top.fault(line, "default_model_filename", "must be the name of a file in the version directory, not a path")
    return name or None


def _read_instances(top: Section) -> int | None:
    if not top.has("instance_group"):
        return None
    total = 0
    for group in top.sections("instance_group"):
        total += group.integer("count", 0, 256) or 1
        kind = group.word("kind", ("KIND_AUTO", "KIND_CPU", "KIND_GPU", "KIND_MODEL"))
        if kind in ("KIND_GPU", "KIND_MODEL"):
            group.fault(group.line, "kind", f"{kind} is not supported in this version; write KIND_CPU")
        group.refuse_unless("passive", ("false", 0), "passive instances are not supported; remove it")
        group.refuse_unless("host_policy", ("",), "host policies are not supported; remove it")
        if group.text("name"):
            group.note_ignored(group.path("name"))
        group.finish(_UNSUPPORTED)
    return total or None


def _read_versions(top: Section) -> VersionPolicy:
    policy = top.section("version_policy")
    if policy is None:
        return VersionPolicy()
    chosen: list[VersionPolicy] = []
    if (latest := policy.section("latest")) is not None:
        chosen.append(VersionPolicy("latest", latest.integer("num_versions", 1) or 1))
        latest.finish()
    if (every := policy.section("all")) is not None:
        chosen.append(VersionPolicy("all"))
        every.finish()
    if (specific := policy.section("specific")) is not None:
        versions = specific.integers("versions", 0, INT64)
        if not versions:
            specific.fault(specific.line, "versions", "is missing; write for example versions: [ 1, 3 ]")
        chosen.append(VersionPolicy("specific", versions=tuple(sorted(set(versions)))))
        specific.finish()
    policy.finish()
    if len(chosen) > 1:
        policy.fault(policy.line, "latest", "only one of latest, all and specific may stand")
    return chosen[0] if chosen else VersionPolicy()


def _read_parameters(top: Section) -> int | None:
    """`parameters` is a map of free-form text; only `intra_op_thread_count` has a meaning here."""
    threads: int | None = None
    for entry in top.sections("parameters"):
        key = entry.text("key") or ""
        content = entry.section("value")
        text = content.text("string_value") if content is not None else None
        if content is not None:
            content.finish()
        entry.finish()
        if key == "intra_op_thread_count":
            if text and text.isascii() and text.isdigit() and len(text) < 4 and int(text) <= 256:
                threads = int(text) or None
            else:
                hint = 'expected a number from 0 to 256 in quotes, for example value { string_value: "2" }'
                entry.fault(entry.line, key, hint)
        elif key in _RUNTIME_PARAMETERS:
            entry.fault(entry.line, key, "this onnxruntime option is not supported; remove it")
        elif meant := nearest(key, ("intra_op_thread_count", *_RUNTIME_PARAMETERS)):
            entry.fault(entry.line, key[:64], f"unknown parameter; did you mean '{meant}'?")
        else:
            entry.note_ignored(f"parameters.{key[:64]}")
    return threads


def _check_optimization(top: Section) -> None:
    """Hints about memory change no answer; everything that selects an execution path is refused."""
    block = top.section("optimization")
    if block is None:
        return
    for name in ("input_pinned_memory", "output_pinned_memory"):
        buffer = block.section(name)
        if buffer is not None:
            buffer.flag("enable")
            buffer.finish()
            block.note_ignored(block.path(name))
    if block.integer("gather_kernel_buffer_threshold", 0):
        block.note_ignored(block.path("gather_kernel_buffer_threshold"))
    if block.flag("eager_batching"):
        block.note_ignored(block.path("eager_batching"))
    block.refuse_unless("priority", ("PRIORITY_DEFAULT", 0), "model priorities are not supported; remove it")
    graph = block.section("graph")
    if graph is not None:
        hint = "is not supported; remove it, onnxruntime's full graph optimisation is used"
        graph.refuse_unless("level", (0, 1), hint)
        graph.finish()
    block.finish(_UNSUPPORTED)
