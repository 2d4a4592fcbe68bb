"""Client.subscribe(): taking, limits, callbacks and endings, against a real nats-server."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import natsync
from natsync.protocol import Sub, Unsub
from natsync.testing import NatsServer, eventually
from rawclient import PATIENCE, RawClient, RecordingServer

Make = Callable[..., NatsServer]


@pytest.fixture
def client(natsync_client: natsync.Client) -> natsync.Client:
    return natsync_client.open()


@pytest.fixture
def raw(nats_server: NatsServer) -> Iterator[RawClient]:
    with RawClient(nats_server.url) as raw:
        yield raw


def send(raw: RawClient, subject: str, *payloads: object) -> None:
    """Publish from outside; the server has it all when this returns."""
    for payload in payloads:
        raw.publish(subject, str(payload).encode())
    raw.flush()


def data_of(subscription: natsync.Subscription, count: int) -> list[str]:
    return [subscription.next(PATIENCE).text() for _ in range(count)]


# -- taking --------------------------------------------------------------------------------------------------------


def test_next_gives_messages_in_order(client: natsync.Client, raw: RawClient) -> None:
    subscription = client.subscribe("x.order")
    client.flush()
    send(raw, "x.order", *range(1000))
    assert data_of(subscription, 1000) == [str(n) for n in range(1000)]
    assert (subscription.delivered, subscription.pending, subscription.dropped) == (1000, 0, 0)


def test_next_raises_timed_out(client: natsync.Client) -> None:
    subscription = client.subscribe("x.nothing")
    begin = time.monotonic()
    with pytest.raises(natsync.TimedOut):
        subscription.next(timeout=0.1)
    assert 0.09 <= time.monotonic() - begin < 5
    with pytest.raises(natsync.TimedOut):
        subscription.next(timeout=0)


def test_next_waits_for_ever_by_default_and_with_an_infinite_timeout(client: natsync.Client, raw: RawClient) -> None:
    subscription = client.subscribe("x.forever")
    client.flush()
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(subscription.next), pool.submit(subscription.next, float("inf"))]
        send(raw, "x.forever", 1, 2)
        assert {one.result(PATIENCE).text() for one in waiting} == {"1", "2"}


def test_iterating_waits_for_each_message_until_the_subscription_ends(client: natsync.Client, raw: RawClient) -> None:
    subscription = client.subscribe("x.iterate")
    client.flush()
    seen: list[str] = []

    def iterate() -> None:
        for message in subscription:
            seen.append(message.text())

    with ThreadPoolExecutor() as pool:
        iterating = pool.submit(iterate)
        send(raw, "x.iterate", 1, 2)
        eventually(lambda: seen == ["1", "2"])
        subscription.unsubscribe()
        iterating.result(PATIENCE)


def test_several_threads_take_each_message_once(client: natsync.Client, raw: RawClient) -> None:
    subscription = client.subscribe("x.share", max_messages=2000)
    client.flush()
    with ThreadPoolExecutor(4) as pool:
        takers = [pool.submit(lambda: [message.text() for message in subscription]) for _ in range(4)]
        send(raw, "x.share", *range(2000))
        taken = [text for taker in takers for text in taker.result(PATIENCE)]
    assert sorted(map(int, taken)) == list(range(2000))


def test_two_subscriptions_of_one_subject_each_get_every_message(client: natsync.Client, raw: RawClient) -> None:
    one, two = client.subscribe("x.both"), client.subscribe("x.*")
    client.flush()
    send(raw, "x.both", 1, 2)
    assert data_of(one, 2) == data_of(two, 2) == ["1", "2"]


def test_a_queue_group_gives_each_message_to_one_member(client: natsync.Client, raw: RawClient) -> None:
    members = [client.subscribe("x.group", queue="g") for _ in range(3)]
    client.flush()
    send(raw, "x.group", *range(300))
    client.flush()
    assert sum(member.pending for member in members) == 300
    assert min(member.pending for member in members) > 0
    assert members[0].queue == "g"


def test_wildcards_show_the_subject_of_each_message(client: natsync.Client, raw: RawClient) -> None:
    subscription = client.subscribe("x.a.*.>")
    client.flush()
    send(raw, "x.a.b.c.d", 1)
    message = subscription.next(PATIENCE)
    assert (message.subject, message.reply) == ("x.a.b.c.d", None)
    assert subscription.subject == "x.a.*.>"


def test_a_subject_of_odd_bytes_is_delivered_and_can_be_published_to(client: natsync.Client, raw: RawClient) -> None:
    subscription = client.subscribe("x.odd.*")
    raw.subscribe(b"x.odd.\xff\xfe")
    raw.publish(b"x.odd.\xff\xfe", b"1")
    message = subscription.next(PATIENCE)
    raw.next()
    client.publish(message.subject, b"2")
    assert raw.next().subject == b"x.odd.\xff\xfe"


def test_max_messages_ends_the_subscription_after_that_many(client: natsync.Client, raw: RawClient) -> None:
    subscription = client.subscribe("x.max", max_messages=3)
    client.flush()
    send(raw, "x.max", *range(10))
    assert [message.text() for message in subscription] == ["0", "1", "2"]
    with pytest.raises(natsync.ConnectionClosed):
        subscription.next(0)
    assert not subscription.active
    assert client.stats()["subscriptions"] == 0


def test_max_messages_counts_on_after_a_reconnect(make_nats_server: Make) -> None:
    server = make_nats_server()
    with natsync.connect(server.url, reconnect_wait=0.02, reconnect_wait_max=0.05) as client:
        subscription = client.subscribe("x.max", max_messages=5)
        for n in range(2):
            client.publish("x.max", str(n))
        assert data_of(subscription, 2) == ["0", "1"]
        server.kill()
        server.start()
        eventually(lambda: client.stats()["reconnects"] == 1)
        for n in range(2, 10):
            client.publish("x.max", str(n))
        assert [message.text() for message in subscription] == ["2", "3", "4"]


# -- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overflow", "kept"), [("drop_new", ["0", "1", "2"]), ("drop_old", ["7", "8", "9"])])
def test_beyond_pending_messages_the_policy_says_what_is_lost(
    client: natsync.Client, raw: RawClient, overflow: str, kept: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    subscription = client.subscribe("x.limit", pending_messages=3, overflow=overflow)  # type: ignore[arg-type]
    client.flush()
    send(raw, "x.limit", *range(10))
    client.flush()
    assert (subscription.pending, subscription.dropped) == (3, 7)
    assert data_of(subscription, 3) == kept
    send(raw, "x.limit", "later")
    assert data_of(subscription, 1) == ["later"]
    assert "slow consumer on 'x.limit'" in caplog.text


def test_beyond_pending_bytes_messages_are_lost_and_counted(client: natsync.Client, raw: RawClient) -> None:
    subscription = client.subscribe("x.bytes", pending_bytes=250)
    client.flush()
    send(raw, "x.bytes", *["x" * 100] * 4)
    client.flush()
    assert (subscription.pending, subscription.dropped) == (2, 2)


def test_overflow_error_raises_behind_what_had_room(client: natsync.Client, raw: RawClient) -> None:
    subscription = client.subscribe("x.error", pending_messages=2, overflow="error")
    client.flush()
    send(raw, "x.error", *range(5))
    client.flush()
    assert data_of(subscription, 2) == ["0", "1"]
    with pytest.raises(natsync.SlowConsumerError, match=r"x\.error.*2 messages"):
        subscription.next(PATIENCE)


def test_a_slow_subscription_slows_no_other(client: natsync.Client, raw: RawClient) -> None:
    go_on = threading.Event()
    client.subscribe("x.slow", lambda message: go_on.wait(PATIENCE), pending_messages=10)
    quick = client.subscribe("x.quick")
    client.flush()
    send(raw, "x.slow", *range(100))
    send(raw, "x.quick", "through")
    assert data_of(quick, 1) == ["through"]
    assert client.rtt(PATIENCE) < PATIENCE
    go_on.set()


# -- callbacks -----------------------------------------------------------------------------------------------------


def test_a_callback_gets_messages_in_order_on_a_worker(client: natsync.Client, raw: RawClient) -> None:
    seen: list[str] = []
    threads: set[str] = set()

    def callback(message: natsync.Message) -> None:
        threads.add(threading.current_thread().name)
        seen.append(message.text())

    client.subscribe("x.callback", callback)
    client.flush()
    send(raw, "x.callback", *range(2000))
    eventually(lambda: len(seen) == 2000)
    assert seen == [str(n) for n in range(2000)]
    assert all("worker" in name for name in threads)


def test_a_callback_is_never_run_twice_at_once_by_default(client: natsync.Client, raw: RawClient) -> None:
    inside = threading.Lock()
    overlaps: list[str] = []
    done = threading.Semaphore(0)

    def callback(message: natsync.Message) -> None:
        if not inside.acquire(blocking=False):
            overlaps.append(message.text())
        else:
            time.sleep(0)  # give others the chance to come in
            inside.release()
        done.release()

    client.subscribe("x.single", callback)
    client.flush()
    send(raw, "x.single", *range(500))
    assert all(done.acquire(timeout=PATIENCE) for _ in range(500))
    assert overlaps == []


def test_concurrency_runs_that_many_at_once(client: natsync.Client, raw: RawClient) -> None:
    together = threading.Barrier(5, timeout=PATIENCE)
    passed = threading.Semaphore(0)

    def callback(message: natsync.Message) -> None:
        together.wait()
        passed.release()

    client.subscribe("x.concurrent", callback, concurrency=5)
    client.flush()
    send(raw, "x.concurrent", *range(10))
    assert all(passed.acquire(timeout=PATIENCE) for _ in range(10))


@pytest.mark.parametrize("error", [ValueError("as told"), SystemExit("as told")], ids=repr)
def test_a_callback_that_raises_is_logged_and_gets_the_next_message(
    client: natsync.Client, raw: RawClient, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    seen: list[str] = []

    def callback(message: natsync.Message) -> None:
        if message.text() == "bad":
            raise error
        seen.append(message.text())

    client.subscribe("x.raises", callback)
    client.flush()
    with caplog.at_level(logging.ERROR, "natsync"):
        send(raw, "x.raises", "1", "bad", "2")
        eventually(lambda: seen == ["1", "2"])
    assert "x.raises" in caplog.text
    assert "as told" in caplog.text


def test_a_blocked_callback_keeps_no_other_callback_from_running(client: natsync.Client, raw: RawClient) -> None:
    go_on, ran = threading.Event(), threading.Event()
    client.subscribe("x.blocked", lambda message: go_on.wait(PATIENCE))
    client.subscribe("x.free", lambda message: ran.set())
    client.flush()
    send(raw, "x.blocked", 1, 2)
    send(raw, "x.free", 1)
    assert ran.wait(PATIENCE)
    go_on.set()


def test_a_callback_may_unsubscribe_itself(client: natsync.Client, raw: RawClient) -> None:
    seen: list[str] = []

    def callback(message: natsync.Message) -> None:
        seen.append(message.text())
        subscription.unsubscribe()

    subscription = client.subscribe("x.self", callback)
    client.flush()
    send(raw, "x.self", 1, 2, 3)
    client.flush()
    eventually(lambda: not subscription.active)
    assert seen == ["1"]


def test_a_callback_may_subscribe_and_flush(client: natsync.Client, raw: RawClient) -> None:
    done = threading.Event()

    def callback(message: natsync.Message) -> None:
        inner = client.subscribe("x.inner")
        client.flush()
        client.publish("x.inner", b"1")
        if inner.next(PATIENCE).data == b"1":
            done.set()

    client.subscribe("x.outer", callback)
    client.flush()
    send(raw, "x.outer", 1)
    assert done.wait(PATIENCE)


def test_messages_of_a_callback_cannot_be_taken_by_next(client: natsync.Client) -> None:
    subscription = client.subscribe("x.callback", print)
    with pytest.raises(RuntimeError):
        subscription.next(0)
    with pytest.raises(RuntimeError):
        iter(subscription).__next__()


def test_a_callback_that_is_none_that_can_be_called_is_a_type_error(client: natsync.Client) -> None:
    with pytest.raises(TypeError, match="str"):
        client.subscribe("x.callback", "not a function")  # type: ignore[arg-type]
    assert client.stats()["subscriptions"] == 0


# -- ending --------------------------------------------------------------------------------------------------------


def test_unsubscribe_stops_at_once_and_forgets_what_waits(client: natsync.Client, raw: RawClient) -> None:
    subscription = client.subscribe("x.stop")
    client.flush()
    send(raw, "x.stop", *range(5))
    client.flush()
    subscription.unsubscribe()
    subscription.unsubscribe()
    send(raw, "x.stop", "later")
    client.flush()
    assert (subscription.pending, subscription.dropped, subscription.active) == (0, 5, False)
    with pytest.raises(natsync.ConnectionClosed):
        subscription.next(0)


def test_unsubscribe_wakes_a_waiting_next(client: natsync.Client) -> None:
    subscription = client.subscribe("x.wake")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(subscription.next)
        subscription.unsubscribe()
        with pytest.raises(natsync.ConnectionClosed):
            waiting.result(PATIENCE)


def test_close_of_the_client_wakes_a_waiting_next_and_leaves_what_came(nats_server: NatsServer, raw: RawClient) -> None:
    client = natsync.connect(nats_server.url)
    waiting_on, full = client.subscribe("x.close.empty"), client.subscribe("x.close.full")
    client.flush()
    send(raw, "x.close.full", 1)
    client.flush()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(waiting_on.next)
        client.close()
        with pytest.raises(natsync.ConnectionClosed):
            waiting.result(PATIENCE)
    assert full.next(0).text() == "1"
    assert list(full) == []


def test_leaving_the_with_block_unsubscribes(client: natsync.Client) -> None:
    with client.subscribe("x.with") as subscription:
        assert client.stats()["subscriptions"] == 1
    assert not subscription.active
    assert client.stats()["subscriptions"] == 0


def test_close_unsubscribes(client: natsync.Client) -> None:
    subscription = client.subscribe("x.close")
    subscription.close()
    subscription.close()
    assert not subscription.active
    assert list(subscription) == []


def test_map_keeps_next_iteration_and_close(client: natsync.Client, raw: RawClient) -> None:
    with client.subscribe("x.map").map(natsync.Message.text).map(int) as numbers:
        client.flush()
        send(raw, "x.map", 1, 2)
        assert (numbers.next(PATIENCE), next(numbers)) == (1, 2)
        with pytest.raises(natsync.TimedOut):
            numbers.next(0)
    with pytest.raises(natsync.ConnectionClosed, match="has ended"):
        numbers.next()


def test_a_subscription_that_is_dropped_is_unsubscribed_at_the_server() -> None:
    with RecordingServer() as server, natsync.connect(server.url) as client:
        client.subscribe("x.dropped")
        gc.collect()
        eventually(lambda: [one for one in server.requests if isinstance(one, Unsub)])
        (sub,) = [one for one in server.subs if one.subject == b"x.dropped"]
        assert server.requests[-1] == Unsub(sub.sid, None)
        assert client.stats()["subscriptions"] == 0


def test_a_subscription_with_a_callback_lives_on_when_it_is_dropped(client: natsync.Client, raw: RawClient) -> None:
    ran = threading.Event()
    client.subscribe("x.kept", lambda message: ran.set())
    gc.collect()
    client.flush()
    send(raw, "x.kept", 1)
    assert ran.wait(PATIENCE)


def test_drain_has_the_callback_handle_all_that_came(client: natsync.Client, raw: RawClient) -> None:
    go_on, seen = threading.Event(), []

    def callback(message: natsync.Message) -> None:
        go_on.wait(PATIENCE)
        seen.append(message.text())

    subscription = client.subscribe("x.drain", callback)
    client.flush()
    send(raw, "x.drain", *range(50))
    with ThreadPoolExecutor() as pool:
        draining = pool.submit(subscription.drain, PATIENCE)
        go_on.set()
        draining.result(PATIENCE)
    assert seen == [str(n) for n in range(50)]
    send(raw, "x.drain", "later")
    client.flush()
    assert "later" not in seen


def test_drain_without_a_callback_leaves_what_came_to_be_taken(client: natsync.Client, raw: RawClient) -> None:
    subscription = client.subscribe("x.drain")
    client.flush()
    send(raw, "x.drain", *range(5))
    subscription.drain(PATIENCE)
    send(raw, "x.drain", "later")
    assert [message.text() for message in subscription] == ["0", "1", "2", "3", "4"]


def test_drain_raises_drain_timeout_when_a_callback_is_stuck(client: natsync.Client, raw: RawClient) -> None:
    go_on, entered = threading.Event(), threading.Event()

    def callback(message: natsync.Message) -> None:
        entered.set()
        go_on.wait(PATIENCE)

    subscription = client.subscribe("x.stuck", callback)
    client.flush()
    send(raw, "x.stuck", 1, 2)
    assert entered.wait(PATIENCE)
    with pytest.raises(natsync.DrainTimeout, match=r"x\.stuck"):
        subscription.drain(timeout=0.1)
    assert not subscription.active
    go_on.set()


def test_a_new_subscription_never_gets_messages_of_an_old_one(client: natsync.Client, raw: RawClient) -> None:
    for n in range(50):
        subscription = client.subscribe("x.churn")
        client.flush()
        raw.publish("x.churn", str(n).encode())
        assert subscription.next(PATIENCE).text() == str(n)
        subscription.unsubscribe()


def test_subscribe_sends_sub_with_queue_and_max_messages() -> None:
    with RecordingServer() as server, natsync.connect(server.url) as client:
        kept = client.subscribe("x.sub", queue="q", max_messages=7)
        client.flush()
        (sub,) = [one for one in server.subs if one.subject == b"x.sub"]
        assert sub == Sub(b"x.sub", b"q", sub.sid)
        assert Unsub(sub.sid, 7) in server.requests
        assert kept.active
