"""Requests with tensors → flat tables: one line per row of a request, one column per feature.

Decides the columns. An input of one value per row keeps its name, one of k values becomes `name_0 … name_{k-1}`, unless
names are given (by the caller, or by the signature that the model's registry states). Of the outputs, three columns are
made for monitoring tools:

* `prediction`: the output named by the caller; else one called as below; else the only output of one value per row;
  else the index of the greatest probability.
* `prediction_probability`: of two classes that of the second; of k classes `prediction_probability_0 …`. The output
  named by the caller; else one called as below; else the only floating-point output of k > 1 values per row, if in
  every row of the first request they lie in [0, 1] and add up to 1. Scores that are no probabilities are not called so.
* other outputs become columns like inputs do.

Where each column came from is part of the result (`Plan.origins`), because names were chosen here that the model does
not have. Pure. Rules: only tensors that were kept whole; a request that does not fit the plan made from the first one
is left out and counted, never bent to fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gateway.core.tensor import element_count
from gateway.inference_log.rendering import values_of

MAX_FEATURES: Final = 4096
"""Values per row of one tensor; a picture is not a table."""
PREDICTIONS: Final = ("prediction", "predict", "predictions", "label", "output_label", "class", "variable")
PROBABILITIES: Final = (
    "prediction_probability",
    "predict_proba",
    "probabilities",
    "probability",
    "output_probability",
    "proba",
)
TOLERANCE: Final = 1e-3

Values = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Roles:
    """What the caller says about columns."""

    features: tuple[str, ...] = ()
    """Names of the columns of all inputs together, in order."""
    prediction: str | None = None
    probability: str | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """One tensor and the columns it becomes."""

    tensor: str
    width: int
    columns: tuple[str, ...]
    """Empty: it is read for `prediction` only."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How every request of one model version is flattened."""

    inputs: tuple[Cut, ...]
    outputs: tuple[Cut, ...]
    features: tuple[str, ...]
    probabilities: tuple[str, ...]
    classes: int
    """How many classes the probabilities are of; 0: there are none."""
    argmax: str | None
    """Output of which the greatest value's index is `prediction`."""
    origins: dict[str, str] = field(default_factory=dict)
    """Column → what it is, in words."""

    @property
    def has_prediction(self) -> bool:
        return "prediction" in self.origins


class Unfit(ValueError):
    """A request that cannot be flattened; the text says why."""


def rows_of(request: Mapping[str, Any]) -> dict[str, Values]:
    """A request's tensors by name, each as [rows, values per row]; inputs as `in.<name>`, outputs as `out.<name>`.

    Raises:
        Unfit: a tensor was not kept whole, or they disagree about the number of rows.
    """
    found: dict[str, Values] = {}
    rows: int | None = None
    for prefix, tensors in (("in.", request["inputs"]), ("out.", request["outputs"])):
        for tensor in tensors or ():
            values = values_of(tensor)
            if values is None or tensor["policy"] != "keep":
                raise Unfit(f"{tensor['name']} was not kept")
            array = _array(values)
            shape = [int(dim) for dim in tensor["shape"]]
            first = shape[0] if shape else 1
            if element_count(shape) != array.size or (rows is not None and first != rows):
                raise Unfit(f"{tensor['name']} has another number of rows than the others")
            rows = first
            found[prefix + tensor["name"]] = array.reshape(first, -1) if first else array.reshape(0, 1)
    if not rows:
        raise Unfit("it has no rows")
    return found


def _array(values: npt.NDArray[Any] | list[bytes]) -> Values:
    if isinstance(values, list):
        return np.array([element.decode(errors="backslashreplace") for element in values], object)
    return values


def plan_of(tensors: Mapping[str, Values], roles: Roles) -> Plan:
    """The plan for all requests like this one.

    Raises:
        Unfit: it is too wide for a table, or does not have what the caller named.
    """
    inputs = [(name[3:], array) for name, array in tensors.items() if name.startswith("in.")]
    outputs = [(name[4:], array) for name, array in tensors.items() if name.startswith("out.")]
    for name, array in (*inputs, *outputs):
        if array.shape[1] > MAX_FEATURES:
            raise Unfit(f"{name} has {array.shape[1]} values per row, more than {MAX_FEATURES}")
    origins: dict[str, str] = {}
    cuts = _input_cuts(inputs, roles.features, origins)
    features = tuple(column for cut in cuts for column in cut.columns)
    prediction, probability = _prediction(outputs, roles), _probability(outputs, roles)
    made = [_output_cut(name, array, prediction, probability, origins) for name, array in outputs]
    argmax = None
    if prediction is None and probability is not None:
        argmax = probability
        origins["prediction"] = f"index of the greatest value of output {probability}"
    classes = dict(outputs)[probability].shape[1] if probability is not None else 0
    probabilities = tuple(column for column in origins if column.startswith("prediction_probability"))
    return Plan(tuple(cuts), tuple(made), features, probabilities, max(classes, 2) if classes else 0, argmax, origins)


