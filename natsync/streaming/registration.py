"""Handle: one registration of a handler, to wait for and to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable

from natsync import subject as _subject
from natsync.concurrency import Deadline, SafeEvent, check_timeout, fork_generation
from natsync.errors import Cancelled, ForkError, NatsError
from natsync.links import Status
from natsync.streaming.responder import Responder
from natsync.streaming.work import OpenStream, Work
from natsync.subscription import SubscriptionCore

log = logging.getLogger("natsync.streaming")

#: Seconds that cancelled handlers get to leave.
LEAVE_SECONDS = 2.0


class Handle:
    """One registration, in force until it is stopped or its context ends.

    Attributes:
        subject, queue: as registered.
        kind: "stream" or "request" for what the handler answers; "message" if it is given messages.
        ctx: the parent of every request's context; cancelling it stops the registration and everything under way.
            It has ended once stop() has returned.
    """

    def __init__(
        self, responder: Responder, core: SubscriptionCore, work: Work, forget: Callable[[Handle], None]
    ) -> None:
        self.subject = _subject.decode(core.subject)
        self.queue = None if core.queue is None else core.queue.decode()
        self.kind = work.kind
        self.ctx = work.ctx
        self._responder = responder
        self._core = core
        self._work = work
        self._forget = forget
        self._generation = fork_generation()
        self._stopped = SafeEvent()
        self._stop_watching: Callable[[], None] = lambda: None

    @property
    def stopped(self) -> bool:
        """Whether new requests are taken no more."""
        return self._stopped.is_set() or not self._core.active

    @property
    def idle(self) -> bool:
        """Whether nothing comes any more, nothing waits and nothing is under way."""
        return not self._core.active and not self._core.unhandled and not len(self._work)

    @property
    def stats(self) -> dict[str, int]:
        """received, processed, failed, cancelled, dropped (not handled for lack of room or time), active."""
        self._check_process()
        numbers = self._work.numbers()
        numbers["received"] += self._core.dropped
        numbers["dropped"] += self._core.dropped
        numbers["failed"] += self._core.failed
        return numbers

    def streams(self) -> list[OpenStream]:
        """The streams that the handler is answering now, the longest under way first."""
        self._check_process()
        return self._work.streams()

    @property
    def processing_ns(self) -> int:
        """Nanoseconds that requests took from their start to their end, those of ended ones together."""
        return self._work.processing_ns

    @property
    def last_error(self) -> str | None:
        """The type and text of the last error of the handler; None while it has not failed."""
        return self._work.last_error

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the registration is stopped, up to timeout seconds (None = no limit); whether it is."""
        self._check_process()
        return self._stopped.wait(check_timeout(timeout))

    def stop(self, timeout: float | None = None) -> None:
        """Take no more requests, and let those that came finish.

        Blocks until they have, up to timeout seconds (None = no limit, 0 = do not wait); what is still running then
        is cancelled, and what waits for its turn turned away. Idempotent; from a handler it does not wait.
        """
        deadline = Deadline.after(check_timeout(timeout))
        self._check_process()
        self.leave(deadline)
        if self._responder.in_handler():
            return
        idle, reason = self.wait_idle(deadline), f"the registration of {self.subject!r} was stopped"
        self.cancel(reason)
        self.ctx.cancel_soon(Cancelled(reason))
        if not idle:
            self._work.wait_idle(Deadline.after(LEAVE_SECONDS if timeout else 0))

    def renew(self) -> None:
        """In a forked child: another thread of the parent may have held the lock at the fork."""
        self._stopped.renew()

    def _check_process(self) -> None:
        if self._generation != fork_generation():
            raise ForkError("this registration belongs to the parent process")

    def connection_closed(self) -> None:
        """The connection ended for good, and the registration with it."""
        self._stopped.set()

    def in_force(self) -> None:
        """The subscription is in place: from now on the end of the context ends it."""
        connection = self._responder.connection
        self._stop_watching = self.ctx.on_end(lambda: connection.in_supervisor(self._context_ended))

    def _context_ended(self) -> None:
        """Have the server send no more; what was on its way until its PONG is answered, with an error."""
        self._responder.connection.stop_intake(self._core)
        self._end_later()

    def _end_later(self) -> None:
        """End when the server has no more to bring: nobody who has asked is left without an answer."""
        connection = self._responder.connection
        connection.after_round_trip(lambda: connection.in_supervisor(self._end))

    def _stop(self) -> None:
        self._stop_watching()
        self._forget(self)
        self._stopped.set()

    def leave(self, deadline: Deadline) -> None:
        """Have the server send no more, and take what was on its way; in a handler without waiting."""
        connection = self._responder.connection
        if self._stopped.is_set():
            return
        connection.stop_intake(self._core)
        if connection.status is not Status.CONNECTED:
            self._end()
            return
        try:
            if not self._responder.in_handler():
                connection.confirm(deadline)
                self._end()
                return
        except NatsError as error:
            log.debug("the end of %r was not confirmed: %s", self.subject, error)
        self._end_later()
        self._stop()

    def undo(self) -> None:
        """The registration was cut short: it is as if it had not been made."""
        self._end()

    def wait_idle(self, deadline: Deadline) -> bool:
        """Block until nothing waits and nothing is under way; False if the deadline came first."""
        return self._core.wait_empty(deadline) and self._work.wait_idle(deadline)

    def cancel(self, reason: str) -> int:
        """Cancel what is under way, and turn away what waits and what still comes; how many requests that were.

        Plain messages that wait are dropped; the handler of one cannot be cancelled, and counts too.
        """
        cancelled = self._work.cancel(reason)  # first: from here on no worker begins with another
        dropped, handling = self._core.abandon()
        return dropped + (handling if self.kind == "message" else cancelled)

    def _end(self) -> None:
        self._responder.connection.unsubscribe(self._core)
        self._stop()

    def __repr__(self) -> str:
        queue = f", queue={self.queue!r}" if self.queue else ""
        state = "stopped" if self.stopped else "active"
        return f"<Handle {self.subject!r}{queue}: {state}, {len(self._work)} under way>"
