"""From a configuration and what servers said: which models there are, and which servers each is on. Pure but for
`origins`, which reads the files that hold secrets.

Rules: secrets are read when the configuration is taken over, and only then: what changes on the disk later takes no
backend away. A URL among the sources stands for all ready models of its server, or for the one that its entry names;
entries that name one go before those that do not. A name that is served from disk, or that an entry with backends has,
is not served from such a server too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from gateway.backends.remote_endpoint import Endpoint, said
from gateway.config import Backend, Config, ModelEntry
from gateway.errors import Fault
from gateway.registry.reference import OipServerSource, name_fault
from gateway.remote_census import Census, Line, Redundant
from gateway.remote_sites import Site, SiteKey, endpoint_of, key_of


@dataclass(frozen=True, slots=True)
class Origin:
    """One server that the configuration names."""

    place: int
    """Which of the entries names it."""
    entry: ModelEntry
    backend: Backend
    endpoint: Endpoint
    """With the credentials that were there when the configuration was taken over."""
    listed: bool
    """Whether its models are those that it lists."""

    @property
    def key(self) -> SiteKey:
        return key_of(self.endpoint)


@dataclass(slots=True)
class Composition:
    models: dict[str, Redundant] = field(default_factory=dict)
    taken: list[Fault] = field(default_factory=list)
    """Names that are served from another place already, and are not served from here."""
    unusable: dict[str, str] = field(default_factory=dict)
    """By URL of a server: what is wrong with names of its models, in words."""


def is_remote(config: Config, entry: ModelEntry) -> bool:
    return bool(entry.backends) or isinstance(config.source(entry), OipServerSource)


def origins(config: Config) -> list[Origin]:
    """Every server that the configuration names; blocks on the disk.

    Raises:
        ConfigError: a secret cannot be read.
    """
    found = []
    for place, entry in enumerate(config.models):
        found += [Origin(place, entry, own, endpoint_of(config, own), listed=False) for own in entry.backends]
        if isinstance(config.source(entry), OipServerSource):
            backend = Backend(url=entry.source)
            found.append(Origin(place, entry, backend, endpoint_of(config, backend), listed=True))
    return sorted(found, key=lambda origin: origin.listed and origin.entry.name is None)


def compose(
    config: Config,
    found: Sequence[Origin],
    sites: Mapping[SiteKey, Site],
    census: Census,
    on_disk: Collection[str],
) -> Composition:
    """`found`: the `origins` of `config`; `on_disk`: names of the models there."""
    made = Composition()
    models = made.models
    for origin in found:
        name = origin.entry.name
        if origin.listed or name is None:
            continue
        model = models.setdefault(name, Redundant(name, origin.entry, bool(origin.entry.source)))
        model.lines.append(Line(origin.backend, sites[origin.key], origin.backend.model or name))
    elsewhere = {*on_disk, *models}
    served: set[tuple[Site, str]] = set()
    for origin in found:
        if not origin.listed:
            continue
        site = sites[origin.key]
        names = [name for name in census.names(site) if origin.entry.name in (None, name)]
        wrong = [name for name in names if name_fault(name) is not None]
        if wrong:
            made.unusable[site.endpoint.url] = f"{len(wrong)}, such as: {said(str(name_fault(wrong[0])))}"
        for name in names:
            if (site, name) in served or name_fault(name) is not None:
                continue
            if name in elsewhere:
                made.taken.append(_taken(config, origin, name))
                continue
            served.add((site, name))
            model = models.setdefault(name, Redundant(name, origin.entry, mixed=False))
            model.lines.append(Line(origin.backend, site, name))
    return made


def _taken(config: Config, origin: Origin, name: str) -> Fault:
    line = config.model_lines[origin.place] if origin.place < len(config.model_lines) else 0
    message = (
        f"model '{name}' of {origin.entry.source} is already served from another source; to serve it from both, give "
        "the entry of the other one `backends` with this URL, instead of this source"
    )
    return Fault(config.file if line else "command line", line, f"models[{origin.place}]", message)
