"""The section `inference_log` and the key of that name in models: what holds, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import Config, load
from gateway.config_log import InferenceLog, ModelLog, Payloads, policy
from gateway.core.log_policy import LOG_POLICY, LogPolicy
from gateway.errors import ConfigError


def loaded(directory: Path, text: str) -> Config:
    file = directory / "gateway.yaml"
    file.write_text(text)
    return load(file)


def faults(directory: Path, text: str) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        loaded(directory, text)
    return [(fault.where, fault.message) for fault in caught.value.faults]


def test_without_the_section_there_is_no_log(tmp_path: Path) -> None:
    assert loaded(tmp_path, "server: {workers: 1}").inference_log is None


@pytest.mark.parametrize("text", ["inference_log:", "inference_log: {}"])
def test_an_empty_section_is_a_log_with_the_built_in_values(tmp_path: Path, text: str) -> None:
    section = loaded(tmp_path, text).inference_log
    assert section == InferenceLog()
    assert section.retention_days == 183


def test_keys_of_a_model_go_before_those_of_defaults(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        """
inference_log: {spill_directory: /mnt/spill}
defaults:
  inference_log: {overflow: spill, sampling: 0.5, payloads: {default: hash, tensors: {a: drop, b: drop}}}
models:
  - {source: ., inference_log: {sampling: 1, payloads: {tensors: {a: keep}, truncate_bytes: 9}}}
""",
    )
    (entry,) = config.models
    assert config.settings(entry).logged == LogPolicy(
        overflow="spill", payload="hash", tensors=(("a", "keep"), ("b", "drop")), truncate_bytes=9, sampling=1.0
    )


def test_nothing_stated_is_the_built_in_policy() -> None:
    assert policy(None, None) == policy(ModelLog(), ModelLog(payloads=Payloads())) == LOG_POLICY


def test_a_policy_knows_each_tensor() -> None:
    found = LogPolicy(payload="hash", tensors=(("a", "keep"),))
    assert (found.of("a"), found.of("b")) == ("keep", "hash")


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ("inference_log: {retention_days: 30}", "inference_log.retention_days", "183"),
        (
            "inference_log: {}\ndefaults: {inference_log: {retention_days: 30}}",
            "defaults.inference_log.retention_days",
            "allow_short_retention: true",
        ),
        ("defaults: {inference_log: {sampling: 1}}", "defaults.inference_log", "no effect without the section"),
        (
            "inference_log: {}\nmodels: [{source: ., inference_log: {overflow: spill}}]",
            "models[0].inference_log.overflow",
            "spill_directory",
        ),
        ("inference_log: {sync_mss: 5}", "inference_log.sync_mss", "did you mean"),
        ("inference_log: {queue_mb: 0}", "inference_log.queue_mb", "at least 1"),
        ("inference_log: 7", "inference_log", "expected keys and values"),
        (
            "inference_log: {}\ndefaults: {inference_log: {payloads: {tensors: {x: hide}}}}",
            "defaults.inference_log.payloads.tensors.x",
            "not possible",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, where: str, said: str) -> None:
    found = faults(tmp_path, text)
    assert [place for place, _ in found] == [where], found
    assert said in found[0][1]


def test_short_retention_may_be_allowed(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        "inference_log: {retention_days: 30, allow_short_retention: true}\n"
        "models: [{source: ., inference_log: {retention_days: 5}}]",
    )
    assert config.inference_log is not None
    assert config.inference_log.retention_days == 30
    assert config.settings(config.models[0]).logged.retention_days == 5
