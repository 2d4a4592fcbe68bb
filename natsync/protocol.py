"""The NATS client protocol as values: what was received becomes events, what is to be sent becomes bytes.

Pure: no I/O, no threads, no clock. Parser reads what a server sends, RequestParser what a client sends (for peers that
play the server). Both accept any split of the input, any run of spaces and tabs, operation names in any case; they
check the CRLF behind every payload, and bound what an endless line or a huge length may make them hold.

Messages come as batches: consecutive messages of one subscription and one subject in one read are one Batch, so that
whatever waits for them is found and woken once a read, not once a message.
"""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass
from typing import Any, TypeAlias

from natsync.errors import ProtocolError
from natsync.message import Item

#: Longest control line in bytes before it is taken for garbage; twice the server's own limit (max_control_line 4096)
#: because MSG lines carry a sid more than the PUB lines that the server limits.
MAX_CONTROL_LINE = 8192
#: The largest payload that is formatted into its frame with the rest; of larger ones that takes 15 times as long as to
#: join the parts (CPython moves them several times).
FORMATTED_BYTES = 32 << 10
#: Longest INFO line in bytes; INFO is not bound by the control-line limit (clusters list many URLs in it).
MAX_INFO_LINE = 1 << 20
#: Largest message in bytes; the hard limit of nats-server's max_payload.
MAX_MESSAGE_BYTES = 64 << 20

PING = b"PING\r\n"
PONG = b"PONG\r\n"
OK = b"+OK\r\n"


class Op(enum.Enum):
    """Operations without arguments."""

    PING = "PING"
    PONG = "PONG"
    OK = "+OK"


class Batch:
    """Consecutive messages to one subscription on one subject.

    Attributes:
        sid, subject: as on the wire.
        items: a list of (reply or None, header block or None, payload).
    """

    __slots__ = ("items", "sid", "subject")

    def __init__(self, sid: bytes, subject: bytes, items: list[Item]) -> None:
        self.sid = sid
        self.subject = subject
        self.items = items

    def __repr__(self) -> str:
        return f"Batch({self.sid!r}, {self.subject!r}, {self.items!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Batch):
            return NotImplemented
        return (self.sid, self.subject, self.items) == (other.sid, other.subject, other.items)

    __hash__ = None  # type: ignore[assignment]  # mutable


@dataclass(frozen=True)
class Info:
    """The server's INFO: its limits, features and peers."""

    fields: dict[str, Any]


@dataclass(frozen=True)
class Err:
    """-ERR with its text, quotes removed."""

    text: str


@dataclass(frozen=True)
class Connect:
    """A client's CONNECT."""

    fields: dict[str, Any]


@dataclass(frozen=True)
class Sub:
    """A client's SUB."""

    subject: bytes
    queue: bytes | None
    sid: bytes


@dataclass(frozen=True)
class Unsub:
    """A client's UNSUB; max_messages None = at once."""

    sid: bytes
    max_messages: int | None


@dataclass(frozen=True)
class Pub:
    """A client's PUB or HPUB."""

    subject: bytes
    reply: bytes | None
    block: bytes | None
    payload: bytes


Event: TypeAlias = Batch | Info | Err | Op
Request: TypeAlias = Connect | Sub | Unsub | Pub | Op

_CRLF = b"\r\n"
_LONGEST_LINE = MAX_CONTROL_LINE + len(_CRLF)
_MOST_DIGITS = 9
_WORD = re.compile(rb"[^ \t]+")
_MSG = re.compile(
    rb"[Mm][Ss][Gg][ \t]+([^ \t\r\n]+)[ \t]+([^ \t\r\n]+)[ \t]+(?:([^ \t\r\n]+)[ \t]+)?(\d{1,9})[ \t]*\r\n"
)
_HMSG = re.compile(
    rb"[Hh][Mm][Ss][Gg][ \t]+([^ \t\r\n]+)[ \t]+([^ \t\r\n]+)[ \t]+(?:([^ \t\r\n]+)[ \t]+)?"
    rb"(\d{1,9})[ \t]+(\d{1,9})[ \t]*\r\n"
)


