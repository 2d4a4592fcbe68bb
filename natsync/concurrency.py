"""Small tools that every threaded part uses: deadlines, named threads, joining by a deadline, news of a fork."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import mmap
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

from natsync.errors import InvalidArgument, TimedOut

log = logging.getLogger("natsync")

T = TypeVar("T")

#: Longest single wait in seconds; longer ones would overflow a lock's timeout. A year and a bit.
_FOREVER = min(threading.TIMEOUT_MAX, 4e7)


#: Threads of the process for callbacks that the library's own threads must not run.
CALLBACK_THREADS = 32
#: Warnings that wait to be logged at most; others are dropped, for a handler that is as slow as that.
UNSAID_WARNINGS = 1_000


def check_timeout(value: float | None, name: str = "timeout") -> float | None:
    """The value if it is None or a number of seconds from 0 up; None too for infinity and other endless waits.

    Raises:
        InvalidArgument: it is negative or not a number.
        TypeError: it is not a number type.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is a number of seconds or None, not {type(value).__name__}")
    if math.isnan(value) or value < 0:
        raise InvalidArgument(f"{name}={value!r}: seconds from 0 up, or None for no limit")
    return None if value > _FOREVER else value


class Deadline:
    """A point in time.monotonic() until which one may wait; None = no limit."""

    __slots__ = ("at",)

    def __init__(self, at: float | None = None) -> None:
        self.at = at

    @classmethod
    def after(cls, timeout: float | None) -> Deadline:
        return cls(None if timeout is None or timeout > _FOREVER else time.monotonic() + timeout)

    def remaining(self) -> float | None:
        """Seconds left, at least 0; None = no limit."""
        return None if self.at is None else min(max(0.0, self.at - time.monotonic()), _FOREVER)

    def wait_time(self) -> float:
        """Seconds left in the form a lock's acquire() takes: -1 = no limit."""
        return -1 if self.at is None else min(max(0.0, self.at - time.monotonic()), _FOREVER)

    @property
    def expired(self) -> bool:
        return self.at is not None and time.monotonic() >= self.at

    def or_sooner(self, timeout: float | None) -> Deadline:
        """This deadline or the one `timeout` seconds from now, whichever comes first."""
        if timeout is None:
            return self
        other = time.monotonic() + timeout
        return Deadline(other if self.at is None else min(self.at, other))


