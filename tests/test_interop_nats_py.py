"""natsync and nats-py talk to each other: plain streams and requests with headers, either one on either side."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import nats
import nats.errors
import pytest
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

import natsync
from natsync.testing import NatsServer, eventually
from rawclient import END, ERROR, PATIENCE

T = TypeVar("T")


class Loop:
    """nats-py on an event loop in a thread of its own; the test stays in blocking code."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.nats: Nats = self.run(nats.connect(url, allow_reconnect=False, connect_timeout=int(PATIENCE)))

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Have it run while the test goes on."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it, and wait for its value."""
        return self.start(coroutine).result(PATIENCE)

    def close(self) -> None:
        self.run(self.nats.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()


@pytest.fixture
def loop(nats_server: NatsServer) -> Iterator[Loop]:
    loop = Loop(nats_server.url)
    yield loop
    loop.close()


@pytest.fixture
def client(natsync_client: natsync.Client) -> natsync.Client:
    return natsync_client.open()


@pytest.fixture
def subscriber(natsync_subscriber: natsync.Subscriber) -> natsync.Subscriber:
    return natsync_subscriber.open()


async def chunks_of(connection: Nats, subject: str, payload: bytes) -> AsyncIterator[bytes]:
    """A plain requester on nats-py: publish with an inbox, read up to the sentinel."""
    inbox = connection.new_inbox()
    subscription = await connection.subscribe(inbox)
    try:
        await connection.publish(subject, payload, reply=inbox)
        while (data := (await subscription.next_msg(timeout=PATIENCE)).data) != END:
            if data.startswith(ERROR):
                raise RuntimeError(data[len(ERROR) :].decode())
            yield data
    finally:
        await subscription.unsubscribe()


async def collect(connection: Nats, subject: str, payload: bytes = b"") -> list[bytes]:
    return [chunk async for chunk in chunks_of(connection, subject, payload)]


def respond(loop: Loop, subject: str, callback: Callable[[Msg], Awaitable[None]], queue: str = "") -> None:
    """Have nats-py answer the subject, from when this returns."""

    async def subscribe() -> None:
        await loop.nats.subscribe(subject, queue=queue, cb=callback)
        await loop.nats.flush()  # its PING may overtake the SUB, which still waits to be written; the next one not
        await loop.nats.flush()

    loop.run(subscribe())


# -- nats-py asks, natsync answers -----------------------------------------------------------------------------------


def test_nats_py_reads_a_natsync_stream(loop: Loop, subscriber: natsync.Subscriber) -> None:
    subscriber.stream_subscribe("n.stream", lambda ctx, request: (request.data + b"%d" % n for n in range(500)))
    assert loop.run(collect(loop.nats, "n.stream", b"p")) == [b"p%d" % n for n in range(500)]


def test_nats_py_reads_the_error_of_a_natsync_stream(loop: Loop, subscriber: natsync.Subscriber) -> None:
    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"1"
        raise ValueError("Größe unbekannt")

    subscriber.stream_subscribe("n.error", handler)
    with pytest.raises(RuntimeError, match="Größe unbekannt"):
        loop.run(collect(loop.nats, "n.error"))


def test_nats_py_that_stops_reading_closes_the_natsync_sender(loop: Loop, subscriber: natsync.Subscriber) -> None:
    closed = threading.Event()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        try:
            while True:
                yield b"more"
                ctx.wait(0.005)
        finally:
            closed.set()

    async def take_two() -> list[bytes]:
        taken = []
        chunks = chunks_of(loop.nats, "n.endless", b"")
        async for chunk in chunks:
            taken.append(chunk)
            if len(taken) == 2:
                break
        await chunks.aclose()
        await loop.nats.flush()
        return taken

    subscriber.stream_subscribe("n.endless", handler)
    assert loop.run(take_two()) == [b"more", b"more"]
    assert closed.wait(PATIENCE)


def test_nats_py_reads_a_natsync_stream_that_ends_with_an_empty_message(loop: Loop, nats_server: NatsServer) -> None:
    async def until_empty() -> list[bytes]:
        inbox = loop.nats.new_inbox()
        subscription = await loop.nats.subscribe(inbox)
        await loop.nats.publish("n.empty", b"", reply=inbox)
        taken = []
        while data := (await subscription.next_msg(timeout=PATIENCE)).data:
            taken.append(data)
        return taken

    with natsync.Subscriber(nats_server.url, sentinels=natsync.Sentinels.EMPTY) as subscriber:
        subscriber.stream_subscribe("n.empty", lambda ctx, request: [b"1", b"2"])
        assert loop.run(until_empty()) == [b"1", b"2"]


def test_nats_py_requests_a_natsync_handler_with_headers(loop: Loop, subscriber: natsync.Subscriber) -> None:
    seen: list[tuple[str, ...]] = []

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> dict[str, str]:
        seen.append((request.headers["Trace"], ctx.metadata["Trace"]))
        return {"answer": request.text()}

    subscriber.handler("n.handler")(handler)
    reply = loop.run(loop.nats.request("n.handler", b"q", timeout=PATIENCE, headers={"Trace": "77"}))
    assert reply.data == b'{"answer":"q"}'
    assert seen == [("77", "77")]


def test_nats_py_sees_headers_of_a_natsync_reply(loop: Loop, client: natsync.Client) -> None:
    client.subscribe("n.reply", lambda message: message.respond(b"!", headers={"A": "1", "B": "zwei: ü"}))
    client.flush()
    reply = loop.run(loop.nats.request("n.reply", b"?", timeout=PATIENCE))
    assert (reply.data, reply.headers) == (b"!", {"A": "1", "B": "zwei: ü"})


def test_nats_py_sees_a_natsync_handlers_failure_as_service_error_headers(
    loop: Loop, subscriber: natsync.Subscriber
) -> None:
    subscriber.handler("n.fail")(lambda ctx, request: 1 // 0)
    reply = loop.run(loop.nats.request("n.fail", b"", timeout=PATIENCE))
    assert reply.headers == {
        "Nats-Service-Error": "integer division or modulo by zero",
        "Nats-Service-Error-Code": "500",
    }


def test_nats_py_is_told_when_natsync_stops_serving(loop: Loop, subscriber: natsync.Subscriber) -> None:
    subscriber.handler("n.gone")(lambda ctx, request: b"here")
    assert loop.run(loop.nats.request("n.gone", b"", timeout=PATIENCE)).data == b"here"
    subscriber.close()
    with pytest.raises(nats.errors.NoRespondersError):
        loop.run(loop.nats.request("n.gone", b"", timeout=PATIENCE))


# -- natsync asks, nats-py answers -----------------------------------------------------------------------------------


def test_natsync_reads_a_stream_of_nats_py(loop: Loop, client: natsync.Client) -> None:
    async def answer(message: Msg) -> None:
        for n in range(500):
            await loop.nats.publish(message.reply, message.data + b"%d" % n)
        await loop.nats.publish(message.reply, END)

    respond(loop, "n.py.stream", answer)
    with client.stream("n.py.stream", b"p") as stream:
        assert list(stream) == [b"p%d" % n for n in range(500)]
        assert stream.mode == "plain"


def test_natsync_gets_chunks_of_nats_py_as_they_come(loop: Loop, client: natsync.Client) -> None:
    first_taken = threading.Event()

    async def answer(message: Msg) -> None:
        await message.respond(b"first")
        await asyncio.to_thread(first_taken.wait, PATIENCE)
        await message.respond(b"second")
        await message.respond(END)

    respond(loop, "n.py.slow", answer)
    with client.stream("n.py.slow") as stream:
        assert stream.next(PATIENCE) == b"first"
        first_taken.set()
        assert list(stream) == [b"second"]


def test_natsync_raises_the_error_of_a_stream_of_nats_py(loop: Loop, client: natsync.Client) -> None:
    async def answer(message: Msg) -> None:
        await message.respond(b"1")
        await message.respond(ERROR + "nicht verfügbar".encode())

    respond(loop, "n.py.error", answer)
    taken: list[bytes] = []
    with pytest.raises(natsync.HandlerError, match="nicht verfügbar"):
        for chunk in client.stream("n.py.error"):
            taken.append(chunk)
    assert taken == [b"1"]


def test_stream_request_shows_every_message_of_nats_py(loop: Loop, client: natsync.Client) -> None:
    async def answer(message: Msg) -> None:
        for data in (b"1", b"2", END):
            await message.respond(data)

    respond(loop, "n.py.processor", answer)
    seen: list[bytes] = []
    client.stream_request("n.py.processor", b"", lambda message: seen.append(message.data))
    assert seen == [b"1", b"2", END]


def test_headers_of_a_chunk_of_nats_py_are_the_streams(loop: Loop, client: natsync.Client) -> None:
    async def answer(message: Msg) -> None:
        await loop.nats.publish(message.reply, b"1", headers={"Model": "small"})
        await message.respond(END)

    respond(loop, "n.py.headers", answer)
    stream = client.stream("n.py.headers", headers={"User": "ada"})
    assert list(stream) == [b"1"]
    assert dict(stream.headers) == {"Model": "small"}


def test_headers_of_a_natsync_request_reach_nats_py_and_back(loop: Loop, client: natsync.Client) -> None:
    async def answer(message: Msg) -> None:
        assert message.headers is not None
        await loop.nats.publish(message.reply, b"!", headers={"Seen": message.headers["Trace"]})

    respond(loop, "n.py.reply", answer)
    reply = client.request("n.py.reply", b"?", headers={"Trace": "ü 1"}, timeout=PATIENCE)
    assert (reply.data, reply.headers["Seen"]) == (b"!", "ü 1")


def test_natsync_and_nats_py_share_a_queue_group(
    loop: Loop, client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    async def answer(message: Msg) -> None:
        await message.respond(b"nats-py")

    respond(loop, "n.shared", answer, queue="g")
    subscriber.handler("n.shared", queue="g")(lambda ctx, request: b"natsync")
    assert {client.request("n.shared", timeout=PATIENCE).data for _ in range(60)} == {b"nats-py", b"natsync"}


def test_40_streams_of_nats_py_at_once_are_exact(loop: Loop, client: natsync.Client) -> None:
    async def answer(message: Msg) -> None:
        for n in range(50):
            await message.respond(message.data + b":%d" % n)
            await asyncio.sleep(0)
        await message.respond(END)

    async def at_once(message: Msg) -> None:
        tasks.append(asyncio.get_running_loop().create_task(answer(message)))

    tasks: list[asyncio.Task[None]] = []
    respond(loop, "n.py.many", at_once)
    streams = [client.stream("n.py.many", b"%d" % number, timeout=30) for number in range(40)]
    results = [list(stream) for stream in streams]
    assert results == [[b"%d:%d" % (number, n) for n in range(50)] for number in range(40)]
    eventually(lambda: all(task.done() for task in tasks))


def test_40_streams_to_nats_py_at_once_are_exact(loop: Loop, subscriber: natsync.Subscriber) -> None:
    subscriber.stream_subscribe("n.many", lambda ctx, request: (request.data + b":%d" % n for n in range(200)))

    async def all_at_once() -> list[list[bytes]]:
        return await asyncio.gather(*(collect(loop.nats, "n.many", b"%d" % number) for number in range(40)))

    assert loop.run(all_at_once()) == [[b"%d:%d" % (number, n) for n in range(200)] for number in range(40)]
