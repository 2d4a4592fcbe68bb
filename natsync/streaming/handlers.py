"""Handlers: the shapes of functions that users register, each turned into one that drives a sender to its end.

What is made of a function is called on a worker thread with (ctx, request, core). guarded() makes it a Runner: whatever
the user's function does, the stream has ended when it returns, unless the function took the sender along to go on in
threads of its own. It returns what the function raised.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from natsync.concurrency import Deadline, check_timeout
from natsync.context import TRACE_HEADERS, Context
from natsync.errors import Cancelled, Code, DeadlineExceeded, HandlerError, StreamClosed, StreamError
from natsync.headers import Headers
from natsync.message import Message, to_bytes
from natsync.streaming.sender import ResponseSender, SenderCore, describe
from natsync.streaming.terms import Status

log = logging.getLogger("natsync.streaming")

Handler: TypeAlias = Callable[..., Any]
Sending: TypeAlias = "Callable[[HandlerContext, Message, SenderCore], None]"
Runner: TypeAlias = "Callable[[HandlerContext, Message, SenderCore], BaseException | None]"

_NO_DEADLINE = Deadline()


class HandlerContext(Context):
    """The context of one request: ends when the requester cancels or is gone, at its deadline, or on shutdown.

    Attributes:
        metadata: the request's headers, but for those of the library and the server.
        attempt: how often the requester had tried before, from 0.
        resume_cursor: how many chunks the requester has of attempts that broke off, to be gone on behind; None for a
            request that starts from the beginning. Comes only from those who ask with Retry(resumable=True).

    Calls of clients made in the handler's thread inherit it: its end ends them, and the headers traceparent, tracestate
    and baggage go along. Pass ctx=Context() to a call that must not end with the request.
    """

    __slots__ = ("_is_draining", "attempt", "metadata", "resume_cursor")

    def __init__(
        self,
        parent: Context,
        *,
        deadline: float | None,
        metadata: Headers,
        attempt: int,
        is_draining: Callable[[], bool],
        resume_cursor: int | None = None,
    ) -> None:
        passed = {key: metadata[key] for key in TRACE_HEADERS if key in metadata} if metadata else None
        super().__init__(parent, deadline=deadline, values={TRACE_HEADERS: passed} if passed else None)
        self.metadata = metadata
        self.attempt = attempt
        self.resume_cursor = resume_cursor
        self._is_draining = is_draining

    @property
    def draining(self) -> bool:
        """Whether the subscriber is shutting down: finish soon, what takes longer will be cancelled."""
        return self._is_draining()


def arguments(function: Handler, allowed: tuple[int, ...], form: str) -> int:
    """How many positional arguments the handler takes.

    Raises:
        TypeError: it cannot be called, or takes none of the allowed numbers; the text shows the form expected.
    """
    if not callable(function):
        raise TypeError(f"a handler is a function {form}, not {type(function).__name__}")
    fitting = _fitting(function, allowed, wrapped=True)
    if not fitting and hasattr(
        function, "__wrapped__"
    ):  # a decorator that takes other arguments than what it decorates
        fitting = _fitting(function, allowed, wrapped=False)
    if not fitting:
        raise TypeError(f"handler {_name(function)} must have the form {form}")
    return min(fitting)


def _fitting(function: Handler, allowed: tuple[int, ...], *, wrapped: bool) -> list[int]:
    """Which of the allowed numbers of arguments it takes. wrapped: as the function that it wraps says, if it does."""
    try:
        parameters = inspect.signature(function, follow_wrapped=wrapped).parameters.values()
    except (TypeError, ValueError):
        return [max(allowed)]
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        return [max(allowed)]
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    required = sum(one.default is one.empty for one in positional)
    if any(one.kind is one.KEYWORD_ONLY and one.default is one.empty for one in parameters):
        return []
    return [count for count in allowed if required <= count <= len(positional)]


def _name(function: Handler) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def stream_runner(function: Handler) -> Sending:
    """For (ctx, request, sender), and for (ctx, request) returning an iterator that is sent and ended."""
    form = "(ctx, request, sender), or (ctx, request) returning an iterator"
    if arguments(function, (2, 3), form) == 3:
        return lambda ctx, request, core: _callback(function, ctx, request, core)
    return lambda ctx, request, core: _send_all(function(ctx, request), core)


def batch_runner(function: Handler) -> Sending:
    """For (ctx, request, sender), and for the pull form (request, index) -> (list of data, more)."""
    form = "(ctx, request, sender), or (request, index) returning (list of data, more)"
    if arguments(function, (2, 3), form) == 3:
        return lambda ctx, request, core: _callback(function, ctx, request, core)
    return lambda ctx, request, core: _pull_batches(function, request, core)


def legacy_runner(function: Handler, pause: float) -> Sending:
    """For the pull form (request, index) -> (data, more); pause: seconds between calls."""
    arguments(function, (2,), "(request, index) returning (data, more)")
    check_timeout(pause, "pause")
    return lambda ctx, request, core: _pull(function, ctx, request, core, pause)


def single_runner(function: Handler) -> Sending:
    """A request/reply handler asked for a stream: its one answer, and the end."""

    def run(ctx: HandlerContext, request: Message, core: SenderCore) -> None:
        reply = reply_bytes(function(ctx, request))
        if reply or not core.ends_empty:  # where the end is the empty message, an empty answer is just the end
            core.send(reply, _NO_DEADLINE)
        core.end()

    return run


def reply_bytes(value: Any) -> bytes:
    """What a request/reply handler returned, as a payload: bytes and str as they are, None empty, the rest JSON."""
    if value is None:
        return b""
    if isinstance(value, bytes | bytearray | memoryview | str):
        return to_bytes(value)
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise TypeError(f"the handler returned {type(value).__name__}, which has no JSON form: {error}") from error


def guarded(run: Sending) -> Runner:
    """Answer whatever the handler raises with an error, and log it unless the stream was over anyway."""

    def guarded(ctx: HandlerContext, request: Message, core: SenderCore) -> BaseException | None:
        try:
            run(ctx, request, core)
            return None
        except BaseException as error:  # SystemExit in a handler must not leave its requester waiting
            if core.over.happened or not core.fail(describe(error), Status(code_of(error), details_of(error))):
                log.debug("handler of %r stopped after its stream was over: %r", request.subject, error)
                return error
            log_raised(request, error)
            return error

    return guarded


def log_raised(request: Message, error: BaseException) -> None:
    """Say that a handler raised: with its traceback, unless it did so to answer with an error."""
    if isinstance(error, HandlerError):
        log.warning("handler of %r answered with an error: %s", request.subject, error)
    else:
        log.error("handler of %r raised", request.subject, exc_info=error)


def code_of(error: BaseException) -> int:
    """The status code that says best how a handler failed."""
    if isinstance(error, StreamError) and isinstance(error.code, int):
        return error.code
    if isinstance(error, DeadlineExceeded | TimeoutError):
        return Code.DEADLINE_EXCEEDED
    return Code.CANCELLED if isinstance(error, Cancelled) else Code.UNKNOWN


def details_of(error: BaseException) -> Any:
    """The details that a handler gave with its error; those of other libraries' errors are not the requester's."""
    return error.details if isinstance(error, StreamError) else None


def _callback(function: Handler, ctx: HandlerContext, request: Message, core: SenderCore) -> None:
    # The sender must not be held any longer: whether the handler kept it is what decides over a stream without an end.
    sender = ResponseSender(core)
    result = function(ctx, request, sender)
    if isinstance(result, Iterator):  # a generator function that was given a sender all the same
        _send_all(result, core, sender)


def _send_all(result: Any, core: SenderCore, given: ResponseSender | None = None) -> None:
    """Send what a handler returned and end the stream; a generator is closed here, in the thread that ran it.

    given: what it may send with by itself too.
    """
    if result is None:
        core.end()
        return
    if isinstance(result, bytes | bytearray | memoryview | str):
        core.send(to_bytes(result), _NO_DEADLINE)
        core.end()
        return
    if not isinstance(result, Iterable) or isinstance(result, Mapping):  # of one, only the keys would be sent
        kind = type(result).__name__
        raise TypeError(f"the handler returned {kind}, not an iterator of chunks; for JSON, yield json.dumps(value)")
    iterator, sender = iter(result), given or ResponseSender(core)  # held until the end: a dropped one ends the stream
    try:
        send = sender.send
        for chunk in iterator:
            try:
                send(chunk)
            except StreamClosed:
                break  # no error of the handler
            except TypeError:
                if isinstance(chunk, bytes | bytearray | memoryview | str):
                    raise  # of a middleware's
                kind = type(chunk).__name__
                raise TypeError(
                    f"a chunk is bytes-like or str, not {kind}; for JSON, yield json.dumps(value)"
                ) from None
    finally:
        close = getattr(iterator, "close", None)
        if callable(close):
            close()
    core.end()


def _sent(core: SenderCore, chunk: Any) -> bool:
    """Send one chunk; False if the stream is over, which is no error of the handler."""
    try:
        core.send(to_bytes(chunk), _NO_DEADLINE)
    except StreamClosed:
        return False
    return True


def _pull_batches(function: Handler, request: Message, core: SenderCore) -> None:
    index, more = 0, True
    while more and not core.over.happened:
        batch, more = _pair(function(request, index))
        chunks = [to_bytes(one) for one in batch or () if one]
        try:
            core.send_many(chunks, _NO_DEADLINE)
        except StreamClosed:
            return
        index += 1
    core.end()


def _pull(function: Handler, ctx: HandlerContext, request: Message, core: SenderCore, pause: float) -> None:
    index, more = 0, True
    while more and not core.over.happened:
        data, more = _pair(function(request, index))
        if data and not _sent(core, data):
            return
        index += 1
        if more and pause:
            ctx.wait(pause)
    core.end()


def _pair(result: Any) -> tuple[Any, bool]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"a pull handler returns (data, more), not {result!r:.60}")
    return result[0], bool(result[1])
