"""Budgets of retries, what a refusing responder asks for, what hooks learn, and what is repeated on the wire."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tenacity

import natsync
from natsync import retry_budget
from natsync.context import Context
from natsync.errors import NoRespondersError, StreamRefused
from natsync.retry import Retry, bucket_for, run
from natsync.retry_budget import BURST, Bucket, Budgets
from natsync.testing import NatsServer
from rawclient import PATIENCE
from support import run_python

QUICK: dict[str, Any] = {"initial": 0.001, "maximum": 0.001}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """time.monotonic() of the module, to be set."""
    now = [1000.0]
    monkeypatch.setattr(retry_budget.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def budgets(monkeypatch: pytest.MonkeyPatch) -> Budgets:
    """New ones for each test."""
    budgets = Budgets()
    monkeypatch.setattr(retry_budget, "budgets", budgets)
    return budgets


def taken(bucket: Bucket, asked: int) -> int:
    return sum(bucket.take() for _ in range(asked))


# -- the bucket --------------------------------------------------------------------------------------------------------


def test_a_burst_then_ten_a_second(clock: list[float]) -> None:
    bucket = Bucket("a")
    assert taken(bucket, 500) == BURST == 100
    clock[0] += 1
    assert taken(bucket, 500) == 10
    clock[0] += 3600
    assert taken(bucket, 500) == 100


def test_a_fifth_of_the_calls_may_be_repeated(clock: list[float]) -> None:
    bucket = Bucket("a")
    taken(bucket, 500)
    for _ in range(51):
        bucket.called()
    assert taken(bucket, 500) == 10


def test_each_subject_has_its_own_and_those_long_unused_are_forgotten(budgets: Budgets) -> None:
    bucket = budgets.of("a")
    assert budgets.of("a") is bucket
    assert budgets.of("b") is not bucket
    for number in range(retry_budget.MOST_SUBJECTS - 2):
        budgets.of(f"n.{number}")
    assert budgets.of("a") is bucket
    for number in range(retry_budget.MOST_SUBJECTS):
        budgets.of(f"m.{number}")
    assert budgets.of("a") is not bucket
    assert len(budgets) == retry_budget.MOST_SUBJECTS


def test_threads_together_take_no_more_than_there_is(clock: list[float]) -> None:
    bucket = Bucket("a")
    with ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(lambda _: taken(bucket, 50), range(16))) == 100


def test_an_empty_bucket_is_told_of_once_an_episode(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    bucket = Bucket("orders.new")
    taken(bucket, 200)
    assert [one.getMessage() for one in caplog.records] == [
        "too many retries on 'orders.new': some are left out until calls succeed again"
    ]
    clock[0] += 1
    taken(bucket, 100)
    assert len(caplog.records) == 2


def test_a_forked_child_has_a_full_bucket() -> None:
    done = run_python(
        "import os\n"
        "from natsync import retry_budget\n"
        "while retry_budget.of('a').take(): pass\n"
        "if os.fork() == 0:\n"
        "    os._exit(0 if retry_budget.of('a').take() else 1)\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    assert (done.stdout, done.returncode) == ("0\n", 0)


# -- policies under it -------------------------------------------------------------------------------------------------


def attempts(policy: Any, bucket: Bucket | None, error: Exception | None = None) -> int:
    """How often a call is tried that always fails."""
    error, tries = error or NoRespondersError("a"), []

    def call(attempt: int) -> None:
        tries.append(attempt)
        raise error

    with pytest.raises(type(error)) as caught:
        run(call, policy, None, bucket=bucket)
    assert caught.value is error
    return len(tries)


@pytest.mark.parametrize(
    "policy",
    [
        Retry(attempts=8, **QUICK),
        tenacity.Retrying(stop=tenacity.stop_after_attempt(8), retry=tenacity.retry_if_exception_type(Exception)),
    ],
    ids=["natsync", "tenacity"],
)
def test_an_outage_is_not_multiplied_by_the_callers(policy: Any, clock: list[float]) -> None:
    bucket = Bucket("a")
    tries = [attempts(policy, bucket) for _ in range(50)]
    assert sum(tries) == 50 + 100  # each its first one, and the burst together
    assert (tries[0], tries[-1]) == (8, 1)


def test_only_retries_that_are_made_are_spent(clock: list[float]) -> None:
    bucket = Bucket("a")
    for _ in range(50):
        assert attempts(Retry(attempts=2, **QUICK), bucket) == 2
        assert attempts(Retry(attempts=5, **QUICK), bucket, natsync.HandlerError("failed")) == 1
    assert taken(bucket, 500) == 50


def test_a_call_without_a_policy_or_with_budget_false_counts_for_nothing(budgets: Budgets) -> None:
    assert bucket_for(None, "a") is None
    assert bucket_for(Retry(budget=False), "a") is None
    assert len(budgets) == 0
    assert bucket_for(Retry(), "a") is budgets.of("a")
    assert bucket_for(tenacity.Retrying(), "a") is budgets.of("a")


def test_many_threads_at_a_subject_that_nobody_serves_keep_within_the_budget(nats_server: NatsServer) -> None:
    tried: list[str] = []

    class Count(natsync.Hooks):
        def retrying(self, exchange: natsync.Exchange, attempt: int, wait_seconds: float, error: BaseException) -> None:
            tried.append(exchange.subject)

    retry = Retry(attempts=20, initial=0.001, maximum=0.01)
    with natsync.Client(nats_server.url, hooks=Count()) as client, ThreadPoolExecutor(16) as threads:
        begin = time.monotonic()
        for one in [threads.submit(client.request, "budget.none", b"", retry=retry, timeout=30) for _ in range(160)]:
            with pytest.raises(NoRespondersError):
                one.result(PATIENCE)
        seconds = time.monotonic() - begin
    assert 100 <= len(tried) <= 100 + 160 * retry_budget.PER_CALL + seconds * retry_budget.PER_SECOND + 1


# -- what a responder asks for -----------------------------------------------------------------------------------------


def test_a_refusing_responder_is_given_the_time_that_it_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(Context, "wait", lambda ctx, seconds: waits.append(seconds) or ctx.cancelled)
    assert attempts(Retry(attempts=3, initial=0.1, maximum=0.4), None, StreamRefused("full", retry_after=2.0)) == 3
    assert all(2.0 <= wait <= 2.4 for wait in waits)
    waits.clear()
    assert attempts(Retry(attempts=2, initial=0.1, jitter=False), None, StreamRefused("full", retry_after=None)) == 2
    assert waits == [pytest.approx(0.1)]


def test_the_deadline_ends_a_wait_that_would_outlast_it() -> None:
    begin = time.monotonic()
    ctx = Context().with_timeout(0.1)
    with pytest.raises(natsync.DeadlineExceeded):
        run(_refused, Retry(), ctx)
    assert 0.09 <= time.monotonic() - begin < 5


def _refused(attempt: int) -> None:
    raise StreamRefused("full", retry_after=60.0)


# -- hooks -------------------------------------------------------------------------------------------------------------


class Told(natsync.Hooks):
    def __init__(self) -> None:
        self.all: list[tuple[str, int, str]] = []

    def retrying(self, exchange: natsync.Exchange, attempt: int, wait_seconds: float, error: BaseException) -> None:
        assert 0 <= wait_seconds <= 0.001
        self.all.append((exchange.kind, attempt, type(error).__name__))


@pytest.mark.parametrize("verb", ["request", "stream", "stream_request"])
def test_hooks_are_told_of_each_retry(nats_server: NatsServer, verb: str) -> None:
    told = Told()
    calls: dict[str, Callable[[natsync.Client], object]] = {
        "request": lambda client: client.request("retry.none", retry=Retry(attempts=3, **QUICK)),
        "stream": lambda client: list(client.stream("retry.none", retry=Retry(attempts=3, **QUICK))),
        "stream_request": lambda client: client.stream_request(
            "retry.none", b"", print, retry=Retry(attempts=3, **QUICK)
        ),
    }
    with natsync.Client(nats_server.url, hooks=told) as client, pytest.raises(NoRespondersError):
        calls[verb](client)
    kind = "request" if verb == "request" else "stream"
    assert told.all == [(kind, 1, "NoRespondersError"), (kind, 2, "NoRespondersError")]


# -- what is safe to retry, on the wire --------------------------------------------------------------------------------


class Failing:
    """Handlers that fail in one way the first time, and answer the second."""

    def __init__(self) -> None:
        self.runs = 0
        self.cursors: list[int | None] = []

    def _first(self, ctx: natsync.HandlerContext) -> bool:
        self.runs += 1
        self.cursors.append(ctx.resume_cursor)
        return self.runs == 1

    def error_before(self, ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        if self._first(ctx):
            raise ValueError("failed")
        yield b"1"
        yield b"2"

    def breaks_off(self, ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        first, cursor = self._first(ctx), ctx.resume_cursor or 0
        for chunk in (b"1", b"2")[cursor:]:
            sender.send(chunk)
            if first:
                sender.send_error("going away", code=natsync.Code.UNAVAILABLE)
                return
        sender.end()


PLAIN, IDEMPOTENT, RESUMABLE = (
    Retry(attempts=3, **QUICK),
    Retry(attempts=3, idempotent=True, **QUICK),
    Retry(attempts=3, resumable=True, **QUICK),
)


@pytest.fixture
def client(nats_server: NatsServer) -> Iterator[natsync.Client]:
    with natsync.Client(nats_server.url) as client:
        yield client


@pytest.fixture
def subscriber(nats_server: NatsServer) -> Iterator[natsync.Subscriber]:
    with natsync.Subscriber(nats_server.url, max_streams=1) as subscriber:
        yield subscriber


@pytest.mark.parametrize(("policy", "runs"), [(PLAIN, 1), (IDEMPOTENT, 2)], ids=["plain", "idempotent"])
def test_an_error_before_any_chunk_is_repeated_only_if_idempotent(
    client: natsync.Client, subscriber: natsync.Subscriber, policy: Retry, runs: int
) -> None:
    handlers = Failing()
    subscriber.stream_subscribe("safe.error", handlers.error_before)
    stream = client.stream("safe.error", retry=policy, timeout=PATIENCE)
    if runs == 1:
        with pytest.raises(natsync.HandlerError, match="failed"):
            list(stream)
    else:
        assert list(stream) == [b"1", b"2"]
    assert handlers.runs == runs


@pytest.mark.parametrize("policy", [PLAIN, IDEMPOTENT], ids=["plain", "idempotent"])
def test_after_a_chunk_nothing_is_repeated_unless_it_is_resumable(
    client: natsync.Client, subscriber: natsync.Subscriber, policy: Retry
) -> None:
    handlers = Failing()
    subscriber.stream_subscribe("safe.breaks", handlers.breaks_off)
    stream = client.stream("safe.breaks", retry=policy, timeout=PATIENCE)
    assert stream.next() == b"1"
    with pytest.raises(natsync.StreamError, match="going away"):
        stream.next()
    assert handlers.runs == 1


def test_a_refused_stream_is_repeated_without_asking(
    client: natsync.Client, subscriber: natsync.Subscriber, nats_server: NatsServer
) -> None:
    go_on, begun = threading.Event(), threading.Event()

    def handler(ctx: natsync.HandlerContext, request: natsync.Message) -> Iterator[bytes]:
        yield b"begun"
        begun.set()
        go_on.wait(PATIENCE)

    subscriber.stream_subscribe("safe.refused", handler)
    occupying = client.stream("safe.refused")
    assert begun.wait(PATIENCE)
    with pytest.raises(natsync.StreamRefused) as caught:
        list(client.stream("safe.refused"))
    asked = caught.value.retry_after
    assert asked is not None
    told: list[float] = []

    class Waits(natsync.Hooks):
        def retrying(self, exchange: natsync.Exchange, attempt: int, wait_seconds: float, error: BaseException) -> None:
            told.append(wait_seconds)
            go_on.set()

    with natsync.Client(nats_server.url, hooks=Waits()) as other:
        assert list(other.stream("safe.refused", retry=PLAIN, timeout=PATIENCE)) == [b"begun"]
    assert len(told) >= 1
    assert told[0] >= asked
    assert list(occupying) == [b"begun"]


def test_a_subject_without_responders_is_tried_until_there_is_one(
    client: natsync.Client, nats_server: NatsServer
) -> None:
    retry = Retry(attempts=None, initial=0.2, maximum=0.2)
    with ThreadPoolExecutor(1) as threads, natsync.Subscriber(nats_server.url) as late:
        asking = threads.submit(lambda: list(client.stream("safe.late", retry=retry, timeout=PATIENCE)))
        threading.Event().wait(0.05)
        late.stream_subscribe("safe.late", lambda ctx, request: iter([b"1"]))
        assert asking.result(PATIENCE) == [b"1"]
