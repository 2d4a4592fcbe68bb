"""Subscriber: handlers of streams, of requests and of plain messages, and the threads that run them.

The reader finds the registration of a request and queues its handler, no more; handlers run on workers. Streams have a
pool of their own with a slot for each, so that one that lasts for hours takes no worker from short requests, and one
too many is refused at once instead of waiting unheard.
"""

from __future__ import annotations

import logging
import os
import queue as _queue
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar

from natsync import subject as _subject
from natsync.concurrency import Deadline, check_timeout, fork_generation
from natsync.connection import Connection, Status
from natsync.context import Context
from natsync.errors import (
    Cancelled,
    Code,
    ConnectionClosed,
    DrainTimeout,
    ForkError,
    InvalidArgument,
    NatsError,
    TimedOut,
)
from natsync.headers import Headers
from natsync.message import Message
from natsync.mux import Mux
from natsync.options import Servers, connect_options, parse_servers
from natsync.protocol import Batch
from natsync.reply import ERROR_CODE_HEADER, ERROR_HEADER
from natsync.streaming import frames, handlers
from natsync.streaming.activity import Activity
from natsync.streaming.handlers import Handler, HandlerContext, Runner
from natsync.streaming.sender import SenderCore, describe
from natsync.subscription import PENDING_BYTES, PENDING_MESSAGES, Overflow, SubscriptionCore
from natsync.workers import WorkerPool

log = logging.getLogger("natsync.streaming")

F = TypeVar("F", bound=Callable[..., Any])

#: Threads for requests and messages. The Go system has cores × 32.
MAX_WORKERS = max(64, 32 * (os.cpu_count() or 1))
#: Streams at once; the next one is refused.
MAX_STREAMS = 1024
#: Seconds close() waits for handlers to finish, unless told otherwise.
CLOSE_SECONDS = 30.0
#: Seconds that cancelled handlers get to leave.
LEAVE_SECONDS = 2.0
#: Seconds after which a refused requester may try again.
RETRY_AFTER = 1.0
#: The code in Nats-Service-Error-Code for a handler that raised; HTTP's, by convention of NATS services.
_FAILED = 500
_COUNTED = ("received", "processed", "failed", "cancelled", "dropped")


class Handle:
    """One registration, in force until it is stopped or its context ends.

    Attributes:
        subject, queue: as registered.
        ctx: the parent of every request's context; cancelling it stops the registration and everything under way.
    """

    def __init__(self, owner: Subscriber, core: SubscriptionCore, activity: Activity, counters: _Counters) -> None:
        self.subject = _subject.decode(core.subject)
        self.queue = None if core.queue is None else core.queue.decode()
        self.ctx = counters.ctx
        self._owner = owner
        self._core = core
        self._activity = activity
        self._counters = counters
        self._stopped = threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether new requests are taken no more."""
        return self._stopped.is_set() or not self._core.active

    @property
    def stats(self) -> dict[str, int]:
        """received, processed, failed, cancelled, dropped (refused or over the pending limits), active."""
        numbers = self._counters.as_dict()
        numbers["dropped"] += self._core.dropped
        numbers["failed"] += self._core.failed
        numbers["active"] = len(self._activity)
        return numbers

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the registration is stopped, up to timeout seconds (None = no limit); whether it is."""
        return self._stopped.wait(check_timeout(timeout))

    def stop(self, timeout: float | None = None) -> None:
        """Take no more requests, and let those under way finish.

        Blocks until they have, up to timeout seconds (None = no limit, 0 = do not wait); what is still running then
        is cancelled. Idempotent; from one of its own handlers it does not wait.
        """
        deadline = Deadline.after(check_timeout(timeout))
        self._leave(deadline)
        if self._owner._in_handler():
            return
        if not (self._core.wait_empty(deadline) and self._activity.wait_idle(deadline)):
            self.ctx.cancel_soon(Cancelled(f"the registration of {self.subject!r} was stopped"))
            self._activity.wait_idle(Deadline.after(LEAVE_SECONDS if timeout else 0))

    def _leave(self, deadline: Deadline) -> None:
        """Have the server send no more, and take what was on its way."""
        connection = self._owner._connection
        if connection is None or self._stopped.is_set():
            return
        connection.stop_intake(self._core)
        try:
            if connection.status is Status.CONNECTED and not self._owner._in_handler():
                connection.flush(deadline)
        except NatsError as error:
            log.debug("the end of %r was not confirmed: %s", self.subject, error)
        self._end()

    def _context_ended(self) -> None:
        connection = self._owner._connection
        if connection is not None:
            connection.in_supervisor(self._end)
        else:
            self._stopped.set()

    def _end(self) -> None:
        connection = self._owner._connection
        if connection is not None:
            connection.unsubscribe(self._core)
        self._owner._forget(self)
        self._stopped.set()

    def __repr__(self) -> str:
        queue = f", queue={self.queue!r}" if self.queue else ""
        state = "stopped" if self.stopped else "active"
        return f"<Handle {self.subject!r}{queue}: {state}, {len(self._activity)} under way>"


