"""Framed mode at the responder: natsync.Subscriber against a requester that speaks the protocol by hand.

The bytes of every frame, credit, and what is sent again, whatever the requester loses, doubles, mixes up or invents.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator

import pytest

import natsync
from broker import Outcome
from framed import OFFER, Bench, batch, bench_on, fill, offer, sent
from natsync.streaming import peers
from natsync.streaming.framed_sender import FramedSender
from natsync.testing import NatsServer, eventually
from rawclient import END, ERROR, PATIENCE

Make = Callable[..., NatsServer]

#: Seconds within which the timers that are measured go off, on a busy machine.
EARLY, LATE = 0.9, 3.0


@pytest.fixture
def bench(nats_server: NatsServer) -> Iterator[Bench]:
    with bench_on(nats_server.url) as bench:
        yield bench


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that is not answered counts as a sign of death after 0.3 s already."""
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 0.3)


# -- the bytes of frames ---------------------------------------------------------------------------------------------


def test_accept_is_an_empty_message_with_the_mark_and_number_0(bench: Bench) -> None:
    asker = bench.ask(bench.hold())
    message = asker.message()
    assert re.fullmatch(rb"_INBOX\.[0-9A-Za-z]+\.nsy1\.\d+\.a\.0", message.reply or b"")
    assert (message.block, message.payload) == (None, b"")


def test_a_chunk_is_a_bare_message_numbered_from_1(bench: Bench) -> None:
    asker, sender = bench.open()
    stream = (asker.control or b"").removesuffix(b".a.0")
    sender.send(b"one")
    sender.send(b"two")
    assert [(one.stream, one.key, one.block, one.payload) for one in asker.frames(2)] == [
        (stream, (b"d", 1), None, b"one"),
        (stream, (b"d", 2), None, b"two"),
    ]


def test_the_inbox_prefix_of_the_responder_is_that_of_its_control_subjects(bench: Bench) -> None:
    asker = bench.ask(bench.hold(inbox_prefix="private.box"))
    assert re.fullmatch(rb"private\.box\.[0-9A-Za-z]+\.nsy1\.\d+\.a\.0", asker.message().reply or b"")


def test_a_large_chunk_goes_in_fragments_of_a_quarter_of_the_byte_window(bench: Bench) -> None:
    asker, sender = bench.open(offer(b=4096))
    sender.send(b"a" * 1024 + b"b" * 1024 + b"c" * 452)
    assert [(frame.key, frame.block, frame.payload) for frame in asker.frames(3)] == [
        ((b"f", 1), None, b"a" * 1024),
        ((b"f", 2), None, b"b" * 1024),
        ((b"d", 3), None, b"c" * 452),
    ]


def test_fragments_count_as_one_chunk(bench: Bench) -> None:
    _, sender = bench.open(offer(b=4096))
    assert [sender.send(b"a" * 2500), sender.send(b"b")] == [1, 2]
    assert sender.send_count == 2


def test_chunks_that_leave_together_are_a_batch_with_their_lengths_in_front(bench: Bench) -> None:
    asker, sender = bench.open(offer(cap="b"))
    sender.send_many([b"a", b"", b"bcd"])
    (frame,) = asker.frames(1)
    assert frame.key == (b"b", 1)
    assert frame.payload == b"\0\0\0\3\0\0\0\1\0\0\0\0\0\0\0\3abcd"


def test_the_chunk_behind_a_batch_has_the_number_that_follows_the_batchs_last(bench: Bench) -> None:
    asker, sender = bench.open(offer(cap="b"))
    sender.send_many([b"a", b"b", b"c"])
    asker.next()
    sender.send(b"d")
    assert asker.next().key == (b"d", 4)


def test_there_are_no_batches_for_a_requester_that_does_not_offer_to_take_them(bench: Bench) -> None:
    asker, sender = bench.open(offer(cap=""))
    sender.send_many([b"a", b"b", b"c"])
    assert [(frame.key, frame.payload) for frame in asker.frames(3)] == [
        ((b"d", 1), b"a"),
        ((b"d", 2), b"b"),
        ((b"d", 3), b"c"),
    ]


