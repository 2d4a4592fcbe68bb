"""A peer that sends nonsense: the parser, the handshake and a whole connection answer with typed errors and go on.

The random parts run for NATSYNC_FUZZ_SECONDS in all. Each case has a seed, shown when it fails; NATSYNC_FUZZ_SEED
repeats that case alone. The cases with names are there whatever the dice say.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import struct
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import natsync
from natsync import session
from natsync.errors import ProtocolError
from natsync.protocol import (
    MAX_CONTROL_LINE,
    MAX_INFO_LINE,
    PONG,
    Batch,
    Op,
    Parser,
    Pub,
    RequestParser,
    Sub,
)
from natsync.testing import PeerConnection, ScriptedPeer, eventually
from wire import encode_err, encode_info, encode_msg

#: Seconds that the random cases may take, all together.
SECONDS = float(os.environ.get("NATSYNC_FUZZ_SECONDS", "8"))
SEED = os.environ.get("NATSYNC_FUZZ_SEED")
#: Seconds in which a link must be there again: usually, and on a machine that is busy with other things.
SOON, PATIENCE = 1.0, 10.0
#: What one message may have, so that the bound is met quickly.
MESSAGE_BYTES = 1 << 20
#: How much larger the process may be after all random cases of a test.
GROWTH_BYTES = 64 << 20

bounded = pytest.mark.timeout(60 + 2 * SECONDS)


def cases(name: str, share: float) -> Iterator[str]:
    """Seeds of cases until this test's share of the time is up; the one to be repeated, if there is one."""
    if SEED is not None:
        if SEED.startswith(f"{name}:"):
            yield SEED
        return
    deadline = time.monotonic() + SECONDS * share
    count = 0
    while time.monotonic() < deadline or count < 30:
        yield f"{name}:{random.getrandbits(48):x}"
        count += 1
    print(f"{name}: {count} cases")


@contextmanager
def dice(seed: str) -> Iterator[random.Random]:
    """The randomness of one case; how to repeat it is told if it fails."""
    try:
        yield random.Random(seed)
    except BaseException:
        print(f"to repeat this case: NATSYNC_FUZZ_SEED={seed} python -m pytest tests/test_fuzz.py")
        raise


# -- nonsense ----------------------------------------------------------------------------------------------------------

NUMBERS = [
    b"-1", b"+5", b"-0", b"1_000", b" 5", b"0x10", b"1e3", b"5.0", b"", b"00000000012", b"999999999", b"1000000000",
    b"99999999999999999999999", b"\xd9\xa3", b"\xc2\xb2", b"NaN", b"67108865", b"5\0", b"5 5", b"5\t", b"\n5",
]  # fmt: skip
ENDS = [b"\n", b"\r", b"\n\r", b"\r\r\n", b"\r\n\r\n", b" \r\n", b"\0\r\n", b"", b"\r\n\0"]
BLOCKS = [
    b"NATS/1.0\r\n\r\n", b"NATS/1.0 503\r\n\r\n", b"NATS/1.0\r\nA: b\r\nA: c\r\n\r\n", b"NATS/1.0\r\nno colon\r\n\r\n",
    b"NATS/9\r\n\r\n", b"\r\n\r\n", b"", b"NATS/1.0 \xff\xfe\r\n: \r\n\r\n", b"NATS/1.0\r\nA: b",
    b"NATS/1.0 99999 x\r\n\r\n",
]  # fmt: skip
ERRORS = ["Unknown Protocol Operation", "x" * 300, "", "'''", "Permissions Violation for x", "Invalid Subject"]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 5, 1 << 20, 1 << 70, -(1 << 70), 0.5, float("inf"), float("nan"), "", "x", "1048576",
    "\0", "\ud800", [], [None], [1, "x"], ["127.0.0.1:1"], {}, {"a": {"b": []}}, "a" * 5000, ["127.0.0.1:1"] * 500,
]  # fmt: skip
FIELDS = [
    "server_id", "server_name", "version", "proto", "host", "port", "headers", "max_payload", "client_id", "client_ip",
    "auth_required", "tls_required", "tls_available", "nonce", "connect_urls", "ldm", "cluster", "jetstream", "",
]  # fmt: skip


