"""Nothing starts before the first use, nothing is left after the last: threads, sockets, memory, processor time."""

from __future__ import annotations

import gc
import os
import signal
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import natsync
from natsync.connection import Connection
from natsync.testing import NatsServer, ScriptedPeer, eventually
from natsync.transport import Transport
from processes import child
from rawclient import PATIENCE, RawClient
from support import natsync_threads, run_python

Make = Callable[..., NatsServer]

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts sockets in /proc")


def sockets() -> set[str]:
    """The sockets that this process has open, by inode."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # the descriptor of the listing itself
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def alive(kind: type) -> int:
    """How many objects of the type there are."""
    gc.collect()
    return sum(type(one) is kind for one in gc.get_objects())


@pytest.fixture
def raw(nats_server: NatsServer) -> Iterator[RawClient]:
    with RawClient(nats_server.url) as raw:
        yield raw


def use(url: str) -> None:
    """A bit of everything, and close."""
    with natsync.Subscriber(url) as subscriber, natsync.Client(url) as client, natsync.ConnectionPool(url) as pool:
        subscriber.stream_subscribe("l.stream", lambda ctx, request: [b"1", b"2"])
        subscriber.handler("l.echo")(lambda ctx, request: request.data)
        client.subscribe("l.callback", lambda message: None)
        client.publish("l.callback", b"x")
        assert client.request("l.echo", b"x", timeout=PATIENCE).data == b"x"
        assert list(client.stream("l.stream", timeout=PATIENCE)) == [b"1", b"2"]
        client.stream("l.stream").close()
        assert pool.request("l.echo", b"x").data == b"x"


# -- before the first use ------------------------------------------------------------------------------------------


@needs_proc
def test_importing_starts_no_thread_opens_no_socket_and_says_nothing() -> None:
    code = """
import os, threading, warnings
warnings.simplefilter("error")
before = len(os.listdir("/proc/self/fd"))
import natsync
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
assert len(os.listdir("/proc/self/fd")) == before
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_loads_no_optional_package() -> None:
    optional = "{'flask', 'django', 'click', 'rich', 'requests', 'pytest', 'hypothesis', 'nats', 'asyncio'}"
    done = run_python(f"import sys\nimport natsync\nprint(sorted({optional} & set(sys.modules)))")
    assert done.stdout == "[]\n", done.stderr


@needs_proc
def test_constructors_start_no_thread_and_open_no_socket() -> None:
    threads, open_sockets = natsync_threads(), sockets()
    client = natsync.Client("nats://127.0.0.1:1")
    subscriber = natsync.Subscriber("nats://127.0.0.1:1")
    pool = natsync.ConnectionPool("nats://127.0.0.1:1")
    subscriber.stream("l.x")(lambda ctx, request: [])
    subscriber.handler("l.y")(lambda ctx, request: None)
    ctx = natsync.Context().with_cancel().with_value("k", "v")
    assert natsync_threads() == threads
    assert sockets() == open_sockets
    assert (client.status, subscriber.status, pool.stats()["size"], ctx.cancelled) == ("new", "new", 0, False)
    for one in (client, subscriber, pool):
        one.close()  # type: ignore[attr-defined]
    assert natsync_threads() == threads


# -- after the last use --------------------------------------------------------------------------------------------


@needs_proc
def test_close_returns_when_no_thread_and_no_socket_is_left(nats_server: NatsServer) -> None:
    threads, open_sockets = natsync_threads(), sockets()
    use(nats_server.url)
    eventually(lambda: natsync_threads() <= threads)  # the pool's helper may be about to leave
    eventually(lambda: sockets() == open_sockets)


@needs_proc
def test_100_connects_and_closes_leave_nothing(nats_server: NatsServer) -> None:
    before = natsync_threads()
    use(nats_server.url)
    eventually(lambda: natsync_threads() <= before)
    threads, open_sockets, connections = natsync_threads(), sockets(), alive(Connection)
    for _ in range(100):
        with natsync.connect(nats_server.url) as client:
            client.publish("l.x")
    eventually(lambda: natsync_threads() <= threads)
    eventually(lambda: sockets() == open_sockets)
    del client
    assert alive(Connection) <= connections


