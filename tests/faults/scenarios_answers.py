"""One of three backends answers badly. Whatever it sends, no client gets a part of it, and none notices."""

from __future__ import annotations

from functools import partial
from typing import Final

from tests.faults.behaviour import Behaviour, Fault
from tests.faults.processes import resident_mib
from tests.faults.registry import scenario
from tests.faults.results import Result
from tests.faults.rig import Rig, Run, remote

BOTH: Final = ("http", "grpc")
CASES: Final[tuple[tuple[str, Fault, str, tuple[str, ...]], ...]] = (
    ("05-drip", Fault.DRIP, "an answer at 10 bytes a second", BOTH),
    ("05-slices", Fault.SLICED, "a right answer in slices of 7 bytes: no fault at all", BOTH),
    ("06-close-reused", Fault.CLOSE_REUSED, "an idle connection is closed as it is used again", BOTH),
    ("07-reset-mid", Fault.RESET_MID, "RST in the middle of an answer", BOTH),
    ("07-reset-before", Fault.RESET_BEFORE, "RST as the request arrives", BOTH),
    ("07-reset-after", Fault.RESET_AFTER, "RST after the run, before the answer", BOTH),
    ("08-short-body", Fault.CLOSE_MID, "an answer shorter than its Content-Length", BOTH),
    ("08-unended-chunks", Fault.CHUNKED_UNENDED, "a chunked answer without its end", ("http",)),
    ("09-garbage", Fault.GARBAGE, "bytes that are not the protocol", BOTH),
    ("09-bad-content", Fault.BAD_JSON, "JSON or protobuf that cannot be decoded", BOTH),
    ("10-row-more", Fault.ROW_MORE, "one row too many", BOTH),
    ("10-row-less", Fault.ROW_LESS, "one row too few", BOTH),
    ("10-no-rows", Fault.NO_ROWS, "no rows at all", BOTH),
    ("11-datatype", Fault.WRONG_DATATYPE, "FP64 where INT64 is due", BOTH),
    ("11-shape", Fault.WRONG_SHAPE, "one dimension too many", BOTH),
    ("11-name", Fault.WRONG_NAME, "an output of another name", BOTH),
    ("11-missing", Fault.MISSING_OUTPUT, "no output", BOTH),
    ("14-endless", Fault.ENDLESS, "an answer that never stops growing", BOTH),
    ("15-encoded", Fault.ENCODED, "a gzip bomb that nobody asked for", ("http",)),
    ("30-goaway", Fault.GOAWAY, "GOAWAY below our stream", ("grpc",)),
    ("30-refused", Fault.REFUSED_STREAM, "REFUSED_STREAM", ("grpc",)),
)
NOT_EXECUTED: Final = frozenset({Fault.CLOSE_REUSED, Fault.GOAWAY, Fault.REFUSED_STREAM})
"""Faults after which the batch certainly did not run: sending it elsewhere costs no budget."""


async def bad_answers(run: Run, result: Result, *, fault: Fault, protocol: str) -> Result:
    """One backend answers so to half of its requests, for a while; then it is healthy again."""
    settings = {"attempt_timeout_ms": 1000} if fault is Fault.DRIP else {}
    async with remote(run, protocol=protocol, model=settings) as rig:
        await rig.before(3.0)
        await rig.inject(rig.backends[0].behave(Behaviour(fault, share=0.5)))
        memory = _Memory(rig)
        for _ in range(4):
            await rig.hold(1.5, 0.5)
            memory.look()
        result.injected = (await rig.backends[0].counters())["injected"]
        await rig.heal(rig.backends[0].behave())
        await rig.after(16.0, 2.0)
        await rig.finish(result, victim="b1")
        result.at_least("faults injected", result.injected, 1)
        result.at_most("MiB of memory gained while it lasted", memory.most_mib, 1400)
        if fault is Fault.SLICED:
            ejected = rig.watch.flips("b1", rig.injected_at)
            result.at_most("ejections of a healthy backend", ejected, 0, hard=False)
    return result


class _Memory:
    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._before = resident_mib(rig.gateway.child.pid)
        self.most_mib = 0.0

    def look(self) -> None:
        self.most_mib = max(self.most_mib, resident_mib(self._rig.gateway.child.pid) - self._before)


def _expected(fault: Fault) -> str:
    if fault is Fault.SLICED:
        return "0 errors, no ejection"
    if fault in NOT_EXECUTED:
        return "0 errors: sent elsewhere at once"
    return "0 errors, 0 partial or wrong answers; ejected"


for _name, _fault, _text, _protocols in CASES:
    for _protocol in _protocols:
        scenario(f"{_name}-{_protocol}", f"{_text} ({_protocol})", _expected(_fault))(
            partial(bad_answers, fault=_fault, protocol=_protocol)
        )
