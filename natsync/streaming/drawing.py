"""What an iterator yields, sent: chunk by chunk, or gathered and given to the sender together while it does not pause.

Giving a chunk to a sender costs several times what a generator takes to yield it, and giving many costs hardly more. So
what comes fast is gathered, as many chunks as come in a quarter of a millisecond. Nothing is kept back meanwhile: if
the iterator pauses within, the timer gives the sender what has gathered, and what comes then is sent as it comes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from natsync.concurrency import Deadline
from natsync.errors import StreamClosed
from natsync.message import to_bytes
from natsync.streaming.framing import GUARANTEED_BYTES
from natsync.streaming.sender import SenderCore
from natsync.streaming.window import BATCHED_CHUNK_BYTES, Outgoing

#: Chunks after which it is looked how fast they come, and that are worth gathering.
FEW = 16
#: Chunks that are gathered at most, and the seconds that this may take.
MOST = 256
SLICE_SECONDS = 0.25e-3
#: Chunks of up to this many bytes are gathered, however small those before were.
SMALL_BYTES = 256

_NO_DEADLINE = Deadline()


def send_each(iterator: Iterator[Any], send: Callable[[Any], object], core: SenderCore, *, shared: bool) -> None:
    """Send what the iterator yields until it ends, or the stream is over.

    send: of the core's ResponseSender; shared: others send too, in between.
    """
    out = None if shared else core.direct
    drawing = None if out is None else Drawing(core, out, iterator)
    while True:
        began, before = time.perf_counter(), core.queued_bytes
        count = 0
        for chunk in islice(iterator, FEW):
            try:
                send(chunk)
            except StreamClosed:
                return  # no error of the handler
            count += 1
        if count < FEW:
            return
        if drawing is not None:
            size = (core.queued_bytes - before) // FEW
            if not drawing.run((time.perf_counter() - began) / FEW, size):
                return


class Drawing:
    """Takes chunks from an iterator that yields them quickly; its owner's thread, but for _paused()."""

    def __init__(self, core: SenderCore, out: Outgoing, iterator: Iterator[Any]) -> None:
        self._core = core
        self._out = out
        self._iterator = iterator
        self._gathered: deque[bytes] = deque()
        self._cut = False

    def run(self, pace: float, size: int) -> bool:
        """Send what comes until the iterator has ended or the stream is over (False), or chunks come too slowly (True).

        pace: seconds that each of those before took; size: how large they were.
        """
        most_bytes = max(SMALL_BYTES, 2 * size)
        if most_bytes > BATCHED_CHUNK_BYTES:
            return True
        # A stream has so much room in any case while nothing else of it is kept, and else at least what `free` says.
        most = min(MOST, GUARANTEED_BYTES // most_bytes)
        try:
            while True:
                fitting = int(SLICE_SECONDS / pace) if pace else most  # 0 on a coarse clock
                with self._core.lock:
                    self._out.take_in()
                    count = min(most, fitting, self._out.room, self._out.free // most_bytes)
                if count < FEW:
                    return True
                began = time.perf_counter()
                if not self._draw(count, most_bytes):
                    return False
                if self._cut:
                    return True
                pace = (time.perf_counter() - began) / count
        finally:
            self._core.gather(None)

    def _draw(self, count: int, most_bytes: int) -> bool:
        """Gather so many chunks and give them to the sender; False if there was none, or the stream is over."""
        chunk = large = None
        append = self._gathered.append
        self._cut = False
        self._core.gather(self._paused)
        try:
            for chunk in islice(self._iterator, count):
                if type(chunk) is not bytes:
                    chunk = to_bytes(chunk)  # now, for it may be a buffer that is used again
                if len(chunk) > most_bytes:
                    large = chunk
                    break
                append(chunk)
                if self._cut:
                    break
        finally:
            open_ = self._give()
        if large is not None:
            self._cut = True  # perhaps the next ones are like it: measure again
            try:
                self._core.send(large, _NO_DEADLINE)
            except StreamClosed:
                return False
        return open_ and chunk is not None

    def _paused(self) -> None:
        """It takes longer than it should; the timer's thread."""
        self._cut = True
        with self._core.lock:
            for _ in range(self._push_locked()):
                self._gathered.popleft()

    def _give(self) -> bool:
        """Have the sender take everything; False if the stream is over."""
        with self._core.lock:
            pushed = self._push_locked()
            rest = list(islice(self._gathered, pushed, None))
            self._gathered.clear()
        if pushed:
            self._core.see_to_it()
        try:
            if rest:
                self._core.send_many(rest, _NO_DEADLINE)
        except StreamClosed:
            return False
        return self._core.error is None

    def _push_locked(self) -> int:
        """Give what there is room for; how many chunks from the left, which are the caller's to take away."""
        chunks = list(self._gathered.copy())  # the copy is one step, where the other thread may be adding to it
        return self._out.push_some(chunks, list(map(len, chunks))) if self._core.error is None else 0
