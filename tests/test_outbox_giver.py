"""natsync.outbox: one thread puts without the lock: nothing lost or doubled, all in order."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import get_ident
from typing import Any

import pytest

import interrupting
import natsync
from broker import Broker, opened
from natsync.backlog import GIVER_AFTER, Backlog
from natsync.connection import Connection
from natsync.outbox import ALLOTTED_BYTES, HIGH_WATER_BYTES, Outbox
from natsync.testing import FaultProxy, NatsServer, ScriptedPeer, eventually

PATIENCE = 30.0
LINE = b"PUB a 4\r\n"
#: Bytes of what a test sends besides, some of which is not counted (PONGs) or on its way; less than one chunk.
LITTLE = 500


def frame(number: int) -> bytes:
    return LINE + b"%04d" % number + b"\r\n"


class Publisher:
    """What of a connection publishes into the present outbox."""

    publish_bare = Connection.publish_bare

    def __init__(self, box: Outbox) -> None:
        self._outbox = box

    def put(self, number: int, size: int = 4) -> bool:
        core: Any = self
        return Connection.publish_bare(core, LINE, (b"%04d" % number).ljust(size, b"."))


def attached() -> Outbox:
    """An outbox with a link, whose writer is busy."""
    box = Outbox(1 << 20)
    box.attach([])
    return box


def giving(box: Outbox) -> Publisher:
    """This thread has put often enough; all that was taken."""
    publisher = Publisher(box)
    for number in range(GIVER_AFTER):
        assert box.try_put(frame(number), giving=True)
    assert box.giver.thread == get_ident()
    box.take()
    return publisher


def accounts(box: Outbox) -> None:
    size = box.size_bytes  # takes in
    assert box.position - box.taken == size == sum(map(len, box._frames))


# -- whose it is -----------------------------------------------------------------------------------------------------


def test_a_thread_that_puts_often_becomes_the_giver() -> None:
    box = attached()
    publisher = giving(box)
    assert publisher.put(1)
    assert publisher.put(2)
    assert box.giver.given == [frame(1), frame(2)]
    assert box.take() == frame(1) + frame(2)
    assert (box.messages, box.size_bytes) == (GIVER_AFTER + 2, 0)
    accounts(box)


def test_what_is_put_with_the_lock_stays_behind_what_was_given_before() -> None:
    box = attached()
    publisher = giving(box)
    publisher.put(1)
    box.put_now(b"PING\r\n")
    publisher.put(2)
    position = box.try_put(frame(3))
    assert position == box.position
    publisher.put(4)
    box.put_produced(frame(5), 1)
    assert box.take() == frame(1) + b"PING\r\n" + b"".join(map(frame, (2, 3, 4, 5)))
    accounts(box)


def test_another_thread_becomes_it_once_the_giver_rests_and_not_before() -> None:
    box = attached()
    publisher = giving(box)
    with ThreadPoolExecutor(1) as other:
        for number in range(GIVER_AFTER - 1):
            assert other.submit(publisher.put, number).result(PATIENCE)
        publisher.put(1)
        for number in range(GIVER_AFTER):
            assert box.giver.thread == get_ident()
            assert other.submit(publisher.put, number).result(PATIENCE)
        assert box.giver.thread == other.submit(get_ident).result(PATIENCE)
    before = box.giver
    publisher.put(2)
    assert box.giver is before
    assert not box.giver.given
    accounts(box)


def test_there_is_none_while_there_is_no_link() -> None:
    box = Outbox(1 << 20)
    publisher = Publisher(box)
    for number in range(2 * GIVER_AFTER):
        publisher.put(number)
    assert not box.giver.given
    assert box.size_bytes == sum(len(frame(number)) for number in range(2 * GIVER_AFTER))


@pytest.mark.parametrize("how", ["close", "seal", "detach"])
def test_there_is_none_any_more_when_the_link_ends(how: str) -> None:
    box = attached()
    publisher = giving(box)
    publisher.put(1)
    if how == "close":
        assert box.close() == [frame(1)]
    elif how == "seal":
        box.seal(b"PING\r\n")
        assert box.take() == frame(1) + b"PING\r\n"
    else:
        box.detach()
        assert box.waiting_messages == 1
    assert publisher.put(2) is (how == "detach")  # into the buffer for the next link
    assert not box.giver.given
    assert box.giver.thread == 0


def test_it_gives_no_more_than_there_is_room_for() -> None:
    box = attached()
    publisher = giving(box)
    count = 0
    while publisher.put(count, 10_000):
        count += 1
    assert HIGH_WATER_BYTES <= box.size_bytes < HIGH_WATER_BYTES + 20_000
    box.take()
    assert publisher.put(count, 10_000)
    assert publisher.put(count + 1, 10_000)
    assert len(box.giver.given) == 1
    assert box.messages == GIVER_AFTER + count + 1
    accounts(box)


def test_two_threads_together_put_hardly_more_than_there_is_room_for() -> None:
    """What the giver may give without a look is allotted before the other one fills the outbox."""
    box = attached()
    publisher = giving(box)
    assert publisher.put(0)
    with ThreadPoolExecutor(1) as other:
        while other.submit(publisher.put, 1, 1_000_000).result(PATIENCE):
            pass
    while publisher.put(2, 10_000):
        pass
    assert box.size_bytes < HIGH_WATER_BYTES + ALLOTTED_BYTES + 1_100_000


def test_a_writer_that_waits_is_woken() -> None:
    box = attached()
    publisher = giving(box)
    with ThreadPoolExecutor(1) as writer:
        for number in range(200):
            taken = writer.submit(box.take)
            if number % 2:
                eventually(lambda: box._writer_waits)
            assert publisher.put(number)
            assert taken.result(PATIENCE) == frame(number)
        box.close()


# -- whenever the giver gives -----------------------------------------------------------------------------------------


class WatchedLock:
    """A lock, and whom to tell when the giver has to wait for it."""

    def __init__(self, lock: Any, giver: GivingThread) -> None:
        self._lock, self._giver = lock, giver

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._giver.stands_before_a_lock()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Waits(Exception):
    """The writer waits, as it should: nobody has put anything."""


class WriterWaits:
    """In place of the condition on which the writer waits: it has to be told of what the giver gives."""

    def __init__(self, lock: Any, giver: GivingThread) -> None:
        self._lock, self._giver, self._told = lock, giver, threading.Event()

    def notify(self) -> None:
        self._told.set()

    notify_all = notify

    def wait(self) -> None:
        if not self._giver.began:
            raise Waits
        self._lock.release()
        try:
            self._giver.finish()
            assert self._told.is_set(), "the writer waits for ever"
        finally:
            self._lock.acquire()


class GivingThread:
    """A thread that gives; it puts three frames when it has its turn."""

    def __init__(self) -> None:
        self.box = box = attached()
        self.queued: list[bytes] = []
        self.refused: list[bytes] = []
        self.began = False
        self._stands = threading.Event()
        self._thread = ThreadPoolExecutor(1)
        self._publisher = self._thread.submit(giving, box).result(PATIENCE)
        lock: Any = box._lock
        swapped: Any = box
        swapped._lock, swapped._ready = WatchedLock(lock, self), WriterWaits(lock, self)

    def _put(self) -> None:
        for number in range(3):
            into = self.queued if self._publisher.put(number) else self.refused
            into.append(frame(number))
        self._stands.set()

    def stands_before_a_lock(self) -> None:
        self._stands.set()

    def turn(self) -> None:
        """It goes on until it has put its frames, or needs the lock."""
        self.began = True
        self._putting = self._thread.submit(self._put)
        assert self._stands.wait(PATIENCE)

    def finish(self) -> None:
        """The lock is free."""
        if self.began:
            self._putting.result(PATIENCE)
        self._thread.shutdown()


TRACED: list[Callable[..., Any]] = [
    Outbox.try_put, Outbox.put_now, Outbox.seal, Outbox.detach, Outbox.close, Outbox.take, Outbox._is_due_locked,
    Outbox.withdraw_to, Outbox.put_produced, Backlog._take_in, Backlog._no_giver, Backlog._allot, Backlog._next,
]  # fmt: skip


def puts_often(box: Outbox) -> list[bytes]:
    for _ in range(GIVER_AFTER + 1):
        box.try_put(b"PUB b 0\r\n\r\n", giving=True)
    return []


def puts(box: Outbox) -> list[bytes]:
    assert box.try_put(b"PUB b 0\r\n\r\n") == box.position
    return []


def puts_protocol(box: Outbox) -> list[bytes]:
    assert box.put_now(b"PING\r\n") == box.position
    return []


def seals(box: Outbox) -> list[bytes]:
    box.seal(b"PING\r\n")
    return []


def detaches(box: Outbox) -> list[bytes]:
    box.detach()
    return []


def takes_back(box: Outbox) -> list[bytes]:
    box.withdraw_to({b"b"})
    return []


def produces(box: Outbox) -> list[bytes]:
    box.put_produced(b"PUB b 0\r\n\r\n", 1)
    return []


def writes(box: Outbox) -> list[bytes]:
    try:
        taken = box.take()
    except Waits:
        return []
    assert taken
    return [taken]


def writes_what_was_there(box: Outbox) -> list[bytes]:
    box.try_put(b"PUB b 0\r\n\r\n")
    return writes(box)


OTHERS = [
    puts, puts_often, puts_protocol, seals, detaches, takes_back, produces, writes, writes_what_was_there, Outbox.close,
]  # fmt: skip


@pytest.mark.parametrize("call", OTHERS, ids=lambda call: call.__name__)
def test_whenever_the_giver_gives_while_another_thread_is_at_it_nothing_is_lost_doubled_or_out_of_order(
    call: Callable[[Outbox], list[bytes]],
) -> None:
    tried = 0
    giver, out = GivingThread(), list[bytes]()

    def again() -> None:
        nonlocal giver, out
        giver = GivingThread()
        out = call(giver.box)

    for _ in interrupting.turns(again, lambda: giver.turn(), *TRACED):
        tried += 1
        box = giver.box
        giver.finish()
        if call is not Outbox.close:  # what it returns was not taken
            accounts(box)
        assert box.messages - GIVER_AFTER >= len(giver.queued)
        out += box.close()
        found = [LINE + part for part in b"".join(out).split(LINE)[1:]]
        mine = [one[: len(frame(0))] for one in found]
        assert mine == giver.queued
        assert not (set(giver.refused) & set(mine))
    assert tried > 20
    giver.finish()


@pytest.mark.parametrize("how", ["close", "seal", "detach", "another thread becomes the giver", "the writer waits"])
def test_whatever_happens_while_it_gives_it_is_told_the_truth(how: str) -> None:
    box, put, written = attached(), False, list[bytes]()
    publisher, writing = Publisher(box), threading.Thread()

    def write() -> None:
        taken = box.take()
        assert taken
        written.append(taken)

    def happens() -> None:
        nonlocal writing
        if how == "close":
            written.extend(box.close())
        elif how == "seal":
            box.seal(b"PING\r\n")
        elif how == "detach":
            box.detach()
        elif how == "the writer waits":
            writing = threading.Thread(target=write)
            writing.start()
            eventually(lambda: box._writer_waits or written)
        else:
            other = threading.Thread(target=puts_often, args=(box,))
            other.start()
            other.join(PATIENCE)

    def once() -> None:
        nonlocal box, publisher, put
        box = attached()
        publisher, put = giving(box), False
        written.clear()
        put = publisher.put(7)

    tried = 0
    for _ in interrupting.turns(once, happens, Connection.publish_bare):
        tried += 1
        if how == "the writer waits":
            writing.join(PATIENCE)
            assert not writing.is_alive()
        written += box.close()
        assert b"".join(written).count(frame(7)) == put
        assert put or how in ("close", "seal")
    assert tried > 20


def test_a_signal_handler_that_publishes_too_is_counted() -> None:
    """Nothing else is promised of such a handler, which may meet a lock that its own thread holds."""
    box, nested = attached(), list[int]()
    publisher = Publisher(box)

    def handler() -> None:
        nested.append(len(nested) + 1000)
        assert publisher.put(nested[-1])

    def once() -> None:
        nonlocal box, publisher
        box = attached()
        publisher = giving(box)
        nested.clear()
        assert publisher.put(7)

    tried = 0
    for _ in interrupting.turns(once, handler, Connection.publish_bare, anywhere=False):
        tried += 1
        assert box.giver.given_bytes == len(frame(7) + frame(1000))
        assert sorted((box.take() or b"").split(LINE)[1:]) == [b"0007\r\n", b"1000\r\n"]
    assert tried > 2


def test_what_was_taken_is_not_put_again_for_what_a_signal_handler_left_behind() -> None:
    """It gave a frame as another thread became the giver, and was interrupted itself before it saw to that."""
    box = attached()
    publisher = giving(box)
    giver = box.giver
    assert publisher.put(7)
    other = threading.Thread(target=puts_often, args=(box,))
    other.start()
    other.join(PATIENCE)
    mine, left = box._frames[0], frame(8)
    giver.given.append(left)
    assert box.was_taken(giver, mine)
    assert giver.given == [left]
    assert not box.was_taken(giver, left)
    assert giver.given == []


def test_a_ctrl_c_while_one_puts_costs_nothing_but_what_was_being_put() -> None:
    def publish() -> None:
        nonlocal box
        box = attached()
        returned.clear()
        for number in range(GIVER_AFTER + 6):
            returned.append((Publisher(box).put(number), number))
            if number % 5 == 4:
                box.put_now(b"PING\r\n")

    functions = [Connection.publish_bare, Outbox.try_put, Outbox.put_now, Outbox.was_taken]
    functions += [Backlog._take_in, Backlog._allot, Backlog._no_giver]
    tried = 0
    box, returned = attached(), list[tuple[bool, int]]()
    for _ in interrupting.moments(publish, *functions):
        tried += 1
        assert box.size_bytes >= sum(map(len, box._frames))  # more, if it came between accounting and queueing
        assert Publisher(box).put(999)
        written = box.take()
        assert written
        assert written.endswith(frame(999))
        for put, number in returned:
            assert put
            assert written.count(frame(number)) == 1
        assert box.size_bytes == 0
    assert tried > 50


# -- in a connection -------------------------------------------------------------------------------------------------


def test_counters_know_of_it(natsync_client: natsync.Client) -> None:
    natsync_client.publish("a", b"1234")
    natsync_client.flush()
    before = natsync_client.stats()
    for _ in range(1000):
        natsync_client.publish("a", b"1234")
    after = natsync_client.stats()
    assert after["out_messages"] - before["out_messages"] == 1000
    sent = after["out_bytes"] + after["out_pending_bytes"] - before["out_bytes"] - before["out_pending_bytes"]
    assert sent == 1000 * len(b"PUB a 4\r\n1234\r\n")


def test_counters_agree_while_the_writer_is_at_work(natsync_client: natsync.Client) -> None:
    natsync_client.publish("a", b"1234")
    natsync_client.flush()

    def out() -> int:
        stats = natsync_client.stats()
        return int(stats["out_bytes"] + stats["out_pending_bytes"])

    former = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            before = out()
            for _ in range(200):
                natsync_client.publish("a", b"1234")
            assert out() - before == 200 * len(b"PUB a 4\r\n1234\r\n")
    finally:
        sys.setswitchinterval(former)


@pytest.mark.parametrize("pause", [0.003, 0.0], ids=["pauses", "bursts"])
@pytest.mark.parametrize("what", ["streams", "publishes", "mixture"])
def test_bytes_are_counted_as_the_network_counts_them(
    make_fault_proxy: Callable[..., FaultProxy], what: str, pause: float
) -> None:
    proxy = make_fault_proxy()
    with natsync.Subscriber(proxy.url) as subscriber, natsync.connect(proxy.url) as client:

        @subscriber.stream("count")
        def count(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
            for _ in range(60):
                time.sleep(pause)  # who writes depends on it: this thread, or the writer
                yield bytes(5000)

        subscriber.handler("last")(lambda ctx, request: b"")

        def uncounted() -> int:
            counted = client.stats()["out_bytes"] + subscriber.stats()["connection"]["out_bytes"]
            return proxy.up.passed_bytes - int(counted)

        assert len(list(client.stream("count"))) == 60  # both are connected and know each other
        eventually(lambda: subscriber.stats()["streams"] == 0)
        client.request("last", timeout=PATIENCE)  # its answer has passed behind all that the subscriber sent
        client.flush()
        before = uncounted()
        stream = client.stream("count") if what != "publishes" else None
        for _ in range(60 if what != "streams" else 0):
            time.sleep(pause)
            client.publish("a", bytes(5000))
        if stream is not None:
            assert len(list(stream)) == 60
        client.flush()
        eventually(lambda: abs(uncounted() - before) < LITTLE)


def test_closing_counts_nothing_twice(nats_server: NatsServer) -> None:
    client = natsync.connect(nats_server.url)
    for _ in range(100):
        client.publish("a", b"1234")
    client.flush()
    before = client.stats()
    client.close()
    after = client.stats()
    assert after["out_messages"] == before["out_messages"] == 100
    assert after["out_bytes"] - before["out_bytes"] < 100  # a PING


def test_several_threads_publish_at_once_and_each_ones_messages_come_in_order(
    nats_server: NatsServer, natsync_client: natsync.Client
) -> None:
    each, threads = 20_000, 3
    with natsync.Client(nats_server.url) as listener:
        subscription = listener.subscribe("giver.>", pending_messages=threads * each, pending_bytes=1 << 30)
        listener.flush()
        seen: dict[str, list[int]] = {f"giver.{index}": [] for index in range(threads)}

        def publish(index: int) -> None:
            for number in range(each):
                natsync_client.publish(f"giver.{index}", b"%d" % number)
                if number % 4000 == 0:
                    natsync_client.flush(PATIENCE)

        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(publish, index) for index in range(threads)]:
                done.result(PATIENCE)
        natsync_client.flush(PATIENCE)
        listener.flush(PATIENCE)
        for _ in range(threads * each):
            message = subscription.next(PATIENCE)
            seen[message.subject].append(int(message.data))
    assert all(numbers == list(range(each)) for numbers in seen.values())


def test_what_was_published_before_a_lost_link_is_sent_by_the_next_in_order() -> None:
    """The publisher never stops: what the lost link's writer had not taken, and all that came later, comes.

    A real server may still have messages of the old link before it when the new one's come.
    """
    broker = Broker()
    over = threading.Event()
    with ScriptedPeer(broker) as peer, opened(peer, reconnect_buffer_bytes=1 << 30) as client:
        published = 0

        def publish() -> None:
            nonlocal published
            while not over.is_set():
                client.publish("given", b"%d" % published)
                published += 1
                if published % 512 == 0:
                    over.wait(0.01)

        with ThreadPoolExecutor(1) as pool:
            publishing = pool.submit(publish)
            for drops in range(1, 6):
                reached = published + 2_000
                eventually(lambda: published > reached, timeout=PATIENCE)  # noqa: B023
                client.force_reconnect()
                eventually(lambda: client.stats()["reconnects"] == drops, timeout=PATIENCE)  # noqa: B023
            over.set()
            publishing.result(PATIENCE)
        client.publish("given", b"%d" % published)
        client.flush(PATIENCE)
        numbers = [[int(pub.payload) for pub in broker.published(link)] for link in range(len(broker.links))]
    came = [number for of_link in numbers for number in of_link]
    assert came == sorted(set(came))
    assert came[-1] == published
    assert client.stats()["out_messages"] == published + 1  # each was given to one link
    for of_link in filter(None, numbers):  # what is lost was on its way as a link ended
        assert of_link == list(range(of_link[0], of_link[-1] + 1))


def test_it_is_used_by_a_thread_that_publishes_without_a_pause(natsync_client: natsync.Client) -> None:
    used = 0
    for number in range(20_000):
        natsync_client.publish("a", b"%d" % number)
        used += bool(natsync_client._connection()._outbox.giver.given)
    assert used
    natsync_client.flush()