@needs_proc
def test_connects_that_fail_leave_nothing(make_nats_server: Make) -> None:
    server = make_nats_server()
    server.kill()
    threads, open_sockets = natsync_threads(), sockets()
    clients = [natsync.Client(server.url) for _ in range(20)]
    for client in clients:
        with pytest.raises(natsync.NoServersError):
            client.open()
    assert sockets() == open_sockets
    eventually(lambda: natsync_threads() <= threads)  # before anybody has closed anything


@needs_proc
def test_a_lost_link_leaves_no_socket(make_nats_server: Make) -> None:
    server = make_nats_server()
    open_sockets = sockets()
    with natsync.connect(server.url, reconnect_wait=0.02) as client:
        for restart in range(1, 4):
            server.kill()
            server.start()
            eventually(lambda restart=restart: client.stats()["reconnects"] == restart)
        assert len(sockets() - open_sockets) == 1
    assert sockets() == open_sockets


def test_the_timer_thread_ends_with_what_it_was_for(nats_server: NatsServer) -> None:
    before = natsync_threads()
    with natsync.Subscriber(nats_server.url) as subscriber, natsync.connect(nats_server.url) as client:
        subscriber.stream_subscribe("l.timer", lambda ctx, request: [b"x"])
        subscriber.handler("l.timer.reply")(lambda ctx, request: b"x")
        with natsync.Context().with_timeout(3600) as ctx:
            assert list(client.stream("l.timer", timeout=3600, ctx=ctx)) == [b"x"]
        client.request("l.timer.reply", timeout=3600, retry=natsync.Retry())
        client.stream("l.timer", timeout=3600).close()
    eventually(lambda: natsync_threads() <= before)


def test_streams_and_requests_with_long_timeouts_keep_no_context_alive(nats_server: NatsServer) -> None:
    with natsync.Subscriber(nats_server.url) as subscriber, natsync.connect(nats_server.url) as client:
        subscriber.stream_subscribe("l.contexts", lambda ctx, request: [b"x"])
        subscriber.handler("l.contexts.reply")(lambda ctx, request: b"x")
        kinds = (natsync.Context, natsync.HandlerContext)
        root = natsync.Context()
        before = sum(map(alive, kinds))
        for _ in range(30):
            assert list(client.stream("l.contexts", timeout=3600)) == [b"x"]
            assert list(client.stream("l.contexts", ctx=root.with_value("k", "v"), timeout=3600)) == [b"x"]
            client.request("l.contexts.reply", timeout=3600, retry=natsync.Retry(), ctx=root.with_value("k", "v"))
        eventually(lambda: subscriber.stats()["active"] == 0)
        eventually(lambda: sum(map(alive, kinds)) <= before + 3, message="contexts are kept alive")
        assert not root.cancelled


# -- objects that are dropped --------------------------------------------------------------------------------------


@needs_proc
def test_a_client_that_is_dropped_is_collected_and_closed(nats_server: NatsServer) -> None:
    threads, open_sockets = natsync_threads(), sockets()
    client = natsync.connect(nats_server.url)
    client.publish("l.x")
    gone = weakref.ref(client)
    del client
    gc.collect()
    assert gone() is None
    eventually(lambda: natsync_threads() <= threads)
    eventually(lambda: sockets() == open_sockets)


def test_what_a_dropped_client_had_published_is_sent(nats_server: NatsServer, raw: RawClient) -> None:
    raw.subscribe("l.dropped")
    client = natsync.connect(nats_server.url)
    for n in range(1000):
        client.publish("l.dropped", b"%d" % n)
    del client
    gc.collect()
    assert [raw.next().payload for _ in range(1000)] == [b"%d" % n for n in range(1000)]


def test_a_subscription_keeps_its_dropped_client_working(nats_server: NatsServer, raw: RawClient) -> None:
    before = natsync_threads()
    subscription = natsync.connect(nats_server.url).subscribe("l.kept")
    gc.collect()
    subscription._link.confirm(natsync.concurrency.Deadline.after(PATIENCE))  # type: ignore[attr-defined]
    raw.publish("l.kept", b"1")
    assert subscription.next(PATIENCE).data == b"1"
    del subscription
    gc.collect()
    eventually(lambda: natsync_threads() <= before)


