"""Counters and flags of what waits: they come right where a thread cannot be started, or a Ctrl-C falls in between."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import lock_order
import natsync
from broker import QUICK
from interrupting import Interrupted
from natsync import concurrency, subscription, timers
from natsync.concurrency import Deadline
from natsync.errors import ConnectError
from natsync.message import Message
from natsync.mux import LinkLoss, Waiter
from natsync.pooling.keeper import Watch
from natsync.pooling.store import Store, Turn
from natsync.protocol import Batch
from natsync.session import Session
from natsync.settling import Settling
from natsync.streaming.peers import ANSWER_SECONDS, Event, Peer
from natsync.streaming.responder import Responder
from natsync.streaming.work import Work
from natsync.subscription import SubscriptionCore
from natsync.testing import NatsServer, eventually
from natsync.timers import Alarm
from natsync.workers import Lane, WorkerPool

PATIENCE = 30.0


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool("natsync-test-worker", 4)
    yield pool
    assert pool.close(Deadline.after(5)) == []


class Starts:
    """Makes the next starts of threads whose name has this in it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._named, self._failures = "", list[BaseException]()
        start = threading.Thread.start

        def or_fail(thread: threading.Thread) -> None:
            if self._failures and self._named in thread.name:
                raise self._failures.pop()
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", or_fail)

    def fail(self, named: str, error: type[BaseException], times: int = 1) -> None:
        self._named, self._failures = named, [error("can't start new thread") for _ in range(times)]

    @property
    def failed(self) -> bool:
        return not self._failures


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Starts:
    return Starts(monkeypatch)


# -- callbacks that are due --------------------------------------------------------------------------------------------


def test_a_pool_whose_helper_could_not_be_started_makes_its_connection_later(
    nats_server: NatsServer, starts: Starts
) -> None:
    starts.fail("callbacks-worker", RuntimeError)
    with natsync.ConnectionPool(nats_server.url, timeout=PATIENCE) as pool, pool.connection() as client:
        assert starts.failed
        assert client.rtt() > 0


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
def test_threads_that_did_not_start_are_not_counted(starts: Starts, error: type[BaseException]) -> None:
    before, ran = concurrency._background._threads, list[int]()
    starts.fail("callbacks-worker", error, concurrency.CALLBACK_THREADS + 1)
    while not starts.failed:
        try:
            concurrency.run_soon(lambda: ran.append(1), "a callback")
        except Interrupted:
            assert error is Interrupted
    assert concurrency._background._threads == before
    concurrency.run_waiting()
    eventually(lambda: len(ran) == concurrency.CALLBACK_THREADS + 1)


# -- workers -----------------------------------------------------------------------------------------------------------


def test_a_task_that_may_not_wait_is_refused_if_no_thread_can_be_started(pool: WorkerPool, starts: Starts) -> None:
    begun, busy, ran = threading.Event(), threading.Event(), list[str]()
    assert pool.submit(lambda: (begun.set(), busy.wait(PATIENCE)))
    assert begun.wait(PATIENCE)
    starts.fail("", RuntimeError)
    assert not pool.submit(lambda: ran.append("at once"), queue=False)
    starts.fail("", RuntimeError)
    assert pool.submit(lambda: ran.append("in its turn"))
    busy.set()
    eventually(lambda: ran == ["in its turn"])


def test_a_lane_whose_thread_was_interrupted_as_it_started_runs_one_task_at_a_time(
    pool: WorkerPool, starts: Starts
) -> None:
    lane, lock, inside, ran = Lane(pool), threading.Lock(), list[int](), list[int]()

    def task() -> None:
        with lock:
            inside.append(1)
        time.sleep(0.01)
        with lock:
            ran.append(len(inside))
            inside.pop()

    starts.fail("", Interrupted)
    with pytest.raises(Interrupted):
        lane.submit(task)
    for _ in range(4):
        assert lane.submit(task)
    eventually(lambda: len(ran) >= 4)
    assert set(ran) == {1}


