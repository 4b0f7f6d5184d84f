"""Queues of both servers under the same load: who is served, who is refused, in which order, in which batches.

One scenario is one function of a server; what it returns is compared, or, where the test says why, both outcomes are
stated. The models take as many milliseconds as their caller says: the Python twin sleeps, the ONNX twin turns in a loop
whose pace is measured first. Nothing is asserted about times, only about orders and counts; a request follows when the
one before it is seen to run or to wait.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import onnxruntime
import pytest

from tests.differential.build import ask, infer, tensor
from tests.differential.campaign import Setting, both
from tests.differential.exchange import Asker, Http, Reply
from tests.differential.zoo import Twin, copy, turning
from tests.live.gateway_process import until

pytestmark = pytest.mark.slow

SLEEP: Final = """\
import pathlib
import time


def compute(inputs, version):
    pathlib.Path(__file__).with_name("started").touch()
    time.sleep(float(inputs["INPUT0"].max()) / 1000)
    return {"OUTPUT0": inputs["INPUT0"]}
"""


def pace() -> int:
    """Loop turns of one millisecond in this machine's onnxruntime, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(turning(10**9), options, providers=["CPUExecutionProvider"])
    turns, elapsed = 2_000, 0.0
    while elapsed < 0.1:
        turns *= 2
        begin = time.perf_counter()
        session.run(None, {"INPUT0": np.array([[turns]], np.int64)})
        elapsed = time.perf_counter() - begin
    return max(int(turns / elapsed / 1000), 1)


def slow(name: str, batching: str, turns_per_ms: int, batch: int = 1) -> Twin:
    data = turning(10**9, turns_per_ms)
    more = f"dynamic_batching {{ {batching} }} instance_group {{ count: 1 kind: KIND_CPU }}"
    return Twin(name, {1: data}, [("INPUT0", "INT64", [1])], [("OUTPUT0", "INT64", [1])], batch, SLEEP, more)


LEVELS: Final = "priority_levels: 2 default_priority_level: 2"
TIMED: Final = "default_queue_policy { default_timeout_microseconds: 20000000 allow_timeout_override: true }"
DELAYED: Final = (
    "default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 60000000 allow_timeout_override: true }"
)
SMALL: Final = "default_queue_policy { max_queue_size: 2 }"
SECOND: Final = "max_queue_delay_microseconds: 1000000"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    turns = pace()
    twins = [
        slow("levels", LEVELS, turns),
        slow("timed", TIMED, turns),
        slow("delayed", DELAYED, turns),
        slow("small", SMALL, turns),
        slow("grouped", SECOND, turns, batch=4),
        copy("preferred", more=f"dynamic_batching {{ preferred_batch_size: [ 4 ] {SECOND} }}"),
        copy("shapes", more=f"dynamic_batching {{ {SECOND} }}"),
    ]
    setting = Setting(twins, server={"intra_op_threads": 1}, defaults={"batching": "on"})
    folder = tmp_path_factory.mktemp("queues")
    with both(folder, setting) as (real, ours):
        theirs, us = Asker(real.port, real.grpc_port), Asker(ours.port, ours.grpc_port)

        def triton_runs(model: str) -> bool:
            return (folder / "triton" / model / "1" / "started").exists()

        def gateway_runs(model: str) -> bool:
            return ours.metric("gateway_backend_inflight_batches", model=model) > 0

        with contextlib.closing(theirs), contextlib.closing(us):
            yield (
                Server(theirs, real.metrics, triton_runs),
                Server(us, lambda: ours.operations("/metrics").decode(), gateway_runs),
            )


class Call(threading.Thread):
    """A request under way."""

    def __init__(self, asker: Asker, step: Http) -> None:
        super().__init__()
        self.asker, self.step = asker, step
        self.reply = Reply("no answer")
        self.ended = 0.0
        self.start()

    def run(self) -> None:
        self.reply = self.asker.ask(self.step)
        self.ended = time.monotonic()


class Server:
    """One of the two."""

    def __init__(self, asker: Asker, metrics: Callable[[], str], runs: Callable[[str], bool]) -> None:
        self.asker, self._metrics, self._runs = asker, metrics, runs

    def call(self, model: str, milliseconds: int, **parameters: int) -> Call:
        given = tensor(shape=(1, 1), datatype="INT64", data=[milliseconds])
        return Call(self.asker, infer(ask(given, parameters=parameters), model))

    def in_order(self, model: str, calls: Sequence[tuple[int, dict[str, int]]]) -> list[Call]:
        """Requests that arrive one after the other, while the first keeps the only instance busy."""
        (first, parameters), *others = calls
        made = [self.call(model, first, **parameters)]
        until(lambda: self._runs(model), 30, f"{model} does not get busy")
        for milliseconds, parameters in others:
            before = self._waiting(model)
            made.append(self.call(model, milliseconds, **parameters))
            until(lambda: self._waiting(model) > before or made[-1].ended > 0, 30, "it neither waits nor ends")  # noqa: B023
        return made

    def _waiting(self, model: str) -> int:
        """Requests in the queue, the one that was taken out for the next run among them."""
        start = f'nv_inference_pending_request_count{{model="{model}",version="1"}} '
        return sum(
            int(float(line.removeprefix(start))) for line in self._metrics().splitlines() if line.startswith(start)
        )

    def sizes(self, model: str) -> dict[int, int]:
        """Executions by batch size, so far."""
        reply = self.asker.ask(Http("GET", f"/v2/models/{model}/stats"))
        (found,) = reply.body["model_stats"]
        return {entry["batch_size"]: entry["compute_infer"]["count"] for entry in found["batch_stats"]}

    def grown(self, model: str, action: Callable[[], object]) -> dict[int, int]:
        before = self.sizes(model)
        action()
        grew = {size: count - before.get(size, 0) for size, count in self.sizes(model).items()}
        return {size: count for size, count in grew.items() if count}


