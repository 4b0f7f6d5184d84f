from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import Config, load
from gateway.config_sources import registries_of
from gateway.errors import ConfigError
from gateway.registry.signing import Signing


def loaded(folder: Path, text: str, environ: dict[str, str] | None = None) -> Config:
    (folder / "m.onnx").touch()
    path = folder / "gateway.yaml"
    path.write_text(text)
    return load(path, {}, environ or {})


def faults(folder: Path, text: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text, environ)
    return str(caught.value).replace(str(folder / "gateway.yaml"), "")


def test_an_entry_speaks_before_the_defaults(tmp_path: Path) -> None:
    for name in ("ours.pub", "theirs.pub"):
        (tmp_path / name).touch()
    config = loaded(
        tmp_path,
        "defaults: {verification: enforce, signature: {public_key: ours.pub}}\n"
        "models:\n"
        "  - {source: m.onnx, name: a}\n"
        "  - {source: m.onnx, name: b, verification: 'off'}\n"
        "  - {source: m.onnx, name: c, signature: {public_key: theirs.pub, file: c.sig}}\n",
    )
    signing = [config.settings(entry).signing for entry in config.models]
    assert signing == [
        Signing("enforce", tmp_path / "ours.pub"),
        Signing("off", tmp_path / "ours.pub"),
        Signing("enforce", tmp_path / "theirs.pub", "c.sig"),
    ]


def test_without_keys_signatures_are_looked_at_and_demanded_of_nobody(tmp_path: Path) -> None:
    config = loaded(tmp_path, "models: [{source: m.onnx}]")
    assert config.settings(config.models[0]).signing == Signing("warn", None, "model.sig")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("models: [{source: m.onnx, verification: enforce}]", ":1: models[0].verification: enforce needs a key"),
        ("defaults: {verification: enforce}\nmodels: [{source: m.onnx}]", ":2: models[0]: enforce needs a key"),
        (
            "models: [{source: m.onnx, signature: {public_key: none.pub}}]",
            ":1: models[0].signature.public_key: there is no file",
        ),
        (
            "models: [{source: m.onnx, signature: {file: ../m.sig}}]",
            ":1: models[0].signature.file: leaves the version directory",
        ),
        ("models: [{source: m.onnx, verification: maybe}]", "models[0].verification: "),
    ],
)
def test_what_cannot_hold_is_a_fault(tmp_path: Path, text: str, fault: str) -> None:
    assert fault in faults(tmp_path, text)


REGISTRIES = """
registries:
  s3: {endpoint: "http://127.0.0.1:9000", access_key: "env:KEY", secret_key: "file:secret", buckets: [models]}
  oci: {hosts: {"Registry.example.org:5000": {username: "env:KEY", password: "file:secret", redirects: [cdn]}}}
  huggingface: {}
models:
  - {source: "s3://models/a"}
  - {source: "oci://registry.example.org:5000/b:v1"}
  - {source: "hf://acme/c@main"}
"""


def test_registries_are_made_from_their_sections(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("pw\n")
    registries = registries_of(loaded(tmp_path, REGISTRIES, {"KEY": "me", "HF_TOKEN": "hf_x"}))
    assert repr(registries) == "<Registries s3, oci, hf>"
    oci, objects, hub = (registries._resolvers[scheme] for scheme in ("oci", "s3", "hf"))
    host = oci._settings.hosts["registry.example.org:5000"]  # type: ignore[attr-defined]
    assert (host.username(), host.password(), host.redirects) == ("me", "pw", ("cdn",))
    assert objects._settings.secret_key() == "pw"  # type: ignore[attr-defined]
    assert hub._settings.token() == "hf_x"  # type: ignore[attr-defined]
    (tmp_path / "secret").write_text("rotated\n")
    assert host.password() == "rotated"


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ("s3: {endpoint: 'minio:9000'}", "registries.s3.endpoint: is no address"),
        ("s3: {endpoint: 'http://u:p@minio'}", "registries.s3.endpoint: holds a user name or password"),
        ("s3: {access_key: 'env:KEY'}", "registries.s3.access_key: stands without secret_key"),
        ("s3: {access_key: 'AKIA', secret_key: 'x'}", "registries.s3.access_key: "),
        ("s3: {access_key: 'env:NONE', secret_key: 'env:KEY'}", "the variable NONE is not set"),
        ("oci: {}", "registries.oci.hosts: "),
        ("oci: {hosts: {'https://r.example': {}}}", "is no host; write for example registry.example.org"),
        ("oci: {hosts: {r.example: {username: 'env:KEY'}}}", "username: stands without password"),
        ("oci: {hosts: {r.example: {ca: none.pem}}}", "there is no file"),
        ("oci: {hosts: {r.example: {username: bob, password: 'env:KEY'}}}", "username: expected env:VARIABLE or file:"),
        ("oci: {hosts: {r.example: {user: 'env:KEY'}}}", "unknown key 'user'; did you mean 'username'?"),
        ("oci: {hosts: {r.example: none}}", "registries.oci.hosts.r.example: expected keys and values"),
        ("huggingface: {token: 12345}", "token: expected env:VARIABLE or file:PATH, the place where it is; write for"),
        ("huggingface: {url: 'ftp://x'}", "registries.huggingface.url: is no address"),
        ("huggingface: {token: hf_secret}", "registries.huggingface.token: "),
    ],
)
def test_faults_of_registries_are_found_without_asking_them(tmp_path: Path, section: str, fault: str) -> None:
    text = faults(tmp_path, f"registries: {{{section}}}\nmodels: [{{source: m.onnx}}]", {"KEY": "me"})
    assert fault in text
    assert "hf_secret" not in text
    assert "12345" not in text


def test_a_source_without_its_section_is_refused(tmp_path: Path) -> None:
    text = faults(tmp_path, "models: [{source: 'hf://acme/c@main'}, {source: 's3://models/a'}]")
    assert "add registries.huggingface" in text
    assert "add registries.s3" in text
