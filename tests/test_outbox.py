"""natsync.outbox: whole frames, in order, once, on this link or the next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from natsync import outbox as outbox_module
from natsync.backlog import destination
from natsync.concurrency import Deadline
from natsync.errors import ReconnectBufferFull, TimedOut
from natsync.outbox import HIGH_WATER_BYTES, PRODUCER_BYTES, WRITE_BYTES, Outbox, OutboxClosed
from natsync.protocol import Pub, RequestParser, encode_pub, encode_sub
from natsync.testing import eventually

BUFFER = 8 << 20
LOOKS_LIKE_PROTOCOL = b"PUB b 1000\r\n\r\nHPUB c 1 999\r\n"
SUB = encode_sub(b"a", None, b"1")


def pub(text: str, size: int = 0) -> bytes:
    return encode_pub(b"a", None, None, text.encode().ljust(size, b"."))


def attached(**options: Any) -> Outbox:
    box = Outbox(BUFFER, **options)
    box.attach([])
    return box


class Waiting:
    """A call in a thread of its own, and how it ends."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.outcome: list[Any] = []
        self._call = call
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.outcome.append(self._call())
        except Exception as error:
            self.outcome.append(error)

    def result(self) -> Any:
        self.thread.join(5)
        assert self.outcome, "still waiting"
        return self.outcome[0]


# -- order -----------------------------------------------------------------------------------------------------------


def test_what_has_gathered_is_taken_at_once_and_in_order() -> None:
    box = attached()
    frames = [pub(str(n)) for n in range(5)]
    for frame in frames:
        box.try_put(frame)
    assert box.take() == b"".join(frames)


def test_protocol_frames_stay_behind_the_messages_before_them() -> None:
    box = attached()
    box.try_put(pub("1"))
    assert box.put_now(SUB)
    box.try_put(pub("2"))
    assert box.take() == pub("1") + SUB + pub("2")


def test_the_control_lane_goes_first() -> None:
    box = attached()
    box.try_put(pub("1"))
    box.put_first(b"PONG\r\n")
    box.put_first(b"PONG\r\n")
    assert box.take() == b"PONG\r\nPONG\r\n"
    assert box.take() == pub("1")


def test_what_attaches_goes_before_what_waited() -> None:
    box = Outbox(BUFFER)
    box.try_put(pub("waited"))
    box.attach([SUB, b"UNSUB 1 5\r\n"])
    assert box.take() == SUB + b"UNSUB 1 5\r\n"
    assert box.take() == pub("waited")


def test_the_order_of_an_old_link_goes_on_in_the_next() -> None:
    old = attached()
    for text in "12":
        old.try_put(pub(text))
    new = Outbox(BUFFER, old.close(), old.position)
    new.try_put(pub("3"))
    new.attach([SUB])
    new.try_put(pub("4"))
    assert [new.take(), new.take()] == [SUB, pub("1") + pub("2") + pub("3") + pub("4")]


# -- the size of a write ---------------------------------------------------------------------------------------------


