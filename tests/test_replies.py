"""Replies: one request, many answers; each way in which they end (ADR-47), and what must not be left behind."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import natsync
from natsync import replies
from natsync.testing import FaultProxy, NatsServer, eventually
from rawclient import PATIENCE

Answer = Callable[[natsync.Message], None]


@pytest.fixture
def client(natsync_client: natsync.Client) -> natsync.Client:
    return natsync_client.open()


@pytest.fixture
def responders(nats_server: NatsServer) -> Iterator[natsync.Client]:
    """A client of its own for those who answer."""
    with natsync.Client(nats_server.url) as responders:
        yield responders


def answering(responders: natsync.Client, subject: str, answer: Answer) -> None:
    responders.subscribe(subject, answer)
    responders.flush()


def sending(*payloads: str) -> Answer:
    def answer(message: natsync.Message) -> None:
        for payload in payloads:
            message.respond(payload)

    return answer


def texts(found: Any) -> list[str]:
    return [message.text() for message in found]


def left(client: natsync.Client) -> int:
    return int(client.stats()["waiting_replies"])


# -- how they end --------------------------------------------------------------------------------------------------


def test_replies_of_several_responders_come_until_the_timeout(
    client: natsync.Client, responders: natsync.Client
) -> None:
    for name in "abc":
        answering(responders, "many.all", sending(name))
    began = time.monotonic()
    assert sorted(texts(client.request_many("many.all", timeout=2.0))) == ["a", "b", "c"]
    assert 2.0 <= time.monotonic() - began < PATIENCE
    assert left(client) == 0


def test_without_a_reply_the_timeout_is_an_end_and_no_error(client: natsync.Client, responders: natsync.Client) -> None:
    answering(responders, "many.silent", sending())
    client.flush()
    assert list(client.request_many("many.silent", timeout=0.5)) == []


def test_max_messages_ends_at_once(client: natsync.Client, responders: natsync.Client) -> None:
    answering(responders, "many.most", sending("1", "2", "3"))
    assert texts(client.request_many("many.most", timeout=None, max_messages=2)) == ["1", "2"]
    assert left(client) == 0
    eventually(lambda: client.stats()["late_replies"] == 1, PATIENCE)


def test_stall_ends_when_nothing_follows_but_does_not_count_before_the_first(
    client: natsync.Client, responders: natsync.Client
) -> None:
    let_go = threading.Event()

    def answer(message: natsync.Message) -> None:
        let_go.wait(PATIENCE)
        message.respond("1")
        message.respond("2")

    answering(responders, "many.stall", answer)
    found = client.request_many("many.stall", timeout=PATIENCE, stall=0.5)
    timer = threading.Timer(1.5, let_go.set)  # the first takes three stalls
    timer.start()
    assert texts(found) == ["1", "2"]
    timer.join()


@pytest.mark.parametrize("stall", [0, None, 100])
def test_a_stall_of_zero_or_beyond_the_timeout_is_as_none(
    client: natsync.Client, responders: natsync.Client, stall: float | None
) -> None:
    answering(responders, "many.stall.none", sending("1", "2"))
    began = time.monotonic()
    assert texts(client.request_many("many.stall.none", timeout=1.5, stall=stall)) == ["1", "2"]
    assert time.monotonic() - began >= 1.5


def test_the_callers_own_time_does_not_count_as_stall(client: natsync.Client, responders: natsync.Client) -> None:
    asked: list[natsync.Message] = []
    answering(responders, "many.slow", asked.append)
    found = client.request_many("many.slow", timeout=PATIENCE, stall=2.5, max_messages=2)
    eventually(lambda: asked, PATIENCE)
    asked[0].respond("1")
    assert next(found).text() == "1"
    threading.Event().wait(2.7)  # the caller is busy for longer than the stall
    timer = threading.Timer(0.05, lambda: asked[0].respond("2"))
    timer.start()
    assert texts(found) == ["2"]
    timer.join()


def test_next_waits_as_long_as_it_is_told_and_the_replies_go_on(
    client: natsync.Client, responders: natsync.Client
) -> None:
    asked: list[natsync.Message] = []
    answering(responders, "many.next", asked.append)
    found = client.request_many("many.next", timeout=PATIENCE, max_messages=2)
    for timeout in (0, 0.1):
        with pytest.raises(natsync.TimedOut, match="more may come"):
            found.next(timeout)
    eventually(lambda: asked, PATIENCE)
    asked[0].respond("1")
    assert found.next(PATIENCE).text() == "1"
    asked[0].respond("2")
    assert found.next().text() == "2"
    for timeout in (None, 0):
        with pytest.raises(natsync.StreamEnded):
            found.next(timeout)
    assert left(client) == 0


def test_the_replies_end_within_a_longer_wait(client: natsync.Client, responders: natsync.Client) -> None:
    answering(responders, "many.next.end", lambda message: None)
    client.flush()
    with pytest.raises(natsync.StreamEnded):
        client.request_many("many.next.end", timeout=1.0).next(PATIENCE)


def test_waits_shorter_than_the_stall_do_not_put_it_off(client: natsync.Client, responders: natsync.Client) -> None:
    answering(responders, "many.next.stall", sending("1"))
    found = client.request_many("many.next.stall", timeout=PATIENCE, stall=0.5)
    assert found.next(PATIENCE).text() == "1"
    began = time.monotonic()
    with pytest.raises(natsync.StreamEnded):
        while True:
            try:
                found.next(0.1)
            except natsync.TimedOut:
                assert time.monotonic() - began < PATIENCE / 2
    assert time.monotonic() - began >= 0.5


def test_next_keeps_its_timeout_while_another_thread_takes(client: natsync.Client, responders: natsync.Client) -> None:
    asked: list[natsync.Message] = []
    answering(responders, "many.two", asked.append)
    found = client.request_many("many.two", timeout=PATIENCE, max_messages=1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, found)
        eventually(lambda: found._taking.locked() and asked, PATIENCE)
        with pytest.raises(natsync.TimedOut, match="another thread"):
            found.next(0.05)
        asked[0].respond("1")
        assert first.result(PATIENCE).text() == "1"


def test_map_keeps_next_and_close(client: natsync.Client, responders: natsync.Client) -> None:
    answering(responders, "many.map", sending("1", "2", "3"))
    with client.request_many("many.map", timeout=PATIENCE).map(natsync.Message.text).map(int) as numbers:
        assert (numbers.next(PATIENCE), next(numbers)) == (1, 2)
    assert left(client) == 0
    assert list(numbers) == []


def test_no_responders_end_a_next(client: natsync.Client) -> None:
    with pytest.raises(natsync.NoRespondersError):
        client.request_many("many.next.nobody", timeout=PATIENCE).next(PATIENCE)


def test_what_came_before_the_timeout_is_given_out_after_it_and_nothing_else(
    client: natsync.Client, responders: natsync.Client
) -> None:
    asked: list[natsync.Message] = []
    answering(responders, "many.late", asked.append)
    found = client.request_many("many.late", timeout=3.0)
    eventually(lambda: asked, PATIENCE)
    for number in "123":
        asked[0].respond(number)
    assert next(found).text() == "1"
    threading.Event().wait(3.1)
    assert next(found).text() == "2"  # the timeout has passed: what has come is the rest
    asked[0].respond("4")
    responders.flush()
    eventually(lambda: client.stats()["late_replies"] == 1, PATIENCE)
    assert texts(found) == ["3"]


@pytest.mark.parametrize("sentinel", [b"", ""])
def test_an_empty_message_is_the_usual_sentinel(
    client: natsync.Client, responders: natsync.Client, sentinel: Any
) -> None:
    answering(responders, "many.end", sending("1", "2", "", "3"))
    assert texts(client.request_many("many.end", timeout=None, sentinel=sentinel)) == ["1", "2"]


def test_a_sentinel_may_be_any_payload_or_a_function(client: natsync.Client, responders: natsync.Client) -> None:
    answering(responders, "many.end.other", sending("1", "", "done", "3"))
    assert texts(client.request_many("many.end.other", timeout=None, sentinel=b"done")) == ["1", ""]
    goes_on = client.request_many("many.end.other", timeout=None, sentinel=lambda message: message.data != b"done")
    assert texts(goes_on) == ["1", ""]


def test_what_a_sentinel_function_raises_is_the_callers_and_ends_the_replies(
    client: natsync.Client, responders: natsync.Client
) -> None:
    answering(responders, "many.end.raises", sending("1"))

    def raises(message: natsync.Message) -> bool:
        raise RuntimeError("on purpose")

    found = client.request_many("many.end.raises", timeout=None, sentinel=raises)
    with pytest.raises(RuntimeError, match="on purpose"):
        next(found)
    assert list(found) == []
    assert left(client) == 0


def test_a_handlers_error_is_a_reply_among_others(client: natsync.Client, nats_server: NatsServer) -> None:
    with natsync.Subscriber(nats_server.url) as one, natsync.Subscriber(nats_server.url) as other:

        @one.handler("many.mixed")
        def works(ctx: natsync.Context, request: natsync.Message) -> str:
            return "fine"

        @other.handler("many.mixed")
        def fails(ctx: natsync.Context, request: natsync.Message) -> str:
            raise ValueError("broken here")

        found = list(client.request_many("many.mixed", timeout=PATIENCE, max_messages=2, sentinel=b""))
    assert sorted((one.text(), one.headers.get("Nats-Service-Error", "")) for one in found) == [
        ("", "broken here"),
        ("fine", ""),
    ]


# -- errors --------------------------------------------------------------------------------------------------------


def test_no_responders_is_an_error(client: natsync.Client) -> None:
    found = client.request_many("many.nobody", timeout=PATIENCE)
    with pytest.raises(natsync.NoRespondersError):
        next(found)
    assert list(found) == []
    assert left(client) == 0


def test_a_lost_link_is_an_error_behind_what_came(
    make_nats_server: Callable[..., NatsServer],
) -> None:
    server = make_nats_server()
    with natsync.Client(server.url) as client, natsync.Client(server.url) as responders:
        answering(responders, "many.lost", sending("1"))
        found = client.request_many("many.lost", timeout=PATIENCE)
        assert next(found).text() == "1"
        client.force_reconnect()
        with pytest.raises(natsync.ConnectionLost):
            next(found)


def test_replies_beyond_the_limit_end_in_an_error(
    client: natsync.Client, responders: natsync.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "PENDING_MESSAGES", 3)
    answering(responders, "many.flood", sending(*"12345"))
    found = client.request_many("many.flood", timeout=PATIENCE)
    eventually(lambda: found._many.error is not None, PATIENCE)
    assert [next(found).text() for _ in range(3)] == ["1", "2", "3"]
    with pytest.raises(natsync.SlowConsumerError):
        next(found)


def test_the_context_cancels(client: natsync.Client, responders: natsync.Client) -> None:
    answering(responders, "many.ctx", sending("1"))
    ctx = natsync.Context().with_cancel()
    found = client.request_many("many.ctx", timeout=PATIENCE, ctx=ctx)
    assert next(found).text() == "1"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, found)
        ctx.cancel("enough")
        with pytest.raises(natsync.Cancelled, match="enough"):
            waiting.result(PATIENCE)
    with pytest.raises(natsync.Cancelled):
        client.request_many("many.ctx", timeout=PATIENCE, ctx=ctx)
    assert left(client) == 0


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"timeout": -1}, natsync.InvalidArgument),
        ({"stall": -1}, natsync.InvalidArgument),
        ({"max_messages": 0}, natsync.InvalidArgument),
        ({"max_messages": True}, TypeError),
        ({"max_messages": 1.5}, TypeError),
        ({"sentinel": 5}, TypeError),
        ({"json": 1, "payload": b"x"}, natsync.InvalidArgument),
        ({"headers": {"a b": "c"}}, natsync.InvalidArgument),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(arguments: dict[str, Any], kind: type[Exception]) -> None:
    client = natsync.Client("nats://127.0.0.1:1")  # nothing is dialed: that would be another error
    with pytest.raises(kind):
        client.request_many("many.bad", **arguments)
    with pytest.raises(natsync.InvalidArgument):
        client.request_many("many.*")


# -- without a link ------------------------------------------------------------------------------------------------


@pytest.fixture
def cut_off(make_fault_proxy: Callable[..., FaultProxy]) -> Iterator[tuple[natsync.Client, FaultProxy]]:
    """A client whose link was lost, and what keeps it from another one until forward()."""
    proxy = make_fault_proxy()
    with natsync.connect(proxy.url, discover=False, reconnect_wait=0.05, reconnect_wait_max=0.1) as client:
        proxy.refuse()
        proxy.reset()
        eventually(lambda: client.status == "reconnecting", PATIENCE)
        yield client, proxy


def times_out(client: natsync.Client, subject: str) -> None:
    found = client.request_many(subject, timeout=0.2)
    with pytest.raises(natsync.RequestTimeout, match="was not sent: there was no link") as raised:
        next(found)
    assert raised.value.sent is False
    assert list(found) == []


def times_out_before_anybody_looks(client: natsync.Client, subject: str) -> None:
    found = client.request_many(subject, timeout=0.01)
    threading.Event().wait(0.05)
    with pytest.raises(natsync.RequestTimeout):
        next(found)


def is_closed(client: natsync.Client, subject: str) -> None:
    client.request_many(subject, timeout=None).close()


def is_closed_meanwhile(client: natsync.Client, subject: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        found = client.request_many(subject, timeout=None)
        waiting = pool.submit(list, found)
        found.close()
        assert waiting.result(PATIENCE) == []


def is_cancelled(client: natsync.Client, subject: str) -> None:
    ctx = natsync.Context().with_cancel()
    found = client.request_many(subject, timeout=None, ctx=ctx)
    ctx.cancel("enough")
    with pytest.raises(natsync.Cancelled, match="enough"):
        next(found)


def is_dropped(client: natsync.Client, subject: str) -> None:
    client.request_many(subject, timeout=None)
    gc.collect()
    eventually(lambda: client.stats()["out_pending_bytes"] == 0, PATIENCE)


@pytest.mark.parametrize(
    "ends", [times_out, times_out_before_anybody_looks, is_closed, is_closed_meanwhile, is_cancelled, is_dropped]
)
def test_a_request_that_waits_for_a_link_does_not_run_when_nobody_waits_for_replies_any_more(
    cut_off: tuple[natsync.Client, FaultProxy],
    responders: natsync.Client,
    ends: Callable[[natsync.Client, str], None],
) -> None:
    client, proxy = cut_off
    ran: list[natsync.Message] = []
    answering(responders, "many.unsent", ran.append)
    ends(client, "many.unsent")
    assert left(client) == 0
    client.publish("many.unsent", b"behind it")
    proxy.forward()
    eventually(lambda: ran, PATIENCE)
    assert [message.data for message in ran] == [b"behind it"]


def test_a_request_that_waits_for_a_link_is_sent_when_it_comes_in_time(
    cut_off: tuple[natsync.Client, FaultProxy], responders: natsync.Client
) -> None:
    client, proxy = cut_off
    answering(responders, "many.in_time", sending("1", ""))
    found = client.request_many("many.in_time", timeout=PATIENCE, sentinel=b"")
    proxy.forward()
    assert texts(found) == ["1"]


# -- leaving -------------------------------------------------------------------------------------------------------


def test_close_wakes_a_waiting_thread_and_is_idempotent(client: natsync.Client, responders: natsync.Client) -> None:
    answering(responders, "many.close", sending("1"))
    with client.request_many("many.close", timeout=None) as found:
        assert next(found).text() == "1"
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(list, found)
            found.close()
            assert waiting.result(PATIENCE) == []
        found.close()
    assert left(client) == 0


def test_dropped_replies_are_forgotten(client: natsync.Client, responders: natsync.Client) -> None:
    answering(responders, "many.drop", sending("1"))
    for message in client.request_many("many.drop", timeout=None):
        assert message.text() == "1"
        break
    gc.collect()
    assert left(client) == 0


def test_who_wants_to_know_is_told_once_that_they_are_over(client: natsync.Client, responders: natsync.Client) -> None:
    answering(responders, "many.over", sending("1"))
    told: list[str] = []
    taken = client.request_many("many.over", timeout=PATIENCE, max_messages=1)
    closed = client.request_many("many.over", timeout=PATIENCE)
    dropped = client.request_many("many.over", timeout=PATIENCE)
    for name, found in (("taken", taken), ("closed", closed), ("dropped", dropped)):
        found.when_finished(lambda name=name: told.append(name))  # type: ignore[misc]
    assert texts(taken) == ["1"]
    assert told == ["taken"]
    taken.close()
    closed.close()
    assert told == ["taken", "closed"]
    del found, dropped
    gc.collect()
    eventually(lambda: told == ["taken", "closed", "dropped"], PATIENCE)
    closed.when_finished(lambda: told.append("late"))
    assert told[-1] == "late"


def test_replies_keep_their_client(nats_server: NatsServer, responders: natsync.Client) -> None:
    answering(responders, "many.keep", sending("1"))
    found = natsync.connect(nats_server.url).request_many("many.keep", timeout=PATIENCE, max_messages=1)
    gc.collect()
    assert texts(found) == ["1"]


def test_hooks_are_told_of_it_as_of_one_request(nats_server: NatsServer, responders: natsync.Client) -> None:
    told: list[tuple[str, Any]] = []

    class Log(natsync.Hooks):
        def request_started(self, exchange: natsync.Exchange) -> None:
            exchange.headers["Who"] = "me"
            told.append(("started", exchange.subject))

        def request_done(self, exchange: natsync.Exchange, seconds: float, error: BaseException | None) -> None:
            told.append(("done", type(error)))

    answering(responders, "many.hooks", lambda message: message.respond(message.headers["Who"]))
    with natsync.Client(nats_server.url, hooks=Log()) as client:
        assert texts(client.request_many("many.hooks", max_messages=1)) == ["me"]
        with pytest.raises(natsync.NoRespondersError):
            list(client.request_many("many.hooks.nobody"))
        with pytest.raises(natsync.MaxPayloadExceeded):
            client.request_many("many.hooks", b"x" * (2 << 20))
        dropped = client.request_many("many.hooks")
        del dropped
        gc.collect()
        eventually(lambda: len(told) == 8, PATIENCE)
    assert told == [
        ("started", "many.hooks"),
        ("done", type(None)),
        ("started", "many.hooks.nobody"),
        ("done", natsync.NoRespondersError),
        ("started", "many.hooks"),
        ("done", natsync.MaxPayloadExceeded),
        ("started", "many.hooks"),
        ("done", type(None)),
    ]
