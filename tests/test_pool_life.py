"""ConnectionPool over time: growing and shrinking, ageing, leaks, broken servers, and callers in great number."""

from __future__ import annotations

import gc
import logging
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

import natsync
from natsync.pooling import health, keeper
from natsync.testing import NatsServer, PeerConnection, ScriptedPeer, eventually
from numbered import sized
from rawclient import PATIENCE, RecordingServer

Make = Callable[..., NatsServer]


# -- growing and shrinking ---------------------------------------------------------------------------------------------


def test_the_first_use_begins_to_make_the_minimum(nats_server: NatsServer) -> None:
    with natsync.ConnectionPool(nats_server.url, min_size=3) as pool:
        pool.publish("p.x")
        eventually(lambda: pool.stats()["idle"] == 3, PATIENCE)
        assert (pool.stats()["dials"], pool.stats()["size"]) == (3, 3)


def test_open_and_with_begin_too_and_do_not_wait(nats_server: NatsServer) -> None:
    pool = natsync.ConnectionPool(nats_server.url, min_size=2)
    assert pool.open() is pool
    eventually(lambda: pool.stats()["idle"] == 2, PATIENCE)
    pool.close()
    with pytest.raises(natsync.PoolClosed):
        pool.open()


def test_connections_are_made_one_at_a_time() -> None:
    at_once, most = [0], [0]
    lock = threading.Lock()

    def script(peer: PeerConnection) -> None:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        threading.Event().wait(0.02)
        with lock:
            at_once[0] -= 1
        peer.handshake()
        peer.recv_until_eof()

    with ScriptedPeer(script) as peer, natsync.ConnectionPool(peer.url, min_size=8, max_size=8) as pool:
        with ThreadPoolExecutor(16) as callers:
            for done in [callers.submit(pool.publish, "p.x") for _ in range(16)]:
                done.result(PATIENCE)
        pool.wait(PATIENCE)
        assert (peer.accepted, most[0]) == (8, 1)


def test_what_has_been_idle_for_long_is_closed_down_to_the_minimum(nats_server: NatsServer) -> None:
    with natsync.ConnectionPool(nats_server.url, min_size=1, max_size=5, max_idle=0.2) as pool:
        clients = [pool.getconn() for _ in range(5)]
        for client in clients:
            pool.putconn(client)
        eventually(lambda: pool.stats()["size"] == 1, PATIENCE)
        eventually(lambda: pool.stats()["shrunk"] == 4, PATIENCE)
        eventually(lambda: sorted(client.status for client in clients) == ["closed"] * 4 + ["connected"], PATIENCE)
        assert clients[-1].status == "connected"  # the one that came back last is the one in use
        pool.publish("p.x")
        assert pool.stats()["dials"] == 5


def test_a_connection_ends_after_its_lifetime_and_not_while_it_is_lent(nats_server: NatsServer) -> None:
    with natsync.ConnectionPool(nats_server.url, min_size=2, max_size=2, max_lifetime=0.3) as pool:
        pool.wait(PATIENCE)
        with pool.connection() as lent:
            eventually(lambda: pool.stats()["retired"] >= 1, PATIENCE)
            lent.flush()
        eventually(lambda: lent.status == "closed", PATIENCE)
        eventually(lambda: pool.stats()["dials"] >= 4 and pool.stats()["size"] == 2, PATIENCE)


def test_lifetimes_differ_so_that_connections_do_not_end_together(nats_server: NatsServer) -> None:
    with natsync.ConnectionPool(nats_server.url, min_size=8, max_lifetime=100) as pool:
        pool.wait(PATIENCE)
        now = time.monotonic()
        left = [member.expires_at - now for member in pool._keeper.store.idle]
        assert 80 < min(left) < max(left) <= 100
        assert len(set(left)) == 8


def test_a_pool_that_is_dropped_is_collected_with_its_connections(nats_server: NatsServer) -> None:
    pool = natsync.ConnectionPool(nats_server.url, min_size=2)
    pool.wait(PATIENCE)
    cores = [member.core for member in pool._keeper.store.idle]
    del pool
    # Again and again: the thread that has made the connections may still hold the pool's keeper for a moment.
    eventually(lambda: (gc.collect(), all(core.status == "closed" for core in cores))[1], PATIENCE)