def test_seeing_to_chunks_that_have_arrived_meanwhile_is_no_error(bench: Bench) -> None:
    """Between a send() and its look at what waits, the timer may have had all sent, and the requester have it."""
    asker, sender = bench.open(offer(cap="b"))
    sender.send_many([b"a", b"b"])
    asker.next()
    asker.say(b"+2 10 65536")
    core = sender._core
    eventually(lambda: not core._out.kept)  # type: ignore[attr-defined]
    for _ in range(10):
        core.see_to_it()
    assert sender.send(b"c") == 3
    assert asker.next().key == (b"d", 3)


def test_the_end_has_a_number_and_the_sentinel_for_people_who_watch(bench: Bench) -> None:
    asker, sender = bench.open()
    sender.send(b"one")
    sender.end()
    asker.next()
    end = asker.next()
    assert (end.key, end.block, end.payload) == ((b"e", 2), None, END)


def test_trailers_are_the_headers_of_the_end(bench: Bench) -> None:
    asker, sender = bench.open()
    sender.end(trailers={"X-Count": "3"})
    end = asker.next()
    assert (end.key, end.block, end.payload) == ((b"e", 1), b"NATS/1.0\r\nX-Count: 3\r\n\r\n", END)


def test_an_error_end_says_code_details_and_text_in_headers_too(bench: Bench) -> None:
    asker, sender = bench.open()
    sender.send(b"one")
    sender.send_error("boom", code=8, details={"a": [1]})
    asker.next()
    error = asker.next()
    assert (error.key, error.payload) == ((b"x", 2), ERROR + b"boom")
    assert error.headers == {
        "Natsync-Status": "8 RESOURCE_EXHAUSTED",
        "Natsync-Details": '{"a": [1]}',
        "Nats-Service-Error": "boom",
        "Nats-Service-Error-Code": "8",
    }


def test_details_without_a_json_form_do_not_keep_the_error_back(bench: Bench) -> None:
    asker, sender = bench.open()
    sender.send_error("boom", details=object())
    error = asker.next()
    assert error.key == (b"x", 1)
    assert isinstance(json.loads(error.headers["Natsync-Details"]), str)


def test_one_stream_too_many_is_refused_and_told_when_to_come_again(bench: Bench) -> None:
    held = bench.hold(max_streams=1)
    bench.open(held=held)
    refusal = bench.ask(held).frame()
    assert refusal.key == (b"r", 0)
    assert refusal.payload.startswith(ERROR)
    assert refusal.headers["Natsync-Status"] == "8 RESOURCE_EXHAUSTED"
    assert float(refusal.headers["Natsync-Retry-After"]) > 0
    assert "Natsync-Only" not in refusal.headers


def test_a_refusal_by_a_member_of_a_queue_group_says_that_nobody_else_was_asked(bench: Bench) -> None:
    held = bench.hold(max_streams=1, queue="workers")
    bench.open(held=held)
    refusal = bench.ask(held).frame()
    assert (refusal.key, "Natsync-Only" in refusal.headers) == ((b"r", 0), True)


def test_a_ping_is_answered_by_a_bare_probe_that_says_how_far_was_sent(bench: Bench) -> None:
    asker, sender = bench.open()
    sender.send(b"one")
    sender.send(b"two")
    asker.frames(2)
    asker.say(b"?")
    probe = asker.probe()
    assert (probe.key, probe.block, probe.payload) == ((b"h", 2), None, b"")


def test_a_probe_uses_up_no_number(bench: Bench) -> None:
    asker, sender = bench.open()
    assert asker.ping() == 0
    sender.send(b"one")
    assert asker.next().key == (b"d", 1)


def test_headers_go_with_the_first_chunk_and_not_in_a_batch(bench: Bench) -> None:
    asker, sender = bench.open(offer(cap="b"))
    sender.set_header("X-Model", "m")
    sender.send_many([b"a", b"b", b"c"])
    first, rest = asker.frames(2)
    assert (first.key, first.block, first.payload) == ((b"d", 1), b"NATS/1.0\r\nX-Model: m\r\n\r\n", b"a")
    assert (rest.key, rest.block, rest.payload) == ((b"b", 2), None, batch(b"b", b"c"))


def test_headers_of_a_chunk_in_fragments_go_with_its_first_fragment(bench: Bench) -> None:
    asker, sender = bench.open(offer(b=4096))
    sender.set_header("X-Model", "m")
    sender.send(b"x" * 2000)
    frames = [asker.next(), asker.next()]
    while frames[-1].op == b"f":
        frames.append(asker.next())
    assert [frame.headers for frame in frames] == [{"X-Model": "m"}] + [{}] * (len(frames) - 1)
    assert b"".join(frame.payload for frame in frames) == b"x" * 2000


