"""What the subscriber of the demo serves: a relay of the third party, and a ticker.

Ordinary blocking code, as an application would write it. The notes they leave in `Journal` are for the
demo's checks.
"""

import json
import queue
import random
import threading
import time
from collections.abc import Iterator

import requests

import natsync

#: Seconds between two ticks.
TICK = 0.15

#: Seconds for connecting to the third party, and for the longest silence between two of its lines.
THIRD_PARTY_TIMEOUT = (2.0, 30.0)


class Journal:
    """What happened inside the handlers, for the demo to check and show."""

    def __init__(self) -> None:
        #: Path and time.monotonic() of each relay that has let go of its HTTP response.
        self.relay_left: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
        #: Name of the thread that ran the ticker's handler, and seconds until it returned.
        self.ticker_returned: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
        #: Name of the thread that sent the ticks.
        self.ticker_sent: queue.SimpleQueue[str] = queue.SimpleQueue()

    def wait_for_relay(self, path: str, timeout: float) -> float | None:
        """When the next relay of the path let go; None if none does within so many seconds."""
        end = time.monotonic() + timeout
        try:
            while True:
                left, at = self.relay_left.get(timeout=max(0.0, end - time.monotonic()))
                if left == path:
                    return at
        except queue.Empty:
            return None


def install(subscriber: natsync.Subscriber, third_party: str, journal: Journal) -> None:
    """Register both handlers."""

    @subscriber.stream("demo.relay")
    def relay(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        """Forward each line of the third party as it comes; the request is the path to read."""
        path = request.text()
        try:
            with ctx.closing(requests.get(third_party + path, stream=True, timeout=THIRD_PARTY_TIMEOUT)) as response:
                response.raise_for_status()
                yield from response.iter_lines()
        finally:
            journal.relay_left.put((path, time.monotonic()))

    @subscriber.stream("demo.ticker")
    def ticker(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        """Return at once and send from a thread of one's own; the request is the number of ticks."""
        begin = time.monotonic()
        threading.Thread(target=_tick, args=(ctx, sender, int(request.data), journal), name="demo-ticker").start()
        journal.ticker_returned.put((threading.current_thread().name, time.monotonic() - begin))


def _tick(ctx: natsync.Context, sender: natsync.ResponseSender, count: int, journal: Journal) -> None:
    price, dice = 100.0, random.Random(count)
    for number in range(1, count + 1):
        if sender.is_closed() or ctx.wait(TICK):
            return
        price += dice.uniform(-1.5, 1.5)
        sender.send(json.dumps({"tick": number, "price": round(price, 2)}))
    journal.ticker_sent.put(threading.current_thread().name)
    sender.end()
