"""What the tests of the gRPC codec share: requests as the protobuf library writes them."""

from __future__ import annotations

from typing import Any

from gateway.core.client_memory import NO_CLIENT_MEMORY, ClientMemory
from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest
from gateway.protocol import schema
from gateway.protocol.oip_grpc_cut import Openings
from gateway.protocol.oip_grpc_request import RequestReader

REQUEST = schema.message("inference.ModelInferRequest")
RESPONSE = schema.message("inference.ModelInferResponse")

Value = bool | int | str | float


def put_parameters(target: Any, parameters: dict[str, Value | tuple[str, Value]] | None) -> None:
    """A value alone goes where its Python type belongs; (kind, value) says where; ("", …) leaves it empty."""
    for name, value in (parameters or {}).items():
        kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
        kind, plain = value if isinstance(value, tuple) else (kinds[type(value)], value)
        if kind:
            setattr(target[name], kind, plain)
        else:
            target[name].SetInParent()


def infer_request(
    *inputs: tuple[str, str, list[int], bytes | dict[str, list[Any]] | None],
    model: str = "m",
    version: str = "",
    request_id: str = "",
    outputs: list[Any] | None = None,
    parameters: dict[str, Any] | None = None,
    extra_raw: list[bytes] | None = None,
) -> Any:
    """Inputs as (name, datatype, shape, content): bytes go raw, a dict is `contents`, None is nothing. An output is a
    name, or (name, parameters)."""
    message = REQUEST(model_name=model, model_version=version, id=request_id)
    put_parameters(message.parameters, parameters)
    for name, datatype, shape, content in inputs:
        tensor = message.inputs.add(name=name, datatype=datatype, shape=shape)
        if isinstance(content, bytes):
            message.raw_input_contents.append(content)
        elif content is not None:
            tensor.contents.SetInParent()
            for field, values in content.items():
                getattr(tensor.contents, field).extend(values)
    for output in outputs or []:
        name, its = output if isinstance(output, tuple) else (output, None)
        put_parameters(message.outputs.add(name=name).parameters, its)
    message.raw_input_contents.extend(extra_raw or [])
    return message


class Codec:
    """Both halves of reading, for one model; keeps what it has seen, as a server does."""

    def __init__(self, spec: ModelSpec, memory: ClientMemory = NO_CLIENT_MEMORY) -> None:
        self.openings = Openings()
        self.reader = RequestReader(spec, memory)

    def read(self, message: Any) -> InferRequest:
        data = message if isinstance(message, bytes | memoryview) else message.SerializeToString(deterministic=True)
        return self.reader.read(self.openings.cut(data))


def read(spec: ModelSpec, message: Any) -> InferRequest:
    return Codec(spec).read(message)
