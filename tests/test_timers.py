"""natsync.timers: one thread that sleeps until something is due, and is gone when nothing is."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from natsync import timers
from natsync.concurrency import SafeCondition
from natsync.testing import eventually
from natsync.timers import Alarm, schedule, schedule_after, settle

FAR = 3600.0


def timer_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "natsync-timer"]


@contextlib.contextmanager
def kept_busy() -> Iterator[None]:
    """The timer's thread is at something else meanwhile: nothing becomes due before all is arranged."""
    gate = threading.Event()
    schedule_after(0, lambda: gate.wait(10))
    try:
        yield
    finally:
        gate.set()


def asleep(one: timers._Timers) -> bool:
    """Whether the thread sleeps until something is due."""
    return len(one._changed._turns) > 0


@pytest.fixture(autouse=True)
def own_timers(monkeypatch: pytest.MonkeyPatch) -> Iterator[timers._Timers]:
    """Timers that nobody else uses, to count what they hold; a test that fails leaves no thread to the next."""
    own = timers._Timers()
    monkeypatch.setattr(timers, "_timers", own)
    yield own
    with own._lock:
        own._heap.clear()
        own._changed.notify_all()
    eventually(lambda: not timer_threads())


@pytest.fixture
def ran() -> list[Any]:
    """What callbacks append to."""
    return []


def test_a_callback_runs_on_the_timer_thread_once_it_is_due(ran: list[Any]) -> None:
    due = time.monotonic() + 0.05
    schedule(due, lambda: ran.append((time.monotonic(), threading.current_thread().name)))
    eventually(lambda: ran)
    at, name = ran[0]
    assert at >= due
    assert name == "natsync-timer"


def test_what_is_overdue_runs_at_once(ran: list[Any]) -> None:
    schedule(time.monotonic() - 5, lambda: ran.append("overdue"))
    eventually(lambda: ran == ["overdue"])


def test_callbacks_run_in_the_order_of_their_times_whatever_the_order_of_scheduling(ran: list[Any]) -> None:
    start = time.monotonic() + 0.1
    with kept_busy():
        for number in (3, 1, 4, 0, 2):
            schedule(start + number / 1000, lambda number=number: ran.append(number))
    eventually(lambda: len(ran) == 5)
    assert ran == [0, 1, 2, 3, 4]


def test_callbacks_of_one_time_run_in_the_order_of_scheduling(ran: list[Any]) -> None:
    at = time.monotonic() + 0.1
    with kept_busy():
        for number in range(20):
            schedule(at, lambda number=number: ran.append(number))
    eventually(lambda: len(ran) == 20)
    assert ran == list(range(20))


def test_an_earlier_time_wakes_a_thread_that_sleeps_for_a_later_one(ran: list[Any]) -> None:
    late = schedule_after(FAR, lambda: ran.append("late"))
    try:
        schedule_after(0.02, lambda: ran.append("early"))
        eventually(lambda: ran == ["early"], 5)
    finally:
        late.cancel()


def test_a_cancelled_callback_does_not_run(ran: list[Any]) -> None:
    with kept_busy():
        cancelled = schedule_after(0.03, lambda: ran.append("cancelled"))
        schedule_after(0.06, lambda: ran.append("kept"))
        cancelled.cancel()
        cancelled.cancel()
    eventually(lambda: "kept" in ran)
    assert ran == ["kept"]


def test_cancelling_twice_or_too_late_does_not_count(ran: list[Any], own_timers: timers._Timers) -> None:
    done = schedule_after(0, lambda: ran.append("done"))
    eventually(lambda: ran)
    handles = [schedule_after(FAR, lambda: None) for _ in range(10)]
    for _ in range(3):
        done.cancel()
    assert own_timers._cancelled == 0
    for _ in range(3):
        handles[4].cancel()
    assert own_timers._cancelled == 1
    for handle in handles:
        handle.cancel()
    assert own_timers._heap == []


def test_what_remains_of_many_runs_in_order_after_the_others_were_cancelled(ran: list[Any]) -> None:
    start = time.monotonic() + 0.1
    numbers = [(n * 137) % 400 for n in range(400)]
    with kept_busy():
        handles = {n: schedule(start + n / 10_000, lambda n=n: ran.append(n)) for n in numbers}
        for n in numbers:
            if n % 4:
                handles[n].cancel()
    eventually(lambda: len(ran) == 100)
    assert ran == list(range(0, 400, 4))


