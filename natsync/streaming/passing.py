"""What takes requests, streams and handlers through the middleware; made only where there is some.

Without middleware nothing here runs: streams and senders are then of the plain classes, whose subclasses these are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from natsync.concurrency import Deadline
from natsync.hooks import Kind, Watch
from natsync.message import Message
from natsync.middleware import Chain, Passage
from natsync.streaming.framed_sender import FramedSender
from natsync.streaming.handlers import Handler, HandlerContext, Sending
from natsync.streaming.plain_sender import PlainSender
from natsync.streaming.sender import SenderCore
from natsync.streaming.stream import Stream
from natsync.streaming.watched import WatchedStream
from natsync.subscription import Callback, Subscription

# -- the requester -----------------------------------------------------------------------------------------------------


class PassingStream(Stream):
    """A Stream whose chunks pass the middleware as the consumer takes them; what that raises cancels the stream."""

    def __init__(self, passage: Passage, *arguments: Any) -> None:
        self._passage = passage
        super().__init__(*arguments)

    def __next__(self) -> bytes:
        return self._passed(super().__next__())

    def next(self, timeout: float | None = None) -> bytes:
        return self._passed(super().next(timeout))

    next.__doc__ = Stream.next.__doc__

    def _passed(self, chunk: bytes) -> bytes:
        self._passage.reply_headers = self.headers
        try:
            return self._passage.receive(chunk)
        except BaseException as error:
            self.cancel(f"refused by the middleware: {type(error).__name__}")
            raise


class PassingWatchedStream(PassingStream, WatchedStream):
    """Both: hooks are told of the chunks as they came."""


def stream_maker(watch: Watch | None, passage: Passage | None) -> Callable[..., Stream]:
    """The class of streams that there is need of."""
    if passage is None:
        return Stream if watch is None else partial(WatchedStream, watch)
    return partial(PassingStream, passage) if watch is None else partial(PassingWatchedStream, passage, watch)


def passing_processor(passage: Passage, processor: Callable[[Message], object]) -> Callable[[Message], object]:
    """A processor of stream_request(): chunks pass the middleware, END and ERROR go round."""

    def process(message: Message) -> object:
        return processor(message if message.is_end or message.error is not None else passage.received(message))

    return process


# -- whoever takes messages, requests included -------------------------------------------------------------------------


class PassingSubscription(Subscription):
    """A Subscription whose messages pass the middleware as they are taken."""

    def __init__(self, chain: Chain, *arguments: Any) -> None:
        self._chain = chain
        super().__init__(*arguments)

    def _take(self, deadline: Deadline) -> Message | None:
        message = super()._take(deadline)
        if message is not None:
            with self._chain.responder("message", self.subject, message).admitted(message, around=False):
                pass
        return message


def passing_callback(chain: Chain, subject: str, callback: Callback) -> Callback:
    """A callback of plain messages, behind the middleware."""

    def run(message: Message) -> None:
        with chain.responder("message", subject, message).admitted(message):
            callback(message)

    return run


def passing_function(chain: Chain, subject: str, function: Handler) -> Handler:
    """A handler of requests, behind the middleware."""

    def run(ctx: HandlerContext, request: Message) -> Any:
        with chain.responder("request", subject, request).admitted(request):
            return function(ctx, request)

    return run


def passing_runner(run: Sending) -> Sending:
    """The runner of a stream's handler, behind the middleware; for senders that are Passing."""

    def passing(ctx: HandlerContext, request: Message, core: SenderCore) -> None:
        assert isinstance(core, Passing)
        with core.passage.admitted(request):
            run(ctx, request, core)

    return passing


class Passing(SenderCore):
    """What a sender needs for its chunks to pass the middleware, as the innermost part of its class."""

    passage: Passage
    _telling: threading.Lock
    _told = False

    @property
    def direct(self) -> None:
        """Chunks have to pass first."""

    def pass_through(self, chain: Chain, kind: Kind, subject: str, request: Message) -> None:
        self.passage = chain.responder(kind, subject, request)
        self._telling = threading.Lock()

    def _passed(self, data: bytes) -> bytes:
        data = self.passage.send(data)
        if not self._told:
            with self._telling:  # another thread's first chunk does not overtake the headers either
                if not self._told:
                    for key in list(self.passage.reply_headers):
                        self.set_header(key, self.passage.reply_headers[key])
                    self._told = True
        return data

    def send(self, data: bytes, deadline: Deadline) -> int:
        return super().send(self._passed(data), deadline)

    def try_send(self, data: bytes) -> bool:
        return super().try_send(self._passed(data))

    def send_many(self, chunks: list[bytes], deadline: Deadline) -> int:
        return super().send_many([self._passed(chunk) for chunk in chunks], deadline)


class PassingFramedSender(Passing, FramedSender):
    """A response in framed mode, behind the middleware."""


class PassingPlainSender(Passing, PlainSender):
    """A response in plain mode, behind the middleware."""
