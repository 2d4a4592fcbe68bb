"""Request and reply: wait for the one message that answers.

The caller's thread publishes and waits; the reader's thread hands over the first answer. Later ones count as late.
"""

from __future__ import annotations

from collections.abc import Callable

from natsync import headers as _headers
from natsync import subject as _subject
from natsync.concurrency import Deadline, Signal
from natsync.connection import Connection
from natsync.context import Context
from natsync.errors import ConnectionLost, DeadlineExceeded, HandlerError, NoRespondersError, RequestTimeout, TimedOut
from natsync.headers import Headers
from natsync.message import Item, Message
from natsync.mux import LinkLoss, Waiter

#: Headers by which a responder says that it failed; those of the NATS services convention (ADR-32).
ERROR_HEADER = _headers.SERVICE_ERROR
ERROR_CODE_HEADER = "Nats-Service-Error-Code"
#: The code, HTTP's, of a request that was turned away because too many wait: nothing ran.
TOO_MANY_REQUESTS = 429
_NO_RESPONDERS = 503
_MOST_DIGITS = 9


class Asking(Waiter):
    """A request that waits: for one reply, or for several.

    Attributes:
        signal: set when there is something new: a reply, or an error.
        error: why no (further) reply can come.
        late: replies that nobody wants any more.
    """

    def __init__(self, subject: bytes) -> None:
        self.subject = subject
        self.signal = Signal()
        self.error: Exception | None = None
        self.late = 0
        self._connection: Connection | None = None
        self.frame = b""
        self.mark: int | None = None  # the frame's position in the outbox, once it is there

    def send(
        self,
        connection: Connection,
        inbox: bytes,
        block: bytes | None,
        payload: bytes,
        deadline: Deadline,
        ctx: Context | None,
    ) -> None:
        """Publish the request; blocks only while there is no room for it.

        Raises:
            RequestTimeout: there was no room by the deadline.
            Cancelled, DeadlineExceeded: ctx ended before there was room.
        """
        self._connection = connection
        self.frame = connection.encode(self.subject, inbox, block, payload)
        try:
            self.mark = connection.put(self.frame, deadline, ctx)
        except DeadlineExceeded:
            raise
        except TimedOut as error:
            raise _not_sent(self.subject, error) from error
        loss = connection.loss_of(self.frame, self.mark)
        if loss is not None:
            self.link_lost(loss)

    def link_lost(self, loss: LinkLoss) -> None:
        if self.mark is not None and loss.took(self.frame, self.mark):
            self.fail(ConnectionLost(f"the link broke while the request was under way: {loss.reason}", sent=True))

    def frames_dropped(self, dropped: list[bytes]) -> None:
        if any(frame is self.frame for frame in dropped):
            self.fail(ConnectionLost("the next server takes no message as large as the request", sent=False))

    def publish_denied(self, subject: bytes, error: Exception) -> None:
        if subject == self.subject:
            self.fail(error)

    def refused(self, error: Exception) -> None:
        self.fail(error)

    def connection_closed(self, reason: Exception) -> None:
        self.fail(reason if self._connection is None else self._connection.closed_under(self.frame))

    def fail(self, error: Exception) -> None:
        self.error = self.error or error
        self.signal.set()


class _Reply(Asking):
    """One waiting request."""

    def __init__(self, subject: bytes) -> None:
        super().__init__(subject)
        self.item: Item | None = None

    def deliver(self, items: list[Item]) -> None:
        if self.item is not None:
            self.late += len(items)
            return
        self.late += len(items) - 1
        self.item = items[0]
        self.signal.set()


