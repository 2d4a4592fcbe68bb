"""The terms of a stream, as pure functions: what a request says that opens one, and what a message says that ends one.

They go in headers; docs/protocol.md lists them. Everything between is in frames.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from natsync import headers as _headers
from natsync.concurrency import check_timeout
from natsync.errors import Code, InvalidArgument, ProtocolError
from natsync.headers import HeaderInput, Headers

#: Request: "<version>;<name>=<number or letters>;…": the requester understands framed mode, and these are its limits.
STREAM_HEADER = "Natsync-Stream"
#: Request: milliseconds left to the deadline; relative, since clocks differ.
TIMEOUT_HEADER = "Natsync-Timeout"
#: Request: how often it was tried before.
ATTEMPT_HEADER = "Natsync-Attempt"
#: Request: how many chunks the requester has from attempts that broke off; an error end: how many were sent.
RESUME_HEADER = "Natsync-Resume"
#: Error end: "<number> <name>" of the status code.
STATUS_HEADER = "Natsync-Status"
#: Error end: what the library itself found: LOST, DEADLINE or (plain mode) REFUSED; absent if the handler failed.
REASON_HEADER = "Natsync-Reason"
LOST, DEADLINE, REFUSED = "lost", "deadline", "refused"
#: Error end, and error replies to requests: the details, as JSON.
DETAILS_HEADER = _headers.DETAILS
#: Refusal: seconds after which a retry may succeed.
RETRY_AFTER_HEADER = "Natsync-Retry-After"
#: Refusal: the responder is the only one that was asked, being a member of a queue group.
ONLY_HEADER = "Natsync-Only"
#: Error end, and error replies to requests: the error's text and number, as the tools of NATS services read them.
SERVICE_ERROR_HEADER = "Nats-Service-Error"
SERVICE_CODE_HEADER = "Nats-Service-Error-Code"
#: Frame, where the reply subject does not arrive as it was sent (across accounts): "<op>.<seq> <responder>.<stream>".
SEQ_HEADER = "Natsync-Seq"
#: Header names with these beginnings are the library's and the server's own.
RESERVED = ("natsync-", "nats-")
_STREAM, _TIMEOUT, _ATTEMPT, _RESUME = map(str.lower, (STREAM_HEADER, TIMEOUT_HEADER, ATTEMPT_HEADER, RESUME_HEADER))

VERSION = "1"
#: What a requester says that wants a plain stream: it is one still, to handlers that answer requests, too.
PLAIN_VERSION = "0"
#: Characters of an error's text that fit into a header.
ERROR_TEXT = 1000


# -- the request -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """What a requester offers for framed mode.

    Attributes:
        window, window_bytes: chunks, and application bytes, that may be sent before it has said anything.
        grace: seconds for which a stream waits when the other side is not heard from.
        heartbeat: seconds of silence after which one side asks the other.
        batches: whether it takes several chunks in one frame.
        chunk_bytes: the largest chunk that it puts together.
    """

    window: int
    window_bytes: int
    grace: float
    heartbeat: float
    batches: bool = True
    chunk_bytes: int = 64 << 20

    def encode(self) -> str:
        return _encode_offer(self)


@functools.lru_cache(maxsize=64)  # a client makes the same one for each stream
def _encode_offer(offer: Offer) -> str:
    fields = {
        "w": offer.window,
        "b": offer.window_bytes,
        "g": round(offer.grace * 1000),
        "hb": round(offer.heartbeat * 1000),
        "m": offer.chunk_bytes,
    }
    text = ";".join(f"{key}={min(value, _LARGEST)}" for key, value in fields.items())
    return f"{VERSION};{text};cap={'b' if offer.batches else ''}"


#: The largest number that is understood.
_LARGEST = 10**12 - 1
#: What an offer says that leaves a field out; a peer should leave out none.
_UNSAID = {"w": "8192", "b": "4194304", "g": "10000", "hb": "5000", "m": str(64 << 20), "cap": ""}
#: No stream can do with less: a fragment is a quarter of it.
LEAST_WINDOW_BYTES = 4096


def decode_offer(text: str) -> Offer | None:
    """The offer in STREAM_HEADER; None if it is of another version, or makes no sense: then the stream is plain."""
    return _decode_offer(text) if len(text) <= _REMEMBERED else _decode_offer.__wrapped__(text)


#: Characters of an offer that is remembered at most; those of today have a third of that.
_REMEMBERED = 200


@functools.lru_cache(maxsize=256)  # requesters make the same one for each stream
def _decode_offer(text: str) -> Offer | None:
    version, *pairs = text.split(";")
    if version.strip() != VERSION:
        return None
    said = {**_UNSAID, **dict(_pair(one) for one in pairs)}
    if not all(_is_number(said[key]) for key in ("w", "b", "g", "hb", "m")):
        return None
    window, window_bytes = int(said["w"]), int(said["b"])
    if window < 1 or window_bytes < LEAST_WINDOW_BYTES:
        return None
    seconds = {key: int(said[key]) / 1000 for key in ("g", "hb")}
    return Offer(window, window_bytes, seconds["g"], seconds["hb"], "b" in said["cap"], max(1, int(said["m"])))


def _pair(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    return key.strip(), value.strip()


class Opening(NamedTuple):
    """What a request says about the stream it opens.

    Attributes:
        natsync: the requester reads headers on the message that ends its stream.
        offer: what framed mode is offered with; None = the stream is plain.
        timeout: seconds to the deadline, or None.
        attempt: how often it was tried before.
        resume: chunks that the requester has of attempts that broke off, or None.
        metadata: the user's headers.
    """

    natsync: bool
    offer: Offer | None
    timeout: float | None
    attempt: int
    resume: int | None
    metadata: Headers


def user_headers(given: HeaderInput) -> Headers:
    """The user's headers of a request that opens a stream, or of its end.

    Raises:
        InvalidArgument: one has a name that the library or the server keeps to itself.
    """
    headers = Headers(given)
    for key in headers:
        check_key(key)
    return headers


def check_key(key: str) -> None:
    """Raise InvalidArgument if a header's name is one that the library or the server keeps to itself."""
    if key.lower().startswith(RESERVED):
        raise InvalidArgument(f"header {key!r}: names with Natsync- and Nats- are reserved")


