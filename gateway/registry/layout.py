"""Which file of a fetched version directory is the model.

In this order: what MLflow's `MLmodel` says of its onnx flavour; `model.onnx`; the only `*.onnx` there is. Everything
else is refused with what to do about it. Nothing but `MLmodel` is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from gateway.errors import SourceError
from gateway.registry.digest import MODEL_FILE
from gateway.registry.formats import hint
from gateway.registry.mlmodel import MLMODEL, read_mlmodel

MAX_NAMES: Final = 1000
"""Names of files that are looked at for a hint."""


def model_file(directory: Path) -> str:
    """Path of the ONNX file, relative to `directory`.

    Raises:
        SourceError: there is none, or more than one that could be meant.
    """
    described = read_mlmodel(directory)
    if described is not None:
        if described.onnx_file is None:
            raise SourceError(
                f"{MLMODEL} has the flavors {', '.join(described.flavors)[:200]} and no onnx; only ONNX is served"
                f"{_advice(directory)}; log the converted model with mlflow.onnx.log_model"
            )
        if not (directory / described.onnx_file).exists():
            raise SourceError(f"{MLMODEL} names the file {described.onnx_file}, which is not there")
        return described.onnx_file
    if (directory / MODEL_FILE).exists():
        return MODEL_FILE
    found = sorted(path.name for path in directory.glob("*.onnx"))
    if len(found) == 1:
        return found[0]
    if found:
        raise SourceError(f"it holds {', '.join(found)[:200]}; call the one that is to be served {MODEL_FILE}")
    raise SourceError(f"it holds no ONNX model{_advice(directory)}")


def _advice(directory: Path) -> str:
    names = []
    for path in directory.rglob("*"):
        names.append(path.relative_to(directory).as_posix())
        if len(names) >= MAX_NAMES:
            break
    text = hint(names)
    return f"; {text}" if text else ""
