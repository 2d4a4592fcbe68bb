"""The end of a context ends whatever a request under it waits for, before the request has left too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import natsync
from natsync.testing import NatsServer, eventually
from rawclient import PATIENCE

Ask = Callable[[natsync.Client, natsync.Context], object]

ASKING: dict[str, Ask] = {
    "request": lambda client, ctx: client.request("w.x", timeout=None, ctx=ctx),
    "request with Retry": lambda client, ctx: client.request("w.x", timeout=None, retry=natsync.Retry(), ctx=ctx),
    "request_many": lambda client, ctx: client.request_many("w.x", timeout=None, ctx=ctx),
    "stream": lambda client, ctx: client.stream("w.x", ctx=ctx),
    "stream_request": lambda client, ctx: client.stream_request("w.x", b"", print, ctx=ctx),
}
every_verb = pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)


@pytest.fixture
def server(make_nats_server: Callable[..., NatsServer]) -> Iterator[NatsServer]:
    """It may be left frozen."""
    server = make_nats_server()
    yield server
    server.resume()


@pytest.fixture
def full(server: NatsServer) -> Iterator[natsync.Client]:
    """A client whose server is frozen, so that a publisher waits for room, for ever."""
    stopping = threading.Event()
    with natsync.connect(server.url, write_timeout=None, ping_interval=None) as client:

        def flood() -> None:
            while not stopping.is_set():
                client.publish("w.flood", bytes(60_000))

        def stuck() -> bool:
            before = client.stats()["out_bytes"]
            return waiting(client) == 1 and not stopping.wait(0.5) and client.stats()["out_bytes"] == before  # type: ignore[no-any-return]

        server.pause()
        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            eventually(stuck, PATIENCE)
            yield client
        finally:
            stopping.set()
            server.resume()
            flooding.join()


def waiting(client: natsync.Client) -> int:
    """Threads that wait for room."""
    return client._connection()._outbox._publishers_wait


@every_verb
def test_a_cancelled_context_ends_the_wait_for_room_and_nothing_is_sent(
    server: NatsServer, full: natsync.Client, ask: Ask
) -> None:
    ctx = natsync.Context()
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(ask, full, ctx)
        try:
            eventually(lambda: waiting(full) == 2, PATIENCE)
            ctx.cancel("enough")
            with pytest.raises(natsync.Cancelled, match="enough"):
                asking.result(PATIENCE)
            assert waiting(full) == 1
        finally:
            server.resume()
    with natsync.connect(server.url) as other:
        heard = other.subscribe("w.x")
        other.flush()
        full.flush(PATIENCE)
        full.publish("w.x", b"the last")
        assert heard.next(PATIENCE).data == b"the last"
    assert full.stats()["waiting_replies"] == 0


@every_verb
def test_so_does_a_contexts_deadline(server: NatsServer, full: natsync.Client, ask: Ask) -> None:
    for _ in range(3):  # always by the same error, whoever finds it first
        with pytest.raises(natsync.DeadlineExceeded):
            ask(full, natsync.Context().with_timeout(0.05))


def test_a_wait_for_room_with_a_timeout_of_its_own_still_says_that_nothing_was_sent(full: natsync.Client) -> None:
    with natsync.Context().with_timeout(PATIENCE) as ctx, pytest.raises(natsync.RequestTimeout) as raised:
        full.request("w.x", timeout=0.05, ctx=ctx)
    assert raised.value.sent is False


@every_verb
def test_a_cancelled_context_ends_the_wait_for_the_first_link(server: NatsServer, ask: Ask) -> None:
    server.pause()
    client = natsync.Client(server.url, connect_timeout=6 * PATIENCE)
    ctx = natsync.Context()
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(ask, client, ctx)
        try:
            eventually(lambda: client.status == "connecting", PATIENCE)
            ctx.cancel("enough")
            with pytest.raises(natsync.Cancelled, match="enough"):
                asking.result(PATIENCE)
            with pytest.raises(natsync.DeadlineExceeded):
                ask(client, natsync.Context().with_timeout(0.05))
        finally:
            client.close(0)
