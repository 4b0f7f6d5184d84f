"""The configuration file's sections: keys, types, ranges, defaults and what each key means.

Rules: keys are exact, types strict, values immutable; units stand in the key's name; an attribute's docstring
is its description in the JSON Schema and its first example is what a fault tells the user to write.
A model key is None where the file does not set it: which value then holds is decided in config.py.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from gateway.config_log import InferenceLog, ModelLog
from gateway.config_registry import RegistriesKeys
from gateway.config_release import Canary, Golden, Shadow
from gateway.config_section import Section
from gateway.config_signing import SignatureKeys
from gateway.core.api import Api
from gateway.core.model import Oversize
from gateway.core.resilience import Balancing
from gateway.protocol.options import SERVER_NAME, ProtocolOptions, TypedResponses
from gateway.registry.signing import Mode

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["console", "json"]
Isolation = Literal["shared", "dedicated"]
Batching = Literal["auto", "on", "off"]
ModelControl = Literal["none", "poll", "explicit"]
GrpcCompression = Literal["none", "low", "medium", "high"]


def _bare_switch(value: object) -> object:
    """YAML 1.1 reads a bare `on` or `off` as true or false; quoted or not, they mean the same here."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value


_Batching = Annotated[Batching, BeforeValidator(_bare_switch)]

MIB: Final = 1024 * 1024
BACKEND_NAME: Final = r"^[A-Za-z0-9._:-]{1,128}$"
HEADER_NAME: Final = r"^[A-Za-z0-9-]{1,64}$"
_Port = Annotated[int, Field(ge=0, le=65_535)]
_Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Limits(Section):
    """Bounds of the data port, against slow, greedy and hostile peers."""

    max_body_bytes: int = Field(default=64 * MIB, ge=1024, le=2**40, examples=[67_108_864])
    """Largest request body; a larger one is answered 413."""
    max_held_bytes: int = Field(default=512 * MIB, ge=1024, le=2**44, examples=[536_870_912])
    """Bytes of all request bodies held at one time; beyond it requests are answered 503."""
    max_connections: int = Field(default=4096, ge=1, le=1_000_000, examples=[4096])
    """Open connections; one more is answered 503 and closed."""
    max_connections_per_address: int = Field(default=256, ge=1, le=1_000_000, examples=[256])
    """Open connections of one client address, loopback aside; one more is answered 503 and closed."""
    header_timeout_s: _Seconds = Field(default=10.0, examples=[10])
    """Time a client has to send a request's head; then 408."""
    idle_timeout_s: _Seconds = Field(default=75.0, examples=[75])
    """Time a kept-alive connection may be silent before it is closed."""
    write_timeout_s: _Seconds = Field(default=30.0, examples=[30])
    """Time a client may leave an answer unread before its connection is closed."""
    min_body_rate_bytes_s: int = Field(default=1000, ge=1, le=10**9, examples=[1000])
    """Slowest accepted upload, in bytes per second, after 5 seconds of grace; below it 408."""


class ResponseCacheKeys(Section):
    """Answers that are kept for models whose config.pbtxt says `response_cache { enable: true }`."""

    max_bytes: int = Field(default=64 * MIB, ge=4096, le=2**44, examples=[67_108_864])
    """Memory for all of them together; the least recently used ones go first."""
    ttl_s: _Seconds | None = Field(default=None, examples=[300])
    """Time after which an answer is not given again; by default it does not age."""


class Compression(Section):
    """Compression of inference answers, for clients that accept it."""

    min_bytes: int = Field(default=8192, ge=0, le=2**40, examples=[8192])
    """Smallest answer that is compressed; a shorter one costs more time than it saves."""
    level: int = Field(default=1, ge=0, le=9, examples=[1])
    """How hard zlib tries: 1 is fast, 9 is small, 0 never compresses."""
    grpc: GrpcCompression = Field(default="none", examples=["low"])
    """Compression of gRPC answers of 1 KiB to 1 MiB: `none`, or how hard zlib tries."""


