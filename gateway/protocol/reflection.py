"""gRPC server reflection (v1, v1alpha): which services there are, and the files that describe them.

One request, one answer, of messages that are the same in both versions but for the package. Extensions do not exist in
the files served here. Unknown names are answered with an error inside the answer; the stream goes on.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.descriptor_pb2 import FileDescriptorProto

from gateway.protocol import schema
from gateway.protocol.oip_grpc_documents import read

SERVICES: Final = {
    "grpc.reflection.v1.ServerReflection": "grpc.reflection.v1",
    "grpc.reflection.v1alpha.ServerReflection": "grpc.reflection.v1alpha",
}
"""Service → package of its messages."""
_NOT_FOUND: Final = 5
_INVALID_ARGUMENT: Final = 3


def answer(package: str, data: bytes | memoryview) -> bytes:
    """The answer to one ServerReflectionRequest.

    Raises:
        InvalidRequest: the bytes are none.
    """
    request = read(f"{package}.ServerReflectionRequest", data)
    response = schema.message(f"{package}.ServerReflectionResponse")(valid_host=request.host, original_request=request)
    match request.WhichOneof("message_request"):
        case "list_services":
            for name in schema.services():
                response.list_services_response.service.add(name=name)
        case "file_by_filename":
            found = next((file for file in schema.files() if file.name == request.file_by_filename), None)
            _put_file(response, found, f"there is no file '{request.file_by_filename[:128]}'")
        case "file_containing_symbol":
            symbol = request.file_containing_symbol
            _put_file(response, _file_of(symbol), f"no file defines '{symbol[:128]}'")
        case "file_containing_extension":
            _put_error(response, _NOT_FOUND, "no file defines extensions")
        case "all_extension_numbers_of_type":
            name = request.all_extension_numbers_of_type
            if _file_of(name) is None:
                _put_error(response, _NOT_FOUND, f"no file defines '{name[:128]}'")
            else:
                response.all_extension_numbers_response.base_type_name = name
        case _:
            _put_error(response, _INVALID_ARGUMENT, "the request asks for nothing this server knows")
    written: bytes = response.SerializeToString()
    return written


def _file_of(symbol: str) -> FileDescriptorProto | None:
    name = symbol.removeprefix(".")
    service, _, method = name.rpartition(".")
    try:
        if service in schema.services():  # the pool does not look inside services
            schema.pool().FindServiceByName(service).FindMethodByName(method)
            name = service
        return schema.file_of_symbol(name)
    except KeyError:
        return None


def _put_file(response: Any, file: FileDescriptorProto | None, otherwise: str) -> None:
    if file is None:
        _put_error(response, _NOT_FOUND, otherwise)
        return
    files = {one.name: one for one in schema.files()}
    wanted = [file.name]
    for name in wanted:  # grows while it is walked: a file comes with all that it imports
        wanted += [imported for imported in files[name].dependency if imported not in wanted]
    for name in wanted:
        response.file_descriptor_response.file_descriptor_proto.append(files[name].SerializeToString())


def _put_error(response: Any, code: int, text: str) -> None:
    response.error_response.error_code = code
    response.error_response.error_message = text
