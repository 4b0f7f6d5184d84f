"""What splitting traffic promises: a canary by share and by header, a shadow that never answers, both visible."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.contract.black_box import Answer, ask, command, configuration, coreutils_digest, item, operate, put
from tests.live.gateway_process import GatewayProcess, gateway, until

pytestmark = pytest.mark.slow
FACTORS = {"1": 2.0, "2": 3.0, "3": 5.0}
PLACES = {"1": "champion", "2": "canary", "3": "shadow"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("variants")


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[GatewayProcess]:
    for version, place in PLACES.items():
        put(root / place, "m", version, FACTORS[version])
    canary = {"source": "canary/m", "percent": 30, "header": {"X-Variant": "canary"}, "sticky": "X-User"}
    document = {
        "server": {"workers": 1, "drain_delay_s": 0},
        "inference_log": {"directory": "log"},
        "models": [{"source": "champion/m", "canary": canary, "shadow": {"source": "shadow/m", "percent": 100}}],
    }
    with gateway("serve", "-c", str(configuration(root / "gateway.yaml", document))) as process:
        yield process


def version(answer: Answer, root: Path) -> str:
    """Which version answered: headers, body and calculation agree, and a shadow never answers."""
    told = answer.model()
    number = str(told["version"])
    assert answer.factor() == FACTORS[number]
    assert answer.document["model_version"] == number
    assert number != "3", "a shadow answered"
    assert told["variant"] == PLACES[number]
    assert told["digest"] == coreutils_digest(root / PLACES[number] / "m" / number)
    return number


def test_a_share_of_the_requests_meets_the_canary(served: GatewayProcess, root: Path) -> None:
    met = Counter(ask(served, "m").model()["version"] for _ in range(200))
    assert set(met) == {"1", "2"}
    assert 20 <= met["2"] <= 110, "30 % of 200"
    version(ask(served, "m"), root)


def test_a_header_sends_to_the_canary_whatever_the_share(served: GatewayProcess, root: Path) -> None:
    assert {version(ask(served, "m", X_Variant="canary"), root) for _ in range(10)} == {"2"}
    with grpc.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
        sent = service_pb2.ModelInferRequest(model_name="m")
        sent.inputs.add(name="x", datatype="FP32", shape=[1, 2])
        sent.raw_input_contents.append(np.array([1, 2], np.float32).tobytes())
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        for _ in range(10):
            answer, call = infer.with_call(sent, timeout=60, metadata=(("x-variant", "canary"),))
            assert np.frombuffer(answer.raw_output_contents[0], "<f4").tolist() == [3, 6]
            told = item(dict(call.initial_metadata())["inference-model"])[1]
            assert (told["version"], told["variant"]) == ("2", "canary")


def test_sticky_callers_meet_the_same_version(served: GatewayProcess, root: Path) -> None:
    users = [f"user-{n}" for n in range(30)]
    met = {user: {ask(served, "m", X_User=user).model()["version"] for _ in range(4)} for user in users}
    assert {len(versions) for versions in met.values()} == {1}
    assert {one for versions in met.values() for one in versions} == {"1", "2"}


def test_who_names_a_version_gets_it_but_never_the_shadow(served: GatewayProcess, root: Path) -> None:
    for number in "12":
        assert version(ask(served, "m", path=f"/versions/{number}"), root) == number
    refused = ask(served, "m", path="/versions/3")
    assert (refused.status, list(refused.document)) == (404, ["error"])


def test_the_share_moves_at_run_time_and_the_shadow_is_told(served: GatewayProcess, root: Path) -> None:
    assert operate(served, "split", "m", "--canary", "100").returncode == 0
    assert {version(ask(served, "m"), root) for _ in range(20)} == {"2"}
    assert operate(served, "split", "m", "--canary", "0").returncode == 0
    answers = [ask(served, "m") for _ in range(20)]
    assert {version(answer, root) for answer in answers} == {"1"}
    until(lambda: "inference-shadow" in ask(served, "m").headers, 300, "no answer tells of its shadow")
    told = [answer.headers.get("inference-shadow") for answer in (ask(served, "m") for _ in range(50))]
    name, parameters = item(next(filter(None, told)))
    assert (name, parameters["version"]) == ("m", "3")
    assert operate(served, "split", "m", "--canary", "101").returncode in {1, 2}
    assert operate(served, "split", "nobody", "--canary", "1").returncode == 1


def test_both_are_visible_in_metrics(served: GatewayProcess) -> None:
    ask(served, "m", X_Variant="canary")
    for number in "12":
        assert served.metric("gateway_requests_total", model="m", version=number, code="200") > 0
    names = set(re.findall(r"^(gateway_\w+)\{[^}]*model=\"m\"", served.operations("/metrics").decode(), re.MULTILINE))
    assert [name for name in names if "shadow" in name]
    assert [name for name in names if "variant" in name or "canary" in name]


def test_the_log_says_which_variant_answered(served: GatewayProcess, root: Path) -> None:
    answer = ask(served, "m", X_Variant="canary")
    sql = (
        "select request_id, version, variant, digest, hex(outputs[1].data) as y, status from requests"
        " where model = 'm' and status = 200"
    )
    rows: list[dict[str, Any]] = []

    def written() -> bool:
        nonlocal rows
        done = command("log", "query", sql, "--format", "json", "--dir", str(root / "log"))
        rows = json.loads(done.stdout) if done.returncode == 0 else []
        return any(row["request_id"] == answer.id for row in rows)

    until(written, 60, "the row is not in the log")
    assert {(row["version"], row["variant"]) for row in rows} >= {("1", "champion"), ("2", "canary")}
    for row in rows:
        assert row["variant"] == PLACES[row["version"]]
        first = np.frombuffer(bytes.fromhex(row["y"]), "<f4")[0]
        assert first == FACTORS[row["version"]], "the row's output is not its version's"
        assert row["digest"] == coreutils_digest(root / PLACES[row["version"]] / "m" / row["version"])


def test_a_reload_of_a_bad_file_changes_nothing(served: GatewayProcess, root: Path) -> None:
    before = len(served.output())
    good = (root / "gateway.yaml").read_text()
    (root / "gateway.yaml").write_text(good.replace('"percent": 30', '"percent": 300'))
    served.process.send_signal(signal.SIGHUP)
    until(lambda: "gateway.yaml:" in served.output()[before:], 60, "the fault is not told with file and line")
    (root / "gateway.yaml").write_text(good)
    assert version(ask(served, "m", X_Variant="canary"), root) == "2"
    assert version(ask(served, "m", path="/versions/1"), root) == "1"


def test_the_canary_takes_over_and_goes_back(served: GatewayProcess, root: Path) -> None:
    done = operate(served, "promote", "m")
    assert done.returncode == 0, done.stderr
    told = {ask(served, "m").model()["version"] for _ in range(20)}
    assert told == {"2"}, "the canary is the champion"
    done = operate(served, "rollback", "m")
    assert done.returncode == 0, done.stderr
    assert ask(served, "m", X_User="x").model()["version"] in {"1", "2"}
    until(lambda: {ask(served, "m").model()["version"] for _ in range(40)} >= {"1"}, 60, "it does not go back")
