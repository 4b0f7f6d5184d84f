"""Every error the gateway shows to anyone, and the one table that translates it.

    GatewayError
    ├── RequestError              blame: the caller; retrying the same bytes cannot help
    │   ├── InvalidRequest        400  malformed, mistyped, inconsistent input
    │   │   ├── Malformed         400  not JSON, or a field of a wrong JSON type: Triton's 500
    │   │   └── AlreadyRegistered 400  a name that is taken
    │   ├── Restricted            403  an API that needs a header the caller did not send
    │   ├── NotFound              404  unknown model, version or path
    │   ├── MethodNotAllowed      405
    │   ├── RequestTimeout        408  the caller sent its bytes too slowly
    │   ├── TooLarge              413  body over the limit
    │   ├── UriTooLong            414
    │   ├── ExpectationFailed     417
    │   ├── HeadersTooLarge       431
    │   ├── Unsupported           501  part of the protocol that is not offered
    │   └── VersionNotSupported   505
    ├── Refused                   blame: load or state of the gateway; retry later may help
    │   ├── Overloaded            503  queue full, connection or byte limits
    │   ├── NotReady              503  model loading, failed or unloaded
    │   ├── NoBackend             503  no replica can take the batch
    │   ├── Draining              503  shutting down
    │   ├── ControlOff            503  loading and unloading at run time is switched off
    │   ├── RetryBudgetExhausted  503  a failed attempt was not repeated: too much is being repeated already
    │   ├── QueueTimeout          503  waited longer than the model's queue policy allows
    │   └── DeadlineExceeded      504  the caller's time ran out, before or after dispatch
    ├── ExecutionFailed           blame: model or backend
    │   ├── ModelError            500  the model itself refused or failed on this input
    │   ├── PoisonRequest         500  backends break on this input alone; it is not executed again for a while
    │   ├── LoadFailed            500  a model that was asked to be loaded could not be
    │   │   └── SourceError       500  and the fault lies with what its source offers
    │   │       └── SourceUnavailable  or with a source that cannot be asked at present
    │   ├── RegionFailed          500  a client's shared memory could not be opened or written
    │   └── BackendError          502  the backend's answer could not be used
    │       └── PerhapsExecuted   502  and what may have run is not sent again
    ├── Cancelled                 499  the caller left; only ever seen in metrics and logs
    ├── ConfigError               never on the wire: bad configuration, model repository or command line
    └── BindError                 never on the wire: a port that cannot be listened on

Rules: an error is typed by blame and phase where it arises and translated once, here. The text says what
happened and what to change. Statuses follow the wire notes (Triton's mapping where it has one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class GatewayError(Exception):
    """Base of all errors with a meaning to a user. `str(error)` is the text shown on the wire."""

    status: ClassVar[int] = 500
    grpc_code: ClassVar[int] = 13
    reason: ClassVar[str] = "internal"
    """Metric label and machine-readable cause."""
    retryable: ClassVar[bool] = False
    """Whether the caller may send the same request again; a retryable error carries `Retry-After`."""

    retry_after_s: float = 1.0


class RequestError(GatewayError):
    status = 400
    grpc_code = 3
    reason = "invalid"


class InvalidRequest(RequestError):
    """400: malformed, mistyped or inconsistent input."""


class Malformed(InvalidRequest):
    """400: not readable as a request at all: broken JSON, a field missing or of a wrong JSON type.

    A class of its own because Triton answers it 500, which a server's owner may choose too.
    """


class AlreadyRegistered(InvalidRequest):
    """400: what the caller wants to register has a name that is taken."""

    grpc_code = 6


class NotFound(RequestError):
    """404: unknown model, version or path."""

    status = 404
    grpc_code = 5
    reason = "not_found"


class Restricted(RequestError):
    """403: the owner of the server lets only callers with a certain header use this API."""

    status = 403
    grpc_code = 14
    reason = "restricted"


class MethodNotAllowed(RequestError):
    """405: the path exists, the method does not."""

    status = 405
    grpc_code = 12
    reason = "method_not_allowed"


class RequestTimeout(RequestError):
    """408: header or body arrived too slowly."""

    status = 408
    grpc_code = 4
    reason = "slow_client"


class TooLarge(RequestError):
    """413: body, or what it inflates to, is over the limit."""

    status = 413
    grpc_code = 8
    reason = "too_large"


class UriTooLong(RequestError):
    """414: request target over the limit."""

    status = 414
    reason = "uri_too_long"


class ExpectationFailed(RequestError):
    """417: an `Expect` other than 100-continue."""

    status = 417
    reason = "expectation"


class HeadersTooLarge(RequestError):
    """431: header fields over the limit."""

    status = 431
    reason = "headers_too_large"


class Unsupported(RequestError):
    """501: part of the protocol this gateway does not offer."""

    status = 501
    grpc_code = 12
    reason = "unsupported"


class VersionNotSupported(RequestError):
    """505: neither HTTP/1.0 nor HTTP/1.1."""

    status = 505
    reason = "http_version"


class Refused(GatewayError):
    status = 503
    grpc_code = 14
    reason = "refused"
    retryable = True


class Overloaded(Refused):
    """503: a queue, byte or connection limit is reached."""

    reason = "overloaded"


class NotReady(Refused):
    """503: the model exists but cannot answer now."""

    reason = "not_ready"


class LogUnavailable(Refused):
    """503: the model's answers must be logged, and the inference log cannot take more."""

    reason = "inference_log_unavailable"


