"""natsync.context: who is told that work should stop, when, by which thread, and what remains of it."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import socket
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from natsync import timers
from natsync.context import Context
from natsync.errors import Cancelled, DeadlineExceeded, InvalidArgument, NatsError, TimedOut
from natsync.testing import eventually
from thirdparty import ThirdParty

FAR = 3600.0
SOON = 0.05


@pytest.fixture(autouse=True)
def own_timers(monkeypatch: pytest.MonkeyPatch) -> Iterator[timers._Timers]:
    """Timers of the test's own; what a test leaves in them cannot hold up the next."""
    own = timers._Timers()
    monkeypatch.setattr(timers, "_timers", own)
    yield own
    with own._lock:
        own._heap.clear()
        own._changed.notify_all()
    eventually(lambda: own._thread is None)


def current_name() -> str:
    return threading.current_thread().name


# -- a context by itself ---------------------------------------------------------------------------------------------


def test_a_new_context_is_active_and_has_no_limit() -> None:
    ctx = Context()
    assert (ctx.cancelled, ctx.reason, ctx.deadline, ctx.remaining(), ctx.done.is_set()) == (
        False,
        None,
        None,
        None,
        False,
    )
    ctx.check()


def test_a_cancelled_context_says_so_in_every_way() -> None:
    ctx = Context()
    done = ctx.done
    ctx.cancel("the user left")
    assert (ctx.cancelled, ctx.reason, done.is_set(), ctx.wait(0)) == (True, "the user left", True, True)
    with pytest.raises(Cancelled, match="the user left") as caught:
        ctx.check()
    assert caught.value.reason == "the user left"


def test_a_context_without_a_reason_given_has_one() -> None:
    ctx = Context()
    ctx.cancel()
    assert ctx.reason == "cancelled"


def test_the_first_reason_counts() -> None:
    ctx = Context()
    ctx.cancel("first")
    ctx.cancel("second")
    assert ctx.reason == "first"


def test_done_asked_for_after_the_end_is_set() -> None:
    ctx = Context()
    ctx.cancel()
    assert ctx.done.is_set()
    assert ctx.done is ctx.done


def test_each_check_raises_an_error_of_its_own() -> None:
    """One shared by all threads would gather their tracebacks."""
    ctx = Context()
    ctx.cancel()
    errors = []
    for _ in range(2):
        with pytest.raises(Cancelled) as caught:
            ctx.check()
        errors.append(caught.value)
    assert errors[0] is not errors[1]


def test_leaving_the_block_cancels() -> None:
    with Context() as ctx:
        ctx.check()
    assert ctx.reason == "the block was left"


def test_an_error_leaves_the_block_as_it_is_and_cancels() -> None:
    ctx = Context()
    with pytest.raises(KeyError), ctx:
        raise KeyError
    assert ctx.cancelled


def test_a_reason_given_before_the_block_is_left_stays() -> None:
    with Context() as ctx:
        ctx.cancel("enough")
    assert ctx.reason == "enough"


def test_the_text_of_a_context_says_how_it_stands() -> None:
    assert repr(Context()) == "<Context active>"
    assert " s left" in repr(Context().with_timeout(FAR))
    ended = Context()
    ended.cancel("why")
    assert repr(ended) == "<Context ended: why>"


def test_waiting_ends_with_the_timeout() -> None:
    started = time.monotonic()
    assert not Context().wait(SOON)
    assert 0.9 * SOON <= time.monotonic() - started < 5


@pytest.mark.parametrize("timeout", [None, 10, float("inf"), 1e300])
def test_cancelling_wakes_who_waits(timeout: float | None) -> None:
    ctx = Context()
    outcomes: list[Any] = []

    def wait() -> None:
        try:
            outcomes.append(ctx.wait(timeout))
        except Exception as error:
            outcomes.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    eventually(lambda: ctx._event is not None or outcomes)
    ctx.cancel()
    thread.join(5)
    assert outcomes == [True]


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_negative_timeout_is_refused(timeout: float) -> None:
    with pytest.raises(InvalidArgument):
        Context().with_timeout(timeout)
    with pytest.raises(InvalidArgument):
        Context().wait(timeout)


