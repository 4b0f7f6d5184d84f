"""Protobuf messages of the protocols spoken here, from the `.proto` files beside this module.

They live in a pool of their own: other packages in the same process (clients of the same protocol) register messages
of the same names in protobuf's default pool, which takes each name once.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

__all__ = ["DecodeError", "file_of_symbol", "files", "message", "pool", "services"]


@cache
def files() -> tuple[descriptor_pb2.FileDescriptorProto, ...]:
    """Every source file, each behind those that it imports."""
    data = Path(__file__).with_name("descriptors.binpb").read_bytes()
    return tuple(descriptor_pb2.FileDescriptorSet.FromString(data).file)


@cache
def pool() -> DescriptorPool:
    found = DescriptorPool()
    for file in files():
        found.AddSerializedFile(file.SerializeToString())  # type: ignore[attr-defined,unused-ignore]
    return found


@cache
def message(full_name: str) -> Any:
    """The class of a message, for instance `message("inference.ModelInferRequest")`. Raises KeyError: no such one."""
    return GetMessageClass(pool().FindMessageTypeByName(full_name))


def services() -> tuple[str, ...]:
    """Full names of all services, in the order of the files."""
    return tuple(f"{file.package}.{service.name}" for file in files() for service in file.service)


def file_of_symbol(symbol: str) -> descriptor_pb2.FileDescriptorProto:
    """The source file that defines a message, enum, service, method or field. Raises KeyError: none does."""
    name = pool().FindFileContainingSymbol(symbol).name
    return next(file for file in files() if file.name == name)
