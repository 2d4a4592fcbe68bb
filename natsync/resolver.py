"""Host names to addresses, for those who cannot wait for ever.

The system's resolver cannot be interrupted and may take minutes. It runs on a thread of its own here, one for each name
that is being looked up, however many ask; whoever waits may give up, and the thread ends when the system answers.
"""

from __future__ import annotations

import socket
import threading
from typing import Any, TypeAlias

from natsync.concurrency import Signal, after_fork_in_child, spawn

#: One entry of socket.getaddrinfo().
Address: TypeAlias = "tuple[Any, Any, int, str, Any]"


class Lookup:
    """One question to the system's resolver, and those who wait for the answer."""

    def __init__(self) -> None:
        self.done = False
        self.addresses: list[Address] = []
        self.error = ""  # why there are none
        self._lock = threading.Lock()
        self._waiting: list[Signal] = []

    def await_by(self, signal: Signal) -> None:
        """Have the signal set once done."""
        with self._lock:
            self._waiting.append(signal)
            done = self.done
        if done:
            signal.set()

    def forget(self, signal: Signal) -> None:
        """Its waiter has given up."""
        with self._lock:
            self._waiting.remove(signal)

    def end(self, addresses: list[Address], error: str) -> None:
        with self._lock:
            self.addresses, self.error, self.done = addresses, error, True
            waiting = list(self._waiting)
        for signal in waiting:
            signal.set()


_lock = threading.Lock()
_under_way: dict[tuple[str, int], Lookup] = {}


def look_up(host: str, port: int) -> Lookup:
    """Ask for the addresses of a host, or join a question that is under way."""
    with _lock:
        lookup = _under_way.get((host, port))
        if lookup is not None:
            return lookup
        lookup = _under_way[host, port] = Lookup()
    try:
        spawn(lambda: _ask(lookup, host, port), "natsync-resolver")
    except RuntimeError as error:
        _end(lookup, host, port, [], f"no thread can be started to resolve the name: {error}")
    return lookup


def _ask(lookup: Lookup, host: str, port: int) -> None:
    """Ask the system; the thread's target."""
    try:
        addresses, error = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), ""
    except OSError as failure:
        addresses, error = [], failure.strerror or str(failure)
    except Exception as failure:  # UnicodeError: a label of the name is empty or too long
        addresses, error = [], f"{failure}"
    _end(lookup, host, port, addresses, error)


def _end(lookup: Lookup, host: str, port: int, addresses: list[Address], error: str) -> None:
    with _lock:
        if _under_way.get((host, port)) is lookup:
            del _under_way[host, port]
    lookup.end(addresses, error)


def _forked() -> None:
    global _lock, _under_way
    _lock, _under_way = threading.Lock(), {}


after_fork_in_child(_forked)
