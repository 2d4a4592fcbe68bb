"""Store: who has which connection of a pool, and who waits for one; nothing here dials, closes or waits for long.

A Ctrl-C may come at any moment, in the clean-up too. CPython looks for signals at calls, at the beginning of a function
and when a loop starts over, not between plain statements. So what belongs together is changed by statements without a
call, and a caller whose leaving was cut short is left to the next one who uses the pool, or waits for it.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from types import FrameType

from natsync.client import Client
from natsync.concurrency import Deadline, SafeCondition, Signal, fork_generation, warn_soon
from natsync.connection import Connection
from natsync.errors import PoolClosed

log = logging.getLogger("natsync.pool")

#: Seconds after which one who waits looks for himself: an interrupt may have kept others from telling him.
LOOK_SECONDS = 1.0
#: Frames that are kept of a borrower's stack, where they are.
STACK_FRAMES = 16


class Member:
    """One connection of the pool, idle or lent.

    Attributes:
        client: while it is idle. Meanwhile its borrower alone holds it, so that one who drops it is found out.
        core: the connection behind it.
        usable: it has a link. What has none is not lent.
        expires_at: the time.monotonic() from which on it is not lent any more.
        idle_since: when it came back.
        lease: who has it.
    """

    __slots__ = ("__weakref__", "client", "core", "expires_at", "idle_since", "lease", "ref", "usable")

    def __init__(
        self, client: Client, core: Connection, expires_at: float, dropped: Callable[[Member], object]
    ) -> None:
        self.client: Client | None = client
        self.core = core
        self.usable = True
        self.expires_at = expires_at
        self.idle_since = time.monotonic()
        self.lease: Turn | None = None
        self.ref = weakref.ref(client, lambda _: dropped(self))


class Turn:
    """A caller in the queue, then the holder of what it was granted.

    Attributes:
        member: what it was granted, until it is given back.
        client: the same, unless the borrower alone holds it: one who drops it instead of giving it back is found out.
        failure: makes the error that ends the waiting, one for each who waits.
        lasting: it may hold its connection for as long as it likes: a stream.
        taken: its connection was taken from it.
    """

    # Values of the class, not set for each: most turns are granted and over within microseconds.
    client: Client | None = None
    member: Member | None = None
    signal: Signal | None = None
    failure: Callable[[], Exception] | None = None
    lasting = False
    taken = False
    stack: traceback.StackSummary | None = None

    def __init__(self, store: Store) -> None:
        self.store = store
        self.generation = fork_generation()
        self.thread = threading.get_ident()
        self.since = time.monotonic()
        if store.debug:
            self.stack = _stack()

    @property
    def waits(self) -> bool:
        return self.client is None and self.failure is None

    def borrower(self) -> str:
        """Who it is, in words: the thread, and where it borrowed if that was kept."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stack = "" if self.stack is None else ", borrowed at\n" + "".join(self.stack.format())
        return f"thread {names.get(self.thread, f'{self.thread}, which has ended')!r}{stack}"


