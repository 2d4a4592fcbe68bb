"""One link to one server, from handshake to loss.

A Session never reconnects; Connection makes the next one. The reader thread owns the socket's read side and the Parser,
the writer thread its write side, but for what the outbox writes itself while the link is idle; ping() and end() may be
called from any thread. It ends once, with a reason.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from natsync import timers
from natsync.concurrency import Deadline, Finishing, join_all, spawn
from natsync.errors import ConnectError, NatsError, ProtocolError
from natsync.options import ConnectOptions
from natsync.outbox import Outbox, Receipt, SendNow
from natsync.protocol import PING, PONG, Batch, Err, Event, Info, Op, Parser
from natsync.server_errors import classify, server_error
from natsync.transport import Transport

log = logging.getLogger("natsync.session")


#: PONGs that may wait for a server that does not read; one answers all PINGs that came before it.
_PONGS = 1_000
#: How often in the time of write_timeout a write that lasts is looked at: so much later one that is blocked is noticed.
_LOOKS = 4


class Owner(Protocol):
    """What a session tells its connection. None of it may block: it is called on the reader's or timer's thread.

    on_lost() may be called again, if a Ctrl-C cut it short.
    """

    def on_batch(self, session: Session, batch: Batch) -> None: ...
    def on_info(self, session: Session, fields: dict[str, Any]) -> None: ...
    def on_server_error(self, session: Session, text: str) -> None: ...
    def on_lost(self, session: Session, reason: Exception) -> None: ...


#: Called with the outbox position that the PONG confirms, or with None if the link ended first.
PongCallback = Callable[[int | None], None]


class _Ping(Receipt):
    """A PING in flight; its position is 0 too while it is a control frame, ahead of all that is held."""

    __slots__ = ("callback",)

    def __init__(self, callback: PongCallback | None, position: int = 0) -> None:
        self.callback = callback
        self.position = position


class Session:
    """One link's life: two threads, a parser, the PINGs in flight."""

    def __init__(
        self,
        transport: Transport,
        info: dict[str, Any],
        outbox: Outbox,
        options: ConnectOptions,
        owner: Owner,
        name: str,
        confirmed: int = 0,
    ) -> None:
        self.server = transport.server
        self.info = info  # the server's INFO; kept up to date by the owner
        self.outbox = outbox
        self.confirmed = confirmed  # a server had everything up to this position when it answered a PING
        self.received_bytes = 0
        self.lame = False  # the server has announced its end
        self.muted = False  # what it brings has come on another link, but for messages of queue groups
        self._transport = transport
        self._options = options
        self._owner = owner
        self._name = name
        self._lock = threading.Lock()
        self._ended = False
        self._telling = Finishing(self._lock)  # of the end
        self._reason: Exception | None = None
        self._last_error = ""
        self._pings: deque[_Ping] = deque()
        self._unanswered = 0
        self._ping_timer: timers.Timer | None = None
        self._write_timer: timers.Timer | None = None
        self._write_look_at = 0.0  # when it is to look
        self._writing_since: float | None = None
        self._acknowledged: int | None = None  # what the server had confirmed at the last look,
        self._acknowledged_at = 0.0  # and at which look that had changed
        self._made_up_for: float | None = None  # since when a write lasts that has been given time for a late look
        self.threads: list[threading.Thread] = []
        self._left = 0  # of them

    def start(self) -> None:
        """Start the two threads; from here on the owner is told of what comes."""
        self.threads.append(spawn(self._read, f"{self._name}-reader"))
        self.threads.append(spawn(self._write, f"{self._name}-writer"))
        self._schedule_ping()

    def ping(self, callback: PongCallback | None = None) -> bool:
        """Send a PING behind everything queued so far; callback gets its answer. False if the link has ended."""
        ping = _Ping(callback)
        with self._lock:  # the order of _pings is the order on the wire
            if self._ended:
                return False
            try:
                self._pings.append(ping)
                self.outbox.put_now(PING, receipt=ping)
            finally:  # an interrupt must leave no PING that nobody knows of: each answer would go to the one before
                if not ping.position and ping in self._pings:
                    self._pings.remove(ping)
            return ping.position > 0

    def ping_first(self, callback: PongCallback | None = None) -> bool:
        """Send a PING although the outbox is held, behind control frames only. False if the link has ended."""
        with self._lock:
            if self._ended:
                return False
            ahead = sum(1 for ping in self._pings if not ping.position)  # all others are held
            self._pings.insert(ahead, _Ping(callback))
            self.outbox.put_first(PING)
            return True

    def mark(self, frame: bytes, callback: PongCallback) -> None:
        """Send a PING, and a frame right behind it; callback gets the answer to the PING. Not for another link."""
        with self._lock:
            position = 0 if self._ended else self.outbox.put_now(PING + frame)
            if position:
                self._pings.append(_Ping(callback, position))

    def hand_over(self, last: bytes, callback: PongCallback) -> int:
        """Send the last frames of this link; callback gets the answer to the PING behind them.

        Returns the position of the end, 0 if the link has ended already.
        """
        with self._lock:
            position = 0 if self._ended else self.outbox.seal(last + PING)
            if position:
                self._pings.append(_Ping(callback, position))
            return position

    def end(self, reason: Exception, *, dead: bool = False) -> None:
        """End the link, once: threads leave, the owner is told. Does not wait. Goes on with what was cut short.

        dead: the server does not read any more; what it has not been sent yet is dropped.
        """
        with self._lock:
            self._ended = True
            first = self._reason = self._reason or reason
            pending = [timer for timer in (self._ping_timer, self._write_timer) if timer is not None]
        for timer in pending:
            timer.cancel()
        if dead:
            self._transport.abort()
        else:
            self._transport.shutdown()
        self._telling.run(lambda: self._tell_end(first))

    def _tell_end(self, reason: Exception) -> None:
        self._owner.on_lost(self, reason)
        while self._pings:  # nobody else touches them any more
            callback = self._pings[0].callback
            if callback is not None:
                callback(None)
            self._pings.popleft()  # behind it: see Finishing

    def join(self, deadline: Deadline) -> list[str]:
        """Wait for both threads after end() and give the socket back; names those that did not leave."""
        stuck = join_all(self.threads, deadline)
        if not stuck:
            self._transport.close()
        return stuck

    @property
    def send_now(self) -> SendNow | None:
        """For the outbox: how it writes while the writer has nothing to do."""
        return self._transport.send_now

    def abandon(self) -> None:
        """In a forked child: drop the descriptor without touching the wire."""
        self._transport.abandon()

    # -- reader ------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        parser = Parser(self._options.max_message_bytes)
        reason: Exception
        try:
            while data := self._transport.receive():
                self.received_bytes += len(data)
                for event in parser.feed(data):
                    if type(event) is Batch:
                        self._owner.on_batch(self, event)
                    else:
                        self._handle(event)
                del data
            reason = self._end_of_link()
        except ProtocolError as error:
            for event in parser.events_before_error:
                self._handle(event)
            reason = ProtocolError(self._transport.hide(str(error)))
        except OSError as error:
            broke = ConnectError(f"the link to {self.server} broke: {error.strerror or error}")
            reason = self._end_of_link() if self._last_error else broke  # a reset may follow the server's last words
        except Exception as error:  # a fault of this library: the link must not stay half alive
            log.exception("the reader of %s failed", self._name)
            reason = ConnectError(f"the reader failed: {error!r}")
        self.end(reason)
        self._leave()

    def _handle(self, event: Event) -> None:
        if isinstance(event, Batch):
            self._owner.on_batch(self, event)
        elif event is Op.PING:
            self.outbox.put_first(PONG, most=_PONGS)
        elif event is Op.PONG:
            self._pong()
        elif isinstance(event, Info):
            self._owner.on_info(self, event.fields)
        elif isinstance(event, Err):
            text = self._last_error = self._transport.hide(event.text)
            self._owner.on_server_error(self, text)

    def _pong(self) -> None:
        with self._lock:
            if self._ended or not self._pings:
                return
            ping = self._pings.popleft()
            self._unanswered = 0
            self.confirmed = max(self.confirmed, ping.position)
        if ping.callback is not None:
            ping.callback(ping.position)

    def _end_of_link(self) -> NatsError:
        """The reason for an end without an error of the socket: the server's last words, if it had any."""
        if self._last_error and classify(self._last_error).closes is not False:
            return server_error(str(self.server), self._last_error)
        return ConnectError(f"{self.server} closed the connection")

    # -- writer ------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        try:
            while (data := self.outbox.take()) is not None:
                self._writing_since = time.monotonic()
                if self._write_timer is None:
                    self._watch_write()
                self._transport.send(data, self._write_goes_on)
                self._writing_since = None
        except Exception as error:
            self.end(ConnectError(f"cannot write to {self.server}: {error}"))
        self._leave()

    def _write_goes_on(self) -> None:
        """A part of a write was taken: the next one has the whole write_timeout."""
        self._writing_since = time.monotonic()

    def _leave(self) -> None:
        """The last of the two threads gives the socket back: on a busy machine nobody may have waited for so long."""
        with self._lock:
            self._left += 1
            last = self._left == 2
        if last:
            self._transport.close()

    # -- the timer's thread --------------------------------------------------------------------------------------

    def _schedule_ping(self) -> None:
        if self._options.ping_interval:
            with self._lock:
                if not self._ended:
                    self._ping_timer = timers.schedule_after(self._options.ping_interval, self._ping_due)

    def _ping_due(self) -> None:
        with self._lock:
            late = self._ping_timer is not None and timers.lateness(self._ping_timer.at, time.monotonic()) > 0
        if self._unanswered >= self._options.max_pings_outstanding + late:  # one more PING, if we are late ourselves
            self.end(
                ConnectError(f"{self.server} has not answered {self._unanswered} PINGs: the link is stale"), dead=True
            )
            return
        self._unanswered += 1  # those of flush() do not count: several may be on their way on a healthy link
        if self.outbox.held:
            self.ping_first()
        else:
            self.ping()
        self._schedule_ping()

    def _watch_write(self) -> None:
        """Look in a while whether the write that has just begun lasts. One look covers all writes until then."""
        if self._options.write_timeout is not None:
            self._look_at_write(self._options.write_timeout / _LOOKS)

    def _look_at_write(self, seconds: float) -> None:
        with self._lock:
            if not self._ended and self._write_timer is None:
                self._write_look_at = time.monotonic() + seconds
                self._write_timer = timers.schedule(self._write_look_at, self._write_due)

    def _write_due(self) -> None:
        with self._lock:
            self._write_timer = None
        now = time.monotonic()
        since, limit = self._writing_since, self._options.write_timeout
        if since is None or limit is None:
            return  # idle: the next write starts a new watch
        acknowledged = self._transport.acknowledged()
        if acknowledged != self._acknowledged:
            self._acknowledged, self._acknowledged_at = acknowledged, now
        since = max(since, self._acknowledged_at)  # a write is up to 1 MiB, or one frame: on a slow link it takes long
        left = since + limit - now
        if left <= 0 and (self._made_up_for == since or not timers.lateness(self._write_look_at, now)):
            self.end(ConnectError(f"a write to {self.server} was blocked for {limit:g} s"), dead=True)
            return
        if left <= 0:  # late: this process was frozen, or had no processor, and the write may wait for that
            self._made_up_for = since
        self._look_at_write(min(left, limit / _LOOKS) if left > 0 else min(limit, timers.LATE_SECONDS))