class Signal:
    """A wake-up for one waiting thread at a time: set() from any thread, several sets count as one.

    Half the cost of threading.Event: set() is one test and at most one release of a lock.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        try:
            self._lock.release()
        except RuntimeError:
            pass  # already set

    def wait(self, deadline: Deadline) -> bool:
        """Wait until set and clear it; False if the deadline came first."""
        return self._lock.acquire(timeout=deadline.wait_time())


def in_turn(lock: threading.Lock, deadline: Deadline, late: str, do: Callable[[Deadline], T]) -> T:
    """do(deadline) while this thread, of several that may come, has the lock.

    An interrupt (Ctrl-C) anywhere leaves the lock given back: to take it and to note that is one call into C.

    Raises:
        TimedOut: with the text `late`; another thread has had it until the deadline.
    """
    taken: list[bool] = []
    try:
        taken.extend(map(lock.acquire, (True,), (deadline.wait_time(),)))
        if not taken[0]:
            raise TimedOut(late)
        value = do(deadline)
    finally:
        if taken and taken[0]:
            lock.release()
    return value


class SafeCondition:
    """A threading.Condition that an interrupt (Ctrl-C) anywhere in wait() leaves with its lock taken, as it found it.

    That class gives its lock back, and takes it again, in steps of Python: interrupted between them, `with` gives back
    what is not taken (RuntimeError), or the lock stays taken and everybody else blocks for ever. Here each of the two
    is one call into C that notes that it was made. The lock is a plain one, and entered itself: `with lock`.
    """

    __slots__ = ("_lock", "_turns")

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._turns: deque[threading.Lock] = deque()  # of those who wait; given back = called

    def wait(self, timeout: float | None = None) -> bool:
        """Give the lock back until called, and take it again; False if the timeout (seconds) came first.

        Any number will do, for users wait for events made of this: below 0 is as good as 0, beyond all times as None.
        """
        self._check_taken()
        lock = self._lock
        seconds = -1 if timeout is None or timeout > _FOREVER else max(0, timeout)  # to a lock, -1 is no limit
        turn = threading.Lock()
        turn.acquire(False)
        given, taken = list[object](), list[object]()
        try:
            self._turns.append(turn)
            try:
                given.extend(map(type(lock).release, (lock,)))
                return turn.acquire(timeout=seconds)
            finally:
                if given:
                    taken.extend(map(type(lock).acquire, (lock,)))
        finally:
            if given and not taken:  # the interrupt fell into that
                taken.extend(map(type(lock).acquire, (lock,)))
            if turn in self._turns:
                self._turns.remove(turn)

    def notify(self) -> None:
        """Wake the one who has waited least: of several that are as good, it was busy last. Requires the lock."""
        self._check_taken()
        woken = False
        while self._turns and not woken:
            woken = self._call(self._turns[-1])
            self._turns.pop()

    def notify_all(self) -> None:
        """Wake all who wait. Requires the lock."""
        self._check_taken()
        while self._turns:
            self._call(self._turns[0])
            self._turns.popleft()  # behind it: interrupted in between, the next one calls again, which does no harm

    def _check_taken(self) -> None:
        # threading.Condition asks so too. Under gevent it has a use besides: a lock that is not to be had lets other
        # greenlets run, so that the writer gets its turn though a publisher never waits.
        if self._lock.acquire(False):
            self._lock.release()
            raise RuntimeError("the lock is not taken")

    @staticmethod
    def _call(turn: threading.Lock) -> bool:
        try:
            turn.release()
        except RuntimeError:  # it was called already
            return False
        return True


class SafeEvent(threading.Event):
    """A threading.Event that an interrupt (Ctrl-C) in wait() cannot leave locked.

    Event enters its Condition, which is Python code; interrupted inside, the lock stays taken, and whoever sets the
    event next, perhaps the reader, blocks for ever. Nothing of Event's own is relied on: gevent puts another class in
    its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self._happened = False
        self.renew()

    def renew(self) -> None:
        """In a forked child: another thread of the parent may have held the lock at the fork."""
        self._plain = threading.Lock()
        self._changed = SafeCondition(self._plain)

    def is_set(self) -> bool:
        return self._happened

    def set(self) -> None:
        with self._plain:
            self._happened = True
            self._changed.notify_all()

    def clear(self) -> None:
        with self._plain:
            self._happened = False

    def wait(self, timeout: float | None = None) -> bool:
        with self._plain:
            return self._happened or self._changed.wait(timeout)


class Happening:
    """Something that happens once, and that few wait for: the event is made for the first who asks for it."""

    __slots__ = ("_event", "happened")

    def __init__(self) -> None:
        self.happened = False
        self._event: SafeEvent | None = None

    def set(self) -> None:
        self.happened = True  # before the look at the event: whoever makes one looks here behind that
        if self._event is not None:
            self._event.set()

    @property
    def event(self) -> SafeEvent:
        """Set when it has happened."""
        event = self._event
        if event is None:
            with _making_events:
                event = self._event = self._event or SafeEvent()
            if self.happened:
                event.set()
        return event


_making_events = threading.Lock()


class Finishing:
    """What is done when something is over: once, and by one thread. Cut short by a Ctrl-C, the next who asks does it.

    What is done then may be done in part already: its steps must bear to be done again.
    """

    __slots__ = ("_done", "_lock", "claim")

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock  # of whatever is finished; not held while the steps are done
        self._done = False
        self.claim: object = None  # of who is at it, or about to be: may be set under the lock, then given to run()

    @property
    def cut_short(self) -> bool:
        """Whether it is still to be done, and nobody is at it."""
        return not self._done and self.claim is None

    def run(self, steps: Callable[[], object], claim: object = None) -> None:
        """Do it, unless it is done or another thread is at it."""
        mine = claim or object()
        try:
            with self._lock:
                if self._done or self.claim not in (None, mine):
                    return
                self.claim = mine
            steps()
            self._done = True
        finally:
            if self.claim is mine:
                self.claim = None


