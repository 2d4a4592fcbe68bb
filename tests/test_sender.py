"""ResponseSender and what runs around a handler: threads, ends, guards, faults, cancels, against a real nats-server.

What does not depend on the mode runs in both.
"""

from __future__ import annotations

import gc
import http.client
import logging
import queue
import socket
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import requests

import natsync
from broker import QUICK, Outcome
from natsync.concurrency import Deadline
from natsync.streaming import framed_sender
from natsync.streaming.framed_sender import FramedSender
from natsync.streaming.plain_sender import PlainSender
from natsync.streaming.sender import SenderCore
from natsync.streaming.terms import Offer
from natsync.testing import FaultProxy, NatsServer, eventually
from rawclient import END, ERROR, PATIENCE, RawClient
from support import framed_only, plain_only, shown
from thirdparty import ThirdParty

Handler = Callable[[natsync.HandlerContext, natsync.Message, natsync.ResponseSender], object]


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


class Open:
    """A stream between `client` and a sender that the test drives: .sender, .ctx, .stream."""

    def __init__(self, client: natsync.Client, subscriber: natsync.Subscriber) -> None:
        arrived: queue.SimpleQueue[tuple[natsync.ResponseSender, natsync.HandlerContext]] = queue.SimpleQueue()
        self.handle = subscriber.stream_subscribe("s.open", lambda ctx, request, sender: arrived.put((sender, ctx)))
        self.stream = client.stream("s.open")
        self.sender, self.ctx = arrived.get(timeout=PATIENCE)

    def begin(self) -> None:
        """Send and take a chunk, so that both sides know each other's address."""
        self.sender.send(b"the first chunk")
        assert self.stream.next(PATIENCE) == b"the first chunk"


@contextmanager
def opened_at(server: NatsServer, mode: str) -> Iterator[Open]:
    """A stream by way of a server of the test's own."""
    framed = mode == "framed"
    with natsync.Subscriber(server.url) as subscriber, natsync.connect(server.url, framed=framed) as client:
        yield Open(client, subscriber)


#: What fill() sends.
BLOCK = b"x" * 100_000


def fill(sender: natsync.ResponseSender) -> int:
    """Send blocks until there is no room: the kernel's buffers are full (plain), or the credit is used up. How many."""
    begin, refused = time.monotonic(), 0
    while refused < 50:  # in a row: a moment in which this thread alone did not run is one of them
        if sender.try_send(BLOCK):
            refused = 0
            assert time.monotonic() < begin + PATIENCE, "an endless queue"
        else:
            refused += 1
            sender.closed.wait(0.005)
    return sender.send_count


@pytest.fixture
def opened(client: natsync.Client, subscriber: natsync.Subscriber) -> Iterator[Open]:
    opened = Open(client, subscriber)
    yield opened
    opened.stream.close()
    opened.sender.end()  # a plain handler that has sent nothing yet is not told
    assert opened.sender.closed.wait(PATIENCE)


# -- threads -------------------------------------------------------------------------------------------------------


def test_several_threads_lose_and_tear_nothing_and_the_end_is_last(opened: Open) -> None:
    def send(thread: int) -> None:
        for n in range(500):
            opened.sender.send(b"%d:%d:" % (thread, n) + b"x" * (n % 50))

    def run() -> None:
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(send, thread) for thread in range(8)]:
                done.result(PATIENCE)
        opened.sender.end()

    worker = threading.Thread(target=run)
    worker.start()
    chunks = list(opened.stream)
    worker.join(PATIENCE)
    assert opened.sender.send_count == len(chunks) == 4000
    for thread in range(8):
        own = [chunk for chunk in chunks if chunk.startswith(b"%d:" % thread)]
        assert own == [b"%d:%d:" % (thread, n) + b"x" * (n % 50) for n in range(500)]


def test_an_end_from_one_thread_comes_behind_every_send_that_had_returned(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    returned: list[list[int]] = []

    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        numbers: list[int] = []
        returned.append(numbers)

        def send() -> None:
            try:
                while True:
                    numbers.append(sender.send(b"x"))
                    if len(numbers) > 30_000:  # a plain stream's requester takes no more than 65,536 that wait
                        sender.closed.wait(PATIENCE)
            except natsync.StreamClosed:
                pass

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda: sender.send_count > 100)
        sender.end()
        for thread in threads:
            thread.join()

    subscriber.stream_subscribe("s.race", handler)
    for _ in range(5):
        count = len(list(client.stream("s.race", timeout=PATIENCE)))
        eventually(lambda count=count: len(returned[-1]) == count)
        assert sorted(returned[-1]) == list(range(1, count + 1))


def test_concurrent_ends_send_one_end(raw: RawClient, subscriber: natsync.Subscriber) -> None:
    kept: list[natsync.ResponseSender] = []
    subscriber.stream_subscribe("s.ends", lambda ctx, request, sender: kept.append(sender))
    raw.request("s.ends")
    eventually(lambda: kept)
    together = threading.Barrier(8, timeout=PATIENCE)

    def end() -> bool:
        together.wait()
        return kept[0].end()

    with ThreadPoolExecutor(8) as pool:
        ends = [pool.submit(end) for _ in range(8)]
        assert [one.result(PATIENCE) for one in ends] == [True] * 8
    assert [one.payload for one in raw.stream()] == [END]
    assert raw.received() == []


