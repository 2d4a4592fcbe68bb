"""Links: what keeps a connection's link up. Opening, losing, making again, handing over, ending.

One Session at a time is in force; while a server is left for another there are two. States are in Status. The lock
covers state and tables, never I/O, waiting or user code. Lock order: Handover, then Links, then Subscription or Mux,
then Session, then Outbox. Connection builds on this what links are for.
"""

from __future__ import annotations

import enum
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from natsync import hooks, protocol
from natsync.concurrency import Deadline, SafeCondition, SafeEvent, Signal, fork_generation, run_safely, run_soon
from natsync.context import Context, wait_under
from natsync.dispatcher import CALLBACK_WORKERS, Dispatcher
from natsync.errors import (
    ConnectError,
    ConnectionClosed,
    ConnectionLost,
    ForkError,
    NatsError,
    PermissionDenied,
    TimedOut,
)
from natsync.handover import Handover
from natsync.mux import LinkLoss
from natsync.options import WRITE_TIMEOUT, ConnectOptions, Server
from natsync.outbox import Outbox
from natsync.server_errors import Denial, ServerError, advice, classify, denial, is_line_too_long, server_error
from natsync.server_info import reliable
from natsync.servers import ServerList
from natsync.session import PongCallback, Session
from natsync.settling import Settling
from natsync.supervisor import Supervisor
from natsync.transport import Transport

log = logging.getLogger("natsync.connection")

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
        self.failure: Callable[[], NatsError] | None = None  # makes the error, one for each who waits


_names = itertools.count(1)
_marks = itertools.count(1)


