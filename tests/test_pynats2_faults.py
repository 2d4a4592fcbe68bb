"""What natsync mends of pynats2: how natsync behaves, and, in the release where it was found, the fault itself.

docs/pynats2.md lists the faults with the names of these tests.
"""

from __future__ import annotations

import importlib.metadata
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import natsync
from natsync import _pynats2
from natsync import subject as natsync_subject
from natsync.protocol import Op, RequestParser, Sub
from natsync.testing import NatsServer, PeerConnection, ScriptedPeer, eventually
from support import ROOT, natsync_threads

#: The release that the faults were found in; a later one may have mended them, which is no concern of this suite.
FAULTY = "0.9.0"

the_fault_itself = pytest.mark.skipif(
    importlib.metadata.version("pynats2") != FAULTY, reason=f"the faults are those of pynats2 {FAULTY}"
)


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "pynats2.md").read_text(encoding="utf-8")))
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 30
    assert not {name for name in named if f"def {name}(" not in written}


def run_strictly(code: str) -> str:
    """Run code in a fresh interpreter in which every warning is an error and pkg_resources does not exist."""
    prelude = f"""
import sys
sys.path[:] = {sys.path!r}
class NoPkgResources:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pkg_resources":
            raise ModuleNotFoundError("No module named 'pkg_resources'", name="pkg_resources")
sys.meta_path.insert(0, NoPkgResources())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + code], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


@contextmanager
def pynats2_client(url: str, **options: Any) -> Iterator[Any]:
    """A connected client of pynats2's own."""
    import pynats2  # natsync has made this possible

    client = pynats2.NATSClient(url, socket_timeout=5.0, **options)
    client.connect()
    try:
        yield client
    finally:
        client.close()


class Broker:
    """A script that plays a server: it answers PINGs, and keeps the clients' connections and what they subscribe to."""

    def __init__(self) -> None:
        self.links: list[PeerConnection] = []
        self.subs: list[Sub] = []
        self.pongs = 0

    def __call__(self, peer: PeerConnection) -> None:
        peer.send_info()
        self.links.append(peer)
        parser = RequestParser()
        while data := peer.sock.recv(65536):
            for request in parser.feed(data):
                if isinstance(request, Sub):
                    self.subs.append(request)
                elif request is Op.PING:
                    peer.send(b"PONG\r\n")
                elif request is Op.PONG:
                    self.pongs += 1

    @property
    def newest(self) -> PeerConnection:
        return eventually(lambda: self.links)[-1]

    def sid(self, subject: bytes) -> bytes:
        return eventually(lambda: [sub.sid for sub in self.subs if sub.subject == subject])[-1]


def reader_of(client: natsync.Client) -> threading.Thread:
    """The client's one reader thread."""
    name = client._core.name  # type: ignore[union-attr]
    (reader,) = [thread for thread in natsync_threads() if thread.name == f"{name}-reader"]
    return reader


# -- 1: it imports pkg_resources, which setuptools no longer has ------------------------------------------------------


@the_fault_itself
def test_pynats2_alone_cannot_be_imported_without_pkg_resources() -> None:
    code = "try:\n    import pynats2\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert run_strictly(code).strip() == "pkg_resources"


def test_natsync_is_imported_without_pkg_resources_and_without_a_warning() -> None:
    assert run_strictly("import natsync; print(natsync.Client)").strip() == "<class 'natsync.client.Client'>"


def test_nothing_is_left_of_the_stand_in_for_pkg_resources() -> None:
    code = """
import natsync
print("pkg_resources" in sys.modules)
try:
    import pkg_resources
except ModuleNotFoundError:
    print("still missing")
"""
    assert run_strictly(code).split("\n")[:2] == ["False", "still missing"]


def test_after_natsync_pynats2_itself_can_be_imported_and_used() -> None:
    # It asks for its own version whenever a client is made, long after the stand-in has left sys.modules.
    code = "import natsync, pynats2; print(pynats2.NATSClient('nats://127.0.0.1:4222')._conn_options['version'])"
    assert run_strictly(code).strip() == importlib.metadata.version("pynats2")


def test_a_real_pkg_resources_that_is_loaded_already_stays() -> None:
    code = """
import types
mine = types.ModuleType("pkg_resources")
mine.get_distribution = lambda name: types.SimpleNamespace(version="mine")
sys.modules["pkg_resources"] = mine
import natsync
print(sys.modules["pkg_resources"] is mine)
"""
    assert run_strictly(code).strip() == "True"


def test_a_failing_import_of_pynats2_leaves_no_stand_in_either() -> None:
    code = """
class NoPynats2:
    def find_spec(self, name, path=None, target=None):
        if name == "pynats2.nuid":
            raise ModuleNotFoundError("No module named 'pynats2.nuid'", name=name)
sys.meta_path.insert(0, NoPynats2())
try:
    import natsync
except ModuleNotFoundError as error:
    print(error.name, "pkg_resources" in sys.modules)
"""
    assert run_strictly(code).strip() == "pynats2.nuid False"


# -- 2: the end of the link is never noticed --------------------------------------------------------------------------


