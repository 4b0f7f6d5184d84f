"""A configuration file → validated sections, or every fault at once, each with its line and what to write.

Order: text → YAML nodes → plain values with the place of each (config_tree.py) → values of environment and
command line laid over them → one section validated at a time, so that a fault in one hides none in another →
rules between keys (ports, addresses, sources, names). What a fault of one value says is worded in config_wording.py.
Rules: a value's origin (file line, variable or option) stays with it to the last message.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from gateway import config_later as later
from gateway.config_backends import entry_faults
from gateway.config_following import following_faults
from gateway.config_log import InferenceLog, log_faults
from gateway.config_postgres import postgres_faults
from gateway.config_registry import RegistriesKeys, registry_faults, source_refusal, with_environment
from gateway.config_schema import ConfigFile, ModelEntry, ModelKeys, Server, Tls
from gateway.config_section import Section
from gateway.config_signing import signature_faults
from gateway.config_tree import Place, Tree, read_scalar, read_tree
from gateway.config_variants import variant_faults
from gateway.config_wording import explain, is_ghost, shown
from gateway.errors import ConfigError, Fault
from gateway.protocol.spelling import unknown_key
from gateway.registry.formats import advice
from gateway.registry.reference import DirectorySource, ModelFileSource, RegistrySource, Source, name_fault, parse

OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    "host": ("server", "host"),
    "http_port": ("server", "http_port"),
    "metrics_port": ("server", "metrics_port"),
    "workers": ("server", "workers"),
    "log_level": ("server", "log_level"),
    "log_format": ("server", "log_format"),
    "insecure": ("server", "insecure"),
    "instances": ("defaults", "instances"),
    "grpc_port": ("server", "grpc_port"),
    "processes": ("server", "processes"),
    "model_control": ("server", "model_control"),
    "load_models": ("server", "load_models"),
    "allow_client_shm": ("server", "client_shared_memory"),
    "model_cache": ("registries", "cache"),
    "locked": ("registries", "locked"),
}
"""Options of `gateway serve` and the key that each sets; `GATEWAY_<OPTION>` is its variable."""

_TEXT_OPTIONS: Final = ("host", "log_level", "log_format", "model_control", "model_cache")
_PORTS: Final = ("http_port", "grpc_port", "metrics_port")
_ONE_MODEL: Final = ("name", "source", "digest", "backends", "golden", "canary", "shadow")
_ADDRESS: Final = re.compile(r"[A-Za-z0-9.-]+:[0-9]{1,5}")
"""A server's URL whose scheme was forgotten."""


@dataclass(slots=True)
class Read:
    """The sections of a valid file with environment and options applied."""

    server: Server = field(default_factory=Server)
    defaults: ModelKeys = field(default_factory=ModelKeys)
    models: tuple[ModelEntry, ...] = ()
    model_lines: tuple[int, ...] = ()
    instances: int | None = None
    inference_log: InferenceLog | None = None
    registries: RegistriesKeys = field(default_factory=RegistriesKeys)
    notes: tuple[str, ...] = ()
    """What is no fault but must be said: keys without effect, variables that look mistyped."""


DEFAULT_SERVER: Final = Server()
S = TypeVar("S", bound=Section)


