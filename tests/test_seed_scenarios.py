"""The scenarios by which the Go system was tested, told anew: end to end over a real nats-server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

import natsync
from natsync.testing import NatsServer, eventually
from rawclient import PATIENCE
from thirdparty import ThirdParty


@pytest.fixture
def client(nats_server: NatsServer, mode: str) -> Iterator[natsync.Client]:
    with natsync.connect(nats_server.url, framed=mode == "framed") as client:
        yield client


@pytest.fixture
def subscriber(natsync_subscriber: natsync.Subscriber) -> natsync.Subscriber:
    return natsync_subscriber.open()


def test_basic_stream_answers_ten_pieces_from_a_thread_of_its_own(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    def handler(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        def work() -> None:
            try:
                for n in range(10):
                    if sender.is_closed():
                        return
                    sender.send(f"piece {n} of {request.text()}")
            finally:
                sender.end()

        threading.Thread(target=work).start()

    subscriber.stream_subscribe("scenario.basic", handler)
    seen: list[str] = []
    client.stream_request("scenario.basic", "the request", lambda message: seen.append(message.text()))
    assert seen == [f"piece {n} of the request" for n in range(10)] + ["__STREAM_END__"]


def test_timeout_ends_a_stream_whose_responder_is_slow_and_tells_the_handler(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    stopped = threading.Event()

    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        yield b"quick"
        if ctx.wait(PATIENCE):
            stopped.set()
        yield b"too late"

    subscriber.stream_subscribe("scenario.timeout", handler)
    seen: list[bytes] = []
    begin = time.monotonic()
    with pytest.raises(natsync.DeadlineExceeded) as caught:
        client.stream_request("scenario.timeout", b"", lambda message: seen.append(message.data), timeout=1.5)
    assert 1.49 <= time.monotonic() - begin < 10
    assert isinstance(caught.value, TimeoutError)
    assert seen[0] == b"quick"
    assert b"too late" not in seen
    assert stopped.wait(PATIENCE)


def test_batches_arrive_whole_and_in_order(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    def handler(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        for batch in range(20):
            sender.send_many(f"{batch}.{n}" for n in range(50))
        sender.end()

    subscriber.batch_stream_subscribe("scenario.batch", handler)
    with client.stream("scenario.batch") as stream:
        assert [chunk.decode() for chunk in stream] == [f"{batch}.{n}" for batch in range(20) for n in range(50)]


def test_third_party_pieces_are_passed_on_while_the_third_party_still_sends(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    with ThirdParty() as party:

        @subscriber.stream("scenario.third")
        def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
            with ctx.closing(requests.get(f"{party.url}/hang/3", stream=True, timeout=PATIENCE)) as response:
                yield from response.iter_lines(chunk_size=None)

        with client.stream("scenario.third") as stream:
            pieces = [stream.next(PATIENCE) for _ in range(3)]
            assert pieces == [b'{"piece": 0}', b'{"piece": 1}', b'{"piece": 2}']
            assert not party.released.is_set()  # the third party has not finished its answer yet
            party.released.set()
            assert list(stream) == []


def test_third_party_an_error_of_the_third_party_is_the_streams_error(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    with ThirdParty() as party:

        @subscriber.stream("scenario.third.error")
        def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
            with ctx.closing(requests.get(f"{party.url}/broken", stream=True, timeout=PATIENCE)) as response:
                response.raise_for_status()
                yield from response.iter_lines()

        with pytest.raises(natsync.HandlerError, match="500 Server Error"):
            list(client.stream("scenario.third.error"))


def test_retry_gives_up_with_the_last_error(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    runs: list[int] = []

    @subscriber.stream("scenario.giveup")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        runs.append(len(runs) + 1)
        raise RuntimeError(f"try {runs[-1]} failed")
        yield b""

    retry = natsync.Retry(attempts=3, initial=0.01)
    with pytest.raises(natsync.HandlerError, match="try 3 failed"):
        client.stream_request("scenario.giveup", b"", lambda message: None, retry=retry)
    assert runs == [1, 2, 3]


def test_retry_succeeds_once_the_responder_does(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    runs: list[int] = []

    @subscriber.stream("scenario.success")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        runs.append(1)
        if len(runs) < 3:
            raise RuntimeError("not yet")
        yield b"the answer"

    seen: list[bytes] = []
    retry = natsync.Retry(attempts=5, initial=0.01)
    client.stream_request(
        "scenario.success", b"", lambda message: message.error or seen.append(message.data), retry=retry
    )
    assert seen == [b"the answer", b"__STREAM_END__"]
    assert len(runs) == 3


def test_retry_finds_a_responder_that_starts_late(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    retry = natsync.Retry(attempts=None, initial=0.2, maximum=0.2)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(lambda: list(client.stream("scenario.late", timeout=PATIENCE, retry=retry)))
        with pytest.raises(natsync.NoRespondersError):
            client.request("scenario.late")
        subscriber.stream_subscribe("scenario.late", lambda ctx, request: [b"here now"])
        assert answer.result(PATIENCE) == [b"here now"]


def test_legacy_handler_ends(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    pages = ["one", "", "three"]
    subscriber.legacy_stream_subscribe("scenario.legacy", lambda request, index: (pages[index], index < 2))
    assert list(client.stream("scenario.legacy", timeout=PATIENCE)) == [b"one", b"three"]


def test_64_threads_share_one_client_with_nothing_lost_or_mixed(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    @subscriber.stream("scenario.count")
    def count(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        for n in range(200):
            yield request.data + b":%d" % n

    @subscriber.handler("scenario.echo")
    def echo(ctx: natsync.Context, request: natsync.Message) -> bytes:
        return b"echo " + request.data

    together = threading.Barrier(64, timeout=PATIENCE)

    def one(thread: int) -> None:
        name = b"thread %d" % thread
        together.wait()
        for turn in range(3):
            if (thread + turn) % 2:
                assert list(client.stream("scenario.count", name)) == [name + b":%d" % n for n in range(200)]
            else:
                for n in range(20):
                    data = name + b"/%d" % n
                    assert client.request("scenario.echo", data, timeout=30).data == b"echo " + data

    with ThreadPoolExecutor(64) as pool:
        for done in [pool.submit(one, thread) for thread in range(64)]:
            done.result(30)
    eventually(lambda: client.stats()["waiting_replies"] == 0)
    stats = client.stats()
    assert (stats["reconnects"], stats["late_replies"], stats["waiting_replies"]) == (0, 0, 0)
    eventually(lambda: subscriber.stats()["active"] == 0)
    stats = subscriber.stats()
    assert (stats["processed"], stats["failed"], stats["dropped"]) == (stats["received"], 0, 0)


def test_responders_of_one_queue_group_serve_many_streams_at_once(
    client: natsync.Client, nats_server: NatsServer
) -> None:
    with natsync.Subscriber(nats_server.url) as one, natsync.Subscriber(nats_server.url) as two:
        handles = [
            each.stream_subscribe("scenario.group", lambda ctx, request: [request.data] * 3, queue="g")
            for each in (one, two)
        ]
        streams = [client.stream("scenario.group", b"%d" % n) for n in range(60)]
        assert [list(stream) for stream in streams] == [[b"%d" % n] * 3 for n in range(60)]
        assert sum(handle.stats["received"] for handle in handles) == 60
