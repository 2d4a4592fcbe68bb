"""The points of servers, by which a pool chooses where its next connection goes."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from natsync.options import Server, parse_servers
from natsync.pooling import health
from natsync.pooling.health import Health

A, B, C = parse_servers(["nats://a:1", "nats://b:2", "nats://c:3"])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """time.monotonic() of the module, to be set."""
    now = [1000.0]
    monkeypatch.setattr(health.time, "monotonic", lambda: now[0])
    return now


def first(points: Health, **connections: int) -> Server:
    return points.order({f"nats://{name}": count for name, count in connections.items()}, shuffle=False)[0]


def test_a_failure_costs_20_points_up_to_100_and_a_success_takes_a_fifth_away(clock: list[float]) -> None:
    points = Health([A, B])
    seen = []
    for _ in range(6):
        points.failed("nats://a:1")
        seen.append(points.points()["nats://a:1"])
    assert seen == [20, 40, 60, 80, 100, 100]
    points.succeeded("nats://a:1")
    assert points.points() == {"nats://a:1": 80, "nats://b:2": 0}


def test_points_fade_with_time(clock: list[float]) -> None:
    points = Health([A])
    points.failed("nats://a:1")
    clock[0] += health.HALF_LIFE_SECONDS
    assert points.points() == {"nats://a:1": 10}
    clock[0] += 9 * health.HALF_LIFE_SECONDS
    assert points.points()["nats://a:1"] < 0.1


def test_the_least_unhealthy_server_comes_first_until_the_other_has_recovered(clock: list[float]) -> None:
    points = Health([A, B])
    points.failed("nats://a:1")
    assert points.order({}, shuffle=False) == [B, A]
    for _ in range(2):
        points.failed("nats://b:2")
    assert points.order({}, shuffle=False) == [A, B]
    clock[0] += 20 * health.HALF_LIFE_SECONDS
    assert points.order({}, shuffle=False) == [A, B]


def test_equally_healthy_servers_share_the_connections() -> None:
    points, made = Health([A, B, C]), Counter[str]()
    for _ in range(9):
        made[str(points.order(made, shuffle=True)[0])] += 1
    assert set(made.values()) == {3}


def test_as_given_without_shuffling_and_by_chance_with_it() -> None:
    points = Health([A, B, C])
    assert points.order({}, shuffle=False) == [A, B, C]
    seen = {tuple(points.order({}, shuffle=True)) for _ in range(200)}
    assert seen == set(itertools.permutations([A, B, C]))


def test_a_server_that_is_named_twice_or_only_discovered_is_counted_once() -> None:
    points = Health([A, A])
    points.failed("nats://other:9")
    assert points.order({}, shuffle=True) == [A]
    assert set(points.points()) == {"nats://a:1", "nats://other:9"}
