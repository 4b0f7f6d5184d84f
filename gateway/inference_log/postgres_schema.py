"""The tables that the Postgres sink fills: versioned steps that lead from nothing to what this version needs.

Rules:
* A step, once released, never changes; a new need is a new step. `gateway_schema` says which were done. Each step runs
  in a transaction, under an advisory lock, so that several gateways may start at once.
* Where the tables are there already, no step runs, and the role needs only SELECT and INSERT on them and UPDATE on
  `gateway_shipped`: `gateway log ship --print-sql` prints the steps for whoever owns the database.
* Rows are never changed and never deleted here: how long they are kept is the database owner's to decide.
* (epoch, position) is the key of everything that is shipped. Time goes upwards with the rows, hence BRIN.
* The showcase's four tables are as its application makes them, so that what reads them there reads them here. A table
  that exists is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

STEPS: Final[tuple[str, ...]] = (
    """
CREATE TABLE gateway_requests (
    request_id text COLLATE "C" NOT NULL,
    client_request_id text, oip_id text, trace_id text,
    received timestamptz NOT NULL, dispatched timestamptz, done timestamptz NOT NULL,
    model text NOT NULL, asked_model text, version text, digest text, variant text,
    protocol text, endpoint text NOT NULL,
    status smallint NOT NULL, grpc_code smallint, error text, reason text,
    backend text, attempt integer, batch_id text, batch_size integer, batch_row integer,
    rows bigint NOT NULL, queue_ms double precision, infer_ms double precision, total_ms double precision NOT NULL,
    executions jsonb, cause text, parameters jsonb, sampling double precision NOT NULL,
    inputs jsonb, input_data bytea[], outputs jsonb, output_data bytea[],
    epoch uuid NOT NULL, position bigint NOT NULL,
    PRIMARY KEY (epoch, position)
);
CREATE INDEX gateway_requests_request_id ON gateway_requests (request_id);
CREATE INDEX gateway_requests_received ON gateway_requests USING brin (received);
COMMENT ON TABLE gateway_requests IS 'One row for each inference request, refused and failed ones included';
COMMENT ON COLUMN gateway_requests.inputs IS
    '[{name, datatype, shape, policy, bytes}]; the bytes themselves, little-endian, are in input_data';

CREATE TABLE gateway_events (
    stream text NOT NULL, at timestamptz NOT NULL, kind text NOT NULL, model text, version text, details jsonb NOT NULL,
    epoch uuid NOT NULL, position bigint NOT NULL,
    PRIMARY KEY (epoch, position)
);
CREATE INDEX gateway_events_at ON gateway_events USING brin (at);
COMMENT ON TABLE gateway_events IS 'lifecycle (loads, swaps, rollbacks), gap (rows that were lost), access (who read)';

CREATE TABLE gateway_feedback (
    request_id text COLLATE "C" NOT NULL, item integer,
    kind text NOT NULL, label jsonb, old jsonb, new jsonb,
    who text, said timestamptz NOT NULL, note text, idempotency_key text COLLATE "C" NOT NULL,
    at timestamptz NOT NULL, epoch uuid NOT NULL, position bigint NOT NULL,
    PRIMARY KEY (epoch, position)
);
CREATE INDEX gateway_feedback_request_id ON gateway_feedback (request_id);
CREATE INDEX gateway_feedback_key ON gateway_feedback (idempotency_key);
COMMENT ON TABLE gateway_feedback IS 'What people said of answers: labels, and overrides from old to new';

CREATE TABLE gateway_refused (
    stream text NOT NULL, epoch uuid NOT NULL, position bigint NOT NULL, why text NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (epoch, position)
);
COMMENT ON TABLE gateway_refused IS 'Rows that no table here would take; they are in the log''s own files';

CREATE TABLE gateway_shipped (epoch uuid PRIMARY KEY, position bigint NOT NULL, at timestamptz NOT NULL DEFAULT now());
COMMENT ON TABLE gateway_shipped IS 'Every position below this one is here';

