"""natsync.server_errors: what each -ERR of a server means, and whom a denial concerns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsync.errors import AuthorizationError, ConnectError, NatsError, PermissionDenied
from natsync.server_errors import Denial, Misconfigured, ServerError, advice, classify, denial, server_error

#: What nats-server 2.9 to 2.15 say, word for word, and the kind of each.
TEXTS = {
    'Permissions Violation for Publish to "a.b"': ServerError.PERMISSION,
    'Permissions Violation for Publish with Reply of "a.b"': ServerError.PERMISSION,
    'Permissions Violation for Subscription to "a.>"': ServerError.PERMISSION,
    'Permissions Violation for Subscription to "a" using queue "q"': ServerError.PERMISSION,
    'Permissions Violation for Subscription to "a" (sid "3")': ServerError.PERMISSION,
    "maximum subscriptions exceeded": ServerError.PERMISSION,
    "Invalid Subject": ServerError.PERMISSION,
    "Invalid Publish Subject": ServerError.PERMISSION,
    "Authorization Violation": ServerError.AUTH,
    "User Authentication Expired": ServerError.AUTH,
    "User Authentication Revoked": ServerError.AUTH,
    "Account Authentication Expired": ServerError.AUTH,
    "Failed Account Registration": ServerError.AUTH,
    "Authentication Timeout": ServerError.BUSY,
    "maximum connections exceeded": ServerError.BUSY,
    "maximum account active connections exceeded": ServerError.BUSY,
    "Connection throttling is active. Please try again later.": ServerError.BUSY,
    "Secure Connection - TLS Required": ServerError.CONFIGURATION,
    "no responders requires headers support": ServerError.CONFIGURATION,
    "message headers not supported": ServerError.CONFIGURATION,
    "invalid client protocol": ServerError.CONFIGURATION,
    "attempted to connect to route port": ServerError.CONFIGURATION,
    "attempted to connect to leaf node port": ServerError.CONFIGURATION,
    "attempted to connect to gateway port": ServerError.CONFIGURATION,
    "Maximum Payload Violation": ServerError.PROTOCOL,
    "maximum payload exceeded": ServerError.PROTOCOL,
    "maximum control line exceeded: State 5, max_control_line 4096, Buffer len 4097 (snip: ...)": ServerError.PROTOCOL,
    "Unknown Protocol Operation": ServerError.PROTOCOL,
    "Parser Error": ServerError.PROTOCOL,
    "Stale Connection": ServerError.STALE,
    "Slow Consumer": ServerError.STALE,
    "": ServerError.UNKNOWN,
    "Something New": ServerError.UNKNOWN,
}

CLASSES = {
    ServerError.AUTH: AuthorizationError,
    ServerError.PERMISSION: PermissionDenied,
    ServerError.CONFIGURATION: Misconfigured,
}
#: The server says it, too, when a TLS handshake took too long on a loaded machine.
PASSING = "Secure Connection - TLS Required"


@pytest.mark.parametrize(("text", "kind"), TEXTS.items())
def test_a_text_of_the_server_has_a_kind(text: str, kind: ServerError) -> None:
    assert classify(text) is kind


@pytest.mark.parametrize(("text", "kind"), TEXTS.items())
def test_case_and_white_space_around_do_not_matter(text: str, kind: ServerError) -> None:
    assert classify(f" {text.upper()} ") is classify(text.lower()) is kind


@pytest.mark.parametrize(("text", "kind"), [(text, kind) for text, kind in TEXTS.items() if text])
def test_what_a_later_server_adds_at_the_end_does_not_matter(text: str, kind: ServerError) -> None:
    assert classify(f"{text}; see the manual") is kind


@pytest.mark.parametrize("text", ["not a stale connection", "no authorization violation"])
def test_only_the_beginning_counts(text: str) -> None:
    assert classify(text) is ServerError.UNKNOWN


def test_the_link_stays_after_a_permission_error_alone() -> None:
    assert {kind for kind in ServerError if kind.closes is False} == {ServerError.PERMISSION}
    assert {kind for kind in ServerError if kind.closes is None} == {ServerError.UNKNOWN}


@pytest.mark.parametrize(("text", "kind"), [(text, kind) for text, kind in TEXTS.items() if text != PASSING])
def test_the_error_of_a_text_has_the_type_of_its_kind(text: str, kind: ServerError) -> None:
    assert type(server_error("nats://h:1", text)) is CLASSES.get(kind, ConnectError)


def test_a_server_that_wants_tls_may_be_tried_again() -> None:
    assert type(server_error("nats://h:1", PASSING)) is ConnectError


@pytest.mark.parametrize("text", TEXTS)
def test_the_advice_is_that_of_the_error(text: str) -> None:
    assert advice(text) in str(server_error("nats://h:1", text))


@pytest.mark.parametrize("text", TEXTS)
def test_the_error_names_the_server_and_quotes_its_words(text: str) -> None:
    error = str(server_error("nats://h:1", text))
    assert error.startswith("nats://h:1 ") or error.startswith("nats://h:1:")
    assert text in error


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("Secure Connection - TLS Required", "tls_first"),
        ("no responders requires headers support", "no_header_support"),
        ("invalid client protocol", "too old"),
        ("attempted to connect to route port", "Listening for client connections"),
        ('Permissions Violation for Publish to "_INBOX.x"', "allow_responses"),
        ('Permissions Violation for Subscription to "a"', "permissions"),
        ("maximum connections exceeded", "max_connections"),
        ("Maximum Payload Violation", "max_payload"),
    ],
)
def test_the_error_says_what_to_do(text: str, what: str) -> None:
    assert what in str(server_error("nats://h:1", text))


def test_the_same_words_make_the_same_error() -> None:
    first, second = (server_error("nats://h:1", "Authorization Violation") for _ in range(2))
    assert str(first) == str(second)


# -- denials ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('Permissions Violation for Publish to "a.b"', Denial("publish", b"a.b")),
        ('Permissions Violation for Publish with Reply of "r.1"', Denial("reply", b"r.1")),
        ('Permissions Violation for Subscription to "a.>"', Denial("subscription", b"a.>")),
        ('Permissions Violation for Subscription to "foo" using queue "bar"', Denial("subscription", b"foo", b"bar")),
        ('Permissions Violation for Subscription to "foo" (sid "12")', Denial("subscription", b"foo", sid=12)),
        (
            'Permissions Violation for Subscription to "foo" using queue "bar" (sid "12")',
            Denial("subscription", b"foo", b"bar", 12),
        ),
        ('Permissions Violation for Subscription to "a.b.c", too many tokens', Denial("subscription", b"a.b.c")),
        ('PERMISSIONS VIOLATION FOR PUBLISH TO "A"', Denial("publish", b"A")),
    ],
)
def test_a_denial_says_what_was_denied(text: str, expected: Denial) -> None:
    assert denial(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Permissions Violation",
        "Permissions Violation for Publish to",
        'Permissions Violation for Publish to "a',
        "Authorization Violation",
        'see: Permissions Violation for Publish to "a"',
    ],
)
def test_a_text_that_names_no_subject_is_no_denial(text: str) -> None:
    assert denial(text) is None


@pytest.mark.parametrize(
    ("quoted", "subject"),
    [
        ("größe", "größe".encode()),
        (r"say.\"hi\"", b'say."hi"'),
        (r"back\\slash", rb"back\slash"),
        (r"odd\xff\xfebytes", b"odd\xff\xfebytes"),
        (r"bell\a\u200b\U000e0001", "bell\a\u200b\U000e0001".encode()),
    ],
)
def test_a_subject_is_given_as_it_was_on_the_wire(quoted: str, subject: bytes) -> None:
    assert denial(f'Permissions Violation for Publish to "{quoted}"') == Denial("publish", subject)


def test_a_subject_cannot_pretend_to_be_a_queue_group() -> None:
    text = r'Permissions Violation for Subscription to "a\" using queue \"q"'
    assert denial(text) == Denial("subscription", b'a" using queue "q')


@given(st.text())
def test_no_text_makes_any_of_it_fail(text: str) -> None:
    assert isinstance(classify(text), ServerError)
    assert isinstance(server_error("nats://h:1", text), NatsError)
    denial(text)


@given(st.text())
def test_no_subject_makes_the_denial_fail(text: str) -> None:
    found = denial(f'Permissions Violation for Publish to "{text}" using queue "{text}" (sid "{text}")')
    assert found is None or found.what == "publish"
