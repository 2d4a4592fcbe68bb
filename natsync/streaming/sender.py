"""What a handler sends with, from any of its threads, and what is common to the senders of both modes.

SenderCore is held by the control inbox (which hears of cancels and vanished requesters) and by the handler's runner;
users hold a ResponseSender. The lock orders the sends of one stream and is never held while waiting for anything but
the stream's own credit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any, Protocol

from natsync import headers as _headers
from natsync.concurrency import Deadline, Finishing, Happening, at_home, check_timeout, fork_generation, run_soon
from natsync.connection import Connection
from natsync.context import Context
from natsync.errors import (
    Cancelled,
    ClientLost,
    Code,
    DeadlineExceeded,
    ForkError,
    InvalidArgument,
    StreamCancelled,
    StreamClosed,
    StreamError,
)
from natsync.headers import Headers
from natsync.message import Payload, to_bytes
from natsync.mux import Mux, Waiter
from natsync.streaming import frames, terms
from natsync.streaming.frames import Op
from natsync.streaming.terms import Status
from natsync.streaming.window import GIVEN_BYTES, Outgoing

log = logging.getLogger("natsync.streaming")

_FAILED = Status(Code.UNKNOWN)
_NO_DEADLINE = Deadline()
_BYTES_ALONE = {bytes}


@dataclass(frozen=True)
class Ending:
    """How a stream is to be ended at its requester. op: END, ERROR or REFUSED; text: of an error."""

    op: bytes
    text: str = ""
    status: Status = _FAILED
    trailers: Headers | None = None


class SenderWatch(Protocol):
    """Who is told of a response."""

    def begun(self) -> None:
        """The first chunk was queued; in the thread that sends it."""


class SenderCore(Waiter):
    """One response stream: open, then closed for one reason.

    Attributes:
        ctx: the request's; it ends with the stream, unless that is ended as complete.
        over: that the stream is.
        subject: of the request.
        watch: who is told of the response, if anybody.
        mode: "framed" or "plain".
        lock: orders what is sent.
    """

    mode: str

    def __init__(self, connection: Connection, control: Mux, reply: bytes, ctx: Context, subject: str) -> None:
        self.ctx = ctx
        self.over = Happening()
        self.subject = subject
        self.watch: SenderWatch | None = None
        self._connection = connection
        self._control = control
        self._reply = reply
        self.lock = threading.Lock()
        self._error: Exception | None = None
        self._ended = False
        self._headers: Headers | None = None
        self._ending: Ending | None = None  # what is sent at the end, if anything; of use once that is due
        self._due = False
        self._finishing = Finishing(self.lock)
        self._generation = fork_generation()
        self._callbacks: list[Callable[[], object]] = []
        self._internal: list[Callable[[], object]] = []
        self._token, self._inbox = control.address()
        self._stop_watching: Callable[[], None] = lambda: None  # until on_end() returns, which may call at once

    def open(self) -> None:
        """From here on control messages arrive, and the end of the context ends the stream."""
        self._control.register(self._token, self)
        self._stop_watching = self.ctx.on_end(self._context_ended)

    def accept(self) -> None:
        """The handler is about to run."""

    @property
    def count(self) -> int:
        """Chunks queued."""
        raise NotImplementedError

    @property
    def queued_bytes(self) -> int:
        """Bytes of the chunks queued."""
        raise NotImplementedError

    @property
    def direct(self) -> Outgoing | None:
        """Where ResponseSender.send() may give small chunks by itself; then it calls gave()."""
        return None

    def see_to_it(self) -> None:
        """There is something to be sent, or more of it than is left to the writer."""
        raise NotImplementedError

    def gave(self) -> bool:
        """Look after the chunk that this thread has given; False if it was not taken, for another one sends too."""
        raise NotImplementedError

    @property
    def ends_empty(self) -> bool:
        """Whether an empty message ends the stream."""
        return False

    @property
    def state(self) -> str:
        """How an open stream does, in a word or two; see OpenStream."""
        return "open" if self._connection.linked else "no link"

    @property
    def ended(self) -> bool:
        """Whether it was ended as complete."""
        return self._ended

    @property
    def error(self) -> Exception | None:
        """Why it is over; None while it is not."""
        return self._error

    @property
    def cut_short(self) -> bool:
        """Whether it is over, but a Ctrl-C has kept somebody from being told: the next to end it goes on with that."""
        return self._due and self._finishing.cut_short

    @property
    def outcome(self) -> str:
        """How a stream that is over counts: processed (it ended by its END), cancelled by the requester, or failed."""
        if self._ended:
            return "processed"
        return "cancelled" if isinstance(self._error, StreamCancelled | ClientLost) else "failed"

    # -- sending -----------------------------------------------------------------------------------------------

    def send(self, data: bytes, deadline: Deadline) -> int:
        """Queue one chunk; waits for room. Returns its number."""
        raise NotImplementedError

    def try_send(self, data: bytes) -> bool:
        """Queue one chunk if there is room now."""
        raise NotImplementedError

    def send_many(self, chunks: list[bytes], deadline: Deadline) -> int:
        """Queue chunks behind each other, so that they leave in as few writes as possible; the last one's number."""
        raise NotImplementedError

    def settle(self, deadline: Deadline) -> bool:
        """Block until the other side surely has everything, the END included; False if that cannot be known."""
        raise NotImplementedError

    def set_header(self, key: str, value: str) -> None:
        terms.check_key(key)
        with self.lock:
            if self.count:
                raise InvalidArgument("headers go with the first chunk, which has been sent")
            headers = self._headers or Headers()
            headers[key] = value
            self._headers = headers

    def _begun(self) -> None:
        if self.watch is not None:
            self.watch.begun()

    def _closed_error(self) -> Exception:
        error = self._error
        assert error is not None
        if isinstance(error, StreamClosed):
            error = type(error)(error.message, code=error.code, last_seq=self.count)
        return error

    # -- ending ------------------------------------------------------------------------------------------------

    def end(self, trailers: Headers | None = None) -> bool:
        """Send END, once; False if the stream was over for another reason."""
        self._heed_context()
        self._close(StreamClosed("the stream was ended", code=Code.OK), Ending(Op.END, trailers=trailers))
        return self._ended

    def fail(self, text: str, status: Status = _FAILED, error: StreamClosed | None = None) -> bool:
        """Send an error, which ends the stream; False if it was over already. error: what later sends raise here."""
        self._heed_context()
        closed = error or StreamClosed(f"the stream was ended with an error: {text}")
        return self._close(closed, Ending(Op.ERROR, text, status))

    def _heed_context(self) -> None:
        """If the context has ended that is the reason, whatever a handler does that saw it before this was told."""
        if self._error is None and self.ctx.cancelled:
            self._context_ended()

    def refuse(self, text: str, status: Status) -> None:
        """Tell the requester that no part of its request was taken; instead of accept()."""
        closed = StreamClosed(f"the request was refused: {text}")
        self._close(closed, Ending(Op.REFUSED, text, status))

    def _close(self, error: Exception, ending: Ending | None) -> bool:
        """End for this reason, unless there is one already. ending: what is sent; None = there is nobody to tell."""
        if self._generation != fork_generation():
            return False  # in a child that a handler forked: the stream is the parent's
        ended = isinstance(error, StreamError) and error.code == Code.OK
        finishing, mine = self._finishing, object()
        try:
            with self.lock:
                first = self._error is None
                if first:
                    self._closing_locked(ending is not None)
                    # No call from here on, so that a Ctrl-C finds the stream either open or about to end.
                    self._ended, self._error, self._ending, self._due = ended, error, ending, True
                    finishing.claim = mine
            # From here on nobody sends: every chunk that was sent is queued, and the end goes behind it.
            if first or self.cut_short:
                finishing.run(self._finish, mine)
        finally:
            if finishing.claim is mine:  # a Ctrl-C before that
                finishing.claim = None
        return first

    def _finish(self) -> None:
        """Tell everybody that the stream is over. Its slot is free before the end is queued."""
        self.over.set()
        self._stop_watching()
        if not self._ended:
            kind = DeadlineExceeded if isinstance(self._error, DeadlineExceeded) else Cancelled
            self.ctx.cancel_soon(kind(str(self._error)))
        while self._internal:
            self._internal[0]()
            del self._internal[0]  # behind it: see Finishing
        if self._ending is None:
            self._forget()
        else:
            self._put_end(self._ending)
        self._wake_senders()
        for _ in range(len(self._callbacks)):
            self._run_user(self._call_next)

    def _closing_locked(self, due: bool) -> None:
        """It is over. due: something is still to be sent, and closing must wait for it. Requires _lock."""

    def _call_next(self) -> None:
        """Call one of the user's callbacks: each once, however often this is called."""
        try:
            callback = self._callbacks.pop(0)
        except IndexError:
            return
        callback()

    def _put_end(self, ending: Ending) -> None:
        """Send what ends the stream, behind everything that was sent; once, though it may be called again."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Nothing more is to be sent or heard."""
        self._control.unregister(self._token)

    def _wake_senders(self) -> None:
        """Have those who wait in send() look again."""
        raise NotImplementedError

    def _run_user(self, callback: Callable[[], object]) -> None:
        if not self._connection.dispatcher.workers.submit(callback):
            run_soon(callback, "an on_close callback")

    def on_close(self, callback: Callable[[], object]) -> None:
        """Have the user's callback() run on a worker when the stream is over, however."""
        with self.lock:
            if self._error is None:
                self._callbacks.append(callback)
                return
        self._run_user(callback)

    def when_closed(self, callback: Callable[[], object]) -> None:
        """on_close() for the library's own brief functions: in whichever thread ends it, before the END is sent.

        After a Ctrl-C in it callback() may be called again.
        """
        with self.lock:
            if self._error is None:
                self._internal.append(callback)
                return
        callback()

    # -- the reader, the timer, the supervisor ---------------------------------------------------------------------

    def publish_denied(self, subject: bytes, error: Exception) -> None:
        if subject == self._reply:
            advice = "a responder's user needs allow_responses with max: -1 (one answer is the default)"
            self._close(StreamClosed(f"{error}; {advice}", code=Code.PERMISSION_DENIED), None)
            self._forget()

    def connection_closing(self) -> None:
        self.fail("the responder is closing", self._lost())

    def connection_closed(self, reason: Exception) -> None:
        self._close(StreamClosed(str(reason), code=Code.UNAVAILABLE), None)
        self._forget()

    @staticmethod
    def _cancelled_by(payload: bytes) -> StreamClosed | None:
        """The error that a requester's cancel means here; None if the control payload is no cancel."""
        reason = frames.decode_cancel(payload)
        if reason is None:
            return None
        if frames.cancel_code(payload) == Code.DEADLINE_EXCEEDED:
            return DeadlineExceeded("the request's deadline has passed")
        return StreamCancelled(reason)

    def _context_ended(self) -> None:
        error = self.ctx.error()
        if isinstance(error, DeadlineExceeded):
            ending = Ending(Op.ERROR, "deadline exceeded", Status(Code.DEADLINE_EXCEEDED, reason=terms.DEADLINE))
            self._close(DeadlineExceeded("the request's deadline has passed"), ending)
        else:
            self._close(StreamCancelled(str(error)), Ending(Op.ERROR, str(error), self._lost()))

    def _lost(self) -> Status:
        """The stream breaks off here, and may be taken up again elsewhere."""
        return Status(Code.UNAVAILABLE, reason=terms.LOST, sent=self.count)

    def dropped(self) -> None:
        """The handler let go of its sender without ending the stream."""
        if self.fail("the handler dropped its sender without ending the stream", Status(Code.INTERNAL)):
            log.error("a handler of %r dropped its sender without end(): the requester got an error", self.subject)


