"""Keeper: makes a pool's connections, one at a time and in the background, and sorts out those that grow old or break.

Whoever wants a connection only says so. At most one is being made, whatever the number of callers; after a failure the
next try waits, longer each time. What the store hands out is closed here, never under its lock.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
import weakref
from collections import Counter
from collections.abc import Callable

from natsync.client import Client
from natsync.concurrency import fork_generation, run_soon, run_waiting
from natsync.errors import AuthorizationError, InvalidArgument, NoServersError
from natsync.mux import LinkLoss, Waiter
from natsync.options import ConnectOptions, Server
from natsync.pooling.health import Health
from natsync.pooling.store import Member, Store, Turn
from natsync.timers import Alarm

log = logging.getLogger("natsync.pool")

#: Seconds between the first failed dial and the next, and at most; the growth is two. A broker that is back is found
#: within the longest wait.
FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 1.0
#: A lifetime is shortened by up to this part of it, so that connections made together do not end together.
LIFETIME_JITTER = 0.1


class Watch(Waiter):
    """Hears of a member's link, whose threads hold it: so it holds the pool weakly, which is collected when dropped."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = weakref.ref(keeper)
        self._alarms = keeper.alarms
        self._server = ""
        self._member: Callable[[], Member | None] = lambda: None

    def link_made(self) -> None:
        keeper, member = self._keeper(), self._member()
        if member is not None:
            member.usable = member.core.linked  # it may be lost again already, and that have been told
            self._server = str(member.core.server)
            if keeper is not None:
                keeper.health.succeeded(self._server)

    def link_lost(self, loss: LinkLoss) -> None:
        self._gone(failed=True)

    def connection_closed(self, reason: Exception) -> None:
        self._gone(failed=False)

    def _gone(self, failed: bool) -> None:
        keeper, member = self._keeper(), self._member()
        if member is not None:
            member.usable = False
        if keeper is None:  # the pool was dropped
            for alarm in self._alarms:
                alarm.clear()
        elif member is not None:
            if failed:
                keeper.numbers["lost"] += 1
                keeper.health.failed(self._server)
            run_soon(keeper.sort_out, "sorting out the connections of a pool")

    def begin(self, member: Member) -> None:
        self._member = weakref.ref(member)
        self._server = str(member.core.server)