def test_a_client_with_a_callback_lives_until_it_is_closed_although_it_was_dropped(nats_server: NatsServer) -> None:
    code = """
import gc, sys, threading
import natsync
from natsync.testing import eventually
ran = threading.Semaphore(0)
client = natsync.connect(sys.argv[1])
client.subscribe("l.callback", lambda message: ran.release())
client.flush()
del client
natsync.Subscriber(sys.argv[1]).stream_subscribe("l.handler", lambda ctx, request: [b"served"])
gc.collect()
with natsync.connect(sys.argv[1]) as other:
    for _ in range(3):
        gc.collect()
        other.publish("l.callback")
        assert ran.acquire(timeout=10)
        assert list(other.stream("l.handler", timeout=10)) == [b"served"]
print("fine")
"""
    done = run_python(code, nats_server.url)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_a_stream_that_is_dropped_is_collected(nats_server: NatsServer) -> None:
    with natsync.Subscriber(nats_server.url) as subscriber, natsync.connect(nats_server.url) as client:
        subscriber.stream_subscribe("l.stream", lambda ctx, request: [b"x"])
        streams = [client.stream("l.stream") for _ in range(3)]
        assert next(streams[0]) == b"x"
        assert list(streams[1]) == [b"x"]
        gone = [weakref.ref(stream) for stream in streams]
        del streams
        gc.collect()
        assert [one() for one in gone] == [None] * 3
        eventually(lambda: client.stats()["waiting_replies"] == 0)


# -- idle ----------------------------------------------------------------------------------------------------------


def test_an_idle_client_and_subscriber_use_no_processor_time(nats_server: NatsServer) -> None:
    with natsync.Subscriber(nats_server.url) as subscriber, natsync.connect(nats_server.url) as client:
        subscriber.stream_subscribe("l.idle", lambda ctx, request: ctx.wait(PATIENCE) or [])
        client.subscribe("l.idle.callback", lambda message: None)
        waiting = client.subscribe("l.idle.next")
        stream = client.stream("l.idle", timeout=60)
        client.flush()
        with ThreadPoolExecutor() as pool:
            pool.submit(waiting.next, 1.5).add_done_callback(lambda done: done.exception())
            pool.submit(stream.next, 1.5).add_done_callback(lambda done: done.exception())
            quiet = threading.Event()
            quiet.wait(0.1)
            before = time.process_time()
            quiet.wait(1.0)
            used = time.process_time() - before
            stream.close()
            waiting.unsubscribe()
    assert used < 0.02


def test_the_socket_of_a_server_that_closed_is_not_read_again_and_again(make_nats_server: Make) -> None:
    server = make_nats_server()
    with natsync.connect(server.url, reconnect_wait=30, reconnect_jitter=0) as client:
        server.kill()
        eventually(lambda: client.status == "reconnecting")
        before = time.process_time()
        threading.Event().wait(0.5)
        assert time.process_time() - before < 0.02


# -- closing at odd moments ----------------------------------------------------------------------------------------


def test_close_from_a_callback(nats_server: NatsServer) -> None:
    before = natsync_threads()
    client = natsync.connect(nats_server.url)
    closed = threading.Event()

    def callback(message: natsync.Message) -> None:
        client.close()
        closed.set()

    client.subscribe("l.closer", callback)
    client.publish("l.closer")
    assert closed.wait(PATIENCE)
    assert client.status == "closed"
    eventually(lambda: natsync_threads() <= before)


def test_close_from_an_event_callback(make_nats_server: Make) -> None:
    server = make_nats_server()
    before = natsync_threads()
    client = natsync.connect(server.url, on_event=lambda name, details: name == "disconnected" and client.close())
    server.kill()
    eventually(lambda: client.status == "closed")
    eventually(lambda: natsync_threads() <= before)


