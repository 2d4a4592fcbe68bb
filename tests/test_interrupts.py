"""Ctrl-C and SystemExit in every wait: the exception comes out, and everything is as usable as before.

A real signal hits the main thread while it waits: another thread sends it once the main thread has stood still, at one
instruction of one frame, for several looks. The storms send hundreds at random moments of a loop. What a handler of
signals raises is a KeyboardInterrupt, or a SystemExit as of gunicorn's sync worker.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest

import natsync
from natsync.testing import NatsServer, ScriptedPeer, eventually
from support import natsync_threads, run_python, thread_frames

#: Looks in a row that find the main thread at the same instruction: then it waits there.
LOOKS = 5
#: Seconds between them.
PAUSE = 0.004
#: Seconds within which a wait must be reached, and left.
PATIENCE = 20.0
#: Seconds between two signals of a storm at most, on an idle machine.
GAP = 0.003
#: Signals of a storm.
SIGNALS = int(os.environ.get("NATSYNC_SIGNALS", "300"))

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system cannot send a signal to a thread"),
    pytest.mark.threads_gone(PATIENCE + 5),  # an interrupted call's deadline may stand until it comes
]


class Interruption(BaseException):
    """Neither of those: any exception may come out of a signal handler."""


ERRORS = [KeyboardInterrupt, SystemExit, Interruption]


class _Interrupter:
    """Sends one signal to the main thread once it waits, and tells where that was."""

    def __init__(self, number: signal.Signals, place: str, when: Callable[[], bool]) -> None:
        self.where: list[str] = []
        self._number = number
        self._place = place
        self._when = when
        self._main = threading.main_thread().ident or 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="interrupter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(PATIENCE)

    def _watch(self) -> None:
        last, same = (0, -1), 0
        while not self._over.wait(PAUSE):
            frame: FrameType | None = thread_frames()[self._main]
            place = (id(frame), frame.f_lasti if frame else -1)
            stack = []
            while frame is not None:
                stack.append(frame.f_code.co_name)
                frame = frame.f_back
            # Only in what the test called, so that the harness itself is never hit.
            inside = stack[: stack.index("waiting_call")] if "waiting_call" in stack else []
            self.where = inside or self.where
            same = same + 1 if place == last and self._place in inside and self._when() else 0
            last = place
            if same == LOOKS:
                signal.pthread_kill(self._main, self._number)
                return


def waiting_call(call: Callable[[], object]) -> object:
    """The call that is to be interrupted; known by its name on the stack."""
    return call()


def interrupted(
    call: Callable[[], object],
    error: type[BaseException],
    place: str,
    number: signal.Signals = signal.SIGINT,
    when: Callable[[], bool] = lambda: True,
) -> None:
    """The call waits in a function of this name, is interrupted there when it may be, and the error comes out of it."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise error("interrupted")

    interrupter = _Interrupter(number, place, when)
    former = signal.signal(number, handler)
    try:
        interrupter.start()
        with pytest.raises(error, match="interrupted"):
            waiting_call(call)
    except BaseException:
        print(f"it was to wait in {place}, and was last seen in {interrupter.where}")
        raise
    finally:
        interrupter.stop()
        signal.signal(number, former)


