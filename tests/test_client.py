"""Client: publish, request, connect, reconnect, events, credentials and forks, against a real nats-server."""

from __future__ import annotations

import logging
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import broker
import natsync
from natsync.protocol import Pub, Request, Sub, Unsub
from natsync.session import Session
from natsync.testing import NatsServer, PeerConnection, ScriptedPeer, eventually
from rawclient import PATIENCE, RawClient, RecordingServer
from support import run_python, shown

Make = Callable[..., NatsServer]


@pytest.fixture
def client(natsync_client: natsync.Client) -> natsync.Client:
    return natsync_client.open()


@pytest.fixture
def subscriber(natsync_subscriber: natsync.Subscriber) -> natsync.Subscriber:
    """With a handler that echoes."""
    natsync_subscriber.handler("c.echo")(lambda ctx, request: request.data)
    return natsync_subscriber.open()


@pytest.fixture
def raw(nats_server: NatsServer) -> Iterator[RawClient]:
    with RawClient(nats_server.url) as raw:
        yield raw


@pytest.fixture
def dead_url() -> Iterator[str]:
    """The URL of a server that is not there: its port is taken, and refuses."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"nats://127.0.0.1:{bound.getsockname()[1]}"


class Events(broker.Events):
    """With the threads that told of them."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[str] = set()

    def __call__(self, name: str, info: dict[str, Any]) -> None:
        self.threads.add(threading.current_thread().name)
        super().__call__(name, info)


# -- publish -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "data"),
    [(b"b", b"b"), ("tëxt", "tëxt".encode()), (bytearray(b"ba"), b"ba"), (memoryview(b"mv"), b"mv"), (b"", b"")],
    ids=shown,
)
def test_publish_sends_bytes_like_and_text(client: natsync.Client, raw: RawClient, payload: Any, data: bytes) -> None:
    raw.subscribe("c.publish")
    client.publish("c.publish", payload)
    assert raw.next().payload == data


def test_publish_without_a_payload_sends_an_empty_message(client: natsync.Client, raw: RawClient) -> None:
    raw.subscribe("c.publish")
    client.publish("c.publish")
    assert raw.next().payload == b""


@pytest.mark.parametrize("value", [None, 0, "", [], {"a": "ü"}], ids=repr)
def test_publish_json_sends_any_json_value(client: natsync.Client, value: object) -> None:
    subscription = client.subscribe("c.json")
    client.publish("c.json", json=value)
    assert subscription.next(PATIENCE).json() == value


def test_publish_keeps_the_order_of_each_thread(client: natsync.Client) -> None:
    subscription = client.subscribe("c.order")

    def publish(thread: int) -> None:
        for n in range(500):
            client.publish("c.order", f"{thread}:{n}")

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(publish, thread) for thread in range(8)]:
            done.result(PATIENCE)
    texts = [subscription.next(PATIENCE).text() for _ in range(4000)]
    for thread in range(8):
        own = [text for text in texts if text.startswith(f"{thread}:")]
        assert own == [f"{thread}:{n}" for n in range(500)]


def test_publish_sends_headers_with_order_case_and_repeats(client: natsync.Client) -> None:
    subscription = client.subscribe("c.headers")
    headers = natsync.Headers({"B-Key": "1", "a-key": ["x", "y"]})
    headers.add("B-Key", "2 with spaces: and colons")
    client.publish("c.headers", b"data", headers=headers)
    message = subscription.next(PATIENCE)
    assert message.headers.fields() == [
        ("B-Key", "1"), ("a-key", "x"), ("a-key", "y"), ("B-Key", "2 with spaces: and colons")
    ]  # fmt: skip
    assert message.headers["b-key"] == "1"
    assert message.data == b"data"


def test_headers_that_were_received_can_be_sent_on_whatever_bytes_they_hold(
    client: natsync.Client, raw: RawClient
) -> None:
    raw.subscribe("c.onward")
    subscription = client.subscribe("c.odd")
    client.flush()
    block = b"NATS/1.0\r\nOdd: \xff\xfe\r\n\r\n"
    raw.publish("c.odd", b"", block=block)
    client.publish("c.onward", headers=subscription.next(PATIENCE).headers)
    assert raw.next().block == block


def test_a_message_with_unreadable_headers_is_delivered_and_marked(client: natsync.Client, raw: RawClient) -> None:
    subscription = client.subscribe("c.malformed")
    client.flush()
    raw.publish("c.malformed", b"data", block=b"NATS/1.0\r\nno colon here\r\n\r\n")
    message = subscription.next(PATIENCE)
    assert (message.data, dict(message.headers), message.malformed) == (b"data", {}, True)


def test_respond_answers_to_the_reply_subject(client: natsync.Client, raw: RawClient) -> None:
    subscription = client.subscribe("c.respond")
    client.flush()
    raw.request("c.respond", b"?")
    message = subscription.next(PATIENCE)
    message.respond(b"!", headers={"K": "v"})
    message.respond(json=[1])
    first, second = raw.next(), raw.next()
    assert (first.payload, first.block) == (b"!", b"NATS/1.0\r\nK: v\r\n\r\n")
    assert second.payload == b"[1]"


