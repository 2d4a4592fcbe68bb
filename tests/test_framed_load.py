"""Framed streams in numbers: many, large, idle, next to one that nobody reads, across forks and frozen processes.

Sizes are reduced so that each test takes seconds; NATSYNC_ENDURANCE=full runs those that the promises are about.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import re
import signal
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

import natsync
from broker import QUICK, Outcome
from natsync.streaming.framed_sender import FramedSender
from natsync.streaming.framing import Framing
from natsync.testing import FaultProxy, NatsServer, eventually
from numbered import (
    KINDS,
    PATIENCE,
    Handled,
    Pace,
    Taking,
    bounded,
    kib,
    large,
    serve,
    sized,
)
from processes import Child, child
from rawclient import RawClient

MakeServer = Callable[..., NatsServer]

pytestmark = pytest.mark.slow

# A client that takes many streams at once: python -c MANY URL STREAMS KIND COUNT WINDOW
MANY = """
import sys, threading
import natsync
from numbered import KINDS, Taking
url, streams, kind, count, window = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
client = natsync.connect(url)
taking = [
    Taking(client.stream("n.send", f"{kind} {count}", window=window), KINDS[kind]) for _ in range(streams)
]
for one in taking:
    one.reach(1)
print("first", flush=True)
for one in taking:
    error = one.within(60)
    assert error is None, repr(error)
    assert one.number == count
