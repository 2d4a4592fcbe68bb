"""Client.stream(): what iterating, waiting, closing, failing and retrying do, against a real nats-server.

What does not depend on the mode runs in both.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import natsync
from natsync import Code
from natsync.retry_budget import Bucket
from natsync.streaming.framed_receiver import FramedReceiver
from natsync.testing import NatsServer, eventually
from rawclient import END, PATIENCE, RawClient
from support import between_two_tries, framed_only, plain_only

Make = Callable[..., NatsServer]


@pytest.fixture
def client(nats_server: NatsServer, mode: str) -> Iterator[natsync.Client]:
    with natsync.connect(nats_server.url, framed=mode == "framed") as client:
        yield client


@pytest.fixture
def subscriber(natsync_subscriber: natsync.Subscriber) -> natsync.Subscriber:
    """With a handler that counts to the number asked for."""

    @natsync_subscriber.stream("sc.count")
    def count(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        for n in range(int(request.data)):
            yield b"%d" % n

    return natsync_subscriber.open()


@pytest.fixture
def raw(nats_server: NatsServer) -> Iterator[RawClient]:
    with RawClient(nats_server.url) as raw:
        yield raw


class Hold:
    """A registration whose requests wait for the test: .sender and .ctx are those of the newest."""

    def __init__(self, subscriber: natsync.Subscriber, subject: str) -> None:
        self._arrived: list[tuple[natsync.ResponseSender, natsync.HandlerContext]] = []
        self._over = False
        self.handle = subscriber.stream_subscribe(subject, self._take)

    def _take(self, ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        self._arrived.append((sender, ctx))
        if self._over:  # the test has ended before its request came
            sender.end()

    @property
    def sender(self) -> natsync.ResponseSender:
        eventually(lambda: self._arrived)
        return self._arrived[-1][0]

    @property
    def ctx(self) -> natsync.HandlerContext:
        eventually(lambda: self._arrived)
        return self._arrived[-1][1]

    def end_all(self) -> None:
        """So that closing the subscriber has nothing to wait for."""
        self._over = True
        for sender, _ in self._arrived:
            sender.end()


@pytest.fixture
def hold(subscriber: natsync.Subscriber) -> Iterator[Hold]:
    """Requests on "sc.hold"."""
    hold = Hold(subscriber, "sc.hold")
    yield hold
    hold.end_all()


def begun(hold: Hold, stream: natsync.Stream) -> natsync.ResponseSender:
    """The stream's sender, once both sides know each other's address."""
    hold.sender.send(b"the first chunk")
    assert stream.next(PATIENCE) == b"the first chunk"
    return hold.sender


def taken_now(stream: natsync.Stream) -> bytes | None:
    """The next chunk if it is there."""
    with contextlib.suppress(natsync.TimedOut):
        return stream.next(timeout=0)
    return None


# -- taking chunks -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("subscriber")
def test_iterating_gives_every_chunk_as_bytes_in_order(client: natsync.Client) -> None:
    assert list(client.stream("sc.count", "1000")) == [b"%d" % n for n in range(1000)]


@pytest.mark.usefixtures("subscriber")
def test_a_stream_is_its_own_iterator(client: natsync.Client) -> None:
    stream = client.stream("sc.count", "4")
    assert iter(stream) is stream
    assert next(stream) == b"0"
    assert list(stream) == [b"1", b"2", b"3"]


@pytest.mark.usefixtures("subscriber")
def test_an_exhausted_stream_stays_exhausted(client: natsync.Client) -> None:
    stream = client.stream("sc.count", "1")
    assert list(stream) == [b"0"]
    assert list(stream) == []
    for _ in range(2):
        with pytest.raises(natsync.StreamEnded):
            stream.next(timeout=0)


@pytest.mark.usefixtures("subscriber")
def test_an_empty_stream_ends_at_once(client: natsync.Client) -> None:
    assert list(client.stream("sc.count", "0")) == []


def test_next_returns_one_chunk_as_soon_as_it_is_there(client: natsync.Client, hold: Hold) -> None:
    with client.stream("sc.hold") as stream, ThreadPoolExecutor() as pool:
        waiting = pool.submit(stream.next, PATIENCE)
        hold.sender.send(b"1")
        assert waiting.result(PATIENCE) == b"1"


def test_next_raises_timed_out_and_the_stream_goes_on(client: natsync.Client, hold: Hold) -> None:
    with client.stream("sc.hold") as stream:
        begin = time.monotonic()
        with pytest.raises(natsync.TimedOut) as caught:
            stream.next(timeout=0.1)
        assert 0.09 <= time.monotonic() - begin < 5
        assert not isinstance(caught.value, natsync.StreamError)
        hold.sender.send(b"1")
        assert stream.next(PATIENCE) == b"1"


def test_next_with_timeout_0_does_not_wait(client: natsync.Client, hold: Hold) -> None:
    with client.stream("sc.hold") as stream:
        begin = time.monotonic()
        with pytest.raises(natsync.TimedOut):
            stream.next(timeout=0)
        assert time.monotonic() - begin < 5


def test_next_with_timeout_0_takes_what_is_there(client: natsync.Client, hold: Hold) -> None:
    with client.stream("sc.hold") as stream:
        hold.sender.send(b"1")
        assert eventually(lambda: taken_now(stream)) == b"1"


def test_next_raises_stream_ended_behind_the_last_chunk(client: natsync.Client, hold: Hold) -> None:
    with client.stream("sc.hold") as stream:
        hold.sender.send(b"1")
        hold.sender.end()
        assert stream.next(PATIENCE) == b"1"
        with pytest.raises(natsync.StreamEnded):
            stream.next(PATIENCE)


def test_stream_returns_before_the_first_chunk_is_there(client: natsync.Client, hold: Hold) -> None:
    with client.stream("sc.hold") as stream:
        assert not hold.sender.is_closed()
        assert stream.stats["chunks"] == 0


@pytest.mark.usefixtures("subscriber")
def test_several_threads_may_take_from_one_stream(client: natsync.Client) -> None:
    stream = client.stream("sc.count", "3000")
    with ThreadPoolExecutor(4) as pool:
        parts = [pool.submit(list, stream) for _ in range(4)]
        taken = [chunk for part in parts for chunk in part.result(PATIENCE)]
    assert sorted(taken, key=int) == [b"%d" % n for n in range(3000)]


@pytest.mark.usefixtures("subscriber")
def test_40_streams_at_once_are_exact(client: natsync.Client) -> None:
    streams = [client.stream("sc.count", str(1000 + n)) for n in range(40)]
    with ThreadPoolExecutor(40) as pool:
        results = list(pool.map(list, streams))
    assert results == [[b"%d" % chunk for chunk in range(1000 + n)] for n in range(40)]


def test_a_stream_that_is_complete_before_anybody_reads_is_complete(client: natsync.Client, hold: Hold) -> None:
    stream = client.stream("sc.hold")
    hold.sender.send_many([b"1", b"2", b"3"])
    hold.sender.end()
    eventually(lambda: client.stats()["waiting_replies"] == 0)  # the end is there
    assert list(stream) == [b"1", b"2", b"3"]


@framed_only
def test_a_stream_that_ends_while_it_is_opened_is_complete(
    client: natsync.Client, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end ends its context, too, and it must not take that for somebody who cancels."""
    ending, opened = threading.Event(), threading.Event()
    close, when_finished = FramedReceiver.close, natsync.Stream.when_finished

    def close_slowly(receiver: FramedReceiver, **how: bool) -> None:
        ending.set()
        assert opened.wait(PATIENCE)
        close(receiver, **how)

    def come_late(stream: natsync.Stream, callback: Callable[[], None]) -> None:
        sender = hold.sender
        sender.send(b"all of it")
        sender.end()
        assert ending.wait(PATIENCE)
        when_finished(stream, callback)
        opened.set()

    monkeypatch.setattr(FramedReceiver, "close", close_slowly)
    monkeypatch.setattr(natsync.Stream, "when_finished", come_late)
    assert list(client.stream("sc.hold", timeout=PATIENCE)) == [b"all of it"]


