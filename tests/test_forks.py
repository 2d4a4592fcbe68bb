"""Forks: a child connects anew, the parent notices nothing, and no lock held at the fork does harm.

Each test runs a program of fork_programs.py in a process of its own, answers its requests, and looks at the server's
side of the matter: which connections there are, and what came over each.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import fork_programs
import natsync
from natsync.testing import NatsServer, PeerConnection, ScriptedPeer, eventually
from processes import Child, child
from support import run_python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")

PROGRAMS = Path(fork_programs.__file__)


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    """A server that tells of its connections."""
    with NatsServer(args=("-m", "-1")) as running:
        yield running


@pytest.fixture
def responder(server: NatsServer) -> Iterator[natsync.Subscriber]:
    """What the programs ask of."""
    release = threading.Event()
    subscriber = natsync.Subscriber(server.url)
    subscriber.handler("f.echo")(lambda ctx, request: request.data)

    @subscriber.stream("f.count")
    def count(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        for number in range(int(request.data)):
            yield b"%d" % number

    @subscriber.stream("f.hold.stream")
    def hold_stream(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"first"
        ctx.wait(60)

    @subscriber.handler("f.hold")
    def hold(ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
        release.wait(30)
        return b"held"

    @subscriber.handler("f.release")
    def let_go(ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
        release.set()
        return b"released"

    with subscriber:
        yield subscriber
        release.set()
        subscriber.close(0)


def runs_well(name: str, url: str, *options: str) -> None:
    """Run a program; its own assertions are the test."""
    command = [sys.executable, *options, str(PROGRAMS), name, url]
    path = [str(Path(natsync.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr[-8000:]


def connections(server: NatsServer) -> dict[int, dict[str, Any]]:
    """The server's open connections by their numbers."""
    address = urlsplit(server.ports["monitoring"][0])
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=5)
    try:
        connection.request("GET", "/connz?limit=1000")
        found = json.loads(connection.getresponse().read())["connections"]
    finally:
        connection.close()
    return {entry["cid"]: entry for entry in found}


# -- one child, and what is left to the parent -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "child_connects_anew",
        "requests_in_flight",
        "grandchild",
        "fork_in_a_thread",
        "fork_in_a_callback",
        "fork_in_a_handler",
        "child_returns_from_a_callback",
        "subscriber_of_the_parent",
        "pool_of_the_parent",
        "context_of_the_parent",
        "mark_that_is_not_wiped",
        "callback_that_fails",
    ],
)
def test_a_child_uses_its_own_connection_and_the_parent_goes_on(
    name: str, server: NatsServer, responder: natsync.Subscriber
) -> None:
    runs_well(name, server.url)


def test_nothing_of_a_child_comes_over_its_parents_connection() -> None:
    """Every byte of the parent's connection is the parent's, in order and once, though ten children left in between."""
    received: dict[int, bytes] = {}

    def script(peer: PeerConnection) -> None:
        peer.handshake()
        data = b""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                line = peer.recv_line()
                data += line + b"\r\n"
                if line == b"PING":
                    peer.send(b"PONG\r\n")
        received[peer.index] = data

    with ScriptedPeer(script) as peer:
        runs_well("publish_and_fork", f"nats://127.0.0.1:{peer.port}")
        eventually(lambda: len(received) == 11, 10)
    numbered = re.findall(rb"PUB f\.numbered \d+\r\n(\d+)\r\n", received[0])
    assert numbered == [b"%d" % number for number in range(100)]
    rest = re.sub(rb"PUB f\.numbered \d+\r\n\d+\r\n", b"", received[0])
    assert re.fullmatch(
        rb"(SUB _INBOX\.\S+  ?1|SUB f\.unused  ?2|UNSUB 2|PING)(\r\n(UNSUB 2|SUB f\.unused  ?2|PING))*\r\n", rest
    )
    for index in range(1, 11):
        assert len(re.findall(rb"PUB f\.child \d+\r\n\d+\r\n", received[index])) == 1
        assert b"f.numbered" not in received[index]
        assert b"f.unused" not in received[index]


