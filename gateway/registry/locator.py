"""Spelling of registry references: which registry, which model in it, and what of that may move.

    models:/digits@champion   models:/digits/3   models:/digits/latest   models:/m-<32 hex>         MLflow
    s3://bucket/key           s3://bucket/key?versionId=…                                          object store
    oci://host/repository:tag           oci://host/repository@sha256:<64 hex>                      OCI registry
    hf://owner/repository     hf://owner/repository@revision[/path]                                Hugging Face

Rules: only spelling, nothing is asked. A reference never holds a credential (`user:password@`), so it may be shown.
What a reference could mean in two ways is refused. A path in one never leaves its place (`..`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

Scheme = Literal["models", "s3", "oci", "hf"]
MAX_REFERENCE: Final = 2048
_AUTHORITIES: Final[tuple[Scheme, ...]] = ("s3", "oci", "hf")

_NAME: Final = r"[^/:@?#%\\\x00-\x1f\x7f]{1,256}"
_MODEL_ID: Final = re.compile(r"m-[0-9a-f]{32}")
_MODELS: Final = re.compile(rf"models:/(?P<name>{_NAME})(?:@(?P<alias>[A-Za-z0-9_.-]{{1,256}})|/(?P<version>[^/]*))?")
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,9}")
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_OBJECT: Final = re.compile(
    r"s3://(?P<bucket>[^/?#@]+)(?:/(?P<key>[^?#]*))?(?:\?versionId=(?P<version>[A-Za-z0-9._-]{1,1024}))?"
)
_OCI: Final = re.compile(
    r"oci://(?P<host>[A-Za-z0-9.-]+(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?)"
    r"/(?P<repository>[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))"
)
_HUB: Final = re.compile(
    r"hf://(?P<repository>[A-Za-z0-9_.-]{1,96}/[A-Za-z0-9_.-]{1,96})"
    r"(?:@(?P<revision>[A-Za-z0-9_.-]{1,255}))?(?:/(?P<path>[^?#@]+))?"
)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class MlflowReference:
    """A registered model by alias, version or `latest`; or, without a name, one logged model by its id."""

    name: str = ""
    version: str | None = None
    alias: str | None = None
    model_id: str | None = None

    @property
    def mutable(self) -> bool:
        return self.version is None and self.model_id is None

    @property
    def title(self) -> str:
        """What the model is called where nobody names it."""
        return self.name or (self.model_id or "")


@dataclass(frozen=True, slots=True)
class ObjectReference:
    """`key`: one object, or the beginning of the names of all objects of a version directory; no slash around it."""

    bucket: str
    key: str
    version_id: str | None = None

    @property
    def mutable(self) -> bool:
        return self.version_id is None

    @property
    def title(self) -> str:
        return _title(self.key) or self.bucket


@dataclass(frozen=True, slots=True)
class OciReference:
    """Exactly one of `tag` and `digest` is there. `host` with its port, if it has one."""

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @property
    def mutable(self) -> bool:
        return self.digest is None

    @property
    def title(self) -> str:
        return _title(self.repository)


@dataclass(frozen=True, slots=True)
class HubReference:
    """`revision`: a commit, a branch or a tag; None: the default branch. `path`: a folder or file inside, or empty."""

    repository: str
    revision: str | None = None
    path: str = ""

    @property
    def mutable(self) -> bool:
        return self.revision is None or _COMMIT.fullmatch(self.revision) is None

    @property
    def title(self) -> str:
        return _title(self.repository)


Located = MlflowReference | ObjectReference | OciReference | HubReference


def scheme_of(text: str) -> Scheme | None:
    """Which kind of registry a source names; None: none of them."""
    if text.startswith("models:"):
        return "models"
    for scheme in _AUTHORITIES:
        if text.lower().startswith(f"{scheme}://"):
            return scheme
    return None


def locate_reference(text: str) -> Located:
    """Read a reference of any registry.

    Raises:
        ValueError: it is none; the text says what to write and never repeats what may be a credential.
    """
    if len(text) > MAX_REFERENCE:
        raise ValueError(f"is longer than {MAX_REFERENCE} characters")
    scheme = scheme_of(text)
    if scheme == "models":
        return locate_mlflow(text)
    if scheme == "s3":
        return locate_object(text)
    if scheme == "oci":
        return locate_oci(text)
    if scheme == "hf":
        return locate_hub(text)
    raise ValueError("is no registry reference; write for example models:/digits@champion")


def locate_mlflow(text: str) -> MlflowReference:
    """Raises ValueError, as `locate_reference`."""
    found = _MODELS.fullmatch(text)
    if found is None:
        raise ValueError(
            "is no MLflow reference; write models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME/latest or "
            "models:/m-<32 hex>, where the registry's address stands in registries.mlflow.url"
        )
    name, alias, version = found["name"], found["alias"], found["version"]
    if alias is not None:
        return MlflowReference(name, alias=alias)
    if version is None:
        if _MODEL_ID.fullmatch(name):
            return MlflowReference(model_id=name)
        raise ValueError(f"does not say which version; write models:/{name}@ALIAS or models:/{name}/VERSION")
    if version == "latest":
        return MlflowReference(name)
    if _NUMBER.fullmatch(version):
        return MlflowReference(name, version=version)
    raise ValueError(
        f"has the version '{version[:64]}', which is no number; MLflow has given up stages: give the version an alias "
        f"and write models:/{name}@ALIAS"
    )


def locate_object(text: str) -> ObjectReference:
    """Raises ValueError, as `locate_reference`."""
    found = _OBJECT.fullmatch(text)
    if found is None:
        raise ValueError("is no reference of an object store; write s3://BUCKET/KEY or s3://BUCKET/KEY?versionId=ID")
    if _BUCKET.fullmatch(found["bucket"]) is None:
        raise ValueError("has no usable name of a bucket; write s3://BUCKET/KEY, BUCKET of 3 to 63 of a-z 0-9 . -")
    key = (found["key"] or "").strip("/")
    _check_path(key)
    if not key and found["version"]:
        raise ValueError("names a version of a whole bucket; write s3://BUCKET/KEY?versionId=ID")
    return ObjectReference(found["bucket"], key, found["version"])


def locate_oci(text: str) -> OciReference:
    """Raises ValueError, as `locate_reference`."""
    found = _OCI.fullmatch(text)
    if found is None:
        raise ValueError(
            "is no OCI reference; write oci://HOST/REPOSITORY:TAG or oci://HOST/REPOSITORY@sha256:<64 hex>"
        )
    return OciReference(found["host"].lower(), found["repository"], found["tag"], found["digest"])


def locate_hub(text: str) -> HubReference:
    """Raises ValueError, as `locate_reference`."""
    found = _HUB.fullmatch(text)
    if found is None:
        raise ValueError(
            "is no Hugging Face reference; write hf://OWNER/REPOSITORY@COMMIT or …@BRANCH, and perhaps /PATH"
        )
    owner, _, repository = found["repository"].partition("/")
    if not owner.strip(".") or not repository.strip("."):
        raise ValueError("is no Hugging Face reference; write hf://OWNER/REPOSITORY@COMMIT")
    path = (found["path"] or "").strip("/")
    _check_path(path)
    return HubReference(found["repository"], found["revision"], path)


def _check_path(path: str) -> None:
    if any(part in ("", ".", "..") for part in path.split("/")) and path:
        raise ValueError("has a path with an empty part, '.' or '..'; write it without them")
    if any(ord(character) < 32 or ord(character) == 127 or character == "\\" for character in path):
        raise ValueError("has a path with a control character or a backslash")


def _title(path: str) -> str:
    """The last part of a path that is no bare version number, without `.onnx`."""
    parts = [part for part in path.split("/") if part]
    while len(parts) > 1 and _NUMBER.fullmatch(parts[-1]):
        parts.pop()
    return parts[-1].removesuffix(".onnx") if parts else ""