def some_info(rng: random.Random) -> bytes:
    fields = {rng.choice(FIELDS): rng.choice(VALUES) for _ in range(rng.randrange(6))}
    return b"INFO " + json.dumps(fields).encode() + b" \r\n"


def some_frame(rng: random.Random) -> bytes:
    """Something that a server may send."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice([b"PING\r\n", b"PONG\r\n", b"+OK\r\n", b"ping\r\n", b"+ok \r\n"])
    if kind == 1:
        return encode_err(rng.choice(ERRORS))
    if kind == 2:
        return some_info(rng)
    reply = rng.choice([None, None, b"answer.here"])
    block = rng.choice([None, None, rng.choice(BLOCKS)])
    payload = rng.choice([b"", b"x", b"\r\n", b"PING\r\n", rng.randbytes(rng.randrange(200)), b"y" * 5000])
    return encode_msg(rng.choice([b"a", b"fuzz.x", b"\xff\xfe"]), b"%d" % rng.randrange(4), reply, block, payload)


def damage(rng: random.Random, data: bytes) -> bytes:
    """One change to the bytes."""
    if not data:
        return rng.randbytes(5)
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    kind = rng.randrange(9)
    if kind == 0:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + data[to:]
    if kind == 2:
        return data[:at] + rng.randbytes(rng.randrange(1, 20)) + data[at:]
    if kind == 3:
        return data[:to] + data[at:]
    if kind == 4:
        return data[:at]
    if kind == 5:
        return data.replace(b"\r\n", rng.choice(ENDS), rng.randrange(1, 3))
    if kind == 6:
        return (
            data[:at] + rng.choice([b"\0", b" ", b"\t", b"\r", b"\n", b"MSG ", b"-"]) * rng.randrange(1, 30) + data[at:]
        )
    words = data.split(b" ")
    index = rng.randrange(len(words))
    head, end, tail = words[index].partition(b"\r\n")
    words[index] = rng.choice(NUMBERS) + end + tail if kind == 7 else head.swapcase() + end + tail
    return b" ".join(words)


def some_traffic(rng: random.Random) -> bytes:
    data = b"".join(some_frame(rng) for _ in range(rng.randrange(1, 6)))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        data = damage(rng, data)
    return data


def pieces(rng: random.Random, data: bytes) -> list[bytes]:
    if len(data) < 300 and rng.randrange(3) == 0:
        return [data[at : at + 1] for at in range(len(data))]
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(8)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if start < end]


# -- the parser --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a parser made of its input. Messages are told one by one: how they are grouped depends on the split."""

    events: list[Any]
    error: bool
    incomplete: bool


def parsed(parts: list[bytes]) -> Outcome:
    parser = Parser(MESSAGE_BYTES)
    events: list[Any] = []
    error = False
    for part in parts:
        try:
            events += parser.feed(part)
        except ProtocolError:
            events += parser.events_before_error
            error = True
            break
    flat: list[Any] = []
    for event in events:
        flat += (
            [(event.sid, event.subject, item) for item in event.items] if isinstance(event, Batch) else [repr(event)]
        )
    return Outcome(flat, error, bool(parser._buffer._parts))


def check_parser(data: bytes, parts: list[bytes]) -> None:
    whole, split = parsed([data]), parsed(parts)
    assert (split.events, split.error) == (whole.events, whole.error), f"{data!r} in {parts!r}"


@bounded
def test_the_parser_makes_the_same_of_damaged_traffic_however_it_is_split() -> None:
    for seed in cases("parser", 0.25):
        with dice(seed) as rng:
            data = some_traffic(rng)
            check_parser(data, pieces(rng, data))