def test_respond_without_a_reply_subject_is_refused(client: natsync.Client) -> None:
    subscription = client.subscribe("c.respond")
    client.publish("c.respond")
    with pytest.raises(natsync.InvalidArgument, match="no reply subject"):
        subscription.next(PATIENCE).respond(b"!")


def test_flush_returns_when_the_server_has_everything(client: natsync.Client, raw: RawClient) -> None:
    raw.subscribe("c.flush")
    for n in range(1000):
        client.publish("c.flush", b"%d" % n)
    client.flush()
    assert [one.payload for one in raw.received()] == [b"%d" % n for n in range(1000)]


def test_flush_raises_timed_out_when_the_server_does_not_answer(make_nats_server: Make) -> None:
    server = make_nats_server()
    with natsync.connect(server.url) as client:
        server.pause()
        begin = time.monotonic()
        with pytest.raises(natsync.TimedOut):
            client.flush(timeout=0.2)
        assert 0.19 <= time.monotonic() - begin < 5
        server.resume()
        client.flush()


def test_flushes_of_many_threads_each_get_their_answer(client: natsync.Client) -> None:
    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(client.flush, PATIENCE) for _ in range(200)]:
            done.result(PATIENCE)


def test_rtt_is_a_few_milliseconds_here(client: natsync.Client) -> None:
    assert 0 < min(client.rtt() for _ in range(10)) < 1


def test_no_echo_withholds_ones_own_messages(nats_server: NatsServer, raw: RawClient) -> None:
    with natsync.connect(nats_server.url, no_echo=True) as client:
        subscription = client.subscribe("c.echoes")
        client.publish("c.echoes", b"own")
        client.flush()
        raw.publish("c.echoes", b"foreign")
        assert subscription.next(PATIENCE).data == b"foreign"


# -- request -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("subscriber")
def test_request_returns_the_reply(client: natsync.Client) -> None:
    reply = client.request("c.echo", b"ping")
    assert isinstance(reply, natsync.Message)
    assert (reply.data, reply.text()) == (b"ping", "ping")


@pytest.mark.usefixtures("subscriber")
def test_request_json_and_reply_json(client: natsync.Client) -> None:
    assert client.request("c.echo", json={"a": [1, "ü"]}).json() == {"a": [1, "ü"]}


def test_request_sends_headers_and_returns_those_of_the_reply(client: natsync.Client) -> None:
    client.subscribe("c.h", lambda message: message.respond(b"", headers={"Seen": message.headers["Trace"]}))
    assert client.request("c.h", headers={"Trace": "77"}).headers["Seen"] == "77"


def test_request_nobody_listens_to_fails_at_once(client: natsync.Client) -> None:
    begin = time.monotonic()
    with pytest.raises(natsync.NoRespondersError, match=r"c\.nobody"):
        client.request("c.nobody", timeout=30)
    assert time.monotonic() - begin < 5


def test_request_an_empty_reply_is_not_taken_for_no_responders(client: natsync.Client, raw: RawClient) -> None:
    raw.subscribe("c.empty")
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(client.request, "c.empty", timeout=PATIENCE)
        raw.answer(raw.next(), b"")
        assert reply.result(PATIENCE).data == b""


def test_request_raises_request_timeout_that_says_it_may_have_run(client: natsync.Client, raw: RawClient) -> None:
    raw.subscribe("c.silent")
    client.flush()
    begin = time.monotonic()
    with pytest.raises(natsync.RequestTimeout, match="may have run") as caught:
        client.request("c.silent", timeout=0.1)
    assert 0.09 <= time.monotonic() - begin < 5
    assert caught.value.sent is True
    assert isinstance(caught.value, TimeoutError)


def test_request_while_there_is_no_link_raises_request_timeout_that_says_it_was_not_sent(
    make_nats_server: Make,
) -> None:
    server = make_nats_server()
    with natsync.connect(server.url) as client:
        server.kill()
        eventually(lambda: client.status == "reconnecting")
        with pytest.raises(natsync.RequestTimeout, match="not sent") as caught:
            client.request("c.x", timeout=0.1)
        assert caught.value.sent is False
        server.start()
        with RawClient(server.url) as raw:
            raw.subscribe(">")
            eventually(lambda: client.status == "connected")
            client.flush()
            assert raw.received() == []  # it was taken back: it does not run later


def test_request_that_timed_out_leaves_nothing_behind(client: natsync.Client, raw: RawClient) -> None:
    raw.subscribe("c.silent")
    for _ in range(100):
        with pytest.raises(natsync.RequestTimeout):
            client.request("c.silent", timeout=0)
    assert client.stats()["waiting_replies"] == 0


def test_late_replies_are_counted_and_reach_nobody(client: natsync.Client, raw: RawClient) -> None:
    raw.subscribe("c.late")
    client.flush()
    with pytest.raises(natsync.RequestTimeout):
        client.request("c.late", timeout=0.3)
    late = raw.next()
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(client.request, "c.late", timeout=PATIENCE)
        request = raw.next()
        raw.answer(late, b"too late", b"much too late")
        raw.answer(request, b"in time")
        assert reply.result(PATIENCE).data == b"in time"
    assert client.stats()["late_replies"] == 2


