"""Generators that yield fast, and pause, fail, or are left. Both sides are natsync's, over a real nats-server."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import natsync
from broker import QUICK
from natsync.testing import NatsServer, eventually
from numbered import PATIENCE, plain
from support import framed_only

Chunks = Callable[[], Iterator[Any]]


@pytest.fixture
def client(nats_server: NatsServer) -> Iterator[natsync.Client]:
    with natsync.connect(nats_server.url, **QUICK) as client:
        yield client


@pytest.fixture
def serve(nats_server: NatsServer, mode: str) -> Iterator[Callable[[Chunks], natsync.Subscriber]]:
    """Answers at gen.x with what a generator yields."""
    with natsync.Subscriber(nats_server.url, framed=mode == "framed", **QUICK) as subscriber:

        def serve(chunks: Chunks) -> natsync.Subscriber:
            subscriber.stream_subscribe("gen.x", lambda ctx, request: chunks())
            subscriber.open()
            return subscriber

        yield serve


def test_all_chunks_of_a_fast_generator_arrive_in_order(
    client: natsync.Client, serve: Callable[[Chunks], natsync.Subscriber], mode: str
) -> None:
    serve(lambda: map(plain, range(1, 50_001)))
    for _ in range(3):
        assert list(client.stream("gen.x", timeout=PATIENCE)) == list(map(plain, range(1, 50_001)))


@framed_only
@pytest.mark.parametrize("window", [1, 2, 16, 100, 1000])
def test_a_generator_is_never_more_than_the_window_ahead(
    client: natsync.Client, serve: Callable[[Chunks], natsync.Subscriber], window: int
) -> None:
    yielded = 0

    def chunks() -> Iterator[bytes]:
        nonlocal yielded
        while yielded < 3_000:
            yielded += 1
            yield b"%d" % yielded

    serve(chunks)
    with client.stream("gen.x", window=window, timeout=PATIENCE) as stream:
        for number, chunk in enumerate(stream, 1):
            assert chunk == b"%d" % number
            assert yielded - number <= 2 * window + 1  # what is kept there, what is here, and one that waits for credit
    assert number == yielded == 3_000


@pytest.mark.parametrize("before", [0, 1, 17, 256, 3_000])
def test_a_pause_delays_no_chunk_before_it(
    client: natsync.Client, serve: Callable[[Chunks], natsync.Subscriber], before: int
) -> None:
    """The generator goes on only when the requester has everything that it has yielded, then for each chunk anew."""
    has = threading.Semaphore(0)

    def chunks() -> Iterator[bytes]:
        for number in range(before):
            yield b"%d" % number
        for number in range(before, before + 300):
            assert has.acquire(timeout=PATIENCE)
            yield b"%d" % number

    serve(chunks)
    with client.stream("gen.x", timeout=PATIENCE) as stream:
        for number in range(before):
            assert next(stream) == b"%d" % number
        for number in range(before, before + 300):
            has.release()
            assert next(stream) == b"%d" % number
        assert list(stream) == []


@pytest.mark.parametrize("kind", [bytes, str, bytearray, memoryview])
def test_each_chunk_is_what_it_was_when_it_was_yielded(
    client: natsync.Client, serve: Callable[[Chunks], natsync.Subscriber], kind: Any
) -> None:
    """A buffer may be filled anew behind the yield."""

    def chunks() -> Iterator[Any]:
        buffer = bytearray(8)
        for number in range(2_000):
            buffer[:] = b"%08d" % number
            yield buffer.decode() if kind is str else buffer if kind is bytearray else kind(buffer)

    serve(chunks)
    assert list(client.stream("gen.x", timeout=PATIENCE)) == [b"%08d" % number for number in range(2_000)]


@pytest.mark.parametrize("before", [0, 1, 16, 1_000])
def test_what_was_yielded_before_an_error_arrives_before_it(
    client: natsync.Client, serve: Callable[[Chunks], natsync.Subscriber], before: int
) -> None:
    closed: list[bool] = []

    def raising() -> Iterator[bytes]:
        yield from map(plain, range(before))
        raise ValueError("here it ends")

    def misshapen() -> Iterator[Any]:
        try:
            yield from map(plain, range(before))
            yield 5
        finally:
            closed.append(True)

    for chunks, text in ((raising, "here it ends"), (misshapen, "bytes-like or str")):
        subscriber = serve(chunks)
        taken: list[bytes] = []
        with pytest.raises(natsync.HandlerError, match=text):
            for chunk in client.stream("gen.x", timeout=PATIENCE):
                taken.append(chunk)
        assert taken == list(map(plain, range(before)))
        for handle in subscriber.handles:
            handle.stop(PATIENCE)
    assert closed == [True]


def test_a_dict_is_neither_an_answer_nor_a_chunk(
    client: natsync.Client, serve: Callable[[Chunks], natsync.Subscriber]
) -> None:
    """Iterated, it would be its keys."""
    for chunks, text in ((lambda: {"a": "1"}, "returned dict"), (lambda: [{"a": "1"}], "not dict")):
        subscriber = serve(chunks)  # type: ignore[arg-type]
        with pytest.raises(natsync.HandlerError, match=rf"{text}.*json\.dumps"):
            list(client.stream("gen.x", timeout=PATIENCE))
        for handle in subscriber.handles:
            handle.stop(PATIENCE)


def test_large_chunks_in_between_keep_their_place(
    client: natsync.Client, serve: Callable[[Chunks], natsync.Subscriber]
) -> None:
    sizes = [10, 300, 9_000, 70_000, 1, 200_000]
    expected = [b"%d " % number * (sizes[number % 6] if number % 50 == 0 else 1) for number in range(2_000)]
    expected += [bytes(sizes[number % 6]) + b"%d" % number for number in range(100)]
    serve(lambda: iter(expected))
    assert list(client.stream("gen.x", timeout=PATIENCE)) == expected


@pytest.mark.parametrize("taken", [0, 1, 500])
def test_a_requester_that_leaves_ends_a_fast_generator_at_once(
    client: natsync.Client, serve: Callable[[Chunks], natsync.Subscriber], taken: int
) -> None:
    closed: list[float] = []

    def endless() -> Iterator[bytes]:
        try:
            for number in itertools.count():
                yield b"%d" % number
        finally:
            closed.append(time.monotonic())

    subscriber = serve(endless)
    stream = client.stream("gen.x", timeout=PATIENCE)
    for number in range(taken):
        assert next(stream) == b"%d" % number
    eventually(lambda: subscriber.stats()["active"], PATIENCE)
    left = time.monotonic()
    stream.close()
    eventually(lambda: closed, PATIENCE)
    assert closed[0] - left < 5
    eventually(lambda: not subscriber.stats()["active"], PATIENCE)


@framed_only
def test_a_deadline_ends_a_fast_generator_with_what_was_sent_before(
    client: natsync.Client, serve: Callable[[Chunks], natsync.Subscriber]
) -> None:
    serve(lambda: map(plain, itertools.count()))
    taken: list[bytes] = []
    with pytest.raises(natsync.DeadlineExceeded):
        for chunk in client.stream("gen.x", timeout=1.0):
            taken.append(chunk)
    assert taken == list(map(plain, range(len(taken))))


def test_a_generator_that_has_a_sender_too_keeps_the_order_of_both(
    client: natsync.Client, nats_server: NatsServer
) -> None:
    def both(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> Iterator[bytes]:
        for number in range(0, 4_000, 2):
            sender.send(b"%d" % number)
            yield b"%d" % (number + 1)

    with natsync.Subscriber(nats_server.url, **QUICK) as subscriber:
        subscriber.stream_subscribe("gen.x", both)
        subscriber.open()
        chunks = list(client.stream("gen.x", timeout=PATIENCE))
    assert chunks == [b"%d" % number for number in range(4_000)]


def test_a_generators_sender_is_not_taken_for_dropped_when_it_ends(
    client: natsync.Client, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generator's own reference to it goes with its frame, before the end of the stream is sent."""
    dropped: list[str] = []
    gc.collect()  # those of other tests
    monkeypatch.setattr(natsync.ResponseSender, "__del__", lambda self: dropped.append(repr(self)))

    def both(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> Iterator[bytes]:
        yield b"one"

    with natsync.Subscriber(nats_server.url, **QUICK) as subscriber:
        subscriber.stream_subscribe("gen.x", both)
        subscriber.open()
        for _ in range(20):
            assert list(client.stream("gen.x", timeout=PATIENCE)) == [b"one"]
        eventually(lambda: len(dropped) >= 20, PATIENCE)
    assert [text for text in dropped if ": open" in text] == []
