"""One exported file: what it costs to make. What stands in it: test_exporting.py."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

from gateway.inference_log.exported_file import _digest_of

FILE_BYTES = 64 * 1024 * 1024


def test_the_digest_of_a_long_file_is_made_without_holding_the_file(tmp_path: Path) -> None:
    path = tmp_path / "long"
    with path.open("wb") as stream:
        stream.truncate(FILE_BYTES)
    tracemalloc.start()
    try:
        digest = _digest_of(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert digest == hashlib.sha256(bytes(FILE_BYTES)).hexdigest()
    assert peak < FILE_BYTES // 16
