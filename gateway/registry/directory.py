"""Finding models on disk: a repository in Triton's layout, one model's directory, or one `.onnx` file.

    <repository>/<model>/config.pbtxt          optional
    <repository>/<model>/<version>/model.onnx  version: 1, 2, … (no leading zero)

Rules: a directory is one model if it holds a config.pbtxt or version directories, else a repository of models.
Hidden entries, files beside the models and directories that are not versions are left out, as in Triton, and so is a
directory that holds nothing of a model (`docs`), with a line in the log. A broken model is reported and never hides
the others; a repository inside a repository is a fault, because its models would be missed. Which versions are served
follows `version_policy` (default: the highest). Nothing is read but config.pbtxt; model files are read by digest.py.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gateway.core.model import Artifact, ArtifactFile
from gateway.errors import ConfigError, Fault
from gateway.protocol.model_config import ModelConfig, VersionPolicy, parse
from gateway.protocol.text_format import MAX_CHARACTERS
from gateway.registry import formats
from gateway.registry.digest import MODEL_FILE, digest_of, read_artifact
from gateway.registry.reference import name_fault

log = logging.getLogger("gateway.registry")

CONFIG_FILE: Final = "config.pbtxt"
STATE_FOLDER: Final = "initial_state"
MAX_SIDE_FILE: Final = 64 * 1024 * 1024
"""Bytes of one file of labels, of a first state or of a warm-up sample."""
_VERSION: Final = re.compile(r"[1-9][0-9]{0,18}")


@dataclass(frozen=True, slots=True)
class FoundModel:
    """One model. `versions` are those to serve, lowest first: version → what `read_artifact` takes as path."""

    name: str
    versions: dict[str, Path]
    config: ModelConfig | None
    source: str
    """Where it was found, for people."""
    model_file: str = MODEL_FILE
    """Empty for an ensemble, which has none."""
    directory: Path | None = None
    """The model's directory, or the one file it is."""


@dataclass(frozen=True, slots=True)
class Scan:
    """The usable models of one source, by name, and what is wrong with the others."""

    models: tuple[FoundModel, ...] = ()
    faults: tuple[Fault, ...] = ()


def scan(path: Path, name: str | None = None) -> Scan:
    """Find the models at `path`.

    Args:
        path: a repository, a model's directory or an `.onnx` file.
        name: renames the model if `path` holds one; picks one model of a repository.
    """
    try:
        if path.is_file():
            return _scan_file(path, name)
        if not path.is_dir():
            return Scan(faults=(_fault(path, "there is no such file or directory"),))
        if _is_model(path):
            return _collect([(path, name or path.resolve().name)])
        return _scan_repository(path, name)
    except OSError as error:
        return Scan(faults=(_fault(path, f"cannot be read: {error.strerror}; check its permissions"),))


def locate(path: Path, name: str | None, wanted: str) -> Path | None:
    """Directory or file of the model that `scan(path, name)` would call `wanted`; None if it is not there."""
    try:
        if path.is_file():
            return path if path.suffix == ".onnx" and (name or path.stem) == wanted else None
        if not path.is_dir():
            return None
        if _is_model(path):
            return path if (name or path.resolve().name) == wanted else None
        child = path / wanted
        usable = name in (None, wanted) and name_fault(wanted) is None and not wanted.startswith(".")
        return child if usable and child.is_dir() else None
    except OSError:
        return None


def read(path: Path, name: str) -> Scan:
    """The one model at `path`, a directory or file that `locate` found."""
    return _scan_file(path, name) if path.is_file() else _collect([(path, name)])


def names(path: Path, name: str | None = None) -> list[str]:
    """What the models that `scan(path, name)` would find are called, broken ones included; reads no config.pbtxt."""
    try:
        if path.is_file():
            return [name or path.stem]
        if not path.is_dir():
            return []
        if _is_model(path):
            return [name or path.resolve().name]
        children = [child for child in path.iterdir() if not child.name.startswith(".") and child.is_dir()]
        return sorted(c.name for c in children if name in (None, c.name) and name_fault(c.name) is None)
    except OSError:
        return []


def configured(path: Path, name: str, config: ModelConfig, at: str) -> FoundModel:
    """The model at `path` (a directory, or one `.onnx` file) with `config` in place of its config.pbtxt.

    `at`: where that configuration comes from, for people. Raises ConfigError.
    """
    if path.is_file():
        return FoundModel(name, {"1": path}, config, str(path), directory=path)
    return _with_config(path, name, config, at)


