"""A second pair of servers: no model control, and APIs that want a header. Differences are judged as everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tritonclient.grpc import service_pb2 as pb

from tests.differential.build import SIMPLE, ask, call, infer, simple
from tests.differential.campaign import Setting, Tally, both, run
from tests.differential.exchange import Case, Grpc, Http
from tests.differential.zoo import M

pytestmark = pytest.mark.slow

APIS = "model-repository,statistics,trace"
SETTING = Setting(
    [M],
    flags=[f"--http-restricted-api={APIS}:admin=secret", f"--grpc-restricted-protocol={APIS}:admin=secret"],
    server={"restricted_apis": [{"apis": APIS.split(","), "header": "admin", "value": "secret"}]},
)
KEY = "triton-grpc-protocol-admin"


def _cases() -> Iterator[Case]:
    stats, index, trace = "/v2/models/m/stats", "/v2/repository/index", "/v2/trace/setting"
    load, unload = "/v2/repository/models/m/load", "/v2/repository/models/m/unload"
    requests = [
        ("GET", stats),
        ("GET", "/v2/models/stats"),
        ("POST", index),
        ("GET", trace),
        ("POST", load),
        ("POST", unload),
    ]
    for method, path in requests:
        for name, value in {"no header": None, "wrong": "Secret", "longer": "secret2", "right": "secret"}.items():
            headers = {} if value is None else {"Admin": value}
            says = ("This API is restricted, expecting header 'admin'",) if value != "secret" else ()
            yield Case(f"restricted/{method} {path} {name}", (Http(method, path, b"", headers, says),))
    for path in (
        "/v2",
        "/v2/health/ready",
        "/v2/models/m",
        "/v2/models/m/config",
        "/v2/logging",
        "/v2/systemsharedmemory/status",
    ):
        yield Case(f"restricted/open {path}", (Http("GET", path),))
    yield Case("restricted/infer", (infer(ask(SIMPLE)),))
    yield Case("restricted/unknown model's stats", (Http("GET", "/v2/models/nobody/stats"),))
    messages = {
        "ModelStatistics": pb.ModelStatisticsRequest(name="m"),
        "RepositoryIndex": pb.RepositoryIndexRequest(),
        "RepositoryModelLoad": pb.RepositoryModelLoadRequest(model_name="m"),
        "RepositoryModelUnload": pb.RepositoryModelUnloadRequest(model_name="m"),
        "TraceSetting": pb.TraceSettingRequest(),
    }
    for method, message in messages.items():
        for name, value in {"no metadata": None, "wrong": "Secret", "right": "secret"}.items():
            metadata = () if value is None else ((KEY, value),)
            says = (KEY,) if value != "secret" else ()
            yield Case(f"restricted/{method} {name}", (call(message, method, metadata=metadata, says=says),))
    yield Case("restricted/ServerMetadata", (Grpc("ServerMetadata"),))
    yield Case("restricted/ModelInfer", (call(simple()),))


CASES = tuple(_cases())


@pytest.fixture(scope="module")
def tally(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tally]:
    with both(tmp_path_factory.mktemp("restricted"), SETTING) as (real, ours):
        yield run(CASES, real, ours)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_answers_are_equal_or_their_difference_is_explained(tally: Tally, case: Case) -> None:
    found = tally.unexplained[case.name]
    assert not found, "\n".join(map(str, found))
