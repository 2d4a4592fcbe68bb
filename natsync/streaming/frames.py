"""The wire between the ends of a stream, as pure functions: frames, and control.

In plain mode, which any NATS client understands, chunks are bare messages and a sentinel payload ends them; all that
is natsync's is a marked reply subject on them, by which a vanished requester is noticed. In framed mode the reply
subject of a message says what it is, `<responder's inbox>.<stream>.<op>.<seq>`, and the payload stays the
application's. docs/protocol.md describes both; what a request and an end say in headers is in terms.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass

from natsync import headers as _headers
from natsync.errors import Code, ProtocolError
from natsync.message import Item
from natsync.streaming.terms import ERROR_TEXT

_SEQ_LINE = b"\r\nNatsync-Seq:"
#: How a request's reply subject begins where it crosses from one account to another.
IMPORTED = b"_R_."
NO_RESPONDERS_STATUS = 503
#: The highest number of a stream, and of what it sends.
MOST = 10**15 - 1

#: The token in front of the last one in a plain stream's control subject: <inbox prefix>.<unique>.nsy0.<number>
PLAIN_MARK = b".nsy0."
#: The token in front of the stream's number in a frame's reply subject.
FRAMED_MARK = b".nsy1."

#: What ends a stream, as payload. In framed mode they are for people who watch; the op is what counts.
END_PAYLOAD = b"__STREAM_END__"
ERROR_PREFIX = b"__STREAM_ERROR__:"


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


def encode_batch(chunks: list[bytes], sizes: list[int] | None = None) -> bytes:
    """The payload of several chunks: their number, the length of each (32 bits, big-endian), and the chunks."""
    sizes = sizes or list(map(len, chunks))
    return b"".join((struct.pack(f">{len(sizes) + 1}I", len(sizes), *sizes), *chunks))


def decode_batch(payload: bytes) -> list[bytes]:
    """The chunks of a batch.

    Raises:
        ProtocolError: the lengths do not add up.
    """
    count = int.from_bytes(payload[:4], "big")
    begin = 4 + 4 * count
    if len(payload) < max(8, begin):
        raise ProtocolError(f"a batch of {count} chunks in {len(payload)} bytes")
    sizes = struct.unpack_from(f">{count}I", payload, 4)
    if begin + sum(sizes) != len(payload):
        raise ProtocolError(f"the chunks of a batch are {begin + sum(sizes)} bytes, and {len(payload)} came")
    reader = io.BytesIO(payload)  # which copies nothing, and takes the pieces off in C, at a third of a slice's cost
    reader.seek(begin)
    return list(map(reader.read, sizes))


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


def cancel_code(payload: bytes) -> int:
    """The code of a cancel; 0 if it is malformed."""
    digits = payload[2:].partition(b" ")[0]
    return int(digits) if digits.isdigit() and len(digits) <= 9 else 0
