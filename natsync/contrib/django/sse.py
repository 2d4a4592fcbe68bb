"""Streaming responses: a stream as server-sent events, or as it is, from a view to the browser and back.

What is written and how the stream ends is natsync.contrib's; here it meets Django: HEAD, the request in hand, ASGI.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.signals import request_finished, request_started
from django.http import HttpRequest, StreamingHttpResponse

from natsync.contrib import sse
from natsync.contrib.body import Body, ChunkSource
from natsync.contrib.presence import client_gone

GZIP = "django.middleware.gzip.GZipMiddleware"


@dataclass
class _Request:
    """The request that this thread serves: its WSGI environ, and the bodies made for it."""

    environ: Mapping[str, Any]
    bodies: list[Body] = field(default_factory=list)


_request: ContextVar[_Request | None] = ContextVar("natsync_request", default=None)


class StreamResponse(StreamingHttpResponse):
    """A response whose body is a natsync stream. Closing it, as every server does in the end, closes the stream.

    Under ASGI it works, and warns: each open one holds a thread of the event loop's executor.
    """

    def __init__(self, body: Any, **options: Any) -> None:
        super().__init__(body, **options)
        if GZIP in getattr(settings, "MIDDLEWARE", ()):  # which may keep small chunks back until there are more
            self.headers.setdefault("Content-Encoding", "identity")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """What Django's ASGI handler iterates; Django's own would collect the whole stream first."""
        warnings.warn(
            f"{type(self).__name__} under ASGI holds a thread of the event loop's executor as long as it is open; "
            "serve it over WSGI with threads",
            RuntimeWarning,
            stacklevel=2,
        )
        parts = iter(self)
        following = sync_to_async(lambda: next(parts, None), thread_sensitive=False)
        try:
            while (part := await following()) is not None:
                yield part
        finally:  # the browser has left: wakes the thread that waits for the next chunk
            for close in self._resource_closers:
                close()


def sse_response(
    stream: ChunkSource,
    heartbeat: float | None = sse.HEARTBEAT_SECONDS,
    event: str | None = None,
    *,
    request: HttpRequest | None = None,
    end: str | None = "end",
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> StreamResponse:
    """The chunks of a stream as server-sent events, for a browser's EventSource.

    Returns at once. The stream is the response's from here on: it is closed, which cancels its handler, when the
    browser has left, when the server is done, when anything goes wrong, and at once for HEAD. A browser that leaves is
    noticed by the next write, which a heartbeat brings about; sooner, within half a second, where the server lets its
    socket be looked at (runserver does not, gunicorn does).

    Args:
        stream: of Client.stream(), subscribe() without a callback, or request_many(), or the map() of one; chunks are
            bytes, text, natsync.contrib.sse.Event, or messages, for their data.
        heartbeat: seconds without an event after which a comment is sent; None = never.
        event: the type of the events; None is "message".
        request: the view's. Where it is not given, that which Django serves in this thread.
        end: the type of the event at the end of a complete stream; None sends none.
        status, headers: of the response.

    Raises:
        InvalidArgument, TypeError: an argument cannot be used; the stream is closed.
    """
    environ = _environ_of(request)
    body: Body = sse.EventBody(stream, heartbeat=heartbeat, event=event, end=end, gone=client_gone(environ))
    own = {**sse.HEADERS, **(headers or {})}
    return _respond(body, environ, content_type=sse.MIMETYPE, status=status, headers=own)


def stream_response(
    stream: ChunkSource,
    content_type: str = "application/octet-stream",
    *,
    request: HttpRequest | None = None,
    prefetch: bool = True,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> StreamResponse:
    """The chunks of a stream, bytes or text, as the body of a response; else as sse_response().

    A stream that fails breaks the response off, so that nobody takes it for complete. There is no heartbeat: where the
    client's socket cannot be looked at, the next chunk finds out that it has left.

    With prefetch it blocks until the first chunk is there, and raises what goes wrong until then, so that the response
    can still say so by its status.
    """
    environ = _environ_of(request)
    body = Body(stream, gone=client_gone(environ))
    own = {"X-Accel-Buffering": "no", **(headers or {})}
    if prefetch and environ.get("REQUEST_METHOD") != "HEAD":
        body.prefetch()
    return _respond(body, environ, content_type=content_type, status=status, headers=own)


def _respond(body: Body, environ: Mapping[str, Any], **options: Any) -> StreamResponse:
    if (current := _request.get()) is not None:
        current.bodies.append(body)
    try:
        content: Any = body
        if environ.get("REQUEST_METHOD") == "HEAD":  # servers iterate it all the same, and throw it away
            body.close()
            content = ()
        return StreamResponse(content, **options)
    except BaseException:
        body.close()
        raise


def _environ_of(request: HttpRequest | None) -> Mapping[str, Any]:
    """The WSGI environ; of an ASGI request what is like it, without a socket."""
    if request is not None:
        return {**request.META, "REQUEST_METHOD": request.method}
    current = _request.get()
    return {} if current is None else current.environ


def _begin(*, environ: Mapping[str, Any] | None = None, scope: Mapping[str, Any] | None = None, **_: Any) -> None:
    if environ is None:
        environ = {} if scope is None else {"REQUEST_METHOD": scope.get("method")}
    _request.set(_Request(environ))


def _finish(**_: Any) -> None:
    """The response is closed: so is the body of one that the view has made and not returned, because it raised."""
    current = _request.get()
    _request.set(None)
    for body in () if current is None else current.bodies:
        body.close()


request_started.connect(_begin, dispatch_uid="natsync")
request_finished.connect(_finish, dispatch_uid="natsync")
