"""Which server to try next: the list given, those discovered, and how long to wait between walks over them.

Not thread-safe: the connection's supervisor owns it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

from natsync.errors import InvalidURL
from natsync.options import ConnectOptions, Server, parse_server

#: Servers that are kept of those that were told of. No cluster has as many; a server gone mad may tell of more.
MAX_DISCOVERED = 1000


class ServerList:
    """The servers of one connection, in the order in which they are tried."""

    def __init__(self, servers: list[Server], options: ConnectOptions) -> None:
        self._options = options
        self._given = list(dict.fromkeys(servers))
        self._order = list(self._given)
        self._room = MAX_DISCOVERED
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

    def discovered(self, urls: Iterable[str], through: Server | None = None) -> list[Server]:
        """Add servers that the cluster tells of as host:port; returns those that are new.

        They take over scheme and credentials of the server that told of them, by default the first given one; and its
        name, if they are told of by IP address: certificates are for names. Nothing is ever dropped: a server that left
        the cluster for a restart is still worth a try.
        """
        if not self._options.discover:
            return []
        told_by = through or self._given[0]
        known = {(server.host, server.port) for server in self._order}
        new: list[Server] = []
        for url in urls:
            try:
                told = parse_server(url)
            except (InvalidURL, TypeError):
                continue
            if (told.host, told.port) not in known and len(new) < self._room:
                known.add((told.host, told.port))
                new.append(replace(told_by, host=told.host, port=told.port, tls_name=_tls_name(told, told_by)))
        if self._options.randomize:
            random.shuffle(new)
        self._order.extend(new)
        self._room -= len(new)
        return new

    def backoff(self, walks: int) -> float:
        """Seconds to wait after so many fruitless walks over all servers: exponential, the jittered part random."""
        full = min(self._options.reconnect_wait_max, self._options.reconnect_wait * 2.0 ** min(walks - 1, 30))
        return full * (1 - self._options.reconnect_jitter * random.random())


def _tls_name(told: Server, told_by: Server) -> str | None:
    """The name to verify where a server was told of by its IP address, through one that is known by name."""
    if not told.is_address:
        return None
    return told_by.host if not told_by.is_address else told_by.tls_name
