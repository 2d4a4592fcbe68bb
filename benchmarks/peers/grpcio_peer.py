"""grpcio's synchronous API as a peer: a server-streaming method for streams, a unary one for requests.

Bytes in, bytes out, so that no serializer is measured. There is no broker between the two sides, which is in gRPC's
favour: they meet at a Unix socket that is named after the run.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import contract
import grpc

SERVICE = "bench.Bench"
#: Threads of the server: one for each stream or request of a job at once, and some.
WORKERS = 50
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def _address(url: str, subject: str) -> str:
    name = f"natsync-bench-{url.rpartition(':')[2].strip('/')}-{subject}.sock"
    return "unix:" + os.path.join(tempfile.gettempdir(), name)


@contextlib.contextmanager
def _served(url: str, subject: str, name: str, method: Any) -> Iterator[None]:
    address = _address(url, subject)
    server = grpc.server(ThreadPoolExecutor(WORKERS), options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {name: method}),))
    server.add_insecure_port(address)
    server.start()
    try:
        yield
    finally:
        server.stop(0).wait(2)
        with contextlib.suppress(OSError):
            os.unlink(address.removeprefix("unix:"))


def serve(url: str, subject: str, chunks: list[bytes], form: str) -> None:
    method = grpc.unary_stream_rpc_method_handler(lambda request, context: iter(chunks))
    with _served(url, subject, "Stream", method):
        contract.ready_until_stdin_closes()


def echo(url: str, subject: str) -> None:
    method = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    with _served(url, subject, "Echo", method):
        contract.ready_until_stdin_closes()


def stream(url: str, subject: str, streams: int, form: str) -> contract.Streams:
    results = [contract.Stream() for _ in range(streams)]
    with grpc.insecure_channel(_address(url, subject), options=OPTIONS) as channel:
        grpc.channel_ready_future(channel).result(10)
        call = channel.unary_stream(f"/{SERVICE}/Stream")

        def work(number: int) -> None:
            result = results[number]
            try:
                for chunk in call(b"", timeout=60):
                    result.chunks.append(chunk)
                result.ended = "end"
            except grpc.RpcError as error:
                result.ended = f"failed: {error!r}"
            result.finished = time.perf_counter()

        started = time.perf_counter()
        contract.in_threads(streams, work)
    return contract.Streams(results, started)


def request(url: str, subject: str, payload: bytes, count: int, threads: int) -> contract.Requests:
    with grpc.insecure_channel(_address(url, subject), options=OPTIONS) as channel:
        grpc.channel_ready_future(channel).result(10)
        call = channel.unary_unary(f"/{SERVICE}/Echo")

        def ask(data: bytes) -> bytes:
            return bytes(call(data, timeout=contract.REPLY_TIMEOUT))

        return contract.threaded_requests(ask, payload, count, threads)


if __name__ == "__main__":
    contract.main(serve=serve, echo=echo, stream=stream, request=request)
    sys.exit(0)
