"""The body of a streaming response: how it waits, what it says, and that it closes its stream in every way."""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import natsync
from eventsource import parse
from natsync.contrib.body import Body
from natsync.contrib.presence import LOOK_SECONDS, client_gone
from natsync.contrib.sse import Event, EventBody
from natsync.testing import NatsServer, eventually

PATIENCE = 10.0


class Holding:
    """What the handler b.hold does: it sends what it is given, until its requester leaves."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self.sender: natsync.ResponseSender | None = None

    def send(self, data: bytes) -> None:
        eventually(lambda: self.sender is not None, PATIENCE)
        assert self.sender is not None
        self.sender.send(data)


@pytest.fixture
def holding() -> Holding:
    return Holding()


@pytest.fixture
def client(nats_server: NatsServer, holding: Holding) -> Iterator[natsync.Client]:
    subscriber = natsync.Subscriber(nats_server.url)

    @subscriber.stream("b.count")
    def count(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        for number in range(int(request.data)):
            yield b"%d" % number

    @subscriber.stream("b.fail")
    def fail(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.send("first")
        sender.send_error("no such model", code=natsync.Code.NOT_FOUND, details={"model": "x"})

    @subscriber.stream("b.hold")
    def hold(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        holding.sender = sender
        sender.closed.wait(PATIENCE)
        holding.left.set()

    with subscriber, natsync.Client(nats_server.url) as connected:
        yield connected


def error_of(body: EventBody) -> dict[str, Any]:
    """The data of the error event with which the body ends."""
    last = parse(b"".join(body))[-1]
    assert last.event == "error"
    found: dict[str, Any] = last.json()
    return found


# -- what it consists of -----------------------------------------------------------------------------------------------


def test_chunks_become_events_and_the_end_is_one(client: natsync.Client) -> None:
    body = EventBody(client.stream("b.count", "2"))
    assert list(body) == [b": stream\n\n", b"data: 0\n\n", b"data: 1\n\n", b"event: end\ndata: \n\n"]


def test_the_end_may_have_another_name_or_none(client: natsync.Client) -> None:
    assert list(EventBody(client.stream("b.count", "0"), end="done"))[-1] == b"event: done\ndata: \n\n"
    assert list(EventBody(client.stream("b.count", "0"), end=None)) == [b": stream\n\n"]


def test_what_map_returns_may_be_an_event(client: natsync.Client) -> None:
    stream = client.stream("b.count", "2").map(lambda chunk: Event(chunk, event="token", id=chunk.decode()))
    events = parse(b"".join(EventBody(stream, event="other")))
    assert [(event.event, event.id, event.data) for event in events] == [
        ("token", "0", "0"),
        ("token", "1", "1"),
        ("end", "1", ""),
    ]


def test_events_have_the_type_that_was_asked_for(client: natsync.Client) -> None:
    events = parse(b"".join(EventBody(client.stream("b.count", "1"), event="token")))
    assert [event.event for event in events] == ["token", "end"]


def test_the_first_bytes_do_not_wait_for_the_first_chunk(client: natsync.Client, holding: Holding) -> None:
    body = EventBody(client.stream("b.hold"))
    assert next(body) == b": stream\n\n"
    assert holding.sender is None or not holding.sender.send_count
    body.close()


def test_heartbeats_come_while_nothing_else_does(client: natsync.Client, holding: Holding) -> None:
    body = EventBody(client.stream("b.hold"), heartbeat=0.1)
    begin = time.monotonic()
    next(body)
    assert [next(body) for _ in range(3)] == [b": ping\n\n"] * 3
    assert 0.3 <= time.monotonic() - begin < PATIENCE
    holding.send(b"x")
    assert next(event for event in body if event != b": ping\n\n") == b"data: x\n\n"
    body.close()


def test_a_plain_body_is_the_chunks_and_nothing_else(client: natsync.Client) -> None:
    assert list(Body(client.stream("b.count", "3"))) == [b"0", b"1", b"2"]


def test_a_body_never_hands_out_nothing(client: natsync.Client, holding: Holding) -> None:
    """Servers learn from a failed write alone, and writing b"" writes nothing."""
    body = Body(client.stream("b.hold"))
    threading.Thread(target=lambda: [holding.send(b""), holding.send(b"x")], daemon=True).start()
    assert next(body) == b"x"
    body.close()


def test_a_subscription_is_a_body_whose_chunks_are_the_messages_data(client: natsync.Client) -> None:
    subscription = client.subscribe("b.news", max_messages=2)
    client.publish("b.news", "one")
    client.publish("b.news", b"two")
    assert list(Body(subscription)) == [b"one", b"two"]


@pytest.mark.parametrize("end", ["max_messages", "unsubscribe", "close of the client"])
def test_the_end_of_a_subscription_is_that_of_the_body(client: natsync.Client, end: str) -> None:
    subscription = client.subscribe("b.news", max_messages=1 if end == "max_messages" else None)
    body = EventBody(subscription.map(lambda message: Event(message.data, id=message.subject)))
    client.publish("b.news", "x")
    assert [next(body), next(body)] == [b": stream\n\n", b"id: b.news\ndata: x\n\n"]
    if end == "unsubscribe":
        subscription.unsubscribe()
    elif end == "close of the client":
        client.close()
    assert list(body) == [b"event: end\ndata: \n\n"]


def test_heartbeats_come_while_a_subject_is_silent(client: natsync.Client) -> None:
    body = EventBody(client.subscribe("b.news"), heartbeat=0.1)
    next(body)
    assert next(body) == b": ping\n\n"
    body.close()
    assert list(body) == []


def test_a_subscription_that_loses_messages_and_is_to_say_so_fails(client: natsync.Client) -> None:
    body = EventBody(client.subscribe("b.news", pending_messages=1, overflow="error"))
    for _ in range(2):
        client.publish("b.news", "x")
    client.flush()
    next(body)
    assert next(body) == b"data: x\n\n"
    assert error_of(body)["error"] == "RESOURCE_EXHAUSTED"


def test_a_connection_that_is_given_up_is_no_end_of_a_subscription(make_nats_server: Callable[..., NatsServer]) -> None:
    server = make_nats_server()
    with natsync.Client(server.url, reconnect=False) as client:
        body = EventBody(client.subscribe("b.news"))
        server.kill()
        assert parse(b"".join(body))[-1].event == "error"


def test_replies_are_a_body(client: natsync.Client) -> None:
    client.subscribe("b.who", lambda message: message.respond("me"))
    assert list(Body(client.request_many("b.who", timeout=PATIENCE, max_messages=1))) == [b"me"]


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_handlers_error_is_told_with_its_code_text_and_details(client: natsync.Client) -> None:
    assert error_of(EventBody(client.stream("b.fail"))) == {
        "code": 5,
        "error": "NOT_FOUND",
        "message": "no such model",
        "details": {"model": "x"},
    }


def test_an_error_of_ours_is_told_without_the_name_of_a_subject(
    client: natsync.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "natsync.contrib"):
        told = error_of(EventBody(client.stream("b.nobody")))
    assert told == {"code": 14, "error": "UNAVAILABLE", "message": "the service is not running"}
    assert "b.nobody" in caplog.text


def test_a_deadline_is_told_while_the_body_waits_in_steps(client: natsync.Client) -> None:
    assert error_of(EventBody(client.stream("b.hold", timeout=0.3), heartbeat=0.1))["error"] == "DEADLINE_EXCEEDED"


def test_an_idle_timeout_is_told_while_the_body_waits_in_steps(client: natsync.Client, holding: Holding) -> None:
    body = EventBody(client.stream("b.hold", idle_timeout=0.3), heartbeat=0.05)
    eventually(lambda: holding.sender is not None, PATIENCE)  # its time counts from the first next()
    assert error_of(body)["error"] == "DEADLINE_EXCEEDED"
    assert holding.left.wait(PATIENCE)


def test_a_function_that_fails_is_told_without_its_words_and_cancels(
    client: natsync.Client, holding: Holding, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(chunk: bytes) -> bytes:
        raise ValueError("the password is 1234")

    body = EventBody(client.stream("b.hold").map(fail))
    threading.Thread(target=holding.send, args=(b"x",), daemon=True).start()
    assert error_of(body) == {"code": 13, "error": "INTERNAL", "message": "the server made a mistake"}
    assert "the password is 1234" in caplog.text  # for whoever reads the log
    assert holding.left.wait(PATIENCE)


@pytest.mark.parametrize(
    "wrap", [lambda stream, fail: stream.map(fail), lambda stream, fail: stream.map(fail).map(bytes)]
)
@pytest.mark.parametrize("wait", ["subscription", "stream"])
def test_a_wait_or_an_end_within_a_function_is_not_taken_for_the_streams_own(
    client: natsync.Client, wait: str, wrap: Callable[..., Any]
) -> None:
    other: Any = client.subscribe("b.other") if wait == "subscription" else client.stream("b.count", "0")

    def ask(chunk: bytes) -> bytes:
        if chunk == b"1":
            other.next(PATIENCE if wait == "stream" else 0)
        return chunk

    *events, last = parse(b"".join(EventBody(wrap(client.stream("b.count", "3"), ask), gone=lambda: False)))
    assert [one.data for one in events] == ["0"]
    assert (last.event, last.json()["code"]) == ("error", 4 if wait == "subscription" else 2)


@pytest.mark.parametrize("error", [StopIteration, GeneratorExit])
def test_a_function_that_raises_the_end_does_not_end_the_stream_quietly(
    client: natsync.Client, holding: Holding, error: type[BaseException]
) -> None:
    def fail(chunk: bytes) -> bytes:
        raise error

    body = EventBody(client.stream("b.count", "1").map(fail))
    next(body)
    if error is StopIteration:
        assert b"event: error" in next(body)
    else:
        with pytest.raises(GeneratorExit):
            next(body)
    body.close()


def test_the_error_may_be_described_otherwise(client: natsync.Client) -> None:
    body = EventBody(client.stream("b.fail"), describe=lambda error: {"kind": type(error).__name__})
    assert error_of(body) == {"kind": "HandlerError"}


def test_a_description_that_fails_closes_the_body(client: natsync.Client, holding: Holding) -> None:
    body = EventBody(client.stream("b.hold", timeout=1.0), describe=lambda error: {"x": object()})
    next(body)
    with pytest.raises(TypeError):
        next(body)
    assert holding.left.wait(PATIENCE)
    assert list(body) == []


def test_a_plain_body_raises_so_that_the_response_is_broken_off(client: natsync.Client) -> None:
    body = Body(client.stream("b.fail"))
    assert next(body) == b"first"
    with pytest.raises(natsync.HandlerError):
        next(body)
    assert list(body) == []


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_worker_that_is_told_to_stop_cancels(
    client: natsync.Client, holding: Holding, error: type[BaseException]
) -> None:
    def stop(chunk: bytes) -> bytes:
        raise error

    body = EventBody(client.stream("b.hold").map(stop))
    next(body)
    threading.Thread(target=holding.send, args=(b"x",), daemon=True).start()
    with pytest.raises(error):
        next(body)
    assert holding.left.wait(PATIENCE)


@pytest.mark.parametrize("arguments", [{"heartbeat": 0}, {"heartbeat": "1"}, {"event": "a\nb"}, {"end": "a\rb"}])
def test_an_argument_that_is_refused_closes_the_stream(
    client: natsync.Client, holding: Holding, arguments: dict[str, Any]
) -> None:
    stream = client.stream("b.hold")
    eventually(lambda: holding.sender is not None, PATIENCE)
    with pytest.raises((natsync.InvalidArgument, TypeError)):
        EventBody(stream, **arguments)
    assert holding.left.wait(PATIENCE)


@pytest.mark.parametrize("stream", [None, [b"x"], iter(()), map(str, [])])
def test_what_is_no_stream_is_refused(stream: Any) -> None:
    with pytest.raises(TypeError, match=r"client\.stream\(\)"):
        Body(stream)


# -- closing -----------------------------------------------------------------------------------------------------------

Make = Callable[[natsync.Stream], Body]


@pytest.mark.parametrize("make", [Body, EventBody])
def test_closing_cancels_whether_it_was_begun_or_not(client: natsync.Client, holding: Holding, make: Make) -> None:
    body = make(client.stream("b.hold"))
    eventually(lambda: holding.sender is not None, PATIENCE)
    body.close()
    assert holding.left.wait(PATIENCE)
    body.close()
    assert list(body) == []


@pytest.mark.parametrize("make", [Body, EventBody])
def test_dropping_warns_and_cancels(client: natsync.Client, holding: Holding, make: Make) -> None:
    bodies = [make(client.stream("b.hold"))]
    eventually(lambda: holding.sender is not None, PATIENCE)
    with pytest.warns(ResourceWarning, match="dropped without close"):
        bodies.clear()
    assert holding.left.wait(PATIENCE)


def test_dropping_what_was_iterated_to_its_end_does_not_warn(client: natsync.Client) -> None:
    body = EventBody(client.stream("b.count", "1"))
    assert len(list(body)) == 3
    del body
    gc.collect()  # a warning would be an error


def test_close_from_another_thread_wakes_a_body_that_waits(client: natsync.Client, holding: Holding) -> None:
    body = EventBody(client.stream("b.hold"), heartbeat=None)
    threading.Timer(0.1, body.close).start()
    list(body)
    assert holding.left.wait(PATIENCE)


def test_what_is_fetched_before_is_not_lost(client: natsync.Client) -> None:
    assert list(Body(client.stream("b.count", "2")).prefetch()) == [b"0", b"1"]
    assert list(Body(client.stream("b.count", "0")).prefetch()) == []


def test_what_goes_wrong_before_the_first_chunk_is_raised_by_prefetch(client: natsync.Client) -> None:
    with pytest.raises(natsync.NoRespondersError):
        Body(client.stream("b.nobody")).prefetch()


# -- the look at the client's socket -----------------------------------------------------------------------------------


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """(the server's end, the client's end) of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        server, _ = listening.accept()
    with server, client:
        yield server, client


