"""What a directory without an ONNX model holds instead, and how its owner makes an ONNX model of it.

Decides from names alone; nothing is opened. A pickle is a program: it runs when it is read, so no file of these kinds
is ever opened in the gateway's own processes (`gateway convert` reads one in a throw-away process, when asked to).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Final

_CONVERT: Final = (
    "pickles are programs and are never loaded; convert it where you trust it: gateway convert {name} model.onnx "
    "--i-trust-this-pickle, or with skl2onnx"
)
_TORCH: Final = "PyTorch files are not loaded; export the model with torch.onnx.export"
_KERAS: Final = "TensorFlow and Keras files are not loaded; export the model with tf2onnx"
_WEIGHTS: Final = "it holds weights without a graph; export the whole model with torch.onnx.export or optimum"
_HINTS: Final[dict[str, str]] = {
    ".pkl": _CONVERT,
    ".pickle": _CONVERT,
    ".joblib": _CONVERT,
    ".skops": "skops files are not loaded; convert the model with skl2onnx",
    ".pt": _TORCH,
    ".pth": _TORCH,
    ".ckpt": _TORCH,
    ".h5": _KERAS,
    ".keras": _KERAS,
    ".pb": _KERAS,
    ".tflite": _KERAS,
    ".safetensors": _WEIGHTS,
    ".gguf": _WEIGHTS,
}
"""By suffix. The first one in this order that is there speaks: what is a whole model before what may be a part."""


def hint(names: Iterable[str]) -> str:
    """What to do about files that are no ONNX model, for the end of a refusal; empty if nothing is known of them.

    `names`: paths or names of files, in any order.
    """
    by_suffix: dict[str, str] = {}
    for name in sorted(names, reverse=True):
        by_suffix[PurePosixPath(name).suffix.lower()] = name
    for suffix, text in _HINTS.items():
        if suffix in by_suffix:
            found = shown(by_suffix[suffix])
            return f"it holds {found}: {text.format(name=found)}"
    return ""


def advice(name: str) -> str:
    """What to do about this one file, which is no ONNX model; empty if nothing is known of its kind."""
    return _HINTS.get(PurePosixPath(name).suffix.lower(), "").format(name=shown(name))


def shown(name: str) -> str:
    """A foreign name, fit for a line of text: printable, and at most 100 characters."""
    text = "".join(character if character.isprintable() else "?" for character in name)
    return text if len(text) <= 100 else text[:99] + "…"
