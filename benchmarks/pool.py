"""What a connection pool costs, and what it brings: `python benchmarks/pool.py`.

Prints microseconds for borrowing and giving back, what a pool adds to a request, and the throughput of 64 threads on
one client against 8 pooled connections. Each figure is the median of several rounds, the two sides of a comparison
alternate. Needs natsync[server].
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import natsync
from natsync.testing import NatsServer

ROUNDS = 7
BORROWS = 50_000
REQUESTS = 2_000
THREADS = 64
CONNECTIONS = 8
SECONDS = 1.0

RESPONDER = """
import sys, natsync
subscriber = natsync.Subscriber(sys.argv[1])
subscriber.handler("bench.echo")(lambda ctx, request: request.data)
subscriber.serve_forever(ready=lambda: print("ready", flush=True))
"""


def median(measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(ROUNDS))


def borrowing(pool: natsync.ConnectionPool) -> tuple[float, float]:
    """Microseconds of this thread's processor for `with pool.connection()`, and for getconn() and putconn()."""

    def with_block() -> float:
        begin = time.thread_time()
        for _ in range(BORROWS):
            with pool.connection():
                pass
        return (time.thread_time() - begin) / BORROWS * 1e6

    def by_hand() -> float:
        begin = time.thread_time()
        for _ in range(BORROWS):
            pool.putconn(pool.getconn())
        return (time.thread_time() - begin) / BORROWS * 1e6

    return median(with_block), median(by_hand)


def p50(ask: Callable[[], object]) -> float:
    """The median time of a request, in microseconds."""
    times = []
    for _ in range(REQUESTS):
        begin = time.perf_counter()
        ask()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def throughput(ask: Callable[[], object]) -> float:
    """Requests a second of THREADS threads together."""
    over, done = threading.Event(), [0] * THREADS

    def work(number: int) -> None:
        while not over.is_set():
            ask()
            done[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    begin = time.perf_counter()
    over.wait(SECONDS)
    total, seconds = sum(done), time.perf_counter() - begin
    over.set()
    for thread in threads:
        thread.join()
    return total / seconds


def main() -> None:
    with NatsServer() as server:
        responder = subprocess.Popen([sys.executable, "-c", RESPONDER, server.url], stdout=subprocess.PIPE, text=True)
        try:
            assert responder.stdout is not None
            assert responder.stdout.readline() == "ready\n"
            with (
                natsync.Client(server.url) as client,
                natsync.ConnectionPool(server.url, min_size=CONNECTIONS, max_size=CONNECTIONS) as pool,
            ):
                pool.wait()

                def direct() -> object:
                    return client.request("bench.echo", b"x", timeout=30)

                def pooled() -> object:
                    return pool.request("bench.echo", b"x", timeout=30)

                block, by_hand = borrowing(pool)
                print(f"with pool.connection(): {block:.2f} us; getconn() and putconn(): {by_hand:.2f} us")
                pairs = [(p50(direct), p50(pooled)) for _ in range(ROUNDS)]
                one, other = (statistics.median(side) for side in zip(*pairs, strict=True))
                ratio = statistics.median(b / a for a, b in pairs)
                print(f"request p50: client {one:.0f} us, pool {other:.0f} us, ratio {ratio:.2f}")
                pairs = [(throughput(direct), throughput(pooled)) for _ in range(ROUNDS)]
                one, other = (statistics.median(side) for side in zip(*pairs, strict=True))
                ratio = statistics.median(b / a for a, b in pairs)
                print(
                    f"{THREADS} threads: one client {one:.0f} requests/s, {CONNECTIONS} pooled connections "
                    f"{other:.0f}/s, ratio {ratio:.2f}"
                )
        finally:
            responder.terminate()
            responder.wait(10)


if __name__ == "__main__":
    main()