@pytest.mark.parametrize("timeout", ["5", True])
def test_a_timeout_that_is_no_number_is_a_type_error(timeout: Any) -> None:
    with pytest.raises(TypeError):
        Context().with_timeout(timeout)
    with pytest.raises(TypeError):
        Context().wait(timeout)


# -- deadlines -------------------------------------------------------------------------------------------------------


def test_a_deadline_ends_a_context_by_itself() -> None:
    started = time.monotonic()
    ctx = Context().with_timeout(SOON)
    assert ctx.done.wait(5)  # the event alone: nobody asks
    assert time.monotonic() - started >= SOON
    assert (ctx.cancelled, ctx.reason, ctx.remaining()) == (True, "deadline exceeded", 0.0)


def test_an_exceeded_deadline_is_also_a_timeout() -> None:
    ctx = Context().with_timeout(0)
    with pytest.raises(DeadlineExceeded) as caught:
        ctx.check()
    for kind in (NatsError, TimedOut, TimeoutError):
        assert isinstance(caught.value, kind)


def test_no_time_at_all_has_passed_already() -> None:
    ctx = Context().with_timeout(0)
    assert (ctx.cancelled, ctx.remaining(), ctx.wait(0)) == (True, 0.0, True)


@pytest.fixture
def no_timer(own_timers: timers._Timers) -> Iterator[None]:
    """No timer thread: nothing comes round by itself."""
    own_timers._thread = threading.current_thread()
    yield
    own_timers._thread = None


SEE = [lambda ctx: ctx.cancelled, lambda ctx: ctx.reason == "deadline exceeded", lambda ctx: ctx.wait(0), repr]


@pytest.mark.usefixtures("no_timer")
@pytest.mark.parametrize("see", SEE, ids=["cancelled", "reason", "wait", "repr"])
def test_whoever_asks_sees_a_deadline_that_the_timer_has_not_come_round_to(see: Callable[[Context], Any]) -> None:
    ctx = Context().with_timeout(0)
    done = ctx.done
    assert see(ctx)
    assert done.is_set()


@pytest.mark.usefixtures("no_timer")
def test_a_check_sees_a_deadline_that_the_timer_has_not_come_round_to() -> None:
    with pytest.raises(DeadlineExceeded):
        Context().with_timeout(0).check()


def test_what_remains_counts_down() -> None:
    ctx = Context().with_timeout(FAR)
    first = ctx.remaining()
    assert first is not None
    assert FAR - 60 < first <= FAR
    eventually(lambda: (ctx.remaining() or 0) < first)


def test_a_deadline_is_a_time_of_the_monotonic_clock() -> None:
    at = time.monotonic() + FAR
    ctx = Context().with_deadline(at)
    assert ctx.deadline == at


def test_no_timeout_adds_no_limit() -> None:
    assert Context().with_timeout(None).deadline is None
    parent = Context().with_timeout(FAR)
    assert parent.with_timeout(None).deadline == parent.deadline


def test_a_child_never_outlasts_its_parent() -> None:
    parent = Context().with_timeout(10)
    assert parent.with_timeout(FAR).deadline == parent.deadline
    sooner = parent.with_timeout(5)
    assert sooner.deadline is not None
    assert parent.deadline is not None
    assert sooner.deadline < parent.deadline
    assert sooner.with_cancel().with_value("a", 1).deadline == sooner.deadline


def test_a_parents_deadline_ends_the_child_with_the_same_error() -> None:
    child = Context().with_timeout(SOON).with_timeout(FAR).with_cancel()
    assert child.done.wait(5)
    with pytest.raises(DeadlineExceeded):
        child.check()


def test_a_cancelled_context_leaves_no_timer(own_timers: timers._Timers) -> None:
    for _ in range(100):
        with Context().with_timeout(FAR):
            pass
    assert own_timers._heap == []
    eventually(lambda: own_timers._thread is None)


def test_a_child_with_its_parents_deadline_needs_no_timer(own_timers: timers._Timers) -> None:
    parent = Context().with_timeout(FAR)
    children = [
        parent.with_cancel(),
        parent.with_timeout(2 * FAR),
        parent.with_timeout(None),
        parent.with_value("a", 1),
    ]
    assert len(own_timers._heap) == 1
    assert len(children) == 4


