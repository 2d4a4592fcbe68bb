"""Signals of commands that run until told to stop, or that must take down processes they have started."""

import os
import signal
from collections.abc import Callable, Iterator
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


@contextmanager
def awaited(*signals: signal.Signals) -> Iterator[Callable[[], signal.Signals]]:
    """Within the block the signals only wake the function it yields, which blocks and returns the next one.

    For the main thread only.
    """
    incoming, outgoing = os.pipe()
    os.set_blocking(outgoing, False)
    # The interpreter writes the number of each signal into the pipe, so none is missed between two waits.
    former_pipe = signal.set_wakeup_fd(outgoing)
    former = {number: signal.signal(number, _nothing) for number in signals}
    try:
        yield lambda: signal.Signals(os.read(incoming, 1)[0])
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