def joined(calls: Sequence[Call]) -> list[Call]:
    for call in calls:
        call.join(60)
    until(lambda: not any(call.is_alive() for call in calls), 1, "a request has no answer")
    return list(calls)


def statuses(calls: Sequence[Call]) -> list[Any]:
    return [call.reply.status for call in joined(calls)]


def order(calls: Sequence[Call]) -> list[int]:
    """Places of the calls in the order of their answers."""
    return sorted(range(len(calls)), key=lambda place: joined(calls)[place].ended)


def both_do(servers: tuple[Server, Server], scenario: Callable[[Server], Any]) -> tuple[Any, Any]:
    theirs, ours = servers
    return scenario(theirs), scenario(ours)


def test_priorities(servers: tuple[Server, Server]) -> None:
    """Level 1 first; first come, first served within a level. Triton has already taken the first in line out of its
    queue when the second comes, whatever its level; here a request keeps its place until the instance takes it."""

    def scenario(server: Server) -> list[int]:
        waiting = [(150, {"priority": 2}), (150, {}), (150, {"priority": 1}), (150, {"priority": 1})]
        return order(server.in_order("levels", [(1200, {}), *waiting]))

    theirs, ours = both_do(servers, scenario)
    assert ours == [0, 3, 4, 1, 2]
    assert theirs in ([0, 3, 4, 1, 2], [0, 1, 3, 4, 2])


def test_timeout_in_the_queue(servers: tuple[Server, Server]) -> None:
    def scenario(server: Server) -> tuple[list[Any], str]:
        waiting = [(1, {}), (1, {"timeout": 100_000}), (1, {"timeout": 10_000_000})]
        calls = server.in_order("timed", [(1500, {}), *waiting])
        return statuses(calls), calls[2].reply.text

    (theirs, their_text), (ours, our_text) = both_do(servers, scenario)
    assert theirs == ours == [200, 200, 503, 200]
    assert "Request timeout expired" in their_text
    assert "Request timeout expired" in our_text


def test_delayed_requests(servers: tuple[Server, Server]) -> None:
    def scenario(server: Server) -> tuple[list[Any], list[int]]:
        waiting = [(150, {}), (150, {"timeout": 1000}), (150, {}), (150, {})]
        calls = server.in_order("delayed", [(1200, {}), *waiting])
        return statuses(calls), order(calls)

    theirs, ours = both_do(servers, scenario)
    assert theirs == ours == ([200] * 5, [0, 1, 3, 4, 2])


def test_full_queue(servers: tuple[Server, Server]) -> None:
    """Triton holds one request more than its queue: the one already taken out for the next run."""

    def scenario(server: Server) -> tuple[list[Any], bool]:
        calls = server.in_order("small", [(1500, {}), *[(1, {})] * 6])
        refused = [call for call in joined(calls) if call.reply.status == 503]
        return statuses(calls), all("Exceeds maximum queue size" in call.reply.text for call in refused)

    theirs, ours = both_do(servers, scenario)
    assert ours == ([200] * 3 + [503] * 4, True)
    assert theirs in (([200] * 3 + [503] * 4, True), ([200] * 4 + [503] * 3, True))


@pytest.mark.parametrize(("count", "batches"), [(1, {1: 1}), (4, {4: 1}), (5, {4: 1, 1: 1}), (8, {4: 2})])
def test_preferred_sizes(servers: tuple[Server, Server], count: int, batches: dict[int, int]) -> None:
    """A batch that Triton has formed may grow until the instance takes it; here it is the preferred size exactly."""

    def scenario(server: Server) -> dict[int, int]:
        steps = [infer(ask(tensor(shape=(1, 1), data=[number])), "preferred") for number in range(count)]
        return server.grown("preferred", lambda: statuses([Call(server.asker, step) for step in steps]))

    theirs, ours = both_do(servers, scenario)
    assert ours == batches
    assert sum(size * times for size, times in theirs.items()) == count
    assert sum(theirs.values()) <= sum(batches.values())


def test_rows_of_requests_add_up_to_the_largest_batch(servers: tuple[Server, Server]) -> None:
    """Requests of 3, 3, 2 and 8 rows: never more than 8 together, never split."""

    def scenario(server: Server) -> dict[int, int]:
        steps = [infer(ask(tensor(shape=(rows, 1), data=[1] * rows)), "shapes") for rows in (3, 3, 2)]
        return server.grown("shapes", lambda: statuses([Call(server.asker, step) for step in steps]))

    theirs, ours = both_do(servers, scenario)
    assert theirs == ours == {8: 1}


def test_a_full_batch_does_not_wait_for_its_delay(servers: tuple[Server, Server]) -> None:
    def scenario(server: Server) -> dict[int, int]:
        return server.grown("grouped", lambda: statuses([server.call("grouped", 10) for _ in range(4)]))

    theirs, ours = both_do(servers, scenario)
    assert theirs == ours == {4: 1}
