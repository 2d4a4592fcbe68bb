"""Plain mode at the responder: bare chunks, and a sentinel behind them.

Nothing slows the requester's side down, and nothing is kept: what a lost link took with it is gone, so a stream some
of whose messages may have been lost ends with an error rather than with a gap.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from natsync.backlog import destination
from natsync.concurrency import Deadline, Happening
from natsync.connection import Connection
from natsync.context import Context
from natsync.errors import (
    ClientLost,
    Code,
    InvalidArgument,
    MaxPayloadExceeded,
    NatsError,
    StreamClosed,
)
from natsync.headers import Headers
from natsync.message import Item
from natsync.mux import LinkLoss, Mux
from natsync.protocol import FORMATTED_BYTES, MAX_MESSAGE_BYTES, encode_pub
from natsync.streaming import frames, terms
from natsync.streaming.frames import Op
from natsync.streaming.sender import Ending, SenderCore, fitting_error

log = logging.getLogger("natsync.streaming")

#: Bytes of chunks that send_many() queues as one piece, so that they leave in one write.
GROUP_BYTES = 64 << 10


class PlainSender(SenderCore):
    """A response in plain mode."""

    mode = "plain"

    def __init__(
        self, connection: Connection, control: Mux, reply: bytes, ctx: Context, subject: str, *, natsync_peer: bool
    ) -> None:
        super().__init__(connection, control, reply, ctx, subject)
        self._natsync_peer = natsync_peer  # it reads headers on the message that ends the stream
        sentinels = connection.options.sentinels
        self._sentinels = sentinels
        self._special = sentinels.common_start
        self._broken: StreamClosed | None = None
        self._count = self._bytes = 0
        self._first_mark = 0  # positions in the outbox: of the first message,
        self._last_mark = 0  # of the last chunk,
        self._end_mark = 0  # and of the end
        self._settled = Happening()  # it is known whether the END has arrived
        self._arrived = False  # it has
        self._prefix = b"PUB %b %b " % (reply, self._inbox)
        self._line = (-1, b"")  # the control line of the last size, for many chunks have the same
        self.open()

    @property
    def count(self) -> int:
        return self._count

    @property
    def queued_bytes(self) -> int:
        return self._bytes

    @property
    def ends_empty(self) -> bool:
        return not self._sentinels.end

    # -- sending -----------------------------------------------------------------------------------------------

    def send(self, data: bytes, deadline: Deadline) -> int:
        return self._try_bare(data) or self._send_any(data, deadline)

    def _try_bare(self, data: bytes) -> int:
        """send() for nearly every chunk, in as few calls as can be; 0 if this is one of another kind, or must wait."""
        size = len(data)
        if not self._count or size > self._connection.bare_bytes or data.startswith(self._special):
            return 0
        line = self._line
        if size != line[0]:
            self._line = line = size, b"%b%d\r\n" % (self._prefix, size)
        with self.lock:
            if self._error is not None:
                return 0
            mark = self._connection.put_bare(line[1], data)
            if mark:
                self._count = number = self._count + 1
                self._bytes += size
                self._last_mark = mark
                return number
        return 0

    def _send_any(self, data: bytes, deadline: Deadline) -> int:
        frame = self._frame(data, first=not self.count)
        while not (number := self._try(frame, len(data))):
            self._connection.wait_room(deadline, lambda: self.over.happened)
        return number

    def try_send(self, data: bytes) -> bool:
        return self._try(self._frame(data, first=not self.count), len(data)) > 0

    def send_many(self, chunks: list[bytes], deadline: Deadline) -> int:
        number = self.count
        group: list[bytes] = []
        size = payload = 0
        first = not self.count
        # All are checked before the first is queued.
        encoded = [self._frame(chunk, first=first and not index) for index, chunk in enumerate(chunks)]
        for frame, chunk in zip(encoded, chunks, strict=True):
            group.append(frame)
            size += len(frame)
            payload += len(chunk)
            if size >= GROUP_BYTES:
                number = self._send_group(group, payload, deadline)
                group, size, payload = [], 0, 0
        return self._send_group(group, payload, deadline) if group else number

    def _send_group(self, group: list[bytes], payload: int, deadline: Deadline) -> int:
        joined = b"".join(group)
        while not (number := self._try(joined, payload, len(group))):
            self._connection.wait_room(deadline, lambda: self.over.happened)
        return number

    def _frame(self, data: bytes, *, first: bool) -> bytes:
        if data.startswith(self._special) and self._sentinels.forges(data):
            raise InvalidArgument(
                f"the chunk {data[:40]!r} is what ends a plain stream, so the requester would take it for the end; "
                f"change the payload, or the sentinels on both sides"
            )
        limit = self._connection.info.get("max_payload")
        if limit is not None and len(data) > limit:
            raise MaxPayloadExceeded(len(data), limit)
        headers = self._headers
        if headers is not None and first:
            return self._connection.encode(self._reply, self._inbox, headers.encode(), data)
        if len(data) > FORMATTED_BYTES:
            return encode_pub(self._reply, self._inbox, None, data)
        return b"%b%d\r\n%b\r\n" % (self._prefix, len(data), data)

    def _try(self, frame: bytes, size: int, chunks: int = 1) -> int:
        with self.lock:
            if self._error is not None:
                raise self._closed_error()
            mark = self._connection.try_put(frame, messages=chunks)
            if not mark:
                return 0
            first = not self.count
            self._count += chunks
            self._bytes += size
            self._last_mark = mark
            self._first_mark = self._first_mark or mark
            number = self.count
        if first:
            self._begun()
        return number

    def _wake_senders(self) -> None:
        self._connection.wake_publishers()

    def settle(self, deadline: Deadline) -> bool:
        return self._settled.event.wait(deadline.remaining()) and self._arrived

    # -- ending ------------------------------------------------------------------------------------------------

    def end(self, trailers: Headers | None = None) -> bool:
        if trailers and self._natsync_peer:  # nobody else is sent them, so they may have any size
            size = len(trailers.encode()) + len(self._sentinels.end)
            limit = self._connection.info.get("max_payload", MAX_MESSAGE_BYTES)
            if size > limit:
                raise MaxPayloadExceeded(size, limit)
        return super().end(trailers)

    def _put_end(self, ending: Ending) -> None:
        """Queue the end; a link that is lost before the server has it must not leave the requester waiting."""
        frame = encode_pub(self._reply, self._inbox, *self._end_parts(ending))
        try:
            with self.lock:  # so that breaks() sees the end either not sent or with its mark
                if self._broken is not None or ending is not self._ending:
                    return  # repair() is about to send another one
                mark = self._end_mark = self._end_mark or self._connection.try_put(frame, force=True)
        except NatsError as error:  # closed: there is nobody to tell any more
            log.debug("the end of a stream on %r was not sent: %s", self.subject, error)
            self._forget()
            return
        self._connection.when_confirmed(mark, lambda: self._confirmed(mark))

    def _end_parts(self, ending: Ending) -> tuple[bytes | None, bytes]:
        """Headers and payload of the end; of an error, what does not fit into max_payload is left out."""
        if ending.op == Op.END:
            return ending.trailers.encode() if ending.trailers and self._natsync_peer else None, self._sentinels.end
        payload = self._sentinels.error_prefix + ending.text.encode("utf-8", "replace")
        limit = self._connection.info.get("max_payload", MAX_MESSAGE_BYTES)
        if not self._natsync_peer:
            return None, payload[:limit]
        status = replace(ending.status, reason=terms.REFUSED) if ending.op == Op.REFUSED else ending.status
        return fitting_error(status, ending.text, payload, limit)

    def _confirmed(self, mark: int) -> None:
        """The server has everything up to this position."""
        with self.lock:
            if mark != self._end_mark:
                return
            if not self._settled.happened:  # else the server has refused it, or has confirmed it before
                self._arrived = self._ended
        self._forget()

    def _forget(self) -> None:
        super()._forget()
        self._settled.set()

    # -- the reader, the supervisor ------------------------------------------------------------------------------

    def deliver(self, items: list[Item]) -> None:
        """A message to the control subject: nobody listens (503), or the requester cancels."""
        for item in items:
            if frames.is_unheard(item):
                self._close(ClientLost("the requester is gone: nobody listens to its inbox any more"), None)
                return
            cancelled = self._cancelled_by(item[2]) if item[0] == self._reply else None
            if cancelled is not None:
                self._close(cancelled, None)
                return

    def breaks(self, loss: LinkLoss) -> bytes | None:
        """Whether messages of this stream may have been lost with the link: then nothing more of it may be sent.

        Returns the reply subject, whose waiting messages are to be taken back.
        """
        with self.lock:
            # What is in the new outbox already, behind the gap, is taken back: chunks, and an end too.
            chunks_lost = 0 < self._first_mark <= loss.taken and loss.confirmed < self._last_mark
            if not chunks_lost and not loss.confirmed < self._end_mark <= loss.taken:
                return None
            return self._break_locked(f"the responder's link broke in mid-stream, chunks may be missing: {loss.reason}")

    def frames_dropped(self, dropped: list[bytes]) -> bytes | None:
        if not any(destination(frame) == self._reply for frame in dropped):
            return None
        with self.lock:
            return self._break_locked("a chunk was dropped: the responder's next server takes none as large as that")

    def _break_locked(self, text: str) -> bytes:
        """Chunks are missing: nothing behind them may be sent. Requires _lock."""
        self._broken = StreamClosed(text, code=Code.UNAVAILABLE)
        self._end_mark = 0
        if self._error is None or self._ended:
            self._ended, self._error = False, self._broken
        return self._reply

    def link_lost(self, loss: LinkLoss) -> None:
        self.repair()

    def repair(self) -> None:
        """A stream with a gap must not seem complete, and one whose end was lost must not seem endless."""
        with self.lock:
            broken, self._broken = self._broken, None
            if broken is None:
                return
            ending = self._ending = Ending(Op.ERROR, broken.message, self._lost())
            self._due = True
        self._settled.set()
        if self._error is broken:
            self._finishing.run(self._finish)
        self._put_end(ending)  # unless that did: who ended the stream before may have finished, or be at it