def request(
    connection: Connection,
    subject: str,
    payload: bytes,
    block: bytes | None,
    timeout: float | None,
    ctx: Context | None,
) -> Message:
    """Publish a request and return its first reply; see Client.request()."""
    deadline = Deadline.after(timeout)
    if ctx is not None:
        ctx.check()
        deadline = deadline.or_sooner(ctx.remaining())
    to = _subject.publish_subject(subject)
    waiter = _Reply(to)
    open_for(connection, to, deadline, ctx)
    connection.mux.check_allowed()
    token, inbox = connection.mux.address()
    remove: Callable[[], None] | None = None
    try:
        connection.mux.register(token, waiter)
        if ctx is not None:
            remove = ctx.on_end(waiter.signal.set)
        waiter.send(connection, inbox, block, payload, deadline, ctx)
        answered = waiter.signal.wait(deadline)
        if waiter.item is None:
            _give_up(connection, waiter, subject, timeout, ctx, answered)
    finally:
        # A Ctrl-C may come at any call: this one, into C, is made before the next signal is looked for.
        connection.mux.waiters.pop(token, None)
        if remove is not None:
            remove()
        connection.mux.late += waiter.late
    assert waiter.item is not None
    return _reply(connection, inbox, waiter.item, subject)


def open_for(connection: Connection, subject: bytes, deadline: Deadline, ctx: Context | None) -> None:
    """Have the connection open for a request on the subject; raises RequestTimeout at the deadline.

    As soon as ctx ends, raises what ctx.check() does.
    """
    try:
        connection.ensure_open(deadline, ctx)
    except DeadlineExceeded:
        raise
    except TimedOut as error:
        raise _not_sent(subject, error) from error


def _not_sent(subject: bytes, error: TimedOut) -> RequestTimeout:
    return RequestTimeout(f"the request on {_subject.decode(subject)!r} was not sent: {error}", sent=False)


def _give_up(
    connection: Connection, waiter: _Reply, subject: str, timeout: float | None, ctx: Context | None, woken: bool
) -> None:
    """Raise what ended the wait."""
    if waiter.error is not None:
        raise waiter.error
    sent = not connection.withdraw(waiter.frame)
    if ctx is not None and ctx.cancelled:
        ctx.check()
    assert not woken
    raise no_reply(subject, timeout, sent=sent)


def no_reply(subject: str, timeout: float | None, *, sent: bool) -> RequestTimeout:
    """The error of a wait that was in vain. sent: whether the request may have run; else it was taken back."""
    what = "may have run" if sent else "was not sent: there was no link"
    within = "" if timeout is None else f" within {timeout:.4g} s"
    return RequestTimeout(f"no reply on {subject!r}{within}; the request {what}", sent=sent)


def _reply(connection: Connection, inbox: bytes, item: Item, subject: str) -> Message:
    _, block, payload = item
    if is_no_responders(item):
        raise NoRespondersError(subject)
    message = Message.received(inbox, item, connection.publish_answer)
    prefix = connection.options.sentinels.error_prefix
    if payload.startswith(prefix):  # of a stream's responder: it takes any request for that of a plain one
        raise HandlerError(payload[len(prefix) :].decode("utf-8", "replace"), code=service_code(message.headers))
    if block is not None:
        raise_service_error(message)
    return message


def is_no_responders(item: Item) -> bool:
    """Whether it is the server's word that nothing subscribes to the subject."""
    _, block, payload = item
    return block is not None and not payload and _headers.status_of(block) == _NO_RESPONDERS


def raise_service_error(message: Message) -> None:
    """Raise HandlerError if the reply says that its handler failed."""
    text = message.headers.get(ERROR_HEADER)
    if text is None:
        return
    details = _headers.details_of(message.headers)
    if details is None:  # a service that is not natsync's may say more in the payload
        details = message.data or None
    raise HandlerError(text, code=service_code(message.headers), details=details)


def service_code(headers: Headers) -> int | None:
    """The number in Nats-Service-Error-Code, if it is one."""
    code = headers.get(ERROR_CODE_HEADER, "")
    return int(code) if code.isascii() and code.isdigit() and len(code) <= _MOST_DIGITS else None