print("complete, reconnects:", client.stats()["reconnects"], flush=True)
client.close()
"""


def program(code: str, url: str, *arguments: object) -> contextlib.AbstractContextManager[Child]:
    return child(sys.executable, "-c", code, url, *map(str, arguments), env={"PYTHONPATH": os.path.dirname(__file__)})


@pytest.fixture
def server(make_nats_server: MakeServer) -> NatsServer:
    return make_nats_server()


@pytest.fixture
def subscriber(server: NatsServer) -> Iterator[natsync.Subscriber]:
    """With the handlers of numbered.serve()."""
    with natsync.Subscriber(server.url, **QUICK) as subscriber:
        serve(subscriber)
        yield subscriber


# -- a client that does not read for a while -------------------------------------------------------------------------

#: Streams with windows that are full.
STREAMS = 40
#: Kinds of chunks that fill their windows by bytes, and by number, and how many each stream has.
FILLING = {"large": sized(30, 200), "plain": sized(9_000, 100_000)}


@bounded(60, 300)
@pytest.mark.parametrize("kind", FILLING)
def test_the_server_keeps_a_client_that_is_frozen_with_full_windows(
    server: NatsServer, subscriber: natsync.Subscriber, kind: str
) -> None:
    with program(MANY, server.url, STREAMS, kind, FILLING[kind], 8192) as process:
        process.wait_for_out("first")
        process.send(signal.SIGSTOP)
        time.sleep(2.0)
        process.send(signal.SIGCONT)
        assert process.wait(PATIENCE * 4) == 0, process.err
        assert "complete, reconnects: 0" in process.out
    assert subscriber.stats()["cancelled"] == 0


@bounded(60, 300)
@pytest.mark.parametrize("kind", FILLING)
@pytest.mark.usefixtures("subscriber")
def test_the_server_keeps_a_client_whose_socket_is_not_read_with_full_windows(server: NatsServer, kind: str) -> None:
    count = FILLING[kind]
    with FaultProxy(server.url) as proxy, natsync.connect(proxy.url, **QUICK) as client:
        streams = [client.stream("n.send", f"{kind} {count}") for _ in range(STREAMS)]
        taking = [Taking(stream, KINDS[kind]) for stream in streams]
        for one in taking:
            one.reach(1)
        proxy.down.stall()
        time.sleep(1.5)
        proxy.down.resume()
        for one in taking:
            assert one.within() is None
            assert one.number == count
        assert client.stats()["reconnects"] == 0
        assert proxy.connections == 1


@pytest.mark.parametrize("count", [40, 400, 1000])
def test_the_credit_of_all_streams_is_32_mib_and_4_kib_each(server: NatsServer, count: int) -> None:
    """However many there are: what the server holds for a client, 64 MiB, has room for 1,000 of the least."""
    with natsync.Subscriber(server.url) as subscriber, natsync.connect(server.url) as client:
        senders: list[natsync.ResponseSender] = []
        subscriber.stream_subscribe("l.held", lambda ctx, request, sender: senders.append(sender))
        streams = [client.stream("l.held") for _ in range(count)]
        assert client._calls is not None
        given = client._calls.budget._given
        eventually(lambda: len(senders) == count, PATIENCE)
        for stream in streams:
            stream.close()
    assert given <= (32 << 20) + count * (4 << 10)


def test_the_server_keeps_a_client_whose_socket_is_not_read_with_700_full_windows(server: NatsServer) -> None:
    count = 700
    with FaultProxy(server.url) as proxy, natsync.Subscriber(server.url, **QUICK) as subscriber:
        senders: list[natsync.ResponseSender] = []
        subscriber.stream_subscribe("l.held", lambda ctx, request, sender: senders.append(sender))
        with natsync.connect(proxy.url, **QUICK) as client:
            streams = [client.stream("l.held") for _ in range(count)]
            eventually(lambda: len(senders) == count, PATIENCE)
            for sender in senders:
                sender.send(b"0")
            for stream in streams:
                assert stream.next(PATIENCE) == b"0"
            proxy.down.stall()
            began = time.monotonic()
            chunk = bytes(8000)
            for sender in senders:
                while sender.try_send(chunk):
                    pass
            time.sleep(max(0.0, 1.5 - (time.monotonic() - began)))
            proxy.down.resume()
            for sender in senders:
                sender.end()
            assert sum(len(list(stream)) for stream in streams) == sent(senders) - count
            assert client.stats()["reconnects"] == 0
            assert proxy.connections == 1


# -- a consumer that does not read -----------------------------------------------------------------------------------


class Endless:
    """A handler that sends without end, numbered chunks of a kind; keeps what each request came to."""

    def __init__(self) -> None:
        self.all: list[Handled] = []

    def __call__(self, ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        kind = KINDS[request.text()]
        self.all.append(Handled(ctx, sender))
        with contextlib.suppress(natsync.StreamClosed):
            for number in itertools.count(1):
                sender.send(kind(number))

    def next_stuck(self, count: int) -> None:
        """Block until the sender behind the first so many has no credit left."""
        eventually(lambda: len(self.all) > count and waits(self.all[count].sender), PATIENCE)

    def stuck(self, count: int) -> int:
        """Block until so many senders have no credit left; how many chunks they have sent."""
        eventually(lambda: len(self.all) == count, PATIENCE)
        senders = [one.sender for one in self.all]
        return eventually(lambda: all(map(waits, senders)) and sent(senders), PATIENCE)


def waits(sender: natsync.ResponseSender) -> bool:
    """Whether a send() waits for credit."""
    core = sender._core
    assert isinstance(core, FramedSender)
    return core._waiting > 0


def sent(senders: list[natsync.ResponseSender]) -> int:
    return sum(one.send_count for one in senders)


@pytest.fixture
def endless(subscriber: natsync.Subscriber) -> Endless:
    """Registered as l.endless."""
    endless = Endless()
    subscriber.stream_subscribe("l.endless", endless)
    return endless


@pytest.mark.parametrize("window", [1, 7, 100, 8192])
def test_a_sender_runs_ahead_of_its_consumer_by_the_window(server: NatsServer, endless: Endless, window: int) -> None:
    with natsync.connect(server.url) as client:
        taking = Taking(client.stream("l.endless", "plain", window=window), pace=(pace := Pace(0)))
        taking.reach(1)  # and now it waits
        assert endless.stuck(1) == window
        pace.allowed = 3 * window
        taking.reach(3 * window + 1)
        assert 3 * window < endless.stuck(1) <= 3 * window + 1 + window
        client.close()
        pace.allowed = float("inf")
        assert isinstance(taking.within(), natsync.NatsError)


def test_a_sender_of_large_chunks_runs_ahead_by_the_byte_window(server: NatsServer, endless: Endless) -> None:
    with natsync.connect(server.url) as client:
        stream = client.stream("l.endless", "kib", window=100_000)
        most = (4 << 20) // 1024  # of 32 MiB a connection
        eventually(lambda: endless.stuck(1) == most, PATIENCE)
        for number in range(1, 2 * most + 1):
            assert stream.next(PATIENCE) == kib(number)
        assert endless.stuck(1) <= 3 * most
        stream.close()


#: Bytes of a large() chunk. One of them may be under way on each stream beyond the credit: it is sent in fragments.
LARGE = len(large(1))


def test_all_streams_of_a_connection_together_run_ahead_by_32_mib(server: NatsServer, endless: Endless) -> None:
    with natsync.connect(server.url) as client:
        streams = [client.stream("l.endless", "large", window=100_000) for _ in range(60)]
        for _ in range(3):
            assert endless.stuck(60) * LARGE - taken_bytes(streams) <= (32 << 20) + 60 * LARGE
            for stream in streams:
                for _ in range(10):
                    stream.next(PATIENCE)
        for stream in streams:
            stream.close()


def taken_bytes(streams: list[natsync.Stream]) -> float:
    return sum(stream.stats["bytes"] for stream in streams)


def test_memory_is_bounded_on_both_sides_while_nobody_reads(server: NatsServer, endless: Endless) -> None:
    """Both are in this process: each keeps the 32 MiB of credit at most, the sender until they are consumed."""
    with natsync.connect(server.url) as client:
        tracemalloc.start()
        try:
            streams = [client.stream("l.endless", "large", window=100_000) for _ in range(60)]
            ahead = endless.stuck(60) * LARGE
            eventually(lambda: waiting(streams) >= ahead - 60 * LARGE, PATIENCE)
            settled = kept_until(lambda grown: grown <= 2 * ahead + (4 << 20))
            grown, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        print(
            f"60 streams that nobody reads: {ahead >> 10} KiB ahead, {grown >> 10} KiB of memory, {peak >> 10} at most"
        )
        assert ahead <= (32 << 20) + 60 * LARGE
        assert settled, f"{grown} bytes"
        assert peak <= 2 * ahead + (32 << 20)
        for stream in streams:
            stream.close()


def kept_until(enough: Callable[[int], bool]) -> bool:
    """Whether what is kept is little enough before long: what is still on its way is here several times."""
    end = time.monotonic() + PATIENCE
    while not (settled := enough(tracemalloc.get_traced_memory()[0])) and time.monotonic() < end:
        gc.collect()
    return settled


def waiting(streams: list[natsync.Stream]) -> int:
    """Bytes that wait for their consumers."""
    return sum(stream._call._waiting_bytes for stream in streams)


@bounded(60, 120)
def test_fifty_other_streams_keep_their_speed_next_to_one_that_nobody_reads(
    server: NatsServer, endless: Endless
) -> None:
    with natsync.connect(server.url) as client:
        others = [Taking(client.stream("l.endless", "plain")) for _ in range(50)]
        for one in others:
            one.reach(1000)
        ratios: list[float] = []
        for _ in range(
            15
        ):  # what else this machine does falls on both alike, as a rule: short turns, and all of it again
            alone = beside = 0.0
            for _ in range(sized(2, 10)):
                alone += taken_in(0.2, others)
                count = len(endless.all)
                stream = client.stream("l.endless", "kib", window=200)
                endless.next_stuck(count)
                beside += taken_in(0.2, others)
                stream.close()
            ratios.append(beside / alone)
            if ratios[-1] >= 0.8:
                break
        print(f"speed next to a stream that nobody reads, as a part of that without: {ratios}")
        assert ratios[-1] >= 0.8
        assert client.stats()["reconnects"] == 0
        assert all(one.running for one in others)
        client.close()
        for one in others:
            assert isinstance(one.within(), natsync.NatsError)


def taken_in(seconds: float, taking: list[Taking]) -> float:
    """How many chunks come in a second, measured for a while."""
    before, begin = sum(one.number for one in taking), time.monotonic()
    time.sleep(seconds)
    return (sum(one.number for one in taking) - before) / (time.monotonic() - begin)


# -- forks -----------------------------------------------------------------------------------------------------------

# Children that do whatever they can to the streams of their parent: python -c FORKING_CLIENT URL COUNT FORKS
FORKING_CLIENT = """
import gc, os, sys, traceback
import natsync
from numbered import Pace, Taking
url, count, forks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
client = natsync.connect(url)
pace = Pace(0)
read = [Taking(client.stream(f"n.{shape}", f"plain {count}", window=500), pace=pace)
        for shape in ("send", "send_many", "generate")]
