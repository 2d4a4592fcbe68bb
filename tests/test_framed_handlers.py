"""Handlers of framed streams: credit, what wakes them, what they pass on, where they go on, how they are drained.

Both sides are natsync's, over a real nats-server; what raw peers show of the same is in test_framed_responder.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import tenacity

import natsync
from broker import QUICK, SLACK, Events, Outcome
from framed import Held
from interrupting import moments
from natsync.streaming.framed_sender import FramedSender
from natsync.streaming.sender import Ending
from natsync.streaming.window import GIVEN_BYTES, Outgoing
from natsync.testing import FaultProxy, NatsCluster, NatsServer, eventually
from numbered import PATIENCE, Pace, Taking, plain, send, serve, sized
from processes import Child, child

MakeServer = Callable[..., NatsServer]

#: Options that shorten how long the other side is waited for.
SHORT: dict[str, Any] = {"resume_grace": 0.5, "heartbeat": 0.5}


@pytest.fixture
def client(nats_server: NatsServer) -> Iterator[natsync.Client]:
    with natsync.connect(nats_server.url, **QUICK) as client:
        yield client


@pytest.fixture
def subscriber(nats_server: NatsServer) -> Iterator[natsync.Subscriber]:
    with natsync.Subscriber(nats_server.url, **QUICK) as subscriber:
        yield subscriber


@pytest.fixture
def held(nats_server: NatsServer) -> Iterator[Held]:
    """A registration whose senders are left to the test."""
    held = Held(nats_server.url, **QUICK)
    yield held
    for _, _, sender in held.arrived:
        sender.end()
    held.subscriber.close()


def filled(sender: natsync.ResponseSender) -> int:
    """Send numbered chunks until there is no credit; how many."""
    while sender.try_send(plain(sender.send_count + 1)):
        assert sender.send_count < 100_000
    return sender.send_count


def waits(sender: natsync.ResponseSender) -> bool:
    """Whether a send() waits for credit."""
    core = sender._core
    assert isinstance(core, FramedSender)
    return core._waiting > 0


def blocked(sender: natsync.ResponseSender) -> Outcome:
    """A send() that waits for credit."""
    sending = Outcome(lambda: sender.send(b"one too many"))
    eventually(lambda: waits(sender), PATIENCE)
    return sending


# -- sending -----------------------------------------------------------------------------------------------------------


def test_a_chunk_that_found_no_credit_in_time_is_not_sent_later_either(client: natsync.Client, held: Held) -> None:
    stream = client.stream(held.subject, window=4)
    assert filled(held.sender) == 4
    began = time.monotonic()
    with pytest.raises(natsync.TimedOut) as caught:
        held.sender.send(b"late", timeout=0.1)
    assert type(caught.value) is natsync.TimedOut
    assert 0.09 <= time.monotonic() - began < 0.1 + SLACK
    assert held.sender.try_send(b"late") is False
    assert held.sender.send_count == 4
    assert [next(stream) for _ in range(4)] == [plain(number) for number in range(1, 5)]
    taking = Outcome(lambda: list(stream))
    assert held.sender.send(b"5", timeout=PATIENCE) == 5
    held.sender.end()
    assert taking.within(PATIENCE) is None
    assert taking.value == [b"5"]


@pytest.mark.parametrize("size", [4 * GIVEN_BYTES, 128 << 10])
def test_no_chunk_is_larger_than_the_requester_takes_be_it_the_first_or_a_later_one(
    nats_server: NatsServer, held: Held, size: int
) -> None:
    with natsync.connect(nats_server.url, max_message_bytes=size, **QUICK) as client:
        stream, sender = client.stream(held.subject), held.sender
        for number in range(3):
            with pytest.raises(natsync.MaxPayloadExceeded):
                sender.send(b"x" * (size + 1))
            assert sender.send(b"x" * (size // 2)) == number + 1
        with pytest.raises(natsync.MaxPayloadExceeded):
            sender.send_many([b"", b"x" * (size + 1)])
        sender.end()
        assert list(stream) == [b"x" * (size // 2)] * 3


def outcome_of(stream: natsync.Stream) -> tuple[list[bytes], Exception | None]:
    """What came, and with which error it ended."""
    taken: list[bytes] = []
    try:
        taken.extend(stream)
    except natsync.StreamError as error:
        return taken, error
    return taken, None


@pytest.mark.parametrize("most", [1000, 10_000])
def test_nothing_that_is_sent_is_larger_than_the_requester_takes(
    nats_server: NatsServer, subscriber: natsync.Subscriber, most: int
) -> None:
    """It would cost it its link. Here are batches, fragments, headers, a chunk too large, errors with details."""
    small, large = [b"x" * 100] * 3000, b"y" * most

    def headers(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.set_header("Long", "h" * (most // 2))
        sender.send(large)
        with pytest.raises(natsync.MaxPayloadExceeded):
            sender.end(trailers={"Long": "t" * most})
        sender.end()

    def fails(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.send_error("z" * 2 * most, code=9, details="d" * most)

    subscriber.stream_subscribe("framed.small", lambda ctx, request: iter(small))
    subscriber.stream_subscribe("framed.too.large", lambda ctx, request: iter([*small, large + b"y"]))
    subscriber.stream_subscribe("framed.headers", headers)
    subscriber.stream_subscribe("framed.fails", fails)
    subscriber.open()
    with natsync.connect(nats_server.url, max_message_bytes=most, **QUICK) as client:
        assert outcome_of(client.stream("framed.small", timeout=PATIENCE)) == (small, None)
        taken, error = outcome_of(client.stream("framed.too.large", timeout=PATIENCE))
        assert taken == small
        assert isinstance(error, natsync.HandlerError)
        assert str(most + 1) in str(error)
        assert outcome_of(client.stream("framed.headers", timeout=PATIENCE)) == ([large], None)
        taken, error = outcome_of(client.stream("framed.fails", timeout=PATIENCE))
        assert isinstance(error, natsync.HandlerError)
        assert "z" * (most // 2) in str(error)
        assert client.stats()["reconnects"] == 0


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns every few instructions."""
    former = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(former)


