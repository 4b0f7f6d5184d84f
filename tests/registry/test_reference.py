"""Which kind of source a text names, and which names a model may have."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.registry.locator import MlflowReference, Scheme
from gateway.registry.reference import (
    DirectorySource,
    ModelFileSource,
    OipServerSource,
    RegistrySource,
    Source,
    name_fault,
    not_allowed,
    parse,
    parse_server,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models", DirectorySource("models", Path("models"))),
        ("./m/digits.onnx", ModelFileSource("./m/digits.onnx", Path("m/digits.onnx"))),
        ("/abs/m", DirectorySource("/abs/m", Path("/abs/m"))),
        ("a:b", DirectorySource("a:b", Path("a:b"))),
        ("http://h:8000", OipServerSource("http://h:8000", "http", "h", 8000)),
        (
            "HTTPS://Node-1.Example.org./",
            OipServerSource("HTTPS://Node-1.Example.org./", "https", "node-1.example.org", 443),
        ),
        ("grpc://h", OipServerSource("grpc://h", "grpc", "h", 8001)),
        ("http://h", OipServerSource("http://h", "http", "h", 8000)),
        ("grpcs://10.0.0.1:9", OipServerSource("grpcs://10.0.0.1:9", "grpcs", "10.0.0.1", 9)),
        ("http://[0::1]:80", OipServerSource("http://[0::1]:80", "http", "::1", 80)),
        (
            "models:/digits@champion",
            RegistrySource("models:/digits@champion", "models", MlflowReference("digits", alias="champion")),
        ),
        ("models:/digits/3", RegistrySource("models:/digits/3", "models", MlflowReference("digits", version="3"))),
    ],
)
def test_forms(text: str, expected: Source) -> None:
    assert parse(text) == expected


def test_relative_paths_start_at_the_base_and_absolute_ones_do_not() -> None:
    relative, absolute = parse("m", Path("/base")), parse("/m", Path("/base"))
    assert isinstance(relative, DirectorySource)
    assert isinstance(absolute, DirectorySource)
    assert (relative.path, absolute.path) == (Path("/base/m"), Path("/m"))


@pytest.mark.parametrize("text", ["", "a\0b", "ftp://b/m", "file:///m"])
def test_texts_that_name_no_source(text: str) -> None:
    with pytest.raises(ValueError, match=r"write a path|NUL"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        *("http://", "http:///", "http://:80", "http://h:", "http://h:0", "http://h:65536", "http://h:8o"),
        *("http://a b", "http://-a", "http://a..b", "http://a%2e", "http://é", "http://10.0.0", "http://1.2.3.256"),
        *("http://[::g]", "http://[::1", "http://::1", "http://[::1]x", "http://" + "a" * 64, "http://h:123456789"),
    ],
)
def test_urls_of_no_server(text: str) -> None:
    with pytest.raises(ValueError, match=r"has (a host that is|no usable)"):
        parse(text)


@pytest.mark.parametrize("text", ["http://h/v2", "http://h:1/a", "grpc://h?x", "http://h#f", "http://h//"])
def test_a_servers_url_ends_with_its_port(text: str) -> None:
    with pytest.raises(ValueError, match=r"more than host and port; write for example (http|grpc)://host:800"):
        parse(text)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="user name or password") as caught:
        parse("http://me:secret@h:8000")
    assert "secret" not in str(caught.value)


def test_two_spellings_of_one_server_have_one_url() -> None:
    texts = ["http://H.example:8000", "http://h.example", "HTTP://h.example./", "http://h.example:08000"]
    assert {parse_server(text).url for text in texts} == {"http://h.example:8000"}
    assert parse_server("grpcs://[2001:DB8::1]").url == "grpcs://[2001:db8::1]:443"
    assert [parse_server(f"{scheme}://h").encrypted for scheme in ("http", "https", "grpc", "grpcs")] == [
        False, True, False, True,
    ]  # fmt: skip


def test_a_registry_reference_says_what_it_is_called_and_whether_it_moves() -> None:
    moving, fixed = parse("models:/digits@champion"), parse("oci://h/team/net@sha256:" + "a" * 64)
    assert isinstance(moving, RegistrySource)
    assert isinstance(fixed, RegistrySource)
    assert (moving.title, moving.mutable, fixed.title, fixed.mutable) == ("digits", True, "net", False)
    with pytest.raises(ValueError, match="does not say which version"):
        parse("models:/digits")


@pytest.mark.parametrize(
    ("scheme", "section"), [("models", "mlflow"), ("s3", "s3"), ("oci", "oci"), ("hf", "huggingface")]
)
def test_what_is_not_configured_is_refused_with_what_to_add(scheme: Scheme, section: str) -> None:
    assert f"add registries.{section}" in not_allowed(scheme)


@pytest.mark.parametrize("name", ["a", "digits_cnn", "A.b-1", "x" * 256, "..a"])
def test_good_names(name: str) -> None:
    assert name_fault(name) is None


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "é", "a\n", "x" * 257, "%2e", "a\\b"])
def test_bad_names(name: str) -> None:
    assert "cannot be a model name" in str(name_fault(name))