# -- sending -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "chunk"),
    [("tëxt", "tëxt".encode()), (b"bytes", b"bytes"), (bytearray(b"ba"), b"ba"), (memoryview(b"mv"), b"mv"), ("", b"")],
    ids=["str", "bytes", "bytearray", "memoryview", "empty"],
)
def test_send_takes_bytes_like_and_text(opened: Open, data: natsync.message.Payload, chunk: bytes) -> None:
    assert opened.sender.send(data) == 1
    assert opened.stream.next(PATIENCE) == chunk


@pytest.mark.parametrize("data", [None, 5, 1.5, ["a"], {"a": 1}, object()], ids=shown)
def test_send_refuses_what_is_no_payload(opened: Open, data: object) -> None:
    with pytest.raises(TypeError):
        opened.sender.send(data)  # type: ignore[arg-type]
    assert opened.sender.send_count == 0
    assert not opened.sender.is_closed()


def test_a_buffer_may_be_reused_once_send_has_returned(opened: Open) -> None:
    buffer = bytearray(b"1111")
    for n in (b"2222", b"3333"):
        opened.sender.send(buffer)
        buffer[:] = n
    opened.sender.end()
    assert list(opened.stream) == [b"1111", b"2222"]


def test_send_after_end_raises_stream_closed(opened: Open) -> None:
    opened.sender.send(b"1")
    opened.sender.end()
    for send in (opened.sender.send, opened.sender.try_send):
        with pytest.raises(natsync.StreamClosed) as caught:
            send(b"2")
        assert caught.value.last_seq == 1
    with pytest.raises(natsync.StreamClosed):
        opened.sender.send_many([b"2"])
    assert list(opened.stream) == [b"1"]


def test_send_many_keeps_the_order_and_returns_the_last_number(opened: Open) -> None:
    opened.sender.send(b"0")
    assert opened.sender.send_many(b"%d" % n for n in range(1, 2001)) == 2001
    assert opened.sender.send_many([]) == 2001
    opened.sender.end()
    assert list(opened.stream) == [b"%d" % n for n in range(2001)]


def test_send_many_queues_nothing_if_one_chunk_is_larger_than_the_requester_takes(
    nats_server: NatsServer, subscriber: natsync.Subscriber
) -> None:
    with natsync.connect(nats_server.url, max_message_bytes=100_000) as client:
        opened = Open(client, subscriber)
        with pytest.raises(natsync.MaxPayloadExceeded):
            opened.sender.send_many([b"1", b"2", b"x" * 100_001])
        assert opened.sender.send_count == 0
        opened.sender.end()
        assert list(opened.stream) == []


@plain_only
def test_send_many_queues_nothing_if_one_chunk_cannot_be_sent(opened: Open) -> None:
    for bad in (None, END, b"x" * (2 << 20)):
        with pytest.raises((TypeError, natsync.InvalidArgument, natsync.MaxPayloadExceeded)):
            opened.sender.send_many([b"1", b"2", bad])  # type: ignore[list-item]
    assert opened.sender.send_count == 0
    opened.sender.end()
    assert list(opened.stream) == []


def test_send_many_keeps_the_headers_with_the_first_chunk_only(raw: RawClient, subscriber: natsync.Subscriber) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.set_header("K", "v")
        sender.send_many([b"1", b"2", b"3"])
        sender.end()

    subscriber.stream_subscribe("s.many.headers", handler)
    raw.request("s.many.headers")
    blocks = [one.block for one in raw.stream()]
    assert blocks == [b"NATS/1.0\r\nK: v\r\n\r\n", None, None, None]


def test_chunks_of_two_threads_do_not_get_into_each_others_batches(opened: Open) -> None:
    def send(thread: int) -> None:
        for batch in range(50):
            opened.sender.send_many(b"%d:%d:%d" % (thread, batch, n) for n in range(20))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(send, thread) for thread in range(4)]:
            done.result(PATIENCE)
    opened.sender.end()
    chunks = list(opened.stream)
    assert len(chunks) == 4000
    for begin in range(0, 4000, 20):
        assert len({chunk.rpartition(b":")[0] for chunk in chunks[begin : begin + 20]}) == 1


def test_try_send_says_whether_the_chunk_was_taken(opened: Open) -> None:
    assert opened.sender.try_send(b"1") is True
    assert opened.sender.send_count == 1
    assert opened.stream.next(PATIENCE) == b"1"


def test_try_send_does_not_wait_while_the_link_takes_nothing(
    make_nats_server: Callable[..., NatsServer], mode: str
) -> None:
    server = make_nats_server()
    with opened_at(server, mode) as opened:
        server.pause()
        count = fill(opened.sender)
        begin = time.monotonic()
        assert opened.sender.try_send(BLOCK) is False
        assert time.monotonic() - begin < 5
        assert opened.sender.send_count == count
        server.resume()
        opened.stream.close()
        assert opened.sender.closed.wait(PATIENCE)


