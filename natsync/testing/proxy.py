"""A TCP proxy that does harm on request: what stands between a client and its server, and goes wrong.

It forwards bytes and knows nothing of NATS or TLS; for a server that says the wrong things there is ScriptedPeer. One
thread does all the work and owns all sockets and settings; every method hands it an order and returns when that is
carried out, so that a fault is in force for all bytes from then on. Methods may be called from any thread. POSIX only.
"""

from __future__ import annotations

import errno
import queue
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

HOST = "127.0.0.1"
#: Bytes that one direction of a link may hold back, by delay or because its receiver does not read; then no more is
#: read, and the sender comes to feel it.
HELD_BYTES = 1 << 20
#: Bytes read at once.
READ_BYTES = 1 << 16
#: Seconds of traffic that a throttled direction sends at once.
THROTTLE_SLICE = 0.02
#: Seconds within which the proxy's thread carries out an order; it takes microseconds.
ORDER_TIMEOUT = 10.0

#: How a link ends: "reset" by RST, with which bytes on their way may be lost; "cut" by FIN, behind all that was sent.
How = Literal["reset", "cut"]
Side = Literal["both", "client", "server"]


class Direction:
    """What happens to the bytes that go one way, on all links of a FaultProxy: its `up` or `down`.

    Faults add up, and stay until they are changed or clear() is called.
    """

    def __init__(self, proxy: FaultProxy) -> None:
        self._proxy = proxy
        self._delay = 0.0
        self._split = READ_BYTES
        self._pause = 0.0
        self._rate = 0.0
        self._stalled = False
        self._left: int | None = None
        self._how: How = "reset"
        #: Bytes handed on so far, on all links.
        self.passed_bytes = 0

    def delay(self, seconds: float) -> None:
        """Hand on each byte that much later than it came; as much as 1 MiB is on its way at a time."""
        _check(seconds >= 0, f"delay({seconds}): seconds from 0 up")
        self._set(_delay=seconds)

    def split(self, size_bytes: int, pause: float = 0.0) -> None:
        """Hand on pieces of at most that many bytes, each in a segment of its own, pause seconds apart.

        A receiver that is slower than the pieces come still finds several at once.
        """
        _check(size_bytes >= 1 and pause >= 0, f"split({size_bytes}, {pause}): at least 1 byte, seconds from 0 up")
        self._set(_split=size_bytes, _pause=pause)

    def throttle(self, bytes_per_second: float) -> None:
        """Hand on no more than that many bytes a second on each link."""
        _check(bytes_per_second > 0, f"throttle({bytes_per_second}): more than 0 bytes a second")
        self._set(_rate=bytes_per_second)

    def stall(self) -> None:
        """Neither read nor hand on a byte until resume(): the sender's writes block once the buffers are full.

        The end of a link is not handed on either.
        """
        self._set(_stalled=True)

    def resume(self) -> None:
        """Let the bytes flow again; none was lost."""
        self._set(_stalled=False)

    def drop_after(self, size_bytes: int, how: How = "reset") -> None:
        """End the link that hands on this many bytes more from now on, right behind the last of them.

        Both its sides are ended, and what it held back is lost. This happens once.
        """
        _check(size_bytes >= 1 and how in ("reset", "cut"), f"drop_after({size_bytes}, {how!r})")
        self._set(_left=size_bytes, _how=how)

    def cut(self) -> None:
        """End this direction of the present links by FIN, losing what is held back; the other one goes on."""
        self._proxy._order(lambda: self._proxy._cut(self))

    def clear(self) -> None:
        """No more faults this way."""
        self._set(_delay=0.0, _split=READ_BYTES, _pause=0.0, _rate=0.0, _stalled=False, _left=None)

    def _set(self, **settings: object) -> None:
        self._proxy._order(lambda: self.__dict__.update(settings))

    def _allowance(self) -> int:
        """How many bytes may go in the next piece."""
        size = self._split
        if self._rate:
            size = min(size, max(1, int(self._rate * THROTTLE_SLICE)))
        return size if self._left is None else min(size, self._left)

    def _passed(self, size: int) -> bool:
        """Account for bytes handed on; True if the link is to end with them."""
        self.passed_bytes += size
        if self._left is None:
            return False
        self._left -= size
        if self._left:
            return False
        self._left = None
        return True


