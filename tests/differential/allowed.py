"""Every difference from a real Triton 2.51 that is meant, each with its reason: the one list.

An entry covers the differences whose case and path match its patterns (fnmatch) and whose values are the ones named; a
difference that no entry covers fails the run, an entry that covers nothing is stale and fails too.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from tests.differential.compare import Difference

ANY: Final = "(any)"


@dataclass(frozen=True)
class Allowed:
    cases: tuple[str, ...]
    path: str
    why: str
    theirs: Any = ANY
    """Triton's value; for the path `status`, the status alone. A tuple: one of these."""
    ours: Any = ANY

    def covers(self, found: Difference) -> bool:
        return (
            fnmatchcase(found.path.rpartition(":")[2], self.path)
            and any(fnmatchcase(found.case, pattern) for pattern in self.cases)
            and _is(self.theirs, found, found.theirs)
            and _is(self.ours, found, found.ours)
        )


def _is(wanted: Any, found: Difference, actual: Any) -> bool:
    if wanted is ANY:
        return True
    if found.path.endswith("status"):
        actual = actual[0]
    return actual in wanted if isinstance(wanted, tuple) else bool(actual == wanted)


MALFORMED: Final = (
    "json_values/*",
    "json_datatypes/*",
    "json_structure/*",
    "shapes/*",
    "inputs_and_outputs/*",
    "parameters/*",
    "binary/*",
    "compression/*",
    "classification/*",
    "generate/*",
    "repository/*",
    "trace/*",
    "logging/*",
    "control/unload*",
    "control/unknown parameter",
    "control/parameters list",
    "control/load broken JSON",
    "control/load a path",
    "control/load blank",
    "control/override not a string",
    "control/file without config",
    "statistics/*",
)
CONFIGS: Final = (
    "documents/config *",
    "grpc_documents/config *",
    "control/*",
    "grpc_control/*",
    "restricted/*/config",
    "sequence/* config",
)
SERVER: Final = (
    "documents/server",
    "routes/GET /v2?x=y",
    "restricted/open /v2",
    "grpc_documents/ServerMetadata",
    "restricted/ServerMetadata",
)
HEALTH: Final = (
    "documents/live",
    "documents/ready*",
    "routes/GET /v2/health/live?x",
    "control/*",
    "restricted/open /v2/health*",
)
TWIN: Final = "the twins differ in this: Python there, ONNX here"
PLAIN: Final = ("text/plain", "application/json")

