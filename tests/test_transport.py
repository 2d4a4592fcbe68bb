"""Dialing: one handshake against servers that play every part of it wrong, and the transport that comes of it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

import natsync
from natsync.errors import AuthorizationError, ConnectError, NatsError, ProtocolError, TimedOut
from natsync.options import ConnectOptions, Server, parse_server
from natsync.testing import PeerConnection, ScriptedPeer
from natsync.transport import Dialing, Transport, dial
from support import natsync_threads

#: Seconds by which a deadline may be overrun on a busy machine.
SLACK = 5.0
#: connect_timeout of the tests that wait for it to pass, and of those in which it must not be what ends the wait.
SHORT, LONG = 0.3, 10.0


def options(**given: Any) -> ConnectOptions:
    return ConnectOptions(**{"connect_timeout": LONG, **given})


def dial_peer(peer: ScriptedPeer, **given: Any) -> tuple[Transport, dict[str, Any]]:
    return dial(parse_server(peer.url), options(**given))


@contextmanager
def connected(peer: ScriptedPeer, **given: Any) -> Iterator[Transport]:
    transport, _ = dial_peer(peer, **given)
    try:
        yield transport
    finally:
        transport.shutdown()
        transport.close()


def info_of(script: Callable[[PeerConnection], object], **given: Any) -> dict[str, Any]:
    """The INFO that dial() returns from a server that runs the script."""
    with ScriptedPeer(script) as peer:
        transport, info = dial_peer(peer, **given)
        transport.close()
        return info


def connect_of(url_prefix: str = "", info: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    """The fields of the CONNECT that a server gets."""
    sent: list[dict[str, Any]] = []

    with ScriptedPeer(lambda peer: sent.append(peer.handshake(**(info or {})))) as peer:
        transport, _ = dial(parse_server(f"nats://{url_prefix}127.0.0.1:{peer.port}"), options(**given))
        transport.close()
    (fields,) = sent
    return fields


def failure(script: Callable[[PeerConnection], object], **given: Any) -> NatsError:
    """What dial() raises, and that it raises it at once, not when the time is up."""
    with ScriptedPeer(script) as peer:
        begin = time.monotonic()
        with pytest.raises(NatsError) as raised:
            dial_peer(peer, **given)
        assert time.monotonic() - begin < LONG / 2
    return raised.value


def time_to_give_up(script: Callable[[PeerConnection], object], **given: Any) -> float:
    """Seconds until dial() raises TimedOut."""
    with ScriptedPeer(script) as peer:
        begin = time.monotonic()
        with pytest.raises(TimedOut):
            dial_peer(peer, connect_timeout=SHORT, **given)
        return time.monotonic() - begin


def send_bytewise(peer: PeerConnection, data: bytes, pause: float = 0.0) -> None:
    for index in range(len(data)):
        peer.send(data[index : index + 1])
        if pause:
            time.sleep(pause)


# -- one deadline -----------------------------------------------------------------------------------------------------


def test_a_silent_server_is_given_up_at_the_deadline() -> None:
    assert SHORT <= time_to_give_up(PeerConnection.hold) < SHORT + SLACK


def test_a_server_that_sends_info_and_then_nothing_is_given_up_at_the_deadline() -> None:
    def script(peer: PeerConnection) -> None:
        peer.send_info()
        peer.hold()

    assert SHORT <= time_to_give_up(script) < SHORT + SLACK


def test_bytes_that_trickle_in_do_not_stretch_the_deadline() -> None:
    def script(peer: PeerConnection) -> None:
        send_bytewise(peer, b'INFO {"version":"' + b"2" * 100_000, pause=0.02)

    assert SHORT <= time_to_give_up(script) < SHORT + SLACK


def test_lines_that_trickle_in_do_not_stretch_the_deadline() -> None:
    def script(peer: PeerConnection) -> None:
        while True:
            peer.send_info()
            time.sleep(0.02)

    assert SHORT <= time_to_give_up(script) < SHORT + SLACK


def test_a_tls_handshake_that_hangs_is_given_up_at_the_deadline() -> None:
    def script(peer: PeerConnection) -> None:
        peer.send_info(tls_required=True)
        peer.hold()

    assert SHORT <= time_to_give_up(script) < SHORT + SLACK


@pytest.fixture
def deaf_addresses() -> Iterator[list[tuple[str, int]]]:
    """Addresses where TCP connecting hangs: their queues of connections are full and nobody accepts."""
    with ExitStack() as stack:
        addresses = []
        for _ in range(4):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            address = listener.getsockname()
            addresses.append(address)
            for _ in range(3):
                client = stack.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(address)
        yield addresses


def test_all_addresses_of_a_host_share_one_deadline(
    deaf_addresses: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in deaf_addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    begin = time.monotonic()
    with pytest.raises(TimedOut):
        dial(Server("many.example", 4222), options(connect_timeout=2.0))
    # Four times the timeout if each address has its own.
    assert 2.0 <= time.monotonic() - begin < 2.0 + SLACK


def test_an_address_that_does_not_answer_leaves_time_for_the_next_one(
    deaf_addresses: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedPeer(PeerConnection.handshake) as peer:
        addresses = [deaf_addresses[0], ("127.0.0.1", peer.port)]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
        with monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
            transport, _ = dial(Server("many.example", 4222), options(connect_timeout=5.0))
        transport.close()


# -- the end is noticed -----------------------------------------------------------------------------------------------


def close_at_once(peer: PeerConnection) -> None:
    peer.close()


def close_after_half_an_info(peer: PeerConnection) -> None:
    peer.send(b'INFO {"server_id":')


def close_after_info(peer: PeerConnection) -> None:
    peer.send_info()


def close_instead_of_pong(peer: PeerConnection) -> None:
    peer.send_info()
    peer.recv_line()
    peer.recv_line()


@pytest.mark.parametrize("script", [close_at_once, close_after_half_an_info, close_after_info, close_instead_of_pong])
def test_a_server_that_closes_during_the_handshake_is_noticed(script: Callable[[PeerConnection], None]) -> None:
    error = failure(script)
    assert isinstance(error, ConnectError)
    assert isinstance(error, ConnectionError)


def test_a_server_that_resets_during_the_handshake_is_noticed() -> None:
    def script(peer: PeerConnection) -> None:
        peer.send_info()
        peer.recv_line()
        peer.reset()

    assert isinstance(failure(script), ConnectError)


def test_a_port_where_nobody_listens_is_a_connect_error() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectError, match="refused"):
            dial(Server("127.0.0.1", bound.getsockname()[1]), options())


def test_a_name_that_does_not_resolve_is_a_connect_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConnectError, match=r"nobody\.example.*not known"):
        dial(Server("nobody.example", 4222), options())


@pytest.fixture
def stuck_resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The system's resolver does not answer; the event tells that it was asked."""
    asked, answer = threading.Event(), threading.Event()

    def stuck(*args: object, **kwargs: object) -> list[object]:
        asked.set()
        answer.wait(30)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", stuck)
    yield asked
    answer.set()


