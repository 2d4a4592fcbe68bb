"""Replies: one request, and the replies of everybody who answers it, as they come.

The rules are those of ADR-47 (Request Many) of the NATS project. The reader's thread queues what comes; the caller's
thread takes it, and finds out when there is to be no more. Nothing but the user holds the Replies.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeAlias

from natsync import subject as _subject
from natsync.closable import Closable
from natsync.concurrency import Deadline, check_timeout, fork_generation, in_turn
from natsync.connection import Connection
from natsync.context import Context
from natsync.errors import ForkError, InvalidArgument, NoRespondersError, SlowConsumerError, StreamEnded, TimedOut
from natsync.headers import Headers
from natsync.hooks import Watch
from natsync.message import Item, Message, to_bytes
from natsync.middleware import Passage
from natsync.reply import ERROR_HEADER, Asking, is_no_responders, no_reply, open_for
from natsync.subscription import PENDING_BYTES, PENDING_MESSAGES

#: What ends the replies: a payload, or a function that is shown each reply and returns whether to go on.
Sentinel: TypeAlias = "bytes | str | Callable[[Message], object] | None"


_NO_DEADLINE = Deadline()


class _NotYet(Exception):
    """A wait for the next reply is over, and the replies are not."""


class _Many(Asking):
    """The replies that have come and were not taken yet."""

    def __init__(self, subject: bytes) -> None:
        super().__init__(subject)
        self.queue: deque[Item] = deque()
        self.bytes_in = 0
        self.bytes_out = 0  # each is changed by one thread only

    def deliver(self, items: list[Item]) -> None:
        for item in items:
            if is_no_responders(item):
                self.fail(NoRespondersError(_subject.decode(self.subject)))
                continue
            size = len(item[2])
            if (
                len(self.queue) >= PENDING_MESSAGES or self.bytes_in - self.bytes_out + size > PENDING_BYTES
            ) and self.queue:
                self.late += 1
                self.fail(SlowConsumerError(f"replies came faster than they were taken: {len(self.queue)} wait"))
            else:
                self.bytes_in += size
                self.queue.append(item)
        self.signal.set()

    def take(self) -> Item | None:
        try:
            item = self.queue.popleft()
        except IndexError:  # perhaps close() has just thrown away what there was
            return None
        self.bytes_out += len(item[2])
        return item


class Replies(Closable[Message]):
    """The replies to one request: iterate or call next(); leave by break or close(), from any thread.

    Made by Client.request_many(). One thread takes at a time; another one waits for it. A Replies that is dropped
    stops listening.

    Attributes:
        subject: where the request went.
    """

    def __init__(
        self,
        connection: Connection,
        owner: object,
        subject: str,
        payload: bytes,
        block: bytes | None,
        *,
        timeout: float | None,
        stall: float | None = None,
        max_messages: int | None = None,
        sentinel: Sentinel = None,
        ctx: Context | None = None,
        watch: Watch | None = None,
        passage: Passage | None = None,
    ) -> None:
        self.subject = subject
        self._connection = connection
        self._owner = owner  # keeps the client alive as long as somebody reads
        self._timeout = timeout
        self._deadline = Deadline.after(timeout)
        self._stall = stall or None
        self._stalled: Deadline | None = None  # when it is over, from the first wait for a reply on
        self._most = max_messages
        self._goes_on = _going_on(sentinel)
        self._ctx = ctx or Context()
        self._watch = watch
        self._passage = passage
        self._given = 0
        self._over = False
        self._generation = fork_generation()
        self._taking = threading.Lock()
        self._many = many = _Many(_subject.publish_subject(subject))
        self._ctx.check()
        start = self._deadline.or_sooner(self._ctx.remaining())
        open_for(connection, many.subject, start, ctx)
        connection.mux.check_allowed()
        self._token, self._inbox = connection.mux.address()
        self._stop_watching: Callable[[], None] = lambda: None
        self._at_end: list[Callable[[], object]] = []
        try:
            connection.mux.register(self._token, many)
            self._stop_watching = self._ctx.on_end(many.signal.set)
            many.send(connection, self._inbox, block, payload, start, ctx)
        except BaseException:
            self._stop_listening()
            self._take_back()
            raise

    def __iter__(self) -> Iterator[Message]:
        return self

    def __next__(self) -> Message:
        message = self._take(_NO_DEADLINE)
        if message is None:
            raise StopIteration
        return message

    def next(self, timeout: float | None = None) -> Message:
        """The next reply; blocks up to timeout seconds (None = until the replies end, 0 = do not wait).

        Raises:
            StreamEnded: there are no more.
            TimedOut: none came in time; more may come.
            What iterating raises, see Client.request_many().
        """
        message = self._take(Deadline.after(check_timeout(timeout)))
        if message is None:
            raise StreamEnded(f"the replies to {self.subject!r} are over")
        return message

    def _take(self, until: Deadline) -> Message | None:
        if self._generation != fork_generation():
            raise ForkError("these replies belong to the parent process")
        late = f"no reply to {self.subject!r} in time: another thread is waiting for it"
        return in_turn(self._taking, until, late, self._take_in_turn)

    def _take_in_turn(self, until: Deadline) -> Message | None:
        try:
            message = self._next(until)
        except _NotYet:
            raise TimedOut(f"no reply to {self.subject!r} in time; more may come") from None
        except Exception as error:
            self._finish(error)
            raise
        if message is None:
            self._finish(None)
        return message

    def _next(self, until: Deadline) -> Message | None:
        """The next reply; None if there is to be no more."""
        if self._over or (self._most is not None and self._given >= self._most):
            return None
        item = self._wait(until)
        if item is None:
            return None
        self._stalled = None
        message = Message.received(self._inbox, item, self._connection.publish_answer)
        if self._passage is not None:
            self._passage.reply_headers = Headers()
            message = self._passage.received(message)
        if not self._goes_on(message):
            return None
        self._given += 1
        return message

    def _wait(self, until: Deadline) -> Item | None:
        many, limit = self._many, self._deadline
        if limit.expired:
            self._stop_listening()  # what has come by now is the rest
        if self._given and self._stall is not None:
            self._stalled = self._stalled or Deadline.after(self._stall)  # outlasts waits that are shorter
            limit = limit.or_sooner(self._stalled.remaining())
        while True:
            if self._over:  # looked at first: the end takes the context with it
                return None
            self._ctx.check()
            item = many.take()
            if item is not None:
                return item
            if many.error is not None:
                raise many.error
            if many.signal.wait(limit.or_sooner(until.remaining())):
                continue
            if limit.expired:
                self._stop_listening()
                item = many.take()
                if item is None and self._take_back():
                    raise no_reply(self.subject, self._timeout, sent=False)
                return item
            if until.expired and not many.queue:
                raise _NotYet

    def close(self) -> None:
        """Take no more; a thread that waits for the next reply finds the end. Idempotent, from any thread.

        A request that still waits for a link is taken back.
        """
        if self._generation == fork_generation():
            self._finish(None)
            self._many.signal.set()

    def when_finished(self, callback: Callable[[], object]) -> None:
        """Have callback() called once when nothing more comes; brief and non-blocking, in any thread."""
        self._at_end.append(callback)
        if self._over:
            self._tell_end()

    def _tell_end(self) -> None:
        for callback in tuple(self._at_end):  # twice does no harm; one that a Ctrl-C cuts short is called again
            callback()
            with contextlib.suppress(ValueError):  # another thread ends it, too
                self._at_end.remove(callback)

    def _finish(self, error: Exception | None) -> None:
        self._over = True
        self._stop_listening()
        self._take_back()
        mux, many = self._connection.mux, self._many
        mux.late, many.late = mux.late + many.late + len(many.queue), 0
        many.queue.clear()
        if self._watch is not None:
            self._watch.tell_once("request_done", self._watch.seconds, error)
        self._tell_end()

    def _stop_listening(self) -> None:
        self._connection.mux.waiters.pop(self._token, None)
        self._stop_watching()

    def _take_back(self) -> bool:
        """Nobody waits for replies: a request that still waits for a link must not run later. Whether there was one."""
        return not self._given and self._connection.withdraw(self._many.frame)

    def __del__(self) -> None:
        token = getattr(self, "_token", None)
        if token is None or self._over or self._generation != fork_generation():
            return
        # A finalizer may run anywhere, inside any lock: leave the work to the supervisor, and the hooks to a worker.
        self._over = True
        mux, stop_watching = self._connection.mux, self._stop_watching
        mux.waiters.pop(token, None)
        watch, workers, at_end = self._watch, self._connection.dispatcher.workers, self._at_end
        connection, frame = self._connection, self._many.frame

        def let_go() -> None:
            stop_watching()
            connection.withdraw(frame)
            for callback in at_end:
                callback()
            if watch is not None:
                workers.submit(lambda: watch.tell_once("request_done", watch.seconds, None))

        connection.in_supervisor(let_go)

    def __repr__(self) -> str:
        return f"<Replies to {self.subject!r}: {'over' if self._over else 'open'}, {self._given} taken>"


def check_many(max_messages: int | None, sentinel: Sentinel) -> None:
    """Raise InvalidArgument or TypeError if these say nothing that can be meant."""
    if max_messages is not None and (isinstance(max_messages, bool) or not isinstance(max_messages, int)):
        raise TypeError(f"max_messages is a whole number or None, not {type(max_messages).__name__}")
    if max_messages is not None and max_messages < 1:
        raise InvalidArgument(f"max_messages={max_messages}: at least 1, or None for no limit")
    if not (sentinel is None or callable(sentinel)):
        to_bytes(sentinel)


def _going_on(sentinel: Sentinel) -> Callable[[Message], object]:
    if sentinel is None:
        return lambda message: True
    if callable(sentinel):
        return sentinel
    last = to_bytes(sentinel)
    # A failed handler's reply is empty too, but is no end: others may still answer.
    return lambda message: message.data != last or ERROR_HEADER in message.headers
