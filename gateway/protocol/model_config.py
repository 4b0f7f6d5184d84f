"""Triton's `config.pbtxt` → `ModelConfig`: what this gateway does with each key, decided in one place.

Rules: every key is either obeyed, refused with what to do instead, or listed in `ModelConfig.ignored`; the
last only if it cannot change an answer, a refusal or a batch (hints about memory, labels of metrics, free-form
parameters). A refused key may stand with its neutral value (`response_cache { enable: false }`). All faults
are reported at once. `None`: the file does not say. Sans-I/O; any text gives a result or `ConfigError`.
Keys: wire notes §5, Triton's model_config.proto.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from gateway.core.model import TensorSpec
from gateway.core.scheduling import PLAIN, Scheduling
from gateway.core.tensor import DATATYPE, MAX_RANK, Datatype
from gateway.errors import ConfigError, Fault
from gateway.protocol.spelling import nearest
from gateway.protocol.text_format import TextFormatError
from gateway.protocol.text_format import parse as parse_text
from gateway.protocol.text_section import Section

_INT32: Final = 2**31 - 1
_INT64: Final = 2**63 - 1


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
    max_queue_size: int | None = None
    """Waiting requests; 0: no bound stated."""
    instances: int | None = None
    intra_op_threads: int | None = None
    version_policy: VersionPolicy = VersionPolicy()
    default_model_filename: str | None = None
    scheduling: Scheduling = PLAIN
    ignored: tuple[str, ...] = ()
    """Keys without effect here, for the log."""


_DATA_TYPES: Final[dict[str, Datatype]] = {
    "TYPE_STRING" if name == "BYTES" else f"TYPE_{name}": datatype for name, datatype in DATATYPE.items()
}
_UNSUPPORTED: Final = {
    "sequence_batching": "sequences are not supported yet; remove the block if requests are independent",
    "ensemble_scheduling": "ensembles are not supported yet; serve the steps as models of their own",
    "model_warmup": "own warm-up samples are not supported yet; remove it, every model is warmed up at load",
    "batch_input": "ragged batching is not supported yet; pad the inputs instead",
    "batch_output": "ragged batching is not supported yet; pad the inputs instead",
    "model_operations": "operator libraries are not supported; use operators onnxruntime has built in",
    "model_repository_agents": "repository agents are not supported; remove the block",
    "cc_model_filenames": "one file per GPU kind is not supported; name one file in default_model_filename",
    "reshape": "reshaping is not supported yet; state the model's own dims",
    "scheduling_choice": "write dynamic_batching { } instead",
    "priority_queue_policy": "priority levels are not supported yet; remove it",
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
    config = _read_model(Section(message, "", 1, faults, ignored), ignored)
    if faults:
        raise ConfigError([Fault(file, f.line, f.where, f.message) for f in sorted(faults, key=lambda f: f.line)])
    return config


def _read_model(top: Section, ignored: list[str]) -> ModelConfig:
    _check_platform(top)
    batch_size = top.integer("max_batch_size", 0)
    preferred, delay, queue_size = _read_batching(top, batch_size)
    cache = top.section("response_cache")
    if cache is not None:
        cache.refuse_unless("enable", ("false", 0), "the response cache is not supported yet; write enable: false")
        cache.finish()
    transactions = top.section("model_transaction_policy")
    if transactions is not None:
        hint = "models that answer a request several times are not supported; write decoupled: false"
        transactions.refuse_unless("decoupled", ("false", 0), hint)
        transactions.finish()
    _check_optimization(top)
    top.refuse_unless("runtime", ("",), "runtimes of their own are not supported; remove it")
    top.ignore("metric_tags", "model_metrics")
    config = ModelConfig(
        name=top.text("name"),
        max_batch_size=batch_size,
        inputs=_read_tensors(top, "input"),
        outputs=_read_tensors(top, "output"),
        preferred_batch_sizes=preferred,
        max_queue_delay_us=delay,
        max_queue_size=queue_size,
        instances=_read_instances(top),
        intra_op_threads=_read_parameters(top),
        version_policy=_read_versions(top),
        default_model_filename=_read_filename(top),
        ignored=tuple(ignored),
    )
    top.finish(_UNSUPPORTED)
    return config


def _check_platform(top: Section) -> None:
    for name, accepted in (("platform", "onnxruntime_onnx"), ("backend", "onnxruntime")):
        hint = f'only ONNX models are served; write {name}: "{accepted}" and export the model to ONNX'
        top.refuse_unless(name, ("", accepted), hint)


def _read_filename(top: Section) -> str | None:
    line = next((value.line for value in top.values("default_model_filename")), 0)
    name = top.text("default_model_filename")
    if name and ("/" in name or "\0" in name or name in (".", "..")):
        top.fault(line, "default_model_filename", "must be the name of a file in the version directory, not a path")
    return name or None


def _read_tensors(top: Section, name: str) -> tuple[TensorSpec, ...]:
    specs = []
    for tensor in top.sections(name):
        label = tensor.text("name")
        if not label:
            tensor.fault(tensor.line, "name", 'is missing; write name: "…" as in the model')
        kind = tensor.word("data_type", tuple(_DATA_TYPES))
        if not tensor.has("data_type"):
            tensor.fault(tensor.line, "data_type", "is missing; write for example data_type: TYPE_FP32")
        if not tensor.has("dims"):
            tensor.fault(tensor.line, "dims", "is missing; write for example dims: [ -1 ]")
        dims = tensor.integers("dims", -1, _INT64)
        if 0 in dims or len(dims) > MAX_RANK:
            hint = f"must be 1 or more each, or -1 for variable, and at most {MAX_RANK} of them"
            tensor.fault(tensor.line, "dims", hint)
        optional = _read_input_keys(tensor) if name == "input" else False
        if name == "output":
            tensor.ignore("label_filename")
        tensor.refuse_unless("is_shape_tensor", ("false", 0), "shape tensors belong to TensorRT; remove it")
        hint = "non-linear formats belong to TensorRT; remove it"
        tensor.refuse_unless("is_non_linear_format_io", ("false", 0), hint)
        tensor.finish(_UNSUPPORTED)
        if label and kind:
            specs.append(TensorSpec(label, _DATA_TYPES[kind], dims, optional))
    names = [spec.name for spec in specs]
    for repeated in sorted({n for n in names if names.count(n) > 1}):
        top.fault(0, name, f"'{repeated}' is described twice; keep one of them")
    return tuple(specs)


def _read_input_keys(tensor: Section) -> bool:
    tensor.refuse_unless("format", ("FORMAT_NONE",), "image formats have no effect on ONNX models; remove it")
    hint = "ragged batching is not supported yet; pad the inputs instead"
    tensor.refuse_unless("allow_ragged_batch", ("false", 0), hint)
    return tensor.flag("optional")


def _read_batching(top: Section, limit: int | None) -> tuple[tuple[int, ...] | None, int | None, int | None]:
    """(preferred batch sizes, max queue delay in µs, max queue size) of `dynamic_batching`."""
    batching = top.section("dynamic_batching")
    if batching is None:
        return None, None, None
    preferred = batching.integers("preferred_batch_size", 1, _INT32)
    line = next((value.line for value in batching.values("preferred_batch_size")), batching.line)
    if limit is not None and any(size > limit for size in preferred):
        batching.fault(line, "preferred_batch_size", f"must not exceed max_batch_size, which is {limit}")
    delay = batching.integer("max_queue_delay_microseconds", 0, 60_000_000)
    hint = "answers in order of arrival are not supported; remove it, each answer goes to its own request"
    batching.refuse_unless("preserve_ordering", ("false", 0), hint)
    for name in ("priority_levels", "default_priority_level"):
        batching.refuse_unless(name, (0,), "priority levels are not supported yet; remove it")
    queue_size = _read_queue_policy(batching)
    batching.finish(_UNSUPPORTED)
    return preferred if batching.has("preferred_batch_size") else None, delay, queue_size


def _read_queue_policy(batching: Section) -> int | None:
    policy = batching.section("default_queue_policy")
    if policy is None:
        return None
    size = policy.integer("max_queue_size", 0)
    hint = "only REJECT is supported; remove it"
    policy.refuse_unless("timeout_action", ("REJECT", 0), hint)
    hint = "is not supported here; write deadline_ms for the model in gateway.yaml, which also covers execution"
    policy.refuse_unless("default_timeout_microseconds", (0,), hint)
    hint = "remove it; callers may always set a timeout of their own"
    policy.refuse_unless("allow_timeout_override", ("false", 0), hint)
    policy.finish()
    return size


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
        group.ignore("name")
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
        versions = specific.integers("versions", 0, _INT64)
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
    block.ignore("input_pinned_memory", "output_pinned_memory", "gather_kernel_buffer_threshold", "eager_batching")
    block.refuse_unless("priority", ("PRIORITY_DEFAULT", 0), "model priorities are not supported; remove it")
    graph = block.section("graph")
    if graph is not None:
        hint = "is not supported; remove it, onnxruntime's full graph optimisation is used"
        graph.refuse_unless("level", (0, 1), hint)
        graph.finish()
    block.finish(_UNSUPPORTED)
