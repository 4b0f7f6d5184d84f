"""Configuration of where models come from besides the disk: registries, the cache of their files, models.lock.

A registry is asked only if its section stands here (or, for MLflow, MLFLOW_TRACKING_URI in the environment): what is
not configured is not allowed. Secrets are never written here: a value is `env:VARIABLE` or `file:PATH`, looked up each
time it is needed, so that a rotated file is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import Field

from gateway.config_section import Section
from gateway.extras import lacking
from gateway.registry.reference import SECTIONS, RegistrySource, name_fault, not_allowed

TRACKING_URI: Final = "MLFLOW_TRACKING_URI"
HUB: Final = "https://huggingface.co"
HUB_TOKEN: Final = "HF_TOKEN"  # noqa: S105  # the variable's name
MLFLOW_VARIABLES: Final = {
    "token": "MLFLOW_TRACKING_TOKEN",
    "username": "MLFLOW_TRACKING_USERNAME",
    "password": "MLFLOW_TRACKING_PASSWORD",
}
"""MLflow's own variables hold where the configuration does not say more."""
MAX_SECRET_BYTES: Final = 16_384
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_HOST: Final = re.compile(r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")
_LOOKED_UP: Final = r"^(env|file):.+$"
_ADDRESSES: Final = {"url": "http://mlflow:5000", "endpoint": "http://minio:9000"}
"""Keys that hold a server's address, each with an example."""


class MlflowKeys(Section):
    """An MLflow tracking server with a model registry, for `models:/…`."""

    url: str = Field(min_length=1, max_length=2048, examples=["http://mlflow:5000"])
    """Address of the tracking server."""
    token: str | None = Field(default=None, pattern=_LOOKED_UP, repr=False, examples=["env:MLFLOW_TRACKING_TOKEN"])
    """Where the bearer token is: `env:VARIABLE` or `file:PATH`. By default MLFLOW_TRACKING_TOKEN."""
    username: str | None = Field(
        default=None, pattern=_LOOKED_UP, repr=False, examples=["env:MLFLOW_TRACKING_USERNAME"]
    )
    """Where the user's name is. By default MLFLOW_TRACKING_USERNAME."""
    password: str | None = Field(default=None, pattern=_LOOKED_UP, repr=False, examples=["file:mlflow-password"])
    """Where the password is. By default MLFLOW_TRACKING_PASSWORD."""
    ca: str | None = Field(default=None, min_length=1, max_length=4096, examples=["mlflow-ca.pem"])
    """File with the authorities that are trusted (PEM); by default those of the system."""
    webhook_secret: str | None = Field(default=None, pattern=_LOOKED_UP, repr=False, examples=["file:webhook-secret"])
    """Where the secret is that MLflow signs its webhooks with. With it POST /api/webhooks/mlflow on the operations port
    takes events of aliases, and a moved alias is followed at once."""


class S3Keys(Section):
    """An S3 object store, for `s3://bucket/prefix`."""

    endpoint: str = Field(default="", max_length=2048, examples=["http://minio:9000"])
    """Address of the store; by default that of AWS."""
    region: str = Field(default="", max_length=64, examples=["eu-central-1"])
    """Region that requests are signed for; by default AWS_REGION, else us-east-1."""
    access_key: str | None = Field(default=None, pattern=_LOOKED_UP, repr=False, examples=["env:S3_ACCESS_KEY"])
    """Where the access key is: `env:VARIABLE` or `file:PATH`. By default AWS's own ways: AWS_ACCESS_KEY_ID and its
    companions, web identity, the instance's role."""
    secret_key: str | None = Field(default=None, pattern=_LOOKED_UP, repr=False, examples=["file:s3-secret-key"])
    """Where the secret key is."""
    session_token: str | None = Field(default=None, pattern=_LOOKED_UP, repr=False, examples=["env:S3_SESSION_TOKEN"])
    """Where the session token is, for temporary keys."""
    anonymous: bool = Field(default=False, examples=[True])
    """Do not sign requests: for buckets that everybody may read."""
    buckets: tuple[str, ...] = Field(default=(), strict=False, max_length=1000, examples=[["models"]])
    """The buckets that may be asked; by default any that a model's source names. A registry that keeps its files in
    buckets can point only to those that stand here."""
    ca: str | None = Field(default=None, min_length=1, max_length=4096, examples=["s3-ca.pem"])
    """File with the authorities that are trusted (PEM); by default those of the system."""


class OciHostKeys(Section):
    """One OCI registry."""

    username: str | None = Field(default=None, pattern=_LOOKED_UP, repr=False, examples=["env:OCI_USERNAME"])
    """Where the user's name is: `env:VARIABLE` or `file:PATH`. Without it nobody logs in."""
    password: str | None = Field(default=None, pattern=_LOOKED_UP, repr=False, examples=["file:oci-password"])
    """Where the password, or an access token, is."""
    plain_http: bool = Field(default=False, examples=[True])
    """Speak http instead of https; on loopback that is done without asking."""
    auth_host: str = Field(default="", max_length=259, examples=["auth.example.org"])
    """Host that gives out tokens, and sees the password, where it is not the registry itself."""
    redirects: tuple[str, ...] = Field(default=(), strict=False, max_length=64, examples=[["blobs.example.org"]])
    """Hosts, with their ports, that the registry may send downloads to."""
    ca: str | None = Field(default=None, min_length=1, max_length=4096, examples=["oci-ca.pem"])
    """File with the authorities that are trusted (PEM); by default those of the system."""


class OciKeys(Section):
    """OCI registries, for `oci://host/repository:tag` and `oci://host/repository@sha256:…`."""

    hosts: dict[str, OciHostKeys] = Field(
        min_length=1, max_length=64, examples=[{"registry.example.org": {"username": "env:OCI_USERNAME"}}]
    )
    """The registries that may be asked: host, and port where a reference has one, with how each is spoken to."""


class HuggingFaceKeys(Section):
    """The Hugging Face Hub, or a server with its API, for `hf://owner/repository@commit`."""

    url: str = Field(default=HUB, min_length=1, max_length=2048, examples=[HUB])
    """Address of the server."""
    token: str | None = Field(default=None, pattern=_LOOKED_UP, repr=False, examples=["env:HF_TOKEN"])
    """Where the access token is: `env:VARIABLE` or `file:PATH`. By default HF_TOKEN."""
    redirects: tuple[str, ...] = Field(default=(), strict=False, max_length=64, examples=[["cdn.example.org"]])
    """Hosts, with their ports, that the server may send downloads to; those of the Hub itself need not stand here."""
    ca: str | None = Field(default=None, min_length=1, max_length=4096, examples=["hub-ca.pem"])
    """File with the authorities that are trusted (PEM); by default those of the system."""


class RegistriesKeys(Section):
    """Registries that models may come from. Paths are relative to this file's directory."""

    cache: str | None = Field(default=None, min_length=1, max_length=4096, examples=["./model-cache"])
    """Directory of fetched models, by digest. By default oip-gateway in the user's cache directory."""
    lock: str | None = Field(default=None, min_length=1, max_length=4096, examples=["./models.lock"])
    """File that says what each reference meant when it served last. By default models.lock beside this file, or in the
    cache where there is none."""
    locked: bool = Field(default=False, examples=[True])
    """Serve only what the lock names; references are not asked again."""
    max_model_mb: int = Field(default=8192, ge=1, le=2**20, examples=[8192])
    """Largest version that is fetched, in MiB."""
    keep_versions: int = Field(default=3, ge=1, le=1000, examples=[3])
    """Versions of each reference that stay in the cache, besides what serves and what lock and inference log name."""
    mlflow: MlflowKeys | None = Field(default=None, examples=[{"url": "http://mlflow:5000"}])
    """For `models:/name@alias`, `models:/name/3`, `models:/name/latest`."""
    s3: S3Keys | None = Field(default=None, examples=[{"endpoint": "http://minio:9000", "buckets": ["models"]}])
    """For `s3://bucket/prefix` and `s3://bucket/key?versionId=…`."""
    oci: OciKeys | None = Field(default=None, examples=[{"hosts": {"registry.example.org": {}}}])
    """For `oci://host/repository:tag` and `oci://host/repository@sha256:…`."""
    huggingface: HuggingFaceKeys | None = Field(default=None, examples=[{"token": "env:HF_TOKEN"}])
    """For `hf://owner/repository@commit`, `@branch`, and a path behind them."""


def with_environment(keys: RegistriesKeys, environ: Mapping[str, str]) -> RegistriesKeys:
    """`keys` with what the environment says where the file says nothing."""
    url = environ.get(TRACKING_URI, "")
    if keys.mlflow is None and urlsplit(url).scheme in ("http", "https"):
        return keys.model_copy(update={"mlflow": MlflowKeys(url=url)})
    return keys


def source_refusal(source: RegistrySource, keys: RegistriesKeys, *, named: bool) -> str | None:
    """Why a reference cannot be a model's source under `keys`; None if it can be asked for."""
    if getattr(keys, SECTIONS[source.scheme], None) is None:
        return not_allowed(source.scheme)
    if source.scheme == "s3" and (missing := lacking("obstore")) is not None:
        return missing
    if not named and name_fault(source.title) is not None:
        return f"'{source.title[:64]}' cannot be a model's name; write one in the key name beside it"
    return None


def registry_faults(section: object, base: Path, environ: Mapping[str, str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with the values of the section that their types do not say: the keys below it, and a message."""
    keys: Mapping[str, Any] = section if isinstance(section, dict) else {}
    for name, part in keys.items():
        yield from _part_faults((name,), part, base, environ)
        hosts = part.get("hosts") if isinstance(part, dict) else None
        for host, inner in hosts.items() if isinstance(hosts, dict) else ():
            if not isinstance(host, str) or not _HOST.fullmatch(host):
                yield (name, "hosts", str(host)), "is no host; write for example registry.example.org or localhost:5000"
            yield from _part_faults((name, "hosts", str(host)), inner, base, environ)


def _part_faults(
    place: tuple[str, ...], part: object, base: Path, environ: Mapping[str, str]
) -> Iterator[tuple[tuple[str, ...], str]]:
    if not isinstance(part, dict):
        return
    for key, example in _ADDRESSES.items():
        if isinstance(url := part.get(key), str) and url and (wrong := _url_fault(url, example)) is not None:
            yield (*place, key), wrong
    for key, value in part.items():
        looked_up = isinstance(value, str) and key not in _ADDRESSES and re.match(_LOOKED_UP, value)
        if looked_up and (wrong := _secret_fault(value, base, environ)) is not None:
            yield (*place, key), wrong
    for one, other in (("access_key", "secret_key"), ("username", "password")):
        if place != ("mlflow",) and part.get(one) is not None and other not in part:
            yield (*place, one), f"stands without {other}; add it"
    if isinstance(ca := part.get("ca"), str) and ca and not (base / ca).is_file():
        yield (*place, "ca"), f"there is no file {base / ca}; write the path of a PEM file"


def variables(keys: RegistriesKeys) -> set[str]:
    """Variables of the environment that the section takes values from."""
    found = {TRACKING_URI, *MLFLOW_VARIABLES.values(), HUB_TOKEN, "XDG_CACHE_HOME"}
    pending: list[object] = [keys.model_dump()]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, str) and value.startswith("env:"):
            found.add(value.removeprefix("env:"))
    return found


def _url_fault(url: str, example: str) -> str | None:
    parts = urlsplit(url)
    if parts.scheme in ("env", "file"):
        return f"{parts.scheme}: is for credentials only; write the address itself, for example {example}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"is no address of a server; write for example {example}"
    if "@" in parts.netloc:
        return "holds a user name or password; write those under username and password, as env: or file:"
    if parts.query or parts.fragment:
        return f"has more than an address and a path; write for example {example}"
    try:
        _ = parts.port
    except ValueError:
        return "has no usable port; write a number from 1 to 65535"
    return None


def _secret_fault(text: str, base: Path, environ: Mapping[str, str]) -> str | None:
    kind, _, place = text.partition(":")
    if kind == "env":
        if not _VARIABLE.fullmatch(place):
            return "env: must be followed by the name of a variable, such as env:MLFLOW_TRACKING_TOKEN"
        return None if environ.get(place) else f"the variable {place} is not set; set it where the gateway is started"
    return None if read_secret(base / place) else f"the file {base / place} cannot be read or is empty; check the path"


def read_secret(path: Path) -> str | None:
    """One line of printable text; None: there is none."""
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_SECRET_BYTES).decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return text if text.isprintable() else None
