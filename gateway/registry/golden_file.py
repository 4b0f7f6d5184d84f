"""Files of golden inputs: where one lies, and what must be in it whatever the model is.

The file is a JSON list. An item is an OIP inference request whose `outputs` are the ones expected, as OIP answers have
them:

    [{"inputs":  [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0.1, 0.2, 0.3, 0.4]}],
      "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [0.7, 0.3]}]}]

Whether the items are requests to the model, and how it answers them, is found out when it is loaded
(loading_golden.py). Rule: size and number are bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.errors import ConfigError

GOLDEN_FILE: Final = "golden.json"
MAX_BYTES: Final = 16 * 1024 * 1024
MAX_ITEMS: Final = 1000
RTOL: Final = 1e-5
ATOL: Final = 1e-6


@dataclass(frozen=True, slots=True)
class GoldenFile:
    """The content of one, and how far answers may lie from it. `place`: where it was found, for people."""

    place: str
    content: bytes
    rtol: float = RTOL
    atol: float = ATOL


def read_golden(
    stated: Path | None, name: str | None, directory: Path, rtol: float = RTOL, atol: float = ATOL
) -> GoldenFile | None:
    """The golden inputs of a version; None: there are none. Blocks on the disk.

    Args:
        stated: the file that the configuration names; None: it names none.
        name: what to look for in the version's directory if `stated` is not there.
        directory: the version's directory, or its one file.

    Raises:
        ConfigError: a stated file is in neither place; one that is there cannot be read or is too large.
    """
    places = [stated] if stated is not None else []
    if directory.is_dir():
        places.append(directory / (name or GOLDEN_FILE))
    for place in places:
        try:
            if not place.is_file():
                continue
            if place is not stated and not place.resolve().is_relative_to(directory.resolve()):
                raise ConfigError(f"{place}: this link leaves the version's directory; put the file itself there")
            with place.open("rb") as stream:
                content = stream.read(MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"{place} cannot be read: {error.strerror}; check its permissions") from None
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{place} is larger than {MAX_BYTES} bytes; keep fewer golden inputs")
        return GoldenFile(str(place), content, rtol, atol)
    if stated is not None:
        raise ConfigError(
            f"there are no golden inputs: neither {stated} nor a file {name or GOLDEN_FILE} with the model; put one "
            "there, or remove `golden` from the configuration"
        )
    return None


def golden_requests(golden: GoldenFile) -> list[Mapping[str, Any]]:
    """The items of a file, each with `inputs` and `outputs` that are lists, the latter not empty.

    Raises:
        ConfigError: the file is no list of such items; the text does not name it.
    """
    try:
        document = orjson.loads(golden.content)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"this is not JSON: {error}") from None
    if not isinstance(document, list) or not document:
        raise ConfigError('write a list of requests: [{"inputs": […], "outputs": […]}, …]')
    if len(document) > MAX_ITEMS:
        raise ConfigError(f"at most {MAX_ITEMS} requests can be checked, there are {len(document)}")
    for number, item in enumerate(document, start=1):
        if not isinstance(item, dict) or not isinstance(item.get("inputs"), list):
            raise ConfigError(f"item {number} is no request: it needs 'inputs' and 'outputs'")
        if not isinstance(item.get("outputs"), list) or not item["outputs"]:
            raise ConfigError(f"item {number} needs the outputs that are right, as 'outputs'")
    return document
