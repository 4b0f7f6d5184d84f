"""Compiles the `.proto` files beside this one into `descriptors.binpb`: `python -m gateway.protocol.schema.compile`.

The result is kept with the sources, so that nobody who installs the gateway needs a protobuf compiler; a test says
when it is out of date. Needs the package grpcio-tools.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

FOLDER = Path(__file__).parent
COMPILED = FOLDER / "descriptors.binpb"


def compiled() -> bytes:
    """A serialised `google.protobuf.FileDescriptorSet` of all sources, in the order of their names.

    Raises:
        RuntimeError: a source is not valid.
    """
    sources = sorted(path.name for path in FOLDER.glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "descriptors"
        if protoc.main(["protoc", f"-I{FOLDER}", f"--descriptor_set_out={result}", "--include_imports", *sources]):
            raise RuntimeError("the .proto files are not valid; protoc has said where")
        return result.read_bytes()


if __name__ == "__main__":
    COMPILED.write_bytes(compiled())
    sys.stdout.write(f"wrote {COMPILED}\n")
