"""Configuration of which version of a model serves, and which others stand beside it.

Belongs to one entry of `models`; the rules of config_schema.py hold.
"""

from __future__ import annotations

from typing import Final

from pydantic import Field

from gateway.config_section import Section

_HEADER_NAME: Final = r"^[A-Za-z0-9_.-]{1,64}$"
_DIGEST: Final = r"^sha256:[0-9a-f]{64}$"
_VERSION: Final = r"^[1-9][0-9]{0,18}$"


class Golden(Section):
    """Requests whose right answers are known: a version that answers otherwise never serves."""

    file: str = Field(default="golden.json", min_length=1, max_length=4096, examples=["digits-golden.json"])
    """File with a JSON list of OIP requests, each with the `outputs` expected; relative to this file's directory. Where
    it is not there: a file of this name beside the version's model file."""
    rtol: float = Field(default=1e-5, ge=0, le=1e6, allow_inf_nan=False, strict=False, examples=[1e-5])
    """Floating point outputs fit if |a - b| <= atol + rtol * max(|a|, |b|); all others must be equal."""
    atol: float = Field(default=1e-6, ge=0, le=1e12, allow_inf_nan=False, strict=False, examples=[1e-6])
    """See `rtol`."""


class Variant(Section):
    """Another version of the model that stands beside the one its name means."""

    source: str = Field(min_length=1, max_length=4096, examples=["models:/digits@challenger"])
    """Where it comes from: whatever an entry's `source` may be, but a server's URL; of a directory the highest version
    that its config.pbtxt serves."""
    version: str | None = Field(default=None, pattern=_VERSION, examples=["4"])
    """Of a directory: this version instead of the highest. Of a single file: the number under which clients see it."""
    digest: str | None = Field(default=None, pattern=_DIGEST, examples=["sha256:" + "0" * 63 + "1"])
    """Take only files with exactly this digest."""
    instances: int | None = Field(default=None, ge=1, le=256, examples=[1])
    """Loaded copies, each in a worker process of its own. Default 1."""


class Canary(Variant):
    """A version that answers a share of the requests."""

    percent: float = Field(default=0.0, ge=0, le=100, allow_inf_nan=False, strict=False, examples=[5])
    """Share of the requests that it answers; `gateway models split` changes it at run time."""
    header: dict[str, str] = Field(default_factory=dict, max_length=8, examples=[{"X-Variant": "canary"}])
    """Requests with all of these headers (gRPC: metadata) go to it, whatever the share."""
    sticky: str | None = Field(default=None, pattern=_HEADER_NAME, examples=["X-User"])
    """Name of a header whose value decides: callers with equal values meet the same version while the share stays, and
    a growing share only adds callers. Requests without it are drawn."""


class Shadow(Variant):
    """A version that is sent copies of requests, and whose answers are compared and thrown away."""

    percent: float = Field(default=100.0, ge=0, le=100, allow_inf_nan=False, strict=False, examples=[10])
    """Share of the requests answered by the version that the model's name means that are copied."""
    rtol: float | None = Field(default=None, ge=0, le=1e6, allow_inf_nan=False, strict=False, examples=[1e-3])
    """Floating point answers agree if |a - b| <= atol + rtol * max(|a|, |b|). Default: by datatype, 1e-3 for FP32."""
    atol: float | None = Field(default=None, ge=0, le=1e12, allow_inf_nan=False, strict=False, examples=[1e-5])
    """See `rtol`. Default 1e-5."""