class Protocol(Section):
    """Ways of speaking the Open Inference Protocol in which servers differ."""

    server_name: str = Field(default=SERVER_NAME, min_length=1, max_length=128, examples=["triton"])
    """Name in the server's metadata; a few clients expect `triton`."""
    triton_status_codes: bool = Field(default=False, examples=[True])
    """Answer malformed requests as Triton does, with 500 instead of 400."""
    json_half: bool = Field(default=False, examples=[True])
    """Take and write FP16 and BF16 as JSON numbers; by default they travel only as binary."""
    invent_ids: bool = Field(default=False, examples=[True])
    """Give an answer an `id` of the gateway's own where the request had none."""
    typed_responses: TypedResponses = Field(default="raw", examples=["mirror"])
    """gRPC: `raw` always answers in raw contents, `mirror` in typed ones where the request came in typed ones."""

    def options(self) -> ProtocolOptions:
        return ProtocolOptions(**self.model_dump())


class Tls(Section):
    """Encryption of the HTTP and gRPC ports, TLS 1.2 and newer. Paths are relative to this file's directory."""

    cert: str = Field(min_length=1, max_length=4096, examples=["server.pem"])
    """File with the server's certificate, and those that lead to its authority (PEM)."""
    key: str = Field(min_length=1, max_length=4096, examples=["server-key.pem"])
    """File with the certificate's private key (PEM, without a passphrase)."""
    client_ca: str | None = Field(default=None, min_length=1, max_length=4096, examples=["clients.pem"])
    """File with the authorities whose clients are let in (PEM); by default clients need no certificate."""


class RestrictedApi(Section):
    """APIs that only callers with a certain header may use, over HTTP and gRPC."""

    apis: tuple[Api, ...] = Field(strict=False, min_length=1, max_length=16, examples=[["model-repository"]])
    """Groups of requests, by Triton's names."""
    header: str = Field(pattern=HEADER_NAME, examples=["x-admin"])
    """Name of the header; over gRPC the metadata key is `triton-grpc-protocol-` and this name."""
    value: str = Field(min_length=1, max_length=1024, examples=["secret"])
    """What the header must be."""


class Trace(Section):
    """Traces of single requests, in Triton's format; off until a client sets `trace_level`."""

    file: str | None = Field(default=None, min_length=1, max_length=4096, examples=["/var/log/gateway/trace.json"])
    """File they are written to; relative to the working directory. Without it nothing is traced."""
    max_bytes: int = Field(default=256 * MIB, ge=65_536, le=2**44, examples=[268_435_456])
    """Most that is written in one run of the gateway; then tracing ends, with a line in the log."""


class MetricsKeys(Section):
    """What /metrics shows besides."""

    nv_summaries: bool = Field(default=False, examples=[True])
    """Triton's `nv_inference_*_summary_us`: quantiles per model of the newest requests."""