def test_send_waits_for_room_up_to_its_timeout(make_nats_server: Callable[..., NatsServer], mode: str) -> None:
    server = make_nats_server()
    with opened_at(server, mode) as opened:
        server.pause()
        count = fill(opened.sender)
        begin = time.monotonic()
        with pytest.raises(natsync.TimedOut):
            opened.sender.send(BLOCK, timeout=0.1)
        assert 0.09 <= time.monotonic() - begin < 5
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(opened.sender.send, BLOCK, timeout=PATIENCE)
            server.resume()
            taken = pool.submit(list, opened.stream)
            assert waiting.result(PATIENCE) == count + 1
            opened.sender.end()
            assert len(taken.result(PATIENCE)) == count + 1


@framed_only
def test_send_waits_for_the_consumer_in_framed_mode(opened: Open) -> None:
    count = fill(opened.sender)
    with pytest.raises(natsync.TimedOut):
        opened.sender.send(BLOCK, timeout=0.1)
    for _ in range(count):
        assert opened.stream.next(PATIENCE) == BLOCK
    assert opened.sender.send(BLOCK, timeout=PATIENCE) == count + 1


def test_a_send_that_waits_for_room_is_woken_by_a_cancel(
    make_nats_server: Callable[..., NatsServer], mode: str
) -> None:
    server = make_nats_server()
    with opened_at(server, mode) as opened:
        server.pause()
        fill(opened.sender)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(opened.sender.send, BLOCK)
            opened.handle.ctx.cancel("enough")
            try:
                with pytest.raises(natsync.StreamCancelled):
                    waiting.result(5)
            finally:
                server.resume()


# -- ending --------------------------------------------------------------------------------------------------------


def test_end_with_wait_returns_when_the_other_side_has_everything(opened: Open) -> None:
    opened.sender.send(b"1")
    assert opened.sender.end(wait=PATIENCE) is True
    assert list(opened.stream) == [b"1"]


def test_end_with_wait_is_false_if_the_other_side_does_not_confirm(
    make_nats_server: Callable[..., NatsServer], mode: str
) -> None:
    server = make_nats_server()
    with opened_at(server, mode) as opened:
        server.pause()
        opened.sender.send(b"1")
        begin = time.monotonic()
        assert opened.sender.end(wait=0.2) is False
        assert 0.19 <= time.monotonic() - begin < 5
        server.resume()
        assert list(opened.stream) == [b"1"]


@pytest.fixture
def far(
    nats_server: NatsServer, client: natsync.Client, make_fault_proxy: Callable[..., FaultProxy]
) -> Iterator[tuple[Open, FaultProxy]]:
    """A stream whose responder's link can be broken, with a first chunk that the server has for sure."""
    proxy = make_fault_proxy(nats_server.url)
    with natsync.Subscriber(proxy.url, discover=False, **QUICK) as subscriber:
        opened = Open(client, subscriber)
        opened.begin()
        opened.sender._core._connection.flush(Deadline.after(PATIENCE))
        yield opened, proxy
        opened.sender.end()


def handed_over(sender: natsync.ResponseSender) -> bool:
    """Whether the link was given all that was sent."""
    return not sender._core._connection.stats()["out_pending_bytes"]


def lose(sender: natsync.ResponseSender, proxy: FaultProxy) -> None:
    """Have the link lost with all that was sent last, and wait for the next one."""
    connection = sender._core._connection
    eventually(lambda: handed_over(sender))
    reconnects = connection.stats()["reconnects"]
    proxy.reset()
    proxy.up.resume()
    eventually(lambda: connection.linked and connection.stats()["reconnects"] > reconnects, PATIENCE)


@plain_only
def test_end_with_wait_is_false_if_the_end_was_lost_with_the_link(far: tuple[Open, FaultProxy]) -> None:
    opened, proxy = far
    proxy.up.stall()
    opened.sender.send(b"lost")
    assert opened.sender.end()
    lose(opened.sender, proxy)
    assert opened.sender.end(wait=PATIENCE) is False
    with pytest.raises(natsync.ServerLost, match="broke in mid-stream"):
        opened.stream.next(PATIENCE)


@plain_only
def test_a_stream_whose_end_is_lost_under_its_handler_counts_as_failed(
    nats_server: NatsServer, client: natsync.Client, make_fault_proxy: Callable[..., FaultProxy]
) -> None:
    proxy, ends = make_fault_proxy(nats_server.url), list[bool]()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        proxy.up.stall()
        ends.append(sender.end())
        lose(sender, proxy)
        ends.append(sender.end())

    with natsync.Subscriber(proxy.url, discover=False, **QUICK) as subscriber:
        handle = subscriber.stream_subscribe("s.lost", handler)
        with pytest.raises(natsync.ServerLost, match="broke in mid-stream"):
            client.stream("s.lost").next(PATIENCE)
        eventually(lambda: not handle.stats["active"])
        assert ends == [True, False]
        assert (handle.stats["processed"], handle.stats["failed"]) == (0, 1)
        assert "broke in mid-stream" in (handle.last_error or "")


