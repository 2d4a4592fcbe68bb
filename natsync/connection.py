"""Connection: what outlives a link. Subscriptions, the answers' inbox, the outbox, counters; one Session at a time.

States are in Status. The lock covers state and tables, never I/O, waiting or user code. Lock order: Connection, then
Subscription or Mux, then Session, then Outbox.
"""

from __future__ import annotations

import atexit
import enum
import itertools
import logging
import re
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from natsync import protocol, timers
from natsync import subject as _subject
from natsync.concurrency import Deadline, Signal, after_fork_in_child, fork_generation
from natsync.dispatcher import CALLBACK_WORKERS, Dispatcher
from natsync.errors import (
    ConnectError,
    ConnectionClosed,
    ConnectionLost,
    ForkError,
    MaxPayloadExceeded,
    NatsError,
    PermissionDenied,
    TimedOut,
)
from natsync.headers import Headers
from natsync.message import Payload, to_bytes
from natsync.mux import LinkLoss, Mux
from natsync.options import ConnectOptions, Server
from natsync.outbox import Outbox, OutboxClosed
from natsync.servers import ServerList
from natsync.session import PongCallback, Session
from natsync.settling import Settling
from natsync.subscription import SubscriptionCore
from natsync.supervisor import Supervisor
from natsync.transport import Transport

log = logging.getLogger("natsync.connection")

#: Seconds that leaving the interpreter may take to flush what was published on a connection nobody closed.
EXIT_FLUSH_SECONDS = 2.0
#: Seconds that close() takes at most, for flushing and for callbacks that are running, unless told otherwise.
CLOSE_SECONDS = 5.0
#: Seconds that the connection's own threads get to end, even with close(0).
LEAVE_SECONDS = 1.0


class Status(str, enum.Enum):
    """Where a connection is in its life; equal to the plain string."""

    NEW = "new"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    DRAINING = "draining"
    CLOSED = "closed"

    def __str__(self) -> str:
        return self.value


class _Attempt:
    """One walk over the servers, and who waits for its outcome."""

    def __init__(self) -> None:
        self.pending = True
        self.error: NatsError | None = None


#: What the server says of a message or subscription that the user's permissions do not allow; the link stays.
_DENIED = re.compile(r'permissions violation for (?P<what>publish|subscription) to "(?P<subject>[^"]+)"', re.IGNORECASE)

_names = itertools.count(1)
_open_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