def looker(server: socket.socket) -> Callable[[], bool]:
    gone = client_gone({"gunicorn.socket": server})
    assert gone is not None
    return gone


def test_an_environ_without_a_socket_offers_no_look() -> None:
    assert client_gone({"wsgi.version": (1, 0), "gunicorn.socket": None}) is None
    assert client_gone({"uwsgi.version": b"2.0.30"}) is None  # handed on by another server: this process is not uWSGI's


@pytest.mark.parametrize("timeout", [None, 0.0, 30.0], ids=["blocking", "non-blocking", "with-timeout"])
def test_a_look_at_a_client_that_is_there_takes_no_time_and_no_byte(
    connection: tuple[socket.socket, socket.socket], timeout: float | None
) -> None:
    server, client = connection
    server.settimeout(timeout)
    gone = looker(server)
    begin = time.monotonic()
    assert not gone()
    client.sendall(b"ahead")
    eventually(lambda: server.recv(9, socket.MSG_PEEK) == b"ahead" if timeout != 0.0 else True)
    assert not gone()
    assert time.monotonic() - begin < 5
    server.settimeout(5)
    assert server.gettimeout() == 5
    assert server.recv(9) == b"ahead"


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_a_look_sees_a_client_that_has_closed(
    connection: tuple[socket.socket, socket.socket], timeout: float | None
) -> None:
    server, client = connection
    server.settimeout(timeout)
    gone = looker(server)
    client.close()
    eventually(gone, PATIENCE)
    assert server.gettimeout() == timeout


