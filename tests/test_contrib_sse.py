"""Server-sent events: what is written is what a browser reads, whatever the data."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import natsync
from eventsource import Got, parse
from natsync.contrib import sse

#: What matters in data: line breaks of all kinds, colons, spaces, a BOM, fields.
SCRAPS = ["\r", "\n", "\r\n", ":", " ", "\ufeff", "data: x", "event: forged", "id: 1", "\0", "é", "\u2028", "\x0b"]
texts = st.lists(st.sampled_from(SCRAPS) | st.text(max_size=5), max_size=8).map("".join)
names = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\n\0"), max_size=8)


@given(data=texts, event=st.none() | names, id=st.none() | names)
def test_an_event_is_read_as_it_was_written(data: str, event: str | None, id: str | None) -> None:
    wire = sse.encode(data, event=event, id=id)
    assert parse(wire) == [Got(re.sub("\r\n|\r", "\n", data), event or "message", id or "")]
    assert sse.encode(data.encode(), event=event, id=id) == wire


@given(st.lists(texts, max_size=5))
def test_events_do_not_run_into_each_other(data: list[str]) -> None:
    wire = b"".join(sse.comment() + sse.encode(one) for one in data)
    assert [event.data for event in parse(wire)] == [re.sub("\r\n|\r", "\n", one) for one in data]


@pytest.mark.parametrize(
    ("data", "wire"),
    [
        (b"one", b"data: one\n\n"),
        ("", b"data: \n\n"),
        (b"two\nlines", b"data: two\ndata: lines\n\n"),
        (b"a\r\nb\rc\n", b"data: a\ndata: b\ndata: c\ndata: \n\n"),
        (" leading space", b"data:  leading space\n\n"),
        (bytearray(b"x"), b"data: x\n\n"),
        (memoryview(b"x"), b"data: x\n\n"),
        (b"\xff not UTF-8", b"data: \xff not UTF-8\n\n"),
    ],
)
def test_the_bytes_of_an_event(data: sse.Data, wire: bytes) -> None:
    assert sse.encode(data) == wire


def test_the_fields_of_an_event_come_before_its_data() -> None:
    event = sse.Event("x", event="token", id="7", retry=250)
    assert event.encode() == b"event: token\nid: 7\nretry: 250\ndata: x\n\n"


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\r\nb", "a\0b", "\n"])
@pytest.mark.parametrize("field", ["event", "id"])
def test_a_field_that_would_forge_another_is_refused(field: str, text: str) -> None:
    with pytest.raises(natsync.InvalidArgument, match=f"{field} contains a line break or NUL"):
        sse.encode(b"x", **{field: text})


def test_a_comment_that_would_forge_a_field_is_refused() -> None:
    with pytest.raises(natsync.InvalidArgument):
        sse.comment("ping\ndata: forged")


@pytest.mark.parametrize("retry", [-1, True, "1", 1.5])
def test_a_retry_that_is_no_number_of_milliseconds_is_refused(retry: object) -> None:
    with pytest.raises((natsync.InvalidArgument, TypeError)):
        sse.encode(b"x", retry=retry)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [None, 1, {"a": 1}, ["x"]])
def test_data_that_is_neither_bytes_nor_text_is_refused(data: object) -> None:
    with pytest.raises(TypeError, match=r"json\.dumps"):
        sse.encode(data)  # type: ignore[arg-type]


def test_a_comment_is_no_event() -> None:
    assert sse.comment() == b": ping\n\n"
    assert parse(sse.comment("still here")) == []
