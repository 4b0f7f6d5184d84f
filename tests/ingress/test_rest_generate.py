"""generate and generate_stream over real sockets: the same pipeline, provenance and counting as infer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.ingress.oip_bench import ILLEGIBLE, POISON, Answer, check, http, infer, oip_bench, replica_of
from tests.ingress.test_oip_http import codes, complete, waiting

GENERATE = "/v2/models/numbers/generate"
STREAM = f"{GENERATE}_stream"


def asked(document: Any, path: str = GENERATE, *headers: str) -> bytes:
    return http("POST", path, json.dumps(document).encode(), *headers)


def event_of(answer: Answer) -> Any:
    """The one event of a stream."""
    assert answer["Content-Type"] == "text/event-stream; charset=utf-8"
    text = answer.body.decode()
    assert text.startswith("data: ")
    assert text.endswith("\n\n")
    assert text.count("\n") == 2
    return json.loads(text[6:])


async def test_one_number() -> None:
    async with oip_bench() as bench:
        answer = await bench.ask(asked({"number": 7, "id": "a", "stream": False}))
        assert answer.status == 200
        assert answer["Content-Type"] == "application/json"
        assert answer.document == {
            "id": "a", "model_name": "numbers", "model_version": "2", "triple": 21, "name": "n7",
        }  # fmt: skip
        complete(answer)
        assert codes(bench) == {200: 1}


async def test_several_numbers_and_a_version() -> None:
    async with oip_bench() as bench:
        answer = await bench.ask(asked({"number": [1, 2]}, "/v2/models/numbers/versions/1/generate"))
        assert answer.document == {
            "model_name": "numbers", "model_version": "1", "triple": [3, 6], "name": ["n1", "n2"],
        }  # fmt: skip


@pytest.mark.parametrize("headers", [(), ("Accept: text/event-stream",)])
async def test_a_stream_is_one_event(headers: tuple[str, ...]) -> None:
    async with oip_bench() as bench:
        client = await bench.client()
        for number in (1, 2):  # on one connection
            answer = await client.ask(asked({"number": number}, STREAM, *headers))
            assert event_of(answer)["triple"] == 3 * number
            complete(answer)
        assert event_of(await client.ask(asked({"number": 3}, "/v2/models/numbers/versions/1/generate_stream")))


async def test_shares_batches_with_infer() -> None:
    async with oip_bench() as bench:
        replica = replica_of(bench.catalog.find("numbers", "2"))
        replica.held = []
        blocker, first, second = [await bench.client() for _ in range(3)]
        blocker.send(infer([1]))
        await waiting(bench, 1)
        first.send(infer([2]))
        second.send(asked({"number": 3}, STREAM))
        await waiting(bench, 3)
        replica.release()
        check(await blocker.answer(), [1])
        plain, stream = await first.answer(), await second.answer()
        check(plain, [2])
        assert event_of(stream)["triple"] == 9
        assert plain["Inference-Batch"].split(";")[0] == stream["Inference-Batch"].split(";")[0]


@pytest.mark.parametrize("path", [GENERATE, STREAM])
async def test_errors_have_a_status_and_a_json_body(path: str) -> None:
    async with oip_bench() as bench:
        client = await bench.client()
        for document, status in (
            ({"number": "x"}, 400),
            ([], 400),
            ({}, 400),
            ({"number": ILLEGIBLE}, 400),
            ({"number": POISON}, 500),
        ):
            answer = await client.ask(asked(document, path))
            assert (answer.status, bool(answer.error)) == (status, True)
            assert "Inference-Model" in answer
        answer = await client.ask(asked({"number": 1}, path.replace("numbers", "nobody")))
        assert (answer.status, answer.error) == (404, "Request for unknown model: 'nobody' is not found")
        answer = await client.ask(http("GET", path))
        assert (answer.status, answer["Allow"]) == (405, "POST")
        answer = await client.ask(asked({"number": 1}, path, "Inference-Header-Content-Length: 3"))
        assert answer.status == 400
        assert (await client.ask(asked({"number": 1}, path))).status == 200


async def test_a_timeout_holds_for_generate() -> None:
    async with oip_bench() as bench:
        replica = replica_of(bench.catalog.find("numbers", "2"))
        replica.held = []
        client = await bench.client()
        answer = await client.ask(asked({"number": 1}, STREAM, "X-Request-Timeout-Ms: 1"))
        assert answer.status == 504
        answer = await client.ask(asked({"number": 1, "parameters": {"timeout": 1000}}))
        assert answer.status == 504
        replica.release()


async def test_generate_is_not_advertised() -> None:
    async with oip_bench() as bench:
        assert "generate" not in (await bench.ask(http("GET", "/v2"))).document["extensions"]
