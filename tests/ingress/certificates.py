"""Certificates for tests, made by openssl: an authority, a server for 127.0.0.1, a client, and a stranger."""

from __future__ import annotations

import subprocess
from pathlib import Path

_SUBJECT = "subjectAltName=IP:127.0.0.1,DNS:localhost"


class Certificates:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("ca", "stranger"):
            _openssl(
                directory,
                *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
                *("-subj", f"/CN={name}", "-keyout", f"{name}-key.pem", "-out", f"{name}.pem"),
            )
        for name in ("server", "client"):
            _openssl(
                directory,
                *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}"),
                *("-keyout", f"{name}-key.pem", "-out", f"{name}.csr"),
            )
            (directory / "names").write_text(_SUBJECT)
            _openssl(
                directory,
                *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca-key.pem", "-CAcreateserial"),
                *("-days", "2", "-extfile", "names", "-out", f"{name}.pem"),
            )
        _openssl(
            directory, "ec", "-in", "server-key.pem", "-aes128", "-passout", "pass:secret", "-out", "locked-key.pem"
        )

    def __getitem__(self, name: str) -> Path:
        return self.directory / f"{name}.pem"


def _openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)