def test_a_child_holds_no_socket_of_its_parent(server: NatsServer, responder: natsync.Subscriber) -> None:
    runs_well("child_holds_no_socket", server.url)


@pytest.mark.parametrize("name", ["child_outlives_its_parent", "subprocess_outlives_its_parent"])
def test_no_other_process_holds_the_parents_socket(name: str, server: NatsServer) -> None:
    """When the parent is killed its connection ends at the server, although its child lives on."""
    with child(sys.executable, str(PROGRAMS), name, server.url) as parent:
        eventually(lambda: parent.out, 20, f"nothing from {parent!r}")
        number, pid = map(int, parent.out[0].split())
        try:
            assert number in connections(server)
            os.kill(parent.process.pid, signal.SIGKILL)
            eventually(lambda: number not in connections(server), 10)
            os.kill(pid, 0)  # it is alive: otherwise this shows nothing
        finally:
            os.kill(pid, signal.SIGKILL)


def test_the_parents_connection_stays_the_same_at_the_server(server: NatsServer, responder: natsync.Subscriber) -> None:
    eventually(lambda: len(connections(server)) == 1, 10)
    before = connections(server)
    runs_well("prefork_without_exec", server.url)
    eventually(lambda: connections(server).keys() <= before.keys(), 10)


# -- locks -------------------------------------------------------------------------------------------------------------


def test_no_verb_of_a_parents_object_waits_in_the_child_whatever_locks_were_held(
    server: NatsServer, responder: natsync.Subscriber
) -> None:
    runs_well("every_verb_with_all_locks_held", server.url)


def test_a_child_leaves_its_parents_blocks_whatever_locks_were_held(
    server: NatsServer, responder: natsync.Subscriber
) -> None:
    runs_well("fork_inside_blocks", server.url)


def test_forks_under_load_harm_neither_side(server: NatsServer, responder: natsync.Subscriber) -> None:
    """Threads publish, request, stream, subscribe, lend and cancel while the process forks 30 times."""
    runs_well("fork_under_load", server.url)


# -- who else forks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing_work_and_lose_nothing(
    method: str, server: NatsServer, responder: natsync.Subscriber
) -> None:
    """Also what they published last, though multiprocessing's children leave without Python's exit handlers."""
    runs_well(f"multiprocessing_{method}", server.url)


def test_what_is_to_be_done_at_the_exit_of_a_child_of_multiprocessing_is_done_once(server: NatsServer) -> None:
    """Whether its exit handlers are run or not, and in a child's child too."""
    runs_well("multiprocessing_exit", server.url)


def test_a_process_pool_executor_works(server: NatsServer, responder: natsync.Subscriber) -> None:
    runs_well("process_pool_executor", server.url)


def test_a_master_that_loads_the_application_forks_workers_with_threads(
    server: NatsServer, responder: natsync.Subscriber
) -> None:
    runs_well("prefork_without_exec", server.url)


def test_a_fork_that_python_is_not_told_of_is_noticed(server: NatsServer, responder: natsync.Subscriber) -> None:
    runs_well("fork_untold", server.url)


def test_a_fork_before_the_first_use_is_nothing_to_warn_of(server: NatsServer, responder: natsync.Subscriber) -> None:
    """Python 3.12 and later warn when a process with threads forks: here an error, were there a thread."""
    runs_well("fork_before_use", server.url, "-W", "error")


IDLE = """
import threading
before = threading.enumerate()
import natsync
client = natsync.Client("nats://127.0.0.1:1")
subscriber = natsync.Subscriber("nats://127.0.0.1:1")
pool = natsync.ConnectionPool("nats://127.0.0.1:1")
subscriber.handler("a")(lambda ctx, request: b"")
subscriber.stream("b")(lambda ctx, request: iter(()))
objects = natsync.Context(), natsync.Context().with_cancel(), natsync.Retry(), natsync.ConnectOptions()
assert threading.enumerate() == before == [threading.main_thread()]
print("fine")
"""


