"""The promise everything rests on: whatever is batched with whatever, every caller gets the answer to its own request,
the one onnxruntime gives when it runs that request alone; none is lost, and nothing stays behind.

Mixes of concurrent requests are made up by hypothesis: models, datatypes, shapes, row counts (also more than a batch
holds), encodings, requested outputs, ids, parameters, pipelining, slow senders, callers who leave. The checker is
checked too: with one row scrambled on purpose it must complain.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from gateway.config import Config, ModelEntry, Server
from gateway.core.assembly import write_parts
from gateway.core.request import BatchInput
from gateway.provenance.headers import parse
from gateway.workers import channel
from tests.live import models
from tests.live.alone import Alone, Wrong, check
from tests.live.gateway_process import until
from tests.live.in_process import InProcess, gather_all, in_process
from tests.live.oip_wire import NEVER_JSON, NUMPY, Array, Connection, Request, Tensor, objects

MODELS = {f"id_{datatype.lower()}": models.identity(datatype) for datatype in models.ONNX_TYPE} | {
    "linear": models.linear(),
    "whole": models.whole_linear(),
    "two": models.two_inputs(),
}
MAX_ROWS = 64
"""What the gateway chooses as the size of a batch where nobody states one."""
TOLERANCE = {"linear": 1e-6}
"""Sums of floats depend on how many rows run together; everything else must be equal bit by bit."""


@pytest.fixture(scope="module")
def alone() -> dict[str, Alone]:
    return {name: Alone(data) for name, data in MODELS.items()}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    root = models.repository(tmp_path_factory.mktemp("crossing"), MODELS)
    server = Server(http_port=0, grpc_port=0, metrics_port=0, workers=2)
    with in_process(Config(server=server, models=(ModelEntry(source=str(root)),))) as running:
        yield running


# -- what callers send -----------------------------------------------------------------------------------------------


def values(datatype: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Numbers over the datatype's whole range, so that a row is hardly ever like another."""
    count = int(np.prod(shape))
    if datatype == "BYTES":
        alphabet = ["", "a", "é", "\0", '"', "日本", "%", "x" * 50]
        return objects(["".join(rng.choice(alphabet, 3)).encode() for _ in range(count)], shape)
    if datatype == "BOOL":
        return rng.integers(0, 2, shape).astype(bool)
    dtype = NUMPY[datatype]
    if datatype in {"FP32", "FP64"}:
        array = rng.standard_normal(shape).astype(dtype)
        special = rng.random(shape) < 0.05
        array[special] = rng.choice([np.nan, np.inf, -np.inf, -0.0, 1e-40], shape)[special]
        return array
    if datatype == "FP16":
        return rng.standard_normal(shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


ROWS = st.one_of(st.integers(1, 6), st.integers(1, 70), st.sampled_from([63, 64, 65, 128, 200]))
IDS = st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=12))
OWN_PARAMETERS = st.dictionaries(
    st.sampled_from(["tenant", "priority_hint", "note"]),
    st.one_of(st.integers(0, 10**6), st.booleans(), st.text(max_size=5)),
    max_size=2,
)
# Those of the protocol that change nothing here: these models know neither sequences nor levels.
KNOWN_PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "sequence_id": st.one_of(st.integers(0, 10**6), st.text(max_size=5)),
        "sequence_start": st.booleans(),
        "priority": st.integers(0, 5),
    },
)
PARAMETERS = st.builds(lambda own, known: own | known, OWN_PARAMETERS, KNOWN_PARAMETERS)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    model = draw(st.sampled_from(sorted(MODELS)))
    rows = draw(ROWS)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inputs: list[Tensor]
    names, fixed = ["y"], None
    if model == "two":
        shape = (rows, draw(st.integers(1, 4)))
        inputs = [Tensor(name, "INT32", values("INT32", shape, rng)) for name in ("a", "b")]
        names = ["sum", "product"]
        if draw(st.booleans()):
            inputs.reverse()
    elif model == "linear":
        inputs = [Tensor("x", "FP32", rng.standard_normal((rows, 16)).astype(np.float32))]
    elif model == "whole":
        inputs = [Tensor("x", "FP32", rng.integers(-99, 100, (rows, 6)).astype(np.float32))]
    else:
        datatype = model.removeprefix("id_").upper()
        inputs = [Tensor("x", datatype, values(datatype, (rows, draw(st.integers(0, 5))), rng))]
        fixed = True if datatype in NEVER_JSON else None
    for tensor in inputs:
        tensor.binary = fixed or draw(st.booleans())
    request = Request(model, inputs, request_id=draw(IDS), parameters=draw(PARAMETERS))
    if fixed or draw(st.booleans()):
        chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        request.outputs = [(name, fixed or draw(st.sampled_from([None, False, True]))) for name in chosen]
    else:
        request.binary_output = draw(st.sampled_from([None, False, True]))
    return request


