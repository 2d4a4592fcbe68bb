"""natsync.protocol: every case whole, byte by byte and with a tail; limits, splits, garbage, and what it costs."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from natsync import protocol
from natsync.errors import ProtocolError
from natsync.protocol import (
    FORMATTED_BYTES,
    MAX_CONTROL_LINE,
    MAX_INFO_LINE,
    MAX_MESSAGE_BYTES,
    Batch,
    Connect,
    Err,
    Info,
    Op,
    Parser,
    Pub,
    RequestParser,
    Sub,
    Unsub,
    encode_pub,
    encode_sub,
    encode_unsub,
)
from wire import encode_connect, encode_err, encode_info, encode_msg

BLOCK = b"NATS/1.0\r\nA: 1\r\n\r\n"
LOOKS_LIKE_PROTOCOL = b"\r\nMSG a 1 3\r\nxyz\r\nPING\r\n-ERR 'x'\r\n\r\n"


def one(sid: bytes, subject: bytes, payload: bytes, reply: bytes | None = None, block: bytes | None = None) -> Batch:
    return Batch(sid, subject, [(reply, block, payload)])


#: What a server sends -> the events it means: one frame each, so that it can be cut anywhere.
FROM_SERVER: dict[str, tuple[bytes, list[Any]]] = {
    "ping": (b"PING\r\n", [Op.PING]),
    "pong": (b"PONG\r\n", [Op.PONG]),
    "ok": (b"+OK\r\n", [Op.OK]),
    "ping in lower case": (b"ping\r\n", [Op.PING]),
    "pong in mixed case": (b"PoNg\r\n", [Op.PONG]),
    "ok in lower case": (b"+ok\r\n", [Op.OK]),
    "ping with spaces behind": (b"PING  \t\r\n", [Op.PING]),
    "err": (b"-ERR 'Unknown Protocol Operation'\r\n", [Err("Unknown Protocol Operation")]),
    "err in lower case": (b"-err 'Stale Connection'\r\n", [Err("Stale Connection")]),
    "err without quotes": (b"-ERR \t stale\r\n", [Err("stale")]),
    "err with a quote inside": (b"-ERR 'it's over'\r\n", [Err("it's over")]),
    "err without a text": (b"-ERR\r\n", [Err("")]),
    "err that is not UTF-8": (b"-ERR '\xff'\r\n", [Err("\N{REPLACEMENT CHARACTER}")]),
    "info": (b'INFO {"max_payload":1024} \r\n', [Info({"max_payload": 1024})]),
    "info in lower case behind a tab": (b'info\t{"a":[1,"x y"]}\r\n', [Info({"a": [1, "x y"]})]),
    "info of more than a control line": (
        b'INFO {"x":"' + b"y" * (2 * MAX_CONTROL_LINE) + b'"}\r\n',
        [Info({"x": "y" * (2 * MAX_CONTROL_LINE)})],
    ),
    "msg": (b"MSG a.b 7 5\r\nhello\r\n", [one(b"7", b"a.b", b"hello")]),
    "msg with a reply": (b"MSG a.b 7 r.1 5\r\nhello\r\n", [one(b"7", b"a.b", b"hello", b"r.1")]),
    "msg with an empty payload": (b"MSG a 1 0\r\n\r\n", [one(b"1", b"a", b"")]),
    "msg with an empty payload and a reply": (b"MSG a 1 r 0\r\n\r\n", [one(b"1", b"a", b"", b"r")]),
    "msg in lower case": (b"msg a 1 2\r\nhi\r\n", [one(b"1", b"a", b"hi")]),
    "msg with runs of spaces and tabs": (b"MSG \t a\t\t1   r \t2 \t\r\nhi\r\n", [one(b"1", b"a", b"hi", b"r")]),
    "msg whose payload is CRLF": (b"MSG a 1 2\r\n\r\n\r\n", [one(b"1", b"a", b"\r\n")]),
    "msg whose payload looks like protocol": (
        b"MSG a 1 %d\r\n%b\r\n" % (len(LOOKS_LIKE_PROTOCOL), LOOKS_LIKE_PROTOCOL),
        [one(b"1", b"a", LOOKS_LIKE_PROTOCOL)],
    ),
    "msg whose payload is all bytes": (
        b"MSG a 1 256\r\n" + bytes(range(256)) + b"\r\n",
        [one(b"1", b"a", bytes(range(256)))],
    ),
    "msg on a subject that is not UTF-8": (b"MSG a.\xff 1 2\r\nhi\r\n", [one(b"1", b"a.\xff", b"hi")]),
    "msg on a subject like a number": (b"MSG 12 1 2\r\nhi\r\n", [one(b"1", b"12", b"hi")]),
    "msg whose reply is like a number": (b"MSG a 1 12 2\r\nhi\r\n", [one(b"1", b"a", b"hi", b"12")]),
    "hmsg": (b"HMSG a 1 18 20\r\n" + BLOCK[:18] + b"hi\r\n", [one(b"1", b"a", b"hi", None, BLOCK[:18])]),
    "hmsg with a reply": (
        b"HMSG a 1 r %d %d\r\n" % (len(BLOCK), len(BLOCK) + 2) + BLOCK + b"hi\r\n",
        [one(b"1", b"a", b"hi", b"r", BLOCK)],
    ),
    "hmsg with headers alone": (
        b"HMSG a 1 %d %d\r\n" % (len(BLOCK), len(BLOCK)) + BLOCK + b"\r\n",
        [one(b"1", b"a", b"", None, BLOCK)],
    ),
    "hmsg in lower case with tabs": (
        b"hmsg\ta\t1\tr\t%d\t%d\r\n" % (len(BLOCK), len(BLOCK) + 4) + BLOCK + b"\r\n\r\n\r\n",
        [one(b"1", b"a", b"\r\n\r\n", b"r", BLOCK)],
    ),
    "no responders": (
        b"HMSG r.1 1 30 30\r\nNATS/1.0 503 No Responders\r\n\r\n\r\n",
        [one(b"1", b"r.1", b"", None, b"NATS/1.0 503 No Responders\r\n\r\n")],
    ),
}

#: What a client sends -> the requests it means.
FROM_CLIENT: dict[str, tuple[bytes, list[Any]]] = {
    "ping": (b"PING\r\n", [Op.PING]),
    "pong": (b"pong \r\n", [Op.PONG]),
    "connect": (b'CONNECT {"verbose":false}\r\n', [Connect({"verbose": False})]),
    "connect in lower case behind tabs": (b'connect \t {"a":"b c"}\r\n', [Connect({"a": "b c"})]),
    "connect of more than a control line": (
        b'CONNECT {"jwt":"' + b"y" * (2 * MAX_CONTROL_LINE) + b'"}\r\n',
        [Connect({"jwt": "y" * (2 * MAX_CONTROL_LINE)})],
    ),
    "sub": (b"SUB a.* 1\r\n", [Sub(b"a.*", None, b"1")]),
    "sub in a queue group": (b"sub a.>\tworkers   1\r\n", [Sub(b"a.>", b"workers", b"1")]),
    "unsub": (b"UNSUB 1\r\n", [Unsub(b"1", None)]),
    "unsub after a number": (b"unsub\t1  5\r\n", [Unsub(b"1", 5)]),
    "pub": (b"PUB a.b 5\r\nhello\r\n", [Pub(b"a.b", None, None, b"hello")]),
    "pub with a reply": (b"PUB a.b r.1 5\r\nhello\r\n", [Pub(b"a.b", b"r.1", None, b"hello")]),
    "pub with an empty payload": (b"PUB a 0\r\n\r\n", [Pub(b"a", None, None, b"")]),
    "pub in lower case with runs of spaces and tabs": (b"pub  a\t \tr \t2\t\r\nhi\r\n", [Pub(b"a", b"r", None, b"hi")]),
    "pub whose payload looks like protocol": (
        b"PUB a %d\r\n%b\r\n" % (len(LOOKS_LIKE_PROTOCOL), LOOKS_LIKE_PROTOCOL),
        [Pub(b"a", None, None, LOOKS_LIKE_PROTOCOL)],
    ),
    "hpub": (
        b"HPUB a %d %d\r\n" % (len(BLOCK), len(BLOCK) + 2) + BLOCK + b"hi\r\n",
        [Pub(b"a", None, BLOCK, b"hi")],
    ),
    "hpub with a reply and headers alone": (
        b"hpub a r %d %d\r\n" % (len(BLOCK), len(BLOCK)) + BLOCK + b"\r\n",
        [Pub(b"a", b"r", BLOCK, b"")],
    ),
}


@dataclass(frozen=True)
class Side:
    """One direction of the protocol: its parser, and a frame that may follow any other."""

    parser: type[Parser] | type[RequestParser]
    tail: bytes
    tail_event: Any

    def parse(self, pieces: list[bytes]) -> list[Any]:
        parser = self.parser()
        return merged([event for piece in pieces for event in parser.feed(piece)])


SERVER = Side(Parser, b"MSG tail 99 4\r\nmore\r\n", one(b"99", b"tail", b"more"))
CLIENT = Side(RequestParser, b"PUB tail 4\r\nmore\r\n", Pub(b"tail", None, None, b"more"))
CASES = [
    pytest.param(side, wire, events, id=f"{who}: {name}")
    for who, side, cases in (("server", SERVER, FROM_SERVER), ("client", CLIENT, FROM_CLIENT))
    for name, (wire, events) in cases.items()
]


def merged(events: list[Any]) -> list[Any]:
    """The events with neighbouring batches of one subscription and subject joined: where reads cut does not count."""
    out: list[Any] = []
    for event in events:
        last = out[-1] if out else None
        if (
            isinstance(event, Batch)
            and isinstance(last, Batch)
            and (last.sid, last.subject) == (event.sid, event.subject)
        ):
            out[-1] = Batch(last.sid, last.subject, last.items + event.items)
        else:
            out.append(event)
    return out


def single_bytes(data: bytes) -> list[bytes]:
    return [data[index : index + 1] for index in range(len(data))]


def chunks(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


# -- the table of cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "wire", "events"), CASES)
def test_a_frame_that_comes_whole(side: Side, wire: bytes, events: list[Any]) -> None:
    assert side.parse([wire]) == events


@pytest.mark.parametrize(("side", "wire", "events"), CASES)
def test_a_frame_that_comes_byte_by_byte(side: Side, wire: bytes, events: list[Any]) -> None:
    if len(wire) > 1000:  # the middle of a long line in larger pieces: byte by byte proves nothing more there
        pieces = [*single_bytes(wire[:500]), *chunks(wire[500:-500], 1000), *single_bytes(wire[-500:])]
    else:
        pieces = single_bytes(wire)
    parser = side.parser()
    early = [event for piece in pieces[:-1] for event in parser.feed(piece)]
    assert (early, parser.feed(pieces[-1])) == ([], events)


@pytest.mark.parametrize(("side", "wire", "events"), CASES)
def test_a_frame_with_a_tail_of_the_next(side: Side, wire: bytes, events: list[Any]) -> None:
    for cut in range(len(side.tail)):
        parser = side.parser()
        assert parser.feed(wire + side.tail[:cut]) == events
        assert parser.feed(side.tail[cut:]) == [side.tail_event]


@pytest.mark.parametrize(("side", "wire", "events"), CASES)
def test_a_frame_behind_the_tail_of_another(side: Side, wire: bytes, events: list[Any]) -> None:
    for cut in range(1, len(side.tail)):
        assert side.parse([side.tail[:cut], side.tail[cut:] + wire]) == [side.tail_event, *events]


@pytest.mark.parametrize(("side", "wire", "events"), CASES)
def test_a_frame_that_comes_several_times_in_one_read(side: Side, wire: bytes, events: list[Any]) -> None:
    assert side.parse([wire * 5]) == merged(events * 5)


@pytest.mark.parametrize(("wire", "events"), FROM_SERVER.values(), ids=FROM_SERVER)
def test_a_frame_in_the_middle_of_a_stream_of_others(wire: bytes, events: list[Any]) -> None:
    """Messages that differ in their size only are the common case, and may be parsed in another way."""
    for other, other_events in FROM_SERVER.values():
        expected = merged(other_events * 3 + events + other_events * 2)
        assert SERVER.parse([other * 3 + wire + other * 2]) == expected


def test_messages_that_differ_in_their_size_only() -> None:
    payloads = [b"x" * size for size in (0, 1, 9, 10, 11, 99, 100, 1000, 0, 12345, 7)]
    for reply in (None, b"r.1", b"12"):
        wire = b"".join(encode_msg(b"a", b"1", reply, None, payload) for payload in payloads)
        expected = [Batch(b"1", b"a", [(reply, None, payload) for payload in payloads])]
        assert Parser().feed(wire) == expected
        assert SERVER.parse(single_bytes(wire[:200]) + chunks(wire[200:], 50)) == expected


REPLIES = [
    None,
    b"r",
    b"2",
    b"7",
    b"s.1",
    b"s.22",
    b"s.3",
    b"s.x",
    b"s.1.4",
    b"s.1.55",
    b"s..",
    b"s.",
    b".",
    b".9",
    b"t.1",
]


def test_messages_that_differ_in_the_number_of_their_reply() -> None:
    items = [(b"_I.x.d.%d" % (number * number), None, b"x" * (number % 12)) for number in range(1, 60)]
    wire = b"".join(encode_msg(b"a", b"1", *item) for item in items)
    assert Parser().feed(wire) == [Batch(b"1", b"a", items)]
    for cut in range(len(wire)):
        assert SERVER.parse([wire[:cut], wire[cut:]]) == [Batch(b"1", b"a", items)], cut


@given(st.lists(st.tuples(st.sampled_from(REPLIES), st.sampled_from([0, 1, 2, 2, 2, 10, 123])), max_size=40))
def test_messages_whose_replies_follow_each_other_in_any_order(shapes: list[tuple[bytes | None, int]]) -> None:
    items: list[Any] = [(reply, None, b"%d" % index * size) for index, (reply, size) in enumerate(shapes)]
    wire = b"".join(encode_msg(b"a", b"1", *item) for item in items)
    assert Parser().feed(wire) == ([Batch(b"1", b"a", items)] if items else [])


@pytest.mark.parametrize("behind", [b"x\r\n", b"3 x\r\n", b"3 \r\n", b" 3\r\n", b"3 3", b"3 99999999999999999999\r\n"])
def test_malformed_input_behind_numbered_messages_is_refused_or_waited_for(behind: bytes) -> None:
    """Exactly as behind others."""
    outcomes = []
    for reply in (b"s.%d", b"s%dx"):
        parser = Parser()
        wire = b"".join(encode_msg(b"a", b"1", reply % number, None, b"hi") for number in range(4))
        try:
            events: Any = parser.feed(wire + b"MSG a 1 s." + behind)
        except ProtocolError as error:
            events = parser.events_before_error, str(error)
        outcomes.append(str(events).replace("x'", "'").replace("b's.", "b's"))
    assert outcomes[0] == outcomes[1]


def test_a_stream_of_messages_cut_anywhere() -> None:
    sizes = (2, 2, 2, 123, 2, 14, 0)
    wire = b"".join(encode_msg(b"a", b"1", None, None, b"x" * size) for size in sizes)
    expected = [Batch(b"1", b"a", [(None, None, b"x" * size) for size in sizes])]
    for cut in range(len(wire)):
        assert SERVER.parse([wire[:cut], wire[cut:]]) == expected, cut


def test_messages_of_one_stream_with_and_without_reply_and_headers() -> None:
    """Every kind behind every other, once and in a row."""
    kinds: list[tuple[bytes | None, bytes | None]] = [
        (None, None),
        (b"r", None),
        (b"2", None),
        (b"s.1", None),
        (b"s.2", None),
        (None, BLOCK),
        (b"r", BLOCK),
    ]
    order = [kind for one in kinds for other in kinds for kind in (one, one, one, other, one)]
    items = [(reply, block, b"%d" % number) for number, (reply, block) in enumerate(order)]
    wire = b"".join(encode_msg(b"a", b"1", *item) for item in items)
    assert Parser().feed(wire) == [Batch(b"1", b"a", items)]


@pytest.mark.parametrize("side", [SERVER, CLIENT])
def test_no_bytes_are_no_events(side: Side) -> None:
    parser = side.parser()
    half = len(side.tail) // 2
    assert parser.feed(b"") == []
    assert parser.feed(side.tail[:half]) == []
    assert parser.feed(b"") == []
    assert parser.feed(side.tail[half:]) == [side.tail_event]


@pytest.mark.parametrize("side", [SERVER, CLIENT])
def test_a_large_payload_over_many_reads(side: Side) -> None:
    payload = bytes(range(256)) * 16384  # 4 MiB
    frame = b"MSG a 1 %d\r\n" if side is SERVER else b"PUB a %d\r\n"
    wire = frame % len(payload) + payload + b"\r\n" + side.tail
    expected = one(b"1", b"a", payload) if side is SERVER else Pub(b"a", None, None, payload)
    assert side.parse(chunks(wire, 65_521)) == [expected, side.tail_event]


# -- batches ---------------------------------------------------------------------------------------------------------


def test_consecutive_messages_of_one_subject_are_one_batch() -> None:
    wire = b"MSG a 1 1\r\nx\r\nMSG a 1 r 1\r\ny\r\n" + encode_msg(b"a", b"1", None, BLOCK, b"z")
    assert Parser().feed(wire) == [Batch(b"1", b"a", [(None, None, b"x"), (b"r", None, b"y"), (None, BLOCK, b"z")])]


@pytest.mark.parametrize(
    ("between", "what"),
    [
        (b"MSG b 1 0\r\n\r\n", "another subject"),
        (b"MSG a 2 0\r\n\r\n", "another subscription"),
        (b"PING\r\n", "a PING"),
        (b'INFO {"a":1}\r\n', "an INFO"),
    ],
)
def test_order_is_kept_around_what_comes_between(between: bytes, what: str) -> None:
    message = b"MSG a 1 1\r\nx\r\n"
    events = Parser().feed(message + between + message)
    assert [events[0], events[2]] == [one(b"1", b"a", b"x")] * 2, what
    assert len(events) == 3


def test_batches_of_two_reads_are_two() -> None:
    parser = Parser()
    first = parser.feed(b"MSG a 1 1\r\nx\r\n")
    second = parser.feed(b"MSG a 1 1\r\ny\r\n")
    assert (first, second) == ([one(b"1", b"a", b"x")], [one(b"1", b"a", b"y")])


def test_a_batch_equals_only_a_batch_of_the_same_messages() -> None:
    assert one(b"1", b"a", b"x") != one(b"1", b"a", b"y")
    assert one(b"1", b"a", b"x") != "a"


# -- what is refused -------------------------------------------------------------------------------------------------

LONG_NUMBER = b"9" * 5000  # more digits than int() takes of a str or bytes

MALFORMED_FROM_SERVER = {
    "an unknown operation": b"HELLO\r\n",
    "an operation of a client": b"PUB a 1\r\nx\r\n",
    "an HTTP answer": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "an empty line": b"\r\n",
    "a line of spaces": b"   \r\n",
    "msg without a size": b"MSG a 1\r\n",
    "msg without anything": b"MSG\r\n",
    "msg with a word for a size": b"MSG a 1 five\r\nhello\r\n",
    "msg with a negative size": b"MSG a 1 -5\r\nhello\r\n",
    "msg with a signed size": b"MSG a 1 +5\r\nhello\r\n",
    "msg with a fractional size": b"MSG a 1 5.0\r\nhello\r\n",
    "msg with underscores in the size": b"MSG a 1 1_0\r\n0123456789\r\n",
    "msg with digits that are not ASCII": b"MSG a 1 \xd9\xa5\r\nhello\r\n",
    "msg with a size of ten digits": b"MSG a 1 9999999999\r\n",
    "msg with a size of 5000 digits": b"MSG a 1 " + LONG_NUMBER + b"\r\n",
    "msg with a word too many": b"MSG a 1 r x 5\r\nhello\r\n",
    "msg larger than the limit": b"MSG a 1 %d\r\n" % (MAX_MESSAGE_BYTES + 1),
    "msg with a longer payload than it says": b"MSG a 1 4\r\nhello\r\n",
    "msg with a shorter payload than it says": b"MSG a 1 6\r\nhello\r\nPING\r\n",
    "msg with only LF behind the payload": b"MSG a 1 5\r\nhello\nPING\r\n",
    "msg with only LF behind the line": b"MSG a 1 5\nhello\r\n",
    "msg with CR in the subject": b"MSG a\rb 1 5\r\nhello\r\n",
    "hmsg with more headers than bytes": b"HMSG a 1 20 18\r\n" + BLOCK + b"\r\n",
    "hmsg with one size": b"HMSG a 1 18\r\n" + BLOCK + b"\r\n",
    "hmsg with a negative header size": b"HMSG a 1 -1 18\r\n" + BLOCK + b"\r\n",
    "hmsg with a word for a size": b"HMSG a 1 x 18\r\n" + BLOCK + b"\r\n",
    "hmsg larger than the limit": b"HMSG a 1 10 %d\r\n" % (MAX_MESSAGE_BYTES + 1),
    "hmsg without CRLF behind": b"HMSG a 1 18 18\r\n" + BLOCK + b"xx",
    "hmsg with a size of ten digits": b"HMSG a 1 18 9999999999\r\n",
    "info that is not JSON": b"INFO {nonsense}\r\n",
    "info that is empty": b"INFO \r\n",
    "info that is not an object": b"INFO [1]\r\n",
    "info that is not UTF-8": b'INFO {"a":"\xff\xff"}\r\n',
    "info with a number of 5000 digits": b'INFO {"a":' + LONG_NUMBER + b"}\r\n",
    "info nested too deep": b'INFO {"a":' + b"[" * 200_000 + b"}\r\n",
    "info that ends nowhere": b"INFO {" + b" " * (MAX_INFO_LINE + 1),
    "a control line that ends nowhere": b"-ERR '" + b"x" * (MAX_CONTROL_LINE + 1),
    "a control line that is too long": b"-ERR '" + b"x" * (MAX_CONTROL_LINE + 1) + b"'\r\n",
    "a msg line that ends nowhere": b"MSG a" + b"x" * (MAX_CONTROL_LINE + 1),
    "no line end in sight": b"\0" * (MAX_CONTROL_LINE + 1),
}

MALFORMED_FROM_CLIENT = {
    "an unknown operation": b"HELLO\r\n",
    "an operation of a server": b"MSG a 1 1\r\nx\r\n",
    "an empty line": b"\r\n",
    "pub without a subject": b"PUB 5\r\nhello\r\n",
    "pub without anything": b"PUB\r\n",
    "pub with a negative size": b"PUB a -5\r\nhello\r\n",
    "pub with a word for a size": b"PUB a five\r\nhello\r\n",
    "pub with a word too many": b"PUB a r x 5\r\nhello\r\n",
    "pub larger than the limit": b"PUB a %d\r\n" % (MAX_MESSAGE_BYTES + 1),
    "pub with a size of 5000 digits": b"PUB a " + LONG_NUMBER + b"\r\n",
    "pub without CRLF behind the payload": b"PUB a 4\r\nhello\r\n",
    "hpub with more headers than bytes": b"HPUB a 20 18\r\n" + BLOCK + b"\r\n",
    "hpub with one size": b"HPUB 18 18\r\n" + BLOCK + b"\r\n",
    "sub without a sid": b"SUB a\r\n",
    "sub with a word too many": b"SUB a q 1 2\r\n",
    "unsub without a sid": b"UNSUB\r\n",
    "unsub with a word for a number": b"UNSUB 1 five\r\n",
    "unsub with a negative number": b"UNSUB 1 -5\r\n",
    "unsub with a number of 5000 digits": b"UNSUB 1 " + LONG_NUMBER + b"\r\n",
    "connect that is not JSON": b"CONNECT {nonsense}\r\n",
    "connect without fields": b"CONNECT\r\n",
    "connect that is not an object": b'CONNECT "x"\r\n',
    "connect that ends nowhere": b"CONNECT {" + b" " * (MAX_INFO_LINE + 1),
    "a control line that ends nowhere": b"PUB " + b"x" * (MAX_CONTROL_LINE + 1),
}

MALFORMED = [
    pytest.param(side, wire, id=f"{who}: {name}")
    for who, side, cases in (("server", SERVER, MALFORMED_FROM_SERVER), ("client", CLIENT, MALFORMED_FROM_CLIENT))
    for name, wire in cases.items()
]


@pytest.mark.parametrize(("side", "wire"), MALFORMED)
def test_malformed_input_that_comes_whole_is_refused(side: Side, wire: bytes) -> None:
    with pytest.raises(ProtocolError):
        side.parser().feed(wire)


@pytest.mark.parametrize(("side", "wire"), MALFORMED)
def test_malformed_input_that_comes_in_pieces_is_refused(side: Side, wire: bytes) -> None:
    parser = side.parser()
    pieces = single_bytes(wire[:1000]) + chunks(wire[1000:], 50_000)
    with pytest.raises(ProtocolError):
        for piece in pieces:
            parser.feed(piece)


@pytest.mark.parametrize("wire", MALFORMED_FROM_SERVER.values(), ids=MALFORMED_FROM_SERVER)
def test_malformed_input_behind_a_stream_of_messages_is_refused(wire: bytes) -> None:
    parser = Parser()
    with pytest.raises(ProtocolError):
        parser.feed(b"MSG a 1 2\r\nhi\r\n" * 4 + wire)
    assert parser.events_before_error == [Batch(b"1", b"a", [(None, None, b"hi")] * 4)]


def test_a_refusal_does_not_repeat_all_that_came() -> None:
    with pytest.raises(ProtocolError) as caught:
        Parser().feed(b"x" * 8000 + b"\r\n")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "bad", [b"HELLO\r\n", b"MSG a 1 4\r\nhello\r\n", b"HMSG a 1 9 1\r\n", b"INFO 5\r\n", b"x" * (MAX_CONTROL_LINE + 1)]
)
def test_events_before_an_error_are_kept(bad: bytes) -> None:
    parser = Parser()
    with pytest.raises(ProtocolError):
        parser.feed(b"PING\r\nMSG a 1 1\r\nx\r\n-ERR 'Stale Connection'\r\n" + bad)
    assert parser.events_before_error == [Op.PING, one(b"1", b"a", b"x"), Err("Stale Connection")]


def test_events_of_earlier_reads_are_not_given_twice_before_an_error() -> None:
    parser = Parser()
    assert parser.feed(b"PING\r\nMSG a 1") == [Op.PING]
    with pytest.raises(ProtocolError):
        parser.feed(b" x\r\n")
    assert parser.events_before_error == []


# -- limits ----------------------------------------------------------------------------------------------------------


def test_a_message_of_the_largest_size_is_taken() -> None:
    wire = encode_msg(b"a", b"1", None, None, b"x" * 100)
    assert Parser(max_message_bytes=100).feed(wire) == [one(b"1", b"a", b"x" * 100)]


@pytest.mark.parametrize("block", [None, BLOCK])
@pytest.mark.parametrize("size", [len(BLOCK) + 83, len(BLOCK) + 1000])
def test_a_message_above_the_limit_is_refused_before_its_payload_comes(block: bytes | None, size: int) -> None:
    wire = encode_msg(b"a", b"1", None, block, b"x" * size)
    line = wire[: wire.index(b"\r\n") + 2]
    with pytest.raises(ProtocolError, match="limit is 100 bytes"):
        Parser(max_message_bytes=100).feed(line)


@pytest.mark.parametrize("block", [None, BLOCK])
def test_a_message_above_the_limit_is_refused_when_it_comes_whole(block: bytes | None) -> None:
    with pytest.raises(ProtocolError, match="limit is 100 bytes"):
        Parser(max_message_bytes=100).feed(encode_msg(b"a", b"1", None, block, b"x" * 101))


def test_a_message_above_the_limit_is_refused_behind_others_of_its_stream() -> None:
    parser = Parser(max_message_bytes=100)
    wire = b"".join(encode_msg(b"a", b"1", None, None, b"x" * size) for size in (100, 100, 100, 100, 101))
    with pytest.raises(ProtocolError, match="limit is 100 bytes"):
        parser.feed(wire)
    assert [len(batch.items) for batch in parser.events_before_error if isinstance(batch, Batch)] == [4]


def test_a_published_message_above_the_limit_is_refused() -> None:
    with pytest.raises(ProtocolError, match="impossible length"):
        RequestParser(max_message_bytes=100).feed(encode_pub(b"a", None, None, b"x" * 101))


def test_a_control_line_of_the_longest_length_is_taken() -> None:
    text = "x" * (MAX_CONTROL_LINE - len("-ERR ''"))
    assert Parser().feed(encode_err(text)) == [Err(text)]


def test_a_control_line_of_the_longest_length_is_taken_even_if_cut_inside_its_end() -> None:
    text = "x" * (MAX_CONTROL_LINE - len("-ERR ''"))
    wire = encode_err(text)
    parser = Parser()
    assert parser.feed(wire[:-1]) == []
    assert parser.feed(wire[-1:]) == [Err(text)]


@pytest.mark.parametrize("cut", [False, True])
def test_a_msg_line_longer_than_a_control_line_is_refused_however_it_comes(cut: bool) -> None:
    wire = encode_msg(b"a" * MAX_CONTROL_LINE, b"1", None, None, b"x")
    parser = Parser()
    with pytest.raises(ProtocolError):
        for piece in (wire[:-6], wire[-6:]) if cut else (wire,):
            parser.feed(piece)


def test_info_may_be_longer_than_a_control_line_when_its_end_has_not_come() -> None:
    wire = encode_info({"connect_urls": ["127.0.0.1:4222"] * 5000})
    assert len(wire) > 8 * MAX_CONTROL_LINE
    parser = Parser()
    events = [event for piece in chunks(wire, 4096) for event in parser.feed(piece)]
    assert events == [Info({"connect_urls": ["127.0.0.1:4222"] * 5000})]


def test_only_info_may_be_longer_than_a_control_line() -> None:
    with pytest.raises(ProtocolError, match="control line"):
        Parser().feed(b"INF" + b"x" * (MAX_CONTROL_LINE + 1))


# -- any split, any garbage ------------------------------------------------------------------------------------------

tokens = st.binary(min_size=1, max_size=8).filter(lambda raw: not any(byte in b" \t\r\n" for byte in raw))
sids = st.integers(1, 3).map(lambda number: b"%d" % number)
blanks = st.text(" \t", min_size=1, max_size=3).map(str.encode)
payloads = st.one_of(
    st.binary(max_size=40),
    st.lists(st.sampled_from([b"\r\n", b"MSG a 1 3\r\n", b"PING", b"\r", b"\n", b"x"]), max_size=6).map(b"".join),
)
blocks = st.one_of(st.none(), st.just(BLOCK), st.binary(min_size=1, max_size=20))
json_values = st.dictionaries(
    st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=10), st.none()), max_size=3
)


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, Batch]:
    subject, sid = draw(st.sampled_from([b"a", b"b.c"]) | tokens), draw(sids)
    reply, block, payload = draw(st.none() | tokens), draw(blocks), draw(payloads)
    words = [b"MSG" if block is None else b"HMSG", subject, sid, *([] if reply is None else [reply])]
    if block is not None:
        words.append(b"%d" % len(block))
    words.append(b"%d" % (len(block or b"") + len(payload)))
    line = b"".join(word + draw(blanks) for word in words[:-1]) + words[-1]
    return line + b"\r\n" + (block or b"") + payload + b"\r\n", one(sid, subject, payload, reply, block)


def repeated(frames: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """A list of frames in which the same one may come several times in a row."""
    runs = st.lists(st.tuples(frames, st.integers(1, 4)), max_size=8)
    return runs.map(lambda pairs: [frame for frame, count in pairs for _ in range(count)])


server_frames = st.one_of(
    messages(),
    st.sampled_from([(b"PING\r\n", Op.PING), (b"PONG\r\n", Op.PONG), (b"+OK\r\n", Op.OK)]),
    json_values.map(lambda fields: (encode_info(fields), Info(fields))),
    st.text("ab '", max_size=12).map(lambda text: (encode_err(f"x{text}x"), Err(f"x{text}x"))),
)

client_frames = st.one_of(
    st.builds(Pub, tokens, st.none() | tokens, blocks, payloads).map(
        lambda pub: (encode_pub(pub.subject, pub.reply, pub.block, pub.payload), pub)
    ),
    st.builds(Sub, tokens, st.none() | tokens, sids).map(
        lambda sub: (encode_sub(sub.subject, sub.queue, sub.sid), sub)
    ),
    st.builds(Unsub, sids, st.none() | st.integers(0, 10**6)).map(
        lambda unsub: (encode_unsub(unsub.sid, unsub.max_messages), unsub)
    ),
    json_values.map(lambda fields: (encode_connect(fields), Connect(fields))),
    st.sampled_from([(protocol.PING, Op.PING), (protocol.PONG, Op.PONG)]),
)


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    bounds = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(bounds)]


@given(repeated(server_frames), st.lists(st.integers(0, 2000), max_size=12))
def test_any_split_of_what_a_server_sends_gives_the_same_events(frames: list[Any], cuts: list[int]) -> None:
    wire = b"".join(raw for raw, _ in frames)
    assert SERVER.parse(pieces_of(wire, cuts)) == merged([event for _, event in frames])


@given(repeated(client_frames), st.lists(st.integers(0, 2000), max_size=12))
def test_any_split_of_what_a_client_sends_gives_the_same_requests(frames: list[Any], cuts: list[int]) -> None:
    wire = b"".join(raw for raw, _ in frames)
    assert CLIENT.parse(pieces_of(wire, cuts)) == [request for _, request in frames]


@given(tokens, sids, st.none() | tokens, blocks, payloads)
def test_an_encoded_message_parses_to_what_went_in(
    subject: bytes, sid: bytes, reply: bytes | None, block: bytes | None, payload: bytes
) -> None:
    wire = encode_msg(subject, sid, reply, block, payload)
    assert Parser().feed(wire) == [one(sid, subject, payload, reply, block)]


GARBAGE_WORDS = [
    b"MSG", b"HMSG", b"INFO", b"PING", b"-ERR", b"+OK", b"PUB", b"HPUB", b"SUB", b"CONNECT", b" ", b"\t", b"\r\n",
    b"\r", b"\n", b"a", b"1", b"5", b"-1", b"99999999999", b"{}", b'{"a":', b"hello", b"\0", b"\xff", BLOCK,
]  # fmt: skip
garbage = st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(GARBAGE_WORDS), max_size=40).map(b"".join))


@pytest.mark.parametrize("side", [SERVER, CLIENT])
@given(garbage, st.lists(st.integers(0, 300), max_size=8))
@example(b"\r\n" * 50, [])
def test_garbage_ends_in_events_or_a_protocol_error_however_it_is_cut(side: Side, data: bytes, cuts: list[int]) -> None:
    def outcome(pieces: list[bytes]) -> tuple[list[Any], bool]:
        parser, events = side.parser(), []
        try:
            for piece in pieces:
                events += parser.feed(piece)
        except ProtocolError:
            if isinstance(parser, Parser):
                events += parser.events_before_error
            return merged(events), True
        return merged(events), False

    events, failed = outcome([data])
    events_in_pieces, failed_in_pieces = outcome(pieces_of(data, cuts))
    assert failed_in_pieces == failed
    if side is SERVER:  # a request parser keeps no events before an error
        assert events_in_pieces == events


# -- cost ------------------------------------------------------------------------------------------------------------


def copied_bytes(size: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many bytes the buffer joins in all while a payload of this size comes in such pieces."""
    copied = 0
    add = protocol._Buffer.add

    def counting(buffer: protocol._Buffer, data: bytes) -> bytes | None:
        nonlocal copied
        had_parts = bool(buffer._parts)
        whole = add(buffer, data)
        if had_parts and whole is not None:
            copied += len(whole)
        return whole

    with monkeypatch.context() as patch:
        patch.setattr(protocol._Buffer, "add", counting)
        wire = b"MSG a 1 %d\r\n" % size + bytes(size) + b"\r\n"
        parser = Parser()
        events = [event for part in chunks(wire, piece) for event in parser.feed(part)]
    assert len(events) == 1
    return copied


