"""What outlives a link: reconnecting, what is sent again and what is not, who is told, and how everything ends."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

import natsync
from broker import QUICK, SLACK, Broker, Events, Gate, Outcome, next_request, opened, refuse
from natsync.connection import Connection
from natsync.errors import (
    AuthorizationError,
    ConnectError,
    ConnectionClosed,
    ConnectionLost,
    MaxPayloadExceeded,
    NoServersError,
    ReconnectBufferFull,
    RequestTimeout,
    TimedOut,
)
from natsync.outbox import HIGH_WATER_BYTES
from natsync.protocol import Op, Pub, RequestParser, Sub, Unsub
from natsync.testing import NatsServer, PeerConnection, ScriptedPeer, eventually
from support import natsync_threads


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- the first connection ---------------------------------------------------------------------------------------------


def test_open_tries_each_server_once_and_says_what_each_one_did() -> None:
    with ScriptedPeer(refuse) as closing, ScriptedPeer(lambda peer: peer.send(b"HTTP/1.1 400 no\r\n")) as wrong:
        with pytest.raises(NoServersError) as raised:
            natsync.connect([closing.url, wrong.url])
        assert (closing.accepted, wrong.accepted) == (1, 1)
    assert set(raised.value.causes) == {closing.url, wrong.url}
    assert isinstance(raised.value.causes[wrong.url], natsync.ProtocolError)


def test_open_goes_on_to_the_next_server() -> None:
    broker = Broker()
    with ScriptedPeer(refuse) as first, ScriptedPeer(broker) as second:
        with natsync.connect([first.url, second.url], randomize=False) as client:
            assert client.server_info["port"] == second.port


def test_open_is_refused_with_an_authorization_error_if_credentials_are_all_that_is_wrong() -> None:
    def script(peer: PeerConnection) -> None:
        peer.send_info()
        peer.recv_line()
        peer.send(b"-ERR 'Authorization Violation'\r\n")

    with ScriptedPeer(script) as peer:
        with pytest.raises(AuthorizationError) as raised:
            natsync.connect(peer.url)
        assert isinstance(raised.value, NoServersError)


def test_a_failed_open_leaves_no_thread_and_no_descriptor_and_may_be_repeated() -> None:
    broker = Broker(refuse, refuse)
    with ScriptedPeer(broker) as peer:
        client = natsync.Client(peer.url)
        threads, before = natsync_threads(), open_descriptors()
        for _ in range(2):
            with pytest.raises(NoServersError):
                client.open()
        eventually(lambda: open_descriptors() <= before)
        eventually(lambda: natsync_threads() <= threads)
        client.open()
        client.flush()
        client.close()


def test_threads_that_open_at_once_share_one_connection() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer:
        client = natsync.Client(peer.url)
        outcomes = [Outcome(client.open) for _ in range(16)]
        assert [outcome.within(5) for outcome in outcomes] == [None] * 16
        client.close()
        assert peer.accepted == 1


def test_a_ping_right_behind_the_handshake_is_answered() -> None:
    answered: list[bytes] = []

    def script(peer: PeerConnection) -> None:
        peer.send_info()
        peer.recv_line()
        peer.recv_line()
        peer.send(b"PONG\r\nPING\r\n")
        while b"PONG" not in answered:
            answered.append(peer.recv_line())
        peer.hold()

    with ScriptedPeer(script) as peer, opened(peer, patience=0.1):
        eventually(lambda: b"PONG" in answered)


def test_retry_on_failed_connect_opens_at_once_and_connects_when_it_can() -> None:
    events = Events()
    ready = threading.Event()
    broker = Broker()
    with ScriptedPeer(lambda peer: broker(peer) if ready.is_set() else None) as peer:
        begin = time.monotonic()
        with opened(peer, retry_on_failed_connect=True, on_event=events) as client:
            assert time.monotonic() - begin < SLACK
            client.publish("early", b"1")
            eventually(lambda: peer.accepted > 3)
            assert events.names == []
            ready.set()
            events.wait("connected")
            client.publish("early", b"2")
            client.flush()
            client.close()
            assert [pub.payload for pub in broker.published()] == [b"1", b"2"]


def test_a_client_may_be_opened_while_nothing_listens_yet_and_a_real_server_comes(
    make_nats_server: Callable[..., NatsServer],
) -> None:
    server = make_nats_server()
    server.stop()
    with natsync.connect(server.url, retry_on_failed_connect=True, **QUICK) as client:
        got = client.subscribe("late")
        client.publish("late", b"sent before there was a server")
        server.restart()  # and not start(): another program may have the port for a moment
        assert got.next(timeout=15).data == b"sent before there was a server"


# -- a link that is lost ----------------------------------------------------------------------------------------------


def test_a_lost_link_is_made_again_with_its_subscriptions() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer) as client:
        plain, grouped = client.subscribe("plain"), client.subscribe("grouped.*", queue="workers")
        client.flush()
        broker.drop()
        eventually(lambda: len(broker.subscribed(1)) == 2 if len(broker.said) == 2 else False)
        assert broker.subscribed(1) == broker.subscribed(0)
        sids = {sub.subject: sub.sid for sub in broker.subscribed(1)}
        broker.newest.send(b"MSG plain %b 1\r\nx\r\nMSG grouped.a %b 1\r\ny\r\n" % (sids[b"plain"], sids[b"grouped.*"]))
        assert plain.next(timeout=5).data == b"x"
        assert grouped.next(timeout=5).data == b"y"


def test_events_tell_the_story_in_order() -> None:
    events = Events()
    broker = Broker()
    with ScriptedPeer(broker) as peer:
        with opened(peer, on_event=events) as client:
            broker.drop()
            events.wait("reconnected")
            assert client.stats()["reconnects"] == 1
        eventually(lambda: "closed" in events.names)
    assert events.names == ["connected", "disconnected", "reconnected", "closed"]


def test_a_subscription_is_made_again_for_the_rest_of_its_messages_only() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer) as client:
        got = client.subscribe("s", max_messages=5)
        client.flush()
        sid = broker.subscribed()[0].sid
        broker.newest.send(b"MSG s %b 1\r\n1\r\nMSG s %b 1\r\n2\r\n" % (sid, sid))
        assert [got.next(timeout=5).data for _ in range(2)] == [b"1", b"2"]
        broker.drop()
        eventually(lambda: len(broker.said) == 2 and Unsub(sid, 3) in broker.said[1])
        broker.newest.send(b"".join(b"MSG s %b 1\r\n%d\r\n" % (sid, number) for number in (3, 4, 5)))
        assert [message.data for message in got] == [b"3", b"4", b"5"]


def test_a_subscription_that_was_ended_is_not_made_again() -> None:
    broker = Broker()
    gate = Gate(broker)
    with ScriptedPeer(gate) as peer, opened(peer) as client:
        before, during = client.subscribe("before"), client.subscribe("during")
        client.subscribe("kept", lambda message: None)
        before.unsubscribe()
        client.flush()
        broker.drop()
        eventually(lambda: client.status == "reconnecting")
        during.unsubscribe()
        gate.open.set()
        client.flush()
        assert [sub.subject for sub in broker.subscribed(1)] == [b"kept"]


def test_a_subscription_made_while_there_is_no_link_is_there_on_the_next_one() -> None:
    broker = Broker()
    gate = Gate(broker)
    with ScriptedPeer(gate) as peer, opened(peer) as client:
        broker.drop()
        eventually(lambda: client.status == "reconnecting")
        client.subscribe("new", lambda message: None)
        gate.open.set()
        client.flush()
        assert [sub.subject for sub in broker.subscribed(1)] == [b"new"]


def test_what_was_published_meanwhile_arrives_whole_and_in_order_after_the_subscriptions() -> None:
    broker = Broker()
    gate = Gate(broker)
    with ScriptedPeer(gate) as peer, opened(peer) as client:
        client.subscribe("s", lambda message: None)
        client.flush()
        broker.drop()
        eventually(lambda: client.status == "reconnecting")
        payloads = [b"%d" % number + b"x" * (number * 37 % 5000) for number in range(1000)]
        for number, payload in enumerate(payloads):
            client.publish("p", payload, headers={"N": str(number)} if number % 3 == 0 else None)
        gate.open.set()
        client.flush()
        assert [pub.payload for pub in broker.published(1)] == payloads
        assert isinstance(broker.said[1][0], Sub)
        kinds = [type(request) for request in broker.said[1]]
        assert kinds.index(Pub) > max(index for index, kind in enumerate(kinds) if kind is Sub)


class Cutter:
    """A script that reads so many bytes of what a client says, then resets the link; the last client is heard out."""

    def __init__(self, *cuts: int) -> None:
        self.cuts = cuts
        self.heard: list[bytearray] = []

    def __call__(self, peer: PeerConnection) -> None:
        peer.handshake()
        heard = bytearray()
        self.heard.append(heard)
        limit = self.cuts[peer.index] if peer.index < len(self.cuts) else None
        pings = RequestParser()
        while limit is None or len(heard) < limit:
            data = peer.sock.recv(4096 if limit is None else min(4096, limit - len(heard)))
            if not data:
                return
            heard += data
            for request in pings.feed(data):
                if request is Op.PING:
                    peer.send(b"PONG\r\n")
        peer.reset()

    def numbers(self, sender: int) -> list[list[int]]:
        """What a sender published, by link; fails if a link begins within a frame, or a frame is torn inside."""
        links = []
        for heard in self.heard:
            pubs = [one for one in RequestParser().feed(bytes(heard)) if isinstance(one, Pub)]
            mine = [pub.payload.split(b" ") for pub in pubs if pub.subject == b"s.%d" % sender]
            assert all(filler == b"x" * (int(number) * 31 % 700) for number, filler in mine)
            links.append([int(number) for number, _ in mine])
        return links


def test_threads_that_publish_through_lost_links_double_nothing_tear_nothing_and_keep_their_order() -> None:
    senders, after = 4, 300
    cutter = Cutter(50_001, 100_002, 200_003, 300_007)

    def publish(sender: int) -> int:
        """Publish numbers until the last link is there, and some more; returns how many."""
        number, end = 0, 100_000
        while number < end:
            if len(cutter.heard) > len(cutter.cuts):
                end = min(end, number + after)
            client.publish(f"s.{sender}", b"%d " % number + b"x" * (number * 31 % 700))
            number += 1
            if number % 50 == 0:
                time.sleep(0.001)  # or the links' ends would be waited for with a hundred megabytes
        return number

    with ScriptedPeer(cutter) as peer, opened(peer, reconnect_buffer_bytes=1 << 28) as client:
        outcomes = [Outcome(partial(publish, sender)) for sender in range(senders)]
        assert [outcome.within(30) for outcome in outcomes] == [None] * senders
        eventually(lambda: peer.accepted == len(cutter.cuts) + 1, 30)
        client.flush(30)
        for sender in range(senders):
            links = cutter.numbers(sender)
            for numbers in links:  # nothing is missing in between what one link brought
                assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
            together = [number for numbers in links for number in numbers]
            assert together == sorted(set(together))
            assert together[-1] == outcomes[sender].value - 1


@pytest.mark.parametrize("role", ["reader", "writer"])
def test_a_link_for_which_no_thread_can_be_started_is_given_up_and_made_again(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer:
        client = natsync.connect(peer.url, **QUICK)
        start, failures = threading.Thread.start, [RuntimeError("can't start new thread")] * 2

        def scarce(thread: threading.Thread) -> None:
            if thread.name.startswith("natsync-") and thread.name.endswith(f"-{role}") and failures:
                raise failures.pop()
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", scarce)
        broker.drop()
        eventually(lambda: len(broker.links) == 1 + 3)
        client.publish("s", b"kept")
        client.flush()
        client.close()
        eventually(lambda: [pub.payload for pub in broker.published()] == [b"kept"])


@pytest.mark.parametrize("options", [{}, {"retry_on_failed_connect": True}])
def test_a_first_use_for_which_no_thread_can_be_started_says_so_and_may_be_repeated(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, failures = threading.Thread.start, [RuntimeError("can't start new thread")] * 2

    def scarce(thread: threading.Thread) -> None:
        if thread.name.endswith("-supervisor") and failures:
            raise failures.pop()
        start(thread)

    broker = Broker()
    with ScriptedPeer(broker) as peer:
        client = natsync.Client(peer.url, **{**QUICK, **options})
        monkeypatch.setattr(threading.Thread, "start", scarce)
        for _ in range(2):
            with pytest.raises(natsync.ConnectError, match="no thread can be started"):
                client.publish("s", b"refused")
        client.publish("s", b"taken")
        client.flush()
        client.close()
        assert peer.accepted == 1
        assert [pub.payload for pub in broker.published()] == [b"taken"]


def test_each_thread_that_waits_for_the_first_connect_gets_an_error_of_its_own() -> None:
    begin = threading.Event()

    def script(peer: PeerConnection) -> None:
        begin.wait(10)

    with ScriptedPeer(script) as peer:
        client = natsync.Client(peer.url, connect_timeout=5.0)
        opening = [Outcome(client.open) for _ in range(4)]
        eventually(lambda: client.status == "connecting")
        eventually(lambda: peer.accepted == 1)
        begin.set()
        errors = [one.within(10) for one in opening]
    assert all(isinstance(error, NoServersError) for error in errors)
    assert len({id(error) for error in errors}) == 4


class PublishingHandler(logging.Handler):
    """Publishes each record of the library, and one that a test logs; notes what it could not publish."""

    def __init__(self, client: natsync.Client) -> None:
        super().__init__()
        self.client = client
        self.published: list[str] = []
        self.failed: list[Exception] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.client.publish("logs", record.getMessage().encode())
            self.published.append(record.getMessage())
        except Exception as error:
            self.failed.append(error)


@pytest.fixture
def nobody() -> Iterator[str]:
    """The URL of a server that is down, for as long as the test runs."""
    with socket.socket() as bound:  # bound, but not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        yield f"nats://127.0.0.1:{bound.getsockname()[1]}"


@contextmanager
def logging_to(handler: logging.Handler) -> Iterator[logging.Logger]:
    logger = logging.getLogger("natsync")
    former = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        logger.setLevel(former)


@pytest.mark.parametrize("use", ["publish", "record"])
def test_a_first_use_fails_though_what_is_logged_of_it_is_published_by_the_same_client(use: str, nobody: str) -> None:
    """The record is logged in the thread that dials; or it is itself the first use, under the handler's lock."""
    client = natsync.Client(nobody)
    handler = PublishingHandler(client)
    uses = {"publish": lambda: client.publish("x", b"1"), "record": lambda: logger.warning("the program's")}
    kinds = {"publish": [ConnectError], "record": [NoServersError, ConnectError]}[use]
    with logging_to(handler) as logger:
        for _ in range(2):
            handler.failed.clear()
            error = Outcome(uses[use]).within(10)
            assert isinstance(error, NoServersError) if use == "publish" else error is None
            eventually(lambda: [type(one) for one in handler.failed] == kinds)
        assert handler.published == []
        client.close(0)


