"""Connection: what a link is for. Publishing, subscriptions, the answers' inbox, counters.

Everything is queued whole in the present outbox, or in the buffer for the next link; see Links for what keeps the link
up. The lock is that of Links.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from threading import get_ident
from typing import Any

from natsync import protocol, timers
from natsync import subject as _subject
from natsync.concurrency import Deadline, Tally, after_fork_in_child, at_exit, fork_generation
from natsync.context import Context, wait_under
from natsync.dispatcher import CALLBACK_WORKERS
from natsync.errors import (
    ConnectionClosed,
    DrainTimeout,
    MaxPayloadExceeded,
    NatsError,
    PermissionDenied,
)
from natsync.headers import Headers
from natsync.links import LEAVE_SECONDS, Links, Status
from natsync.message import Payload, to_bytes
from natsync.mux import LinkLoss, Mux
from natsync.options import ConnectOptions, Server
from natsync.outbox import PRODUCED_HERE_BYTES, OutboxClosed, Producer, Traffic
from natsync.server_errors import Denial
from natsync.session import Session
from natsync.subscription import SubscriptionCore

log = logging.getLogger("natsync.connection")

#: Seconds that leaving the interpreter may take to flush what was published on a connection nobody closed.
EXIT_FLUSH_SECONDS = 2.0
#: Seconds that close() takes at most, for flushing and for callbacks that are running, unless told otherwise.
CLOSE_SECONDS = 5.0
#: Seconds that workers get to end, even with close(0): those that are idle need no more.
IDLE_LEAVE_SECONDS = 0.1

_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


class Connection(Links):
    """The inner core behind Client and Subscriber; held by its threads until it is closed."""

    def __init__(self, servers: list[Server], options: ConnectOptions, workers: int = CALLBACK_WORKERS) -> None:
        super().__init__(servers, options, workers)
        self.mux = self.add_mux(Mux(f"{options.inbox_prefix}.{_subject.unique()}"))
        self._line_bytes = options.max_control_line - _subject.NUMBERS_BYTES
        self._dropped = Tally()
        self._left: set[Session] = set()  # the links that close() has to end
        self._never_left: set[int] = set()  # id() of the frames that no link had taken when it was closed
        self._closing = False  # a thread is at it
        _connections.add(self)
        at_exit(_flush_at_exit)

    # -- sending --------------------------------------------------------------------------------------------------

    def encode(self, subject: bytes, reply: bytes | None, block: bytes | None, payload: bytes) -> bytes:
        """The frame of a message.

        Raises:
            InvalidArgument, MaxPayloadExceeded: the server would not take it.
        """
        self.check_line(subject, reply)
        limit = self.info.get("max_payload")
        size = len(payload) if block is None else len(payload) + len(block)
        if limit is not None and size > limit:
            raise MaxPayloadExceeded(size, limit)
        return protocol.encode_pub(subject, reply, block, payload)

    def check_line(self, subject: bytes, reply: bytes | None) -> None:
        """Raise InvalidArgument if a message with these has too long a control line."""
        if not self.fits(subject, reply):
            raise _subject.too_long(subject, reply, "reply subject", self.options.max_control_line)

    def fits(self, subject: bytes, reply: bytes | None) -> bool:
        """Whether the control line of a message with these is short enough for the server."""
        return len(subject) + (0 if reply is None else len(reply)) <= self._line_bytes

    def publish(self, subject: bytes, reply: bytes | None, block: bytes | None, payload: bytes) -> None:
        """Queue a message. Raises as encode() and put() do, and as ensure_open()."""
        if self._status is not Status.CONNECTED:
            self.ensure_open()
        self.put(self.encode(subject, reply, block, payload))

    def put_bare(self, line: bytes, payload: bytes) -> int:
        """Queue a PUB of this control line and payload, which must not be larger than bare_bytes; its position.

        In as few calls as can be, for most messages are bare: 0 if it was not queued, and publish() or put() is to
        find out why. Never waits.

        Raises:
            ReconnectBufferFull: nothing was queued.
        """
        try:
            return self._outbox.try_put(line + payload + b"\r\n", here=True)
        except OutboxClosed:
            return 0

    def publish_bare(self, line: bytes, payload: bytes) -> bool:
        """put_bare() for a thread that publishes without a pause: it needs no lock while the writer is busy.

        Whether it was queued.
        """
        outbox, frame = self._outbox, line + payload + b"\r\n"
        size, giver = len(frame), outbox.giver
        if giver.thread == get_ident():
            size += giver.given_bytes
            if size < giver.limit_bytes:
                giver.given_bytes = size  # no call since it was read: a signal handler might publish in between
                giver.given.append(frame)
                if size < giver.limit_bytes or outbox.was_taken(giver, frame):
                    return True
        try:
            return outbox.try_put(frame, here=True, giving=True) > 0
        except OutboxClosed:
            return False

    def put(self, frame: bytes, deadline: Deadline | None = None, ctx: Context | None = None) -> int:
        """Queue a frame for the present or next link; returns its position. Waits while the writer is far behind.

        Raises:
            ReconnectBufferFull, ConnectionClosed: nothing was queued.
            TimedOut: no room by the deadline.
            Cancelled, DeadlineExceeded: no room before ctx ended.
        """
        position = 0
        if self._status is Status.CONNECTED:
            try:
                position = self._outbox.try_put(frame, here=True)  # as try_put() would, in one call less
            except OutboxClosed:
                pass
        return position or self._put_slowly(frame, deadline or Deadline(), ctx)

    def _put_slowly(self, frame: bytes, deadline: Deadline, ctx: Context | None) -> int:
        """put() where there is no room at once, or no link."""
        while not (position := self.try_put(frame)):
            wait_under(ctx, self.wake_publishers, lambda over: self.wait_room(deadline, over))
        return position

    def try_put(self, frame: bytes, *, messages: int = 1, force: bool = False) -> int:
        """Queue a frame without waiting; 0 if there is no room. force=True makes room for an END."""
        while True:
            if self._status is not Status.CONNECTED:
                self.check_open()
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

    def put_now(self, frame: bytes, *, here: bool = False) -> bool:
        """Queue a small frame without ever waiting; False (and nothing sent) if there is no link.

        here: it is written in this thread, unless somebody else writes: for what is worth a system call of its own.
        """
        return self._outbox.put_now(frame, here) > 0

    @property
    def traffic(self) -> Traffic:
        """What the link is doing, for a thread that has something to send."""
        return self._outbox.traffic()

    def ready_here(self, producer: Producer, traffic: Traffic) -> None:
        """ready(); but unless the link is busy, the producer is asked and its frames written in this thread.

        Neither the caller nor the producer may hold a lock.
        """
        if traffic is Traffic.BUSY or self._produced_here(producer):
            self.ready(producer)

    def _produced_here(self, producer: Producer) -> bool:
        """Ask the producer, and write in this thread; whether more is ready."""
        outbox, parts = self._outbox, list[bytes]()
        _, messages, _ = producer.produce(parts, PRODUCED_HERE_BYTES, here=True)
        if parts:
            outbox.put_produced(parts[0] if len(parts) == 1 else b"".join(parts), messages)
        return producer.produced()

    def ready(self, producer: Producer) -> None:
        """Have the producer asked for frames by the present link's writer, or the next one's."""
        while self._status is not Status.CLOSED:
            try:
                self._outbox.ready(producer)
                return
            except OutboxClosed:
                with self._lock:  # as in try_put()
                    pass

    def publish_answer(self, reply: str, payload: Payload, headers: Headers | None) -> None:
        """What Message.respond() calls."""
        block = None if headers is None else headers.encode()
        self.put(self.encode(_subject.publish_subject(reply), None, block, to_bytes(payload)))

    def withdraw(self, frame: bytes) -> bool:
        """Take a frame back; True if it surely never left."""
        return self._outbox.withdraw(frame)

    def closed_under(self, frame: bytes) -> NatsError:
        """closed_error() for who waits for the answer to this frame, which is empty if there is none (any more)."""
        error = self.closed_error()
        if isinstance(error, ConnectionClosed):
            error.sent = bool(frame) and id(frame) not in self._never_left
        return error

    def loss_of(self, frame: bytes, mark: int) -> LinkLoss | None:
        """The loss that already took this frame, if its link was lost while it was being queued."""
        loss = self._loss
        return loss if loss is not None and loss.took(frame, mark) else None

    # -- subscriptions --------------------------------------------------------------------------------------------

    def add_mux(self, mux: Mux) -> Mux:
        """Put an inbox for answers in place; before the connection is opened."""
        self.dispatcher.add_mux(mux)
        return mux

    def subscribe(self, core: SubscriptionCore) -> None:
        """Put a subscription in place, on this link and all that follow."""
        self.check_open()
        try:
            with self._lock:
                if self._status is Status.CLOSED:
                    raise self.closed_error()
                frame = self.dispatcher.add(core)
                core.position = self._outbox.put_now(frame)
                self._join_too_locked(self.dispatcher.sub(core))
                if self._handover is not None:
                    self._handover.joined_more()
        except BaseException:  # a Ctrl-C: nobody will hold it
            self.undo_subscribe(core)
            raise

    def undo_subscribe(self, core: SubscriptionCore) -> None:
        """It is as if the subscription had not been made."""
        self.unsubscribe(core)
        core.deactivate(forget=True)

    def _join_too_locked(self, frame: bytes) -> None:
        """What concerns subscriptions goes to the link that is about to take over, too."""
        if self._handover is not None and self._handover.new is not self._session:
            self._handover.new.outbox.put_first(frame)

    def stop_intake(self, core: SubscriptionCore) -> None:
        """Tell the server to send no more; what is on its way is still delivered."""
        self._unsubscribe(core, self.dispatcher.leave)

    def unsubscribe(self, core: SubscriptionCore, error: Exception | None = None) -> None:
        """Remove a subscription; what it holds can still be taken, before the error if there is one."""
        self._unsubscribe(core, self.dispatcher.remove)
        core.deactivate(error)

    def _unsubscribe(self, core: SubscriptionCore, note: Callable[[SubscriptionCore], None]) -> None:
        with self._lock:
            frame = self.dispatcher.unsub(core)
            if frame is not None:
                self._outbox.put_now(frame)
                self._join_too_locked(frame)
            note(core)  # behind it: after a Ctrl-C the next call sends another UNSUB, which does no harm

    def count_dropped(self, messages: int) -> None:
        self._dropped.add(messages)

    def slow_consumer(self, subject: str, dropped: int) -> None:
        log.warning("slow consumer on %r: %d messages dropped so far", subject, dropped)
        self.event("slow_consumer", {"subject": subject, "dropped": dropped})

    def denied(self, session: Session, about: Denial | None, error: PermissionDenied) -> None:
        """Tell those whom a missing permission, or a limit of subscriptions, concerns."""
        muxes = self.dispatcher.muxes()
        cores: list[SubscriptionCore] = []
        if about is None:  # it names no subject
            newest = self.dispatcher.newest_unconfirmed(session.confirmed)
            cores = [] if newest is None else [newest]
        elif about.what == "subscription":
            cores = self.dispatcher.concerned(about.subject, about.queue, about.sid)
            for mux in muxes:
                if mux.wildcard == about.subject:
                    mux.inbox_denied(PermissionDenied(f"no answer can reach this client: {error}"))
        else:
            for mux in muxes:
                tell = mux.publish_denied if about.what == "publish" else mux.reply_denied
                tell(about.subject, error)
        for core in cores:
            self.unsubscribe(core, error)

    def line_refused(self, error: NatsError) -> None:
        core = self.dispatcher.longest()
        if core is not None:
            self.unsubscribe(core, error)

    # -- ending ---------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters since the connection was made."""
        with self._lock:
            session, leaving, outbox = self._session, self._leaving, self._outbox
            links = [link for link in (leaving, session) if link is not None]
            received = self._past["in_bytes"] + sum(link.received_bytes for link in links)
            boxes = [outbox, leaving.outbox] if leaving else [outbox]
            taken, waiting, messages = outbox.amounts()
            if leaving is not None:
                messages += leaving.outbox.amounts()[2]
            sent = self._past["out_messages"] + messages + sum(box.produced_messages for box in boxes)
            produced = self._past["produced_bytes"] + sum(box.produced_bytes for box in boxes)
        return {
            "status": str(self._status),
            "server": None if session is None else str(session.server),
            "reconnects": max(0, self._sessions - 1),
            "in_bytes": received,
            "in_messages": self.dispatcher.messages,
            "out_bytes": taken + produced,
            "out_messages": sent,
            "out_pending_bytes": waiting,
            "subscriptions": len(list(self.dispatcher.subscriptions())),
            "dropped": self._dropped.value,
            "late_replies": self.mux.late,
            "waiting_replies": len(self.mux),
        }

    def drain(self, timeout: float | None) -> DrainTimeout | None:
        """Stop all intake, have everything that came handled, flush, and close; the report of what was left undone.

        Takes the timeout at most, and up to LEAVE_SECONDS more if something was left.
        """
        deadline = Deadline.after(timeout)
        if self._status is Status.NEW:
            self.close(0)
            return None
        self._draining = True
        cores = list(self.dispatcher.subscriptions())
        for core in cores:
            self.stop_intake(core)
        undone, unhandled = [], Counter[str]()
        try:
            self.confirm(deadline)
        except NatsError as error:
            undone.append(f"the server did not confirm that it has everything: {error}")
        for core in cores:
            if core.has_callback and not core.wait_empty(deadline):
                subject, left = _subject.decode(core.subject), core.unhandled
                unhandled[subject] += left
                undone.append(f"{left} messages on {subject!r} not handled")
            self.unsubscribe(core)
        if not undone:
            try:
                self.flush(deadline)  # what the callbacks sent last
            except NatsError as error:
                undone.append(f"the server did not confirm what the callbacks sent: {error}")
        unsent = self._waiting_messages()
        if unsent:
            undone.append(f"{unsent} messages were not sent")
        self.close(deadline.remaining() if undone else CLOSE_SECONDS)
        if not undone:
            return None
        text = f"not drained within {timeout} s" if deadline.expired else "not drained"
        return DrainTimeout(text, undone=undone, unhandled=unhandled, unsent=unsent)

    def _waiting_messages(self) -> int:
        """Messages that no link has taken yet."""
        with self._lock:
            leaving = 0 if self._leaving is None else self._leaving.outbox.waiting_messages
            return leaving + self._outbox.waiting_messages

    def close(self, timeout: float | None = CLOSE_SECONDS, reason: Exception | None = None) -> None:
        """End for good: flush, then stop threads; all within the timeout. Idempotent; from any thread of any kind."""
        if self.generation != fork_generation():
            return  # a forked child's copy: the link is the parent's
        deadline = Deadline.after(timeout)
        if self._status is not Status.CLOSED:
            self._tell_closing(deadline)
        if timeout != 0:
            self._flush_last(deadline)
        mine = False
        try:
            self._end(reason)
            with self._lock:
                if not self._closing:
                    self._closing = mine = True  # no call in between, so no Ctrl-C either
            if mine and not self._closed.is_set():
                self._let_go(self._left, deadline)
        finally:  # after a Ctrl-C, whoever closes next goes on with it
            if mine:
                self._closing = False
        if not mine and not self._is_own_thread():
            self._closed.wait(deadline.remaining())  # another thread is at it

    def _tell_closing(self, deadline: Deadline) -> None:
        """Who has something to say before the end says it now."""
        for closing, _ in self._on_closing:
            closing(deadline)
        for mux in self.dispatcher.muxes():
            mux.connection_closing()

    def _let_go(self, links: set[Session], deadline: Deadline) -> None:
        """End the links, everybody who waits, and the threads. May be done again, if it was cut short."""
        error, reason = self.closed_error(), self._close_reason
        for link in links:
            self._never_left.update(map(id, link.outbox.close()))
            link.end(error)
        for mux in self.dispatcher.muxes():
            mux.connection_closed(error)
        for core in self.dispatcher.subscriptions():
            self.dispatcher.remove(core)
            core.deactivate(reason and error, forget=core.has_callback)
        for callback in self._on_closed:
            callback(reason)
        self.event("closed", {"reason": None if reason is None else str(reason)})
        self._supervisor.stop()
        self._join(links, deadline)
        _connections.discard(self)
        self._closed.set()

    def _flush_last(self, deadline: Deadline) -> None:
        """Have the present link take what was published; there is no waiting for another one."""
        present = self._session
        if present is not None:
            try:
                self._confirm(present, deadline)
            except NatsError as failure:
                log.warning("%s: closed without the server's word that all has arrived: %s", self.name, failure)

    def _end(self, reason: Exception | None) -> None:
        """Be closed from now on; the links in force are left for _let_go(). May be done again, if it was cut short."""
        with self._lock:
            if self._status is not Status.CLOSED:
                handover = self._handover
                both = () if handover is None else (handover.old, handover.new)
                self._left = {link for link in (self._leaving, self._session, *both) if link is not None}
                self._close_reason = reason
                self._status = Status.CLOSED  # behind _left: who finds it closed finds what is to be ended
            links, handover = self._take_links_locked()
            unsent = sum(link.outbox.waiting_messages for link in links) or self._outbox.waiting_messages
            self._never_left.update(map(id, self._outbox.close()))
            self._count_out_locked([link for link in links if link.outbox is not self._outbox])  # which stays in place
            if self._attempt is not None and self._attempt.pending:
                self._attempt.pending = False
                self._attempt.failure = self.closed_error
            self._changed.notify_all()
        if unsent:
            log.warning("%s: closed with %d messages unsent", self.name, unsent)
        if handover is not None:
            handover.stop()

    def _is_own_thread(self) -> bool:
        """Whether this is a thread that close() itself waits for."""
        session = self._session
        me = threading.current_thread()
        own = self.dispatcher.workers.is_own_thread() or self._supervisor.thread is me
        return own or (session is not None and me in session.threads)

    def _join(self, links: set[Session], deadline: Deadline) -> None:
        # Our own threads end in milliseconds, so they get a moment even if user code is to get none.
        soon = Deadline(None if deadline.at is None else max(deadline.at, time.monotonic() + LEAVE_SECONDS))
        stuck = [name for link in links for name in link.join(soon)]
        brief = Deadline(None if deadline.at is None else max(deadline.at, time.monotonic() + IDLE_LEAVE_SECONDS))
        stuck += self.dispatcher.workers.close(brief)
        stuck += self._supervisor.join(soon)
        if stuck:
            log.warning("%s: still running after close(): %s", self.name, ", ".join(stuck))
        timers.settle()

    def gave_up(self, reason: Exception) -> None:
        self.close(LEAVE_SECONDS, reason)

    def flush_at_exit(self, deadline: Deadline) -> None:
        """The interpreter leaves: have the present link take what was published."""
        try:
            if self._status is Status.CONNECTED:
                self.flush(deadline)
                for _, leaving in self._on_closing:
                    leaving(deadline)
                if self._on_closing:
                    self.flush(deadline)
        except NatsError as error:
            log.warning("%s: not all may have been sent at exit: %s", self.name, error)
        if self._status is Status.RECONNECTING and (unsent := self._waiting_messages()):
            log.warning("%s: %d messages were not sent before the exit: there is no link", self.name, unsent)

    def when_closing(self, closing: Callable[[Deadline], None], leaving: Callable[[Deadline], None]) -> None:
        """Have closing(deadline) called, in the thread that closes, while something can still be sent and heard.

        leaving(deadline) is called instead where the interpreter ends: others are to be told, and nobody here woken.
        """
        self._on_closing.append((closing, leaving))

    def when_closed(self, callback: Callable[[Exception | None], None]) -> None:
        """Have callback(reason) called when the connection ends for good; reason None = it was closed on purpose.

        Brief, non-blocking; to be asked for before the connection is opened.
        """
        self._on_closed.append(callback)

    def abandon(self) -> None:
        """In a forked child: let go of the parent's socket without a word on the wire."""
        self._status = Status.CLOSED
        links, handover = self._take_links_locked()
        for link in links if handover is None else [*links, handover.old, handover.new]:
            link.abandon()

    def release(self) -> None:
        """The last user's handle was collected: close, unless callbacks or handlers live on. Safe in a finalizer."""
        self._supervisor.do(self._close_unless_needed)

    def _close_unless_needed(self) -> None:
        if not any(core.has_callback for core in self.dispatcher.subscriptions()):
            self.close(CLOSE_SECONDS)


def _flush_at_exit() -> None:
    """What was published is sent even if nobody closed: bounded, all connections together."""
    deadline = Deadline.after(EXIT_FLUSH_SECONDS)
    for connection in _all_connections():
        if connection.generation == fork_generation():
            connection.flush_at_exit(deadline)


def _all_connections() -> list[Connection]:
    while True:
        try:
            return list(_connections)
        except RuntimeError:  # another thread has just made one
            continue


def is_own(subject: bytes) -> bool:
    """Whether the subject is under an inbox of one of this process's connections."""
    muxes = [mux for connection in _all_connections() for mux in connection.dispatcher.muxes()]
    return any(subject.startswith(mux.inbox + b".") for mux in muxes)


def _abandon_in_child() -> None:
    for connection in _all_connections():
        connection.abandon()
    _connections.clear()


after_fork_in_child(_abandon_in_child)
