"""Who vouches for a model version: signatures of OpenSSF Model Signing (OMS), made with a key, checked at load.

The format (OMS v1.0): a Sigstore bundle (JSON) whose DSSE envelope holds an in-toto statement with the SHA-256 of every
file; signed with ECDSA on P-256, P-384 or P-521. `model_signing sign key` writes it as `model.sig`.

Rules:
- Nothing is hashed here: the signed list is compared with the files as `read_artifact` hashed them while their bytes
  were taken for loading. What is verified is therefore what is loaded, and nothing can change between the two.
- Every file of the version must be signed, but for the signature file itself and what git and its hosts leave beside a
  model. A file that the signer left out on purpose is as unsigned as one that was added later.
- The signature file lies in the version directory and counts in the version's digest like every file; or it is given by
  an absolute path and does not.
- Only keys are verified. A bundle with a certificate or an identity cannot be judged without asking somebody, and is
  not: it counts as a signature that does not verify.
- `enforce` refuses whatever is not verified; `warn` says so in log and manifest, and serves; `off` does not look.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import orjson

from gateway.core.model import ArtifactFile
from gateway.errors import SourceError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

log = logging.getLogger("gateway.registry")

SIGNATURE_FILE: Final = "model.sig"
MAX_SIGNATURE_BYTES: Final = 16 * 1024 * 1024
MAX_KEY_BYTES: Final = 64 * 1024
_MEDIA_TYPES: Final = ("application/vnd.dev.sigstore.bundle.v0.3+json",)
_PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
_STATEMENT: Final = "https://in-toto.io/Statement/v1"
_PREDICATE: Final = "https://model_signing/signature/v1.0"
_CURVES: Final = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
_BESIDE: Final = frozenset({".git", ".gitattributes", ".github", ".gitignore"})
"""What signers leave out by default: nothing that is served."""

Mode = Literal["enforce", "warn", "off"]
Status = Literal["verified", "failed", "unsigned", "unchecked"]


@dataclass(frozen=True, slots=True)
class Signing:
    """How the versions of one model are verified. `public_key`: a PEM file."""

    mode: Mode = "warn"
    public_key: Path | None = None
    signature_file: str = SIGNATURE_FILE
    """Relative to the version directory; or an absolute path."""


SIGNING: Final = Signing()
"""Where nothing is configured."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What became of a version's signature."""

    status: Status
    """`unchecked`: verification is off, or there is a signature and no key to judge it by."""
    reason: str
    """In words; empty where the status says it all."""
    signer: str | None = None
    """`sha256:<hex>` of the public key's PEM text, as OMS names keys."""
    root_digest: str | None = None
    """`sha256:<hex>`: OMS's digest over the signed files' digests. It is not the version's digest."""
    signature: str | None = None
    """`sha256:<hex>` of the signature file."""

    def document(self) -> dict[str, str | None]:
        """For the provenance manifest."""
        return {
            "status": self.status,
            "reason": self.reason or None,
            "signer": self.signer,
            "root_digest": self.root_digest,
            "signature": self.signature,
        }


class _Unverified(Exception):
    """The text says why the signature says nothing about these files."""


def verify(directory: Path, files: Sequence[ArtifactFile], signing: Signing, label: str) -> Verification:
    """Judge the signature of one version; blocks on the disk, for a thread.

    Args:
        directory: the version directory, or the one file standing for it.
        files: every file of the version with its digest, as it was hashed for loading.
        label: the version's name in messages.

    Raises:
        SourceError: the mode is `enforce` and the version is not verified.
    """
    if signing.mode == "off":
        return Verification("unchecked", "verification is off")
    verification = _judged(directory, files, signing)
    if verification.status == "verified":
        return verification
    if signing.mode == "enforce":
        raise SourceError(
            f"{label} is not served, because verification is set to enforce: {verification.reason or 'it is unsigned'}"
        )
    if verification.status != "unsigned" or signing.public_key is not None:
        log.warning("%s is served although its signature is not verified: %s", label, verification.reason)
    return verification


def _judged(directory: Path, files: Sequence[ArtifactFile], signing: Signing) -> Verification:
    try:
        content = _signature(directory, files, signing.signature_file)
    except _Unverified as error:
        return Verification("failed", str(error))
    if content is None:
        return Verification(
            "unsigned", f"it has no signature file {signing.signature_file}; sign it with model_signing"
        )
    mark = "sha256:" + hashlib.sha256(content).hexdigest()
    if signing.public_key is None:
        reason = "it has a signature, and no public key is configured to judge it by; set signature.public_key"
        return Verification("unchecked", reason, signature=mark)
    try:
        pem = _read(signing.public_key, MAX_KEY_BYTES, "public key")
        signer, statement = _opened(content, pem)
        root = _compare(statement, files, signing.signature_file)
    except _Unverified as error:
        return Verification("failed", str(error), signature=mark)
    return Verification("verified", "", signer, root, mark)


def _signature(directory: Path, files: Sequence[ArtifactFile], name: str) -> bytes | None:
    """The signature file's content, which is what was hashed if it lies in the version directory; None: none there."""
    if Path(name).is_absolute():
        return _read(Path(name), MAX_SIGNATURE_BYTES, "signature file") if Path(name).exists() else None
    listed = next((file.sha256 for file in files if file.path == name), None)
    if listed is None:
        return None
    content = _read(directory / name, MAX_SIGNATURE_BYTES, "signature file")
    if hashlib.sha256(content).hexdigest() != listed:
        raise _Unverified("its signature file changed while the model was read; load the model again")
    return content


def _read(path: Path, limit: int, what: str) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise _Unverified(f"the {what} {path} cannot be read: {error.strerror}; check the path") from None
    if len(content) > limit:
        raise _Unverified(f"the {what} {path} is larger than {limit} bytes")
    return content


