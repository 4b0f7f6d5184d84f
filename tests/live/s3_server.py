"""An S3 API server in this process (moto's), and boto3's client to fill it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

ACCESS_KEY, SECRET_KEY = "AKIATESTS", "tests-secret-key"


@dataclass(frozen=True, slots=True)
class S3Server:
    """`client`: boto3's, whose methods take keyword arguments only."""

    endpoint: str
    client: Any

    def bucket(self, name: str, *, versioned: bool) -> str:
        self.client.create_bucket(Bucket=name)
        if versioned:
            self.client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        return name

    def put(self, bucket: str, key: str, content: bytes, **metadata: str) -> str | None:
        """Returns the version, where the bucket keeps versions."""
        version: str | None = self.client.put_object(Bucket=bucket, Key=key, Body=content, Metadata=metadata).get(
            "VersionId"
        )
        return version


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    server_module = pytest.importorskip("moto.server", reason="needs pip install 'moto[server,s3]'")
    boto3 = pytest.importorskip("boto3", reason="needs pip install 'moto[server,s3]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    inherited = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("AWS_")}
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )
        yield S3Server(endpoint, client)
        client.close()
    finally:
        server.stop()
        os.environ.update(inherited)