class NoBackend(Refused):
    """503: no replica of the model can take a batch."""

    reason = "no_backend"


class Draining(Refused):
    """503: the gateway is shutting down."""

    reason = "draining"


class RetryBudgetExhausted(Refused):
    """503: an attempt failed, and so much is being repeated already that repeating this one too would make it worse."""

    reason = "retry_budget_exhausted"
    retryable = False


class QueueTimeout(Refused):
    """503: the request waited for a batch as long as the model's queue policy allows."""

    reason = "timeout"


class SequenceLost(Refused):
    """503: an earlier request of the same sequence was given up; only a new START goes on."""

    reason = "sequence"
    retryable = False


class ControlOff(Refused):
    """503, Triton's status for it: models are not loaded or unloaded on request here."""

    reason = "model_control"
    retryable = False


class DeadlineExceeded(Refused):
    """504: the caller's deadline passed."""

    status = 504
    grpc_code = 4
    reason = "deadline"
    retryable = False


class ExecutionFailed(GatewayError):
    status = 500
    grpc_code = 13
    reason = "execution"


class ModelError(ExecutionFailed):
    """500: the model failed on this input (for instance an index out of range inside the graph)."""

    reason = "model_error"


class PoisonRequest(ExecutionFailed):
    """500: the request alone makes the backends that execute it fail. The same bytes are refused for a while."""

    reason = "poison_request"


class LoadFailed(ExecutionFailed):
    """500: a model that somebody asked for could not be loaded; what served before still does."""

    reason = "load_failed"


class PassingTrouble(LoadFailed):
    """500: a load failed for a reason that may be over soon: no worker came up in time, a disk's error, a timeout."""


class SourceError(LoadFailed):
    """500: what a registry offers cannot be served: it is not there, not a model, not what was pinned. Final."""

    reason = "source"


class SourceUnavailable(SourceError):
    """500: a registry cannot be asked at present: no connection, no permission, its own failure. Later may help."""

    reason = "source_unavailable"

    def __init__(self, text: str, *, soon: bool = True) -> None:
        """`soon`: whether the same call may succeed within seconds; not so where a credential is refused."""
        self.soon = soon
        super().__init__(text)


class RegionFailed(ExecutionFailed):
    """500, Triton's status for it: memory that a client shares could not be opened, or does not hold what it must."""

    reason = "shared_memory"


class BackendError(ExecutionFailed):
    """502: every attempt ended in a dead backend or an answer that failed its checks."""

    status = 502
    grpc_code = 14
    reason = "backend_error"


class PerhapsExecuted(BackendError):
    """502: the one attempt failed, and what may have run must not run again. gRPC clients repeat UNAVAILABLE by
    themselves, which this must not be."""

    grpc_code = 13
    reason = "perhaps_executed"


class Cancelled(GatewayError):
    """499: the caller left before its answer. Never written to a socket."""

    status = 499
    grpc_code = 1
    reason = "cancelled"


class _MalformedForTriton(Malformed):
    """`Malformed` with Triton's status."""

    status = 500


class _TooLargeForTriton(TooLarge):
    """`TooLarge` with Triton's status."""

    status = 400


def as_triton(error: GatewayError) -> GatewayError:
    """The error with the HTTP status that Triton has for it, for owners who chose Triton's status codes."""
    if type(error) is Malformed:
        return _MalformedForTriton(str(error))
    return _TooLargeForTriton(str(error)) if type(error) is TooLarge else error


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a configuration. `line` is 1-based; 0 where no line applies."""

    file: str
    line: int
    where: str
    """Dotted key, for instance `models[0].max_batch_size`."""
    message: str
    """What is wrong and what to write instead."""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.where}: {self.message}" if self.where else f"{place}: {self.message}"


class ConfigError(GatewayError):
    """Configuration that cannot be used; holds every fault found, not just the first."""

    reason = "config"

    def __init__(self, faults: list[Fault] | str) -> None:
        self.faults = [Fault("", 0, "", faults)] if isinstance(faults, str) else faults
        super().__init__(faults if isinstance(faults, str) else "\n".join(map(str, faults)))


class BindError(GatewayError):
    """A host and port that cannot be listened on; ends the process with exit code 3."""

    reason = "bind"

    def __init__(self, host: str, port: int, cause: str) -> None:
        self.host = host
        self.port = port
        super().__init__(f"cannot listen on {host}:{port}: {cause}")
