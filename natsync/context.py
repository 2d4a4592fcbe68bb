"""Context: what tells a running piece of work that it should stop, by when it must, and on whose behalf it runs.

A context ends once, by cancel() or by its deadline, and takes everything derived from it along. Nothing here waits for
the work to stop. Locks are held only to change fields, never while a callback runs.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TypeVar

from natsync import closing, timers
from natsync.concurrency import (
    Deadline,
    SafeEvent,
    after_fork_in_child,
    check_timeout,
    fork_generation,
    run_safely,
    run_soon,
)
from natsync.errors import Cancelled, DeadlineExceeded, TimedOut
from natsync.headers import HeaderInput, Headers

T = TypeVar("T")

#: Headers that say on whose behalf a call is made: W3C Trace Context, and Baggage. Nested calls carry them on.
TRACE_HEADERS = ("traceparent", "tracestate", "baggage")

_current: ContextVar[Context | None] = ContextVar("natsync_context", default=None)
_Callback = tuple[Callable[[], object], bool]  # the function; whether it is the library's own, brief and non-blocking


class _Done(SafeEvent):
    """The event of a context; keeps the context alive, so that whoever holds only the event is still told."""

    context: Context | None


class Context:
    """A cancellation token with an optional deadline and values, handed from caller to callee.

    `Context()` ends only if cancelled. Derive from it: `ctx.with_timeout(5)`. Safe from any thread. As a context
    manager it is cancelled when the block is left, so that whatever was started under it stops.
    """

    __slots__ = (
        "__weakref__", "_callbacks", "_children", "_deadline", "_error", "_event", "_generation", "_lock", "_parent",
        "_pinned", "_timer", "_values",
    )  # fmt: skip

    def __init__(
        self,
        parent: Context | None = None,
        *,
        deadline: float | None = None,
        values: dict[Hashable, Any] | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._generation = fork_generation()
        self._deadline: float | None
        self._parent = parent
        self._values = values
        self._event: _Done | None = None
        self._error: Cancelled | DeadlineExceeded | None = None
        self._callbacks: dict[object, _Callback] = {}
        self._children: weakref.WeakSet[Context] | None = None
        self._pinned: set[Context] = set()  # children that have callbacks and must live until they ran
        self._timer: timers.Timer | None = None
        inherited: float | None = parent._deadline if parent is not None else None
        own = deadline is not None and (inherited is None or deadline < inherited)
        self._deadline = deadline if own else inherited
        if own and deadline is not None and (parent is None or parent._error is None):
            mine = weakref.ref(self)
            self._timer = timers.schedule(deadline, lambda: _expire(mine))
        if parent is not None:  # last: its end, in another thread, takes back the timer
            parent._adopt(self)

    # -- deriving ----------------------------------------------------------------------------------------------

    def with_cancel(self) -> Context:
        """A child that can be cancelled on its own."""
        return Context(self)

    def with_timeout(self, timeout: float | None) -> Context:
        """A child that ends at the latest `timeout` seconds from now; None adds no limit.

        Raises:
            InvalidArgument: the timeout is negative.
        """
        return Context(self, deadline=Deadline.after(check_timeout(timeout)).at)

    def with_deadline(self, deadline: float) -> Context:
        """A child that ends at the latest when time.monotonic() reaches `deadline`."""
        return Context(self, deadline=deadline)

    def with_value(self, key: Hashable, value: Any) -> Context:
        """A child that carries the value; children of it see it too."""
        return Context(self, values={key: value})

    def value(self, key: Hashable, default: Any = None) -> Any:
        """The value given for the key nearest to this context, or the default."""
        context: Context | None = self
        while context is not None:
            if context._values is not None and key in context._values:
                return context._values[key]
            context = context._parent
        return default

    # -- asking ------------------------------------------------------------------------------------------------

    @property
    def done(self) -> threading.Event:
        """Set when the context has ended. Wait on it, do not set it."""
        with self._own_lock():
            if self._event is None:
                self._event = _Done()
                self._event.context = self if self._error is None else None
                if self._error is not None:
                    self._event.set()
            return self._event

    @property
    def cancelled(self) -> bool:
        """Whether the context has ended, by cancel or by its deadline."""
        return self._error is not None or self._overdue()

    @property
    def reason(self) -> str | None:
        """Why it ended, as given to cancel(); "deadline exceeded" for the deadline; None while it lasts."""
        self._overdue()
        return None if self._error is None else str(self._error)

    @property
    def deadline(self) -> float | None:
        """The time.monotonic() at which the context ends by itself, or None."""
        return self._deadline

    def remaining(self) -> float | None:
        """Seconds until the deadline, at least 0; None without one."""
        return Deadline(self._deadline).remaining()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the context has ended or `timeout` seconds passed; whether it has ended."""
        return self.done.wait(check_timeout(timeout)) or self.cancelled

    def check(self) -> None:
        """Return if the work may go on.

        Raises:
            Cancelled: the context was cancelled; .reason says why.
            DeadlineExceeded: its deadline has passed.
        """
        if self._error is not None or self._overdue():
            raise self.error()

    def error(self) -> Cancelled | DeadlineExceeded:
        """A new exception of the kind that check() raises; call it only on a context that has ended."""
        assert self._error is not None
        return type(self._error)(str(self._error))

    # -- ending ------------------------------------------------------------------------------------------------

    def cancel(self, reason: str = "cancelled") -> None:
        """End this context and all derived from it; runs their on_cancel callbacks, here, before it returns.

        The first reason counts. A callback that raises is logged and the others run.
        """
        for callback in self._end(Cancelled(reason)):
            run_safely(callback, "an on_cancel callback")

    def cancel_soon(self, error: Cancelled | DeadlineExceeded) -> None:
        """End this context from a thread that must not run user code: callbacks run on a worker."""
        for callback in self._end(error):
            run_soon(callback, "an on_cancel callback")

    def on_cancel(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Have callback() called once when the context ends; returns a function that takes it back.

        It runs in the thread that cancels, or on a worker when the library does; at once, here, if the context has
        ended already. It should be brief.
        """
        return self._add(callback, internal=False)

    def on_end(self, callback: Callable[[], object]) -> Callable[[], None]:
        """on_cancel() for the library's own brief, non-blocking functions: runs in whichever thread ends it."""
        return self._add(callback, internal=True)

    @contextlib.contextmanager
    def closing(self, obj: T) -> Iterator[T]:
        """For a blocking read from a third party: `with ctx.closing(requests.get(url, stream=True)) as response:`.

        When the context ends, the socket under obj is shut down, so that a read blocked in another thread returns at
        once (close() alone would not wake it); when the block is left, obj is closed. Knows requests, urllib3,
        http.client, httpx, sockets and files made of them; of others cancel() or close() is called.
        """
        remove = self.on_cancel(lambda: closing.wake(obj))  # a user's object: never on a library's thread
        try:
            yield obj
        finally:
            remove()
            close = getattr(obj, "close", None)
            if callable(close):
                close()

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel("the block was left")

    def __repr__(self) -> str:
        state = f"ended: {self.reason}" if self.cancelled else "active"
        left = "" if self._deadline is None else f", {self.remaining():.3f} s left"
        return f"<{type(self).__name__} {state}{left}>"

    # -- within ------------------------------------------------------------------------------------------------

    def _overdue(self) -> bool:
        """End the context if its deadline has passed and the timer has not come round yet."""
        if self._error is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._expire()
        return self._error is not None

    def _expire(self) -> None:
        self.cancel_soon(DeadlineExceeded("deadline exceeded"))

    def _own_lock(self) -> threading.Lock:
        """The lock. In a forked child a new one: the parent's may be held by a thread that is not there."""
        if self._generation != fork_generation():
            with _renewing:
                context: Context | None = self
                while context is not None and context._generation != fork_generation():
                    context._renew()
                    context = context._parent
        return self._lock

    def _renew(self) -> None:
        """In a forked child: what was to be called at the end is the parent's; the deadline holds here too."""
        self._lock = threading.Lock()
        self._callbacks = {}
        self._pinned = set()
        if self._event is not None:
            self._event.renew()
        if self._timer is not None and self._deadline is not None and self._error is None:
            mine = weakref.ref(self)
            self._timer = timers.schedule(self._deadline, lambda: _expire(mine))
        self._generation = fork_generation()  # last: from here on other threads use what is new

    def _adopt(self, child: Context) -> None:
        with self._own_lock():
            error = self._error
            if error is None:
                if self._children is None:
                    self._children = weakref.WeakSet()
                self._children.add(child)
        if error is not None:
            child._end(error)

    def _forget(self, child: Context) -> None:
        with self._own_lock():
            self._pinned.discard(child)
            if self._children is not None:
                self._children.discard(child)

    def _add(self, callback: Callable[[], object], *, internal: bool) -> Callable[[], None]:
        key = object()
        with self._own_lock():
            ended = self._error is not None
            if not ended:
                self._callbacks[key] = (callback, internal)
        if ended:
            run_safely(callback, "an on_cancel callback")
            return lambda: None
        self._keep_or_let_go()
        return lambda: self._remove(key)

    def _remove(self, key: object) -> None:
        with self._own_lock():
            self._callbacks.pop(key, None)
        self._keep_or_let_go()

    def _needed(self) -> bool:
        """Whether this must be told of its parent's end, so that the parent has to hold it."""
        with self._own_lock():
            return self._error is None and bool(self._callbacks or self._pinned)

    def _keep_or_let_go(self) -> None:
        """Have every ancestor, and the timer of each, hold the next below it exactly if that is needed.

        No two locks are held at once: each step looks again afterwards, and whoever changes something looks too, so the
        last one to look leaves it right.
        """
        context: Context | None = self
        while context is not None:
            timer, parent = context._timer, context._parent
            if timer is None and parent is None:
                return  # nobody holds the uppermost
            needed = context._needed()
            if timer is not None:
                timer.keep = context if needed else None
            if parent is not None:
                with parent._own_lock():
                    if needed and parent._error is None:
                        parent._pinned.add(context)
                    else:
                        parent._pinned.discard(context)
            if context._needed() == needed:
                context = parent

    def _end(self, error: Cancelled | DeadlineExceeded) -> list[Callable[[], object]]:
        """Mark this context and all below as ended, run the library's callbacks; returns those of users, to be run."""
        users: list[Callable[[], object]] = []
        ending = [self]
        while ending:
            context = ending.pop()
            callbacks, children = context._end_alone(error)
            ending.extend(children)
            for function, internal in callbacks:
                if internal:
                    run_safely(function, "a callback at a context's end")
                else:
                    users.append(function)
        return users

    def _end_alone(self, error: Cancelled | DeadlineExceeded) -> tuple[list[_Callback], list[Context]]:
        """Mark this context as ended; its callbacks, and the children that end with it. Nothing if it had ended."""
        with self._own_lock():
            if self._error is not None:
                return [], []
            self._error = error
            event, timer = self._event, self._timer
            callbacks, self._callbacks = self._callbacks, {}
            pinned, self._pinned = self._pinned, set()
            children = list(pinned.union(self._children)) if self._children else list(pinned)
            self._timer = None
        if event is not None:
            event.set()
            event.context = None
        if timer is not None:
            timer.cancel()
        if self._parent is not None:
            self._parent._forget(self)
            if self._parent._error is None:  # otherwise its own end has seen to those above
                self._parent._keep_or_let_go()
        return list(callbacks.values()), children


def wait_under(ctx: Context | None, wake: Callable[[], object], wait: Callable[[Callable[[], bool]], T]) -> T:
    """wait(over) of some other thing than the context's end, which ends it too: wake() has it ask over() again.

    over() takes no lock. wake() is brief and non-blocking: it runs in whichever thread ends the context.

    Raises:
        What ctx.check() raises, if the context has ended; else what wait() raises.
    """
    if ctx is None:
        return wait(lambda: False)
    remove: Callable[[], None] | None = None
    try:
        remove = ctx.on_end(wake)
        result = wait(ctx.done.is_set)
    except TimedOut:
        ctx.check()  # its deadline may be what the wait had for its own
        raise
    finally:
        if remove is not None:
            remove()
    ctx.check()
    return result


def current() -> Context | None:
    """The context of the handler that runs in this thread, or None."""
    return _current.get()


class Running:
    """`with Running(ctx):` makes ctx the current() one, for what is called in the block."""

    __slots__ = ("_ctx", "_token")

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    def __enter__(self) -> None:
        self._token = _current.set(self._ctx)

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)


def traced(headers: HeaderInput, ctx: Context | None) -> HeaderInput:
    """The headers, and those that the context passes on."""
    passed = None if ctx is None else ctx.value(TRACE_HEADERS)
    if not passed:
        return headers
    merged = Headers(headers)
    for key, value in passed.items():
        merged.setdefault(key, value)
    return merged


_renewing = threading.Lock()


def _renew_in_child() -> None:
    global _renewing
    _renewing = threading.Lock()


after_fork_in_child(_renew_in_child)


def _expire(reference: weakref.ref[Context]) -> None:
    """The deadline has come: end the context, unless nobody holds it any more."""
    context = reference()
    if context is not None:
        context._expire()