class Server(Section):
    """The process: ports, worker processes, log, limits."""

    host: str = Field(default="127.0.0.1", min_length=1, max_length=253, examples=["127.0.0.1"])
    """Address to listen on. One that is not loopback needs `insecure: true`: callers are not authenticated."""
    http_port: _Port = Field(default=8000, examples=[8000])
    """Port of the Open Inference Protocol over HTTP; 0 takes any free one."""
    grpc_port: _Port = Field(default=8001, examples=[8001])
    """Port of the Open Inference Protocol over gRPC; 0 takes any free one."""
    grpc_reflection: bool = Field(default=False, examples=[True])
    """Whether gRPC clients such as grpcurl may ask which services there are, and for their .proto files."""
    metrics_port: _Port = Field(default=8002, examples=[8002])
    """Port of /metrics, /healthz and /api; 0 takes any free one."""
    insecure: bool = Field(default=False, examples=[True])
    """Allow an address that other machines can reach although callers are not authenticated."""
    workers: int | None = Field(default=None, ge=1, le=256, examples=[2])
    """ONNX worker processes; by default one per CPU core, at least 2."""
    intra_op_threads: int | None = Field(default=None, ge=1, le=256, examples=[1])
    """Threads onnxruntime uses inside one model instance; by default the cores divided by the workers."""
    drain_delay_s: float = Field(default=1.0, ge=0, le=3600, allow_inf_nan=False, examples=[5])
    """Time after SIGTERM in which everything is still served while /v2/health/ready says 503, so that load balancers
    look elsewhere before the port closes; behind Kubernetes at least its probe period. Ctrl-C does not wait."""
    drain_timeout_s: _Seconds = Field(default=30.0, examples=[30])
    """Time that accepted requests have to be answered after SIGTERM."""
    log_level: LogLevel = Field(default="info", examples=["info"])
    """Least severe level that is logged."""
    log_format: LogFormat = Field(default="console", examples=["json"])
    """`console` for people, `json` for collectors: one object a line."""
    limits: Limits = Field(default_factory=Limits, examples=[{"max_connections": 4096}])
    """Bounds of the data port."""
    model_control: ModelControl = Field(default="none", examples=["explicit"])
    """Models at run time: `none` serves what is named here, for good; `poll` follows the sources on disk; `explicit`
    loads and unloads what clients ask for. Whoever reaches the port may ask: see `restricted_apis`."""
    load_models: tuple[str, ...] = Field(default=(), strict=False, max_length=10_000, examples=[["digits"]])
    """With `model_control: explicit`: what is loaded at start; `*` is everything. As a variable: names and commas."""
    repository_poll_s: _Seconds = Field(default=15.0, examples=[15])
    """With `model_control: poll`: time between two looks at the sources."""
    restricted_apis: tuple[RestrictedApi, ...] = Field(
        default=(),
        strict=False,
        max_length=64,
        examples=[[{"apis": ["model-repository"], "header": "x-admin", "value": "secret"}]],
    )
    """APIs that need a header."""
    trace: Trace = Field(default_factory=Trace, examples=[{"file": "trace.json"}])
    """Where request traces go that clients switch on."""
    metrics: MetricsKeys = Field(default_factory=MetricsKeys, examples=[{"nv_summaries": True}])
    """Metrics that are off unless asked for."""
    protocol: Protocol = Field(default_factory=Protocol, examples=[{"server_name": "triton"}])
    """Ways of speaking the protocol."""
    response_cache: ResponseCacheKeys | None = Field(default=None, examples=[{"max_bytes": 67_108_864, "ttl_s": 300}])
    """Memory for answers of models that ask to be cached; by default 64 MiB once there is such a model."""
    tls: Tls | None = Field(default=None, examples=[{"cert": "server.pem", "key": "server-key.pem"}])
    """Encrypts the HTTP and gRPC ports; the metrics port stays plain."""
    client_shared_memory: bool = Field(default=False, examples=[True])
    """Let clients on this machine register POSIX shared memory and leave tensors there instead of sending them. Whoever
    reaches the port may then have the gateway read and write any such object that it can open."""
    compression: Compression = Field(default_factory=Compression, examples=[{"min_bytes": 8192}])
    """Compression of answers."""
    admin_token_file: str | None = Field(default=None, min_length=1, max_length=4096, examples=["admin-token"])
    """File with the token that callers of the operations port must show (`Authorization: Bearer …`) to drain backends;
    relative to this file's directory. Without it only an operations port on loopback takes such requests."""
    probe_interval_s: _Seconds = Field(default=2.0, examples=[2])
    """Time between two trial inferences on a remote backend that has nothing else to do; ± 20 %."""

    @property
    def worker_count(self) -> int:
        """Worker processes to start."""
        return self.workers if self.workers is not None else max(2, len(os.sched_getaffinity(0)))


