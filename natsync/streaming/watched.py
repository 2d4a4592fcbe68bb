"""What tells hooks of requests, streams and handlers; made only where there are hooks.

Without hooks nothing here runs: streams and senders are then of the plain classes, whose subclasses these are. With
them, a chunk costs a requester nothing more, and a responder the counting of its bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from natsync.concurrency import Deadline, fork_generation, run_safely, run_soon
from natsync.connection import Connection
from natsync.errors import ForkError, StreamCancelled, StreamEnded, TimedOut
from natsync.headers import Headers
from natsync.hooks import HooksOption, Watch
from natsync.message import Message
from natsync.streaming.call import Call
from natsync.streaming.handlers import HandlerContext, Runner
from natsync.streaming.sender import SenderCore
from natsync.streaming.stream import Stream
from natsync.subscription import Callback

# -- the requester -----------------------------------------------------------------------------------------------------


def open_stream(hooks: HooksOption, subject: str, headers: Headers) -> Watch:
    """A watch on a stream that is about to be asked for; hooks may add to the headers."""
    watch = Watch(hooks, "stream", subject, headers)
    watch.tell("stream_opened")
    return watch


def stream_done(watch: Watch, chunks: int, size_bytes: int, error: BaseException | None) -> None:
    watch.tell_once("stream_done", watch.seconds, chunks, size_bytes, error)


class WatchedStream(Stream):
    """A Stream of which hooks are told: when the consumer gets the first chunk, and when it learns of the end."""

    def __init__(self, watch: Watch, *arguments: Any) -> None:
        self._watch = watch
        self._begun = False
        super().__init__(*arguments)

    def _next(self, deadline: Deadline) -> bytes:
        try:
            chunk = super()._next(deadline)
        except Exception as error:
            self._learn(error)
            raise
        if not self._begun:
            self._begun = True
            self._watch.tell_once("stream_first_chunk", self._watch.seconds)
        return chunk

    def _retrying(self, attempt: int, wait_seconds: float, error: BaseException) -> None:
        self._watch.tell("retrying", attempt, wait_seconds, error)

    def _learn(self, error: Exception) -> None:
        """The consumer is about to get this error; it ends the stream, unless only the wait is over."""
        if type(error) is TimedOut or isinstance(error, ForkError):
            return
        self._done(None if isinstance(error, StreamEnded) else error)

    def cancel(self, reason: str = "cancelled by the requester") -> None:
        may_retry = bool(self._at_end)
        super().cancel(reason)
        if self._generation == fork_generation():
            # How an attempt failed is not how the stream ended, as long as there could have been another.
            self._done(StreamCancelled(reason) if may_retry else self._call.outcome)

    def _done(self, error: BaseException | None) -> None:
        _attempts_done(self._watch, self._earlier, self._call, error)

    def __del__(self) -> None:
        call = getattr(self, "_call", None)
        if call is not None and not self._watch.told("stream_done"):
            watch, earlier, connection = self._watch, self._earlier, self._calls.connection
            # Between two attempts the outcome is that of the last one, and not the stream's.
            error = None if self._due is None else StreamCancelled("dropped by the requester")
            self._at_end.append(
                lambda: _on_worker(connection, lambda: _attempts_done(watch, earlier, call, error or call.outcome))
            )
        super().__del__()


def _attempts_done(watch: Watch, earlier: dict[str, float], call: Call, error: BaseException | None) -> None:
    """Tell of the end with what all attempts counted: those that broke off, and the last."""
    stream_done(watch, int(earlier["chunks"]) + call.chunks, int(earlier["bytes"]) + call.bytes, error)


class WatchedProcessor:
    """A processor of stream_request() of which hooks are told. It counts over all attempts."""

    def __init__(self, watch: Watch, processor: Callable[[Message], object]) -> None:
        self._watch = watch
        self._processor = processor
        self._chunks = 0
        self._bytes = 0
        self._complete = False

    def __call__(self, message: Message) -> object:
        if message.is_end:
            self._complete = True
        elif message.error is None:
            self._chunks += 1
            self._bytes += len(message.data)
            if self._chunks == 1:
                self._watch.tell_once("stream_first_chunk", self._watch.seconds)
        return self._processor(message)

    def retrying(self, attempt: int, wait_seconds: float, error: BaseException) -> None:
        self._watch.tell("retrying", attempt, wait_seconds, error)

    def returned(self) -> None:
        """The request has returned: at the end, or because the processor wanted no more."""
        self.raised(None if self._complete else StreamCancelled("stopped by the processor"))

    def raised(self, error: BaseException | None) -> None:
        stream_done(self._watch, self._chunks, self._bytes, error)


# -- the responder -----------------------------------------------------------------------------------------------------


class ResponseWatch:
    """Tells hooks of a response: of its first chunk, and of its end, once the handler is done too."""

    def __init__(self, watch: Watch, core: SenderCore) -> None:
        self.watch = watch
        self._core = core
        self._over_at = 0.0
        core.watch = self
        core.when_closed(self._note_time)

    def begun(self) -> None:
        self.watch.tell("response_first_chunk", self.watch.seconds)

    def _note_time(self) -> None:
        self._over_at = time.monotonic()

    def handler_left(self) -> None:
        """The handler has returned: tell of the end, now or when it comes."""
        if self._core.over.happened:
            self._tell_done()
        else:
            self._core.on_close(self._tell_done)

    def _tell_done(self) -> None:
        core = self._core
        seconds = (self._over_at or time.monotonic()) - self.watch.exchange.started
        error = None if core.ended else core.error
        _tell(self.watch, "response_done", seconds, core.count, core.queued_bytes, error)


def watched_runner(runner: Runner) -> Runner:
    """The runner of a stream's handler, which hooks are told of; for senders that have a ResponseWatch."""

    def run(ctx: HandlerContext, request: Message, core: SenderCore) -> BaseException | None:
        told = core.watch
        assert isinstance(told, ResponseWatch)
        try:
            return run_watched(told.watch, lambda: runner(ctx, request, core))
        finally:
            told.handler_left()

    return run


def watched_callback(hooks: HooksOption, subject: str, callback: Callback) -> Callback:
    """A callback of plain messages, which hooks are told of."""

    def run(message: Message) -> None:
        def handler() -> None:
            callback(message)

        run_watched(Watch(hooks, "message", subject, message.headers, message.subject), handler)

    return run


def run_watched(watch: Watch, handler: Callable[[], BaseException | None]) -> BaseException | None:
    """Call a handler between handler_started and handler_done; it returns what it raised, or raises it."""
    _tell(watch, "handler_started")
    try:
        error = handler()
    except BaseException as raised:
        _tell(watch, "handler_done", watch.seconds, raised)
        raise
    _tell(watch, "handler_done", watch.seconds, error)
    return error


# -- threads -----------------------------------------------------------------------------------------------------------


def _tell(watch: Watch, event: str, *values: Any) -> None:
    """tell() on a worker, where nothing that a hook raises belongs to anybody else."""
    run_safely(lambda: watch.tell(event, *values), f"the hook {event}()")


def _on_worker(connection: Connection, task: Callable[[], object]) -> None:
    if not connection.dispatcher.workers.submit(task):
        run_soon(task, "a hook")
