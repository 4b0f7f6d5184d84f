"""Which versions a model of remote servers has, what is settled about them before loading, and who has which.

Rules, pure: a server has the versions that it lists. One that lists none, and one whose version the configuration pins,
stands for the newest version here, whatever its number. One not heard of yet is taken for one that has the newest.
Batches are merged where the server states `max_batch_size` (it batches itself, so rows are independent), else only with
a proof. What keeps state between requests, and what may not run twice, is never tried on made-up input.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from gateway.backends.remote_endpoint import RemoteModel
from gateway.config import Backend, ModelSettings
from gateway.core.batchability import SignatureTensor
from gateway.core.model import ModelSpec, TensorSpec
from gateway.errors import ConfigError

ONLY: Final = "1"
"""The version's number where no server says any."""
MAX_VERSIONS: Final = 100
"""Of one model; the newest are served."""
_VERSION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
UNKNOWN_PLATFORM: Final = "unknown"


@dataclass(frozen=True, slots=True)
class Offer:
    """What one server is known to have of one model; `versions` None: it was not heard of yet."""

    pinned: str
    versions: tuple[str, ...] | None


def version_order(version: str) -> tuple[int, str]:
    """Sorts as versions do: numbers by value, behind everything else."""
    return (int(version) if version.isdecimal() else -1, version)


def usable_versions(listed: Iterable[str]) -> tuple[str, ...]:
    """Those that are fit for URLs, headers and labels; at most `MAX_VERSIONS`, the newest."""
    found = sorted({version for version in listed if _VERSION.fullmatch(version)}, key=version_order)
    return tuple(found[-MAX_VERSIONS:])


def versions_of(offers: Iterable[Offer]) -> list[str]:
    """The versions that a model of these servers has, oldest first; none where no server was heard of."""
    heard = [offer for offer in offers if offer.versions is not None]
    listed = {version for offer in heard if not offer.pinned for version in offer.versions or ()}
    pinned = {offer.pinned for offer in heard if offer.pinned}
    found = listed or pinned or ({ONLY} if heard else set())
    return sorted(found, key=version_order)


def asked_as(offer: Offer, version: str, newest: str) -> str | None:
    """The version to ask that server for where `version` is meant here; empty: whichever it chooses; None: it has not
    got it."""
    if offer.pinned:
        return offer.pinned if version == newest else None
    if offer.versions is None:
        return version if version == newest else None
    if not offer.versions:
        return "" if version == newest else None
    return version if version in offer.versions else None


@dataclass(frozen=True, slots=True)
class Facts:
    """What holds for one version, from what its servers say and what the configuration says."""

    max_batch_size: int | None
    size_is_stated: bool
    stated_inputs: tuple[TensorSpec, ...]
    stated_outputs: tuple[TensorSpec, ...]
    platform: str
    independent: str
    apart: str
    untried: str


def facts_of(settings: ModelSettings, models: Sequence[RemoteModel]) -> Facts:
    """`models`: the version on each of its servers that answered, the one that defines the signature first.

    Raises:
        ConfigError: the configuration asks for larger batches than a server takes, or nobody names inputs and outputs.
    """
    first = models[0]
    if not first.inputs or not first.outputs:
        raise ConfigError(
            f"the server's metadata of model '{first.name}' names no {'inputs' if not first.inputs else 'outputs'}; "
            "a model needs both"
        )
    sizes = [model.max_batch_size for model in models if model.max_batch_size is not None]
    theirs = min(sizes) if sizes else None
    asked = settings.max_batch_size
    if asked is not None and theirs and asked > theirs:
        raise ConfigError(f"max_batch_size is {asked}, but the model's server takes at most {theirs} rows")
    size = asked if asked is not None else theirs
    sequence = any(model.sequence for model in models)
    independent = apart = untried = ""
    if sequence:
        apart = "its server keeps the state of sequences, so each request runs alone"
        untried = "the model keeps state"
    elif not settings.resilience.idempotent:
        untried = "idempotent is false, so it is not run on made-up input"
    if settings.batching == "auto" and theirs and not sequence:
        independent = f"its server batches it too (max_batch_size {theirs})"
    elif settings.batching == "on":
        independent = "batching is on"
    alike = theirs is not None and bool(theirs) == bool(size)  # else the dims are about to mean something else
    return Facts(
        size,
        size is not None,
        _stated(first.inputs, batched=bool(theirs)) if alike else (),
        _stated(first.outputs, batched=bool(theirs)) if alike else (),
        first.platform or UNKNOWN_PLATFORM,
        independent,
        apart,
        untried,
    )


def _stated(tensors: Sequence[SignatureTensor], *, batched: bool) -> tuple[TensorSpec, ...]:
    """As a config.pbtxt would list them: optional ones too, which are served then."""
    return tuple(
        TensorSpec(
            tensor.name,
            tensor.datatype,
            tuple([-1 if dim is None else dim for dim in tensor.shape[1 if batched else 0 :]]),
            tensor.optional,
        )
        for tensor in tensors
    )


def advice(backend: Backend, model: RemoteModel) -> str:
    """What the owner of the server might change, in words; empty: nothing."""
    if model.max_queue_delay_us <= 0:
        return ""
    return (
        f"backend {backend.url} holds requests of model '{model.name}' back for up to {model.max_queue_delay_us} µs to "
        "batch them (dynamic_batching.max_queue_delay_microseconds); queueing lives here: set it to 0 there"
    )


def signature_of(spec: ModelSpec) -> tuple[tuple[SignatureTensor, ...], tuple[SignatureTensor, ...]]:
    """Inputs and outputs that a server must have to take part, as its metadata would show them."""
    lead: tuple[int | None, ...] = (None,) if spec.batched else ()

    def full(tensor: TensorSpec) -> SignatureTensor:
        dims = tuple([None if dim == -1 else dim for dim in tensor.dims])
        return SignatureTensor(tensor.name, tensor.datatype, (*lead, *dims), tensor.optional)

    return tuple(map(full, spec.inputs)), tuple(map(full, spec.outputs))
