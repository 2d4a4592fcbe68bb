"""A server in lame duck mode is left for another one: nothing lost, nothing doubled, everything in order."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

import natsync
from broker import QUICK, Broker, Events, Outcome, opened, refuse
from natsync import timers
from natsync.handover import Handover, Phase
from natsync.outbox import Outbox
from natsync.protocol import Batch, Sub, Unsub
from natsync.testing import FaultProxy, NatsCluster, NatsServer, PeerConnection, ScriptedPeer, eventually

#: How far behind the publishers a busy machine's callback gets is not what is tested here.
ROOM: dict[str, Any] = {"pending_messages": 10**7, "pending_bytes": 10**9}


@pytest.fixture
def cluster() -> Iterator[NatsCluster]:
    # The grace period is long enough for the handover, which begins with the announcement.
    with NatsCluster(3, lame_duck_grace_period=8.0) as nodes:
        yield nodes
        nodes.kill(0)  # in lame duck mode it takes its time


class Numbers:
    """Publishes 0, 1, 2 … on a subject from a thread of its own, until stopped."""

    def __init__(self, client: natsync.Client, subject: str, **options: Any) -> None:
        self.count = 0
        self._client = client
        self._subject = subject
        self._options = options
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.0005):
            for _ in range(50):
                self._client.publish(self._subject, b"%d" % self.count, **self._options)
                self.count += 1

    def stop(self) -> int:
        self._stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._client.flush()
        return self.count


def moved(events: Events, client: natsync.Client, away_from: str) -> None:
    events.wait("reconnected")
    assert client.stats()["server"] != away_from


# -- real servers -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_leaving_a_lame_duck_loses_nothing_doubles_nothing_and_keeps_the_order(cluster: NatsCluster) -> None:
    events = Events()
    got: dict[str, list[int]] = {}
    with (
        natsync.connect(cluster.urls[0], on_event=events, name="mover") as mover,
        natsync.connect(cluster.urls[0], name="stays-behind", discover=False) as at_the_lame,
        natsync.connect(cluster.urls[1]) as second,
        natsync.connect(cluster.urls[2]) as third,
    ):
        mover.subscribe("n.*", lambda message: got.setdefault(message.subject, []).append(int(message.data)), **ROOM)
        mover.flush()
        with_interest(cluster, mover)
        publishers = [Numbers(one, f"n.{name}") for name, one in (("2", second), ("3", third), ("own", mover))]
        early = Numbers(at_the_lame, "n.lame")
        eventually(lambda: len(got) == 4)
        cluster.lame_duck(0)
        published = {}
        moved(events, mover, cluster.urls[0])
        published["n.lame"] = early.stop()
        # Some more behind the move, so that a message that is lost or doubled late would show too.
        seen = {one: one.count for one in publishers}
        eventually(lambda: all(one.count > seen[one] + 500 for one in publishers), 10)
        published.update({one._subject: one.stop() for one in publishers})
        eventually(lambda: all(len(got[name]) >= published[name] for name in published), 30)
        assert {name: numbers == list(range(published[name])) for name, numbers in got.items()} == dict.fromkeys(
            published, True
        )
        assert "disconnected" not in events.names
        assert mover.stats()["reconnects"] == 1


def with_interest(cluster: NatsCluster, client: natsync.Client) -> None:
    """Wait until every node's messages reach the client: a subscription takes a moment to get around."""
    for url in cluster.urls:
        with natsync.connect(url, discover=False) as other:
            with_interest_of(client, other)


def with_interest_of(client: natsync.Client, other: natsync.Client) -> None:
    sub = client.subscribe("interest.known")
    client.flush()
    eventually(lambda: knocks(other, sub))
    sub.unsubscribe()


def knocks(client: natsync.Client, sub: natsync.Subscription) -> bool:
    client.publish("interest.known")
    client.flush()
    try:
        sub.next(timeout=0.1)
    except natsync.TimedOut:
        return False
    return True


@pytest.mark.slow
def test_members_of_a_queue_group_handle_every_message_once_while_one_of_them_moves(cluster: NatsCluster) -> None:
    events = Events()
    got: Counter[int] = Counter()
    lock = threading.Lock()

    def take(message: natsync.Message) -> None:
        with lock:
            got[int(message.data)] += 1

    with (
        natsync.connect(cluster.urls[0], on_event=events) as mover,
        natsync.connect(cluster.urls[1]) as stays,
        natsync.connect(cluster.urls[2]) as source,
    ):
        for member in (mover, stays):
            member.subscribe("work", take, queue="w", **ROOM)
            member.flush()
        with_interest(cluster, mover)
        numbers = Numbers(source, "work")
        eventually(lambda: len(got) > 500)
        cluster.lame_duck(0)
        moved(events, mover, cluster.urls[0])
        count = numbers.count
        eventually(lambda: numbers.count > count + 500, 10)
        published = numbers.stop()
        eventually(lambda: len(got) == published, 30)
        assert set(got.values()) == {1}


@pytest.mark.slow
def test_requests_and_streams_go_on_while_the_requesters_server_leaves(cluster: NatsCluster, mode: str) -> None:
    _go_on(cluster, mode, requester=0, responder=1)


