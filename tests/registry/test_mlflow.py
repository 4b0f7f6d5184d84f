"""MLflow's API when it is not well: what a registry may say wrongly, and what of it reaches anybody.

What a well one says is tested with a real server (tests/live/test_mlflow_models.py); the answers here inject faults.
"""

from __future__ import annotations

import json
import socket
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import SourceError, SourceUnavailable
from gateway.registry.mlflow import ARTIFACTS, MlflowResolver, MlflowSettings, _datasets
from gateway.registry.resolver import Bounds, Lineage, Resolved
from tests.registry.scripted_http import Scripted, answer, scripted

ID = "m-" + "1" * 32
VERSION = {
    "name": "digits", "version": "3", "creation_timestamp": 1795432860471, "source": f"models:/{ID}",
    "run_id": "r1", "status": "READY",
}  # fmt: skip
RESOLVED = Resolved("models:/digits@champion", "models:/digits/3", ID, "3", True, "http://h")


class Mlflow:
    """Answers by path; a test changes what it likes. Values: an object, or bytes of a whole answer."""

    def __init__(self) -> None:
        self.server = Scripted(0)
        self.says: dict[str, Any] = {
            "registered-models/alias": {"model_version": VERSION},
            "runs/get": {"run": {"info": {"experiment_id": "7"}, "data": {"tags": [
                {"key": "mlflow.source.git.commit", "value": "abc"}, {"key": "mlflow.user", "value": "ada"}]}}},
            "experiments/get": {"experiment": {"name": "night"}},
            "model-versions/get-download-uri": {"artifact_uri": "mlflow-artifacts:/7/models/x/artifacts"},
            "": {"files": [{"path": "model.onnx", "is_dir": False, "file_size": 3}]},
            "/model.onnx": answer(200, b"one"),
        }  # fmt: skip

    def script(self, head: bytes, connection: socket.socket) -> None:
        target = urllib.parse.urlsplit(head.split(b" ")[1].decode())
        path = target.path.removeprefix("/api/2.0/mlflow/")
        if target.path.startswith(f"/{ARTIFACTS}"):
            listed = urllib.parse.parse_qs(target.query).get("path", [""])[0]
            path = (listed or target.path.removeprefix(f"/{ARTIFACTS}/")).removeprefix("7/models/x/artifacts")
        said = self.says.get(urllib.parse.unquote(path))
        if said is None:
            said = answer(404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}')
        connection.sendall(said if isinstance(said, bytes) else answer(200, json.dumps(said).encode()))

    def resolver(self, **bounds: Any) -> MlflowResolver:
        return MlflowResolver(MlflowSettings(self.server.url, token=lambda: "hidden"), Bounds(**bounds))


@pytest.fixture
def mlflow() -> Iterator[Mlflow]:
    made = Mlflow()
    with scripted(made.script) as made.server:
        yield made


def test_what_is_said_of_a_version(mlflow: Mlflow) -> None:
    found = mlflow.resolver().resolve("models:/digits@champion")
    assert (found.uri, found.immutable_id, found.version, found.mutable) == ("models:/digits/3", ID, "3", True)
    assert found.registry == mlflow.server.url
    lineage = found.lineage
    assert (lineage.run_id, lineage.git_commit, lineage.experiment, lineage.created_by) == ("r1", "abc", "night", "ada")
    assert lineage.created_at == "2026-11-23T11:21:00.471Z"
    assert lineage.datasets == ()
    assert set(mlflow.server.heads("authorization")) == {"Bearer hidden"}


def test_latest_is_the_highest_number_wherever_it_is_listed(mlflow: Mlflow) -> None:
    listed = [{**VERSION, "version": number} for number in ("9", "10", "2")]
    mlflow.says["registered-models/get"] = {"registered_model": {"latest_versions": listed}}
    assert mlflow.resolver().resolve("models:/digits/latest").version == "10"