@pytest.mark.usefixtures("restless")
def test_the_numbers_are_those_of_the_places_also_when_a_second_thread_joins_in(
    client: natsync.Client, held: Held
) -> None:
    """One thread alone gives its chunks without a lock; the second one may come between any two steps of that."""
    for delay in range(30):
        stream = client.stream(held.subject)
        sender, sent = held.take(delay)[2], dict[int, bytes]()

        def give(name: str, wait: int, into: dict[int, bytes], sender: natsync.ResponseSender = sender) -> None:
            eventually(lambda: sender.send_count >= wait, PATIENCE)
            for number in range(300):
                chunk = b"%b %d" % (name.encode(), number)
                into[sender.send(chunk)] = chunk

        theirs: dict[int, bytes] = {}
        other = Outcome(lambda wait=delay, into=theirs: give("second", wait, into))  # type: ignore[misc]
        give("first", 0, sent)
        assert other.within(PATIENCE) is None
        sender.end()
        assert not sent.keys() & theirs.keys()
        assert list(stream) == [chunk for _, chunk in sorted((sent | theirs).items())]


def test_an_interrupt_at_any_moment_of_send_loses_and_doubles_nothing_and_shifts_no_number(
    client: natsync.Client, held: Held
) -> None:
    stream, sender = client.stream(held.subject), held.sender
    sender.send(b"0")
    taking = Outcome(lambda: list(stream))
    begun, done = 1, {1: b"0"}

    def send_three() -> None:
        nonlocal begun
        for size in (1, 1, 2 * GIVEN_BYTES):
            chunk = b"%d " % begun + b"x" * size
            begun += 1
            done[sender.send(chunk)] = chunk

    inside = (
        natsync.ResponseSender.send,
        FramedSender.send,
        FramedSender.gave,
        FramedSender.see_to_it,
        FramedSender._push_locked,
        Outgoing.push,
        Outgoing._pushing,
        Outgoing.take_in,
        Outgoing.takes,
        Outgoing._allot,
        Outgoing.watch,
        Outgoing.was_taken,
    )
    for sweep in range(20):  # where they fall depends on what the writer and the reader have done meanwhile
        for _ in range(sweep):
            send_three()
        assert sum(1 for _ in moments(send_three, *inside)) > 20
        send_three()
    done[sender.send(b"last")] = b"last"
    assert sender.end(wait=PATIENCE)
    assert taking.within(PATIENCE) is None
    chunks: Any = taking.value
    assert sender.send_count == len(chunks)
    assert {number: chunks[number - 1] for number in done} == done
    order = [int(chunk.split()[0]) for chunk in chunks[:-1]]
    assert order == sorted(set(order))


def test_send_many_beyond_the_window_waits_and_its_timeout_leaves_what_was_queued(
    client: natsync.Client, held: Held
) -> None:
    stream = client.stream(held.subject, window=8)
    with pytest.raises(natsync.TimedOut):
        held.sender.send_many(map(plain, range(1, 101)), timeout=0.1)
    assert held.sender.send_count == 8
    sending = Outcome(lambda: held.sender.send_many(map(plain, range(9, 101))))
    taking = Taking(stream)
    assert sending.within(PATIENCE) is None
    assert sending.value == 100
    held.sender.end()
    assert taking.within() is None
    assert taking.number == 100


WAKING: dict[str, tuple[Callable[[Any], object], type[Exception]]] = {
    "cancel": (lambda scene: scene.stream.cancel("enough"), natsync.StreamCancelled),
    "end of the block": (lambda scene: scene.stream.close(), natsync.StreamCancelled),
    "deadline": (lambda scene: None, natsync.DeadlineExceeded),
    "loss of the client": (lambda scene: scene.proxy.hang() or scene.proxy.reset(), natsync.ClientLost),
    "close of the client": (lambda scene: scene.client.close(), natsync.StreamClosed),
    "close of the subscriber": (lambda scene: scene.held.subscriber.close(0.1), natsync.StreamClosed),
    "end of the registration": (lambda scene: scene.held.handle.ctx.cancel("enough"), natsync.StreamClosed),
    "end() in another thread": (lambda scene: scene.held.sender.end(), natsync.StreamClosed),
    "an error in another thread": (lambda scene: scene.held.sender.send_error("wrong"), natsync.StreamClosed),
}


