"""S3 object stores as a source of models: `s3://bucket/prefix` (a version directory) or `s3://bucket/key` (one file).

Through obstore (Rust's object_store), which brings AWS's chain of credentials: keys, web identity, instance roles.

Rules:
- What a prefix holds is listed and pinned object by object before a byte is fetched: by version where the bucket keeps
  versions, else by ETag and size. Then exactly that is fetched, or nothing: what changed meanwhile is refused.
- A URI names versions, so it means the same for ever, where the bucket keeps them and they fit into it; where it does
  not, the immutable id says that only ETags and sizes are pinned, and a later fetch of it compares them again.
- S3 states no digest of whole objects that every store has, and what some keep (x-amz-checksum-sha256) obstore does not
  hand on; what an uploader states as metadata `sha256` is checked, everything else is found out by the digest in lock
  and cache.
- Listings, bytes and time are bounded; a listing is given up as soon as there are too many objects.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import orjson

from gateway.errors import SourceError, SourceUnavailable
from gateway.registry.locator import ObjectReference, locate_object
from gateway.registry.placing import Placing, checked_name
from gateway.registry.resolver import Bounds, Resolved, Told, untold

if TYPE_CHECKING:
    from obstore.store import S3Store

STALL_S: Final = 30.0
MAX_PINS: Final = 1500
"""Characters of pins in a URI."""
STATED_DIGEST: Final = "sha256"
"""Key of the metadata in which an uploader may state an object's SHA-256."""
BY_VERSION: Final = "object versions, sha256:"
BY_ETAG: Final = "etags and sizes, sha256:"
_PINS: Final = re.compile(r"(?P<plain>s3://[^?#]+)\?versions=(?P<pins>[A-Za-z0-9_=-]+)")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_CHUNK: Final = 1024 * 1024


def _nothing() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class ObjectSettings:
    """Which store, and who we are. Keys are asked for with every call; without any, AWS's own chain is asked."""

    endpoint: str = ""
    """Empty: AWS."""
    region: str = ""
    access_key: Callable[[], str] = _nothing
    secret_key: Callable[[], str] = _nothing
    session_token: Callable[[], str] = _nothing
    anonymous: bool = False
    buckets: tuple[str, ...] = ()
    """The buckets that may be asked; empty: any."""
    ca: Path | None = None


@dataclass(frozen=True, slots=True)
class _Pin:
    """One object. `name`: below the version directory; `version` or else `etag` says which content is meant."""

    name: str
    key: str
    size: int
    version: str | None
    etag: str | None