@pytest.fixture(params=ERRORS, ids=lambda error: error.__name__)
def error(request: pytest.FixtureRequest) -> type[BaseException]:
    kind: type[BaseException] = request.param
    return kind


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def responder(nats_server: NatsServer, release: threading.Event) -> Iterator[natsync.Subscriber]:
    subscriber = natsync.Subscriber(nats_server.url)
    subscriber.handler("i.echo")(lambda ctx, request: request.data)

    @subscriber.handler("i.hold")
    def hold(ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
        release.wait(PATIENCE)
        return b"held"

    @subscriber.stream("i.stream")
    def stream(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        for number in range(3):
            yield b"%d" % number
        while not release.wait(0.01):
            ctx.check()
        yield b"last"

    with subscriber:
        yield subscriber
        release.set()


@pytest.fixture
def client(nats_server: NatsServer) -> Iterator[natsync.Client]:
    with natsync.connect(nats_server.url, name="interrupted") as connected:
        yield connected


def works(client: natsync.Client) -> None:
    """The client answers each of its requests with its own reply, and nobody is left waiting."""
    for number in range(5):
        data = b"own %d" % number
        assert client.request("i.echo", data, timeout=PATIENCE).data == data
    assert client.stats()["waiting_replies"] == 0


# -- the client --------------------------------------------------------------------------------------------------------


def test_a_request(client: natsync.Client, responder: natsync.Subscriber, error: type[BaseException]) -> None:
    interrupted(lambda: client.request("i.hold", timeout=PATIENCE), error, "request")
    works(client)


def test_a_retrying_request(client: natsync.Client, responder: natsync.Subscriber, error: type[BaseException]) -> None:
    """While it waits for another try."""
    policy = natsync.Retry(initial=30, maximum=30, jitter=False)
    interrupted(lambda: client.request("i.nobody", timeout=None, retry=policy), error, "sleep")
    works(client)


def test_a_streams_next(
    client: natsync.Client, responder: natsync.Subscriber, release: threading.Event, error: type[BaseException]
) -> None:
    """The stream goes on: what comes then is the next chunk."""
    stream = client.stream("i.stream", timeout=PATIENCE)
    assert [stream.next(PATIENCE) for _ in range(3)] == [b"0", b"1", b"2"]
    interrupted(stream.next, error, "next")
    assert client.stats()["waiting_replies"] == 1
    release.set()
    assert list(stream) == [b"last"]
    works(client)


def test_a_streams_iteration(
    client: natsync.Client, responder: natsync.Subscriber, release: threading.Event, error: type[BaseException]
) -> None:
    stream = client.stream("i.stream", timeout=PATIENCE)
    chunks: list[bytes] = []

    def iterate() -> None:
        for chunk in stream:
            chunks.append(chunk)

    interrupted(iterate, error, "__next__", when=lambda: len(chunks) == 3)
    release.set()
    assert [*chunks, *stream] == [b"0", b"1", b"2", b"last"]
    works(client)


def test_a_stream_in_a_block_is_cancelled(
    client: natsync.Client, responder: natsync.Subscriber, error: type[BaseException]
) -> None:
    def iterate() -> None:
        with client.stream("i.stream", timeout=PATIENCE) as stream:
            for _ in stream:
                pass

    interrupted(iterate, error, "__next__")
    eventually(lambda: responder.stats()["active"] == 0, PATIENCE)
    works(client)


def test_a_stream_request(client: natsync.Client, responder: natsync.Subscriber, error: type[BaseException]) -> None:
    interrupted(lambda: client.stream_request("i.stream", b"", lambda message: None), error, "stream_request")
    eventually(lambda: responder.stats()["active"] == 0, PATIENCE)
    works(client)


def test_a_subscriptions_next(
    client: natsync.Client, responder: natsync.Subscriber, error: type[BaseException]
) -> None:
    with client.subscribe("i.sub") as subscription:
        interrupted(subscription.next, error, "next")
        client.publish("i.sub", b"after")
        assert subscription.next(PATIENCE).data == b"after"
        assert (subscription.delivered, subscription.dropped) == (1, 0)
    works(client)


def test_a_subscriptions_iteration(
    client: natsync.Client, responder: natsync.Subscriber, error: type[BaseException]
) -> None:
    with client.subscribe("i.sub") as subscription:
        interrupted(lambda: list(subscription), error, "__next__")
        client.publish("i.sub", b"after")
        assert next(iter(subscription)).data == b"after"
    works(client)


def test_a_subscriptions_drain(
    client: natsync.Client, responder: natsync.Subscriber, release: threading.Event, error: type[BaseException]
) -> None:
    """While it waits for a callback; drained again, it is done."""
    subscription = client.subscribe("i.sub", lambda message: release.wait(PATIENCE))
    client.publish("i.sub", b"x")
    eventually(lambda: subscription.delivered == 1)
    interrupted(lambda: subscription.drain(None), error, "drain")
    release.set()
    subscription.drain(PATIENCE)
    works(client)


@pytest.mark.parametrize("verb", ["flush", "rtt"])
def test_a_round_trip(verb: str, make_nats_server: Callable[..., NatsServer], error: type[BaseException]) -> None:
    server = make_nats_server()
    with natsync.connect(server.url) as client, client.subscribe("i.sub") as subscription:
        client.flush()
        server.pause()
        try:
            client.publish("i.sub", b"x")
            interrupted(lambda: getattr(client, verb)(None), error, "flush")
        finally:
            server.resume()
        assert subscription.next(PATIENCE).data == b"x"
        assert getattr(client, verb)(PATIENCE) is not False


def test_a_publish_that_waits_for_room(make_nats_server: Callable[..., NatsServer], error: type[BaseException]) -> None:
    """What was published before arrives, whole and in order; of the one cut short there is all or nothing."""
    server = make_nats_server()
    block = bytes(1 << 20)
    sent: list[int] = []
    with natsync.connect(server.url) as client, natsync.connect(server.url) as other:
        with other.subscribe("i.full", pending_bytes=1 << 30) as subscription:
            other.flush()
            server.pause()

            def publish() -> None:
                while True:
                    client.publish("i.full", b"%08d" % len(sent) + block[8:])
                    sent.append(len(sent))

            try:
                interrupted(publish, error, "wait_room")
            finally:
                server.resume()
            client.publish("i.full", b"the end")
            client.flush(PATIENCE)
            got = []
            while (message := subscription.next(PATIENCE)).data != b"the end":
                assert len(message.data) == len(block)
                got.append(int(message.data[:8]))
    assert got in (sent, [*sent, len(sent)])


def test_a_drain(nats_server: NatsServer, release: threading.Event, error: type[BaseException]) -> None:
    client = natsync.connect(nats_server.url)
    subscription = client.subscribe("i.drain", lambda message: release.wait(PATIENCE))
    client.publish("i.drain", b"x")
    eventually(lambda: subscription.delivered == 1)
    interrupted(lambda: client.drain(None), error, "drain")
    release.set()
    client.drain(PATIENCE)
    assert client.status == "closed"


def test_a_close(nats_server: NatsServer, release: threading.Event, error: type[BaseException]) -> None:
    """While it waits for a callback; closed again, nothing is left of it."""
    before = natsync_threads()
    client = natsync.connect(nats_server.url)
    subscription = client.subscribe("i.close", lambda message: release.wait(PATIENCE))
    client.publish("i.close", b"x")
    eventually(lambda: subscription.delivered == 1)
    interrupted(lambda: client.close(None), error, "close")
    release.set()
    begin = time.monotonic()
    client.close(PATIENCE)
    assert client.status == "closed"
    assert time.monotonic() - begin < PATIENCE / 2
    eventually(lambda: natsync_threads() <= before)


@pytest.mark.parametrize("verb", ["open", "publish", "request", "flush"])
def test_the_first_connecting(verb: str, nats_server: NatsServer, error: type[BaseException]) -> None:
    """The walk over the servers goes on without the one who waited; the next use waits for it."""
    go_on = threading.Event()
    with ScriptedPeer(lambda peer: (go_on.wait(PATIENCE), peer.handshake(), peer.recv_until_eof())) as peer:
        client = natsync.Client(peer.url, connect_timeout=PATIENCE)
        verbs: dict[str, Callable[[], object]] = {
            "open": client.open,
            "publish": lambda: client.publish("i.x", b"x"),
            "request": lambda: client.request("i.x", timeout=PATIENCE),
            "flush": lambda: client.flush(PATIENCE),
        }
        interrupted(verbs[verb], error, "ensure_open", when=lambda: client.status == "connecting")
        assert client.status == "connecting"
        go_on.set()
        client.open(PATIENCE)
        assert client.status == "connected"
        client.close(0)


# -- the pool ----------------------------------------------------------------------------------------------------------


def balanced(pool: natsync.ConnectionPool, size: int) -> None:
    """Nothing is lent, nobody waits, and all places can be had at once."""
    eventually(lambda: (pool.stats()["leased"], pool.stats()["waiting"]) == (0, 0), PATIENCE)
    with contextlib.ExitStack() as stack:
        for _ in range(size):
            stack.enter_context(pool.connection(PATIENCE))
        assert pool.stats()["leased"] == size
    assert (pool.stats()["leased"], pool.stats()["idle"]) == (0, size)


@pytest.mark.parametrize("verb", ["connection", "getconn", "request", "stream"])
def test_a_wait_for_a_pools_connection(
    verb: str, nats_server: NatsServer, responder: natsync.Subscriber, error: type[BaseException]
) -> None:
    with natsync.ConnectionPool(nats_server.url, max_size=2, timeout=PATIENCE) as pool:
        verbs: dict[str, Callable[[], object]] = {
            "connection": lambda: pool.connection().__enter__(),
            "getconn": pool.getconn,
            "request": lambda: pool.request("i.echo", timeout=PATIENCE),
            "stream": lambda: pool.stream("i.stream"),
        }
        clients = [pool.getconn(), pool.getconn()]
        interrupted(verbs[verb], error, "_wait_turn")
        for client in clients:
            pool.putconn(client)
        balanced(pool, 2)


@pytest.mark.parametrize("verb", ["connection", "getconn", "wait"])
def test_a_pools_dialing(verb: str, error: type[BaseException]) -> None:
    """The place of a connection that was being made is free again."""
    go_on = threading.Event()
    with ScriptedPeer(lambda peer: (go_on.wait(PATIENCE), peer.handshake(), peer.recv_until_eof())) as peer:
        with natsync.ConnectionPool(peer.url, max_size=1, timeout=PATIENCE, connect_timeout=PATIENCE) as pool:
            verbs: dict[str, Callable[[], object]] = {
                "connection": lambda: pool.connection().__enter__(),
                "getconn": pool.getconn,
                "wait": pool.wait,
            }
            interrupted(verbs[verb], error, "wait" if verb == "wait" else "_wait_turn")
            go_on.set()
            client = pool.getconn()
            assert pool.stats()["leased"] == 1
            client.close(0)
            pool.putconn(client)


def test_a_request_on_a_pools_connection(
    nats_server: NatsServer, responder: natsync.Subscriber, error: type[BaseException]
) -> None:
    with natsync.ConnectionPool(nats_server.url, max_size=1) as pool:
        interrupted(lambda: pool.request("i.hold", timeout=PATIENCE), error, "request")
        balanced(pool, 1)
        assert pool.request("i.echo", b"own").data == b"own"


def test_a_pools_close(nats_server: NatsServer, error: type[BaseException]) -> None:
    pool = natsync.ConnectionPool(nats_server.url, max_size=1)
    client = pool.getconn()
    interrupted(lambda: pool.close(None), error, "close")
    pool.putconn(client)
    pool.close(PATIENCE)
    assert pool.stats()["leased"] == pool.stats()["idle"] == 0
    assert client.status == "closed"


# -- the responding side -----------------------------------------------------------------------------------------------


def test_a_senders_send_that_waits_for_room(
    make_nats_server: Callable[..., NatsServer], mode: str, error: type[BaseException]
) -> None:
    """A handler may hand its sender to the main thread: what is sent behind the interrupted chunk is in order."""
    server = make_nats_server()
    senders: list[natsync.ResponseSender] = []
    block = bytes(1 << 20)
    sent: list[int] = []
    framed = mode == "framed"
    with natsync.Subscriber(server.url) as subscriber, natsync.connect(server.url, framed=framed) as client:
        subscriber.stream_subscribe("i.full", lambda ctx, request, sender: senders.append(sender))
        stream = client.stream("i.full", timeout=PATIENCE)
        eventually(lambda: senders, PATIENCE)
        server.pause()

        def send() -> None:
            while True:
                senders[0].send(b"%08d" % len(sent) + block[8:])
                sent.append(len(sent))

        try:
            interrupted(send, error, "_wait_room" if framed else "wait_room")
        finally:
            server.resume()
        with ThreadPoolExecutor() as pool:
            taken = pool.submit(list, stream)
            assert senders[0].end(wait=PATIENCE)
            assert [int(chunk[:8]) for chunk in taken.result(PATIENCE)] in (sent, [*sent, len(sent)])


def test_a_contexts_wait(error: type[BaseException]) -> None:
    ctx = natsync.Context()
    called: list[str] = []
    ctx.on_cancel(lambda: called.append("cancelled"))
    interrupted(ctx.wait, error, "wait")
    assert not ctx.wait(0)
    other = threading.Thread(target=ctx.cancel)
    other.start()
    assert ctx.wait(PATIENCE)
    other.join(PATIENCE)
    assert called == ["cancelled"]


def test_a_handles_wait(
    nats_server: NatsServer, client: natsync.Client, responder: natsync.Subscriber, error: type[BaseException]
) -> None:
    handle = responder.subscribe("i.handle", lambda message: None)
    interrupted(handle.wait, error, "wait")
    assert not handle.stopped
    handle.stop(PATIENCE)
    assert handle.wait(PATIENCE)


@pytest.mark.parametrize("verb", ["stop", "close", "drain"])
def test_the_end_of_a_subscriber(
    verb: str, nats_server: NatsServer, client: natsync.Client, release: threading.Event, error: type[BaseException]
) -> None:
    """While it waits for a handler; asked again, it is done, and the request under way has been answered."""
    before = natsync_threads()
    subscriber = natsync.Subscriber(nats_server.url)
    begun = threading.Event()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        begun.set()
        release.wait(PATIENCE)
        yield b"done"

    handle = subscriber.stream_subscribe("i.end", handler)
    stream = client.stream("i.end", timeout=PATIENCE)
    assert begun.wait(PATIENCE)
    verbs: dict[str, Callable[[], object]] = {
        "stop": lambda: handle.stop(None),
        "close": lambda: subscriber.close(None),
        "drain": lambda: subscriber.drain(None),
    }
    interrupted(verbs[verb], error, "wait_idle")
    release.set()
    assert list(stream) == [b"done"]
    verbs[verb]()
    assert handle.wait(PATIENCE)
    begin = time.monotonic()
    subscriber.close(PATIENCE)
    assert time.monotonic() - begin < PATIENCE / 2
    assert subscriber.status == "closed"
    eventually(lambda: natsync_threads() <= before)


def test_the_opening_of_a_subscriber_with_handlers(
    make_nats_server: Callable[..., NatsServer], error: type[BaseException]
) -> None:
    """Each handler is registered once, by whichever open() comes to it."""
    server = make_nats_server()
    subscriber = natsync.Subscriber(server.url, connect_timeout=PATIENCE)
    for name in ("i.first", "i.second"):
        subscriber.handler(name)(lambda ctx, request: request.subject)
    subscriber._opened()
    server.pause()
    interrupted(subscriber.open, error, "flush")
    server.resume()
    subscriber.open()
    assert sorted(handle.subject for handle in subscriber.handles) == ["i.first", "i.second"]
    with natsync.connect(server.url) as asking:
        for name in ("i.first", "i.second"):
            assert asking.request(name, timeout=PATIENCE).text() == name
    subscriber.close()


def test_serve_forever(nats_server: NatsServer, client: natsync.Client, error: type[BaseException]) -> None:
    """By another signal than the two that it answers to: the subscriber stays open, and serves on when asked again."""
    subscriber, live = natsync.Subscriber(nats_server.url), threading.Event()
    subscriber.handler("i.serve")(lambda ctx, request: b"served")
    interrupted(lambda: subscriber.serve_forever(ready=live.set), error, "run", signal.SIGUSR1, when=live.is_set)
    assert client.request("i.serve", timeout=PATIENCE).data == b"served"
    subscriber.serve_forever(ready=lambda: signal.raise_signal(signal.SIGTERM))
    assert subscriber.status == "closed"


# -- storms ------------------------------------------------------------------------------------------------------------


class Storm:
    """Signals at random moments of what attempt() calls, one at most in each call.

    They come further apart while fewer than one call in ten comes to its end: a fixed rate would let none do so on a
    busy machine.
    """

    def __init__(self, seed: int) -> None:
        self.hits = 0
        self._gap = GAP
        self._armed = False
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._rain, name="storm", daemon=True)

    def __enter__(self) -> Storm:
        self._former = signal.signal(signal.SIGINT, self._handle)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(PATIENCE)
        signal.signal(signal.SIGINT, self._former)

    def _rain(self) -> None:
        main = threading.main_thread().ident or 0
        while not self._over.wait(self._random.uniform(0, self._gap)):
            signal.pthread_kill(main, signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            self.hits += 1
            raise KeyboardInterrupt

    def attempt(self, call: Callable[[], object]) -> bool:
        """Whether the call came to its end."""
        try:
            self._armed = True
            call()
            self._armed = False
        except KeyboardInterrupt:
            self._gap *= 1.02
            return False
        self._gap = max(GAP, self._gap * 0.82)
        return True

    def rage(self, call: Callable[[], object]) -> None:
        """Call it until enough signals have hit it, and until it has come to its end often enough too."""
        ended = 0
        deadline = time.monotonic() + 2 * PATIENCE
        while self.hits < SIGNALS or ended < SIGNALS // 10:
            assert time.monotonic() < deadline, f"{self.hits} hits, {ended} ends"
            ended += self.attempt(call)


storm = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a hit inside a finalizer
seeds = pytest.mark.parametrize("seed", [int(os.environ.get("NATSYNC_SEED", "1"))])


@storm
@seeds
def test_a_storm_over_requests(client: natsync.Client, responder: natsync.Subscriber, seed: int) -> None:
    numbers = iter(range(1 << 30))

    def request() -> None:
        data = b"%d" % next(numbers)
        assert client.request("i.echo", data, timeout=PATIENCE).data == data

    with Storm(seed) as raging:
        raging.rage(request)
    works(client)
    assert client.stats()["reconnects"] == 0


@storm
@seeds
def test_a_storm_over_streams(client: natsync.Client, responder: natsync.Subscriber, seed: int) -> None:
    responder.stream_subscribe("i.short", lambda ctx, request: iter([b"0", b"1", b"2"]))

    def stream() -> None:
        with client.stream("i.short", timeout=PATIENCE) as answer:
            assert list(answer) == [b"0", b"1", b"2"]

    with Storm(seed) as raging:
        raging.rage(stream)
    gc.collect()
    eventually(lambda: client.stats()["waiting_replies"] == 0, PATIENCE)
    eventually(lambda: responder.stats()["active"] == responder.stats()["streams"] == 0, PATIENCE)
    works(client)
    assert client.stats()["reconnects"] == 0


@storm
@seeds
def test_a_storm_over_a_pool(nats_server: NatsServer, responder: natsync.Subscriber, seed: int) -> None:
    """While other threads, whom nobody interrupts, want the same connections."""
    over = threading.Event()
    failures: list[BaseException] = []

    with natsync.ConnectionPool(nats_server.url, max_size=2, timeout=PATIENCE) as pool:

        def others() -> None:
            try:
                while not over.is_set():
                    with pool.connection() as lent:
                        assert lent.request("i.echo", b"other", timeout=PATIENCE).data == b"other"
            except BaseException as failure:
                failures.append(failure)

        def borrow() -> None:
            with pool.connection() as lent:
                assert lent.request("i.echo", b"own", timeout=PATIENCE).data == b"own"
            assert pool.request("i.echo", b"own", timeout=PATIENCE).data == b"own"

        threads = [threading.Thread(target=others) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            with Storm(seed) as raging:
                raging.rage(borrow)
        finally:
            over.set()
            for thread in threads:
                thread.join(PATIENCE)
        assert not failures
        gc.collect()
        balanced(pool, 2)


@storm
@seeds
def test_a_storm_over_a_subscription(client: natsync.Client, responder: natsync.Subscriber, seed: int) -> None:
    with client.subscribe("i.storm") as subscription:

        def take() -> None:
            client.publish("i.storm", b"x")
            subscription.next(PATIENCE)

        with Storm(seed) as raging:
            raging.rage(take)
        client.flush(PATIENCE)
        while subscription.pending:
            subscription.next(0)
        client.publish("i.storm", b"after")
        assert subscription.next(PATIENCE).data == b"after"
    works(client)
    assert client.stats()["reconnects"] == 0


@storm
@seeds
def test_a_storm_over_flushes_and_contexts(client: natsync.Client, responder: natsync.Subscriber, seed: int) -> None:
    def use() -> None:
        with natsync.Context().with_timeout(PATIENCE) as ctx:
            ctx.wait(0.0005)
            client.publish("i.nobody", b"x")
            client.flush(PATIENCE)
            client.request("i.echo", b"x", timeout=PATIENCE, ctx=ctx)

    with Storm(seed) as raging:
        raging.rage(use)
    works(client)
    assert client.stats()["reconnects"] == 0


# -- the interpreter's end ---------------------------------------------------------------------------------------------

LEAVE = """
import sys, threading
import natsync
from natsync.testing import eventually

client, pool = natsync.connect(sys.argv[1]), natsync.ConnectionPool(sys.argv[1], max_size=1)
subscriber, ctx = natsync.Subscriber(sys.argv[1]), natsync.Context()
asked = threading.Event()
handle = subscriber.stream_subscribe("i.leave", lambda ctx, request, sender: (asked.set(), ctx.wait()))
subscription, lent, stream = client.subscribe("i.leave.sub"), pool.getconn(), client.stream("i.leave")
waits = [
    lambda: client.request("i.leave.held", timeout=None), subscription.next, lambda: list(subscription), stream.next,
    pool.getconn, ctx.wait, handle.wait, lambda: handle.stop(None), lambda: held.drain(None),
]
holding = threading.Event()
held = client.subscribe("i.leave.held", lambda message: (holding.set(), ctx.wait()))
assert asked.wait(30)  # else handle.stop() may come before the request
begun = []
for wait in waits:
    threading.Thread(target=lambda wait=wait: (begun.append(wait), wait()), daemon=True).start()
    assert wait is not waits[0] or holding.wait(30)  # else held.drain() may come before the request
eventually(lambda: len(begun) == len(waits))
print("leaving", flush=True)
"""


def test_the_interpreter_leaves_while_threads_wait(nats_server: NatsServer) -> None:
    done = run_python(LEAVE, nats_server.url)
    assert (done.returncode, done.stdout) == (0, "leaving\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert "Fatal" not in done.stderr