class ResponseSender:
    """What a handler sends the pieces of its answer with.

    Safe from any number of threads: a chunk is never torn, and the end comes behind every chunk whose send() had
    returned. Once the stream is over, for whatever reason, `closed` is set and sending raises StreamClosed or one of
    its kinds: ClientLost, StreamCancelled, DeadlineExceeded. A sender that is dropped without an end is ended with an
    error when it is collected.
    """

    def __init__(self, core: SenderCore) -> None:
        self._core = core
        self._lock = core.lock
        self._direct = core.direct
        self._generation = fork_generation()
        self._home = at_home[0]

    def send(self, data: Payload, *, timeout: float | None = None) -> int:
        """Queue one chunk and return its number, from 1 up.

        In framed mode, which is that of natsync requesters, blocks while the requester gives no credit: it is slow, or
        not heard from; in plain mode while the link to the server is far behind. Up to timeout seconds (None = no
        limit: whatever ends the stream ends the wait). A chunk may be larger than max_payload in framed mode; it is
        committed at its first fragment.

        Raises:
            StreamClosed: the stream is over; the kind and text say why: ClientLost, StreamCancelled, DeadlineExceeded.
            TimedOut: there was no room in time; the chunk was not queued.
            InvalidArgument: plain mode only: the payload equals the end sentinel or starts with the error sentinel.
            MaxPayloadExceeded: it is larger than the requester (plain mode: the server) takes.
            TypeError: it is neither bytes-like nor str.
        """
        if at_home[0] != self._home:
            self._check_process()
        if type(data) is not bytes:
            data = to_bytes(data)
        out = self._direct
        if out is not None:
            # What happens to nearly every chunk, in as few steps as can be, see Outgoing; any other goes the long way.
            size = len(data)
            if get_ident() == out.giver:
                number, number_bytes = out.number + 1, out.number_bytes + size
                if size <= GIVEN_BYTES and number <= out.limit and number_bytes <= out.limit_bytes:
                    out.number, out.number_bytes = number, number_bytes
                    out.given.append(data)
                    if number < out.look_at or self._core.gave():
                        return number
            elif out.allowed:
                with self._lock:
                    fits = size <= out.free and size <= out.fragment_bytes and len(out.kept) < out.allowed
                    if fits:
                        out.kept.append(data)
                        out.free -= size
                        out.count = number = out.count + 1
                        if number < out.watch_at:
                            return number
                if fits:
                    self._core.see_to_it()
                    return number
        return self._core.send(data, _NO_DEADLINE if timeout is None else Deadline.after(check_timeout(timeout)))

    def try_send(self, data: Payload) -> bool:
        """Queue one chunk if that needs no waiting; False if there is no credit now. Raises as send() does."""
        self._check_process()
        return self._core.try_send(to_bytes(data))

    def send_many(self, chunks: Iterable[Payload], *, timeout: float | None = None) -> int:
        """Queue several chunks in order, to leave together; the number of the last. Blocks and raises as send() does.

        The iterable is used up and every chunk checked before the first is queued.
        """
        self._check_process()
        deadline = Deadline.after(check_timeout(timeout))
        given: list[Any] = list(chunks)
        if set(map(type, given)) != _BYTES_ALONE:  # which a call for each would take ten times as long to find out
            given = [to_bytes(chunk) for chunk in given]
        return self._core.send_many(given, deadline)

    def send_error(self, error: BaseException | str, *, code: int | None = None, details: Any = None) -> None:
        """End the stream with an error; the requester's iterator raises it. No effect on a stream that is over.

        code is one of natsync.Code (gRPC's numbers); code and details reach natsync requesters only.
        """
        self._check_process()
        own = error.code if isinstance(error, StreamError) else Code.UNKNOWN
        self._core.fail(describe(error), Status(own if code is None else code, details))

    def end(self, *, wait: float = 0, trailers: _headers.HeaderInput = None) -> bool:
        """End the stream; whether it is complete (False: it was over before, by an error, a cancel or a loss).

        Idempotent. In a `finally` it ends the stream of a failing handler too, as if it were complete: call
        send_error() in an `except` first, or let a generator handler end by itself.

        Does not block, and what was sent is kept and sent again until the requester has it, without a thread. With
        wait, blocks up to that many seconds, and returns True if and only if the requester's process has everything
        (plain mode: the server has). Trailers reach natsync requesters only; for others they are left out.

        Raises:
            MaxPayloadExceeded: the trailers are larger than what the server or the requester takes; nothing was sent,
                and the stream is open.
        """
        self._check_process()
        check_timeout(wait, "wait")
        complete = self._core.end(None if trailers is None else terms.user_headers(trailers))
        return complete and (not wait or self._core.settle(Deadline.after(wait)))

    def set_header(self, key: str, value: str) -> None:
        """Set a header that goes with the first chunk (Stream.headers at the requester).

        Raises:
            InvalidArgument: the first chunk has been sent, the header is malformed, or its name is reserved (Natsync-,
                Nats-).
        """
        self._check_process()
        self._core.set_header(key, value)

    @property
    def closed(self) -> threading.Event:
        """Set when the stream is over: ended, failed, cancelled, the requester gone. Wait on it, do not set it."""
        return self._core.over.event

    def is_closed(self) -> bool:
        """Whether the stream is over: nothing more can be sent."""
        return self._core.over.happened

    @property
    def send_count(self) -> int:
        """Chunks queued so far."""
        return self._core.count

    def on_close(self, callback: Callable[[], object]) -> None:
        """Have callback() run once, on a worker, when the stream is over; soon, if it already is."""
        self._check_process()
        self._core.on_close(callback)

    def _check_process(self) -> None:
        if self._generation != fork_generation():
            raise ForkError("this sender belongs to the parent process")

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is None or self._generation != fork_generation() or (core.over.happened and not core.cut_short):
            return
        core._connection.in_supervisor(core.dropped)  # a finalizer may run anywhere, inside any lock

    def __repr__(self) -> str:
        state = "closed" if self.is_closed() else "open"
        return f"<ResponseSender for {self._core.subject!r}: {state}, {self.send_count} sent>"


def fitting_error(status: Status, text: str, payload: bytes, limit: int) -> tuple[bytes | None, bytes]:
    """Headers and payload of an error's message. What does not fit is left out: details, the text's end, the status."""
    block = terms.encode_status(status, text).encode()
    if len(block) + len(payload) > limit:
        block = terms.encode_status(replace(status, details=None), text).encode()
    if len(block) > limit:
        return None, payload[:limit]
    return block, payload[: limit - len(block)]


def describe(error: BaseException | str) -> str:
    """The text of an error as the other side reads it; its type's name in front where the text alone says nothing."""
    if isinstance(error, str):
        return error
    kind = type(error)
    try:
        text = str(error)
    except Exception:  # a __str__ that raises must not leave the requester waiting
        return kind.__name__
    if text and isinstance(error, _BARE) and kind.__str__ in _BARE_TEXTS:
        return f"{kind.__name__}: {text}"
    return text or kind.__name__


#: Errors whose text is a mere value: a key, an exit status, what a generator returned,
_BARE = KeyError, SystemExit, StopIteration, StopAsyncIteration
#: unless a subclass has a text of its own.
_BARE_TEXTS = KeyError.__str__, BaseException.__str__
