"""From the entries of a configuration to the models on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import Backend, Config, ModelEntry, load
from gateway.config_models import find_models
from gateway.errors import ConfigError

BACKEND = Backend(url="http://h")


def model(folder: Path, config: str | None = None) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(b"x")
    if config is not None:
        (folder / "config.pbtxt").write_text(config)


def test_all_models_of_all_entries_in_order(tmp_path: Path) -> None:
    model(tmp_path / "repository" / "b")
    model(tmp_path / "repository" / "a")
    model(tmp_path / "single")
    (tmp_path / "g.yaml").write_text("models: [{source: single, name: mine}, {source: repository}]")
    found = find_models(load(tmp_path / "g.yaml"))
    assert [(entry.source, found.name) for entry, found in found] == [
        ("single", "mine"),
        ("repository", "a"),
        ("repository", "b"),
    ]


def test_faults_of_all_entries_at_once_with_the_line_of_the_entry(tmp_path: Path) -> None:
    model(tmp_path / "r" / "a")
    model(tmp_path / "r" / "broken", "nam: 1")
    model(tmp_path / "s" / "a")
    model(tmp_path / "small", "max_batch_size: 4")
    (tmp_path / "g.yaml").write_text(
        "models:\n  - source: r\n  - source: s\n  - source: small\n    preferred_batch_sizes: [2, 8]\n"
    )
    with pytest.raises(ConfigError) as caught:
        find_models(load(tmp_path / "g.yaml"))
    text = str(caught.value).replace(f"{tmp_path}/", "")
    assert text.splitlines() == [
        "r/broken/config.pbtxt:1: nam: unknown key 'nam'; did you mean 'name'?",
        "g.yaml:3: models[1]: model 'a' is already served from r; give one of them another name",
        (
            "g.yaml:4: models[2].preferred_batch_sizes: 8 is more than max_batch_size of model 'small', which is 4; "
            "write at most 4"
        ),
    ]


def test_sources_of_the_command_line_have_no_line(tmp_path: Path) -> None:
    model(tmp_path / "r" / "a")
    model(tmp_path / "s" / "a")
    config = Config().with_sources([str(tmp_path / "r"), str(tmp_path / "s")])
    with pytest.raises(ConfigError, match=r"^command line: models\[1\]: model 'a' is already served from"):
        find_models(config)


def test_sources_that_are_not_on_disk() -> None:
    entries = (
        ModelEntry(source="http://h"),
        ModelEntry(source="models:/b@x"),
        ModelEntry(name="a", backends=(BACKEND,)),
    )
    assert find_models(Config(models=entries)) == [], "neither servers nor registries are asked here"


def test_a_name_from_a_registry_is_taken_like_any_other(tmp_path: Path) -> None:
    model(tmp_path / "r" / "b")
    entries = (
        ModelEntry(source=str(tmp_path / "r")),
        ModelEntry(source="models:/b@x"),
        ModelEntry(source="models:/c/1"),
    )
    with pytest.raises(ConfigError, match=r"models\[1\]: model 'b' is already served from"):
        find_models(Config(models=(*entries, ModelEntry(source="models:/d/1", name="c"))))


def test_models_of_servers_alone_are_not_looked_for_on_disk(tmp_path: Path) -> None:
    model(tmp_path / "r" / "a")
    entries = (
        ModelEntry(source="grpc://h"),
        ModelEntry(name="b", backends=(BACKEND,)),
        ModelEntry(source=str(tmp_path / "r" / "a"), name="a", backends=(BACKEND,)),
    )
    assert [found.name for _, found in find_models(Config(models=entries))] == ["a"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "max_batch_size: 4 sequence_batching { max_sequence_idle_microseconds: 5 }",
            "sequence_batching",
        ),
        (
            "max_batch_size: 4 input { name: 'x' data_type: TYPE_FP32 dims: [-1] allow_ragged_batch: true }",
            "ragged batches",
        ),
    ],
)
def test_backends_stand_only_beside_plain_models(tmp_path: Path, text: str, what: str) -> None:
    model(tmp_path / "a", text)
    (tmp_path / "g.yaml").write_text("models:\n  - {source: a, name: a, backends: [{url: 'http://h'}]}")
    with pytest.raises(ConfigError, match=rf"g.yaml:2: models\[0\].backends: cannot stand beside .* {what}"):
        find_models(load(tmp_path / "g.yaml"))
