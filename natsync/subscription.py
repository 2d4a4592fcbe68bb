"""Subscription: the messages of one SUB, waiting for whoever takes them.

The reader puts messages in and never waits; when the pending limits are reached, the overflow policy decides which
message is lost, and every loss is counted. Messages are taken by next(), by iteration, or by a callback on workers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal, Protocol, TypeAlias

from natsync import timers
from natsync.closable import Closable
from natsync.concurrency import Deadline, SafeCondition, check_timeout, fork_generation
from natsync.errors import ConnectionClosed, DrainTimeout, ForkError, InvalidArgument, SlowConsumerError, TimedOut
from natsync.headers import Headers
from natsync.message import Item, Message, Payload
from natsync.protocol import Batch
from natsync.workers import WorkerPool

log = logging.getLogger("natsync.subscription")

Overflow: TypeAlias = Literal["drop_new", "drop_old", "error"]
Callback: TypeAlias = Callable[[Message], object]

#: Messages that may wait to be taken. Default of the Go system and of early nats.go (65,536).
PENDING_MESSAGES = 65_536
#: Bytes of payload that may wait to be taken. Default of nats.go (DefaultSubPendingBytesLimit).
PENDING_BYTES = 64 << 20
#: Seconds after which messages whose worker could not be started are given another try.
TRY_AGAIN_SECONDS = 1.0
#: Messages one worker handles before it lets others of the pool go first.
_TURN = 64


class Link(Protocol):
    """What a subscription needs of its connection."""

    def unsubscribe(self, core: SubscriptionCore) -> None: ...
    def stop_intake(self, core: SubscriptionCore) -> None: ...
    def publish_answer(self, reply: str, payload: Payload, headers: Headers | None) -> None: ...
    def confirm(self, deadline: Deadline) -> None: ...
    def slow_consumer(self, subject: str, dropped: int) -> None: ...
    def count_dropped(self, messages: int) -> None: ...
    def in_supervisor(self, task: Callable[[], None]) -> None: ...


class SubscriptionCore:
    """What the dispatcher holds of a subscription; users hold a Subscription."""

    def __init__(
        self,
        link: Link,
        subject: bytes,
        queue: bytes | None,
        *,
        max_messages: int | None = None,
        pending_messages: int = PENDING_MESSAGES,
        pending_bytes: int = PENDING_BYTES,
        overflow: Overflow = "drop_new",
        callback: Callback | None = None,
        concurrency: int = 1,
        pool: WorkerPool | None = None,
    ) -> None:
        called = callback is not None
        check_limits(max_messages, pending_messages, pending_bytes, overflow, concurrency, called=called)
        self.sid = b""  # given by the dispatcher
        self.position = 0  # of its SUB in the present link's outbox
        self.subject = subject
        self.queue = queue
        self.max_messages = max_messages
        self.received = 0
        self.delivered = 0
        self.dropped = 0
        self.failed = 0
        self.active = True
        self.draining = False
        self._link = link
        self._limit_messages = pending_messages
        self._limit_bytes = pending_bytes
        self._overflow = overflow
        self._callback = callback
        self._concurrency = concurrency
        self._pool = pool
        self._lock = threading.Lock()
        self._changed = SafeCondition(self._lock)
        self._pending: deque[tuple[bytes, Item, float]] = deque()  # and when it came
        self._pending_bytes = 0
        self._running = 0  # workers on this subscription
        self._trying = False  # the timer will call for workers again
        self._busy: set[int] = set()  # ids of those of them that are inside the callback
        self._slow = False
        self._error: Exception | None = None

    # -- the reader --------------------------------------------------------------------------------------------

    def deliver(self, batch: Batch) -> None:
        """Take the messages of one read. Never waits."""
        items = batch.items
        with self._lock:
            if not self.active:
                return
            if self.max_messages is not None:
                items = items[: self.max_messages - self.received]
            self.received += len(items)
            before = self.dropped
            refused = self._admit_locked(batch.subject, items)
            dropped = self.dropped - before
            episode = dropped > 0 and not self._slow
            self._slow = self._slow or dropped > 0
            over = self.received == self.max_messages or self._error is not None
            self._wake_locked()
        if dropped:
            self._link.count_dropped(dropped)
        if over:
            self._link.unsubscribe(self)
        if refused:
            self.refused(batch.subject, refused)
        if episode:
            self._link.slow_consumer(self.subject.decode("utf-8", "replace"), self.dropped)

    def refused(self, subject: bytes, items: list[Item]) -> None:
        """These found no room, and are counted as dropped; for those who tell the sender. Never waits."""

    def _admit_locked(self, subject: bytes, items: list[Item]) -> list[Item]:
        """Queue what the limits allow; which of them they did not. Requires _lock."""
        if not self._pending:
            self._pending_bytes = 0  # whatever a Ctrl-C kept from being counted
        size = sum([len(item[2]) for item in items])
        if len(self._pending) + len(items) <= self._limit_messages and self._pending_bytes + size <= self._limit_bytes:
            now = time.monotonic()
            self._pending.extend([(subject, item, now) for item in items])
            self._pending_bytes += size
            return []
        return [item for item in items if not self._admit_one_locked(subject, item)]

    def _admit_one_locked(self, subject: bytes, item: Item) -> bool:
        size = len(item[2])
        if self._error is not None:
            self.dropped += 1
            return False
        if not self._has_room_locked(size) and self._overflow == "drop_old" and size <= self._limit_bytes:
            while self._pending and not self._has_room_locked(size):
                self._pending_bytes -= len(self._pending.popleft()[1][2])
                self.dropped += 1
        if self._has_room_locked(size):
            self._pending.append((subject, item, time.monotonic()))
            self._pending_bytes += size
            return True
        self.dropped += 1
        if self._overflow == "error":
            self._error = SlowConsumerError(
                f"subscription {self.subject.decode('utf-8', 'replace')!r}: {len(self._pending)} messages "
                f"({self._pending_bytes} bytes) were waiting when one more came; take them faster or raise the limits"
            )
        return False

    def _has_room_locked(self, size: int) -> bool:
        return len(self._pending) < self._limit_messages and self._pending_bytes + size <= self._limit_bytes

    def _wake_locked(self) -> None:
        if self._callback is None:
            self._changed.notify_all()
            return
        assert self._pool is not None
        while self._running < self._concurrency and self._running - len(self._busy) < len(self._pending):
            self._running += 1
            if not self._pool.submit(self._run):
                self._running -= 1
                if not self._running and not self._pool.closed and not self._trying:
                    self._trying = True
                    timers.schedule_after(TRY_AGAIN_SECONDS, self._try_again)
                return

    def _try_again(self) -> None:
        """No thread could be started for what waits."""
        with self._lock:
            self._trying = False
            if self._pending:
                self._wake_locked()

    # -- takers ------------------------------------------------------------------------------------------------

    def take(self, deadline: Deadline) -> Message | None:
        """The next message; None once the subscription has ended and nothing is left.

        Raises:
            TimedOut: nothing came by the deadline.
            SlowConsumerError: overflow="error", and what had room before the overflow has been taken.
        """
        with self._lock:
            while not self._pending:
                if self._error is not None:
                    raise self._error
                if not self.active:
                    return None
                if deadline.expired or not self._changed.wait(deadline.remaining()):
                    if self._pending:
                        break
                    raise TimedOut(f"no message on {self.subject.decode('utf-8', 'replace')!r} in time")
            return self._pop_locked()

    def _pop_locked(self) -> Message:
        subject, item, came_at = self._pending.popleft()
        self._pending_bytes -= len(item[2])
        self.delivered += 1
        if not self._pending:
            self._slow = False
            self._changed.notify_all()
        message = Message.received(subject, item, self._link.publish_answer)
        message.came_at = came_at
        return message

    def _run(self) -> None:
        """A turn of one worker: hand messages to the callback until none is left or others should go first."""
        assert self._callback is not None
        assert self._pool is not None
        me, generation = threading.get_ident(), fork_generation()
        for _ in range(_TURN):
            with self._lock:
                self._busy.discard(me)
                if not self._pending:
                    self._running -= 1
                    self._changed.notify_all()
                    return
                self._busy.add(me)  # before it is taken: see unhandled
                message = self._pop_locked()
            try:
                self._callback(message)
            except BaseException:  # SystemExit in a callback must not leave the subscription stuck
                self.failed += 1
                log.exception("the callback for %r raised", message.subject)
            del message
            if generation != fork_generation():
                return  # a child that the callback forked: the rest is its parent's
        with self._lock:
            self._busy.discard(me)
        if not self._pool.submit(self._run):
            with self._lock:
                self._running -= 1
                self._changed.notify_all()

    # -- ending ------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        return len(self._pending)

    @property
    def unhandled(self) -> int:
        """Messages that wait, or are in the callback. Looks without the lock, first at those that wait: misses none."""
        return len(self._pending) + len(self._busy)

    @property
    def pending_bytes(self) -> int:
        return self._pending_bytes

    @property
    def has_callback(self) -> bool:
        return self._callback is not None

    @property
    def limits(self) -> tuple[int | None, int]:
        """(max_messages, received): what a new link must be told to deliver the rest only."""
        return self.max_messages, self.received

    def deactivate(self, error: Exception | None = None, *, forget: bool = False) -> None:
        """No more messages come; what waits can still be taken, unless it is to be forgotten."""
        with self._lock:
            self.active = False
            self._error = self._error or error
            if forget:
                self.dropped += len(self._pending)
                self._pending.clear()
                self._pending_bytes = 0
            self._changed.notify_all()

    def abandon(self) -> tuple[int, int]:
        """Refuse what waits: how many messages that were, and how many are in the callback."""
        with self._lock:
            waiting, handling = list(self._pending), len(self._busy)
            self._pending.clear()
            self._pending_bytes = 0
            self.dropped += len(waiting)
            self._changed.notify_all()
        for subject, item, _ in waiting:
            self.refused(subject, [item])
        return len(waiting), handling

    def wait_empty(self, deadline: Deadline) -> bool:
        """Block until everything was taken and every callback has returned; False if the deadline came first.

        Called from the callback it does not wait: what comes behind it runs when it has returned.
        """
        with self._lock:
            while (self._pending or self._running) and threading.get_ident() not in self._busy:
                if not self._changed.wait(deadline.remaining()):
                    return not (self._pending or self._running)
        return True


class Subscription(Closable[Message]):
    """Messages of one subject, in the order in which the server sent them.

    Made by Client.subscribe(). Iterate it, call next(), or let its callback be called; each is safe from any thread,
    and a message goes to one taker. One without a callback that is dropped is unsubscribed when it is collected.

    Attributes:
        subject, queue: as subscribed.
        pending: messages waiting to be taken.
        delivered: messages taken so far.
        dropped: messages lost because the pending limits were reached.
    """

    def __init__(self, core: SubscriptionCore, link: Link, owner: object) -> None:
        self._core = core
        self._link = link
        self._owner = owner  # keeps the client alive as long as somebody reads
        self._generation = fork_generation()

    @property
    def subject(self) -> str:
        return self._core.subject.decode("utf-8", "surrogateescape")

    @property
    def queue(self) -> str | None:
        return None if self._core.queue is None else self._core.queue.decode("utf-8", "surrogateescape")

    @property
    def pending(self) -> int:
        return self._core.pending

    @property
    def delivered(self) -> int:
        return self._core.delivered

    @property
    def dropped(self) -> int:
        return self._core.dropped

    @property
    def active(self) -> bool:
        """Whether messages may still come."""
        return self._core.active

    def next(self, timeout: float | None = None) -> Message:
        """The next message; blocks up to timeout seconds (None = no limit, 0 = do not wait).

        Raises:
            TimedOut: nothing came in time.
            ConnectionClosed: the subscription has ended and nothing is left.
            SlowConsumerError: overflow="error" and the pending limits were reached.
            RuntimeError: the subscription has a callback, which takes the messages.
        """
        message = self._take(Deadline.after(check_timeout(timeout)))
        if message is None:
            raise ConnectionClosed(f"the subscription of {self.subject!r} has ended")
        return message

    def __iter__(self) -> Iterator[Message]:
        return self

    def __next__(self) -> Message:
        message = self._take(Deadline())
        if message is None:
            raise StopIteration
        return message

    def _take(self, deadline: Deadline) -> Message | None:
        if self._core.has_callback:
            raise RuntimeError(f"messages on {self.subject!r} go to the callback; next() and iteration have none")
        self._check_process()
        return self._core.take(deadline)

    def _check_process(self) -> None:
        if self._generation != fork_generation():
            raise ForkError("this subscription belongs to the parent process; subscribe anew in the child")

    def unsubscribe(self) -> None:
        """Stop at once: messages that wait are forgotten (and counted as dropped). Idempotent, does not block.

        No effect in a forked child, which may leave a block that its parent entered: the parent's goes on.
        """
        if self._generation != fork_generation():
            return
        self._link.unsubscribe(self._core)
        self._core.deactivate(forget=True)

    def close(self) -> None:
        """unsubscribe(), by the name that streams and replies have for it."""
        self.unsubscribe()

    def drain(self, timeout: float | None = 30.0) -> None:
        """Stop taking new messages, then wait until all that had reached the server's side of the link was handled.

        With a callback it blocks until the last one returned; without one, what came remains to be taken by next().

        Raises:
            DrainTimeout: not done within timeout seconds; the subscription is ended all the same.
        """
        deadline = Deadline.after(check_timeout(timeout))
        self._check_process()
        self._link.stop_intake(self._core)
        try:
            self._link.confirm(deadline)
        except TimedOut as error:
            raise DrainTimeout(f"the server did not confirm the end of {self.subject!r} in {timeout} s") from error
        finally:
            self._link.unsubscribe(self._core)
        if self._core.has_callback and not self._core.wait_empty(deadline):
            left = self._core.unhandled
            raise DrainTimeout(
                f"not drained within {timeout} s",
                undone=[f"{left} messages on {self.subject!r} not handled"],
                unhandled={self.subject: left},
            )

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is None or core.has_callback or not core.active or self._generation != fork_generation():
            return
        link = self._link  # a finalizer may run anywhere, inside any lock: leave the work to the supervisor
        link.in_supervisor(lambda: _release(link, core))

    def __repr__(self) -> str:
        queue = f", queue={self.queue!r}" if self.queue else ""
        return f"<Subscription {self.subject!r}{queue}: {self.pending} pending, {self.dropped} dropped>"


def _release(link: Link, core: SubscriptionCore) -> None:
    link.unsubscribe(core)
    core.deactivate(forget=True)


def check_limits(
    max_messages: int | None,
    pending_messages: int,
    pending_bytes: int,
    overflow: str,
    concurrency: int,
    *,
    called: bool = False,
) -> None:
    """called: whether there is a callback.

    Raises:
        InvalidArgument, TypeError: one cannot be used, or not together with a callback.
    """
    for name, value in (
        ("max_messages", max_messages if max_messages is not None else 1), ("pending_messages", pending_messages),
        ("pending_bytes", pending_bytes), ("concurrency", concurrency),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is a whole number, not {type(value).__name__}")
        if value < 1:
            raise InvalidArgument(f"{name}={value}: at least 1")
    if overflow not in ("drop_new", "drop_old", "error"):
        raise InvalidArgument(f"overflow={overflow!r}: 'drop_new', 'drop_old' or 'error'")
    if called and overflow == "error":  # it would just end, with nobody to raise to
        raise InvalidArgument("overflow='error' is for next() and iteration; with a callback 'drop_new' or 'drop_old'")