class EndedSocket:
    """A socket whose peer has closed; gives up the hundredth time that it is read past its end."""

    reads = 0

    def recv(self, size: int) -> bytes:
        self.reads += 1
        if self.reads == 100:
            raise KeyboardInterrupt
        return b""


@the_fault_itself
def test_pynats2_reads_on_past_the_end_of_the_link() -> None:
    client = _pynats2.NATSNoSubscribeClient("nats://127.0.0.1:4222")
    client._socket = EndedSocket()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        client._recv(_pynats2.INFO_RE)  # type: ignore[attr-defined]


def test_a_server_that_accepts_and_closes_is_noticed_by_connect() -> None:
    with ScriptedPeer(PeerConnection.close) as peer:
        begin = time.monotonic()
        with pytest.raises(natsync.NoServersError, match="closed the connection"):
            natsync.connect(peer.url, connect_timeout=10)
        assert time.monotonic() - begin < 5


def test_a_server_that_closes_later_is_noticed_and_its_reader_leaves() -> None:
    broker = Broker()
    closed = threading.Event()
    with ScriptedPeer(broker) as peer:
        client = natsync.connect(peer.url, reconnect=False, on_event=lambda name, _: name == "closed" and closed.set())
        reader = reader_of(client)
        broker.newest.sock.shutdown(socket.SHUT_RDWR)
        assert closed.wait(5)
        eventually(lambda: not reader.is_alive())
        client.close()


# -- 3: each subscribe, unsubscribe and request stops and restarts the reader -----------------------------------------


@the_fault_itself
def test_pynats2_replaces_its_reader_with_each_subscription(nats_server: NatsServer) -> None:
    with pynats2_client(nats_server.url) as client:
        before = client._waiter
        client.subscribe("restart", callback=print)
        assert client._waiter is not before


def test_one_reader_serves_any_number_of_subscriptions_and_requests(natsync_client: natsync.Client) -> None:
    natsync_client.subscribe("one.reader", lambda message: message.respond(message.data))
    natsync_client.open()
    reader = reader_of(natsync_client)
    for number in range(100):
        other = natsync_client.subscribe(f"one.reader.{number}")
        assert natsync_client.request("one.reader", b"%d" % number).data == b"%d" % number
        other.unsubscribe()
    assert reader_of(natsync_client) is reader


def test_a_request_is_not_a_subscription_of_its_own() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, natsync.connect(peer.url) as client:
        for _ in range(5):
            with pytest.raises(natsync.RequestTimeout):
                client.request("nobody", b"", timeout=0.01)
        client.flush()
        assert [sub.subject.endswith(b".*") for sub in broker.subs] == [True]


def test_eight_threads_of_requests_are_all_answered(nats_server: NatsServer, natsync_client: natsync.Client) -> None:
    answers: dict[int, list[bytes]] = {}

    def ask(thread: int) -> None:
        questions = [b"%d:%d" % (thread, number) for number in range(200)]
        answers[thread] = [natsync_client.request("echo.eight", question, timeout=10).data for question in questions]

    with natsync.connect(nats_server.url) as responder:
        responder.subscribe("echo.eight", lambda message: message.respond(message.data))
        responder.flush()
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert answers == {thread: [b"%d:%d" % (thread, number) for number in range(200)] for thread in range(8)}


