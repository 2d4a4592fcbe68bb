"""Serving: the main thread's wait in serve_forever(), and the two signals that end it."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from natsync.concurrency import fork_generation

log = logging.getLogger("natsync.streaming")

_DONE = "done"


class Inbox:
    """Words for a thread that waits for them, from other threads and from signal handlers.

    put() takes no lock, which the thread that a signal interrupts might hold. And the wait is for a socket, into which
    the interpreter itself writes when a signal comes: one that falls between the last look for signals and a wait on a
    lock would wake nobody.
    """

    def __init__(self) -> None:
        self._words: deque[str] = deque()
        self._incoming, self._outgoing = socket.socketpair()
        self._outgoing.setblocking(False)

    def put(self, word: str) -> None:
        """Have it taken; does not wait. Without effect once closed."""
        self._words.append(word)
        with suppress(OSError):  # full, so the reader is awake anyway; or closed
            self._outgoing.send(b"\0")

    def get(self) -> str:
        """The next word; blocks until there is one."""
        while not self._words:
            self._incoming.recv(4096)
        return self._words.popleft()

    @contextmanager
    def signals(self, *numbers: int) -> Iterator[None]:
        """Within the block each of the signals is taken as a word, its name. Main thread only."""
        generation = fork_generation()

        def caught(number: int, frame: FrameType | None) -> None:
            if generation != fork_generation():  # a process that a handler forked: the signal means what it always does
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.put(signal.Signals(number).name)

        pipe = signal.set_wakeup_fd(self._outgoing.fileno(), warn_on_full_buffer=False)
        former: dict[int, Any] = {number: signal.signal(number, caught) for number in numbers}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(pipe)

    def close(self) -> None:
        self._incoming.close()
        self._outgoing.close()


class Serving:
    """Waits for a reason to stop, then shuts down. For one run()."""

    def __init__(self) -> None:
        self._reasons = Inbox()

    def stop(self, reason: str) -> None:
        """Have the wait end; from any thread, does not wait."""
        self._reasons.put(reason)

    def run(self, begin: Callable[[], object], close: Callable[[], object], cancel: Callable[[str], object]) -> None:
        """begin(), wait for a reason, close(); a signal during close() calls cancel(), to leave it nothing to wait for.

        SIGINT and SIGTERM are caught if this is the main thread.
        """
        try:
            with self._signals_caught():
                begin()
                log.info("shutting down: %s", self._reasons.get())
                self._shut_down(close, cancel)
        finally:
            self._reasons.close()

    @contextmanager
    def _signals_caught(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with self._reasons.signals(signal.SIGINT, signal.SIGTERM):
            yield

    def _shut_down(self, close: Callable[[], object], cancel: Callable[[str], object]) -> None:
        """close() in a thread of its own, while this one listens for a second signal."""

        def work() -> None:
            try:
                close()
            finally:
                self._reasons.put(_DONE)

        thread = threading.Thread(target=work, name="natsync-shutdown", daemon=True)
        thread.start()
        while (reason := self._reasons.get()) != _DONE:
            if reason.startswith("SIG"):
                log.warning("%s again: cancelling what is under way", reason)
                cancel("the responder was told to stop at once")
        thread.join()
