"""WorkerPool: the threads that run user code, as many as are needed up to a bound, and Lane: tasks kept in order.

Nothing of the library runs on these threads but what calls user code.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from natsync.concurrency import Deadline, SafeCondition, fork_generation, join_all, run_safely, warn_soon

log = logging.getLogger("natsync.workers")

#: Seconds after which a worker with nothing to do ends.
IDLE_SECONDS = 10.0

Task = Callable[[], object]

_thread = threading.local()


def at_thread_end(callback: Callable[[], object]) -> None:
    """Have callback() called on the calling worker thread when that ends; asked for again, it counts once.

    For what handlers keep in each thread, such as database connections. Threads that are nobody's workers never call.
    """
    callbacks: list[Callable[[], object]] = _thread.__dict__.setdefault("callbacks", [])
    if callback not in callbacks:
        callbacks.append(callback)


class WorkerPool:
    """Runs tasks on at most `limit` threads; what comes when all are busy waits its turn.

    Threads are started when needed and end after IDLE_SECONDS without work. A task that raises is logged.

    Of those that are idle the one that has waited least is called: what it needs is still at hand, and the link may
    still be its own to write (Outbox.traffic). One worker at a time is called; it calls the next before it runs what
    it takes. So tasks that come together and are brief are run by a few workers, and none is woken only to find that
    another was faster.
    """

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self._lock = threading.Lock()
        self._work = SafeCondition(self._lock)
        self._tasks: deque[Task] = deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._called: threading.Thread | bool = False  # whether a worker is on its way; which, if it is a new one
        self._numbers = 0
        self._closed = False

    def submit(self, task: Task, *, queue: bool = True) -> bool:
        """Have the task run; False if the pool is closed, or with queue=False if no thread is free. Never blocks."""
        with self._lock:
            if self._closed:
                return False
            if not queue and self._idle + self.limit - len(self._threads) <= len(self._tasks):
                return False
            self._tasks.append(task)
            try:
                if self._called or self._call_locked():
                    return True
            except BaseException:  # a Ctrl-C
                self._tasks.pop()
                raise
            if queue and self._threads:
                return True  # those that are busy come to it
            self._tasks.pop()
        warn_soon(log, "%s: no thread can be started", self.name)  # who submits may hold a lock, as Lane does
        return False

    def _call_locked(self) -> bool:
        """Have another worker come, if there may be one; False if it cannot be started."""
        if self._idle:
            self._work.notify()
            self._called = True  # behind it: nobody may be waited for who was not woken
            return True
        return len(self._threads) >= self.limit or self._grow_locked()

    def _grow_locked(self) -> bool:
        """Start a thread; whether that can be done."""
        self._numbers += 1
        thread = threading.Thread(target=self._run, name=f"{self.name}-{self._numbers}", daemon=True)
        self._threads.add(thread)
        self._called = thread
        self._idle += 1
        try:
            thread.start()
        except BaseException as error:  # no more threads just now, or a Ctrl-C
            self._called = False
            self._idle -= 1
            self._threads.discard(thread)
            if not isinstance(error, RuntimeError):
                raise
            return False
        return True

    @property
    def threads(self) -> int:
        """How many threads there are now."""
        return len(self._threads)

    @property
    def closed(self) -> bool:
        return self._closed

    def is_own_thread(self) -> bool:
        """Whether the calling thread is one of this pool's."""
        return threading.current_thread() in self._threads

    def close(self, deadline: Deadline) -> list[str]:
        """Take no more tasks, run those that wait, and wait for the threads; names those still running."""
        joined, stuck = set[threading.Thread](), list[str]()
        while True:  # a worker that comes to what waits may start another one
            with self._lock:
                self._closed = True
                self._work.notify_all()
                threads = self._threads - joined
            if not threads:
                return stuck
            stuck += join_all(threads, deadline)
            joined |= threads

    def _run(self) -> None:
        generation = fork_generation()
        with self._lock:
            self._threads.add(threading.current_thread())  # again, if a Ctrl-C cut short what had started it
        try:
            # A child that a task forked, and that returns from it, is no worker of its parent's.
            while generation == fork_generation() and (task := self._next()) is not None:
                try:
                    task()
                except BaseException:  # SystemExit in user code must not cost the pool a thread
                    log.exception("a task failed")
                del task  # an idle worker must not keep its last handler's objects alive
        finally:
            if generation == fork_generation():
                for callback in _thread.__dict__.pop("callbacks", ()):
                    run_safely(callback, "what is due at the end of a thread")
                with self._lock:
                    self._threads.discard(threading.current_thread())

    def _next(self) -> Task | None:
        """The next task; None when the worker should end (then it counts as gone already)."""
        with self._lock:
            if self._called is threading.current_thread():
                self._called = False
            else:
                self._idle += 1
            try:
                while not self._tasks:
                    if self._closed or not self._wait_locked():
                        if self._tasks:
                            break
                        self._threads.discard(threading.current_thread())
                        return None
                task = self._tasks.popleft()
            finally:
                self._idle -= 1
            if self._tasks and not self._called:
                self._call_locked()
            return task

    def _wait_locked(self) -> bool:
        """Wait to be called; False after IDLE_SECONDS."""
        woken = self._work.wait(IDLE_SECONDS)
        if self._called is True:  # not if it is a new thread that is on its way: that one will say so itself
            self._called = False
        return woken


class Lane:
    """Runs tasks one after the other, in order, on a pool's threads: never two at a time, no thread when idle."""

    def __init__(self, pool: WorkerPool, limit: int | None = None) -> None:
        self._pool = pool
        self._limit = limit
        self._lock = threading.Lock()
        self._tasks: deque[Task] = deque()
        self._running = False

    def submit(self, task: Task) -> bool:
        """Have the task run after those submitted before; never blocks.

        Returns False, and forgets the task, if the pool is closed or `limit` tasks wait already.
        """
        with self._lock:  # over the pool's answer too: what it refuses must not take somebody else's task along
            if self._limit is not None and len(self._tasks) >= self._limit:
                return False
            self._tasks.append(task)
            if not self._running:
                self._running = self._pool.submit(self._run)
                if not self._running:
                    self._tasks.clear()
            return self._running

    def _run(self) -> None:
        generation = fork_generation()
        while generation == fork_generation():
            with self._lock:
                if not self._tasks:
                    self._running = False
                    return
                task = self._tasks.popleft()
            try:
                task()
            except BaseException:
                log.exception("a task failed")