class ObjectResolver:
    """One S3 store. Keeps nothing between calls."""

    scheme = "s3"

    def __init__(self, settings: ObjectSettings, bounds: Bounds) -> None:
        self._settings = settings
        self._bounds = bounds

    def __repr__(self) -> str:
        return f"<ObjectResolver {self._where}>"

    def registry_of(self, reference: str) -> str:
        """See `Resolver`."""
        return self._where

    def resolve(self, reference: str) -> Resolved:
        """See `Resolver`."""
        located = locate_object(reference)
        pins = self._pinned(located, self._store(located.bucket, self._bounds.resolve_s), self._bounds.resolve_s)
        uri, identity = _spelled(located, pins)
        return Resolved(
            reference, uri, identity, _version(located.key), located.mutable, self._where, private=tuple(pins)
        )

    def fetch(self, resolved: Resolved, into: Path, told: Told = untold) -> None:
        """See `Resolver`. A `uri` without pins is what the store holds now, unless `immutable_id` is one of ours."""
        with_pins = _PINS.fullmatch(resolved.uri)
        located = locate_object(with_pins["plain"] if with_pins else resolved.uri)
        store = self._store(located.bucket, self._bounds.fetch_s)
        if with_pins:
            pins = _read_pins(with_pins["pins"], located)
        elif resolved.private is not None:
            pins = list(resolved.private)
        else:
            pins = self._pinned(located, store, self._bounds.fetch_s)
            wanted = resolved.immutable_id
            if wanted.startswith((BY_VERSION, BY_ETAG)) and _spelled(located, pins)[1] != wanted:
                raise SourceError(
                    f"what lies at {resolved.uri} is not what it was ({wanted}); upload it again, or resolve it anew"
                )
        self._fetch(store, pins, resolved.uri, into, told)

    def fetch_uri(self, uri: str, into: Path, told: Told = untold) -> None:
        """What lies at `s3://bucket/prefix` now, for a registry that points there. Raises as `fetch`; only buckets that
        the configuration lists are asked on a registry's word."""
        try:
            located = locate_object(uri)
        except ValueError as error:
            raise SourceError(f"the registry points to {uri[:200]!a}, which {error}") from None
        if located.bucket not in self._settings.buckets:
            raise SourceError(
                f"the registry points to the bucket {located.bucket}; name it in registries.s3.buckets to allow that"
            )
        self.fetch(Resolved(uri, uri, "", "1", mutable=True), into, told)

    # -- what is there -----------------------------------------------------------------------------------------------

    def _pinned(self, located: ObjectReference, store: S3Store, time_s: float) -> list[_Pin]:
        """Every object that is meant, in the order of names. Raises SourceError: none, or too many."""
        deadline = monotonic() + time_s
        place = f"s3://{located.bucket}/{located.key}"
        with _errors(place):
            if located.version_id is not None:
                return [_pin(_name(located.key), _meta(store, located.key, located.version_id), place)]
            found = list(self._listed(store, located, deadline))
            if not found:
                try:
                    return [_pin(_name(located.key), store.head(located.key), place)]
                except FileNotFoundError:
                    raise SourceError(f"nothing lies at {place}; check bucket and key") from None
            pins: list[_Pin] = []
            for name, listed in found:
                # The listing does not say versions. Where one object has none the bucket keeps none.
                versioned = not pins or pins[0].version is not None
                pins.append(_pin(name, store.head(listed["path"]) if versioned else listed, place))
                _in_time(deadline, place)
        total = sum(pin.size for pin in pins)
        if total > self._bounds.max_bytes:
            raise SourceError(f"{place} holds {total} bytes; raise registries.max_model_mb, or name a version below it")
        return sorted(pins, key=lambda pin: pin.name)

    def _listed(
        self, store: S3Store, located: ObjectReference, deadline: float
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Name below the prefix and description of every object."""
        place, start, count = f"s3://{located.bucket}/{located.key}", f"{located.key}/" if located.key else "", 0
        for page in store.list(located.key or None, chunk_size=1000):
            _in_time(deadline, place)
            for listed in page:
                name = listed["path"].removeprefix(start)
                if listed["path"] == located.key or not name:
                    continue  # the marker that consoles put where a folder is made
                count += 1
                if count > self._bounds.max_files:
                    raise SourceError(f"{place} holds more than {self._bounds.max_files} objects; name a version below")
                yield checked_name(name, place), listed

    # -- its bytes ---------------------------------------------------------------------------------------------------

    def _fetch(self, store: S3Store, pins: list[_Pin], what: str, into: Path, told: Told) -> None:
        deadline = monotonic() + self._bounds.fetch_s
        placing, done, total = Placing(into, self._bounds, what), 0, sum(pin.size for pin in pins)
        for pin in pins:
            digest, size = hashlib.sha256(), 0
            with placing.create(pin.name) as target, _errors(what):
                options = {"version": pin.version} if pin.version is not None else {"if_match": pin.etag}
                answer = store.get(pin.key, options=options)  # type: ignore[arg-type]
                for chunk in answer.stream(min_chunk_size=_CHUNK):
                    content = bytes(chunk)
                    placing.write(target, content)
                    digest.update(content)
                    size += len(content)
                    told(done + size, total)
                    _in_time(deadline, what)
                stated = str(answer.attributes.get(STATED_DIGEST, "")).lower()
            if size != pin.size:
                raise SourceUnavailable(f"{what}: {pin.name} has {size} bytes where the store lists {pin.size}")
            if _SHA256.fullmatch(stated) and stated != digest.hexdigest():
                raise SourceError(
                    f"{what}: {pin.name} has the SHA-256 {digest.hexdigest()}, but its metadata state {stated}; refused"
                )
            done += size

    def _store(self, bucket: str, time_s: float) -> S3Store:
        settings = self._settings
        if settings.buckets and bucket not in settings.buckets:
            raise SourceError(f"the bucket {bucket} is not among registries.s3.buckets; name it there to allow it")
        try:
            from obstore.store import S3Store  # noqa: PLC0415  # an extra
        except ImportError:
            raise SourceError("s3:// needs pip install 'oip-gateway[objects]'") from None
        config: dict[str, Any] = {"virtual_hosted_style_request": False} if settings.endpoint else {}
        given = {
            "endpoint": settings.endpoint,
            "region": settings.region,
            "access_key_id": settings.access_key(),
            "secret_access_key": settings.secret_key(),
            "session_token": settings.session_token(),
        }
        config |= {key: value for key, value in given.items() if value}
        if settings.anonymous:
            config["skip_signature"] = True
        client: dict[str, Any] = {
            "timeout": f"{max(1, round(time_s))}s",
            "connect_timeout": "10s",
            "read_timeout": f"{STALL_S:.0f}s",
            "allow_http": settings.endpoint.startswith("http://"),
            "user_agent": "oip-gateway",
        }
        with _errors(f"s3://{bucket}"):
            if settings.ca is not None:
                client["root_certificate"] = settings.ca.read_bytes()
            return S3Store(bucket, config=config, client_options=client, retry_config={"max_retries": 1})  # type: ignore[arg-type]

    @property
    def _where(self) -> str:
        return self._settings.endpoint or f"https://s3.{self._settings.region or 'aws'}.amazonaws.com"


class _errors:  # noqa: N801  # used like a function
    """What leaves obstore, as the errors of a resolver; `place` for people."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, SourceError) or not isinstance(error, Exception):
            return
        name = type(error).__name__
        said = " ".join(str(error).partition("Debug source")[0].split())[:300]
        if name in ("PermissionDeniedError", "UnauthenticatedError", "PermissionError"):
            text = f"{self._place} is refused to these credentials; check them in registries.s3"
            raise SourceUnavailable(text, soon=False) from None
        if isinstance(error, FileNotFoundError):
            raise SourceError(f"{self._place}: an object is not there any more: {_code(said)}") from None
        if name == "PreconditionError":
            raise SourceUnavailable(f"{self._place} changed while it was fetched") from None
        if "NoSuchBucket" in said:
            raise SourceError(f"{self._place}: there is no such bucket; check its name and the endpoint") from None
        raise SourceUnavailable(f"{self._place} cannot be read: {_code(said)}") from None


def _code(said: str) -> str:
    """An error of obstore, shortened to what a reader can use: the store's own code, or how the exchange failed."""
    code = re.search(r"<Code>([A-Za-z0-9]{1,64})</Code>", said)
    return code[1] if code else said


def _meta(store: S3Store, key: str, version: str) -> Mapping[str, Any]:
    return store.get(key, options={"version": version, "head": True}).meta


def _pin(name: str, meta: Mapping[str, Any], place: str) -> _Pin:
    size, etag, version = meta["size"], meta.get("e_tag"), meta.get("version")
    if version == "null":  # uploaded before the bucket kept versions: it can be overwritten
        version = None
    if version is None and not etag:
        raise SourceError(f"{place}: the store gives {name} neither a version nor an ETag, so it cannot be pinned")
    return _Pin(name, meta["path"], int(size), version, etag)


def _name(key: str) -> str:
    return checked_name(key.rpartition("/")[2], f"s3://…/{key}")


def _version(key: str) -> str:
    """The last part of the key where it is a version number, as in `digits/3`."""
    last = key.rpartition("/")[2]
    return last if re.fullmatch(r"[1-9][0-9]{0,9}", last) else "1"


def _spelled(located: ObjectReference, pins: list[_Pin]) -> tuple[str, str]:
    """URI and immutable id of what was pinned."""
    plain = f"s3://{located.bucket}/{located.key}"
    by_version = all(pin.version is not None for pin in pins)
    lines = [f"{pin.name}\0{pin.version}" if by_version else f"{pin.name}\0{pin.etag}\0{pin.size}" for pin in pins]
    digest = hashlib.sha256("\n".join([plain, *lines]).encode()).hexdigest()
    if not by_version:
        return plain, f"{BY_ETAG}{digest}"
    if len(pins) == 1 and pins[0].key == located.key:
        return f"{plain}?versionId={pins[0].version}", f"{BY_VERSION}{digest}"
    content = orjson.dumps({pin.name: [pin.version, pin.size] for pin in pins})
    spelled = base64.urlsafe_b64encode(content).decode()
    return f"{plain}?versions={spelled}" if len(spelled) <= MAX_PINS else plain, f"{BY_VERSION}{digest}"


def _read_pins(text: str, located: ObjectReference) -> list[_Pin]:
    """What `_spelled` wrote, perhaps long ago and by way of a file that people can change."""
    try:
        pinned = orjson.loads(base64.urlsafe_b64decode(text))
        pins = [(str(name), str(version), int(size)) for name, (version, size) in pinned.items()]
    except (binascii.Error, ValueError, TypeError, AttributeError):
        raise SourceError(
            f"s3://{located.bucket}/{located.key} has pins that cannot be read; resolve it anew"
        ) from None
    start = f"{located.key}/" if located.key else ""
    return [
        _Pin(checked_name(name, "the pinned URI"), f"{start}{name}", size, version, None)
        for name, version, size in pins
    ]


def _in_time(deadline: float, place: str) -> None:
    if monotonic() > deadline:
        raise SourceUnavailable(f"{place} did not send everything in time")