def with_timeout(headers: HeaderInput, timeout: float | None) -> Headers:
    """The headers, and how much time is left."""
    block = Headers(headers)
    if timeout is not None:
        block[TIMEOUT_HEADER] = _milliseconds(timeout)
    return block


def _milliseconds(timeout: float) -> str:
    return str(max(1, math.ceil(timeout * 1000)))  # rounded up: the requester's runs out first


def encode_opening(
    headers: Headers, offer: Offer | None, timeout: float | None = None, attempt: int = 0, resume: int | None = None
) -> bytes:
    """The header block of a request that opens a stream; offer=None: a plain one."""
    fields = [(STREAM_HEADER, PLAIN_VERSION if offer is None else offer.encode())]
    if timeout is not None:
        fields.append((TIMEOUT_HEADER, _milliseconds(timeout)))
    if attempt:
        fields.append((ATTEMPT_HEADER, str(attempt)))
    if resume is not None:
        fields.append((RESUME_HEADER, str(resume)))
    block = Headers(headers)
    block._fields += fields  # their names are reserved, so none of them is there already
    return block.encode()


def decode_opening(headers: Headers) -> Opening:
    """The opening of a request; what is missing or malformed counts as not said."""
    if not headers:
        return Opening(False, None, None, 0, None, Headers())
    said: dict[str, str] = {}
    metadata = Headers()
    for field in headers._fields:
        name = field[0].lower()
        if name.startswith(RESERVED):
            said.setdefault(name, field[1])
        else:
            metadata._fields.append(field)
    milliseconds, attempt = said.get(_TIMEOUT, ""), said.get(_ATTEMPT, "")
    resume, offered = said.get(_RESUME, ""), said.get(_STREAM)
    return Opening(
        natsync=offered is not None,
        offer=None if offered is None else decode_offer(offered),
        timeout=int(milliseconds) / 1000 if _is_number(milliseconds) else None,
        attempt=int(attempt) if _is_number(attempt) else 0,
        resume=int(resume) if _is_number(resume) else None,
        metadata=metadata,
    )


# -- the end ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """How a stream ended, beyond its text.

    Attributes:
        code: one of Code, or another number.
        details: anything with a JSON form.
        reason: LOST, DEADLINE or REFUSED, if it is not the handler that failed.
        retry_after: seconds, of a refusal.
        only: a refusal by the only responder that was asked.
        sent: chunks sent before, for whoever can go on from there.
    """

    code: int | None = None
    details: Any = None
    reason: str | None = None
    retry_after: float | None = None
    only: bool = False
    sent: int | None = None


def encode_status(status: Status, text: str = "") -> Headers:
    """The headers of a message that ends a stream with an error."""
    code = status.code if isinstance(status.code, int) and status.code else Code.UNKNOWN
    name = Code(code).name if code in Code._value2member_map_ else "CODE"
    headers = Headers({STATUS_HEADER: f"{int(code)} {name}"})
    if status.reason is not None:
        headers[REASON_HEADER] = status.reason
    if status.details is not None:
        headers[DETAILS_HEADER] = as_json(status.details)
    if status.retry_after is not None:
        headers[RETRY_AFTER_HEADER] = f"{status.retry_after:g}"
    if status.only:
        headers[ONLY_HEADER] = "1"
    if status.sent is not None:
        headers[RESUME_HEADER] = str(status.sent)
    headers[SERVICE_ERROR_HEADER] = header_text(text)
    headers[SERVICE_CODE_HEADER] = str(int(code))
    return headers


def header_text(text: str) -> str:
    """A text as the value of a header: one line, without what does not go there, and not too long."""
    clean = text.encode("utf-8", "replace").decode().replace("\0", "")
    return " ".join(clean.split())[:ERROR_TEXT]


def decode_headers(block: bytes | None) -> Headers:
    """A message's headers, but for SEQ_HEADER; none if they are malformed."""
    try:
        headers = Headers() if block is None else _headers.decode(block)
    except ProtocolError:
        return Headers()
    headers.pop(SEQ_HEADER, None)
    return headers


def as_json(details: Any) -> str:
    """Details as JSON; what has no JSON form goes as text: an error must not get lost over its details."""
    try:
        return json.dumps(details, default=str)
    except Exception:  # whatever the details' own __str__ raises
        return json.dumps(f"<{type(details).__name__} without a JSON form>")


def decode_status(headers: Headers) -> Status:
    """The status of an error end; what is missing or malformed counts as not said."""
    number = headers.get(STATUS_HEADER, "").partition(" ")[0]
    try:
        retry_after = check_timeout(float(headers[RETRY_AFTER_HEADER]))
    except (KeyError, ValueError):
        retry_after = None
    sent = headers.get(RESUME_HEADER, "")
    return Status(
        code=int(number) if _is_number(number) else None,
        details=_headers.details_of(headers),
        reason=headers.get(REASON_HEADER),
        retry_after=retry_after,
        only=ONLY_HEADER in headers,
        sent=int(sent) if _is_number(sent) else None,
    )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 12
