from __future__ import annotations

from pathlib import Path

import pytest

from gateway.registry.directory import scan
from gateway.registry.formats import advice, hint


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["model.pkl"], "gateway convert model.pkl model.onnx --i-trust-this-pickle"),
        (["a/deep/model.JOBLIB", "conda.yaml"], "gateway convert a/deep/model.JOBLIB"),
        (["weights.safetensors", "model.pt"], "torch.onnx.export"),
        (["saved_model.pb"], "tf2onnx"),
        (["model.safetensors", "config.json"], "weights without a graph"),
    ],
)
def test_what_is_known_is_named_with_its_way_to_onnx(names: list[str], advice: str) -> None:
    assert advice in hint(names)
    assert hint(reversed(names)) == hint(names)


def test_what_is_not_known_has_no_hint() -> None:
    assert hint(["README.md", "model.bin"]) == ""


def test_a_name_that_is_no_text_for_people_is_made_one() -> None:
    assert "\n" not in hint(["evil\nname.pkl"])
    assert len(hint(["x" * 10_000 + ".pkl"])) < 500


def test_a_version_directory_with_a_pickle_is_refused_and_the_pickle_is_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "m" / "1"
    folder.mkdir(parents=True)
    (folder / "model.pkl").write_bytes(b"\x80\x04")
    (folder / "model.pkl").chmod(0)
    (fault,) = scan(tmp_path / "m").faults
    assert "gateway convert model.pkl" in str(fault)


def test_a_single_file_that_is_no_onnx_model() -> None:
    assert "gateway convert x.PKL" in advice("x.PKL")
    assert advice("x.txt") == ""