def test_importing_and_constructing_start_no_thread() -> None:
    done = run_python(IDLE)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


# -- gunicorn ----------------------------------------------------------------------------------------------------------

APPLICATION = """
import json, os
import natsync

client = natsync.Client()
if os.environ["USED_BEFORE"] == "yes":
    client.request("f.echo", b"master")
    first = client.server_info["client_id"]
else:
    first = None

def application(environ, start_response):
    data = os.urandom(8).hex().encode()
    assert client.request("f.echo", data).data == data
    with client.stream("f.count", b"3", timeout=10) as stream:
        chunks = [chunk.decode() for chunk in stream]
    body = {"pid": os.getpid(), "cid": client.server_info["client_id"], "first": first, "chunks": chunks}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(body).encode()]
"""


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a socket of the file system, so that no port is needed."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Gunicorn:
    """A running gunicorn with two workers, asked over HTTP."""

    def __init__(self, running: Child, path: Path) -> None:
        self.running = running
        self.path = path

    def get(self) -> dict[str, Any]:
        connection = UnixConnection(self.path)
        try:
            connection.request("GET", "/", headers={"Connection": "close"})
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200, (response.status, body, self.running)
            answer: dict[str, Any] = json.loads(body)
            assert answer["chunks"] == ["0", "1", "2"]
            return answer
        finally:
            connection.close()

    def workers(self, gone: Collection[int] = ()) -> dict[int, int]:
        """Ask until two workers have answered that are not among those gone: process id -> connection's number."""
        found: dict[int, int] = {}

        def both() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):  # a worker that is being replaced
                answer = self.get()
                assert answer["cid"] != answer["first"], "a worker uses its master's connection"
                if answer["pid"] not in gone:
                    found[answer["pid"]] = answer["cid"]
            return len(found) >= 2

        eventually(both, 20, f"not two workers: {self.running!r}")
        return found


@contextlib.contextmanager
def gunicorn(kind: str, used: str, server: NatsServer, directory: Path) -> Iterator[Gunicorn]:
    (directory / "prefork_app.py").write_text(APPLICATION)
    path = directory / "g.sock"
    command = [sys.executable, "-m", "gunicorn", "--preload", "-w", "2", "-k", kind, "--threads", "4", "--bind"]
    command += [f"unix:{path}", "--graceful-timeout", "5", "--chdir", str(directory), "prefork_app"]
    if kind == "sync":
        del command[command.index("--threads") : command.index("--threads") + 2]
    with child(
        *command, url=server.url, cwd=directory, env={"USED_BEFORE": used, "XDG_RUNTIME_DIR": str(directory)}
    ) as running:
        eventually(path.exists, 20, f"gunicorn does not listen: {running!r}")
        yield Gunicorn(running, path)
        running.send(signal.SIGTERM)
        assert running.wait() == 0, running
    trouble = [line for line in running.err if re.search(r"Traceback|Error|Exception|SIGABRT|TIMEOUT", line)]
    assert not trouble, running.err


@pytest.mark.slow
@pytest.mark.parametrize("used", ["no", "yes"], ids=["only-imported", "used-before"])
@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_gunicorn_preloads_a_client_that_every_worker_uses(
    kind: str, used: str, server: NatsServer, responder: natsync.Subscriber, tmp_path: Path
) -> None:
    """Through the fork, a reload by SIGHUP, and a worker that is killed."""
    with gunicorn(kind, used, server, tmp_path) as web:
        first = web.workers()
        assert len(set(first.values())) == 2
        web.running.send(signal.SIGHUP)
        second = web.workers(gone=first)
        victim = next(iter(second))
        os.kill(victim, signal.SIGKILL)
        third = web.workers(gone={*first, victim})
        numbers = [*first.values(), *second.values(), *third.values()]
        assert len({*first, *second, *third}) == len(set(numbers))  # a connection each, and only one
        eventually(lambda: not set(first.values()) & set(connections(server)), 20)  # those that left have closed theirs