class Scene:
    """A stream without credit, whose client has a link that can be broken."""

    def __init__(self, stack: ExitStack, url: str, timeout: float | None) -> None:
        self.proxy = stack.enter_context(FaultProxy(url))
        self.held = Held(url, **SHORT, **QUICK)
        stack.callback(self.held.subscriber.close, 1.0)
        self.client = stack.enter_context(natsync.connect(self.proxy.url, **SHORT, **QUICK))
        stack.callback(self.proxy.forward)
        self.stream = self.client.stream(self.held.subject, window=4, timeout=timeout)
        filled(self.held.sender)


@pytest.mark.parametrize("verb", ["send", "send_many", "large"])
@pytest.mark.parametrize("how", WAKING)
def test_a_blocked_send_is_woken_and_told_why_by(nats_server: NatsServer, how: str, verb: str) -> None:
    wake, kind = WAKING[how]
    with ExitStack() as stack:
        scene = Scene(stack, nats_server.url, 3.0 if how == "deadline" else None)
        sender = scene.held.sender
        calls: dict[str, Callable[[], object]] = {
            "send": lambda: sender.send(b"x"),
            "send_many": lambda: sender.send_many([b"x"] * 10),
            "large": lambda: sender.send(bytes(1 << 20)),
        }
        sending = Outcome(calls[verb])
        eventually(lambda: waits(sender), PATIENCE)
        wake(scene)
        error = sending.within(PATIENCE)
        assert isinstance(error, kind)
        assert isinstance(error, natsync.StreamClosed)
        assert error.last_seq == sender.send_count == 4
        assert sender.is_closed()
        scene.stream.close()


def test_chunks_of_eight_threads_have_numbers_of_their_own_and_keep_each_threads_order(
    client: natsync.Client, held: Held
) -> None:
    each = 1000
    stream = client.stream(held.subject, window=50)
    sender = held.sender
    numbers: dict[int, list[int]] = defaultdict(list)

    def share(index: int) -> None:
        for number in range(each):
            if number % 3:
                numbers[index].append(sender.send(b"%d %d" % (index, number)))
            elif number % 2:
                numbers[index].append(sender.send_many([b"%d %d" % (index, number)]))
            else:
                while not sender.try_send(b"%d %d" % (index, number)):
                    time.sleep(0.0005)

    sending = [Outcome(lambda index=index: share(index)) for index in range(8)]  # type: ignore[misc]
    taken = Outcome(lambda: list(stream))
    for one in sending:
        assert one.within(PATIENCE) is None
    sender.end()
    assert taken.within(PATIENCE) is None
    chunks = taken.value
    assert isinstance(chunks, list)
    assert len(chunks) == 8 * each
    places: dict[int, list[int]] = defaultdict(list)
    for chunk in chunks:
        index, number = map(int, chunk.split())
        places[index].append(number)
    assert all(places[index] == list(range(each)) for index in range(8))
    for index, told in numbers.items():
        for number in told:
            assert chunks[number - 1].split()[0] == b"%d" % index, "a number that another thread's chunk has"
    assert len({number for told in numbers.values() for number in told}) == sum(map(len, numbers.values()))


def test_end_with_wait_is_true_only_once_the_consumers_process_has_everything(
    nats_server: NatsServer, held: Held
) -> None:
    with FaultProxy(nats_server.url) as proxy, natsync.connect(proxy.url, **QUICK) as client:
        stream = client.stream(held.subject)
        held.sender.send(b"1")
        assert stream.next(PATIENCE) == b"1"
        proxy.down.stall()
        held.sender.send(b"2")
        assert held.sender.end(wait=0.2) is False
        proxy.down.resume()
        assert held.sender.end(wait=PATIENCE) is True
        assert list(stream) == [b"2"]


def test_end_with_wait_is_woken_by_a_cancel(nats_server: NatsServer, held: Held) -> None:
    with FaultProxy(nats_server.url) as proxy, natsync.connect(proxy.url, **QUICK) as client:
        stream = client.stream(held.subject)
        held.sender.send(b"1")
        assert stream.next(PATIENCE) == b"1"
        proxy.down.stall()
        held.sender.send(b"2")
        ending = Outcome(lambda: held.sender.end(wait=PATIENCE))
        eventually(held.sender.is_closed, PATIENCE)
        stream.close()
        assert ending.within(SLACK) is None
        assert ending.value is False
        proxy.down.resume()


def test_headers_trailers_and_details_come_with_large_chunks_too(client: natsync.Client, held: Held) -> None:
    stream = client.stream(held.subject, window=3)
    sender = held.sender
    sender.set_header("X-First", "yes")
    sender.send(bytes(3 << 20))
    with pytest.raises(ValueError, match="first chunk"):
        sender.set_header("X-Late", "no")
    sender.end(trailers={"X-Last": "too"})
    assert len(stream.next(PATIENCE)) == 3 << 20
    assert list(stream) == []
    assert stream.headers["X-First"] == "yes"
    assert stream.trailers["X-Last"] == "too"
    assert "X-Late" not in stream.headers


