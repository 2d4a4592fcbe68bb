"""The two ends of a framed stream as pure state machines: what is kept until it has arrived, and what is taken.

Outgoing keeps what was sent and may have to be sent again; Incoming puts frames in order and accounts for the credit it
gives. No locks, no I/O, no clock: whoever drives them owns them, but for what one thread gives. What they promise
together, over a link that loses, doubles and reorders: each chunk comes out once, in order.

Frames are numbered from 1. A limit is absolute (the highest seq, the highest offset in application bytes), so that
losing, doubling or reordering what tells it does no harm.
"""

from __future__ import annotations

import enum
import itertools
from threading import get_ident
from typing import NamedTuple

from natsync.errors import MaxPayloadExceeded, ProtocolError
from natsync.streaming import frames
from natsync.streaming.frames import Ack, Op
from natsync.streaming.terms import Offer

#: Chunks in one batch at most: more gain nothing.
BATCH_CHUNKS = 256
#: Bytes in one batch at most.
BATCH_BYTES = 64 << 10
#: Chunks that are taken at once where each has a frame of its own.
ONES = 64
#: The largest chunk that shares a frame: of larger ones the frame's own cost is nothing.
BATCHED_CHUNK_BYTES = 8 << 10
#: The largest chunk that may be given without a lock; of larger ones the lock's cost is nothing.
GIVEN_BYTES = BATCHED_CHUNK_BYTES
#: What a responder keeps unacknowledged for one stream at most, whatever it is offered: chunks, and bytes.
MOST_WINDOW = 65_536
MOST_WINDOW_BYTES = 32 << 20


class Frame(NamedTuple):
    """One frame that is due. seqs: how many it uses up, from `seq` on; block: its headers."""

    op: bytes
    seq: int
    block: bytes | None
    payload: bytes
    seqs: int


