"""A control line that is too long for the server would cost everybody the link: it is refused before it is sent."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import natsync
from natsync.options import LEAST_CONTROL_LINE, MAX_CONTROL_LINE
from natsync.subject import NUMBERS_BYTES
from natsync.testing import NatsServer, ScriptedPeer, eventually
from rawclient import PATIENCE, RawClient

#: The longest subject that is published to without a reply subject, or subscribed to without a queue group.
LONGEST = MAX_CONTROL_LINE - NUMBERS_BYTES


def long(size: int, start: str = "long.") -> str:
    return start.ljust(size, "x")


@pytest.fixture
def client(nats_server: NatsServer) -> Iterator[natsync.Client]:
    """Its link is the same at the end."""
    with natsync.connect(nats_server.url) as client:
        yield client
        client.flush()
        assert client.stats()["reconnects"] == 0


@pytest.fixture
def subscriber(nats_server: NatsServer) -> Iterator[natsync.Subscriber]:
    with natsync.Subscriber(nats_server.url) as subscriber:
        yield subscriber


TOO_LONG: dict[str, Callable[[natsync.Client], object]] = {
    "publish": lambda client: client.publish(long(LONGEST + 1)),
    "publish with headers": lambda client: client.publish(long(LONGEST + 1), headers={"a": "b"}),
    "publish with a reply subject": lambda client: client.publish(long(LONGEST - 99), reply=long(100)),
    "publish in letters of two bytes": lambda client: client.publish("ü" * (LONGEST // 2 + 1)),
    "request": lambda client: client.request(long(LONGEST - 10), timeout=PATIENCE),
    "request_many": lambda client: client.request_many(long(LONGEST - 10), timeout=PATIENCE),
    "stream": lambda client: client.stream(long(LONGEST - 10), timeout=PATIENCE),
    "stream_request": lambda client: client.stream_request(long(LONGEST - 10), b"", print, timeout=PATIENCE),
    "subscribe": lambda client: client.subscribe(long(LONGEST + 1)),
    "subscribe in a queue group": lambda client: client.subscribe(long(LONGEST - 99), queue=long(100)),
    "respond": lambda client: natsync.Message("a", reply=long(LONGEST + 1), publish=answer_of(client)).respond(),
}


def answer_of(client: natsync.Client) -> Any:
    return client._connection().publish_answer


@pytest.mark.parametrize("use", TOO_LONG.values(), ids=TOO_LONG)
def test_what_is_too_long_is_refused_and_the_link_of_all_stays(
    client: natsync.Client, use: Callable[[natsync.Client], object]
) -> None:
    for _ in range(2):
        with pytest.raises(natsync.InvalidArgument, match=r"bytes long; max_control_line=4096 leaves room for 4072"):
            use(client)
    assert (client.stats()["subscriptions"], client.stats()["waiting_replies"]) == (0, 0)


def test_the_longest_that_is_taken_arrives(client: natsync.Client) -> None:
    subject, reply = long(LONGEST), long(50)
    whole, queued = client.subscribe(subject), client.subscribe(long(LONGEST - 50), queue=reply)
    client.publish(subject, b"1")
    client.publish(subject, bytes(1 << 20))
    client.publish(subject, b"3", headers={"a": "b"})
    client.publish(long(LONGEST - 50), b"4", reply=reply, headers={"a": "b"})
    assert [len(whole.next(PATIENCE).data) for _ in range(3)] == [1, 1 << 20, 1]
    assert queued.next(PATIENCE).reply == reply


def test_a_request_and_a_stream_of_a_long_subject_are_answered(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    subject = long(LONGEST - 100)
    subscriber.handler(subject)(lambda ctx, request: request.data)
    subscriber.stream(subject + ".s")(lambda ctx, request: iter([b"a", b"b"]))
    assert client.request(subject, b"x", timeout=PATIENCE).data == b"x"
    assert list(client.stream(subject + ".s", timeout=PATIENCE)) == [b"a", b"b"]


def test_the_limit_is_an_option(make_nats_server: Callable[..., NatsServer]) -> None:
    server = make_nats_server(config="max_control_line: 8192")
    with natsync.connect(server.url, max_control_line=8192) as client, natsync.connect(server.url) as other:
        subscription = client.subscribe(long(5000))
        client.publish(long(5000), b"x")
        assert subscription.next(PATIENCE).data == b"x"
        with pytest.raises(natsync.InvalidArgument):  # whatever another client may
            other.publish(long(5000), b"x")
        assert (client.stats()["reconnects"], other.stats()["reconnects"]) == (0, 0)


def test_a_shorter_limit_holds_for_the_subject_that_another_client_may_use(nats_server: NatsServer) -> None:
    subject = long(LEAST_CONTROL_LINE)
    with natsync.connect(nats_server.url) as client, natsync.connect(nats_server.url, max_control_line=512) as short:
        client.publish(subject)
        with pytest.raises(natsync.InvalidArgument, match="max_control_line=512"):
            short.publish(subject)


REGISTERING: dict[str, Callable[[natsync.Subscriber, str, str | None], object]] = {
    "stream": lambda sub, subject, queue: sub.stream(subject, queue=queue)(lambda ctx, request: []),
    "handler": lambda sub, subject, queue: sub.handler(subject, queue=queue)(lambda ctx, request: b""),
    "stream_subscribe": lambda sub, subject, queue: sub.stream_subscribe(subject, lambda c, r: [], queue=queue),
    "subscribe": lambda sub, subject, queue: sub.subscribe(subject, print, queue=queue),
}


@pytest.mark.parametrize("queue", [None, long(100)], ids=["alone", "with its queue group"])
@pytest.mark.parametrize("register", REGISTERING.values(), ids=REGISTERING)
def test_a_registration_that_is_too_long_is_refused(
    subscriber: natsync.Subscriber, register: Callable[..., object], queue: str | None
) -> None:
    with pytest.raises(natsync.InvalidArgument, match="max_control_line"):
        register(subscriber, long(LONGEST + 1 - len(queue or "")), queue)
    assert subscriber.handles == []


@pytest.mark.parametrize("name", ["stream", "handler"])
def test_it_is_refused_at_the_decorator_where_nothing_is_open(name: str) -> None:
    closed = natsync.Subscriber("nats://127.0.0.1:1", max_control_line=1000)
    with pytest.raises(natsync.InvalidArgument, match="max_control_line=1000"):
        REGISTERING[name](closed, long(1000), None)


# -- the responder's side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stream", "handler"])
def test_a_request_whose_reply_subject_leaves_no_room_for_an_answer_is_ignored(
    nats_server: NatsServer, subscriber: natsync.Subscriber, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[bytes] = []

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Any:
        ran.append(request.data)
        return [b"x"] if kind == "stream" else b"x"

    getattr(subscriber, kind)("c.answer")(handler)
    (handle,) = subscriber.handles
    with RawClient(nats_server.url) as raw, natsync.connect(nats_server.url) as client:
        # "c.answer", two spaces and "1" leave this much of the requester's own line; a chunk needs an address besides.
        raw.publish("c.answer", b"1", reply=long(4096 - len("c.answer  1") - (0 if kind == "handler" else 20)).encode())
        raw.flush()
        eventually(lambda: handle.stats["dropped"] == 1, PATIENCE)
        if kind == "stream":
            assert list(client.stream("c.answer", b"2", timeout=PATIENCE)) == [b"x"]
        else:
            assert client.request("c.answer", b"2", timeout=PATIENCE).data == b"x"
    assert ran == [b"2"]
    eventually(lambda: "reply subject is too long" in caplog.text, PATIENCE)
    (warning,) = [one for one in caplog.records if one.levelno == logging.WARNING and "c.answer" in one.message]
    assert "reply subject is too long" in warning.message
    assert subscriber._responder is not None
    assert subscriber._responder.connection.stats()["reconnects"] == 0


def test_a_request_that_is_turned_away_is_not_told_so_where_that_would_be_too_long(nats_server: NatsServer) -> None:
    with natsync.Subscriber(nats_server.url, max_workers=1, pending_messages=1) as subscriber:
        begun, go_on = natsync.Context(), natsync.Context()

        @subscriber.handler("b")
        def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
            begun.cancel()
            go_on.wait(PATIENCE)
            return b"x"

        with RawClient(nats_server.url) as raw:
            raw.subscribe("c.inbox")
            raw.publish("b", b"1", reply=b"c.inbox")
            raw.flush()
            assert begun.wait(PATIENCE)
            raw.publish("b", b"2", reply=b"c.inbox")
            raw.publish("b", b"3", reply=long(4096 - len("b  1")).encode())
            raw.publish("b", b"4", reply=b"c.inbox")
            assert raw.next().block  # the fourth is turned away
            go_on.cancel()
            assert [raw.next().payload for _ in range(2)] == [b"x", b"x"]
        assert subscriber._responder is not None
        assert subscriber._responder.connection.stats()["reconnects"] == 0


def test_answering_a_message_with_too_long_a_reply_subject_is_refused(
    nats_server: NatsServer, client: natsync.Client
) -> None:
    subscription = client.subscribe("c.plain")
    client.flush()
    with RawClient(nats_server.url) as raw:
        raw.publish("c.plain", b"1", reply=long(4080).encode())
        with pytest.raises(natsync.InvalidArgument, match="max_control_line"):
            subscription.next(PATIENCE).respond(b"x")


def test_a_responder_whose_control_subject_is_too_long_is_not_spoken_to(
    nats_server: NatsServer, client: natsync.Client
) -> None:
    """It is the responder's choice, and may be as long as its own line has room for."""
    with RawClient(nats_server.url) as raw:
        raw.subscribe("c.peer")
        raw.flush()
        stream = client.stream("c.peer")
        request = raw.next()
        assert request.reply is not None
        # Its own line is just short enough; the requester's has the same two subjects, and a size of two digits.
        start, end = b"_INBOX.peer.nsy1.", b".a.0"
        control = start.ljust(4096 - len(request.reply) - len("  1") - len(end), b"7") + end
        raw.publish(request.reply, b"", reply=control)
        raw.publish(request.reply, b"x", reply=control.replace(b".a.0", b".d.1"))
        assert stream.next(PATIENCE) == b"x"
        stream.cancel()
        client.flush()