class Loader:
    """One load; `read` may be called once."""

    def __init__(self, path: Path | None, overrides: Mapping[str, object], environ: Mapping[str, str]) -> None:
        self._path = path
        self._overrides = overrides
        self._environ = environ
        self._faults: list[Fault] = []
        self._tree = Tree("")

    def read(self) -> Read:
        """Raises ConfigError with all faults."""
        if self._path is not None:
            self._tree = read_tree(self._path)
            self._faults += self._tree.faults
        root = self._mapping(self._tree.value, ())
        instances = self._lay_over(root)
        registries = self._registries(root.get("registries"))
        found = Read(
            server=self._section(Server, root.get("server"), ("server",)) or Server(),
            defaults=self._section(ModelKeys, root.get("defaults"), ("defaults",)) or ModelKeys(),
            models=self._models(root.get("models"), registries, root.get("defaults")),
            registries=registries or RegistriesKeys(),
            model_lines=tuple(self._tree.place(("models", i)).line for i in range(_length(root.get("models")))),
            instances=instances,
            inference_log=(
                self._section(InferenceLog, root["inference_log"], ("inference_log",))
                if "inference_log" in root
                else None
            ),
            notes=tuple(later.unknown_variables(self._environ, OPTIONS)),
        )
        for key in root.keys() - ConfigFile.model_fields.keys():
            why = later.refusal("", str(key), root[key]) or unknown_key(str(key), ConfigFile.model_fields)
            self._fault((key,), why)
        self._check_server(root.get("server"))
        for fault in log_faults(root):
            self._fault(fault.place, fault.message)
        if isinstance(section := root.get("inference_log"), dict):
            base = self._path.parent if self._path is not None else Path()
            for place, message in postgres_faults(section, base, self._environ):
                self._fault(("inference_log", "postgres", *place), message)
        if self._faults:
            raise ConfigError(sorted(set(self._faults), key=lambda fault: (fault.file, fault.line, fault.where)))
        return found

    # Places and values

    def _fault(self, path: tuple[str | int, ...], message: str) -> None:
        if path in self._tree.faulty:
            return
        place = self._tree.place(path)
        if place.key:
            message = message.replace(f"write for example {path[-1]}: ", f"write for example {_assigned(place.key)}")
        self._faults.append(Fault(place.file, place.line, place.key or _dotted(path), message))

    def _mapping(self, value: object, path: tuple[str | int, ...]) -> dict[str, Any]:
        if value is None:
            return {}
        if isinstance(value, dict):
            return value
        example = "server: {http_port: 8000}" if not path else f"{path[-1]}: {{key: value}}"
        self._fault(path, f"expected keys and values, found {shown(value)}; write for example {example}")
        return {}

    def _lay_over(self, root: dict[str, Any]) -> int | None:
        """Put variables, then options, in the place of the file's values; returns the overriding `instances`."""
        instances: int | None = None
        for option, value, place in self._outside():
            section, key = OPTIONS[option]
            if option == "instances":
                checked = self._section(ModelKeys, {key: value}, ("instances",), place)
                instances = checked.instances if checked is not None else None
                continue
            inner = root.get(section)
            if inner is None:
                inner = root[section] = {}
            if isinstance(inner, dict):
                inner[key] = value
                self._tree.places[section, key] = place
        return instances

    def _outside(self) -> Iterable[tuple[str, object, Place]]:
        for option in OPTIONS:
            variable = f"GATEWAY_{option.upper()}"
            text = self._environ.get(variable, "")
            if text and not later.is_service_link(text):
                typed = text if option in _TEXT_OPTIONS else read_scalar(text)
                if option == "load_models":
                    typed = [name.strip() for name in text.split(",")]
                yield option, typed, Place("environment", 0, variable)
        for option, value in self._overrides.items():
            if value is not None:
                typed = value if option in _TEXT_OPTIONS or not isinstance(value, str) else read_scalar(value)
                yield option, typed, Place("command line", 0, "--" + option.replace("_", "-"))

    # Sections

    def _section(
        self, kind: type[S], value: object, path: tuple[str | int, ...], place: Place | None = None
    ) -> S | None:
        """Validate one section; its faults are noted and None returned if it has any."""
        keys = self._mapping(value, path)
        if place is not None:
            self._tree.places.update({(*path, key): place for key in keys})
        usable = dict(keys)
        for key in keys:
            if later.is_neutral(str(path[0]), key, keys[key]):
                del usable[key]
            elif (refusal := later.refusal(str(path[0]), key, keys[key])) is not None:
                self._fault((*path, key), refusal)
                del usable[key]
            elif path == ("defaults",) and key in _ONE_MODEL:
                self._fault((*path, key), "belongs to one model; write it in an entry of models")
                del usable[key]
        try:
            return kind.model_validate(usable)
        except ValidationError as error:
            for details in error.errors(include_url=False, include_context=True):
                if not is_ghost(details):
                    self._fault((*path, *details["loc"]), explain(kind, details))
            return None

    def _registries(self, value: object) -> RegistriesKeys | None:
        """None if it has faults: nobody is blamed twice then."""
        base = self._path.parent if self._path is not None else Path()
        before = len(self._faults)
        for place, message in registry_faults(value, base, self._environ):
            self._fault(("registries", *place), message)
        keys = self._section(RegistriesKeys, value, ("registries",))
        return None if keys is None or len(self._faults) > before else with_environment(keys, self._environ)

    def _models(self, value: object, registries: RegistriesKeys | None, defaults: object) -> tuple[ModelEntry, ...]:
        if value is None:
            return ()
        if not isinstance(value, list):
            example = "models: [{source: ./models}]"
            self._fault(("models",), f"expected a list of models, found {shown(value)}; write for example {example}")
            return ()
        entries = []
        names: dict[str, int] = {}
        servers: dict[str, str] = {}
        for index, item in enumerate(value):
            path = ("models", index)
            self._check_name(item, path, names)
            self._check_source(item, path, registries)
            self._check_backends(item, path, servers)
            self._check_variants(item, path, registries)
            self._check_following(item, path)
            self._check_signature(item, path, defaults)
            entry = self._section(ModelEntry, item, path) if item is not None else None
            if item is None:
                self._fault(path, "is empty; write for example - source: ./models")
            if entry is not None:
                entries.append(entry)
        return tuple(entries)

    # Rules between keys, and rules the types cannot say

    def _check_name(self, item: object, path: tuple[str | int, ...], names: dict[str, int]) -> None:
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str):
            return
        if (fault := name_fault(name)) is not None:
            self._fault((*path, "name"), fault)
        elif name in names:
            self._fault((*path, "name"), f"the name '{name}' is taken by models[{names[name]}]; choose another")
        names.setdefault(name, int(path[-1]))

    def _check_source(self, item: object, path: tuple[str | int, ...], registries: RegistriesKeys | None) -> None:
        keys = item if isinstance(item, dict) else {}
        source = keys.get("source")
        base = self._path.parent if self._path is not None else Path()
        if isinstance(source, str) and source:
            fault = source_fault(source, base, registries, named=isinstance(keys.get("name"), str))
            if fault is not None:
                self._fault((*path, "source"), fault)

    def _check_backends(self, item: object, path: tuple[str | int, ...], servers: dict[str, str]) -> None:
        base = self._path.parent if self._path is not None else Path()
        for fault in entry_faults(item, base, self._environ, servers):
            self._fault((*path, *fault.place), fault.message)

    def _check_following(self, item: object, path: tuple[str | int, ...]) -> None:
        for fault in following_faults(item):
            self._fault((*path, *fault.place), fault.message)

    def _check_variants(self, item: object, path: tuple[str | int, ...], registries: RegistriesKeys | None) -> None:
        base = self._path.parent if self._path is not None else Path()
        for fault in variant_faults(item, partial(source_fault, base=base, registries=registries, named=True)):
            self._fault((*path, *fault.place), fault.message)

    def _check_signature(self, item: object, path: tuple[str | int, ...], defaults: object) -> None:
        base = self._path.parent if self._path is not None else Path()
        for place, message in signature_faults(item, defaults, base):
            self._fault((*path, *place), message)

    def _check_server(self, section: object) -> None:
        """Looks at the raw values, so that it also speaks when another key of the section is wrong."""
        values = section if isinstance(section, dict) else {}
        ports = {key: values.get(key, getattr(DEFAULT_SERVER, key)) for key in _PORTS}
        for pair in itertools.combinations(_PORTS, 2):
            if ports[pair[0]] == ports[pair[1]] != 0:
                self._blame_ports(values, pair, ports[pair[0]])
        self._check_tls(values.get("tls"))
        self._check_token(values.get("admin_token_file"))
        host = values.get("host", DEFAULT_SERVER.host)
        if isinstance(host, str) and host and values.get("insecure") is not True and not _is_loopback(host):
            message = (
                f"'{host[:253]}' can be reached from other machines and this version does not authenticate "
                "callers; use 127.0.0.1, or accept it with insecure: true (--insecure) where a proxy or "
                "firewall stands in front"
            )
            self._fault(("server", "host"), message)

    def _check_tls(self, tls: object) -> None:
        base = self._path.parent if self._path is not None else Path()
        for key, text in tls.items() if isinstance(tls, dict) else ():
            if key in Tls.model_fields and isinstance(text, str) and text and not (base / text).is_file():
                self._fault(("server", "tls", key), f"there is no file {base / text}; write the path of a PEM file")

    def _check_token(self, text: object) -> None:
        base = self._path.parent if self._path is not None else Path()
        if isinstance(text, str) and text and not (base / text).is_file():
            fault = f"there is no file {base / text}; write the path of a file with the token in it"
            self._fault(("server", "admin_token_file"), fault)

    def _blame_ports(self, values: Mapping[str, Any], pair: tuple[str, str], port: object) -> None:
        """Two ports are the same: one fault that names both, each as the user wrote it."""
        written = {key: self._tree.place(("server", key)) for key in pair if key in values}
        if not written:
            return
        outside = [key for key, place in written.items() if place.key]
        blamed = (outside or list(written))[-1]
        named = []
        for key in pair:
            place = written.get(key)
            origin = " (by default)" if place is None else ""
            if place is not None and not place.key and outside:
                origin = f" ({place.file}:{place.line})"
            named.append(((place.key if place is not None else "") or key) + origin)
        self._fault(("server", blamed), f"{' and '.join(named)} are both {port}; give them different ports")


