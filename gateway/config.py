"""Configuration: the `Config` the rest of the program sees, and the order in which values win.

Rules:
- Precedence: command line > environment (`GATEWAY_HTTP_PORT` …) > file > built-in default.
- For one model: command line > its entry under `models` > its config.pbtxt > `defaults` > built-in default;
  `Config.settings` is the only place that applies this order.
- Every fault is reported at once, each with its line (config_faults.py); nothing is guessed.
- No key is ignored silently: one of a later version is recognised and refused, or accepted where it asks for
  nothing more than this version does (config_later.py), with a note if that might surprise.
- Everything here is immutable. A relative `source` starts at the file's directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from gateway.config_backends import read_headers
from gateway.config_faults import Loader, source_fault
from gateway.config_log import InferenceLog, policy
from gateway.config_registry import RegistriesKeys, variables
from gateway.config_schema import (
    MIB,
    Backend,
    Batching,
    Isolation,
    Limits,
    LogFormat,
    LogLevel,
    ModelEntry,
    ModelKeys,
    Server,
    json_schema,
)
from gateway.config_signing import signing_of
from gateway.core.log_policy import LOG_POLICY, LogPolicy
from gateway.core.model import Oversize
from gateway.core.resilience import RESILIENCE, Resilience
from gateway.errors import ConfigError, Fault
from gateway.protocol.model_config import ModelConfig
from gateway.registry.reference import OipServerSource, RegistrySource, Source, parse
from gateway.registry.signing import SIGNING, Signing

__all__ = [
    "Backend",
    "Batching",
    "Config",
    "Isolation",
    "Limits",
    "LogFormat",
    "LogLevel",
    "ModelEntry",
    "ModelKeys",
    "ModelSettings",
    "Server",
    "json_schema",
    "load",
]


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """All that is settled about one model before it is loaded; no value is left open but those marked so."""

    instances: int
    dedicated: bool
    intra_op_threads: int | None
    """None: the pool divides the cores."""
    batching: Batching
    max_batch_size: int | None
    """Rows; 0: unbatched; None: the gateway chooses."""
    max_queue_delay_s: float
    preferred_batch_sizes: tuple[int, ...]
    oversize: Oversize
    max_queue_rows: int
    max_queue_bytes: int
    deadline_s: float
    resilience: Resilience = RESILIENCE
    logged: LogPolicy = LOG_POLICY
    """What the inference log keeps, where there is one."""
    signing: Signing = SIGNING
    """How a version's signature is judged."""


