"""What a request must be answered with: onnxruntime run on that request alone, in the test's own process."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

from tests.live.oip_wire import Answer, Array, Request, decode

DATATYPE = {
    "tensor(bool)": "BOOL",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
    "tensor(bfloat16)": "BF16",
    **{f"tensor({sign}int{bits})": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


class Alone:
    """One model in onnxruntime. BF16 is not numpy's: such models must be identities, and are not run."""

    def __init__(self, data: bytes | str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self.outputs = {output.name: DATATYPE[output.type] for output in self._session.get_outputs()}

    def run(self, request: Request) -> dict[str, Array]:
        """Every output for the request's inputs. BYTES are Python bytes."""
        if "BF16" in self.outputs.values():
            (only,) = request.inputs
            return dict.fromkeys(self.outputs, only.array)
        feed = {tensor.name: _to_onnx(tensor.array) for tensor in request.inputs}
        results = self._session.run(list(self.outputs), feed)
        return {name: _from_onnx(result) for name, result in zip(self.outputs, results, strict=True)}


def _to_onnx(array: Array) -> Array:
    if array.dtype != object:
        return array
    return np.array([element.decode() for element in array.ravel()], object).reshape(array.shape)


def _from_onnx(result: Any) -> Array:
    array = np.asarray(result)
    if array.dtype.kind not in "OU":
        return array
    return np.array([element.encode() for element in array.ravel()], object).reshape(array.shape)


class Wrong(AssertionError):
    """An answer that is not the answer to its request."""


def check(request: Request, answer: Answer, alone: Alone, tolerance: float = 0.0) -> None:
    """Raise `Wrong` unless the answer is the request's own, in values, names, order, datatypes, shapes and encodings.

    `tolerance`: allowed difference of floats as a share of the largest magnitude; 0 asks for equal bits.
    """
    if answer.status != 200:
        raise Wrong(f"{request.model}: status {answer.status}: {answer.body[:300]!r}")
    document = answer.document()
    if (document.get("id") or None) != (request.request_id or None):
        raise Wrong(f"id {document.get('id')!r} for request {request.request_id!r}")
    if document["model_name"] != request.model or "parameters" in document:
        raise Wrong(f"not the answer of {request.model}: {str(document)[:300]}")
    expected = alone.run(request)
    wanted = dict(request.outputs or ()) or dict.fromkeys(alone.outputs, None)
    outputs = decode(answer)
    if set(outputs) != set(wanted):
        raise Wrong(f"outputs {list(outputs)} where {list(wanted)} were asked for")
    for output in document["outputs"]:
        name = output["name"]
        binary = wanted[name] if request.outputs else request.binary_output
        if bool(binary) != ("data" not in output):
            raise Wrong(f"output {name}: wrong encoding, {list(output)}")
        datatype, got = outputs[name]
        if datatype != alone.outputs[name]:
            raise Wrong(f"output {name}: datatype {datatype}")
        _compare(f"{request.model}/{request.request_id} output {name}", got, expected[name], tolerance)


def _compare(what: str, got: Array, expected: Array, tolerance: float) -> None:
    if got.shape != expected.shape:
        raise Wrong(f"{what}: shape {got.shape} instead of {expected.shape}")
    if tolerance:
        scale = float(np.abs(expected).max(initial=1.0))
        same = np.allclose(got, expected, rtol=0.0, atol=tolerance * scale)
    elif got.dtype == object:
        same = bool((got == expected).all())
    elif got.dtype.kind == "f":  # as JSON a NaN has no payload, so all NaNs are one
        same = bool(np.array_equal(got, expected, equal_nan=True) and (np.signbit(got) == np.signbit(expected)).all())
    else:
        same = got.tobytes() == expected.astype(got.dtype, copy=False).tobytes()
    if not same:
        raise Wrong(f"{what}: {str(got)[:400]} instead of {str(expected)[:400]}")
