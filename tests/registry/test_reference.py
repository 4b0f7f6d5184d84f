"""Which kind of source a text names, and which names a model may have."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.registry.reference import (
    DirectorySource,
    ModelFileSource,
    OipServerSource,
    RegistrySource,
    Source,
    name_fault,
    parse,
    unservable,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models", DirectorySource("models", Path("models"))),
        ("./m/digits.onnx", ModelFileSource("./m/digits.onnx", Path("m/digits.onnx"))),
        ("/abs/m", DirectorySource("/abs/m", Path("/abs/m"))),
        ("a:b", DirectorySource("a:b", Path("a:b"))),
        ("http://h:8000", OipServerSource("http://h:8000")),
        ("HTTPS://h", OipServerSource("HTTPS://h")),
        ("grpc://h:8001", OipServerSource("grpc://h:8001")),
        ("models:/digits@champion", RegistrySource("models:/digits@champion")),
        ("models:/digits/3", RegistrySource("models:/digits/3")),
    ],
)
def test_forms(text: str, expected: Source) -> None:
    assert parse(text) == expected


def test_relative_paths_start_at_the_base_and_absolute_ones_do_not() -> None:
    relative, absolute = parse("m", Path("/base")), parse("/m", Path("/base"))
    assert isinstance(relative, DirectorySource)
    assert isinstance(absolute, DirectorySource)
    assert (relative.path, absolute.path) == (Path("/base/m"), Path("/m"))


@pytest.mark.parametrize("text", ["", "a\0b", "s3://bucket/m", "file:///m"])
def test_texts_that_name_no_source(text: str) -> None:
    with pytest.raises(ValueError, match=r"write a path|NUL"):
        parse(text)


def test_servers_and_registries_are_known_but_not_servable_yet() -> None:
    assert unservable(parse("m")) is None
    assert "not supported in this version" in str(unservable(parse("http://h")))
    assert "not supported in this version" in str(unservable(parse("models:/a")))


@pytest.mark.parametrize("name", ["a", "digits_cnn", "A.b-1", "x" * 256, "..a"])
def test_good_names(name: str) -> None:
    assert name_fault(name) is None


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "é", "a\n", "x" * 257, "%2e", "a\\b"])
def test_bad_names(name: str) -> None:
    assert "cannot be a model name" in str(name_fault(name))
