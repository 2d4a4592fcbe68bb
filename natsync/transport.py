"""Dialing one server: TCP, INFO, TLS, CONNECT and PONG under one deadline; then bytes in both directions.

The handshake runs on pynats2's client, with its faults mended (docs/pynats2.md lists them). A Transport knows nothing
of the protocol. One thread may read while another writes; shutdown() may come from any thread and wakes both.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
from contextlib import suppress
from typing import Any

from natsync import _pynats2, auth
from natsync._version import __version__
from natsync.concurrency import Deadline
from natsync.errors import AuthorizationError, ConnectError, ProtocolError, TimedOut
from natsync.options import ConnectOptions, Server
from natsync.protocol import MAX_INFO_LINE, PING

#: Bytes asked of the socket at once. Bursts are parsed, and their consumers woken, once a read.
READ_BYTES = 256 << 10
#: What a handshake line may grow to before the peer is taken for something else.
_MAX_LINE = MAX_INFO_LINE

_AUTH_ERRORS = ("authorization violation", "user authentication", "account authentication", "authentication timeout")


class Transport:
    """A connected socket: receive() for one thread, send() for another, shutdown() for any."""

    def __init__(self, sock: socket.socket, server: Server, early: bytes) -> None:
        self._sock = sock
        self._early = early  # came in the same read as the last line of the handshake
        self.server = server

    def receive(self) -> bytes:
        """Block until bytes come; b"" at the end of the link. For the reader thread alone."""
        if self._early:
            early, self._early = self._early, b""
            return early
        return self._sock.recv(READ_BYTES)

    def send(self, data: bytes) -> None:
        """Block until all is handed to the kernel. For the writer thread alone."""
        self._sock.sendall(data)

    def shutdown(self) -> None:
        """End the link: blocked reads and writes in other threads return or raise at once."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the descriptor back; only when no thread is in receive() or send()."""
        self._sock.close()

    def abandon(self) -> None:
        """Close the descriptor in a forked child without a word on the wire, which belongs to the parent."""
        with suppress(OSError):
            self._sock.close()


class TLSTransport(Transport):
    """The same over TLS.

    OpenSSL's connection object must not be used by two threads at once, and a lock around blocking calls would let a
    reader that waits for data keep the writer out. So TLS works on memory here, each step under a lock, and the
    socket is read and written outside of it.
    """

    def __init__(self, sock: socket.socket, server: Server, early: bytes, tls: _Tls) -> None:
        super().__init__(sock, server, early)
        self._tls = tls

    def receive(self) -> bytes:
        if self._early:
            return super().receive()
        data = None
        while data is None and not self._tls.ended:
            data = self._tls.decrypt(self._sock.recv(READ_BYTES))
        return data or b""

    def send(self, data: bytes) -> None:
        self._sock.sendall(self._tls.encrypt(data))


class _Tls:
    """TLS over memory: bytes of the socket in, bytes for the socket out."""

    def __init__(self, context: ssl.SSLContext, hostname: str) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=hostname)
        self._lock = threading.Lock()
        self.ended = False  # the peer has said goodbye, or its end was cut off

    def handshake(self, sock: socket.socket, deadline: Deadline) -> None:
        while True:
            try:
                self._object.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                done = False
            if self._outgoing.pending:
                sock.settimeout(_left(deadline, "the TLS handshake"))
                sock.sendall(self._outgoing.read())
            if done:
                return
            sock.settimeout(_left(deadline, "the TLS handshake"))
            data = sock.recv(READ_BYTES)
            if not data:
                raise ConnectError("the server closed the connection during the TLS handshake")
            self._incoming.write(data)

    def decrypt(self, data: bytes) -> bytes | None:
        """Plain bytes; b"" at the end of the link, None if more is needed.

        What TLS wants to say of its own, such as the answer to a key update, leaves with the next encrypt().
        """
        with self._lock:
            self._incoming.write(data) if data else self._incoming.write_eof()
            plain = []
            try:
                while piece := self._object.read(READ_BYTES):
                    plain.append(piece)
            except ssl.SSLWantReadError:
                return b"".join(plain) or None
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                pass
            self.ended = True
            return b"".join(plain)

    def encrypt(self, data: bytes) -> bytes:
        with self._lock:
            self._object.write(data)
            return self._outgoing.read()