def test_close_twice_and_from_many_threads_at_once(nats_server: NatsServer) -> None:
    client = natsync.connect(nats_server.url)
    client.publish("l.x")
    together = threading.Barrier(8, timeout=PATIENCE)
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(lambda: (together.wait(), client.close())) for _ in range(8)]:
            done.result(PATIENCE)
    client.close()
    assert client.status == "closed"


def test_close_while_the_first_connect_is_under_way() -> None:
    arrived = threading.Event()

    def silent(peer: object) -> None:
        arrived.set()
        peer.hold()  # type: ignore[attr-defined]

    before = natsync_threads()
    with ScriptedPeer(silent) as peer:
        client = natsync.Client(peer.url, connect_timeout=30)
        with ThreadPoolExecutor() as pool:
            opening = pool.submit(client.open)
            assert arrived.wait(PATIENCE)
            begin = time.monotonic()
            client.close()
            with pytest.raises(natsync.ConnectionClosed):
                opening.result(4)
            assert time.monotonic() - begin < 4
        eventually(lambda: not [one for one in natsync_threads() - before if "peer" not in one.name])


def test_close_while_a_reconnect_is_under_way(make_nats_server: Make) -> None:
    server = make_nats_server()
    before = natsync_threads()
    client = natsync.connect(server.url, connect_timeout=30)
    server.pause()
    client._core._session.end(ConnectionError("the test cut the link"))  # type: ignore[union-attr]
    eventually(lambda: client.status == "reconnecting")  # and nobody answers the dial
    begin = time.monotonic()
    client.close()
    assert time.monotonic() - begin < 4
    eventually(lambda: natsync_threads() <= before)
    server.resume()


def test_close_while_others_publish_request_and_stream(nats_server: NatsServer) -> None:
    def hammer(verb: Callable[[], object], begun: threading.Semaphore) -> type[BaseException]:
        begun.release()
        while True:
            try:
                verb()
            except natsync.NoRespondersError:
                continue
            except natsync.NatsError as error:
                return type(error)

    for _ in range(5):
        client = natsync.connect(nats_server.url)
        begun = threading.Semaphore(0)
        verbs: list[Callable[[], object]] = [
            lambda client=client: client.publish("l.x", b"x" * 100),  # type: ignore[misc]
            lambda client=client: client.request("l.nobody"),  # type: ignore[misc]
            lambda client=client: list(client.stream("l.nobody")),  # type: ignore[misc]
            lambda client=client: client.subscribe("l.x").unsubscribe(),  # type: ignore[misc]
            lambda client=client: client.flush(),  # type: ignore[misc]
        ]
        with ThreadPoolExecutor(len(verbs)) as pool:
            ends = [pool.submit(hammer, verb, begun) for verb in verbs]
            for _ in verbs:
                assert begun.acquire(timeout=PATIENCE)
            client.close()
            kinds = {end.result(PATIENCE) for end in ends}
        assert kinds == {natsync.ConnectionClosed}


# -- the interpreter's end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "raise SystemExit", "1 / 0"], ids=repr)
def test_messages_published_just_before_the_interpreter_ends_arrive(
    nats_server: NatsServer, raw: RawClient, end: str
) -> None:
    raw.subscribe("l.exit")
    code = f"""
import sys
import natsync
client = natsync.connect(sys.argv[1])
client.subscribe("l.callback", lambda message: None)
for n in range(2000):
    client.publish("l.exit", str(n))
{end}
"""
    done = run_python(code, nats_server.url)
    assert done.returncode == (1 if end == "1 / 0" else 0), done.stderr
    assert [raw.next().payload for _ in range(2000)] == [b"%d" % n for n in range(2000)]


def test_the_interpreter_ends_although_the_server_does_not_answer(make_nats_server: Make) -> None:
    server = make_nats_server()
    code = """
import signal, sys
import natsync
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
client = natsync.connect(sys.argv[1])
print("connected", flush=True)
signal.sigwait({signal.SIGUSR1})
client.publish("l.x")
"""
    with child(sys.executable, "-c", code, server.url) as process:
        process.wait_for_out("connected")
        server.pause()
        process.send(signal.SIGUSR1)
        begin = time.monotonic()
        assert process.wait() == 0
        assert time.monotonic() - begin < 6
        server.resume()


