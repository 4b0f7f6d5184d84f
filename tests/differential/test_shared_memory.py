"""System shared memory, on in both servers: registration, tensors in and out of regions, and what must be refused.

Each server has blocks of its own, filled alike; afterwards every block of the two holds the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from tests.differential.allowed import ALLOWED, Allowed
from tests.differential.build import SIMPLE, add, ask, blob, call, infer, request, tensor
from tests.differential.campaign import Setting, both
from tests.differential.compare import Difference, differences
from tests.differential.exchange import Asker, Grpc, Http, Reply, Step
from tests.differential.zoo import ADD_SUB as SUMS
from tests.differential.zoo import BATCHING, M, Twin, add_sub, copy

pytestmark = pytest.mark.slow

SIZE = 8192
PART = 4096
"""Where the second block's region begins: Triton maps whole pages."""
FLOATS, TEXTS = blob("FP32", [1, 2.5, -3]), blob("BYTES", [b"ab", b""])
TWO = [("INPUT0", "INT32", [-1]), ("INPUT1", "INT32", [-1])]
RESULTS = [("OUTPUT0", "INT32", [-1]), ("OUTPUT1", "INT32", [-1])]
SETTING = Setting(
    [
        M,
        copy("id_bytes", "BYTES"),
        Twin(
            "add_sub", {1: add_sub()}, TWO, [("OUTPUT0", "INT32", [-1]), ("OUTPUT1", "INT32", [-1])], 8, SUMS, BATCHING
        ),
    ],
    server={"client_shared_memory": True},
)


def region(name: str, verb: str = "register", **body: Any) -> Http:

    path = f"/v2/systemsharedmemory/region/{name}/{verb}"
    return Http("POST", path, json.dumps(body).encode()) if body else Http("POST", path, b"")


def area(name: str, size: int, offset: int | None = None) -> dict[str, Any]:
    place = {"shared_memory_region": name, "shared_memory_byte_size": size}
    return place if offset is None else {**place, "shared_memory_offset": offset}


def reads(*place: Any, **more: Any) -> Http:
    return infer(ask(tensor(parameters=area(*place), **more)))


def writes(*place: Any, item: Any = SIMPLE, model: str = "m", **more: Any) -> Http:
    wanted = {"name": "OUTPUT0", "parameters": {**area(*place), **more}}
    return infer(ask(item, outputs=[wanted]), model)


def steps(key: str, other: str) -> Iterator[tuple[str, Step]]:
    """The series, for the server whose blocks are `/key` and `/other`."""
    status = Http("GET", "/v2/systemsharedmemory/status")
    yield "status empty", status
    yield "no key", region("r", byte_size=SIZE)
    yield "no size", region("r", key=f"/{key}")
    yield "absent", region("r", key="/no-such-block-anywhere", byte_size=8)
    yield "too large", region("r", key=f"/{key}", byte_size=SIZE * 100)
    yield "offset too large", region("r", key=f"/{key}", byte_size=SIZE, offset=1 << 20)
    yield "slashes only", region("r", key="//", byte_size=8)
    yield "reserved", region("r", key="/triton_python_backend_shm_region_x", byte_size=8)
    yield "key is a number", region("r", key=5, byte_size=8)
    yield "size is a text", region("r", key=f"/{key}", byte_size="8")
    yield "size is negative", region("r", key=f"/{key}", byte_size=-8)
    yield "register", region("r", key=f"/{key}", byte_size=SIZE)
    yield "register twice", region("r", key=f"/{key}", byte_size=SIZE)
    yield "register another part", region("part", key=f"/{other}", byte_size=32, offset=PART)
    yield "register a block again, within a page", region("odd", key=f"/{key}", byte_size=32, offset=64)
    yield "status of nobody", Http("GET", "/v2/systemsharedmemory/region/nobody/status")
    yield "read", reads("r", 12)
    yield "read at an offset", reads("r", 12, 64)
    yield "read the part", reads("part", 12)
    yield "read, offset at the end", reads("part", 12, 32)
    yield "read beyond the end", reads("part", 12, 24)
    yield "read too little", reads("r", 8)
    yield "read too much", reads("r", 16)
    yield "read nobody's", reads("nobody", 12)
    yield "read with data", reads("r", 12, data=[1, 2, 3])
    yield "region is a number", infer(ask(tensor(parameters={**area("r", 12), "shared_memory_region": 5})))
    yield "without a size", infer(ask(tensor(parameters={"shared_memory_region": "r"})))
    yield "size is a text too", infer(ask(tensor(parameters={**area("r", 12), "shared_memory_byte_size": "12"})))
    yield "write", writes("r", 12, 128)
    yield "write with room", writes("r", 64, 144)
    yield "write too little", writes("r", 8, 128)
    yield "write beyond the end", writes("r", 12, SIZE - 8)
    yield "write to nobody", writes("nobody", 12)
    yield "write and binary_data", writes("r", 12, 128, binary_data=True)
    yield "write and classification", writes("r", 12, 128, classification=1)
    yield (
        "strings in",
        infer(ask(tensor(shape=(1, 2), datatype="BYTES", parameters=area("r", len(TEXTS), 96))), "id_bytes"),
    )
    texts = tensor(shape=(1, 2), datatype="BYTES", data=["cd", "e"])
    yield "strings out", writes("r", 32, 192, item=texts, model="id_bytes")
    two = [tensor(f"INPUT{n}", (1, 2), "INT32", data=[n, 5]) for n in (0, 1)]
    outputs = [{"name": "OUTPUT0", "parameters": area("r", 8, 232)}, {"name": "OUTPUT1"}]
    yield "one of two outputs", infer(ask(*two, outputs=outputs), "add_sub")
    yield from grpc_steps(key)
    yield "unregister the odd one", region("odd", "unregister")
    yield "unregister", region("part", "unregister")
    yield "unregister again", region("part", "unregister")
    yield "read the part no more", reads("part", 12)
    yield "unregister all", Http("POST", "/v2/systemsharedmemory/unregister", b"")
    yield "status empty again", status


