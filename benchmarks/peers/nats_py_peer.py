"""nats-py (asyncio) as a peer: tasks on one event loop where the others use threads.

A stream is read as its users read one, with `async for` over the subscription; `-form callback` reads it with a
coroutine callback instead, which is nats-py's fastest way and leaves the caller no loop of its own.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import contract
import nats


def serve(url: str, subject: str, chunks: list[bytes], form: str) -> None:
    asyncio.run(_serve(url, subject, chunks))


async def _serve(url: str, subject: str, chunks: list[bytes]) -> None:
    connection = await nats.connect(url)
    running = set()

    async def answer(reply: str) -> None:
        for chunk in chunks:
            await connection.publish(reply, chunk)
        await connection.publish(reply, contract.END)

    async def on_request(message: Any) -> None:
        task = asyncio.create_task(answer(message.reply))
        running.add(task)
        task.add_done_callback(running.discard)

    await connection.subscribe(subject, cb=on_request)
    await _stay(connection)


def echo(url: str, subject: str) -> None:
    asyncio.run(_echo(url, subject))


async def _echo(url: str, subject: str) -> None:
    connection = await nats.connect(url)

    async def on_request(message: Any) -> None:
        await message.respond(message.data)

    await connection.subscribe(subject, cb=on_request)
    await _stay(connection)


async def _stay(connection: Any) -> None:
    await connection.flush()
    await asyncio.to_thread(contract.ready_until_stdin_closes)
    await connection.close()


def stream(url: str, subject: str, streams: int, form: str) -> contract.Streams:
    return asyncio.run(_streams(url, subject, streams, form))


async def _streams(url: str, subject: str, streams: int, form: str) -> contract.Streams:
    connection = await nats.connect(url)
    read = _read_by_callback if form == "callback" else _read_by_iterator
    started = time.perf_counter()
    results = await asyncio.gather(*(read(connection, subject) for _ in range(streams)))
    await connection.close()
    return contract.Streams(results, started)


async def _read_by_iterator(connection: Any, subject: str) -> contract.Stream:
    result = contract.Stream()
    inbox = connection.new_inbox()
    subscription = await connection.subscribe(inbox)
    await connection.publish(subject, b"", reply=inbox)
    async for message in subscription.messages:
        if message.data == contract.END:
            result.ended = "end"
            break
        result.chunks.append(message.data)
    result.finished = time.perf_counter()
    await subscription.unsubscribe()
    return result


async def _read_by_callback(connection: Any, subject: str) -> contract.Stream:
    result = contract.Stream()
    ended = asyncio.Event()

    async def on_message(message: Any) -> None:
        if message.data == contract.END:
            result.ended = "end"
            ended.set()
        else:
            result.chunks.append(message.data)

    inbox = connection.new_inbox()
    subscription = await connection.subscribe(inbox, cb=on_message)
    await connection.publish(subject, b"", reply=inbox)
    await ended.wait()
    result.finished = time.perf_counter()
    await subscription.unsubscribe()
    return result


def request(url: str, subject: str, payload: bytes, count: int, threads: int) -> contract.Requests:
    return asyncio.run(_requests(url, subject, payload, count, threads))


async def _requests(url: str, subject: str, payload: bytes, count: int, threads: int) -> contract.Requests:
    connection = await nats.connect(url)
    for _ in range(contract.WARM_UP_REQUESTS):
        await connection.request(subject, payload, timeout=contract.REPLY_TIMEOUT)
    times: list[float] = []
    share = count // threads

    async def work() -> None:
        for _ in range(share):
            before = time.perf_counter()
            try:
                answer = await connection.request(subject, payload, timeout=contract.REPLY_TIMEOUT)
            except Exception as error:
                print(f"a task stops: {error!r}", file=sys.stderr)
                return
            if answer.data != payload:
                return
            times.append(time.perf_counter() - before)

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(threads)))
    seconds = time.perf_counter() - start
    await connection.close()
    return contract.Requests(times, share * threads - len(times), seconds)


def publish(url: str, subject: str, payload: bytes, count: int) -> float:
    return asyncio.run(_publish(url, subject, payload, count))


async def _publish(url: str, subject: str, payload: bytes, count: int) -> float:
    connection = await nats.connect(url)
    start = time.perf_counter()
    for _ in range(count):
        await connection.publish(subject, payload)
    await connection.flush(timeout=60)
    seconds = time.perf_counter() - start
    await connection.close()
    return seconds


if __name__ == "__main__":
    contract.main(serve=serve, echo=echo, stream=stream, request=request, publish=publish)