def test_a_resolver_that_does_not_answer_is_given_up_at_the_deadline(stuck_resolver: threading.Event) -> None:
    begin = time.monotonic()
    with pytest.raises(TimedOut):
        dial(Server("slow.example", 4222), options(connect_timeout=SHORT))
    assert SHORT <= time.monotonic() - begin < SHORT + SLACK


def test_a_resolver_that_does_not_answer_costs_one_thread_however_often_it_is_asked(
    stuck_resolver: threading.Event,
) -> None:
    for _ in range(3):
        with pytest.raises(TimedOut):
            dial(Server("slow.example", 4222), options(connect_timeout=0.05))
    assert [thread.name for thread in natsync_threads()].count("natsync-resolver") == 1


def test_cancelling_ends_the_wait_for_the_resolver(stuck_resolver: threading.Event) -> None:
    dialing, failed = Dialing(), list[Exception]()

    def dial_slowly() -> None:
        try:
            dial(Server("slow.example", 4222), options(), dialing)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=dial_slowly)
    thread.start()
    assert stuck_resolver.wait(5)
    dialing.cancel()
    thread.join(5)
    assert [type(error) for error in failed] == [ConnectError]
    assert "closed while connecting" in str(failed[0])


def test_after_cancelling_nothing_is_dialed() -> None:
    dialing = Dialing()
    dialing.cancel()
    with ScriptedPeer(PeerConnection.handshake) as peer:
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(ConnectError, match="closed while connecting"):
                dial(Server(host, peer.port), options(), dialing)
        assert peer.accepted == 0


