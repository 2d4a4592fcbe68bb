"""Services: natsync's are seen by those who look for services, and natsync sees those of others (ADR-32)."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from nats.micro import ServiceConfig, add_service
from nats.micro.service import ServiceInfo, ServicePing, ServiceStats

import natsync
from natsync import monitor, services
from natsync.services import Service
from natsync.testing import NatsServer, eventually
from processes import NATSYNC, child, run
from rawclient import PATIENCE
from support import run_python
from test_interop_nats_py import Loop

# The micro of nats-py calls utcnow().
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")


@pytest.fixture
def server(make_nats_server: Any) -> NatsServer:
    """A server of the test's own: whoever asks for services gets all there are."""
    return make_nats_server()


@pytest.fixture
def client(server: NatsServer) -> Iterator[natsync.Client]:
    with natsync.Client(server.url) as client:
        yield client


@pytest.fixture
def subscriber(server: NatsServer) -> Iterator[natsync.Subscriber]:
    subscriber = natsync.Subscriber(server.url)

    @subscriber.stream("llm.chat", queue="llm")
    def chat(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        yield from request.data.split()

    @subscriber.handler("llm.count")
    def count(ctx: natsync.Context, request: natsync.Message) -> int:
        if not request.data:
            raise ValueError("no words")
        return len(request.data.split())

    yield subscriber
    subscriber.close(timeout=2)


@pytest.fixture
def loop(server: NatsServer) -> Iterator[Loop]:
    loop = Loop(server.url)
    yield loop
    loop.close()


def one(found: list[Any]) -> Any:
    (single,) = found
    return single


def endpoint(said: Any, subject: str) -> Any:
    return one([each for each in said.endpoints if each.subject == subject])


# -- natsync's own, seen by natsync --------------------------------------------------------------------------------


def test_every_handler_is_listed_with_its_queue_group_and_kind(
    subscriber: natsync.Subscriber, client: natsync.Client
) -> None:
    Service(subscriber, name="llm", version="1.2.3-rc.1", description="answers", metadata={"zone": "a"})
    subscriber.open()
    subscriber.subscribe("events.>", lambda message: None, queue="one-of-us")
    info = one(services.discover(client))
    assert (info.name, info.version, info.description, info.metadata) == ("llm", "1.2.3-rc.1", "answers", {"zone": "a"})
    assert {(each.name, each.subject, each.queue_group, each.metadata["natsync.kind"]) for each in info.endpoints} == {
        ("llm_chat", "llm.chat", "llm", "stream"),
        ("llm_count", "llm.count", "", "request"),
        ("events_all", "events.>", "one-of-us", "message"),
    }


def test_a_subscriber_that_is_open_already_is_listed_at_once(
    subscriber: natsync.Subscriber, client: natsync.Client
) -> None:
    subscriber.open()
    Service(subscriber, name="late", version="1.0.0")
    assert len(one(services.discover(client, "late")).endpoints) == 2


def test_stats_count_requests_errors_and_nanoseconds(subscriber: natsync.Subscriber, client: natsync.Client) -> None:
    service = Service(subscriber, name="llm", version="1.0.0")
    subscriber.open()
    assert client.request("llm.count", "a b c", timeout=PATIENCE).json() == 3
    with pytest.raises(natsync.HandlerError) as raised:
        client.request("llm.count", timeout=PATIENCE)
    assert (raised.value.message, raised.value.code) == ("no words", 500)
    assert list(client.stream("llm.chat", "a b", timeout=PATIENCE)) == [b"a", b"b"]
    eventually(lambda: (subscriber.stats()["processed"], subscriber.stats()["failed"]) == (2, 1), PATIENCE)

    said = one(services.stats(client, "llm", service.id))
    count, chat = endpoint(said, "llm.count"), endpoint(said, "llm.chat")
    assert (count.num_requests, count.num_errors, count.last_error) == (2, 1, "ValueError: no words")
    assert (chat.num_requests, chat.num_errors, chat.last_error) == (1, 0, "")
    assert count.processing_time > 0
    assert count.average_processing_time == count.processing_time // 2
    assert chat.data == {"kind": "stream", "active": 0, "cancelled": 0, "dropped": 0}

    service.reset()
    again = one(services.stats(client, "llm", service.id))
    count = endpoint(again, "llm.count")
    assert (count.num_requests, count.num_errors, count.last_error, count.processing_time) == (0, 0, "", 0)
    assert count.average_processing_time == 0
    assert again.started > said.started


def test_a_subscriber_all_of_whose_workers_are_busy_answers(server: NatsServer, client: natsync.Client) -> None:
    subscriber = natsync.Subscriber(server.url, max_workers=2)
    go_on, busy = threading.Event(), threading.Semaphore(0)

    @subscriber.handler("busy")
    def wait(ctx: natsync.Context, request: natsync.Message) -> None:
        busy.release()
        go_on.wait(PATIENCE)

    Service(subscriber, name="busy", version="1.0.0")
    with subscriber:
        monitor.answer(subscriber)
        try:
            for _ in range(2):
                client.publish("busy", reply="nobody")
                assert busy.acquire(timeout=PATIENCE)
            assert one(services.ping(client, "busy")).name == "busy"
            assert one(services.stats(client)).endpoints[0].data["active"] == 2
            assert client.request(monitor.SUBJECT, timeout=PATIENCE).json()["threads"] == 3  # and the one that answers
            checked = run(*NATSYNC, "check", "--service", "busy", url=server.url)
            assert checked.process.returncode == 0, checked
        finally:
            go_on.set()
    left = [thread.name for thread in threading.enumerate() if "attendant" in thread.name]
    assert left == []


def test_what_asks_about_a_subscriber_is_neither_an_endpoint_nor_shown(
    subscriber: natsync.Subscriber, client: natsync.Client
) -> None:
    Service(subscriber, name="llm", version="1.0.0")
    monitor.answer(subscriber)
    assert {each.subject for each in one(services.discover(client)).endpoints} == {"llm.chat", "llm.count"}
    shown = client.request(monitor.SUBJECT, timeout=PATIENCE).json()["registrations"]
    assert {each["subject"] for each in shown} == {"llm.chat", "llm.count"}


def test_a_subscriber_that_is_closed_where_its_service_answers_waits_for_nothing(
    server: NatsServer, client: natsync.Client
) -> None:
    """As from a handler: here from a hook of the monitor's answer."""

    class Close(natsync.Hooks):
        def handler_started(self, exchange: natsync.Exchange) -> None:
            subscriber.close(timeout=PATIENCE)
            closed.set()

    closed = threading.Event()
    subscriber = natsync.Subscriber(server.url, hooks=Close())
    monitor.answer(subscriber)
    client.publish(monitor.SUBJECT)
    assert closed.wait(PATIENCE / 2)


def test_a_streams_time_counts_to_its_end_and_its_error_is_the_last_one(
    subscriber: natsync.Subscriber, client: natsync.Client
) -> None:
    go_on = threading.Event()

    def handler(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        def work() -> None:
            go_on.wait(PATIENCE)
            sender.send_error("out of words", code=natsync.Code.INTERNAL)

        threading.Thread(target=work).start()

    subscriber.stream_subscribe("llm.fails", handler)
    Service(subscriber, name="llm", version="1.0.0")
    stream = client.stream("llm.fails", timeout=PATIENCE)
    eventually(lambda: endpoint(one(services.stats(client)), "llm.fails").num_requests == 1, PATIENCE)
    assert endpoint(one(services.stats(client)), "llm.fails").processing_time == 0  # it is still under way
    threading.Event().wait(0.05)
    go_on.set()
    with pytest.raises(natsync.HandlerError, match="out of words"):
        next(stream)
    eventually(lambda: endpoint(one(services.stats(client)), "llm.fails").num_errors == 1, PATIENCE)
    said = endpoint(one(services.stats(client)), "llm.fails")
    assert said.processing_time > 50_000_000
    assert "out of words" in said.last_error


def test_a_plain_messages_handler_is_counted_too(subscriber: natsync.Subscriber, client: natsync.Client) -> None:
    def handler(message: natsync.Message) -> None:
        if message.data == b"bad":
            raise ValueError("cannot read it")

    subscriber.subscribe("events", handler)
    Service(subscriber, name="llm", version="1.0.0")
    client.publish("events", b"good")
    client.publish("events", b"bad")
    eventually(lambda: endpoint(one(services.stats(client)), "events").num_errors == 1, PATIENCE)
    said = endpoint(one(services.stats(client)), "events")
    assert (said.num_requests, said.last_error) == (2, "ValueError: cannot read it")
    assert said.processing_time > 0


def test_one_instance_can_be_asked_and_all_of_them(server: NatsServer, client: natsync.Client) -> None:
    def instance(name: str) -> tuple[natsync.Subscriber, Service]:
        subscriber = natsync.Subscriber(server.url)
        return subscriber, Service(subscriber, name=name, version="1.0.0")

    started = [instance("one"), instance("one"), instance("two")]
    try:
        for subscriber, _ in started:
            subscriber.open()
        ids = [service.id for _, service in started]
        assert len(set(ids)) == 3
        eventually(lambda: {each.id for each in services.ping(client)} == set(ids), PATIENCE)
        eventually(lambda: {each.id for each in services.ping(client, "one")} == set(ids[:2]), PATIENCE)
        answer = one(services.ping(client, "one", ids[1]))
        assert answer.id == ids[1]
        assert 0 < answer.rtt < PATIENCE
        assert services.ping(client, "three") == []
    finally:
        for subscriber, _ in started:
            subscriber.close(timeout=2)


def test_a_stopped_service_is_not_listed_and_its_handlers_go_on(
    subscriber: natsync.Subscriber, client: natsync.Client
) -> None:
    service = Service(subscriber, name="llm", version="1.0.0")
    subscriber.open()
    assert one(services.ping(client)).id == service.id
    service.stop()
    service.stop()
    assert services.ping(client) == []
    assert client.request("llm.count", "a", timeout=PATIENCE).json() == 1


def test_each_process_that_opens_the_subscriber_is_an_instance_of_its_own(server: NatsServer) -> None:
    code = """
import os, signal, sys, natsync
from natsync import monitor, services
from natsync.testing import eventually
subscriber = natsync.Subscriber(sys.argv[1])
@subscriber.handler("forked")
def handler(ctx, request):
    return None
service = services.Service(subscriber, name="forked", version="1.0.0")
own = service.id
reader, writer = os.pipe()
pid = os.fork()
if pid == 0:
    subscriber.open()
    os.write(writer, service.id.encode() + b"\\n")
    signal.pause()  # until the parent has asked, and kills this
theirs = os.read(reader, 100).decode().strip()
subscriber.open()
with natsync.Client(sys.argv[1]) as client:
    eventually(lambda: {one.id for one in services.ping(client)} == {own, theirs}, 30)
subscriber.close()
os.kill(pid, 9)
os.waitpid(pid, 0)
assert own != theirs
print("two instances")
"""
    done = run_python(code, server.url)
    assert done.stdout.strip() == "two instances", done.stderr


def test_hooks_are_told_nothing_of_the_questions(server: NatsServer, client: natsync.Client) -> None:
    told: list[str] = []

    class Log(natsync.Hooks):
        def handler_started(self, exchange: natsync.Exchange) -> None:
            told.append(exchange.subject)

    with natsync.Subscriber(server.url, hooks=Log()) as subscriber:
        Service(subscriber, name="quiet", version="1.0.0")
        assert one(services.ping(client)).name == "quiet"
    assert told == []


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"name": ""}, natsync.InvalidArgument),
        ({"name": "a.b"}, natsync.InvalidArgument),
        ({"name": "a b"}, natsync.InvalidArgument),
        ({"name": None}, TypeError),
        ({"version": "1"}, natsync.InvalidArgument),
        ({"version": "1.0.0.0"}, natsync.InvalidArgument),
        ({"version": "01.0.0"}, natsync.InvalidArgument),
        ({"version": "1.0.0\n"}, natsync.InvalidArgument),
        ({"version": 1.0}, TypeError),
        ({"metadata": {"a": 1}}, TypeError),
        ({"description": 1}, TypeError),
    ],
)
def test_what_cannot_name_a_service_is_refused(arguments: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        Service(natsync.Subscriber(), **{"name": "llm", "version": "1.0.0", **arguments})


@pytest.mark.parametrize("version", ["0.0.0", "1.2.3-alpha.1+build.5", "10.20.30-0", "1.0.0+001"])
def test_versions_of_semver_are_taken(version: str) -> None:
    assert Service(natsync.Subscriber(), name="llm", version=version).version == version


def test_the_metadata_cannot_be_changed_afterwards() -> None:
    given = {"zone": "a"}
    service = Service(natsync.Subscriber(), name="llm", version="1.0.0", metadata=given)
    given["zone"] = "b"
    assert service.identity()["metadata"] == {"zone": "a"}
    with pytest.raises(TypeError):
        service.metadata["zone"] = "b"  # type: ignore[index]


@pytest.mark.parametrize(
    ("subject", "name"), [("a.b-c_d", "a_b-c_d"), ("a.*.>", "a_any_all"), ("größe/2", "gr__e_2"), ("a$b", "a_b")]
)
def test_a_subject_becomes_a_name_that_endpoints_may_have(subject: str, name: str) -> None:
    assert services.endpoint_name(subject) == name
    assert re.fullmatch(r"[A-Za-z0-9_-]+", name)


@pytest.mark.parametrize(("name", "id"), [("a.b", None), ("*", None), (None, "1"), ("a", "b c")])
def test_asking_for_what_can_be_no_service_is_refused(name: str | None, id: str | None) -> None:
    with pytest.raises(natsync.InvalidArgument):
        services.ping(natsync.Client("nats://127.0.0.1:1"), name, id)


def test_answers_that_make_no_sense_are_left_out(client: natsync.Client) -> None:
    kind = "io.nats.micro.v1.info_response"
    odd = [
        b"", b"not json", b"[]", b'{"type": "another"}', json.dumps({"type": kind}).encode(),
        json.dumps({"type": kind, "id": "i", "name": "n", "endpoints": None, "metadata": None}).encode(),
        json.dumps({"type": kind, "id": "j", "endpoints": [1, {"subject": 5}], "version": 1}).encode(),
    ]  # fmt: skip

    def answer(message: natsync.Message) -> None:
        for data in odd:
            message.respond(data)

    client.subscribe("$SRV.INFO", answer)
    client.flush()
    found = {each.id: each for each in services.discover(client)}
    assert set(found) == {"i", "j"}
    assert (found["i"].endpoints, found["i"].metadata) == ((), {})
    assert (found["j"].endpoints, found["j"].version) == ((services.Endpoint("", ""),), "")


# -- with others ---------------------------------------------------------------------------------------------------


def ask(loop: Loop, subject: str) -> dict[str, Any]:
    return json.loads(loop.run(loop.nats.request(subject, timeout=PATIENCE)).data)


def test_nats_py_reads_our_service_with_its_own_types(
    subscriber: natsync.Subscriber, client: natsync.Client, loop: Loop
) -> None:
    service = Service(subscriber, name="llm", version="1.0.0", description="answers", metadata={"zone": "a"})
    subscriber.open()
    client.request("llm.count", "a b", timeout=PATIENCE)
    reply = loop.run(loop.nats.request("llm.count", b"", timeout=PATIENCE))
    assert (reply.headers["Nats-Service-Error"], reply.headers["Nats-Service-Error-Code"]) == ("no words", "500")
    eventually(lambda: subscriber.stats()["failed"] == 1, PATIENCE)

    ping = ask(loop, "$SRV.PING")
    assert ping["type"] == ServicePing.type
    assert ServicePing.from_dict(ping) == ServicePing(
        id=service.id, name="llm", version="1.0.0", metadata={"zone": "a"}
    )
    info = ServiceInfo.from_dict(ask(loop, "$SRV.INFO.llm"))
    assert (info.id, info.type, info.description) == (service.id, "io.nats.micro.v1.info_response", "answers")
    chat = endpoint(info, "llm.chat")
    assert (chat.name, chat.queue_group) == ("llm_chat", "llm")
    said = ask(loop, f"$SRV.STATS.llm.{service.id}")
    assert said["type"] == ServiceStats.type
    stats = ServiceStats.from_dict(said)
    count = endpoint(stats, "llm.count")
    assert (count.num_requests, count.num_errors, count.last_error) == (2, 1, "ValueError: no words")
    assert 0 < count.average_processing_time == count.processing_time // 2
    assert stats.started.isoformat(timespec="microseconds") + "Z" == service.started


NATS_PY_SERVICE = """
import asyncio, sys
import nats
from nats.micro import ServiceConfig, add_service
from nats.micro.request import ServiceError

async def main():
    connection = await nats.connect(sys.argv[1])
    config = ServiceConfig(name="theirs", version="2.0.0", description="of others", metadata={"by": "nats-py"})
    service = await add_service(connection, config)
    async def upper(request):
        if not request.data:
            raise ServiceError("400", "nothing to do")
        await request.respond(request.data.upper())
    await service.add_endpoint(name="upper", subject="text.upper", handler=upper, metadata={"unit": "text"})
    await connection.flush()
    print("up", service.id, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_we_read_a_service_of_nats_py_in_another_process(server: NatsServer, client: natsync.Client) -> None:
    with child(sys.executable, "-c", NATS_PY_SERVICE, server.url) as theirs:
        theirs.wait_for_out("up ")
        id = theirs.out[0].split()[1]
        assert client.request("text.upper", "abc", timeout=PATIENCE).text() == "ABC"
        with pytest.raises(natsync.HandlerError, match="nothing to do") as raised:
            client.request("text.upper", timeout=PATIENCE)
        assert raised.value.code == 400

        info = one(services.discover(client, "theirs"))
        assert info == services.ServiceInfo(
            name="theirs",
            id=id,
            version="2.0.0",
            metadata={"by": "nats-py"},
            description="of others",
            endpoints=(services.Endpoint("upper", "text.upper", "q", {"unit": "text"}),),
        )
        said = one(services.stats(client, "theirs", id))
        upper = one(list(said.endpoints))
        assert (upper.name, upper.num_requests, upper.num_errors) == ("upper", 2, 1)
        assert "nothing to do" in upper.last_error
        assert upper.average_processing_time > 0
        assert said.started.endswith("Z")
        assert one(services.ping(client)).rtt > 0


def test_ours_and_theirs_are_found_together(subscriber: natsync.Subscriber, client: natsync.Client, loop: Loop) -> None:
    Service(subscriber, name="ours", version="1.0.0")
    subscriber.open()

    async def start() -> Any:
        return await add_service(loop.nats, ServiceConfig(name="theirs", version="1.0.0"))

    async def stop(theirs: Any) -> None:
        await theirs.stop()

    theirs = loop.run(start())
    eventually(lambda: [each.name for each in services.discover(client)] == ["ours", "theirs"], 20)
    loop.run(stop(theirs))
    assert [each.name for each in services.discover(client)] == ["ours"]


def test_importing_natsync_does_not_bring_services() -> None:
    done = run_python("import sys, natsync\nprint('natsync.services' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
