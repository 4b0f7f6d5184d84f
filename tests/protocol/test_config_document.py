"""GET …/config: the same as a real Triton prints, key for key and in the same order; and it reads back as itself.

`triton_configs.json` was captured from tritonserver 2.51: for each model its config.pbtxt, GET …/config and GET ….
What differs is named here: the backend (Triton ran Python models), and a state's first dims, which Triton prints as
text where it prints every other 64-bit number as a number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.model import BatchPolicy, ModelSpec
from gateway.core.tensor import DATATYPE
from gateway.errors import ConfigError
from gateway.protocol.config_document import complete
from gateway.protocol.model_config import ModelConfig, parse
from gateway.protocol.model_config_json import parse_json
from gateway.protocol.schema import message

CAPTURED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "triton_configs.json").read_text())


def spec_of(config: ModelConfig, name: str, *, merge: bool) -> ModelSpec:
    """What would be served if the model file said nothing but what the configuration says."""
    policy = BatchPolicy(
        config.max_batch_size or 0,
        merge=merge,
        max_queue_delay_s=(config.max_queue_delay_us or 0) / 1e6,
        preferred_batch_sizes=config.preferred_batch_sizes or (),
    )
    return ModelSpec(
        name, "1", "sha256:0", "onnxruntime_onnx", config.inputs, config.outputs, policy, "", config.scheduling
    )


def obeyed(text: str) -> str:
    """A captured config.pbtxt with what only Triton's Python models can have replaced."""
    return text.replace('backend: "python"', 'backend: "onnxruntime"').replace("priority: PRIORITY_MAX", "")


@pytest.mark.parametrize("name", sorted(CAPTURED))
def test_it_is_what_triton_prints(name: str) -> None:
    text, printed = obeyed(CAPTURED[name]["pbtxt"]), CAPTURED[name]["config"]
    config = parse(text)
    instances = sum(group["count"] for group in printed["instance_group"])
    document = complete(spec_of(config, name, merge=False), text, instances, "model.onnx")
    expected = json.loads(json.dumps(printed))
    if config.ensemble:
        expected["ensemble_scheduling"]["max_inflight_requests"] = 0  # newer than the Triton that was asked
    else:
        expected |= {"platform": "onnxruntime_onnx", "backend": "onnxruntime", "default_model_filename": "model.onnx"}
        expected["optimization"]["priority"] = "PRIORITY_DEFAULT"
    for state in expected.get("sequence_batching", {}).get("state", []):
        for initial in state["initial_state"]:
            initial["dims"] = [int(dim) for dim in initial["dims"]]
    assert document == expected
    assert list(document) == list(expected)
    assert json.dumps(document, sort_keys=True) == json.dumps(expected, sort_keys=True)  # 0 is not 0.0 then


@pytest.mark.parametrize("name", sorted(CAPTURED))
def test_it_agrees_with_the_metadata(name: str) -> None:
    """perf_analyzer looks every tensor of the configuration up in the metadata, and cuts the first dim by its size."""
    printed, metadata = CAPTURED[name]["config"], CAPTURED[name]["metadata"]
    spec = spec_of(parse(obeyed(CAPTURED[name]["pbtxt"])), name, merge=False)
    document = complete(spec, "", 1, "model.onnx")
    for role in ("input", "output"):
        shown = [tensor["name"] for tensor in metadata[f"{role}s"]]
        assert [tensor["name"] for tensor in document[role]] == shown
        lead = [-1] if printed["max_batch_size"] else []
        assert [lead + tensor["dims"] for tensor in document[role]] == [t["shape"] for t in metadata[f"{role}s"]]


def test_nothing_stated_is_completed_from_what_was_loaded() -> None:
    spec = spec_of(parse(""), "m", merge=True)
    spec = ModelSpec("m", "3", "", "", spec.inputs, spec.outputs, BatchPolicy(64, max_queue_delay_s=0.002))
    document = complete(spec, "", 2, "net.onnx")
    assert document["max_batch_size"] == 64
    assert document["version_policy"] == {"latest": {"num_versions": 1}}
    assert document["default_model_filename"] == "net.onnx"
    (group,) = document["instance_group"]
    assert (group["name"], group["count"], group["kind"], group["gpus"]) == ("m", 2, "KIND_CPU", [])
    assert document["dynamic_batching"]["preferred_batch_size"] == [64]
    assert document["dynamic_batching"]["max_queue_delay_microseconds"] == 2000


def test_dynamic_batching_stands_where_rows_are_merged() -> None:
    for text, merge, size, expected in [
        ("", True, 8, True),
        ("", False, 8, False),
        ("", True, 1, False),
        ("dynamic_batching { }", False, 8, True),
        ("sequence_batching { }", True, 8, False),
    ]:
        spec = ModelSpec("m", "1", "", "", (), (), BatchPolicy(size, merge=merge))
        assert ("dynamic_batching" in complete(spec, text, 1, "model.onnx")) is expected, (text, merge, size)


def test_instances_are_those_that_run() -> None:
    spec = ModelSpec("m", "1", "", "", (), (), BatchPolicy(0))
    stated = 'instance_group [ { count: 2 }, { name: "own" } ]'
    as_stated = complete(spec, stated, 3, "f")["instance_group"]
    assert [(group["name"], group["count"]) for group in as_stated] == [("m_0", 2), ("own", 1)]
    overruled = complete(spec, stated, 5, "f")["instance_group"]
    assert [(group["name"], group["count"]) for group in overruled] == [("m_0", 5)]


@pytest.mark.parametrize("name", sorted(DATATYPE))
def test_every_datatype_has_its_name(name: str) -> None:
    kind = "TYPE_STRING" if name == "BYTES" else f"TYPE_{name}"
    config = parse(f'input {{ name: "x" data_type: {kind} dims: [ ] }}')
    document = complete(spec_of(config, "m", merge=False), "", 1, "f")
    assert document["input"][0]["data_type"] == kind