@plain_only
def test_a_wait_for_the_end_is_told_at_once_that_it_was_lost(far: tuple[Open, FaultProxy]) -> None:
    opened, proxy = far
    core = opened.sender._core
    assert isinstance(core, PlainSender)
    proxy.up.stall()
    ending = Outcome(lambda: opened.sender.end(wait=6 * PATIENCE))
    eventually(lambda: core._end_mark and handed_over(opened.sender))
    proxy.refuse()  # there is no other link
    proxy.reset()
    assert ending.within(PATIENCE) is None
    assert ending.value is False
    proxy.up.resume()
    proxy.forward()
    with pytest.raises(natsync.ServerLost, match="broke in mid-stream"):
        opened.stream.next(PATIENCE)


@plain_only
def test_end_with_wait_is_true_if_the_next_link_takes_the_end(far: tuple[Open, FaultProxy]) -> None:
    opened, proxy = far
    proxy.refuse()
    proxy.reset()
    eventually(lambda: not opened.sender._core._connection.linked)
    ending = Outcome(lambda: opened.sender.end(wait=PATIENCE))
    assert opened.sender.closed.wait(PATIENCE)
    proxy.forward()
    assert ending.within(PATIENCE) is None
    assert ending.value is True
    assert list(opened.stream) == []


@plain_only
def test_end_with_wait_is_false_while_another_thread_has_yet_to_send_the_end(opened: Open) -> None:
    deciding, go_on = threading.Event(), threading.Event()
    opened.sender._core.when_closed(lambda: deciding.set() or go_on.wait(PATIENCE))
    ending = Outcome(lambda: opened.sender.end(wait=PATIENCE))
    assert deciding.wait(PATIENCE)
    assert opened.sender.end(wait=0.1) is False
    go_on.set()
    assert ending.within(PATIENCE) is None
    assert ending.value is True


def test_end_is_false_after_an_error(opened: Open) -> None:
    opened.sender.send_error("broken")
    assert opened.sender.end() is False


def test_end_is_false_after_a_cancel(opened: Open) -> None:
    opened.begin()
    opened.stream.cancel()
    assert opened.sender.closed.wait(PATIENCE)
    assert opened.sender.end() is False


def test_send_error_after_the_end_has_no_effect(opened: Open) -> None:
    opened.sender.end()
    opened.sender.send_error("too late")
    assert list(opened.stream) == []


class NoSuchUser(KeyError):
    """With the text of a KeyError."""


class NoSuchRoom(KeyError):
    def __str__(self) -> str:
        return f"there is no {self.args[0]}"


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ("plain text", "plain text"),
        (ValueError("bad input"), "bad input"),
        (RuntimeError("no"), "no"),
        (IndexError("list index out of range"), "list index out of range"),
        (KeyError("k"), "KeyError: 'k'"),
        (KeyError(), "KeyError"),
        (NoSuchUser("ada"), "NoSuchUser: 'ada'"),
        (NoSuchRoom("hall"), "there is no hall"),
        (SystemExit(3), "SystemExit: 3"),
        (StopIteration(5), "StopIteration: 5"),
        (OSError(), "OSError"),
        (Unspeakable("x"), "Unspeakable"),
    ],
    ids=shown,
)
def test_send_error_takes_a_text_or_an_exception(opened: Open, error: str | BaseException, text: str) -> None:
    opened.sender.send_error(error)
    with pytest.raises(natsync.HandlerError) as caught:
        next(opened.stream)
    assert caught.value.message == text
    assert caught.value.code == natsync.Code.UNKNOWN


def test_details_that_would_exceed_max_payload_do_not_break_the_link(opened: Open, client: natsync.Client) -> None:
    opened.sender.send_error("too much to tell", details="x" * (2 << 20))
    with pytest.raises(natsync.HandlerError, match="too much to tell"):
        opened.stream.next(PATIENCE)
    with pytest.raises(natsync.NoRespondersError):
        client.request("s.nobody")


def test_an_error_text_beyond_max_payload_is_cut(opened: Open) -> None:
    opened.sender.send_error("ü" * (1 << 20))
    with pytest.raises(natsync.HandlerError) as caught:
        opened.stream.next(PATIENCE)
    assert caught.value.message.startswith("ü" * 100_000)


def test_trailers_beyond_max_payload_are_refused_and_the_stream_goes_on(opened: Open) -> None:
    with pytest.raises(natsync.MaxPayloadExceeded):
        opened.sender.end(trailers={"T": "x" * (2 << 20)})
    assert not opened.sender.is_closed()
    opened.sender.send(b"chunk")
    opened.sender.end(trailers={"T": "x"})
    assert list(opened.stream) == [b"chunk"]
    assert opened.stream.trailers["T"] == "x"


