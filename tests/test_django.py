"""natsync.contrib.django in this process: settings, checks, registry, responses, errors as JSON."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import django
import pytest

import natsync
from natsync.testing import NatsServer, eventually
from processes import run
from support import ROOT, natsync_threads

with pytest.MonkeyPatch.context() as _patch:  # not for the processes that other tests start
    _patch.setenv("DJANGO_SETTINGS_MODULE", "django_site.settings")
    django.setup()

from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.test import Client as Browser
from django.test import RequestFactory, override_settings

from natsync.contrib import django as contrib

PATIENCE = 20.0


@pytest.fixture
def server(make_nats_server: Callable[..., NatsServer]) -> Iterator[NatsServer]:
    """A server of the test's own, which NATSYNC names."""
    made = make_nats_server()
    with override_settings(NATSYNC={**settings.NATSYNC, "URL": made.url}):
        yield made


@pytest.fixture
def responder(server: NatsServer) -> Iterator[natsync.Subscriber]:
    with natsync.Subscriber(server.url) as subscriber:
        yield subscriber


def found(value: object) -> list[str]:
    with override_settings(NATSYNC=value):
        return [one.id for one in run_checks(tags=["natsync"])]


# -- settings and checks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("nats://here", "natsync.E001"),
        ({"URI": "nats://here"}, "natsync.E002"),
        ({"URL": "http://here"}, "natsync.E003"),
        ({"CONNECT_TIMEOUT": -1}, "natsync.E004"),
        ({"MAX_WORKERS": 0}, "natsync.E005"),
        ({"QUEUE": "two words"}, "natsync.E006"),
    ],
)
def test_a_check_finds_a_setting_that_cannot_be_used(value: object, number: str) -> None:
    assert found(value) == [number]
    with override_settings(NATSYNC=value), pytest.raises(ImproperlyConfigured):
        contrib.get_client()


def test_a_setting_that_can_be_used_is_left_alone() -> None:
    assert found({}) == []
    assert found({"URL": ["nats://a", "nats://b"], "NAME": "shop", "MAX_WORKERS": 4, "QUEUE": "shop"}) == []


def test_an_unknown_key_is_told_what_was_meant() -> None:
    with override_settings(NATSYNC={"NAMES": "x"}):
        (one,) = run_checks(tags=["natsync"])
    assert one.hint == "Did you mean NAME?"


def test_what_is_wrong_is_told_without_credentials() -> None:
    with override_settings(NATSYNC={"URL": "http://user:s3cret@here", "PASSWORD": "s3cret"}):
        assert "s3cret" not in str(run_checks(tags=["natsync"]))
        with pytest.raises(ImproperlyConfigured) as caught:
            contrib.get_client()
    assert "s3cret" not in str(caught.value)


def test_a_project_with_an_asgi_application_is_warned() -> None:
    with override_settings(ASGI_APPLICATION="django_site.asgi.application"):
        assert found({}) == ["natsync.W001"]


def test_the_deployment_check_asks_for_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)
    with override_settings(NATSYNC={}):
        ids = [one.id for one in run_checks(tags=["natsync"], include_deployment_checks=True)]
    assert ids == ["natsync.W002"]


# -- the client ----------------------------------------------------------------------------------------------------


def test_all_threads_have_one_client_which_opens_nothing_before_its_use(server: NatsServer) -> None:
    before = natsync_threads()
    clients: list[natsync.Client] = []
    threads = [threading.Thread(target=lambda: clients.append(contrib.get_client())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(one) for one in clients}) == 1
    assert natsync_threads() <= before
    assert clients[0].rtt(PATIENCE) > 0


def test_an_overridden_setting_makes_another_client(server: NatsServer) -> None:
    first = contrib.get_client()
    with override_settings(NATSYNC={"URL": server.url, "NAME": "another"}):
        assert contrib.get_client() is not first
    assert contrib.get_client() is not first


# -- the registry --------------------------------------------------------------------------------------------------


