"""Dialing one server: TCP, INFO, TLS, CONNECT and PONG under one deadline; then bytes in both directions.

The handshake runs on pynats2's client, with its faults mended (docs/pynats2.md lists them). A Transport knows nothing
of the protocol. One thread may read while another writes; shutdown() may come from any thread and wakes both.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import struct
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import BuiltinMethodType
from typing import Any

from natsync import _pynats2, auth
from natsync._version import __version__
from natsync.concurrency import Deadline, Signal, after_fork_in_child
from natsync.errors import ConnectError, NatsError, ProtocolError, TimedOut
from natsync.options import ConnectOptions, Server
from natsync.protocol import MAX_INFO_LINE, PING
from natsync.resolver import Address, look_up
from natsync.server_errors import server_error
from natsync.server_info import reliable

#: Bytes asked of the socket at once. Bursts are parsed, and their consumers woken, once a read.
READ_BYTES = 256 << 10
#: Bytes handed to the kernel at once where it does not tell how many the other end has. It wakes a write that is
#: blocked only now and then, and each part means waiting for the interpreter again.
PART_BYTES = 64 << 10
#: Where Linux has tcpi_bytes_acked, 64 bits wide, in its struct tcp_info.
_BYTES_ACKED = 120
#: What a handshake line may grow to before the peer is taken for something else.
_MAX_LINE = MAX_INFO_LINE
#: First bytes of a TLS record: change of cipher, alert, handshake, data.
_TLS_RECORDS = range(20, 24)

#: What to do about what OpenSSL says, by a part of its reason.
_TLS_ADVICE = (
    ("CERTIFICATE_REQUIRED", "load a client certificate into the ssl.SSLContext that is given as tls"),
    ("ALERT_BAD_CERTIFICATE", "load a client certificate that the server trusts into the ssl.SSLContext given as tls"),
    ("ALERT_UNKNOWN_CA", "the server does not trust the authority of the client certificate"),
    ("ALERT_HANDSHAKE_FAILURE", "the server may want a client certificate, loaded into the context given as tls"),
    ("mismatch", "if the server is known by another name, give that as tls_hostname"),
    ("CERTIFICATE_VERIFY_FAILED", "to trust its authority, give an ssl.SSLContext that does as tls"),
)


class Transport:
    """A connected socket: receive() for one thread, send() for another, shutdown() for any.

    Attributes:
        hide: takes the secrets out of a text of the server, which might repeat them.
    """

    def __init__(self, sock: socket.socket, server: Server, early: bytes) -> None:
        self.hide: Callable[[str], str] = str
        self._sock = sock
        self._early = early  # came in the same read as the last line of the handshake
        self.server = server
        self._tells = bool(self.acknowledged())  # 0, behind a handshake: the kernel has the field and does not count

    def receive(self) -> bytes:
        """Block until bytes come; b"" at the end of the link. For the reader thread alone."""
        if self._early:
            early, self._early = self._early, b""
            return early
        return self._sock.recv(READ_BYTES)

    def send(self, data: bytes, progress: Callable[[], object] = lambda: None) -> None:
        """Block until all is handed to the kernel. For the writer thread alone.

        progress() is called between the parts of what is large, where acknowledged() does not tell.
        """
        if self._tells or len(data) <= PART_BYTES:
            self._sock.sendall(data)
            return
        view = memoryview(data)
        for start in range(0, len(data), PART_BYTES):
            self._sock.sendall(view[start : start + PART_BYTES])
            progress()

    def acknowledged(self) -> int | None:
        """How many bytes the other end has confirmed; None where the kernel does not tell. For any thread."""
        if sys.platform != "linux":
            return None
        try:
            known = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
        except OSError:  # not TCP, or closed
            return None
        return int.from_bytes(known[_BYTES_ACKED:], sys.byteorder) if len(known) == _BYTES_ACKED + 8 else None

    @property
    def send_now(self) -> Callable[[bytes, int], int] | None:
        """The socket's send(data, flags), for a thread that may not wait; None where it cannot be had as one C call."""
        send: Any = self._sock.send
        return send if hasattr(socket, "MSG_DONTWAIT") and isinstance(send, BuiltinMethodType) else None

    def shutdown(self) -> None:
        """End the link: blocked reads and writes in other threads return or raise at once."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def abort(self) -> None:
        """shutdown(), and what the kernel has not sent yet is dropped: it must not come behind the next link's."""
        linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)  # on, for no seconds
        with suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.shutdown()

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

    def send(self, data: bytes, progress: Callable[[], object] = lambda: None) -> None:
        super().send(self._tls.encrypt(data), progress)

    @property
    def send_now(self) -> None:
        """None: to encrypt is more than one C call."""


