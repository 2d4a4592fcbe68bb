"""Supervisor: the thread of a connection that dials servers, first and again, and does small chores.

It owns the list of servers. What it finds it gives to its Keeper (the connection), which decides; finalizers leave
their work here, because a queue is all that they may touch.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from natsync.concurrency import Deadline, join_all, run_soon, run_waiting
from natsync.errors import AuthorizationError, ConnectError, NatsError, NoServersError
from natsync.options import ConnectOptions, Server
from natsync.server_errors import Misconfigured
from natsync.servers import ServerList
from natsync.session import Session
from natsync.transport import Dialing, Transport, dial

log = logging.getLogger("natsync.connection")

Causes = dict[Server, Exception]


class AccessRefused(NoServersError, AuthorizationError):
    """Every server that could be reached refused the credentials."""


def no_servers(causes: Causes) -> NoServersError:
    """The error of a walk that found no server."""
    refused = bool(causes) and all(isinstance(error, AuthorizationError) for error in causes.values())
    return (AccessRefused if refused else NoServersError)({str(server): causes[server] for server in causes})


class Keeper(Protocol):
    """What the supervisor asks and tells. Nothing of it blocks, but for gave_up()."""

    def wants_link(self) -> bool:
        """Whether there should be a link and is none."""

    def on_link(self, transport: Transport, info: dict[str, Any]) -> bool:
        """A server was reached; False if nobody wants the link any more."""

    def wants_move(self, lame: Session) -> bool:
        """Whether this link is still the one in force, and no other one is about to take over."""

    def on_other_link(self, lame: Session, transport: Transport, info: dict[str, Any]) -> bool:
        """A server was reached that may take over from the lame one; False if nobody wants that any more."""

    def on_first_walk_failed(self, failure: Callable[[], NatsError]) -> None:
        """The first walk over the servers found none; failure() makes the error to raise."""

    def gave_up(self, reason: Exception) -> None:
        """There will be no further link."""


class Supervisor:
    """Dials for one connection."""

    def __init__(self, name: str, servers: ServerList, options: ConnectOptions, keeper: Keeper) -> None:
        self._name = name
        self._servers = servers
        self._options = options
        self._keeper = keeper
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self._here = threading.local()
        self._unsaid: list[Callable[[], None]] | None = None  # in the first walk: what is logged behind it
        self._refusals: dict[Server, str] = {}
        self._dialing = Dialing()
        self._stopping = False
        self._gone = False  # no thread does chores any more
        self._linked_at = 0.0
        self._flaps = 0  # links in a row that were lost as soon as they were made
        self._hurry = False  # do not wait before the next walk
        self._lame: Session | None = None  # the link to be left as soon as another server is there
        self._moves = 0  # attempts to leave it
        self._moving = False  # _leave_lame() is at it

    def start(self) -> None:
        """Start the thread; begin() gives it something to do. Requires the connection's lock.

        Raises:
            RuntimeError: there is no thread to be had just now; nothing has changed.
        """
        if self.thread is not None:
            return  # an interrupt came behind the last start()
        self.thread = threading.Thread(target=self._run, name=f"{self._name}-supervisor", daemon=True)
        try:
            self.thread.start()
        except BaseException:
            if self.thread.ident is None:
                self.thread = None
            raise

    @property
    def is_own_thread(self) -> bool:
        """Whether this thread dials, or has dialed, for this connection: it must not wait for a first link."""
        return getattr(self._here, "dials", False)

    def begin(self) -> None:
        """Make the first walk."""
        self._tasks.put(self._persist if self._options.retry_on_failed_connect else self._try_once)

    def do(self, task: Callable[[], None]) -> None:
        """Have a brief chore done on the thread; may be called anywhere, finalizers included."""
        self._tasks.put(task)
        if self._gone:
            run_soon(self._do_rest, "a chore")

    def link_lost(self, session: Session, reason: Exception) -> None:
        """Clear the session away and make the next link."""
        self.do(lambda: self._replace(session, reason))

    def move_from(self, lame: Session, failed: Server | None = None) -> None:
        """The server is going away: make a link to another one, if there is any, while this one still works.

        failed: a server to which moving has just failed.
        """
        self._tasks.put(lambda: self._move(lame, failed))

    def moved(self) -> None:
        """The move has succeeded."""
        self._tasks.put(self._linked)

    def hurry(self) -> None:
        """Make the next attempt at once, however the last ones went."""

        def forgive() -> None:
            self._hurry = True
            self._flaps = 0

        self._tasks.put(forgive)

    def discovered(self, urls: object, through: Server) -> None:
        """What a server said of the cluster's other servers, if anything."""
        if isinstance(urls, list) and urls:
            self._tasks.put(lambda: self._discover(urls, through))

    def stop(self) -> None:
        """Let the thread end; a dial under way is cut short."""
        self._stopping = True
        self._tasks.put(None)
        if self.thread is None:
            self._gone = True
        self._dialing.cancel()

    def join(self, deadline: Deadline) -> list[str]:
        """Wait for the thread; its name if it did not end in time."""
        return [] if self.thread is None else join_all([self.thread], deadline)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        # A failed first walk ends this thread; the next use of the connection starts another one.
        self._here.dials = True
        while self.thread is threading.current_thread():
            if not self._chores(Deadline()):
                break
        if self._stopping:
            self._gone = True
            self._do_rest()

    def _do_rest(self) -> None:
        """Do what came behind the end."""
        with contextlib.suppress(queue.Empty):
            while True:
                task = self._tasks.get_nowait()
                if task is not None:
                    self._do(task)

    def _do(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception:
            log.exception("%s: a chore failed", self._name)
        run_waiting()

    def _chores(self, until: Deadline) -> bool:
        """Do chores until the deadline, or just the next one if there is none; False when the thread should end."""
        while True:
            try:
                task = self._tasks.get(timeout=until.remaining())
            except queue.Empty:
                return True
            if task is None:
                return False
            self._do(task)
            if until.at is None or self._hurry:
                return True

    def _try_once(self) -> None:
        # Who waits for the outcome may hold a lock that logging takes: that of a handler which uses this connection.
        self._unsaid = []
        causes = self._walk()
        unsaid, self._unsaid = self._unsaid, None
        if causes is not None:
            self.thread = None
            self._keeper.on_first_walk_failed(lambda: no_servers(causes))
        for say in unsaid:
            say()

    def _replace(self, lost: Session, reason: Exception) -> None:
        lost.join(Deadline.after(self._options.connect_timeout))
        self._servers.failed(lost.server)
        lasted = time.monotonic() - self._linked_at
        self._flaps = 0 if lasted >= self._options.reconnect_wait else self._flaps + 1
        if self._refused_again(lost.server, reason) or not self._options.reconnect:
            self._keeper.gave_up(reason)
        else:
            self._persist()

    def _persist(self) -> None:
        """Walk over the servers until one is there; waits between walks, exponentially longer.

        The first walk is made at once; but not if link after link was lost right away, or a server that greets and
        hangs up would be dialed without a pause.
        """
        fruitless = 0
        while self._keeper.wants_link():
            pauses = 0 if self._hurry else fruitless or max(0, self._flaps - 1)
            self._hurry = False
            if pauses and not self._chores(Deadline.after(self._servers.backoff(pauses))):
                self._tasks.put(None)  # the end was for the loop around this one
                return
            causes = self._walk()
            if causes is None:
                return
            fruitless += 1
            final = [error for server, error in causes.items() if self._refused_again(server, error)]
            if final:
                self._keeper.gave_up(final[0])
            elif 0 <= self._options.max_reconnects <= fruitless:
                self._keeper.gave_up(no_servers(causes))

    def _walk(self) -> Causes | None:
        """Try each server once; None once there is a link or none is wanted, else what each one failed with."""
        causes: Causes = {}
        for server in self._servers:
            if not self._keeper.wants_link():
                return None
            try:
                if self._keeper.on_link(*dial(server, self._options, self._dialing)):
                    self._linked()
                return None
            except Exception as error:
                causes[server] = self._failed(server, error)
        return causes

    def _failed(self, server: Server, error: Exception) -> NatsError:
        """A server could not be dialed: it comes last from now on. Returns the error to tell."""
        fault = None if isinstance(error, NatsError) else error
        told = error if isinstance(error, NatsError) else ConnectError(f"{server}: {error!r}")

        def say() -> None:
            with contextlib.suppress(Exception):  # of a handler of the user's: no reason to lose this thread
                if fault is not None:
                    log.error("%s: dialing %s failed", self._name, server, exc_info=fault)
                log.info("%s: %s", self._name, told)

        if self._unsaid is None:
            say()
        else:
            self._unsaid.append(say)
        self._servers.failed(server)
        return told

    def _linked(self) -> None:
        self._refusals.clear()
        self._linked_at = time.monotonic()
        self._lame, self._moves = None, 0

    def _move(self, lame: Session, failed: Server | None = None) -> None:
        """Leave a lame server for another one. Chores that come meanwhile may ask for the same: one loop does it."""
        if lame is not self._lame:
            self._lame, self._moves = lame, 0
        for server in (failed, lame.server):
            if server is not None:
                self._servers.failed(server)
        if not self._moving:
            self._moving = True
            try:
                self._leave_lame()
            finally:
                self._moving = False

    def _leave_lame(self) -> None:
        """Try the other servers until one takes over or the lame one is gone; one walk, then a pause, and so on."""
        while (lame := self._lame) is not None and self._keeper.wants_move(lame):
            others = [server for server in self._servers if server != lame.server]
            if not others:
                return  # _discover() comes back to it
            if self._moves and not self._chores(Deadline.after(self._servers.backoff(self._moves))):
                self._tasks.put(None)  # the end was for the loop around this one
                return
            self._moves += 1
            if self._try_others(lame, others):
                return

    def _try_others(self, lame: Session, others: list[Server]) -> bool:
        for server in others:
            if not self._keeper.wants_move(lame):
                break
            try:
                if self._keeper.on_other_link(lame, *dial(server, self._options, self._dialing)):
                    return True
            except Exception as error:
                self._failed(server, error)
        return False

    def _discover(self, urls: list[str], through: Server) -> None:
        new = self._servers.discovered(urls, through)
        for server in new:
            log.debug("%s: discovered %s", self._name, server)
        if new and self._lame is not None:
            self._move(self._lame)

    def _refused_again(self, server: Server, error: Exception) -> bool:
        """Whether this server has now refused us twice with the same words: that will not change."""
        if not isinstance(error, AuthorizationError | Misconfigured):
            return False
        before, self._refusals[server] = self._refusals.get(server), str(error)
        return before == str(error)
