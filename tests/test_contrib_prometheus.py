"""Prometheus metrics, as a scrape shows them to prometheus-client's own parser."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import natsync
from natsync.contrib import prometheus
from natsync.testing import NatsServer, eventually
from processes import child
from rawclient import PATIENCE
from support import ROOT, run_python

DASHBOARD = ROOT / "examples" / "grafana" / "natsync.json"

Labels = dict[str, str]


class Scrape:
    """What a scrape says, parsed."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The one sample of this name and these labels; 0 if there is none yet."""
        found = [one.value for one in self.samples if one.name == name and one.labels == labels]
        assert len(found) <= 1
        return found[0] if found else 0.0

    def names(self) -> set[str]:
        return {sample.name for sample in self.samples}

    def labels(self) -> set[str]:
        return {value for sample in self.samples for value in sample.labels.values()}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> prometheus.Metrics:
    return prometheus.Metrics(registry)


def scrape(registry: CollectorRegistry) -> Scrape:
    return Scrape(generate_latest(registry).decode())


@pytest.fixture
def client(nats_server: NatsServer, metrics: prometheus.Metrics, mode: str) -> Iterator[natsync.Client]:
    with natsync.Client(nats_server.url, hooks=metrics, framed=mode == "framed") as client:
        yield client


@pytest.fixture
def subscriber(nats_server: NatsServer, metrics: prometheus.Metrics) -> Iterator[natsync.Subscriber]:
    subscriber = natsync.Subscriber(nats_server.url, hooks=metrics)

    @subscriber.stream("pm.words.*")
    def words(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        yield from request.data.split()

    @subscriber.stream("pm.fails")
    def fails(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        yield b"one"
        raise ValueError("broken")

    @subscriber.stream("pm.endless")
    def endless(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        yield b"one"
        while not ctx.wait(0.01):
            yield b"more"

    @subscriber.handler("pm.echo")
    def echo(ctx: natsync.Context, request: natsync.Message) -> bytes:
        if not request.data:
            raise KeyError("nothing")
        return request.data

    yield subscriber.open()
    subscriber.close(timeout=2)


def settled(registry: CollectorRegistry, name: str, value: float, **labels: str) -> Scrape:
    """A scrape in which the sample has this value; the responder's numbers come a moment later."""
    eventually(
        lambda: scrape(registry).value(name, **labels) == value,
        PATIENCE,
        f"{name}{labels} is not {value}: {scrape(registry).text}",
    )
    return scrape(registry)


# -- what is counted -----------------------------------------------------------------------------------------------


def test_a_stream_is_counted_on_both_sides(
    registry: CollectorRegistry, client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    assert list(client.stream("pm.words.now", b"one three", timeout=PATIENCE)) == [b"one", b"three"]
    settled(registry, "natsync_responses_total", 1, subject="pm.words.*", outcome="ok")
    seen = settled(registry, "natsync_response_bytes_total", 8, subject="pm.words.*")  # which is counted last
    assert seen.value("natsync_streams_total", subject="pm.words.now", outcome="ok") == 1
    for side, subject in (("stream", "pm.words.now"), ("response", "pm.words.*")):
        assert seen.value(f"natsync_{side}_chunks_total", subject=subject) == 2
        assert seen.value(f"natsync_{side}_bytes_total", subject=subject) == 8
        assert seen.value(f"natsync_{side}_seconds_count", subject=subject) == 1
        assert seen.value(f"natsync_{side}_first_chunk_seconds_count", subject=subject) == 1
        first, whole = (
            seen.value(f"natsync_{side}{what}_seconds_sum", subject=subject) for what in ("_first_chunk", "")
        )
        assert 0 < first <= whole < PATIENCE
        assert seen.value(f"natsync_{side}s_active", subject=subject) == 0
    assert seen.value("natsync_handler_calls_total", subject="pm.words.*", kind="stream", outcome="ok") == 1
    assert seen.value("natsync_handler_seconds_count", subject="pm.words.*", kind="stream") == 1
    assert seen.value("natsync_handlers_active", subject="pm.words.*", kind="stream") == 0


def test_active_streams_are_seen_while_they_last_and_a_cancel_is_no_error(
    registry: CollectorRegistry, client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    with client.stream("pm.endless", timeout=PATIENCE) as stream:
        assert next(stream) == b"one"
        seen = settled(registry, "natsync_responses_active", 1, subject="pm.endless")
        assert seen.value("natsync_streams_active", subject="pm.endless") == 1
        assert seen.value("natsync_handlers_active", subject="pm.endless", kind="stream") == 1
    seen = settled(registry, "natsync_responses_total", 1, subject="pm.endless", outcome="cancelled")
    assert seen.value("natsync_streams_total", subject="pm.endless", outcome="cancelled") == 1
    assert seen.value("natsync_streams_active", subject="pm.endless") == 0
    assert seen.value("natsync_responses_active", subject="pm.endless") == 0


def test_errors_are_counted_by_their_type(
    registry: CollectorRegistry, client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    with pytest.raises(natsync.HandlerError):
        list(client.stream("pm.fails", timeout=PATIENCE))
    with pytest.raises(natsync.HandlerError):
        client.request("pm.echo", timeout=PATIENCE)
    with pytest.raises(natsync.NoRespondersError):
        client.request("pm.nobody", timeout=PATIENCE)
    seen = settled(registry, "natsync_handler_calls_total", 1, subject="pm.fails", kind="stream", outcome="ValueError")
    assert seen.value("natsync_streams_total", subject="pm.fails", outcome="HandlerError") == 1
    seen = settled(registry, "natsync_handler_calls_total", 1, subject="pm.echo", kind="request", outcome="KeyError")
    assert seen.value("natsync_requests_total", subject="pm.echo", outcome="HandlerError") == 1
    assert seen.value("natsync_requests_total", subject="pm.nobody", outcome="NoRespondersError") == 1


def test_requests_and_messages_are_counted(
    registry: CollectorRegistry, client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    got = threading.Event()
    subscriber.subscribe("pm.news", lambda message: got.set())
    client.publish("pm.news", b"12345")
    assert client.request("pm.echo", b"x", timeout=PATIENCE).data == b"x"
    assert got.wait(PATIENCE)
    seen = settled(registry, "natsync_handler_calls_total", 1, subject="pm.news", kind="message", outcome="ok")
    assert seen.value("natsync_published_messages_total", subject="pm.news") == 1
    assert seen.value("natsync_published_bytes_total", subject="pm.news") == 5
    assert seen.value("natsync_requests_total", subject="pm.echo", outcome="ok") == 1
    assert seen.value("natsync_request_seconds_count", subject="pm.echo") == 1
    assert seen.value("natsync_request_seconds_bucket", subject="pm.echo", le="+Inf") == 1


def test_refusals_and_connection_events_are_counted(
    registry: CollectorRegistry, metrics: prometheus.Metrics, nats_server: NatsServer
) -> None:
    with (
        natsync.Subscriber(nats_server.url, hooks=metrics, max_streams=1) as subscriber,
        natsync.Client(nats_server.url, hooks=metrics) as client,
    ):

        @subscriber.stream("pm.one")
        def one(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
            yield b"here"
            ctx.wait(PATIENCE)

        with client.stream("pm.one", timeout=PATIENCE) as stream:
            assert next(stream) == b"here"
            with pytest.raises(natsync.StreamRefused):
                next(client.stream("pm.one", timeout=PATIENCE))
            settled(registry, "natsync_refused_total", 1, subject="pm.one", kind="stream")
        settled(registry, "natsync_connection_events_total", 2, event="connected")
        client.force_reconnect()
        settled(registry, "natsync_connection_events_total", 1, event="reconnected")
        settled(registry, "natsync_connection_events_total", 1, event="disconnected")
    settled(registry, "natsync_connection_events_total", 2, event="closed")


# -- labels --------------------------------------------------------------------------------------------------------


def test_no_label_is_an_inbox(
    registry: CollectorRegistry, client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    got: list[natsync.Message] = []
    client.subscribe("_INBOX.my.own", got.append)
    client.subscribe("pm.reply", lambda message: client.publish(message.reply or "", b"by hand"))
    client.flush()
    client.publish("_INBOX.my.own", b"1")
    client.request("pm.reply", timeout=PATIENCE)
    list(client.stream("pm.words.x", b"a", timeout=PATIENCE))
    seen = settled(registry, "natsync_handler_calls_total", 1, subject="_INBOX", kind="message", outcome="ok")
    assert seen.value("natsync_published_messages_total", subject="_INBOX") == 2
    assert not [label for label in seen.labels() if label.startswith("_INBOX.")]


def test_at_most_so_many_subjects_become_labels(registry: CollectorRegistry, nats_server: NatsServer) -> None:
    metrics = prometheus.Metrics(registry, max_subjects=3)
    with natsync.Client(nats_server.url, hooks=metrics) as client:
        for number in range(10):
            client.publish(f"pm.orders.{number}")
    seen = scrape(registry)
    assert {one for one in seen.labels() if one.startswith("pm.")} == {f"pm.orders.{number}" for number in range(3)}
    assert seen.value("natsync_published_messages_total", subject="other") == 7


def test_the_subjects_of_requesters_leave_room_for_those_of_handlers(
    registry: CollectorRegistry, nats_server: NatsServer
) -> None:
    metrics = prometheus.Metrics(registry, max_subjects=3)
    with (
        natsync.Client(nats_server.url, hooks=metrics) as client,
        natsync.Subscriber(nats_server.url, hooks=metrics, max_streams=1) as subscriber,
    ):

        @subscriber.stream("pm.late", max_streams=1)
        def late(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
            yield b"one"
            ctx.wait(PATIENCE)

        for number in range(10):
            client.publish(f"pm.room.{number}")
        with client.stream("pm.late", timeout=PATIENCE) as stream:
            next(stream)
            with pytest.raises(natsync.StreamError):
                next(client.stream("pm.late", timeout=PATIENCE))
        settled(registry, "natsync_handler_calls_total", 1, subject="pm.late", kind="stream", outcome="ok")
        settled(registry, "natsync_responses_total", 1, subject="pm.late", outcome="cancelled")
        seen = settled(registry, "natsync_refused_total", 1, subject="pm.late", kind="stream")
        assert seen.value("natsync_response_first_chunk_seconds_count", subject="pm.late") == 1
        assert seen.value("natsync_streams_total", subject="other", outcome="cancelled") == 1

        for number in range(10):  # and those of handlers are bounded, too
            metrics.handler_started(natsync.Exchange("message", f"pm.many.{number}", {}))
        metrics.slow_consumer("pm.late", 1)
    seen = scrape(registry)
    assert len([one for one in seen.labels() if one.startswith("pm.many.")]) == 2
    assert seen.value("natsync_slow_consumers_total", subject="pm.late") == 1


def test_a_subject_can_be_given_a_label(registry: CollectorRegistry, nats_server: NatsServer) -> None:
    metrics = prometheus.Metrics(registry, subject_label=lambda subject: re.sub(r"\.\d+", ".*", subject))
    with natsync.Client(nats_server.url, hooks=metrics) as client:
        client.publish("pm.orders.1")
        client.publish("pm.orders.2")
    assert scrape(registry).value("natsync_published_messages_total", subject="pm.orders.*") == 2


def test_a_stream_that_was_labelled_stays_so_when_the_labels_run_out(
    registry: CollectorRegistry, nats_server: NatsServer
) -> None:
    """Otherwise a gauge would be taken down under another label than it was put up."""
    calls: list[str] = []

    def label(subject: str) -> str:
        calls.append(subject)
        return str(len(calls))

    metrics = prometheus.Metrics(registry, subject_label=label)
    exchange = natsync.Exchange("stream", "pm.x", {})
    metrics.stream_opened(exchange)
    metrics.stream_done(exchange, 1.0, 0, 0, None)
    assert scrape(registry).value("natsync_streams_active", subject="1") == 0
    assert scrape(registry).value("natsync_streams_total", subject="1", outcome="ok") == 1


def test_subjects_with_odd_bytes_do_not_break_a_scrape(
    registry: CollectorRegistry, metrics: prometheus.Metrics
) -> None:
    metrics.slow_consumer(b"odd.\xff".decode("utf-8", "surrogateescape"), 5)
    assert scrape(registry).value("natsync_slow_consumers_total", subject=r"odd.\udcff") == 1


# -- pools ---------------------------------------------------------------------------------------------------------


def test_a_pools_numbers_are_read_at_each_scrape(registry: CollectorRegistry, nats_server: NatsServer) -> None:
    with natsync.ConnectionPool(nats_server.url, min_size=2, max_size=2) as pool:
        pool.wait(PATIENCE)
        prometheus.watch_pool(pool, "web", registry)
        with pool.connection():
            seen = scrape(registry)
            numbers = pool.stats()
            del numbers["servers"]  # not a number
            for key, value in numbers.items():
                name = f"natsync_pool_{key}"
                shown = seen.value(name + "_total", pool="web") + seen.value(name, pool="web")
                assert shown <= value if key == "oldest_lease_seconds" else shown == value, key
            assert len([name for name in seen.names() if name.startswith("natsync_pool_")]) == len(numbers)
            assert seen.value("natsync_pool_dials_total", pool="web") == 2
            assert seen.value("natsync_pool_leased", pool="web") == 1
        assert scrape(registry).value("natsync_pool_leased", pool="web") == 0
        with natsync.ConnectionPool(nats_server.url) as other:
            prometheus.watch_pool(other, "jobs", registry)
            seen = scrape(registry)
            assert {one.labels["pool"] for one in seen.samples} == {"jobs", "web"}
            assert seen.text.count("# TYPE natsync_pool_size gauge") == 1


def test_numbers_that_a_pool_may_have_one_day_are_shown_too(registry: CollectorRegistry) -> None:
    class Pool:
        def stats(self) -> dict[str, Any]:
            return {"waited-seconds": 1.5, "state": "open", "closed": True, "lost_total": 3}

    collector = prometheus.PoolCollector()
    collector.watch(Pool(), "a")
    collector.watch(Pool(), "b")
    registry.register(collector)
    seen = scrape(registry)
    assert seen.value("natsync_pool_waited_seconds", pool="a") == 1.5
    assert seen.value("natsync_pool_lost_total", pool="b") == 3
    assert seen.names() == {"natsync_pool_waited_seconds", "natsync_pool_lost_total"}
    collector.forget("a")
    assert {sample.labels["pool"] for sample in scrape(registry).samples} == {"b"}


def test_two_pools_cannot_have_one_name() -> None:
    collector = prometheus.PoolCollector()
    first = natsync.ConnectionPool("nats://127.0.0.1:1")
    collector.watch(first, "web")
    collector.watch(first, "web")
    with pytest.raises(ValueError, match="'web'"):
        collector.watch(natsync.ConnectionPool("nats://127.0.0.1:1"), "web")


def test_pools_are_shown_by_the_usual_registry(nats_server: NatsServer) -> None:
    code = """
import sys, natsync
from natsync.contrib import prometheus
from prometheus_client import REGISTRY, generate_latest
metrics = prometheus.Metrics()
with natsync.ConnectionPool(sys.argv[1], min_size=0) as a, natsync.ConnectionPool(sys.argv[1], max_size=1) as b:
    prometheus.watch_pool(a, "a")
    prometheus.watch_pool(b, "b")
    b.wait()
    text = generate_latest(REGISTRY).decode()
print('natsync_pool_size{pool="a"} 0.0' in text, 'natsync_pool_size{pool="b"} 1.0' in text)
"""
    done = run_python(code, nats_server.url)
    assert done.stdout.strip() == "True True", done.stderr


# -- several processes ---------------------------------------------------------------------------------------------

GUNICORN_APP = """
import os
import natsync
from natsync.contrib import prometheus
from prometheus_client import CollectorRegistry, generate_latest, multiprocess

client = natsync.Client(hooks=prometheus.Metrics())

def app(environ, start_response):
    if environ["PATH_INFO"] == "/metrics":
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        body = generate_latest(registry)
    else:
        client.request("pm.work", timeout=10)
        body = str(os.getpid()).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""

GUNICORN_CONFIG = """
from prometheus_client import multiprocess

def child_exit(server, worker):
    multiprocess.mark_process_dead(worker.pid)
"""


def test_gunicorns_workers_are_counted_together(nats_server: NatsServer, tmp_path: Any) -> None:
    (tmp_path / "app.py").write_text(GUNICORN_APP)
    (tmp_path / "gunicorn.conf.py").write_text(GUNICORN_CONFIG)
    counted = tmp_path / "metrics"
    counted.mkdir()
    with natsync.Subscriber(nats_server.url) as subscriber:

        @subscriber.handler("pm.work")
        def work(ctx: natsync.Context, request: natsync.Message) -> None:
            pass

        command = (sys.executable, "-m", "gunicorn", "--workers", "2", "--bind", "127.0.0.1:0", "app:app")
        env = {"PROMETHEUS_MULTIPROC_DIR": str(counted)}
        with child(*command, url=nats_server.url, cwd=tmp_path, env=env) as server:
            server.wait_for_err("Listening at")
            found = re.search(r"http://127\.0\.0\.1:\d+", "\n".join(server.err))
            assert found is not None
            base = found[0]

            def get(path: str) -> str:
                with urllib.request.urlopen(base + path, timeout=PATIENCE) as page:
                    return str(page.read().decode())

            asked = 0
            workers: set[str] = set()
            until = time.monotonic() + 2 * PATIENCE  # one of them may be long in starting
            while len(workers) < 2 and time.monotonic() < until:
                workers.add(get("/"))
                asked += 1
            assert len(workers) == 2
            seen = Scrape(get("/metrics"))
            assert seen.value("natsync_requests_total", subject="pm.work", outcome="ok") == asked
            assert seen.value("natsync_request_seconds_count", subject="pm.work") == asked
            server.process.terminate()  # the arbiter ends its workers
            server.wait()


# -- the dashboard and the docs ------------------------------------------------------------------------------------


def exposed(registry: CollectorRegistry, nats_server: NatsServer) -> tuple[set[str], set[str]]:
    """Names of all samples that there can be, and of their labels."""
    metrics = prometheus.Metrics(registry)
    exchange = natsync.Exchange("stream", "pm.x", {})
    for event in (
        lambda: metrics.publishing(exchange, 1),
        lambda: metrics.request_done(exchange, 1.0, None),
        lambda: metrics.stream_opened(exchange),
        lambda: metrics.stream_first_chunk(exchange, 1.0),
        lambda: metrics.stream_done(exchange, 1.0, 1, 1, None),
        lambda: metrics.handler_started(exchange),
        lambda: metrics.handler_done(exchange, 1.0, None),
        lambda: metrics.response_first_chunk(exchange, 1.0),
        lambda: metrics.response_done(exchange, 1.0, 1, 1, None),
        lambda: metrics.refused(exchange, ""),
        lambda: metrics.connected(""),
        lambda: metrics.slow_consumer("pm.x", 1),
    ):
        event()
    pool = natsync.ConnectionPool(nats_server.url)
    prometheus.watch_pool(pool, "web", registry)
    seen = scrape(registry)
    return seen.names(), {label for sample in seen.samples for label in sample.labels}


def expressions(dashboard: dict[str, Any]) -> list[str]:
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return found + [one["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]


def test_the_dashboard_uses_only_metrics_and_labels_that_exist(
    registry: CollectorRegistry, nats_server: NatsServer
) -> None:
    names, labels = exposed(registry, nats_server)
    queries = expressions(json.loads(DASHBOARD.read_text("utf-8")))
    used = {name for query in queries for name in re.findall(r"\bnatsync_\w+", query)}
    assert used <= names
    assert len(used) > 15
    by = {word for query in queries for words in re.findall(r"\bby \(([^)]*)\)", query) for word in words.split(", ")}
    matched = {word for query in queries for word in re.findall(r"[{,]\s*(\w+)\s*[=!]", query)}
    assert by | matched <= labels | {"job", "instance", "__name__"}
    patterns = [found for query in queries for found in re.findall(r'__name__=~"natsync_\((.*?)\)_total"', query)]
    assert len(patterns) == 1
    assert {f"natsync_{one}_total" for one in patterns[0].split("|")} <= names


def test_the_dashboard_has_the_form_that_grafana_loads() -> None:
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    assert dashboard["uid"] == "natsync"
    assert dashboard["schemaVersion"] >= 36
    panels = dashboard["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids) > 10
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0
    for query in expressions(dashboard):
        for left, right in ("()", "{}", "[]"):
            assert query.count(left) == query.count(right), query
    assert {one["name"] for one in dashboard["templating"]["list"]} == {"datasource", "job", "subject"}


def test_every_metric_is_in_the_docs(registry: CollectorRegistry) -> None:
    page = (ROOT / "docs" / "observability.md").read_text("utf-8")
    prometheus.Metrics(registry)
    families = {family.name for family in text_string_to_metric_families(generate_latest(registry).decode())}
    told = set(re.findall(r"natsync_\w+", page))
    missing = {name for name in families if not {name, f"{name}_total"} & told}
    assert missing == set()
