"""From the section `registries` to what it means: resolvers with their credentials, the cache, the lock.

Each kind of registry is made here and nowhere else; its module is imported only if it is configured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gateway.config import Config, ModelEntry
from gateway.config_registry import (
    HUB_TOKEN,
    MLFLOW_VARIABLES,
    HuggingFaceKeys,
    MlflowKeys,
    OciKeys,
    RegistriesKeys,
    S3Keys,
    read_secret,
)
from gateway.errors import ConfigError, Fault
from gateway.registry.cache import Cache
from gateway.registry.lock import LockFile
from gateway.registry.reference import RegistrySource, parse
from gateway.registry.resolver import MIB, Bounds, Resolver, Told
from gateway.registry.sources import Registries

if TYPE_CHECKING:
    from gateway.registry.huggingface import HuggingFaceSettings as HuggingFace
    from gateway.registry.mlflow import MlflowSettings as Mlflow
    from gateway.registry.objects import ObjectSettings as Objects
    from gateway.registry.oci import OciSettings as Oci

LOCK_NAME: Final = "models.lock"

Secret = Callable[[], str]


def registry_entries(config: Config) -> list[tuple[str, ModelEntry]]:
    """Name, as clients see it, and entry of every model that comes from a registry; nothing is asked."""
    found = []
    for entry in config.models:
        source = config.source(entry)
        if isinstance(source, RegistrySource):
            found.append((entry.name or source.title, entry))
    return found


def all_references(config: Config) -> list[tuple[str, tuple[str, ...]]]:
    """Every registry reference of a configuration, those of canaries and shadows included, and every digest that is
    pinned for it; each reference and each of its digests once, in order."""
    found: dict[str, set[str]] = {}
    for entry in config.models:
        for keys in (entry, entry.canary, entry.shadow):
            if keys is not None and keys.source and isinstance(parse(keys.source, config.base), RegistrySource):
                found.setdefault(keys.source, set()).update([keys.digest] if keys.digest is not None else [])
    return [(reference, tuple(sorted(pins))) for reference, pins in sorted(found.items())]


def check_lock(config: Config) -> None:
    """Whether models.lock can be used, and names what it must; asks nobody.

    Raises:
        ConfigError: it is not understood, or lacks references although only what it names may be served.
    """
    wanted = all_references(config)
    if not wanted:
        return
    lock = registries_of(config).lock
    known = lock.read()
    if not config.registries.locked:
        return
    lacking = [reference for reference, _ in wanted if reference not in known]
    if lacking:
        text = "is not named there, and only what is named is served (registries.locked); run gateway lock"
        raise ConfigError([Fault(str(lock.path), 0, reference, text) for reference in lacking])


def registries_of(config: Config) -> Registries:
    """The registries that a configuration allows, their cache and their lock; nothing is opened yet."""
    keys, base, environ = config.registries, config.base, config.environ
    cache = base / Path(keys.cache).expanduser() if keys.cache is not None else _default_cache(environ)
    lock = base / keys.lock if keys.lock is not None else (base if config.file else cache) / LOCK_NAME
    bounds = Bounds(max_bytes=keys.max_model_mb * MIB)
    made = {resolver.scheme: resolver for resolver in _resolvers(keys, base, environ, bounds)}
    return Registries(made, Cache(cache), LockFile(lock), locked=keys.locked, keep_versions=keys.keep_versions)


def secret(text: str | None, base: Path, environ: Mapping[str, str], default: str = "") -> Secret:
    """Looks a secret up; what cannot be read is empty then. `default`: variable that holds where `text` is None."""
    if text is None:
        return lambda: environ.get(default, "")
    kind, _, place = text.partition(":")
    if kind == "env":
        return lambda: environ.get(place, "")
    return lambda: read_secret(base / place) or ""


def _resolvers(keys: RegistriesKeys, base: Path, environ: Mapping[str, str], bounds: Bounds) -> Iterator[Resolver]:
    foreign: dict[str, Callable[[str, Path, Told], None]] = {}
    if keys.s3 is not None:
        from gateway.registry.objects import ObjectResolver  # noqa: PLC0415  # see the header

        objects = ObjectResolver(_objects(keys.s3, base, environ), bounds)
        foreign["s3"] = objects.fetch_uri
        yield objects
    if keys.mlflow is not None:
        from gateway.registry.mlflow import MlflowResolver  # noqa: PLC0415  # see the header

        yield MlflowResolver(_mlflow(keys.mlflow, base, environ), bounds, foreign)
    if keys.oci is not None:
        from gateway.registry.oci import OciResolver  # noqa: PLC0415  # see the header

        yield OciResolver(_oci(keys.oci, base, environ), bounds)
    if keys.huggingface is not None:
        from gateway.registry.huggingface import HuggingFaceResolver  # noqa: PLC0415  # see the header

        yield HuggingFaceResolver(_huggingface(keys.huggingface, base, environ), bounds)


def _objects(keys: S3Keys, base: Path, environ: Mapping[str, str]) -> Objects:
    from gateway.registry.objects import ObjectSettings  # noqa: PLC0415  # see the header

    return ObjectSettings(
        keys.endpoint,
        keys.region,
        access_key=secret(keys.access_key, base, environ),
        secret_key=secret(keys.secret_key, base, environ),
        session_token=secret(keys.session_token, base, environ),
        anonymous=keys.anonymous,
        buckets=keys.buckets,
        ca=base / keys.ca if keys.ca is not None else None,
    )


def _oci(keys: OciKeys, base: Path, environ: Mapping[str, str]) -> Oci:
    from gateway.registry.oci import OciHost, OciSettings  # noqa: PLC0415  # see the header

    hosts = {
        name.lower(): OciHost(
            username=secret(host.username, base, environ),
            password=secret(host.password, base, environ),
            plain_http=host.plain_http,
            ca=base / host.ca if host.ca is not None else None,
            auth_host=host.auth_host,
            redirects=host.redirects,
        )
        for name, host in keys.hosts.items()
    }
    return OciSettings(hosts)


def _huggingface(keys: HuggingFaceKeys, base: Path, environ: Mapping[str, str]) -> HuggingFace:
    from gateway.registry.huggingface import HuggingFaceSettings  # noqa: PLC0415  # see the header

    return HuggingFaceSettings(
        keys.url.rstrip("/"),
        token=secret(keys.token, base, environ, HUB_TOKEN),
        ca=base / keys.ca if keys.ca is not None else None,
        redirects=keys.redirects,
    )


def _mlflow(keys: MlflowKeys, base: Path, environ: Mapping[str, str]) -> Mlflow:
    from gateway.registry.mlflow import MlflowSettings  # noqa: PLC0415  # see the header

    return MlflowSettings(
        keys.url,
        token=secret(keys.token, base, environ, MLFLOW_VARIABLES["token"]),
        username=secret(keys.username, base, environ, MLFLOW_VARIABLES["username"]),
        password=secret(keys.password, base, environ, MLFLOW_VARIABLES["password"]),
        ca=base / keys.ca if keys.ca is not None else None,
    )


def _default_cache(environ: Mapping[str, str]) -> Path:
    home = environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "oip-gateway" / "models"
