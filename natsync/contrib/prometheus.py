"""Prometheus metrics of requests, streams, handlers, connections and pools.

    from natsync.contrib import prometheus

    metrics = prometheus.Metrics()  # one for the process
    client = natsync.Client(hooks=metrics)
    subscriber = natsync.Subscriber(hooks=metrics)
    prometheus.watch_pool(pool, "web")

Needs the extra `prometheus`. Everything is labelled by the subject: for handlers the one that they are registered for,
wildcards included; for requesters the one that they name. Of either at most `max_subjects` different ones. No label is
an inbox.
docs/observability.md lists the metrics.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError:
    raise ImportError('prometheus-client is not installed: pip install "natsync[prometheus]"') from None

from natsync.errors import Cancelled, ClientLost, StreamCancelled
from natsync.hooks import Exchange, Hooks

#: Different subjects that become labels, of requesters and as many of handlers. Each costs some 60 time series.
MAX_SUBJECTS = 100
#: The label of all subjects beyond that.
OTHER = "other"
#: Seconds. From a request in the same room to an answer that takes a language model minutes.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics(Hooks):
    """Hooks that count. One object serves any number of clients, pools and subscribers of a process.

    Args:
        registry: where the metrics are registered; None for prometheus_client's own.
        buckets: upper bounds of the histograms, seconds.
        max_subjects: how many different subjects of requesters become labels, and as many of handlers and
            subscriptions; those that come later are "other".
        subject_label: a function from a subject to its label, for requesters that put numbers into subjects, such as
            orders.4711 -> orders.*; None takes them as they are.
        inbox_prefix: as the option of the same name: what is below it is labelled with the prefix alone.

    Raises:
        ValueError: the registry has such metrics already.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        buckets: tuple[float, ...] = BUCKETS,
        max_subjects: int = MAX_SUBJECTS,
        subject_label: Callable[[str], str] | None = None,
        inbox_prefix: str = "_INBOX",
    ) -> None:
        self._subjects = _Subjects(max_subjects, subject_label, inbox_prefix)
        # As registered: few by nature, and not to be crowded out by what requesters name.
        self._served = _Subjects(max_subjects, subject_label, inbox_prefix)
        to: Any = {"registry": REGISTRY if registry is None else registry}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"natsync_{name}", text, labels, **to)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"natsync_{name}", text, labels, multiprocess_mode="livesum", **to)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"natsync_{name}_seconds", text, labels, buckets=buckets, **to)

        self._published = counter("published_messages", "Messages published by publish().", "subject")
        self._published_bytes = counter("published_bytes", "Bytes of their payloads.", "subject")
        self._requests = counter("requests", "Requests made, by how they ended.", "subject", "outcome")
        self._request_seconds = seconds("request", "From request() to its return.", "subject")
        self._retries = counter("retries", "Attempts that failed and were repeated.", "subject", "kind", "error")
        self._streams = counter("streams", "Streams consumed, by how they ended.", "subject", "outcome")
        self._streams_active = gauge("streams_active", "Streams being consumed now.", "subject")
        self._stream_first = seconds("stream_first_chunk", "From stream() to the first chunk.", "subject")
        self._stream_seconds = seconds("stream", "From stream() to the end.", "subject")
        self._stream_chunks = counter("stream_chunks", "Chunks given to consumers.", "subject")
        self._stream_bytes = counter("stream_bytes", "Bytes of these chunks.", "subject")
        self._handlers = counter("handler_calls", "Calls of handlers, by how they ended.", "subject", "kind", "outcome")
        self._handlers_active = gauge("handlers_active", "Handlers running now.", "subject", "kind")
        self._handler_seconds = seconds("handler", "How long handlers ran.", "subject", "kind")
        self._refused = counter("refused", "Requests turned away unserved.", "subject", "kind")
        self._responses = counter("responses", "Streams sent, by how they ended.", "subject", "outcome")
        self._responses_active = gauge("responses_active", "Streams being sent now.", "subject")
        self._response_first = seconds("response_first_chunk", "From the request to the first chunk.", "subject")
        self._response_seconds = seconds("response", "From the request to the stream's end.", "subject")
        self._response_chunks = counter("response_chunks", "Chunks sent.", "subject")
        self._response_bytes = counter("response_bytes", "Bytes of these chunks.", "subject")
        self._events = counter("connection_events", "What happened to connections.", "event")
        self._slow = counter("slow_consumers", "Episodes of subscriptions over their limits.", "subject")

    # -- the requester ---------------------------------------------------------------------------------------------

    def publishing(self, exchange: Exchange, size_bytes: int) -> None:
        subject = self._subjects.label(exchange)
        self._published.labels(subject).inc()
        self._published_bytes.labels(subject).inc(size_bytes)

    def request_done(self, exchange: Exchange, seconds: float, error: BaseException | None) -> None:
        subject = self._subjects.label(exchange)
        self._requests.labels(subject, outcome(error)).inc()
        self._request_seconds.labels(subject).observe(seconds)

    def retrying(self, exchange: Exchange, attempt: int, wait_seconds: float, error: BaseException) -> None:
        self._retries.labels(self._subjects.label(exchange), exchange.kind, type(error).__name__).inc()

    def stream_opened(self, exchange: Exchange) -> None:
        self._streams_active.labels(self._subjects.label(exchange)).inc()

    def stream_first_chunk(self, exchange: Exchange, seconds: float) -> None:
        self._stream_first.labels(self._subjects.label(exchange)).observe(seconds)

    def stream_done(
        self, exchange: Exchange, seconds: float, chunks: int, size_bytes: int, error: BaseException | None
    ) -> None:
        subject = self._subjects.label(exchange)
        self._streams_active.labels(subject).dec()
        self._streams.labels(subject, outcome(error)).inc()
        self._stream_seconds.labels(subject).observe(seconds)
        self._stream_chunks.labels(subject).inc(chunks)
        self._stream_bytes.labels(subject).inc(size_bytes)

    # -- the responder ---------------------------------------------------------------------------------------------

    def handler_started(self, exchange: Exchange) -> None:
        subject = self._served.label(exchange)
        self._handlers_active.labels(subject, exchange.kind).inc()
        if exchange.kind == "stream":
            self._responses_active.labels(subject).inc()

    def handler_done(self, exchange: Exchange, seconds: float, error: BaseException | None) -> None:
        subject = self._served.label(exchange)
        self._handlers_active.labels(subject, exchange.kind).dec()
        self._handlers.labels(subject, exchange.kind, outcome(error)).inc()
        self._handler_seconds.labels(subject, exchange.kind).observe(seconds)

    def response_first_chunk(self, exchange: Exchange, seconds: float) -> None:
        self._response_first.labels(self._served.label(exchange)).observe(seconds)

    def response_done(
        self, exchange: Exchange, seconds: float, chunks: int, size_bytes: int, error: BaseException | None
    ) -> None:
        subject = self._served.label(exchange)
        self._responses_active.labels(subject).dec()
        self._responses.labels(subject, outcome(error)).inc()
        self._response_seconds.labels(subject).observe(seconds)
        self._response_chunks.labels(subject).inc(chunks)
        self._response_bytes.labels(subject).inc(size_bytes)

    def refused(self, exchange: Exchange, reason: str) -> None:
        self._refused.labels(self._served.label(exchange), exchange.kind).inc()

    # -- the connection --------------------------------------------------------------------------------------------

    def connected(self, server: str) -> None:
        self._events.labels("connected").inc()

    def disconnected(self, reason: str) -> None:
        self._events.labels("disconnected").inc()

    def reconnected(self, server: str) -> None:
        self._events.labels("reconnected").inc()

    def closed(self, reason: str | None) -> None:
        self._events.labels("closed").inc()

    def lame_duck(self, server: str) -> None:
        self._events.labels("lame_duck").inc()

    def error(self, error: str, kind: str | None) -> None:
        self._events.labels("error").inc()

    def slow_consumer(self, subject: str, dropped: int) -> None:
        self._events.labels("slow_consumer").inc()
        self._slow.labels(self._served.of(subject)).inc()


