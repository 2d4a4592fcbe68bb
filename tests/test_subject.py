"""natsync.subject: what may go on the wire, and which subscription receives what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsync.errors import InvalidArgument
from natsync.subject import decode, matches, publish_subject, queue_name, subscribe_subject, unique

CONTROL = [chr(code) for code in range(0x21)] + ["\x7f"]
tokens = st.text(st.sampled_from("ab"), min_size=1, max_size=2)


@pytest.mark.parametrize("check", [publish_subject, subscribe_subject, queue_name])
def test_an_ordinary_name_goes_on_the_wire_as_utf8(check) -> None:
    assert check("a.b-c_d.ü") == "a.b-c_d.ü".encode()


@pytest.mark.parametrize("check", [publish_subject, subscribe_subject, queue_name])
@pytest.mark.parametrize("char", CONTROL, ids=ascii)
def test_white_space_and_control_characters_are_refused(check, char: str) -> None:
    for text in (char, f"a{char}b", f"{char}a", f"a{char}"):
        with pytest.raises(InvalidArgument, match="white space or a control character"):
            check(text)


@pytest.mark.parametrize("check", [publish_subject, subscribe_subject, queue_name])
def test_an_empty_name_is_refused(check) -> None:
    with pytest.raises(InvalidArgument, match="empty"):
        check("")


@pytest.mark.parametrize("check", [publish_subject, subscribe_subject, queue_name])
@pytest.mark.parametrize("value", [None, 5, b"a", ["a"], ("a",)])
def test_a_name_that_is_no_text_is_a_type_error(check, value: object) -> None:
    with pytest.raises(TypeError):
        check(value)


@pytest.mark.parametrize("check", [publish_subject, subscribe_subject, queue_name])
def test_a_name_that_utf8_cannot_encode_is_refused(check) -> None:
    with pytest.raises(InvalidArgument, match="UTF-8"):
        check("a\ud800")


@pytest.mark.parametrize("check", [publish_subject, subscribe_subject])
@pytest.mark.parametrize("subject", [".", ".a", "a.", "a..b", ".."])
def test_an_empty_token_is_refused(check, subject: str) -> None:
    with pytest.raises(InvalidArgument, match="empty token"):
        check(subject)


@pytest.mark.parametrize("subject", ["*", ">", "a.*", "a.>", "*.a", "a.*.b"])
def test_a_wildcard_cannot_be_published_to(subject: str) -> None:
    with pytest.raises(InvalidArgument, match="wildcard"):
        publish_subject(subject)


@pytest.mark.parametrize("subject", ["*", ">", "a.*", "a.>", "*.a", "a.*.b", "*.*.>"])
def test_a_wildcard_can_be_subscribed_to(subject: str) -> None:
    assert subscribe_subject(subject) == subject.encode()


@pytest.mark.parametrize("subject", [">.a", "a.>.b", ">.>"])
def test_the_wildcard_for_the_rest_may_only_be_last(subject: str) -> None:
    with pytest.raises(InvalidArgument, match="last token"):
        subscribe_subject(subject)


@pytest.mark.parametrize("subject", ["a*", "*a", "a>b", "a.b>"])
def test_a_star_inside_a_token_is_an_ordinary_character(subject: str) -> None:
    assert publish_subject(subject) == subscribe_subject(subject) == subject.encode()


def test_a_received_subject_that_is_not_utf8_goes_back_as_it_came() -> None:
    assert publish_subject(decode(b"a.\xff\xfe")) == b"a.\xff\xfe"


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", "a.b", False),
        ("a.b", "a", False),
        ("*", "a", True),
        ("*", "a.b", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("*.b", "a.b", True),
        ("*.b", "a.c", False),
        (">", "a", True),
        (">", "a.b.c", True),
        ("a.>", "a", False),
        ("a.>", "a.b", True),
        ("a.>", "a.b.c", True),
        ("a.>", "b.c", False),
        ("*.*.>", "a.b", False),
        ("*.*.>", "a.b.c", True),
        ("ab", "a", False),
    ],
)
def test_a_pattern_matches_as_the_server_does(pattern: str, subject: str, expected: bool) -> None:
    assert matches(pattern, subject) is expected


@given(st.lists(tokens, min_size=1, max_size=4), st.data())
def test_replacing_tokens_by_wildcards_keeps_the_match(given_tokens: list[str], data: st.DataObject) -> None:
    pattern = [data.draw(st.sampled_from([token, "*"])) for token in given_tokens]
    cut = data.draw(st.integers(0, len(pattern)))
    subject = ".".join(given_tokens)
    assert matches(".".join(pattern), subject)
    assert matches(".".join([*pattern[:cut], ">"]), subject) is (cut < len(pattern))


def test_identifiers_are_22_letters_and_digits_and_differ() -> None:
    made = {unique() for _ in range(2000)}
    assert len(made) == 2000
    assert all(len(one) == 22 and one.isascii() and one.isalnum() for one in made)


def test_identifiers_do_not_share_a_beginning() -> None:
    """A common prefix with a counter would repeat in forks and processes that start alike."""
    assert len({unique()[:12] for _ in range(100)}) == 100
