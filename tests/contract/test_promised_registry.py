"""What models from a registry promise, with a real MLflow server: lineage, following an alias, pins, lock, cache."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.contract.black_box import DIGEST, Answer, ask, command, configuration, operate, times
from tests.contract.outage import Outage
from tests.live.gateway_process import GatewayProcess, gateway, until
from tests.live.mlflow_server import MlflowServer, Published, mlflow

__all__ = ["mlflow"]

pytestmark = pytest.mark.slow
NAME = "promised"
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
FACTORS = {"1": 2.0, "2": 3.0, "3": 5.0}
SIGNATURE = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": [-1, 2]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": [-1, 2]}],
}


@pytest.fixture(scope="module")
def published(mlflow: MlflowServer) -> dict[str, Published]:
    """Three versions by number, each multiplying by a number of its own; the first is the champion."""
    first = mlflow.publish(
        NAME,
        times(FACTORS["1"]),
        alias="champion",
        signature=SIGNATURE,
        dataset="numbers",
        run_tags={"mlflow.source.git.commit": COMMIT},
    )
    versions = [first, *(mlflow.publish(NAME, times(FACTORS[number])) for number in "23")]
    assert [version.version for version in versions] == ["1", "2", "3"]
    return {version.version: version for version in versions}


@dataclass
class Place:
    """Where a gateway of these tests keeps what it has."""

    root: Path
    registry: Outage
    digests: dict[str, str]

    def configured(self, *models: dict[str, Any], **registries: Any) -> str:
        kept = {"cache": str(self.root / "cache"), "lock": str(self.root / "models.lock")}
        document = {
            "server": {"workers": 1, "drain_delay_s": 0},
            "registries": {**kept, "mlflow": {"url": self.registry.url}, **registries},
            "models": list(models),
        }
        return str(configuration(self.root / "gateway.yaml", document))


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, mlflow: MlflowServer, published: dict[str, Published]
) -> Iterator[Place]:
    """With the digests that `gateway lock` tells of the three versions, and all of them in the cache."""
    made = Place(tmp_path_factory.mktemp("registry"), Outage(mlflow.port), {})
    references = [f"models:/{NAME}/{number}" for number in published]
    file = made.configured(*({"name": f"m{number}", "source": f"models:/{NAME}/{number}"} for number in published))
    done = command("lock", "-c", file)
    assert done.returncode == 0, done.stderr
    for reference in references:
        assert reference in done.stdout, "it says what changed"
    lock = tomllib.loads((made.root / "models.lock").read_text())
    made.digests = {entry["version"]: entry["digest"] for entry in lock["model"]}
    assert [(entry["reference"], entry["uri"]) for entry in lock["model"]] == [(name, name) for name in references]
    assert all(entry["immutable_id"] for entry in lock["model"])
    assert set(made.digests) == set(published)
    yield made
    made.registry.down()


def consistent(place: Place, answer: Answer) -> str:
    """The version that answered: what the headers say is what calculated."""
    told = answer.model()
    assert answer.factor() == FACTORS[told["version"]]
    assert told["digest"] == place.digests[told["version"]]
    return str(told["version"])


# -- lineage -----------------------------------------------------------------------------------------------------------


def test_a_reference_on_the_command_line_is_served_with_its_lineage(
    mlflow: MlflowServer, published: dict[str, Published], tmp_path: Path
) -> None:
    env = {"MLFLOW_TRACKING_URI": mlflow.url}
    with gateway(
        "serve", f"models:/{NAME}@champion", "--workers", "1", "--model-cache", str(tmp_path), env=env
    ) as process:
        answer = ask(process, NAME)
        assert answer.factor() == FACTORS["1"]
        told = json.loads(process.request("GET", f"/v2/models/{NAME}/provenance")[2])
    version = published["1"]
    assert answer.model() == {"name": NAME, "version": "1", "digest": told["digest"]}
    assert told["source"] == f"models:/{NAME}/1", "the version, not the alias"
    assert version.model_id in told["immutable_id"] or told["immutable_id"].endswith("/1")
    assert (told["run_id"], told["git_commit"]) == (version.run_id, COMMIT)
    (dataset,) = told["datasets"]
    assert dataset["name"] == "numbers"
    assert dataset["digest"]
    assert "md5" in json.dumps(dataset).lower(), "a weak digest is labelled"
    assert "onnxruntime" in told["runtime"]
    assert "signature" in told
    listing = "".join(f"{file['sha256']}  {file['path']}\n" for file in told["files"])
    assert "sha256:" + hashlib.sha256(listing.encode()).hexdigest() == told["digest"]
    stored = mlflow.files(version)
    for file in told["files"]:
        assert hashlib.sha256((stored / file["path"]).read_bytes()).hexdigest() == file["sha256"], file["path"]
    lock = (tmp_path / "models.lock").read_text()
    for part in (f"models:/{NAME}@champion", f"models:/{NAME}/1", told["digest"]):
        assert part in lock
    assert (tmp_path / "sha256" / told["digest"].removeprefix("sha256:")).is_dir(), "the cache is content-addressed"


# -- following ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def following(place: Place) -> Iterator[GatewayProcess]:
    """`free` follows the alias, `pinned` too, but may only be the first version."""
    source = {"source": f"models:/{NAME}@champion", "poll_interval_s": 0.3}
    file = place.configured({"name": "free", **source}, {"name": "pinned", **source, "digest": place.digests["1"]})
    with gateway("serve", "-c", file) as process:
        yield process


def test_an_alias_is_followed_rolled_back_and_followed_again(
    mlflow: MlflowServer, place: Place, following: GatewayProcess
) -> None:
    def serves(version: str, name: str = "free") -> bool:
        return consistent(place, ask(following, name)) == version

    assert serves("1")
    assert serves("1", "pinned")
    mlflow.set_alias(NAME, "champion", "2")
    until(lambda: serves("2"), 60, "a moved alias was not followed")

    def why() -> str:
        lines = operate(following, "history", "pinned").stdout.splitlines()
        return "".join(line for line in lines if "refused" in line)

    until(lambda: place.digests["2"] in why(), 120, "the refusal does not name the digest that came")
    assert place.digests["1"] in why(), "both digests are named"
    assert serves("1", "pinned"), "what serves goes on serving"

    back = operate(following, "rollback", "free")
    assert back.returncode == 0, back.stderr
    assert serves("1"), "a rollback is there when the command ends"
    again = operate(following, "refresh", "free")
    assert serves("1"), "it is not followed to what it was rolled back from"
    forced = operate(following, "refresh", "free", "--force")
    assert forced.returncode == 0, (again, forced)
    until(lambda: serves("2"), 60, "--force does not follow")
    assert operate(following, "rollback", "free").returncode == 0
    mlflow.set_alias(NAME, "champion", "3")
    until(lambda: serves("3"), 60, "an alias that moved again was not followed")

    history = operate(following, "history", "free").stdout
    assert len(re.findall("rolled.back", history)) >= 2, history
    for version in "123":
        assert place.digests[version][7:19] in history or f"version {version}" in history
    assert operate(following, "rollback", "nobody").returncode == 1
    told = json.loads(following.request("GET", "/v2/models/free/provenance")[2])
    assert (told["version"], told["digest"], told["source"]) == ("3", place.digests["3"], f"models:/{NAME}/3")


# -- pins, lock and cache ----------------------------------------------------------------------------------------------


def refused(*arguments: str) -> str:
    """What a gateway says that does not start because of a model."""
    done = command("serve", "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", *arguments)
    assert done.returncode == 4, (done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def test_another_digest_than_the_pinned_one_does_not_start(place: Place) -> None:
    entry = {"name": "m", "source": f"models:/{NAME}/2", "digest": place.digests["1"]}
    said = refused("-c", place.configured(entry))
    assert place.digests["1"] in said
    assert place.digests["2"] in said


def test_a_lock_serves_without_the_registry_and_nothing_else(place: Place) -> None:
    locked = {"name": "m", "source": f"models:/{NAME}/2"}
    file = place.configured(locked)
    with place.registry.out(), gateway("serve", "--locked", "-c", file) as process:
        assert consistent(place, ask(process, "m")) == "2"
    other = {"name": "m", "source": f"models:/{NAME}@unheard"}
    said = refused("--locked", "-c", place.configured(other))
    assert f"models:/{NAME}@unheard" in said
    assert "models.lock" in said


def test_what_served_last_serves_when_the_registry_is_down(place: Place) -> None:
    file = place.configured({"name": "m", "source": f"models:/{NAME}@champion"})
    with gateway("serve", "-c", file) as process:
        last = consistent(place, ask(process, "m"))
        assert process.metric("gateway_registry_stale") == 0
    with place.registry.out(), gateway("serve", "-c", file) as process:
        assert consistent(place, ask(process, "m")) == last
        assert process.metric("gateway_registry_stale") == 1


def test_a_tampered_cache_is_never_served(place: Place) -> None:
    entry = {"name": "m", "source": f"models:/{NAME}/1"}
    kept = place.root / "cache/sha256" / place.digests["1"].removeprefix("sha256:")
    (model,) = kept.rglob("*.onnx")
    good = model.read_bytes()
    model.parent.chmod(0o700)
    model.chmod(0o600)
    model.write_bytes(times(1000.0))
    with place.registry.out():
        said = refused("--locked", "-c", place.configured(entry))
    assert place.digests["1"] in said
    with gateway("serve", "-c", place.configured(entry)) as process:
        assert consistent(place, ask(process, "m")) == "1", "it was fetched anew"
    (model,) = kept.rglob("*.onnx")
    assert model.read_bytes() == good


def test_a_version_whose_files_were_overwritten_is_refused(
    mlflow: MlflowServer, published: dict[str, Published], place: Place
) -> None:
    (file,) = mlflow.files(published["2"]).rglob("*.onnx")
    good = file.read_bytes()
    file.write_bytes(times(1000.0))
    try:
        entry = {"name": "m", "source": f"models:/{NAME}/2"}
        elsewhere = place.root / "empty-cache"
        said = refused("-c", place.configured(entry, cache=str(elsewhere)))
    finally:
        file.write_bytes(good)
    digests = set(DIGEST.findall(said))
    assert place.digests["2"] in digests
    assert len(digests) == 2, "both digests are named"