@pytest.mark.parametrize("name", ["Natsync-Seq", "natsync-status", "Nats-Service-Error"])
def test_a_handler_cannot_set_a_header_of_the_protocols(bench: Bench, name: str) -> None:
    _, sender = bench.open()
    with pytest.raises(natsync.InvalidArgument, match="reserved"):
        sender.set_header(name, "e.1 _INBOX.forged.nsy1.1")


def test_trailers_cannot_have_the_name_of_a_header_of_the_protocols(bench: Bench) -> None:
    _, sender = bench.open()
    with pytest.raises(natsync.InvalidArgument, match="reserved"):
        sender.end(trailers={"Natsync-Seq": "d.1 _INBOX.forged.nsy1.1"})


# -- what a chunk may be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [END, ERROR, ERROR + b"no", b"", b"+1 2 3", b"\0" * 8])
def test_any_bytes_are_data(bench: Bench, chunk: bytes) -> None:
    asker, sender = bench.open()
    sender.send(chunk)
    sender.send(b"next")
    assert [(frame.key, frame.payload) for frame in asker.frames(2)] == [((b"d", 1), chunk), ((b"d", 2), b"next")]


@pytest.fixture
def small(make_nats_server: Make) -> Iterator[Bench]:
    """On a server that takes messages of up to 4096 bytes."""
    with bench_on(make_nats_server(config="max_payload: 4096").url) as bench:
        yield bench


@pytest.mark.parametrize("size", [0, 1, 4095, 4096])
def test_a_chunk_of_up_to_max_payload_is_one_frame(small: Bench, size: int) -> None:
    asker, sender = small.open()
    sender.send(b"x" * size)
    frame = asker.next()
    assert (frame.key, frame.payload) == ((b"d", 1), b"x" * size)


def test_a_chunk_larger_than_max_payload_goes_in_fragments_and_the_connection_stays(small: Bench) -> None:
    asker, sender = small.open()
    sender.send(b"x" * 4096 + b"y")
    assert [(frame.key, frame.payload) for frame in asker.frames(2)] == [((b"f", 1), b"x" * 4096), ((b"d", 2), b"y")]
    assert asker.ping() == 2


def test_headers_count_as_payload_where_a_frame_is_cut(small: Bench) -> None:
    asker, sender = small.open()
    sender.set_header("X-Model", "m" * 100)
    sender.send(b"x" * 4096)
    first, second = asker.frames(2)
    assert (first.key, second.key) == ((b"f", 1), (b"d", 2))
    assert len(first.block or b"") + len(first.payload) <= 4096
    assert first.payload + second.payload == b"x" * 4096


def test_headers_that_no_frame_has_room_for_are_refused_and_the_stream_goes_on(small: Bench) -> None:
    asker, sender = small.open()
    sender.set_header("X-Model", "m" * 5000)
    with pytest.raises(natsync.MaxPayloadExceeded):
        sender.send(b"x")
    assert sender.send_count == 0
    sender.set_header("X-Model", "m")
    sender.send(b"x")
    assert asker.next().key == (b"d", 1)


def test_a_batch_is_never_larger_than_max_payload(small: Bench) -> None:
    asker, sender = small.open(offer(w=100, cap="b"))
    sender.send_many([b"%04d" % n * 100 for n in range(50)])
    seen = 0
    while seen < 50:
        frame = asker.next()
        assert len(frame.payload) <= 4096
        assert frame.seq == seen + 1
        seen += int.from_bytes(frame.payload[:4], "big") if frame.op == b"b" else 1
    assert asker.ping() == 50


def test_an_error_that_does_not_fit_is_cut_and_the_connection_stays(small: Bench) -> None:
    asker, sender = small.open()
    sender.send_error("e" * 10_000, code=13, details={"much": "d" * 10_000})
    error = asker.next()
    assert error.key == (b"x", 1)
    assert error.payload.startswith(ERROR + b"eee")
    assert error.headers["Natsync-Status"] == "13 INTERNAL"
    assert len(error.block or b"") + len(error.payload) <= 4096


