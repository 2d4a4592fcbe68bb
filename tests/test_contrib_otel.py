"""OpenTelemetry spans, as the SDK's in-memory exporter gets them."""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import natsync
from natsync.contrib import otel
from natsync.testing import NatsServer, eventually
from processes import child
from rawclient import PATIENCE


class Spans:
    """What was exported, and a Tracing that exports to it."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = otel.Tracing(self.provider)

    def finished(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.finished() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        """The only span of this name; waits for it."""
        eventually(lambda: self.named(name), PATIENCE, f"no span {name!r}: {[span.name for span in self.finished()]}")
        (span,) = self.named(name)
        return span


@pytest.fixture
def spans() -> Iterator[Spans]:
    spans = Spans()
    yield spans
    spans.provider.shutdown()


@pytest.fixture
def client(nats_server: NatsServer, spans: Spans, mode: str) -> Iterator[natsync.Client]:
    with natsync.Client(nats_server.url, hooks=spans.tracing, framed=mode == "framed") as client:
        yield client


@pytest.fixture
def subscriber(nats_server: NatsServer, spans: Spans) -> Iterator[natsync.Subscriber]:
    subscriber = natsync.Subscriber(nats_server.url, hooks=spans.tracing)

    @subscriber.stream("ot.words.*")
    def words(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        yield from request.data.split()

    @subscriber.stream("ot.endless")
    def endless(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        while not ctx.wait(0.01):
            yield b"more"

    @subscriber.stream("ot.fails")
    def fails(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        yield b"one"
        raise ValueError("broken")

    @subscriber.handler("ot.echo")
    def echo(ctx: natsync.Context, request: natsync.Message) -> bytes:
        if not request.data:
            raise KeyError("nothing")
        return request.data

    yield subscriber.open()
    subscriber.close(timeout=2)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def events(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    assert span.context is not None
    assert parent.context is not None
    return (
        span.parent is not None
        and span.parent.span_id == parent.context.span_id
        and span.context.trace_id == parent.context.trace_id
    )


def test_a_stream_is_one_span_on_each_side_with_its_events(
    client: natsync.Client, subscriber: natsync.Subscriber, spans: Spans
) -> None:
    assert list(client.stream("ot.words.now", b"one two", timeout=PATIENCE)) == [b"one", b"two"]
    asked, served = spans.one("stream ot.words.now"), spans.one("process ot.words.*")
    assert is_child(served, asked)
    assert (asked.kind, served.kind) == (SpanKind.CLIENT, SpanKind.SERVER)
    assert events(asked) == events(served) == ["first chunk", "last chunk"]
    assert asked.status.status_code is served.status.status_code is StatusCode.UNSET
    assert attributes(asked) == {
        "messaging.system": "nats",
        "messaging.operation.name": "stream",
        "messaging.operation.type": "send",
        "messaging.destination.name": "ot.words.now",
        "natsync.kind": "stream",
        "natsync.stream.chunks": 2,
        "natsync.stream.bytes": 6,
    }
    assert attributes(served) == {
        "messaging.system": "nats",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "ot.words.now",
        "messaging.destination.template": "ot.words.*",
        "natsync.kind": "stream",
        "natsync.stream.chunks": 2,
        "natsync.stream.bytes": 6,
    }
    assert asked.start_time <= served.start_time  # type: ignore[operator]


def test_a_cancel_is_an_event_and_no_error(
    client: natsync.Client, subscriber: natsync.Subscriber, spans: Spans
) -> None:
    with client.stream("ot.endless", timeout=PATIENCE) as stream:
        next(stream)
        stream.cancel("seen enough")
    asked, served = spans.one("stream ot.endless"), spans.one("process ot.endless")
    assert events(asked) == events(served) == ["first chunk", "cancelled"]
    assert asked.status.status_code is served.status.status_code is StatusCode.UNSET
    for span in (asked, served):
        told = dict(span.events[-1].attributes or {})
        assert told["error.type"] == "StreamCancelled"
        assert told["natsync.reason"] == "seen enough"
    assert served.end_time is not None


def test_an_error_is_recorded_on_both_sides(
    client: natsync.Client, subscriber: natsync.Subscriber, spans: Spans
) -> None:
    with pytest.raises(natsync.HandlerError):
        list(client.stream("ot.fails", timeout=PATIENCE))
    with pytest.raises(natsync.HandlerError):
        client.request("ot.echo", timeout=PATIENCE)
    asked, served = spans.one("stream ot.fails"), spans.one("process ot.fails")
    assert events(asked) == events(served) == ["first chunk", "exception"]
    assert asked.status.status_code is served.status.status_code is StatusCode.ERROR
    assert (attributes(asked)["error.type"], attributes(served)["error.type"]) == ("HandlerError", "ValueError")
    assert served.status.description == "broken"
    asked, served = spans.one("request ot.echo"), spans.one("process ot.echo")
    assert (attributes(asked)["error.type"], attributes(served)["error.type"]) == ("HandlerError", "KeyError")
    assert is_child(served, asked)


def test_what_a_handler_calls_is_part_of_its_trace(
    client: natsync.Client, subscriber: natsync.Subscriber, spans: Spans
) -> None:
    @subscriber.handler("ot.outer")
    def outer(ctx: natsync.Context, request: natsync.Message) -> bytes:
        with spans.provider.get_tracer("user").start_as_current_span("thinking"):
            return client.request("ot.echo", request.data, timeout=PATIENCE).data

    tracer = spans.provider.get_tracer("user")
    with tracer.start_as_current_span("the user's own"):
        assert client.request("ot.outer", b"x", timeout=PATIENCE).data == b"x"
    chain = [
        spans.one(name)
        for name in (
            "the user's own", "request ot.outer", "process ot.outer", "thinking", "request ot.echo", "process ot.echo",
        )
    ]  # fmt: skip
    assert all(is_child(below, above) for above, below in itertools.pairwise(chain))
    assert trace.get_current_span() is trace.INVALID_SPAN  # nothing stays current here


def test_a_thread_that_has_run_a_handler_has_no_span_left(
    nats_server: NatsServer, client: natsync.Client, spans: Spans
) -> None:
    with natsync.Subscriber(nats_server.url, hooks=spans.tracing, max_workers=1) as subscriber:
        current: list[Any] = []

        @subscriber.handler("ot.first")
        def first(ctx: natsync.Context, request: natsync.Message) -> None:
            current.append((trace.get_current_span().get_span_context().span_id, threading.get_ident()))

        with natsync.Client(nats_server.url) as untraced:  # no header: a trace of its own
            for _ in range(2):
                untraced.request("ot.first", timeout=PATIENCE)
        eventually(lambda: len(spans.named("process ot.first")) == 2, PATIENCE)
    served = spans.named("process ot.first")
    assert [span.parent for span in served] == [None, None]
    assert [span.context.span_id for span in served if span.context] == [span_id for span_id, _ in current]
    assert len({thread for _, thread in current}) == 1


def test_a_published_message_joins_its_handlers_trace(
    client: natsync.Client, subscriber: natsync.Subscriber, spans: Spans
) -> None:
    subscriber.subscribe("ot.news", lambda message: None)
    client.publish("ot.news", b"12345", headers={"Own": "1"})
    sent, taken = spans.one("publish ot.news"), spans.one("process ot.news")
    assert is_child(taken, sent)
    assert (sent.kind, taken.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert attributes(sent)["messaging.message.body.size"] == 5


def test_a_refusal_is_a_failed_span(nats_server: NatsServer, client: natsync.Client, spans: Spans) -> None:
    with natsync.Subscriber(nats_server.url, hooks=spans.tracing, max_streams=1) as subscriber:

        @subscriber.stream("ot.one")
        def one(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
            yield b"here"
            ctx.wait(PATIENCE)

        with client.stream("ot.one", timeout=PATIENCE) as stream:
            next(stream)
            with pytest.raises(natsync.StreamError):
                next(client.stream("ot.one", timeout=PATIENCE))
            refused = spans.one("process ot.one")
            assert refused.status.status_code is StatusCode.ERROR
            assert "too many streams" in str(refused.status.description)
            assert is_child(refused, spans.one("stream ot.one"))


def test_an_inbox_has_no_name(client: natsync.Client, spans: Spans) -> None:
    client.subscribe("_INBOX.mine", lambda message: None)
    client.publish("_INBOX.mine")
    for name in ("publish (temporary)", "process (temporary)"):
        told = attributes(spans.one(name))
        assert told["messaging.destination.name"] == "(temporary)"
        assert told["messaging.destination.temporary"] is True
    assert "_INBOX" not in repr([(span.name, span.attributes) for span in spans.finished()])


def test_a_span_can_be_named_after_a_label(nats_server: NatsServer, spans: Spans) -> None:
    tracing = otel.Tracing(spans.provider, subject_label=lambda subject: re.sub(r"\.\d+", ".*", subject))
    with (
        natsync.Subscriber(nats_server.url, hooks=tracing) as subscriber,
        natsync.Client(nats_server.url, hooks=tracing) as client,
    ):
        subscriber.handler("ot.orders.4711")(lambda ctx, request: b"")
        client.request("ot.orders.4711", timeout=PATIENCE)
        client.publish("_INBOX.mine.4711")
    for name in ("request ot.orders.*", "process ot.orders.*"):
        told = attributes(spans.one(name))
        assert told["messaging.destination.name"] == "ot.orders.4711"
        assert told["messaging.destination.template"] == "ot.orders.*"
    assert "messaging.destination.template" not in attributes(spans.one("publish (temporary)"))


def test_the_headers_of_the_caller_are_left_alone(
    client: natsync.Client, subscriber: natsync.Subscriber, spans: Spans
) -> None:
    given = {"Own": "1"}
    client.request("ot.echo", b"x", headers=given, timeout=PATIENCE)
    assert given == {"Own": "1"}


# -- two processes -------------------------------------------------------------------------------------------------

RESPONDER = """
import json, sys
import natsync
from natsync.contrib import otel
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)  # the global one is what Tracing() takes by itself
subscriber = natsync.Subscriber(hooks=otel.Tracing())