class Outgoing:
    """What a responder has been given to send, until the requester has it.

    Giving a chunk is what happens most, and the lock of whoever drives this would be a third of it. So one thread, the
    giver, may append small bare chunks to `given` without that lock, as ResponseSender.send() does. It is the first
    thread that pushes; when another one does, or the stream is over, there is none any more. Everything else is done
    under the lock, and begins by taking in what was given: only there the list gets shorter. A giver that finds
    afterwards that it is none any more asks was_taken(): then its chunk is either among those that were taken in while
    it was, or the only one in the list, where nobody but itself will look for it.

    Where several threads push there is no giver, and send() changes `kept`, `free` and `count` itself, under the lock.

    Attributes:
        kept: what was pushed or taken in, and not acknowledged: of the seqs from acked+1 up.
        free: how many bytes more may be kept.
        allowed: how many frames may be kept when one of several threads pushes by itself; 0 while none may.
        fragment_bytes: the size of the largest chunk that is not split.
        count: chunks pushed or taken in.
        watch_at: the count from which on whoever pushes has to see to their being sent.
        given: bare chunks of up to GIVEN_BYTES on their way from the giver.
        giver: its thread, 0 if there is none.
        number, number_bytes: of the last chunk that was pushed or given; and the bytes up to its end.
        limit, limit_bytes: up to where that may go. Absolute, so that it does no harm if they change meanwhile.
        look_at: the number from which on the giver has to see to their being sent, or is none any more.
        acked: the requester has everything up to this seq.
        sent: up to this seq everything was handed to the link since it last had to be sent again.
        highest: up to this seq everything was handed to some link.
        ended: whether the end was given.
    """

    def __init__(self, offer: Offer, max_payload: int, quota_bytes: int) -> None:
        self._first_window_bytes = min(offer.window_bytes, MOST_WINDOW_BYTES)  # later ones are half of it at least
        self._fit(max_payload)
        self.acked = self.sent = self.highest = 0
        self.ended = self._cleared = False
        self._batches = offer.batches
        self._quota_bytes = quota_bytes
        self._limit, self._limit_bytes = offer.window, offer.window_bytes
        self.kept: list[bytes] = []
        self.count = self.watch_at = 0
        self.given: list[bytes] = []
        self.giver = self.look_at = self.allowed = 0
        self.number = self.number_bytes = self.limit = self.limit_bytes = 0
        self._givers = 0  # threads that have pushed: none, one, or more
        self._direct = False
        self._special: dict[int, tuple[bytes, bytes | None]] = {}  # seq -> (op, headers) of all but bare chunks
        self._sent_offset = 0  # application bytes up to `sent`,
        self._acked_offset = 0  # and up to `acked`
        self._most = 0  # how much may be in the list now
        self._reach = self.free = 0  # the offset up to which may be given out and kept, and what is left until there
        self._reckon()

    def _fit(self, max_payload: int) -> None:
        self.fragment_bytes = max(1, min(max_payload, self._first_window_bytes // 4))
        self._batch_bytes = min(BATCH_BYTES, max_payload)

    def _reckon(self) -> None:
        """How far the credit, one's own window and the quota reach."""
        offset = self.offset
        self._most = min(self._limit, self.acked + MOST_WINDOW) - self.acked
        self._reach = min(self._last_offset, self._acked_offset + self._quota_bytes)
        self.free = self._reach - offset
        self._allot()

    @property
    def last(self) -> int:
        """The highest seq that was given out."""
        return self.acked + len(self.kept)

    @property
    def offset(self) -> int:
        """Application bytes up to there."""
        return self._reach - self.free

    @property
    def kept_bytes(self) -> int:
        """What is kept, in bytes."""
        return self.offset - self._acked_offset

    @property
    def waiting_bytes(self) -> int:
        """Of those, what is still to be sent."""
        return self.offset - self._sent_offset

    @property
    def quota_bytes(self) -> int:
        """What may be kept."""
        return self._quota_bytes

    @quota_bytes.setter
    def quota_bytes(self, quota_bytes: int) -> None:
        self.take_in()
        self._quota_bytes = quota_bytes
        self._reckon()

    @property
    def _last_offset(self) -> int:
        """The offset up to which credit and window reach."""
        return min(self._limit_bytes, self._acked_offset + MOST_WINDOW_BYTES)

    # -- giving without the lock -----------------------------------------------------------------------------------

    def take_in(self) -> None:
        """Keep what was given."""
        if self.given and self.giver:
            self._take_in()

    def _take_in(self) -> None:
        count = len(self.given)
        chunks = self.given[:count]
        size = sum(map(len, chunks))
        del self.given[:count]  # from here on no call, so no interrupt
        self.kept += chunks
        self.free -= size
        self.count += count

    def _allot(self) -> None:
        """How much may be given, or kept by several threads."""
        self.limit = self.allowed = 0
        if self._direct and self.giver and self.fragment_bytes >= GIVEN_BYTES:
            self.limit, self.limit_bytes = self.count + self.room, self._reach
        elif self._direct and self._givers > 1:
            self.allowed = self._most

    def _pushing(self) -> None:
        """This thread pushes: it is the giver if no other one has."""
        me = get_ident()
        if self._givers == 0:
            self._givers, self.giver = 1, me
        elif me != self.giver and self._givers == 1:
            self._givers = 2
            self._no_giver()
        self.take_in()
        self.limit = 0  # until _pushed() is called, should an interrupt keep it from that

    def _pushed(self) -> None:
        self.number, self.number_bytes = self.count, self.offset
        self._allot()

    def _no_giver(self) -> None:
        """From here on nobody gives, but for a chunk at most that is about to be: then its thread notices."""
        self.giver = self.look_at = self.limit = 0
        self._take_in()  # behind that: until then chunks may have come

    def watch(self, count: int) -> None:
        """Whoever gives or pushes the chunk of this number, or a later one, has to see to their being sent."""
        self.watch_at = count
        self.look_at = count if self.giver else 0

    @property
    def has_given(self) -> bool:
        """Whether something is to be taken in; after watch(0), which the giver looks at behind what it gives."""
        return self.giver != 0 and bool(self.given[:1])

    def was_taken(self) -> bool:
        """Whether the chunk that this thread has just given is taken, or will be; else it is not here any more."""
        if self.giver == get_ident():
            return True
        taken = not self.given
        self.given.clear()
        return taken

    # -- giving --------------------------------------------------------------------------------------------------

    def takes(self, size: int) -> bool:
        """Whether a chunk of this size may be pushed: there is room for it, and credit for its first fragment.

        For one there is room if nothing else is kept, whatever the quota: else it could wait for ever.
        """
        self.take_in()
        return (self.kept_bytes + size <= self.quota_bytes or not self.kept_bytes) and self.has_credit(size)

    def has_credit(self, size: int) -> bool:
        """Whether nothing but the quota can keep a chunk of this size waiting."""
        self.take_in()
        first = size if size < self.fragment_bytes else self.fragment_bytes
        return len(self.kept) < self._most and self.offset + first <= self._last_offset

    def allow(self, direct: bool) -> None:
        """Whether chunks may be given: not the first one, nor any once the stream is over."""
        self.take_in()
        self._direct = direct
        if not direct:
            self._no_giver()
        self._reckon()

    def push_some(self, chunks: list[bytes], sizes: list[int]) -> int:
        """Take bare chunks that are no larger than a fragment, as long as there is room and credit; how many."""
        self._pushing()
        count = min(len(chunks), self._most - len(self.kept))
        if count <= 0:
            return 0
        run = sizes if count == len(sizes) else sizes[:count]
        if max(run) > self.fragment_bytes or sum(run) > self.free:
            free, largest = self.free, self.fragment_bytes
            totals = itertools.accumulate(run)
            fits = (size <= largest and total <= free for size, total in zip(run, totals, strict=True))
            count = next(index for index, one in enumerate(fits) if not one)
            run = run[:count]
        given, size = chunks if count == len(chunks) else chunks[:count], sum(run)
        self.kept += given  # from here on no call, as in take_in()
        self.free -= size
        self.count += count
        self._pushed()
        return count

    @property
    def room(self) -> int:
        """How many frames more may be kept."""
        return self._most - len(self.kept)

    def push(self, chunk: bytes, block: bytes | None = None) -> None:
        """Take a chunk, in fragments if it is large; block goes as headers with its first frame.

        Raises:
            MaxPayloadExceeded: the headers alone are larger than a frame.
        """
        self._pushing()
        size = len(chunk)
        if block is not None or size > self.fragment_bytes:
            pieces = self._pieces(chunk, block)
            first, last = self.last + 1, self.last + len(pieces)
            special = {
                seq: (Op.DATA if seq == last else Op.FRAGMENT, block if seq == first else None)
                for seq in range(first, last + 1)
            }
            self.kept += pieces  # from here on no call, as in take_in()
            self._special |= special
        else:
            self.kept += (chunk,)  # no call, as in take_in()
        self.free -= size
        self.count += 1
        self._pushed()

    def _pieces(self, chunk: bytes, block: bytes | None) -> list[bytes]:
        """The chunk in pieces no larger than a fragment, the first with its headers."""
        size = self.fragment_bytes
        room = size if block is None else size - len(block)
        if room <= 0:
            raise MaxPayloadExceeded(size - room + 1, size)
        return [chunk[:room], *(chunk[start : start + size] for start in range(room, len(chunk), size))]

    def push_end(self, op: bytes, block: bytes | None, payload: bytes) -> None:
        """Take what ends the stream; it needs no credit, and counts no application bytes."""
        self.take_in()
        seq, special = self.last + 1, (op, block)
        # No call from here on, so that a Ctrl-C divides nothing.
        self._special[seq] = special
        self.kept += [payload]
        self.ended = True

    # -- sending -------------------------------------------------------------------------------------------------

    def next(self) -> Frame | None:
        """The next frame to be sent; None if all is sent, or its credit is still to come."""
        self.take_in()
        seq = self.sent + 1
        if seq > self.last or self._cleared:
            return None
        special = self._special.get(seq) if self._special else None
        if special is None:
            return self._next_chunks(seq)
        op, block = special
        payload = self.kept[seq - self.acked - 1]
        if op in (Op.END, Op.ERROR):
            self._advance(1, 0)
        elif seq > self._limit or self._sent_offset + len(payload) > self._limit_bytes:
            return None  # a fragment of a chunk larger than the credit
        else:
            self._advance(1, len(payload))
        return Frame(op, seq, block, payload, 1)

    def next_ones(self, most_bytes: int) -> tuple[int, list[bytes]]:
        """Bare chunks that are due, each for a frame of its own, of up to most_bytes; and the seq of the first.

        None where next() has to be asked: they may share frames, or the next one is no bare chunk or a larger one.
        """
        self.take_in()
        seq = self.sent + 1
        if self._batches or self._special or self._cleared:
            return seq, []
        begin = seq - self.acked - 1
        run = self.kept[begin : begin + ONES]
        sizes = list(map(len, run))
        if max(sizes, default=0) > most_bytes:
            run = list(itertools.takewhile(lambda chunk: len(chunk) <= most_bytes, run))
            del sizes[len(run) :]
        self._advance(len(run), sum(sizes))
        return seq, run

    def _next_chunks(self, seq: int) -> Frame:
        begin = seq - self.acked - 1
        first = self.kept[begin]
        if self._batches and begin + 1 < len(self.kept) and len(first) <= BATCHED_CHUNK_BYTES:
            run, sizes = self._run(begin, seq)
            if len(run) > 1:
                self._advance(len(run), sum(sizes))
                return Frame(Op.BATCH, seq, None, frames.encode_batch(run, sizes), len(run))
        self._advance(1, len(first))
        return Frame(Op.DATA, seq, None, first, 1)

    def _run(self, begin: int, seq: int) -> tuple[list[bytes], list[int]]:
        """The chunks from here on that share a frame, and their sizes."""
        run = self.kept[begin : begin + BATCH_CHUNKS]
        if self._special:
            stop = min((one for one in self._special if one > seq), default=self.last + 1)
            del run[stop - seq :]
        sizes = list(map(len, run))
        if max(sizes) > BATCHED_CHUNK_BYTES:
            large = next(index for index, size in enumerate(sizes) if size > BATCHED_CHUNK_BYTES)
            del run[large:], sizes[large:]
        room = self._batch_bytes - 4
        if sum(sizes) + 4 * len(sizes) > room:
            totals = itertools.accumulate(size + 4 for size in sizes)
            fitting = next(index for index, total in enumerate(totals) if total > room)
            del run[fitting:], sizes[fitting:]
        return run, sizes

    def _advance(self, count: int, size: int) -> None:
        self.sent += count
        self._sent_offset += size
        self.highest = max(self.highest, self.sent)

    @property
    def blocked(self) -> bool:
        """Whether something waits for credit to be sent."""
        self.take_in()
        return self.sent < self.last

    # -- what the requester says ---------------------------------------------------------------------------------

    def acknowledge(self, ack: Ack) -> bool:
        """Take a requester's account; whether it brings anything new. What it has is let go."""
        self.take_in()
        if ack.received > self.highest or self._cleared:
            return False  # of what was never sent: not of this stream, or nonsense
        news = False
        if ack.received > self.acked:
            self._let_go(ack.received - self.acked)
            news = True
        if ack.limit > self._limit or ack.limit_bytes > self._limit_bytes:
            self._limit = max(self._limit, ack.limit)
            self._limit_bytes = max(self._limit_bytes, ack.limit_bytes)
            news = True
        if ack.missing and self.sent > self.acked:
            self.rewind()
        if news:
            self._reckon()
        return news

    def _let_go(self, count: int) -> None:
        size = self._application_bytes(count)
        del self.kept[:count]
        self.acked += count
        self._acked_offset += size
        if self._special:
            for seq in [one for one in self._special if one <= self.acked]:
                del self._special[seq]
        if self.sent < self.acked:
            self.sent, self._sent_offset = self.acked, self._acked_offset

    def _application_bytes(self, count: int) -> int:
        """Of the first frames that are kept; an end counts none."""
        size = sum(map(len, self.kept[:count]))
        if self.ended and self.acked + count == self.last:
            size -= len(self.kept[count - 1])
        return size

    def rewind(self) -> None:
        """Send again whatever the requester has not acknowledged."""
        self.sent, self._sent_offset = self.acked, self._acked_offset

    def adapt(self, max_payload: int) -> bool:
        """Frames are to be no larger than this from now on; whether all that is kept is."""
        self._fit(max_payload)
        if self.fragment_bytes < GIVEN_BYTES:
            self._no_giver()
        self.take_in()
        self._allot()
        headers = {seq: len(block) for seq, (_, block) in self._special.items() if block is not None}
        sizes = (headers.get(seq, 0) + len(payload) for seq, payload in enumerate(self.kept, self.acked + 1))
        return max(sizes, default=0) <= max_payload

    def clear(self) -> None:
        """Keep nothing any more, and send nothing."""
        self._no_giver()
        self._cleared = True
        self.kept, self._special = [], {}
        self._acked_offset = self.offset


class Verdict(enum.Enum):
    """What an arriving frame means."""

    TAKEN = "taken"
    AGAIN = "again"  # it had come before
    GAP = "gap"  # something before it did not come
    END = "end"
    ERROR = "error"


class Incoming:
    """What a requester has received: in order, without a gap, never more than it gave credit for.

    Attributes:
        received: everything up to this seq is here.
        gaps: how often something was missing.
        resent: frames that came again, or too early, so that they were dropped.
        granted_bytes: the credit in bytes that is out: what may still come, or has come and is not consumed.
    """

    def __init__(self, window: int, window_bytes: int, chunk_bytes: int) -> None:
        self.window = window
        self.received = 0
        self.gaps = self.resent = 0
        self._chunk_bytes = chunk_bytes
        self._limit, self._limit_bytes = window, window_bytes
        self._received_bytes = 0
        self._credited, self._credited_bytes = 0, 0  # frames and bytes that hold no place any more
        self._parts: list[bytes] = []
        self._parts_bytes = 0

    @property
    def granted_bytes(self) -> int:
        return self._limit_bytes - self._credited_bytes

    def take(self, op: bytes, seq: int, payload: bytes, chunks: list[bytes]) -> Verdict:
        """Take a frame (not a probe); what it completes is appended to chunks.

        Raises:
            ProtocolError: the responder sends what it may not.
        """
        count, batch = 1, None
        if op == Op.BATCH:
            batch = frames.decode_batch(payload)
            count = len(batch)
        expected = self.received + 1
        if seq > expected:
            self.resent += count
            return Verdict.GAP
        if seq + count <= expected:
            self.resent += count
            return Verdict.AGAIN
        if op == Op.END or op == Op.ERROR:
            if self._parts:
                raise ProtocolError("the stream ended within a chunk")
            self.received = seq
            return Verdict.END if op == Op.END else Verdict.ERROR
        if batch is not None:
            fresh = batch[expected - seq :]  # it may have been put together anew, and straddle what is here
            self._count(len(fresh), sum(map(len, fresh)))
            if self._parts:
                raise ProtocolError("a batch came within a chunk")
            chunks.extend(fresh)
            return Verdict.TAKEN
        self._count(1, len(payload))
        if op == Op.FRAGMENT:
            self._add_part(payload)
        elif op == Op.DATA:
            chunks.append(payload if not self._parts else self._whole(payload))
        else:
            raise ProtocolError(f"a frame of the unknown kind {op[:8]!r}")
        return Verdict.TAKEN

    @property
    def between_chunks(self) -> bool:
        """Whether no fragment waits for those that complete its chunk."""
        return not self._parts

    def take_next(self, run: list[bytes], chunks: list[bytes]) -> None:
        """Take whole chunks that come next, between chunks; as take() does each.

        Raises:
            ProtocolError: the responder sends more than it may.
        """
        count, size = len(run), sum(map(len, run))
        if self.received + count <= self._limit and self._received_bytes + size <= self._limit_bytes:
            self._count(count, size)
            chunks.extend(run)
            return
        for payload in run:  # up to the one that is too much
            self.take(Op.DATA, self.received + 1, payload, chunks)

    def _count(self, count: int, size: int) -> None:
        self.received += count
        self._received_bytes += size
        if self.received > self._limit or self._received_bytes > self._limit_bytes:
            raise ProtocolError(
                f"the responder sent up to frame {self.received} and byte {self._received_bytes}, and its credit "
                f"reached to {self._limit} and {self._limit_bytes}"
            )

    def _add_part(self, payload: bytes) -> None:
        """Keep a fragment; it cannot be consumed yet, so its credit is given back at once."""
        self._parts.append(payload)
        self._parts_bytes += len(payload)
        if self._parts_bytes > self._chunk_bytes:
            raise ProtocolError(f"a chunk of more than {self._chunk_bytes} bytes (max_message_bytes)")
        self.consume(1, len(payload))

    def _whole(self, last: bytes) -> bytes:
        # The fragments' credit was given back. It is taken again while the chunk waits, and returns as it is consumed.
        self._credited_bytes -= self._parts_bytes
        if self._parts_bytes + len(last) > self._chunk_bytes:
            raise ProtocolError(f"a chunk of more than {self._chunk_bytes} bytes (max_message_bytes)")
        self._parts.append(last)
        chunk = b"".join(self._parts)
        self._parts, self._parts_bytes = [], 0
        return chunk

    def consume(self, count: int, size: int) -> None:
        """The application has taken this many chunks, of this many bytes in all."""
        self._credited += count
        self._credited_bytes += size

    def is_due(self, window_bytes: int) -> bool:
        """Whether enough was consumed, a quarter of the window, for new limits to be worth a message."""
        seqs = self._credited + self.window - self._limit
        size = self._credited_bytes + window_bytes - self._limit_bytes
        return 4 * seqs >= self.window or 4 * size >= window_bytes

    def account(self, window_bytes: int, *, missing: bool = False) -> Ack:
        """What to tell the responder: what is here, and the limits now. window_bytes: credit that may be out."""
        self._limit = max(self._limit, self._credited + self.window)
        self._limit_bytes = max(self._limit_bytes, self._credited_bytes + window_bytes)
        return Ack(self.received, self._limit, self._limit_bytes, missing)
