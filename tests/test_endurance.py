"""What must hold over many messages, requests, connections and restarts: nothing doubled, torn, leaked or hung.

Sizes are reduced so that each test takes seconds; NATSYNC_ENDURANCE=full runs those that the promises are about.
"""

from __future__ import annotations

import array
import gc
import itertools
import os
import threading
import time
import tracemalloc
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import natsync
from natsync import timers
from natsync.testing import NatsServer, eventually
from rawclient import RawClient
from support import natsync_threads

pytestmark = pytest.mark.slow

FULL = os.environ.get("NATSYNC_ENDURANCE") == "full"
#: Seconds for what must come; a loaded machine is slow.
PATIENCE = 30.0
#: Kills of the broker, by SIGKILL, in one test.
RESTARTS = 5
THREADS = 8
#: Messages after which a publisher pauses for a moment: so that the recorder, in the same process, keeps up, and what
#: is on its way when the broker is killed is little.
PACE = 10


def sized(reduced: int, full: int) -> int:
    return full if FULL else reduced


def bounded(seconds: float, full: float) -> pytest.MarkDecorator:
    """The time after which pytest gives the test up."""
    return pytest.mark.timeout(full if FULL else seconds)


# -- publishing through restarts ---------------------------------------------------------------------------------------


@dataclass
class Publisher:
    """One thread's messages: number i was published between began[i] and ended[i]."""

    index: int
    began: array.array[float] = field(default_factory=lambda: array.array("d"), repr=False)
    ended: array.array[float] = field(default_factory=lambda: array.array("d"), repr=False)
    refused: int = 0  # attempts that the full buffer turned away; each was repeated

    def payload(self, number: int) -> bytes:
        text = b"%d %d " % (self.index, number) + b"x" * (number * 7919 % 200)
        return b"%08x %b" % (zlib.crc32(text), text)

    def run(self, client: natsync.Client, at_least: int, done: threading.Event | None = None) -> None:
        for number in itertools.count():
            if number >= at_least and (done is None or done.is_set()):
                return
            payload = self.payload(number)
            self.began.append(time.monotonic())
            while True:
                try:
                    client.publish("endurance", payload)
                    break
                except natsync.ReconnectBufferFull:
                    self.refused += 1
                    time.sleep(0.001)
            self.ended.append(time.monotonic())
            if number % PACE == 0:
                time.sleep(0.001)


class Recorder:
    """Another client that writes down what came: per publisher, the numbers in the order in which they arrived."""

    def __init__(self, client: natsync.Client) -> None:
        self.numbers: dict[int, list[int]] = defaultdict(list)
        self.torn: list[bytes] = []
        self.received = 0
        self.subscription = client.subscribe("endurance", self._take, pending_messages=10**7, pending_bytes=1 << 30)

    def _take(self, message: natsync.Message) -> None:
        self.received += 1
        checksum, _, text = message.data.partition(b" ")
        if int(checksum, 16) != zlib.crc32(text):
            self.torn.append(message.data)
            return
        index, number, _ = text.split(b" ", 2)
        self.numbers[int(index)].append(int(number))


class Outages:
    """Kills and restarts the broker, and notes the time in which core NATS may lose messages.

    A message is safe if publish() had returned before the last flush that both sides confirmed in the life of one
    broker, or was called after the recorder's subscription was known to the next one.
    """

    def __init__(self, server: NatsServer, publisher: natsync.Client, recorder: natsync.Client) -> None:
        self.windows: list[tuple[float, float]] = []
        self._server = server
        self._clients = (publisher, recorder)

    def strike(self) -> None:
        reconnects = [client.stats()["reconnects"] for client in self._clients]
        begin = self.confirm()
        self._server.kill()
        self._server.restart()
        for client, before in zip(self._clients, reconnects, strict=True):
            eventually(lambda c=client, b=before: c.stats()["reconnects"] > b, PATIENCE, "no link after the restart")
        self.confirm()
        self.windows.append((begin, time.monotonic()))

    def confirm(self) -> float:
        """Both sides flush, the publishers first; what was published before the moment returned has arrived."""
        begin = time.monotonic()
        for client in self._clients:
            client.flush(PATIENCE)
        return begin

    def may_lose(self, publisher: Publisher, number: int) -> bool:
        began, ended = publisher.began[number], publisher.ended[number]
        return any(ended >= begin and began <= end for begin, end in self.windows)


