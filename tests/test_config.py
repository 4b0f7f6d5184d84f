"""What a valid configuration means: precedence, sources, settings, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.config import Config, ModelEntry, ModelKeys, Server, json_schema, load
from gateway.config_faults import OPTIONS
from gateway.config_registry import RegistriesKeys
from gateway.config_schema import ConfigFile
from gateway.config_section import Section
from gateway.config_tree import read_scalar
from gateway.errors import ConfigError
from gateway.ingress import body_coding
from gateway.protocol.model_config import ModelConfig, parse
from gateway.protocol.options import ProtocolOptions
from gateway.registry.reference import DirectorySource

README = """
server:   {host: 127.0.0.1, http_port: 8000, metrics_port: 8002, workers: 2}
defaults: {instances: 2, max_queue_delay_ms: 0, deadline_ms: 30000}      # any model key may stand here
models:
  - name: digits
    source: ./models/digits                # a directory or an .onnx file
    digest: sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
    instances: 2
    isolation: shared
    max_batch_size: 64
    max_queue_delay_ms: 0
"""


def entry(**keys: Any) -> ModelEntry:
    return ModelEntry.model_validate({"source": ".", **keys})


def write(folder: Path, text: str) -> Path:
    file = folder / "gateway.yaml"
    file.write_text(text)
    return file


def test_defaults_without_any_file() -> None:
    config = load()
    assert config == Config()
    assert (config.server.host, config.server.http_port, config.server.metrics_port) == (
        "127.0.0.1",
        8000,
        8002,
    )
    assert config.server.worker_count >= 2
    assert config.server.limits.max_body_bytes == 64 * 1024 * 1024


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "server:\ndefaults:\nmodels:\n", "server: {}"])
def test_every_section_is_optional(tmp_path: Path, text: str) -> None:
    config = load(write(tmp_path, text))
    assert (config.server, config.defaults, config.models) == (Server(), ModelKeys(), ())


def test_the_readme_example_loads_and_satisfies_the_schema(tmp_path: Path) -> None:
    (tmp_path / "models" / "digits").mkdir(parents=True)
    config = load(write(tmp_path, README))
    (digits,) = config.models
    assert (digits.name, digits.max_batch_size, config.server.workers) == ("digits", 64, 2)
    assert config.model_lines == (5,)
    source = config.source(digits)
    assert isinstance(source, DirectorySource)
    assert source.path == tmp_path / "models" / "digits"
    assert_keys_in_schema(json.loads(ConfigFile.model_validate(written(digits)).model_dump_json(exclude_none=True)))


def written(digits: ModelEntry) -> dict[str, Any]:
    return {"server": {"http_port": 1}, "defaults": {"instances": 1}, "models": [digits.model_dump()]}


def assert_keys_in_schema(document: dict[str, Any]) -> None:
    """Each key of the document is described, typed and closed against unknown neighbours."""
    schema = json_schema()

    def walk(value: Any, part: dict[str, Any]) -> None:
        part = schema["$defs"][part["$ref"].rsplit("/", 1)[1]] if "$ref" in part else part
        if isinstance(value, dict):
            assert part["additionalProperties"] is False
            for key, inner in value.items():
                assert part["properties"][key]["description"], key
                walk(inner, part["properties"][key])
        elif isinstance(value, list) and "items" in part:
            for item in value:
                walk(item, part["items"])

    walk(document, schema)


def test_the_schema_covers_every_key_and_says_which_draft() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == {"server", "defaults", "models", "registries", "inference_log"}
    for name, part in schema["$defs"].items():
        assert part["additionalProperties"] is False, name
        for key, value in part["properties"].items():
            assert value.get("description"), f"{name}.{key}"
            assert value.get("examples"), f"{name}.{key}"
    json.dumps(schema)


def test_every_example_in_the_schema_is_accepted() -> None:
    def check(section: type[Section]) -> None:
        for name, known in section.model_fields.items():
            assert known.examples is not None
            for example in known.examples:
                keys = {"source": "."} if section is ModelEntry else {}
                section.model_validate({**keys, name: example})
            if isinstance(known.annotation, type) and issubclass(known.annotation, Section):
                check(known.annotation)

    check(ConfigFile)
    check(ModelEntry)


def test_precedence_command_line_over_environment_over_file(tmp_path: Path) -> None:
    file = write(tmp_path, "server: {http_port: 1, metrics_port: 2, workers: 3, log_level: debug}")
    environ = {"GATEWAY_HTTP_PORT": "11", "GATEWAY_METRICS_PORT": "12", "PATH": "x", "GATEWAY_UNRELATED": "y"}
    server = load(file, {"http_port": 21, "workers": None}, environ).server
    assert (server.http_port, server.metrics_port, server.workers, server.log_level) == (21, 12, 3, "debug")


def test_variables_are_typed_like_the_file() -> None:
    environ = {"GATEWAY_HOST": "0.0.0.0", "GATEWAY_INSECURE": "true", "GATEWAY_LOG_FORMAT": "json"}
    server = load(None, {}, environ).server
    assert (server.host, server.insecure, server.log_format) == ("0.0.0.0", True, "json")
    assert load(None, {}, {"GATEWAY_HOST": "", "GATEWAY_WORKERS": ""}).server == Server()
    assert load(None, {}, {"GATEWAY_ALLOW_CLIENT_SHM": "true"}).server.client_shared_memory
    assert load(None, {"allow_client_shm": True}, {"GATEWAY_ALLOW_CLIENT_SHM": "false"}).server.client_shared_memory
    assert not Server().client_shared_memory


def test_variables_that_kubernetes_makes_of_a_service_are_not_ours() -> None:
    assert load(None, {}, {"GATEWAY_HTTP_PORT": "tcp://10.0.0.1:80"}).server.http_port == 8000


def test_every_option_but_the_later_ones_sets_a_key_that_exists() -> None:
    later = {"processes"}
    sections: dict[str, type[Section]] = {"server": Server, "defaults": ModelKeys, "registries": RegistriesKeys}
    for option, (section, key) in OPTIONS.items():
        assert (key in sections[section].model_fields) is (option not in later)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1", "[::1]"])
def test_loopback_needs_no_consent(host: str) -> None:
    assert load(None, {"host": host}).server.host == host


@pytest.mark.parametrize(("text", "value"), [("on", "on"), ("off", "off"), ('"on"', "on"), ("auto", "auto")])
def test_batching_may_be_written_with_or_without_quotes(tmp_path: Path, text: str, value: str) -> None:
    assert load(write(tmp_path, f"defaults: {{batching: {text}}}")).defaults.batching == value


def test_two_free_ports_are_not_a_clash() -> None:
    assert load(None, {"http_port": 0, "metrics_port": 0}).server.http_port == 0


def test_instances_of_the_command_line_hold_for_every_model(tmp_path: Path) -> None:
    file = write(tmp_path, "defaults: {instances: 3}\nmodels: [{source: ., instances: 4}, {source: .}]")
    config = load(file)
    assert [config.settings(e).instances for e in config.models] == [4, 3]
    config = load(file, {"instances": 5})
    assert [config.settings(e, ModelConfig(instances=1)).instances for e in config.models] == [5, 5]


def test_a_models_own_entry_wins_over_pbtxt_over_defaults() -> None:
    config = Config(defaults=ModelKeys.model_validate({"max_queue_delay_ms": 7, "deadline_ms": 9}))
    stated = ModelConfig(max_queue_delay_us=2000, max_batch_size=8, instances=1, intra_op_threads=3)
    settings = config.settings(entry(max_batch_size=16), stated)
    assert settings.max_queue_delay_s == 0.002
    assert settings.deadline_s == 0.009
    assert (settings.max_batch_size, settings.instances, settings.intra_op_threads) == (16, 1, 3)
    assert config.settings(entry(max_queue_delay_ms=1), stated).max_queue_delay_s == 0.001
    assert config.settings(entry(), None).max_queue_delay_s == 0.007


def test_oversize_is_rejected_where_pbtxt_states_the_size_else_split() -> None:
    config = Config()
    assert config.settings(entry()).oversize == "split"
    assert config.settings(entry(max_batch_size=8)).oversize == "split"
    assert config.settings(entry(), ModelConfig(max_batch_size=8)).oversize == "reject"
    assert config.settings(entry(), ModelConfig(max_batch_size=0)).oversize == "split"
    assert config.settings(entry(oversize="split"), ModelConfig(max_batch_size=8)).oversize == "split"


def test_built_in_settings() -> None:
    settings = Config().settings(entry())
    assert (settings.instances, settings.dedicated, settings.batching, settings.max_batch_size) == (
        2,
        False,
        "auto",
        None,
    )
    assert (settings.max_queue_rows, settings.max_queue_bytes, settings.deadline_s) == (
        16_384,
        256 * 1024 * 1024,
        30.0,
    )


def test_a_queue_holds_at_least_one_full_batch() -> None:
    assert Config().settings(entry(max_queue_rows=4), parse("max_batch_size: 32")).max_queue_rows == 32
    # Triton's bound counts requests of a level, and holds beside this one on rows.
    stated = parse("dynamic_batching { default_queue_policy { max_queue_size: 4 } }")
    assert Config().settings(entry(), stated).max_queue_rows == 16_384


def test_threads_of_a_model_default_to_the_servers() -> None:
    config = load(None, {})
    assert config.settings(entry()).intra_op_threads is None
    config = Config(server=Server.model_validate({"intra_op_threads": 2}))
    assert config.settings(entry()).intra_op_threads == 2
    assert config.settings(entry(intra_op_threads=1)).intra_op_threads == 1


def test_sources_of_the_command_line_start_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "models").mkdir(parents=True)
    (there / "models").mkdir(parents=True)
    monkeypatch.chdir(here)
    config = load(write(there, "models: [{source: models}]")).with_sources(["models"])
    paths = [source.path for e in config.models if isinstance(source := config.source(e), DirectorySource)]
    assert paths == [there / "models", here / "models"]
    assert load().with_sources(["models"]).models[0].source == "models"


def test_bad_sources_of_the_command_line_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Config().with_sources(["/nope/a", "http://h:8000/v2", ""])
    assert len(caught.value.faults) == 3
    assert "command line: SOURCE '/nope/a': there is no directory /nope/a" in str(caught.value)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        setattr(Server(), "http_port", 1)  # noqa: B010  # the type checker knows it is frozen
    with pytest.raises(AttributeError):
        setattr(Config(), "file", "x")  # noqa: B010  # the type checker knows it is frozen


@given(st.text())
def test_any_text_is_a_fault_or_a_configuration(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "gateway.yaml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    outcome: Config | ConfigError
    try:
        outcome = load(file)
    except ConfigError as error:
        outcome = error
    assert isinstance(outcome, Config) or outcome.faults


@given(st.text(max_size=20))
def test_any_variable_has_a_value(text: str) -> None:
    assert read_scalar(text) is None or isinstance(read_scalar(text), str | int | float | bool)


def test_ways_of_speaking_the_protocol(tmp_path: Path) -> None:
    text = (
        "server: {protocol: {server_name: triton, triton_status_codes: true, json_half: true, invent_ids: true, "
        "typed_responses: mirror}, compression: {min_bytes: 0, level: 9}}"
    )
    config = load(write(tmp_path, text))
    assert config.server.protocol.options() == ProtocolOptions("triton", True, True, True, "mirror")
    assert (config.server.compression.min_bytes, config.server.compression.level) == (0, 9)
    defaults = Config().server
    assert defaults.protocol.options() == ProtocolOptions()
    assert (defaults.compression.min_bytes, defaults.compression.level) == (body_coding.MIN_BYTES, body_coding.LEVEL)


@pytest.mark.parametrize(
    ("keys", "options", "environ", "told"),
    [
        ("", {"load_models": ["a"]}, {}, "command line: --load-model: chooses"),
        ("", {"load_models": ["a"], "model_control": "poll"}, {}, "but with model control 'poll' everything is"),
        ("", {}, {"GATEWAY_LOAD_MODELS": "a"}, "environment: GATEWAY_LOAD_MODELS: .* GATEWAY_MODEL_CONTROL=explicit"),
        ("load_models: [a]", {}, {}, "server.load_models: .*add `model_control: explicit` in the section server"),
    ],
)
def test_models_to_load_need_explicit_control(
    tmp_path: Path, keys: str, options: dict[str, object], environ: dict[str, str], told: str
) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(f"server: {{{keys}}}\n")
    with pytest.raises(ConfigError, match=told):
        load(file, options, environ)
    assert load(file, {**options, "model_control": "explicit"}, environ).server.model_control == "explicit"
