"""Hooks: each is called once, with the right values, on a thread that may run user code, and can harm nothing."""

from __future__ import annotations

import contextvars
import gc
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import natsync
from natsync import hooks as _hooks
from natsync.hooks import EVENTS, Watch, checked, fire, fire_event
from natsync.options import connect_options
from natsync.streaming.framed_sender import FramedSender
from natsync.streaming.plain_sender import PlainSender
from natsync.streaming.sender import SenderCore
from natsync.testing import NatsServer, PeerConnection, ScriptedPeer, eventually
from rawclient import END, PATIENCE, RawClient
from support import between_two_tries, framed_only, run_python

Make = Callable[..., NatsServer]
MakeClient = Callable[..., natsync.Client]
MakeSubscriber = Callable[..., natsync.Subscriber]

#: Every method of Hooks.
NAMES = sorted(name for name in vars(natsync.Hooks) if not name.startswith("_"))
#: Threads that never run user code.
LIBRARY_THREADS = ("-reader", "-writer", "-supervisor", "natsync-timer")


@dataclass
class Told:
    """One call of a hook."""

    event: str
    values: tuple[Any, ...]
    thread: str

    @property
    def exchange(self) -> natsync.Exchange:
        assert isinstance(self.values[0], natsync.Exchange)
        return self.values[0]


class Log:
    """What the hooks were told, in order."""

    def __init__(self) -> None:
        self.told: list[Told] = []

    def events(self) -> list[str]:
        return [one.event for one in self.told]

    def of(self, event: str) -> list[Told]:
        return [one for one in self.told if one.event == event]

    def one(self, event: str) -> Told:
        """The only call of this hook; waits for it."""
        eventually(lambda: self.of(event), PATIENCE, f"{event} was not told")
        (told,) = self.of(event)
        return told


def _recording(event: str) -> Callable[..., None]:
    def method(self: Log, *values: Any) -> None:
        self.told.append(Told(event, values, threading.current_thread().name))

    return method


Recorder: Any = type("Recorder", (Log, natsync.Hooks), {name: _recording(name) for name in NAMES})


def _raising(event: str) -> Callable[..., None]:
    def method(self: natsync.Hooks, *values: Any) -> None:
        raise RuntimeError(f"{event} failed on purpose")

    return method


Broken: Any = type("Broken", (natsync.Hooks,), {name: _raising(name) for name in NAMES})


@pytest.fixture
def log() -> Iterator[Log]:
    """Hooks that write down what they are told; at the end: never told on a thread of the library, never an inbox."""
    log: Log = Recorder()
    yield log
    assert not [one for one in log.told if any(name in one.thread for name in LIBRARY_THREADS)]
    assert not [one for one in log.told if "_INBOX" in repr([one.values, getattr(one.values[0], "destination", "")])]


