"""natsync.contrib.flask: in Flask's test client, against a real nats-server."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import flask
import pytest

import natsync
from eventsource import parse
from natsync.contrib.flask import Event, NatSync, sse_response, stream_response
from natsync.testing import NatsServer, eventually
from support import run_python

PATIENCE = 10.0


class Handlers:
    """What answers the views, and what became of the stream `f.hold`."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.left = threading.Event()


@pytest.fixture
def handlers(nats_server: NatsServer) -> Iterator[Handlers]:
    state = Handlers()
    subscriber = natsync.Subscriber(nats_server.url)
    release = threading.Event()

    @subscriber.handler("fl.echo")
    def echo(ctx: natsync.Context, request: natsync.Message) -> bytes:
        return request.data

    @subscriber.handler("fl.late")
    def late(ctx: natsync.Context, request: natsync.Message) -> None:
        release.wait(PATIENCE)

    @subscriber.handler("fl.broken")
    def broken(ctx: natsync.Context, request: natsync.Message) -> None:
        raise ValueError("out of paper")

    @subscriber.stream("fl.count")
    def count(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        for number in range(int(request.data or b"3")):
            yield b"%d" % number

    @subscriber.stream("fl.hold")
    def hold(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.send("first")
        state.begun.set()
        sender.closed.wait(PATIENCE)
        state.left.set()

    with subscriber:
        yield state
        release.set()


nats = NatSync()  # one for every application of this module, as in a package with an application factory


def create_app(url: str, **config: Any) -> flask.Flask:
    """The application factory."""
    app = flask.Flask(__name__)
    app.config.from_mapping(NATSYNC_URL=url, **config)
    nats.init_app(app)
    app.register_blueprint(views, url_prefix="/api")
    return app


views = flask.Blueprint("views", __name__)


@views.get("/echo/<text>")
def echo(text: str) -> bytes:
    return nats.client.request("fl.echo", text).data


@views.get("/ask/<subject>")
def ask(subject: str) -> bytes:
    return nats.client.request(subject, timeout=float(flask.request.args.get("timeout", PATIENCE))).data


@views.get("/events/<subject>")
def events(subject: str) -> flask.Response:
    return sse_response(nats.stream(subject, flask.request.args.get("q", "")), event=flask.request.args.get("event"))


@views.get("/plain/<subject>")
def plain(subject: str) -> flask.Response:
    return stream_response(nats.stream(subject).map(lambda chunk: chunk + b"\n"), "text/plain")


@views.get("/raises")
def raises() -> flask.Response:
    stream = nats.stream("fl.hold")
    kept.append(stream)  # as a debugger keeps the frame
    raise RuntimeError("the view has a bug")


@views.get("/raises-late")
def raises_late() -> flask.Response:
    sse_response(nats.client.stream("fl.hold"))
    raise natsync.NoRespondersError("x")


@views.get("/forgets")
def forgets() -> str:
    kept.append(nats.stream("fl.hold"))
    return "done"


@views.get("/own-response")
def own_response() -> flask.Response:
    stream = nats.stream("fl.count")
    return flask.Response(stream.map(bytes) if flask.request.args else stream)


@views.get("/clients-response")
def clients_response() -> flask.Response:
    return flask.Response(nats.client.stream("fl.count").map(lambda chunk: chunk + b"-"))


@views.get("/news")
def news() -> flask.Response:
    subscription = nats.client.subscribe("fl.news.*")
    return sse_response(subscription.map(natsync.Message.text) if flask.request.args else subscription)


@views.get("/numbered")
def numbered() -> flask.Response:
    return sse_response(nats.stream("fl.count").map(lambda chunk: Event(chunk, event="token", id=chunk.decode())))


kept: list[natsync.Stream] = []


@pytest.fixture
def app(nats_server: NatsServer, handlers: Handlers) -> Iterator[flask.Flask]:
    app = create_app(nats_server.url)
    yield app
    with app.app_context():
        nats.client.close()
    kept.clear()


@pytest.fixture
def browser(app: flask.Flask) -> Any:
    return app.test_client()


# -- the client --------------------------------------------------------------------------------------------------------


def test_a_view_of_a_blueprint_uses_the_applications_client(browser: Any) -> None:
    assert browser.get("/api/echo/hello").data == b"hello"


def test_the_client_is_made_once_and_opened_at_its_first_use(app: flask.Flask, browser: Any) -> None:
    with app.app_context():
        client = nats.client
    assert client.status == "new"
    browser.get("/api/echo/x")
    assert client.status == "connected"
    with app.app_context():
        assert nats.client is client


def test_each_application_has_its_own(nats_server: NatsServer) -> None:
    extension = NatSync(name="shared")
    apps = [flask.Flask(name) for name in ("one", "two")]
    for app in apps:
        app.config["NATSYNC_URL"] = nats_server.url
        extension.init_app(app)
    clients = []
    for app in apps:
        with app.app_context():
            clients.append(extension.client)
    assert clients[0] is not clients[1]
    with pytest.raises(RuntimeError, match=r"app\.app_context\(\)"):
        extension.client


def test_the_only_application_needs_no_context() -> None:
    app = flask.Flask("one")
    extension = NatSync(app)
    with app.app_context():
        client = extension.client
    assert extension.client is client


def test_without_an_application_there_is_no_client() -> None:
    with pytest.raises(RuntimeError, match="no application of 0"):
        NatSync().client


def test_an_application_that_is_dropped_takes_its_client_along(nats_server: NatsServer) -> None:
    """The thread check behind each test sees that nothing runs on."""
    app = flask.Flask("short")
    app.config["NATSYNC_URL"] = nats_server.url
    extension = NatSync(app)
    extension.client.open()
    del app, extension
    gc.collect()


def test_the_url_comes_from_the_environment_where_the_configuration_names_none(
    monkeypatch: pytest.MonkeyPatch, nats_server: NatsServer
) -> None:
    monkeypatch.setenv("NATS_URL", nats_server.url)
    app = flask.Flask("one")
    with NatSync(app).client as client:
        assert client.server_info["port"] == nats_server.port


def test_options_of_the_client_come_from_the_configuration(nats_server: NatsServer) -> None:
    app = flask.Flask("one")
    app.config.from_mapping(NATSYNC_URL=nats_server.url, NATSYNC_INBOX_PREFIX="mine", NATSYNC_NAME="configured")
    extension = NatSync(app, name="given", no_echo=True)
    options = extension.client._options
    assert (options.inbox_prefix, options.name, options.no_echo) == ("mine", "configured", True)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"NATSYNC_HEARTBEATS": 3}, "NATSYNC_HEARTBEATS"),
        ({"NATSYNC_HEARTBEAT": -1}, "heartbeat"),
        ({"NATSYNC_URL": "http://x:s3cret@x"}, "NATSYNC_URL: .*scheme"),
        ({"NATSYNC_USER": "joe", "NATSYNC_TOKEN": "s3cret-token"}, "user and token"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_told_when_the_application_is_made(
    config: dict[str, Any], word: str
) -> None:
    app = flask.Flask("one")
    app.config.from_mapping(config)
    with pytest.raises(natsync.InvalidArgument, match=word) as caught:
        NatSync(app)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("NATSYNC_URL", 5), ("NATSYNC_JSON_ERRORS", "false")])