def test_a_log_handler_that_raises_costs_nobody_the_outcome_of_the_first_use(nobody: str) -> None:
    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise ZeroDivisionError("a fault of the handler")

    client = natsync.Client(nobody)
    with logging_to(Raising()):
        assert isinstance(Outcome(client.open).within(10), NoServersError)
    client.close(0)


def test_a_token_function_that_uses_its_own_client_fails_the_attempt() -> None:
    failures: list[BaseException] = []

    def token() -> str:
        try:
            return client.request("tokens", timeout=None).data.decode()
        except BaseException as error:
            failures.append(error)
            raise

    with ScriptedPeer(Broker()) as peer:
        client = natsync.Client(peer.url, token=token)
        for _ in range(2):
            assert isinstance(Outcome(lambda: client.publish("x", b"1")).within(10), NoServersError)
        client.close(0)
    assert [type(error) for error in failures] == [ConnectError, ConnectError]


def test_a_token_function_that_flushes_its_own_client_between_two_links_does_not_wait_for_itself(
    nats_server: NatsServer,
) -> None:
    failures: list[BaseException] = []

    def token() -> str:
        if client.status == "reconnecting":
            try:
                client.flush(None)
            except natsync.NatsError as error:
                failures.append(error)
        return "unused"

    client = natsync.Client(nats_server.url, token=token, reconnect_wait=0.01)
    with client:
        client.force_reconnect()
        eventually(lambda: len(failures) == 1 and client.status == "connected")
        client.flush()
    assert [type(error) for error in failures] == [ConnectError]


