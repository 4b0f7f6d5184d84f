"""`gateway log show`: one request on one screen, or as one JSON document.

Rules: what is unknown is not shown as if it were known; tensors are shortened for eyes (`--json` has every value);
what a client wrote cannot move the cursor. Exit code 1: no such request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson
from rich.console import Console

from gateway.cli_text import count
from gateway.inference_log.log_queries import explained
from gateway.inference_log.rendering import document_of, json_text, jsonable, moment, request_document
from gateway.inference_log.store import LogReadError, Store, batches_of

MAX_FOUND: Final = 20
MAX_MATES_SHOWN: Final = 8
MAX_VALUES_SHOWN: Final = 12
MAX_TEXT: Final = 300
LABEL: Final = 10
_FEEDBACK: Final = """select kind, "at", details from feedback
    where (details ->> 'request_id') in (select unnest($ids)) order by "at" """
_LIFECYCLE: Final = """select kind, model, version, "at", details from lifecycle
    where model in (select unnest($models)) order by "at" """


def show(out: Console, store: Store, text: str, *, as_json: bool) -> None:
    """Print the requests that `text` names.

    Raises:
        LogReadError: there is none.
    """
    found = store.find(text)
    if not found:
        raise LogReadError(
            f"no request {text[:64]!r} is in the log: neither as X-Request-Id nor as a client's id. It may be too new "
            "(wait a second), too old (gateway log stats), or lost (gateway log query 'from gaps')"
        )
    said = _side(store, found)
    if as_json:
        documents = [_document(store, row, said) for row in found]
        whole = documents[0] if len(documents) == 1 else documents
        out.file.write(json_text(whole, indented=True) + "\n")
        return
    if len(found) > 1:
        _say(out, f"{count(len(found), 'request')} carry this id; the newest {min(len(found), MAX_FOUND)}:\n")
    for number, row in enumerate(found[-MAX_FOUND:]):
        if number:
            _say(out, "")
        for line in lines_of(row, store.mates(row), said):
            _say(out, line)


def _say(out: Console, text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


class _Said:
    """What side streams say of some requests: feedback, and where their models came from."""

    def __init__(self, feedback: Sequence[Mapping[str, Any]], lifecycle: Sequence[Mapping[str, Any]]) -> None:
        self._feedback = feedback
        self._lifecycle = lifecycle

    def feedback(self, row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [entry for entry in self._feedback if _details(entry).get("request_id") == row["request_id"]]

    def provenance(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The last thing the log says about the origin of the version that answered, before it answered."""
        for entry in reversed(self._lifecycle):
            details = _details(entry)
            same = (entry["model"], entry["version"]) == (row["model"], row["version"]) and entry["at"] <= row["done"]
            if same and details.get("digest") in (None, row["digest"]) and "source" in details:
                return details
        return {}


def _details(entry: Mapping[str, Any]) -> dict[str, Any]:
    try:
        read = json.loads(entry["details"])
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


def _side(store: Store, rows: Sequence[Mapping[str, Any]]) -> _Said:
    ids = [row["request_id"] for row in rows]
    models = sorted({row["model"] for row in rows})
    with explained(), store.opened(["feedback", "lifecycle"]) as connection:
        feedback = connection.sql(_FEEDBACK, params={"ids": ids}).to_arrow_table().to_pylist()
        lifecycle = connection.sql(_LIFECYCLE, params={"models": models}).to_arrow_table().to_pylist()
    return _Said(feedback, lifecycle)


def _document(store: Store, row: Mapping[str, Any], said: _Said) -> dict[str, Any]:
    document = request_document(row, store.mates(dict(row)))
    document["provenance"] = jsonable(said.provenance(row)) or None
    document["feedback"] = [
        {"kind": entry["kind"], "at": moment(entry["at"])} | _details(entry) for entry in said.feedback(row)
    ]
    return document


def lines_of(row: Mapping[str, Any], mates: Sequence[Mapping[str, Any]], said: _Said) -> list[str]:
    """A request for people, a fact a line."""
    lines = [_line("request", row["request_id"])]
    for label, key in (
        ("client id", "client_request_id"),
        ("oip id", "oip_id"),
        ("trace", "trace_id"),
        ("copy of", "cause"),
    ):
        if row[key] is not None:
            lines.append(_line(label, row[key]))
    lines.append(_line("received", f"{moment(row['received'])} over {row['protocol'] or 'nothing'}, {row['endpoint']}"))
    lines += _answer_lines(row)
    lines += _model_lines(row, said.provenance(row))
    lines += _execution_lines(row, mates)
    lines += _time_lines(row)
    if row["parameters"]:
        lines.append(_line("parameters", row["parameters"]))
    lines += _tensor_lines("input", row["inputs"], row) + _tensor_lines("output", row["outputs"], row)
    for entry in said.feedback(row):
        lines.append(_line("feedback", _feedback(entry)))
    lines.append(_line("place", f"epoch {row['epoch']}, position {row['position']}"))
    return lines