class FaultProxy:
    """A proxy on a free loopback port in front of a server, which forwards faithfully until told otherwise.

    `target` is a port of the loopback interface, or a URL or host:port. Clients connect to `url`. Nothing listens
    until start() or `with`; leaving `with` ends all links by RST. `up` is what clients send, `down` what the server
    sends. receive_buffer_bytes makes the kernel buffer less of what clients send (it takes MiB by itself), so that a
    stalled client soon feels it.
    """

    def __init__(self, target: str | int, *, receive_buffer_bytes: int | None = None) -> None:
        self._scheme, self._target = _address(target)
        self._receive_buffer_bytes = receive_buffer_bytes
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._listener: socket.socket | None = None
        self._bell: tuple[socket.socket, socket.socket] | None = None
        self._port = 0
        self._stopping = False
        self._links: list[_Link] = []
        self._newcomers: Literal["forward", "refuse", "hang"] = "forward"
        #: Faults of what clients send to the server.
        self.up = Direction(self)
        #: Faults of what the server sends to clients.
        self.down = Direction(self)
        #: How many connections were accepted so far, those refused or left hanging included.
        self.connections = 0

    def __repr__(self) -> str:
        return f"<FaultProxy {self._port or 'not started'} -> {self._target[1][0]}:{self._target[1][1]}>"

    @property
    def port(self) -> int:
        """The port, once started."""
        if not self._port:
            raise RuntimeError("the proxy has no port before start()")
        return self._port

    @property
    def url(self) -> str:
        """Where clients connect to: the target's scheme and this proxy's address."""
        return f"{self._scheme}://{HOST}:{self.port}"

    @property
    def open_links(self) -> int:
        """How many accepted connections are not over yet."""
        return len(self._links)

    # --- start and stop -------------------------------------------------------------------------------------

    def start(self) -> FaultProxy:
        """Listen; clients can connect when this returns.

        Raises:
            RuntimeError: it was started before.
        """
        if self._thread is not None:
            raise RuntimeError("a proxy starts once")
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self._receive_buffer_bytes is not None:
            # Sockets that are accepted inherit it; later it would be too late for the window.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer_bytes)
        listener.bind((HOST, 0))
        listener.listen(128)
        listener.setblocking(False)
        self._listener, self._port = listener, listener.getsockname()[1]
        self._bell = socket.socketpair()
        self._bell[1].setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"natsync-proxy-{self._port}", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop listening, end all links by RST, and wait for the thread. Idempotent."""
        if self._thread is None or self._bell is None:
            return
        self._order(self._stop)
        self._thread.join(ORDER_TIMEOUT)
        for end in self._bell:
            end.close()

    def __enter__(self) -> FaultProxy:
        return self.start()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # --- faults ---------------------------------------------------------------------------------------------

    def stall(self) -> None:
        """Direction.stall() both ways: the link looks alive and carries nothing."""
        self._order(lambda: self._stall(True))

    def resume(self) -> None:
        """Let the bytes flow again both ways."""
        self._order(lambda: self._stall(False))

    def cut(self) -> None:
        """End all present links by FIN, both sides, losing what is held back."""
        self._order(lambda: self._end_all("cut", "cut"))

    def reset(self, side: Side = "both") -> None:
        """End all present links by RST; those on the other side, if only one is meant, by FIN."""
        _check(side in ("both", "client", "server"), f"reset({side!r}): both, client or server")
        client: How = "cut" if side == "server" else "reset"
        server: How = "cut" if side == "client" else "reset"
        self._order(lambda: self._end_all(client, server))

    def refuse(self) -> None:
        """Accept new connections and close them at once. Present links go on."""
        self._welcome("refuse")

    def hang(self) -> None:
        """Accept new connections and say nothing, ever; no connection to the server is made. Present links go on."""
        self._welcome("hang")

    def forward(self) -> None:
        """Forward new connections again. Those left hanging are not revived."""
        self._welcome("forward")

    # --- orders ---------------------------------------------------------------------------------------------

    def _order(self, order: Callable[[], None]) -> None:
        """Have the proxy's thread do it, and wait until it is done; without a thread, just do it."""
        thread = self._thread
        if thread is None or not thread.is_alive():
            order()
            return
        done = threading.Event()

        def carry_out() -> None:
            order()
            done.set()

        self._orders.put(carry_out)
        self._ring()
        deadline = time.monotonic() + ORDER_TIMEOUT
        while not done.wait(0.1) and thread.is_alive():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{thread.name} did not carry out an order in {ORDER_TIMEOUT:g} s")

    def _ring(self) -> None:
        """Have the thread look at its orders."""
        assert self._bell is not None
        try:
            self._bell[1].send(b"\0")
        except OSError:  # full, so that it is awake; or closed by another thread's close()
            pass

    def _welcome(self, newcomers: Literal["forward", "refuse", "hang"]) -> None:
        self._order(lambda: setattr(self, "_newcomers", newcomers))

    def _stall(self, stalled: bool) -> None:
        self.up._stalled = self.down._stalled = stalled

    def _stop(self) -> None:
        self._stopping = True

    def _cut(self, direction: Direction) -> None:
        for link in self._links:
            link.cut(direction)
        self._sweep()

    def _end_all(self, client: How, server: How) -> None:
        for link in self._links:
            link.end(client, server)
        self._sweep()

    # --- the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        finally:
            self._end_all("reset", "reset")
            assert self._listener is not None
            self._listener.close()

    def _turn(self) -> None:
        """Wait for whatever can happen next, and do it."""
        assert self._listener is not None
        assert self._bell is not None
        now = time.monotonic()
        bell = self._bell[0].fileno()
        wanted = {self._listener.fileno(): select.POLLIN, bell: select.POLLIN}
        pause: float | None = None
        for link in self._links:
            for number, mask in link.wanted(now):
                wanted[number] = wanted.get(number, 0) | mask
            due = link.next_due(now)
            pause = pause if due is None else due - now if pause is None else min(pause, due - now)
        poll = select.poll()
        for number, mask in wanted.items():
            poll.register(number, mask)
        # Rounded up, or the last millisecond would be spent in a busy loop.
        ready = dict(poll.poll(None if pause is None else int(pause * 1000) + 1))
        if bell in ready:
            self._bell[0].recv(4096)
        self._carry_out_orders()
        if self._stopping:
            return
        if self._listener.fileno() in ready:
            self._accept()
        now = time.monotonic()
        for link in self._links:
            link.work(ready, now)
        self._sweep()

    def _carry_out_orders(self) -> None:
        while not self._orders.empty():
            self._orders.get()()

    def _sweep(self) -> None:
        self._links = [link for link in self._links if not link.over()]

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:  # it left before it was its turn
            return
        self.connections += 1
        if self._newcomers == "refuse":
            client.close()
            return
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        family, address = self._target
        server = None
        if self._newcomers == "forward":
            server = socket.socket(family)
            server.setblocking(False)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if server.connect_ex(address) not in (0, errno.EINPROGRESS):
                _reset(server)
                _reset(client)
                return
        self._links.append(_Link(self, client, server))


