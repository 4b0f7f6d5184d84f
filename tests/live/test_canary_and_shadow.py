"""A canary and a shadow beside a champion, in a real gateway, over both protocols and under load.

Each version multiplies by a number of its own, so an answer tells which version made it, whatever its headers say. What
is done to variants is what happens to them: their processes hang (SIGSTOP), die (SIGKILL), and lose their files.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import pytest
from onnx import helper

from gateway.protocol import schema
from gateway.provenance.headers import parse
from tests.live import models
from tests.live.gateway_process import GatewayProcess, gateway, until

Array = np.ndarray[Any, Any]
CHAMPION, CANARY, SHADOW = 2.0, 3.0, 2.5
RELOADED = "SIGHUP: the models of the configuration are served"
FACTORS = {"1": CHAMPION, "2": CANARY, "3": SHADOW}
TRAFFIC = {
    "canary": {"source": "canary/m", "percent": 30, "header": {"X-Variant": "canary"}, "sticky": "X-User"},
    "shadow": {"source": "shadow/m", "percent": 100},
}


def times(factor: float, datatype: str = "FP32") -> bytes:
    """`y` = factor·x, [batch, 2]."""
    x, y = (models.value(name, datatype, ["batch", 2]) for name in "xy")
    weight = np.array([factor], np.float32 if datatype == "FP32" else np.float64)
    return models.model([helper.make_node("Mul", ["x", "w"], ["y"])], [x], [y], {"w": weight})


def put(root: Path, place: str, version: str, model: bytes, config: str = "") -> None:
    directory = root / place / "m"
    (directory / version).mkdir(parents=True, exist_ok=True)
    (directory / version / "model.onnx").write_bytes(model)
    if config:
        (directory / "config.pbtxt").write_text(config)


def write(root: Path, traffic: dict[str, Any], **more: Any) -> Path:
    """The configuration file; JSON is YAML."""
    file = root / "gateway.yaml"
    file.write_text(json.dumps({"models": [{"source": "champion/m", "deadline_ms": 10_000, **traffic}], **more}))
    return file


def repository(root: Path) -> Path:
    put(root, "champion", "1", times(CHAMPION))
    put(root, "canary", "2", times(CANARY))
    put(root, "shadow", "3", times(SHADOW))
    return root


def status(process: GatewayProcess) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(process.operations("/api/models/m/split"))
    return found


def command(process: GatewayProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{process.operations_port}"
    return subprocess.run(
        [sys.executable, "-m", "gateway", "models", *arguments, "--ops-url", url],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def worker(process: GatewayProcess, version: str) -> int:
    """Process of the worker that a variant has for itself."""
    return next(int(w["pid"]) for w in process.workers() if w["models"] == [f"m/{version}"] and w["pid"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    root = repository(tmp_path_factory.mktemp("variants"))
    with gateway("serve", "-c", str(write(root, TRAFFIC)), "--workers", "1") as process:
        yield process


@dataclass
class Answers:
    """What callers were told and given."""

    by_version: Counter[str] = field(default_factory=Counter)
    mirrored: int = 0
    failed: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, headers: Any, x: Array, y: Array) -> str:
        told = parse(headers)
        assert told.model is not None
        factors = set((y / x).ravel().tolist())
        assert factors == {FACTORS[told.model.version]}, (told, x, y)
        assert told.model.variant == {"1": "champion", "2": "canary"}.get(told.model.version)
        assert self.digests.setdefault(told.model.version, told.model.digest) == told.model.digest
        if told.shadow is not None:
            assert (told.model.variant, told.shadow.version) == ("champion", "3")
            self.mirrored += 1
        self.by_version[told.model.version] += 1
        return told.model.version


def ask(process: GatewayProcess, answers: Answers, path: str = "", headers: dict[str, str] | None = None) -> str:
    x = np.array([[1.0, 2.0]], np.float32)
    document = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": x.ravel().tolist()}]}
    where = f"/v2/models/m{path}/infer"
    code, told, body = process.request("POST", where, json.dumps(document).encode(), headers or {})
    assert code == 200, body
    return answers.add(told.items(), x, np.array(json.loads(body)["outputs"][0]["data"]))


def rpc(channel: Any) -> Any:
    return channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=schema.message("inference.ModelInferResponse").FromString,
    )


def message(x: Array, version: str = "", datatype: str = "FP32") -> Any:
    made = schema.message("inference.ModelInferRequest")(model_name="m", model_version=version)
    made.inputs.add(name="x", datatype=datatype, shape=x.shape)
    made.raw_input_contents.append(x.tobytes())
    return made


def test_every_answer_says_which_variant_made_it(served: GatewayProcess) -> None:
    answers = Answers()
    for _ in range(60):
        ask(served, answers)
    assert set(answers.by_version) == {"1", "2"}
    assert ask(served, answers, headers={"X-Variant": "canary"}) == "2"
    assert ask(served, answers, "/versions/1", {"X-Variant": "canary"}) == "1", "who names a version gets that version"
    assert ask(served, answers, "/versions/2") == "2"
    until(lambda: bool(ask(served, answers, "/versions/1") and answers.mirrored), 60, "nothing was mirrored")


def test_over_grpc_as_over_http(served: GatewayProcess) -> None:
    answers, x = Answers(), np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    with grpc.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
        infer = rpc(channel)

        def once(version: str = "", metadata: tuple[tuple[str, str], ...] = ()) -> str:
            answer, call = infer.with_call(message(x, version), metadata=metadata, timeout=30)
            y = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(x.shape)
            return answers.add(call.initial_metadata(), x, y)

        for _ in range(60):
            once()
        assert set(answers.by_version) == {"1", "2"}
        until(lambda: bool(once("1") and answers.mirrored), 60, "nothing was mirrored")
        assert [once(metadata=(("x-variant", "canary"),)), once("1"), once("2")] == ["2", "1", "2"]
        with pytest.raises(grpc.RpcError) as refused:
            once("3")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND, "a shadow answers nobody"
        users = {f"user-{n}": once(metadata=(("x-user", f"user-{n}"),)) for n in range(40)}
        assert set(users.values()) == {"1", "2"}
    assert {user: ask(served, answers, headers={"X-User": user}) for user in users} == users, "as over HTTP"


def test_a_stream_s_requests_are_split_one_by_one(served: GatewayProcess) -> None:
    x = np.array([[1.0, 2.0]], np.float32)
    with grpc.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
        stream = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=lambda made: made.SerializeToString(),
            response_deserializer=schema.message("inference.ModelStreamInferResponse").FromString,
        )
        met: Counter[str] = Counter()
        for answer in stream(iter([message(x) for _ in range(60)]), timeout=60):
            assert not answer.error_message
            y = np.frombuffer(answer.infer_response.raw_output_contents[0], "<f4").reshape(x.shape)
            version = answer.infer_response.model_version
            assert set((y / x).ravel().tolist()) == {FACTORS[version]}
            met[version] += 1
    assert set(met) == {"1", "2"}


def test_generate_is_split_too(served: GatewayProcess) -> None:
    for headers, version in (({"X-Variant": "canary"}, "2"), ({"X-User": _champion_s_user(served)}, "1")):
        code, told, body = served.request("POST", "/v2/models/m/generate", b'{"x":[1,2]}', headers)
        model = parse(told.items()).model
        assert model is not None
        assert (model.version, code) == (version, 200), body


def _champion_s_user(process: GatewayProcess) -> str:
    names = (f"user-{n}" for n in range(1000))
    return next(name for name in names if ask(process, Answers(), headers={"X-User": name}) == "1")


def test_what_clients_see_of_the_variants(served: GatewayProcess) -> None:
    index = json.loads(served.request("POST", "/v2/repository/index", b"{}")[2])
    assert [(entry["version"], entry["state"]) for entry in index][:2] == [("1", "READY"), ("2", "READY")]
    assert not [entry for entry in index if entry["version"] == "3" and entry["state"] == "READY"]
    assert json.loads(served.request("GET", "/v2/models/m")[2])["versions"] == ["1", "2"]
    assert served.request("GET", "/v2/models/m/versions/2/ready")[0] == 200
    assert served.request("GET", "/v2/models/m/versions/3/ready")[0] == 404
    code, _, body = served.request("GET", "/v2/models/m/versions/2/provenance")
    assert code == 200
    assert "sha256" in body.decode()


def test_the_shadow_s_differences_are_measured(served: GatewayProcess) -> None:
    answers = Answers()

    def compared() -> bool:
        ask(served, answers, "/versions/1")
        differed = served.metric("gateway_shadow_compared_total", outcome="differed", version="3")
        return differed >= max(answers.mirrored, 5)

    until(compared, 60, "nothing was compared")
    (output,) = status(served)["shadow"]["mirror"]["compared"]["outputs"]
    assert output["output"] == "y"
    assert output["max_absolute"] == pytest.approx(2.0), "of 4·(2.5 - 2)"
    assert output["equal_rows"] == 0
    assert served.metric("gateway_shadow_max_difference", measure="absolute", output="y") == output["max_absolute"]
    assert served.metric("gateway_shadow_difference_count", output="y") >= 5
    assert served.metric("gateway_variant_share", variant="canary") == 0.3


def test_the_share_changes_at_run_time(served: GatewayProcess) -> None:
    done = command(served, "split", "m", "--canary", "100")
    assert done.returncode == 0, done.stderr
    assert re.search(r"canary\tversion 2 from canary/m, 100 % \(configured: 30 %\)", done.stdout)
    answers = Answers()
    assert {ask(served, answers) for _ in range(20)} == {"2"}
    assert answers.mirrored == 0, "a shadow is sent the champion's requests"
    assert command(served, "split", "m", "--canary", "0", "--shadow", "0").returncode == 0
    assert {ask(served, answers) for _ in range(20)} == {"1"}
    assert answers.mirrored == 0
    assert command(served, "split", "m", "--canary", "101").returncode == 1
    unknown = command(served, "split", "nobody", "--canary", "1")
    assert unknown.returncode == 1
    assert "neither" in unknown.stderr or "no canary" in unknown.stderr
    assert command(served, "split", "m", "--canary", "30", "--shadow", "100").returncode == 0
    shown = command(served, "split", "m").stdout
    assert "configured" not in shown
    assert "champion\tversion 1" in shown


class Load:
    """Callers of both protocols who ask until told to stop; nobody may be refused, and every answer must be whole."""

    def __init__(self, process: GatewayProcess, callers: int = 8) -> None:
        self.process = process
        self.answers = Answers()
        self.slowest_s = 0.0
        self._callers = callers
        self._stopped = False

    async def during(self, happens: Callable[[Load], Any]) -> None:
        async with (
            aiohttp.ClientSession() as session,
            grpc.aio.insecure_channel(f"127.0.0.1:{self.process.grpc_port}") as channel,
        ):
            tasks = [
                asyncio.ensure_future(self._rest(session, n) if n % 2 else self._rpc(rpc(channel), n))
                for n in range(self._callers)
            ]
            try:
                await self.more(100)
                await happens(self)
                await self.more(100)
            finally:
                self._stopped = True
                await asyncio.gather(*tasks)

    async def more(self, n: int) -> None:
        """Until that many more were answered."""
        enough = self.answers.by_version.total() + n
        while self.answers.by_version.total() < enough and not self.answers.failed:
            await asyncio.sleep(0.005)

    async def _rest(self, session: aiohttp.ClientSession, n: int) -> None:
        url = f"http://127.0.0.1:{self.process.port}/v2/models/m/infer"
        rng = np.random.default_rng(n)
        while not self._stopped:
            x = rng.integers(1, 100, (int(rng.integers(1, 4)), 2)).astype(np.float32)
            document = {"inputs": [{"name": "x", "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()}]}
            begun = asyncio.get_running_loop().time()
            async with session.post(url, json=document) as answer:
                body = await answer.json()
                if answer.status != 200:
                    self.answers.failed.append(f"{answer.status} {body}")
                    continue
                self._took(begun)
                y = np.array(body["outputs"][0]["data"]).reshape(x.shape)
                self.answers.add(answer.headers.items(), x, y)

    async def _rpc(self, infer: Any, n: int) -> None:
        rng = np.random.default_rng(n)
        while not self._stopped:
            x = rng.integers(1, 100, (int(rng.integers(1, 4)), 2)).astype(np.float32)
            call = infer(message(x))
            begun = asyncio.get_running_loop().time()
            try:
                answer = await call
            except grpc.RpcError as error:
                self.answers.failed.append(str(error))
                continue
            self._took(begun)
            y = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(x.shape)
            self.answers.add(list(await call.initial_metadata()), x, y)

    def _took(self, begun: float) -> None:
        self.slowest_s = max(self.slowest_s, asyncio.get_running_loop().time() - begun)


async def test_a_shadow_that_hangs_or_dies_is_nobody_s_trouble(served: GatewayProcess) -> None:
    assert command(served, "split", "m", "--canary", "0").returncode == 0

    async def trouble(load: Load) -> None:
        pid = worker(served, "3")
        os.kill(pid, signal.SIGSTOP)
        await load.more(1500)
        stuck = status(served)["shadow"]["mirror"]
        assert 0 < stuck["pending_rows"] <= 1024
        os.kill(pid, signal.SIGKILL)
        await load.more(300)

    load = Load(served)
    await load.during(trouble)
    assert load.answers.failed == []
    assert set(load.answers.by_version) == {"1"}
    assert load.slowest_s < 9.0, "a request that waited for the hanging process would have waited for ten seconds"

    after = status(served)["shadow"]["mirror"]["compared"]

    def compares_again() -> bool:
        ask(served, Answers(), "/versions/1")
        return bool(status(served)["shadow"]["mirror"]["compared"]["differed"] > after["differed"])

    until(compares_again, 60, "the shadow did not come back")
    assert command(served, "split", "m", "--canary", "30").returncode == 0


async def test_a_canary_that_dies_gives_its_share_back(served: GatewayProcess) -> None:
    assert command(served, "split", "m", "--canary", "50").returncode == 0
    before = status(served)["canary"]["fallbacks"]

    async def trouble(load: Load) -> None:
        for _ in range(2):
            os.kill(worker(served, "2"), signal.SIGKILL)
            await load.more(50)
            await asyncio.to_thread(until, lambda: status(served)["canary"]["reason"] == "", 60, "it did not come back")
            await load.more(50)

    load = Load(served)
    await load.during(trouble)
    assert [failure for failure in load.answers.failed if "canary" not in failure and "version 2" not in failure] == []
    assert load.answers.by_version["1"] > 0
    assert load.answers.by_version["2"] > 0
    assert status(served)["canary"]["fallbacks"] > before
    assert command(served, "split", "m", "--canary", "30").returncode == 0


@pytest.mark.slow
async def test_reloads_add_change_and_remove_variants_under_load(tmp_path: Path) -> None:
    root = repository(tmp_path)
    put(root, "wrong", "4", times(4.0, "FP64"))
    config = write(root, {})
    with gateway("serve", "-c", str(config), "--workers", "1") as process:
        load = Load(process)
        steps: list[dict[str, Any]] = [
            TRAFFIC,
            {"canary": {"source": "canary/m", "percent": 100}},
            {"shadow": {"source": "shadow/m"}, "canary": {"source": "wrong/m", "percent": 50}},
            {},
            {"canary": {"source": "canary/m/2/model.onnx", "version": "2", "percent": 50}},
            {},
        ]

        def reloaded(before: int) -> bool:
            return process.output().count(RELOADED) > before

        async def changes(load: Load) -> None:
            for step in steps:
                write(root, step)
                reloads = process.output().count(RELOADED)
                process.process.send_signal(signal.SIGHUP)
                await asyncio.to_thread(until, partial(reloaded, reloads), 60, "the reload did not end")
                await load.more(100)

        load.answers.add = lenient(load.answers)  # type: ignore[assignment,method-assign]
        await load.during(changes)
        assert load.answers.failed == []
        assert load.answers.by_version["2"] > 100
        output = process.output()
        assert output.count("model m version 1 is ready") == 1, "nothing of the champion's changed"
        assert "its input 'x' is FP64, clients send FP32" in output
        assert "Traceback" not in output
        assert not [w for w in process.workers() if w["name"].startswith("onnx-m")], "their workers are gone"
        code, headers, _ = process.request("GET", "/v2/models/m")
        assert code == 200, headers


def lenient(answers: Answers) -> Callable[[Any, Array, Array], str]:
    """While variants come and go the champion is called so only when it has company; values must fit all the same."""

    def add(headers: Any, x: Array, y: Array) -> str:
        told = parse(headers)
        assert told.model is not None
        assert set((y / x).ravel().tolist()) == {FACTORS[told.model.version]}
        assert told.model.variant in ({"1": ("champion", ""), "2": ("canary",)}[told.model.version])
        assert answers.digests.setdefault(told.model.version, told.model.digest) == told.model.digest
        answers.by_version[told.model.version] += 1
        return told.model.version

    return add


@pytest.mark.slow
def test_sequences_and_cached_answers_never_mix_variants(tmp_path: Path) -> None:
    cached = "max_batch_size: 8 response_cache { enable: true }"
    put(tmp_path, "champion", "1", times(CHAMPION), cached)
    put(tmp_path, "canary", "2", times(CANARY), cached)
    summing = models.RUNNING_SUM % "oldest { max_candidate_sequences: 64 }"
    for place, version in (("sums", "1"), ("sums_new", "2")):
        directory = tmp_path / place / "sums"
        (directory / version).mkdir(parents=True)
        (directory / version / "model.onnx").write_bytes(models.running_sum())
        (directory / "config.pbtxt").write_text(summing)
    config = tmp_path / "gateway.yaml"
    config.write_text(
        textwrap.dedent("""
        models:
          - {source: champion/m, canary: {source: canary/m, percent: 50}}
          - {source: sums/sums, canary: {source: sums_new/sums, percent: 50}}
        """)
    )
    with gateway("serve", "-c", str(config), "--workers", "1") as process:
        answers = Answers()
        for _ in range(40):
            ask(process, answers)
        assert min(answers.by_version["1"], answers.by_version["2"]) > 5
        assert process.metric("nv_cache_num_hits_per_model", model="m") > 20, "both were answered from the cache"

        met: dict[int, set[str]] = {n: set() for n in range(1, 41)}
        for step in range(4):
            for sequence, versions in met.items():
                parameters = {"sequence_id": sequence, "sequence_start": step == 0, "sequence_end": step == 3}
                tensor = {"name": "INPUT", "datatype": "INT32", "shape": [1, 1], "data": [sequence]}
                code, headers, body = process.infer("sums", {"inputs": [tensor], "parameters": parameters})
                assert code == 200, body
                assert body["outputs"][0]["data"] == [sequence * (step + 1)], (
                    "one state from the first step to the last"
                )
                told = parse(headers.items()).model
                assert told is not None
                versions.add(told.version)
            assert command(process, "split", "sums", "--canary", ["100", "0", "100", "0"][step]).returncode == 0
        assert {len(versions) for versions in met.values()} == {1}
        assert {version for versions in met.values() for version in versions} == {"1", "2"}


@pytest.mark.slow
def test_the_inference_log_tells_variants_and_copies_apart(tmp_path: Path) -> None:
    config = write(repository(tmp_path), TRAFFIC, inference_log={"directory": str(tmp_path / "log")})
    with gateway("serve", "-c", str(config), "--workers", "1") as process:
        answers = Answers()
        until(lambda: bool(ask(process, answers) and min(answers.by_version["2"], answers.mirrored)), 60, "no split")
        wanted = {"champion": answers.by_version["1"], "canary": answers.by_version["2"], "shadow": answers.mirrored}

        def logged() -> bool:
            query = "select variant, count(*) as n, count(cause) as of_known from requests group by variant"
            done = subprocess.run(
                [sys.executable, "-m", "gateway", "log", "query", query, "--format", "json", "--dir", tmp_path / "log"],
                capture_output=True, text=True, timeout=60, check=True,
            )  # fmt: skip
            rows = {row["variant"]: (row["n"], row["of_known"]) for row in json.loads(done.stdout)}
            return rows == {v: (n, n if v == "shadow" else 0) for v, n in wanted.items()}

        until(logged, 60, "the log has other rows than there were answers and copies")
