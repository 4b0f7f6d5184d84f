"""The compiled messages are those of the sources, and the sources those that clients were generated from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tritonclient.grpc import model_config_pb2, service_pb2

from gateway.protocol import schema
from gateway.protocol.schema import compile as compiler


def test_the_compiled_descriptors_are_those_of_the_sources() -> None:
    # Compared as messages: compilers may differ in the order of what they write.
    fresh = descriptor_pb2.FileDescriptorSet.FromString(compiler.compiled())
    assert {file.name: file for file in fresh.file} == {file.name: file for file in schema.files()}


def _messages(container: Any) -> Iterator[Any]:
    for message in container:
        yield message
        yield from _messages(message.nested_types)


def _fields(message: Any) -> set[tuple[object, ...]]:
    return {
        (
            field.name,
            field.number,
            field.type,
            field.is_repeated,
            field.message_type.full_name if field.message_type is not None else None,
            field.containing_oneof.name if field.containing_oneof is not None else None,
        )
        for field in message.fields
    }


_CLIENTS = [
    message
    for file in (service_pb2, model_config_pb2, health_pb2, reflection_pb2)
    for message in _messages(file.DESCRIPTOR.message_types_by_name.values())
]


@pytest.mark.parametrize("theirs", _CLIENTS, ids=lambda message: message.full_name)
def test_every_message_is_the_one_that_clients_know(theirs: Any) -> None:
    ours = schema.pool().FindMessageTypeByName(theirs.full_name)
    assert _fields(ours) == _fields(theirs)


@pytest.mark.parametrize("file", [service_pb2, health_pb2, reflection_pb2], ids=lambda file: file.DESCRIPTOR.name)
def test_every_service_is_the_one_that_clients_know(file: Any) -> None:
    for theirs in file.DESCRIPTOR.services_by_name.values():
        ours = schema.pool().FindServiceByName(theirs.full_name)
        assert {(m.name, m.input_type.full_name, m.output_type.full_name) for m in ours.methods} == {
            (m.name, m.input_type.full_name, m.output_type.full_name) for m in theirs.methods
        }


def test_messages_do_not_collide_with_those_of_a_client_in_the_same_process() -> None:
    ours = schema.message("inference.ModelInferRequest")(model_name="m")
    theirs = service_pb2.ModelInferRequest.FromString(ours.SerializeToString())
    assert theirs.model_name == "m"
    assert type(ours) is not type(theirs)


def test_a_symbol_leads_to_its_file() -> None:
    assert schema.file_of_symbol("inference.GRPCInferenceService").name == "inference.proto"
    assert schema.file_of_symbol("inference.ModelConfig").name == "model_config.proto"
    with pytest.raises(KeyError):
        schema.file_of_symbol("inference.Nothing")
