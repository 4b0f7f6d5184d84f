"""config.pbtxt: what is obeyed, what is refused and with which words, what is left alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.model import TensorSpec
from gateway.core.scheduling import QueuePolicy, Scheduling
from gateway.core.tensor import DATATYPE
from gateway.errors import ConfigError
from gateway.protocol.model_config import ModelConfig, VersionPolicy, parse

FULL = """
# a real one
name: "digits"
platform: "onnxruntime_onnx"
backend: "onnxruntime"
max_batch_size: 32
input [
  { name: "image" data_type: TYPE_FP32 dims: [ 1, 8, 8 ] },
  { name: "mask"  data_type: TYPE_BOOL dims: -1 optional: true format: FORMAT_NONE }
]
output { name: "label" data_type: TYPE_STRING dims: [ ] label_filename: "labels.txt" }
dynamic_batching {
  preferred_batch_size: [ 8, 16 ]
  max_queue_delay_microseconds: 500
  default_queue_policy { max_queue_size: 100 timeout_action: REJECT allow_timeout_override: false }
}
instance_group [ { count: 2 kind: KIND_CPU }, { kind: KIND_AUTO name: "x" } ]
version_policy: { specific { versions: [ 3, 1 ] } }
default_model_filename: "net.onnx"
parameters { key: "intra_op_thread_count" value { string_value: "4" } }
parameters: { key: "team" value: { string_value: "vision" } }
optimization { graph { level: 1 } input_pinned_memory { enable: true } }
response_cache { enable: false }
metric_tags { key: "a" value: "b" }
"""


def test_a_full_file() -> None:
    assert parse(FULL) == ModelConfig(
        name="digits",
        max_batch_size=32,
        inputs=(
            TensorSpec("image", DATATYPE["FP32"], (1, 8, 8)),
            TensorSpec("mask", DATATYPE["BOOL"], (-1,), optional=True),
        ),
        outputs=(TensorSpec("label", DATATYPE["BYTES"], ()),),
        preferred_batch_sizes=(8, 16),
        max_queue_delay_us=500,
        instances=3,
        intra_op_threads=4,
        version_policy=VersionPolicy("specific", versions=(1, 3)),
        default_model_filename="net.onnx",
        scheduling=Scheduling(default_queue_policy=QueuePolicy(max_queue_size=100)),
        label_files=(("label", "labels.txt"),),
        metric_tags=(("a", "b"),),
        ignored=("optimization.input_pinned_memory", "instance_group[1].name", "parameters.team"),
    )


def test_an_empty_file_states_nothing() -> None:
    assert parse("") == ModelConfig()
    assert parse("max_batch_size: 0").max_batch_size == 0


@pytest.mark.parametrize("name", sorted(DATATYPE))
def test_every_datatype_has_its_name(name: str) -> None:
    kind = "STRING" if name == "BYTES" else name
    (spec,) = parse(f'input {{ name: "x" data_type: TYPE_{kind} dims: [1] }}').inputs
    assert spec.datatype is DATATYPE[name]


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("", VersionPolicy()),
        ("version_policy {}", VersionPolicy()),
        ("version_policy { latest { num_versions: 2 } }", VersionPolicy("latest", 2)),
        ("version_policy: { all { } }", VersionPolicy("all")),
        (
            "version_policy { specific: { versions: 2 versions: 2 } }",
            VersionPolicy("specific", versions=(2,)),
        ),
    ],
)
def test_version_policies(text: str, policy: VersionPolicy) -> None:
    assert parse(text).version_policy == policy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('platform: "tensorrt_plan"', '1: platform: only ONNX models are served; write platform: "onnxruntime_onnx"'),
        ('backend: "python"', '1: backend: only ONNX models are served; write backend: "onnxruntime"'),
        ("max_batch_size: -1", "1: max_batch_size: expected a whole number from 0 to 2147483647, found -1"),
        ('max_batch_size: "8"', "1: max_batch_size: expected a whole number from 0 to 2147483647, found '8'"),
        ("max_batch_size: 1.5", "1: max_batch_size: expected a whole number"),
        ("max_batch_size: true", "1: max_batch_size: expected a whole number from 0 to 2147483647, found true"),
        ("max_batch_size: 1\nmax_batch_size: 2", "2: max_batch_size: stands twice; keep one of them"),
        ("max_batchsize: 4", "1: max_batchsize: unknown key 'max_batchsize'; did you mean 'max_batch_size'?"),
        ("name: digits", '1: name: expected text in quotes, for example name: "…", found digits'),
        ("dynamic_batching: true", "1: dynamic_batching: expected a block { … }, found true"),
        ("dynamic_batching { max_queue_delay_us: 1 }", "did you mean 'max_queue_delay_microseconds'?"),
        (
            "max_batch_size: 4\ndynamic_batching {\n preferred_batch_size: 8 }",
            "3: dynamic_batching.preferred_batch_size: must not exceed max_batch_size, which is 4",
        ),
        ('platform: "ensemble"', "1: platform: an ensemble needs an ensemble_scheduling block with its steps"),
        ("dynamic_batching { }\nsequence_batching { }", "2: sequence_batching: only one of dynamic_batching, "),
        (
            "response_cache { enable: true } sequence_batching { }",
            "1: response_cache.enable: answers within a sequence",
        ),
        ('metric_tags { key: "a-b" value: "c" }', "1: metric_tags[0].key: 'a-b' cannot be a label; write letters"),
        ('metric_tags { key: "model" value: "c" }', "1: metric_tags[0].key: 'model' is a label already"),
        ('metric_tags { key: "__a" value: "c" }', "1: metric_tags[0].key: '__a' cannot be a label; write letters"),
        ('metric_tags { key: "a" } metric_tags { key: "a" }', "1: metric_tags[1].key: 'a' stands twice"),
        ("instance_group { rate_limiter { } }", "1: instance_group[0].rate_limiter: the rate limiter is not supported"),
        ("instance_group { secondary_devices { } }", "instance_group[0].secondary_devices: secondary devices are not"),
        ("instance_group { passive: true }", "instance_group[0].passive: passive instances are not supported"),
        ('instance_group { profile: "a" }', "instance_group[0].profile: TensorRT profiles are not supported"),
        ("model_operations { }", "1: model_operations: operator libraries are not supported"),
        ("model_repository_agents { }", "1: model_repository_agents: repository agents are not supported"),
        (
            'cc_model_filenames { key: "7.5" value: "a" }',
            "1: cc_model_filenames: one file per GPU kind is not supported",
        ),
        ('runtime: "python"', "1: runtime: runtimes of their own are not supported"),
        ("model_transaction_policy { decoupled: true }", "1: model_transaction_policy.decoupled: models that answer"),
        ('input { name: "x" data_type: TYPE_FLOAT dims: 1 }', "input[0].data_type: TYPE_FLOAT is not known here"),
        ('input { name: "x" data_type: TYPE_FP23 dims: 1 }', "did you mean TYPE_FP32?"),
        ('input { name: "x" data_type: "TYPE_FP32" dims: 1 }', "input[0].data_type: 'TYPE_FP32' is not known here"),
        ("input { data_type: TYPE_FP32 dims: 1 }", 'input[0].name: is missing; write name: "…"'),
        ('input { name: "x" dims: 1 }', "input[0].data_type: is missing; write for example data_type: TYPE_FP32"),
        ('input { name: "x" data_type: TYPE_FP32 }', "input[0].dims: is missing; write for example dims: [ -1 ]"),
        ('input { name: "x" data_type: TYPE_FP32 dims: [2, 0] }', "input[0].dims: must be 1 or more each, or -1"),
        ('input { name: "x" data_type: TYPE_FP32 dims: [-2] }', "input[0].dims: expected a whole number from -1"),
        (
            'input { name: "x" data_type: TYPE_FP32 dims: 1 dim: 1 }',
            "input[0].dim: unknown key 'dim'; did you mean 'dims'?",
        ),
        (
            'input [{ name: "x" data_type: TYPE_FP32 dims: 1 }, { name: "x" data_type: TYPE_FP32 dims: 1 }]',
            "'x' is described twice",
        ),
        ("instance_group { kind: KIND_GPU }", "1: instance_group[0].kind: KIND_GPU is not supported in this version"),
        ("instance_group { gpus: [ 0 ] }", "1: instance_group[0].gpus: GPUs are not supported in this version"),
        ("instance_group { count: 1000 }", "instance_group[0].count: expected a whole number from 0 to 256"),
        ("version_policy { all {} latest {} }", "only one of latest, all and specific may stand"),
        ("version_policy { specific {} }", "version_policy.specific.versions: is missing"),
        ("version_policy { lates {} }", "did you mean 'latest'?"),
        ('default_model_filename: "../x.onnx"', "must be the name of a file in the version directory, not a path"),
        ('parameters { key: "intra_op_thread_count" value { string_value: "x" } }', "expected a number from 0 to 256"),
        (
            'parameters { key: "intra_op_thread_counts" value { string_value: "1" } }',
            "did you mean 'intra_op_thread_count'?",
        ),
        (
            'parameters { key: "execution_mode" value { string_value: "1" } }',
            "this onnxruntime option is not supported",
        ),
        ("optimization { execution_accelerators { } }", "optimization.execution_accelerators: accelerators are not"),
        ("optimization { cuda { } }", "optimization.cuda: GPUs are not supported"),
        ("optimization { graph { level: -1 } }", "optimization.graph.level: is not supported; remove it"),
        ("name: 'x", "1: column 7: this string is not closed on its line"),
    ],
)
def test_what_is_refused_says_where_and_what_to_do(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "m/config.pbtxt")
    assert expected in str(caught.value)
    assert len(caught.value.faults) == 1, caught.value
    assert str(caught.value).startswith("m/config.pbtxt:")


def test_all_faults_come_at_once_in_order_of_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("max_batch_size: x\nnam: 1\nmodel_operations {}\ninput { dims: 0 }")
    assert [fault.line for fault in caught.value.faults] == [1, 2, 3, 4, 4, 4]


KEYS = ["name", "platform", "max_batch_size", "input", "output", "dims", "data_type", "TYPE_FP32", "dynamic_batching"]
INNER = ["instance_group", "parameters", "key", "value", "string_value", "version_policy", "latest", "specific"]
NEW = ["sequence_batching", "oldest", "state", "control_input", "control", "ensemble_scheduling", "step", "input_map"]
NEW += ["batch_input", "batch_output", "model_warmup", "inputs", "zero_data", "priority_levels", "reshape", "shape"]
NEW += [
    "response_cache",
    "enable",
    "preserve_ordering",
    "priority_queue_policy",
    "metric_tags",
    "minimum_slot_utilization",
]
OTHER = ["versions", "count", "kind", "KIND_CPU", ":", "{", "}", "[", "]", ",", "1", "-1", "0", '"x"', "true"]
WORDS = st.sampled_from([*KEYS, *INNER, *NEW, *OTHER, "0.5", "nan"])


@given(st.one_of(st.text(), st.lists(WORDS, max_size=30).map(" ".join)))
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    outcome: ModelConfig | ConfigError
    try:
        outcome = parse(text)
    except ConfigError as error:
        outcome = error
    assert isinstance(outcome, ModelConfig) or outcome.faults