def test_trailers_that_do_not_fit_are_refused_and_the_stream_can_end_without(small: Bench) -> None:
    asker, sender = small.open()
    with pytest.raises(natsync.MaxPayloadExceeded):
        sender.end(trailers={"X-Much": "t" * 5000})
    sender.end()
    assert asker.next().key == (b"e", 1)


def test_a_chunk_larger_than_the_requester_puts_together_is_refused_here(bench: Bench) -> None:
    asker, sender = bench.open(OFFER + ";m=1000")
    with pytest.raises(natsync.MaxPayloadExceeded):
        sender.send(b"x" * 1001)
    sender.send(b"x" * 1000)
    assert asker.next().key == (b"d", 1)


# -- credit ----------------------------------------------------------------------------------------------------------


def test_no_more_chunks_are_sent_than_the_window_has(bench: Bench) -> None:
    asker, sender = bench.open(offer(w=4))
    assert fill(sender) == 4
    assert asker.keys(4) == [(b"d", 1), (b"d", 2), (b"d", 3), (b"d", 4)]
    assert asker.ping() == 4


def test_no_more_bytes_are_sent_than_the_byte_window_has(bench: Bench) -> None:
    asker, sender = bench.open(offer(w=1000, b=4096))
    assert fill(sender, b"x" * 1000) == 4
    assert fill(sender, b"x" * 97) == 0
    assert fill(sender, b"x" * 96) == 1
    asker.frames(5)
    assert asker.ping() == 5


def test_empty_chunks_need_no_bytes_of_credit(bench: Bench) -> None:
    _, sender = bench.open(offer(w=6, b=4096))
    assert fill(sender, b"x" * 1024) == 4
    assert fill(sender, b"") == 2


def test_send_waits_for_credit(bench: Bench) -> None:
    asker, sender = bench.open(offer(w=1))
    sender.send(b"one")
    with pytest.raises(natsync.TimedOut):
        sender.send(b"two", timeout=0.1)
    waiting = Outcome(lambda: sender.send(b"two"))
    asker.next()
    assert waiting.running
    asker.say(b"+1 2 65536")
    assert waiting.within(PATIENCE) is None
    frame = asker.next()
    assert (frame.key, frame.payload) == ((b"d", 2), b"two")


def test_a_chunk_that_timed_out_is_not_sent(bench: Bench) -> None:
    asker, sender = bench.open(offer(w=1))
    sender.send(b"one")
    with pytest.raises(natsync.TimedOut):
        sender.send(b"lost", timeout=0.05)
    asker.next()
    asker.say(b"+1 2 65536")
    sender.send(b"two")
    assert asker.next().payload == b"two"
    assert sender.send_count == 2


def test_limits_are_absolute(bench: Bench) -> None:
    asker, sender = bench.open(offer(w=4))
    fill(sender)
    asker.frames(4)
    asker.say(b"+4 6 65536")
    eventually(lambda: sender.try_send(b"x"))
    assert fill(sender) == 1
    assert asker.keys(2) == [(b"d", 5), (b"d", 6)]


def test_an_account_that_comes_twice_gives_credit_once(bench: Bench) -> None:
    asker, sender = bench.open(offer(w=4))
    fill(sender)
    asker.frames(4)
    for _ in range(3):
        asker.say(b"+4 6 65536")
    asker.ping()
    assert fill(sender) == 2


def test_an_account_that_comes_late_takes_no_credit_back(bench: Bench) -> None:
    asker, sender = bench.open(offer(w=4))
    fill(sender)
    asker.frames(4)
    asker.say(b"+4 8 65536")
    asker.say(b"+2 6 65536")
    asker.say(b"+0 4 65536")
    asker.ping()
    assert fill(sender) == 4


def test_a_lost_account_is_made_up_for_by_the_next(bench: Bench) -> None:
    asker, sender = bench.open(offer(w=4))
    fill(sender)
    asker.frames(4)
    # +2 6 … is lost
    asker.say(b"+4 8 65536")
    asker.ping()
    assert fill(sender) == 4


def test_bytes_of_credit_grow_by_absolute_offsets(bench: Bench) -> None:
    asker, sender = bench.open(offer(w=1000, b=4096))
    fill(sender, b"x" * 1024)
    asker.frames(4)
    asker.say(b"+4 1000 6144")
    asker.ping()
    assert fill(sender, b"x" * 1024) == 2


