"""Framed mode at the requester: natsync.Client against a responder that speaks the protocol by hand.

The request, which responder it is bound to, what is confirmed and credited, and frames that go astray or make no sense.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import natsync
from broker import Outcome
from framed import SUBJECT, Answer, Table, account, batch, block, chunks, failure, take
from natsync import timers
from natsync.streaming import calls, framed_receiver, peers
from natsync.testing import NatsServer, eventually
from rawclient import END, ERROR, PATIENCE

#: The credit in bytes that the first stream of a connection asks for, and what it gives once it is answered.
FIRST_BYTES, BYTES = 4 << 20, 4 << 20
#: Seconds within which the timers that are measured go off, on a busy machine.
EARLY, LATE = 0.9, 3.0


@pytest.fixture
def table(nats_server: NatsServer) -> Iterator[Table]:
    table = Table(nats_server.url)
    yield table
    table.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that is not answered counts as a sign of death after 0.3 s already."""
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 0.3)


# -- the request -----------------------------------------------------------------------------------------------------


def test_the_offer_says_version_windows_grace_heartbeat_and_that_batches_are_taken(table: Table) -> None:
    stream = table.client().stream(SUBJECT, b"question")
    request = table.request()
    assert request.block == b"NATS/1.0\r\nNatsync-Stream: 1;w=8192;b=4194304;g=10000;hb=5000;m=67108864;cap=b\r\n\r\n"
    assert request.payload == b"question"
    assert stream.mode is None
    stream.close()


def test_the_offer_says_what_the_options_are(table: Table) -> None:
    client = table.client(resume_grace=1.5, heartbeat=0.25, max_message_bytes=5_000_000)
    stream = client.stream(SUBJECT, window=7)
    request = table.request()
    assert request.block == b"NATS/1.0\r\nNatsync-Stream: 1;w=7;b=4194304;g=1500;hb=250;m=5000000;cap=b\r\n\r\n"
    stream.close()


def test_the_users_headers_stand_in_front_and_the_time_left_is_relative(table: Table) -> None:
    stream = table.client().stream(SUBJECT, headers={"X-Own": "1"}, timeout=30)
    request = table.request()
    found = re.fullmatch(
        rb"NATS/1\.0\r\nX-Own: 1\r\nNatsync-Stream: 1;[^\r]*\r\nNatsync-Timeout: (\d+)\r\n\r\n", request.block or b""
    )
    assert found is not None
    assert 20_000 < int(found[1]) <= 30_000
    stream.close()


def test_each_stream_has_an_inbox_of_its_own_under_one_subscription(table: Table) -> None:
    client = table.client()
    first, second = client.stream(SUBJECT), client.stream(SUBJECT)
    inboxes = [table.answer().inbox for _ in range(2)]
    assert inboxes[0] != inboxes[1]
    assert inboxes[0].rpartition(b".")[0] == inboxes[1].rpartition(b".")[0]
    first.close(), second.close()


def test_a_client_that_speaks_plain_with_everybody_offers_nothing(table: Table) -> None:
    stream = table.client(framed=False).stream(SUBJECT)
    request = table.request()
    assert b"Natsync-Stream: 1" not in (request.block or b"")
    table.raw.answer(request, END)
    assert list(stream) == []


def test_streams_ask_for_less_the_more_there_are_and_for_64_kib_at_least(table: Table) -> None:
    client = table.client()
    streams = [client.stream(SUBJECT) for _ in range(120)]
    asked = [int(re.findall(rb";b=(\d+);", table.request().block or b"")[0]) for _ in streams]
    assert asked == sorted(asked, reverse=True)
    assert (asked[0], asked[-1]) == (FIRST_BYTES, 64 << 10)
    assert sum(size for size in asked if size > 64 << 10) <= 32 << 20
    for stream in streams:
        stream.close()


def test_all_streams_of_a_connection_together_give_credit_for_32_mib(table: Table) -> None:
    client = table.client()
    streams = [client.stream(SUBJECT) for _ in range(20)]
    answers = [table.answer() for _ in streams]
    given = []
    for answer in answers:
        answer.send("a", 0)
        answer.until(b"+0 ")
    for answer in answers:
        answer.send("h", 0)
        given.append(account(answer.until(b"+0 "))[3])
    assert sum(given) <= 32 << 20
    for answer in answers:
        answer.send("e", 1, END)
    for stream in streams:
        assert list(stream) == []


# -- which responder -------------------------------------------------------------------------------------------------