def test_a_callback_may_schedule_and_cancel(ran: list[Any]) -> None:
    def first() -> None:
        other = schedule_after(0.05, lambda: ran.append("other"))
        schedule_after(0.1, lambda: ran.append("second"))
        other.cancel()

    schedule_after(0, first)
    eventually(lambda: ran == ["second"])


def test_a_callback_that_raises_is_logged_and_others_run(ran: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    def boom() -> None:
        raise RuntimeError("boom")

    with caplog.at_level(logging.ERROR, "natsync.timers"):
        schedule_after(0, boom)
        schedule_after(0.02, lambda: ran.append("next"))
        eventually(lambda: ran == ["next"])
    assert "RuntimeError: boom" in caplog.text


# -- the thread ------------------------------------------------------------------------------------------------------


def test_there_is_one_thread_for_all() -> None:
    handles = [schedule_after(FAR, lambda: None) for _ in range(50)]
    assert len(timer_threads()) == 1
    for handle in handles:
        handle.cancel()


def test_the_thread_does_not_keep_the_interpreter() -> None:
    handle = schedule_after(FAR, lambda: None)
    assert timer_threads()[0].daemon
    handle.cancel()


def test_the_thread_is_gone_when_the_last_callback_has_run(ran: list[Any]) -> None:
    schedule_after(0.02, lambda: ran.append(1))
    eventually(lambda: ran)
    eventually(lambda: not timer_threads())


@pytest.mark.parametrize("count", [1, 3, 200])
def test_the_thread_is_gone_when_all_is_cancelled(count: int, own_timers: timers._Timers) -> None:
    handles = [schedule_after(FAR, lambda: None) for _ in range(count)]
    eventually(lambda: asleep(own_timers))
    for handle in handles:
        handle.cancel()
    settle()
    eventually(lambda: not timer_threads())


def test_settling_does_not_wait_for_what_is_still_scheduled() -> None:
    handle = schedule_after(FAR, lambda: None)
    started = time.monotonic()
    settle()
    assert time.monotonic() - started < 0.9
    assert timer_threads()
    handle.cancel()


def test_settling_on_the_timer_thread_does_not_wait_for_itself(ran: list[Any]) -> None:
    def callback() -> None:
        started = time.monotonic()
        settle()
        ran.append(time.monotonic() - started)

    schedule_after(0, callback)
    eventually(lambda: ran)
    assert ran[0] < 0.5


def test_a_new_thread_comes_when_the_old_one_has_gone(ran: list[Any]) -> None:
    for number in range(20):
        schedule_after(0, lambda number=number: ran.append(number))
        eventually(lambda number=number: number in ran)
        if number % 2:
            settle()
    assert ran == list(range(20))


def test_nothing_is_lost_when_it_is_scheduled_as_the_thread_leaves(ran: list[Any]) -> None:
    """Each round meets the thread on its way out, at another point of it."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for number in range(300):
            due = threading.Event()
            schedule_after(0, lambda number=number, due=due: (ran.append(number), due.set()))
            assert due.wait(5), number
    finally:
        sys.setswitchinterval(interval)
    assert ran == list(range(300))


def test_a_thread_that_cannot_be_started_is_started_at_the_next_chance(
    monkeypatch: pytest.MonkeyPatch, ran: list[Any]
) -> None:
    """The system may refuse a thread for a moment; deadlines must not be dead from then on."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with contextlib.suppress(RuntimeError):
            schedule_after(FAR, lambda: None).cancel()
    schedule_after(0, lambda: ran.append(1))
    eventually(lambda: ran)


# -- cost ------------------------------------------------------------------------------------------------------------


def test_the_thread_sleeps_and_does_not_poll(monkeypatch: pytest.MonkeyPatch, ran: list[Any]) -> None:
    sleeps: list[float | None] = []
    wait = SafeCondition.wait

    def counting(condition: SafeCondition, timeout: float | None = None) -> bool:
        if threading.current_thread().name == "natsync-timer":
            sleeps.append(timeout)
        return wait(condition, timeout)

    monkeypatch.setattr(SafeCondition, "wait", counting)
    far = schedule_after(FAR, lambda: None)
    eventually(lambda: len(sleeps) == 1)
    schedule_after(1.5, lambda: ran.append(1))
    eventually(lambda: ran, 15)
    eventually(lambda: len(sleeps) >= 3)  # for the far one, for the near one, for the far one again
    far.cancel()
    settle()
    assert len(sleeps) == 3
    assert [timeout is not None and timeout > 3000 for timeout in sleeps] == [True, False, True]


def test_a_later_time_does_not_wake_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    first = schedule_after(FAR, lambda: None)
    woken: list[int] = []
    monkeypatch.setattr(SafeCondition, "notify", lambda condition, n=1: woken.append(n))
    others = [schedule_after(FAR + n, lambda: None) for n in range(1, 20)]
    assert woken == []
    monkeypatch.undo()
    for handle in (first, *others):
        handle.cancel()


def test_ten_thousand_cancelled_timers_leave_nothing(own_timers: timers._Timers) -> None:
    keep = schedule_after(FAR, lambda: None)
    callbacks = [Callback() for _ in range(10_000)]
    alive = [weakref.ref(callback) for callback in callbacks]
    handles = [schedule_after(FAR + n, callback) for n, callback in enumerate(callbacks)]
    for handle in handles:
        handle.cancel()
    del callbacks, handles, handle
    gc.collect()
    assert sum(one() is not None for one in alive) == 0
    assert len(own_timers._heap) <= 1 + timers._SWEEP_FROM
    keep.cancel()
    assert own_timers._heap == []


def test_scheduling_and_cancelling_one_by_one_does_not_grow(own_timers: timers._Timers) -> None:
    keep = [schedule_after(FAR, lambda: None) for _ in range(10)]
    largest = 0
    for _ in range(5_000):
        schedule_after(FAR, lambda: None).cancel()
        largest = max(largest, len(own_timers._heap))
    assert largest <= 2 * timers._SWEEP_FROM + len(keep)
    for handle in keep:
        handle.cancel()
    assert own_timers._heap == []


def test_cancelled_ones_that_come_due_are_passed_over(own_timers: timers._Timers, ran: list[Any]) -> None:
    at = time.monotonic() + 0.03
    with kept_busy():
        handles = [schedule(at + n / 1000, lambda n=n: ran.append(n)) for n in range(20)]
        for handle in handles[:19:2]:
            handle.cancel()
    eventually(lambda: len(ran) == 10)
    assert ran == list(range(1, 20, 2))
    eventually(lambda: own_timers._thread is None)
    assert (own_timers._heap, own_timers._cancelled) == ([], 0)


@pytest.mark.parametrize("seconds", [float("inf"), 1e300, threading.TIMEOUT_MAX * 2])
def test_a_time_in_the_far_future_is_no_error(seconds: float, own_timers: timers._Timers, ran: list[Any]) -> None:
    far = schedule_after(seconds, lambda: None)
    eventually(lambda: asleep(own_timers))
    schedule_after(0.01, lambda: ran.append("near"))
    eventually(lambda: ran == ["near"])
    assert len(timer_threads()) == 1
    far.cancel()


class Callback:
    """A callback that can be watched."""

    def __call__(self) -> None:
        pass


def test_the_sleeping_thread_keeps_nothing_of_its_last_callback_alive(own_timers: timers._Timers) -> None:
    far = schedule_after(FAR, lambda: None)
    callback = Callback()
    alive = weakref.ref(callback)
    schedule_after(0, callback)
    del callback
    eventually(lambda: len(own_timers._heap) == 1)
    gc.collect()
    eventually(lambda: alive() is None)
    far.cancel()


def test_what_a_timer_keeps_lives_until_it_is_cancelled() -> None:
    handle, kept = schedule_after(FAR, lambda: None), Callback()
    alive = weakref.ref(kept)
    handle.keep = kept
    del kept
    gc.collect()
    assert alive() is not None
    handle.cancel()
    gc.collect()
    assert alive() is None


def test_many_threads_may_schedule_and_cancel_at_once(own_timers: timers._Timers, ran: list[Any]) -> None:
    def work(seed: int) -> None:
        for number in range(200):
            handle = schedule_after(0.001 * (number % 7), lambda: ran.append(1))
            if (seed + number) % 2:
                handle.cancel()
            else:
                kept.append(1)

    kept: list[int] = []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    eventually(lambda: own_timers._thread is None)
    assert (own_timers._heap, own_timers._cancelled) == ([], 0)
    assert len(kept) == 800
    assert 800 <= len(ran) <= 1600  # a cancel may come too late for one that is due at once


# -- alarms ----------------------------------------------------------------------------------------------------------


def test_an_alarm_rings_once_when_its_time_has_come(ran: list[Any]) -> None:
    due = time.monotonic() + 0.05
    Alarm(lambda: ran.append(time.monotonic())).set(due)
    marker = threading.Event()
    schedule(due + 0.05, marker.set)
    assert marker.wait(5)
    (at,) = ran
    assert at >= due


def test_an_alarm_that_is_set_later_rings_then_only(ran: list[Any]) -> None:
    alarm = Alarm(lambda: ran.append(time.monotonic()))
    start = time.monotonic()
    with kept_busy():
        alarm.set(start + 0.02)
        alarm.set(start + 0.15)
    eventually(lambda: ran)
    assert ran[0] >= start + 0.15
    assert len(ran) == 1


def test_an_alarm_that_is_set_sooner_rings_sooner_and_not_again(ran: list[Any], own_timers: timers._Timers) -> None:
    alarm = Alarm(lambda: ran.append("rang"))
    alarm.set(time.monotonic() + FAR)
    alarm.set(time.monotonic() + 0.02)
    eventually(lambda: ran == ["rang"])
    eventually(lambda: own_timers._thread is None)  # nothing is left of the first


def test_setting_by_a_later_time_leaves_an_alarm_as_it_is(ran: list[Any]) -> None:
    alarm = Alarm(lambda: ran.append("rang"))
    alarm.set(time.monotonic() + 0.02)
    alarm.set_by(time.monotonic() + FAR)
    eventually(lambda: ran == ["rang"])


def test_setting_by_a_sooner_time_brings_an_alarm_forward(ran: list[Any]) -> None:
    alarm = Alarm(lambda: ran.append("rang"))
    alarm.set(time.monotonic() + FAR)
    alarm.set_by(time.monotonic() + 0.02)
    eventually(lambda: ran == ["rang"])


def test_setting_by_a_time_sets_an_alarm_that_is_not_set(ran: list[Any]) -> None:
    alarm = Alarm(lambda: ran.append("rang"))
    for count in (1, 2):
        alarm.set_by(time.monotonic() + 0.01)
        eventually(lambda count=count: len(ran) == count)


def test_setting_by_a_time_counts_from_the_later_one_that_was_set_last(ran: list[Any]) -> None:
    alarm = Alarm(lambda: ran.append(time.monotonic()))
    start = time.monotonic()
    with kept_busy():
        alarm.set(start + 0.02)
        alarm.set(start + FAR)
        alarm.set_by(start + 0.15)
    eventually(lambda: ran)
    assert ran[0] >= start + 0.15


def test_a_cleared_alarm_does_not_ring(ran: list[Any], own_timers: timers._Timers) -> None:
    alarm = Alarm(lambda: ran.append("rang"))
    with kept_busy():
        alarm.set(time.monotonic() + 0.03)
        alarm.clear()
        alarm.clear()
        schedule_after(0.06, lambda: ran.append("later"))
    eventually(lambda: ran == ["later"])
    eventually(lambda: own_timers._heap == [])


def test_a_cleared_alarm_may_be_set_again(ran: list[Any]) -> None:
    alarm = Alarm(lambda: ran.append("rang"))
    alarm.set(time.monotonic() + FAR)
    alarm.clear()
    alarm.set(time.monotonic() + 0.02)
    eventually(lambda: ran == ["rang"])


def test_an_alarm_may_set_itself_again_as_it_rings(ran: list[Any]) -> None:
    def ring() -> None:
        ran.append("rang")
        if len(ran) < 5:
            alarm.set(time.monotonic() + 0.001)

    alarm = Alarm(ring)
    alarm.set(time.monotonic())
    eventually(lambda: len(ran) == 5)


def test_an_alarm_whose_callback_fails_can_be_set_again(ran: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    def ring() -> None:
        ran.append("rang")
        raise RuntimeError("a fault in the callback")

    alarm = Alarm(ring)
    for count in (1, 2):
        alarm.set(time.monotonic())
        eventually(lambda count=count: len(ran) == count)
    eventually(lambda: caplog.text.count("RuntimeError: a fault in the callback") == 2)


def test_putting_an_alarm_off_schedules_nothing_new(own_timers: timers._Timers) -> None:
    alarm = Alarm(lambda: None)
    start = time.monotonic()
    for number in range(1000):
        alarm.set(start + FAR + number)
    assert len(own_timers._heap) == 1
    alarm.clear()


def test_threads_that_set_and_clear_an_alarm_at_once_leave_it_as_the_last_one_wants(
    ran: list[Any], own_timers: timers._Timers
) -> None:
    alarm = Alarm(lambda: ran.append("rang"))

    def work(seed: int) -> None:
        for number in range(200):
            if (seed + number) % 3:
                alarm.set(time.monotonic() + FAR + number)
            else:
                alarm.clear()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    alarm.set(time.monotonic() + 0.01)
    eventually(lambda: ran == ["rang"])
    eventually(lambda: own_timers._thread is None)
    assert (own_timers._heap, own_timers._cancelled) == ([], 0)