def test_a_chunk_larger_than_the_byte_window_goes_as_far_as_the_credit_and_on_with_more(bench: Bench) -> None:
    data = bytes(range(256)) * 40  # 10,240 bytes: ten fragments
    asker, sender = bench.open(offer(w=1000, b=4096))
    assert sender.send(data, timeout=PATIENCE) == 1
    frames = asker.frames(4)
    assert asker.ping() == 4
    asker.say(b"+4 1000 8192")
    frames += asker.frames(4)
    assert asker.ping() == 8
    asker.say(b"+8 1000 12288")
    frames += asker.frames(2)
    assert [frame.key for frame in frames] == [*((b"f", n) for n in range(1, 10)), (b"d", 10)]
    assert b"".join(frame.payload for frame in frames) == data


def test_fragments_need_credit_by_number_too(bench: Bench) -> None:
    asker, sender = bench.open(offer(w=2, b=4096))
    sender.send(b"x" * 4096, timeout=PATIENCE)
    assert asker.keys(2) == [(b"f", 1), (b"f", 2)]
    assert asker.ping() == 2
    asker.say(b"+2 4 8192")
    assert asker.keys(2) == [(b"f", 3), (b"d", 4)]


def test_the_end_needs_no_credit(bench: Bench) -> None:
    asker, sender = bench.open(offer(w=2))
    fill(sender)
    sender.end()
    assert asker.keys(3) == [(b"d", 1), (b"d", 2), (b"e", 3)]


def test_an_error_needs_no_credit(bench: Bench) -> None:
    asker, sender = bench.open(offer(w=2))
    fill(sender)
    sender.send_error("boom")
    assert asker.keys(3) == [(b"d", 1), (b"d", 2), (b"x", 3)]


def test_the_end_waits_behind_fragments_that_wait_for_credit(bench: Bench) -> None:
    asker, sender = bench.open(offer(b=4096, w=1000))
    sender.send(b"x" * 5000, timeout=PATIENCE)
    sender.end()
    asker.frames(4)
    assert asker.ping() == 4
    asker.say(b"+4 1000 8192")
    assert asker.keys(2) == [(b"d", 5), (b"e", 6)]


def test_a_window_larger_than_the_responders_own_is_cut_to_it(bench: Bench) -> None:
    _, sender = bench.open(offer(w=1_000_000, cap="b"))
    assert fill(sender, b"") == 65_536


# -- what is sent again ----------------------------------------------------------------------------------------------


def test_what_did_not_come_is_sent_again_from_there_on(bench: Bench) -> None:
    asker, _ = sent(bench)
    asker.say(b"!2 10 65536")
    assert [(frame.key, frame.payload) for frame in asker.frames(3)] == [
        ((b"d", 3), b"c3"),
        ((b"d", 4), b"c4"),
        ((b"d", 5), b"c5"),
    ]
    assert asker.ping() == 5


def test_a_complaint_that_comes_late_has_nothing_sent_that_was_confirmed(bench: Bench) -> None:
    asker, _ = sent(bench)
    asker.say(b"+3 11 65536")
    asker.say(b"!0 8 65536")
    assert asker.keys(2) == [(b"d", 4), (b"d", 5)]
    assert asker.ping() == 5


def test_a_complaint_after_everything_was_confirmed_has_nothing_sent(bench: Bench) -> None:
    asker, sender = sent(bench)
    asker.say(b"+5 13 65536")
    asker.say(b"!2 10 65536")
    assert asker.ping() == 5
    sender.send(b"c6")
    assert asker.next().key == (b"d", 6)


def test_what_is_sent_again_may_be_put_together_anew(bench: Bench) -> None:
    asker, _ = sent(bench, cap="b")
    asker.say(b"!1 10 65536")
    frame = asker.next()
    assert (frame.key, frame.payload) == ((b"b", 2), batch(b"c2", b"c3", b"c4", b"c5"))


def test_the_end_is_sent_again_too(bench: Bench) -> None:
    asker, sender = sent(bench, 2)
    sender.end(trailers={"A": "1"})
    asker.next()
    asker.say(b"!1 10 65536")
    again = asker.frames(2)
    assert [frame.key for frame in again] == [(b"d", 2), (b"e", 3)]
    assert again[1].headers == {"A": "1"}


def test_the_headers_of_the_first_chunk_are_sent_again_too(bench: Bench) -> None:
    asker, sender = bench.open()
    sender.set_header("A", "1")
    sender.send(b"one")
    first = asker.next()
    asker.say(b"!0 8 65536")
    assert asker.next() == first


