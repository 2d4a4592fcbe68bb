"""TLS against a real server: what is verified, what is refused, and that everything works over it as without."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme

import natsync
from natsync.errors import ConnectError, NoServersError
from natsync.options import ConnectOptions, Server, parse_server
from natsync.testing import NatsCluster, NatsServer, PeerConnection, ScriptedPeer, eventually
from natsync.transport import TLSTransport, dial

QUICK: dict[str, Any] = {
    "reconnect_wait": 0.02,
    "reconnect_wait_max": 0.05,
    "reconnect_jitter": 0.0,
    "connect_timeout": 10,
}

#: What a TLS record begins with, by its kind.
CHANGE_OF_CIPHER, HANDSHAKE, DATA = 20, 22, 23

#: Written by the fixture below for the servers of this module.
CERTIFICATES = """
max_payload: 8MB
tls {{
  cert_file: "{cert}"
  key_file: "{key}"
  ca_file: "{ca}"
  verify: {verify}
  timeout: 20
}}
"""


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def config(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """config(*names, verify=…) is a server's configuration with a certificate for these names."""

    def make(*names: str, verify: bool = False) -> str:
        directory = tmp_path_factory.mktemp("tls")
        files = {name: directory / f"{name}.pem" for name in ("cert", "key", "ca")}
        issued = authority.issue_cert(*names)
        for blob in issued.cert_chain_pems:
            blob.write_to_path(str(files["cert"]), append=True)
        issued.private_key_pem.write_to_path(str(files["key"]))
        authority.cert_pem.write_to_path(str(files["ca"]))
        return CERTIFICATES.format(**files, verify=str(verify).lower())

    return make


@pytest.fixture(scope="module")
def server(config: Callable[..., str]) -> Iterator[NatsServer]:
    with NatsServer(config=config("127.0.0.1")) as server:
        yield server


@pytest.fixture(scope="module")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """A context that trusts the module's authority alone."""
    return trust(authority)


