"""Traps 46, 61 and 64–74: queues, priorities, timeouts, ordering, cache, shutdown, metrics, with real workers.

The models turn in a loop as often as their caller says, so a test makes an instance busy for as long as it needs; how
many turns a second takes is measured once. What is asserted is an order of events or a count, not a duration, apart
from the one bound that a timeout fires while the instance is still busy; `patient` plays a test again at a slower pace
when it fails, since a machine may stand still for longer than the instance is busy, and a defect stays at any pace.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from tritonclient.grpc import service_pb2 as pb

from tests.differential.build import add, ask, blob, request, tensor
from tests.differential.exchange import Reply
from tests.differential.zoo import BATCHING, Twin, copy, table, turning, write_repository
from tests.live.gateway_process import GatewayProcess, gateway, until
from tests.traps.client import INFER, Client, output, refused

MOST = 2_000_000_000


def turner(name: str, batching: str, batch: int = 1) -> Twin:
    tensors = [("INPUT0", "INT64", [1])], [("OUTPUT0", "INT64", [1])]
    return Twin(name, {1: turning(MOST)}, *tensors, max_batch=batch, more=batching)


SMALL_QUEUE = "default_queue_policy { max_queue_size: 1 }"
NO_DEFAULT = "default_queue_policy { allow_timeout_override: true }"
TEN_SECONDS = "default_queue_policy { default_timeout_microseconds: 10000000 allow_timeout_override: true }"
SHORT = "default_queue_policy { default_timeout_microseconds: 300000 allow_timeout_override: true }"
DELAYED = (
    "default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 60000000 allow_timeout_override: true }"
)
LEVELS = "priority_levels: 2 default_priority_level: 2"
SECOND = "max_queue_delay_microseconds: 1000000"
MODELS = (
    turner("busy", "dynamic_batching { }"),
    turner("small_queue", f"dynamic_batching {{ {SMALL_QUEUE} }}"),
    turner("no_default", f"dynamic_batching {{ {NO_DEFAULT} }}"),
    turner("ten_seconds", f"dynamic_batching {{ {TEN_SECONDS} }}"),
    turner("short", f"dynamic_batching {{ {SHORT} }}"),
    turner("delayed", f"dynamic_batching {{ {DELAYED} }}"),
    turner("levels", f"dynamic_batching {{ {LEVELS} }}"),
    copy("preferred", more=f"dynamic_batching {{ preferred_batch_size: [ 4 ] {SECOND} }}"),
    copy("shapes", more=f"dynamic_batching {{ {SECOND} }}"),
    Twin(
        "rows",
        {1: table()},
        [("index", "INT64", [1])],
        [("row", "FP32", [1, 3])],
        more=f"dynamic_batching {{ {SECOND} }}",
    ),
    copy("cached", more="response_cache { enable: true }\n" + BATCHING),
)


@dataclass
class Batching:
    """A gateway with one instance of each model on a worker of its own kind, and how fast its loops turn."""

    client: Client
    turns_per_s: float = 0.0
    pace: float = 1.0
    """What times are multiplied by."""
    calls: list[Call] = field(default_factory=list)

    def measure(self) -> None:
        turns, elapsed = 5_000, 0.0
        while elapsed < 0.3:
            turns *= 4
            begin = time.monotonic()
            output(self.ask("busy", turns))
            elapsed = time.monotonic() - begin
        self.turns_per_s = turns / elapsed

    @property
    def process(self) -> GatewayProcess:
        return self.client.process

    def turns(self, seconds: float) -> int:
        return int(self.turns_per_s * seconds * self.pace)

    def waiting(self, model: str) -> int:
        """Requests in the model's queue."""
        return int(self.process.metric("nv_inference_pending_request_count", model=model))

    def ask(self, model: str, turns: int, **parameters: Any) -> Reply:
        given = tensor(shape=(1, 1), datatype="INT64", data=[turns])
        return self.client.infer(ask(given, parameters=parameters), model)

    def start(self, model: str, turns: int, **parameters: Any) -> Call:
        call = Call(lambda: self.ask(model, turns, **parameters))
        self.calls.append(call)
        return call

    def settle(self) -> None:
        """Wait until nothing that was started is left."""
        for call in self.calls:
            call.result()
        self.calls.clear()

    def occupy(self, model: str, seconds: float) -> Call:
        """A request that keeps the model's only instance busy; returns once it is running."""
        turns = self.turns(seconds)
        call = self.start(model, turns)
        until(lambda: self._running(model) and not self.waiting(model), 30, f"{model} does not get busy")
        return call

    def _running(self, model: str) -> bool:
        return self.process.metric("gateway_backend_inflight_batches", model=model) > 0

    def queued(self, model: str, turns: int, **parameters: Any) -> Call:
        """A request that waits behind what runs; returns once it is in the queue."""
        before = self.waiting(model)
        call = self.start(model, turns, **parameters)
        until(lambda: self.waiting(model) > before, 30, f"the request does not queue at {model}")
        return call


