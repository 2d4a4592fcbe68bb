"""Plain mode at the requester: every message is a chunk, until one has a sentinel for its payload.

The responder cannot be slowed down, so what waits is bounded, and too much of it fails the stream.
"""

from __future__ import annotations

from natsync.errors import HandlerError, NoRespondersError, ServerLost, SlowConsumerError
from natsync.headers import Headers
from natsync.message import Item
from natsync.mux import LinkLoss
from natsync.reply import ERROR_HEADER, service_code
from natsync.streaming import frames, terms
from natsync.streaming.calls import Calls
from natsync.streaming.inlet import Inlet, reported

#: Chunks that may wait for the consumer. A plain responder cannot be slowed down; a Go one runs 5,000–22,000 ahead.
PENDING_CHUNKS = 65_536
#: Bytes that may wait for the consumer.
PENDING_BYTES = 64 << 20


class PlainReceiver:
    """What takes the messages of a plain stream, on the reader's thread."""

    mode = "plain"
    gaps = resent = resumes = 0

    def __init__(self, inlet: Inlet, calls: Calls) -> None:
        self.control: bytes | None = None  # where the responder, being natsync, hears of a cancel
        self._inlet = inlet
        self._calls = calls
        self._sentinels = calls.connection.options.sentinels
        self._special = self._sentinels.common_start
        self._begun = False

    def deliver(self, items: list[Item]) -> None:
        newest = items[-1][0]
        if newest is not None:
            if frames.PLAIN_MARK in newest:
                self.control = newest
            items = [item for item in items if not self._is_others(item)]
        special = self._special
        for index, item in enumerate(items):
            if (item[1] is not None or item[2].startswith(special)) and self._ends(item):
                self._pass_on(items[:index])
                self._end(item)
                return
        self._pass_on(items)

    def _is_others(self, item: Item) -> bool:
        """Whether it is a frame, so of another responder: that one is told that it came too late."""
        reply, block, _ = item
        if reply is None or (frames.FRAMED_MARK not in reply and block is None):
            return False
        if frames.decode_address(reply, block) is None:
            return False
        self._calls.turn_away(self._inlet.inbox, reply)
        return True

    def _pass_on(self, items: list[Item]) -> None:
        if not items:
            return
        if not self._begun:
            self._begun = True
            self._inlet.begun(terms.decode_headers(items[0][1]))
        chunks, size = self._inlet.arrived_items(items)
        if chunks > PENDING_CHUNKS or size > PENDING_BYTES:
            self._inlet.fail(
                SlowConsumerError(
                    f"stream {self._inlet.subject!r}: {chunks} chunks ({size} bytes) wait for the consumer; a plain "
                    f"responder cannot be slowed down (limits {PENDING_CHUNKS} and {PENDING_BYTES} bytes)"
                )
            )

    def _ends(self, item: Item) -> bool:
        """Whether it is not a chunk."""
        _, block, payload = item
        if self._sentinels.forges(payload):
            return True
        if block is None:
            return False
        return frames.is_unheard(item) or ERROR_HEADER in terms.decode_headers(block)

    def _end(self, item: Item) -> None:
        _, block, payload = item
        if frames.is_unheard(item):
            gone = self._begun or self.control is not None
            self._inlet.finished(
                ServerLost("the responder is gone") if gone else NoRespondersError(self._inlet.subject)
            )
            return
        headers = terms.decode_headers(block)
        text = headers.get(ERROR_HEADER)
        prefix = self._sentinels.error_prefix
        if payload.startswith(prefix):
            error: Exception | None = reported(payload[len(prefix) :].decode("utf-8", "replace"), headers)
        elif text is not None:  # what a request/reply handler answers when it fails
            error = HandlerError(text, code=service_code(headers))
        else:
            error = None
        self._inlet.finished(error, item=item, trailers=headers if error is None else Headers())

    def consumed(self, chunks: int, size: int) -> None:
        """There is no credit to be given."""

    def link_lost(self, loss: LinkLoss) -> None:
        reason = f"the link broke in mid-stream, chunks may be missing: {loss.reason}"
        self._inlet.fail(ServerLost(reason), tell=False)

    def link_made(self) -> None:
        """A plain stream has not outlasted its link."""