def test_an_error_behind_chunks_that_wait_for_credit_comes_behind_them_with_code_and_details(
    client: natsync.Client, held: Held
) -> None:
    stream = client.stream(held.subject, window=2)
    held.sender.send(b"1")
    held.sender.send(bytes(3 << 20))
    held.sender.send_error("wrong", code=natsync.Code.DATA_LOSS, details={"disk": 3})
    assert stream.next(PATIENCE) == b"1"
    assert len(stream.next(PATIENCE)) == 3 << 20
    with pytest.raises(natsync.HandlerError) as caught:
        stream.next(PATIENCE)
    error = caught.value
    assert (error.message, error.code, error.details, error.last_seq) == ("wrong", 15, {"disk": 3}, 2)


def test_a_generator_that_waits_for_credit_is_closed_in_its_own_thread_after_a_cancel(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    threads: list[threading.Thread] = []
    reached = 0

    def generate(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        nonlocal reached
        threads.append(threading.current_thread())
        try:
            for reached in range(1, 10_000):
                yield plain(reached)
        finally:
            threads.append(threading.current_thread())

    subscriber.stream_subscribe("h.generate", generate)
    with client.stream("h.generate", window=10) as stream:
        assert stream.next(PATIENCE) == b"1"
        eventually(lambda: reached >= 11, PATIENCE)
    eventually(lambda: len(threads) == 2, PATIENCE)
    assert threads[0] is threads[1]
    assert reached < 100


def test_a_stream_too_many_is_refused_at_once_while_the_others_wait_for_credit(nats_server: NatsServer) -> None:
    held = Held(nats_server.url, max_streams=3)
    with natsync.connect(nats_server.url) as client:
        streams = [client.stream(held.subject, window=4) for _ in range(3)]
        held.take(2)
        assert [filled(sender) for _, _, sender in held.arrived] == [4, 4, 4]
        sending = [blocked(sender) for _, _, sender in held.arrived]
        began = time.monotonic()
        with pytest.raises(natsync.StreamRefused) as caught:
            client.stream(held.subject).next(PATIENCE)
        assert time.monotonic() - began < 5
        assert caught.value.retry_after is not None
        assert caught.value.retry_after > 0
        assert all(one.running for one in sending)
        for stream in streams:
            assert [stream.next(PATIENCE) for _ in range(5)] == [b"1", b"2", b"3", b"4", b"one too many"]
        for _, _, sender in held.arrived:
            sender.end()
        assert [list(stream) for stream in streams] == [[], [], []]
    held.subscriber.close()


# -- trying again ------------------------------------------------------------------------------------------------------

# A responder that counts to what it is asked for, behind its cursor: python -c COUNTING URL
COUNTING = """
import sys, threading
import natsync
subscriber = natsync.Subscriber(sys.argv[1], resume_grace=0.5, heartbeat=0.5)


def count(ctx, request):
    first = (ctx.resume_cursor or 0) + 1
    print("from", first, "attempt", ctx.attempt, flush=True)
    for number in range(first, int(request.data) + 1):
        yield b"%d" % number


def silent(ctx, request):
    print("asked", flush=True)
    if ctx.attempt == 0:
        ctx.wait()
    yield b"attempt %d" % ctx.attempt


subscriber.stream_subscribe("h.count", count, queue="h")
subscriber.stream_subscribe("h.silent", silent, queue="h")
print("serving", flush=True)
threading.Event().wait()
"""


@contextlib.contextmanager
def members(url: str, count: int = 2) -> Iterator[list[Child]]:
    """Processes of a queue group, each with the handlers of COUNTING."""
    with ExitStack() as stack:
        found = [
            stack.enter_context(
                child(sys.executable, "-c", COUNTING, url, env={"PYTHONPATH": os.path.dirname(__file__)})
            )
            for _ in range(count)
        ]
        for one in found:
            one.wait_for_out("serving")
        yield found


def asked(processes: list[Child]) -> Child:
    """The one that was asked, of those that were not killed."""
    alive = [one for one in processes if one.process.poll() is None]
    eventually(lambda: any(len(one.out) > 1 for one in alive), PATIENCE)
    return next(one for one in alive if len(one.out) > 1)


def kill(process: Child) -> None:
    process.send(signal.SIGKILL)
    process.process.wait()


AGAIN = natsync.Retry(attempts=10, initial=0.05, maximum=0.2, resumable=True)


@pytest.mark.slow
def test_a_resumable_stream_goes_on_behind_its_cursor_at_the_other_members_each_chunk_once(
    nats_server: NatsServer,
) -> None:
    count = sized(20_000, 300_000)
    with (
        members(nats_server.url, 3) as processes,
        natsync.connect(nats_server.url, **SHORT, **QUICK) as client,
    ):
        pace = Pace(count // 3)
        taking = Taking(client.stream("h.count", str(count), retry=AGAIN, window=100), pace=pace)
        first = asked(processes)
        taking.reach(count // 3)
        kill(first)
        pace.allowed = 2 * count // 3
        taking.reach(2 * count // 3)
        second = asked(processes)
        kill(second)
        pace.allowed = float("inf")
        assert taking.within() is None
        assert taking.number == count
        third = asked(processes)
        begun = [re.findall(r"\d+", one.out[1]) for one in (first, second, third)]
        assert [one.out[1].split()[3] for one in (first, second, third)] == ["0", "1", "2"]
        assert begun[0][0] == "1"
        assert count // 3 < int(begun[1][0]) <= count // 3 + 102
        assert 2 * count // 3 < int(begun[2][0]) <= 2 * count // 3 + 102


@pytest.mark.slow
@pytest.mark.parametrize(
    "retry",
    [
        None,
        natsync.Retry(attempts=10, initial=0.05),
        natsync.Retry(attempts=10, initial=0.05, idempotent=True),
        tenacity.Retrying(stop=tenacity.stop_after_attempt(10), wait=tenacity.wait_fixed(0.05)),
    ],
    ids=["none", "Retry", "idempotent", "tenacity"],
)
def test_a_stream_that_is_not_resumable_is_never_repeated_after_a_chunk(nats_server: NatsServer, retry: Any) -> None:
    with members(nats_server.url) as processes, natsync.connect(nats_server.url, **SHORT, **QUICK) as client:
        pace = Pace(50)
        taking = Taking(client.stream("h.count", "1000000", retry=retry, window=100), pace=pace)
        taking.reach(50)
        kill(asked(processes))
        pace.allowed = float("inf")
        error = taking.within()
        assert isinstance(error, natsync.ServerLost)
        assert error.last_seq == taking.number >= 50
        assert [one.out for one in processes if one.process.poll() is None] == [["serving"]]


@pytest.mark.slow
@pytest.mark.parametrize("idempotent", [True, False])
def test_a_stream_whose_responder_dies_before_the_first_chunk_is_repeated_only_if_it_is_idempotent(
    nats_server: NatsServer, idempotent: bool
) -> None:
    retry = natsync.Retry(attempts=10, initial=0.05, idempotent=idempotent)
    with members(nats_server.url) as processes, natsync.connect(nats_server.url, **SHORT, **QUICK) as client:
        stream = client.stream("h.silent", retry=retry)
        taking = Outcome(lambda: list(stream))
        eventually(lambda: stream.mode == "framed", PATIENCE)  # of one that dies before it accepts, nothing is known
        kill(asked(processes))
        error = taking.within(PATIENCE)
        if idempotent:
            assert error is None
            assert taking.value == [b"attempt 1"]
        else:
            assert isinstance(error, natsync.ServerLost)
            assert [one.out for one in processes if one.process.poll() is None] == [["serving"]]


def test_a_drained_member_hands_a_resumable_stream_on(nats_server: NatsServer) -> None:
    cursors: list[tuple[int, int | None]] = []

    def count(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        cursors.append((ctx.attempt, ctx.resume_cursor))
        for number in range((ctx.resume_cursor or 0) + 1, 2001):
            yield plain(number)

    with ExitStack() as stack:
        one, two = (stack.enter_context(natsync.Subscriber(nats_server.url, **QUICK)) for _ in range(2))
        one.stream_subscribe("h.moving", count, queue="h")
        client = stack.enter_context(natsync.connect(nats_server.url, **QUICK))
        pace = Pace(500)
        taking = Taking(client.stream("h.moving", retry=AGAIN, window=50), pace=pace)
        taking.reach(500)
        two.stream_subscribe("h.moving", count, queue="h")
        draining = Outcome(lambda: one.drain(0.1))
        eventually(lambda: one.stats()["active"] == 0, PATIENCE)
        pace.allowed = float("inf")
        assert taking.within() is None
        assert taking.number == 2000
        assert isinstance(draining.within(PATIENCE), natsync.DrainTimeout)
        assert cursors[0] == (0, None)
        assert cursors[1][0] == 1
        assert 500 <= (cursors[1][1] or 0) <= 551


# -- draining ----------------------------------------------------------------------------------------------------------


def test_drain_lets_streams_finish_ends_others_with_code_14_and_loses_no_request(nats_server: NatsServer) -> None:
    """Two members of a queue group; requests come all the time while one of them is drained."""
    finish = threading.Event()
    seen: list[bool] = []

    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.send(b"1")
        if request.data == b"short":
            finish.wait(PATIENCE)
            seen.append(ctx.draining)
        elif request.data == b"long":
            ctx.wait()
            return
        sender.send(b"2")
        sender.end()

    with ExitStack() as stack:
        one, two = (stack.enter_context(natsync.Subscriber(nats_server.url, **QUICK)) for _ in range(2))
        client = stack.enter_context(natsync.connect(nats_server.url, **QUICK))
        one.stream_subscribe("h.drained", handler, queue="h")
        short = [client.stream("h.drained", "short") for _ in range(10)]
        long = [client.stream("h.drained", "long") for _ in range(10)]
        for stream in (*short, *long):
            assert stream.next(PATIENCE) == b"1"
        two.stream_subscribe("h.drained", handler, queue="h")
        stop = threading.Event()
        asked = [0] * 4

        def ask(index: int) -> None:
            while not stop.is_set():
                assert list(client.stream("h.drained", "quick")) == [b"1", b"2"]
                asked[index] += 1

        asking = [Outcome(lambda index=index: ask(index)) for index in range(4)]  # type: ignore[misc]
        eventually(lambda: all(asked), PATIENCE)
        draining = Outcome(lambda: one.drain(3.0))
        eventually(lambda: one._responder is not None and one._responder.draining, PATIENCE)
        finish.set()
        for stream in short:
            assert list(stream) == [b"2"]
        for stream in long:
            with pytest.raises(natsync.ServerLost) as caught:
                stream.next(PATIENCE)
            assert (caught.value.code, caught.value.last_seq) == (14, 1)
        error = draining.within(PATIENCE)
        assert isinstance(error, natsync.DrainTimeout)
        done = sum(asked)
        eventually(lambda: sum(asked) > done + 20, PATIENCE)
        stop.set()
        for outcome in asking:
            assert outcome.within(PATIENCE) is None
        assert seen == [True] * 10
        stats = one.stats()
        assert (stats["dropped"], stats["received"]) == (0, stats["processed"] + 10)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.1], ids=["fast", "slow link"])
def test_nothing_is_lost_of_streams_that_end_as_their_subscriber_closes(nats_server: NatsServer, delay: float) -> None:
    """Handlers that return, generators, and threads of their own; each round another subscriber."""
    rounds, count = (sized(1, 40), 40) if delay else (sized(10, 400), 200)
    with natsync.connect(nats_server.url, **SHORT) as client, FaultProxy(nats_server.url) as proxy:
        for direction in (proxy.up, proxy.down):
            direction.delay(delay)
        for _ in range(rounds):
            subscriber = natsync.Subscriber(proxy.url)
            subscriber.stream_subscribe("h.closing", on_a_thread)
            serve(subscriber)
            taking = [
                Taking(client.stream(subject, f"plain {count}", window=20))
                for subject in ("h.closing", "n.send", "n.send_many", "n.generate") * 3
            ]
            client.flush()
            subscriber.close()
            for one in taking:
                assert one.within() is None
                assert one.number == count


def on_a_thread(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
    """Returns at once; a thread of its own sends."""
    threading.Thread(target=send, args=(ctx, request, sender), daemon=True).start()


def test_an_end_that_is_about_to_be_queued_when_the_subscriber_closes_is_not_lost(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of the handler's own is within end(), and has no time just then."""
    put_end, closing = FramedSender._put_end, threading.Event()

    def late(core: FramedSender, ending: Ending) -> None:
        assert closing.wait(PATIENCE)
        time.sleep(0.2)  # close() goes as far as it can meanwhile; it must wait for this
        put_end(core, ending)

    monkeypatch.setattr(FramedSender, "_put_end", late)
    held = Held(nats_server.url)
    with natsync.connect(nats_server.url, **SHORT) as client:
        stream = client.stream(held.subject)
        held.sender.send(b"1")
        ending = Outcome(held.sender.end)
        assert held.sender.closed.wait(PATIENCE)
        closing.set()
        held.subscriber.close()
        assert ending.within(PATIENCE) is None
        assert list(stream) == [b"1"]


# -- leaving a server --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("side", ["client", "responder"])
def test_a_stream_is_exact_while_a_side_leaves_a_lame_duck(side: str) -> None:
    count = sized(20_000, 200_000)
    events = Events()
    with NatsCluster(2, lame_duck_grace_period=6.0) as nodes, ExitStack() as stack:
        here, there = (nodes.urls[0], nodes.urls[1]) if side == "client" else (nodes.urls[1], nodes.urls[0])
        told: dict[str, Any] = {"on_event": events}
        subscriber = stack.enter_context(
            natsync.Subscriber(there, discover=side == "responder", **(told if side == "responder" else {}), **QUICK)
        )
        serve(subscriber)
        client = stack.enter_context(
            natsync.connect(here, discover=side == "client", **(told if side == "client" else {}), **QUICK)
        )
        eventually(lambda: heard(client), PATIENCE)
        pace = Pace(count // 4)
        taking = [
            Taking(client.stream(f"n.{shape}", f"plain {count}", window=window), pace=pace)
            for shape, window in (("send", 100), ("send_many", 8192), ("generate", 1000))
        ]
        for one in taking:
            one.reach(count // 4)
        nodes.lame_duck(0)
        events.wait("lame_duck")
        # In the middle of the move too: there is always something on its way.
        while "reconnected" not in events.names:
            pace.allowed = min(pace.allowed + 20, 3 * count // 4)
            time.sleep(0.002)
            assert all(one.running for one in taking)
        pace.allowed = float("inf")
        for one in taking:
            assert one.within() is None
            assert one.number == count
        assert "disconnected" not in events.names
        assert subscriber.stats()["cancelled"] == 0
        nodes.kill(0)


def heard(client: natsync.Client) -> bool:
    try:
        return list(client.stream("n.send", "plain 1")) == [b"1"]
    except natsync.NoRespondersError:
        return False


# -- calls within handlers ---------------------------------------------------------------------------------------------

TRACE = {
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": "rojo=00f067aa0ba902b7",
    "baggage": "user=7",
}


class Nested:
    """Two handlers; the outer one makes a call, by a client, and the inner one notes what it is told."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        self.client = stack.enter_context(natsync.connect(url, **QUICK))
        self.subscriber = stack.enter_context(natsync.Subscriber(url, **QUICK))
        self.outer: list[natsync.HandlerContext] = []
        self.inner: list[natsync.HandlerContext] = []
        self.published: list[natsync.Message] = []
        self.errors: list[BaseException] = []
        self.over = threading.Event()
        self.call: Callable[[natsync.HandlerContext], object] = lambda ctx: None
        self.subscriber.stream_subscribe("h.outer", self._outer)
        self.subscriber.stream_subscribe("h.inner", self._inner)
        self.subscriber.handler("h.inner.request")(self._inner_request)
        self.subscriber.handler("h.outer.request")(self._outer_request)
        self.subscriber.subscribe("h.inner.publish", self.published.append)

    def _outer(self, ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        self.outer.append(ctx)
        yield b"begun"
        self._make_call(ctx)

    def _outer_request(self, ctx: natsync.HandlerContext, request: natsync.Message) -> None:
        self.outer.append(ctx)
        self._make_call(ctx)

    def _make_call(self, ctx: natsync.HandlerContext) -> None:
        try:
            self.call(ctx)
        except BaseException as error:
            self.errors.append(error)
            raise

    def _inner(self, ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        self.inner.append(ctx)
        yield b"begun"
        if request.data == b"wait":
            ctx.wait()

    def _inner_request(self, ctx: natsync.HandlerContext, request: natsync.Message) -> str:
        self.inner.append(ctx)
        if request.data == b"wait":
            ctx.wait()
            if ctx.reason == "deadline exceeded":  # which is the outer one's, too: this is not to be sooner
                self.over.wait(PATIENCE)
        return "done"


@pytest.fixture
def nested(nats_server: NatsServer) -> Iterator[Nested]:
    with ExitStack() as stack:
        nested = Nested(nats_server.url, stack)
        yield nested
        nested.over.set()


CALLS: dict[str, Callable[..., object]] = {
    "request": lambda client, **options: client.request("h.inner.request", **options),
    "stream": lambda client, **options: list(client.stream("h.inner", **options)),
    "stream_request": lambda client, **options: client.stream_request("h.inner", b"", lambda message: None, **options),
}


@pytest.mark.parametrize("outer", ["stream", "request"])
@pytest.mark.parametrize("verb", CALLS)
def test_a_call_in_a_handler_passes_the_trace_on(nested: Nested, verb: str, outer: str) -> None:
    nested.call = lambda ctx: CALLS[verb](nested.client)
    if outer == "stream":
        assert list(nested.client.stream("h.outer", headers={**TRACE, "X-Own": "1"}, timeout=PATIENCE)) == [b"begun"]
    else:
        nested.client.request("h.outer.request", headers={**TRACE, "X-Own": "1"}, timeout=PATIENCE)
    (inner,) = nested.inner
    assert {key: inner.metadata.get(key) for key in TRACE} == TRACE
    assert "X-Own" not in inner.metadata


def test_a_message_published_in_a_handler_passes_the_trace_on(nested: Nested) -> None:
    nested.call = lambda ctx: nested.client.publish("h.inner.publish", b"x", headers={"X-Own": "1"})
    assert list(nested.client.stream("h.outer", headers=TRACE, timeout=PATIENCE)) == [b"begun"]
    eventually(lambda: nested.published, PATIENCE)
    assert dict(nested.published[0].headers) == {"X-Own": "1", **TRACE}


@pytest.mark.parametrize("verb", ["stream", "stream_request"])
def test_a_call_in_a_handler_has_its_requests_deadline(nested: Nested, verb: str) -> None:
    nested.call = lambda ctx: CALLS[verb](nested.client)
    assert list(nested.client.stream("h.outer", timeout=PATIENCE)) == [b"begun"]
    assert nested.outer[0].deadline is not None
    assert nested.inner[0].deadline is not None
    assert abs(nested.inner[0].deadline - nested.outer[0].deadline) < 1.0


def test_a_call_in_a_handler_may_have_less_time_but_not_more(nested: Nested) -> None:
    nested.call = lambda ctx: [list(nested.client.stream("h.inner", timeout=seconds)) for seconds in (5.0, 500.0)]
    assert list(nested.client.stream("h.outer", timeout=PATIENCE)) == [b"begun"]
    less, more = nested.inner
    assert less.deadline is not None
    assert more.deadline is not None
    outer = nested.outer[0].deadline
    assert outer is not None
    assert less.deadline < outer - PATIENCE / 2
    assert abs(more.deadline - outer) < 1.0


@pytest.mark.parametrize("verb", CALLS)
def test_the_requests_deadline_ends_a_call_in_its_handler(nested: Nested, verb: str) -> None:
    options: dict[str, Any] = {"timeout": None} if verb == "request" else {}
    subject = "h.inner.request" if verb == "request" else "h.inner"

    def call(ctx: natsync.HandlerContext) -> object:
        if verb == "request":
            return nested.client.request(subject, b"wait", **options)
        if verb == "stream":
            return list(nested.client.stream(subject, b"wait"))
        nested.client.stream_request(subject, b"wait", lambda message: None)
        return None

    nested.call = call
    with pytest.raises(natsync.DeadlineExceeded):
        list(nested.client.stream("h.outer", timeout=1.5))
    eventually(lambda: nested.errors, PATIENCE)
    assert isinstance(nested.errors[0], natsync.TimedOut)
    eventually(lambda: nested.inner, PATIENCE)
    assert nested.inner[0].wait(SLACK)


@pytest.mark.parametrize("verb", ["stream", "stream_request"])
def test_cancelling_a_request_ends_what_its_handler_waits_for_two_handlers_away(nested: Nested, verb: str) -> None:
    def call(ctx: natsync.HandlerContext) -> object:
        if verb == "stream":
            return list(nested.client.stream("h.inner", b"wait"))
        nested.client.stream_request("h.inner", b"wait", lambda message: None)
        return None

    nested.call = call
    stream = nested.client.stream("h.outer")
    eventually(lambda: nested.inner, PATIENCE)
    stream.cancel("enough")
    assert nested.inner[0].wait(SLACK)
    eventually(lambda: nested.errors, PATIENCE)
    assert isinstance(nested.errors[0], natsync.StreamCancelled | natsync.Cancelled)


def test_cancelling_a_request_ends_a_request_that_its_handler_waits_for(nested: Nested) -> None:
    nested.call = lambda ctx: nested.client.request("h.inner.request", b"wait", timeout=PATIENCE)
    stream = nested.client.stream("h.outer")
    eventually(lambda: nested.inner, PATIENCE)
    stream.cancel("enough")
    eventually(lambda: nested.errors, SLACK)
    assert isinstance(nested.errors[0], natsync.Cancelled)
    nested.inner[0].cancel("the test is over")


def test_a_call_with_a_context_of_its_own_is_detached(nested: Nested) -> None:
    detached: list[natsync.Stream] = []

    def call(ctx: natsync.HandlerContext) -> None:
        stream = nested.client.stream("h.inner", b"wait", ctx=natsync.Context())
        assert stream.next(PATIENCE) == b"begun"
        detached.append(stream)
        ctx.wait()

    nested.call = call
    outer = nested.client.stream("h.outer", headers=TRACE, timeout=PATIENCE)
    eventually(lambda: detached, PATIENCE)
    outer.cancel("enough")
    assert nested.outer[0].wait(PATIENCE)
    inner = nested.inner[0]
    assert not inner.wait(0.3)
    assert inner.deadline is None
    assert not set(TRACE) & set(inner.metadata)
    detached[0].close()
    assert inner.wait(PATIENCE)


def test_a_context_derived_from_the_handlers_passes_all_on_from_another_thread(nested: Nested) -> None:
    def call(ctx: natsync.HandlerContext) -> None:
        with ctx.with_value("a", 1) as derived:
            other = Outcome(lambda: list(nested.client.stream("h.inner", ctx=derived)))
            assert other.within(PATIENCE) is None

    nested.call = call
    assert list(nested.client.stream("h.outer", headers=TRACE, timeout=PATIENCE)) == [b"begun"]
    inner = nested.inner[0]
    assert {key: inner.metadata.get(key) for key in TRACE} == TRACE
    assert inner.deadline is not None


def test_another_thread_of_a_handler_inherits_nothing_by_itself(nested: Nested) -> None:
    def call(ctx: natsync.HandlerContext) -> None:
        other = Outcome(lambda: list(nested.client.stream("h.inner")))
        assert other.within(PATIENCE) is None

    nested.call = call
    assert list(nested.client.stream("h.outer", headers=TRACE, timeout=PATIENCE)) == [b"begun"]
    assert not set(TRACE) & set(nested.inner[0].metadata)
    assert nested.inner[0].deadline is None


@pytest.mark.parametrize("key", ["traceparent", "Traceparent"])
@pytest.mark.parametrize("verb", CALLS)
def test_headers_that_a_call_is_given_win_over_those_passed_on(nested: Nested, verb: str, key: str) -> None:
    own = "00-11111111111111111111111111111111-2222222222222222-01"
    nested.call = lambda ctx: CALLS[verb](nested.client, headers={key: own})
    assert list(nested.client.stream("h.outer", headers=TRACE, timeout=PATIENCE)) == [b"begun"]
    metadata = nested.inner[0].metadata
    assert metadata["traceparent"] == own
    assert [name.lower() for name in metadata].count("traceparent") == 1
    assert metadata["baggage"] == TRACE["baggage"]


def test_a_workers_next_request_inherits_nothing_of_the_one_before(nested: Nested) -> None:
    nested.call = lambda ctx: list(nested.client.stream("h.inner"))
    for headers in (TRACE, {}, TRACE, {}):
        assert list(nested.client.stream("h.outer", headers=headers, timeout=PATIENCE)) == [b"begun"]
    assert [set(TRACE) <= set(ctx.metadata) for ctx in nested.inner] == [True, False, True, False]