@bounded
def test_the_parser_makes_the_same_of_short_damaged_traffic_in_every_split_in_two() -> None:
    for seed in cases("splits", 0.1):
        with dice(seed) as rng:
            data = damage(rng, some_frame(rng) + some_frame(rng))[:200]
            for at in range(len(data) + 1):
                check_parser(data, [data[:at], data[at:]])


WORDS = [
    b"MSG", b"HMSG", b"msg", b"PING", b"PONG", b"+OK", b"-ERR", b"INFO", b" ", b"\t", b"\r\n", b"\r", b"\n", b"\0",
    b"a", b"1", b"0", b"5", b"12", b"{}", b'{"a":1}', b"'x'", b"NATS/1.0\r\n\r\n", b"\xff", *NUMBERS,
]  # fmt: skip


@bounded
@settings(max_examples=300)
@given(st.lists(st.sampled_from(WORDS) | st.binary(max_size=6), max_size=30), st.data())
def test_the_parser_makes_events_or_a_typed_error_of_any_words(words: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(words)
    at = data.draw(st.integers(0, len(whole)))
    check_parser(whole, [whole[:at], whole[at:]])
    check_parser(whole, [whole[index : index + 1] for index in range(len(whole))])


# -- a peer that is good until told otherwise --------------------------------------------------------------------------


class Peer:
    """Greets, answers PINGs, echoes requests on "echo"; the test sends what it likes on the present link."""

    def __init__(self) -> None:
        self._peer = ScriptedPeer(self._serve, check=False)
        self._lock = threading.Lock()
        self._link: PeerConnection | None = None
        self.reads = threading.Event()
        self.reads.set()
        self.unheard = 0  # requests that came, and get no answer

    def __enter__(self) -> Peer:
        self._peer.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._peer.__exit__(*exc_info)

    @property
    def url(self) -> str:
        return self._peer.url

    @property
    def links(self) -> int:
        return self._peer.accepted

    def _serve(self, link: PeerConnection) -> None:
        link.handshake()
        # A timeout for sending alone, which the reading thread does not notice.
        link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(PATIENCE), 0))
        self._link = link
        parser, sids = RequestParser(), dict[bytes, bytes]()
        while self.reads.wait(PATIENCE) and (data := link.sock.recv(1 << 16)):
            for request in parser.feed(data):
                if isinstance(request, Sub):
                    sids[request.subject] = request.sid
                elif request is Op.PING:
                    self._send(link, PONG)
                elif isinstance(request, Pub) and request.subject == b"echo" and request.reply is not None:
                    wildcard = request.reply.rpartition(b".")[0] + b".*"
                    self._send(link, encode_msg(request.reply, sids[wildcard], None, None, request.payload))
                elif isinstance(request, Pub) and request.subject == b"unheard":
                    self.unheard += 1

    def _send(self, link: PeerConnection, data: bytes) -> None:
        with self._lock:
            link.send(data)

    def attack(self, data: bytes, times: int = 1) -> int:
        """Send the same bytes again and again until the client has had enough; how many bytes it took."""
        assert self._link is not None
        sent = 0
        with self._lock:
            try:
                for _ in range(times):
                    self._link.sock.sendall(data)
                    sent += len(data)
            except OSError:  # the client has closed, and perhaps this side too
                pass
        return sent

    def hang_up(self) -> None:
        assert self._link is not None
        try:
            self._link.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the client was first


OPTIONS: dict[str, Any] = {
    "reconnect_wait": 0.001, "reconnect_wait_max": 0.01, "discover": False, "max_message_bytes": MESSAGE_BYTES,
    "connect_timeout": PATIENCE,
}  # fmt: skip


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as running:
        yield running


@pytest.fixture
def client(peer: Peer) -> Iterator[natsync.Client]:
    with natsync.Client(peer.url, **OPTIONS) as connected:
        connected.subscribe("fuzz.>", lambda message: len(message.headers), pending_messages=1000)
        connected.flush(PATIENCE)
        yield connected


