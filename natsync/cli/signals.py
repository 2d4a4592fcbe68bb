"""Signals of commands that run until told to stop, or that must take down processes they have started."""

import os
import select
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(SystemExit):
    """The signal came; uncaught, it ends the process with the status that a shell reports for that."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def hangups() -> list[signal.Signals]:
    """What tells that the terminal is gone: SIGHUP, unless it is ignored, as by nohup, or the platform has none."""
    hangup = getattr(signal, "SIGHUP", None)
    return [] if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN else [hangup]


@contextmanager
def signals_unwind() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise Terminated in the main thread, as Ctrl-C raises KeyboardInterrupt."""
    former = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, *hangups())}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class NextSignal:
    """Blocks, and returns the next signal."""

    def __init__(self, incoming: int) -> None:
        self._incoming = incoming

    def __call__(self) -> signal.Signals:
        return signal.Signals(os.read(self._incoming, 1)[0])

    def wait(self, descriptors: Iterable[int] = (), timeout: float | None = None) -> signal.Signals | None:
        """As a call; None if one of the descriptors has something to read or has come to its end, or time is up."""
        poll = select.poll()
        for descriptor in (self._incoming, *descriptors):
            poll.register(descriptor, select.POLLIN)
        ready = dict(poll.poll(None if timeout is None else timeout * 1000))
        return self() if self._incoming in ready else None


@contextmanager
def awaited(*signals: signal.Signals) -> Iterator[NextSignal]:
    """Within the block the signals only wake the function it yields, which blocks and returns the next one.

    For the main thread only.
    """
    incoming, outgoing = os.pipe()
    os.set_blocking(outgoing, False)
    # The interpreter writes the number of each signal into the pipe, so none is missed between two waits.
    former_pipe = signal.set_wakeup_fd(outgoing)
    former = {number: signal.signal(number, _nothing) for number in signals}
    try:
        yield NextSignal(incoming)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(former_pipe)
        os.close(incoming)
        os.close(outgoing)


def _leave(number: int, frame: FrameType | None) -> None:
    if number in hangups():
        signal.signal(number, _nothing)  # the shell and the kernel send one each, and one is enough
    raise Terminated(number)


def _nothing(number: int, frame: FrameType | None) -> None:
    pass
