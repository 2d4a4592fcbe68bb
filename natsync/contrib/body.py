"""The body of a streaming HTTP response: what a WSGI server iterates and closes, around a stream or a subscription.

It waits for chunks in short steps, so that it can look at the client's socket (presence) and send a sign of life. It
runs in the server's thread and has none of its own; close() may come from any.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from natsync.closable import MappedStream
from natsync.concurrency import Deadline, check_timeout
from natsync.contrib.presence import LOOK_SECONDS, Gone
from natsync.errors import InvalidArgument, NatsError, StreamEnded, TimedOut
from natsync.message import Message
from natsync.subscription import Subscription

log = logging.getLogger("natsync.contrib")


class ChunkSource(Protocol):
    """What a body reads from: a Stream, Replies, a Subscription without a callback, or what map() of one returns."""

    def next(self, timeout: float | None = None) -> Any: ...

    def close(self) -> None: ...


class Body:
    """The chunks of a stream as the iterable of a WSGI response; chunks are bytes or text, or messages, for their data.

    Closing it closes the stream, which cancels the handler unless it has ended; so does whatever goes wrong while it is
    iterated. One that is dropped without close() warns (ResourceWarning), and the stream's own finalizer cancels it.
    How the stream failed is raised, so that the server breaks the response off: a client does not take it for complete.

    Args:
        stream: what is read; from here on the body's own. The end of a subscription is that of the body.
        gone: see presence.client_gone(); asked every LOOK_SECONDS while there is nothing to send. None = never.
    """

    def __init__(self, stream: ChunkSource, *, gone: Gone | None = None) -> None:
        self._over = True  # nothing to warn of if an argument is refused
        if not callable(getattr(stream, "next", None)) or not callable(getattr(stream, "close", None)):
            raise TypeError(f"a stream has next(timeout) and close(), as client.stream() makes it: not {stream!r:.100}")
        self._functions: list[Callable[[Any], Any]] = []
        while type(stream) is MappedStream:  # apart, so that what a function raises is never taken for the stream's own
            self._functions.insert(0, stream._function)
            stream = stream._stream
        self._stream = stream
        self._gone = gone
        self._heartbeat: float | None = None  # seconds without a byte after which _beat() is sent
        self._written = time.monotonic()
        self._ready: deque[bytes] = deque()
        self._last = False  # nothing comes behind what is ready
        self._over = False

    # -- what it consists of: an SSE body has its own ------------------------------------------------------------

    def _encode(self, chunk: Any) -> bytes:
        """A chunk as it is written."""
        if isinstance(chunk, str):
            return chunk.encode()
        if not isinstance(chunk, bytes | bytearray | memoryview):
            raise TypeError(f"a chunk of a response is bytes or str, not {type(chunk).__name__}")
        return bytes(chunk)

    def _beat(self) -> bytes:
        """The sign of life."""
        return b""

    def _end(self) -> bytes:
        """What is written when the stream is complete."""
        return b""

    def _failure(self, error: Exception) -> bytes:
        """What is written when the stream, or _encode(), has failed; raises where there is no way to say so."""
        raise error

    # -- iterating -----------------------------------------------------------------------------------------------

    def __iter__(self) -> Body:
        return self

    def __next__(self) -> bytes:
        """The next bytes to write, never empty; blocks until there are some.

        StopIteration at the end, after close(), and as soon as the client is seen to have gone.
        """
        data: bytes | None = b""
        while data == b"":
            data = self._following()
        if data is None:
            self.close()
            raise StopIteration
        self._written = time.monotonic()
        return data

    def prefetch(self) -> Body:
        """Wait for the first chunk (or the end) here and keep it; returns itself.

        What goes wrong until then is raised, while the response can still have another status. If the client leaves
        meanwhile, the body is empty.
        """
        first = self._following()
        if first is None:
            self.close()
        else:
            self._ready.append(first)
        return self

    def _following(self) -> bytes | None:
        """What comes next, perhaps b""; None if nothing does."""
        if self._over:
            return None
        if self._ready:
            return self._ready.popleft()
        if self._last:
            return None
        try:
            try:
                return self._wait()
            except Exception as error:
                self._last = True
                self._stream.close()
                return self._failure(error)
        except BaseException:  # SystemExit of a worker that is to stop and Ctrl-C, too
            self.close()
            raise

    def _wait(self) -> bytes | None:
        """The next chunk, or the end, encoded; a sign of life if that is due first; None if the client has gone."""
        gone, heartbeat = self._gone, self._heartbeat
        beat_at = None if heartbeat is None else self._written + heartbeat
        while True:
            steps = [] if gone is None else [LOOK_SECONDS]
            if beat_at is not None:
                steps.append(max(0.0, beat_at - time.monotonic()))
            try:
                chunk = self._next(min(steps, default=None))
            except StreamEnded:
                self._last = True
                return self._end()
            except TimedOut as error:
                if type(error) is not TimedOut:  # a deadline or an idle timeout: the stream is over
                    raise
            else:
                for function in self._functions:
                    chunk = function(chunk)
                return self._encode(chunk.data if isinstance(chunk, Message) else chunk)
            if gone is not None and gone():
                return None
            if beat_at is not None and time.monotonic() >= beat_at:
                return self._beat()

    def _next(self, timeout: float | None) -> Any:
        """The stream's next chunk; of a subscription, whose next() has one error for its end and for a lost client."""
        if not isinstance(self._stream, Subscription):
            return self._stream.next(timeout)
        message = self._stream._take(Deadline.after(timeout))
        if message is None:
            raise StreamEnded("the subscription has ended")
        return message

    # -- ending --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the stream. Idempotent, from any thread; WSGI servers call it."""
        self._over = True
        self._stream.close()

    def __del__(self) -> None:
        # Not close(): a finalizer may run anywhere, inside any lock. The stream's own leaves the rest to a thread.
        if not self._over:
            warnings.warn(f"{type(self).__name__} was dropped without close()", ResourceWarning, stacklevel=2)


def check_heartbeat(heartbeat: float | None) -> float | None:
    """The value if it is None (no heartbeat) or a number of seconds above 0.

    Raises:
        InvalidArgument, TypeError: it is something else.
    """
    if check_timeout(heartbeat, "heartbeat") == 0:
        raise InvalidArgument("heartbeat=0: seconds above 0, or None for none")
    return heartbeat


def logged_failure(error: Exception, describe: Callable[[BaseException], dict[str, Any]]) -> dict[str, Any]:
    """describe(error), for the client; the log gets the error itself, with its traceback unless it is natsync's."""
    if isinstance(error, NatsError):
        log.warning("a stream to a browser failed: %s: %s", type(error).__name__, error)
    else:
        log.error("a stream to a browser failed", exc_info=error)
    return describe(error)
