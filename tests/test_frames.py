"""natsync.streaming.frames: the headers, subjects and payloads of streams, byte by byte and both ways."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natsync import headers as wire
from natsync.errors import Code, InvalidArgument, ProtocolError
from natsync.headers import Headers
from natsync.streaming import terms
from natsync.streaming.frames import (
    FRAMED_MARK,
    PLAIN_MARK,
    Ack,
    Address,
    Op,
    cancel_code,
    control_inbox,
    decode_ack,
    decode_address,
    decode_batch,
    decode_cancel,
    encode_batch,
    encode_cancel,
    encode_seq,
    is_unheard,
)
from natsync.streaming.terms import (
    LEAST_WINDOW_BYTES,
    Offer,
    Opening,
    Status,
    check_key,
    decode_headers,
    decode_offer,
    decode_opening,
    decode_status,
    encode_opening,
    encode_status,
    header_text,
    user_headers,
    with_timeout,
)

STREAM = b"_INBOX.abc.nsy1.7"
OFFER = Offer(8192, 4194304, 10.0, 5.0, True, 64 << 20)
OFFERED = "1;w=8192;b=4194304;g=10000;hb=5000;m=67108864;cap=b"
OPS = [Op.ACCEPT, Op.REFUSED, Op.DATA, Op.FRAGMENT, Op.BATCH, Op.END, Op.ERROR, Op.PROBE]
#: Of each property: there are many of them.
some = settings(max_examples=50)
#: Numbers that are none, or that no peer would send: empty, signed, fractional, padded, of other scripts, too long.
MALFORMED_NUMBERS = ["", "x", "-5", "+5", "1.5", "1e3", " 5", "5 ", "1_0", "٣", "²", "9" * 13, "9" * 5000]


def seq_block(value: str) -> bytes:
    return b"NATS/1.0\r\nNatsync-Seq: " + value.encode() + b"\r\n\r\n"


def opening(headers: dict[str, Any] | None = None, **said: Any) -> Opening:
    return decode_opening(wire.decode(encode_opening(Headers(headers), said.pop("offer", OFFER), **said)))


def status(given_status: Status) -> Status:
    return decode_status(wire.decode(encode_status(given_status).encode()))


# -- addresses -------------------------------------------------------------------------------------------------------


def test_a_control_inbox_ends_with_the_mark_of_its_mode() -> None:
    assert control_inbox("_INBOX", "abc", PLAIN_MARK) == "_INBOX.abc.nsy0"
    assert control_inbox("_INBOX", "abc", FRAMED_MARK) == "_INBOX.abc.nsy1"


@pytest.mark.parametrize(
    ("reply", "op", "seq"),
    [
        (b"_INBOX.abc.nsy1.7.a.0", Op.ACCEPT, 0),
        (b"_INBOX.abc.nsy1.7.r.0", Op.REFUSED, 0),
        (b"_INBOX.abc.nsy1.7.d.1", Op.DATA, 1),
        (b"_INBOX.abc.nsy1.7.f.42", Op.FRAGMENT, 42),
        (b"_INBOX.abc.nsy1.7.b.43", Op.BATCH, 43),
        (b"_INBOX.abc.nsy1.7.e.200000", Op.END, 200_000),
        (b"_INBOX.abc.nsy1.7.x.0", Op.ERROR, 0),
        (b"_INBOX.abc.nsy1.7.h.999999999999999", Op.PROBE, 10**15 - 1),
    ],
)
def test_a_reply_subject_says_what_a_frame_is(reply: bytes, op: bytes, seq: int) -> None:
    assert decode_address(reply, None) == Address(STREAM, op, seq)


def test_a_letter_that_is_not_known_is_a_frame_all_the_same() -> None:
    assert decode_address(STREAM + b".q.3", None) == Address(STREAM, b"q", 3)


def test_an_inbox_of_many_tokens_and_marks_keeps_them() -> None:
    assert decode_address(b"a.nsy1.b.nsy1.7.d.1", None) == Address(b"a.nsy1.b.nsy1.7", Op.DATA, 1)


@pytest.mark.parametrize(
    "reply",
    [
        None,
        b"",
        b"nsy1",
        b".nsy1.",
        b"nsy1.7.d.1",
        b"_INBOX.abc.7",
        b"_INBOX.abc.nsy0.7",
        b"_INBOX.abc.nsy0.7.d.1",
        b"_INBOX.abc.nsy1",
        b"_INBOX.abc.nsy1.7",
        b"_INBOX.abc.nsy1.d.1",
        b"_INBOX.abc.nsy1.7.d",
        b"_INBOX.abc.nsy1.7.d.",
        b"_INBOX.abc.nsy1.7.d.x",
        b"_INBOX.abc.nsy1.7.d.-1",
        b"_INBOX.abc.nsy1.7.d.1 ",
        b"_INBOX.abc.nsy1.7.d.\xd9\xa3",
        b"_INBOX.abc.nsy1.7.d." + b"1" * 16,
        b"_R_.x7Yz.d1",
    ],
)
def test_another_reply_subject_is_no_address(reply: bytes | None) -> None:
    assert decode_address(reply, None) is None


def test_the_header_that_says_what_a_frame_is() -> None:
    assert encode_seq(STREAM, Op.DATA, 42) == "d.42 _INBOX.abc.nsy1.7"
    block = Headers({terms.SEQ_HEADER: encode_seq(STREAM, Op.DATA, 42)}).encode()
    assert block == b"NATS/1.0\r\nNatsync-Seq: d.42 _INBOX.abc.nsy1.7\r\n\r\n"


@pytest.mark.parametrize("reply", [None, b"_R_.x7Yz.d1", b"_INBOX.other.nsy1.1.d.1"])
def test_the_header_counts_whatever_the_reply_subject_became(reply: bytes | None) -> None:
    assert decode_address(reply, seq_block("e.9 _INBOX.abc.nsy1.7")) == Address(STREAM, Op.END, 9)


@pytest.mark.parametrize("reply", [b"", b"orders.new", b"_INBOX.abc.7", b"a._R_.x7Yz", b"a.nsy0.7", b"nsy1.7"])
def test_the_header_does_not_count_where_an_answer_would_go_to_no_responder(reply: bytes) -> None:
    assert decode_address(reply, seq_block("e.9 _INBOX.abc.nsy1.7")) is None


def test_a_header_that_mentions_the_name_is_not_taken_for_it() -> None:
    block = b"NATS/1.0\r\nA: Natsync-Seq: d.1 a.nsy1.1\r\nNatsync-Seq: f.3 _INBOX.abc.nsy1.7\r\n\r\n"
    assert decode_address(None, block) == Address(STREAM, Op.FRAGMENT, 3)


def test_the_header_is_found_among_others_and_without_its_space() -> None:
    block = b"NATS/1.0\r\nA: 1\r\nNatsync-Seq:f.3 _INBOX.abc.nsy1.7\r\nB: 2\r\n\r\n"
    assert decode_address(None, block) == Address(STREAM, Op.FRAGMENT, 3)


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"NATS/1.0\r\n\r\n",
        b"NATS/1.0\r\nNatsync-Status: 8 X\r\n\r\n",
        b"NATS/1.0\r\nX-Natsync-Seq: d.1 a.nsy1.7\r\n\r\n",
        b"NATS/1.0\r\nA: Natsync-Seq: d.1 a.nsy1.7\r\n\r\n",
    ],
)
def test_other_headers_leave_the_address_to_the_reply_subject(block: bytes) -> None:
    assert decode_address(STREAM + b".x.5", block) == Address(STREAM, Op.ERROR, 5)


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"NATS/1.0 503\r\n\r\n",
        b"NATS/1.0\r\nNatsync-Seq:",
        b"NATS/1.0\r\nNatsync-Seq: d.1 a.nsy1.7",
        *map(
            seq_block,
            ["", "d.1", "d.1 ", "d.1  a", "d a", "d. a", ".1 a", "1 a", "dd.1 a", "D.1 a", "d.-1 a", "d.1 a b"],
        ),
        seq_block("d." + "1" * 16 + " a"),
        seq_block("d.٣ a"),
    ],
)
def test_other_headers_are_no_address(block: bytes) -> None:
    assert decode_address(None, block) is None


@pytest.mark.parametrize(
    ("block", "payload", "unheard"),
    [
        (b"NATS/1.0 503\r\n\r\n", b"", True),
        (b"NATS/1.0 503 No Responders\r\nA: 1\r\n\r\n", b"", True),
        (b"NATS/1.0 503\r\n\r\n", b"x", False),
        (b"NATS/1.0 404\r\n\r\n", b"", False),
        (b"NATS/1.0\r\n503: 1\r\n\r\n", b"", False),
        (b"NATS/1.0 50x\r\n\r\n", b"", False),
        (b"", b"", False),
        (None, b"", False),
    ],
)
def test_nobody_listens_if_an_empty_message_has_the_status_of_it(
    block: bytes | None, payload: bytes, unheard: bool
) -> None:
    assert is_unheard((None, block, payload)) is unheard


tokens = st.from_regex(rb"[!-\-/-~]{1,9}", fullmatch=True)
streams = st.builds(
    lambda inbox, number: b".".join(inbox) + b".nsy1.%d" % number,
    st.lists(tokens, min_size=1, max_size=3),
    st.integers(0, 1 << 40),
)
addresses = st.builds(Address, streams, st.sampled_from(OPS), st.integers(0, 10**15 - 1))


@some
@given(addresses)
def test_what_is_put_into_a_reply_subject_comes_out_of_it(address: Address) -> None:
    assert decode_address(b"%b.%b.%d" % (address.stream, address.op, address.seq), None) == address


@some
@given(addresses, st.dictionaries(st.sampled_from(["A", "Z"]), st.text("abc :.", max_size=5)))
def test_what_is_put_into_the_header_comes_out_of_it(address: Address, others: dict[str, str]) -> None:
    value = encode_seq(address.stream, address.op, address.seq)
    assert decode_address(None, Headers({**others, terms.SEQ_HEADER: value, "End": "1"}).encode()) == address


#: What the decoders look for, in any order: closer to what is valid than random bytes are.
SCRAPS = [b".nsy1.", b".", b"d", b"7", b"\r\nNatsync-Seq:", b" ", b"\r\n", b"x", b"-1", b"+", b"!", b"0", b"\xff"]
garbage = st.binary(max_size=30) | st.lists(st.sampled_from(SCRAPS), max_size=9).map(b"".join)


@some
@given(st.none() | garbage, st.none() | garbage)
def test_no_subject_and_no_headers_make_an_address_fail(reply: bytes | None, block: bytes | None) -> None:
    address = decode_address(reply, block)
    assert address is None or address.seq >= 0


# -- headers of frames -----------------------------------------------------------------------------------------------


def test_the_headers_of_a_frame_are_those_of_its_block() -> None:
    assert decode_headers(b"NATS/1.0\r\nA: 1\r\nA: 2\r\n\r\n") == {"A": ["1", "2"]}


@pytest.mark.parametrize("name", ["Natsync-Seq", "natsync-seq"])
def test_the_header_that_says_what_a_frame_is_is_not_the_applications(name: str) -> None:
    block = f"NATS/1.0\r\n{name}: d.1 _INBOX.abc.nsy1.7\r\nA: 1\r\n\r\n".encode()
    assert decode_headers(block) == {"A": "1"}


@pytest.mark.parametrize(
    "block", [None, b"", b"NATS/1.0\r\n\r\n", b"A: 1\r\n\r\n", b"NATS/1.0\r\nA: 1\r\nno colon\r\n\r\n"]
)
def test_no_headers_and_malformed_ones_count_as_none(block: bytes | None) -> None:
    assert decode_headers(block) == {}


@some
@given(st.none() | garbage | garbage.map(lambda some: b"NATS/1.0\r\n" + some))
def test_no_block_makes_the_headers_of_a_frame_fail(block: bytes | None) -> None:
    assert terms.SEQ_HEADER not in decode_headers(block)


# -- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_its_count_the_lengths_and_the_chunks() -> None:
    payload = b"\0\0\0\3\0\0\0\2\0\0\0\0\0\0\1\0" + b"ab" + b"c" * 256
    assert encode_batch([b"ab", b"", b"c" * 256]) == payload
    assert decode_batch(payload) == [b"ab", b"", b"c" * 256]


def test_a_batch_of_one_empty_chunk() -> None:
    assert encode_batch([b""]) == b"\0\0\0\1\0\0\0\0"
    assert decode_batch(b"\0\0\0\1\0\0\0\0") == [b""]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\0",
        b"\0\0\0\0\0\0\0\0",
        b"\0\0\0\1",
        b"\0\0\0\1\0\0\0",
        b"\0\0\0\1\0\0\0\2a",
        b"\0\0\0\1\0\0\0\2abc",
        b"\0\0\0\2\0\0\0\1abc",
        b"\0\0\0\2\0\0\0\1\0\0\0\1a",
        b"\0\0\0\1\xff\xff\xff\xff",
        b"\xff\xff\xff\xff" + b"\0" * 40,
        b"__STREAM_END__",
    ],
)
def test_a_batch_whose_lengths_do_not_add_up_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="batch"):
        decode_batch(payload)


@some
@given(st.lists(st.binary(max_size=20), min_size=1, max_size=20))
def test_what_is_put_into_a_batch_comes_out_of_it(chunks: list[bytes]) -> None:
    assert decode_batch(encode_batch(chunks)) == chunks


@some
@given(st.lists(st.binary(max_size=5), min_size=1, max_size=5), st.data())
def test_a_batch_that_is_cut_or_has_a_tail_is_refused(chunks: list[bytes], data: st.DataObject) -> None:
    whole = encode_batch(chunks)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for payload in (cut, whole + data.draw(st.binary(min_size=1, max_size=5))):
        with pytest.raises(ProtocolError):
            decode_batch(payload)


@some
@given(garbage | st.lists(st.sampled_from([b"\0\0\0\0", b"\0\0\0\1", b"\0\0\0\2", b"a"]), max_size=7).map(b"".join))
def test_any_bytes_are_one_batch_or_are_refused(payload: bytes) -> None:
    try:
        chunks = decode_batch(payload)
    except ProtocolError:
        return
    assert encode_batch(chunks) == payload


# -- control ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "ack"),
    [
        (b"+3 8195 4194400", Ack(3, 8195, 4194400)),
        (b"!3 8195 4194400", Ack(3, 8195, 4194400, missing=True)),
        (b"+0 0 0", Ack(0, 0, 0)),
        (b"!" + b" ".join([b"9" * 18] * 3), Ack(10**18 - 1, 10**18 - 1, 10**18 - 1, missing=True)),
    ],
)
def test_an_account_says_what_is_here_and_how_much_may_come(payload: bytes, ack: Ack) -> None:
    assert ack.encode() == payload
    assert decode_ack(payload) == ack


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"+",
        b"?",
        b"x 1 2",
        b"1 2 3",
        b"+1 2",
        b"+1 2 3 4",
        b"+ 1 2 3",
        b"+1  2 3",
        b"+1 2 3 ",
        b"+1 2 3\n",
        b" +1 2 3",
        b"++1 2 3",
        b"+-1 2 3",
        b"+1 2 x",
        b"+1 2 1.5",
        b"+1 2 \xd9\xa3",
        b"+1 2 " + b"9" * 19,
        b"+1 2 3\0",
    ],
)
def test_other_control_payloads_are_no_account(payload: bytes) -> None:
    assert decode_ack(payload) is None


numbers = st.integers(0, 10**18 - 1)


@some
@given(st.builds(Ack, numbers, numbers, numbers, st.booleans()))
def test_what_is_put_into_an_account_comes_out_of_it(ack: Ack) -> None:
    assert decode_ack(ack.encode()) == ack


@some
@given(garbage | st.from_regex(rb"[+!]?\d* ?-?\d* ?\d*\s?", fullmatch=True))
def test_no_bytes_make_an_account_fail(payload: bytes) -> None:
    ack = decode_ack(payload)
    assert ack is None or min(ack.received, ack.limit, ack.limit_bytes) >= 0


def test_a_cancel_carries_its_code_for_others_to_read() -> None:
    assert encode_cancel("the user left") == b"x 1 the user left"
    assert encode_cancel("late", Code.DEADLINE_EXCEEDED) == b"x 4 late"


@pytest.mark.parametrize("reason", ["the user left", "é", "a b  c", "x 1 y", "line\r\nPUB a 0\r\n\r\n"])
def test_a_cancel_carries_its_reason(reason: str) -> None:
    assert decode_cancel(encode_cancel(reason)) == reason


@pytest.mark.parametrize("code", Code)
def test_the_code_of_a_cancel_comes_out_of_it(code: Code) -> None:
    assert cancel_code(encode_cancel("late", code)) == code


@pytest.mark.parametrize(
    "payload", [b"", b"x", b"x ", b"x  4", b"x what", b"x -1 a", b"x 4a b", b"x \xd9\xa3 a", b"x " + b"9" * 10]
)
def test_a_malformed_code_of_a_cancel_is_none(payload: bytes) -> None:
    assert cancel_code(payload) == 0


def test_a_long_reason_is_cut_to_what_fits() -> None:
    assert decode_cancel(encode_cancel("é" * (terms.ERROR_TEXT + 1))) == "é" * terms.ERROR_TEXT


@pytest.mark.parametrize("payload", [encode_cancel(""), b"x ", b"x 1", b"x 1 ", b"x what"])
def test_a_cancel_without_a_reason_has_one(payload: bytes) -> None:
    assert decode_cancel(payload) == "cancelled"


def test_a_reason_that_utf8_cannot_encode_is_still_a_cancel() -> None:
    assert decode_cancel(encode_cancel("\ud800")) == "?"


def test_a_reason_that_is_no_utf8_is_still_a_cancel() -> None:
    assert decode_cancel(b"x 1 \xff") == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("payload", [b"", b"x", b"xx 1 a", b" x 1 a", b"X 1 a", b"+1 2 3", b"!1 2 3", b"?"])
def test_other_control_payloads_are_no_cancel(payload: bytes) -> None:
    assert decode_cancel(payload) is None


@some
@given(st.text(min_size=1), st.sampled_from(Code))
def test_any_reason_comes_out_of_a_cancel(reason: str, code: Code) -> None:
    assert decode_cancel(encode_cancel(reason, code)) == reason


@some
@given(garbage)
def test_a_payload_is_a_cancel_if_it_begins_like_one(payload: bytes) -> None:
    assert (decode_cancel(payload) is not None) is payload.startswith(b"x ")


# -- offers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offer", "text"),
    [
        (OFFER, OFFERED),
        (Offer(1, 4096, 1.001, 0.001, False, 1), "1;w=1;b=4096;g=1001;hb=1;m=1;cap="),
        (Offer(10**12 - 1, 10**12 - 1, 0.0, 0.0), "1;w=999999999999;b=999999999999;g=0;hb=0;m=67108864;cap=b"),
    ],
)
def test_an_offer_is_its_version_and_its_limits(offer: Offer, text: str) -> None:
    assert offer.encode() == text
    assert decode_offer(text) == offer


def test_an_offer_beyond_what_is_understood_is_the_most_that_is() -> None:
    endless = Offer(10**20, 10**20, 10.0**15, 10.0**15, False, 10**20)
    assert endless.encode() == ";".join(["1", *(f"{key}={'9' * 12}" for key in ("w", "b", "g", "hb", "m")), "cap="])


def test_an_offer_that_leaves_out_its_limits_has_the_usual_ones() -> None:
    assert decode_offer("1") == Offer(8192, 4194304, 10.0, 5.0, False, 64 << 20)


def test_an_offer_may_have_spaces_another_order_and_fields_of_later_versions() -> None:
    assert decode_offer(" 1 ; b = 8192 ;w=5;new=x;flag;;cap=zb") == Offer(5, 8192, 10.0, 5.0, True, 64 << 20)


def test_a_capability_of_later_versions_is_not_batches() -> None:
    told = decode_offer("1;cap=z")
    assert told is not None
    assert not told.batches


def test_a_requester_that_puts_nothing_together_takes_a_chunk_of_one_byte() -> None:
    told = decode_offer("1;m=0")
    assert told is not None
    assert told.chunk_bytes == 1


@pytest.mark.parametrize("text", ["", "0", "2", "1.0", "w=1", ";1", "11;w=1", "v1;w=1", "2" + OFFERED[1:]])
def test_an_offer_of_another_version_is_none(text: str) -> None:
    assert decode_offer(text) is None


@pytest.mark.parametrize("key", ["w", "b", "g", "hb", "m"])
@pytest.mark.parametrize("value", [value for value in MALFORMED_NUMBERS if value == value.strip()])
def test_an_offer_with_a_malformed_limit_is_none(key: str, value: str) -> None:
    assert decode_offer(f"1;w=8192;{key}={value};cap=b") is None


@pytest.mark.parametrize("text", ["1;w=0", f"1;b={LEAST_WINDOW_BYTES - 1}", "1;b=0"])
def test_an_offer_in_which_no_chunk_fits_is_none(text: str) -> None:
    assert decode_offer(text) is None


def test_the_least_offer_is_taken() -> None:
    assert decode_offer(f"1;w=1;b={LEAST_WINDOW_BYTES}") is not None


milliseconds = st.integers(0, 10**12 - 1).map(lambda number: number / 1000)
offers = st.builds(
    Offer,
    st.integers(1, 10**12 - 1),
    st.integers(LEAST_WINDOW_BYTES, 10**12 - 1),
    milliseconds,
    milliseconds,
    st.booleans(),
    st.integers(1, 10**12 - 1),
)


@some
@given(offers)
def test_what_is_put_into_an_offer_comes_out_of_it(offer: Offer) -> None:
    assert decode_offer(offer.encode()) == offer


fields = st.lists(st.sampled_from(["1", ";", "=", "w", "b", "g", "hb", "m", "cap", "0", "5000", " ", "-", "٣", "\0"]))


@some
@given(st.text(max_size=20) | fields.map("".join) | fields.map(lambda some: "1;" + "".join(some)))
def test_no_text_makes_an_offer_fail(text: str) -> None:
    offer = decode_offer(text)
    assert offer is None or (offer.window >= 1 and offer.window_bytes >= LEAST_WINDOW_BYTES and offer.chunk_bytes >= 1)


# -- the opening -----------------------------------------------------------------------------------------------------


def test_the_headers_of_an_opening_that_says_everything() -> None:
    block = encode_opening(Headers({"X-Trace": ["1", "2"]}), OFFER, 29.95, 2, 7)
    assert block == (
        b"NATS/1.0\r\nX-Trace: 1\r\nX-Trace: 2\r\n"
        b"Natsync-Stream: 1;w=8192;b=4194304;g=10000;hb=5000;m=67108864;cap=b\r\n"
        b"Natsync-Timeout: 29950\r\nNatsync-Attempt: 2\r\nNatsync-Resume: 7\r\n\r\n"
    )
    assert decode_opening(wire.decode(block)) == Opening(True, OFFER, 29.95, 2, 7, Headers({"X-Trace": ["1", "2"]}))


def test_an_opening_with_nothing_but_its_offer() -> None:
    assert encode_opening(Headers(), OFFER) == f"NATS/1.0\r\nNatsync-Stream: {OFFERED}\r\n\r\n".encode()
    assert opening() == Opening(True, OFFER, None, 0, None, Headers())


def test_an_opening_of_a_plain_stream_says_so_and_the_rest() -> None:
    assert encode_opening(Headers({"A": "1"}), None) == b"NATS/1.0\r\nA: 1\r\nNatsync-Stream: 0\r\n\r\n"
    assert opening({"A": "1"}, offer=None, timeout=5) == Opening(True, None, 5.0, 0, None, Headers({"A": "1"}))


def test_no_headers_open_a_plain_stream() -> None:
    assert decode_opening(Headers()) == Opening(False, None, None, 0, None, Headers())


def test_a_requester_that_has_no_chunk_yet_says_so() -> None:
    assert opening(resume=0).resume == 0


@pytest.mark.parametrize(
    ("timeout", "told"), [(0, 0.001), (0.0001, 0.001), (0.0011, 0.002), (0.0019, 0.002), (1, 1.0), (86_400, 86_400.0)]
)
def test_a_deadline_travels_in_whole_milliseconds_and_never_as_none(timeout: float, told: float) -> None:
    assert opening(timeout=timeout).timeout == told


def test_a_request_that_is_no_stream_may_tell_its_deadline_too() -> None:
    given_headers = Headers({"A": "1"})
    assert with_timeout(given_headers, 1.5) == {"A": "1", "Natsync-Timeout": "1500"}
    assert with_timeout(given_headers, None) == {"A": "1"}
    assert with_timeout(None, 0) == {"Natsync-Timeout": "1"}
    assert given_headers == {"A": "1"}


def test_an_opening_leaves_the_users_headers_as_they_are() -> None:
    headers = Headers({"A": "1"})
    encode_opening(headers, OFFER, 5, 1, 2)
    assert headers == {"A": "1"}


@pytest.mark.parametrize(
    "key", ["Natsync-Stream", "natsync-timeout", "NATSYNC-ATTEMPT", "Natsync-Anything", "Nats-Msg-Id"]
)
def test_the_librarys_own_headers_are_no_metadata(key: str) -> None:
    assert decode_opening(Headers({key: "1", "Mine": "2"})).metadata == {"Mine": "2"}


def test_headers_are_read_whatever_their_case() -> None:
    told = decode_opening(Headers({"NATSYNC-STREAM": OFFERED, "natsync-timeout": "5000"}))
    assert (told.offer, told.timeout) == (OFFER, 5.0)


def test_a_request_of_another_client_opens_a_stream_too() -> None:
    headers = Headers({"Connect-ID": "7"})
    assert decode_opening(headers) == Opening(False, None, None, 0, None, headers)


@pytest.mark.parametrize("value", MALFORMED_NUMBERS)
def test_malformed_numbers_count_as_not_said(value: str) -> None:
    keys = (terms.TIMEOUT_HEADER, terms.ATTEMPT_HEADER, terms.RESUME_HEADER)
    told = decode_opening(Headers({terms.STREAM_HEADER: OFFERED, **dict.fromkeys(keys, value)}))
    assert told == Opening(True, OFFER, None, 0, None, Headers())


def test_an_offer_of_another_version_leaves_the_stream_plain() -> None:
    assert decode_opening(Headers({terms.STREAM_HEADER: "2;w=1", terms.TIMEOUT_HEADER: "1000"})) == Opening(
        True, None, 1.0, 0, None, Headers()
    )


counts = st.integers(0, 10**12 - 1)


@some
@given(
    st.none() | offers,
    st.none() | st.integers(1, 10**9).map(lambda number: number / 1000),
    counts,
    st.none() | counts,
    st.dictionaries(st.sampled_from(["A", "b", "X-Trace"]), st.text("aé: ;=\t", max_size=5).map(str.strip)),
)
def test_what_is_put_into_an_opening_comes_out_of_it(
    offer: Offer | None, timeout: float | None, attempt: int, resume: int | None, metadata: dict[str, str]
) -> None:
    told = decode_opening(wire.decode(encode_opening(Headers(metadata), offer, timeout, attempt, resume)))
    assert told == Opening(True, offer, told.timeout, attempt, resume, Headers(metadata))
    if timeout is None:
        assert told.timeout is None
    else:  # the requester's own deadline comes first, or with it
        assert told.timeout is not None
        assert timeout <= told.timeout < timeout + 0.0015


@some
@given(
    st.dictionaries(
        st.sampled_from(["Natsync-Stream", "Natsync-Timeout", "Natsync-Attempt", "Natsync-Resume", "X"]),
        st.text(max_size=8) | fields.map("".join),
    )
)
def test_no_headers_make_the_opening_fail(fields: dict[str, str]) -> None:
    headers = Headers()
    headers._fields += fields.items()  # as received: unchecked
    decode_opening(headers)


@pytest.mark.parametrize("key", ["Natsync-Stream", "natsync-x", "NATS-Msg-Id", "nats-x"])
def test_users_may_not_give_the_librarys_own_headers(key: str) -> None:
    with pytest.raises(InvalidArgument, match="reserved"):
        user_headers({"Mine": "1", key: "2"})


@pytest.mark.parametrize("key", ["Natsync", "Nats", "X-Nats-Id", "A"])
def test_other_names_are_free_for_users(key: str) -> None:
    check_key(key)
    assert user_headers({key: "1"}) == {key: "1"}


def test_headers_of_users_are_copied() -> None:
    given_headers = Headers({"A": ["1", "2"]})
    copy = user_headers(given_headers)
    given_headers.add("A", "3")
    assert copy == {"A": ["1", "2"]}
    assert user_headers(None) == {}


# -- the end with an error -------------------------------------------------------------------------------------------


def test_the_headers_of_an_error_end_that_says_everything() -> None:
    given_status = Status(Code.RESOURCE_EXHAUSTED, {"free": 0}, terms.LOST, 1.5, only=True, sent=42)
    assert encode_status(given_status, "all busy").encode() == (
        b"NATS/1.0\r\nNatsync-Status: 8 RESOURCE_EXHAUSTED\r\nNatsync-Reason: lost\r\n"
        b'Natsync-Details: {"free": 0}\r\nNatsync-Retry-After: 1.5\r\nNatsync-Only: 1\r\nNatsync-Resume: 42\r\n'
        b"Nats-Service-Error: all busy\r\nNats-Service-Error-Code: 8\r\n\r\n"
    )
    assert status(given_status) == given_status


def test_the_headers_of_an_error_end_that_says_nothing() -> None:
    assert encode_status(Status()).encode() == (
        b"NATS/1.0\r\nNatsync-Status: 2 UNKNOWN\r\nNats-Service-Error: \r\nNats-Service-Error-Code: 2\r\n\r\n"
    )


@pytest.mark.parametrize(
    "given_status",
    [
        Status(Code.RESOURCE_EXHAUSTED, None, terms.REFUSED, 1.5),
        Status(Code.RESOURCE_EXHAUSTED, None, None, 0.0, only=True),
        Status(Code.INVALID_ARGUMENT, {"field": "é", "max": [1, None]}),
        Status(Code.UNAVAILABLE, None, terms.LOST),
        Status(Code.DEADLINE_EXCEEDED, None, terms.DEADLINE),
        Status(Code.ABORTED, sent=0),
        Status(77),
        Status(Code.UNKNOWN, "just text"),
        Status(Code.UNKNOWN, 0),
        Status(Code.UNKNOWN, False),
    ],
    ids=repr,
)
def test_a_status_says_what_it_was_given(given_status: Status) -> None:
    assert status(given_status) == given_status


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
def test_a_status_names_its_code(code: Code) -> None:
    assert encode_status(Status(code))[terms.STATUS_HEADER] == f"{int(code)} {code.name}"
    assert encode_status(Status(int(code)))[terms.STATUS_HEADER] == f"{int(code)} {code.name}"


def test_a_code_without_a_name_travels_as_a_number() -> None:
    assert encode_status(Status(77))[terms.STATUS_HEADER] == "77 CODE"


@pytest.mark.parametrize("code", [None, 0])
def test_an_end_with_an_error_has_a_code_that_is_none_of_success(code: int | None) -> None:
    assert status(Status(code)).code == Code.UNKNOWN


class Speechless:
    """Details that fail when asked for their text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


