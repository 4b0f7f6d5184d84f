"""All fuzz targets by name."""

from __future__ import annotations

from tests.fuzz import (
    targets_call,
    targets_config,
    targets_grpc,
    targets_remote,
    targets_remote_answers,
    targets_rest,
    targets_wire,
)
from tests.fuzz.target import Target

_CLIENTS = (targets_rest, targets_grpc, targets_call, targets_config, targets_wire)
_SERVERS = (targets_remote, targets_remote_answers)
TARGETS: dict[str, Target] = {target.name: target for room in (*_CLIENTS, *_SERVERS) for target in room.TARGETS}