def test_a_framed_answer_makes_the_stream_framed(table: Table) -> None:
    stream, answer = table.open()
    answer.send("d", 1, b"one")
    assert stream.next(PATIENCE) == b"one"
    assert stream.mode == "framed"


def test_a_chunk_makes_the_stream_framed_even_if_accept_was_lost(table: Table) -> None:
    stream = table.client().stream(SUBJECT)
    answer = table.answer()
    answer.send_all(*chunks(1, 2), ("e", 3, END))
    assert list(stream) == [b"c1", b"c2"]
    assert stream.mode == "framed"


def test_a_number_in_a_header_makes_the_stream_framed_too(table: Table) -> None:
    stream = table.client().stream(SUBJECT)
    answer = table.answer()
    for op, payload in (("d.1", b"one"), ("e.2", END)):
        head = block(Natsync_Seq=f"{op} {answer.stream.decode()}")
        table.raw.publish(answer.inbox, payload, answer.stream + b".x.y", head)
    assert list(stream) == [b"one"]
    assert stream.mode == "framed"
    assert stream.trailers == {}


def test_a_plain_answer_to_the_offer_makes_the_stream_plain(table: Table) -> None:
    stream = table.client().stream(SUBJECT)
    table.raw.answer(table.request(), b"one", END)
    assert list(stream) == [b"one"]
    assert stream.mode == "plain"


def test_the_first_framed_responder_is_bound_to_and_the_other_told_that_it_is_taken(table: Table) -> None:
    stream, first = table.open()
    second = table.answer(first.request)
    second.send_all(("a", 0, b""), ("d", 1, b"not this"))
    assert re.fullmatch(rb"x \d+ taken.*", second.control())
    first.send_all(("d", 1, b"this"), ("e", 2, END))
    assert list(stream) == [b"this"]


def test_another_responder_that_ends_first_does_not_end_the_stream(table: Table) -> None:
    stream, first = table.open()
    second = table.answer(first.request)
    second.send_all(("e", 1, END))
    second.control()
    first.send_all(("d", 1, b"this"), ("e", 2, END))
    assert list(stream) == [b"this"]


def test_another_responders_chunk_behind_the_end_is_not_confirmed_as_if_it_had_been_read(table: Table) -> None:
    stream, first = table.open()
    first.send("e", 1, END)
    assert list(stream) == []
    second = table.answer(first.request)
    second.send_all(("a", 0, b""), ("d", 1, b"not this"))
    assert second.control().startswith(b"x ")


REFUSAL: dict[str, str] = {"Natsync_Status": "8 RESOURCE_EXHAUSTED", "Natsync_Retry_After": "1.5"}


