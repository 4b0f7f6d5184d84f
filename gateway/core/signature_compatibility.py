"""Whether one version of a model may answer the clients of another: a canary, a shadow, or what a swap puts in its
place.

The rule: whatever a client of the version that serves may send stays valid, and whatever that client reads in the
answer is still there and means the same. Nothing more is asked of the candidate:
  * inputs are compared as they travel, with the batch dimension. Each must exist with the same datatype and take every
    shape that is taken now: a dimension that clients may choose may not become fixed, a fixed one may become free. A
    further input is fine if it is optional; one that is optional must stay so;
  * outputs must exist with the same datatype and rank. A dimension that is stated on both sides must be equal; one that
    either side leaves open cannot be judged from signatures (that is what golden inputs and shadows are for). Further
    outputs are fine, but come last: a client that names none gets all of them, in order;
  * a request may have as many rows as now, and models with sequences and without are not exchanged.
Weights, labels and everything about speed are nobody's business here.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.core.model import ModelSpec, TensorSpec


def incompatibilities(serving: ModelSpec, candidate: ModelSpec) -> tuple[str, ...]:
    """Why clients of `serving` cannot be answered by `candidate`, one text for each reason; empty where they can."""
    return (
        *_inputs(serving, candidate),
        *_outputs(serving, candidate),
        *_rows(serving, candidate),
        *_sequences(serving, candidate),
    )


def _inputs(serving: ModelSpec, candidate: ModelSpec) -> list[str]:
    known = {tensor.name: tensor for tensor in serving.inputs}
    offered = {tensor.name: tensor for tensor in candidate.inputs}
    faults = [
        f"it needs an input '{name}', which clients do not send; make it optional"
        for name, tensor in offered.items()
        if name not in known and not tensor.optional
    ]
    for name, now in known.items():
        then = offered.get(name)
        if then is None:
            faults.append(f"it has no input '{name}', which clients send; it has {sorted(offered)}")
            continue
        if then.datatype is not now.datatype:
            faults.append(f"its input '{name}' is {then.datatype.name}, clients send {now.datatype.name}")
        if now.optional and not then.optional:
            faults.append(f"its input '{name}' is required, clients may leave it out")
        taken, sent = _shape(candidate, then), _shape(serving, now)
        if len(taken) != len(sent) or not all(a in (-1, b) for a, b in zip(taken, sent, strict=True)):
            faults.append(f"its input '{name}' takes shape {list(taken)}, clients send {list(sent)}")
    return faults


def _outputs(serving: ModelSpec, candidate: ModelSpec) -> list[str]:
    faults = []
    offered = {tensor.name: tensor for tensor in candidate.outputs}
    for now in serving.outputs:
        then = offered.get(now.name)
        if then is None:
            faults.append(f"it has no output '{now.name}', which clients read; it has {sorted(offered)}")
            continue
        if then.datatype is not now.datatype:
            faults.append(f"its output '{now.name}' is {then.datatype.name}, clients read {now.datatype.name}")
        given, read = _shape(candidate, then), _shape(serving, now)
        if len(given) != len(read) or not all(-1 in (a, b) or a == b for a, b in zip(given, read, strict=True)):
            faults.append(f"its output '{now.name}' has shape {list(given)}, clients read {list(read)}")
    names = _names(serving.outputs)
    first = [name for name in _names(candidate.outputs) if name in names]
    if not faults and (first != names or _names(candidate.outputs)[: len(names)] != names):
        faults.append(f"its outputs come in the order {_names(candidate.outputs)}, clients read {names}")
    return faults


def _rows(serving: ModelSpec, candidate: ModelSpec) -> list[str]:
    if not (serving.batched and candidate.batched) or candidate.policy.request_rows >= serving.policy.request_rows:
        return []
    now, then = serving.policy.request_rows, candidate.policy.request_rows
    return [f"it takes requests of up to {then} rows, clients send up to {now}"]


def _sequences(serving: ModelSpec, candidate: ModelSpec) -> list[str]:
    now, then = serving.scheduling.sequence is not None, candidate.scheduling.sequence is not None
    if now == then:
        return []
    return ["it needs sequences, which clients do not send" if then else "it knows no sequences, which clients send"]


def _shape(spec: ModelSpec, tensor: TensorSpec) -> tuple[int, ...]:
    """As clients see it: with the batch dimension."""
    return (-1, *tensor.dims) if spec.batched else tensor.dims


def _names(tensors: Sequence[TensorSpec]) -> list[str]:
    return [tensor.name for tensor in tensors]
