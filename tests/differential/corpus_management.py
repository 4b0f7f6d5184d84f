"""The management half of the REST corpus: routes and methods, health, metadata, configuration, statistics, repository,
trace and logging settings, shared memory. Series that change state end by restoring it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

from tests.differential.build import SIMPLE, ask, infer, tensor
from tests.differential.exchange import Case, Http

Named = Iterator[tuple[Any, ...]]


def cases() -> Iterator[Case]:
    for group in (_routes, _documents, _statistics, _repository, _control, _trace, _logging, _shared_memory):
        for name, *steps in group():
            yield Case(f"{group.__name__.strip('_')}/{name}", tuple(steps))


def get(path: str, **more: Any) -> Http:
    return Http("GET", path, **more)


def post(path: str, body: Any = b"", **more: Any) -> Http:
    return Http("POST", path, body if body is None or isinstance(body, bytes) else json.dumps(body).encode(), **more)


PATHS = (
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/m",
    "/v2/models/m/versions/1",
    "/v2/models/m/ready",
    "/v2/models/m/versions/1/ready",
    "/v2/models/m/config",
    "/v2/models/m/stats",
    "/v2/models/stats",
    "/v2/models/m/infer",
    "/v2/models/m/generate",
    "/v2/trace/setting",
    "/v2/logging",
    "/v2/repository/index",
    "/v2/repository/models/m/load",
    "/v2/systemsharedmemory/status",
    "/v2/systemsharedmemory/region/r/register",
    "/v2/cudasharedmemory/status",
)
GET_AND_POST = ("/v2/trace/setting", "/v2/logging")
POST_ONLY = ("infer", "generate", "index", "load", "register")


def _routes() -> Named:
    for path in PATHS:
        for method in ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"):
            allowed = ("POST",) if path.endswith(POST_ONLY) else ("GET",)
            if path not in GET_AND_POST and method not in allowed:
                yield f"{method} {path}", Http(method, path, b"" if method in ("POST", "PUT", "PATCH") else None)
    for path in (
        "/",
        "/v1",
        "/v2/nope",
        "/v2/models",
        "/v2/models/",
        "/v2/models/m/nope",
        "/v2/models/m/versions",
        "/v2/models/m/versions/1/nope",
        "/v2/models/m/versions/1/trace/setting",
        "/v2/health",
        "/v2/health/",
        "/v2/health/live/",
        "/v2/",
        "/V2",
        "/v2//health/live",
        "/v2/models/m/",
        "/v2/repository",
        "/metrics",
        "/v2?x=y",
        "/v2/health/live?x",
    ):
        yield f"GET {path}", get(path)


def _documents() -> Named:
    yield "server", get("/v2")
    yield "live", get("/v2/health/live")
    yield "ready", get("/v2/health/ready")
    for model in (
        "m",
        "add_sub",
        "flat",
        "fixed",
        "deep",
        "text",
        "id_bf16",
        "id_bytes",
        "labelled",
        "ensemble",
        "optional",
        "reshaped",
        "versions",
        "prio",
        "cached",
    ):
        yield f"metadata {model}", get(f"/v2/models/{model}")
        yield f"config {model}", get(f"/v2/models/{model}/config")
    for what, end in {"metadata": "", "config": "/config", "ready": "/ready", "stats": "/stats"}.items():
        yield f"{what} of version 1", get(f"/v2/models/untouched/versions/1{end}")
        yield f"{what} of version 3", get(f"/v2/models/versions/versions/3{end}")
        yield f"{what} of version 2", get(f"/v2/models/versions/versions/2{end}")
        yield f"{what} of version abc", get(f"/v2/models/untouched/versions/abc{end}")
        yield f"{what} of nobody", get(f"/v2/models/nobody{end}", names=("nobody",))
        yield f"{what} of sleeper", get(f"/v2/models/sleeper{end}", names=("sleeper",))
        yield f"{what} of an escaped name", get(f"/v2/models/%75ntouched{end}")
    yield "ready m", get("/v2/models/m/ready")


def _statistics() -> Named:
    two = infer(ask(tensor(shape=(2, 3), data=[1, 2, 3, 4, 5, 6])), "counted")
    stats = get("/v2/models/counted/stats")
    bad = infer(ask(tensor(data=[1])), "counted")
    nine = infer(ask(tensor(shape=(9, 1), data=[1] * 9)), "counted")
    yield "zero, four of two rows, refusals", stats, two, two, two, two, stats, bad, nine, stats
    index = tensor("index", (1, 1), "INT64", data=[99])
    yield "failures", infer(ask(index), "table"), get("/v2/models/table/stats")
    yield (
        "cache",
        infer(ask(tensor(data=[3, 2, 1])), "cached"),
        infer(ask(tensor(data=[3, 2, 1])), "cached"),
        get("/v2/models/cached/stats"),
    )
    yield "versions", get("/v2/models/versions/stats")


def _repository() -> Named:
    index = "/v2/repository/index"
    yield "index", post(index)
    yield "index without a length", post(index, None)
    yield "index object", post(index, {})
    yield "index ready", post(index, {"ready": True})
    yield "index not only ready", post(index, {"ready": False})
    yield "index unknown keys", post(index, {"foo": 1})
    for name, odd in {"text": "true", "int": 1, "null": None}.items():
        yield f"index ready {name}", post(index, {"ready": odd}, names=("ready",))
    yield "index list", post(index, [])
    yield "index broken", post(index, b"{")
    yield "index of a repository", post("/v2/repository/r/index")


def _control() -> Named:
    def load(model: str = "managed", body: Any = b"", **more: Any) -> Http:
        return post(f"/v2/repository/models/{model}/load", body, **more)

    def unload(model: str = "managed", body: Any = b"") -> Http:
        return post(f"/v2/repository/models/{model}/unload", body)

    def override(**keys: Any) -> dict[str, Any]:
        return {"parameters": {"config": json.dumps(keys)}}

    config = get("/v2/models/managed/config")
    ready = get("/v2/models/managed/ready")
    index = post("/v2/repository/index")
    tensors = {
        "input": [{"name": "INPUT0", "data_type": "TYPE_FP32", "dims": [-1]}],
        "output": [{"name": "OUTPUT0", "data_type": "TYPE_FP32", "dims": ["-1"]}],
    }
    works = infer(ask(SIMPLE), "managed")
    yield "load again", load(), works
    yield "load with an object", load(body={}), works
    yield (
        "load, unload, load",
        load(),
        unload(),
        works,
        config,
        ready,
        get("/v2/models/managed"),
        get("/v2/models/managed/stats"),
        index,
        load(),
        works,
    )
    yield (
        "load a sleeper",
        load("sleeper"),
        infer(ask(SIMPLE), "sleeper"),
        unload("sleeper"),
        infer(ask(SIMPLE), "sleeper"),
    )
    yield "load unknown", load("nobody", says=("failed to load",))
    yield "unload unknown", unload("nobody")
    yield "unload twice", unload(), unload(), load(), works
    yield "unload dependents", unload(body={"parameters": {"unload_dependents": True}}), load(), works
    yield "unload dependents text", unload(body={"parameters": {"unload_dependents": "yes"}}), load()
    whole = {"name": "managed", "max_batch_size": "16", **tensors}
    yield "override", load(body=override(**whole)), config, works, load(), config
    yield "override is no JSON", load(body={"parameters": {"config": "{"}}), works
    yield "override breaks", load(body=override(**{**whole, "max_batch_size": -5})), works, config
    yield "override not a string", load(body={"parameters": {"config": {}}}), works
    yield "unknown parameter", load(body={"parameters": {"foo": "bar"}}, names=("foo",)), works
    yield "parameters list", load(body={"parameters": []}), works
    yield "load broken JSON", load(body=b"{"), works
    yield "file without config", load(body={"parameters": {"file:1/model.x": base64.b64encode(b"x").decode()}}), works
    yield "load in a repository", post("/v2/repository/r/models/managed/load"), works
    yield "unload in a repository", post("/v2/repository/r/models/managed/unload"), works
    yield "load a path", load("..%2Fm")
    yield "load blank", load("%20")


def _trace() -> Named:
    every, one = "/v2/trace/setting", "/v2/models/traced/trace/setting"
    yield "global", get(every)
    yield "of a model", get(one)
    yield "of nobody", get("/v2/models/nobody/trace/setting", names=("nobody",))
    yield "set of nobody", post("/v2/models/nobody/trace/setting", {"trace_rate": "5"}, names=("nobody",))
    yield "set and clear", post(every, {"trace_rate": "5"}), get(one), post(every, {"trace_rate": None}), get(one)
    yield (
        "model's own",
        post(one, {"trace_rate": "7", "trace_level": ["TIMESTAMPS"]}),
        get(every),
        post(one, {"trace_rate": None, "trace_level": None}),
        get(one),
    )
    yield (
        "several",
        post(one, {"trace_rate": "7", "trace_count": "9", "log_frequency": "50"}),
        post(one, {"trace_rate": None, "trace_count": None, "log_frequency": None}),
    )
    for level in (["OFF"], ["TIMESTAMPS", "TENSORS"], ["OFF", "TIMESTAMPS"], ["NOPE"], [], "TIMESTAMPS", [1]):
        yield f"level {level}", post(one, {"trace_level": level}), post(one, {"trace_level": None})
    for key in ("trace_rate", "trace_count", "log_frequency"):
        for chosen in ("x", "", "-1", "-2", "1.5", "99999999999999999999", 5, True, ["5"]):
            yield f"{key} {chosen!r}", post(one, {key: chosen}), post(one, {key: None})
    yield "file", post(one, {"trace_file": "y"})
    yield "mode", post(one, {"trace_mode": "opentelemetry"}), get(one)
    yield "unknown key", post(one, {"foo": "1"})
    yield "empty body", post(one)
    yield "list", post(one, [])
    yield "broken", post(one, b"{")


def _logging() -> Named:
    path = "/v2/logging"
    yield "get", get(path)
    yield "empty object", post(path, {})
    yield "verbose", post(path, {"log_verbose_level": 1}), get(path), post(path, {"log_verbose_level": 0})
    yield "info off", post(path, {"log_info": False}), get(path), post(path, {"log_info": True})
    yield "null", post(path, {"log_info": None})
    yield "unknown", post(path, {"log_warnings": False})
    yield "file", post(path, {"log_file": "x"})
    yield "empty file", post(path, {"log_file": ""})
    yield "format", post(path, {"log_format": "ISO8601"}), get(path), post(path, {"log_format": "default"})
    yield "format unknown", post(path, {"log_format": "xml"}, names=("log_format",))
    yield "negative", post(path, {"log_verbose_level": -1}, names=("log_verbose_level",))
    for key, chosen in {"log_info": "true", "log_error": 1, "log_verbose_level": "1", "log_format": 5}.items():
        yield f"{key} {chosen!r}", post(path, {key: chosen}, names=(key,)), get(path)
    yield "empty body", post(path)
    yield "list", post(path, [])
    yield "broken", post(path, b"{")


def _shared_memory() -> Named:
    for kind in ("system", "cuda"):
        base = f"/v2/{kind}sharedmemory"
        yield f"{kind} status", get(f"{base}/status")
        yield f"{kind} status of nobody", get(f"{base}/region/nobody/status", names=("nobody",))
        yield f"{kind} register nothing", post(f"{base}/region/r/register", {})
        yield f"{kind} register absent", post(f"{base}/region/r/register", {"key": "/absent", "byte_size": 8})
        yield f"{kind} unregister nobody", post(f"{base}/region/nobody/unregister")
        yield f"{kind} unregister", post(f"{base}/unregister")
    given = tensor(parameters={"shared_memory_region": "nobody", "shared_memory_byte_size": 12})
    yield "infer from nobody", infer(ask(given))
    wanted = [{"name": "OUTPUT0", "parameters": {"shared_memory_region": "nobody", "shared_memory_byte_size": 12}}]
    yield "infer into nobody", infer(ask(SIMPLE, outputs=wanted))
