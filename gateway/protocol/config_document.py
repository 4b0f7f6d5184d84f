"""The completed configuration of a served version, as Triton prints it in GET …/config (wire notes §1.3).

Made from what config.pbtxt states and completed with what was loaded: names, datatypes, dims, batch size, instances,
file name; for a model on remote servers, from what they say of it. Printed as Triton prints it: every scalar, empty
lists and maps too, snake_case in the order of the message, enums as words, 64-bit numbers as numbers; blocks only where
they hold. The same dictionary parses into the message (`json_format.ParseDict`) for gRPC, and through
`model_config_json.parse_json` into a configuration equal to its own.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import Any, Final

from google.protobuf import text_format

from gateway.core.model import ModelSpec, TensorSpec
from gateway.errors import ConfigError, Fault
from gateway.protocol.model_config import ENSEMBLE
from gateway.protocol.model_config_sequences import IDLE_US
from gateway.protocol.schema import message

_PLATFORM: Final = "onnxruntime_onnx"
_BACKEND: Final = "onnxruntime"


def complete(spec: ModelSpec, stated: str, instances: int, model_file: str) -> dict[str, Any]:
    """The document of one version.

    Args:
        spec: as served.
        stated: the text of its config.pbtxt (`ModelConfig.text`); empty if there is none.
        instances: copies that are loaded; unused for an ensemble.
        model_file: name of the model file; empty where it is not here; unused for an ensemble.

    Raises:
        ConfigError: `stated` is not the text of a ModelConfig message.
    """
    try:
        config = text_format.Parse(stated, message("inference.ModelConfig")())
    except text_format.ParseError as error:
        raise ConfigError([Fault("config.pbtxt", 0, "", " ".join(str(error).split())[-300:])]) from None
    config.name = spec.name
    config.max_batch_size = spec.policy.max_batch_size
    _tensors(config.input, spec.inputs, of_inputs=True)
    _tensors(config.output, spec.outputs, of_inputs=False)
    if not config.version_policy.WhichOneof("policy_choice"):
        config.version_policy.latest.num_versions = 1
    if config.version_policy.HasField("latest") and not config.version_policy.latest.num_versions:
        config.version_policy.latest.num_versions = 1
    if config.HasField("ensemble_scheduling"):
        config.platform = ENSEMBLE
        config.model_transaction_policy.decoupled = False
        for step in config.ensemble_scheduling.step:
            step.model_version = step.model_version or -1
    elif not model_file:  # remote servers have it; of what, and in how many copies, is their business
        config.platform = spec.platform
        _batching(config, spec)
    else:
        config.platform, config.backend = _PLATFORM, _BACKEND
        config.default_model_filename = model_file
        _optimization(config)
        _instances(config, instances)
        _batching(config, spec)
    return plain(config)


def _tensors(stated: Any, specs: tuple[TensorSpec, ...], *, of_inputs: bool) -> None:
    """Replace `stated` by what is served, keeping what only the text says (file names of labels)."""
    known = {tensor.name: tensor for tensor in stated}
    completed = []
    for spec in specs:
        tensor = message("inference.ModelInput" if of_inputs else "inference.ModelOutput")()
        if spec.name in known:
            tensor.CopyFrom(known[spec.name])
        tensor.name = spec.name
        tensor.data_type = f"TYPE_{'STRING' if spec.datatype.name == 'BYTES' else spec.datatype.name}"
        tensor.dims[:] = spec.dims
        tensor.ClearField("reshape")
        if spec.reshape is not None:
            tensor.reshape.SetInParent()
            tensor.reshape.shape[:] = spec.reshape
        if of_inputs:
            tensor.optional, tensor.allow_ragged_batch = spec.optional, spec.ragged
        completed.append(tensor)
    del stated[:]
    stated.extend(completed)


def _optimization(config: Any) -> None:
    """What is on unless somebody switched it off."""
    block = config.optimization
    block.SetInParent()
    for hint in ("input_pinned_memory", "output_pinned_memory"):
        if not block.HasField(hint):
            getattr(block, hint).enable = True


def _instances(config: Any, instances: int) -> None:
    """As stated if that is what runs. Triton's names: the model's if nothing was stated, else with the place."""
    groups = config.instance_group
    stated = len(groups) > 0
    for group in groups:
        group.count = group.count or 1
    if sum(group.count for group in groups) != instances:
        del groups[:]
        groups.add(count=instances)
    for place, group in enumerate(groups):
        group.name = group.name or (f"{config.name}_{place}" if stated else config.name)
        group.kind = "KIND_CPU"


def _batching(config: Any, spec: ModelSpec) -> None:
    limit = spec.policy.max_batch_size
    if config.HasField("sequence_batching"):
        block = config.sequence_batching
        block.max_sequence_idle_microseconds = block.max_sequence_idle_microseconds or IDLE_US
        if block.HasField("oldest") and not block.oldest.preferred_batch_size and limit:
            block.oldest.preferred_batch_size[:] = [limit]
        return
    if not config.HasField("dynamic_batching") and not (spec.policy.merge and limit > 1):
        return
    block = config.dynamic_batching
    block.SetInParent()
    block.max_queue_delay_microseconds = round(spec.policy.max_queue_delay_s * 1e6)
    preferred = list(spec.policy.preferred_batch_sizes) or ([limit] if limit else [])
    if set(preferred) != set(block.preferred_batch_size):
        block.preferred_batch_size[:] = preferred


def plain(found: Any) -> dict[str, Any]:
    """A message as Triton's JSON has it."""
    document: dict[str, Any] = {}
    for field in found.DESCRIPTOR.fields:
        value = getattr(found, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            of_value = field.message_type.fields_by_name["value"]
            document[field.name] = {str(key): _value(of_value, value[key]) for key in sorted(value)}
        elif isinstance(value, MutableSequence):
            document[field.name] = [_value(field, element) for element in value]
        elif not field.has_presence or found.HasField(field.name):
            document[field.name] = _value(field, value)
    return document


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return plain(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