@pytest.mark.parametrize(
    "details",
    [object(), {1, 2}, b"bytes", {(1, 2): 3}, ["line\r\nNatsync-Reason: lost"], float("nan"), [Speechless()], "\ud800"],
    ids=["object", "set", "bytes", "keys", "lines", "nan", "speechless", "surrogate"],
)
def test_details_of_any_kind_travel_and_break_nothing(details: Any) -> None:
    told = status(Status(Code.INTERNAL, details))
    assert (told.code, told.reason) == (Code.INTERNAL, None)
    assert told.details is not None


def test_what_has_no_json_form_does_not_cost_the_other_details() -> None:
    told = status(Status(Code.INTERNAL, {"field": 1, "when": object()}))
    assert told.details["field"] == 1
    assert "object" in told.details["when"]


def test_details_that_contain_themselves_do_not_keep_the_error_from_being_told() -> None:
    details: list[Any] = []
    details.append(details)
    assert status(Status(Code.INTERNAL, details)).code == Code.INTERNAL


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_details_nested_too_deep_do_not_keep_the_error_from_being_told() -> None:
    assert status(Status(Code.INTERNAL, nested(100_000))).code == Code.INTERNAL


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ""),
        ("no room", "no room"),
        ("two\r\nlines", "two lines"),
        ("line\r\nNatsync-Reason: lost\r\n\r\nPUB a 0", "line Natsync-Reason: lost PUB a 0"),
        ("  much \t space\u2028here\x85", "much space here"),
        ("nul\0l", "null"),
        ("\ud800", "?"),
        ("é" * 2000, "é" * terms.ERROR_TEXT),
    ],
)
def test_a_text_becomes_one_line_that_fits_a_header(text: str, told: str) -> None:
    assert header_text(text) == told
    assert encode_status(Status(), text)[terms.SERVICE_ERROR_HEADER] == told


