"""`gateway log stats` and `gateway log verify`: what the log holds, and whether it is what was written.

Rules: numbers are read from the log itself, so that they are the same while a gateway runs and after it died; what the
sealer and sinks say of themselves is named as theirs, with its age. `verify` prints every fault, and what is no fault
but worth knowing.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import msgspec
import orjson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.cli_text import count, harmless
from gateway.inference_log.log_queries import explained
from gateway.inference_log.private_files import read_json
from gateway.inference_log.rendering import json_text, jsonable
from gateway.inference_log.retention import holds
from gateway.inference_log.segments import UNRESOLVED, SealerState
from gateway.inference_log.store import Store
from gateway.inference_log.verification import verify as check

MAX_NOTES: Final = 50
_BY_STATUS: Final = f"""
    select model, case when model <> '{UNRESOLVED}' then version end as version, status // 100 as class,
        count(*) as requests, cast(sum(rows) as bigint) as rows, min(received) as first, max(received) as last
    from requests group by all order by 1, 2, 3"""  # noqa: S608 — ours
"""What strangers asked for is one line, whatever versions they wrote."""
_LOSSES: Final = """select coalesce(details ->> 'reason', kind) as reason, model, count(*) as gaps,
    cast(sum(cast(details ->> 'rows' as bigint)) as bigint) as rows, min("at") as first, max("at") as last from gaps
    group by all order by 1, 2"""


def stats(out: Console, store: Store, retention_days: int | None, *, as_json: bool) -> None:
    """Print them."""
    found = collect(store, retention_days)
    if as_json:
        out.file.write(json_text(jsonable(found), indented=True) + "\n")
        return
    _requests(out, found["requests"])
    for line in _lines(found):  # a sink's fault repeats what its server said, and that what a client wrote
        out.print(harmless(line), markup=False, highlight=False, soft_wrap=True)


def collect(store: Store, retention_days: int | None) -> dict[str, Any]:
    """Everything `stats` shows, as plain values."""
    layout = store.layout
    with explained(), store.opened() as connection:
        requests = connection.sql(_BY_STATUS).to_arrow_table().to_pylist()
        losses = connection.sql(_LOSSES).to_arrow_table().to_pylist()
        counted = "select (select count(*) from {}) as n"
        streams = {
            view: connection.sql(counted.format(view)).to_arrow_table().to_pylist()[0]["n"]
            for view in ("lifecycle", "gaps", "feedback", "access")
        }
    unsealed = [one.segment(s) for one in store.wals for epoch in one.epochs() for s in one.segments(epoch)]
    held = holds(layout)
    sealer = read_json(layout.sealer_state, SealerState)
    return {
        "directory": str(layout.directory),
        "requests": requests,
        "losses": losses,
        "streams": streams,
        "bytes": sum(_size(one.directory) for one in store.wals),
        "unsealed_segments": len(unsealed),
        "unsealed_bytes": sum(_file_size(path) for path in unsealed),
        "parquet_files": sum(
            len(layout.parquet(stream)) for stream in ("requests", "lifecycle", "gap", "feedback", "access")
        ),
        "oldest": min((row["first"] for row in requests), default=None),
        "retention_days": retention_days,
        "holds": [msgspec.to_builtins(hold) for hold in held.held],
        "unreadable_holds": list(held.unreadable),
        "sealer": msgspec.to_builtins(sealer) if sealer is not None else None,
        "sinks": _sinks(layout.sinks),
    }


def _sinks(directory: Path) -> list[dict[str, Any]]:
    from gateway.inference_log.sinks import SinkState  # noqa: PLC0415 — with its own imports

    states = [read_json(path, SinkState) for path in sorted(directory.glob("*.json"))]
    return [msgspec.to_builtins(state) for state in states if state is not None]


def _size(directory: Path) -> int:
    return sum(_file_size(Path(root) / name) for root, _, names in os.walk(directory) for name in names)


def _file_size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _requests(out: Console, rows: list[dict[str, Any]]) -> None:
    by_model: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        mine = by_model.setdefault((row["model"], row["version"] or "-"), {"requests": 0, "rows": 0})
        mine["requests"] += row["requests"]
        mine["rows"] += int(row["rows"])
        mine[f"{row['class']}xx"] = mine.get(f"{row['class']}xx", 0) + row["requests"]
    classes = sorted({key for mine in by_model.values() for key in mine if key.endswith("xx")})
    table = Table(show_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column("version")
    for heading in ("requests", "rows", *classes):
        table.add_column(heading, justify="right")
    for (model, version), mine in by_model.items():
        cells = [f"{mine.get(key, 0):,}" for key in ("requests", "rows", *classes)]
        table.add_row(escape("(none of ours)" if model == UNRESOLVED else model), escape(version), *cells)
    if by_model:
        out.print(table)
    else:
        out.print("no requests yet")


def _lines(found: dict[str, Any]) -> list[str]:
    lines = []
    if found["losses"]:
        for loss in found["losses"]:
            of = f" of {loss['model']}" if loss["model"] else ""
            when = f"{loss['first']:%Y-%m-%d %H:%M} to {loss['last']:%Y-%m-%d %H:%M}"
            rows, gaps = count(int(loss["rows"] or 0), "row"), count(loss["gaps"], "gap")
            lines.append(f"lost       {rows}{of}: {loss['reason']}, {gaps}, {when}")
    else:
        lines.append("lost       nothing")
    streams = ", ".join(f"{number:,} {view}" for view, number in found["streams"].items())
    lines.append(f"besides    {streams}")
    sealed = count(found["parquet_files"], "Parquet file")
    waiting = f"{count(found['unsealed_segments'], 'segment')} unsealed ({_bytes(found['unsealed_bytes'])})"
    lines.append(f"size       {_bytes(found['bytes'])}: {sealed}, {waiting}")
    if found["oldest"] is not None:
        lines.append(f"oldest     {found['oldest']:%Y-%m-%d %H:%M:%S} UTC")
    days = found["retention_days"]
    lines.append(
        f"retention  {days} days" if days is not None else "retention  not known here; name the configuration with -c"
    )
    lines += _hold_lines(found) + _sealer_lines(found["sealer"])
    for sink in found["sinks"]:
        lines.append(_sink_line(sink))
    return lines


def _hold_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for hold in found["holds"]:
        models = ", ".join(hold["models"]) or "all models"
        span = f"{hold['first'] or 'the beginning'} to {hold['last'] or 'open end'}"
        lines.append(f"hold       {hold['name']}: {models}, {span}")
    unreadable = found["unreadable_holds"]
    return lines + [f"hold       {name} cannot be read, so nothing is deleted at all" for name in unreadable]


def _sealer_lines(sealer: dict[str, Any] | None) -> list[str]:
    if sealer is None:
        return ["sealer     has not run yet; gateway log seal runs it once"]
    text = f"sealer     said {_ago(sealer['at_us'])}: {count(sealer['waiting_segments'], 'segment')} waiting"
    lines = [text + (f"; {sealer['failing']}" if sealer["failing"] else "")]
    if sealer["over_limit"]:
        lines.append("sealer     the log is larger than max_disk_gb; nothing is deleted for that")
    return lines


def _sink_line(sink: dict[str, Any]) -> str:
    behind = f"about {sink['lag_rows']:,} behind" if sink["lag_rows"] else "none behind"  # an estimate until sealed
    state = f"{sink['shipped_rows']:,} rows shipped, {behind}"
    problem = f"; {sink['failing']}" if sink["failing"] else ""
    return f"sink       {sink['name']} said {_ago(sink['at_us'])}: {state}{problem}"


def _ago(at_us: int) -> str:
    seconds = max(0, time.time_ns() // 1000 - at_us) // 1_000_000
    for size, noun in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            return f"{count(seconds // size, noun)} ago"
    return f"{count(seconds, 'second')} ago"


def _bytes(number: int) -> str:
    size = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def verify(out: Console, store: Store, *, as_json: bool) -> bool:
    """Check the log and print what was found; True: no fault."""
    verdict = check(store)
    if as_json:
        out.file.write(
            orjson.dumps(asdict(verdict) | {"good": verdict.good}, option=orjson.OPT_INDENT_2).decode() + "\n"
        )
        return verdict.good
    for fault in verdict.faults:
        out.print(f"fault: {fault}", markup=False, highlight=False, soft_wrap=True)
    for note in verdict.notes[:MAX_NOTES]:
        out.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if len(verdict.notes) > MAX_NOTES:
        out.print(f"note: and {len(verdict.notes) - MAX_NOTES} more; --json has them all", markup=False, soft_wrap=True)
    counted = (count(verdict.segments, "segment"), count(verdict.files, "file"), count(verdict.rows, "row"))
    lost = f"lost in crashes {verdict.lost_rows}, dropped {verdict.dropped_rows}"
    faults = count(len(verdict.faults), "fault") if verdict.faults else "no faults"
    out.print(f"{faults}: {', '.join(counted)}; {lost}", markup=False, highlight=False, soft_wrap=True)
    return verdict.good
