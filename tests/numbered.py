"""Streams of numbered chunks: handlers that send them, consumers that notice the first one that does not belong there.

Handlers of all shapes are registered by serve(); a Taking reads a stream on a thread of its own. What a responder's
handler came to is kept by Handled.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

import natsync
from broker import Outcome
from natsync.testing import eventually

FULL = os.environ.get("NATSYNC_ENDURANCE") == "full"
#: Seconds for what must come; a loaded machine is slow.
PATIENCE = 30.0
#: Sizes of mixed(), in turn: none, one byte, some, and more than a max_payload of 64 KiB.
SIZES = (0, 1, 30, 0, 500, 3, 8191, 12, 7, 9000, 0, 64, 2, 150_000, 33, 1000)
#: Bytes that no chunk of a mixed() stream starts anew, so that chunks differ in all their bytes.
_TEXT = bytes(range(256)) * 600


def sized(reduced: int, full: int) -> int:
    return full if FULL else reduced


def bounded(seconds: float, full: float) -> pytest.MarkDecorator:
    """The time after which pytest gives the test up."""
    return pytest.mark.timeout(full if FULL else seconds)


# -- chunks ------------------------------------------------------------------------------------------------------------


def plain(number: int) -> bytes:
    return b"%d" % number


def mixed(number: int) -> bytes:
    """A chunk of a size that no neighbour has, and now and then a large one."""
    size = SIZES[number * 7 % 16] if number % 97 == 0 else SIZES[number * 5 % 13]
    begin = number % 251
    return _TEXT[begin : begin + size]


def kib(number: int) -> bytes:
    return b"%010d" % number + bytes(1014)


def large(number: int) -> bytes:
    return b"%010d" % number + bytes((60 << 10) - 10)


KINDS: dict[str, Callable[[int], bytes]] = {"plain": plain, "mixed": mixed, "kib": kib, "large": large}


def numbers(request: natsync.Message) -> Iterator[bytes]:
    """The chunks that a request asks for: `<kind> <last>` or `<kind> <first> <last>`."""
    kind, *bounds = request.data.decode().split()
    first, last = (1, int(bounds[0])) if len(bounds) == 1 else map(int, bounds)
    return map(KINDS[kind], range(first, last + 1))


# -- handlers ----------------------------------------------------------------------------------------------------------


def send(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
    for chunk in numbers(request):
        sender.send(chunk)
    sender.end()


def send_many(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
    chunks = numbers(request)
    while run := list(itertools.islice(chunks, 700)):
        sender.send_many(run)
    sender.end()


def generate(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
    yield from numbers(request)


def serve(subscriber: natsync.Subscriber) -> None:
    """Register a handler of each shape, as n.send, n.send_many and n.generate."""
    for handler in (send, send_many, generate):
        subscriber.stream_subscribe(f"n.{handler.__name__}", handler, queue="n")


class Handled:
    """What one request came to at its responder."""

    def __init__(self, ctx: natsync.Context, sender: natsync.ResponseSender) -> None:
        self.ctx = ctx
        self.sender = sender
        self.reached = 0  # chunks whose send() has returned
        self.error: BaseException | None = None
        self.ended_at: float | None = None
        ctx.on_cancel(self._note)

    def _note(self) -> None:
        self.ended_at = time.monotonic()

    def wait_ended(self, seconds: float) -> float:
        """When the context ended, which must be within so many seconds from now."""
        eventually(lambda: self.ended_at is not None and self.sender.closed.is_set(), seconds, "the handler goes on")
        assert self.ended_at is not None
        return self.ended_at


class Recording:
    """A handler that sends until it is stopped, as the request says, and keeps what each request came to.

    "idle" sends one chunk and waits; "fast" sends as fast as it may; "steady" a chunk every 5 ms; "silent" nothing.
    """

    def __init__(self) -> None:
        self.all: list[Handled] = []

    def __call__(self, ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        handled = Handled(ctx, sender)
        self.all.append(handled)
        try:
            for number in itertools.count(1):
                if request.data == b"silent" or (request.data == b"idle" and number > 1):
                    ctx.wait()
                    ctx.check()
                sender.send(plain(number))
                handled.reached = number
                if request.data == b"steady":
                    ctx.wait(0.005)
        except BaseException as error:
            handled.error = error
            raise

    def wait(self, count: int = 1) -> Handled:
        """The count-th request's."""
        eventually(lambda: len(self.all) >= count, PATIENCE, f"no request number {count}")
        return self.all[count - 1]


# -- consumers ---------------------------------------------------------------------------------------------------------


class Pace:
    """How far consumers may go: so that a fault that is meant for the middle of a stream finds it there."""

    def __init__(self, allowed: float = float("inf")) -> None:
        self.allowed = allowed

    def wait(self, number: int) -> None:
        until = time.monotonic() + PATIENCE
        while number > self.allowed:
            assert time.monotonic() < until, "the consumer was never told to go on"
            time.sleep(0.001)


class Taking:
    """Reads a stream of numbered chunks on a thread; ends with an AssertionError at the first wrong one."""

    def __init__(
        self,
        stream: Iterable[bytes],
        kind: Callable[[int], bytes] = plain,
        *,
        pace: Pace | None = None,
        slow: bool = False,
    ) -> None:
        self.number = 0  # of the last chunk
        self._stream = stream
        self._kind = kind
        self._pace = pace or Pace()
        self._slow = slow
        self._outcome = Outcome(self._take)

    def _take(self) -> None:
        kind = self._kind
        for number, chunk in enumerate(self._stream, 1):
            if chunk != kind(number):
                raise AssertionError(f"in place of number {number} came {chunk[:20]!r} ({len(chunk)} bytes)")
            self.number = number
            if number > self._pace.allowed:
                self._pace.wait(number)
            if self._slow and number % 4000 == 0:
                time.sleep(0.1)

    @property
    def running(self) -> bool:
        return self._outcome.running

    def within(self, seconds: float = PATIENCE) -> BaseException | None:
        """What ended it, which must be in time: None at the stream's end."""
        return self._outcome.within(seconds)

    def reach(self, number: int, seconds: float = PATIENCE) -> None:
        """Block until it has this chunk."""

        def there() -> bool:
            if self.number < number and not self.running and self._outcome.error is not None:
                raise self._outcome.error
            return self.number >= number

        eventually(there, seconds, f"number {number} never came, {self.number} was the last")


def take_exactly(client: natsync.Client, subject: str, kind: str, count: int, **options: Any) -> None:
    """Ask for a stream and take it, on this thread: all of it, in order, and then its end."""
    taken = 0
    with client.stream(subject, f"{kind} {count}", **options) as stream:
        for taken, chunk in enumerate(stream, 1):
            assert chunk == KINDS[kind](taken), f"in place of number {taken} came {chunk[:20]!r}"
    assert taken == count