def test_forty_streams_at_once_lose_nothing(natsync_client: natsync.Client, natsync_subscriber: Any) -> None:
    count, streams = 500, 40
    received: dict[int, list[bytes]] = {}

    @natsync_subscriber.stream("forty")
    def numbers(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        for number in range(count):
            yield b"%b:%d" % (request.data, number)

    def consume(stream: int) -> None:
        received[stream] = list(natsync_client.stream("forty", b"%d" % stream, timeout=30))

    natsync_subscriber.open()
    threads = [threading.Thread(target=consume, args=(number,)) for number in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert received == {one: [b"%d:%d" % (one, number) for number in range(count)] for one in range(streams)}


# -- 4: a message for a subscription that was just removed kills the reader -------------------------------------------


@the_fault_itself
def test_pynats2s_reader_dies_of_a_message_for_a_removed_subscription() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, pynats2_client(peer.url) as client:
        broker.newest.send(b"MSG s 99 2\r\nhi\r\n")
        eventually(lambda: not client._waiter.is_alive())


def test_a_message_for_a_removed_subscription_is_passed_over() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, natsync.connect(peer.url) as client:
        removed, kept = client.subscribe("removed"), client.subscribe("kept")
        gone, here = broker.sid(b"removed"), broker.sid(b"kept")
        reader = reader_of(client)
        removed.unsubscribe()
        broker.newest.send(b"MSG removed %b 2\r\nhi\r\nMSG kept %b 2\r\nho\r\n" % (gone, here))
        assert kept.next(timeout=5).data == b"ho"
        assert reader_of(client) is reader
        assert removed.delivered == 0


def test_chunks_that_come_after_a_stream_was_closed_harm_nothing(
    natsync_client: natsync.Client, natsync_subscriber: Any
) -> None:
    natsync_subscriber.stream("long")(lambda ctx, request: iter([b"chunk"] * 2000))
    natsync_subscriber.open()
    reader = None
    for _ in range(20):
        with natsync_client.stream("long", b"") as stream:
            assert stream.next(timeout=5) == b"chunk"
        reader = reader or reader_of(natsync_client)
    assert reader_of(natsync_client) is reader


# -- 5: -ERR and INFO after the handshake kill the reader -------------------------------------------------------------

UNEXPECTED = [b"-ERR 'Permissions Violation for Publish to \"x\"'\r\n", b'INFO {"connect_urls":[]}\r\n']


@the_fault_itself
@pytest.mark.parametrize("line", UNEXPECTED)
def test_pynats2s_reader_dies_of_errors_and_news_of_the_server(line: bytes) -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, pynats2_client(peer.url) as client:
        broker.newest.send(line)
        eventually(lambda: not client._waiter.is_alive())


@pytest.mark.parametrize("line", UNEXPECTED)
def test_errors_and_news_of_the_server_are_taken_at_any_moment(line: bytes) -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, natsync.connect(peer.url) as client:
        got = client.subscribe("s")
        sid = broker.sid(b"s")
        reader = reader_of(client)
        broker.newest.send(line + b"MSG s %b 2\r\nhi\r\n" % sid + line)
        assert got.next(timeout=5).data == b"hi"
        client.flush()
        assert reader_of(client) is reader


# -- 6: callbacks share a pool of three -------------------------------------------------------------------------------


@the_fault_itself
def test_pynats2_runs_three_callbacks_at_most_and_not_in_order(nats_server: NatsServer) -> None:
    release, begun = threading.Event(), []

    def callback(message: Any) -> None:
        begun.append(message.payload)
        release.wait(5)

    with pynats2_client(nats_server.url) as client:
        client.subscribe("three", callback=callback)
        for number in range(4):
            client.publish("three", payload=b"%d" % number)
        try:
            eventually(lambda: len(begun) == 3)  # the second began before the first had ended: no order
            eventually(lambda: client._workers._work_queue.qsize() == 1)  # and the fourth cannot begin
        finally:
            release.set()


def test_callbacks_of_a_subscription_keep_the_order_of_the_messages(natsync_client: natsync.Client) -> None:
    seen: list[int] = []

    def callback(message: natsync.Message) -> None:
        number = int(message.data)
        if number % 100 == 0:
            time.sleep(0.005)  # those behind it have time to overtake, if they can
        seen.append(number)

    natsync_client.subscribe("ordered", callback)
    for number in range(1000):
        natsync_client.publish("ordered", b"%d" % number)
    eventually(lambda: len(seen) == 1000)
    assert seen == list(range(1000))


def blocks_in(client: natsync.Client, subject: str, results: list[bytes]) -> Callable[[natsync.Message], None]:
    def callback(message: natsync.Message) -> None:
        results.append(client.request(subject, message.data, timeout=10).data)

    return callback


def test_a_dozen_requests_that_block_in_callbacks_do_not_keep_each_other_from_their_answers(
    natsync_client: natsync.Client,
) -> None:
    results: list[bytes] = []
    waiting: list[natsync.Message] = []

    def answer_the_dozen(message: natsync.Message) -> None:
        """No request is answered before all twelve have come."""
        waiting.append(message)
        if len(waiting) == 12:
            for one in waiting:
                one.respond(one.data)

    natsync_client.subscribe("dozen.answer", answer_the_dozen)
    for number in range(12):
        natsync_client.subscribe(f"dozen.{number}", blocks_in(natsync_client, "dozen.answer", results))
    for number in range(12):
        natsync_client.publish(f"dozen.{number}", b"%d" % number)
    eventually(lambda: len(results) == 12, 10)
    assert sorted(map(int, results)) == list(range(12))


def test_a_callback_that_blocks_does_not_stop_the_answers_to_pings() -> None:
    broker = Broker()
    release = threading.Event()
    with ScriptedPeer(broker) as peer, natsync.connect(peer.url) as client:
        client.subscribe("s", lambda message: release.wait(10))
        broker.newest.send(b"MSG s %b 0\r\n\r\n" % broker.sid(b"s") + b"PING\r\n")
        try:
            eventually(lambda: broker.pongs, message="no PONG while a callback blocks")
        finally:
            release.set()


# -- and one more: identifiers that repeat ----------------------------------------------------------------------------


@the_fault_itself
def test_pynats2s_generator_repeats_itself() -> None:
    generator: Any = _pynats2.NUID()
    # Both are values that a generator may come to by itself: the step is drawn from 33 to 333.
    generator._seq, generator._inc = 8 * 10**17, 62
    assert len({bytes(generator.next_()) for _ in range(1000)}) < 1000


def test_identifiers_of_natsync_do_not_share_a_generator() -> None:
    made = [natsync_subject.unique() for _ in range(5000)]
    assert len({one[:12] for one in made}) == 5000
    assert all(len(one) == 22 and one.isalnum() for one in made)
