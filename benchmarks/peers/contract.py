"""What the Python peers of the benchmark share: the command line, the payloads, the one line of result.

A peer is a program of its own; benchmarks/README.md states its command line, so that one in another language
can take part. Nothing here knows a NATS library. Each peer module hands its functions to main().
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

END = b"__STREAM_END__"
ERROR_PREFIX = b"__STREAM_ERROR__:"

#: Requests answered before the clock starts, so that connections and inboxes are warm.
WARM_UP_REQUESTS = 100

#: Seconds a client waits for one reply before it counts the request as lost.
REPLY_TIMEOUT = 2.0


def make_chunks(count: int, size: int) -> list[bytes]:
    """Numbered chunks, made before the clock starts: chunk i is "<i> " padded with x to size bytes."""
    return [(b"%d " % number).ljust(size, b"x")[:size] for number in range(count)]


def misplaced(chunks: list[bytes]) -> int:
    """How many chunks are not at the place their number says."""
    return sum(not chunk.startswith(b"%d " % place) for place, chunk in enumerate(chunks))


@dataclass
class Stream:
    """One stream as its client saw it. Chunks are kept and judged after the clock has stopped."""

    chunks: list[bytes] = field(default_factory=list)
    ended: str = "no end"
    finished: float = 0.0  # time.perf_counter() at the last thing received


@dataclass
class Streams:
    """Streams read at once. One clock for all of them: streams that start late must not run on clocks of their own,
    or those that in truth ran one after another would seem to have run at the same time.
    """

    streams: list[Stream]
    started: float  # time.perf_counter() before the first request
    mode: str | None = "plain"

    @property
    def seconds(self) -> float:
        return max(stream.finished for stream in self.streams) - self.started


@dataclass
class Requests:
    """What the requests of one or more threads came to."""

    times: list[float] = field(default_factory=list)  # seconds of each answered one
    failed: int = 0
    seconds: float = 0.0  # from the first request to the last answer


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run work(0) … work(count-1) at once, each in a thread, and wait for all."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def threaded_requests(ask: Callable[[bytes], bytes], payload: bytes, count: int, threads: int) -> Requests:
    """Time count requests by a blocking ask(), shared out over threads.

    A thread stops at its first failure and the rest of its share counts as failed: a client that lost one
    reply to a dead reader would only wait for its timeout again and again.
    """
    for _ in range(WARM_UP_REQUESTS):
        ask(payload)
    share = count // threads
    times: list[list[float]] = [[] for _ in range(threads)]
    last_answers = [0.0] * threads
    start = time.perf_counter()

    def work(number: int) -> None:
        mine = times[number]
        for _ in range(share):
            before = time.perf_counter()
            try:
                answer = ask(payload)
            except Exception as error:
                print(f"thread {number} stops: {error!r}", file=sys.stderr)
                break
            now = time.perf_counter()
            if answer != payload:
                print(f"thread {number} stops: a wrong answer", file=sys.stderr)
                break
            mine.append(now - before)
            last_answers[number] = now

    in_threads(threads, work)
    done = [one for mine in times for one in mine]
    return Requests(done, share * threads - len(done), max(max(last_answers) - start, 0.0))


def ready_until_stdin_closes() -> None:
    """Tell the runner that this server is subscribed, then wait until the runner lets go of it."""
    print("ready", flush=True)
    sys.stdin.read()


def percentile(sorted_values: list[float], share: float) -> float:
    return sorted_values[int(share * (len(sorted_values) - 1))] if sorted_values else 0.0


def _report_streams(result: Streams) -> dict[str, object]:
    return {
        "seconds": max(result.seconds, 0.0),
        "mode": result.mode,
        "streams": [
            {"chunks": len(stream.chunks), "ended": stream.ended, "wrong": misplaced(stream.chunks)}
            for stream in result.streams
        ],
    }


def _report_requests(requests: Requests) -> dict[str, object]:
    times = sorted(requests.times)
    return {
        "seconds": requests.seconds,
        "done": len(times),
        "failed": requests.failed,
        "p50_us": percentile(times, 0.5) * 1e6,
        "p99_us": percentile(times, 0.99) * 1e6,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One side of a benchmark; NATS_URL names the server.")
    modes = parser.add_subparsers(dest="mode", required=True)
    for mode in ("serve", "echo", "stream", "first", "request", "publish"):
        sub = modes.add_parser(mode)
        sub.add_argument("subject")
        if mode in ("serve", "first", "request", "publish"):
            sub.add_argument("count", type=int)
        if mode in ("serve", "publish"):
            sub.add_argument("size", type=int)
        if mode == "serve":
            sub.add_argument("-form", default="send")
        if mode == "stream":
            sub.add_argument("-streams", type=int, default=1)
            sub.add_argument("-form", default="")
        if mode == "request":
            sub.add_argument("-threads", type=int, default=1)
            sub.add_argument("-size", type=int, default=128)
    return parser.parse_args()


def main(
    *,
    serve: Callable[[str, str, list[bytes], str], None],
    echo: Callable[[str, str], None],
    stream: Callable[[str, str, int, str], Streams],
    request: Callable[[str, str, bytes, int, int], Requests],
    publish: Callable[[str, str, bytes, int], float] | None = None,
    first: Callable[[str, str, int], list[float]] | None = None,
) -> None:
    """Run the side that the command line names; a client prints one line of JSON."""
    arguments = _arguments()
    url = os.environ["NATS_URL"]
    if arguments.mode == "serve":
        serve(url, arguments.subject, make_chunks(arguments.count, arguments.size), arguments.form)
    elif arguments.mode == "echo":
        echo(url, arguments.subject)
    elif arguments.mode == "stream":
        result = _report_streams(stream(url, arguments.subject, arguments.streams, arguments.form))
        print(json.dumps(result), flush=True)
    elif arguments.mode == "first":
        assert first is not None
        times = sorted(first(url, arguments.subject, arguments.count))
        print(json.dumps({"p50_us": percentile(times, 0.5) * 1e6}), flush=True)
    elif arguments.mode == "request":
        payload = b"x" * arguments.size
        done = request(url, arguments.subject, payload, arguments.count, arguments.threads)
        print(json.dumps(_report_requests(done)), flush=True)
    else:
        assert publish is not None
        seconds = publish(url, arguments.subject, b"x" * arguments.size, arguments.count)
        print(json.dumps({"seconds": seconds, "done": arguments.count}), flush=True)
