"""`gateway convert`: a scikit-learn pickle becomes an ONNX model, checked against the original, with its provenance.

Rules: no pickle is ever opened in this process. The file is copied and hashed first, then a throw-away process
(conversion_process.py) opens exactly that copy, without network, in bounded memory and time, in a private directory and
with an environment that holds nothing but a path. What it reports is data: read, bounded, shown, never believed to be
more. Nothing is written to the place that was asked for unless the converted model answers as the original does, and
nothing that stands there is overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.errors import ConfigError
from gateway.provenance.manifest import SIDECAR

MAX_PICKLE_BYTES: Final = 4 * 2**30
MAX_REPORT_BYTES: Final = 64 * 1024
NEEDED: Final = ("skl2onnx", "sklearn", "joblib")
SUFFIXES: Final = (".pkl", ".pickle", ".joblib")
_CHUNK: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Bounds:
    """`tolerance`: largest difference of a number, relative to it or to 1; `label_share`: least share of equal ones."""

    memory_mb: int = 4096
    time_s: int = 300
    tolerance: float = 1e-3
    label_share: float = 0.99


@dataclass(frozen=True, slots=True)
class Converted:
    """What came of a conversion, for people."""

    model: str
    features: int
    sha256: str
    """Of the pickle."""
    figures: tuple[str, ...]
    """How far the answers differ, a line for each output."""
    notes: tuple[str, ...]
    isolated: bool
    """Whether the process had no network."""


def convert(source: Path, target: Path, features: int = 0, bounds: Bounds | None = None) -> Converted:
    """Convert the model in `source` and write it to `target`, and provenance.json beside it.

    Args:
        features: columns of its input; 0: as the model says.

    Raises:
        ConfigError: it cannot be read, converted or written, or answers differently; nothing is written then.
    """
    bounds = bounds or Bounds()
    _check_places(source, target)
    with tempfile.TemporaryDirectory(prefix="gateway-convert-") as name:
        private = Path(name)
        copy = private / "model.pickle"
        sha256, size = _copied(source, copy)
        report = _run(private, copy, features, bounds)
        checked = _figures(report, bounds)
        model, rows = _text(report.get("model")), _mapping(report.get("check")).get("rows")
        content = (private / "model.onnx").read_bytes()
        document = {
            "converted_from": {"file": source.name, "sha256": sha256, "bytes": size, "class": model},
            "converted_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "converter": {str(k)[:64]: _text(v) for k, v in _mapping(report.get("versions")).items()},
            "check": {"rows": rows, "figures": checked, "tolerance": bounds.tolerance},
        }
        _write(target, content)
        _write(target.parent / SIDECAR, orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
    notes = report.get("notes")
    return Converted(
        model,
        int(report.get("features") or 0),
        sha256,
        tuple(checked),
        tuple(_text(note) for note in notes) if isinstance(notes, list) else (),
        report.get("network") == "none",
    )


def _check_places(source: Path, target: Path) -> None:
    lacking = [package for package in NEEDED if find_spec(package) is None]
    if lacking:
        raise ConfigError("converting needs pip install 'oip-gateway[convert]'")
    if not source.is_file():
        raise ConfigError(f"{source}: there is no such file")
    if source.suffix not in SUFFIXES:
        raise ConfigError(f"{source}: is none of {', '.join(SUFFIXES)}; only scikit-learn models are converted")
    if target.suffix != ".onnx":
        raise ConfigError(f"{target}: does not end in .onnx; write for example models/digits/1/model.onnx")
    for path in (target, target.parent / SIDECAR):
        if path.exists():
            raise ConfigError(f"{path} exists already; write to a new version directory")


def _copied(source: Path, copy: Path) -> tuple[str, int]:
    """SHA-256 and size of what was copied."""
    digest, size = hashlib.sha256(), 0
    try:
        with source.open("rb") as stream, copy.open("xb") as into:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                if size > MAX_PICKLE_BYTES:
                    raise ConfigError(f"{source}: is larger than {MAX_PICKLE_BYTES} bytes")
                into.write(chunk)
    except OSError as error:
        raise ConfigError(f"{source} cannot be copied: {error.strerror}") from None
    return digest.hexdigest(), size


def _run(private: Path, copy: Path, features: int, bounds: Bounds) -> dict[str, Any]:
    """The report of the process that opened the pickle. Raises ConfigError: it has none, or refused."""
    out = private / "out"
    out.mkdir()
    own = Path(__file__).resolve().parent.parent
    environment = {
        "PATH": os.defpath,
        "HOME": str(private),
        "TMPDIR": str(private),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(own),
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    }
    command = [sys.executable, "-s", "-m", "gateway.conversion_process", str(copy), str(out)]
    command += [str(features), str(bounds.memory_mb * 2**20), str(bounds.time_s)]
    process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
        command, cwd=private, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        code = process.wait(bounds.time_s)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"the conversion was not done after {bounds.time_s} s; allow more with --time-s") from None
    finally:
        _end(process)
    path = out / "report.json"
    if code != 0 or not path.is_file() or path.is_symlink() or path.stat().st_size > MAX_REPORT_BYTES:
        raise ConfigError(f"the conversion ended {_words(code)}; allow more with --memory-mb, or convert with skl2onnx")
    report = _mapping(_json(path.read_bytes()))
    if refused := report.get("refused"):
        raise ConfigError(f"the model cannot be converted: {_text(refused)}")
    model = out / "model.onnx"
    if model.is_symlink() or not model.is_file():
        raise ConfigError("the conversion ended without a model")
    shutil.move(model, private / "model.onnx")
    return dict(report)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and whatever it started go."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _words(code: int) -> str:
    return f"with signal {signal.Signals(-code).name}" if code < 0 else f"with code {code}"


def _figures(report: Mapping[str, Any], bounds: Bounds) -> list[str]:
    """A line for each output that was compared. Raises ConfigError: one of them differs too much."""
    check = _mapping(report.get("check"))
    lines, bad = [], False
    for name, found in _mapping(check.get("compared")).items():
        figures = _mapping(found)
        if "largest_difference" in figures:
            difference = float(figures["largest_difference"])
            lines.append(f"{_text(name)}: numbers differ by at most {difference:.2g}")
            bad |= not difference <= bounds.tolerance
        else:
            equal, of = int(figures.get("equal", 0)), int(figures.get("of", 0))
            lines.append(f"{_text(name)}: {equal} of {of} answers are equal")
            bad |= equal < bounds.label_share * of
    if not lines:
        raise ConfigError("the conversion compared nothing")
    if bad:
        raise ConfigError(
            f"the converted model does not answer as the original does ({'; '.join(lines)}); nothing was written. "
            "Models that need double precision, or text columns, want a conversion of their own with skl2onnx"
        )
    return lines


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def _json(content: bytes) -> object:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        raise ConfigError("the conversion ended with a report that cannot be read") from None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    text = "".join(character if character.isprintable() else " " for character in str(value))
    return text[:500]
