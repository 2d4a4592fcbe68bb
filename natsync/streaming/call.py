"""The requester's side of a stream: Call takes what the reader brings; Stream is what users iterate.

The reader appends whole reads to the call's queue and wakes the consumer once; the consumer takes all that has gathered
and then hands out chunk by chunk without a lock. A call ends once; the reason is raised in the consumer's thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TypeVar

from natsync import headers as _headers
from natsync import subject as _subject
from natsync.concurrency import Deadline, Signal
from natsync.connection import Connection
from natsync.context import Context
from natsync.errors import (
    Code,
    ConnectionLost,
    DeadlineExceeded,
    HandlerError,
    IdleTimeout,
    NoRespondersError,
    ProtocolError,
    ServerLost,
    SlowConsumerError,
    StreamCancelled,
    StreamEnded,
    StreamError,
    StreamRefused,
    TimedOut,
)
from natsync.headers import Headers
from natsync.message import Item, Message
from natsync.mux import LinkLoss, Waiter
from natsync.protocol import encode_pub
from natsync.reply import ERROR_HEADER, service_code
from natsync.streaming import frames

T = TypeVar("T")
Finished = Callable[[], object]

#: Chunks that may wait for the consumer. A plain responder cannot be slowed down; a Go one runs 5,000–22,000 ahead.
PENDING_CHUNKS = 65_536
#: Bytes that may wait for the consumer.
PENDING_BYTES = 64 << 20

_NOTHING: Iterator[Item] = iter(())


class Call(Waiter):
    """One attempt of one stream: registered, published, received."""

    def __init__(self, connection: Connection, subject: str, idle_timeout: float | None) -> None:
        sentinels = connection.options.sentinels
        self.subject = subject
        self.chunks = 0
        self.bytes = 0
        self.blocked_seconds = 0.0
        self.mode: str | None = None
        self.headers = Headers()
        self.trailers = Headers()
        self.complete = False
        self._connection = connection
        self._sentinels = sentinels
        self.special = sentinels.common_start
        self._idle_timeout = idle_timeout
        self._lock = threading.Lock()
        self._taking = threading.Lock()  # one consumer waits at a time
        self._signal = Signal()
        self.batch = _NOTHING
        self._queue: list[list[Item]] = []
        self._waiting_chunks = 0
        self._waiting_bytes = 0
        self._control: bytes | None = None
        self._error: Exception | None = None
        self._at_once = False  # the error goes before what waits
        self._over = False
        self._frame = b""
        self._mark: int | None = None
        self._finished: list[Finished] = []
        self.token, self.inbox = connection.mux.address()
        connection.mux.register(self.token, self)

    # -- opening -------------------------------------------------------------------------------------------------

    def open(self, payload: bytes, headers: Headers, ctx: Context, attempt: int) -> None:
        """Publish the request. On failure the call is over and the error is the caller's."""
        try:
            self._connection.mux.check_allowed()
            block: bytes | None = frames.encode_opening(headers, ctx.remaining(), attempt)
            if self._connection.info.get("headers") is False:
                block = None  # a server without headers: the stream is plain, and its cancel unheard
            to = _subject.publish_subject(self.subject)
            self._frame = self._connection.encode(to, self.inbox, block, payload)
            self._mark = self._connection.put(self._frame, Deadline(ctx.deadline))
        except BaseException:
            self._finish()
            raise
        loss = self._connection.loss_of(self._frame, self._mark)
        if loss is not None:
            self.link_lost(loss)
        self.when_finished(ctx.on_end(lambda: self._context_ended(ctx)))

    def when_finished(self, callback: Finished) -> None:
        """Have callback() called once the call is over, in whichever thread ends it; brief and non-blocking."""
        with self._lock:
            if not self._over:
                self._finished.append(callback)
                return
        callback()

    # -- the reader ------------------------------------------------------------------------------------------------

    def deliver(self, items: list[Item]) -> None:
        newest = items[-1][0]
        size = sum([len(item[2]) for item in items])
        with self._lock:
            if self._over or self._error is not None:
                return
            self.mode = "plain"
            if frames.is_control(newest):
                self._control = newest
            self._queue.append(items)
            self._waiting_chunks += len(items)
            self._waiting_bytes += size
            full = self._waiting_chunks > PENDING_CHUNKS or self._waiting_bytes > PENDING_BYTES
        if full:
            self._overflow()
        self._signal.set()

    def _overflow(self) -> None:
        self._fail(
            SlowConsumerError(
                f"stream {self.subject!r}: {self._waiting_chunks} chunks ({self._waiting_bytes} bytes) wait for the "
                f"consumer; a plain responder cannot be slowed down (limits {PENDING_CHUNKS} and {PENDING_BYTES} bytes)"
            )
        )

    def frames_dropped(self, dropped: list[bytes]) -> None:
        if any(frame is self._frame for frame in dropped):
            error = ConnectionLost("the next server takes no message as large as the request", sent=False)
            self._fail(error, tell=False)

    def link_lost(self, loss: LinkLoss) -> None:
        if self._mark is not None and loss.took(self._frame, self._mark):
            reason = f"the link broke in mid-stream, chunks may be missing: {loss.reason}"
            self._fail(ServerLost(reason), tell=False)

    def publish_denied(self, subject: bytes, error: Exception) -> None:
        if not self.mode and subject == _subject.publish_subject(self.subject):
            self._fail(error, tell=False)

    def refused(self, error: Exception) -> None:
        self._fail(error, tell=False)

    def connection_closing(self) -> None:
        """Let the responder know while that can still be sent; the error comes with connection_closed()."""
        control = self._control
        if control is not None and not self._over:
            self._connection.put_now(encode_pub(control, None, None, frames.encode_cancel("the requester closes")))

    def connection_closed(self, reason: Exception) -> None:
        self._fail(reason, tell=False)

    # -- the consumer ----------------------------------------------------------------------------------------------

    def next_chunk(self, deadline: Deadline) -> bytes:
        """The next chunk. Raises StreamEnded, TimedOut, or what ended the stream."""
        while True:
            batch = self.batch
            for item in batch:
                chunk = self.judge(item)
                if chunk is not None:
                    return chunk
            self._refill(batch, deadline)

    def next_message(self, deadline: Deadline) -> Message:
        """The next message in the seed's form: chunk, END or ERROR, as a Message."""
        while True:
            batch = self.batch
            for item in batch:
                message = Message.received(self.inbox, item, self._connection.publish_answer)
                try:
                    chunk = self.judge(item)
                except StreamEnded:
                    message.is_end = True
                    return message
                except StreamError as error:
                    if isinstance(error, HandlerError) or item[2].startswith(self._sentinels.error_prefix):
                        message.error = error.message
                        return message
                    raise
                if chunk is not None:
                    return message
            self._refill(batch, deadline)

    def judge(self, item: Item) -> bytes | None:
        """What an item means: a chunk, None for a note; raises for an end."""
        _, block, payload = item
        if block is not None:
            status = _headers.status_of(block)
            if status == frames.NOTE_STATUS:
                return None
            if status == frames.NO_RESPONDERS_STATUS and not payload:
                raise self._ended_by(self._unheard())
            self._check_service_error(_decode(block))
        if payload == self._sentinels.end:
            self.trailers = _decode(block)
            self.complete = True
            self._error = None  # whatever went wrong behind the end, the stream is complete
            self._finish()
            raise StreamEnded(f"stream {self.subject!r} is complete: {self.chunks} chunks")
        if payload.startswith(self._sentinels.error_prefix):
            text = payload[len(self._sentinels.error_prefix) :].decode("utf-8", "replace")
            raise self._ended_by(_reported(text, _decode(block)))
        if block is not None and not self.chunks:
            self.headers = _decode(block)
        self.chunks += 1
        self.bytes += len(payload)
        return payload

    def _check_service_error(self, headers: Headers) -> None:
        """Raise what a request/reply handler answered when it failed."""
        text = headers.get(ERROR_HEADER)
        if text is not None:
            raise self._ended_by(HandlerError(text, code=service_code(headers)))

    def _unheard(self) -> Exception:
        if self.chunks or self._control is not None:
            return ServerLost("the responder is gone")
        return NoRespondersError(self.subject)

    def _ended_by(self, error: Exception) -> Exception:
        """End with an error that the other side reported."""
        if isinstance(error, StreamError):
            error.last_seq = self.chunks
        self._fail(error, tell=False)
        return error

    def _refill(self, empty: Iterator[Item], deadline: Deadline) -> None:
        """The batch is used up: wait for more and take all of it; raises what there is to raise instead."""
        if not self._taking.acquire(timeout=deadline.wait_time()):
            raise TimedOut(f"no chunk of {self.subject!r} in time: another thread is waiting for it")
        try:
            while self.batch is empty and not self._take():  # another thread may have refilled it meanwhile
                self._wait(deadline)
        finally:
            self._taking.release()

    def _take(self) -> bool:
        with self._lock:
            if self._error is not None and self._at_once:
                self.batch = _NOTHING
                self._queue.clear()
            elif self._queue:
                batches, self._queue = self._queue, []
                self._waiting_chunks = self._waiting_bytes = 0
                self.batch = iter(batches[0]) if len(batches) == 1 else chain.from_iterable(batches)
                return True
            error = self._error
            if error is None and not self._over:
                return False
        if error is None:
            raise StreamEnded(f"stream {self.subject!r} is complete: {self.chunks} chunks")
        if isinstance(error, StreamError):
            error.last_seq = self.chunks
        raise error

    def _wait(self, deadline: Deadline) -> None:
        until = deadline.or_sooner(self._idle_timeout)
        begin = time.monotonic()
        woken = self._signal.wait(until)
        self.blocked_seconds += time.monotonic() - begin
        if woken or self._queue or self._error is not None:
            return
        if deadline.expired:
            raise TimedOut(f"no chunk of {self.subject!r} in time; the stream goes on")
        self._fail(IdleTimeout(f"stream {self.subject!r}: nothing came for {self._idle_timeout} s"))

    # -- ending ----------------------------------------------------------------------------------------------------

    def cancel(self, reason: str) -> None:
        """End now, from any thread; the responder is told, a waiting consumer gets StreamCancelled."""
        self._fail(StreamCancelled(reason), at_once=True)

    def _context_ended(self, ctx: Context) -> None:
        error = ctx.error()
        if isinstance(error, DeadlineExceeded):
            self._fail(DeadlineExceeded(f"stream {self.subject!r}: deadline exceeded"), at_once=True)
        else:
            self._fail(StreamCancelled(str(error)), at_once=True)

    def _fail(self, error: Exception, *, at_once: bool = False, tell: bool = True) -> None:
        with self._lock:
            if self._over:
                return
            self._error, self._at_once = error, at_once
            if at_once:
                self.batch = _NOTHING
            ended = bool(self._queue) and self._is_end(self._queue[-1][-1])
            control = self._control if tell and not ended else None
        self._finish()
        if control is not None:
            code = error.code if isinstance(error, StreamError) else Code.CANCELLED
            self._connection.put_now(encode_pub(control, None, None, frames.encode_cancel(str(error), code)))
        elif tell and not ended:
            self._connection.withdraw(self._frame)

    def _is_end(self, item: Item) -> bool:
        if item[1] is not None and _headers.status_of(item[1]) is not None:
            return False
        return self._sentinels.forges(item[2])

    def _finish(self) -> None:
        """Nothing more will come: let go of the token, and tell who wants to know."""
        with self._lock:
            if self._over:
                return
            self._over = True
            finished, self._finished = self._finished, []
        self._connection.mux.unregister(self.token)
        self._signal.set()
        for callback in finished:
            callback()

    @property
    def over(self) -> bool:
        return self._over

    @property
    def outcome(self) -> Exception | None:
        """How the call ended: None if it is complete (or not over yet)."""
        return None if self.complete else self._error

    @property
    def error(self) -> Exception:
        """What the call ended with; only once it has ended with an error."""
        assert self._error is not None
        return self._error


def answer_late_chunks(connection: Connection) -> None:
    """Have responders of streams that are over here told so: a cancel that found no address yet finds it then."""

    def late(items: list[Item]) -> None:
        reply = items[-1][0]
        if reply is not None and frames.is_control(reply):
            connection.put_now(encode_pub(reply, None, None, frames.encode_cancel("nobody waits for this stream")))

    connection.mux.on_late = late


def _decode(block: bytes | None) -> Headers:
    try:
        return Headers() if block is None else _headers.decode(block)
    except ProtocolError:
        return Headers()


def _reported(text: str, headers: Headers) -> StreamError:
    """The error that a responder ended the stream with."""
    status = frames.decode_status(headers)
    if status.reason == frames.REFUSED:
        return StreamRefused(text, retry_after=status.retry_after, code=status.code)
    if status.reason == frames.LOST:
        return ServerLost(text)
    if status.reason == frames.DEADLINE:
        return DeadlineExceeded(text)
    return HandlerError(text, code=status.code, details=status.details)