class _Buffer:
    """Received bytes that are not parsed yet; joins pieces only once enough has come."""

    __slots__ = ("_have", "_need", "_parts")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._have = 0
        self._need = 0

    def add(self, data: bytes) -> bytes | None:
        """The whole input so far, or None while what the last keep() asked for is not there."""
        if not self._parts:
            return data
        self._parts.append(data)
        self._have += len(data)
        if self._have < self._need:
            return None
        whole = b"".join(self._parts)
        self._parts.clear()
        return whole

    def keep(self, rest: bytes, need: int = 0) -> None:
        """Put the unparsed rest back; parsing goes on when it has grown to `need` bytes."""
        if rest:
            self._parts.append(rest)
        self._have, self._need = len(rest), need


class Parser:
    """Turns what a server sends into events.

    Raises ProtocolError from feed() at the first byte that cannot be NATS, after which the parser must be thrown away;
    the events before it are in `.events_before_error`.
    """

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._max_message_bytes = max_message_bytes
        self._buffer = _Buffer()
        self.events_before_error: list[Event] = []

    def feed(self, data: bytes) -> list[Event]:
        """Parse what has come; an incomplete rest is kept for the next call.

        Raises:
            ProtocolError: a malformed line or frame, or one longer than the limits.
        """
        buf = self._buffer.add(data)
        if buf is None:
            return []
        events: list[Event] = []
        try:
            self._parse(buf, events)
        except ProtocolError:
            self.events_before_error = events
            raise
        return events

    def _parse(self, buf: bytes, events: list[Event]) -> None:
        """Append the events of buf; what is incomplete goes back into the buffer."""
        limit = self._max_message_bytes
        pos, size = 0, len(buf)
        # The loop is written out, not split into calls: it runs once a message, and a call costs as much as the parse.
        match_msg = _MSG.match
        last_sid = last_subject = b""
        last_reply: bytes | None = None
        items: list[Item] = []
        prefix = b""  # the control line of the message before up to its size, where such lines repeat,
        line, length = b"", 0  # and the whole of it while the size repeats too, and the size
        stem = reply_stem = b""  # the control line up to its reply's last dot, where nothing but numbers follow
        while pos < size:
            if prefix and buf.startswith(prefix, pos):
                # A stream's messages differ in nothing but their size, if in that: half the cost of the regular
                # expression, or a quarter. Whatever is not in order here is left to it.
                if line and buf.startswith(line, pos):
                    begin = pos + len(line)
                    end = begin + length
                    if buf[end : end + 2] == _CRLF:
                        items.append((last_reply, None, buf[begin:end]))
                        pos = end + 2
                        continue
                at = pos + len(prefix)
                begin = buf.find(_CRLF, at, at + _MOST_DIGITS + 2) + 2
                digits = buf[at : begin - 2]
                if begin > at and digits.isdigit():
                    end = begin + int(digits)
                    if end - begin <= limit and buf[end : end + 2] == _CRLF:
                        line = buf[pos:begin] if end - begin == length else b""
                        length = end - begin
                        items.append((last_reply, None, buf[begin:end]))
                        pos = end + 2
                        continue
            elif stem and buf.startswith(stem, pos):
                # The same for numbered ones: frames that are sent one by one, requests of one client.
                at = pos + len(stem)
                begin = buf.find(_CRLF, at, at + 2 * _MOST_DIGITS + 3) + 2
                number, _, digits = buf[at : begin - 2].partition(b" ")
                if begin > at and number.isdigit() and digits.isdigit():
                    end = begin + int(digits)
                    if end - begin <= limit and buf[end : end + 2] == _CRLF:
                        last_reply = reply_stem + number
                        items.append((last_reply, None, buf[begin:end]))
                        pos = end + 2
                        continue
            match = match_msg(buf, pos)
            if match is not None:
                subject, sid, reply, digits = match.groups()
                begin = start = match.end()
                end = start + int(digits)
                block = None
            else:
                match = _HMSG.match(buf, pos)
                if match is None:
                    pos = self._line(buf, pos, events)
                    if not pos:
                        return
                    last_sid = prefix = stem = b""
                    continue
                subject, sid, reply, header_digits, digits = match.groups()
                begin = match.end()
                start = begin + int(header_digits)
                end = begin + int(digits)
                if start > end:
                    raise ProtocolError(f"HMSG with more header bytes than bytes: {match.group()[:80]!r}")
                block = buf[begin:start]
            if end - begin > limit or begin - pos > _LONGEST_LINE:
                raise self._too_large(end - begin)
            if end + 2 > size:
                self._buffer.keep(buf[pos:], end + 2 - pos)
                return
            if buf[end : end + 2] != _CRLF:
                raise ProtocolError(f"no CRLF after a payload of {end - start} bytes")
            item = (reply, block, buf[start:end])
            if subject == last_subject and sid == last_sid:
                items.append(item)
                prefix = stem = b""
                if block is not None:
                    pass
                elif reply == last_reply:
                    prefix, line, length = buf[pos : match.start(4)], b"", end - begin
                elif reply is not None and last_reply is not None:
                    reply_stem = reply[: reply.rfind(b".") + 1]
                    if last_reply.startswith(reply_stem):
                        stem = buf[pos : match.start(3) + len(reply_stem)]
            else:
                last_sid, last_subject, items, prefix, stem = sid, subject, [item], b"", b""
                events.append(Batch(sid, subject, items))
            last_reply = reply
            pos = end + 2

    def _too_large(self, size: int) -> ProtocolError:
        if size > self._max_message_bytes:
            return ProtocolError(f"message of {size} bytes; the limit is {self._max_message_bytes} bytes")
        return ProtocolError(f"control line of more than {MAX_CONTROL_LINE} bytes")

    def _line(self, buf: bytes, pos: int, events: list[Event]) -> int:
        """Parse an operation other than a message; where the next begins, 0 if the line is incomplete (and kept)."""
        line, after = _take_line(buf, pos, _is_info)
        if line is None:
            self._buffer.keep(buf[pos:])
            return 0
        name, _, rest = line.replace(b"\t", b" ").partition(b" ")
        name = name.upper()
        if name == b"PING":
            events.append(Op.PING)
        elif name == b"PONG":
            events.append(Op.PONG)
        elif name == b"+OK":
            events.append(Op.OK)
        elif name == b"-ERR":
            events.append(Err(_quoted(rest)))
        elif name == b"INFO":
            events.append(Info(_json_object(rest, "INFO")))
        else:
            raise ProtocolError(f"not an operation of a server: {line[:80]!r}")
        return after


