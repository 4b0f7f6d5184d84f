"""Targets: model configurations as text and as JSON, and what a load request brings along."""

from __future__ import annotations

import atexit
import contextlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from gateway.core.client_memory import Area
from gateway.errors import ConfigError, GatewayError
from gateway.management_override import MAX_FILES, read_override
from gateway.protocol.model_config import ModelConfig, parse
from gateway.protocol.model_config_json import parse_json
from gateway.protocol.schema import message
from gateway.shared_memory import SharedMemory
from tests.fuzz.target import Finding, Target, check_refusal, require

_MODEL_CONFIG = message("inference.ModelConfig")
_MAX_FAULTS_PER_BYTE = 2
_EMPTY_LIST = re.compile(r"\w(\s|#.*)*\[(\s|#.*)*\]")
"""`dims []` without a colon: the library takes it for messages only, we take it for nothing stated."""


def run_pbtxt(data: bytes) -> None:
    """A configuration or faults with lines that exist; what we accept, the protobuf library accepts."""
    text = data.decode(errors="replace")
    try:
        config = parse(text)
    except ConfigError as error:
        _check_faults(error, text)
        return
    require(config.text == text, "another text is kept", config.text)
    _check_config(config)
    try:
        text_format.Parse(text, _MODEL_CONFIG())
    except text_format.ParseError as error:
        if _EMPTY_LIST.search(text):
            return
        raise Finding(f"accepted, but the protobuf library refuses it: {error}: {text!r}") from None


def _check_faults(error: ConfigError, text: str) -> None:
    require(error.faults, "refused without a fault", text)
    require(len(error.faults) <= 10 + _MAX_FAULTS_PER_BYTE * len(text), "more faults than text", len(error.faults))
    lines = text.count("\n") + 1
    for fault in error.faults:
        require(fault.message, "a fault without words", fault)
        require(len(fault.message) < 2000, "a fault that is too long", fault.message)
        require(0 <= fault.line <= lines, "a fault on a line that does not exist", fault, text)


def _check_config(config: ModelConfig) -> None:
    require(config.max_batch_size is None or config.max_batch_size >= 0, "a negative batch size", config)
    require(config.instances is None or config.instances >= 1, "no instances", config)
    require(config.max_queue_delay_us is None or config.max_queue_delay_us >= 0, "a negative delay", config)
    for tensor in (*config.inputs, *config.outputs):
        require(all(dim >= -1 for dim in tensor.dims), "a negative dimension", tensor)
        require(tensor.name, "a tensor without a name", tensor)


def run_config_json(data: bytes) -> None:
    """A configuration in JSON: refused, or equal to what its canonical text says."""
    text = data.decode(errors="replace")
    try:
        config, canonical = parse_json(text)
    except ConfigError as error:
        require(error.faults and all(fault.message for fault in error.faults), "refused without words", text)
        require(len(str(error)) < 100_000, "a refusal that is too long", text[:200])
        return
    _check_config(config)
    require(parse(canonical) == config, "the canonical text says something else", canonical)


def run_load(data: bytes) -> None:
    """Load parameters as JSON: refused, or files whose paths stay inside."""
    try:
        parameters = json.loads(data)
    except (ValueError, RecursionError):
        parameters = {"config": data.decode(errors="replace"), data.decode(errors="replace"): "", "file:1/m": data}
    if not isinstance(parameters, dict):
        return
    try:
        override = read_override(parameters)
    except ConfigError as error:
        require(error.faults, "refused without a fault", data)
        return
    except GatewayError as error:
        check_refusal(error)
        return
    if override is None:
        require(not parameters, "parameters were passed over", parameters)
        return
    require(len(override.files) <= MAX_FILES, "too many files", len(override.files))
    for path, content in override.files.items():
        parts = path.split("/")
        require(isinstance(content, bytes), "a file that is no bytes", path)
        for part in parts:
            require(part and not part.startswith("."), "a path that leaves or hides", path)
            with contextlib.suppress(UnicodeDecodeError):
                require(part.isascii() and part.isprintable() and "\\" not in part, "a strange path", path)


_SHARED = Path(tempfile.mkdtemp(prefix="fuzz-regions-"))
atexit.register(shutil.rmtree, _SHARED, ignore_errors=True)
(_SHARED / "object").write_bytes(bytes(100))
(_SHARED / "link").symlink_to("/etc/hostname")
(_SHARED / "inside").mkdir()
_MEMORY = SharedMemory(1 << 20, str(_SHARED))


