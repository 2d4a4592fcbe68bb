"""The examples, each run as its docstring says, against a real nats-server."""

from __future__ import annotations

import json
import re
import signal
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import natsync
from natsync.testing import NatsServer, eventually
from processes import NATSYNC, PATIENCE, Child, child, run
from support import ROOT
from web_servers import serving

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"


@pytest.fixture
def server(make_nats_server) -> NatsServer:
    """A server of the test's own: examples use fixed subjects."""
    return make_nats_server()


@pytest.fixture
def client(server: NatsServer) -> Iterator[natsync.Client]:
    with natsync.Client(server.url) as client:
        yield client


def run_example(name: str, server: NatsServer) -> list[str]:
    result = run(sys.executable, name, url=server.url, cwd=EXAMPLES)
    assert result.process.returncode == 0, result
    return result.out


def wait_until_served(client: natsync.Client, subject: str) -> None:
    def served() -> bool:
        try:
            client.request(subject, timeout=PATIENCE)
        except natsync.NoRespondersError:
            return False
        return True

    eventually(served, PATIENCE)


def test_every_example_has_a_test() -> None:
    source = (ROOT / "tests" / "test_examples.py").read_text()
    missing = [path.name for path in EXAMPLES.glob("*.py") if not re.search(rf'"{path.stem}(\.py)?"', source)]
    assert missing == []


def test_request(server: NatsServer) -> None:
    out = run_example("request.py", server)
    assert out[0] == "20 + 22 = 42"
    assert out[1] == "without b: KeyError: 'b'"
    assert out[2].startswith("elsewhere: no responders")


def test_stream_break(server: NatsServer) -> None:
    assert run_example("stream_break.py", server) == [
        *(f"got {number}" for number in range(10, 15)),
        "the handler has stopped: True",
    ]


def test_threads_one_sender(server: NatsServer) -> None:
    *pieces, summary = run_example("threads_one_sender.py", server)
    assert sorted(pieces) == [f"thread {thread} piece {piece}" for thread in range(4) for piece in range(5)]
    assert summary == "20 pieces from 4 threads"


def test_retry(server: NatsServer) -> None:
    assert run_example("retry.py", server) == ["the report, after 3 tries"]


def test_middleware_auth(server: NatsServer) -> None:
    assert run_example("middleware_auth.py", server) == [
        "alice says hello",
        "['0 for alice', '1 for alice']",
        "a stranger's request: the signature is missing or wrong (UNAUTHENTICATED)",
        "a stranger's stream: the signature is missing or wrong (UNAUTHENTICATED)",
    ]


def test_middleware_compression(server: NatsServer) -> None:
    packed, plain = run_example("middleware_compression.py", server)
    sizes = "chunks of [10500, 10500, 10500] bytes, of which"
    found = re.fullmatch(re.escape(sizes) + r" (\d+) were on the wire", packed)
    assert found is not None, packed
    assert 0 < int(found[1]) < 1000
    assert plain == f"{sizes} 31500 were on the wire"


@pytest.mark.parametrize("command", [(*NATSYNC, "serve", "worker"), (sys.executable, "worker.py")])
def test_worker(server: NatsServer, client: natsync.Client, command: tuple[str, ...]) -> None:
    with child(*command, url=server.url, cwd=EXAMPLES) as worker:
        wait_until_served(client, "words.count")
        with client.stream("words.upper", "one by one", timeout=PATIENCE) as stream:
            assert list(stream) == [b"ONE", b"BY", b"ONE"]
        assert client.request("words.count", "one by one", timeout=PATIENCE).json() == {"words": 3}
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0, worker


# -- a slow HTTP API -----------------------------------------------------------------------------------------


