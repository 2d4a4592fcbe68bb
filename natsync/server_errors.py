"""What a server's -ERR means: one table of its texts, for the handshake and for the link.

Pure. Texts are compared in lower case and by their beginning, because servers of different ages end them differently.
An unknown text is no reason to end anything: whether the server closes the link is what decides.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Literal

from natsync.errors import AuthorizationError, ConnectError, NatsError, PermissionDenied


class Misconfigured(ConnectError):
    """The server and this client are not configured for each other, and trying again will not change that."""


class ServerError(enum.Enum):
    """The kinds of -ERR, by what a client should do."""

    #: Something that was asked for is not allowed; the link stays. It concerns whoever asked.
    PERMISSION = "permission"
    #: The credentials are not, or no longer, accepted; the server closes. The same words twice will not change.
    AUTH = "auth"
    #: This client and this server are not configured for each other; the server closes. Trying again does not help it.
    CONFIGURATION = "configuration"
    #: The server cannot take the client just now; it closes. Another server may, or this one later.
    BUSY = "busy"
    #: The server did not accept what was sent; it closes. A new link is needed.
    PROTOCOL = "protocol"
    #: The server took the link for dead; it closes. A new link is needed.
    STALE = "stale"
    #: None of the known texts.
    UNKNOWN = "unknown"

    @property
    def closes(self) -> bool | None:
        """Whether the server ends the link after it; None if that is not known."""
        return None if self is ServerError.UNKNOWN else self is not ServerError.PERMISSION


@dataclass(frozen=True)
class _Row:
    start: str
    kind: ServerError
    advice: str = ""
    lasting: bool = True  # False: it may pass, although it looks like a mistake in the configuration


_PERMISSION_ADVICE = "allow the subject in the user's permissions"
_REPLY_ADVICE = "allow the subject in the user's permissions, or set allow_responses if it answers requests"
_TLS_ADVICE = "use tls:// or tls=True, and tls_first=True where the server wants TLS before its greeting"
_HEADERS_ADVICE = "headers are switched off at the server; remove no_header_support from its configuration"
_PROTOCOL_ADVICE = "the server is too old for this client, or another service answers there"
_PORT_ADVICE = "that is not the port for clients; use the one after 'Listening for client connections' in its log"

_CONTROL_LINE = _Row(
    "maximum control line", ServerError.PROTOCOL, "a subject was longer than the server's max_control_line allows"
)

#: The first row whose text the server's begins with.
_TABLE = (
    _Row("permissions violation for publish", ServerError.PERMISSION, _REPLY_ADVICE),
    _Row("permissions violation", ServerError.PERMISSION, _PERMISSION_ADVICE),
    _Row("maximum subscriptions exceeded", ServerError.PERMISSION, "raise max_subscriptions at the server"),
    _Row("invalid subject", ServerError.PERMISSION),
    _Row("invalid publish subject", ServerError.PERMISSION),
    _Row("authorization violation", ServerError.AUTH),
    _Row("user authentication", ServerError.AUTH),  # … expired, … revoked
    _Row("account authentication", ServerError.AUTH),
    _Row("authentication expired", ServerError.AUTH),
    _Row("authentication revoked", ServerError.AUTH),
    _Row("credentials have been revoked", ServerError.AUTH),
    _Row("failed account registration", ServerError.AUTH),
    # A slow network or a server under load, not wrong credentials: another attempt may well succeed.
    _Row(
        "authentication timeout", ServerError.BUSY, "the handshake took longer than the server's authorization timeout"
    ),
    _Row("maximum connections exceeded", ServerError.BUSY, "raise max_connections at the server"),
    _Row(
        "maximum account active connections exceeded", ServerError.BUSY, "raise the connections of the account's limits"
    ),
    _Row("connection throttling", ServerError.BUSY),
    _Row(
        "secure connection - tls required", ServerError.CONFIGURATION, _TLS_ADVICE, False
    ),  # said of a TLS handshake that took too long, too
    _Row("tls required", ServerError.CONFIGURATION, _TLS_ADVICE, False),
    _Row("no responders requires headers", ServerError.CONFIGURATION, _HEADERS_ADVICE),
    _Row("message headers not supported", ServerError.CONFIGURATION, _HEADERS_ADVICE),
    _Row("invalid client protocol", ServerError.CONFIGURATION, _PROTOCOL_ADVICE),
    _Row("invalid protocol", ServerError.CONFIGURATION, _PROTOCOL_ADVICE),
    _Row("minimum version required", ServerError.CONFIGURATION),
    _Row("attempted to connect to", ServerError.CONFIGURATION, _PORT_ADVICE),
    _Row("certificate not pinned", ServerError.CONFIGURATION, "the server pins the certificates of its clients"),
    _Row("maximum payload", ServerError.PROTOCOL, "a message was larger than the server's max_payload"),
    _CONTROL_LINE,
    _Row("unknown protocol operation", ServerError.PROTOCOL),
    _Row("parser error", ServerError.PROTOCOL),
    _Row("bad message header", ServerError.PROTOCOL),
    _Row("stale connection", ServerError.STALE, "the server had no answer to its PINGs"),
    _Row("slow consumer", ServerError.STALE, "messages were read too slowly"),
)
_UNKNOWN = _Row("", ServerError.UNKNOWN)

_QUOTED = r'"((?:[^"\\]|\\.)*)"'
_DENIED = re.compile(
    rf"permissions violation for (publish with reply of|publish to|subscription to) {_QUOTED}"
    rf'(?: using queue {_QUOTED})?(?: \(sid "(\d{{1,18}})"\))?',
    re.IGNORECASE | re.DOTALL | re.ASCII,
)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_LETTERS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}

_WHAT: dict[str, Literal["publish", "reply", "subscription"]] = {
    "publish to": "publish",
    "publish with reply of": "reply",
    "subscription to": "subscription",
}


@dataclass(frozen=True)
class Denial:
    """What a permission is missing for.

    Attributes:
        what: "publish" or "subscription"; "reply" for a message whose reply subject is not allowed.
        subject: as it was on the wire.
        queue: the queue group of the subscription, if it has one.
        sid: the subscription that the server removed because permissions have changed; None otherwise.
    """

    what: Literal["publish", "reply", "subscription"]
    subject: bytes
    queue: bytes | None = None
    sid: int | None = None


def classify(text: str) -> ServerError:
    """The kind of the -ERR with this text."""
    return _row(text).kind


def advice(text: str) -> str:
    """What may be done about the -ERR with this text; empty if there is no advice."""
    return _row(text).advice


def is_line_too_long(text: str) -> bool:
    """Whether the -ERR with this text says that a control line was too long; it does not say which."""
    return _row(text) is _CONTROL_LINE


def server_error(server_text: str, text: str) -> NatsError:
    """The error to raise for an -ERR of this server, with advice where there is some.

    AUTH is an AuthorizationError, PERMISSION a PermissionDenied, CONFIGURATION Misconfigured (unless it
    may pass), everything else a ConnectError.
    """
    row = _row(text)
    said = text + (f" ({row.advice})" if row.advice else "")
    if row.kind is ServerError.AUTH:
        return AuthorizationError(f"{server_text} refused the credentials: {said}")
    if row.kind is ServerError.PERMISSION:
        return PermissionDenied(f"{server_text}: {said}")
    if row.kind is ServerError.CONFIGURATION:
        kind = Misconfigured if row.lasting else ConnectError
        return kind(f"{server_text} and this client are not configured for each other: {said}")
    if row.kind is ServerError.BUSY:
        return ConnectError(f"{server_text} cannot take this connection now: {said}")
    return ConnectError(f"{server_text} ended the connection: {said}")


def denial(text: str) -> Denial | None:
    """What a permission error is about; None if the text is none, or names no subject."""
    match = _DENIED.match(text)
    if match is None:
        return None
    what, subject, queue, sid = match.groups()
    return Denial(
        _WHAT[what.lower()],
        _unquote(subject),
        None if queue is None else _unquote(queue),
        None if sid is None else int(sid),
    )


def _row(text: str) -> _Row:
    lowered = text.strip().lower()
    return next((row for row in _TABLE if lowered.startswith(row.start)), _UNKNOWN)


def _unquote(quoted: str) -> bytes:
    """The bytes that the server wrote as a Go string between quotation marks."""
    parts, last = [], 0
    for match in _ESCAPE.finditer(quoted):
        parts.append(_encode(quoted[last : match.start()]))
        parts.append(_escaped(match[1]))
        last = match.end()
    parts.append(_encode(quoted[last:]))
    return b"".join(parts)


def _escaped(code: str) -> bytes:
    if len(code) == 1:
        return _encode(_LETTERS.get(code, code))
    number = int(code[1:], 16)
    return bytes([number]) if code[0] == "x" else _encode(chr(number) if number < 0x110000 else "\ufffd")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "replace")
