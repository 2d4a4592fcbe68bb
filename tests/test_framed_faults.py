"""Framed streams through faults of brokers and links: every chunk once, in order, and nobody else disturbed.

Both sides live here, and in this process; what processes that die leave behind is in test_framed_deaths.py. Sizes are
reduced so that each test takes seconds; NATSYNC_ENDURANCE=full runs those that the promises are about.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

import natsync
from broker import QUICK
from natsync.testing import FaultProxy, NatsCluster, NatsServer, eventually
from numbered import (
    KINDS,
    PATIENCE,
    Pace,
    Taking,
    bounded,
    serve,
    sized,
)

MakeServer = Callable[..., NatsServer]
MakeProxy = Callable[..., FaultProxy]

pytestmark = pytest.mark.slow

#: Chunks of a stream that faults fall upon.
COUNT = sized(40_000, 300_000)
#: Chunks that may be on their way: fewer than lie between two of twenty faults, so that each of them hits some.
WINDOW = COUNT // 40


# -- exactly 1 … N -----------------------------------------------------------------------------------------------------


class Scene:
    """A client and a subscriber on links that can be broken, each by itself."""

    def __init__(self, stack: ExitStack, server: NatsServer | None, cluster: NatsCluster | None = None) -> None:
        self.server = server
        self.cluster = cluster
        urls: list[Any] = []
        self.proxies: list[FaultProxy] = []
        for _ in range(2):
            if cluster is not None:
                urls.append(cluster.urls)
            else:
                assert server is not None
                self.proxies.append(stack.enter_context(FaultProxy(server.url)))
                urls.append(self.proxies[-1].url)
        options = {"discover": False, "connect_timeout": PATIENCE, **QUICK}
        self.subscriber = stack.enter_context(natsync.Subscriber(urls[1], **options))
        serve(self.subscriber)
        self.client = stack.enter_context(natsync.connect(urls[0], **options))
        if cluster is not None:
            eventually(self._is_heard, PATIENCE)
        self._random = random.Random(4)

    def _is_heard(self) -> bool:
        """Whether requests find the responder at whatever node it is."""
        try:
            return list(self.client.stream("n.send", "plain 1")) == [b"1"]
        except natsync.NoRespondersError:
            return False

    def kill_broker(self) -> None:
        assert self.server is not None
        self.server.kill()
        self.server.restart()

    def kill_node(self, index: int) -> None:
        assert self.cluster is not None
        self.cluster.kill(index)
        self.cluster.restart(index)

    def drop(self, *sides: int) -> None:
        """Break the links of client (0), subscriber (1) or both, each in one way or another; returns at once."""
        for side in sides:
            proxy, chunks = self.proxies[side], (self.proxies[0].down, self.proxies[1].up)[side]
            way = self._random.randrange(4)
            if way < 2:
                (proxy.reset, proxy.cut)[way]()
            else:
                chunks.drop_after(self._random.randrange(1, 1000), ("reset", "cut")[way - 2])

    def links(self) -> list[int]:
        return [proxy.connections for proxy in self.proxies]


def drops(*sides: int) -> Callable[[Scene, int], None]:
    """A fault: these links break, and are made again."""

    def strike(scene: Scene, index: int) -> None:
        before = scene.links()

        def again() -> bool:
            return all(scene.links()[side] > before[side] for side in sides)

        scene.drop(*sides)
        try:
            eventually(again, 1.0)
        except AssertionError:  # too little was on its way
            for side in sides:
                scene.proxies[side].reset()
            eventually(again, PATIENCE, "no other link")

    return strike


#: Faults, how often each comes, and how often in the full form.
FAULTS: dict[str, tuple[Callable[[Scene, int], None], int, int]] = {
    "the broker is killed": (lambda scene, index: scene.kill_broker(), 3, 3),
    "the client's link drops": (drops(0), 20, 20),
    "the server's link drops": (drops(1), 20, 20),
    "both links drop": (drops(0, 1), 20, 20),
    "nodes are killed in turn": (lambda scene, index: scene.kill_node(index % 3), 3, 6),
}


def struck(scene: Scene, fault: str, takings: Callable[[Pace], list[Taking]], each: int) -> None:
    """Take streams of `each` chunks while the faults fall, evenly; they must be complete."""
    strike, reduced, full = FAULTS[fault]
    times = sized(reduced, full)
    pace = Pace(each / (times + 1))
    taking = takings(pace)
    for index in range(times):
        for one in taking:
            one.reach((index + 1) * each // (times + 1))
        pace.allowed = each * (index + 2) / (times + 1)
        strike(scene, index)
    pace.allowed = float("inf")
    for one in taking:
        assert one.within() is None
        assert one.number == each


@contextmanager
def scene_for(fault: str) -> Iterator[Scene]:
    with ExitStack() as stack:
        if "nodes" in fault:
            yield Scene(stack, None, stack.enter_context(NatsCluster(3)))
        else:
            yield Scene(stack, stack.enter_context(NatsServer(config="max_payload: 65536\nmax_pending: 67108864")))


@bounded(180, 600)
@pytest.mark.parametrize("shape", ["send", "send_many", "generate"] if sized(0, 1) else ["send"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_chunk_arrives_once_and_in_order_though(fault: str, shape: str) -> None:
    with scene_for(fault) as scene:

        def takings(pace: Pace) -> list[Taking]:
            return [Taking(scene.client.stream(f"n.{shape}", f"plain {COUNT}", window=WINDOW), pace=pace)]

        struck(scene, fault, takings, COUNT)


@bounded(180, 600)
@pytest.mark.parametrize("fault", FAULTS if sized(0, 1) else ["the broker is killed", "both links drop"])
def test_streams_of_every_shape_and_size_arrive_complete_though(fault: str) -> None:
    """Ten at once: by send_many and by generators, of 0 to 150,000 bytes, with consumers that pause now and then."""
    each = COUNT // 10

    with scene_for(fault) as scene:

        def takings(pace: Pace) -> list[Taking]:
            return [
                Taking(
                    scene.client.stream(f"n.{shape}", f"{kind} {each}", window=window),
                    KINDS[kind],
                    pace=pace,
                    slow=slow,
                )
                for shape, kind, window, slow in (
                    ("send", "mixed", 8192, False),
                    ("send", "mixed", 16, False),
                    ("send", "plain", 1, False),
                    ("send_many", "plain", 8192, True),
                    ("send_many", "mixed", 1024, True),
                    ("send_many", "mixed", 100_000, False),
                    ("generate", "plain", 100, False),
                    ("generate", "mixed", 8192, True),
                    ("generate", "kib", 8192, False),
                    ("generate", "kib", 7, False),
                )
            ]

        struck(scene, fault, takings, each)


# -- large chunks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 8192])
def test_a_chunk_larger_than_what_every_stream_may_keep_waits_for_credit_and_is_sent_then(
    nats_server: NatsServer, window: int
) -> None:
    with natsync.Subscriber(nats_server.url) as subscriber, natsync.connect(nats_server.url) as client:
        subscriber.stream_subscribe("f.large", lambda ctx, request: (bytes(100_000) for _ in range(100)))
        assert sum(map(len, client.stream("f.large", window=window, timeout=PATIENCE))) == 100 * 100_000