@pytest.fixture
def make_client(nats_server: NatsServer, mode: str) -> Iterator[MakeClient]:
    clients: list[natsync.Client] = []

    def make(*servers: str, **options: Any) -> natsync.Client:
        options.setdefault("framed", mode == "framed")
        clients.append(natsync.Client(*(servers or (nats_server.url,)), **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(make_client: MakeClient, log: Log) -> natsync.Client:
    """A client that log watches."""
    return make_client(hooks=log)


@pytest.fixture
def plain(make_client: MakeClient) -> natsync.Client:
    """A client that nobody watches."""
    return make_client().open()


@pytest.fixture
def make_subscriber(nats_server: NatsServer) -> Iterator[MakeSubscriber]:
    subscribers: list[natsync.Subscriber] = []

    def make(**options: Any) -> natsync.Subscriber:
        subscribers.append(natsync.Subscriber(nats_server.url, **options))
        return subscribers[-1]

    yield make
    for subscriber in subscribers:
        subscriber.close(timeout=2)


@pytest.fixture
def watched(make_subscriber: MakeSubscriber, log: Log) -> natsync.Subscriber:
    """A subscriber that log watches."""
    return make_subscriber(hooks=log).open()


@pytest.fixture
def responder(natsync_subscriber: natsync.Subscriber) -> natsync.Subscriber:
    """A subscriber that nobody watches, with a few handlers."""
    subscriber = natsync_subscriber

    @subscriber.handler("hk.echo")
    def echo(ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
        return request.headers.get("Trace", "").encode() or request.data

    @subscriber.handler("hk.fail")
    def fail(ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
        raise ValueError("broken")

    @subscriber.stream("hk.count")
    def count(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        for number in range(int(request.data)):
            yield b"%d" % number

    @subscriber.stream("hk.break")
    def break_off(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"one"
        raise ValueError("broken")

    @subscriber.stream("hk.resume")
    def resume(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        for number in range(ctx.resume_cursor or 0, 5):
            if number == 3 and not ctx.attempt:
                raise ValueError("broken")
            yield b"%d" % number * 2
        ctx.wait(float(request.data or 0))

    @subscriber.stream("hk.wait")
    def wait(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"one"
        ctx.wait(PATIENCE)

    return subscriber.open()


@pytest.fixture
def raw(nats_server: NatsServer) -> Iterator[RawClient]:
    with RawClient(nats_server.url) as raw:
        yield raw


def here() -> str:
    return threading.current_thread().name


# -- the option --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hooks", [None, [], ()])
def test_no_hooks_and_an_empty_list_are_the_same(hooks: Any) -> None:
    assert connect_options({"hooks": hooks}).hooks is None


@pytest.mark.parametrize("form", [lambda one: one, lambda one: [one], lambda one: (one,)])
def test_hooks_are_an_object_or_a_list_or_a_tuple(form: Callable[[natsync.Hooks], Any]) -> None:
    one = natsync.Hooks()
    assert connect_options({"hooks": form(one)}).hooks == (one,)


@pytest.mark.parametrize("hooks", [object(), natsync.Hooks, "x", [natsync.Hooks], [None], {}, iter([])])
def test_other_values_for_hooks_are_a_type_error(hooks: Any) -> None:
    with pytest.raises(TypeError, match=r"hooks is a natsync\.Hooks or a list"):
        natsync.Client(hooks=hooks)


def test_a_later_change_of_the_list_changes_nothing() -> None:
    given = [natsync.Hooks()]
    options = connect_options({"hooks": given})
    given.append(natsync.Hooks())
    assert len(checked(options.hooks) or ()) == 1


# -- calling them ------------------------------------------------------------------------------------------------------


def test_every_event_of_a_connection_has_a_method_that_takes_its_details() -> None:
    for event, details in EVENTS.items():
        assert tuple(inspect.signature(getattr(natsync.Hooks(), event)).parameters) == details


def test_an_event_brings_the_details_that_its_method_takes_and_no_others(log: Any) -> None:
    fire_event(log, "error", {"error": "oops", "more": 1})
    fire_event(log, "unheard_of", {"error": "oops"})
    assert [(one.event, one.values) for one in log.told] == [("error", ("oops", None))]


def test_several_hooks_are_called_in_the_order_given() -> None:
    order: list[int] = []

    class Numbered(natsync.Hooks):
        def __init__(self, number: int) -> None:
            self.number = number

        def connected(self, server: str) -> None:
            order.append(self.number)

    fire([Numbered(2), Numbered(1), Numbered(3)], "connected", "x")
    assert order == [2, 1, 3]


def test_what_a_hook_raises_is_logged_and_the_next_is_called(log: Any, caplog: pytest.LogCaptureFixture) -> None:
    fire((Broken(), log), "connected", "nats://x:1")
    assert log.one("connected").values == ("nats://x:1",)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("natsync.hooks", logging.ERROR)
    assert record.getMessage() == "Broken.connected() raised"
    assert record.exc_info is not None


def test_an_interrupt_that_strikes_inside_a_hook_reaches_its_thread() -> None:
    class Interrupted(natsync.Hooks):
        def connected(self, server: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fire(Interrupted(), "connected", "x")


def test_a_watch_tells_once_what_two_threads_find_out(log: Any) -> None:
    watch = Watch(log, "stream", "x", {})
    barrier = threading.Barrier(8)

    def tell() -> None:
        barrier.wait(PATIENCE)
        watch.tell_once("stream_first_chunk", 1.0)

    threads = [threading.Thread(target=tell) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert log.events() == ["stream_first_chunk"]


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_request_is_told_at_its_start_and_its_end(
    client: natsync.Client, responder: natsync.Subscriber, log: Log
) -> None:
    client.request("hk.echo", b"x")
    started, done = (one for one in log.told if one.event.startswith("request"))
    assert (started.event, done.event) == ("request_started", "request_done")
    assert started.thread == done.thread == here()
    exchange, seconds, error = done.values
    assert exchange is started.exchange
    assert (exchange.kind, exchange.subject, exchange.destination) == ("request", "hk.echo", "hk.echo")
    assert isinstance(seconds, float)
    assert 0 < seconds < PATIENCE
    assert error is None


def test_what_a_hook_adds_to_the_headers_is_sent(make_client: MakeClient, responder: natsync.Subscriber) -> None:
    class Tracing(natsync.Hooks):
        def request_started(self, exchange: natsync.Exchange) -> None:
            assert exchange.headers == {"Mine": "1"}
            exchange.headers["Trace"] = "abc"

    headers = {"Mine": "1"}
    assert make_client(hooks=Tracing()).request("hk.echo", headers=headers).data == b"abc"
    assert headers == {"Mine": "1"}


@pytest.mark.parametrize(
    ("subject", "kind"), [("hk.fail", natsync.HandlerError), ("hk.nobody", natsync.NoRespondersError)]
)
def test_a_request_that_fails_is_told_with_the_error_that_the_caller_gets(
    client: natsync.Client, responder: natsync.Subscriber, log: Log, subject: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        client.request(subject)
    assert log.one("request_done").values[2] is caught.value


def test_a_request_that_times_out_is_told(client: natsync.Client, raw: RawClient, log: Log) -> None:
    raw.subscribe("hk.silent")
    with pytest.raises(natsync.RequestTimeout) as caught:
        client.request("hk.silent", timeout=0.05)
    _, seconds, error = log.one("request_done").values
    assert seconds >= 0.05
    assert error is caught.value


def test_a_request_without_a_server_is_told(make_client: MakeClient, log: Log) -> None:
    with ScriptedPeer(lambda peer: peer.close()) as nobody:
        with pytest.raises(natsync.NoServersError) as caught:
            make_client(nobody.url, hooks=log).request("hk.echo")
    assert [one.event for one in log.told] == ["request_started", "request_done"]
    assert log.one("request_done").values[2] is caught.value


def test_a_request_with_retries_is_told_once(client: natsync.Client, log: Log) -> None:
    with pytest.raises(natsync.NoRespondersError):
        client.request("hk.nobody", retry=natsync.Retry(attempts=3, initial=0.001))
    assert [len(log.of("request_started")), len(log.of("request_done"))] == [1, 1]


def test_a_request_that_cannot_be_sent_is_not_told(client: natsync.Client, log: Log) -> None:
    with pytest.raises(natsync.InvalidArgument):
        client.request("no good")
    with pytest.raises(natsync.InvalidArgument):
        client.request("x", headers={"bad\nkey": "1"})
    assert log.told == []


# -- messages ----------------------------------------------------------------------------------------------------------


def test_a_message_to_be_published_is_told_and_takes_headers(
    make_client: MakeClient, plain: natsync.Client, log: Log
) -> None:
    class Tracing(natsync.Hooks):
        def publishing(self, exchange: natsync.Exchange, size_bytes: int) -> None:
            exchange.headers["Trace"] = str(size_bytes)

    with plain.subscribe("hk.news") as news:
        plain.flush()
        make_client(hooks=[Tracing(), log]).publish("hk.news", "äh")
        assert news.next(PATIENCE).headers == {"Trace": "3"}
    told = log.one("publishing")
    assert (told.exchange.kind, told.exchange.subject, told.values[1], told.thread) == ("message", "hk.news", 3, here())


def test_the_callback_of_a_subscription_is_told(client: natsync.Client, log: Log) -> None:
    ran: list[str] = []
    client.subscribe("hk.news.*", lambda message: ran.append(here()))
    client.publish("hk.news.today", headers={"Trace": "abc"})
    done = log.one("handler_done")
    started = log.one("handler_started")
    assert started.thread == done.thread == ran[0]
    exchange, seconds, error = done.values
    assert exchange is started.exchange
    assert (exchange.kind, exchange.subject, exchange.destination) == ("message", "hk.news.*", "hk.news.today")
    assert exchange.headers == {"Trace": "abc"}
    assert seconds >= 0
    assert error is None


def test_a_callback_that_raises_is_told_and_counted(
    watched: natsync.Subscriber, plain: natsync.Client, log: Log
) -> None:
    def fail(message: natsync.Message) -> None:
        raise ValueError("broken")

    handle = watched.subscribe("hk.news", fail)
    plain.publish("hk.news")
    assert str(log.one("handler_done").values[2]) == "broken"
    eventually(lambda: handle.stats["failed"] == 1)


# -- streams, at the requester -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_next", [False, True], ids=["iterating", "next()"])
def test_a_stream_is_told_at_its_start_its_first_chunk_and_its_end(
    client: natsync.Client, responder: natsync.Subscriber, log: Log, by_next: bool
) -> None:
    stream = client.stream("hk.count", b"12")
    if by_next:
        with pytest.raises(natsync.StreamEnded):
            while True:
                stream.next(PATIENCE)
    else:
        assert len(list(stream)) == 12
    stream.close()
    told = [one for one in log.told if one.event.startswith("stream")]
    assert [one.event for one in told] == ["stream_opened", "stream_first_chunk", "stream_done"]
    assert {one.thread for one in told} == {here()}
    opened, first, done = told
    assert opened.exchange is first.exchange is done.exchange
    assert (opened.exchange.kind, opened.exchange.subject) == ("stream", "hk.count")
    _, seconds, chunks, size_bytes, error = done.values
    assert 0 < first.values[1] <= seconds < PATIENCE
    assert (chunks, size_bytes, error) == (12, 14, None)


def test_the_first_chunk_is_told_before_the_consumer_has_it(
    client: natsync.Client, responder: natsync.Subscriber, log: Log
) -> None:
    with client.stream("hk.count", b"2") as stream:
        next(stream)
        assert "stream_first_chunk" in log.events()
        assert "stream_done" not in log.events()


def test_a_stream_without_chunks_has_no_first(client: natsync.Client, responder: natsync.Subscriber, log: Log) -> None:
    assert list(client.stream("hk.count", b"0")) == []
    assert log.of("stream_first_chunk") == []
    assert log.one("stream_done").values[2:] == (0, 0, None)


def test_headers_that_a_hook_adds_reach_the_handler_of_a_stream(
    make_client: MakeClient, natsync_subscriber: natsync.Subscriber
) -> None:
    class Tracing(natsync.Hooks):
        def stream_opened(self, exchange: natsync.Exchange) -> None:
            exchange.headers["Trace"] = "abc"

    @natsync_subscriber.stream("hk.trace")
    def trace(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[str]:
        yield ctx.metadata["Trace"]

    natsync_subscriber.open()
    client = make_client(hooks=Tracing())
    assert list(client.stream("hk.trace")) == [b"abc"]
    seen: list[bytes] = []
    client.stream_request("hk.trace", b"", lambda message: seen.append(message.data))
    assert seen == [b"abc", END]


def test_a_stream_whose_handler_fails_is_told_with_the_error(
    client: natsync.Client, responder: natsync.Subscriber, log: Log
) -> None:
    with pytest.raises(natsync.HandlerError) as caught:
        list(client.stream("hk.break"))
    _, _, chunks, size_bytes, error = log.one("stream_done").values
    assert (chunks, size_bytes) == (1, 3)
    assert error is caught.value


def test_a_stream_that_nobody_hears_is_told(client: natsync.Client, log: Log) -> None:
    with pytest.raises(natsync.NoRespondersError) as caught:
        list(client.stream("hk.nobody"))
    assert log.one("stream_done").values[4] is caught.value


def test_a_stream_that_cannot_be_opened_is_told(make_client: MakeClient, log: Log) -> None:
    with ScriptedPeer(lambda peer: peer.close()) as nobody:
        with pytest.raises(natsync.NoServersError) as caught:
            make_client(nobody.url, hooks=log).stream("hk.count")
    assert log.events() == ["stream_opened", "stream_done"]
    assert log.one("stream_done").values[2:] == (0, 0, caught.value)


@pytest.mark.parametrize(
    ("limit", "kind"), [("timeout", natsync.DeadlineExceeded), ("idle_timeout", natsync.IdleTimeout)]
)
def test_a_stream_that_takes_too_long_is_told(
    client: natsync.Client, responder: natsync.Subscriber, log: Log, limit: str, kind: type[Exception]
) -> None:
    client.open()
    with pytest.raises(kind) as caught:
        list(client.stream("hk.wait", **{limit: 3.0}))
    _, seconds, chunks, _, error = log.one("stream_done").values
    assert seconds >= 3.0
    assert (chunks, error) == (1, caught.value)


def test_a_wait_that_times_out_is_not_the_end(client: natsync.Client, responder: natsync.Subscriber, log: Log) -> None:
    with client.stream("hk.wait") as stream:
        stream.next(PATIENCE)
        with pytest.raises(natsync.TimedOut):
            stream.next(0.01)
        assert log.of("stream_done") == []
    assert isinstance(log.one("stream_done").values[4], natsync.StreamCancelled)


def test_closing_a_stream_early_is_told_in_the_thread_that_closes(
    client: natsync.Client, responder: natsync.Subscriber, log: Log
) -> None:
    stream = client.stream("hk.wait")
    next(stream)
    stream.cancel("enough")
    stream.close()
    done = log.one("stream_done")
    assert done.thread == here()
    _, _, chunks, size_bytes, error = done.values
    assert (chunks, size_bytes, type(error), str(error)) == (1, 3, natsync.StreamCancelled, "enough")


def test_a_stream_closed_under_its_consumer_is_told_once(
    client: natsync.Client, responder: natsync.Subscriber, log: Log
) -> None:
    stream = client.stream("hk.wait")
    next(stream)
    closer = threading.Timer(0.05, stream.close)
    closer.start()
    with pytest.raises(natsync.StreamCancelled):
        next(stream)
    closer.join(PATIENCE)
    assert isinstance(log.one("stream_done").values[4], natsync.StreamCancelled)


def test_a_stream_that_is_dropped_is_told_on_a_worker(
    client: natsync.Client, responder: natsync.Subscriber, log: Log
) -> None:
    stream = client.stream("hk.wait")
    next(stream)
    del stream
    gc.collect()
    done = log.one("stream_done")
    assert "-worker-" in done.thread
    assert (done.values[2], type(done.values[4])) == (1, natsync.StreamCancelled)


def test_a_stream_that_outlives_its_client_is_told_when_it_is_dropped(
    client: natsync.Client, responder: natsync.Subscriber, log: Log
) -> None:
    stream = client.stream("hk.wait")
    next(stream)
    client.close()
    assert log.of("stream_done") == []
    del stream
    gc.collect()
    assert isinstance(log.one("stream_done").values[4], natsync.ConnectionClosed)


def test_a_stream_left_over_at_the_exit_keeps_nobody_waiting(nats_server: NatsServer) -> None:
    code = """
import sys, natsync
client = natsync.Client(sys.argv[1], hooks=natsync.Hooks())
subscription = client.subscribe("hk.exit")
stream = client.stream("hk.exit")
client.close()
print("leaving")
"""
    done = run_python(code, nats_server.url, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


def test_chunks_that_waited_when_the_link_broke_are_counted(
    make_nats_server: Make, make_client: MakeClient, log: Log
) -> None:
    server = make_nats_server()
    client = make_client(server.url, hooks=log, reconnect_wait=0.01)
    with RawClient(server.url) as raw:
        raw.subscribe("hk.raw")
        stream = client.stream("hk.raw")
        raw.answer(raw.next(), b"one", b"two", b"three")
        raw.flush()
        assert next(stream) == b"one"
        client.flush()
        server.kill()
        eventually(lambda: client.status == "reconnecting")
    assert log.of("stream_done") == []
    with pytest.raises(natsync.ServerLost) as caught:
        list(stream)
    done = log.one("stream_done")
    assert (done.values[2:], done.thread) == ((3, 11, caught.value), here())


def test_a_stream_with_retries_is_told_once_with_the_last_error(client: natsync.Client, log: Log) -> None:
    with pytest.raises(natsync.NoRespondersError) as caught:
        list(client.stream("hk.nobody", retry=natsync.Retry(attempts=3, initial=0.001)))
    assert [len(log.of("stream_opened")), log.one("stream_done").values[4]] == [1, caught.value]


def test_a_stream_closed_between_two_tries_was_cancelled(client: natsync.Client, log: Log) -> None:
    stream = client.stream("hk.nobody", retry=natsync.Retry(initial=PATIENCE, maximum=PATIENCE, jitter=False))
    failed: list[BaseException] = []

    def consume() -> None:
        try:
            next(stream)
        except natsync.NatsError as error:
            failed.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    eventually(between_two_tries)
    stream.close()
    consumer.join(PATIENCE)
    assert isinstance(failed[0], natsync.StreamCancelled)
    assert isinstance(log.one("stream_done").values[4], natsync.StreamCancelled)


def test_a_stream_dropped_between_two_tries_was_cancelled(client: natsync.Client, log: Log) -> None:
    stream = client.stream("hk.nobody", retry=natsync.Retry(initial=PATIENCE, maximum=PATIENCE, jitter=False))
    while not log.of("retrying"):
        with pytest.raises(natsync.TimedOut):
            stream.next(0.1)
    log.told.clear()  # whose errors hold the stream
    del stream
    gc.collect()
    eventually(lambda: len(log.of("stream_done")) == 1)
    assert isinstance(log.one("stream_done").values[4], natsync.StreamCancelled)


# -- stream_request() --------------------------------------------------------------------------------------------------


def test_stream_request_is_told_as_a_stream(client: natsync.Client, responder: natsync.Subscriber, log: Log) -> None:
    client.stream_request("hk.count", b"12", lambda message: None)
    told = [one for one in log.told if one.event.startswith("stream")]
    assert [one.event for one in told] == ["stream_opened", "stream_first_chunk", "stream_done"]
    assert {(one.thread, id(one.exchange)) for one in told} == {(here(), id(told[0].exchange))}
    assert told[-1].values[2:] == (12, 14, None)


def test_stream_request_that_the_processor_stops_was_cancelled(
    client: natsync.Client, responder: natsync.Subscriber, log: Log
) -> None:
    client.stream_request("hk.wait", b"", lambda message: False)
    _, _, chunks, size_bytes, error = log.one("stream_done").values
    assert (chunks, size_bytes, type(error)) == (1, 3, natsync.StreamCancelled)


def test_stream_request_is_told_what_its_processor_raises(
    client: natsync.Client, responder: natsync.Subscriber, log: Log
) -> None:
    def fail(message: natsync.Message) -> None:
        raise LookupError("no")

    with pytest.raises(LookupError) as caught:
        client.stream_request("hk.count", b"3", fail)
    assert log.one("stream_done").values[2:] == (1, 1, caught.value)


def test_stream_request_counts_over_all_its_tries(
    client: natsync.Client, responder: natsync.Subscriber, log: Log
) -> None:
    with pytest.raises(natsync.HandlerError):
        client.stream_request("hk.break", b"", lambda message: None, retry=natsync.Retry(attempts=3, initial=0.001))
    assert len(log.of("stream_first_chunk")) == 1
    assert log.one("stream_done").values[2:4] == (3, 9)


@pytest.mark.parametrize("how", ["end", "close", "garbage"])
def test_a_stream_counts_over_all_its_attempts(
    client: natsync.Client, responder: natsync.Subscriber, log: Log, how: str
) -> None:
    retry = natsync.Retry(attempts=2, initial=0.001, on=natsync.HandlerError, resumable=True)
    stream: natsync.Stream | None = client.stream("hk.resume", b"" if how == "end" else b"10", retry=retry)
    assert stream is not None
    assert [stream.next(PATIENCE) for _ in range(5)] == [b"00", b"11", b"22", b"33", b"44"]
    if how == "end":
        assert list(stream) == []
    elif how == "close":
        stream.close()
    else:
        log.told.clear()  # the error that retrying() was told of has the stream in its traceback
        stream = None
        gc.collect()
    assert log.one("stream_done").values[2:4] == (5, 10)


# -- streams, at the responder -----------------------------------------------------------------------------------------


def test_a_stream_handler_is_told_from_start_to_end_on_its_thread(
    watched: natsync.Subscriber, plain: natsync.Client, log: Log
) -> None:
    ran: list[str] = []

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        ran.append(here())
        yield b"one"
        yield b"three"

    watched.stream_subscribe("hk.*.chat", handler)
    assert list(plain.stream("hk.llm.chat", headers={"Trace": "abc"})) == [b"one", b"three"]
    done = log.one("response_done")
    told = log.told[log.events().index("handler_started") :]
    assert [one.event for one in told] == ["handler_started", "response_first_chunk", "handler_done", "response_done"]
    assert {(one.thread, id(one.exchange)) for one in told} == {(ran[0], id(done.exchange))}
    exchange = done.exchange
    assert (exchange.kind, exchange.subject, exchange.destination) == ("stream", "hk.*.chat", "hk.llm.chat")
    assert exchange.headers["Trace"] == "abc"
    first, handler_seconds, seconds = (one.values[1] for one in told[1:])
    assert 0 < first <= seconds <= handler_seconds < PATIENCE
    assert told[2].values[2] is None
    assert done.values[2:] == (2, 8, None)


def test_every_way_of_sending_is_counted(watched: natsync.Subscriber, plain: natsync.Client, log: Log) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.set_header("Kind", "text")
        sender.send_many([b"", b"a" * 40_000, b"b" * 40_000, "ä"])
        sender.send("xyz")
        assert sender.try_send(bytearray(10))
        sender.end()

    watched.stream_subscribe("hk.ways", handler)
    assert len(list(plain.stream("hk.ways"))) == 6
    assert log.one("response_done").values[2:] == (6, 80_015, None)


def test_a_stream_handler_that_raises_is_told(watched: natsync.Subscriber, plain: natsync.Client, log: Log) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"one"
        raise ValueError("broken")

    watched.stream_subscribe("hk.raises", handler)
    with pytest.raises(natsync.HandlerError):
        list(plain.stream("hk.raises"))
    assert isinstance(log.one("handler_done").values[2], ValueError)
    _, _, chunks, size_bytes, error = log.one("response_done").values
    assert (chunks, size_bytes, type(error)) == (1, 3, natsync.StreamClosed)


def test_a_cancel_is_told_to_the_responder_once_its_handler_has_left(
    watched: natsync.Subscriber, plain: natsync.Client, log: Log
) -> None:
    let_go = threading.Event()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"one"
        ctx.wait(PATIENCE)
        let_go.wait(PATIENCE)

    watched.stream_subscribe("hk.slow", handler)
    stream = plain.stream("hk.slow")
    next(stream)
    stream.cancel("enough")
    eventually(lambda: watched.stats()["streams"] == 0)
    cancelled = time.monotonic()
    assert log.of("response_done") == []
    let_go.set()
    done = log.one("response_done")
    assert log.events()[-2:] == ["handler_done", "response_done"]
    assert (type(done.values[4]), str(done.values[4])) == (natsync.StreamCancelled, "enough")
    assert done.exchange.started + done.values[1] <= cancelled


def test_a_requester_that_is_gone_is_told(watched: natsync.Subscriber, nats_server: NatsServer, log: Log) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        while not ctx.wait(0.002):
            yield b"x"

    watched.stream_subscribe("hk.endless", handler)
    with RawClient(nats_server.url) as gone:
        gone.request("hk.endless")
        gone.next()
    assert isinstance(log.one("response_done").values[4], natsync.ClientLost)


def test_a_stream_that_outlasts_its_handler_is_told_on_a_worker(
    watched: natsync.Subscriber, plain: natsync.Client, log: Log
) -> None:
    senders: list[natsync.ResponseSender] = []
    watched.stream_subscribe("hk.later", lambda ctx, request, sender: senders.append(sender))
    stream = plain.stream("hk.later")
    log.one("handler_done")
    senders[0].send(b"one")
    assert log.one("response_first_chunk").thread == here()
    assert log.of("response_done") == []
    senders[0].end()
    assert list(stream) == [b"one"]
    done = log.one("response_done")
    assert "-worker-" in done.thread
    assert done.values[2:] == (1, 3, None)


def test_a_handler_sees_what_the_hook_puts_into_a_contextvar(
    make_subscriber: MakeSubscriber, plain: natsync.Client
) -> None:
    current: contextvars.ContextVar[str] = contextvars.ContextVar("current", default="nothing")
    left: list[str] = []

    class Tracing(natsync.Hooks):
        def handler_started(self, exchange: natsync.Exchange) -> None:
            exchange.attributes[self] = current.set(f"span of {exchange.headers['Trace']}")

        def handler_done(self, exchange: natsync.Exchange, seconds: float, error: BaseException | None) -> None:
            left.append(current.get())
            current.reset(exchange.attributes.pop(self))

    subscriber = make_subscriber(hooks=Tracing())

    @subscriber.stream("hk.span")
    def chunks(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[str]:
        yield current.get()

    @subscriber.handler("hk.span.single")
    def single(ctx: natsync.HandlerContext, request: natsync.Message) -> str:
        return current.get()

    with subscriber:
        assert list(plain.stream("hk.span", headers={"Trace": "1"})) == [b"span of 1"]
        assert plain.request("hk.span.single", headers={"Trace": "2"}).data == b"span of 2"
        eventually(lambda: left == ["span of 1", "span of 2"])


# -- requests, at the responder ----------------------------------------------------------------------------------------


def test_a_request_handler_is_told(watched: natsync.Subscriber, plain: natsync.Client, log: Log) -> None:
    ran: list[str] = []

    @watched.handler("hk.do.*")
    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> None:
        ran.append(here())

    plain.request("hk.do.it")
    done = log.one("handler_done")
    started = log.one("handler_started")
    assert started.thread == done.thread == ran[0]
    exchange, seconds, error = done.values
    assert exchange is started.exchange
    assert (exchange.kind, exchange.subject, exchange.destination) == ("request", "hk.do.*", "hk.do.it")
    assert seconds > 0
    assert error is None


def test_a_request_handler_that_fails_is_told(watched: natsync.Subscriber, plain: natsync.Client, log: Log) -> None:
    @watched.handler("hk.do")
    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> object:
        return {1, 2}

    with pytest.raises(natsync.HandlerError):
        plain.request("hk.do")
    assert isinstance(log.one("handler_done").values[2], TypeError)


@framed_only
def test_a_request_handler_that_is_asked_for_a_stream_is_told_as_one(
    watched: natsync.Subscriber, plain: natsync.Client, log: Log
) -> None:
    @watched.handler("hk.do")
    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> str:
        return "done"

    assert list(plain.stream("hk.do")) == [b"done"]
    done = log.one("response_done")
    assert (done.exchange.kind, done.values[2:]) == ("stream", (1, 4, None))


# -- refusals ----------------------------------------------------------------------------------------------------------


@framed_only
def test_one_stream_too_many_is_told_as_refused_on_both_sides(
    make_subscriber: MakeSubscriber, client: natsync.Client, log: Log
) -> None:
    served: Log = Recorder()
    subscriber = make_subscriber(hooks=served, max_streams=1).open()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"one"
        ctx.wait(PATIENCE)

    subscriber.stream_subscribe("hk.full", handler)
    with client.stream("hk.full") as first:
        next(first)
        with pytest.raises(natsync.StreamRefused):
            next(client.stream("hk.full"))
        refused = served.one("refused")
        assert "-worker-" in refused.thread
        assert (refused.exchange.kind, refused.exchange.subject) == ("stream", "hk.full")
        assert refused.values[1] == "too many streams: all 1 are in use"
        assert len(served.of("handler_started")) == 1
        assert served.of("response_done") == []
        assert isinstance(log.one("stream_done").values[4], natsync.StreamRefused)
    served.one("response_done")


@pytest.mark.parametrize("kind", ["request", "stream"])
def test_a_request_that_wants_no_answer_is_told_as_refused_and_logged_once(
    watched: natsync.Subscriber, plain: natsync.Client, log: Log, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    register = watched.handler if kind == "request" else watched.stream
    register("hk.mute")(lambda ctx, request: None)
    plain.publish("hk.mute")
    plain.publish("hk.mute")
    eventually(lambda: len(log.of("refused")) == 2)
    for one in log.of("refused"):
        assert (one.exchange.kind, one.exchange.subject, one.values[1]) == (kind, "hk.mute", "no reply subject")
        assert "-worker-" in one.thread
    warnings = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert [one.getMessage() for one in warnings] == [
        "request on 'hk.mute' without a reply subject: ignored, nobody waits for an answer"
    ]


# -- the connection ----------------------------------------------------------------------------------------------------


def test_the_life_of_a_connection_is_told_in_order(make_nats_server: Make, make_client: MakeClient, log: Log) -> None:
    server = make_nats_server()
    client = make_client(server.url, hooks=log, reconnect_wait=0.01)
    client.open()
    log.one("connected")
    server.kill()
    log.one("disconnected")
    server.restart()
    log.one("reconnected")
    client.close()
    assert log.events() == ["connected", "disconnected", "reconnected", "closed"]
    connected, disconnected, reconnected, closed = log.told
    assert connected.values == reconnected.values == (server.url,)
    assert disconnected.values[0]
    assert closed.values == (None,)
    assert all("-worker-" in one.thread for one in log.told)


def test_a_connection_that_gives_up_is_told_why(make_nats_server: Make, make_client: MakeClient, log: Log) -> None:
    server = make_nats_server()
    client = make_client(server.url, hooks=log, reconnect=False)
    client.open()
    server.kill()
    assert log.one("closed").values[0] == log.one("disconnected").values[0]


def test_a_slow_consumer_is_told(client: natsync.Client, plain: natsync.Client, log: Log) -> None:
    with client.subscribe("hk.many", pending_messages=2) as many:
        client.flush()
        for _ in range(5):
            plain.publish("hk.many")
        subject, dropped = log.one("slow_consumer").values
        assert subject == "hk.many"
        assert 1 <= dropped <= 3
        eventually(lambda: many.dropped == 3)


def test_an_error_and_the_end_of_a_server_are_told(make_client: MakeClient, log: Log) -> None:
    def tell(peer: PeerConnection) -> None:
        peer.handshake()
        if peer.index == 0:
            peer.send(b"-ERR 'Permissions Violation for Publish to \"x\"'\r\n")
            peer.send(b'INFO {"ldm":true}\r\n')
        peer.recv_until_eof()

    with ScriptedPeer(tell) as server:
        make_client(server.url, hooks=log).open()
        text, kind = log.one("error").values
        assert text.startswith("Permissions Violation")
        assert kind == "permission"
        assert log.one("lame_duck").values == (server.url,)


# -- what hooks can do -------------------------------------------------------------------------------------------------


def test_hooks_that_raise_harm_nothing(
    make_client: MakeClient, make_subscriber: MakeSubscriber, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    subscriber = make_subscriber(hooks=[Broken(), log], max_streams=1)

    @subscriber.handler("hk.harm.do")
    def do(ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
        return request.data

    @subscriber.stream("hk.harm.stream")
    def stream(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"one"
        yield b"two"

    client = make_client(hooks=[Broken(), log])
    with subscriber:
        subscriber.subscribe("hk.harm.news", lambda message: None)
        assert client.request("hk.harm.do", b"x").data == b"x"
        assert list(client.stream("hk.harm.stream")) == [b"one", b"two"]
        seen: list[bytes] = []
        client.stream_request("hk.harm.stream", b"", lambda message: seen.append(message.data))
        assert seen == [b"one", b"two", END]
        client.publish("hk.harm.news")
        client.publish("hk.harm.stream")
        client.flush()
        log.one("refused")
        eventually(lambda: len(log.of("handler_done")) == 4)
        eventually(lambda: subscriber.stats()["processed"] == 4)
        assert subscriber.stats()["failed"] == 0
    client.close()
    counts = {name: len(log.of(name)) for name in NAMES}
    assert counts == {
        "closed": 2, "connected": 2, "disconnected": 0, "error": 0, "handler_done": 4, "handler_started": 4,
        "lame_duck": 0, "publishing": 2, "reconnected": 0, "refused": 1, "request_done": 1, "request_started": 1,
        "retrying": 0, "response_done": 2, "response_first_chunk": 2, "slow_consumer": 0, "stream_done": 2,
        "stream_first_chunk": 2, "stream_opened": 2,
    }  # fmt: skip
    texts = {one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING}
    assert {f"Broken.{name}() raised" for name, count in counts.items() if count} <= texts


def test_a_hook_that_exits_on_a_worker_harms_no_handler(
    make_subscriber: MakeSubscriber, plain: natsync.Client, caplog: pytest.LogCaptureFixture
) -> None:
    class Exiting(natsync.Hooks):
        def handler_started(self, exchange: natsync.Exchange) -> None:
            raise SystemExit(1)

        def handler_done(self, exchange: natsync.Exchange, seconds: float, error: BaseException | None) -> None:
            raise SystemExit(1)

    subscriber = make_subscriber(hooks=Exiting())
    subscriber.stream_subscribe("hk.exit", lambda ctx, request: iter([b"one"]))
    assert list(plain.stream("hk.exit")) == [b"one"]
    eventually(lambda: "the hook handler_done() raised" in caplog.text)


def test_a_hook_may_use_its_client(
    make_client: MakeClient, make_subscriber: MakeSubscriber, plain: natsync.Client
) -> None:
    class Reporting(natsync.Hooks):
        def __init__(self) -> None:
            self.client: natsync.Client | None = None

        def stream_done(self, exchange: natsync.Exchange, *values: Any) -> None:
            assert self.client is not None
            self.client.publish("hk.report", "requester")
            self.client.flush()

        def response_done(self, exchange: natsync.Exchange, *values: Any) -> None:
            assert self.client is not None
            self.client.publish("hk.report", "responder")
            self.client.flush()

    hooks = Reporting()
    client = hooks.client = make_client(hooks=hooks)
    make_subscriber(hooks=hooks).stream_subscribe("hk.reported", lambda ctx, request: iter([b"one"]))
    with plain.subscribe("hk.report") as reports:
        plain.flush()
        assert list(client.stream("hk.reported")) == [b"one"]
        assert {reports.next(PATIENCE).text() for _ in range(2)} == {"requester", "responder"}


def test_a_span_kept_with_the_exchange_is_there_at_the_end(
    make_client: MakeClient, responder: natsync.Subscriber
) -> None:
    spans: list[list[str]] = []

    class Tracing(natsync.Hooks):
        def stream_opened(self, exchange: natsync.Exchange) -> None:
            exchange.attributes["span"] = [exchange.subject]

        def stream_first_chunk(self, exchange: natsync.Exchange, seconds: float) -> None:
            exchange.attributes["span"].append("first chunk")

        def stream_done(
            self, exchange: natsync.Exchange, seconds: float, chunks: int, size_bytes: int, error: BaseException | None
        ) -> None:
            spans.append([*exchange.attributes["span"], f"{chunks} chunks"])

    client = make_client(hooks=Tracing())
    one, other = client.stream("hk.count", b"1"), client.stream("hk.count", b"2")
    list(other)
    list(one)
    assert spans == [["hk.count", "first chunk", "2 chunks"], ["hk.count", "first chunk", "1 chunks"]]


def test_the_clients_of_a_pool_have_its_hooks(nats_server: NatsServer, responder: natsync.Subscriber, log: Log) -> None:
    with natsync.ConnectionPool(nats_server.url, hooks=log, max_size=1) as pool:
        pool.request("hk.echo", b"x")
        list(pool.stream("hk.count", b"1"))
    assert [log.one("request_done").values[2], log.one("stream_done").values[4]] == [None, None]


def test_without_hooks_nothing_is_watched(
    plain: natsync.Client, responder: natsync.Subscriber, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*values: object) -> None:
        raise AssertionError("a watch was made")

    monkeypatch.setattr(Watch, "__init__", forbidden)
    monkeypatch.setattr(_hooks, "fire", forbidden)
    made: list[SenderCore] = []
    kind = FramedSender if mode == "framed" else PlainSender
    original = kind.accept
    monkeypatch.setattr(kind, "accept", lambda core: (made.append(core), original(core))[1])
    plain.publish("hk.mute")
    assert plain.request("hk.echo", b"x").data == b"x"
    stream = plain.stream("hk.count", b"2")
    assert type(stream) is natsync.Stream
    assert list(stream) == [b"0", b"1"]
    plain.stream_request("hk.count", b"2", lambda message: None)
    assert [core.watch for core in made] == [None, None]