def test_garbage_from_the_server_is_told_and_the_link_made_again() -> None:
    events = Events()

    def garbage(peer: PeerConnection) -> None:
        peer.handshake()
        peer.send(b"GARBAGE\r\n")
        peer.recv_until_eof()

    with ScriptedPeer(Broker(garbage)) as peer, opened(peer, on_event=events) as client:
        assert "GARBAGE" in events.wait("disconnected")["reason"]
        events.wait("reconnected")
        client.flush()


def test_a_reset_in_mid_payload_is_survived() -> None:
    events = Events()

    def cut(peer: PeerConnection) -> None:
        peer.handshake()
        sid = b""
        while not sid:
            request = next_request(peer)
            if isinstance(request, Sub) and request.subject == b"s":
                sid = request.sid
        peer.send(b"MSG s %b 5\r\nwhole\r\nMSG s %b 1000\r\nhalf" % (sid, sid))
        eventually(lambda: got.delivered == 1)
        peer.reset()

    broker = Broker(cut)
    with ScriptedPeer(broker) as peer, opened(peer, on_event=events) as client:
        got = client.subscribe("s")
        assert got.next(timeout=5).data == b"whole"
        events.wait("reconnected")
        client.flush()
        broker.newest.send(b"MSG s %b 5\r\nafter\r\n" % broker.subscribed()[0].sid)
        assert got.next(timeout=5).data == b"after"
        assert got.pending == 0


def test_a_server_that_stops_answering_is_left() -> None:
    events = Events()

    def frozen(peer: PeerConnection) -> None:
        peer.handshake()
        peer.hold()

    broker = Broker(frozen)
    with ScriptedPeer(broker) as peer, opened(peer, on_event=events, ping_interval=0.5) as client:
        assert "PING" in events.wait("disconnected")["reason"]
        events.wait("reconnected")
        client.flush()


def test_a_write_that_is_blocked_ends_the_link_at_write_timeout() -> None:
    events = Events()

    def deaf(peer: PeerConnection) -> None:
        peer.handshake(max_payload=64 << 20)
        peer.hold()

    with ScriptedPeer(Broker(deaf, max_payload=64 << 20)) as peer:
        with opened(peer, on_event=events, write_timeout=0.3, reconnect_buffer_bytes=64 << 20) as client:
            begin = time.monotonic()
            client.publish("s", b"x" * (32 << 20))
            assert "write" in events.wait("disconnected")["reason"]
            assert 0.3 <= time.monotonic() - begin < 0.3 + SLACK
            events.wait("reconnected")
            client.flush()


