"""Health: how much trouble each server has made lately, so that the next connection goes to the least unhealthy one.

The Go system's rule: 20 points for a failure, up to 100, and a success takes a fifth of them away. Beyond it, points
fade with time: a server that nobody dials any more must be able to recover.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Mapping

from natsync.options import Server

#: Points for a failure: a dial that failed, a link that was lost.
FAILURE_POINTS = 20.0
#: Points at most.
MOST_POINTS = 100.0
#: What a success leaves of the points.
SUCCESS_FACTOR = 0.8
#: Seconds in which points fade to half. From the most, a server is as good as any other after 100 s.
HALF_LIFE_SECONDS = 30.0
#: Servers whose points differ by less than this are equally healthy.
EQUAL_POINTS = 10.0


class Health:
    """The points of each server. Safe from any thread; nothing of it blocks."""

    def __init__(self, servers: Iterable[Server]) -> None:
        self._lock = threading.Lock()
        self._servers = list(dict.fromkeys(servers))
        self._points: dict[str, tuple[float, float]] = {}  # of a server: points, and when it had them

    def failed(self, server: str) -> None:
        """A connection to the server could not be made, or was lost."""
        with self._lock:
            self._points[server] = (min(MOST_POINTS, self._now_locked(server) + FAILURE_POINTS), time.monotonic())

    def succeeded(self, server: str) -> None:
        """A connection to the server was made."""
        with self._lock:
            points = self._now_locked(server) * SUCCESS_FACTOR
            if server in self._points:
                self._points[server] = (points, time.monotonic())

    def points(self) -> dict[str, float]:
        """The points of each server, 0 to 100; 0 = healthy. What was only discovered is in it once it failed."""
        with self._lock:
            return {name: self._now_locked(name) for name in dict.fromkeys([*map(str, self._servers), *self._points])}

    def _now_locked(self, server: str) -> float:
        points, since = self._points.get(server, (0.0, 0.0))
        return points * 0.5 ** ((time.monotonic() - since) / HALF_LIFE_SECONDS) if points else 0.0

    def order(self, connections: Mapping[str, int], *, shuffle: bool) -> list[Server]:
        """The servers, the one to dial first in front.

        The least unhealthy first; of those that are equal, the one with the fewest of the pool's connections; then by
        chance, or with shuffle=False as they were given.
        """
        servers = list(self._servers)
        if shuffle:
            random.shuffle(servers)
        points = self.points()
        return sorted(servers, key=lambda one: (points[str(one)] // EQUAL_POINTS, connections.get(str(one), 0)))
