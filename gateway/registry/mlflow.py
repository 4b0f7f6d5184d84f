"""MLflow's model registry as a source of models, over its REST API.

    models:/digits@champion   models:/digits/3   models:/digits/latest   models:/m-<32 hex>

API: https://mlflow.org/docs/latest/api_reference/rest-api.html (2.0, MLflow 2.3 and newer; logged models since 3.0) and
the artefact proxy that `mlflow server` offers by default. MLflow's own client is not used: its calls and downloads are
bounded neither in time nor in bytes, it takes its credentials from the process's environment only, and importing it
costs this process 1.7 s and 115 MB.

Rules: what MLflow does not say is unknown. MLflow keeps no digest of a model's files, so a version's files could be
overwritten: the digest in lock and cache finds that out. Its digest of a dataset covers the beginning only, and says so
here. Artefacts come through the tracking server; those that lie in an object store directly are fetched from there
only if the configuration allows that store; others are refused, so that a registry cannot point the gateway at
something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, Final
from urllib.parse import quote, urlsplit

from gateway.errors import SourceError, SourceUnavailable
from gateway.registry.locator import MlflowReference, locate_mlflow
from gateway.registry.resolver import Bounds, Dataset, Lineage, Resolved, Told, untold
from gateway.registry.web import Answer, Web, basic, refusal, shown

API: Final = "api/2.0/mlflow"
ARTIFACTS: Final = "api/2.0/mlflow-artifacts/artifacts"
MAX_DEPTH: Final = 16
MAX_ITEMS: Final = 100
"""Tags and datasets that are taken over."""
MAX_TEXT: Final = 2048
DATASET_DIGEST: Final = "MLflow's own: for tables and arrays MD5 over the first 10000 rows, 8 hex digits; weak evidence"
_MODEL_ID: Final = re.compile(r"models:/(m-[0-9a-f]{32})/?")
_USER: Final = re.compile(r"(://)[^/@\s\"'\\]*@")
_QUERY: Final = re.compile(r"(://[^?\s\"'\\]*)\?[^\s\"'\\]*")

Foreign = Callable[[str, Path, Told], None]
"""Fetches a version directory from another store: its URI, an empty directory, progress."""


def _nothing() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class MlflowSettings:
    """Where the tracking server is, and who we are. Credentials are asked for with every request."""

    url: str
    token: Callable[[], str] = _nothing
    username: Callable[[], str] = _nothing
    password: Callable[[], str] = _nothing
    ca: Path | None = None


class MlflowResolver:
    """One tracking server. Keeps nothing between calls."""

    scheme = "models"

    def __init__(self, settings: MlflowSettings, bounds: Bounds, foreign: Mapping[str, Foreign] | None = None) -> None:
        """`foreign`: URI scheme → who fetches artefacts from there."""
        self._settings = settings
        self._bounds = bounds
        self._foreign = foreign or {}
        self._web = Web(settings.url, self._credentials, ca=settings.ca)

    # -- what a reference means --------------------------------------------------------------------------------------

    def registry_of(self, reference: str) -> str:
        """See `Resolver`."""
        return shown(self._settings.url)

    def resolve(self, reference: str) -> Resolved:
        """See `Resolver`."""
        located = locate_mlflow(reference)
        deadline = monotonic() + self._bounds.resolve_s
        if located.model_id is not None:
            return self._logged_model(reference, located.model_id, deadline)
        found = self._version(located, deadline)
        name, version = located.name, str(found.get("version", ""))
        if not re.fullmatch(r"[1-9][0-9]{0,9}", version):
            raise SourceError(f"MLflow gives model '{name}' a version that is no number: {version[:64]!r}")
        if (status := found.get("status", "READY")) != "READY":
            raise SourceUnavailable(
                f"models:/{name}/{version} is not complete in MLflow: its status is {str(status)[:64]!a}"
            )
        model = _MODEL_ID.fullmatch(_text(found.get("source")) or "")
        model_id = _text(found.get("model_id")) or (model[1] if model else None)
        # A deleted version's number is given again: the time of its creation tells the two apart.
        identity = model_id or f"{name}/{version}/{found.get('creation_timestamp', '')}"
        lineage = self._lineage(_text(found.get("run_id")), model_id, found, deadline)
        return Resolved(
            reference,
            f"models:/{name}/{version}",
            identity,
            version,
            located.mutable,
            shown(self._settings.url),
            lineage,
        )

    def _version(self, located: MlflowReference, deadline: float) -> dict[str, Any]:
        name = located.name
        if located.alias is not None:
            query = {"name": name, "alias": located.alias}
            missing = f"has no model '{name}' with the alias '{located.alias}'; set it, or name another"
            return self._ask("registered-models/alias", query, deadline, missing, "model_version")
        if located.version is not None:
            query = {"name": name, "version": located.version}
            missing = f"has no version {located.version} of a model '{name}'"
            return self._ask("model-versions/get", query, deadline, missing, "model_version")
        missing = f"has no model '{name}' with a version"
        latest = self._ask("registered-models/get", {"name": name}, deadline, missing, "registered_model")
        versions = [v for v in _listed(latest.get("latest_versions")) if str(v.get("version", "")).isdecimal()]
        if not versions:
            raise SourceError(f"MLflow at {shown(self._settings.url)} {missing}")
        return max(versions, key=lambda version: int(version["version"]))

    def _logged_model(self, reference: str, model_id: str, deadline: float) -> Resolved:
        info = self._model_info(model_id, deadline)
        if (status := info.get("status")) not in (None, "LOGGED_MODEL_READY", "READY"):
            raise SourceUnavailable(f"{reference} is not complete in MLflow: its status is {str(status)[:64]!a}")
        lineage = self._lineage(_text(info.get("source_run_id")), model_id, info, deadline)
        return Resolved(reference, f"models:/{model_id}", model_id, "1", False, shown(self._settings.url), lineage)

    def _model_info(self, model_id: str, deadline: float) -> dict[str, Any]:
        model = self._ask(f"logged-models/{model_id}", {}, deadline, f"has no logged model {model_id}", "model")
        info = model.get("info")
        return info if isinstance(info, dict) else {}

    # -- where it comes from ---------------------------------------------------------------------------------------

    def _lineage(self, run_id: str | None, model_id: str | None, found: Mapping[str, Any], deadline: float) -> Lineage:
        run, notes = self._optional("runs/get", {"run_id": run_id}, deadline, "run") if run_id else ({}, ())
        data, info = _mapping(run.get("data")), _mapping(run.get("info"))
        run_tags = dict(_tags(data.get("tags")))
        experiment_id = _text(info.get("experiment_id")) or _text(found.get("experiment_id"))
        experiment = None
        if experiment_id is not None:
            answer, more = self._optional("experiments/get", {"experiment_id": experiment_id}, deadline, "experiment")
            experiment, notes = _text(answer.get("name")), (*notes, *more)
        datasets = tuple(_datasets(_mapping(run.get("inputs")).get("dataset_inputs")))
        if any(dataset.digest_kind == DATASET_DIGEST for dataset in datasets):
            notes = (*notes, "digests of datasets are MLflow's and do not cover all of the data")
        return Lineage(
            run_id=run_id,
            git_commit=run_tags.get("mlflow.source.git.commit"),
            datasets=datasets,
            experiment=experiment,
            model_id=model_id,
            created_by=_text(found.get("user_id")) or run_tags.get("mlflow.user"),
            created_at=_time(found.get("creation_timestamp") or found.get("creation_timestamp_ms")),
            tags=tuple(_tags(found.get("tags"))),
            notes=notes,
        )

    def _optional(
        self, path: str, query: Mapping[str, str], deadline: float, key: str
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """What tells more of a version; where it is gone or not ours to see, a note says so."""
        try:
            return self._ask(path, query, deadline, "does not have it any more", key), ()
        except SourceUnavailable as error:
            if error.soon:
                raise
        except SourceError:
            pass
        value = next(iter(query.values()), "")
        return {}, (f"the {key} {value[:64]} cannot be read in MLflow: what it says is unknown",)

    # -- files -----------------------------------------------------------------------------------------------------

    def fetch(self, resolved: Resolved, into: Path, told: Told = untold) -> None:
        """See `Resolver`."""
        located = locate_mlflow(resolved.uri)
        deadline = monotonic() + self._bounds.fetch_s
        place = self._place(located, min(deadline, monotonic() + self._bounds.resolve_s))
        parts = urlsplit(place)
        if parts.scheme in self._foreign:
            self._foreign[parts.scheme](place, into, told)
            return
        if parts.scheme != "mlflow-artifacts" or parts.netloc not in ("", urlsplit(self._settings.url).netloc):
            raise SourceError(
                f"the files of {resolved.uri} lie at {shown(place)}, where the gateway may not look; let MLflow's "
                "server pass them on (mlflow server --serve-artifacts) and log the model again, or, if it is an object "
                "store, allow that in `registries`"
            )
        files = list(self._files(parts.path.strip("/"), deadline))
        total = sum(size for _, size in files)
        if total > self._bounds.max_bytes:
            raise SourceError(f"{resolved.uri} has {total} bytes, more than registries.max_model_mb allows")
        done = 0
        for path, size in files:
            done += self._download(f"{parts.path.strip('/')}/{path}", into / path, size, deadline, done, total, told)

    def _place(self, located: MlflowReference, deadline: float) -> str:
        """URI of the directory with a version's files."""
        if located.model_id is not None:
            place = _text(self._model_info(located.model_id, deadline).get("artifact_uri"))
        else:
            query = {"name": located.name, "version": str(located.version)}
            missing = f"has no version {located.version} of a model '{located.name}'"
            place = _text(self._ask("model-versions/get-download-uri", query, deadline, missing).get("artifact_uri"))
        if place is None:
            raise SourceError(f"MLflow does not say where the files of {located.title} are")
        return place

    def _files(self, root: str, deadline: float) -> Iterator[tuple[str, int]]:
        """Relative path and size of every file; bounded in number and depth."""
        pending, count = [("", 0)], 0
        while pending:
            prefix, depth = pending.pop()
            if depth > MAX_DEPTH:
                raise SourceError(f"the artefacts in MLflow are nested deeper than {MAX_DEPTH} directories")
            answer = self._exchange(ARTIFACTS, {"path": f"{root}/{prefix}".rstrip("/")}, deadline)
            if answer.status != 200:
                raise refusal(answer)
            for item in _listed(_mapping(answer.json()).get("files")):
                count += 1
                if count > self._bounds.max_files:
                    raise SourceError(f"the version in MLflow has more than {self._bounds.max_files} files")
                name = _file_name(item.get("path"))
                if item.get("is_dir"):
                    pending.append((f"{prefix}{name}/", depth + 1))
                    continue
                size = item.get("file_size")
                size = int(size) if isinstance(size, int) or (isinstance(size, str) and size.isdecimal()) else 0
                yield f"{prefix}{name}", size

    def _download(
        self, path: str, target: Path, size: int, deadline: float, before: int, total: int, told: Told
    ) -> int:
        """Bytes that were written."""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stream = target.open("xb")
        except OSError as error:
            raise SourceUnavailable(f"cannot write {target.name}: {error.strerror}", soon=False) from None
        with stream:
            received = self._web.save(
                f"{ARTIFACTS}/{quote(path)}",
                stream,
                timeout_s=max(0.001, deadline - monotonic()),
                limit=self._bounds.max_bytes - before,
                told=lambda done, _: told(before + done, total),
            )
        if received.size != size:
            raise SourceUnavailable(f"MLflow lists {target.name} with {size} bytes and sent {received.size}")
        return received.size

    # -- exchanges -------------------------------------------------------------------------------------------------

    def _ask(self, path: str, query: Mapping[str, str], deadline: float, missing: str, key: str = "") -> dict[str, Any]:
        """The object under `key` of an answer; `missing` says what MLflow does not have if it answers 404."""
        answer = self._exchange(f"{API}/{path}", query, deadline)
        if answer.status == 404 or (answer.status == 400 and b"RESOURCE_DOES_NOT_EXIST" in answer.body):
            raise SourceError(f"MLflow at {shown(self._settings.url)} {missing}")
        if answer.status == 400 and b"Registered model alias" in answer.body:  # how MLflow says that there is none
            raise SourceError(f"MLflow at {shown(self._settings.url)} {missing}")
        if answer.status != 200:
            raise refusal(answer)
        document = answer.json()
        found = document.get(key) if key and isinstance(document, dict) else document
        if not isinstance(found, dict):
            raise SourceUnavailable(f"{answer.url} answered without '{key}'; is this an MLflow server?")
        return found

    def _exchange(self, path: str, query: Mapping[str, str], deadline: float) -> Answer:
        return self._web.ask(path, query=query, timeout_s=max(0.001, deadline - monotonic()))

    def _credentials(self) -> dict[str, str]:
        settings = self._settings
        if token := settings.token():
            return {"Authorization": f"Bearer {token}"}
        if username := settings.username():
            return {"Authorization": basic(username, settings.password())}
        return {}

    def __repr__(self) -> str:
        return f"<MlflowResolver {shown(self._settings.url)}>"


