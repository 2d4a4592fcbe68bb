"""natsync.monitor: what a subscriber answers when it was told to, and nothing else."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator

import pytest

import natsync
from natsync import monitor
from natsync.cli.rates import KEPT_ROUNDS, Rounds
from natsync.testing import FaultProxy, NatsServer, eventually

PATIENCE = 10.0


@pytest.fixture
def subscriber(nats_server: NatsServer) -> Iterator[natsync.Subscriber]:
    with natsync.Subscriber(nats_server.url, user="ada", password="S3CRET") as subscriber:
        yield subscriber


def test_an_answer_tells_who_serves_what_and_how_much(
    subscriber: natsync.Subscriber, natsync_client: natsync.Client
) -> None:
    go_on = threading.Event()

    @subscriber.stream("monitor.stream", queue="group")
    def stream(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        yield "begun"
        go_on.wait(PATIENCE)

    @subscriber.handler("monitor.handler")
    def handler(ctx: natsync.Context, request: natsync.Message) -> str:
        return "done"

    monitor.answer(subscriber, name="mine", subject="monitor.stats")
    natsync_client.request("monitor.handler", timeout=PATIENCE)
    with natsync_client.stream("monitor.stream", timeout=PATIENCE) as chunks:
        assert next(chunks) == b"begun"
        answer = natsync_client.request("monitor.stats", timeout=PATIENCE).json()
        go_on.set()
    assert answer["type"] == monitor.TYPE
    assert (answer["name"], answer["pid"], answer["version"]) == ("mine", os.getpid(), natsync.__version__)
    assert (answer["status"], answer["streams"]) == ("connected", 1)
    by_subject = {one["subject"]: one for one in answer["registrations"]}
    assert sorted(by_subject) == ["monitor.handler", "monitor.stream"]  # and not its own
    stats = by_subject["monitor.stream"]
    assert (stats["queue"], stats["received"], stats["active"], stats["processed"]) == ("group", 1, 1, 0)
    assert by_subject["monitor.handler"]["received"] == 1
    assert answer["connection"]["out_messages"] > 0
    assert "S3CRET" not in json.dumps(answer)


def test_an_answer_tells_of_as_many_single_streams_as_are_asked_for(
    subscriber: natsync.Subscriber, natsync_client: natsync.Client, nats_server: NatsServer
) -> None:
    @subscriber.stream("monitor.single")
    def stream(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        for _ in range(int(request.data)):
            sender.send(b"12345")
        ctx.wait(PATIENCE)
        sender.end()

    monitor.answer(subscriber, subject="monitor.stats")

    def asked(question: bytes) -> list[dict[str, object]]:
        found = natsync_client.request("monitor.stats", question, timeout=PATIENCE).json()["open_streams"]
        assert isinstance(found, list)
        return found

    # One after the other: the first is longest under way, and waits for credit that its requester does not give.
    streams = [natsync_client.stream("monitor.single", "5", window=2)]
    eventually(lambda: [one["state"] for one in asked(b'{"streams": 9}')] == ["waiting"], PATIENCE)
    with natsync.connect(nats_server.url, framed=False) as plain:
        streams.append(plain.stream("monitor.single", "3"))
        eventually(lambda: [one["chunks"] for one in asked(b'{"streams": 9}')] == [2, 3], PATIENCE)
        streams.append(natsync_client.stream("monitor.single", "0"))
        eventually(lambda: [one["chunks"] for one in asked(b'{"streams": 9}')] == [2, 3, 0], PATIENCE)
        found = asked(b'{"streams": 9}')
        for stream in streams:
            stream.close()
    assert [one["subject"] for one in found] == ["monitor.single"] * 3
    assert [(one["mode"], one["state"], one["size_bytes"]) for one in found] == [
        ("framed", "waiting", 10), ("plain", "open", 15), ("framed", "open", 0),
    ]  # fmt: skip
    assert len({one["number"] for one in found}) == 3
    assert set(found[0]) == {"subject", "number", "mode", "state", "seconds", "chunks", "size_bytes"}  # no inbox
    for question in (b"", b"{}", b"[]", b"nope", b'{"streams": "9"}', b'{"streams": -1}', b'{"streams": 0}'):
        assert asked(question) == []
    eventually(lambda: asked(b'{"streams": 9}') == [], PATIENCE)


def test_a_stream_whose_requester_is_not_heard_from_is_silent(nats_server: NatsServer) -> None:
    subscriber = natsync.Subscriber(nats_server.url, heartbeat=0.1, resume_grace=8)
    handle = subscriber.stream_subscribe("monitor.silent", lambda ctx, request, sender: ctx.wait(PATIENCE))
    with subscriber, FaultProxy(nats_server.url) as proxy:
        with natsync.connect(proxy.url, heartbeat=0.1) as client:
            stream = client.stream("monitor.silent")
            eventually(lambda: [one.state for one in handle.streams()] == ["open"], PATIENCE)
            proxy.refuse()
            proxy.cut()
            eventually(lambda: [one.state for one in handle.streams()] == ["silent"], PATIENCE)
            del stream
        subscriber.close(0)


def test_a_subscriber_that_was_not_told_to_does_not_answer(
    subscriber: natsync.Subscriber, natsync_client: natsync.Client
) -> None:
    subscriber.subscribe("monitor.other", lambda message: None)
    with pytest.raises(natsync.NoRespondersError):
        natsync_client.request("monitor.unasked", timeout=PATIENCE)
    handle = monitor.answer(subscriber, subject="monitor.unasked")
    assert natsync_client.request("monitor.unasked", timeout=PATIENCE).json()["name"]
    handle.stop()
    with pytest.raises(natsync.NoRespondersError):
        natsync_client.request("monitor.unasked", timeout=PATIENCE)


def test_a_snapshot_needs_no_connection() -> None:
    subscriber = natsync.Subscriber("nats://127.0.0.1:1")
    taken = monitor.snapshot(subscriber)
    assert (taken["status"], taken["streams"], taken["registrations"], taken["connection"]) == ("new", 0, [], {})


def test_a_message_without_a_reply_subject_is_no_question(
    subscriber: natsync.Subscriber, natsync_client: natsync.Client
) -> None:
    handle = monitor.answer(subscriber, subject="monitor.mute")
    natsync_client.publish("monitor.mute")
    eventually(lambda: handle.stats["processed"] == 1, PATIENCE)
    assert handle.stats["failed"] == 0


# -- rates -------------------------------------------------------------------------------------------------------------


def answer_of(id: str, clock: float, received: int = 0, sent: int = 0) -> dict[str, object]:
    counters = {"received": received, "processed": received, "failed": 0, "cancelled": 0, "dropped": 0, "active": 1}
    return {
        "id": id,
        "name": "mine",
        "host": "here",
        "pid": 1,
        "clock_seconds": clock,
        "registrations": [{"subject": "a", "queue": "q", **counters}],
        "connection": {"out_messages": sent, "out_bytes": 10 * sent, "in_messages": 0},
    }


def test_rates_are_those_between_two_answers_by_the_subscribers_own_clock() -> None:
    rounds = Rounds()
    rounds.add([answer_of("one", 100.0, received=10, sent=5)])
    assert rounds.handlers()[0]["received_rate"] is None
    rounds.add([answer_of("one", 102.0, received=30, sent=10)])
    assert rounds.handlers()[0]["received_rate"] == 10.0
    assert rounds.subscribers()[0]["out_bytes_rate"] == 25.0


def test_the_same_subject_and_group_of_several_subscribers_is_added_up() -> None:
    rounds = Rounds()
    for clock in (1.0, 2.0):
        rounds.add([answer_of("one", clock, received=int(clock)), answer_of("two", clock, received=int(3 * clock))])
    (handler,) = rounds.handlers()
    assert (handler["subscribers"], handler["active"], handler["received"]) == (2, 2, 8)
    assert handler["received_rate"] == 4.0


def test_the_rates_of_a_stream_are_its_own() -> None:
    rounds = Rounds()
    stream = {"subject": "a", "number": 7, "mode": "framed", "state": "open", "seconds": 1.0}
    other = {**stream, "number": 8, "seconds": 3.0, "chunks": 1, "size_bytes": 1}
    for clock, chunks in ((1.0, 10), (3.0, 30)):
        now = {**stream, "chunks": chunks, "size_bytes": 100 * chunks}
        rounds.add([{**answer_of("one", clock), "open_streams": [now, other] if chunks == 30 else [now]}])
    longest, second = rounds.streams(5)
    assert (longest["number"], longest["chunks_rate"]) == (8, None)
    assert (second["number"], second["chunks_rate"], second["bytes_rate"]) == (7, 10.0, 1000.0)
    assert second["subscriber"] == "mine"
    assert rounds.streams(1) == [longest]
    rounds.add([])
    assert rounds.streams(5) == []


def test_a_silent_subscriber_is_shown_as_such_and_then_left_out() -> None:
    rounds = Rounds()
    rounds.add([answer_of("one", 1.0)])
    for silent in range(1, KEPT_ROUNDS + 1):
        rounds.add([])
        assert rounds.subscribers()[0]["silent_rounds"] == silent
        assert rounds.handlers() == []
    rounds.add([])
    assert rounds.subscribers() == []


def test_a_counter_that_went_back_makes_no_negative_rate() -> None:
    rounds = Rounds()
    rounds.add([answer_of("one", 1.0, received=10)])
    rounds.add([answer_of("one", 2.0, received=3)])
    assert rounds.handlers()[0]["received_rate"] == 0.0
