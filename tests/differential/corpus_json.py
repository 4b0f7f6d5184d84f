"""The corpus, infer over REST as JSON: values, datatypes, structure, shapes, names, parameters, versions.

Case names are `group/what`; the allow-list refers to them. `says` are words that both servers must answer with.
Left out, because it ends Triton 2.51's process: shape [1, 2^40] with little data. The traps ask the gateway that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

from tests.differential.build import SAMPLES, SIMPLE, ask, blob, infer, tensor
from tests.differential.exchange import Case, Http
from tests.differential.zoo import typed


def cases() -> Iterator[Case]:
    for group in (
        _json_values,
        _json_datatypes,
        _json_structure,
        _shapes,
        _inputs_and_outputs,
        _parameters,
        _versions,
    ):
        for name, *steps in group():
            yield Case(f"{group.__name__.strip('_')}/{name}", tuple(steps))


Named = Iterator[tuple[Any, ...]]


def _json_values() -> Named:
    yield "plain", infer(ask(SIMPLE, id="7"))
    yield "no id", infer(ask(SIMPLE))
    yield "empty id", infer(ask(SIMPLE, id=""))
    yield "long id", infer(ask(SIMPLE, id="é" * 3000))
    yield "id with escapes", infer(ask(SIMPLE, id='a"b\\c\n\u0001/\u2028'))
    for name, wrong in cast("dict[str, Any]", {"int": 7, "null": None, "list": [], "true": True}).items():
        yield f"id {name}", infer(ask(SIMPLE, id=wrong), names=("id",))
    for name, data in {"nested": [[1, 2], [3, 4]], "flat": [1, 2, 3, 4], "irregular": [[1], [2, 3, 4]]}.items():
        yield f"data {name}", infer(ask(tensor(shape=(2, 2), data=data)))
    yield "data very nested", infer(ask(tensor(data=[[[[[1, 2, 3]]]]])))
    yield "data short", infer(ask(tensor(data=[1, 2])), names=("INPUT0",))
    yield "data long", infer(ask(tensor(data=[1, 2, 3, 4])), names=("INPUT0",))
    yield "data empty for 3", infer(ask(tensor(data=[])), names=("INPUT0",))
    yield "scalar for one", infer(ask(tensor(shape=(1, 1), data=5)), names=("INPUT0",))
    yield "object as data", infer(ask(tensor(data={"a": 1})), names=("INPUT0",))
    yield "string as data", infer(ask(tensor(data="123")), names=("INPUT0",))
    yield "null as data", infer(ask(tensor(data=None)), names=("INPUT0",))
    yield "object among elements", infer(ask(tensor(data=[1, {}, 3])), names=("INPUT0",))
    yield "NaN and infinities", infer(ask(tensor(data=[float("nan"), float("inf"), float("-inf")])))
    yield "beyond float", infer(b'{"inputs":[{"name":"INPUT0","shape":[1,2],"datatype":"FP32","data":[1e39,-1e39]}]}')
    yield (
        "beyond double",
        infer(b'{"inputs":[{"name":"INPUT0","shape":[1,1],"datatype":"FP32","data":[1e400]}]}', names=("1e400",)),
    )
    yield "negative zero", infer(b'{"inputs":[{"name":"INPUT0","shape":[1,1],"datatype":"FP32","data":[-0.0]}]}')
    yield "tiny", infer(ask(tensor(data=[1e-45, 1e-46, -1e-40])))
    yield "integers for floats", infer(ask(tensor(data=[1, -2, 2**24 + 1])))
    yield "many elements", infer(ask(tensor(shape=(8, 500), data=[x / 7 for x in range(4000)])))
    yield (
        "exponents",
        infer(b'{"inputs":[{"name":"INPUT0","shape":[1,4],"datatype":"FP32","data":[1E2,1e+2,1.5e-3,-1E-2]}]}'),
    )


WRONG: dict[str, Any] = {
    "string": "1",
    "true": True,
    "null": None,
    "float": 1.5,
    "whole float": 1.0,
    "int": 1,
    "negative": -1,
    "list": [],
    "over 8": 300,
    "over 16": 70_000,
    "over 32": 2**33,
    "over 64": 2**64,
    "over all": 10**30,
}


def _json_datatypes() -> Named:
    for datatype, values in SAMPLES.items():
        model = typed(datatype)
        good = tensor(datatype=datatype, data=values)
        words = (f"receiving {datatype} data via JSON is not supported",) if datatype in ("FP16", "BF16") else ()
        yield f"{datatype} sample", infer(ask(good), model, says=words)
        yield f"{datatype} lower case", infer(ask({**good, "datatype": datatype.lower()}), model, names=("INPUT0",))
        if datatype in ("FP16", "BF16"):
            continue
        for name, wrong in WRONG.items():
            right = values[0] if name != "list" else wrong
            data = [wrong, right, right] if name != "list" else [[wrong], [values[0]], values[1:]]
            yield f"{datatype} {name}", infer(ask(tensor(datatype=datatype, data=data)), model)
    yield "FP99", infer(ask(tensor(datatype="FP99", data=[1, 2, 3])), says=("INPUT0",))
    yield "STRING", infer(ask(tensor(datatype="STRING", data=["1", "2", "3"])), says=("INPUT0",))
    yield "TYPE_FP32", infer(ask(tensor(datatype="TYPE_FP32", data=[1, 2, 3])), says=("INPUT0",))
    yield (
        "mismatch",
        infer(ask(tensor(datatype="INT32", data=[1, 2, 3])), says=("data-type is 'INT32'", "expects 'FP32'")),
    )
    yield "mismatch BYTES", infer(ask(tensor(datatype="BYTES", data=["1", "2", "3"])), says=("expects 'FP32'",))
    for name, odd in cast("dict[str, Any]", {"int": 5, "null": None, "list": ["FP32"]}).items():
        yield f"datatype {name}", infer(ask(tensor(datatype=odd, data=[1, 2, 3])), names=("datatype",))
    yield (
        "surrogates",
        infer(
            b'{"inputs":[{"name":"INPUT0","shape":[1,2],"datatype":"BYTES","data":["\\ud83d\\ude00","\\u00e9"]}]}',
            "id_bytes",
        ),
    )
    yield (
        "not UTF-8 out",
        infer(
            ask(tensor(shape=(1, 1), datatype="BYTES", parameters={"binary_data_size": 6})),
            "id_bytes",
            blob("BYTES", [b"\xff\xfe"]),
        ),
    )


def _json_structure() -> Named:
    body = json.dumps(ask(SIMPLE)).encode()
    yield "unknown keys", infer({**ask(SIMPLE), "model_name": "x", "foo": [1, {"a": 2}]})
    yield "unknown keys in the input", infer(ask({**SIMPLE, "foo": 1, "byte_size": 12}))
    for cut in (1, 10, len(body) // 2, len(body) - 1):
        yield f"cut at {cut - len(body)}", infer(body[:cut])
    yield "garbage after", infer(body + b"x")
    yield "two objects", infer(body + body)
    yield "space around", infer(b" \n\t" + body + b"\r\n ")
    yield "BOM", infer(b"\xef\xbb\xbf" + body)
    for name, text in {"list": b"[]", "null": b"null", "string": b'"x"', "number": b"1", "empty object": b"{}"}.items():
        yield f"body {name}", infer(text)
    yield "body empty", Http("POST", "/v2/models/m/infer", b"")
    yield "no body", Http("POST", "/v2/models/m/infer")
    yield "not UTF-8", infer(b'{"id":"\xff","inputs":[]}')
    for name in ("name", "shape", "datatype", "data"):
        short = {key: item for key, item in SIMPLE.items() if key != name}
        yield f"input without {name}", infer(ask(short), names=(name,))
    for name, odd in cast("dict[str, Any]", {"null": None, "object": {}, "string": "x", "number": 3}).items():
        yield f"inputs {name}", infer({"inputs": odd}, names=("inputs",))
        yield f"input {name}", infer({"inputs": [odd]}, names=("input",))
    yield "inputs empty", infer({"inputs": []})
    yield "no inputs", infer({"id": "1"}, names=("inputs",))
    yield "name number", infer(ask({**SIMPLE, "name": 5}), names=("name",))
    yield "name empty", infer(ask({**SIMPLE, "name": ""}))
    yield "comments", infer(b"/* x */" + body)
    yield "trailing comma", infer(body[:-1] + b",}")
    yield "single quotes", infer(body.replace(b'"', b"'"))
    yield (
        "depth",
        infer(
            b'{"inputs":[{"name":"INPUT0","shape":[1,3],"datatype":"FP32","data":'
            + b"[" * 90
            + b"1,2,3"
            + b"]" * 90
            + b"}]}"
        ),
    )
    yield (
        "depth beyond",
        infer(
            b'{"inputs":[{"name":"INPUT0","shape":[1,3],"datatype":"FP32","data":'
            + b"[" * 2000
            + b"1,2,3"
            + b"]" * 2000
            + b"}]}"
        ),
    )
    for kind in ("text/xml", "application/json; charset=utf-8", "application/octet-stream", "x"):
        yield f"content type {kind}", infer(ask(SIMPLE), headers={"Content-Type": kind})
    yield "query string", Http("POST", "/v2/models/m/infer?a=b&c", body)
    yield "escaped name", infer(ask(SIMPLE), "%6d")


def _shapes() -> Named:
    odd = {
        "negative": ([1, -3], ("shape",)),
        "float": ([1, 3.0], ("shape",)),
        "string": ([1, "3"], ("shape",)),
        "null": (None, ("shape",)),
        "number": (3, ("shape",)),
        "text": ("[1,3]", ("shape",)),
        "nested": ([[1, 3]], ("shape",)),
        "true": ([True, 3], ("shape",)),
        "beyond 64 bits": ([1, 2**64], ("shape",)),
    }
    for name, (shape, names) in odd.items():
        yield name, infer(ask(tensor(shape=shape, data=[1, 2, 3])), names=names)
    yield "zero elements", infer(ask(tensor(shape=(1, 0), data=[])))
    yield "zero rows", infer(ask(tensor(shape=(0, 3), data=[])))
    yield "no dims", infer(ask(tensor(shape=(), data=[1])), says=("has no shape but model requires batch dimension",))
    yield "rank 1", infer(ask(tensor(shape=(3,), data=[1, 2, 3])), says=("unexpected shape for input 'INPUT0'",))
    yield "rank 3", infer(ask(tensor(shape=(1, 3, 1), data=[1, 2, 3])), says=("unexpected shape for input 'INPUT0'",))
    yield "batch 8", infer(ask(tensor(shape=(8, 1), data=list(range(8)))))
    yield "batch 9", infer(ask(tensor(shape=(9, 1), data=list(range(9)))), says=("batch-size must be <= 8",))
    yield "element overflow", infer(ask(tensor(shape=(2**40, 2**40), data=[])), names=("INPUT0",))
    yield (
        "element overflow binary",
        infer(ask(tensor(shape=(2**40, 2**40), parameters={"binary_data_size": 4})), "m", b"abcd", names=("INPUT0",)),
    )
    yield "byte overflow", infer(ask(tensor(shape=(1, 2**62), data=[])), names=("INPUT0",))
    yield "fixed right", infer(ask(tensor(shape=(2, 3), data=list(range(6)))), "fixed")
    yield (
        "fixed wrong",
        infer(ask(tensor(shape=(1, 4), data=[1, 2, 3, 4])), "fixed", says=("unexpected shape", "[-1,3]", "[1,4]")),
    )
    yield "fixed batch 5", infer(ask(tensor(shape=(5, 3), data=list(range(15)))), "fixed", says=("<= 4",))
    yield "unbatched", infer(ask(tensor(shape=(5, 2), data=list(range(10)))), "flat")
    yield "unbatched empty", infer(ask(tensor(shape=(0, 2), data=[])), "flat")
    yield "unbatched wrong", infer(ask(tensor(shape=(5, 3), data=list(range(15)))), "flat", says=("unexpected shape",))
    yield "unbatched rank", infer(ask(tensor(shape=(2,), data=[1, 2])), "flat", says=("unexpected shape",))
    deep = tensor(shape=(2, 2, 3, 2), datatype="INT32", data=list(range(24)))
    yield "deep", infer(ask(deep), "deep")
    yield "deep nested", infer(ask({**deep, "data": [[[[1, 2]] * 3] * 2] * 2}), "deep")
    yield "deep wrong", infer(ask({**deep, "shape": [2, 3, 2, 2]}), "deep", says=("unexpected shape",))


def _inputs_and_outputs() -> Named:
    a = tensor("INPUT0", (2, 2), "INT32", data=[1, 2, 3, 4])
    b = tensor("INPUT1", (2, 2), "INT32", data=[5, 6, 7, 8])
    yield "both", infer(ask(a, b), "add_sub")
    yield "swapped", infer(ask(b, a), "add_sub")
    yield "one output", infer(ask(a, b, outputs=[{"name": "OUTPUT1"}]), "add_sub")
    yield "outputs swapped", infer(ask(a, b, outputs=[{"name": "OUTPUT1"}, {"name": "OUTPUT0"}]), "add_sub")
    yield "outputs empty", infer(ask(a, b, outputs=[]), "add_sub")
    yield (
        "unknown output",
        infer(ask(a, b, outputs=[{"name": "Y"}]), "add_sub", says=("unexpected inference output 'Y'",)),
    )
    yield "output twice", infer(ask(a, b, outputs=[{"name": "OUTPUT0"}] * 2), "add_sub")
    yield "output without name", infer(ask(a, b, outputs=[{}]), "add_sub", names=("name",))
    for name, odd in cast("dict[str, Any]", {"null": None, "object": {}, "string": "OUTPUT0"}).items():
        yield f"outputs {name}", infer(ask(a, b, outputs=odd), "add_sub", names=("outputs",))
    yield "output number", infer(ask(a, b, outputs=[1]), "add_sub", names=("output",))
    yield (
        "output unknown keys",
        infer(ask(a, b, outputs=[{"name": "OUTPUT0", "foo": 1, "datatype": "INT32"}]), "add_sub"),
    )
    yield "missing", infer(ask(a), "add_sub", says=("expected 2 inputs but got 1 inputs", "INPUT1", "missing"))
    yield "missing other", infer(ask(b), "add_sub", says=("expected 2 inputs but got 1 inputs", "INPUT0"))
    yield "unknown", infer(ask(a, {**b, "name": "X"}), "add_sub", says=("unexpected inference input 'X'",))
    yield "one too many", infer(ask(a, b, {**b, "name": "X"}), "add_sub", says=("X",))
    yield "unknown alone", infer(ask({**SIMPLE, "name": "X"}), names=("X",))
    yield "case differs", infer(ask({**SIMPLE, "name": "input0"}), names=("input0",))
    yield "twice", infer(ask(a, b, a), "add_sub", says=("input 'INPUT0' already exists in request",))
    yield "twice alone", infer(ask(SIMPLE, SIMPLE), says=("input 'INPUT0' already exists in request",))
    yield "batches differ", infer(ask(a, tensor("INPUT1", (1, 2), "INT32", data=[5, 6])), "add_sub", names=("INPUT1",))
    yield "optional given", infer(ask(tensor(shape=(1, 1), data=[1]), tensor("INPUT1", (1, 1), data=[5])), "optional")
    yield "optional left out", infer(ask(tensor(shape=(1, 1), data=[1])), "optional")
    yield "optional, none given", infer(ask(), "optional", says=("between 1 and 2 but got 0", "INPUT0"))
    yield "required left out", infer(ask(tensor("INPUT1", (1, 1), data=[1])), "optional", names=("INPUT0",))
    yield (
        "optional and too many",
        infer(
            ask(*(tensor(name, (1, 1), data=[1]) for name in ("INPUT0", "INPUT1", "X"))),
            "optional",
            names=("X",),
        ),
    )


def _parameters() -> Named:
    values = {"float": 1.5, "string": "x", "int": 3, "true": True, "negative": -4, "empty string": "", "big": 2**62}
    for name, good in values.items():
        yield f"custom {name}", infer(ask(SIMPLE, parameters={"a": good}))
    for name, odd in cast("dict[str, Any]", {"object": {}, "null": None, "list": [1]}).items():
        yield f"custom {name}", infer(ask(SIMPLE, parameters={"a": odd}), names=("a",))
        yield f"parameters {name}", infer(ask(SIMPLE, parameters=odd))
    yield "parameters string", infer(ask(SIMPLE, parameters="x"), names=("parameters",))
    yield "triton_x", infer(ask(SIMPLE, parameters={"triton_x": 1}), says=("triton_",))
    yield "headers", infer(ask(SIMPLE, parameters={"headers": "x"}))
    for name in ("priority", "timeout"):
        for kind, chosen in {
            "0": 0,
            "1": 1,
            "99": 10_000_000,
            "negative": -1,
            "text": "5",
            "float": 1.5,
            "true": True,
        }.items():
            yield (
                f"{name} {kind}",
                infer(ask(SIMPLE, parameters={name: chosen}), names=(name,) if chosen in (-1, "5", 1.5) else ()),
            )
            yield f"{name} {kind} with levels", infer(ask(SIMPLE, parameters={name: chosen or 9}), "prio")
    for kind, chosen in {
        "int": 7,
        "text": "abc",
        "0": 0,
        "empty": "",
        "float": 1.5,
        "true": True,
        "negative": -1,
    }.items():
        yield f"sequence_id {kind}", infer(ask(SIMPLE, parameters={"sequence_id": chosen}))
    sequence = {"sequence_id": 7, "sequence_start": True, "sequence_end": False}
    yield "sequence", infer(ask(SIMPLE, parameters=sequence))
    yield (
        "sequence_start text",
        infer(ask(SIMPLE, parameters={**sequence, "sequence_start": "true"}), names=("sequence_start",)),
    )
    yield "sequence_end int", infer(ask(SIMPLE, parameters={**sequence, "sequence_end": 1}), names=("sequence_end",))
    for kind, chosen in {"true": True, "false": False, "text": "true", "int": 1, "null": None}.items():
        yield f"binary_data_output {kind}", infer(ask(SIMPLE, parameters={"binary_data_output": chosen}))
        outputs = [{"name": "OUTPUT0", "parameters": {"binary_data": chosen}}]
        yield f"binary_data {kind}", infer(ask(SIMPLE, outputs=outputs))
    yield (
        "binary_data_output and a plain output",
        infer(ask(SIMPLE, parameters={"binary_data_output": True}, outputs=[{"name": "OUTPUT0"}])),
    )
    yield (
        "binary_data_output false and binary_data",
        infer(
            ask(
                SIMPLE,
                parameters={"binary_data_output": False},
                outputs=[{"name": "OUTPUT0", "parameters": {"binary_data": True}}],
            )
        ),
    )
    yield "input parameter", infer(ask({**SIMPLE, "parameters": {"foo": 1}}))
    yield "output parameter", infer(ask(SIMPLE, outputs=[{"name": "OUTPUT0", "parameters": {"foo": 1}}]))
    yield "input parameters null", infer(ask({**SIMPLE, "parameters": None}))
    yield "input parameters list", infer(ask({**SIMPLE, "parameters": []}))


def _versions() -> Named:
    yield "1", infer(ask(SIMPLE), version="1")
    yield "2", infer(ask(SIMPLE), version="2", says=("version 2 is not found",))
    yield "abc", infer(ask(SIMPLE), version="abc")
    yield "-1", infer(ask(SIMPLE), version="-1")
    yield "01", infer(ask(SIMPLE), version="01")
    yield "beyond 64 bits", infer(ask(SIMPLE), version="99999999999999999999")
    for version in ("", "1", "2", "3"):
        yield f"of several {version}", infer(ask(SIMPLE), "versions", version=version)
    yield "unknown model", infer(ask(SIMPLE), "nobody", names=("nobody",))
    yield "unknown model and version", infer(ask(SIMPLE), "nobody", version="1", names=("nobody",))
    yield "unloaded", infer(ask(SIMPLE), "sleeper", names=("sleeper",))
    yield "trailing slash", Http("POST", "/v2/models/m/infer/", json.dumps(ask(SIMPLE)).encode())
    yield "no version", Http("POST", "/v2/models/m/versions//infer", json.dumps(ask(SIMPLE)).encode())
