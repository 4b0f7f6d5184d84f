"""`gateway infer` and `gateway models`: ask a running gateway, show the answer.

Rules: a table where a person watches, one line of JSON (infer) or tab-separated lines (models) where a program
reads. `-v` goes to standard error, so that the answer can still be piped.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import orjson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.cli_status import one_line, reasons, why
from gateway.cli_text import count
from gateway.client import Access, Answer, ClientError, ServerError, fetch
from gateway.client_tensors import Output, build_request, read_data, read_outputs
from gateway.core.breaker_states import WORDS
from gateway.provenance.headers import HeaderError, Provenance, parse

MAX_ROWS_SHOWN: Final = 50
MAX_VALUES_SHOWN: Final = 10
SHORT_DIGEST: Final = 19
WIDE: Final = 110
"""Columns of a terminal on which the list has room for where a model comes from."""
"""Characters: `sha256:` and twelve digits."""


def infer(out: Console, err: Console, model: str, data: str, url: str, access: Access, *, verbose: bool) -> None:
    """Send one request and print its outputs.

    Raises:
        ClientError: bad data, no server, or the server's refusal.
    """
    path = f"/v2/models/{quote(model, safe='')}"
    metadata = fetch(url, path, access=access).json()
    if not isinstance(metadata, dict):
        raise ClientError(f"{url} does not answer as an Open Inference Protocol server")
    request = build_request(metadata, read_data(_content(data)))
    answer = fetch(url, f"{path}/infer", request.body, request.headers, access)
    outputs = read_outputs(answer)
    if out.is_terminal:
        _print_table(out, outputs)
    else:
        rows = {output.name: _nested(output.values, output.shape) for output in outputs}
        out.file.write(orjson.dumps(rows).decode() + "\n")
    if verbose:
        _print_provenance(err, answer)


def _content(data: str) -> bytes:
    if data == "-":
        return sys.stdin.buffer.read()
    if not data.startswith("@"):
        return data.encode(errors="surrogateescape")
    try:
        return Path(data[1:]).read_bytes()
    except OSError as error:
        raise ClientError(f"cannot read {data[1:]}: {error.strerror}") from None


def _nested(values: Sequence[Any], shape: Sequence[int]) -> Any:
    """Flat values as nested lists of `shape`."""
    if not shape:
        return values[0] if values else None
    nested = list(values)
    for size in reversed(shape[1:]):
        count = len(nested) // size if size else 0
        nested = [nested[at * size : (at + 1) * size] for at in range(count)]
    return nested


def _print_table(out: Console, outputs: Sequence[Output]) -> None:
    table = Table(show_edge=False)
    table.add_column("row", justify="right")
    for output in outputs:
        table.add_column(escape(f"{output.name}\n{output.datatype} {list(output.shape)}"), overflow="fold")
    rows = min((output.shape[0] if output.shape else 1 for output in outputs), default=0)
    for row in range(min(rows, MAX_ROWS_SHOWN)):
        table.add_row(str(row), *(escape(_cell(output, row)) for output in outputs))
    out.print(table)
    if rows > MAX_ROWS_SHOWN:
        out.print(f"… and {count(rows - MAX_ROWS_SHOWN, 'more row')}; pipe the output to get them all as JSON")


def _cell(output: Output, row: int) -> str:
    """The values of one row; a scalar output shows its value in every row."""
    per_row = len(output.values) // output.shape[0] if output.shape else len(output.values)
    values = output.values[row * per_row : (row + 1) * per_row] if output.shape else output.values
    shown = [f"{v:.6g}" if isinstance(v, float) else str(v) for v in values[:MAX_VALUES_SHOWN]]
    return ", ".join(shown) + (f", … ({per_row} values)" if per_row > MAX_VALUES_SHOWN else "")


def _print_provenance(err: Console, answer: Answer) -> None:
    try:
        provenance = parse(answer.headers)
    except HeaderError as error:
        raise ClientError(f"the answer's provenance headers cannot be read: {error}") from None
    for line in _provenance_lines(provenance, answer.elapsed_s):
        err.print(line, markup=False, highlight=False, soft_wrap=True)


def _provenance_lines(provenance: Provenance, elapsed_s: float) -> list[str]:
    lines = [f"request   {provenance.request_id or 'not stated by the server'}"]
    if provenance.model is not None:
        model = provenance.model
        digest = f"digest {model.digest}" if model.digest else "on a remote server, so no digest is known"
        lines.append(f"model     {model.name} version {model.version}, {digest}")
    for member in provenance.members:
        lines.append(f"backend   {member.backend} executed it, attempt {member.attempt}")
        rows = f"{count(member.size, 'row')} together" if member.size > 1 else "1 row alone"
        lines.append(f"batch     {member.batch_id}: {rows}, this request's first row is {member.row}")
    words = {
        "queue": "waiting in the queue",
        "infer": "executing the model",
        "total": "in the gateway altogether",
    }
    for name, milliseconds in provenance.timings_ms.items():
        lines.append(f"time      {milliseconds:.2f} ms {words.get(name, name)}")
    lines.append(f"time      {elapsed_s * 1e3:.2f} ms seen from here, connection included")
    return lines


def change_model(out: Console, url: str, action: str, model: str, access: Access) -> None:
    """Load or unload (`action`) a model through the data port.

    Raises:
        ClientError: no server, or its refusal.
    """
    fetch(url, f"/v2/repository/models/{quote(model, safe='')}/{action}", b"", access=access)
    out.print(f"{model} is {action}ed", markup=False, highlight=False, soft_wrap=True)


def models(out: Console, url: str, access: Access, *, detailed: bool, only: str | None) -> None:
    """One line a model, from the operations port; `detailed` adds how it is batched, what its backends do, and, for
    programs, why it is not as it was meant to be.

    Raises:
        ClientError: no server, an unexpected answer, or no model named `only`.
    """
    try:
        listed = fetch(url, "/api/models", access=access, option="--ops-url").json()
    except ServerError as error:
        raise ClientError(f"{error}; is {url} the operations port (8002 by default)? Name it with --ops-url") from None
    if not isinstance(listed, list) or not all(isinstance(model, dict) for model in listed):
        raise ClientError(
            f"{url} does not answer as the gateway's operations port (8002 by default); name it with --ops-url"
        )
    chosen = [model for model in listed if only in (None, model.get("name"))]
    if only is not None and not chosen:
        raise ClientError(f"no model is named '{only}'; there are: {', '.join(str(m.get('name')) for m in listed)}")
    headings = ["name", "version", "state", "digest", "backends"]
    headings += ["max_batch_size", "batching", "reason"] if detailed else []
    headings += ["source", "notes"] if detailed else ["source"]
    watched = out.is_terminal
    rows = [
        _model_row(model, detailed=detailed, short=watched and not detailed, lines=watched and detailed)
        for model in chosen
    ]
    if not out.is_terminal:
        if detailed:
            others = reasons(url, [str(model.get("name")) for model in chosen], access)
            for model, row in zip(chosen, rows, strict=True):
                row.append(why(model, others[str(model.get("name"))]))
        for row in rows:
            out.file.write("\t".join(map(one_line, row)) + "\n")
    elif detailed:
        _print_blocks(out, headings, rows)
    else:
        # A person knows where the files are, and a narrow table is unreadable: the status has it too.
        if out.width < WIDE or not any(model.get("reference") for model in chosen):
            headings, rows = headings[:-1], [row[:-1] for row in rows]
        table = Table(show_edge=False)
        for heading in headings:
            table.add_column(heading, overflow="fold", no_wrap=heading in {"version", "state", "digest"})
        for row in rows:
            table.add_row(*map(escape, row))
        out.print(table)


def _print_blocks(out: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A block a model: eight columns do not fit on a screen."""
    for row in rows:
        name, version, state, *rest = row
        out.print(f"{name} version {version} {state}", markup=False, soft_wrap=True)
        for heading, cell in zip(headings[3:], rest, strict=True):
            for at, line in enumerate(cell.split("\n") if cell != "-" else ()):
                out.print(f"  {'' if at else heading:<15} {line}", markup=False, soft_wrap=True)


