"""Several real nats-servers in one full-mesh cluster on the loopback interface, to lose nodes of and get them back.

Each node is a NatsServer, steered as such; this module only joins them, and knows when they are joined. No thread is
used; every wait is bounded; one thread at a time should steer a cluster. nats-server 2.9 and later will do.
"""

from __future__ import annotations

import http.client
import json
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from natsync.testing.server import HOST, NatsServer, ServerStartError

#: Seconds until every node has its routes to all others. It takes about 0.1; a loaded machine needs more.
JOIN_TIMEOUT = 15.0
#: Seconds between two looks at the nodes' routes.
POLL_INTERVAL = 0.01
#: Seconds that lame duck mode takes to turn all clients away; the server accepts no less.
LAME_DUCK_DURATION = 30.0
#: Seconds from the announcement of lame duck mode until the first client is turned away. More than a move takes, which
#: is 1.5 at least; the server's own is 10.
LAME_DUCK_GRACE_PERIOD = 4.0


class NatsCluster:
    """size nats-servers, each with a route to each other; a context manager.

    `config` is nats-server configuration text for all nodes, or a sequence with one text a node, without anything of
    the cluster; the attribute `configs` holds one a node and is read again at each start() and restart(). With
    no_advertise the nodes do not tell their clients of each other. Nothing runs until start() or `with`. Ports, once
    known, stay: a node that was killed comes back by restart() as the member it was. What a client subscribes at one
    node reaches the others a moment after its flush, as in every NATS cluster.
    """

    def __init__(
        self,
        size: int = 3,
        config: str | Sequence[str] | None = None,
        *,
        no_advertise: bool = False,
        lame_duck_duration: float = LAME_DUCK_DURATION,
        lame_duck_grace_period: float = LAME_DUCK_GRACE_PERIOD,
    ) -> None:
        self.configs = [config or ""] * size if config is None or isinstance(config, str) else list(config)
        if size < 1 or len(self.configs) != size:
            raise ValueError(
                f"{len(self.configs)} configurations for a cluster of {size}; one a node, and at least one"
            )
        self._no_advertise = no_advertise
        self._timing = (
            f'lame_duck_duration: "{lame_duck_duration:g}s"\nlame_duck_grace_period: "{lame_duck_grace_period:g}s"\n'
        )
        self._routes: list[str] = []
        #: The nodes; each may be killed, paused, resumed and signalled by itself.
        self.servers = [NatsServer(args=["-m", "-1"]) for _ in self.configs]

    def __repr__(self) -> str:
        return f"<NatsCluster {self.servers!r}>"

    @property
    def urls(self) -> list[str]:
        """The nodes' client URLs, those of dead nodes included."""
        return [server.url for server in self.servers]

    def start(self) -> NatsCluster:
        """Start all nodes; blocks until each has its routes to all others.

        Raises:
            ServerNotFound: there is no nats-server binary.
            ServerStartError: a node did not start, or the nodes did not find each other in JOIN_TIMEOUT seconds.
        """
        with ExitStack() as undo:
            undo.callback(self.close)
            for index, server in enumerate(self.servers):
                self._configure(index)
                server.start()
                self._routes[index:] = server.ports["cluster"]
            for index in range(len(self.servers)):
                self._configure(index)  # for its next start: those that came after it are known now
            self.wait_joined()
            undo.pop_all()
        return self

    def close(self) -> None:
        """Stop all nodes and remove what they stored. Idempotent."""
        for server in self.servers:
            server.close()

    def __enter__(self) -> NatsCluster:
        return self.start()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def wait_joined(self, timeout: float = JOIN_TIMEOUT) -> None:
        """Block until each running node has its routes to all other running nodes, and to no others.

        Raises:
            ServerStartError: that was not so in time; the log shown is the first running node's.
        """
        deadline = time.monotonic() + timeout
        while (state := self._routes_missing(max(0.1, deadline - time.monotonic()))) is not None:
            if time.monotonic() >= deadline:
                log = next((server.log() for server in self.servers if server.running), "")
                raise ServerStartError(f"the cluster's routes were not complete after {timeout:g} s: {state}", log)
            time.sleep(POLL_INTERVAL)

    # --- faults ---------------------------------------------------------------------------------------------

    def kill(self, index: int) -> None:
        """End a node by SIGKILL. The others notice on their own, at once; wait_joined() tells when they have."""
        self.servers[index].kill()

    def restart(self, index: int) -> NatsServer:
        """Stop a node if it runs, start it on the ports it had, and return it when it is in the cluster again.

        Raises as start() does.
        """
        self._configure(index)
        server = self.servers[index].restart()
        self.wait_joined()
        return server

    def lame_duck(self, index: int) -> None:
        """Have a node tell its clients that it will leave, turn them away after the grace period, and end.

        Returns when the signal is sent. With few clients, the node turns one away each second; then it exits.
        """
        self.servers[index].signal(signal.SIGUSR2)

    # --- inside ---------------------------------------------------------------------------------------------

    def _configure(self, index: int) -> None:
        """Write the node's configuration, for its next start."""
        # Port -1: the node binds a free port for routes and reports it to those that come after it.
        known = self._routes[index] if index < len(self._routes) else f"nats://{HOST}:-1"
        others = [f'"{route}"' for other, route in enumerate(self._routes) if other != index]
        self.servers[index].config = (
            f'server_name: "node-{index}"\n'
            "cluster {\n"
            '  name: "natsync"\n'
            f'  listen: "{urlsplit(known).netloc}"\n'
            f"  routes: [{', '.join(others)}]\n"
            f"  no_advertise: {str(self._no_advertise).lower()}\n"
            "}\n" + self._timing + self.configs[index]
            # Ahead of the caller's text, whose word counts where both name a setting.
        )

    def _routes_missing(self, timeout: float) -> str | None:
        """What is not yet as it should be, in words; None if all running nodes are joined."""
        running = [server for server in self.servers if server.running]
        try:
            infos = {server.url: _monitor(server, "varz", timeout) for server in running}
            routes = {server.url: _monitor(server, "routez", timeout)["routes"] or [] for server in running}
        except (OSError, http.client.HTTPException, ValueError) as error:
            return f"a node does not answer: {error!r}"
        ids = {url: info["server_id"] for url, info in infos.items()}
        for url, info in infos.items():
            # Since 2.10 several routes join two servers, an account's traffic using one of them; and one more for
            # each account that has a route to itself.
            wanted = max(1, info["cluster"].get("pool_size", 1))
            found = Counter(route["remote_id"] for route in routes[url] if not route.get("account"))
            others = set(ids.values()) - {ids[url]}
            if set(found) != others or any(count < wanted for count in found.values()):
                return f"{url} has {dict(found)} routes; wanted {wanted} to each of {sorted(others)}"
        return None


def _monitor(server: NatsServer, page: str, timeout: float) -> dict[str, Any]:
    """A page of a node's monitoring port."""
    address = urlsplit(server.ports["monitoring"][0])
    # Not urllib: a proxy of the environment is none of our business.
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=timeout)
    try:
        connection.request("GET", f"/{page}")
        body: dict[str, Any] = json.loads(connection.getresponse().read())
        return body
    finally:
        connection.close()
