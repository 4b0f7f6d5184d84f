"""config.pbtxt beyond sizes: priorities and policies, sequences, ensembles, ragged batches, warm-up, reshape.

What is refused was put to a real Triton 2.51 as well; where both refuse, the words are close to Triton's.
"""

from __future__ import annotations

import pytest

from gateway.core.model import TensorSpec
from gateway.core.scheduling import (
    BatchInputTensor,
    BatchOutputTensor,
    ControlInput,
    EnsembleStep,
    QueuePolicy,
    Scheduling,
    SequencePolicy,
    StateTensor,
    WarmUpInput,
    WarmUpSample,
)
from gateway.core.tensor import DATATYPE
from gateway.errors import ConfigError
from gateway.protocol.model_config import parse

FP32, INT32, UINT64 = DATATYPE["FP32"], DATATYPE["INT32"], DATATYPE["UINT64"]
IO = """
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 3 ] } ]
"""


def scheduling(text: str) -> Scheduling:
    return parse(text).scheduling


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert len(caught.value.faults) == 1, caught.value
    return str(caught.value)


# -- dynamic batching ----------------------------------------------------------------------------------------------


def test_priorities_and_policies() -> None:
    found = scheduling(
        """max_batch_size: 8 dynamic_batching {
          priority_levels: 3 default_priority_level: 2
          default_queue_policy { default_timeout_microseconds: 1500000 allow_timeout_override: true max_queue_size: 5 }
          priority_queue_policy [ { key: 3 value { timeout_action: DELAY default_timeout_microseconds: 10 } },
                                  { key: 1 value { max_queue_size: 1 } } ] }"""
    )
    assert (found.priority_levels, found.default_priority_level, found.preserve_ordering) == (3, 2, False)
    assert found.default_queue_policy == QueuePolicy("REJECT", 1.5, True, 5)
    assert found.queue_policy(1) == QueuePolicy(max_queue_size=1)
    assert found.queue_policy(2) == found.default_queue_policy
    assert found.queue_policy(3) == QueuePolicy("DELAY", 1e-5)


def test_answers_in_order() -> None:
    assert scheduling("dynamic_batching { preserve_ordering: true }").preserve_ordering
    one_level = "dynamic_batching { preserve_ordering: true priority_levels: 1 default_priority_level: 1 }"
    assert scheduling(one_level).preserve_ordering
    # Without a time that can run out, nothing is ever put off; Triton accepts this too.
    assert scheduling(
        "dynamic_batching { preserve_ordering: true default_queue_policy { timeout_action: DELAY } }"
    ).preserve_ordering


def test_what_is_said_of_levels_that_do_not_exist_has_no_effect_and_is_noted() -> None:
    config = parse("dynamic_batching { default_priority_level: 1 priority_queue_policy { key: 1 value { } } }")
    assert config.scheduling == Scheduling()
    assert config.ignored == ("dynamic_batching.default_priority_level", "dynamic_batching.priority_queue_policy")


@pytest.mark.parametrize(
    ("inside", "key", "why"),
    [
        ("priority_levels: 2", "default_priority_level", "default priority level must be in range [1, 2]"),
        ("priority_levels: 2 default_priority_level: 3", "default_priority_level", "in range [1, 2]"),
        (
            "priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 3 value { } }",
            "priority_queue_policy[0].key",
            "priority queue policy must have priority level in range [1, 2]",
        ),
        (
            "priority_levels: 2 default_priority_level: 1 priority_queue_policy [{ key: 1 }, { key: 1 }]",
            "priority_queue_policy[1].key",
            "level 1 stands twice",
        ),
        ("preferred_batch_size: 9", "preferred_batch_size", "must not exceed max_batch_size, which is 8"),
        ("preferred_batch_size: 0", "preferred_batch_size", "expected a whole number from 1"),
        (
            "preserve_ordering: true priority_levels: 2 default_priority_level: 1",
            "preserve_ordering",
            "Only one priority level is allowed when 'preserve_ordering' is true",
        ),
        (
            "preserve_ordering: true default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 5 }",
            "preserve_ordering",
            "Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true",
        ),
        (
            (
                "preserve_ordering: true priority_levels: 1 default_priority_level: 1 priority_queue_policy { key: 1 "
                "value { timeout_action: DELAY default_timeout_microseconds: 5 } }"
            ),
            "preserve_ordering",
            "Queue policy can not have DELAY",
        ),
        ("default_queue_policy { timeout_action: WAIT }", "default_queue_policy.timeout_action", "WAIT is not known"),
        ("default_queue_policy { max_queue: 1 }", "default_queue_policy.max_queue", "unknown key 'max_queue'"),
    ],
)
def test_dynamic_batching_that_contradicts_itself(inside: str, key: str, why: str) -> None:
    text = refused(f"max_batch_size: 8 dynamic_batching {{ {inside} }}")
    assert f"dynamic_batching.{key}: " in text
    assert why in text


