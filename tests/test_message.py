"""natsync.message: a received message, and how payloads become bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from natsync.errors import InvalidArgument
from natsync.headers import Headers
from natsync.message import MISSING, Message, payload_of, to_bytes

BLOCK = b"NATS/1.0 503 No Responders\r\nA: 1\r\nA: 2\r\n\r\n"


def received(reply: bytes | None = None, block: bytes | None = None, data: bytes = b"") -> Message:
    return Message.received(b"a.b", (reply, block, data), lambda *args: None)


# -- payloads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "raw"),
    [
        (b"x", b"x"),
        ("é", "é".encode()),
        ("", b""),
        (bytearray(b"x"), b"x"),
        (memoryview(b"xyz")[1:], b"yz"),
        (memoryview(b"abcdef")[::2], b"ace"),
    ],
)
def test_a_payload_is_bytes_like_or_text(payload: Any, raw: bytes) -> None:
    assert to_bytes(payload) == raw
    assert type(to_bytes(payload)) is bytes


def test_a_payload_does_not_change_with_the_buffer_it_was_made_from() -> None:
    buffer = bytearray(b"before")
    raw = to_bytes(buffer)
    buffer[:] = b"after!"
    assert raw == b"before"


@pytest.mark.parametrize("payload", [None, 5, 1.5, ["x"], {"a": 1}, object()])
def test_another_payload_is_a_type_error_that_names_the_way_out(payload: Any) -> None:
    with pytest.raises(TypeError, match="json="):
        to_bytes(payload)


def test_json_becomes_compact_utf8() -> None:
    assert payload_of(b"", {"a": [1, "é"], "b": None}) == '{"a":[1,"é"],"b":null}'.encode()


@pytest.mark.parametrize("value", [None, False, 0, "", []])
def test_a_json_value_that_is_false_is_sent_as_json(value: Any) -> None:
    assert json.loads(payload_of(b"", value)) == value


def test_without_json_the_payload_counts() -> None:
    assert payload_of("x", MISSING) == b"x"
    with pytest.raises(TypeError):
        payload_of(None, MISSING)  # type: ignore[arg-type]


def test_payload_and_json_together_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="not both"):
        payload_of(b"x", {"a": 1})


def circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def nested() -> list[Any]:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, b"bytes", {(1, 2): 3}, circular(), "\ud800", nested()],
    ids=["object", "set", "bytes", "tuple as key", "circular", "surrogate", "nested too deep"],
)
def test_a_value_without_json_form_is_refused(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="no JSON form"):
        payload_of(b"", value)


# -- a received message ----------------------------------------------------------------------------------------------


def test_a_message_has_its_parts() -> None:
    message = received(b"r.1", None, b"data")
    assert (message.subject, message.reply, message.data) == ("a.b", "r.1", b"data")
    assert (message.is_end, message.error, message.malformed) == (False, None, False)


def test_a_message_without_headers_has_empty_ones_and_no_status() -> None:
    message = received()
    assert (message.reply, message.headers, message.status) == (None, Headers(), None)


def test_headers_and_status_come_from_the_block() -> None:
    message = received(None, BLOCK)
    assert (message.headers.get_all("a"), message.status) == (["1", "2"], 503)
    assert message.headers is message.headers


def test_a_malformed_header_block_leaves_the_message_readable() -> None:
    message = received(None, b"NATS/1.0\r\nno colon\r\n\r\n", b"data")
    assert (message.headers, message.malformed, message.data) == (Headers(), True, b"data")


def test_a_malformed_header_block_shows_before_headers_are_read() -> None:
    assert received(None, b"NATS/1.0\r\nno colon\r\n\r\n").malformed is True


def test_subjects_that_are_not_utf8_are_text_that_goes_back_as_it_came() -> None:
    message = Message.received(b"a.\xff", (b"r.\xfe", None, b""), lambda *args: None)
    assert message.subject.encode("utf-8", "surrogateescape") == b"a.\xff"
    assert message.reply is not None
    assert message.reply.encode("utf-8", "surrogateescape") == b"r.\xfe"


def test_text_and_json_read_the_payload() -> None:
    message = received(data='{"a":"é"}'.encode())
    assert (message.text(), message.json()) == ('{"a":"é"}', {"a": "é"})


def test_a_payload_that_is_no_text_or_json_is_a_value_error() -> None:
    with pytest.raises(ValueError):
        received(data=b"\xff").text()
    with pytest.raises(ValueError):
        received(data=b"{").json()


def test_responding_publishes_to_the_reply_subject() -> None:
    sent: list[Any] = []
    message = Message.received(b"a", (b"r.1", None, b""), lambda *args: sent.append(args))
    message.respond("x", headers={"A": "1"})
    message.respond(json=[1])
    assert sent == [("r.1", b"x", Headers({"A": "1"})), ("r.1", b"[1]", None)]


def test_responding_to_a_message_without_reply_subject_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no reply subject"):
        received().respond(b"x")


def test_responding_on_a_message_of_ones_own_making_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        Message("a", b"", "r.1").respond(b"x")


def test_responding_refuses_bad_headers_before_anything_is_sent() -> None:
    sent: list[Any] = []
    message = Message.received(b"a", (b"r.1", None, b""), lambda *args: sent.append(args))
    with pytest.raises(InvalidArgument):
        message.respond(b"x", headers={"A": "1\r\n2"})
    assert sent == []


def test_the_text_of_a_message_is_short() -> None:
    text = repr(received(b"r.1", None, b"x" * 10_000))
    assert "a.b" in text
    assert "r.1" in text
    assert len(text) < 200


def test_the_text_of_a_message_without_reply_names_none() -> None:
    assert repr(received(data=b"x")) == "Message('a.b', b'x')"
