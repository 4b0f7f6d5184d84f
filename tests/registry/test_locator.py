"""Spelling of references: one meaning each, and no text breaks the reading of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.registry.locator import (
    HubReference,
    MlflowReference,
    ObjectReference,
    OciReference,
    locate_reference,
    scheme_of,
)

ID = "m-" + "a" * 32
DIGEST = "sha256:" + "b" * 64
COMMIT = "c" * 40


@pytest.mark.parametrize(
    ("text", "meant", "mutable", "title"),
    [
        ("models:/digits@champion", MlflowReference("digits", alias="champion"), True, "digits"),
        ("models:/digits/3", MlflowReference("digits", version="3"), False, "digits"),
        ("models:/digits/latest", MlflowReference("digits"), True, "digits"),
        ("models:/my model@a.b-c", MlflowReference("my model", alias="a.b-c"), True, "my model"),
        (f"models:/{ID}", MlflowReference(model_id=ID), False, ID),
        ("s3://bucket/models/digits/3/", ObjectReference("bucket", "models/digits/3"), True, "digits"),
        ("s3://bucket", ObjectReference("bucket", ""), True, "bucket"),
        ("s3://bucket/a/m.onnx?versionId=x.Y_1", ObjectReference("bucket", "a/m.onnx", "x.Y_1"), False, "m"),
        ("oci://Reg.eu:5000/team/digits:v1", OciReference("reg.eu:5000", "team/digits", "v1"), True, "digits"),
        (f"oci://[::1]:5000/d@{DIGEST}", OciReference("[::1]:5000", "d", digest=DIGEST), False, "d"),
        ("hf://org/net", HubReference("org/net"), True, "net"),
        ("hf://org/net@main/onnx/m.onnx", HubReference("org/net", "main", "onnx/m.onnx"), True, "net"),
        (f"hf://org/net@{COMMIT}", HubReference("org/net", COMMIT), False, "net"),
    ],
)  # fmt: skip
def test_what_a_reference_means(text: str, meant: object, mutable: bool, title: str) -> None:
    found = locate_reference(text)
    assert found == meant
    assert (found.mutable, found.title) == (mutable, title)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models:/digits", "does not say which version; write models:/digits@ALIAS"),
        ("models:/digits/Production", "MLflow has given up stages"),
        ("models:/digits/0", "is no number"),
        ("models:/digits/03", "is no number"),
        ("models:/digits@", "is no MLflow reference"),
        ("models:/a/b/c", "is no number|is no MLflow"),
        ("models:digits", "is no MLflow reference"),
        ("models://digits@a", "is no MLflow reference"),
        ("models:/a'b\x00@c", "is no MLflow reference"),
        ("s3://Bucket/x", "has no usable name of a bucket"),
        ("s3://b/x", "has no usable name of a bucket; write s3://BUCKET/KEY, BUCKET of 3 to 63 of a-z 0-9 . -"),
        ("s3://user:secret@bucket/x", "is no reference of an object store"),
        ("s3://bucket/a/../b", "'..'"),
        ("s3://bucket/a//b", "empty part"),
        ("s3://bucket?versionId=1", "whole bucket"),
        ("s3://bucket/a?x=1", "is no reference of an object store"),
        ("oci://host/repo", "write oci://HOST/REPOSITORY:TAG"),
        ("oci://user:secret@host/repo:1", "is no OCI reference"),
        ("oci://host/Repo:1", "is no OCI reference"),
        ("hf://net", "is no Hugging Face reference"),
        ("hf://../net@main", "is no Hugging Face reference"),
        ("hf://org/net@main/../x", "'..'"),
        ("hf://user:secret@org/net", "is no Hugging Face"),
        ("models:/" + "a" * 3000, "longer than"),
    ],
)
def test_what_is_no_reference_is_told_without_secrets(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as told:
        locate_reference(text)
    assert "secret" not in str(told.value)


@given(st.sampled_from(["models:/", "s3://", "oci://", "hf://", ""]), st.text(max_size=80))
def test_any_text_is_read_or_refused(scheme: str, text: str) -> None:
    try:
        found = locate_reference(scheme + text)
    except ValueError:
        return
    assert scheme_of(scheme + text) is not None
    assert found.title
    assert ".." not in getattr(found, "key", "").split("/")
    assert ".." not in getattr(found, "path", "").split("/")
