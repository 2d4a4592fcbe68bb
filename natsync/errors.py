"""Every error natsync raises, with its data as attributes.

    NatsError                      also a pynats2.NATSError
    ├─ ConnectError                also ConnectionError and pynats2.NATSConnectionError
    │   ├─ NoServersError          .causes: server -> exception
    │   └─ ConnectionLost          .sent
    ├─ ConnectionClosed            .sent
    ├─ AuthorizationError · PermissionDenied · ReconnectBufferFull · MaxPayloadExceeded
    ├─ NoRespondersError · SlowConsumerError · ForkError · PoolClosed · ProtocolError
    ├─ InvalidArgument             also ValueError: refused before anything was sent
    │   └─ InvalidURL              also pynats2.NATSInvalidUrlError, NATSInvalidSchemeError
    ├─ TimedOut                    also TimeoutError
    │   ├─ RequestTimeout          .sent; also pynats2.NATSRequestTimeoutError
    │   ├─ IdleTimeout             also StreamError
    │   ├─ PoolTimeout
    │   │   └─ PoolUnreachable     .causes; also NoServersError
    │   └─ DrainTimeout            .undone .unhandled .unsent
    ├─ StreamError                 .code .message .details .last_seq
    │   ├─ StreamRefused           .retry_after
    │   ├─ ServerLost · HandlerError
    │   └─ StreamClosed
    │       ├─ StreamCancelled · ClientLost
    │       └─ DeadlineExceeded    also TimedOut
    ├─ Cancelled                   from Context.check()
    └─ StreamEnded                 from Stream.next() at the end

Misuse that only the caller can mend is a TypeError (a wrong type), an InvalidArgument or a RuntimeError.
Status codes of streams are those of gRPC, by number; Code names them.

All of them go from process to process (pickle) and can be copied, with their text and their data.
"""

from __future__ import annotations

import enum
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from natsync import _pynats2


class Code(enum.IntEnum):
    """How a stream or a handler ended: gRPC's status codes, so that the numbers mean the same everywhere."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class NatsError(_pynats2.NATSError):
    """The root of all natsync errors; `except pynats2.NATSError` catches them too."""

    # What BaseException does here calls the class with args, which are the text: not what every class is made from.
    # multiprocessing waits for ever for a result that cannot be unpickled.
    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (type(self), self.args), {name: _portable(value) for name, value in self.__dict__.items()}

    def __copy__(self) -> Any:
        copied = _remade(type(self), self.args)
        copied.__dict__.update(self.__dict__)
        return copied


def _remade(kind: type[NatsError], args: tuple[Any, ...]) -> NatsError:
    """An error as it was after its __init__, but for its attributes."""
    error = kind.__new__(kind, *args)
    error.args = args
    return error


def _portable(value: Any) -> Any:
    """What goes to another process for this value: itself, or what can be said of it where that cannot go there."""
    if isinstance(value, dict):
        return {key: _portable(one) for key, one in value.items()}
    try:
        pickle.loads(pickle.dumps(value))  # an exception of somebody else's may fail only when it is made again
    except Exception:
        return ConnectError(repr(value)) if isinstance(value, BaseException) else repr(value)
    return value


class ConnectError(NatsError, _pynats2.NATSConnectionError, ConnectionError):
    """The link to the server could not be made, or broke."""

    def __init__(self, message: str) -> None:
        OSError.__init__(self, message)
        self.line = message  # what pynats2's errors carry


class NoServersError(ConnectError):
    """No server of the list could be reached; .causes maps each server tried to its exception."""

    def __init__(self, causes: Mapping[str, BaseException]) -> None:
        self.causes = dict(causes)
        tried = "; ".join(f"{server}: {cause}" for server, cause in self.causes.items())
        super().__init__(f"no server could be reached ({tried or 'none is known'})")


class ConnectionLost(ConnectError):
    """The link broke under a request; .sent is False only if the request surely never left."""

    def __init__(self, message: str, *, sent: bool = True) -> None:
        self.sent = sent
        super().__init__(message)


class AuthorizationError(NatsError):
    """The server refused the credentials, or they expired."""


class PermissionDenied(NatsError):
    """The server's permissions do not allow this subject for this user."""


class ConnectionClosed(NatsError):
    """The client, pool or subscriber was closed; .sent is True for a request under way that may have run."""

    def __init__(self, message: str = "", *, sent: bool = False) -> None:
        self.sent = sent
        super().__init__(message)


class ReconnectBufferFull(NatsError):
    """The link is down and reconnect_buffer_bytes are already waiting for it; nothing was sent."""


