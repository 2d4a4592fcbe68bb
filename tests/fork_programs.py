"""Programs that fork, each run in a process of its own: `python fork_programs.py NAME URL`.

test_forks.py runs them, and answers what they ask. A program that finds a fault raises; a child that hangs shows where
and dies, so that the program fails too.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import ctypes
import faulthandler
import gc
import logging
import multiprocessing
import os
import signal
import socket
import stat
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.queues import SimpleQueue
from typing import Any

import natsync
from natsync import concurrency
from natsync.concurrency import Signal
from natsync.testing import eventually
from support import thread_frames

#: Seconds that a child may take.
LIMIT = 20
#: Seconds that one verb of a parent's object may take in the child. None of them waits for what the parent had.
VERB_LIMIT = 4.5
#: Forks under load.
FORKS = int(os.environ.get("NATSYNC_FORKS", "30"))

Program = Callable[[str], None]


def forked(function: Callable[[], object], *, leave: Callable[[int], Any] = os._exit, limit: int = LIMIT) -> int:
    """Fork; the child calls the function and leaves. Returns the child's process id, in the parent."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(limit)
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    leave(status)
    raise AssertionError("the child goes on")


def join(*pids: int) -> None:
    """Wait for children, all of which must have ended well."""
    ended = {pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids}
    assert set(ended.values()) <= {0}, f"children ended with {ended}"


def works(client: natsync.Client, what: str = "child") -> None:
    """Use the client in every way."""
    data = f"{what} {os.getpid()}".encode()
    client.publish("f.anything", data)
    assert client.request("f.echo", data, timeout=10).data == data
    assert list(client.stream("f.count", b"3", timeout=10)) == [b"0", b"1", b"2"]
    with client.subscribe("f.own." + str(os.getpid())) as subscription:
        client.publish(subscription.subject, data)
        assert subscription.next(10).data == data
    client.flush()


def client_id(client: natsync.Client) -> int:
    client.flush()
    number: int = client.server_info["client_id"]
    return number


# -- one child, and what is left to the parent -----------------------------------------------------------------------


def child_connects_anew(url: str) -> None:
    client = natsync.connect(url)
    works(client, "before")
    number, inbox = client_id(client), client._connection().mux.inbox

    def child() -> None:
        assert client.status == "new"
        works(client)
        assert client_id(client) != number
        assert client._connection().mux.inbox != inbox
        client.close()

    join(forked(child))
    assert client_id(client) == number
    assert client.stats()["reconnects"] == 0
    works(client, "after")
    client.close()


def publish_and_fork(url: str) -> None:
    """Numbered messages from the parent; its children leave in the ordinary way, exit handlers included."""
    client = natsync.connect(url)
    subscription = client.subscribe("f.unused")
    for number in range(100):
        client.publish("f.numbered", b"%d" % number)
        if number % 10 == 5:
            # Their messages go over connections of their own, and are not lost although nobody flushes.
            pid = forked(lambda: client.publish("f.child", b"%d" % os.getpid()), leave=sys.exit)
            join(pid)
    subscription.unsubscribe()
    client.close()


def requests_in_flight(url: str) -> None:
    client = natsync.connect(url)
    answers: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.request("f.hold", timeout=15).data)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: client.stats()["waiting_replies"] == 8, 10)
    join(*(forked(lambda: works(client)) for _ in range(3)))
    assert client.request("f.release", timeout=10).data == b"released"
    for thread in threads:
        thread.join(15)
    assert answers == [b"held"] * 8
    client.close()


def grandchild(url: str) -> None:
    client = natsync.connect(url)
    numbers = [client_id(client)]

    def child() -> None:
        numbers.append(client_id(client))

        def second() -> None:
            numbers.append(client_id(client))
            works(client)
            assert len(set(numbers)) == 3
            client.close()

        join(forked(second))
        assert client_id(client) == numbers[1]
        works(client)
        client.close()

    join(forked(child))
    assert client_id(client) == numbers[0]
    client.close()


def _sockets() -> set[int]:
    """The descriptors of this process that are sockets."""
    found = set()
    for number in range(256):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                found.add(number)
    return found