class _Tls:
    """TLS over memory: bytes of the socket in, bytes for the socket out."""

    def __init__(self, context: ssl.SSLContext, hostname: str) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=hostname)
        self._lock = threading.Lock()
        self.ended = False  # the peer has said goodbye, or its end was cut off

    def handshake(self, sock: socket.socket, deadline: Deadline) -> None:
        """Shake hands.

        Raises:
            ConnectError: the peer hangs up, or what it says is not TLS at all.
            ssl.SSLError, OSError: it fails otherwise.
        """
        greeted = False
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
            if not greeted and data[0] not in _TLS_RECORDS:
                raise _PlainAnswer(data)
            greeted = True
            self._incoming.write(data)

    def decrypt(self, data: bytes) -> bytes | None:
        """Plain bytes; b"" at the end of the link, None if more is needed.

        What TLS wants to say of its own, such as the answer to a key update, leaves with the next encrypt().
        """
        with self._lock:
            self._incoming.write(data) if data else self._incoming.write_eof()
            return self._plain_locked()

    def pending(self) -> bytes:
        """What came in the same read as the end of the handshake: in TLS 1.2 the server, which greets then, ends it."""
        with self._lock:
            return self._plain_locked() or b""

    def _plain_locked(self) -> bytes | None:
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


class _PlainAnswer(Exception):
    """The peer answered TLS's greeting in plain text, which is the argument."""


