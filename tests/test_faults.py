"""One fault after another between a client and a real server: what breaks, what is told, and that all goes on after it.

Faults of the network are FaultProxy's, those of servers NatsServer's and NatsCluster's. Credentials, denials, forks,
interrupts, servers in lame duck mode, garbage, and large numbers have modules of their own.
"""

from __future__ import annotations

import ast
import itertools
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import natsync
from broker import QUICK, SLACK, Events, Outcome
from natsync.testing import FaultProxy, NatsCluster, NatsServer, eventually
from processes import child
from rawclient import RawClient

#: Seconds for what must come; a loaded machine is slow.
PATIENCE = 10.0

MakeServer = Callable[..., NatsServer]
MakeProxy = Callable[..., FaultProxy]


def connect(proxy: FaultProxy, **options: Any) -> natsync.Client:
    """A client behind the proxy, which never finds a way around it."""
    return natsync.connect(proxy.url, **{"discover": False, **QUICK, **options})


def numbered(number: int, size: int) -> bytes:
    """A payload in which every byte tells whether it belongs there."""
    text = b"%d " % number
    return (text * (size // len(text) + 1))[:size]


class Record:
    """What another client received on a subject: the numbers, in order, and all that is not a whole payload."""

    def __init__(self, client: natsync.Client, subject: str = "f.numbers") -> None:
        self.numbers: list[int] = []
        self.torn: list[bytes] = []
        client.subscribe(subject, self._take, pending_messages=1 << 30, pending_bytes=1 << 40)
        client.flush(PATIENCE)

    def _take(self, message: natsync.Message) -> None:
        number = int(message.data.split(b" ", 1)[0] or -1)
        if message.data == numbered(number, len(message.data)):
            self.numbers.append(number)
        else:
            self.torn.append(message.data)

    def wait_for(self, number: int) -> None:
        eventually(lambda: number in self.numbers[-1000:], PATIENCE, f"number {number} never came")

    def check(self) -> None:
        """Nothing torn, nothing doubled, everything in the order of its numbers."""
        self.check_whole()
        assert self.numbers == sorted(self.numbers)

    def check_whole(self) -> None:
        """Nothing torn, nothing doubled."""
        assert not self.torn
        assert len(self.numbers) == len(set(self.numbers))


@pytest.fixture
def proxy(make_fault_proxy: MakeProxy) -> FaultProxy:
    """In front of the shared server."""
    return make_fault_proxy()


@pytest.fixture
def narrow(make_fault_proxy: MakeProxy) -> FaultProxy:
    """In front of the shared server, with little room for bytes on their way up."""
    return make_fault_proxy(receive_buffer_bytes=65536)


@pytest.fixture
def other(nats_server: NatsServer) -> Iterator[natsync.Client]:
    """A client of the shared server that has no trouble, and answers f.echo."""
    with natsync.connect(nats_server.url) as other:
        other.subscribe("f.echo", lambda message: message.respond(message.data))
        other.flush(PATIENCE)
        yield other


@pytest.fixture
def record(other: natsync.Client) -> Record:
    return Record(other)


def works(client: natsync.Client) -> bool:
    """Whether a request of a client is answered, now or soon."""

    def answered() -> bool:
        try:
            return client.request("f.echo", b"there?", timeout=1.0).data == b"there?"
        except (natsync.ConnectionLost, natsync.TimedOut, natsync.NoRespondersError):
            return False

    return eventually(answered, PATIENCE, "no request is answered any more")


def flood(client: natsync.Client) -> Outcome:
    """Publish until that fails, on a thread; returns when the publisher has to wait, or has failed."""

    def publish() -> None:
        while True:
            client.publish("f.nobody", bytes(1 << 17))

    flooding = Outcome(publish)
    eventually(
        lambda: client.stats()["out_pending_bytes"] >= 4 << 20 or not flooding.running, PATIENCE, "it never has to wait"
    )
    return flooding


# -- a server that withholds -------------------------------------------------------------------------------------------


WITHHELD: dict[str, Callable[[FaultProxy], None]] = {
    "it accepts and is silent": lambda proxy: proxy.hang(),
    "its INFO never comes": lambda proxy: proxy.down.stall(),
    "INFO comes and then nothing": lambda proxy: proxy.up.stall(),
    "INFO drips": lambda proxy: proxy.down.split(1, pause=0.1),
    "the answers are late": lambda proxy: proxy.down.delay(30.0),
}


@pytest.mark.parametrize("withhold", WITHHELD.values(), ids=WITHHELD)
def test_connect_gives_up_at_its_deadline_whatever_the_server_withholds(
    proxy: FaultProxy, withhold: Callable[[FaultProxy], None]
) -> None:
    withhold(proxy)
    began = time.monotonic()
    with pytest.raises(natsync.NoServersError) as raised:
        connect(proxy, connect_timeout=0.4)
    assert 0.39 <= time.monotonic() - began < 0.4 + SLACK
    assert list(raised.value.causes) == [proxy.url]


@pytest.mark.parametrize("withhold", WITHHELD.values(), ids=WITHHELD)
def test_a_lost_link_is_made_again_past_a_server_that_withholds(
    make_fault_proxy: MakeProxy, other: natsync.Client, withhold: Callable[[FaultProxy], None]
) -> None:
    first, second, third = make_fault_proxy(), make_fault_proxy(), make_fault_proxy()
    urls = [first.url, second.url, third.url]
    with natsync.connect(urls, randomize=False, discover=False, connect_timeout=3.0, **QUICK) as client:
        withhold(second)
        first.refuse()
        first.reset()
        assert works(client)
        assert (second.connections, third.connections) == (1, 1)


def test_a_server_that_comes_to_its_senses_is_connected_to_again(proxy: FaultProxy, other: natsync.Client) -> None:
    with connect(proxy, connect_timeout=1.0) as client:
        proxy.hang()
        proxy.reset()
        eventually(lambda: proxy.connections >= 3, PATIENCE)
        assert client.status == "reconnecting"
        proxy.forward()
        assert works(client)


# -- half-open links ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ways", ["both", "up", "down"])
def test_a_link_that_carries_nothing_any_more_is_noticed_by_pings(
    proxy: FaultProxy, other: natsync.Client, ways: str
) -> None:
    events = Events()
    with connect(proxy, ping_interval=0.1, connect_timeout=1.0, on_event=events) as client:
        assert works(client)
        {"both": proxy, "up": proxy.up, "down": proxy.down}[ways].stall()  # type: ignore[attr-defined]
        assert "PING" in events.wait("disconnected")["reason"]
        proxy.resume()
        assert works(client)


def test_a_slow_link_is_not_taken_for_a_dead_one(proxy: FaultProxy, other: natsync.Client) -> None:
    events = Events()
    with connect(
        proxy, ping_interval=0.2, max_pings_outstanding=12, connect_timeout=PATIENCE, on_event=events
    ) as client:
        proxy.down.delay(0.3)
        for _ in range(4):
            assert client.request("f.echo", b"slow", timeout=PATIENCE).data == b"slow"
        assert events.names == ["connected"]


def test_a_frozen_server_is_noticed_by_a_write_that_stays_blocked(make_nats_server: MakeServer) -> None:
    events = Events()
    server = make_nats_server()
    options = {"write_timeout": 2.0, "ping_interval": 600, "connect_timeout": 1.0}
    with natsync.connect(server.url, on_event=events, **options, **QUICK) as client, ExitStack() as stack:
        server.pause()
        stack.callback(server.resume)
        flooding = flood(client)
        assert "blocked" in events.wait("disconnected")["reason"]
        assert isinstance(flooding.within(PATIENCE), natsync.ReconnectBufferFull)
        server.resume()
        events.wait("reconnected")
        client.flush(PATIENCE)


# -- a receiver that does not read -------------------------------------------------------------------------------------


def test_a_receiver_that_does_not_read_costs_what_it_was_given_and_nothing_else(
    narrow: FaultProxy, other: natsync.Client
) -> None:
    """Publishers that wait go on, flush() says so, and what was not handed to the dead link arrives."""
    records = [Record(other, f"f.numbers.{index}") for index in range(4)]
    events = Events()
    options = {"write_timeout": 2.0, "reconnect_buffer_bytes": 64 << 20, "on_event": events}
    with connect(narrow, connect_timeout=1.0, **options) as client:
        narrow.up.stall()

        def publish(index: int) -> None:
            for number in range(120):
                client.publish(f"f.numbers.{index}", numbered(number, 1 << 16))

        publishing = [Outcome(lambda index=index: publish(index)) for index in range(4)]  # type: ignore[misc]
        flushing = Outcome(lambda: client.flush(PATIENCE))
        asking = Outcome(lambda: client.request("f.echo", b"x", timeout=PATIENCE))
        assert "blocked" in events.wait("disconnected")["reason"]
        for one in publishing:
            assert one.within(PATIENCE) is None
        assert flushing.within(PATIENCE) is None or isinstance(flushing.error, natsync.ConnectionLost)
        narrow.reset()  # the dead link's bytes are gone: were it merely slow, they would still arrive, late
        narrow.resume()
        assert asking.within(PATIENCE) is None or isinstance(asking.error, natsync.ConnectionLost)
        for record in records:
            record.wait_for(119)
            record.check()
        # Lost is what the kernel's buffers and the proxy's held, and one write: well below half of it.
        assert sum(len(record.numbers) for record in records) > 4 * 120 // 2


def test_a_slow_link_is_kept_though_each_write_takes_longer_than_write_timeout(
    narrow: FaultProxy, other: natsync.Client
) -> None:
    record, events = Record(other), Events()
    with connect(narrow, write_timeout=1.5, on_event=events) as client:
        narrow.up.throttle(500_000)  # a write is up to 1 MiB
        for number in range(50):
            client.publish("f.numbers", numbered(number, 1 << 16))
        client.flush(6 * PATIENCE)
        assert events.names == ["connected"]
    record.wait_for(49)
    assert record.numbers == list(range(50))
    record.check()


def test_a_flush_behind_a_blocked_write_is_told_that_the_link_broke(narrow: FaultProxy) -> None:
    with connect(narrow, write_timeout=2.0, connect_timeout=1.0) as client:
        narrow.up.stall()
        flooding = flood(client)
        with pytest.raises(natsync.ConnectionLost):
            client.flush(PATIENCE)
        assert isinstance(flooding.within(PATIENCE), natsync.ReconnectBufferFull)
        narrow.resume()
        client.flush(PATIENCE)


def test_close_returns_although_a_write_is_blocked(narrow: FaultProxy) -> None:
    client = connect(narrow, write_timeout=None)
    narrow.up.stall()
    flooding = flood(client)
    began = time.monotonic()
    client.close(timeout=0.2)
    assert time.monotonic() - began < 0.2 + SLACK
    assert isinstance(flooding.within(PATIENCE), natsync.ConnectionClosed)


def test_a_server_that_gives_up_on_a_client_that_does_not_read_is_connected_to_again(
    make_nats_server: MakeServer, make_fault_proxy: MakeProxy
) -> None:
    """The server ends such a link without a word, in the middle of a message."""
    server = make_nats_server(config='write_deadline: "300ms"\nmax_pending: 1MB')
    proxy = make_fault_proxy(server.url, receive_buffer_bytes=65536)
    events = Events()
    with connect(proxy, on_event=events) as client, natsync.connect(server.url) as publisher:
        record = Record(client)
        proxy.down.stall()

        def gave_up() -> bool:
            for _ in range(20):
                publisher.publish("f.numbers", numbered(gave_up.number, 100_000))  # type: ignore[attr-defined]
                gave_up.number += 1  # type: ignore[attr-defined]
            publisher.flush(PATIENCE)
            return "Slow Consumer" in server.log()

        gave_up.number = 0  # type: ignore[attr-defined]
        eventually(gave_up, PATIENCE, "the server never gave up")
        proxy.resume()
        events.wait("reconnected")
        client.flush(PATIENCE)
        publisher.publish("f.numbers", numbered(1_000_000, 100))
        record.wait_for(1_000_000)
        record.check()


# -- links that end in the middle of something -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reset", "cut"])
@pytest.mark.parametrize("offset", [1, 10, 25, 60_000, 100_050, 120_000])
def test_a_link_that_ends_within_a_message_delivers_no_part_of_it(
    proxy: FaultProxy, other: natsync.Client, offset: int, how: Any
) -> None:
    events = Events()
    with connect(proxy, on_event=events) as client:
        record = Record(client)
        proxy.down.stall()  # so that all of them are for this link
        for number in range(5):
            other.publish("f.numbers", numbered(number, 50_000))
        other.flush(PATIENCE)
        proxy.down.drop_after(offset, how)
        proxy.down.resume()
        events.wait("reconnected")
        client.flush(PATIENCE)
        other.publish("f.numbers", numbered(100, 50_000))
        record.wait_for(100)
        record.check()
        assert len(record.numbers) <= 1 + offset // 50_000


@pytest.mark.parametrize("how", ["reset", "cut"])
@pytest.mark.parametrize("offset", [1, 7, 18, 500, 1025, 20_000])
def test_a_link_that_ends_within_a_published_message_tears_and_doubles_nothing(
    proxy: FaultProxy, record: Record, offset: int, how: Any
) -> None:
    events = Events()
    with connect(proxy, on_event=events) as client:
        proxy.up.drop_after(offset, how)
        for number in range(40):
            client.publish("f.numbers", numbered(number, 1000))
        events.wait("reconnected")
        for number in range(40, 80):
            client.publish("f.numbers", numbered(number, 1000))
        client.flush(PATIENCE)
        record.wait_for(79)
        record.check_whole()  # not in order: the server may be late to pass on what it has of the old link
        assert set(range(40, 80)) <= set(record.numbers), "what was published on the new link was lost"
        eventually(lambda: sum(number < 40 for number in record.numbers) >= offset // 1100, PATIENCE)


def test_a_link_that_ends_again_and_again_tears_and_doubles_nothing(proxy: FaultProxy, record: Record) -> None:
    events = Events()
    with connect(proxy, on_event=events) as client:
        for number in range(400):
            if number % 40 == 0:
                proxy.up.drop_after(1 + number * 37 % 5000, "reset")
            client.publish("f.numbers", numbered(number, 700))
            if number % 40 == 39:
                events.wait("reconnected", number // 40 + 1)
        client.flush(PATIENCE)
        client.publish("f.numbers", numbered(400, 700))
        record.wait_for(400)
        record.check_whole()


def test_a_request_whose_answer_is_cut_off_is_told_that_it_may_have_run(
    proxy: FaultProxy, other: natsync.Client
) -> None:
    with connect(proxy) as client:
        assert works(client)
        proxy.down.drop_after(500)
        with pytest.raises(natsync.ConnectionLost) as raised:
            client.request("f.echo", bytes(5000), timeout=PATIENCE)
        assert raised.value.sent
        assert works(client)


class Storm:
    """One random fault after another on a proxy, each undone a moment later."""

    def __init__(self, proxy: FaultProxy, seed: int) -> None:
        self._proxy = proxy
        self._random = random.Random(seed)

    def fault(self) -> None:
        proxy, roll = self._proxy, self._random
        way = roll.choice((proxy.up, proxy.down))
        kind = roll.randrange(9)
        if kind < 3:
            way.drop_after(roll.randrange(1, 20_000), roll.choice(("reset", "cut")))
        elif kind < 5:
            roll.choice((proxy.reset, proxy.cut, way.cut))()
        elif kind == 5:
            way.split(roll.randrange(1, 50))
        elif kind == 6:
            way.delay(roll.random() * 0.05)
        elif kind == 7:
            roll.choice((proxy, proxy.up, proxy.down)).stall()
        else:
            roll.choice((proxy.refuse, proxy.hang))()
        threading.Event().wait(roll.random() * 0.15)
        self.calm()

    def calm(self) -> None:
        self._proxy.up.clear()
        self._proxy.down.clear()
        self._proxy.forward()


def work_until(over: threading.Event, verb: Callable[[], object]) -> Outcome:
    """Do it again and again on a thread, whatever natsync's errors, until it is over and it has succeeded once.

    Only a wrong answer ends it early.
    """

    def work() -> int:
        done = 0
        while not (over.is_set() and done):
            try:
                assert verb()
                done += 1
            except natsync.NatsError:
                over.wait(0.001)
        return done

    return Outcome(work)


@pytest.mark.slow
def test_a_storm_of_random_faults_tears_doubles_and_hangs_nothing(
    proxy: FaultProxy, other: natsync.Client, record: Record
) -> None:
    """NATSYNC_STORM_SECONDS says how long it lasts, NATSYNC_STORM_SEED repeats one."""
    seed = int(os.environ.get("NATSYNC_STORM_SEED") or random.randrange(1 << 32))
    print(f"NATSYNC_STORM_SEED={seed}")
    over, numbers = threading.Event(), itertools.count()
    options = {"connect_timeout": 1.0, "ping_interval": 0.2, "write_timeout": 1.0}
    chunks = [b"%d" % number * 50 for number in range(50)]
    with (
        connect(proxy, **options) as client,
        natsync.Subscriber(proxy.url, discover=False, **QUICK, **options) as there,
    ):
        there.handler("f.twice")(lambda ctx, request: request.data * 2)
        there.stream_subscribe("f.chunks", lambda ctx, request: chunks)

        def publish() -> bool:
            number = next(numbers)
            try:
                client.publish("f.numbers", numbered(number, 10 + number % 3000))
            except natsync.ReconnectBufferFull:
                threading.Event().wait(0.01)
            return True

        def ask() -> bool:
            return client.request("f.twice", b"ab", timeout=2.0).data == b"abab"

        def stream() -> bool:
            return list(client.stream("f.chunks", timeout=2.0)) == chunks

        def sound_out() -> bool:
            client.flush(2.0)
            return True

        working = [work_until(over, verb) for verb in (publish, ask, ask, stream, sound_out)]
        storm = Storm(proxy, seed)
        until = time.monotonic() + float(os.environ.get("NATSYNC_STORM_SECONDS") or 5)
        while time.monotonic() < until:
            storm.fault()
        assert client.stats()["reconnects"] > 3, "hardly a fault came through"
        works(client)
        eventually(lambda: ask_once(ask), PATIENCE, "the subscriber never came back")
        over.set()
        for outcome in working:
            assert outcome.within(PATIENCE) is None
            assert outcome.value, "one of them never succeeded"
        last = next(numbers)
        client.publish("f.numbers", numbered(last, 100))
        record.wait_for(last)
        # Not their order: a link that was given up while it was slow may still deliver what the network held.
        record.check_whole()
        # A stream that was left waits for its responder to have heard that, for the grace and two seconds more.
        eventually(lambda: client.stats()["waiting_replies"] == 0, 2 * PATIENCE)


def ask_once(ask: Callable[[], bool]) -> bool:
    try:
        return ask()
    except natsync.NatsError:
        return False


# -- pieces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 11, 17, 64])
def test_everything_works_in_pieces_of_any_size(proxy: FaultProxy, nats_server: NatsServer, size: int) -> None:
    proxy.up.split(size)
    proxy.down.split(size)
    with (
        connect(proxy, connect_timeout=PATIENCE) as client,
        natsync.Subscriber(proxy.url, discover=False, connect_timeout=PATIENCE) as server,
    ):
        server.stream_subscribe("f.count", lambda ctx, request: (b"%d" % number for number in range(10)))
        server.handler("f.twice")(lambda ctx, request: request.data * 2)
        got = client.subscribe("f.pieces")
        client.flush(PATIENCE)
        for number in range(5):
            client.publish("f.pieces", numbered(number, 10 * number), headers={"Key": f"v{number}"})
        for number in range(5):
            message = got.next(PATIENCE)
            assert (message.data, message.headers["Key"]) == (numbered(number, 10 * number), f"v{number}")
        assert client.request("f.twice", b"ab", timeout=PATIENCE).data == b"abab"
        assert list(client.stream("f.count", timeout=PATIENCE)) == [b"%d" % number for number in range(10)]


# -- a buffer that is full ---------------------------------------------------------------------------------------------


def test_a_full_buffer_refuses_at_once_and_what_it_took_arrives_in_order(make_nats_server: MakeServer) -> None:
    server = make_nats_server()
    with natsync.connect(server.url, reconnect_buffer_bytes=20_000, **QUICK) as client:
        record = Record(client)
        server.kill()
        eventually(lambda: client.status == "reconnecting")
        taken = 0
        with pytest.raises(natsync.ReconnectBufferFull, match="20000 bytes"):
            while True:
                client.publish("f.numbers", numbered(taken, 1000))
                taken += 1
        assert 15 <= taken <= 20
        client.publish("f.numbers", numbered(taken, 100))  # what is small enough still has room
        server.restart()
        record.wait_for(taken)
        record.check()
        assert record.numbers == list(range(taken + 1))


# -- limits of the server ----------------------------------------------------------------------------------------------


def test_after_a_reconnect_the_new_servers_smaller_max_payload_holds(make_nats_server: MakeServer) -> None:
    events = Events()
    server = make_nats_server(config="max_payload: 20000")
    with natsync.connect(server.url, on_event=events, **QUICK) as client:
        got = client.subscribe("f.size")
        client.publish("f.size", bytes(15_000))
        assert len(got.next(PATIENCE).data) == 15_000
        server.kill()
        events.wait("disconnected")
        client.publish("f.size", bytes(15_000))
        client.publish("f.size", bytes(500))
        server.config = "max_payload: 1000"
        server.restart()
        assert len(got.next(PATIENCE).data) == 500, "what the server does not take is dropped, the rest is not"
        assert "max_payload" in events.wait("error")["error"]
        with pytest.raises(natsync.MaxPayloadExceeded) as raised:
            client.publish("f.size", bytes(15_000))
        assert raised.value.limit_bytes == 1000
        client.flush(PATIENCE)
        assert events.names.count("reconnected") == 1, "the link did not last"


# -- permissions -------------------------------------------------------------------------------------------------------


GUARDED = """
authorization { users: [
    {user: guest, password: S3CRET-pw, permissions: {
        publish: {deny: ["f.secret.>"]}, subscribe: {deny: ["f.secret.>", "f.hidden"]}}}
    {user: mute, password: S3CRET-pw, permissions: {publish: {deny: ["_INBOX.>"]}}}
    {user: polite, password: S3CRET-pw, permissions: {publish: {deny: ["_INBOX.>"]}, allow_responses: true}}
] }
"""


@pytest.fixture
def guarded(make_nats_server: MakeServer) -> NatsServer:
    return make_nats_server(config=GUARDED)


def test_a_request_to_a_subject_that_is_not_allowed_fails_at_once(guarded: NatsServer) -> None:
    with natsync.connect(guarded.url, user="guest", password="S3CRET-pw") as client:
        with pytest.raises(natsync.PermissionDenied, match=r"f\.secret\.x"):
            client.request("f.secret.x", b"", timeout=PATIENCE)
        with pytest.raises(natsync.PermissionDenied, match=r"f\.secret\.x"):
            client.stream("f.secret.x", timeout=PATIENCE).next()
        client.flush(PATIENCE)


def test_a_message_to_a_subject_that_is_not_allowed_is_an_event_and_the_link_stays(guarded: NatsServer) -> None:
    events = Events()
    with natsync.connect(guarded.url, user="guest", password="S3CRET-pw", on_event=events) as client:
        client.publish("f.secret.x", b"")
        told = events.wait("error")
        assert "f.secret.x" in told["error"]
        client.flush(PATIENCE)
        assert events.names == ["connected", "error"]


def test_a_subscription_that_is_not_allowed_fails_and_no_other(guarded: NatsServer) -> None:
    with natsync.connect(guarded.url, user="guest", password="S3CRET-pw") as client:
        allowed = client.subscribe("f.open")
        denied = client.subscribe("f.hidden")
        with pytest.raises(natsync.PermissionDenied, match=r"f\.hidden"):
            denied.next(PATIENCE)
        with pytest.raises(natsync.PermissionDenied):
            list(denied)
        assert not denied.active
        client.publish("f.open", b"x")
        assert allowed.next(PATIENCE).data == b"x"


def test_an_answer_that_is_not_allowed_is_told_with_advice(
    guarded: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    events = Events()
    with natsync.connect(guarded.url, user="mute", password="S3CRET-pw", on_event=events) as answering:
        answering.subscribe("f.ask", lambda message: message.respond(b"answer"))
        answering.flush(PATIENCE)
        with natsync.connect(guarded.url, user="guest", password="S3CRET-pw") as client:
            with pytest.raises(natsync.RequestTimeout):
                client.request("f.ask", b"", timeout=0.3)
        assert "_INBOX" in events.wait("error")["error"]
        eventually(lambda: "allow_responses" in caplog.text)


def test_with_allow_responses_an_answer_is_allowed(guarded: NatsServer) -> None:
    with natsync.connect(guarded.url, user="polite", password="S3CRET-pw") as answering:
        answering.subscribe("f.ask", lambda message: message.respond(b"answer"))
        answering.flush(PATIENCE)
        with natsync.connect(guarded.url, user="guest", password="S3CRET-pw") as client:
            assert client.request("f.ask", b"", timeout=PATIENCE).data == b"answer"


# -- slow consumers ----------------------------------------------------------------------------------------------------


LIMITS = {"messages": {"pending_messages": 10}, "bytes": {"pending_bytes": 1000}}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_a_slow_consumer_loses_what_is_counted_recovers_and_may_be_slow_again(
    nats_server: NatsServer, other: natsync.Client, limits: dict[str, int]
) -> None:
    events = Events()
    with natsync.connect(nats_server.url, on_event=events) as client:
        slow = client.subscribe("f.slow", **limits)
        quick = client.subscribe("f.slow")
        client.flush(PATIENCE)
        for episode in (1, 2, 3):
            for number in range(50):
                other.publish("f.slow", numbered(number, 100))
            assert [quick.next(PATIENCE).data for _ in range(50)] == [numbered(one, 100) for one in range(50)]
            eventually(lambda episode=episode: slow.dropped == 40 * episode, PATIENCE)  # type: ignore[misc]
            assert [slow.next(0).data for _ in range(10)] == [numbered(one, 100) for one in range(10)]
            assert (slow.pending, slow.delivered) == (0, 10 * episode)
        client.flush(PATIENCE)
        eventually(lambda: events.names.count("slow_consumer") == 3)
        assert client.stats()["dropped"] == 120


def test_a_consumer_is_not_called_slow_for_what_it_has_room_for(nats_server: NatsServer, other: natsync.Client) -> None:
    events = Events()
    with natsync.connect(nats_server.url, on_event=events) as client:
        got = client.subscribe("f.slow", pending_messages=50)
        client.flush(PATIENCE)
        for _ in range(3):
            for _ in range(50):
                other.publish("f.slow", b"x")
            eventually(lambda: got.pending == 50, PATIENCE)
            for _ in range(50):
                got.next(0)
        assert got.dropped == 0
        client.close()
        eventually(lambda: events.names == ["connected", "closed"])


# -- drain -------------------------------------------------------------------------------------------------------------


def test_drain_in_a_callback_does_not_wait_for_that_callback(nats_server: NatsServer, other: natsync.Client) -> None:
    client = natsync.connect(nats_server.url)
    others: list[bytes] = []
    client.subscribe("f.others", lambda message: others.append(message.data))
    outcome: list[Exception | None] = []
    over = threading.Event()

    def drain(message: natsync.Message) -> None:
        try:
            client.drain(PATIENCE)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)
        over.set()

    client.subscribe("f.drain", drain)
    client.flush(PATIENCE)
    for number in range(100):
        other.publish("f.others", b"%d" % number)
    other.publish("f.drain")
    assert over.wait(PATIENCE / 2), "drain() in a callback hangs"
    assert outcome == [None]
    assert client.status == "closed"
    assert others == [b"%d" % number for number in range(100)]


def test_drain_of_a_subscription_in_its_own_callback_handles_what_came(
    nats_server: NatsServer, other: natsync.Client
) -> None:
    with natsync.connect(nats_server.url) as client:
        handled: list[bytes] = []
        errors: list[Exception] = []

        def callback(message: natsync.Message) -> None:
            handled.append(message.data)
            if message.data == b"0":
                eventually(lambda: subscription.pending == 9, PATIENCE)
                try:
                    subscription.drain(PATIENCE / 2)
                except Exception as error:
                    errors.append(error)

        subscription = client.subscribe("f.drain", callback)
        client.flush(PATIENCE)
        for number in range(10):
            other.publish("f.drain", b"%d" % number)
        eventually(lambda: len(handled) == 10, PATIENCE, "messages that had come were not handled")
        assert not errors
        eventually(lambda: not subscription.active)


def test_drain_while_there_is_no_link_says_what_was_not_sent(make_nats_server: MakeServer) -> None:
    events = Events()
    server = make_nats_server()
    client = natsync.connect(server.url, on_event=events, **QUICK)
    handled = threading.Event()
    client.subscribe("f.x", lambda message: handled.set())
    server.kill()
    events.wait("disconnected")
    for _ in range(3):
        client.publish("f.x", b"never sent")
    began = time.monotonic()
    with pytest.raises(natsync.DrainTimeout, match="3 messages were not sent"):
        client.drain(0.5)
    assert time.monotonic() - began < 0.5 + SLACK
    assert client.status == "closed"
    assert not handled.is_set()


def test_drain_while_there_is_no_link_succeeds_if_the_server_comes_back_in_time(
    make_nats_server: MakeServer,
) -> None:
    events = Events()
    server = make_nats_server()
    with natsync.connect(server.url, **QUICK) as other:
        record = Record(other)
        client = natsync.connect(server.url, on_event=events, **QUICK)
        server.kill()
        events.wait("disconnected")
        eventually(lambda: other.status == "reconnecting")
        draining = Outcome(lambda: client.drain(PATIENCE))
        server.restart()
        assert draining.within(PATIENCE) is None
        assert client.status == "closed"
        record.check()


def test_drain_of_a_subscription_without_a_link_ends_it_at_its_timeout(make_nats_server: MakeServer) -> None:
    events = Events()
    server = make_nats_server()
    with natsync.connect(server.url, on_event=events, **QUICK) as client:
        subscription = client.subscribe("f.x")
        server.kill()
        events.wait("disconnected")
        began = time.monotonic()
        with pytest.raises((natsync.DrainTimeout, natsync.ConnectionLost)):
            subscription.drain(0.3)
        assert time.monotonic() - began < 0.3 + SLACK
        assert not subscription.active


def test_drain_of_a_subscriber_without_a_link_is_bounded(make_nats_server: MakeServer) -> None:
    server = make_nats_server()
    subscriber = natsync.Subscriber(server.url, **QUICK)
    subscriber.handler("f.echo")(lambda ctx, request: request.data)
    subscriber.open()
    server.kill()
    eventually(lambda: subscriber.status == "reconnecting")
    began = time.monotonic()
    try:
        subscriber.drain(0.5)
    except natsync.DrainTimeout:
        pass  # either is right: there was nothing to do, but no server to say so
    assert time.monotonic() - began < 0.5 + SLACK
    assert subscriber.status == "closed"


def test_drain_with_a_stuck_callback_says_so_and_closes(nats_server: NatsServer, other: natsync.Client) -> None:
    client = natsync.connect(nats_server.url)
    stuck, leave = threading.Event(), threading.Event()

    def callback(message: natsync.Message) -> None:
        stuck.set()
        leave.wait(PATIENCE)

    client.subscribe("f.stuck", callback)
    client.flush(PATIENCE)
    for _ in range(3):
        other.publish("f.stuck")
    assert stuck.wait(PATIENCE)
    eventually(lambda: client.stats()["in_messages"] >= 3, PATIENCE)
    try:
        began = time.monotonic()
        with pytest.raises(natsync.DrainTimeout) as raised:
            client.drain(0.3)
        assert time.monotonic() - began < 0.3 + SLACK
        assert dict(raised.value.unhandled) == {"f.stuck": 3}
        assert client.status == "closed"
    finally:
        leave.set()


@pytest.mark.parametrize("kind", ["request", "stream"])
def test_drain_of_a_subscriber_in_its_own_handler_does_not_hang(nats_server: NatsServer, kind: str) -> None:
    subscriber = natsync.Subscriber(nats_server.url)
    over = threading.Event()

    def drain(ctx: natsync.Context, request: natsync.Message) -> Any:
        try:
            subscriber.drain(2.0)
        except natsync.DrainTimeout:
            pass  # this very handler may be what was not done
        over.set()
        return b"" if kind == "request" else []

    if kind == "request":
        subscriber.handler("f.drain")(drain)
    else:
        subscriber.stream_subscribe("f.drain", drain)
    with subscriber, natsync.connect(nats_server.url) as client:
        asking = Outcome(lambda: client.request("f.drain", b"", timeout=PATIENCE))
        assert over.wait(2.0 + SLACK), "drain() in a handler hangs"
        eventually(lambda: subscriber.status == "closed", PATIENCE)
        client.close()
        asking.within(PATIENCE)


# -- requests inside callbacks -----------------------------------------------------------------------------------------


def test_a_request_inside_a_callback_survives_a_restart_of_the_server(make_nats_server: MakeServer) -> None:
    server = make_nats_server()
    answers: list[bytes] = []
    with natsync.Subscriber(server.url, **QUICK) as subscriber, natsync.connect(server.url, **QUICK) as client:
        subscriber.handler("f.echo")(lambda ctx, request: request.data)

        def callback(message: natsync.Message) -> None:
            server.kill()
            eventually(lambda: client.status == "reconnecting", PATIENCE)
            server.restart()
            eventually(lambda: subscriber.status == "connected" and client.status == "connected", PATIENCE)
            retry = natsync.Retry(attempts=10, initial=0.05)  # the subscriber's interest may come a moment later
            answers.append(client.request("f.echo", message.data, timeout=PATIENCE, retry=retry).data)

        client.subscribe("f.callback", callback)
        client.publish("f.callback", b"hello")
        eventually(lambda: answers == [b"hello"], PATIENCE)


# -- a cluster that loses nodes ----------------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[NatsCluster]:
    with NatsCluster(3) as cluster:
        yield cluster


class Crew:
    """A client and a subscriber at each node: each can go to all the others."""

    def __init__(self, cluster: NatsCluster, stack: ExitStack, seeds: bool = False) -> None:
        self.cluster = cluster
        self.clients: list[natsync.Client] = []
        self.subscribers: list[natsync.Subscriber] = []
        self.heard: list[list[bytes]] = []
        for node in range(len(cluster.servers)):
            urls = cluster.urls[node:] + cluster.urls[:node]
            options = {"randomize": False, "connect_timeout": 2.0, **QUICK}
            client = stack.enter_context(natsync.connect(urls[:1] if seeds else urls, **options))
            subscriber = stack.enter_context(natsync.Subscriber(urls[:1] if seeds else urls, **options))
            subscriber.handler("f.crew", queue="crew")(lambda ctx, request: request.data)
            subscriber.stream_subscribe("f.count", lambda ctx, request: [b"1", b"2", b"3"], queue="crew")
            heard: list[bytes] = []
            client.subscribe("f.all", lambda message, heard=heard: heard.append(message.data))  # type: ignore[misc]
            self.clients.append(client)
            self.subscribers.append(subscriber)
            self.heard.append(heard)

    def check(self, word: bytes) -> None:
        """Every client is answered, streams are whole, and what any one publishes reaches all of them, once."""
        eventually(lambda: all(one.status == "connected" for one in [*self.clients, *self.subscribers]), PATIENCE)
        retry = natsync.Retry(attempts=100, initial=0.02, maximum=0.05, on=natsync.NatsError, idempotent=True)
        for client in self.clients:
            assert client.request("f.crew", word, timeout=PATIENCE, retry=retry).data == word
            assert list(client.stream("f.count", timeout=PATIENCE, retry=retry)) == [b"1", b"2", b"3"]
        self.settle(word)
        for index, client in enumerate(self.clients):
            client.publish("f.all", b"%b from %d" % (word, index))
        expected = {b"%b from %d" % (word, index) for index in range(len(self.clients))}
        eventually(lambda: all(expected <= set(heard) for heard in self.heard), PATIENCE, f"heard: {self.heard}")
        for heard in self.heard:
            assert len(heard) == len(set(heard)), "something came twice"

    def settle(self, word: bytes) -> None:
        """Interest spreads between nodes a moment later than a client's flush: wait until everybody hears everybody."""
        for index, client in enumerate(self.clients):
            tries = iter(range(10_000))

            def all_hear(index: int = index, client: natsync.Client = client, tries: Iterator[int] = tries) -> bool:
                call = b"%b call %d.%d" % (word, index, next(tries))
                client.publish("f.all", call)
                client.flush(PATIENCE)
                try:
                    eventually(lambda: all(call in heard for heard in self.heard), 0.1)
                except AssertionError:
                    return False
                return True

            eventually(all_hear, PATIENCE, f"client {index} is not heard by all")


@pytest.mark.parametrize("seeds", [False, True], ids=["all nodes given", "one node given"])
def test_all_clients_go_on_when_a_node_is_killed(cluster: NatsCluster, seeds: bool) -> None:
    with ExitStack() as stack:
        crew = Crew(cluster, stack, seeds)
        crew.check(b"before")
        cluster.kill(0)
        crew.check(b"without node 0")
        assert crew.clients[0].stats()["reconnects"] == 1
        assert crew.clients[1].stats()["reconnects"] == 0


def test_clients_survive_nodes_that_are_lost_in_turn(cluster: NatsCluster) -> None:
    with ExitStack() as stack:
        crew = Crew(cluster, stack)
        for node in (0, 1, 2):
            cluster.kill(node)
            crew.check(b"without node %d" % node)
            cluster.restart(node)
        crew.check(b"with all")


def test_what_is_published_while_all_nodes_are_down_arrives(cluster: NatsCluster) -> None:
    with ExitStack() as stack:
        crew = Crew(cluster, stack)
        crew.check(b"before")
        for node in range(3):
            cluster.kill(node)
        client = crew.clients[0]
        eventually(lambda: client.status == "reconnecting", PATIENCE)
        for number in range(10):
            client.publish("f.all", b"meanwhile %d" % number)
        for server in cluster.servers:
            server.start()
        cluster.wait_joined()
        expected = [b"meanwhile %d" % number for number in range(10)]
        eventually(lambda: [one for one in crew.heard[0] if one in expected] == expected, PATIENCE)
        crew.check(b"after")


def test_requests_under_way_when_a_node_dies_are_answered_or_told(cluster: NatsCluster) -> None:
    with ExitStack() as stack:
        crew = Crew(cluster, stack)
        crew.check(b"before")
        asked, release = threading.Semaphore(0), threading.Event()
        stack.callback(release.set)

        def slow(ctx: natsync.Context, request: natsync.Message) -> bytes:
            asked.release()
            release.wait(PATIENCE)
            return request.data

        crew.subscribers[2].handler("f.slow")(slow)
        pending = [Outcome(lambda client=client: ask_slow(client)) for client in crew.clients]  # type: ignore[misc]
        for _ in pending:
            assert asked.acquire(timeout=PATIENCE)
        cluster.kill(0)
        assert isinstance(pending[0].within(PATIENCE), natsync.ConnectionLost)
        release.set()
        for outcome in pending[1:]:
            assert outcome.within(PATIENCE) is None
            assert outcome.value == b"word"


def ask_slow(client: natsync.Client) -> bytes:
    """Ask f.slow, again where nobody is known to listen yet."""
    retry = natsync.Retry(attempts=100, initial=0.02, maximum=0.05)
    return client.request("f.slow", b"word", timeout=PATIENCE, retry=retry).data


@pytest.mark.slow
def test_a_lame_duck_that_ends_before_it_was_left_doubles_nothing() -> None:
    """Its grace period is too short for the move to another node, which has begun when the link is lost."""
    over = threading.Event()
    with NatsCluster(3, lame_duck_grace_period=0.2) as cluster, ExitStack() as stack:
        clients = [
            stack.enter_context(natsync.connect(cluster.urls[node:] + cluster.urls[:node], randomize=False, **QUICK))
            for node in range(3)
        ]
        records = [[Record(client, f"f.from.{index}") for index in range(3)] for client in clients]

        def publish(index: int) -> None:
            numbers = itertools.count()
            while not over.wait(0.002):
                for number in itertools.islice(numbers, 50):
                    clients[index].publish(f"f.from.{index}", numbered(number, 12 + number % 500))

        publishing = [Outcome(lambda index=index: publish(index)) for index in range(3)]  # type: ignore[misc]
        for node in (0, 1, 2):
            before = [client.stats()["reconnects"] for client in clients]
            cluster.lame_duck(node)
            eventually(lambda node=node: not cluster.servers[node].running, PATIENCE)  # type: ignore[misc]
            cluster.restart(node)
            eventually(lambda: all(client.status == "connected" for client in clients), PATIENCE)
            assert [client.stats()["reconnects"] for client in clients] != before
        over.set()
        for outcome in publishing:
            assert outcome.within(PATIENCE) is None
        for client in clients:
            client.flush(PATIENCE)
        for record in itertools.chain(*records):
            eventually(lambda record=record: len(record.numbers) > 100, PATIENCE)  # type: ignore[misc]
            # Not in order: the node that ends may be late to pass on what a publisher gave it before its link was lost.
            record.check_whole()


# -- the clock ---------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_by_an_hour_disturbs_nothing(
    monkeypatch: pytest.MonkeyPatch, proxy: FaultProxy, other: natsync.Client
) -> None:
    true_time, jumps = time.time, iter(range(10**9))

    def jumping() -> float:
        return true_time() + (3600.0 if next(jumps) % 2 else -3600.0)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    events = Events()
    with connect(proxy, ping_interval=0.1, max_pings_outstanding=30, on_event=events) as client:
        silent = other.subscribe("f.silent")
        other.flush(PATIENCE)
        waits: list[Callable[[], object]] = [
            lambda: client.request("f.silent", b"", timeout=0.3),
            lambda: client.subscribe("f.nothing").next(0.3),
            lambda: client.stream("f.silent", timeout=0.3).next(),
        ]
        for wait in waits:
            began = time.monotonic()
            with pytest.raises(natsync.TimedOut):
                wait()
            assert 0.29 <= time.monotonic() - began < 0.3 + SLACK
        assert natsync.Context().with_timeout(0.2).wait(PATIENCE)
        assert works(client)
        assert events.names == ["connected"], "PINGs that were answered were taken for late"
        proxy.reset()
        assert works(client)
        assert silent.delivered == 0


#: What tells the time of day to people or to other programs, and waits for nothing.
TELLING = {("services.py", "now"), ("cli/top.py", "time")}
#: Clocks that somebody may set; what waits must look at time.monotonic().
SETTABLE = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime", "ctime", "CLOCK_REALTIME"}


def test_no_module_looks_at_a_clock_that_may_jump() -> None:
    package = Path(natsync.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        name = str(path.relative_to(package))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                settable = node.value.id in ("time", "datetime", "date") and node.attr in SETTABLE
                if settable and (name, node.attr) not in TELLING:
                    found.append(f"{name}:{node.lineno} {node.value.id}.{node.attr}")
            elif isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
                found += [f"{path.name}:{node.lineno} from {node.module}" for one in node.names if one.name in SETTABLE]
    assert not found


# -- the interpreter's end ---------------------------------------------------------------------------------------------


def test_what_was_published_before_the_interpreter_ends_arrives_over_a_slow_link(
    proxy: FaultProxy, nats_server: NatsServer
) -> None:
    proxy.up.throttle(500_000)
    code = """
import sys
import natsync
client = natsync.connect(sys.argv[1], discover=False)
for n in range(100):
    client.publish("f.exit", b"%d " % n + bytes(1000))
"""
    with RawClient(nats_server.url) as raw:
        raw.subscribe("f.exit")
        with child(sys.executable, "-c", code, proxy.url) as process:
            assert [int(raw.next().payload.split()[0]) for _ in range(100)] == list(range(100))
            assert process.wait() == 0


@pytest.mark.parametrize("fault", ["stall", "refuse"])
def test_the_interpreter_ends_although_its_link_is_gone(proxy: FaultProxy, fault: str) -> None:
    code = """
import sys
import natsync
subscriber = natsync.Subscriber(sys.argv[1], discover=False)
subscriber.handler("f.echo")(lambda ctx, request: request.data)
subscriber.open()
client = natsync.connect(sys.argv[1], discover=False)
client.subscribe("f.callback", lambda message: None)
print("connected", flush=True)
sys.stdin.readline()
client.publish("f.exit", bytes(1000))
print("leaving", flush=True)
"""
    with child(sys.executable, "-c", code, proxy.url, stdin=b"") as process:
        process.wait_for_out("connected")
        if fault == "stall":
            proxy.stall()
        else:
            proxy.refuse()
            proxy.reset()
        process.wait_for_out("leaving")
        began = time.monotonic()
        assert process.wait() == 0
        assert time.monotonic() - began < 8.0
