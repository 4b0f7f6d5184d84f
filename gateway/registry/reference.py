"""What a model source is, decided from its text alone.

    DATA OF A SOURCE            KIND
    ./models, /srv/digits       DirectorySource   a repository, or one model's directory
    ./digits.onnx               ModelFileSource   one model file
    http(s)://…, grpc(s)://…    OipServerSource   a running Open Inference Protocol server
    models:/name@alias          RegistrySource    a registry reference

Rules: the form decides, the disk is never looked at; a text that names no other form is a path. Relative
paths are taken from `base`. An unknown `scheme://` is an error, not a path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SERVER_SCHEMES: Final = ("http", "https", "grpc", "grpcs")
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
    """The URL of a running OIP server."""

    text: str


@dataclass(frozen=True, slots=True)
class RegistrySource:
    """A registry reference such as `models:/digits@champion`."""

    text: str


Source = DirectorySource | ModelFileSource | OipServerSource | RegistrySource


def parse(source: str, base: Path | None = None) -> Source:
    """Tell which kind of source `source` is; relative paths start at `base` (default: the working directory).

    Raises:
        ValueError: empty, holds a NUL, or has a scheme that is none of the known ones.
    """
    if not source or "\0" in source:
        raise ValueError("is empty; write a path such as ./models" if not source else "holds a NUL character")
    if source.startswith("models:/"):
        return RegistrySource(source)
    scheme = _SCHEME.match(source)
    if scheme is not None:
        if scheme[1].lower() in _SERVER_SCHEMES:
            return OipServerSource(source)
        raise ValueError(f"has the unknown scheme '{scheme[1]}://'; write a path such as ./models")
    path = (base or Path()) / Path(source).expanduser()
    return ModelFileSource(source, path) if path.suffix == ".onnx" else DirectorySource(source, path)


def unservable(source: Source) -> str | None:
    """Why this version cannot serve `source`; None where it can."""
    what = {OipServerSource: "running servers as backends", RegistrySource: "registry references"}
    kind = what.get(type(source))
    if kind is None:
        return None
    return f"{kind} are not supported in this version; give a directory or an .onnx file instead"


def name_fault(name: str) -> str | None:
    """What is wrong with `name` as a model name; None if it is fit for URLs, headers, labels and paths."""
    if _NAME.fullmatch(name) and name.strip("."):
        return None
    return f"'{name[:64]}' cannot be a model name; use 1 to 256 of the characters A-Z a-z 0-9 . _ - and not dots alone"