class ModelKeys(Section):
    """How a model is served; each key may stand in `defaults` or in one entry of `models`."""

    instances: int | None = Field(default=None, ge=1, le=256, examples=[2])
    """Loaded copies, each on another worker while there are enough: redundancy and parallelism. Default 2."""
    isolation: Isolation | None = Field(default=None, examples=["dedicated"])
    """`shared` (default): workers host many models; `dedicated`: worker processes for this model alone."""
    batching: _Batching | None = Field(default=None, examples=["on"])
    """`auto` (default): batch a model only if its rows are proven independent at load; `on`, `off`: no proof."""
    max_batch_size: int | None = Field(default=None, ge=0, le=65_536, examples=[64])
    """Most rows of one batch; 0 serves the model unbatched. By default the gateway chooses."""
    max_queue_delay_ms: float | None = Field(default=None, ge=0, le=60_000, allow_inf_nan=False, examples=[2])
    """Longest wait for a fuller batch while a worker is free. Default 0: a free worker takes what there is."""
    preferred_batch_sizes: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] | None = Field(
        default=None, strict=False, max_length=64, examples=[[8, 16]]
    )
    """Batch sizes worth waiting `max_queue_delay_ms` for."""
    oversize: Oversize | None = Field(default=None, examples=["split"])
    """A request of more rows than `max_batch_size`: `split` and rejoin it, or `reject` it with 400. Default:
    `reject` where config.pbtxt states the size, else `split`."""
    max_queue_rows: int | None = Field(default=None, ge=1, le=10**9, examples=[16_384])
    """Rows that may wait; beyond it requests are answered 503. Default 16384."""
    max_queue_bytes: int | None = Field(default=None, ge=1024, le=2**44, examples=[268_435_456])
    """Bytes of inputs that may wait; beyond it requests are answered 503. Default 256 MiB."""
    deadline_ms: float | None = Field(default=None, gt=0, le=86_400_000, allow_inf_nan=False, examples=[30_000])
    """Time for a request that brings no timeout of its own; then 504. Default 30000."""
    intra_op_threads: int | None = Field(default=None, ge=1, le=256, examples=[1])
    """Threads onnxruntime uses inside one instance of this model; default: `server.intra_op_threads`."""
    idempotent: bool | None = Field(default=None, examples=[False])
    """Whether rows may be executed twice (default true). False: no retry of what a backend may have executed, no trial
    runs, no hedging."""
    balancing: Balancing | None = Field(default=None, examples=["pull"])
    """How a backend is chosen: `pull` (default), the free one that has been predicted fastest; `p2c_ewma`, the better
    of two drawn; `least_rows`; `round_robin`; `hash`, by what the request says of its sequence."""
    attempt_timeout_ms: float | None = Field(default=None, gt=0, le=86_400_000, allow_inf_nan=False, examples=[2000])
    """Longest one execution may take before it is tried elsewhere; by default learned from how long they take."""
    max_attempts: int | None = Field(default=None, ge=1, le=5, examples=[3])
    """Most executions of a row, the first one included. Default 3."""
    retry_budget_percent: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False, examples=[10])
    """Rows that may be executed again, in percent of all rows. Default 10."""
    hedging_percent: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False, examples=[2])
    """Most rows that are also sent to a second, idle backend because the first is late, in percent. Default 0: off."""
    agreement_percent: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False, examples=[1])
    """Batches that a second backend executes too, to compare the answers, in percent. Default 0: off."""
    poison_denylist: bool | None = Field(default=None, examples=[False])
    """Whether a request that breaks backends by itself is refused unexecuted for ten minutes. Default true."""
    poll_interval_s: float | None = Field(
        default=None, ge=0, le=86_400, allow_inf_nan=False, strict=False, examples=[30]
    )
    """How often a source is asked whether it means something new; 0: never by itself. Default: 30 for a reference whose
    meaning can change, such as an alias of a registry; 0 for files."""
    keep_previous: int | None = Field(default=None, ge=0, le=4, examples=[1])
    """Former versions that stay loaded after a swap, for `gateway models rollback`. Default: 1 for a model whose source
    is followed (`poll_interval_s`), or that has a canary, which may be promoted; else 0."""
    inference_log: ModelLog | None = Field(default=None, examples=[{"overflow": "block", "sampling": 1.0}])
    """What the inference log keeps of its requests."""
    verification: Mode | None = Field(default=None, examples=["enforce"])
    """What becomes of a version whose signature is not verified: `enforce` refuses it; `warn` (default) serves it and
    says so where there is a signature or a key; `off` does not look."""
    signature: SignatureKeys | None = Field(default=None, examples=[{"public_key": "signing-key.pub"}])
    """Who must have signed it."""


class BackendTls(Section):
    """How a backend proves who it is, for https and grpcs. Paths are relative to this file's directory."""

    ca: str | None = Field(default=None, min_length=1, max_length=4096, examples=["backends-ca.pem"])
    """File with the authorities that are trusted (PEM); by default those of the system."""
    cert: str | None = Field(default=None, min_length=1, max_length=4096, examples=["gateway.pem"])
    """File with the gateway's own certificate, for backends that ask for one (PEM); needs `key`."""
    key: str | None = Field(default=None, min_length=1, max_length=4096, examples=["gateway-key.pem"])
    """File with that certificate's private key (PEM, without a passphrase)."""
    server_name: str | None = Field(default=None, min_length=1, max_length=253, examples=["triton.internal"])
    """Name that the backend's certificate must have, where it is not the URL's host."""