class _Counters:
    """Numbers of one registration, and its context."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self._lock = threading.Lock()
        self._numbers = dict.fromkeys(_COUNTED, 0)

    def add(self, name: str) -> None:
        with self._lock:
            self._numbers[name] += 1

    def as_dict(self) -> dict[str, int]:
        with self._lock:
            return dict(self._numbers)


class _StreamIntake(SubscriptionCore):
    """A subscription whose messages each start a stream: they do not wait, they run or are refused."""

    start: Callable[[Message], None]

    def deliver(self, batch: Batch) -> None:
        for item in batch.items:
            self.received += 1
            try:
                self.start(Message.received(batch.subject, item, self._link.publish_answer))
            except Exception:  # a fault with one request must not end the link of all
                log.exception("a request on %r could not be started", _subject.decode(batch.subject))


class Subscriber:
    """The responding side: register handlers, then serve.

    The constructor opens nothing; `with`, open() or serve_forever() do. Decorators on a subscriber that is not open
    only record; on an open one they are live at the server when they return, as are stream_subscribe() and its kin,
    which open it. Safe from any thread.

    Args:
        servers: a URL, several, or None for NATS_URL or localhost.
        max_workers: threads for requests and plain messages; what comes when all are busy waits.
        max_streams: streams at once; the next one is refused.
        pending_messages, pending_bytes: what may wait per registration.
        options: those of ConnectOptions.
    """

    def __init__(
        self,
        servers: Servers = None,
        *,
        max_workers: int = MAX_WORKERS,
        max_streams: int = MAX_STREAMS,
        pending_messages: int = PENDING_MESSAGES,
        pending_bytes: int = PENDING_BYTES,
        **options: Any,
    ) -> None:
        for name, value in (("max_workers", max_workers), ("max_streams", max_streams)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidArgument(f"{name}={value!r}: a whole number from 1 up")
        self._servers = parse_servers(servers)
        self._options = connect_options(options)
        self._max_workers = max_workers
        self._max_streams = max_streams
        self._limits: dict[str, Any] = {"pending_messages": pending_messages, "pending_bytes": pending_bytes}
        self._lock = threading.Lock()
        self._generation = fork_generation()
        self._recorded: list[Callable[[], Handle]] = []
        self._connection: Connection | None = None
        self._control: Mux | None = None
        self._streams_pool: WorkerPool | None = None
        self._handles: list[Handle] = []
        self._streams = 0
        self._draining = False
        self._closed = False
        self._retired = dict.fromkeys(_COUNTED, 0)
        self._stop_requests: _queue.SimpleQueue[str] | None = None

    # -- registering ---------------------------------------------------------------------------------------------

    def stream_subscribe(
        self, subject: str, handler: Handler, *, queue: str | None = None, ctx: Context | None = None
    ) -> Handle:
        """Answer requests on the subject with streams; opens the subscriber.

        handler(ctx, request, sender) may return at once and go on sending from threads of its own; it must end the
        sender. handler(ctx, request) returning an iterator (or a generator function) ends by itself. Each request
        has a thread of its own for as long as its handler runs. Live at the server when this returns.

        Raises:
            InvalidArgument, TypeError: the subject, the queue or the handler cannot be used; nothing was registered.
            NoServersError: there is no connection yet, and none could be made.
        """
        return self._subscribe_stream(subject, handlers.stream_runner(handler), queue, ctx)

    def batch_stream_subscribe(
        self, subject: str, handler: Handler, *, queue: str | None = None, ctx: Context | None = None
    ) -> Handle:
        """stream_subscribe() for handlers that send in batches.

        handler(ctx, request, sender) uses sender.send_many(); the pull form handler(request, index) returns
        (list of data, more) and is called until more is false. A batch leaves in one write where it can.
        Raises as stream_subscribe() does.
        """
        return self._subscribe_stream(subject, handlers.batch_runner(handler), queue, ctx)

    def legacy_stream_subscribe(
        self, subject: str, handler: Handler, *, queue: str | None = None, ctx: Context | None = None, pause: float = 0
    ) -> Handle:
        """stream_subscribe() for the pull form handler(request, index) -> (data, more).

        It is called until more is false, pausing `pause` seconds between calls; empty data is skipped. The stream
        always ends, with an error if the handler raised. Raises as stream_subscribe() does.
        """
        return self._subscribe_stream(subject, handlers.legacy_runner(handler, pause), queue, ctx)

    def subscribe(
        self,
        subject: str,
        handler: Callable[[Message], object],
        *,
        queue: str | None = None,
        concurrency: int = 1,
        overflow: Overflow = "drop_new",
        ctx: Context | None = None,
    ) -> Handle:
        """Have handler(message) called for every message; opens the subscriber.

        concurrency=1 keeps their order. When pending_messages or pending_bytes wait, overflow decides which is lost:
        "drop_new" or "drop_old"; every loss is counted. Raises as stream_subscribe() does.
        """
        handlers.arguments(handler, (1,), "(message)")
        counters = _Counters((ctx or Context()).with_cancel())
        activity = Activity()

        def run(message: Message) -> None:
            counters.add("received")
            handler(message)
            counters.add("processed")

        return self._live(subject, queue, run, counters, activity, concurrency=concurrency, overflow=overflow)

    def stream(self, subject: str, *, queue: str | None = None) -> Callable[[F], F]:
        """Decorator form of stream_subscribe(): @subscriber.stream("llm.chat", queue="llm").

        The function is checked here and returned unchanged.
        """

        def decorate(function: F) -> F:
            runner = handlers.stream_runner(function)
            self._record(subject, queue, lambda: self._subscribe_stream(subject, runner, queue, None))
            return function

        return decorate

    def handler(self, subject: str, *, queue: str | None = None) -> Callable[[F], F]:
        """Decorator for request/reply: what function(ctx, request) returns is the reply.

        bytes and str go as they are, None is an empty reply, anything else is sent as JSON. An exception is sent as
        Nats-Service-Error headers, which raise HandlerError at a natsync requester. A requester that asks for a
        stream gets the one reply as its only chunk.
        """

        def decorate(function: F) -> F:
            handlers.arguments(function, (2,), "(ctx, request)")
            self._record(subject, queue, lambda: self._subscribe_reply(subject, function, queue))
            return function

        return decorate

    def _record(self, subject: str, queue: str | None, register: Callable[[], Handle]) -> None:
        _subject.subscribe_subject(subject)
        if queue is not None:
            _subject.queue_name(queue)
        with self._lock:
            self._check_usable_locked()
            is_open = self._connection is not None
            if not is_open:
                self._recorded.append(register)
        if is_open:
            register()

    def _subscribe_stream(self, subject: str, runner: Runner, queue: str | None, ctx: Context | None) -> Handle:
        counters = _Counters((ctx or Context()).with_cancel())
        activity = Activity()
        return self._live(
            subject, queue, lambda message: self._start_stream(message, runner, counters, activity), counters, activity,
            intake=_StreamIntake,
        )  # fmt: skip

    def _subscribe_reply(self, subject: str, function: Handler, queue: str | None) -> Handle:
        counters = _Counters(Context())
        activity = Activity()
        single = handlers.single_runner(function)

        def run(message: Message) -> None:
            if frames.STREAM_HEADER in message.headers:
                self._start_stream(message, single, counters, activity)
            else:
                self._reply(message, function, counters, activity)

        return self._live(subject, queue, run, counters, activity, concurrency=self._max_workers)

    def _live(
        self,
        subject: str,
        queue: str | None,
        take: Callable[[Message], None],
        counters: _Counters,
        activity: Activity,
        *,
        intake: type[SubscriptionCore] = SubscriptionCore,
        **limits: Any,
    ) -> Handle:
        """Subscribe, and return when the server knows."""
        counters.ctx.check()
        name = None if queue is None else _subject.queue_name(queue)
        wanted = _subject.subscribe_subject(subject)
        connection = self._opened()
        core = intake(
            connection, wanted, name, callback=take, pool=connection.dispatcher.workers, **self._limits, **limits
        )
        if isinstance(core, _StreamIntake):
            core.start = take
        handle = Handle(self, core, activity, counters)
        with self._lock:
            self._handles.append(handle)
        connection.subscribe(core)
        counters.ctx.on_end(handle._context_ended)
        if connection.status is Status.CONNECTED:
            try:
                connection.flush(Deadline.after(self._options.connect_timeout))
            except (TimedOut, ConnectionError) as error:  # the next link subscribes it
                log.info("%r is not confirmed by the server yet: %s", subject, error)
        return handle

    # -- requests --------------------------------------------------------------------------------------------------

    def _start_stream(self, request: Message, runner: Runner, counters: _Counters, activity: Activity) -> None:
        """Give a request a slot and a thread, or refuse it. Runs on the reader: it must not block."""
        counters.add("received")
        if request.reply is None:
            log.warning("request on %r without a reply subject: ignored, nobody waits for an answer", request.subject)
            counters.add("dropped")
            return
        opening = frames.decode_opening(request.headers)
        ctx = self._context(opening, counters.ctx)
        core = self._sender(request, ctx, opening.natsync)
        if not self._take_slot():
            counters.add("dropped")
            status = frames.Status(Code.RESOURCE_EXHAUSTED, reason=frames.REFUSED, retry_after=RETRY_AFTER)
            core.fail(f"too many streams: all {self._max_streams} are in use", status)
            return
        core.when_closed(self._free_slot)
        activity.begin(ctx)
        pool = self._streams_pool
        if pool is None or not pool.submit(lambda: self._run_stream(request, runner, ctx, core, counters, activity)):
            core.fail("the responder is shutting down", frames.Status(Code.UNAVAILABLE, reason=frames.REFUSED))
            activity.end(ctx)

    def _run_stream(
        self,
        request: Message,
        runner: Runner,
        ctx: HandlerContext,
        core: SenderCore,
        counters: _Counters,
        activity: Activity,
    ) -> None:
        def finished() -> None:
            counters.add(core.outcome)
            ctx.cancel_soon(Cancelled("the stream is over"))
            activity.end(ctx)

        core.accept()
        runner(ctx, request, core)
        core.when_closed(finished)

    def _reply(self, request: Message, function: Handler, counters: _Counters, activity: Activity) -> None:
        """Run a request/reply handler and publish what it returned or raised."""
        counters.add("received")
        if request.reply is None:
            log.warning("request on %r without a reply subject: ignored, nobody waits for an answer", request.subject)
            counters.add("dropped")
            return
        ctx = self._context(frames.decode_opening(request.headers), counters.ctx)
        activity.begin(ctx)
        try:
            request.respond(handlers.reply_bytes(function(ctx, request)))
            counters.add("processed")
        except BaseException as error:  # SystemExit in a handler must not leave its requester waiting
            counters.add("failed")
            log.exception("handler of %r raised", request.subject)
            self._respond_error(request, error)
        finally:
            ctx.cancel_soon(Cancelled("the request was answered"))
            activity.end(ctx)

    def _respond_error(self, request: Message, error: BaseException) -> None:
        code = getattr(error, "code", None)
        text = " ".join(describe(error).split())[:1000]
        headers = Headers(
            {ERROR_HEADER: text.replace("\0", ""), ERROR_CODE_HEADER: str(code if isinstance(code, int) else _FAILED)}
        )
        try:
            request.respond(b"", headers=headers)
        except NatsError as failure:
            log.warning("the error of a handler of %r could not be sent: %s", request.subject, failure)

    def _context(self, opening: frames.Opening, parent: Context) -> HandlerContext:
        return HandlerContext(
            parent,
            deadline=None if opening.timeout is None else time.monotonic() + opening.timeout,
            metadata=opening.metadata,
            attempt=opening.attempt,
            is_draining=lambda: self._draining,
        )

    def _sender(self, request: Message, ctx: HandlerContext, natsync_peer: bool) -> SenderCore:
        assert self._connection is not None
        assert self._control is not None
        assert request.reply is not None
        reply = request.reply.encode("utf-8", "surrogateescape")
        return SenderCore(
            self._connection, self._control, reply, ctx, natsync_peer=natsync_peer, subject=request.subject
        )

    def _take_slot(self) -> bool:
        with self._lock:
            if self._streams >= self._max_streams:
                return False
            self._streams += 1
            return True

    def _free_slot(self) -> None:
        with self._lock:
            self._streams -= 1

    # -- life --------------------------------------------------------------------------------------------------------

    def open(self) -> Subscriber:
        """Connect and put every recorded handler in force; returns itself. Idempotent.

        Blocks until the server has confirmed the subscriptions.

        Raises:
            NoServersError: no server could be reached; .causes says why for each.
            ConnectionClosed: it was closed.
        """
        self._opened()
        with self._lock:
            recorded, self._recorded = self._recorded, []
        for register in recorded:
            register()
        return self

    def _opened(self) -> Connection:
        with self._lock:
            self._check_usable_locked()
            if self._connection is None:
                connection = Connection(self._servers, self._options, self._max_workers)
                inbox = frames.control_inbox(self._options.inbox_prefix, _subject.unique())
                self._control = connection.add_mux(Mux(inbox))
                # Threads of streams that have ended, and freed their slot, may take a moment to leave.
                self._streams_pool = WorkerPool(f"{connection.name}-stream-worker", 2 * self._max_streams)
                self._connection = connection
            connection = self._connection
        connection.ensure_open()
        return connection

    def _check_usable_locked(self) -> None:
        if self._closed:
            raise ConnectionClosed("the subscriber is closed")
        if self._generation != fork_generation():
            if self._connection is not None:
                raise ForkError("this subscriber was opened in the parent process; make a new one in the child")
            self._generation = fork_generation()

    def serve_forever(self, *, shutdown_timeout: float | None = CLOSE_SECONDS) -> None:
        """Open, and serve until SIGINT or SIGTERM or close(); then shut down and return.

        The first signal drains: no new requests, those under way get shutdown_timeout seconds. A second one cancels
        them. Off the main thread no signals are caught; stop() from another thread ends it.
        """
        self._stop_requests = _queue.SimpleQueue()
        restore = self._catch_signals()
        try:
            self.open()
            reason = self._stop_requests.get()
            log.info("shutting down: %s", reason)
            self._shut_down(Deadline.after(check_timeout(shutdown_timeout, "shutdown_timeout")))
        finally:
            for number, previous in restore.items():
                signal.signal(number, previous)
            self._stop_requests = None

    def stop(self) -> None:
        """Have serve_forever() shut down and return, from another thread. Does not wait."""
        requests = self._stop_requests
        if requests is not None:
            requests.put("stop() was called")

    def _catch_signals(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}
        requests = self._stop_requests
        assert requests is not None

        def caught(number: int, frame: FrameType | None) -> None:
            requests.put(signal.Signals(number).name)  # SimpleQueue.put is safe in a signal handler, locks are not

        return {number: signal.signal(number, caught) for number in (signal.SIGINT, signal.SIGTERM)}

    def _shut_down(self, deadline: Deadline) -> None:
        """close() by the deadline in a thread, so that a second signal can cut it short."""
        requests = self._stop_requests
        assert requests is not None

        def close() -> None:
            try:
                self.close(deadline.remaining())
            finally:
                requests.put("done")

        thread = threading.Thread(target=close, name="natsync-shutdown", daemon=True)
        thread.start()
        while (word := requests.get()) != "done":
            if word.startswith("SIG"):
                log.warning("%s again: cancelling what is under way", word)
                self._cancel_all("the responder was told to stop at once")
        thread.join()

    def drain(self, timeout: float | None = CLOSE_SECONDS) -> None:
        """Take no more requests, let those under way finish, and close.

        Blocks up to timeout seconds (None = no limit).

        Raises:
            DrainTimeout: something was still under way, and was cancelled; everything is closed all the same.
        """
        unfinished = self._close(Deadline.after(check_timeout(timeout)))
        if unfinished:
            raise DrainTimeout(f"cancelled after {timeout} s: " + "; ".join(unfinished))

    def close(self, timeout: float | None = CLOSE_SECONDS) -> None:
        """Take no more requests, let those under way finish, cancel what lasts longer than timeout seconds, close.

        While it waits, requests that were on their way are served, and the server's PINGs answered. Idempotent; safe
        from a handler, which then does not wait for itself.
        """
        for what in self._close(Deadline.after(check_timeout(timeout))):
            log.warning("cancelled by close(): %s", what)

    def _close(self, deadline: Deadline) -> list[str]:
        with self._lock:
            if self._closed or self._generation != fork_generation():
                self._closed = True
                return []
            self._closed = self._draining = True
            handles, connection, pool = list(self._handles), self._connection, self._streams_pool
        if connection is None or pool is None:
            return []
        inside = self._in_handler()
        for handle in handles:
            handle._leave(deadline)
        unfinished = []
        for handle in handles:
            if not inside and not (handle._core.wait_empty(deadline) and handle._activity.wait_idle(deadline)):
                unfinished.append(f"{len(handle._activity)} requests on {handle.subject!r}")
        self._cancel(handles, "the responder is shutting down")
        leave = Deadline.after(LEAVE_SECONDS)
        for handle in handles:
            if not inside:
                handle._activity.wait_idle(leave)
        connection.close()
        pool.close(leave)
        if self._stop_requests is not None:
            self._stop_requests.put("closed")
        return unfinished

    def _cancel_all(self, reason: str) -> None:
        with self._lock:
            handles = list(self._handles)
        self._cancel(handles, reason)

    def _cancel(self, handles: list[Handle], reason: str) -> None:
        for handle in handles:
            handle._activity.cancel(reason)

    def _in_handler(self) -> bool:
        """Whether the calling thread is one of this subscriber's workers, which must not wait for itself."""
        pools = [self._streams_pool, self._connection.dispatcher.workers if self._connection else None]
        return any(pool is not None and pool.is_own_thread() for pool in pools)

    def _forget(self, handle: Handle) -> None:
        with self._lock:
            if handle in self._handles and not self._closed:
                self._handles.remove(handle)
                for name, value in handle.stats.items():
                    if name in self._retired:
                        self._retired[name] += value

    def __enter__(self) -> Subscriber:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- asking --------------------------------------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """Where its connection is in its life; see Client.status."""
        if self._closed:
            return "draining" if self._connection and self._connection.status is not Status.CLOSED else "closed"
        return str(self._connection.status) if self._connection else "new"

    @property
    def handles(self) -> list[Handle]:
        """The registrations in force."""
        with self._lock:
            return list(self._handles)

    def stats(self) -> dict[str, Any]:
        """The numbers of all registrations together (see Handle.stats), and streams, threads, connection."""
        with self._lock:
            totals: dict[str, Any] = {**self._retired, "active": 0}
            handles, streams = list(self._handles), self._streams
        for handle in handles:
            for name, value in handle.stats.items():
                totals[name] += value
        totals["streams"] = streams
        totals["threads"] = self._streams_pool.threads if self._streams_pool else 0
        if self._connection is not None:
            totals["threads"] += self._connection.dispatcher.workers.threads
            totals["connection"] = self._connection.stats()
        return totals

    def __repr__(self) -> str:
        return f"<Subscriber {self.status}: {len(self._handles)} registrations, {self._streams} streams>"