def test_messages_whose_worker_could_not_be_started_are_handled_soon(
    natsync_client: natsync.Client, starts: Starts
) -> None:
    got = list[bytes]()
    subscription = natsync_client.subscribe("accounts", lambda message: got.append(message.data))
    natsync_client.flush()
    starts.fail("-worker-", RuntimeError)
    natsync_client.publish("accounts", b"1")
    natsync_client.flush()
    eventually(lambda: starts.failed)
    subscription.drain(PATIENCE)
    assert got == [b"1"]


# -- what is logged of it ----------------------------------------------------------------------------------------------


class Listener(logging.Handler):
    """Hears what natsync logs, on which threads, and which of natsync's locks these held then."""

    def __init__(self, recorder: lock_order.Recorder) -> None:
        super().__init__()
        self.heard, self.threads, self.held = list[str](), list[str](), list[str]()
        self._recorder = recorder

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())
        self.threads.append(threading.current_thread().name)
        self.held += [lock.name for lock, _ in self._recorder.holding()]


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """Listens while locks keep book, those of modules included."""
    log = logging.getLogger("natsync")
    with lock_order.recording() as recorder:
        monkeypatch.setattr(concurrency, "_background", concurrency._Background())
        monkeypatch.setattr(timers, "_timers", timers._Timers())
        listener = Listener(recorder)
        log.addHandler(listener)
        yield listener
        log.removeHandler(listener)


