"""models.lock: what is written is what is read, nobody sees half of it, and what is not understood stays."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ConfigError
from gateway.registry.lock import MAX_BYTES, Locked, LockFile, text_of

A = "sha256:" + "a" * 64
B = "sha256:" + "b" * 64
ENTRY = Locked("models:/digits@champion", "models:/digits/3", "m-1", "3", "http://h:1", A, "2026-11-23T11:20:00Z")

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    lock = LockFile(tmp_path / "models.lock")
    assert lock.read() == {}
    assert lock.record(ENTRY)
    assert lock.read() == {ENTRY.reference: ENTRY}
    assert not lock.record(replace(ENTRY, resolved_at="2027-01-01T00:00:00Z")), "it means the same"
    assert lock.read()[ENTRY.reference].resolved_at == ENTRY.resolved_at
    assert lock.record(replace(ENTRY, digest=B))
    assert lock.read()[ENTRY.reference].digest == B


def test_the_file_reads_well_and_its_order_is_stable(tmp_path: Path) -> None:
    lock = LockFile(tmp_path / "models.lock")
    other = replace(ENTRY, reference="models:/aaa@x")
    lock.record(ENTRY)
    lock.record(other)
    first = lock.path.read_text()
    assert first.index("models:/aaa@x") < first.index("models:/digits@champion")
    assert '[[model]]\nreference = "models:/aaa@x"\nuri = "models:/digits/3"\n' in first
    lock.path.unlink()
    lock.record(other)
    lock.record(ENTRY)
    assert lock.path.read_text() == first
    assert [path.name for path in tmp_path.iterdir()] == ["models.lock"]


def test_what_an_operator_chose_stands_there_and_only_then(tmp_path: Path) -> None:
    lock = LockFile(tmp_path / "models.lock")
    lock.record(ENTRY)
    assert "instead_of" not in lock.path.read_text()
    chosen = replace(ENTRY, instead_of="m-4")
    assert lock.record(chosen), "the files are the same, the reason is not"
    assert lock.read()[ENTRY.reference] == chosen
    assert lock.record(ENTRY)
    assert lock.read()[ENTRY.reference] == ENTRY


@given(reference=texts, uri=texts, registry=st.one_of(st.just(""), texts))
def test_any_text_survives(reference: str, uri: str, registry: str) -> None:
    entry = Locked(reference, uri, "m-1", "3", registry, A, "now")
    lock = LockFile(Path("/nowhere/models.lock"))
    assert list(lock._parse(text_of([entry]).encode())) == [entry]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[model", "is not TOML"),
        ("x = 1", "something else"),
        ("[[model]]\nreference = 'a'", "exactly the keys"),
        ("model = 3", "something else"),
        ("model = [3]", "exactly the keys"),
        (text_of([replace(ENTRY, digest="sha256:short")]), "digest or version"),
        (text_of([replace(ENTRY, version="0")]), "digest or version"),
        (text_of([replace(ENTRY, uri="")]), "no text, or empty"),
        (text_of([ENTRY]) + 'instead_of = ""\n', "no text, or empty"),
        (text_of([ENTRY]) + "instead_of = 4\n", "no text, or empty"),
        ("#" * (MAX_BYTES + 1), "larger than"),
        ("a = [", "is not TOML"),
    ],
)
def test_a_file_that_is_not_understood_is_told_and_never_overwritten(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "models.lock"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        LockFile(path).record(ENTRY)
    assert "restore it, or remove it and run gateway lock" in str(caught.value) or said == "larger than"
    assert path.read_text() == text


def test_bytes_that_are_no_utf8_are_told(tmp_path: Path) -> None:
    (tmp_path / "models.lock").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        LockFile(tmp_path / "models.lock").read()


def test_several_change_at_once_and_what_is_gone_goes(tmp_path: Path) -> None:
    lock = LockFile(tmp_path / "models.lock")
    lock.record(ENTRY)
    new = replace(ENTRY, reference="models:/new@x")
    assert lock.update({new.reference: new}, [ENTRY.reference, "never there"]) == [new.reference, ENTRY.reference]
    assert lock.read() == {new.reference: new}


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from gateway.registry.lock import Locked, LockFile\n"
        "lock = LockFile(Path(sys.argv[1]))\n"
        "for i in range(25): lock.record(Locked(f'{sys.argv[2]}-{i}', 'u', 'm', '1', '', 'sha256:' + 'a' * 64, 'now'))"
    )
    path = str(tmp_path / "models.lock")
    writers = [subprocess.Popen([sys.executable, "-c", script, path, name]) for name in ("a", "b", "c")]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert len(LockFile(Path(path)).read()) == 75