class MaxPayloadExceeded(NatsError):
    """The message (headers and payload) is larger than the server takes; nothing was sent."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes
        super().__init__(
            f"message of {size_bytes} bytes (headers and payload) exceeds the server's max_payload, {limit_bytes} bytes"
        )


class NoRespondersError(NatsError):
    """Nobody subscribes to the subject: the server said so at once (503), and nothing ran."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        super().__init__(f"no responders for {subject!r}: nothing subscribes to it now")


class SlowConsumerError(NatsError):
    """Messages came faster than they were taken, and the pending limit was reached."""


class ForkError(NatsError, RuntimeError):
    """The object belongs to the process that made it, not to this forked child."""


class PoolClosed(NatsError):
    """The connection pool was closed."""


class ProtocolError(NatsError):
    """The peer sent bytes that are not the NATS protocol."""


class InvalidArgument(NatsError, ValueError):
    """An argument was refused before anything was sent."""


class InvalidURL(InvalidArgument, _pynats2.NATSInvalidUrlError, _pynats2.NATSInvalidSchemeError):
    """A server URL cannot be used; credentials in it are never part of the text."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)
        self.line = message  # what pynats2's errors carry


class TimedOut(NatsError, TimeoutError):
    """A wait reached its limit."""


class RequestTimeout(TimedOut, _pynats2.NATSRequestTimeoutError):
    """No reply in time; .sent is False only if the request surely never left, so that nothing can have run."""

    def __init__(self, message: str, *, sent: bool = True) -> None:
        self.sent = sent
        super().__init__(message)


class PoolTimeout(TimedOut):
    """No connection of the pool became free in time."""


class PoolUnreachable(PoolTimeout, NoServersError):
    """No connection of the pool became free in time, because none could be made.

    Attributes:
        causes: of the last attempt: server -> exception.
    """

    def __init__(self, message: str, causes: Mapping[str, BaseException]) -> None:
        super(NoServersError, self).__init__(message)
        self.causes = dict(causes)


class DrainTimeout(TimedOut):
    """Draining did not finish by its deadline.

    Attributes:
        undone: what was left undone, each in words.
        unhandled: subject -> messages that had come and were not handled, the one in its callback included.
        unsent: messages that were published and had not been handed to a server.
    """

    def __init__(
        self,
        message: str,
        *,
        undone: Sequence[str] = (),
        unhandled: Mapping[str, int] | None = None,
        unsent: int = 0,
    ) -> None:
        self.undone = list(undone)
        self.unhandled = dict(unhandled or {})
        self.unsent = unsent
        super().__init__(message + (": " + "; ".join(self.undone) if self.undone else ""))


class StreamError(NatsError):
    """A stream ended otherwise than by its END.

    Attributes:
        code: gRPC's status code, see Code.
        message: the text, as the peer sent it or as it was found here.
        details: what the handler gave as details, or None.
        last_seq: number of the last chunk that was delivered (client) or sent (server); 0 = none.
    """

    default_code: Code = Code.UNKNOWN

    def __init__(self, message: str, *, code: int | None = None, details: object = None, last_seq: int = 0) -> None:
        self.code = self.default_code if code is None else code
        self.message = message
        self.details = details
        self.last_seq = last_seq
        super().__init__(message)


class StreamRefused(StreamError):
    """The responder took no part of the request, so repeating it is safe; .retry_after is seconds, or None."""

    default_code = Code.RESOURCE_EXHAUSTED

    def __init__(self, message: str, *, retry_after: float | None = None, code: int | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(message, code=code)


class ServerLost(StreamError):
    """The link or the responder was lost in mid-stream; chunks up to .last_seq were delivered."""

    default_code = Code.UNAVAILABLE


class HandlerError(StreamError):
    """The handler failed and said so: its text is the message."""


class StreamClosed(StreamError):
    """The stream is closed, so nothing can be sent or received on it any more."""

    default_code = Code.CANCELLED


class StreamCancelled(StreamClosed):
    """The stream was cancelled, by this side or the other."""


class ClientLost(StreamClosed):
    """The requester is gone: nobody listens to the stream's inbox any more."""

    default_code = Code.UNAVAILABLE


class DeadlineExceeded(StreamClosed, TimedOut):
    """The deadline passed."""

    default_code = Code.DEADLINE_EXCEEDED


class IdleTimeout(StreamError, TimedOut):
    """Nothing came for idle_timeout seconds while the consumer waited."""

    default_code = Code.DEADLINE_EXCEEDED


class Cancelled(NatsError):
    """The context was cancelled; .reason says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class StreamEnded(NatsError):
    """The stream is complete: what Stream.next() raises after the last chunk; Replies.next() after the last reply."""
