"""One link over a bare socket: what the reader takes, what the writer sends, and how it ends."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from interrupting import moments
from natsync.concurrency import Deadline, Finishing
from natsync.errors import AuthorizationError, ConnectError, NatsError, ProtocolError
from natsync.options import ConnectOptions, Server
from natsync.outbox import WRITE_BYTES, Outbox, OutboxClosed, Receipt
from natsync.protocol import PING, Batch, encode_pub
from natsync.session import Session
from natsync.testing import eventually
from natsync.timers import LATE_SECONDS
from natsync.transport import Transport
from support import natsync_threads

#: Seconds by which a deadline may be overrun on a busy machine.
SLACK = 5.0
#: Bytes that a socket pair swallows at most before a write to it blocks.
SWALLOWED = 2 << 20


class Owner:
    """Records what a session tells its connection."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.infos: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.reasons: list[Exception] = []
        self.lost = threading.Event()
        self.fail = False

    def on_batch(self, session: Session, batch: Batch) -> None:
        if self.fail:
            raise ZeroDivisionError("a fault of the library")
        self.batches.append(batch)

    def on_info(self, session: Session, fields: dict[str, Any]) -> None:
        self.infos.append(fields)

    def on_server_error(self, session: Session, text: str) -> None:
        self.errors.append(text)

    def on_lost(self, session: Session, reason: Exception) -> None:
        self.reasons.append(reason)
        self.lost.set()

    @property
    def payloads(self) -> list[bytes]:
        return [item[2] for batch in self.batches for item in batch.items]


class Link:
    """A session and the other end of its socket."""

    def __init__(self, pair: tuple[socket.socket, socket.socket], outbox: Outbox | None = None, **options: Any) -> None:
        ours, self.peer = pair
        self.peer.settimeout(5)
        self.owner = Owner()
        self.outbox = outbox or Outbox(1 << 20)
        self.outbox.attach([])
        transport = Transport(ours, Server("127.0.0.1", 4222), b"")
        self.session = Session(transport, {}, self.outbox, ConnectOptions(**options), self.owner, "natsync-test", 0)

    def ended(self, timeout: float = 5.0) -> Exception:
        """The reason with which the link ended, waited for."""
        assert self.owner.lost.wait(timeout), "the link did not end"
        (reason,) = self.owner.reasons
        return reason

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.peer.recv(min(65536, size - len(data)))
            assert more, f"the link ended after {data[:200]!r}"
            data += more
        return data

    def stop(self) -> None:
        self.session.end(ConnectError("the test is over"))
        self.outbox.close()
        assert self.session.join(Deadline.after(5)) == []
        self.peer.close()


@contextmanager
def link(pair: tuple[socket.socket, socket.socket] | None = None, **given: Any) -> Iterator[Link]:
    made = Link(pair or socket.socketpair(), **given)
    made.session.start()
    try:
        yield made
    finally:
        made.stop()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection: unlike a socket pair, it can be reset."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    return ours, peer