def test_an_idle_pool_wakes_nobody(nats_server: NatsServer) -> None:
    with natsync.ConnectionPool(nats_server.url, min_size=2, max_size=2) as pool:
        pool.wait(PATIENCE)
        alarm = pool._keeper._housekeeping
        assert alarm._when is not None
        assert alarm._when - time.monotonic() > 500


# -- checking ----------------------------------------------------------------------------------------------------------


def test_check_replaces_connections_that_do_not_answer() -> None:
    deaf = threading.Event()

    def script(peer: PeerConnection) -> None:
        peer.handshake()
        while True:
            line = peer.recv_line()
            if line == b"PING" and not deaf.is_set():
                peer.send(b"PONG\r\n")

    with ScriptedPeer(script) as peer, natsync.ConnectionPool(peer.url, min_size=2, max_size=2) as pool:
        pool.wait(PATIENCE)
        assert pool.check(PATIENCE) == 0
        before = [member.core for member in pool._keeper.store.idle]
        deaf.set()
        assert pool.check(0.1) == 2
        deaf.clear()
        pool.wait(PATIENCE)
        assert not [member for member in pool._keeper.store.idle if member.core in before]
        assert pool.check(PATIENCE) == 0
        assert pool.stats()["leases"] == 0
    with pytest.raises(natsync.PoolClosed):
        pool.check()


# -- leaks -------------------------------------------------------------------------------------------------------------


def test_a_client_that_is_dropped_instead_of_given_back_is_found_out(
    nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    with natsync.ConnectionPool(nats_server.url, max_size=1, timeout=PATIENCE) as pool:
        client: natsync.Client | None = pool.getconn()
        assert client is not None
        core = client._core
        client = None
        gc.collect()
        with pool.connection() as other:
            other.flush()
        assert pool.stats()["leaks"] == 1
        assert core is not None
        eventually(lambda: core.status == "closed", PATIENCE)
        text = f"dropped instead of given back, by thread {threading.current_thread().name!r}"
        eventually(lambda: text in caplog.text, PATIENCE)


def test_one_who_keeps_a_connection_too_long_loses_it_and_is_named(
    nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.DEBUG, "natsync.pool"),
        natsync.ConnectionPool(nats_server.url, max_size=1, leak_timeout=2.0, timeout=PATIENCE) as pool,
    ):
        kept = pool.getconn()
        with pool.connection() as other:  # the place is free again
            assert other is not kept
        assert kept.status == "closed"
        with pytest.raises(natsync.ConnectionClosed):
            kept.publish("p.x")
        pool.putconn(kept)  # late, but no misuse
        assert (pool.stats()["leaks"], pool.stats()["leased"]) == (1, 0)
    assert re.search(r"was not given back for \d+ s, and is closed; lent to thread", caplog.text)
    assert "kept = pool.getconn()" in caplog.text


def test_a_stream_may_last_longer_than_the_leak_timeout(nats_server: NatsServer) -> None:
    go_on = threading.Event()
    with (
        natsync.Subscriber(nats_server.url) as subscriber,
        natsync.ConnectionPool(nats_server.url, max_size=2, leak_timeout=0.1) as pool,
    ):

        def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
            sender.send(b"1")
            go_on.wait(PATIENCE)
            sender.send(b"2")
            sender.end()

        subscriber.stream_subscribe("p.long", handler)
        stream = pool.stream("p.long")
        assert stream.next(PATIENCE) == b"1"
        with pool.connection() as short:
            eventually(lambda: pool.stats()["leaks"] == 1, PATIENCE)
            eventually(lambda: short.status == "closed", PATIENCE)
        go_on.set()
        assert list(stream) == [b"2"]
        assert pool.stats()["leaks"] == 1


# -- turns -------------------------------------------------------------------------------------------------------------


