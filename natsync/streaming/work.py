"""Work: the requests of one registration: which are under way, how many there were, and the context they run under."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass

from natsync.concurrency import Deadline, SafeCondition, fork_generation
from natsync.context import Context
from natsync.errors import Cancelled
from natsync.hooks import Kind
from natsync.streaming.sender import SenderCore, describe

#: What is counted. received = the other four and those under way.
COUNTED = ("received", "processed", "failed", "cancelled", "dropped")


_numbers = itertools.count(1)
#: Why contexts end with their requests; they keep no more of it than kind and text.
_OVER = Cancelled("the request is over")


@dataclass(frozen=True)
class OpenStream:
    """A stream that a handler is answering, as it was when it was asked for.

    Attributes:
        number: another one for each in this process.
        mode: "framed" or "plain".
        state: "open"; "waiting" if send() waits for room; "silent" if the requester is not heard from; "no link".
        seconds: since its request was taken.
        chunks, size_bytes: that the handler has sent.
    """

    number: int
    mode: str
    state: str
    seconds: float
    chunks: int
    size_bytes: int


class _Begun:
    """What is under way: since when, under which number, and its response if that is a stream."""

    __slots__ = ("at_ns", "core", "number")

    def __init__(self, core: SenderCore | None) -> None:
        self.at_ns = time.perf_counter_ns()
        self.number = next(_numbers)
        self.core = core


class Work:
    """What stop() and close() wait for, and cancel in the end.

    Attributes:
        ctx: the parent of every request's context.
        kind: what its handler answers: "stream", "request", or nothing, being given every "message".
        processing_ns: nanoseconds for which requests that are over were under way.
        last_error: the type and text of the last error of a handler; None before the first.
        subject, queue: as registered, wildcards included.
        limit: how many requests may be under way at once; None = as many as the subscriber's limits allow.
        overdue: whether the time for requests is over: none begins any more.
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
        self.overdue = False
        self.warned = False
        self._generation = fork_generation()
        self._lock = threading.Lock()
        self._changed = SafeCondition(self._lock)
        self._under_way: dict[Context, _Begun] = {}
        self._numbers = dict.fromkeys(COUNTED, 0)

    def count(self, what: str) -> None:
        if not self._at_home():
            return
        with self._lock:
            self._numbers[what] += 1

    def begin(self, ctx: Context, core: SenderCore | None = None) -> bool:
        """The request is under way from here on; False if none may be any more."""
        begun = _Begun(core)
        if self._at_home():
            with self._lock:
                if self.overdue:
                    return False
                self._under_way[ctx] = begun
        return True

    def _at_home(self) -> bool:
        """Not in a child that a handler forked: its requests are the parent's, and the lock may be held for ever."""
        return self._generation == fork_generation()

    def end(self, ctx: Context, outcome: str, error: BaseException | None = None) -> None:
        """The request is over: counted, its context ended, and whoever waits for the last one told. Idempotent."""
        if not self._at_home():
            return
        ctx.cancel_soon(_OVER)
        now = time.perf_counter_ns()
        with self._lock:
            if ctx in self._under_way:
                self._failed_locked(error)
                # No call from here on, so that a Ctrl-C finds it either under way or counted.
                self.processing_ns += now - self._under_way[ctx].at_ns
                self._numbers[outcome] += 1
                del self._under_way[ctx]
            if not self._under_way:
                self._changed.notify_all()

    def took(self, began: int, error: BaseException | None = None) -> None:
        """A handler that nobody waits for has taken from `began` until now."""
        if not self._at_home():
            return
        with self._lock:
            self.processing_ns += time.perf_counter_ns() - began
            self._failed_locked(error)

    def _failed_locked(self, error: BaseException | None) -> None:
        if error is not None:
            name, text = type(error).__name__, describe(error)
            self.last_error = text if text.startswith(f"{name}: ") else f"{name}: {text}"

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

    def streams(self) -> list[OpenStream]:
        """The streams under way, the longest first."""
        with self._lock:
            under_way = list(self._under_way.values())
        now = time.perf_counter_ns()
        return [
            OpenStream(
                begun.number,
                core.mode,
                core.state,
                (now - begun.at_ns) / 1e9,
                core.count,
                core.queued_bytes,
            )
            for begun in under_way
            if (core := begun.core) is not None
        ]

    def wait_idle(self, deadline: Deadline) -> bool:
        """Block until nothing is under way; False if the deadline came first."""
        with self._lock:
            while self._under_way:
                if deadline.expired or not self._changed.wait(deadline.remaining()):
                    return not self._under_way
        return True

    def cancel(self, reason: str) -> int:
        """End the context of everything under way, and let nothing more begin; how many requests that were."""
        with self._lock:
            self.overdue = True
            contexts = list(self._under_way)
        for ctx in contexts:
            ctx.cancel_soon(Cancelled(reason))
        return len(contexts)