class Dialing:
    """What lets close() cut a dial short: the socket that is being dialed, if any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._cancelled = False

    def begin(self, sock: socket.socket) -> None:
        """This socket is going to connect; raises ConnectError if nobody wants that any more."""
        with self._lock:
            if self._cancelled:
                raise ConnectError("closed while connecting")
            self._sock = sock

    def end(self) -> None:
        with self._lock:
            self._sock = None

    def cancel(self) -> None:
        """Make the present dial fail at once, and every later one."""
        with self._lock:
            self._cancelled = True
            if self._sock is not None:
                with suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)


def dial(server: Server, options: ConnectOptions, dialing: Dialing | None = None) -> tuple[Transport, dict[str, Any]]:
    """Connect to one server; returns the transport and the server's INFO.

    Blocks up to options.connect_timeout for everything together: TCP, TLS, INFO, and the PONG that proves that the
    credentials were accepted.

    Raises:
        ConnectError: it cannot be reached, closed the connection, or will not speak TLS where TLS is wanted.
        AuthorizationError: it refused the credentials.
        ProtocolError: what answered is not a NATS server.
        TimedOut: the handshake was not complete in time.
    """
    handshake = _Handshake(server, options, dialing or Dialing())
    try:
        handshake.connect()
        return handshake.transport(), handshake.info
    except TimeoutError as error:
        raise TimedOut(f"{server} did not answer within {options.connect_timeout:g} s") from error
    except ssl.SSLError as error:
        raise ConnectError(f"TLS with {server} failed: {error.reason or error}") from error
    except (ConnectionError, socket.gaierror) as error:
        if isinstance(error, ConnectError):
            raise
        raise ConnectError(f"cannot connect to {server}: {error.strerror or error}") from error
    except OSError as error:
        raise ConnectError(f"cannot connect to {server}: {error}") from error
    finally:
        handshake.close_unless_taken()


class _Handshake(_pynats2.NATSNoSubscribeClient):
    """pynats2's handshake, mended: one deadline, an end that is noticed, any order of lines, PONG awaited."""

    def __init__(self, server: Server, options: ConnectOptions, dialing: Dialing) -> None:
        super().__init__(str(server), name=options.name or "natsync", socket_timeout=options.connect_timeout)
        self._server = server
        self._options = options
        self._dialing = dialing
        self._deadline = Deadline.after(options.connect_timeout)
        self._tls: _Tls | None = None
        self._raw: socket.socket | None = None
        self.info: dict[str, Any] = {}

    def connect(self) -> None:
        host, port = self._server.host, self._server.port
        self._raw = _connect(host, port, self._deadline, self._dialing)
        self._raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = self._raw
        self._await(_pynats2.INFO_RE)
        if self._wants_tls():
            self._connect_tls()
        self._send_connect_command()
        self._await(_pynats2.PONG_RE)

    def transport(self) -> Transport:
        """Hand the socket over, in blocking mode: from here on Session watches the time."""
        sock = self._raw
        assert sock is not None
        sock.settimeout(None)
        self._raw = None
        if self._tls is not None:
            return TLSTransport(sock, self._server, self._socket_buffer, self._tls)
        return Transport(sock, self._server, self._socket_buffer)

    def close_unless_taken(self) -> None:
        self._dialing.end()
        if self._raw is not None:
            self._raw.close()

    # -- TLS ---------------------------------------------------------------------------------------------------

    def _wants_tls(self) -> bool:
        """Whether to speak TLS; never less than was asked for.

        Raises:
            ConnectError: TLS is wanted here and the server has none, or the server demands it and tls=False.
        """
        wanted = bool(self._options.tls) or self._server.tls
        required, available = self.info.get("tls_required", False), self.info.get("tls_available", False)
        if wanted and not (required or available):
            raise ConnectError(f"{self._server} offers no TLS, but TLS is wanted; nothing was sent to it")
        if required and self._options.tls is False:
            raise ConnectError(f"{self._server} requires TLS, but tls=False")
        return wanted or bool(required)

    def _connect_tls(self) -> None:
        context = self._options.tls
        if not isinstance(context, ssl.SSLContext):
            context = ssl.create_default_context()
        if self._socket_buffer:
            raise ProtocolError("the server sent plain bytes behind its INFO although TLS follows")
        tls = _Tls(context, self._options.tls_hostname or self._server.host)
        assert self._raw is not None
        tls.handshake(self._raw, self._deadline)
        self._tls = tls

    # -- lines -------------------------------------------------------------------------------------------------

    def _send_connect_command(self) -> None:
        fields: dict[str, Any] = {
            "verbose": False,
            "pedantic": False,
            "tls_required": self._tls is not None,
            "lang": "python-natsync",
            "version": __version__,
            "protocol": 1,
            "echo": not self._options.no_echo,
            "headers": True,
            "no_responders": bool(self.info.get("headers", False)),
        }
        if self._options.name is not None:
            fields["name"] = self._options.name
        fields.update(auth.connect_fields(self._options, self._server))
        self._write(b"CONNECT " + json.dumps(fields).encode() + b"\r\n" + PING)

    def _await(self, wanted: re.Pattern[bytes]) -> None:
        """Read lines until the wanted one; what else may come meanwhile is answered or kept."""
        while True:
            line = self._readline()
            words = line.split(None, 1) or [b""]
            command = self._get_command(words[0].upper() + b"\r\n")
            if command is _pynats2.INFO_RE:
                self._take_info(line)
            elif command is _pynats2.PING_RE:
                self._write(b"PONG\r\n")
            elif command is _pynats2.ERR_RE:
                raise _refusal(self._server, line)
            elif command not in (_pynats2.OK_RE, _pynats2.PONG_RE):
                raise ProtocolError(f"{self._server} is no NATS server: it sent {line[:60]!r}")
            if command is wanted:
                return

    def _take_info(self, line: bytes) -> None:
        try:
            info = json.loads(line[4:])
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"{self._server} sent an INFO that is not JSON: {line[:60]!r}") from error
        if not isinstance(info, dict):
            raise ProtocolError(f"{self._server} sent an INFO that is no object: {line[:60]!r}")
        self.info.update(info)

    def _readline(self, *, size: int | None = None) -> bytes:
        """One line with its CRLF. Raises at the end of the link, where pynats2 would spin."""
        while b"\r\n" not in self._socket_buffer:
            if len(self._socket_buffer) > _MAX_LINE:
                raise ProtocolError(f"{self._server} is no NATS server: no line end in {_MAX_LINE} bytes")
            data = self._read()
            if not data:
                raise ConnectError(f"{self._server} closed the connection during the handshake")
            self._socket_buffer += data
        line, _, self._socket_buffer = self._socket_buffer.partition(b"\r\n")
        return line + b"\r\n"

    def _read(self) -> bytes:
        assert self._raw is not None
        while True:
            self._raw.settimeout(_left(self._deadline, "the handshake"))
            if self._tls is not None and self._tls.ended:
                return b""
            data = self._raw.recv(READ_BYTES)
            plain = data if self._tls is None else self._tls.decrypt(data)
            if plain is not None:
                return plain

    def _write(self, data: bytes) -> None:
        assert self._raw is not None
        self._raw.settimeout(_left(self._deadline, "the handshake"))
        self._raw.sendall(data if self._tls is None else self._tls.encrypt(data))


def _connect(host: str, port: int, deadline: Deadline, dialing: Dialing) -> socket.socket:
    """A TCP connection to the first address of the host that answers; a deaf one leaves time for those behind it."""
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failure: OSError = OSError(f"{host} has no address")
    for tried, (family, kind, protocol, _, address) in enumerate(addresses):
        left = _left(deadline, "connecting")
        sock = socket.socket(family, kind, protocol)
        try:
            dialing.begin(sock)
            sock.settimeout(None if left is None else left / (len(addresses) - tried))
            sock.connect(address)
            return sock
        except OSError as error:
            dialing.end()
            sock.close()
            failure = error
    raise failure


def _left(deadline: Deadline, what: str) -> float | None:
    left = deadline.remaining()
    if left == 0:
        raise TimeoutError(f"no time left for {what}")
    return left


def _refusal(server: Server, line: bytes) -> AuthorizationError | ConnectError:
    text = line[4:].strip().strip(b"'").decode("utf-8", "replace")
    if text.lower().startswith(_AUTH_ERRORS):
        return AuthorizationError(f"{server} refused the credentials: {text}")
    return ConnectError(f"{server} refused the connection: {text}")