class Backend(Section):
    """One remote server that speaks the Open Inference Protocol and has this model."""

    url: str = Field(min_length=1, max_length=2048, examples=["http://triton-a:8000"])
    """`http://`, `https://`, `grpc://` or `grpcs://`, host and port; a name with several addresses is several
    backends."""
    name: str | None = Field(default=None, pattern=BACKEND_NAME, examples=["triton-a"])
    """Name in headers, metrics and commands; by default host:port."""
    weight: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False, strict=False, examples=[1])
    """Share of the work relative to the model's other backends."""
    zone: str = Field(default="", max_length=128, examples=["eu-1a"])
    """Failure domain: a retry prefers another one."""
    host: str = Field(default="", max_length=253, examples=["node-7"])
    """Failure domain inside the zone, where several backends share a machine."""
    model: str | None = Field(default=None, min_length=1, max_length=256, examples=["salary_onnx"])
    """The model's name there, where it is another one."""
    version: str | None = Field(default=None, min_length=1, max_length=128, examples=["3"])
    """The version there that stands for the newest one here; by default versions are matched by their numbers."""
    max_slots: int = Field(default=8, ge=1, le=256, examples=[8])
    """Most batches in flight there; how many there are is learned, from 1 up."""
    connect_timeout_ms: float = Field(default=250.0, gt=0, le=60_000, allow_inf_nan=False, strict=False, examples=[250])
    """Time to open a connection."""
    tls: BackendTls | None = Field(default=None, examples=[{"ca": "backends-ca.pem"}])
    """For https and grpcs."""
    headers: dict[str, str] = Field(
        default_factory=dict, max_length=32, repr=False, examples=[{"Authorization": "env:TRITON_TOKEN"}]
    )
    """Headers (gRPC: metadata) sent with every request: the text itself, `env:VARIABLE` or `file:PATH`."""
    json_tensors: Literal["auto", "always"] = Field(default="auto", alias="json", examples=["always"])
    """HTTP: `auto` sends tensors as binary where the server can; `always` as JSON."""


class ModelEntry(ModelKeys):
    """One model, or one directory of models. It has a `source`, or `backends`, or both."""

    source: str = Field(default="", min_length=1, max_length=4096, examples=["./models/digits"])
    """A model repository, one model's directory, or one .onnx file, relative to this file's directory; the URL of a
    running server, whose models are discovered; or a registry's `models:/name@alias`, `s3://`, `oci://`, `hf://`."""
    backends: tuple[Backend, ...] = Field(
        default=(), strict=False, max_length=256, examples=[[{"url": "http://triton-a:8000"}]]
    )
    """Remote servers that have this model, besides the workers that serve `source`, or instead of them."""
    name: str | None = Field(default=None, examples=["digits"])
    """Name under which clients reach the model; by default the name of its directory or file. In a repository
    of several models it picks one."""
    digest: str | None = Field(default=None, pattern=r"^sha256:[0-9a-f]{64}$", examples=["sha256:" + "0" * 63 + "1"])
    """Serve only a version with exactly this digest."""
    golden: Golden | None = Field(default=None, examples=[{"file": "digits-golden.json", "rtol": 1e-5, "atol": 1e-6}])
    """Requests that a version must answer rightly before it serves. A `golden.json` beside its model file is one."""
    canary: Canary | None = Field(default=None, examples=[{"source": "models:/digits@challenger", "percent": 5}])
    """Another version that answers a share of the requests."""
    shadow: Shadow | None = Field(default=None, examples=[{"source": "models:/digits@challenger", "percent": 100}])
    """Another version that is sent copies of requests and never answers; its outputs are compared."""


class ConfigFile(Section):
    """Configuration of the gateway. Every key is optional."""

    server: Server = Field(default_factory=Server, examples=[{"http_port": 8000}])
    """Where it listens, its worker processes, its log and its limits."""
    defaults: ModelKeys = Field(default_factory=ModelKeys, examples=[{"instances": 2}])
    """Keys for every model that does not set them itself."""
    registries: RegistriesKeys = Field(
        default_factory=RegistriesKeys, examples=[{"mlflow": {"url": "http://mlflow:5000"}}]
    )
    """Registries that models may come from, the cache of their files, and models.lock."""
    models: tuple[ModelEntry, ...] = Field(default=(), strict=False, examples=[[{"source": "./models"}]])
    """What is served."""
    inference_log: InferenceLog | None = Field(default=None, examples=[{"directory": "./inference-log"}])
    """Keeps a row of every inference request; without it there is no log."""


_LATER_KEYS: Final[dict[str, Any]] = {
    "processes": {"const": 1, "examples": [1], "description": "Of a later version: one front-end process."},
}
"""Accepted with this value only (config_later.py)."""


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the configuration file, for editors."""
    schema = ConfigFile.model_json_schema()
    schema["$defs"]["Server"]["properties"].update(_LATER_KEYS)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "gateway.yaml"}
