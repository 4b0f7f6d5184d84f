"""`gateway check` on golden inputs and public keys: what serving would refuse is a fault, what it takes is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.cli import main

Said = pytest.CaptureFixture[str]
GOOD = json.dumps([{"inputs": [], "outputs": [{"name": "y"}]}])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for version in ("models/m/1", "next/m/2"):
        (tmp_path / version).mkdir(parents=True)
        (tmp_path / version / "model.onnx").write_bytes(b"x")
    return tmp_path


def check(folder: Path, keys: str, said: Said) -> tuple[int, list[str]]:
    path = folder / "gateway.yaml"
    path.write_text(f"models:\n  - {{source: models/m, {keys}}}\n")
    code = main(["check", "-c", str(path)])
    return code, said.readouterr().err.replace(str(folder) + "/", "").splitlines()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "there are no golden inputs: neither g.json nor a file g.json with the model"),
        ("{}", "golden inputs g.json: write a list of requests"),
        ("nope", "golden inputs g.json: this is not JSON"),
        ('[{"inputs": []}]', "golden inputs g.json: item 1 needs the outputs that are right"),
        (GOOD, ""),
    ],
)
def test_golden_inputs_that_serving_refuses_are_faults(
    folder: Path, capsys: Said, content: str | None, told: str
) -> None:
    if content is not None:
        (folder / "g.json").write_text(content)
    code, said = check(folder, "golden: {file: g.json}", capsys)
    assert code == (2 if told else 0)
    assert [line.startswith(f"error: gateway.yaml:2: models[0].golden: {told}") for line in said] == [True] * bool(told)


def test_golden_inputs_beside_a_version_and_beside_its_canary_are_read(folder: Path, capsys: Said) -> None:
    (folder / "models/m/1/golden.json").write_text("{}")
    (folder / "next/m/2/golden.json").write_text("[")
    code, said = check(folder, "canary: {source: next/m, percent: 5}", capsys)
    assert code == 2
    first, second = said
    assert "models[0].golden: golden inputs models/m/1/golden.json: write a list" in first
    assert "models[0].golden: golden inputs next/m/2/golden.json: this is not JSON" in second


def test_a_public_key_that_is_none_is_a_fault(folder: Path, capsys: Said) -> None:
    pytest.importorskip("cryptography", reason="needs pip install cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = folder / "ours.pub"
    key.touch()
    keys = "verification: {mode}, signature: {{public_key: ours.pub}}"
    for mode in ("enforce", "warn"):
        code, said = check(folder, keys.format(mode=mode), capsys)
        assert (code, len(said)) == (2, 1)
        assert (
            "models[0].signature.public_key: ours.pub: the configured public key is not a public key in PEM" in said[0]
        )
    assert check(folder, keys.format(mode="'off'"), capsys) == (0, [])
    pem = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    key.write_bytes(ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(*pem))
    assert check(folder, keys.format(mode="enforce"), capsys) == (0, [])