def child_holds_no_socket(url: str) -> None:
    """Not one of a link, nor of a pool, nor one that is just being dialed."""
    before = _sockets()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client, pool = natsync.connect(url), natsync.ConnectionPool(url)
        pool.wait()
        dialing = natsync.Client(f"nats://127.0.0.1:{silent.getsockname()[1]}", retry_on_failed_connect=True)
        dialing.publish("f.x", b"")
        accepted, _ = silent.accept()
        with accepted:
            assert len(_sockets() - before) == 2 + 1 + 1 + 4  # two here, and natsync's: dialing, client, pool

            def child() -> None:
                left = _sockets() - before - {silent.fileno(), accepted.fileno()}
                assert not left, left

            join(forked(child))
            works(client)
        dialing.close(0)
    pool.close()
    client.close()


def child_outlives_its_parent(url: str) -> None:
    """The parent is killed by the test; its child, which holds nothing of the connection, stays."""
    client = natsync.connect(url)
    client.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # never longer, whatever becomes of the test
        while True:
            signal.pause()
    print(client_id(client), pid, flush=True)
    signal.alarm(60)
    signal.pause()


def subprocess_outlives_its_parent(url: str) -> None:
    import subprocess

    client = natsync.connect(url)
    client.flush()
    process = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
    print(client_id(client), process.pid, flush=True)
    signal.alarm(60)
    signal.pause()


# -- where the fork happens --------------------------------------------------------------------------------------------


def fork_in_a_thread(url: str) -> None:
    client = natsync.connect(url)
    works(client, "before")
    failures: list[BaseException] = []

    def thread() -> None:
        try:
            join(forked(lambda: works(client)))
        except BaseException as error:
            failures.append(error)

    forking = threading.Thread(target=thread)
    forking.start()
    forking.join(LIMIT)
    assert not forking.is_alive()
    assert not failures, failures[0]
    works(client, "after")
    client.close()


def fork_in_a_callback(url: str) -> None:
    client = natsync.connect(url)
    done: list[str] = []

    def callback(message: natsync.Message) -> None:
        def child() -> None:
            works(client)
            expect_fork_error(lambda: message.respond(b"from the child"))

        join(forked(child))
        done.append(message.text())

    client.subscribe("f.fork", callback)
    for number in range(3):
        client.publish("f.fork", str(number), reply="f.nobody")
    eventually(lambda: done == ["0", "1", "2"], LIMIT)
    works(client, "after")
    client.close()