def test_a_frozen_server_is_left_and_found_again(make_nats_server: Callable[..., NatsServer]) -> None:
    events = Events()
    server = make_nats_server()
    options = {**QUICK, "ping_interval": 0.5}
    with natsync.connect(server.url, on_event=events, **options) as client:
        got = client.subscribe("s")
        server.pause()
        events.wait("disconnected")
        client.publish("s", b"kept for later")
        server.resume()
        events.wait("reconnected")
        assert got.next(timeout=5).data == b"kept for later"


def test_a_killed_server_is_found_again_with_everything_in_place(make_nats_server: Callable[..., NatsServer]) -> None:
    events = Events()
    server = make_nats_server()
    with natsync.connect(server.url, on_event=events, **QUICK) as client:
        client.subscribe("double", lambda message: message.respond(message.data * 2))
        assert client.request("double", b"ab").data == b"abab"
        server.kill()
        events.wait("disconnected")
        pending = Outcome(lambda: client.request("double", b"cd", timeout=30))
        server.restart()
        assert pending.within(30) is None
        assert isinstance(pending.value, natsync.Message)
        assert pending.value.data == b"cdcd"


# -- how often --------------------------------------------------------------------------------------------------------


def test_the_first_attempt_after_a_loss_comes_at_once_however_short_the_link_was() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer, reconnect_wait=30, reconnect_wait_max=30) as client:
        broker.drop()
        eventually(lambda: len(broker.links) == 2)
        client.flush()


def test_attempts_are_spaced_while_the_server_refuses() -> None:
    gate = Gate(Broker())
    with ScriptedPeer(gate) as peer:
        with opened(peer, reconnect_wait=0.1, reconnect_wait_max=0.1):
            gate.broker.drop()
            eventually(lambda: peer.accepted >= 2)
            begin, before = time.monotonic(), peer.accepted
            eventually(lambda: peer.accepted >= before + 4)
            assert time.monotonic() - begin >= 0.29


def test_attempts_are_spaced_while_the_server_greets_and_then_hangs_up() -> None:
    with ScriptedPeer(PeerConnection.handshake) as peer:
        begin = time.monotonic()
        with opened(peer, reconnect_wait=0.1, reconnect_wait_max=0.1):
            eventually(lambda: peer.accepted >= 7, 15)
            # The first attempt after a loss may come at once; those after a link that never served must not.
            assert time.monotonic() - begin >= 0.4


def test_waits_between_attempts_grow() -> None:
    times: list[float] = []

    def script(peer: PeerConnection) -> None:
        times.append(time.monotonic())

    with ScriptedPeer(script) as peer:
        with opened(peer, retry_on_failed_connect=True, reconnect_wait=0.05, reconnect_wait_max=0.2):
            eventually(lambda: len(times) >= 6)

    waits = [after - before for before, after in pairwise(times)]
    for wait, planned in zip(waits, (0.05, 0.1, 0.2, 0.2, 0.2), strict=False):
        assert planned - 0.01 <= wait < planned + SLACK


def test_max_reconnects_closes_for_good() -> None:
    events = Events()
    gate = Gate(Broker())
    with ScriptedPeer(gate) as peer:
        with opened(peer, max_reconnects=3, on_event=events) as client:
            gate.broker.drop()
            events.wait("closed")
            assert client.status == "closed"
            assert peer.accepted == 1 + 3
            with pytest.raises(ConnectionClosed) as raised:
                client.publish("s", b"")
            assert isinstance(raised.value.__cause__, NoServersError)


def test_reconnect_false_closes_with_the_link() -> None:
    events = Events()
    broker = Broker()
    with ScriptedPeer(broker) as peer:
        with opened(peer, reconnect=False, on_event=events) as client:
            got = client.subscribe("s")
            client.flush()
            broker.drop()
            with pytest.raises((ConnectionClosed, natsync.ConnectError)):
                got.next(timeout=5)
            events.wait("closed")
            assert client.status == "closed"
            assert peer.accepted == 1


def refuse_credentials(peer: PeerConnection) -> None:
    peer.send_info()
    peer.recv_line()
    peer.send(b"-ERR 'Authorization Violation'\r\n")


def test_the_same_refusal_of_credentials_twice_closes_for_good() -> None:
    events = Events()
    broker = Broker()
    with ScriptedPeer(lambda peer: refuse_credentials(peer) if peer.index else broker(peer)) as peer:
        with opened(peer, on_event=events) as client:
            broker.drop()
            events.wait("closed")
            assert peer.accepted == 1 + 2
            with pytest.raises(ConnectionClosed) as raised:
                client.flush()
            assert isinstance(raised.value.__cause__, AuthorizationError)


def test_credentials_that_are_accepted_again_are_forgiven() -> None:
    events = Events()

    def serve_once(peer: PeerConnection) -> None:
        peer.handshake()

    with ScriptedPeer(Broker(serve_once, refuse_credentials)) as peer, opened(peer, on_event=events) as client:
        events.wait("reconnected")
        client.flush()


def test_an_authorization_that_expires_is_told_and_the_next_link_made() -> None:
    events = Events()

    def expire(peer: PeerConnection) -> None:
        peer.handshake()
        peer.send(b"-ERR 'User Authentication Expired'\r\n")

    with ScriptedPeer(Broker(expire)) as peer, opened(peer, on_event=events) as client:
        assert events.wait("error")["error"] == "User Authentication Expired"
        assert "User Authentication Expired" in events.wait("disconnected")["reason"]
        events.wait("reconnected")
        client.flush()


# -- who waits while a link is lost -----------------------------------------------------------------------------------


def test_a_request_under_way_is_told_that_it_may_have_run() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer) as client:
        pending = Outcome(lambda: client.request("slow", b"", timeout=10))
        eventually(broker.published)
        broker.drop()
        error = pending.within(5)
        assert isinstance(error, ConnectionLost)
        assert error.sent is True


def test_a_stream_under_way_is_told_that_chunks_may_be_missing() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer) as client:
        stream = client.stream("slow", b"")
        eventually(broker.published)
        inbox = broker.published()[0].reply
        mux = next(sub for sub in broker.said[0] if isinstance(sub, Sub))
        broker.newest.send(b"MSG %b %b 5\r\nchunk\r\n" % (inbox, mux.sid))
        assert stream.next(timeout=5) == b"chunk"
        broker.drop()
        with pytest.raises(natsync.ServerLost) as raised:
            stream.next(timeout=5)
        assert raised.value.last_seq == 1


