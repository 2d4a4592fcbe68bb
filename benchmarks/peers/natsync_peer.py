"""natsync as a peer: one Client or one Subscriber, shared by all threads.

Forms of `serve`: "send", a chunk a call; "send_many", all at once; "generator", which yields them; "single", send()
with one chunk a message, as to a peer that takes no batches. Forms of `stream`: "", a for loop; "callback",
stream_request() with a processor; "plain", a for loop over a client that speaks plain mode only.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import contract

import natsync
from natsync.streaming import terms

#: Seconds a stream may be silent before its client gives up.
IDLE_TIMEOUT = 10.0


def serve(url: str, subject: str, chunks: list[bytes], form: str) -> None:
    if form == "single":
        decode_offer = terms.decode_offer
        terms.decode_offer = lambda text: dataclasses.replace(decode_offer(text), batches=False)
    with natsync.Subscriber(url) as subscriber:

        def send(ctx: Any, request: Any, sender: Any) -> None:
            for chunk in chunks:
                sender.send(chunk)
            sender.end()

        def send_many(ctx: Any, request: Any, sender: Any) -> None:
            sender.send_many(chunks)
            sender.end()

        def generate(ctx: Any, request: Any) -> Iterator[bytes]:
            yield from chunks

        forms: dict[str, Any] = {"send": send, "single": send, "send_many": send_many, "generator": generate}
        subscriber.stream(subject)(forms[form])
        contract.ready_until_stdin_closes()


def echo(url: str, subject: str) -> None:
    with natsync.Subscriber(url) as subscriber:

        @subscriber.handler(subject)
        def answer(ctx: Any, request: Any) -> bytes:
            return request.data

        contract.ready_until_stdin_closes()


def stream(url: str, subject: str, streams: int, form: str) -> contract.Streams:
    results = [contract.Stream() for _ in range(streams)]
    modes: list[str | None] = [None] * streams
    read = _read_by_processor if form == "callback" else _read_by_iterator
    with natsync.Client(url, framed=form != "plain") as client:

        def work(number: int) -> None:
            try:
                modes[number] = read(client, subject, results[number])
                results[number].ended = "end"
            except natsync.NatsError as error:
                results[number].ended = f"failed: {error!r}"
            results[number].finished = time.perf_counter()

        client.flush()
        started = time.perf_counter()
        contract.in_threads(streams, work)
    return contract.Streams(results, started, modes[0])


def _read_by_iterator(client: natsync.Client, subject: str, result: contract.Stream) -> str | None:
    with client.stream(subject, b"", idle_timeout=IDLE_TIMEOUT) as chunks:
        for chunk in chunks:
            result.chunks.append(chunk)
        return chunks.mode


def _read_by_processor(client: natsync.Client, subject: str, result: contract.Stream) -> str | None:
    def process(message: Any) -> None:
        if not message.is_end:
            result.chunks.append(message.data)

    client.stream_request(subject, b"", process, idle_timeout=IDLE_TIMEOUT)
    return None


def first(url: str, subject: str, count: int) -> list[float]:
    times = []
    with natsync.connect(url) as client:
        list(client.stream(subject))
        for _ in range(count):
            before = time.perf_counter()
            with client.stream(subject) as chunks:
                next(chunks)
                times.append(time.perf_counter() - before)
                list(chunks)
    return times


def request(url: str, subject: str, payload: bytes, count: int, threads: int) -> contract.Requests:
    with natsync.connect(url) as client:

        def ask(data: bytes) -> bytes:
            return client.request(subject, data, timeout=contract.REPLY_TIMEOUT).data

        return contract.threaded_requests(ask, payload, count, threads)


def publish(url: str, subject: str, payload: bytes, count: int) -> float:
    with natsync.connect(url) as client:
        start = time.perf_counter()
        for _ in range(count):
            client.publish(subject, payload)
        client.flush(timeout=60)
        return time.perf_counter() - start


if __name__ == "__main__":
    contract.main(serve=serve, echo=echo, stream=stream, request=request, publish=publish, first=first)
