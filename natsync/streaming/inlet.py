"""What the two modes of receiving have in common: where they put what has come, and how errors are read."""

from __future__ import annotations

from typing import Protocol

from natsync.errors import DeadlineExceeded, HandlerError, ServerLost, StreamError, StreamRefused
from natsync.headers import Headers
from natsync.message import Item
from natsync.mux import LinkLoss
from natsync.streaming import terms


class Inlet(Protocol):
    """Where a receiver puts what has come. Nothing here blocks."""

    subject: str
    token: bytes
    inbox: bytes

    def decided(self, receiver: Receiver) -> None:
        """The mode is known; nothing was passed on before this."""

    def begun(self, headers: Headers) -> None:
        """The first chunk is about to come; the headers came along with it."""

    def arrived(self, chunks: list[bytes]) -> None:
        """Chunks for the consumer."""

    def arrived_items(self, items: list[Item]) -> tuple[int, int]:
        """The same as messages; how many chunks wait now, and their bytes."""

    def finished(self, error: Exception | None, *, item: Item | None = None, trailers: Headers | None = None) -> None:
        """The responder ended the stream, as complete if there is no error; item: the message that did it."""

    def fail(self, error: Exception, *, tell: bool = True) -> None:
        """The stream cannot go on; tell: the responder is to be cancelled."""


class Receiver(Protocol):
    """What takes the messages of a stream whose mode is known."""

    @property
    def mode(self) -> str: ...
    @property
    def gaps(self) -> int: ...
    @property
    def resent(self) -> int: ...
    @property
    def resumes(self) -> int: ...

    def deliver(self, items: list[Item]) -> None:
        """On the reader's thread."""

    def consumed(self, chunks: int, size: int) -> None:
        """The consumer has taken so many chunks, and bytes, in all."""

    def link_lost(self, loss: LinkLoss) -> None:
        """The link that the request went out on, or a later one, is gone."""

    def link_made(self) -> None:
        """There is another."""


def reported(text: str, headers: Headers) -> StreamError:
    """The error that a responder ended the stream with."""
    status = terms.decode_status(headers)
    if status.reason == terms.REFUSED:
        return refused(text, headers)
    if status.reason == terms.LOST:
        return ServerLost(text, code=status.code)
    if status.reason == terms.DEADLINE:
        return DeadlineExceeded(text)
    return HandlerError(text, code=status.code, details=status.details)


def refused(text: str, headers: Headers) -> StreamRefused:
    """The error that a responder turned the request away with."""
    status = terms.decode_status(headers)
    return StreamRefused(text, retry_after=status.retry_after, code=status.code)
