"""TLS towards remote servers: contexts, made anew when their files change.

Rules: certificates are always verified, against the configured authorities or the system's; TLS 1.2 at least. A file
that cannot be read, or holds nothing useful, makes new connections fail with its reason; nothing falls back to plain.
"""

from __future__ import annotations

import ssl

from gateway.backends.remote_endpoint import Endpoint


class TlsError(Exception):
    """The configured files cannot be used; the text says which and why, without their content."""


class TlsFiles:
    """Of one endpoint. Looks at the files' times whenever a connection is to be made."""

    def __init__(self, endpoint: Endpoint, alpn: str) -> None:
        self._tls = endpoint.tls
        self._alpn = alpn
        self._seen: tuple[tuple[int, int, int], ...] | None = None
        self._context: ssl.SSLContext | None = None

    def __repr__(self) -> str:
        return f"<TlsFiles ca={self._tls.ca} cert={self._tls.cert}>"

    def changed(self) -> bool:
        """Whether the files are others than the last time; true the first time.

        Raises:
            TlsError: one is not there.
        """
        files = [file for file in (self._tls.ca, self._tls.cert, self._tls.key) if file is not None]
        try:
            stats = [file.stat() for file in files]
        except OSError as error:
            raise TlsError(f"the TLS file {error.filename} cannot be read: {error.strerror}") from None
        now = tuple([(stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in stats])
        changed = now != self._seen
        self._seen = now
        return changed

    def context(self) -> ssl.SSLContext:
        """For one new connection. Raises TlsError."""
        if self.changed() or self._context is None:
            self._context = None
            try:
                context = ssl.create_default_context(cafile=self._tls.ca)
                if self._tls.cert is not None:
                    context.load_cert_chain(self._tls.cert, self._tls.key)
            except (OSError, ValueError) as error:
                self._seen = None
                raise TlsError(f"the TLS files cannot be used: {getattr(error, 'reason', None) or error}") from None
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.set_alpn_protocols([self._alpn])
            self._context = context
        return self._context
