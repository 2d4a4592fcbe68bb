"""Server-sent events as a browser reads them, and an HTTP client that can leave in every way."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 20.0


@dataclass
class Got:
    """An event that was dispatched."""

    data: str
    event: str = "message"
    id: str = ""

    def json(self) -> Any:
        return json.loads(self.data)


def parse(stream: bytes) -> list[Got]:
    """The events that a browser dispatches for these bytes: WHATWG HTML, 9.2.6, "Interpreting an event stream"."""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    events: list[Got] = []
    data, kind, last_id = "", "", ""
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]:  # an unfinished line is none
        if not line:
            if data:
                events.append(Got(data.removesuffix("\n"), kind or "message", last_id))
            data, kind = "", ""
            continue
        if line.startswith(":"):
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            kind = value
        elif field == "data":
            data += value + "\n"
        elif field == "id" and "\0" not in value:
            last_id = value
    return events


class Browser:
    """A GET over a bare socket; what comes is kept as bytes, chunked framing taken off."""

    def __init__(self, url: str, method: str = "GET", headers: str = "", timeout: float = PATIENCE) -> None:
        parts = urlsplit(url)
        self.body = b""
        self.complete = False  # the last chunk, or the end of a body without chunks, has come
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        self.socket = socket.create_connection((str(parts.hostname), parts.port or 80), timeout=timeout)
        try:
            self.socket.sendall(f"{method} {target} HTTP/1.1\r\nHost: here\r\n{headers}\r\n".encode())
            self._raw = b""
            self._read_head()
        except BaseException:
            self.socket.close()
            raise

    def _read_head(self) -> None:
        while b"\r\n\r\n" not in self._raw:
            received = self.socket.recv(65536)
            if not received:
                raise EOFError(f"the server closed after {self._raw!r}")
            self._raw += received
        head, _, self._raw = self._raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._chunked = self.headers.get("transfer-encoding") == "chunked"
        self._unframe()

    def read(self) -> bool:
        """Wait for more of the body; False at its end, or where the server broke off."""
        if self.complete:
            return False
        received = self.socket.recv(65536)
        if not received:
            self.complete = not self._chunked
            return False
        self._raw += received
        self._unframe()
        return True

    def _unframe(self) -> None:
        if not self._chunked:
            self.body, self._raw = self.body + self._raw, b""
            return
        while b"\r\n" in self._raw:
            size_text, _, rest = self._raw.partition(b"\r\n")
            size = int(size_text, 16)
            if len(rest) < size + 2:
                return
            self.complete = self.complete or size == 0
            self.body, self._raw = self.body + rest[:size], rest[size + 2 :]

    @property
    def events(self) -> list[Got]:
        return parse(self.body)

    def wait_for(self, what: bytes) -> None:
        """Read until it is in the body."""
        while what not in self.body:
            assert self.read(), f"no {what!r} in {self.body!r}"

    def read_all(self) -> bytes:
        while self.read():
            pass
        return self.body

    def times(self) -> Iterator[tuple[float, list[Got]]]:
        """(time.monotonic(), all events so far), each time that something came."""
        yield time.monotonic(), self.events
        while self.read():
            yield time.monotonic(), self.events

    # -- leaving -----------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """FIN: what closing a tab does."""
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def reset(self) -> None:
        """RST: what a dead machine's successor does, or a close with unread data."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()