def test_a_deleted_run_is_unknown_and_not_guessed(mlflow: Mlflow) -> None:
    del mlflow.says["runs/get"]
    lineage = mlflow.resolver().resolve("models:/digits@champion").lineage
    assert lineage == Lineage(
        run_id="r1", model_id=ID, created_at="2026-11-23T11:21:00.471Z",
        notes=("the run r1 cannot be read in MLflow: what it says is unknown",),
    )  # fmt: skip


def test_a_run_that_we_may_not_read_is_unknown_and_one_that_cannot_be_had_now_is_asked_again(mlflow: Mlflow) -> None:
    mlflow.says["runs/get"] = answer(403)
    assert mlflow.resolver().resolve("models:/digits@champion").lineage.git_commit is None
    mlflow.says["runs/get"] = answer(503)
    with pytest.raises(SourceUnavailable, match="answered 503"):
        mlflow.resolver().resolve("models:/digits@champion")


def test_without_a_logged_model_the_time_tells_a_number_that_is_used_again(mlflow: Mlflow) -> None:
    mlflow.says["registered-models/alias"] = {"model_version": {**VERSION, "source": "runs:/r1/model"}}
    assert mlflow.resolver().resolve("models:/digits@champion").immutable_id == "digits/3/1795432860471"


@pytest.mark.parametrize(
    ("said", "expected", "error"),
    [
        ({"model_version": {**VERSION, "version": "../3"}}, "version that is no number", SourceError),
        ({"model_version": {**VERSION, "status": "PENDING_REGISTRATION"}}, "is not complete", SourceUnavailable),
        ({"model_version": []}, "answered without 'model_version'", SourceUnavailable),
        ([], "answered without 'model_version'", SourceUnavailable),
        (answer(200, b"<html>log in</html>"), "not JSON", SourceUnavailable),
        (answer(200, b"[" * 100_000), "not JSON", SourceUnavailable),
        (answer(401), "answered 401; check the credentials", SourceUnavailable),
        (answer(302, Location="http://127.0.0.1:1/login"), "redirects to", SourceError),
        (answer(400, b'{"message": "Registered model alias x not found."}'), "no model 'digits' with the", SourceError),
    ],
)  # fmt: skip
def test_what_mlflow_may_say_wrongly(mlflow: Mlflow, said: Any, expected: str, error: type[SourceError]) -> None:
    mlflow.says["registered-models/alias"] = said
    with pytest.raises(SourceError, match=expected) as told:
        mlflow.resolver().resolve("models:/digits@champion")
    assert type(told.value) is error
    assert "hidden" not in str(told.value)


@pytest.mark.parametrize(
    "place",
    [
        "file:///etc", "/etc", "http://169.254.169.254/latest", "s3://bucket/x", "dbfs:/x",
        "mlflow-artifacts://elsewhere:5000/x", "", "runs:/r1/model",
    ],
)  # fmt: skip
def test_files_are_fetched_from_nowhere_else(mlflow: Mlflow, tmp_path: Path, place: str) -> None:
    mlflow.says["model-versions/get-download-uri"] = {"artifact_uri": place}
    with pytest.raises(SourceError, match=r"where the gateway may not look|does not say where"):
        mlflow.resolver().fetch(RESOLVED, tmp_path)
    assert len(mlflow.server.requests) == 1, "nothing else was opened"


def test_another_store_fetches_what_it_is_allowed_to(mlflow: Mlflow, tmp_path: Path) -> None:
    mlflow.says["model-versions/get-download-uri"] = {"artifact_uri": "s3://bucket/x"}
    seen = []
    resolver = MlflowResolver(
        MlflowSettings(mlflow.server.url), Bounds(), {"s3": lambda uri, into, told: seen.append((uri, into))}
    )
    resolver.fetch(RESOLVED, tmp_path)
    assert seen == [("s3://bucket/x", tmp_path)]