# -- sequences -----------------------------------------------------------------------------------------------------


def test_a_direct_sequence() -> None:
    config = parse(
        """max_batch_size: 4 sequence_batching { max_sequence_idle_microseconds: 5000000
          direct { max_queue_delay_microseconds: 250 minimum_slot_utilization: 0.5 }
          control_input [
            { name: "START" control [ { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, -1 ] } ] },
            { name: "READY" control [ { kind: CONTROL_SEQUENCE_READY fp32_false_true: [ 0, 1.5 ] } ] },
            { name: "END" control [ { kind: CONTROL_SEQUENCE_END bool_false_true: [ false, true ] } ] },
            { name: "ID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } ] } ]
          state [ { input_name: "SI" output_name: "SO" data_type: TYPE_FP32 dims: [ -1, 2 ] },
                  { input_name: "TI" output_name: "TO" data_type: TYPE_INT32 dims: [ 2 ]
                    use_growable_memory: true use_same_buffer_for_input_output: false
                    initial_state { name: "t" data_type: TYPE_INT32 dims: [ 2 ] data_file: "first" } } ]
          iterative_sequence: true }"""
    )
    assert config.scheduling.sequence == SequencePolicy(
        "direct",
        5.0,
        0.00025,
        0.5,
        controls=(
            ControlInput("START", "CONTROL_SEQUENCE_START", INT32, 0.0, -1.0),
            ControlInput("READY", "CONTROL_SEQUENCE_READY", FP32, 0.0, 1.5),
            ControlInput("END", "CONTROL_SEQUENCE_END", DATATYPE["BOOL"], 0.0, 1.0),
            ControlInput("ID", "CONTROL_SEQUENCE_CORRID", UINT64),
        ),
        states=(StateTensor("SI", "SO", FP32, (-1, 2)), StateTensor("TI", "TO", INT32, (2,))),
        iterative=True,
    )
    assert config.state_files == (("TI", "first"),)
    assert config.ignored == ("sequence_batching.state[1].use_growable_memory",)
    filled = config.with_files({}, {"TI": b"12345678"}).scheduling.sequence
    assert filled is not None
    assert [state.initial for state in filled.states] == [None, b"12345678"]


def test_an_oldest_sequence_and_what_is_not_said() -> None:
    found = scheduling(
        "max_batch_size: 4 sequence_batching { oldest { max_candidate_sequences: 9 preferred_batch_size: [ 2, 4 ] "
        "max_queue_delay_microseconds: 1 preserve_ordering: true } }"
    )
    assert found.sequence == SequencePolicy("oldest", 1.0, 1e-6, 0.0, 9, (2, 4), True)
    assert scheduling("sequence_batching { }").sequence == SequencePolicy()


def control(inside: str) -> str:
    return f'control_input {{ name: "A" control {{ {inside} }} }}'