class Tally:
    """A number that many threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value = 0

    def add(self, number: int) -> None:
        with self._lock:
            self.value += number


def spawn(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread; daemon, so that one stuck in user code cannot keep the interpreter from leaving."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


def join_all(threads: Iterable[threading.Thread], deadline: Deadline) -> list[str]:
    """Wait for the threads to end; names those that did not in time. Passes over the caller and what never started."""
    stuck = []
    for thread in threads:
        if thread is threading.current_thread() or thread.ident is None:
            continue
        thread.join(deadline.remaining())
        if thread.is_alive():
            stuck.append(thread.name)
    return stuck


def run_safely(function: Callable[[], object], what: str) -> None:
    """Call user code from a library's thread: whatever it raises is logged, and the thread goes on."""
    try:
        function()
    except BaseException:  # SystemExit in a callback must not end a thread that others rely on
        log.exception("%s raised", what)


class _Background:
    """Runs user callbacks that are due on a thread which must not run them, such as the timer's; logs for it, too.

    Its threads exist while there is something to run: one callback that blocks does not keep the others waiting.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: deque[tuple[Callable[[], object], str]] = deque()
        self._unsaid: dict[tuple[logging.Logger, str, tuple[object, ...]], bool] = {}  # warnings, in their order
        self._threads = 0
        self._saying = False  # a thread logs: the others are for callbacks

    def run(self, function: Callable[[], object], what: str) -> None:
        self._due.append((function, what))
        self.look()

    def warn(self, logger: logging.Logger, text: str, *values: object) -> None:
        if len(self._unsaid) < UNSAID_WARNINGS:
            self._unsaid[logger, text, values] = True
        self.look()

    def look(self) -> bool:
        """Start a thread for what is due; asked again, also for what came when none could be started.

        False if none can be started. Logs nothing: whoever asks may hold a lock.
        """
        if not (self._due or (self._unsaid and not self._saying)) or sys.is_finalizing():
            return True  # at the end none starts; before Python 3.12, start() would wait for ever
        if self._lock.locked():  # perhaps by this very thread, if this is called by a finalizer
            return True  # whoever has it looks again behind it
        with self._lock:
            if self._threads == CALLBACK_THREADS:
                return True
            self._threads += 1
        thread = threading.Thread(target=self._work, name="natsync-callbacks-worker", daemon=True)
        try:
            thread.start()
        except BaseException as error:  # no more threads just now, or a Ctrl-C
            if thread.ident is None:
                with self._lock:
                    self._threads -= 1
            if not isinstance(error, RuntimeError):
                raise
            if self._due:
                self._unsaid[log, "no thread can be started for a callback; it waits", ()] = True
            return False
        return True

    def say(self) -> None:
        """Log the warnings that wait; for threads that hold no lock."""
        for warning in list(self._unsaid):
            if self._unsaid.pop(warning, False):  # else another thread says it
                logger, text, values = warning
                with contextlib.suppress(Exception):  # of a handler of the user's: no reason to lose this thread
                    logger.warning(text, *values)

    def _work(self) -> None:
        while True:
            with self._lock:
                logs = not self._due and bool(self._unsaid) and not self._saying
                if not (self._due or logs):
                    self._threads -= 1
                    break
                function, what = (self.say, "logging") if logs else self._due.popleft()
                self._saying = self._saying or logs
            run_safely(function, what)
            if logs:
                self._saying = False
        self.look()


_background = _Background()
_fork_generation = 0
_fork_callbacks: list[Callable[[], None]] = []


def run_soon(function: Callable[[], object], what: str) -> None:
    """Have user code called on a worker thread, soon; for the reader and the timer."""
    _background.run(function, what)


def run_waiting() -> None:
    """Have that called for which no thread could be started when it was due; to be asked for now and then.

    Not under a lock: if there is still no thread, the warnings that wait are logged here.
    """
    if not _background.look():
        _background.say()


def warn_soon(logger: logging.Logger, text: str, *values: object) -> None:
    """Have a warning logged by a thread that holds no lock: a handler of the user's may block, or call natsync.

    For who may hold one. A warning that is given again before it was logged is logged once.
    """
    _background.warn(logger, text, *values)


def fork_generation() -> int:
    """A number that differs between a process and its forked children: what was made under another is not ours.

    Finds out too about a fork that Python was not told of, as uWSGI's without py-call-osafterfork.
    """
    if not at_home[0]:
        _renew()
    return _fork_generation


def after_fork_in_child(callback: Callable[[], None]) -> None:
    """Have a module's own state made anew in every forked child, before anything else runs there."""
    _fork_callbacks.append(callback)


