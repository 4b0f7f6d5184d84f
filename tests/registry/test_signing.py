"""Signatures made and judged by OpenSSF's own model_signing: what it accepts is verified, what it refuses is not."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import SourceError
from gateway.registry.digest import read_artifact
from gateway.registry.signing import Mode, Signing, Verification, verify

oms = pytest.importorskip("model_signing", reason="needs pip install model-signing pyopenssl")

PEM = serialization.Encoding.PEM
CURVES: dict[str, ec.EllipticCurve] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}


def keys(folder: Path, name: str, curve: str = "P-256") -> tuple[Path, Path]:
    """Files with a new private and its public key."""
    key = ec.generate_private_key(CURVES[curve])
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    form = serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(PEM, form, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def version(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"the model")
    (folder / "data" / "weights.bin").write_bytes(b"its weights")
    (folder / "provenance.json").write_bytes(b"{}")
    return folder


def sign(directory: Path, private: Path, **more: Any) -> Path:
    """As `model_signing sign key` does."""
    signature = directory / "model.sig"
    config = oms.signing.Config().use_elliptic_key_signer(private_key=private)
    hashing = oms.hashing.Config().set_ignored_paths(paths=[signature, *more.get("ignored", ())], ignore_git_paths=True)
    if "shard" in more:
        hashing = hashing.use_shard_serialization(hashing_algorithm="sha256", shard_size=4)
    elif "algorithm" in more:
        hashing = hashing.use_file_serialization(hashing_algorithm=more["algorithm"])
    config.set_hashing_config(hashing).sign(directory, signature)
    return signature


def accepts(directory: Path, public: Path) -> bool:
    """Whether model_signing itself accepts the version."""
    try:
        oms.verifying.Config().use_elliptic_key_verifier(public_key=public).verify(directory, directory / "model.sig")
    except Exception:  # it raises many kinds
        return False
    return True


def judged(directory: Path, public: Path | None, mode: Mode = "warn", **more: Any) -> Verification:
    artifact = read_artifact(directory, "m", "1")
    return verify(directory, artifact.files, Signing(mode, public, **more), "model m version 1")


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path]:
    private, public = keys(tmp_path, "ours")
    directory = version(tmp_path / "1")
    sign(directory, private)
    return directory, public


@pytest.mark.parametrize("curve", CURVES)
def test_what_model_signing_signs_is_verified(tmp_path: Path, curve: str) -> None:
    private, public = keys(tmp_path, "ours", curve)
    directory = version(tmp_path / "1")
    sign(directory, private)
    assert accepts(directory, public)
    verification = judged(directory, public, "enforce")
    assert verification.status == "verified"
    statement = json.loads(base64.b64decode(bundle(directory)["dsseEnvelope"]["payload"]))
    assert verification.root_digest == f"sha256:{statement['subject'][0]['digest']['sha256']}"
    assert verification.signer is not None
    assert set(verification.document()) == {"status", "reason", "signer", "root_digest", "signature"}


def changed(directory: Path) -> None:
    (directory / "data" / "weights.bin").write_bytes(b"its Weights")


def added(directory: Path) -> None:
    (directory / "extra").write_bytes(b"")


def removed(directory: Path) -> None:
    (directory / "provenance.json").unlink()


def renamed(directory: Path) -> None:
    (directory / "data" / "weights.bin").rename(directory / "data" / "other.bin")


def swapped(directory: Path) -> None:
    (directory / "data" / "weights.bin").write_bytes(b"the model")
    (directory / "model.onnx").write_bytes(b"its weights")


TAMPERED: dict[Callable[[Path], None], str] = {
    changed: "weights.bin was changed",
    added: "extra is not signed",
    removed: "provenance.json is missing",
    renamed: "is missing",
    swapped: "was changed",
}


@pytest.mark.parametrize("tamper", TAMPERED)
def test_a_tampered_version_is_refused_under_enforce_and_told_under_warn(
    signed: tuple[Path, Path], tamper: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    directory, public = signed
    tamper(directory)
    assert not accepts(directory, public)
    with pytest.raises(SourceError, match=TAMPERED[tamper]):
        judged(directory, public, "enforce")
    with caplog.at_level(logging.WARNING):
        verification = judged(directory, public, "warn")
    assert verification.status == "failed"
    assert TAMPERED[tamper] in verification.reason
    assert TAMPERED[tamper] in caplog.text
    assert judged(directory, public, "off").status == "unchecked"


def test_another_key_is_refused(signed: tuple[Path, Path], tmp_path: Path) -> None:
    directory, _ = signed
    _, theirs = keys(tmp_path, "theirs")
    with pytest.raises(SourceError, match="was not made with the key"):
        judged(directory, theirs, "enforce")
    _, longer = keys(tmp_path, "longer", "P-384")
    with pytest.raises(SourceError, match="was not made with the key"):
        judged(directory, longer, "enforce")


def test_a_version_without_a_signature(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, public = keys(tmp_path, "ours")
    directory = version(tmp_path / "1")
    with pytest.raises(SourceError, match=r"no signature file model\.sig"):
        judged(directory, public, "enforce")
    assert judged(directory, None).status == "unsigned"
    assert not caplog.records  # nobody asked for signatures
    assert judged(directory, public).status == "unsigned"
    assert "no signature file" in caplog.text


def test_a_signature_that_nobody_can_judge_says_so(signed: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    directory, _ = signed
    assert judged(directory, None).status == "unchecked"
    assert "set signature.public_key" in caplog.text
    with pytest.raises(SourceError, match=r"set signature\.public_key"):
        judged(directory, None, "enforce")


def test_what_the_signer_left_out_is_not_signed(tmp_path: Path) -> None:
    private, public = keys(tmp_path, "ours")
    directory = version(tmp_path / "1")
    sign(directory, private, ignored=[directory / "provenance.json"])
    with pytest.raises(SourceError, match=r"provenance\.json is not signed"):
        judged(directory, public, "enforce")


def test_files_of_git_may_stand_beside(tmp_path: Path) -> None:
    private, public = keys(tmp_path, "ours")
    directory = version(tmp_path / "1")
    (directory / ".gitattributes").write_text("*.onnx filter=lfs")
    sign(directory, private)
    assert accepts(directory, public)
    assert judged(directory, public, "enforce").status == "verified"


@pytest.mark.parametrize("how", [{"shard": 4}, {"algorithm": "blake2"}])
def test_other_ways_of_hashing_are_refused_with_the_remedy(tmp_path: Path, how: dict[str, Any]) -> None:
    private, public = keys(tmp_path, "ours")
    directory = version(tmp_path / "1")
    sign(directory, private, **how)
    with pytest.raises(SourceError, match="sign it again"):
        judged(directory, public, "enforce")


def test_a_detached_signature(signed: tuple[Path, Path], tmp_path: Path) -> None:
    directory, public = signed
    elsewhere = tmp_path / "kept.sig"
    (directory / "model.sig").rename(elsewhere)
    assert judged(directory, public, "enforce", signature_file=str(elsewhere)).status == "verified"


def bundle(directory: Path) -> Any:
    return json.loads((directory / "model.sig").read_text())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda b: b.update(mediaType="text/plain"), "not a Sigstore bundle"),
        (lambda b: b["verificationMaterial"].pop("publicKey"), "only signatures made with a key"),
        (lambda b: b["verificationMaterial"]["publicKey"].update(hint="0" * 64), "names the key"),
        (lambda b: b["dsseEnvelope"].update(payloadType="text/plain"), "one signed in-toto statement"),
        (lambda b: b["dsseEnvelope"].update(signatures=[]), "one signed in-toto statement"),
        (lambda b: b["dsseEnvelope"].update(payload="e30="), "was not made with the key"),
        (lambda b: b["dsseEnvelope"].update(payload="?"), "not base64"),
        (lambda b: b.pop("dsseEnvelope"), "cannot be read"),
    ],
)
def test_a_changed_bundle_is_refused(signed: tuple[Path, Path], change: Callable[[Any], object], why: str) -> None:
    directory, public = signed
    content = bundle(directory)
    change(content)
    (directory / "model.sig").write_text(json.dumps(content))
    with pytest.raises(SourceError, match=why):
        judged(directory, public, "enforce")


def restated(directory: Path, private: Path, change: Callable[[Any], object]) -> None:
    """The signed statement changed, and signed again with the right key."""
    found = bundle(directory)
    envelope = found["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    change(statement)
    payload, kind = json.dumps(statement).encode(), envelope["payloadType"].encode()
    key = serialization.load_pem_private_key(private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    text = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    envelope["payload"] = base64.b64encode(payload).decode()
    envelope["signatures"][0]["sig"] = base64.b64encode(key.sign(text, ec.ECDSA(hashes.SHA256()))).decode()
    (directory / "model.sig").write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: None, ""),
        (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "contradicts itself"),
        (lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"), "not a statement of OpenSSF"),
        (lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), "not a statement of OpenSSF"),
        (lambda s: s["predicate"]["resources"].pop(), "contradicts itself"),
        (lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]), "twice"),
    ],
)
def test_a_statement_of_another_kind_is_refused_even_with_the_right_signature(
    tmp_path: Path, change: Callable[[Any], object], why: str
) -> None:
    private, public = keys(tmp_path, "ours")
    directory = version(tmp_path / "1")
    sign(directory, private)
    restated(directory, private, change)
    verification = judged(directory, public)
    assert (verification.status == "failed") == bool(why)
    assert why in verification.reason


def test_a_signature_file_that_changes_while_the_model_is_read_is_refused(signed: tuple[Path, Path]) -> None:
    directory, public = signed
    files = read_artifact(directory, "m", "1").files
    (directory / "model.sig").write_bytes((directory / "model.sig").read_bytes() + b" ")
    verification = verify(directory, files, Signing("warn", public), "model m version 1")
    assert (verification.status, "changed while the model was read" in verification.reason) == ("failed", True)


def test_an_unusable_key_is_named(signed: tuple[Path, Path], tmp_path: Path) -> None:
    directory, _ = signed
    other = ed25519.Ed25519PrivateKey.generate().public_key()
    (tmp_path / "ed.pub").write_bytes(other.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "text.pub").write_text("no key")
    for name, why in {"ed.pub": "P-256", "text.pub": "PEM form", "none.pub": "cannot be read"}.items():
        with pytest.raises(SourceError, match=why):
            judged(directory, tmp_path / name, "enforce")


@settings(deadline=None, max_examples=60)
@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_no_changed_byte_of_the_signature_file_verifies_other_files(
    tmp_path_factory: pytest.TempPathFactory, at: float, value: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        private, _ = keys(folder.parent, "fuzzed")
        sign(version(folder), private)
        (folder / "model.onnx").write_bytes(b"another model")
    content = bytearray((folder / "model.sig").read_bytes())
    content[int(at * len(content))] = value
    changed_file = folder.parent / "changed.sig"
    changed_file.write_bytes(content)
    with pytest.raises(SourceError):
        judged(folder, folder.parent / "fuzzed.pub", "enforce", signature_file=str(changed_file))
