"""Settling: who wants to know when the server has everything up to a position of the outbox.

The answer is the PONG to a PING behind that position. One PING is on its way at a time, however many wait, so waiting
costs a round trip and next to nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from natsync.session import PongCallback


class Settling:
    """Positions that are waited for, across links: a link that is lost is made up for by the next one."""

    def __init__(self, ping: Callable[[PongCallback], bool]) -> None:
        self._ping = ping  # on the present link; False if there is none
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, Callable[[], None]]] = []
        self._asked = False

    def when_confirmed(self, position: int, callback: Callable[[], None]) -> None:
        """Have callback() called, on the reader's thread, once the server has everything up to the position."""
        with self._lock:
            self._waiting.append((position, callback))
            if self._asked:
                return
            self._asked = True
        try:
            self._ask()
        except BaseException:  # a Ctrl-C: the next one asks
            self._asked = False
            raise

    def on_link(self) -> None:
        """There is a new link: ask there, whatever the old one owes."""
        with self._lock:
            self._asked = bool(self._waiting)
        if self._asked:
            self._ask()

    def _ask(self) -> None:
        if not self._ping(self._answered):
            with self._lock:
                self._asked = False  # on_link() asks again

    def _answered(self, position: int | None) -> None:
        """A PONG confirms everything up to the position; None if the link ended first."""
        reached = -1 if position is None else position
        with self._lock:
            confirmed = [callback for mark, callback in self._waiting if mark <= reached]
            self._waiting = [entry for entry in self._waiting if entry[0] > reached]
            again = self._asked = position is not None and bool(self._waiting)
        for callback in confirmed:
            callback()
        if again:
            self._ask()