@pytest.mark.usefixtures("subscriber")
def test_streams_that_are_over_leave_nothing_behind(client: natsync.Client) -> None:
    for _ in range(5):
        list(client.stream("sc.count", "5"))
    client.stream("sc.count", "5").close()
    with pytest.raises(natsync.NoRespondersError):
        list(client.stream("sc.nobody"))
    eventually(lambda: client.stats()["waiting_replies"] == 0)


@pytest.mark.parametrize(
    "chunk",
    [b"__STREAM_END__ ", b"_", b"__", b"__STREAM_", b"__STREAM_ERROR__", b"x__STREAM_END__", b"__stream_end__", b""],
    ids=repr,
)
def test_a_chunk_that_only_looks_like_a_sentinel_is_data(client: natsync.Client, raw: RawClient, chunk: bytes) -> None:
    raw.subscribe("sc.lookalike")
    stream = client.stream("sc.lookalike")
    raw.answer(raw.next(), chunk, b"more", chunk, END)
    assert list(stream) == [chunk, b"more", chunk]


# -- closing -------------------------------------------------------------------------------------------------------


def test_close_wakes_a_waiting_next_with_stream_cancelled(client: natsync.Client, hold: Hold) -> None:
    stream = client.stream("sc.hold")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(stream.next)
        assert not hold.sender.is_closed()
        stream.close()
        with pytest.raises(natsync.StreamCancelled):
            waiting.result(PATIENCE)


def test_close_wakes_a_waiting_loop_with_stream_cancelled_not_with_its_end(client: natsync.Client, hold: Hold) -> None:
    stream = client.stream("sc.hold")
    hold.sender.send(b"1")
    taken: list[bytes] = []

    def loop() -> str:
        try:
            for chunk in stream:
                taken.append(chunk)
        except natsync.StreamCancelled:
            return "cancelled"
        return "ended as if complete"

    with ThreadPoolExecutor() as pool:
        looping = pool.submit(loop)
        eventually(lambda: taken == [b"1"])
        stream.close()
        assert looping.result(PATIENCE) == "cancelled"


def test_close_wakes_every_waiting_thread(client: natsync.Client, hold: Hold) -> None:
    stream = client.stream("sc.hold")
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(stream.next) for _ in range(4)]
        assert not hold.sender.is_closed()
        stream.close()
        for one in waiting:
            with pytest.raises(natsync.StreamCancelled):
                one.result(PATIENCE)


def test_close_is_idempotent_from_many_threads(client: natsync.Client, hold: Hold) -> None:
    stream = client.stream("sc.hold")
    sender = begun(hold, stream)
    together = threading.Barrier(8, timeout=PATIENCE)
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(lambda: (together.wait(), stream.close())) for _ in range(8)]:
            done.result(PATIENCE)
    stream.close()
    assert sender.closed.wait(PATIENCE)
    with pytest.raises(natsync.StreamCancelled):
        next(stream)


@framed_only
def test_close_tells_the_handler_before_it_has_sent_anything(client: natsync.Client, hold: Hold) -> None:
    stream = client.stream("sc.hold")
    sender = hold.sender
    stream.close()
    assert sender.closed.wait(PATIENCE)


@plain_only
def test_a_plain_handler_hears_of_a_close_before_its_first_chunk_when_it_sends_that(
    client: natsync.Client, hold: Hold
) -> None:
    stream = client.stream("sc.hold")
    sender = hold.sender
    stream.close()
    sender.send(b"1")
    assert sender.closed.wait(PATIENCE)


def test_close_right_after_the_request_reaches_the_handler(client: natsync.Client, hold: Hold) -> None:
    client.stream("sc.hold").close()
    assert list(client.stream("sc.count", "0")) == []  # by now the first request has arrived, if it has left at all
    if hold.handle.stats["received"]:
        with contextlib.suppress(natsync.StreamClosed):
            hold.sender.send(b"1")  # by which a plain handler hears of it
        assert hold.sender.closed.wait(PATIENCE)


