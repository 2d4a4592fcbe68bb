"""natsync.streaming.window: what is kept until it has arrived, what is taken, and the credit between the two."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interrupting import turns
from natsync.concurrency import Deadline, Happening
from natsync.errors import MaxPayloadExceeded, ProtocolError, StreamClosed
from natsync.streaming import window
from natsync.streaming.frames import END_PAYLOAD, ERROR_PREFIX, Ack, Op, encode_batch
from natsync.streaming.sender import ResponseSender
from natsync.streaming.terms import Offer
from natsync.streaming.window import (
    BATCH_BYTES,
    BATCH_CHUNKS,
    BATCHED_CHUNK_BYTES,
    GIVEN_BYTES,
    Frame,
    Incoming,
    Outgoing,
    Verdict,
)

BLOCK = b"NATS/1.0\r\nA: 1\r\n\r\n"
#: The least window there is, and the fragments it allows.
LEAST, FRAGMENT = 4096, 1024
PLENTY = 1 << 20
PATIENCE = 10.0


def outgoing(
    chunks: int = 1000,
    size: int = 16 * PLENTY,
    *,
    max_payload: int = PLENTY,
    quota: int = 1 << 30,
    batches: bool = False,
) -> Outgoing:
    return Outgoing(Offer(chunks, size, 10.0, 5.0, batches), max_payload, quota)


def batching(chunks: int = 1000, size: int = 16 * PLENTY, max_payload: int = PLENTY) -> Outgoing:
    return outgoing(chunks, size, max_payload=max_payload, batches=True)


def given_out(out: Outgoing, *chunks: bytes) -> Outgoing:
    """The same, after all the chunks were given to it."""
    for chunk in chunks:
        out.push(chunk)
    return out


def due(out: Outgoing) -> list[Frame]:
    """All the frames that are due now."""
    return list(iter(out.next, None))


def shape(out: Outgoing) -> list[tuple[bytes, int, int]]:
    """Of all the frames that are due now: what they are, their seq, and how many they use up."""
    return [(frame.op, frame.seq, frame.seqs) for frame in due(out)]


def ack(received: int, limit: int = 0, limit_bytes: int = 0) -> Ack:
    return Ack(received, limit, limit_bytes)


def missing(received: int) -> Ack:
    return Ack(received, 0, 0, missing=True)


# -- giving, and credit ----------------------------------------------------------------------------------------------


def test_a_chunk_is_due_as_it_was_given() -> None:
    out = given_out(outgoing(), b"one")
    assert due(out) == [Frame(Op.DATA, 1, None, b"one", 1)]
    assert out.next() is None


def test_chunks_are_due_in_the_order_they_were_given() -> None:
    out = given_out(outgoing(), b"one", b"", b"three")
    assert [(frame.seq, frame.payload) for frame in due(out)] == [(1, b"one"), (2, b""), (3, b"three")]


def test_a_stream_without_chunks_has_nothing_due() -> None:
    out = outgoing()
    assert out.next() is None
    assert not out.blocked
    assert (out.last, out.acked, out.sent, out.highest, out.kept_bytes) == (0, 0, 0, 0, 0)


def test_chunks_beyond_the_window_are_not_taken() -> None:
    out = outgoing(chunks=2)
    assert out.takes(1)
    given_out(out, b"1")
    assert out.takes(1)
    given_out(out, b"2")
    assert not out.takes(0)
    assert not out.has_credit(0)


def test_bytes_beyond_the_window_are_not_taken() -> None:
    out = given_out(outgoing(size=LEAST), *[bytes(FRAGMENT)] * 3, bytes(FRAGMENT - 1))
    assert out.takes(0)
    assert out.takes(1)
    assert not out.takes(2)
    given_out(out, b"1")
    assert out.takes(0)
    assert not out.takes(1)


def test_new_limits_make_room() -> None:
    out = given_out(outgoing(chunks=2, size=LEAST), bytes(FRAGMENT), bytes(FRAGMENT))
    due(out)
    assert out.acknowledge(ack(1, 3, LEAST + FRAGMENT))
    assert out.takes(1)
    given_out(out, b"3")
    assert not out.takes(0)


def test_an_account_without_new_limits_makes_no_room() -> None:
    out = given_out(outgoing(chunks=2), b"1", b"2")
    due(out)
    assert out.acknowledge(ack(2, 2, 16 * PLENTY))
    assert not out.takes(0)


def test_an_account_with_new_limits_of_chunks_makes_no_room_for_bytes() -> None:
    out = given_out(outgoing(size=LEAST), *[bytes(FRAGMENT)] * 4)
    due(out)
    assert out.acknowledge(ack(4, 2000, LEAST))
    assert out.takes(0)
    assert not out.takes(1)


def test_what_is_unacknowledged_stays_within_the_responders_own_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "MOST_WINDOW", 2)
    out = given_out(outgoing(chunks=100), b"1", b"2")
    due(out)
    assert not out.has_credit(0)
    out.acknowledge(ack(1))
    assert out.has_credit(0)
    given_out(out, b"3")
    assert not out.has_credit(0)


def test_unacknowledged_bytes_stay_within_the_responders_own_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "MOST_WINDOW_BYTES", LEAST)
    out = given_out(outgoing(size=100 * LEAST), *[bytes(FRAGMENT)] * 4)
    assert len(due(out)) == 4
    assert not out.has_credit(1)
    out.acknowledge(ack(1))
    assert out.has_credit(FRAGMENT)
    given_out(out, bytes(FRAGMENT))
    assert not out.has_credit(1)


def test_a_limit_beyond_the_responders_own_window_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "MOST_WINDOW", 2)
    out = given_out(outgoing(chunks=2), b"1", b"2")
    due(out)
    assert out.acknowledge(ack(0, 1000, PLENTY))
    assert not out.has_credit(0)


def test_the_quota_keeps_a_chunk_waiting_that_has_credit() -> None:
    out = given_out(outgoing(quota=10), bytes(7))
    assert out.takes(3)
    assert not out.takes(4)
    assert out.has_credit(4)


def test_a_chunk_larger_than_the_quota_is_taken_when_nothing_else_is_kept() -> None:
    out = outgoing(quota=10)
    assert out.takes(11)
    given_out(out, bytes(11))
    assert not out.takes(0)
    due(out)
    out.acknowledge(ack(1))
    assert out.takes(11)
    given_out(out, b"1")
    assert not out.takes(10)


def test_a_chunk_larger_than_the_quota_needs_credit_too() -> None:
    assert not given_out(outgoing(chunks=1, quota=10), b"").takes(11)


def test_what_is_acknowledged_leaves_the_quota() -> None:
    out = given_out(outgoing(quota=10), bytes(6), bytes(4))
    due(out)
    assert not out.takes(1)
    out.acknowledge(ack(1))
    assert out.takes(6)
    assert not out.takes(7)


# -- fragments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (0, [0]),
        (1, [1]),
        (FRAGMENT - 1, [FRAGMENT - 1]),
        (FRAGMENT, [FRAGMENT]),
        (FRAGMENT + 1, [FRAGMENT, 1]),
        (2 * FRAGMENT, [FRAGMENT] * 2),
        (2 * FRAGMENT + 1, [FRAGMENT, FRAGMENT, 1]),
        (4 * FRAGMENT, [FRAGMENT] * 4),
    ],
)
def test_a_chunk_larger_than_a_fragment_goes_in_several(size: int, sizes: list[int]) -> None:
    chunk = bytes(index % 251 for index in range(size))
    found = due(given_out(outgoing(size=LEAST), chunk))
    assert [len(frame.payload) for frame in found] == sizes
    assert [frame.op for frame in found] == [Op.FRAGMENT] * (len(sizes) - 1) + [Op.DATA]
    assert [(frame.seq, frame.seqs) for frame in found] == [(seq, 1) for seq in range(1, len(sizes) + 1)]
    assert b"".join(frame.payload for frame in found) == chunk


@pytest.mark.parametrize(
    ("size", "max_payload", "fragment"),
    [(LEAST, PLENTY, FRAGMENT), (LEAST + 3, PLENTY, FRAGMENT), (LEAST, 100, 100), (LEAST, 0, 1)],
)
def test_a_fragment_is_a_quarter_of_the_window_and_no_more_than_max_payload(
    size: int, max_payload: int, fragment: int
) -> None:
    out = outgoing(size=size, max_payload=max_payload)
    assert out.fragment_bytes == fragment
    assert len(due(given_out(out, bytes(fragment + 1)))) == 2


def test_a_chunk_larger_than_the_window_is_taken_and_waits_in_its_middle() -> None:
    out = outgoing(size=LEAST)
    assert out.takes(10 * FRAGMENT)
    given_out(out, bytes(10 * FRAGMENT))
    assert out.kept_bytes == 10 * FRAGMENT
    assert shape(out) == [(Op.FRAGMENT, seq, 1) for seq in (1, 2, 3, 4)]
    assert out.blocked
    assert out.acknowledge(ack(2, 1000, LEAST + 2 * FRAGMENT))
    assert shape(out) == [(Op.FRAGMENT, seq, 1) for seq in (5, 6)]
    out.acknowledge(ack(6, 1000, LEAST + 6 * FRAGMENT))
    assert shape(out) == [*((Op.FRAGMENT, seq, 1) for seq in (7, 8, 9)), (Op.DATA, 10, 1)]
    assert not out.blocked


def test_a_fragment_waits_for_all_its_bytes() -> None:
    out = given_out(outgoing(size=LEAST), b"1", bytes(4 * FRAGMENT))
    assert shape(out) == [(Op.DATA, 1, 1), *((Op.FRAGMENT, seq, 1) for seq in (2, 3, 4))]
    out.acknowledge(ack(0, 1000, LEAST))
    assert out.next() is None
    out.acknowledge(ack(0, 1000, LEAST + 1))
    assert shape(out) == [(Op.DATA, 5, 1)]


def test_fragments_wait_for_credit_in_frames() -> None:
    out = given_out(outgoing(chunks=2, size=LEAST), bytes(3 * FRAGMENT))
    assert shape(out) == [(Op.FRAGMENT, 1, 1), (Op.FRAGMENT, 2, 1)]
    out.acknowledge(ack(1, 3, LEAST))
    assert shape(out) == [(Op.DATA, 3, 1)]


def test_a_large_chunk_needs_credit_for_its_first_fragment_only() -> None:
    out = given_out(outgoing(size=LEAST), *[bytes(FRAGMENT)] * 3)
    assert out.takes(100 * FRAGMENT)
    given_out(out, b"1")
    assert not out.takes(100 * FRAGMENT)
    assert out.takes(FRAGMENT - 1)


def test_no_chunk_is_taken_behind_one_that_waits_in_its_middle() -> None:
    out = given_out(outgoing(size=LEAST), bytes(5 * FRAGMENT))
    assert not out.takes(0)
    out.acknowledge(ack(0, 1000, 5 * FRAGMENT - 1))
    assert not out.takes(0)
    out.acknowledge(ack(0, 1000, 5 * FRAGMENT))
    assert out.takes(0)
    assert not out.takes(1)


# -- headers of the first chunk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [b"", b"one", bytes(FRAGMENT - len(BLOCK))], ids=len)
def test_headers_go_with_a_chunk_that_fits_beside_them(chunk: bytes) -> None:
    out = outgoing(size=LEAST)
    out.push(chunk, BLOCK)
    assert due(out) == [Frame(Op.DATA, 1, BLOCK, chunk, 1)]


@pytest.mark.parametrize("size", [FRAGMENT - len(BLOCK) + 1, FRAGMENT, FRAGMENT + 1, 3 * FRAGMENT])
def test_headers_go_with_the_first_fragment_of_a_chunk_that_does_not_fit_beside_them(size: int) -> None:
    out = outgoing(size=LEAST)
    chunk = bytes(index % 251 for index in range(size))
    out.push(chunk, BLOCK)
    found = due(out)
    assert [frame.block for frame in found] == [BLOCK] + [None] * (len(found) - 1)
    assert [frame.op for frame in found] == [Op.FRAGMENT] * (len(found) - 1) + [Op.DATA]
    assert len(found[0].payload) == FRAGMENT - len(BLOCK)
    assert b"".join(frame.payload for frame in found) == chunk


def test_headers_count_as_no_application_bytes() -> None:
    out = outgoing(size=LEAST)
    out.push(b"one", BLOCK)
    assert out.kept_bytes == 3
    given_out(out, *[bytes(FRAGMENT)] * 3)
    assert out.takes(FRAGMENT - 3)
    assert not out.takes(FRAGMENT - 2)


@pytest.mark.parametrize("size", [FRAGMENT, FRAGMENT + 1, 5 * FRAGMENT])
def test_headers_that_leave_no_room_in_a_frame_are_refused_and_nothing_is_given_out(size: int) -> None:
    out = outgoing(size=LEAST)
    with pytest.raises(MaxPayloadExceeded):
        out.push(b"one", bytes(size))
    assert (out.last, out.kept_bytes, out.next()) == (0, 0, None)


def test_the_largest_headers_leave_room_for_one_byte() -> None:
    out = outgoing(size=LEAST)
    block = bytes(FRAGMENT - 1)
    out.push(b"ab", block)
    assert due(out) == [Frame(Op.FRAGMENT, 1, block, b"a", 1), Frame(Op.DATA, 2, None, b"b", 1)]


def test_headers_are_sent_again_with_their_chunk() -> None:
    out = outgoing()
    out.push(b"one", BLOCK)
    first = due(out)
    out.rewind()
    assert due(out) == first


@given(
    st.integers(0, 4 * FRAGMENT), st.none() | st.integers(1, FRAGMENT - 1).map(bytes), st.sampled_from([200, PLENTY])
)
def test_no_frame_is_larger_than_a_fragment_and_together_they_are_the_chunk(
    size: int, block: bytes | None, max_payload: int
) -> None:
    out = outgoing(size=LEAST, max_payload=max_payload)
    chunk = bytes(index % 251 for index in range(size))
    try:
        out.push(chunk, block)
    except MaxPayloadExceeded:
        assert block is not None
        assert len(block) >= max_payload
        return
    found = due(out)
    assert all(len(frame.block or b"") + len(frame.payload) <= out.fragment_bytes for frame in found)
    assert b"".join(frame.payload for frame in found) == chunk
    assert out.kept_bytes == size


# -- batches ---------------------------------------------------------------------------------------------------------


def test_chunks_that_wait_together_share_a_frame() -> None:
    out = given_out(batching(), b"one", b"", b"three")
    assert due(out) == [Frame(Op.BATCH, 1, None, encode_batch([b"one", b"", b"three"]), 3)]
    assert (out.sent, out.highest) == (3, 3)


def test_a_chunk_alone_is_no_batch() -> None:
    out = batching()
    for seq in (1, 2):
        assert shape(given_out(out, b"one")) == [(Op.DATA, seq, 1)]


def test_a_requester_that_takes_no_batches_gets_none() -> None:
    assert shape(given_out(outgoing(batches=False), b"1", b"2")) == [(Op.DATA, 1, 1), (Op.DATA, 2, 1)]


def test_a_batch_begins_behind_what_was_sent() -> None:
    out = given_out(batching(), b"1")
    due(out)
    assert shape(given_out(out, b"2", b"3")) == [(Op.BATCH, 2, 2)]


@pytest.mark.parametrize(
    ("count", "shapes"),
    [
        (BATCH_CHUNKS, [(Op.BATCH, 1, BATCH_CHUNKS)]),
        (BATCH_CHUNKS + 1, [(Op.BATCH, 1, BATCH_CHUNKS), (Op.DATA, BATCH_CHUNKS + 1, 1)]),
        (BATCH_CHUNKS + 2, [(Op.BATCH, 1, BATCH_CHUNKS), (Op.BATCH, BATCH_CHUNKS + 1, 2)]),
    ],
)
def test_a_batch_has_a_limited_number_of_chunks(count: int, shapes: list[tuple[bytes, int, int]]) -> None:
    assert shape(given_out(batching(), *[b"x"] * count)) == shapes


@pytest.mark.parametrize(("spare", "counts"), [(0, [8]), (1, [7, 1])])
def test_a_batch_has_a_limited_number_of_bytes(spare: int, counts: list[int]) -> None:
    large = [bytes(BATCHED_CHUNK_BYTES)] * 7
    rest = BATCH_BYTES - len(encode_batch([*large, b""]))
    out = given_out(batching(), *large, bytes(rest + spare))
    found = due(out)
    assert [frame.seqs for frame in found] == counts
    assert max(len(frame.payload) for frame in found) <= BATCH_BYTES


@pytest.mark.parametrize(("spare", "counts"), [(0, [3]), (1, [2, 1])])
def test_a_batch_is_no_larger_than_max_payload(spare: int, counts: list[int]) -> None:
    chunks = [b"a" * 20, b"b" * 20, b"c" * (100 - 56 + spare)]
    out = given_out(batching(max_payload=100), *chunks)
    assert [frame.seqs for frame in due(out)] == counts


def test_a_chunk_that_is_just_one_fragment_shares_a_frame() -> None:
    assert shape(given_out(batching(size=LEAST), bytes(FRAGMENT), b"2")) == [(Op.BATCH, 1, 2)]


def test_all_the_bytes_of_a_batch_count_for_the_fragments_behind_it() -> None:
    out = given_out(batching(size=LEAST), bytes(FRAGMENT), bytes(FRAGMENT), bytes(3 * FRAGMENT))
    assert shape(out) == [(Op.BATCH, 1, 2), (Op.FRAGMENT, 3, 1), (Op.FRAGMENT, 4, 1)]


def test_chunks_that_fit_no_batch_go_alone() -> None:
    assert shape(given_out(batching(max_payload=10), bytes(5), bytes(5))) == [(Op.DATA, 1, 1), (Op.DATA, 2, 1)]


def test_large_chunks_do_not_share_a_frame() -> None:
    large = bytes(BATCHED_CHUNK_BYTES + 1)
    out = given_out(batching(), b"1", b"2", large, b"4", large, large, b"7", b"8")
    assert shape(out) == [
        (Op.BATCH, 1, 2),
        (Op.DATA, 3, 1),
        (Op.DATA, 4, 1),
        (Op.DATA, 5, 1),
        (Op.DATA, 6, 1),
        (Op.BATCH, 7, 2),
    ]


def test_the_largest_chunk_that_shares_a_frame() -> None:
    assert shape(given_out(batching(), b"1", bytes(BATCHED_CHUNK_BYTES))) == [(Op.BATCH, 1, 2)]
    assert shape(given_out(batching(), bytes(BATCHED_CHUNK_BYTES), b"2")) == [(Op.BATCH, 1, 2)]
    both = (bytes(BATCHED_CHUNK_BYTES), bytes(BATCHED_CHUNK_BYTES + 1))
    assert shape(given_out(batching(), b"1", *both)) == [(Op.BATCH, 1, 2), (Op.DATA, 3, 1)]


def test_a_chunk_with_headers_does_not_share_a_frame() -> None:
    out = batching()
    out.push(b"1", BLOCK)
    assert shape(given_out(out, b"2", b"3")) == [(Op.DATA, 1, 1), (Op.BATCH, 2, 2)]


def test_fragments_do_not_share_a_frame() -> None:
    out = given_out(batching(size=LEAST), b"1", b"2", bytes(FRAGMENT + 1), b"5", b"6")
    assert shape(out) == [(Op.BATCH, 1, 2), (Op.FRAGMENT, 3, 1), (Op.DATA, 4, 1), (Op.BATCH, 5, 2)]


@pytest.mark.parametrize("op", [Op.END, Op.ERROR])
def test_an_end_does_not_share_a_frame(op: bytes) -> None:
    out = given_out(batching(), b"1", b"2")
    out.push_end(op, None, b"")
    assert shape(out) == [(Op.BATCH, 1, 2), (op, 3, 1)]


# -- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "block", "payload"), [(Op.END, None, END_PAYLOAD), (Op.ERROR, BLOCK, ERROR_PREFIX + b"no")]
)
def test_an_end_is_due_as_it_was_given(op: bytes, block: bytes | None, payload: bytes) -> None:
    out = outgoing()
    out.push_end(op, block, payload)
    assert due(out) == [Frame(op, 1, block, payload, 1)]
    assert out.ended


@pytest.mark.parametrize("op", [Op.END, Op.ERROR])
def test_an_end_needs_no_credit(op: bytes) -> None:
    out = given_out(outgoing(chunks=4, size=LEAST), *[bytes(FRAGMENT)] * 4)
    out.push_end(op, None, b"the end")
    assert shape(out)[-1] == (op, 5, 1)


def test_an_end_waits_for_the_fragments_before_it() -> None:
    out = given_out(outgoing(size=LEAST), bytes(5 * FRAGMENT))
    out.push_end(Op.END, None, END_PAYLOAD)
    assert shape(out) == [(Op.FRAGMENT, seq, 1) for seq in (1, 2, 3, 4)]
    assert out.blocked
    out.acknowledge(ack(0, 1000, 5 * FRAGMENT))
    assert shape(out) == [(Op.DATA, 5, 1), (Op.END, 6, 1)]


def test_an_end_counts_no_application_bytes() -> None:
    out = given_out(outgoing(), b"one", b"two")
    out.push_end(Op.END, None, END_PAYLOAD)
    assert out.kept_bytes == 6
    due(out)
    out.acknowledge(ack(1))
    assert out.kept_bytes == 3
    out.acknowledge(ack(3))
    assert (out.acked, out.last, out.kept_bytes) == (3, 3, 0)


def test_an_end_acknowledged_by_itself_leaves_nothing() -> None:
    out = given_out(outgoing(), b"one")
    out.push_end(Op.ERROR, BLOCK, ERROR_PREFIX)
    due(out)
    out.acknowledge(ack(1))
    assert out.kept_bytes == 0
    out.acknowledge(ack(2))
    assert (out.acked, out.kept_bytes, out.next()) == (2, 0, None)


def test_an_end_is_sent_again_until_it_is_acknowledged() -> None:
    out = given_out(outgoing(), b"one")
    out.push_end(Op.END, None, END_PAYLOAD)
    due(out)
    out.acknowledge(missing(1))
    assert due(out) == [Frame(Op.END, 2, None, END_PAYLOAD, 1)]


# -- accounts --------------------------------------------------------------------------------------------------------


def test_what_is_acknowledged_is_let_go() -> None:
    out = given_out(outgoing(), b"1", b"22", b"333")
    due(out)
    assert out.acknowledge(ack(2))
    assert (out.acked, out.kept_bytes) == (2, 3)
    out.rewind()
    assert due(out) == [Frame(Op.DATA, 3, None, b"333", 1)]


@pytest.mark.parametrize("again", [ack(2, 10, PLENTY), ack(1, 9, PLENTY), ack(0), ack(2)])
def test_an_account_that_comes_again_or_late_is_no_news(again: Ack) -> None:
    out = given_out(outgoing(chunks=5, size=LEAST), b"1", b"2", b"3")
    due(out)
    assert out.acknowledge(ack(2, 10, PLENTY))
    assert not out.acknowledge(again)
    assert (out.acked, out.sent, out.kept_bytes) == (2, 3, 1)


def test_a_limit_is_never_taken_back() -> None:
    out = given_out(outgoing(chunks=2, size=LEAST), b"1", b"2")
    due(out)
    out.acknowledge(ack(1, 4, PLENTY))
    assert out.acknowledge(ack(2, 1, 1))
    given_out(out, b"3")
    assert out.takes(FRAGMENT)


def test_a_limit_is_not_taken_back_by_an_account_that_raises_the_other() -> None:
    out = given_out(outgoing(chunks=2, size=LEAST), b"1")
    due(out)
    assert out.acknowledge(ack(1, 3, 0))
    assert out.takes(FRAGMENT)
    assert out.acknowledge(ack(1, 0, LEAST + 1))
    assert out.takes(FRAGMENT)
    given_out(out, b"2")
    assert out.takes(FRAGMENT)


@pytest.mark.parametrize("news", [ack(0, 6), ack(0, 0, LEAST + 1), ack(1)])
def test_any_part_of_an_account_may_be_the_news(news: Ack) -> None:
    out = given_out(outgoing(chunks=5, size=LEAST), b"1")
    due(out)
    assert out.acknowledge(news)


@pytest.mark.parametrize("missing_too", [False, True])
def test_an_account_of_what_was_never_sent_counts_nothing(missing_too: bool) -> None:
    out = given_out(outgoing(chunks=3, size=LEAST), b"1", b"2")
    out.next()
    assert not out.acknowledge(Ack(2, 1000, PLENTY, missing_too))
    assert (out.acked, out.sent, out.kept_bytes) == (0, 1, 2)
    given_out(out, b"3")
    assert not out.takes(0)


def test_an_account_may_end_within_a_batch() -> None:
    out = given_out(batching(), b"1", b"22", b"333", b"4444")
    due(out)
    out.acknowledge(ack(2))
    assert out.kept_bytes == 7
    out.rewind()
    assert due(out) == [Frame(Op.BATCH, 3, None, encode_batch([b"333", b"4444"]), 2)]


def test_an_account_may_end_within_a_chunk() -> None:
    out = given_out(outgoing(size=LEAST), bytes(3 * FRAGMENT))
    due(out)
    out.acknowledge(ack(2))
    assert out.kept_bytes == FRAGMENT
    out.rewind()
    assert shape(out) == [(Op.DATA, 3, 1)]


def test_what_is_missing_is_sent_again() -> None:
    out = given_out(outgoing(), b"1", b"2", b"3")
    due(out)
    out.acknowledge(missing(1))
    assert [frame.payload for frame in due(out)] == [b"2", b"3"]


def test_a_late_report_of_what_is_missing_does_not_bring_back_what_was_let_go() -> None:
    out = given_out(outgoing(), b"1", b"2", b"3")
    due(out)
    out.acknowledge(ack(2))
    assert not out.acknowledge(missing(1))
    assert due(out) == [Frame(Op.DATA, 3, None, b"3", 1)]


def test_a_report_of_what_is_missing_may_bring_limits() -> None:
    out = given_out(outgoing(chunks=1), b"1")
    due(out)
    assert out.acknowledge(Ack(0, 2, PLENTY, missing=True))
    given_out(out, b"2")
    assert [frame.payload for frame in due(out)] == [b"1", b"2"]


@pytest.mark.parametrize("received", [0, 2])
def test_nothing_is_missing_of_what_was_acknowledged(received: int) -> None:
    out = given_out(outgoing(), b"1", b"2")
    due(out)
    out.acknowledge(ack(2))
    assert not out.acknowledge(missing(received))
    assert out.next() is None


def test_of_what_was_let_go_nothing_is_remembered() -> None:
    out = outgoing(size=LEAST)
    out.push(bytes(2 * FRAGMENT), BLOCK)
    out.push_end(Op.END, BLOCK, END_PAYLOAD)
    due(out)
    out.acknowledge(ack(2))
    assert (len(out.kept), list(out._special)) == (2, [3, 4])
    out.acknowledge(ack(4))
    assert (out.kept, out._special) == ([], {})


# -- sending again ---------------------------------------------------------------------------------------------------


def test_after_a_rewind_all_is_sent_again_as_it_was() -> None:
    out = given_out(outgoing(size=LEAST), b"1", bytes(FRAGMENT + 1))
    out.push_end(Op.END, BLOCK, END_PAYLOAD)
    first = due(out)
    out.rewind()
    assert due(out) == first


def test_after_a_rewind_single_chunks_may_share_a_frame() -> None:
    out = batching()
    for chunk in (b"1", b"2", b"3"):
        due(given_out(out, chunk))
    out.rewind()
    assert due(given_out(out, b"4")) == [Frame(Op.BATCH, 1, None, encode_batch([b"1", b"2", b"3", b"4"]), 4)]


def test_an_account_of_what_was_sent_before_a_rewind_counts() -> None:
    out = given_out(outgoing(), b"1", b"2", b"3")
    due(out)
    out.rewind()
    assert out.next() is not None
    assert (out.sent, out.highest) == (1, 3)
    assert out.acknowledge(ack(2))
    assert out.sent == 2
    assert due(out) == [Frame(Op.DATA, 3, None, b"3", 1)]


def test_a_rewind_needs_no_new_credit() -> None:
    out = given_out(outgoing(chunks=6, size=LEAST), bytes(4 * FRAGMENT))
    first = due(out)
    out.rewind()
    assert due(out) == first


def test_a_fragment_is_kept_waiting_by_credit_after_a_rewind_too() -> None:
    out = given_out(outgoing(size=LEAST), bytes(5 * FRAGMENT))
    due(out)
    out.acknowledge(ack(2))
    out.rewind()
    assert shape(out) == [(Op.FRAGMENT, 3, 1), (Op.FRAGMENT, 4, 1)]


def test_of_what_was_sent_twice_the_offset_is_counted_once() -> None:
    out = given_out(outgoing(size=LEAST), *[bytes(FRAGMENT)] * 2)
    due(out)
    out.rewind()
    due(out)
    out.acknowledge(ack(1))
    out.rewind()
    given_out(out, bytes(2 * FRAGMENT))
    assert [frame.seq for frame in due(out)] == [2, 3, 4]


def test_a_server_that_takes_less_makes_smaller_frames() -> None:
    out = batching()
    assert out.adapt(100)
    found = due(given_out(out, bytes(150), *[bytes(20)] * 5))
    assert [(frame.op, frame.seqs) for frame in found] == [
        (Op.FRAGMENT, 1),
        (Op.DATA, 1),
        (Op.BATCH, 4),
        (Op.DATA, 1),
    ]
    assert max(len(frame.payload) for frame in found) == 100


def test_a_server_that_takes_more_makes_larger_frames() -> None:
    out = outgoing(size=LEAST, max_payload=100)
    assert out.adapt(PLENTY)
    assert out.fragment_bytes == FRAGMENT


def test_a_server_that_takes_next_to_nothing_gets_a_byte_at_a_time() -> None:
    out = outgoing()
    assert out.adapt(0)
    assert len(due(given_out(out, b"abc"))) == 3


def test_what_is_kept_may_be_too_large_for_another_server() -> None:
    out = given_out(outgoing(), b"1", bytes(101))
    assert out.adapt(101)
    assert not out.adapt(100)
    due(out)
    out.acknowledge(ack(2))
    assert out.adapt(100)


@pytest.mark.parametrize("op", [Op.DATA, Op.END])
def test_what_is_kept_may_be_too_large_for_another_server_by_its_headers(op: bytes) -> None:
    out = given_out(outgoing(), b"1")
    if op == Op.DATA:
        out.push(b"one", BLOCK)
    else:
        out.push_end(op, BLOCK, b"end")
    due(out)
    out.acknowledge(ack(1))
    assert out.adapt(len(BLOCK) + 3)
    assert not out.adapt(len(BLOCK) + 2)


def test_batches_are_put_together_anew_for_a_server_that_takes_less() -> None:
    out = given_out(batching(), *[bytes(20)] * 5)
    due(out)
    assert out.adapt(100)
    out.rewind()
    assert shape(out) == [(Op.BATCH, 1, 4), (Op.DATA, 5, 1)]


def cleared() -> Outgoing:
    out = given_out(outgoing(size=LEAST), b"1", b"2", bytes(5 * FRAGMENT))
    out.push_end(Op.END, None, END_PAYLOAD)
    due(out)
    out.acknowledge(ack(1))
    out.clear()
    return out


def test_of_what_was_cleared_nothing_is_kept_nor_due() -> None:
    out = cleared()
    assert (out.kept_bytes, out.next()) == (0, None)
    out.rewind()
    assert out.next() is None


@pytest.mark.parametrize("late", [ack(2, 1000, PLENTY), ack(5), missing(1), missing(2), ack(8)])
def test_a_late_account_of_what_was_cleared_does_no_harm(late: Ack) -> None:
    out = cleared()
    out.acknowledge(late)
    assert (out.acked, out.kept_bytes, out.next()) == (1, 0, None)


# -- taking ----------------------------------------------------------------------------------------------------------


def incoming(chunks: int = 1000, size: int = PLENTY, largest: int = PLENTY) -> Incoming:
    return Incoming(chunks, size, largest)


class Taker:
    """An Incoming, and the chunks that came out of it."""

    def __init__(self, taking: Incoming) -> None:
        self.taking = taking
        self.chunks: list[bytes] = []

    def take(self, op: bytes, seq: int, payload: bytes = b"") -> Verdict:
        return self.taking.take(op, seq, payload, self.chunks)


def test_chunks_come_out_as_they_come() -> None:
    taker = Taker(incoming())
    assert taker.take(Op.DATA, 1, b"one") is Verdict.TAKEN
    assert taker.take(Op.DATA, 2, b"") is Verdict.TAKEN
    assert taker.chunks == [b"one", b""]
    assert taker.taking.received == 2


def test_a_batch_comes_out_as_its_chunks() -> None:
    taker = Taker(incoming())
    assert taker.take(Op.BATCH, 1, encode_batch([b"one", b"", b"three"])) is Verdict.TAKEN
    assert taker.chunks == [b"one", b"", b"three"]
    assert taker.taking.received == 3


def test_fragments_come_out_as_one_chunk() -> None:
    taker = Taker(incoming())
    assert taker.take(Op.FRAGMENT, 1, b"a") is Verdict.TAKEN
    assert taker.take(Op.FRAGMENT, 2, b"b") is Verdict.TAKEN
    assert taker.chunks == []
    assert taker.take(Op.DATA, 3, b"c") is Verdict.TAKEN
    taker.take(Op.FRAGMENT, 4, b"")
    taker.take(Op.DATA, 5, b"")
    assert taker.chunks == [b"abc", b""]
    assert taker.taking.received == 5


@pytest.mark.parametrize(("op", "verdict"), [(Op.END, Verdict.END), (Op.ERROR, Verdict.ERROR)])
def test_an_end_is_told(op: bytes, verdict: Verdict) -> None:
    taker = Taker(incoming())
    taker.take(Op.DATA, 1, b"one")
    assert taker.take(op, 2, b"whatever") is verdict
    assert taker.chunks == [b"one"]
    assert taker.taking.received == 2
    assert taker.take(op, 2, b"whatever") is Verdict.AGAIN


@pytest.mark.parametrize("op", [Op.DATA, Op.FRAGMENT, Op.BATCH, Op.END, Op.ERROR])
def test_what_comes_too_early_is_dropped(op: bytes) -> None:
    taker = Taker(incoming())
    payload = encode_batch([b"2", b"3"]) if op == Op.BATCH else b"2"
    assert taker.take(op, 2, payload) is Verdict.GAP
    assert (taker.chunks, taker.taking.received) == ([], 0)
    assert taker.take(Op.DATA, 1, b"1") is Verdict.TAKEN
    assert taker.take(Op.DATA, 2, b"2") is Verdict.TAKEN
    assert taker.chunks == [b"1", b"2"]


@pytest.mark.parametrize("seq", [0, 1, 2, 3])
def test_what_comes_again_is_dropped(seq: int) -> None:
    taker = Taker(incoming())
    for one in (1, 2, 3):
        taker.take(Op.DATA, one, b"%d" % one)
    assert taker.take(Op.DATA, seq, b"again") is Verdict.AGAIN
    assert (taker.chunks, taker.taking.received) == ([b"1", b"2", b"3"], 3)


@pytest.mark.parametrize("op", [Op.ACCEPT, Op.REFUSED, Op.ERROR])
def test_a_frame_that_counts_for_none_is_none_of_the_stream(op: bytes) -> None:
    taker = Taker(incoming())
    assert taker.take(op, 0) is Verdict.AGAIN
    assert taker.taking.received == 0


def test_a_fragment_that_comes_again_is_not_put_in_twice() -> None:
    taker = Taker(incoming())
    for seq, payload in ((1, b"a"), (2, b"b"), (1, b"a"), (2, b"b")):
        taker.take(Op.FRAGMENT, seq, payload)
    taker.take(Op.DATA, 3, b"c")
    assert taker.chunks == [b"abc"]


@pytest.mark.parametrize(
    ("seq", "chunks", "verdict", "received"),
    [
        (1, [b"1", b"2"], Verdict.AGAIN, 3),
        (1, [b"1", b"2", b"3"], Verdict.AGAIN, 3),
        (1, [b"1", b"2", b"3", b"4"], Verdict.TAKEN, 4),
        (3, [b"3", b"4", b"5"], Verdict.TAKEN, 5),
        (4, [b"4", b"5"], Verdict.TAKEN, 5),
        (5, [b"5", b"6"], Verdict.GAP, 3),
    ],
)
def test_of_a_batch_only_what_is_not_here_is_taken(
    seq: int, chunks: list[bytes], verdict: Verdict, received: int
) -> None:
    taker = Taker(incoming())
    taker.take(Op.BATCH, 1, encode_batch([b"1", b"2", b"3"]))
    assert taker.take(Op.BATCH, seq, encode_batch(chunks)) is verdict
    assert taker.taking.received == received
    assert taker.chunks == [b"1", b"2", b"3", b"4", b"5"][:received]


def test_frames_that_are_dropped_are_counted() -> None:
    taker = Taker(incoming())
    for op, seq, payload in (
        (Op.DATA, 1, b"1"),
        (Op.DATA, 1, b"1"),
        (Op.DATA, 3, b"3"),
        (Op.BATCH, 4, encode_batch([b"4", b"5"])),
        (Op.BATCH, 2, encode_batch([b"2", b"3"])),
        (Op.BATCH, 2, encode_batch([b"2", b"3"])),
    ):
        taker.take(op, seq, payload)
    assert taker.taking.resent == 6


# -- what a responder may not send -----------------------------------------------------------------------------------


def test_the_last_frame_of_the_credit_is_taken_and_the_next_is_refused() -> None:
    taker = Taker(incoming(chunks=2))
    taker.take(Op.DATA, 1)
    assert taker.take(Op.DATA, 2) is Verdict.TAKEN
    with pytest.raises(ProtocolError, match="credit"):
        taker.take(Op.DATA, 3)


def test_the_last_byte_of_the_credit_is_taken_and_the_next_is_refused() -> None:
    taker = Taker(incoming(size=4))
    assert taker.take(Op.DATA, 1, b"1234") is Verdict.TAKEN
    assert taker.take(Op.DATA, 2, b"") is Verdict.TAKEN
    with pytest.raises(ProtocolError, match="credit"):
        taker.take(Op.DATA, 3, b"5")


@pytest.mark.parametrize(("chunks", "size"), [(2, PLENTY), (PLENTY, 2)])
def test_a_batch_beyond_the_credit_is_refused_as_a_whole(chunks: int, size: int) -> None:
    taker = Taker(incoming(chunks, size))
    with pytest.raises(ProtocolError, match="credit"):
        taker.take(Op.BATCH, 1, encode_batch([b"1", b"2", b"3"]))
    assert taker.chunks == []


def test_what_of_a_batch_is_here_already_is_not_charged_again() -> None:
    taker = Taker(incoming(3, 3))
    taker.take(Op.BATCH, 1, encode_batch([b"1", b"2"]))
    assert taker.take(Op.BATCH, 1, encode_batch([b"1", b"2", b"3"])) is Verdict.TAKEN


def test_what_comes_again_is_not_charged_again() -> None:
    taker = Taker(incoming(2, 2))
    for seq in (1, 1, 1, 2):
        taker.take(Op.DATA, seq, b"x")
    assert taker.chunks == [b"x", b"x"]


@pytest.mark.parametrize("op", [Op.END, Op.ERROR])
def test_an_end_is_taken_without_credit(op: bytes) -> None:
    taker = Taker(incoming(1, 1))
    taker.take(Op.DATA, 1, b"x")
    assert taker.take(op, 2, END_PAYLOAD) is not Verdict.GAP
    assert taker.taking.received == 2


@pytest.mark.parametrize("op", [Op.END, Op.ERROR])
def test_an_end_within_a_chunk_is_refused(op: bytes) -> None:
    taker = Taker(incoming())
    taker.take(Op.FRAGMENT, 1, b"a")
    with pytest.raises(ProtocolError, match="within a chunk"):
        taker.take(op, 2)


def test_a_batch_within_a_chunk_is_refused() -> None:
    taker = Taker(incoming())
    taker.take(Op.FRAGMENT, 1, b"a")
    with pytest.raises(ProtocolError, match="within a chunk"):
        taker.take(Op.BATCH, 2, encode_batch([b"1", b"2"]))


def test_a_malformed_batch_is_refused() -> None:
    with pytest.raises(ProtocolError, match="batch"):
        Taker(incoming()).take(Op.BATCH, 1, b"\0\0\0\5")


@pytest.mark.parametrize("op", [Op.ACCEPT, Op.REFUSED, Op.PROBE, b"q", b"", b"dd", b"long" * 100])
def test_a_frame_of_an_unknown_kind_is_refused(op: bytes) -> None:
    with pytest.raises(ProtocolError, match="unknown") as caught:
        Taker(incoming()).take(op, 1)
    assert len(str(caught.value)) < 80


def test_a_chunk_may_reach_its_largest_size_before_its_last_frame() -> None:
    taker = Taker(incoming(largest=10))
    taker.take(Op.FRAGMENT, 1, bytes(10))
    taker.take(Op.DATA, 2, b"")
    assert taker.chunks == [bytes(10)]


@pytest.mark.parametrize("last", [Op.FRAGMENT, Op.DATA])
def test_a_chunk_larger_than_the_requester_takes_is_refused(last: bytes) -> None:
    taker = Taker(incoming(largest=10))
    taker.take(Op.FRAGMENT, 1, bytes(6))
    with pytest.raises(ProtocolError, match="max_message_bytes"):
        taker.take(last, 2, bytes(5))
    assert taker.chunks == []


def test_the_largest_chunk_that_the_requester_takes() -> None:
    taker = Taker(incoming(largest=10))
    for seq in (1, 3):
        taker.take(Op.FRAGMENT, seq, bytes(6))
        taker.take(Op.DATA, seq + 1, bytes(4))
    assert taker.chunks == [bytes(10), bytes(10)]


# -- accounts of what was taken --------------------------------------------------------------------------------------


def test_the_first_account_is_the_offer() -> None:
    assert incoming(8, LEAST).account(LEAST) == Ack(0, 8, LEAST)


def test_an_account_says_when_something_is_missing() -> None:
    assert incoming(8, LEAST).account(LEAST, missing=True) == Ack(0, 8, LEAST, missing=True)


def test_what_is_here_is_no_new_credit_until_it_is_consumed() -> None:
    taker = Taker(incoming(8, LEAST))
    taker.take(Op.DATA, 1, b"one")
    assert taker.taking.account(LEAST) == Ack(1, 8, LEAST)
    taker.taking.consume(1, 3)
    assert taker.taking.account(LEAST) == Ack(1, 9, LEAST + 3)


def test_fragments_are_new_credit_as_they_come() -> None:
    taker = Taker(incoming(8, LEAST))
    taker.take(Op.FRAGMENT, 1, bytes(10))
    taker.take(Op.FRAGMENT, 2, bytes(5))
    assert taker.taking.account(LEAST) == Ack(2, 10, LEAST + 15)
    assert taker.taking.granted_bytes == LEAST


def test_a_chunk_of_fragments_holds_its_place_until_it_is_consumed() -> None:
    taker = Taker(incoming(8, LEAST))
    taker.take(Op.FRAGMENT, 1, bytes(10))
    taker.take(Op.DATA, 2, bytes(5))
    assert taker.taking.account(LEAST) == Ack(2, 9, LEAST)
    taker.taking.consume(1, 15)
    assert taker.taking.account(LEAST) == Ack(2, 10, LEAST + 15)


def test_credit_that_was_told_while_a_chunk_came_is_not_told_again_as_it_is_consumed() -> None:
    taker = Taker(incoming(8, LEAST))
    taker.take(Op.FRAGMENT, 1, bytes(10))
    assert taker.taking.account(LEAST) == Ack(1, 9, LEAST + 10)
    taker.take(Op.DATA, 2, bytes(5))
    assert taker.taking.account(LEAST) == Ack(2, 9, LEAST + 10)
    assert taker.taking.granted_bytes == LEAST + 10
    taker.taking.consume(1, 15)
    assert taker.taking.account(LEAST) == Ack(2, 10, LEAST + 15)
    assert taker.taking.granted_bytes == LEAST


def test_credit_that_is_out_is_what_may_come_or_waits_to_be_consumed() -> None:
    taker = Taker(incoming(8, LEAST))
    assert taker.taking.granted_bytes == LEAST
    taker.take(Op.DATA, 1, bytes(10))
    assert taker.taking.granted_bytes == LEAST
    taker.taking.consume(1, 10)
    assert taker.taking.granted_bytes == LEAST - 10
    taker.taking.account(LEAST)
    assert taker.taking.granted_bytes == LEAST


def test_less_credit_than_before_takes_nothing_back() -> None:
    taker = Taker(incoming(8, LEAST))
    taker.take(Op.DATA, 1, bytes(100))
    taker.taking.consume(1, 100)
    assert taker.taking.account(100) == Ack(1, 9, LEAST)
    assert taker.taking.account(LEAST) == Ack(1, 9, LEAST + 100)


def test_credit_that_was_told_may_be_used() -> None:
    taker = Taker(incoming(1, 1))
    taker.take(Op.DATA, 1, b"1")
    taker.taking.consume(1, 1)
    taker.taking.account(2)
    assert taker.take(Op.DATA, 2, b"22") is Verdict.TAKEN


def test_credit_that_was_not_told_may_not_be_used() -> None:
    taker = Taker(incoming(1, 1))
    taker.take(Op.DATA, 1, b"1")
    taker.taking.consume(1, 1)
    with pytest.raises(ProtocolError, match="credit"):
        taker.take(Op.DATA, 2, b"2")


@pytest.mark.parametrize(("chunks", "count"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_an_account_is_due_when_a_quarter_of_the_chunks_was_consumed(chunks: int, count: int) -> None:
    taking = incoming(chunks, LEAST)
    for _ in range(count):
        assert not taking.is_due(LEAST)
        taking.consume(1, 0)
    assert taking.is_due(LEAST)
    taking.account(LEAST)
    assert not taking.is_due(LEAST)


def test_an_account_is_due_when_a_quarter_of_the_bytes_was_consumed() -> None:
    taking = incoming(1000, LEAST)
    taking.consume(1, FRAGMENT - 1)
    assert not taking.is_due(LEAST)
    taking.consume(1, 1)
    assert taking.is_due(LEAST)
    taking.account(LEAST)
    assert not taking.is_due(LEAST)


def test_an_account_is_due_when_fragments_brought_a_quarter_of_the_bytes() -> None:
    taker = Taker(incoming(1000, LEAST))
    taker.take(Op.FRAGMENT, 1, bytes(FRAGMENT))
    assert taker.taking.is_due(LEAST)


def test_an_account_is_due_when_there_is_a_quarter_more_to_give() -> None:
    taking = incoming(1000, LEAST)
    assert not taking.is_due(LEAST + FRAGMENT)
    assert taking.is_due(2 * LEAST)


def test_with_less_to_give_an_account_is_due_later() -> None:
    taking = incoming(1000, 2 * LEAST)
    taking.consume(1, LEAST + FRAGMENT - 1)
    assert not taking.is_due(LEAST)
    taking.consume(1, 1)
    assert taking.is_due(LEAST)


# -- both together ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("portion", [1, 2], ids=["all of the window", "half of the window"])
@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize(("chunks", "size"), [(1, LEAST), (2, LEAST + 1), (3, LEAST + 2), (5, LEAST + 3), (500, LEAST)])
def test_on_a_link_that_loses_nothing_the_accounts_that_are_due_keep_a_stream_going(
    chunks: int, size: int, batches: bool, portion: int
) -> None:
    out, taker = outgoing(chunks, size, batches=batches), Taker(incoming(chunks, size))
    wanted = [
        bytes([length % 251]) * length for length in (0, 1, FRAGMENT, 3 * LEAST, FRAGMENT + 1, 7, 0, 0, 5 * LEAST)
    ]
    waiting = list(wanted)
    consumed = 0
    for _ in range(500):
        while waiting and out.takes(len(waiting[0])):
            out.push(waiting.pop(0))
        for frame in due(out):
            taker.take(frame.op, frame.seq, frame.payload)
            for chunk in taker.chunks[consumed:]:
                taker.taking.consume(1, len(chunk))
            consumed = len(taker.chunks)
            if taker.taking.is_due(size // portion):
                out.acknowledge(taker.taking.account(size // portion))
    assert taker.chunks == wanted


# -- the quick ways in -------------------------------------------------------------------------------------------------


class Core:
    """What a ResponseSender needs that gives chunks to an Outgoing itself."""

    subject = "a"

    def __init__(self, out: Outgoing) -> None:
        self.over = Happening()
        self.over.set()  # to drop the sender is no fault
        self.cut_short = False
        self.direct, self.lock = out, threading.Lock()
        self.slow = self.seen_to = 0

    def send(self, data: bytes, deadline: Deadline) -> int:
        self.slow += 1
        return 0

    def gave(self) -> bool:
        self.see_to_it()
        return self.direct.was_taken()

    def see_to_it(self) -> None:
        self.seen_to += 1


def giving(out: Outgoing) -> ResponseSender:
    """A sender of this thread, which may give chunks, as it may once it has pushed the first."""
    out.push_some([], [])
    out.allow(True)
    core: Any = Core(out)
    return ResponseSender(core)


def taken_quickly(out: Outgoing, chunk: bytes) -> bool:
    """Whether ResponseSender.send() gives the chunk itself."""
    sender = giving(out)
    number = sender.send(chunk)
    core: Any = sender._core
    assert number == (0 if core.slow else out.number)
    out.take_in()
    assert out.given == []
    assert (out.number, out.number_bytes) == (out.count, out.offset)
    return not core.slow


def test_a_small_bare_chunk_is_given_as_push_would_take_it() -> None:
    quick, slow = outgoing(), outgoing()
    for chunk in (b"one", b"", b"three"):
        assert taken_quickly(quick, chunk)
        slow.push(chunk)
    assert (quick.last, quick.offset, quick.kept_bytes) == (slow.last, slow.offset, slow.kept_bytes) == (3, 8, 8)
    assert due(quick) == due(slow)


@pytest.mark.parametrize(
    ("out", "most"),
    [
        (outgoing(chunks=2), 2),
        (outgoing(size=8 * PLENTY, quota=3 * GIVEN_BYTES - 1), 2),
        (outgoing(size=5 * GIVEN_BYTES - 1), 4),
        (outgoing(max_payload=GIVEN_BYTES - 1), 0),
    ],
    ids=[
        "no seq left",
        "more than the quota",
        "no credit left",
        "larger than a fragment",
    ],
)
def test_nothing_is_given_that_there_is_no_room_or_credit_for(out: Outgoing, most: int) -> None:
    chunk = b"x" * GIVEN_BYTES
    sender = giving(out)
    given = 0
    while sender.send(chunk):
        given += 1
        assert given <= most
    assert given == most
    out.take_in()
    assert (out.last, out.offset, out.kept_bytes) == (most, most * GIVEN_BYTES, most * GIVEN_BYTES)
    assert not taken_quickly(out, chunk)


def test_a_chunk_that_is_not_small_is_not_given() -> None:
    assert not taken_quickly(outgoing(), b"x" * (GIVEN_BYTES + 1))


def test_nothing_is_given_before_the_first_chunk_and_behind_the_end() -> None:
    core: Any = Core(outgoing())
    out, sender = core.direct, ResponseSender(core)
    assert (sender.send(b"1"), core.slow) == (0, 1)
    out.push(b"1")
    assert (sender.send(b"2"), core.slow) == (0, 2)  # not before that is allowed
    out.allow(True)
    assert (sender.send(b"2"), core.slow) == (2, 2)
    out.acknowledge(Ack(0, PLENTY, 2 * PLENTY))
    assert (sender.send(b"3"), core.slow) == (3, 2)
    out.allow(False)
    out.acknowledge(Ack(0, PLENTY, 3 * PLENTY))  # which opens nothing
    assert (sender.send(b"4"), core.slow) == (0, 3)
    assert out.kept == [b"1", b"2", b"3"]


def test_whoever_gives_chunks_himself_sees_to_their_being_sent_from_the_number_that_was_agreed_on() -> None:
    sender = giving(outgoing())
    core: Any = sender._core
    core.direct.watch(3)
    seen = []
    for _ in range(4):
        sender.send(b"x")
        seen.append(core.seen_to)
    assert seen == [0, 0, 1, 2]


def in_another_thread(call: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as thread:
        thread.submit(call).result(PATIENCE)


@pytest.mark.parametrize("how", ["another thread pushes", "the stream ends"])
@pytest.mark.parametrize("when", ["behind it", "in front of it"])
def test_a_chunk_whose_thread_is_no_giver_any_more_is_kept_or_given_back(how: str, when: str) -> None:
    """What falls between two steps of send()."""
    out = outgoing()
    giving(out)
    out.watch(PLENTY)

    def end() -> None:
        if how == "the stream ends":
            out.allow(False)
        else:
            in_another_thread(lambda: out.push(b"theirs"))

    if when == "in front of it":
        end()
    out.number, out.number_bytes = out.number + 1, out.number_bytes + 4
    out.given.append(b"mine")
    if when == "behind it":
        end()
    out.take_in()
    theirs = [b"theirs"] if how == "another thread pushes" else []
    assert out.kept == [*([b"mine"] if when == "behind it" else []), *theirs]
    assert out.look_at == 0  # so that it asks
    assert out.was_taken() == (when == "behind it")
    assert out.given == []
    assert out.count == len(out.kept)
    assert (out.giver, out.limit) == (0, 0)


class Giver:
    """The thread that gives, and a stream whose lock another thread holds while this one has a turn."""

    subject = "a"

    def __init__(self, window: int) -> None:
        self.over = Happening()
        self.over.set()
        self.cut_short = False
        self.direct, self.lock = outgoing(window), threading.Lock()
        self.sent: dict[int, bytes] = {}
        self._turn, self._stands, self._free = threading.Event(), threading.Event(), threading.Event()
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(self._prepare).result(PATIENCE)
        self._giving = self._thread.submit(self._give)

    def _prepare(self) -> None:
        self.direct.push(b"0")
        self.direct.allow(True)
        self.direct.watch(PLENTY)
        core: Any = self
        self._sender = ResponseSender(core)
        for chunk in (b"mine a", b"mine b"):
            self.sent[self._sender.send(chunk)] = chunk

    def _give(self) -> None:
        assert self._turn.wait(PATIENCE)
        for number in range(3):
            chunk = b"mine %d" % number
            with contextlib.suppress(StreamClosed):
                self.sent[self._sender.send(chunk)] = chunk
        self._stands.set()

    def turn(self) -> None:
        """It goes on until it has given its chunks, or needs the lock."""
        self._turn.set()
        assert self._stands.wait(PATIENCE)

    def finish(self) -> None:
        """The lock is free."""
        self._free.set()
        self._turn.set()
        self._giving.result(PATIENCE)
        self._thread.shutdown()

    def _lock(self) -> None:
        self._stands.set()
        assert self._free.wait(PATIENCE)

    def gave(self) -> bool:
        self._lock()
        return self.direct.was_taken()

    def send(self, data: bytes, deadline: Deadline) -> int:
        self._lock()
        if not self.direct._direct or not self.direct.takes(len(data)):
            raise StreamClosed("it is over, or would have to wait")
        self.direct.push(data)
        return self.direct.count


@pytest.mark.parametrize(
    ("how", "window", "sent"),
    [
        ("another thread pushes", 9, 5),
        ("another thread pushes several", 9, 5),
        ("the writer comes", 5, 4),
        ("the requester has some", 5, 5),
        ("the stream ends", 9, 2),
    ],
)
def test_whenever_the_giver_gives_while_another_thread_is_at_it_nothing_is_lost_doubled_or_misnumbered(
    how: str, window: int, sent: int
) -> None:
    calls: dict[str, Callable[[Outgoing], object]] = {
        "another thread pushes": lambda out: out.push(b"theirs"),
        "another thread pushes several": lambda out: out.push_some([b"theirs"] * 2, [6, 6]),
        "the writer comes": lambda out: out.next(),
        "the requester has some": lambda out: (out.next(), out.acknowledge(Ack(1, 6, PLENTY))),
        "the stream ends": lambda out: out.allow(False),
    }
    inside = (
        Outgoing.push,
        Outgoing.push_some,
        Outgoing._pushing,
        Outgoing.allow,
        Outgoing.take_in,
        Outgoing._take_in,
        Outgoing._no_giver,
        Outgoing._allot,
        Outgoing._reckon,
        Outgoing.next,
        Outgoing._next_chunks,
        Outgoing.acknowledge,
        Outgoing._let_go,
    )
    givers = [Giver(window)]
    for _ in turns(lambda: calls[how](givers[-1].direct), lambda: givers[-1].turn(), *inside):
        giver = givers[-1]
        giver.finish()
        out = giver.direct
        out.take_in()
        assert out.given == []
        assert out.count == out.last
        assert len(out.kept) <= window
        chunks = [b"0"] * out.acked + out.kept
        assert {number: chunks[number - 1] for number in giver.sent} == giver.sent
        assert [chunk for chunk in chunks if chunk.startswith(b"mine")] == list(giver.sent.values())
        assert len(giver.sent) >= sent
        givers.append(Giver(window))
    givers[-1].finish()
    assert len(givers) > 50


def test_once_a_second_thread_has_pushed_there_is_no_giver_for_good() -> None:
    out = outgoing()
    assert taken_quickly(out, b"1")
    in_another_thread(lambda: out.push(b"2"))
    assert (out.giver, out.limit) == (0, 0)
    assert out.allowed
    out.push(b"3")
    assert (out.giver, out.limit) == (0, 0)
    assert (out.kept, out.count) == ([b"1", b"2", b"3"], 3)


@pytest.mark.parametrize(
    ("out", "size", "most"),
    [
        (outgoing(chunks=3), 9, 3),
        (outgoing(size=8 * PLENTY, max_payload=2 * PLENTY + 1, quota=3 * PLENTY), PLENTY, 3),
        (outgoing(size=4 * PLENTY), PLENTY, 4),
        (outgoing(size=2 * PLENTY + 9, max_payload=PLENTY // 2), PLENTY, 0),
    ],
    ids=["no seq left", "more than the quota", "no credit left", "larger than a fragment"],
)
def test_several_threads_push_quickly_what_there_is_room_and_credit_for(out: Outgoing, size: int, most: int) -> None:
    sender = giving(out)
    in_another_thread(lambda: out.push_some([], []))
    out.allow(True)
    core: Any = sender._core
    chunk, pushed = b"x" * size, 0
    while sender.send(chunk):
        pushed += 1
        assert pushed <= most
        assert core.seen_to == pushed  # watch_at is 0
        assert (out.given, out.count, out.kept_bytes) == ([], pushed, pushed * size)
    assert (pushed, core.slow) == (most, 1)
    out.allow(False)
    assert (sender.send(b""), core.slow) == (0, 2)


def test_what_is_given_while_the_writer_comes_to_rest_is_seen() -> None:
    out = outgoing()
    sender = giving(out)
    core: Any = sender._core
    out.watch(PLENTY)
    assert sender.send(b"1")
    assert (core.seen_to, out.has_given) == (0, True)  # it looks behind watch(0)
    out.watch(0)
    assert out.has_given
    assert sender.send(b"2")
    assert core.seen_to == 1  # or the giver does
    out.take_in()
    assert not out.has_given


def test_of_a_run_as_many_are_taken_as_there_is_room_for() -> None:
    sizes = [10, 20, 30, 40]
    chunks = [b"x" * size for size in sizes]
    assert outgoing(chunks=3).push_some(chunks, sizes) == 3
    assert outgoing(quota=60).push_some(chunks, sizes) == 3
    assert outgoing(quota=59).push_some(chunks, sizes) == 2
    assert outgoing(max_payload=25).push_some(chunks, sizes) == 2
    assert outgoing().push_some(chunks, sizes) == 4
    assert outgoing().push_some([], []) == 0


def test_room_that_an_account_makes_is_there_for_the_quick_way() -> None:
    out = outgoing(chunks=2)
    assert out.push_some([b"1", b"2", b"3"], [1, 1, 1]) == 2
    due(out)
    assert not taken_quickly(out, b"3")
    assert out.acknowledge(Ack(1, 3, PLENTY))
    assert taken_quickly(out, b"3")
    assert not taken_quickly(out, b"4")


def test_a_quota_that_grows_or_shrinks_counts_at_once() -> None:
    out = outgoing(quota=GIVEN_BYTES)
    assert out.push_some([b"11", b"x" * GIVEN_BYTES], [2, GIVEN_BYTES]) == 1
    out.quota_bytes += 2
    assert taken_quickly(out, b"x" * GIVEN_BYTES)
    out.quota_bytes -= 1
    assert not taken_quickly(out, b"")


# -- many at once ------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=30),
    window=st.integers(1, 40),
    window_bytes=st.integers(1, 900),
    at_once=st.integers(1, 10),
)
def test_chunks_taken_together_are_taken_as_one_by_one(
    sizes: list[int], window: int, window_bytes: int, at_once: int
) -> None:
    payloads = [bytes([number]) * size for number, size in enumerate(sizes)]
    outcomes = []
    for together in (False, True):
        incoming, chunks, fault = Incoming(window, window_bytes, 1 << 20), list[bytes](), ""
        try:
            for begin in range(0, len(payloads), at_once):
                run = payloads[begin : begin + at_once]
                if together:
                    incoming.take_next(run, chunks)
                else:
                    for payload in run:
                        incoming.take(Op.DATA, incoming.received + 1, payload, chunks)
        except ProtocolError as error:
            fault = str(error)
        outcomes.append((chunks, fault, incoming.received, incoming.account(window_bytes)))
    assert outcomes[0] == outcomes[1]


def test_whole_chunks_do_not_come_between_fragments() -> None:
    incoming, chunks = Incoming(8, 1000, 1000), list[bytes]()
    assert incoming.between_chunks
    incoming.take(Op.FRAGMENT, 1, b"a", chunks)
    assert not incoming.between_chunks
    incoming.take(Op.DATA, 2, b"b", chunks)
    assert incoming.between_chunks
    assert chunks == [b"ab"]
