"""pynats2 as a peer, in its usual form: NATSClient, callbacks for streams, request() for requests.

It is run in its own favour: one callback worker, because its pool of three would deliver chunks out of order.
A stream whose end was lost is given up after a silence, and its time ends with its last chunk.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import contract
from pynats2 import NATSClient

#: Seconds without a chunk on any stream after which the rest counts as lost.
SILENCE = 1.5


def _connect(url: str) -> NATSClient:
    client = NATSClient(url, workers=1)
    client.connect()
    return client


def serve(url: str, subject: str, chunks: list[bytes], form: str) -> None:
    client = _connect(url)

    def on_request(message: Any) -> None:
        threading.Thread(target=answer, args=(message.reply,), daemon=True).start()

    def answer(reply: str) -> None:
        for chunk in chunks:
            client.publish(reply, payload=chunk)
        client.publish(reply, payload=contract.END)

    client.subscribe(subject, callback=on_request)
    _stay(client)


def echo(url: str, subject: str) -> None:
    client = _connect(url)
    client.subscribe(subject, callback=lambda message: client.publish(message.reply, payload=message.payload))
    _stay(client)


def _stay(client: NATSClient) -> None:
    _confirm(client)
    contract.ready_until_stdin_closes()


def _confirm(client: NATSClient) -> None:
    """Wait until the server has seen all that was sent, by a message to oneself: pynats2 awaits no PONG."""
    back = threading.Event()
    inbox = "_INBOX.confirm." + client._nuid.next_().decode()
    client.subscribe(inbox, callback=lambda message: back.set())
    client.publish(inbox, payload=b"")
    if not back.wait(60):
        raise TimeoutError("the server did not confirm within 60 s")


def stream(url: str, subject: str, streams: int, form: str) -> contract.Streams:
    client = _connect(url)
    results = [contract.Stream() for _ in range(streams)]
    started = time.perf_counter()
    heard = [started]

    def read(number: int) -> None:
        result = results[number]
        ended = threading.Event()

        def on_message(message: Any) -> None:
            heard[0] = result.finished = time.perf_counter()
            if message.payload == contract.END:
                result.ended = "end"
                ended.set()
            else:
                result.chunks.append(message.payload)

        inbox = "_INBOX." + client._nuid.next_().decode()
        client.subscribe(inbox, callback=on_message)
        client.publish(subject, payload=b"", reply=inbox)
        while not ended.wait(0.1) and time.perf_counter() - heard[0] < SILENCE:
            pass

    contract.in_threads(streams, read)
    return contract.Streams(results, started)


def request(url: str, subject: str, payload: bytes, count: int, threads: int) -> contract.Requests:
    client = _connect(url)

    def ask(data: bytes) -> bytes:
        return client.request(subject, payload=data, timeout=contract.REPLY_TIMEOUT).payload

    return contract.threaded_requests(ask, payload, count, threads)


def publish(url: str, subject: str, payload: bytes, count: int) -> float:
    client = _connect(url)
    start = time.perf_counter()
    for _ in range(count):
        client.publish(subject, payload=payload)
    _confirm(client)
    return time.perf_counter() - start


if __name__ == "__main__":
    contract.main(serve=serve, echo=echo, stream=stream, request=request, publish=publish)
    # Its threads may hang or spin after a loss; the result is out, so leave without joining them.
    os._exit(0)
