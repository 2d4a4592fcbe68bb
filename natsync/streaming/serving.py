"""Serving: the main thread's wait in serve_forever(), and the two signals that end it."""

from __future__ import annotations

import logging
import queue
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from natsync.concurrency import fork_generation

log = logging.getLogger("natsync.streaming")

_DONE = "done"


class Serving:
    """Waits for a reason to stop, then shuts down.

    Reasons come through a SimpleQueue, because a signal handler may take no lock that the thread it interrupts may
    hold, and putting into this queue takes none.
    """

    def __init__(self) -> None:
        self._reasons: queue.SimpleQueue[str] = queue.SimpleQueue()

    def stop(self, reason: str) -> None:
        """Have the wait end; from any thread, does not wait."""
        self._reasons.put(reason)

    def run(self, begin: Callable[[], object], close: Callable[[], object], cancel: Callable[[str], object]) -> None:
        """begin(), wait for a reason, close(); a signal during close() calls cancel(), to leave it nothing to wait for.

        SIGINT and SIGTERM are caught if this is the main thread.
        """
        previous = self._catch_signals()
        try:
            begin()
            log.info("shutting down: %s", self._reasons.get())
            self._shut_down(close, cancel)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _catch_signals(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}

        generation = fork_generation()

        def caught(number: int, frame: FrameType | None) -> None:
            if generation != fork_generation():  # a process that a handler forked: the signal means what it always does
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._reasons.put(signal.Signals(number).name)

        return {number: signal.signal(number, caught) for number in (signal.SIGINT, signal.SIGTERM)}

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
