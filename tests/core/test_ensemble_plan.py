"""Ensembles on paper: what holds together, what does not and how it is said, and which step may run when."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.ensemble_plan import EnsemblePlan, Progress, fit_shape, load_order, plan_ensemble
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.scheduling import EnsembleStep
from gateway.core.tensor import DATATYPE
from gateway.errors import ConfigError

FP32, INT32 = DATATYPE["FP32"], DATATYPE["INT32"]


def model(
    name: str, inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]], max_batch_size: int = 8
) -> ModelSpec:
    return ModelSpec(
        name, "1", "sha256:0", "onnxruntime_onnx",
        tuple(TensorSpec(label, FP32, dims) for label, dims in inputs.items()),
        tuple(TensorSpec(label, FP32, dims) for label, dims in outputs.items()),
        BatchPolicy(max_batch_size),
    )  # fmt: skip


def step(name: str, inputs: dict[str, str], outputs: dict[str, str]) -> EnsembleStep:
    return EnsembleStep(name, None, tuple(inputs.items()), tuple(outputs.items()))


def tensors(**dims: tuple[int, ...]) -> list[TensorSpec]:
    return [TensorSpec(name, FP32, of) for name, of in dims.items()]


A = model("a", {"x": (3,)}, {"y": (4,)})
B = model("b", {"u": (4,), "v": (3,)}, {"w": (2,)})
CHAIN = [
    (step("a", {"x": "IN"}, {"y": "mid"}), A),
    (step("b", {"u": "mid", "v": "IN"}, {"w": "OUT"}), B),
]


def plan(
    steps: list[tuple[EnsembleStep, ModelSpec]] = CHAIN,
    inputs: list[TensorSpec] | None = None,
    outputs: list[TensorSpec] | None = None,
    max_batch_size: int = 4,
) -> EnsemblePlan:
    return plan_ensemble(
        "e", max_batch_size, tensors(IN=(3,)) if inputs is None else inputs,
        tensors(OUT=(2,)) if outputs is None else outputs, steps,
    )  # fmt: skip


def faults(**kwargs: object) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(**kwargs)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_plan_speaks_of_places() -> None:
    made = plan()
    assert [(s.spec.name, s.inputs, s.outputs) for s in made.steps] == [
        ("a", ((0, "IN"),), ((0, "mid"),)),
        ("b", ((0, "mid"), (1, "IN")), ((0, "OUT"),)),
    ]
    assert made.readers == {"IN": (0, 1), "mid": (1,)}


def test_steps_may_stand_in_any_order() -> None:
    assert [s.spec.name for s in plan(CHAIN[::-1]).steps] == ["b", "a"]


def test_an_input_may_also_be_an_output() -> None:
    plan(outputs=tensors(OUT=(2,), IN=(3,)))


def test_wildcards_agree_with_anything() -> None:
    loose = model("a", {"x": (-1,)}, {"y": (-1,)})
    plan([(CHAIN[0][0], loose), CHAIN[1]])


WRONG = [
    ({"steps": []}, "it has no step"),
    ({"outputs": []}, "it has no output"),
    (
        {"max_batch_size": 16},
        "allows maximum batch size 16, but it contains model 'a' which only allows maximum batch size to be 8",
    ),
    ({"steps": [(step("a", {"z": "IN"}, {"y": "mid"}), A), CHAIN[1]]}, "maps the input 'z', but the model has ['x']"),
    ({"steps": [(step("a", {"z": "IN"}, {"y": "mid"}), A), CHAIN[1]]}, "leaves the input 'x' unmapped"),
    ({"steps": [(step("a", {"x": "IN"}, {"q": "mid"}), A), CHAIN[1]]}, "maps the output 'q', but the model has ['y']"),
    ({"steps": [(step("a", {}, {"y": "mid"}), A), CHAIN[1]]}, "step 'a' maps no input"),
    ({"steps": [(step("a", {"x": "IN"}, {}), A), CHAIN[1]]}, "step 'a' maps no output"),
    (
        {"steps": [(EnsembleStep("a", None, (("x", "IN"), ("x", "IN")), (("y", "mid"),)), A), CHAIN[1]]},
        "maps the input 'x' twice",
    ),
    ({"steps": [*CHAIN, (step("a", {"x": "IN"}, {"y": "mid"}), A)]}, "'mid' can appear in an output map only once"),
    ({"steps": [*CHAIN, (step("a", {"x": "IN"}, {"y": "IN"}), A)]}, "'IN' can appear in an output map only once"),
    ({"steps": CHAIN[1:]}, "tensor 'mid' is read by step 'b', but no step and no input writes it"),
    ({"outputs": tensors(NOPE=(2,))}, "tensor 'NOPE' is read by the ensemble's output, but no step"),
    (
        {"inputs": [TensorSpec("IN", INT32, (3,))]},
        "tensor 'IN': inconsistent data type: INT32 from the ensemble's input",
    ),
    ({"outputs": [TensorSpec("OUT", INT32, (2,))]}, "tensor 'OUT': inconsistent data type: FP32 from step 'b'"),
    ({"inputs": tensors(IN=(5,))}, "tensor 'IN': inconsistent shape: [5] from the ensemble's input, [3] for step 'a'"),
    ({"inputs": tensors(IN=(-1, 3))}, "tensor 'IN': inconsistent shape"),
    ({"inputs": tensors(IN=(3,), MORE=(3,))}, "tensor 'MORE' from the ensemble's input is read by no step"),
    ({"steps": [*CHAIN, (step("a", {"x": "IN"}, {"y": "end"}), A)]}, "tensor 'end' from step 'a' is read by no step"),
]


@pytest.mark.parametrize(("change", "said"), WRONG)
def test_what_does_not_hold_together_is_named(change: dict[str, object], said: str) -> None:
    text = faults(**change)
    assert said in text
    assert "ensemble 'e'" in text


def test_all_faults_come_at_once() -> None:
    text = faults(inputs=tensors(IN=(5,)), outputs=tensors(NOPE=(2,)), max_batch_size=9)
    for said in ("contains model 'a'", "contains model 'b'", "[3] for step 'a'", "[3] for step 'b'", "'NOPE'"):
        assert said in text


def test_a_circle_is_shown() -> None:
    round_trip = model("r", {"p": (1,), "q": (3,)}, {"s": (1,)})
    text = faults(
        steps=[
            *CHAIN,
            (step("r", {"p": "t2", "q": "IN"}, {"s": "t1"}), round_trip),
            (step("r2", {"p": "t1", "q": "IN"}, {"s": "t2"}), round_trip),
        ]
    )
    assert "go round in a circle" in text
    assert "'r'" in text
    assert "'r2'" in text


def test_optional_inputs_may_feed_optional_inputs() -> None:
    willing = replace(A, inputs=(TensorSpec("x", FP32, (3,)), TensorSpec("o", FP32, (1,), optional=True)))
    inputs = [TensorSpec("IN", FP32, (3,)), TensorSpec("MAYBE", FP32, (1,), optional=True)]
    plan([(step("a", {"x": "IN", "o": "MAYBE"}, {"y": "mid"}), willing), CHAIN[1]], inputs=inputs)
    plan([(step("a", {"x": "IN"}, {"y": "mid"}), willing), CHAIN[1]])


@pytest.mark.parametrize("dims", [(-1, 3), (3,)])
def test_an_ensemble_without_batches_may_hold_models_with_them(dims: tuple[int, ...]) -> None:
    plan(inputs=tensors(IN=dims), max_batch_size=0)


# -- shapes ----------------------------------------------------------------------------------------------------------

SHAPES = [
    ((5, 3), (3,), True, True, (5, 3)),
    ((5, 3), (4,), True, True, None),
    ((5, 3), (-1,), True, True, (5, 3)),
    ((5, 3), (-1, 3), True, True, None),  # rows never become a dimension of one row
    ((5, 3), (-1, 3), True, False, (1, 5, 3)),
    ((3,), (3,), True, False, (1, 3)),
    ((4, 3), (3,), True, False, (4, 3)),
    ((1, 3), (3,), False, True, (3,)),
    ((2, 3), (3,), False, True, None),
    ((2, 3), (-1, 3), False, True, (2, 3)),
    ((1, 3), (3,), False, False, None),
    ((), (), False, False, ()),
]


@pytest.mark.parametrize(("shape", "dims", "batched", "from_batched", "expected"), SHAPES)
def test_shapes_between_models_with_and_without_batches(
    shape: tuple[int, ...], dims: tuple[int, ...], batched: bool, from_batched: bool, expected: tuple[int, ...] | None
) -> None:
    assert fit_shape(shape, dims, batched=batched, from_batched=from_batched) == expected


# -- progress --------------------------------------------------------------------------------------------------------


def test_a_step_is_free_when_all_it_reads_is_there() -> None:
    progress = Progress(plan())
    assert progress.arrived(["IN"]) == [0]
    assert progress.started(0) == []  # IN is still read by b
    assert progress.arrived(["mid"]) == [1]
    assert sorted(progress.started(1)) == ["IN", "mid"]


def test_a_tensor_read_twice_by_a_step_counts_once() -> None:
    both = model("both", {"u": (4,), "v": (4,)}, {"w": (2,)})
    progress = Progress(plan([CHAIN[0], (step("both", {"u": "mid", "v": "mid"}, {"w": "OUT"}), both)]))
    assert progress.arrived(["IN"]) == [0]
    assert progress.arrived(["mid"]) == [1]


@given(seed=st.integers(0, 2**32), count=st.integers(1, 12))
def test_every_step_runs_once_and_never_before_what_it_reads(seed: int, count: int) -> None:
    rng = random.Random(seed)
    made = _random_plan(rng, count)
    progress = Progress(made)
    known = {"IN"}
    free = progress.arrived(["IN"])
    ran: list[int] = []
    released: list[str] = []
    while free:
        index = free.pop(rng.randrange(len(free)))
        assert made.steps[index].reads <= known
        assert not made.steps[index].reads & set(released)
        ran.append(index)
        released += progress.started(index)
        written = [tensor for _, tensor in made.steps[index].outputs]
        known.update(written)
        free += progress.arrived(written)
    assert sorted(ran) == list(range(count))
    assert sorted(released) == sorted(made.readers)


def _random_plan(rng: random.Random, count: int) -> EnsemblePlan:
    names = ["IN"]
    steps = []
    for index in range(count):
        reads = {f"i{place}": rng.choice(names) for place in range(rng.randint(1, 3))}
        spec = model(f"m{index}", dict.fromkeys(reads, (1,)), {"y": (1,)})
        steps.append((step(f"m{index}", reads, {"y": f"t{index}"}), spec))
        names.append(f"t{index}")
    rng.shuffle(steps)
    read = {tensor for one, _ in steps for _, tensor in one.input_map}
    unread = [name for name in names if name not in read]
    return plan_ensemble("e", 1, tensors(IN=(1,)), tensors(**dict.fromkeys(unread, (1,))), steps)


# -- order of loading ------------------------------------------------------------------------------------------------


def test_ensembles_are_loaded_behind_what_they_contain() -> None:
    steps_of = {"top": ["middle", "plain"], "middle": ["low", "plain"], "low": ["plain"], "lone": []}
    order = load_order(steps_of)
    assert sorted(order) == sorted(steps_of)
    assert order.index("low") < order.index("middle") < order.index("top")


def test_ensembles_that_contain_each_other_come_last() -> None:
    assert load_order({"a": ["b"], "b": ["a"], "self": ["self"], "fine": ["plain"]}) == ["fine", "a", "b", "self"]
