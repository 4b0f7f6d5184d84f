"""Configuration of the inference log: where it lies and how it is written, and what it keeps of each model.

`InferenceLog` is the section `inference_log`; `ModelLog` the key of that name in `defaults` and in entries of `models`.
The rules of config_schema.py hold. What belongs to one model is merged key by key: its entry, then `defaults`, then
what is built in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import Field

from gateway.config_postgres import Postgres
from gateway.config_section import Section
from gateway.core.log_policy import LOG_POLICY, MIN_RETENTION_DAYS, LogPolicy, Overflow, Payload
from gateway.extras import lacking

_BUILT_IN: Final[dict[str, Any]] = {"default": LOG_POLICY.payload, "truncate_bytes": LOG_POLICY.truncate_bytes}


class Payloads(Section):
    """What is kept of a model's tensors; decided before anything is written."""

    default: Payload | None = Field(default=None, examples=["keep"])
    """Of tensors that are not named below: `keep` (default) all, `drop` nothing, `hash` the SHA-256, `truncate` the
    first bytes."""
    tensors: dict[str, Payload] = Field(default_factory=dict, max_length=1024, examples=[{"image": "hash"}])
    """By the name of an input or output."""
    truncate_bytes: int | None = Field(default=None, ge=1, le=2**20, examples=[256])
    """Bytes that `truncate` keeps of a tensor. Default 256."""


class ModelLog(Section):
    """What the inference log keeps of one model's requests."""

    enabled: bool | None = Field(default=None, examples=[True])
    """Whether its requests are written at all (default true)."""
    overflow: Overflow | None = Field(default=None, examples=["block"])
    """When the log cannot take more: `drop` (default) loses rows, counted and recorded as a gap; `spill` writes them to
    `inference_log.spill_directory`; `block` refuses requests of this model with 503 until there is room."""
    payloads: Payloads | None = Field(default=None, examples=[{"default": "keep", "tensors": {"image": "hash"}}])
    """What is kept of its tensors."""
    sampling: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False, strict=False, examples=[1.0])
    """Share of the answered requests that keep their tensors (default 1); every request is a row, whatever this says,
    and refused or failed ones keep theirs."""
    retention_days: int | None = Field(default=None, ge=1, le=36_500, examples=[365])
    """Days that its rows are kept; by default as `inference_log.retention_days`."""


class InferenceLog(Section):
    """Keeps a row of every inference request. Without this section there is no log."""

    directory: str = Field(default="./inference-log", min_length=1, max_length=4096, examples=["./inference-log"])
    """Where it lies, relative to this file's directory; made if it is not there, readable by this user only."""
    queue_mb: int = Field(default=64, ge=1, le=65_536, examples=[64])
    """Most memory for rows that are not on the disk yet; with more, `overflow` of the model decides."""
    sync_ms: float = Field(default=100.0, ge=1, le=60_000, allow_inf_nan=False, strict=False, examples=[100])
    """Rows are forced onto the disk at most this long after they were written: what a power cut can lose."""
    segment_mb: int = Field(default=64, ge=1, le=512, examples=[64])
    """A segment of the write-ahead log is closed, and made into Parquet, when it has grown to this size …"""
    seal_s: float = Field(default=60.0, ge=1, le=86_400, allow_inf_nan=False, strict=False, examples=[60])
    """… or when it is this old."""
    spill_directory: str | None = Field(default=None, min_length=1, max_length=4096, examples=["/mnt/other/spill"])
    """Second place, on another disk, for models with `overflow: spill`."""
    retention_days: int = Field(default=MIN_RETENTION_DAYS, ge=1, le=36_500, examples=[MIN_RETENTION_DAYS])
    """Days that rows are kept; then whole days are deleted, unless a hold covers them."""
    allow_short_retention: bool = Field(default=False, examples=[True])
    """Allow fewer than 183 days."""
    max_disk_gb: float | None = Field(default=None, gt=0, le=10**6, allow_inf_nan=False, strict=False, examples=[200])
    """Size from which on it warns; nothing that has to be kept is deleted for it."""
    postgres: Postgres | None = Field(default=None, examples=[{"dsn": "env:GATEWAY_LOG_DSN"}])
    """Copies everything into a PostgreSQL database too."""
    feedback_token_file: str | None = Field(default=None, min_length=1, max_length=4096, examples=["feedback-token"])
    """File with a token that allows `POST /api/feedback` and nothing else (`Authorization: Bearer …`), relative to this
    file's directory; the token of `server.admin_token_file` allows it too."""


