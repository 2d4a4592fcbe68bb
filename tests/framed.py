"""Framed mode by hand: a requester and a responder over RawClient that use nothing of natsync.streaming.

Asker opens a stream and says what a requester says; Answer takes a request and sends frames. Both are driven by the
test's thread: nothing is acknowledged, repeated or answered unless the test does it. Bench and Table have natsync at
the other end.
"""

from __future__ import annotations

import itertools
import re
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

import natsync
from broker import QUICK
from natsync import headers as _headers
from natsync.protocol import encode_pub
from natsync.testing import eventually
from rawclient import PATIENCE, RawClient, RawMessage

#: An offer with room for eight chunks, nothing hurried, every chunk in a frame of its own.
OFFER = "1;w=8;b=65536;g=10000;hb=5000;cap="
#: The subject that Table answers on.
SUBJECT = "framed.raw"
#: A frame's reply subject: the responder's inbox and the stream's number, op, seq.
ADDRESS = re.compile(rb"(\S+\.nsy1\.\d+)\.([a-z])\.(\d+)")
SEQ = re.compile(rb"\r\nNatsync-Seq: ([a-z])\.(\d+) (\S+)\r\n")

#: Data frames: op, seq, payload.
Chunks = tuple[tuple[str, int, bytes], ...]

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Frame:
    """A frame as it came. reply: where its stream is spoken to, or None."""

    stream: bytes
    op: bytes
    seq: int
    block: bytes | None
    payload: bytes
    reply: bytes | None

    @property
    def key(self) -> tuple[bytes, int]:
        return self.op, self.seq

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.block is None else dict(_headers.decode(self.block))


def frame_of(message: RawMessage) -> Frame:
    """A message as a frame; it must be one."""
    found = SEQ.search(message.block or b"")
    if found is not None:
        return Frame(found[3], found[1], int(found[2]), message.block, message.payload, message.reply)
    address = ADDRESS.fullmatch(message.reply or b"")
    assert address is not None, f"not a frame: {message}"
    return Frame(address[1], address[2], int(address[3]), message.block, message.payload, message.reply)


def batch(*chunks: bytes) -> bytes:
    """The payload of a batch frame."""
    return struct.pack(f">{len(chunks) + 1}I", len(chunks), *map(len, chunks)) + b"".join(chunks)


