"""natsync.subscription without a server: what waits, what is lost, who is woken, how it ends."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from natsync import subscription as subscription_module
from natsync.concurrency import Deadline
from natsync.errors import (
    ConnectionClosed,
    DrainTimeout,
    ForkError,
    InvalidArgument,
    SlowConsumerError,
    TimedOut,
)
from natsync.message import Message
from natsync.protocol import Batch
from natsync.subscription import Subscription, SubscriptionCore
from natsync.testing import eventually
from natsync.workers import WorkerPool


class FakeLink:
    """A connection that writes down what a subscription asks of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.slow: list[tuple[str, int]] = []
        self.published: list[Any] = []
        self.dropped = 0
        self.chores: list[Callable[[], None]] = []
        self.confirmation: Exception | None = None
        self.on_confirm: Callable[[], None] = lambda: None

    def unsubscribe(self, core: SubscriptionCore) -> None:
        self.calls.append("unsubscribe")
        core.deactivate()

    def stop_intake(self, core: SubscriptionCore) -> None:
        self.calls.append("stop_intake")

    def confirm(self, deadline: Deadline) -> None:
        self.calls.append("confirm")
        self.on_confirm()
        if self.confirmation is not None:
            raise self.confirmation

    def count_dropped(self, messages: int) -> None:
        self.dropped += messages

    def publish_answer(self, reply: str, payload: Any, headers: Any) -> None:
        self.published.append((reply, payload, headers))

    def slow_consumer(self, subject: str, dropped: int) -> None:
        self.slow.append((subject, dropped))

    def in_supervisor(self, task: Callable[[], None]) -> None:
        self.chores.append(task)


@pytest.fixture
def link() -> FakeLink:
    return FakeLink()


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool("natsync-test-worker", 8)
    yield pool
    assert pool.close(Deadline.after(5)) == []


def core_of(link: FakeLink, **options: Any) -> SubscriptionCore:
    return SubscriptionCore(link, b"a.*", None, **options)


def batch(*payloads: bytes | str | int, subject: bytes = b"a.b", reply: bytes | None = None) -> Batch:
    items = [str(one).encode() if not isinstance(one, bytes) else one for one in payloads]
    return Batch(b"1", subject, [(reply, None, data) for data in items])


def taken(core: SubscriptionCore) -> list[bytes]:
    """Everything that waits, taken."""
    return [message.data for _ in range(core.pending) if (message := core.take(Deadline.after(0))) is not None]


