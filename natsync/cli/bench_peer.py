"""The other side of `natsync bench`, a forked process: answers requests, sends streams, counts messages."""

import json
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection as Pipe

import natsync
from natsync.cli.connection import options_given, quieten_log, server_given
from natsync.cli.failures import one_line

#: Seconds that the process gets to end.
_PATIENCE = 5.0
#: Seconds without a message after which no more are expected.
_SILENCE = 2.0
_READY = "ready"


class Peer:
    """The other side, as the measuring process knows it."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def wait_ready(self, timeout: float) -> None:
        """Return when it serves.

        Raises:
            natsync.NatsError: it could not, or not in time; the text says why.
        """
        if not self._pipe.poll(timeout):
            raise natsync.TimedOut(f"the other side was not ready within {timeout:g} s")
        word = self._pipe.recv()
        if word != _READY:
            raise natsync.NatsError(word)

    def wait_arrived(self) -> tuple[int, float]:
        """How many messages have arrived, and the time.monotonic() of the last; returns when no more come."""
        self._pipe.send("how many?")
        arrived: tuple[int, float] = self._pipe.recv()
        return arrived


@contextmanager
def peer(kind: str, subject: str, messages: int, size: int) -> Iterator[Peer]:
    """A process that serves the subject for the length of the block. No thread may run in this one yet."""
    context = multiprocessing.get_context("fork")  # so that no credential has to leave this process
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(ours, theirs, kind, subject, messages), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Peer(ours)
    finally:
        ours.close()
        process.join(_PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(ours: Pipe, pipe: Pipe, kind: str, subject: str, messages: int) -> None:
    ours.close()  # so that the end of the other process is the end of the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the other process's, which then closes the pipe
    quieten_log()
    counter = _Counter(messages)

    def chunks(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        wanted = json.loads(request.data)
        payload = b"x" * wanted["size"]
        for _ in range(wanted["count"]):
            yield payload

    def echo(ctx: natsync.Context, request: natsync.Message) -> bytes:
        return request.data

    options = {"name": "natsync-bench", **options_given(), "pending_messages": messages + 1, "pending_bytes": 1 << 30}
    try:
        with natsync.Subscriber(server_given(), **options) as subscriber:
            if kind == "stream":
                subscriber.stream_subscribe(subject, chunks)
            elif kind == "request":
                subscriber.handler(subject)(echo)
            else:
                subscriber.subscribe(subject, counter.take)
            pipe.send(_READY)
            with suppress(EOFError):
                while pipe.recv():
                    pipe.send(counter.result())
            subscriber.close(0)
    except (natsync.NatsError, OSError) as error:
        with suppress(OSError):  # the measuring process may have failed in the same way, and gone
            pipe.send(one_line(error))


class _Counter:
    """Counts messages as they come."""

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._arrived = 0
        self._last = time.monotonic()
        self._all = threading.Event()

    def take(self, message: natsync.Message) -> None:
        self._arrived += 1
        self._last = time.monotonic()
        if self._arrived >= self._expected:
            self._all.set()

    def result(self) -> tuple[int, float]:
        """Wait for all, or until no more have come for a while."""
        seen = -1
        while self._arrived != seen and not self._all.is_set():
            seen = self._arrived
            self._all.wait(_SILENCE)
        return self._arrived, self._last
