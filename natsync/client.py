"""Client: publish, request, subscribe and stream from ordinary blocking code, any number of threads at once.

A Client is a handle on a Connection: it opens it at the first use, makes a new one in a forked child, and closes it
when it is collected without having been closed.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

from natsync import subject as _subject
from natsync.concurrency import Deadline, after_fork_in_child, at_home, check_timeout, fork_generation
from natsync.connection import CLOSE_SECONDS, Connection
from natsync.context import Context, current, traced
from natsync.errors import ConnectionClosed, InvalidArgument
from natsync.headers import HeaderInput, Headers
from natsync.hooks import Exchange, Watch, fire
from natsync.message import MISSING, Message, Payload, payload_of
from natsync.middleware import chain_of
from natsync.mux import Waiter
from natsync.options import LEAST_CONTROL_LINE, ConnectOptions, Options, Server, Servers, Unpack, connect_settings
from natsync.replies import Replies, Sentinel, check_many
from natsync.reply import request as _request
from natsync.retry import Retrying, RetryPolicy, bucket_for, check_policy, run
from natsync.streaming import terms
from natsync.streaming.calls import Calls
from natsync.streaming.handlers import arguments
from natsync.streaming.passing import PassingSubscription, passing_callback, passing_processor, stream_maker
from natsync.streaming.stream import Stream, process
from natsync.streaming.watched import WatchedProcessor, open_stream, stream_done, watched_callback
from natsync.subscription import (
    PENDING_BYTES,
    PENDING_MESSAGES,
    Callback,
    Overflow,
    Subscription,
    SubscriptionCore,
)

#: Seconds that flush() waits, unless told otherwise. Default of nats.go's Flush.
FLUSH_SECONDS = 10.0
#: Seconds that request() waits, unless told otherwise.
REQUEST_SECONDS = 5.0
#: Seconds that drain() takes at most, unless told otherwise. Default of nats.go (DefaultDrainTimeout).
DRAIN_SECONDS = 30.0
#: Chunks that a responder may send before the consumer has taken any; enough for the fastest (docs/protocol.md).
STREAM_WINDOW = 8192
#: The header by which the Go system knows a requester, and the subject on which it hears that one is gone.
CONNECT_ID_HEADER = "Connect-ID"
CLIENT_OFFLINE = "client.offline"
#: Control lines of messages without reply subject and headers, kept ready for publish(), by subject and size.
_lines: dict[tuple[str, int], bytes] = {}
#: How many there are at most: a megabyte, unless subjects are long. All are short enough for every server.
_MOST_LINES = 4096


def _pub_line(subject: str, size: int, core: Connection) -> bytes:
    """One that is not there yet. Raises as publish() does."""
    to = _subject.publish_subject(subject)
    line = b"PUB %b %d\r\n" % (to, size)
    if len(line) > LEAST_CONTROL_LINE:  # perhaps for one connection and not for another: it is not kept
        core.check_line(to, None)
        return line
    if len(_lines) >= _MOST_LINES:
        _lines.clear()
    _lines[subject, size] = line
    return line


class Client:
    """A connection to NATS for any number of threads.

    The constructor opens nothing: the first use, open() or `with` does, once per process. Leaving the `with` block
    flushes and closes. One Client serves a whole process; requests and streams share its connection.

    Args:
        servers: a URL, several separated by commas, a list; None for NATS_URL or nats://127.0.0.1:4222.
        options: those of ConnectOptions, such as name, user, password, token, tls, reconnect.

    Raises:
        InvalidURL, InvalidArgument, TypeError: the servers or options cannot be used.
    """

    def __init__(self, servers: Servers = None, **options: Unpack[Options]) -> None:
        self._prepare(*connect_settings(servers, options))

    @classmethod
    def of(cls, servers: list[Server], options: ConnectOptions) -> Client:
        """A client from settings that have been checked already; for the pool, which makes many."""
        client = cls.__new__(cls)
        client._prepare(servers, options)
        return client

    def _prepare(self, servers: list[Server], options: ConnectOptions) -> None:
        self._servers, self._options = servers, options
        self._hooks = options.hooks
        self._chain = chain_of(options.middleware)
        self._unwatched = self._hooks is None and self._chain is None
        self._loan: Any = None  # for the pool that has lent this client
        self._lock = threading.Lock()
        self._closed = False
        self._core: Connection | None = None
        self._calls: Calls | None = None
        _clients.add(self)

    # -- life ----------------------------------------------------------------------------------------------------

    def open(self, timeout: float | None = None) -> Client:
        """Connect now; returns itself.

        Blocks for one walk over the servers, connect_timeout seconds each, and at most timeout seconds in all.

        Raises:
            TimedOut: not connected in time; the walk goes on, and the next use waits for it.
            NoServersError: none could be reached; .causes says why for each. It is an AuthorizationError too if all
                refused the credentials.
            ConnectionClosed: the client was closed.
        """
        self._connection().ensure_open(Deadline.after(check_timeout(timeout)))
        return self

    def watched(self, watcher: Waiter) -> Connection:
        """Have the watcher told of this client's links; before it is opened. For the pool."""
        core = self._connection()
        core.mux.watchers.append(watcher)
        return core

    def _connection(self) -> Connection:
        if not at_home[0]:
            fork_generation()  # finds out about a fork that Python was not told of
        return self._core or self._make_connection()

    def _make_connection(self) -> Connection:
        with self._lock:
            if self._closed:
                raise ConnectionClosed("the client is closed")
            if self._core is None:
                core = Connection(self._servers, self._options)
                self._calls = Calls(core)
                self._core = core
            return self._core

    def close(self, timeout: float | None = CLOSE_SECONDS) -> None:
        """Flush, stop everything, close. Idempotent; from any thread, callbacks included.

        Blocks up to timeout seconds. Waiting requests and streams end with an error; messages that wait for callbacks
        are dropped (drain() handles them first).
        """
        check_timeout(timeout)
        fork_generation()
        with self._lock:
            self._closed = True
            core = self._core
        if core is not None:
            core.close(timeout)

    def force_reconnect(self) -> None:
        """Drop the present link at once and make another, a different server's if there are several.

        For a link that is suspected to be half dead, or after a change of credentials. Does not wait for the new
        link. What the old one had not taken goes out on the new one; what it had taken and no flush() has confirmed
        may be lost. Requests under way end with ConnectionLost, plain streams with ServerLost; framed streams go on.
        While there is no link, the next attempt comes at once. With reconnect=False the connection is closed.

        Raises:
            NoServersError, ConnectionClosed: there is no connection.
        """
        self._connection().force_reconnect()

    def drain(self, timeout: float | None = DRAIN_SECONDS) -> None:
        """Unsubscribe, have every message that came handled by its callback, flush, and close.

        Blocks up to timeout seconds (None = no limit).

        Raises:
            DrainTimeout: something was left undone; the text, .undone, .unhandled and .unsent say what. The client is
                closed all the same.
        """
        check_timeout(timeout)
        fork_generation()
        core = self._core
        if core is None or core.status == "closed":
            self._closed = True
            return
        report = core.drain(timeout)
        self.close()
        if report is not None:
            raise report

    def __enter__(self) -> Client:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is not None and not self._closed:
            core.release()  # a finalizer may run anywhere, inside any lock: the supervisor closes

    # -- messages --------------------------------------------------------------------------------------------------

    def publish(
        self,
        subject: str,
        payload: Payload = b"",
        *,
        json: Any = MISSING,
        reply: str | None = None,
        headers: HeaderInput = None,
    ) -> None:
        """Queue a message for sending; returns before it has left (flush() waits for that).

        Blocks only to connect at the first use, and while the link is several MiB behind. While the link is being made
        again, messages wait in a buffer of reconnect_buffer_bytes.

        Raises:
            InvalidArgument, TypeError: subject, reply, headers or payload cannot be sent.
            MaxPayloadExceeded: it is larger than the server takes.
            ReconnectBufferFull: there is no link, and the buffer is full.
            NoServersError, ConnectionClosed: there is no connection.
        """
        bare = headers is None and reply is None and json is MISSING and self._unwatched
        if bare and type(payload) is bytes and type(subject) is str and at_home[0] and current() is None:
            core, size = self._core, len(payload)
            if core is not None and size <= core.bare_bytes:
                line = _lines.get((subject, size)) or _pub_line(subject, size, core)
                if core.publish_bare(line, payload):
                    return
        to = _subject.publish_subject(subject)
        data = payload_of(payload, json)
        answer = None if reply is None else _subject.publish_subject(reply)
        if (ctx := current()) is not None:
            headers = traced(headers, ctx)
        if self._hooks is not None:
            headers = Headers(headers)
            fire(self._hooks, "publishing", Exchange("message", subject, headers), len(data))
        if self._chain is not None:
            passage = self._chain.requester("message", subject, headers)
            data, headers = passage.send(data), passage.headers
        block = Headers(headers).encode() if headers else None
        self._connection().publish(to, answer, block, data)

    def request(
        self,
        subject: str,
        payload: Payload = b"",
        *,
        json: Any = MISSING,
        headers: HeaderInput = None,
        timeout: float | None = REQUEST_SECONDS,
        retry: RetryPolicy = None,
        ctx: Context | None = None,
    ) -> Message:
        """Publish a request and return the first reply.

        Blocks up to timeout seconds (None = no limit), a reconnect and all retries included. Safe from any thread,
        callbacks and handlers included. A later reply is dropped and counted in stats()["late_replies"]. The handler is
        told of the deadline of ctx, not of timeout.

        Raises:
            NoRespondersError: nothing subscribes to the subject; nothing ran.
            RequestTimeout: no reply in time; .sent tells whether the responder may have run.
            ConnectionLost: the link broke while the request was under way, so that it may have run.
            HandlerError: the responder's handler failed; the text is its error. On a stream's subject that is the error
                which ends a plain stream; its first chunk, or the payload of its END, is a reply as any other.
            Cancelled, DeadlineExceeded: ctx ended first.
            InvalidArgument, TypeError, MaxPayloadExceeded: the request cannot be sent.
            NoServersError: there is no connection.
            ConnectionClosed: the client was closed; .sent tells whether the request may have run.
        """
        check_timeout(timeout)
        check_policy(retry)
        _subject.publish_subject(subject)
        data = payload_of(payload, json)
        ctx = ctx or current()
        headers = traced(headers, ctx)
        if self._hooks is None:
            return self._ask(subject, data, headers, timeout, retry, ctx, None)
        headers = Headers(headers)
        watch = Watch(self._hooks, "request", subject, headers)
        watch.tell("request_started")
        try:
            reply = self._ask(subject, data, headers, timeout, retry, ctx, partial(watch.tell, "retrying"))
        except BaseException as error:
            watch.tell("request_done", watch.seconds, error)
            raise
        watch.tell("request_done", watch.seconds, None)
        return reply

    def _ask(
        self,
        subject: str,
        data: bytes,
        headers: HeaderInput,
        timeout: float | None,
        retry: RetryPolicy,
        ctx: Context | None,
        retrying: Retrying | None,
    ) -> Message:
        passage = None
        if self._chain is not None:
            passage = self._chain.requester("request", subject, headers)
            data, headers = passage.send(data), passage.headers
        if retry is None:
            block = _request_block(headers, ctx)
            reply = _request(self._connection(), subject, data, block, timeout, ctx)
        else:
            given = Headers(headers)  # a value that is an iterator can be read but once

            def once(left: float | None) -> Message:
                block = _request_block(given, ctx)  # anew each time, for there is less time left
                return _request(self._connection(), subject, data, block, left, ctx)

            with (ctx or Context()).with_timeout(timeout) as scope:
                reply = run(
                    lambda attempt: once(scope.remaining()),
                    retry,
                    scope,
                    bucket=bucket_for(retry, subject),
                    retrying=retrying,
                )
        return reply if passage is None else passage.received(reply)

    def request_many(
        self,
        subject: str,
        payload: Payload = b"",
        *,
        json: Any = MISSING,
        headers: HeaderInput = None,
        timeout: float | None = REQUEST_SECONDS,
        stall: float | None = None,
        max_messages: int | None = None,
        sentinel: Sentinel = None,
        ctx: Context | None = None,
    ) -> Replies:
        """Publish a request and return the replies of everybody who answers, to be iterated as they come (ADR-47).

        Does not wait for a reply; iterating does. The replies end, without an error, when timeout seconds have passed
        since the request (None = no limit), when after the first one none has come for stall seconds (None or 0 = no
        such limit), behind max_messages of them, or at the sentinel: a payload (b"" is the usual one), or a function
        (message) that returns False to end; the message that ends them is not among them. The time that the caller
        takes for a reply does not count as stall, and what came before the timeout is given out after it too.
        A handler's error is a reply with the headers Nats-Service-Error (a plain stream's: its error payload). At most
        65,536 replies or 64 MiB wait.
        A request that still waits for a link when they end, or are closed or dropped, is taken back. Handlers are told
        of the deadline of ctx, not of timeout.
        Iterating raises:

        Raises:
            NoRespondersError: nothing subscribes to the subject.
            RequestTimeout: there was no link all the while: the request was not sent (.sent is False).
            ConnectionLost: the link broke, so that replies may be missing.
            SlowConsumerError: replies came much faster than they were taken.
            PermissionDenied: the server does not let the request, or the replies, pass.
            Cancelled, DeadlineExceeded: ctx ended; as at once, from request_many(), if it had before.
            InvalidArgument, TypeError, MaxPayloadExceeded, RequestTimeout, NoServersError, ConnectionClosed: at once,
                from request_many(); nothing was sent.
        """
        check_timeout(timeout)
        check_timeout(stall, "stall")
        check_many(max_messages, sentinel)
        _subject.publish_subject(subject)
        data = payload_of(payload, json)
        ctx = ctx or current()
        headers = traced(headers, ctx)
        watch = None
        if self._hooks is not None:
            headers = Headers(headers)
            watch = Watch(self._hooks, "request", subject, headers)
            watch.tell("request_started")
        passage = None
        try:
            if self._chain is not None:
                passage = self._chain.requester("request", subject, headers)
                data, headers = passage.send(data), passage.headers
            return Replies(
                self._connection(),
                self,
                subject,
                data,
                _request_block(headers, ctx),
                timeout=timeout,
                stall=stall,
                max_messages=max_messages,
                sentinel=sentinel,
                ctx=ctx,
                watch=watch,
                passage=passage,
            )
        except BaseException as error:
            if watch is not None:
                watch.tell_once("request_done", watch.seconds, error)
            raise

    def subscribe(
        self,
        subject: str,
        callback: Callback | None = None,
        *,
        queue: str | None = None,
        max_messages: int | None = None,
        concurrency: int = 1,
        pending_messages: int = PENDING_MESSAGES,
        pending_bytes: int = PENDING_BYTES,
        overflow: Overflow = "drop_new",
    ) -> Subscription:
        """Subscribe; take the messages by next(), by iterating, or by callback(message) on worker threads.

        Messages come in order; with a callback and concurrency above 1 several run at once and order is lost. A slow
        taker never slows the connection: when pending_messages or pending_bytes wait, overflow decides which message
        is lost ("drop_new", "drop_old"), or that next() raises SlowConsumerError ("error", not with a callback).
        max_messages unsubscribes after that many. Does not wait for the server; flush() does. A connection with
        callbacks lives until close().

        Raises:
            InvalidArgument, TypeError: an argument cannot be used.
            NoServersError, ConnectionClosed: there is no connection.
        """
        wanted, group = _subject.interest(subject, queue, self._options.max_control_line)
        if callback is not None:
            arguments(callback, (1,), "(message)")
        if callback is not None and self._chain is not None:
            callback = passing_callback(self._chain, subject, callback)
        if callback is not None and self._hooks is not None:
            callback = watched_callback(self._hooks, subject, callback)
        connection = self._connection()
        core = SubscriptionCore(
            connection,
            wanted,
            group,
            max_messages=max_messages,
            pending_messages=pending_messages,
            pending_bytes=pending_bytes,
            overflow=overflow,
            callback=callback,
            concurrency=concurrency,
            pool=connection.dispatcher.workers,
        )
        connection.ensure_open()
        try:
            connection.subscribe(core)
            if callback is None and self._chain is not None:
                subscription: Subscription = PassingSubscription(self._chain, core, connection, self)
            else:
                subscription = Subscription(core, connection, self)
        except BaseException:  # a Ctrl-C: nobody holds it
            connection.undo_subscribe(core)
            raise
        return subscription

    def flush(self, timeout: float | None = FLUSH_SECONDS) -> None:
        """Block until the server has confirmed that it has everything sent so far, up to timeout seconds.

        It cannot tell of what an earlier link took with it when it broke: that is the event `disconnected`. Flush right
        behind what must not be lost.

        Raises:
            TimedOut: it did not confirm in time.
            ConnectionLost: the link broke first, so that some may be lost.
            NoServersError, ConnectionClosed: there is no connection.
        """
        check_timeout(timeout)
        core = self._connection()
        deadline = Deadline.after(timeout)
        core.ensure_open(deadline)
        core.flush(deadline)

    def rtt(self, timeout: float | None = FLUSH_SECONDS) -> float:
        """Seconds from here to the server and back. Blocks and raises as flush() does."""
        self.flush(timeout)  # so that what waits to be sent is not measured
        begin = time.perf_counter()
        self.flush(timeout)
        return time.perf_counter() - begin

    # -- streams -----------------------------------------------------------------------------------------------------

    def stream(
        self,
        subject: str,
        payload: Payload = b"",
        *,
        json: Any = MISSING,
        headers: HeaderInput = None,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        window: int = STREAM_WINDOW,
        retry: RetryPolicy = None,
        ctx: Context | None = None,
    ) -> Stream:
        """Publish a request and return the stream of its answer's chunks; does not wait for the first.

        timeout is the deadline of the whole stream in seconds, idle_timeout how long the consumer waits for the next
        chunk (both None = no limit). window is how many chunks the responder may be ahead of the consumer; a plain one
        cannot be slowed down, and runs ahead into a bounded queue. retry repeats the request while no chunk has come
        and it is safe; Retry(resumable=True) goes on behind the chunks that have. In a handler's thread, the handler's
        context is the default of ctx.
        Iterating the stream, or next(), raises:

        Raises:
            NoRespondersError: nothing subscribes to the subject.
            HandlerError: the handler failed; the text is its error.
            StreamRefused: the responder took no part of it, being full.
            ServerLost: the responder is gone, or shut down, in mid-stream; or a plain stream's link broke. Chunks up to
                .last_seq were delivered.
            PermissionDenied: the server does not let the request, or word to the responder, pass.
            DeadlineExceeded, IdleTimeout: in time came too little.
            StreamCancelled: cancelled here: by cancel(), close() or ctx.
            SlowConsumerError: a plain responder ran further ahead than the queue holds.
            InvalidArgument, TypeError, MaxPayloadExceeded, NoServersError, ConnectionClosed: at once, from stream().
        """
        check_timeout(timeout)
        check_timeout(idle_timeout, "idle_timeout")
        check_policy(retry)
        _check_window(window)
        _subject.publish_subject(subject)
        data = payload_of(payload, json)
        ctx = ctx or current()
        given = terms.user_headers(traced(headers, ctx))
        watch = None if self._hooks is None else open_stream(self._hooks, subject, given)
        passage = None
        scope = (ctx or Context()).with_timeout(timeout)
        try:
            scope.check()
            if self._chain is not None:
                passage = self._chain.requester("stream", subject, given)
                data, given = passage.send(data), passage.headers
            make = stream_maker(watch, passage)
            core = self._connection()
            core.ensure_open(Deadline(scope.deadline), scope)
            assert self._calls is not None
            stream = make(self._calls, self, subject, data, given, scope, idle_timeout, window, retry)
        except BaseException as error:
            scope.cancel("the stream was not opened")
            if watch is not None:
                stream_done(watch, 0, 0, error)
            raise
        stream.when_finished(lambda: scope.cancel("the stream is over"))
        return stream

    def stream_request(
        self,
        subject: str,
        payload: Payload,
        processor: Callable[[Message], object],
        *,
        json: Any = MISSING,
        headers: HeaderInput = None,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        retry: RetryPolicy = None,
        ctx: Context | None = None,
        client_id: str | None = None,
    ) -> None:
        """Publish a request and call processor(message) for every message of the answer, here, until it ends.

        Blocks until then; timeout and idle_timeout are those of stream(). The Go system's form: the processor sees the
        END and ERROR messages too (.is_end, .error; .data is the sentinel). It stops the stream by returning False, and
        by nothing else. With retry, the whole request is run again after an error, unless it was cancelled or overdue.
        client_id goes along as the header Connect-ID, and is published to client.offline when ctx is cancelled, for
        responders of that system.

        Raises:
            HandlerError: an ERROR message came; the processor has seen it.
            Whatever the processor raises; and what iterating Client.stream() raises.
        """
        check_timeout(timeout)
        check_timeout(idle_timeout, "idle_timeout")
        check_policy(retry)
        if not callable(processor):
            raise TypeError(f"the processor is a function (message), not {type(processor).__name__}")
        _subject.publish_subject(subject)
        data = payload_of(payload, json)
        ctx = ctx or current()
        given = terms.user_headers(traced(headers, ctx))
        if client_id is not None:
            given[CONNECT_ID_HEADER] = client_id
        told = None
        if self._hooks is not None:
            told = WatchedProcessor(open_stream(self._hooks, subject, given), processor)
        take: Callable[[Message], object] = told or processor
        scope = (ctx or Context()).with_timeout(timeout)
        if client_id is not None:
            remove = scope.on_end(lambda: self._tell_offline(client_id))
        try:
            if self._chain is not None:
                passage = self._chain.requester("stream", subject, given)
                data, given = passage.send(data), passage.headers
                take = passing_processor(passage, take)
            run(
                lambda attempt: self._process(subject, data, given, take, scope, idle_timeout, attempt),
                retry,
                scope,
                bucket=bucket_for(retry, subject),
                rerun_errors=True,
                retrying=None if told is None else told.retrying,
            )
        except BaseException as error:
            if told is not None:
                told.raised(error)
            raise
        finally:
            if client_id is not None:
                remove()
            scope.cancel("the request is over")
        if told is not None:
            told.returned()

    def _process(
        self,
        subject: str,
        data: bytes,
        headers: Headers,
        processor: Callable[[Message], object],
        scope: Context,
        idle_timeout: float | None,
        attempt: int,
    ) -> None:
        scope.check()
        core = self._connection()
        core.ensure_open(Deadline(scope.deadline), scope)
        assert self._calls is not None
        process(self._calls, subject, data, headers, processor, scope, idle_timeout, STREAM_WINDOW, attempt)

    def _tell_offline(self, client_id: str) -> None:
        core = self._connection()
        core.put_now(core.encode(CLIENT_OFFLINE.encode(), None, None, client_id.encode()))

    # -- asking --------------------------------------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """new, connecting, connected, reconnecting, draining or closed."""
        if self._closed:
            return "closed"
        fork_generation()
        core = self._core
        return "new" if core is None else str(core.status)

    @property
    def server_info(self) -> dict[str, Any]:
        """The INFO of the server connected to (or last connected to); empty before the first connection."""
        core = self._core
        return {} if core is None else dict(core.info)

    def stats(self) -> dict[str, Any]:
        """Counters: in_bytes, out_bytes, out_messages, reconnects, dropped, late_replies, and what waits now."""
        core = self._core
        return {"status": self.status} if core is None else {**core.stats(), "status": self.status}

    def __repr__(self) -> str:
        return f"<Client {', '.join(map(str, self._servers))}: {self.status}>"


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _renew_in_child() -> None:
    """In a forked child: every client makes a connection of its own at its next use."""
    for client in list(_clients):
        client._lock = threading.Lock()  # another thread of the parent may have held it at the fork
        client._core = client._calls = None


after_fork_in_child(_renew_in_child)


def connect(servers: Servers = None, **options: Unpack[Options]) -> Client:
    """A Client that is open already; takes what Client takes, blocks and raises as Client.open() does."""
    return Client(servers, **options).open()


def _request_block(headers: HeaderInput, ctx: Context | None) -> bytes | None:
    """The header block of a request, which tells how much time there is."""
    if ctx is not None and ctx.deadline is not None:
        headers = terms.with_timeout(headers, ctx.remaining())
    return Headers(headers).encode() if headers else None


def _check_window(window: int) -> None:
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window is a whole number of chunks, not {type(window).__name__}")
    if window < 1:
        raise InvalidArgument(f"window={window}: at least 1 chunk")
