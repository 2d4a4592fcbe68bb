"""Message: one message as it was received, and how payloads become bytes.

Pure values; a message knows how to send only through the publish function it was made with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeAlias

from natsync import headers as _headers
from natsync import subject as _subject
from natsync.errors import InvalidArgument, ProtocolError
from natsync.headers import Headers

#: What may be sent: bytes-like, or text, which is encoded as UTF-8.
Payload: TypeAlias = "bytes | bytearray | memoryview | str"

#: (reply or None, header block or None, payload): one message of a parsed batch.
Item: TypeAlias = "tuple[bytes | None, bytes | None, bytes]"

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "…"})()


def to_bytes(payload: Payload) -> bytes:
    """The payload as bytes.

    Raises:
        TypeError: it is neither bytes-like nor str (None included: send b"").
        InvalidArgument: it is text with lone surrogates.
    """
    if isinstance(payload, bytes):
        return payload
    if isinstance(payload, str):
        try:
            return payload.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"the text cannot be encoded as UTF-8: {error.reason}") from None
    if isinstance(payload, bytearray | memoryview):
        return bytes(payload)
    raise TypeError(f"a payload is bytes-like or str, not {type(payload).__name__}; use json= for other values")


def payload_of(payload: Payload, json_value: Any) -> bytes:
    """The payload of a verb that takes `payload` or `json=`.

    Raises:
        InvalidArgument: both are given, or the value has no JSON form.
        TypeError: the payload is neither bytes-like nor str.
    """
    if json_value is MISSING:
        return to_bytes(payload)
    if payload != b"":
        raise InvalidArgument("give a payload or json=, not both")
    try:
        return json.dumps(json_value, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"json= has no JSON form: {error}") from error


class Message:
    """One received message.

    Attributes:
        subject: where it was published.
        reply: where an answer is wanted, or None.
        data: the payload, bytes.
        headers: Headers, empty if there were none (or unreadable ones: then malformed is True).
        status: the server's inline status such as 503, or None.
        is_end: True for the END of a stream, inside stream_request only.
        error: the text of a stream's error message, inside stream_request only; else None.
        came_at: time.monotonic() when it was read, before it waited for its turn; 0 where it does not wait for one.
    """

    __slots__ = (
        "_block", "_headers", "_malformed", "_publish", "came_at", "data", "error", "is_end", "reply", "subject",
    )  # fmt: skip

    def __init__(
        self,
        subject: str,
        data: bytes = b"",
        reply: str | None = None,
        headers: Headers | None = None,
        *,
        block: bytes | None = None,
        publish: Callable[[str, Payload, Headers | None], None] | None = None,
    ) -> None:
        self.subject = subject
        self.data = data
        self.reply = reply
        self.is_end = False
        self.error: str | None = None
        self.came_at = 0.0
        self._malformed = False
        self._headers = headers
        self._block = block
        self._publish = publish

    @classmethod
    def received(cls, subject: bytes, item: Item, publish: Callable[[str, Payload, Headers | None], None]) -> Message:
        """A message from its parsed parts; headers are parsed when they are first asked for."""
        reply, block, data = item
        text = None if reply is None else _subject.decode(reply)
        return cls(_subject.decode(subject), data, text, block=block, publish=publish)

    @property
    def headers(self) -> Headers:
        if self._headers is None:
            try:
                self._headers = Headers() if self._block is None else _headers.decode(self._block)
            except ProtocolError:
                self._malformed = True
                self._headers = Headers()
        return self._headers

    @property
    def malformed(self) -> bool:
        """Whether the header block could not be read: then headers is empty."""
        _ = self.headers  # parses the block, if that is still to be done
        return self._malformed

    @property
    def status(self) -> int | None:
        return None if self._block is None else _headers.status_of(self._block)

    def text(self) -> str:
        """The payload as UTF-8 text; raises UnicodeDecodeError (a ValueError) if it is not."""
        return self.data.decode("utf-8")

    def json(self) -> Any:
        """The payload's JSON value; raises json.JSONDecodeError (a ValueError) if it is none."""
        return json.loads(self.data)

    def respond(self, payload: Payload = b"", *, json: Any = MISSING, headers: _headers.HeaderInput = None) -> None:
        """Publish an answer to the message's reply subject; does not wait for it to leave.

        Raises:
            InvalidArgument: the message wants no answer (it has no reply subject).
        """
        if self.reply is None or self._publish is None:
            raise InvalidArgument(f"the message on {self.subject!r} has no reply subject: nobody waits for an answer")
        self._publish(self.reply, payload_of(payload, json), None if headers is None else Headers(headers))

    def __repr__(self) -> str:
        reply = "" if self.reply is None else f", reply={self.reply!r}"
        shown = self.data if len(self.data) <= 60 else self.data[:60] + b"..."
        return f"Message({self.subject!r}, {shown!r}{reply})"
