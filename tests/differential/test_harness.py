"""The harness itself: it sees every kind of difference, and the allow-list covers no more than it says."""

from __future__ import annotations

from typing import Any

import pytest

from tests.differential.allowed import Allowed
from tests.differential.build import SIMPLE, ask, infer, simple
from tests.differential.campaign import CORPUS, Tally
from tests.differential.compare import Difference, differences
from tests.differential.exchange import Case, Grpc, Reply, document, read_http

STEP = infer(ask(SIMPLE))
JSON = {"Content-Type": "application/json"}


def answer(**output: Any) -> Reply:
    found = {"name": "OUTPUT0", "datatype": "FP32", "shape": [1, 2], "data": [0.1, 2.0], **output}
    reply = Reply(200, {"content-type": "application/json"}, {"model_name": "m", "outputs": [found]})
    reply.keys = (("model_name", "outputs"), tuple(found))
    return reply


def paths(theirs: Reply, ours: Reply, step: Any = STEP) -> list[str]:
    return [found.path for found in differences("case", step, theirs, ours)]


def test_equal_answers_have_no_difference() -> None:
    assert paths(answer(), answer()) == []


@pytest.mark.parametrize(
    ("ours", "path"),
    [
        (answer(shape=[2, 1]), "body.outputs.0.shape"),
        (answer(data=[0.1, 2.5]), "body.outputs.0.data"),
        (answer(data=[0.1]), "body.outputs.0.data"),
        (answer(name="OUTPUT1"), "body.outputs.0.name"),
        (answer(more=1), "body.outputs.0.more"),
        (answer(data=[0.1, "2.0"]), "body.outputs.0.data"),
    ],
)
def test_a_difference_within_the_body_is_seen(ours: Reply, path: str) -> None:
    assert path in paths(answer(), ours)


def test_floats_are_compared_as_their_datatype() -> None:
    assert paths(answer(data=[0.10000000149011612, float("nan")]), answer(data=[0.1, float("nan")])) == []
    double = answer(datatype="FP64", data=[0.10000000149011612, 1.0])
    assert paths(double, answer(datatype="FP64", data=[0.1, 1.0])) == ["body.outputs.0.data"]


def test_integers_are_not_booleans() -> None:
    assert paths(answer(datatype="INT8", data=[1, 0]), answer(datatype="INT8", data=[1, 1])) == ["body.outputs.0.data"]
    assert paths(Reply(200, body={"ready": True}), Reply(200, body={"ready": 1})) == ["body.ready"]


def test_headers_and_key_order_and_blobs_are_seen() -> None:
    ours = answer()
    ours.headers = {"content-type": "application/json; charset=utf-8", "content-encoding": "gzip"}
    ours.keys = (("outputs", "model_name"), ours.keys[1])
    ours.blobs = (b"x",)
    assert paths(answer(), ours) == ["header.content-encoding", "header.content-type", "keys", "blobs"]


def test_status_and_form_of_errors_are_seen() -> None:
    theirs = read_http(400, JSON, b'{"error":"INPUT0 is wrong"}')
    assert paths(theirs, read_http(400, JSON, b'{"error":"other words"}')) == []
    assert paths(theirs, read_http(500, JSON, b'{"error":"x"}')) == ["status"]
    assert paths(theirs, read_http(400, JSON, b'{"detail":"x"}')) == ["error form"]
    assert paths(theirs, read_http(400, JSON, b"oops")) == ["error form"]


def test_words_are_looked_for_in_both() -> None:
    step = infer(ask(SIMPLE), says=("INPUT0",))
    right, wrong = read_http(400, JSON, b'{"error":"INPUT0"}'), read_http(400, JSON, b'{"error":"x"}')
    assert paths(right, wrong, step) == ["words"]
    assert paths(wrong, right, step) == ["corpus"]
    assert paths(wrong, right, infer(ask(SIMPLE), names=("INPUT0",))) == []


def test_times_are_compared_by_kind_and_counts_by_value() -> None:
    def statistics(count: Any, ns: Any) -> Reply:
        return Reply(200, body={"model_stats": [{"name": "m", "version": "1", "success": {"count": count, "ns": ns}}]})

    assert paths(statistics(1, 5), statistics(1, 900)) == []
    assert paths(statistics(1, 5), statistics(2, 5)) == ["body.model_stats.0.success.count"]
    assert paths(statistics(1, 5), statistics(1, -5)) == ["body.model_stats.0.success.ns"]


def test_lists_of_named_things_have_no_order() -> None:
    index = [{"name": "a", "version": "1"}, {"name": "b"}]
    assert paths(Reply(200, body=index), Reply(200, body=index[::-1])) == []
    assert paths(Reply(200, body=index), Reply(200, body=index[:1])) == ["body"]


def test_grpc_messages_become_dictionaries_with_the_protos_names() -> None:
    step = CORPUS[-1].steps[0]
    assert isinstance(step, Grpc)
    found = document(type(simple()), simple(request_id="7").SerializeToString())
    assert (found["model_name"], found["id"], len(found["raw_input_contents"])) == ("m", "7", 1)
    assert document(None, b"\x08\x01") == "0801"


def test_binary_parts_are_cut_by_the_declared_sizes() -> None:
    head = b'{"outputs":[{"parameters":{"binary_data_size":2}},{"data":[1]},{"parameters":{"binary_data_size":1}}]}'
    headers = {**JSON, "Inference-Header-Content-Length": str(len(head))}
    assert read_http(200, headers, head + b"abc").blobs == (b"ab", b"c")
    with pytest.raises(AssertionError, match="nobody's"):
        read_http(200, headers, head + b"abcd")


def test_an_entry_covers_what_it_names_and_nothing_else() -> None:
    entry = Allowed(("group/*",), "status", "why", 500, 400)
    assert entry.covers(Difference("group/a", "status", (500, "x"), (400, "y")))
    assert entry.covers(Difference("group/a", "3:status", (500, "x"), (400, "y")))
    assert not entry.covers(Difference("other/a", "status", (500, "x"), (400, "y")))
    assert not entry.covers(Difference("group/a", "status", (500, "x"), (200, "y")))
    assert not entry.covers(Difference("group/a", "status", (503, "x"), (400, "y")))
    assert not entry.covers(Difference("group/a", "header.content-type", 500, 400))


def test_a_tally_sorts_cases_and_knows_stale_entries() -> None:
    tally = Tally()
    tally.add(Case("group/a", (STEP,)), [])
    tally.add(Case("group/b", (STEP,)), [Difference("group/b", "body.x", 1, 2)])
    tally.add(Case("json_values/c", (STEP,)), [Difference("json_values/c", "status", (500, ""), (400, ""))])
    lines = {line.split()[0]: line.split()[1:] for line in tally.table().splitlines()}
    assert lines["json_values"] == ["1", "0", "1", "0"]
    assert lines["all"] == ["3", "1", "1", "1"]
    assert tally.stale
    assert all(entry.path != "status" or "json_values/*" not in entry.cases for entry in tally.stale)
