"""A browser that leaves a Django view with a stream: under runserver and gunicorn, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import natsync
from eventsource import Browser
from natsync.testing import NatsServer, eventually
from processes import PATIENCE, child
from support import ROOT
from thirdparty import ThirdParty
from web_servers import serving

pytestmark = pytest.mark.slow

TESTS = ROOT / "tests"
#: What each is given: the application, and its arguments.
COMMANDS = {
    "runserver": ("django_site/manage.py",),
    "sync": ("django_site.wsgi",),
    "gthread": ("django_site.wsgi", "--preload"),
}
#: Chunks that are pulled after the browser has left, until the body is closed, at the most: (FIN, RST).
PULLED = {"runserver": (2, 1), "sync": (2, 1), "gthread": (2, 1)}
ABANDONED = 200


class Responder:
    """The handlers of the views' streams."""

    def __init__(self, subscriber: natsync.Subscriber) -> None:
        self.subscriber = subscriber
        self.senders: list[natsync.ResponseSender] = []
        self.left_at: list[float] = []
        self.third_party: str | None = None

        @subscriber.stream("site.given")
        def given(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
            """Sends what the test sends through its sender."""
            self.senders.append(sender)
            sender.closed.wait(PATIENCE)

        @subscriber.stream("site.silent")
        def silent(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
            try:
                yield b"first"
                ctx.wait(PATIENCE)
            finally:
                self.left_at.append(time.monotonic())

        @subscriber.stream("site.third-party")
        def forward(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
            try:
                with ctx.closing(urllib.request.urlopen(f"{self.third_party}/hang")) as lines:
                    yield from lines
            finally:
                self.left_at.append(time.monotonic())

        @subscriber.stream("site.busy")
        def busy(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
            yield b"first"
            while not ctx.wait(0.01):
                yield b"again"


@pytest.fixture(scope="module")
def broker() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


@pytest.fixture
def responder(broker: NatsServer) -> Iterator[Responder]:
    with natsync.Subscriber(broker.url) as subscriber:
        yield Responder(subscriber)


@pytest.fixture(params=COMMANDS, scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def site(kind: str, broker: NatsServer) -> Iterator[str]:
    with serving(kind, *COMMANDS[kind], url=broker.url, cwd=TESTS) as web:
        yield web.url


def leave(browser: Browser, how: str) -> None:
    browser.leave() if how == "FIN" else browser.reset()


def quickest(limit: float, measure: Callable[[], float], tries: int = 3) -> float:
    """The least of up to three: a loaded machine may hold anything up, but not each time."""
    seen: list[float] = []
    while len(seen) < tries and min(seen, default=limit) >= limit:
        seen.append(measure())
    return min(seen)


def state(site: str) -> dict[str, Any]:
    with Browser(f"{site}/state", headers="Connection: close\r\n") as browser:
        found: dict[str, Any] = json.loads(browser.read_all())
        return found


# -- how it is noticed ---------------------------------------------------------------------------------------------


def pulled_after(site: str, how: str, responder: Responder) -> int:
    """Chunks that the server pulls from when its client has left until it closes the body."""
    with Browser(f"{site}/unseen/site.given") as browser:
        eventually(lambda: responder.senders, PATIENCE)
        sender = responder.senders.pop()
        sender.send(b"seen")
        browser.wait_for(b"data: seen\n\n")
        leave(browser, how)
    for number in range(1, 10):
        if sender.closed.wait(0.2) and number > 1:  # as heartbeats have it: time for the other side's answer to a write
            return number - 1
        with contextlib.suppress(natsync.StreamClosed):
            sender.send(b"unseen")
        if sender.closed.wait(1.5):
            return number
    raise AssertionError("the server never closed the body")


@pytest.mark.parametrize("how", ["FIN", "RST"])
def test_how_many_chunks_a_server_pulls_after_its_client_has_left(
    site: str, kind: str, how: str, responder: Responder
) -> None:
    most = PULLED[kind][how == "RST"]
    pulled = quickest(most + 1, lambda: pulled_after(site, how, responder))
    print(f"{kind}: {pulled} chunks after {how}")  # shown by pytest -rP
    assert 0 < pulled <= most


def time_to_notice(site: str, query: str, how: str, responder: Responder) -> float:
    """Seconds from the moment that the browser leaves until the handler's finally."""
    responder.left_at.clear()
    with Browser(f"{site}/stream/site.silent?{query}") as browser:
        browser.wait_for(b"data: first\n\n")
        left = time.monotonic()
        leave(browser, how)
        eventually(lambda: responder.left_at, PATIENCE)
    return responder.left_at[0] - left


@pytest.mark.parametrize("how", ["FIN", "RST"])
def test_a_browser_that_leaves_a_silent_stream_is_noticed(site: str, kind: str, how: str, responder: Responder) -> None:
    """By the look at the socket within a second; by heartbeats where there is none to look at."""
    query, limit = ("heartbeat=60", 1.0) if kind != "runserver" else ("heartbeat=0.5", 0.5 * 3)
    assert quickest(limit, lambda: time_to_notice(site, query, how, responder)) < limit


def test_a_browser_that_leaves_ends_the_read_from_the_third_party(
    site: str, kind: str, broker: NatsServer, responder: Responder
) -> None:
    """All the way: browser, stream, the handler's ctx, the socket of its HTTP read, which is blocked."""
    with ThirdParty() as third_party:
        responder.third_party = third_party.url
        with Browser(f"{site}/stream/site.third-party?heartbeat={60 if kind != 'runserver' else 0.3}") as browser:
            browser.wait_for(b'data: {"piece": 0}')
            assert third_party.hanging.wait(PATIENCE)
            browser.leave()
        eventually(lambda: responder.left_at, PATIENCE)
        assert not third_party.released.is_set()  # it has not let go by itself


# -- what is left --------------------------------------------------------------------------------------------------


def test_a_head_request_and_a_view_that_raises_leave_nothing(site: str, responder: Responder) -> None:
    for method, path, status in (("HEAD", "stream/site.silent", 200), ("GET", "raises/site.silent", 500)):
        with Browser(f"{site}/{path}", method=method) as browser:
            assert browser.status == status
        eventually(lambda: state(site)["streams"] == responder.subscriber.stats()["streams"] == 0, PATIENCE)


@pytest.mark.timeout(240)
def test_nothing_is_left_of_200_abandoned_requests(site: str, kind: str, responder: Responder) -> None:
    paths = ["/stream/site.busy", "/generator/site.busy", "/stream/site.silent?heartbeat=0.2"]

    def abandon(number: int) -> None:
        with Browser(site + paths[number % 3], timeout=60) as browser:
            browser.wait_for(b"first")
            leave(browser, "FIN" if number % 2 else "RST")

    def many(count: int) -> dict[str, Any]:
        with ThreadPoolExecutor(1 if kind == "sync" else 8) as browsers:
            list(browsers.map(abandon, range(count)))
        eventually(lambda: state(site)["streams"] == responder.subscriber.stats()["streams"] == 0, PATIENCE)
        return state(site)

    before = many(24)  # the threads that a server keeps are there from here on
    after = many(ABANDONED)
    assert after["pid"] == before["pid"]
    eventually(lambda: len(state(site)["threads"]) <= len(before["threads"]) + 2, PATIENCE)
    eventually(lambda: state(site)["descriptors"] <= before["descriptors"] + 4, PATIENCE)


# -- processes that end while they stream --------------------------------------------------------------------------

#: So that the responder finds out soon about a process that ended without a word.
SOON = {"SITE_RESUME_GRACE": "1", "SITE_HEARTBEAT": "0.5"}


@pytest.mark.parametrize(
    ("kind", "arguments", "number"),
    [
        ("sync", ["--timeout", "6"], None),  # SystemExit inside next()
        ("sync", ["--graceful-timeout", "1"], signal.SIGTERM),
        ("gthread", ["--graceful-timeout", "1"], signal.SIGTERM),
        ("runserver", [], signal.SIGINT),
        ("runserver", [], signal.SIGKILL),
    ],
    ids=["sync-timeout", "sync-SIGTERM", "gthread-SIGTERM", "runserver-SIGINT", "runserver-SIGKILL"],
)
def test_a_process_that_ends_leaves_no_handler_behind(
    kind: str, arguments: list[str], number: signal.Signals | None, broker: NatsServer, responder: Responder
) -> None:
    with (
        serving(kind, *COMMANDS[kind], *arguments, url=broker.url, cwd=TESTS, env=SOON, quiet=False) as web,
        Browser(f"{web.url}/stream/site.silent?heartbeat=60") as browser,
    ):
        browser.wait_for(b"data: first\n\n")
        begin = time.monotonic()
        if number is not None:
            web.running.send(number)
        eventually(lambda: responder.left_at, PATIENCE, f"the handler runs on: {web.running!r}")
        assert responder.left_at[0] - begin < PATIENCE / 2  # by itself it would have gone on for all of it


def test_a_reload_of_runserver_leaves_no_handler_behind(
    broker: NatsServer, responder: Responder, tmp_path: Path
) -> None:
    copy = tmp_path / "django_site"
    shutil.copytree(TESTS / "django_site", copy, ignore=shutil.ignore_patterns("__pycache__"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def process() -> int | None:
        try:
            return int(state(f"http://{address}")["pid"])
        except (OSError, EOFError):
            return None

    command = [sys.executable, str(copy / "manage.py"), "runserver", address]
    with child(*command, url=broker.url, env=SOON) as running:
        former = eventually(process, PATIENCE)
        with Browser(f"http://{address}/stream/site.silent?heartbeat=60") as browser:
            browser.wait_for(b"data: first\n\n")

            def reloaded() -> bool:
                later = time.time() + 5  # again and again: the reloader may not have seen the file before
                os.utime(copy / "views.py", (later, later))
                return process() not in (None, former)

            eventually(reloaded, PATIENCE, f"{running!r}")
            eventually(lambda: responder.left_at, PATIENCE / 2, f"the handler runs on: {running!r}")
        running.send(signal.SIGTERM)
        running.wait()
