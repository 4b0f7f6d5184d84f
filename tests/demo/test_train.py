"""Training again gives the committed models' quality. The extra `test` brings what it needs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.demo.train import RECIPES, build

MLP, CNN = RECIPES


def files(folder: Path) -> dict[str, str]:
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def test_training_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    recipe = replace(MLP, epochs=8)
    assert build(recipe, tmp_path / "a") == build(recipe, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert set(files(tmp_path / "a")) == {
        "models/digits/1/model.onnx",
        "samples/digits.json",
        "samples/held_out.json",
    }


def test_a_bad_model_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"0\.95 required"):
        build(replace(MLP, epochs=0), tmp_path)
    assert files(tmp_path) == {}


@pytest.mark.slow
def test_the_convolutional_model_trains_to_its_accuracy(tmp_path: Path) -> None:
    assert build(CNN, tmp_path) >= 0.97
    assert (tmp_path / "models" / "digits_cnn" / "config.pbtxt").exists()