@pytest.mark.parametrize(
    ("inside", "key", "why"),
    [
        ("direct { } oldest { }", "oldest", "only one of direct and oldest may stand"),
        ("oldest { preferred_batch_size: 9 }", "oldest.preferred_batch_size", "must not exceed max_batch_size"),
        ("direct { minimum_slot_utilization: 2 }", "direct.minimum_slot_utilization", "a number from 0 to 1, found 2"),
        ("direct { minimum_slot_utilization: 01 }", "direct.minimum_slot_utilization", "in decimal digits, found 1"),
        (control("kind: CONTROL_SEQUENCE_START"), "control_input[0].control[0].kind", "must specify one of"),
        (
            control("kind: CONTROL_SEQUENCE_END int32_false_true: [0, 1] fp32_false_true: [0, 1]"),
            "control_input[0].control[0].kind",
            "specifies more than one of",
        ),
        (
            control("kind: CONTROL_SEQUENCE_READY fp32_false_true: [ 1 ]"),
            "control_input[0].control[0].fp32_false_true",
            "must have exactly 2 entries for CONTROL_SEQUENCE_READY, found 1",
        ),
        (
            control("kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 int32_false_true: [ 0, 1 ]"),
            "control_input[0].control[0].int32_false_true",
            "must not specify it for CONTROL_SEQUENCE_CORRID",
        ),
        (
            control("kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_FP32"),
            "control_input[0].control[0].data_type",
            "unexpected data type for control CONTROL_SEQUENCE_CORRID",
        ),
        (control("kind: CONTROL_SEQUENCE_CORRID"), "control_input[0].control[0].data_type", "unexpected data type"),
        (
            control("kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] data_type: TYPE_INT32"),
            "control_input[0].control[0].data_type",
            "belongs to CONTROL_SEQUENCE_CORRID",
        ),
        (
            control("int32_false_true: [0, 1]") + control("int32_false_true: [0, 1]"),
            "control_input[1].control[0].kind",
            "sequence batching specifies multiple CONTROL_SEQUENCE_START tensors",
        ),
        ("control_input { control { int32_false_true: [0, 1] } }", "control_input[0].name", "is missing"),
        ('state { input_name: "a" data_type: TYPE_FP32 dims: 1 }', "state[0].output_name", "is missing"),
        (
            (
                'state { input_name: "a" output_name: "b" data_type: TYPE_FP32 dims: 1 '
                'initial_state { name: "i" data_type: TYPE_FP32 dims: 1 } }'
            ),
            "state[0].initial_state[0].zero_data",
            "write exactly one of zero_data: true and data_file",
        ),
        (
            (
                'state { input_name: "a" output_name: "b" data_type: TYPE_FP32 dims: 1 '
                'initial_state { name: "i" data_type: TYPE_FP32 dims: 1 data_file: "../x" } }'
            ),
            "state[0].initial_state[0].data_file",
            "must be a path inside the model's directory",
        ),
    ],
)
def test_sequences_that_cannot_be(inside: str, key: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"max_batch_size: 8 sequence_batching {{ {inside} }}")
    assert f"sequence_batching.{key}: " in str(caught.value)
    assert why in str(caught.value)


# -- ensembles -----------------------------------------------------------------------------------------------------

STEP = 'step { model_name: "a" model_version: -1 input_map { key: "i" value: "x" } output_map { key: "o" value: "y" } }'