def test_the_cost_of_a_large_payload_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (copied_bytes(mib << 20, 64 << 10, monkeypatch) for mib in (4, 32))
    assert large <= 2 * (32 << 20) + 1000  # each byte is joined once; twice would still be linear
    assert large <= 9 * small


def test_the_cost_of_a_large_payload_to_a_request_parser_is_linear() -> None:
    size, piece = 8 << 20, 16 << 10
    wire = b"PUB a %d\r\n" % size + bytes(size) + b"\r\n"
    parser, joins = RequestParser(), 0
    for part in chunks(wire, piece):
        before = len(parser._buffer._parts)
        requests = parser.feed(part)
        joins += before > 0 and len(parser._buffer._parts) <= 1
    assert len(requests) == 1
    assert joins <= 2


def test_many_small_messages_in_one_read_cost_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is joined or kept while whole frames come."""
    monkeypatch.setattr(protocol._Buffer, "keep", lambda *args: pytest.fail("nothing is left over"))
    events = Parser().feed(b"MSG a 1 1\r\nx\r\n" * 1000)
    assert [len(batch.items) for batch in events] == [1000]


def test_a_parser_holds_no_more_than_one_frame() -> None:
    frame = b"MSG a 1 100000\r\n" + bytes(100_000) + b"\r\n"
    stream = chunks(frame * 200, 7_001)  # 20 MB in all
    parser = Parser()
    tracemalloc.start()
    try:
        for piece in stream:
            parser.feed(piece)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * len(frame)


def test_an_idle_parser_does_not_keep_the_last_messages_alive() -> None:
    parser = Parser()
    tracemalloc.start()
    try:
        parser.feed(encode_msg(b"a", b"1", None, None, bytes(4 << 20)))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1 << 20


# -- encoders --------------------------------------------------------------------------------------------------------


def test_info_is_encoded_as_a_server_does_with_a_space_before_its_end() -> None:
    assert encode_info({"a": 1}) == b'INFO {"a":1} \r\n'


def test_connect_is_one_line_of_json() -> None:
    wire = encode_connect({"name": "a\r\nb", "pass": "é"})
    assert wire.count(b"\r\n") == 1
    assert json.loads(wire[len(b"CONNECT ") :]) == {"name": "a\r\nb", "pass": "é"}


@pytest.mark.parametrize(
    ("frame", "wire"),
    [
        (encode_pub(b"a", None, None, b"hi"), b"PUB a 2\r\nhi\r\n"),
        (encode_pub(b"a", b"r", None, b""), b"PUB a r 0\r\n\r\n"),
        (encode_pub(b"a", None, BLOCK, b"hi"), b"HPUB a 18 20\r\n" + BLOCK + b"hi\r\n"),
        (encode_pub(b"a", b"r", BLOCK, b""), b"HPUB a r 18 18\r\n" + BLOCK + b"\r\n"),
        (encode_sub(b"a.*", None, b"1"), b"SUB a.* 1\r\n"),
        (encode_sub(b"a", b"q", b"1"), b"SUB a q 1\r\n"),
        (encode_unsub(b"1"), b"UNSUB 1\r\n"),
        (encode_unsub(b"1", 5), b"UNSUB 1 5\r\n"),
        (encode_msg(b"a", b"1", None, None, b"hi"), b"MSG a 1 2\r\nhi\r\n"),
        (encode_msg(b"a", b"1", b"r", BLOCK, b"hi"), b"HMSG a 1 r 18 20\r\n" + BLOCK + b"hi\r\n"),
        (encode_err("Stale Connection"), b"-ERR 'Stale Connection'\r\n"),
    ],
)
def test_a_frame_is_encoded_as_the_protocol_says(frame: bytes, wire: bytes) -> None:
    assert frame == wire


@pytest.mark.parametrize("reply", [None, b"r"])
@pytest.mark.parametrize("block", [None, BLOCK])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_large_payload_makes_the_same_frame(reply: bytes | None, block: bytes | None, more: int) -> None:
    payload = b"x" * (FORMATTED_BYTES + more)
    subjects = b"a" if reply is None else b"a r"
    head = b"PUB %b %d\r\n" % (subjects, len(payload))
    if block is not None:
        head = b"HPUB %b %d %d\r\n%b" % (subjects, len(block), len(block) + len(payload), block)
    assert encode_pub(b"a", reply, block, payload) == head + payload + b"\r\n"