class Connection:
    """The inner core behind Client and Subscriber; held by its threads until it is closed."""

    def __init__(self, servers: list[Server], options: ConnectOptions, workers: int = CALLBACK_WORKERS) -> None:
        self.options = options
        self.name = f"natsync-{options.name or next(_names)}"
        self.dispatcher = Dispatcher(self.name, workers)
        self.mux = self.add_mux(Mux(f"{options.inbox_prefix}.{_subject.unique()}"))
        self.info: dict[str, Any] = {}
        self.generation = fork_generation()
        self._supervisor = Supervisor(self.name, ServerList(servers, options), options, self)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._status = Status.NEW
        self._session: Session | None = None
        self._outbox = Outbox(options.reconnect_buffer_bytes)
        self._attempt: _Attempt | None = None
        self._loss: LinkLoss | None = None
        self._settling = Settling(self._ping)
        self._on_closed: list[Callable[[Exception | None], None]] = []
        self._close_reason: Exception | None = None
        self._draining = False
        self._closed = threading.Event()
        self._sessions = 0
        self._past = {"in_bytes": 0, "out_messages": 0}

    # -- opening -----------------------------------------------------------------------------------------------

    @property
    def status(self) -> Status:
        return Status.DRAINING if self._draining and self._status is not Status.CLOSED else self._status

    @property
    def server(self) -> Server | None:
        session = self._session
        return None if session is None else session.server

    def ensure_open(self, deadline: Deadline | None = None) -> None:
        """Return once there is a connection, or at least one being made again; the first use makes it.

        Raises:
            NoServersError: the servers were all tried once, and none could be reached.
            ConnectionClosed: it was closed.
            TimedOut: the deadline came first.
        """
        if self._status is Status.CONNECTED or self._status is Status.RECONNECTING:
            return
        with self._lock:
            attempt = self._begin_locked()
            while attempt is not None and attempt.pending:
                if not self._changed.wait(None if deadline is None else deadline.remaining()) and attempt.pending:
                    raise TimedOut("no connection yet: the servers are still being tried")
        if attempt is not None and attempt.error is not None:
            raise attempt.error

    def _begin_locked(self) -> _Attempt | None:
        """Start the supervisor if need be; the attempt to wait for, None if there is no need to wait."""
        if self.generation != fork_generation():
            raise ForkError("this connection belongs to the parent process")
        if self._status is Status.CLOSED:
            raise self.closed_error()
        if self._status is Status.NEW:
            self._attempt = _Attempt()
            self._status = Status.CONNECTING
            if self.options.retry_on_failed_connect:
                self._status = Status.RECONNECTING
                self._attempt.pending = False
            self._supervisor.start()
            _open_connections.add(self)
        return self._attempt if self._status is Status.CONNECTING else None

    @property
    def close_reason(self) -> Exception | None:
        """Why the connection gave up for good; None while it lasts, or if it was closed on purpose."""
        return self._close_reason

    def closed_error(self) -> NatsError:
        reason = self._close_reason
        error = ConnectionClosed("the connection is closed" + (f": {reason}" if reason else ""))
        error.__cause__ = reason
        return error

    # -- sending -----------------------------------------------------------------------------------------------

    def encode(self, subject: bytes, reply: bytes | None, block: bytes | None, payload: bytes) -> bytes:
        """The frame of a message.

        Raises:
            MaxPayloadExceeded: the server would not take it.
        """
        limit = self.info.get("max_payload")
        size = len(payload) + (len(block) if block else 0)
        if limit is not None and size > limit:
            raise MaxPayloadExceeded(size, limit)
        return protocol.encode_pub(subject, reply, block, payload)

    def put(self, frame: bytes, deadline: Deadline | None = None) -> int:
        """Queue a frame for the present or next link; returns its position. Waits while the writer is far behind.

        Raises:
            ReconnectBufferFull, ConnectionClosed: nothing was queued.
            TimedOut: no room by the deadline.
        """
        while not (position := self.try_put(frame)):
            self.wait_room(deadline or Deadline())
        return position

    def try_put(self, frame: bytes, *, messages: int = 1, force: bool = False) -> int:
        """Queue a frame without waiting; 0 if there is no room. force=True makes room for an END."""
        while True:
            if self._status is not Status.CONNECTED:
                self._check_open()
            try:
                return self._outbox.try_put(frame, messages, force)
            except OutboxClosed:
                with self._lock:  # the link was lost a moment ago: its successor's outbox is there when this is free
                    if self._status is Status.CLOSED:
                        raise self.closed_error() from None

    def wait_room(self, deadline: Deadline, over: Callable[[], bool] = lambda: False) -> None:
        """Block until try_put() is worth another try, or over(); raises TimedOut at the deadline."""
        self._outbox.wait_room(deadline, over)

    def wake_publishers(self) -> None:
        """Have those in wait_room() ask their over() again."""
        self._outbox.wake_publishers()

    def put_now(self, frame: bytes) -> bool:
        """Queue a small frame without ever waiting; False (and nothing sent) if there is no link."""
        return self._outbox.put_now(frame) > 0

    def _check_open(self) -> None:
        if self._status is Status.CLOSED:
            raise self.closed_error()
        if self._status is Status.NEW or self._status is Status.CONNECTING:
            self.ensure_open()

    def publish_answer(self, reply: str, payload: Payload, headers: Headers | None) -> None:
        """What Message.respond() calls."""
        block = None if headers is None else headers.encode()
        self.put(self.encode(_subject.publish_subject(reply), None, block, to_bytes(payload)))

    def withdraw(self, frame: bytes) -> bool:
        """Take a frame back; True if it surely never left."""
        return self._outbox.withdraw(frame)

    def loss_of(self, frame: bytes, mark: int) -> LinkLoss | None:
        """The loss that already took this frame, if its link was lost while it was being queued."""
        loss = self._loss
        return loss if loss is not None and loss.took(frame, mark) else None

    def flush(self, deadline: Deadline) -> None:
        """Block until the server has everything that was put before.

        Raises:
            TimedOut: it did not confirm by the deadline.
            ConnectionLost: the link broke before it confirmed, so that some may be lost.
            ConnectionClosed: the connection is closed.
        """
        while not self._confirm(self._await_session(deadline), deadline):
            pass  # the link ended before the PING was queued: the next one takes over what waited

    def _confirm(self, session: Session, deadline: Deadline) -> bool:
        """flush() on this very link; False if it had ended already."""
        signal, answers = Signal(), list[int | None]()

        def answered(position: int | None) -> None:
            answers.append(position)
            signal.set()

        if not session.ping(answered):
            return False
        if not signal.wait(deadline):
            raise TimedOut("the server did not confirm what was sent in time")
        if answers[0] is None:
            self._check_open()
            raise ConnectionLost(f"the link to {session.server} broke before the server confirmed what was sent")
        return True

    def when_confirmed(self, mark: int, callback: Callable[[], None]) -> None:
        """Have callback() called on the reader's thread once the server has everything up to this position."""
        self._settling.when_confirmed(mark, callback)

    def after_round_trip(self, callback: Callable[[], None]) -> None:
        """Have callback() called when the server has handled what was put before, or the link is gone; brief."""
        if not self._ping(lambda position: callback()):
            callback()

    def _ping(self, answered: PongCallback) -> bool:
        session = self._session
        return session is not None and session.ping(answered)

    def _await_session(self, deadline: Deadline) -> Session:
        self._check_open()
        with self._lock:
            while self._session is None:
                if self._status is Status.CLOSED:
                    raise self.closed_error()
                if not self._changed.wait(deadline.remaining()):
                    raise TimedOut("no link to a server in time")
            return self._session

    confirm = flush

    def add_mux(self, mux: Mux) -> Mux:
        """Put an inbox for answers in place; before the connection is opened."""
        self.dispatcher.add_mux(mux)
        return mux

    # -- subscriptions -----------------------------------------------------------------------------------------

    def subscribe(self, core: SubscriptionCore) -> None:
        """Put a subscription in place, on this link and all that follow."""
        self._check_open()
        with self._lock:
            if self._status is Status.CLOSED:
                raise self.closed_error()
            self._outbox.put_now(self.dispatcher.add(core))

    def stop_intake(self, core: SubscriptionCore) -> None:
        """Tell the server to send no more; what is on its way is still delivered."""
        self._unsubscribe(core, self.dispatcher.leave)

    def unsubscribe(self, core: SubscriptionCore, error: Exception | None = None) -> None:
        """Remove a subscription; what it holds can still be taken, before the error if there is one."""
        self._unsubscribe(core, self.dispatcher.remove)
        core.deactivate(error)

    def _unsubscribe(self, core: SubscriptionCore, how: Callable[[SubscriptionCore], bytes | None]) -> None:
        with self._lock:
            frame = how(core)
            if frame is not None:
                self._outbox.put_now(frame)

    def slow_consumer(self, subject: str, dropped: int) -> None:
        log.warning("slow consumer on %r: %d messages dropped so far", subject, dropped)
        self.event("slow_consumer", {"subject": subject, "dropped": dropped})

    # -- what the session tells ----------------------------------------------------------------------------------

    def on_batch(self, batch: protocol.Batch) -> None:
        self.dispatcher.deliver(batch)

    def on_info(self, fields: dict[str, Any]) -> None:
        self.info = {**self.info, **fields}
        self._supervisor.discovered(fields.get("connect_urls"))
        if fields.get("ldm"):
            self.event("lame_duck", {"server": str(self.server)})

    def on_server_error(self, text: str) -> None:
        log.warning("%s: the server says: %s", self.name, text)
        self.event("error", {"error": text})
        denied = _DENIED.match(text)
        if denied is not None:
            self._denied(denied["what"].lower(), denied["subject"].encode(), PermissionDenied(text))

    def _denied(self, what: str, subject: bytes, error: PermissionDenied) -> None:
        """Tell those whom a permission that is missing concerns."""
        if what == "publish":
            for mux in self.dispatcher.muxes():
                mux.publish_denied(subject, error)
            return
        for core in self.dispatcher.subscriptions():
            if core.subject == subject:
                self.unsubscribe(core, error)

    def on_lost(self, session: Session, reason: Exception) -> None:
        """The session ended: a new outbox takes over what was not handed to it, and those in flight are told."""
        with self._lock:
            if session is not self._session:
                return
            self._session = None
            old = self._outbox
            rest = old.close()
            self._remember_locked(session, old)
            self._outbox = Outbox(self.options.reconnect_buffer_bytes, rest, old.position)
            waiting = frozenset(id(frame) for frame in rest)
            loss = LinkLoss(reason, old.position, old.taken, session.confirmed, waiting)
            self._loss = loss
            if self._status is Status.CLOSED:
                return
            self._status = Status.RECONNECTING
            self.event("disconnected", {"reason": str(reason)})
        log.info("%s: disconnected: %s", self.name, reason)
        muxes = self.dispatcher.muxes()
        self._outbox.withdraw_to(set().union(*(mux.breaks(loss) for mux in muxes)))
        for mux in muxes:
            mux.link_lost(loss)
        self._supervisor.link_lost(session, reason)

    def _remember_locked(self, session: Session, outbox: Outbox) -> None:
        self._past["in_bytes"] += session.received_bytes
        self._past["out_messages"] += outbox.messages

    # -- what the supervisor asks and tells --------------------------------------------------------------------------

    def in_supervisor(self, task: Callable[[], None]) -> None:
        """Have a brief chore done on the supervisor's thread; safe in a finalizer."""
        self._supervisor.do(task)

    def wants_link(self) -> bool:
        return self._status is Status.CONNECTING or self._status is Status.RECONNECTING

    def on_link(self, transport: Transport, info: dict[str, Any]) -> bool:
        self.info = info
        self._drop_larger(info.get("max_payload", protocol.MAX_MESSAGE_BYTES))
        with self._lock:
            if not self.wants_link():
                transport.close()
                return False
            confirmed = 0 if self._loss is None else self._loss.confirmed
            session = Session(transport, self._outbox, self.options, self, self.name, confirmed)
            failure = self._start_locked(session)
        if failure is not None:  # as good as a server that does not answer: another walk will follow
            session.end(ConnectError(str(failure)))
            session.join(Deadline.after(LEAVE_SECONDS))
            raise ConnectError(f"no thread can be started for the link: {failure}") from failure
        self._supervisor.discovered(info.get("connect_urls"))
        self._settling.on_link()
        log.info("%s: connected to %s", self.name, transport.server)
        return True

    def _start_locked(self, session: Session) -> RuntimeError | None:
        """Put a new session in force; the error if there is no thread for it, and then nothing has changed."""
        try:
            session.start()
        except RuntimeError as error:
            self._outbox.detach()
            return error
        self._outbox.attach(self.dispatcher.resubscription())
        self._session = session
        self._status = Status.CONNECTED
        self._sessions += 1
        if self._attempt is not None:
            self._attempt.pending = False
        self._changed.notify_all()
        self.event("reconnected" if self._sessions > 1 else "connected", {"server": str(session.server)})
        return None

    def _drop_larger(self, max_payload: int) -> None:
        """Messages that wait and that the new server would not take are dropped, and those whose they are told."""
        dropped = self._outbox.drop_larger(max_payload)
        if not dropped:
            return
        text = f"{len(dropped)} waiting messages exceed the new server's max_payload of {max_payload} bytes: dropped"
        log.warning("%s: %s", self.name, text)
        self.event("error", {"error": text})
        muxes = self.dispatcher.muxes()
        self._outbox.withdraw_to(set().union(*(mux.frames_dropped(dropped) for mux in muxes)))
        for mux in muxes:
            mux.repair()

    def on_first_walk_failed(self, error: NatsError) -> None:
        with self._lock:
            if self._status is Status.CONNECTING and self._attempt is not None:
                self._attempt.error = error
                self._attempt.pending = False
                self._status = Status.NEW  # the next use tries again
                self._changed.notify_all()

    def gave_up(self, reason: Exception) -> None:
        self.close(0, reason)

    # -- events and numbers ----------------------------------------------------------------------------------------

    def event(self, name: str, details: dict[str, Any]) -> None:
        """Tell the user's on_event, on a worker, in order."""
        callback = self.options.on_event
        if callback is not None:
            self.dispatcher.event(lambda: callback(name, details))

    def stats(self) -> dict[str, Any]:
        """Counters since the connection was made."""
        with self._lock:
            session, outbox = self._session, self._outbox
            received = self._past["in_bytes"] + (session.received_bytes if session else 0)
            sent = self._past["out_messages"] + outbox.messages
        cores = list(self.dispatcher.subscriptions())
        return {
            "status": str(self._status),
            "server": None if session is None else str(session.server),
            "reconnects": max(0, self._sessions - 1),
            "in_bytes": received,
            "in_messages": self.dispatcher.messages,
            "out_bytes": outbox.taken,
            "out_messages": sent,
            "out_pending_bytes": outbox.size_bytes,
            "subscriptions": len(cores),
            "dropped": sum(core.dropped for core in cores),
            "late_replies": self.mux.late,
            "waiting_replies": len(self.mux),
        }

    # -- closing ---------------------------------------------------------------------------------------------------

    def drain(self, deadline: Deadline) -> list[str]:
        """Stop all intake, have everything that came handled, flush; what was left undone, in words."""
        self._draining = True
        cores = list(self.dispatcher.subscriptions())
        for core in cores:
            self.stop_intake(core)
        undone = []
        try:
            self.flush(deadline)
        except NatsError as error:
            undone.append(f"the server did not confirm: {error}")
        for core in cores:
            if core.has_callback and not core.wait_empty(deadline):
                undone.append(f"{core.pending} messages on {_subject.decode(core.subject)!r} not handled")
            self.unsubscribe(core)
        return undone

    def close(self, timeout: float | None = CLOSE_SECONDS, reason: Exception | None = None) -> None:
        """End for good: flush, then stop threads; all within the timeout. Idempotent; from any thread of any kind."""
        deadline = Deadline.after(timeout)
        for mux in self.dispatcher.muxes():
            mux.connection_closing()
        present = self._session
        if timeout != 0 and present is not None:
            try:
                self._confirm(present, deadline)
            except NatsError as failure:
                log.warning("%s: closed without the server's word that all has arrived: %s", self.name, failure)
        with self._lock:
            already = self._status is Status.CLOSED
        if already:
            if not self._is_own_thread():
                self._closed.wait(deadline.remaining())  # the first closer is at it
            return
        with self._lock:
            if self._status is Status.CLOSED:
                return
            self._close_reason = reason
            self._status = Status.CLOSED
            session, self._session = self._session, None
            unsent = self._outbox.close()
            if session is not None:
                self._remember_locked(session, self._outbox)
            if self._attempt is not None and self._attempt.pending:
                self._attempt.pending = False
                self._attempt.error = self.closed_error()
            self._changed.notify_all()
        if unsent:
            log.warning("%s: closed with %d messages unsent", self.name, len(unsent))
        error = self.closed_error()
        if session is not None:
            session.end(error)
        for mux in self.dispatcher.muxes():
            mux.connection_closed(error)
        for core in self.dispatcher.subscriptions():
            self.dispatcher.remove(core)
            core.deactivate(reason and error, forget=core.has_callback)
        for callback in self._on_closed:
            callback(reason)
        self.event("closed", {"reason": None if reason is None else str(reason)})
        self._supervisor.stop()
        self._join(session, deadline)
        _open_connections.discard(self)
        self._closed.set()

    def _is_own_thread(self) -> bool:
        """Whether this is a thread that close() itself waits for."""
        session = self._session
        me = threading.current_thread()
        own = self.dispatcher.workers.is_own_thread() or self._supervisor.thread is me
        return own or (session is not None and me in session.threads)

    def _join(self, session: Session | None, deadline: Deadline) -> None:
        # Our own threads end in milliseconds, so they get a moment even if user code is to get none.
        soon = Deadline(None if deadline.at is None else max(deadline.at, time.monotonic() + LEAVE_SECONDS))
        stuck = session.join(soon) if session is not None else []
        stuck += self.dispatcher.workers.close(deadline)
        stuck += self._supervisor.join(soon)
        if stuck:
            log.warning("%s: still running after close(): %s", self.name, ", ".join(stuck))
        timers.settle()

    def when_closed(self, callback: Callable[[Exception | None], None]) -> None:
        """Have callback(reason) called when the connection ends for good; reason None = it was closed on purpose.

        Brief, non-blocking; to be asked for before the connection is opened.
        """
        self._on_closed.append(callback)

    def abandon(self) -> None:
        """In a forked child: let go of the parent's socket without a word on the wire."""
        self._status = Status.CLOSED
        session, self._session = self._session, None
        if session is not None:
            session.abandon()

    def release(self) -> None:
        """The last user's handle was collected: close, unless callbacks or handlers live on. Safe in a finalizer."""
        self._supervisor.do(self._close_unless_needed)

    def _close_unless_needed(self) -> None:
        if not any(core.has_callback for core in self.dispatcher.subscriptions()):
            self.close(CLOSE_SECONDS)


def _flush_at_exit() -> None:
    """What was published is sent even if nobody closed: bounded, all connections together."""
    deadline = Deadline.after(EXIT_FLUSH_SECONDS)
    for connection in list(_open_connections):
        if connection.generation == fork_generation() and connection.status is Status.CONNECTED:
            try:
                connection.flush(deadline)
            except NatsError as error:
                log.warning("%s: not all may have been sent at exit: %s", connection.name, error)


def _abandon_in_child() -> None:
    for connection in list(_open_connections):
        connection.abandon()
    _open_connections.clear()


atexit.register(_flush_at_exit)
after_fork_in_child(_abandon_in_child)