class SlowApi:
    """An HTTP service that sends a line, waits to be told, and sends the next."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.reader_left = threading.Event()


@contextmanager
def slow_api() -> Iterator[tuple[SlowApi, str]]:
    api = SlowApi()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"first of {self.path}\n".encode())
            if self.path == "/stalls":
                self.connection.settimeout(PATIENCE)
                if self.connection.recv(1) == b"":  # nothing follows a request but the reader's end
                    api.reader_left.set()
                return
            api.go_on.wait(PATIENCE)
            self.wfile.write(b"second\n")

        def log_message(self, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving = threading.Thread(target=http.serve_forever, args=(0.02,))
    serving.start()
    try:
        yield api, f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        serving.join()
        http.server_close()


@contextmanager
def third_party_worker(server: NatsServer, api_url: str) -> Iterator[Child]:
    command = (*NATSYNC, "serve", "third_party_worker")
    with child(*command, url=server.url, cwd=EXAMPLES, env={"THIRD_PARTY_URL": api_url}) as worker:
        worker.wait_for_err("third.party")
        yield worker


def test_third_party_worker_forwards_each_line_when_it_is_there(server: NatsServer, client: natsync.Client) -> None:
    with slow_api() as (api, api_url), third_party_worker(server, api_url):
        with client.stream("third.party", "/some/path", timeout=PATIENCE) as stream:
            assert next(stream) == b"first of /some/path"
            api.go_on.set()  # only now: the first line cannot have waited for the second
            assert list(stream) == [b"second"]


def test_third_party_worker_stops_a_blocked_read_when_the_client_leaves(
    server: NatsServer, client: natsync.Client
) -> None:
    with slow_api() as (api, api_url), third_party_worker(server, api_url):
        with client.stream("third.party", "/stalls", timeout=PATIENCE) as stream:
            assert next(stream) == b"first of /stalls"
        assert api.reader_left.wait(PATIENCE)


# -- Flask ---------------------------------------------------------------------------------------------------


@contextmanager
def flask_app(server: NatsServer) -> Iterator[str]:
    command = (sys.executable, "-m", "flask", "--app", "flask_sse", "run", "--port", "0")
    with child(*command, url=server.url, cwd=EXAMPLES) as app:
        app.wait_for_err("Running on")
        found = re.search(r"http://[\d.:]+", "\n".join(app.err))
        assert found is not None
        yield found[0]


def test_flask_sse_turns_chunks_into_events(server: NatsServer, client: natsync.Client) -> None:
    with natsync.Subscriber(server.url) as subscriber:

        @subscriber.stream("words.upper")
        def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
            yield request.text().upper()
            yield "two\nlines"

        with (
            flask_app(server) as base,
            urllib.request.urlopen(f"{base}/upper?text=one", timeout=PATIENCE) as page,
        ):
            assert page.headers["Content-Type"].startswith("text/event-stream")
            assert page.read() == b": stream\n\ndata: ONE\n\ndata: two\ndata: lines\n\nevent: end\ndata: \n\n"


def test_flask_sse_cancels_the_stream_when_the_browser_leaves(server: NatsServer) -> None:
    stopped = threading.Event()
    with natsync.Subscriber(server.url) as subscriber:

        @subscriber.stream("words.upper")
        def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
            try:
                while not ctx.wait(0.02):
                    yield "again"
            finally:
                stopped.set()

        with flask_app(server) as base:
            host, _, port = base.removeprefix("http://").partition(":")
            with socket.create_connection((host, int(port)), timeout=PATIENCE) as browser:
                browser.sendall(b"GET /upper?text=x HTTP/1.1\r\nHost: here\r\n\r\n")
                while b"data: again" not in browser.recv(65536):
                    pass
            assert stopped.wait(PATIENCE)


# -- gunicorn's settings and Celery, see also test_flask_browser.py ------------------------------------------


@pytest.mark.parametrize("settings", ["gunicorn.conf.py", "gunicorn_gevent.conf.py"])
def test_gunicorn_streams_to_many_at_once(server: NatsServer, settings: str) -> None:
    with natsync.Subscriber(server.url) as subscriber:

        @subscriber.stream("words.upper")
        def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
            yield from request.text().upper().split()

        def events(number: int) -> bytes:
            with urllib.request.urlopen(f"{web.url}/upper?text=one+{number}", timeout=PATIENCE) as page:
                body: bytes = page.read()
                return body

        # The address that serving() binds has precedence over the file's.
        with (
            serving("gunicorn", "flask_sse:app", "--config", settings, url=server.url, cwd=EXAMPLES) as web,
            ThreadPoolExecutor(8) as browsers,
        ):
            answers = list(browsers.map(events, range(40)))
        assert answers == [
            b": stream\n\ndata: ONE\n\ndata: %d\n\nevent: end\ndata: \n\n" % number for number in range(40)
        ]


def test_celery_task(server: NatsServer, client: natsync.Client) -> None:
    with child(*NATSYNC, "serve", "worker", url=server.url, cwd=EXAMPLES):
        wait_until_served(client, "words.count")
        assert run_example("celery_task.py", server) == ["ONE PIECE AFTER THE OTHER"]


def words_of(result: Path) -> list[str] | None:
    """What a task has returned; None while there is nothing, or only a part of it, or a retry."""
    try:
        task = json.loads(result.read_text())
    except (FileNotFoundError, ValueError):
        return None
    assert task["status"] != "FAILURE", task
    words: list[str] | None = task["result"]["words"] if task["status"] == "SUCCESS" else None
    return words


@pytest.mark.timeout(180)
def test_celery_task_in_processes_that_a_worker_has_forked(
    server: NatsServer, client: natsync.Client, tmp_path: Path
) -> None:
    folders = {name: str(tmp_path) for name in ("data_folder_in", "data_folder_out", "control_folder")}
    env = {
        "CELERY_BROKER_URL": "filesystem://",
        "CELERY_TRANSPORT_OPTIONS": json.dumps(folders),
        "CELERY_RESULT_BACKEND": f"file://{tmp_path}",
    }
    ask = "import celery_task as c; print(*(c.upper.delay(f'one {n}').id for n in range(8)), sep='\\n')"
    command = (sys.executable, "-m", "celery", "--app", "celery_task", "worker", "--concurrency", "2")
    with child(*NATSYNC, "serve", "worker", url=server.url, cwd=EXAMPLES):
        wait_until_served(client, "words.count")
        # Celery's transport by files takes one that is not written yet for a message: so all are there before it looks.
        asked = run(sys.executable, "-c", ask, url=server.url, cwd=EXAMPLES, env=env)
        assert len(asked.out) == 8, asked
        with child(*command, "--without-gossip", "--without-mingle", url=server.url, cwd=EXAMPLES, env=env) as celery:
            results = [tmp_path / f"celery-task-meta-{one}" for one in asked.out]
            eventually(lambda: all(map(words_of, results)), 90)
            assert [words_of(one) for one in results] == [["ONE", str(number)] for number in range(8)]
            celery.send(signal.SIGTERM)
            assert celery.wait() == 0, celery
