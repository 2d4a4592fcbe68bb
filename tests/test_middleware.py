"""Middleware: what passes it, in which order, on both sides and in both modes; and what comes of its errors."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest

import natsync
from natsync.middleware import Middleware, Passage, chain_of, checked
from natsync.streaming.framed_sender import FramedSender
from natsync.streaming.plain_sender import PlainSender
from natsync.streaming.stream import Stream
from natsync.subscription import Subscription
from natsync.testing import NatsServer, eventually
from rawclient import PATIENCE
from support import framed_only

Make = Callable[..., natsync.Client]
MakeSubscriber = Callable[..., natsync.Subscriber]


class Wrap(Middleware):
    """Puts a letter and brackets around what leaves, and takes them off what comes."""

    def __init__(self, letter: str) -> None:
        self.start, self.end = f"{letter}(".encode(), b")"
        self.letter = letter

    def send(self, passage: Passage, data: bytes) -> bytes:
        return self.start + data + self.end

    def receive(self, passage: Passage, data: bytes) -> bytes:
        if not (data.startswith(self.start) and data.endswith(self.end)):
            raise natsync.InvalidArgument(f"{self.letter} did not expect {data!r}")
        return data[len(self.start) : -1]


class Seen(Middleware):
    """Writes down what passes."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, str, str, bytes]] = []

    def _tell(self, way: str, passage: Passage, data: bytes) -> bytes:
        self.told.append((way, passage.side, passage.kind, passage.subject, data))
        return data

    def send(self, passage: Passage, data: bytes) -> bytes:
        return self._tell("send", passage, data)

    def receive(self, passage: Passage, data: bytes) -> bytes:
        return self._tell("receive", passage, data)


class Refuse(Middleware):
    """Raises where it is told to."""

    def __init__(self, way: str, error: BaseException, side: str | None = None) -> None:
        self.way, self.error, self.side = way, error, side

    def _meet(self, way: str, passage: Passage, data: bytes = b"") -> bytes:
        if way == self.way and self.side in (None, passage.side):
            raise self.error
        return data

    def send(self, passage: Passage, data: bytes) -> bytes:
        return self._meet("send", passage, data)

    def receive(self, passage: Passage, data: bytes) -> bytes:
        return self._meet("receive", passage, data)

    @contextlib.contextmanager
    def around(self, passage: Passage) -> Iterator[None]:
        self._meet("around", passage)
        yield


BOTH = [Wrap("a"), Wrap("b")]


@pytest.fixture
def make_client(nats_server: NatsServer, mode: str) -> Iterator[Make]:
    with contextlib.ExitStack() as stack:
        yield lambda *middleware, **options: stack.enter_context(
            natsync.Client(nats_server.url, framed=mode == "framed", middleware=middleware, **options)
        )