@some
@given(st.text(st.characters(), max_size=30))
def test_any_text_goes_into_the_headers_of_an_error_end(text: str) -> None:
    headers = encode_status(Status(Code.INTERNAL, sent=3), text)
    assert decode_status(wire.decode(headers.encode())) == Status(Code.INTERNAL, sent=3)


jsons = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@some
@given(
    st.builds(
        Status,
        st.integers(1, 10**12 - 1),
        jsons,
        st.sampled_from([None, terms.LOST, terms.DEADLINE, terms.REFUSED]),
        st.none() | st.integers(0, 99_999).map(lambda number: number / 10),
        st.booleans(),
        st.none() | counts,
    )
)
def test_what_is_put_into_a_status_comes_out_of_it(given_status: Status) -> None:
    assert status(given_status) == given_status


@pytest.mark.parametrize("value", ["", "x 8", "-1 X", "eight", "²", "9" * 13])
def test_a_malformed_code_counts_as_not_said(value: str) -> None:
    assert decode_status(Headers({terms.STATUS_HEADER: value})).code is None


@pytest.mark.parametrize("value", MALFORMED_NUMBERS)
def test_a_malformed_number_of_chunks_counts_as_not_said(value: str) -> None:
    assert decode_status(Headers({terms.RESUME_HEADER: value})).sent is None