def test_chunks_that_were_waiting_are_gone_after_close(client: natsync.Client, hold: Hold) -> None:
    stream = client.stream("sc.hold")
    hold.sender.send_many([b"1", b"2", b"3"])
    assert stream.next(PATIENCE) == b"1"
    stream.close()
    with pytest.raises(natsync.StreamCancelled):
        stream.next(0)


@pytest.mark.usefixtures("subscriber")
def test_close_after_the_end_changes_nothing(client: natsync.Client) -> None:
    stream = client.stream("sc.count", "2")
    assert list(stream) == [b"0", b"1"]
    stream.close()
    with pytest.raises(natsync.StreamEnded):
        stream.next(0)


def test_cancel_tells_the_handler_why(client: natsync.Client, hold: Hold) -> None:
    stream = client.stream("sc.hold")
    sender = begun(hold, stream)
    stream.cancel("the user pressed stop")
    assert sender.closed.wait(PATIENCE)
    with pytest.raises(natsync.StreamCancelled, match="the user pressed stop"):
        sender.send(b"late")
    with pytest.raises(natsync.StreamCancelled, match="the user pressed stop"):
        next(stream)


def test_leaving_the_with_block_cancels(client: natsync.Client, hold: Hold) -> None:
    with client.stream("sc.hold") as stream:
        sender = hold.sender
        sender.send(b"1")
        for _ in stream:
            break
    assert sender.closed.wait(PATIENCE)


def test_an_exception_leaves_the_with_block_and_cancels(client: natsync.Client, hold: Hold) -> None:
    with pytest.raises(ZeroDivisionError):
        with client.stream("sc.hold") as stream:
            sender = begun(hold, stream)
            1 / 0
    assert sender.closed.wait(PATIENCE)


def test_break_and_garbage_collection_cancel_the_handler(client: natsync.Client, hold: Hold) -> None:
    def first() -> bytes:
        for chunk in client.stream("sc.hold"):
            return chunk
        raise AssertionError("no chunk came")

    with ThreadPoolExecutor() as pool:
        taken = pool.submit(first)
        sender = hold.sender
        sender.send(b"1")
        assert taken.result(PATIENCE) == b"1"
    gc.collect()
    assert sender.closed.wait(PATIENCE)
    eventually(lambda: client.stats()["waiting_replies"] == 0)


def test_a_stream_keeps_its_client_alive(nats_server: NatsServer, mode: str, hold: Hold) -> None:
    stream = natsync.connect(nats_server.url, framed=mode == "framed").stream("sc.hold")
    gc.collect()
    hold.sender.send(b"1")
    assert stream.next(PATIENCE) == b"1"
    hold.sender.end()
    assert list(stream) == []


def test_closing_the_client_ends_its_streams_with_an_error(nats_server: NatsServer, mode: str, hold: Hold) -> None:
    client = natsync.connect(nats_server.url, framed=mode == "framed")
    stream = client.stream("sc.hold")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(stream.next)
        assert not hold.sender.is_closed()
        client.close()
        with pytest.raises(natsync.ConnectionClosed):
            waiting.result(PATIENCE)


def test_closing_the_client_cancels_the_handlers_of_its_streams(nats_server: NatsServer, mode: str, hold: Hold) -> None:
    client = natsync.connect(nats_server.url, framed=mode == "framed")
    stream = client.stream("sc.hold")
    sender = begun(hold, stream)
    client.close()
    assert sender.closed.wait(PATIENCE)


# -- map -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("subscriber")
def test_map_applies_a_function_to_each_chunk(client: natsync.Client) -> None:
    assert list(client.stream("sc.count", "4").map(int)) == [0, 1, 2, 3]


def test_map_keeps_close(client: natsync.Client, hold: Hold) -> None:
    mapped = client.stream("sc.hold").map(bytes.decode)
    sender = hold.sender
    sender.send(b"1")
    assert next(mapped) == "1"
    mapped.close()
    assert sender.closed.wait(PATIENCE)


def test_map_keeps_the_context_manager_and_map(client: natsync.Client, hold: Hold) -> None:
    with client.stream("sc.hold").map(bytes.decode).map(int) as mapped:
        sender = hold.sender
        sender.send(b"41")
        assert next(mapped) == 41
    assert sender.closed.wait(PATIENCE)


# -- time ----------------------------------------------------------------------------------------------------------


def test_timeout_is_the_deadline_of_the_whole_stream(client: natsync.Client, hold: Hold) -> None:
    begin = time.monotonic()
    stream = client.stream("sc.hold", timeout=2.5)
    sender = hold.sender
    taken = 0
    with pytest.raises(natsync.DeadlineExceeded):
        while time.monotonic() < begin + PATIENCE:
            with contextlib.suppress(natsync.StreamClosed):  # the handler may hear of it first
                sender.send(b"tick")
            stream.next()
            taken += 1
            sender.closed.wait(0.02)
    assert 2.49 <= time.monotonic() - begin < PATIENCE
    assert taken


def test_timeout_reaches_the_handler_as_its_deadline(client: natsync.Client, hold: Hold) -> None:
    with client.stream("sc.hold", timeout=20):
        remaining = hold.ctx.remaining()
        assert remaining is not None
        assert 15 < remaining <= 20


def test_timeout_cancels_the_handler(client: natsync.Client, hold: Hold) -> None:
    stream = client.stream("sc.hold", timeout=1.0)
    assert hold.ctx.wait(PATIENCE)
    with pytest.raises(natsync.DeadlineExceeded):
        stream.next()


@pytest.mark.usefixtures("subscriber")
def test_an_infinite_timeout_is_none(client: natsync.Client) -> None:
    assert list(client.stream("sc.count", "2", timeout=float("inf"), idle_timeout=float("inf"))) == [b"0", b"1"]


def test_idle_timeout_ends_a_stream_that_has_gone_quiet(client: natsync.Client, hold: Hold) -> None:
    stream = client.stream("sc.hold", idle_timeout=2.0)
    sender = hold.sender
    sender.send(b"1")
    assert stream.next() == b"1"
    begin = time.monotonic()
    with pytest.raises(natsync.IdleTimeout) as caught:
        stream.next()
    assert 1.99 <= time.monotonic() - begin < 10
    assert isinstance(caught.value, natsync.StreamError)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.last_seq == 1
    assert sender.closed.wait(PATIENCE)