@pytest.fixture
def make_subscriber(nats_server: NatsServer) -> Iterator[MakeSubscriber]:
    with contextlib.ExitStack() as stack:

        def make(*middleware: Middleware, **options: Any) -> natsync.Subscriber:
            subscriber = natsync.Subscriber(nats_server.url, middleware=middleware, **options)
            stack.callback(subscriber.close, 2)

            @subscriber.handler("mw.echo")
            def echo(ctx: natsync.Context, request: natsync.Message) -> bytes:
                return b"echo " + request.data

            @subscriber.handler("mw.fails")
            def fails(ctx: natsync.Context, request: natsync.Message) -> bytes:
                raise ValueError("broken")

            @subscriber.stream("mw.words")
            def words(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
                yield from request.data.split()

            return subscriber.open()

        yield make


# -- what passes ---------------------------------------------------------------------------------------------------


def test_requests_and_replies_pass_in_order_and_back(make_client: Make, make_subscriber: MakeSubscriber) -> None:
    make_subscriber(*BOTH)
    assert make_client(*BOTH).request("mw.echo", b"x", timeout=PATIENCE).data == b"echo x"
    with pytest.raises(natsync.HandlerError, match="b did not expect b'x'"):
        make_client().request("mw.echo", b"x", timeout=PATIENCE)


def test_what_is_on_the_wire_is_wrapped_by_the_last_of_the_list_outermost(
    make_client: Make, nats_server: NatsServer
) -> None:
    with natsync.Client(nats_server.url) as bare:
        bare.subscribe("mw.wire", lambda message: message.respond(b"b(a(" + message.data + b"))"))
        bare.flush()
        assert make_client(*BOTH).request("mw.wire", b"x", timeout=PATIENCE).data == b"b(a(x))"


def test_streams_pass_chunk_by_chunk(make_client: Make, make_subscriber: MakeSubscriber) -> None:
    make_subscriber(*BOTH)
    client = make_client(*BOTH)
    with client.stream("mw.words", b"one two three", timeout=PATIENCE) as stream:
        assert next(stream) == b"one"
        assert stream.next(timeout=PATIENCE) == b"two"
        assert list(stream.map(bytes.upper)) == [b"THREE"]
    assert list(client.stream("mw.echo", b"x", timeout=PATIENCE)) == [b"echo x"]  # a handler of requests


@pytest.mark.parametrize("form", ["send", "try_send", "send_many", "generator", "batch", "batch pull", "legacy"])
def test_chunks_pass_however_they_are_sent(make_client: Make, make_subscriber: MakeSubscriber, form: str) -> None:
    subscriber = make_subscriber(*BOTH)

    def handler(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        if form == "send_many":
            sender.send_many([b"1", "2", b"3"])
        for chunk in () if form == "send_many" else (b"1", "2", b"3"):
            if form == "send":
                sender.send(chunk)
            else:
                assert sender.try_send(chunk)
        sender.end()

    def generator(ctx: natsync.Context, request: natsync.Message) -> Iterator[Any]:
        yield from (b"1", "2", b"3")

    def batch(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.send_many([b"1", b"2"])
        sender.send(b"3")
        sender.end()

    def pull_batches(request: natsync.Message, index: int) -> tuple[list[bytes], bool]:
        return ([b"1", b"2"], True) if index == 0 else ([b"3"], False)

    def legacy(request: natsync.Message, index: int) -> tuple[bytes, bool]:
        return b"%d" % (index + 1), index < 2

    if form == "legacy":
        subscriber.legacy_stream_subscribe("mw.form", legacy)
    elif form.startswith("batch"):
        subscriber.batch_stream_subscribe("mw.form", pull_batches if "pull" in form else batch)
    else:
        subscriber.stream_subscribe("mw.form", generator if form == "generator" else handler)
    assert list(make_client(*BOTH).stream("mw.form", timeout=PATIENCE)) == [b"1", b"2", b"3"]


def test_stream_request_shows_the_processor_what_has_passed(make_client: Make, make_subscriber: MakeSubscriber) -> None:
    make_subscriber(*BOTH)
    seen: list[tuple[bytes, bool]] = []
    make_client(*BOTH).stream_request(
        "mw.words", b"one two", lambda message: seen.append((message.data, message.is_end)), timeout=PATIENCE
    )
    assert [data for data, is_end in seen if not is_end] == [b"one", b"two"]
    assert seen[-1][1]


def test_published_messages_pass_whoever_takes_them(make_client: Make, make_subscriber: MakeSubscriber) -> None:
    client, subscriber = make_client(*BOTH), make_subscriber(*BOTH)
    called: list[bytes] = []
    served: list[bytes] = []
    subscription = client.subscribe("mw.news")
    client.subscribe("mw.news", lambda message: called.append(message.data))
    client.flush()
    subscriber.subscribe("mw.news", lambda message: served.append(message.data))
    client.publish("mw.news", "hello")
    client.publish("mw.news", json=[1])
    assert subscription.next(PATIENCE).data == b"hello"
    assert next(subscription).json() == [1]
    eventually(lambda: called == served == [b"hello", b"[1]"], PATIENCE, f"{called} {served}")


def test_what_a_callback_responds_passes(make_client: Make) -> None:
    client = make_client(*BOTH)
    client.subscribe("mw.callback", lambda message: message.respond(b"re: " + message.data))
    assert client.request("mw.callback", b"x", timeout=PATIENCE).data == b"re: x"
    subscription = client.subscribe("mw.next")
    waiting = client.request_many("mw.next", b"y", timeout=PATIENCE, max_messages=1)
    subscription.next(PATIENCE).respond(b"later")
    assert [reply.data for reply in waiting] == [b"later"]


def test_request_many_passes_each_reply_and_errors_go_round(make_client: Make, make_subscriber: MakeSubscriber) -> None:
    first, second = make_subscriber(*BOTH), make_subscriber(*BOTH)
    assert first is not second
    client = make_client(*BOTH)
    found = client.request_many("mw.echo", b"x", timeout=PATIENCE, max_messages=2)
    assert [reply.data for reply in found] == [b"echo x", b"echo x"]
    found = client.request_many("mw.fails", timeout=PATIENCE, max_messages=1)
    assert [reply.headers["Nats-Service-Error"] for reply in found] == ["broken"]


def test_a_handlers_error_goes_round(make_client: Make, make_subscriber: MakeSubscriber) -> None:
    make_subscriber(*BOTH)
    client = make_client(*BOTH)
    for ask in (client.request, lambda *a, **k: list(client.stream(*a, **k))):
        with pytest.raises(natsync.HandlerError, match=r"^broken$"):
            ask("mw.fails", timeout=PATIENCE)


def test_each_step_is_told_of_side_kind_and_subject(make_client: Make, make_subscriber: MakeSubscriber) -> None:
    client_side, server_side = Seen(), Seen()
    subscriber = make_subscriber(server_side)
    subscriber.subscribe("mw.any.*", lambda message: None)
    client = make_client(client_side)
    client.request("mw.echo", b"x", timeout=PATIENCE)
    assert list(client.stream("mw.words", b"y z", timeout=PATIENCE)) == [b"y", b"z"]
    client.publish("mw.any.where", b"m")
    eventually(lambda: len(server_side.told) == 6, PATIENCE)
    assert client_side.told == [
        ("send", "requester", "request", "mw.echo", b"x"),
        ("receive", "requester", "request", "mw.echo", b"echo x"),
        ("send", "requester", "stream", "mw.words", b"y z"),
        ("receive", "requester", "stream", "mw.words", b"y"),
        ("receive", "requester", "stream", "mw.words", b"z"),
        ("send", "requester", "message", "mw.any.where", b"m"),
    ]
    assert server_side.told == [
        ("receive", "responder", "request", "mw.echo", b"x"),
        ("send", "responder", "request", "mw.echo", b"echo x"),
        ("receive", "responder", "stream", "mw.words", b"y z"),
        ("send", "responder", "stream", "mw.words", b"y"),
        ("send", "responder", "stream", "mw.words", b"z"),
        ("receive", "responder", "message", "mw.any.*", b"m"),
    ]


def test_headers_go_along_both_ways(make_client: Make, make_subscriber: MakeSubscriber) -> None:
    class Ask(Middleware):
        def send(self, passage: Passage, data: bytes) -> bytes:
            if passage.side == "requester":
                passage.headers["Asked-By"] = "me"
            else:
                passage.reply_headers["Asked-Was"] = passage.headers["Asked-By"]
            return data

        def receive(self, passage: Passage, data: bytes) -> bytes:
            if passage.side == "requester":
                return data + b" " + passage.reply_headers["Asked-Was"].encode()
            return data

    make_subscriber(Ask())
    client = make_client(Ask())
    reply = client.request("mw.echo", b"x", timeout=PATIENCE, headers={"Own": "1"})
    assert (reply.data, reply.headers["Asked-Was"]) == (b"echo x me", "me")
    given = natsync.Headers({"Own": "1"})
    with client.stream("mw.words", b"y z", timeout=PATIENCE, headers=given) as stream:
        assert list(stream) == [b"y me", b"z me"]
    assert stream.headers["Asked-Was"] == "me"
    assert given.fields() == [("Own", "1")]  # the caller's are left alone


def test_around_encloses_the_handler_in_its_thread(make_client: Make, make_subscriber: MakeSubscriber) -> None:
    user: ContextVar[str] = ContextVar("user", default="nobody")
    told: list[tuple[str, str]] = []

    class Around(Middleware):
        def __init__(self, name: str) -> None:
            self.name = name

        @contextlib.contextmanager
        def around(self, passage: Passage) -> Iterator[None]:
            token = user.set(passage.headers.get("User", "?"))
            told.append(("enter " + self.name, threading.current_thread().name))
            try:
                yield
            except ValueError as error:
                told.append((f"{self.name} saw {error}", threading.current_thread().name))
                raise
            finally:
                told.append(("leave " + self.name, threading.current_thread().name))
                user.reset(token)

    subscriber = make_subscriber(Around("outer"), Around("inner"))

    @subscriber.stream("mw.user")
    def stream(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        yield user.get()
        yield user.get()

    client = make_client()
    assert list(client.stream("mw.user", headers={"User": "u"}, timeout=PATIENCE)) == [b"u", b"u"]
    eventually(lambda: len(told) == 4, PATIENCE)
    assert [what for what, _ in told] == ["enter outer", "enter inner", "leave inner", "leave outer"]
    assert len({thread for _, thread in told}) == 1
    told.clear()
    with pytest.raises(natsync.HandlerError, match="broken"):
        client.request("mw.fails", timeout=PATIENCE)
    eventually(lambda: len(told) == 6, PATIENCE)
    assert [what for what, _ in told[2:4]] == ["inner saw broken", "leave inner"]


def test_hooks_and_middleware_work_together(make_client: Make, make_subscriber: MakeSubscriber) -> None:
    done: list[tuple[str, Any]] = []

    class Log(natsync.Hooks):
        def stream_done(
            self, exchange: natsync.Exchange, seconds: float, chunks: int, size_bytes: int, error: Any
        ) -> None:
            done.append(("stream", chunks, size_bytes))  # type: ignore[arg-type]

        def response_done(
            self, exchange: natsync.Exchange, seconds: float, chunks: int, size_bytes: int, error: Any
        ) -> None:
            done.append(("response", chunks, size_bytes))  # type: ignore[arg-type]

    make_subscriber(Wrap("a"), hooks=Log())
    client = make_client(Wrap("a"), hooks=Log())
    assert list(client.stream("mw.words", b"y z", timeout=PATIENCE)) == [b"y", b"z"]
    eventually(lambda: len(done) == 2, PATIENCE)
    assert sorted(done) == [("response", 2, 8), ("stream", 2, 8)]  # as on the wire


# -- errors --------------------------------------------------------------------------------------------------------

NO = natsync.HandlerError("not you", code=natsync.Code.PERMISSION_DENIED)


@pytest.mark.parametrize("way", ["receive", "around", "send"])
def test_a_refusal_of_the_responder_reaches_the_requester_with_its_code(
    make_client: Make, make_subscriber: MakeSubscriber, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    subscriber = make_subscriber(Refuse(way, NO))
    client = make_client()
    with pytest.raises(natsync.HandlerError, match=r"^not you$") as refused:
        client.request("mw.echo", timeout=PATIENCE)
    assert refused.value.code == natsync.Code.PERMISSION_DENIED
    with pytest.raises(natsync.HandlerError, match=r"^not you$"):
        list(client.stream("mw.words", b"y z", timeout=PATIENCE))
    eventually(lambda: subscriber.stats()["failed"] == 2, PATIENCE)
    assert sorted(record.getMessage() for record in caplog.records) == [
        "handler of 'mw.echo' answered with an error: not you",
        "handler of 'mw.words' answered with an error: not you",
    ]
    assert not any(record.exc_info for record in caplog.records)  # an answer, not a fault of the program


def test_what_else_a_step_raises_is_logged_with_its_traceback(
    make_client: Make, make_subscriber: MakeSubscriber, caplog: pytest.LogCaptureFixture
) -> None:
    make_subscriber(Refuse("receive", OwnError("a fault")))
    client = make_client()
    with pytest.raises(natsync.HandlerError, match="a fault"):
        client.request("mw.echo", timeout=PATIENCE)
    with pytest.raises(natsync.HandlerError, match="a fault"):
        list(client.stream("mw.words", b"y z", timeout=PATIENCE))
    eventually(lambda: caplog.text.count("OwnError: a fault") == 2, PATIENCE)


@framed_only
def test_a_refused_streams_code_arrives_in_framed_mode(make_client: Make, make_subscriber: MakeSubscriber) -> None:
    make_subscriber(Refuse("receive", NO))
    with pytest.raises(natsync.HandlerError) as refused:
        list(make_client().stream("mw.words", b"y z", timeout=PATIENCE))
    assert refused.value.code == natsync.Code.PERMISSION_DENIED


class OwnError(Exception):
    pass


def test_what_sending_raises_at_the_requester_is_the_callers_and_nothing_is_sent(
    make_client: Make, make_subscriber: MakeSubscriber
) -> None:
    subscriber = make_subscriber()
    client = make_client(Refuse("send", OwnError("no")))
    for ask in (
        lambda: client.publish("mw.echo", b"x"),
        lambda: client.request("mw.echo", b"x", timeout=PATIENCE),
        lambda: client.request_many("mw.echo", b"x"),
        lambda: client.stream("mw.words", b"x"),
        lambda: client.stream_request("mw.words", b"x", lambda message: None),
    ):
        with pytest.raises(OwnError):
            ask()
    client.flush()
    assert subscriber.stats()["received"] == 0
    assert client.stats()["waiting_replies"] == 0


def test_what_receiving_raises_at_the_requester_cancels_its_stream(
    make_client: Make, make_subscriber: MakeSubscriber
) -> None:
    subscriber = make_subscriber()
    left = threading.Event()

    @subscriber.stream("mw.endless")
    def endless(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        try:
            while not ctx.wait(0.01):
                yield "again"
        finally:
            left.set()

    client = make_client(Refuse("receive", OwnError("no")))
    stream = client.stream("mw.endless", timeout=PATIENCE)
    with pytest.raises(OwnError):
        next(stream)
    assert left.wait(PATIENCE)
    with pytest.raises(natsync.StreamCancelled, match="OwnError"):
        next(stream)
    with pytest.raises(OwnError):
        client.request("mw.echo", timeout=PATIENCE)
    with pytest.raises(OwnError):
        client.stream_request("mw.words", b"x", lambda message: None, timeout=PATIENCE)
    with pytest.raises(OwnError):
        next(client.request_many("mw.echo", timeout=PATIENCE))
    eventually(lambda: client.stats()["waiting_replies"] == 0, PATIENCE)


def test_a_step_that_returns_no_bytes_is_named(make_client: Make) -> None:
    class Forgetful(Middleware):
        def send(self, passage: Passage, data: bytes) -> bytes:
            return None  # type: ignore[return-value]

    with pytest.raises(TypeError, match=r"Forgetful\.send\(\) returned NoneType, not bytes"):
        make_client(Forgetful()).publish("mw.x")


def test_bytes_like_returns_are_taken(make_client: Make) -> None:
    class Other(Middleware):
        def send(self, passage: Passage, data: bytes) -> Any:
            return bytearray(data) if passage.side == "requester" else memoryview(data)

    client = make_client(Other())
    client.subscribe("mw.other", lambda message: message.respond(message.data))
    assert client.request("mw.other", b"x", timeout=PATIENCE).data == b"x"


@pytest.mark.parametrize("given", [Middleware(), Middleware, [Middleware], ["x"], None, "x"])
def test_what_is_no_list_of_middleware_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"a list of natsync\.Middleware"):
        natsync.Client(middleware=given)
    with pytest.raises(TypeError):
        natsync.Subscriber(middleware=given)
    with pytest.raises(TypeError):
        checked(given)


# -- without -------------------------------------------------------------------------------------------------------


def test_without_middleware_nothing_of_it_is_made(make_client: Make, make_subscriber: MakeSubscriber) -> None:
    """The classes are the plain ones, so that a chunk takes the same steps as before there was middleware."""
    cores: list[Any] = []

    def handler(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        cores.append(sender._core)
        sender.end()

    subscriber, client = make_subscriber(), make_client()
    subscriber.stream_subscribe("mw.plain", handler)
    stream = client.stream("mw.plain", timeout=PATIENCE)
    assert list(stream) == []
    assert type(stream) is Stream
    assert type(cores[0]) in (FramedSender, PlainSender)
    assert type(client.subscribe("mw.plain.messages")) is Subscription
    assert chain_of(()) is None


def test_steps_that_do_nothing_are_left_out() -> None:
    class Nothing(Middleware):
        pass

    chain = chain_of([Nothing(), Wrap("a")])
    assert chain is not None
    assert (len(chain.sends), len(chain.receives), len(chain.arounds)) == (1, 1, 0)


def test_the_pools_clients_have_it_too(nats_server: NatsServer, make_subscriber: MakeSubscriber, mode: str) -> None:
    make_subscriber(*BOTH)
    with natsync.ConnectionPool(nats_server.url, max_size=1, middleware=BOTH, framed=mode == "framed") as pool:
        assert pool.request("mw.echo", b"x", timeout=PATIENCE).data == b"echo x"
        with pool.stream("mw.words", b"y z", timeout=PATIENCE) as stream:
            assert list(stream) == [b"y", b"z"]
