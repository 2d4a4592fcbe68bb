"""ConnectionPool: bounds, turns, leases and endings."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import natsync
from natsync.context import Running
from natsync.testing import NatsServer, eventually
from rawclient import END, PATIENCE, RawClient, RecordingServer

Make = Callable[..., NatsServer]


@pytest.fixture
def raw(nats_server: NatsServer) -> Iterator[RawClient]:
    with RawClient(nats_server.url) as raw:
        yield raw


@pytest.fixture
def pool(nats_server: NatsServer) -> Iterator[natsync.ConnectionPool]:
    """Of one connection."""
    with natsync.ConnectionPool(nats_server.url, max_size=1, timeout=PATIENCE) as pool:
        yield pool


# -- lending -------------------------------------------------------------------------------------------------------


def test_the_constructor_opens_nothing_and_the_first_use_one_connection() -> None:
    with RecordingServer() as server:
        pool = natsync.ConnectionPool(server.url, min_size=0)
        assert (server.accepted, pool.stats()["size"]) == (0, 0)
        for _ in range(10):
            pool.publish("p.x")
        assert (server.accepted, pool.stats()["size"]) == (1, 1)
        pool.close()


def test_never_more_than_max_size_connections_however_many_callers() -> None:
    with RecordingServer() as server, natsync.ConnectionPool(server.url, max_size=3) as pool:
        held: list[int] = []
        most: list[int] = []
        lock, three = threading.Lock(), threading.Event()

        def borrow() -> None:
            with pool.connection(timeout=30) as client:
                with lock:
                    held.append(1)
                    most.append(len(held))
                    if len(held) == 3:
                        three.set()
                assert three.wait(30)
                client.flush()
                with lock:
                    held.pop()

        with ThreadPoolExecutor(16) as callers:
            for done in [callers.submit(borrow) for _ in range(200)]:
                done.result(30)
        assert max(most) == 3
        assert server.accepted == 3
        stats = pool.stats()
        assert (stats["idle"], stats["leased"], stats["waiting"], stats["leases"]) == (3, 0, 0, 200)


def test_a_client_is_lent_to_one_holder_at_a_time(nats_server: NatsServer) -> None:
    with natsync.ConnectionPool(nats_server.url, max_size=3) as pool:
        clients = [pool.getconn() for _ in range(3)]
        assert len({id(client) for client in clients}) == 3
        for client in clients:
            pool.putconn(client)


def test_waiting_callers_are_served_in_the_order_they_came(pool: natsync.ConnectionPool) -> None:
    served: list[int] = []
    first = pool.getconn()

    def borrow(number: int) -> None:
        with pool.connection():
            served.append(number)

    with ThreadPoolExecutor(8) as callers:
        waiting = []
        for number in range(8):
            waiting.append(callers.submit(borrow, number))
            eventually(lambda number=number: pool.stats()["waiting"] == number + 1)
        pool.putconn(first)
        for one in waiting:
            one.result(PATIENCE)
    assert served == list(range(8))


def test_a_caller_that_gives_up_does_not_hold_up_those_behind_it(pool: natsync.ConnectionPool) -> None:
    first = pool.getconn()
    with ThreadPoolExecutor(2) as callers:
        impatient = callers.submit(pool.getconn, 2.0)
        eventually(lambda: pool.stats()["waiting"] == 1)
        patient = callers.submit(pool.getconn, PATIENCE)
        with pytest.raises(natsync.PoolTimeout):
            impatient.result(PATIENCE)
        pool.putconn(first)
        assert patient.result(PATIENCE) is first
    pool.putconn(first)


def test_a_timeout_says_who_holds_the_connections_and_what_to_do(pool: natsync.ConnectionPool) -> None:
    with pool.connection():
        begin = time.monotonic()
        with pytest.raises(natsync.PoolTimeout) as caught:
            pool.getconn(timeout=0.1)
        assert 0.09 <= time.monotonic() - begin < 5
    assert str(caught.value) == "no connection free after 0.1 s (1 of 1 leased, 1 waiting); raise max_size or timeout"
    assert isinstance(caught.value, TimeoutError)
    assert pool.stats()["timeouts"] == 1


def test_the_pools_own_timeout_is_the_default_and_0_does_not_wait(nats_server: NatsServer) -> None:
    with natsync.ConnectionPool(nats_server.url, max_size=1, timeout=0.1) as pool:
        with pool.connection(timeout=PATIENCE):
            begin = time.monotonic()
            for timeout in (None, 0):
                with pytest.raises(natsync.PoolTimeout):
                    pool.getconn(timeout)
            assert 0.09 <= time.monotonic() - begin < 5


def test_an_exception_in_the_block_gives_the_connection_back(pool: natsync.ConnectionPool) -> None:
    with pytest.raises(ZeroDivisionError):
        with pool.connection():
            1 / 0
    assert pool.stats()["idle"] == 1


def test_what_is_not_on_loan_cannot_be_given_back(pool: natsync.ConnectionPool, nats_server: NatsServer) -> None:
    client = pool.getconn()
    pool.putconn(client)
    for stranger in (client, natsync.Client(nats_server.url)):
        with pytest.raises(natsync.InvalidArgument, match="not on loan"):
            pool.putconn(stranger)


def test_wait_makes_the_minimum_of_connections(nats_server: NatsServer) -> None:
    with natsync.ConnectionPool(nats_server.url, min_size=3, max_size=5) as pool:
        pool.wait(PATIENCE)
        assert (pool.stats()["idle"], pool.stats()["dials"]) == (3, 3)


@pytest.mark.parametrize("verb", ["request", "stream", "stream_request"])
def test_a_verbs_timeout_covers_the_wait_for_a_connection(nats_server: NatsServer, verb: str) -> None:
    with natsync.ConnectionPool(nats_server.url, max_size=1, timeout=30) as pool, pool.connection():
        arguments = ["p.x", b"", print] if verb == "stream_request" else ["p.x"]
        begin = time.monotonic()
        with pytest.raises(natsync.TimedOut):
            getattr(pool, verb)(*arguments, timeout=0.2)
        assert time.monotonic() - begin < 20


@pytest.mark.parametrize("ambient", [False, True])
@pytest.mark.parametrize("verb", ["request", "request_many", "stream", "stream_request"])
def test_the_end_of_a_verbs_context_ends_the_wait_for_a_connection(
    pool: natsync.ConnectionPool, verb: str, ambient: bool
) -> None:
    arguments = ["p.x", b"", print] if verb == "stream_request" else ["p.x"]
    ctx = natsync.Context().with_cancel()

    def call() -> None:
        if ambient:
            with Running(ctx):
                getattr(pool, verb)(*arguments, timeout=PATIENCE)
        else:
            getattr(pool, verb)(*arguments, timeout=PATIENCE, ctx=ctx)

    with pool.connection(), ThreadPoolExecutor() as callers:
        calling = callers.submit(call)
        eventually(lambda: pool.stats()["waiting"] == 1)
        begin = time.monotonic()
        ctx.cancel("no longer needed")
        with pytest.raises(natsync.Cancelled, match="no longer needed"):
            calling.result(PATIENCE)
        assert time.monotonic() - begin < PATIENCE / 2
        assert (pool.stats()["waiting"], pool.stats()["timeouts"]) == (0, 0)
    pool.putconn(pool.getconn(0))


def test_a_handler_whose_context_has_ended_can_still_publish(pool: natsync.ConnectionPool) -> None:
    ctx = natsync.Context().with_cancel()
    ctx.cancel("over")

    def leave_word() -> None:
        with Running(ctx):
            pool.publish("p.last", b"word")

    with ThreadPoolExecutor() as callers:
        with pool.connection() as client:
            words = client.subscribe("p.last")
            client.flush()
            calling = callers.submit(leave_word)
            eventually(lambda: pool.stats()["waiting"] == 1)
        calling.result(PATIENCE)
        assert words.next(PATIENCE).data == b"word"


def test_the_deadline_of_a_context_is_told_as_such_and_who_held_the_connections_as_its_cause(
    pool: natsync.ConnectionPool,
) -> None:
    with pool.connection(), pytest.raises(natsync.DeadlineExceeded) as caught:
        pool.request("p.x", timeout=PATIENCE, ctx=natsync.Context().with_timeout(0.1))
    assert isinstance(caught.value.__cause__, natsync.PoolTimeout)
    assert "1 of 1 leased, 1 waiting" in str(caught.value.__cause__)
    assert (pool.stats()["waiting"], pool.stats()["timeouts"]) == (0, 1)


def test_a_context_that_has_ended_waits_for_no_connection(pool: natsync.ConnectionPool) -> None:
    ctx = natsync.Context().with_cancel()
    ctx.cancel("over")
    with pool.connection(), pytest.raises(natsync.Cancelled, match="over"):
        pool.stream("p.x", ctx=ctx)
    assert pool.stats()["leased"] == 0


def test_a_connection_that_is_granted_as_the_context_ends_is_not_lost(pool: natsync.ConnectionPool) -> None:
    with ThreadPoolExecutor(2) as callers:
        for _ in range(100):
            ctx = natsync.Context().with_cancel()
            lent = pool.getconn()
            calling = callers.submit(pool.stream, "p.x", timeout=PATIENCE, ctx=ctx)
            eventually(lambda: pool.stats()["waiting"] == 1)
            cancelling = callers.submit(ctx.cancel)
            pool.putconn(lent)
            cancelling.result(PATIENCE)
            try:
                calling.result(PATIENCE).close()
            except natsync.Cancelled:
                pass
            eventually(lambda: (pool.stats()["leased"], pool.stats()["idle"]) == (0, 1), PATIENCE)


@pytest.mark.parametrize(("timeout", "error"), [(-1, natsync.InvalidArgument), ("1", TypeError)])
def test_a_timeout_that_makes_no_sense_is_refused_also_where_no_wait_is_needed(
    pool: natsync.ConnectionPool, timeout: Any, error: type[Exception]
) -> None:
    with pool.connection():
        pass
    for _ in range(3):
        with pytest.raises(error):
            pool.getconn(timeout)
        with pytest.raises(error), pool.connection(timeout):
            pass
    pool.putconn(pool.getconn(0))


# -- faults --------------------------------------------------------------------------------------------------------


def test_a_client_that_its_borrower_closed_is_replaced(pool: natsync.ConnectionPool) -> None:
    with pool.connection() as client:
        client.close()
    with pool.connection() as other:
        assert other is not client
        other.flush()
    assert pool.stats()["dials"] == 2


def test_a_connection_that_broke_for_good_is_replaced(make_nats_server: Make) -> None:
    server = make_nats_server()
    with natsync.ConnectionPool(server.url, max_size=1, reconnect=False) as pool:
        with pool.connection() as client:
            client.flush()
        server.kill()
        eventually(lambda: client.status == "closed")
        server.start()
        with pool.connection() as other:
            assert other is not client
            other.flush()
        assert pool.stats()["dials"] == 2


def test_a_lent_connection_that_is_made_again_stays_in_the_pool(make_nats_server: Make) -> None:
    server = make_nats_server()
    with natsync.ConnectionPool(server.url, max_size=1, reconnect_wait=0.02) as pool:
        with pool.connection() as client:
            client.flush()
            server.kill()
            server.start()
            eventually(lambda: client.stats()["reconnects"] == 1, PATIENCE)
            (turn,) = pool._keeper.store.leased
            eventually(lambda: turn.member is not None and turn.member.usable)  # the pool has learned of it
        with pool.connection() as other:
            assert other is client
        assert (pool.stats()["dials"], pool.stats()["lost"]) == (1, 1)


def test_an_idle_connection_that_breaks_is_replaced(make_nats_server: Make) -> None:
    server = make_nats_server()
    with natsync.ConnectionPool(server.url, min_size=2, max_size=2) as pool:
        pool.wait(PATIENCE)
        with pool.connection() as client:
            pass
        server.kill()
        eventually(lambda: (pool.stats()["size"], client.status) == (0, "closed"), PATIENCE)
        server.start()
        eventually(lambda: pool.stats()["idle"] == 2, PATIENCE)
        assert (pool.stats()["dials"], pool.stats()["lost"]) == (4, 2)


def test_a_connection_that_is_given_back_without_a_link_costs_the_next_caller_no_turn(make_nats_server: Make) -> None:
    server = make_nats_server()
    with natsync.ConnectionPool(server.url, max_size=1, timeout=PATIENCE, reconnect_wait=PATIENCE) as pool:
        first = pool.getconn()
        with ThreadPoolExecutor(2) as callers:
            waiting = []
            for number in range(2):
                waiting.append(callers.submit(pool.getconn))
                eventually(lambda number=number: pool.stats()["waiting"] == number + 1)
            server.kill()
            eventually(lambda: first.status == "reconnecting", PATIENCE)
            (turn,) = pool._keeper.store.leased
            eventually(lambda: turn.member is not None and not turn.member.usable, PATIENCE)
            pool.putconn(first)
            server.start()
            second = waiting[0].result(PATIENCE)
            assert second is not first
            assert first.status == "closed"
            assert not waiting[1].done()
            second.flush()
            pool.putconn(second)
            pool.putconn(waiting[1].result(PATIENCE))


def test_when_no_server_can_be_reached_the_caller_learns_why_at_its_deadline(make_nats_server: Make) -> None:
    server = make_nats_server()
    server.kill()
    with natsync.ConnectionPool(server.url, max_size=1, connect_timeout=1, timeout=0.3) as pool:
        eventually(lambda: pool._keeper.failure is not None)
        for _ in range(3):
            begin = time.monotonic()
            with pytest.raises(natsync.PoolTimeout, match="the last attempt to make one failed: no server") as caught:
                pool.publish("p.x")
            assert 0.29 <= time.monotonic() - begin < 5
            assert isinstance(caught.value, natsync.NoServersError)
            assert list(caught.value.causes) == [server.url]
        assert pool.stats()["size"] == 0
        assert 2 <= pool.stats()["dials_failed"] <= 20
        server.start()
        with pool.connection(PATIENCE) as client:
            client.flush()


def test_a_refusal_of_the_credentials_is_told_at_once_to_all_who_wait(make_nats_server: Make) -> None:
    server = make_nats_server(config="authorization { user: ada, password: S3CRET-right }")
    pool = natsync.ConnectionPool(server.url, user="ada", password="S3CRET-wrong", max_size=2, timeout=PATIENCE)
    with pool, ThreadPoolExecutor(4) as callers:
        for one in [callers.submit(pool.getconn) for _ in range(4)]:
            with pytest.raises(natsync.AuthorizationError):
                one.result(PATIENCE)
        with pytest.raises(natsync.AuthorizationError):
            pool.wait(PATIENCE)


# -- streams -------------------------------------------------------------------------------------------------------


def test_a_stream_holds_its_connection_until_it_ends(pool: natsync.ConnectionPool, raw: RawClient) -> None:
    raw.subscribe("p.stream")
    stream = pool.stream("p.stream")
    request = raw.next()
    raw.answer(request, b"1")
    assert stream.next(PATIENCE) == b"1"
    assert pool.stats()["leased"] == 1
    with pytest.raises(natsync.PoolTimeout):
        pool.getconn(timeout=0.02)
    raw.answer(request, END)
    assert list(stream) == []
    eventually(lambda: pool.stats()["leased"] == 0)
    pool.publish("p.x")


@pytest.mark.parametrize("how", ["close", "cancel", "with", "garbage", "timeout"])
def test_a_stream_that_is_given_up_gives_its_connection_back(
    pool: natsync.ConnectionPool, raw: RawClient, how: str
) -> None:
    raw.subscribe("p.given")
    stream: natsync.Stream | None = pool.stream("p.given", timeout=3 if how == "timeout" else None)
    assert stream is not None
    assert pool.stats()["leased"] == 1
    if how == "with":
        with stream:
            pass
    elif how in ("close", "cancel"):
        getattr(stream, how)()
    elif how == "garbage":
        stream = None
        gc.collect()
    eventually(lambda: pool.stats()["leased"] == 0, PATIENCE)
    assert pool.stats()["idle"] == 1
    pool.publish("p.x")


def test_a_stream_that_fails_gives_its_connection_back(pool: natsync.ConnectionPool) -> None:
    for _ in range(3):
        with pytest.raises(natsync.NoRespondersError):
            list(pool.stream("p.nobody"))
        with pytest.raises(natsync.NoRespondersError):
            list(pool.stream("p.nobody", retry=natsync.Retry(attempts=2, initial=0.01)))
        with pytest.raises(natsync.InvalidArgument):
            pool.stream("p.bad subject")
    assert pool.stats()["leased"] == 0


@pytest.mark.parametrize("how", ["close", "timeout", "max_messages", "garbage"])
def test_the_replies_of_request_many_hold_a_connection_until_they_are_over(
    pool: natsync.ConnectionPool, raw: RawClient, how: str
) -> None:
    raw.subscribe("p.many")
    replies: natsync.Replies | None = pool.request_many("p.many", timeout=4 if how == "timeout" else 30, max_messages=2)
    assert replies is not None
    request = raw.next()
    assert pool.stats()["leased"] == 1
    raw.answer(request, b"1")
    assert next(iter(replies)).data == b"1"
    if how == "close":
        replies.close()
    elif how == "max_messages":
        raw.answer(request, b"2")
    if how == "garbage":
        del replies
        gc.collect()
    elif how != "close":
        assert len(list(replies)) == (how == "max_messages")
    eventually(lambda: (pool.stats()["leased"], pool.stats()["idle"]) == (0, 1), PATIENCE)


def test_stream_request_holds_a_connection_until_it_returns(pool: natsync.ConnectionPool, raw: RawClient) -> None:
    raw.subscribe("p.request")
    with ThreadPoolExecutor() as callers:
        calling = callers.submit(pool.stream_request, "p.request", b"", lambda message: None)
        request = raw.next()
        assert pool.stats()["leased"] == 1
        raw.answer(request, b"1", END)
        calling.result(PATIENCE)
    assert pool.stats()["leased"] == 0


def test_many_streams_over_few_connections_are_all_served(nats_server: NatsServer) -> None:
    with (
        natsync.Subscriber(nats_server.url) as subscriber,
        natsync.ConnectionPool(nats_server.url, max_size=4, timeout=30) as pool,
    ):
        subscriber.stream_subscribe("p.count", lambda ctx, request: [request.data + b"/%d" % n for n in range(20)])
        with ThreadPoolExecutor(24) as callers:
            results = list(callers.map(lambda n: list(pool.stream("p.count", b"%d" % n)), range(120)))
        assert results == [[b"%d/%d" % (n, chunk) for chunk in range(20)] for n in range(120)]
        assert pool.stats()["dials"] <= 4


# -- closing -------------------------------------------------------------------------------------------------------


def test_close_fails_those_who_wait(nats_server: NatsServer) -> None:
    pool = natsync.ConnectionPool(nats_server.url, max_size=1, timeout=30)
    lent = pool.getconn()  # kept, for one that is dropped goes to the next who waits
    with ThreadPoolExecutor(4) as callers:
        waiting = [callers.submit(pool.getconn) for _ in range(3)]
        eventually(lambda: pool.stats()["waiting"] == 3)
        pool.close(timeout=0)
        for one in waiting:
            with pytest.raises(natsync.PoolClosed):
                one.result(PATIENCE)
    pool.putconn(lent)


def test_everything_after_close_raises_pool_closed(nats_server: NatsServer) -> None:
    pool = natsync.ConnectionPool(nats_server.url)
    pool.publish("p.x")
    pool.close()
    pool.close()
    for verb in (
        pool.getconn,
        lambda: pool.publish("p.x"),
        lambda: pool.request("p.x"),
        lambda: pool.stream("p.x"),
        lambda: pool.stream_request("p.x", b"", print),
        lambda: pool.connection().__enter__(),
    ):
        with pytest.raises(natsync.PoolClosed):
            verb()
    assert pool.stats()["size"] == 0


def test_what_is_lent_at_close_works_until_it_comes_back_and_is_closed_then(nats_server: NatsServer) -> None:
    pool = natsync.ConnectionPool(nats_server.url)
    client = pool.getconn()
    with ThreadPoolExecutor() as closer:
        closing = closer.submit(pool.close, PATIENCE)
        with pytest.raises(natsync.PoolClosed):
            while not closing.done():
                pool.putconn(pool.getconn(timeout=PATIENCE))
        client.flush()
        assert not closing.done()
        pool.putconn(client)
        closing.result(PATIENCE)
    assert client.status == "closed"


def test_what_is_lent_is_closed_at_the_deadline_of_close(nats_server: NatsServer) -> None:
    pool = natsync.ConnectionPool(nats_server.url)
    client = pool.getconn()
    begin = time.monotonic()
    pool.close(timeout=0.1)
    assert 0.09 <= time.monotonic() - begin < 4
    assert client.status == "closed"


def test_the_pool_closes_itself_behind_its_with_block(nats_server: NatsServer) -> None:
    with natsync.ConnectionPool(nats_server.url) as pool:
        with pool.connection() as client:
            pass
    assert client.status == "closed"


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_size": 0},
        {"max_size": -1},
        {"max_size": True},
        {"min_size": -1},
        {"timeout": -1},
        {"timeout": float("nan")},
    ],
    ids=repr,
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(natsync.InvalidArgument):
        natsync.ConnectionPool("nats://127.0.0.1", **arguments)  # type: ignore[arg-type]


def test_unknown_options_and_bad_urls_are_refused_by_the_constructor() -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        natsync.ConnectionPool("nats://127.0.0.1", no_such_option=1)
    with pytest.raises(natsync.InvalidURL):
        natsync.ConnectionPool("http://127.0.0.1")