def block(**fields: str) -> bytes:
    """A header block; an underscore in a name stands for a hyphen."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return b"NATS/1.0\r\n" + lines.encode() + b"\r\n"


class Desk:
    """Sorts what comes over one connection: each asks for what is meant for it, the rest waits."""

    def __init__(self, raw: RawClient) -> None:
        self.raw = raw
        self._kept: deque[RawMessage] = deque()

    def pick(self, wanted: Callable[[RawMessage], bool], timeout: float = PATIENCE) -> RawMessage:
        """The first message that is wanted; TimeoutError if none comes."""
        for message in self._kept:
            if wanted(message):
                self._kept.remove(message)
                return message
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            message = self.raw.next(left)
            if wanted(message):
                return message
            self._kept.append(message)

    def all(self, wanted: Callable[[RawMessage], bool]) -> list[RawMessage]:
        """Every wanted message that the server had until now."""
        self._kept.extend(self.raw.received())
        found = [message for message in self._kept if wanted(message)]
        for message in found:
            self._kept.remove(message)
        return found


class Asker:
    """A stream asked for by hand.

    Attributes:
        control: the newest reply subject of a frame: where the responder is spoken to.
        probes: probes that next() has passed over.
    """

    def __init__(
        self,
        desk: Desk,
        subject: str,
        *,
        offer: str | None = OFFER,
        inbox: bytes | None = None,
        payload: bytes = b"",
        **headers: str,
    ) -> None:
        self.desk = desk
        self.inbox = inbox or b"_INBOX.asker%d.1" % next(_numbers)
        self.control: bytes | None = None
        self.probes = 0
        self.sid = desk.raw.subscribe(self.inbox) if inbox is None else b""
        fields = {} if offer is None else {"Natsync_Stream": offer}
        self.request = (subject, payload, self.inbox, block(**fields, **headers) if fields or headers else None)
        self.ask()

    def ask(self) -> None:
        """Send the request, once more if it was."""
        self.desk.raw.publish(*self.request)

    def message(self, timeout: float = PATIENCE) -> RawMessage:
        """The next message for this stream, whatever it is."""
        message = self.desk.pick(lambda message: message.subject == self.inbox, timeout)
        self.control = message.reply or self.control
        return message

    def frame(self, timeout: float = PATIENCE) -> Frame:
        """The next frame, probes included."""
        return frame_of(self.message(timeout))

    def next(self, timeout: float = PATIENCE) -> Frame:
        """The next frame that is no probe."""
        while (frame := self.frame(timeout)).op == b"h":
            self.probes += 1
        return frame

    def frames(self, count: int) -> list[Frame]:
        return [self.next() for _ in range(count)]

    def keys(self, count: int) -> list[tuple[bytes, int]]:
        """What the next frames are, probes left out."""
        return [frame.key for frame in self.frames(count)]

    def probe(self) -> Frame:
        """The next probe; everything else that comes before is an error."""
        frame = self.frame()
        assert frame.op == b"h", f"not a probe: {frame}"
        return frame

    def say(self, payload: bytes, *, reply: bool = True) -> None:
        """Send a control message."""
        assert self.control is not None
        self.desk.raw.publish(self.control, payload, self.inbox if reply else None)

    def say_all(self, *payloads: bytes) -> None:
        """Send control messages in one write, so that they arrive together."""
        assert self.control is not None
        frames = [encode_pub(self.control, self.inbox, None, payload) for payload in payloads]
        self.desk.raw.sock.sendall(b"".join(frames))

    def ping(self) -> int:
        """What the responder answers to `?`: how far it has sent. Probes that come before are passed over.

        A stream that is not there is asked, too: its answer comes behind, so that a probe which was due just now is
        not taken for the first one.
        """
        self.desk.all(lambda message: message.subject == self.inbox and b".h." in (message.reply or b""))
        self.say(b"?")
        control, told = self.control, list[int]()
        found = ADDRESS.fullmatch(control or b"")
        assert found is not None, control
        nobody = found[1].rpartition(b".")[0] + b".0"
        self.desk.raw.publish(nobody + b".h.0", b"?", self.inbox)
        while (frame := self.frame()).stream != nobody:
            assert frame.op == b"h", f"not a probe: {frame}"
            told.append(frame.seq)
        self.control = control
        return told[-1]

    def leave(self) -> None:
        """Nobody listens here any more."""
        self.desk.raw.unsubscribe(self.sid)

    def return_(self) -> None:
        """Listen again."""
        self.sid = self.desk.raw.subscribe(self.inbox)


class Answer:
    """A request taken by hand, answered by a responder with the stream number 1 at an inbox of its own.

    Attributes:
        stream: what its frames' reply subjects start with.
    """

    def __init__(self, desk: Desk, request: RawMessage) -> None:
        assert request.reply is not None
        self.desk = desk
        self.request = request
        self.inbox = request.reply
        self.peer = b"_INBOX.answer%d.nsy1" % next(_numbers)
        self.stream = self.peer + b".1"
        self.sid = desk.raw.subscribe(self.peer + b".>")

    def encode(self, op: str, seq: int | str, payload: bytes = b"", head: bytes | None = None) -> bytes:
        """A frame as it goes to the server."""
        return encode_pub(self.inbox, b"%b.%b.%b" % (self.stream, op.encode(), str(seq).encode()), head, payload)

    def send(self, op: str, seq: int | str, payload: bytes = b"", head: bytes | None = None) -> None:
        self.desk.raw.sock.sendall(self.encode(op, seq, payload, head))

    def send_all(self, *frames: tuple[str, int, bytes]) -> None:
        """Send frames in one write, so that they arrive together."""
        self.desk.raw.sock.sendall(b"".join(self.encode(*frame) for frame in frames))

    def _is_mine(self, message: RawMessage) -> bool:
        return message.subject.startswith(self.stream + b".")

    def message(self, timeout: float = PATIENCE) -> RawMessage:
        """The next control message."""
        return self.desk.pick(self._is_mine, timeout)

    def control(self, timeout: float = PATIENCE) -> bytes:
        """What the next control message says."""
        return self.message(timeout).payload

    def until(self, start: bytes, timeout: float = PATIENCE) -> bytes:
        """The next control message that starts so; others are passed over."""
        return self.desk.pick(lambda one: self._is_mine(one) and one.payload.startswith(start), timeout).payload

    def controls(self) -> list[bytes]:
        """All that was said until now."""
        return [message.payload for message in self.desk.all(self._is_mine)]

    def leave(self) -> None:
        """Nobody listens here any more."""
        self.desk.raw.unsubscribe(self.sid)


class Held:
    """A subscriber whose handler leaves its senders to the test."""

    def __init__(self, url: str, queue: str | None = None, **options: object) -> None:
        self.subject = f"framed.held{next(_numbers)}"
        self.arrived: list[tuple[natsync.HandlerContext, natsync.Message, natsync.ResponseSender]] = []
        self.subscriber = natsync.Subscriber(url, **options)  # type: ignore[arg-type]
        self.handle = self.subscriber.stream_subscribe(self.subject, lambda *all: self.arrived.append(all), queue=queue)

    def take(self, index: int = -1) -> tuple[natsync.HandlerContext, natsync.Message, natsync.ResponseSender]:
        """The context, request and sender of a handler, the newest if none is told."""
        eventually(lambda: len(self.arrived) > max(index, 0), PATIENCE)
        return self.arrived[index]

    @property
    def sender(self) -> natsync.ResponseSender:
        return self.take()[2]

    @property
    def ctx(self) -> natsync.HandlerContext:
        return self.take()[0]


class Bench:
    """Both ends on one server: subscribers that hold their senders, and streams asked for by hand. Closed in order."""

    def __init__(self, url: str, **fields: object) -> None:
        self.url = url
        self.raw = RawClient(url, **fields)
        self.desk = Desk(self.raw)
        self._helds: list[Held] = []
        self._askers: list[Asker] = []

    def hold(self, **options: object) -> Held:
        held = Held(str(options.pop("url", self.url)), **options)  # type: ignore[arg-type]
        self._helds.append(held)
        return held

    def ask(self, held: Held, offer: str | None = OFFER, inbox: bytes | None = None, **headers: str) -> Asker:
        """A stream that nothing was taken from."""
        asker = Asker(self.desk, held.subject, offer=offer, inbox=inbox, **headers)
        self._askers.append(asker)
        return asker

    def open(
        self, offer: str = OFFER, *, held: Held | None = None, inbox: bytes | None = None, **options: object
    ) -> tuple[Asker, natsync.ResponseSender]:
        """A stream whose ACCEPT was taken, and its sender."""
        held = held or self.hold(**options)
        count = len(held.arrived)
        asker = self.ask(held, offer, inbox)
        assert asker.next().key == (b"a", 0)
        return asker, held.take(count)[2]

    def close(self) -> None:
        """Whoever was asked is told that nobody listens, so that closing has nothing to wait for."""
        for asker in self._askers:
            self._find_control(asker)
            if asker.control is not None:
                asker.say(b"x 1 the test is over")
        self.raw.flush()
        for held in self._helds:
            for _, _, sender in held.arrived:
                sender.end()
            held.subscriber.close(2.0)
        self.raw.close()

    def _find_control(self, asker: Asker) -> None:
        for message in self.desk.all(lambda message: message.subject == asker.inbox):
            asker.control = message.reply or asker.control


@contextmanager
def bench_on(url: str, **fields: object) -> Iterator[Bench]:
    bench = Bench(url, **fields)
    try:
        yield bench
    finally:
        bench.close()


def offer(**fields: object) -> str:
    """OFFER with other values."""
    said = dict(pair.split("=") for pair in OFFER.split(";")[1:])
    return "1;" + ";".join(f"{key}={value}" for key, value in {**said, **fields}.items())


def fill(sender: natsync.ResponseSender, chunk: bytes = b"x") -> int:
    """Send until there is no credit; how many chunks that were."""
    before = sender.send_count
    while sender.try_send(chunk):
        assert sender.send_count < 100_000
    return sender.send_count - before


def is_gone(asker: Asker) -> bool:
    """Whether the responder does not know the stream any more."""
    asker.say(b"?")
    while True:
        frame = asker.next()
        if frame.op == b"x" and frame.seq == 0:
            return True
        if frame.op == b"r":
            return False


def sent(bench: Bench, count: int = 5, **fields: object) -> tuple[Asker, natsync.ResponseSender]:
    """A stream with chunks c1, c2, … that came one by one."""
    asker, sender = bench.open(offer(**fields))
    for number in range(1, count + 1):
        sender.send(b"c%d" % number)
        assert asker.next().payload == b"c%d" % number
    return asker, sender


class Table:
    """A client, and a desk at which its requests are answered by hand."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.raw = RawClient(url)
        self.desk = Desk(self.raw)
        self.raw.subscribe(SUBJECT)
        self._clients: list[natsync.Client] = []
        self.answers: list[Answer] = []

    def client(self, **options: object) -> natsync.Client:
        client = natsync.Client(self.url, **{**QUICK, **options})  # type: ignore[arg-type]
        self._clients.append(client)
        return client.open()

    def request(self) -> RawMessage:
        """The next request for a stream."""
        return self.desk.pick(lambda message: message.subject == SUBJECT.encode())

    def answer(self, request: RawMessage | None = None) -> Answer:
        """A responder for the next request, which has said nothing yet."""
        answer = Answer(self.desk, request or self.request())
        self.answers.append(answer)
        return answer

    def open(self, client: natsync.Client | None = None, **options: object) -> tuple[natsync.Stream, Answer]:
        """A stream, and its responder, which has accepted and been told that this has arrived."""
        stream = (client or self.client()).stream(SUBJECT, **options)  # type: ignore[arg-type]
        answer = self.answer()
        answer.send("a", 0)
        answer.until(b"+0 ")
        return stream, answer

    def close(self) -> None:
        for answer in self.answers:  # whoever still takes leave is answered
            answer.send("x", 0)
        self.raw.flush()
        for client in self._clients:
            client.close()
        self.raw.close()


def chunks(first: int, last: int) -> Chunks:
    """Data frames c1, c2, …"""
    return tuple(("d", number, b"c%d" % number) for number in range(first, last + 1))


def take(stream: natsync.Stream, count: int) -> list[bytes]:
    return [stream.next(PATIENCE) for _ in range(count)]


def account(said: bytes) -> tuple[bytes, int, int, int]:
    """The sign and the numbers of an account."""
    found = re.fullmatch(rb"([+!])(\d+) (\d+) (\d+)", said)
    assert found is not None, said
    return found[1], int(found[2]), int(found[3]), int(found[4])


def failure(stream: natsync.Stream) -> natsync.StreamError:
    """What the stream fails with, behind its chunks."""
    with pytest.raises(natsync.StreamError) as caught:
        while True:
            stream.next(PATIENCE)
    return caught.value


def failure_of(stream: natsync.Stream) -> Exception:
    """The same for what is no StreamError."""
    with pytest.raises(natsync.NatsError) as caught:
        list(stream)
    return caught.value