@pytest.fixture
def server() -> Iterator[NatsServer]:
    with NatsServer() as running:
        yield running


@dataclass
class Run:
    """What a run of publishers through outages left."""

    publishers: list[Publisher]
    recorder: Recorder
    outages: Outages
    publishing: dict[str, object]  # stats() of the two clients at the end
    recording: dict[str, object]

    @property
    def published(self) -> int:
        return published(self.publishers)

    def lost(self) -> list[tuple[Publisher, int]]:
        missing = []
        for one in self.publishers:
            came = set(self.recorder.numbers[one.index])
            missing += [(one, number) for number in range(len(one.ended)) if number not in came]
        return missing


@contextmanager
def running(threads: list[threading.Thread]) -> Iterator[None]:
    """Start the threads, and wait for them at the end of the block."""
    for thread in threads:
        thread.start()
    yield
    deadline = time.monotonic() + (600 if FULL else 4 * PATIENCE)
    for thread in threads:
        thread.join(deadline - time.monotonic())
    assert [thread.name for thread in threads if thread.is_alive()] == [], "these hang"


#: Messages that each thread publishes, at least, and all together between two kills.
EACH = sized(25_000, 200_000)
BETWEEN = THREADS * EACH // 8


@pytest.fixture(scope="module")
def run() -> Run:
    """8 threads publish through 5 kills of the broker; a second client records."""
    options = {"reconnect_wait": 0.05, "reconnect_wait_max": 0.1, "reconnect_buffer_bytes": 64 << 10}
    with NatsServer() as server, natsync.Client(server.url, **options) as publishing:
        with natsync.Client(server.url, **options) as recording:
            recorder = Recorder(recording)
            outages = Outages(server, publishing, recording)
            outages.confirm()
            publishers = [Publisher(index) for index in range(THREADS)]
            done = threading.Event()
            threads = [
                threading.Thread(target=one.run, args=(publishing, EACH, done), name=f"publisher-{one.index}")
                for one in publishers
            ]
            with running(threads):
                try:
                    for _ in range(RESTARTS):
                        so_far = published(publishers)
                        eventually(lambda least=so_far + BETWEEN: published(publishers) >= least, 10 * PATIENCE)
                        outages.strike()
                finally:
                    done.set()
            outages.confirm()
            eventually(lambda: recorder.subscription.pending == 0, 10 * PATIENCE)
            stats = publishing.stats(), recording.stats()
            recording.drain()
    return Run(publishers, recorder, outages, *stats)


def published(publishers: list[Publisher]) -> int:
    return sum(len(one.ended) for one in publishers)


@bounded(120, 900)
def test_no_message_is_torn_by_a_kill_of_the_broker(run: Run) -> None:
    assert run.recorder.torn == []


@bounded(120, 900)
def test_no_message_is_doubled_by_a_reconnect(run: Run) -> None:
    for numbers in run.recorder.numbers.values():
        assert len(numbers) == len(set(numbers))


@bounded(120, 900)
def test_each_threads_messages_keep_their_order_through_reconnects(run: Run) -> None:
    for numbers in run.recorder.numbers.values():
        assert numbers == sorted(numbers)


@bounded(120, 900)
def test_what_is_lost_was_published_around_a_kill(run: Run) -> None:
    lost = run.lost()
    assert len(run.outages.windows) == RESTARTS
    outside = [(one.index, number) for one, number in lost if not run.outages.may_lose(one, number)]
    assert outside == []
    # The windows say something: many messages were published outside of them.
    inside = sum(run.outages.may_lose(one, number) for one in run.publishers for number in range(len(one.ended)))
    print(f"{run.published} published, {inside} of them around a kill, {len(lost)} lost; windows {run.outages.windows}")
    assert run.published - inside >= RESTARTS * (BETWEEN - 2 * THREADS)