class Dialing:
    """What lets close() cut a dial short: how to stop what is being waited for, if anything is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stop: Callable[[], object] | None = None
        self._cancelled = False

    def begin(self, stop: Callable[[], object]) -> None:
        """Something is going to be waited for that stop() ends; raises ConnectError if nobody wants it any more."""
        with self._lock:
            if self._cancelled:
                raise ConnectError("closed while connecting")
            self._stop = stop

    def end(self) -> None:
        with self._lock:
            self._stop = None

    def cancel(self) -> None:
        """Make the present dial fail at once, and every later one."""
        with self._lock:
            self._cancelled = True
            if self._stop is not None:
                with suppress(OSError):
                    self._stop()


def dial(server: Server, options: ConnectOptions, dialing: Dialing | None = None) -> tuple[Transport, dict[str, Any]]:
    """Connect to one server; returns the transport and the server's INFO.

    Blocks up to options.connect_timeout for everything together: name, TCP, TLS, INFO, and the PONG that proves that
    the credentials were accepted; and before that as long as the user's functions for credentials do.

    Raises:
        ConnectError: it cannot be reached, closed the connection, demands less security than asked for, or there are no
            credentials to show.
        AuthorizationError: it refused the credentials.
        ProtocolError: what answered is not a NATS server.
        TimedOut: the handshake was not complete in time.
    """
    handshake = _Handshake(server, options, dialing or Dialing(), auth.fetch(options, server))
    try:
        handshake.connect()
        return handshake.transport(), handshake.info
    except TimeoutError as error:
        late = f"{server} did not answer within {options.connect_timeout:g} s"
        raise TimedOut(late + handshake.hint_of_silence()) from error
    except ssl.SSLError as error:
        raise ConnectError(f"TLS with {server} failed: {_tls_failure(error)}") from error
    except OSError as error:
        if isinstance(error, ConnectError):
            raise
        raise ConnectError(f"cannot connect to {server}: {error.strerror or error}") from error
    finally:
        handshake.close_unless_taken()


class _Handshake(_pynats2.NATSNoSubscribeClient):
    """pynats2's handshake, mended: one deadline, an end that is noticed, any order of lines, PONG awaited."""

    def __init__(
        self, server: Server, options: ConnectOptions, dialing: Dialing, credentials: auth.Credentials
    ) -> None:
        super().__init__(str(server), name=options.name or "natsync", socket_timeout=options.connect_timeout)
        self._server = server
        self._options = options
        self._dialing = dialing
        self._credentials = credentials
        self._secrets_sent = False
        self._deadline = Deadline.after(options.connect_timeout)
        self._tls: _Tls | None = None
        self._raw: socket.socket | None = None
        self.info: dict[str, Any] = {}

    def connect(self) -> None:
        self._raw = _connect(self._server, self._deadline, self._dialing)
        self._raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = self._raw
        if self._options.tls_first:
            self._connect_tls()
        self._await(_pynats2.INFO_RE)
        wants_tls, nonce = self._wants_tls(), self._nonce()
        if wants_tls and self._tls is None:
            self._connect_tls()
        self._send_connect_command(nonce)
        self._await(_pynats2.PONG_RE)

    def hint_of_silence(self) -> str:
        """What may be behind a server that does not greet."""
        if self.info or self._options.tls_first or self._raw is None or self._socket_buffer:
            return ""
        return "; if it wants TLS before its greeting (handshake_first), use tls_first=True"

    def transport(self) -> Transport:
        """Hand the socket over, in blocking mode: from here on Session watches the time."""
        sock = self._raw
        assert sock is not None
        sock.settimeout(None)
        self._raw = None
        made = Transport(sock, self._server, self._socket_buffer)
        if self._tls is not None:
            made = TLSTransport(sock, self._server, self._socket_buffer, self._tls)
        made.hide = self._credentials.hide
        return made

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
        if wanted and self._tls is None and not (required or available):
            raise ConnectError(f"{self._server} offers no TLS, but TLS is wanted; nothing was sent to it")
        if required and self._options.tls is False:
            raise ConnectError(f"{self._server} requires TLS, but tls=False")
        return wanted or bool(required)

    def _nonce(self) -> str:
        """What the server wants signed; "" if nothing needs to be.

        Raises:
            ConnectError: there is a key to prove, and the server does not ask for the proof.
        """
        nonce: str = self.info.get("nonce", "")
        if not self._credentials.signs:
            return ""
        if not nonce:
            raise ConnectError(
                f"{self._server} gives no nonce to sign: it demands less security than nkey_seed or credentials ask "
                "for; nothing was sent to it"
            )
        return nonce

    def _connect_tls(self) -> None:
        context = self._options.tls
        if not isinstance(context, ssl.SSLContext):
            context = ssl.create_default_context()
        if self._socket_buffer:
            raise self._plain_instead_of_tls(self._socket_buffer)
        tls = _Tls(context, self._options.tls_hostname or self._server.tls_name or self._server.host)
        assert self._raw is not None
        try:
            tls.handshake(self._raw, self._deadline)
        except _PlainAnswer as answer:
            plain = answer.args[0]
        else:
            self._tls = tls
            self._socket_buffer = tls.pending()  # no recv() will bring it
            return
        raise self._plain_instead_of_tls(plain)

    def _plain_instead_of_tls(self, data: bytes) -> NatsError:
        """The error for a server that speaks plainly where TLS should start; it may say why it will not go on."""
        if data[:4].upper() == b"-ERR":
            return self._refusal(data.partition(b"\r\n")[0])
        if self._options.tls_first:
            advice = "it greets before TLS, if it speaks TLS at all: leave tls_first out"
            return ConnectError(f"{self._server} answered in plain text where TLS should start; {advice}")
        return ProtocolError(f"{self._server} sent plain bytes where TLS should start")

    # -- lines -------------------------------------------------------------------------------------------------

    def _send_connect_command(self, nonce: str) -> None:
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
        fields.update(self._credentials.fields(nonce))
        self._secrets_sent = True
        with suppress(BrokenPipeError, ConnectionResetError):  # what it said before it hung up is read next
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
                raise self._refusal(line)
            elif command not in (_pynats2.OK_RE, _pynats2.PONG_RE):
                raise ProtocolError(f"{self._server} is no NATS server: it sent {self._quote(line)}")
            if command is wanted:
                return

    def _take_info(self, line: bytes) -> None:
        info = _json(line[4:])
        if not isinstance(info, dict):
            raise ProtocolError(f"{self._server} sent an INFO that is no JSON object: {self._quote(line)}")
        self.info.update(reliable(info))

    def _quote(self, line: bytes) -> str:
        """The beginning of an odd line. Whoever has seen the credentials might send them back, so it is not quoted."""
        return "what it should not after CONNECT" if self._secrets_sent else repr(line[:60])

    def _refusal(self, line: bytes) -> NatsError:
        text = line[4:].strip().strip(b"'").decode("utf-8", "replace")
        return server_error(str(self._server), self._credentials.hide(text))

    def _readline(self, *, size: int | None = None) -> bytes:
        """One line with its CRLF. Raises at the end of the link, where pynats2 would spin."""
        while b"\r\n" not in self._socket_buffer:
            if len(self._socket_buffer) > _MAX_LINE:
                raise ProtocolError(f"{self._server} is no NATS server: no line end in {_MAX_LINE} bytes")
            data = self._read()
            if not data:
                hint = self.hint_of_silence()
                raise ConnectError(f"{self._server} closed the connection during the handshake{hint}")
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


