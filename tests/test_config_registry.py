"""The section `registries`: what is allowed, where secrets come from, and what the environment adds."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.cli import main
from gateway.config import Config, load
from gateway.config_sources import LOCK_NAME, all_references, check_lock, registries_of, registry_entries, secret
from gateway.errors import ConfigError
from gateway.registry.lock import Locked, LockFile
from gateway.registry.mlflow import MlflowResolver

MODEL = "models: [{source: 'models:/digits@champion'}]\n"


def read(tmp_path: Path, text: str, **environ: str) -> Config:
    (tmp_path / "gateway.yaml").write_text(text)
    return load(tmp_path / "gateway.yaml", {}, environ)


def faults(tmp_path: Path, text: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, **environ)
    return [f"{fault.line}: {fault.where}: {fault.message}" for fault in caught.value.faults]


def test_a_reference_needs_its_registry_and_the_environment_may_name_it(tmp_path: Path) -> None:
    (said,) = faults(tmp_path, MODEL)
    assert "add registries.mlflow or set MLFLOW_TRACKING_URI to an http:// or https:// address" in said
    config = read(tmp_path, MODEL, MLFLOW_TRACKING_URI="http://h:5000")
    assert config.registries.mlflow is not None
    assert config.registries.mlflow.url == "http://h:5000"
    own = read(tmp_path, "registries: {mlflow: {url: 'http://own'}}\n" + MODEL, MLFLOW_TRACKING_URI="http://h:5000")
    assert own.registries.mlflow is not None
    assert own.registries.mlflow.url == "http://own"
    (said,) = faults(tmp_path, MODEL, MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
    assert "add registries.mlflow" in said


def test_sources_of_the_command_line_are_held_against_it_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"SOURCE 'models:/a@b': the configuration does not say where"):
        load(None, {}, {}).with_sources(["models:/a@b"])
    config = load(None, {}, {"MLFLOW_TRACKING_URI": "http://h"}).with_sources(["models:/a@b"])
    assert [(name, entry.source) for name, entry in registry_entries(config)] == [("a", "models:/a@b")]
    assert read(tmp_path, "registries: {mlflow: {url: 'http://h'}}").with_sources(["models:/a@b"]).models[0].source == (
        "models:/a@b"
    ), "it is no path"


def test_a_name_that_cannot_be_one_needs_another(tmp_path: Path) -> None:
    registries = "registries: {mlflow: {url: 'http://h'}}\n"
    (said,) = faults(tmp_path, registries + "models: [{source: 'models:/my model@x'}]")
    assert "'my model' cannot be a model's name; write one in the key name" in said
    config = read(tmp_path, registries + "models: [{source: 'models:/my model@x', name: mine}]")
    assert [name for name, _ in registry_entries(config)] == ["mine"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{mlflow: {}}", "registries.mlflow.url: "),
        ("{mlflow: {url: 'ftp://h'}}", "registries.mlflow.url: is no address of a server"),
        ("{mlflow: {url: 'env:NOT_SET'}}", "url: env: is for credentials only; write the address itself, for example"),
        (
            "{s3: {endpoint: 'file:nowhere', buckets: [m]}}",
            "endpoint: file: is for credentials only; write the address",
        ),
        ("{mlflow: {url: 'http://ada:secret@h'}}", "registries.mlflow.url: holds a user name or password"),
        ("{mlflow: {url: 'http://h:99999'}}", "no usable port"),
        ("{mlflow: {url: 'http://h/?token=secret'}}", "has more than an address and a path"),
        ("{mlflow: {url: 'http://h', token: 'secret'}}", "registries.mlflow.token: "),
        ("{mlflow: {url: 'http://h', token: 'env:NOT_SET'}}", "the variable NOT_SET is not set"),
        ("{mlflow: {url: 'http://h', token: 'env:not a name'}}", "followed by the name of a variable"),
        ("{mlflow: {url: 'http://h', password: 'file:nowhere'}}", "cannot be read or is empty"),
        ("{mlflow: {url: 'http://h', ca: nowhere.pem}}", "there is no file"),
        ("{mlflow: {url: 'http://h', tokn: 'x'}}", "did you mean 'token'?"),
        ("{keep_versions: 0}", "registries.keep_versions: "),
        ("{locked: 'yes'}", "registries.locked: "),
    ],
)
def test_every_fault_is_told_with_its_place_and_without_secrets(tmp_path: Path, section: str, said: str) -> None:
    found = faults(tmp_path, f"registries: {section}")
    assert len(found) == 1, found
    assert said in found[0]
    assert "secret" not in found[0]


def test_options_and_variables(tmp_path: Path) -> None:
    config = load(None, {"locked": True, "model_cache": str(tmp_path)}, {})
    assert (config.registries.locked, config.registries.cache) == (True, str(tmp_path))
    config = load(None, {}, {"GATEWAY_LOCKED": "true", "GATEWAY_MODEL_CACHE": "/c"})
    assert (config.registries.locked, config.registries.cache) == (True, "/c")


def test_where_cache_and_lock_lie(tmp_path: Path) -> None:
    config = read(tmp_path, "registries: {cache: ./c}")
    made = registries_of(config)
    assert made.cache.directory == tmp_path / "c"
    assert made.lock.path == tmp_path / LOCK_NAME
    assert registries_of(read(tmp_path, "registries: {lock: x/y.lock}")).lock.path == tmp_path / "x" / "y.lock"
    bare = registries_of(load(None, {}, {"XDG_CACHE_HOME": str(tmp_path)}))
    assert bare.cache.directory == tmp_path / "oip-gateway" / "models"
    assert bare.lock.path == tmp_path / "oip-gateway" / "models" / LOCK_NAME
    assert repr(bare) == "<Registries none>"


def test_secrets_are_looked_up_each_time_and_shown_nowhere(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("one\n")
    text = "registries: {mlflow: {url: 'http://h', token: 'file:token', password: 'env:PW'}}"
    config = read(tmp_path, text, PW="hidden-password", MLFLOW_TRACKING_USERNAME="ada")
    assert "hidden" not in repr(config)
    resolver = registries_of(config)._resolvers["models"]
    assert isinstance(resolver, MlflowResolver)
    assert resolver._credentials() == {"Authorization": "Bearer one"}
    (tmp_path / "token").write_text("two\n")
    assert resolver._credentials() == {"Authorization": "Bearer two"}
    (tmp_path / "token").unlink()
    assert resolver._credentials()["Authorization"].startswith("Basic ")
    assert secret(None, tmp_path, {"D": "v"}, "D")() == "v"


def test_references_of_canaries_and_shadows_are_locked_too(tmp_path: Path) -> None:
    digest = "sha256:" + "a" * 64
    text = (
        "registries: {mlflow: {url: 'http://h'}}\n"
        f"models: [{{source: 'models:/d@champion', digest: '{digest}', canary: {{source: 'models:/d@next'}},"
        " shadow: {source: 'models:/d@champion'}}]"
    )
    assert all_references(read(tmp_path, text)) == [("models:/d@champion", (digest,)), ("models:/d@next", ())]


def test_a_lock_that_lacks_something_is_found_without_asking_anybody(tmp_path: Path) -> None:
    text = "registries: {locked: true, mlflow: {url: 'http://127.0.0.1:1'}}\n" + MODEL
    config = read(tmp_path, text)
    assert main(["check", "-c", str(tmp_path / "gateway.yaml")]) == 2
    with pytest.raises(ConfigError, match=r"models\.lock: models:/digits@champion: is not named there"):
        check_lock(config)
    LockFile(tmp_path / LOCK_NAME).record(
        Locked("models:/digits@champion", "models:/digits/1", "m-1", "1", "", "sha256:" + "a" * 64, "now")
    )
    check_lock(config)
    assert main(["check", "-c", str(tmp_path / "gateway.yaml")]) == 0
    (tmp_path / LOCK_NAME).write_text("[[")
    with pytest.raises(ConfigError, match="is not TOML"):
        check_lock(config)
    check_lock(read(tmp_path, "{}"))