unread = [client.stream("n.send", f"plain {count}", window=500) for _ in range(5)]
for number in range(1, forks + 1):
    pace.allowed = number * count // (forks + 1)
    for one in read:
        one.reach(pace.allowed // 2)
    pid = os.fork()
    if not pid:
        try:
            for stream in unread:
                for leave in (stream.close, stream.cancel):
                    try:
                        leave()
                    except natsync.ForkError:
                        pass
            del stream, leave
            unread.clear()
            read.clear()
            gc.collect()
            try:
                client.close(0.5)
            except natsync.NatsError:
                pass
            del client
            gc.collect()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
pace.allowed = float("inf")
for one in [*read, *map(Taking, unread)]:
    error = one.within()
    assert error is None, repr(error)
    assert one.number == count
print("complete, reconnects:", client.stats()["reconnects"], flush=True)
client.close()
"""

# A responder that forks when it is asked to: python -c FORKING_SERVER URL
FORKING_SERVER = """
import gc, os, sys, threading, traceback
import natsync
from numbered import serve
subscriber = natsync.Subscriber(sys.argv[1])
serve(subscriber)
held = []
subscriber.stream_subscribe("l.held", lambda ctx, request, sender: held.append(sender))
asked, gone = threading.Event(), threading.Event()
pids = []


def fork(ctx, request):
    gone.clear()
    asked.set()
    assert gone.wait(20)
    return "gone"


def release(ctx, request):
    for sender in held:
        sender.send(b"1")
        sender.end()
    return "released"


subscriber.handler("l.fork")(fork)
subscriber.handler("l.release")(release)
print("serving", flush=True)
while True:
    asked.wait()
    asked.clear()
    pid = os.fork()
    if not pid:
        try:
            for sender in held:
                for leave in (sender.end, lambda: sender.send_error("of the child"), lambda: sender.send(b"x")):
                    try:
                        leave()
                        raise AssertionError("a sender of the parent's did something")
                    except natsync.ForkError:
                        pass
            del sender, leave
            held.clear()
            gc.collect()
            subscriber.close(0.5)
            del subscriber
            gc.collect()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print("child", status, flush=True)
    gone.set()
"""


def test_children_of_a_client_that_close_its_streams_disturb_none_of_them(
    server: NatsServer, subscriber: natsync.Subscriber
) -> None:
    with program(FORKING_CLIENT, server.url, sized(6_000, 100_000), sized(3, 20)) as process:
        assert process.wait(PATIENCE * 2) == 0, process.err
        assert "complete, reconnects: 0" in process.out
        assert process.err == []
    eventually(lambda: subscriber.stats()["active"] == 0, PATIENCE)
    stats = subscriber.stats()
    assert (stats["cancelled"], stats["failed"], stats["processed"]) == (0, 0, 8)
    assert stats["connection"]["reconnects"] == 0


def test_children_of_a_responder_that_close_its_streams_disturb_none_of_them(server: NatsServer) -> None:
    count, forks = sized(6_000, 100_000), sized(3, 20)
    with program(FORKING_SERVER, server.url) as process, natsync.connect(server.url, **QUICK) as client:
        process.wait_for_out("serving")
        pace = Pace(0)
        held = client.stream("l.held")
        taking = [
            Taking(client.stream(f"n.{shape}", f"plain {count}", window=500), pace=pace)
            for shape in ("send", "send_many", "generate")
        ]
        for number in range(1, forks + 1):
            pace.allowed = number * count // (forks + 1)
            for one in taking:
                one.reach(int(pace.allowed) // 2)
            assert client.request("l.fork", timeout=PATIENCE).text() == "gone"
        pace.allowed = float("inf")
        for one in taking:
            assert one.within() is None
            assert one.number == count
        assert client.request("l.release", timeout=PATIENCE).text() == "released"
        assert list(held) == [b"1"]
        eventually(lambda: len(process.out) > forks, PATIENCE)  # a pipe may bring them later than NATS the answer
        assert process.out[1:] == ["child 0"] * forks
        assert process.err == []
        assert client.stats()["reconnects"] == 0


# -- different windows, different sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "mixed"])
def test_two_clients_with_windows_of_16_and_of_100_000_are_served_exactly(
    server: NatsServer, subscriber: natsync.Subscriber, kind: str
) -> None:
    count = sized(4_000, 100_000)
    with (
        program(MANY, server.url, 3, kind, count, 16) as one,
        program(MANY, server.url, 3, kind, count, 100_000) as two,
    ):
        for process in (one, two):
            assert process.wait(PATIENCE * 2) == 0, process.err
            assert "complete, reconnects: 0" in process.out
    eventually(lambda: subscriber.stats()["processed"] == 6, PATIENCE)


def chunk_of(size: int, seed: int) -> bytes:
    """Bytes that are nowhere the same as those of another seed, or elsewhere in the chunk."""
    block = bytes((seed * 31 + index * 7 + (index >> 8)) & 0xFF for index in range(65_521))
    return (block * (size // len(block) + 1))[:size]


SHAPES: dict[str, Callable[[natsync.ResponseSender, list[bytes]], object]] = {
    "send": lambda sender, chunks: [sender.send(chunk) for chunk in chunks],
    "send_many": lambda sender, chunks: sender.send_many(chunks),
}


def answer(subscriber: natsync.Subscriber, shape: str, chunks: list[bytes]) -> None:
    """Have l.sizes answered with these chunks."""
    if shape == "generate":
        subscriber.stream_subscribe("l.sizes", lambda ctx, request: iter(chunks))
        return

    def handler(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        SHAPES[shape](sender, chunks)
        sender.end()

    subscriber.stream_subscribe("l.sizes", handler)


def assert_same(taken: list[bytes], sent: list[bytes]) -> None:
    assert list(map(len, taken)) == list(map(len, sent))
    assert all(one == other for one, other in zip(taken, sent, strict=True)), "not the bytes that were sent"


@pytest.mark.parametrize("window", [1, 8192])
@pytest.mark.parametrize("shape", [*SHAPES, "generate"])
def test_chunks_of_0_1_and_around_max_payload_bytes_arrive_as_they_are(
    server: NatsServer, subscriber: natsync.Subscriber, shape: str, window: int
) -> None:
    with natsync.connect(server.url) as client:
        most = client.server_info["max_payload"]
        sizes = (0, 1, most - 1, most, most + 1, 0, 2 * most, 1, most + 1)
        chunks = [chunk_of(size, seed) for seed, size in enumerate(sizes)]
        answer(subscriber, shape, chunks)
        assert_same(list(client.stream("l.sizes", window=window, timeout=PATIENCE)), chunks)
        assert client.stats()["reconnects"] == subscriber.stats()["connection"]["reconnects"] == 0


@pytest.mark.parametrize("shape", [*SHAPES, "generate"])
def test_a_chunk_of_50_mib_arrives_as_it_is(server: NatsServer, subscriber: natsync.Subscriber, shape: str) -> None:
    chunks = [b"before", chunk_of(50 << 20, 1), b"behind"]
    answer(subscriber, shape, chunks)
    with natsync.connect(server.url) as client:
        assert_same(list(client.stream("l.sizes", timeout=PATIENCE)), chunks)


@bounded(60, 120)
def test_several_chunks_of_50_mib_at_once_arrive_although_they_exceed_what_all_may_keep(
    server: NatsServer, subscriber: natsync.Subscriber
) -> None:
    """256 MiB is kept at most: six wait for the first ones to be taken."""
    chunks = [chunk_of(50 << 20, 2)]
    answer(subscriber, "send", chunks)
    with natsync.connect(server.url) as client:
        streams = [client.stream("l.sizes", timeout=PATIENCE) for _ in range(7)]
        for stream in streams:
            assert_same(list(stream), chunks)


def test_a_chunk_larger_than_all_that_may_be_kept_is_no_wait_for_ever(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The requester takes it by its max_message_bytes; the bound is made small here, or it would take 257 MiB."""
    arrived: list[natsync.ResponseSender] = []
    monkeypatch.setattr(Framing.__init__, "__defaults__", (4 << 20,))
    with natsync.Subscriber(server.url) as subscriber, natsync.connect(server.url) as client:
        subscriber.stream_subscribe("l.held", lambda ctx, request, sender: arrived.append(sender))
        stream = client.stream("l.held")
        eventually(lambda: arrived, PATIENCE)
        sending = Outcome(lambda: arrived[0].send(chunk_of(5 << 20, 3)))
        taking = Outcome(lambda: stream.next(PATIENCE))
        try:
            error = sending.within(PATIENCE)
            assert error is None or isinstance(error, natsync.MaxPayloadExceeded)
        finally:
            stream.close()
            taking.within(PATIENCE)


def test_a_chunk_beyond_max_message_bytes_is_refused_whole_and_the_stream_goes_on(
    server: NatsServer, subscriber: natsync.Subscriber
) -> None:
    arrived: list[natsync.ResponseSender] = []
    subscriber.stream_subscribe("l.held", lambda ctx, request, sender: arrived.append(sender))
    with natsync.connect(server.url, max_message_bytes=3 << 20) as client:
        stream = client.stream("l.held")
        eventually(lambda: arrived, PATIENCE)
        over = bytes((3 << 20) + 1)
        attempts: list[Callable[[], object]] = [
            lambda: arrived[0].send(over),
            lambda: arrived[0].try_send(over),
            lambda: arrived[0].send_many([b"a", over, b"b"]),
        ]
        for attempt in attempts:
            with pytest.raises(natsync.MaxPayloadExceeded):
                attempt()
        assert arrived[0].send_count == 0
        assert arrived[0].send(over[1:]) == 1
        arrived[0].send(b"behind")
        arrived[0].end()
        assert list(stream) == [over[1:], b"behind"]


# -- idle streams ----------------------------------------------------------------------------------------------------

# A client with streams that nothing comes on: python -c IDLE URL FEW MANY
IDLE = """
import gc, sys, threading, tracemalloc
import natsync
from natsync.testing import eventually
url, few, many = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
client = natsync.connect(url, heartbeat=0.3)


def opened(count):
    streams = []
    while len(streams) < count:  # a few at a time: what counts is how many there are in the end
        streams += [client.stream("l.idle") for _ in range(10)]
        for stream in streams[-10:]:
            assert stream.next(60) == b"first"
            assert stream.mode == "framed"
    return streams


streams = opened(few)
threads = threading.active_count()
gc.collect()
tracemalloc.start()
streams += opened(many)
gc.collect()
grown = tracemalloc.get_traced_memory()[0]
print("threads", threads, "and", threading.active_count(), flush=True)
tracemalloc.stop()
print("memory", grown // many, flush=True)
for stream in streams:
    assert list(stream) == [b"last"]
print("complete, reconnects:", client.stats()["reconnects"], flush=True)
client.close()
"""

#: Bytes that an idle stream may take on one side.
IDLE_BYTES = 12 << 10


@bounded(60, 300)
def test_idle_streams_take_no_threads_little_memory_and_one_question_a_heartbeat(server: NatsServer) -> None:
    few, many = 10, sized(1_000, 10_000)
    arrived: list[natsync.ResponseSender] = []

    def idle(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.send(b"first")
        arrived.append(sender)

    with natsync.Subscriber(server.url, heartbeat=0.3, max_streams=few + many) as subscriber:
        subscriber.stream_subscribe("l.idle", idle)
        with program(IDLE, server.url, few, many) as process:
            tracemalloc.start()
            try:
                process.wait_for_out("memory")
                gc.collect()
                mine = tracemalloc.get_traced_memory()[0] // len(arrived)
            finally:
                tracemalloc.stop()
            threads, more = map(int, re.findall(r"\d+", process.out[0]))
            theirs = int(process.out[1].split()[1])
            rate = messages_a_heartbeat(server, 0.3)
            print(f"{many} idle streams: {theirs} bytes each at the client, {mine} at the responder,")
            print(f"{more} threads at the client ({threads} with {few}), {rate:.1f} messages a heartbeat")
            assert more <= threads
            assert rate <= 6
            assert theirs <= IDLE_BYTES
            assert mine <= IDLE_BYTES
            for sender in arrived:
                sender.send(b"last")
                sender.end()
            assert process.wait(PATIENCE * 2) == 0, process.err
            assert "complete, reconnects: 0" in process.out
            assert subscriber.stats()["cancelled"] == 0


def messages_a_heartbeat(server: NatsServer, heartbeat: float, beats: int = 5) -> float:
    """What the inboxes of all get in a while, once what is still to be confirmed is."""
    with RawClient(server.url) as tap:
        tap.subscribe("_INBOX.>")
        tap.flush()
        until = time.monotonic() + PATIENCE
        while (count := _count(tap, 2 * heartbeat)) > 50:  # the last accounts
            assert time.monotonic() < until, f"{count} messages in {2 * heartbeat} s"
        return _count(tap, beats * heartbeat) / beats


def _count(tap: RawClient, seconds: float) -> int:
    count, until = 0, time.monotonic() + seconds
    with contextlib.suppress(TimeoutError):
        while True:
            tap.next(max(0.0, until - time.monotonic()))
            count += 1
    return count


def test_a_thousand_streams_that_come_and_go_leave_nothing_behind(
    server: NatsServer, subscriber: natsync.Subscriber
) -> None:
    with natsync.connect(server.url) as client:

        def rounds(count: int) -> None:
            for _ in range(count):
                streams = [client.stream("n.generate", "plain 3") for _ in range(20)]
                for index, stream in enumerate(streams):
                    if index % 4 == 3:
                        stream.close()
                    else:
                        assert list(stream) == [b"1", b"2", b"3"]

        rounds(5)
        core, responder = client._connection(), subscriber._responder
        assert responder is not None
        framing = responder._framing
        rounds(sized(50, 500))
        eventually(lambda: (len(framing), len(framing.peers), len(framing._waiting)) == (0, 0, 0), PATIENCE)
        eventually(lambda: not len(core.mux), PATIENCE)
        calls = client._calls
        assert calls is not None
        eventually(lambda: not calls._farewells, PATIENCE)
        assert (client._calls.budget._given, client._calls.budget._streams) == (0, 0)
        assert responder.streams == 0


# -- clocks ----------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_by_an_hour_disturbs_no_stream(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    true_time, jumps = time.time, iter(range(10**9))

    def jumping() -> float:
        return true_time() + (3600.0 if next(jumps) % 2 else -3600.0)

    count = 5000
    with FaultProxy(server.url) as proxy, natsync.Subscriber(server.url, heartbeat=0.2, **QUICK) as subscriber:
        serve(subscriber)
        with natsync.connect(proxy.url, heartbeat=0.2, **QUICK) as client:
            pace = Pace(count // 3)
            taking = [
                Taking(client.stream("n.send", f"plain {count}", window=200, timeout=PATIENCE), pace=pace)
                for _ in range(3)
            ]
            for one in taking:
                one.reach(count // 3)
            monkeypatch.setattr(time, "time", jumping)
            monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
            time.sleep(0.5)  # some heartbeats pass
            assert all(one.running for one in taking)
            pace.allowed = 2 * count // 3
            for one in taking:
                one.reach(2 * count // 3)
            proxy.reset()
            pace.allowed = float("inf")
            for one in taking:
                assert one.within() is None
                assert one.number == count
        assert subscriber.stats()["cancelled"] == 0