@pytest.mark.parametrize("name", ["../evil", "..", "", "a\x00b", "a\nb", "x" * 300, 3, "a\\b"])
def test_names_of_files_that_are_none(mlflow: Mlflow, tmp_path: Path, name: object) -> None:
    mlflow.says[""] = {"files": [{"path": name, "is_dir": False, "file_size": 1}]}
    mlflow.says["/evil"] = answer(200, b"x")
    inside = tmp_path / "inside"
    inside.mkdir()
    if name == "../evil":  # of a path MLflow takes the last part only, and so do we
        mlflow.resolver().fetch(RESOLVED, inside)
    else:
        with pytest.raises(SourceError, match="unusable name"):
            mlflow.resolver().fetch(RESOLVED, inside)
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


def test_too_many_files_too_many_bytes_and_too_deep(mlflow: Mlflow, tmp_path: Path) -> None:
    mlflow.says[""] = {"files": [{"path": f"f{i}", "is_dir": False, "file_size": 10} for i in range(20)]}
    with pytest.raises(SourceError, match="more than 19 files"):
        mlflow.resolver(max_files=19).fetch(RESOLVED, tmp_path)
    with pytest.raises(SourceError, match="200 bytes, more than"):
        mlflow.resolver(max_bytes=199).fetch(RESOLVED, tmp_path)
    mlflow.says[""] = {"files": [{"path": "d", "is_dir": True}]}
    for depth in range(1, 20):
        mlflow.says["/d" * depth] = {"files": [{"path": "d", "is_dir": True}]}
    with pytest.raises(SourceError, match="nested deeper"):
        mlflow.resolver().fetch(RESOLVED, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (answer(200, b"on"), "lists model.onnx with 3 bytes and sent 2"),
        (answer(200, b"x" * 1000), "1000 bytes, more than the 500"),
        (b"HTTP/1.1 200 X\r\nContent-Length: 3\r\n\r\non", "sent 2 bytes of 3"),
        (answer(404), "answered 404"),
    ],
)
def test_a_file_that_is_not_what_was_listed(mlflow: Mlflow, tmp_path: Path, content: bytes, said: str) -> None:
    mlflow.says["/model.onnx"] = content
    with pytest.raises(SourceError, match=said):
        mlflow.resolver(max_bytes=500).fetch(RESOLVED, tmp_path)


def test_files_below_directories_arrive_and_are_told(mlflow: Mlflow, tmp_path: Path) -> None:
    mlflow.says[""]["files"].append({"path": "da ta", "is_dir": True})
    mlflow.says["/da ta"] = {"files": [{"path": "w#1.bin", "is_dir": False, "file_size": "2"}]}
    mlflow.says["/da ta/w#1.bin"] = answer(200, b"ww")
    told: list[tuple[int, int | None]] = []
    mlflow.resolver().fetch(RESOLVED, tmp_path, lambda done, total: told.append((done, total)))
    assert (tmp_path / "model.onnx").read_bytes() == b"one"
    assert (tmp_path / "da ta" / "w#1.bin").read_bytes() == b"ww"
    assert told[-1] == (5, 5)


def test_who_we_are() -> None:
    with scripted(lambda head, connection: connection.sendall(answer(404))) as server:
        settings = MlflowSettings(server.url, username=lambda: "ada", password=lambda: "p")
        with pytest.raises(SourceError, match="has no version 3"):
            MlflowResolver(settings, Bounds()).resolve("models:/digits/3")
        assert server.heads("authorization") == ["Basic YWRhOnA="]
        assert repr(MlflowResolver(settings, Bounds())) == f"<MlflowResolver {server.url}>"


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ('{"url": "https://u:p@h/x.csv?sig=1&a=2"}', '{"url": "https://h/x.csv"}'),
        ('{"uri": "s3://b/k"}', '{"uri": "s3://b/k"}'),
        (None, None),
    ],
)
def test_a_data_set_is_named_without_the_secrets_of_its_address(source: str | None, kept: str | None) -> None:
    listed = [{"dataset": {"name": "d", "source": source}}]
    assert [dataset.source for dataset in _datasets(listed)] == [kept]
