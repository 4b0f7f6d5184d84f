"""What a caller gets where it asked for more than its rows of the outputs: the tensors of its answer, made here.

Both protocols encode from `answer_tensors` when a response form is not plain; a plain form they encode themselves,
from what they share per batch. Labels are the model owner's (`Scheduling.labels`). What is wanted in shared memory is
written there, and a tensor without data is left for the answer.
"""

from __future__ import annotations

from gateway.core import assembly
from gateway.core.batch import FinishedBatch
from gateway.core.classification import classify
from gateway.core.model import ModelSpec
from gateway.core.request import OutputTensor
from gateway.protocol.oip_memory import deliver
from gateway.protocol.oip_plan import ResponseForm


def answer_tensors(
    spec: ModelSpec, form: ResponseForm, batch: FinishedBatch, row: int, rows: int
) -> list[OutputTensor]:
    """The outputs of the request with `rows` rows from `row` on in `batch`, in the order of `form.outputs`.

    Raises:
        InvalidRequest: an answer cannot be made of this output.
        RegionFailed: an output cannot be put into the caller's shared memory.
    """
    tensors = []
    for place, index in enumerate(form.outputs):
        output: OutputTensor = batch.outputs[index]
        mine = assembly.slice_rows(output, row, rows) if spec.batched else output
        classes = form.classes[place] if form.classes else 0
        tensors.append(classify(mine, classes, labels_of(spec, output.name), spec.batched) if classes else mine)
    return deliver(form, tensors) if form.targets else tensors


def labels_of(spec: ModelSpec, name: str) -> tuple[str, ...]:
    """Classification labels of an output, by index; empty where the model has none."""
    for output, labels in spec.scheduling.labels:
        if output == name:
            return labels
    return ()