@dataclass
class Caller:
    """One connection and what it does on it."""

    requests: list[Request] = field(default_factory=list)
    pipelined: bool = False
    """All requests are written before the first answer is read."""
    pieces: int = 1
    """Each request arrives in this many pieces."""
    leaves_after: int | None = None
    """It vanishes when it has read that many answers."""


CALLERS = st.builds(
    Caller,
    st.lists(requests(), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([1, 1, 1, 2, 7]),
    st.sampled_from([None, None, None, 0, 1]),
)
MIXES = st.lists(CALLERS, min_size=1, max_size=10)


# -- playing and checking --------------------------------------------------------------------------------------------


async def send(connection: Connection, data: bytes, pieces: int) -> None:
    step = -(-len(data) // pieces)
    for at in range(0, len(data), step):
        await connection.send(data[at : at + step])
        if pieces > 1:
            await asyncio.sleep(0.001)  # lets the piece travel by itself; nothing depends on it


async def play(port: int, caller: Caller, alone: dict[str, Alone]) -> int:
    """One caller from connect to close; returns how many answers it checked."""
    connection = await Connection.open(port)
    checked = 0
    try:
        unread = list(caller.requests)
        if caller.pipelined:
            await send(connection, b"".join([request.encode() for request in unread]), caller.pieces)
        for request in unread:
            if not caller.pipelined:
                await send(connection, request.encode(), caller.pieces)
            if checked == caller.leaves_after:
                connection.abort()
                return checked
            answer = await connection.receive()
            check(request, answer, alone[request.model], TOLERANCE.get(request.model, 0.0))
            check_batch(request, answer.headers)
            checked += 1
    finally:
        await connection.close()
    return checked


def check_batch(request: Request, headers: list[tuple[str, str]]) -> None:
    """The provenance headers name batches that can have held the request's rows."""
    provenance = parse(headers)
    rows = request.inputs[0].array.shape[0]
    if provenance.model is None or provenance.model.name != request.model:
        raise Wrong(f"answer of {provenance.model} to a request for {request.model}")
    if len(provenance.members) != -(-rows // MAX_ROWS):
        raise Wrong(f"{rows} rows in {len(provenance.members)} batches")
    sizes = [min(MAX_ROWS, rows - at) for at in range(0, rows, MAX_ROWS)]
    for member, size in zip(provenance.members, sizes, strict=True):
        if not (member.row >= 0 and member.row + size <= member.size <= MAX_ROWS):
            raise Wrong(f"{size} rows from row {member.row} of a batch of {member.size}")


def play_mix(gateway: InProcess, mix: list[Caller], alone: dict[str, Alone]) -> int:
    """All callers at once; returns how many answers were checked."""

    async def callers() -> list[int]:
        async with asyncio.timeout(120):
            return await gather_all([play(gateway.port, caller, alone) for caller in mix])

    checked = sum(asyncio.run(callers()))
    assert checked >= sum(len(caller.requests) for caller in mix if caller.leaves_after is None)
    return checked


@contextlib.contextmanager
def nothing_left(gateway: InProcess) -> Iterator[None]:
    """After the block no row, byte, batch or request of it may be anywhere, and the workers are the same as before."""
    workers = [worker.pid for worker in gateway.call(gateway.models.pool.statistics).workers]
    yield
    until(lambda: not gateway.call(gateway.residue), 60, f"left behind: {gateway.call(gateway.residue)}")
    after = gateway.call(gateway.models.pool.statistics).workers
    assert [worker.pid for worker in after] == workers
    assert {worker.state for worker in after} == {"ready"}


GENTLE = settings(
    deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def test_every_answer_is_the_callers_own(gateway: InProcess, alone: dict[str, Alone]) -> None:
    @seed(20_261_123)
    @settings(GENTLE, max_examples=40)
    @given(mix=MIXES)
    def holds(mix: list[Caller]) -> None:
        play_mix(gateway, mix, alone)

    with nothing_left(gateway):
        holds()


@pytest.mark.slow
def test_every_answer_is_the_callers_own_at_length(gateway: InProcess, alone: dict[str, Alone]) -> None:
    @settings(GENTLE, max_examples=600)
    @given(mix=MIXES)
    def holds(mix: list[Caller]) -> None:
        play_mix(gateway, mix, alone)

    with nothing_left(gateway):
        holds()


def crowd(model: str, callers: int, each: int, rng: np.random.Generator) -> list[Caller]:
    """Many small requests to one model at once: they cannot help but share batches."""
    mix = []
    for number in range(callers):
        caller = Caller(pipelined=True)
        for turn in range(each):
            array = rng.integers(-99, 100, (int(rng.integers(1, 4)), 6)).astype(np.float32)
            tensor = Tensor("x", "FP32", array, binary=bool(rng.integers(2)))
            caller.requests.append(Request(model, [tensor], request_id=f"{number}-{turn}"))
        mix.append(caller)
    return mix


def test_a_crowd_shares_batches_and_nobody_notices(gateway: InProcess, alone: dict[str, Alone]) -> None:
    statistics = gateway.models.catalog.resolve("whole", None).statistics
    runs, rows = statistics.execution_count, statistics.inference_count
    mix = crowd("whole", 24, 20, np.random.default_rng(1))
    with nothing_left(gateway):
        assert play_mix(gateway, mix, alone) == 480
    sent = sum(request.inputs[0].array.shape[0] for caller in mix for request in caller.requests)
    assert statistics.inference_count - rows == sent
    assert statistics.execution_count - runs < 240, "hardly anything was batched, so nothing was put to the test"


def test_callers_who_leave_do_not_disturb_the_others(gateway: InProcess, alone: dict[str, Alone]) -> None:
    mix = crowd("whole", 24, 20, np.random.default_rng(2))
    leaving = random.Random(2)
    for caller in mix[::2]:
        caller.leaves_after = leaving.randrange(20)
    with nothing_left(gateway):
        play_mix(gateway, mix, alone)


# -- the checker itself ----------------------------------------------------------------------------------------------


def scrambled(batch_input: BatchInput, destination: memoryview) -> None:
    """`write_parts`, and then the first two rows of the batch change places."""
    write_parts(batch_input, destination)
    if len(batch_input.parts) > 1:
        size = batch_input.nbytes // batch_input.shape[0]
        first, second = bytes(destination[:size]), bytes(destination[size : 2 * size])
        destination[:size], destination[size : 2 * size] = second, first


def test_one_scrambled_row_is_found(
    gateway: InProcess, alone: dict[str, Alone], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "write_parts", scrambled)
    mix = crowd("whole", 24, 20, np.random.default_rng(3))
    with pytest.raises(Wrong, match="instead of"):
        play_mix(gateway, mix, alone)
    monkeypatch.undo()
    with nothing_left(gateway):
        play_mix(gateway, crowd("whole", 4, 4, np.random.default_rng(4)), alone)
