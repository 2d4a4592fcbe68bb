"""Subjects, queue names and inboxes: what may go on the wire, checked before it does.

Pure values; new identifiers come from pynats2's NUID. A subject is dot-separated tokens; `*` stands for one token and
a last `>` for one or more, in subscriptions only.
"""

from __future__ import annotations

import re
from functools import lru_cache

from natsync._pynats2 import NUID
from natsync.errors import InvalidArgument

_FORBIDDEN = re.compile(r"[\x00-\x20\x7f]")  # white space and control characters would forge protocol lines
_CACHED = 1024
#: Bytes of a control line beside subject, reply subject and queue group: spaces, and a sid or two sizes.
NUMBERS_BYTES = 24
#: Characters of a subject that is too long to be quoted whole.
_QUOTED = 60


def publish_subject(subject: str) -> bytes:
    """The subject as bytes, checked for publishing: no wildcard, no empty token, no white space.

    Raises:
        InvalidArgument: it cannot be published to.
        TypeError: it is not a str.
    """
    return _publish(subject if type(subject) is str else _text(subject, "subject"))


def subscribe_subject(subject: str) -> bytes:
    """The subject as bytes, checked for subscribing: `>` only as the last token.

    Raises:
        InvalidArgument: it cannot be subscribed to.
        TypeError: it is not a str.
    """
    return _subscribe(_text(subject, "subject"))


def queue_name(queue: str) -> bytes:
    """The queue group's name as bytes.

    Raises:
        InvalidArgument: it is empty or has white space.
        TypeError: it is not a str.
    """
    return _queue(_text(queue, "queue group"))


def interest(subject: str, queue: str | None, max_control_line: int) -> tuple[bytes, bytes | None]:
    """Subject and queue group of a subscription as bytes, checked, together too.

    Raises:
        InvalidArgument: one cannot be subscribed to, or both are too long for a control line of so many bytes.
        TypeError: one is not a str.
    """
    wanted, group = subscribe_subject(subject), None if queue is None else queue_name(queue)
    if len(wanted) + len(group or b"") > max_control_line - NUMBERS_BYTES:
        raise too_long(wanted, group, "queue group", max_control_line)
    return wanted, group


def too_long(subject: bytes, other: bytes | None, what: str, max_control_line: int) -> InvalidArgument:
    """The error for a subject that, with the other word if there is one, is too long for a control line."""
    size = len(subject) + len(other or b"")
    shown = decode(subject) if len(subject) <= _QUOTED else decode(subject[:_QUOTED]) + "..."
    both = "" if other is None else f" with its {what}"
    return InvalidArgument(
        f"subject {shown!r}{both} is {size} bytes long; max_control_line={max_control_line} leaves room for "
        f"{max_control_line - NUMBERS_BYTES}"
    )


def _text(text: str, what: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"a {what} is a str, not {type(text).__name__}")
    return text


@lru_cache(_CACHED)
def _publish(subject: str) -> bytes:
    tokens = _tokens(subject, "subject")
    if "*" in tokens or ">" in tokens:
        raise InvalidArgument(f"subject {subject!r} has a wildcard, which only a subscription may have")
    return encode(subject)


@lru_cache(_CACHED)
def _subscribe(subject: str) -> bytes:
    if ">" in _tokens(subject, "subject")[:-1]:
        raise InvalidArgument(f"subject {subject!r}: the wildcard '>' may only be the last token")
    return encode(subject)


@lru_cache(_CACHED)
def _queue(queue: str) -> bytes:
    _word(queue, "queue group")
    return encode(queue)


def _tokens(subject: str, what: str) -> list[str]:
    _word(subject, what)
    tokens = subject.split(".")
    if "" in tokens:
        raise InvalidArgument(f"{what} {subject!r} has an empty token")
    return tokens


def _word(text: str, what: str) -> None:
    if not text:
        raise InvalidArgument(f"the {what} is empty")
    if _FORBIDDEN.search(text):
        raise InvalidArgument(f"{what} {text!r} contains white space or a control character")


def encode(text: str) -> bytes:
    """Subjects are bytes to the server; one that was received with odd bytes goes back as it came."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidArgument(f"{text!r} cannot be encoded as UTF-8") from None


def decode(raw: bytes) -> str:
    """A received subject as text; bytes that are not UTF-8 survive a round trip."""
    return raw.decode("utf-8", "surrogateescape")


def matches(pattern: str, subject: str) -> bool:
    """Whether a subscription to the pattern receives the subject."""
    wanted, given = pattern.split("."), subject.split(".")
    for index, token in enumerate(wanted):
        if token == ">":
            return len(given) > index
        if index >= len(given) or token not in ("*", given[index]):
            return False
    return len(wanted) == len(given)


def unique() -> str:
    """A new identifier of 22 letters and digits, unique among processes and forks.

    Each call takes a fresh generator: its prefix alone is 12 characters from the system's entropy, whereas the counter
    of a shared one repeats now and then (pynats2 computes it in floating point).
    """
    return NUID().next_().decode()
