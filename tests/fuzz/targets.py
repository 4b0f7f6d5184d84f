"""All fuzz targets by name."""

from __future__ import annotations

from tests.fuzz import targets_rest
from tests.fuzz.target import Target

TARGETS: dict[str, Target] = {target.name: target for room in (targets_rest,) for target in room.TARGETS}