def test_closing_a_client_does_not_wait_for_the_resolver(stuck_resolver: threading.Event) -> None:
    client = natsync.Client("nats://slow.example:4222", connect_timeout=LONG)

    def open_client() -> None:
        with suppress(NatsError):
            client.open()

    opener = threading.Thread(target=open_client)
    opener.start()
    assert stuck_resolver.wait(5)
    begin = time.monotonic()
    client.close()
    opener.join(5)
    assert time.monotonic() - begin < LONG / 2
    assert not opener.is_alive()


def test_an_address_is_not_resolved_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    real = socket.getaddrinfo

    def watched(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread().name)
        return real(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", watched)
    assert info_of(PeerConnection.handshake)
    assert set(threads) == {threading.current_thread().name}


def test_a_name_is_dialed_at_its_address() -> None:
    with ScriptedPeer(PeerConnection.handshake) as peer:
        transport, _ = dial(Server("localhost", peer.port), options())
        transport.close()


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..b"])
def test_a_host_name_that_cannot_be_encoded_is_a_typed_error_and_no_hang(host: str) -> None:
    client = natsync.Client(f"nats://{host}:4222")
    failed: list[Exception] = []

    def open_client() -> None:
        try:
            client.open()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=open_client, daemon=True)
    thread.start()
    thread.join(5)
    client.close()
    assert [type(error) for error in failed] == [natsync.NoServersError]


def test_a_failed_handshake_closes_its_socket() -> None:
    rest: list[bytes] = []
    done = threading.Event()

    def script(peer: PeerConnection) -> None:
        peer.send(b"-ERR 'Authorization Violation'\r\n")
        rest.append(peer.recv_until_eof())
        done.set()

    with ScriptedPeer(script) as peer:
        with pytest.raises(AuthorizationError):
            dial_peer(peer)
        assert done.wait(5)
    assert rest == [b""]


# -- what may come during the handshake -------------------------------------------------------------------------------


def test_a_handshake_in_single_bytes_succeeds() -> None:
    def script(peer: PeerConnection) -> None:
        send_bytewise(peer, b'INFO {"server_id":"BYTEWISE","max_payload":77} \r\n')
        peer.recv_line()
        peer.recv_line()
        send_bytewise(peer, b"+OK\r\nPONG\r\n")

    assert info_of(script)["max_payload"] == 77


def test_ok_before_pong_is_passed_over() -> None:
    def script(peer: PeerConnection) -> None:
        peer.send_info()
        peer.recv_line()
        peer.recv_line()
        peer.send(b"+OK\r\nPONG\r\n")

    assert info_of(script)["server_id"] == "SCRIPTEDPEER"


def test_a_ping_during_the_handshake_is_answered() -> None:
    lines: list[bytes] = []

    def script(peer: PeerConnection) -> None:
        peer.send_info()
        lines.extend([peer.recv_line(), peer.recv_line()])
        peer.send(b"PING\r\n")
        lines.append(peer.recv_line())
        peer.send(b"PONG\r\n")

    info_of(script)
    assert lines[1:] == [b"PING", b"PONG"]


def test_operation_names_of_the_server_may_be_in_any_case() -> None:
    def script(peer: PeerConnection) -> None:
        peer.send(b'info {"server_id":"SMALL"}\r\n')
        peer.recv_line()
        peer.recv_line()
        peer.send(b"Ping\r\npong\r\n")

    assert info_of(script)["server_id"] == "SMALL"


def test_an_info_of_more_than_64_kib_is_taken() -> None:
    urls = [f"10.0.{index // 250}.{index % 250}:4222" for index in range(10_000)]
    info = info_of(lambda peer: peer.handshake(connect_urls=urls))
    assert info["connect_urls"] == urls