def test_idle_timeout_counts_several_waits_for_the_same_chunk_as_one(client: natsync.Client, hold: Hold) -> None:
    with client.stream("sc.hold", idle_timeout=0.3) as stream:
        begin = time.monotonic()
        with pytest.raises(natsync.IdleTimeout):
            while True:
                try:
                    stream.next(timeout=0.05)
                except natsync.TimedOut as error:
                    if type(error) is not natsync.TimedOut:
                        raise
        assert 0.3 <= time.monotonic() - begin < 5


def test_a_mapped_stream_has_next(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    stream = client.stream("sc.count", "2").map(bytes.decode)
    assert [stream.next(timeout=5), stream.next(timeout=5)] == ["0", "1"]
    with pytest.raises(natsync.StreamEnded):
        stream.next(timeout=5)


def test_what_a_function_raises_is_raised_by_next_as_it_is(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    raised = natsync.TimedOut("another wait")

    def fail(chunk: bytes) -> bytes:
        raise raised

    stream = client.stream("sc.count", "1").map(fail).map(bytes.decode)
    with pytest.raises(natsync.TimedOut) as caught:
        stream.next(timeout=5)
    assert caught.value is raised
    with pytest.raises(natsync.StreamEnded):
        stream.next(timeout=5)


def test_idle_timeout_does_not_run_while_the_consumer_is_busy(client: natsync.Client, hold: Hold) -> None:
    with client.stream("sc.hold", idle_timeout=2.0) as stream:
        hold.sender.send(b"1")
        assert stream.next() == b"1"
        time.sleep(2.3)  # the consumer's own work
        hold.sender.send(b"2")
        assert stream.next() == b"2"


def test_idle_timeout_starts_anew_with_each_chunk(client: natsync.Client, hold: Hold) -> None:
    with client.stream("sc.hold", idle_timeout=2.0) as stream:
        for n in range(5):
            threading.Timer(0.5, hold.sender.send, [b"%d" % n]).start()
            assert stream.next() == b"%d" % n


# -- contexts ------------------------------------------------------------------------------------------------------


def test_cancelling_the_context_ends_the_stream_and_the_handler(client: natsync.Client, hold: Hold) -> None:
    ctx = natsync.Context()
    stream = client.stream("sc.hold", ctx=ctx)
    sender = begun(hold, stream)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(stream.next)
        ctx.cancel("the request was aborted")
        with pytest.raises(natsync.StreamCancelled, match="the request was aborted"):
            waiting.result(PATIENCE)
    assert sender.closed.wait(PATIENCE)


def test_the_contexts_deadline_is_the_streams(client: natsync.Client, hold: Hold) -> None:
    with pytest.raises(natsync.DeadlineExceeded):
        client.stream("sc.hold", ctx=natsync.Context().with_timeout(0.2)).next()


def test_a_context_that_has_ended_raises_at_once_and_sends_nothing(client: natsync.Client) -> None:
    ctx = natsync.Context()
    ctx.cancel("before it began")
    sent = client.stats()["out_messages"]
    with pytest.raises(natsync.Cancelled, match="before it began"):
        client.stream("sc.hold", ctx=ctx)
    assert client.stats()["out_messages"] == sent


@pytest.mark.usefixtures("subscriber")
def test_a_stream_that_is_over_lets_go_of_its_context(client: natsync.Client) -> None:
    ctx = natsync.Context()
    list(client.stream("sc.count", "1", ctx=ctx))
    ctx.cancel()
    stream = client.stream("sc.count", "1")
    assert list(stream) == [b"0"]
    assert not ctx._pinned


#: What a client is made with so that a stream does not outlast its link for long.
GIVING_UP: list[dict[str, Any]] = [{"resume_grace": 0.05}, {"framed": False}]


# -- errors --------------------------------------------------------------------------------------------------------


@framed_only
@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK], ids=lambda code: code.name)
def test_a_handlers_error_comes_with_its_text_code_and_details(client: natsync.Client, hold: Hold, code: Code) -> None:
    stream = client.stream("sc.hold")
    hold.sender.send(b"1")
    hold.sender.send_error("quota used up", code=code, details={"limit": 5, "unit": "€"})
    assert stream.next(PATIENCE) == b"1"
    with pytest.raises(natsync.HandlerError) as caught:
        stream.next(PATIENCE)
    error = caught.value
    assert (error.code, error.message, error.details) == (code, "quota used up", {"limit": 5, "unit": "€"})
    assert error.last_seq == 1
    assert str(error) == "quota used up"


def test_an_error_is_raised_again_by_a_further_next(client: natsync.Client, hold: Hold) -> None:
    stream = client.stream("sc.hold")
    hold.sender.send_error("broken")
    for _ in range(3):
        with pytest.raises(natsync.HandlerError, match="broken"):
            stream.next(PATIENCE)


def test_chunks_come_before_the_error_behind_them(client: natsync.Client, hold: Hold) -> None:
    stream = client.stream("sc.hold")
    hold.sender.send_many(b"%d" % n for n in range(50))
    hold.sender.send_error("broken")
    taken = []
    with pytest.raises(natsync.HandlerError):
        for chunk in stream:
            taken.append(chunk)
    assert taken == [b"%d" % n for n in range(50)]


def test_no_responders_is_raised_at_once_by_the_first_next(client: natsync.Client) -> None:
    stream = client.stream("sc.nobody")
    begin = time.monotonic()
    with pytest.raises(natsync.NoRespondersError, match=r"sc\.nobody") as caught:
        next(stream)
    assert time.monotonic() - begin < 5
    assert caught.value.subject == "sc.nobody"


