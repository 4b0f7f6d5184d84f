"""`dynamic_batching` of a config.pbtxt: sizes, delay, priority levels and queue policies, with Triton's conditions.

Rules: preferred sizes are 1 … `max_batch_size`; with priority levels the default is one of them, and so is each level
that a policy is given for; answers in order of arrival exclude more than one level and requests put off by DELAY.
Without levels, what is said about them has no effect in Triton either, and is noted as ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, cast

from gateway.core.scheduling import QueuePolicy, TimeoutAction
from gateway.protocol.model_config_tensors import INT32
from gateway.protocol.text_section import Section

MAX_DELAY_US: Final = 60_000_000
MAX_TIMEOUT_US: Final = 2**53
MAX_LEVELS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class DynamicBatching:
    """What the block says; the neutral values where it does not stand."""

    preferred_batch_sizes: tuple[int, ...] | None = None
    max_queue_delay_us: int | None = None
    preserve_ordering: bool = False
    priority_levels: int = 0
    default_priority_level: int = 0
    default_queue_policy: QueuePolicy | None = None
    priority_queue_policies: tuple[tuple[int, QueuePolicy], ...] = ()


def read_dynamic_batching(top: Section, limit: int | None) -> DynamicBatching:
    block = top.section("dynamic_batching")
    if block is None:
        return DynamicBatching()
    preferred = read_preferred(block, limit)
    delay = block.integer("max_queue_delay_microseconds", 0, MAX_DELAY_US)
    levels, default_level = _read_levels(block)
    default_policy = block.section("default_queue_policy")
    policy = None if default_policy is None else _read_policy(default_policy)
    policies = _read_policies(block, levels)
    ordered = block.flag("preserve_ordering")
    if ordered:
        _check_ordering(block, levels, [policy, *[stated for _, stated in policies]])
    block.finish()
    return DynamicBatching(preferred, delay, ordered, levels, default_level, policy, policies)


def read_preferred(block: Section, limit: int | None) -> tuple[int, ...] | None:
    """`preferred_batch_size`; None: not stated."""
    preferred = block.integers("preferred_batch_size", 1, INT32)
    line = next((value.line for value in block.values("preferred_batch_size")), block.line)
    if limit is not None and any(size > limit for size in preferred):
        block.fault(line, "preferred_batch_size", f"must not exceed max_batch_size, which is {limit}")
    return preferred if block.has("preferred_batch_size") else None


def _read_levels(block: Section) -> tuple[int, int]:
    levels = block.integer("priority_levels", 0, MAX_LEVELS) or 0
    default = block.integer("default_priority_level", 0, MAX_LEVELS) or 0
    if levels and not 1 <= default <= levels:
        line = next((value.line for value in block.values("default_priority_level")), block.line)
        hint = f"default priority level must be in range [1, {levels}], which priority_levels says"
        block.fault(line, "default_priority_level", hint)
    if not levels and default:
        block.note_ignored(block.path("default_priority_level"))
    return levels, default if levels else 0


def _read_policies(block: Section, levels: int) -> tuple[tuple[int, QueuePolicy], ...]:
    found: dict[int, QueuePolicy] = {}
    for entry in block.sections("priority_queue_policy"):
        level = entry.integer("key", 0, MAX_LEVELS) or 0
        value = entry.section("value")
        policy = QueuePolicy() if value is None else _read_policy(value)
        entry.finish()
        if levels and not 1 <= level <= levels:
            entry.fault(entry.line, "key", f"priority queue policy must have priority level in range [1, {levels}]")
        if level in found:
            entry.fault(entry.line, "key", f"level {level} stands twice; keep one of them")
        found[level] = policy
    if found and not levels:
        block.note_ignored(block.path("priority_queue_policy"))
    return tuple(sorted(found.items(), key=lambda item: item[0])) if levels else ()


def _read_policy(block: Section) -> QueuePolicy:
    action = cast("TimeoutAction", block.word("timeout_action", ("REJECT", "DELAY")) or "REJECT")
    timeout_us = block.integer("default_timeout_microseconds", 0, MAX_TIMEOUT_US) or 0
    override = block.flag("allow_timeout_override")
    size = block.integer("max_queue_size", 0) or 0
    block.finish()
    return QueuePolicy(action, timeout_us / 1e6, override, size)


def _check_ordering(block: Section, levels: int, policies: list[QueuePolicy | None]) -> None:
    line = next((value.line for value in block.values("preserve_ordering")), block.line)
    if levels > 1:
        hint = "Only one priority level is allowed when 'preserve_ordering' is true; remove one of the two"
        block.fault(line, "preserve_ordering", hint)
    if any(policy and policy.timeout_action == "DELAY" and policy.default_timeout_s for policy in policies):
        hint = "Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true; write REJECT"
        block.fault(line, "preserve_ordering", hint)
