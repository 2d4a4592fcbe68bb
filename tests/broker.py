"""A scripted server that behaves, and small recorders: what tests of the link share."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import natsync
from natsync.protocol import Op, Pub, Request, RequestParser, Sub
from natsync.testing import PeerConnection, ScriptedPeer, eventually

#: Seconds by which a deadline may be overrun on a busy machine; no more than what close() waits if it is told nothing.
SLACK = 5.0
#: Options of tests in which reconnecting is waited for.
QUICK: dict[str, Any] = {"reconnect_wait": 0.02, "reconnect_wait_max": 0.05, "reconnect_jitter": 0.0}

Script = Callable[[PeerConnection], object]


def next_request(peer: PeerConnection) -> Request:
    """The next thing that the client says."""
    line = peer.recv_line()
    words = line.split()
    body = peer.recv_exactly(int(words[-1]) + 2) if words[0] in (b"PUB", b"HPUB") else b""
    (request,) = RequestParser().feed(line + b"\r\n" + body)
    return request


class Broker:
    """A script that plays an orderly server and records what each of its clients said, PINGs left out.

    `scripts` are played instead for the first connections, one each.
    """

    def __init__(self, *scripts: Script, pongs: bool = True, **info: Any) -> None:
        #: Held from reading a request to having answered it: who takes it knows what has been said and answered.
        self.lock = threading.Lock()
        self.links: list[PeerConnection] = []
        self.said: list[list[Request]] = []
        self.pings = 0
        self._scripts = scripts
        self.pongs = pongs
        self._info = info

    def __call__(self, peer: PeerConnection) -> None:
        if peer.index < len(self._scripts):
            self._scripts[peer.index](peer)
            return
        peer.handshake(**self._info)
        said: list[Request] = []
        self.links.append(peer)
        self.said.append(said)
        while True:
            request = next_request(peer)
            with self.lock:
                self._take(peer, said, request)

    def _take(self, peer: PeerConnection, said: list[Request], request: Request) -> None:
        if request is not Op.PING:
            said.append(request)
            return
        self.pings += 1
        if self.pongs:
            peer.send(b"PONG\r\n")

    @property
    def newest(self) -> PeerConnection:
        eventually(lambda: self.links)  # a client may be ahead of the script that has just answered its PING
        return self.links[-1]

    def drop(self) -> None:
        """End the newest link, as a server does that is stopped."""
        self.newest.sock.shutdown(socket.SHUT_RDWR)

    def published(self, link: int = -1) -> list[Pub]:
        """The messages that came over a link, but for the mark of a handover."""
        pubs = [request for request in self.said[link] if isinstance(request, Pub)] if self.said else []
        return [pub for pub in pubs if b".move-" not in pub.subject]

    def subscribed(self, link: int = -1) -> list[Sub]:
        """The SUBs of a link, but for those of inboxes."""
        subs = [request for request in self.said[link] if isinstance(request, Sub)] if self.said else []
        return [sub for sub in subs if not sub.subject.startswith(b"_INBOX.")]


def refuse(peer: PeerConnection) -> None:
    """Accept and close."""


class Gate:
    """A script that refuses clients until it is opened, and is a broker from then on."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.open = threading.Event()

    def __call__(self, peer: PeerConnection) -> None:
        if not self.broker.links or self.open.is_set():
            self.broker(peer)


class Events:
    """An on_event that keeps what it is told."""

    def __init__(self) -> None:
        self.all: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, name: str, info: dict[str, Any]) -> None:
        self.all.append((name, info))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.all]

    def wait(self, name: str, count: int = 1) -> dict[str, Any]:
        """The details of the count-th event of this name, waited for."""
        eventually(lambda: self.names.count(name) >= count, 15.0, f"no {name!r} among {self.all}")
        return [info for one, info in self.all if one == name][count - 1]


class Outcome:
    """What a call on a thread of its own came to."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.value: object = None
        self.error: BaseException | None = None
        self._function = function
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.value = self._function()
        except BaseException as error:
            self.error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def within(self, seconds: float) -> BaseException | None:
        """The error, or None; the call must end in time."""
        self._thread.join(seconds)
        assert not self.running, f"still running after {seconds:g} s"
        return self.error


@contextmanager
def opened(peer: ScriptedPeer, *, patience: float = 5.0, **options: Any) -> Iterator[natsync.Client]:
    """A client of the peer; patience is what close() gets, for peers that do not answer its flush."""
    client = natsync.connect(peer.url, **{"connect_timeout": 10.0, **QUICK, **options})
    try:
        yield client
    finally:
        client.close(patience)
