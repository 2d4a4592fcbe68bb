"""ConnectionPool: a bounded number of clients, lent out one holder at a time.

Most programs want one Client: it serves any number of threads. A pool is for callers who want connections of their own:
isolation of a slow consumer from the rest, or more than one socket's throughput. Connections are made when needed, one
waiter after the other, and dialed outside the lock.

A Ctrl-C may come at any moment, in the pool's own clean-up too. CPython looks for signals at calls, at the beginning of
a function and when a loop starts over, not between plain statements. So what belongs together is changed by statements
without a call, and a caller whose leaving was cut short is left to the next one who uses the pool, or waits for it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from natsync.client import REQUEST_SECONDS, Client
from natsync.concurrency import Deadline, Signal, after_fork_in_child, check_timeout, fork_generation, run_soon
from natsync.context import current
from natsync.errors import ForkError, InvalidArgument, PoolClosed, PoolTimeout, TimedOut
from natsync.message import Message, Payload
from natsync.options import Servers, connect_settings
from natsync.streaming.stream import Stream

#: Connections that wait() makes. Default of the Go system (MinIdlePerServer).
MIN_SIZE = 4
#: Connections at most. Default of the Go system (MaxConnections).
MAX_SIZE = 128
#: Seconds to wait for a free connection. Default of the Go system (AcquireTimeout).
TIMEOUT = 15.0
#: Seconds after which one who waits looks for himself: an interrupt may have kept others from telling him.
LOOK_SECONDS = 1.0


class _Turn:
    """A caller, and what it was granted: a client, the right to dial one, or nothing (any more)."""

    def __init__(self) -> None:
        self.generation = fork_generation()
        self.signal = Signal()
        self.client: Client | None = None
        self.may_dial = False


class ConnectionPool:
    """Connections lent to one holder at a time: `with pool.connection() as client: ...`.

    Opens nothing until the first use. Waiting callers are served in the order in which they came. A connection that
    was closed while it was lent is replaced. Safe from any thread.

    Args:
        servers: as for Client.
        min_size: connections that wait() makes.
        max_size: connections at most.
        timeout: seconds to wait for a free one; None = no limit.
        options: those of ConnectOptions.
    """

    def __init__(
        self,
        servers: Servers = None,
        *,
        min_size: int = MIN_SIZE,
        max_size: int = MAX_SIZE,
        timeout: float | None = TIMEOUT,
        **options: Any,
    ) -> None:
        for name, value, least in (("max_size", max_size, 1), ("min_size", min_size, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidArgument(f"{name}={value!r}: a whole number from {least} up")
        self._min_size = min(min_size, max_size)
        connect_settings(servers, options)
        self._servers = servers
        self._options = options
        self._max_size = max_size
        self._timeout = check_timeout(timeout)
        self._lent_by_parent: weakref.WeakSet[Client] = weakref.WeakSet()
        self._forget_all()
        self._closed = False
        _pools.add(self)

    def _forget_all(self) -> None:
        self._lock = threading.Lock()
        self._returned = threading.Condition(self._lock)
        self._idle: list[Client] = []
        self._leased: dict[Client, None] = {}
        self._overdue: weakref.WeakSet[Client] = weakref.WeakSet()  # taken from their holders by close()
        self._dialing = 0
        self._turns: deque[_Turn] = deque()
        self._cut_short: deque[_Turn] = deque()  # callers whose leaving an interrupt may have cut short
        self._numbers = {"leases": 0, "dials": 0, "dials_failed": 0, "timeouts": 0}

    # -- lending ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def connection(self, timeout: float | None = None) -> Iterator[Client]:
        """A client for the block's duration.

        Blocks up to timeout seconds (None = the pool's own timeout) for a free one, dialing included.

        Raises:
            PoolTimeout: none became free in time; the text says how many are lent, and how many wait.
            PoolClosed: the pool was closed.
            NoServersError: a new connection was due and could not be made.
        """
        turn = _Turn()
        try:
            yield self._borrow(turn, timeout)
        finally:
            self._leave(turn)

    def getconn(self, timeout: float | None = None) -> Client:
        """Borrow a client; give it back with putconn(). Blocks and raises as connection() does."""
        turn = _Turn()
        try:
            return self._borrow(turn, timeout)
        except BaseException:  # a Ctrl-C included: whatever was granted goes to the next
            self._leave(turn)
            raise

    def _borrow(self, turn: _Turn, timeout: float | None) -> Client:
        """Wait for the turn; whatever happens, the caller has to _leave() it."""
        limit = self._timeout if timeout is None else check_timeout(timeout)
        deadline = Deadline.after(limit)
        self._queue(turn)
        while turn.client is None and not turn.may_dial and not self._closed:
            if not turn.signal.wait(deadline.or_sooner(LOOK_SECONDS)):
                self._look(turn, deadline, limit)
        if turn.may_dial:
            self._dial(turn, deadline, limit)
        if turn.client is None:
            raise PoolClosed("the pool is closed")
        return turn.client

    def putconn(self, client: Client) -> None:
        """Give a borrowed client back; one that is closed by now is dropped and its place becomes free.

        Raises:
            InvalidArgument: it is not lent by this pool, or was given back before.
            ForkError: it was borrowed in the parent process.
        """
        turn = _Turn()
        try:
            with self._lock:
                turn.client = client if client in self._leased else None
            if turn.client is None and client in self._lent_by_parent:
                raise ForkError("this connection was borrowed in the parent process")
            if turn.client is None and client not in self._overdue:  # those close() took from their holders
                raise InvalidArgument("this client is not on loan from this pool")
        finally:
            self._leave(turn)

    def _queue(self, turn: _Turn) -> None:
        with self._lock:
            self._finish_leaving_locked()
            if self._closed:
                raise PoolClosed("the pool is closed")
            self._turns.append(turn)
            self._serve_locked()

    def _serve_locked(self) -> None:
        """Grant turns, in order, as long as there is something to grant."""
        while self._turns:
            while self._idle and self._idle[-1].status == "closed":
                self._idle.pop()
            turn = self._turns[0]
            room = len(self._leased) + self._dialing < self._max_size
            # No call from here to the signal, see above: a turn is granted whole or not at all.
            if self._idle:
                turn.client = self._idle[-1]
                self._leased[turn.client] = None
                del self._idle[-1]
            elif room:
                turn.may_dial = True
                self._dialing += 1
            else:
                return
            del self._turns[0]
            self._numbers["leases"] += 1
            turn.signal.set()

    def _look(self, turn: _Turn, deadline: Deadline, limit: float | None) -> None:
        """Nobody has told the caller anything for a while; what was granted at the last moment still counts."""
        with self._lock:
            self._finish_leaving_locked()
            self._serve_locked()
            if turn.client is None and not turn.may_dial and not self._closed and deadline.expired:
                self._numbers["timeouts"] += 1
                lent, waiting = len(self._leased) + self._dialing, len(self._turns)
                raise PoolTimeout(
                    f"no connection free after {limit} s ({lent} of {self._max_size} leased, {waiting} waiting); "
                    f"raise max_size or timeout"
                )

    def _leave(self, turn: _Turn) -> None:
        """The caller goes away: its place in the queue, or what it was granted, is free. Idempotent."""
        try:
            self._let_go(turn)
        except BaseException:  # a Ctrl-C in there: somebody else will do it
            self._cut_short.append(turn)  # a call into C: done before the next signal is looked for
            raise

    def _let_go(self, turn: _Turn) -> None:
        if turn.generation != fork_generation():
            return  # a forked child leaves a block that its parent entered: nothing here is the child's
        client = turn.client
        with self._lock:
            kept = self._free_locked(turn)
            self._finish_leaving_locked()
            self._serve_locked()
            self._returned.notify_all()
        if client is not None and not kept:
            client.close()

    def _free_locked(self, turn: _Turn) -> bool:
        """Take back what the turn holds; whether the client, if there is one, stays in the pool. Requires _lock."""
        if turn in self._turns:
            self._turns.remove(turn)
        client = turn.client
        lent = client is not None and client in self._leased
        keep = client is not None and lent and not self._closed and client.status != "closed"
        # No call from here on, see above.
        turn.client = None
        if turn.may_dial:
            turn.may_dial = False
            self._dialing -= 1
        if client is not None and lent:
            del self._leased[client]
            if keep:
                self._idle += [client]
        return keep or not lent

    def _finish_leaving_locked(self) -> None:
        """Do what interrupts have kept others from doing. Requires _lock."""
        while self._cut_short:
            self._free_locked(self._cut_short[0])
            self._cut_short.popleft()

    def _dial(self, turn: _Turn, deadline: Deadline, limit: float | None) -> None:
        """Make the connection that the turn may make; the lock is not held meanwhile."""
        client = Client(self._servers, **self._options)
        try:
            client.open(deadline.remaining())
        except BaseException as error:
            client.close(0)
            with self._lock:
                self._numbers["dials_failed"] += 1
            if type(error) is TimedOut:
                raise PoolTimeout(f"a new connection was not made within {limit} s") from error
            raise
        with self._lock:
            # No call here, see above.
            closed = self._closed
            self._numbers["dials"] += 1
            self._dialing -= 1
            turn.may_dial = False
            if not closed:
                self._leased[client] = None
                turn.client = client
        if closed:
            client.close()

    # -- the client's verbs --------------------------------------------------------------------------------------

    def publish(self, subject: str, payload: Payload = b"", **arguments: Any) -> None:
        """Client.publish() on a borrowed connection."""
        with self.connection() as client:
            client.publish(subject, payload, **arguments)

    def request(self, subject: str, payload: Payload = b"", **arguments: Any) -> Message:
        """Client.request() on a borrowed connection, which is held until the reply is there."""
        with self._within({"timeout": REQUEST_SECONDS, **arguments}) as (client, rest):
            return client.request(subject, payload, **rest)

    def stream(self, subject: str, payload: Payload = b"", **arguments: Any) -> Stream:
        """Client.stream() on a borrowed connection, which is held until the stream is over."""
        turn = _Turn()
        try:
            client, rest = self._borrow_within(turn, arguments)
            stream = client.stream(subject, payload, **rest)
            stream.when_finished(lambda: self._leave_soon(turn))
        except BaseException:
            self._leave(turn)
            raise
        return stream

    def _leave_soon(self, turn: _Turn) -> None:
        """Leave from whichever thread ended a stream: closing is for one that may block."""
        client = turn.client
        if client is not None and (client.status == "closed" or self._closed):
            run_soon(lambda: self._leave(turn), "giving a connection back")
        else:
            self._leave(turn)

    def stream_request(
        self, subject: str, payload: Payload, processor: Callable[[Message], object], **arguments: Any
    ) -> None:
        """Client.stream_request() on a borrowed connection, which is held until it returns."""
        with self._within(arguments) as (client, rest):
            client.stream_request(subject, payload, processor, **rest)

    @contextlib.contextmanager
    def _within(self, arguments: dict[str, Any]) -> Iterator[tuple[Client, dict[str, Any]]]:
        turn = _Turn()
        try:
            yield self._borrow_within(turn, arguments)
        finally:
            self._leave(turn)

    def _borrow_within(self, turn: _Turn, arguments: dict[str, Any]) -> tuple[Client, dict[str, Any]]:
        """A client within the verb's own timeout and ctx, and the arguments with the time that is left."""
        ctx = arguments.get("ctx") or current()
        own = Deadline.after(check_timeout(arguments.get("timeout")))
        limit = (own if ctx is None else own.or_sooner(ctx.remaining())).or_sooner(self._timeout)
        client = self._borrow(turn, limit.remaining())
        return client, arguments if own.at is None else {**arguments, "timeout": own.remaining()}

    def wait(self, timeout: float | None = None) -> None:
        """Make connections until there are min_size, so that the first callers need not wait for dialing.

        Blocks up to timeout seconds (None = the pool's own timeout). Raises as connection() does.
        """
        limit = self._timeout if timeout is None else check_timeout(timeout)
        deadline = Deadline.after(limit)
        with self._lock:
            wanted = self._min_size - len(self._leased)
        turns = [_Turn() for _ in range(wanted)]
        try:
            for turn in turns:
                self._borrow(turn, deadline.remaining())
        finally:
            with contextlib.ExitStack() as leaving:  # each of them, although an interrupt may fall on one
                for turn in turns:
                    leaving.callback(self._leave, turn)

    # -- life ------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """size, idle, leased, waiting now; leases, dials, dials_failed, timeouts so far."""
        fork_generation()  # finds out about a fork that Python was not told of
        with self._lock:
            self._finish_leaving_locked()
            return {
                "size": len(self._idle) + len(self._leased),
                "idle": len(self._idle),
                "leased": len(self._leased),
                "waiting": len(self._turns),
                **self._numbers,
            }

    def close(self, timeout: float | None = 5.0) -> None:
        """Turn away who waits, close what is idle; what is lent is closed when it comes back, or at the deadline.

        Blocks up to timeout seconds. Idempotent.
        """
        deadline = Deadline.after(check_timeout(timeout))
        fork_generation()
        with self._lock:
            self._finish_leaving_locked()
            self._closed = True
            idle, self._idle = self._idle, []
            turns = list(self._turns)
            self._turns.clear()
        for turn in turns:
            turn.signal.set()
        for client in idle:
            client.close(deadline.remaining())
        with self._lock:
            while self._leased and not deadline.expired:
                self._returned.wait(deadline.remaining())
            overdue, self._leased = self._leased, {}
            self._overdue.update(overdue)
            self._returned.notify_all()
        for client in overdue:
            client.close()

    def __enter__(self) -> ConnectionPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ConnectionPool {self.stats()}>"


_pools: weakref.WeakSet[ConnectionPool] = weakref.WeakSet()


def _forget_in_child() -> None:
    """In a forked child: connections, borrowers and their locks are the parent's."""
    for pool in list(_pools):
        pool._lent_by_parent.update(pool._leased)
        pool._forget_all()


after_fork_in_child(_forget_in_child)
