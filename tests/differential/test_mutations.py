"""Thousands of damaged requests to both servers: what Triton answers, the gateway answers alike; what it refuses, the
gateway refuses. The gateway may refuse more, for the reasons in `STRICTER` and no other; it never answers 5xx."""

from __future__ import annotations

import contextlib
from random import Random
from typing import Any

import pytest

from tests.differential import mutations
from tests.differential.compare import differences
from tests.differential.exchange import Asker, Reply, Step
from tests.differential.triton_process import TritonProcess
from tests.live.gateway_process import GatewayProcess

pytestmark = pytest.mark.slow

REQUESTS = 2000
STRICTER = {
    "must be an object": "§1.8: parameters are an object; Triton ignores other things beside an input or output",
    "has invalid type": "§1.8: a parameter is a scalar, also beside an input or output",
    "requested twice": "§0 no. 15",
    "not valid UTF-8": "onnxruntime's strings are UTF-8",
    "out of range": "§0 no. 16",
    "a BOOL element must be": "a BOOL byte is 0 or 1",
    "does not match other inputs": "trap 13; Triton counts a batch of 0 as one",
    "batch-size must be >= 1": "trap 10; Triton lets some batches of 0 through",
    "Shape does not match true shape": "trap 4: Triton does not count the data of an empty shape",
    "'binary_data' must be true or false": "one rule for both protocols; over gRPC Triton has no such parameter",
    "byte order mark": "RFC 8259 §8.1",
}
LENIENT = ("sequence_id", "JSON non-array as array", "get members for non-object")
"""§2.3: uint64 is taken for it too; null is taken for an optional member that is not there."""


def by_name(reply: Reply) -> Reply:
    """The answer with its outputs, blobs or raw contents in the order of their names: §0 no. 13."""
    if not reply.ok or not isinstance(reply.body, dict):
        return reply
    outputs: list[dict[str, Any]] = reply.body.get("outputs", [])
    order = sorted(range(len(outputs)), key=lambda place: str(outputs[place]["name"]))
    body = {**reply.body, "outputs": [outputs[place] for place in order]}
    raw = reply.body.get("raw_output_contents")
    if raw is not None:
        body["raw_output_contents"] = [raw[place] for place in order]
    binary = [place for place, output in enumerate(outputs) if "binary_data_size" in output.get("parameters", {})]
    blobs = dict(zip(binary, reply.blobs, strict=True))
    keys = (reply.keys[0], *(reply.keys[1 + place] for place in order)) if reply.keys else ()
    return Reply(reply.status, reply.headers, body, tuple(blobs[place] for place in order if place in blobs), "", keys)


def faults(step: Step, theirs: Reply, ours: Reply) -> list[str]:
    """What the gateway did wrong with this request."""
    if theirs.ok and ours.ok:
        return [str(found) for found in differences("mutation", step, by_name(theirs), by_name(ours))]
    if (isinstance(ours.status, int) and ours.status >= 500) or ours.status in (
        "INTERNAL",
        "UNKNOWN",
        "connection lost",
    ):
        return [f"we answer {ours.status}: {ours.text}"]
    if theirs.ok and not any(words in ours.text for words in STRICTER):
        return [f"Triton takes it, we refuse: {ours.text}"]
    if ours.ok and not theirs.ok and not any(words in theirs.text for words in LENIENT):
        return [f"we take it, Triton refuses: {theirs.text}"]
    if not ours.ok and not theirs.ok and theirs.status not in (500, "INTERNAL") and theirs.status != ours.status:
        return [f"status {ours.status} ({ours.text}) for {theirs.status} ({theirs.text})"]
    return []


@pytest.mark.parametrize("make", [mutations.http, mutations.grpc_request], ids=["REST", "gRPC"])
def test_damaged_requests(servers: tuple[TritonProcess, GatewayProcess], make: Any) -> None:
    real, ours = servers
    random = Random(2024)
    found: list[str] = []
    answered = 0
    asker, us = Asker(real.port, real.grpc_port), Asker(ours.port, ours.grpc_port)
    with contextlib.closing(asker), contextlib.closing(us):
        for number in range(REQUESTS):
            step = make(random)
            theirs = asker.ask(step)
            if theirs.status in ("connection lost", "UNAVAILABLE"):
                real.ensure()
                continue
            answered += theirs.ok
            found += [f"{number}: {step}\n  {fault}" for fault in faults(step, theirs, us.ask(step))]
    assert not found, "\n".join(found[:20])
    assert REQUESTS / 20 < answered < REQUESTS * 19 / 20  # neither all right nor all wrong