def test_a_waiter_that_times_out_just_as_a_connection_arrives_loses_nothing(nats_server: NatsServer) -> None:
    with natsync.ConnectionPool(nats_server.url, max_size=1) as pool:
        outcomes = {"got": 0, "timed out": 0}
        for number in range(sized(150, 2000)):
            lent = pool.getconn(PATIENCE)
            wait = 0.002
            timer = threading.Timer(wait + (number % 7 - 3) * 1e-4, pool.putconn, [lent])
            timer.start()
            try:
                pool.putconn(pool.getconn(wait))
                outcomes["got"] += 1
            except natsync.PoolTimeout:
                outcomes["timed out"] += 1
            timer.join()
            stats = pool.stats()
            assert (stats["idle"], stats["leased"], stats["waiting"], stats["size"]) == (1, 0, 0, 1)
        assert pool.stats()["timeouts"] == outcomes["timed out"]
        assert sum(outcomes.values()) == sized(150, 2000)


def test_many_calls_on_an_empty_pool_dial_no_more_than_it_may_hold_and_nobody_starves() -> None:
    calls, threads = sized(10_000, 100_000), 64
    with RecordingServer() as server, natsync.ConnectionPool(server.url, min_size=0, max_size=16, timeout=30) as pool:
        waits: list[float] = []

        def call(number: int) -> None:
            begin = time.monotonic()
            with pool.connection() as client:
                waits.append(time.monotonic() - begin)
                client.publish("p.x")

        with ThreadPoolExecutor(threads) as callers:
            for _ in callers.map(call, range(calls)):
                pass
        waits.sort()
        print(f"{calls} calls, {threads} threads: p50 {waits[calls // 2]:.6f} s, p99 {waits[calls * 99 // 100]:.6f} s")
        assert len(waits) == calls
        assert server.accepted <= 16
        assert waits[-1] < 10
        stats = pool.stats()
        assert (stats["leases"], stats["leased"], stats["waiting"], stats["timeouts"]) == (calls, 0, 0, 0)
        assert stats["longest_wait_seconds"] <= waits[-1]


def test_with_the_broker_down_the_dial_rate_is_bounded_and_it_is_found_again_at_once(make_nats_server: Make) -> None:
    tried: list[float] = []
    refuse = threading.Event()
    refuse.set()

    def script(peer: PeerConnection) -> None:
        tried.append(time.monotonic())
        if refuse.is_set():
            return
        peer.handshake()
        peer.recv_until_eof()

    with (
        ScriptedPeer(script) as peer,
        natsync.ConnectionPool(peer.url, min_size=0, max_size=16, timeout=1.5) as pool,
        ThreadPoolExecutor(32) as callers,
    ):
        begin = time.monotonic()
        failing = [callers.submit(pool.publish, "p.x") for _ in range(32)]
        for one in failing:
            with pytest.raises(natsync.PoolTimeout, match="0 of 16 leased") as caught:
                one.result(PATIENCE)
            assert isinstance(caught.value, natsync.NoServersError)
        assert 1.4 < time.monotonic() - begin < 1.5 + PATIENCE
        seconds = time.monotonic() - begin
        # At the quickest: 0.05, 0.1, 0.2, 0.4 s after each other, then every half second.
        assert 3 <= len(tried) <= 6 + seconds / (keeper.LONGEST_WAIT_SECONDS / 2)

        def publish() -> None:
            with pool.connection(PATIENCE) as client:
                client.publish("p.x")

        waiting = [callers.submit(publish) for _ in range(32)]
        refuse.clear()
        back = time.monotonic()
        for one in waiting:
            one.result(PATIENCE)
        assert time.monotonic() - back < 8
        assert pool.stats()["dials_failed"] <= len(tried)


