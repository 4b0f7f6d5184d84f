"""A configuration as JSON: the ways clients write it, what it cannot be, and that the two forms say the same."""

from __future__ import annotations

import json

import pytest
from google.protobuf import text_format
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.core.model import TensorSpec
from gateway.core.tensor import DATATYPE
from gateway.errors import ConfigError
from gateway.protocol.model_config import parse
from gateway.protocol.model_config_json import parse_json
from gateway.protocol.schema import message
from tests.protocol.test_config_document import CAPTURED, configurations, obeyed


def test_numbers_may_stand_in_quotes() -> None:
    config, text = parse_json('{"max_batch_size": "16", "dynamic_batching": {"max_queue_delay_microseconds": "250"}}')
    assert (config.max_batch_size, config.max_queue_delay_us) == (16, 250)
    assert text == "max_batch_size: 16\ndynamic_batching {\n  max_queue_delay_microseconds: 250\n}\n"
    assert parse(text) == config


@pytest.mark.parametrize(
    "text",
    [
        '{"maxBatchSize": 4, "input": [{"name": "x", "dataType": "TYPE_FP32", "dims": ["-1", 3]}]}',
        '{"max_batch_size": 4, "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 3]}]}',
        '{"max_batch_size": 4, "input": [{"name": "x", "data_type": 11, "dims": [-1, 3]}]}',
    ],
)
def test_both_spellings_of_names(text: str) -> None:
    config, _ = parse_json(text)
    assert config.inputs == (TensorSpec("x", DATATYPE["FP32"], (-1, 3)),)
    assert config.max_batch_size == 4


def test_what_a_message_cannot_tell_from_nothing_is_kept() -> None:
    assert parse_json("{}")[0].max_batch_size is None
    for text in ('{"max_batch_size": 0}', '{"maxBatchSize": "0"}'):
        assert parse_json(text)[0].max_batch_size == 0
    scalar = '{"max_batch_size": 2, "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": []}]}'
    assert parse_json(scalar)[0].outputs == (TensorSpec("y", DATATYPE["FP32"], ()),)
    reshaped = json.loads(scalar)
    reshaped["output"][0] |= {"dims": [1], "reshape": {"shape": []}}
    assert parse_json(json.dumps(reshaped))[0].outputs[0].reshape == ()


def test_texts_with_everything_in_them() -> None:
    name = "a\"b\\c\n\té\u2028\U0001f600'"
    text = json.dumps({"parameters": {name: {"string_value": name}}, "name": name})
    config, canonical = parse_json(text)
    assert config.name == name
    assert text_format.Parse(canonical, message("inference.ModelConfig")()).parameters[name].string_value == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "config: is not valid JSON"),
        ("{", "config: is not valid JSON"),
        ("[]", "config: must be a JSON object"),
        ("null", "config: must be a JSON object"),
        ("3", "config: must be a JSON object"),
        ('{"max_batchsize": 1}', "config: max_batchsize: unknown key 'max_batchsize'; did you mean 'max_batch_size'?"),
        (
            '{"name": "a", "input": [{}, {"datatype": "TYPE_FP32"}]}',
            "config: input[1].datatype: unknown key 'datatype'; did you mean 'data_type'?",
        ),
        (
            '{"parameters": {"p": {"stringvalue": "x"}}}',
            "config: parameters[p].stringvalue: unknown key 'stringvalue'; did you mean 'string_value'?",
        ),
        ('{"a\\nb": 1}', "config: a b: unknown key 'a b'; "),
        ('{"max_batch_size": "x"}', "config: is not a model configuration: Failed to parse max_batch_size"),
        ('{"max_batch_size": 4294967296}', "config: is not a model configuration: Failed to parse max_batch_size"),
        ('{"max_batch_size": -1}', "max_batch_size: expected a whole number from 0"),
        ('{"backend": "python"}', "backend: only ONNX models are served"),
        ('{"dynamic_batching": {}, "sequence_batching": {}}', "config: is not a model configuration: "),
        ('{"instance_group": [{"kind": "KIND_GPU"}]}', "instance_group[0].kind: KIND_GPU is not supported"),
        ('{"model_warmup": [{"name": "w", "count": 4294967295}]}', "model_warmup[0].count: expected a whole number"),
        ('{"a": ' * 40 + "1" + "}" * 40, "config: a: unknown key 'a'; the keys here are: "),
        ("[" * 100_000, "config: is not valid JSON"),
        ('{"na\\ud800me": 1}', "surrogates not allowed"),
        (" " * 1_048_577, "config: is longer than 1048576 characters"),
    ],
)
def test_what_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_json(text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["name", "input", "dims", "data_type", "max_batch_size", "dynamic_batching", "parameters", "reshape", "shape",
         "sequence_batching", "state", "direct", "minimum_slot_utilization", "model_warmup", "inputs", "count"]
    ) | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.text() | JSON.map(json.dumps))
@example('{"sequence_batching": {"direct": {"minimum_slot_utilization": NaN}}}')
@example('{"sequence_batching": {"direct": {"minimum_slot_utilization": "Infinity"}}}')
@example('{"name": "\\ud800"}')
@example('{"parameters": {"\\udfff": {}}}')
def test_any_text_is_a_configuration_or_a_fault(text: str) -> None:
    try:
        config, canonical = parse_json(text)
    except ConfigError:
        return  # and nothing else
    assert parse(canonical) == config


@given(configurations())
def test_text_that_is_read_here_is_read_by_protobuf_too(text: str) -> None:
    """The document is made with protobuf's own reader: it must not refuse what was accepted."""
    try:
        parse(text)
    except ConfigError:
        return
    text_format.Parse(text, message("inference.ModelConfig")())


@pytest.mark.parametrize(
    "text",
    [
        "max_batch_size: 0x10 # sixteen",
        "name: 'a' \"b\"",
        'input < name: "x", data_type: TYPE_FP32; dims: [ ] >',
        "dynamic_batching: { preserve_ordering: 1 },",
        "sequence_batching { direct { minimum_slot_utilization: .5f } }",
        "version_policy: { all { } };",
    ],
)
def test_syntax_that_both_readers_take(text: str) -> None:
    parse(text)
    text_format.Parse(text, message("inference.ModelConfig")())


@pytest.mark.parametrize("name", sorted(CAPTURED))
def test_what_triton_prints_is_read_as_what_it_was_printed_from(name: str) -> None:
    printed = json.loads(json.dumps(CAPTURED[name]["config"]).replace('"python"', '"onnxruntime"'))
    printed.get("optimization", {}).pop("priority", None)
    wanted = parse(obeyed(CAPTURED[name]["pbtxt"]))
    read, _ = parse_json(json.dumps(printed))
    assert (read.inputs, read.outputs) == (wanted.inputs, wanted.outputs)
    assert read.scheduling == wanted.scheduling
    assert read.version_policy == wanted.version_policy
    assert read.max_batch_size == (wanted.max_batch_size or 0)


def test_a_list_of_numbers_needs_a_colon_in_both_readers() -> None:
    text = 'input { name: "x" data_type: TYPE_FP32 dims [ 3 ] }'
    with pytest.raises(ConfigError, match=r"expected ':' or '\{' after 'dims', found '3'"):
        parse(text)
    with pytest.raises(text_format.ParseError):
        text_format.Parse(text, message("inference.ModelConfig")())
    assert parse('input [ { name: "x" data_type: TYPE_FP32 dims: [ 3 ] } ]').inputs
