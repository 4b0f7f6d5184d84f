"""The gRPC half of the corpus: infer raw and typed, every other method, streams, health, bytes that are no message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

from tritonclient.grpc import service_pb2 as pb

from tests.differential.build import CONTENTS, SAMPLES, add, blob, call, request, sample_blob, simple
from tests.differential.exchange import Case, Grpc, Http
from tests.differential.zoo import typed

Named = Iterator[tuple[Any, ...]]


def cases() -> Iterator[Case]:
    for group in (
        _grpc_datatypes,
        _grpc_contents,
        _grpc_shapes,
        _grpc_parameters,
        _grpc_models,
        _grpc_bytes,
        _grpc_documents,
        _grpc_control,
        _grpc_settings,
        _grpc_shared_memory,
        _grpc_stream,
        _grpc_other,
        _failing_load,
    ):
        for name, *steps in group():
            yield Case(f"{group.__name__.strip('_')}/{name}", tuple(steps))


def contents(datatype: str) -> dict[str, Any]:
    values = SAMPLES[datatype]
    return {CONTENTS[datatype]: [text.encode() for text in values] if datatype == "BYTES" else values}


def _grpc_datatypes() -> Named:
    for datatype in SAMPLES:
        model, data = typed(datatype), sample_blob(datatype)
        yield f"{datatype} raw", call(add(request(model, raw=[data]), datatype=datatype))
        yield (
            f"{datatype} shape is more",
            call(add(request(model, raw=[data]), shape=(1, 4), datatype=datatype), names=("INPUT0",)),
        )
        yield (
            f"{datatype} shape is less",
            call(add(request(model, raw=[data]), shape=(1, 2), datatype=datatype), names=("INPUT0",)),
        )
        if datatype in CONTENTS:
            yield f"{datatype} typed", call(add(request(model), datatype=datatype, **contents(datatype)))
            yield (
                f"{datatype} typed and one more",
                call(add(request(model), shape=(1, 2), datatype=datatype, **contents(datatype)), names=("INPUT0",)),
            )
        for other, kind in (("INT32", "int_contents"), ("FP32", "fp32_contents"), ("BYTES", "bytes_contents")):
            if CONTENTS.get(datatype) != kind:
                wrong: list[Any] = [b"a"] * 3 if other == "BYTES" else [1, 2, 3]
                yield (
                    f"{datatype} as {kind}",
                    call(add(request(model), datatype=datatype, **cast("Any", {kind: wrong})), names=("INPUT0",)),
                )
    for datatype, big in {"INT8": [300], "INT16": [70_000], "UINT8": [300], "UINT16": [70_000]}.items():
        yield (
            f"{datatype} overflow",
            call(
                add(request(typed(datatype)), shape=(1, 1), datatype=datatype, **cast("Any", {CONTENTS[datatype]: big}))
            ),
        )


def _grpc_contents() -> Named:
    data = blob("FP32", [1, 2.5, 0.1])
    yield "raw", call(simple())
    yield "raw with id", call(simple(request_id="7"))
    yield (
        "raw and typed",
        call(add(request(raw=[data]), fp32_contents=[1, 2, 3]), says=("contents field must not be specified",)),
    )
    yield "neither", call(add(request()), says=("unable to find data for input tensor 'INPUT0'",))
    yield "extra raw", call(add(request(raw=[data, b"x"])))
    yield "raw too short", call(add(request(raw=[data[:-1]])), names=("INPUT0",))
    yield "raw too long", call(add(request(raw=[data + b"x"])), names=("INPUT0",))
    yield "raw empty for three", call(add(request(raw=[b""])), names=("INPUT0",))
    yield "two kinds", call(add(request(), fp32_contents=[1, 2, 3], int_contents=[1]), names=("INPUT0",))
    yield "NaN", call(add(request(), fp32_contents=[float("nan"), float("inf"), float("-inf")]))
    yield "no elements", call(add(request(raw=[b""]), shape=(1, 0)))
    yield "no elements typed", call(add(request(), shape=(1, 0)))
    two = {"raw": [blob("INT32", [1, 2]), blob("INT32", [3, 4])]}
    for names in (("INPUT0", "INPUT1"), ("INPUT1", "INPUT0")):
        message = request("add_sub", raw=two["raw"])
        for name in names:
            add(message, name, (1, 2), "INT32")
        yield f"two inputs {names[0]} first", call(message)
        for wanted in (["OUTPUT1"], ["OUTPUT1", "OUTPUT0"], ["OUTPUT0", "OUTPUT0"], ["nope"], [""]):
            asked = pb.ModelInferRequest()
            asked.CopyFrom(message)
            for name in wanted:
                asked.outputs.add(name=name)
            yield f"outputs {','.join(wanted)}, {names[0]} first", call(asked)
    message = add(request("add_sub", raw=two["raw"][:1]), "INPUT0", (1, 2), "INT32")
    yield "missing input", call(message, says=("expected 2 inputs but got 1", "INPUT1"))
    yield "fewer raw than inputs", call(add(message, "INPUT1", (1, 2), "INT32"), names=("INPUT1",))
    mixed = add(add(request("add_sub"), "INPUT0", (1, 2), "INT32", int_contents=[1, 2]), "INPUT1", (1, 2), "INT32")
    yield "one typed, one without", call(mixed, says=("INPUT1",))
    mixed.raw_input_contents.append(two["raw"][0])
    yield "one typed, one raw", call(mixed)
    yield "unknown input", call(add(request(raw=[data]), "X"), names=("X",))
    yield "input twice", call(add(simple()), names=("INPUT0",))
    yield "no inputs", call(request())
    yield "input without a name", call(add(request(raw=[data]), ""))
    for name, elements, size in (
        ("NUL and empty", blob("BYTES", [b"a\0b", b"", b"\xff"]), 3),
        ("too few", blob("BYTES", [b"a", b"b"]), 3),
        ("too many", blob("BYTES", [b"a"] * 4), 3),
        ("prefix beyond", b"\x09\0\0\0abc", 1),
        ("cut prefix", b"\x01\0", 1),
    ):
        words = () if "NUL" in name else ("INPUT0",)
        yield (
            f"BYTES {name}",
            call(add(request("id_bytes", raw=[elements]), shape=(1, size), datatype="BYTES"), names=words),
        )
    for datatype in ("fp32", "FP99", "", "INT32", "BYTES"):
        yield f"datatype {datatype!r}", call(add(request(raw=[data]), datatype=datatype), names=("INPUT0",))
    for count in (1, 2, 0, -1):
        wanted_classes = add(request("labelled", raw=[data]))
        wanted_classes.outputs.add(name="OUTPUT0").parameters["classification"].int64_param = count
        yield f"classification {count}", call(wanted_classes)
    wanted_classes.outputs[0].parameters["classification"].string_param = "2"
    yield "classification text", call(wanted_classes)
    empty = request("id_bytes", raw=[b""])
    yield "empty BYTES output", call(add(empty, shape=(1, 0), datatype="BYTES"))


def _grpc_shapes() -> Named:
    def shaped(shape: list[int], model: str = "m", count: int | None = None) -> pb.ModelInferRequest:
        elements = 1
        for dim in shape:
            elements *= max(dim, 0)
        return add(request(model, raw=[bytes(4 * (elements if count is None else count))]), shape=shape)

    yield "batch 8", call(shaped([8, 1]))
    yield "batch 9", call(shaped([9, 1]), says=("batch-size must be <= 8",))
    yield "zero rows", call(shaped([0, 3]))
    yield "no dims", call(shaped([], count=1), says=("has no shape but model requires batch dimension",))
    yield "rank 1", call(shaped([3]), says=("unexpected shape for input 'INPUT0'",))
    yield "-1", call(shaped([1, -1], count=3), names=("INPUT0",))
    yield "-5", call(shaped([1, -5], count=3), names=("INPUT0",))
    yield "overflow", call(shaped([2**40, 2**40], count=1), names=("INPUT0",))
    yield "fixed", call(shaped([1, 4], "fixed"), says=("[-1,3]", "[1,4]"))
    yield "unbatched", call(shaped([5, 2], "flat"))
    yield "unbatched wrong", call(shaped([5, 3], "flat"), says=("unexpected shape",))


def _grpc_parameters() -> Named:
    kinds: dict[str, tuple[str, Any] | None] = {
        "int": ("int64_param", 5),
        "bool": ("bool_param", True),
        "text": ("string_param", "x"),
        "double": ("double_param", 1.5),
        "uint": ("uint64_param", 5),
        "negative": ("int64_param", -1),
        "zero": ("int64_param", 0),
        "empty": None,
    }
    for name in (
        "custom",
        "priority",
        "timeout",
        "sequence_id",
        "sequence_start",
        "triton_x",
        "triton_enable_empty_final_response",
    ):
        for kind, chosen in kinds.items():
            parameters: dict[str, Any] = {name: chosen}
            yield f"{name} {kind}", call(simple(**parameters))
    parameters = {"priority": ("int64_param", 99), "timeout": ("int64_param", 10_000_000)}
    yield "priority 99 with levels", call(simple(model="prio", **parameters))


def _grpc_models() -> Named:
    yield "unknown", call(simple(model="nobody"), names=("nobody",))
    yield "empty name", call(simple(model=""))
    yield "unloaded", call(simple(model="sleeper"), names=("sleeper",))
    for version in ("1", "2", "abc", "-1", "01", "99999999999999999999"):
        yield f"version {version}", call(simple(version=version))
    for version in ("", "1", "2", "3"):
        yield f"of several {version}", call(simple(model="versions", version=version))
    index = add(request("table"), "index", (1, 1), "INT64", int64_contents=[99])
    yield "model fails", call(index)
    yield "ensemble", call(add(request("ensemble", raw=[blob("FP32", [1, 2])], request_id="e"), "RAW", (1, 2)))
    yield "reshape", call(add(request("reshaped", raw=[blob("FP32", [1, 2])]), shape=(2, 1)))
    yield "optional left out", call(add(request("optional", raw=[blob("FP32", [1])]), shape=(1, 1)))
    yield "cached", call(simple(model="cached")), call(simple(model="cached"))
    for compression in (1, 2):
        yield f"compressed {compression}", call(simple(), compression=compression)
    big = add(request(raw=[bytes(6_000_000)]), shape=(1, 1_500_000))
    yield "six megabytes", call(big)


def _grpc_bytes() -> Named:
    good = simple(request_id="7").SerializeToString()
    yield "cut", Grpc("ModelInfer", good[:-1])
    yield "cut early", Grpc("ModelInfer", good[:5])
    yield "empty", Grpc("ModelInfer", b"")
    yield "garbage", Grpc("ModelInfer", b"\xff" * 40)
    yield "unknown fields", Grpc("ModelInfer", good + b"\xc2\x3e\x03abc" + b"\xc8\x3e\x05")
    yield "group", Grpc("ModelInfer", good + b"\xcb\x3e\xcc\x3e")
    yield "model name not UTF-8", Grpc("ModelInfer", b"\x0a\x02\xff\xfe")
    yield "name twice", Grpc("ModelInfer", good + b"\x0a\x01m")
    yield "other name last", Grpc("ModelInfer", good + b"\x0a\x06nobody")
    yield "id twice", Grpc("ModelInfer", good + b"\x1a\x01b")
    yield "wrong wire type", Grpc("ModelInfer", good + b"\x08\x05")
    raw = pb.ModelInferRequest(raw_input_contents=[blob("FP32", [1, 2.5, 0.1])]).SerializeToString()
    rest = add(request(request_id="7")).SerializeToString()
    yield "raw first", Grpc("ModelInfer", raw + rest)


def _grpc_documents() -> Named:
    for method in ("ServerLive", "ServerReady", "ServerMetadata"):
        yield method, Grpc(method)
    for model in (
        "untouched",
        "add_sub",
        "flat",
        "versions",
        "ensemble",
        "labelled",
        "id_bytes",
        "nobody",
        "sleeper",
        "",
    ):
        for version in ("", "1", "2", "abc"):
            if version and model not in ("untouched", "versions", "nobody"):
                continue
            named: dict[str, str] = {"name": model, "version": version}
            yield f"ready {model} {version}", call(pb.ModelReadyRequest(**named), "ModelReady")
            yield f"metadata {model} {version}", call(pb.ModelMetadataRequest(**named), "ModelMetadata")
            yield f"config {model} {version}", call(pb.ModelConfigRequest(**named), "ModelConfig")
            if model not in ("", "add_sub", "id_bytes"):  # these counted what the other refused
                yield f"statistics {model} {version}", call(pb.ModelStatisticsRequest(**named), "ModelStatistics")
    yield "index", call(pb.RepositoryIndexRequest(), "RepositoryIndex")
    yield "index ready", call(pb.RepositoryIndexRequest(ready=True), "RepositoryIndex")
    yield "index of a repository", call(pb.RepositoryIndexRequest(repository_name="r"), "RepositoryIndex")


def _grpc_control() -> Named:
    def load(model: str = "managed", **parameters: Any) -> Grpc:
        message = pb.RepositoryModelLoadRequest(model_name=model)
        for name, (kind, chosen) in parameters.items():
            setattr(message.parameters[name], kind, chosen)
        return call(message, "RepositoryModelLoad")

    def unload(model: str = "managed", **parameters: Any) -> Grpc:
        message = pb.RepositoryModelUnloadRequest(model_name=model)
        for name, (kind, chosen) in parameters.items():
            setattr(message.parameters[name], kind, chosen)
        return call(message, "RepositoryModelUnload")

    works = call(simple(model="managed"))
    ready = call(pb.ModelReadyRequest(name="managed"), "ModelReady")
    config = call(pb.ModelConfigRequest(name="managed"), "ModelConfig")
    yield "load, unload, load", load(), works, unload(), works, ready, config, load(), ready, works
    yield "load unknown", load("nobody")
    yield "load empty name", load("")
    yield "unload unknown", unload("nobody")
    yield "unload dependents", unload(unload_dependents=("bool_param", True)), load()
    yield "unload dependents text", unload(unload_dependents=("string_param", "x")), load()
    yield "unknown parameter", load(foo=("string_param", "x"))
    yield "config of the wrong kind", load(config=("int64_param", 5))
    yield "config is no JSON", load(config=("string_param", "{")), works
    whole = {
        "name": "managed",
        "max_batch_size": 16,
        "input": [{"name": "INPUT0", "data_type": "TYPE_FP32", "dims": [-1]}],
        "output": [{"name": "OUTPUT0", "data_type": "TYPE_FP32", "dims": [-1]}],
    }
    yield "override", load(config=("string_param", json.dumps(whole))), config, works, load(), config
    for method, kind in (
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest),
    ):
        yield f"{method} in a repository", call(kind(repository_name="r", model_name="managed"), method)


def _grpc_settings() -> Named:
    def trace(model: str = "traced", **settings: list[str]) -> Grpc:
        message = pb.TraceSettingRequest(model_name=model)
        for name, values in settings.items():
            message.settings[name].value.extend(values)
        return call(message, "TraceSetting")

    yield "trace", trace()
    yield "trace global", trace("")
    yield "trace of nobody", trace("nobody")
    yield "trace rate", trace(trace_rate=["5"]), trace(), trace(trace_rate=[]), trace()
    yield "trace rate x", trace(trace_rate=["x"])
    yield "trace rate twice", trace(trace_rate=["1", "2"])
    yield "trace level", trace(trace_level=["TIMESTAMPS", "TENSORS"]), trace(trace_level=[])
    yield "trace level and OFF", trace(trace_level=["OFF", "TENSORS"]), trace(trace_level=[])
    yield "trace level nope", trace(trace_level=["nope"])
    yield "trace count -2", trace(trace_count=["-2"])
    yield "trace file", trace(trace_file=["x"])
    yield "trace unknown", trace(foo=["x"])

    def log(**settings: Any) -> Grpc:
        message = pb.LogSettingsRequest()
        for name, (kind, chosen) in settings.items():
            setattr(message.settings[name], kind, chosen)
        return call(message, "LogSettings")

    yield "log", log()
    yield "log verbose", log(log_verbose_level=("uint32_param", 1)), log(), log(log_verbose_level=("uint32_param", 0))
    yield "log info", log(log_info=("bool_param", False)), log(log_info=("bool_param", True))
    yield "log file", log(log_file=("string_param", "x"))
    yield "log format", log(log_format=("string_param", "xml"))
    yield "log wrong kind", log(log_info=("string_param", "x"))
    yield "log unknown", log(foo=("string_param", "x"))


def _grpc_shared_memory() -> Named:
    for kind in ("System", "Cuda"):
        status = getattr(pb, f"{kind}SharedMemoryStatusRequest")
        register = getattr(pb, f"{kind}SharedMemoryRegisterRequest")
        unregister = getattr(pb, f"{kind}SharedMemoryUnregisterRequest")
        yield f"{kind} status", call(status(), f"{kind}SharedMemoryStatus")
        yield f"{kind} status of nobody", call(status(name="nobody"), f"{kind}SharedMemoryStatus")
        yield f"{kind} register", call(register(name="r", byte_size=8), f"{kind}SharedMemoryRegister")
        yield f"{kind} unregister nobody", call(unregister(name="nobody"), f"{kind}SharedMemoryUnregister")
        yield f"{kind} unregister", call(unregister(), f"{kind}SharedMemoryUnregister")


def _grpc_stream() -> Named:
    def stream(*messages: pb.ModelInferRequest, **more: Any) -> Grpc:
        return Grpc("ModelStreamInfer", stream=tuple(message.SerializeToString() for message in messages), **more)

    good, bad = simple(request_id="1"), add(request(request_id="2"))
    yield "empty", stream()
    yield "one", stream(good)
    yield "one without id", stream(simple())
    yield "good, bad, good", stream(good, bad, simple(request_id="3"))
    yield "unknown model", stream(simple(model="nobody", request_id="2"), good)
    other = add(request("id_int32", raw=[blob("INT32", [1, 2, 3])], request_id="i"), datatype="INT32")
    yield "two models", stream(good, other, simple(request_id="4"), other)
    yield "twenty", stream(*(simple(request_id=str(number)) for number in range(20)))
    yield "empty final", stream(simple(triton_enable_empty_final_response=("bool_param", True)))
    yield "error ends it", stream(good, simple(model="nobody"), metadata=(("triton_grpc_error", "true"),))
    yield (
        "model fails",
        stream(add(request("table", request_id="f"), "index", (1, 1), "INT64", int64_contents=[99]), good),
    )
    yield "typed", stream(add(request(), fp32_contents=[1, 2, 3]))
    yield "version abc", stream(simple(version="abc"), good)
    yield "garbage", Grpc("ModelStreamInfer", stream=(b"\xff" * 9,))


def _grpc_other() -> Named:
    yield "health", Grpc("grpc.health.v1.Health/Check")
    yield "health of x", Grpc("grpc.health.v1.Health/Check", b"\x0a\x01x")
    yield "unknown method", Grpc("Nope")
    yield "unknown service", Grpc("nope.Nope/Nope")
    yield "reflection", Grpc("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", stream=(b"",))


def _failing_load() -> Named:
    """Last, because a Triton that failed to load a model is not ready any more, whatever is unloaded."""
    load, ready = (
        Http("POST", "/v2/repository/models/broken/load", b"", names=("failed to load",)),
        "/v2/models/broken/ready",
    )
    yield "REST", load, Http("GET", ready)
    message = pb.RepositoryModelLoadRequest(model_name="broken")
    yield "gRPC", call(message, "RepositoryModelLoad", names=("failed to load",))
    yield "works", call(simple())
