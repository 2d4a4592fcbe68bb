"""A browser that leaves, under each WSGI server: when the server notices, and that nothing is left behind.

Real servers in processes of their own, a real nats-server, and a bare socket for a browser, which leaves by FIN or RST.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import natsync
from eventsource import Browser
from natsync.testing import NatsServer, eventually
from web_servers import Web, serving

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PATIENCE = 20.0

#: Chunks that are pulled after the browser has left, until the server closes the body: (after FIN, after RST). Without
#: a look at the socket, each is one heartbeat. What a server keeps to itself is as in the table of docs/flask.md.
PULLED = {
    "werkzeug": (1, 1),
    "sync": (2, 1),
    "gthread": (2, 1),
    "gevent": (2, 1),
    "waitress": (3, 2),
    "waitress-lookahead": (1, 1),
    **({"uwsgi": (2, 1)} if sys.platform == "linux" else {}),
}
#: Those that let one see that the client has gone while there is nothing to write.
LOOKING = [kind for kind in PULLED if kind != "waitress"]
ABANDONED = 200
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="uWSGI is a server for Linux")


class Responder:
    """The responder of web_app.py."""

    def __init__(self, subscriber: natsync.Subscriber) -> None:
        self.subscriber = subscriber
        self.senders: list[natsync.ResponseSender] = []
        self.left_at: list[float] = []
        self._lock = threading.Lock()

        @subscriber.handler("web.echo")
        def echo(ctx: natsync.Context, request: natsync.Message) -> bytes:
            return request.data

        @subscriber.stream("web.given")
        def given(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
            """Sends what the test sends through its sender."""
            self.senders.append(sender)
            sender.closed.wait(PATIENCE)

        @subscriber.stream("web.silent")
        def silent(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
            try:
                yield b"first"
                ctx.wait(PATIENCE)
            finally:
                self.left_at.append(time.monotonic())

        @subscriber.stream("web.busy")
        def busy(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
            yield b"first"
            while not ctx.wait(0.01):
                yield b"again"

    def sender(self) -> natsync.ResponseSender:
        eventually(lambda: self.senders, PATIENCE)
        return self.senders.pop()


@pytest.fixture(scope="module")
def broker() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


@pytest.fixture
def responder(broker: NatsServer) -> Iterator[Responder]:
    with natsync.Subscriber(broker.url) as subscriber:
        yield Responder(subscriber)


@pytest.fixture
def client(broker: NatsServer) -> Iterator[natsync.Client]:
    with natsync.Client(broker.url) as connected:
        yield connected


@pytest.fixture(params=PULLED, scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture(scope="module")
def web(kind: str, broker: NatsServer) -> Iterator[Web]:
    with serving(kind, "web_app:app", url=broker.url, cwd=HERE) as running:
        yield running


def leave(browser: Browser, how: str) -> None:
    browser.leave() if how == "FIN" else browser.reset()


def pulled_after(web: Web, how: str, responder: Responder, news: natsync.Subscription) -> int:
    """Chunks that the server pulls from when its client has left until it closes the body."""
    with Browser(f"{web.url}/told/x") as browser:
        assert news.next(PATIENCE).data == b"pulled"  # the comment at the beginning
        sender = responder.sender()
        sender.send(b"seen")
        assert news.next(PATIENCE).data == b"pulled"
        browser.wait_for(b"data: seen\n\n")
        leave(browser, how)
    pulled = 0
    while True:
        time.sleep(0.2)  # as heartbeats have it: time for the other side's answer to a write
        if not sender.is_closed():
            sender.send(b"unseen")
        if news.next(PATIENCE).data == b"closed":
            break
        pulled += 1
    assert sender.closed.wait(PATIENCE)
    return pulled


@pytest.mark.parametrize("how", ["FIN", "RST"])
def test_how_many_chunks_a_server_pulls_after_its_client_has_left(
    web: Web, kind: str, how: str, responder: Responder, client: natsync.Client
) -> None:
    news = client.subscribe("web.told.x")
    client.flush()
    most = PULLED[kind][how == "RST"]
    pulled = quickest(most + 1, lambda: pulled_after(web, how, responder, news))
    print(f"{kind}: {pulled} chunks after {how}")  # shown by pytest -rP
    assert 0 < pulled <= most


def quickest(limit: float, measure: Callable[[], float], tries: int = 3) -> float:
    """The shortest of up to three times: a loaded machine may hold anything up, but not each time."""
    times: list[float] = []
    while len(times) < tries and min(times, default=limit) >= limit:
        times.append(measure())
    return min(times)


def time_to_notice(web: Web, path: str, how: str, responder: Responder, until: bytes = b"data: first\n\n") -> float:
    """Seconds from the moment that the browser leaves until the handler's finally."""
    responder.left_at.clear()
    with Browser(f"{web.url}/events/{path}") as browser:
        browser.wait_for(until)
        left = time.monotonic()
        leave(browser, how)
        eventually(lambda: responder.left_at, PATIENCE)
    return responder.left_at[0] - left


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("kind", LOOKING, indirect=True)
def test_a_stream_in_which_nothing_happens_ends_within_a_second(web: Web, how: str, responder: Responder) -> None:
    assert quickest(1.0, lambda: time_to_notice(web, "web.silent?heartbeat=60", how, responder)) < 1.0