def _input_cuts(inputs: Sequence[tuple[str, Values]], names: tuple[str, ...], origins: dict[str, str]) -> list[Cut]:
    total = sum(array.shape[1] for _, array in inputs)
    if names and len(names) != total:
        raise Unfit(f"{len(names)} names were given for {total} columns")
    given = iter(names)
    cuts = []
    for name, array in inputs:
        columns = tuple(next(given) for _ in range(array.shape[1])) if names else _columns(name, array.shape[1])
        for index, column in enumerate(columns):
            _claim(origins, column, f"input {name}[{index}]")
        cuts.append(Cut(name, array.shape[1], columns))
    return cuts


def _columns(name: str, width: int) -> tuple[str, ...]:
    return (name,) if width == 1 else tuple(f"{name}_{index}" for index in range(width))


def _claim(origins: dict[str, str], column: str, origin: str) -> None:
    if column in origins or column in RESERVED:
        raise Unfit(f"two columns would be called {column}; name the features")
    origins[column] = origin


RESERVED: Final = frozenset(
    ("request_id", "row", "timestamp", "model_version", "digest", "variant", "target", "human_override")
)
"""Columns that every export has besides."""


def _output_cut(
    name: str, array: Values, prediction: str | None, probability: str | None, origins: dict[str, str]
) -> Cut:
    width = array.shape[1]
    if name == prediction:
        columns: tuple[str, ...] = ("prediction",)
    elif name == probability:
        columns = ("prediction_probability",) if width <= 2 else _columns("prediction_probability", width)
    else:
        taken = origins.keys() | RESERVED | {"prediction"}
        columns = tuple(c if c not in taken else f"output_{c}" for c in _columns(name, width))
    for index, column in enumerate(columns):
        which = 1 if name == probability and width == 2 else index
        _claim(origins, column, f"output {name}[{which}]")
    return Cut(name, width, columns)


def _prediction(outputs: Sequence[tuple[str, Values]], roles: Roles) -> str | None:
    widths = {name: array.shape[1] for name, array in outputs}
    if roles.prediction is not None:
        if widths.get(roles.prediction) != 1:
            raise Unfit(f"there is no output {roles.prediction} of one value per row")
        return roles.prediction
    named = [name for name in widths if name.lower() in PREDICTIONS and widths[name] == 1]
    single = [name for name, width in widths.items() if width == 1 and name != roles.probability]
    return named[0] if named else single[0] if len(single) == 1 else None


def _probability(outputs: Sequence[tuple[str, Values]], roles: Roles) -> str | None:
    numbers = {name: array for name, array in outputs if array.dtype.kind == "f"}
    if roles.probability is not None:
        if roles.probability not in numbers:
            raise Unfit(f"there is no output {roles.probability} of floating-point numbers")
        return roles.probability
    named = [name for name in numbers if name.lower() in PROBABILITIES]
    if named:
        return named[0]
    wide = [name for name, array in numbers.items() if array.shape[1] > 1 and name != roles.prediction]
    return wide[0] if len(wide) == 1 and _are_probabilities(numbers[wide[0]]) else None


def _are_probabilities(array: Values) -> bool:
    sums = array.sum(axis=1, dtype=np.float64)
    return bool((array >= 0).all() and (array <= 1 + TOLERANCE).all() and (np.abs(sums - 1) < TOLERANCE).all())


def flatten(tensors: Mapping[str, Values], plan: Plan) -> dict[str, Values]:
    """One request's columns, all of the same length, in the order of `plan.origins`.

    Raises:
        Unfit: it does not fit the plan.
    """
    expected = {f"in.{cut.tensor}" for cut in plan.inputs} | {f"out.{cut.tensor}" for cut in plan.outputs}
    if tensors.keys() != expected:
        raise Unfit("it has other tensors than the first request")
    found: dict[str, Values] = {}
    for prefix, cuts in (("in.", plan.inputs), ("out.", plan.outputs)):
        for cut in cuts:
            array = tensors[prefix + cut.tensor]
            if array.shape[1] != cut.width:
                raise Unfit(f"{cut.tensor} has another width than in the first request")
            offset = (
                cut.width - len(cut.columns) if cut.width == 2 and cut.columns == ("prediction_probability",) else 0
            )
            for index, column in enumerate(cut.columns):
                found[column] = array[:, index + offset]
    if plan.argmax is not None:
        found["prediction"] = tensors[f"out.{plan.argmax}"].argmax(axis=1)
    return found