def run_region(data: bytes) -> None:
    """`name NUL key NUL offset NUL size`: registered, then read at an area; only the one object can be reached."""
    parts = [*data.decode(errors="surrogateescape").split("\0"), "", "", "", ""]
    numbers = [int(text) if text.removeprefix("-").isdecimal() and len(text) < 25 else 0 for text in parts[2:4]]
    try:
        _MEMORY.register(parts[0], parts[1], *numbers)
        require(parts[1].strip("/") == "object", "another object was opened", parts[1])
        area = Area(parts[0], numbers[1] // 2, numbers[0])
        require(len(_MEMORY.find(area).read()) == area.nbytes, "another size was read", area)
    except GatewayError as error:
        check_refusal(error)
    finally:
        _MEMORY.unregister(None)
    require(_MEMORY.status(None) == [], "a region is left")


_REGIONS = (
    b"r\0/object\x000\x00100", b"r\0object\x0010\x0020", b"r\0/link\x000\x001", b"r\0/inside\x000\x001",
    b"r\0../object\x000\x009", b"r\0/object\x0099\x002", b"r\0/object\x00-1\x001", b"\xc3\xa9\0/object\x001\x001",
    b"r\0/object\x000\x0018446744073709551615",
)  # fmt: skip
_TEXTS = (
    (
        b'name: "m"\nplatform: "onnxruntime_onnx"\nmax_batch_size: 8\ninput [ { name: "X" data_type: '
        b'TYPE_FP32 dims: [ -1 ] } ]\noutput [ { name: "Y" data_type: TYPE_FP32 dims: [ 3 ] '
        b'label_filename: "l.txt" } ]\n'
    ),
    (
        b'backend: "onnxruntime" dynamic_batching { preferred_batch_size: [ 4, 8 ] '
        b'max_queue_delay_microseconds: 100 preserve_ordering: true priority_levels: 2 '
        b'default_priority_level: 1 default_queue_policy { timeout_action: DELAY '
        b'default_timeout_microseconds: 9 allow_timeout_override: true max_queue_size: 3 } } '
        b'max_batch_size: 8'
    ),
    b"version_policy: { specific { versions: [1, 3] } } instance_group [ { count: 2 kind: KIND_CPU } ]",
    (
        b'sequence_batching { max_sequence_idle_microseconds: 5 oldest { max_candidate_sequences: 4 } '
        b'control_input [ { name: "S" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, '
        b'1 ] } ] } ] } max_batch_size: 2'
    ),
    (
        b'platform: "ensemble" ensemble_scheduling { step [ { model_name: "a" model_version: -1 '
        b'input_map { key: "x" value: "y" } output_map { key: "z" value: "w" } } ] }'
    ),
    (
        b'model_warmup { name: "w" batch_size: 1 count: 2 inputs { key: "X" value: { data_type: '
        b'TYPE_FP32 dims: 3 zero_data: true } } } response_cache { enable: true }'
    ),
    (
        b'input { name: "X" data_type: TYPE_STRING dims: 1 reshape: { shape: [ ] } optional: true '
        b'allow_ragged_batch: true } parameters { key: "a" value: { string_value: '
        b'"\\303\\251\\x41\\u00e9" } } # comment'
    ),
    b"batch_input [ { kind: BATCH_ACCUMULATED_ELEMENT_COUNT target_name: 'I' source_input: 'X' } ]",
)  # fmt: skip
_KEYS = (
    b"name", b"platform", b"backend", b"max_batch_size", b"input", b"output", b"dims", b"data_type", b"TYPE_FP32",
    b"dynamic_batching", b"preferred_batch_size", b"max_queue_delay_microseconds", b"sequence_batching", b"direct",
    b"oldest", b"ensemble_scheduling", b"instance_group", b"KIND_CPU", b"version_policy", b"latest", b"all", b"{",
    b"}", b"[", b"]", b"<", b">", b":", b",", b";", b'"', b"\\", b"-", b"inf", b"1e9", b"0x1F", b"017", b".5f", b"#",
    b"\n", b"true", b"false", b"18446744073709551616", b"parameters", b"model_warmup", b"reshape", b"shape", b"key",
    b"value", b"control_input", b"state", b"batch_input", b"label_filename", b"optimization", b"metric_tags",
    b"priority_queue_policy",
)  # fmt: skip


def _as_json() -> list[bytes]:
    from google.protobuf import json_format

    found = []
    for text in _TEXTS:
        parsed: Any = text_format.Parse(text.decode(), _MODEL_CONFIG())
        found.append(json_format.MessageToJson(parsed, preserving_proto_field_name=True, indent=None).encode())
    return found


_JSONS = (*_as_json(), b'{"max_batch_size": "16"}', b'{"maxBatchSize": 0, "input": []}', b"[]", b'{"dims": NaN}')
_LOADS = (
    b'{"config": "{\\"max_batch_size\\": 16}"}',
    b'{"config": "{}", "file:1/model.onnx": "AAEC"}',
    b'{"config": "{}", "file:1/../../x": "AA==", "file:/etc/passwd": ""}',
    b'{"file:1/model.onnx": "AAEC"}', b'{"config": 5}', b'{"other": "x"}', b'{"config": "{}", "file:config.pbtxt": ""}',
    b'{"config": "{}", "file:01/m": "AA==", "file:.hidden": "AA=="}',
)  # fmt: skip
TARGETS = (
    Target("pbtxt", run_pbtxt, _TEXTS, _KEYS),
    Target(
        "region", run_region, _REGIONS, (b"\0", b"/", b"..", b"object", b"link", b"-", b"9223372036854775807", b"\xff")
    ),
    Target("config-json", run_config_json, tuple(_JSONS), (*_KEYS, b'":', b'"', b"{}", b"[]", b"null", b"1.5")),
    Target(
        "load", run_load, _LOADS, (b'"config"', b'"file:', b"/", b"..", b"\\u0000", b"{}", b"=", b'\\"', *_KEYS[:8])
    ),
)
