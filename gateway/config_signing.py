"""Configuration of who must have signed a model: the keys `verification` and `signature` of an entry or of `defaults`.

Rules: looks at what the file says before types are checked. What is demanded without a key to check it by is a fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from gateway.config_section import Section
from gateway.registry.signing import SIGNATURE_FILE, Mode, Signing


class SignatureKeys(Section):
    """Signatures of OpenSSF Model Signing, made with a key."""

    public_key: str | None = Field(default=None, min_length=1, max_length=4096, examples=["signing-key.pub"])
    """File with the public key of who signs (PEM; EC on P-256, P-384 or P-521), relative to this file's directory."""
    file: str = Field(default=SIGNATURE_FILE, min_length=1, max_length=4096, examples=[SIGNATURE_FILE])
    """The signature: a file of the version directory, or an absolute path."""


def signing_of(verification: Mode | None, signature: SignatureKeys | None, base: Path) -> Signing:
    """What the keys mean; `base`: where relative paths start."""
    keys = signature or SignatureKeys()
    key = base / keys.public_key if keys.public_key is not None else None
    return Signing(verification or "warn", key, keys.file)


def signature_faults(item: object, defaults: object, base: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with the keys of one entry: keys below it, and a message. `defaults`: the section that speaks where
    the entry does not."""
    own = _mapping(item)
    keys = {**_mapping(defaults), **own}
    signature = _mapping(keys.get("signature"))
    name = signature.get("public_key")
    if keys.get("verification") == "enforce" and name is None:
        text = "enforce needs a key to check signatures by; add signature: {public_key: FILE}"
        yield ("verification",) if "verification" in own else (), text
    if isinstance(name, str) and name and not (base / name).is_file():
        place = ("signature", "public_key") if "signature" in own else ()
        yield place, f"there is no file {base / name}; write the path of a public key in PEM form"
    if isinstance(file := signature.get("file"), str) and not Path(file).is_absolute() and ".." in Path(file).parts:
        place = ("signature", "file") if "signature" in own else ()
        yield place, "leaves the version directory; write a name in it, or an absolute path"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