def select_versions(versions: Iterable[int], policy: VersionPolicy) -> tuple[int, ...]:
    """The versions that `policy` serves, lowest first; a specific version that does not exist is left out."""
    existing = sorted(set(versions))
    if policy.kind == "latest":
        return tuple(existing[-policy.count :])
    if policy.kind == "specific":
        return tuple(version for version in existing if version in policy.versions)
    return tuple(existing)


def _fault(path: Path, message: str) -> Fault:
    return Fault(str(path), 0, "", message)


def _scan_file(path: Path, name: str | None) -> Scan:
    if path.suffix != ".onnx":
        return Scan(faults=(_fault(path, "is not an .onnx file; only ONNX models are served"),))
    chosen = name or path.stem
    if (wrong := name_fault(chosen)) is not None:
        return Scan(faults=(_fault(path, f"{wrong}; set `name` in the configuration or rename the file"),))
    return Scan((FoundModel(chosen, {"1": path}, None, str(path), directory=path),))


def _scan_repository(path: Path, name: str | None) -> Scan:
    children = sorted(child for child in path.iterdir() if not child.name.startswith(".") and child.is_dir())
    if name is not None:
        children = [child for child in children if child.name == name]
        if not children:
            return Scan(faults=(_fault(path, f"holds no model '{name}'; write the name of a directory in it"),))
    else:
        children = [child for child in children if _may_be_model(child)]
    if not children:
        loose = next((child.name for child in sorted(path.glob("*.onnx"))), None)
        hint = f"; to serve {loose}, give that file, or move it to <model>/1/{MODEL_FILE}" if loose else ""
        return Scan(faults=(_fault(path, f"holds no model directories (<model>/1/{MODEL_FILE}){hint}"),))
    return _collect([(child, child.name) for child in children])


def _may_be_model(path: Path) -> bool:
    """Whether a directory of a repository is worth reading as a model; what cannot be looked at is, to be reported."""
    try:
        if _has_layout(path) or _inner_repository(path) or any(path.glob("*.onnx")) or any(path.glob("*/*.onnx")):
            return True
    except OSError:
        return True
    log.info("%s holds no model (no %s, no version directory, no .onnx file); it is left out", path, CONFIG_FILE)
    return False


