"""Flask: one client for each process of the application, streams as responses, errors as JSON. Extra `flask`.

    nats = NatSync(app)  # or NatSync(), and nats.init_app(app) in the application factory

    @app.get("/chat")
    def chat():
        return sse_response(nats.stream("llm.chat", request.args["q"], timeout=60))

Configuration: NATSYNC_URL (a URL, several with commas, a list; NATS_URL or localhost if it is missing or None), any
option of natsync.Client in capitals behind NATSYNC_ (NATSYNC_NAME, NATSYNC_CREDENTIALS, NATSYNC_RESUME_GRACE …), and
NATSYNC_JSON_ERRORS (True), whether errors of natsync that leave a view become JSON.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

try:
    import flask
except ModuleNotFoundError as missing:
    if missing.name != "flask":
        raise
    raise ImportError('natsync.contrib.flask needs Flask: pip install "natsync[flask]"') from None

from natsync.client import STREAM_WINDOW, Client
from natsync.context import Context
from natsync.contrib import sse
from natsync.contrib._flask_commands import commands
from natsync.contrib.body import Body, ChunkSource
from natsync.contrib.failures import error_data, http_headers, http_status
from natsync.contrib.presence import client_gone
from natsync.contrib.sse import Event
from natsync.errors import InvalidArgument, InvalidURL, NatsError
from natsync.headers import HeaderInput
from natsync.message import MISSING, Payload
from natsync.options import ConnectOptions, Options, Unpack, parse_servers
from natsync.retry import RetryPolicy
from natsync.streaming.stream import Stream

__all__ = ["Event", "NatSync", "error_response", "sse_response", "stream_response"]

EXTENSION = "natsync"
PREFIX = "NATSYNC_"
#: Keys behind the prefix that are not options of the client.
_OWN_KEYS = ("URL", "JSON_ERRORS")
_STREAMS = "_natsync_streams"
#: Why a stream of NatSync.stream() is cancelled; also who wrote Response(nats.stream(…)) reads it.
_REQUEST_ENDED = (
    "the request ended; give nats.stream() to sse_response() or stream_response(), or use nats.client.stream()"
)


class NatSync:
    """The extension: a client for each application and process, opened at its first use.

    One object may serve several applications, each with a client of its own. Making it, and init_app(), open no socket
    and start no thread, so that gunicorn's --preload and the like may do it before they fork.

    Args:
        app: calls init_app(app).
        options: options of natsync.Client where an application's configuration does not say otherwise, and for
            which a configuration is no place: hooks, on_event.
    """

    def __init__(self, app: flask.Flask | None = None, **options: Unpack[Options]) -> None:
        self._options = options
        self._apps: weakref.WeakSet[flask.Flask] = weakref.WeakSet()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: flask.Flask) -> None:
        """Read the application's configuration, make its client, register error handler, commands and teardown.

        Raises:
            InvalidArgument, InvalidURL, TypeError: the configuration cannot be used; the text names the key, or the
                option that it is for, and shows no credentials.
            RuntimeError: the application has been given to a NatSync already.
        """
        if EXTENSION in app.extensions:
            raise RuntimeError(f"{app.name!r} has this extension already: init_app() once for each application")
        json_errors = app.config.get(PREFIX + "JSON_ERRORS", True)
        if not isinstance(json_errors, bool):
            raise TypeError(f"{PREFIX}JSON_ERRORS is True or False, not {type(json_errors).__name__}")
        options: dict[str, Any] = {**self._options, **_configured(app.config)}
        app.extensions[EXTENSION] = Client(_servers(app.config), **options)
        self._apps.add(app)
        app.cli.add_command(commands)
        app.teardown_request(_close_streams)
        if json_errors:
            app.register_error_handler(NatsError, _answer_error)

    @property
    def client(self) -> Client:
        """The client of the current application, or of the only one where there is no current one (in a thread).

        Raises:
            RuntimeError: there is no application, or several and none is current.
        """
        current = flask.current_app
        if current and EXTENSION in current.extensions:
            return current.extensions[EXTENSION]  # type: ignore[no-any-return]
        apps = list(self._apps)
        if len(apps) != 1:
            raise RuntimeError(f"no application of {len(apps)} is current; use `with app.app_context():` around this")
        return apps[0].extensions[EXTENSION]  # type: ignore[no-any-return]

    def stream(
        self,
        subject: str,
        payload: Payload = b"",
        *,
        json: Any = MISSING,
        headers: HeaderInput = None,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        window: int = STREAM_WINDOW,
        retry: RetryPolicy = None,
        ctx: Context | None = None,
    ) -> Stream:
        """client.stream() for a view: cancelled at the end of the request unless a response has taken it over.

        sse_response() and stream_response() take it over, and nothing else: a response of one's own is iterated when
        the request has ended, and is for nats.client.stream().
        So nothing is left behind where the view raises, even if a debugger keeps its frame. Does not wait. Raises
        as client.stream() does.

        Raises:
            RuntimeError: there is no request.
        """
        flask.request.environ  # noqa: B018 (Flask's own error, before anything is sent)
        stream = self.client.stream(
            subject,
            payload,
            json=json,
            headers=headers,
            timeout=timeout,
            idle_timeout=idle_timeout,
            window=window,
            retry=retry,
            ctx=ctx,
        )
        flask.g.setdefault(_STREAMS, []).append(stream)
        return stream


def sse_response(
    stream: ChunkSource,
    heartbeat: float | None = sse.HEARTBEAT_SECONDS,
    event: str | None = None,
    *,
    end: str | None = "end",
    look: bool = True,
    describe: Callable[[BaseException], dict[str, Any]] = error_data,
) -> flask.Response:
    """Server-sent events: each chunk of the stream (bytes, text, or an Event from stream.map()) is one event.

    A subscription without a callback, or replies, will do as well: of a message it is the data, unless map() says else.
    Returns at once; the chunks are waited for while the server iterates the response, on its thread. The response owns
    the stream: when the browser leaves, the stream is closed, which cancels the handler, within half a second where the
    server shows the client's socket (Werkzeug, gunicorn, uWSGI; waitress with channel_request_lookahead), else at the
    second heartbeat that cannot be written (three in waitress). A HEAD request closes it here.

    Args:
        heartbeat: seconds without an event after which a comment is sent; None = never.
        event: the events' type; None is "message".
        end: the type of an event with empty data when the stream is complete; None sends none.
        look: whether to look at the client's socket while waiting.
        describe: makes the data of the `error` event with which a stream ends that failed, as JSON: a dict of `code`,
            `error`, `message`, see natsync.contrib.failures.error_data().

    Raises:
        InvalidArgument, TypeError: an argument cannot be used; the stream is closed.
    """
    body = sse.EventBody(
        stream,
        heartbeat=heartbeat,
        event=event,
        end=end,
        gone=client_gone(flask.request.environ) if look else None,
        describe=describe,
    )
    return _response(stream, body, sse.MIMETYPE, sse.HEADERS)


def stream_response(
    stream: ChunkSource,
    mimetype: str = "application/octet-stream",
    *,
    prefetch: bool = True,
    look: bool = True,
) -> flask.Response:
    """The chunks of the stream (bytes or text) as they come, as the body of a response, with nothing between them.

    With prefetch it blocks until the first chunk is there, and raises what went wrong until then, so that the response
    can still say so by its status. A stream that fails later breaks the response off: with HTTP/1.1 the client sees
    that it is not complete. Closing is as for sse_response(), but that there is no heartbeat.

    Raises:
        TypeError: stream is none; and with prefetch what iterating Client.stream() raises. The stream is closed.
    """
    body = Body(stream, gone=client_gone(flask.request.environ) if look else None)
    if prefetch and flask.request.method != "HEAD":
        body.prefetch()
    return _response(stream, body, mimetype, {"X-Accel-Buffering": "no"})


def error_response(error: NatsError) -> flask.Response:
    """The error as a JSON response; what views raise becomes one by itself, unless NATSYNC_JSON_ERRORS is False.

    A timeout is 504; nobody who answers, a lost link or responder 503; a refusal 503 with Retry-After; permissions and
    credentials that NATS does not accept 502; a handler's error what its code says, else 500. See
    natsync.contrib.failures for all of it, and for what the text says.
    """
    response = flask.jsonify(error_data(error))
    response.status_code = http_status(error)
    response.headers.update(http_headers(error))
    return response


def _response(stream: ChunkSource, body: Body, mimetype: str, headers: Mapping[str, str]) -> flask.Response:
    if flask.request.method == "HEAD":
        body.close()  # Werkzeug drops the body of such a response without a word to it
        return flask.current_app.response_class(mimetype=mimetype, headers=headers)
    _take_over(stream)
    response = flask.current_app.response_class(body, mimetype=mimetype, headers=headers)
    response.call_on_close(body.close)
    return response


# -- inside ------------------------------------------------------------------------------------------------------------


def _servers(config: Mapping[str, Any]) -> Any:
    """The servers that an application's configuration names, None where it leaves that to the environment."""
    servers = config.get(PREFIX + "URL")
    try:
        parse_servers(servers)
    except (InvalidURL, TypeError) as error:
        where = "the environment variable NATS_URL" if servers is None else f"{PREFIX}URL"
        raise type(error)(f"{where}: {error}") from None
    return servers