def recovered(client: natsync.Client, links: int = 1) -> float:
    """Seconds until a request was answered again, over the links-th link or a later one."""
    begin = time.monotonic()
    while True:
        try:
            assert client.request("echo", b"still there?", timeout=PATIENCE).data == b"still there?"
            if client.stats()["reconnects"] >= links - 1:
                return time.monotonic() - begin
        except natsync.NatsError:
            assert time.monotonic() - begin < PATIENCE, f"no good link again: {client!r}"


@pytest.fixture
def waiting(client: natsync.Client, peer: Peer) -> Iterator[Callable[[], Any]]:
    """A request has come to the peer; call this to learn what became of it."""
    with ThreadPoolExecutor(1) as thread:
        outcome = thread.submit(client.request, "unheard", b"", timeout=2 * PATIENCE)
        eventually(lambda: peer.unheard == 1, PATIENCE)
        yield lambda: outcome.result(PATIENCE)


# -- what ends a link --------------------------------------------------------------------------------------------------

DEEP = b"[" * 200_000
#: Bytes after which the link must be given up, whether more come or not.
FATAL = {
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 and more\r\n",
    "http": b"HTTP/1.1 400 Bad Request\r\nServer: x\r\n\r\n",
    "a client's operation": b"PUB a 1\r\nx\r\n",
    "an empty line": b"\r\n",
    "nuls": b"\0" * 100 + b"\r\n",
    "a huge length": b"MSG a 1 999999999\r\n",
    "a length of more digits": b"MSG a 1 10000000000000000000000\r\n",
    "a length just too large": b"MSG a 1 %d\r\n" % (MESSAGE_BYTES + 1),
    "a negative length": b"MSG a 1 -1\r\nx\r\n",
    "a length with a sign": b"MSG a 1 +1\r\nx\r\n",
    "a length with an underscore": b"MSG a 1 1_0\r\n0123456789\r\n",
    "a length with a space": b"MSG a 1 1 0\r\n0123456789\r\n" + b"x\r\n",
    "a length in other digits": "MSG a 1 ٣\r\nabc\r\n".encode(),
    "a hexadecimal length": b"MSG a 1 0x1\r\nx\r\n",
    "no length": b"MSG a 1\r\nx\r\n",
    "a payload that is longer": b"MSG a 1 3\r\nabcdef\r\n",
    "a payload that ends in LF": b"MSG a 1 3\r\nabc\nPING\r\n",
    "a payload that ends in CR": b"MSG a 1 3\r\nabc\rxPING\r\n",
    "headers longer than all": b"HMSG a 1 13 12\r\nNATS/1.0\r\n\r\n\r\n",
    "negative headers": b"HMSG a 1 -1 12\r\nNATS/1.0\r\n\r\n\r\n",
    "a huge header": b"HMSG a 1 999999999 999999999\r\n",
    "an endless control line": b"MSG " + b"a" * (MAX_CONTROL_LINE + 1),
    "an endless word": b"x" * (MAX_CONTROL_LINE + 2),
    "an endless INFO": b"INFO {" + b" " * MAX_INFO_LINE,
    "INFO that is no JSON": b"INFO {nope}\r\n",
    "INFO that is no object": b"INFO []\r\n",
    "INFO without anything": b"INFO \r\n",
    "INFO that is deep": b'INFO {"a":' + DEEP + b"]" * len(DEEP) + b"}\r\n",
    "INFO with a number of many digits": b'INFO {"max_payload":' + b"9" * 20_000 + b"}\r\n",
    "INFO that is no text": b'INFO {"a":"\xff\xfe"}\r\n',
}


@pytest.mark.parametrize("name", FATAL)
def test_after_nonsense_the_link_is_made_anew(
    name: str, peer: Peer, client: natsync.Client, waiting: Callable[[], Any]
) -> None:
    before = peer.links
    peer.attack(FATAL[name])
    with pytest.raises(natsync.ConnectionLost) as caught:
        waiting()
    assert caught.value.sent is True
    recovered(client)
    assert peer.links == before + 1
    assert client.stats()["reconnects"] == 1


