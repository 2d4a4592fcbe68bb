"""Backlog: whole frames in order, until a writer takes them.

Positions count bytes put since the connection was made. A frame's position tells later whether it had been handed
to a link that was lost (position <= taken) and whether the server is known to have it (position <= confirmed).
"""

from __future__ import annotations

#: How the frames of messages begin.
_MESSAGES = (b"PUB ", b"HPUB")


class Backlog:
    """Frames in order, and their positions. No lock, no I/O: the Outbox, which drives it, has them.

    Attributes:
        position: of the frame that was put last.
        taken: everything up to this position was handed to the link, or taken back.
        messages: those that were put.
    """

    def __init__(self, frames: list[bytes] | None, position: int) -> None:
        self._frames = frames or []
        self._size = sum(map(len, self._frames))
        self.position = position
        # Frames that were left out or taken back leave gaps; counting those as taken errs on the side of "maybe lost".
        self.taken = position - self._size
        self.messages = 0

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
