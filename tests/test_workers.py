"""natsync.workers: as many threads as needed up to a bound, none for long without work, no task lost."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from natsync import workers
from natsync.concurrency import Deadline, SafeCondition
from natsync.testing import eventually
from natsync.workers import Lane, WorkerPool


@pytest.fixture
def make_pool() -> Iterator[Callable[[int], WorkerPool]]:
    """Pools that are closed, their threads gone, when the test is over."""
    pools: list[WorkerPool] = []

    def make(limit: int) -> WorkerPool:
        pools.append(WorkerPool("natsync-test-worker", limit))
        return pools[-1]

    yield make
    for pool in pools:
        assert pool.close(Deadline.after(5)) == []


class Gate:
    """Tasks that stay inside until the gate is opened."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.passed = 0
        self._lock = threading.Lock()
        self._open = threading.Event()

    def task(self) -> None:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self._open.wait(10)
        with self._lock:
            self.inside -= 1
            self.passed += 1

    def open(self) -> None:
        self._open.set()


# -- how many threads ------------------------------------------------------------------------------------------------


def test_a_pool_without_work_has_no_thread(make_pool: Callable[[int], WorkerPool]) -> None:
    assert make_pool(5).threads == 0


def test_no_more_tasks_run_at_once_than_the_limit(make_pool: Callable[[int], WorkerPool]) -> None:
    pool, gate = make_pool(3), Gate()
    for _ in range(10):
        assert pool.submit(gate.task)
    eventually(lambda: gate.inside == 3)
    assert pool.threads == 3
    gate.open()
    eventually(lambda: gate.passed == 10)
    assert gate.most == 3


def test_as_many_tasks_run_at_once_as_the_limit_allows(make_pool: Callable[[int], WorkerPool]) -> None:
    """Whether threads are new, idle, or just waking up: none of ten tasks may wait behind another."""
    pool = make_pool(10)
    for _ in range(20):
        gate = Gate()
        for _ in range(10):
            pool.submit(gate.task)
        try:
            eventually(lambda gate=gate: gate.inside == 10)
        finally:
            gate.open()
        eventually(lambda gate=gate: gate.passed == 10)
    assert pool.threads == 10


def test_one_idle_thread_is_not_counted_on_for_several_tasks(make_pool: Callable[[int], WorkerPool]) -> None:
    """It has been told of the first and is still waking up when the others come."""
    for _ in range(10):
        pool, gate, ran = make_pool(5), Gate(), threading.Event()
        pool.submit(ran.set)
        eventually(lambda pool=pool, ran=ran: ran.is_set() and pool._idle == 1)  # a new thread counts as idle too
        for _ in range(3):
            pool.submit(gate.task)
        try:
            eventually(lambda gate=gate: gate.inside == 3)
        finally:
            gate.open()
        assert pool.threads == 3


def test_an_idle_thread_is_used_again(make_pool: Callable[[int], WorkerPool]) -> None:
    pool, names = make_pool(10), []
    for number in range(20):
        pool.submit(lambda: names.append(threading.current_thread().name))
        eventually(lambda number=number: len(names) == number + 1)
        eventually(lambda: pool._idle == 1)
    assert set(names) == {"natsync-test-worker-1"}
    assert pool.threads == 1