def test_a_refusal_does_not_count_if_another_responder_accepts_within_a_moment(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(framed_receiver, "SECOND_OPINION_SECONDS", 5.0)
    stream = table.client().stream(SUBJECT)
    refusing = table.answer()
    accepting = table.answer(refusing.request)
    table.raw.sock.sendall(
        refusing.encode("r", 0, ERROR + b"full", block(**REFUSAL))
        + accepting.encode("a", 0)
        + accepting.encode("d", 1, b"one")
        + accepting.encode("e", 2, END)
    )
    assert list(stream) == [b"one"]


@contextlib.contextmanager
def no_timer() -> Iterator[None]:
    """The timer's thread is held up, as if frozen: the only looks are the test's."""
    held, go_on = threading.Event(), threading.Event()
    timers.schedule_after(0, lambda: (held.set(), go_on.wait(PATIENCE)))  # type: ignore[arg-type, return-value]
    try:
        assert held.wait(PATIENCE)
        yield
    finally:
        go_on.set()


def refused_late(answer: Answer, stream: natsync.Stream) -> Callable[[], None]:
    """Have the responder refuse; returns a look at that which comes an hour late."""
    receiver = stream._call._offered
    assert receiver is not None
    answer.send("r", 0, ERROR + b"full", block(**REFUSAL))
    eventually(lambda: receiver.refusing)

    def look() -> None:
        receiver._refusal_due -= 3600
        receiver._look()

    return look


def test_a_refusal_that_is_looked_at_late_leaves_another_responder_its_moment(table: Table) -> None:
    """The process was frozen meanwhile, and what another one said was not read yet."""
    stream = table.client().stream(SUBJECT)
    refusing = table.answer()
    accepting = table.answer(refusing.request)
    with no_timer():
        look = refused_late(refusing, stream)
        look()
        assert not stream._call.over
        accepting.send_all(("d", 1, b"c1"), ("e", 2, END))
        assert list(stream) == [b"c1"]


def test_a_process_that_is_late_all_the_time_learns_of_a_refusal(table: Table) -> None:
    stream = table.client().stream(SUBJECT)
    refusing = table.answer()
    with no_timer():
        look = refused_late(refusing, stream)
        for over in (False, True):
            look()
            assert stream._call.over is over
    with pytest.raises(natsync.StreamRefused):
        list(stream)


def test_a_refusal_counts_if_nobody_accepts(table: Table) -> None:
    stream = table.client().stream(SUBJECT)
    table.answer().send("r", 0, ERROR + b"full", block(**REFUSAL))
    error = failure(stream)
    assert isinstance(error, natsync.StreamRefused)
    assert (error.message, error.retry_after, error.code) == ("full", 1.5, 8)


def test_a_refusal_by_the_only_responder_is_final(table: Table) -> None:
    stream = table.client().stream(SUBJECT)
    answer = table.answer()
    answer.send("r", 0, ERROR + b"full", block(Natsync_Only="1", **REFUSAL))
    assert isinstance(failure(stream), natsync.StreamRefused)


def test_a_refusal_is_confirmed(table: Table) -> None:
    stream = table.client().stream(SUBJECT)
    answer = table.answer()
    answer.send("r", 0, ERROR + b"full", block(**REFUSAL))
    failure(stream)
    assert account(answer.control())[:2] == (b"+", 0)


def test_a_refusal_that_is_repeated_is_confirmed_again(table: Table) -> None:
    stream = table.client().stream(SUBJECT)
    answer = table.answer()
    answer.send("r", 0, ERROR + b"full", block(Natsync_Only="1", **REFUSAL))
    failure(stream)
    answer.control()
    answer.send("r", 0, ERROR + b"full", block(Natsync_Only="1", **REFUSAL))
    assert account(answer.control())[:2] == (b"+", 0)


# -- frames that go astray -------------------------------------------------------------------------------------------


def test_a_gap_is_complained_of_once(table: Table) -> None:
    stream, answer = table.open()
    begin = time.monotonic()
    answer.send_all(("d", 1, b"c1"), ("d", 3, b"c3"), ("d", 4, b"c4"))
    assert account(answer.until(b"!")) == (b"!", 1, 8192, BYTES)
    answer.send("d", 5, b"c5")
    answer.send("h", 1)  # is answered behind what the chunk had to be answered with
    answer.until(b"+")
    repeated = [said for said in answer.controls() if said.startswith(b"!")]
    assert not repeated or time.monotonic() - begin >= 0.25
    answer.send_all(*chunks(2, 5), ("e", 6, END))
    assert list(stream) == [b"c1", b"c2", b"c3", b"c4", b"c5"]


def test_a_complaint_is_repeated_after_a_quarter_of_a_second_and_then_twice_that(table: Table) -> None:
    stream, answer = table.open()
    times = []
    begin = time.monotonic()
    answer.send_all(("d", 2, b"c2"))
    while len(times) < 3:
        assert answer.until(b"!").startswith(b"!0 ")
        times.append(time.monotonic())
    assert times[1] - begin >= 0.25 * EARLY
    assert times[2] - begin >= 0.75 * EARLY
    assert stream.stats["gaps"] == 1


def test_a_complaint_is_not_repeated_once_the_stream_goes_on(table: Table) -> None:
    stream, answer = table.open()
    answer.send("d", 2, b"c2")
    answer.until(b"!")
    answer.send_all(*chunks(1, 2))
    assert take(stream, 2) == [b"c1", b"c2"]
    assert answer.until(b"+2 ")
    answer.controls()
    with pytest.raises(TimeoutError):
        answer.control(timeout=0.6)


def test_chunks_come_in_order_whatever_was_lost_doubled_and_mixed_up(table: Table) -> None:
    stream, answer = table.open()
    for number in (1, 2, 2, 4, 1, 3, 5, 3, 4, 6, 5, 6, 7):
        answer.send("d", number, b"c%d" % number)
    answer.send_all(*chunks(4, 7), ("e", 8, END))
    assert list(stream) == [b"c%d" % number for number in range(1, 8)]
    assert stream.stats["gaps"] >= 1
    assert stream.stats["resent"] >= 5


def test_a_chunk_that_comes_twice_is_confirmed_and_dropped(table: Table) -> None:
    stream, answer = table.open()
    answer.send("d", 1, b"c1")
    answer.until(b"+1 ")
    answer.send("d", 1, b"c1")
    assert account(answer.control())[:2] == (b"+", 1)
    answer.send("e", 2, END)
    assert list(stream) == [b"c1"]


def test_a_batch_that_straddles_what_has_come_is_trimmed(table: Table) -> None:
    stream, answer = table.open()
    answer.send_all(("d", 1, b"c1"), ("d", 2, b"c2"), ("b", 1, batch(b"c1", b"c2", b"c3", b"c4")), ("e", 5, END))
    assert list(stream) == [b"c1", b"c2", b"c3", b"c4"]


def test_a_batch_that_has_come_before_is_dropped(table: Table) -> None:
    stream, answer = table.open()
    frame = ("b", 1, batch(b"c1", b"c2"))
    answer.send_all(frame, frame, ("d", 3, b"c3"), ("e", 4, END))
    assert list(stream) == [b"c1", b"c2", b"c3"]


def test_the_chunks_of_a_batch_may_be_empty(table: Table) -> None:
    stream, answer = table.open()
    answer.send_all(("b", 1, batch(b"", b"x", b"")), ("e", 4, END))
    assert list(stream) == [b"", b"x", b""]


def test_a_batch_may_have_one_chunk(table: Table) -> None:
    stream, answer = table.open()
    answer.send_all(("b", 1, batch(b"x")), ("e", 2, END))
    assert list(stream) == [b"x"]


def test_fragments_are_one_chunk(table: Table) -> None:
    stream, answer = table.open()
    answer.send_all(("f", 1, b"a"), ("f", 2, b"b"), ("d", 3, b"c"), ("d", 4, b"next"), ("e", 5, END))
    assert list(stream) == [b"abc", b"next"]


def test_a_lost_fragment_is_complained_of_and_the_chunk_whole_in_the_end(table: Table) -> None:
    stream, answer = table.open()
    answer.send_all(("f", 1, b"a"), ("d", 3, b"c"))
    assert answer.until(b"!").startswith(b"!1 ")
    answer.send_all(("f", 2, b"b"), ("d", 3, b"c"), ("e", 4, END))
    assert list(stream) == [b"abc"]


def test_a_lost_tail_is_found_by_a_probe(table: Table) -> None:
    stream, answer = table.open()
    answer.send("d", 1, b"c1")
    answer.until(b"+1 ")
    answer.send("h", 3)  # 2 and 3 were lost
    assert account(answer.control())[:2] == (b"!", 1)
    answer.send_all(("d", 2, b"c2"), ("e", 3, END))
    assert list(stream) == [b"c1", b"c2"]


def test_a_lost_end_is_found_by_a_probe(table: Table) -> None:
    stream, answer = table.open()
    answer.send("h", 1)
    assert answer.until(b"!").startswith(b"!0 ")
    answer.send("e", 1, END)
    assert list(stream) == []


def test_a_probe_is_answered_by_an_account(table: Table) -> None:
    _, answer = table.open(window=8)
    answer.send("h", 0)
    assert answer.control() == b"+0 8 %d" % BYTES


def test_a_control_message_has_the_streams_inbox_as_reply_subject(table: Table) -> None:
    _, answer = table.open()
    answer.send("h", 0)
    message = answer.message()
    assert (message.subject, message.reply, message.block) == (answer.stream + b".h.0", answer.inbox, None)


def test_a_chunk_equal_to_a_sentinel_is_data(table: Table) -> None:
    stream, answer = table.open()
    answer.send_all(("d", 1, END), ("d", 2, ERROR + b"no"), ("e", 3, END))
    assert list(stream) == [END, ERROR + b"no"]


def test_the_op_ends_the_stream_whatever_the_payload(table: Table) -> None:
    stream, answer = table.open()
    answer.send("e", 1, b"not the sentinel")
    assert list(stream) == []


# -- confirming ------------------------------------------------------------------------------------------------------


def test_the_end_is_confirmed(table: Table) -> None:
    _, answer = table.open()
    answer.send_all(("d", 1, b"c1"), ("e", 2, END))
    assert answer.until(b"+2 ")


def test_an_error_end_is_confirmed(table: Table) -> None:
    _, answer = table.open()
    answer.send("x", 1, ERROR + b"boom", block(Natsync_Status="2 UNKNOWN"))
    assert answer.until(b"+1 ")


def test_whatever_came_is_confirmed_within_a_moment(table: Table) -> None:
    _, answer = table.open()
    begin = time.monotonic()
    answer.send("d", 1, b"c1")
    assert answer.until(b"+1 ")
    assert time.monotonic() - begin < 5


def test_accept_is_confirmed_within_a_moment(table: Table) -> None:
    stream = table.client().stream(SUBJECT)
    answer = table.answer()
    begin = time.monotonic()
    answer.send("a", 0)
    assert account(answer.control())[:3] == (b"+", 0, 8192)
    assert time.monotonic() - begin < 5
    stream.close()


def test_many_chunks_are_confirmed_together(table: Table) -> None:
    _, answer = table.open()
    begin = time.monotonic()
    for number in range(1, 101):
        answer.send("d", number, b"x")
    assert answer.until(b"+100 ")
    assert len(answer.controls()) <= 5 + (time.monotonic() - begin) / 0.2


def test_an_ended_stream_confirms_its_end_again(table: Table) -> None:
    stream, answer = table.open()
    answer.send_all(("d", 1, b"c1"), ("e", 2, END))
    assert list(stream) == [b"c1"]
    answer.until(b"+2 ")
    answer.send("h", 2)
    assert account(answer.control())[:2] == (b"+", 2)


def test_an_unknown_stream_is_cancelled_with_410(table: Table) -> None:
    _, answer = table.open()
    answer.inbox = answer.inbox.rpartition(b".")[0] + b".999999"
    answer.send("d", 1, b"c1")
    assert answer.control().startswith(b"x 410 ")


def test_an_unknown_stream_does_not_answer_that_it_is_not_known_there_either(table: Table) -> None:
    _, answer = table.open()
    known, answer.inbox = answer.inbox, answer.inbox.rpartition(b".")[0] + b".999999"
    answer.send("x", 0)
    answer.inbox = known
    answer.send("h", 0)
    assert answer.control().startswith(b"+0 ")


# -- credit ----------------------------------------------------------------------------------------------------------


def test_credit_is_given_once_a_quarter_of_the_window_is_consumed(table: Table) -> None:
    stream, answer = table.open(window=8)
    answer.send_all(*chunks(1, 8))
    assert answer.until(b"+8 8 ") == b"+8 8 %d" % BYTES
    # Two are taken from the queue at once, or one that came alone: two or three are done with when it is noticed.
    assert take(stream, 4) == [b"c1", b"c2", b"c3", b"c4"]
    _, _, limit, limit_bytes = account(answer.until(b"+8 1"))
    assert (limit in (10, 11), limit_bytes) == (True, BYTES + 2 * (limit - 8))


def test_no_credit_is_given_while_the_consumer_does_not_read(table: Table) -> None:
    stream, answer = table.open(window=8)
    answer.send_all(*chunks(1, 8))
    answer.until(b"+8 ")
    answer.controls()  # those of before
    for _ in range(3):
        answer.send("h", 8)
        assert answer.control() == b"+8 8 %d" % BYTES
    assert take(stream, 1) == [b"c1"]


def test_a_consumer_that_reads_on_gets_a_long_stream_through_a_small_window(table: Table) -> None:
    stream, answer = table.open(window=4)
    got = Outcome(lambda: list(stream))
    limit, number = 4, 0
    while number < 50:
        while number < min(limit, 50):
            number += 1
            answer.send("d", number, b"%d" % number)
        if number < 50:
            limit = max(limit, account(answer.control())[2])
    answer.send("e", 51, END)
    assert got.within(PATIENCE) is None
    assert got.value == [b"%d" % one for one in range(1, 51)]


def test_credit_is_given_once_a_quarter_of_the_bytes_is_consumed(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "WINDOW_BYTES", 64 << 10)
    stream, answer = table.open()
    size = 16 << 10
    answer.send_all(*(("d", number, b"x" * size) for number in range(1, 5)))
    answer.until(b"+4 ")
    answer.controls()  # those of before
    take(stream, 1)
    with pytest.raises(TimeoutError):  # nothing was done with yet
        answer.control(timeout=0.3)
    take(stream, 3)
    with pytest.raises(natsync.TimedOut):
        stream.next(timeout=0)
    assert account(answer.until(b"+4 "))[3] > 64 << 10


def test_fragments_are_credited_as_they_come(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "WINDOW_BYTES", 64 << 10)
    stream, answer = table.open()
    size, limit = 16 << 10, 64 << 10
    for number in range(1, 13):
        while number * size > limit:
            limit = max(limit, account(answer.control())[3])
        answer.send("f", number, b"%x" % (number % 10) * size)
    while 13 * size > limit:
        limit = max(limit, account(answer.control())[3])
    answer.send("d", 13, b"z")
    assert len(stream.next(PATIENCE)) == 12 * size + 1


def test_a_responder_that_sends_more_chunks_than_it_may_fails_the_stream_and_is_told(table: Table) -> None:
    client = table.client()
    stream, answer = table.open(client, window=4)
    answer.send_all(*chunks(1, 5))
    assert answer.until(b"x ").startswith(b"x 13 ")  # before a chunk is taken, which would allow another
    error = failure(stream)
    assert (type(error), error.code, error.last_seq) == (natsync.StreamError, natsync.Code.INTERNAL, 4)
    client.flush()


def test_a_responder_that_sends_more_bytes_than_it_may_fails_the_stream(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "WINDOW_BYTES", 64 << 10)
    stream, answer = table.open()
    answer.send_all(("d", 1, b"x" * (64 << 10)), ("d", 2, b"y"))
    assert answer.until(b"x ")  # before a chunk is taken, which would allow more
    assert failure(stream).last_seq == 1


def test_a_batch_beyond_the_credit_fails_the_stream(table: Table) -> None:
    stream, answer = table.open(window=2)
    answer.send("b", 1, batch(b"a", b"b", b"c"))
    assert failure(stream).code == natsync.Code.INTERNAL


def test_a_chunk_in_fragments_larger_than_max_message_bytes_fails_the_stream(table: Table) -> None:
    stream, answer = table.open(table.client(max_message_bytes=1000))
    answer.send_all(("f", 1, b"x" * 600), ("f", 2, b"x" * 300), ("d", 3, b"x" * 101))
    error = failure(stream)
    assert error.code == natsync.Code.INTERNAL
    assert "1000" in str(error)


# -- nonsense --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "seq", "payload"),
    [
        ("b", 1, b""),
        ("b", 1, b"\0\0\0\0"),
        ("b", 1, b"\0" * 8),
        ("b", 1, b"\0\0\0\1\0\0\0\5abc"),
        ("b", 1, b"\0\0\0\1\0\0\0\1abc"),
        ("b", 1, b"\xff\xff\xff\xffabcdefgh"),
        ("z", 1, b""),
        ("dd", 1, b""),
        ("d", "x", b""),
        ("d", "1.2", b""),
    ],
)
def test_a_malformed_frame_fails_its_stream_and_not_the_connection(
    table: Table, op: str, seq: int | str, payload: bytes
) -> None:
    client = table.client()
    stream, answer = table.open(client)
    answer.send(op, seq, payload)
    error = failure(stream)
    assert (type(error), error.code) == (natsync.StreamError, natsync.Code.INTERNAL)
    assert answer.until(b"x ")
    client.flush()
    assert client.stats()["reconnects"] == 0