def _configured(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a client that an application's configuration names."""
    known = {PREFIX + field.name.upper(): field.name for field in fields(ConnectOptions)}
    given = {key for key in config if key.startswith(PREFIX)} - {PREFIX + key for key in _OWN_KEYS}
    unknown = sorted(given - set(known))
    if unknown:
        raise InvalidArgument(
            f"unknown configuration {', '.join(unknown)}: options of natsync.Client in capitals behind {PREFIX}"
        )
    return {known[key]: config[key] for key in given}


def _take_over(stream: Any) -> None:
    """A response owns the stream from here on, which may be what map() made of it."""
    opened: list[Any] = flask.g.get(_STREAMS, [])
    while stream is not None:
        opened[:] = [one for one in opened if one is not stream]
        stream = getattr(stream, "_stream", None)


def _close_streams(error: BaseException | None) -> None:
    """At the end of a request: cancel what no response has taken over."""
    for stream in flask.g.pop(_STREAMS, []):
        stream.cancel(_REQUEST_ENDED)


def _answer_error(error: NatsError) -> flask.Response:
    if isinstance(error, InvalidArgument):
        raise error  # a mistake in the view: Flask's debugger, log and tests are to see it
    flask.current_app.logger.warning(
        "%s %s: %s: %s", flask.request.method, flask.request.path, type(error).__name__, error
    )
    return error_response(error)