class _Link:
    """A client's connection and the one to the server made for it; None where it is left hanging."""

    def __init__(self, proxy: FaultProxy, client: socket.socket, server: socket.socket | None) -> None:
        self.client = client
        self.server = server
        self.connecting = server is not None
        self.up = _Flow(proxy.up, client, server or client)
        self.down = _Flow(proxy.down, server or client, client)

    def over(self) -> bool:
        """Whether nothing is left to do; both sockets are closed then."""
        if self.up.finished() and self.down.finished():
            for sock in (self.client, self.server):
                if sock is not None:
                    sock.close()
        return self.client.fileno() < 0 and (self.server is None or self.server.fileno() < 0)

    def end(self, client: How, server: How) -> None:
        """End both sides now; one that is cut lingers until its peer has closed too."""
        if self.server is None:
            self.client.close() if client == "cut" else _reset(self.client)
            return
        early = not self._connected(self.server)
        if client == "reset" or early:
            _reset(self.client)
        if server == "reset" or early:
            _reset(self.server)
        for flow in (self.up, self.down):
            flow.cut()

    def cut(self, direction: Direction) -> None:
        """End one direction."""
        if self.server is None:
            return
        if not self._connected(self.server):
            self.end("reset", "reset")
        for flow in (self.up, self.down):
            if flow.direction is direction:
                flow.cut()

    def _connected(self, server: socket.socket) -> bool:
        """Whether the connection to the server stands, now that it matters."""
        if self.connecting:
            poll = select.poll()
            poll.register(server, select.POLLOUT)
            self.connecting = not poll.poll(0) or server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
        return not self.connecting

    def wanted(self, now: float) -> list[tuple[int, int]]:
        """What to wait for: descriptors and poll's masks."""
        if self.server is None:
            return []
        if self.connecting and self.server.fileno() >= 0:
            return [(self.server.fileno(), select.POLLOUT)]
        found = []
        for flow in (self.up, self.down):
            if flow.wants_bytes():
                found.append((flow.source.fileno(), select.POLLIN))
            if flow.has_piece(now):
                found.append((flow.target.fileno(), select.POLLOUT))
        return found

    def next_due(self, now: float) -> float | None:
        """When something that is held back may go, if time is all that it waits for."""
        dues = [flow.due() for flow in (self.up, self.down) if not flow.has_piece(now)]
        return min((due for due in dues if due is not None), default=None)

    def work(self, ready: dict[int, int], now: float) -> None:
        """Move what can be moved."""
        if self.server is None:
            return
        if self.connecting:
            if self.server.fileno() in ready and not self._connected(self.server):
                self.end("reset", "reset")  # nobody listens at the target
            return
        for flow in (self.up, self.down):
            try:
                # Each for its own event: a socket that is ready for the other one would have to be tried in vain.
                if ready.get(flow.source.fileno(), 0) & ~select.POLLOUT and flow.wants_bytes():
                    flow.read(now)
                if ready.get(flow.target.fileno(), 0) & ~select.POLLIN and flow.has_piece(now) and flow.write(now):
                    self.end(flow.direction._how, flow.direction._how)
            except BlockingIOError:
                pass
            except OSError:  # a reset of one side is handed on to the other
                self.end("reset", "reset")