def trust(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def client(server: NatsServer, trusting: ssl.SSLContext) -> Iterator[natsync.Client]:
    with natsync.Client(tls_url(server), tls=trusting, **QUICK) as client:
        yield client


def tls_url(server: NatsServer, host: str = "127.0.0.1") -> str:
    return f"tls://{host}:{server.port}"


def failure(url: str, **options: Any) -> Exception:
    """Why the one server could not be connected to."""
    with pytest.raises(NoServersError) as raised:
        natsync.connect(url, **{"connect_timeout": 20, **options})
    (cause,) = raised.value.causes.values()
    assert isinstance(cause, Exception)
    return cause


# -- what is verified


def test_a_server_of_a_trusted_authority_is_connected_to(server: NatsServer, trusting: ssl.SSLContext) -> None:
    with natsync.connect(tls_url(server), tls=trusting) as client:
        assert client.server_info["tls_required"] is True
        client.flush()


def test_a_plain_url_follows_the_server_that_requires_tls(server: NatsServer, trusting: ssl.SSLContext) -> None:
    with natsync.connect(server.url, tls=trusting) as client:
        client.flush()


@pytest.mark.parametrize("options", [{}, {"tls": True}])
def test_an_unknown_authority_is_refused_by_default(server: NatsServer, options: dict[str, Any]) -> None:
    error = failure(tls_url(server), **options)
    assert isinstance(error, ConnectError)
    assert "CERTIFICATE_VERIFY_FAILED" in str(error)


def test_an_unknown_authority_is_refused_where_only_the_server_asks_for_tls(server: NatsServer) -> None:
    assert "CERTIFICATE_VERIFY_FAILED" in str(failure(server.url))


def test_another_authority_is_refused(server: NatsServer) -> None:
    assert "CERTIFICATE_VERIFY_FAILED" in str(failure(tls_url(server), tls=trust(trustme.CA())))


def test_a_certificate_for_another_host_is_refused(server: NatsServer, trusting: ssl.SSLContext) -> None:
    assert isinstance(failure(tls_url(server, "localhost"), tls=trusting), ConnectError)


def test_a_certificate_for_another_host_name_is_refused(
    config: Callable[..., str], trusting: ssl.SSLContext, make_nats_server: Callable[..., NatsServer]
) -> None:
    server = make_nats_server(config=config("nats.example"))
    assert "CERTIFICATE_VERIFY_FAILED" in str(failure(tls_url(server), tls=trusting))


def test_tls_hostname_is_the_name_to_verify(
    config: Callable[..., str], trusting: ssl.SSLContext, make_nats_server: Callable[..., NatsServer]
) -> None:
    server = make_nats_server(config=config("nats.example"))
    with natsync.connect(tls_url(server), tls=trusting, tls_hostname="nats.example") as client:
        client.flush()
    assert isinstance(failure(tls_url(server), tls=trusting, tls_hostname="other.example"), ConnectError)


def test_verification_can_be_switched_off_by_a_context_that_says_so(server: NatsServer) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with natsync.connect(tls_url(server), tls=context) as client:
        client.flush()


def test_tls_false_refuses_a_server_that_requires_tls(server: NatsServer) -> None:
    assert "tls=False" in str(failure(server.url, tls=False))


def test_a_server_without_tls_is_refused_where_tls_is_wanted(nats_server: NatsServer) -> None:
    assert "no TLS" in str(failure(tls_url(nats_server)))
    assert "no TLS" in str(failure(nats_server.url, tls=True))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_versions_of_tls_work(server: NatsServer, authority: trustme.CA, version: ssl.TLSVersion) -> None:
    context = trust(authority)
    context.minimum_version = context.maximum_version = version
    with natsync.connect(tls_url(server), tls=context) as client:
        client.subscribe("version", lambda message: message.respond(message.data))
        assert client.request("version", b"x" * 100_000).data == b"x" * 100_000


# -- TLS before the greeting


@pytest.fixture(scope="module")
def tls_first_server(config: Callable[..., str]) -> Iterator[NatsServer]:
    with NatsServer(config=first(config("127.0.0.1"), "true")) as server:
        yield server


def first(config: str, when: str) -> str:
    return config.replace("tls {", f"tls {{\n  handshake_first: {when}")


def test_tls_first_reaches_a_server_that_greets_after_tls(
    tls_first_server: NatsServer, trusting: ssl.SSLContext
) -> None:
    with natsync.connect(tls_first_server.url, tls=trusting, tls_first=True) as client:
        client.subscribe("first", lambda message: message.respond(message.data))
        assert client.request("first", b"x").data == b"x"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_first_works_every_time_over_both_versions_of_tls(
    tls_first_server: NatsServer, authority: trustme.CA, version: ssl.TLSVersion
) -> None:
    context = trust(authority)
    context.minimum_version = context.maximum_version = version
    for _ in range(30):  # what comes in one read is chance
        with natsync.connect(tls_first_server.url, tls=context, tls_first=True, connect_timeout=10) as client:
            client.flush()


def test_a_greeting_that_comes_in_one_read_with_the_end_of_the_handshake_is_read(
    tls_first_server: NatsServer, authority: trustme.CA
) -> None:
    """Over TLS 1.2, where the server ends the handshake."""
    context = trust(authority)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    kinds: list[int] = []  # of the records that were joined

    def up(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def script(peer: PeerConnection) -> None:
        with socket.create_connection(("127.0.0.1", tls_first_server.port)) as server, server.makefile("rb") as records:
            forwarding = threading.Thread(target=up, args=(peer.sock, server))
            forwarding.start()
            held = b""
            while head := records.read(5):
                held += head + records.read(int.from_bytes(head[3:], "big"))
                if DATA not in kinds:
                    kinds.extend([head[0]] if kinds or head[0] == CHANGE_OF_CIPHER else [])
                if not kinds or DATA in kinds:
                    peer.send(held)
                    held = b""
            peer.close()
            forwarding.join()

    with ScriptedPeer(script) as peer:
        with natsync.connect(peer.url, tls=context, tls_first=True, connect_timeout=10, discover=False) as client:
            client.flush()
    assert kinds == [CHANGE_OF_CIPHER, HANDSHAKE, DATA]


@pytest.mark.parametrize("when", ["auto", '"1s"'])
def test_tls_first_reaches_a_server_that_waits_a_moment_for_it(
    config: Callable[..., str], trusting: ssl.SSLContext, make_nats_server: Callable[..., NatsServer], when: str
) -> None:
    server = make_nats_server(config=first(config("127.0.0.1"), when))

    def reached(tls_first: bool) -> bool:
        try:
            with natsync.connect(server.url, tls=trusting, tls_first=tls_first, connect_timeout=10) as client:
                client.flush()
            return True
        except NoServersError:  # the moment, 50 ms for "auto", had passed
            return False

    for tls_first in (True, False):
        eventually(lambda tls_first=tls_first: reached(tls_first), 20)


def test_tls_first_verifies_as_usual(tls_first_server: NatsServer) -> None:
    assert "CERTIFICATE_VERIFY_FAILED" in str(failure(tls_first_server.url, tls_first=True))


def test_a_server_that_greets_after_tls_is_found_again(
    config: Callable[..., str], trusting: ssl.SSLContext, make_nats_server: Callable[..., NatsServer]
) -> None:
    server = make_nats_server(config=first(config("127.0.0.1"), "true"))
    with natsync.connect(server.url, tls=trusting, tls_first=True, **QUICK) as client:
        server.kill()
        server.restart()
        eventually(lambda: client.stats()["reconnects"] == 1, 10)
        client.flush()


def test_without_tls_first_such_a_server_times_out_with_advice(
    tls_first_server: NatsServer, trusting: ssl.SSLContext
) -> None:
    error = failure(tls_first_server.url, tls=trusting, connect_timeout=1.0)
    assert isinstance(error, natsync.TimedOut)
    assert "tls_first=True" in str(error)


def test_without_tls_first_such_a_server_hangs_up_with_advice(
    config: Callable[..., str], trusting: ssl.SSLContext, make_nats_server: Callable[..., NatsServer]
) -> None:
    server = make_nats_server(config=first(config("127.0.0.1").replace("timeout: 20", "timeout: 0.2"), "true"))
    error = failure(server.url, tls=trusting, connect_timeout=20)
    assert isinstance(error, ConnectError)
    assert "tls_first=True" in str(error)


@pytest.mark.parametrize("which", ["nats_server", "server"])
def test_tls_first_at_a_server_that_greets_first_is_refused_with_advice(
    which: str, trusting: ssl.SSLContext, request: pytest.FixtureRequest
) -> None:
    error = failure(request.getfixturevalue(which).url, tls=trusting, tls_first=True)
    assert isinstance(error, ConnectError)
    assert "leave tls_first out" in str(error)


def test_nothing_but_tls_is_sent_to_a_server_that_greets_first() -> None:
    sent: list[bytes] = []

    def script(peer: PeerConnection) -> None:
        peer.send_info()
        sent.append(peer.recv_until_eof())

    with ScriptedPeer(script) as peer:
        failure(peer.url, tls_first=True, token="S3CRET")
    assert sent[0][:3] == b"\x16\x03\x01"  # the ClientHello
    assert b"S3CRET" not in sent[0]
    assert b"CONNECT" not in sent[0]


# -- less than was asked for


def test_a_server_that_has_lost_its_tls_is_refused_and_gets_no_credentials(
    authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    sent: list[bytes] = []

    def then(sock: ssl.SSLSocket, peer: PeerConnection) -> None:
        shake_hands(sock)
        sock.sendall(b"PONG\r\n")

    secure = TlsPeer(authority, then)

    def script(peer: PeerConnection) -> None:
        if peer.index == 0:
            secure(peer)
            return
        peer.send_info()
        sent.append(peer.recv_until_eof())

    with ScriptedPeer(script) as peer:
        options = {"tls": trusting, "user": "ada", "password": "S3CRET", **QUICK}
        with natsync.connect(peer.url, **options) as client:
            eventually(lambda: len(sent) >= 3)
            assert client.status == "reconnecting"
    assert set(sent) == {b""}


def test_a_real_server_that_is_restarted_without_tls_is_refused_until_it_has_it_again(
    config: Callable[..., str], trusting: ssl.SSLContext, make_nats_server: Callable[..., NatsServer]
) -> None:
    server = make_nats_server(config=config("127.0.0.1"))
    with natsync.connect(tls_url(server), tls=trusting, token="S3CRET", **QUICK) as client:
        secure, server.config = server.config, "debug: true\ntrace: true"
        server.restart()
        eventually(lambda: server.log().count("Client Closed") >= 3, 10)
        assert client.status == "reconnecting"
        assert "[CONNECT" not in server.log()
        server.config = secure
        server.restart()
        eventually(lambda: client.status == "connected", 10)
        client.flush()


# -- servers that are discovered


def test_a_server_discovered_by_address_is_verified_by_the_name_of_who_told(
    config: Callable[..., str], trusting: ssl.SSLContext
) -> None:
    with NatsCluster(2, config("localhost")) as cluster:
        with natsync.connect(tls_url(cluster.servers[0], "localhost"), tls=trusting, **QUICK) as client:
            told = f"127.0.0.1:{cluster.servers[1].port}"
            eventually(lambda: told in client.server_info.get("connect_urls", []), 10)
            cluster.kill(0)
            eventually(lambda: client.stats()["server"] == f"tls://127.0.0.1:{cluster.servers[1].port}", 20)
            client.flush()


def test_a_server_given_by_an_address_that_its_certificate_lacks_is_refused(
    config: Callable[..., str], trusting: ssl.SSLContext, make_nats_server: Callable[..., NatsServer]
) -> None:
    server = make_nats_server(config=config("localhost"))
    assert "mismatch" in str(failure(tls_url(server), tls=trusting))
    named = replace(parse_server(tls_url(server)), tls_name="localhost")
    transport, _ = dial(named, ConnectOptions(tls=trusting, connect_timeout=10))
    transport.close()
    other = replace(named, tls_name="other.example")
    with pytest.raises(ConnectError, match="mismatch"):
        dial(other, ConnectOptions(tls=trusting, connect_timeout=10))


# -- client certificates


def test_a_client_certificate_is_presented(
    config: Callable[..., str], authority: trustme.CA, make_nats_server: Callable[..., NatsServer]
) -> None:
    server = make_nats_server(config=config("127.0.0.1", verify=True))
    context = trust(authority)
    authority.issue_cert("client@example.org").configure_cert(context)
    with natsync.connect(tls_url(server), tls=context) as client:
        client.flush()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_missing_client_certificate_is_a_connect_error(
    config: Callable[..., str],
    authority: trustme.CA,
    make_nats_server: Callable[..., NatsServer],
    version: ssl.TLSVersion,
) -> None:
    server = make_nats_server(config=config("127.0.0.1", verify=True))
    context = trust(authority)
    context.minimum_version = context.maximum_version = version
    error = failure(tls_url(server), tls=context)
    assert isinstance(error, ConnectError)
    assert "client certificate" in str(error)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_certificate_of_an_unknown_authority_is_a_connect_error(
    config: Callable[..., str],
    authority: trustme.CA,
    make_nats_server: Callable[..., NatsServer],
    version: ssl.TLSVersion,
) -> None:
    server = make_nats_server(config=config("127.0.0.1", verify=True))
    context = trust(authority)
    context.minimum_version = context.maximum_version = version
    trustme.CA().issue_cert("client@example.org").configure_cert(context)
    assert isinstance(failure(tls_url(server), tls=context), ConnectError)


def test_a_client_is_known_by_its_certificate(
    config: Callable[..., str], authority: trustme.CA, make_nats_server: Callable[..., NatsServer]
) -> None:
    users = 'authorization { users = [ { user: "known@example.org" } ] }'
    mapped = config("127.0.0.1", verify=True).replace("verify: true", "verify_and_map: true")
    server = make_nats_server(config=f"{mapped}\n{users}")
    known, unknown = trust(authority), trust(authority)
    authority.issue_cert("known@example.org").configure_cert(known)
    authority.issue_cert("unknown@example.org").configure_cert(unknown)
    with natsync.connect(tls_url(server), tls=known) as client:
        client.flush()
    assert isinstance(failure(tls_url(server), tls=unknown), natsync.AuthorizationError)


# -- everything works over it


def test_requests_are_answered(client: natsync.Client) -> None:
    client.subscribe("tls.echo", lambda message: message.respond(message.data))
    for number in range(200):
        assert client.request("tls.echo", b"%d" % number).data == b"%d" % number


def test_a_stream_of_twenty_thousand_chunks_is_complete(
    client: natsync.Client, server: NatsServer, trusting: ssl.SSLContext
) -> None:
    with natsync.Subscriber(tls_url(server), tls=trusting) as subscriber:
        subscriber.stream("tls.long")(lambda ctx, request: (b"%d" % number for number in range(20_000)))
        assert list(client.stream("tls.long", b"", timeout=30)) == [b"%d" % number for number in range(20_000)]


def test_eight_threads_share_one_connection(client: natsync.Client) -> None:
    answers: dict[int, list[bytes]] = {}

    def ask(thread: int) -> None:
        sizes = [thread * 1000 + number * 37 for number in range(100)]
        replies = [client.request("tls.eight", bytes([thread]) * size, timeout=10).data for size in sizes]
        assert [len(reply) for reply in replies] == sizes
        answers[thread] = replies

    client.subscribe("tls.eight", lambda message: message.respond(message.data), concurrency=4)
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(answers) == list(range(8))
    assert all(set(reply) <= {thread} for thread, replies in answers.items() for reply in replies)


@pytest.mark.parametrize("size", [16_384, 16_385, 1 << 20, 8_000_000])
def test_large_payloads_arrive_both_ways(client: natsync.Client, size: int) -> None:
    payload = hashlib.shake_256(b"%d" % size).digest(size)
    client.subscribe("tls.large", lambda message: message.respond(message.data[::-1]))
    assert client.request("tls.large", payload, timeout=20).data == payload[::-1]


def test_large_payloads_arrive_in_parts_where_the_kernel_does_not_tell_what_was_acknowledged(
    server: NatsServer, trusting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TLSTransport, "acknowledged", lambda self: None)
    payload = hashlib.shake_256(b"parts").digest(3_000_001)
    with natsync.connect(tls_url(server), tls=trusting) as client:
        client.subscribe("tls.parts", lambda message: message.respond(message.data[::-1]))
        assert client.request("tls.parts", payload, timeout=20).data == payload[::-1]


def test_messages_in_both_directions_at_once_arrive(client: natsync.Client) -> None:
    received: list[bytes] = []
    client.subscribe("tls.both", lambda message: received.append(message.data))
    sent = [b"%d" % number + b"x" * (number * 53 % 3000) for number in range(5000)]
    for payload in sent:  # they come back while the later ones leave
        client.publish("tls.both", payload)
    eventually(lambda: len(received) == len(sent), 10)
    assert received == sent


# -- links that end


def test_a_killed_server_is_found_again(
    config: Callable[..., str], trusting: ssl.SSLContext, make_nats_server: Callable[..., NatsServer]
) -> None:
    server = make_nats_server(config=config("127.0.0.1"))
    with natsync.connect(tls_url(server), tls=trusting, **QUICK) as client:
        client.subscribe("tls.again", lambda message: message.respond(message.data))
        assert client.request("tls.again", b"before").data == b"before"
        server.kill()
        eventually(lambda: client.status == "reconnecting")
        server.restart()
        assert client.request("tls.again", b"after", timeout=10).data == b"after"
        assert client.stats()["reconnects"] == 1


def test_a_frozen_server_is_left(
    config: Callable[..., str], trusting: ssl.SSLContext, make_nats_server: Callable[..., NatsServer]
) -> None:
    server = make_nats_server(config=config("127.0.0.1"))
    options = {**QUICK, "ping_interval": 0.3, "connect_timeout": 3}
    with natsync.connect(tls_url(server), tls=trusting, **options) as client:
        server.pause()
        eventually(lambda: client.status == "reconnecting", 15)
        server.resume()
        eventually(lambda: client.status == "connected", 15)
        client.flush()


def test_a_server_stopped_properly_is_noticed(
    config: Callable[..., str], trusting: ssl.SSLContext, make_nats_server: Callable[..., NatsServer]
) -> None:
    server = make_nats_server(config=config("127.0.0.1"))
    with natsync.connect(tls_url(server), tls=trusting, reconnect=False) as client:
        server.stop()
        eventually(lambda: client.status == "closed")


class TlsPeer:
    """A script that greets plainly, then speaks TLS; `then` goes on with the encrypted socket."""

    def __init__(self, authority: trustme.CA, then: Callable[[ssl.SSLSocket, PeerConnection], object]) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(self._context)
        self._then = then

    def __call__(self, peer: PeerConnection) -> None:
        peer.send_info(tls_required=True)
        with self._context.wrap_socket(peer.sock, server_side=True, suppress_ragged_eofs=True) as sock:
            peer.sock = sock
            self._then(sock, peer)


def shake_hands(sock: ssl.SSLSocket) -> None:
    data = b""
    while not data.endswith(b"PING\r\n"):
        data += sock.recv(4096)


def dial_tls(peer: ScriptedPeer, context: ssl.SSLContext) -> TLSTransport:
    transport, _ = dial(Server("127.0.0.1", peer.port, tls=True), ConnectOptions(tls=context, connect_timeout=5))
    assert isinstance(transport, TLSTransport)
    return transport


def read_to_the_end(transport: TLSTransport) -> bytes:
    """All that the transport receives; it must end within five seconds, and is closed then."""
    watch = threading.Timer(5, transport.shutdown)
    watch.start()
    data = b""
    try:
        while more := transport.receive():
            data += more
        assert watch.is_alive(), f"the end was not noticed; received {data!r}"
        return data
    finally:
        watch.cancel()
        transport.close()


def test_what_follows_the_pong_in_one_record_is_not_lost(authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    def then(sock: ssl.SSLSocket, peer: PeerConnection) -> None:
        shake_hands(sock)
        sock.sendall(b"PONG\r\nMSG s 1 2\r\nhi\r\n")
        peer.hold()

    with ScriptedPeer(TlsPeer(authority, then)) as peer:
        transport = dial_tls(peer, trusting)
        assert transport.receive() == b"MSG s 1 2\r\nhi\r\n"
        transport.close()


def test_a_goodbye_is_the_end_of_the_link_even_before_the_socket_ends(
    authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    def then(sock: ssl.SSLSocket, peer: PeerConnection) -> None:
        shake_hands(sock)
        sock.sendall(b"PONG\r\nlast words")
        with contextlib.suppress(ssl.SSLError):
            sock.unwrap()  # says goodbye, and waits for ours; the socket's end will do

    with ScriptedPeer(TlsPeer(authority, then)) as peer:
        transport = dial_tls(peer, trusting)
        assert read_to_the_end(transport) == b"last words"


def test_an_end_without_a_goodbye_is_noticed(authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    def then(sock: ssl.SSLSocket, peer: PeerConnection) -> None:
        shake_hands(sock)
        sock.sendall(b"PONG\r\nlast words")

    with ScriptedPeer(TlsPeer(authority, then)) as peer:
        transport = dial_tls(peer, trusting)
        assert read_to_the_end(transport) == b"last words"


def test_a_link_in_which_bytes_were_changed_is_an_error(authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    def then(sock: ssl.SSLSocket, peer: PeerConnection) -> None:
        shake_hands(sock)
        sock.sendall(b"PONG\r\n")
        sock.recv(1)
        os.write(sock.fileno(), b"\x17\x03\x03\x00\x20" + b"x" * 32)
        peer.hold()

    with ScriptedPeer(TlsPeer(authority, then)) as peer:
        transport = dial_tls(peer, trusting)
        transport.send(b"PING\r\n")
        with pytest.raises(OSError, match="BAD_RECORD_MAC"):
            read_to_the_end(transport)


def test_shutdown_wakes_a_reader(authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    def then(sock: ssl.SSLSocket, peer: PeerConnection) -> None:
        shake_hands(sock)
        sock.sendall(b"PONG\r\n")
        peer.hold()

    outcome: list[bytes] = []
    with ScriptedPeer(TlsPeer(authority, then)) as peer:
        transport = dial_tls(peer, trusting)
        reader = threading.Thread(target=lambda: outcome.append(transport.receive()))
        reader.start()
        transport.shutdown()
        reader.join(5)
        transport.close()
    assert outcome == [b""]


def test_certificates_are_read_from_files_as_usual(authority: trustme.CA, server: NatsServer, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    with natsync.connect(tls_url(server), tls=ssl.create_default_context(cafile=str(path))) as client:
        client.flush()