def test_text_that_is_no_configuration_is_a_fault() -> None:
    with pytest.raises(ConfigError):
        complete(ModelSpec("m", "1", "", "", (), (), BatchPolicy(0)), "nonsense: 1", 1, "f")


# -- what is printed reads back ------------------------------------------------------------------------------------

TYPES = st.sampled_from(["TYPE_FP32", "TYPE_STRING", "TYPE_BOOL", "TYPE_INT64"])
DIMS = st.lists(st.integers(-1, 5).filter(bool), max_size=3)
LABEL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=5)
FLAG = st.sampled_from(["true", "false"])
MICROSECONDS = st.integers(0, 60_000_000)


def quoted(text: str) -> str:
    return '"' + "".join(f"\\{byte:03o}" for byte in text.encode()) + '"'


@st.composite
def tensors(draw: st.DrawFn, role: str) -> str:
    text = ""
    for name in draw(st.lists(LABEL, max_size=3, unique=True)):
        dims = draw(DIMS)
        inside = f"name: {quoted(name)} data_type: {draw(TYPES)} dims: {dims}"
        if draw(st.booleans()):
            inside += f" reshape {{ shape: {[1, *dims]} }}"
        if role == "input":
            inside += f" optional: {draw(FLAG)} allow_ragged_batch: {draw(FLAG)}"
        elif draw(st.booleans()):
            inside += ' label_filename: "a/labels.txt"'
        text += f"{role} {{ {inside} }}\n"
    return text


@st.composite
def policies(draw: st.DrawFn) -> str:
    action, timeout = draw(st.sampled_from(["REJECT", "DELAY"])), draw(MICROSECONDS)
    return (
        f"timeout_action: {action} default_timeout_microseconds: {timeout} "
        f"allow_timeout_override: {draw(FLAG)} max_queue_size: {draw(st.integers(0, 99))}"
    )


@st.composite
def schedulers(draw: st.DrawFn, limit: int) -> str:
    kind = draw(st.sampled_from(["", "dynamic", "sequence"]))
    preferred = draw(st.lists(st.integers(1, limit), max_size=3)) if limit else []
    delay = draw(MICROSECONDS)
    if kind == "dynamic":
        levels = draw(st.integers(0, 3))
        text = f"preferred_batch_size: {preferred} max_queue_delay_microseconds: {delay}"
        if levels:
            text += f" priority_levels: {levels} default_priority_level: {draw(st.integers(1, levels))}"
            for level in draw(st.sets(st.integers(1, levels))):
                text += f" priority_queue_policy {{ key: {level} value {{ {draw(policies())} }} }}"
        else:
            text += f" default_queue_policy {{ {draw(policies())} }}"
        return f"dynamic_batching {{ {text} }}"
    if kind == "sequence":
        inside = draw(
            st.sampled_from(
                [
                    "direct { minimum_slot_utilization: 0.75 }",
                    f"oldest {{ preferred_batch_size: {preferred} max_queue_delay_microseconds: {delay} }}",
                    'control_input { name: "c" control { kind: CONTROL_SEQUENCE_END fp32_false_true: [ -0.5, 1e9 ] } }',
                    'state { input_name: "i" output_name: "o" data_type: TYPE_FP32 dims: [ -1 ] }',
                    "iterative_sequence: true max_sequence_idle_microseconds: 7",
                ]
            )
        )
        return f"sequence_batching {{ {inside} }}"
    return ""


@st.composite
def configurations(draw: st.DrawFn) -> str:
    limit = draw(st.integers(0, 9))
    more = st.lists(
        st.sampled_from(
            [
                "version_policy { all { } }",
                "version_policy { specific { versions: [ 3, 5 ] } }",
                "version_policy { latest { num_versions: 2 } }",
                "instance_group { count: 2 }",
                'parameters { key: "team" value { string_value: "\\303\\251 \\"x\\"" } }',
                'metric_tags { key: "a" value: "b" }',
                (
                    'model_warmup { name: "w" count: 2 inputs { key: "x" value { data_type: TYPE_FP32 dims: 2 '
                    "zero_data: true } } }"
                ),
                'default_model_filename: "n.onnx"',
            ]
        ),
        unique_by=lambda text: text.split()[0],
    )
    lines = [f"max_batch_size: {limit}", draw(tensors("input")), draw(tensors("output")), draw(schedulers(limit))]
    if "sequence_batching" not in lines[-1]:
        lines.append(f"response_cache {{ enable: {draw(FLAG)} }}")
    return "\n".join([*lines, *draw(more)])


@given(configurations(), st.booleans())
def test_every_printed_document_reads_back_as_an_equal_configuration(text: str, merge: bool) -> None:
    try:
        config = parse(text)
    except ConfigError:
        return  # reshape of a scalar, say
    document = complete(spec_of(config, "m", merge=merge), text, 2, config.default_model_filename or "model.onnx")
    read, canonical = parse_json(json.dumps(document), "printed")
    assert read.inputs == config.inputs
    assert read.outputs == config.outputs
    assert read.scheduling == config.scheduling
    assert (read.max_batch_size, read.version_policy) == (config.max_batch_size, config.version_policy)
    assert (read.label_files, read.metric_tags, read.instances) == (config.label_files, config.metric_tags, 2)
    assert parse(canonical) == read
    assert read.text == canonical
    # Printed again it says the same; and it is a message.
    again = spec_of(read, "m", merge=merge)
    assert complete(again, canonical, 2, document["default_model_filename"]) == document
    json_format.ParseDict(document, message("inference.ModelConfig")())
