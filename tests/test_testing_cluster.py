"""NatsCluster: real servers that find each other, lose each other and find each other again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from natsync.protocol import Info
from natsync.testing import NatsCluster, ServerStartError, eventually
from rawclient import PATIENCE, RawClient

Make = Callable[..., NatsCluster]


class Observer(RawClient):
    """A raw client that keeps what the server says of itself and its cluster."""

    def __init__(self, url: str) -> None:
        self.info: dict[str, Any] = {}
        super().__init__(url)

    def _take(self, event: object) -> None:
        super()._take(event)
        if isinstance(event, Info):
            self.info = event.fields

    def poll(self) -> None:
        """Take what has come."""
        try:
            self._until(lambda: False, 0.02)
        except (OSError, EOFError):  # nothing came, or the server has ended the connection
            pass


@pytest.fixture
def make_cluster() -> Iterator[Make]:
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(NatsCluster(*args, **options))


def assert_connected(cluster: NatsCluster, here: int, there: int) -> None:
    """What is published at one node reaches a subscription at another one."""
    with RawClient(cluster.urls[here]) as sender, RawClient(cluster.urls[there]) as receiver:
        receiver.subscribe("c.x")
        receiver.flush()

        def arrives() -> bool:
            sender.publish("c.x", b"hello")
            sender.flush()
            return bool(receiver.received())

        eventually(arrives, PATIENCE, f"nothing goes from node {here} to node {there}")


def told(url: str) -> list[str]:
    """The servers that a node tells its clients of."""
    with Observer(url) as client:
        return sorted(client.info.get("connect_urls") or [])


def addresses(cluster: NatsCluster, *nodes: int) -> list[str]:
    return sorted(cluster.urls[node].removeprefix("nats://") for node in nodes)


def test_every_node_reaches_every_other(make_cluster: Make) -> None:
    cluster = make_cluster()
    for here, there in ((0, 1), (1, 2), (2, 0)):
        assert_connected(cluster, here, there)


def test_each_node_tells_its_clients_of_all(make_cluster: Make) -> None:
    cluster = make_cluster()
    for url in cluster.urls:
        assert told(url) == addresses(cluster, 0, 1, 2)


def test_with_no_advertise_no_node_tells_of_another(make_cluster: Make) -> None:
    cluster = make_cluster(2, no_advertise=True)
    assert [told(url) for url in cluster.urls] == [[], []]
    assert_connected(cluster, 0, 1)


def test_a_killed_node_comes_back_as_the_member_it_was(make_cluster: Make) -> None:
    cluster = make_cluster()
    urls = cluster.urls
    for node in range(3):
        cluster.kill(node)
        cluster.wait_joined()
        assert_connected(cluster, (node + 1) % 3, (node + 2) % 3)
        cluster.restart(node)
        assert cluster.urls == urls
        assert_connected(cluster, node, (node + 1) % 3)


def test_a_cluster_whose_nodes_were_all_killed_comes_back_in_any_order(make_cluster: Make) -> None:
    cluster = make_cluster()
    for node in range(3):
        cluster.kill(node)
    for node in (2, 0, 1):
        cluster.servers[node].start()
    cluster.wait_joined()
    assert_connected(cluster, 0, 2)


def test_wait_joined_says_what_is_missing(make_cluster: Make) -> None:
    cluster = make_cluster(2)
    cluster.servers[1].pause()
    with pytest.raises(ServerStartError, match="does not answer"):
        cluster.wait_joined(timeout=0.1)


def test_each_node_may_have_a_configuration_of_its_own(make_cluster: Make) -> None:
    cluster = make_cluster(config=["max_payload: 1000", "", "max_payload: 3000"])
    with ExitStack() as stack:
        clients = [stack.enter_context(Observer(url)) for url in cluster.urls]
        assert [client.info["max_payload"] for client in clients] == [1000, 1048576, 3000]


def test_one_configuration_holds_for_all_nodes(make_cluster: Make) -> None:
    cluster = make_cluster(2, config="max_payload: 2000")
    with Observer(cluster.urls[0]) as one, Observer(cluster.urls[1]) as two:
        assert (one.info["max_payload"], two.info["max_payload"]) == (2000, 2000)


def test_the_number_of_configurations_is_that_of_the_nodes() -> None:
    with pytest.raises(ValueError, match="2 configurations for a cluster of 3"):
        NatsCluster(3, ["", ""])


def test_a_cluster_has_a_node_at_least() -> None:
    with pytest.raises(ValueError, match="at least one"):
        NatsCluster(0)


def test_a_lame_duck_says_so_turns_its_clients_away_and_ends(make_cluster: Make) -> None:
    cluster = make_cluster(lame_duck_grace_period=0.3)
    with Observer(cluster.urls[1]) as client:
        cluster.lame_duck(1)

        def announced() -> bool:
            client.poll()
            return bool(client.info.get("ldm"))

        eventually(announced, PATIENCE, "the node did not announce it")
        assert sorted(client.info["connect_urls"]) == addresses(cluster, 0, 2)
        eventually(lambda: not cluster.servers[1].running, PATIENCE, "the node did not end")
    cluster.wait_joined()
    assert_connected(cluster, 0, 2)
    cluster.restart(1)
    assert_connected(cluster, 1, 0)


def test_a_node_reloads_its_configuration_in_place(make_cluster: Make) -> None:
    cluster = make_cluster(2)
    cluster.servers[0].signal(signal.SIGHUP)
    eventually(lambda: "Reloaded server configuration" in cluster.servers[0].log(), PATIENCE)
    cluster.wait_joined()


def test_a_node_may_come_back_with_another_configuration(make_cluster: Make) -> None:
    cluster = make_cluster(2)
    cluster.configs[1] = "max_payload: 4000"
    cluster.restart(1)
    with Observer(cluster.urls[1]) as client:
        assert client.info["max_payload"] == 4000


def test_a_node_that_does_not_start_ends_the_others() -> None:
    cluster = NatsCluster(3, ["", "", "no such setting"])
    with pytest.raises(ServerStartError):
        cluster.start()
    assert [server.running for server in cluster.servers] == [False, False, False]


def test_leaving_the_block_ends_all_nodes() -> None:
    with NatsCluster(2) as cluster:
        pids = [server.pid for server in cluster.servers]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