class RequestParser:
    """Turns what a client sends into requests; raises ProtocolError as Parser does. For peers that play the server."""

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._max_message_bytes = max_message_bytes
        self._buffer = _Buffer()

    def feed(self, data: bytes) -> list[Request]:
        """Parse what has come; an incomplete rest is kept for the next call."""
        buf = self._buffer.add(data)
        requests: list[Request] = []
        pos = 0
        while buf is not None and pos < len(buf):
            line, after = _take_line(buf, pos, _is_connect)
            if line is None:
                self._buffer.keep(buf[pos:])
                break
            words = _WORD.findall(line)
            name = words[0].upper() if words else b""
            if name in (b"PUB", b"HPUB"):
                subject, reply, header_size, size = self._pub_words(words, line)
                if after + size + 2 > len(buf):
                    self._buffer.keep(buf[pos:], after + size + 2 - pos)
                    break
                requests.append(_cut(buf, after, subject, reply, header_size, size))
                pos = after + size + 2
                continue
            requests.append(_request(name, words, line))
            pos = after
        return requests

    def _pub_words(self, words: list[bytes], line: bytes) -> tuple[bytes, bytes | None, int, int]:
        numbers = 1 if words[0].upper() == b"PUB" else 2
        names, sizes = words[1:-numbers], words[-numbers:]
        if len(names) not in (1, 2) or not all(map(_is_number, sizes)):
            raise ProtocolError(f"malformed: {line[:80]!r}")
        size, header_size = int(sizes[-1]), int(sizes[0]) if numbers == 2 else 0
        if header_size > size or size > self._max_message_bytes:
            raise ProtocolError(f"impossible length: {line[:80]!r}")
        return names[0], names[1] if len(names) == 2 else None, header_size, size


