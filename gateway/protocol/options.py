"""What a server's owner may choose about the protocols' surface, as data; the same for REST and gRPC.

The defaults are this gateway's own ways; each option exists because clients of another server need something else
(wire notes §0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from gateway.core.client_memory import NO_CLIENT_MEMORY, ClientMemory

TypedResponses = Literal["raw", "mirror"]
SERVER_NAME: Final = "oip-gateway"


@dataclass(frozen=True, slots=True)
class ProtocolOptions:
    """Handed to codecs and management once, at start."""

    server_name: str = SERVER_NAME
    """What server metadata call this server; some clients' tests want `triton`."""
    triton_status_codes: bool = False
    """Answer a malformed request with the status Triton has for it, 500, instead of 400."""
    json_half: bool = False
    """Take and write FP16 and BF16 tensors as JSON numbers; otherwise they only travel as binary."""
    invent_ids: bool = False
    """Answer a request without `id` with a UUID of our own as `id`; otherwise the answer has none."""
    typed_responses: TypedResponses = "raw"
    """gRPC: `mirror` answers a request with typed contents in typed contents; `raw` always in raw ones."""
    memory: ClientMemory = NO_CLIENT_MEMORY
    """Where tensors lie that clients share instead of sending them."""


DEFAULT_OPTIONS: Final = ProtocolOptions()