def test_an_ensemble() -> None:
    config = parse(
        f'platform: "ensemble" {IO} ensemble_scheduling {{ {STEP} step {{ model_name: "b" model_version: 3 '
        'input_map [ { key: "p" value: "x" }, { key: "q" value: "x" } ] output_map { key: "o" value: "z" } } }'
    )
    assert config.scheduling.ensemble == (
        EnsembleStep("a", None, (("i", "x"),), (("o", "y"),)),
        EnsembleStep("b", "3", (("p", "x"), ("q", "x")), (("o", "z"),)),
    )
    assert config.ensemble
    assert config.max_batch_size == 0
    assert not parse("").ensemble


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ensemble_scheduling { }", "ensemble_scheduling.step: is missing"),
        (
            f"ensemble_scheduling {{ {STEP} }} instance_group {{ }}",
            "instance_group: should not be specified for an ens",
        ),
        (f'ensemble_scheduling {{ {STEP} }} backend: "onnxruntime"', "backend: an ensemble has no model file"),
        (f'ensemble_scheduling {{ {STEP} }} platform: "onnxruntime_onnx"', "platform: an ensemble has no model file"),
        (
            f'ensemble_scheduling {{ {STEP} }} model_warmup {{ name: "w" }}',
            "model_warmup: should not be specified for an ensemble",
        ),
        (
            f"ensemble_scheduling {{ {STEP.replace('model_version: -1', 'model_version: 0')} }}",
            "ensemble_scheduling.step[0].model_version: is 0",
        ),
        (
            'ensemble_scheduling { step { model_name: "a" output_map { key: "o" value: "y" } } }',
            "step[0].input_map: must hold at least one tensor",
        ),
        (
            f"ensemble_scheduling {{ {STEP} }} dynamic_batching {{ }}",
            "ensemble_scheduling: only one of dynamic_batching",
        ),
        (
            "ensemble_scheduling { " + STEP.replace("model_version: -1", 'model_namespace: "n"') + " }",
            "step[0].model_namespace: namespaces are not supported",
        ),
    ],
)
def test_ensembles_that_cannot_be(text: str, expected: str) -> None:
    assert expected in refused(IO + text)


def test_an_ensemble_states_its_tensors() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"ensemble_scheduling {{ {STEP} }}")
    assert [fault.where for fault in caught.value.faults] == ["input", "output"]


# -- ragged batches ------------------------------------------------------------------------------------------------


def test_ragged_batches() -> None:
    config = parse(
        """max_batch_size: 4 input { name: "x" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }
        output { name: "y" data_type: TYPE_FP32 dims: [ -1 ] }
        batch_input { kind: BATCH_ITEM_SHAPE target_name: "s" data_type: TYPE_INT32 source_input: "x" }
        batch_input { target_name: "n" data_type: TYPE_FP32 source_input: "x" }
        batch_output { kind: BATCH_SCATTER_WITH_INPUT_SHAPE target_name: "y" source_input: "x" }"""
    )
    assert config.inputs == (TensorSpec("x", FP32, (-1,), ragged=True),)
    assert config.scheduling.batch_inputs == (
        BatchInputTensor("BATCH_ITEM_SHAPE", ("s",), INT32, ("x",)),
        BatchInputTensor("BATCH_ELEMENT_COUNT", ("n",), FP32, ("x",)),
    )
    assert config.scheduling.batch_outputs == (BatchOutputTensor(("y",), ("x",)),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'batch_input { target_name: "n" data_type: TYPE_INT64 source_input: "x" }',
            "batch_input[0].data_type: batch input data type must be TYPE_INT32 or TYPE_FP32",
        ),
        (
            'batch_input { target_name: "n" data_type: TYPE_FP32 source_input: "q" }',
            "batch_input[0].source_input: unknown source input name 'q'",
        ),
        (
            'batch_input { target_name: "n" data_type: TYPE_FP32 source_input: [ "x", "x" ] }',
            "batch input kind 'BATCH_ELEMENT_COUNT' expects 1 source input, got 2",
        ),
        ('batch_input { data_type: TYPE_FP32 source_input: "x" }', "batch_input[0].target_name: is missing"),
        (
            'batch_output { target_name: "q" source_input: "x" }',
            "batch_output[0].target_name: unknown target output name 'q'",
        ),
        ('batch_output { target_name: "y" }', "expects 1 source input, got 0"),
    ],
)
def test_ragged_batches_that_cannot_be(text: str, expected: str) -> None:
    assert expected in refused("max_batch_size: 4" + IO + text)


# -- warm-up -------------------------------------------------------------------------------------------------------