def test_a_write_stays_near_its_limit_and_nothing_is_lost_between_writes() -> None:
    box = attached()
    frames = [pub(str(n), 10_000) for n in range(3 * WRITE_BYTES // 10_000)]
    for frame in frames:
        box.try_put(frame)
    writes = []
    while box.size_bytes:
        writes.append(box.take() or b"")
    assert b"".join(writes) == b"".join(frames)
    assert len(writes) == 3
    assert max(map(len, writes)) < WRITE_BYTES + len(frames[-1])


def test_a_pong_goes_between_two_writes() -> None:
    box = attached()
    for n in range(2 * WRITE_BYTES // 10_000 + 2):
        box.try_put(pub(str(n), 10_000))
    assert len(box.take() or b"") < WRITE_BYTES + 11_000
    box.put_first(b"PONG\r\n")
    assert box.take() == b"PONG\r\n"


def test_a_frame_larger_than_a_write_leaves_whole() -> None:
    box = attached()
    large = pub("x", 2 * WRITE_BYTES)
    box.try_put(large)
    box.try_put(pub("next"))
    assert box.take() == large
    assert box.take() == pub("next")


# -- waiting for something to write -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("put", "taken"),
    [
        (lambda box: box.try_put(pub("1")), pub("1")),
        (lambda box: box.put_now(SUB), SUB),
        (lambda box: box.put_first(b"PONG\r\n"), b"PONG\r\n"),
    ],
    ids=["try_put", "put_now", "put_first"],
)
def test_whatever_is_put_wakes_the_writer(put: Callable[[Outbox], Any], taken: bytes) -> None:
    box = attached()
    for _ in range(3):  # not only the first time
        writer = Waiting(box.take)
        eventually(lambda: box._writer_waits)
        put(box)
        assert writer.result() == taken


def test_closing_wakes_the_writer_with_nothing() -> None:
    box = attached()
    writer = Waiting(box.take)
    eventually(lambda: box._writer_waits)
    assert box.close() == []
    assert writer.result() is None


# -- positions -------------------------------------------------------------------------------------------------------


def test_positions_count_the_bytes_put() -> None:
    box = attached()
    first, second = pub("1"), pub("22")
    assert box.try_put(first) == len(first)
    assert box.try_put(second) == len(first) + len(second)
    box.put_first(b"PONG\r\n")
    assert box.put_now(SUB) == box.position == len(first) + len(second) + len(SUB)


def test_what_was_taken_is_known_by_its_position() -> None:
    box = attached()
    mark = box.try_put(pub("1"))
    assert box.taken < mark
    box.take()
    assert box.taken == mark
    later = box.try_put(pub("2"))
    assert box.taken < later


def test_taking_only_the_first_part_counts_only_that() -> None:
    box = attached()
    marks = [box.try_put(pub(str(n), 10_000)) for n in range(2 * WRITE_BYTES // 10_000)]
    written = box.take() or b""
    assert box.taken == len(written)
    assert sum(mark <= box.taken for mark in marks) == written.count(b"PUB a ")


def test_positions_go_on_in_the_next_outbox() -> None:
    old = attached()
    old.try_put(pub("taken"))
    old.take()
    mark = old.try_put(pub("waiting"))
    new = Outbox(BUFFER, old.close(), old.position)
    assert (new.position, new.taken) == (mark, mark - len(pub("waiting")))
    assert new.try_put(pub("new")) == mark + len(pub("new"))


def test_positions_and_sizes_agree_whatever_happens() -> None:
    box = attached()
    for n in range(200):
        frame = pub(str(n), 20_000 * (n % 3))
        box.try_put(frame, force=True)
        if n % 5 == 0:
            box.withdraw(frame)
        if n % 11 == 0:
            box.withdraw_to({b"a"})
            box.try_put(pub("one"), force=True)
        if n % 7 == 6:
            box.take()
        assert box.position - box.taken == box.size_bytes == sum(map(len, box._frames))


def test_messages_are_counted_and_protocol_frames_are_not() -> None:
    box = attached()
    box.try_put(pub("1"))
    box.try_put(pub("2") + pub("3"), messages=2)
    box.put_now(SUB)
    box.put_first(b"PONG\r\n")
    assert box.messages == 3


# -- taking back -----------------------------------------------------------------------------------------------------


def test_a_frame_that_waits_can_be_taken_back_and_never_leaves() -> None:
    box = attached()
    frames = [pub(str(n)) for n in range(3)]
    for frame in frames:
        box.try_put(frame)
    assert box.withdraw(frames[1])
    assert box.take() == frames[0] + frames[2]


def test_a_frame_that_was_taken_cannot_be_taken_back() -> None:
    box = attached()
    frame = pub("1")
    box.try_put(frame)
    box.take()
    assert not box.withdraw(frame)


def test_a_frame_is_taken_back_once() -> None:
    box = attached()
    frame = pub("1")
    box.try_put(frame)
    assert box.withdraw(frame)
    assert not box.withdraw(frame)
    assert box.size_bytes == 0


def test_an_equal_frame_of_somebody_else_is_not_taken_back() -> None:
    box = attached()
    mine, theirs = pub("same"), pub("same")
    box.try_put(theirs)
    assert not box.withdraw(mine)
    assert box.take() == theirs


def test_frames_behind_one_taken_back_keep_their_positions() -> None:
    box = attached()
    frame = pub("1")
    box.try_put(frame)
    mark = box.try_put(pub("2"))
    box.withdraw(frame)
    assert box.taken < mark
    box.take()
    assert box.taken == mark


def test_taking_back_makes_room_in_the_buffer() -> None:
    box = Outbox(len(pub("1")))
    frame = pub("1")
    box.try_put(frame)
    box.withdraw(frame)
    assert box.try_put(pub("2"))


def to(subject: bytes, text: bytes = b"x") -> bytes:
    return encode_pub(subject, None, None, text)


def test_all_messages_to_some_subjects_can_be_taken_back() -> None:
    box = Outbox(BUFFER)
    frames = [to(b"a"), to(b"b"), to(b"c"), to(b"a.b"), encode_pub(b"a", b"r", b"NATS/1.0\r\n\r\n", b""), to(b"c")]
    for frame in frames:
        box.try_put(frame)
    box.withdraw_to({b"a", b"b", b"elsewhere"})
    box.attach([])
    assert box.take() == to(b"c") + to(b"a.b") + to(b"c")
    assert box.position - box.taken == box.size_bytes == 0


def test_taking_back_to_no_subject_changes_nothing() -> None:
    box = Outbox(BUFFER)
    box.try_put(to(b"a"))
    before = (box.position, box.taken, box.size_bytes)
    box.withdraw_to(set())
    assert (box.position, box.taken, box.size_bytes) == before


def test_only_messages_are_taken_back_by_their_subject() -> None:
    box = attached()
    for frame in (SUB, b"PING\r\n", b"UNSUB a\r\n"):
        box.put_now(frame)
    box.try_put(to(b"a"))
    box.withdraw_to({b"a"})
    assert box.take() == SUB + b"PING\r\n" + b"UNSUB a\r\n"


@pytest.mark.parametrize(
    "frame",
    [
        to(b"a.b"),
        encode_pub(b"a.b", b"r.1", None, b"x"),
        encode_pub(b"a.b", b"r.1", b"NATS/1.0\r\n\r\n", b""),
        to(b"a.b") + to(b"c"),
    ],
)
def test_where_a_frame_goes_is_known(frame: bytes) -> None:
    assert destination(frame) == b"a.b"


# -- without a link --------------------------------------------------------------------------------------------------


def test_without_a_link_messages_wait_up_to_the_buffers_size() -> None:
    frame = pub("x", 90)
    box = Outbox(2 * len(frame))
    box.try_put(frame)
    box.try_put(frame)
    before = box.position
    with pytest.raises(ReconnectBufferFull, match=rf"{2 * len(frame)} of {2 * len(frame)} bytes"):
        box.try_put(pub(""))
    assert (box.position, box.size_bytes) == (before, 2 * len(frame))


def test_a_buffer_of_zero_takes_nothing_without_a_link() -> None:
    with pytest.raises(ReconnectBufferFull):
        Outbox(0).try_put(pub(""))


def test_what_moved_from_the_old_link_counts_against_the_buffer() -> None:
    frame = pub("x", 90)
    box = Outbox(2 * len(frame), [frame], len(frame))
    box.try_put(frame)
    with pytest.raises(ReconnectBufferFull):
        box.try_put(frame)


def test_force_goes_beyond_the_buffer() -> None:
    box = Outbox(0)
    assert box.try_put(pub("end"), force=True) == len(pub("end"))
    box.attach([])
    assert box.take() == pub("end")


def test_once_attached_the_buffers_size_is_no_limit() -> None:
    box = Outbox(10)
    box.attach([])
    assert box.try_put(pub("x", 1000))


def test_protocol_frames_are_dropped_without_a_link() -> None:
    box = Outbox(BUFFER)
    assert not box.put_now(SUB)
    box.attach([])
    box.try_put(pub("1"))
    assert box.take() == pub("1")
    assert box.position == len(pub("1"))


def test_a_control_frame_of_a_session_that_is_being_started_leaves_first() -> None:
    box = Outbox(BUFFER)
    box.try_put(pub("1"))
    box.put_first(b"PONG\r\n")  # a PING may come right behind the handshake
    box.attach([SUB])
    assert [box.take(), box.take()] == [b"PONG\r\n" + SUB, pub("1")]


# -- too much for the link -------------------------------------------------------------------------------------------


def filled() -> tuple[Outbox, bytes]:
    """An outbox that has no more room, and the frame of which it is full."""
    box, frame = attached(), pub("x", HIGH_WATER_BYTES // 8)
    while box.try_put(frame):
        pass
    return box, frame


def test_beyond_the_high_water_mark_there_is_no_room() -> None:
    box, frame = filled()
    before = box.position
    assert HIGH_WATER_BYTES <= box.size_bytes < HIGH_WATER_BYTES + len(frame)
    assert box.try_put(pub("")) == 0
    assert box.position == before


def test_force_and_protocol_frames_go_beyond_the_high_water_mark() -> None:
    box, _ = filled()
    assert box.try_put(pub("end"), force=True)
    assert box.put_now(SUB)


def test_who_waits_for_room_is_woken_when_the_writer_has_caught_up() -> None:
    box, _ = filled()
    waiting = [Waiting(lambda: box.wait_room(Deadline())) for _ in range(3)]
    eventually(lambda: box._publishers_wait == 3)
    while box.size_bytes >= HIGH_WATER_BYTES:
        box.take()
    assert [one.result() for one in waiting] == [None] * 3
    assert box._publishers_wait == 0
    assert box.try_put(pub("1"))


def test_who_waits_for_room_is_not_woken_while_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "HIGH_WATER_BYTES", WRITE_BYTES)
    box = attached()
    for _ in range(8):
        box.try_put(pub("x", WRITE_BYTES), force=True)
    waiting = Waiting(lambda: box.wait_room(Deadline()))
    eventually(lambda: box._publishers_wait == 1)
    for _ in range(7):
        box.take()
        assert waiting.thread.is_alive()
    assert box.size_bytes >= WRITE_BYTES
    box.take()
    assert waiting.result() is None


def test_waiting_for_room_ends_with_the_deadline() -> None:
    box, _ = filled()
    started = time.monotonic()
    with pytest.raises(TimedOut, match="bytes wait to be written"):
        box.wait_room(Deadline.after(0.05))
    assert time.monotonic() - started < 5
    with pytest.raises(TimedOut):
        box.wait_room(Deadline.after(0))
    assert box._publishers_wait == 0


def test_nobody_waits_where_there_is_room_or_no_link() -> None:
    attached().wait_room(Deadline.after(0))
    Outbox(0).wait_room(Deadline.after(0))


def test_who_waits_for_room_may_give_up_for_reasons_of_its_own() -> None:
    box, _ = filled()
    over = threading.Event()
    other = Waiting(lambda: box.wait_room(Deadline()))
    eventually(lambda: box._publishers_wait == 1)
    waiting = Waiting(lambda: box.wait_room(Deadline(), over.is_set))
    eventually(lambda: box._publishers_wait == 2)
    over.set()
    box.wake_publishers()
    assert waiting.result() is None
    assert other.thread.is_alive()
    box.close()
    assert other.result() is None


def test_who_need_not_wait_any_more_does_not_begin_to() -> None:
    box, _ = filled()
    box.wait_room(Deadline.after(5), lambda: True)
    assert box.size_bytes >= HIGH_WATER_BYTES


def test_waking_nobody_is_fine() -> None:
    attached().wake_publishers()


def test_closing_wakes_who_waits_for_room() -> None:
    box, _ = filled()
    waiting = Waiting(lambda: box.wait_room(Deadline()))
    eventually(lambda: box._publishers_wait == 1)
    box.close()
    assert waiting.result() is None
    with pytest.raises(OutboxClosed):
        box.try_put(pub("1"))


# -- the end of a link -----------------------------------------------------------------------------------------------


def test_closing_gives_back_the_messages_that_were_not_taken_and_nothing_else() -> None:
    box = attached()
    taken, headers = pub("taken"), encode_pub(b"a", b"r", b"NATS/1.0\r\n\r\n", b"x")
    box.try_put(taken)
    box.take()
    waiting = [pub("1"), headers, pub("2")]
    for frame in waiting:
        box.try_put(frame)
        box.put_now(SUB)
        box.put_now(b"PING\r\n")
    box.put_first(b"PONG\r\n")
    assert box.close() == waiting


def test_closing_gives_back_the_very_objects() -> None:
    """Who waits for an answer knows its frame by identity."""
    box = attached()
    frame = pub("1")
    box.try_put(frame)
    assert box.close()[0] is frame


def test_after_the_end_everybody_is_turned_away() -> None:
    box = attached()
    box.try_put(pub("1"))
    box.close()
    for force in (False, True):
        with pytest.raises(OutboxClosed):
            box.try_put(pub("2"), force=force)
    assert not box.put_now(SUB)
    box.put_first(b"PONG\r\n")
    assert box.take() is None
    assert box.close() == []
    assert box.size_bytes == 0


def test_closing_before_a_link_was_there_gives_back_all() -> None:
    box = Outbox(BUFFER)
    box.try_put(pub("1"))
    assert box.close() == [pub("1")]


# -- a new link ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [None, b"NATS/1.0\r\n\r\n"])
def test_what_the_new_server_would_not_take_is_dropped_and_given_back(block: bytes | None) -> None:
    box = Outbox(BUFFER)
    small = pub("small")
    fitting = encode_pub(b"a", None, block, b"x" * (100 - len(block or b"")))
    large = encode_pub(b"a", b"r.1", block, b"x" * (101 - len(block or b"")))
    for frame in (small, large, fitting, large):
        box.try_put(frame)
    assert box.drop_larger(100) == [large, large]
    box.attach([SUB])
    assert [box.take(), box.take()] == [SUB, small + fitting]
    assert box.position - box.taken == box.size_bytes == 0


def test_of_several_messages_in_one_frame_none_is_too_large_for_the_new_server() -> None:
    box = Outbox(BUFFER)
    joined = [pub("small") + pub("x", 101), pub("x", 101) + pub("small"), pub("x", 100) + pub("small")]
    for frame in joined:
        box.try_put(frame, messages=2)
    assert box.drop_larger(100) == joined[:2]
    assert box.size_bytes == len(joined[2])


@pytest.mark.parametrize("payload", [LOOKS_LIKE_PROTOCOL, b"", b"\r\n" * 50])
def test_a_payload_that_looks_like_protocol_is_not_taken_for_a_size(payload: bytes) -> None:
    box = Outbox(BUFFER)
    frame = encode_pub(b"a", b"1000", None, payload)
    box.try_put(frame + frame)
    assert box.drop_larger(100) == []
    assert box.drop_larger(max(0, len(payload) - 1)) == ([frame + frame] if payload else [])


def test_dropping_makes_room_in_the_buffer() -> None:
    large = pub("x", 200)
    box = Outbox(len(large))
    box.try_put(large)
    box.drop_larger(100)
    assert box.try_put(pub("x", 100))


def test_a_link_that_came_to_nothing_leaves_a_buffer_as_before() -> None:
    box = Outbox(2 * len(pub("1")))
    box.try_put(pub("1"))
    box.attach([SUB])
    box.detach()
    assert not box.put_now(SUB)
    box.try_put(pub("2"))
    with pytest.raises(ReconnectBufferFull):
        box.try_put(pub("3"))
    box.attach([b"SUB b 2\r\n"])
    assert [box.take(), box.take()] == [b"SUB b 2\r\n", pub("1") + pub("2")]


# -- producers -------------------------------------------------------------------------------------------------------


class Source:
    """A producer of frames, as many at a time as it may; .asked are the shares that it was offered."""

    def __init__(self, *frames: bytes) -> None:
        self.frames = list(frames)
        self.asked: list[int] = []

    def produce(self, parts: list[bytes], most_bytes: int) -> tuple[int, int, bool]:
        self.asked.append(most_bytes)
        size = messages = 0
        while self.frames and size < most_bytes:
            frame = self.frames.pop(0)
            parts.append(frame)
            size += len(frame)
            messages += 1
        return size, messages, bool(self.frames)


class Endless(Source):
    """A producer that always has more."""

    def produce(self, parts: list[bytes], most_bytes: int) -> tuple[int, int, bool]:
        self.asked.append(most_bytes)
        parts.append(bytes(most_bytes))
        return most_bytes, 1, True


def test_what_a_producer_gives_is_taken_behind_what_was_put() -> None:
    box, source = attached(), Source(pub("produced"), pub("too"))
    box.ready(source)
    box.try_put(pub("put"))
    assert box.take() == pub("put") + pub("produced") + pub("too")


def test_a_producer_wakes_the_writer() -> None:
    box = attached()
    writer = Waiting(box.take)
    eventually(lambda: box._writer_waits)
    box.ready(Source(pub("1")))
    assert writer.result() == pub("1")


def test_a_producer_is_asked_once_for_each_time_that_it_is_ready() -> None:
    box, source = attached(), Source(pub("1"))
    box.ready(source)
    box.take()
    box.try_put(pub("2"))
    assert box.take() == pub("2")
    assert len(source.asked) == 1
    source.frames.append(pub("3"))
    box.ready(source)
    assert box.take() == pub("3")


def test_a_producer_that_has_nothing_after_all_leaves_the_writer_waiting() -> None:
    box, source = attached(), Source()
    writer = Waiting(box.take)
    box.ready(source)
    eventually(lambda: source.asked and box._writer_waits)
    box.try_put(pub("1"))
    assert writer.result() == pub("1")


def test_a_producer_with_more_is_asked_again_by_itself() -> None:
    frames = [pub(str(n), 100_000) for n in range(30)]
    box = attached()
    box.ready(Source(*frames))
    assert (box.take() or b"") + (box.take() or b"") + (box.take() or b"") == b"".join(frames)


def test_producers_share_a_write() -> None:
    box = attached()
    sources = [Endless() for _ in range(4)]
    for source in sources:
        box.ready(source)
    box.take()
    assert [source.asked for source in sources] == [[WRITE_BYTES // 4]] * 4


def test_each_of_many_producers_gets_its_turn() -> None:
    box = attached()
    sources = [Endless() for _ in range(5 * WRITE_BYTES // PRODUCER_BYTES)]
    for source in sources:
        box.ready(source)
    for _ in range(5):
        assert len(box.take() or b"") == WRITE_BYTES
    assert [source.asked for source in sources] == [[PRODUCER_BYTES]] * len(sources)


def test_a_pong_goes_before_what_producers_have() -> None:
    box = attached()
    box.ready(Endless())
    box.put_first(b"PONG\r\n")
    assert box.take() == b"PONG\r\n"
    assert len(box.take() or b"") == WRITE_BYTES


def test_what_was_produced_is_counted_and_moves_no_position() -> None:
    box = attached()
    box.ready(Source(pub("1"), pub("2")))
    box.take()
    assert (box.produced_messages, box.produced_bytes) == (2, len(pub("1") + pub("2")))
    assert (box.messages, box.position, box.taken) == (0, 0, 0)


def test_a_producer_that_fails_is_logged_and_the_others_are_asked(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Source):
        def produce(self, parts: list[bytes], most_bytes: int) -> tuple[int, int, bool]:
            raise RuntimeError("a fault with one stream")

    box = attached()
    box.ready(Failing())
    box.ready(Source(pub("1")))
    assert box.take() == pub("1")
    assert "a fault with one stream" in caplog.text


def test_producers_wait_for_a_link() -> None:
    box = Outbox(BUFFER)
    box.ready(Source(pub("1")))
    box.attach([SUB])
    assert [box.take(), box.take()] == [SUB, pub("1")]


def test_nothing_of_a_producer_waits_for_the_next_link() -> None:
    box, source = attached(), Source(pub("1"))
    box.ready(source)
    assert box.close() == []
    assert box.take() is None
    assert source.asked == []


@pytest.mark.parametrize("end", [Outbox.close, lambda box: box.seal(SUB)], ids=["closed", "sealed"])
def test_an_outbox_that_is_left_turns_producers_away(end: Callable[[Outbox], Any]) -> None:
    box = attached()
    end(box)
    with pytest.raises(OutboxClosed):
        box.ready(Source())


# -- one that takes over from another ---------------------------------------------------------------------------------


def takes_over(old: Outbox) -> Outbox:
    """The outbox of the next link, which waits for the old one to finish."""
    new = Outbox(BUFFER)
    new.attach([])
    new.hold()
    new.follow(old, old.seal(b"UNSUB 1\r\n"))
    return new


def test_positions_go_on_behind_a_sealed_outbox() -> None:
    old = attached()
    old.try_put(pub("1"))
    new = takes_over(old)
    assert new.position == new.taken == old.position == len(pub("1") + b"UNSUB 1\r\n")


def test_what_a_sealed_outbox_holds_is_still_written_and_what_comes_later_waits_for_that() -> None:
    old = attached()
    old.try_put(pub("1"))
    new = takes_over(old)
    new.try_put(pub("2"))
    writer = Waiting(new.take)
    assert old.take() == pub("1") + b"UNSUB 1\r\n"
    eventually(lambda: new._writer_waits)
    assert not writer.outcome
    new.release()
    assert writer.result() == pub("2")


def test_producers_of_a_sealed_outbox_are_asked_by_the_one_that_takes_over() -> None:
    old, source = attached(), Source(pub("1"))
    old.ready(source)
    new = takes_over(old)
    assert old.take() == b"UNSUB 1\r\n"
    assert source.asked == []
    new.release()
    assert new.take() == pub("1")


def test_a_held_outbox_asks_no_producer() -> None:
    source = Source(pub("1"))
    new = takes_over(attached())
    new.ready(source)
    new.put_first(b"PONG\r\n")
    assert new.take() == b"PONG\r\n"
    assert source.asked == []
    new.release()
    assert new.take() == pub("1")


def test_a_producer_that_is_being_asked_while_another_link_takes_over_goes_on_there() -> None:
    news: list[Outbox] = []

    class Overtaken(Source):
        def produce(self, parts: list[bytes], most_bytes: int) -> tuple[int, int, bool]:
            if not news:
                news.append(takes_over(old))
            return super().produce(parts, 1)

    old, source = attached(), Overtaken(pub("1"), pub("2"), pub("3"))
    old.ready(source)
    written = (old.take() or b"") + (old.take() or b"")  # whether the old link asks once more is its own affair
    old.close()
    news[0].release()
    while source.frames:
        written += Waiting(news[0].take).result()
    assert written.replace(b"UNSUB 1\r\n", b"") == pub("1") + pub("2") + pub("3")


# -- threads ---------------------------------------------------------------------------------------------------------


def test_threads_that_put_at_once_lose_tear_and_double_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One writer, eight publishers, a small high-water mark, and a link that is lost every now and then."""
    monkeypatch.setattr(outbox_module, "HIGH_WATER_BYTES", 20_000)
    monkeypatch.setattr(outbox_module, "WRITE_BYTES", 5_000)
    each, publishers = 400, 8
    present, lock, over = [attached()], threading.Lock(), threading.Event()

    def publish(who: int) -> None:
        for n in range(each):
            frame = encode_pub(b"s.%d" % who, None, None, b"%d " % n + b"x" * (37 * n % 500))
            while True:
                try:
                    if present[0].try_put(frame):
                        break
                    present[0].wait_room(Deadline.after(10))
                except OutboxClosed:
                    with lock:
                        pass

    written: list[bytes] = []

    def write() -> None:
        while (data := present[0].take()) is not None:
            written.append(data)
            if len(written) % 7 == 0:
                with lock:
                    if over.is_set():
                        continue
                    old = present[0]
                    present[0] = Outbox(BUFFER, old.close(), old.position)
                    present[0].attach([])

    writer = Waiting(write)
    threads = [threading.Thread(target=publish, args=(who,), daemon=True) for who in range(publishers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    eventually(lambda: present[0].size_bytes == 0, 10)
    with lock:
        over.set()
        present[0].close()
    writer.result()
    got: dict[bytes, list[int]] = {}
    for request in RequestParser().feed(b"".join(written)):
        assert isinstance(request, Pub)
        got.setdefault(request.subject, []).append(int(request.payload.split(b" ")[0]))
    assert got == {b"s.%d" % who: list(range(each)) for who in range(publishers)}


def test_a_writer_never_misses_what_is_put_as_it_falls_asleep() -> None:
    box = attached()
    taken: list[bytes] = []

    def write() -> None:
        while (data := box.take()) is not None:
            taken.append(data)

    writer = Waiting(write)
    total = 0
    for n in range(2000):
        total += len(pub(str(n)))
        box.try_put(pub(str(n)))
        if n % 3 == 0:
            eventually(lambda: box.size_bytes == 0)
    eventually(lambda: sum(map(len, taken)) == total)
    box.close()
    writer.result()