def _connect(server: Server, deadline: Deadline, dialing: Dialing) -> socket.socket:
    """A TCP connection to the first address of the host that answers; a deaf one leaves time for those behind it."""
    addresses = _addresses(server, deadline, dialing)
    failure: OSError = OSError(f"{server.host} has no address")
    for tried, (family, kind, protocol, _, address) in enumerate(addresses):
        left = _left(deadline, "connecting")
        sock = socket.socket(family, kind, protocol)
        _sockets.add(sock)
        try:
            dialing.begin(lambda sock=sock: sock.shutdown(socket.SHUT_RDWR))  # type: ignore[misc]
            sock.settimeout(None if left is None else left / (len(addresses) - tried))
            sock.connect(address)
            return sock
        except OSError as error:
            dialing.end()
            sock.close()
            failure = error
    raise failure


def _addresses(server: Server, deadline: Deadline, dialing: Dialing) -> list[Address]:
    if server.is_address:
        return socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    woken = Signal()
    dialing.begin(woken.set)
    lookup = look_up(server.host, server.port)
    lookup.await_by(woken)
    try:
        woken.wait(deadline)
    finally:
        lookup.forget(woken)
        dialing.end()
    if not lookup.done:
        dialing.begin(woken.set)  # raises if it was cancelled
        raise TimeoutError(f"{server.host} was not resolved in time")
    if lookup.error:
        raise ConnectError(f"cannot connect to {server}: {lookup.error}")
    return lookup.addresses


def _tls_failure(error: ssl.SSLError) -> str:
    """What OpenSSL says, with advice where there is some."""
    said = error.reason or str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        said += f": {error.verify_message}"
    advice = next((advice for part, advice in _TLS_ADVICE if part in said), "")
    return said + (f"; {advice}" if advice else "")


def _json(text: bytes) -> object:
    """The value, None if it is not JSON. No error of the parser is chained to: it would hold the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    """In a forked child: give back every descriptor, those that are being dialed included; nothing goes on the wire."""
    for sock in list(_sockets):
        with suppress(OSError):
            sock.close()


after_fork_in_child(_close_in_child)


def _left(deadline: Deadline, what: str) -> float | None:
    left = deadline.remaining()
    if left == 0:
        raise TimeoutError(f"no time left for {what}")
    return left