@pytest.mark.parametrize("seq", ["-1", "1_0", "9" * 100, "0", "007"])
def test_a_chunk_with_an_odd_number_is_not_taken_for_another(table: Table, seq: str) -> None:
    stream, answer = table.open()
    answer.send_all(*chunks(1, 2))
    answer.send("d", seq, b"odd")
    answer.send_all(("e", 3, END))
    got = []
    with contextlib.suppress(natsync.StreamError):
        got.extend(stream)
    assert b"odd" not in got


def test_an_end_within_a_chunk_fails_the_stream(table: Table) -> None:
    stream, answer = table.open()
    answer.send_all(("f", 1, b"a"), ("e", 2, END))
    assert failure(stream).code == natsync.Code.INTERNAL


def test_a_batch_within_a_chunk_fails_the_stream(table: Table) -> None:
    stream, answer = table.open()
    answer.send_all(("f", 1, b"a"), ("b", 2, batch(b"b", b"c")))
    assert failure(stream).code == natsync.Code.INTERNAL


def test_the_other_streams_of_a_client_go_on_after_a_malformed_frame(table: Table) -> None:
    client = table.client()
    bad, first = table.open(client)
    good, second = table.open(client)
    first.send("b", 1, b"no batch")
    failure(bad)
    second.send_all(("d", 1, b"c1"), ("e", 2, END))
    assert list(good) == [b"c1"]


def test_chunks_in_front_of_a_malformed_frame_are_handed_out(table: Table) -> None:
    stream, answer = table.open()
    answer.send_all(*chunks(1, 2), ("b", 3, b""))
    assert take(stream, 2) == [b"c1", b"c2"]
    assert failure(stream).last_seq == 2
