"""The server under examination: how to ask it, which model is asked, and a request that this model answers."""

from __future__ import annotations

import http.client
import json
import math
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Final, Self
from urllib.parse import quote, urlsplit

import grpc
import numpy as np
import numpy.typing as npt

NUMPY: Final = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "FP16": np.float16, "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip
DATATYPES: Final = (*NUMPY, "BYTES")
"""Those of the protocol; BF16 is Triton's."""
TRIED_SIZES: Final = (1, 2, 3, 4, 8, 16, 28, 64)
"""What a variable dimension is given until the model answers."""


class Unexaminable(Exception):
    """The server cannot be reached, or has no model that answers; the text says what to do."""


@dataclass(frozen=True)
class Answer:
    """One HTTP answer; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> str:
        """Text of an error answer; raises if it has none."""
        text = self.json()["error"]
        if not isinstance(text, str) or not text:
            raise ValueError(f"'error' is {text!r} where a text was due")
        return text


@dataclass
class Subject:
    """Use as a context manager."""

    url: str
    grpc_address: str | None = None
    wanted_model: str | None = None
    timeout_s: float = 30.0
    model: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    extensions: tuple[str, ...] = ()
    sample: dict[str, Any] = field(default_factory=dict)
    """A request of one row, as JSON, that the model answered with 200."""
    answer: dict[str, Any] = field(default_factory=dict)
    """... and that answer."""
    channel: grpc.Channel | None = None

    def __enter__(self) -> Self:
        if self.grpc_address:
            options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
            self.channel = grpc.insecure_channel(self.grpc_address, options=options)
        return self

    def __exit__(self, *_: object) -> None:
        if self.channel is not None:
            self.channel.close()

    # -- asking --------------------------------------------------------------------------------------------------

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        """One request on a connection of its own. `path` begins with /v2."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "127.0.0.1", parts.port, timeout=self.timeout_s)
        try:
            connection.request(method, parts.path.rstrip("/") + path, body, headers or {})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.ask("GET", path)

    def post(self, path: str, document: Any = None, headers: dict[str, str] | None = None) -> Answer:
        body = b"" if document is None else json.dumps(document).encode()
        return self.ask("POST", path, body, {"Content-Type": "application/json", **(headers or {})})

    def infer(self, document: Any, headers: dict[str, str] | None = None) -> Answer:
        return self.post(f"{self.model_path}/infer", document, headers)

    @property
    def model_path(self) -> str:
        return f"/v2/models/{quote(self.model, safe='')}"

    def without(self, *keys: str) -> dict[str, Any]:
        """A copy of the sample, down to its tensors, without these keys of the request."""
        copy: dict[str, Any] = json.loads(json.dumps(self.sample))
        return {key: value for key, value in copy.items() if key not in keys}

    def offers(self, extension: str) -> bool:
        return extension in self.extensions

    # -- finding a model that answers ----------------------------------------------------------------------------

    def prepare(self) -> None:
        """Find the model to ask, and a request it answers.

        Raises:
            Unexaminable: there is none.
        """
        try:
            known = self.get("/v2")
            if known.status == 200:
                self.extensions = tuple(known.json().get("extensions") or ())
        except (OSError, http.client.HTTPException) as error:
            raise Unexaminable(f"{self.url} cannot be asked: {error}") from error
        except (ValueError, AttributeError):
            self.extensions = ()  # a check of its own says so
        tried = []
        for name in [self.wanted_model] if self.wanted_model else self._models():
            why = self._adopt(name)
            if why is None:
                return
            tried.append(f"{name}: {why}")
        hint = "; ".join(tried) or "it lists no models"
        raise Unexaminable(f"no model answers a request made from its metadata ({hint}); name one with --model")

    def _models(self) -> list[str]:
        listed = self.get("/v2/models")
        if listed.status == 200:
            try:
                return [name for name in listed.json()["models"] if isinstance(name, str)]
            except (ValueError, KeyError, TypeError):
                pass
        index = self.post("/v2/repository/index", {})
        if index.status == 200:
            return sorted({entry["name"] for entry in index.json() if entry.get("state", "READY") == "READY"})
        return []

    def _adopt(self, name: str) -> str | None:
        """None: this model answers; otherwise why it cannot be used."""
        self.model = name
        found = self.get(self.model_path)
        if found.status != 200:
            return f"its metadata is answered with {found.status}"
        self.metadata = found.json()
        inputs = self.metadata.get("inputs") or []
        if not inputs:
            return "its metadata names no inputs"
        if any(tensor.get("datatype") not in DATATYPES or tensor["datatype"] == "FP16" for tensor in inputs):
            return "it has inputs that JSON cannot carry"
        variable = sum(dim == -1 for tensor in inputs for dim in tensor["shape"][1:])
        last = "it was not asked"
        for sizes in product(TRIED_SIZES, repeat=min(variable, 1)):
            request = {"inputs": [_tensor(tensor, sizes[0] if sizes else 1) for tensor in inputs]}
            answer = self.infer(request)
            if answer.status == 200:
                self.sample, self.answer = request, answer.json()
                return None
            last = f"answers {answer.status} {answer.body[:120]!r}"
        return last


def shape_of(tensor: dict[str, Any], size: int) -> list[int]:
    """One row: the first dimension is 1 where it is variable, other variable ones are `size`."""
    dims = [int(dim) for dim in tensor["shape"]]
    return [(1 if place == 0 else size) if dim == -1 else dim for place, dim in enumerate(dims)]


def _tensor(tensor: dict[str, Any], size: int) -> dict[str, Any]:
    shape = shape_of(tensor, size)
    data = values(tensor["datatype"], math.prod(shape))
    return {"name": tensor["name"], "shape": shape, "datatype": tensor["datatype"], "data": data}


def values(datatype: str, count: int) -> list[Any]:
    """Harmless elements of a datatype: small, not all alike."""
    if datatype == "BYTES":
        return [f"text {n}" for n in range(count)]
    if datatype == "BOOL":
        return [n % 2 == 0 for n in range(count)]
    if datatype in ("FP32", "FP64"):
        return [(n % 7) / 4 for n in range(count)]
    return [n % 2 for n in range(count)]


def raw(tensor: dict[str, Any]) -> bytes:
    """A JSON tensor's elements in the protocol's binary form."""
    if tensor["datatype"] == "BYTES":
        texts = [text.encode() for text in tensor["data"]]
        return b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    return np.array(tensor["data"], NUMPY[tensor["datatype"]]).tobytes()


def decoded(datatype: str, data: bytes) -> list[Any]:
    """The binary form's elements."""
    if datatype != "BYTES":
        numbers: npt.NDArray[Any] = np.frombuffer(data, NUMPY[datatype])
        return list(numbers.tolist())
    elements, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        elements.append(data[at + 4 : at + 4 + size].decode("utf-8", "replace"))
        at += 4 + size
    return elements


def same(left: list[Any], right: list[Any]) -> bool:
    """Equal elements; numbers within what float32 and its printed form allow."""
    if len(left) != len(right):
        return False
    for a, b in zip(left, right, strict=True):
        if isinstance(a, float) or isinstance(b, float):
            if not (math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5) or (math.isnan(a) and math.isnan(b))):
                return False
        elif a != b:
            return False
    return True


def flat(data: Any) -> list[Any]:
    """Nested lists, flattened in order."""
    return [leaf for item in data for leaf in flat(item)] if isinstance(data, list) else [data]