def reset(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


# -- reading ----------------------------------------------------------------------------------------------------------


def test_messages_reach_the_owner_in_order() -> None:
    with link() as it:
        it.peer.sendall(b"".join(b"MSG a.%d 1 2\r\n%02d\r\n" % (index % 3, index) for index in range(100)))
        eventually(lambda: len(it.owner.payloads) == 100)
        assert it.owner.payloads == [b"%02d" % index for index in range(100)]


def test_a_message_in_single_bytes_arrives_whole() -> None:
    with link() as it:
        for byte in b"HMSG s 7 r 12 14\r\nNATS/1.0\r\n\r\nhi\r\n":
            it.peer.sendall(bytes([byte]))
        eventually(lambda: it.owner.batches)
        assert it.owner.batches == [Batch(b"7", b"s", [(b"r", b"NATS/1.0\r\n\r\n", b"hi")])]


def test_info_and_errors_do_not_end_the_reader() -> None:
    with link() as it:
        it.peer.sendall(
            b'INFO {"max_payload":9}\r\n-ERR \'Permissions Violation for Publish to "x"\'\r\n+OK\r\nPONG\r\n'
        )
        it.peer.sendall(b"-ERR 'something nobody has heard of'\r\nMSG s 1 2\r\nhi\r\n")
        eventually(lambda: it.owner.batches)
        assert it.owner.infos == [{"max_payload": 9}]
        assert it.owner.errors == ['Permissions Violation for Publish to "x"', "something nobody has heard of"]
        assert not it.owner.lost.is_set()


def test_an_info_of_more_than_64_kib_between_messages_is_taken() -> None:
    urls = ",".join(f'"10.0.{index // 250}.{index % 250}:4222"' for index in range(10_000))
    with link() as it:
        it.peer.sendall(b"MSG s 1 1\r\na\r\nINFO {" + f'"connect_urls":[{urls}]'.encode() + b"}\r\nMSG s 1 1\r\nb\r\n")
        eventually(lambda: len(it.owner.payloads) == 2)
        assert len(it.owner.infos[0]["connect_urls"]) == 10_000


def test_received_bytes_are_counted() -> None:
    with link() as it:
        it.peer.sendall(b"MSG s 1 2\r\nhi\r\n")
        eventually(lambda: it.owner.batches)
        assert it.session.received_bytes == 15


# -- PING and PONG ----------------------------------------------------------------------------------------------------


def test_a_ping_is_answered() -> None:
    with link() as it:
        it.peer.sendall(b"PING\r\n")
        assert it.receive(6) == b"PONG\r\n"


def test_a_pong_goes_ahead_of_queued_data() -> None:
    frame = encode_pub(b"s", None, None, b"x" * 65000)
    with link() as it:
        for _ in range(12 * WRITE_BYTES // len(frame)):
            it.outbox.try_put(frame, force=True)
        waiting = it.outbox.size_bytes
        it.peer.sendall(b"PING\r\nMSG s 1 2\r\nhi\r\n")
        eventually(lambda: it.owner.batches)  # so the PING before it has been handled
        data = b""
        while b"PONG\r\n" not in data:
            data += it.peer.recv(65536)
        # What had been handed to the kernel or taken by the writer goes first, all the rest later.
        assert len(data) < SWALLOWED + 2 * WRITE_BYTES < waiting


def test_a_pong_never_lands_inside_a_frame() -> None:
    frame = encode_pub(b"s", None, None, b"x" * 100_000)
    with link() as it:
        for _ in range(30):
            it.outbox.try_put(frame, force=True)
        it.peer.sendall(b"PING\r\n" * 3)
        data = it.receive(30 * len(frame) + 3 * 6)
    assert data.replace(frame, b"") == b"PONG\r\n" * 3


def test_what_has_gathered_leaves_in_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []
    original = Transport.send

    def send(transport: Transport, data: bytes, progress: Callable[[], object]) -> None:
        writes.append(len(data))
        original(transport, data, progress)

    monkeypatch.setattr(Transport, "send", send)
    frame = encode_pub(b"s", None, None, b"x" * 20)
    made = Link(socket.socketpair())
    for _ in range(1000):
        made.outbox.try_put(frame)
    made.session.start()
    assert made.receive(1000 * len(frame)) == frame * 1000
    assert writes == [1000 * len(frame)]
    made.stop()


def test_a_ping_of_ours_goes_behind_what_was_queued_before() -> None:
    with link() as it:
        frame = encode_pub(b"s", None, None, b"x")
        it.outbox.try_put(frame)
        assert it.session.ping()
        assert it.receive(len(frame) + 6) == frame + b"PING\r\n"


def test_each_pong_confirms_what_was_queued_before_its_ping() -> None:
    confirmed: list[int | None] = []
    with link() as it:
        first = it.outbox.try_put(encode_pub(b"s", None, None, b"1"))
        it.session.ping(confirmed.append)
        second = it.outbox.try_put(encode_pub(b"s", None, None, b"2"))
        it.session.ping(confirmed.append)
        third = it.outbox.try_put(encode_pub(b"s", None, None, b"3"))
        it.peer.sendall(b"PONG\r\n")
        eventually(lambda: len(confirmed) == 1)
        assert confirmed[0] is not None
        assert first <= confirmed[0] < second
        it.peer.sendall(b"PONG\r\n")
        eventually(lambda: len(confirmed) == 2)
        assert confirmed[1] is not None
        assert second <= confirmed[1] < third
        assert it.session.confirmed == confirmed[1]


class CrowdedOutbox(Outbox):
    """One in which another thread's message gets in right behind each protocol frame, as may happen at any time."""

    late = 0

    def put_now(self, frame: bytes, here: bool = False, receipt: Receipt | None = None) -> Any:
        done = super().put_now(frame, here, receipt)
        self.late = self.try_put(encode_pub(b"s", None, None, b"late"))
        return done


def test_a_pong_does_not_confirm_a_message_that_got_in_behind_its_ping() -> None:
    confirmed: list[int | None] = []
    outbox = CrowdedOutbox(1 << 20)
    with link(outbox=outbox) as it:
        it.session.ping(confirmed.append)
        it.peer.sendall(b"PONG\r\n")
        eventually(lambda: confirmed)
        assert confirmed[0] is not None
        assert confirmed[0] < outbox.late


def test_a_pong_nobody_asked_for_is_passed_over() -> None:
    confirmed: list[int | None] = []
    with link() as it:
        it.peer.sendall(b"PONG\r\nPONG\r\nMSG s 1 2\r\nhi\r\n")
        eventually(lambda: it.owner.batches)
        it.session.ping(confirmed.append)
        assert it.receive(6) == b"PING\r\n"
        assert confirmed == []


# -- a link that has gone stale ---------------------------------------------------------------------------------------


def test_a_server_that_stops_answering_pings_ends_the_link() -> None:
    begin = time.monotonic()
    with link(ping_interval=0.1, max_pings_outstanding=2) as it:
        reason = it.ended()
        assert 0.3 <= time.monotonic() - begin < 0.3 + SLACK
        assert isinstance(reason, ConnectError)
        assert "PING" in str(reason)
        asked = b"".join(iter(lambda: it.peer.recv(64), b""))
        # One more if a look was late; and what waited for a busy writer is dropped with the link.
        assert (b"PING\r\n" * 3).startswith(asked)


def test_a_look_at_pings_that_comes_late_asks_again_before_the_link_is_ended() -> None:
    """The process was frozen meanwhile, and the answer was not read yet."""
    with link(ping_interval=60.0, max_pings_outstanding=1) as it:

        def look(late: float) -> None:
            assert it.session._ping_timer is not None
            it.session._ping_timer.cancel()
            it.session._ping_timer.at = time.monotonic() - late
            it.session._ping_due()

        look(0.0)
        look(3600.0)
        assert it.receive(12) == b"PING\r\nPING\r\n"
        assert not it.owner.reasons
        it.peer.sendall(b"PONG\r\n")
        eventually(lambda: it.session._unanswered == 0)
        look(0.0)
        look(3600.0)
        assert not it.owner.reasons
        look(3600.0)  # late all the time: the server has its moment once
        assert "PING" in str(it.ended())


def test_a_server_that_answers_pings_keeps_the_link() -> None:
    with link(ping_interval=0.02, max_pings_outstanding=100) as it:  # a busy machine may take two seconds for an answer
        for _ in range(110):
            assert it.receive(6) == b"PING\r\n"
            it.peer.sendall(b"PONG\r\n")
        assert not it.owner.lost.is_set()


def answer_pings_slowly(peer: socket.socket) -> None:
    """Answer each PING 10 ms after it came, until the link ends."""
    with contextlib.suppress(OSError):
        while data := peer.recv(65536):
            time.sleep(0.01)
            peer.sendall(b"PONG\r\n" * data.count(b"PING"))


def test_flushes_in_flight_are_not_taken_for_a_stale_link() -> None:
    answered: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    with link(ping_interval=0.2, max_pings_outstanding=10) as it:
        server = threading.Thread(target=answer_pings_slowly, args=(it.peer,))
        server.start()
        until = time.monotonic() + 2.5
        while time.monotonic() < until:  # as threads that flush at once: PINGs are on their way, none of them old
            sent = sum([it.session.ping(answered.put) for _ in range(20)])
            for _ in range(sent):
                answered.get(timeout=5)
        assert it.owner.reasons == []
        it.session.end(ConnectError("the test is over"))
        server.join(5)


def test_without_a_ping_interval_no_ping_is_sent() -> None:
    with link(ping_interval=None) as it:
        it.outbox.try_put(b"PUB s 0\r\n\r\n")
        assert it.receive(11) == b"PUB s 0\r\n\r\n"
        it.peer.settimeout(0.2)
        with pytest.raises(TimeoutError):
            it.peer.recv(1)


# -- a writer that is blocked -----------------------------------------------------------------------------------------


@pytest.fixture(params=["told", "not told"])
def narrow_pair(request: pytest.FixtureRequest) -> tuple[socket.socket, socket.socket]:
    """Two ends that buffer little; whether the kernel tells how much the other end has confirmed."""
    if request.param == "not told":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        ours = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    return ours, peer


def test_a_write_that_is_blocked_ends_the_link_at_write_timeout(
    narrow_pair: tuple[socket.socket, socket.socket],
) -> None:
    with link(narrow_pair, write_timeout=0.3) as it:
        begin = time.monotonic()
        it.outbox.try_put(b"x" * (SWALLOWED * 4), force=True)
        reason = it.ended()
        assert 0.3 <= time.monotonic() - begin < 0.3 + SLACK
        assert isinstance(reason, ConnectError)
        assert "write" in str(reason)
        assert it.session.join(Deadline.after(SLACK)) == []


def test_a_look_at_a_write_that_comes_late_is_taken_again_before_the_link_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process was frozen meanwhile, and the writer gets a moment to go on."""
    with link(write_timeout=60.0) as it:
        begin = time.monotonic()
        it.session._writing_since, it.session._write_look_at = begin - 100, begin - 40
        it.session._write_due()
        assert not it.owner.reasons
        assert "blocked for 60 s" in str(it.ended())  # it did not
        assert time.monotonic() - begin >= LATE_SECONDS - 0.01
    with link(write_timeout=60.0) as it:
        begin = time.monotonic()
        it.session._writing_since, it.session._write_look_at = begin - 100, begin - 40
        monkeypatch.setattr("natsync.timers.LATE_SECONDS", 2.0)
        it.session._write_due()
        it.session._writing_since = None  # it did
        assert not it.owner.lost.wait(4.0)


def test_each_write_has_the_whole_write_timeout() -> None:
    chunk = b"x" * 200_000
    with link(write_timeout=1.5) as it:
        until = time.monotonic() + 4.5
        while time.monotonic() < until:  # busy for three times the limit, never blocked for all of it
            it.outbox.try_put(chunk)
            assert it.receive(len(chunk)) == chunk
        assert it.owner.reasons == []


def test_a_write_that_takes_longer_than_write_timeout_goes_on_as_long_as_the_other_end_reads(
    narrow_pair: tuple[socket.socket, socket.socket],
) -> None:
    data = random.Random(1).randbytes(4 << 20)
    with link(narrow_pair, write_timeout=1.5) as it:
        begin = time.monotonic()
        it.outbox.try_put(data, force=True)
        for start in range(0, len(data), 1 << 17):  # steadily, three times the limit in all
            assert it.receive(1 << 17) == data[start : start + (1 << 17)]
            time.sleep(0.15)
        assert time.monotonic() - begin > 3 * 1.5
        assert it.owner.reasons == []


def test_a_write_that_has_gone_on_for_long_is_blocked_once_the_other_end_does_not_read(
    narrow_pair: tuple[socket.socket, socket.socket],
) -> None:
    with link(narrow_pair, write_timeout=1.5) as it:
        it.outbox.try_put(b"x" * (SWALLOWED * 4), force=True)
        for _ in range(12):
            it.receive(1 << 17)
            time.sleep(0.15)
        assert "blocked for 1.5 s" in str(it.ended())


def test_an_idle_writer_is_not_a_blocked_one() -> None:
    with link(write_timeout=1.0) as it:
        it.outbox.try_put(b"PUB s 0\r\n\r\n")
        assert it.receive(11)
        assert not it.owner.lost.wait(1.6)


# -- endings ----------------------------------------------------------------------------------------------------------


def test_the_end_of_the_link_is_noticed_and_both_threads_leave() -> None:
    with link() as it:
        it.peer.shutdown(socket.SHUT_RDWR)
        assert isinstance(it.ended(), ConnectError)
        it.outbox.close()
        assert it.session.join(Deadline.after(5)) == []
        assert not [thread for thread in natsync_threads() if thread.name.startswith("natsync-test")]


def test_a_reset_in_mid_payload_ends_the_link() -> None:
    with link(tcp_pair()) as it:
        it.peer.sendall(b"MSG s 1 1000\r\nonly the beginning")
        eventually(lambda: it.session.received_bytes)
        reset(it.peer)
        assert isinstance(it.ended(), ConnectError)
        assert it.owner.batches == []


def test_an_end_in_mid_payload_delivers_no_part_of_it() -> None:
    with link() as it:
        it.peer.sendall(b"MSG s 1 2\r\nhi\r\nMSG s 1 1000\r\nonly the beginning")
        it.peer.shutdown(socket.SHUT_RDWR)
        it.ended()
        assert it.owner.payloads == [b"hi"]


@pytest.mark.parametrize(
    "garbage", [b"HTTP/1.1 200 OK\r\n", b"MSG s 1 x\r\n", b"MSG s 1 2\r\nhiXX", b"\x00\x01\x02\r\n", b"\xff" * 10_000]
)
def test_garbage_ends_the_link_with_a_protocol_error(garbage: bytes) -> None:
    with link() as it:
        it.peer.sendall(garbage)
        assert isinstance(it.ended(), ProtocolError)


def test_what_came_before_the_garbage_is_delivered() -> None:
    with link() as it:
        it.peer.sendall(b"MSG s 1 2\r\nhi\r\nGARBAGE\r\n")
        it.ended()
        assert it.owner.payloads == [b"hi"]


def test_a_message_above_the_limit_ends_the_link_before_it_is_held() -> None:
    with link(max_message_bytes=1000) as it:
        it.peer.sendall(b"MSG s 1 1001\r\n")
        assert isinstance(it.ended(), ProtocolError)


@pytest.mark.parametrize(
    "text", ["Authorization Violation", "User Authentication Expired", "Account Authentication Expired"]
)
def test_credentials_that_ended_are_the_reason(text: str) -> None:
    with link() as it:
        it.peer.sendall(f"-ERR '{text}'\r\n".encode())
        it.peer.shutdown(socket.SHUT_RDWR)
        reason = it.ended()
        assert isinstance(reason, AuthorizationError)
        assert text in str(reason)


def test_the_servers_last_words_are_part_of_the_reason() -> None:
    with link() as it:
        it.peer.sendall(b"-ERR 'Maximum Payload Violation'\r\n")
        it.peer.shutdown(socket.SHUT_RDWR)
        assert "Maximum Payload Violation" in str(it.ended())


def test_a_reset_does_not_hide_the_servers_last_words() -> None:
    with link(tcp_pair()) as it:
        it.peer.sendall(b"-ERR 'User Authentication Expired'\r\n")
        eventually(lambda: it.owner.errors)
        reset(it.peer)
        reason = it.ended()
        assert isinstance(reason, AuthorizationError)
        assert "User Authentication Expired" in str(reason)


def test_a_fault_in_the_owner_ends_the_link_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "natsync.session"), link() as it:
        it.owner.fail = True
        it.peer.sendall(b"MSG s 1 2\r\nhi\r\n")
        assert isinstance(it.ended(), NatsError)
    assert "ZeroDivisionError" in caplog.text


def test_a_link_ends_once_with_the_first_reason() -> None:
    with link() as it:
        reasons = [ConnectError(str(index)) for index in range(8)]
        threads = [threading.Thread(target=it.session.end, args=(reason,)) for reason in reasons]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        assert it.ended() in reasons


def test_pings_in_flight_are_told_of_the_end() -> None:
    confirmed: list[int | None] = []
    with link() as it:
        assert it.session.ping(confirmed.append)
        assert it.session.ping(confirmed.append)
        it.peer.shutdown(socket.SHUT_RDWR)
        eventually(lambda: len(confirmed) == 2)
        assert confirmed == [None, None]


def test_an_end_that_was_cut_short_is_told_by_the_next_in_order() -> None:
    """The owner first, who may be told again, as may the one PING whose call was just made."""
    transport = SimpleNamespace(server="a", shutdown=lambda: None)
    ended = list[tuple[Session, Owner, list[str]]]()

    def end() -> None:
        owner, told, outbox = Owner(), list[str](), Outbox(1 << 20)
        outbox.attach([])
        session = Session(transport, {}, outbox, ConnectOptions(), owner, "test")  # type: ignore[arg-type]
        ended.append((session, owner, told))

        def tell(name: str, position: int | None) -> None:
            told.append(f"{name} {position} {len(owner.reasons) > 0}")

        for name in "abc":
            session.ping(partial(tell, name))
        session.end(ConnectError("first"))

    seen = set()
    for _ in moments(end, Session.end, Session._tell_end, Finishing.run):
        session, owner, told = ended[-1]
        seen.add(len(told))
        if session._ended:
            session._pong()  # one that the reader still had: it is not to be heeded
        for reason in ("next", "last"):
            session.end(ConnectError(reason))
        assert [name for name, _ in itertools.groupby(told)] == ["a None True", "b None True", "c None True"]
        assert (len(told), len(owner.reasons)) <= (4, 2)
        assert len(owner.reasons) <= 2
        assert len({str(reason) for reason in owner.reasons}) == 1
    assert seen == {0, 1, 2, 3}
    _, owner, told = ended[-1]
    assert (len(told), len(owner.reasons)) == (3, 1)


def test_an_interrupt_in_a_ping_leaves_none_that_nobody_knows_of() -> None:
    """An answer too many, or one too few, would have each PONG taken for that of another PING."""
    outbox, told = Outbox(1 << 20), list[int | None]()
    session = Session(SimpleNamespace(server="a"), {}, outbox, ConnectOptions(), Owner(), "test")  # type: ignore[arg-type]
    outbox.attach([])
    inside = (Session.ping, Outbox.put_now, Outbox._takes_locked, Outbox._wake_locked)
    sent = set()
    for _ in moments(lambda: session.ping(told.append), *inside):
        pings = [frame for frame in outbox._frames if frame == PING]
        assert len(session._pings) == len(pings)
        sent.add(len(pings))
        outbox._frames.clear()
        session._pings.clear()
    assert sent == {0, 1}
    assert len(session._pings) == 1
    session._pong()
    assert told == [outbox.position]


def test_a_link_that_has_ended_sends_no_ping() -> None:
    confirmed: list[int | None] = []
    with link() as it:
        it.session.end(ConnectError("over"))
        assert not it.session.ping(confirmed.append)
        assert confirmed == []


def test_a_closed_outbox_turns_publishers_away() -> None:
    with link() as it:
        it.session.end(ConnectError("over"))
        it.outbox.close()
        with pytest.raises(OutboxClosed):
            it.outbox.try_put(b"PUB s 0\r\n\r\n")


def test_an_end_that_the_link_never_gave_up_wakes_a_reader_that_waits() -> None:
    with link() as it:
        it.session.end(ConnectError("over"))
        it.outbox.close()
        assert it.session.join(Deadline.after(SLACK)) == []


def test_join_gives_the_socket_back() -> None:
    with link(tcp_pair()) as it:
        it.session.end(ConnectError("over"))
        it.outbox.close()
        it.session.join(Deadline.after(5))
        assert it.peer.recv(1) == b""
        with pytest.raises(OSError, match="descriptor"):
            it.session._transport.receive()


def test_timers_of_an_ended_link_do_nothing() -> None:
    with link(ping_interval=0.05, write_timeout=1.0) as it:
        it.outbox.try_put(b"PUB s 0\r\n\r\n")
        assert it.receive(11)
        it.session.end(ConnectError("over"))
        eventually(lambda: not [thread for thread in natsync_threads() if thread.name == "natsync-timer"])
        assert len(it.owner.reasons) == 1
