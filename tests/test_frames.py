"""natsync.streaming.frames: the headers, control subjects and notes of a plain stream."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsync import headers as wire
from natsync.errors import Code, InvalidArgument
from natsync.headers import Headers
from natsync.streaming import frames
from natsync.streaming.frames import (
    NOTE,
    NOTE_STATUS,
    Opening,
    Status,
    control_inbox,
    decode_cancel,
    decode_opening,
    decode_status,
    encode_cancel,
    encode_opening,
    encode_status,
    is_control,
    user_headers,
)


def opening(headers: dict[str, Any] | None = None, timeout: float | None = None, attempt: int = 0) -> Opening:
    return decode_opening(wire.decode(encode_opening(Headers(headers), timeout, attempt)))


def status(given: Status) -> Status:
    return decode_status(wire.decode(encode_status(given)))


# -- the opening -----------------------------------------------------------------------------------------------------


def test_an_opening_says_what_it_was_given() -> None:
    assert opening({"X-Trace": ["1", "2"]}, 29.95, 2) == Opening(True, 29.95, 2, Headers({"X-Trace": ["1", "2"]}))


def test_an_opening_without_a_deadline_has_none() -> None:
    assert opening() == Opening(True, None, 0, Headers())
    assert encode_opening(Headers(), None, 0) == b"NATS/1.0\r\nNatsync-Stream: 0\r\n\r\n"


@pytest.mark.parametrize(
    ("timeout", "told"), [(0, 0.001), (0.0001, 0.001), (0.0019, 0.001), (1, 1.0), (86_400, 86_400.0)]
)
def test_a_deadline_travels_in_whole_milliseconds_and_never_as_none(timeout: float, told: float) -> None:
    assert opening(timeout=timeout).timeout == told


def test_an_opening_leaves_the_users_headers_as_they_are() -> None:
    headers = Headers({"A": "1"})
    encode_opening(headers, 5, 1)
    assert headers == {"A": "1"}


@pytest.mark.parametrize(
    "key", ["Natsync-Stream", "natsync-timeout", "NATSYNC-ATTEMPT", "Natsync-Anything", "Nats-Msg-Id"]
)
def test_the_librarys_own_headers_are_no_metadata(key: str) -> None:
    assert decode_opening(Headers({key: "1", "Mine": "2"})).metadata == {"Mine": "2"}


def test_a_request_of_another_client_opens_a_stream_too() -> None:
    assert decode_opening(Headers({"Connect-ID": "7"})) == Opening(False, None, 0, Headers({"Connect-ID": "7"}))


@pytest.mark.parametrize("value", ["", "x", "-5", "1.5", "1e3", " 5", "٣", "²", "9" * 13, "9" * 5000])
def test_malformed_numbers_count_as_not_said(value: str) -> None:
    told = decode_opening(
        Headers({frames.STREAM_HEADER: "0", frames.TIMEOUT_HEADER: value, frames.ATTEMPT_HEADER: value})
    )
    assert (told.timeout, told.attempt) == (None, 0)


@given(
    st.dictionaries(st.sampled_from(["Natsync-Stream", "Natsync-Timeout", "Natsync-Attempt", "X"]), st.text(max_size=8))
)
def test_no_headers_make_the_opening_fail(fields: dict[str, str]) -> None:
    headers = Headers()
    headers._fields += fields.items()  # as received: unchecked
    decode_opening(headers)


@pytest.mark.parametrize("key", ["Natsync-Stream", "natsync-x", "NATS-Msg-Id", "nats-x"])
def test_users_may_not_give_the_librarys_own_headers(key: str) -> None:
    with pytest.raises(InvalidArgument, match="reserved"):
        user_headers({"Mine": "1", key: "2"})


def test_headers_of_users_are_copied() -> None:
    given_headers = Headers({"A": ["1", "2"]})
    copy = user_headers(given_headers)
    given_headers.add("A", "3")
    assert copy == {"A": ["1", "2"]}
    assert user_headers(None) == {}


# -- the end with an error -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given_status",
    [
        Status(Code.RESOURCE_EXHAUSTED, None, frames.REFUSED, 1.5),
        Status(Code.INVALID_ARGUMENT, {"field": "é", "max": [1, None]}),
        Status(Code.UNAVAILABLE, None, frames.LOST),
        Status(Code.DEADLINE_EXCEEDED, None, frames.DEADLINE),
        Status(77),
        Status(Code.UNKNOWN, "just text"),
        Status(Code.UNKNOWN, 0),
        Status(Code.UNKNOWN, False),
        Status(Code.UNKNOWN, None, None, 0.0),
    ],
    ids=repr,
)
def test_a_status_says_what_it_was_given(given_status: Status) -> None:
    assert status(given_status) == given_status


def test_a_status_names_its_code() -> None:
    assert b"Natsync-Status: 8 RESOURCE_EXHAUSTED\r\n" in encode_status(Status(8))
    assert b"Natsync-Status: 77 CODE\r\n" in encode_status(Status(77))


@pytest.mark.parametrize("code", [None, 0])
def test_an_end_with_an_error_has_a_code_that_is_none_of_success(code: int | None) -> None:
    assert status(Status(code)).code == Code.UNKNOWN


@pytest.mark.parametrize(
    "details", [object(), {1, 2}, b"bytes", {(1, 2): 3}, ["line\r\nNatsync-Reason: refused"], float("nan")], ids=ascii
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


@pytest.mark.parametrize("value", ["", "x 8", "-1 X", "eight", "²", "9" * 13])
def test_a_malformed_code_counts_as_not_said(value: str) -> None:
    assert decode_status(Headers({frames.STATUS_HEADER: value})).code is None


def test_no_status_at_all_says_nothing() -> None:
    assert decode_status(Headers()) == Status()


def test_details_that_are_no_json_are_text() -> None:
    assert decode_status(Headers({frames.DETAILS_HEADER: "{oops"})).details == "{oops"


def test_received_details_nested_too_deep_are_text() -> None:
    text = "[" * 200_000
    assert decode_status(Headers({frames.DETAILS_HEADER: text})).details == text


@pytest.mark.parametrize("value", ["", "soon", "nan", "inf", "-inf", "-1"])
def test_a_malformed_wait_counts_as_not_said(value: str) -> None:
    assert decode_status(Headers({frames.RETRY_AFTER_HEADER: value})).retry_after is None


# -- control ---------------------------------------------------------------------------------------------------------


def test_a_control_subject_is_known_by_its_mark() -> None:
    inbox = control_inbox("_INBOX", "abc")
    assert inbox == "_INBOX.abc.nsy0"
    assert is_control(f"{inbox}.7".encode())


@pytest.mark.parametrize("reply", [None, b"", b"_INBOX.abc.7", b"nsy0", b"_INBOX.nsy0", b"_INBOX.abc.nsy1.7"])
def test_another_reply_subject_is_no_control_subject(reply: bytes | None) -> None:
    assert not is_control(reply)


@pytest.mark.parametrize("reason", ["the user left", "é", "a b  c", "x 1 y", "line\r\nPUB a 0\r\n\r\n"])
def test_a_cancel_carries_its_reason(reason: str) -> None:
    assert decode_cancel(encode_cancel(reason)) == reason


def test_a_cancel_carries_its_code_for_others_to_read() -> None:
    assert encode_cancel("late", Code.DEADLINE_EXCEEDED) == b"x 4 late"


def test_a_cancel_without_a_reason_has_one() -> None:
    assert decode_cancel(encode_cancel("")) == "cancelled"
    assert decode_cancel(b"x 1") == "cancelled"


def test_a_reason_that_utf8_cannot_encode_is_still_a_cancel() -> None:
    assert decode_cancel(encode_cancel("\ud800")) == "?"


@given(st.binary(max_size=30))
def test_other_control_payloads_are_no_cancel(payload: bytes) -> None:
    assert (decode_cancel(payload) is not None) is payload.startswith(b"x ")


def test_a_note_is_a_header_block_with_its_status() -> None:
    assert wire.status_of(NOTE) == NOTE_STATUS
    assert wire.decode(NOTE) == Headers()
