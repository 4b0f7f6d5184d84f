"""What a model source is, decided from its text alone.

    DATA OF A SOURCE            KIND
    ./models, /srv/digits       DirectorySource   a repository, or one model's directory
    ./digits.onnx               ModelFileSource   one model file
    http(s)://…, grpc(s)://…    OipServerSource   a running Open Inference Protocol server
    models:/name@alias          RegistrySource    a registry reference; also s3://, oci://, hf:// (locator.py)

Rules: the form decides, the disk is never looked at; a text that names no other form is a path. Relative
paths are taken from `base`. An unknown `scheme://` is an error, not a path. A server's URL is read strictly: scheme,
host and port and nothing else, so that two spellings of one server are one, and no credential hides in it.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

from gateway.registry.locator import Located, Scheme, locate_reference, scheme_of

SECTIONS: Final[dict[str, str]] = {"models": "mlflow", "s3": "s3", "oci": "oci", "hf": "huggingface"}
"""Scheme of a registry reference → the section of `registries` that allows it."""
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
ServerScheme = Literal["http", "https", "grpc", "grpcs"]
DEFAULT_PORTS: Final[dict[str, int]] = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}
"""By scheme, which is one of `ServerScheme`."""
_AUTHORITY: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[^:\[\]]+)(?::(?P<port>[0-9]*))?")
_LABEL: Final = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,256}")


@dataclass(frozen=True, slots=True)
class DirectorySource:
    """A directory: a model repository or one model. `text` is the source as it was written."""

    text: str
    path: Path


@dataclass(frozen=True, slots=True)
class ModelFileSource:
    """One `.onnx` file."""

    text: str
    path: Path


@dataclass(frozen=True, slots=True)
class OipServerSource:
    """The URL of a running OIP server, in its parts; `host` in lower case, an IPv6 address without brackets."""

    text: str
    scheme: ServerScheme
    host: str
    port: int

    @property
    def authority(self) -> str:
        """host:port, as in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The one spelling of all that mean this server."""
        return f"{self.scheme}://{self.authority}"

    @property
    def encrypted(self) -> bool:
        return self.scheme in ("https", "grpcs")


@dataclass(frozen=True, slots=True)
class RegistrySource:
    """A registry reference such as `models:/digits@champion`, and what it says of itself (locator.py)."""

    text: str
    scheme: Scheme
    located: Located

    @property
    def title(self) -> str:
        """What the model is called where nobody names it; perhaps not fit for a model's name."""
        return self.located.title

    @property
    def mutable(self) -> bool:
        """Whether it may mean something else later, as far as its spelling says."""
        return self.located.mutable


Source = DirectorySource | ModelFileSource | OipServerSource | RegistrySource


def parse(source: str, base: Path | None = None) -> Source:
    """Tell which kind of source `source` is; relative paths start at `base` (default: the working directory).

    Raises:
        ValueError: empty, holds a NUL, has a scheme that is none of the known ones, or is no server's URL although it
            has the scheme of one; the text says what to write.
    """
    if not source or "\0" in source:
        raise ValueError("is empty; write a path such as ./models" if not source else "holds a NUL character")
    if (registry := scheme_of(source)) is not None:
        return RegistrySource(source, registry, locate_reference(source))
    scheme = _SCHEME.match(source)
    if scheme is not None:
        if scheme[1].lower() in DEFAULT_PORTS:
            return parse_server(source)
        raise ValueError(
            f"has the unknown scheme '{scheme[1]}://'; write a path such as ./models, a server's URL with http://, "
            "https://, grpc:// or grpcs://, or a registry's models:/, s3://, oci:// or hf://"
        )
    path = (base or Path()) / Path(source).expanduser()
    return ModelFileSource(source, path) if path.suffix == ".onnx" else DirectorySource(source, path)


def parse_server(text: str) -> OipServerSource:
    """Read the URL of a server: scheme, host and, where it is not the scheme's default, port.

    Raises:
        ValueError: anything else; the text says what to write and never repeats what may be a credential.
    """
    scheme = _SCHEME.match(text)
    if scheme is None or scheme[1].lower() not in DEFAULT_PORTS:
        raise ValueError("is no server's URL; write for example http://triton-a:8000 or grpc://triton-a:8001")
    kind = scheme[1].lower()
    rest = text[scheme.end() :]
    if "@" in rest:
        raise ValueError("holds a user name or password; send credentials with `headers`, from env: or file:")
    authority, _, path = rest.partition("/")
    if path or "?" in rest or "#" in rest:
        raise ValueError(f"has more than host and port; write for example {kind}://host:{DEFAULT_PORTS[kind]}")
    found = _AUTHORITY.fullmatch(authority)
    if found is None:
        raise ValueError(f"has no usable host and port; write for example {kind}://host:{DEFAULT_PORTS[kind]}")
    host, digits = found["host"].lower(), found["port"]
    port = DEFAULT_PORTS[kind] if digits is None else int(digits) if digits and len(digits) < 6 else 0
    if not 1 <= port <= 65_535:
        raise ValueError("has no usable port; write a number from 1 to 65535")
    return OipServerSource(text, cast("ServerScheme", kind), _host(host), port)


def _host(text: str) -> str:
    """A name, an IPv4 address, or an IPv6 one in brackets, in one spelling. Raises ValueError."""
    if text.startswith("["):
        try:
            return str(ipaddress.IPv6Address(text[1:-1]))
        except ValueError:
            raise ValueError("has a host that is no IPv6 address; write for example [::1]") from None
    name = text.removesuffix(".")
    labels = name.split(".")
    if len(name) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError("has a host that is neither a name nor an address")
    if labels[-1].isdecimal():  # a name's last label never is: it was meant as an address
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise ValueError("has a host that is no IPv4 address; write for example 127.0.0.1") from None
    return name


def not_allowed(scheme: Scheme | None) -> str:
    """Why references of a scheme are refused that no section of the configuration allows."""
    if scheme is None:
        return "is no registry reference; write for example models:/digits@champion"
    section = SECTIONS[scheme]
    hint = " or set MLFLOW_TRACKING_URI to an http:// or https:// address" if scheme == "models" else ""
    return f"the configuration does not say where to find it; add registries.{section}{hint}"


def name_fault(name: str) -> str | None:
    """What is wrong with `name` as a model name; None if it is fit for URLs, headers, labels and paths."""
    if _NAME.fullmatch(name) and name.strip("."):
        return None
    return f"'{name[:64]}' cannot be a model name; use 1 to 256 of the characters A-Z a-z 0-9 . _ - and not dots alone"
