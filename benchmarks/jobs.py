"""What is measured: each job's two command lines, its figure, and what was wrong with its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Bytes of every chunk, request and published message.
PAYLOAD_BYTES = "128"
#: Bytes of a chunk that is a token or two of a language model's answer.
TOKEN_BYTES = "32"
#: Bytes of a large chunk: as many as a server with the usual max_payload, 1 MiB, takes in one message.
LARGE_BYTES = 1_000_000

Result = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much each job does."""

    chunks: int = 100_000
    chunks_of_each: int = 5_000
    large_chunks: int = 200
    requests: int = 5_000
    shared_requests: int = 24_000
    firsts: int = 1_000
    messages: int = 500_000


FULL = Sizes()
QUICK = Sizes(20_000, 500, large_chunks=40, requests=1_000, shared_requests=4_000, firsts=200, messages=100_000)

STREAMS = 40
THREADS = 8


@dataclass(frozen=True)
class Job:
    """One line of work. server is None where nobody answers; SUBJECT stands for the subject of the run.

    kind: pairings name the kinds that they take part in.
    """

    kind: str
    name: str
    unit: str
    client: tuple[str, ...]
    figure: Callable[[Result], float]
    flaw: Callable[[Result], str]
    server: tuple[str, ...] | None = None
    less_is_better: bool = False


def jobs(sizes: Sizes) -> list[Job]:
    """The jobs, in the order of the table."""
    return [
        Job(
            "stream",
            f"one stream of {sizes.chunks:,} chunks",
            "chunks/s",
            client=("stream", "SUBJECT"),
            server=("serve", "SUBJECT", str(sizes.chunks), PAYLOAD_BYTES),
            figure=_chunks_a_second,
            flaw=lambda result: _stream_flaw(result, sizes.chunks),
        ),
        Job(
            "tokens",
            f"one stream of {sizes.chunks:,} chunks of {TOKEN_BYTES} bytes",
            "chunks/s",
            client=("stream", "SUBJECT"),
            server=("serve", "SUBJECT", str(sizes.chunks), TOKEN_BYTES),
            figure=_chunks_a_second,
            flaw=lambda result: _stream_flaw(result, sizes.chunks),
        ),
        Job(
            "large",
            f"one stream of {sizes.large_chunks:,} chunks of 1 MB",
            "MB/s",
            client=("stream", "SUBJECT"),
            server=("serve", "SUBJECT", str(sizes.large_chunks), str(LARGE_BYTES)),
            figure=lambda result: _chunks_a_second(result) * LARGE_BYTES / 1e6,
            flaw=lambda result: _stream_flaw(result, sizes.large_chunks),
        ),
        Job(
            "streams",
            f"{STREAMS} streams at once, {sizes.chunks_of_each:,} chunks each",
            "chunks/s",
            client=("stream", "SUBJECT", "-streams", str(STREAMS)),
            server=("serve", "SUBJECT", str(sizes.chunks_of_each), PAYLOAD_BYTES),
            figure=_chunks_a_second,
            flaw=lambda result: _stream_flaw(result, STREAMS * sizes.chunks_of_each),
        ),
        Job(
            "first",
            "first chunk of a stream, p50",
            "µs",
            client=("first", "SUBJECT", str(sizes.firsts)),
            server=("serve", "SUBJECT", "1", PAYLOAD_BYTES),
            figure=lambda result: float(result["p50_us"]),
            flaw=lambda result: "",
            less_is_better=True,
        ),
        Job(
            "request",
            "request/reply, one thread, p50",
            "µs",
            client=("request", "SUBJECT", str(sizes.requests), "-size", PAYLOAD_BYTES),
            server=("echo", "SUBJECT"),
            figure=lambda result: float(result["p50_us"]),
            flaw=_request_flaw,
            less_is_better=True,
        ),
        Job(
            "threads",
            f"request/reply, {THREADS} threads",
            "requests/s",
            client=(
                "request",
                "SUBJECT",
                str(sizes.shared_requests),
                "-threads",
                str(THREADS),
                "-size",
                PAYLOAD_BYTES,
            ),
            server=("echo", "SUBJECT"),
            figure=_done_a_second,
            flaw=_request_flaw,
        ),
        Job(
            "publish",
            f"publish {sizes.messages:,} messages, until the PONG",
            "messages/s",
            client=("publish", "SUBJECT", str(sizes.messages), PAYLOAD_BYTES),
            figure=_done_a_second,
            flaw=lambda result: "",
        ),
    ]


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _chunks_a_second(result: Result) -> float:
    return _rate(sum(stream["chunks"] for stream in result["streams"]), result["seconds"])


def _done_a_second(result: Result) -> float:
    return _rate(result["done"], result["seconds"])


def _stream_flaw(result: Result, expected: int) -> str:
    """What was lost, out of place, or not ended; "" for a sound result."""
    streams = result["streams"]
    lost = expected - sum(stream["chunks"] for stream in streams)
    misplaced = sum(stream["wrong"] for stream in streams)
    endings = [stream["ended"] for stream in streams if stream["ended"] != "end"]
    flaws = []
    if lost:
        flaws.append(f"lost {100 * lost / expected:.1f} % of the chunks")
    elif misplaced:
        flaws.append(f"{misplaced} chunks out of place")
    if endings:
        flaws.append(f"{len(endings)} of {len(streams)} streams: {endings[0]}")
    return "; ".join(flaws)


def _request_flaw(result: Result) -> str:
    total = result["failed"] + result["done"]
    return f"{result['failed']:,} of {total:,} requests unanswered" if result["failed"] else ""