def outcome(error: BaseException | None) -> str:
    """How something ended, as a label: "ok", "cancelled" by the requester, or the name of the error's type."""
    if error is None:
        return "ok"
    return "cancelled" if isinstance(error, StreamCancelled | ClientLost | Cancelled) else type(error).__name__


class _Subjects:
    """Which label a subject has; a bounded number of them."""

    def __init__(self, limit: int, label: Callable[[str], str] | None, inbox_prefix: str) -> None:
        self._limit = limit
        self._label = label
        self._inbox = inbox_prefix
        self._lock = threading.Lock()
        self._known: set[str] = set()

    def label(self, exchange: Exchange) -> str:
        """The exchange's label: the same in every hook that concerns it, which a gauge has to rely on."""
        label = exchange.attributes.get(self)
        if label is None:
            label = exchange.attributes[self] = self.of(exchange.subject)
        return str(label)

    def of(self, subject: str) -> str:
        if subject == self._inbox or subject.startswith(f"{self._inbox}."):
            return self._inbox
        label = subject if self._label is None else self._label(subject)
        label = label.encode("utf-8", "backslashreplace").decode()  # a subject may have come with odd bytes
        if label in self._known:
            return label
        with self._lock:
            if len(self._known) >= self._limit:
                return OTHER
            self._known.add(label)
        return label