def test_a_child_of_a_context_that_has_ended_needs_no_timer(own_timers: timers._Timers) -> None:
    parent = Context()
    parent.cancel()
    assert parent.with_timeout(FAR).cancelled
    assert own_timers._heap == []


def test_a_child_whose_parent_ends_while_it_is_made_leaves_no_timer(
    own_timers: timers._Timers, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = Context()
    schedule = timers.schedule

    def cut_in(at: float, callback: Callable[[], None]) -> timers.Timer:
        parent.cancel()  # as another thread may at this moment
        return schedule(at, callback)

    monkeypatch.setattr(timers, "schedule", cut_in)
    child = parent.with_timeout(60)
    assert child.cancelled
    assert own_timers._heap == []
    eventually(lambda: own_timers._thread is None)


def test_cancel_before_the_deadline_counts() -> None:
    ctx = Context().with_timeout(1.0)
    ctx.cancel("earlier")
    eventually(lambda: ctx.remaining() == 0)
    with pytest.raises(Cancelled, match="earlier"):
        ctx.check()


# -- parents and children --------------------------------------------------------------------------------------------


def test_cancelling_a_parent_ends_everything_below_with_its_reason() -> None:
    parent = Context()
    child = parent.with_cancel()
    grandchildren = [child.with_timeout(FAR), child.with_value("a", 1), child.with_deadline(time.monotonic() + FAR)]
    events = [one.done for one in (child, *grandchildren)]
    parent.cancel("the end")
    assert [one.reason for one in (child, *grandchildren)] == ["the end"] * 4
    assert all(event.is_set() for event in events)


def test_cancelling_a_child_leaves_its_parent_and_siblings_alone() -> None:
    parent = Context()
    child, sibling = parent.with_cancel(), parent.with_cancel()
    child.cancel("enough")
    assert (child.cancelled, parent.cancelled, sibling.cancelled) == (True, False, False)


def test_a_childs_deadline_leaves_its_parent_alone() -> None:
    parent = Context()
    assert parent.with_timeout(0).wait(5)
    assert not parent.cancelled


@pytest.mark.parametrize(
    "derive", [Context.with_cancel, lambda ctx: ctx.with_timeout(FAR), lambda ctx: ctx.with_value(1, 2)]
)
def test_a_child_of_a_context_that_has_ended_has_ended(derive: Callable[[Context], Context]) -> None:
    parent = Context()
    parent.cancel("before")
    child = derive(parent)
    assert (child.cancelled, child.reason, child.done.is_set()) == (True, "before", True)


def test_a_child_of_an_exceeded_deadline_is_exceeded_too() -> None:
    parent = Context().with_timeout(0)
    assert parent.wait(5)
    with pytest.raises(DeadlineExceeded):
        parent.with_cancel().check()


def test_a_child_keeps_its_parent() -> None:
    child = Context().with_timeout(SOON).with_cancel()
    gc.collect()
    assert child.done.wait(5)


def test_a_long_line_of_descendants_ends_as_one() -> None:
    top = ctx = Context()
    for _ in range(3_000):  # as a loop that derives anew from its own context would make
        ctx = ctx.with_value("a", 1)
    done = ctx.done
    top.cancel("the end")
    assert done.is_set()
    assert ctx.reason == "the end"


def cost_of_ending(descendants: int, derive: Callable[[Context, Context], Context]) -> float:
    """Seconds of this thread, the best of three."""
    costs = []
    for _ in range(3):
        top = last = Context()
        line = [last := derive(top, last) for _ in range(descendants)]
        started = time.thread_time()
        top.cancel()
        costs.append(time.thread_time() - started)
        assert line[-1].cancelled
    return min(costs)


@pytest.mark.parametrize("derive", [lambda top, last: last.with_cancel(), lambda top, last: top.with_cancel()])
def test_the_cost_of_ending_grows_with_the_number_of_descendants_and_no_faster(
    derive: Callable[[Context, Context], Context],
) -> None:
    few, many = cost_of_ending(200, derive), cost_of_ending(1600, derive)
    assert many < 25 * few  # 8 times the work; were it to grow with the square, 64 times


# -- values ----------------------------------------------------------------------------------------------------------


def test_a_value_is_seen_below_and_nowhere_else() -> None:
    parent = Context()
    child = parent.with_value("user", "ada")
    assert (child.value("user"), child.with_cancel().with_timeout(FAR).value("user")) == ("ada", "ada")
    assert (parent.value("user"), parent.with_cancel().value("user", "nobody")) == (None, "nobody")


def test_the_nearest_value_counts_even_if_it_is_none() -> None:
    ctx = Context().with_value("a", 1).with_value("b", 2).with_value("a", None)
    assert (ctx.value("a", "default"), ctx.value("b")) == (None, 2)


# -- callbacks -------------------------------------------------------------------------------------------------------


def test_callbacks_run_once_in_the_order_in_which_they_were_registered() -> None:
    ctx = Context()
    ran: list[int] = []
    for number in range(5):
        ctx.on_cancel(lambda number=number: ran.append(number))
    ctx.cancel()
    ctx.cancel()
    assert ran == [0, 1, 2, 3, 4]


def test_the_same_function_may_be_registered_twice() -> None:
    ctx = Context()
    ran: list[int] = []

    def callback() -> None:
        ran.append(1)

    remove = ctx.on_cancel(callback)
    ctx.on_cancel(callback)
    remove()
    ctx.cancel()
    assert ran == [1]


def test_callbacks_of_cancel_have_run_in_the_cancelling_thread_when_it_returns() -> None:
    ctx = Context()
    ran: list[str] = []
    ctx.with_cancel().on_cancel(lambda: ran.append(current_name()))
    ctx.on_cancel(lambda: ran.append(current_name()))
    thread = threading.Thread(target=ctx.cancel, name="the canceller")
    thread.start()
    thread.join(5)
    assert ran == ["the canceller", "the canceller"]


def test_a_callback_sees_the_context_ended() -> None:
    ctx = Context()
    child = ctx.with_cancel()
    seen: list[tuple[bool, bool]] = []
    ctx.on_cancel(lambda: seen.append((ctx.done.is_set(), child.done.is_set())))
    ctx.cancel()
    assert seen == [(True, True)]


def test_a_parents_callbacks_run_before_those_of_its_children() -> None:
    parent = Context()
    child = parent.with_cancel()
    ran: list[str] = []
    child.on_cancel(lambda: ran.append("child"))
    parent.on_cancel(lambda: ran.append("parent"))
    parent.cancel()
    assert ran == ["parent", "child"]


def test_a_callback_that_was_taken_back_does_not_run() -> None:
    ctx = Context()
    ran: list[str] = []
    remove = ctx.on_cancel(lambda: ran.append("removed"))
    ctx.on_cancel(lambda: ran.append("kept"))
    remove()
    remove()
    ctx.cancel()
    remove()
    assert ran == ["kept"]


def test_a_callback_registered_late_runs_at_once_in_its_own_thread() -> None:
    ctx = Context()
    ctx.cancel()
    ran: list[str] = []
    remove = ctx.on_cancel(lambda: ran.append(current_name()))
    assert ran == [current_name()]
    remove()


def test_a_late_callback_that_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    ctx = Context()
    ctx.cancel()
    with caplog.at_level(logging.ERROR, "natsync"):
        ctx.on_cancel(lambda: 1 / 0)
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(1)], ids=repr)
def test_a_callback_that_raises_is_logged_and_the_others_run(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    ctx = Context()
    ran: list[str] = []

    def boom() -> None:
        raise error

    ctx.on_cancel(lambda: ran.append("before"))
    ctx.on_cancel(boom)
    ctx.on_end(boom)
    ctx.on_cancel(lambda: ran.append("behind"))
    ctx.with_cancel().on_cancel(lambda: ran.append("child"))
    with caplog.at_level(logging.ERROR, "natsync"):
        ctx.cancel()
    assert ran == ["before", "behind", "child"]
    assert caplog.text.count(repr(error)[:8]) >= 2


def test_a_callback_may_use_the_context_that_ends() -> None:
    ctx = Context()
    seen: list[Any] = []

    def callback() -> None:
        ctx.cancel("again")
        seen.append((ctx.reason, ctx.with_cancel().reason))
        ctx.on_cancel(lambda: seen.append("nested"))

    ctx.on_cancel(callback)
    ctx.cancel("why")
    assert seen == [("why", "why"), "nested"]


def test_callbacks_of_a_deadline_never_run_on_the_timer_thread() -> None:
    ran: list[str] = []
    contexts = [Context().with_timeout(1.0) for _ in range(3)]
    for ctx in contexts:
        ctx.on_cancel(lambda: ran.append(current_name()))
        ctx.with_cancel().on_cancel(lambda: ran.append(current_name()))
    eventually(lambda: len(ran) == 6)
    assert set(ran) == {"natsync-callbacks-worker"}


def test_a_callback_of_a_deadline_that_blocks_does_not_hold_up_other_deadlines() -> None:
    release = threading.Event()
    blocked, other = Context().with_timeout(0.5), Context().with_timeout(1.0)
    blocked.on_cancel(lambda: release.wait(30))
    try:
        assert other.done.wait(5)
    finally:
        release.set()


@pytest.mark.usefixtures("no_timer")
def test_who_only_asks_does_not_run_the_callbacks_of_a_deadline_itself() -> None:
    ran: list[str] = []
    ctx = Context().with_timeout(0)
    ctx.on_cancel(lambda: ran.append(current_name()))
    assert ctx.cancelled
    eventually(lambda: ran)
    assert ran == ["natsync-callbacks-worker"]


def test_the_librarys_own_callbacks_run_in_whichever_thread_ends_it() -> None:
    ran: list[str] = []
    Context().with_timeout(0.5).on_end(lambda: ran.append(current_name()))
    gc.collect()
    eventually(lambda: ran)
    assert ran == ["natsync-timer"]


def cancel_at_once(contexts: list[Context]) -> None:
    barrier = threading.Barrier(len(contexts))
    threads = [threading.Thread(target=lambda one=one: (barrier.wait(5), one.cancel())) for one in contexts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)


def test_many_threads_that_cancel_at_once_run_callbacks_once() -> None:
    for _ in range(20):
        ctx = Context()
        leaves = [ctx.with_cancel().with_cancel() for _ in range(5)]
        ran: list[int] = []
        for number, one in enumerate([ctx, *leaves]):
            one.on_cancel(functools.partial(ran.append, number))
        cancel_at_once([ctx, ctx, ctx, ctx, *leaves])
        assert sorted(ran) == [0, 1, 2, 3, 4, 5]


def test_a_callback_registered_while_another_thread_cancels_runs_once() -> None:
    for _ in range(100):
        ctx = Context()
        ran: list[int] = []
        barrier = threading.Barrier(2)
        canceller = threading.Thread(target=lambda ctx=ctx, barrier=barrier: (barrier.wait(5), ctx.cancel()))
        canceller.start()
        barrier.wait(5)
        child = ctx.with_cancel()
        child.on_cancel(lambda ran=ran: ran.append(1))
        canceller.join(5)
        assert ran == [1]
        assert child.cancelled


# -- what is kept, and what is not -----------------------------------------------------------------------------------


def test_who_holds_only_the_event_is_still_told() -> None:
    """Of a context with a deadline, and of the child of one that is cancelled."""
    parent = Context()
    timed, child = Context().with_timeout(SOON).done, parent.with_cancel().done
    gc.collect()
    parent.cancel()
    assert child.is_set()
    assert timed.wait(5)


def test_an_event_that_is_set_keeps_nothing_alive() -> None:
    ctx = Context()
    done, alive = ctx.done, weakref.ref(ctx)
    ctx.cancel()
    del ctx
    gc.collect()
    assert done.is_set()
    assert alive() is None


def test_callbacks_run_even_if_nobody_holds_the_child_any_more() -> None:
    parent, ran = Context(), []
    parent.with_cancel().with_value("a", 1).with_cancel().on_cancel(lambda: ran.append("far below"))
    gc.collect()
    parent.cancel()
    assert ran == ["far below"]


def test_callbacks_of_a_deadline_run_even_if_nobody_holds_the_context_any_more() -> None:
    ran: list[str] = []
    Context().with_timeout(SOON).on_cancel(lambda: ran.append("late"))
    gc.collect()
    eventually(lambda: ran)


def test_callbacks_are_let_go_once_they_have_run() -> None:
    class Callback:
        def __call__(self) -> None:
            pass

    ctx, callback = Context(), Callback()
    alive = weakref.ref(callback)
    ctx.on_cancel(callback)
    ctx.cancel()
    del callback
    gc.collect()
    assert alive() is None


def held_by(ctx: Context) -> tuple[int, int]:
    gc.collect()
    return len(ctx._pinned), len(ctx._children or ())


@pytest.mark.parametrize(
    "derive",
    [Context.with_cancel, lambda ctx: ctx.with_value("a", 1), lambda ctx: ctx.with_timeout(FAR)],
    ids=["with_cancel", "with_value", "with_timeout"],
)
def test_a_child_that_is_dropped_leaves_nothing_in_its_parent(derive: Callable[[Context], Context]) -> None:
    parent = Context()
    child = derive(parent)
    alive = weakref.ref(child)
    del child
    assert held_by(parent) == (0, 0)
    assert alive() is None


def test_a_context_whose_callbacks_were_taken_back_is_not_kept_by_its_deadline() -> None:
    ctx = Context().with_timeout(FAR)
    removes = [ctx.on_cancel(lambda: None), ctx.with_cancel().on_cancel(lambda: None)]
    alive = weakref.ref(ctx)
    for remove in removes:
        remove()
    del ctx, removes, remove
    gc.collect()
    assert alive() is None


def test_a_child_that_ended_leaves_nothing_in_its_parent() -> None:
    parent = Context()
    children = [parent.with_timeout(0), parent.with_cancel()]
    children[1].on_cancel(lambda: None)
    children[1].cancel()
    assert children[0].wait(5)
    eventually(lambda: held_by(parent) == (0, 0))


def test_a_callback_that_was_taken_back_leaves_nothing_in_any_ancestor() -> None:
    top = Context()
    for _ in range(3):
        middle = top.with_value("a", 1)
        remove = middle.with_cancel().on_cancel(lambda: None)
        remove()
    del middle, remove
    assert held_by(top) == (0, 0)


def test_a_descendant_that_ended_leaves_nothing_in_any_ancestor() -> None:
    top = Context()
    for _ in range(3):
        middle = top.with_value("a", 1)
        child = middle.with_cancel()
        child.on_cancel(lambda: None)
        child.cancel()
    del middle, child
    assert held_by(top) == (0, 0)


def test_a_callback_that_stays_is_not_lost_when_another_is_taken_back() -> None:
    top, ran = Context(), []
    middle = top.with_cancel()
    remove = middle.on_cancel(lambda: ran.append("removed"))
    middle.with_cancel().on_cancel(lambda: ran.append("below"))
    remove()
    del middle, remove
    gc.collect()
    top.cancel()
    assert ran == ["below"]


class Interposed:
    """A lock that has something happen just before it is taken the first time: a thread switch at the worst moment."""

    def __init__(self, lock: Any, happens: Callable[[], object]) -> None:
        self._lock = lock
        self._happens: Callable[[], object] | None = happens

    def __enter__(self) -> None:
        happens, self._happens = self._happens, None
        if happens is not None:
            happens()
        self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()


def test_a_callback_registered_as_the_last_other_one_is_taken_back_is_not_lost() -> None:
    parent, ran = Context(), []
    held = [parent.with_cancel()]
    remove = held[0].on_cancel(lambda: None)

    def register() -> None:
        parent._lock = plain
        held.pop().on_cancel(lambda: ran.append(1))

    plain = parent._lock
    parent._lock = Interposed(plain, register)  # type: ignore[assignment]
    remove()
    del remove
    gc.collect()
    parent.cancel()
    assert ran == [1]


def test_a_child_that_ends_as_its_callback_is_registered_leaves_nothing_in_its_parent() -> None:
    parent, ran = Context(), []
    held = [parent.with_cancel()]
    plain = parent._lock

    def end() -> None:
        parent._lock = plain
        held[0].cancel()

    parent._lock = Interposed(plain, end)  # type: ignore[assignment]
    held[0].on_cancel(lambda: ran.append(1))
    held.clear()
    assert ran == [1]
    assert held_by(parent) == (0, 0)


# -- closing() -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def third_party() -> Iterator[ThirdParty]:
    with ThirdParty() as party:
        yield party


def lines_of(response: Any) -> Iterator[bytes]:
    return response.iter_lines(chunk_size=1) if isinstance(response, requests.Response) else iter(response)


OPENERS = pytest.mark.parametrize(
    "open_url",
    [lambda url: requests.get(url, stream=True, timeout=30), lambda url: urllib.request.urlopen(url, timeout=30)],
    ids=["requests", "urllib"],
)


@OPENERS
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_the_end_of_the_context_stops_a_blocked_read(
    open_url: Callable[[str], Any], how: str, third_party: ThirdParty
) -> None:
    ctx = Context().with_timeout(2.0 if how == "deadline" else FAR)
    lines: list[bytes] = []
    ended: list[float] = []

    def work() -> None:
        with contextlib.suppress(Exception), ctx.closing(open_url(f"{third_party.url}/hang")) as response:
            for line in lines_of(response):
                lines.append(line.strip())
        ended.append(time.monotonic())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    eventually(lambda: lines)
    asked = time.monotonic()
    if how == "cancel":
        ctx.cancel()
    thread.join(10)
    assert lines == [b'{"piece": 0}']
    assert ended
    assert ended[0] - asked < 5


def test_a_blocked_recv_of_a_plain_socket_returns() -> None:
    ours, theirs = socket.socketpair()
    ctx, received = Context(), []

    def work() -> None:
        with ctx.closing(ours) as sock, sock.makefile("rb") as file:
            received.append(file.readline())
            received.append(file.readline())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    with theirs:
        theirs.sendall(b"one\n")
        eventually(lambda: received)
        ctx.cancel()
        thread.join(5)
    assert received == [b"one\n", b""]


def test_a_context_that_has_ended_lets_no_read_begin() -> None:
    ours, theirs = socket.socketpair()
    ctx = Context()
    ctx.cancel()
    with theirs, ctx.closing(ours) as sock:
        assert sock.recv(1) == b""


def test_leaving_the_block_closes_and_forgets() -> None:
    closed: list[str] = []
    ctx = Context()
    with ctx.closing(SimpleNamespace(close=lambda: closed.append("closed"))):
        assert closed == []
    assert closed == ["closed"]
    ctx.cancel()
    assert closed == ["closed"]


def test_an_error_in_the_block_closes_and_comes_out() -> None:
    closed: list[str] = []
    with pytest.raises(KeyError), Context().closing(SimpleNamespace(close=lambda: closed.append("closed"))):
        raise KeyError
    assert closed == ["closed"]


def test_an_object_that_cannot_be_closed_is_fine() -> None:
    thing = object()
    with Context().closing(thing) as given:
        assert given is thing


def test_what_closing_raises_at_the_end_of_the_context_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    ctx, ran = Context(), []
    thing = SimpleNamespace(cancel=lambda: 1 / 0)
    with caplog.at_level(logging.ERROR, "natsync"), ctx.closing(thing):
        ctx.on_cancel(lambda: ran.append(1))
        ctx.cancel()
    assert "ZeroDivisionError" in caplog.text
    assert ran == [1]


def test_a_third_party_whose_close_blocks_does_not_hold_up_other_deadlines() -> None:
    """Of an object without a socket close() is called: somebody else's code, which may wait for its own lock."""
    release = threading.Event()
    other = Context().with_timeout(1.0)
    ctx = Context().with_timeout(0.5)
    thing = SimpleNamespace(cancel=lambda: release.wait(30))
    with ctx.closing(thing):
        try:
            assert other.done.wait(10)
        finally:
            release.set()