# -- a server configured lower -----------------------------------------------------------------------------------------


def flushed(client: natsync.Client) -> bool:
    try:
        client.flush(PATIENCE)
    except natsync.ConnectionLost:
        return False
    return True


def test_a_subscription_that_is_too_long_for_the_server_ends_and_not_each_link_that_follows(
    make_nats_server: Callable[..., NatsServer],
) -> None:
    server = make_nats_server(config="max_control_line: 1024")
    with natsync.connect(server.url, reconnect_wait=0.01) as client:
        kept = client.subscribe("c.kept")
        longest, long_one = client.subscribe(long(3000)), client.subscribe(long(2000))
        for one in (longest, long_one):
            with pytest.raises(natsync.ConnectError, match="maximum control line exceeded"):
                one.next(PATIENCE)
        eventually(lambda: flushed(client), PATIENCE)  # the link that ended the second may not be lost yet
        lost = client.stats()["reconnects"]
        assert lost <= 4  # two links each, at most
        client.publish("c.kept", b"x")
        assert kept.next(PATIENCE).data == b"x"
        client.flush()
        assert (client.stats()["reconnects"], client.stats()["subscriptions"]) == (lost, 1)


def test_nothing_waits_to_be_lost_behind_a_subscription_that_is_to_be_proved() -> None:
    before_the_pong: list[bytes] = []
    proved = threading.Event()

    def script(link: Any) -> None:
        if link.index == 1:
            return  # a walk that fails, so that something can gather
        link.handshake()
        if link.index == 0:
            while b"SUB " + b"b" * 600 not in link.recv_line():
                pass
            link.send(b"-ERR 'maximum control line exceeded'\r\n")
            return
        while not (line := link.recv_line()).startswith(b"PING"):
            before_the_pong.append(line)
        link.sock.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            before_the_pong.append(link.recv_exactly(1))
        link.sock.settimeout(None)
        link.send(b"PONG\r\n")
        proved.set()
        while link.recv_line():
            pass

    with ScriptedPeer(script, check=False) as peer:
        client = natsync.Client(peer.url, reconnect_wait=0.3, reconnect_jitter=0).open()
        client.subscribe("b" * 600)
        eventually(lambda: peer.accepted > 1)
        for _ in range(50):
            client.publish("n", b"x")
        assert proved.wait(PATIENCE)
        assert all(line.startswith(b"SUB ") for line in before_the_pong)
        eventually(lambda: client.stats()["out_messages"] == 50)
        client.close(0)


def test_a_message_that_is_too_long_for_the_server_ends_no_subscription(
    make_nats_server: Callable[..., NatsServer],
) -> None:
    server = make_nats_server(config="max_control_line: 1024")
    with natsync.connect(server.url, reconnect_wait=0.01) as client:
        kept = client.subscribe(long(900))
        for number in range(1, 4):
            client.publish(long(2000))
            eventually(lambda number=number: client.stats()["reconnects"] == number, PATIENCE)  # type: ignore[misc]
        eventually(lambda: flushed(client), PATIENCE)
        client.publish(long(900), b"x")
        assert kept.next(PATIENCE).data == b"x"
        assert client.stats()["reconnects"] == 3