@dataclass
class Call:
    """A request in a thread of its own."""

    function: Callable[[], Reply]
    reply: Reply = field(init=False)
    started: float = 0.0
    ended: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.reply = self.function()
        self.ended = time.monotonic()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Reply:
        self._thread.join(60)
        assert not self.running, "no answer"
        return self.reply


def configuration(folder: Path, **server: object) -> str:
    repository = write_repository(folder / "models", MODELS, triton=False)
    file = folder / "gateway.yaml"
    settings = {"workers": 2, "drain_delay_s": 0, **server}
    defaults = {"instances": 1, "batching": "on", "intra_op_threads": 1}
    models = [{"source": str(repository)}]
    file.write_text(yaml.safe_dump({"server": settings, "defaults": defaults, "models": models}))
    return str(file)


@pytest.fixture(scope="module")
def batching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Batching]:
    file = configuration(tmp_path_factory.mktemp("batching"))
    with gateway("serve", "-c", file) as process, contextlib.closing(Client(process)) as client:
        one = Batching(client)
        one.measure()
        yield one


def patient(test: Callable[[Batching], None]) -> Callable[[Batching], None]:
    """Plays `test` again, three times as slowly, then nine times, before it fails."""

    @functools.wraps(test)
    def played(batching: Batching) -> None:
        for pace in (1.0, 3.0, 9.0):
            batching.pace = pace
            try:
                test(batching)
            except AssertionError:
                if pace == 9.0:
                    raise
            else:
                return
            finally:
                batching.pace = 1.0
                batching.settle()

    return played


@pytest.mark.slow
@patient
def test_trap_46_refusals_and_timeouts_in_statistics(batching: Batching) -> None:
    def failures(model: str) -> int:
        found: int = batching.client.statistics(model)["inference_stats"]["fail"]["count"]
        return found

    def rejected(model: str) -> float:
        return batching.process.metric("nv_inference_request_failure", model=model, reason="REJECTED")

    before = failures("small_queue"), failures("ten_seconds"), rejected("ten_seconds")
    first = batching.occupy("small_queue", 1)
    second = batching.queued("small_queue", 1)
    refused(batching.ask("small_queue", 1), 503, "Exceeds maximum queue size")
    other = batching.occupy("ten_seconds", 1)
    refused(batching.ask("ten_seconds", 1, timeout=50_000), 503, "Request timeout expired")
    assert [call.result().status for call in (first, second, other)] == [200, 200, 200]
    after = failures("small_queue"), failures("ten_seconds"), rejected("ten_seconds")
    assert [new - old for new, old in zip(after, before, strict=True)] == [0, 1, 1]


@pytest.mark.slow
@patient
def test_trap_61_deadline_of_a_queued_call(batching: Batching) -> None:
    def cancelled() -> float:
        return batching.process.metric("nv_inference_request_failure", model="busy", reason="CANCELED")

    before, count = cancelled(), batching.client.statistics("busy")["inference_count"]
    first = batching.occupy("busy", 1.5)
    message = add(request("busy", raw=[blob("INT64", [1])]), shape=(1, 1), datatype="INT64")
    with batching.client.channel() as channel:
        grpc.channel_ready_future(channel).result(30)  # connecting is no part of the deadline
        infer = channel.unary_unary(
            INFER,
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as caught:
            infer(message, timeout=0.2 * batching.pace)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: cancelled() == before + 1, 10, "the cancelled request is not counted")
    assert batching.waiting("busy") == 0
    assert first.running
    assert first.result().status == 200
    assert batching.client.statistics("busy")["inference_count"] == count + 1


def sizes(batching: Batching, model: str) -> dict[int, int]:
    """Executions by batch size."""
    found = batching.client.statistics(model)["batch_stats"]
    return {entry["batch_size"]: entry["compute_infer"]["count"] for entry in found}