def test_a_second_info_before_pong_updates_the_first() -> None:
    def script(peer: PeerConnection) -> None:
        peer.send_info(max_payload=1000, server_name="before")
        peer.recv_line()
        peer.recv_line()
        peer.send(b'INFO {"max_payload":500}\r\nPONG\r\n')

    info = info_of(script)
    assert (info["max_payload"], info["server_name"]) == (500, "before")


@pytest.mark.parametrize("in_one_piece", [True, False])
def test_what_follows_the_pong_is_the_first_that_the_transport_receives(in_one_piece: bool) -> None:
    following = b'INFO {"server_id":"again"}\r\nMSG a 1 2\r\nhi\r\n'

    def script(peer: PeerConnection) -> None:
        peer.send_info()
        peer.recv_line()
        peer.recv_line()
        if in_one_piece:
            peer.send(b"PONG\r\n" + following)
        else:
            send_bytewise(peer, b"PONG\r\n" + following)
        peer.hold()

    received = b""
    with ScriptedPeer(script) as peer, connected(peer) as transport:
        while len(received) < len(following):
            received += transport.receive()
    assert received == following


# -- refusals ---------------------------------------------------------------------------------------------------------


def refuse(text: bytes) -> Callable[[PeerConnection], None]:
    def script(peer: PeerConnection) -> None:
        peer.send_info()
        peer.recv_line()
        peer.recv_line()
        peer.send(b"-ERR '" + text + b"'\r\n")

    return script


@pytest.mark.parametrize(
    "text",
    [
        b"Authorization Violation",
        b"authorization violation",
        b"User Authentication Expired",
        b"User Authentication Revoked",
        b"Account Authentication Expired",
    ],
)
def test_refused_credentials_are_an_authorization_error(text: bytes) -> None:
    error = failure(refuse(text))
    assert isinstance(error, AuthorizationError)
    assert text.decode() in str(error)


@pytest.mark.parametrize(
    "text",
    [
        b"maximum connections exceeded",
        b"maximum account active connections exceeded",
        b"Connection throttling is active. Please try again later.",
        b"Authentication Timeout",
        b"Secure Connection - TLS Required",
        b"no responders requires headers support",
        b"invalid client protocol",
        b"what is this",
    ],
)
def test_another_refusal_is_a_connect_error_with_the_servers_words(text: bytes) -> None:
    error = failure(refuse(text))
    assert isinstance(error, ConnectError)
    assert not isinstance(error, AuthorizationError)
    assert text.decode() in str(error)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (b"Secure Connection - TLS Required", "tls_first=True"),
        (b"no responders requires headers support", "no_header_support"),
        (b"invalid client protocol", "too old"),
        (b"Authentication Timeout", "authorization timeout"),
    ],
)
def test_a_refusal_comes_with_advice(text: bytes, advice: str) -> None:
    assert advice in str(failure(refuse(text)))


def test_the_last_words_of_a_server_that_hangs_up_are_told() -> None:
    """It refuses and resets before CONNECT has come: writing fails, but what it said can still be read."""

    def script(peer: PeerConnection) -> None:
        peer.send_info()
        peer.send(b"-ERR 'maximum connections exceeded'\r\n")
        peer.close()

    for _ in range(20):
        assert "maximum connections exceeded" in str(failure(script))


def test_a_refusal_in_place_of_tls_is_told() -> None:
    def script(peer: PeerConnection) -> None:
        peer.send(b"INFO {\"tls_required\":true}\r\n-ERR 'maximum connections exceeded'\r\n")
        peer.recv_until_eof()

    assert "maximum connections exceeded" in str(failure(script))


def test_plain_bytes_in_the_middle_of_tls_are_a_protocol_error() -> None:
    def script(peer: PeerConnection) -> None:
        peer.send_info(tls_required=True)
        peer.recv_exactly(5)  # the head of the ClientHello
        peer.send(b"+OK\r\n")
        peer.recv_until_eof()

    assert isinstance(failure(script), ProtocolError)


def test_a_refusal_in_place_of_info_is_told() -> None:
    error = failure(lambda peer: peer.send(b"-ERR 'maximum connections exceeded'\r\n"))
    assert "maximum connections exceeded" in str(error)