CREATE VIEW gateway_labels AS
SELECT DISTINCT ON (request_id, item) *
FROM (
    SELECT DISTINCT ON (idempotency_key) * FROM gateway_feedback ORDER BY idempotency_key, at, epoch, position
) AS said_once
ORDER BY request_id, item, said DESC, at DESC, position DESC;
COMMENT ON VIEW gateway_labels IS 'The last word on each request, or row (item) of it; repeated posts count once';

CREATE VIEW gateway_labelled AS
SELECT r.*, f.item AS feedback_item, f.kind AS feedback_kind, f.label AS feedback_label,
    f.old AS feedback_old, f.new AS feedback_new, f.who AS feedback_who, f.said AS feedback_said,
    f.note AS feedback_note
FROM gateway_requests AS r JOIN gateway_labels AS f USING (request_id)
WHERE r.variant IS DISTINCT FROM 'shadow';
COMMENT ON VIEW gateway_labelled IS 'Requests with what was said of them';

CREATE VIEW gateway_unmatched_feedback AS
SELECT f.* FROM gateway_labels AS f
WHERE NOT EXISTS (SELECT FROM gateway_requests AS r WHERE r.request_id = f.request_id);
COMMENT ON VIEW gateway_unmatched_feedback IS 'Feedback to requests that are not here: too early, mistyped, or too old';
""",
)

SHOWCASE: Final = """
CREATE TABLE IF NOT EXISTS inference_requests (
    id TEXT PRIMARY KEY NOT NULL, timestamp TIMESTAMPTZ DEFAULT NOW(),
    parameters JSONB, inputs JSONB, outputs JSONB, raw_request JSONB
);
CREATE TABLE IF NOT EXISTS inference_responses (
    model_name TEXT, model_version TEXT, id TEXT PRIMARY KEY NOT NULL, timestamp TIMESTAMPTZ DEFAULT NOW(),
    parameters JSONB, outputs JSONB, raw_response JSONB
);
CREATE TABLE IF NOT EXISTS inference_errors (id TEXT PRIMARY KEY NOT NULL, error TEXT, response JSONB);
CREATE TABLE IF NOT EXISTS inference_metadata (id TEXT PRIMARY KEY NOT NULL, metadata JSONB);
"""

SHOWCASE_TABLES: Final = ("inference_requests", "inference_responses", "inference_errors", "inference_metadata")
_VERSIONS: Final = (
    "CREATE TABLE gateway_schema (version integer PRIMARY KEY, applied timestamptz NOT NULL DEFAULT now());"
)
LOCK: Final = 0x6F69_705F_6C6F_67
"""Key of the advisory lock under which steps run: "oip_log" in ASCII."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A table of the session that rows are copied into, and how they get from there to where they belong."""

    name: str
    columns: tuple[tuple[str, str], ...]
    """Name and type; times travel as microseconds since 1970."""
    inserts: tuple[str, ...]
    """Where its rows belong; of each, those that are there already stay as they are."""

    @property
    def create(self) -> str:
        listed = ", ".join(f"{name} {kind}" for name, kind in self.columns)
        return f"CREATE TEMPORARY TABLE IF NOT EXISTS {self.name} ({listed}) ON COMMIT DELETE ROWS"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.columns)


def script(*, showcase: bool) -> str:
    """Everything, for whoever owns the database to run by hand on an empty schema."""
    done = f"INSERT INTO gateway_schema (version) SELECT generate_series(1, {len(STEPS)});\n"
    return "\n".join(("BEGIN;", _VERSIONS, *STEPS, done, *([SHOWCASE] if showcase else []), "COMMIT;\n"))


def first_step() -> str:
    """What makes the table that says which steps were done."""
    return _VERSIONS


def _moment(column: str) -> str:
    return f"timestamptz 'epoch' + {column} * interval '1 microsecond'"


