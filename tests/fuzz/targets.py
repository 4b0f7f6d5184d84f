"""All fuzz targets by name."""

from __future__ import annotations

from tests.fuzz import targets_config, targets_grpc, targets_rest, targets_wire
from tests.fuzz.target import Target

TARGETS: dict[str, Target] = {target.name: target for room in (targets_rest, targets_grpc, targets_config, targets_wire) for target in room.TARGETS}
