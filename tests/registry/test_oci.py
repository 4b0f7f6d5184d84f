"""Against Debian's docker-registry; faults that it does not make, against a small server."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import pytest

from gateway.errors import SourceError, SourceUnavailable
from gateway.registry.locator import locate_oci
from gateway.registry.oci import OciHost, OciResolver, OciSettings, _Session
from gateway.registry.resolver import Bounds, Resolved
from gateway.registry.web import Answer
from tests.live.docker_registry import PASSWORD, USER, DockerRegistry, docker_registry

FILES = {"model.onnx": b"an ONNX model" * 1000, "data/weights.bin": bytes(range(256)) * 100}
TITLE = "org.opencontainers.image.title"
MODELPACK = "application/vnd.cncf.model.manifest.v1+json"


@pytest.fixture(scope="module")
def registry() -> Iterator[DockerRegistry]:
    with docker_registry() as running:
        yield running


def resolver(host: str, settings: OciHost | None = None, bounds: Bounds | None = None) -> OciResolver:
    return OciResolver(OciSettings({host: settings or OciHost()}), bounds or Bounds())


def packed(files: dict[str, bytes], folder: str = "") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        if folder:
            entry = tarfile.TarInfo(folder)
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}" if folder else name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def fetched(of: OciResolver, resolved: Resolved, into: Path) -> dict[str, bytes]:
    into.mkdir()
    of.fetch(resolved, into)
    return {path.relative_to(into).as_posix(): path.read_bytes() for path in into.rglob("*") if path.is_file()}


def test_files_that_oras_pushed(registry: DockerRegistry, tmp_path: Path) -> None:
    layers = [registry.file("m/digits", name, content) for name, content in FILES.items()]
    said = {"org.opencontainers.image.revision": "0a1b2c", "org.opencontainers.image.version": "7"}
    digest = registry.push("m/digits", "v1", layers, said)
    mine = resolver(registry.host)
    resolved = mine.resolve(f"oci://{registry.host}/m/digits:v1")
    assert resolved.uri == f"oci://{registry.host}/m/digits@{digest}"
    assert (resolved.immutable_id, resolved.mutable, resolved.version) == (digest, True, "7")
    assert resolved.lineage.git_commit == "0a1b2c"
    assert resolved.expected_sha256 == {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    told: list[tuple[int, int | None]] = []
    (tmp_path / "a").mkdir()
    mine.fetch(resolved, tmp_path / "a", lambda done, total: told.append((done, total)))
    assert {n: (tmp_path / "a" / n).read_bytes() for n in FILES} == FILES
    assert told[-1] == (sum(map(len, FILES.values())),) * 2


def test_a_tag_that_moves_means_something_else_and_the_digest_stays(registry: DockerRegistry, tmp_path: Path) -> None:
    mine, reference = resolver(registry.host), f"oci://{registry.host}/moving:live"
    registry.push("moving", "live", [registry.file("moving", "model.onnx", b"one")])
    first = mine.resolve(reference)
    registry.push("moving", "live", [registry.file("moving", "model.onnx", b"two")])
    second = mine.resolve(reference)
    assert first.immutable_id != second.immutable_id
    assert fetched(mine, first, tmp_path / "1") == {"model.onnx": b"one"}
    assert fetched(mine, mine.resolve(first.uri), tmp_path / "2") == {"model.onnx": b"one"}
    assert not mine.resolve(first.uri).mutable
    assert fetched(mine, second, tmp_path / "3") == {"model.onnx": b"two"}


def test_a_folder_that_oras_packed(registry: DockerRegistry, tmp_path: Path) -> None:
    layer = registry.layer(
        "folder", gzip.compress(packed(FILES, "digits")), "application/vnd.oci.image.layer.v1.tar+gzip",
        org__opencontainers__image__title="digits", io__deis__oras__content__unpack="true",
    )  # fmt: skip
    registry.push("folder", "v1", [layer])
    mine = resolver(registry.host)
    assert fetched(mine, mine.resolve(f"oci://{registry.host}/folder:v1"), tmp_path / "a") == FILES


def test_a_model_pack(registry: DockerRegistry, tmp_path: Path) -> None:
    raw = "application/vnd.cncf.model.weight.v1.raw"
    layers = [
        registry.layer("pack", FILES["model.onnx"], raw, org__cncf__model__filepath="model.onnx"),
        registry.layer("pack", packed({"data/weights.bin": FILES["data/weights.bin"]}), raw.replace("raw", "tar")),
        registry.layer("pack", b"secret", raw.replace("weight", "dataset"), org__cncf__model__filepath="train.csv"),
        registry.layer("pack", b"print()", raw.replace("weight", "code"), org__cncf__model__filepath="train.py"),
    ]
    config = "application/vnd.cncf.model.config.v1+json"
    registry.push("pack", "3", layers, artifact_type=MODELPACK, config_type=config)
    mine = resolver(registry.host)
    resolved = mine.resolve(f"oci://{registry.host}/pack:3")
    assert resolved.version == "3"
    assert fetched(mine, resolved, tmp_path / "a") == FILES


def test_a_registry_that_wants_a_password(tmp_path: Path) -> None:
    with docker_registry(locked=True) as registry:
        registry.push("m", "v1", [registry.file("m", "model.onnx", b"x")])
        reference = f"oci://{registry.host}/m:v1"
        mine = resolver(registry.host, OciHost(lambda: USER, lambda: PASSWORD))
        assert fetched(mine, mine.resolve(reference), tmp_path / "a") == {"model.onnx": b"x"}
        with pytest.raises(SourceUnavailable, match="user name and password"):
            resolver(registry.host).resolve(reference)
        with pytest.raises(SourceUnavailable, match="401") as refused:
            resolver(registry.host, OciHost(lambda: USER, lambda: "wrong-one")).resolve(reference)
        assert "wrong-one" not in str(refused.value)
        assert not refused.value.soon


def test_what_is_not_there_or_not_allowed(registry: DockerRegistry) -> None:
    with pytest.raises(SourceError, match="has no 'none'"):
        resolver(registry.host).resolve(f"oci://{registry.host}/digits:none")
    with pytest.raises(SourceError, match=r"not among registries\.oci\.hosts"):
        resolver("elsewhere:5000").resolve(f"oci://{registry.host}/digits:v1")


def test_bounds_hold_before_anything_is_fetched(registry: DockerRegistry, tmp_path: Path) -> None:
    registry.push("big", "v1", [registry.file("big", f"{n}.bin", bytes([n]) * 1000) for n in range(5)])
    reference = f"oci://{registry.host}/big:v1"
    small = resolver(registry.host, bounds=Bounds(max_bytes=4999))
    with pytest.raises(SourceError, match="max_model_mb"):
        small.fetch(small.resolve(reference), tmp_path)
    few = resolver(registry.host, bounds=Bounds(max_files=4))
    with pytest.raises(SourceError, match="more than 4 files"):
        few.fetch(few.resolve(reference), tmp_path)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a//b", "x\ny", "."])
def test_a_layer_with_a_name_outside_is_refused(registry: DockerRegistry, name: str) -> None:
    registry.push("names", "v1", [registry.file("names", name, b"x")])
    with pytest.raises(SourceError, match="does not name a file below it"):
        resolver(registry.host).resolve(f"oci://{registry.host}/names:v1")


def test_a_container_image_and_a_nameless_layer_are_refused(registry: DockerRegistry) -> None:
    image = "application/vnd.oci.image.config.v1+json"
    registry.push("image", "v1", [registry.file("image", "model.onnx", b"x")], config_type=image)
    with pytest.raises(SourceError, match="container image"):
        resolver(registry.host).resolve(f"oci://{registry.host}/image:v1")
    registry.push("nameless", "v1", [registry.layer("nameless", b"x", "application/octet-stream")])
    with pytest.raises(SourceError, match="no file name"):
        resolver(registry.host).resolve(f"oci://{registry.host}/nameless:v1")


def test_two_layers_with_one_name_are_refused(registry: DockerRegistry, tmp_path: Path) -> None:
    registry.push("twice", "v1", [registry.file("twice", "model.onnx", text) for text in (b"one", b"two")])
    mine = resolver(registry.host)
    with pytest.raises(SourceError, match=r"two files with the name 'model\.onnx'"):
        mine.fetch(mine.resolve(f"oci://{registry.host}/twice:v1"), tmp_path)


# --- A server that lies -----------------------------------------------------------------------------------------------

Reply = tuple[int, dict[str, str], bytes]


@pytest.fixture
def liar() -> Iterator[Callable[[Callable[[str, str], Reply]], str]]:
    """Starts a server that answers what a function of path and Authorization says; gives its host."""
    running: list[http.server.ThreadingHTTPServer] = []

    def start(answer: Callable[[str, str], Reply]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = answer(self.path, self.headers.get("Authorization", ""))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def manifest_of(content: bytes, size: int | None = None) -> bytes:
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    layer = {"digest": digest, "size": len(content) if size is None else size, "annotations": {TITLE: "model.onnx"}}
    return json.dumps({"schemaVersion": 2, "layers": [layer]}).encode()


def test_a_changed_manifest_is_refused(liar: Callable[..., str]) -> None:
    host = liar(lambda path, _: (200, {}, manifest_of(b"x")))
    with pytest.raises(SourceError, match="when asked for sha256:0000"):
        resolver(host).resolve(f"oci://{host}/m@sha256:{'0' * 64}")


@pytest.mark.parametrize(
    ("sent", "why"), [(b"changed!", "it is refused"), (b"short", "sent|it is refused"), (b"much too long", "more than")]
)
def test_a_changed_blob_is_refused(liar: Callable[..., str], tmp_path: Path, sent: bytes, why: str) -> None:
    host = liar(lambda path, _: (200, {}, manifest_of(b"original") if "manifests" in path else sent))
    mine = resolver(host)
    with pytest.raises(SourceError, match=why):
        mine.fetch(mine.resolve(f"oci://{host}/m:v1"), tmp_path)


def test_a_token_is_fetched_from_the_registry_itself_and_used(liar: Callable[..., str], tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    def answer(path: str, authorization: str) -> Reply:
        seen.append((path.partition("?")[0], authorization))
        if path.startswith("/token"):
            assert path == "/token?service=tests&scope=repository%3Am%3Apull"
            return 200, {}, json.dumps({"token": "abc"}).encode()
        if authorization != "Bearer abc":
            return 401, {"WWW-Authenticate": f'Bearer realm="http://{host}/token",service="tests",scope="x"'}, b""
        return 200, {}, manifest_of(b"original") if "manifests" in path else b"original"

    host = liar(answer)
    mine = resolver(host, OciHost(lambda: "bob", lambda: "pw"))
    resolved = mine.resolve(f"oci://{host}/m:v1")
    assert fetched(mine, resolved, tmp_path / "a") == {"model.onnx": b"original"}
    assert [header for path, header in seen if path == "/token"] == ["Basic Ym9iOnB3"] * 2


def test_a_password_goes_to_no_other_host(liar: Callable[..., str]) -> None:
    asked: list[str] = []

    def steal(path: str, authorization: str) -> Reply:
        asked.append(authorization)
        return 200, {}, b'{"token": "t"}'

    thief = liar(steal)
    challenge = {"WWW-Authenticate": f'Bearer realm="http://{thief}/token",service="s"'}
    host = liar(lambda path, _: (401, challenge, b""))
    credentials = OciHost(lambda: "bob", lambda: "pw")
    with pytest.raises(SourceError, match="auth_host"):
        resolver(host, credentials).resolve(f"oci://{host}/m:v1")
    assert asked == []


def test_a_password_never_leaves_tls() -> None:
    located = locate_oci("oci://registry.invalid/m/digits:v1")
    session = _Session(located, OciHost(lambda: "me", lambda: "secret"), monotonic() + 5.0)
    challenge = {"www-authenticate": 'Bearer realm="http://registry.invalid/token",service="s"'}
    with pytest.raises(SourceError, match="plain http"):
        session._authorized(Answer(401, challenge, b"", "https://registry.invalid"))


def test_blobs_may_lie_elsewhere_only_where_that_is_allowed(liar: Callable[..., str], tmp_path: Path) -> None:
    store = liar(lambda path, authorization: (200, {}, b"original" if not authorization else b"it told me"))

    def answer(path: str, authorization: str) -> Reply:
        if "manifests" in path:
            return 200, {}, manifest_of(b"original")
        return 307, {"Location": f"http://{store}/blob"}, b""

    host = liar(answer)
    mine = resolver(host)
    resolved = mine.resolve(f"oci://{host}/m:v1")
    with pytest.raises(SourceError, match="does not allow"):
        fetched(mine, resolved, tmp_path / "a")
    allowing = resolver(host, OciHost(redirects=(store,)))
    assert fetched(allowing, resolved, tmp_path / "b") == {"model.onnx": b"original"}


def test_nonsense_is_refused_with_a_reason(liar: Callable[..., str]) -> None:
    second = b'{"schemaVersion": 2, '
    nonsense = (b"", b"[]", b"{}", b"\xff", b'{"schemaVersion": 2}', second + b'"layers": [1]}')
    for body in (*nonsense, second + b'"manifests": []}', second + b'"layers": [{"digest": "md5:0"}]}'):
        host = liar(lambda path, _, body=body: (200, {}, body))
        with pytest.raises(SourceError):
            resolver(host).resolve(f"oci://{host}/m:v1")