def test_a_look_sees_a_reset(connection: tuple[socket.socket, socket.socket]) -> None:
    server, client = connection
    gone = looker(server)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    eventually(gone, PATIENCE)


def test_a_look_at_a_socket_that_the_server_has_closed(connection: tuple[socket.socket, socket.socket]) -> None:
    server, _ = connection
    gone = looker(server)
    server.close()
    assert gone()


def test_a_look_leaves_the_sockets_flags_alone_whatever_the_default_timeout(
    connection: tuple[socket.socket, socket.socket],
) -> None:
    server, _ = connection
    gone = looker(server)
    former = socket.getdefaulttimeout()
    socket.setdefaulttimeout(7.0)
    try:
        assert not gone()
    finally:
        socket.setdefaulttimeout(former)
    assert os.get_blocking(server.fileno())


def test_waitress_is_asked_itself() -> None:
    answers = iter([False, True])
    gone = client_gone({"waitress.client_disconnected": lambda: next(answers)})
    assert gone is not None
    assert [gone(), gone()] == [False, True]


def test_a_body_that_waits_ends_soon_after_its_client_has_left(
    client: natsync.Client, holding: Holding, connection: tuple[socket.socket, socket.socket]
) -> None:
    server, browser = connection
    body = EventBody(client.stream("b.hold"), gone=looker(server))
    assert next(body)
    eventually(lambda: holding.sender is not None, PATIENCE)
    browser.close()
    begin = time.monotonic()
    assert list(body) == []
    assert holding.left.wait(PATIENCE)
    assert time.monotonic() - begin < LOOK_SECONDS + 5


def test_prefetch_gives_up_when_the_client_leaves(
    client: natsync.Client, holding: Holding, connection: tuple[socket.socket, socket.socket]
) -> None:
    server, browser = connection
    browser.close()
    assert list(Body(client.stream("b.hold"), gone=looker(server)).prefetch()) == []


def test_the_data_of_an_error_is_json_on_one_line(client: natsync.Client) -> None:
    wire = list(EventBody(client.stream("b.fail")))[-1]
    assert wire.startswith(b"event: error\ndata: {")
    json.loads(wire.split(b"data: ")[1])
