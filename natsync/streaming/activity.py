"""Activity: the requests that one registration has under way."""

from __future__ import annotations

import threading

from natsync.concurrency import Deadline
from natsync.context import Context
from natsync.errors import Cancelled


class Activity:
    """Requests of one registration that are under way: what stop() and close() wait for, and cancel in the end."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._contexts: set[Context] = set()

    def begin(self, ctx: Context) -> None:
        with self._changed:
            self._contexts.add(ctx)

    def end(self, ctx: Context) -> None:
        with self._changed:
            self._contexts.discard(ctx)
            if not self._contexts:
                self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._contexts)

    def wait_idle(self, deadline: Deadline) -> bool:
        """Block until nothing is under way; False if the deadline came first."""
        with self._changed:
            while self._contexts:
                if deadline.expired or not self._changed.wait(deadline.remaining()):
                    return not self._contexts
        return True

    def cancel(self, reason: str) -> None:
        with self._changed:
            contexts = list(self._contexts)
        for ctx in contexts:
            ctx.cancel_soon(Cancelled(reason))