class Keeper:
    """Keeps a store filled: from min_size connections, once used, to max_size while callers wait.

    Attributes:
        store, health: see there.
        numbers: dials, dials_failed, lost links, and connections that were retired (for their age) and shrunk.
        failure: why the last dial failed; None when the last one worked.
    """

    def __init__(
        self,
        servers: list[Server],
        options: ConnectOptions,
        *,
        min_size: int,
        max_size: int,
        max_lifetime: float | None,
        max_idle: float | None,
        leak_timeout: float | None,
    ) -> None:
        self.store = Store(max_size)
        self.health = Health(servers)
        self.numbers = {"dials": 0, "dials_failed": 0, "dial_seconds": 0.0, "lost": 0, "retired": 0, "shrunk": 0}
        self.failure: Exception | None = None
        self.refused: Callable[[], Exception] | None = None  # as failure: what another try will not change
        self._shuffle = options.randomize
        # A client takes the servers in the order of their health, and one that is not connected is of no use here.
        self._options = dataclasses.replace(options, randomize=False, retry_on_failed_connect=False)
        self._min_size = min_size
        self._max_lifetime = max_lifetime
        self._max_idle = max_idle
        self._leak_timeout = leak_timeout
        self._generation = fork_generation()
        self._started = False
        self._asked = False  # a thread is on its way to grow()
        self._failures = 0
        self._not_before = 0.0
        self._dialing: Client | None = None
        self._wake = Alarm(_weakly(self, Keeper._grow_soon))
        self._housekeeping = Alarm(_weakly(self, Keeper._sort_out_soon))
        self.alarms = (self._wake, self._housekeeping)

    # -- growing -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """The pool is used: from now on there are to be min_size connections."""
        self._started = True
        self.want()

    def want(self) -> None:
        """Have a connection made, if one is wanted and may be."""
        if self._asked:
            run_waiting()  # no thread could be started for that, perhaps
        if self._asked or not self._wanted():
            return
        if time.monotonic() < self._not_before:
            self._wake.set_by(self._not_before)
        else:
            self._grow_soon()

    def _wanted(self) -> bool:
        store = self.store
        size = store.size + store.dialing
        needed = bool(store.turns) or (self._started and size < self._min_size)
        return needed and not store.dialing and size < store.max_size and not store.closed

    def _grow_soon(self) -> None:
        self._asked = True
        try:
            run_soon(self._grow, "making connections for a pool")
        except BaseException:  # a Ctrl-C
            self._asked = False
            raise

    def _grow(self) -> None:
        """Make connections, one after the other, while they are wanted; on a thread of its own."""
        self._asked = False
        while self._generation == fork_generation():
            with self.store.lock:
                if not self._wanted():
                    return
                if time.monotonic() < self._not_before:
                    break
                self.store.dialing += 1
            self._dial()
        self.want()

    def _dial(self) -> None:
        """Make the connection whose place is counted already."""
        begin, client = time.monotonic(), None
        try:
            servers = self.health.order(self._connections(), shuffle=self._shuffle)
            client = self._dialing = Client.of(servers, self._options)
            watch = Watch(self)
            core = client.watched(watch)
            client.open()
        except BaseException as error:
            self._dialing = None
            if client is not None:
                client.close(0)
            self._failed(error)
            return
        self._dialing = None
        self._failures, self.failure, self.refused = 0, None, None
        self.numbers["dials"] += 1
        self.numbers["dial_seconds"] += time.monotonic() - begin
        life = float("inf")
        if self._max_lifetime is not None:
            life = self._max_lifetime * (1 - LIFETIME_JITTER * random.random())
        member = Member(client, core, time.monotonic() + life, self.store.dropped)
        watch.begin(member)
        member.usable = core.linked
        self.health.succeeded(str(core.server))
        self.store.add(member)
        self._set_alarm()

    def _failed(self, error: BaseException) -> None:
        with self.store.lock:
            self.store.dialing -= 1
        if self.store.closed:
            return
        self.numbers["dials_failed"] += 1
        for server in error.causes if isinstance(error, NoServersError) else ():
            self.health.failed(server)
        self.failure = error if isinstance(error, Exception) else None
        wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0**self._failures)
        self._failures = min(self._failures + 1, 30)
        self._not_before = time.monotonic() + wait * random.uniform(0.5, 1.0)
        level = logging.WARNING if self._failures == 1 else logging.DEBUG  # the first of a series
        log.log(level, "a connection for the pool could not be made: %s", error)
        if isinstance(error, AuthorizationError | InvalidArgument):
            self.refused = _again(error)
            self.store.fail(self.refused)
        with self.store.lock:
            self.store.changed.notify_all()

    def _connections(self) -> Counter[str]:
        """How many connections of the pool each server has."""
        store = self.store
        with store.lock:
            members = [*store.idle, *(turn.member for turn in store.leased)]
        return Counter(str(member.core.server) for member in members if member is not None)

    def servers(self) -> dict[str, dict[str, float]]:
        """Of each server: its points (0 = healthy, 100 = worst), and how many connections of the pool it has."""
        connections = self._connections()
        return {
            server: {"health_points": round(points, 1), "connections": connections[server]}
            for server, points in self.health.points().items()
        }

    # -- housekeeping --------------------------------------------------------------------------------------------------

    def _sort_out_soon(self) -> None:
        run_soon(self.sort_out, "sorting out the connections of a pool")

    def sort_out(self) -> None:
        """Close what has no link, is too old, or has not been wanted for long; take back what was never given back."""
        if self._generation != fork_generation() or self.store.closed:
            return
        now = time.monotonic()
        gone = [*self.store.trash(), *self.store.take_idle(lambda member: not member.usable)]
        retired = self.store.take_idle(lambda member: member.expires_at <= now)
        surplus = self._surplus(now)
        self.numbers["retired"] += len(retired)
        self.numbers["shrunk"] += len(surplus)
        for client in (*gone, *retired, *surplus):
            client.close()
        for turn, client in self._leaked(now):
            held = now - turn.since
            log.warning("a connection was not given back for %.0f s, and is closed; lent to %s", held, turn.borrower())
            self.store.numbers["leaks"] += 1
            client.close(0)
        self.want()
        self._set_alarm()

    def _surplus(self, now: float) -> list[Client]:
        """Those beyond min_size that have been idle for max_idle, the oldest first."""
        if self._max_idle is None:
            return []
        spare = self.store.size - self._min_size
        old = [member for member in list(self.store.idle) if now - member.idle_since >= self._max_idle]
        chosen = set(old[: max(0, spare)])
        return self.store.take_idle(lambda member: member in chosen)

    def _leaked(self, now: float) -> list[tuple[Turn, Client]]:
        limit = self._leak_timeout
        if limit is None:
            return []
        return self.store.take_leased(lambda turn: not turn.lasting and now - turn.since >= limit)

    def _set_alarm(self) -> None:
        """Wake when the next connection may be due: nothing that happens in between can be due earlier than that."""
        now = time.monotonic()
        due = [now + seconds for seconds in (self._max_idle, self._leak_timeout) if seconds]
        with self.store.lock:
            if self.store.closed or not self.store.size:
                return
            due += [member.expires_at for member in self.store.idle]
            if self._max_idle is not None and self.store.size > self._min_size:
                due += [member.idle_since + self._max_idle for member in self.store.idle]
            if self._leak_timeout is not None:
                due += [turn.since + self._leak_timeout for turn in self.store.leased if not turn.lasting]
        first = min(due, default=float("inf"))
        if first != float("inf"):
            self._housekeeping.set_by(max(first, now + 0.01))

    def stop(self) -> None:
        """Make no more connections; one that is being made is given up."""
        for alarm in self.alarms:
            alarm.clear()
        dialing = self._dialing
        if dialing is not None:
            dialing.close(0)


def _weakly(keeper: Keeper, method: Callable[[Keeper], None]) -> Callable[[], None]:
    """A callback for the timer, which must not keep a pool alive that nobody uses any more."""
    reference = weakref.ref(keeper)

    def call() -> None:
        found = reference()
        if found is not None:
            method(found)

    return call


def _again(error: Exception) -> Callable[[], Exception]:
    """Makes the error anew for each who gets it: a traceback belongs to one thread."""
    if isinstance(error, NoServersError):
        causes = error.causes
        return lambda: type(error)(causes)
    return lambda: type(error)(str(error))
