"""The keys `canary` and `shadow`: what they must say, and which files they mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import Config, load
from gateway.config_release import Canary, Shadow, Variant
from gateway.config_variant_models import check_variants, entries_with_variants, variant_model
from gateway.errors import ConfigError
from tests.live import models

LINEAR = models.linear()


def put(root: Path, model: str, *versions: str, config: str = "") -> Path:
    for version in versions:
        (root / model / version).mkdir(parents=True, exist_ok=True)
        (root / model / version / "model.onnx").write_bytes(LINEAR)
    if config:
        (root / model / "config.pbtxt").write_text(config)
    return root / model


def configured(root: Path, entry: str) -> Config:
    file = root / "gateway.yaml"
    file.write_text(f"models:\n  - {entry}\n")
    return load(file, {}, {})


@pytest.mark.parametrize(
    ("canary", "told"),
    [
        ("{percent: 5}", "models[0].canary.source: is missing"),
        ("{source: ./nowhere}", "there is no directory"),
        ("{source: 'http://triton:8000'}", "a variant runs on workers of the gateway"),
        ("{source: ./new, percent: 101}", "must be at most 100"),
        ("{source: ./new, percentage: 5}", "did you mean 'percent'"),
        ("{source: ./new, header: {'X Variant': a}}", "cannot be a header's name"),
        ("{source: ./new, header: {X-Variant: ' a'}}", "printable ASCII"),
        ("{source: ./new, header: {X-Variant: a, x-variant: b}}", "stands twice"),
        ("{source: ./new, sticky: 'X User'}", "expected text that matches"),
        ("{source: ./new, version: '0'}", "version"),
        ("{source: ./new, digest: abc}", "64 hexadecimal digits"),
    ],
)
def test_what_is_wrong_with_a_canary_is_said_with_its_place(tmp_path: Path, canary: str, told: str) -> None:
    put(tmp_path, "old", "1")
    put(tmp_path, "new", "2")
    with pytest.raises(ConfigError) as refused:
        configured(tmp_path, f"{{source: ./old, canary: {canary}}}")
    assert told in str(refused.value)
    assert "gateway.yaml:2" in str(refused.value)


def test_a_variant_belongs_to_one_model_and_not_to_defaults(tmp_path: Path) -> None:
    put(tmp_path, "old", "1")
    file = tmp_path / "gateway.yaml"
    file.write_text("defaults: {canary: {source: ./old}}\nmodels: [{source: ./old}]\n")
    with pytest.raises(ConfigError, match="belongs to one model"):
        load(file, {}, {})


def test_a_repository_of_several_models_must_say_whose_it_is(tmp_path: Path) -> None:
    put(tmp_path / "all", "one", "1")
    put(tmp_path / "all", "two", "1")
    put(tmp_path, "new", "2")
    config = configured(tmp_path, "{source: ./all, canary: {source: ./new}}")
    with pytest.raises(ConfigError, match="holds 2; pick one of them with name:"):
        entries_with_variants(config)
    config = configured(tmp_path, "{source: ./all, name: two, canary: {source: ./new}}")
    assert [(name, index) for name, index, _ in entries_with_variants(config)] == [("two", 0)]
    config = configured(tmp_path, "{source: ./all/one, shadow: {source: ./new}}")
    assert [name for name, _, _ in entries_with_variants(config)] == ["one"]
    assert entries_with_variants(configured(tmp_path, "{source: ./all}")) == []


def test_of_a_directory_the_highest_version_or_the_one_that_is_named(tmp_path: Path) -> None:
    new = put(tmp_path, "new", "2", "3")

    def found(variant: Variant) -> dict[str, Path]:
        model = variant_model(variant, "digits", tmp_path)
        assert model is not None
        assert model.name == "digits"
        return model.versions

    assert found(Canary(source="./new")) == {"3": new / "3"}
    assert found(Shadow(source="./new", version="2")) == {"2": new / "2"}
    assert found(Canary(source="./new/2/model.onnx", version="7")) == {"7": new / "2" / "model.onnx"}
    assert found(Canary(source="./new/2/model.onnx")) == {"1": new / "2" / "model.onnx"}
    with pytest.raises(ConfigError, match="name a version that is there"):
        found(Canary(source="./new", version="9"))


def test_what_registries_mean_is_not_asked_here(tmp_path: Path) -> None:
    assert variant_model(Canary(source="models:/digits@challenger"), "digits", tmp_path) is None


def test_an_ensemble_is_no_variant(tmp_path: Path) -> None:
    ensemble = 'platform: "ensemble" ensemble_scheduling { step { model_name: "m" model_version: -1 } }'
    put(tmp_path, "new", "1", config=ensemble)
    with pytest.raises(ConfigError):
        variant_model(Canary(source="./new"), "digits", tmp_path)


def test_check_names_every_variant_that_is_broken(tmp_path: Path) -> None:
    put(tmp_path, "old", "1")
    (tmp_path / "empty").mkdir()
    config = configured(tmp_path, "{source: ./old, canary: {source: ./empty}, shadow: {source: ./old, version: '4'}}")
    with pytest.raises(ConfigError) as refused:
        check_variants(config)
    assert "models[0].canary" in str(refused.value)
    assert "models[0].shadow" in str(refused.value)
    check_variants(configured(tmp_path, "{source: ./old, canary: {source: ./old}}"))
