"""The only importer of pynats2: what natsync takes from it, and what its import needs.

pynats2 imports `pkg_resources`, which setuptools 82 removed, to read its own version number. While pynats2 is imported,
a stand-in that answers this one question from importlib.metadata takes that name's place; it is taken away again at
once, so nobody else sees it. It is used even where the real module exists, because that one doubles the import time
of natsync and warns about its own deprecation.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import re
    import socket

    class NATSError(Exception):
        """The root of pynats2's errors."""

    class NATSConnectionError(NATSError):
        """pynats2: the connection failed."""

    class NATSRequestTimeoutError(NATSError):
        """pynats2: no reply in time."""

    class NATSInvalidUrlError(NATSConnectionError):
        """pynats2: the URL cannot be parsed."""

    class NATSInvalidSchemeError(NATSConnectionError):
        """pynats2: the URL's scheme is unknown."""

    class NUID:
        """pynats2's generator of unique identifiers."""

        def next_(self) -> bytearray: ...

    class NATSNoSubscribeClient:
        """pynats2's client without a reader thread: URL, TLS options, framing of the handshake."""

        _conn_options: dict[str, Any]
        _socket: socket.socket
        _socket_buffer: bytes

        def __init__(self, url: str = ..., *, name: str = ..., socket_timeout: float = ...) -> None: ...
        def _send(self, *parts: bytes | str | int) -> None: ...
        def _get_command(self, line: bytes) -> re.Pattern[bytes] | None: ...

    INFO_RE: re.Pattern[bytes]
    PING_RE: re.Pattern[bytes]
    PONG_RE: re.Pattern[bytes]
    OK_RE: re.Pattern[bytes]
    ERR_RE: re.Pattern[bytes]
else:

    def _stand_in() -> types.ModuleType:
        module = types.ModuleType("pkg_resources", "Stand-in with the one function that pynats2 calls.")
        module.get_distribution = importlib.metadata.distribution  # has .version, all that is read
        return module

    def _import_pynats2() -> types.ModuleType:
        if "pynats2.client" in sys.modules or "pkg_resources" in sys.modules:
            return importlib.import_module("pynats2")
        sys.modules["pkg_resources"] = _stand_in()
        try:
            return importlib.import_module("pynats2")
        finally:
            del sys.modules["pkg_resources"]

    _pynats2 = _import_pynats2()
    _client = sys.modules["pynats2.client"]
    NATSError = _pynats2.NATSError
    NATSConnectionError = _pynats2.NATSConnectionError
    NATSRequestTimeoutError = _pynats2.NATSRequestTimeoutError
    NATSInvalidUrlError = _pynats2.NATSInvalidUrlError
    NATSInvalidSchemeError = _pynats2.NATSInvalidSchemeError
    NATSNoSubscribeClient = _pynats2.NATSNoSubscribeClient
    NUID = _client.NUID
    INFO_RE = _client.INFO_RE
    PING_RE = _client.PING_RE
    PONG_RE = _client.PONG_RE
    OK_RE = _client.OK_RE
    ERR_RE = _client.ERR_RE

__all__ = [
    "ERR_RE",
    "INFO_RE",
    "NUID",
    "OK_RE",
    "PING_RE",
    "PONG_RE",
    "NATSConnectionError",
    "NATSError",
    "NATSInvalidSchemeError",
    "NATSInvalidUrlError",
    "NATSNoSubscribeClient",
    "NATSRequestTimeoutError",
]
