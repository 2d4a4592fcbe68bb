"""Many greenlets at once on one client; gevent_job.py runs this with everything monkey-patched.

Without gevent the same is run with threads: fewer of them, and nothing else changes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import natsync
from natsync.testing import NatsServer, eventually
from test_forks import gunicorn, responder, server  # noqa: F401 (fixtures)

#: Seconds for all of them.
PATIENCE = 40.0


def patched() -> bool:
    """Whether threads are greenlets."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


#: How many at once.
MANY = 1000 if patched() else 100


@pytest.fixture
def subscriber(nats_server: NatsServer) -> Iterator[natsync.Subscriber]:
    with natsync.Subscriber(nats_server.url, max_streams=2 * MANY, max_workers=MANY) as opened:
        opened.handler("g.echo")(lambda ctx, request: request.data)

        @opened.stream("g.count")
        def count(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
            for number in range(5):
                ctx.wait(0.001)  # so that all of them are under way at once
                yield b"%b %d" % (request.data, number)

        yield opened


@pytest.fixture
def client(nats_server: NatsServer) -> Iterator[natsync.Client]:
    with natsync.connect(nats_server.url) as connected:
        yield connected


def all_at_once(function: Callable[[int], None]) -> None:
    """MANY threads, which begin together, call the function with their number."""
    failures: list[BaseException] = []
    done: list[int] = []
    gate = threading.Event()

    def run(number: int) -> None:
        try:
            gate.wait(PATIENCE)
            function(number)
            done.append(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(MANY)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert not failures, failures[0]
    assert sorted(done) == list(range(MANY))


def test_many_requests_at_once_each_get_their_own_answer(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    def ask(number: int) -> None:
        for attempt in range(3):
            data = b"%d.%d" % (number, attempt)
            assert client.request("g.echo", data, timeout=PATIENCE).data == data

    all_at_once(ask)
    assert client.stats()["waiting_replies"] == 0


def test_many_streams_at_once_are_complete(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    def read(number: int) -> None:
        data = b"%d" % number
        chunks = list(client.stream("g.count", data, timeout=PATIENCE))
        assert chunks == [b"%b %d" % (data, count) for count in range(5)]

    all_at_once(read)
    eventually(lambda: client.stats()["waiting_replies"] == 0)
    eventually(lambda: subscriber.stats()["streams"] == 0)


def test_many_borrowers_of_a_pool_all_get_their_turn(nats_server: NatsServer, subscriber: natsync.Subscriber) -> None:
    with natsync.ConnectionPool(nats_server.url, max_size=4, timeout=PATIENCE) as pool:

        def borrow(number: int) -> None:
            with pool.connection() as lent:
                data = b"%d" % number
                assert lent.request("g.echo", data, timeout=PATIENCE).data == data

        all_at_once(borrow)
        assert (pool.stats()["leased"], pool.stats()["waiting"]) == (0, 0)


def test_one_that_waits_keeps_nobody_else_from_going_on(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    """A read that never comes, in one thread; PINGs, timers and requests go on in the others."""
    quiet = client.subscribe("g.quiet")
    waiting = threading.Thread(target=lambda: quiet.next(PATIENCE), daemon=True)
    waiting.start()
    with natsync.Context().with_timeout(0.1) as ctx:
        assert ctx.wait(PATIENCE)
    assert client.request("g.echo", b"x", timeout=PATIENCE).data == b"x"
    client.publish("g.quiet", b"at last")
    waiting.join(PATIENCE)
    assert not waiting.is_alive()


if patched():  # elsewhere there is no gevent for gunicorn to use

    @pytest.mark.parametrize("used", ["no", "yes"], ids=["only-imported", "used-before"])
    def test_gunicorns_gevent_worker_uses_a_preloaded_client(
        used: str,
        server: NatsServer,
        responder: natsync.Subscriber,
        tmp_path: Path,
    ) -> None:
        """It patches threading in the worker, when natsync has long been imported."""
        with gunicorn("gevent", used, server, tmp_path) as web:
            numbers = web.workers()
            assert len(set(numbers.values())) == 2