def test_only_the_first_of_several_replies_counts(client: natsync.Client) -> None:
    client.subscribe("c.many", lambda message: [message.respond(b"%d" % n) for n in range(3)])
    assert client.request("c.many").data == b"0"
    client.flush()
    eventually(lambda: client.stats()["late_replies"] == 2)


def test_requests_share_one_wildcard_inbox(nats_server: NatsServer) -> None:
    def answer(server: RecordingServer, connection: PeerConnection, request: Request) -> None:
        if isinstance(request, Pub):
            server.deliver(connection, request, request.payload)

    with RecordingServer(answer) as server, natsync.connect(server.url) as client:
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda n: client.request("c.x", b"%d" % n).data, range(20)))
        assert replies == [b"%d" % n for n in range(20)]
        (sub,) = server.subs
        assert re.fullmatch(rb"_INBOX\.[0-9A-Za-z]{22}\.\*", sub.subject)
        assert not [one for one in server.requests if isinstance(one, Unsub)]
        inboxes = [pub.reply for pub in server.pubs]
        assert len(set(inboxes)) == 20
        assert all(inbox and inbox.startswith(sub.subject[:-1]) for inbox in inboxes)


def test_the_inbox_prefix_is_an_option(raw: RawClient, nats_server: NatsServer) -> None:
    raw.subscribe("c.prefix")
    with natsync.connect(nats_server.url, inbox_prefix="_MY.box") as client, ThreadPoolExecutor() as pool:
        reply = pool.submit(client.request, "c.prefix", timeout=PATIENCE)
        request = raw.next()
        assert request.reply is not None
        assert request.reply.startswith(b"_MY.box.")
        raw.answer(request, b"x")
        assert reply.result(PATIENCE).data == b"x"


@pytest.mark.usefixtures("subscriber")
def test_requests_of_many_threads_are_never_mixed_up(client: natsync.Client) -> None:
    def ask(thread: int) -> None:
        for n in range(50):
            data = b"%d/%d" % (thread, n)
            assert client.request("c.echo", data, timeout=30).data == data

    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(ask, thread) for thread in range(16)]:
            done.result(30)


@pytest.mark.usefixtures("subscriber")
def test_a_request_inside_a_callback_works(client: natsync.Client) -> None:
    replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    client.subscribe("c.callback", lambda message: replies.put(client.request("c.echo", message.data).data))
    for n in range(10):
        client.publish("c.callback", b"%d" % n)
    assert [replies.get(timeout=PATIENCE) for _ in range(10)] == [b"%d" % n for n in range(10)]


def test_more_blocking_requests_in_callbacks_than_pynats2_has_threads_do_not_deadlock(
    client: natsync.Client,
) -> None:
    together = threading.Barrier(8, timeout=PATIENCE)
    replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    client.subscribe("c.inner", lambda message: message.respond(b"%d" % together.wait()), concurrency=8)
    for n in range(8):
        client.subscribe(f"c.outer.{n}", lambda message: replies.put(client.request("c.inner", timeout=PATIENCE).data))
        client.publish(f"c.outer.{n}")
    assert sorted(replies.get(timeout=PATIENCE) for _ in range(8)) == [b"%d" % n for n in range(8)]


def test_request_ends_with_its_context(client: natsync.Client, raw: RawClient) -> None:
    raw.subscribe("c.silent")
    ctx = natsync.Context()
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(client.request, "c.silent", ctx=ctx, timeout=30)
        raw.next()
        ctx.cancel("nobody needs it")
        with pytest.raises(natsync.Cancelled, match="nobody needs it"):
            reply.result(PATIENCE)
    with pytest.raises(natsync.DeadlineExceeded):
        client.request("c.silent", ctx=natsync.Context().with_timeout(0.05), timeout=30)
    assert client.stats()["waiting_replies"] == 0


def test_request_retries_while_nobody_listens(client: natsync.Client) -> None:
    retry = natsync.Retry(attempts=None, initial=0.02, maximum=0.02)
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(client.request, "c.soon", timeout=PATIENCE, retry=retry)
        with pytest.raises(natsync.NoRespondersError):
            client.request("c.soon")
        client.subscribe("c.soon", lambda message: message.respond(b"here"))
        assert reply.result(PATIENCE).data == b"here"


def test_request_with_retry_does_not_repeat_what_may_have_run(client: natsync.Client, raw: RawClient) -> None:
    raw.subscribe("c.once")
    with pytest.raises(natsync.HandlerError):
        with ThreadPoolExecutor() as pool:
            reply = pool.submit(client.request, "c.once", retry=natsync.Retry(initial=0.01), timeout=PATIENCE)
            request = raw.next()
            assert request.reply is not None
            raw.publish(request.reply, b"", block=b"NATS/1.0\r\nNats-Service-Error: no\r\n\r\n")
            reply.result(PATIENCE)
    assert raw.received() == []


def test_retries_of_a_request_share_its_timeout(client: natsync.Client) -> None:
    retry = natsync.Retry(attempts=None, initial=0.05, maximum=0.05)
    begin = time.monotonic()
    with pytest.raises(natsync.NatsError):
        client.request("c.nobody", timeout=0.3, retry=retry)
    assert 0.2 < time.monotonic() - begin < 5


