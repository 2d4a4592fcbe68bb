"""Work: the requests of one registration: which are under way, how many there were, and the context they run under."""

from __future__ import annotations

import threading
import time

from natsync.concurrency import Deadline
from natsync.context import Context
from natsync.errors import Cancelled
from natsync.hooks import Kind
from natsync.streaming.sender import describe

#: What is counted. received = the other four and those under way.
COUNTED = ("received", "processed", "failed", "cancelled", "dropped")


class Work:
    """What stop() and close() wait for, and cancel in the end.

    Attributes:
        ctx: the parent of every request's context.
        kind: what its handler answers: "stream", "request", or nothing, being given every "message".
        processing_ns: nanoseconds for which requests that are over were under way.
        last_error: the type and text of the last error of a handler; None before the first.
        subject, queue: as registered, wildcards included.
        limit: how many requests may be under way at once; None = as many as the subscriber's limits allow.
        warned: whether a request without a reply subject was logged; one is enough.
    """

    def __init__(
        self, ctx: Context, kind: Kind, subject: str, queue: str | None = None, limit: int | None = None
    ) -> None:
        self.ctx = ctx
        self.kind: Kind = kind
        self.processing_ns = 0
        self.last_error: str | None = None
        self.subject = subject
        self.queue = queue
        self.limit = limit
        self.warned = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._under_way: dict[Context, int] = {}  # and when it began
        self._numbers = dict.fromkeys(COUNTED, 0)

    def count(self, what: str) -> None:
        with self._lock:
            self._numbers[what] += 1

    def begin(self, ctx: Context) -> None:
        with self._lock:
            self._under_way[ctx] = time.perf_counter_ns()

    def end(self, ctx: Context, outcome: str, error: BaseException | None = None) -> None:
        """The request is over: counted, its context ended, and whoever waits for the last one told."""
        ctx.cancel_soon(Cancelled("the request is over"))
        with self._lock:
            self._numbers[outcome] += 1
            began = self._under_way.pop(ctx, None)
            if began is not None:
                self._took_locked(began, error)
            if not self._under_way:
                self._changed.notify_all()

    def took(self, began: int, error: BaseException | None = None) -> None:
        """A handler that nobody waits for has taken from `began` until now."""
        with self._lock:
            self._took_locked(began, error)

    def _took_locked(self, began: int, error: BaseException | None) -> None:
        self.processing_ns += time.perf_counter_ns() - began
        if error is not None:
            self.last_error = f"{type(error).__name__}: {describe(error)}"

    def __len__(self) -> int:
        return len(self._under_way)

    @property
    def full(self) -> bool:
        """Whether no more may be under way."""
        return self.limit is not None and len(self._under_way) >= self.limit

    def numbers(self) -> dict[str, int]:
        """The counters, and active: how many are under way."""
        with self._lock:
            return {**self._numbers, "active": len(self._under_way)}

    def wait_idle(self, deadline: Deadline) -> bool:
        """Block until nothing is under way; False if the deadline came first."""
        with self._lock:
            while self._under_way:
                if deadline.expired or not self._changed.wait(deadline.remaining()):
                    return not self._under_way
        return True

    def cancel(self, reason: str) -> None:
        """End the context of everything under way."""
        with self._lock:
            contexts = list(self._under_way)
        for ctx in contexts:
            ctx.cancel_soon(Cancelled(reason))
