"""Every RPC but inference, asked by grpcio over real sockets."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from gateway.errors import ConfigError, InvalidRequest
from gateway.ingress.grpc_management import RPCS, version_of
from gateway.management_access import Restrictions
from gateway.protocol import schema
from gateway.protocol.options import ProtocolOptions
from tests.ingress.grpc_bench import OIP, check_numbers, grpc_bench, numbers_request

Code = grpc.StatusCode
HEALTH = "grpc.health.v1.Health"


def test_every_rpc_of_the_services_is_answered() -> None:
    from gateway.ingress.grpc_services import HEALTH_WATCH, MODEL_INFER, MODEL_STREAM_INFER

    offered = {*RPCS, MODEL_INFER, MODEL_STREAM_INFER, HEALTH_WATCH}
    described = {
        f"/{file.package}.{service.name}/{method.name}"
        for file in schema.files()
        for service in file.service
        for method in service.method
    }
    assert {path for path in described if "reflection" not in path} == offered
    for rpc in RPCS.values():
        schema.message(rpc.request)
        schema.message(rpc.response)


async def refused(answer: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    code = caught.value.code()
    return code, caught.value.details() or ""


async def test_health() -> None:
    async with grpc_bench() as bench:
        assert (await bench.call("ServerLive")).live
        assert (await bench.call("ServerReady")).ready
        assert (await bench.call("Check", HEALTH)).status == 1
        bench.ready = False
        assert (await bench.call("ServerLive")).live
        assert not (await bench.call("ServerReady")).ready
        assert (await bench.call("Check", HEALTH)).status == 2


async def test_health_of_any_service_is_the_servers() -> None:
    async with grpc_bench() as bench:
        check = bench.unary("Check", "HealthCheckRequest", "HealthCheckResponse", HEALTH)
        request = schema.message("grpc.health.v1.HealthCheckRequest")
        for service in ("", "x", OIP):
            assert (await check(request(service=service))).status == 1


async def test_a_model_is_ready_or_not_and_an_unknown_one_is_not() -> None:
    async with grpc_bench() as bench:
        assert (await bench.call("ModelReady", name="numbers")).ready
        assert (await bench.call("ModelReady", name="numbers", version="1")).ready
        assert not (await bench.call("ModelReady", name="numbers", version="9")).ready
        assert not (await bench.call("ModelReady", name="nobody")).ready
        code, text = await refused(bench.call("ModelReady", name="numbers", version="abc"))
        assert code is Code.INVALID_ARGUMENT
        assert "version string 'abc'" in text
        await bench.serve("broken", refuse=ConfigError("no such file"))
        assert not (await bench.call("ModelReady", name="broken")).ready


async def test_metadata() -> None:
    async with grpc_bench(options=ProtocolOptions(server_name="triton")) as bench:
        server = await bench.call("ServerMetadata")
        assert (server.name, bool(server.version)) == (bench.management.server_metadata()["name"], True)
        assert "binary_tensor_data" in server.extensions
        model = await bench.call("ModelMetadata", name="numbers")
        assert (model.name, list(model.versions)) == ("numbers", ["1", "2"])
        assert [(t.name, t.datatype, list(t.shape)) for t in model.inputs] == [("number", "INT64", [-1, 1])]
        assert [t.name for t in model.outputs] == ["triple", "name"]
        assert list((await bench.call("ModelMetadata", name="numbers", version="1")).versions) == ["1"]
        code, text = await refused(bench.call("ModelMetadata", name="nobody"))
        assert (code, text) == (Code.NOT_FOUND, "Request for unknown model: 'nobody' is not found")
        code, text = await refused(bench.call("ModelMetadata", name="numbers", version="3"))
        assert code is Code.NOT_FOUND
        assert "version 3 is not found" in text


async def test_configuration_is_the_document() -> None:
    async with grpc_bench() as bench:
        bench.catalog.resolve("numbers", None).config_document = {
            "name": "numbers",
            "max_batch_size": 8,
            "input": [{"name": "number", "data_type": "TYPE_INT64", "dims": [1]}],
            "dynamic_batching": {"max_queue_delay_microseconds": 100},
            "parameters": {"k": {"string_value": "v"}},
            "a_key_of_json_alone": 1,
        }
        config = (await bench.call("ModelConfig", name="numbers")).config
        assert (config.name, config.max_batch_size, list(config.input[0].dims)) == ("numbers", 8, [1])
        assert config.dynamic_batching.max_queue_delay_microseconds == 100
        assert config.parameters["k"].string_value == "v"
        assert (await refused(bench.call("ModelConfig", name="nobody")))[0] is Code.NOT_FOUND


async def test_statistics_count_what_came_by_grpc() -> None:
    async with grpc_bench() as bench:
        check_numbers(await bench.infer(numbers_request([1, 2], version="1")), [1, 2])
        (stats,) = (await bench.call("ModelStatistics", name="numbers", version="1")).model_stats
        assert (stats.name, stats.version, stats.inference_count, stats.execution_count) == ("numbers", "1", 2, 1)
        assert (stats.inference_stats.success.count, stats.inference_stats.queue.count) == (1, 1)
        assert [one.batch_size for one in stats.batch_stats] == [2]
        assert len((await bench.call("ModelStatistics")).model_stats) == 2
        code, text = await refused(bench.call("ModelStatistics", name="nobody"))
        assert code is Code.INVALID_ARGUMENT
        assert "requested model 'nobody' is not available" in text


async def test_repository() -> None:
    async with grpc_bench() as bench:
        index = (await bench.call("RepositoryIndex", ready=True)).models
        assert [(m.name, m.version, m.state) for m in index] == [("numbers", "1", "READY"), ("numbers", "2", "READY")]
        code, text = await refused(bench.call("RepositoryModelLoad", model_name="numbers"))
        assert code is Code.UNAVAILABLE
        assert "explicit model load / unload is not allowed" in text
        assert (await refused(bench.call("RepositoryModelUnload", model_name="numbers")))[0] is Code.UNAVAILABLE
        named: dict[str, Any] = {"repository_name": "r", "model_name": "numbers"}
        for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
            assert (await refused(bench.call(method, **named)))[0] is Code.UNIMPLEMENTED
        code, text = await refused(bench.call("RepositoryIndex", repository_name="r"))
        assert code is Code.UNIMPLEMENTED
        assert "'repository_name' specification is not supported" in text


async def test_unload_hands_on_what_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    async def record(*arguments: Any) -> None:
        asked.append(arguments)

    parameter = schema.message("inference.ModelRepositoryParameter")
    async with grpc_bench() as bench:
        monkeypatch.setattr(bench.management, "load", record)
        monkeypatch.setattr(bench.management, "unload", record)
        load = {"config": parameter(string_param="{}"), "file:1/model.onnx": parameter(bytes_param=b"\xff")}
        await bench.call("RepositoryModelLoad", model_name="a", parameters=load)
        dependents = {"unload_dependents": parameter(bool_param=True)}
        await bench.call("RepositoryModelUnload", model_name="b", parameters=dependents)
        await bench.call("RepositoryModelUnload", model_name="c")
        assert asked == [
            ("a", {"config": "{}", "file:1/model.onnx": b"\xff"}, ""),
            ("b", True, ""),
            ("c", False, ""),
        ]
        wrong = {"unload_dependents": parameter(string_param="true")}
        code, text = await refused(bench.call("RepositoryModelUnload", model_name="b", parameters=wrong))
        assert (code, text) == (
            Code.INVALID_ARGUMENT,
            "invalid value type for 'unload_dependents' parameter, expected bool_param.",
        )


async def test_trace_settings() -> None:
    value = schema.message("inference.TraceSettingRequest").SettingValue
    async with grpc_bench() as bench:
        settings = (await bench.call("TraceSetting")).settings
        assert {name: list(settings[name].value) for name in ("trace_level", "trace_rate")} == {
            "trace_level": ["OFF"],
            "trace_rate": ["1000"],
        }
        settings = (await bench.call("TraceSetting", settings={"trace_rate": value(value=["5"])})).settings
        assert list(settings["trace_rate"].value) == ["5"]
        settings = (await bench.call("TraceSetting", model_name="numbers")).settings
        assert list(settings["trace_rate"].value) == ["5"]
        settings = (await bench.call("TraceSetting", settings={"trace_rate": value()})).settings
        assert list(settings["trace_rate"].value) == ["1000"]
        code, text = await refused(bench.call("TraceSetting", settings={"trace_rate": value(value=["x"])}))
        assert code is Code.INVALID_ARGUMENT
        assert "Unable to parse 'trace_rate', got: x" in text
        assert (await refused(bench.call("TraceSetting", model_name="nobody")))[0] is Code.INVALID_ARGUMENT
        given = {"trace_file": value(value=["y"])}
        assert (await refused(bench.call("TraceSetting", settings=given)))[0] is Code.UNIMPLEMENTED


async def test_log_settings() -> None:
    value = schema.message("inference.LogSettingsRequest").SettingValue
    async with grpc_bench() as bench:
        settings = (await bench.call("LogSettings")).settings
        assert (settings["log_info"].bool_param, settings["log_format"].string_param) == (True, "default")
        assert settings["log_verbose_level"].WhichOneof("parameter_choice") == "uint32_param"
        try:
            settings = (await bench.call("LogSettings", settings={"log_verbose_level": value(uint32_param=1)})).settings
            assert settings["log_verbose_level"].uint32_param == 1
        finally:
            bench.management.update_log_settings({"log_verbose_level": 0})
        for wrong in ({"log_info": value(string_param="x")}, {"log_format": value(string_param="xml")}):
            assert (await refused(bench.call("LogSettings", settings=wrong)))[0] is Code.INVALID_ARGUMENT


async def test_shared_memory_of_gpus_is_not_there() -> None:
    async with grpc_bench() as bench:
        assert not (await bench.call("SystemSharedMemoryStatus")).regions
        assert not (await bench.call("CudaSharedMemoryStatus")).regions
        assert (await refused(bench.call("SystemSharedMemoryStatus", name="x")))[0] is Code.NOT_FOUND
        code, text = await refused(bench.call("CudaSharedMemoryRegister", name="x"))
        assert code is Code.INVALID_ARGUMENT
        assert "GPUs not supported" in text
        await bench.call("CudaSharedMemoryUnregister", name="x")


async def test_unknown_methods_and_bytes_that_are_no_message() -> None:
    async with grpc_bench() as bench:
        for service, method in ((OIP, "Nope"), ("nope.Nope", "Nope")):
            call = bench.channel.unary_unary(f"/{service}/{method}")
            assert (await refused(call(b"")))[0] is Code.UNIMPLEMENTED
        ask = bench.unary("ModelMetadata", "ModelMetadataRequest", "ModelMetadataResponse")
        code, text = await refused(ask(b"\xff" * 9))
        assert code is Code.INVALID_ARGUMENT
        assert "not a valid inference.ModelMetadataRequest" in text
        reflection = bench.channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")()
        await reflection.done_writing()
        assert await reflection.code() is Code.UNIMPLEMENTED  # it was not asked for


async def test_restricted_groups_need_their_metadata() -> None:
    restrictions = Restrictions({"inference": ("K", "v"), "metadata": ("Other", "w")})
    async with grpc_bench(restrictions=restrictions) as bench:
        for metadata in ((), [("triton-grpc-protocol-k", "x")], [("k", "v")], [("triton-grpc-protocol-other", "v")]):
            code, text = await refused(bench.infer(numbers_request([1]), metadata=metadata))
            assert (code, text) == (
                Code.UNAVAILABLE,
                "This protocol is restricted, expecting header 'triton-grpc-protocol-k'",
            )
        check_numbers(await bench.infer(numbers_request([1]), metadata=[("triton-grpc-protocol-k", "v")]), [1])
        assert (await refused(bench.call("ServerMetadata")))[0] is Code.UNAVAILABLE
        await bench.call("ServerMetadata", metadata=[("triton-grpc-protocol-other", "w")])
        stream = bench.infer_stream()
        assert await stream.code() is Code.UNAVAILABLE
        assert (await bench.call("ServerLive")).live


async def test_watchers_of_health_are_told_of_changes() -> None:
    async with grpc_bench() as bench:
        watch = bench.stream("Watch", "HealthCheckRequest", "HealthCheckResponse", HEALTH)
        await watch.write(schema.message("grpc.health.v1.HealthCheckRequest")(service="x"))
        await watch.done_writing()
        assert (await watch.read()).status == 1
        bench.ready = False
        assert (await watch.read()).status == 2
        bench.ready = True
        assert (await watch.read()).status == 1
        bench.services.drain()
        assert (await watch.read()).status == 2
        assert await watch.code() is Code.UNAVAILABLE


@pytest.mark.parametrize(
    ("text", "version"), [("", None), ("1", "1"), ("01", "1"), ("9223372036854775807", "9223372036854775807")]
)
def test_versions_are_numbers(text: str, version: str | None) -> None:
    assert version_of(text) == version


@pytest.mark.parametrize("text", ["abc", "-1", "1.0", " 1", "٣", "9223372036854775808", "9" * 1000])
def test_other_versions_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="version should be an integral value > 0"):
        version_of(text)