@subscriber.stream("ot.far")
def far(ctx, request):
    yield b"one"
    yield b"two"
    if request.data == b"endless":
        ctx.wait(30)

def up():
    print("up", flush=True)

subscriber.serve_forever(ready=up)
for span in exporter.get_finished_spans():
    print(json.dumps({
        "name": span.name, "trace": span.context.trace_id, "parent": span.parent.span_id,
        "events": [event.name for event in span.events],
    }), flush=True)
"""


def test_the_spans_of_two_processes_are_joined(nats_server: NatsServer, client: natsync.Client, spans: Spans) -> None:
    with child(sys.executable, "-c", RESPONDER, url=nats_server.url) as responder:
        responder.wait_for_out("up")
        with spans.provider.get_tracer("user").start_as_current_span("root"):
            assert list(client.stream("ot.far", timeout=PATIENCE)) == [b"one", b"two"]
            with client.stream("ot.far", b"endless", timeout=PATIENCE) as stream:
                assert [next(stream), next(stream)] == [b"one", b"two"]
        responder.process.terminate()
        assert responder.wait() == 0, responder
        theirs = [json.loads(line) for line in responder.out[1:]]
    eventually(lambda: len(spans.named("stream ot.far")) == 2, PATIENCE)
    ours = {span.context.span_id: span for span in spans.named("stream ot.far") if span.context}
    root = spans.one("root")
    assert all(is_child(span, root) for span in ours.values())
    assert len(theirs) == 2
    assert {one["parent"] for one in theirs} == set(ours)
    assert {one["trace"] for one in theirs} == {root.context.trace_id}  # type: ignore[union-attr]
    assert all(one["name"] == "process ot.far" for one in theirs)
    assert sorted(one["events"][-1] for one in theirs) == ["cancelled", "last chunk"]
    for one in theirs:
        assert events(ours[one["parent"]]) == one["events"]
