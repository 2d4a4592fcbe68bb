"""Subscriber: where handlers of streams, of requests and of plain messages are registered, and served.

What happens to a request is Responder's business; this is the face that users see, and the order in which things open
and close.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar, overload

from natsync import subject as _subject
from natsync.concurrency import Deadline, SafeEvent, after_fork_in_child, check_timeout, fork_generation
from natsync.connection import Connection
from natsync.context import Context
from natsync.errors import ConnectionClosed, DrainTimeout, ForkError, InvalidArgument, TimedOut
from natsync.links import Status
from natsync.message import Message
from natsync.middleware import chain_of
from natsync.options import Options, Servers, Unpack, connect_options, connect_settings
from natsync.streaming import handlers
from natsync.streaming.handlers import Handler, Runner, Sending
from natsync.streaming.passing import passing_callback, passing_function, passing_runner
from natsync.streaming.registration import LEAVE_SECONDS, Handle
from natsync.streaming.responder import RequestIntake, Responder, StreamIntake, answering
from natsync.streaming.serving import Serving
from natsync.streaming.watched import watched_callback, watched_runner
from natsync.streaming.work import COUNTED, Work
from natsync.subscription import PENDING_BYTES, PENDING_MESSAGES, Overflow, SubscriptionCore, check_limits
from natsync.workers import WorkerPool

log = logging.getLogger("natsync.streaming")

F = TypeVar("F", bound=Callable[..., Any])

#: Threads for requests and messages. The Go system has cores × 32.
MAX_WORKERS = max(64, 32 * (os.cpu_count() or 1))
#: Streams at once; the next one is refused.
MAX_STREAMS = 1024
#: Seconds close() waits for handlers to finish, unless told otherwise.
CLOSE_SECONDS = 30.0


class Subscriber:
    """The responding side: register handlers, then serve.

    The constructor opens nothing; `with`, open() or serve_forever() do. Decorators on a subscriber that is not open
    only record; on an open one they are live at the server when they return, as are stream_subscribe() and its kin
    and subscribe() with a handler, which open it. Safe from any thread.

    Args:
        servers: a URL, several, or None for NATS_URL or localhost.
        max_workers: threads for requests and plain messages; what comes when all are busy waits.
        max_streams: streams at once; the next one is refused.
        pending_messages, pending_bytes: what may wait per registration.
        options: those of ConnectOptions.

    Attributes:
        default_queue: the queue group of stream and request handlers that name none; None = each subscriber gets every
            request. Counts from the registration on; `natsync serve` sets it.
    """

    def __init__(
        self,
        servers: Servers = None,
        *,
        max_workers: int = MAX_WORKERS,
        max_streams: int = MAX_STREAMS,
        pending_messages: int = PENDING_MESSAGES,
        pending_bytes: int = PENDING_BYTES,
        **options: Unpack[Options],
    ) -> None:
        for name, value in (("max_workers", max_workers), ("max_streams", max_streams)):
            check_limit(name, value)
        check_limits(None, pending_messages, pending_bytes, "drop_new", 1)
        self._servers, self._options = connect_settings(servers, options)
        self._chain = chain_of(self._options.middleware)
        self._max_workers = max_workers
        self._max_streams = max_streams
        self._limits: dict[str, Any] = {"pending_messages": pending_messages, "pending_bytes": pending_bytes}
        self.default_queue: str | None = None
        self._lock = threading.Lock()
        self._generation = fork_generation()
        self._recorded: list[Callable[[], object]] = []
        self._responder: Responder | None = None
        self._serving: Serving | None = None
        self._handles: list[Handle] = []
        self._leaving: list[Handle] = []  # stopped, with requests still under way
        self._retired = dict.fromkeys(COUNTED, 0)
        self._closed = False
        self._closer: object = None  # who is at it, or has done it
        self._close_done = SafeEvent()
        _subscribers.add(self)

    def default_options(self, **options: Unpack[Options]) -> None:
        """Give connection options for what this subscriber was made without; what it was made with stays.

        For programs that run other people's subscribers, such as `natsync serve`. Before the first use; later it
        takes only what would not count anyway.

        Raises:
            RuntimeError: it is open, or was, and was made without one of these.
            TypeError, InvalidArgument: an option cannot be used.
        """
        connect_options(options)
        with self._lock:
            filled = self._options.filled(options)
            if filled != self._options and (self._responder is not None or self._closed):
                raise RuntimeError("default_options() comes before open()")
            self._options = filled

    # -- registering ---------------------------------------------------------------------------------------------

    def stream_subscribe(
        self,
        subject: str,
        handler: Handler,
        *,
        queue: str | None = None,
        ctx: Context | None = None,
        max_streams: int | None = None,
    ) -> Handle:
        """Answer requests on the subject with streams; opens the subscriber.

        handler(ctx, request, sender) may return at once and go on sending from threads of its own; it must end the
        sender. handler(ctx, request) returning an iterator (or a generator function) ends by itself. Each request
        has a thread of its own for as long as its handler runs. Beyond max_streams at once on this registration, and
        beyond the subscriber's own, requests are refused. Blocks until it is live at the server.

        Raises:
            InvalidArgument, TypeError: the subject, the queue or the handler cannot be used; nothing was registered.
            Cancelled, DeadlineExceeded: ctx has ended already.
            NoServersError: there is no connection yet, and none could be made.
        """
        return self._stream_now(subject, handlers.stream_runner(handler), queue, ctx, max_streams)

    def batch_stream_subscribe(
        self,
        subject: str,
        handler: Handler,
        *,
        queue: str | None = None,
        ctx: Context | None = None,
        max_streams: int | None = None,
    ) -> Handle:
        """stream_subscribe() for handlers that send in batches.

        handler(ctx, request, sender) uses sender.send_many(); the pull form handler(request, index) returns
        (list of data, more) and is called until more is false. A batch leaves in one write where it can.
        Raises as stream_subscribe() does.
        """
        return self._stream_now(subject, handlers.batch_runner(handler), queue, ctx, max_streams)

    def legacy_stream_subscribe(
        self,
        subject: str,
        handler: Handler,
        *,
        queue: str | None = None,
        ctx: Context | None = None,
        max_streams: int | None = None,
        pause: float = 0,
    ) -> Handle:
        """stream_subscribe() for the pull form handler(request, index) -> (data, more).

        It is called until more is false, pausing `pause` seconds between calls; empty data is skipped. The stream
        always ends, with an error if the handler raised. Raises as stream_subscribe() does.
        """
        return self._stream_now(subject, handlers.legacy_runner(handler, pause), queue, ctx, max_streams)

    @overload
    def subscribe(
        self,
        subject: str,
        handler: None = None,
        *,
        queue: str | None = None,
        concurrency: int = 1,
        overflow: Overflow = "drop_new",
        ctx: Context | None = None,
    ) -> Callable[[F], F]: ...

    @overload
    def subscribe(
        self,
        subject: str,
        handler: Callable[[Message], object],
        *,
        queue: str | None = None,
        concurrency: int = 1,
        overflow: Overflow = "drop_new",
        ctx: Context | None = None,
    ) -> Handle: ...

    def subscribe(
        self,
        subject: str,
        handler: Callable[[Message], object] | None = None,
        *,
        queue: str | None = None,
        concurrency: int = 1,
        overflow: Overflow = "drop_new",
        ctx: Context | None = None,
    ) -> Handle | Callable[[F], F]:
        """Have handler(message) called for every message; opens the subscriber.

        Without a handler it is a decorator, as stream() is, that only records while the subscriber is not open:
        @subscriber.subscribe("events.login"). What is recorded with a ctx that has ended by then is left out.

        concurrency=1 keeps their order. When pending_messages or pending_bytes wait, overflow decides which is lost:
        "drop_new" or "drop_old"; every loss is counted. default_queue does not count here: without queue= each
        subscriber gets every message. Raises as stream_subscribe() does.
        """
        self._check_place("subscribe", subject, queue)
        check_limits(None, PENDING_MESSAGES, PENDING_BYTES, overflow, concurrency, called=True)
        limits: dict[str, Any] = {"concurrency": concurrency, "overflow": overflow}
        if handler is not None:
            handlers.arguments(handler, (1,), "(message)")
            self.open()
            return self._register_plain(subject, handler, queue, ctx, limits)
        if ctx is not None:
            ctx.check()

        def decorate(function: F) -> F:
            handlers.arguments(function, (1,), "(message)")

            def register() -> None:
                if ctx is None or not ctx.cancelled:
                    self._register_plain(subject, function, queue, ctx, limits)

            self._record(subject, queue, register)
            return function

        return decorate

    def stream(self, subject: str, *, queue: str | None = None, max_streams: int | None = None) -> Callable[[F], F]:
        """Decorator form of stream_subscribe(): @subscriber.stream("llm.chat", queue="llm").

        The function is checked here and returned unchanged. Raises as stream_subscribe() does.
        """
        self._check_place("stream", subject, queue)
        check_limit("max_streams", max_streams)

        def decorate(function: F) -> F:
            runner = handlers.stream_runner(function)
            self._record(subject, queue, lambda: self._register_stream(subject, runner, queue, None, max_streams))
            return function

        return decorate

    def handler(
        self,
        subject: str,
        *,
        queue: str | None = None,
        max_workers: int | None = None,
        pending_messages: int | None = None,
    ) -> Callable[[F], F]:
        """Decorator for request/reply: what function(ctx, request) returns is the reply.

        bytes and str go as they are, None is an empty reply, anything else is sent as JSON. An exception is sent as
        Nats-Service-Error headers, which raise HandlerError at a natsync requester. A requester that asks for a
        stream gets the one reply as its only chunk. max_workers of this registration's requests are handled at once,
        and pending_messages of them wait (None = the subscriber's own limits); one too many is answered at once, with
        an error of code 429, which Retry repeats. So is one that still waits when its deadline has passed, or the time
        for shutting down is over: its handler is not begun.
        """
        self._check_place("handler", subject, queue)
        check_limit("max_workers", max_workers)
        check_limit("pending_messages", pending_messages)
        limits = {} if pending_messages is None else {"pending_messages": pending_messages}

        def decorate(function: F) -> F:
            handlers.arguments(function, (2,), "(ctx, request)")
            workers = max_workers or self._max_workers
            self._record(subject, queue, lambda: self._register_reply(subject, function, queue, workers, limits))
            return function

        return decorate

    def _check_place(self, form: str, subject: str, queue: str | None) -> None:
        check_decorator(form, subject)
        _subject.interest(subject, queue, self._options.max_control_line)

    def _record(self, subject: str, queue: str | None, register: Callable[[], object]) -> None:
        """Keep a registration for open(), or make it now if the subscriber is open."""
        _subject.interest(subject, queue, self._options.max_control_line)
        with self._lock:
            self._check_usable_locked()
            responder = self._responder
            is_open = responder is not None and responder.connection.status not in (Status.NEW, Status.CONNECTING)
            if not is_open:
                self._recorded.append(register)
        if is_open:
            register()

    def _stream_now(
        self, subject: str, runner: Sending, queue: str | None, ctx: Context | None, max_streams: int | None
    ) -> Handle:
        check_limit("max_streams", max_streams)
        _subject.interest(subject, queue, self._options.max_control_line)
        self.open()
        return self._register_stream(subject, runner, queue, ctx, max_streams)

    def _register_stream(
        self, subject: str, runner: Sending, queue: str | None, ctx: Context | None, limit: int | None
    ) -> Handle:
        queue = queue or self.default_queue
        work = Work((ctx or Context()).with_cancel(), "stream", subject, queue, limit)
        run = self._runner(runner)
        responder = self._opened()

        def take(message: Message) -> None:
            responder.start_stream(message, run, work)

        return self._register(subject, queue, take, work, intake=StreamIntake)

    def _register_reply(
        self, subject: str, function: Handler, queue: str | None, workers: int, limits: dict[str, Any]
    ) -> Handle:
        queue = queue or self.default_queue
        work = Work(Context(), "request", subject, queue)
        run = answering(function if self._chain is None else passing_function(self._chain, subject, function))
        single = self._runner(handlers.single_runner(function))
        responder = self._opened()

        def take(message: Message) -> None:
            responder.answer(message, run, single, work)

        return self._register(subject, queue, take, work, intake=RequestIntake, concurrency=workers, **limits)

    def _register_plain(
        self,
        subject: str,
        handler: Callable[[Message], object],
        queue: str | None,
        ctx: Context | None,
        limits: dict[str, Any],
    ) -> Handle:
        work = Work((ctx or Context()).with_cancel(), "message", subject)
        hooks = self._options.hooks
        run = handler if self._chain is None else passing_callback(self._chain, subject, handler)
        if hooks is not None:
            run = watched_callback(hooks, subject, run)

        def take(message: Message) -> None:
            work.count("received")
            if work.overdue:
                work.count("dropped")
                return
            began = time.perf_counter_ns()
            try:
                run(message)
            except BaseException as error:
                work.took(began, error)
                raise
            work.took(began)
            work.count("processed")

        return self._register(subject, queue, take, work, **limits)

    def _runner(self, run: Sending) -> Runner:
        """What runs a stream's handler: behind the middleware if there is some, and told of to hooks if there are."""
        runner = handlers.guarded(run if self._chain is None else passing_runner(run))
        return runner if self._options.hooks is None else watched_runner(runner)

    def _register(
        self,
        subject: str,
        queue: str | None,
        take: Callable[[Message], None],
        work: Work,
        *,
        intake: type[SubscriptionCore] = SubscriptionCore,
        pool: WorkerPool | None = None,
        **limits: Any,
    ) -> Handle:
        """Subscribe, and return when the server knows. pool is whose threads call take(); None for the workers'."""
        work.ctx.check()
        wanted, name = _subject.interest(subject, queue, self._options.max_control_line)
        responder = self._opened()
        connection = responder.connection
        pool = connection.dispatcher.workers if pool is None else pool
        core = intake(connection, wanted, name, callback=take, pool=pool, **{**self._limits, **limits})
        if isinstance(core, StreamIntake):
            core.start = take
        if isinstance(core, RequestIntake):
            core.turn_away = lambda request: responder.turn_away(request, work)
        handle = Handle(responder, core, work, self._forget)
        with self._lock:
            self._check_usable_locked()
            self._handles.append(handle)
        try:
            connection.subscribe(core)
            handle.in_force()
            self._confirm(connection, subject)
        except BaseException:
            handle.undo()
            raise
        return handle

    def _confirm(self, connection: Connection, subject: str) -> None:
        """Return when the server knows of what was subscribed."""
        if connection.status is Status.CONNECTED:
            try:
                connection.flush(Deadline.after(self._options.connect_timeout))
            except (TimedOut, ConnectionError) as error:  # the next link subscribes it
                log.info("%r is not confirmed by the server yet: %s", subject, error)

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
        try:
            while recorded:
                recorded[0]()
                del recorded[0]
        finally:  # after a Ctrl-C, say, the next open() registers the rest
            if recorded:
                with self._lock:
                    self._recorded[:0] = recorded
        return self

    def _opened(self) -> Responder:
        with self._lock:
            self._check_usable_locked()
            if self._responder is None:
                connection = Connection(self._servers, self._options, self._max_workers)
                connection.when_closed(self._connection_closed)
                self._responder = Responder(connection, self._max_streams)
            responder = self._responder
        responder.connection.ensure_open()
        return responder

    def _check_usable_locked(self) -> None:
        if self._closed:
            raise ConnectionClosed("the subscriber is closed")
        if self._generation != fork_generation():
            if self._responder is not None:
                raise ForkError("this subscriber was opened in the parent process; make a new one in the child")
            self._generation = fork_generation()

    def serve_forever(
        self, *, shutdown_timeout: float | None = CLOSE_SECONDS, ready: Callable[[], object] | None = None
    ) -> None:
        """Block: open, and serve until SIGINT, SIGTERM, stop() or close(); then shut down and return.

        The first signal drains: no new requests, those under way get shutdown_timeout seconds. A second one cancels
        them. Off the main thread no signals are caught. ready() is called, here, once all handlers are live.

        Raises:
            ConnectionClosed: the connection gave up for good; the text and the cause say why.
            Whatever open() raises.
        """
        check_timeout(shutdown_timeout, "shutdown_timeout")
        self._serving = serving = Serving()

        def begin() -> None:
            self.open()
            if ready is not None:
                ready()

        try:
            serving.run(begin, lambda: self.close(shutdown_timeout), self._cancel_all)
        finally:
            self._serving = None
        responder = self._responder
        if responder is not None and responder.connection.close_reason is not None:
            raise responder.connection.closed_error()

    def stop(self) -> None:
        """Have serve_forever() shut down and return, from any thread. Does not wait."""
        serving = self._serving
        if serving is not None:
            serving.stop("stop() was called")

    def drain(self, timeout: float | None = CLOSE_SECONDS) -> None:
        """Take no more requests, let those that came finish, and close.

        Blocks up to timeout seconds (None = no limit).

        Raises:
            DrainTimeout: something was still under way, and was cancelled; everything is closed all the same.
        """
        unfinished = self._close(Deadline.after(check_timeout(timeout)))
        if unfinished:
            raise DrainTimeout(f"cancelled after {timeout} s", undone=unfinished)

    def close(self, timeout: float | None = CLOSE_SECONDS) -> None:
        """Take no more requests, let those that came finish, cancel what lasts longer than timeout seconds, close.

        What has not begun by then is not begun any more: requests are turned away, plain messages dropped.

        While it waits, requests that were on their way are served, and the server's PINGs answered. Idempotent; a
        second caller waits for the first. From a handler it waits for nothing: all that is under way is cancelled.
        """
        for what in self._close(Deadline.after(check_timeout(timeout))):
            log.warning("cancelled by close(): %s", what)

    def _close(self, deadline: Deadline) -> list[str]:
        """Close by the deadline; what had to be cancelled, in words."""
        fork_generation()  # finds out about a fork that Python was not told of
        mine = object()
        try:
            with self._lock:
                self._closed = True
                handles, responder = list(self._handles), self._responder
                if self._closer is None:
                    self._close_done.clear()
                    self._closer = mine
            unfinished: list[str] = []
            if responder is None or self._generation != fork_generation():
                return unfinished
            inside = responder.in_handler()
            if self._closer is mine:
                unfinished = self._shut_down(handles, responder, deadline, inside)
        except BaseException:  # a Ctrl-C: whoever waits goes on with it, or calls next
            if self._closer is mine:
                self._closer = None
            raise
        finally:
            if self._closer is mine or self._closer is None:
                self._close_done.set()
        if self._closer is not mine and not inside:
            self._close_done.wait(deadline.remaining())  # another thread is at it
            if self._closer is None and not deadline.expired:
                return self._close(deadline)
        return unfinished

    def _shut_down(self, handles: list[Handle], responder: Responder, deadline: Deadline, inside: bool) -> list[str]:
        responder.draining = True
        for handle in handles:
            handle.leave(deadline)
        # A handler that closes must not wait for itself: then everything under way is cancelled, and told so.
        busy = [handle for handle in handles if inside or not handle.wait_idle(deadline)]
        counts = [handle.cancel("the responder is shutting down") for handle in handles]
        unfinished = [
            f"{count} {handle.kind if handle.kind == 'message' else 'request'}s on {handle.subject!r}"
            for handle, count in zip(handles, counts, strict=True)
            if count
        ]
        leave = Deadline.after(LEAVE_SECONDS)
        for handle in busy:
            if not inside:
                handle.wait_idle(leave)
        responder.close(deadline)
        return unfinished

    def _connection_closed(self, reason: Exception | None) -> None:
        """Nothing will come any more: let go whoever waits for it."""
        for handle in self.handles:
            handle.connection_closed()
        serving = self._serving
        if serving is not None:
            serving.stop("the connection is closed")

    def _cancel_all(self, reason: str) -> None:
        for handle in self.handles:
            handle.cancel(reason)

    def _forget(self, handle: Handle) -> None:
        """The handle is stopped: keep its numbers. During close() it stays, to be waited for."""
        with self._lock:
            if handle in self._handles and not self._closed:
                self._handles.remove(handle)
                self._leaving.append(handle)
            self._retire_locked()

    def _retire_locked(self) -> None:
        """Keep the numbers of those that were stopped and have nothing under way any more; they will not change."""
        for handle in [one for one in self._leaving if one.idle]:
            self._leaving.remove(handle)
            for name in COUNTED:
                self._retired[name] += handle.stats[name]

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
        if self._responder is None:
            return "closed" if self._closed else "new"
        status = self._responder.connection.status
        return "draining" if self._closed and status is not Status.CLOSED else str(status)

    @property
    def handles(self) -> list[Handle]:
        """The registrations in force."""
        with self._lock:
            return list(self._handles)

    def stats(self) -> dict[str, Any]:
        """The numbers of all registrations together (see Handle.stats), and streams, threads, connection."""
        with self._lock:
            self._retire_locked()
            totals: dict[str, Any] = {**self._retired, "active": 0}
            handles, responder = [*self._handles, *self._leaving], self._responder
        for handle in handles:
            for name, value in handle.stats.items():
                totals[name] += value
        if responder is None:
            return {**totals, "streams": 0, "threads": 0}
        return {
            **totals,
            "streams": responder.streams,
            "threads": responder.threads,
            "connection": responder.connection.stats(),
        }

    def __repr__(self) -> str:
        return f"<Subscriber {self.status}: {len(self._handles)} registrations>"


def check_limit(name: str, value: int | None) -> None:
    """Raises InvalidArgument unless it is None or a number from 1 up."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidArgument(f"{name}={value!r}: a whole number from 1 up")


def check_decorator(form: str, subject: object) -> None:
    """Raises TypeError if the decorator was given a function: without parentheses, it would register nothing."""
    if callable(subject):
        raise TypeError(f'@subscriber.{form} lacks its subject: write @subscriber.{form}("subject")')


_subscribers: weakref.WeakSet[Subscriber] = weakref.WeakSet()


def _renew_in_child() -> None:
    """In a forked child: another thread of the parent may have held the locks at the fork."""
    for subscriber in list(_subscribers):
        subscriber._lock = threading.Lock()
        subscriber._close_done.renew()
        for handle in subscriber._handles:
            handle.renew()


after_fork_in_child(_renew_in_child)
