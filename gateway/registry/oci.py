"""OCI registries as a source of models: `oci://host/repository:tag` and `oci://host/repository@sha256:…`.

Takes artefacts in the form of CNCF ModelPack, of KitOps, and what ORAS pushes: layers that are files, named by an
annotation, and layers that are tar archives. Spoken as plain HTTP (OCI distribution 1.1, image manifest 1.1) with the
registries' own client (web.py): the oras package for Python bounds neither time nor bytes, writes archives with links,
and its credentials come from files of its own.

Rules:
- Manifests and blobs are what their digests say, or they are refused; a tag is resolved to the manifest's digest first.
- Only hosts that the configuration names are asked, and followed when they redirect; a token is fetched from the host
  itself or the one named for it, and a password goes nowhere else. Plain http only where it is asked for, or on
  loopback.
- Layers of code and data sets are left where they are: nobody serves them.
- Container images are refused: a root file system is no model.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO, Final, cast
from urllib.parse import urlsplit

import orjson

from gateway.errors import SourceError, SourceUnavailable
from gateway.registry.formats import shown
from gateway.registry.locator import OciReference, locate_oci
from gateway.registry.placing import Placing, checked_name
from gateway.registry.resolver import Bounds, Lineage, Resolved, Told, untold
from gateway.registry.web import Answer, Web, basic, refusal

MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
INDEX: Final = "application/vnd.oci.image.index.v1+json"
IMAGE_CONFIGS: Final = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
FILE_PATH: Final = "org.cncf.model.filepath"
TITLE: Final = "org.opencontainers.image.title"
UNPACK: Final = "io.deis.oras.content.unpack"
MAX_MANIFEST: Final = 4 * 1024 * 1024
MAX_ANNOTATIONS: Final = 100
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,9}")
_NOT_SERVED: Final = re.compile(r"application/vnd\.(cncf\.model|kitops\.modelkit)\.(code|dataset)\.")
_CHALLENGE: Final = re.compile(r'(realm|service|scope|error)="([^"]{0,2048})"')


def _nothing() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class OciHost:
    """One registry. Credentials are asked for with every request."""

    username: Callable[[], str] = _nothing
    password: Callable[[], str] = _nothing
    plain_http: bool = False
    ca: Path | None = None
    auth_host: str = ""
    """Who gives out tokens; empty: the registry itself."""
    redirects: tuple[str, ...] = ()
    """Hosts that blobs may be fetched from besides."""


@dataclass(frozen=True, slots=True)
class OciSettings:
    """The registries that may be asked, by host and port as references spell them."""

    hosts: Mapping[str, OciHost] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Blob:
    digest: str
    size: int
    media_type: str
    annotations: Mapping[str, str]


class OciResolver:
    """All OCI registries. Keeps nothing between calls."""

    scheme = "oci"

    def __init__(self, settings: OciSettings, bounds: Bounds) -> None:
        self._settings = settings
        self._bounds = bounds

    def __repr__(self) -> str:
        return f"<OciResolver {', '.join(self._settings.hosts)}>"

    def registry_of(self, reference: str) -> str:
        """See `Resolver`."""
        return self._session(locate_oci(reference), self._bounds.resolve_s).origin

    def resolve(self, reference: str) -> Resolved:
        """See `Resolver`."""
        located = locate_oci(reference)
        session = self._session(located, self._bounds.resolve_s)
        digest, manifest = session.manifest(located.digest or located.tag or "")
        layers = list(_layers(manifest, located))
        annotations = _annotations(manifest.get("annotations"))
        stated = annotations.get("org.opencontainers.image.version", "")
        version = next((text for text in (stated, located.tag or "") if _NUMBER.fullmatch(text)), "1")
        lineage = Lineage(
            git_commit=annotations.get("org.opencontainers.image.revision"),
            created_at=annotations.get("org.opencontainers.image.created"),
            created_by=annotations.get("org.opencontainers.image.authors"),
            tags=tuple(annotations.items()),
        )
        return Resolved(
            reference,
            f"oci://{located.host}/{located.repository}@{digest}",
            digest,
            version,
            located.mutable,
            session.origin,
            lineage,
            {name: blob.digest.removeprefix("sha256:") for blob in layers if (name := _file_of(blob)) is not None},
        )

    def fetch(self, resolved: Resolved, into: Path, told: Told = untold) -> None:
        """See `Resolver`."""
        located = locate_oci(resolved.uri)
        session = self._session(located, self._bounds.fetch_s)
        _, manifest = session.manifest(located.digest or "")
        layers = list(_layers(manifest, located))
        placing = Placing(into, self._bounds, resolved.uri)
        total, done = sum(blob.size for blob in layers), 0
        if total > self._bounds.max_bytes:
            raise SourceError(f"{resolved.uri} has {total} bytes; raise registries.max_model_mb")
        for blob in layers:
            _take(session, blob, placing, _further(told, done, total), alone=len(layers) == 1)
            done += blob.size

    def _session(self, located: OciReference, time_s: float) -> _Session:
        host = self._settings.hosts.get(located.host)
        if host is None:
            raise SourceError(
                f"the OCI registry {located.host} is not among registries.oci.hosts; name it there to allow it"
            )
        return _Session(located, host, monotonic() + time_s)


def _further(told: Told, before: int, total: int) -> Told:
    return lambda count, _: told(before + count, total)


def _take(session: _Session, blob: _Blob, placing: Placing, told: Told, *, alone: bool) -> None:
    """One layer becomes one file, or the files of an archive, once its digest was checked. `alone`: it is the only one;
    a folder that ORAS pushed, and that its title names, is then the version directory itself."""
    name = _file_of(blob)
    if name is not None:
        with placing.create(name) as stream:
            session.blob(blob, stream, told)
        placing.took(blob.size)
        return
    if blob.media_type.endswith("+zstd"):
        raise SourceError(f"{placing.what} has an archive packed with zstd; push it with gzip or unpacked")
    folder = blob.annotations.get(TITLE, "") if alone else ""
    with tempfile.TemporaryFile(dir=placing.into) as archive:  # it has no name
        session.blob(blob, cast("BinaryIO", archive), told)
        archive.seek(0)
        placing.unpack(cast("BinaryIO", archive), folder, gzipped=blob.media_type.endswith("+gzip"))


def _is_archive(blob: _Blob) -> bool:
    """By its media type; what ORAS titles and does not want unpacked is a file, whatever it holds."""
    if TITLE in blob.annotations and FILE_PATH not in blob.annotations:
        return blob.annotations.get(UNPACK) == "true"
    return re.search(r"[.+]tar(\+[a-z]+)?$", blob.media_type) is not None


def _file_of(blob: _Blob) -> str | None:
    """Name of the file that a layer is; None: it is an archive."""
    if _is_archive(blob):
        return None
    name = blob.annotations.get(FILE_PATH) or blob.annotations.get(TITLE)
    if not name:
        raise SourceError(
            f"the layer {blob.digest} has no file name; push it with the annotation {TITLE} or {FILE_PATH}"
        )
    return checked_name(name.removeprefix("./"), "the manifest")


def _layers(manifest: Mapping[str, Any], located: OciReference) -> Iterator[_Blob]:
    """The layers that hold what is served."""
    what = f"oci://{located.host}/{located.repository}"
    config = manifest.get("config")
    if isinstance(config, dict) and config.get("mediaType") in IMAGE_CONFIGS:
        raise SourceError(f"{what} is a container image, not a model; push the files as an artefact, as oras push does")
    layers = manifest.get("layers")
    if not isinstance(layers, list) or not layers:
        raise SourceError(f"{what} has no layers, so no files")
    for layer in layers:
        blob = _descriptor(layer, what)
        if not _NOT_SERVED.match(blob.media_type):
            yield blob


def _descriptor(layer: object, what: str) -> _Blob:
    entry = layer if isinstance(layer, dict) else {}
    digest, size, media_type = entry.get("digest"), entry.get("size"), entry.get("mediaType")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or type(size) is not int or size < 0:
        raise SourceError(f"{what} has a layer without a sha256 digest and a size")
    return _Blob(
        digest, size, media_type if isinstance(media_type, str) else "", _annotations(entry.get("annotations"))
    )


def _annotations(value: object) -> dict[str, str]:
    items = value.items() if isinstance(value, dict) else ()
    texts = [(k[:256], v[:2048]) for k, v in items if isinstance(k, str) and isinstance(v, str)]
    return dict(texts[:MAX_ANNOTATIONS])


class _Session:
    """Exchanges with one repository until a deadline; fetches a token when it is asked for one."""

    def __init__(self, located: OciReference, host: OciHost, deadline: float) -> None:
        self._host = host
        self._located = located
        self._deadline = deadline
        self._authorization = ""
        scheme = "http" if host.plain_http or _is_loopback(located.host) else "https"
        self.origin = f"{scheme}://{located.host}"
        self._web = Web(self.origin, self._headers, ca=host.ca, allowed=self._allowed)

    def manifest(self, wanted: str) -> tuple[str, dict[str, Any]]:
        """The manifest under a tag or digest, and its digest."""
        path = f"v2/{self._located.repository}/manifests/{wanted}"
        answer = self._ask(path, {"Accept": f"{MANIFEST}, {INDEX}"})
        what = f"oci://{self._located.host}/{self._located.repository}"
        if answer.status == 404:
            raise SourceError(f"{what} has no '{wanted}'; check repository, tag and digest")
        if answer.status != 200:
            raise refusal(answer)
        digest = "sha256:" + hashlib.sha256(answer.body).hexdigest()
        if _DIGEST.fullmatch(wanted) and digest != wanted:
            raise SourceError(f"{what} answered a manifest with digest {digest} when asked for {wanted}; it is refused")
        try:
            manifest = orjson.loads(answer.body)
        except orjson.JSONDecodeError:
            raise SourceUnavailable(f"{answer.url} answered something that is not JSON; check the address") from None
        if not isinstance(manifest, dict) or manifest.get("schemaVersion") != 2:
            raise SourceError(f"{what} has no manifest of the OCI's second schema under '{wanted}'")
        if "manifests" in manifest:
            raise SourceError(f"{what} has an index of several artefacts under '{wanted}'; name one by its digest")
        return digest, manifest

    def blob(self, blob: _Blob, into: BinaryIO, told: Told) -> None:
        """Write a blob to `into`. Raises SourceError: it is not what its digest says."""
        path = f"v2/{self._located.repository}/blobs/{blob.digest}"
        if not self._authorization:
            self._ask(path, {}, method="HEAD")  # so that the token is there
        received = self._web.save(path, into, timeout_s=self._left(), limit=blob.size, told=told)
        if f"sha256:{received.sha256}" != blob.digest or received.size != blob.size:
            raise SourceError(
                f"{self.origin} sent sha256:{received.sha256} with {received.size} bytes for the blob {blob.digest} of "
                f"{self._located.repository}, which has {blob.size}; it is refused"
            )
        into.flush()

    def _ask(self, path: str, headers: Mapping[str, str], method: str = "GET") -> Answer:
        answer = self._web.ask(path, method=method, headers=headers, timeout_s=self._left(), limit=MAX_MANIFEST)
        if answer.status == 401 and not self._authorization:
            self._authorization = self._authorized(answer)
            answer = self._web.ask(path, method=method, headers=headers, timeout_s=self._left(), limit=MAX_MANIFEST)
        return answer

    def _headers(self) -> dict[str, str]:
        return {"Authorization": self._authorization} if self._authorization else {}

    def _authorized(self, answer: Answer) -> str:
        """What the registry wants to see, from its challenge (distribution's token specification)."""
        challenge = answer.headers.get("www-authenticate", "")
        username, password = self._host.username(), self._host.password()
        if challenge.lower().startswith("basic"):
            if not username:
                raise SourceUnavailable(
                    f"{self.origin} wants a user name and password; set them in registries.oci", soon=False
                )
            return basic(username, password)
        fields = dict(_CHALLENGE.findall(challenge))
        realm = urlsplit(fields.get("realm", ""))
        if not challenge.lower().startswith("bearer") or realm.scheme not in ("http", "https"):
            raise SourceUnavailable(f"{self.origin} wants credentials of a kind that is not known here", soon=False)
        if realm.scheme == "http" and self.origin.startswith("https:"):
            raise SourceError(
                f"{self.origin} has its tokens given out over plain http, where the password could be read; refused"
            )
        if realm.netloc != (self._host.auth_host or self._located.host):
            raise SourceError(
                f"{self.origin} has its tokens given out by {shown(realm.netloc)}; name it as auth_host to allow that"
            )
        secret = {"Authorization": basic(username, password)} if username else {}
        scope = f"repository:{self._located.repository}:pull"
        tokens = Web(f"{realm.scheme}://{realm.netloc}", lambda: secret, ca=self._host.ca)
        query = {"service": fields.get("service", ""), "scope": scope}
        given = tokens.ask(realm.path, query=query, timeout_s=self._left())
        if given.status != 200:
            raise refusal(given)
        document = given.json()
        token = (document.get("token") or document.get("access_token")) if isinstance(document, dict) else None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise SourceUnavailable(f"{given.url} answered without a token; check the address")
        return f"Bearer {token}"

    def _allowed(self, url: str) -> bool:
        return urlsplit(url).netloc in (self._located.host, *self._host.redirects)

    def _left(self) -> float:
        return max(0.001, self._deadline - monotonic())


def _is_loopback(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
