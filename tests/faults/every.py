"""All scenarios: importing this module registers them."""

from __future__ import annotations

from typing import Final

from tests.faults import (
    scenarios_answers,
    scenarios_clients,
    scenarios_death,
    scenarios_long,
    scenarios_names,
    scenarios_network,
    scenarios_real,
    scenarios_states,
    scenarios_surroundings,
    scenarios_workers,
)
from tests.faults.registry import SCENARIOS

__all__ = ["BY_NAME_ONLY", "SCENARIOS"]

BY_NAME_ONLY: Final = ("campaign", "rolling", "soak")
"""Beginnings of the names of scenarios that take minutes, and run only when they are asked for."""

_MODULES: Final = (
    scenarios_answers,
    scenarios_clients,
    scenarios_death,
    scenarios_long,
    scenarios_names,
    scenarios_network,
    scenarios_real,
    scenarios_states,
    scenarios_surroundings,
    scenarios_workers,
)
