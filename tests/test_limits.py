"""What a subscriber does when it has too much to do: it says so, to those whom it turns away."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import natsync
from natsync.streaming.subscriber import Subscriber
from natsync.testing import NatsServer, eventually
from rawclient import ERROR, PATIENCE, RawClient


@pytest.fixture
def subscriber(nats_server: NatsServer) -> Iterator[Subscriber]:
    with natsync.Subscriber(nats_server.url) as subscriber:
        yield subscriber


@pytest.fixture
def client(nats_server: NatsServer) -> Iterator[natsync.Client]:
    with natsync.Client(nats_server.url) as client:
        yield client


@pytest.fixture
def go_on() -> Iterator[threading.Event]:
    """Handlers wait for it."""
    event = threading.Event()
    yield event
    event.set()


def test_a_subject_has_a_limit_of_streams_of_its_own(
    client: natsync.Client, subscriber: Subscriber, go_on: threading.Event
) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"begun"
        go_on.wait(PATIENCE)

    few = subscriber.stream_subscribe("limit.few", handler, max_streams=2)
    subscriber.stream_subscribe("limit.many", handler)
    streams = [client.stream("limit.few") for _ in range(2)]
    assert [stream.next(PATIENCE) for stream in streams] == [b"begun"] * 2
    with pytest.raises(natsync.StreamRefused, match=r"too many streams on 'limit\.few': all 2 are in use") as caught:
        client.stream("limit.few").next(PATIENCE)
    assert caught.value.code == natsync.Code.RESOURCE_EXHAUSTED
    assert caught.value.retry_after is not None
    others = [client.stream("limit.many") for _ in range(5)]
    assert [stream.next(PATIENCE) for stream in others] == [b"begun"] * 5
    go_on.set()
    for stream in (*streams, *others):
        assert list(stream) == []
    eventually(lambda: few.stats["active"] == 0, PATIENCE)
    assert (few.stats["processed"], few.stats["dropped"]) == (2, 1)
    assert list(client.stream("limit.few")) == [b"begun"]


def test_the_limit_holds_for_plain_requesters_too_who_get_the_error_sentinel(
    nats_server: NatsServer, subscriber: Subscriber, go_on: threading.Event
) -> None:
    @subscriber.stream("limit.plain", max_streams=1)
    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"begun"
        go_on.wait(PATIENCE)

    with RawClient(nats_server.url) as raw:
        raw.request("limit.plain")
        assert raw.next().payload == b"begun"
        raw.request("limit.plain")
        assert raw.next().payload == ERROR + b"too many streams on 'limit.plain': all 1 are in use"


def test_requests_beyond_what_may_wait_are_answered_at_once_and_may_be_repeated(
    client: natsync.Client, subscriber: Subscriber, go_on: threading.Event
) -> None:
    begun = threading.Semaphore(0)

    @subscriber.handler("limit.work", max_workers=2, pending_messages=3)
    def work(ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
        begun.release()
        go_on.wait(PATIENCE)
        return request.data

    with ThreadPoolExecutor(8) as threads:
        served = [threads.submit(client.request, "limit.work", b"%d" % n, timeout=PATIENCE) for n in range(2)]
        for _ in range(2):
            assert begun.acquire(timeout=PATIENCE)
        served += [threads.submit(client.request, "limit.work", b"%d" % n, timeout=PATIENCE) for n in range(2, 5)]
        (handle,) = subscriber.handles
        eventually(lambda: len(handle._core._pending) == 3, PATIENCE)
        with pytest.raises(natsync.HandlerError, match=r"too many requests wait on 'limit\.work'") as caught:
            client.request("limit.work", b"5", timeout=PATIENCE)
        assert caught.value.code == 429
        with pytest.raises(natsync.StreamRefused, match=r"too many requests wait on 'limit\.work'"):
            client.stream("limit.work", b"6").next(PATIENCE)
        retry = natsync.Retry(attempts=None, initial=0.01, maximum=0.01)
        again = threads.submit(client.request, "limit.work", b"7", timeout=PATIENCE, retry=retry)
        eventually(lambda: handle.stats["dropped"] >= 4, PATIENCE)
        go_on.set()
        assert [one.result(PATIENCE).data for one in served] == [b"%d" % n for n in range(5)]
        assert again.result(PATIENCE).data == b"7"
    eventually(lambda: handle.stats["processed"] == 6, PATIENCE)  # counted behind the answer


def test_a_stream_of_replies_beyond_the_limit_of_bytes_is_told_too(
    nats_server: NatsServer, client: natsync.Client, go_on: threading.Event
) -> None:
    with natsync.Subscriber(nats_server.url, max_workers=1, pending_bytes=1000) as subscriber:
        begun = threading.Event()

        @subscriber.handler("limit.bytes")
        def work(ctx: natsync.HandlerContext, request: natsync.Message) -> None:
            begun.set()
            go_on.wait(PATIENCE)

        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(client.request, "limit.bytes", b"", timeout=PATIENCE)
            assert begun.wait(PATIENCE)
            with pytest.raises(natsync.HandlerError, match="too many requests wait"):
                client.request("limit.bytes", bytes(1001), timeout=PATIENCE)
            go_on.set()
            assert first.result(PATIENCE).data == b""
        assert subscriber.stats()["dropped"] == 1


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "5"], ids=repr)
def test_limits_that_make_no_sense_are_refused(subscriber: Subscriber, limit: object) -> None:
    with pytest.raises(natsync.InvalidArgument, match="max_streams="):
        subscriber.stream_subscribe("limit.x", lambda ctx, request: [], max_streams=limit)  # type: ignore[arg-type]
    with pytest.raises(natsync.InvalidArgument, match="max_streams="):
        subscriber.stream("limit.x", max_streams=limit)  # type: ignore[arg-type]
    with pytest.raises(natsync.InvalidArgument, match="max_workers="):
        subscriber.handler("limit.x", max_workers=limit)  # type: ignore[arg-type]
    with pytest.raises(natsync.InvalidArgument, match="pending_messages="):
        subscriber.handler("limit.x", pending_messages=limit)  # type: ignore[arg-type]
    assert subscriber.handles == []