def test_traffic_leaves_a_flapping_broker_and_comes_back(
    make_nats_server: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady, flapping = make_nats_server(), make_nats_server()
    with natsync.ConnectionPool(
        [steady.url, flapping.url], min_size=4, max_size=4, max_lifetime=0.6, discover=False, timeout=PATIENCE
    ) as pool:

        def share() -> int:
            """How many connections the flapping one has."""
            servers = pool.stats()["servers"]
            assert set(servers) == {steady.url, flapping.url}
            return int(servers[flapping.url]["connections"])

        pool.wait(PATIENCE)
        eventually(lambda: share() == 2, PATIENCE)
        for _ in range(3):
            flapping.kill()
            eventually(lambda: share() == 0, PATIENCE)
            assert pool.stats()["servers"][flapping.url]["health_points"] > health.EQUAL_POINTS
            flapping.start()
            pool.wait(PATIENCE)
            assert share() == 0
            for _ in range(50):
                with pool.connection() as client:
                    client.flush()
        monkeypatch.setattr(health, "HALF_LIFE_SECONDS", 0.1)  # time passes
        eventually(lambda: share() == 2, PATIENCE)  # as lifetimes end
        assert pool.stats()["lost"] >= 1


def test_a_fault_of_the_pools_own_thread_is_no_end(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads may run out for a moment: the next caller, or the next look, asks again."""
    asked = []

    def refused(function: Callable[[], object], what: str) -> None:
        asked.append(what)

    with monkeypatch.context() as patch:
        patch.setattr(keeper, "run_soon", refused)
        pool = natsync.ConnectionPool(nats_server.url, min_size=0, timeout=0.1)
        with pytest.raises(natsync.PoolTimeout):
            pool.getconn()
        assert asked
    pool._keeper._asked = False
    with pool.connection(PATIENCE) as client:
        client.flush()
    pool.close()


# -- everything at once ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_no_lease_is_lost_or_given_to_two_whatever_happens(make_nats_server: Make, seed: int) -> None:
    """32 threads at random: borrow, return, break, drop, check, time out; NATSYNC_ENDURANCE=full takes a minute."""
    servers = [make_nats_server(), make_nats_server()]
    over = time.monotonic() + sized(4, 60)
    held: set[int] = set()
    lock = threading.Lock()
    faults: list[str] = []
    with natsync.ConnectionPool(
        [server.url for server in servers],
        min_size=2, max_size=8, max_idle=0.2, max_lifetime=1.0, timeout=PATIENCE, reconnect_wait=0.02, discover=False,
    ) as pool:  # fmt: skip

        def look() -> None:
            stats = pool.stats()
            if stats["size"] != stats["idle"] + stats["leased"] or not 0 <= stats["size"] + stats["dialing"] <= 8:
                faults.append(f"{stats}")
            if not 0 <= stats["dialing"] <= 1:
                faults.append(f"{stats}")

        def take(client: natsync.Client) -> None:
            with lock:
                if id(client._core) in held:
                    faults.append("lent to two")
                held.add(id(client._core))

        def give(client: natsync.Client) -> None:
            with lock:
                held.discard(id(client._core))

        def work(number: int) -> int:
            chance = random.Random(f"{seed} {number}")
            done = 0
            while time.monotonic() < over:
                timeout = chance.choice([0, 0.001, 0.01, PATIENCE])
                kind = chance.randrange(20)
                try:
                    if kind == 0:
                        pool.check(0.5)
                    elif kind < 10:
                        with pool.connection(timeout) as client:
                            take(client)
                            if chance.randrange(8) == 0:
                                client.close(0)
                            elif chance.randrange(4) == 0:
                                client.publish("p.x")
                            give(client)
                    else:
                        client = pool.getconn(timeout)
                        take(client)
                        give(client)
                        if chance.randrange(10):
                            pool.putconn(client)
                        del client  # dropped, one in ten
                    done += 1
                except (natsync.PoolTimeout, natsync.ConnectError, natsync.ConnectionClosed, natsync.TimedOut):
                    pass
                look()
            return done

        def flap() -> None:
            chance = random.Random(f"{seed} flap")
            while time.monotonic() < over:
                server = chance.choice(servers)
                server.kill()
                threading.Event().wait(chance.uniform(0.01, 0.2))
                server.start()
                threading.Event().wait(chance.uniform(0.2, 0.6))

        with ThreadPoolExecutor(33) as threads:
            flapping = threads.submit(flap)
            working = [threads.submit(work, number) for number in range(32)]
            for one in working:
                assert one.result(sized(30, 120)) > 0
            flapping.result(PATIENCE)
        gc.collect()
        assert faults == []
        eventually(lambda: (pool.stats()["leased"], pool.stats()["waiting"]) == (0, 0), PATIENCE)
        clients = [pool.getconn(PATIENCE) for _ in range(8)]  # all places can be had
        assert len({id(client._core) for client in clients}) == 8
        with pytest.raises(natsync.PoolTimeout):
            pool.getconn(0)
        for client in clients:
            client.flush()
            pool.putconn(client)
