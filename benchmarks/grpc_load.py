"""gRPC load: one ModelInferRequest sent over and over by `h2load`, and the check that its answers are right.

h2load only sees HTTP's status, which is 200 for gRPC errors too. A round therefore counts only if every answer carried
exactly as many bytes of messages as the answer that was checked against onnxruntime before; an error carries none.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from statistics import quantiles
from typing import Final

import grpc
import numpy as np
import numpy.typing as npt

from benchmarks.server import BenchmarkError, Server, taskset
from benchmarks.systems import tool
from benchmarks.workload import CACHE, Workload
from benchmarks.wrk import Round
from gateway.protocol import schema

METHOD: Final = "/inference.GRPCInferenceService/ModelInfer"
CONNECTIONS: Final = 8
STREAMS: Final = 8
"""Concurrent calls on each connection: 64 in all, as in the JSON scenario."""
PREFIX_BYTES: Final = 5
"""In front of every gRPC message: a compression flag and its length."""
_FINISHED: Final = re.compile(r"finished in ([0-9.]+)(us|ms|s)\b")
_REQUESTS: Final = re.compile(r"requests: (\d+) total, \d+ started, (\d+) done, (\d+) succeeded, (\d+) failed")
_SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def request_message(work: Workload, row: int) -> bytes:
    """A serialised ModelInferRequest of one row, with raw contents, as tritonclient sends it."""
    tensor: npt.NDArray[np.float32] = work.rows[row : row + 1]
    request = schema.message("inference.ModelInferRequest")(model_name=work.model)
    request.inputs.add(name="x", datatype="FP32", shape=tensor.shape)
    request.outputs.add(name="y")
    request.raw_input_contents.append(tensor.tobytes())
    message: bytes = request.SerializeToString()
    return message


def check(server: Server, port: int, work: Workload, *, computes: bool = True) -> int:
    """Ask every row once, compare with onnxruntime, and return the bytes of an answer's message with its prefix.

    Raises:
        BenchmarkError: an error, an answer that differs, or answers of different sizes.
    """
    sizes = set()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(METHOD, request_serializer=bytes, response_deserializer=bytes)
        for row, expected in enumerate(work.expected):
            try:
                answer = call(request_message(work, row), timeout=30)
            except grpc.RpcError as error:
                raise BenchmarkError(f"{server.name} answers {error}") from error
            sizes.add(len(answer) + PREFIX_BYTES)
            if not computes:
                continue
            reply = schema.message("inference.ModelInferResponse").FromString(answer)
            got = np.frombuffer(reply.raw_output_contents[0], np.float32)
            if not np.allclose(got, expected, rtol=1e-4, atol=1e-5):
                raise BenchmarkError(f"{server.name}: row {row} is {got.tolist()}, onnxruntime says {expected}")
    if len(sizes) != 1:
        raise BenchmarkError(f"{server.name}: answers of {sorted(sizes)} bytes; failures could not be told from them")
    return sizes.pop()


def load(server: Server, port: int, work: Workload, answer_bytes: int, seconds: float, cores: str = "") -> Round:
    """Send the first row's request for `seconds` on 8 connections of 8 streams each.

    Raises:
        BenchmarkError: h2load failed, or a single call was not answered as the checked one was.
    """
    message = request_message(work, 0)
    body = CACHE / f"{work.model}.grpc"
    body.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
    log = CACHE / "logs" / f"h2load-{server.name}.log"
    log.unlink(missing_ok=True)
    command = [
        tool("h2load", "nghttp2-client"), "-t1", f"-c{CONNECTIONS}", f"-m{STREAMS}", f"-D{seconds:g}",
        "-d", str(body), "-H", "content-type: application/grpc", "-H", "te: trailers", f"--log-file={log}",
        f"http://127.0.0.1:{port}{METHOD}",
    ]  # fmt: skip
    finished = subprocess.run(
        [*taskset(cores), *command], capture_output=True, text=True, timeout=seconds + 60, check=False
    )
    if finished.returncode:
        raise BenchmarkError(f"h2load failed on {server.name}: {finished.stderr or finished.stdout}")
    return read_report(finished.stdout, log, answer_bytes, server.name)


def read_report(text: str, log: Path, answer_bytes: int, name: str) -> Round:
    """h2load's report and its log of single requests → one round.

    Raises:
        BenchmarkError: the report cannot be read, or holds answers that are not the checked one.
    """
    finished, requests = _FINISHED.search(text), _REQUESTS.search(text)
    data = re.search(r"\((\d+)\) data", text)
    if finished is None or requests is None or data is None:
        raise BenchmarkError(f"h2load's report on {name} cannot be read:\n{text}")
    succeeded, failed = int(requests[3]), int(requests[4])
    # The last calls may have been cut off after their data, so a few more answers than calls are in order.
    answers = int(data[1]) / answer_bytes
    if failed or not succeeded or not succeeded <= answers <= succeeded + CONNECTIONS * STREAMS:
        raise BenchmarkError(f"{name}: {succeeded} calls ended, but {answers:.1f} right answers were read:\n{text}")
    spent_s = float(finished[1]) * _SECONDS[finished[2]]
    latencies = [int(line.rsplit("\t", 1)[1]) for line in log.read_text().splitlines()]
    cuts = quantiles(latencies, n=100)
    return Round(succeeded / spent_s, cuts[49], cuts[98])