def fork_in_a_handler(url: str) -> None:
    """Of a stream and of a request; the children's copies of sender and context are of no use, and do no harm."""
    client = natsync.connect(url)
    subscriber = natsync.Subscriber(url)

    def stream(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        def child() -> None:
            works(client)
            expect_fork_error(lambda: sender.send(b"from the child"))
            expect_fork_error(sender.end)
            assert not ctx.cancelled
            ctx.cancel("in the child only")

        sender.send(b"before")
        join(forked(child))
        sender.send(b"after")
        sender.end()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
        join(forked(lambda: works(client)))
        return b"forked"

    with subscriber:
        subscriber.stream_subscribe("f.fork.stream", stream)
        subscriber.handler("f.fork.request")(handler)
        for _ in range(2):
            assert list(client.stream("f.fork.stream", timeout=LIMIT)) == [b"before", b"after"]
            assert client.request("f.fork.request", timeout=LIMIT).data == b"forked"
    client.close()


def child_returns_from_a_callback(url: str) -> None:
    """The rest of the parent's messages are not the child's, even if it does not leave by itself."""
    client = natsync.connect(url)
    reading, writing = os.pipe()
    begun = threading.Event()
    pids: list[int] = []

    def callback(message: natsync.Message) -> None:
        os.write(writing, message.data + b"\n")
        if message.data == b"0":
            begun.wait(LIMIT)
            pids.append(os.fork())

    subscription = client.subscribe("f.returns", callback)
    for number in range(5):
        client.publish("f.returns", str(number))
    eventually(lambda: subscription.pending == 4, LIMIT)
    begun.set()
    eventually(lambda: subscription.delivered == 5 and not subscription.pending, LIMIT)
    eventually(lambda: os.waitpid(pids[0], os.WNOHANG)[0], LIMIT / 2, "the child works on as its parent's worker")
    client.close()
    os.close(writing)
    with open(reading, "rb") as pipe:
        lines = pipe.read().split()
    assert lines == [b"0", b"1", b"2", b"3", b"4"], lines


def fork_inside_blocks(url: str) -> None:
    """The child leaves every `with` block that its parent entered, by an exception, while all locks are held."""
    client = natsync.connect(url)
    subscriber = natsync.Subscriber(url)
    pool = natsync.ConnectionPool(url, max_size=4)
    root = natsync.Context()

    def processor(message: natsync.Message) -> None:
        with all_locks_held():
            pids.append(os.fork())
        if pids[-1] == 0:
            raise SystemExit(0)

    pids: list[int] = []
    try:
        with client, subscriber, root.with_timeout(60) as ctx, pool, pool.connection() as lent:
            with client.subscribe("f.block") as subscription, client.stream("f.hold.stream", ctx=ctx) as stream:
                assert stream.next(10) == b"first"
                lent.flush()
                with pool.connection(), pool.stream("f.hold.stream", timeout=60) as other:
                    pass
                client.stream_request("f.count", b"3", processor, client_id="one", ctx=ctx)
                assert subscription.active
                assert not stream.stats["gaps"]
                assert other is not stream
    except SystemExit:
        if pids[-1] == 0:
            sys.stderr.flush()
            os._exit(0)
        raise
    join(*pids)
    assert len(pids) == 4


# -- locks that are held at the fork -----------------------------------------------------------------------------------


def _locks() -> list[Any]:
    """Every lock that an object of natsync has, but for those that are signals."""
    kind = type(threading.Lock())
    found: dict[int, Any] = {}
    for candidate in gc.get_objects():
        if not type(candidate).__module__.startswith("natsync") or isinstance(candidate, Signal | type):
            continue
        slots = [name for cls in type(candidate).__mro__ for name in getattr(cls, "__slots__", ())]
        for name in [*getattr(candidate, "__dict__", {}), *slots]:
            value = getattr(candidate, name, None)
            if isinstance(value, kind):
                found[id(value)] = value
    return list(found.values())


@contextmanager
def all_locks_held() -> Iterator[int]:
    """What the worst moment for a fork is: every lock of natsync is in somebody's hands. How many they are."""
    held, process = [lock for lock in _locks() if lock.acquire(timeout=0.2)], os.getpid()
    try:
        yield len(held)
    finally:
        for lock in held if os.getpid() == process else ():  # nobody gives them back in a child
            lock.release()


def every_verb_with_all_locks_held(url: str) -> None:
    """Each public verb of each of the parent's objects, in the child: it works or raises ForkError, and never waits."""
    logging.basicConfig(level=logging.DEBUG, handlers=[logging.NullHandler()])
    objects = _Objects(url)
    with all_locks_held() as count:
        pid = forked(lambda: _try_verbs(objects.verbs()), limit=2 * LIMIT)
    assert count > 30, f"only {count} locks were found"
    join(pid)
    objects.check()


class _Objects:
    """One of each that natsync makes, in use."""

    def __init__(self, url: str) -> None:
        self.client = natsync.connect(url)
        self.subscriber = natsync.Subscriber(url)
        self.pool = natsync.ConnectionPool(url, max_size=4)
        self.root = natsync.Context()
        self.ctx = self.root.with_timeout(60)
        self.child_ctx = self.ctx.with_cancel()
        self.calls: list[str] = []
        self.remove = self.ctx.on_cancel(lambda: self.calls.append("on_cancel"))
        self.message: natsync.Message | None = None
        self.sender: natsync.ResponseSender | None = None
        self.handler_ctx: natsync.HandlerContext | None = None
        self.begun, self.over = threading.Event(), threading.Event()
        self.subscriber.open()
        self.handle = self.subscriber.stream_subscribe(f"f.objects.{os.getpid()}", self._handler)
        self.subscription = self.client.subscribe("f.objects")
        self.called = self.client.subscribe("f.objects.callback", lambda message: None)
        self.stream = self.client.stream("f.hold.stream", ctx=self.ctx)
        assert self.stream.next(10) == b"first"
        self.own_stream = self.client.stream(self.handle.subject, ctx=self.child_ctx)
        self.pool_stream = self.pool.stream("f.hold.stream", timeout=60)
        assert self.pool_stream.next(10) == b"first"
        self.lent = self.pool.getconn()
        assert self.begun.wait(LIMIT)
        self.client.publish("f.objects", b"one", reply="f.nobody")
        self.message = self.subscription.next(10)

    def _handler(self, ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        self.sender, self.handler_ctx = sender, ctx
        sender.send(b"mine")
        self.begun.set()
        self.over.wait(LIMIT)
        sender.send(b"last")
        sender.end()

    def verbs(self) -> dict[str, Callable[[], object]]:
        """In the order in which they are tried; those that end something come last."""
        client, subscription, called, stream = self.client, self.subscription, self.called, self.stream
        subscriber, handle, sender, pool, ctx = self.subscriber, self.handle, self.sender, self.pool, self.ctx
        handler_ctx, message = self.handler_ctx, self.message
        assert sender is not None
        assert handler_ctx is not None
        assert message is not None

        def new_handler(ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
            return b""

        return {
            "client.status": lambda: client.status,
            "client.server_info": lambda: client.server_info,
            "client.stats": client.stats,
            "client repr": lambda: repr(client),
            "client": lambda: works(client),
            "client.rtt": client.rtt,
            "client.stream with the parent's ctx": lambda: list(client.stream("f.count", b"2", ctx=ctx)),
            "client.request with the parent's ctx": lambda: client.request("f.echo", b"x", ctx=self.child_ctx),
            "subscription properties": lambda: (
                subscription.pending,
                subscription.delivered,
                subscription.dropped,
                subscription.active,
                subscription.queue,
                repr(subscription),
            ),
            "subscription.next": lambda: subscription.next(None),
            "subscription iteration": lambda: next(iter(subscription)),
            "subscription.drain": subscription.drain,
            "subscription.unsubscribe": subscription.unsubscribe,
            "subscription with": lambda: subscription.__exit__(None, None, None),
            "callback subscription.drain": lambda: called.drain(None),
            "callback subscription.unsubscribe": called.unsubscribe,
            "message.respond": lambda: message.respond(b"x"),
            "stream properties": lambda: (stream.headers, stream.trailers, stream.mode, stream.stats, repr(stream)),
            "stream.next": lambda: stream.next(None),
            "stream iteration": lambda: list(stream),
            "stream.map iteration": lambda: next(stream.map(len)),
            "stream.cancel": stream.cancel,
            "stream.close": stream.close,
            "own stream.close": self.own_stream.close,
            "pool stream.next": lambda: self.pool_stream.next(None),
            "pool stream.close": self.pool_stream.close,
            "sender properties": lambda: (sender.is_closed(), sender.send_count, repr(sender)),
            "sender.set_header": lambda: sender.set_header("A", "b"),
            "sender.on_close": lambda: sender.on_close(lambda: None),
            "sender.send": lambda: sender.send(b"from the child"),
            "sender.try_send": lambda: sender.try_send(b"from the child"),
            "sender.send_many": lambda: sender.send_many([b"from the child"]),
            "sender.send_error": lambda: sender.send_error("from the child"),
            "sender.end": sender.end,
            "handler ctx": lambda: (handler_ctx.check(), handler_ctx.draining, handler_ctx.metadata),
            "handler ctx.cancel": handler_ctx.cancel,
            "handle properties": lambda: (handle.stopped, handle.ctx, repr(handle)),
            "handle.stats": lambda: handle.stats,
            "handle.wait": handle.wait,
            "handle.stop": handle.stop,
            "subscriber.status": lambda: subscriber.status,
            "subscriber.handles": lambda: subscriber.handles,
            "subscriber.stats": subscriber.stats,
            "subscriber repr": lambda: repr(subscriber),
            "subscriber.open": subscriber.open,
            "subscriber.handler": lambda: subscriber.handler("f.new")(new_handler),
            "subscriber.stream": lambda: subscriber.stream("f.new")(new_handler),
            "subscriber.stream_subscribe": lambda: subscriber.stream_subscribe("f.new", self._handler),
            "subscriber.subscribe": lambda: subscriber.subscribe("f.new", lambda message: None),
            "subscriber.serve_forever": subscriber.serve_forever,
            "subscriber.stop": subscriber.stop,
            "subscriber.drain": lambda: subscriber.drain(None),
            "subscriber.close": lambda: subscriber.close(None),
            "pool.stats": pool.stats,
            "pool repr": lambda: repr(pool),
            "pool.request": lambda: pool.request("f.echo", b"x"),
            "pool.stream": lambda: list(pool.stream("f.count", b"2")),
            "pool.connection": lambda: pool.connection().__enter__(),
            "pool.wait": lambda: pool.wait(20),
            "pool.putconn": lambda: pool.putconn(self.lent),
            "pool.close": lambda: pool.close(20),
            "lent client.close": self.lent.close,
            "ctx properties": lambda: (ctx.cancelled, ctx.reason, ctx.remaining(), ctx.deadline, repr(ctx)),
            "ctx.check": ctx.check,
            "ctx.value": lambda: ctx.value("none"),
            "ctx.done": lambda: ctx.done.is_set(),
            "ctx.wait": lambda: ctx.wait(0.01),
            "ctx.with_cancel": ctx.with_cancel,
            "ctx.with_timeout": lambda: ctx.with_timeout(1).with_value("a", 1).remaining(),
            "ctx.on_cancel": lambda: ctx.on_cancel(lambda: None)(),
            "ctx.on_cancel remove": self.remove,
            "child ctx.cancel": self.child_ctx.cancel,
            "ctx.cancel": ctx.cancel,
            "root.cancel": self.root.cancel,
            "client.drain": client.drain,
            "client.close": client.close,
            "garbage": self._drop,
        }

    def _drop(self) -> None:
        """Let go of everything: finalizers run."""
        self.__dict__.clear()
        gc.collect()

    def check(self) -> None:
        """In the parent: nothing of it was noticed."""
        assert not self.calls
        works(self.client, "after")
        self.client.publish("f.objects", b"two")
        assert self.subscription.next(10).data == b"two"
        assert not self.handle.stopped
        assert not self.ctx.cancelled
        self.over.set()
        assert list(self.own_stream) == [b"mine", b"last"]
        self.stream.close()
        self.pool_stream.close()
        self.pool.putconn(self.lent)
        self.pool.close()
        self.subscriber.close()
        self.ctx.cancel()
        self.client.close()


def _try_verbs(verbs: dict[str, Callable[[], object]]) -> None:
    """Each in a thread of its own, so that all that wait are known at once."""
    faults: list[str] = []
    for name, verb in verbs.items():
        failures: list[BaseException] = []

        def attempt(verb: Callable[[], object] = verb, failures: list[BaseException] = failures) -> None:
            try:
                verb()
            except natsync.ForkError:
                pass
            except BaseException as failure:
                failures.append(failure)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(VERB_LIMIT)
        if thread.is_alive():
            where = traceback.extract_stack(thread_frames()[thread.ident or 0])
            inside = [f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}" for frame in where[-4:]]
            faults.append(f"{name} waits in {' > '.join(inside)}")
        faults.extend(f"{name} raised {error!r}" for error in failures)
    assert not faults, "\n" + "\n".join(faults)


def expect_fork_error(use: Callable[[], object]) -> None:
    try:
        use()
    except natsync.ForkError:
        return
    raise AssertionError("the parent's object works in the child")


class Unbuffered(logging.Handler):
    """Logs to nowhere, without a file object of Python: a buffer locked at the fork stays locked in the child."""

    def emit(self, record: logging.LogRecord) -> None:
        os.write(self._nowhere, self.format(record).encode())

    _nowhere = os.open(os.devnull, os.O_WRONLY)


def fork_under_load(url: str) -> None:
    """Threads use everything while the process forks again and again; each child uses everything too."""
    logging.basicConfig(level=logging.DEBUG, handlers=[Unbuffered()])  # so that logging's locks are busy too
    client, root = natsync.connect(url), natsync.Context()
    pool = natsync.ConnectionPool(url, max_size=2)
    over = threading.Event()
    failures: list[str] = []
    rounds = dict.fromkeys(("publish", "request", "stream", "subscribe", "pool", "context"), 0)

    def hammer(name: str, use: Callable[[], object]) -> None:
        while not over.is_set():
            try:
                use()
                rounds[name] += 1
            except BaseException:
                failures.append(f"{name}: {traceback.format_exc()}")
                return

    def subscribe() -> None:
        with client.subscribe("f.hammered.*") as subscription:
            client.publish("f.hammered.x", b"x")
            assert subscription.next(10).data == b"x"

    def contexts() -> None:
        with root.with_timeout(30) as ctx:
            ctx.on_cancel(lambda: None)

    uses: dict[str, Callable[[], object]] = {
        "publish": lambda: client.publish("f.anything", b"x" * 100),
        "request": lambda: client.request("f.echo", b"x", timeout=LIMIT),
        "stream": lambda: list(client.stream("f.count", b"20", timeout=LIMIT, ctx=root)),
        "subscribe": subscribe,
        "pool": lambda: pool.request("f.echo", b"x", timeout=LIMIT),
        "context": contexts,
    }
    threads = [threading.Thread(target=hammer, args=item) for item in uses.items()]

    def child() -> None:
        works(client)
        list(client.stream("f.count", b"2", timeout=10, ctx=root))
        assert pool.request("f.echo", b"x", timeout=10).data == b"x"
        with natsync.Subscriber(url) as subscriber:
            subscriber.stream_subscribe(f"f.load.{os.getpid()}", lambda ctx, request: iter([b"one"]))
            assert list(client.stream(f"f.load.{os.getpid()}", timeout=10)) == [b"one"]
        pool.close()
        root.cancel()
        client.close()

    number = client_id(client)
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: min(rounds.values()) > 0, LIMIT)
        until = time.monotonic() + LIMIT
        for _ in range(FORKS):
            join(forked(child))
            if time.monotonic() > until:
                break
    finally:
        over.set()
        for thread in threads:
            thread.join(LIMIT)
    assert not failures, failures[0]
    assert client_id(client) == number
    assert client.stats()["reconnects"] == 0
    eventually(lambda: client.stats()["waiting_replies"] == 0, LIMIT)
    eventually(lambda: pool.stats()["leased"] == 0, LIMIT)
    pool.close()
    client.close()


# -- objects -----------------------------------------------------------------------------------------------------------


def subscriber_of_the_parent(url: str) -> None:
    opened, recorded = natsync.Subscriber(url), natsync.Subscriber(url)
    opened.open()

    @recorded.handler(f"f.recorded.{os.getpid()}")
    def answer(ctx: natsync.HandlerContext, request: natsync.Message) -> bytes:
        return b"%d" % os.getpid()

    subject = f"f.recorded.{os.getpid()}"

    def child() -> None:
        expect_fork_error(opened.open)
        expect_fork_error(lambda: opened.stream_subscribe("f.new", lambda ctx, request: iter(())))
        opened.close()
        with recorded, natsync.connect(url) as client:
            assert client.request(subject, timeout=10).data == b"%d" % os.getpid()

    join(forked(child))
    opened.close()


def pool_of_the_parent(url: str) -> None:
    pool = natsync.ConnectionPool(url, max_size=2)
    first, second = pool.getconn(), pool.getconn()
    numbers = {client_id(first), client_id(second)}

    def child() -> None:
        expect_fork_error(lambda: pool.putconn(first))
        with pool.connection(5) as one, pool.connection(5) as two:  # the parent's leases take no place here
            assert numbers.isdisjoint({client_id(one), client_id(two)})
            works(one)
        assert pool.stats()["leased"] == 0
        pool.close()

    join(forked(child))
    pool.putconn(first)
    assert pool.stats()["leased"] == 1
    pool.putconn(second)
    with pool.connection() as lent:
        assert client_id(lent) in numbers
    pool.close()


def context_of_the_parent(url: str) -> None:
    """A deadline holds in the child too, though the parent's timer thread is not there."""
    client = natsync.connect(url)
    soon = natsync.Context().with_timeout(1.0)
    later = natsync.Context().with_timeout(60)

    def child() -> None:
        begin = time.monotonic()
        try:
            list(client.stream("f.hold.stream", ctx=soon))
        except natsync.DeadlineExceeded:
            pass
        assert soon.wait(15)
        assert time.monotonic() - begin < 15
        own = natsync.Context().with_timeout(0.05)
        assert own.wait(5)
        assert isinstance(own.error(), natsync.DeadlineExceeded)
        later.cancel("in the child")
        assert later.wait(0)
        client.close()

    join(forked(child))
    assert soon.wait(15)
    assert not later.cancelled
    later.cancel()
    client.close()


# -- who else forks ----------------------------------------------------------------------------------------------------

_client: natsync.Client | None = None


def _module_client(url: str) -> natsync.Client:
    """What a module-level client is to the functions of a program."""
    global _client
    if _client is None:
        _client = natsync.Client(url)
    return _client


def _work(url: str) -> tuple[int, int]:
    client = _module_client(url)
    works(client)
    return os.getpid(), client_id(client)


def _publish_only(url: str, subject: str) -> None:
    _module_client(url).publish(subject, b"%d" % os.getpid())


def _put_work(url: str, results: SimpleQueue[tuple[int, int]]) -> None:
    results.put(_work(url))


def _multiprocessing(url: str, method: str) -> None:
    context = multiprocessing.get_context(method)
    here = _work(url)
    results: SimpleQueue[tuple[int, int]] = context.SimpleQueue()
    processes = [context.Process(target=_put_work, args=(url, results)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
    assert [process.exitcode for process in processes] == [0, 0]
    found = [here, *(results.get() for _ in processes)]
    assert len({pid for pid, _ in found}) == len({number for _, number in found}) == 3, found

    client = _module_client(url)
    with client.subscribe(f"f.left.{os.getpid()}") as subscription:
        client.flush()
        process = context.Process(target=_publish_only, args=(url, subscription.subject))
        process.start()
        assert subscription.next(LIMIT).data == b"%d" % (process.pid or 0)
        process.join(LIMIT)
    assert _work(url) == here
    client.close()


def multiprocessing_fork(url: str) -> None:
    _multiprocessing(url, "fork")


def multiprocessing_spawn(url: str) -> None:
    _multiprocessing(url, "spawn")


def multiprocessing_forkserver(url: str) -> None:
    _multiprocessing(url, "forkserver")


def _counts_its_end(outgoing: int, deeper: int) -> None:
    def leave() -> None:
        os.write(outgoing, b"%d " % os.getpid())

    concurrency.at_exit(leave)
    concurrency.at_exit(leave)
    if deeper:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_counts_its_end, args=(outgoing, deeper - 1))
        process.start()
        process.join(LIMIT)
        assert process.exitcode == 0
    else:
        atexit._run_exitfuncs()  # as the worker processes of Django's command do


def multiprocessing_exit(url: str) -> None:
    incoming, outgoing = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_counts_its_end, args=(outgoing, 2))
    process.start()
    process.join(LIMIT)
    assert process.exitcode == 0
    os.close(outgoing)
    pids = os.read(incoming, 1000).split()
    assert len(pids) == len(set(pids)) == 3, pids


def process_pool_executor(url: str) -> None:
    here = _work(url)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as executor:
        found = {executor.submit(_work, url).result(LIMIT) for _ in range(6)}
    assert here not in found, found
    assert len({pid for pid, _ in found}) == len({number for _, number in found}), found
    assert _work(url) == here
    _module_client(url).close()


def prefork_without_exec(url: str) -> None:
    """What uWSGI does without lazy-apps: the master loads the application, and uses it; workers serve with threads."""
    client = _module_client(url)
    number = client_id(client)

    def worker() -> None:
        failures: list[str] = []

        def serve() -> None:
            try:
                for _ in range(5):
                    works(client)
            except BaseException:
                failures.append(traceback.format_exc())

        threads = [threading.Thread(target=serve) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert not failures, failures[0]
        assert client_id(client) != number
        assert client.stats()["reconnects"] == 0

    join(*(forked(worker, leave=sys.exit) for _ in range(4)))
    assert client_id(client) == number
    client.close()


def mark_that_is_not_wiped(url: str) -> None:
    """A system that takes the advice to wipe the mark in a child, and does nothing: Python's news of a fork counts."""
    concurrency.at_home = bytearray(b"\1")  # type: ignore[assignment]
    client = natsync.connect(url)
    number = client_id(client)

    def child() -> None:
        works(client)
        assert client_id(client) != number
        join(forked(lambda: works(client)))

    join(forked(child))
    assert client_id(client) == number
    client.close()


def callback_that_fails(url: str) -> None:
    """What one part of the library cannot make anew in a child keeps the others, and its own children, from nothing."""
    concurrency._fork_callbacks.insert(0, lambda: [][0])
    client = natsync.connect(url)
    number = client_id(client)

    def child() -> None:
        assert client_id(client) != number
        join(forked(lambda: works(client)))

    join(forked(child))
    client.close()


def fork_untold(url: str) -> None:
    """By the C library's fork(), of which Python hears nothing: so does uWSGI, unless it is told to call Python.

    Such a child of a process with threads must not start any (Python itself may crash then), but it finds out, and
    leaves its parent's link alone. A child of a process without them, as of a preloaded application, can do everything.
    """
    unused = natsync.Client(url)
    join(_forked_untold(lambda: works(unused)), _forked_untold(lambda: works(unused)))
    idle = natsync.ConnectionPool(url, timeout=LIMIT / 4)
    for first in _FIRST_USES:
        join(_forked_untold(lambda first=first: first(idle)))  # type: ignore[misc]
    client, pool, opened = natsync.connect(url), natsync.ConnectionPool(url), natsync.Subscriber(url)
    opened.open()
    works(client)
    pool.request("f.echo", b"x")
    subscription, number = client.subscribe("f.unused"), client_id(client)
    client.flush(10)
    pool.wait()  # no thread is at work any more, and none that
    sys.setswitchinterval(60)  # waits for the interpreter just then asks for it: the child would wait for it for ever
    time.sleep(0.5)
    join(_forked_untold(lambda: (client.close(), pool.close(), opened.close())))  # without another use before
    join(_forked_untold(lambda: _find_out(client, pool, opened, subscription)))
    assert client_id(client) == number
    assert client.stats()["reconnects"] == 0
    works(client, "after")
    for one in (opened, pool, client):
        one.close()


def _lease(pool: natsync.ConnectionPool) -> None:
    with pool.connection() as client:
        client.flush()


#: Of a pool, in a child.
_FIRST_USES: list[Callable[[natsync.ConnectionPool], object]] = [
    lambda pool: pool.request("f.echo", b"x"),
    lambda pool: list(pool.stream("f.count", b"3")),
    lambda pool: pool.putconn(pool.getconn()),
    lambda pool: pool.wait(),
    _lease,
]


def _forked_untold(function: Callable[[], object]) -> int:
    pid: int = ctypes.PyDLL(None).fork()
    if pid:
        return pid
    signal.alarm(LIMIT)
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def _find_out(
    client: natsync.Client,
    pool: natsync.ConnectionPool,
    opened: natsync.Subscriber,
    subscription: natsync.Subscription,
) -> None:
    expect_fork_error(subscription.next)
    expect_fork_error(opened.open)
    assert client.status == "new"
    assert pool.stats()["size"] == 0
    opened.close()
    pool.close()
    client.close()


def fork_before_use(url: str) -> None:
    """What is only constructed starts no thread, so Python has nothing to warn of at the fork."""
    warnings.simplefilter("error")
    before = threading.enumerate()
    client, subscriber, pool = natsync.Client(url), natsync.Subscriber(url), natsync.ConnectionPool(url)
    subscriber.handler("f.unused")(lambda ctx, request: b"")
    ctx = natsync.Context()
    assert threading.enumerate() == before == [threading.main_thread()]

    def child() -> None:
        works(client)
        assert pool.request("f.echo", b"x", ctx=ctx, timeout=10).data == b"x"
        subscriber.open().close()
        pool.close()
        client.close()

    join(forked(child), forked(child))
    works(client, "parent")
    client.close()


def main() -> None:
    program: Program = globals()[sys.argv[1]]
    # Every stack, then the end. Not dump_traceback_later(): its thread is missing in a child, which hangs then.
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(2 * LIMIT)
    program(sys.argv[2])
    print("fine", flush=True)


if __name__ == "__main__":
    main()
