"""Backlog: whole frames in order, until a writer takes them.

Positions count bytes put since the connection was made. A frame's position tells later whether it had been handed
to a link that was lost (position <= taken) and whether the server is known to have it (position <= confirmed).
"""

from __future__ import annotations

from threading import get_ident

#: How often a thread puts under the lock, while the giver is at rest, until it is the giver itself.
GIVER_AFTER = 8
#: How the frames of messages begin.
_MESSAGES = (b"PUB ", b"HPUB")


class Giver:
    """The one thread that puts messages without the outbox's lock, which would be a third of what putting costs.

    It appends to `given`. Only who holds the lock makes that list shorter, lowers the limit, and appoints the next.
    Who lowers the limit looks at the list behind that, and the giver looks at the limit behind what it appends. So one
    of the two notices: either the frame is taken in, or its thread finds out that it was not (Outbox.was_taken).

    Attributes:
        thread: its ident; 0 if there is no giver.
        given: frames on their way from it.
        given_bytes: how much it has given so far.
        limit_bytes: what that has to stay below; 0 while it has to take the lock.
    """

    __slots__ = ("given", "given_bytes", "limit_bytes", "thread")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.given: list[bytes] = []
        self.given_bytes = self.limit_bytes = 0


class Backlog:
    """Frames in order, and their positions. No I/O, and no lock: the Outbox, which drives it, has both.

    Attributes:
        giver: the thread that puts without that lock, and what it has given.
        position: of the frame that was put last, or taken in.
        taken: everything up to this position was handed to the link, or taken back.
        messages: those that were put, or taken in.
    """

    def __init__(self, frames: list[bytes] | None, position: int) -> None:
        self._frames = frames or []
        self._size = sum(map(len, self._frames))
        self.position = position
        # Frames that were left out or taken back leave gaps; counting those as taken errs on the side of "maybe lost".
        self.taken = position - self._size
        self.messages = 0
        self.giver = Giver(0)
        self._next_giver = 0  # the thread that will be it,
        self._puts = 0  # once it has put GIVER_AFTER times while the present one gave nothing

    # -- what is put without the lock ------------------------------------------------------------------------------

    def _take_in(self) -> None:
        """Queue what was given."""
        giver = self.giver
        if not giver.given:
            return
        self._puts = 0
        count = len(giver.given)
        frames = giver.given[:count]
        size = sum(map(len, frames))
        del giver.given[:count]  # from here on no call, so no interrupt
        self._frames += frames
        self._size += size
        self.position += size
        self.messages += count

    def _no_giver(self) -> None:
        """From here on nobody gives, but for what is about to be: then its thread notices."""
        self.giver.limit_bytes = 0
        self._take_in()  # behind that
        self.giver = Giver(0)

    def _allot(self, room: int) -> None:
        """Let this thread give as many bytes, if it has put often lately and nobody else gives."""
        giver, me = self.giver, get_ident()
        if giver.thread != me:
            if self._next_giver != me:
                self._next_giver, self._puts = me, 0
            self._puts += 1
            if self._puts < GIVER_AFTER:
                return
            self._no_giver()
            self.giver = giver = Giver(me)
        giver.limit_bytes = giver.given_bytes + room

    # -- what waits ------------------------------------------------------------------------------------------------

    def _next(self, most_bytes: int) -> list[bytes]:
        """Take the frames that are written together: about most_bytes, and one at least if there is any."""
        frames, size = self._frames, self._size
        if size <= most_bytes:
            self._frames = []
        else:
            count = size = 0
            for frame in frames:
                count += 1
                size += len(frame)
                if size >= most_bytes:
                    break
            frames = self._frames[:count]
            del self._frames[:count]
        self._size -= size
        self.taken += size
        return frames

    def _remove(self, frame: bytes) -> bool:
        """Take this very frame out; whether it was still here."""
        for index, waiting in enumerate(self._frames):
            if waiting is frame:
                del self._frames[index]
                self._size -= len(frame)
                # Those behind it keep their positions, so that what was promised of them stays true.
                self.taken += len(frame)
                return True
        return False

    def _keep(self, frames: list[bytes]) -> None:
        """Keep only these of the waiting frames. Those taken away count as taken, which errs on the safe side."""
        self._frames = frames
        self._size = sum(map(len, frames))
        self.taken = self.position - self._size


def is_message(frame: bytes) -> bool:
    """Whether it is a message, or several joined, and not of the protocol."""
    return frame[:4] in _MESSAGES


def destination(frame: bytes) -> bytes:
    """The subject of a message's frame; of several joined, the first one's."""
    return frame.split(b" ", 2)[1].split(b"\r\n", 1)[0]


def largest_payload(frame: bytes) -> int:
    """What counts against max_payload: the last number of the control line; of several joined, the largest."""
    largest = start = 0
    while start < len(frame):
        end = frame.index(b"\r\n", start)
        size = int(frame[start:end].rpartition(b" ")[2])
        largest = max(largest, size)
        start = end + 2 + size + 2
    return largest