def test_an_error_without_text_is_a_refusal() -> None:
    assert isinstance(failure(lambda peer: peer.send(b"-ERR\r\n")), ConnectError)


def test_a_refusal_does_not_quote_the_credentials() -> None:
    with ScriptedPeer(refuse(b"Authorization Violation")) as peer:
        with pytest.raises(AuthorizationError) as raised:
            dial(parse_server(f"nats://ada:S3CRET@127.0.0.1:{peer.port}"), options())
    assert "S3CRET" not in str(raised.value)


# -- not a NATS server ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "greeting",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x15\x03\x01\x00\x02\x02\x46\r\n",
        b"\r\n",
        b"INFO\r\n",
        b"INFO nonsense\r\n",
        b"INFO [1, 2]\r\n",
        b'INFO "text"\r\n',
        b'INFO {"a": \xff}\r\n',
    ],
)
def test_a_greeting_that_is_not_nats_is_a_protocol_error(greeting: bytes) -> None:
    def script(peer: PeerConnection) -> None:
        peer.send(greeting)
        peer.recv_until_eof()

    assert isinstance(failure(script), ProtocolError)


def test_an_endless_greeting_is_a_protocol_error_before_it_fills_the_memory() -> None:
    sent: list[int] = []

    def script(peer: PeerConnection) -> None:
        try:
            while True:
                peer.send(b"x" * 65536)
                sent.append(65536)
        except OSError:
            pass

    assert isinstance(failure(script), ProtocolError)
    assert sum(sent) < 32 << 20


