"""pytest fixtures: a real nats-server, or a cluster, and a client and a subscriber connected to it.

Loaded into every pytest run of an environment that has natsync, so it imports nothing but pytest; the
fixtures import what they need. A machine without the nats-server binary gets an error from them, never a
skip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import natsync
    from natsync.testing.cluster import NatsCluster
    from natsync.testing.proxy import FaultProxy
    from natsync.testing.server import NatsServer


@pytest.fixture(scope="session")
def nats_server_options() -> dict[str, Any]:
    """The arguments of nats_server; override it in conftest.py for JetStream, TLS or other configuration."""
    return {}


@pytest.fixture
def natsync_options() -> dict[str, Any]:
    """The connection options of natsync_client and natsync_subscriber; override it for TLS and credentials."""
    return {}


@pytest.fixture(scope="session")
def nats_server(nats_server_options: dict[str, Any]) -> Iterator[NatsServer]:
    """A running NatsServer, shared by the whole run: leave it running. For faults: make_nats_server."""
    from natsync.testing.server import NatsServer

    with NatsServer(**nats_server_options) as server:
        yield server


@pytest.fixture
def make_nats_server() -> Iterator[Callable[..., NatsServer]]:
    """make_nats_server(**options) starts a NatsServer of the test's own; all are closed at its end."""
    from natsync.testing.server import NatsServer

    with ExitStack() as stack:

        def make(*args: Any, **options: Any) -> NatsServer:
            return stack.enter_context(NatsServer(*args, **options))

        yield make


@pytest.fixture
def make_nats_cluster() -> Iterator[Callable[..., NatsCluster]]:
    """make_nats_cluster(size=3, **options) starts a NatsCluster of the test's own; all are closed at its end."""
    from natsync.testing.cluster import NatsCluster

    with ExitStack() as stack:

        def make(*args: Any, **options: Any) -> NatsCluster:
            return stack.enter_context(NatsCluster(*args, **options))

        yield make


@pytest.fixture
def make_fault_proxy(nats_server: NatsServer) -> Iterator[Callable[..., FaultProxy]]:
    """make_fault_proxy(target=nats_server.url, **options) starts a FaultProxy; all are closed at the test's end."""
    from natsync.testing.proxy import FaultProxy

    with ExitStack() as stack:

        def make(target: str | int = nats_server.url, **options: Any) -> FaultProxy:
            return stack.enter_context(FaultProxy(target, **options))

        yield make


@pytest.fixture
def natsync_client(nats_server: NatsServer, natsync_options: dict[str, Any]) -> Iterator[natsync.Client]:
    """A natsync.Client for nats_server; it connects at its first use and is closed when the test ends."""
    import natsync

    client = natsync.Client(nats_server.url, **natsync_options)
    yield client
    client.close()


@pytest.fixture
def natsync_subscriber(nats_server: NatsServer, natsync_options: dict[str, Any]) -> Iterator[natsync.Subscriber]:
    """A natsync.Subscriber for nats_server, not open yet; it is closed when the test ends."""
    import natsync

    subscriber = natsync.Subscriber(nats_server.url, **natsync_options)
    yield subscriber
    subscriber.close()