@plain_only
def test_trailers_as_large_as_max_payload_arrive_and_none_larger(opened: Open) -> None:
    limit = opened.sender._core._connection.info["max_payload"]
    room = limit - len(natsync.Headers({"T": ""}).encode()) - len(END)
    with pytest.raises(natsync.MaxPayloadExceeded) as caught:
        opened.sender.end(trailers={"T": "x" * (room + 1)})
    assert (caught.value.size_bytes, caught.value.limit_bytes) == (limit + 1, limit)
    assert opened.sender.end(trailers={"T": "x" * room}, wait=PATIENCE)
    assert list(opened.stream) == []
    assert len(opened.stream.trailers["T"]) == room


def test_trailers_of_any_size_are_left_out_for_requesters_that_are_not_natsyncs(
    raw: RawClient, subscriber: natsync.Subscriber
) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.send(b"chunk")
        sender.end(trailers={"T": "x" * (2 << 20)})

    subscriber.stream_subscribe("s.trailers", handler)
    raw.request("s.trailers")
    assert [one.payload for one in raw.stream()] == [b"chunk", END]


# -- learning of the end -------------------------------------------------------------------------------------------


def test_closed_is_an_event_set_by_end(opened: Open) -> None:
    assert isinstance(opened.sender.closed, threading.Event)
    assert not opened.sender.closed.is_set()
    assert not opened.sender.is_closed()
    opened.sender.end()
    assert opened.sender.closed.is_set()
    assert opened.sender.is_closed()


def test_closed_wakes_a_thread_that_waits_for_it(opened: Open) -> None:
    opened.begin()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(opened.sender.closed.wait, PATIENCE)
        opened.stream.close()
        assert waiting.result(PATIENCE) is True


def test_a_cancel_ends_the_handlers_context_with_the_requesters_reason(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    seen: list[str | None] = []

    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.send(b"here I am")
        ctx.wait(PATIENCE)
        seen.append(ctx.reason)

    subscriber.stream_subscribe("s.reason", handler)
    stream = client.stream("s.reason")
    assert stream.next(PATIENCE) == b"here I am"
    stream.cancel("the tab was closed")
    eventually(lambda: seen)
    assert seen == ["the tab was closed"]


@pytest.mark.parametrize("how", ["end", "send_error", "drop"])
def test_a_handler_that_sees_its_context_end_first_ends_the_stream_for_that_reason(opened: Open, how: str) -> None:
    opened.begin()
    opened.ctx._error = natsync.Cancelled("shutting down")  # as it is before the callbacks of cancel() have run
    if how == "drop":
        opened.sender._core.dropped()
    elif how == "end":
        assert not opened.sender.end()
    else:
        opened.sender.send_error("whatever")
    with pytest.raises(natsync.ServerLost, match="shutting down") as caught:
        opened.stream.next(PATIENCE)
    assert caught.value.code == natsync.Code.UNAVAILABLE


def test_a_handler_that_raises_because_its_context_ended_is_not_logged_as_failed(
    client: natsync.Client, subscriber: natsync.Subscriber, caplog: pytest.LogCaptureFixture
) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.send(b"here I am")
        ctx._error = natsync.Cancelled("shutting down")
        ctx.check()

    subscriber.stream_subscribe("s.check", handler)
    stream = client.stream("s.check")
    assert stream.next(PATIENCE) == b"here I am"
    with pytest.raises(natsync.ServerLost, match="shutting down"):
        stream.next(PATIENCE)
    assert "raised" not in caplog.text


@pytest.mark.parametrize("how", ["end", "send_error", "cancel", "ctx"])
def test_on_close_runs_once_on_a_worker_however_the_stream_ends(opened: Open, how: str) -> None:
    opened.begin()
    threads: queue.SimpleQueue[str] = queue.SimpleQueue()
    opened.sender.on_close(lambda: threads.put(threading.current_thread().name))
    {
        "end": opened.sender.end,
        "send_error": lambda: opened.sender.send_error("x"),
        "cancel": opened.stream.cancel,
        "ctx": opened.ctx.cancel,
    }[how]()
    name = threads.get(timeout=PATIENCE)
    assert "worker" in name
    opened.sender.end()
    with pytest.raises(queue.Empty):
        threads.get(timeout=0.05)


def test_on_close_after_the_end_runs_soon(opened: Open) -> None:
    opened.sender.end()
    ran = threading.Event()
    opened.sender.on_close(ran.set)
    assert ran.wait(PATIENCE)


def test_on_close_may_block_without_blocking_anybody_else(opened: Open, client: natsync.Client) -> None:
    go_on = threading.Event()
    opened.sender.on_close(lambda: go_on.wait(PATIENCE))
    opened.sender.end()
    assert list(opened.stream) == []
    assert client.rtt(PATIENCE) < PATIENCE
    go_on.set()


def test_on_close_that_raises_is_logged(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    opened.sender.on_close(lambda: 1 / 0)
    opened.sender.end()
    eventually(lambda: "ZeroDivisionError" in caplog.text)


# -- the guard against forged ends ---------------------------------------------------------------------------------


@framed_only
@pytest.mark.parametrize("payload", [END, ERROR, ERROR + b"text"], ids=repr)
def test_any_payload_is_data_in_framed_mode(opened: Open, payload: bytes) -> None:
    opened.sender.send(payload)
    assert opened.sender.try_send(payload)
    opened.sender.send_many([payload, b"behind"])
    opened.sender.end()
    assert list(opened.stream) == [payload, payload, payload, b"behind"]


@plain_only
@pytest.mark.parametrize("payload", [END, ERROR, ERROR + b"text", "__STREAM_END__", bytearray(END)], ids=repr)
def test_a_chunk_that_would_forge_an_end_is_a_value_error(opened: Open, payload: natsync.message.Payload) -> None:
    for send in (opened.sender.send, opened.sender.try_send, lambda data: opened.sender.send_many([data])):
        with pytest.raises(ValueError, match="end"):
            send(payload)
    assert opened.sender.send_count == 0
    assert not opened.sender.is_closed()
    opened.sender.send(b"harmless")
    assert opened.stream.next(PATIENCE) == b"harmless"


def test_a_generator_that_would_forge_an_end_is_answered_with_an_error(
    raw: RawClient, subscriber: natsync.Subscriber
) -> None:
    subscriber.stream_subscribe("s.forge", lambda ctx, request: [b"1", END, b"3"])
    raw.request("s.forge")
    payloads = [one.payload for one in raw.stream()]
    assert payloads[0] == b"1"
    assert payloads[1].startswith(ERROR)
    assert len(payloads) == 2


# -- handlers that fail ---------------------------------------------------------------------------------------------


def test_a_handler_that_raises_is_answered_logged_and_the_next_request_works(
    client: natsync.Client, subscriber: natsync.Subscriber, caplog: pytest.LogCaptureFixture
) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        if request.data == b"bad":
            raise LookupError("a fault of the handler")
        sender.send(b"fine")
        sender.end()

    subscriber.stream_subscribe("s.raise", handler)
    with pytest.raises(natsync.HandlerError, match="a fault of the handler"):
        list(client.stream("s.raise", b"bad"))
    (record,) = eventually(lambda: [one for one in caplog.records if one.exc_info])
    assert record.levelno == logging.ERROR
    assert "s.raise" in record.getMessage()
    eventually(lambda: "Traceback" in caplog.text)
    assert list(client.stream("s.raise", b"good")) == [b"fine"]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt("k"), BaseException("base")], ids=repr)