def _datasets(listed: object) -> Iterator[Dataset]:
    for item in _listed(listed)[:MAX_ITEMS]:
        dataset = _mapping(item.get("dataset"))
        digest = _text(dataset.get("digest"))
        context = dict(_tags(item.get("tags"))).get("mlflow.data.context")
        yield Dataset(
            _text(dataset.get("name")) or "",
            digest,
            None if digest is None else DATASET_DIGEST if len(digest) <= 8 else "as the dataset's source states it",
            _without_secrets(_text(dataset.get("source"))),
            context,
        )


def _without_secrets(source: str | None) -> str | None:
    """A data set's source as MLflow keeps it, JSON text: addresses without user information and query, which may be
    secrets of whoever trained."""
    return None if source is None else _QUERY.sub(r"\1", _USER.sub(r"\1", source))


def _tags(listed: object) -> Iterator[tuple[str, str]]:
    for item in _listed(listed)[:MAX_ITEMS]:
        key = _text(item.get("key"))
        if key is not None:
            yield key, _text(item.get("value")) or ""


def _file_name(path: object) -> str:
    """The last part of a listed path, which is all that MLflow's proxy gives."""
    name = path.rstrip("/").rpartition("/")[2] if isinstance(path, str) else ""
    if name in ("", ".", "..") or not name.isprintable() or "\\" in name or len(name.encode()) > 255:
        raise SourceError(f"MLflow lists a file with an unusable name: {str(path)[:100]!a}")
    return name


def _listed(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    """A text that says something, in bounds."""
    return value[:MAX_TEXT] if isinstance(value, str) and value else None


def _time(value: object) -> str | None:
    """RFC 3339 of milliseconds since 1970."""
    try:
        return (
            datetime.fromtimestamp(int(str(value)) / 1000, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z")
        )
    except (ValueError, OverflowError, OSError):
        return None
