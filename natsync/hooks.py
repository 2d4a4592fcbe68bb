"""Hooks: what metrics and tracing are built on, one method that does nothing for each thing that happens.

Users override what they need and pass `hooks=`. The parts of the library call fire(), or hold a Watch on one request or
stream; nothing here knows what a hook does. Hooks are user code: they run in the thread of the caller whose request it
is, on the worker that runs a handler, or on another worker, never on the threads that own a socket or the timer, and
never under a lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import MutableMapping, Sequence
from typing import Any, Literal, TypeAlias

log = logging.getLogger("natsync.hooks")

Kind: TypeAlias = Literal["message", "request", "stream"]


class Exchange:
    """One message, request or stream as one side sees it: the same object in every hook that concerns it.

    Attributes:
        kind: "message", "request" or "stream".
        subject: as the user gave it: where the request goes, or what the handler is registered for, wildcards
            included. Fit for a label; never an inbox.
        destination: the subject of the message itself; differs from subject where a handler's has wildcards.
        headers: those of the request. The requester's hooks may add to them in publishing(), request_started() and
            stream_opened(), before they are sent; names with Natsync- and Nats- are reserved.
        started: the time.monotonic() from which all seconds count.
        attributes: empty, for the hooks' own use, such as a span.
    """

    __slots__ = ("attributes", "destination", "headers", "kind", "started", "subject")

    def __init__(
        self, kind: Kind, subject: str, headers: MutableMapping[str, str], destination: str | None = None
    ) -> None:
        self.kind: Kind = kind
        self.subject = subject
        self.destination = subject if destination is None else destination
        self.headers = headers
        self.started = time.monotonic()
        self.attributes: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"<Exchange: {self.kind} on {self.subject!r}>"


class Hooks:
    """Override the methods of what is to be observed, and pass `hooks=`: one object, or a list called in its order.

        class Metrics(natsync.Hooks):
            def stream_done(self, exchange, seconds, chunks, size_bytes, error):
                outcome = "ok" if error is None else type(error).__name__
                durations.labels(exchange.subject, outcome).observe(seconds)

        client = natsync.Client(hooks=Metrics())

    Each call about a request or stream comes with the same Exchange, so that what a hook keeps in its .attributes, such
    as a span, is at hand the next time. Every request that was started is done once, and so is every stream that was
    opened, every handler that was started, and every response whose handler was started. Seconds are floats and count
    from the start of the exchange. An error is the exception that the user's code gets or raised, or None.

    What a method raises is logged under natsync.hooks, and nothing else happens. A method may be called in several
    threads at once, and should be brief: the caller, or the handler, waits for it.
    """

    # -- the connection: on a worker, one after the other, in the order in which it happened -----------------------

    def connected(self, server: str) -> None:
        """There is a first link, to this server."""

    def disconnected(self, reason: str) -> None:
        """The link was lost; another one follows, unless closed() does."""

    def reconnected(self, server: str) -> None:
        """There is a link again; or another server has taken over from one that is going away (lame duck), and then
        without disconnected() before."""

    def closed(self, reason: str | None) -> None:
        """The connection has ended for good; reason None = it was closed on purpose."""

    def lame_duck(self, server: str) -> None:
        """The server is about to shut down."""

    def slow_consumer(self, subject: str, dropped: int) -> None:
        """A subscription's limits were reached, once an episode; dropped counts all messages it has lost."""

    def error(self, error: str, kind: str | None) -> None:
        """The server reported an error, in its words, and of what kind that is; or messages were lost (None)."""

    # -- the requester: in the caller's thread ---------------------------------------------------------------------

    def publishing(self, exchange: Exchange, size_bytes: int) -> None:
        """publish() was called; headers may still be added."""

    def request_started(self, exchange: Exchange) -> None:
        """request() was called; headers may still be added."""

    def request_done(self, exchange: Exchange, seconds: float, error: BaseException | None) -> None:
        """request() is about to return or raise, all retries included."""

    def retrying(self, exchange: Exchange, attempt: int, wait_seconds: float, error: BaseException) -> None:
        """An attempt of a request or a stream (counted from 1) has failed like this, and another one follows the wait.

        In the thread that waits for the answer.
        """

    def stream_opened(self, exchange: Exchange) -> None:
        """stream() or stream_request() was called; headers may still be added."""

    def stream_first_chunk(self, exchange: Exchange, seconds: float) -> None:
        """The consumer is about to get the first chunk."""

    def stream_done(
        self, exchange: Exchange, seconds: float, chunks: int, size_bytes: int, error: BaseException | None
    ) -> None:
        """The consumer is about to learn that the stream is complete (error None) or failed, or it has closed it.

        chunks and size_bytes are those that it was given. A stream that was closed, or dropped (then this comes on a
        worker), before its end has a StreamCancelled.
        """

    # -- the responder: handler_started and handler_done on the handler's thread, around it ------------------------

    def handler_started(self, exchange: Exchange) -> None:
        """A handler or callback is about to be called, in this thread: what is put into a contextvar it sees.

        handler_done() follows, and for a stream response_done() behind it.
        """

    def handler_done(self, exchange: Exchange, seconds: float, error: BaseException | None) -> None:
        """It has returned, or raised the error; its stream may go on, if other threads send."""

    def response_first_chunk(self, exchange: Exchange, seconds: float) -> None:
        """A stream's first chunk was queued, in this thread."""

    def response_done(
        self, exchange: Exchange, seconds: float, chunks: int, size_bytes: int, error: BaseException | None
    ) -> None:
        """A stream is over, and its handler done: the last that is told of it; seconds count up to the stream's end.

        error None = it was ended as complete; StreamCancelled and ClientLost = the requester cancelled, or is gone.
        On the handler's thread, or on a worker if the stream lasts longer than its handler.
        """

    def refused(self, exchange: Exchange, reason: str) -> None:
        """A request was turned away, unserved: no slot or thread was free, or it wants no answer. On a worker."""