def _stack() -> traceback.StackSummary:
    """Where the caller is in the user's code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(("natsync.pool", "contextlib")):
        frame = frame.f_back
    walk = traceback.walk_stack(frame)
    stack = traceback.StackSummary.extract(walk, limit=STACK_FRAMES, lookup_lines=False)
    stack.reverse()
    return stack


class Store:
    """The connections of a pool, in one process.

    Attributes:
        debug: keep of each borrower where it borrowed.
        cut_short: callers whose leaving an interrupt may have cut short: somebody else will see to it.
    """

    def __init__(self, max_size: int) -> None:
        self.debug = log.isEnabledFor(logging.DEBUG)
        self.lock = threading.Lock()
        self.changed = SafeCondition(self.lock)
        self.max_size = max_size
        self.closed = False
        self.idle: list[Member] = []  # the one that came back last is lent first: the others may grow old
        self.leased: dict[Turn, None] = {}
        self.turns: deque[Turn] = deque()
        self.dialing = 0
        self.numbers = {
            "leases": 0, "waits": 0, "timeouts": 0, "leaks": 0, "wait_seconds": 0.0, "longest_wait_seconds": 0.0,
        }  # fmt: skip
        self.cut_short: deque[Turn] = deque()
        self._dropped: deque[Member] = deque()  # lent, and collected by nobody's doing but the garbage collector's
        self._trash: list[Member] = []  # to be closed by whoever passes next, without the lock

    @property
    def size(self) -> int:
        return len(self.idle) + len(self.leased)

    def dropped(self, member: Member) -> None:
        """Its client was collected. Safe in a finalizer: somebody else looks into it."""
        self._dropped.append(member)

    # -- borrowing -------------------------------------------------------------------------------------------------

    def borrow(self, turn: Turn) -> None:
        """Grant the turn a connection, or put it into the queue.

        Raises:
            PoolClosed: there is nothing to wait for.
        """
        with self.lock:
            if self.idle and not self.turns and self.idle[-1].usable and not self.cut_short:
                # No call from here on, see above: a turn is granted whole or not at all.
                member = self.idle[-1]
                turn.member = member
                turn.client = member.client
                member.client = None
                member.lease = turn
                self.leased[turn] = None
                del self.idle[-1]
                self.numbers["leases"] += 1
                return
        turn.signal = Signal()
        with self.lock:
            self._tidy_locked()
            if self.closed:
                raise PoolClosed("the pool is closed")
            self.turns.append(turn)
            self.numbers["waits"] += 1
            self._serve_locked()

    def sweep(self) -> None:
        """Do what interrupts, and borrowers who forgot, have left undone."""
        with self.lock:
            self._tidy_locked()
            self._serve_locked()

    def timed_out(self, turn: Turn) -> tuple[int, int] | None:
        """Count the timeout, and tell how many are lent and wait; None if it has been granted at the last moment."""
        with self.lock:
            if not turn.waits:
                return None
            self.numbers["timeouts"] += 1
            return len(self.leased), len(self.turns)

    def waited(self, turn: Turn, seconds: float) -> None:
        """For the statistics: so long it took until the turn was granted, or given up."""
        with self.lock:
            self.numbers["wait_seconds"] += seconds
            self.numbers["longest_wait_seconds"] = max(seconds, self.numbers["longest_wait_seconds"])
            turn.since = time.monotonic()

    def _serve_locked(self) -> None:
        """Grant turns, in order, as long as there is something to grant."""
        while self.turns and self.idle:
            turn, member = self.turns[0], self.idle[-1]
            if not member.usable:
                self._trash += [member]
                del self.idle[-1]
                continue
            now = time.monotonic()
            # No call from here to the signal, see above.
            turn.since = now  # from here on it is lent: the borrower's thread may be late
            turn.member = member
            turn.client = member.client
            member.client = None
            member.lease = turn
            self.leased[turn] = None
            del self.idle[-1]
            del self.turns[0]
            self.numbers["leases"] += 1
            if turn.signal is not None:
                turn.signal.set()

    # -- giving back -----------------------------------------------------------------------------------------------

    def leave(self, turn: Turn) -> Client | None:
        """The caller goes away: its place in the queue, or what it was granted, is free. Idempotent.

        Returns a client that is not fit to be lent again: it is the caller's to close. Of a turn whose client the user
        holds, turn.client is set to it before. After a Ctrl-C in here the caller adds the turn to cut_short.
        """
        if turn.generation != fork_generation():
            return None  # a forked child leaves a block that its parent entered: nothing here is the child's
        with self.lock:
            unfit = self._free_locked(turn)
            if unfit is not None or self.turns or self.cut_short or self._dropped or self.closed:
                self._tidy_locked()
                self._serve_locked()
                self.changed.notify_all()
            return unfit

    def _free_locked(self, turn: Turn) -> Client | None:
        member, client = turn.member, turn.client
        if member is None:
            if turn.signal is not None and turn in self.turns:
                self.turns.remove(turn)
            return None
        now = time.monotonic()
        keep = client is not None and member.usable and not self.closed and now < member.expires_at
        # No call from here on, see above.
        turn.member = turn.client = member.lease = None
        if turn in self.leased:
            del self.leased[turn]
            if keep:
                member.client = client
                member.idle_since = now
                self.idle += [member]
                return None
        return client

    def _tidy_locked(self) -> None:
        while self.cut_short:
            unfit = self._free_locked(self.cut_short[0])
            self.cut_short.popleft()
            del unfit  # what is dropped closes itself
        while self._dropped:
            member = self._dropped[0]
            turn = member.lease
            if turn is not None and turn in self.leased:
                member.lease = None
                del self.leased[turn]
                self.numbers["leaks"] += 1
                warn_soon(log, "a connection was dropped instead of given back, by %s", turn.borrower())
            self._dropped.popleft()

    def add(self, member: Member) -> None:
        """A new connection, whose place was counted in `dialing`."""
        with self.lock:
            # No call here, see above.
            self.dialing -= 1
            closed = self.closed
            if not closed:
                self.idle += [member]
            self._serve_locked()
            self.changed.notify_all()
        if closed and member.client is not None:
            member.client.close(0)

    def fail(self, failure: Callable[[], Exception]) -> None:
        """What those who wait are waiting for will not come."""
        with self.lock:
            while self.turns:
                self.turns[0].failure = failure
                turn = self.turns.popleft()
                if turn.signal is not None:
                    turn.signal.set()

    # -- taking out ------------------------------------------------------------------------------------------------

    def trash(self) -> list[Client]:
        """What has been taken out because it had no link; the caller's to close."""
        with self.lock:
            self._tidy_locked()
            found, self._trash = self._trash, []
        return [member.client for member in found if member.client is not None]

    def take_idle(self, unfit: Callable[[Member], bool]) -> list[Client]:
        """Take out the idle connections of which unfit(member) is true; the caller's to close."""
        with self.lock:
            found = [member for member in self.idle if unfit(member)]
            self.idle = [member for member in self.idle if member not in found]
            self.changed.notify_all()
        return [member.client for member in found if member.client is not None]

    def take_leased(self, overdue: Callable[[Turn], bool]) -> list[tuple[Turn, Client]]:
        """Take connections from those of their holders of whom overdue(turn) is true; the caller's to close."""
        with self.lock:
            found = []
            for turn in [turn for turn in self.leased if overdue(turn)]:
                member = turn.member
                client = turn.client or (member.ref() if member is not None else None)
                turn.taken = True
                del self.leased[turn]
                if client is not None:
                    found.append((turn, client))
            self.changed.notify_all()
        return found

    def lend_idle(self, member: Member, turn: Turn) -> bool:
        """Grant the turn just this connection, if it is idle."""
        with self.lock:
            if member not in self.idle or member.client is None:
                return False
            self.idle.remove(member)
            turn.member, turn.client, member.client, member.lease = member, member.client, None, turn
            self.leased[turn] = None
            return True

    def close(self) -> list[Client]:
        """Nothing is lent any more, and who waits learns of it; returns what is idle, for the caller to close."""
        self.closed = True
        self.fail(lambda: PoolClosed("the pool is closed"))
        return [*self.take_idle(lambda member: True), *self.trash()]

    def wait_returned(self, deadline: Deadline) -> None:
        """Block until nothing is lent, up to the deadline."""
        with self.lock:
            while not deadline.expired:
                self._tidy_locked()  # what was dropped, or cut short, meanwhile: that tells nobody
                if not self.leased:
                    return
                self.changed.wait(deadline.or_sooner(LOOK_SECONDS).remaining())
