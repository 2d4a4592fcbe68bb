"""How to wake a thread that is blocked reading from a third party, whatever client library it reads with.

Closing a response from another thread does not wake a blocked recv() (and may itself block on the response's lock);
shutting its socket down does, at once. wake() finds the socket of the common clients and does that.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

#: Attribute paths from a response or connection to its socket, by library.
_PATHS = (
    ("raw", "_connection", "sock"),  # requests.Response over urllib3
    ("_connection", "sock"),  # urllib3.HTTPResponse
    ("raw", "_fp", "fp", "raw", "_sock"),  # the same once urllib3 has detached the connection
    ("_fp", "fp", "raw", "_sock"),
    ("fp", "raw", "_sock"),  # http.client.HTTPResponse, urllib.request
    ("raw", "_sock"),  # socket.makefile("rb")
    ("buffer", "raw", "_sock"),  # socket.makefile("r")
    ("sock",),  # http.client.HTTPConnection
    ("_sock",),  # many database and line-protocol clients
)


def wake(obj: object) -> None:
    """Make reads blocked on obj return: shut its socket down; without a known socket call its cancel() or close()."""
    sock = find_socket(obj)
    if sock is not None:
        with suppress(OSError):
            # Not sock.shutdown(): SSLSocket's own would drop the TLS state under the thread that is reading.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
        return
    for name in ("cancel", "close"):
        method: Callable[[], Any] | None = getattr(obj, name, None)
        if callable(method):
            method()
            return


def find_socket(obj: object) -> socket.socket | None:
    """The socket under a response, connection or file object of a common client; None if there is none to be seen."""
    if isinstance(obj, socket.socket):
        return obj
    for path in _PATHS:
        found: Any = obj
        for name in path:
            found = getattr(found, name, None)
            if found is None:
                break
        if isinstance(found, socket.socket):
            return found
    return _httpx_socket(obj)


def _httpx_socket(obj: object) -> socket.socket | None:
    extensions = getattr(obj, "extensions", None)
    stream: Any = extensions.get("network_stream") if isinstance(extensions, dict) else None
    found = stream.get_extra_info("socket") if hasattr(stream, "get_extra_info") else None
    return found if isinstance(found, socket.socket) else None