@pytest.mark.parametrize("name", FATAL)
def test_after_nonsense_the_link_is_there_again_within_a_second(name: str, peer: Peer, client: natsync.Client) -> None:
    took = []
    for attempt in range(3):  # the machine may be busy with other things
        peer.attack(FATAL[name])
        took.append(recovered(client, links=attempt + 2))
        if took[-1] < SOON:
            return
    pytest.fail(f"the link was made anew in {took} s")


@pytest.mark.parametrize("name", FATAL)
def test_nonsense_instead_of_a_greeting_is_a_typed_error(name: str) -> None:
    def script(link: PeerConnection) -> None:
        link.send(FATAL[name])
        link.recv_until_eof()

    unclear = name in ("an endless control line", "an endless word")  # may become a long INFO: takes until the timeout
    with ScriptedPeer(script) as bad:
        with pytest.raises(natsync.NoServersError) as caught:
            natsync.connect(bad.url, connect_timeout=0.2 if unclear else PATIENCE)
    (cause,) = caught.value.causes.values()
    assert isinstance(cause, natsync.NatsError)
    assert isinstance(cause, natsync.TimedOut) is unclear


@pytest.mark.parametrize("name", FATAL)
def test_nonsense_instead_of_the_answer_to_connect_is_a_typed_error(name: str) -> None:
    def script(link: PeerConnection) -> None:
        link.send_info()
        link.recv_line()
        link.recv_line()
        link.send(FATAL[name] + PONG)
        link.recv_until_eof()

    with ScriptedPeer(script) as bad:
        # What looks like a message may be taken for one, and then it ends the link that was just made.
        with pytest.raises(natsync.NatsError):
            with natsync.connect(bad.url, connect_timeout=PATIENCE, reconnect=False) as client:
                client.flush(PATIENCE)


# -- what never ends ---------------------------------------------------------------------------------------------------

CHUNK = 64 << 10
ENDLESS = {
    "a control line": b"x" * CHUNK,
    "a control line of CRs": b"\r" * CHUNK,
    "white space": b" " * CHUNK,
    "nuls": b"\0" * CHUNK,
    "a MSG line": b"MSG " + b"a" * CHUNK,
    "INFO": b"INFO " + b" " * CHUNK,
}


@contextmanager
def bounded_memory(limit: int) -> Iterator[None]:
    """All that Python allocates in the block, at its peak."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak} bytes at the peak"


def resident_bytes() -> int:
    """What the process holds in memory; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@pytest.mark.parametrize("name", ENDLESS)
def test_a_line_without_an_end_is_given_up_with_little_memory(name: str, peer: Peer, client: natsync.Client) -> None:
    first = ENDLESS[name]
    with bounded_memory(16 << 20):
        sent = peer.attack(first) + peer.attack(first[-1:] * CHUNK, times=1000)
        recovered(client)
    assert sent < 1000 * CHUNK  # the rest of 64 MB was not taken


@pytest.mark.parametrize("name", ENDLESS)
def test_a_greeting_without_an_end_is_given_up_with_little_memory(name: str) -> None:
    def script(link: PeerConnection) -> None:
        link.send(ENDLESS[name])
        for _ in range(1000):
            link.send(ENDLESS[name][-1:] * CHUNK)
        took_all.set()

    took_all = threading.Event()
    with ScriptedPeer(script) as bad, bounded_memory(16 << 20):
        with pytest.raises(natsync.NoServersError):
            natsync.connect(bad.url, connect_timeout=PATIENCE)
    assert not took_all.is_set()