def test_a_key_of_the_extensions_own_is_named_where_its_value_is_of_the_wrong_type(key: str, value: object) -> None:
    app = flask.Flask("one")
    app.config[key] = value
    with pytest.raises(TypeError, match=key):
        NatSync(app)


def test_a_nats_url_of_the_environment_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_URL", "http://x")
    with pytest.raises(natsync.InvalidURL, match="variable NATS_URL: "):
        NatSync(flask.Flask("one"))


def test_a_switch_from_the_environment_is_read_as_json_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASK_NATSYNC_RECONNECT", "false")
    app = flask.Flask("one")
    app.config.from_prefixed_env()
    assert NatSync(app).client._options.reconnect is False
    app = flask.Flask("other")
    app.config["NATSYNC_RECONNECT"] = "false"
    with pytest.raises(TypeError, match="reconnect is True or False, not str"):
        NatSync(app)


def test_an_application_is_given_once(app: flask.Flask) -> None:
    with pytest.raises(RuntimeError, match="already"):
        nats.init_app(app)


def test_making_an_application_starts_nothing() -> None:
    done = run_python(
        "import flask, sys, threading\n"
        "def watch(name, args):\n"
        "    if name.startswith('socket.'): print(name)\n"
        "from natsync.contrib.flask import NatSync\n"
        "sys.addaudithook(watch)\n"
        "NatSync(flask.Flask('one'))\n"
        "print(threading.enumerate() == [threading.main_thread()])\n"
    )
    assert done.stdout == "True\n", done.stderr


# -- server-sent events ------------------------------------------------------------------------------------------------