class _Flow:
    """One direction of a link: what was read from the source and has not been handed to the target."""

    def __init__(self, direction: Direction, source: socket.socket, target: socket.socket) -> None:
        self.direction = direction
        self.source = source
        self.target = target
        self.pieces: deque[tuple[float, memoryview]] = deque()  # with the moment before which each is held back
        self.held = 0
        self.not_before = 0.0
        self.source_ended = False
        self.target_ended = False

    def finished(self) -> bool:
        return self.source_ended and self.target_ended

    def wants_bytes(self) -> bool:
        if self.source_ended or self.source.fileno() < 0:
            return False
        return self.target_ended or (not self.direction._stalled and self.held < HELD_BYTES)

    def due(self) -> float | None:
        """When the next piece, or the end, may be handed on; None if it waits for more than time."""
        if self.direction._stalled or self.target_ended or not (self.pieces or self.source_ended):
            return None
        return max(self.not_before, self.pieces[0][0]) if self.pieces else 0.0

    def has_piece(self, now: float) -> bool:
        due = self.due()
        return due is not None and due <= now

    def read(self, now: float) -> None:
        """Take what the source has; behind the target's end it is thrown away."""
        data = self.source.recv(READ_BYTES)
        self.source_ended = not data
        if data and not self.target_ended:
            self.pieces.append((now + self.direction._delay, memoryview(data)))
            self.held += len(data)

    def write(self, now: float) -> bool:
        """Hand on the next piece; True if the link is to end with it."""
        if not self.pieces:
            self.target.shutdown(socket.SHUT_WR)
            self.target_ended = True
            return False
        due, data = self.pieces[0]
        sent = self.target.send(data[: self.direction._allowance()])
        self.held -= sent
        if sent == len(data):
            self.pieces.popleft()
        else:
            self.pieces[0] = (due, data[sent:])
        rate = self.direction._rate
        self.not_before = now + max(self.direction._pause, sent / rate if rate else 0.0)
        return self.direction._passed(sent)

    def cut(self) -> None:
        """Hand on nothing more, and say so by FIN."""
        self.pieces.clear()
        self.held = 0
        if self.source.fileno() < 0:
            self.source_ended = True
        if self.target_ended:
            return
        self.target_ended = True
        try:
            self.target.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EBADF):
                raise


def _reset(sock: socket.socket) -> None:
    """Close a socket by RST."""
    if sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()


def _address(target: str | int) -> tuple[str, tuple[socket.AddressFamily, tuple[str, int]]]:
    """Scheme and address of a target."""
    text = f"nats://{HOST}:{target}" if isinstance(target, int) else target
    parts = urlsplit(text if "://" in text else f"nats://{text}")
    if not parts.hostname or not parts.port:
        raise ValueError("a proxy's target is a port, a URL with host and port, or host:port")
    family, _, _, _, address = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)[0]
    return parts.scheme, (family, (str(address[0]), int(address[1])))


def _check(right: bool, text: str) -> None:
    if not right:
        raise ValueError(text)