class Waiting:
    """A call in a thread of its own, and how it ends."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.outcome: list[Any] = []
        self._call = call
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.outcome.append(self._call())
        except Exception as error:
            self.outcome.append(error)

    def result(self) -> Any:
        self.thread.join(5)
        assert self.outcome, "still waiting"
        return self.outcome[0]


def waiting_for(core: SubscriptionCore, call: Callable[[], Any]) -> Waiting:
    """A call that waits on the core already."""
    before = len(core._changed._turns)
    one = Waiting(call)
    eventually(lambda: len(core._changed._turns) > before)
    return one


# -- taking ----------------------------------------------------------------------------------------------------------


def test_messages_are_taken_in_the_order_in_which_they_came(link: FakeLink) -> None:
    core = core_of(link)
    core.deliver(batch(1, 2))
    core.deliver(batch(3, subject=b"a.c"))
    core.deliver(batch(4))
    messages = [core.take(Deadline.after(0)) for _ in range(4)]
    assert [(one.subject, one.data) for one in messages if one] == [
        ("a.b", b"1"), ("a.b", b"2"), ("a.c", b"3"), ("a.b", b"4"),
    ]  # fmt: skip
    assert (core.pending, core.pending_bytes, core.delivered, core.received) == (0, 0, 4, 4)


def test_a_taken_message_answers_over_the_link(link: FakeLink) -> None:
    core = core_of(link)
    core.deliver(batch("x", reply=b"r.1"))
    message = core.take(Deadline.after(0))
    assert message is not None
    message.respond(b"y")
    assert link.published == [("r.1", b"y", None)]


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_waiting_for_a_message_ends_with_the_deadline(timeout: float, link: FakeLink) -> None:
    core = core_of(link)
    started = time.monotonic()
    with pytest.raises(TimedOut, match=r"a\.\*"):
        core.take(Deadline.after(timeout))
    assert timeout <= time.monotonic() - started + 0.001 < timeout + 5


def test_a_message_that_is_there_needs_no_time(link: FakeLink) -> None:
    core = core_of(link)
    core.deliver(batch(1))
    assert taken(core) == [b"1"]


def test_a_delivery_wakes_who_waits(link: FakeLink) -> None:
    core = core_of(link)
    waiting = waiting_for(core, lambda: core.take(Deadline()))
    core.deliver(batch("x"))
    assert waiting.result().data == b"x"


def test_each_of_several_takers_gets_a_message_of_its_own(link: FakeLink) -> None:
    core = core_of(link)
    waiting = [waiting_for(core, lambda: core.take(Deadline())) for _ in range(4)]
    core.deliver(batch(1, 2, 3, 4))
    assert sorted(one.result().data for one in waiting) == [b"1", b"2", b"3", b"4"]


def test_what_waits_can_be_taken_after_the_end(link: FakeLink) -> None:
    core = core_of(link)
    core.deliver(batch(1, 2))
    core.deactivate()
    assert taken(core) == [b"1", b"2"]
    assert core.take(Deadline()) is None


def test_the_end_wakes_who_waits(link: FakeLink) -> None:
    core = core_of(link)
    waiting = [waiting_for(core, lambda: core.take(Deadline())) for _ in range(2)]
    core.deactivate()
    assert [one.result() for one in waiting] == [None, None]


def test_an_end_with_an_error_tells_it_after_what_waits(link: FakeLink) -> None:
    core = core_of(link)
    core.deliver(batch(1))
    core.deactivate(ConnectionClosed("gone"))
    assert taken(core) == [b"1"]
    with pytest.raises(ConnectionClosed, match="gone"):
        core.take(Deadline())


def test_an_end_with_an_error_wakes_who_waits_with_it(link: FakeLink) -> None:
    core = core_of(link)
    waiting = waiting_for(core, lambda: core.take(Deadline()))
    core.deactivate(ConnectionClosed("gone"))
    assert isinstance(waiting.result(), ConnectionClosed)


def test_nothing_is_delivered_after_the_end(link: FakeLink) -> None:
    core = core_of(link)
    core.deactivate()
    core.deliver(batch(1))
    assert (core.pending, core.received, core.dropped) == (0, 0, 0)


def test_forgetting_counts_what_waited_as_dropped(link: FakeLink) -> None:
    core = core_of(link)
    core.deliver(batch(1, 2, 3))
    taken_first = core.take(Deadline())
    core.deactivate(forget=True)
    assert taken_first is not None
    assert (core.pending, core.pending_bytes, core.dropped, core.delivered) == (0, 0, 2, 1)


# -- limits ----------------------------------------------------------------------------------------------------------


def test_after_the_last_message_wanted_the_subscription_ends(link: FakeLink) -> None:
    core = core_of(link, max_messages=3)
    core.deliver(batch(1, 2))
    assert link.calls == []
    core.deliver(batch(3, 4, 5))
    assert link.calls == ["unsubscribe"]
    assert (core.active, core.received, core.dropped) == (False, 3, 0)
    assert taken(core) == [b"1", b"2", b"3"]
    assert core.take(Deadline()) is None


def test_new_messages_are_dropped_when_too_many_wait(link: FakeLink) -> None:
    core = core_of(link, pending_messages=2)
    core.deliver(batch(1, 2, 3))
    core.deliver(batch(4))
    assert (core.dropped, core.received, core.pending) == (2, 4, 2)
    assert taken(core) == [b"1", b"2"]
    core.deliver(batch(5))
    assert taken(core) == [b"5"]


def test_new_messages_are_dropped_when_too_many_bytes_wait(link: FakeLink) -> None:
    core = core_of(link, pending_bytes=10)
    core.deliver(batch("aaaa", "bbbbbb", "c"))
    assert (core.dropped, core.pending_bytes) == (1, 10)
    assert taken(core) == [b"aaaa", b"bbbbbb"]
    assert core.pending_bytes == 0


def test_a_smaller_message_may_still_fit_where_a_larger_did_not(link: FakeLink) -> None:
    core = core_of(link, pending_bytes=10)
    core.deliver(batch("aaaaaaaa", "bbbbbb", "cc"))
    assert taken(core) == [b"aaaaaaaa", b"cc"]
    assert core.dropped == 1


def test_with_drop_old_the_newest_messages_are_kept(link: FakeLink) -> None:
    core = core_of(link, pending_messages=3, overflow="drop_old")
    core.deliver(batch(1, 2))
    core.deliver(batch(3, 4, 5))
    assert core.dropped == 2
    assert taken(core) == [b"3", b"4", b"5"]


def test_with_drop_old_as_many_go_as_the_bytes_demand(link: FakeLink) -> None:
    core = core_of(link, pending_bytes=10, overflow="drop_old")
    core.deliver(batch("aaa", "bbb", "ccc"))
    core.deliver(batch("ddddd"))
    assert (core.dropped, core.pending_bytes) == (2, 8)
    assert taken(core) == [b"ccc", b"ddddd"]


@pytest.mark.parametrize("overflow", ["drop_new", "drop_old"])
def test_a_message_that_can_never_fit_pushes_nothing_out(overflow: str, link: FakeLink) -> None:
    core = core_of(link, pending_bytes=10, overflow=overflow)
    core.deliver(batch("aaa", "bbb"))
    core.deliver(batch("x" * 11))
    assert core.dropped == 1
    assert taken(core) == [b"aaa", b"bbb"]


def test_with_error_the_subscription_fails_after_what_had_room(link: FakeLink) -> None:
    core = core_of(link, pending_messages=2, overflow="error")
    core.deliver(batch(1, 2, 3, 4))
    assert link.calls == ["unsubscribe"]
    assert core.dropped == 2
    assert taken(core) == [b"1", b"2"]
    for _ in range(2):
        with pytest.raises(SlowConsumerError, match="2 messages"):
            core.take(Deadline())


def test_with_error_nothing_is_delivered_from_behind_the_gap(link: FakeLink) -> None:
    core = core_of(link, pending_bytes=10, overflow="error")
    core.deliver(batch("aaaaaaaa", "bbbbbb", "cc"))
    assert core.dropped == 2
    assert taken(core) == [b"aaaaaaaa"]


def test_each_episode_of_loss_is_told_once(link: FakeLink) -> None:
    core = core_of(link, pending_messages=1)
    for _ in range(3):
        core.deliver(batch(1, 2))
    assert link.slow == [("a.*", 1)]
    taken(core)
    core.deliver(batch(3))
    assert len(link.slow) == 1
    core.deliver(batch(4))
    assert link.slow == [("a.*", 1), ("a.*", 6)]


def test_every_message_is_delivered_dropped_or_waiting(link: FakeLink) -> None:
    for overflow in ("drop_new", "drop_old"):
        core = core_of(link, pending_messages=7, pending_bytes=60, overflow=overflow)
        for n in range(100):
            core.deliver(batch(*["x" * (n * k % 23) for k in range(n % 6)]))
            if n % 3 == 0:
                for _ in range(min(4, core.pending)):
                    core.take(Deadline.after(0))
            assert core.received == core.delivered + core.dropped + core.pending
            assert core.pending <= 7
            assert core.pending_bytes == sum(len(item[2]) for _, item, _ in core._pending) <= 60
        assert core.dropped > 20


@pytest.mark.parametrize("name", ["max_messages", "pending_messages", "pending_bytes", "concurrency"])
def test_limits_are_whole_numbers_from_one_up(name: str, link: FakeLink) -> None:
    for value in (0, -1):
        with pytest.raises(InvalidArgument, match=name):
            core_of(link, **{name: value})
    for wrong in ("1", 1.5, True):
        with pytest.raises(TypeError, match=name):
            core_of(link, **{name: wrong})


def test_an_unknown_policy_is_refused(link: FakeLink) -> None:
    with pytest.raises(InvalidArgument, match="overflow='drop'"):
        core_of(link, overflow="drop")


# -- callbacks -------------------------------------------------------------------------------------------------------


def test_a_callback_gets_every_message_in_order(link: FakeLink, pool: WorkerPool) -> None:
    seen: list[bytes] = []
    core = core_of(link, callback=lambda message: seen.append(message.data), pool=pool)
    expected = [b"%d" % n for n in range(1000)]
    for start in range(0, 1000, 7):
        core.deliver(batch(*expected[start : start + 7]))
    assert core.wait_empty(Deadline.after(10))
    assert seen == expected
    assert core.delivered == 1000


def test_a_callback_never_runs_twice_at_once_unless_told(link: FakeLink, pool: WorkerPool) -> None:
    running, most = [0], [0]
    lock, pause = threading.Lock(), threading.Event()

    def callback(message: Message) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        pause.wait(0.002)
        with lock:
            running[0] -= 1

    core = core_of(link, callback=callback, pool=pool)
    for n in range(30):
        core.deliver(batch(n, n))
    assert core.wait_empty(Deadline.after(10))
    assert most == [1]


def test_a_callback_runs_as_often_at_once_as_told(link: FakeLink, pool: WorkerPool) -> None:
    barrier = threading.Barrier(3)
    core = core_of(link, callback=lambda message: barrier.wait(5), pool=pool, concurrency=3)
    core.deliver(batch(*range(9)))
    assert core.wait_empty(Deadline.after(10))
    assert (core.delivered, core.failed) == (9, 0)


def test_a_message_does_not_wait_behind_a_callback_that_blocks_if_another_may_run(
    link: FakeLink, pool: WorkerPool
) -> None:
    release, seen = threading.Event(), []

    def callback(message: Message) -> None:
        seen.append(message.data)
        release.wait(30)

    core = core_of(link, callback=callback, pool=pool, concurrency=3)
    try:
        for number in range(3):
            core.deliver(batch(number))
            eventually(lambda number=number: len(seen) == number + 1, 3)
    finally:
        release.set()
    assert core.wait_empty(Deadline.after(5))


def test_no_more_threads_run_a_callback_than_told(link: FakeLink, pool: WorkerPool) -> None:
    release, inside = threading.Event(), []

    def callback(message: Message) -> None:
        inside.append(message)
        release.wait(5)

    core = core_of(link, callback=callback, pool=pool, concurrency=2)
    core.deliver(batch(*range(5)))
    core.deliver(batch(*range(5)))
    eventually(lambda: len(inside) == 2)
    try:
        assert pool.threads == 2
        assert not core.wait_empty(Deadline.after(0.05))
        assert len(inside) == 2
    finally:
        release.set()
    assert core.wait_empty(Deadline.after(5))


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(3)], ids=repr)
def test_a_callback_that_raises_is_logged_and_gets_the_next_message(
    error: BaseException, link: FakeLink, pool: WorkerPool, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[bytes] = []

    def callback(message: Message) -> None:
        seen.append(message.data)
        if len(seen) == 1:
            raise error

    core = core_of(link, callback=callback, pool=pool)
    with caplog.at_level(logging.ERROR, "natsync.subscription"):
        core.deliver(batch(1))
        eventually(lambda: len(seen) == 1)
        core.deliver(batch(2))
        assert core.wait_empty(Deadline.after(5))
    assert (seen, core.failed) == ([b"1", b"2"], 1)
    assert "the callback for 'a.b' raised" in caplog.text
    assert "Traceback" in caplog.text


def test_a_busy_subscription_lets_others_of_the_pool_have_their_turn(link: FakeLink) -> None:
    pool = WorkerPool("natsync-test-worker", 1)
    order: list[str] = []
    started, go = threading.Event(), threading.Event()

    def hold(message: Message) -> None:
        order.append("busy")
        started.set()
        go.wait(5)

    busy = core_of(link, callback=hold, pool=pool)
    other = core_of(link, callback=lambda message: order.append("other"), pool=pool)
    busy.deliver(batch(*range(3 * subscription_module._TURN)))
    assert started.wait(5)
    other.deliver(batch(1))
    go.set()
    assert busy.wait_empty(Deadline.after(5))
    assert other.wait_empty(Deadline.after(5))
    assert pool.close(Deadline.after(5)) == []
    assert order.index("other") == subscription_module._TURN
    assert order.count("busy") == 3 * subscription_module._TURN


def test_waiting_until_all_is_handled_includes_the_callback_that_runs(link: FakeLink, pool: WorkerPool) -> None:
    release, inside = threading.Event(), threading.Event()

    def callback(message: Message) -> None:
        inside.set()
        release.wait(5)

    core = core_of(link, callback=callback, pool=pool)
    core.deliver(batch(1))
    assert inside.wait(5)
    assert core.pending == 0
    assert not core.wait_empty(Deadline.after(0.05))
    waiting = waiting_for(core, lambda: core.wait_empty(Deadline()))
    release.set()
    assert waiting.result() is True


def test_a_closed_pool_does_not_leave_the_subscription_waiting_for_it(link: FakeLink) -> None:
    pool = WorkerPool("natsync-test-worker", 1)
    pool.close(Deadline.after(1))
    core = core_of(link, callback=lambda message: None, pool=pool)
    core.deliver(batch(1))
    assert core._running == 0
    core.deactivate(forget=True)
    assert core.wait_empty(Deadline.after(0))


# -- what users hold -------------------------------------------------------------------------------------------------


def subscription_of(link: FakeLink, **options: Any) -> tuple[Subscription, SubscriptionCore]:
    core = core_of(link, **options)
    return Subscription(core, link, object()), core


def test_a_subscription_shows_its_numbers(link: FakeLink) -> None:
    subscription, core = subscription_of(link, pending_messages=2)
    core.deliver(batch(1, 2, 3))
    subscription.next()
    assert (subscription.subject, subscription.queue, subscription.active) == ("a.*", None, True)
    assert (subscription.pending, subscription.delivered, subscription.dropped) == (1, 1, 1)
    assert repr(subscription) == "<Subscription 'a.*': 1 pending, 1 dropped>"
    subscription.unsubscribe()


@pytest.mark.parametrize("raw", [b"workers", b"w\xff"])
def test_a_queue_group_is_shown_whatever_its_bytes(raw: bytes, link: FakeLink) -> None:
    subscription = Subscription(SubscriptionCore(link, b"a", raw), link, None)
    assert subscription.queue is not None
    assert subscription.queue.encode("utf-8", "surrogateescape") == raw
    assert "queue=" in repr(subscription)
    subscription.unsubscribe()


def test_iterating_ends_when_the_subscription_does(link: FakeLink) -> None:
    subscription, core = subscription_of(link, max_messages=2)
    core.deliver(batch(1, 2))
    assert [message.data for message in subscription] == [b"1", b"2"]
    with pytest.raises(ConnectionClosed, match="has ended"):
        subscription.next(0)


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_negative_timeout_is_refused(timeout: float, link: FakeLink) -> None:
    subscription, _ = subscription_of(link)
    with pytest.raises(InvalidArgument):
        subscription.next(timeout)
    with pytest.raises(InvalidArgument):
        subscription.drain(timeout)
    assert link.calls == []
    subscription.unsubscribe()


def test_the_messages_of_a_callback_cannot_be_taken_by_hand(link: FakeLink, pool: WorkerPool) -> None:
    subscription, _ = subscription_of(link, callback=lambda message: None, pool=pool)
    with pytest.raises(RuntimeError, match="callback"):
        subscription.next(0)
    with pytest.raises(RuntimeError, match="callback"):
        next(iter(subscription))


def test_unsubscribing_forgets_what_waits_and_may_be_repeated(link: FakeLink) -> None:
    subscription, core = subscription_of(link)
    core.deliver(batch(1, 2))
    subscription.unsubscribe()
    subscription.unsubscribe()
    assert (subscription.active, subscription.pending, subscription.dropped) == (False, 0, 2)
    assert list(subscription) == []


def test_leaving_the_block_unsubscribes(link: FakeLink) -> None:
    subscription, _ = subscription_of(link)
    with subscription:
        assert subscription.active
    assert not subscription.active
    assert link.calls == ["unsubscribe"]


def test_unsubscribing_wakes_who_iterates(link: FakeLink) -> None:
    subscription, core = subscription_of(link)
    waiting = waiting_for(core, lambda: list(subscription))
    subscription.unsubscribe()
    assert waiting.result() == []


def test_a_parents_subscription_is_refused_in_a_forked_child(link: FakeLink, monkeypatch: pytest.MonkeyPatch) -> None:
    subscription, _ = subscription_of(link)
    with monkeypatch.context() as patch:
        patch.setattr(subscription_module, "fork_generation", lambda: 99)
        with pytest.raises(ForkError):
            subscription.next(0)
        with pytest.raises(ForkError):
            next(iter(subscription))
    subscription.unsubscribe()


# -- drain -----------------------------------------------------------------------------------------------------------


def test_draining_stops_new_messages_and_takes_what_is_on_its_way(link: FakeLink) -> None:
    subscription, core = subscription_of(link)
    core.deliver(batch(1))
    link.on_confirm = lambda: core.deliver(batch(2))
    subscription.drain(5)
    assert link.calls == ["stop_intake", "confirm", "unsubscribe"]
    core.deliver(batch(3))
    assert [message.data for message in subscription] == [b"1", b"2"]


def test_draining_waits_for_the_callback(link: FakeLink, pool: WorkerPool) -> None:
    seen: list[bytes] = []
    pause = threading.Event()

    def callback(message: Message) -> None:
        pause.wait(0.02)
        seen.append(message.data)

    subscription, core = subscription_of(link, callback=callback, pool=pool)
    core.deliver(batch(1, 2, 3))
    subscription.drain(5)
    assert seen == [b"1", b"2", b"3"]


def test_a_callback_that_is_stuck_does_not_hold_up_drain_beyond_its_timeout(link: FakeLink, pool: WorkerPool) -> None:
    release = threading.Event()
    subscription, core = subscription_of(link, callback=lambda message: release.wait(5), pool=pool)
    core.deliver(batch(1, 2, 3))
    eventually(lambda: core.pending == 2)
    try:
        with pytest.raises(DrainTimeout, match="3 messages") as raised:  # the one in the callback included
            subscription.drain(0.05)
        assert raised.value.unhandled == {subscription.subject: 3}
        assert not subscription.active
    finally:
        release.set()
    assert core.wait_empty(Deadline.after(5))


def test_a_server_that_does_not_confirm_is_a_drain_timeout_and_ends_the_subscription(link: FakeLink) -> None:
    subscription, _ = subscription_of(link)
    link.confirmation = TimedOut("no PONG")
    with pytest.raises(DrainTimeout, match="did not confirm") as caught:
        subscription.drain(5)
    assert caught.value.__cause__ is link.confirmation
    assert not subscription.active


def test_draining_without_a_connection_ends_the_subscription_too(link: FakeLink) -> None:
    subscription, _ = subscription_of(link)
    link.confirmation = ConnectionClosed("closed")
    with pytest.raises(ConnectionClosed):
        subscription.drain(5)
    assert not subscription.active


# -- collection ------------------------------------------------------------------------------------------------------


def test_a_dropped_subscription_leaves_its_end_to_the_supervisor(link: FakeLink) -> None:
    subscription, core = subscription_of(link)
    core.deliver(batch(1))
    del subscription
    gc.collect()
    assert (link.calls, len(link.chores)) == ([], 1)  # a finalizer may run inside any lock
    link.chores[0]()
    assert (link.calls, core.active, core.pending) == (["unsubscribe"], False, 0)


@pytest.mark.parametrize("ended", [True, False])
def test_a_dropped_subscription_that_ended_or_has_a_callback_needs_no_end(
    ended: bool, link: FakeLink, pool: WorkerPool
) -> None:
    options: dict[str, Any] = {} if ended else {"callback": lambda message: None, "pool": pool}
    subscription, core = subscription_of(link, **options)
    if ended:
        core.deactivate()
    del subscription
    gc.collect()
    assert link.chores == []


def test_a_dropped_subscription_does_nothing_in_a_forked_child(link: FakeLink, monkeypatch: pytest.MonkeyPatch) -> None:
    subscription, _ = subscription_of(link)
    monkeypatch.setattr(subscription_module, "fork_generation", lambda: 99)
    del subscription
    gc.collect()
    assert link.chores == []


def test_a_subscription_keeps_its_client_alive(link: FakeLink) -> None:
    class Owner:
        pass

    owner = Owner()
    alive = weakref.ref(owner)
    subscription = Subscription(core_of(link), link, owner)
    del owner
    gc.collect()
    assert alive() is not None
    subscription.unsubscribe()
    del subscription
    gc.collect()
    assert alive() is None


def test_a_subscription_that_could_not_be_made_is_collected_quietly() -> None:
    Subscription.__del__(Subscription.__new__(Subscription))
