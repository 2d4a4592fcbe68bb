"""The wire of a stream in plain mode: headers, control subjects and notes, as pure functions.

Plain mode is understood by any NATS client: chunks are bare messages to the request's reply subject, and a sentinel
payload ends them. Two natsync peers add three things that others do not see or ignore. The request says in a header
that it is a stream; the responder's messages carry a reply subject of its control inbox (marked, so that no other
responder's reply subjects are mistaken for it); and before the first chunk a note without payload tells that
address, so that a cancel can find the responder before it has sent anything.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from natsync.concurrency import check_timeout
from natsync.errors import Code, InvalidArgument
from natsync.headers import HeaderInput, Headers

#: Request: "<version>[;…]". 0 = the requester understands notes and control subjects, in plain mode.
STREAM_HEADER = "Natsync-Stream"
#: Request: milliseconds left to the deadline; relative, since clocks differ.
TIMEOUT_HEADER = "Natsync-Timeout"
#: Request: how often it was tried before.
ATTEMPT_HEADER = "Natsync-Attempt"
#: Error end: "<number> <name>" of the status code.
STATUS_HEADER = "Natsync-Status"
#: Error end: what the library itself found: REFUSED, LOST or DEADLINE; absent if the handler failed.
REASON_HEADER = "Natsync-Reason"
REFUSED, LOST, DEADLINE = "refused", "lost", "deadline"
#: Error end: the details, as JSON.
DETAILS_HEADER = "Natsync-Details"
#: Refusal: seconds after which a retry may succeed.
RETRY_AFTER_HEADER = "Natsync-Retry-After"
#: Header names with these beginnings are the library's and the server's own.
RESERVED = ("natsync-", "nats-")

PLAIN_VERSION = "0"

#: The token in front of the last one in a plain stream's control subject: <inbox prefix>.<unique>.nsy0.<number>
PLAIN_MARK = b".nsy0."

#: A note: not data, but word from the responder; what counts is its reply subject. HTTP's and NATS's 100.
NOTE = b"NATS/1.0 100 Natsync\r\n\r\n"
NOTE_STATUS = 100
NO_RESPONDERS_STATUS = 503


def is_control(reply: bytes | None) -> bool:
    """Whether a message's reply subject is a natsync responder's control subject."""
    return reply is not None and PLAIN_MARK in reply


def control_inbox(inbox_prefix: str, unique: str) -> str:
    """The subject under which a responder takes control messages and learns that a requester is gone."""
    return f"{inbox_prefix}.{unique}{PLAIN_MARK.decode().rstrip('.')}"


def encode_cancel(reason: str, code: int = Code.CANCELLED) -> bytes:
    """The payload by which a requester cancels."""
    return f"x {int(code)} {reason}".encode("utf-8", "replace")


def decode_cancel(payload: bytes) -> str | None:
    """The reason if the control payload is a cancel, else None."""
    if payload[:2] != b"x ":
        return None
    return payload[2:].partition(b" ")[2].decode("utf-8", "replace") or "cancelled"


@dataclass(frozen=True)
class Opening:
    """What a request says about the stream it opens.

    Attributes:
        natsync: the requester understands notes and control subjects, and headers on the messages that end a stream.
        timeout: seconds to the deadline, or None.
        attempt: how often it was tried before.
        metadata: the user's headers.
    """

    natsync: bool
    timeout: float | None
    attempt: int
    metadata: Headers


def user_headers(given: HeaderInput) -> Headers:
    """The user's headers of a request that opens a stream.

    Raises:
        InvalidArgument: one has a name that the library or the server keeps to itself.
    """
    headers = Headers(given)
    for key in headers:
        if key.lower().startswith(RESERVED):
            raise InvalidArgument(f"header {key!r}: names with Natsync- and Nats- are reserved")
    return headers


def encode_opening(headers: Headers, timeout: float | None, attempt: int) -> bytes:
    """The header block of a request that opens a stream."""
    block = Headers(headers)
    block[STREAM_HEADER] = PLAIN_VERSION
    if timeout is not None:
        block[TIMEOUT_HEADER] = str(max(1, int(timeout * 1000)))
    if attempt:
        block[ATTEMPT_HEADER] = str(attempt)
    return block.encode()


def decode_opening(headers: Headers) -> Opening:
    """The opening of a request; what is missing or malformed counts as not said."""
    milliseconds, attempt = headers.get(TIMEOUT_HEADER, ""), headers.get(ATTEMPT_HEADER, "")
    metadata = Headers()
    for key, value in headers.fields():
        if not key.lower().startswith(RESERVED):
            metadata._fields.append((key, value))
    return Opening(
        natsync=STREAM_HEADER in headers,
        timeout=int(milliseconds) / 1000 if _is_number(milliseconds) else None,
        attempt=int(attempt) if _is_number(attempt) else 0,
        metadata=metadata,
    )


def encode_status(status: Status) -> bytes:
    """The header block of a message that ends a stream with an error."""
    code = status.code if isinstance(status.code, int) and status.code else Code.UNKNOWN
    name = Code(code).name if code in Code._value2member_map_ else "CODE"
    headers = Headers({STATUS_HEADER: f"{int(code)} {name}"})
    if status.reason is not None:
        headers[REASON_HEADER] = status.reason
    if status.details is not None:
        headers[DETAILS_HEADER] = _as_json(status.details)
    if status.retry_after is not None:
        headers[RETRY_AFTER_HEADER] = f"{status.retry_after:g}"
    return headers.encode()


def _as_json(details: Any) -> str:
    """Details as JSON; what has no JSON form goes as text: an error must not get lost over its details."""
    try:
        return json.dumps(details, default=str)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(f"<{type(details).__name__} without a JSON form>")


@dataclass(frozen=True)
class Status:
    """How a stream ended, beyond its text."""

    code: int | None = None
    details: Any = None
    reason: str | None = None
    retry_after: float | None = None


def decode_status(headers: Headers) -> Status:
    """The status of an error end; what is missing or malformed counts as not said."""
    number = headers.get(STATUS_HEADER, "").partition(" ")[0]
    try:
        details = json.loads(headers.get(DETAILS_HEADER, "null"))
    except (ValueError, RecursionError):
        details = headers[DETAILS_HEADER]
    try:
        retry_after = check_timeout(float(headers[RETRY_AFTER_HEADER]))
    except (KeyError, ValueError):
        retry_after = None
    return Status(int(number) if _is_number(number) else None, details, headers.get(REASON_HEADER), retry_after)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 12