@bounded(120, 900)
def test_the_counters_account_for_every_message(run: Run) -> None:
    refused = sum(one.refused for one in run.publishers)
    print(f"{refused} attempts were refused because the buffer was full")
    assert run.published >= EACH * THREADS
    assert run.publishing["out_messages"] == run.published  # what was refused is not among them, nor counted twice
    assert run.publishing["out_pending_bytes"] == 0
    assert run.recording["in_messages"] == run.recorder.received == run.published - len(run.lost())
    assert run.recorder.subscription.dropped == run.recording["dropped"] == 0
    assert run.publishing["reconnects"] == run.recording["reconnects"] == RESTARTS


@bounded(60, 300)
def test_what_waits_for_a_link_arrives_whole_and_in_order_when_the_listener_is_back_first(server: NatsServer) -> None:
    """Nothing at all is lost of what was published between the loss of the link and the next one."""
    downs = threading.Event()
    events: list[str] = []

    def note(name: str, info: dict[str, object]) -> None:
        events.append(name)
        if name == "disconnected":
            downs.set()

    slow = {"reconnect_wait": 0.3, "reconnect_wait_max": 0.3, "reconnect_jitter": 0.0}
    with (
        natsync.Client(server.url, reconnect_wait=0.02, reconnect_wait_max=0.02) as recording,
        natsync.Client(server.url, on_event=note, **slow) as publishing,
    ):
        recorder = Recorder(recording)
        recording.flush(PATIENCE)
        expected = 0
        for _ in range(sized(3, 20)):
            downs.clear()
            server.kill()
            assert downs.wait(PATIENCE)
            publisher = Publisher(expected)
            publisher.run(publishing, 2_000)
            expected += 1
            before = recording.stats()["reconnects"]
            server.restart()
            eventually(lambda b=before: recording.stats()["reconnects"] > b, PATIENCE)
            recording.flush(PATIENCE)
            if publishing.status == "connected":
                continue  # the machine was so slow that the publisher was first: this round says nothing
            publishing.flush(PATIENCE)
            recording.flush(PATIENCE)
            eventually(lambda p=publisher: len(recorder.numbers[p.index]) >= 2_000, PATIENCE)
            assert recorder.numbers[publisher.index] == list(range(2_000))
        assert recorder.torn == []
        assert recorder.numbers, "the publisher was first each time"


# -- requests that time out --------------------------------------------------------------------------------------------


@contextmanager
def deaf_responder(url: str, subject: str) -> Iterator[None]:
    """Somebody who subscribes, reads, and never answers."""
    with RawClient(url) as raw:
        raw.subscribe(subject)
        leaving = threading.Event()
        raw.sock.settimeout(0.1)

        def swallow() -> None:
            while not leaving.is_set():
                try:
                    if not raw.sock.recv(1 << 16):
                        return
                except TimeoutError:
                    pass

        reader = threading.Thread(target=swallow, name="deaf-responder")
        reader.start()
        try:
            yield
        finally:
            leaving.set()
            reader.join(PATIENCE)