def test_more_credit_comes_with_a_complaint_too(bench: Bench) -> None:
    asker, sender = bench.open(offer(w=2))
    fill(sender)
    asker.frames(2)
    asker.say(b"!2 4 65536")
    asker.ping()
    assert fill(sender) == 2


def test_a_lost_complaint_is_made_up_for_by_a_probe_after_a_quarter_of_a_second(bench: Bench) -> None:
    asker, _ = sent(bench, 3)
    asker.say(b"+0 8 65536")  # the first word: the quarter begins anew
    asker.ping()
    begin = time.monotonic()
    asker.say(b"+1 9 65536")
    assert asker.probe().key == (b"h", 3)
    assert 0.25 * EARLY - 0.05 <= time.monotonic() - begin < LATE
    asker.say(b"!1 9 65536")
    assert asker.keys(2) == [(b"d", 2), (b"d", 3)]


def test_probes_come_at_longer_and_longer_intervals(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    times, ask = list[float](), FramedSender.ask

    def asking(core: FramedSender) -> None:
        times.append(core._moved_at)  # when it was due: when it comes is the machine's affair
        ask(core)

    monkeypatch.setattr(FramedSender, "ask", asking)
    asker, _ = sent(bench, 1)
    for _ in range(3):
        asker.probe()
    assert times[1] - times[0] >= 0.5 * EARLY - 0.05
    assert times[2] - times[1] >= 1.0 * EARLY - 0.05


def test_nothing_is_asked_once_everything_is_confirmed(bench: Bench) -> None:
    asker, _ = sent(bench, 2)
    asker.say(b"+2 10 65536")
    asker.ping()
    with pytest.raises(TimeoutError):
        asker.frame(timeout=0.6)


def test_accept_is_followed_by_a_probe_until_the_requester_has_said_something(bench: Bench) -> None:
    asker, _ = bench.open()
    assert asker.probe().key == (b"h", 0)
    assert asker.probe().key == (b"h", 0)
    asker.say(b"+0 8 65536")
    asker.ping()
    with pytest.raises(TimeoutError):
        asker.frame(timeout=0.6)


def test_a_sender_that_waits_for_credit_asks_for_it(bench: Bench) -> None:
    asker, sender = bench.open(offer(w=1))
    sender.send(b"one")
    asker.next()
    asker.say(b"+1 1 65536")
    asker.ping()
    waiting = Outcome(lambda: sender.send(b"two"))
    assert asker.probe().key == (b"h", 1)  # the account that gave it was lost
    asker.say(b"+1 2 65536")
    assert waiting.within(PATIENCE) is None


# -- nonsense --------------------------------------------------------------------------------------------------------


def test_a_confirmation_of_what_was_never_sent_is_ignored(bench: Bench) -> None:
    asker, sender = bench.open(offer(w=2))
    fill(sender)
    asker.frames(2)
    asker.say(b"+7 1000 99999999")
    assert asker.ping() == 2
    assert fill(sender) == 0
    asker.say(b"!0 2 65536")
    assert asker.keys(2) == [(b"d", 1), (b"d", 2)]


NONSENSE = [
    b"",
    b"+",
    b"+1",
    b"+1 2",
    b"+1 2 3 4",
    b"+-1 2 3",
    b"+1  2 3",
    b"!a b c",
    b"+" + b"9" * 400 + b" 9 9",
    b"x",
    b"X 1 no",
    b"\xff\xfe\0",
    b"h",
    b"+1 2 3\r\n",
]


@pytest.mark.parametrize("payload", NONSENSE)
def test_nonsense_from_a_requester_changes_nothing(bench: Bench, payload: bytes) -> None:
    asker, sender = sent(bench, 2)
    asker.say(payload)
    assert asker.ping() == 2
    assert fill(sender) == 6
    assert not sender.is_closed()


def test_nonsense_behind_a_streams_subject_changes_nothing(bench: Bench) -> None:
    asker, sender = sent(bench, 1)
    stream = (asker.control or b"").rsplit(b".", 2)[0]
    for rest in (b".d", b".d.x", b".d.1.2.3", b".?.?"):
        asker.desk.raw.publish(stream + rest, b"+0 8 65536", asker.inbox)
    assert asker.ping() == 1
    assert not sender.is_closed()