@pytest.mark.parametrize("how", ["FIN", "RST"])
def test_without_a_look_heartbeats_find_out(web: Web, kind: str, how: str, responder: Responder) -> None:
    heartbeat = 0.5
    limit = heartbeat * (PULLED[kind][how == "RST"] + 1)
    path = f"web.silent?look=no&heartbeat={heartbeat}"
    assert quickest(limit, lambda: time_to_notice(web, path, how, responder, until=b": ping\n\n")) < limit


def stats(web: Web) -> dict[str, Any]:
    with Browser(f"{web.url}/stats", headers="Connection: close\r\n") as browser:
        found: dict[str, Any] = json.loads(browser.read_all())
        return found


def settled(web: Web, responder: Responder) -> dict[str, Any]:
    """What the server's process holds once no stream is left."""
    found: dict[str, Any] = {}

    def quiet() -> bool:
        found.update(stats(web))
        return found["streams"] == found["leased"] == responder.subscriber.stats()["streams"] == 0

    eventually(quiet, PATIENCE, f"not quiet: {found}")
    return found


@pytest.mark.timeout(240)
def test_nothing_is_left_of_200_abandoned_requests(web: Web, kind: str, responder: Responder) -> None:
    paths = ["/events/web.busy", "/leased/web.busy", "/events/web.silent?heartbeat=0.2"]

    def abandon(number: int) -> None:
        with Browser(web.url + paths[number % 3], timeout=60) as browser:
            browser.wait_for(b"data: first\n\n")
            leave(browser, "FIN" if number % 2 else "RST")

    def many(count: int) -> dict[str, Any]:
        with ThreadPoolExecutor(1 if kind == "sync" else 8) as browsers:
            list(browsers.map(abandon, range(count)))
        return settled(web, responder)

    before = many(24)  # the threads and connections that a server keeps are there from here on
    after = many(ABANDONED)
    assert after["pid"] == before["pid"]
    # Idle workers may have gone, and the pool may have made a connection more: it has 8 at the most, of three threads.
    most = len(before["threads"]) + 3 * 8

    def few_threads() -> bool:  # the server's own, which have written a stream, may be a little behind its end
        after.update(stats(web))
        return len(after["threads"]) <= most

    eventually(few_threads, PATIENCE, f"more than {most}: {after}")
    eventually(lambda: stats(web)["sockets"] <= before["sockets"] + 8, PATIENCE)
    assert [name for name in after["threads"] if "stream" in name] == []
    with Browser(f"{web.url}/ping") as browser:
        assert browser.status == 200


# -- processes that end while they stream ------------------------------------------------------------------------------

#: So that the responder finds out soon about a process that ended without a word.
SOON = {"FLASK_NATSYNC_RESUME_GRACE": "1", "FLASK_NATSYNC_HEARTBEAT": "0.5"}


@pytest.mark.parametrize(
    ("kind", "arguments", "number"),
    [
        ("sync", ["--timeout", "5"], None),  # SystemExit inside next()
        ("sync", ["--graceful-timeout", "1"], signal.SIGTERM),
        ("gthread", ["--graceful-timeout", "1"], signal.SIGTERM),
        ("gevent", ["--graceful-timeout", "1"], signal.SIGTERM),
        pytest.param("uwsgi", ["--worker-reload-mercy", "1"], signal.SIGTERM, marks=linux_only),
        pytest.param("uwsgi", ["--harakiri", "4"], None, marks=linux_only),  # SIGKILL
    ],
    ids=["sync-timeout", "sync-SIGTERM", "gthread-SIGTERM", "gevent-SIGTERM", "uwsgi-SIGTERM", "uwsgi-harakiri"],
)
def test_a_worker_that_is_ended_leaves_no_handler_behind(
    kind: str, arguments: list[str], number: signal.Signals | None, broker: NatsServer, responder: Responder
) -> None:
    with serving(kind, "web_app:app", *arguments, url=broker.url, cwd=HERE, env=SOON, quiet=False) as ending:
        with Browser(f"{ending.url}/events/web.silent?heartbeat=60") as browser:
            browser.wait_for(b"data: first\n\n")
            begin = time.monotonic()
            if number is not None:
                ending.running.send(number)
            browser.read_all()  # the process lets go of the browser
        eventually(lambda: responder.left_at, PATIENCE, f"the handler runs on: {ending.running!r}")
        assert responder.left_at[0] - begin < PATIENCE / 2  # by itself it would have gone on for all of it
        if number is None:  # another worker goes on
            with Browser(f"{ending.url}/ping") as browser:
                assert browser.status == 200


@pytest.mark.parametrize("kind", ["sync", "gthread", "gevent"])
def test_a_reload_leaves_no_handler_behind(kind: str, broker: NatsServer, responder: Responder) -> None:
    """What is open goes on in the old process, or is cut off; in both cases it ends with its browser."""
    with serving(kind, "web_app:app", url=broker.url, cwd=HERE, env=SOON, quiet=False) as reloading:
        former = stats(reloading)["pid"]
        with Browser(f"{reloading.url}/events/web.silent?heartbeat=60") as browser:
            browser.wait_for(b"data: first\n\n")
            reloading.running.send(signal.SIGHUP)
            eventually(lambda: stats(reloading)["pid"] != former, PATIENCE)
            begin = time.monotonic()
            browser.leave()
        eventually(lambda: responder.left_at, PATIENCE, f"the handler runs on: {reloading.running!r}")
        assert responder.left_at[0] - begin < PATIENCE / 4
        with Browser(f"{reloading.url}/ping") as browser:
            assert browser.status == 200
