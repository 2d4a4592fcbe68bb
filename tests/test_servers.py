"""natsync.servers: which server is tried next, and how long to wait between walks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

import natsync
from natsync.errors import InvalidArgument
from natsync.options import ConnectOptions, Server, parse_servers
from natsync.servers import MAX_DISCOVERED, ServerList

A, B, C = Server("a", 1), Server("b", 2), Server("c", 3)


def listed(servers: list[Server] | str, **options: Any) -> ServerList:
    given = parse_servers(servers) if isinstance(servers, str) else servers
    return ServerList(given, ConnectOptions(**{"randomize": False, **options}))


def test_servers_are_tried_in_the_order_given() -> None:
    assert list(listed([A, B, C])) == [A, B, C]


def test_a_server_given_twice_is_tried_once() -> None:
    assert list(listed([A, B, A])) == [A, B]


def test_servers_are_tried_in_random_order_if_wanted() -> None:
    orders = {tuple(listed([A, B, C], randomize=True)) for _ in range(300)}
    assert orders == set(itertools.permutations([A, B, C]))


def test_a_server_that_failed_is_tried_last() -> None:
    servers = listed([A, B, C])
    servers.failed(A)
    assert list(servers) == [B, C, A]
    servers.failed(C)
    assert list(servers) == [B, A, C]


def test_a_failure_during_a_walk_does_not_disturb_it() -> None:
    servers, walked = listed([A, B, C]), []
    for server in servers:
        walked.append(server)
        servers.failed(server)
    assert walked == [A, B, C]


def test_the_failure_of_an_unknown_server_changes_nothing() -> None:
    servers = listed([A, B])
    servers.failed(C)
    assert list(servers) == [A, B]


@pytest.mark.parametrize("make", [natsync.Client, natsync.Subscriber, natsync.ConnectionPool])
@pytest.mark.parametrize("urls", ["tls://h:1", "nats://h:1,tls://h:2"])
def test_a_tls_url_and_tls_switched_off_are_refused(urls: str, make: Callable[..., Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"tls://h:\d and tls=False contradict"):
        make(urls, tls=False)
    assert make(urls, tls=None)


# -- discovery -------------------------------------------------------------------------------------------------------


def test_discovered_servers_are_tried_too() -> None:
    servers = listed([A])
    assert servers.discovered(["b:2", "c:3"]) == [B, C]
    assert list(servers) == [A, B, C]


def test_discovered_servers_take_over_scheme_and_credentials() -> None:
    servers = listed("tls://u:p@a:1,nats://b:2")
    assert servers.discovered(["c:3"]) == [Server("c", 3, tls=True, user="u", password="p")]


def test_known_servers_are_not_new() -> None:
    servers = listed([A, B])
    assert servers.discovered(["a:1", "b:2", "c:3", "c:3"]) == [C]
    assert servers.discovered(["c:3"]) == []
    assert list(servers) == [A, B, C]


def test_another_port_is_another_server() -> None:
    assert listed([A]).discovered(["a:7"]) == [Server("a", 7)]


def test_a_discovered_address_may_be_ipv6() -> None:
    assert listed([A]).discovered(["[::1]:4222"]) == [Server("::1", 4222, tls_name="a")]


def test_discovered_servers_are_like_the_one_that_told_of_them() -> None:
    servers = listed("nats://t@a:1,tls://u:p@b:2")
    told_by = list(servers)[1]
    assert servers.discovered(["c:3"], told_by) == [Server("c", 3, tls=True, user="u", password="p")]


@pytest.mark.parametrize("host", ["10.0.0.1", "::1"])
def test_a_server_told_of_by_address_is_verified_by_the_name_of_who_told(host: str) -> None:
    servers = listed([A])
    assert servers.discovered([str(Server(host, 2))], Server("name.example", 1)) == [
        Server(host, 2, tls_name="name.example")
    ]


def test_a_server_told_of_by_name_is_verified_by_its_own() -> None:
    (new,) = listed([A]).discovered(["b.example:2"], Server("a.example", 1))
    assert new.tls_name is None


def test_the_name_to_verify_is_handed_on_from_address_to_address() -> None:
    servers = listed([A])
    (second,) = servers.discovered(["10.0.0.2:2"], A)
    (third,) = servers.discovered(["10.0.0.3:3"], second)
    assert third.tls_name == "a"


def test_a_server_told_of_by_an_address_that_has_no_name_is_verified_by_its_address() -> None:
    (new,) = listed([A]).discovered(["10.0.0.2:2"], Server("10.0.0.1", 1))
    assert new.tls_name is None


def test_a_name_after_an_address_is_verified_by_itself() -> None:
    servers = listed([A])
    (second,) = servers.discovered(["10.0.0.2:2"], A)
    (third,) = servers.discovered(["c.example:3"], second)
    assert third.tls_name is None


@pytest.mark.parametrize("url", ["", ":", "http://x:1", "x:99999", "x:port", "[::1", 5, None, ["b:2"]])
def test_an_address_that_makes_no_sense_is_passed_over(url: Any) -> None:
    servers = listed([A])
    assert servers.discovered([url, "b:2"]) == [B]


def test_nothing_told_drops_nothing() -> None:
    servers = listed([A, B])
    servers.discovered(["c:3"])
    assert servers.discovered([]) == []
    assert list(servers) == [A, B, C]


def test_no_more_servers_are_kept_than_a_cluster_may_have() -> None:
    servers = listed([A, B])
    for round_ in range(3):
        servers.discovered([f"h{round_}-{number}:1" for number in range(MAX_DISCOVERED // 2 + 1)])
    assert len(list(servers)) == 2 + MAX_DISCOVERED
    assert servers.discovered(["late:1"]) == []


def test_discovery_can_be_switched_off() -> None:
    servers = listed([A], discover=False)
    assert servers.discovered(["b:2"]) == []
    assert list(servers) == [A]


def test_discovered_servers_come_in_random_order_if_wanted() -> None:
    orders = {tuple(listed([A], randomize=True).discovered(["b:2", "c:3"])) for _ in range(200)}
    assert orders == {(B, C), (C, B)}


# -- waiting ---------------------------------------------------------------------------------------------------------


def test_waits_double_up_to_their_maximum() -> None:
    servers = listed([A], reconnect_wait=0.5, reconnect_wait_max=8, reconnect_jitter=0)
    assert [servers.backoff(walks) for walks in range(1, 8)] == [0.5, 1, 2, 4, 8, 8, 8]


def test_the_jittered_part_of_a_wait_is_random() -> None:
    servers = listed([A], reconnect_wait=4, reconnect_wait_max=8, reconnect_jitter=0.25)
    waits = [servers.backoff(1) for _ in range(300)]
    assert 3 <= min(waits) < 3.2
    assert 3.8 < max(waits) <= 4


def test_with_full_jitter_a_wait_may_be_anything_up_to_its_value() -> None:
    servers = listed([A], reconnect_wait=1, reconnect_jitter=1)
    waits = [servers.backoff(1) for _ in range(300)]
    assert 0 <= min(waits) < 0.1
    assert 0.9 < max(waits) <= 1


def test_years_of_fruitless_walks_are_no_error() -> None:
    servers = listed([A], reconnect_wait_max=8, reconnect_jitter=0)
    assert servers.backoff(10**6) == 8


def test_no_wait_at_all_can_be_chosen() -> None:
    assert listed([A], reconnect_wait=0).backoff(5) == 0