def grown(after: Mapping[int, int], before: Mapping[int, int]) -> dict[int, int]:
    grew = {size: count - before.get(size, 0) for size, count in after.items()}
    return {size: count for size, count in grew.items() if count}


@pytest.mark.slow
@patient
def test_trap_64_preferred_size_and_delay(batching: Batching) -> None:
    def together(count: int) -> list[Call]:
        bodies = [ask(tensor(shape=(1, 1), data=[number])) for number in range(count)]
        calls = [Call(lambda body=body: batching.client.infer(body, "preferred")) for body in bodies]  # type: ignore[misc]
        for number, call in enumerate(calls):
            assert output(call.result())["data"] == [number]
        return calls

    start = sizes(batching, "preferred")
    (alone,) = together(1)
    assert alone.ended - alone.started >= 1.0
    assert grown(sizes(batching, "preferred"), start) == {1: 1}
    start = sizes(batching, "preferred")
    four = together(4)
    assert max(call.ended for call in four) - max(call.started for call in four) < 1.0
    assert grown(sizes(batching, "preferred"), start) == {4: 1}
    start = sizes(batching, "preferred")
    five = sorted(call.ended for call in together(5))
    assert five[4] - five[3] > 0.5
    assert grown(sizes(batching, "preferred"), start) == {4: 1, 1: 1}


@pytest.mark.slow
@patient
def test_trap_65_shapes_are_not_mixed(batching: Batching) -> None:
    before = sizes(batching, "shapes")
    bodies = [
        ask(tensor(shape=(1, 2 + number % 2), data=list(range(number, number + 2 + number % 2)))) for number in range(6)
    ]
    calls = [Call(lambda body=body: batching.client.infer(body, "shapes")) for body in bodies]  # type: ignore[misc]
    for body, call in zip(bodies, calls, strict=True):
        (given,) = body["inputs"]
        found = output(call.result())
        assert (found["shape"], found["data"]) == (given["shape"], given["data"])
    assert grown(sizes(batching, "shapes"), before) == {3: 2}


@pytest.mark.slow
@patient
def test_trap_66_full_queue(batching: Batching) -> None:
    busy = batching.occupy("small_queue", 2)
    waits = batching.queued("small_queue", 1)
    for _ in range(2):
        refused(batching.ask("small_queue", 1), 503, "Exceeds maximum queue size")
    assert busy.running  # the refusals came at once
    assert waits.running
    assert [busy.result().status, waits.result().status] == [200, 200]


@pytest.mark.slow
@patient
def test_trap_67_timeouts_of_requests(batching: Batching) -> None:
    busy = batching.occupy("no_default", 1)
    ignored = batching.queued("no_default", 1, timeout=50_000)
    assert ignored.result().status == 200
    assert busy.result().status == 200
    busy = batching.occupy("ten_seconds", 3)
    late = batching.start("ten_seconds", 1, timeout=300_000)
    refused(late.result(), 503, "Request timeout expired")
    assert busy.running  # it fired on time, not when the instance got free
    assert late.ended - late.started >= 0.3
    assert busy.result().status == 200


@pytest.mark.slow
@patient
def test_trap_68_default_timeout_wins_and_delayed_requests_come_last(batching: Batching) -> None:
    busy = batching.occupy("short", 3)
    refused(batching.ask("short", 1, timeout=60_000_000), 503, "Request timeout expired")
    assert busy.running
    assert busy.result().status == 200
    busy = batching.occupy("delayed", 1.5)
    expired = batching.queued("delayed", batching.turns(0.2), timeout=1_000)
    fresh = [batching.queued("delayed", batching.turns(0.2)) for _ in range(2)]
    assert [call.result().status for call in (busy, expired, *fresh)] == [200] * 4
    assert max(call.ended for call in fresh) < expired.ended


@pytest.mark.slow
@patient
def test_trap_69_priorities(batching: Batching) -> None:
    busy = batching.occupy("levels", 1.5)
    turns = batching.turns(0.2)
    low = [batching.queued("levels", turns, priority=2), batching.queued("levels", turns)]
    high = [batching.queued("levels", turns, priority=1), batching.queued("levels", turns, priority=1)]
    order = [busy, *high, *low]
    assert [call.result().status for call in order] == [200] * 5
    assert [call.ended for call in order] == sorted(call.ended for call in order)