def test_a_request_made_while_there_is_no_link_is_answered_on_the_next_one() -> None:
    broker = Broker()
    gate = Gate(broker)
    with ScriptedPeer(gate) as peer, opened(peer) as client:
        broker.drop()
        eventually(lambda: client.status == "reconnecting")
        pending = Outcome(lambda: client.request("s", b"q", timeout=10))
        gate.open.set()
        eventually(lambda: len(broker.said) == 2 and broker.published(1))
        mux = next(sub for sub in broker.said[1] if isinstance(sub, Sub))
        broker.newest.send(b"MSG %b %b 1\r\na\r\n" % (broker.published(1)[0].reply, mux.sid))
        assert pending.within(5) is None
        assert isinstance(pending.value, natsync.Message)
        assert pending.value.data == b"a"


def test_a_request_that_times_out_without_a_link_never_leaves() -> None:
    broker = Broker()
    gate = Gate(broker)
    with ScriptedPeer(gate) as peer, opened(peer) as client:
        broker.drop()
        eventually(lambda: client.status == "reconnecting")
        client.publish("before", b"")
        with pytest.raises(RequestTimeout) as raised:
            client.request("never", b"", timeout=0.1)
        assert raised.value.sent is False
        client.publish("after", b"")
        gate.open.set()
        client.flush()
        assert [pub.subject for pub in broker.published(1)] == [b"before", b"after"]


def test_a_request_that_times_out_on_a_link_may_have_run() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer) as client:
        client.flush()
        with pytest.raises(RequestTimeout) as raised:
            client.request("slow", b"", timeout=1.0)
        assert raised.value.sent is True


def test_a_request_that_times_out_while_connecting_was_surely_not_sent() -> None:
    with ScriptedPeer(PeerConnection.hold) as peer:
        client = natsync.Client(peer.url, connect_timeout=10)
        with pytest.raises(RequestTimeout) as raised:
            client.request("s", b"", timeout=0.1)
        assert raised.value.sent is False
        client.close()


def test_a_request_that_times_out_behind_a_blocked_link_was_surely_not_sent() -> None:
    def deaf(peer: PeerConnection) -> None:
        peer.handshake()
        peer.hold()

    with ScriptedPeer(deaf) as peer:
        with opened(peer, write_timeout=None, patience=0.1) as client:
            publisher_that_waits(client)
            with pytest.raises(RequestTimeout) as raised:
                client.request("s", b"", timeout=0.1)
            assert raised.value.sent is False


def test_a_flush_under_way_is_told_that_the_link_broke() -> None:
    broker = Broker(pongs=False)
    with ScriptedPeer(broker) as peer:
        with opened(peer, patience=0.1) as client:
            pending = Outcome(lambda: client.flush(timeout=10))
            eventually(lambda: broker.pings)
            broker.drop()
            assert isinstance(pending.within(5), ConnectionLost)


def test_a_flush_waits_for_the_next_link() -> None:
    broker = Broker()
    gate = Gate(broker)
    with ScriptedPeer(gate) as peer, opened(peer) as client:
        broker.drop()
        eventually(lambda: client.status == "reconnecting")
        client.publish("s", b"x")
        pending = Outcome(lambda: client.flush(timeout=10))
        gate.open.set()
        assert pending.within(5) is None
        assert len(broker.published(1)) == 1


def test_a_flush_gives_up_at_its_timeout() -> None:
    with ScriptedPeer(Broker(pongs=False)) as peer:
        with opened(peer, patience=0.1) as client:
            begin = time.monotonic()
            with pytest.raises(TimedOut):
                client.flush(timeout=0.2)
            assert 0.2 <= time.monotonic() - begin < 0.2 + SLACK


def test_flush_returns_once_the_server_has_everything() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer) as client:
        for number in range(5000):
            client.publish("s", b"%d" % number)
        client.flush()
        assert len(broker.published()) == 5000


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_the_buffer_for_the_next_link_is_bounded_and_what_it_took_arrives() -> None:
    broker = Broker()
    gate = Gate(broker)
    with ScriptedPeer(gate) as peer, opened(peer, reconnect_buffer_bytes=10_000) as client:
        broker.drop()
        eventually(lambda: client.status == "reconnecting")
        taken = 0
        with pytest.raises(ReconnectBufferFull):
            for _ in range(100):
                client.publish("s", b"%d" % taken + b"x" * 500)
                taken += 1
        assert 10 < taken < 21
        gate.open.set()
        client.flush()
        assert len(broker.published(1)) == taken


def test_without_a_buffer_nothing_is_taken_without_a_link() -> None:
    broker = Broker()
    gate = Gate(broker)
    with ScriptedPeer(gate) as peer, opened(peer, reconnect_buffer_bytes=0) as client:
        broker.drop()
        eventually(lambda: client.status == "reconnecting")
        with pytest.raises(ReconnectBufferFull):
            client.publish("s", b"")
        gate.open.set()
        client.flush()
        client.publish("s", b"")


class DeafUntil:
    """A script that shakes hands, then reads nothing until it is told to."""

    def __init__(self) -> None:
        self.read = threading.Event()
        self.links: list[PeerConnection] = []
        self.heard = 0

    def __call__(self, peer: PeerConnection) -> None:
        peer.handshake()
        self.links.append(peer)
        while not self.read.wait(0.02):
            if peer.sock.fileno() < 0 or peer._stopping.is_set():
                return
        while data := peer.sock.recv(1 << 20):
            self.heard += len(data)
            if b"PING\r\n" in data:
                peer.send(b"PONG\r\n")


def publisher_that_waits(client: natsync.Client) -> Outcome:
    """One that publishes 20 MB to a server that does not read, and has come to wait for room."""

    def stuck() -> bool:
        before = client.stats()
        threading.Event().wait(0.3)
        after = client.stats()
        return after["out_pending_bytes"] >= HIGH_WATER_BYTES and after["out_bytes"] == before["out_bytes"]

    payload = b"x" * 100_000
    waiting = Outcome(lambda: [client.publish("filler", payload) for _ in range(200)])
    eventually(stuck)
    assert waiting.running
    return waiting


def test_publishers_wait_for_a_link_that_is_far_behind() -> None:
    deaf = DeafUntil()
    with ScriptedPeer(deaf) as peer:
        with opened(peer) as client:
            waiting = publisher_that_waits(client)
            assert client.stats()["out_pending_bytes"] < HIGH_WATER_BYTES + 200_000
            deaf.read.set()
            assert waiting.within(10) is None


