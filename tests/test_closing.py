"""natsync.closing: a read that is blocked on a third party returns at once, whatever client library reads."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import trustme
import urllib3

import lock_order
from natsync.closing import find_socket, wake
from natsync.testing import eventually
from support import thread_frames
from thirdparty import ThirdParty

#: Seconds in which a woken read must be back; without being woken it would block far longer.
AT_ONCE = 5.0


class Reader:
    """A thread in a blocking read, and what became of it."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self.outcome: Any = None
        self._read = read
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        eventually(self._in_socket, message="the thread never came to read from its socket")

    def _run(self) -> None:
        try:
            self.outcome = self._read()
        except Exception as error:
            self.outcome = error

    def _in_socket(self) -> bool:
        """Whether the thread is in the read itself: in recv(), called from here, or in the file object of a socket.

        Under --lock-order the innermost frame is the instrument's, around the read.
        """
        frame = thread_frames().get(self._thread.ident or 0)
        return frame is not None and (
            frame.f_code is getattr(self._read, "__code__", None)
            or frame.f_code.co_filename in (socket.__file__, ssl.__file__, lock_order.__file__)
        )

    def back(self) -> bool:
        self._thread.join(AT_ONCE)
        return not self._thread.is_alive()


@pytest.fixture(scope="module")
def third_party() -> Iterator[ThirdParty]:
    with ThirdParty() as party:
        yield party


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


# -- real clients, a real service -----------------------------------------------------------------------------------


@contextlib.contextmanager
def with_requests(url: str) -> Iterator[Any]:
    with requests.get(url, stream=True, timeout=30) as response:
        yield response


@contextlib.contextmanager
def with_urllib3(url: str) -> Iterator[Any]:
    with urllib3.PoolManager() as pool:
        response = pool.request("GET", url, preload_content=False, timeout=30)
        yield response
        response.close()


@contextlib.contextmanager
def with_urllib(url: str) -> Iterator[Any]:
    with urllib.request.urlopen(url, timeout=30) as response:
        yield response


@contextlib.contextmanager
def with_http_client(url: str) -> Iterator[Any]:
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", parts.path)
        yield connection.getresponse()


CLIENTS = pytest.mark.parametrize("client", [with_requests, with_urllib3, with_urllib, with_http_client])
Client = Callable[[str], contextlib.AbstractContextManager[Any]]


def read_on(response: Any) -> Any:
    """What users of the client do: iterate, or read a little more than there is."""
    if isinstance(response, requests.Response):
        return list(response.iter_lines(chunk_size=1))
    return response.read(1000)


@CLIENTS
def test_a_blocked_read_of_an_http_response_returns(client: Client, third_party: ThirdParty) -> None:
    with client(f"{third_party.url}/hang") as response:
        reader = Reader(lambda: read_on(response))
        wake(response)
        assert reader.back()


@CLIENTS
def test_the_socket_of_an_http_response_is_found(client: Client, third_party: ThirdParty) -> None:
    with client(f"{third_party.url}/hang") as response:
        assert find_socket(response) is not None


@CLIENTS
def test_waking_a_response_that_is_complete_or_closed_is_no_error(client: Client, third_party: ThirdParty) -> None:
    with client(f"{third_party.url}/lines/1") as response:
        assert b"piece" in (response.content if isinstance(response, requests.Response) else response.read())
        wake(response)
        response.close()
        wake(response)


def test_a_connection_that_waits_for_its_response_returns() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        connection = http.client.HTTPConnection("127.0.0.1", silent.getsockname()[1], timeout=30)
        connection.request("GET", "/")
        reader = Reader(connection.getresponse)
        wake(connection)
        assert reader.back()
        assert isinstance(reader.outcome, http.client.RemoteDisconnected)
        connection.close()


# -- sockets and files made of them -----------------------------------------------------------------------------------


def test_a_blocked_recv_returns_as_at_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    sock, _ = pair
    reader = Reader(lambda: sock.recv(10))
    wake(sock)
    assert reader.back()
    assert reader.outcome == b""


