"""ConnectionPool: a bounded number of clients, lent out one holder at a time.

Most programs want one Client: it serves any number of threads. A pool is for callers who want connections of their own:
isolation of a slow consumer from the rest, or more than one socket's throughput (docs/pool.md).
"""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from natsync.client import REQUEST_SECONDS, STREAM_WINDOW, Client
from natsync.concurrency import Deadline, after_fork_in_child, at_home, check_timeout, fork_generation, run_soon
from natsync.context import Context, current
from natsync.errors import (
    DeadlineExceeded,
    ForkError,
    InvalidArgument,
    NatsError,
    NoServersError,
    PoolClosed,
    PoolTimeout,
    PoolUnreachable,
)
from natsync.headers import HeaderInput
from natsync.message import MISSING, Message, Payload
from natsync.options import Options, Servers, Unpack, connect_settings
from natsync.pooling.keeper import Keeper
from natsync.pooling.store import LOOK_SECONDS, Turn
from natsync.replies import Replies, Sentinel
from natsync.retry import RetryPolicy
from natsync.streaming.stream import Stream

log = logging.getLogger("natsync.pool")

#: An answer that comes in parts, and that is over some time.
A = TypeVar("A", Stream, Replies)

#: Connections that there are from the first use on. Default of the Go system (MinIdlePerServer).
MIN_SIZE = 4
#: Connections at most. Default of the Go system (MaxConnections).
MAX_SIZE = 128
#: Seconds to wait for a free connection. Default of the Go system (AcquireTimeout).
TIMEOUT = 15.0
#: Seconds that a connection beyond min_size may be idle. Default of psycopg_pool (max_idle).
MAX_IDLE = 600.0
#: Seconds after which a connection that was not given back counts as leaked. Default of the Go system (LeakTimeout).
LEAK_TIMEOUT = 1800.0
#: Seconds that close() waits for what is lent.
CLOSE_SECONDS = 5.0
#: Seconds that check() waits for each connection's answer.
CHECK_SECONDS = 2.0


