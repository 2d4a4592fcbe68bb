"""The wire of streams, as pure functions: headers that open and end a stream, and the frames and control between.

In plain mode, which any NATS client understands, chunks are bare messages and a sentinel payload ends them; all that
is natsync's is a marked reply subject on them, by which a vanished requester is noticed. In framed mode the reply
subject of a message says what it is, `<responder's inbox>.<stream>.<op>.<seq>`, and the payload stays the
application's. docs/protocol.md describes both.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from dataclasses import dataclass
from typing import Any

from natsync import headers as _headers
from natsync.concurrency import check_timeout
from natsync.errors import Code, InvalidArgument, ProtocolError
from natsync.headers import HeaderInput, Headers
from natsync.message import Item

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
#: Error end: the details, as JSON.
DETAILS_HEADER = "Natsync-Details"
#: Refusal: seconds after which a retry may succeed.
RETRY_AFTER_HEADER = "Natsync-Retry-After"
#: Refusal: the responder is the only one that was asked, being a member of a queue group.
ONLY_HEADER = "Natsync-Only"
#: Error end, and error replies to requests: the error's text and number, as the tools of NATS services read them.
SERVICE_ERROR_HEADER = "Nats-Service-Error"
SERVICE_CODE_HEADER = "Nats-Service-Error-Code"
#: Frame, where the reply subject does not arrive as it was sent (across accounts): "<op>.<seq> <responder>.<stream>".
SEQ_HEADER = "Natsync-Seq"
_SEQ_LINE = b"\r\nNatsync-Seq:"
#: Header names with these beginnings are the library's and the server's own.
RESERVED = ("natsync-", "nats-")

VERSION = "1"
#: What a requester says that wants a plain stream: it is one still, to handlers that answer requests, too.
PLAIN_VERSION = "0"
#: How a request's reply subject begins where it crosses from one account to another.
IMPORTED = b"_R_."
NO_RESPONDERS_STATUS = 503

#: The token in front of the last one in a plain stream's control subject: <inbox prefix>.<unique>.nsy0.<number>
PLAIN_MARK = b".nsy0."
#: The token in front of the stream's number in a frame's reply subject.
FRAMED_MARK = b".nsy1."

#: What ends a stream, as payload. In framed mode they are for people who watch; the op is what counts.
END_PAYLOAD = b"__STREAM_END__"
ERROR_PREFIX = b"__STREAM_ERROR__:"

#: Characters of an error's text that fit into a header.
ERROR_TEXT = 1000


class Op:
    """What a frame is: the letter in its reply subject. All but `h` and the numbers 0 count as one seq each."""

    ACCEPT = b"a"  # 0: the handler starts
    REFUSED = b"r"  # 0: the handler never ran
    DATA = b"d"  # one chunk, or the last fragment of one
    FRAGMENT = b"f"  # more of the chunk follows
    BATCH = b"b"  # several chunks, the first of which has the seq
    END = b"e"
    ERROR = b"x"  # an error end; with seq 0: the stream is not known (any more)
    PROBE = b"h"  # "I have sent up to seq": wants an answer


class Control:
    """What a requester says: the first byte of its payload."""

    ACK = b"+"  # "+R L B": has everything up to R; up to seq L and byte B may be sent
    MISSING = b"!"  # "!R L B": the same, and what is behind R did not come
    CANCEL = b"x"  # "x <code> <text>"
    PING = b"?"  # wants a PROBE


def control_inbox(inbox_prefix: str, unique: str, mark: bytes) -> str:
    """The subject under which a responder takes control messages and learns that a requester is gone."""
    return f"{inbox_prefix}.{unique}{mark.decode().rstrip('.')}"


# -- frames ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Address:
    """Where a frame comes from, and what it is.

    Attributes:
        stream: `<responder's inbox>.<stream>`: tells one responder's stream from another's.
        op, seq: as in Op.
    """

    stream: bytes
    op: bytes
    seq: int


def decode_address(reply: bytes | None, block: bytes | None) -> Address | None:
    """The address of a frame; None if the message is none."""
    if block is not None and _SEQ_LINE in block:
        # Whoever answers the frame publishes to its reply subject: it must be one that can be a responder's.
        honest = reply is None or reply.startswith(IMPORTED) or FRAMED_MARK in reply
        return _address_in_headers(block) if honest else None
    found = None if reply is None else _REPLY.fullmatch(reply)
    return None if found is None else Address(found[1], found[2], int(found[3]))


_REPLY = re.compile(rb"(.+\.nsy1\.[^.]+)\.([^.]+)\.(\d{1,15})")
_SEQ_VALUE = re.compile(rb"\r\nNatsync-Seq: ?([a-z])\.(\d{1,15}) ([^ \r\n]+)\r\n")


def _address_in_headers(block: bytes) -> Address | None:
    found = _SEQ_VALUE.search(block)
    return None if found is None else Address(found[3], found[1], int(found[2]))


def is_unheard(item: Item) -> bool:
    """Whether the server says that nobody listens. To be asked before an empty message counts as anything else."""
    _, block, payload = item
    return block is not None and not payload and _headers.status_of(block) == NO_RESPONDERS_STATUS


def encode_seq(stream: bytes, op: bytes, seq: int) -> str:
    """The value of SEQ_HEADER."""
    return f"{op.decode()}.{seq} {stream.decode()}"


def encode_batch(chunks: list[bytes]) -> bytes:
    """The payload of several chunks: their number, the length of each (32 bits, big-endian), and the chunks."""
    return b"".join((struct.pack(f">{len(chunks) + 1}I", len(chunks), *map(len, chunks)), *chunks))


def decode_batch(payload: bytes) -> list[bytes]:
    """The chunks of a batch.

    Raises:
        ProtocolError: the lengths do not add up.
    """
    count = int.from_bytes(payload[:4], "big")
    begin = 4 + 4 * count
    if len(payload) < max(8, begin):
        raise ProtocolError(f"a batch of {count} chunks in {len(payload)} bytes")
    ends = list(itertools.accumulate(struct.unpack_from(f">{count}I", payload, 4), initial=begin))
    if ends[-1] != len(payload):
        raise ProtocolError(f"the chunks of a batch are {ends[-1]} bytes, and {len(payload)} came")
    return [payload[start:end] for start, end in itertools.pairwise(ends)]


# -- control ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ack:
    """A requester's account: what it has, and how much more it takes.

    Attributes:
        received: it has everything up to this seq.
        limit, limit_bytes: the highest seq, and the highest offset in application bytes, that may be sent.
        missing: whether what was sent behind `received` did not come.
    """

    received: int
    limit: int
    limit_bytes: int
    missing: bool = False

    def encode(self) -> bytes:
        sign = Control.MISSING if self.missing else Control.ACK
        return b"%b%d %d %d" % (sign, self.received, self.limit, self.limit_bytes)


_ACK = re.compile(rb"([+!])(\d{1,18}) (\d{1,18}) (\d{1,18})")


def decode_ack(payload: bytes) -> Ack | None:
    """The account in a control payload; None if it is not one."""
    found = _ACK.fullmatch(payload)
    if found is None:
        return None
    return Ack(int(found[2]), int(found[3]), int(found[4]), found[1] == Control.MISSING)


def encode_cancel(reason: str, code: int = Code.CANCELLED) -> bytes:
    """The payload by which a requester cancels."""
    return f"x {int(code)} {reason[:ERROR_TEXT]}".encode("utf-8", "replace")


def decode_cancel(payload: bytes) -> str | None:
    """The reason if the control payload is a cancel, else None."""
    if payload[:2] != b"x ":
        return None
    return payload[2:].partition(b" ")[2].decode("utf-8", "replace") or "cancelled"


# -- the request -----------------------------------------------------------------------------------------------------


def cancel_code(payload: bytes) -> int:
    """The code of a cancel; 0 if it is malformed."""
    digits = payload[2:].partition(b" ")[0]
    return int(digits) if digits.isdigit() and len(digits) <= 9 else 0


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
        fields = {
            "w": self.window,
            "b": self.window_bytes,
            "g": round(self.grace * 1000),
            "hb": round(self.heartbeat * 1000),
            "m": self.chunk_bytes,
        }
        text = ";".join(f"{key}={min(value, _LARGEST)}" for key, value in fields.items())
        return f"{VERSION};{text};cap={'b' if self.batches else ''}"


#: The largest number that is understood.
_LARGEST = 10**12 - 1
#: What an offer says that leaves a field out; a peer should leave out none.
_UNSAID = {"w": "8192", "b": "4194304", "g": "10000", "hb": "5000", "m": str(64 << 20), "cap": ""}
#: No stream can do with less: a fragment is a quarter of it.
LEAST_WINDOW_BYTES = 4096


def decode_offer(text: str) -> Offer | None:
    """The offer in STREAM_HEADER; None if it is of another version, or makes no sense: then the stream is plain."""
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


@dataclass(frozen=True)
class Opening:
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
        block[TIMEOUT_HEADER] = str(max(1, math.ceil(timeout * 1000)))  # rounded up: the requester's runs out first
    return block


def encode_opening(
    headers: Headers, offer: Offer | None, timeout: float | None = None, attempt: int = 0, resume: int | None = None
) -> bytes:
    """The header block of a request that opens a stream; offer=None: a plain one."""
    block = Headers(headers)
    block[STREAM_HEADER] = PLAIN_VERSION if offer is None else offer.encode()
    block = with_timeout(block, timeout)
    if attempt:
        block[ATTEMPT_HEADER] = str(attempt)
    if resume is not None:
        block[RESUME_HEADER] = str(resume)
    return block.encode()


def decode_opening(headers: Headers) -> Opening:
    """The opening of a request; what is missing or malformed counts as not said."""
    milliseconds, attempt = headers.get(TIMEOUT_HEADER, ""), headers.get(ATTEMPT_HEADER, "")
    resume = headers.get(RESUME_HEADER, "")
    metadata = Headers()
    for key, value in headers.fields():
        if not key.lower().startswith(RESERVED):
            metadata._fields.append((key, value))
    return Opening(
        natsync=STREAM_HEADER in headers,
        offer=decode_offer(headers.get(STREAM_HEADER, "")),
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
        headers[DETAILS_HEADER] = _as_json(status.details)
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


def _as_json(details: Any) -> str:
    """Details as JSON; what has no JSON form goes as text: an error must not get lost over its details."""
    try:
        return json.dumps(details, default=str)
    except Exception:  # whatever the details' own __str__ raises
        return json.dumps(f"<{type(details).__name__} without a JSON form>")


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
    sent = headers.get(RESUME_HEADER, "")
    return Status(
        code=int(number) if _is_number(number) else None,
        details=details,
        reason=headers.get(REASON_HEADER),
        retry_after=retry_after,
        only=ONLY_HEADER in headers,
        sent=int(sent) if _is_number(sent) else None,
    )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 12