@pytest.mark.slow
@patient
def test_trap_70_one_row_fails_in_a_shared_batch(batching: Batching) -> None:
    indices = [1, 99, 3, 5]
    bodies = [ask(tensor("index", (1, 1), "INT64", data=[index])) for index in indices]
    calls = [Call(lambda body=body: batching.client.infer(body, "rows")) for body in bodies]  # type: ignore[misc]
    for index, call in zip(indices, calls, strict=True):
        reply = call.result()
        if index == 99:
            refused(reply, 500)
        else:
            assert output(reply)["data"] == [3 * index, 3 * index + 1, 3 * index + 2]


@pytest.mark.slow
@patient
def test_trap_71_client_leaves_while_queued(batching: Batching) -> None:
    count = batching.client.statistics("busy")["inference_count"]
    busy = batching.occupy("busy", 2)
    body = json.dumps(ask(tensor(shape=(1, 1), datatype="INT64", data=[1]))).encode()
    head = f"POST /v2/models/busy/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", batching.process.port)) as gone:
        gone.sendall(head + body)
        until(lambda: batching.waiting("busy") == 1, 10, "the request does not queue")
        stays = batching.queued("busy", 1)
    until(lambda: batching.waiting("busy") == 1, 10, "the abandoned request stays in the queue")
    assert busy.running
    assert [busy.result().status, stays.result().status] == [200, 200]
    assert batching.waiting("busy") == 0
    assert batching.client.statistics("busy")["inference_count"] == count + 2


def test_trap_72_cache(batching: Batching) -> None:
    def counts() -> dict[str, int]:
        found = batching.client.statistics("cached")
        durations = {name: duration["count"] for name, duration in found["inference_stats"].items()}
        return {**durations, "inference_count": found["inference_count"]}

    given = tensor(data=[7, 8, 9])
    start = counts()
    output(batching.client.infer(ask(given), "cached"))
    missed = counts()
    assert {name for name in missed if missed[name] > start[name]} == {
        "success",
        "queue",
        "compute_input",
        "compute_infer",
        "compute_output",
        "cache_miss",
        "inference_count",
    }
    for parameters in ({}, {"custom": 5}):
        before = counts()
        hit = output(batching.client.infer(ask(given, id="x", parameters=parameters), "cached"))
        assert hit["data"] == [7, 8, 9]
        after = counts()
        grew = {name: after[name] - before[name] for name in after if after[name] != before[name]}
        assert grew == {"success": 1, "queue": 1, "cache_hit": 1}


@pytest.mark.slow
def test_trap_73_shutdown_under_load(tmp_path: Path) -> None:
    file = configuration(tmp_path, drain_delay_s=1.5)
    with gateway("serve", "-c", file) as process, contextlib.closing(Client(process)) as client:
        one = Batching(client)
        one.measure()
        accepted = [one.occupy("busy", 2), *(one.queued("busy", 1) for _ in range(5))]
        process.process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/v2/health/ready").status == 503, 10, "ready stays")
        assert [call.result().status for call in accepted] == [200] * 6
        until(lambda: _refuses(process.port), 10, "new connections are accepted")
        assert process.process.wait(60) == 0


def _refuses(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            first = connection.recv(32)
            return first == b"" or b" 503 " in first
    except OSError:
        return True


FAMILIES = (
    "nv_inference_request_success",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
    "nv_inference_pending_request_count",
)
CACHE = (
    "nv_cache_num_hits_per_model",
    "nv_cache_num_misses_per_model",
    "nv_cache_hit_duration_per_model",
    "nv_cache_miss_duration_per_model",
)


def test_trap_74_metrics(batching: Batching) -> None:
    lines = batching.process.operations("/metrics").decode().splitlines()
    for family in FAMILIES:
        assert any(line.startswith(f'{family}{{model="levels",version="1"}} ') for line in lines), family
    for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER"):
        start = f'nv_inference_request_failure{{model="shapes",reason="{reason}",version="1"}} '
        assert [line.removeprefix(start) for line in lines if line.startswith(start)] in (["0"], ["0.0"]), reason
    for family in CACHE:
        assert any(line.startswith(f'{family}{{model="cached",version="1"}} ') for line in lines), family
        assert not any(line.startswith(f'{family}{{model="levels"') for line in lines), family
    assert any(line.startswith('nv_model_load_duration_secs{model="levels",version="1"} ') for line in lines)
    names = {line.split("{")[0].split(" ")[0] for line in lines if line.startswith("nv_")}
    assert not [name for name in names if name.endswith("_total")]