def test_an_info_nested_too_deeply_is_a_typed_error() -> None:
    def script(peer: PeerConnection) -> None:
        peer.send(b'INFO {"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}\r\n")
        peer.recv_until_eof()

    assert isinstance(failure(script), NatsError)


# -- TLS is never given up silently -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "tls"), [("tls", None), ("nats", True), ("tls", True)])
def test_tls_wanted_but_not_offered_is_refused_with_nothing_sent(scheme: str, tls: bool | None) -> None:
    sent: list[bytes] = []

    def script(peer: PeerConnection) -> None:
        peer.send_info()
        sent.append(peer.recv_until_eof())

    with ScriptedPeer(script) as peer:
        server = parse_server(f"{scheme}://ada:S3CRET@127.0.0.1:{peer.port}")
        with pytest.raises(ConnectError, match="TLS"):
            dial(server, options(tls=tls))
    assert sent == [b""]


def test_tls_switched_off_but_required_is_refused_with_nothing_sent() -> None:
    sent: list[bytes] = []

    def script(peer: PeerConnection) -> None:
        peer.send_info(tls_required=True)
        sent.append(peer.recv_until_eof())

    with ScriptedPeer(script) as peer:
        with pytest.raises(ConnectError, match="requires TLS"):
            dial_peer(peer, tls=False, password="S3CRET", user="ada")
    assert sent == [b""]


def test_plain_bytes_between_info_and_tls_are_refused() -> None:
    def script(peer: PeerConnection) -> None:
        peer.send(b'INFO {"tls_required":true}\r\n+OK\r\n')
        peer.recv_until_eof()

    assert isinstance(failure(script), ProtocolError)


# -- CONNECT ----------------------------------------------------------------------------------------------------------


def test_connect_states_every_option_whose_default_at_the_server_is_another() -> None:
    fields = connect_of()
    assert fields["verbose"] is False
    assert fields["pedantic"] is False
    assert fields["tls_required"] is False
    assert fields["echo"] is True
    assert fields["protocol"] == 1


def test_connect_asks_for_headers_and_no_responders() -> None:
    fields = connect_of()
    assert (fields["headers"], fields["no_responders"]) == (True, True)


def test_connect_does_not_ask_for_no_responders_where_the_server_has_no_headers() -> None:
    assert connect_of(info={"headers": False})["no_responders"] is False


def test_connect_says_which_client_it_is() -> None:
    fields = connect_of(name="billing")
    assert (fields["name"], fields["version"]) == ("billing", natsync.__version__)
    assert "natsync" in fields["lang"]


def test_connect_has_no_credentials_where_none_are_given() -> None:
    assert not {"user", "pass", "auth_token", "jwt", "nkey", "sig"} & set(connect_of())


def test_connect_can_switch_the_echo_off() -> None:
    assert connect_of(no_echo=True)["echo"] is False


@pytest.mark.parametrize(
    ("prefix", "given", "expected"),
    [
        ("", {"user": "ada", "password": "pw"}, {"user": "ada", "pass": "pw"}),
        ("", {"user": lambda: ("ada", "pw")}, {"user": "ada", "pass": "pw"}),
        ("", {"token": lambda: "tok"}, {"auth_token": "tok"}),
        ("", {"token": "tok"}, {"auth_token": "tok"}),
        ("ada:pw@", {}, {"user": "ada", "pass": "pw"}),
        ("tok@", {}, {"auth_token": "tok"}),
        ("a%40da:p%3Aw%2F@", {}, {"user": "a@da", "pass": "p:w/"}),
        ("ada:pw@", {"user": "eve", "password": "no"}, {"user": "ada", "pass": "pw"}),
        ("tok@", {"user": "eve", "password": "no"}, {"auth_token": "tok"}),
        ("", {"user": "ädä", "password": "päß"}, {"user": "ädä", "pass": "päß"}),
    ],
)
def test_connect_carries_the_credentials(prefix: str, given: dict[str, str], expected: dict[str, str]) -> None:
    fields = connect_of(prefix, **given)
    assert {key: fields[key] for key in ("user", "pass", "auth_token") if key in fields} == expected


def test_connect_is_one_line_of_json_whatever_the_name_holds() -> None:
    lines: list[bytes] = []

    def script(peer: PeerConnection) -> None:
        peer.send_info()
        lines.extend([peer.recv_line(), peer.recv_line()])
        peer.send(b"PONG\r\n")

    info_of(script, name='two\r\nlines "and" quotes')
    assert json.loads(lines[0][len(b"CONNECT ") :])["name"] == 'two\r\nlines "and" quotes'
    assert lines[1] == b"PING"


# -- the transport ----------------------------------------------------------------------------------------------------


def test_an_ipv6_server_can_be_dialed() -> None:
    with ScriptedPeer(PeerConnection.handshake, ipv6=True) as peer:
        transport, info = dial_peer(peer)
        transport.close()
    assert info["host"] == "::1"


def test_connect_timeout_ends_with_the_handshake() -> None:
    go = threading.Event()

    def script(peer: PeerConnection) -> None:
        peer.handshake()
        assert go.wait(5)
        peer.send(b"PING\r\n")
        peer.hold()

    received: list[bytes] = []
    with ScriptedPeer(script) as peer, connected(peer, connect_timeout=1.5) as transport:
        reader = threading.Thread(target=lambda: received.append(transport.receive()))
        reader.start()
        reader.join(2.0)
        assert reader.is_alive(), received
        go.set()
        reader.join(5)
    assert received == [b"PING\r\n"]


def test_receive_returns_nothing_at_the_end_of_the_link() -> None:
    with ScriptedPeer(PeerConnection.handshake) as peer, connected(peer) as transport:
        assert transport.receive() == b""


def test_shutdown_wakes_a_reader() -> None:
    def script(peer: PeerConnection) -> None:
        peer.handshake()
        peer.hold()

    outcome: list[bytes] = []
    with ScriptedPeer(script) as peer, connected(peer) as transport:
        reader = threading.Thread(target=lambda: outcome.append(transport.receive()))
        reader.start()
        transport.shutdown()
        reader.join(5)
        assert outcome == [b""]


def test_shutdown_wakes_a_writer_whose_peer_does_not_read() -> None:
    def script(peer: PeerConnection) -> None:
        peer.handshake()
        peer.hold()

    outcome: list[OSError] = []

    def write() -> None:
        try:
            transport.send(b"x" * (64 << 20))
        except OSError as error:
            outcome.append(error)

    with ScriptedPeer(script) as peer, connected(peer) as transport:
        writer = threading.Thread(target=write)
        writer.start()
        writer.join(0.2)
        assert writer.is_alive()
        transport.shutdown()
        writer.join(5)
        assert len(outcome) == 1