ALLOWED: Final[tuple[Allowed, ...]] = (
    # --- everywhere
    Allowed(MALFORMED, "status", "§0 no. 1: what the client wrote wrongly is 400 here, INTERNAL there", 500, 400),
    Allowed(("*",), "error.header.content-type", "§1.2: an error's body is JSON and says so", *PLAIN),
    Allowed(
        (
            "documents/metadata *",
            "accepting/metadata *",
            "grpc_documents/metadata *",
            "restricted/* /v2/models/m",
            "sequence/* metadata",
        ),
        "body.platform",
        "the twins differ in this: Python there, ONNX here",
        "python",
        "onnxruntime_onnx",
    ),
    # --- infer
    Allowed(
        ("json_datatypes/*INT* over *",), "status", "§0 no. 16, trap 18: integers out of range are refused", 200, 400
    ),
    Allowed(("json_datatypes/not UTF-8 out",), "status", "trap 22: never JSON that is not UTF-8", 200, 400),
    Allowed(
        ("binary/BYTES NUL and empty",),
        "status",
        "onnxruntime's strings are UTF-8: other bytes are refused before they reach a model",
        200,
        400,
    ),
    Allowed(("binary/BOOL 2",), "status", "a BOOL byte that is neither 0 nor 1 has no meaning to a model", 200, 400),
    Allowed(
        ("json_structure/body empty", "json_structure/no body", "compression/empty gzip"),
        "status",
        "§1.9: without the length header the body is JSON; nothing is no JSON (Triton: a raw request of no bytes)",
        200,
        400,
    ),
    Allowed(("json_structure/BOM",), "status", "RFC 8259 §8.1: JSON on the wire has no byte order mark", 200, 400),
    Allowed(("json_structure/depth beyond",), "status", "§1.8: nesting is bounded", 200, 400),
    Allowed(
        ("json_structure/escaped name",), "status", "§1.1: names are percent-decoded, as tritonclient quotes", 404, 200
    ),
    Allowed(
        ("inputs_and_outputs/outputs null", "parameters/parameters null"),
        "status",
        "null where nothing is meant: serialisers of optional fields write it; Triton answers 500",
        500,
        200,
    ),
    Allowed(("inputs_and_outputs/outputs swapped",), "body.outputs.*", "§0 no. 13: outputs in the order asked for"),
    Allowed(("binary/mixed out, other order",), "body.outputs.*", "§0 no. 13: outputs in the order asked for"),
    Allowed(("binary/mixed out, other order",), "keys", "§0 no. 13: outputs in the order asked for"),
    Allowed(("inputs_and_outputs/output twice",), "status", "§0 no. 15, trap 14", 200, 400),
    Allowed(
        ("inputs_and_outputs/required left out",),
        "status",
        "Triton counts the inputs only and lets the model fail; §1.8 wants the missing one named",
        500,
        400,
    ),
    Allowed(
        ("parameters/timeout 1",),
        "status",
        "a model without a queue policy: the caller's timeout is its deadline here, ignored there",
        200,
        504,
    ),
    Allowed(("parameters/input parameters list",), "status", "§1.8: parameters are an object", 200, 400),
    Allowed(("versions/01",), "status", "§1.1: a version is a name; 01 is none of the model's", 200, 404),
    Allowed(("versions/beyond 64 bits",), "status", "§1.1: any version that is not there is 404", 400, 404),
    Allowed(
        ("other_models/ensemble*",), "body.parameters", "§1.8: request parameters are never echoed; the ensemble does"
    ),
    Allowed(("other_models/ensemble*",), "keys", "§1.8: request parameters are never echoed; the ensemble does"),
    Allowed(
        ("compression/raw deflate", "compression/cut gzip", "compression/not gzip"),
        "status",
        "trap 39: a stream that cannot be inflated is 400; Triton 2.51 goes on with what it got",
        200,
        400,
    ),
    Allowed(
        ("json_datatypes/FP64 over all",),
        "body.outputs.0.data",
        "Triton reads 10^30 one bit off; here a double is the nearest one",
    ),
    # --- management
    Allowed(("routes/GET /v2/models",), "status", "§0 no. 12: KServe's list of models", 404, 200),
    Allowed(("routes/GET /v2/",), "status", "§1.1: accepted with and without the slash", 404, 200),
    Allowed(SERVER, "body.version", "ours"),
    Allowed(
        SERVER,
        "body.extensions",
        "§1.3: only what is on is advertised; shared memory is off by default (§0 no. 14)",
    ),
    Allowed((*CONFIGS,), "body*.backend", TWIN, "python", "onnxruntime"),
    Allowed((*CONFIGS,), "body*.platform", TWIN, ("", "(absent)"), "onnxruntime_onnx"),
    Allowed((*CONFIGS,), "body*.default_model_filename", TWIN, "model.py", "model.onnx"),
    Allowed(
        ("documents/config ensemble",),
        "body.ensemble_scheduling.max_inflight_requests",
        "a field of the message that is newer than 2.51, at its default",
        "(absent)",
        0,
    ),
    Allowed(("documents/* of an escaped name",), "status", "§1.1: names are percent-decoded", (400, 404), 200),
    Allowed(("documents/ready of *",), "status", "§0 no. 4: an unknown model is 404 there too", 400, 404),
    Allowed(
        ("documents/stats of version abc",), "status", "§1.4: a version that is not there is 400, any name", 404, 400
    ),
    Allowed(
        ("repository/index list", "trace/list", "logging/list"),
        "status",
        "§0 no. 1: a list where an object belongs; Triton ignores it",
        200,
        400,
    ),
    Allowed(("trace/*of nobody",), "status", "§1.6: 404 as from 2.73", 400, 404),
    Allowed(("trace/level *NOPE*",), "status", "an unknown level is refused; Triton ignores it", 200, 400),
    Allowed(
        ("trace/level TIMESTAMPS", "trace/* [[]'5']"),
        "status",
        "a lone value and a list of one mean the same, as tritonclient's gRPC half has it",
        500,
        200,
    ),
    Allowed(
        ("trace/* '-?'", "trace/* '1.5'"),
        "status",
        "a number that does not fit is refused; Triton wraps or cuts it",
        200,
        400,
    ),
    Allowed(
        ("statistics/failures",),
        "body.model_stats.0.*",
        "Triton's Python backend counts a request it answers with an error as a success; here it is a failure",
    ),
    Allowed(("control/*", "failing_load/REST"), "status", "§0 no. 3: not ready is 503", 400, 503),
    Allowed(("control/*", "failing_load/REST"), "error form", "§1.3: readiness has KServe's body"),
    Allowed(("failing_load/REST",), "status", "§1.5: whatever does not load is 500", 400, 500),
    Allowed(
        ("failing_load/gRPC",), "status", "§1.5: whatever does not load is INTERNAL", "INVALID_ARGUMENT", "INTERNAL"
    ),
    Allowed(
        ("control/override", "grpc_control/override"),
        "body*.dynamic_batching",
        "§5.1: an ONNX model that may be batched is batched dynamically; a Python one is not unless it says so",
        "(absent)",
    ),
    Allowed(
        ("control/override", "grpc_control/override"),
        "body*.max_batch_size",
        "trap 48: a plain load re-reads the disk; Triton 2.51 keeps the override while the disk has not changed",
        16,
        8,
    ),
    Allowed(("control/unload dependents text",), "status", "§0 no. 1: mistyped; Triton ignores it", 200, 400),
    Allowed(("grpc_control/load empty name",), "status", "§1.5: as from 2.73", "INTERNAL", "INVALID_ARGUMENT"),
    Allowed(
        ("shared_memory/system *register*", "shared_memory/infer *"),
        "status",
        "§0 no. 14: off by default, 501",
        (200, 404, 500),
        501,
    ),
    Allowed((*HEALTH,), "body*", "§0 no. 2: health has a JSON body"),
    Allowed((*HEALTH,), "header.content-type", "§0 no. 2", *PLAIN),
    # --- shared memory of clients
    Allowed(("shm/*",), "status", "§0 no. 1, §1.7: mistyped, or a key that may not be opened", 500, 400),
    Allowed(
        ("shm/register a block again, within a page",),
        "status",
        "one block may have several regions, and they begin anywhere; Triton 2.51 maps a block once, and whole pages",
        (400, 500),  # it says either, for the same request
        200,
    ),
    Allowed(
        ("shm/read, offset at the end", "shm/read beyond the end", "shm/gRPC read beyond the end"),
        "status",
        "§1.7: a tensor lies within its region; Triton 2.51 counts the region's own offset as room",
        (200, "OK"),
        (400, "INVALID_ARGUMENT"),
    ),
    # --- sequences
    Allowed(
        ("sequence/* statistics",),
        "body.model_stats.0.*",
        "which requests of a stream meet in a batch depends on timing; the counts of requests and rows do not",
    ),
    Allowed(
        ("sequence/named*",),
        "*status",
        "Triton's Python backend cannot read the string of a correlation id that Triton gives it",
        400,
        200,
    ),
    # --- gRPC
    Allowed(("grpc_datatypes/* overflow",), "status", "§0 no. 16", "OK", "INVALID_ARGUMENT"),
    Allowed(("grpc_contents/outputs OUTPUT1,OUTPUT0*",), "body.*", "§0 no. 13: outputs in the order asked for"),
    Allowed(("grpc_contents/outputs OUTPUT0,OUTPUT0*",), "status", "§0 no. 15", "OK", "INVALID_ARGUMENT"),
    Allowed(
        ("grpc_contents/BYTES NUL and empty",), "status", "strings are UTF-8, as over HTTP", "OK", "INVALID_ARGUMENT"
    ),
    Allowed(
        ("grpc_parameters/timeout int",),
        "status",
        "a model without a queue policy: the caller's timeout is its deadline here, ignored there",
        "OK",
        "DEADLINE_EXCEEDED",
    ),
    Allowed(("grpc_parameters/sequence_id uint",), "status", "§2.3: uint64 is taken too", "INVALID_ARGUMENT", "OK"),
    Allowed(
        ("grpc_models/ensemble",), "body.parameters", "§1.8: request parameters are never echoed; the ensemble does"
    ),
    Allowed(
        ("grpc_bytes/*",),
        "status",
        "§0 no. 1: bytes that are no message are the client's",
        "INTERNAL",
        "INVALID_ARGUMENT",
    ),
    Allowed(("grpc_stream/garbage",), "body", "an error in the stream says what Triton passes over in silence"),
    Allowed(("grpc_settings/trace level nope",), "status", "an unknown level is refused", "OK", "INVALID_ARGUMENT"),
    Allowed(
        ("grpc_shared_memory/System *register*",),
        "status",
        "§0 no. 14: off by default",
        ("OK", "INTERNAL"),
        "UNIMPLEMENTED",
    ),
)
