"""TLS of the data ports: contexts made from files, and faults that name the file.

Rules: TLS 1.2 and newer, forward secrecy only (no static RSA, and none of the suites that RFC 9113 appendix A
forbids); the gRPC port speaks `h2` and nothing else, the HTTP port `http/1.1`, told by ALPN (RFC 7301). With a
client CA every client must show a certificate of it. Files are read once, at the start.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.errors import ConfigError

HTTP: Final = "http/1.1"
GRPC: Final = "h2"
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. `key` must not need a passphrase; `client_ca`: None asks clients for no certificate."""

    cert: Path
    key: Path
    client_ca: Path | None = None


def context(files: TlsFiles, protocol: str) -> ssl.SSLContext:
    """A server's context for `HTTP` or `GRPC`.

    Raises:
        ConfigError: a file cannot be used; the text names it and its configuration key.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_ciphers(_CIPHERS)
    made.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    made.set_alpn_protocols([protocol])
    _readable("cert", files.cert)
    _readable("key", files.key)
    try:
        made.load_cert_chain(files.cert, files.key, password=_no_passphrase)
    except ConfigError:
        raise ConfigError(f"server.tls.key: {files.key} is locked with a passphrase; give a key without one") from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"server.tls.key: {files.key} is not the key of the certificate in {files.cert}; give the one it was "
                "made with"
            ) from None
        raise _unusable(files) from None
    if files.client_ca is not None:
        _readable("client_ca", files.client_ca)
        try:
            made.load_verify_locations(files.client_ca)
        except ssl.SSLError:
            raise ConfigError(f"server.tls.client_ca: {files.client_ca} holds no certificates in PEM form") from None
        made.verify_mode = ssl.CERT_REQUIRED
    return made


def _no_passphrase() -> str:
    raise ConfigError("")


def _readable(key: str, path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(f"server.tls.{key}: {path} cannot be read: {why}; give the path of a PEM file") from None


def _unusable(files: TlsFiles) -> ConfigError:
    """Which of the two files OpenSSL stumbled over; it does not say."""
    if b"-----BEGIN CERTIFICATE-----" not in files.cert.read_bytes():
        return ConfigError(f"server.tls.cert: {files.cert} holds no certificate in PEM form")
    if b"PRIVATE KEY-----" not in files.key.read_bytes():
        return ConfigError(f"server.tls.key: {files.key} holds no private key in PEM form")
    return ConfigError(f"server.tls.cert: {files.cert} and {files.key} cannot be used as certificate and private key")