def test_chunks_come_as_events(browser: Any) -> None:
    response = browser.get("/api/events/fl.count?event=token")
    assert response.status_code == 200
    assert response.mimetype == "text/event-stream"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert [(event.event, event.data) for event in parse(response.data)] == [
        ("token", "0"),
        ("token", "1"),
        ("token", "2"),
        ("end", ""),
    ]


def test_what_map_makes_of_a_chunk_may_be_an_event(browser: Any) -> None:
    found = parse(browser.get("/api/numbered").data)
    assert [(event.event, event.id) for event in found[:3]] == [("token", "0"), ("token", "1"), ("token", "2")]


@pytest.mark.parametrize("path", ["/api/news", "/api/news?mapped=1"])
def test_a_live_page_of_a_subject_shows_its_messages_until_the_browser_leaves(
    app: flask.Flask, browser: Any, path: str
) -> None:
    response = browser.get(path, buffered=False)
    body = response.iter_encoded()
    assert next(body) == b": stream\n\n"
    with app.app_context():
        client = nats.client
    for text in ("one", "two"):
        client.publish("fl.news.sport", text)
    assert [next(body), next(body)] == [b"data: one\n\n", b"data: two\n\n"]
    assert client.stats()["subscriptions"] == 1
    response.close()
    assert client.stats()["subscriptions"] == 0


def test_a_failure_is_an_event_because_the_status_has_left(browser: Any) -> None:
    response = browser.get("/api/events/fl.nobody")
    assert response.status_code == 200
    (error,) = parse(response.data)
    assert error.event == "error"
    assert error.json()["error"] == "UNAVAILABLE"


def test_leaving_in_mid_stream_cancels(browser: Any, handlers: Handlers) -> None:
    response = browser.get("/api/events/fl.hold", buffered=False)
    body = response.iter_encoded()
    assert next(body) == b": stream\n\n"
    assert next(body) == b"data: first\n\n"
    response.close()
    assert handlers.left.wait(PATIENCE)


def test_a_response_that_is_never_iterated_cancels(app: flask.Flask, handlers: Handlers) -> None:
    with app.test_request_context("/"):
        response = sse_response(nats.client.stream("fl.hold"))
        assert handlers.begun.wait(PATIENCE)
        response.close()
    assert handlers.left.wait(PATIENCE)


@pytest.mark.parametrize("path", ["/api/events/fl.hold", "/api/plain/fl.hold"])
def test_head_gets_the_headers_and_closes_the_stream(browser: Any, handlers: Handlers, path: str) -> None:
    response = browser.head(path)
    assert (response.status_code, response.data) == (200, b"")
    assert response.headers["X-Accel-Buffering"] == "no"
    assert not handlers.begun.is_set() or handlers.left.wait(PATIENCE)
    eventually(lambda: _open_streams(browser.application) == 0, PATIENCE)


def _open_streams(app: flask.Flask) -> int:
    with app.app_context():
        return int(nats.client.stats()["waiting_replies"])


@pytest.mark.parametrize("path", ["/api/raises", "/api/forgets"])
def test_a_stream_that_no_response_takes_over_is_closed_with_the_request(
    app: flask.Flask, browser: Any, handlers: Handlers, path: str
) -> None:
    app.config["PROPAGATE_EXCEPTIONS"] = False
    assert browser.get(path).status_code == (500 if path == "/api/raises" else 200)
    with pytest.raises(natsync.StreamClosed):
        list(kept.pop())
    assert _open_streams(app) == 0


@pytest.mark.parametrize("path", ["/api/own-response", "/api/own-response?mapped=1"])
def test_a_response_of_ones_own_is_told_who_may_take_a_stream_over(browser: Any, path: str) -> None:
    with pytest.raises(
        natsync.StreamCancelled, match=r"the request ended; .* sse_response\(\) .*nats\.client\.stream\(\)"
    ):
        browser.get(path)


def test_a_response_of_ones_own_may_have_a_stream_of_the_client(browser: Any) -> None:
    assert browser.get("/api/clients-response").data == b"0-1-2-"


def test_a_response_that_the_view_does_not_return_is_a_warning_and_cancelled(app: flask.Flask, browser: Any) -> None:
    with pytest.warns(ResourceWarning, match="dropped without close"):
        response = browser.get("/api/raises-late")
    assert response.status_code == 503
    eventually(lambda: _open_streams(app) == 0, PATIENCE)


def test_nats_stream_needs_a_request(app: flask.Flask) -> None:
    with app.app_context(), pytest.raises(RuntimeError, match="request context"):
        nats.stream("fl.count")


