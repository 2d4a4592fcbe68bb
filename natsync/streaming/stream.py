"""Stream: what users iterate; a handle on the Call that receives, and on the calls of further attempts.

A stream that is dropped cancels its call; nothing but the user holds the Stream itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from natsync.closable import Closable
from natsync.concurrency import Deadline, check_timeout, fork_generation, in_turn
from natsync.context import Context
from natsync.errors import (
    Cancelled,
    DeadlineExceeded,
    ForkError,
    NatsError,
    StreamCancelled,
    StreamClosed,
    StreamEnded,
    StreamError,
    TimedOut,
)
from natsync.headers import Headers
from natsync.message import Message
from natsync.retry import RetryPolicy, Series, bucket_for
from natsync.streaming.call import Call, Finished
from natsync.streaming.calls import Calls

_NO_DEADLINE = Deadline()
_COUNTED = ("chunks", "bytes", "gaps", "resent", "resumes", "blocked")


class Stream(Closable[bytes]):
    """The chunks of an answer, as they come: iterate it, or call next().

    Made by Client.stream(). Iterating blocks until the next chunk; the end is StopIteration, anything else raises.
    close() may be called from any thread, more than once. A stream that is dropped is cancelled when it is collected.

    Attributes:
        subject: where the request went.
    """

    def __init__(
        self,
        calls: Calls,
        owner: object,
        subject: str,
        payload: bytes,
        headers: Headers,
        ctx: Context,
        idle_timeout: float | None,
        window: int,
        retry: RetryPolicy,
    ) -> None:
        self.subject = subject
        self._calls = calls
        self._owner = owner  # keeps the client alive as long as somebody reads
        self._payload = payload
        self._headers = headers
        self._ctx = ctx
        self._idle_timeout = idle_timeout
        self._window = window
        self._retry = retry
        self._bucket = bucket_for(retry, subject)
        self._generation = fork_generation()
        self._at_end: list[Finished] = []
        self._tries = 0
        self._series: Series | None = None  # of the attempts that have failed since the last chunk
        self._due: float | None = None  # when the next one is to be made, in time.monotonic(); None while one is
        self._turn = threading.Lock()  # of who waits for a chunk or an attempt, while there may be another attempt
        self._earlier = dict.fromkeys(_COUNTED, 0.0)  # what was counted by attempts that broke off
        self._call = self._open(0, 0)

    def _open(self, tries: int, got: int) -> Call:
        call = Call(self._calls, self.subject, self._idle_timeout, self._window)
        call.open(self._payload, self._headers, self._ctx, tries, got or None)
        return call

    # -- receiving -------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        for chunk in self._call.batch:  # what next_chunk() does, without two calls
            return chunk  # type: ignore[no-any-return]
        try:
            return self._next(_NO_DEADLINE)
        except StreamEnded:
            raise StopIteration from None

    def next(self, timeout: float | None = None) -> bytes:
        """The next chunk; blocks up to timeout seconds (None = no limit, 0 = do not wait).

        Raises:
            StreamEnded: the stream is complete.
            TimedOut: nothing came in time; the stream goes on.
            StreamError, NoRespondersError, SlowConsumerError: how the stream failed, see Client.stream().
        """
        return self._next(Deadline.after(check_timeout(timeout)))

    def _next(self, deadline: Deadline) -> bytes:
        if self._generation != fork_generation():
            raise ForkError("this stream belongs to the parent process")
        if self._retry is None:
            return self._call.next_chunk(deadline)
        late = f"no chunk of {self.subject!r} in time: another thread is waiting for it"
        return in_turn(self._turn, deadline, late, self._with_retry)

    def _with_retry(self, deadline: Deadline) -> bytes:
        """The next chunk; if the stream breaks off and the policy lets it, of another attempt. Requires _turn."""
        while self._retry is not None:
            self._wait_for_try(deadline)
            try:
                if self._due is not None:
                    self._again()
                chunk = self._call.next_chunk(deadline)
            except Exception as error:
                if type(error) is TimedOut:  # the wait has ended, not the stream
                    raise
                self._failed(error)
            else:
                self._series = None
                if not getattr(self._retry, "resumable", False):
                    self._settle()
                return chunk
        return self._call.next_chunk(deadline)

    def _wait_for_try(self, deadline: Deadline) -> None:
        """Return when an attempt is under way, or another due.

        When that is outlasts this wait: who reads in short ones, as bodies of responses do, still gets there.
        """
        if self._due is None:
            return
        until = Deadline(self._due if deadline.at is None else min(self._due, deadline.at))
        self._ctx.wait(until.remaining())
        try:
            self._ctx.check()
        except DeadlineExceeded:
            self._attach()  # and no more, so that others who wait are told the same
            raise
        except Cancelled as error:
            self._attach()
            raise StreamCancelled(error.reason) from None
        if time.monotonic() < self._due:
            raise TimedOut(f"no chunk of {self.subject!r} in time; the stream goes on")  # with another try

    def _failed(self, error: Exception) -> None:
        """An attempt has failed: say when another is due, or raise how the stream ended."""
        policy = self._retry
        if policy is not None and not isinstance(error, StreamEnded):
            try:
                series = self._series = self._series or Series(policy, self._ctx, self._bucket)
                number, pause = series.failed(error, self._delivered)
            except BaseException as raised:
                if raised is not error:  # a Ctrl-C, or a fault of the user's own policy
                    self._settle()
                    raise
            else:
                self._due = time.monotonic() + pause
                self._retrying(number, pause, error)
                error.__traceback__ = None  # of frames that hold this stream, which the call holds with its error
                return
        ended = self._ctx.error() if self._ctx.cancelled else None  # before it ends with the stream
        self._settle()
        if isinstance(error, StreamError):
            error.last_seq += int(self._earlier["chunks"])
        if ended is None or isinstance(error, StreamClosed | StreamEnded) or not isinstance(error, NatsError):
            raise error
        # The stream was ended here when an attempt had failed, before another.
        if isinstance(ended, DeadlineExceeded):
            raise DeadlineExceeded(f"stream {self.subject!r}: deadline exceeded") from error
        raise StreamCancelled(str(ended)) from error

    def _retrying(self, attempt: int, wait_seconds: float, error: BaseException) -> None:
        """Another attempt follows."""

    def _again(self) -> None:
        """Make another attempt; what this one has counted stays counted."""
        totals = self.stats
        call = self._open(self._tries + 1, int(totals["chunks"]))
        # In one step, so that a Ctrl-C finds the attempt made or still to be made.
        self._call, self._earlier, self._tries, self._due = call, totals, self._tries + 1, None

    @property
    def _delivered(self) -> bool:
        """Whether the application has had a chunk."""
        return self._call.chunks > 0 or self._earlier["chunks"] > 0

    def _settle(self) -> None:
        """There will be no other attempt."""
        self._retry = None
        self._attach()

    def _attach(self) -> None:
        """The attempt in hand is the last: what waits for the stream's end waits for its end."""
        callbacks, self._at_end = self._at_end, []
        try:
            while callbacks:
                self._call.when_finished(callbacks[0])
                del callbacks[0]  # behind it: after a Ctrl-C in there it is asked for once more
        except BaseException:
            self._at_end = callbacks + self._at_end
            raise

    # -- ending ----------------------------------------------------------------------------------------------------

    def cancel(self, reason: str = "cancelled by the requester") -> None:
        """End the stream now; the handler is told why, and its ctx is cancelled. Does not wait for its answer.

        A thread that waits for a chunk gets StreamCancelled. No effect on a stream that has ended.
        """
        if self._generation == fork_generation():
            self._call.cancel(reason)
            self._ctx.cancel(reason)  # keeps a retry from making another attempt
            self._call.cancel(reason)
            self._attach()

    def close(self) -> None:
        """cancel() unless the stream has ended. Idempotent, from any thread; WSGI servers call it."""
        self.cancel("closed by the requester")

    def when_finished(self, callback: Finished) -> None:
        """Have callback() called when the stream is over; brief and non-blocking, in any thread.

        Once; only after a Ctrl-C in it perhaps again.
        """
        self._at_end.append(callback)
        if self._retry is None:
            self._attach()

    def __del__(self) -> None:
        call = getattr(self, "_call", None)
        if (
            call is None
            or self._generation != fork_generation()
            or (call.over and not call.cut_short and not self._at_end)
        ):
            return
        # A finalizer may run anywhere, inside any lock: leave the work to the supervisor.
        callbacks = self._at_end
        self._calls.connection.in_supervisor(lambda: _drop(call, callbacks))

    # -- asking ----------------------------------------------------------------------------------------------------

    @property
    def headers(self) -> Headers:
        """What the responder sent along with the first chunk."""
        return self._call.headers

    @property
    def trailers(self) -> Headers:
        """What the responder sent along with the end."""
        return self._call.trailers

    @property
    def mode(self) -> str | None:
        """ "framed" with a natsync responder, "plain" with any other; None until the first answer."""
        return self._call.mode

    @property
    def stats(self) -> dict[str, float]:
        """chunks and bytes handed out; gaps: how often something was missing on the way; resent: frames that came twice
        or too early; resumes: how often the stream went on after a silence, or over another link; blocked: seconds
        waited for chunks. Over all attempts."""
        now = self._counters(self._call)
        return {name: self._earlier[name] + now[name] for name in _COUNTED}

    @staticmethod
    def _counters(call: Call) -> dict[str, float]:
        receiver = call.receiver
        gaps, resent, resumes = (receiver.gaps, receiver.resent, receiver.resumes) if receiver else (0, 0, 0)
        values = (call.chunks, call.bytes, gaps, resent, resumes, call.blocked_seconds)
        return dict(zip(_COUNTED, values, strict=True))

    def __repr__(self) -> str:
        call = self._call
        state = "complete" if call.complete else "over" if call.over else "open"
        return f"<Stream {self.subject!r}: {state}, {call.chunks} chunks>"


def _drop(call: Call, callbacks: list[Finished]) -> None:
    call.cancel("dropped by the requester")
    for callback in callbacks:
        callback()


def process(
    calls: Calls,
    subject: str,
    payload: bytes,
    headers: Headers,
    processor: Callable[[Message], object],
    ctx: Context,
    idle_timeout: float | None,
    window: int,
    attempt: int,
) -> None:
    """One try of stream_request(): every message, END and ERROR included, goes to the processor; False stops."""
    call = Call(calls, subject, idle_timeout, window, as_items=True)
    call.open(payload, headers, ctx, attempt)
    generation = fork_generation()
    try:
        while True:
            message = call.next_message(_NO_DEADLINE)
            wanted = processor(message)
            if generation != fork_generation():
                raise ForkError("this request belongs to the parent process")
            if message.error is not None:
                raise call.error
            if message.is_end or wanted is False:
                return
    finally:
        if generation == fork_generation():  # a child that the processor forked leaves the parent's call alone
            call.cancel("closed by the requester")