def test_a_registry_serves_what_it_recorded(server: NatsServer) -> None:
    registry = contrib.Registry()

    @registry.stream("count")
    def count(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        yield from map(str, range(int(request.text())))

    @registry.handler("double", queue="mine")
    def double(ctx: natsync.Context, request: natsync.Message) -> str:
        return request.text() * 2

    with registry.make_subscriber(queue="ours") as subscriber:
        assert [(one.subject, one.queue) for one in subscriber.handles] == [("count", "ours"), ("double", "mine")]
        client = contrib.get_client()
        assert list(client.stream("count", "3", timeout=PATIENCE)) == [b"0", b"1", b"2"]
        assert client.request("double", "ab", timeout=PATIENCE).text() == "abab"


def test_a_registry_records_plain_messages_as_well(server: NatsServer) -> None:
    registry = contrib.Registry()
    got: SimpleQueue[bytes] = SimpleQueue()
    registry.subscribe("news")(lambda message: got.put(message.data))
    with registry.make_subscriber(queue="ours") as subscriber:
        assert [(one.subject, one.queue) for one in subscriber.handles] == [("news", None)]
        contrib.client.publish("news", b"1")
        assert got.get(timeout=PATIENCE) == b"1"


def test_a_registry_keeps_the_limits_of_a_registration(server: NatsServer) -> None:
    registry = contrib.Registry()
    entered, leave = threading.Semaphore(0), threading.Event()

    @registry.stream("hold", max_streams=1)
    def hold(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        yield "first"
        ctx.wait(PATIENCE)

    @registry.handler("slow", max_workers=1, pending_messages=1)
    def slow(ctx: natsync.Context, request: natsync.Message) -> None:
        entered.release()
        leave.wait(PATIENCE)

    with registry.make_subscriber():
        client = contrib.get_client()
        with client.stream("hold") as stream:
            assert stream.next(PATIENCE) == b"first"
            with pytest.raises(natsync.StreamRefused):
                client.stream("hold").next(PATIENCE)
        client.publish("slow", b"", reply="nobody")
        assert entered.acquire(timeout=PATIENCE)
        client.publish("slow", b"", reply="nobody")  # waits
        with pytest.raises(natsync.HandlerError) as caught:
            client.request("slow", timeout=PATIENCE)
        assert caught.value.code == 429
        leave.set()


def test_the_decorators_of_a_registry_take_what_those_of_a_subscriber_take() -> None:
    for name in ("stream", "handler"):
        of_registry, of_subscriber = (
            inspect.signature(getattr(cls, name)).parameters for cls in (contrib.Registry, natsync.Subscriber)
        )
        assert of_registry == of_subscriber


@pytest.mark.parametrize("form", ["stream", "handler", "subscribe"])
def test_a_decorator_of_a_registry_without_parentheses_is_refused(form: str) -> None:
    with pytest.raises(TypeError, match=rf'write @subscriber\.{form}\("subject"\)'):
        getattr(contrib.Registry(), form)(lambda ctx, request: None)
    with pytest.raises(natsync.InvalidArgument, match="subject"):
        getattr(contrib.Registry(), form)("a b")


def test_an_overflow_that_has_nobody_to_raise_to_is_refused_by_a_registry() -> None:
    with pytest.raises(natsync.InvalidArgument, match="overflow='error'"):
        contrib.Registry().subscribe("x", overflow="error")


@pytest.mark.parametrize("value", [0, -1, True, "1", 1.5])
@pytest.mark.parametrize("name", ["max_streams", "max_workers", "pending_messages"])
def test_a_limit_that_cannot_be_is_refused_where_it_stands(name: str, value: Any) -> None:
    for owner in (contrib.Registry(), natsync.Subscriber()):
        with pytest.raises(natsync.InvalidArgument, match=f"{name}="):
            getattr(owner, "stream" if name == "max_streams" else "handler")("limited", **{name: value})


@pytest.mark.parametrize("subject", ["two words", "", "a..b"])
def test_a_subject_that_cannot_be_is_refused_where_it_stands(subject: str) -> None:
    with pytest.raises(natsync.InvalidArgument):
        contrib.Registry().handler(subject)(lambda ctx, request: None)


def test_handlers_modules_of_apps_are_found() -> None:
    contrib.autodiscover()
    assert "site.version" in contrib.subscriber.subjects


def test_the_thread_of_a_handler_closes_its_database_connections_at_its_end(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(type(connections), "close_all", lambda _: closed.append(threading.current_thread().name))
    registry = contrib.Registry()
    registry.handler("site.thread")(lambda ctx, request: threading.current_thread().name)
    with registry.make_subscriber():
        thread = contrib.get_client().request("site.thread", timeout=PATIENCE).text()
        assert closed == []
    eventually(lambda: closed == [thread], PATIENCE)


# -- responses -----------------------------------------------------------------------------------------------------


class Handler:
    """A stream that sends one chunk and then nothing until it is cancelled."""

    def __init__(self, responder: natsync.Subscriber) -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()

        @responder.stream("site.endless")
        def endless(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
            self.begun.set()
            try:
                yield b"first"
                ctx.wait(3 * PATIENCE)
            finally:
                self.cancelled.set()


@pytest.fixture
def endless(responder: natsync.Subscriber) -> Handler:
    return Handler(responder)


def test_chunks_become_events(responder: natsync.Subscriber) -> None:
    @responder.stream("site.two")
    def two(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        yield b"a\nb"
        yield b"c"

    response = Browser().get("/stream/site.two")
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers["X-Accel-Buffering"] == "no"
    body = b"".join(response.streaming_content)
    assert body == b": stream\n\ndata: a\ndata: b\n\ndata: c\n\nevent: end\ndata: \n\n"


@pytest.mark.parametrize("path", ["stream", "plain"])
def test_closing_the_response_cancels_the_handler(endless: Handler, path: str) -> None:
    response = Browser().get(f"/{path}/site.endless")
    chunks = iter(response.streaming_content)
    assert any(b"first" in chunk for chunk in chunks)
    response.close()
    assert endless.cancelled.wait(PATIENCE)


@pytest.mark.parametrize("path", ["stream", "plain"])
def test_a_head_request_closes_the_stream_at_once(endless: Handler, path: str) -> None:
    response = Browser().head(f"/{path}/site.endless")
    assert response.status_code == 200
    assert b"".join(response.streaming_content) == b""
    assert not endless.begun.is_set() or endless.cancelled.wait(PATIENCE)


def test_head_is_seen_by_the_request_given_too(server: NatsServer, endless: Handler) -> None:
    stream = contrib.get_client().stream("site.endless")
    response = contrib.sse_response(stream, request=RequestFactory().head("/"))
    assert list(response) == []
    with pytest.raises(natsync.StreamError):
        stream.next(PATIENCE)


def test_a_view_that_raises_leaves_no_stream(endless: Handler, caplog: pytest.LogCaptureFixture) -> None:
    assert Browser(raise_request_exception=False).get("/raises/site.endless").status_code == 500
    assert caplog.records[-1].exc_info  # the traceback, and with it the view's frame, is still there
    assert not endless.begun.is_set() or endless.cancelled.wait(PATIENCE)


@pytest.mark.parametrize("heartbeat", [0, -1, float("nan")])
def test_a_heartbeat_that_cannot_be_is_refused_and_the_stream_closed(endless: Handler, heartbeat: float) -> None:
    stream = contrib.get_client().stream("site.endless", timeout=PATIENCE)
    assert next(stream) == b"first"
    with pytest.raises(natsync.InvalidArgument):
        contrib.sse_response(stream, heartbeat)
    assert endless.cancelled.wait(PATIENCE)


def test_gzip_does_not_keep_events_back(server: NatsServer, endless: Handler) -> None:
    with (
        override_settings(MIDDLEWARE=["django.middleware.gzip.GZipMiddleware"]),
        contrib.get_client().stream("site.endless") as stream,
    ):
        response = contrib.sse_response(stream)
        assert response.headers["Content-Encoding"] == "identity"
        response.close()


def test_under_asgi_events_come_one_by_one_with_a_warning(server: NatsServer, endless: Handler) -> None:
    response = contrib.sse_response(contrib.get_client().stream("site.endless", timeout=PATIENCE))

    async def first() -> bytes:
        parts = response.__aiter__()
        got = await parts.__anext__() + await parts.__anext__()  # the stream has not ended
        await parts.aclose()
        return got

    with pytest.warns(RuntimeWarning, match="under ASGI"):
        assert async_to_sync(first)() == b": stream\n\ndata: first\n\n"
    assert endless.cancelled.wait(PATIENCE)


# -- errors --------------------------------------------------------------------------------------------------------


def test_nobody_who_answers_is_503(server: NatsServer) -> None:
    response = Browser().get("/request/site.nobody")
    assert (response.status_code, response.json()["error"]) == (503, "UNAVAILABLE")
    assert Browser().get("/plain/site.nobody").status_code == 503  # before the first chunk there can be a status


def test_a_timeout_is_504(responder: natsync.Subscriber) -> None:
    @responder.handler("site.late")
    def late(ctx: natsync.Context, request: natsync.Message) -> None:
        ctx.wait(2)

    assert Browser().get("/request/site.late?timeout=0.2").status_code == 504


def test_a_refusal_is_503_with_retry_after(server: NatsServer) -> None:
    def refuse(request: Any) -> None:
        raise natsync.StreamRefused("full", retry_after=2.5)

    with override_settings(ROOT_URLCONF=(django.urls.path("", refuse),)):
        response = Browser().get("/")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "3")


def test_a_mistake_of_the_view_is_left_to_django(server: NatsServer) -> None:
    with pytest.raises(natsync.InvalidArgument):
        Browser().get("/request/two words")


# -- a project's own tests -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_test_cases_work_in_manage_py_test() -> None:
    ended = run(sys.executable, "-W", "error", str(ROOT / "tests" / "django_site" / "manage.py"), "test", "django_site")
    assert ended.process.returncode == 0, ended
    assert any("Ran 5 tests" in line for line in ended.err), ended