# -- plain streams -----------------------------------------------------------------------------------------------------


def test_a_plain_response_is_the_chunks(browser: Any) -> None:
    response = browser.get("/api/plain/fl.count")
    assert (response.status_code, response.mimetype, response.data) == (200, "text/plain", b"0\n1\n2\n")


def test_what_goes_wrong_before_the_first_chunk_is_a_status(browser: Any) -> None:
    response = browser.get("/api/plain/fl.nobody")
    assert response.status_code == 503
    assert response.json["error"] == "UNAVAILABLE"


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "status", "error"),
    [
        ("fl.late?timeout=0.2", 504, "DEADLINE_EXCEEDED"),
        ("fl.nobody", 503, "UNAVAILABLE"),
        ("fl.broken", 500, "UNKNOWN"),
    ],
)
def test_errors_that_leave_a_view_are_json(browser: Any, subject: str, status: int, error: str) -> None:
    response = browser.get(f"/api/ask/{subject}")
    assert response.status_code == status
    assert response.json["error"] == error
    assert "fl." not in response.text


def test_a_refusal_says_when_to_come_back(nats_server: NatsServer) -> None:
    app = create_app(nats_server.url)
    stop = threading.Event()
    with natsync.Subscriber(nats_server.url, max_streams=1) as full:

        @full.stream("fl.full")
        def fill(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
            yield b"x"
            stop.wait(PATIENCE)

        with app.app_context():
            client = nats.client
        with client.stream("fl.full") as first:
            assert next(first) == b"x"
            response = app.test_client().get("/api/plain/fl.full")
            stop.set()
        client.close()
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) >= 1
    assert response.json["error"] == "RESOURCE_EXHAUSTED"


def test_what_nats_does_not_permit_is_a_bad_gateway(make_nats_server: Any) -> None:
    server = make_nats_server(
        config='authorization {users: [{user: web, password: pw, permissions: {publish: "allowed"}}]}'
    )
    app = create_app(server.url.replace("nats://", "nats://web:pw@"))
    response = app.test_client().get("/api/ask/forbidden")
    with app.app_context():
        nats.client.close()
    assert response.status_code == 502
    assert "forbidden" not in response.text


def test_no_server_is_unavailable() -> None:
    app = create_app("nats://127.0.0.1:1")
    response = app.test_client().get("/api/ask/x")
    assert response.status_code == 503
    assert "127.0.0.1" not in response.text


def test_a_mistake_in_a_view_stays_an_exception(app: flask.Flask) -> None:
    app.config["TESTING"] = True
    with pytest.raises(natsync.InvalidArgument):
        app.test_client().get("/api/ask/two words")


def test_an_error_handler_of_the_application_goes_first(app: flask.Flask) -> None:
    app.register_error_handler(natsync.NoRespondersError, lambda error: ("nobody there", 418))
    response = app.test_client().get("/api/ask/fl.nobody")
    assert (response.status_code, response.text) == (418, "nobody there")


def test_json_errors_can_be_left_out(nats_server: NatsServer) -> None:
    app = create_app(nats_server.url, NATSYNC_JSON_ERRORS=False, TESTING=True)
    with pytest.raises(natsync.NoRespondersError):
        app.test_client().get("/api/ask/fl.nobody")
    with app.app_context():
        nats.client.close()


# -- commands ----------------------------------------------------------------------------------------------------------


def test_flask_natsync_check_tells_of_the_server(app: flask.Flask, nats_server: NatsServer) -> None:
    result = app.test_cli_runner().invoke(args=["natsync", "check"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("connected to ")
    assert "round trip" in result.output


def test_flask_natsync_request_and_stream_print_what_is_answered(app: flask.Flask) -> None:
    run = app.test_cli_runner().invoke
    assert run(args=["natsync", "request", "fl.echo", "hello"]).output == "hello\n"
    assert run(args=["natsync", "stream", "fl.count", "2"]).output == "0\n1\n"


@pytest.mark.parametrize("command", ["request", "stream"])
def test_a_command_that_fails_is_one_line(app: flask.Flask, command: str) -> None:
    result = app.test_cli_runner().invoke(args=["natsync", command, "fl.nobody"])
    assert result.exit_code == 1
    assert result.output == "Error: no responders for 'fl.nobody': nothing subscribes to it now\n"


def test_check_without_a_server_is_one_line() -> None:
    app = create_app("nats://joe:hidden@127.0.0.1:1")
    result = app.test_cli_runner().invoke(args=["natsync", "check"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: no server could be reached")
    assert "hidden" not in result.output