def _insert(table: str, columns: tuple[tuple[str, str], ...], staged: str) -> str:
    """Into a table whose times are `timestamptz`, from one whose times are named `…_us`."""
    names = ", ".join(name.removesuffix("_us") for name, _ in columns)
    values = ", ".join(_moment(name) if name.endswith("_us") else name for name, _ in columns)
    return f"INSERT INTO {table} ({names}) SELECT {values} FROM {staged} ON CONFLICT DO NOTHING"  # noqa: S608


def _four(table: str, columns: str, needed: str) -> str:
    """Into one of the showcase's tables, for rows that have what it is about. Their column names differ from ours."""
    theirs = {"at_us": "timestamp", "wanted": "outputs", "given": "parameters"}
    names = ", ".join(theirs.get(name, name) for name in columns.split())
    values = ", ".join(_moment(name) if name.endswith("_us") else name for name in columns.split())
    source = f"SELECT {values} FROM gateway_new_four WHERE {needed} IS NOT NULL"  # noqa: S608
    return f"INSERT INTO {table} ({names}) {source} ON CONFLICT DO NOTHING"


_REQUESTS: Final = tuple(
    (name, kind)
    for kind, names in (
        ("text", "request_id client_request_id oip_id trace_id"),
        ("bigint", "received_us dispatched_us done_us"),
        ("text", "model asked_model version digest variant protocol endpoint"),
        ("smallint", "status grpc_code"),
        ("text", "error reason backend"),
        ("integer", "attempt"),
        ("text", "batch_id"),
        ("integer", "batch_size batch_row"),
        ("bigint", "rows"),
        ("double precision", "queue_ms infer_ms total_ms"),
        ("jsonb", "executions"),
        ("text", "cause"),
        ("jsonb", "parameters"),
        ("double precision", "sampling"),
        ("jsonb", "inputs"),
        ("bytea[]", "input_data"),
        ("jsonb", "outputs"),
        ("bytea[]", "output_data"),
        ("uuid", "epoch"),
        ("bigint", "position"),
    )
    for name in names.split()
)
_EVENTS: Final = (
    *(("stream", "text"), ("at_us", "bigint"), ("kind", "text"), ("model", "text"), ("version", "text")),
    *(("details", "jsonb"), ("epoch", "uuid"), ("position", "bigint")),
)
_FEEDBACK: Final = (
    *(("request_id", "text"), ("item", "integer"), ("kind", "text"), ("label", "jsonb"), ("old", "jsonb")),
    *(("new", "jsonb"), ("who", "text"), ("said_us", "bigint"), ("note", "text"), ("idempotency_key", "text")),
    *(("at_us", "bigint"), ("epoch", "uuid"), ("position", "bigint")),
)
_SHOWCASE: Final = (
    *(("id", "text"), ("at_us", "bigint"), ("model_name", "text"), ("model_version", "text"), ("parameters", "jsonb")),
    *(("inputs", "jsonb"), ("wanted", "jsonb"), ("outputs", "jsonb"), ("raw_request", "jsonb")),
    *(("given", "jsonb"), ("raw_response", "jsonb"), ("error", "text"), ("response", "jsonb"), ("metadata", "jsonb")),
)

REQUESTS: Final = Staged(
    "gateway_new_requests", _REQUESTS, (_insert("gateway_requests", _REQUESTS, "gateway_new_requests"),)
)
EVENTS: Final = Staged("gateway_new_events", _EVENTS, (_insert("gateway_events", _EVENTS, "gateway_new_events"),))
FEEDBACK: Final = Staged(
    "gateway_new_feedback", _FEEDBACK, (_insert("gateway_feedback", _FEEDBACK, "gateway_new_feedback"),)
)
FOUR: Final = Staged(
    "gateway_new_four",
    _SHOWCASE,
    (
        _four("inference_requests", "id at_us parameters inputs wanted raw_request", "raw_request"),
        _four("inference_responses", "model_name model_version id at_us given outputs raw_response", "raw_response"),
        _four("inference_errors", "id error response", "response"),
        _four("inference_metadata", "id metadata", "metadata"),
    ),
)