def _cut(buf: bytes, start: int, subject: bytes, reply: bytes | None, header_size: int, size: int) -> Pub:
    if buf[start + size : start + size + 2] != _CRLF:
        raise ProtocolError(f"no CRLF after a payload of {size} bytes")
    block = buf[start : start + header_size] if header_size else None
    return Pub(subject, reply, block, buf[start + header_size : start + size])


def _request(name: bytes, words: list[bytes], line: bytes) -> Request:
    if name == b"PING":
        return Op.PING
    if name == b"PONG":
        return Op.PONG
    if name == b"CONNECT":
        return Connect(_json_object(line.strip()[len(name) :], "CONNECT"))
    if name == b"SUB" and len(words) in (3, 4):
        return Sub(words[1], words[2] if len(words) == 4 else None, words[-1])
    if name == b"UNSUB" and len(words) in (2, 3) and all(map(_is_number, words[2:])):
        return Unsub(words[1], int(words[2]) if len(words) == 3 else None)
    raise ProtocolError(f"not an operation of a client: {line[:80]!r}")


def _is_number(word: bytes) -> bool:
    return word.isdigit() and len(word) <= _MOST_DIGITS


def _is_info(start: bytes) -> bool:
    return start[:4].upper() == b"INFO"


def _is_connect(start: bytes) -> bool:
    return start[:7].upper() == b"CONNECT"


def _take_line(buf: bytes, pos: int, is_long: Any) -> tuple[bytes | None, int]:
    """The line at pos without its CRLF, and where the next begins; (None, 0) if its end has not come."""
    end = buf.find(_CRLF, pos)
    # A CR at the end of what has come may be half of the line's own end.
    length = (len(buf) - buf.endswith(b"\r") if end < 0 else end) - pos
    if length > MAX_CONTROL_LINE and (length > MAX_INFO_LINE or not is_long(buf[pos : pos + 8])):
        raise ProtocolError(f"control line of more than {MAX_CONTROL_LINE} bytes: {buf[pos : pos + 40]!r}...")
    return (None, 0) if end < 0 else (buf[pos:end], end + 2)


def _quoted(raw: bytes) -> str:
    return raw.strip().strip(b"'").decode("utf-8", "replace")


def _json_object(raw: bytes, what: str) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} is not JSON: {raw[:80]!r}") from error
    if not isinstance(fields, dict):
        raise ProtocolError(f"{what} is not a JSON object: {raw[:80]!r}")
    return fields


# -- encoders --------------------------------------------------------------------------------------------------------


def encode_sub(subject: bytes, queue: bytes | None, sid: bytes) -> bytes:
    """SUB, in a queue group or not."""
    return b"SUB %b %b\r\n" % (subject, sid) if queue is None else b"SUB %b %b %b\r\n" % (subject, queue, sid)


def encode_unsub(sid: bytes, max_messages: int | None = None) -> bytes:
    """UNSUB at once, or after max_messages in all."""
    return b"UNSUB %b\r\n" % sid if max_messages is None else b"UNSUB %b %d\r\n" % (sid, max_messages)


def encode_pub(subject: bytes, reply: bytes | None, block: bytes | None, payload: bytes) -> bytes:
    """PUB, or HPUB if there is a header block."""
    size = len(payload)
    if size > FORMATTED_BYTES:
        return b"".join((_pub_line(subject, reply, block, size), payload, _CRLF))
    if block is not None:
        to = subject if reply is None else b"%b %b" % (subject, reply)
        return b"HPUB %b %d %d\r\n%b%b\r\n" % (to, len(block), len(block) + size, block, payload)
    if reply is None:
        return b"PUB %b %d\r\n%b\r\n" % (subject, size, payload)
    return b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, size, payload)


def _pub_line(subject: bytes, reply: bytes | None, block: bytes | None, size: int) -> bytes:
    """What goes before a payload of this size."""
    to = subject if reply is None else b"%b %b" % (subject, reply)
    if block is None:
        return b"PUB %b %d\r\n" % (to, size)
    return b"HPUB %b %d %d\r\n%b" % (to, len(block), len(block) + size, block)
