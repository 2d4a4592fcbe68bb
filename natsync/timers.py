"""One process-wide timer thread for deadlines, pings and probes; it exists only while something is scheduled.

Callbacks run on the timer thread one after the other: they must be brief, must not block and must not be user code
(hand that to concurrency.run_soon). The thread sleeps until the next deadline; there is no polling.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable

from natsync import concurrency

log = logging.getLogger("natsync.timers")

#: Cancelled entries are swept out of the heap when there are this many and they are the majority.
_SWEEP_FROM = 64
#: Seconds by which a look is late if this process was frozen, or had no processor; and what others may have to go on.
LATE_SECONDS = 0.5


class Timer:
    """One scheduled call; cancel() may be called from any thread, at any time, more than once.

    Attributes:
        keep: whatever must live until then; for callbacks that hold what they act on weakly.
    """

    __slots__ = ("_owner", "at", "callback", "keep")

    def __init__(self, owner: _Timers, at: float, callback: Callable[[], None]) -> None:
        self._owner = owner
        self.at = at
        self.callback: Callable[[], None] | None = callback
        self.keep: object = None

    def cancel(self) -> None:
        """Make sure that the call does not start any more (one that is running goes on)."""
        if self._owner is _timers:  # in a forked child the parent's timer is of no use, and its lock may be held
            self._owner.cancel(self)


class _Timers:
    def __init__(self) -> None:
        self._lock = threading.Lock()  # entered itself: an interrupt inside Condition.__enter__ would leave it locked
        self._changed = concurrency.SafeCondition(self._lock)
        self._heap: list[tuple[float, int, Timer]] = []
        self._cancelled = 0
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None

    def schedule(self, at: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(self, at, callback)
        with self._lock:
            if self._thread is not None and (not self._heap or at < self._heap[0][0]):
                self._changed.notify()  # before it is there: see cancel()
            heapq.heappush(self._heap, (at, next(self._numbers), timer))
            started = self._thread is not None or self._start_locked()
        if not started:  # whoever schedules may hold a lock, as Alarm does
            concurrency.warn_soon(log, "the timer's thread cannot be started; deadlines are late")
        return timer

    def _start_locked(self) -> bool:
        """Start the thread; whether that can be done."""
        thread = threading.Thread(target=self._run, name="natsync-timer", daemon=True)
        self._thread = thread
        try:
            thread.start()
        except BaseException as error:  # no more threads just now, or a Ctrl-C: the next schedule() tries again
            self._thread = None  # if it runs all the same, it finds that it is not this one
            if not isinstance(error, RuntimeError):
                raise
            return False
        return True

    def cancel(self, timer: Timer) -> None:
        with self._lock:
            if timer.callback is None:
                return
            last = self._cancelled + 1 == len(self._heap)
            if last:  # before it counts, so that an interrupt in between cannot leave a thread that sleeps for nothing
                self._changed.notify()
            timer.callback = timer.keep = None
            self._cancelled += 1
            if last or self._cancelled >= max(_SWEEP_FROM, len(self._heap) // 2):
                self._heap = [entry for entry in self._heap if entry[2].callback is not None]
                heapq.heapify(self._heap)
                self._cancelled = 0

    def settle(self) -> None:
        """Wait for the thread to leave if nothing is scheduled any more."""
        with self._lock:
            thread = None if self._heap else self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(1.0)

    def _run(self) -> None:
        while True:
            concurrency.run_waiting()
            callback = self._next_due()
            if callback is None:
                return
            try:
                callback()
            except Exception:
                log.exception("a timer's callback failed")
            del callback

    def _next_due(self) -> Callable[[], None] | None:
        """Sleep until something is due and take it; None when nothing is scheduled any more."""
        me = threading.current_thread()
        with self._lock:
            while self._heap and self._thread is me:
                at, _, timer = self._heap[0]
                if timer.callback is None:
                    heapq.heappop(self._heap)
                    self._cancelled -= 1
                    continue
                delay = at - time.monotonic()
                if delay > 0:
                    self._changed.wait(min(delay, threading.TIMEOUT_MAX))
                    continue
                heapq.heappop(self._heap)
                callback, timer.callback = timer.callback, None
                return callback
            if self._thread is me:
                self._thread = None
            return None


_timers: _Timers | None = None
_making = threading.Lock()


def table() -> _Timers:
    """This process's timers. Made at first use: gunicorn's gevent worker patches threading after a preloaded import."""
    global _timers
    if _timers is None:
        with _making:
            _timers = _timers or _Timers()
    return _timers


def schedule(at: float, callback: Callable[[], None]) -> Timer:
    """Have callback called on the timer thread once time.monotonic() has reached `at`."""
    return table().schedule(at, callback)


def schedule_after(seconds: float, callback: Callable[[], None]) -> Timer:
    """Have callback called on the timer thread `seconds` from now."""
    return table().schedule(time.monotonic() + seconds, callback)


class Alarm:
    """A timer that is set again and again, from any thread: calls back once the time it was last set for has come.

    To set it later, which is what happens to most, costs next to nothing: the timer that is scheduled looks again.

    Attributes:
        due: when it is to ring, or was to as it did.
    """

    __slots__ = ("_callback", "_lock", "_timer", "_when", "due")

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._lock = threading.Lock()
        self._timer: Timer | None = None
        self._when: float | None = None
        self.due = math.inf

    def set(self, when: float) -> None:
        """Ring once time.monotonic() has reached `when`, and not before."""
        with self._lock:
            self._set_locked(when)

    def set_by(self, when: float) -> None:
        """Ring at `when`, or when it was set for if that is sooner."""
        with self._lock:
            if self._when is None or when < self._when:
                self._set_locked(when)

    def clear(self) -> None:
        """Do not ring until it is set again (a call that has begun goes on)."""
        with self._lock:
            self._when = None
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _set_locked(self, when: float) -> None:
        timer = self._timer
        if timer is None or when < timer.at:
            self._timer = schedule(when, self._due)
            if timer is not None:
                timer.cancel()
        self.due = when
        self._when = when  # last: had a Ctrl-C kept it from being scheduled, set_by() would rely on it

    def _due(self) -> None:
        with self._lock:
            if self._timer is not None and self._timer.callback is not None:
                return  # it was set anew in the moment that this one was due
            when, self._timer = self._when, None
            if when is None:
                return
            if when > time.monotonic():
                self._timer = schedule(when, self._due)
                return
            self._when = None
        self._callback()


def lateness(due: float, now: float) -> float:
    """Seconds by which a look that was due then is late, if this process was frozen or had no processor; else 0.

    Who is waited for may have answered meanwhile, and nobody have read it: that time does not count against it.
    """
    late = now - due
    return late if late >= LATE_SECONDS else 0.0


def settle() -> None:
    """If nothing is scheduled any more, wait for the timer thread to end: close() leaves no thread behind."""
    table().settle()


def _forked() -> None:
    global _timers, _making
    _timers, _making = None, threading.Lock()


concurrency.after_fork_in_child(_forked)