def refuse_all_but(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """There is no thread to be had, but for those of these names."""
    start = threading.Thread.start

    def or_refuse(thread: threading.Thread) -> None:
        if thread.name not in names:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", or_refuse)


NO_WORKER = "natsync-test-worker: no thread can be started"
NO_TIMER = "the timer's thread cannot be started; deadlines are late"
NO_CALLBACK = "no thread can be started for a callback; it waits"


def test_that_a_lane_has_no_thread_is_logged_under_no_lock(listener: Listener, starts: Starts) -> None:
    lane = Lane(WorkerPool("natsync-test-worker", 1))
    starts.fail("test-worker", RuntimeError)
    assert not lane.submit(lambda: None)
    eventually(lambda: listener.heard == [NO_WORKER])
    assert listener.held == []


def test_that_a_subscription_has_no_thread_is_logged_under_no_lock(
    listener: Listener, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription, "TRY_AGAIN_SECONDS", 0.01)
    link: Any = SimpleNamespace(publish_answer=None)
    pool = WorkerPool("natsync-test-worker", 1)
    core = SubscriptionCore(link, b"a", None, callback=lambda message: None, pool=pool)
    starts.fail("test-worker", RuntimeError)
    core.deliver(Batch(b"1", b"a", [(None, None, b"x")]))
    eventually(lambda: listener.heard == [NO_WORKER])
    assert listener.held == []
    assert core.wait_empty(Deadline.after(PATIENCE))
    assert pool.close(Deadline.after(PATIENCE)) == []


def test_that_an_alarm_has_no_thread_is_logged_under_no_lock(listener: Listener, starts: Starts) -> None:
    alarm = Alarm(lambda: None)
    starts.fail("natsync-timer", RuntimeError)
    alarm.set(time.monotonic() + 1000)
    eventually(lambda: listener.heard == [NO_TIMER])
    assert listener.held == []
    alarm.clear()


def test_that_an_event_has_no_thread_is_logged_under_no_lock(
    nats_server: NatsServer, listener: Listener, starts: Starts
) -> None:
    """The connection's lock is held as its events are put into their lane."""
    starts.fail("-worker-1", RuntimeError)
    with natsync.Client(nats_server.url, on_event=lambda name, details: None) as client:
        client.rtt()
        eventually(lambda: len(listener.heard) == 2)
    assert starts.failed
    assert "no thread can be started" in listener.heard[0]
    assert "events wait" in listener.heard[1]
    assert listener.held == []


def test_that_a_callback_has_no_thread_is_logged_under_no_lock(listener: Listener, starts: Starts) -> None:
    ran, alarm = list[int](), Alarm(lambda: None)
    starts.fail("callbacks-worker", RuntimeError)
    with alarm._lock:  # any lock of natsync's
        concurrency.run_soon(lambda: ran.append(1), "a callback")
        assert listener.heard == []
    concurrency.run_waiting()
    eventually(lambda: listener.heard == [NO_CALLBACK])
    assert (ran, listener.held) == ([1], [])


def test_one_thread_logs_and_the_others_are_for_callbacks(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many warnings there are, and however long the handler takes for one."""
    emit, go_on = listener.emit, threading.Event()

    def slow(record: logging.LogRecord) -> None:
        emit(record)
        go_on.wait(PATIENCE)

    monkeypatch.setattr(listener, "emit", slow)
    log = logging.getLogger("natsync.test")
    try:
        concurrency.warn_soon(log, "number %d", -1)
        eventually(lambda: bool(listener.heard))
        for number in range(2 * concurrency.UNSAID_WARNINGS):
            concurrency.warn_soon(log, "number %d", number)
        assert concurrency._background._threads == 1
        called = threading.Event()
        concurrency.run_soon(called.set, "a callback")
        assert called.wait(PATIENCE)
    finally:
        go_on.set()
    eventually(lambda: len(listener.heard) == 1 + concurrency.UNSAID_WARNINGS)  # no more are kept
    assert listener.heard == [f"number {number}" for number in range(-1, concurrency.UNSAID_WARNINGS)]


def test_where_there_is_no_thread_at_all_the_timer_logs_it_and_goes_on(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once, however often it was found out; whatever the handler raises."""
    lane, rang = Lane(WorkerPool("natsync-test-worker", 1)), threading.Event()
    emit = listener.emit

    def failing(record: logging.LogRecord) -> None:
        emit(record)
        raise ValueError("the handler's")

    monkeypatch.setattr(listener, "emit", failing)
    with monkeypatch.context() as patch:
        refuse_all_but(patch, "natsync-timer")
        for _ in range(3):
            assert not lane.submit(lambda: None)
        assert listener.heard == []
        timers.schedule_after(0, rang.set)
        assert rang.wait(PATIENCE)
        assert (listener.heard, listener.threads, listener.held) == ([NO_WORKER], ["natsync-timer"], [])


def test_where_there_is_no_thread_at_all_the_supervisor_logs_it(
    nats_server: NatsServer, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    with natsync.Client(nats_server.url) as client:
        client.rtt()
        done = threading.Event()
        for chore in (lambda: None, done.set):  # the supervisor has looked behind the first
            client._core.in_supervisor(chore)
        assert done.wait(PATIENCE)
        with monkeypatch.context() as patch:
            refuse_all_but(patch)
            assert not Lane(WorkerPool("natsync-test-worker", 1)).submit(lambda: None)
            assert listener.heard == []
            client._core.in_supervisor(lambda: None)
            eventually(lambda: NO_WORKER in listener.heard)  # the timer's may be missing, too
        assert listener.threads[listener.heard.index(NO_WORKER)].endswith("-supervisor")
        assert listener.held == []


# -- timers ------------------------------------------------------------------------------------------------------------


def test_a_timer_thread_that_was_interrupted_as_it_started_is_started_again(starts: Starts) -> None:
    timers.settle()
    eventually(lambda: timers.table()._thread is None)
    rang = threading.Event()
    starts.fail("natsync-timer", Interrupted)
    with pytest.raises(Interrupted):
        timers.schedule_after(0.01, lambda: None)
    timers.schedule_after(0.02, rang.set)
    assert rang.wait(PATIENCE)


def test_an_alarm_that_could_not_be_set_can_be_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rang = threading.Event()
    alarm = Alarm(rang.set)

    def interrupted(when: float, callback: Callable[[], None]) -> Any:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(timers, "schedule", interrupted)
        with pytest.raises(Interrupted):
            alarm.set_by(time.monotonic() + 0.01)
    alarm.set_by(time.monotonic() + 0.02)
    assert rang.wait(PATIENCE)


def test_an_alarm_that_is_set_anew_in_the_moment_it_is_due_has_one_timer() -> None:
    """The timer's thread has taken the first one, and waits for the lock while another thread clears and sets it."""
    alarm = Alarm(lambda: None)
    alarm.set(time.monotonic() + 1000)
    first = alarm._timer
    assert first is not None
    first.callback = None  # as the timer's thread takes it
    alarm._timer = None  # as clear() lets go of it
    alarm.set(time.monotonic() + 2000)
    second = alarm._timer
    alarm._due()
    assert alarm._timer is second
    alarm.clear()
    first.callback = lambda: None
    first.cancel()


# -- others ------------------------------------------------------------------------------------------------------------


def test_settling_that_was_interrupted_as_it_asked_asks_the_next_time() -> None:
    answers, confirmed, failures = list[Any](), list[int](), [Interrupted()]

    def ping(answered: Any) -> bool:
        if failures:
            raise failures.pop()
        answers.append(answered)
        return True

    settling = Settling(ping)
    with pytest.raises(Interrupted):
        settling.when_confirmed(1, lambda: confirmed.append(1))
    settling.when_confirmed(2, lambda: confirmed.append(2))
    answers[0](2)
    assert confirmed == [1, 2]


def test_bytes_that_an_interrupt_left_counted_do_not_stay() -> None:
    link: Any = None
    core = SubscriptionCore(link, b"a", None, pending_bytes=100)
    core.deliver(Batch(b"1", b"a", [(None, None, b"x" * 100)]))
    core._pending.popleft()  # and there it was interrupted
    core.deliver(Batch(b"1", b"a", [(None, None, b"y" * 100)]))
    assert (core.pending, core.dropped) == (1, 0)


def test_a_pool_that_closes_looks_for_what_was_dropped_meanwhile(nats_server: NatsServer) -> None:
    pool = natsync.ConnectionPool(nats_server.url)
    lent = [pool.getconn()]
    threading.Timer(0.1, lent.clear).start()
    begin = time.monotonic()
    pool.close(PATIENCE)
    assert time.monotonic() - begin < PATIENCE / 2


def test_what_ends_after_its_registration_was_stopped_is_counted_too(nats_server: NatsServer) -> None:
    with natsync.Subscriber(nats_server.url) as subscriber, natsync.Client(nats_server.url) as client:
        inside, go_on = threading.Event(), threading.Event()

        def answer(ctx: natsync.Context, request: natsync.Message) -> bytes:
            inside.set()
            assert go_on.wait(PATIENCE)
            return b"done"

        subscriber.handler("late")(answer)
        subscriber.open()
        handle = subscriber.handles[0]
        answers = list[bytes]()
        asking = threading.Thread(target=lambda: answers.append(client.request("late", timeout=PATIENCE).data))
        asking.start()
        assert inside.wait(PATIENCE)
        stopping = threading.Thread(target=handle.stop)
        stopping.start()
        eventually(lambda: not subscriber.handles)
        assert (subscriber.stats()["received"], subscriber.stats()["active"]) == (1, 1)
        go_on.set()
        stopping.join(PATIENCE)
        asking.join(PATIENCE)
        assert answers == [b"done"]
        eventually(lambda: subscriber.stats()["processed"] == 1)
        assert subscriber.stats()["active"] == 0


@pytest.mark.parametrize(("where", "moment"), [(Responder, "start_stream"), (Work, "begin")])
def test_a_stream_that_is_being_started_as_its_registration_is_stopped_is_counted(
    where: type, moment: str, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader has the request, and is frozen before it is counted, or before it is under way."""
    begin, came, go_on = getattr(where, moment), threading.Event(), threading.Event()

    def late(*arguments: Any) -> Any:
        came.set()
        assert go_on.wait(PATIENCE)
        return begin(*arguments)

    with natsync.Subscriber(nats_server.url) as subscriber, natsync.Client(nats_server.url) as client:
        handle = subscriber.stream_subscribe("late", lambda ctx, request: iter([b"a chunk"]))
        monkeypatch.setattr(where, moment, late)
        try:
            stream = client.stream("late", timeout=PATIENCE)
            assert came.wait(PATIENCE)
            handle.leave(Deadline.after(0))  # the first half of stop(); the server cannot confirm it
            assert not subscriber.handles
            subscriber.stats()
            assert not handle.wait_idle(Deadline.after(0))
        finally:
            go_on.set()
        assert list(stream) == [b"a chunk"]
        assert handle.wait_idle(Deadline.after(PATIENCE))
        stats = subscriber.stats()
        assert [stats[name] for name in ("received", "processed", "active")] == [1, 1, 0]
        eventually(lambda: handle.idle, PATIENCE)  # the server has confirmed that no more comes
        assert subscriber.stats()["received"] == 1
        assert not subscriber._leaving


def test_a_registration_that_has_ended_starts_no_stream(nats_server: NatsServer) -> None:
    """The reader looked for whose request it is before the end, and comes with it behind the end."""
    with natsync.Subscriber(nats_server.url) as subscriber:
        handle = subscriber.stream_subscribe("late", lambda ctx, request: iter([b"a chunk"]))
        core = handle._core
        handle.stop()
        core.deliver(Batch(core.sid, b"late", [(b"_INBOX.late", None, b"")]))
        assert handle.stats["received"] == subscriber.stats()["received"] == 0


def test_a_message_is_at_no_moment_neither_waiting_nor_in_the_callback(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    link: Any = SimpleNamespace(publish_answer=None)
    taken, seen = SubscriptionCore._pop_locked, list[int]()

    def looking(core: SubscriptionCore) -> Message:
        message = taken(core)
        seen.append(core.unhandled)
        return message

    monkeypatch.setattr(SubscriptionCore, "_pop_locked", looking)
    core = SubscriptionCore(link, b"a", None, callback=lambda message: None, pool=pool)
    core.deliver(Batch(b"1", b"a", [(None, None, b"x")]))
    assert core.wait_empty(Deadline.after(PATIENCE))
    assert seen == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_that_a_handler_forks_leaves_it_whatever_lock_was_held(nats_server: NatsServer) -> None:
    children = list[int]()
    with natsync.Subscriber(nats_server.url) as subscriber, natsync.Client(nats_server.url) as client:

        @subscriber.handler("fork")
        def answer(ctx: natsync.Context, request: natsync.Message) -> bytes:
            with subscriber.handles[0]._work._lock:  # as another request's thread may hold it
                pid = os.fork()
            if not pid:
                subscriber.handles[0]._work._lock.acquire()
                return b"child"
            children.append(pid)
            return b"parent"

        subscriber.open()
        assert client.request("fork", timeout=PATIENCE).data == b"parent"
        end = time.monotonic() + PATIENCE
        while not (left := os.waitpid(children[0], os.WNOHANG)[0]) and time.monotonic() < end:
            time.sleep(0.01)
        if not left:
            os.kill(children[0], 9)
            os.waitpid(children[0], 0)
        assert left, "the child hangs"


# -- where a thread, or the whole process, was frozen for a while -----------------------------------------------------


def test_closing_waits_for_workers_that_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes to what waits starts the next one, behind the look of close() at who there is."""
    run, done = WorkerPool._run, list[str]()

    def late(pool: WorkerPool) -> None:
        time.sleep(0.05)
        run(pool)

    monkeypatch.setattr(WorkerPool, "_run", late)
    pool = WorkerPool("natsync-test-worker", 8)
    pool.submit(lambda: (time.sleep(0.1), done.append("one")))
    pool.submit(lambda: (time.sleep(0.3), done.append("two")))
    assert pool.close(Deadline.after(PATIENCE)) == []
    assert sorted(done) == ["one", "two"]


class Streams:
    """The streams of a peer, as one."""

    def __init__(self) -> None:
        self.told = list[str]()
        self.asked = threading.Semaphore(0)

    def met(self, peer: Peer) -> None:
        """It has joined."""

    def ask(self) -> None:
        self.asked.release()

    def suspend(self) -> None:
        self.told.append("suspended")

    def resume(self) -> None:
        self.told.append("resumed")

    def give_up(self, why: str) -> None:
        self.told.append("given up")


@pytest.fixture
def streams() -> Streams:
    return Streams()


def test_a_peer_suspended_while_there_is_no_link_has_its_whole_grace_once_there_is_one(streams: Streams) -> None:
    """A 503 that had come before the link was lost is handed on late; how long all was well before says nothing."""
    linked = [True]
    peer = Peer(30.0, 1.0, lambda: linked[0])
    peer.join(streams)
    peer._since -= 3600
    linked[0] = False
    peer.link_lost()
    peer.unreachable()
    linked[0] = True
    begin = time.monotonic()
    peer.link_made()
    eventually(lambda: "given up" in streams.told, PATIENCE)
    assert time.monotonic() - begin >= 0.9
    peer.leave(streams)


@pytest.mark.parametrize("event", [Event.OVERDUE, Event.OUTAGE])
def test_a_conclusion_counts_only_if_what_it_follows_from_still_lasts(event: Event, streams: Streams) -> None:
    """The timer's thread has looked, and before it goes on the peer is heard and lost anew, or the link is made."""
    linked = [True]
    peer = Peer(30.0, 30.0, lambda: linked[0])
    peer.join(streams)
    on = peer._on

    def meanwhile(what: Event, **follows: Any) -> None:
        peer._on = on  # type: ignore[method-assign]
        assert what is event
        if event is Event.OVERDUE:
            peer.heard()
            peer.unreachable()
        else:
            linked[0] = True
            peer.link_made()
        on(what, **follows)

    if event is Event.OVERDUE:
        peer.unreachable()
        peer._since -= 3600
    else:
        linked[0] = False
        peer.link_lost()
        assert peer._down_since is not None
        peer._down_since -= 3600
    peer._on = meanwhile  # type: ignore[method-assign]
    peer._look()
    assert "given up" not in streams.told
    peer.leave(streams)


def asked_in_vain(peer: Peer, seconds: float, late: float) -> float:
    """Have the peer, which is suspended, look so long after that began, and so late; when it looked."""
    now = time.monotonic()
    peer._since, peer._alarm.due = now - seconds, now - late
    peer._look()
    return now


def test_a_look_at_a_peer_that_comes_late_is_taken_again_before_it_is_given_up(streams: Streams) -> None:
    """The process was frozen, or just the timer's thread: an answer has come meanwhile, and was not read yet."""
    frozen, go_on = threading.Event(), threading.Event()
    timers.schedule_after(0, lambda: (frozen.set(), go_on.wait(PATIENCE)))  # type: ignore[arg-type, return-value]
    assert frozen.wait(PATIENCE)
    peer = Peer(30.0, 3.0, lambda: True)
    peer.join(streams)
    peer.unreachable()
    late = peer._since + peer.grace + 2 * timers.LATE_SECONDS
    eventually(lambda: time.monotonic() > late, PATIENCE)
    go_on.set()
    assert streams.asked.acquire(timeout=PATIENCE)  # the look has come
    assert streams.told == ["suspended"]
    peer.heard()
    assert streams.told == ["suspended", "resumed"]
    peer.unreachable()
    eventually(lambda: streams.told[-1] == "given up", PATIENCE)  # looks come in time now
    peer.leave(streams)


def test_the_time_by_which_a_look_is_late_does_not_count_against_a_peer(streams: Streams) -> None:
    peer = Peer(30.0, 30.0, lambda: True)
    peer.join(streams)
    peer.unreachable()
    now = asked_in_vain(peer, 3600, 3590)
    assert now - peer._since == pytest.approx(10, abs=1)  # the rest of the grace is left
    peer.heard()
    peer.unreachable()
    now = asked_in_vain(peer, 3600, 3000)
    assert now - peer._since == pytest.approx(30 - ANSWER_SECONDS, abs=1)  # a moment, at least
    assert streams.told == ["suspended", "resumed", "suspended"]
    asked_in_vain(peer, 31, 0.1)
    assert streams.told[-1] == "given up"
    peer.leave(streams)


def test_a_process_that_is_late_all_the_time_gives_a_peer_up_all_the_same(streams: Streams) -> None:
    peer = Peer(30.0, 30.0, lambda: True)
    peer.join(streams)
    peer.asked()
    asked_in_vain(peer, 60, 1)
    assert not peer.suspended
    asked_in_vain(peer, 60, 1)
    assert peer.suspended
    asked_in_vain(peer, 60, 1)
    assert streams.told == ["suspended"]
    asked_in_vain(peer, 60, 1)
    assert streams.told == ["suspended", "given up"]
    peer.leave(streams)


def test_a_question_that_could_not_be_answered_in_a_frozen_process_is_asked_again(streams: Streams) -> None:
    peer = Peer(30.0, 30.0, lambda: True)
    peer.join(streams)
    peer.asked()
    asked_in_vain(peer, 3600, 3590)
    assert not peer.suspended
    assert streams.asked.acquire(timeout=0)
    asked_in_vain(peer, ANSWER_SECONDS + 0.1, 0.1)
    assert peer.suspended
    peer.leave(streams)


def test_a_link_that_is_lost_while_the_process_is_frozen_leaves_a_suspended_peer_its_grace(streams: Streams) -> None:
    """The reader notices as it wakes, before the timer has looked."""
    peer = Peer(30.0, 30.0, lambda: True)
    peer.join(streams)
    peer.unreachable()
    now = time.monotonic()
    peer._since, peer._alarm.due = now - 3600, now - 3590
    peer.link_lost()
    peer.link_made()
    peer._look()
    assert streams.told == ["suspended"]
    assert now - peer._since == pytest.approx(10, abs=1)
    peer.leave(streams)


def test_an_outage_in_which_the_process_was_frozen_leaves_a_grace_for_the_next_link(streams: Streams) -> None:
    peer = Peer(30.0, 30.0, lambda: True)
    peer.join(streams)
    peer.link_lost()
    now = time.monotonic()
    peer._down_since, peer._alarm.due = now - 3600, now - 3420
    peer._look()
    assert not streams.told
    assert peer._alarm._when == pytest.approx(now + 30, abs=1)
    peer._down_since -= 31
    peer._look()
    assert streams.told == ["given up"]
    peer.leave(streams)


def test_who_waited_for_long_has_not_borrowed_for_long(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor if its thread comes late to what it was granted."""
    waited, granted, go_on = Store.waited, threading.Event(), threading.Event()

    def late(store: Store, turn: Turn, seconds: float) -> None:
        granted.set()
        assert go_on.wait(PATIENCE)
        waited(store, turn, seconds)

    with natsync.ConnectionPool(nats_server.url, max_size=1, leak_timeout=1000, timeout=PATIENCE) as pool:
        lent = pool.getconn()
        monkeypatch.setattr(Store, "waited", late)

        def borrow() -> None:
            with pool.connection() as client:
                client.rtt()

        borrower = threading.Thread(target=borrow)
        borrower.start()
        eventually(lambda: pool.stats()["waiting"] == 1)
        given_back = time.monotonic()
        pool.putconn(lent)
        assert granted.wait(PATIENCE)
        begins = [turn.since for turn in pool._keeper.store.leased]
        go_on.set()
        borrower.join(PATIENCE)
    assert len(begins) == 1
    assert begins[0] >= given_back


def test_a_link_that_is_lost_again_before_it_is_told_of_makes_nothing_usable(nats_server: NatsServer) -> None:
    with natsync.ConnectionPool(nats_server.url, max_size=1, timeout=PATIENCE) as pool:
        with pool.connection() as client:
            client.rtt()
            (turn,) = pool._keeper.store.leased
            member = turn.member
            assert member is not None
            watch = next(one for one in member.core.mux.watchers if isinstance(one, Watch))
        member.usable = False
        session, member.core._session = member.core._session, None
        watch.link_made()
        assert not member.usable
        member.core._session = session
        watch.link_made()
        assert member.usable


class Told(Waiter):
    """Writes down what it is told of links, and may have something to do when there is one."""

    def __init__(self, told: list[str], name: str, made: Callable[[], None] = lambda: None) -> None:
        self._told, self._name, self._made = told, name, made

    def link_lost(self, loss: LinkLoss) -> None:
        self._told.append(f"{self._name}: lost")

    def link_made(self) -> None:
        self._told.append(f"{self._name}: made")
        self._made()


def test_of_a_link_that_is_lost_while_it_is_told_of_everybody_hears_in_order(nats_server: NatsServer) -> None:
    """The supervisor tells that it is made; before it comes to the second one, the link is lost on another thread."""
    told, over = list[str](), threading.Event()
    with natsync.connect(nats_server.url, **QUICK) as client:
        core = client._connection()

        def lose() -> None:
            if over.is_set():
                return
            over.set()
            session = core._session
            assert session is not None
            loser = threading.Thread(target=lambda: session.end(ConnectError("lost at once")))
            loser.start()
            loser.join(PATIENCE)
            assert not loser.is_alive()

        core.mux.watchers += [Told(told, "first", lose), Told(told, "second")]
        client.force_reconnect()
        eventually(lambda: told.count("second: made") == 2 and told[-1] == "second: made")
        assert client.rtt() > 0
    expected = ["lost", "made", "lost", "made"]
    assert [text for text in told if "first" in text] == [f"first: {text}" for text in expected]
    assert [text for text in told if "second" in text] == [f"second: {text}" for text in expected]


def test_news_that_fail_keep_nobody_from_the_next_ones(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = list[str]()
    with natsync.connect(nats_server.url, **QUICK) as client:
        core = client._connection()
        core.mux.watchers.append(Told(told, "it"))
        with monkeypatch.context() as patch:
            patch.setattr(core.mux, "link_made", lambda: 1 / 0)
            client.force_reconnect()
            eventually(lambda: "telling of a link raised" in caplog.text)
        client.force_reconnect()
        eventually(lambda: told == ["it: lost", "it: lost", "it: made"])


def test_a_request_for_a_stream_waits_a_grace_on_a_link_and_longer_while_there_is_none(nats_server: NatsServer) -> None:
    """So too if the next link is lost again, and whoever tells that there was one comes late."""
    with natsync.connect(nats_server.url, resume_grace=100.0) as client, client.subscribe("silent"):
        stream, core, begin = client.stream("silent"), client._connection(), time.monotonic()
        call = stream._call
        assert call._mark is not None
        loss = LinkLoss(OSError("gone"), call._mark, call._mark, 0, frozenset())

        def seconds(news: Callable[[], None], session: Session | None) -> float:
            """How long it waits from the beginning on, as it has been told."""
            core._session = session
            news()
            assert call._alarm._when is not None
            return call._alarm._when - begin

        session = core._session
        try:
            assert seconds(lambda: call.link_lost(loss), None) == pytest.approx(600, abs=PATIENCE)
            assert seconds(call.link_made, session) == pytest.approx(100, abs=PATIENCE)
            assert seconds(lambda: call.link_lost(loss), None) == pytest.approx(600, abs=PATIENCE)
            assert seconds(call.link_made, None) == pytest.approx(600, abs=PATIENCE)  # late
            call._until = begin + 50  # that much is left of the six graces
            assert seconds(call.link_made, session) == pytest.approx(50)
        finally:
            core._session = session
        stream.close()


def test_an_answer_is_waited_for_once_more_if_the_process_was_frozen(nats_server: NatsServer) -> None:
    with natsync.connect(nats_server.url, resume_grace=100.0) as client, client.subscribe("silent"):
        stream = client.stream("silent")
        call = stream._call
        assert call._mark is not None
        call.link_lost(LinkLoss(OSError("gone"), call._mark, call._mark, 0, frozenset()))
        now = time.monotonic()
        call._until = call._alarm.due = now - 3600
        call._unanswered()
        assert not call.over
        assert call._alarm._when == pytest.approx(now + 100, abs=PATIENCE)
        call._unanswered()  # the news of a link have set it anew in the moment that it rang
        assert not call.over
        call._alarm.due = time.monotonic()
        call._unanswered()
        assert isinstance(call.error, natsync.ServerLost)
        stream.close()