@pytest.mark.parametrize("options", GIVING_UP, ids=["framed", "plain"])
def test_a_lost_link_in_mid_stream_is_server_lost_with_the_last_number(
    make_nats_server: Make, options: dict[str, Any]
) -> None:
    server = make_nats_server()
    with natsync.Subscriber(server.url) as subscriber, natsync.connect(server.url, **options) as client:
        hold = Hold(subscriber, "sc.lost")
        stream = client.stream("sc.lost")
        hold.sender.send_many([b"1", b"2", b"3"])
        assert [stream.next(PATIENCE) for _ in range(3)] == [b"1", b"2", b"3"]
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(stream.next)
            server.kill()
            with pytest.raises(natsync.ServerLost) as caught:
                waiting.result(PATIENCE)
        assert caught.value.last_seq == 3
        assert caught.value.code == Code.UNAVAILABLE
        hold.end_all()


@pytest.mark.parametrize("options", GIVING_UP, ids=["framed", "plain"])
def test_chunks_that_came_before_the_link_was_lost_are_delivered_first(
    make_nats_server: Make, options: dict[str, Any]
) -> None:
    server = make_nats_server()
    with natsync.Subscriber(server.url) as subscriber, natsync.connect(server.url, **options) as client:
        hold = Hold(subscriber, "sc.lost")
        stream = client.stream("sc.lost")
        hold.sender.send(b"1")
        assert stream.next(PATIENCE) == b"1"
        before = client.stats()["in_messages"]
        hold.sender.send(b"2")
        eventually(lambda: client.stats()["in_messages"] > before)  # the chunk is there
        server.kill()
        eventually(lambda: client.status == "reconnecting")
        assert stream.next(PATIENCE) == b"2"
        with pytest.raises(natsync.ServerLost) as caught:
            stream.next(PATIENCE)
        assert caught.value.last_seq == 2


def test_a_stream_whose_end_was_there_before_the_link_was_lost_is_complete(make_nats_server: Make, mode: str) -> None:
    server = make_nats_server()
    framed = mode == "framed"
    with natsync.Subscriber(server.url) as subscriber, natsync.connect(server.url, framed=framed) as client:
        hold = Hold(subscriber, "sc.complete")
        stream = client.stream("sc.complete")
        hold.sender.send_many([b"1", b"2"])
        assert hold.sender.end(wait=PATIENCE)
        client.flush()  # whatever the server had for the client is there
        server.kill()
        eventually(lambda: client.status == "reconnecting")
        assert list(stream) == [b"1", b"2"]
        with pytest.raises(natsync.StreamEnded):
            stream.next(0)


def test_a_request_that_still_waits_for_a_link_is_taken_back_by_a_cancel(make_nats_server: Make, mode: str) -> None:
    server = make_nats_server()
    with natsync.connect(server.url, framed=mode == "framed") as client:
        server.kill()
        eventually(lambda: client.status == "reconnecting")
        stream = client.stream("sc.taken.back", b"payload")
        assert client.stats()["out_pending_bytes"] > 0
        stream.cancel()
        assert client.stats()["out_pending_bytes"] == 0
        assert not client._core.mux.waiters
        with pytest.raises(natsync.StreamCancelled):
            stream.next(0)


def test_a_new_stream_works_after_the_link_was_made_again(make_nats_server: Make) -> None:
    server = make_nats_server()
    with (
        natsync.Subscriber(server.url, reconnect_wait=0.02, reconnect_wait_max=0.1) as subscriber,
        natsync.connect(server.url, reconnect_wait=0.02, reconnect_wait_max=0.1, framed=False) as client,
    ):
        hold = Hold(subscriber, "sc.lost")
        stream = client.stream("sc.lost")
        hold.sender.send(b"1")
        assert stream.next(PATIENCE) == b"1"
        server.kill()
        with pytest.raises(natsync.ServerLost):
            stream.next(PATIENCE)
        server.start()
        eventually(lambda: (client.status, subscriber.status) == ("connected", "connected"), PATIENCE)
        subscriber.stream_subscribe("sc.again", lambda ctx, request: [b"x"])
        assert list(client.stream("sc.again")) == [b"x"]


