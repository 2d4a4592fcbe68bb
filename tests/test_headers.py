"""natsync.headers: the mapping users see and the block on the wire."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsync.errors import InvalidArgument, ProtocolError
from natsync.headers import Headers, decode, status_of

keys = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=":"), min_size=1, max_size=8)
values = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=("Cs",)), max_size=12).map(str.strip)


# -- the mapping -----------------------------------------------------------------------------------------------------


def test_looking_up_ignores_case() -> None:
    headers = Headers({"X-Trace": "1"})
    assert (headers["x-trace"], headers.get("X-TRACE"), "x-TRACE" in headers) == ("1", "1", True)


def test_case_is_kept_in_what_is_listed_and_sent() -> None:
    headers = Headers({"X-TrAcE": "1"})
    assert list(headers) == ["X-TrAcE"]
    assert b"X-TrAcE: 1\r\n" in headers.encode()


def test_a_missing_key_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="nothing"):
        Headers()["nothing"]
    with pytest.raises(KeyError):
        del Headers()["nothing"]
    assert Headers().get_all("nothing") == []


def test_a_key_may_have_several_values_in_order() -> None:
    headers = Headers({"A": ["1", "2"]})
    headers.add("B", "x")
    headers.add("a", "3")
    assert headers.get_all("A") == ["1", "2", "3"]
    assert headers["a"] == "1"
    assert headers.fields() == [("A", "1"), ("A", "2"), ("B", "x"), ("a", "3")]


def test_assignment_replaces_every_value_whatever_its_case() -> None:
    headers = Headers({"A": ["1", "2"], "B": "x"})
    headers.add("a", "3")
    headers["A"] = "new"
    assert headers.fields() == [("B", "x"), ("A", "new")]


def test_a_refused_assignment_changes_nothing() -> None:
    headers = Headers({"A": ["1", "2"]})
    with pytest.raises(InvalidArgument):
        headers["A"] = "x\r\ny"
    assert headers.get_all("A") == ["1", "2"]


def test_deleting_drops_every_value_whatever_its_case() -> None:
    headers = Headers({"A": ["1", "2"], "B": "x"})
    del headers["a"]
    assert headers.fields() == [("B", "x")]


def test_listing_names_a_repeated_key_once() -> None:
    headers = Headers({"A": ["1", "2"], "B": "x"})
    assert (list(headers), len(headers)) == (["A", "B"], 2)


def test_a_copy_does_not_change_with_its_original() -> None:
    original = Headers({"A": ["1", "2"]})
    copy = Headers(original)
    original.add("A", "3")
    assert copy.get_all("A") == ["1", "2"]


def test_the_fields_given_out_are_a_copy() -> None:
    headers = Headers({"A": "1"})
    headers.fields().clear()
    assert headers.fields() == [("A", "1")]


def test_headers_equal_those_with_the_same_fields() -> None:
    assert Headers({"A": ["1", "2"]}) == Headers({"A": ["1", "2"]})
    assert Headers({"A": "1"}) == {"A": "1"}
    assert Headers({"A": "1"}) != {"A": "2"}
    assert Headers({"A": "1"}) != "A: 1"


def test_comparing_with_a_mapping_that_can_be_no_headers_is_false() -> None:
    assert Headers({"A": "1"}) != {"A": 1}
    assert Headers({"A": "1"}) != {"A b": "1"}


def test_headers_have_no_hash_because_they_change() -> None:
    with pytest.raises(TypeError):
        hash(Headers())


def test_the_text_of_headers_shows_every_field() -> None:
    assert repr(Headers({"A": ["1", "2"]})) == "Headers([('A', '1'), ('A', '2')])"


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["", "a b", "a:b", "a\tb", "a\r\nb", "a\nb", "a\0", "ä", "a\x7f", " a", "a ", "a\N{NO-BREAK SPACE}"]
)
def test_a_key_that_would_break_the_block_is_refused(key: str) -> None:
    headers = Headers()
    with pytest.raises(InvalidArgument, match="header key"):
        headers.add(key, "x")
    with pytest.raises(InvalidArgument):
        headers[key] = "x"
    with pytest.raises(InvalidArgument):
        Headers({key: "x"})
    assert headers.fields() == []


@pytest.mark.parametrize("value", ["a\r\nNats-Forged: 1", "a\nb", "a\rb", "a\0b", "\n", "a\n"])
def test_a_value_that_would_break_the_block_is_refused(value: str) -> None:
    with pytest.raises(InvalidArgument, match="line break"):
        Headers({"A": value})
    with pytest.raises(InvalidArgument):
        Headers({"A": ["fine", value]})


def test_a_refusal_does_not_quote_the_value_which_may_be_secret() -> None:
    with pytest.raises(InvalidArgument) as caught:
        Headers({"Authorization": "S3CRET\r\n"})
    assert "S3CRET" not in str(caught.value)


@pytest.mark.parametrize("value", [1, None, b"bytes", ["x", 1], [b"x"]])
def test_a_value_that_is_no_text_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError):
        Headers({"A": value})  # type: ignore[dict-item]


@pytest.mark.parametrize("key", [1, None, b"A"])
def test_a_key_that_is_no_text_is_a_type_error(key: object) -> None:
    with pytest.raises(TypeError):
        Headers({key: "x"})  # type: ignore[dict-item]


def test_a_value_that_utf8_cannot_encode_is_refused_at_once() -> None:
    with pytest.raises(InvalidArgument):
        Headers({"A": "\ud800"})


# -- the wire --------------------------------------------------------------------------------------------------------


def test_a_block_is_encoded_as_the_protocol_says() -> None:
    assert Headers({"A": ["1", "2"], "b": "x y: z"}).encode() == b"NATS/1.0\r\nA: 1\r\nA: 2\r\nb: x y: z\r\n\r\n"


def test_no_fields_are_still_a_block() -> None:
    assert Headers().encode() == b"NATS/1.0\r\n\r\n"
    assert decode(b"NATS/1.0\r\n\r\n") == Headers()


@given(st.lists(st.tuples(keys, values), max_size=6))
def test_what_is_encoded_decodes_to_the_same_fields(fields: list[tuple[str, str]]) -> None:
    headers = Headers()
    for key, value in fields:
        headers.add(key, value)
    assert decode(headers.encode()).fields() == fields


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (b"A:1", ("A", "1")),
        (b"A: 1", ("A", "1")),
        (b"A:\t 1 \t", ("A", "1")),
        (b"A:", ("A", "")),
        (b"A: b: c", ("A", "b: c")),
        (b"A: http://x:1", ("A", "http://x:1")),
        ("A: é".encode(), ("A", "é")),
    ],
)
def test_a_header_line_is_decoded(line: bytes, field: tuple[str, str]) -> None:
    assert decode(b"NATS/1.0\r\n" + line + b"\r\n\r\n").fields() == [field]


@pytest.mark.parametrize(
    "block", [b"", b"HTTP/1.1 200\r\n\r\n", b"NATS/1.0\r\nno colon\r\n\r\n", b"NATS/1.0\r\n: no key\r\n\r\n"]
)
def test_a_malformed_block_is_a_protocol_error(block: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(block)


def test_a_block_without_its_last_line_end_is_still_read() -> None:
    assert decode(b"NATS/1.0\r\nA: 1").fields() == [("A", "1")]


def test_received_bytes_that_are_not_utf8_go_back_as_they_came() -> None:
    block = b"NATS/1.0\r\nA: \xff\xfe\r\n\r\n"
    assert Headers(decode(block)).encode() == block


@pytest.mark.parametrize("value", [b"1\nForged: 2", b"1\rForged: 2", b"1\0", b"1\r\rForged: 2"])
def test_a_received_value_cannot_become_another_field_when_it_is_sent_on(value: bytes) -> None:
    """Some parsers, that of the Go clients among them, end a line at a lone LF."""
    try:
        sent_on = Headers(decode(b"NATS/1.0\r\nA: " + value + b"\r\n\r\n")).encode()
    except ProtocolError:
        return
    assert not set(sent_on.replace(b"\r\n", b"")) & set(b"\r\n\0")


@given(st.binary(max_size=60))
def test_any_bytes_decode_or_are_a_protocol_error(raw: bytes) -> None:
    for block in (raw, b"NATS/1.0" + raw, b"NATS/1.0\r\n" + raw):
        try:
            decode(block)
        except ProtocolError:
            pass
        status_of(block)


@pytest.mark.parametrize(
    ("block", "status"),
    [
        (b"NATS/1.0 503\r\n\r\n", 503),
        (b"NATS/1.0 503 No Responders\r\n\r\n", 503),
        (b"NATS/1.0 100 Idle Heartbeat\r\nA: 1\r\n\r\n", 100),
        (b"NATS/1.0\r\n\r\n", None),
        (b"NATS/1.0\r\n503: x\r\n\r\n", None),
        (b"NATS/1.0 abc\r\n\r\n", None),
        (b"NATS/1.0 5\r\n\r\n", None),
        (b"NATS/1.0 50", None),
        (b"NATS/1.0 -50\r\n\r\n", None),
        (b"NATS/1.0 \xd9\xa5\xd9\r\n\r\n", None),
        (b"", None),
    ],
)
def test_the_inline_status_is_found(block: bytes, status: int | None) -> None:
    assert status_of(block) == status


def test_fields_beside_an_inline_status_are_decoded() -> None:
    assert decode(b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last: 7\r\n\r\n").fields() == [("Nats-Last", "7")]