def all_time_out(client: natsync.Client, count: int) -> None:
    """So many requests, by several threads, none of which is answered."""
    outcomes: Counter[str] = Counter()

    def ask(share: int) -> None:
        mine: Counter[str] = Counter()
        for number in range(share):
            try:
                client.request("deaf", b"x" * 100, timeout=(0.0, 0.0005, 0.002)[number % 3])
                mine["answered"] += 1
            except natsync.RequestTimeout:
                mine["timed out"] += 1
        with lock:
            outcomes.update(mine)

    lock = threading.Lock()
    with running([threading.Thread(target=ask, args=(count // THREADS,)) for _ in range(THREADS)]):
        pass
    assert outcomes == {"timed out": count}


def scheduled() -> int:
    return len(timers.table()._heap)


def traced() -> int:
    gc.collect()
    time.sleep(0.1)  # a reader that is not in its recv() just now comes to it, and has the memory for it again
    return tracemalloc.get_traced_memory()[0]


@bounded(180, 900)
def test_requests_that_time_out_leave_no_entry_and_no_growth_of_memory(nats_server: NatsServer) -> None:
    count = sized(20_000, 100_000)
    base = scheduled()
    with deaf_responder(nats_server.url, "deaf"), natsync.Client(nats_server.url) as client:
        all_time_out(client, count // 5)
        tracemalloc.start()
        try:
            all_time_out(client, count // 5)  # what tracemalloc itself needs is there
            client.flush(PATIENCE)
            before = max(traced() for _ in range(3))
            all_time_out(client, count * 3 // 5)
            client.flush(PATIENCE)
            grown = min(traced() for _ in range(3)) - before
        finally:
            tracemalloc.stop()
        stats = client.stats()
        print(f"{count} requests timed out; memory grew by {grown} bytes over the last three fifths")
        assert stats["waiting_replies"] == 0
        assert stats["out_pending_bytes"] == 0
        assert stats["late_replies"] == 0
        assert len(client._core.mux) == 0
        assert client._core._outbox._frames == []
        assert scheduled() <= base + 2  # the next PING, and a watch over the writes
        assert grown < 32 << 10


@bounded(60, 300)
def test_requests_that_time_out_without_a_link_leave_nothing_to_send(server: NatsServer) -> None:
    with natsync.Client(server.url, reconnect_wait=0.05, reconnect_wait_max=0.1) as client:
        server.kill()
        eventually(lambda: client.status == "reconnecting", PATIENCE)
        count = sized(2_000, 20_000)
        for _ in range(count):
            with pytest.raises(natsync.RequestTimeout) as caught:
                client.request("deaf", b"x" * 100, timeout=0.0001)
            assert caught.value.sent is False
        stats = client.stats()
        assert (stats["waiting_replies"], stats["out_pending_bytes"]) == (0, 0)
        server.restart()
        client.flush(PATIENCE)


# -- connections -------------------------------------------------------------------------------------------------------


def descriptors() -> int:
    """Open descriptors of this process; 0 where the system does not tell."""
    listing = Path("/proc/self/fd")
    return len(list(listing.iterdir())) if listing.is_dir() else 0


def natsync_objects() -> Counter[str]:
    """How many instances of natsync's own classes there are, by class."""
    gc.collect()
    kinds = (type(one) for one in gc.get_objects())
    return Counter(kind.__qualname__ for kind in kinds if str(kind.__module__).startswith("natsync."))


def opened_and_closed(url: str) -> None:
    natsync.connect(url).close()


def used_at_once(url: str) -> None:
    """Every verb right after the start, and closing with things under way."""
    with natsync.Client(url) as client:
        client.subscribe("endurance.used", lambda message: message.respond(message.data), max_messages=1)
        assert client.request("endurance.used", b"?", timeout=PATIENCE).data == b"?"
        client.subscribe("endurance.other")
        client.stream("endurance.nobody")
        client.publish("endurance.other", b"x" * 1000)


def served_at_once(url: str) -> None:
    with natsync.Subscriber(url) as subscriber, natsync.Client(url) as client:
        subscriber.stream_subscribe("endurance.stream", lambda ctx, request: iter([b"1", b"2", b"3"]))
        with client.stream("endurance.stream", timeout=PATIENCE) as stream:
            assert list(stream) == [b"1", b"2", b"3"]


@bounded(180, 600)
@pytest.mark.parametrize(
    ("use", "times"),
    [(opened_and_closed, 1000), (used_at_once, 100), (served_at_once, 100)],
    ids=["open", "use", "serve"],
)
def test_closed_connections_leave_no_thread_descriptor_or_object(
    use: Callable[[str], None], times: int, nats_server: NatsServer
) -> None:
    for _ in range(times // 10):
        use(nats_server.url)
    threads, open_files, objects = natsync_threads(), descriptors(), natsync_objects()
    for _ in range(times):
        use(nats_server.url)
    eventually(lambda: natsync_threads() <= threads, PATIENCE)
    eventually(lambda: descriptors() <= open_files, PATIENCE)

    def grown() -> Counter[str]:
        return natsync_objects() - objects

    eventually(lambda: max(grown().values(), default=0) < times // 10, PATIENCE, f"objects are left: {grown()}")


@bounded(60, 300)
def test_failed_connects_leave_no_thread_descriptor_or_object(server: NatsServer) -> None:
    url, times = server.url, 200
    server.stop()

    def fail() -> None:
        with pytest.raises(natsync.NoServersError):
            natsync.connect(url)

    fail()
    threads, open_files, objects = natsync_threads(), descriptors(), natsync_objects()
    for _ in range(times):
        fail()
    eventually(lambda: natsync_threads() <= threads, PATIENCE)
    eventually(lambda: descriptors() <= open_files, PATIENCE)
    eventually(lambda: max((natsync_objects() - objects).values(), default=0) < times // 10, PATIENCE)


# -- streams through restarts ------------------------------------------------------------------------------------------

CHUNKS = 3_000


def chunks(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
    for number in range(CHUNKS):
        yield b"%d " % number + b"x" * (number % 100)


class Consumer:
    """Takes stream after stream until told to stop; notes how each ended, and what was wrong with it."""

    def __init__(self, client: natsync.Client) -> None:
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._client = client

    def run(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            self._take_one()

    def _take_one(self) -> None:
        numbers: list[int] = []
        end = "complete"
        begin = time.monotonic()
        try:
            with self._client.stream("endurance.chunks", timeout=PATIENCE) as stream:
                for chunk in stream:
                    numbers.append(int(chunk.split(b" ", 1)[0]))
        except natsync.NatsError as error:
            end = type(error).__name__
        except Exception as error:
            self.wrong.append(f"not a natsync error: {error!r}")
        self.ends[end] += 1
        if numbers != list(range(len(numbers))):
            self.wrong.append(f"a gap in {numbers[-10:]}")
        if end == "complete" and len(numbers) != CHUNKS:
            self.wrong.append(f"{len(numbers)} chunks, and yet complete")
        if end == "DeadlineExceeded":
            self.wrong.append(f"hung after {len(numbers)} chunks, for {time.monotonic() - begin:.1f} s")


@bounded(120, 900)
def test_a_stream_through_restarts_is_complete_or_ends_with_an_error(server: NatsServer, mode: str) -> None:
    options: dict[str, Any] = {"reconnect_wait": 0.02, "reconnect_wait_max": 0.1}
    restarts = sized(RESTARTS, 50)
    with ExitStack() as stack:
        subscriber = stack.enter_context(natsync.Subscriber(server.url, **options))
        subscriber.stream_subscribe("endurance.chunks", chunks)
        options["framed"] = mode == "framed"
        clients = [stack.enter_context(natsync.Client(server.url, **options)) for _ in range(2)]
        consumers = [Consumer(client) for client in clients for _ in range(4)]
        stopping = threading.Event()
        with running([threading.Thread(target=one.run, args=(stopping,)) for one in consumers]):
            try:
                for _ in range(restarts):
                    # Some streams are surely under way, and some have ended since the last restart.
                    before = sum(one.ends["complete"] for one in consumers)
                    eventually(lambda b=before: sum(one.ends["complete"] for one in consumers) >= b + 4, PATIENCE)
                    server.kill()
                    server.restart()
                before = sum(one.ends["complete"] for one in consumers)
                eventually(lambda: sum(one.ends["complete"] for one in consumers) >= before + 4, PATIENCE)
            finally:
                stopping.set()
        ends = sum((one.ends for one in consumers), Counter[str]())
        print(f"streams through {restarts} restarts ended so: {dict(ends)}")
        assert [wrong for one in consumers for wrong in one.wrong] == []
        assert ends["complete"] >= 4 * restarts
        assert set(ends) <= {"complete", "ServerLost", "NoRespondersError", "ConnectionLost", "ReconnectBufferFull"}
        eventually(lambda: subscriber.stats()["streams"] == 0, PATIENCE)
        # A stream that was left waits for its responder to have heard that, for the grace and two seconds more.
        eventually(lambda: all(client.stats()["waiting_replies"] == 0 for client in clients), PATIENCE)