@pytest.mark.slow
def test_requests_and_streams_go_on_while_the_responders_server_leaves(cluster: NatsCluster, mode: str) -> None:
    _go_on(cluster, mode, requester=1, responder=0)


def _go_on(cluster: NatsCluster, mode: str, requester: int, responder: int) -> None:
    events = Events()
    over = threading.Event()
    mover = {"on_event": events}
    subscriber = natsync.Subscriber(cluster.urls[responder], **(mover if responder == 0 else {}))
    client = natsync.Client(cluster.urls[requester], framed=mode == "framed", **(mover if requester == 0 else {}))

    @subscriber.stream("count")
    def count(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        number = 0
        while not over.wait(0.001):
            yield b"%d" % number
            number += 1

    @subscriber.handler("double")
    def double(ctx: natsync.Context, request: natsync.Message) -> bytes:
        return b"%d" % (2 * int(request.data))

    asked = 0
    with subscriber, client:
        eventually(lambda: _answers(client))
        stream = client.stream("count")
        chunks: list[int] = []
        reading = Outcome(lambda: chunks.extend(int(chunk) for chunk in stream))
        eventually(lambda: len(chunks) > 20)
        cluster.lame_duck(0)
        while "reconnected" not in events.names or asked < 200:
            assert client.request("double", b"%d" % asked, timeout=10).data == b"%d" % (2 * asked)
            asked += 1
        behind = len(chunks)
        eventually(lambda: len(chunks) > behind + 50)
        over.set()
        assert reading.within(10) is None
        assert chunks == list(range(len(chunks)))
        assert "disconnected" not in events.names


def _answers(client: natsync.Client) -> bool:
    try:
        return client.request("double", b"1", timeout=10).data == b"2"
    except natsync.NoRespondersError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["old", "new"])
