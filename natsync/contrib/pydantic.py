"""Pydantic models as payloads: encode(), decode(), and handlers that take and return models instead of bytes.

    from natsync.contrib import pydantic

    @subscriber.handler("sum")
    @pydantic.typed
    def add(ctx, numbers: Numbers) -> Total:
        return Total(sum=numbers.a + numbers.b)

    reply = client.request("sum", pydantic.encode(Numbers(a=20, b=22)))
    print(pydantic.decode(Total, reply).sum)

Needs the extra `pydantic` (2 or newer). The wire form is JSON, so that peers without pydantic read it too.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

try:
    import pydantic_core
    from pydantic import TypeAdapter, ValidationError
except ImportError:
    raise ImportError('pydantic 2 is not installed: pip install "natsync[pydantic]"') from None

from natsync.errors import Code, HandlerError, InvalidArgument
from natsync.message import Message

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def encode(value: Any) -> bytes:
    """The model, or anything that pydantic can write as JSON, as a payload.

    Raises:
        InvalidArgument: it has no JSON form.
    """
    try:
        return pydantic_core.to_json(value)
    except (pydantic_core.PydanticSerializationError, ValueError) as error:
        raise InvalidArgument(f"the value has no JSON form: {error}") from error


def decode(kind: type[T], data: bytes | Message) -> T:
    """The payload or message as a model, or any other type that pydantic validates.

    Raises:
        InvalidArgument: it does not fit; the text says where, the cause is pydantic's ValidationError.
    """
    return _decode(TypeAdapter(kind), data)


def _decode(adapter: TypeAdapter[T], data: bytes | Message) -> T:
    try:
        return adapter.validate_json(data.data if isinstance(data, Message) else data)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        told = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the payload'}: {one['msg']}" for one in faults)
        raise InvalidArgument(told) from error


def typed(function: F) -> F:
    """Decorator under @subscriber.handler and @subscriber.stream: function(ctx, model: Model) returns or yields models.

    A payload that does not fit is answered with a HandlerError of code INVALID_ARGUMENT whose text says where.

    Raises:
        TypeError: the function has no second argument with a type.
    """
    adapter = _adapter_of(function)

    def model_of(request: Message) -> Any:
        try:
            return _decode(adapter, request)
        except InvalidArgument as error:
            raise HandlerError(str(error), code=Code.INVALID_ARGUMENT) from error

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stream(ctx: Any, request: Message) -> Iterator[bytes]:
            yield from map(encode, function(ctx, model_of(request)))

        return cast(F, _plain(stream))

    @functools.wraps(function)
    def answer(ctx: Any, request: Message) -> bytes:
        return encode(function(ctx, model_of(request)))

    return cast(F, _plain(answer))


def _adapter_of(function: Callable[..., Any]) -> TypeAdapter[Any]:
    names = list(inspect.signature(function).parameters)
    hints = typing.get_type_hints(function)
    if len(names) != 2 or names[1] not in hints:
        raise TypeError(f"a typed handler has the form (ctx, model: Model), unlike {function.__qualname__}")
    return TypeAdapter(hints[names[1]])


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its own signature, not the wrapped one's, so that its form is what counts."""
    del function.__wrapped__  # type: ignore[attr-defined]
    return function