@dataclass(frozen=True, slots=True)
class Config:
    """A valid configuration. `base` is where relative sources of `models` start."""

    server: Server = field(default_factory=Server)
    defaults: ModelKeys = field(default_factory=ModelKeys)
    models: tuple[ModelEntry, ...] = ()
    base: Path = Path()
    file: str = ""
    """The file as named by the user; empty without one."""
    model_lines: tuple[int, ...] = ()
    """Line of each entry of `models` in the file; sources of the command line have none."""
    instances: int | None = None
    """`--instances` or GATEWAY_INSTANCES: holds for every model."""
    registries: RegistriesKeys = field(default_factory=RegistriesKeys)
    """Where registry references are asked for."""
    inference_log: InferenceLog | None = None
    """Where the inference log lies and how it is written; None: there is none."""
    notes: tuple[str, ...] = ()
    """What the user must be told although it is no fault, each in one line with its place."""

    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The variables that headers of backends and registries name; secrets."""

    def source(self, entry: ModelEntry) -> Source | None:
        """The parsed source of an entry of `models`; None for one that has only backends."""
        return parse(entry.source, self.base) if entry.source else None

    def headers(self, backend: Backend) -> dict[str, str]:
        """What is sent with every request to `backend`; blocks on the disk. Secrets.

        Raises:
            ConfigError: a value's variable or file cannot be read.
        """
        return read_headers(backend, self.base, self.environ)

    def with_sources(self, sources: Sequence[str]) -> Config:
        """Add sources given on the command line (relative to the working directory) behind the file's models.

        Raises:
            ConfigError: a source that cannot be served, with all faults.
        """
        faults = [
            Fault("command line", 0, f"SOURCE '{text}'", fault)
            for text in sources
            if (fault := source_fault(text, Path(), self.registries)) is not None
        ]
        if faults:
            raise ConfigError(faults)
        entries = [ModelEntry(source=_anchored(text, self.base)) for text in sources]
        return replace(self, models=(*self.models, *entries))

    def settings(self, entry: ModelKeys, stated: ModelConfig | None = None) -> ModelSettings:
        """What holds for one model: its entry, its config.pbtxt, `defaults`, the built-in values, in this order."""
        layers = [_given(entry), _stated(stated), _given(self.defaults)]
        if self.instances is not None:
            layers.insert(0, {"instances": self.instances})
        keys: dict[str, Any] = dict(_BUILT_IN)
        for layer in reversed(layers):
            keys.update(layer)
        by_triton = stated is not None and bool(stated.max_batch_size)
        return ModelSettings(
            instances=keys["instances"],
            dedicated=keys["isolation"] == "dedicated",
            intra_op_threads=keys.get("intra_op_threads", self.server.intra_op_threads),
            batching=keys["batching"],
            max_batch_size=keys.get("max_batch_size"),
            max_queue_delay_s=keys["max_queue_delay_ms"] / 1e3,
            preferred_batch_sizes=tuple(sorted(set(keys["preferred_batch_sizes"]))),
            oversize=keys.get("oversize", "reject" if by_triton else "split"),
            max_queue_rows=max(keys["max_queue_rows"], keys.get("max_batch_size") or 0),
            max_queue_bytes=keys["max_queue_bytes"],
            deadline_s=keys["deadline_ms"] / 1e3,
            resilience=_resilience(keys),
            logged=policy(entry.inference_log, self.defaults.inference_log),
            signing=signing_of(
                entry.verification or self.defaults.verification, entry.signature or self.defaults.signature, self.base
            ),
        )


_BUILT_IN: Final[dict[str, Any]] = {
    "instances": 2,
    "isolation": "shared",
    "batching": "auto",
    "max_queue_delay_ms": 0.0,
    "preferred_batch_sizes": (),
    "max_queue_rows": 16_384,
    "max_queue_bytes": 256 * MIB,
    "deadline_ms": 30_000.0,
    "idempotent": True,
    "balancing": "pull",
    "attempt_timeout_ms": None,
    "max_attempts": 3,
    "retry_budget_percent": 10.0,
    "hedging_percent": 0.0,
    "agreement_percent": 0.0,
    "poison_denylist": True,
}


def _resilience(keys: Mapping[str, Any]) -> Resilience:
    timeout_ms = keys["attempt_timeout_ms"]
    return Resilience(
        idempotent=keys["idempotent"],
        balancing=keys["balancing"],
        attempt_timeout_s=None if timeout_ms is None else timeout_ms / 1e3,
        max_attempts=keys["max_attempts"],
        retry_budget=keys["retry_budget_percent"] / 100,
        hedging=keys["hedging_percent"] / 100,
        agreement=keys["agreement_percent"] / 100,
        poison_denylist=keys["poison_denylist"],
    )


def _given(keys: ModelKeys) -> dict[str, Any]:
    return {name: value for name in ModelKeys.model_fields if (value := getattr(keys, name)) is not None}


def _stated(stated: ModelConfig | None) -> dict[str, Any]:
    """The keys that a config.pbtxt sets. Its queue policies hold beside the bounds on rows and bytes of this file."""
    if stated is None:
        return {}
    keys: dict[str, Any] = {
        "instances": stated.instances,
        "max_batch_size": stated.max_batch_size,
        "max_queue_delay_ms": None if stated.max_queue_delay_us is None else stated.max_queue_delay_us / 1e3,
        "preferred_batch_sizes": stated.preferred_batch_sizes,
        "intra_op_threads": stated.intra_op_threads,
    }
    return {name: value for name, value in keys.items() if value is not None}


def yielding(entry: ModelEntry, stated: ModelConfig) -> ModelEntry:
    """`entry` without the keys that `stated` sets too: for a configuration that outranks the file's entry."""
    return entry.model_copy(update=dict.fromkeys(_stated(stated)))


def _anchored(text: str, base: Path) -> str:
    """A command line source, written so that it means the same when read from `base`."""
    if base == Path() or Path(text).is_absolute() or isinstance(parse(text), OipServerSource | RegistrySource):
        return text
    return str(Path(text).expanduser().absolute())


def _load_models_fault(
    path: Path | None, overrides: Mapping[str, object], environ: Mapping[str, str], control: str
) -> Fault:
    """`load_models` where nothing is loaded on request: everything would be served, which was not meant."""
    place, key, remedy = str(path or ""), "server.load_models", "`model_control: explicit` in the section server"
    if overrides.get("load_models"):
        place, key, remedy = "command line", "--load-model", "--model-control explicit"
    elif environ.get("GATEWAY_LOAD_MODELS"):
        place, key, remedy = "environment", "GATEWAY_LOAD_MODELS", "GATEWAY_MODEL_CONTROL=explicit"
    text = f"chooses what is loaded at start, but with model control '{control}' everything is; add {remedy}"
    return Fault(place, 0, key, text)


def load(
    path: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Read and check a configuration.

    Args:
        path: the YAML file; None for none.
        overrides: options of the command line by name (`http_port`, `instances` …); None values are skipped.
        environ: the environment; `GATEWAY_<OPTION>` variables are read.

    Raises:
        ConfigError: with every fault found.
    """
    read = Loader(path, overrides or {}, environ or {}).read()
    if read.server.load_models and read.server.model_control != "explicit":
        raise ConfigError([_load_models_fault(path, overrides or {}, environ or {}, read.server.model_control)])
    return Config(
        server=read.server,
        defaults=read.defaults,
        models=read.models,
        base=path.parent if path is not None else Path(),
        file=str(path) if path is not None else "",
        model_lines=read.model_lines,
        instances=read.instances,
        inference_log=read.inference_log,
        registries=read.registries,
        notes=read.notes,
        environ=_named(read.models, read.registries, environ or {}),
    )


def _named(models: Sequence[ModelEntry], registries: RegistriesKeys, environ: Mapping[str, str]) -> dict[str, str]:
    """Those variables that a header's value or something of a registry is taken from."""
    texts = [text for entry in models for backend in entry.backends for text in backend.headers.values()]
    names = {text.removeprefix("env:") for text in texts if text.startswith("env:")} | variables(registries)
    return {name: environ[name] for name in sorted(names & environ.keys())}