#: The events of a connection, each with those of its details that the method of the same name gets, in order.
EVENTS: dict[str, tuple[str, ...]] = {
    "connected": ("server",),
    "disconnected": ("reason",),
    "reconnected": ("server",),
    "closed": ("reason",),
    "lame_duck": ("server",),
    "slow_consumer": ("subject", "dropped"),
    "error": ("error", "kind"),
}

#: What `hooks=` takes.
HooksOption: TypeAlias = "Hooks | Sequence[Hooks] | None"


def checked(hooks: Any) -> tuple[Hooks, ...] | None:
    """The hooks that an option means; None if there are none.

    Raises:
        TypeError: it is neither Hooks nor a list or tuple of them.
    """
    several = (hooks,) if isinstance(hooks, Hooks) else () if hooks is None else hooks
    if not isinstance(several, list | tuple):
        raise TypeError(f"hooks is a natsync.Hooks or a list of them, not {_kind(hooks)}")
    for one in several:
        if not isinstance(one, Hooks):
            raise TypeError(f"hooks is a natsync.Hooks or a list of them, not a list with {_kind(one)}")
    return tuple(several) or None


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def fire(hooks: HooksOption, event: str, *values: Any) -> None:
    """Call the method named after the event on each of the hooks; what one raises is logged, and the next is called.

    KeyboardInterrupt and SystemExit pass: they strike the caller's thread, and are not the hook's.
    """
    for one in (hooks,) if isinstance(hooks, Hooks) else hooks or ():
        try:
            getattr(one, event)(*values)
        except Exception:
            log.exception("%s.%s() raised", type(one).__name__, event)


def fire_event(hooks: HooksOption, event: str, details: dict[str, Any]) -> None:
    """fire() for an event of the connection, from the details that on_event gets."""
    if event in EVENTS:
        fire(hooks, event, *(details.get(key) for key in EVENTS[event]))


class Watch:
    """Tells hooks of one exchange. Made only where there are hooks."""

    def __init__(
        self,
        hooks: HooksOption,
        kind: Kind,
        subject: str,
        headers: MutableMapping[str, str],
        destination: str | None = None,
    ) -> None:
        self.exchange = Exchange(kind, subject, headers, destination)
        self._hooks = hooks
        self._lock = threading.Lock()
        self._told: set[str] = set()

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return time.monotonic() - self.exchange.started

    def tell(self, event: str, *values: Any) -> None:
        fire(self._hooks, event, self.exchange, *values)

    def tell_once(self, event: str, *values: Any) -> None:
        """tell() for what several threads may find out at the same time: the first one tells."""
        with self._lock:
            if event in self._told:
                return
            self._told.add(event)
        self.tell(event, *values)

    def told(self, event: str) -> bool:
        """Whether tell_once() was called for the event."""
        return event in self._told