@pytest.mark.parametrize(
    "frame", [b"+OK\r\n", b"PONG\r\n", b"PING\r\n", b"MSG nobody 999 5\r\nhello\r\n", b"MSG fuzz.a 2 5\r\nhello\r\n"]
)
def test_a_flood_of_frames_is_taken_with_little_memory_and_the_link_goes_on(
    frame: bytes, peer: Peer, client: natsync.Client
) -> None:
    with bounded_memory(16 << 20):
        peer.attack(frame * (CHUNK // len(frame)), times=8)
        client.flush(4 * PATIENCE)  # locks that keep book, on a busy machine, take 0.1 ms a frame
    assert client.stats()["reconnects"] == 0
    recovered(client)


@pytest.mark.parametrize(
    "frame",
    [
        encode_err("some error that is unknown"), encode_info({"max_payload": 1 << 20}),
        encode_info({"ldm": True}), encode_info({"connect_urls": ["127.0.0.1:1", "127.0.0.1:2"]}),
    ],
    ids=["-ERR", "INFO", "lame duck", "servers"],
)  # fmt: skip
def test_a_flood_of_news_is_taken_with_little_memory(
    frame: bytes, peer: Peer, client: natsync.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "natsync")  # pytest would keep every record
    with bounded_memory(16 << 20):
        peer.attack(frame * (CHUNK // len(frame)), times=8)
        client.flush(4 * PATIENCE)  # each of them is told, which a busy machine takes long for
        recovered(client)


def test_a_link_is_made_again_although_the_server_told_of_many_that_do_not_exist(peer: Peer) -> None:
    with natsync.Client(peer.url, **{**OPTIONS, "discover": True}) as client:
        client.flush(PATIENCE)
        with bounded_memory(16 << 20):
            peer.attack(encode_info({"connect_urls": [f"127.0.0.{low}:1" for low in range(2, 250)]}))
            client.flush(PATIENCE)
            peer.hang_up()
            recovered(client)


def test_answers_to_pings_do_not_pile_up_for_a_peer_that_does_not_read_them(peer: Peer, client: natsync.Client) -> None:
    peer.reads.clear()
    for _ in range(50):
        peer.attack(b"PING\r\n" * 2000)
        assert len(client._core._outbox._control) <= session._PONGS
    peer.reads.set()
    recovered(client)


# -- messages that are allowed and unpleasant --------------------------------------------------------------------------

BOMBS = {
    "a million headers": b"NATS/1.0\r\n" + b"A:b\r\n" * ((MESSAGE_BYTES - 100) // 5) + b"\r\n",
    "a million names": b"NATS/1.0\r\n" + b"".join(b"%x:\r\n" % n for n in range(100_000)) + b"\r\n",
    "one long header": b"NATS/1.0\r\nA:" + b"b" * (MESSAGE_BYTES - 100) + b"\r\n\r\n",
    "colons": b"NATS/1.0\r\n" + b":" * (MESSAGE_BYTES - 100) + b"\r\n\r\n",
    "line ends": b"NATS/1.0" + b"\r\n" * (MESSAGE_BYTES // 2 - 100),
    "no end": b"NATS/1.0\r\n" + b"A:b\r\n" * 100_000,
    "spaces": b"NATS/1.0\r\nA:" + b" " * (MESSAGE_BYTES - 100) + b"b\r\n\r\n",
    "a long status": b"NATS/1.0 " + b"5" * (MESSAGE_BYTES - 100) + b"\r\n\r\n",
    "nuls": b"\0" * (MESSAGE_BYTES - 100),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_bomb_is_read_or_refused_in_time_and_memory_and_the_link_goes_on(name: str, peer: Peer) -> None:
    with natsync.Client(peer.url, **OPTIONS) as client:
        subscription = client.subscribe("bomb")
        sid = subscription._core.sid
        client.flush(PATIENCE)
        with bounded_memory(128 << 20):
            peer.attack(encode_msg(b"bomb", sid, None, BOMBS[name], b"x"))
            message = subscription.next(PATIENCE)
            try:
                assert len(message.headers) >= 0
            except natsync.NatsError:
                pass
        assert message.data == b"x"
        recovered(client)
        assert client.stats()["reconnects"] == 0


# -- random cases on a whole connection --------------------------------------------------------------------------------


@bounded
def test_a_connection_survives_whatever_is_sent_on_it(peer: Peer, client: natsync.Client) -> None:
    took: list[float] = []
    held = 0
    with ThreadPoolExecutor(1) as thread:
        for seed in cases("link", 0.4):
            with dice(seed) as rng:
                under_way = thread.submit(client.request, "unheard", b"", timeout=0.005)
                data = some_traffic(rng)
                outcome = parsed([data])
                before = peer.links
                peer.attack(data)
                # A good peer goes on where the link is in order; where it is broken, the client has to end it.
                changed = any(one.startswith("Info(") for one in outcome.events if isinstance(one, str))
                if (outcome.incomplete and not outcome.error) or changed or rng.randrange(4) == 0:
                    peer.hang_up()
                took.append(recovered(client))
                if outcome.error:
                    assert peer.links > before, f"the link was kept after {data!r}"
                try:
                    under_way.result(PATIENCE)
                except natsync.NatsError:
                    pass
                assert client.status == "connected"
            if len(took) == 50:
                held = resident_bytes()
    if took:
        took.sort()
        median, most = took[len(took) // 2], took[-1]
        print(f"{client.stats()['reconnects']} reconnects; recovered in {median:.4f} s, at most {most:.3f} s")
        assert median < SOON
        assert took[len(took) * 9 // 10] < SOON
    assert not held or resident_bytes() - held < GROWTH_BYTES


@bounded
def test_whatever_a_handshake_brings_is_a_connection_or_a_typed_error() -> None:
    ends: Counter[str] = Counter()
    script = _HandshakeScript()
    held = 0
    with ScriptedPeer(script, check=False) as bad:
        for number, seed in enumerate(cases("handshake", 0.25)):
            with dice(seed) as rng:
                script.greeting, script.answer, script.stays = (
                    some_greeting(rng),
                    some_answer(rng),
                    rng.randrange(8) == 0,
                )
                begin = time.monotonic()
                try:
                    ends[use_once(bad.url)] += 1
                except natsync.NatsError as error:
                    ends[type(error).__name__] += 1
                    for cause in getattr(error, "causes", {}).values():
                        assert isinstance(cause, natsync.NatsError), repr(cause)
                        ends[type(cause).__name__] += 1
                        assert "natsync error" not in str(cause)
                assert time.monotonic() - begin < PATIENCE
            if number == 50:
                held = resident_bytes()
    print(dict(ends))
    assert not held or resident_bytes() - held < GROWTH_BYTES


class _HandshakeScript:
    """Sends what the present case says, whatever the client says."""

    greeting = answer = b""
    stays = False

    def __call__(self, link: PeerConnection) -> None:
        link.send(self.greeting)
        answer, stays = self.answer, self.stays
        link.recv_line()
        link.recv_line()
        link.send(answer)
        if stays:
            link.recv_until_eof()


def some_greeting(rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return some_info(rng)
    if kind == 1:
        return some_traffic(rng)
    data = encode_info(
        {"server_id": "X", "max_payload": 1 << 20, "headers": True, rng.choice(FIELDS): rng.choice(VALUES)}
    )
    return data if kind == 2 else damage(rng, data)


def some_answer(rng: random.Random) -> bytes:
    data = b"".join(rng.choice([PONG, PONG, b"", some_frame(rng)]) for _ in range(3)) + PONG
    return damage(rng, data) if rng.randrange(2) else data


def use_once(url: str) -> str:
    """Connect, use what a strange INFO may spoil, and leave."""
    client = natsync.Client(url, **{**OPTIONS, "connect_timeout": 0.05, "reconnect": False})
    try:
        client.open()
        subscription = client.subscribe("fuzz.x")
        client.publish("fuzz.x", b"payload", headers={"A": "b"})
        client.stats(), client.server_info, repr(client)
        try:
            client.request("fuzz.x", b"", timeout=0.005)
        except natsync.TimedOut:
            pass
        subscription.unsubscribe()
    finally:
        client.close(0)
    return "connected"
