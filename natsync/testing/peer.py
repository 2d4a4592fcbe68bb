"""A NATS server that does what a test's script tells it, for the faults that a real one does not have.

It knows of the protocol only how to greet a client; every byte after that is the script's. Each accepted
connection runs the script in a daemon thread of its own. Only the standard library is used.
"""

from __future__ import annotations

import errno
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

#: Seconds that stop() waits for the threads, whose sockets are shut down by then.
JOIN_TIMEOUT = 5.0


class PeerConnection:
    """One accepted connection, as its script sees it. `index` counts from 0; `sock` is the bare socket."""

    def __init__(self, sock: socket.socket, index: int, stopping: threading.Event) -> None:
        self.sock = sock
        self.index = index
        self._stopping = stopping
        self._received = bytearray()

    def recv_line(self) -> bytes:
        """The next line, read through its CRLF and returned without it.

        Raises:
            EOFError: the client closed the connection first.
        """
        while (end := self._received.find(b"\r\n")) < 0:
            self._receive_more()
        line = self._take(end + 2)
        return line[:-2]

    def recv_exactly(self, size: int) -> bytes:
        """The next size bytes.

        Raises:
            EOFError: the client closed the connection first.
        """
        while len(self._received) < size:
            self._receive_more()
        return self._take(size)

    def recv_until_eof(self) -> bytes:
        """All that the client still sends, up to its closing of the connection."""
        try:
            while True:
                self._receive_more()
        except EOFError:
            return self._take(len(self._received))

    def send(self, data: bytes) -> None:
        """Send these bytes, whole; blocks while the client does not read."""
        self.sock.sendall(data)

    def send_info(self, **fields: Any) -> None:
        """Send an INFO line. Fields replace the usual ones; None leaves one out."""
        host, port = self.sock.getsockname()[:2]
        info = {
            "server_id": "SCRIPTEDPEER",
            "server_name": "scripted-peer",
            "version": "2.10.0",
            "proto": 1,
            "host": host,
            "port": port,
            "headers": True,
            "max_payload": 1048576,
            "client_id": self.index + 1,
            "client_ip": host,
        }
        info.update(fields)
        kept = {key: value for key, value in info.items() if value is not None}
        self.send(b"INFO " + json.dumps(kept).encode() + b" \r\n")

    def handshake(self, **fields: Any) -> dict[str, Any]:
        """Send INFO, read CONNECT and PING, answer PONG; return what the client's CONNECT says."""
        self.send_info(**fields)
        line = self.recv_line()
        assert line.startswith(b"CONNECT "), f"expected CONNECT, got {line!r}"
        connect: dict[str, Any] = json.loads(line[len(b"CONNECT ") :])
        line = self.recv_line()
        assert line == b"PING", f"expected PING, got {line!r}"
        self.send(b"PONG\r\n")
        return connect

    def hold(self) -> None:
        """Neither read nor write, with the connection open, until the peer is stopped."""
        self._stopping.wait()

    def close(self) -> None:
        """Close the connection so that the client reads the end of it after all that was sent. Idempotent."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
            # A close with unread bytes sends RST, and what has not left yet is lost.
            self.sock.setblocking(False)
            while self.sock.recv(65536):
                pass
        except OSError:
            pass
        self.sock.close()

    def reset(self) -> None:
        """Close the connection by RST: the client gets ECONNRESET, and may lose what it has not read yet."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _receive_more(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise EOFError("the client closed the connection")
        self._received += data

    def _take(self, size: int) -> bytes:
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def _interrupt(self) -> None:
        """Wake a script that waits in recv or send; called from another thread than the script's."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


Script = Callable[[PeerConnection], object]


class ScriptedPeer:
    """Listens on a free loopback port and runs script(connection) for each client; a context manager.

    A connection is closed when its script returns. What scripts raise is collected in `errors`, but for
    EOFError and ConnectionError, which are how a client leaves, and for what stop() itself causes. Leaving
    `with` raises the first of them unless check is False, so that an assertion in a script fails the test.
    Nothing listens until start() or `with`.
    """

    def __init__(self, script: Script, *, ipv6: bool = False, check: bool = True) -> None:
        self._script = script
        self._family = socket.AF_INET6 if ipv6 else socket.AF_INET
        self._host = "::1" if ipv6 else "127.0.0.1"
        self._check = check
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._running: list[tuple[threading.Thread, PeerConnection]] = []
        self._port = 0
        #: What scripts raised, in order.
        self.errors: list[Exception] = []

    @property
    def port(self) -> int:
        """The port, once started."""
        if not self._port:
            raise RuntimeError("the peer has no port before start()")
        return self._port

    @property
    def url(self) -> str:
        """Where clients connect, once started."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"nats://{host}:{self.port}"

    @property
    def accepted(self) -> int:
        """How many connections were accepted so far."""
        with self._lock:
            return len(self._running)

    def start(self) -> ScriptedPeer:
        """Listen; the port is known and clients can connect when this returns.

        Raises:
            RuntimeError: it was started before.
        """
        if self._listener is not None or self._stopping.is_set():
            raise RuntimeError("a peer starts once")
        self._listener = socket.create_server((self._host, 0), family=self._family)
        self._port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(
            target=self._accept, args=(self._listener,), name="natsync-peer-accept", daemon=True
        )
        self._acceptor.start()
        return self

    def stop(self) -> None:
        """Stop listening, shut every connection down and wait for the scripts. Idempotent.

        Raises:
            RuntimeError: a script did not end in JOIN_TIMEOUT seconds although its socket was shut down.
        """
        if self._listener is None or self._acceptor is None:
            return
        with self._lock:
            first = not self._stopping.is_set()
            self._stopping.set()
        if first:
            self._wake_acceptor()
        self._acceptor.join(JOIN_TIMEOUT)
        for _, connection in self._running:
            connection._interrupt()
        deadline = time.monotonic() + JOIN_TIMEOUT
        threads = [self._acceptor, *(thread for thread, _ in self._running)]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = [thread.name for thread in threads if thread.is_alive()]
        if stuck:
            raise RuntimeError(f"still running {JOIN_TIMEOUT:g} s after stop: {', '.join(stuck)}")

    def __enter__(self) -> ScriptedPeer:
        return self.start()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()
        if self._check and exc is None and self.errors:
            raise self.errors[0]

    def _wake_acceptor(self) -> None:
        # Closing a listening socket does not wake a thread that waits in accept(); a connection does.
        try:
            socket.create_connection((self._host, self._port), JOIN_TIMEOUT).close()
        except OSError:
            pass

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                sock, _ = listener.accept()
                with self._lock:
                    if self._stopping.is_set():
                        sock.close()
                        return
                    connection = PeerConnection(sock, len(self._running), self._stopping)
                    thread = threading.Thread(
                        target=self._run,
                        args=(connection,),
                        name=f"natsync-peer-{connection.index}",
                        daemon=True,
                    )
                    self._running.append((thread, connection))
                thread.start()

    def _run(self, connection: PeerConnection) -> None:
        try:
            self._script(connection)
        except (EOFError, ConnectionError):
            pass
        except Exception as error:
            if not (isinstance(error, OSError) and (self._stopping.is_set() or error.errno == errno.EBADF)):
                self.errors.append(error)
        finally:
            connection.close()