def test_a_request_under_way_when_the_link_breaks_says_that_it_may_have_run(make_nats_server: Make) -> None:
    server = make_nats_server()
    with natsync.connect(server.url) as client, RawClient(server.url) as raw:
        raw.subscribe("c.silent")
        with ThreadPoolExecutor() as pool:
            reply = pool.submit(client.request, "c.silent", timeout=30)
            raw.next()
            server.kill()
            with pytest.raises(natsync.ConnectionLost) as caught:
                reply.result(PATIENCE)
        assert caught.value.sent is True


# -- opening -------------------------------------------------------------------------------------------------------


def test_the_first_use_connects(nats_server: NatsServer) -> None:
    client = natsync.Client(nats_server.url)
    assert client.status == "new"
    client.publish("c.x")
    assert client.status == "connected"
    client.close()
    assert client.status == "closed"


def test_open_and_connect_and_with_connect_at_once(nats_server: NatsServer) -> None:
    opened = natsync.Client(nats_server.url)
    assert opened.open() is opened
    assert opened.open() is opened
    with natsync.connect(nats_server.url) as connected, natsync.Client(nats_server.url) as entered:
        assert (opened.status, connected.status, entered.status) == ("connected",) * 3
        assert entered.server_info["max_payload"] == 1 << 20
    opened.close()


def test_many_threads_first_use_makes_one_connection() -> None:
    with RecordingServer() as server, natsync.Client(server.url) as client:
        with ThreadPoolExecutor(16) as pool:
            for done in [pool.submit(client.publish, "c.x") for _ in range(64)]:
                done.result(PATIENCE)
        client.flush()
        assert server.accepted == 1
        assert len(server.pubs) == 64