class Links:
    """What keeps the link up; held by its threads until it is closed.

    Attributes:
        bare_bytes: the largest payload that put_bare() may be given; -1 before the first link.
    """

    def __init__(self, servers: list[Server], options: ConnectOptions, workers: int = CALLBACK_WORKERS) -> None:
        self.options = options
        self.name = f"natsync-{options.name or next(_names)}"
        self.dispatcher = Dispatcher(self.name, workers)
        self.bare_bytes = -1
        self._info: dict[str, Any] = {}
        self.generation = fork_generation()
        self._supervisor = Supervisor(self.name, ServerList(servers, options), options, self)
        self._lock = threading.Lock()
        self._changed = SafeCondition(self._lock)
        self._status = Status.NEW
        self._session: Session | None = None
        self._leaving: Session | None = None  # the link that _session is about to take over from
        self._handover: Handover | None = None
        self._outbox = Outbox(options.reconnect_buffer_bytes)
        self._attempt: _Attempt | None = None
        self._loss: LinkLoss | None = None
        self._news: deque[Callable[[], None]] = deque()  # of links; put there as the state changes
        self._telling = False  # a thread tells them
        self._line_in_doubt = False  # a server refused a line as too long, and it may be one that each link repeats
        self._proving: Session | None = None  # the link whose server is to confirm what it was told first, therefore
        self._settling = Settling(self._ping)
        self._on_closing: list[tuple[Callable[[Deadline], None], Callable[[Deadline], None]]] = []
        self._on_closed: list[Callable[[Exception | None], None]] = []
        self._close_reason: Exception | None = None
        self._draining = False
        self._closed = SafeEvent()
        self._sessions = 0
        self._past = {"in_bytes": 0, "out_messages": 0, "produced_bytes": 0}

    # -- opening --------------------------------------------------------------------------------------------------

    @property
    def info(self) -> dict[str, Any]:
        """The INFO of the newest server; empty before the first link."""
        return self._info

    @info.setter
    def info(self, fields: dict[str, Any]) -> None:
        self._info = fields
        self.bare_bytes = min(protocol.FORMATTED_BYTES, fields.get("max_payload", -1))

    @property
    def status(self) -> Status:
        return Status.DRAINING if self._draining and self._status is not Status.CLOSED else self._status

    @property
    def linked(self) -> bool:
        """Whether there is a link right now."""
        return self._session is not None

    @property
    def server(self) -> Server | None:
        session = self._session
        return None if session is None else session.server

    def ensure_open(self, deadline: Deadline | None = None, ctx: Context | None = None) -> None:
        """Return once there is a connection, or at least one being made again; the first use makes it.

        Raises:
            NoServersError: the servers were all tried once, and none could be reached.
            ConnectError: this is the thread that tries them.
            ConnectionClosed: it was closed.
            TimedOut: the deadline came first.
            Cancelled, DeadlineExceeded: the end of ctx came first.
        """
        if self._status is Status.CONNECTED or self._status is Status.RECONNECTING:
            return
        attempt = wait_under(
            ctx, self._wake_openers_soon, lambda over: self._await_attempt(deadline or Deadline(), over)
        )
        if attempt is not None and attempt.failure is not None:
            raise attempt.failure()

    def _await_attempt(self, deadline: Deadline, over: Callable[[], bool]) -> _Attempt | None:
        with self._lock:
            attempt = self._begin_locked()
            while attempt is not None and attempt.pending and not over():
                if not self._changed.wait(deadline.remaining()) and attempt.pending:
                    raise TimedOut("no connection yet: the servers are still being tried")
        return attempt

    def _wake_openers_soon(self) -> None:
        """Not here: who ends a context may hold any lock."""

        def wake() -> None:
            with self._lock:
                self._changed.notify_all()

        run_soon(wake, "waking those who wait for a connection")

    def _begin_locked(self) -> _Attempt | None:
        """Start the supervisor if need be; the attempt to wait for, None if there is no need to wait."""
        if self.generation != fork_generation():
            raise ForkError("this connection belongs to the parent process")
        if self._status is Status.CLOSED:
            raise self.closed_error()
        if self._supervisor.is_own_thread and self._status in (Status.NEW, Status.CONNECTING):
            raise ConnectError("no link yet, and this thread is the one that makes it")
        if self._status is Status.NEW:
            try:
                self._supervisor.start()
            except RuntimeError as error:  # the next use tries again
                raise ConnectError(f"no thread can be started for the connection: {error}") from error
            attempt = _Attempt()
            try:
                self._attempt = attempt
                self._status = Status.CONNECTING
                if self.options.retry_on_failed_connect:
                    self._status = Status.RECONNECTING
                    attempt.pending = False
                self._supervisor.begin()
            except BaseException:  # a Ctrl-C: there may be no walk to wait for; if there is, the next use has two
                self._status, self._attempt = Status.NEW, None
                raise
        return self._attempt if self._status is Status.CONNECTING else None

    @property
    def close_reason(self) -> Exception | None:
        """Why the connection gave up for good; None while it lasts, or if it was closed on purpose."""
        return self._close_reason

    def closed_error(self) -> NatsError:
        if self.generation != fork_generation():
            return ForkError("this connection belongs to the parent process")
        reason = self._close_reason
        error = ConnectionClosed("the connection is closed" + (f": {reason}" if reason else ""))
        error.__cause__ = reason
        return error

    def check_open(self) -> None:
        if self._status is Status.CLOSED:
            raise self.closed_error()
        if self._status is Status.NEW or self._status is Status.CONNECTING:
            self.ensure_open()

    # -- round trips ----------------------------------------------------------------------------------------------

    def flush(self, deadline: Deadline) -> None:
        """Block until the server has everything that was put before.

        Raises:
            TimedOut: it did not confirm by the deadline.
            ConnectionLost: the link broke before it confirmed, so that some may be lost.
            ConnectionClosed: the connection is closed.
        """
        while not self._confirm(self._await_session(deadline), deadline):
            # The link ended before the PING was queued: the next one takes over what waited.
            if deadline.expired:
                raise TimedOut("no link to a server in time")

    def confirm(self, deadline: Deadline) -> None:
        """flush() behind UNSUBs: what was on its way has come. Raises as flush() does."""
        self.flush(deadline)
        # Messages of queue groups may be on their way on a link that is about to take over, too.
        handover, signal = self._handover, Signal()
        other = None if handover is None or handover.new is self._session else handover.new
        if other is not None and other.ping_first(lambda position: signal.set()):
            signal.wait(deadline.or_sooner(self.options.connect_timeout))

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
            self.check_open()
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
        self.check_open()
        with self._lock:
            while self._session is None:
                if self._status is Status.CLOSED:
                    raise self.closed_error()
                if self._supervisor.is_own_thread:
                    raise ConnectError("no link, and this thread is the one that makes it")
                if not self._changed.wait(deadline.remaining()):
                    raise TimedOut("no link to a server in time")
            return self._session

    # -- what a session tells -------------------------------------------------------------------------------------

    def on_batch(self, session: Session, batch: protocol.Batch) -> None:
        handover = self._handover
        if handover is not None:
            handover.on_batch(session, batch)
        elif not session.muted or self.is_shared(batch.sid):
            self.dispatcher.deliver(batch)

    def on_info(self, session: Session, fields: dict[str, Any]) -> None:
        fields = reliable(fields)
        session.info = {**session.info, **fields}
        if session is self._session:
            self.info = session.info
        self._supervisor.discovered(fields.get("connect_urls"), session.server)
        if fields.get("ldm"):
            self._lame_duck(session)

    def _lame_duck(self, session: Session) -> None:
        """The server announces its end; it may do so more than once."""
        if session.lame:
            return
        session.lame = True
        handover = self._handover
        if handover is not None and session is handover.new and session is not self._session:
            session.end(ConnectError(f"{session.server} is going away, too"))
            return
        self.event("lame_duck", {"server": str(session.server)})
        self._supervisor.move_from(session)

    def on_server_error(self, session: Session, text: str) -> None:
        kind, what_to_do, about = classify(text), advice(text), denial(text)
        handover = self._handover
        if handover is not None and about is not None and handover.is_mark(about.subject):
            return  # it does without
        log.warning("%s: %s says: %s%s", self.name, session.server, text, f" ({what_to_do})" if what_to_do else "")
        self.event("error", {"error": text, "kind": kind.value, "advice": what_to_do})
        if kind is ServerError.PERMISSION:
            error = server_error(str(session.server), text)
            assert isinstance(error, PermissionDenied)
            self.denied(session, about, error)
        elif is_line_too_long(text):
            # The server says no more. A message is not sent again, but SUBs are, with each link: so the next one has
            # them confirmed before it sends anything else, and if that is refused, it was a SUB.
            self._line_in_doubt = True
            if session is self._proving:
                self.line_refused(server_error(str(session.server), text))

    def line_refused(self, error: NatsError) -> None:
        """A subscription's line is too long for the server, and would end each link that follows."""
        raise NotImplementedError

    def denied(self, session: Session, about: Denial | None, error: PermissionDenied) -> None:
        """A permission, or a limit of subscriptions, is in somebody's way."""
        raise NotImplementedError

    def on_lost(self, session: Session, reason: Exception) -> None:
        """The session ended: a new outbox takes over what was not handed to it, and those in flight are told."""
        if self._not_moved(session):
            return
        with self._lock:
            if session is not self._session and session is not self._leaving:
                return
            links, handover = self._take_links_locked()
            rest = [frame for link in links for frame in link.outbox.close()]
            self._count_out_locked(links)  # behind the close: nothing more is put into them
            position = self._outbox.position
            self._outbox = Outbox(self.options.reconnect_buffer_bytes, rest, position)
            confirmed = max(link.confirmed for link in links)
            waiting = frozenset(id(frame) for frame in rest)
            loss = LinkLoss(reason, position, links[0].outbox.taken, confirmed, waiting)
            self._loss = loss
            if self._status is Status.CLOSED:
                return
            self._status = Status.RECONNECTING
            self._news.append(lambda: self._tell_lost(session, loss))
            self.event("disconnected", {"reason": str(reason)})
        log.info("%s: disconnected: %s", self.name, reason)
        if handover is not None:
            handover.stop()
        self._tell_news()
        self._drop_links(links if handover is None else [*links, handover.old, handover.new], session, reason)

    def _tell_lost(self, session: Session, loss: LinkLoss) -> None:
        muxes = self.dispatcher.muxes()
        self._outbox.withdraw_to(set().union(*(mux.breaks(loss) for mux in muxes)))
        for mux in muxes:
            mux.link_lost(loss)
        self._supervisor.link_lost(session, loss.reason)  # behind it, or the next link would be told of sooner

    def _tell_made(self) -> None:
        for mux in self.dispatcher.muxes():
            mux.link_made()

    def _tell_news(self) -> None:
        """Tell the waiters of links, in order: one thread at a time, which also tells what comes meanwhile."""
        with self._lock:
            if self._telling:
                return
            self._telling = True
        while True:
            with self._lock:
                if not self._news:
                    self._telling = False
                    return
                news = self._news.popleft()
            run_safely(news, "telling of a link")

    def _take_links_locked(self) -> tuple[list[Session], Handover | None]:
        """All links in force, the one that goes before first; there are none from now on."""
        links = [link for link in (self._leaving, self._session) if link is not None]
        for link in links:
            self._past["in_bytes"] += link.received_bytes
        if self._handover is not None:
            self._handover.mute()  # first, for what the readers still hold goes there, or is heeded by this
        handover, self._handover = self._handover, None
        self._leaving = self._session = None
        return links, handover

    def _count_out_locked(self, links: list[Session]) -> None:
        for link in links:
            self._past["out_messages"] += link.outbox.messages + link.outbox.produced_messages
            self._past["produced_bytes"] += link.outbox.produced_bytes

    def _drop_links(self, links: list[Session], but: Session | None, reason: Exception) -> None:
        """End links that are not in force any more."""
        for link in set(links) - {but}:
            link.outbox.close()
            link.end(reason)
            self._join_soon(link)

    def _join_soon(self, link: Session) -> None:
        def join() -> None:
            link.join(Deadline.after(LEAVE_SECONDS))

        self._supervisor.do(join)

    # -- what the supervisor asks and tells -----------------------------------------------------------------------

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
            session = Session(transport, info, self._outbox, self.options, self, self.name, confirmed)
            failure = self._start_locked(session)
        if failure is not None:  # as good as a server that does not answer: another walk will follow
            session.end(ConnectError(str(failure)))
            session.join(Deadline.after(LEAVE_SECONDS))
            raise ConnectError(f"no thread can be started for the link: {failure}") from failure
        self._supervisor.discovered(info.get("connect_urls"), transport.server)
        if info.get("ldm"):
            self._lame_duck(session)
        self._settling.on_link()
        self._tell_news()
        log.info("%s: connected to %s", self.name, transport.server)
        return True

    def _start_locked(self, session: Session) -> RuntimeError | None:
        """Put a new session in force; the error if there is no thread for it, and then nothing has changed."""
        try:
            session.start()
        except RuntimeError as error:
            self._outbox.detach()
            return error
        first = self.dispatcher.resubscription(self._outbox.position)
        if self._line_in_doubt:
            self._outbox.hold()
            self._outbox.attach(first, session.send_now)
            self._proving = session
            session.ping_first(lambda position: self._line_proved(session, position))
        else:
            self._outbox.attach(first, session.send_now)
        self._session = session
        self.info = session.info  # its reader may have brought another one by now
        self._status = Status.CONNECTED
        self._sessions += 1
        self._news.append(self._tell_made)
        if self._attempt is not None:
            self._attempt.pending = False
        self._changed.notify_all()
        self.event("reconnected" if self._sessions > 1 else "connected", {"server": str(session.server)})
        return None

    def _line_proved(self, session: Session, position: int | None) -> None:
        if position is None:
            return  # the link is lost, and the next one takes over what waits
        if session is self._proving:
            self._line_in_doubt, self._proving = False, None
        session.outbox.release()

    def _drop_larger(self, max_payload: int) -> None:
        """Messages that wait and that the new server would not take are dropped, and those whose they are told."""
        dropped = self._outbox.drop_larger(max_payload)
        if not dropped:
            return
        text = f"{len(dropped)} waiting messages exceed the new server's max_payload of {max_payload} bytes: dropped"
        log.warning("%s: %s", self.name, text)
        self.event("error", {"error": text, "kind": ServerError.PROTOCOL.value, "advice": ""})
        muxes = self.dispatcher.muxes()
        self._outbox.withdraw_to(set().union(*(mux.frames_dropped(dropped) for mux in muxes)))
        for mux in muxes:
            mux.repair()

    def on_first_walk_failed(self, failure: Callable[[], NatsError]) -> None:
        with self._lock:
            if self._status is Status.CONNECTING and self._attempt is not None:
                self._attempt.failure = failure
                self._attempt.pending = False
                self._status = Status.NEW  # the next use tries again
                self._changed.notify_all()

    def gave_up(self, reason: Exception) -> None:
        raise NotImplementedError

    def force_reconnect(self) -> None:
        """Drop the link, if there is one, and make another at once."""
        self.ensure_open()
        self._supervisor.hurry()
        session, ended = self._session, Signal()
        if session is None:
            return

        def end() -> None:
            session.end(ConnectError("force_reconnect() was called"))
            ended.set()

        # On another thread, because a Ctrl-C must not cut it short: some would never learn of the end.
        run_soon(end, "force_reconnect()")
        ended.wait(Deadline.after(LEAVE_SECONDS))

    # -- a link that takes over from another ----------------------------------------------------------------------

    def wants_move(self, lame: Session) -> bool:
        return self._session is lame and self._handover is None and not self._draining

    def on_other_link(self, lame: Session, transport: Transport, info: dict[str, Any]) -> bool:
        if info.get("ldm"):
            transport.close()
            raise ConnectError(f"{transport.server} is going away, too")
        outbox = Outbox(self.options.reconnect_buffer_bytes)
        outbox.hold()
        session = Session(transport, info, outbox, self.options, self, self.name, lame.confirmed)
        patience = self.options.write_timeout or WRITE_TIMEOUT
        handover = Handover(self, lame, session, self.options.connect_timeout, patience)
        failure: RuntimeError | None = None
        with self._lock:
            if not self.wants_move(lame):
                transport.close()
                return False
            self._handover = handover
            try:
                session.start()
            except RuntimeError as error:
                self._handover = None
                failure = error
            else:
                outbox.attach(self.dispatcher.interest(), session.send_now)
        if failure is not None:
            self._drop_links([session], None, failure)
            raise ConnectError(f"no thread can be started for the link: {failure}") from failure
        log.info("%s: moving from %s to %s", self.name, lame.server, session.server)
        handover.begin()
        self._supervisor.discovered(info.get("connect_urls"), transport.server)
        return True

    def _not_moved(self, session: Session) -> bool:
        """Whether the link that is gone was about to take over, and not in force yet; then another one is tried."""
        with self._lock:
            handover = self._handover
            if handover is None or session is not handover.new or session is self._session:
                return False
            session.muted = True
            self._handover = None
        log.info("%s: could not move to %s", self.name, session.server)
        handover.give_up()
        session.outbox.close()
        self._join_soon(session)
        self._supervisor.move_from(handover.old, session.server)
        return True

    def deliver(self, batch: protocol.Batch) -> None:
        self.dispatcher.deliver(batch)

    def is_shared(self, sid: bytes) -> bool:
        return self.dispatcher.is_shared(sid)

    def mark_subject(self) -> bytes:
        return self.dispatcher.muxes()[0].inbox + b".move-%d" % next(_marks)

    def leave_old_link(self, handover: Handover) -> None:
        with self._lock:
            if self._handover is not handover:
                return
            last = b"".join(self.dispatcher.no_interest()) + handover.last_words
            position = handover.old.hand_over(last, handover.left)
            if position:  # else it has just been lost, and on_lost() is about to be called
                handover.new.outbox.follow(handover.old.outbox, position)
                self._leaving = handover.old
                self._session = handover.new
                self._outbox = handover.new.outbox
                self.info = handover.new.info

    def take_over(self, handover: Handover) -> None:
        with self._lock:
            if self._handover is not handover or self._leaving is None:
                return
            old, new, self._leaving = handover.old, handover.new, None
            self._past["in_bytes"] += old.received_bytes
            self._count_out_locked([old])
            new.confirmed = max(new.confirmed, old.confirmed)
            if new.info.get("max_payload", 0) < old.info.get("max_payload", 0):
                self._news.append(self._tell_made)  # what is kept for sending again may be too large now
            self._news.append(new.outbox.release)
            self._sessions += 1
            self.event("reconnected", {"server": str(new.server)})
        log.info("%s: moved from %s to %s", self.name, old.server, new.server)
        self._tell_news()
        self._supervisor.moved()
        self._drop_links([old], None, ConnectError(f"left {old.server} for {new.server}"))
        self._settling.on_link()

    def end_handover(self, handover: Handover) -> None:
        with self._lock:
            if self._handover is handover:
                self._handover = None
            session = self._session
        handover.stop()
        if session is not None and session.lame:  # it was announced meanwhile
            self._supervisor.move_from(session)

    # -- telling --------------------------------------------------------------------------------------------------

    def event(self, name: str, details: dict[str, Any]) -> None:
        """Tell the user's on_event and hooks, on a worker, in order."""
        callback, watching = self.options.on_event, self.options.hooks
        if callback is not None:
            self.dispatcher.event(lambda: callback(name, details))
        if watching is not None:
            self.dispatcher.event(lambda: hooks.fire_event(watching, name, details))
