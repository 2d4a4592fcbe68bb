"""Server-Sent Events (WHATWG HTML, section 9.2): a stream as what a browser's EventSource reads.

Each chunk is an event. While nothing comes, comments keep proxies from cutting the response and find out whether the
browser is still there. The end is an event `end`, a failure an event `error` with JSON: without them EventSource would
take both for a broken link and ask again. A page has to close() its EventSource at either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from natsync.contrib.body import Body, ChunkSource, check_heartbeat, logged_failure
from natsync.contrib.failures import error_data
from natsync.contrib.presence import Gone
from natsync.errors import InvalidArgument

MIMETYPE = "text/event-stream"
#: Headers of a response with events: nobody on the way may keep them, collect them (nginx) or compress them.
HEADERS: Mapping[str, str] = MappingProxyType({"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"})
#: Seconds without an event after which a comment is sent. nginx and most balancers cut after 60 s of silence.
HEARTBEAT_SECONDS = 15.0

Data: TypeAlias = "bytes | bytearray | memoryview | str"

_LINE_BREAK = re.compile(rb"\r\n|\r|\n")


@dataclass(frozen=True)
class Event:
    """One event: what stream.map(fn) may return for a chunk that needs more than data.

    Attributes:
        data: bytes (UTF-8) or text, of any number of lines.
        event: its type, for addEventListener(); None is "message".
        id: what the browser sends as Last-Event-ID when it asks again; None leaves the last one, "" clears it.
        retry: milliseconds that the browser is to wait before it asks again.
    """

    data: Data = b""
    event: str | None = None
    id: str | None = None
    retry: int | None = None

    def encode(self) -> bytes:
        """As it goes over the wire; see encode()."""
        return encode(self.data, event=self.event, id=self.id, retry=self.retry)


def encode(data: Data, *, event: str | None = None, id: str | None = None, retry: int | None = None) -> bytes:
    r"""An event as bytes.

    Every line of the data becomes a field of its own, so that data cannot forge a field or an event; the browser joins
    them by \n, whether they were separated by \n, \r\n or \r.

    Raises:
        InvalidArgument: event or id contains a line break or NUL, or retry is negative.
        TypeError: one is of the wrong type.
    """
    fields = b"".join(
        b"%b: %b\n" % (name, _one_line(name.decode(), value))
        for name, value in ((b"event", event), (b"id", id))
        if value is not None
    )
    if retry is not None:
        if isinstance(retry, bool) or not isinstance(retry, int):
            raise TypeError(f"retry is a whole number of milliseconds, not {type(retry).__name__}")
        if retry < 0:
            raise InvalidArgument(f"retry={retry}: milliseconds from 0 up")
        fields += b"retry: %d\n" % retry
    return fields + b"".join(b"data: %b\n" % line for line in _LINE_BREAK.split(_bytes(data))) + b"\n"


def comment(text: str = "ping") -> bytes:
    """A comment, which the browser ignores: a sign of life."""
    return b": %b\n\n" % _one_line("a comment", text)


def check_event(name: str | None) -> str | None:
    """The name if it can be the type of an event, or None.

    Raises:
        InvalidArgument, TypeError: it cannot.
    """
    if name is not None:
        _one_line("event", name)
    return name


def _one_line(name: str, value: str) -> bytes:
    if not isinstance(value, str):
        raise TypeError(f"{name} is a str, not {type(value).__name__}")
    if any(char in value for char in "\r\n\0"):
        raise InvalidArgument(f"{name} contains a line break or NUL")
    return value.encode()


def _bytes(data: Data) -> bytes:
    if isinstance(data, str):
        return data.encode()
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"an event's data is bytes or str, not {type(data).__name__}; use stream.map(json.dumps)")
    return bytes(data)


class EventBody(Body):
    """The body of a response with events; see Body for how it waits and ends.

    It begins with a comment, so that headers leave at once, before the first chunk is there. A failure of the stream,
    of a function in stream.map(), or a chunk that cannot be encoded, is an `error` event and the end; the log has it
    too.

    Args:
        stream: its chunks are bytes, text or Event, or messages, for their data.
        heartbeat: seconds without an event after which a comment is sent; None = never.
        event: the type of events whose chunk is not an Event; None is "message".
        end: the type of the event at the end of a complete stream; None sends none.
        gone: see presence.client_gone(); None does not look.
        describe: what the data of an `error` event is, as JSON; error_data() unless told otherwise.

    Raises:
        InvalidArgument, TypeError: an argument cannot be used; the stream is closed.
    """

    def __init__(
        self,
        stream: ChunkSource,
        *,
        heartbeat: float | None = HEARTBEAT_SECONDS,
        event: str | None = None,
        end: str | None = "end",
        gone: Gone | None = None,
        describe: Callable[[BaseException], dict[str, Any]] = error_data,
    ) -> None:
        super().__init__(stream, gone=gone)
        try:
            self._heartbeat = check_heartbeat(heartbeat)
            self._event = check_event(event)
            self._end_event = check_event(end)
        except BaseException:
            self.close()
            raise
        self._describe = describe
        self._ready.append(comment("stream"))

    def _encode(self, chunk: Any) -> bytes:
        return chunk.encode() if isinstance(chunk, Event) else encode(chunk, event=self._event)

    def _beat(self) -> bytes:
        return comment()

    def _end(self) -> bytes:
        return b"" if self._end_event is None else encode(b"", event=self._end_event)

    def _failure(self, error: Exception) -> bytes:
        return encode(json.dumps(logged_failure(error, self._describe)), event="error")