def test_samples() -> None:
    found = scheduling(
        """model_warmup [ { name: "first" batch_size: 2 count: 3
            inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 3, 1 ] zero_data: true } }
            inputs { key: "s" value { data_type: TYPE_STRING dims: [ ] random_data: true } } },
          { name: "second" inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 3 ] input_data_file: "raw" } } } ]"""
    )
    assert found.warm_up == (
        WarmUpSample(
            "first",
            2,
            3,
            (WarmUpInput("x", FP32, (3, 1), "zero"), WarmUpInput("s", DATATYPE["BYTES"], (), "random")),
        ),
        WarmUpSample("second", 0, 0, (WarmUpInput("x", FP32, (3,), "file", "raw"),)),
    )


@pytest.mark.parametrize(
    ("value", "key", "why"),
    [
        ("dims: 3", "zero_data", "is how 'x' gets its data: write exactly one of"),
        ("dims: 3 zero_data: true random_data: true", "zero_data", "write exactly one of"),
        ("dims: 3 zero_data: true random_data: false", "random_data", "write true, or choose another kind"),
        ('dims: 3 input_data_file: "/etc/passwd"', "input_data_file", "must be a path inside the model's directory"),
        ('dims: 3 input_data_file: "../../x"', "input_data_file", "must be a path inside the model's directory"),
        ("dims: -1 zero_data: true", "dims", "expected a whole number from 1"),
        ("zero_data: true", "dims", "is missing"),
    ],
)
def test_samples_that_cannot_be(value: str, key: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f'model_warmup {{ name: "w" inputs {{ key: "x" value {{ data_type: TYPE_FP32 {value} }} }} }}')
    assert f"model_warmup[0].inputs[0].value.{key}: " in str(caught.value)
    assert why in str(caught.value)


def test_a_sample_needs_a_name_and_a_bounded_count() -> None:
    assert "model_warmup[0].name: is missing" in refused("model_warmup { }")
    assert "model_warmup[0].count: expected a whole number" in refused('model_warmup { name: "w" count: 10001 }')


# -- tensors -------------------------------------------------------------------------------------------------------


def reshaped(dims: str, shape: str, size: int = 8) -> str:
    tensor = f'name: "x" data_type: TYPE_FP32 dims: [ {dims} ] reshape {{ shape: [ {shape} ] }}'
    return f"max_batch_size: {size} input {{ {tensor} }}"


@pytest.mark.parametrize(
    ("dims", "shape"), [("1, 3", "3"), ("1", ""), ("-1, 1", "-1"), ("2, -1, 2, 3", "2, -1, 6"), ("4, 3", "2, 6")]
)
def test_dims_that_hold_as_many_elements(dims: str, shape: str) -> None:
    (spec,) = parse(reshaped(dims, shape)).inputs
    assert spec.reshape == tuple(int(dim) for dim in shape.split(",") if dim)


@pytest.mark.parametrize(
    ("dims", "shape"), [("3", "4"), ("-1, 3", "3"), ("-1, 4", "4, -1"), ("2, -1, 2, -1, 3", "2, -1, 1, -1, 6")]
)
def test_dims_that_do_not(dims: str, shape: str) -> None:
    """The same four that Triton was asked about."""
    assert "input[0].reshape.shape: has different size for dims" in refused(reshaped(dims, shape))


def test_a_scalar_needs_a_batch_dimension() -> None:
    assert "input[0].reshape.shape: cannot be empty for a model with max_batch_size 0" in refused(reshaped("1", "", 0))


@pytest.mark.parametrize("name", ["../labels.txt", "/labels.txt", "a/../../b", "a\\000b"])
def test_labels_are_in_the_models_directory(name: str) -> None:
    text = f'output {{ name: "y" data_type: TYPE_FP32 dims: 3 label_filename: "{name}" }}'
    assert "output[0].label_filename: must be a path inside the model's directory" in refused(text)


@pytest.mark.parametrize("key", ["is_shape_tensor", "is_non_linear_format_io"])
def test_what_belongs_to_tensorrt_is_refused_by_name(key: str) -> None:
    for role in ("input", "output"):
        assert f"{role}[0].{key}: " in refused(f'{role} {{ name: "x" data_type: TYPE_FP32 dims: 1 {key}: true }}')
    assert parse(f'input {{ name: "x" data_type: TYPE_FP32 dims: 1 {key}: false }}').inputs