@dataclass(frozen=True, slots=True)
class LogFault:
    """`place`: keys and indexes from the top of the file."""

    place: tuple[str | int, ...]
    message: str


def log_faults(root: Mapping[str, Any]) -> Iterator[LogFault]:
    """What is wrong between keys; `root` is the file as it was read, values of any type."""
    stated = root.get("inference_log")
    section: dict[str, Any] = stated if isinstance(stated, dict) else {}
    # Rows are taken in without it, and would wait for a sealer that cannot start.
    if "inference_log" in root and (why := lacking("pyarrow")) is not None:
        yield LogFault(("inference_log",), why)
    short_is_fine = section.get("allow_short_retention") is True
    places: list[tuple[tuple[str | int, ...], object]] = [(("inference_log",), section)]
    for place, keys in _of_models(root):
        places.append((place, keys))
        if "inference_log" not in root:
            yield LogFault(
                place, "has no effect without the section inference_log; write for example inference_log: {}"
            )
        elif keys.get("overflow") == "spill" and not section.get("spill_directory"):
            text = "spill needs a second place; write inference_log: {spill_directory: /mnt/other/spill}"
            yield LogFault((*place, "overflow"), text)
    for place, kept in places:
        days = kept.get("retention_days") if isinstance(kept, dict) else None
        if isinstance(days, int) and 0 < days < MIN_RETENTION_DAYS and not short_is_fine:
            text = (
                f"{days} days are fewer than the {MIN_RETENTION_DAYS} that the EU AI Act asks for at least; write "
                "more, or inference_log: {allow_short_retention: true} where other law allows or demands it"
            )
            yield LogFault((*place, "retention_days"), text)


def _of_models(root: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], dict[str, Any]]]:
    entries = root.get("models")
    holders: list[tuple[tuple[str | int, ...], object]] = [(("defaults",), root.get("defaults"))]
    holders += [(("models", i), entry) for i, entry in enumerate(entries if isinstance(entries, list) else ())]
    for place, holder in holders:
        keys = holder.get("inference_log") if isinstance(holder, dict) else None
        if isinstance(keys, dict):
            yield (*place, "inference_log"), keys


def policy(entry: ModelLog | None, defaults: ModelLog | None) -> LogPolicy:
    """What holds for one model: its entry's keys, then those of `defaults`, then the built-in ones."""
    layers = [layer for layer in (entry, defaults) if layer is not None]

    def first(key: str, otherwise: Any) -> Any:
        return next((value for layer in layers if (value := getattr(layer, key)) is not None), otherwise)

    payloads = [layer.payloads for layer in layers if layer.payloads is not None]
    keys = {
        key: next((value for layer in payloads if (value := getattr(layer, key)) is not None), otherwise)
        for key, otherwise in _BUILT_IN.items()
    }
    tensors: dict[str, Payload] = {}
    for layer in reversed(payloads):
        tensors.update(layer.tensors)
    return LogPolicy(
        first("enabled", LOG_POLICY.enabled),
        first("overflow", LOG_POLICY.overflow),
        keys["default"],
        tuple(sorted(tensors.items())),
        keys["truncate_bytes"],
        first("sampling", LOG_POLICY.sampling),
        first("retention_days", None),
    )
