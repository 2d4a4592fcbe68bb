"""Peers that know the NATS client protocol and nothing else: what any other program sees of natsync, byte for byte.

RawClient is a blocking socket around the sans-I/O parser, for one thread. RecordingServer greets clients, answers
their PINGs and writes down the rest of what they send; it routes nothing by itself.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from natsync.protocol import (
    PING,
    PONG,
    Batch,
    Err,
    Info,
    Op,
    Parser,
    Pub,
    Request,
    RequestParser,
    Sub,
    encode_pub,
    encode_sub,
    encode_unsub,
)
from natsync.testing import PeerConnection, ScriptedPeer
from wire import encode_connect, encode_msg

END = b"__STREAM_END__"
ERROR = b"__STREAM_ERROR__:"
#: Seconds to wait for what must come; a loaded machine is slow.
PATIENCE = 10.0

_inboxes = itertools.count(1)


@dataclass(frozen=True)
class RawMessage:
    """One message as the wire had it; block is the header block."""

    subject: bytes
    sid: bytes
    reply: bytes | None
    block: bytes | None
    payload: bytes

    @property
    def is_last(self) -> bool:
        """Whether it ends a plain stream."""
        return self.payload == END or self.payload.startswith(ERROR)


class RawClient:
    """A NATS client without a library: connect, SUB, PUB, and read what comes."""

    def __init__(self, url: str, **fields: Any) -> None:
        parts = urlsplit(url)
        self.sock = socket.create_connection((parts.hostname, parts.port), PATIENCE)
        self.errors: list[str] = []
        self._parser = Parser()
        self._messages: deque[RawMessage] = deque()
        self._pongs = 0
        self._sids = itertools.count(1)
        self._greeted = False
        self._until(lambda: self._greeted, PATIENCE)
        connect = {"verbose": False, "pedantic": False, "headers": True, "no_responders": True, "protocol": 1}
        self.sock.sendall(encode_connect({**connect, "lang": "raw", "version": "0", **fields}))
        self.flush()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave by FIN, as a process that ends does."""
        self.sock.close()

    # -- sending -----------------------------------------------------------------------------------------------

    def subscribe(self, subject: bytes | str, queue: bytes | None = None) -> bytes:
        """SUB, known at the server when this returns; its sid."""
        sid = b"%d" % next(self._sids)
        self.sock.sendall(encode_sub(_bytes(subject), queue, sid))
        self.flush()
        return sid

    def unsubscribe(self, sid: bytes) -> None:
        """UNSUB, done at the server when this returns."""
        self.sock.sendall(encode_unsub(sid))
        self.flush()

    def publish(
        self, subject: bytes | str, payload: bytes = b"", reply: bytes | None = None, block: bytes | None = None
    ) -> None:
        self.sock.sendall(encode_pub(_bytes(subject), reply, block, payload))

    def request(self, subject: bytes | str, payload: bytes = b"", block: bytes | None = None) -> bytes:
        """Ask with a new private inbox as reply subject; the sid of its subscription."""
        inbox = b"_INBOX.raw.%d" % next(_inboxes)
        sid = self.subscribe(inbox)
        self.publish(subject, payload, inbox, block)
        return sid

    def answer(self, request: RawMessage, *payloads: bytes) -> None:
        """Publish the payloads to the request's reply subject, as a responder of the Go system does."""
        assert request.reply is not None
        for payload in payloads:
            self.publish(request.reply, payload)

    # -- receiving ---------------------------------------------------------------------------------------------

    def next(self, timeout: float = PATIENCE) -> RawMessage:
        """The next message; TimeoutError if none comes."""
        self._until(lambda: self._messages, timeout)
        return self._messages.popleft()

    def stream(self, timeout: float = PATIENCE) -> list[RawMessage]:
        """The messages up to and including the one that ends a stream."""
        messages = [self.next(timeout)]
        while not messages[-1].is_last:
            messages.append(self.next(timeout))
        return messages

    def flush(self) -> None:
        """Return once the server has done all that was sent, and what it had for this client is here."""
        wanted = self._pongs + 1
        self.sock.sendall(PING)
        self._until(lambda: self._pongs >= wanted, PATIENCE)

    def received(self) -> list[RawMessage]:
        """All that the server had for this client until now."""
        self.flush()
        messages = list(self._messages)
        self._messages.clear()
        return messages

    def _until(self, condition: Callable[[], object], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError(f"the server closed the connection; its errors: {self.errors}")
            for event in self._parser.feed(data):
                self._take(event)

    def _take(self, event: object) -> None:
        if isinstance(event, Batch):
            for reply, block, payload in event.items:
                self._messages.append(RawMessage(event.subject, event.sid, reply, block, payload))
        elif event is Op.PING:
            self.sock.sendall(PONG)
        elif event is Op.PONG:
            self._pongs += 1
        elif isinstance(event, Err):
            self.errors.append(event.text)
        elif isinstance(event, Info):
            self._greeted = True


class RecordingServer:
    """A server that only listens: what clients send after the handshake is in .requests, PINGs answered and left out.

    answer(server, connection, request), if given, is called for each request and may send.
    """

    def __init__(self, answer: Callable[[RecordingServer, PeerConnection, Request], None] | None = None) -> None:
        self.requests: list[Request] = []
        self.connects: list[dict[str, Any]] = []
        self._answer = answer
        self._lock = threading.Lock()
        self._peer = ScriptedPeer(self._serve)

    def __enter__(self) -> RecordingServer:
        self._peer.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._peer.__exit__(*exc_info)

    @property
    def url(self) -> str:
        return self._peer.url

    @property
    def accepted(self) -> int:
        return self._peer.accepted

    @property
    def subs(self) -> list[Sub]:
        return [one for one in self.requests if isinstance(one, Sub)]

    @property
    def pubs(self) -> list[Pub]:
        return [one for one in self.requests if isinstance(one, Pub)]

    def deliver(self, connection: PeerConnection, pub: Pub, payload: bytes) -> None:
        """Answer a request: to its reply subject, by way of the subscription `<inbox>.*` that the client made."""
        assert pub.reply is not None
        wildcard = pub.reply.rpartition(b".")[0] + b".*"
        (sid,) = [sub.sid for sub in self.subs if sub.subject == wildcard]
        connection.send(encode_msg(pub.reply, sid, None, None, payload))

    def _serve(self, connection: PeerConnection) -> None:
        self.connects.append(connection.handshake())
        parser = RequestParser()
        while data := connection.sock.recv(1 << 16):
            for request in parser.feed(data):
                if request is Op.PING:
                    connection.send(PONG)
                    continue
                with self._lock:
                    self.requests.append(request)
                if self._answer is not None:
                    self._answer(self, connection, request)


def _bytes(subject: bytes | str) -> bytes:
    return subject.encode() if isinstance(subject, str) else subject