def _opened(content: bytes, pem: bytes) -> tuple[str, Mapping[str, Any]]:
    """The statement in a bundle, and who signed it, after the signature was checked."""
    bundle = _mapping(_json(content, "its signature file"), "its signature file")
    if bundle.get("mediaType") not in _MEDIA_TYPES:
        raise _Unverified("its signature file is not a Sigstore bundle v0.3, which OpenSSF Model Signing 1.0 writes")
    material = _mapping(bundle.get("verificationMaterial"), "the bundle's verificationMaterial")
    if "publicKey" not in material:
        raise _Unverified(
            "it is signed with a certificate or an identity; only signatures made with a key are verified"
        )
    envelope = _mapping(bundle.get("dsseEnvelope"), "the bundle's dsseEnvelope")
    signatures = envelope.get("signatures")
    if envelope.get("payloadType") != _PAYLOAD_TYPE or not isinstance(signatures, list) or len(signatures) != 1:
        raise _Unverified("its bundle holds something else than one signed in-toto statement")
    payload = _base64(envelope.get("payload"))
    signature = _base64(_mapping(signatures[0], "the signature").get("sig"))
    signer = _check(
        pem, signature, b"DSSEv1 %d %b %d " % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload)) + payload
    )
    hint = _mapping(material["publicKey"], "the bundle's publicKey").get("hint")
    if hint and f"sha256:{hint}" != signer:
        raise _Unverified(f"its bundle names the key sha256:{str(hint)[:64]}, but {signer} is configured")
    return signer, _mapping(_json(payload, "the signed statement"), "the signed statement")


def key_fault(path: Path) -> str:
    """Why no signature could be checked with this public key; empty: one could. Blocks on the disk."""
    try:
        _key(_read(path, MAX_KEY_BYTES, "public key"))
    except _Unverified as error:
        return str(error)
    return ""


def _key(pem: bytes) -> EllipticCurvePublicKey:
    """Raises _Unverified: it is none that could be meant."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415  an extra
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    except ImportError:
        raise _Unverified("checking signatures needs pip install 'oip-gateway[signing]'") from None
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise _Unverified("the configured public key is not a public key in PEM form") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise _Unverified("the configured public key is none of those of OMS: an EC key on P-256, P-384 or P-521")
    return key


def _check(pem: bytes, signature: bytes, signed: bytes) -> str:
    """Returns who signed. Raises _Unverified: not this key, or not this text."""
    key = _key(pem)
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415  an extra, which is there: see `_key`
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    text = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signer = "sha256:" + hashlib.sha256(text).hexdigest()
    algorithm: hashes.HashAlgorithm = getattr(hashes, _CURVES[key.curve.name])()
    try:
        key.verify(signature, signed, ec.ECDSA(algorithm))
    except InvalidSignature:
        raise _Unverified(f"its signature was not made with the key {signer}, or was changed") from None
    return signer


def _compare(statement: Mapping[str, Any], files: Sequence[ArtifactFile], signature_file: str) -> str:
    """The statement's root digest, once the statement says what was hashed. Raises _Unverified."""
    if statement.get("_type") != _STATEMENT or statement.get("predicateType") != _PREDICATE:
        raise _Unverified("what is signed is not a statement of OpenSSF Model Signing 1.0; sign it again")
    predicate = _mapping(statement.get("predicate"), "the statement's predicate")
    how = _mapping(predicate.get("serialization"), "the statement's serialization")
    if how.get("method") != "files" or how.get("hash_type") != "sha256":
        raise _Unverified("it was signed in shards or with another hash; sign it again file by file with sha256")
    signed = _resources(predicate.get("resources"))
    subjects = statement.get("subject")
    subject = subjects[0] if isinstance(subjects, list) and len(subjects) == 1 else None
    root = _mapping(_mapping(subject, "the statement's subject").get("digest"), "the subject's digest").get("sha256")
    if root != hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in signed.values())).hexdigest():
        raise _Unverified("what is signed contradicts itself: its root digest is not that of its files")
    there = {file.path: file.sha256 for file in files if file.path != signature_file}
    told = [f"{path} was changed" for path in signed if path in there and there[path] != signed[path]]
    told += [f"{path} is missing" for path in signed if path not in there]
    told += [f"{path} is not signed" for path in there if path not in signed and path.split("/")[0] not in _BESIDE]
    if told:
        more = f" (and {len(told) - 3} more)" if len(told) > 3 else ""
        raise _Unverified(f"its files are not those that were signed: {', '.join(told[:3])}{more}")
    return f"sha256:{root}"


def _resources(resources: object) -> dict[str, str]:
    """Path → SHA-256 in hex, in the statement's order."""
    if not isinstance(resources, list) or not resources:
        raise _Unverified("what is signed names no files")
    signed: dict[str, str] = {}
    for resource in resources:
        entry = _mapping(resource, "a signed file")
        name, digest = entry.get("name"), entry.get("digest")
        if not isinstance(name, str) or not isinstance(digest, str) or entry.get("algorithm") != "sha256":
            raise _Unverified("what is signed names a file without a SHA-256; sign it again with sha256")
        if len(digest) != 64 or set(digest) - set("0123456789abcdef") or name in signed:
            raise _Unverified("what is signed names a file twice or with a digest that is none")
        signed[name] = digest
    return signed


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _Unverified(f"{what} cannot be read as OpenSSF Model Signing 1.0 has it")
    return value


def _json(content: bytes, what: str) -> object:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        raise _Unverified(f"{what} is not JSON") from None


def _base64(text: object) -> bytes:
    try:
        return base64.b64decode(text if isinstance(text, str) else "!", validate=True)
    except (binascii.Error, ValueError):
        raise _Unverified("its bundle holds bytes that are not base64") from None
