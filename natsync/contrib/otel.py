"""OpenTelemetry traces: a span for each message published, request and stream, on both sides, joined by traceparent.

    from natsync.contrib import otel

    client = natsync.Client(hooks=otel.Tracing())
    subscriber = natsync.Subscriber(hooks=otel.Tracing())

Needs the extra `otel`: the API; an application brings the SDK and an exporter. Names and attributes follow the semantic
conventions for messaging. What a handler calls is part of its span, since that is current in the handler's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

try:
    from opentelemetry import context as _context
    from opentelemetry import propagate, trace
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider
except ImportError:
    raise ImportError('opentelemetry-api is not installed: pip install "natsync[otel]"') from None

from natsync._version import __version__
from natsync.errors import Cancelled, ClientLost, StreamCancelled
from natsync.hooks import Exchange, Hooks

#: What an inbox is called, whose name says nothing to anybody.
TEMPORARY = "(temporary)"


class Tracing(Hooks):
    """Hooks that trace. One object serves any number of clients and subscribers.

    Spans of a requester are children of the current one, and go along as headers; spans of a responder are children of
    the requester's, found in the headers. A stream's span lasts to its end on either side, with the events "first
    chunk", "last chunk" and "cancelled". Cancelling is no error; what else ends a request or stream early is.

    Args:
        tracer_provider: None for the global one.
        subject_label: a function from a subject to what spans are named after, for requesters that put numbers into
            subjects, such as orders.4711 -> orders.*; None takes them as they are. The attributes have the whole one.
        inbox_prefix: as the option of the same name: what is below it is called "(temporary)".
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        *,
        subject_label: Callable[[str], str] | None = None,
        inbox_prefix: str = "_INBOX",
    ) -> None:
        self._tracer = trace.get_tracer("natsync", __version__, tracer_provider)
        self._subject_label = subject_label
        self._inbox = inbox_prefix

    # -- the requester ---------------------------------------------------------------------------------------------

    def publishing(self, exchange: Exchange, size_bytes: int) -> None:
        span = self._leave(exchange, "publish", SpanKind.PRODUCER)
        span.set_attribute("messaging.message.body.size", size_bytes)
        span.end()

    def request_started(self, exchange: Exchange) -> None:
        exchange.attributes[self] = self._leave(exchange, "request", SpanKind.CLIENT)

    def request_done(self, exchange: Exchange, seconds: float, error: BaseException | None) -> None:
        self._end(exchange.attributes.pop(self), error)

    def stream_opened(self, exchange: Exchange) -> None:
        exchange.attributes[self] = self._leave(exchange, "stream", SpanKind.CLIENT)

    def stream_first_chunk(self, exchange: Exchange, seconds: float) -> None:
        exchange.attributes[self].add_event("first chunk")

    def stream_done(
        self, exchange: Exchange, seconds: float, chunks: int, size_bytes: int, error: BaseException | None
    ) -> None:
        self._end_stream(exchange, chunks, size_bytes, error)

    def _leave(self, exchange: Exchange, operation: str, kind: SpanKind) -> Span:
        """A span for what leaves, which the headers tell of."""
        span = self._tracer.start_span(
            f"{operation} {self._label(exchange.subject)}",
            kind=kind,
            attributes=self._attributes(exchange, operation, "send"),
        )
        propagate.inject(exchange.headers, trace.set_span_in_context(span))
        return span

    # -- the responder ---------------------------------------------------------------------------------------------

    def handler_started(self, exchange: Exchange) -> None:
        span, context = self._come(exchange)
        exchange.attributes[self] = span
        exchange.attributes[self, "token"] = _context.attach(trace.set_span_in_context(span, context))

    def handler_done(self, exchange: Exchange, seconds: float, error: BaseException | None) -> None:
        _context.detach(exchange.attributes.pop((self, "token")))
        if exchange.kind != "stream":
            self._end(exchange.attributes.pop(self), error)
        elif error is not None and not _is_cancel(error):
            exchange.attributes[self, "raised"] = error

    def response_first_chunk(self, exchange: Exchange, seconds: float) -> None:
        exchange.attributes[self].add_event("first chunk")

    def response_done(
        self, exchange: Exchange, seconds: float, chunks: int, size_bytes: int, error: BaseException | None
    ) -> None:
        self._end_stream(exchange, chunks, size_bytes, error)

    def refused(self, exchange: Exchange, reason: str) -> None:
        span, _ = self._come(exchange)
        span.set_attribute("error.type", "refused")
        span.set_status(Status(StatusCode.ERROR, reason))
        span.end()

    def _come(self, exchange: Exchange) -> tuple[Span, _context.Context]:
        """A span for what has come, and the context that the headers tell of."""
        context = propagate.extract(exchange.headers)
        kind = SpanKind.CONSUMER if exchange.kind == "message" else SpanKind.SERVER
        attributes = self._attributes(exchange, "process", "process")
        span = self._tracer.start_span(
            f"process {self._label(exchange.subject)}", context=context, kind=kind, attributes=attributes
        )
        return span, context

    # -- spans -----------------------------------------------------------------------------------------------------

    def _name(self, subject: str) -> str:
        return TEMPORARY if subject.startswith(f"{self._inbox}.") else subject

    def _label(self, subject: str) -> str:
        """What stands in a span's name, of which there should be few."""
        name = self._name(subject)
        return name if name == TEMPORARY or self._subject_label is None else self._subject_label(name)

    def _attributes(self, exchange: Exchange, operation: str, kind: str) -> Mapping[str, Any]:
        name = self._name(exchange.destination)
        attributes: dict[str, Any] = {
            "messaging.system": "nats",
            "messaging.operation.name": operation,
            "messaging.operation.type": kind,
            "messaging.destination.name": name,
            "natsync.kind": exchange.kind,
        }
        if name == TEMPORARY:
            attributes["messaging.destination.temporary"] = True
        template = self._label(exchange.subject)
        if template != name:
            attributes["messaging.destination.template"] = template
        return attributes

    def _end_stream(self, exchange: Exchange, chunks: int, size_bytes: int, error: BaseException | None) -> None:
        span = exchange.attributes.pop(self)
        span.set_attribute("natsync.stream.chunks", chunks)
        span.set_attribute("natsync.stream.bytes", size_bytes)
        if chunks and error is None:
            span.add_event("last chunk", {"natsync.stream.chunks": chunks})
        raised = exchange.attributes.pop((self, "raised"), None)
        if error is not None and raised is not None and not _is_cancel(error):
            error = raised  # which says more than that the stream was ended for it
        self._end(span, error)

    @staticmethod
    def _end(span: Span, error: BaseException | None) -> None:
        if error is not None and _is_cancel(error):
            span.add_event("cancelled", {"natsync.reason": str(error), "error.type": type(error).__name__})
        elif error is not None:
            span.record_exception(error)
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR, str(error)))
        span.end()


def _is_cancel(error: BaseException) -> bool:
    return isinstance(error, StreamCancelled | ClientLost | Cancelled)