def _has_layout(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() or bool(_version_directories(path))


def _inner_repository(path: Path) -> bool:
    """Whether `path` is no model itself but holds directories that are."""
    return not _has_layout(path) and any(
        _has_layout(child) for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")
    )


def _collect(candidates: Iterable[tuple[Path, str]]) -> Scan:
    models: list[FoundModel] = []
    faults: list[Fault] = []
    for path, name in candidates:
        try:
            models.append(_read_model(path, name))
        except ConfigError as error:
            faults += error.faults
        except OSError as error:
            faults.append(_fault(path, f"cannot be read: {error.strerror}; check its permissions"))
    return Scan(tuple(models), tuple(faults))


def _version_directories(path: Path) -> dict[int, Path]:
    found = {int(child.name): child for child in path.iterdir() if _VERSION.fullmatch(child.name) and child.is_dir()}
    return dict(sorted(found.items()))


def _is_model(path: Path) -> bool:
    """A repository may hold a model named `5`; its sub-directory then has versions of its own."""
    if (path / CONFIG_FILE).is_file():
        return True
    return any(not _version_directories(child) for child in _version_directories(path).values())


def _read_model(path: Path, name: str) -> FoundModel:
    """Raises ConfigError with what is wrong with the model at `path`."""
    if _inner_repository(path):
        raise ConfigError([_fault(path, f"is a repository of models, not a model; give {path} instead")])
    if (wrong := name_fault(name)) is not None:
        raise ConfigError([_fault(path, f"{wrong}; rename the directory")])
    return _with_config(path, name, _read_config(path / CONFIG_FILE), str(path / CONFIG_FILE))


def _with_config(path: Path, name: str, config: ModelConfig | None, at: str) -> FoundModel:
    """`at`: where the configuration stands."""
    policy = config.version_policy if config is not None else VersionPolicy()
    model_file = (config.default_model_filename if config is not None else None) or MODEL_FILE
    if config is not None and config.name and config.name != path.resolve().name:
        hint = f"is '{config.name}' but its directory is '{path.resolve().name}'; make them equal or leave it out"
        raise ConfigError([Fault(at, 0, "name", hint)])
    existing = _version_directories(path)
    ensemble = config is not None and config.ensemble
    if not existing and ensemble:
        existing = {1: path}
    if not existing:
        raise ConfigError([_fault(path, f"has no version directory; move the model to {path.name}/1/{model_file}")])
    selected = select_versions(existing, policy)
    if missing := sorted(set(policy.versions) - set(selected)):
        hint = f"version {missing[0]} does not exist; there are {', '.join(map(str, existing))}"
        raise ConfigError([Fault(at, 0, "version_policy", hint)])
    if ensemble:
        model_file = ""
    else:
        _check_files([existing[version] for version in selected], model_file)
    if config is not None:
        config = _with_files(path, config, at)
    versions = {str(version): existing[version] for version in selected}
    return FoundModel(name, versions, config, str(path), model_file, path)


def read_version(model: FoundModel, version: str, path: Path) -> Artifact:
    """Read and hash one version of a model; `path` is what `model.versions` says.

    An ensemble is what its configuration says: that counts among its files, as `config.pbtxt`, wherever it stands. To
    check the digest of one that has nothing else: `sha256sum config.pbtxt | sha256sum` in its directory.

    Raises:
        ConfigError, OSError: as `read_artifact`.
    """
    origin = str(path) if str(path).startswith(model.source) else model.source  # what was uploaded is soon nowhere
    artifact = read_artifact(path, model.name, version, model.model_file, origin)
    if model.config is None or not model.config.ensemble:
        return artifact
    text = model.config.text.encode()
    files = [file for file in artifact.files if file.path != CONFIG_FILE]
    files.append(ArtifactFile(CONFIG_FILE, len(text), hashlib.sha256(text).hexdigest()))
    files.sort(key=lambda file: file.path.encode())
    return replace(artifact, files=tuple(files), digest=digest_of(files))


def read_side_file(directory: Path, name: str, limit: int = MAX_SIDE_FILE) -> bytes:
    """A file below a model's directory that its configuration names; `name` is relative.

    Raises:
        ConfigError: it is missing, unreadable, no regular file, outside the directory, or larger than `limit` bytes.
    """
    path = directory / name
    try:
        if not path.resolve().is_relative_to(directory.resolve()):
            raise ConfigError([_fault(path, "this link leaves the model's directory; put the file itself there")])
        if not path.is_file():
            raise ConfigError([_fault(path, "this file is missing, and the model's configuration names it")])
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise ConfigError([_fault(path, f"cannot be read: {error.strerror}; check its permissions")]) from None
    if len(content) > limit:
        raise ConfigError([_fault(path, f"is larger than {limit} bytes")])
    return content


def _with_files(path: Path, config: ModelConfig, at: str) -> ModelConfig:
    """`config` with the contents of the files it names, but for warm-up samples, which are read when they are run."""
    if not config.label_files and not config.state_files:
        return config
    labels: dict[str, tuple[str, ...]] = {}
    for output, name in config.label_files:
        try:
            lines = read_side_file(path, name).decode().removesuffix("\n").split("\n")
        except UnicodeDecodeError:
            message = f"{name} is not UTF-8; save it as UTF-8"
            raise ConfigError([Fault(at, 0, f"output '{output}'.label_filename", message)]) from None
        labels[output] = tuple(line.removesuffix("\r") for line in lines)
    states = {tensor: read_side_file(path, f"{STATE_FOLDER}/{name}") for tensor, name in config.state_files}
    return config.with_files(labels, states)


def _read_config(path: Path) -> ModelConfig | None:
    if not path.exists():
        return None
    with path.open("rb") as stream:
        data = stream.read(4 * MAX_CHARACTERS + 1)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([Fault(str(path), line, "", "this line is not UTF-8; save the file as UTF-8")]) from None
    return parse(text, str(path))


def _check_files(directories: Iterable[Path], model_file: str) -> None:
    faults = []
    for directory in directories:
        path = directory / model_file
        if path.is_dir():  # Triton's form for a model with external data
            path /= MODEL_FILE
        if not path.is_file():
            other = next((child.name for child in sorted(directory.glob("*.onnx"))), None)
            hint = f"rename {other}, or name it in default_model_filename" if other else "put the ONNX file there"
            if not other and (advice := formats.hint(child.name for child in directory.iterdir())):
                hint = advice
            faults.append(_fault(path, f"this file is missing; {hint}"))
    if faults:
        raise ConfigError(faults)


def looks_of(place: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Path, size, time and inode of every file; a file that vanishes meanwhile is not there."""
    found = []
    for path in [place] if place.is_file() else sorted(place.rglob("*")):
        try:
            status = path.stat()
        except OSError:
            continue
        found.append((str(path), status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(found)
