"""What a fuzz target is, and the oracle all of them share.

A target takes any bytes and either returns or raises `Finding` (or whatever escaped from the code under test, which is
a finding as well). Targets keep their decoders from one input to the next, as a server does: what one client made
the gateway remember must not change what it says to another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest
from gateway.core.tensor import element_count, unpack_bytes
from gateway.errors import GatewayError, Overloaded, RegionFailed, Unsupported
from tests.protocol.oip_samples import model, tensor_bytes, tensor_spec

CORPUS = Path(__file__).parent / "corpus"
MAX_TEXT_BYTES = 10_000
"""No refusal is longer than this, whatever the client wrote."""


class Finding(AssertionError):
    """The code under test broke a promise."""


@dataclass(frozen=True)
class Target:
    """`run` is the target; `seeds` are inputs it knows, most of them accepted; `words` are what inputs are made of."""

    name: str
    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()
    max_bytes: int = 2048

    def found(self) -> list[bytes]:
        """Inputs that once broke it, and are kept."""
        return [path.read_bytes() for path in sorted((CORPUS / self.name).glob("*"))]


def require(condition: object, what: str, *shown: object) -> None:
    if not condition:
        raise Finding(f"{what}: {' | '.join(repr(item)[:2000] for item in shown)}")


def check_refusal(error: GatewayError) -> None:
    """The caller is to blame, and is told so briefly. Full memory is the one refusal that is not its fault, and a
    region that cannot be opened has Triton's status, 500."""
    require(
        error.status < 500 or isinstance(error, Unsupported | Overloaded | RegionFailed),
        "a client's fault is a 5xx",
        error,
    )
    text = str(error)
    require(text, "a refusal without words", type(error))
    # Lone surrogates that a text quotes are replaced where it is written to the wire.
    require(len(text.encode("utf-8", "replace")) < MAX_TEXT_BYTES, "a refusal that is too long", text[:200])


Tensors = dict[str, tuple[tuple[int, ...], bytes]]
Outcome = tuple[object, ...]
"""What a request came to: its tensors and options, or ("refused", status)."""


def outcome(decode: Callable[[], InferRequest], spec: ModelSpec) -> Outcome:
    """Decode and check the books."""
    try:
        request = decode()
    except GatewayError as error:
        check_refusal(error)
        return ("refused", error.status)
    form = getattr(request.form, "response", request.form)
    return (
        tuple(sorted(checked(spec, request).items())),
        request.rows,
        request.key,
        request.outputs,
        request.request_id,
        (form.outputs, form.binary, form.classes),
        (request.stated_timeout_s, request.priority, request.sequence),
    )


def checked(spec: ModelSpec, request: InferRequest) -> Tensors:
    """The tensors of a decoded request, which must be what their shapes say."""
    require(len(request.inputs) == len(spec.inputs), "inputs are missing", request.inputs)
    read: Tensors = {}
    for place, tensor in zip(spec.inputs, request.inputs, strict=True):
        if tensor is None:
            require(place.optional, "a required input is absent", place.name)
            continue
        require(tensor.datatype is place.datatype, "another datatype", tensor.datatype)
        require((tensor.values is None) != (tensor.buffer is None), "not one of values and buffer", place.name)
        elements = element_count(tensor.shape)
        data = tensor_bytes(tensor)
        if place.datatype.kind == "bytes":
            texts = unpack_bytes(data)
            require(len(texts) == elements, "another number of strings", len(texts), tensor.shape)
            for text in texts:
                text.decode()
        else:
            require(len(data) == elements * place.datatype.itemsize, "another size", len(data), tensor.shape)
        if place.datatype.kind == "bool":
            require(set(data) <= {0, 1}, "a BOOL that is neither 0 nor 1", data)
        if spec.batched:
            require(tensor.shape[0] == request.rows, "rows differ", tensor.shape, request.rows)
            dims = tensor.shape[1:]
        else:
            dims = tensor.shape
        require(
            len(dims) == len(place.dims) and all(want in (-1, got) for want, got in zip(place.dims, dims, strict=True)),
            "a shape that does not fit the model",
            tensor.shape,
        )
        read[place.name] = (tensor.shape, data)
    require(request.nbytes == sum(len(data) for _, data in read.values()), "nbytes is wrong", request.nbytes)
    require(1 <= request.rows <= spec.policy.max_batch_size or not spec.batched, "rows out of range", request.rows)
    if request.request_id is not None:
        request.request_id.encode()
    return read


SPECS: tuple[ModelSpec, ...] = (
    model([tensor_spec("X")]),
    model([tensor_spec("X", "INT8", (2,)), tensor_spec("Z", "UINT64", (-1, 2))]),
    model([tensor_spec("X", "BYTES")]),
    model([tensor_spec("X", "BOOL"), tensor_spec("B", "FP16", optional=True)]),
    model([tensor_spec("X"), tensor_spec("B", "BYTES", optional=True), tensor_spec("I", "INT64", optional=True)]),
    model([tensor_spec("X", "FP64", ())], max_batch_size=0),
    model([tensor_spec("X", "INT64", (1,)), tensor_spec("Z", "INT64", (-1,))]),
    model([tensor_spec("X", "FP16")]),
)
"""The models that requests are made for; an input's first byte chooses."""


def chosen(first: int) -> int:
    return first % len(SPECS)


def cut_up(data: bytes, seed: int) -> list[bytes]:
    """The same bytes in pieces of one length, `seed` (0: one piece)."""
    step = seed or max(len(data), 1)
    return [data[at : at + step] for at in range(0, len(data), step)]
