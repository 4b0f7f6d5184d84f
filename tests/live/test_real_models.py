"""Real models over the served API: one made by others (file types, from the PyPI package magika), and our digits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import magika
import numpy as np
import pytest

from gateway import demo
from tests.live.alone import Alone, check
from tests.live.gateway_process import GatewayProcess, gateway
from tests.live.in_process import gather_all
from tests.live.oip_wire import Request, Tensor, connect, decode

MAGIKA = next(iter(sorted((Path(magika.__file__).parent / "models").glob("*/model.onnx"))))
ROOT = Path(demo.__file__).parents[2]
DEMO = ROOT / "gateway" / "demo"
PADDING = 256
WINDOW = 1024
BLOCK = 4096


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    config = tmp_path_factory.mktemp("real") / "gateway.yaml"
    config.write_text(
        f"server: {{workers: 2}}\nmodels:\n  - {{source: {MAGIKA}, name: magika}}\n  - {{source: {DEMO}/models}}\n"
    )
    with gateway("serve", "-c", str(config)) as process:
        yield process


# -- a model made by others ------------------------------------------------------------------------------------------


def features(content: bytes) -> list[int]:
    """What the model wants to see of a file: its first and last 1024 bytes that are not white space."""
    first = list(content[:BLOCK].lstrip()[:WINDOW])
    last = list(content[-BLOCK:].rstrip()[-WINDOW:])
    return first + [PADDING] * (WINDOW - len(first)) + [PADDING] * (WINDOW - len(last)) + last


def files() -> list[bytes]:
    """Files of this repository, long enough for the model to be asked at all."""
    names = ["pyproject.toml", "Makefile", "LICENSE", "README.md", "gateway/app.py", "gateway/py.typed"]
    paths = [ROOT / name for name in names] + sorted((ROOT / "gateway").glob("*/*.py"))
    contents = [path.read_bytes() for path in paths]
    return [content for content in contents if len(content) > 200]


def magika_request(contents: list[bytes], binary: bool, name: str) -> Request:
    rows = np.array([features(content) for content in contents], np.int32)
    return Request("magika", [Tensor("bytes", "INT32", rows, binary)], [("target_label", binary)], request_id=name)


def test_a_model_of_others_is_proven_batchable(served: GatewayProcess) -> None:
    listed = {model["name"]: model for model in json.loads(served.operations("/api/models"))}
    assert listed["magika"]["state"] == "READY"
    assert listed["magika"]["max_batch_size"] == 64
    assert "same answers alone and together" in listed["magika"]["batching"]
    assert {backend["name"] for backend in listed["magika"]["backends"]} == {"onnx-1", "onnx-2"}


def test_it_knows_the_files_that_its_own_package_knows(served: GatewayProcess) -> None:
    labels = json.loads((MAGIKA.parent / "config.min.json").read_text())["target_labels_space"]
    contents = files()
    answer = ask(served, magika_request(contents, True, "all"))
    scores = decode(answer)["target_label"][1]
    own = magika.Magika()
    expected = [str(own.identify_bytes(content).prediction.dl.label) for content in contents]
    assert [labels[row.argmax()] for row in scores] == expected
    assert {"python", "toml", "makefile"} <= set(expected)


def test_mixed_requests_to_it_are_answered_as_if_alone(served: GatewayProcess) -> None:
    alone = Alone(str(MAGIKA))
    contents = files()
    before = served.metric("nv_inference_exec_count", model="magika")

    async def client(number: int) -> int:
        rng = np.random.default_rng(number)
        async with connect(served.port) as connection:
            for turn in range(3):
                chosen = [contents[at] for at in rng.integers(0, len(contents), int(rng.integers(1, 5)))]
                request = magika_request(chosen, bool(rng.integers(2)), f"{number}-{turn}")
                check(request, await connection.ask(request), alone, 1e-5)
        return 3

    async def story() -> int:
        return sum(await gather_all([client(number) for number in range(16)]))

    answered = asyncio.run(story())
    assert served.metric("nv_inference_exec_count", model="magika") - before < answered, "nothing was batched"


# -- our own ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "row"), [("digits", (64,)), ("digits_cnn", (1, 8, 8))])
@pytest.mark.parametrize("binary", [False, True])
def test_digits_never_seen_in_training_are_read(
    served: GatewayProcess, model: str, row: tuple[int, ...], binary: bool
) -> None:
    """Every held-out digit as a request of its own, all at once on a few connections."""
    held_out = json.loads((DEMO / "samples" / "held_out.json").read_text())
    pixels = np.array(held_out["pixels"], np.float32).reshape(-1, 1, *row)
    alone = Alone(str(DEMO / "models" / model / "1" / "model.onnx"))

    async def client(numbers: range) -> list[int]:
        labels = []
        async with connect(served.port) as connection:
            requests = [request(number) for number in numbers]
            await connection.send(b"".join([request.encode() for request in requests]))
            for each in requests:
                answer = await connection.receive()
                check(each, answer, alone, 1e-5)
                labels.append(int(decode(answer)["label"][1][0]))
        return labels

    def request(number: int) -> Request:
        return Request(model, [Tensor("image", "FP32", pixels[number], binary)], request_id=str(number))

    async def story() -> dict[int, int]:
        parts = [range(start, len(pixels), 12) for start in range(12)]
        labels = await gather_all([client(part) for part in parts])
        return {
            number: label
            for part, own in zip(parts, labels, strict=True)
            for number, label in zip(part, own, strict=True)
        }

    read = asyncio.run(story())
    assert len(read) == len(held_out["labels"])
    right = sum(read[number] == label for number, label in enumerate(held_out["labels"]))
    assert right / len(read) >= 0.95


@pytest.mark.parametrize("model", ["digits", "digits_cnn"])
def test_sample_requests_get_their_stored_answers(served: GatewayProcess, model: str) -> None:
    sample: dict[str, Any] = json.loads((DEMO / "samples" / f"{model}.json").read_text())
    status, _, answer = served.infer(model, sample["request"])
    assert status == 200
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert outputs["label"]["data"] == sample["expected"]["label"]
    expected = np.array(sample["expected"]["probabilities"])
    np.testing.assert_allclose(np.array(outputs["probabilities"]["data"]).reshape(expected.shape), expected, atol=1e-5)


def ask(served: GatewayProcess, request: Request) -> Any:
    async def story() -> Any:
        async with connect(served.port) as connection:
            return await connection.ask(request)

    return asyncio.run(story())
