"""The throw-away process of `gateway convert`: opens a pickle, writes ONNX and a report, and is gone.

A pickle is a program. Reading it runs whatever its author put in, so this happens here only, after the process has
given up what it can: the network (a network namespace of its own, where the kernel lets it), memory, time and file
sizes beyond bounds, the parent's environment and open files. It still runs as the same user: it reads and writes what
that user can. Whoever starts it has said that the pickle is trusted.

Arguments: the pickle, the directory for `model.onnx` and `report.json`, features (0: the model says), and bounds: bytes
of memory, seconds of CPU time. The report is data from an untrusted process, and read as such.
"""

from __future__ import annotations

import ctypes
import json
import platform
import resource
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np

from gateway.core.tensor import unpack_bytes
from gateway.workers.session import Session

ROWS: Final = 512
SEED: Final = 20_240_229
MAX_FILE_BYTES: Final = 2**31
OPSET: Final = 17
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000


class _Refused(Exception):
    """The model cannot be converted; the text says why and what to do."""


def main(arguments: list[str]) -> int:
    source, directory, features, memory, cpu_s = arguments
    report: dict[str, Any] = {"network": "none" if _leave_network() else "not isolated"}
    _bound(int(memory), int(cpu_s))
    folder = Path(directory)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            report |= _convert(Path(source), folder, int(features))
        report["notes"] = sorted({_line(str(warning.message)) for warning in told if _is_worth_telling(warning)})[:20]
    except _Refused as error:
        report["refused"] = str(error)
    except MemoryError:
        report["refused"] = f"it needs more than {int(memory) // 2**20} MiB of memory; allow more with --memory-mb"
    except ImportError as error:
        report["refused"] = f"it needs the package {_line(str(error.name))}, which is not installed here"
    except Exception as error:  # whatever the model's code and the converter raise is an answer
        report["refused"] = f"{type(error).__name__}: {_line(str(error))}"
    (folder / "report.json").write_text(json.dumps(report))
    return 0


def _leave_network() -> bool:
    """Whether this process is now alone in a network without interfaces."""
    libc = ctypes.CDLL(None, use_errno=True)
    return any(libc.unshare(flags) == 0 for flags in (_CLONE_NEWNET, _CLONE_NEWUSER | _CLONE_NEWNET))


def _bound(memory: int, cpu_s: int) -> None:
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (bound, bound))


def _convert(source: Path, folder: Path, features: int) -> dict[str, Any]:
    import joblib  # noqa: PLC0415  # only here, and after the bounds stand

    model = joblib.load(source)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    known = sys.modules.get("sklearn.base")  # a model of scikit-learn has imported it
    if known is None or not isinstance(model, known.BaseEstimator):
        raise _Refused(f"it holds a {_line(kind)}, not a scikit-learn model; export it with its own tools")
    import skl2onnx  # noqa: PLC0415
    from skl2onnx.common.data_types import FloatTensorType  # noqa: PLC0415
    from sklearn.base import is_classifier  # noqa: PLC0415

    width = features or int(getattr(model, "n_features_in_", 0))
    if width < 1:
        raise _Refused("the model does not say how many features it takes; give --features N")
    options = {id(model): {"zipmap": False}} if is_classifier(model) else None
    inputs = [("input", FloatTensorType([None, width]))]
    converted = skl2onnx.convert_sklearn(model, initial_types=inputs, options=options, target_opset=OPSET)
    content = converted.SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    return {
        "model": kind,
        "features": width,
        "versions": {
            **{name: metadata.version(name) for name in ("scikit-learn", "skl2onnx", "onnx", "onnxruntime", "numpy")},
            "python": platform.python_version(),
        },
        "check": _check(model, content, width),
    }


def _check(model: Any, content: bytes, width: int) -> dict[str, Any]:
    """Answers of both on the same random rows. Numbers are compared by |a − b| / max(1, |a|)."""
    rows = _rows(model, width)
    answers = _answers(content, rows)
    compared: dict[str, Any] = {}
    for name, method in (("label", "predict"), ("probabilities", "predict_proba"), ("output", "transform")):
        function = getattr(model, method, None)
        if function is None or (name == "output" and compared):
            continue
        expected = np.asarray(function(rows))
        place = len(compared)
        if place >= len(answers):
            break
        compared[method] = _difference(expected, answers[place])
    if not compared:
        raise _Refused("the model has no predict and no transform, so nothing can be compared")
    return {"rows": len(rows), "seed": SEED, "compared": compared}


def _rows(model: Any, width: int) -> np.ndarray[Any, Any]:
    """Half of them of unit variance, half spread over decades, all single precision: what ONNX is going to be given."""
    rng = np.random.default_rng(SEED)
    narrow = rng.standard_normal((ROWS // 2, width))
    wide = rng.standard_normal((ROWS // 2, width)) * 10.0 ** rng.integers(-2, 3, (ROWS // 2, width))
    return np.concatenate([narrow, wide]).astype(np.float32)


def _answers(content: bytes, rows: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    session = Session(content, 1)
    feeds = session.feeds([(0, rows.shape, rows.data.cast("B"))])
    places = tuple(range(len(session.signature.outputs)))
    found = []
    for output in session.collect(places, session.run(feeds, session.output_names(places))):
        if output.datatype.kind == "bytes":
            texts = [bytes(text).decode() for text in unpack_bytes(memoryview(output.data))]
            found.append(np.array(texts, object).reshape(output.shape))
        else:
            found.append(np.frombuffer(output.data, output.datatype.numpy).reshape(output.shape))
    return found


def _difference(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> dict[str, Any]:
    if expected.dtype.kind not in "fiub":
        same = int(np.sum(expected.reshape(-1).astype(str) == got.reshape(-1).astype(str)))
        return {"equal": same, "of": int(expected.size)}
    if expected.dtype.kind != "f":
        return {"equal": int(np.sum(expected.reshape(-1) == got.reshape(-1))), "of": int(expected.size)}
    wanted, given = expected.reshape(-1).astype(float), got.reshape(-1).astype(float)
    if wanted.shape != given.shape:
        raise _Refused(f"the converted model answers {got.shape} where the original answers {expected.shape}")
    largest = float(np.max(np.abs(wanted - given) / np.maximum(1.0, np.abs(wanted)), initial=0.0))
    return {"largest_difference": largest if np.isfinite(largest) else 1e308}


def _is_worth_telling(warning: warnings.WarningMessage) -> bool:
    return "InconsistentVersion" in warning.category.__name__ or issubclass(warning.category, UserWarning)


def _line(text: str) -> str:
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line[:500]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