@plain_only
def test_overflow_by_chunks_fails_that_stream_alone_and_never_silently(
    client: natsync.Client, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("natsync.streaming.plain_receiver.PENDING_CHUNKS", 100)
    slow = client.stream("sc.hold")
    sender = hold.sender
    n = 0
    while not sender.is_closed() and n < 100_000:
        try:
            sender.send(b"%d" % n)
        except natsync.StreamClosed:
            break
        n += 1
    assert sender.closed.wait(PATIENCE)  # the handler is told
    taken: list[bytes] = []
    with pytest.raises(natsync.SlowConsumerError, match="100"):
        for chunk in slow:
            taken.append(chunk)
    assert taken == [b"%d" % number for number in range(len(taken))]
    assert list(client.stream("sc.count", "50")) == [b"%d" % number for number in range(50)]
    assert client.stats()["reconnects"] == 0


@plain_only
def test_overflow_by_bytes_fails_that_stream_alone(
    client: natsync.Client, raw: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("natsync.streaming.plain_receiver.PENDING_BYTES", 10_000)
    raw.subscribe("sc.bytes")
    stream = client.stream("sc.bytes")
    request = raw.next()
    raw.answer(request, *[b"x" * 1000] * 15)
    raw.flush()
    client.flush()  # the chunks are there
    raw.answer(request, END)
    with pytest.raises(natsync.SlowConsumerError, match="10000 bytes"):
        list(stream)
    assert client.stats()["reconnects"] == 0


@plain_only
def test_a_consumer_that_keeps_up_takes_more_than_the_queue_holds(
    client: natsync.Client, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("natsync.streaming.plain_receiver.PENDING_CHUNKS", 10)
    stream = client.stream("sc.hold")
    for n in range(100):
        hold.sender.send(b"%d" % n)
        assert stream.next(PATIENCE) == b"%d" % n
    stream.close()


# -- headers, trailers, mode, stats ---------------------------------------------------------------------------------


@framed_only
def test_headers_come_with_the_first_chunk_and_trailers_with_the_end(client: natsync.Client, hold: Hold) -> None:
    stream = client.stream("sc.hold")
    hold.sender.set_header("Model", "small")
    hold.sender.set_header("Size", "ü")
    assert (dict(stream.headers), dict(stream.trailers)) == ({}, {})
    hold.sender.send(b"1")
    hold.sender.send(b"2")
    assert next(stream) == b"1"
    assert dict(stream.headers) == {"Model": "small", "Size": "ü"}
    hold.sender.end(trailers={"Tokens": "2"})
    assert list(stream) == [b"2"]
    assert dict(stream.trailers) == {"Tokens": "2"}
    assert dict(stream.headers) == {"Model": "small", "Size": "ü"}


def test_a_header_after_the_first_chunk_is_refused(client: natsync.Client, hold: Hold) -> None:
    with client.stream("sc.hold"):
        hold.sender.send(b"1")
        with pytest.raises(natsync.InvalidArgument, match="first chunk"):
            hold.sender.set_header("Too", "late")


def test_the_requests_headers_reach_the_handler_as_metadata(client: natsync.Client, hold: Hold) -> None:
    with client.stream("sc.hold", headers={"User": "ada", "Tag": ["a", "b"]}):
        assert hold.ctx.metadata.fields() == [("User", "ada"), ("Tag", "a"), ("Tag", "b")]


@pytest.mark.usefixtures("subscriber")
def test_mode_is_none_until_a_plain_answer_then_plain(client: natsync.Client, raw: RawClient) -> None:
    raw.subscribe("sc.mode")
    stream = client.stream("sc.mode")
    request = raw.next()
    assert stream.mode is None
    raw.answer(request, b"1", END)
    assert list(stream) == [b"1"]
    assert stream.mode == "plain"


def test_mode_is_that_of_both_sides(client: natsync.Client, hold: Hold, mode: str) -> None:
    with client.stream("sc.hold") as stream:
        begun(hold, stream)
        assert stream.mode == mode


@pytest.mark.usefixtures("mode")
def test_a_responder_without_framed_mode_is_plain(nats_server: NatsServer, client: natsync.Client) -> None:
    with natsync.Subscriber(nats_server.url, framed=False) as subscriber:
        subscriber.stream_subscribe("sc.unframed", lambda ctx, request: [b"1"])
        stream = client.stream("sc.unframed")
        assert list(stream) == [b"1"]
        assert stream.mode == "plain"


@pytest.mark.usefixtures("subscriber")
def test_stats_count_chunks_and_bytes_that_were_taken(client: natsync.Client) -> None:
    stream = client.stream("sc.count", "12")
    assert (stream.stats["chunks"], stream.stats["bytes"]) == (0, 0)
    assert len(list(stream)) == 12
    assert (stream.stats["chunks"], stream.stats["bytes"]) == (12, 14)
    assert (stream.stats["gaps"], stream.stats["resent"], stream.stats["resumes"]) == (0, 0, 0)


def test_stats_count_the_seconds_the_consumer_waited(client: natsync.Client, hold: Hold) -> None:
    with client.stream("sc.hold") as stream:
        with pytest.raises(natsync.TimedOut):
            stream.next(timeout=0.1)
        assert 0.09 <= stream.stats["blocked"] < 5


# -- retry ---------------------------------------------------------------------------------------------------------


def test_retry_repeats_while_nobody_listens_and_no_chunk_has_come(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    attempts: list[int] = []

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> list[bytes]:
        attempts.append(ctx.attempt)
        return [b"x"]

    stream = client.stream("sc.retry", retry=natsync.Retry(attempts=None, initial=0.05, maximum=0.05, jitter=False))
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(list, stream)
        with pytest.raises(natsync.NoRespondersError):
            client.request("sc.retry")
        subscriber.stream_subscribe("sc.retry", handler)
        assert answer.result(PATIENCE) == [b"x"]
    assert len(attempts) == 1
    assert attempts[0] >= 1


def test_retry_gives_up_with_the_last_error(client: natsync.Client) -> None:
    before = client.stats()["out_messages"]
    stream = client.stream("sc.nobody", retry=natsync.Retry(attempts=3, initial=0.01))
    with pytest.raises(natsync.NoRespondersError):
        next(stream)
    assert client.stats()["out_messages"] == before + 3


def test_retry_does_not_repeat_after_the_first_chunk(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    runs: list[int] = []

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        runs.append(1)
        yield b"1"
        raise RuntimeError("broken in the middle")

    subscriber.stream_subscribe("sc.middle", handler)
    stream = client.stream("sc.middle", retry=natsync.Retry(attempts=5, initial=0.01, idempotent=True))
    assert next(stream) == b"1"
    with pytest.raises(natsync.HandlerError):
        next(stream)
    assert len(runs) == 1


@pytest.mark.parametrize(("idempotent", "runs"), [(False, 1), (True, 3)])
def test_retry_repeats_a_handler_that_failed_only_if_it_is_idempotent(
    client: natsync.Client, subscriber: natsync.Subscriber, idempotent: bool, runs: int
) -> None:
    ran: list[int] = []

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> list[bytes]:
        ran.append(1)
        raise RuntimeError("no")

    subscriber.stream_subscribe("sc.idempotent", handler)
    retry = natsync.Retry(attempts=3, initial=0.01, idempotent=idempotent)
    with pytest.raises(natsync.HandlerError):
        list(client.stream("sc.idempotent", retry=retry))
    assert len(ran) == runs


def test_a_timeout_of_next_during_retries_leaves_the_stream_usable(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    retry = natsync.Retry(attempts=None, initial=0.02, maximum=0.02)
    with client.stream("sc.patient", retry=retry, timeout=PATIENCE) as stream:
        with pytest.raises(natsync.TimedOut):
            stream.next(timeout=0.1)
        subscriber.stream_subscribe("sc.patient", lambda ctx, request: [b"x"])
        assert list(stream) == [b"x"]


def test_next_keeps_its_timeout_during_retries(client: natsync.Client) -> None:
    retry = natsync.Retry(attempts=None, initial=20, maximum=20, jitter=False)
    with client.stream("sc.nobody", retry=retry) as stream:
        begin = time.monotonic()
        with pytest.raises((natsync.TimedOut, natsync.NoRespondersError)):
            stream.next(timeout=0.2)
        assert time.monotonic() - begin < 5


def in_short_waits(stream: natsync.Stream, each: float) -> tuple[bytes, int]:
    """The next chunk, waited for as the bodies of HTTP responses do, and how many waits went by before."""
    end, waits = time.monotonic() + PATIENCE, 0
    while time.monotonic() < end:
        try:
            return stream.next(each), waits
        except natsync.TimedOut:
            waits += 1
    pytest.fail("neither a chunk nor an end")


def test_who_reads_in_short_waits_gets_to_the_next_attempt_and_to_the_last(client: natsync.Client) -> None:
    before = client.stats()["out_messages"]
    retry = natsync.Retry(attempts=3, initial=0.2, maximum=0.2, jitter=False)
    stream = client.stream("sc.nobody", retry=retry)
    begin = time.monotonic()
    with pytest.raises(natsync.NoRespondersError):
        in_short_waits(stream, 0.03)
    assert time.monotonic() - begin >= 0.4
    assert client.stats()["out_messages"] == before + 3


def test_who_reads_in_short_waits_has_the_attempts_of_one_call_counted_once(
    nats_server: NatsServer, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    retries: list[int] = []
    spent: list[str] = []
    take = Bucket.take

    def taken(bucket: Bucket) -> bool:
        spent.append(bucket._subject)
        return take(bucket)

    monkeypatch.setattr(Bucket, "take", taken)

    class Told(natsync.Hooks):
        def retrying(self, exchange: Any, attempt: int, wait_seconds: float, error: BaseException) -> None:
            retries.append(attempt)

    retry = natsync.Retry(attempts=4, initial=0.2, maximum=0.2, jitter=False)
    with natsync.connect(nats_server.url, framed=mode == "framed", hooks=Told()) as client:
        with pytest.raises(natsync.NoRespondersError):
            in_short_waits(client.stream("sc.budget", retry=retry), 0.02)
    assert retries == [1, 2, 3]
    assert spent == ["sc.budget"] * 3


def test_a_refused_stream_that_is_read_in_short_waits_is_asked_for_again(
    nats_server: NatsServer, client: natsync.Client
) -> None:
    done = threading.Event()

    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        yield request.data
        if request.data == b"first":
            done.wait(PATIENCE)

    with natsync.Subscriber(nats_server.url, max_streams=1) as subscriber:
        subscriber.stream_subscribe("sc.full", handler, queue="q")
        with client.stream("sc.full", b"first") as first:
            assert next(first) == b"first"
            begin = time.monotonic()
            second = client.stream("sc.full", b"second", retry=natsync.Retry())
            with pytest.raises(natsync.TimedOut):
                second.next(0.3)
            done.set()
            assert list(first) == []
        chunk, waits = in_short_waits(second, 0.05)  # it was told to come again in a second
        assert chunk == b"second"
        assert waits >= 1 or time.monotonic() - begin > 1
        assert list(second) == []


def test_each_wait_for_a_retry_may_be_in_another_thread(client: natsync.Client) -> None:
    retry = natsync.Retry(attempts=4, initial=0.01, maximum=0.01, jitter=False)
    stream = client.stream("sc.nobody", retry=retry)
    end = time.monotonic() + PATIENCE
    outcome: BaseException | None = None
    while time.monotonic() < end and not isinstance(outcome, natsync.NoRespondersError):
        with ThreadPoolExecutor(1) as pool:
            outcome = pool.submit(stream.next, 0.005).exception()
        assert isinstance(outcome, natsync.NatsError)
    assert isinstance(outcome, natsync.NoRespondersError)


def test_threads_that_read_one_stream_share_its_attempts(client: natsync.Client) -> None:
    before = client.stats()["out_messages"]
    retry = natsync.Retry(attempts=4, initial=0.1, maximum=0.1, jitter=False)
    stream = client.stream("sc.nobody", retry=retry)
    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(stream.next, PATIENCE) for _ in range(4)]
        assert [type(reader.exception(PATIENCE)) for reader in readers] == [natsync.NoRespondersError] * 4
    assert client.stats()["out_messages"] == before + 4


def test_all_threads_that_wait_between_two_tries_are_told_of_the_cancel(client: natsync.Client) -> None:
    stream = client.stream("sc.nobody", retry=natsync.Retry(initial=PATIENCE, maximum=PATIENCE, jitter=False))
    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(next, stream) for _ in range(3)]
        eventually(lambda: stream._due is not None)  # and somebody waits for it
        stream.close()
        assert [type(reader.exception(PATIENCE)) for reader in readers] == [natsync.StreamCancelled] * 3


def test_a_thread_that_waits_behind_another_keeps_its_timeout(client: natsync.Client) -> None:
    stream = client.stream("sc.nobody", retry=natsync.Retry(initial=PATIENCE, maximum=PATIENCE, jitter=False))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(stream.next)
        eventually(lambda: stream._due is not None)  # and somebody waits for it
        with pytest.raises(natsync.TimedOut, match="another thread"):
            stream.next(0.05)
        stream.close()
        assert isinstance(first.exception(PATIENCE), natsync.StreamCancelled)


def test_a_stream_dropped_between_two_tries_is_freed_at_once(client: natsync.Client) -> None:
    over = threading.Event()
    stream = client.stream("sc.nobody", retry=natsync.Retry(initial=PATIENCE, maximum=PATIENCE, jitter=False))
    stream.when_finished(over.set)
    with pytest.raises(natsync.TimedOut):
        stream.next(0.1)
    gc.disable()
    try:
        del stream
        assert over.wait(PATIENCE)
    finally:
        gc.enable()


def test_an_interrupt_between_two_tries_leaves_the_stream_as_it_was(
    client: natsync.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = client.stream("sc.nobody", retry=natsync.Retry(attempts=2, initial=1.0, maximum=1.0, jitter=False))
    with pytest.raises(natsync.TimedOut):
        stream.next(0.05)
    with monkeypatch.context() as patch:

        def interrupted(self: natsync.Context, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

        patch.setattr(natsync.Context, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.next(PATIENCE)
    with pytest.raises(natsync.NoRespondersError):
        stream.next(PATIENCE)


def test_close_during_a_retrys_wait_wakes_the_waiting_next(client: natsync.Client) -> None:
    stream = client.stream("sc.nobody", retry=natsync.Retry(attempts=None, initial=20, maximum=20, jitter=False))
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(stream.next)
        eventually(between_two_tries)
        stream.close()
        with pytest.raises(natsync.StreamCancelled):
            waiting.result(5)


def test_the_deadline_ends_retries(client: natsync.Client) -> None:
    retry = natsync.Retry(attempts=None, initial=0.05, maximum=0.05)
    begin = time.monotonic()
    with pytest.raises((natsync.DeadlineExceeded, natsync.NoRespondersError)):
        list(client.stream("sc.nobody", timeout=0.3, retry=retry))
    assert 0.2 < time.monotonic() - begin < 5


# -- sentinels, single answers --------------------------------------------------------------------------------------


def test_custom_sentinels_end_streams_of_both_sides(nats_server: NatsServer) -> None:
    sentinels = natsync.Sentinels(end=b"<eos>", error_prefix=b"<err>")
    with (
        natsync.Subscriber(nats_server.url, sentinels=sentinels) as subscriber,
        natsync.connect(nats_server.url, sentinels=sentinels) as client,
        RawClient(nats_server.url) as raw,
    ):

        def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
            yield b"__STREAM_END__"
            if request.data:
                raise ValueError("told to")

        subscriber.stream_subscribe("sc.custom", handler)
        assert list(client.stream("sc.custom")) == [b"__STREAM_END__"]
        with pytest.raises(natsync.HandlerError, match="told to"):
            list(client.stream("sc.custom", b"fail"))
        raw.request("sc.custom")
        assert [raw.next().payload for _ in range(2)] == [b"__STREAM_END__", b"<eos>"]
        raw.request("sc.custom", b"fail")
        assert [raw.next().payload for _ in range(2)] == [b"__STREAM_END__", b"<err>told to"]


@pytest.fixture
def empty(nats_server: NatsServer, mode: str) -> Iterator[tuple[natsync.Client, natsync.Subscriber]]:
    """Both sides with Sentinels.EMPTY."""
    options: dict[str, Any] = {"sentinels": natsync.Sentinels.EMPTY}
    with (
        natsync.Subscriber(nats_server.url, **options) as subscriber,
        natsync.connect(nats_server.url, **options, framed=mode == "framed") as client,
    ):
        yield client, subscriber


Pair = tuple[natsync.Client, natsync.Subscriber]


def test_sentinels_empty_end_with_an_empty_message(empty: Pair, raw: RawClient) -> None:
    client, subscriber = empty
    subscriber.stream_subscribe("sc.empty", lambda ctx, request: [b"1", b"__STREAM_END__"])
    assert list(client.stream("sc.empty")) == [b"1", b"__STREAM_END__"]
    raw.request("sc.empty")
    assert [raw.next().payload for _ in range(3)] == [b"1", b"__STREAM_END__", b""]


@framed_only
def test_sentinels_empty_let_an_empty_chunk_be_data_in_framed_mode(empty: Pair) -> None:
    client, subscriber = empty
    subscriber.stream_subscribe("sc.empty.data", lambda ctx, request: [b"1", b"", b"2"])
    assert list(client.stream("sc.empty.data")) == [b"1", b"", b"2"]


@plain_only
def test_sentinels_empty_refuse_an_empty_chunk(empty: Pair) -> None:
    client, subscriber = empty
    hold = Hold(subscriber, "sc.empty.guard")
    with client.stream("sc.empty.guard"), pytest.raises(natsync.InvalidArgument):
        hold.sender.send(b"")
    hold.end_all()


def test_sentinels_empty_do_not_take_no_responders_for_an_end(empty: Pair) -> None:
    client, _ = empty
    with pytest.raises(natsync.NoRespondersError):
        list(client.stream("sc.empty.nobody"))


@framed_only
def test_sentinels_empty_a_cancel_before_the_first_chunk_reaches_the_handler(empty: Pair) -> None:
    client, subscriber = empty
    hold = Hold(subscriber, "sc.empty.cancel")
    stream = client.stream("sc.empty.cancel")
    sender = hold.sender
    stream.close()
    assert sender.closed.wait(PATIENCE)


def test_sentinels_empty_a_cancel_reaches_the_handler(empty: Pair) -> None:
    client, subscriber = empty
    hold = Hold(subscriber, "sc.empty.cancel")
    stream = client.stream("sc.empty.cancel")
    sender = begun(hold, stream)
    stream.close()
    assert sender.closed.wait(PATIENCE)


# Without an offer of framed mode, a request for a stream looks like any other request: it gets the one answer, no end.
@framed_only
@pytest.mark.parametrize(("value", "chunk"), [(b"raw", b"raw"), ("text", b"text"), ({"a": 1}, b'{"a":1}'), (None, b"")])
def test_a_stream_to_a_request_handler_is_one_chunk_and_the_end(
    client: natsync.Client, subscriber: natsync.Subscriber, value: object, chunk: bytes
) -> None:
    subscriber.handler("sc.single")(lambda ctx, request: value)
    assert list(client.stream("sc.single", timeout=PATIENCE)) == [chunk]


def test_a_stream_to_a_request_handler_that_raises_is_a_handler_error(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> None:
        raise LookupError("no such thing")

    subscriber.handler("sc.single.error")(handler)
    with pytest.raises(natsync.HandlerError, match="no such thing"):
        list(client.stream("sc.single.error", timeout=PATIENCE))


@pytest.mark.usefixtures("subscriber")
def test_json_is_an_alternative_to_the_payload(client: natsync.Client, raw: RawClient) -> None:
    raw.subscribe("sc.json")
    with client.stream("sc.json", json={"prompt": "why?"}):
        assert raw.next().payload == b'{"prompt":"why?"}'