def grpc_steps(key: str) -> Iterator[tuple[str, Grpc]]:
    again = pb.SystemSharedMemoryRegisterRequest(name="r", key=f"/{key}", byte_size=SIZE)
    yield "gRPC register twice", call(again, "SystemSharedMemoryRegister")
    nobody = pb.SystemSharedMemoryStatusRequest(name="nobody")
    yield "gRPC status of nobody", call(nobody, "SystemSharedMemoryStatus")

    def placed(parameters: Any, name: Any, size: Any, offset: Any = 0) -> None:
        parameters["shared_memory_region"].string_param = name
        parameters["shared_memory_byte_size"].int64_param = size
        if offset:
            parameters["shared_memory_offset"].int64_param = offset

    for what, place in {
        "read": ("r", 12),
        "read nobody's": ("nobody", 12),
        "read beyond the end": ("part", 12, 24),
    }.items():
        message = add(request())
        placed(message.inputs[0].parameters, *place)
        yield f"gRPC {what}", call(message)
    message = add(request(raw=[FLOATS]))
    placed(message.inputs[0].parameters, "r", 12)
    yield "gRPC read with raw", call(message)
    for what, place in {"write": ("r", 12, 128), "write too little": ("r", 8, 128)}.items():
        message = add(request(raw=[FLOATS]))
        placed(message.outputs.add(name="OUTPUT0").parameters, *place)
        yield f"gRPC {what}", call(message)
    two = request("add_sub", raw=[blob("INT32", [7, 8])])
    add(add(two, "INPUT0", (1, 2), "INT32"), "INPUT1", (1, 2), "INT32")
    placed(two.inputs[0].parameters, "r", 8, 64)
    yield "gRPC the first in memory, the second raw", call(two)


class Answers:
    """Both servers' answers by step, and what their blocks hold in the end."""

    def __init__(self) -> None:
        self.replies: dict[str, tuple[Step, list[Reply]]] = {}
        self.blocks: list[bytes] = []

    def ask(self, asker: Asker) -> None:
        block, other = SharedMemory(create=True, size=SIZE), SharedMemory(create=True, size=SIZE)
        try:
            assert block.buf is not None
            assert other.buf is not None
            block.buf[:12], block.buf[64:76], block.buf[96 : 96 + len(TEXTS)] = FLOATS, FLOATS[::-1], TEXTS
            other.buf[PART : PART + 12] = FLOATS
            for name, step in steps(block.name.lstrip("/"), other.name.lstrip("/")):
                self.replies.setdefault(name, (step, []))[1].append(asker.ask(step))
            self.blocks.append(bytes(block.buf) + bytes(other.buf))
        finally:
            for each in (block, other):
                each.close()
                each.unlink()


NAMES: Sequence[str] = [name for name, _ in steps("key", "other")]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    found = Answers()
    with both(tmp_path_factory.mktemp("shm"), SETTING) as (real, ours):
        for server in (real, ours):
            asker = Asker(server.port, server.grpc_port)
            found.ask(asker)
            asker.close()
    return found


def explained(found: Difference) -> bool:
    return any(entry.covers(found) for entry in ALLOWED)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_equal_or_their_difference_is_explained(answers: Answers, name: str) -> None:
    step, (theirs, ours) = answers.replies[name]
    found = [entry for entry in differences(f"shm/{name}", step, theirs, ours) if not explained(entry)]
    assert not found, "\n".join(map(str, found))


def test_blocks_hold_the_same_bytes(answers: Answers) -> None:
    theirs, ours = answers.blocks
    assert theirs == ours
    assert ours[SIZE + PART : SIZE + PART + 12] == FLOATS
    assert ours[128:132] == FLOATS[:4]  # and some were written


ENTRIES = [entry for entry in ALLOWED if entry.cases[0].startswith("shm/")]


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.why for entry in ENTRIES])
def test_every_entry_of_the_allow_list_explains_something(answers: Answers, entry: Allowed) -> None:
    asked = answers.replies.items()
    found = [differences(f"shm/{name}", step, theirs, ours) for name, (step, (theirs, ours)) in asked]
    assert any(entry.covers(difference) for case in found for difference in case)
