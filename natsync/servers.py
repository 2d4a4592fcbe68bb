"""Which server to try next: the list given, those discovered, and how long to wait between walks over them.

Not thread-safe: the connection's supervisor owns it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

from natsync.errors import InvalidURL
from natsync.options import ConnectOptions, Server, parse_server


class ServerList:
    """The servers of one connection, in the order in which they are tried."""

    def __init__(self, servers: list[Server], options: ConnectOptions) -> None:
        self._options = options
        self._given = list(dict.fromkeys(servers))
        self._order = list(self._given)
        if options.randomize:
            random.shuffle(self._order)

    def __iter__(self) -> Iterator[Server]:
        """One walk over all servers."""
        return iter(list(self._order))

    def failed(self, server: Server) -> None:
        """The server could not be reached or was lost: try it last from now on."""
        if server in self._order:
            self._order.remove(server)
            self._order.append(server)

    def discovered(self, urls: Iterable[str]) -> list[Server]:
        """Add servers that the cluster tells of as host:port; returns those that are new.

        They take over scheme and credentials of the first given server. Nothing is ever dropped: a server that left
        the cluster for a restart is still worth a try.
        """
        if not self._options.discover:
            return []
        first, known = self._given[0], {(server.host, server.port) for server in self._order}
        new = []
        for url in urls:
            try:
                told = parse_server(url)
            except (InvalidURL, TypeError):
                continue
            if (told.host, told.port) not in known:
                known.add((told.host, told.port))
                new.append(replace(first, host=told.host, port=told.port))
        if self._options.randomize:
            random.shuffle(new)
        self._order.extend(new)
        return new

    def backoff(self, walks: int) -> float:
        """Seconds to wait after so many fruitless walks over all servers: exponential, the jittered part random."""
        full = min(self._options.reconnect_wait_max, self._options.reconnect_wait * 2.0 ** min(walks - 1, 30))
        return full * (1 - self._options.reconnect_jitter * random.random())
