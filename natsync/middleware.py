"""Middleware: what may change or refuse messages on their way out and in, on either side.

A Middleware is one step; a Chain is the steps of a client or subscriber in their order, made only where there are some;
a Passage is one request, stream or message on its way through them. What is only to be observed is a matter of hooks.
Middleware is user code: it runs in the thread that sends or takes the message, or runs the handler, under no lock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias

from natsync.headers import SERVICE_ERROR, HeaderInput, Headers
from natsync.hooks import Exchange, Kind
from natsync.message import Message, Payload, to_bytes

Side: TypeAlias = Literal["requester", "responder"]


class Passage(Exchange):
    """One request, stream or message on its way through the middleware: the same object at every step of one side.

    Attributes (with those of natsync.Exchange):
        side: "requester" for whoever publishes, "responder" for whoever handles.
        headers: those of the request or message. On the requester's side send() may add to them.
        reply_headers: those of the reply, or of a stream's first chunk. On the responder's side any step may add to
            them until the first chunk, or the reply, has passed; on the requester's, receive() finds them there.
    """

    __slots__ = ("_chain", "headers", "reply_headers", "side")
    headers: Headers

    def __init__(
        self, chain: Chain, side: Side, kind: Kind, subject: str, headers: Headers, destination: str | None = None
    ) -> None:
        super().__init__(kind, subject, headers, destination)
        self.side: Side = side
        self.reply_headers = Headers()
        self._chain = chain

    def send(self, data: bytes) -> bytes:
        """Have the data pass on its way out."""
        for step in self._chain.sends:
            data = _checked(step, step(self, data))
        return data

    def receive(self, data: bytes) -> bytes:
        """Have the data pass on its way in."""
        for step in self._chain.receives:
            data = _checked(step, step(self, data))
        return data

    def received(self, message: Message) -> Message:
        """A reply, or a chunk as a message, after it has passed. Errors go round."""
        if message.headers:
            self.reply_headers = message.headers
        if SERVICE_ERROR not in message.headers:
            message.data = self.receive(message.data)
        return message

    @contextlib.contextmanager
    def admitted(self, message: Message, *, around: bool = True) -> Iterator[None]:
        """For the block in which a handler runs: what came has passed, and what it responds with passes."""
        message.data = self.receive(message.data)
        publish = message._publish
        if publish is not None:

            def respond(reply: str, payload: Payload, headers: Headers | None) -> None:
                if headers is None or SERVICE_ERROR not in headers:
                    payload = self.send(to_bytes(payload))
                    if self.reply_headers:
                        headers = _merged(self.reply_headers, headers)
                publish(reply, payload, headers)

            message._publish = respond
        with contextlib.ExitStack() as stack:
            for enter in self._chain.arounds if around else ():
                stack.enter_context(enter(self))
            yield


class Middleware:
    """One step that messages pass: override what you need, and pass `middleware=[...]` to a Client or a Subscriber.

        class Tenant(natsync.Middleware):
            def send(self, passage, data):
                if passage.side == "requester":
                    passage.headers["Tenant"] = current_tenant()
                return data

        client = natsync.Client(middleware=[Tenant()])

    Steps are passed in the order of the list on the way out, and in the reverse order on the way in, so that the same
    list on both sides undoes what it did. What a step raises is raised to the caller on the requester's side (before
    anything was sent, if send() of a request raised; a stream is cancelled), and on the responder's is answered as if
    the handler had raised it: a natsync.HandlerError with a code says how. A method may be called in several threads
    at once. Errors that a handler answers with do not pass.
    """

    def send(self, passage: Passage, data: bytes) -> bytes:
        """Something is about to leave: a request or message (requester), a reply or a chunk (responder).

        Returns the payload to be sent instead. For the chunks of a stream it is called in the order in which one thread
        sends them; again for a chunk that try_send() found no room for, if that is tried again.
        """
        return data

    def receive(self, passage: Passage, data: bytes) -> bytes:
        """Something has come: a reply or a chunk (requester), a request or message (responder).

        Returns the payload to be handed on instead.
        """
        return data

    def around(self, passage: Passage) -> AbstractContextManager[object]:
        """A context manager around the handler of a request, stream or message, in its thread; the responder's only.

        It is entered when receive() of all steps has returned; the first of the list is outermost. A stream's handler
        that leaves its sender to other threads is left behind when it returns, a generator when it is used up.
        """
        return contextlib.nullcontext()


#: What `middleware=` takes.
MiddlewareOption: TypeAlias = Sequence[Middleware]


class Chain:
    """The steps of one client or subscriber: of each kind those that do something, in the order in which they come."""

    def __init__(self, middleware: Sequence[Middleware]) -> None:
        self.sends = _steps(middleware, "send")
        self.receives = _steps(middleware[::-1], "receive")
        self.arounds = _steps(middleware, "around")

    def requester(self, kind: Kind, subject: str, headers: HeaderInput) -> Passage:
        return Passage(self, "requester", kind, subject, Headers(headers))

    def responder(self, kind: Kind, subject: str, message: Message) -> Passage:
        return Passage(self, "responder", kind, subject, message.headers, message.subject)


def chain_of(middleware: MiddlewareOption) -> Chain | None:
    """The chain of what an option means; None if there is nothing in it."""
    return Chain(middleware) if middleware else None


def checked(middleware: Any) -> tuple[Middleware, ...]:
    """The middleware that an option means.

    Raises:
        TypeError: it is not a list or tuple of Middleware.
    """
    if not isinstance(middleware, list | tuple):
        raise TypeError(f"middleware is a list of natsync.Middleware, not {type(middleware).__name__}")
    for one in middleware:
        if not isinstance(one, Middleware):
            kind = f"the class {one.__name__}" if isinstance(one, type) else type(one).__name__
            raise TypeError(f"middleware is a list of natsync.Middleware, not a list with {kind}")
    return tuple(middleware)


def _steps(middleware: Sequence[Middleware], name: str) -> tuple[Callable[..., Any], ...]:
    return tuple(getattr(one, name) for one in middleware if getattr(type(one), name) is not getattr(Middleware, name))


def _checked(step: Callable[..., Any], data: Any) -> bytes:
    if type(data) is bytes:
        return data
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data)
    raise TypeError(f"{getattr(step, '__qualname__', step)}() returned {type(data).__name__}, not bytes")


def _merged(first: Headers, second: Headers | None) -> Headers:
    merged = Headers(first)
    for key in second or ():
        assert second is not None
        merged.pop(key, None)
        for value in second.get_all(key):
            merged.add(key, value)
    return merged
