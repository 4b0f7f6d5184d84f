"""Where a remote server is and how it is to be reached; what is known of its models. Plain values.

Rules: header values may be credentials, so no `repr` shows them; a certificate is always verified, and there is no
switch for that. Files of certificates are read again when they have changed, for new connections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from gateway.core.batchability import SignatureTensor

MAX_ANSWER_BYTES: Final = 1 << 30
MAX_TEXT: Final = 300
"""Characters of a server's own words that a message repeats."""

Scheme = Literal["http", "https", "grpc", "grpcs"]


@dataclass(frozen=True, slots=True)
class RemoteTls:
    """PEM files. `ca` None: the system's authorities; `cert` and `key` are ours (mTLS)."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""
    """The name that the certificate must be for; empty: the host of the URL."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One configured server, before its name is resolved."""

    scheme: Scheme
    host: str
    port: int
    name: str = ""
    """What people call it; empty: `host:port`."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent with every request, values as they go out."""
    tls: RemoteTls = RemoteTls()
    connect_timeout_s: float = 0.25
    json: Literal["auto", "always"] = "auto"
    """`always`: tensors travel as JSON even where the server says that it takes binary ones."""
    max_answer_bytes: int = MAX_ANSWER_BYTES

    @property
    def secure(self) -> bool:
        return self.scheme in ("https", "grpcs")

    @property
    def label(self) -> str:
        """What people call it."""
        return (
            self.name or f"[{self.host}]:{self.port}" if ":" in self.host else self.name or f"{self.host}:{self.port}"
        )

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @property
    def authority(self) -> str:
        """As the `Host` field has it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def server_name(self) -> str:
        """What its certificate must be for."""
        return self.tls.server_name or self.host


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """One model as its server describes it. Shapes are in full: with the batch dimension where there is one."""

    name: str
    version: str
    """The version asked for; empty: whichever the server chooses."""
    versions: tuple[str, ...]
    """All that the server lists, in its order; empty where it lists none."""
    platform: str
    inputs: tuple[SignatureTensor, ...]
    """Empty where the server says nothing of them."""
    outputs: tuple[SignatureTensor, ...]
    max_batch_size: int | None = None
    """Rows, 0: the model does not batch; None: the server does not say."""
    decoupled: bool = False
    sequence: bool = False
    max_queue_delay_us: int = 0
    """How long the server's own batching holds requests back."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The metadata, as JSON."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of a server's model index."""

    name: str
    version: str
    """Empty where the server does not say."""
    ready: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says of itself."""

    name: str
    version: str
    extensions: tuple[str, ...] = ()

    @property
    def binary(self) -> bool:
        """Whether tensors may travel as bytes behind the JSON part."""
        return "binary_tensor_data" in self.extensions

    @property
    def is_triton(self) -> bool:
        return self.name == "triton"


class RemoteError(Exception):
    """A question to a server got no usable answer; the text is fit for users.

    `missing`: the server lives and says that it does not have this model, or not now."""

    def __init__(self, text: str, *, missing: bool = False, connect: bool = False, late: bool = False) -> None:
        super().__init__(text)
        self.missing = missing
        self.connect = connect
        """No connection could be made."""
        self.late = late
        """There was no answer in time."""


class Unreadable(RemoteError):
    """There is an answer, and nothing can be done with it."""


def said(content: object, secrets: Sequence[str] = ()) -> str:
    """A server's own words as they may be shown: one line, printable, bounded, none of `secrets` in it. `content`:
    bytes, or what stands in a document; of that, only text and numbers are words."""
    if isinstance(content, (bytes, bytearray)):
        text = content[: 8 * MAX_TEXT].decode(errors="replace")
    else:
        text = str(content) if isinstance(content, (str, int, float)) else ""
    text = _without(secrets, text)
    text = " ".join("".join([c if c.isprintable() else " " for c in text[: 8 * MAX_TEXT]]).split())
    text = _without(secrets, text)  # which may have been taken apart by what is not printable
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _without(secrets: Sequence[str], text: str) -> str:
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return text