def test_a_thread_that_is_long_in_coming_counts_once(
    make_pool: Callable[[int], WorkerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one gives up waiting meanwhile: that is not the one that was called."""
    monkeypatch.setattr(workers, "IDLE_SECONDS", 0.05)
    pool, gate, coming, ran = make_pool(4), Gate(), threading.Event(), threading.Event()
    run = WorkerPool._run

    def late(self: WorkerPool) -> None:
        if threading.current_thread().name.endswith("-2"):
            assert coming.wait(10)
        run(self)

    monkeypatch.setattr(WorkerPool, "_run", late)
    pool.submit(gate.task)
    eventually(lambda: gate.inside == 1)
    pool.submit(lambda: None)
    gate.open()
    eventually(lambda: pool.threads == 1)  # the first has run that, too, and left
    coming.set()
    eventually(lambda: pool.threads == 0)
    assert pool._idle == 0
    assert pool.submit(ran.set)
    assert ran.wait(5)


def test_of_idle_threads_the_one_that_was_busy_last_is_called(make_pool: Callable[[int], WorkerPool]) -> None:
    pool, gate, ran = make_pool(3), Gate(), list[str]()
    for _ in range(3):
        pool.submit(gate.task)
    eventually(lambda: gate.inside == 3)
    gate.open()
    for number in range(1, 11):
        eventually(lambda: len(pool._work._turns) == 3)
        pool.submit(lambda: ran.append(threading.current_thread().name))
        eventually(lambda: len(ran) == number)  # noqa: B023
    assert len(set(ran)) == 1


def test_threads_are_daemons_named_after_the_pool(make_pool: Callable[[int], WorkerPool]) -> None:
    pool, seen = make_pool(1), []
    pool.submit(lambda: seen.append(threading.current_thread()))
    eventually(lambda: seen)
    assert (seen[0].name, seen[0].daemon) == ("natsync-test-worker-1", True)


def test_a_pool_knows_its_own_threads(make_pool: Callable[[int], WorkerPool]) -> None:
    pool, other, seen = make_pool(1), make_pool(1), []
    pool.submit(lambda: seen.append((pool.is_own_thread(), other.is_own_thread())))
    eventually(lambda: seen)
    assert seen == [(True, False)]
    assert not pool.is_own_thread()


def test_a_thread_without_work_ends(make_pool: Callable[[int], WorkerPool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "IDLE_SECONDS", 0.05)
    pool, threads = make_pool(4), []
    for _ in range(4):
        pool.submit(lambda: threads.append(threading.current_thread()))
    eventually(lambda: len(threads) == 4)
    eventually(lambda: pool.threads == 0)
    eventually(lambda: not any(thread.is_alive() for thread in threads))


def test_a_thread_stays_a_while_without_work(make_pool: Callable[[int], WorkerPool]) -> None:
    assert workers.IDLE_SECONDS >= 1
    pool, ran = make_pool(1), threading.Event()
    pool.submit(ran.set)
    assert ran.wait(5)
    eventually(lambda: pool._idle == 1)
    assert pool.threads == 1


def test_work_goes_on_after_all_threads_have_ended(
    make_pool: Callable[[int], WorkerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "IDLE_SECONDS", 0.01)
    pool = make_pool(2)
    for _ in range(5):
        ran = threading.Event()
        pool.submit(ran.set)
        assert ran.wait(5)
        eventually(lambda: pool.threads == 0)


def test_no_task_is_lost_when_it_comes_as_a_thread_ends(
    make_pool: Callable[[int], WorkerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks come at about the time at which idle threads give up, with one thread and with several."""
    monkeypatch.setattr(workers, "IDLE_SECONDS", 0.001)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for limit in (1, 3):
            pool = make_pool(limit)
            for number in range(400):
                done = threading.Event()
                assert pool.submit(done.set)
                assert done.wait(5), f"task {number} was lost"
                if number % 2:
                    threading.Event().wait(0.0008 + 0.0001 * (number % 5))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("limit", [1, 2])
def test_a_task_that_comes_in_the_moment_a_thread_gives_up_is_run(
    limit: int, make_pool: Callable[[int], WorkerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for work has ended without any, and before the lock is taken again a task comes in."""
    pool, ran = make_pool(limit), threading.Event()
    wait = SafeCondition.wait
    came: list[bool] = []

    def gives_up(condition: SafeCondition, timeout: float | None = None) -> bool:
        if condition is not pool._work or came:
            return wait(condition, timeout)
        pool._lock.release()
        came.append(pool.submit(ran.set))
        pool._lock.acquire()
        return False

    monkeypatch.setattr(SafeCondition, "wait", gives_up)
    pool.submit(lambda: None)
    assert ran.wait(5)


def test_a_task_that_comes_after_the_last_thread_decided_to_end_gets_a_new_one(
    make_pool: Callable[[int], WorkerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "IDLE_SECONDS", 0.01)
    pool, ran = make_pool(1), threading.Event()
    decide, came = pool._next, list[bool]()

    def deciding() -> Callable[[], object] | None:
        task = decide()
        if task is None and not came:
            came.append(pool.submit(ran.set))
        return task

    monkeypatch.setattr(pool, "_next", deciding)
    pool.submit(lambda: None)
    assert ran.wait(5)


def test_a_thread_that_cannot_be_started_does_not_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may refuse a thread for a moment; its place must not be lost for ever."""
    pool, ran = WorkerPool("natsync-test-worker", 1), threading.Event()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with contextlib.suppress(RuntimeError):
            pool.submit(lambda: None)
    assert pool.threads == 0
    pool.submit(ran.set)
    assert ran.wait(5)
    assert pool.close(Deadline.after(5)) == []


def test_without_queueing_a_task_is_refused_when_no_thread_is_free(make_pool: Callable[[int], WorkerPool]) -> None:
    pool, gate = make_pool(2), Gate()
    assert [pool.submit(gate.task, queue=False) for _ in range(3)] == [True, True, False]
    eventually(lambda: gate.inside == 2)
    assert not pool.submit(gate.task, queue=False)
    gate.open()
    eventually(lambda: pool._idle == 2)
    assert gate.passed == 2
    again = Gate()
    assert [pool.submit(again.task, queue=False) for _ in range(3)] == [True, True, False]
    again.open()


def test_without_queueing_a_task_does_not_wait_behind_one_that_does(make_pool: Callable[[int], WorkerPool]) -> None:
    pool, gate = make_pool(1), Gate()
    pool.submit(gate.task)
    pool.submit(gate.task)
    assert not pool.submit(gate.task, queue=False)
    gate.open()
    eventually(lambda: gate.passed == 2)


# -- tasks -----------------------------------------------------------------------------------------------------------


def test_one_thread_runs_tasks_in_order(make_pool: Callable[[int], WorkerPool]) -> None:
    pool, ran = make_pool(1), []
    for number in range(200):
        pool.submit(lambda number=number: ran.append(number))
    eventually(lambda: len(ran) == 200)
    assert ran == list(range(200))


def test_a_task_may_submit_another(make_pool: Callable[[int], WorkerPool]) -> None:
    pool, ran = make_pool(1), threading.Event()
    pool.submit(lambda: pool.submit(ran.set))
    assert ran.wait(5)


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_a_task_that_raises_is_logged_and_costs_no_thread(
    error: BaseException, make_pool: Callable[[int], WorkerPool], caplog: pytest.LogCaptureFixture
) -> None:
    pool, ran = make_pool(1), []

    def boom() -> None:
        ran.append(threading.current_thread())
        raise error

    with caplog.at_level(logging.ERROR, "natsync.workers"):
        pool.submit(boom)
        pool.submit(lambda: ran.append(threading.current_thread()))
        eventually(lambda: len(ran) == 2)
    assert ran[0] is ran[1]
    assert "Traceback" in caplog.text


def test_an_idle_thread_keeps_nothing_of_its_last_task_alive(make_pool: Callable[[int], WorkerPool]) -> None:
    class Task:
        def __call__(self) -> None:
            pass

    pool, task = make_pool(1), Task()
    alive = weakref.ref(task)
    pool.submit(task)
    del task
    gc.collect()
    eventually(lambda: alive() is None)
    assert pool.threads == 1


# -- closing ---------------------------------------------------------------------------------------------------------


def test_closing_waits_for_what_runs_and_runs_what_waits() -> None:
    pool, gate = WorkerPool("natsync-test-worker", 2), Gate()
    for _ in range(6):
        pool.submit(gate.task)
    eventually(lambda: gate.inside == 2)
    threading.Timer(0.05, gate.open).start()
    assert pool.close(Deadline.after(5)) == []
    assert (gate.passed, pool.threads) == (6, 0)


def test_closing_ends_idle_threads_at_once() -> None:
    pool, ran = WorkerPool("natsync-test-worker", 2), threading.Event()
    pool.submit(ran.set)
    eventually(lambda: pool._idle == 1)
    started = time.monotonic()
    assert pool.close(Deadline.after(5)) == []
    assert time.monotonic() - started < 8


def test_closing_names_what_is_stuck_and_waits_no_longer_than_told() -> None:
    pool, gate = WorkerPool("natsync-test-worker", 2), Gate()
    for _ in range(2):
        pool.submit(gate.task)
    eventually(lambda: gate.inside == 2)
    started = time.monotonic()
    assert sorted(pool.close(Deadline.after(0.05))) == ["natsync-test-worker-1", "natsync-test-worker-2"]
    assert time.monotonic() - started < 8
    gate.open()
    assert pool.close(Deadline.after(5)) == []


def test_a_closed_pool_takes_no_task() -> None:
    pool = WorkerPool("natsync-test-worker", 1)
    assert pool.close(Deadline.after(0)) == []
    assert not pool.submit(lambda: pytest.fail("it was closed"))
    assert pool.threads == 0


def test_a_task_may_close_its_own_pool() -> None:
    pool, outcome = WorkerPool("natsync-test-worker", 2), []
    pool.submit(lambda: outcome.append(pool.close(Deadline.after(5))))
    eventually(lambda: outcome == [[]])
    eventually(lambda: pool.threads == 0)


# -- Lane ------------------------------------------------------------------------------------------------------------


def test_a_lane_keeps_the_order_on_a_pool_of_many(make_pool: Callable[[int], WorkerPool]) -> None:
    lane, ran = Lane(make_pool(8)), []
    for number in range(500):
        assert lane.submit(lambda number=number: ran.append(number))
    eventually(lambda: len(ran) == 500)
    assert ran == list(range(500))


def test_a_lane_never_runs_two_tasks_at_once(make_pool: Callable[[int], WorkerPool]) -> None:
    pool, gate = make_pool(8), Gate()
    lane = Lane(pool)
    for _ in range(5):
        lane.submit(gate.task)
    eventually(lambda: gate.inside == 1)
    assert pool.threads == 1
    gate.open()
    eventually(lambda: gate.passed == 5)
    assert gate.most == 1


def test_an_idle_lane_holds_no_thread(make_pool: Callable[[int], WorkerPool]) -> None:
    pool, ran = make_pool(1), []
    lanes = [Lane(pool) for _ in range(5)]
    for number, lane in enumerate(lanes):
        lane.submit(lambda number=number: ran.append(number))
    eventually(lambda: len(ran) == 5)
    assert ran == [0, 1, 2, 3, 4]


def test_threads_that_submit_at_once_keep_their_order_each(make_pool: Callable[[int], WorkerPool]) -> None:
    lane, ran = Lane(make_pool(4)), []

    def submit(who: int) -> None:
        for number in range(200):
            lane.submit(lambda number=number: ran.append((who, number)))

    threads = [threading.Thread(target=submit, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    eventually(lambda: len(ran) == 800)
    for who in range(4):
        assert [number for one, number in ran if one == who] == list(range(200))


def test_no_task_of_a_lane_is_lost_when_it_comes_as_the_lane_falls_idle(make_pool: Callable[[int], WorkerPool]) -> None:
    lane = Lane(make_pool(2))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for number in range(500):
            done = threading.Event()
            lane.submit(done.set)
            assert done.wait(5), f"task {number} was lost"
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(1)], ids=repr)
def test_a_task_that_raises_does_not_stop_its_lane(
    error: BaseException, make_pool: Callable[[int], WorkerPool], caplog: pytest.LogCaptureFixture
) -> None:
    lane, ran = Lane(make_pool(2)), threading.Event()

    def boom() -> None:
        raise error

    with caplog.at_level(logging.ERROR, "natsync.workers"):
        lane.submit(boom)
        lane.submit(ran.set)
        assert ran.wait(5)
    assert repr(error)[:5] in caplog.text


def test_a_lane_of_a_closed_pool_takes_no_task_however_often_it_is_asked() -> None:
    pool, ran = WorkerPool("natsync-test-worker", 1), list[Any]()
    pool.close(Deadline.after(0))
    lane = Lane(pool)
    assert [lane.submit(lambda: ran.append(1)) for _ in range(3)] == [False, False, False]
    assert ran == []


def test_a_lane_that_is_being_refused_does_not_take_and_lose_the_task_of_another_thread() -> None:
    pool, ran, outcomes = WorkerPool("natsync-test-worker", 1), list[int](), list[bool]()
    lane = Lane(pool)
    others: list[threading.Thread] = []

    def refuse(task: Any, **options: Any) -> bool:
        if not others:
            others.append(threading.Thread(target=lambda: outcomes.append(lane.submit(lambda: ran.append(2)))))
            others[0].start()
            others[0].join(0.2)  # it may have to wait until this one is through
        return False

    pool.submit = refuse  # type: ignore[method-assign]
    assert not lane.submit(lambda: ran.append(1))
    others[0].join(5)
    assert outcomes == [False]


def test_closing_the_pool_runs_what_waits_in_a_lane() -> None:
    pool, gate, ran = WorkerPool("natsync-test-worker", 1), Gate(), list[int]()
    lane = Lane(pool)
    lane.submit(gate.task)
    for number in range(3):
        lane.submit(lambda number=number: ran.append(number))
    eventually(lambda: gate.inside == 1)
    gate.open()
    assert pool.close(Deadline.after(5)) == []
    assert ran == [0, 1, 2]


def test_a_lane_with_a_limit_forgets_what_is_beyond_it_and_goes_on() -> None:
    pool = WorkerPool("natsync-test", 2)
    lane = Lane(pool, 3)
    release, ran = threading.Event(), []
    assert lane.submit(lambda: release.wait(10))
    eventually(lambda: not lane._tasks)
    assert [lane.submit(partial(ran.append, number)) for number in range(5)] == [True] * 3 + [False] * 2
    release.set()
    eventually(lambda: ran == [0, 1, 2])
    assert lane.submit(partial(ran.append, 3))
    pool.close(Deadline.after(5))
    assert ran == [0, 1, 2, 3]


# -- the end of a thread -------------------------------------------------------------------------------------------


def test_a_thread_calls_at_its_end_what_was_asked_for_once(make_pool: Callable[[int], WorkerPool]) -> None:
    ended: list[str] = []
    done = threading.Event()

    def note() -> None:
        ended.append(threading.current_thread().name)

    def fail() -> None:
        raise RuntimeError("does not keep the others from their turn")

    def task() -> None:
        workers.at_thread_end(fail)
        workers.at_thread_end(note)

    pool = make_pool(1)
    pool.submit(task)
    pool.submit(task)
    pool.submit(done.set)
    assert done.wait(5)
    assert ended == []
    pool.close(Deadline.after(5))
    assert ended == ["natsync-test-worker-1"]
