"""natsync.concurrency: deadlines, signals, named threads, user code on a worker, news of a fork."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from interrupting import Interrupted, moments
from natsync import concurrency
from natsync.concurrency import (
    Deadline,
    SafeCondition,
    SafeEvent,
    Signal,
    check_timeout,
    join_all,
    run_safely,
    run_soon,
    spawn,
)
from natsync.errors import InvalidArgument
from natsync.testing import eventually
from support import natsync_threads, run_python

#: Timeouts that mean "as good as no limit", and that a lock does not take.
HUGE = [float("inf"), 1e300, threading.TIMEOUT_MAX * 2]


# -- timeouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 0, 0.0, 1, 2.5, 86_400.0])
def test_a_timeout_is_none_or_a_number_from_zero_up(value: float | None) -> None:
    assert check_timeout(value) == value


@pytest.mark.parametrize("value", HUGE)
def test_an_endless_timeout_is_none(value: float) -> None:
    assert check_timeout(value) is None


@pytest.mark.parametrize("value", [-1, -0.001, math.nan, -math.inf])
def test_a_negative_timeout_is_refused_by_name(value: float) -> None:
    with pytest.raises(InvalidArgument, match="patience="):
        check_timeout(value, "patience")


@pytest.mark.parametrize("value", ["5", True, False, [1], 1j])
def test_a_timeout_that_is_no_number_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="patience"):
        check_timeout(value, "patience")


# -- Deadline --------------------------------------------------------------------------------------------------------


def test_no_deadline_never_expires() -> None:
    for deadline in (Deadline(), Deadline.after(None)):
        assert (deadline.remaining(), deadline.wait_time(), deadline.expired) == (None, -1, False)


def test_a_deadline_counts_down_to_zero_and_not_below(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    deadline = Deadline.after(2)
    assert (deadline.at, deadline.remaining(), deadline.wait_time(), deadline.expired) == (102.0, 2.0, 2.0, False)
    now = 101.5
    assert (deadline.remaining(), deadline.expired) == (0.5, False)
    now = 102.0
    assert (deadline.remaining(), deadline.wait_time(), deadline.expired) == (0.0, 0.0, True)
    now = 200.0
    assert (deadline.remaining(), deadline.wait_time()) == (0.0, 0.0)


def test_a_timeout_of_zero_has_expired_at_once() -> None:
    assert Deadline.after(0).expired
    assert Deadline.after(0).remaining() == 0


def test_the_sooner_of_two_deadlines_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    deadline = Deadline(105.0)
    assert deadline.or_sooner(None) is deadline
    assert deadline.or_sooner(2).at == 102.0
    assert deadline.or_sooner(20).at == 105.0
    assert Deadline().or_sooner(2).at == 102.0
    assert Deadline().or_sooner(None).at is None


@pytest.mark.parametrize("timeout", HUGE)
def test_a_huge_timeout_can_be_waited_for(timeout: float) -> None:
    condition = threading.Condition()

    def wake() -> None:
        with condition:
            condition.notify_all()

    with condition:  # so that it is not woken before it waits
        waker = spawn(wake, "natsync-test")
        assert condition.wait(Deadline.after(timeout).remaining())
    waker.join(5)


@pytest.mark.parametrize("timeout", HUGE)
def test_threads_can_be_joined_with_a_huge_timeout(timeout: float) -> None:
    release = threading.Event()
    thread = spawn(release.wait, "natsync-test")  # type: ignore[arg-type]
    threading.Timer(0.2, release.set).start()
    assert join_all([thread], Deadline.after(timeout)) == []


@pytest.mark.parametrize("timeout", HUGE)
def test_an_endless_timeout_is_no_deadline(timeout: float) -> None:
    assert Deadline.after(timeout).at is None


@pytest.mark.parametrize("at", HUGE)
def test_a_deadline_beyond_all_times_can_be_waited_for(at: float) -> None:
    event = threading.Event()
    threading.Timer(0.02, event.set).start()
    assert event.wait(Deadline(at).remaining())
    assert Deadline(at).or_sooner(None).wait_time() > 1e6


# -- SafeEvent -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.0, -0.5, -1, -1.0, -7, -math.inf])
def test_an_event_that_was_not_set_is_waited_for_no_time_as_by_threading(timeout: float) -> None:
    event, told = SafeEvent(), list[bool]()
    spawn(lambda: told.append(event.wait(timeout)), "natsync-test").join(5)
    assert told == [threading.Event().wait(timeout)] == [False]
    event.set()
    assert event.wait(timeout)


# -- Signal ----------------------------------------------------------------------------------------------------------


def test_a_signal_set_before_the_wait_is_not_lost() -> None:
    given = Signal()
    given.set()
    assert given.wait(Deadline.after(0))


def test_several_sets_count_as_one() -> None:
    given = Signal()
    for _ in range(3):
        given.set()
    assert given.wait(Deadline.after(0))
    assert not given.wait(Deadline.after(0))


def test_a_signal_that_nobody_sets_ends_with_the_deadline() -> None:
    started = time.monotonic()
    assert not Signal().wait(Deadline.after(0.05))
    assert time.monotonic() - started >= 0.049


@pytest.mark.parametrize("timeout", [None, 10.0, *HUGE])
def test_setting_a_signal_wakes_the_waiter(timeout: float | None) -> None:
    given, woken = Signal(), []
    thread = spawn(lambda: woken.append(given.wait(Deadline.after(timeout))), "natsync-test")
    given.set()
    thread.join(5)
    assert woken == [True]


# -- SafeCondition ---------------------------------------------------------------------------------------------------


@pytest.fixture
def lock() -> threading.Lock:
    return threading.Lock()


def waiting(condition: SafeCondition, lock: threading.Lock, woken: list[bool], timeout: float | None = None) -> None:
    with lock:
        woken.append(condition.wait(timeout))


def test_a_wait_gives_its_lock_back_and_has_it_again_when_it_ends(lock: threading.Lock) -> None:
    condition, woken = SafeCondition(lock), list[bool]()
    thread = spawn(lambda: waiting(condition, lock, woken), "natsync-test")
    eventually(lambda: condition._turns)
    with lock:
        condition.notify()
        assert not woken
    thread.join(5)
    assert woken == [True]
    assert not lock.locked()
    assert not condition._turns


def test_a_wait_that_nobody_ends_lasts_as_long_as_told(lock: threading.Lock) -> None:
    condition, started = SafeCondition(lock), time.monotonic()
    with lock:
        assert not condition.wait(0.05)
        assert lock.locked()
    assert time.monotonic() - started >= 0.049
    assert not condition._turns


@pytest.mark.parametrize("timeout", [0, 0.0, -0.5, -1, -1.0, -7, -math.inf])
def test_a_wait_of_no_time_returns_at_once(lock: threading.Lock, timeout: float) -> None:
    woken = list[bool]()
    thread = spawn(lambda: waiting(SafeCondition(lock), lock, woken, timeout), "natsync-test")
    thread.join(5)
    assert woken == [False]
    assert not lock.locked()


@pytest.mark.parametrize("timeout", [10, 10.0, *HUGE])
def test_a_wait_of_any_time_ends_when_called(lock: threading.Lock, timeout: float) -> None:
    condition, woken = SafeCondition(lock), list[bool]()
    thread = spawn(lambda: waiting(condition, lock, woken, timeout), "natsync-test")
    eventually(lambda: condition._turns)
    with lock:
        condition.notify()
    thread.join(5)
    assert woken == [True]


def test_nobody_is_woken_without_the_lock(lock: threading.Lock) -> None:
    condition = SafeCondition(lock)
    for wake in (condition.wait, condition.notify, condition.notify_all):
        with pytest.raises(RuntimeError, match="not taken"):
            wake()
        assert not lock.locked()


def test_one_or_all_of_those_who_wait_are_woken(lock: threading.Lock) -> None:
    condition, woken = SafeCondition(lock), list[bool]()
    threads = [spawn(lambda: waiting(condition, lock, woken), "natsync-test") for _ in range(5)]
    eventually(lambda: len(condition._turns) == 5)
    with lock:
        condition.notify()
        assert len(condition._turns) == 4
    eventually(lambda: len(woken) == 1)
    with lock:
        condition.notify_all()
    for thread in threads:
        thread.join(5)
    assert woken == [True] * 5


def test_an_interrupt_anywhere_in_a_wait_leaves_the_lock_taken(lock: threading.Lock) -> None:
    condition, ends = SafeCondition(lock), list[bool]()

    def wait() -> None:
        with lock:
            try:
                condition.wait(0)
            finally:
                ends.append(lock.locked())

    for _ in moments(wait, SafeCondition.wait, anywhere=True):
        assert not lock.locked()
        with lock:
            condition.notify_all()  # if the interrupt kept it from taking its turn away
        assert not condition._turns
    assert len(ends) > 50
    assert all(ends)
    woken: list[bool] = []
    thread = spawn(lambda: waiting(condition, lock, woken), "natsync-test")
    eventually(lambda: condition._turns)
    with lock:
        condition.notify_all()
    thread.join(5)
    assert woken == [True]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system cannot send a signal to a thread")
def test_a_wait_interrupted_while_others_hold_the_lock_ends_with_it_taken(lock: threading.Lock) -> None:
    """The interrupt falls into taking the lock again."""
    condition, told, over = SafeCondition(lock), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            condition.notify_all()
            told.set()
            over.wait(5)

    def interrupt() -> None:
        told.wait(5)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        threading.Timer(0.1, over.set).start()

    def raises(*_: object) -> None:
        raise Interrupted

    former = signal.signal(signal.SIGUSR1, raises)
    try:
        for _ in range(5):
            told.clear()
            over.clear()
            with pytest.raises(Interrupted), lock:
                threads = [spawn(hold, "natsync-test"), spawn(interrupt, "natsync-test")]
                try:
                    condition.wait(5)
                finally:
                    assert lock.locked()
            for thread in threads:
                thread.join(5)
            assert not lock.locked()
    finally:
        signal.signal(signal.SIGUSR1, former)


# -- threads ---------------------------------------------------------------------------------------------------------


def test_a_spawned_thread_is_named_and_does_not_keep_the_interpreter() -> None:
    seen: list[threading.Thread] = []
    spawn(lambda: seen.append(threading.current_thread()), "natsync-test").join(5)
    assert (seen[0].name, seen[0].daemon) == ("natsync-test", True)


def test_joining_names_the_threads_that_are_stuck_and_waits_no_longer_than_told() -> None:
    release = threading.Event()
    stuck = [spawn(release.wait, f"natsync-stuck-{n}") for n in range(2)]  # type: ignore[arg-type]
    quick = spawn(lambda: None, "natsync-quick")
    quick.join(5)
    started = time.monotonic()
    try:
        assert join_all([stuck[0], quick, stuck[1]], Deadline.after(0.1)) == ["natsync-stuck-0", "natsync-stuck-1"]
        assert time.monotonic() - started < 5  # one deadline for all of them
    finally:
        release.set()
    assert join_all([*stuck, quick], Deadline.after(5)) == []


def test_a_thread_that_joins_itself_is_passed_over() -> None:
    names: list[list[str]] = []
    thread = spawn(lambda: names.append(join_all([threading.current_thread()], Deadline.after(5))), "natsync-test")
    thread.join(5)
    assert names == [[]]


def test_a_thread_that_was_never_started_is_passed_over() -> None:
    never = threading.Thread(target=lambda: None, name="natsync-never")
    assert join_all([never], Deadline.after(5)) == []


# -- user code -------------------------------------------------------------------------------------------------------


def test_what_user_code_raises_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    def boom() -> None:
        raise RuntimeError("boom")

    with caplog.at_level(logging.ERROR, "natsync"):
        run_safely(boom, "the test's callback")
    assert "the test's callback raised" in caplog.text
    assert "RuntimeError: boom" in caplog.text


def test_callbacks_run_on_workers_that_leave() -> None:
    ran: list[tuple[int, str]] = []
    for number in range(100):
        run_soon(lambda number=number: ran.append((number, threading.current_thread().name)), "a callback")
    eventually(lambda: len(ran) == 100)
    assert sorted(number for number, _ in ran) == list(range(100))
    assert {name for _, name in ran} == {"natsync-callbacks-worker"}
    eventually(lambda: not any("callbacks" in thread.name for thread in natsync_threads()))


def test_a_callback_that_blocks_does_not_keep_others_waiting() -> None:
    release, ran = threading.Event(), threading.Event()
    run_soon(lambda: release.wait(10), "a callback")
    run_soon(ran.set, "a callback")
    try:
        assert ran.wait(5)
    finally:
        release.set()


def test_no_more_callbacks_run_at_once_than_there_may_be_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrency, "CALLBACK_THREADS", 3)
    monkeypatch.setattr(concurrency, "_background", concurrency._Background())
    release, inside, ran = threading.Event(), [], []

    def callback() -> None:
        inside.append(1)
        release.wait(10)
        ran.append(1)

    for _ in range(10):
        run_soon(callback, "a callback")
    try:
        eventually(lambda: len(inside) == 3)
        assert sum("callbacks" in thread.name for thread in natsync_threads()) == 3
    finally:
        release.set()
    eventually(lambda: len(ran) == 10)


def test_no_callback_is_lost_when_it_comes_as_a_worker_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrency, "CALLBACK_THREADS", 1)
    monkeypatch.setattr(concurrency, "_background", concurrency._Background())
    ran: list[int] = []
    for number in range(300):
        done = threading.Event()
        run_soon(lambda number=number, done=done: (ran.append(number), done.set()), "a callback")
        if number % 3:  # the worker is just about to leave now
            assert done.wait(5)
    eventually(lambda: len(ran) == 300)
    assert ran == list(range(300))


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_a_callback_that_raises_does_not_keep_others_from_running(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrency, "_background", concurrency._Background())  # should it die, it dies alone
    ran = threading.Event()

    def fail() -> None:
        raise error

    run_soon(fail, "a callback")
    run_soon(ran.set, "a callback")
    assert ran.wait(10)


def test_a_worker_that_cannot_be_started_does_not_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may refuse a thread for a moment; callbacks must not be dead from then on."""
    monkeypatch.setattr(concurrency, "_background", concurrency._Background())
    ran: list[str] = []

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(concurrency.CALLBACK_THREADS):
            with contextlib.suppress(RuntimeError):
                run_soon(lambda: ran.append("first"), "a callback")
    run_soon(lambda: ran.append("next"), "a callback")
    eventually(lambda: "next" in ran)


