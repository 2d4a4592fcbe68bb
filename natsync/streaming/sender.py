"""The responder's side of a stream: what a handler sends with, from any of its threads.

SenderCore is held by the control inbox (which hears of cancels and vanished requesters) and by the handler's runner;
users hold a ResponseSender. Chunks, and the end behind them, leave in order: the lock orders the sends of one stream
and is never held while waiting.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from natsync import headers as _headers
from natsync.concurrency import Deadline, SafeEvent, check_timeout, fork_generation, run_soon
from natsync.connection import Connection
from natsync.context import Context
from natsync.errors import (
    Cancelled,
    ClientLost,
    Code,
    DeadlineExceeded,
    ForkError,
    InvalidArgument,
    MaxPayloadExceeded,
    NatsError,
    StreamCancelled,
    StreamClosed,
    StreamError,
    TimedOut,
)
from natsync.headers import Headers
from natsync.message import Item, Payload, to_bytes
from natsync.mux import LinkLoss, Mux, Waiter
from natsync.outbox import destination
from natsync.protocol import encode_pub
from natsync.streaming import frames

log = logging.getLogger("natsync.streaming")

#: Bytes of chunks that send_many() queues as one piece, so that they leave in one write.
GROUP_BYTES = 64 << 10
_FAILED = frames.Status(Code.UNKNOWN)
_NO_DEADLINE = Deadline()


class SenderCore(Waiter):
    """State of one response stream: open, then closed for one reason."""

    def __init__(
        self, connection: Connection, control: Mux, reply: bytes, ctx: Context, *, natsync_peer: bool, subject: str
    ) -> None:
        sentinels = connection.options.sentinels
        self.ctx = ctx
        self.closed: threading.Event = SafeEvent()
        self.count = 0
        self.subject = subject
        self.peer_is_natsync = natsync_peer
        self._connection = connection
        self._control = control
        self._reply = reply
        self._sentinels = sentinels
        self._special = sentinels.common_start
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._ended = False
        self._broken: StreamClosed | None = None
        self._headers: Headers | None = None
        self._first_mark = 0  # positions in the outbox: of the first message,
        self._last_mark = 0  # of the last chunk,
        self._end_mark = 0  # and of the end
        self._callbacks: list[Callable[[], object]] = []
        self._internal: list[Callable[[], object]] = []
        self._token, self._inbox = control.address()
        self._prefix = b"PUB %b %b " % (reply, self._inbox)
        control.register(self._token, self)
        self._stop_watching: Callable[[], None] = lambda: None  # until on_end() returns, which may call us at once
        self._stop_watching = ctx.on_end(self._context_ended)

    def accept(self) -> None:
        """Tell a natsync requester where a cancel reaches this stream, before there is a chunk."""
        if self.peer_is_natsync:
            self._connection.put_now(encode_pub(self._reply, self._inbox, frames.NOTE, b""))

    @property
    def ends_empty(self) -> bool:
        """Whether an empty message ends the stream."""
        return not self._sentinels.end

    @property
    def outcome(self) -> str:
        """How a stream that is over counts: processed (it ended by its END), cancelled by the requester, or failed."""
        if self._ended:
            return "processed"
        return "cancelled" if isinstance(self._error, StreamCancelled | ClientLost) else "failed"

    # -- sending -----------------------------------------------------------------------------------------------

    def send(self, data: bytes, deadline: Deadline) -> int:
        """Queue one chunk; waits while the link is far behind. Returns its number."""
        frame = self._frame(data, first=not self.count)
        while not (number := self._try(frame)):
            self._connection.wait_room(deadline, self.closed.is_set)
        return number

    def try_send(self, data: bytes) -> bool:
        """Queue one chunk if the link has room now."""
        return self._try(self._frame(data, first=not self.count)) > 0

    def send_many(self, chunks: list[bytes], deadline: Deadline) -> int:
        """Queue chunks behind each other, so that they leave in as few writes as possible."""
        number = self.count
        group: list[bytes] = []
        size = 0
        first = not self.count
        # All are checked before the first is queued.
        for frame in [self._frame(chunk, first=first and not index) for index, chunk in enumerate(chunks)]:
            group.append(frame)
            size += len(frame)
            if size >= GROUP_BYTES:
                number = self._send_group(group, deadline)
                group, size = [], 0
        return self._send_group(group, deadline) if group else number

    def _send_group(self, frames_: list[bytes], deadline: Deadline) -> int:
        joined = b"".join(frames_)
        while not (number := self._try(joined, len(frames_))):
            self._connection.wait_room(deadline, self.closed.is_set)
        return number

    def _frame(self, data: bytes, *, first: bool) -> bytes:
        if data.startswith(self._special) and self._sentinels.forges(data):
            raise InvalidArgument(
                f"the chunk {data[:40]!r} is what ends a plain stream, so the requester would take it for the end; "
                f"change the payload, or the sentinels on both sides"
            )
        limit = self._connection.info.get("max_payload")
        if limit is not None and len(data) > limit:
            raise MaxPayloadExceeded(len(data), limit)
        headers = self._headers
        if headers is not None and first:
            return self._connection.encode(self._reply, self._inbox, headers.encode(), data)
        return b"%b%d\r\n%b\r\n" % (self._prefix, len(data), data)

    def _try(self, frame: bytes, chunks: int = 1) -> int:
        with self._lock:
            if self._error is not None:
                raise self._closed_error()
            mark = self._connection.try_put(frame, messages=chunks)
            if not mark:
                return 0
            self.count += chunks
            self._last_mark = mark
            if self._first_mark:
                return self.count
            self._first_mark = mark
            number = self.count
        self._begun()
        return number

    def _begun(self) -> None:
        """The first chunk was queued; in the thread that sends it."""

    def set_header(self, key: str, value: str) -> None:
        with self._lock:
            if self.count:
                raise InvalidArgument("headers go with the first chunk, which has been sent")
            headers = self._headers or Headers()
            headers[key] = value
            self._headers = headers

    def _closed_error(self) -> Exception:
        error = self._error
        assert error is not None
        if isinstance(error, StreamClosed):
            error = type(error)(error.message, code=error.code, last_seq=self.count)
        return error

    # -- ending ------------------------------------------------------------------------------------------------

    def end(self, trailers: Headers | None = None) -> bool:
        """Send END, once; False if the stream was over for another reason."""
        block = trailers.encode() if trailers and self.peer_is_natsync else None
        limit = self._connection.info.get("max_payload")
        size = len(block or b"") + len(self._sentinels.end)
        if limit is not None and size > limit:
            raise MaxPayloadExceeded(size, limit)
        reason = StreamClosed("the stream was ended", code=Code.OK)
        self._close(reason, self._ending(block, self._sentinels.end))
        return self._ended

    def fail(self, text: str, status: frames.Status = _FAILED, error: StreamClosed | None = None) -> bool:
        """Send an error, which ends the stream; False if it was over already. error: what later sends raise here."""
        closed = error or StreamClosed(f"the stream was ended with an error: {text}")
        return self._close(closed, self._error_frame(text, status))

    def _error_frame(self, text: str, status: frames.Status) -> bytes:
        """The frame of an error; what does not fit into max_payload is left out: details first, then the text's end."""
        payload = self._sentinels.error_prefix + text.encode("utf-8", "replace")
        limit = self._connection.info.get("max_payload")
        block = frames.encode_status(status) if self.peer_is_natsync else None
        if limit is not None and block is not None and len(block) + len(payload) > limit:
            block = frames.encode_status(replace(status, details=None))
        room = len(payload) if limit is None else max(0, limit - len(block or b""))
        return encode_pub(self._reply, self._inbox, block, payload[:room])

    def _ending(self, block: bytes | None, payload: bytes) -> bytes:
        return encode_pub(self._reply, self._inbox, block, payload)

    def _close(self, error: Exception, last_frame: bytes | None) -> bool:
        """End for this reason, unless there is one already."""
        with self._lock:
            if self._error is not None:
                return False
            self._error = error
            self._ended = isinstance(error, StreamError) and error.code == Code.OK
        # From here on nobody sends: every chunk that was sent is queued, and the end goes behind it.
        self._finish(last_frame)
        return True

    def _finish(self, last_frame: bytes | None) -> None:
        """Tell everybody that the stream is over. Its slot is free before the last frame is queued."""
        with self._lock:
            internal, self._internal = self._internal, []
            users, self._callbacks = self._callbacks, []
        self.closed.set()
        self._stop_watching()
        if not self._ended:
            self.ctx.cancel_soon(Cancelled(str(self._error)))
        for callback in internal:
            callback()
        if last_frame is None:
            self._control.unregister(self._token)
        else:
            self._put_last(last_frame)
        self._connection.wake_publishers()  # a send() of this stream may be waiting for room
        for callback in users:
            self._run_user(callback)

    def _put_last(self, frame: bytes) -> None:
        """Queue the end; a link that is lost before the server has it must not leave the requester waiting."""
        try:
            with self._lock:  # so that breaks() sees the end either not sent or with its mark
                mark = self._end_mark = self._connection.try_put(frame, force=True)
        except NatsError as error:  # closed: there is nobody to tell any more
            log.debug("the end of a stream on %r was not sent: %s", self.subject, error)
            self._control.unregister(self._token)
            return
        self._connection.when_confirmed(mark, lambda: self._confirmed(mark))

    def _confirmed(self, mark: int) -> None:
        """The server has everything up to this position."""
        if mark == self._end_mark:
            self._control.unregister(self._token)

    def _run_user(self, callback: Callable[[], object]) -> None:
        if not self._connection.dispatcher.workers.submit(callback):
            run_soon(callback, "an on_close callback")

    def on_close(self, callback: Callable[[], object]) -> None:
        """Have the user's callback() run on a worker when the stream is over, however."""
        with self._lock:
            if self._error is None:
                self._callbacks.append(callback)
                return
        self._run_user(callback)

    def when_closed(self, callback: Callable[[], object]) -> None:
        """on_close() for the library's own brief functions: in whichever thread ends it, before the END is sent."""
        with self._lock:
            if self._error is None:
                self._internal.append(callback)
                return
        callback()

    # -- the reader, the timer, the supervisor ---------------------------------------------------------------------

    def deliver(self, items: list[Item]) -> None:
        """A message to the control subject: nobody listens (503), or the requester cancels."""
        for _, block, payload in items:
            if block is not None and _headers.status_of(block) == frames.NO_RESPONDERS_STATUS and not payload:
                self._close(ClientLost("the requester is gone: nobody listens to its inbox any more"), None)
                return
            reason = frames.decode_cancel(payload)
            if reason is not None:
                self._close(StreamCancelled(reason), None)
                return

    def breaks(self, loss: LinkLoss) -> bytes | None:
        """Whether messages of this stream may have been lost with the link: then nothing more of it may be sent.

        Returns the reply subject, whose waiting messages are to be taken back.
        """
        with self._lock:
            # What is in the new outbox already, behind the gap, is taken back: chunks, and an end too.
            chunks_lost = 0 < self._first_mark <= loss.taken and loss.confirmed < self._last_mark
            if not chunks_lost and not loss.confirmed < self._end_mark <= loss.taken:
                return None
            return self._break_locked(f"the responder's link broke in mid-stream, chunks may be missing: {loss.reason}")

    def frames_dropped(self, dropped: list[bytes]) -> bytes | None:
        if not any(destination(frame) == self._reply for frame in dropped):
            return None
        with self._lock:
            return self._break_locked("a chunk was dropped: the responder's next server takes none as large as that")

    def _break_locked(self, text: str) -> bytes:
        """Chunks are missing: nothing behind them may be sent. Requires _lock."""
        self._broken = StreamClosed(text, code=Code.UNAVAILABLE)
        if self._error is None:
            self._error = self._broken
        return self._reply

    def link_lost(self, loss: LinkLoss) -> None:
        self.repair()

    def repair(self) -> None:
        """A stream with a gap must not seem complete, and one whose end was lost must not seem endless."""
        broken, self._broken = self._broken, None
        if broken is None:
            return
        frame = self._error_frame(broken.message, frames.Status(Code.UNAVAILABLE, reason=frames.LOST))
        if self._error is broken:
            self._finish(frame)
        else:
            self._put_last(frame)

    def publish_denied(self, subject: bytes, error: Exception) -> None:
        if subject == self._reply:
            advice = "a responder's user needs allow_responses with max: -1 (one answer is the default)"
            self._close(StreamClosed(f"{error}; {advice}", code=Code.PERMISSION_DENIED), None)

    def connection_closing(self) -> None:
        self.fail("the responder is closing", frames.Status(Code.UNAVAILABLE, reason=frames.LOST))

    def connection_closed(self, reason: Exception) -> None:
        self._close(StreamClosed(str(reason), code=Code.UNAVAILABLE), None)

    def _context_ended(self) -> None:
        error = self.ctx.error()
        if isinstance(error, DeadlineExceeded):
            status = frames.Status(Code.DEADLINE_EXCEEDED, reason=frames.DEADLINE)
            self.fail("deadline exceeded", status, DeadlineExceeded("the request's deadline has passed"))
        else:
            status = frames.Status(Code.UNAVAILABLE, reason=frames.LOST)
            self.fail(str(error), status, StreamCancelled(str(error)))

    def dropped(self) -> None:
        """The handler let go of its sender without ending the stream."""
        if self.fail("the handler dropped its sender without ending the stream", frames.Status(Code.INTERNAL)):
            log.error("a handler of %r dropped its sender without end(): the requester got an error", self.subject)


