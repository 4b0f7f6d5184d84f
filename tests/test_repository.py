"""What the repository may not hold: paths of one machine, files nobody should commit, whatever git tracks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
MACHINE_PATH = re.compile(rb"/(work|root)/[\w.]|/tmp/[\w.]+_jobs", re.ASCII)
LARGEST_BYTES = 1024 * 1024
GENERATED = re.compile(r"(^|/)(__pycache__|\.venv|\.bench|\.hypothesis)/|\.pyc$|\.egg-info/|\.whl$")
"""Built or downloaded by a command of this repository, never committed."""


def tracked(root: Path) -> list[str]:
    """Paths git tracks, or would add, below `root`; skips the test where there is no git."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            check=True,
            capture_output=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [name for name in listed.decode().split("\0") if name and (root / name).is_file()]


def faults(root: Path, names: list[str]) -> list[str]:
    found = []
    for name in names:
        content = (root / name).read_bytes()
        if match := MACHINE_PATH.search(content):
            line = content.count(b"\n", 0, match.start()) + 1
            found.append(f"{name}:{line}: path of one machine: {match.group().decode()}")
        if len(content) > LARGEST_BYTES:
            found.append(f"{name}: {len(content)} bytes; larger than {LARGEST_BYTES}")
        if GENERATED.search(name):
            found.append(f"{name}: generated, belongs in .gitignore")
    return found


def test_no_tracked_file_names_this_machine_or_was_generated() -> None:
    names = tracked(REPOSITORY)
    assert "pyproject.toml" in names
    found = faults(REPOSITORY, names)
    assert not found, "\n" + "\n".join(found)


def test_bundled_models_are_tracked() -> None:
    wanted = {f"gateway/demo/models/{name}/1/model.onnx" for name in ("digits", "digits_cnn")}
    assert wanted <= set(tracked(REPOSITORY))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.md", b"one\nsee /" + b"work/main/x", "a.md:2: path of one machine"),
        ("b.py", b"'/" + b"root/.pyenv'", "path of one machine"),
        ("c.txt", b"log in /tmp/" + b"bash_jobs/3", "path of one machine"),
        ("d.bin", b"0" * (LARGEST_BYTES + 1), "larger than"),
        ("x/__pycache__/y.txt", b"", "generated"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    found = faults(tmp_path, [name])
    assert len(found) == 1
    assert expected in found[0]
    path.write_bytes(b"see /usr/share and https://example.org/homework/x")
    if name == "a.md":
        assert faults(tmp_path, [name]) == []