def at_exit(callback: Callable[[], None]) -> None:
    """Have callback() called when this process leaves in an orderly way; asked for again, it counts once.

    A child of multiprocessing leaves without Python's exit handlers (before 3.14), but has finalizers of its own. Where
    both are run, whichever comes first calls it.
    """
    atexit.unregister(callback)
    process = sys.modules.get("multiprocessing.process")
    if process is None or process.parent_process() is None:
        atexit.register(callback)
        return
    if callback not in _finalizers:
        _finalizers[callback] = sys.modules["multiprocessing.util"].Finalize(None, callback, exitpriority=0)
    atexit.unregister(_finalizers[callback])
    atexit.register(_finalizers[callback])


#: This process's; each calls its callback once.
_finalizers: dict[Callable[[], None], Callable[[], object]] = {}


class _ByProcessId:
    """The number that was set at [0], in the process that set it; 0 in any other."""

    def __init__(self) -> None:
        self[0] = 1

    def __getitem__(self, index: int) -> int:
        return self._value if self._process == os.getpid() else 0

    def __setitem__(self, index: int, value: int) -> None:
        self._value, self._process = value, os.getpid()


def _process_mark() -> mmap.mmap | _ByProcessId:
    """What has a number at [0] here, and 0 in a forked child until it is set there."""
    if sys.platform == "linux":
        try:
            # A page that a child gets as zeros. To look at it costs a tenth of asking for the process id.
            page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            page.madvise(_WIPE_ON_FORK)
        except (AttributeError, OSError, ValueError):  # a kernel before 4.14, a C library without madvise()
            return _ByProcessId()
        page[0] = 1
        return page
    return _ByProcessId()


#: Linux's number of MADV_WIPEONFORK, for which Python has no name.
_WIPE_ON_FORK = 18
#: At [0] a number that is another one in each forked child, but 255 forks further down: the quick form of
#: fork_generation(), for where a call costs too much. Differs from the one remembered: ask fork_generation().
at_home = _process_mark()
_renewing = threading.RLock()
_under_renewal = False


def _renew(*, told: bool = False) -> None:
    """Make anew what a forked child must not share; once, whichever of its threads notices first."""
    global _fork_generation, _background, _under_renewal
    with _renewing:
        if _under_renewal or (at_home[0] and not told):  # one of the callbacks asks, or another thread has done it
            return
        _under_renewal = True
        try:
            _fork_generation += 1
            _background = _Background()
            _finalizers.clear()
            for callback in _fork_callbacks:
                run_safely(callback, "what is made anew in a forked child")
        finally:
            _under_renewal = False
            at_home[0] = _fork_generation % 255 + 1


def _forked() -> None:
    """Python's own news of a fork: it counts whatever the mark says, which not every system wipes that says it does."""
    global _renewing, _under_renewal, _making_events
    _renewing, _under_renewal, _making_events = threading.RLock(), False, threading.Lock()
    _renew(told=True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
