"""Whether cost grows linearly: python benchmarks/scaling.py. natsync on both sides, in processes of their own.

Chunk sizes from 16 bytes to 1 MiB, 1 to 1,000 streams at once, 1 to 10,000 subscriptions, and up to 10,000 streams that
are open and idle, with the memory that each side holds for them and the processor time they cost. Linux, whose /proc
says how much memory a process holds. --quick stops at a tenth.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lab

sys.path.insert(0, str(lab.CHECKOUT))
import natsync
from natsync.testing import NatsServer

#: Bytes that each size of chunks is measured with, and the most chunks.
TOTAL_BYTES, MOST_CHUNKS = 64 << 20, 200_000
#: Chunks of all streams together, where there are several at once.
ALL_CHUNKS = 200_000
#: Messages to all subscriptions together.
MESSAGES = 100_000
#: Seconds over which idle streams' processor time is taken.
IDLE_SECONDS = 10.0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- the responder, a process of its own -------------------------------------------------------------------------------


def serve(url: str) -> None:
    """Answers until its standard input is closed; says what it holds when asked on `scale.held`."""
    kept = []
    with natsync.Subscriber(url, max_streams=20_000, pending_messages=20_000) as subscriber:

        @subscriber.stream("scale.stream")
        def stream(ctx: Any, request: natsync.Message) -> Iterator[bytes]:
            count, size = map(int, request.text().split())
            chunk = b"x" * size
            return itertools.repeat(chunk, count)  # type: ignore[return-value]

        @subscriber.stream("scale.idle")
        def idle(ctx: Any, request: natsync.Message, sender: natsync.ResponseSender) -> None:
            sender.send(b"x")
            kept.append(sender)  # stays open although the handler returns

        @subscriber.handler("scale.held")
        def held(ctx: Any, request: natsync.Message) -> dict[str, object]:
            used = time.process_time()
            gc.collect()  # which with many streams takes a good part of a second, and is not theirs
            own = time.process_time() - used
            return {"bytes": resident_bytes(), "threads": threading.active_count(), "used": used, "own": own}

        print("ready", flush=True)
        sys.stdin.read()


@contextmanager
def responder(url: str) -> Iterator[None]:
    command = [sys.executable, __file__, "--serve", url]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        process.kill()
        process.communicate()


# -- the jobs ----------------------------------------------------------------------------------------------------------


def by_size(client: natsync.Client, share: int) -> None:
    print("\n| bytes of a chunk | chunks/s | MB/s | µs a chunk |\n| ---: | ---: | ---: | ---: |")
    for size in (16, 64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20):
        count = max(20, min(MOST_CHUNKS, TOTAL_BYTES // size) // share)
        started = time.perf_counter()
        got = sum(1 for _ in client.stream("scale.stream", f"{count} {size}", timeout=60))
        seconds = time.perf_counter() - started
        assert got == count
        print(
            f"| {size:,} | {count / seconds:,.0f} | {count * size / seconds / 1e6:,.1f} | {seconds / count * 1e6:.2f} |"
        )


def by_streams(client: natsync.Client, share: int) -> None:
    print("\n| streams at once | chunks/s in all |\n| ---: | ---: |")
    for streams in (1, 10, 100, 1000 // share):
        each = ALL_CHUNKS // share // streams
        got: list[int] = []

        def read(each: int = each, got: list[int] = got) -> None:
            got.append(sum(1 for _ in client.stream("scale.stream", f"{each} 128", timeout=60)))

        threads = [threading.Thread(target=read) for _ in range(streams)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        assert got == [each] * streams
        print(f"| {streams:,} | {each * streams / seconds:,.0f} |")


def by_subscriptions(url: str, share: int) -> None:
    print("\n| subscriptions | messages/s published and received | ms to subscribe |\n| ---: | ---: | ---: |")
    messages = MESSAGES // share
    for subscriptions in (1, 10, 100, 1_000, 10_000 // share):
        with natsync.connect(url) as client, natsync.connect(url) as publisher:
            left, over = itertools.count(1), threading.Event()

            def take(message: natsync.Message, left: Iterator[int] = left, over: threading.Event = over) -> None:
                if next(left) == messages:
                    over.set()

            started = time.perf_counter()
            for number in range(subscriptions):
                client.subscribe(f"many.{number}", callback=take)
            client.flush(60)
            subscribed = time.perf_counter()
            for number in range(messages):
                publisher.publish(f"many.{number % subscriptions}", b"x" * 128)
            assert over.wait(60)
            seconds = time.perf_counter() - subscribed
        print(f"| {subscriptions:,} | {messages / seconds:,.0f} | {(subscribed - started) * 1e3:,.0f} |")


def by_idle(client: natsync.Client, share: int) -> None:
    print(
        "\n| idle streams | KiB a stream: client | responder | threads: client | responder | CPU: client | responder |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")

    def held() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(client.request("scale.held", timeout=30).data)
        return found

    streams: list[natsync.Stream] = []
    gc.collect()
    ours, theirs = resident_bytes(), held()["bytes"]
    for count in (0, 100, 1_000, 10_000 // share):
        while len(streams) < count:
            streams.append(client.stream("scale.idle"))
            if len(streams) % 500 == 0:
                next(streams[-1])
        gc.collect()
        before, mine = held(), time.process_time()
        time.sleep(IDLE_SECONDS)
        used = (time.process_time() - mine) / IDLE_SECONDS
        after = held()
        used_there = (after["used"] - before["used"] - before["own"]) / IDLE_SECONDS
        each = [
            (now - then) / max(1, count) / 1024 for now, then in ((resident_bytes(), ours), (after["bytes"], theirs))
        ]
        sizes = " | ".join(f"{one:.1f}" if count else "–" for one in each)
        threads = f"{threading.active_count()} | {after['threads']}"
        print(f"| {count:,} | {sizes} | {threads} | {used:.1%} | {used_there:.1%} |", flush=True)
    for stream in streams:
        stream.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="See how natsync's cost grows.")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--serve", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    share = 10 if options.quick else 1
    with NatsServer() as server, responder(server.url), natsync.connect(server.url) as client:
        by_size(client, share)
        by_streams(client, share)
        by_subscriptions(server.url, share)
        by_idle(client, share)


if __name__ == "__main__":
    main()