def test_publishers_that_wait_are_woken_when_the_link_is_lost() -> None:
    deaf = DeafUntil()
    with ScriptedPeer(lambda peer: None if peer.index else deaf(peer)) as peer:
        with opened(peer, reconnect_buffer_bytes=64 << 20) as client:
            waiting = publisher_that_waits(client)
            eventually(lambda: deaf.links)
            deaf.links[0].sock.shutdown(socket.SHUT_RDWR)
            assert waiting.within(10) is None
            assert client.status == "reconnecting"


def test_what_was_said_behind_a_blocked_link_is_said_once_on_the_next() -> None:
    deaf = DeafUntil()
    broker = Broker(deaf)
    with ScriptedPeer(broker) as peer, opened(peer, reconnect_buffer_bytes=64 << 20) as client:
        waiting = publisher_that_waits(client)
        client.subscribe("late", lambda message: None)
        eventually(lambda: deaf.links)
        deaf.links[0].sock.shutdown(socket.SHUT_RDWR)
        assert waiting.within(10) is None
        client.flush()
        assert [sub.subject for sub in broker.subscribed()] == [b"late"]
        assert {pub.subject for pub in broker.published()} == {b"filler"}


def test_publishers_that_wait_are_woken_by_close() -> None:
    with ScriptedPeer(DeafUntil()) as peer:
        with opened(peer) as client:
            waiting = publisher_that_waits(client)
            client.close(timeout=0.1)
            assert isinstance(waiting.within(SLACK), ConnectionClosed)


# -- what the server tells --------------------------------------------------------------------------------------------


def test_a_message_waiting_for_a_link_is_dropped_with_an_event_if_the_next_server_takes_less() -> None:
    events = Events()
    broker = Broker()
    state = {"max_payload": 1000}

    def script(peer: PeerConnection) -> None:
        if peer.index == 0 or ready.is_set():
            broker._info = dict(state)
            broker(peer)

    ready = threading.Event()
    with ScriptedPeer(script) as peer, opened(peer, on_event=events) as client:
        broker.drop()
        eventually(lambda: client.status == "reconnecting")
        client.publish("s", b"small 1")
        client.publish("s", b"x" * 900)
        client.publish("s", b"y" * 90, headers={"Large": "z" * 100})
        client.publish("s", b"small 2")
        state["max_payload"] = 100
        ready.set()
        client.flush()
        assert [pub.payload for pub in broker.published(1)] == [b"small 1", b"small 2"]
        assert "2 " in events.wait("error")["error"]
        with pytest.raises(MaxPayloadExceeded) as raised:
            client.publish("s", b"x" * 101)
        assert (raised.value.size_bytes, raised.value.limit_bytes) == (101, 100)


def test_an_info_in_between_updates_the_limits() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer) as client:
        broker.newest.send(b'INFO {"max_payload":10}\r\n')
        eventually(lambda: client.server_info["max_payload"] == 10)
        assert client.server_info["server_id"] == "SCRIPTEDPEER"
        with pytest.raises(MaxPayloadExceeded):
            client.publish("s", b"x" * 11)
        client.publish("s", b"x" * 10)
        client.flush()
        assert len(broker.published()) == 1


def test_headers_count_against_the_limit() -> None:
    with ScriptedPeer(Broker(max_payload=100)) as peer, opened(peer) as client:
        client.publish("s", b"x" * 60)
        with pytest.raises(MaxPayloadExceeded):
            client.publish("s", b"x" * 60, headers={"Key": "v" * 30})


@pytest.mark.parametrize("told", ["in the first INFO", "later"])
def test_servers_that_the_cluster_tells_of_are_used(told: str) -> None:
    first, second = Broker(), Broker()
    with ScriptedPeer(second) as other:
        urls = [f"127.0.0.1:{other.port}"]
        if told == "in the first INFO":
            first = Broker(connect_urls=urls)
        with ScriptedPeer(lambda peer: first(peer) if peer.index == 0 else None) as peer, opened(peer) as client:
            if told == "later":
                first.newest.send(b'INFO {"connect_urls":["127.0.0.1:%d"]}\r\n' % other.port)
                client.flush()
            first.drop()
            eventually(lambda: second.links)
            client.flush()
            assert client.server_info["port"] == other.port
            assert other.accepted == 1


def test_an_empty_list_of_servers_forgets_none() -> None:
    first, second = Broker(), Broker()
    with ScriptedPeer(second) as other, ScriptedPeer(lambda peer: first(peer) if peer.index == 0 else None) as peer:
        with natsync.connect([peer.url, other.url], randomize=False, **QUICK) as client:
            first.newest.send(b'INFO {"connect_urls":[]}\r\n')
            client.flush()
            first.drop()
            eventually(lambda: second.links)
            client.flush()
            assert client.server_info["port"] == other.port


def test_discover_false_stays_with_the_servers_given() -> None:
    events = Events()
    with ScriptedPeer(Broker()) as other:
        first = Broker(connect_urls=[f"127.0.0.1:{other.port}"])
        with ScriptedPeer(first) as peer, opened(peer, discover=False, on_event=events) as client:
            first.drop()
            events.wait("reconnected")
            client.flush()
            assert other.accepted == 0


def test_a_discovered_server_gets_the_credentials_of_the_first() -> None:
    connects: list[dict[str, Any]] = []

    def record(peer: PeerConnection) -> None:
        connects.append(peer.handshake())
        peer.recv_until_eof()

    with ScriptedPeer(record) as other:
        first = Broker(connect_urls=[f"127.0.0.1:{other.port}"])
        with ScriptedPeer(lambda peer: first(peer) if peer.index == 0 else None) as peer:
            url = f"nats://ada:pw@127.0.0.1:{peer.port}"
            client = natsync.connect(url, **QUICK)
            first.drop()
            eventually(lambda: connects)
            client.close(timeout=0.1)
    assert (connects[0]["user"], connects[0]["pass"]) == ("ada", "pw")


def test_a_lame_duck_is_announced() -> None:
    events = Events()
    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer, on_event=events) as client:
        broker.newest.send(b'INFO {"ldm":true}\r\n')
        assert events.wait("lame_duck")["server"] == peer.url
        client.flush()


def test_errors_that_do_not_close_are_events_and_nothing_more() -> None:
    events = Events()
    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer, on_event=events) as client:
        broker.newest.send(b"-ERR 'Permissions Violation for Publish to \"x\"'\r\n-ERR 'whatever'\r\n")
        assert events.wait("error", 2)["error"] == "whatever"
        client.flush()
        assert "disconnected" not in events.names


