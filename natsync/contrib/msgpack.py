"""MessagePack payloads: encode(), decode(), and handlers that take and return values instead of bytes.

    from natsync.contrib import msgpack

    @subscriber.handler("sum")
    @msgpack.typed
    def add(ctx, numbers):
        return {"sum": sum(numbers)}

    reply = client.request("sum", msgpack.encode([20, 22]))
    print(msgpack.decode(reply)["sum"])

Needs the extra `msgpack`. Values are those of MessagePack: no objects of one's own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

try:
    import msgpack as _msgpack
except ImportError:
    raise ImportError('the msgpack library is not installed: pip install "natsync[msgpack]"') from None

from natsync.errors import Code, HandlerError, InvalidArgument
from natsync.message import Message

F = TypeVar("F", bound=Callable[..., Any])


def encode(value: Any) -> bytes:
    """The value as a payload.

    Raises:
        InvalidArgument: it has no form in MessagePack.
    """
    try:
        packed: bytes = _msgpack.packb(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidArgument(f"the value has no MessagePack form: {error}") from error
    return packed


def decode(data: bytes | Message) -> Any:
    """The value of a payload or a message.

    The keys of maps may be numbers, too. Python's hashes of numbers, unlike those of texts, can be foretold: a stranger
    may send keys that collide on purpose, which cost more time than others. The server's max_payload bounds how many.

    Raises:
        InvalidArgument: it is not one value in MessagePack, or a map has a list or a map for a key.
    """
    try:
        return _msgpack.unpackb(data.data if isinstance(data, Message) else data, strict_map_key=False)
    except (TypeError, ValueError, RecursionError, _msgpack.UnpackException) as error:
        what = str(error) or type(error).__name__
        raise InvalidArgument(f"the payload is not a MessagePack value: {what}") from error


def typed(function: F) -> F:
    """Decorator under @subscriber.handler and @subscriber.stream: function(ctx, value) returns or yields values.

    A payload that is not MessagePack is answered with a HandlerError of code INVALID_ARGUMENT.

    What the function raises, and what encode() raises for what it returns, is answered as of any handler.
    """

    def value_of(request: Message) -> Any:
        try:
            return decode(request)
        except InvalidArgument as error:
            raise HandlerError(str(error), code=Code.INVALID_ARGUMENT) from error

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stream(ctx: Any, request: Message) -> Iterator[bytes]:
            yield from map(encode, function(ctx, value_of(request)))

        return cast(F, _plain(stream))

    @functools.wraps(function)
    def answer(ctx: Any, request: Message) -> bytes:
        return encode(function(ctx, value_of(request)))

    return cast(F, _plain(answer))


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its own signature, not the wrapped one's, so that its form is what counts."""
    del function.__wrapped__  # type: ignore[attr-defined]
    return function