@pytest.mark.parametrize("form", ["list", "commas", "environment"])
def test_servers_may_be_a_list_a_string_or_the_environment(
    nats_server: NatsServer, dead_url: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [dead_url, nats_server.url]
    monkeypatch.setenv("NATS_URL", ",".join(both) if form == "environment" else "nats://127.0.0.1:1")
    servers = {"list": both, "commas": ", ".join(both), "environment": None}[form]
    with natsync.connect(servers) as client:
        assert client.stats()["server"] == nats_server.url


def test_a_url_without_scheme_or_port_has_the_usual_ones(nats_server: NatsServer) -> None:
    with natsync.connect(f"127.0.0.1:{nats_server.port}") as client:
        assert client.status == "connected"
    assert repr(natsync.Client("nats.example")) == "<Client nats://nats.example:4222: new>"


def test_connect_without_a_server_says_for_each_what_went_wrong(dead_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        silent = f"nats://127.0.0.1:{deaf.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(natsync.NoServersError) as caught:
            natsync.connect([dead_url, silent], connect_timeout=0.3)
        assert 0.25 < time.monotonic() - begin < 10
    causes = caught.value.causes
    assert set(causes) == {dead_url, silent}
    assert isinstance(causes[dead_url], ConnectionError)
    assert isinstance(causes[silent], natsync.TimedOut)
    assert "refused" in str(caught.value)
    assert "0.3 s" in str(caught.value)


def test_a_client_that_could_not_connect_tries_again_at_its_next_use(make_nats_server: Make) -> None:
    server = make_nats_server()
    server.kill()
    client = natsync.Client(server.url)
    for _ in range(2):
        with pytest.raises(natsync.NoServersError):
            client.publish("c.x")
    server.start()
    client.publish("c.x")
    client.flush()
    client.close()


def test_retry_on_failed_connect_connects_in_the_background(make_nats_server: Make) -> None:
    server = make_nats_server()
    server.kill()
    with natsync.connect(server.url, retry_on_failed_connect=True, reconnect_wait=0.02) as client:
        assert client.status == "reconnecting"
        subscription = client.subscribe("c.background")
        client.publish("c.background", b"before there was a link")
        server.start()
        assert subscription.next(PATIENCE).data == b"before there was a link"
        eventually(lambda: client.status == "connected")


def test_every_verb_after_close_raises_connection_closed(nats_server: NatsServer) -> None:
    client = natsync.connect(nats_server.url)
    client.close()
    for verb in (
        lambda: client.publish("c.x"),
        lambda: client.request("c.x"),
        lambda: client.subscribe("c.x"),
        lambda: client.stream("c.x"),
        lambda: client.stream_request("c.x", b"", print),
        client.flush,
        client.rtt,
        client.open,
    ):
        with pytest.raises(natsync.ConnectionClosed):
            verb()
    never_opened = natsync.Client(nats_server.url)
    never_opened.close()
    with pytest.raises(natsync.ConnectionClosed):
        never_opened.publish("c.x")


# -- closing -------------------------------------------------------------------------------------------------------


def test_close_flushes(nats_server: NatsServer, raw: RawClient) -> None:
    raw.subscribe("c.close")
    with natsync.connect(nats_server.url) as client:
        for n in range(5000):
            client.publish("c.close", b"%d" % n)
    assert [one.payload for one in raw.received()] == [b"%d" % n for n in range(5000)]


def test_close_wakes_a_waiting_request(nats_server: NatsServer, raw: RawClient) -> None:
    raw.subscribe("c.silent")
    client = natsync.connect(nats_server.url)
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(client.request, "c.silent", timeout=30)
        raw.next()
        client.close()
        with pytest.raises(natsync.ConnectionClosed):
            reply.result(PATIENCE)


#: Each waits for an answer until the client is closed.
ASKING: dict[str, Callable[[natsync.Client], object]] = {
    "request": lambda client: client.request("c.silent", timeout=30),
    "request with Retry": lambda client: client.request("c.silent", timeout=30, retry=natsync.Retry(idempotent=True)),
    "request_many": lambda client: next(client.request_many("c.silent", timeout=30)),
    "stream": lambda client: client.stream("c.silent").next(30),
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_what_is_under_way_at_close_is_told_that_it_may_have_run(
    nats_server: NatsServer, raw: RawClient, ask: Callable[[natsync.Client], object]
) -> None:
    raw.subscribe("c.silent")
    client = natsync.connect(nats_server.url)
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(ask, client)
        raw.next()
        client.close()
        with pytest.raises(natsync.ConnectionClosed) as raised:
            reply.result(PATIENCE)
    assert raised.value.sent is True
    with pytest.raises(natsync.ConnectionClosed) as raised:
        ask(client)
    assert raised.value.sent is False


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_what_waits_for_a_link_at_close_is_told_that_it_was_not_sent(
    make_nats_server: Make, ask: Callable[[natsync.Client], object]
) -> None:
    server = make_nats_server()
    client = natsync.connect(server.url)
    server.kill()
    eventually(lambda: client.status == "reconnecting")
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(ask, client)
        eventually(lambda: client.stats()["out_pending_bytes"] > 0)
        client.close()
        with pytest.raises(natsync.ConnectionClosed) as raised:
            reply.result(PATIENCE)
    assert raised.value.sent is False


def is_behind(client: natsync.Client) -> bool:
    """Whether the link takes nothing any more, and 2 MiB wait for it, which is less than publishers wait for."""
    while client.stats()["out_pending_bytes"] < 2 << 20:
        client.publish("c.flood", bytes(60_000))
    taken = client.stats()["out_bytes"]
    time.sleep(0.5)
    return client.stats()["out_pending_bytes"] >= 2 << 20 and client.stats()["out_bytes"] == taken  # type: ignore[no-any-return]


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_what_waits_behind_a_link_that_takes_nothing_at_close_is_told_that_it_was_not_sent(
    make_nats_server: Make, ask: Callable[[natsync.Client], object]
) -> None:
    server = make_nats_server()
    client = natsync.connect(server.url)
    server.pause()
    try:
        eventually(lambda: is_behind(client), PATIENCE)
        before = client.stats()["out_messages"]
        with ThreadPoolExecutor() as pool:
            reply = pool.submit(ask, client)
            eventually(lambda: client.stats()["out_messages"] > before)
            client.close(0.1)
            with pytest.raises(natsync.ConnectionClosed) as raised:
                reply.result(PATIENCE)
        assert raised.value.sent is False
    finally:
        server.resume()


def test_close_does_not_wait_longer_than_its_timeout(make_nats_server: Make, caplog: pytest.LogCaptureFixture) -> None:
    server = make_nats_server()
    client = natsync.connect(server.url)
    server.pause()
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING, "natsync"):
        client.close(timeout=0.2)
    assert time.monotonic() - begin < 4
    assert "closed without the server's word" in caplog.text
    server.resume()


def test_drain_has_callbacks_handle_what_came_and_closes(nats_server: NatsServer, raw: RawClient) -> None:
    client = natsync.connect(nats_server.url)
    go_on, seen = threading.Event(), []

    def callback(message: natsync.Message) -> None:
        go_on.wait(PATIENCE)
        seen.append(message.data)
        client.publish("c.drained", message.data)

    raw.subscribe("c.drained")
    client.subscribe("c.drain", callback)
    client.flush()
    for n in range(20):
        raw.publish("c.drain", b"%d" % n)
    raw.flush()
    with ThreadPoolExecutor() as pool:
        draining = pool.submit(client.drain, PATIENCE)
        eventually(lambda: client.status == "draining")
        go_on.set()
        draining.result(PATIENCE)
    assert seen == [b"%d" % n for n in range(20)]
    assert [one.payload for one in raw.received()] == seen
    assert client.status == "closed"


def test_drain_raises_drain_timeout_and_closes_all_the_same(nats_server: NatsServer) -> None:
    client = natsync.connect(nats_server.url)
    stuck, entered = threading.Event(), threading.Event()

    def callback(message: natsync.Message) -> None:
        entered.set()
        stuck.wait(PATIENCE)

    client.subscribe("c.stuck", callback)
    client.publish("c.stuck")
    assert entered.wait(PATIENCE)
    begin = time.monotonic()
    try:
        with pytest.raises(natsync.DrainTimeout, match=r"c\.stuck"):
            client.drain(timeout=0.2)
        assert time.monotonic() - begin < 5
        assert client.status == "closed"
    finally:
        stuck.set()


# -- reconnecting --------------------------------------------------------------------------------------------------


def test_after_a_restart_subscriptions_and_buffered_messages_are_there_in_order(make_nats_server: Make) -> None:
    server = make_nats_server()
    with natsync.connect(server.url, reconnect_wait=0.02) as client:
        subscription = client.subscribe("c.again")
        client.publish("c.again", b"before")
        assert subscription.next(PATIENCE).data == b"before"
        server.kill()
        eventually(lambda: client.status == "reconnecting")
        for n in range(500):
            client.publish("c.again", b"%d" % n)
        server.start()
        eventually(lambda: client.status == "connected")
        client.publish("c.again", b"after")
        taken = [subscription.next(PATIENCE).data for _ in range(501)]
        assert taken == [b"%d" % n for n in range(500)] + [b"after"]
        assert client.stats()["reconnects"] == 1
        client.subscribe("c.reply", lambda message: message.respond(b"works"))
        assert client.request("c.reply").data == b"works"


def test_threads_publishing_through_restarts_double_and_tear_nothing(make_nats_server: Make) -> None:
    server = make_nats_server()
    stop = threading.Event()
    with (
        natsync.connect(server.url, reconnect_wait=0.02, reconnect_buffer_bytes=1 << 30) as client,
        natsync.connect(server.url, reconnect_wait=0.02) as observer,
    ):
        subscription = observer.subscribe("c.through", pending_messages=1 << 20)
        observer.flush()

        def publish(thread: int) -> int:
            n = 0
            while not stop.is_set():
                client.publish("c.through", b"%d:%d:" % (thread, n) + b"x" * 100)
                n += 1
                if not n % 50:
                    stop.wait(0.001)
            return n

        with ThreadPoolExecutor(4) as pool:
            counts = [pool.submit(publish, thread) for thread in range(4)]
            for restart in (1, 2):
                eventually(lambda before=subscription.pending: subscription.pending > before + 100)
                server.kill()
                server.start()
                eventually(lambda restart=restart: client.stats()["reconnects"] == restart)
                eventually(lambda restart=restart: observer.stats()["reconnects"] == restart)
            stop.set()
            for count in counts:
                count.result(PATIENCE)
        client.flush()
        observer.flush()
        texts = [subscription.next(0).data for _ in range(subscription.pending)]
    for thread in range(4):
        own = [text for text in texts if text.startswith(b"%d:" % thread)]
        numbers = [int(text.split(b":")[1]) for text in own]
        assert numbers == sorted(set(numbers))
        assert all(text.endswith(b":" + b"x" * 100) for text in own)


def test_the_reconnect_buffer_is_bounded_and_says_so(make_nats_server: Make) -> None:
    server = make_nats_server()
    with natsync.connect(server.url, reconnect_buffer_bytes=10_000) as client:
        server.kill()
        eventually(lambda: client.status == "reconnecting")
        with pytest.raises(natsync.ReconnectBufferFull, match="10000 bytes"):
            for _ in range(100):
                client.publish("c.full", b"x" * 1000)
        begin = time.monotonic()
        with pytest.raises(natsync.ReconnectBufferFull):
            client.publish("c.full", b"x" * 1000)
        assert time.monotonic() - begin < 5


def test_a_buffer_of_0_bytes_refuses_to_publish_without_a_link(make_nats_server: Make) -> None:
    server = make_nats_server()
    with natsync.connect(server.url, reconnect_buffer_bytes=0) as client:
        server.kill()
        eventually(lambda: client.status == "reconnecting")
        with pytest.raises(natsync.ReconnectBufferFull):
            client.publish("c.full", b"x")


def test_two_servers_when_one_dies_the_other_takes_over(make_nats_server: Make) -> None:
    servers = {server.url: server for server in (make_nats_server(), make_nats_server())}
    events = Events()
    with natsync.connect(list(servers), on_event=events) as client:
        subscription = client.subscribe("c.failover")
        first = client.stats()["server"]
        servers[first].kill()
        eventually(lambda: client.stats()["server"] in set(servers) - {first})
        client.publish("c.failover", b"from the other")
        assert subscription.next(PATIENCE).data == b"from the other"
        eventually(lambda: events.names == ["connected", "disconnected", "reconnected"])
        assert events.all[-1][1]["server"] == client.stats()["server"]


def test_without_reconnect_a_lost_link_closes_the_client(make_nats_server: Make) -> None:
    server = make_nats_server()
    events = Events()
    with natsync.connect(server.url, reconnect=False, on_event=events) as client:
        subscription = client.subscribe("c.x")
        server.kill()
        eventually(lambda: client.status == "closed")
        with pytest.raises(natsync.ConnectionClosed):
            subscription.next(PATIENCE)
        with pytest.raises(natsync.ConnectionClosed):
            client.publish("c.x")
        assert events.wait("closed")["reason"]


def test_max_reconnects_gives_up_in_the_end(make_nats_server: Make) -> None:
    server = make_nats_server()
    with natsync.connect(server.url, max_reconnects=2, reconnect_wait=0.02, reconnect_wait_max=0.02) as client:
        server.kill()
        eventually(lambda: client.status == "closed")
        with pytest.raises(natsync.ConnectionClosed, match="no server could be reached"):
            client.publish("c.x")


def test_a_server_that_goes_silent_is_noticed_by_pings(make_nats_server: Make) -> None:
    server = make_nats_server()
    with natsync.connect(server.url, ping_interval=0.5, reconnect_wait=0.02) as client:
        server.pause()
        eventually(lambda: client.status == "reconnecting", 10)
        server.resume()
        eventually(lambda: client.status == "connected")
        client.flush()


# -- events --------------------------------------------------------------------------------------------------------


def test_events_tell_connected_disconnected_reconnected_closed_on_a_worker(make_nats_server: Make) -> None:
    server = make_nats_server()
    events = Events()
    client = natsync.connect(server.url, on_event=events, reconnect_wait=0.02, name="told")
    eventually(lambda: events.names == ["connected"])
    assert events.all[0][1] == {"server": server.url}
    server.kill()
    eventually(lambda: events.names[-1] == "disconnected")
    assert events.all[-1][1]["reason"]
    server.start()
    eventually(lambda: events.names[-1] == "reconnected")
    client.close()
    eventually(lambda: events.names[-1] == "closed")
    assert events.names == ["connected", "disconnected", "reconnected", "closed"]
    assert events.all[-1][1] == {"reason": None}
    assert all(name.startswith("natsync-told-worker") for name in events.threads)


def test_an_event_callback_that_raises_or_exits_is_called_again(
    make_nats_server: Make, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_nats_server()
    names: list[str] = []

    def on_event(name: str, details: dict[str, Any]) -> None:
        names.append(name)
        raise SystemExit(1) if name == "connected" else ValueError("a fault in on_event")

    with natsync.connect(server.url, on_event=on_event, reconnect_wait=0.02):
        eventually(lambda: names == ["connected"])
        server.kill()
        server.start()
        eventually(lambda: names == ["connected", "disconnected", "reconnected"])
    assert "a fault in on_event" in caplog.text


def test_an_event_callback_may_use_the_client(make_nats_server: Make) -> None:
    server = make_nats_server()
    flushed = threading.Event()

    def on_event(name: str, details: dict[str, Any]) -> None:
        if name == "reconnected":
            client.flush()
            flushed.set()

    with natsync.connect(server.url, on_event=on_event, reconnect_wait=0.02) as client:
        server.kill()
        server.start()
        assert flushed.wait(PATIENCE)


def test_a_slow_consumer_is_an_event_once_an_episode(nats_server: NatsServer, raw: RawClient) -> None:
    events = Events()
    with natsync.connect(nats_server.url, on_event=events) as client:
        subscription = client.subscribe("c.slow", pending_messages=2)
        client.flush()
        for episode in (1, 2):
            for _ in range(10):
                raw.publish("c.slow")
            eventually(lambda episode=episode: subscription.dropped == 8 * episode)
            assert [subscription.next(0).data for _ in range(2)] == [b"", b""]
        eventually(lambda: events.names.count("slow_consumer") == 2)
        assert events.all[-1][1]["subject"] == "c.slow"


def test_what_the_server_complains_of_is_an_event(make_nats_server: Make) -> None:
    server = make_nats_server(
        config='authorization { users: [{user: u, password: S3CRET, permissions: {publish: "allowed.>"}}] }'
    )
    events = Events()
    with natsync.connect(server.url, user="u", password="S3CRET", on_event=events) as client:
        client.publish("forbidden.x")
        assert "Permissions Violation" in events.wait("error")["error"]
        assert client.status == "connected"


# -- credentials ---------------------------------------------------------------------------------------------------

PASSWORD = "S3CRET/ü@:?"
QUOTED = "S3CRET%2F%C3%BC%40%3A%3F"


@pytest.fixture
def guarded(make_nats_server: Make) -> NatsServer:
    return make_nats_server(config=f'authorization {{ user: alice, password: "{PASSWORD}", timeout: 2 }}')


def with_userinfo(url: str, userinfo: str) -> str:
    return url.replace("nats://", f"nats://{userinfo}@")


@pytest.mark.parametrize("how", ["url", "options", "url before options"])
def test_user_and_password_come_from_the_url_or_the_options(guarded: NatsServer, how: str) -> None:
    url, options = {
        "url": (with_userinfo(guarded.url, f"alice:{QUOTED}"), {}),
        "options": (guarded.url, {"user": "alice", "password": PASSWORD}),
        "url before options": (with_userinfo(guarded.url, f"alice:{QUOTED}"), {"user": "bob", "password": "x"}),
    }[how]
    with natsync.connect(url, **options) as client:
        client.flush()


@pytest.mark.parametrize("how", ["url", "options"])
def test_a_token_comes_from_the_url_or_the_options(make_nats_server: Make, how: str) -> None:
    server = make_nats_server(config='authorization { token: "t0k3n" }')
    url, options = (with_userinfo(server.url, "t0k3n"), {}) if how == "url" else (server.url, {"token": "t0k3n"})
    with natsync.connect(url, **options) as client:
        client.flush()


def test_a_wrong_password_is_an_authorization_error_without_the_password(
    guarded: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    begin = time.monotonic()
    with caplog.at_level(logging.DEBUG, "natsync"), pytest.raises(natsync.AuthorizationError) as caught:
        natsync.connect(with_userinfo(guarded.url, "alice:wr0ng-pass"))
    assert time.monotonic() - begin < 5
    error = caught.value
    assert isinstance(error, natsync.NoServersError)
    assert list(error.causes) == [guarded.url]
    assert isinstance(error.causes[guarded.url], natsync.AuthorizationError)
    everything = [str(error), repr(error), caplog.text, *map(str, error.causes.values())]
    assert not any("wr0ng-pass" in text for text in everything)
    assert "Authorization Violation" in str(error)


def test_no_credentials_where_they_are_needed_is_an_authorization_error(guarded: NatsServer) -> None:
    with pytest.raises(natsync.AuthorizationError):
        natsync.connect(guarded.url)


def test_one_server_that_refuses_does_not_hide_that_another_is_down(guarded: NatsServer, dead_url: str) -> None:
    with pytest.raises(natsync.NoServersError) as caught:
        natsync.connect([guarded.url, dead_url])
    assert not isinstance(caught.value, natsync.AuthorizationError)
    assert len(caught.value.causes) == 2


def test_options_never_show_secrets() -> None:
    options = natsync.ConnectOptions(token="S3CRET")
    client = natsync.Client("nats://bob:S3CRET@localhost", user="alice", password="S3CRET")
    assert "S3CRET" not in f"{options!r} {client!r} {client.stats()}"


# -- faults of the reader that pynats2 had -------------------------------------------------------------------------


def test_messages_for_a_subscription_that_is_gone_do_not_end_the_reader() -> None:
    def answer(server: RecordingServer, connection: PeerConnection, request: Request) -> None:
        if isinstance(request, Sub):
            connection.send(b"MSG c.x %b 1\r\nx\r\nMSG c.x 999 1\r\nx\r\n-ERR 'Something New'\r\n" % request.sid)

    with RecordingServer(answer) as server, natsync.connect(server.url) as client:
        client.subscribe("c.x").unsubscribe()
        client.flush()
        assert client.status == "connected"


def test_info_that_comes_before_the_link_is_in_force_counts(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Session.start

    def start_and_hear(session: Session) -> None:
        start(session)
        session._owner.on_info(session, {"max_payload": 77})

    monkeypatch.setattr(Session, "start", start_and_hear)
    with natsync.connect(nats_server.url) as client:
        assert client.server_info["max_payload"] == 77
        with pytest.raises(natsync.MaxPayloadExceeded):
            client.publish("c.x", b"x" * 78)


def test_info_and_errors_at_any_moment_do_not_end_the_reader() -> None:
    def script(peer: PeerConnection) -> None:
        peer.handshake()
        peer.send_info(max_payload=100)
        peer.send(b"-ERR 'Invalid Subject'\r\n+OK\r\nPING\r\n")
        lines: set[bytes] = set()
        while not lines >= {b"PONG", b"PING"}:
            lines.add(peer.recv_line())
        while True:
            peer.send(b"PONG\r\n")
            while peer.recv_line() != b"PING":
                pass

    with ScriptedPeer(script) as peer, natsync.connect(peer.url) as client:
        client.flush()
        assert client.server_info["max_payload"] == 100
        with pytest.raises(natsync.MaxPayloadExceeded):
            client.publish("c.x", b"x" * 101)


# -- forks ---------------------------------------------------------------------------------------------------------

FORK = """
import os, sys, traceback
import broker
import natsync

client = natsync.connect(sys.argv[1])
subscription = client.subscribe("c.fork.sub")
stream = client.stream("c.fork.stream")
assert stream.next(10) == b"first"
assert client.request("c.echo", b"before", timeout=10).data == b"before"
number = client.server_info["client_id"]
pid = os.fork()
if pid == 0:
    try:
        assert client.request("c.echo", b"child", timeout=10).data == b"child"
        assert client.server_info["client_id"] != number
        for use in (lambda: subscription.next(0), lambda: stream.next(0)):
            try:
                use()
            except natsync.ForkError:
                continue
            raise AssertionError("the parent's object works in the child")
        stream.close()
        client.publish("c.fork.sub", b"from the child")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.exit(0)  # with finalizers and exit handlers: they must leave the parent's connection alone
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert subscription.next(10).data == b"from the child"
assert client.request("c.echo", b"parent", timeout=10).data == b"parent"
assert client.request("c.fork.go", timeout=10).data == b""
assert list(stream) == [b"last"]
assert client.server_info["client_id"] == number
assert client.stats()["reconnects"] == 0
print("fine")
"""


def test_a_forked_child_uses_the_client_afresh_and_the_parent_goes_on(
    subscriber: natsync.Subscriber, nats_server: NatsServer
) -> None:
    go_on = threading.Event()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"first"
        while not go_on.wait(0.01):
            ctx.check()
        yield b"last"

    subscriber.stream_subscribe("c.fork.stream", handler)
    subscriber.handler("c.fork.go")(lambda ctx, request: go_on.set())
    done = run_python(FORK, nats_server.url)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