def _line(label: str, text: str) -> str:
    return f"{label:<{LABEL}} {_clean(text)}"


def _clean(text: str) -> str:
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[: MAX_TEXT * 4])


def _answer_lines(row: Mapping[str, Any]) -> list[str]:
    code = f", gRPC code {row['grpc_code']}" if row["grpc_code"] is not None else ""
    words = " (the client left)" if row["status"] == 499 else ""
    lines = [_line("status", f"{row['status']}{words}{code}")]
    if row["error"]:
        lines.append(_line("error", row["error"]))
    return lines


def _model_lines(row: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[str]:
    if row["asked_model"] is not None:
        version = f" version {row['version']}" if row["version"] else ""
        return [_line("model", f"none that is served here; asked for {row['asked_model']}{version}")]
    variant = f", {row['variant']}" if row["variant"] else ""
    lines = [_line("model", f"{row['model']} version {row['version']}{variant}")]
    unknown = "not known: a remote server executed it" if row["backend"] and row["status"] < 400 else "not known"
    lines.append(_line("digest", row["digest"] or unknown))
    for key, label in (("source", "source"), ("uri", "uri"), ("run_id", "run"), ("git_commit", "commit")):
        if isinstance(provenance.get(key), str):
            lines.append(_line(label, provenance[key]))
    return lines


def _execution_lines(row: Mapping[str, Any], mates: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    if row["backend"]:
        attempt = f", attempt {row['attempt']}" if row["attempt"] else ""
        lines.append(_line("backend", f"{row['backend']}{attempt}"))
    batches = batches_of(dict(row))
    if not batches:
        return [*lines, _line("batch", "none: it was not executed here")] if row["backend"] is None else lines
    size, first, rows = row["batch_size"], row["batch_row"], row["rows"]
    company = "alone" if size == rows else f"of {size} rows"
    lines.append(_line("batch", f"{batches[0]} {company}, this request's {count(rows, 'row')} from row {first}"))
    if len(batches) > 1:
        lines.append(_line("", f"and {count(len(batches) - 1, 'more execution')}: {', '.join(batches[1:5])}"))
    for number, mate in enumerate(mates[:MAX_MATES_SHOWN]):
        lines.append(_line("" if number else "with", f"{mate['request_id']} row {mate['batch_row']}"))
    if len(mates) > MAX_MATES_SHOWN:
        lines.append(_line("", f"… and {count(len(mates) - MAX_MATES_SHOWN, 'more request')}; --json names them all"))
    missing = (size or 0) - rows - sum(mate["rows"] for mate in mates if mate["batch_id"] == batches[0])
    if len(batches) == 1 and missing > 0:
        lines.append(_line("", f"{count(missing, 'row')} of the batch are of requests that are not in the log"))
    return lines


def _time_lines(row: Mapping[str, Any]) -> list[str]:
    parts = [f"{row['total_ms']:.2f} ms altogether"]
    if row["queue_ms"] is not None:
        parts.append(f"{row['queue_ms']:.2f} in the queue")
    if row["infer_ms"] is not None:
        parts.append(f"{row['infer_ms']:.2f} executing")
    return [_line("time", ", ".join(parts))]


def _tensor_lines(label: str, tensors: Sequence[Mapping[str, Any]] | None, row: Mapping[str, Any]) -> list[str]:
    if tensors is None and label == "output" and row["status"] >= 400:
        return []  # there was none
    if tensors is None:
        why = (
            f"not drawn: {row['sampling']:g} of such requests keep theirs"
            if row["sampling"] < 1
            else "none was decoded"
        )
        return [_line(label, f"not kept ({why})")]
    lines = []
    for tensor in tensors:
        document = document_of(tensor)
        shown = _values(document.get("data")) if "data" in document else ""
        note = f"[{document['note']}]" if "note" in document else ""
        head = f"{tensor['name']} {tensor['datatype']} {list(tensor['shape'])}"
        lines.append(_line(label, " ".join(part for part in (head, shown, note) if part)))
    return lines


def _values(data: Any) -> str:
    flat = list(_flat(data))
    shown = [f"{value:.6g}" if isinstance(value, float) else _word(value) for value in flat[:MAX_VALUES_SHOWN]]
    return ", ".join(shown) + (f", … ({len(flat)} values)" if len(flat) > MAX_VALUES_SHOWN else "")


def _flat(data: Any) -> Any:
    if isinstance(data, list):
        for element in data:
            yield from _flat(element)
    else:
        yield data


def _word(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


def _feedback(entry: Mapping[str, Any]) -> str:
    details = _details(entry)
    row = f" of row {details['row']}" if details.get("row") is not None else ""
    who = f", by {details['who']}" if details.get("who") else ""
    what = (
        f"label {_word(details['label'])}"
        if "label" in details
        else f"{_word(details.get('old'))} overridden by {_word(details.get('new'))}"
    )
    return f"{what}{row}{who}, {moment(entry['at'])}"
