"""Responder: takes requests as they come and has their handlers run, each with its context and its answer.

Streams have a thread pool of their own with a slot for each, so that one that lasts for hours takes no worker from
short requests, and one too many is refused at once instead of waiting unheard. start_stream() runs on the reader's
thread and never waits; the handlers run on workers.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

from natsync import subject as _subject
from natsync.concurrency import Deadline, fork_generation
from natsync.connection import Connection
from natsync.context import Running
from natsync.errors import Code, MaxPayloadExceeded, NatsError
from natsync.headers import Headers
from natsync.hooks import Kind, Watch
from natsync.message import Item, Message
from natsync.middleware import chain_of
from natsync.mux import DeepMux, Mux
from natsync.protocol import Batch, encode_pub
from natsync.reply import ERROR_CODE_HEADER, ERROR_HEADER, TOO_MANY_REQUESTS
from natsync.streaming import frames, handlers, terms
from natsync.streaming.framed_sender import FramedSender
from natsync.streaming.frames import Op
from natsync.streaming.framing import Framing
from natsync.streaming.handlers import Handler, HandlerContext, Runner
from natsync.streaming.passing import Passing, PassingFramedSender, PassingPlainSender
from natsync.streaming.plain_sender import PlainSender
from natsync.streaming.sender import SenderCore, describe
from natsync.streaming.watched import ResponseWatch, run_watched
from natsync.streaming.work import Work
from natsync.subscription import SubscriptionCore
from natsync.workers import WorkerPool

log = logging.getLogger("natsync.streaming")

#: Answers a request, and returns what its handler raised.
Answering: TypeAlias = "Callable[[HandlerContext, Message], BaseException | None]"

#: Seconds after which a refused requester may try again.
RETRY_AFTER = 1.0
#: Seconds for the last flush and for threads to leave, at the least.
CLOSE_SECONDS = 0.5
#: Why requests are turned away that come, or whose turn comes, when there is no time for them any more.
_SHUTTING_DOWN = "the responder is shutting down"
#: The code in Nats-Service-Error-Code for a handler that raised; HTTP's, by convention of NATS services.
_HANDLER_FAILED = 500


class StreamIntake(SubscriptionCore):
    """A subscription whose messages each start a stream: they do not wait, they run or are refused."""

    start: Callable[[Message], None]

    def deliver(self, batch: Batch) -> None:
        """Start a stream for each message. Meanwhile the reader counts as a worker that is inside the callback.

        So nobody takes the registration for idle between a request's arrival and the moment from which it is counted.
        """
        reader = threading.get_ident()
        with self._lock:
            if not self.active:
                return
            self.received += len(batch.items)
            self._running += 1
            self._busy.add(reader)
        try:
            for item in batch.items:
                try:
                    self.start(Message.received(batch.subject, item, self._link.publish_answer))
                except Exception:  # a fault with one request must not end the link of all
                    log.exception("a request on %r could not be started", _subject.decode(batch.subject))
        finally:
            with self._lock:
                self._busy.discard(reader)
                self._running -= 1
                self._changed.notify_all()


class RequestIntake(SubscriptionCore):
    """A subscription to requests: those for which there is no room are turned away, not forgotten."""

    turn_away: Callable[[Message], None]

    def refused(self, subject: bytes, items: list[Item]) -> None:
        for item in items:
            try:
                self.turn_away(Message.received(subject, item, self._link.publish_answer))
            except Exception:
                log.exception("a request on %r could not be turned away", _subject.decode(subject))


class Responder:
    """Runs the handlers of one connection.

    Attributes:
        draining: whether handlers are asked to finish soon.
        attendant: runs what tells of the subscriber itself, on one thread: probes are answered also while all workers
            are busy.
    """

    def __init__(self, connection: Connection, max_streams: int) -> None:
        self.connection = connection
        self.draining = False
        self._max_streams = max_streams
        prefix, unique = connection.options.inbox_prefix, _subject.unique()
        self._plain = connection.add_mux(Mux(frames.control_inbox(prefix, unique, frames.PLAIN_MARK)))
        self._framed = connection.add_mux(DeepMux(frames.control_inbox(prefix, unique, frames.FRAMED_MARK)))
        self._framing = Framing(connection, self._framed)
        # What stands behind the requester's subject in the line of each chunk, at the longest.
        self._address = b"%b.%d.%b.%d" % (self._framed.inbox, frames.MOST, Op.DATA, frames.MOST)
        self._chain = chain_of(connection.options.middleware)
        self._classes: tuple[type[FramedSender], type[PlainSender]] = (FramedSender, PlainSender)
        if self._chain is not None:
            self._classes = (PassingFramedSender, PassingPlainSender)
        # Threads of streams that have ended, and freed their slot, may take a moment to leave.
        self._pool = WorkerPool(f"{connection.name}-stream-worker", 2 * max_streams)
        self.attendant = WorkerPool(f"{connection.name}-attendant", 1)
        self._lock = threading.Lock()
        self._streams: set[HandlerContext] = set()

    @property
    def streams(self) -> int:
        """Streams open now."""
        return len(self._streams)

    @property
    def threads(self) -> int:
        """Threads that run handlers and callbacks, or wait for the next one."""
        return sum(pool.threads for pool in self._pools)

    def in_handler(self) -> bool:
        """Whether the calling thread runs a handler, which must not wait for itself."""
        return any(pool.is_own_thread() for pool in self._pools)

    @property
    def _pools(self) -> tuple[WorkerPool, ...]:
        return self._pool, self.attendant, self.connection.dispatcher.workers

    def close(self, deadline: Deadline) -> None:
        """Close the connection, and let the other threads leave; each gets a moment even if no time is left.

        Streams that have ended are waited for until their requesters have everything.
        """
        left = deadline.remaining()
        self.connection.close(None if left is None else max(left, CLOSE_SECONDS))
        brief = Deadline.after(CLOSE_SECONDS)
        stuck = self._pool.close(brief) + self.attendant.close(brief)
        if stuck:
            log.warning("handlers still running after close(): %s", ", ".join(stuck))

    # -- streams -------------------------------------------------------------------------------------------------

    def start_stream(self, request: Message, runner: Runner, work: Work) -> None:
        """Give a request a slot and a thread, or refuse it."""
        work.count("received")
        if not self._wants_answer("stream", request, work):
            return
        opening = terms.decode_opening(request.headers)
        assert request.reply is not None
        if opening.offer is not None and self._framing.knows(_subject.encode(request.reply)):
            work.count("dropped")  # it came twice, by two subscriptions: one answer is enough
            return
        if self._framing.is_crowded:
            work.count("dropped")  # by requests that were refused, and whose senders do not listen
            self._tell_refused("stream", request, work, "far too many streams")
            return
        ctx = self._context(request, opening, work)
        core = self._sender(request, ctx, opening, work)
        if ctx.cancelled:  # it has waited for too long, or was on its way at the end; the sender knows and has told
            work.count("dropped")
            self._refuse(core, request, work, ctx.reason or _SHUTTING_DOWN)
            return
        if work.full:  # only the reader's thread adds to them
            work.count("dropped")
            self._refuse(core, request, work, f"too many streams on {work.subject!r}: all {work.limit} are in use")
            return
        if not self._take_slot(ctx):
            work.count("dropped")
            self._refuse(core, request, work, f"too many streams: all {self._max_streams} are in use")
            return
        core.when_closed(lambda: self._streams.discard(ctx))
        if not work.begin(ctx, core):
            work.count("dropped")
            self._refuse(core, request, work, _SHUTTING_DOWN)
            return
        if not self._pool.submit(lambda: _run_stream(request, runner, ctx, core, work), queue=False):
            # Shutting down, or all threads are held by handlers that go on although their streams are over.
            self._refuse(core, request, work, "no thread is free to run the handler")
            work.end(ctx, "dropped")

    def _refuse(self, core: SenderCore, request: Message, work: Work, reason: str) -> None:
        only = work.queue is not None
        core.refuse(reason, terms.Status(Code.RESOURCE_EXHAUSTED, retry_after=RETRY_AFTER, only=only))
        self._tell_refused("stream", request, work, reason)

    def _sender(self, request: Message, ctx: HandlerContext, opening: terms.Opening, work: Work) -> SenderCore:
        assert request.reply is not None
        reply, offer = _subject.encode(request.reply), opening.offer
        core: SenderCore
        framed, plain = self._classes
        if offer is not None and self.connection.options.framed and self._framed.denied is None:
            core = framed(self.connection, self._framing, reply, ctx, request.subject, offer)
        else:
            core = plain(self.connection, self._plain, reply, ctx, request.subject, natsync_peer=opening.natsync)
        if self._chain is not None:
            assert isinstance(core, Passing)
            core.pass_through(self._chain, work.kind, work.subject, request)
        watch = self._watch("stream", request, work)
        if watch is not None:
            ResponseWatch(watch, core)
        return core

    def _take_slot(self, ctx: HandlerContext) -> bool:
        with self._lock:
            if len(self._streams) >= self._max_streams:
                return False
            self._streams.add(ctx)
            return True

    # -- request and reply ---------------------------------------------------------------------------------------

    def answer(self, request: Message, run: Answering, single: Runner, work: Work) -> None:
        """Have a request/reply handler answer; as a stream, if one is asked for."""
        if terms.STREAM_HEADER in request.headers:
            self.start_stream(request, single, work)
            return
        work.count("received")
        if not self._wants_answer("request", request, work):
            return
        ctx = self._context(request, terms.decode_opening(request.headers), work)
        if ctx.cancelled or not work.begin(ctx):  # it has waited for too long
            work.count("dropped")
            self.turn_away(request, work, ctx.reason or _SHUTTING_DOWN)
            return
        watch = self._watch("request", request, work)
        outcome, error = "failed", None
        try:
            with Running(ctx):
                error = run(ctx, request) if watch is None else run_watched(watch, lambda: run(ctx, request))
            outcome = "processed" if error is None else "failed"
        finally:
            work.end(ctx, outcome, error)

    def turn_away(self, request: Message, work: Work, reason: str | None = None) -> None:
        """A request/reply handler will not be given this request: say so, instead of nothing. Never waits."""
        if reason is None:
            reason = _SHUTTING_DOWN if work.overdue else f"too many requests wait on {work.subject!r}"
        as_stream = terms.STREAM_HEADER in request.headers
        if request.reply is None or not self._can_answer("stream" if as_stream else "request", request.reply):
            return
        if as_stream:
            opening = terms.decode_opening(request.headers)
            core = self._sender(request, self._context(request, opening, work), opening, work)
            self._refuse(core, request, work, reason)
            return
        headers = Headers({ERROR_HEADER: reason, ERROR_CODE_HEADER: str(TOO_MANY_REQUESTS)})
        self.connection.put_now(encode_pub(_subject.encode(request.reply), None, headers.encode(), b""))
        self._tell_refused("request", request, work, reason)

    def _context(self, request: Message, opening: terms.Opening, work: Work) -> HandlerContext:
        came_at = request.came_at or time.monotonic()
        return HandlerContext(
            work.ctx,
            deadline=None if opening.timeout is None else came_at + opening.timeout,
            metadata=opening.metadata,
            attempt=opening.attempt,
            is_draining=lambda: self.draining,
            resume_cursor=opening.resume,
        )

    def _wants_answer(self, kind: Kind, request: Message, work: Work) -> bool:
        if request.reply is not None and self._can_answer(kind, request.reply):
            return True
        work.count("dropped")
        level, work.warned = logging.DEBUG if work.warned else logging.WARNING, True
        if request.reply is None:
            text, reason = "without a reply subject: ignored, nobody waits for an answer", "no reply subject"
        else:
            text, reason = "whose reply subject is too long to be answered: ignored", "the reply subject is too long"
        log.log(level, "request on %r %s", request.subject, text)
        self._tell_refused(kind, request, work, reason)
        return False

    def _can_answer(self, kind: Kind, reply: str) -> bool:
        """Whether the answer's control lines are short enough; at a longer one the server would end the link of all."""
        return self.connection.fits(_subject.encode(reply), self._address if kind == "stream" else None)

    # -- hooks -----------------------------------------------------------------------------------------------------

    def _watch(self, kind: Kind, request: Message, work: Work) -> Watch | None:
        """A watch on a request, if there are hooks."""
        hooks = self.connection.options.hooks
        return None if hooks is None else Watch(hooks, kind, work.subject, request.headers, request.subject)

    def _tell_refused(self, kind: Kind, request: Message, work: Work, reason: str) -> None:
        watch = self._watch(kind, request, work)
        if watch is not None:
            self.connection.dispatcher.event(lambda: watch.tell("refused", reason))