def test_an_on_event_that_raises_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def bad(name: str, info: dict[str, Any]) -> None:
        raise ZeroDivisionError("a fault of the user's")

    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer, on_event=bad) as client:
        broker.drop()
        eventually(lambda: len(broker.links) == 2)
        client.flush()
        eventually(lambda: caplog.text.count("ZeroDivisionError: a fault of the user's") >= 3)


# -- closing ----------------------------------------------------------------------------------------------------------


def waits_for_a_reply(client: natsync.Client) -> object:
    return client.request("s", b"", timeout=30)


def waits_for_a_chunk(client: natsync.Client) -> object:
    return client.stream("s", b"").next(timeout=30)


def waits_for_a_message(client: natsync.Client) -> object:
    return client.subscribe("s").next(timeout=30)


def waits_for_the_server(client: natsync.Client) -> object:
    return client.flush(timeout=30)


WAITS = [waits_for_a_reply, waits_for_a_chunk, waits_for_a_message, waits_for_the_server]


@pytest.mark.parametrize("wait", WAITS)
def test_close_wakes_what_waits(wait: Callable[[natsync.Client], object]) -> None:
    broker = Broker(pongs=False)
    with ScriptedPeer(broker) as peer:
        with opened(peer) as client:
            pending = Outcome(lambda: wait(client))
            eventually(lambda: broker.published() or broker.subscribed() or broker.pings)
            begin = time.monotonic()
            client.close(timeout=0.1)
            assert isinstance(pending.within(SLACK), ConnectionClosed)
            assert time.monotonic() - begin < 0.1 + SLACK


@pytest.mark.parametrize("wait", WAITS)
def test_close_wakes_what_waits_for_a_link(wait: Callable[[natsync.Client], object]) -> None:
    gate = Gate(Broker())
    with ScriptedPeer(gate) as peer:
        with opened(peer, reconnect_wait=30, reconnect_wait_max=30) as client:
            gate.broker.drop()
            eventually(lambda: client.status == "reconnecting" and peer.accepted == 2)
            pending = Outcome(lambda: wait(client))
            pending._thread.join(0.05)
            begin = time.monotonic()
            client.close()
            assert isinstance(pending.within(SLACK), ConnectionClosed)
            assert time.monotonic() - begin < SLACK


def test_a_loop_over_a_subscription_ends_with_close() -> None:
    with ScriptedPeer(Broker()) as peer:
        with opened(peer) as client:
            loop = Outcome(lambda: list(client.subscribe("s")))
            client.close()
            assert loop.within(SLACK) is None or isinstance(loop.error, ConnectionClosed)


def test_close_while_waiting_to_reconnect_returns_promptly() -> None:
    gate = Gate(Broker())
    with ScriptedPeer(gate) as peer:
        with opened(peer, reconnect_wait=30, reconnect_wait_max=30) as client:
            gate.broker.drop()
            eventually(lambda: peer.accepted == 2)
            begin = time.monotonic()
            client.close()
            assert time.monotonic() - begin < SLACK
            assert client.status == "closed"


def test_close_does_not_wait_for_the_next_link_if_this_one_is_lost_as_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate(Broker())
    with ScriptedPeer(gate) as peer, opened(peer, reconnect_wait=30, reconnect_wait_max=30) as client:
        original = Connection._await_session

        def lost_just_before(self: Connection, *args: Any) -> Any:
            """What flush() waits by, with a link that breaks behind close()'s look at it."""
            gate.broker.drop()
            eventually(lambda: self.status == "reconnecting")
            return original(self, *args)

        monkeypatch.setattr(Connection, "_await_session", lost_just_before)
        begin = time.monotonic()
        client.close()
        assert time.monotonic() - begin < SLACK


def test_close_while_a_silent_server_is_dialed_again_returns_promptly() -> None:
    broker = Broker()
    with ScriptedPeer(lambda peer: peer.hold() if peer.index else broker(peer)) as peer:
        with opened(peer, connect_timeout=20) as client:
            broker.drop()
            eventually(lambda: peer.accepted == 2)
            begin = time.monotonic()
            client.close()
            assert time.monotonic() - begin < SLACK


def test_close_while_connecting_ends_the_open_of_another_thread() -> None:
    with ScriptedPeer(PeerConnection.hold) as peer:
        client = natsync.Client(peer.url, connect_timeout=20)
        opening = Outcome(client.open)
        eventually(lambda: peer.accepted == 1)
        begin = time.monotonic()
        client.close()
        assert time.monotonic() - begin < SLACK
        assert isinstance(opening.within(SLACK), ConnectionClosed)


def test_close_frees_the_socket_of_a_server_that_does_not_answer() -> None:
    with ScriptedPeer(Broker(pongs=False)) as peer:
        before = open_descriptors()
        with opened(peer) as client:
            eventually(lambda: open_descriptors() == before + 2)  # ours and the peer's
            client.close(timeout=0.1)
            # In the end the peer closes its end too, having read the end of ours.
            eventually(lambda: open_descriptors() == before, message="close() left a descriptor open")


def test_close_sends_what_was_published_before() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer:
        with opened(peer) as client:
            for number in range(2000):
                client.publish("s", b"%d" % number)
            client.close()
            assert len(broker.published()) == 2000


def test_close_is_idempotent_and_may_come_from_many_threads() -> None:
    with ScriptedPeer(Broker()) as peer:
        with opened(peer) as client:
            outcomes = [Outcome(client.close) for _ in range(8)]
            assert [outcome.within(5) for outcome in outcomes] == [None] * 8
            client.close()
            assert client.status == "closed"


def test_close_may_come_from_a_callback() -> None:
    broker = Broker()
    closed = threading.Event()
    with ScriptedPeer(broker) as peer:
        with opened(peer) as client:

            def callback(message: natsync.Message) -> None:
                client.close()
                closed.set()

            client.subscribe("s", callback)
            client.flush()
            broker.newest.send(b"MSG s %b 0\r\n\r\n" % broker.subscribed()[0].sid)
            assert closed.wait(SLACK)
            assert client.status == "closed"


def test_close_may_come_from_an_event() -> None:
    broker = Broker()
    closed = threading.Event()

    def on_event(name: str, info: dict[str, Any]) -> None:
        if name == "disconnected":
            client.close()
            closed.set()

    with ScriptedPeer(broker) as peer:
        with opened(peer, on_event=on_event) as client:
            broker.drop()
            assert closed.wait(10)
            assert client.status == "closed"


# -- reconnecting on demand ------------------------------------------------------------------------------------------


