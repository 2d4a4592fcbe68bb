"""What is over is wound up whole, though a Ctrl-C cuts it short: whoever ends it next, or drops it, goes on with it.

The interrupt comes at every moment of it that Python allows for, one after the other.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import natsync
from broker import QUICK, Outcome
from framed import Held
from interrupting import Interrupted, moments
from natsync.concurrency import Finishing, Happening, in_turn
from natsync.connection import Connection
from natsync.context import Context
from natsync.dispatcher import Dispatcher
from natsync.links import Links
from natsync.pool import Lease
from natsync.pooling.store import Store
from natsync.replies import Replies
from natsync.session import Session
from natsync.streaming.call import Call
from natsync.streaming.calls import Budget, Calls, Farewell
from natsync.streaming.framed_receiver import FramedReceiver
from natsync.streaming.framed_sender import FramedSender
from natsync.streaming.peers import Peer, Peers
from natsync.streaming.plain_sender import PlainSender
from natsync.streaming.registration import Handle
from natsync.streaming.responder import Responder
from natsync.streaming.sender import Ending, SenderCore
from natsync.streaming.stream import Stream
from natsync.streaming.window import Outgoing
from natsync.streaming.work import Work
from natsync.supervisor import Supervisor
from natsync.testing import NatsServer, eventually

PATIENCE = 30.0


@pytest.fixture
def held(nats_server: NatsServer) -> Iterator[Held]:
    """A registration whose senders are left to the test."""
    held = Held(nats_server.url, **QUICK)
    yield held
    held.subscriber.close()


@pytest.fixture
def client(nats_server: NatsServer) -> Iterator[natsync.Client]:
    with natsync.connect(nats_server.url, **QUICK) as client:
        yield client


# -- the responder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framed", [True, False], ids=["framed", "plain"])
def test_a_stream_whose_end_was_cut_short_ends_at_the_next_end(
    nats_server: NatsServer, held: Held, framed: bool
) -> None:
    inside = (
        SenderCore.end, SenderCore._close, SenderCore._finish, SenderCore._run_user, Finishing.run, Happening.set,
        FramedSender.end, FramedSender._closing_locked, FramedSender._put_end, Outgoing.push_end,
        PlainSender._put_end, Work.end, Context._end,
    )  # fmt: skip
    senders, told = list[natsync.ResponseSender](), list[int]()
    with natsync.connect(nats_server.url, framed=framed, **QUICK) as client:
        streams = list[natsync.Stream]()

        def answer() -> None:
            number = len(streams)
            streams.append(client.stream(held.subject))
            sender = held.take(number)[2]
            senders.append(sender)
            eventually(lambda: held.handle.stats["active"] == 1, PATIENCE)
            sender.on_close(lambda: told.append(number))
            sender.send(b"chunk")
            sender.end()

        for _ in moments(answer, *inside):
            assert senders[-1].end()
            assert list(streams[-1]) == [b"chunk"]
            eventually(lambda: held.subscriber.stats()["active"] == 0, PATIENCE)
        assert len(streams) > 20
        assert list(streams[-1]) == [b"chunk"]
        eventually(lambda: held.subscriber.stats()["active"] == 0, PATIENCE)
        stats = held.subscriber.stats()
        assert stats["received"] == stats["processed"] == len(streams)
        assert held.subscriber._responder is not None
        assert held.subscriber._responder.streams == 0
        eventually(lambda: sorted(told) == list(range(len(streams))), PATIENCE)


def test_a_sender_that_is_dropped_when_its_end_was_cut_short_is_ended(client: natsync.Client, held: Held) -> None:
    streams = list[natsync.Stream]()

    def answer() -> None:
        streams.append(client.stream(held.subject))
        sender = held.take(0)[2]
        held.arrived.clear()
        sender.send(b"chunk")
        sender.end()

    for _ in moments(answer, SenderCore._close, SenderCore._finish, Finishing.run, FramedSender._put_end):
        taken = Outcome(lambda: list(streams[-1]))
        taken.within(PATIENCE)  # by its END, or by the error of one that was dropped
        eventually(lambda: held.subscriber.stats()["active"] == 0, PATIENCE)
    assert held.subscriber._responder is not None
    assert held.subscriber._responder.streams == 0


def test_an_interrupt_in_a_chunk_of_several_parts_divides_nothing(client: natsync.Client, held: Held) -> None:
    """All parts come into the window together, with what kind they are."""
    size = 3 << 20
    stream, sender = client.stream(held.subject), held.sender
    taking = Outcome(lambda: list(stream))
    sent = list[bytes]()

    def send() -> None:
        sent.append(b"%d " % len(sent) + b"x" * size)
        sender.send(sent[-1])

    tried = sum(1 for _ in moments(send, Outgoing.push, Outgoing._pieces))
    assert tried > 5
    sender.end()
    assert taking.within(PATIENCE) is None
    taken: Any = taking.value
    order = [int(chunk.split(b" ", 1)[0]) for chunk in taken]
    assert taken == [sent[number] for number in order]
    assert order == sorted(set(order))
    assert order[-1] == tried


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_that_a_streams_handler_forks_leaves_the_stream_whatever_lock_was_held(
    client: natsync.Client, nats_server: NatsServer
) -> None:
    children = list[int]()
    with natsync.Subscriber(nats_server.url) as subscriber:

        @subscriber.stream("fork")
        def answer(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
            sender.send(b"before")
            with sender._core.lock:  # as another thread that sends may hold it
                pid = os.fork()
            if not pid:
                sender._core.lock.acquire()
                sender.end()
                return
            children.append(pid)
            sender.send(b"behind")
            sender.end()

        subscriber.open()
        assert list(client.stream("fork", timeout=PATIENCE)) == [b"before", b"behind"]
        end = time.monotonic() + PATIENCE
        while not (left := os.waitpid(children[0], os.WNOHANG)[0]) and time.monotonic() < end:
            time.sleep(0.01)
        if not left:
            os.kill(children[0], signal.SIGKILL)
            os.waitpid(children[0], 0)
        assert left, "the child hangs"


# -- the requester -----------------------------------------------------------------------------------------------------

CALL = (
    Stream.cancel, Call.cancel, Call.fail, Call._finish, Call._let_go, Call._part, Call._tell_finished,
    Finishing.run, Calls.part, FramedReceiver.close, Budget.close, Peers.leave, Peer.leave,
)  # fmt: skip


@pytest.mark.parametrize("retry", [None, natsync.Retry()], ids=["plain", "retried"])
def test_who_reads_next_is_not_kept_waiting_by_a_next_that_was_cut_short(
    client: natsync.Client, held: Held, retry: natsync.Retry | None
) -> None:
    with client.stream(held.subject, retry=retry, timeout=PATIENCE) as stream:

        def read() -> None:
            with pytest.raises(natsync.TimedOut, match="the stream goes on"):
                stream.next(0)

        for _ in moments(read, in_turn, Stream._next, Stream._with_retry, Call.next_chunk, Call._refill):
            read()
        held.sender.send(b"chunk")
        assert stream.next(PATIENCE) == b"chunk"


@pytest.mark.parametrize("window", [1, 4, 64])
@pytest.mark.parametrize("framed", [True, False], ids=["framed", "plain"])
def test_no_chunk_is_lost_to_a_next_that_was_cut_short(nats_server: NatsServer, framed: bool, window: int) -> None:
    count = 1_000
    with (
        natsync.Subscriber(nats_server.url) as subscriber,
        natsync.connect(nats_server.url, framed=framed, **QUICK) as client,
    ):
        subscriber.stream_subscribe("cut.count", lambda ctx, request: map(b"%d".__mod__, range(count)))
        got = list[bytes]()
        with client.stream("cut.count", timeout=PATIENCE, window=window) as stream:

            def read() -> None:
                for _ in range(max(1, window // 4)):  # what is taken from the queue at once
                    got.append(stream.next(PATIENCE))

            for _ in moments(read, in_turn, Call._refill, Call._take, Call._put_aside_locked):
                read()
            got.extend(stream)
        assert got == [b"%d" % number for number in range(count)]


def test_who_takes_the_next_reply_is_not_kept_waiting_by_a_next_that_was_cut_short(
    client: natsync.Client,
) -> None:
    silent = client.subscribe("cut.replies")
    with client.request_many(silent.subject, timeout=PATIENCE) as replies:

        def take() -> None:
            with pytest.raises(natsync.TimedOut, match="more may come"):
                replies.next(0)

        for _ in moments(take, in_turn, Replies.next, Replies._take, Replies._take_in_turn):
            take()


@pytest.mark.parametrize("then", ["closed", "dropped"])
@pytest.mark.parametrize("framed", [True, False], ids=["framed", "plain"])
def test_a_stream_whose_closing_was_cut_short_is_left_whole(
    nats_server: NatsServer, held: Held, framed: bool, then: str
) -> None:
    with natsync.connect(nats_server.url, framed=framed, **QUICK) as client:
        streams, told, contexts = list[natsync.Stream](), set[int](), list[natsync.Context]()

        def leave() -> None:
            number = len(contexts)
            stream = client.stream(held.subject)
            streams[:] = [stream]
            contexts.append(held.take(number)[0])
            held.take(number)[2].send(b"chunk")
            assert stream.next(PATIENCE) == b"chunk"
            stream.when_finished(lambda: told.add(number))
            stream.close()

        for _ in moments(leave, *CALL):
            if then == "closed":
                streams[0].close()
            streams.clear()
            eventually(lambda: len(told) == len(contexts), PATIENCE)
            assert contexts[-1].done.wait(PATIENCE)
        assert len(contexts) > 20
        streams.clear()
        assert client._calls is not None
        budget, core = client._calls.budget, client._connection()
        eventually(lambda: (budget._given, budget._streams, len(client._calls.peers)) == (0, 0, 0), PATIENCE)  # type: ignore[union-attr]
        eventually(lambda: not len(core.mux), PATIENCE)


# -- a connection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retry", [False, True])
def test_a_first_use_that_was_cut_short_is_made_up_for_by_the_next(nats_server: NatsServer, retry: bool) -> None:
    """The link is there, and its supervisor too: a lost one is made again."""
    made = list[natsync.Client]()

    def use() -> None:
        made.append(natsync.Client(nats_server.url, retry_on_failed_connect=retry, **QUICK))
        made[-1].open()

    for _ in moments(use, Links._begin_locked, Supervisor.start, Supervisor.begin):
        with made[-1] as client:
            client.flush(PATIENCE)
            client.force_reconnect()
            eventually(lambda client=client: client.stats()["reconnects"] == 1, PATIENCE)  # type: ignore[misc]
            client.flush(PATIENCE)
    assert len(made) > 5
    made[-1].close()


@pytest.mark.parametrize("callback", [None, lambda message: None], ids=["taken", "callback"])
def test_a_subscription_whose_making_was_cut_short_is_not_there(nats_server: NatsServer, callback: Any) -> None:
    inside = (natsync.Client.subscribe, Connection.subscribe, Dispatcher.add)
    with natsync.connect(nats_server.url, **QUICK) as client:
        rounds = 0
        for _ in moments(lambda: client.subscribe("made", callback).unsubscribe(), *inside):
            rounds += 1
            eventually(lambda: client.stats()["subscriptions"] == 0)
            client.publish("made", b"")
            client.flush(PATIENCE)
            assert client.stats()["in_messages"] == 0
        assert rounds > 10


@pytest.mark.parametrize("drained", [False, True], ids=["unsubscribe", "stop_intake"])
def test_a_subscription_whose_end_was_cut_short_is_ended_by_the_next(nats_server: NatsServer, drained: bool) -> None:
    made = list[natsync.Subscription]()
    with natsync.connect(nats_server.url, **QUICK) as client:
        connection = client._connection()
        first = connection.stop_intake if drained else connection.unsubscribe

        def end() -> None:
            made.append(client.subscribe("ended"))
            first(made[-1]._core)

        inside = (Connection._unsubscribe, Dispatcher.unsub, Dispatcher.leave, Dispatcher.remove)
        for _ in moments(end, *inside):
            first(made[-1]._core)
            if drained:
                assert made[-1]._core.draining
            else:
                assert made[-1]._core.sid not in {*connection.dispatcher._sinks, *connection.dispatcher._subscriptions}
            client.publish("ended", b"")
            client.flush(PATIENCE)
            assert client.stats()["in_messages"] == 0
            made[-1].unsubscribe()
        assert len(made) > 5


# -- the pool ----------------------------------------------------------------------------------------------------------


def test_a_connection_whose_return_was_cut_short_is_lent_again(nats_server: NatsServer) -> None:
    with natsync.ConnectionPool(nats_server.url, min_size=1, max_size=1) as pool:
        rounds = 0

        def borrow() -> None:
            with pool.connection(timeout=PATIENCE) as client:
                client.publish("pool", b"")

        for _ in moments(borrow, Lease.__exit__, Store.leave, Store._free_locked):
            rounds += 1
            with pool.connection(timeout=PATIENCE) as client:
                assert client.rtt() > 0
            del client  # one that is dropped instead is found out
        assert rounds > 5
        assert pool.stats()["leased"] == 0


# -- close() -----------------------------------------------------------------------------------------------------------


def test_a_subscriber_whose_closing_was_cut_short_is_closed_by_the_next(nats_server: NatsServer) -> None:
    opened = list[natsync.Subscriber]()

    def close() -> None:
        subscriber = natsync.Subscriber(nats_server.url)
        opened.append(subscriber)
        subscriber.handler("closing")(lambda ctx, request: b"")
        subscriber.open()
        subscriber.close(PATIENCE)

    inside = (natsync.Subscriber._close, natsync.Subscriber._shut_down, Responder.close, Handle.leave, Handle._end)
    for _ in moments(close, *inside):
        began = time.monotonic()
        opened[-1].close(PATIENCE)
        assert time.monotonic() - began < PATIENCE / 2
        assert opened[-1].status == "closed"
        assert opened[-1].handles == [] or opened[-1].handles[0].stopped
    assert len(opened) > 10


def test_who_flushes_is_told_of_a_closing_that_was_cut_short_by_the_next(nats_server: NatsServer) -> None:
    closing = list[tuple[natsync.Client, Outcome]]()

    def close() -> None:
        client = natsync.connect(nats_server.url, **QUICK)
        session = client._connection()._session
        assert session is not None
        session._pong = lambda: None  # type: ignore[method-assign]
        closing.append((client, Outcome(lambda: client.flush(None))))
        eventually(lambda: len(session._pings) == 1)
        client.close(0)

    for _ in moments(close, Session.end, Finishing.run):
        client, flush = closing[-1]
        client.close(0)
        assert isinstance(flush.within(PATIENCE), natsync.ConnectionClosed)
    assert len(closing) > 8


def test_who_waits_for_a_closing_that_is_cut_short_goes_on_with_it(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscriber = natsync.Subscriber(nats_server.url)
    subscriber.handler("closing")(lambda ctx, request: b"")
    subscriber.open()
    shut_down = natsync.Subscriber._shut_down
    first = threading.Event()

    def cut_short(*arguments: Any) -> list[str]:
        monkeypatch.setattr(natsync.Subscriber, "_shut_down", shut_down)
        first.set()
        eventually(lambda: bool(subscriber._close_done._changed._turns), PATIENCE)  # the other one waits
        raise Interrupted

    monkeypatch.setattr(natsync.Subscriber, "_shut_down", cut_short)
    closing = Outcome(lambda: (first.wait(PATIENCE), subscriber.close(PATIENCE)))
    with pytest.raises(Interrupted):
        subscriber.close(PATIENCE)
    assert closing.within(PATIENCE) is None
    assert subscriber.status == "closed"


def test_finishing_is_done_once_and_by_one_thread() -> None:
    finishing = Finishing(threading.Lock())
    done = list[str]()

    def cut_short() -> None:
        finishing.run(lambda: done.append("within"))  # somebody is at it
        raise Interrupted

    with pytest.raises(Interrupted):
        finishing.run(cut_short)
    assert finishing.cut_short
    finishing.run(lambda: done.append("once"))
    finishing.run(lambda: done.append("twice"))
    assert done == ["once"]
    assert not finishing.cut_short


def test_who_has_claimed_the_finishing_does_it() -> None:
    finishing, mine, done = Finishing(threading.Lock()), object(), list[str]()
    finishing.claim = mine
    finishing.run(lambda: done.append("another"))
    assert done == []
    finishing.run(lambda: done.append("who claimed"), mine)
    assert done == ["who claimed"]


def test_who_ends_a_stream_has_queued_the_end_when_end_returns(client: natsync.Client, held: Held) -> None:
    """Another thread that ends it too comes between the decision and what follows from it."""
    stream, sender = client.stream(held.subject), held.sender
    core, others = sender._core, list[bool]()
    lock = core.lock

    class Lock:
        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *error: object) -> None:
            lock.release()
            if core._due and not others:
                others.append(True)
                others[0] = core.end()

    core.lock = Lock()  # type: ignore[assignment]
    assert sender.end()
    assert others == [True]
    core.lock = lock
    assert core._out.ended  # type: ignore[attr-defined]
    assert list(stream) == []


def test_the_end_of_a_plain_stream_with_a_gap_is_an_error_though_the_end_came_in_between(
    nats_server: NatsServer, held: Held
) -> None:
    with natsync.connect(nats_server.url, framed=False) as client:
        stream, core = client.stream(held.subject), held.sender._core
        assert isinstance(core, PlainSender)
        put_end, ending = core._put_end, list[object]()

        def later(one: Ending) -> None:
            """The link breaks, and is made up for, as the thread that ends the stream stands here."""
            if not ending:
                ending.append(one)
                with core.lock:
                    core._break_locked("a gap")
                core.repair()
            put_end(one)

        core._put_end = later  # type: ignore[method-assign]
        held.sender.send(b"chunk")
        held.sender.end()
        assert stream.next(PATIENCE) == b"chunk"
        with pytest.raises(natsync.ServerLost, match="a gap"):
            stream.next(PATIENCE)


def test_what_fails_as_a_stream_ends_keeps_nobody_from_being_told(
    client: natsync.Client, held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    stream, told = client.stream(held.subject), list[int]()
    stream.when_finished(lambda: 1 / 0)
    stream.when_finished(lambda: told.append(1))
    stream.close()
    stream.close()
    assert told == [1]
    assert "ZeroDivisionError" in caplog.text


def test_nothing_is_remembered_of_a_plain_stream(nats_server: NatsServer) -> None:
    with natsync.Subscriber(nats_server.url, framed=False) as subscriber, natsync.connect(nats_server.url) as client:
        subscriber.stream_subscribe("plain", lambda ctx, request: iter([b"chunk"]))
        subscriber.open()
        assert list(client.stream("plain")) == [b"chunk"]
        assert client._calls is not None
        assert not client._calls._ended


@pytest.mark.parametrize("framed", [True, False], ids=["framed", "plain"])
def test_closing_the_client_goes_on_with_a_streams_closing_that_was_cut_short(
    nats_server: NatsServer, held: Held, framed: bool
) -> None:
    """The stream is still held, as by the traceback of the Ctrl-C, and another thread waits for a chunk."""
    rounds, state = list[natsync.Context](), dict[str, Any]()

    def leave() -> None:
        client = state["client"] = natsync.connect(nats_server.url, framed=framed, **QUICK)
        stream = state["stream"] = client.stream(held.subject)
        rounds.append(held.take(len(rounds))[0])
        held.take(len(rounds) - 1)[2].send(b"chunk")
        assert stream.next(PATIENCE) == b"chunk"
        state["taking"] = Outcome(lambda: list(stream))
        stream.close()

    for _ in moments(leave, *CALL, Farewell.__init__, Farewell.speak):
        state["client"].close(PATIENCE)
        assert isinstance(state["taking"].within(PATIENCE), natsync.NatsError)
        assert rounds[-1].done.wait(PATIENCE)
    state["client"].close(PATIENCE)
    assert len(rounds) > 20