WAITS = {
    "request": 'client.request("l.silent", timeout=60)',
    "next": 'client.subscribe("l.nothing").next()',
    "iterate": 'list(client.subscribe("l.nothing"))',
    "stream": 'next(client.stream("l.silent"))',
    "stream_request": 'client.stream_request("l.silent", b"", print)',
    "context": "natsync.Context().wait()",
    "pool": "pool = natsync.ConnectionPool(sys.argv[1], max_size=1); kept = pool.getconn(); pool.getconn(60)",
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_ctrl_c_ends_every_wait(nats_server: NatsServer, raw: RawClient, wait: str) -> None:
    raw.subscribe("l.silent")
    code = f"""
import sys, threading
import natsync
client = natsync.connect(sys.argv[1])
try:
    threading.Timer(0.1, print, ["waiting"], dict(flush=True)).start()
    {wait}
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    with child(sys.executable, "-c", code, nats_server.url) as process:
        process.wait_for_out("waiting")
        process.send(signal.SIGINT)
        assert process.wait() == 0  # and each of the waits is longer than this one's patience, but for Ctrl-C
        assert process.out[-1] == "interrupted"


def test_a_client_that_gave_up_and_is_left_over_at_the_exit_keeps_nobody_waiting(
    make_nats_server: Callable[..., NatsServer],
) -> None:
    server = make_nats_server()
    code = """
        import os, signal, sys, natsync
        from natsync.testing import eventually

        client = natsync.Client(sys.argv[1], reconnect=False).open()
        os.kill(int(sys.argv[2]), signal.SIGKILL)
        eventually(lambda: client.status == "closed")
        left_over = [client]
        left_over.append(left_over)
        print("leaving")
    """
    outcome = run_python(textwrap.dedent(code), server.url, str(server.pid), timeout=20)
    assert (outcome.returncode, outcome.stdout) == (0, "leaving\n"), outcome.stderr


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="a signal in the middle of a call needs POSIX")
def test_ctrl_c_in_force_reconnect_leaves_a_client_that_works(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutdown = Transport.shutdown

    def interrupted(transport: Transport) -> None:
        monkeypatch.setattr(Transport, "shutdown", shutdown)
        signal.pthread_kill(main, signal.SIGINT)
        eventually(raised.is_set)
        shutdown(transport)

    raised, main = threading.Event(), threading.main_thread().ident
    assert main is not None
    monkeypatch.setattr("natsync.links.LEAVE_SECONDS", 30.0)
    with natsync.connect(nats_server.url, reconnect_wait=0.02) as client:
        monkeypatch.setattr(Transport, "shutdown", interrupted)
        try:
            client.force_reconnect()
        except KeyboardInterrupt:
            raised.set()
        assert raised.is_set()
        eventually(lambda: client.stats()["reconnects"] == 1)
        client.flush()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="a signal in the middle of a call needs POSIX")
def test_a_close_that_ctrl_c_cuts_short_anywhere_is_finished_by_the_next(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_let_go", "_join"):
        method = getattr(Connection, name)

        def interrupted(connection: Connection, *args: object, name: str = name, method: Any = method) -> None:
            monkeypatch.setattr(Connection, name, method)
            raise KeyboardInterrupt

        client = natsync.connect(nats_server.url)
        monkeypatch.setattr(Connection, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.close()
        began = time.monotonic()
        client.close()
        assert time.monotonic() - began < 4  # not the whole five seconds of a wait for nobody
    eventually(lambda: not natsync_threads())


def test_what_waits_for_a_link_at_the_exit_is_told(make_nats_server: Callable[..., NatsServer]) -> None:
    server = make_nats_server()
    code = """
        import os, signal, sys, natsync
        from natsync.testing import eventually

        client = natsync.Client(sys.argv[1]).open()
        os.kill(int(sys.argv[2]), signal.SIGKILL)
        eventually(lambda: client.status == "reconnecting")
        client.publish("lost", b"x")
    """
    outcome = run_python(textwrap.dedent(code), server.url, str(server.pid), timeout=20)
    assert outcome.returncode == 0
    assert "1 messages were not sent before the exit" in outcome.stderr
