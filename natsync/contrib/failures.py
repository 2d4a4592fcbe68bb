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
    (NOT_FOUND is 404, PERMISSION_DENIED is 403 …), and 500 where it gave none. Anything else is 500.
    """
    found = _kind(error)
    if found is not None:
        return found[1]
    if isinstance(error, StreamError):
        if error.code == Code.CANCELLED:
            return 503
        return HANDLER_STATUS.get(_code(error.code), 500)
    return 500


def http_headers(error: BaseException) -> dict[str, str]:
    """Headers that belong to that status: Retry-After, in whole seconds, where a responder refused for being full."""
    if not isinstance(error, StreamRefused):
        return {}
    return {"Retry-After": str(math.ceil(error.retry_after) if error.retry_after else RETRY_AFTER)}


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
    return next(((code, status, text) for kind, code, status, text in _KINDS if isinstance(error, kind)), None)


def _code(number: int) -> Code:
    try:
        return Code(number)
    except ValueError:
        return Code.UNKNOWN