def test_force_reconnect_makes_another_link_at_once_with_everything_in_place() -> None:
    broker, events = Broker(), Events()
    with (
        ScriptedPeer(broker) as peer,
        opened(peer, on_event=events, reconnect_wait=30.0, reconnect_wait_max=30.0) as client,
    ):
        sub = client.subscribe("s")
        client.flush()
        for count in (1, 2, 3):
            client.force_reconnect()
            events.wait("reconnected", count)
        client.flush()
        assert [one.subject for one in broker.subscribed()] == [b"s"]
        assert sub.active
        assert client.stats()["reconnects"] == 3


def test_force_reconnect_goes_to_another_server_if_there_is_one() -> None:
    with ScriptedPeer(Broker()) as first, ScriptedPeer(Broker()) as second:
        events = Events()
        client = natsync.connect([first.url, second.url], randomize=False, on_event=events, **QUICK)
        client.force_reconnect()
        assert events.wait("reconnected")["server"] == second.url
        client.close()


def test_force_reconnect_cuts_the_pause_between_attempts_short() -> None:
    broker, events = Broker(), Events()
    gate = Gate(broker)
    with ScriptedPeer(gate) as peer:
        options = {"reconnect_wait": 60.0, "reconnect_wait_max": 60.0, "on_event": events}
        with opened(peer, **options) as client:
            broker.drop()
            eventually(lambda: peer.accepted >= 2)
            gate.open.set()
            client.force_reconnect()
            events.wait("reconnected")


def test_force_reconnect_tells_what_is_under_way() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer) as client:
        asking = Outcome(lambda: client.request("a", timeout=5))
        eventually(lambda: broker.published())
        client.force_reconnect()
        error = asking.within(5)
        assert isinstance(error, ConnectionLost)
        assert error.sent


def test_force_reconnect_of_a_closed_client_says_so_and_of_a_new_one_connects() -> None:
    with ScriptedPeer(Broker()) as peer:
        client = natsync.Client(peer.url, **QUICK)
        client.force_reconnect()
        eventually(lambda: client.status == "connected")
        client.close()
        with pytest.raises(ConnectionClosed):
            client.force_reconnect()


# -- draining ---------------------------------------------------------------------------------------------------------


def test_drain_of_a_client_that_was_never_used_connects_to_nothing() -> None:
    with ScriptedPeer(Broker()) as peer:
        client = natsync.Client(peer.url)
        client.drain(1)
        assert client.status == "closed"
        used = natsync.Client(peer.url, **QUICK)
        used._connection()  # what a verb does before it finds that its arguments are wrong
        used.drain(1)
        assert used.status == "closed"
        assert peer.accepted == 0


def test_drain_reports_what_was_not_handled() -> None:
    broker = Broker()
    release = threading.Event()
    with ScriptedPeer(broker) as peer, opened(peer) as client:
        client.subscribe("stuck", lambda message: release.wait(20))
        client.subscribe("fine", lambda message: None)
        eventually(lambda: len(broker.subscribed()) == 2)
        for sub in broker.subscribed():
            broker.newest.send(b"MSG %b %b 1\r\nx\r\n" % (sub.subject, sub.sid) * 3)
        eventually(lambda: client.stats()["in_messages"] == 6)
        began = time.monotonic()
        with pytest.raises(natsync.DrainTimeout) as raised:
            client.drain(2.0)
        assert time.monotonic() - began < 2.0 + SLACK + 1
        release.set()
        assert raised.value.unhandled == {"stuck": 3}
        assert raised.value.unsent == 0
        assert raised.value.undone == ["3 messages on 'stuck' not handled"]
        assert client.status == "closed"


def test_drain_reports_what_was_not_sent() -> None:
    broker = Broker()
    gate = Gate(broker)
    with ScriptedPeer(gate) as peer, opened(peer) as client:
        broker.drop()
        eventually(lambda: client.status == "reconnecting")
        for _ in range(4):
            client.publish("n", b"x")
        began = time.monotonic()
        with pytest.raises(natsync.DrainTimeout, match="4 messages were not sent") as raised:
            client.drain(0.3)
        assert time.monotonic() - began < 0.3 + SLACK + 1
        assert raised.value.unsent == 4


def test_what_was_dropped_stays_counted_when_its_subscription_has_ended() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer) as client:
        sub = client.subscribe("s", pending_messages=1)
        eventually(lambda: broker.subscribed())
        broker.newest.send(b"MSG s %b 1\r\nx\r\n" % broker.subscribed()[0].sid * 5)
        eventually(lambda: sub.dropped == 4)
        sub.next(timeout=5)
        sub.unsubscribe()
        client.flush()
        assert client.stats()["dropped"] == 4


@pytest.mark.parametrize("use", ["publish", "request", "subscribe", "stream", "flush", "open"])
def test_a_closed_client_says_so(use: str) -> None:
    with ScriptedPeer(Broker()) as peer:
        with opened(peer) as client:
            client.close()
            arguments = () if use in ("flush", "open") else ("s",)
            with pytest.raises(ConnectionClosed):
                getattr(client, use)(*arguments)


def test_a_client_that_was_never_used_closes_without_a_word() -> None:
    with ScriptedPeer(refuse) as peer:
        natsync.Client(peer.url).close()
        assert peer.accepted == 0


@pytest.mark.slow
def test_a_hundred_clients_leave_no_thread_and_no_descriptor(nats_server: NatsServer) -> None:
    with natsync.connect(nats_server.url):
        pass
    threads, descriptors = threading.active_count(), open_descriptors()
    for _ in range(100):
        with natsync.connect(nats_server.url) as client:
            client.subscribe("s", lambda message: None)
            client.publish("s", b"x")
            client.flush()
    eventually(lambda: threading.active_count() <= threads)
    eventually(lambda: open_descriptors() <= descriptors)


def test_an_idle_client_uses_no_processor_time(nats_server: NatsServer) -> None:
    with natsync.connect(nats_server.url) as client:
        client.subscribe("s", lambda message: None)
        client.flush()
        used = []
        for _ in range(3):  # other things of this process may run in one of them
            begin = time.process_time()
            threading.Event().wait(0.3)
            used.append(time.process_time() - begin)
        assert min(used) < 0.01


# -- hooks for the whole module ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_descriptor_left_behind(nats_server: NatsServer) -> Iterator[None]:
    before = Counter(os.listdir("/proc/self/fd"))
    yield
    eventually(
        lambda: len(os.listdir("/proc/self/fd")) <= before.total(), 10, "the test leaves more descriptors than it found"
    )
