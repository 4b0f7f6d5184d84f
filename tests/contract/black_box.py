"""What the contract tests look through: a command line, a strict reader of Structured Fields, and small models.

Rules: nothing of the gateway is imported here or in this room, so that a promise is held against what a user sees and
not against the code that makes it. Each model multiplies by a number of its own: an answer tells which version made it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import helper

from tests.live import models
from tests.live.gateway_process import GatewayProcess

UUID7: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")

_ITEM: Final = re.compile(
    r'"((?:[ !#-\[\]-~]|\\["\\])*)"|(-?\d{1,12}\.\d{1,3}|-?\d{1,15})|(\?[01])|([A-Za-z*][\w!#$%&\'*+.^`|~:/-]*)'
)
_KEY: Final = re.compile(r"; *([a-z*][a-z0-9_.*-]*)(=)?")

Bare = str | int | float | bool


def _bare(text: str, at: int) -> tuple[Bare, int]:
    found = _ITEM.match(text, at)
    assert found is not None, f"no bare item of RFC 9651 at {at} of {text!r}"
    string, number, boolean, token = found.groups()
    if string is not None:
        return re.sub(r"\\(.)", r"\1", string), found.end()
    if number is not None:
        return (float(number) if "." in number else int(number)), found.end()
    return (boolean == "?1" if boolean is not None else str(token)), found.end()


def item(text: str) -> tuple[Bare, dict[str, Bare]]:
    """An Item of RFC 9651 §3.3, all of `text`: (its value, its parameters)."""
    value, at = _bare(text, 0)
    parameters: dict[str, Bare] = {}
    while at < len(text):
        key = _KEY.match(text, at)
        assert key is not None, f"no parameter of RFC 9651 at {at} of {text!r}"
        at, parameters[key[1]] = key.end(), True
        if key[2]:
            parameters[key[1]], at = _bare(text, at)
    return value, parameters


@dataclass(frozen=True)
class Answer:
    """What a caller got over HTTP; names of headers in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def id(self) -> str:
        return self.headers["x-request-id"]

    def model(self) -> dict[str, Any]:
        """`Inference-Model` as {"name", "version", "digest", …}."""
        name, parameters = item(self.headers["inference-model"])
        return {"name": name, **parameters}

    def factor(self) -> float:
        """The number of the model that answered [1, 2]."""
        assert self.status == 200, self.body
        first, second = self.document["outputs"][0]["data"]
        assert second == 2 * first, "an answer of two models"
        return float(first)


def request(rows: int = 1, **more: Any) -> bytes:
    """An OIP request of rows [1, 2]."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 2], "data": [1.0, 2.0] * rows}
    return json.dumps({"inputs": [tensor], **more}).encode()


def ask(process: GatewayProcess, model: str, body: bytes | None = None, path: str = "", **headers: str) -> Answer:
    """One inference over HTTP; underscores in the names of headers stand for hyphens."""
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(*process.request("POST", f"/v2/models/{model}{path}/infer", body or request(), told))


def times(factor: float) -> bytes:
    """`y` = factor·x, FP32 [batch, 2]."""
    x, y = (models.value(name, "FP32", ["batch", 2]) for name in "xy")
    return models.model([helper.make_node("Mul", ["x", "w"], ["y"])], [x], [y], {"w": np.array([factor], np.float32)})


def put(root: Path, name: str, version: str, factor: float) -> Path:
    """A version directory in Triton's layout; returns it."""
    directory = root / name / version
    directory.mkdir(parents=True)
    (directory / "model.onnx").write_bytes(times(factor))
    return directory


def coreutils_digest(directory: Path) -> str:
    """The digest of a version directory, by the command that the documents give to users."""
    command = r"find . -type f -printf '%P\n' | LC_ALL=C sort | xargs -d '\n' sha256sum | sha256sum"
    done = subprocess.run(["bash", "-c", command], cwd=directory, capture_output=True, text=True, check=True)
    return f"sha256:{done.stdout.split()[0]}"


def command(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`gateway …`, ended. Whatever becomes of it, nobody is shown a traceback."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "MLFLOW_"))}
    done = subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        capture_output=True, text=True, timeout=120, check=False, env={**clean, "COLUMNS": "250", **(env or {})},
    )  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done


def operate(process: GatewayProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`gateway models …` of this gateway."""
    ports = {"--url": process.port, "--ops-url": process.operations_port}
    where = [part for option, port in ports.items() for part in (option, f"http://127.0.0.1:{port}")]
    return command("models", *arguments, *where)


def configuration(file: Path, document: dict[str, Any]) -> Path:
    """JSON is YAML."""
    file.write_text(json.dumps(document, indent=1))
    return file