def test_even_a_handler_that_wants_to_exit_is_answered(
    client: natsync.Client, subscriber: natsync.Subscriber, error: BaseException
) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        raise error

    subscriber.stream_subscribe("s.exit", handler)
    for _ in range(2):
        with pytest.raises(natsync.HandlerError):
            list(client.stream("s.exit", timeout=PATIENCE))


def test_a_handler_that_raises_after_its_end_changes_nothing_for_the_client(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.send(b"1")
        sender.end()
        raise RuntimeError("behind the end")

    subscriber.stream_subscribe("s.behind", handler)
    assert list(client.stream("s.behind")) == [b"1"]


@framed_only
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), natsync.Code.UNKNOWN),
        (TimeoutError("x"), natsync.Code.DEADLINE_EXCEEDED),
        (natsync.StreamError("x", code=natsync.Code.NOT_FOUND), natsync.Code.NOT_FOUND),
    ],
    ids=["any", "timeout", "with a code of its own"],
)
def test_the_code_of_a_raised_error_reaches_the_client(
    client: natsync.Client, subscriber: natsync.Subscriber, error: Exception, code: natsync.Code
) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"1"
        raise error

    subscriber.stream_subscribe("s.code", handler)
    with pytest.raises(natsync.HandlerError) as caught:
        list(client.stream("s.code"))
    assert caught.value.code == code