def test_no_status_at_all_says_nothing() -> None:
    assert decode_status(Headers()) == Status()


@pytest.mark.parametrize("text", ["", "{oops", "1" * 5000 + "x"])
def test_details_that_are_no_json_are_text(text: str) -> None:
    assert decode_status(Headers({terms.DETAILS_HEADER: text})).details == text


def test_received_details_nested_too_deep_are_text() -> None:
    text = "[" * 200_000
    assert decode_status(Headers({terms.DETAILS_HEADER: text})).details == text


@pytest.mark.parametrize("value", ["", "soon", "nan", "inf", "-inf", "-1", "1 2"])
def test_a_malformed_wait_counts_as_not_said(value: str) -> None:
    assert decode_status(Headers({terms.RETRY_AFTER_HEADER: value})).retry_after is None


@some
@given(
    st.dictionaries(
        st.sampled_from(
            [
                terms.STATUS_HEADER,
                terms.DETAILS_HEADER,
                terms.RETRY_AFTER_HEADER,
                terms.RESUME_HEADER,
                terms.ONLY_HEADER,
            ]
        ),
        st.text(max_size=8) | st.lists(st.sampled_from(["1", "-", "e", "9" * 400, "[", '"', " ", "nan"])).map("".join),
    )
)
def test_no_headers_make_a_status_fail(fields: dict[str, str]) -> None:
    headers = Headers()
    headers._fields += fields.items()  # as received: unchecked
    decode_status(headers)
