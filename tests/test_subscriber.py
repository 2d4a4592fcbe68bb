"""Subscriber: registering, bounds, requests and replies, and every way to stop, against a real nats-server."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import pytest

import natsync
from natsync.headers import decode
from natsync.streaming import subscriber as subscriber_module
from natsync.testing import FaultProxy, NatsServer, ScriptedPeer, eventually
from processes import Child, child
from rawclient import END, ERROR, PATIENCE, RawClient, RecordingServer
from support import framed_only

Make = Callable[..., NatsServer]


@pytest.fixture
def client(nats_server: NatsServer, mode: str) -> Iterator[natsync.Client]:
    with natsync.connect(nats_server.url, framed=mode == "framed") as client:
        yield client


@pytest.fixture
def subscriber(natsync_subscriber: natsync.Subscriber) -> natsync.Subscriber:
    return natsync_subscriber.open()


@pytest.fixture
def raw(nats_server: NatsServer) -> Iterator[RawClient]:
    with RawClient(nats_server.url) as raw:
        yield raw


def answers(client: natsync.Client, subject: str) -> bool:
    """Whether anybody listens on the subject."""
    try:
        client.request(subject, timeout=PATIENCE)
    except natsync.NoRespondersError:
        return False
    return True


def end_of(stream: natsync.Stream) -> Exception | None:
    """How the stream ends: None for its END, or what it raises."""
    try:
        for _ in stream:
            pass
    except natsync.NatsError as error:
        return error
    return None


class Gate:
    """A stream handler that waits in mid-stream: .entered counts its runs, .open() lets all go on."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.reasons: list[str | None] = []
        self._open = threading.Event()

    def handler(self, ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"first"
        self.entered.release()
        while not self._open.wait(0.005):
            if ctx.cancelled:
                self.reasons.append(ctx.reason)
                return
        yield b"last"

    def wait_entered(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE)

    def open(self) -> None:
        self._open.set()


# -- registering ---------------------------------------------------------------------------------------------------


def test_decorators_only_record_until_the_subscriber_is_opened() -> None:
    with RecordingServer() as server:
        subscriber = natsync.Subscriber(server.url)
        subscriber.stream("u.one")(lambda ctx, request: [b"1"])
        subscriber.handler("u.two", queue="q")(lambda ctx, request: b"2")
        assert subscriber.status == "new"
        assert server.accepted == 0
        with subscriber:
            assert {(sub.subject, sub.queue) for sub in server.subs} >= {(b"u.one", None), (b"u.two", b"q")}


def test_recorded_handlers_are_live_when_open_returns(
    client: natsync.Client, natsync_subscriber: natsync.Subscriber
) -> None:
    natsync_subscriber.stream("u.recorded")(lambda ctx, request: [b"1"])
    natsync_subscriber.open()
    assert list(client.stream("u.recorded")) == [b"1"]


def test_decorators_on_an_open_subscriber_are_live_when_they_return(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    for n in range(20):
        subject = f"u.live.{n}"
        subscriber.stream(subject)(lambda ctx, request: [b"1"])
        assert list(client.stream(subject)) == [b"1"]


def test_subscribe_without_a_handler_only_records_until_the_subscriber_is_opened() -> None:
    def handler(message: natsync.Message) -> None: ...

    with RecordingServer() as server:
        subscriber = natsync.Subscriber(server.url)
        assert subscriber.subscribe("u.plain", queue="q")(handler) is handler
        assert subscriber.status == "new"
        assert server.accepted == 0
        with subscriber:
            assert (b"u.plain", b"q") in {(sub.subject, sub.queue) for sub in server.subs}
            assert [(one.subject, one.queue, one.kind) for one in subscriber.handles] == [("u.plain", "q", "message")]


def test_subscribe_without_a_handler_has_the_function_called_for_every_message(
    natsync_client: natsync.Client, natsync_subscriber: natsync.Subscriber
) -> None:
    got: SimpleQueue[bytes] = SimpleQueue()

    @natsync_subscriber.subscribe("u.plain.before", concurrency=2, overflow="drop_old")
    def before(message: natsync.Message) -> None:
        got.put(message.data)

    natsync_subscriber.open()

    @natsync_subscriber.subscribe("u.plain.after")  # live when it returns
    def after(message: natsync.Message) -> None:
        got.put(message.data)

    for subject in ("u.plain.before", "u.plain.after"):
        natsync_client.publish(subject, subject)
        assert got.get(timeout=PATIENCE) == subject.encode()
    assert [handle.queue for handle in natsync_subscriber.handles] == [None, None]


def test_a_recorded_subscription_ends_with_its_context(
    natsync_client: natsync.Client, natsync_subscriber: natsync.Subscriber
) -> None:
    ctx, over = natsync.Context(), natsync.Context()
    natsync_subscriber.subscribe("u.plain.kept", ctx=ctx)(lambda message: None)
    natsync_subscriber.subscribe("u.plain.over", ctx=over)(lambda message: None)
    over.cancel("before open()")
    natsync_subscriber.open()
    (handle,) = natsync_subscriber.handles
    assert handle.subject == "u.plain.kept"
    ctx.cancel("enough")
    assert handle.wait(PATIENCE)
    with pytest.raises(natsync.Cancelled):
        natsync_subscriber.subscribe("u.plain.late", ctx=over)


def test_stream_subscribe_opens_the_subscriber_and_is_live_when_it_returns(
    client: natsync.Client, natsync_subscriber: natsync.Subscriber
) -> None:
    natsync_subscriber.stream("u.recorded")(lambda ctx, request: [b"recorded"])
    natsync_subscriber.stream_subscribe("u.opens", lambda ctx, request: [b"1"])
    assert natsync_subscriber.status == "connected"
    assert list(client.stream("u.opens")) == [b"1"]
    assert list(client.stream("u.recorded")) == [b"recorded"]


def test_open_is_idempotent(client: natsync.Client, natsync_subscriber: natsync.Subscriber) -> None:
    natsync_subscriber.stream("u.twice")(lambda ctx, request: [b"1"])
    assert natsync_subscriber.open() is natsync_subscriber.open()
    assert list(client.stream("u.twice")) == [b"1"]
    assert len(natsync_subscriber.handles) == 1


def test_decorators_return_the_function_unchanged(natsync_subscriber: natsync.Subscriber) -> None:
    def stream(ctx: natsync.Context, request: natsync.Message) -> list[bytes]:
        return []

    assert natsync_subscriber.stream("u.x")(stream) is stream
    assert natsync_subscriber.handler("u.y")(stream) is stream


def test_open_without_a_server_raises_and_keeps_what_was_recorded(
    make_nats_server: Make,
) -> None:
    server = make_nats_server()
    server.kill()
    subscriber = natsync.Subscriber(server.url, connect_timeout=PATIENCE)
    subscriber.stream("u.kept")(lambda ctx, request: [b"1"])
    with pytest.raises(natsync.NoServersError):
        subscriber.open()
    subscriber.stream("u.later")(lambda ctx, request: [b"2"])  # not open: only recorded
    server.start()
    with subscriber, natsync.connect(server.url) as client:
        assert list(client.stream("u.kept")) == [b"1"]
        assert list(client.stream("u.later")) == [b"2"]


def test_a_closed_subscriber_takes_no_handlers(natsync_subscriber: natsync.Subscriber) -> None:
    natsync_subscriber.open().close()
    with pytest.raises(natsync.ConnectionClosed):
        natsync_subscriber.stream("u.x")(lambda ctx, request: [])
    with pytest.raises(natsync.ConnectionClosed):
        natsync_subscriber.stream_subscribe("u.x", lambda ctx, request: [])
    with pytest.raises(natsync.ConnectionClosed):
        natsync_subscriber.open()


def test_a_context_that_has_ended_registers_nothing(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    ctx = natsync.Context()
    ctx.cancel("before")
    with pytest.raises(natsync.Cancelled):
        subscriber.stream_subscribe("u.ended", lambda ctx, request: [], ctx=ctx)
    assert subscriber.handles == []
    assert not answers(client, "u.ended")


def no_arguments() -> None: ...
def one(request: natsync.Message) -> None: ...
def two(ctx: natsync.Context, request: natsync.Message) -> None: ...
def three(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None: ...
def four(ctx: object, request: object, sender: object, more: object) -> None: ...
def keyword(ctx: object, request: object, *, wanted: object) -> None: ...


class Methods:
    def two(self, ctx: object, request: object) -> list[bytes]:
        return [b"method"]

    def __call__(self, ctx: object, request: object) -> list[bytes]:
        return [b"callable"]


WRONG = [
    ("stream_subscribe", no_arguments), ("stream_subscribe", one), ("stream_subscribe", four),
    ("stream_subscribe", keyword), ("stream_subscribe", None), ("stream_subscribe", "text"),
    ("batch_stream_subscribe", one), ("batch_stream_subscribe", four),
    ("legacy_stream_subscribe", one), ("legacy_stream_subscribe", three),
    ("subscribe", two), ("subscribe", no_arguments), ("subscribe", 5),
    ("stream", one), ("stream", four), ("stream", None),
    ("handler", one), ("handler", three), ("handler", None),
    ("recording", two), ("recording", None),
]  # fmt: skip


def test_what_a_decorator_takes_counts_where_it_is_not_what_it_decorates(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    """As mock.patch() and those that give a function its database do."""

    def injecting(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(function)(lambda *given: function(*given, "injected"))

    def strictly_injecting(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(function)(lambda message: function(message, "injected"))

    got: list[tuple[bytes, str]] = []
    for inject in (injecting, strictly_injecting):
        client.subscribe("u.injected", inject(lambda message, what: got.append((message.data, what))))
        subscriber.subscribe("u.injected", inject(lambda message, what: got.append((message.data, what))))
    client.publish("u.injected", b"x")
    eventually(lambda: got == [(b"x", "injected")] * 4)


@pytest.mark.parametrize("form", ["handler", "stream"])
def test_details_of_other_libraries_errors_stay_here(
    client: natsync.Client, subscriber: natsync.Subscriber, form: str
) -> None:
    class Theirs(Exception):
        details = "a document of their server"

    class Raising(Exception):
        @property
        def details(self) -> object:
            raise KeyError("no details")

    for kind in (Theirs, Raising):

        def handler(ctx: natsync.Context, request: natsync.Message, kind: type[Exception] = kind) -> bytes:
            raise kind("boom")

        getattr(subscriber, form)(f"u.{kind.__name__}")(handler)
        with pytest.raises(natsync.HandlerError, match="boom") as caught:
            if form == "handler":
                client.request(f"u.{kind.__name__}", timeout=PATIENCE)
            else:
                list(client.stream(f"u.{kind.__name__}", timeout=PATIENCE))
        assert not caught.value.details


@pytest.mark.parametrize(("form", "function"), WRONG, ids=lambda value: getattr(value, "__name__", repr(value)))
def test_a_handler_of_the_wrong_form_is_refused_at_registration(form: str, function: object) -> None:
    with RecordingServer() as server:
        subscriber = natsync.Subscriber(server.url)
        register = getattr(subscriber, "subscribe" if form == "recording" else form)
        decorates = form in ("stream", "handler", "recording")
        with pytest.raises(TypeError, match=r"\(.*(message|request).*\)"):
            register("u.x")(function) if decorates else register("u.x", function)
        assert server.accepted == 0
        assert subscriber.handles == []


@pytest.mark.parametrize(("function", "chunk"), [(Methods().two, b"method"), (Methods(), b"callable")])
def test_methods_and_callable_objects_are_handlers(
    client: natsync.Client, subscriber: natsync.Subscriber, function: Callable[..., list[bytes]], chunk: bytes
) -> None:
    subscriber.stream_subscribe("u.forms", function)
    assert list(client.stream("u.forms")) == [chunk]


def test_a_function_of_any_number_of_arguments_gets_the_sender(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    def handler(*args: object) -> None:
        sender = args[-1]
        assert isinstance(sender, natsync.ResponseSender)
        sender.send(b"%d" % len(args))
        sender.end()

    subscriber.stream_subscribe("u.star", handler)
    assert list(client.stream("u.star")) == [b"3"]


@pytest.mark.parametrize("subject", ["", "a b", "a..b", ".a", "a.", "a\r\nPUB b 0", "a.>.b"], ids=repr)
@pytest.mark.parametrize("form", ["stream_subscribe", "subscribe", "stream", "handler"])
def test_a_bad_subject_is_refused_before_anything_is_sent(form: str, subject: str) -> None:
    handler = (lambda message: None) if form == "subscribe" else (lambda ctx, request: [])
    with RecordingServer() as server:
        subscriber = natsync.Subscriber(server.url)
        register = getattr(subscriber, form)
        with pytest.raises(natsync.InvalidArgument):
            register(subject)(handler) if form in ("stream", "handler") else register(subject, handler)
        assert not [sub for sub in server.subs if not sub.subject.startswith(b"_INBOX.")]
        subscriber.close()


@pytest.mark.parametrize("form", ["stream", "handler", "subscribe"])
def test_a_decorator_without_parentheses_is_refused(form: str) -> None:
    decorator = getattr(natsync.Subscriber(), form)
    with pytest.raises(TypeError, match=rf'write @subscriber\.{form}\("subject"\)'):

        @decorator
        def function(*arguments: object) -> None: ...

    for subject, error in ((None, TypeError), (b"u.x", TypeError), ("a b", natsync.InvalidArgument)):
        with pytest.raises(error, match="subject"):
            decorator(subject)


def test_an_overflow_that_has_nobody_to_raise_to_is_refused() -> None:
    with RecordingServer() as server:
        subscriber = natsync.Subscriber(server.url)
        for handler in (None, lambda message: None):
            with pytest.raises(natsync.InvalidArgument, match="overflow='error'"):
                subscriber.subscribe("u.x", handler, overflow="error")  # type: ignore[arg-type]
        assert server.accepted == 0


def test_a_bad_queue_name_is_refused(natsync_subscriber: natsync.Subscriber) -> None:
    for queue in ("", "a b", "q\r\n"):
        with pytest.raises(natsync.InvalidArgument):
            natsync_subscriber.stream("u.x", queue=queue)(lambda ctx, request: [])


def test_handlers_on_wildcards_see_the_subject_of_the_request(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    subscriber.stream_subscribe("u.*.wild.>", lambda ctx, request: [request.subject])
    assert list(client.stream("u.a.wild.b.c")) == [b"u.a.wild.b.c"]


# -- queue groups --------------------------------------------------------------------------------------------------


def test_two_subscribers_in_a_queue_group_share_requests(client: natsync.Client, nats_server: NatsServer) -> None:
    with natsync.Subscriber(nats_server.url) as one, natsync.Subscriber(nats_server.url) as two:
        for name, each in (("one", one), ("two", two)):
            each.handler("u.shared", queue="g")(lambda ctx, request, name=name: name)
        seen = [client.request("u.shared").text() for _ in range(60)]
    assert set(seen) == {"one", "two"}


def test_work_goes_on_at_the_other_member_when_one_is_closed(client: natsync.Client, nats_server: NatsServer) -> None:
    with natsync.Subscriber(nats_server.url) as one, natsync.Subscriber(nats_server.url) as two:
        for each in (one, two):
            each.stream_subscribe("u.member", lambda ctx, request: [b"x"], queue="g")
        one.close()
        for _ in range(20):
            assert list(client.stream("u.member", timeout=PATIENCE)) == [b"x"]


# -- handles -------------------------------------------------------------------------------------------------------


def test_stop_waits_for_requests_under_way_and_takes_no_new_ones(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    gate = Gate()
    handle = subscriber.stream_subscribe("u.stop", gate.handler)
    stream = client.stream("u.stop")
    gate.wait_entered()
    with ThreadPoolExecutor() as pool:
        stopping = pool.submit(handle.stop)
        assert handle.wait(PATIENCE)
        assert not answers(client, "u.stop")
        assert not stopping.done()
        gate.open()
        stopping.result(PATIENCE)
    assert list(stream) == [b"first", b"last"]


def test_stop_cancels_what_lasts_longer_than_its_timeout(
    client: natsync.Client, subscriber: natsync.Subscriber, mode: str
) -> None:
    gate = Gate()
    handle = subscriber.stream_subscribe("u.stop", gate.handler)
    stream = client.stream("u.stop")
    gate.wait_entered()
    begin = time.monotonic()
    handle.stop(timeout=0.1)
    assert 0.09 <= time.monotonic() - begin < 8
    assert stream.next(PATIENCE) == b"first"
    with pytest.raises(natsync.ServerLost, match="stopped"):
        stream.next(PATIENCE)
    eventually(lambda: len(gate.reasons) == 1)


@pytest.mark.parametrize("where", ["without waiting", "in a handler"])
def test_requests_on_their_way_when_a_registration_is_stopped_are_answered(
    client: natsync.Client, subscriber: natsync.Subscriber, where: str
) -> None:
    """Also where stop() may not wait for them: by the handler while its registration lasts, or with an error."""
    started = threading.Event()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        if not started.is_set():
            started.set()
            if where == "in a handler":
                handle.stop()
        yield b"chunk"

    for _ in range(10):
        started.clear()
        handle = subscriber.stream_subscribe("u.stop", handler)
        streams = list[natsync.Stream]()
        for number in range(60):
            with contextlib.suppress(natsync.NoRespondersError):
                streams.append(client.stream("u.stop", timeout=PATIENCE))
            if number == 30 and where == "without waiting":
                handle.stop(0)
        for stream in streams:
            with contextlib.suppress(natsync.ServerLost, natsync.StreamRefused, natsync.NoRespondersError):
                assert list(stream) == [b"chunk"]
        assert handle.wait(PATIENCE)
        eventually(lambda one=handle: one.idle)  # type: ignore[misc]
        stats = handle.stats
        assert stats["received"] == stats["processed"] + stats["failed"] + stats["cancelled"] + stats["dropped"]


def test_stop_with_timeout_0_does_not_wait(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    gate = Gate()
    handle = subscriber.stream_subscribe("u.stop", gate.handler)
    with client.stream("u.stop"):
        gate.wait_entered()
        begin = time.monotonic()
        handle.stop(timeout=0)
        assert time.monotonic() - begin < 5
        assert handle.stopped
        eventually(lambda: gate.reasons)


def test_stop_is_idempotent_and_works_from_its_own_handler(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    handles: list[natsync.Handle] = []

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"stopping"
        handles[0].stop()
        handles[0].stop()
        yield b"stopped"

    handles.append(subscriber.stream_subscribe("u.self", handler))
    assert list(client.stream("u.self", timeout=PATIENCE)) == [b"stopping", b"stopped"]
    assert handles[0].stopped
    assert not answers(client, "u.self")


def test_a_stopped_registration_is_forgotten_but_its_numbers_are_kept(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    handle = subscriber.stream_subscribe("u.numbers", lambda ctx, request: [b"x"])
    assert list(client.stream("u.numbers")) == [b"x"]
    handle.stop()
    assert subscriber.handles == []
    assert (subscriber.stats()["received"], subscriber.stats()["processed"]) == (1, 1)


def test_stats_of_a_handle_count_by_outcome(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    gate = Gate()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        if request.data == b"fail":
            raise ValueError("as told")
        if request.data == b"wait":
            yield from gate.handler(ctx, request)
        yield b"x"

    handle = subscriber.stream_subscribe("u.stats", handler)
    list(client.stream("u.stats"))
    with pytest.raises(natsync.HandlerError):
        list(client.stream("u.stats", b"fail"))
    stream = client.stream("u.stats", b"wait")
    gate.wait_entered()
    eventually(lambda: handle.stats["processed"] + handle.stats["failed"] == 2)
    assert handle.stats == {"received": 3, "processed": 1, "failed": 1, "cancelled": 0, "dropped": 0, "active": 1}
    stream.cancel()
    eventually(lambda: handle.stats["active"] == 0)
    assert handle.stats == {"received": 3, "processed": 1, "failed": 1, "cancelled": 1, "dropped": 0, "active": 0}


# -- bounds --------------------------------------------------------------------------------------------------------


@framed_only
def test_one_stream_too_many_is_refused_at_once_and_typed(client: natsync.Client, nats_server: NatsServer) -> None:
    gate = Gate()
    with natsync.Subscriber(nats_server.url, max_streams=2) as subscriber:
        handle = subscriber.stream_subscribe("u.full", gate.handler)
        streams = [client.stream("u.full") for _ in range(2)]
        for _ in streams:
            gate.wait_entered()
        with pytest.raises(natsync.StreamRefused, match="2") as caught:
            next(client.stream("u.full"))
        assert caught.value.code == natsync.Code.RESOURCE_EXHAUSTED
        assert caught.value.retry_after is not None
        assert handle.stats["dropped"] == 1
        gate.open()
        assert [list(stream) for stream in streams] == [[b"first", b"last"]] * 2
        assert list(client.stream("u.full")) == [b"first", b"last"]


def test_a_plain_requester_is_refused_by_an_error_message(raw: RawClient, nats_server: NatsServer) -> None:
    gate = Gate()
    with natsync.Subscriber(nats_server.url, max_streams=1) as subscriber:
        subscriber.stream_subscribe("u.full", gate.handler)
        raw.request("u.full")
        gate.wait_entered()
        assert raw.next().payload == b"first"
        sid = raw.request("u.full")
        refusal = raw.next()
        assert refusal.sid == sid
        assert refusal.payload.startswith(ERROR + b"too many streams")
        gate.open()
        assert raw.stream()[-1].payload == END


def test_a_slot_is_free_before_the_end_is_sent(client: natsync.Client, nats_server: NatsServer) -> None:
    with natsync.Subscriber(nats_server.url, max_streams=1) as subscriber:
        subscriber.stream_subscribe("u.slot", lambda ctx, request: [b"x"])
        assert subscriber._responder is not None
        subscriber._responder._pool.limit = 50  # a thread may be late to leave: this is about slots
        for _ in range(300):
            assert list(client.stream("u.slot", timeout=PATIENCE)) == [b"x"]


@framed_only
def test_a_refused_stream_succeeds_with_retry_once_there_is_room(
    client: natsync.Client, nats_server: NatsServer
) -> None:
    gate = Gate()
    with natsync.Subscriber(nats_server.url, max_streams=1) as subscriber:
        handle = subscriber.stream_subscribe("u.retry", gate.handler)
        first = client.stream("u.retry")
        gate.wait_entered()
        with ThreadPoolExecutor() as pool:
            retry = natsync.Retry(attempts=None, initial=0.02, maximum=0.02)
            second = pool.submit(lambda: list(client.stream("u.retry", timeout=PATIENCE, retry=retry)))
            eventually(lambda: handle.stats["dropped"] >= 1)
            gate.open()
            assert second.result(PATIENCE) == [b"first", b"last"]
        assert list(first) == [b"first", b"last"]


def test_max_workers_bounds_the_threads_of_requests_and_the_rest_waits(
    client: natsync.Client, nats_server: NatsServer
) -> None:
    running: list[int] = []
    most: list[int] = []
    lock = threading.Lock()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
        with lock:
            running.append(1)
            most.append(len(running))
        ctx.wait(0.01)
        with lock:
            running.pop()
        return request.data

    with natsync.Subscriber(nats_server.url, max_workers=4) as subscriber:
        subscriber.handler("u.workers")(handler)
        with ThreadPoolExecutor(24) as pool:
            replies = list(pool.map(lambda n: client.request("u.workers", b"%d" % n, timeout=30).data, range(72)))
        assert replies == [b"%d" % n for n in range(72)]
        assert max(most) == 4
        assert subscriber.stats()["threads"] <= 4


def test_long_streams_take_no_worker_from_requests(client: natsync.Client, nats_server: NatsServer) -> None:
    gate = Gate()
    with natsync.Subscriber(nats_server.url, max_workers=1) as subscriber:
        subscriber.stream_subscribe("u.long", gate.handler)
        subscriber.handler("u.short")(lambda ctx, request: b"here")
        streams = [client.stream("u.long") for _ in range(3)]
        for _ in streams:
            gate.wait_entered()
        assert client.request("u.short").data == b"here"
        gate.open()
        assert [len(list(stream)) for stream in streams] == [2, 2, 2]


# -- requests and replies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (b"bytes", b"bytes"),
        (bytearray(b"ba"), b"ba"),
        ("tëxt", "tëxt".encode()),
        (None, b""),
        ({"a": [1, "ü"]}, '{"a":[1,"ü"]}'.encode()),
        ([1, 2], b"[1,2]"),
        (5, b"5"),
        (True, b"true"),
        ("", b""),
    ],
    ids=repr,
)
def test_what_a_handler_returns_is_the_reply(
    client: natsync.Client, subscriber: natsync.Subscriber, value: object, data: bytes
) -> None:
    subscriber.handler("u.reply")(lambda ctx, request: value)
    assert client.request("u.reply").data == data


def test_a_handler_sees_payload_headers_and_subject(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    @subscriber.handler("u.add")
    def add(ctx: natsync.HandlerContext, request: natsync.Message) -> object:
        return {
            "sum": request.json()["a"] + request.json()["b"],
            "user": ctx.metadata["User"],
            "subject": request.subject,
        }

    reply = client.request("u.add", json={"a": 2, "b": 3}, headers={"User": "ada"})
    assert reply.json() == {"sum": 5, "user": "ada", "subject": "u.add"}


def test_a_handlers_exception_is_a_handler_error_at_the_client_and_logged(
    client: natsync.Client, subscriber: natsync.Subscriber, caplog: pytest.LogCaptureFixture
) -> None:
    subscriber.handler("u.fail")(lambda ctx, request: 1 // 0)
    with pytest.raises(natsync.HandlerError, match="division") as caught:
        client.request("u.fail")
    assert caught.value.code == 500
    eventually(lambda: "Traceback" in caplog.text)


def test_a_handlers_exception_is_service_error_headers_on_the_wire(
    raw: RawClient, subscriber: natsync.Subscriber
) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> None:
        raise ValueError("two\r\nlines")

    subscriber.handler("u.fail")(handler)
    raw.request("u.fail")
    reply = raw.next()
    assert reply.payload == b""
    assert reply.block == (b"NATS/1.0\r\nNats-Service-Error: two lines\r\nNats-Service-Error-Code: 500\r\n\r\n")


def test_a_handlers_exception_whose_text_is_a_mere_value_goes_with_its_type(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    subscriber.handler("u.key")(lambda ctx, request: request.json()["name"])
    with pytest.raises(natsync.HandlerError) as caught:
        client.request("u.key", json={})
    assert caught.value.message == "KeyError: 'name'"
    (handle,) = subscriber.handles
    assert eventually(lambda: handle.last_error) == "KeyError: 'name'"


@pytest.mark.parametrize("details", [{"id": 3, "name": "ü\n"}, ["a"], "text", 0, False], ids=repr)
def test_the_details_of_a_raised_error_reach_the_client(
    client: natsync.Client, subscriber: natsync.Subscriber, details: object
) -> None:
    @subscriber.handler("u.details")
    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> None:
        raise natsync.HandlerError("no such user", code=natsync.Code.NOT_FOUND, details=details)

    with pytest.raises(natsync.HandlerError) as caught:
        client.request("u.details")
    error = caught.value
    assert (error.message, error.code, error.details) == ("no such user", natsync.Code.NOT_FOUND, details)


@pytest.mark.parametrize(
    ("details", "told"),
    [("x" * (2 << 20), None), (None, None), ({1, 2}, "{1, 2}")],
    ids=["too large", "none", "no JSON"],
)
def test_an_error_reply_does_not_get_lost_over_its_details(
    client: natsync.Client, subscriber: natsync.Subscriber, details: object, told: object
) -> None:
    @subscriber.handler("u.details")
    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> None:
        raise natsync.HandlerError("too much to tell", details=details)

    with pytest.raises(natsync.HandlerError, match="too much to tell") as caught:
        client.request("u.details")
    assert caught.value.details == told


@pytest.mark.parametrize(
    ("header", "payload", "details"),
    [
        (b"", b"", None),
        (b"", b"more", b"more"),
        (b"Natsync-Details: [1]\r\n", b"more", [1]),
        (b"Natsync-Details: no {json\r\n", b"", "no {json"),
    ],
    ids=["none", "payload", "header", "no JSON"],
)
def test_the_details_of_an_error_reply_are_its_header_or_its_payload(
    client: natsync.Client, raw: RawClient, header: bytes, payload: bytes, details: object
) -> None:
    raw.subscribe("u.raw")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.request, "u.raw")
        raw.publish(raw.next().reply, payload, block=b"NATS/1.0\r\nNats-Service-Error: no\r\n" + header + b"\r\n")
        with pytest.raises(natsync.HandlerError) as caught:
            asked.result(PATIENCE)
    assert caught.value.details == details


def test_a_value_without_a_json_form_is_a_handler_error(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    subscriber.handler("u.object")(lambda ctx, request: object())
    with pytest.raises(natsync.HandlerError, match="JSON"):
        client.request("u.object")


def test_a_reply_beyond_max_payload_is_a_handler_error(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    subscriber.handler("u.large")(lambda ctx, request: b"x" * (2 << 20))
    with pytest.raises(natsync.HandlerError, match="max_payload"):
        client.request("u.large")


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_a_handler_that_wants_to_exit_is_answered_and_the_next_request_works(
    client: natsync.Client, subscriber: natsync.Subscriber, error: BaseException
) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
        if request.data:
            raise error
        return b"still here"

    subscriber.handler("u.exit")(handler)
    with pytest.raises(natsync.HandlerError):
        client.request("u.exit", b"exit")
    assert client.request("u.exit").data == b"still here"


def test_a_plain_message_handler_that_wants_to_exit_does_not_end_the_subscription(
    client: natsync.Client, subscriber: natsync.Subscriber, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[bytes] = []

    def handler(message: natsync.Message) -> None:
        if message.data == b"exit":
            raise SystemExit(1)
        if message.data == b"fail":
            raise ValueError("as told")
        seen.append(message.data)

    handle = subscriber.subscribe("u.plain", handler)
    for data in (b"1", b"exit", b"2", b"fail", b"3"):
        client.publish("u.plain", data)
    eventually(lambda: seen == [b"1", b"2", b"3"])
    eventually(lambda: handle.stats["failed"] == 2)
    eventually(lambda: "as told" in caplog.text)


def test_a_request_on_a_stream_subject_gets_its_first_chunk_its_end_or_its_error(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    @subscriber.stream("u.pieces")
    def pieces(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield from request.data.split()
        if request.headers.get("Fails"):
            raise RuntimeError("database down")

    assert client.request("u.pieces", b"1 2").data == b"1"
    assert client.request("u.pieces", b"").data == END
    assert client.request("u.pieces", b"1", headers={"Fails": "yes"}).data == b"1"
    with pytest.raises(natsync.HandlerError) as caught:
        client.request("u.pieces", headers={"Fails": "yes"})
    assert caught.value.message == "database down"
    found = client.request_many("u.pieces", headers={"Fails": "yes"}, timeout=PATIENCE, max_messages=1)
    assert [message.data for message in found] == [ERROR + b"database down"]  # an error is one reply among others


@pytest.mark.parametrize(
    "headers", [b"", b"NATS/1.0\r\nNats-Service-Error-Code: 404\r\n\r\n"], ids=["bare", "with a code"]
)
def test_a_requests_own_sentinels_say_what_a_streams_error_is(
    nats_server: NatsServer, raw: RawClient, headers: bytes
) -> None:
    raw.subscribe("u.raw")
    for sentinels in (natsync.Sentinels.EMPTY, natsync.Sentinels(end=b"<eos>", error_prefix=b"<err>")):
        with natsync.Client(nats_server.url, sentinels=sentinels) as client, ThreadPoolExecutor(1) as pool:
            for payload in (ERROR + b"no", b"<err>no", b"<err", b"", END):
                asked = pool.submit(client.request, "u.raw")
                raw.publish(raw.next().reply, payload, block=headers or None)
                if payload.startswith(sentinels.error_prefix):
                    with pytest.raises(natsync.HandlerError) as caught:
                        asked.result(PATIENCE)
                    assert caught.value.message == "no"
                    assert caught.value.code == (404 if headers else natsync.Code.UNKNOWN)
                else:
                    assert asked.result(PATIENCE).data == payload


def test_a_handler_may_ask_another_handler_of_the_same_subscriber(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    subscriber.handler("u.inner")(lambda ctx, request: request.data * 2)

    @subscriber.handler("u.outer")
    def outer(ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
        return client.request("u.inner", request.data, ctx=ctx).data + b"!"

    @subscriber.stream("u.outer.stream")
    def outer_stream(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield client.request("u.inner", b"1", ctx=ctx).data
        yield from client.stream("u.inner.stream", ctx=ctx)

    subscriber.stream("u.inner.stream")(lambda ctx, request: [b"a", b"b"])
    assert client.request("u.outer", b"ab").data == b"abab!"
    assert list(client.stream("u.outer.stream", timeout=PATIENCE)) == [b"11", b"a", b"b"]


def test_each_try_tells_how_much_time_there_is_left(client: natsync.Client, raw: RawClient) -> None:
    raw.subscribe("u.raw")
    told: list[int] = []

    def ask() -> bytes:
        with natsync.Context().with_timeout(PATIENCE) as ctx:
            policy = natsync.Retry(attempts=3, initial=0.001)
            return client.request("u.raw", headers={"A": iter(["1", "2"])}, retry=policy, ctx=ctx).data

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        for attempt in range(3):
            request = raw.next()
            headers = decode(request.block or b"")
            assert headers.get_all("A") == ["1", "2"]
            told.append(int(headers["Natsync-Timeout"]))
            if attempt < 2:
                threading.Event().wait(0.2)
                full = b"NATS/1.0\r\nNats-Service-Error: full\r\nNats-Service-Error-Code: 429\r\n\r\n"
                raw.publish(request.reply, block=full)
        raw.publish(request.reply, b"fine")
        assert asked.result(PATIENCE) == b"fine"
    assert told[0] <= PATIENCE * 1000
    assert told[0] - told[1] >= 199  # each is rounded up to a millisecond
    assert told[1] - told[2] >= 199


def test_a_nested_request_ends_with_its_handlers_context(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    gate = Gate()
    outcome: list[BaseException] = []

    def outer(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"first"
        try:
            yield from client.stream("u.nested", ctx=ctx)
        except natsync.NatsError as error:
            outcome.append(error)
            raise

    subscriber.stream_subscribe("u.nested", gate.handler)
    subscriber.stream_subscribe("u.nesting", outer)
    stream = client.stream("u.nesting")
    gate.wait_entered()
    assert [stream.next(PATIENCE), stream.next(PATIENCE)] == [b"first", b"first"]
    stream.cancel("all of it")
    eventually(lambda: outcome)
    assert isinstance(outcome[0], natsync.StreamCancelled)
    eventually(lambda: gate.reasons)


# -- stopping everything -------------------------------------------------------------------------------------------


def test_close_lets_streams_under_way_finish_and_takes_no_new_ones(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    gate = Gate()
    subscriber.stream_subscribe("u.close", gate.handler)
    stream = client.stream("u.close")
    gate.wait_entered()
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(subscriber.close)
        eventually(lambda: not answers(client, "u.close"))
        assert not closing.done()
        gate.open()
        closing.result(PATIENCE)
    assert list(stream) == [b"first", b"last"]
    assert subscriber.status == "closed"


def test_close_serves_what_was_on_its_way(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    subscriber.stream_subscribe("u.onway", lambda ctx, request: [request.data])
    subscriber.handler("u.onway.reply")(lambda ctx, request: request.data)
    streams = [client.stream("u.onway", b"%d" % n, timeout=PATIENCE) for n in range(50)]
    client.flush()
    subscriber.close()
    assert [list(stream) for stream in streams] == [[b"%d" % n] for n in range(50)]


def test_pings_are_answered_while_close_waits(make_nats_server: Make) -> None:
    # A client that answers no PING is cut off by this server within three seconds.
    server = make_nats_server(config='ping_interval: "500ms"\nping_max: 4\n')
    gate = Gate()
    with natsync.connect(server.url) as client, natsync.Subscriber(server.url) as subscriber:
        subscriber.stream_subscribe("u.ping", gate.handler)
        stream = client.stream("u.ping")
        gate.wait_entered()
        timer = threading.Timer(4.5, gate.open)
        timer.start()
        subscriber.close()
        timer.join()
        assert list(stream) == [b"first", b"last"]
        assert client.stats()["reconnects"] == 0


def test_close_cancels_what_lasts_longer_than_its_timeout_and_the_requester_is_told(
    client: natsync.Client, subscriber: natsync.Subscriber, mode: str
) -> None:
    gate = Gate()
    subscriber.stream_subscribe("u.close", gate.handler)
    stream = client.stream("u.close")
    gate.wait_entered()
    begin = time.monotonic()
    subscriber.close(timeout=0.2)
    assert 0.19 <= time.monotonic() - begin < 8
    eventually(lambda: len(gate.reasons) == 1)
    assert stream.next(PATIENCE) == b"first"
    with pytest.raises(natsync.ServerLost, match="shutting down"):
        stream.next(PATIENCE)


def test_close_returns_although_a_handler_never_does(
    client: natsync.Client, subscriber: natsync.Subscriber, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    stuck, entered = threading.Event(), threading.Event()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> list[bytes]:
        entered.set()
        stuck.wait(3 * PATIENCE)
        return []

    subscriber.stream_subscribe("u.stuck", handler)
    stream = client.stream("u.stuck")
    assert entered.wait(PATIENCE)
    begin = time.monotonic()
    subscriber.close(timeout=0.1)
    assert time.monotonic() - begin < 15
    assert "u.stuck" in caplog.text
    with pytest.raises(natsync.ServerLost):
        stream.next(PATIENCE)
    stuck.set()


def test_close_does_not_wait_for_a_link_that_is_down(make_nats_server: Make) -> None:
    server = make_nats_server()
    subscriber = natsync.Subscriber(server.url).open()
    for n in range(3):
        subscriber.stream_subscribe(f"u.down.{n}", lambda ctx, request: [])
    server.kill()
    eventually(lambda: subscriber.status == "reconnecting")
    begin = time.monotonic()
    subscriber.close(timeout=20)
    assert time.monotonic() - begin < 10


def test_close_is_idempotent_and_before_open_is_fine(nats_server: NatsServer) -> None:
    never = natsync.Subscriber(nats_server.url)
    never.close()
    never.close()
    subscriber = natsync.Subscriber(nats_server.url).open()
    subscriber.close()
    subscriber.close()
    assert (never.status, subscriber.status) == ("closed", "closed")


def test_drain_returns_once_all_is_done(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    gate = Gate()
    subscriber.stream_subscribe("u.drain", gate.handler)
    stream = client.stream("u.drain")
    gate.wait_entered()
    gate.open()
    subscriber.drain(PATIENCE)
    assert list(stream) == [b"first", b"last"]
    assert subscriber.status == "closed"


def test_drain_raises_drain_timeout_that_says_what_was_cancelled(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    gate = Gate()
    subscriber.stream_subscribe("u.drain", gate.handler)
    with client.stream("u.drain"):
        gate.wait_entered()
        with pytest.raises(natsync.DrainTimeout, match=r"u\.drain"):
            subscriber.drain(timeout=0.1)
    assert subscriber.status == "closed"


class Queue:
    """A request handler that waits, stubbornly or until its context ends, and requesters that queue up behind it."""

    def __init__(self, client: natsync.Client, subject: str, *, stubborn: bool = False) -> None:
        self.began: list[bytes] = []
        self.go = threading.Event()
        self.handling = threading.Semaphore(0)
        self._client = client
        self._subject = subject
        self.stubborn = stubborn
        self.leaving: Callable[[], object] = lambda: None  # called by a handler whose context has ended
        self._pool = ThreadPoolExecutor(16)

    def handler(self, ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
        self.began.append(request.data)
        self.handling.release()
        if self.stubborn:
            self.go.wait(PATIENCE)
        else:
            ctx.wait(PATIENCE)
            self.leaving()
        return b"answer"

    def ask(self, payload: bytes, **arguments: Any) -> Future[natsync.Message]:
        return self._pool.submit(self._client.request, self._subject, payload, timeout=PATIENCE, **arguments)


@pytest.fixture
def queue(client: natsync.Client, nats_server: NatsServer) -> Iterator[tuple[Queue, natsync.Subscriber]]:
    """One request is being handled by a handler that heeds its context, and four wait."""
    with natsync.Subscriber(nats_server.url, max_workers=1) as subscriber:
        queue = Queue(client, "u.queue")
        subscriber.handler("u.queue")(queue.handler)
        yield queue, subscriber


def fill(queue: Queue, subscriber: natsync.Subscriber) -> list[Future[natsync.Message]]:
    answers = [queue.ask(b"first")]
    assert queue.handling.acquire(timeout=PATIENCE)
    answers += [queue.ask(b"%d" % number) for number in range(4)]
    eventually(lambda: subscriber.handles[0]._core.pending == 4)
    return answers


def assert_turned_away(answers: list[Future[natsync.Message]], reason: str) -> None:
    for answer in answers:
        error = answer.exception(PATIENCE)
        assert isinstance(error, natsync.HandlerError)
        assert (error.code, reason in str(error)) == (429, True)


def test_requests_that_wait_when_the_time_to_drain_is_over_are_turned_away(
    queue: tuple[Queue, natsync.Subscriber],
) -> None:
    asked, subscriber = queue
    first, *others = fill(asked, subscriber)
    handle = subscriber.handles[0]
    asked.leaving = lambda: eventually(lambda: handle.stats["dropped"] == 4, PATIENCE)  # or it might take one of them
    with pytest.raises(natsync.DrainTimeout) as caught:
        subscriber.drain(0.1)
    assert caught.value.undone == ["5 requests on 'u.queue'"]
    assert first.result(PATIENCE).data == b"answer"  # it heeds its context, and there is time to leave
    assert_turned_away(others, "shutting down")
    assert asked.began == [b"first"]
    stats = subscriber.stats()
    assert [stats[name] for name in ("received", "processed", "dropped", "active")] == [5, 1, 4, 0]


def test_requests_that_wait_are_turned_away_at_once_also_while_the_handlers_go_on(
    client: natsync.Client, nats_server: NatsServer
) -> None:
    subscriber = natsync.Subscriber(nats_server.url, max_workers=1)
    asked = Queue(client, "u.stubborn", stubborn=True)
    subscriber.handler("u.stubborn")(asked.handler)
    subscriber.open()
    first, *others = fill(asked, subscriber)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(subscriber.close, 0.1)
        assert_turned_away(others, "shutting down")
        assert not first.done()
        asked.go.set()
        closing.result(PATIENCE)
    assert asked.began == [b"first"]


def test_what_waits_is_asked_for_elsewhere(queue: tuple[Queue, natsync.Subscriber], nats_server: NatsServer) -> None:
    asked, subscriber = queue
    with natsync.Subscriber(nats_server.url) as other:
        fill(asked, subscriber)
        waits = asked.ask(b"again", retry=natsync.Retry(initial=0.01, maximum=0.01))
        eventually(lambda: subscriber.handles[0]._core.pending == 5)
        other.handler("u.queue")(lambda ctx, request: b"from another")
        subscriber.close(0)
        assert waits.result(PATIENCE).data == b"from another"
    assert b"again" not in asked.began


def test_stop_turns_away_what_waits_when_its_time_is_over(queue: tuple[Queue, natsync.Subscriber]) -> None:
    asked, subscriber = queue
    _, *others = fill(asked, subscriber)
    subscriber.handles[0].stop(0.1)
    assert_turned_away(others, "")
    assert asked.began == [b"first"]


def pass_deadline() -> None:
    """The responder's own: it counts the seconds left from when the request has come."""
    natsync.Context().with_timeout(1.1).wait()


def test_a_request_whose_deadline_has_passed_before_its_turn_is_not_handled(
    queue: tuple[Queue, natsync.Subscriber],
) -> None:
    asked, subscriber = queue
    asked.stubborn = True
    with natsync.Context() as patient:
        first = asked.ask(b"first")
        assert asked.handling.acquire(timeout=PATIENCE)
        late = asked.ask(b"late", ctx=patient.with_timeout(1.0))
        assert isinstance(late.exception(PATIENCE), natsync.DeadlineExceeded)
        eventually(lambda: subscriber.handles[0]._core.pending == 1)
        pass_deadline()
        asked.go.set()
        assert first.result(PATIENCE).data == b"answer"
        eventually(lambda: subscriber.stats()["dropped"] == 1)
    assert asked.began == [b"first"]


def test_a_request_for_a_stream_whose_deadline_has_passed_before_its_turn_is_not_handled(
    queue: tuple[Queue, natsync.Subscriber], client: natsync.Client
) -> None:
    asked, subscriber = queue
    asked.stubborn = True
    first = asked.ask(b"first")
    assert asked.handling.acquire(timeout=PATIENCE)
    with pytest.raises(natsync.DeadlineExceeded):
        list(client.stream("u.queue", b"late", timeout=1.0))
    eventually(lambda: subscriber.handles[0]._core.pending == 1)
    pass_deadline()
    asked.go.set()
    assert first.result(PATIENCE).data == b"answer"
    eventually(lambda: subscriber.stats()["dropped"] == 1)
    assert asked.began == [b"first"]


def test_plain_messages_that_wait_when_the_time_to_drain_is_over_are_dropped_and_told_of(
    client: natsync.Client, nats_server: NatsServer
) -> None:
    subscriber = natsync.Subscriber(nats_server.url)
    handled: list[bytes] = []
    inside, go = threading.Event(), threading.Event()

    def handler(message: natsync.Message) -> None:
        handled.append(message.data)
        inside.set()
        go.wait(PATIENCE)

    handle = subscriber.subscribe("u.messages", handler)
    for number in range(6):
        client.publish("u.messages", b"%d" % number)
    assert inside.wait(PATIENCE)
    eventually(lambda: handle._core.pending == 5)

    def let_go() -> None:  # within the time that handlers get to leave
        eventually(lambda: handle._core.dropped == 5, PATIENCE)
        go.set()

    threading.Thread(target=let_go).start()
    with pytest.raises(natsync.DrainTimeout) as caught:
        subscriber.drain(0.1)
    assert caught.value.undone == ["6 messages on 'u.messages'"]
    assert handled == [b"0"]
    stats = subscriber.stats()
    assert [stats[name] for name in ("received", "processed", "dropped")] == [6, 1, 5]


def test_plain_messages_that_come_when_the_time_to_close_is_over_are_dropped(
    client: natsync.Client, make_fault_proxy: Callable[..., FaultProxy]
) -> None:
    proxy, handled = make_fault_proxy(), list[bytes]()
    subscriber = natsync.Subscriber(proxy.url)
    handle = subscriber.subscribe("u.late", lambda message: handled.append(message.data))
    client.publish("u.late", b"in time")
    eventually(lambda: handled == [b"in time"])
    proxy.down.stall()
    for _ in range(20):
        client.publish("u.late", b"late")
    client.flush()
    handle.stop(0)
    proxy.down.resume()
    eventually(lambda: handle.stats["dropped"] == 20)
    assert handled == [b"in time"]
    assert handle.stats["received"] == 21
    subscriber.close()


def test_a_handler_sees_that_it_should_finish_soon(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    entered = threading.Event()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        assert not ctx.draining
        yield b"first"
        entered.set()
        eventually(lambda: ctx.draining)
        yield b"finished early"

    subscriber.stream_subscribe("u.draining", handler)
    stream = client.stream("u.draining")
    assert entered.wait(PATIENCE)
    subscriber.close()
    assert list(stream) == [b"first", b"finished early"]


def test_close_from_a_stream_handler_does_not_deadlock_and_leaves_no_requester_waiting(
    client: natsync.Client, subscriber: natsync.Subscriber, mode: str
) -> None:
    gate, closed = Gate(), threading.Event()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"closing"
        subscriber.close(timeout=0.2)
        closed.set()
        yield b"closed"

    subscriber.stream_subscribe("u.other", gate.handler)
    subscriber.stream_subscribe("u.closer", handler)
    other = client.stream("u.other", timeout=20)
    gate.wait_entered()
    closer = client.stream("u.closer", timeout=20)
    assert closer.next() == b"closing"
    assert closed.wait(20)
    assert [type(end_of(stream)) for stream in (closer, other)] == [natsync.ServerLost] * 2
    eventually(lambda: subscriber.status == "closed")


def test_close_from_a_request_handler_does_not_deadlock(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    closed = threading.Event()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
        request.respond(b"closing")
        subscriber.close()
        closed.set()
        return b""

    subscriber.handler("u.closer")(handler)
    assert client.request("u.closer").data == b"closing"
    assert closed.wait(20)
    eventually(lambda: subscriber.status == "closed")


# -- serve_forever -------------------------------------------------------------------------------------------------


def test_serve_forever_off_the_main_thread_ends_with_stop(
    client: natsync.Client, natsync_subscriber: natsync.Subscriber
) -> None:
    natsync_subscriber.stream("u.serve")(lambda ctx, request: [b"x"])
    ready = threading.Event()
    with ThreadPoolExecutor() as pool:
        serving = pool.submit(natsync_subscriber.serve_forever, ready=ready.set)
        assert ready.wait(PATIENCE)
        assert list(client.stream("u.serve")) == [b"x"]
        natsync_subscriber.stop()
        assert serving.result(PATIENCE) is None
    assert natsync_subscriber.status == "closed"


def test_serve_forever_ends_with_close_from_another_thread(natsync_subscriber: natsync.Subscriber) -> None:
    ready = threading.Event()
    with ThreadPoolExecutor() as pool:
        serving = pool.submit(natsync_subscriber.serve_forever, ready=ready.set)
        assert ready.wait(PATIENCE)
        natsync_subscriber.close()
        assert serving.result(PATIENCE) is None


def test_serve_forever_gives_the_signal_handlers_back(natsync_subscriber: natsync.Subscriber) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    natsync_subscriber.serve_forever(ready=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert natsync_subscriber.status == "closed"


def test_serve_forever_without_a_server_raises(natsync_subscriber: natsync.Subscriber) -> None:
    subscriber = natsync.Subscriber("nats://127.0.0.1:1", connect_timeout=1)
    with pytest.raises(natsync.NoServersError):
        subscriber.serve_forever()


WORKER = """
import sys
import natsync

subscriber = natsync.Subscriber()

@subscriber.stream("u.worker")
def handler(ctx, request):
    yield b"first"
    while not (ctx.draining or ctx.cancelled):
        ctx.wait(0.005)
    print("draining", flush=True)
    if request.data == b"stubborn":
        ctx.wait(60)
        return
    yield b"last"

subscriber.serve_forever(ready=lambda: print("ready", flush=True), shutdown_timeout=float(sys.argv[1]))
print("served", flush=True)
"""

QUEUE_WORKER = """
import natsync

subscriber = natsync.Subscriber(max_workers=1)

@subscriber.handler("u.patient")
def handler(ctx, request):
    print("handling", flush=True)
    while not (ctx.draining or ctx.cancelled):
        ctx.wait(0.005)
    print("draining", flush=True)
    ctx.wait(60)
    return b"late"

subscriber.serve_forever(ready=lambda: print("ready", flush=True), shutdown_timeout=30)
"""


@pytest.fixture
def worker(nats_server: NatsServer) -> Iterator[Child]:
    """serve_forever() in a process of its own, with a stream under way that waits for the end."""
    with child(sys.executable, "-c", WORKER, "30", url=nats_server.url) as worker:
        worker.wait_for_out("ready")
        yield worker


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_lets_a_serving_process_finish_what_is_under_way_and_exit_0(
    client: natsync.Client, worker: Child, number: signal.Signals
) -> None:
    stream = client.stream("u.worker", timeout=30)
    assert stream.next() == b"first"
    worker.send(number)
    assert list(stream) == [b"last"]
    assert worker.wait() == 0
    assert worker.out[-1] == "served"
    assert [line for line in worker.err if "still running after close()" not in line] == []  # it ends, late perhaps


def test_a_second_signal_cancels_what_is_under_way(client: natsync.Client, worker: Child, mode: str) -> None:
    stream = client.stream("u.worker", b"stubborn", timeout=30)
    assert stream.next() == b"first"
    worker.send(signal.SIGTERM)
    worker.wait_for_out("draining")
    begin = time.monotonic()
    worker.send(signal.SIGTERM)
    with pytest.raises(natsync.ServerLost, match="at once"):
        next(stream)
    assert worker.wait() == 0
    assert time.monotonic() - begin < 20
    assert worker.out[-1] == "served"


def test_a_second_signal_turns_away_what_waits(client: natsync.Client, nats_server: NatsServer, mode: str) -> None:
    with child(sys.executable, "-c", QUEUE_WORKER, url=nats_server.url) as worker:
        worker.wait_for_out("ready")
        asked, before = Queue(client, "u.patient"), client.stats()["out_messages"]
        answers = [asked.ask(b"%d" % number) for number in range(4)]
        eventually(lambda: client.stats()["out_messages"] == before + 4)
        worker.wait_for_out("handling")
        client.flush()
        worker.send(signal.SIGTERM)
        worker.wait_for_out("draining")
        begin = time.monotonic()
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
        assert time.monotonic() - begin < 20
        assert worker.out.count("handling") == 1
        codes = [getattr(answer.exception(PATIENCE), "code", None) for answer in answers]
        assert sorted(codes, key=str) == [429, 429, 429, None]


def test_the_shutdown_timeout_cancels_what_is_under_way(
    client: natsync.Client, nats_server: NatsServer, mode: str
) -> None:
    with child(sys.executable, "-c", WORKER, "0.2", url=nats_server.url) as worker:
        worker.wait_for_out("ready")
        stream = client.stream("u.worker", b"stubborn", timeout=30)
        assert stream.next() == b"first"
        worker.send(signal.SIGTERM)
        with pytest.raises(natsync.ServerLost):
            next(stream)
        assert worker.wait() == 0


def test_a_request_on_its_way_when_the_context_ends_is_answered() -> None:
    answers: SimpleQueue[tuple[bytes, bytes]] = SimpleQueue()

    def serve(peer: Any) -> None:
        peer.handshake()
        while line := peer.recv_line():
            words = line.split()
            if words[0] == b"PING":
                peer.send(b"PONG\r\n")
            elif words[0] == b"UNSUB":  # the server had routed one more before it read this
                peer.send(b"MSG u.late %b _INBOX.asker 0\r\n\r\n" % words[1])
            elif words[0] == b"PUB":
                answers.put((words[1], peer.recv_exactly(int(words[-1]) + 2)))

    with ScriptedPeer(serve) as peer, natsync.Subscriber(peer.url) as subscriber:
        ctx = natsync.Context()
        handle = subscriber.stream_subscribe("u.late", lambda ctx, request: [b"x"], ctx=ctx)
        ctx.cancel("no more")
        subject, payload = answers.get(timeout=5)
        assert subject == b"_INBOX.asker"
        assert payload == b"__STREAM_ERROR__:no more\r\n"
        assert handle.wait(5)


def test_in_a_child_a_handle_waits_for_no_lock_that_the_parent_held(nats_server: NatsServer) -> None:
    with natsync.Subscriber(nats_server.url) as subscriber:
        handle = subscriber.subscribe("x", lambda message: None)
        held = [handle._stopped._plain, subscriber._close_done._plain]
        for lock in held:
            lock.acquire()
        try:
            subscriber_module._renew_in_child()  # what a fork calls in the child
            assert handle.wait(0) is False
            assert subscriber._close_done.wait(0) is False
        finally:
            for lock in held:
                lock.release()


def test_default_options_are_for_what_a_subscriber_leaves_open(nats_server: NatsServer) -> None:
    subscriber = natsync.Subscriber(nats_server.url, inbox_prefix="_MINE")
    subscriber.default_options(inbox_prefix="_OTHER", name="filled")
    with pytest.raises(TypeError, match="unknown option"):
        subscriber.default_options(nonsense=1)
    with subscriber:
        assert any(thread.name.startswith("natsync-filled-") for thread in threading.enumerate())
        with pytest.raises(RuntimeError, match="before open"):
            subscriber.default_options(ping_interval=7)
        subscriber.default_options(name="late")  # would not count anyway