def test_a_sender_that_is_dropped_without_an_end_is_an_error_at_the_client(
    client: natsync.Client, subscriber: natsync.Subscriber, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.send(b"1")

    subscriber.stream_subscribe("s.drop", handler)
    stream = client.stream("s.drop")
    assert stream.next(PATIENCE) == b"1"
    with pytest.raises(natsync.HandlerError, match="without ending") as caught:
        stream.next(PATIENCE)
    assert caught.value.code == natsync.Code.INTERNAL
    eventually(lambda: "s.drop" in caplog.text)


def test_a_thread_that_dies_with_its_sender_ends_the_stream_with_an_error(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        def work(sender: natsync.ResponseSender) -> None:
            sender.send(b"1")  # and forgets the end

        threading.Thread(target=work, args=(sender,)).start()

    subscriber.stream_subscribe("s.dies", handler)
    stream = client.stream("s.dies")
    assert stream.next(PATIENCE) == b"1"
    gc.collect()
    with pytest.raises(natsync.HandlerError):
        stream.next(PATIENCE)


def test_a_handler_may_return_what_is_no_iterator_only_with_a_sender(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    subscriber.stream_subscribe("s.number", lambda ctx, request: 5)
    with pytest.raises(natsync.HandlerError, match="int"):
        list(client.stream("s.number"))


def test_a_generator_that_yields_what_is_no_payload_is_an_error(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    subscriber.stream_subscribe("s.payload", lambda ctx, request: [b"1", 2])
    stream = client.stream("s.payload")
    assert stream.next(PATIENCE) == b"1"
    with pytest.raises(natsync.HandlerError, match="int"):
        stream.next(PATIENCE)


def test_a_request_without_a_reply_subject_is_logged_and_ignored(
    client: natsync.Client, subscriber: natsync.Subscriber, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[bytes] = []

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> list[bytes]:
        runs.append(request.data)
        return [b"x"]

    subscriber.stream_subscribe("s.noreply", handler)
    client.publish("s.noreply", b"no answer wanted")
    assert list(client.stream("s.noreply", b"answer wanted")) == [b"x"]
    assert runs == [b"answer wanted"]
    assert "reply subject" in caplog.text


def test_a_request_whose_context_has_ended_already_is_closed_without_a_fault(
    subscriber: natsync.Subscriber, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    ended = natsync.Context()
    ended.cancel("before the request came")
    responder = subscriber._responder
    assert responder is not None
    connection, reply = responder.connection, b"s.gone.1"
    if mode == "framed":
        offer = Offer(window=10, window_bytes=10_000, grace=0.1, heartbeat=5.0)
        core: SenderCore = FramedSender(connection, responder._framing, reply, ended, "s.x", offer)
    else:
        core = PlainSender(connection, responder._plain, reply, ended, "s.x", natsync_peer=True)
    assert core.over.happened
    eventually(lambda: not responder._plain.waiters and not responder._framed.waiters)
    eventually(lambda: not responder._framing)
    assert "raised" not in caplog.text


# -- what gathers --------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is forgotten stays so for the length of the test."""
    monkeypatch.setattr(framed_sender, "FIRST_REPEAT", 60.0)
    monkeypatch.setattr(framed_sender, "LONGEST_REPEAT", 60.0)


@framed_only
@pytest.mark.usefixtures("nothing_is_repeated")
def test_chunks_that_no_others_follow_leave_by_themselves(opened: Open) -> None:
    took = []
    for number in range(1, 200):
        count = number % 7 + 1
        begin = time.monotonic()
        for _ in range(count):
            opened.sender.send(b"%d" % number)
        for _ in range(count):
            assert opened.stream.next(PATIENCE) == b"%d" % number
        took.append(time.monotonic() - begin)
    assert statistics.median(took) < 0.15  # not with the requester's next account, which comes every 0.2 s


@framed_only
@pytest.mark.usefixtures("nothing_is_repeated")
@pytest.mark.parametrize("form", ["send", "try_send", "send_many"])
def test_what_has_gathered_leaves_with_the_end(
    client: natsync.Client, subscriber: natsync.Subscriber, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(framed_sender, "GATHER_SECONDS", 60.0)

    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        for _ in range(50):
            getattr(sender, form)([b"x"] if form == "send_many" else b"x")
        sender.end()

    subscriber.stream_subscribe("s.gather", handler)
    for _ in range(20):
        assert list(client.stream("s.gather", timeout=PATIENCE)) == [b"x"] * 50


@framed_only
@pytest.mark.usefixtures("nothing_is_repeated")
def test_what_has_gathered_leaves_before_the_sender_waits_for_credit(
    client: natsync.Client, subscriber: natsync.Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(framed_sender, "GATHER_SECONDS", 60.0)

    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        for _ in range(100):
            sender.send(b"x", timeout=PATIENCE)
        sender.end()

    subscriber.stream_subscribe("s.gather", handler)
    for window in (1, 2, 7, 50):
        assert list(client.stream("s.gather", window=window, timeout=PATIENCE)) == [b"x"] * 100


@framed_only
@pytest.mark.usefixtures("nothing_is_repeated")
def test_several_threads_that_gather_keep_the_order_of_each_and_have_nothing_sent_again(opened: Open) -> None:
    opened.begin()

    def send(thread: int) -> None:
        for n in range(20_000):
            opened.sender.send(b"%d:%d" % (thread, n))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    seen = [-1, -1, -1]
    for _ in range(60_000):
        thread_number, _, n = opened.stream.next(PATIENCE).partition(b":")
        assert int(n) == seen[int(thread_number)] + 1
        seen[int(thread_number)] += 1
    for thread in threads:
        thread.join(PATIENCE)
    stats = opened.stream.stats
    assert (stats["gaps"], stats["resent"]) == (0, 0)  # one thread at a time asked the sender for frames


# -- generators ----------------------------------------------------------------------------------------------------


class Watched:
    """A generator handler that tells how it went."""

    def __init__(self) -> None:
        self.finally_ran = threading.Event()
        self.threads: list[str] = []
        self.first_sent = threading.Event()

    def handler(self, ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        self.threads.append(threading.current_thread().name)
        try:
            yield b"first"
            while True:
                self.first_sent.set()
                ctx.wait(0.005)
                yield b"more"
        finally:
            self.threads.append(threading.current_thread().name)
            self.finally_ran.set()


def test_a_generators_finally_runs_in_its_own_thread_after_a_cancel(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    watched = Watched()
    subscriber.stream_subscribe("s.generator", watched.handler)
    with client.stream("s.generator") as stream:
        assert stream.next(PATIENCE) == b"first"
    assert watched.finally_ran.wait(PATIENCE)
    assert len(set(watched.threads)) == 1
    assert "stream-worker" in watched.threads[0]


def test_a_generators_finally_runs_when_a_plain_requester_is_gone(
    raw: RawClient, subscriber: natsync.Subscriber
) -> None:
    watched = Watched()
    subscriber.stream_subscribe("s.generator", watched.handler)
    raw.request("s.generator")
    assert raw.next().payload == b"first"
    raw.close()
    assert watched.finally_ran.wait(PATIENCE)


def test_a_generators_finally_runs_when_its_registration_is_cancelled(
    raw: RawClient, subscriber: natsync.Subscriber
) -> None:
    watched = Watched()
    handle = subscriber.stream_subscribe("s.generator", watched.handler)
    raw.request("s.generator")
    assert watched.first_sent.wait(PATIENCE)
    handle.ctx.cancel("maintenance")
    assert watched.finally_ran.wait(PATIENCE)
    assert raw.stream()[-1].payload == ERROR + b"maintenance"


def test_an_exception_in_a_generators_finally_is_logged_not_lost(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        try:
            yield b"1"
        finally:
            raise RuntimeError("cleaning up failed")

    subscriber.stream_subscribe("s.cleanup", handler)
    with pytest.raises(natsync.HandlerError, match="cleaning up failed"):
        list(client.stream("s.cleanup"))


def test_any_iterable_of_chunks_will_do(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    subscriber.stream_subscribe("s.iterable", lambda ctx, request: (text for text in ("a", b"b", bytearray(b"c"))))
    subscriber.stream_subscribe("s.none", lambda ctx, request: None)
    subscriber.stream_subscribe("s.bytes", lambda ctx, request: b"one chunk")
    assert list(client.stream("s.iterable")) == [b"a", b"b", b"c"]
    assert list(client.stream("s.none")) == []
    assert list(client.stream("s.bytes")) == [b"one chunk"]


# -- third parties -------------------------------------------------------------------------------------------------


def read_requests(ctx: natsync.Context, url: str) -> Iterator[bytes]:
    with ctx.closing(requests.get(url, stream=True, timeout=60)) as response:
        yield from response.iter_lines(chunk_size=None)


def read_http_client(ctx: natsync.Context, url: str) -> Iterator[bytes]:
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", "/" + path)
    with ctx.closing(connection.getresponse()) as response:
        while line := response.readline():
            yield line.rstrip()
    connection.close()


def read_urllib(ctx: natsync.Context, url: str) -> Iterator[bytes]:
    with ctx.closing(urllib.request.urlopen(url, timeout=60)) as response:
        for line in response:
            yield line.rstrip()


def read_socket(ctx: natsync.Context, url: str) -> Iterator[bytes]:
    host, _, path = url.removeprefix("http://").partition("/")
    name, port = host.split(":")
    with ctx.closing(socket.create_connection((name, int(port)), timeout=60)) as sock:
        sock.sendall(f"GET /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        pending = b""
        while data := sock.recv(4096):
            *lines, pending = (pending + data).split(b"\n")
            yield from (line for line in lines if line.startswith(b"{"))


READERS = [read_requests, read_http_client, read_urllib, read_socket]


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_closing_wakes_a_blocked_read_from_a_third_party_on_cancel(
    client: natsync.Client, subscriber: natsync.Subscriber, read: Callable[[natsync.Context, str], Iterator[bytes]]
) -> None:
    left = threading.Event()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        try:
            yield from read(ctx, request.text())
        finally:
            left.set()

    subscriber.stream_subscribe("s.third", handler)
    with ThirdParty() as party:
        stream = client.stream("s.third", f"{party.url}/hang/1")
        assert stream.next(PATIENCE) == b'{"piece": 0}'
        assert party.hanging.wait(PATIENCE)
        begin = time.monotonic()
        stream.cancel()
        assert left.wait(PATIENCE)
        assert time.monotonic() - begin < 5
        assert not party.released.is_set()


def test_closing_closes_what_it_was_given_when_the_block_is_left(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    class Source:
        closed = False

        def close(self) -> None:
            self.closed = True

    source = Source()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        with ctx.closing(source) as same:
            assert same is source
            yield b"1"

    subscriber.stream_subscribe("s.closing", handler)
    assert list(client.stream("s.closing")) == [b"1"]
    assert source.closed


# -- its text -----------------------------------------------------------------------------------------------------


def test_the_sender_names_itself_without_its_payload(opened: Open) -> None:
    opened.sender.send(b"secret")
    assert repr(opened.sender) == "<ResponseSender for 's.open': open, 1 sent>"
    opened.sender.end()
    assert repr(opened.sender) == "<ResponseSender for 's.open': closed, 1 sent>"