# -- forks -----------------------------------------------------------------------------------------------------------

FORK = """
import os, sys, threading
from natsync import concurrency
concurrency.after_fork_in_child(lambda: print("callback", concurrency.fork_generation(), flush=True))
print("parent", concurrency.fork_generation(), flush=True)
child = os.fork()
if child == 0:
    done = threading.Event()
    concurrency.run_soon(done.set, "a callback")
    print("child", concurrency.fork_generation(), done.wait(5), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent", concurrency.fork_generation(), flush=True)
"""


def test_a_forked_child_knows_that_it_is_another_process() -> None:
    done = run_python(FORK)
    assert done.stdout.splitlines() == ["parent 0", "callback 1", "child 1 True", "parent 0"], done.stderr


FORK_WHILE_LOCKED = """
import os, threading
from natsync import concurrency, timers
held = [concurrency._background._lock, timers.table()._lock]
for lock in held:
    lock.acquire()
child = os.fork()
if child == 0:
    done, due = threading.Event(), threading.Event()
    concurrency.run_soon(done.set, "a callback")
    timers.schedule_after(0.01, due.set)
    print(done.wait(5), due.wait(5), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def test_locks_that_were_held_at_the_fork_do_not_block_the_child() -> None:
    done = run_python(FORK_WHILE_LOCKED)
    assert done.stdout.split() == ["True", "True"], done.stderr


class LockWithAFinalizer:
    """A lock under which a finalizer runs, now and then: what is called just before it is given back."""

    def __init__(self, finalizer: Callable[[], object]) -> None:
        self._lock = threading.Lock()
        self._finalizer = finalizer

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._finalizer()
        self._lock.release()


def test_a_finalizer_may_ask_for_a_callback_whatever_its_thread_is_at() -> None:
    """Collected in the code that hands callbacks to threads, an object must not wait for the lock of that code."""
    ran, background = list[str](), concurrency._Background()
    rounds = iter(range(6))

    def finalizer() -> None:
        number = next(rounds, None)
        if number is not None:
            background.run(lambda: ran.append(f"asked for by finalizer {number}"), "a callback")

    background._lock = LockWithAFinalizer(finalizer)  # type: ignore[assignment]
    asking = threading.Thread(target=lambda: background.run(lambda: ran.append("a"), "a callback"), daemon=True)
    asking.start()
    asking.join(5)
    assert not asking.is_alive()
    eventually(lambda: sorted(ran) == ["a", *(f"asked for by finalizer {number}" for number in range(6))])
    eventually(lambda: background._threads == 0)