class ResponseSender:
    """What a handler sends the pieces of its answer with.

    Safe from any number of threads: a chunk is never torn, and the end comes behind every chunk whose send() had
    returned. Once the stream is over, for whatever reason, `closed` is set and sending raises StreamClosed or one of
    its kinds: ClientLost, StreamCancelled, DeadlineExceeded. A sender that is dropped without an end is ended with an
    error when it is collected.

    Attributes:
        closed: a threading.Event, set when the stream is over: ended, failed, cancelled, or the requester is gone.
    """

    def __init__(self, core: SenderCore) -> None:
        self._core = core
        self._generation = fork_generation()
        self.closed = core.closed

    def send(self, data: Payload, *, timeout: float | None = None) -> int:
        """Queue one chunk and return its number, from 1 up.

        Blocks while the link to the server is far behind, up to timeout seconds (None = no limit).

        Raises:
            StreamClosed: the stream is over; the kind and text say why.
            InvalidArgument: the payload equals the end sentinel or starts with the error sentinel.
            MaxPayloadExceeded: it is larger than the server takes.
            TimedOut: the link had no room in time.
            TypeError: it is neither bytes-like nor str.
        """
        self._check_process()
        deadline = _NO_DEADLINE if timeout is None else Deadline.after(check_timeout(timeout))
        return self._core.send(to_bytes(data), deadline)

    def try_send(self, data: Payload) -> bool:
        """Queue one chunk if that needs no waiting; False if it would. Raises as send() does."""
        self._check_process()
        return self._core.try_send(to_bytes(data))

    def send_many(self, chunks: Iterable[Payload], *, timeout: float | None = None) -> int:
        """Queue several chunks in order, to leave together; the number of the last. Raises as send() does.

        The iterable is used up and every chunk checked before the first is queued.
        """
        self._check_process()
        deadline = Deadline.after(check_timeout(timeout))
        return self._core.send_many([to_bytes(chunk) for chunk in chunks], deadline)

    def send_error(self, error: BaseException | str, *, code: int | None = None, details: Any = None) -> None:
        """End the stream with an error; the requester's iterator raises it. No effect on a stream that is over.

        code is one of natsync.Code (gRPC's numbers); code and details reach natsync requesters only.
        """
        self._check_process()
        own = error.code if isinstance(error, StreamError) else Code.UNKNOWN
        self._core.fail(describe(error), frames.Status(own if code is None else code, details))

    def end(self, *, wait: float = 0, trailers: _headers.HeaderInput = None) -> bool:
        """End the stream; whether it is complete (False: it was over before, by an error, a cancel or a loss).

        Idempotent. In a `finally` it ends the stream of a failing handler too, as if it were complete: call
        send_error() in an `except` first, or let a generator handler end by itself. With wait, blocks up to that many
        seconds until the server confirms that it has everything, and returns False if it does not. Trailers reach
        natsync requesters only.
        """
        self._check_process()
        check_timeout(wait, "wait")
        complete = self._core.end(None if trailers is None else Headers(trailers))
        if not complete or not wait:
            return complete
        try:
            self._core._connection.flush(Deadline.after(wait))
        except (TimedOut, NatsError):
            return False
        return True

    def set_header(self, key: str, value: str) -> None:
        """Set a header that goes with the first chunk (Stream.headers at the requester).

        Raises:
            InvalidArgument: the first chunk has been sent, or the header is malformed.
        """
        self._check_process()
        self._core.set_header(key, value)

    def is_closed(self) -> bool:
        """Whether the stream is over: nothing more can be sent."""
        return self._core.closed.is_set()

    @property
    def send_count(self) -> int:
        """Chunks queued so far."""
        return self._core.count

    def on_close(self, callback: Callable[[], object]) -> None:
        """Have callback() run once, on a worker, when the stream is over; soon, if it already is."""
        self._check_process()
        self._core.on_close(callback)

    def _check_process(self) -> None:
        if self._generation != fork_generation():
            raise ForkError("this sender belongs to the parent process")

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is None or core.closed.is_set() or self._generation != fork_generation():
            return
        core._connection.in_supervisor(core.dropped)  # a finalizer may run anywhere, inside any lock

    def __repr__(self) -> str:
        state = "closed" if self.is_closed() else "open"
        return f"<ResponseSender for {self._core.subject!r}: {state}, {self.send_count} sent>"


def describe(error: BaseException | str) -> str:
    """The text of an error as the other side reads it; the type's name where there is none to be had."""
    if isinstance(error, str):
        return error
    try:
        return str(error) or type(error).__name__
    except Exception:  # a __str__ that raises must not leave the requester waiting
        return type(error).__name__