def test_equal_messages_on_links_of_different_delay_are_counted_on_both_from_the_same_one_on(slow: str) -> None:
    """Plain chunks that are all alike, so that only their number can tell.

    Counted by the clock, 200 ms would make 80 of them. What is left is what the servers' own route holds while the mark
    is on its way, which a busy machine makes more.
    """
    over = threading.Event()
    events = Events()
    with NatsCluster(2, lame_duck_grace_period=8.0, no_advertise=True) as nodes, ExitStack() as stack:
        proxies = [stack.enter_context(FaultProxy(url)) for url in nodes.urls]
        late = proxies[0 if slow == "old" else 1]
        late.up.delay(0.2)
        late.down.delay(0.2)
        subscriber = stack.enter_context(natsync.Subscriber(nodes.urls[1]))
        sent = 0

        def equal(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
            nonlocal sent
            while not over.wait(0.0025):
                yield b"x"
                sent += 1

        subscriber.stream_subscribe("equal", equal)
        client = stack.enter_context(
            natsync.connect([proxy.url for proxy in proxies], randomize=False, on_event=events, framed=False)
        )
        with_interest_of(client, stack.enter_context(natsync.connect(nodes.urls[1])))
        stream = client.stream("equal")
        chunks: list[bytes] = []
        reading = Outcome(lambda: chunks.extend(stream))
        eventually(lambda: len(chunks) > 50)
        nodes.lame_duck(0)
        events.wait("reconnected")
        behind = len(chunks)
        eventually(lambda: len(chunks) > behind + 50)
        over.set()
        assert reading.within(10) is None
        assert abs(len(chunks) - sent) <= 40
        assert "disconnected" not in events.names
        nodes.kill(0)


@pytest.mark.slow
def test_servers_that_are_restarted_one_after_the_other_cost_no_message() -> None:
    """Everybody moves at once: publishers and subscribers, some of them to the node that goes next."""
    got: dict[str, list[int]] = {}
    with NatsCluster(3, lame_duck_grace_period=8.0) as nodes, ExitStack() as stack:
        events = [Events() for _ in nodes.urls]
        clients = [
            stack.enter_context(natsync.connect(url, on_event=told, name=f"client-{index}"))
            for index, (url, told) in enumerate(zip(nodes.urls, events, strict=True))
        ]
        clients[0].subscribe(
            "n.*", lambda message: got.setdefault(message.subject, []).append(int(message.data)), **ROOM
        )
        with_interest(nodes, clients[0])
        publishers = {f"n.{index}": Numbers(client, f"n.{index}") for index, client in enumerate(clients)}
        for index in (0, 1):
            nodes.lame_duck(index)
            eventually(lambda: not nodes.servers[index].running, 20)  # noqa: B023  called here
            nodes.servers[index].start()
            nodes.wait_joined()
        assert all("disconnected" not in told.names for told in events)
        published = {name: publisher.stop() for name, publisher in publishers.items()}
        eventually(lambda: all(len(got[name]) >= count for name, count in published.items()), 30)
        wrong = {name: misplaced(numbers, published[name]) for name, numbers in got.items()}
        assert wrong == {name: [] for name in published}
        assert all("disconnected" not in told.names for told in events)


@pytest.mark.slow
def test_what_is_published_next_does_not_overtake_what_a_slow_route_still_carries() -> None:
    """The publisher moves to the server of the subscriber, whom all that it published before reaches later."""
    config = """
server_name: {name}
lame_duck_duration: "30s"
lame_duck_grace_period: "8s"
cluster {{ name: slow, listen: "127.0.0.1:-1", routes: [{routes}] }}
"""
    events = Events()
    got: list[int] = []
    with ExitStack() as stack:
        lame = stack.enter_context(NatsServer(config=config.format(name="lame", routes="")))
        route = stack.enter_context(FaultProxy(lame.ports["cluster"][0]))
        stays = stack.enter_context(NatsServer(config=config.format(name="stays", routes=f'"{route.url}"')))
        servers = [lame.url, stays.url]
        mover = stack.enter_context(natsync.connect(servers, randomize=False, on_event=events))
        reader = stack.enter_context(natsync.connect(stays.url))
        reader.subscribe("n", lambda message: got.append(int(message.data)), **ROOM)
        with_interest_of(reader, mover)
        route.up.delay(0.2)
        route.down.delay(0.2)
        publisher = Numbers(mover, "n")
        eventually(lambda: got)
        lame.signal(signal.SIGUSR2)
        moved(events, mover, lame.url)
        seen = publisher.count
        eventually(lambda: publisher.count > seen + 500)
        count = publisher.stop()
        eventually(lambda: len(got) >= count, 10)
        assert misplaced(got, count) == []
        assert "disconnected" not in events.names
        lame.kill()


@pytest.mark.slow
def test_the_only_server_is_left_when_it_ends_and_not_before(
    make_nats_server: Callable[..., natsync.testing.NatsServer],
) -> None:
    events = Events()
    server = make_nats_server(config='lame_duck_duration: "30s"\nlame_duck_grace_period: "3s"')
    with natsync.connect(server.url, on_event=events, **QUICK) as client:
        server.signal(signal.SIGUSR2)
        events.wait("lame_duck")
        client.flush()
        assert client.status == "connected"
        events.wait("disconnected")
        eventually(lambda: not server.running, 10)
        server.start()
        events.wait("reconnected")
        client.flush()


# -- scripted servers -------------------------------------------------------------------------------------------------

LAME = b'INFO {"ldm":true} \r\n'


class TwoServers:
    """Two scripted servers, and a client that is connected to the first."""

    def __init__(self, first: Callable[[PeerConnection], object], second: Callable[[PeerConnection], object]) -> None:
        self.first = ScriptedPeer(first)
        self.second = ScriptedPeer(second)
        self.events = Events()
        self._client: natsync.Client | None = None

    def client(self, **options: Any) -> natsync.Client:
        urls = [self.first.url, self.second.url]
        self._client = natsync.connect(urls, randomize=False, on_event=self.events, **{**QUICK, **options})
        return self._client

    def __enter__(self) -> TwoServers:
        self.first.start()
        self.second.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._client is not None:
            self._client.close(1.0)
        self.first.stop()
        self.second.stop()


def misplaced(numbers: list[int], count: int) -> list[tuple[int, list[int]]]:
    """Where 0, 1, 2, … up to count is not what came: the places, each with what is around it. The first few."""
    wrong = [place for place, (number, due) in enumerate(zip(numbers, range(count), strict=False)) if number != due]
    found = [(place, numbers[max(0, place - 3) : place + 4]) for place in wrong[:3]]
    return found if len(numbers) == count else [*found, (count, numbers[count - 3 :])]


def numbers(*brokers: Broker) -> list[int]:
    return [
        int(pub.payload) for broker in brokers for link in range(len(broker.links)) for pub in broker.published(link)
    ]


def test_what_is_published_meanwhile_leaves_once_and_in_order() -> None:
    old, new = Broker(), Broker()
    with TwoServers(old, new) as two:
        client = two.client()
        publisher = Numbers(client, "n")
        eventually(lambda: len(numbers(old)) > 100)
        old.newest.send(LAME)
        moved(two.events, client, two.first.url)
        eventually(lambda: len(numbers(new)) > 100)
        count = publisher.stop()
        assert numbers(old, new) == list(range(count))
        assert client.stats()["out_messages"] == count


def test_the_old_link_unsubscribes_before_it_is_left() -> None:
    old, new = Broker(), Broker()
    with TwoServers(old, new) as two:
        client = two.client()
        sub = client.subscribe("here")
        old.newest.send(LAME)
        moved(two.events, client, two.first.url)
        assert [one.subject for one in new.subscribed()] == [b"here"]
        subscribed = {one.sid for one in old.said[0] if isinstance(one, Sub)}
        assert {one.sid for one in old.said[0] if isinstance(one, Unsub)} == subscribed
        new.newest.send(b"MSG here %b 2\r\nhi\r\n" % new.subscribed()[0].sid)
        assert sub.next(timeout=5).data == b"hi"


def test_a_message_that_only_the_new_server_gets_in_mid_move_is_delivered_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was on its way to the old server, through the cluster, when the client left that."""
    monkeypatch.setattr("natsync.handover.SKEW_SECONDS", 1.0)  # this thread may be late with one of the two
    monkeypatch.setattr("natsync.handover.COMPARE_SECONDS", 2.5)
    old, new = Broker(), Broker()
    with TwoServers(old, new) as two:
        client = two.client()
        sub = client.subscribe("s")
        client.flush()
        old.newest.send(LAME)
        eventually(lambda: new.subscribed())
        sids = [broker.subscribed()[-1].sid for broker in (old, new)]
        number = 0
        while True:
            message = b"MSG s %b 4\r\n%04d\r\n"
            with old.lock:  # no server sends anything behind its PONG to an UNSUB
                if any(isinstance(one, Unsub) for one in old.said[0]):
                    break
                if number % 5:
                    old.newest.send(message % (sids[0], number))
            new.newest.send(message % (sids[1], number))
            number += 1
            client.flush()
        two.events.wait("reconnected")
        new.newest.send(b"MSG s %b 4\r\nlast\r\n" % sids[1])
        got = [int(data) for data in iter(lambda: sub.next(timeout=5).data, b"last")]
        assert len(got) == len(set(got))
        assert [n for n in got if n % 5] == [n for n in range(number) if n % 5]
        missing = [n for n in got if not n % 5]
        assert missing == sorted(missing)
        assert missing[-1] == (number - 1) // 5 * 5


def test_subscriptions_that_change_in_between_change_on_both_links() -> None:
    old, new = Broker(), Broker()
    with TwoServers(old, new) as two:
        client = two.client()
        ended = client.subscribe("ended")
        client.flush()
        old.newest.send(LAME)
        eventually(lambda: new.subscribed())
        ended.unsubscribe()
        begun = client.subscribe("begun", max_messages=3)
        moved(two.events, client, two.first.url)
        client.flush()
        assert [one.subject for one in new.subscribed()] == [b"ended", b"begun"]
        (gone,) = (one for one in new.said[0] if isinstance(one, Unsub))
        assert gone.sid == new.subscribed()[0].sid
        assert begun.active


def test_a_maximum_counts_what_came_on_both_links() -> None:
    old, new = Broker(), Broker()
    with TwoServers(old, new) as two:
        client = two.client()
        sub = client.subscribe("s", max_messages=3)
        eventually(lambda: old.subscribed())
        old.newest.send(b"MSG s %b 1\r\n1\r\n" % old.subscribed()[0].sid)
        assert sub.next(timeout=5).data == b"1"
        old.newest.send(LAME)
        moved(two.events, client, two.first.url)
        for data in (b"2", b"3", b"4"):
            new.newest.send(b"MSG s %b 1\r\n%b\r\n" % (new.subscribed()[0].sid, data))
        assert [message.data for message in sub] == [b"2", b"3"]


def test_the_old_link_stays_in_use_while_the_other_server_cannot_be_had() -> None:
    old = Broker()
    with TwoServers(old, refuse) as two:
        client = two.client()
        old.newest.send(LAME)
        eventually(lambda: two.second.accepted >= 3)
        client.flush()
        assert client.stats()["server"] == two.first.url


def test_a_server_that_does_not_confirm_the_subscriptions_is_not_moved_to() -> None:
    old, new = Broker(), Broker(lambda peer: (peer.handshake(), peer.hold()))
    with TwoServers(old, new) as two:
        client = two.client(connect_timeout=1.5)
        old.newest.send(LAME)
        eventually(lambda: two.second.accepted >= 2, 15)
        client.flush()
        moved(two.events, client, two.first.url)
        assert "disconnected" not in two.events.names


def test_a_new_link_that_carries_nothing_any_more_costs_neither_the_old_one_nor_a_flush() -> None:
    old = Broker()
    frozen, thawed = threading.Event(), Broker()

    def new(peer: PeerConnection) -> None:
        if peer.index:
            thawed(peer)
            return
        peer.handshake()
        while not frozen.is_set():  # answers the first PING, that behind the subscriptions
            if peer.recv_line() == b"PING":
                frozen.set()
        peer.send(b"PONG\r\n")
        peer.hold()

    with TwoServers(old, new) as two:
        client = two.client(connect_timeout=1.5)
        old.newest.send(LAME)
        eventually(frozen.is_set)
        while two.second.accepted < 2:
            client.flush(5)
        moved(two.events, client, two.first.url)
        assert "disconnected" not in two.events.names


def test_a_server_that_greets_as_a_lame_duck_is_left_too() -> None:
    old, new = Broker(ldm=True), Broker()
    with TwoServers(old, new) as two:
        client = two.client()
        moved(two.events, client, two.first.url)
        assert two.events.names == ["connected", "lame_duck", "reconnected"]


def test_a_server_that_is_discovered_later_is_moved_to() -> None:
    old, new = Broker(), Broker()
    with ScriptedPeer(old) as first, ScriptedPeer(new) as second:
        events = Events()
        with opened(first, on_event=events) as client:
            old.newest.send(LAME)
            events.wait("lame_duck")
            old.newest.send(b'INFO {"connect_urls":["127.0.0.1:%d"]} \r\n' % second.port)
            moved(events, client, first.url)


def test_a_link_that_is_lost_before_it_is_left_is_made_again_as_ever() -> None:
    old, new = Broker(), Broker()
    with TwoServers(old, new) as two:
        client = two.client()
        client.publish("n", b"0")
        client.flush()
        old.newest.send(LAME)
        eventually(lambda: two.second.accepted)
        old.drop()
        two.events.wait("reconnected")
        client.publish("n", b"1")
        client.flush()
        assert numbers(old, new) == [0, 1]


def test_a_server_that_does_not_confirm_the_end_costs_what_it_was_given_and_no_more() -> None:
    """The PING behind the UNSUBs is not answered: what had been written may be lost, all else goes out, once."""
    old, new = Broker(), Broker()
    with TwoServers(old, new) as two:
        client = two.client(write_timeout=0.5)
        subscribed = client.subscribe("s")
        publisher = Numbers(client, "n")
        eventually(lambda: len(numbers(old)) > 100)
        old.newest.send(LAME)
        eventually(lambda: new.subscribed())
        old.pongs = False
        two.events.wait("disconnected")
        two.events.wait("reconnected")
        old.pongs = True
        count = publisher.stop()
        assert subscribed.active
        given = numbers(old)  # once: it may still be reading
        found = given + numbers(new)
        assert found == sorted(set(found))
        assert found[-1] == count - 1
        assert set(range(count)) - set(found) <= set(range(given[-1], count))


@pytest.mark.parametrize("accepted", [0, 1])
def test_close_in_between_is_prompt_and_leaves_nothing(accepted: int) -> None:
    old, new = Broker(), Broker()
    with TwoServers(old, new) as two:
        client = two.client()
        subscribed = client.subscribe("s")
        old.newest.send(LAME)
        eventually(lambda: two.second.accepted >= accepted)
        client.publish("n", b"last")
        assert Outcome(client.close).within(4.5) is None
        assert not subscribed.active
        assert b"last" in {pub.payload for broker in (old, new) for pub in (broker.published() if broker.said else [])}


def test_a_server_that_announces_its_end_too_is_not_moved_to_or_left_again() -> None:
    """Two servers of three are going away at once: the one that was chosen says so in mid-move, or right behind it."""
    old, second, third = Broker(), Broker(), Broker()
    with ScriptedPeer(old) as one, ScriptedPeer(second) as two, ScriptedPeer(third) as three:
        events = Events()
        client = natsync.connect([one.url, two.url, three.url], randomize=False, on_event=events, **QUICK)
        old.newest.send(LAME)
        eventually(lambda: second.links)
        second.newest.send(LAME)
        assert events.wait("reconnected")["server"] == three.url
        third.newest.send(LAME)  # nowhere is better now: it will be left when another one can be had
        eventually(lambda: events.names.count("lame_duck") == 2)
        client.close()


def test_a_server_that_announces_its_end_right_behind_the_move_is_left_again() -> None:
    old, second, third = Broker(), Broker(), Broker()
    with ScriptedPeer(old) as one, ScriptedPeer(second) as two, ScriptedPeer(third) as three:
        events = Events()
        client = natsync.connect([one.url, two.url, three.url], randomize=False, on_event=events, **QUICK)
        old.newest.send(LAME)
        assert events.wait("reconnected")["server"] == two.url
        second.newest.send(LAME)
        assert events.wait("reconnected", 2)["server"] == three.url
        client.close()


def test_an_end_that_is_announced_again_and_again_is_one_event_and_costs_nothing() -> None:
    old = Broker()
    events = Events()
    with ScriptedPeer(old) as peer, opened(peer, on_event=events) as client:
        old.newest.send(LAME * 2000)
        client.flush()
        old.drop()
        events.wait("reconnected")
        client.flush()
        assert events.names.count("lame_duck") == 1


def test_drain_in_mid_move_handles_what_is_on_its_way_on_either_link() -> None:
    old = Broker()
    new = Broker()
    got: list[bytes] = []
    with TwoServers(old, new) as two:
        client = two.client()
        client.subscribe("q", lambda message: got.append(message.data), queue="g")
        client.flush()
        old.newest.send(LAME)
        eventually(lambda: new.subscribed())
        new.pongs = False
        draining = Outcome(lambda: client.drain(10))
        eventually(lambda: any(isinstance(one, Unsub) for one in new.said[0]))
        new.newest.send(b"MSG q %b 2\r\nhi\r\n" % new.subscribed()[0].sid + b"PONG\r\n" * 5)
        new.pongs = True
        assert draining.within(10) is None
        assert got == [b"hi"]


def test_counters_never_fall_in_a_move() -> None:
    old, new = Broker(), Broker()
    with TwoServers(old, new) as two:
        client = two.client()
        for _ in range(100):
            client.publish("n", b"1")
        client.flush()
        old.newest.send(LAME)
        lowest = {"out_messages": 100, "out_bytes": 0, "in_bytes": 0}
        while "reconnected" not in two.events.names:
            now = client.stats()
            for name, value in lowest.items():
                assert now[name] >= value, name
                lowest[name] = now[name]


def test_a_connection_that_drains_does_not_move() -> None:
    old, new = Broker(), Broker()
    release = threading.Event()
    with TwoServers(old, new) as two:
        client = two.client()
        client.subscribe("s", lambda message: release.wait(10))
        eventually(lambda: old.subscribed())
        old.newest.send(b"MSG s %b 1\r\n1\r\n" % old.subscribed()[0].sid)
        eventually(lambda: client.stats()["in_messages"] == 1)
        draining = Outcome(lambda: client.drain(5))
        eventually(lambda: client.status == "draining")
        old.newest.send(LAME)
        two.events.wait("lame_duck")
        release.set()
        assert draining.within(5) is None
        assert not two.second.accepted


# -- what is compared -------------------------------------------------------------------------------------------------


class Connection:
    """Takes the part of the connection."""

    def __init__(self) -> None:
        self.got: list[tuple[bytes, bytes]] = []
        self.steps: list[str] = []
        self.marks = 0

    def deliver(self, batch: Batch) -> None:
        self.got += [(batch.subject, item[2]) for item in batch.items]

    def is_shared(self, sid: bytes) -> bool:
        return sid == b"queue"

    def leave_old_link(self, handover: Handover) -> None:
        self.steps.append("leave")

    def take_over(self, handover: Handover) -> None:
        self.steps.append("take over")

    def end_handover(self, handover: Handover) -> None:
        self.steps.append("end")

    def mark_subject(self) -> bytes:
        self.marks += 1
        return b"mark" if self.marks == 1 else b"last mark"


class Link:
    """Takes the part of a session."""

    server = "nats://127.0.0.1:4222"

    def __init__(self) -> None:
        self.outbox = Outbox(0)
        self.pings: list[Callable[[int | None], None]] = []
        self.marks: list[bytes] = []
        self.muted = False

    def mark(self, frame: bytes, callback: Callable[[int | None], None]) -> None:
        self.marks.append(frame)

    def ping_first(self, callback: Callable[[int | None], None]) -> bool:
        self.pings.append(callback)
        return True


class Case:
    def __init__(self) -> None:
        self.keeper = Connection()
        self.old: Any = Link()
        self.new: Any = Link()
        self.handover = Handover(self.keeper, self.old, self.new, 60.0, 60.0)

    def at(self, phase: Phase) -> Case:
        self.handover.phase = phase
        if phase >= Phase.COMPARING:
            self.handover._marked = {self.old, self.new}
            self.handover._compared_from = -1
        return self

    def bring(self, link: Any, *payloads: bytes, sid: bytes = b"1", subject: bytes = b"s") -> None:
        self.handover.on_batch(link, Batch(sid, subject, [(None, None, payload) for payload in payloads]))

    @property
    def got(self) -> list[bytes]:
        return [payload for _, payload in self.keeper.got]


@pytest.mark.parametrize("phase", [Phase.JOINING, Phase.OVERLAP, Phase.COMPARING])
def test_while_both_links_bring_everything_the_old_one_counts(phase: Phase) -> None:
    case = Case().at(phase)
    case.bring(case.new, b"1", b"2", b"3")
    case.bring(case.old, b"1", b"2")
    assert case.got == [b"1", b"2"]


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.TAKEN_OVER])
def test_messages_of_a_queue_group_are_delivered_from_both(phase: Phase) -> None:
    case = Case().at(phase)
    case.bring(case.new, b"1", sid=b"queue")
    case.bring(case.old, b"1", sid=b"queue")
    assert case.got == [b"1", b"1"]


def test_what_only_the_new_link_brings_comes_behind_all_of_the_old_one() -> None:
    case = Case().at(Phase.LEAVING)
    case.bring(case.new, b"2", b"3")
    case.bring(case.old, b"1")
    case.bring(case.old, b"2")
    assert case.got == [b"1", b"2"]
    case.handover.left(1)
    assert case.got == [b"1", b"2", b"3"]


def test_equal_messages_are_told_apart_by_their_number() -> None:
    case = Case().at(Phase.COMPARING)
    case.bring(case.old, b"tick", b"tick")
    case.bring(case.new, b"tick")
    case.at(Phase.LEAVING)
    case.bring(case.new, b"tick", b"tick", b"tick")
    case.bring(case.old, b"tick")
    case.handover.left(1)
    assert case.got == [b"tick"] * 4  # three came on both links, and one more on the new one
    case.bring(case.new, b"tick")
    assert case.got == [b"tick"] * 5


@pytest.mark.parametrize("late", [0.0, 0.1, 5.0])
def test_a_step_that_was_not_taken_in_a_frozen_process_has_its_moment_still(
    late: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    due: list[tuple[float, Callable[[], None]]] = []
    now = time.monotonic()
    monkeypatch.setattr("natsync.handover.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(timers, "schedule_after", lambda seconds, step: due.append((seconds, step)))
    case = Case()
    case.old.ended = []
    case.old.end = case.old.ended.append
    case.handover._compare()
    seconds, look = due.pop()
    monkeypatch.setattr("natsync.handover.time", SimpleNamespace(monotonic=lambda: now + seconds + late))
    look()
    if late >= timers.LATE_SECONDS:
        assert case.old.ended == []
        moment, look = due.pop()
        assert moment == timers.LATE_SECONDS
        look()
    assert len(case.old.ended) == 1


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the old link as soon as both are marked, and the new server has answered behind that."""
    monkeypatch.setattr("natsync.handover.COMPARE_SECONDS", 0.0)
    monkeypatch.setattr("natsync.handover.SKEW_SECONDS", 0.0)


@pytest.mark.usefixtures("at_once")
def test_each_links_messages_are_counted_from_the_mark_on_and_then_the_old_one_is_left() -> None:
    case = Case()
    case.handover._compare()
    case.bring(case.new, b"tick", b"tick")  # the new link is faster: these have not come on the old one yet
    case.bring(case.new, b"", subject=b"mark")
    case.bring(case.new, b"tick")
    case.bring(case.old, b"tick", b"tick")
    case.handover.old_marked(1)
    eventually(lambda: case.new.pings)
    assert case.keeper.steps == []
    case.new.pings.pop()(0)
    assert case.keeper.steps == ["leave"]
    case.bring(case.new, b"tick")
    case.bring(case.old, b"tick", b"tick")
    case.bring(case.new, b"tick")
    case.handover.left(2)
    case.handover.stop()
    assert case.got == [b"tick"] * 5  # two before the mark, two behind it on both links, one on the new link alone


def test_the_old_link_is_left_later_if_subscriptions_were_made_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natsync.handover.OVERLAP_SECONDS", 2.0)
    monkeypatch.setattr("natsync.handover.COMPARE_SECONDS", 0.0)
    monkeypatch.setattr("natsync.handover.SKEW_SECONDS", 0.0)
    case = Case()
    case.handover._joined(0)
    case.handover.joined_more()
    case.handover._compare()
    case.handover.old_marked(1)
    case.bring(case.new, b"", subject=b"mark")
    eventually(lambda: case.new.pings)
    case.new.pings.pop()(0)
    assert case.keeper.steps == []
    eventually(lambda: case.keeper.steps == ["leave"])
    case.handover.stop()


def test_what_matches_is_not_kept_in_mind() -> None:
    case = Case().at(Phase.COMPARING)
    for number in range(100):
        case.bring(case.old, b"%d" % number)
        case.bring(case.new, b"%d" % number)
    assert not case.handover._ahead
    for number in range(100):
        case.bring(case.new, b"%d" % number)
        case.bring(case.old, b"%d" % number)
        assert not case.handover._kept
    assert len(case.got) == 200


def test_what_the_old_server_did_not_get_in_time_is_delivered_though_the_new_link_brought_it_before() -> None:
    """The cluster's route to the server that leaves is slow: message 2 is on its way when the old link unsubscribes."""
    case = Case().at(Phase.COMPARING)
    case.bring(case.new, b"1", b"2", b"3")
    case.bring(case.old, b"1")
    case.at(Phase.LEAVING)
    case.bring(case.new, b"4")
    case.bring(case.old, b"3")
    case.handover.left(1)
    assert case.got == [b"1", b"3", b"2", b"4"]


def test_what_the_old_link_brought_before_its_mark_is_not_delivered_again() -> None:
    """The mark went to the new link by a quicker way than message 1, of another server."""
    case = Case()
    case.handover._compare()
    case.bring(case.old, b"1")
    case.bring(case.old, b"", subject=b"mark")
    case.bring(case.new, b"", subject=b"mark")
    case.bring(case.new, b"1")
    eventually(lambda: case.new.pings)
    case.bring(case.new, b"2")  # before the new server's answer: how long it took to be read does not matter
    case.new.pings.pop()(0)
    case.bring(case.new, b"3")
    case.bring(case.old, b"2")
    case.handover.phase = Phase.LEAVING
    case.handover.left(1)
    case.bring(case.new, b"4")
    assert case.got == [b"1", b"2", b"3", b"4"]
    case.handover.stop()


def test_the_mark_itself_is_delivered_to_nobody() -> None:
    case = Case()
    case.handover._compare()
    case.bring(case.old, b"", subject=b"mark")
    case.bring(case.new, b"", subject=b"mark")
    assert case.got == []
    case.handover.stop()


@pytest.mark.usefixtures("at_once")
def test_without_a_mark_on_the_new_link_a_round_trip_must_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natsync.handover.MARK_SECONDS", 0.01)
    case = Case()
    case.handover._compare()
    assert case.old.marks == [b"PUB mark 0\r\n\r\n"]
    case.handover.old_marked(1)
    eventually(lambda: case.new.pings)
    case.new.pings.pop()(0)
    eventually(lambda: case.new.pings)
    assert case.keeper.steps == []
    case.new.pings.pop()(0)
    assert case.keeper.steps == ["leave"]
    assert not case.handover.last_words  # nor a second one
    case.handover.stop()


@pytest.mark.slow
def test_a_user_who_may_not_publish_to_his_inbox_moves_all_the_same_and_is_told_of_nothing() -> None:
    denied = """
authorization { users = [
  {user: all, password: "S3CRET-all"}
  {user: some, password: "S3CRET-some", permissions: {subscribe: ">", publish: {deny: "_INBOX.>"}}}
] }
"""
    events = Events()
    with NatsCluster(2, config=denied, lame_duck_grace_period=8.0) as nodes:
        who = {"user": "some", "password": "S3CRET-some"}
        with (
            natsync.connect(nodes.urls[0], on_event=events, **who) as mover,
            natsync.connect(nodes.urls[1], user="all", password="S3CRET-all") as other,
        ):
            got: list[int] = []
            mover.subscribe("n", lambda message: got.append(int(message.data)), **ROOM)
            with_interest_of(mover, other)
            publisher = Numbers(other, "n")
            eventually(lambda: len(got) > 100)
            nodes.lame_duck(0)
            moved(events, mover, nodes.urls[0])
            count = publisher.stop()
            eventually(lambda: len(got) >= count)
            assert got == list(range(count))
            assert events.names == ["connected", "lame_duck", "reconnected"]
        nodes.kill(0)


def test_a_straggler_is_dropped_and_what_is_new_is_not() -> None:
    case = Case().at(Phase.COMPARING)
    case.bring(case.old, b"1", b"2")
    case.at(Phase.LEAVING)
    case.handover.left(1)
    case.bring(case.new, b"2", b"3")
    assert case.got == [b"1", b"2", b"3"]


def test_the_same_payload_on_another_subject_or_with_another_reply_is_another_message() -> None:
    case = Case().at(Phase.LEAVING)
    case.bring(case.old, b"x")
    case.bring(case.new, b"x", subject=b"t")
    case.bring(case.new, b"x", sid=b"2")
    case.handover.on_batch(case.new, Batch(b"1", b"s", [(b"reply", None, b"x"), (None, b"NATS/1.0\r\n\r\n", b"x")]))
    case.handover.left(1)
    assert len(case.got) == 5


def test_the_new_link_takes_over_one_round_trip_behind_the_old_ones_end() -> None:
    case = Case().at(Phase.LEAVING)
    case.handover.left(7)
    eventually(lambda: case.new.pings)
    assert case.keeper.steps == []
    case.new.pings.pop()(0)
    assert case.keeper.steps == ["take over"]
    case.handover.stop()


def left_with_a_second_mark() -> Case:
    """The new link has brought the first one, so that a second is the last that the old link publishes."""
    case = Case()
    case.handover._compare()
    case.handover.old_marked(1)
    case.bring(case.new, b"", subject=b"mark")
    eventually(lambda: case.new.pings)
    case.new.pings.pop()(0)
    eventually(lambda: case.keeper.steps == ["leave"])
    assert case.handover.last_words == b"PUB last mark 0\r\n\r\n"
    return case


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("first", ["end", "mark"])
def test_the_new_link_takes_over_when_it_has_brought_the_second_mark_too(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("natsync.handover.PASSED_ON_SECONDS", 30.0)
    case = left_with_a_second_mark()
    steps = [lambda: case.handover.left(7), lambda: case.bring(case.new, b"", subject=b"last mark")]
    for step in steps if first == "end" else reversed(steps):
        assert not case.handover._taking_over
        step()
    eventually(lambda: case.new.pings)
    assert case.got == []
    case.new.pings.pop()(0)
    assert case.keeper.steps == ["leave", "take over"]
    case.handover.stop()


@pytest.mark.usefixtures("at_once")
def test_a_second_mark_that_does_not_come_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natsync.handover.PASSED_ON_SECONDS", 0.01)
    case = left_with_a_second_mark()
    case.handover.left(7)
    eventually(lambda: case.new.pings)
    case.new.pings.pop()(0)
    assert case.keeper.steps == ["leave", "take over"]
    case.bring(case.new, b"", subject=b"last mark")
    assert not case.got
    assert not case.new.pings
    case.handover.stop()


def test_a_link_that_ends_instead_of_answering_takes_nothing_over() -> None:
    case = Case().at(Phase.LEAVING)
    case.handover.left(None)
    assert case.handover.phase is Phase.LEAVING
    assert case.keeper.steps == []


@pytest.mark.parametrize("phase", [Phase.COMPARING, Phase.LEAVING])
def test_what_the_new_link_alone_brought_is_delivered_if_the_old_one_is_lost(phase: Phase) -> None:
    case = Case().at(phase)
    case.bring(case.new, b"1", b"2")
    case.bring(case.old, b"1")
    case.handover.mute()
    case.bring(case.old, b"2")  # what its reader still held
    case.handover.stop()
    assert case.got == [b"1", b"2"]


def test_what_was_not_compared_yet_is_not_delivered_again_if_the_old_link_is_lost() -> None:
    """The new link is at its mark, the old one is not."""
    case = Case()
    case.handover._compare()
    case.bring(case.new, b"", subject=b"mark")
    case.bring(case.new, b"1")
    case.bring(case.old, b"1")
    case.handover.mute()
    case.bring(case.old, b"2")
    case.handover.stop()
    assert case.got == [b"1", b"2"]


def test_what_the_new_link_brought_is_forgotten_if_it_is_lost_first() -> None:
    case = Case().at(Phase.COMPARING)
    case.bring(case.new, b"1")
    case.handover.give_up()
    case.bring(case.old, b"1")
    assert case.got == [b"1"]