def _model_row(model: Mapping[str, Any], *, detailed: bool, short: bool, lines: bool) -> list[str]:
    """The cells of one model; `short`: the digest is cut, a program gets all of it; `lines`: a backend a line."""
    backends = sorted(model.get("backends") or [], key=lambda backend: natural(str(backend.get("name"))))
    names = ("\n" if lines else ", ").join(_backend(backend, detailed=detailed) for backend in backends)
    row = [str(model.get(key) or "-") for key in ("name", "version", "state", "digest")] + [names or "-"]
    if model.get("role", "champion") != "champion":
        row[2] += f" ({model['role']})"
    if short and len(row[3]) > SHORT_DIGEST:
        row[3] = row[3][:SHORT_DIGEST] + "…"
    if detailed:
        row += [str(model.get(key) or "-") for key in ("max_batch_size", "batching", "reason")]
    row.append(_source(model))
    if detailed:
        row.append(("\n" if lines else "; ").join(map(str, model.get("notes") or ())) or "-")
    return row


def _source(model: Mapping[str, Any]) -> str:
    """Where it comes from; with the reference that meant it, if that is another text."""
    source, reference = str(model.get("source") or "-"), model.get("reference")
    return f"{source} ({reference})" if reference and reference != source else source


_STATE_WORDS: Final = {state.value: words for state, words in WORDS.items()}


def state_in_words(state: str, seconds_left: object = None) -> str:
    """`open` → `ejected for 3 s more`: people need not know what circuit breakers call it."""
    words = _STATE_WORDS.get(state, state)
    return f"{words} for {seconds_left:.0f} s more" if isinstance(seconds_left, int | float) else words


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts onnx-2 before onnx-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _backend(backend: Mapping[str, Any], *, detailed: bool) -> str:
    """One backend in words. The list says only what is out of the ordinary; the status says why and until when."""
    state = str(backend.get("state") or "")
    available = bool(backend.get("available"))
    notes = []
    if state not in ("", "closed"):
        notes.append(state_in_words(state, backend.get("seconds_left") if detailed else None))
    elif not available:
        notes.append("unavailable")
    if detailed:
        notes += [f"{backend.get('in_flight', 0)} in flight"] if available else []
        cause = str(backend.get("cause") or "")
        notes += [cause] if notes and cause and not cause.startswith(notes[0]) else []
    return f"{backend.get('name')} ({', '.join(notes)})" if notes else str(backend.get("name"))
