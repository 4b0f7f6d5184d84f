"""`make test` and `make demo` prepare themselves once, say what is missing, and run what the README says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", "-C", str(REPOSITORY), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """An environment that looks installed: pip is there and both stamps are newer than pyproject.toml."""
    (tmp_path / "bin").mkdir()
    for name in ("bin/pip", ".installed", ".installed-test"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(("target", "runs"), [("test", 'pytest -m "not slow"'), ("demo", "gateway demo")])
def test_a_second_run_installs_nothing(prepared: Path, target: str, runs: str) -> None:
    planned = make("-n", target, f"VENV={prepared}").stdout
    assert runs in planned
    assert "pip install" not in planned


@pytest.mark.parametrize(("target", "what"), [("test", "-e '.[test]'"), ("demo", "-e .")])
def test_a_changed_dependency_installs_again(prepared: Path, target: str, what: str) -> None:
    for stamp in (".installed", ".installed-test"):
        os.utime(prepared / stamp, (0, 0))
    planned = make("-n", target, f"VENV={prepared}").stdout
    assert f"pip install --quiet --disable-pip-version-check {what}\n" in planned
    assert "-m venv" not in planned


def test_a_fresh_clone_makes_its_environment(tmp_path: Path) -> None:
    assert f"-m venv {tmp_path / 'new'}" in make("-n", "test", f"VENV={tmp_path / 'new'}").stdout


def test_an_old_python_is_named(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\necho "Python 3.9.2"\ncase "$*" in *version_info*) exit 1;; esac\n')
    old.chmod(0o755)
    done = make("test", f"VENV={tmp_path / 'new'}", f"PYTHON={old}")
    assert done.returncode != 0
    assert "Python 3.9.2 is too old, 3.11 or newer is needed" in done.stdout
    assert not (tmp_path / "new").exists()


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    done = make("test", f"VENV={tmp_path / 'new'}", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert "no-such-python not found: install Python 3.11 or newer" in done.stdout


def test_ci_runs_lint_and_both_suites() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert script.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script
    commands = [line.strip().removeprefix("suite ") for line in script.splitlines()]
    assert all(f"make {target}" in commands for target in ("lint", "test"))
    # The slow suite comes in two parts: what the first leaves out is what the second runs.
    assert """make test-slow ARGS="$(printf -- '--ignore=%s ' $FOREIGN)\"""" in commands
    assert any(line.startswith('make test-slow ARGS="$FOREIGN" || ') for line in commands)
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize(
    ("printed", "alone", "green"),
    [
        ("FAILED tests/a.py::test_b[x] - assert 1 == 2", 0, True),
        ("FAILED tests/a.py::test_b[x] - assert 1 == 2", 1, False),
        ("FAILED tests/a.py::test_b - x\\nFAILED a.py::c\\nFAILED a.py::d\\nERROR a.py::e", 0, False),
        ("FAILED tests/a.py::test_b - x\\n!!!!!!! Interrupted: 1 error !!!!!!!", 0, False),
        ("make: *** [test] Error 1", 0, False),
    ],
    ids=["passes alone", "fails alone", "too many", "broken off", "nothing named"],
)
def test_ci_plays_few_failed_tests_once_more(tmp_path: Path, printed: str, alone: int, green: bool) -> None:
    script = (REPOSITORY / ".ci" / "run").read_text()
    functions = script[script.index("step()") : script.index("# Clients, servers and tools")]
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >played\nexit {alone}\n')
    python.chmod(0o755)
    code = f"set -euo pipefail\n{functions}\nfailing() {{ printf '{printed}\\n'; return 1; }}\nsuite failing\n"
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is green, done.stdout + done.stderr
    played = tmp_path / "played"
    assert played.is_file() == ("once more, alone" in done.stdout)
    if green:
        assert played.read_text() == "-m pytest tests/a.py::test_b[x]\n"