# -- pools -------------------------------------------------------------------------------------------------------------


class HasStats(Protocol):
    """A ConnectionPool, or whatever else has such numbers."""

    def stats(self) -> Mapping[str, Any]:
        """Numbers by name."""


#: What a pool counts up, for as long as it lives; all other numbers are those of the moment.
_COUNTED_UP = re.compile(
    r"leases|waits|wait_seconds|timeouts|leaks|dials|dials_failed|dial_seconds|lost|retired|shrunk|.*_total"
)


class PoolCollector(Collector):
    """Reads a pool's stats() whenever the registry is scraped: natsync_pool_<name of the number>{pool="..."}.

    Numbers are taken as they are named, so what a later version adds is there too. Pools are held for as long as they
    are watched. Not in prometheus_client's multiprocess mode, which knows no collectors: there, each process would show
    its own pool.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[str, HasStats] = {}

    def watch(self, pool: HasStats, name: str) -> None:
        """Show the pool under this name.

        Raises:
            ValueError: another one has this name.
        """
        with self._lock:
            if self._pools.get(name, pool) is not pool:
                raise ValueError(f"another pool is shown as {name!r} already")
            self._pools[name] = pool

    def forget(self, name: str) -> None:
        """Show it no longer."""
        with self._lock:
            self._pools.pop(name, None)

    def collect(self) -> Iterator[Metric]:
        """The numbers of all watched pools, read now; the registry calls it for each scrape."""
        with self._lock:
            pools = dict(self._pools)
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for name, pool in sorted(pools.items()):
            for key, value in pool.stats().items():
                if isinstance(value, bool) or not isinstance(value, int | float):
                    continue
                family = families.get(key)
                if family is None:
                    family = families[key] = _family(key)
                family.add_metric([name], value)
        yield from families.values()


def _family(key: str) -> GaugeMetricFamily | CounterMetricFamily:
    clean = re.sub(r"[^a-zA-Z0-9_]", "_", key)
    text = f"{key} of the connection pool's stats()."
    kind = CounterMetricFamily if _COUNTED_UP.fullmatch(key) else GaugeMetricFamily
    return kind(f"natsync_pool_{clean}", text, labels=["pool"])


_collectors: weakref.WeakKeyDictionary[CollectorRegistry, PoolCollector] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def watch_pool(pool: HasStats, name: str, registry: CollectorRegistry | None = None) -> None:
    """Show a pool's numbers, with the label pool=name, at every scrape of the registry; see PoolCollector.

    Raises:
        ValueError: another one has this name.
    """
    to = REGISTRY if registry is None else registry
    with _making:
        collector = _collectors.get(to)
        if collector is None:
            collector = PoolCollector()
            to.register(collector)
            _collectors[to] = collector
    collector.watch(pool, name)