class Lease:
    """`with pool.connection() as client:`. Entering borrows a client and may block; leaving gives it back."""

    __slots__ = ("_client", "_pool", "_timeout", "_turn")

    def __init__(self, pool: ConnectionPool, timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout
        self._turn: Turn | None = None
        self._client: Client | None = None

    def __enter__(self) -> Client:
        self._turn = turn = self._pool._turn()
        try:
            self._client = client = self._pool._borrow(turn, self._timeout)
            turn.client = None  # the borrower's alone: see Turn
        except BaseException:  # a Ctrl-C included: whatever was granted goes to the next
            self._pool._leave(turn)
            raise
        return client

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        turn = self._turn
        if turn is not None:
            turn.client = self._client
            self._client = None
            try:
                unfit = turn.store.leave(turn)
            except BaseException:
                turn.store.cut_short.append(turn)  # a call into C: done before the next signal is looked for
                raise
            if unfit is not None or turn.store.turns:
                self._pool._left(turn, unfit)


class ConnectionPool:
    """Connections lent to one holder at a time: `with pool.connection() as client: ...`.

    The constructor opens nothing and starts no thread; the first use does, once per process. From then on connections
    are made in the background, one at a time, until there are min_size, and up to max_size while callers wait. They go
    to the server that has made the least trouble lately. Callers are served in the order in which they came. A
    connection without a link is not lent: it is closed and replaced. Safe from any thread.

    Args:
        servers: as for Client.
        min_size: connections that there are from the first use on.
        max_size: connections at most.
        timeout: seconds to wait for a free one; None = no limit.
        max_lifetime: seconds after which a connection is not lent any more, shortened at random by up to a tenth;
            None = no limit.
        max_idle: seconds after which an idle connection beyond min_size is closed; None = never.
        leak_timeout: seconds after which a connection that was not given back is closed and replaced, and its borrower
            named in the log (with the place, if the logger natsync.pool was at level DEBUG when the pool was made);
            None = never. Streams may hold theirs for as long as they last.
        options: those of ConnectOptions; retry_on_failed_connect has no effect, for a pool always tries again.

    Raises:
        InvalidURL, InvalidArgument, TypeError: an argument cannot be used.
    """

    def __init__(
        self,
        servers: Servers = None,
        *,
        min_size: int = MIN_SIZE,
        max_size: int = MAX_SIZE,
        timeout: float | None = TIMEOUT,
        max_lifetime: float | None = None,
        max_idle: float | None = MAX_IDLE,
        leak_timeout: float | None = LEAK_TIMEOUT,
        **options: Unpack[Options],
    ) -> None:
        for name, value, least in (("max_size", max_size, 1), ("min_size", min_size, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidArgument(f"{name}={value!r}: a whole number from {least} up")
        for name, seconds in (("max_lifetime", max_lifetime), ("max_idle", max_idle), ("leak_timeout", leak_timeout)):
            if check_timeout(seconds, name) == 0:
                raise InvalidArgument(f"{name}={seconds!r}: seconds, more than 0, or None")
        self._timeout = check_timeout(timeout)
        self._settings = connect_settings(servers, options)
        self._sizes: dict[str, Any] = {
            "min_size": min(min_size, max_size),
            "max_size": max_size,
            "max_lifetime": max_lifetime,
            "max_idle": max_idle,
            "leak_timeout": leak_timeout,
        }
        self._closed = False
        self._begin()
        _pools.add(self)

    def _begin(self) -> None:
        """Have no connections, as in the beginning and in a forked child."""
        self._keeper = Keeper(*self._settings, **self._sizes)
        self._keeper.store.closed = self._closed

    # -- lending ---------------------------------------------------------------------------------------------------

    def connection(self, timeout: float | None = None) -> Lease:
        """A client for the length of a `with` block, which blocks up to timeout seconds for a free one.

        None = the pool's own timeout; making a connection is part of it.

        Raises (from the `with` statement):
            PoolTimeout: none became free in time; the text says how many are lent, and how many wait.
            PoolUnreachable: the same, and the cause is that no server could be reached; it is a NoServersError too.
            NoServersError, AuthorizationError: the servers refuse the credentials. That is told at once.
            PoolClosed: the pool was closed.
        """
        return Lease(self, timeout)

    def getconn(self, timeout: float | None = None) -> Client:
        """Borrow a client; give it back with putconn(). Blocks and raises as connection() does.

        One that is dropped instead of given back is found out, told of in the log, and replaced.
        """
        turn = self._turn()
        try:
            client = self._borrow(turn, timeout)
            client._loan = turn
            turn.client = None  # the borrower's alone: see Turn
        except BaseException:  # a Ctrl-C included
            self._leave(turn)
            raise
        return client

    def putconn(self, client: Client) -> None:
        """Give a borrowed client back; one that has no link by now is replaced. Does not block.

        Raises:
            InvalidArgument: it is not lent by this pool, or was given back before.
            ForkError: it was borrowed in the parent process.
        """
        turn = client._loan
        if not isinstance(turn, Turn):
            raise InvalidArgument("this client is not on loan from this pool")
        if turn.generation != fork_generation():
            raise ForkError("this connection was borrowed in the parent process")
        if turn.store is not self._keeper.store or (turn.member is None and not turn.taken):
            raise InvalidArgument("this client is not on loan from this pool")
        turn.client = client
        self._leave(turn)

    def _turn(self, lasting: bool = False) -> Turn:
        """A place in the queue of this process. lasting: it may take as long as it likes."""
        if not at_home[0]:
            fork_generation()  # before the look at the keeper: another one is made for a child
        turn = Turn(self._keeper.store)
        if lasting:
            turn.lasting = True
        return turn

    def _borrow(self, turn: Turn, timeout: float | None, ctx: Context | None = None) -> Client:
        """Wait for the turn; whatever happens, the caller has to _leave() it."""
        check_timeout(timeout)  # also where none is needed
        turn.store.borrow(turn)
        client = turn.client
        return client if client is not None else self._wait_turn(turn, timeout, ctx)

    def _wait_turn(self, turn: Turn, timeout: float | None, ctx: Context | None) -> Client:
        limit = self._timeout if timeout is None else check_timeout(timeout)
        begin, deadline = time.monotonic(), Deadline.after(limit)
        keeper, signal = self._keeper, turn.signal
        assert signal is not None
        keeper.start()
        remove: Callable[[], None] | None = None
        try:
            if ctx is not None:
                remove = ctx.on_end(signal.set)
            while turn.waits:
                woken = signal.wait(deadline.or_sooner(LOOK_SECONDS))
                if ctx is not None:
                    self._heed(turn, ctx, begin)
                if not woken:
                    turn.store.sweep()
                    keeper.want()
                    if deadline.expired:
                        self._give_up(turn, limit)
        finally:
            if remove is not None:
                remove()
            turn.store.waited(turn, time.monotonic() - begin)
        if turn.client is None:
            assert turn.failure is not None
            raise turn.failure()
        return turn.client

    def _heed(self, turn: Turn, ctx: Context, begin: float) -> None:
        """Raise how ctx ended, if it has; the cause of a deadline's is what kept the caller waiting."""
        try:
            ctx.check()
        except DeadlineExceeded as error:
            try:
                self._give_up(turn, round(time.monotonic() - begin, 3))
            except PoolTimeout as cause:
                raise error from cause

    def _give_up(self, turn: Turn, limit: float | None) -> None:
        """Raise that nothing was free in time, unless it has come at the last moment."""
        numbers = turn.store.timed_out(turn)
        if numbers is None:
            return
        lent, waiting = numbers
        text = f"no connection free after {limit} s ({lent} of {turn.store.max_size} leased, {waiting} waiting); "
        failure = self._keeper.failure
        if failure is None:
            raise PoolTimeout(f"{text}raise max_size or timeout")
        text += f"the last attempt to make one failed: {failure}"
        if isinstance(failure, NoServersError):
            raise PoolUnreachable(text, failure.causes) from failure
        raise PoolTimeout(text) from failure

    def _leave(self, turn: Turn) -> None:
        """The caller goes away: its place in the queue, or what it was granted, is free. Idempotent."""
        try:
            unfit = turn.store.leave(turn)
        except BaseException:
            turn.store.cut_short.append(turn)
            raise
        self._left(turn, unfit)

    def _left(self, turn: Turn, unfit: Client | None) -> None:
        """See to what a caller who has left leaves behind: a broken connection, and those who wait for another."""
        if unfit is not None:
            unfit.close()
        if unfit is not None or turn.store.turns:
            self._keeper.want()

    # -- the client's verbs --------------------------------------------------------------------------------------

    def publish(
        self,
        subject: str,
        payload: Payload = b"",
        *,
        json: Any = MISSING,
        reply: str | None = None,
        headers: HeaderInput = None,
    ) -> None:
        """Client.publish() on a borrowed connection. Blocks for one as connection() does; raises what both raise.

        As a client's, it goes out in a handler whose context has ended, too.
        """
        with self.connection() as client:
            client.publish(subject, payload, json=json, reply=reply, headers=headers)

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
        """Client.request() on a borrowed connection, which is held until the reply is there.

        Blocks for both, within the request's timeout and its ctx, and raises what both raise.
        """
        with self._within(timeout, ctx) as (client, left):
            return client.request(subject, payload, json=json, headers=headers, timeout=left, retry=retry, ctx=ctx)

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
        """Client.request_many() on a borrowed connection, which is held until the replies are over.

        Blocks for the connection, within timeout and ctx, and raises what connection() and Client.request_many() raise.
        """
        return self._held(
            lambda client, left: client.request_many(
                subject,
                payload,
                json=json,
                headers=headers,
                timeout=left,
                stall=stall,
                max_messages=max_messages,
                sentinel=sentinel,
                ctx=ctx,
            ),
            timeout,
            ctx,
        )

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
        """Client.stream() on a borrowed connection, which is held until the stream is over.

        Blocks for the connection, and raises what connection() and Client.stream() raise.
        """
        return self._held(
            lambda client, left: client.stream(
                subject,
                payload,
                json=json,
                headers=headers,
                timeout=left,
                idle_timeout=idle_timeout,
                window=window,
                retry=retry,
                ctx=ctx,
            ),
            timeout,
            ctx,
        )

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
        """Client.stream_request() on a borrowed connection, which is held until it returns.

        Blocks for both, and raises what both raise.
        """
        with self._within(timeout, ctx) as (client, left):
            client.stream_request(
                subject,
                payload,
                processor,
                json=json,
                headers=headers,
                timeout=left,
                idle_timeout=idle_timeout,
                retry=retry,
                ctx=ctx,
                client_id=client_id,
            )

    def _held(self, verb: Callable[[Client, float | None], A], timeout: float | None, ctx: Context | None) -> A:
        """What verb(client, seconds left) returns, on a connection that goes back when that is over."""
        turn = self._turn(lasting=True)
        try:
            answer = verb(*self._borrow_within(turn, timeout, ctx))
            answer.when_finished(lambda: self._leave_soon(turn))
        except BaseException:
            self._leave(turn)
            raise
        return answer

    def _leave_soon(self, turn: Turn) -> None:
        """Leave from whichever thread ended a stream: closing is for one that may block."""
        member = turn.member
        if member is None or not member.usable or turn.store.closed:
            run_soon(lambda: self._leave(turn), "giving a connection back")
        else:
            self._leave(turn)

    @contextlib.contextmanager
    def _within(self, timeout: float | None, ctx: Context | None) -> Iterator[tuple[Client, float | None]]:
        turn = self._turn(lasting=True)
        try:
            yield self._borrow_within(turn, timeout, ctx)
        finally:
            self._leave(turn)

    def _borrow_within(self, turn: Turn, timeout: float | None, ctx: Context | None) -> tuple[Client, float | None]:
        """A client within the verb's own timeout and ctx, and the seconds that are left of the timeout."""
        own = Deadline.after(check_timeout(timeout))
        client = self._borrow(turn, own.or_sooner(self._timeout).remaining(), ctx or current())
        return client, own.remaining()

    # -- life ------------------------------------------------------------------------------------------------------

    def open(self) -> ConnectionPool:
        """Begin to make min_size connections, in the background; returns itself at once. The first use does it too.

        Raises:
            PoolClosed: the pool was closed.
        """
        fork_generation()  # finds out about a fork that Python was not told of
        if self._closed:
            raise PoolClosed("the pool is closed")
        self._keeper.start()
        return self

    def wait(self, timeout: float | None = None) -> None:
        """Block until there are min_size connections, so that the first callers need not wait for them.

        Blocks up to timeout seconds (None = the pool's own timeout). Raises as connection() does.
        """
        limit = self._timeout if timeout is None else check_timeout(timeout)
        deadline = Deadline.after(limit)
        keeper = self.open()._keeper
        store, wanted = keeper.store, self._sizes["min_size"]
        while True:
            with store.lock:
                if store.closed:
                    raise PoolClosed("the pool is closed")
                if store.size >= wanted:
                    return
                if keeper.refused is None and not deadline.expired:
                    store.changed.wait(deadline.or_sooner(LOOK_SECONDS).remaining())
            if keeper.refused is not None:
                raise keeper.refused()
            if deadline.expired and store.size < wanted:
                text = f"{store.size} of {wanted} connections after {limit} s"
                if isinstance(keeper.failure, NoServersError):
                    raise PoolUnreachable(f"{text}: {keeper.failure}", keeper.failure.causes) from keeper.failure
                raise PoolTimeout(text) from keeper.failure
            keeper.want()

    def check(self, timeout: float | None = CHECK_SECONDS) -> int:
        """Have each idle connection answer a PING, and replace those that do not; how many those were.

        Blocks for up to timeout seconds a connection. Callers may borrow the others meanwhile. For a health check now
        and then: no connection is tested when it is borrowed.

        Raises:
            PoolClosed: the pool was closed.
        """
        check_timeout(timeout)
        keeper = self.open()._keeper
        replaced = 0
        for member in list(keeper.store.idle):
            turn = Turn(keeper.store)
            try:
                if keeper.store.lend_idle(member, turn) and turn.client is not None:
                    turn.client.flush(timeout)
            except NatsError as error:
                log.warning("a connection of the pool does not answer, and is replaced: %s", error)
                replaced += 1
                if turn.client is not None:
                    turn.client.close(0)
            finally:
                self._leave(turn)
        return replaced

    def stats(self) -> dict[str, Any]:
        """What there is now, and what has been since the first use in this process.

        Now: size, idle, leased, waiting (callers), dialing, min_size, max_size; oldest_lease_seconds; servers: of each
        its health_points (0 = healthy, 100 = worst) and connections. Counted: leases, waits (leases that had to wait),
        wait_seconds, longest_wait_seconds, timeouts, dials, dials_failed, dial_seconds, lost (links that broke),
        retired (for max_lifetime), shrunk (for max_idle), leaks.
        """
        fork_generation()  # finds out about a fork that Python was not told of
        keeper = self._keeper
        store = keeper.store
        store.sweep()
        with store.lock:
            now = time.monotonic()
            oldest = max((now - turn.since for turn in store.leased), default=0.0)
            numbers = {
                "size": store.size,
                "idle": len(store.idle),
                "leased": len(store.leased),
                "waiting": len(store.turns),
                "dialing": store.dialing,
                "min_size": self._sizes["min_size"],
                "max_size": store.max_size,
                "oldest_lease_seconds": oldest,
                **store.numbers,
            }
        return {**numbers, **keeper.numbers, "servers": keeper.servers()}

    def close(self, timeout: float | None = CLOSE_SECONDS) -> None:
        """Turn away who waits, close what is idle; what is lent is closed when it comes back, or at the deadline.

        Blocks up to timeout seconds. Idempotent.
        """
        deadline = Deadline.after(check_timeout(timeout))
        fork_generation()
        self._closed = True
        keeper = self._keeper
        idle = keeper.store.close()
        keeper.stop()
        for client in idle:
            client.close(deadline.remaining())
        keeper.store.wait_returned(deadline)
        for _, client in keeper.store.take_leased(lambda turn: True):
            client.close()

    def __enter__(self) -> ConnectionPool:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        store = self._keeper.store
        return f"<ConnectionPool: {store.size} of {store.max_size}, {len(store.leased)} leased>"


_pools: weakref.WeakSet[ConnectionPool] = weakref.WeakSet()


def _forget_in_child() -> None:
    """In a forked child: connections, borrowers and their locks are the parent's."""
    for pool in list(_pools):
        pool._begin()


after_fork_in_child(_forget_in_child)
