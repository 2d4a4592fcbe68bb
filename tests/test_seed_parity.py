"""The Go system that natsync re-creates, feature by feature: its wire byte for byte, its server side, its client side.

Plain peers here are raw sockets, so that nothing of natsync reads or writes for them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import natsync
from natsync.options import connect_options, parse_servers
from natsync.servers import ServerList
from natsync.streaming import subscriber as subscriber_module
from natsync.testing import NatsServer, eventually
from rawclient import END, ERROR, PATIENCE, RawClient, RecordingServer

Make = Callable[..., NatsServer]


@pytest.fixture
def raw(nats_server: NatsServer) -> Iterator[RawClient]:
    with RawClient(nats_server.url) as client:
        yield client


@pytest.fixture
def client(nats_server: NatsServer, mode: str) -> Iterator[natsync.Client]:
    with natsync.connect(nats_server.url, framed=mode == "framed") as client:
        yield client


@pytest.fixture
def subscriber(natsync_subscriber: natsync.Subscriber) -> natsync.Subscriber:
    return natsync_subscriber.open()


@pytest.fixture
def in_background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def no_one(subject: str, client: natsync.Client) -> bool:
    """Whether nothing answers on the subject."""
    try:
        client.request(subject, timeout=PATIENCE)
    except natsync.NoRespondersError:
        return True
    return False


# -- the wire, as a plain requester sees it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunk",
    [
        b"x",
        b"",
        bytes(range(256)),
        b"\r\n",
        b"MSG a 1 3\r\nabc\r\n",
        b"__STREAM_",
        b"__STREAM_END",
        b"__STREAM_END__\n",
        b" __STREAM_END__",
        b"__STREAM_ERROR__",
        b"y" * 100_000,
    ],
    ids=lambda chunk: repr(chunk[:20]),
)
def test_wire_a_chunk_is_one_message_with_its_payload_untouched(
    raw: RawClient, subscriber: natsync.Subscriber, chunk: bytes
) -> None:
    subscriber.stream_subscribe("parity.chunk", lambda ctx, request: [chunk])
    raw.request("parity.chunk")
    assert [message.payload for message in raw.stream()] == [chunk, END]


def test_wire_the_request_reaches_the_handler_as_it_was_published(
    raw: RawClient, subscriber: natsync.Subscriber
) -> None:
    seen: list[natsync.Message] = []
    subscriber.stream_subscribe("parity.request", lambda ctx, request: seen.append(request) or [])
    raw.request("parity.request", b"\x00the application's\r\n")
    raw.stream()
    assert [(one.subject, one.data) for one in seen] == [("parity.request", b"\x00the application's\r\n")]


def test_wire_chunks_go_to_the_inbox_in_order_and_nothing_else_does(
    raw: RawClient, subscriber: natsync.Subscriber
) -> None:
    subscriber.stream_subscribe("parity.order", lambda ctx, request: (b"%d" % n for n in range(500)))
    sid = raw.request("parity.order")
    messages = raw.stream()
    assert [one.payload for one in messages] == [b"%d" % n for n in range(500)] + [END]
    assert {(one.sid, one.block) for one in messages} == {(sid, None)}
    assert raw.received() == []


def test_wire_the_end_is_one_message_that_is_exactly_the_end_sentinel(
    raw: RawClient, subscriber: natsync.Subscriber
) -> None:
    subscriber.stream_subscribe("parity.end", lambda ctx, request, sender: sender.end(trailers={"not": "for plain"}))
    raw.request("parity.end")
    (last,) = raw.stream()
    assert (last.payload, last.block) == (END, None)
    assert raw.received() == []


@pytest.mark.parametrize("text", ["model overloaded", "", "Größe 第三方 ✗", "two\nlines"])
def test_wire_an_error_is_the_error_sentinel_and_its_text_in_utf_8(
    raw: RawClient, subscriber: natsync.Subscriber, text: str
) -> None:
    def handler(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.send(b"one")
        sender.send_error(text, code=natsync.Code.NOT_FOUND, details={"not": "for plain"})

    subscriber.stream_subscribe("parity.error", handler)
    raw.request("parity.error")
    assert [(one.payload, one.block) for one in raw.stream()] == [(b"one", None), (ERROR + text.encode(), None)]
    assert raw.received() == []  # the error ends the stream: no END behind it


def test_wire_every_message_carries_one_reply_subject_of_the_responder(
    raw: RawClient, subscriber: natsync.Subscriber
) -> None:
    subscriber.stream_subscribe("parity.reply", lambda ctx, request: [b"1", b"2"])
    raw.request("parity.reply")
    replies = {one.reply for one in raw.stream()}
    assert len(replies) == 1
    (reply,) = replies
    assert reply is not None
    assert reply.startswith(b"_INBOX.")


def test_wire_a_request_without_a_reply_subject_is_logged_and_ignored(
    raw: RawClient, subscriber: natsync.Subscriber, caplog: pytest.LogCaptureFixture
) -> None:
    ran = threading.Event()
    handle = subscriber.stream_subscribe("parity.noreply", lambda ctx, request: ran.set() or [])
    raw.publish("parity.noreply", b"no answer wanted")
    eventually(lambda: handle.stats["received"] == 1)
    eventually(lambda: "without a reply subject" in caplog.text)
    assert "parity.noreply" in caplog.text
    raw.request("parity.noreply")
    raw.stream()  # the next one is served
    assert handle.stats["dropped"] == 1
    eventually(lambda: handle.stats["processed"] == 1)


# -- the wire, as a plain responder sees it ------------------------------------------------------------------------


def test_wire_a_plain_responder_gets_payload_and_a_private_inbox(raw: RawClient, client: natsync.Client) -> None:
    raw.subscribe("parity.seed")
    with client.stream("parity.seed", b"prompt"), client.stream("parity.seed", b"prompt"):
        one, two = raw.next(), raw.next()
    assert one.payload == two.payload == b"prompt"
    assert one.reply is not None
    assert one.reply.startswith(b"_INBOX.")
    assert one.reply != two.reply


def test_wire_stream_reads_a_plain_responder_to_its_end(raw: RawClient, client: natsync.Client) -> None:
    raw.subscribe("parity.seed.stream")
    with client.stream("parity.seed.stream") as stream:
        raw.answer(raw.next(), b"1", b"", b"3", END)
        assert list(stream) == [b"1", b"", b"3"]


def test_wire_stream_raises_a_plain_responders_error_behind_its_chunks(raw: RawClient, client: natsync.Client) -> None:
    raw.subscribe("parity.seed.error")
    with client.stream("parity.seed.error") as stream:
        raw.answer(raw.next(), b"1", ERROR + "kaputt ✗".encode())
        assert stream.next(PATIENCE) == b"1"
        with pytest.raises(natsync.HandlerError, match=r"^kaputt ✗$") as caught:
            stream.next(PATIENCE)
    assert caught.value.last_seq == 1


def test_wire_two_streams_of_one_plain_responder_are_kept_apart(raw: RawClient, client: natsync.Client) -> None:
    raw.subscribe("parity.seed.two")
    one, two = client.stream("parity.seed.two", b"A"), client.stream("parity.seed.two", b"B")
    requests = {request.payload: request for request in (raw.next(), raw.next())}
    for n in range(50):
        raw.answer(requests[b"A"], b"A%d" % n)
        raw.answer(requests[b"B"], b"B%d" % n)
    raw.answer(requests[b"B"], END)
    raw.answer(requests[b"A"], END)
    assert list(one) == [b"A%d" % n for n in range(50)]
    assert list(two) == [b"B%d" % n for n in range(50)]


def test_wire_chunks_of_a_plain_responder_with_reply_subjects_of_its_own_are_chunks(
    raw: RawClient, client: natsync.Client
) -> None:
    raw.subscribe("parity.seed.reply")
    with client.stream("parity.seed.reply") as stream:
        request = raw.next()
        assert request.reply is not None
        raw.publish(request.reply, b"1", b"some.reply.subject")
        raw.answer(request, END)
        assert list(stream) == [b"1"]


# -- StreamSubscribeHandler ----------------------------------------------------------------------------------------


def test_stream_subscribe_handler_may_return_at_once_and_send_from_its_own_thread(
    raw: RawClient, subscriber: natsync.Subscriber
) -> None:
    returned = threading.Event()

    def handler(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        def work() -> None:
            returned.wait(PATIENCE)
            for n in range(10):
                sender.send(b"%d" % n)
            sender.end()

        threading.Thread(target=work).start()

    handle = subscriber.stream_subscribe("parity.own", handler)
    raw.request("parity.own")
    eventually(lambda: handle.stats["active"] == 1)
    returned.set()
    assert [one.payload for one in raw.stream()] == [b"%d" % n for n in range(10)] + [END]


def test_stream_subscribe_returning_does_not_end_the_stream(raw: RawClient, subscriber: natsync.Subscriber) -> None:
    kept: list[natsync.ResponseSender] = []
    subscriber.stream_subscribe("parity.return", lambda ctx, request, sender: kept.append(sender))
    raw.request("parity.return")
    eventually(lambda: kept)
    assert not kept[0].is_closed()
    assert raw.received() == []
    kept[0].end()
    assert [one.payload for one in raw.stream()] == [END]


def test_stream_subscribe_an_exception_is_sent_as_the_error(raw: RawClient, subscriber: natsync.Subscriber) -> None:
    def handler(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.send(b"1")
        raise LookupError("no such model")

    subscriber.stream_subscribe("parity.raise", handler)
    raw.request("parity.raise")
    assert [one.payload for one in raw.stream()] == [b"1", ERROR + b"no such model"]


def test_stream_subscribe_each_request_runs_on_its_own_thread(raw: RawClient, subscriber: natsync.Subscriber) -> None:
    together = threading.Barrier(20, timeout=PATIENCE)
    subscriber.stream_subscribe("parity.threads", lambda ctx, request: [b"%d" % together.wait()])
    for _ in range(20):
        raw.request("parity.threads")
    payloads = [raw.next().payload for _ in range(40)]
    assert sorted(payloads) == sorted([*(b"%d" % n for n in range(20)), *[END] * 20])


def test_stream_subscribe_wait_blocks_until_its_context_is_done_and_it_is_unsubscribed(
    client: natsync.Client, subscriber: natsync.Subscriber, in_background: ThreadPoolExecutor
) -> None:
    ctx = natsync.Context()
    handle = subscriber.stream_subscribe("parity.wait", lambda ctx, request: [b"x"], ctx=ctx)
    assert list(client.stream("parity.wait")) == [b"x"]
    waiting = in_background.submit(handle.wait, PATIENCE)
    assert not handle.wait(0.05)
    ctx.cancel()
    assert waiting.result(PATIENCE) is True
    eventually(lambda: no_one("parity.wait", client))


# -- BatchStreamSubscribeHandler -----------------------------------------------------------------------------------


def test_batch_stream_callback_form_sends_in_batches(raw: RawClient, subscriber: natsync.Subscriber) -> None:
    def handler(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        assert sender.send_many([b"1", b"2", b"3"]) == 3
        assert sender.send_many(str(n) for n in (4, 5)) == 5
        sender.end()

    subscriber.batch_stream_subscribe("parity.batch", handler)
    raw.request("parity.batch")
    assert [one.payload for one in raw.stream()] == [b"1", b"2", b"3", b"4", b"5", END]


def test_batch_stream_pull_form_is_called_until_there_is_no_more(
    raw: RawClient, subscriber: natsync.Subscriber
) -> None:
    def handler(request: natsync.Message, index: int) -> tuple[list[bytes], bool]:
        return [request.data + b"%d.%d" % (index, n) for n in range(2)], index < 2

    subscriber.batch_stream_subscribe("parity.batch.pull", handler)
    raw.request("parity.batch.pull", b"p")
    assert [one.payload for one in raw.stream()] == [b"p0.0", b"p0.1", b"p1.0", b"p1.1", b"p2.0", b"p2.1", END]


def test_batch_stream_pull_form_an_exception_is_the_error(raw: RawClient, subscriber: natsync.Subscriber) -> None:
    def handler(request: natsync.Message, index: int) -> tuple[list[bytes], bool]:
        if index:
            raise RuntimeError("the second batch failed")
        return [b"1", b"2"], True

    subscriber.batch_stream_subscribe("parity.batch.error", handler)
    raw.request("parity.batch.error")
    assert [one.payload for one in raw.stream()] == [b"1", b"2", ERROR + b"the second batch failed"]


def test_batch_stream_a_batch_leaves_in_one_write(
    raw: RawClient, subscriber: natsync.Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[bytes] = []
    send = natsync.transport.Transport.send  # type: ignore[attr-defined]

    def recording(transport: object, data: bytes, *progress: object) -> None:
        writes.append(data)
        send(transport, data, *progress)

    chunks = [b"chunk-%d-of-the-batch" % n for n in range(200)]
    subscriber.batch_stream_subscribe("parity.batch.write", lambda request, index: (chunks, False))
    monkeypatch.setattr("natsync.transport.Transport.send", recording)
    raw.request("parity.batch.write")
    assert [one.payload for one in raw.stream()] == [*chunks, END]
    carrying = [data for data in writes if b"-of-the-batch" in data]
    assert [data.count(b"-of-the-batch") for data in carrying] == [200]


# -- LegacyStreamSubscribeHandler ----------------------------------------------------------------------------------


def test_legacy_stream_is_pulled_until_there_is_no_more_and_always_ends(
    raw: RawClient, subscriber: natsync.Subscriber
) -> None:
    subscriber.legacy_stream_subscribe("parity.legacy", lambda request, index: (b"%d" % index, index < 3))
    raw.request("parity.legacy")
    assert [one.payload for one in raw.stream()] == [b"0", b"1", b"2", b"3", END]


def test_legacy_stream_skips_empty_data(raw: RawClient, subscriber: natsync.Subscriber) -> None:
    data = [b"a", b"", None, b"d"]
    subscriber.legacy_stream_subscribe("parity.legacy.empty", lambda request, index: (data[index], index < 3))
    raw.request("parity.legacy.empty")
    assert [one.payload for one in raw.stream()] == [b"a", b"d", END]


def test_legacy_stream_an_exception_is_the_error(raw: RawClient, subscriber: natsync.Subscriber) -> None:
    def handler(request: natsync.Message, index: int) -> tuple[bytes, bool]:
        return (b"0", True) if index == 0 else (b"%d" % (1 // 0), False)

    subscriber.legacy_stream_subscribe("parity.legacy.error", handler)
    raw.request("parity.legacy.error")
    assert [one.payload for one in raw.stream()] == [b"0", ERROR + b"integer division or modulo by zero"]


def test_legacy_stream_pauses_between_calls_only_if_told_to(raw: RawClient, subscriber: natsync.Subscriber) -> None:
    def timed(subject: str) -> float:
        begin = time.monotonic()
        raw.request(subject)
        assert len(raw.stream()) == 101
        return time.monotonic() - begin

    subscriber.legacy_stream_subscribe("parity.fast", lambda request, index: (b"x", index < 99))
    subscriber.legacy_stream_subscribe("parity.slow", lambda request, index: (b"x", index < 99), pause=0.01)
    assert timed("parity.slow") >= 0.99
    assert min(timed("parity.fast") for _ in range(3)) < 0.7  # the Go system needs 0.99 s


# -- StreamQueueSubscribeHandler -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["stream_subscribe", "batch_stream_subscribe", "legacy_stream_subscribe"])
def test_stream_queue_subscribe_one_member_of_the_group_answers(
    raw: RawClient, nats_server: NatsServer, form: str
) -> None:
    handler = {
        "stream_subscribe": lambda ctx, request: [b"x"],
        "batch_stream_subscribe": lambda request, index: ([b"x"], False),
        "legacy_stream_subscribe": lambda request, index: (b"x", False),
    }[form]
    with natsync.Subscriber(nats_server.url) as one, natsync.Subscriber(nats_server.url) as two:
        handles = [getattr(each, form)("parity.queue", handler, queue="workers") for each in (one, two)]
        for _ in range(40):
            raw.request("parity.queue")
        payloads = [raw.next().payload for _ in range(80)]
        assert raw.received() == []
        shares = [handle.stats["received"] for handle in handles]
    assert sorted(payloads) == sorted([b"x", END] * 40)
    assert sum(shares) == 40
    assert min(shares) > 0


# -- ResponseSender ------------------------------------------------------------------------------------------------


@pytest.fixture
def held(subscriber: natsync.Subscriber) -> Callable[[], tuple[natsync.ResponseSender, natsync.Context]]:
    """Have requests on "parity.sender" wait, and take over their sender and context."""
    arrived: list[tuple[natsync.ResponseSender, natsync.Context]] = []
    subscriber.stream_subscribe("parity.sender", lambda ctx, request, sender: arrived.append((sender, ctx)))

    def take() -> tuple[natsync.ResponseSender, natsync.Context]:
        eventually(lambda: arrived)
        return arrived.pop()

    return take


Held = Callable[[], tuple[natsync.ResponseSender, natsync.Context]]


def test_sender_send_fails_once_the_stream_was_ended(raw: RawClient, held: Held) -> None:
    raw.request("parity.sender")
    sender, _ = held()
    sender.end()
    with pytest.raises(natsync.StreamClosed):
        sender.send(b"late")
    assert [one.payload for one in raw.stream()] == [END]
    assert raw.received() == []


def test_sender_send_fails_once_its_context_is_done(raw: RawClient, held: Held) -> None:
    raw.request("parity.sender")
    sender, ctx = held()
    ctx.cancel("enough")
    with pytest.raises(natsync.StreamCancelled, match="enough"):
        sender.send(b"late")
    assert [one.payload for one in raw.stream()] == [ERROR + b"enough"]


def test_sender_send_error_sends_it_and_closes(raw: RawClient, held: Held) -> None:
    raw.request("parity.sender")
    sender, _ = held()
    sender.send_error(ValueError("bad input"))
    assert sender.is_closed()
    assert sender.end() is False
    assert [one.payload for one in raw.stream()] == [ERROR + b"bad input"]
    assert raw.received() == []


def test_sender_end_is_idempotent(raw: RawClient, held: Held) -> None:
    raw.request("parity.sender")
    sender, _ = held()
    assert sender.end() is True
    assert sender.end() is True
    assert sender.is_closed()
    assert [one.payload for one in raw.stream()] == [END]
    assert raw.received() == []


def test_sender_counts_what_was_sent(raw: RawClient, held: Held) -> None:
    raw.request("parity.sender")
    sender, _ = held()
    assert sender.send_count == 0
    assert [sender.send(b"x") for _ in range(3)] == [1, 2, 3]
    assert sender.send_count == 3
    sender.end()
    assert sender.send_count == 3


def until_closed(sender: natsync.ResponseSender) -> float:
    """Send until the sender is closed; how many seconds that took."""
    begin = time.monotonic()
    while not sender.is_closed() and time.monotonic() < begin + PATIENCE:
        try:
            sender.send(b"anybody there?")
        except natsync.StreamClosed:
            break
        sender.closed.wait(0.005)
    assert sender.closed.is_set()
    return time.monotonic() - begin


def test_is_closed_when_a_plain_requester_unsubscribes(raw: RawClient, held: Held) -> None:
    sid = raw.request("parity.sender")
    sender, ctx = held()
    sender.send(b"first")
    assert raw.next().payload == b"first"
    raw.unsubscribe(sid)
    assert until_closed(sender) < 3
    assert ctx.wait(PATIENCE)
    with pytest.raises(natsync.ClientLost):
        sender.send(b"late")


def test_is_closed_when_a_plain_requester_dies(nats_server: NatsServer, held: Held) -> None:
    with RawClient(nats_server.url) as raw:
        raw.request("parity.sender")
        sender, ctx = held()
    assert until_closed(sender) < 3
    assert ctx.wait(PATIENCE)


def test_is_closed_when_a_natsync_requester_cancels(client: natsync.Client, held: Held) -> None:
    stream = client.stream("parity.sender")
    sender, ctx = held()
    sender.send(b"1")
    assert stream.next(PATIENCE) == b"1"  # the handler's address is known here
    stream.cancel("changed my mind")
    assert sender.closed.wait(3)  # nothing had to be sent to find out
    assert ctx.wait(PATIENCE)
    assert "changed my mind" in str(ctx.reason)


def test_is_closed_when_a_natsync_requester_abandons_the_stream(client: natsync.Client, held: Held) -> None:
    stream = client.stream("parity.sender")
    sender, _ = held()
    sender.send(b"1")
    for _ in stream:
        break
    del stream
    assert sender.closed.wait(PATIENCE)


def test_is_closed_when_a_natsync_requester_dies(nats_server: NatsServer, held: Held) -> None:
    client = natsync.connect(nats_server.url)
    stream = client.stream("parity.sender")
    sender, ctx = held()
    client.close()
    assert until_closed(sender) < 3
    assert ctx.wait(PATIENCE)
    with pytest.raises(natsync.ConnectionClosed):
        next(stream)


# -- Subscribe, QueueSubscribe, SubscribeSync, SubscribeGo, SubscribeAndDrop -----------------------------------------


def test_subscribe_handles_messages_in_their_order(raw: RawClient, subscriber: natsync.Subscriber) -> None:
    seen: list[bytes] = []
    subscriber.subscribe("parity.plain", lambda message: seen.append(message.data))
    for n in range(1000):
        raw.publish("parity.plain", b"%d" % n)
    eventually(lambda: len(seen) == 1000)
    assert seen == [b"%d" % n for n in range(1000)]


def test_subscribe_go_handles_messages_at_once_up_to_concurrency(
    raw: RawClient, subscriber: natsync.Subscriber
) -> None:
    together = threading.Barrier(4, timeout=PATIENCE)
    passed = threading.Semaphore(0)

    def handler(message: natsync.Message) -> None:
        together.wait()
        passed.release()

    subscriber.subscribe("parity.go", handler, concurrency=4)
    for _ in range(8):
        raw.publish("parity.go")
    assert all(passed.acquire(timeout=PATIENCE) for _ in range(8))


@pytest.mark.parametrize(("overflow", "kept"), [("drop_new", [0, 1, 2, 3, 4]), ("drop_old", [0, 6, 7, 8, 9])])
def test_subscribe_and_drop_loses_what_the_policy_says_and_counts_it(
    raw: RawClient, nats_server: NatsServer, overflow: str, kept: list[int]
) -> None:
    go_on, busy = threading.Event(), threading.Event()
    seen: list[bytes] = []

    def handler(message: natsync.Message) -> None:
        seen.append(message.data)
        busy.set()
        go_on.wait(PATIENCE)

    with natsync.Subscriber(nats_server.url, pending_messages=4) as subscriber:
        handle = subscriber.subscribe("parity.drop", handler, overflow=overflow)  # type: ignore[arg-type]
        raw.publish("parity.drop", b"0")
        assert busy.wait(PATIENCE)
        for n in range(1, 10):
            raw.publish("parity.drop", b"%d" % n)
        eventually(lambda: handle.stats["dropped"] == 5)
        go_on.set()
        eventually(lambda: len(seen) == 5)
    assert seen == [b"%d" % n for n in kept]


def test_queue_subscribe_shares_messages_among_the_group(raw: RawClient, nats_server: NatsServer) -> None:
    seen: list[list[bytes]] = [[], []]
    with natsync.Subscriber(nats_server.url) as one, natsync.Subscriber(nats_server.url) as two:
        one.subscribe("parity.group", lambda message: seen[0].append(message.data), queue="g")
        two.subscribe("parity.group", lambda message: seen[1].append(message.data), queue="g")
        for n in range(100):
            raw.publish("parity.group", b"%d" % n)
        eventually(lambda: len(seen[0]) + len(seen[1]) == 100)
    assert {*seen[0], *seen[1]} == {b"%d" % n for n in range(100)}
    assert seen[0]
    assert seen[1]


def test_subscribe_sync_hands_messages_to_whoever_asks(raw: RawClient, client: natsync.Client) -> None:
    subscription = client.subscribe("parity.sync", queue="g")
    client.flush()
    raw.publish("parity.sync", b"1")
    assert subscription.next(PATIENCE).data == b"1"


# -- StreamSubscriptionHandle --------------------------------------------------------------------------------------


def test_handle_stop_stops_one_registration_and_no_other(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    one = subscriber.stream_subscribe("parity.stop.one", lambda ctx, request: [b"1"])
    subscriber.stream_subscribe("parity.stop.two", lambda ctx, request: [b"2"])
    assert not one.stopped
    one.stop()
    assert one.stopped
    assert no_one("parity.stop.one", client)
    assert list(client.stream("parity.stop.two")) == [b"2"]


def test_handle_ctx_is_the_parent_of_every_requests_context(raw: RawClient, subscriber: natsync.Subscriber) -> None:
    kept: list[tuple[natsync.Context, natsync.ResponseSender]] = []
    handle = subscriber.stream_subscribe("parity.ctx", lambda ctx, request, sender: kept.append((ctx, sender)))
    raw.request("parity.ctx")
    eventually(lambda: kept)
    handle.ctx.cancel("the operator said so")
    assert kept[0][0].wait(PATIENCE)
    assert kept[0][0].reason == "the operator said so"
    assert [one.payload for one in raw.stream()] == [ERROR + b"the operator said so"]


# -- limits and metrics --------------------------------------------------------------------------------------------


def test_limits_are_those_of_the_go_system_by_default(nats_server: NatsServer) -> None:
    assert subscriber_module.PENDING_MESSAGES == 65_536
    assert subscriber_module.PENDING_BYTES == 64 << 20
    assert subscriber_module.MAX_WORKERS >= 64


def test_limits_bound_the_threads_of_plain_messages(raw: RawClient, nats_server: NatsServer) -> None:
    go_on = threading.Event()
    running = threading.Semaphore(0)

    def handler(message: natsync.Message) -> None:
        running.release()
        go_on.wait(PATIENCE)

    with natsync.Subscriber(nats_server.url, max_workers=3) as subscriber:
        handle = subscriber.subscribe("parity.workers", handler, concurrency=50)
        for _ in range(30):
            raw.publish("parity.workers")
        assert all(running.acquire(timeout=PATIENCE) for _ in range(3))
        assert not running.acquire(timeout=0.1)
        assert subscriber.stats()["threads"] == 3
        go_on.set()
        eventually(lambda: handle.stats["processed"] == 30)


def test_metrics_count_received_processed_failed_dropped_and_active(
    raw: RawClient, subscriber: natsync.Subscriber
) -> None:
    kept: list[natsync.ResponseSender] = []

    def handler(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        if request.data == b"fail":
            raise ValueError("as told")
        if request.data == b"wait":
            kept.append(sender)
            return
        sender.end()

    subscriber.stream_subscribe("parity.metrics", handler)
    for payload in (b"", b"", b"fail", b"wait"):
        raw.request("parity.metrics", payload)
    raw.publish("parity.metrics", b"no reply subject")
    eventually(lambda: subscriber.stats()["received"] == 5)
    eventually(lambda: kept and subscriber.stats()["active"] == subscriber.stats()["dropped"] == 1)
    stats = subscriber.stats()
    assert {name: stats[name] for name in ("processed", "failed", "dropped", "cancelled")} == {
        "processed": 2,
        "failed": 1,
        "dropped": 1,
        "cancelled": 0,
    }
    kept.pop().end()
    eventually(lambda: subscriber.stats()["active"] == 0)
    assert subscriber.stats()["processed"] == 3


# -- NewSubscriber, Close ------------------------------------------------------------------------------------------


def test_new_subscriber_shuffles_its_servers() -> None:
    servers = parse_servers([f"nats://127.0.0.1:{port}" for port in range(5000, 5020)])
    orders = {tuple(ServerList(servers, connect_options({}))) for _ in range(5)}
    assert len(orders) > 1
    assert all(set(order) == set(servers) for order in orders)
    assert tuple(ServerList(servers, connect_options({"randomize": False}))) == tuple(servers)


def test_new_subscriber_reconnects_and_serves_again(make_nats_server: Make) -> None:
    server = make_nats_server()
    with natsync.Subscriber(server.url, reconnect_wait=0.02) as subscriber:
        subscriber.stream_subscribe("parity.again", lambda ctx, request: [b"x"])
        server.kill()
        server.start()
        with natsync.connect(server.url) as client:
            eventually(lambda: subscriber.status == "connected")
            eventually(lambda: not no_one("parity.again", client))
            assert list(client.stream("parity.again")) == [b"x"]


def test_close_waits_for_running_handlers(
    raw: RawClient, subscriber: natsync.Subscriber, in_background: ThreadPoolExecutor
) -> None:
    started, go_on = threading.Event(), threading.Event()

    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        yield b"1"
        started.set()
        go_on.wait(PATIENCE)
        yield b"2"

    subscriber.stream_subscribe("parity.close", handler)
    raw.request("parity.close")
    assert started.wait(PATIENCE)
    closing = in_background.submit(subscriber.close)
    eventually(lambda: subscriber.status == "draining")
    go_on.set()
    closing.result(PATIENCE)
    assert [one.payload for one in raw.stream()] == [b"1", b"2", END]


# -- the pool and its verbs ----------------------------------------------------------------------------------------


@pytest.fixture(params=["client", "pool"])
def verbs(request: pytest.FixtureRequest, nats_server: NatsServer) -> Iterator[natsync.Client | natsync.ConnectionPool]:
    """The client and the pool, which have the same verbs."""
    make = {"client": natsync.Client, "pool": natsync.ConnectionPool}[request.param]
    with make(nats_server.url) as one:
        yield one


Verbs = natsync.Client | natsync.ConnectionPool


def test_pool_and_client_publish(raw: RawClient, verbs: Verbs) -> None:
    raw.subscribe("parity.publish")
    verbs.publish("parity.publish", b"payload", reply="answer.here")
    message = raw.next()
    assert (message.payload, message.reply, message.block) == (b"payload", b"answer.here", None)


def test_pool_and_client_publish_with_headers(raw: RawClient, verbs: Verbs) -> None:
    raw.subscribe("parity.publishmsg")
    verbs.publish("parity.publishmsg", b"payload", headers={"Trace": "1", "Many": ["a", "b"]})
    message = raw.next()
    assert message.block == b"NATS/1.0\r\nTrace: 1\r\nMany: a\r\nMany: b\r\n\r\n"
    assert message.payload == b"payload"


def test_pool_and_client_publish_any_as_json(raw: RawClient, verbs: Verbs) -> None:
    raw.subscribe("parity.publishany")
    verbs.publish("parity.publishany", json={"a": [1, None, "ä"]})
    assert raw.next().payload == '{"a":[1,null,"ä"]}'.encode()


def test_pool_and_client_request(raw: RawClient, verbs: Verbs, in_background: ThreadPoolExecutor) -> None:
    raw.subscribe("parity.req")
    reply = in_background.submit(verbs.request, "parity.req", b"?", headers={"K": "v"}, timeout=PATIENCE)
    request = raw.next()
    assert (request.payload, request.block) == (b"?", b"NATS/1.0\r\nK: v\r\n\r\n")
    raw.answer(request, b"!")
    assert reply.result(PATIENCE).data == b"!"


def test_pool_and_client_request_any_as_json(raw: RawClient, verbs: Verbs, in_background: ThreadPoolExecutor) -> None:
    raw.subscribe("parity.reqany")
    reply = in_background.submit(verbs.request, "parity.reqany", json=[1, 2], timeout=PATIENCE)
    request = raw.next()
    assert request.payload == b"[1,2]"
    raw.answer(request, b'{"sum": 3}')
    assert reply.result(PATIENCE).json() == {"sum": 3}


def test_pool_and_client_stream(raw: RawClient, verbs: Verbs) -> None:
    raw.subscribe("parity.str")
    stream = verbs.stream("parity.str", b"?")
    raw.answer(raw.next(), b"1", b"2", END)
    assert list(stream) == [b"1", b"2"]


def test_pool_get_and_put_lend_a_connection(nats_server: NatsServer) -> None:
    with natsync.ConnectionPool(nats_server.url, max_size=1) as pool:
        client = pool.getconn()
        with pytest.raises(natsync.PoolTimeout):
            pool.getconn(timeout=0.02)
        pool.putconn(client)
        with pool.connection(timeout=PATIENCE) as again:
            assert again is client
            assert pool.stats()["leased"] == 1


def test_pool_many_callers_on_an_empty_pool_make_no_storm_of_connections(in_background: ThreadPoolExecutor) -> None:
    with RecordingServer() as server, natsync.ConnectionPool(server.url, max_size=3) as pool:
        together = threading.Barrier(24, timeout=PATIENCE)

        def call() -> None:
            together.wait()
            pool.publish("parity.storm", b"x")

        with ThreadPoolExecutor(24) as callers:
            for done in [callers.submit(call) for _ in range(24)]:
                done.result(PATIENCE)
        eventually(lambda: len(server.pubs) == 24)
        assert server.accepted <= 3
        eventually(lambda: pool.stats()["dials"] == server.accepted)


def test_pool_metrics_tell_idle_leased_dials_and_failures(make_nats_server: Make) -> None:
    server = make_nats_server()
    with natsync.ConnectionPool(server.url, min_size=0, max_size=2, connect_timeout=5, reconnect=False) as pool:
        with pool.connection() as client:
            stats = pool.stats()
            assert (stats["leased"], stats["idle"], stats["dials"]) == (1, 0, 1)
            server.kill()
            eventually(lambda: client.status == "closed")
        assert pool.stats()["idle"] == 0
        with pytest.raises(natsync.NoServersError), pool.connection(timeout=2):
            pass
        assert pool.stats()["dials_failed"] >= 1


# -- StreamRequest -------------------------------------------------------------------------------------------------


def test_stream_request_shows_chunks_and_the_end_sentinel(
    raw: RawClient, verbs: Verbs, in_background: ThreadPoolExecutor
) -> None:
    raw.subscribe("parity.sr")
    seen: list[tuple[bytes, bool, str | None]] = []
    call = in_background.submit(
        verbs.stream_request,
        "parity.sr",
        b"?",
        lambda message: seen.append((message.data, message.is_end, message.error)),
    )
    raw.answer(raw.next(), b"1", b"2", END)
    assert call.result(PATIENCE) is None
    assert seen == [(b"1", False, None), (b"2", False, None), (END, True, None)]


def test_stream_request_raises_after_an_error_was_shown_whatever_the_processor_returns(
    raw: RawClient, client: natsync.Client, in_background: ThreadPoolExecutor
) -> None:
    raw.subscribe("parity.sr.error")
    for answer in (True, False, None):
        seen: list[tuple[bytes, bool, str | None]] = []

        def processor(
            message: natsync.Message, seen: list[tuple[bytes, bool, str | None]] = seen, answer: bool | None = answer
        ) -> bool | None:
            seen.append((message.data, message.is_end, message.error))
            return answer if message.error is not None else True

        call = in_background.submit(client.stream_request, "parity.sr.error", b"?", processor)
        raw.answer(raw.next(), b"1", ERROR + b"broken")
        with pytest.raises(natsync.StreamError, match="broken"):
            call.result(PATIENCE)
        assert seen == [(b"1", False, None), (ERROR + b"broken", False, "broken")]


@pytest.mark.parametrize("value", [None, 0, "", True, b""])
def test_stream_request_only_false_stops(
    raw: RawClient, client: natsync.Client, in_background: ThreadPoolExecutor, value: object
) -> None:
    raw.subscribe("parity.sr.value")
    seen: list[bytes] = []
    call = in_background.submit(
        client.stream_request, "parity.sr.value", b"?", lambda message: (seen.append(message.data), value)[1]
    )
    raw.answer(raw.next(), b"1", b"2", END)
    call.result(PATIENCE)
    assert seen == [b"1", b"2", END]


def test_stream_request_false_stops_and_the_natsync_handler_is_told(client: natsync.Client, held: Held) -> None:
    seen: list[bytes] = []

    def processor(message: natsync.Message) -> bool:
        seen.append(message.data)
        return False

    with ThreadPoolExecutor() as pool:
        call = pool.submit(client.stream_request, "parity.sender", b"", processor)
        sender, _ = held()
        sender.send_many([b"1", b"2", b"3"])
        assert call.result(PATIENCE) is None
    assert seen == [b"1"]
    assert sender.closed.wait(PATIENCE)


def test_stream_request_ends_with_its_context(raw: RawClient, client: natsync.Client) -> None:
    raw.subscribe("parity.sr.ctx")
    ctx = natsync.Context()
    first = threading.Event()
    with ThreadPoolExecutor() as pool:
        call = pool.submit(client.stream_request, "parity.sr.ctx", b"?", lambda message: first.set(), ctx=ctx)
        raw.answer(raw.next(), b"1")
        assert first.wait(PATIENCE)
        ctx.cancel("the user left")
        with pytest.raises(natsync.StreamCancelled, match="the user left"):
            call.result(PATIENCE)


def test_stream_request_with_timeout_total(raw: RawClient, client: natsync.Client) -> None:
    raw.subscribe("parity.sr.total")
    begin = time.monotonic()
    with pytest.raises(natsync.DeadlineExceeded):
        client.stream_request("parity.sr.total", b"?", lambda message: None, timeout=0.2)
    assert 0.19 <= time.monotonic() - begin < 5


def test_stream_request_with_timeout_idle(raw: RawClient, client: natsync.Client) -> None:
    raw.subscribe("parity.sr.idle")
    begin = time.monotonic()
    with pytest.raises(natsync.IdleTimeout):
        client.stream_request("parity.sr.idle", b"?", lambda message: None, idle_timeout=0.2, timeout=30)
    assert 0.19 <= time.monotonic() - begin < 5


def failing(subscriber: natsync.Subscriber, subject: str, failures: int) -> list[int]:
    """A handler that sends one chunk and fails the first `failures` times; the list grows by one each time it runs."""
    runs: list[int] = []

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        runs.append(ctx.attempt)
        yield b"%d" % len(runs)
        if len(runs) <= failures:
            raise RuntimeError(f"failure {len(runs)}")

    subscriber.stream_subscribe(subject, handler)
    return runs


def test_stream_request_with_retry_gives_up_after_all_tries_with_the_last_error(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    runs = failing(subscriber, "parity.sr.giveup", 99)
    seen: list[bytes] = []
    retry = natsync.Retry(attempts=1 + 3, initial=0.01)
    with pytest.raises(natsync.HandlerError, match="failure 4"):
        client.stream_request("parity.sr.giveup", b"?", lambda message: seen.append(message.data), retry=retry)
    assert runs == [0, 1, 2, 3]
    assert seen[:4] == [b"1", ERROR + b"failure 1", b"2", ERROR + b"failure 2"]


def test_stream_request_with_retry_runs_the_whole_request_again_until_it_succeeds(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    runs = failing(subscriber, "parity.sr.success", 2)
    seen: list[bytes] = []
    retry = natsync.Retry(attempts=5, initial=0.01)
    client.stream_request("parity.sr.success", b"?", lambda message: seen.append(message.data), retry=retry)
    assert len(runs) == 3
    assert seen == [b"1", ERROR + b"failure 1", b"2", ERROR + b"failure 2", b"3", END]


def test_stream_request_with_retry_does_not_repeat_a_cancelled_one(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    runs = failing(subscriber, "parity.sr.cancel", 99)
    ctx = natsync.Context()
    retry = natsync.Retry(attempts=50, initial=0.05, jitter=False)

    def processor(message: natsync.Message) -> None:
        if message.error == "failure 2":
            ctx.cancel("enough")

    with pytest.raises((natsync.Cancelled, natsync.StreamCancelled, natsync.HandlerError)):
        client.stream_request("parity.sr.cancel", b"?", processor, retry=retry, ctx=ctx)
    assert len(runs) == 2


def test_stream_request_with_retry_does_not_go_past_the_deadline(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    failing(subscriber, "parity.sr.deadline", 999)
    retry = natsync.Retry(attempts=None, initial=0.05, maximum=0.05)
    begin = time.monotonic()
    with pytest.raises(natsync.NatsError):
        client.stream_request("parity.sr.deadline", b"?", lambda message: None, retry=retry, timeout=0.3)
    assert time.monotonic() - begin < 5


def test_stream_request_with_client_id_sends_it_and_tells_client_offline_on_cancel(
    raw: RawClient, client: natsync.Client
) -> None:
    raw.subscribe("parity.sr.id")
    raw.subscribe("client.offline")
    ctx = natsync.Context()
    with ThreadPoolExecutor() as pool:
        call = pool.submit(
            client.stream_request, "parity.sr.id", b"?", lambda message: None, ctx=ctx, client_id="user-7"
        )
        request = raw.next()
        assert request.block is not None
        assert b"\r\nConnect-ID: user-7\r\n" in request.block
        ctx.cancel()
        offline = raw.next()
        assert (offline.subject, offline.payload) == (b"client.offline", b"user-7")
        with pytest.raises(natsync.StreamCancelled):
            call.result(PATIENCE)


def test_stream_request_with_client_id_is_silent_when_it_ends_by_itself(
    raw: RawClient, client: natsync.Client, in_background: ThreadPoolExecutor
) -> None:
    raw.subscribe("parity.sr.quiet")
    raw.subscribe("client.offline")
    call = in_background.submit(
        client.stream_request, "parity.sr.quiet", b"?", lambda message: None, client_id="user-8"
    )
    raw.answer(raw.next(), b"1", END)
    call.result(PATIENCE)
    client.flush()
    assert raw.received() == []


def test_connect_id_reaches_a_natsync_handler_as_metadata(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    seen: list[str | None] = []

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> list[bytes]:
        seen.append(ctx.metadata.get("Connect-ID"))
        return []

    subscriber.stream_subscribe("parity.meta", handler)
    client.stream_request("parity.meta", b"", lambda message: None, client_id="user-9")
    assert seen == ["user-9"]


def test_urls_in_logs_and_errors_never_show_credentials(caplog: pytest.LogCaptureFixture) -> None:
    with RecordingServer() as server:
        url = server.url.replace("nats://", "nats://alice:S3CRET@")
        with caplog.at_level(logging.DEBUG, "natsync"):
            with (
                natsync.Client(url) as client,
                natsync.ConnectionPool(url) as pool,
                natsync.Subscriber(url) as subscriber,
            ):
                pool.publish("x")
                shown = f"{client!r} {pool!r} {subscriber!r} {client.stats()} {pool.stats()} {subscriber.stats()}"
        assert server.connects[0]["pass"] == "S3CRET"
    with caplog.at_level(logging.DEBUG, "natsync"), pytest.raises(natsync.NoServersError) as caught:
        natsync.Client(url, connect_timeout=1).open()
    assert "S3CRET" not in caplog.text + shown + str(caught.value) + repr(caught.value)
    assert "connected to nats://127.0.0.1:" in caplog.text
