"""The corpus, infer over REST beyond JSON: binary tensors, raw requests, compression, classification; generate.

Left out, because they end Triton 2.51's process: classification of an output without elements, classification of
BYTES. The traps ask the gateway these.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any, cast

from tests.differential.build import LENGTH, SAMPLES, SIMPLE, ask, blob, infer, sample_blob, tensor
from tests.differential.exchange import Case, Http
from tests.differential.zoo import typed


def cases() -> Iterator[Case]:
    for group in (
        _binary_datatypes,
        _binary,
        _compression,
        _accepting,
        _classification,
        _other_models,
        _generate,
    ):
        for name, *steps in group():
            yield Case(f"{group.__name__.strip('_')}/{name}", tuple(steps))


Named = Iterator[tuple[Any, ...]]


def _binary_datatypes() -> Named:
    flags: dict[str, dict[str, Any]] = {
        "all binary": {"parameters": {"binary_data_output": True}},
        "one binary": {"outputs": [{"name": "OUTPUT0", "parameters": {"binary_data": True}}]},
        "JSON out": {},
    }
    for datatype in SAMPLES:
        data = sample_blob(datatype)
        item = tensor(datatype=datatype, parameters={"binary_data_size": len(data)})
        for name, more in flags.items():
            yield f"{datatype} {name}", infer(ask(item, **more), typed(datatype), data)
        if datatype not in ("FP16", "BF16"):
            plain = tensor(datatype=datatype, data=SAMPLES[datatype])
            yield f"{datatype} JSON in", infer(ask(plain, **flags["all binary"]), typed(datatype))
        shorter = {**item, "shape": [1, 2]}
        yield (
            f"{datatype} shape is less",
            infer(ask(shorter, **flags["all binary"]), typed(datatype), data, names=("INPUT0",)),
        )
        more_shape = {**item, "shape": [1, 4]}
        yield (
            f"{datatype} shape is more",
            infer(ask(more_shape, **flags["all binary"]), typed(datatype), data, names=("INPUT0",)),
        )


def _binary() -> Named:
    data = blob("FP32", [1, 2.5, 0.1])
    item = tensor(parameters={"binary_data_size": 12})
    out: dict[str, Any] = {"parameters": {"binary_data_output": True}}
    yield "one byte more", infer(ask(item), "m", data, b"x", says=("unexpected additional input data",))
    yield "one byte less", infer(ask(item), "m", data[:-1], says=("INPUT0", "expecting 1 additional bytes"))
    yield (
        "size is not the shape's",
        infer(ask(tensor(parameters={"binary_data_size": 8})), "m", data[:8], says=("Expected 12, got 8",)),
    )
    yield "nothing", infer(ask(tensor()), names=("INPUT0",), says=("Input must set only one of the following fields",))
    yield "data and binary", infer(ask({**item, "data": [1, 2, 3]}), "m", data, names=("INPUT0",), says=("only one",))
    for name, binary_size in {
        "text": "12",
        "negative": -1,
        "float": 12.0,
        "null": None,
        "zero": 0,
        "true": True,
    }.items():
        yield f"size {name}", infer(ask(tensor(parameters={"binary_data_size": binary_size})), "m", data)
    text = json.dumps(ask(item)).encode()
    for name, length in {
        "9999": "9999",
        "-1": "-1",
        "abc": "abc",
        "empty": "",
        "float": "10.5",
        "spaced": " 12",
        "plus": "+12",
        "hex": "0x10",
    }.items():
        yield f"length {name}", infer(text + data, headers={LENGTH: length})
    yield "length missing", infer(text + data)
    yield "length too short", infer(text + data, headers={LENGTH: str(len(text) - 1)})
    yield "length too long", infer(text + data, headers={LENGTH: str(len(text) + 1)})
    whole = json.dumps(ask(SIMPLE)).encode()
    yield "length of all JSON", infer(whole, headers={LENGTH: str(len(whole))})
    yield "declared but no length", infer(text)
    yield "raw", infer(data, headers={LENGTH: "0"})
    yield "raw 13 bytes", infer(data + b"x", headers={LENGTH: "0"}, names=("INPUT0",))
    yield "raw empty", infer(b"", headers={LENGTH: "0"})
    yield "raw two inputs", infer(data, "add_sub", headers={LENGTH: "0"}, names=("input",))
    yield "raw BYTES", infer(b"anything \0 at all", "text", headers={LENGTH: "0"})
    yield "raw BYTES variable", infer(b"anything", "id_bytes", headers={LENGTH: "0"})
    yield "raw fixed", infer(data, "fixed", headers={LENGTH: "0"})
    yield "raw fixed wrong", infer(data[:8], "fixed", headers={LENGTH: "0"}, names=("INPUT0",))
    yield "raw unbatched", infer(data[:8], "flat", headers={LENGTH: "0"})
    yield "raw INT8", infer(b"abc", "id_int8", headers={LENGTH: "0"})
    yield "empty out", infer(ask(tensor(shape=(1, 0), data=[]), **out))
    yield "empty in and out", infer(ask(tensor(shape=(1, 0), parameters={"binary_data_size": 0}), **out))
    a = tensor("INPUT0", (1, 2), "INT32", parameters={"binary_data_size": 8})
    b = tensor("INPUT1", (1, 2), "INT32", data=[5, 6])
    eight = blob("INT32", [1, 2])
    yield "mixed in", infer(ask(a, b), "add_sub", eight)
    yield "mixed in, other order", infer(ask(b, a), "add_sub", eight)
    both = {**b, "parameters": {"binary_data_size": 8}}
    del both["data"]
    yield "two blobs", infer(ask(a, both, **out), "add_sub", eight, blob("INT32", [5, 6]))
    yield "two blobs swapped", infer(ask(both, a, **out), "add_sub", blob("INT32", [5, 6]), eight)
    yield (
        "mixed out",
        infer(
            ask(a, b, outputs=[{"name": "OUTPUT0", "parameters": {"binary_data": True}}, {"name": "OUTPUT1"}]),
            "add_sub",
            eight,
        ),
    )
    yield (
        "mixed out, other order",
        infer(
            ask(a, b, outputs=[{"name": "OUTPUT1"}, {"name": "OUTPUT0", "parameters": {"binary_data": True}}]),
            "add_sub",
            eight,
        ),
    )
    for name, elements, size in (
        ("NUL and empty", blob("BYTES", [b"a\0b", b"", b"\xff"]), 3),
        ("too few elements", blob("BYTES", [b"a", b"b"]), 3),
        ("too many elements", blob("BYTES", [b"a"] * 4), 3),
        ("prefix beyond", b"\x09\0\0\0abc", 1),
        ("prefix huge", b"\xff\xff\xff\xffabc", 1),
        ("cut prefix", blob("BYTES", [b"a", b"b"]) + b"\x01\0", 3),
        ("nothing", b"", 3),
    ):
        string = tensor(shape=(1, size), datatype="BYTES", parameters={"binary_data_size": len(elements)})
        yield (
            f"BYTES {name}",
            infer(ask(string, **out), "id_bytes", elements, names=("INPUT0",) if "NUL" not in name else ()),
        )
    yield "BOOL 2", infer(ask(tensor(datatype="BOOL", parameters={"binary_data_size": 3})), "id_bool", b"\0\x01\x02")


def _compression() -> Named:
    body = json.dumps(ask(SIMPLE)).encode()
    packed = gzip.compress(body)
    raw = zlib.compressobj(wbits=-15)
    bodies: dict[str, tuple[str, bytes]] = {
        "gzip": ("gzip", packed),
        "zlib": ("deflate", zlib.compress(body)),
        "identity": ("identity", body),
        "raw deflate": ("deflate", raw.compress(body) + raw.flush()),
        "corrupt gzip": ("gzip", packed[:20] + b"????" + packed[24:]),
        "cut gzip": ("gzip", packed[:-9]),
        "not gzip": ("gzip", body),
        "gzip as deflate": ("deflate", packed),
        "empty gzip": ("gzip", gzip.compress(b"")),
        "br": ("br", body),
        "GZIP": ("GZIP", packed),
        "x-gzip": ("x-gzip", packed),
        "two codings": ("gzip, deflate", packed),
        "empty coding": ("", body),
    }
    for name, (coding, data) in bodies.items():
        yield name, infer(data, headers={"Content-Encoding": coding})
    blobs = blob("FP32", [1, 2.5, 0.1])
    text = json.dumps(
        ask(tensor(parameters={"binary_data_size": 12}), parameters={"binary_data_output": True})
    ).encode()
    yield (
        "gzip binary",
        infer(gzip.compress(text + blobs), headers={"Content-Encoding": "gzip", LENGTH: str(len(text))}),
    )
    long = tensor(shape=(1, 500), data=[0.5] * 500)
    yield (
        "several members",
        infer(gzip.compress(body[:30]) + gzip.compress(body[30:]), headers={"Content-Encoding": "gzip"}),
    )
    yield "long", infer(gzip.compress(json.dumps(ask(long)).encode()), headers={"Content-Encoding": "gzip"})


ACCEPT = (
    "gzip",
    "deflate",
    "gzip, deflate",
    "deflate, gzip",
    "gzip;q=0.5, deflate;q=0.8",
    "gzip;q=0",
    "gzip;q=0, deflate",
    "br",
    "*",
    "identity",
    "gzip, deflate, br",
    "identity;q=1, gzip;q=0.5",
    "GZIP",
    "gzip;q=abc",
    "",
    ",",
)


def _accepting() -> Named:
    big = tensor(shape=(1, 20_000), data=[0.5] * 20_000)
    for accepted in ACCEPT:
        yield f"JSON {accepted}", infer(ask(big), headers={"Accept-Encoding": accepted})
    for accepted in ("gzip", "deflate"):
        yield (
            f"binary {accepted}",
            infer(ask(big, parameters={"binary_data_output": True}), headers={"Accept-Encoding": accepted}),
        )
        yield f"error {accepted}", infer(ask(SIMPLE, id="x"), "nobody", headers={"Accept-Encoding": accepted})
        yield f"metadata {accepted}", Http("GET", "/v2/models/m", headers={"Accept-Encoding": accepted})


def _classification() -> Named:
    def classes(count: Any, model: str = "labelled", *, binary: bool = False, item: Any = None) -> Http:
        parameters = {"classification": count} | ({"binary_data": True} if binary else {})
        given = item or tensor(shape=(2, 3), data=[0.1, 0.9, 0.5, 3, 2, 1])
        return infer(ask(given, outputs=[{"name": "OUTPUT0", "parameters": parameters}]), model)

    for count in (1, 2, 3, 5, 0):
        yield f"{count}", classes(count)
        yield f"{count} binary", classes(count, binary=True)
    for name, odd in cast(
        "dict[str, Any]", {"negative": -1, "text": "2", "float": 1.5, "true": True, "null": None}
    ).items():
        yield name, classes(odd)
    yield "no labels", classes(2, "m")
    yield "ties", classes(3, "m", item=tensor(data=[1, 2, 1]))
    yield "negative values", classes(3, "m", item=tensor(data=[-1.5, -2, -0.25]))
    yield "large values", classes(2, "m", item=tensor(data=[1e10, -1e10, 1e-10]))
    ints = tensor(shape=(1, 4), datatype="INT32", data=[5, -7, 9, 0])
    yield "more than labels", classes(4, "label_ints", item=ints)
    yield "INT64", classes(2, "id_int64", item=tensor(datatype="INT64", data=[2**62, -5, 2**62 + 1]))
    yield "UINT8", classes(2, "id_uint8", item=tensor(datatype="UINT8", data=[255, 0, 7]))
    yield "FP64", classes(2, "id_fp64", item=tensor(datatype="FP64", data=[0.1, 0.2, 1e300]))
    yield "BOOL", classes(2, "id_bool", item=tensor(datatype="BOOL", data=[True, False, True]))
    yield "unbatched", classes(3, "flat", item=tensor(shape=(2, 2), data=[4, 3, 2, 1]))


def _other_models() -> Named:
    index = tensor("index", (2, 1), "INT64", data=[3, 0])
    yield "table", infer(ask(index), "table")
    yield "model fails", infer(ask({**index, "data": [3, 99]}), "table")
    yield "ensemble", infer(ask(tensor("RAW", (2, 2), data=[1, 2, 3, 4]), id="e"), "ensemble")
    yield (
        "ensemble binary",
        infer(ask(tensor("RAW", (2, 2), data=[1, 2, 3, 4]), parameters={"binary_data_output": True}), "ensemble"),
    )
    yield "ensemble wrong input", infer(ask(tensor("INPUT0", (1, 2), data=[1, 2])), "ensemble", names=("INPUT0",))
    yield "ensemble batch 9", infer(ask(tensor("RAW", (9, 1), data=[1] * 9)), "ensemble", says=("<= 8",))
    yield (
        "ensemble output",
        infer(ask(tensor("RAW", (1, 1), data=[1]), outputs=[{"name": "half_way"}]), "ensemble", names=("half_way",)),
    )
    yield "reshape", infer(ask(tensor(shape=(3, 1), data=[1, 2, 3])), "reshaped")
    yield "reshape wrong", infer(ask(tensor(shape=(3,), data=[1, 2, 3])), "reshaped", says=("unexpected shape",))
    yield "cached", infer(ask(SIMPLE), "cached"), infer(ask(SIMPLE), "cached"), infer(ask(SIMPLE, id="b"), "cached")


def _generate() -> Named:
    def generate(body: Any, model: str = "text", verb: str = "generate", **headers: str) -> Http:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {name.replace("_", "-"): text for name, text in headers.items()}
        return Http("POST", f"/v2/models/{model}/{verb}", data, sent)

    yield "text", generate({"INPUT0": "hello"})
    yield "text with id", generate({"INPUT0": "hello", "id": "7"})
    yield "parameters", generate({"INPUT0": "hello", "temperature": 0.5, "parameters": {"top": 3}})
    yield "list", generate({"INPUT0": ["hello"]})
    yield "two elements", generate({"INPUT0": ["a", "b"]}, "id_bytes")
    yield "number", generate({"INPUT0": 1.5}, "m")
    yield "numbers", generate({"INPUT0": [1, 2.5, 3]}, "m")
    yield "bool", generate({"INPUT0": True}, "id_bool")
    yield "int", generate({"INPUT0": 5}, "id_int64")
    yield "wrong type", generate({"INPUT0": 5})
    yield "nested list", generate({"INPUT0": [["a"]]}, "id_bytes")
    yield "missing input", generate({"x": 5})
    yield "empty object", generate({})
    yield "no JSON", generate(b"{")
    yield "list body", generate([])
    yield "unknown model", generate({"INPUT0": "a"}, "nobody")
    yield "unknown version", generate({"INPUT0": "a"}, "text/versions/9")
    yield "version", generate({"INPUT0": "a"}, "text/versions/1")
    yield "compressed", generate(gzip.compress(b'{"INPUT0":"a"}'), Content_Encoding="gzip")
    yield "stream", generate({"INPUT0": "hello"}, verb="generate_stream", Accept="text/event-stream")
    yield "stream without accept", generate({"INPUT0": "hello"}, verb="generate_stream")
    yield "stream wrong type", generate({"INPUT0": 5}, verb="generate_stream")
    yield "stream unknown model", generate({"INPUT0": "a"}, "nobody", verb="generate_stream")
    yield "GET", Http("GET", "/v2/models/text/generate")
