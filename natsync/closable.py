"""What streams, replies and subscriptions have in common: an end that is the user's to choose, and map()."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Closable(Generic[T]):
    """An iterator that is also a context manager and has close(): leaving the block closes."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self: C) -> C:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def map(self, function: Callable[[T], U]) -> MappedStream[U]:
        """Like map(function, stream), but the result keeps next(), close() and the context manager."""
        return MappedStream(self, function)


C = TypeVar("C", bound="Closable[Any]")


class MappedStream(Closable[T]):
    """A stream, replies or a subscription seen through a function; closing it closes what it is made of."""

    def __init__(self, stream: Any, function: Callable[[Any], T]) -> None:
        self._stream = stream
        self._function = function

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return self._function(next(self._stream))

    def next(self, timeout: float | None = None) -> T:
        """The function of what next() of the stream returns; waits and raises as that does."""
        return self._function(self._stream.next(timeout))

    def close(self) -> None:
        self._stream.close()