@pytest.mark.parametrize("mode", ["rb", "r"])
def test_a_blocked_readline_of_a_sockets_file_returns(mode: str, pair: tuple[socket.socket, socket.socket]) -> None:
    with pair[0].makefile(mode) as file:
        reader = Reader(lambda: file.readline())
        waker = threading.Thread(
            target=wake, args=(file,), daemon=True
        )  # one that finds no socket would block in close()
        waker.start()
        try:
            assert reader.back()
        finally:
            pair[1].shutdown(socket.SHUT_RDWR)  # should it have failed: let go of the threads
            waker.join(AT_ONCE)
        assert reader.outcome in ("", b"")


def test_an_unbuffered_file_of_a_socket_is_known(pair: tuple[socket.socket, socket.socket]) -> None:
    with pair[0].makefile("rb", buffering=0) as file:
        assert find_socket(file) is pair[0]


def test_the_socket_keeps_its_descriptor(pair: tuple[socket.socket, socket.socket]) -> None:
    """Its number could be given to somebody else while the reader still uses it."""
    number = pair[0].fileno()
    wake(pair[0])
    assert pair[0].fileno() == number


def test_waking_a_closed_socket_is_no_error(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    wake(pair[0])


def test_a_blocked_read_under_tls_returns() -> None:
    authority = trustme.CA()
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server_side)
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client_side)
    ours, theirs = socket.socketpair()
    served: list[ssl.SSLSocket] = []
    server = threading.Thread(
        target=lambda: served.append(server_side.wrap_socket(theirs, server_side=True)), daemon=True
    )
    server.start()
    with client_side.wrap_socket(ours, server_hostname="localhost") as sock:
        server.join(AT_ONCE)
        with served[0]:
            reader = Reader(lambda: sock.recv(10))
            wake(sock)
            assert reader.back()
            assert reader.outcome == b"" or isinstance(reader.outcome, OSError)


def test_the_tls_state_is_not_touched_under_the_thread_that_reads() -> None:
    class Guarded(socket.socket):
        def shutdown(self, how: int) -> None:
            raise AssertionError("SSLSocket.shutdown() drops the TLS object that the reader is using")

    left, right = socket.socketpair()
    with right, Guarded(fileno=left.detach()) as sock:
        wake(sock)
        assert sock.recv(1) == b""


# -- other objects ---------------------------------------------------------------------------------------------------


def test_the_socket_of_an_httpx_response_is_found(pair: tuple[socket.socket, socket.socket]) -> None:
    """httpx and httpcore give theirs out as an extension of the response."""
    stream = SimpleNamespace(get_extra_info=lambda what: pair[0] if what == "socket" else None)
    assert find_socket(SimpleNamespace(extensions={"network_stream": stream})) is pair[0]


@pytest.mark.parametrize(
    "obj",
    [
        object(),
        None,
        SimpleNamespace(sock=None),
        SimpleNamespace(sock="not a socket"),
        SimpleNamespace(extensions={}),
        SimpleNamespace(extensions={"network_stream": object()}),
        SimpleNamespace(extensions=None, raw=None),
    ],
)
def test_an_object_without_a_socket_has_none(obj: object) -> None:
    assert find_socket(obj) is None


@pytest.mark.parametrize("name", ["sock", "_sock"])
def test_the_socket_of_other_clients_is_found_by_its_usual_names(
    name: str, pair: tuple[socket.socket, socket.socket]
) -> None:
    assert find_socket(SimpleNamespace(**{name: pair[0]})) is pair[0]


def test_an_object_of_another_kind_is_cancelled_rather_than_closed() -> None:
    called: list[str] = []
    wake(SimpleNamespace(cancel=lambda: called.append("cancel"), close=lambda: called.append("close")))
    assert called == ["cancel"]


def test_an_object_that_cannot_be_cancelled_is_closed() -> None:
    called: list[str] = []
    wake(SimpleNamespace(cancel="no function", close=lambda: called.append("close")))
    assert called == ["close"]


def test_an_object_that_can_do_neither_is_left_alone() -> None:
    wake(object())