def source_fault(text: str, base: Path, registries: RegistriesKeys | None = None, *, named: bool = False) -> str | None:
    """Why the source `text` cannot be served; None if it looks servable. Looks at the disk, reads and asks nothing.

    `registries`: what references are held against; None: nothing is. `named`: its model has a name of its own.
    """
    try:
        source = parse(text, base)
    except ValueError as error:
        return str(error)
    try:
        if isinstance(source, RegistrySource):
            return source_refusal(source, registries, named=named) if registries is not None else None
        return _path_fault(source)
    except OSError as error:
        return f"cannot be looked at: {error.strerror}; check the path and its permissions"


def _path_fault(source: Source) -> str | None:
    if isinstance(source, ModelFileSource) and not source.path.is_file():
        return f"there is no file {source.path}; write the path of an .onnx file"
    if isinstance(source, DirectorySource) and not source.path.is_dir():
        if source.path.exists():
            known = advice(source.path.name)
            refusal = f"{source.path} is neither a directory nor an .onnx file; only ONNX models are served"
            return f"{refusal}; {known}" if known else refusal
        if _ADDRESS.fullmatch(source.text):
            return f"there is no directory {source.path}; for a running server write http://{source.text}"
        return f"there is no directory {source.path}; write the path of a model repository or model"
    return None


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _length(value: object) -> int:
    return len(value) if isinstance(value, list) else 0


def _assigned(name: str) -> str:
    """An option or variable, up to its value."""
    return f"{name} " if name.startswith("--") else f"{name}="


def _dotted(path: Iterable[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")
