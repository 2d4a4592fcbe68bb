"""What a natsync error is to whoever asked over HTTP: a status, and words that a page can show."""

from __future__ import annotations

import math
from typing import Any

from natsync.errors import (
    AuthorizationError,
    Cancelled,
    Code,
    ConnectError,
    ConnectionClosed,
    HandlerError,
    InvalidArgument,
    MaxPayloadExceeded,
    NatsError,
    NoRespondersError,
    PermissionDenied,
    PoolClosed,
    ReconnectBufferFull,
    ServerLost,
    SlowConsumerError,
    StreamError,
    StreamRefused,
    TimedOut,
)
from natsync.reply import TOO_MANY_REQUESTS

#: Seconds of Retry-After for a refusal that names none.
RETRY_AFTER = 1

#: The HTTP status of a handler's error by its code, as gRPC's gateways have it; 500 for the rest.
HANDLER_STATUS = {
    Code.INVALID_ARGUMENT: 400,
    Code.FAILED_PRECONDITION: 400,
    Code.OUT_OF_RANGE: 400,
    Code.UNAUTHENTICATED: 401,
    Code.PERMISSION_DENIED: 403,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.ABORTED: 409,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
}

#: Codes of HTTP by which other services of NATS (ADR-32) say how they failed: the status is the same. 500 says nothing.
_HTTP_CODES = frozenset([*range(400, 500), *range(501, 505)])
#: gRPC's code for them; of several with one status the first.
_CODE_OF_STATUS = {status: code for code, status in reversed(HANDLER_STATUS.items())}

#: Kinds of errors that are not the handler's, the narrower first: code, HTTP status, and what to say of it. Their own
#: text names subjects and servers, which are nobody's business outside: it belongs into the log.
_KINDS: tuple[tuple[type[BaseException], Code, int, str], ...] = (
    (StreamRefused, Code.RESOURCE_EXHAUSTED, 503, "the service is busy; try again later"),
    (TimedOut, Code.DEADLINE_EXCEEDED, 504, "the service did not answer in time"),
    (NoRespondersError, Code.UNAVAILABLE, 503, "the service is not running"),
    (ServerLost, Code.UNAVAILABLE, 503, "whoever was answering is gone"),
    (AuthorizationError, Code.INTERNAL, 502, "the service cannot be reached from here"),
    (PermissionDenied, Code.INTERNAL, 502, "the service cannot be reached from here"),
    (ConnectError, Code.UNAVAILABLE, 503, "the service cannot be reached just now"),
    (ReconnectBufferFull, Code.UNAVAILABLE, 503, "the service cannot be reached just now"),
    (ConnectionClosed, Code.UNAVAILABLE, 503, "the service cannot be reached just now"),
    (PoolClosed, Code.UNAVAILABLE, 503, "the service cannot be reached just now"),
    (MaxPayloadExceeded, Code.INVALID_ARGUMENT, 413, "the request is too large"),
    (SlowConsumerError, Code.RESOURCE_EXHAUSTED, 503, "the answer came faster than it could be passed on"),
    (Cancelled, Code.CANCELLED, 503, "the answer was cancelled"),
)


def http_status(error: BaseException) -> int:
    """The HTTP status that says the same as the error.

    Timeouts and deadlines are 504. Nobody who answers, no link to NATS, a responder that is lost or full, a stream that
    was cancelled: 503. Credentials and permissions that NATS does not accept are 502: they are this server's, not the
    browser's, which would take 401 or 403 for a matter of its own. A handler that failed gives what its code says
    (NOT_FOUND is 404, PERMISSION_DENIED is 403 …; HTTP's own codes, from 400 to 504, are themselves, but 429 is a
    responder that is full), and 500 where it gave none. Anything else is 500.
    """
    found = _kind(error)
    if found is not None:
        return found[1]
    if isinstance(error, StreamError):
        if error.code == Code.CANCELLED:
            return 503
        return error.code if error.code in _HTTP_CODES else HANDLER_STATUS.get(_code(error.code), 500)
    return 500


def http_headers(error: BaseException) -> dict[str, str]:
    """Headers that belong to that status: Retry-After, in whole seconds, where a responder refused for being full."""
    if not _refused(error):
        return {}
    seconds = error.retry_after if isinstance(error, StreamRefused) else None
    return {"Retry-After": str(math.ceil(seconds) if seconds else RETRY_AFTER)}


def error_data(error: BaseException) -> dict[str, Any]:
    """What to tell a browser of the error, fit for JSON: `code` and `error` (gRPC's, number and name) and `message`.

    The message is the handler's own where it failed (what a handler raises or passes to send_error() is public, then;
    `details` comes along if it gave any), and for all else a sentence of this module's: an error's own text may name
    subjects and servers. A refusal has `retry_after`, in seconds.
    """
    found = _kind(error)
    if found is not None:
        code, _, message = found
    elif isinstance(error, StreamError):
        code, message = _code(error.code), error.message
    elif isinstance(error, NatsError) and not isinstance(error, InvalidArgument):
        code, message = Code.UNKNOWN, "the service failed"
    else:
        code, message = Code.INTERNAL, "the server made a mistake"
    data: dict[str, Any] = {"code": int(code), "error": code.name, "message": message}
    if isinstance(error, StreamRefused) and error.retry_after is not None:
        data["retry_after"] = error.retry_after
    if found is None and isinstance(error, StreamError) and error.details is not None:
        data["details"] = error.details
    return data


def _kind(error: BaseException) -> tuple[Code, int, str] | None:
    cls = StreamRefused if _refused(error) else type(error)
    return next(((code, status, text) for kind, code, status, text in _KINDS if issubclass(cls, kind)), None)


def _refused(error: BaseException) -> bool:
    """Whether the responder had no room: a stream's refusal, or the answer of @handler to one request too many."""
    return isinstance(error, StreamRefused) or (isinstance(error, HandlerError) and error.code == TOO_MANY_REQUESTS)


def _code(number: int) -> Code:
    try:
        return Code(number)
    except ValueError:
        return _CODE_OF_STATUS.get(number, Code.UNKNOWN)