def answering(function: Handler) -> Answering:
    """For a request/reply handler: publishes what it returned or raised."""

    def answer(ctx: HandlerContext, request: Message) -> BaseException | None:
        try:
            request.respond(handlers.reply_bytes(function(ctx, request)))
            return None
        except BaseException as error:  # SystemExit in a handler must not leave its requester waiting
            _respond_error(request, error)
            handlers.log_raised(request, error)
            return error

    return answer


def _run_stream(request: Message, runner: Runner, ctx: HandlerContext, core: SenderCore, work: Work) -> None:
    """The whole of a stream's handler; the request is over when it has returned and the stream is closed."""
    error: BaseException | None = None
    generation = fork_generation()

    def over() -> None:
        outcome = core.outcome
        work.end(ctx, outcome, (error or core.error) if outcome == "failed" else None)

    try:
        core.accept()
        with Running(ctx):
            error = runner(ctx, request, core)
    finally:
        if generation == fork_generation():  # else a child that the handler forked: all this is its parent's
            core.when_closed(over)


def _respond_error(request: Message, error: BaseException) -> None:
    code = getattr(error, "code", None) if isinstance(error, Exception) else None  # SystemExit's is another kind
    text = terms.header_text(describe(error))
    number = code if isinstance(code, int) else _HANDLER_FAILED
    headers = Headers({ERROR_HEADER: text, ERROR_CODE_HEADER: str(int(number))})
    details = handlers.details_of(error)
    try:
        if details is not None:
            with contextlib.suppress(MaxPayloadExceeded):  # then without them
                request.respond(b"", headers={**headers, terms.DETAILS_HEADER: terms.as_json(details)})
                return
        request.respond(b"", headers=headers)
    except NatsError as failure:
        log.warning("the error of a handler of %r could not be sent: %s", request.subject, failure)
