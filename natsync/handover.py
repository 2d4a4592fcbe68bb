"""Handover: from a server that is going away to another one, while the old link still works.

Make before break. The new link subscribes to everything; for a while both bring every message, and those of the old
one are delivered. Then a mark is published over the old link, to an inbox of our own: each link brings it, or a PONG in
its stead, at its place among the messages. From its mark on the messages of each link are compared. A while after both
have come, the old link unsubscribes, and everything published from now on waits; the PONG behind that proves that the
old link has brought all it will ever bring and that its server has all it was given. A second mark, the last that is
published over the old link, comes by the new one once the old server has passed on all that to the new one, which in a
slow cluster takes its time: what is published next must not overtake it. Now the new link takes over.

What the new link brings behind its mark is kept until the old one has brought it too. What is left in the end came on
the new link only, and is delivered: the old server had unsubscribed before it had it, be it published behind that or
still on its way through the cluster. Messages of queue groups go to one of the two links only, so these are never
compared. Equal messages are told apart by their number, which the servers' own routes may blur by as much as they
differ in delay.

It runs on the two readers' threads and the timer's, and never waits. Its lock comes before the connection's.
"""

from __future__ import annotations

import enum
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from natsync import timers
from natsync.errors import ConnectError
from natsync.protocol import Batch, encode_pub
from natsync.session import Session

#: Seconds for which both links bring everything before the old one is left: time for the whole cluster to learn of
#: the new subscriptions, which takes the slowest route's delay. A server in lame duck mode keeps its links for 10 s at
#: least (nats-server's default lame_duck_grace_period).
OVERLAP_SECONDS = 1.5
#: The part of it behind the marks, in which messages are compared: more than the delays of the servers' routes differ.
COMPARE_SECONDS = 1.0
#: Seconds behind the marks in which the new link may still bring what the old one brought before its mark, because the
#: mark had another way through the cluster. Such messages find no match, and are not taken for new ones.
SKEW_SECONDS = 0.25
#: OVERLAP_SECONDS with subscriptions made meanwhile, which need as much again.
LONGEST_OVERLAP = 5.0
#: Seconds behind its arrival on the old link that the mark may take on the new one; a user who may not publish to his
#: own inbox has none, and then a PONG must do.
MARK_SECONDS = 0.5
#: Seconds behind the end of the old link that the second mark may take on the new one; publishers wait meanwhile.
PASSED_ON_SECONDS = 1.0
#: Seconds, at the least, that servers other than these two have for what the old one passes on to them. If the second
#: mark took longer it is as long as that, for there is nothing that tells when they have it.
OTHERS_SECONDS = 0.05
#: Seconds for which the old link may still be ahead of the new one when it is left.
STRAGGLER_SECONDS = 1.0


class Phase(enum.IntEnum):
    """How far a handover is."""

    JOINING = 1  # the new link subscribes
    OVERLAP = 2  # both bring everything
    COMPARING = 3  # and what they bring is compared, from the mark on
    LEAVING = 4  # the old link has unsubscribed
    TAKEN_OVER = 5  # the old link is gone; stragglers of its messages are still dropped


class Keeper(Protocol):
    """What a handover asks of its connection. None of it blocks."""

    def deliver(self, batch: Batch) -> None:
        """Hand a batch to whom it concerns."""

    def is_shared(self, sid: bytes) -> bool:
        """Whether the subscription is a member of a queue group."""

    def mark_subject(self) -> bytes:
        """A subject of our own inbox that was never used."""

    def leave_old_link(self, handover: Handover) -> None:
        """Everything published from now on is for the new link; the old one unsubscribes, see Session.hand_over().

        The last that it publishes is handover.last_words.
        """

    def take_over(self, handover: Handover) -> None:
        """The new link is the only one from now on."""

    def end_handover(self, handover: Handover) -> None:
        """There is nothing left to compare."""


class Handover:
    """One move from one link to another; thrown away when it is over or either link is lost."""

    def __init__(self, keeper: Keeper, old: Session, new: Session, join_timeout: float, leave_timeout: float) -> None:
        """Seconds for the new server to confirm the subscriptions, and for the old one to confirm the end.

        The second are more, for all that has been published is to be taken before that.
        """
        self.old = old
        self.new = new
        self.phase = Phase.JOINING
        self._joined_first = self._joined_last = 0.0
        self._compared_from: int | None = None  # the number on the new link from which on none is a skewed one,
        self._compared_at = math.inf  # and when that was known
        self._mark = b""
        self._last_mark = b""  # there is one if the first was brought by the new link
        self._brings_marks = False
        self._left_at = 0.0
        self._passed_on: float | None = None  # the seconds that the second mark took
        self._taking_over = False
        self._marked: set[Session] = set()  # from now on their messages are compared
        self._both_marked = False
        self._keeper = keeper
        self._join_timeout = join_timeout
        self._leave_timeout = leave_timeout
        self._lock = threading.Lock()
        # Per message, what came on the new link and not yet on the old one, or how many more came on the old one;
        # nothing is kept of those that match.
        self._kept: dict[int, deque[_Kept]] = {}
        self._ahead: dict[int, int] = {}
        self._arrivals = itertools.count()
        self._timers: list[timers.Timer] = []
        self._stopped = False

    def begin(self) -> None:
        """The new session has started, and its subscriptions are on their way."""
        self.new.ping_first(self._joined)
        self._by(self._join_timeout, self._check_joined)

    def mute(self) -> None:
        """The links in force are lost: what their readers still hold counts no more, for all that is kept does.

        Before the messages are compared nothing is kept, and the old link's count.
        """
        self.new.muted = True
        self.old.muted = len(self._marked) == 2

    def stop(self) -> None:
        """It is over, or the old link was lost; what came on the new link only is delivered."""
        with self._lock:
            self._deliver_kept_locked()
        self.give_up()

    def give_up(self) -> None:
        """The new link was lost first: the old one brings everything."""
        with self._lock:
            self._stopped = True
            pending, self._timers = self._timers, []
            self._kept.clear()
        for timer in pending:
            timer.cancel()

    def joined_more(self) -> None:
        """Another subscription was made, on both links."""
        self._joined_last = time.monotonic()

    def is_mark(self, subject: bytes) -> bool:
        """Whether the subject is that of the mark, which the user knows nothing of."""
        return subject in (self._mark, self._last_mark)

    @property
    def last_words(self) -> bytes:
        """What the old link publishes last: the second mark, if there is one."""
        return encode_pub(self._last_mark, None, None, b"") if self._last_mark else b""

    def _later(self, seconds: float, step: Callable[[], None]) -> None:
        with self._lock:
            if not self._stopped:
                self._timers.append(timers.schedule_after(seconds, step))

    def _by(self, seconds: float, check: Callable[[], None]) -> None:
        """Have it checked after so long that the next step was taken; if that is late, what came has its moment."""
        due = time.monotonic() + seconds

        def look() -> None:
            if timers.lateness(due, time.monotonic()):
                self._later(timers.LATE_SECONDS, check)
            else:
                check()

        self._later(seconds, look)

    # -- the steps -----------------------------------------------------------------------------------------------

    def _joined(self, position: int | None) -> None:
        """The new server has our subscriptions."""
        if position is None:
            return
        self._joined_first = self._joined_last = time.monotonic()
        self.phase = Phase.OVERLAP
        self._later(OVERLAP_SECONDS - COMPARE_SECONDS, self._compare)

    def _check_joined(self) -> None:
        if self.phase is Phase.JOINING:
            self.new.end(ConnectError(f"{self.new.server} did not confirm the subscriptions in time"))

    def _compare(self) -> None:
        mark = self._keeper.mark_subject()
        with self._lock:
            self.phase = Phase.COMPARING
            self._mark = mark
        self.old.mark(encode_pub(mark, None, None, b""), self.old_marked)
        self._by(self._leave_timeout, self._check_old_marked)

    def _check_old_marked(self) -> None:
        if self.old not in self._marked:
            self._give_up_old()

    def _check_compared(self) -> None:
        if self._compared_from is None:
            self.new.end(ConnectError(f"{self.new.server} does not bring what it should"))

    def old_marked(self, position: int | None) -> None:
        """The mark's place among the old link's messages."""
        if position is not None:
            self._later(MARK_SECONDS, self._make_up_for_mark)
            self._by(MARK_SECONDS + self._join_timeout, self._check_compared)
            self._marks(self.old)

    def _make_up_for_mark(self) -> None:
        if self.new not in self._marked:
            self.new.ping_first(self._new_marked)

    def _new_marked(self, position: int | None) -> None:
        if position is not None:
            self._marks(self.new)

    def _marks(self, session: Session) -> None:
        """From here on what this link brings is compared; the old one is left some time after both have come so far."""
        with self._lock:
            self._marked.add(session)
            last = len(self._marked) == 2 and not self._both_marked
            self._both_marked = self._both_marked or last
        if last:
            self._later(SKEW_SECONDS, self._end_skew)

    def _end_skew(self) -> None:
        """Have the new server tell, by a PONG, what it had sent by now, however long we may take to read that."""
        self.new.ping_first(self._skew_ended)

    def _skew_ended(self, position: int | None) -> None:
        if position is None:
            return
        with self._lock:
            self._compared_from, self._compared_at = next(self._arrivals), time.monotonic()
        self._leave()

    def _leave(self) -> None:
        """Leave the old link when the cluster has had time to learn of new subscriptions."""
        with self._lock:
            if self._compared_from is None or self.phase is not Phase.COMPARING:
                return
            joined = min(self._joined_last + OVERLAP_SECONDS, self._joined_first + LONGEST_OVERLAP)
            wait = max(joined, self._compared_at + COMPARE_SECONDS - SKEW_SECONDS) - time.monotonic()
            if wait <= 0:
                self.phase = Phase.LEAVING
                self._left_at = time.monotonic()
                self._last_mark = self._keeper.mark_subject() if self._brings_marks else b""
        if wait > 0:
            self._later(wait, self._leave)
        else:
            self._keeper.leave_old_link(self)
            self._by(self._leave_timeout, self._check_left)

    def _check_left(self) -> None:
        if self.phase is Phase.LEAVING:
            self._give_up_old()

    def _give_up_old(self) -> None:
        self.old.end(ConnectError(f"{self.old.server} did not confirm the end of the subscriptions in time"))

    def left(self, position: int | None) -> None:
        """The old link has brought, and its server has taken, everything."""
        if position is None:
            return
        with self._lock:
            self._deliver_kept_locked()
            self.phase = Phase.TAKEN_OVER
            waits = bool(self._last_mark) and self._passed_on is None
        if waits:
            self._by(PASSED_ON_SECONDS, self._begin_to_take_over)
        else:
            self._begin_to_take_over()

    def _brought_last_mark(self) -> None:
        with self._lock:
            self._passed_on = time.monotonic() - self._left_at
            left = self.phase is Phase.TAKEN_OVER
        if left:
            self._begin_to_take_over()

    def _begin_to_take_over(self) -> None:
        """What the old server was given has reached the new one, as far as can be known; other servers get a moment."""
        with self._lock:
            if self._taking_over:
                return
            self._taking_over = True
            took = self._passed_on or 0.0
        self._later(min(max(took, OTHERS_SECONDS), PASSED_ON_SECONDS), self._ask_new)

    def _ask_new(self) -> None:
        """One more round trip, in which the new server passes on what it was given by the old one."""
        self.new.ping_first(self._take_over)

    def _take_over(self, position: int | None) -> None:
        if position is None:
            return
        self._keeper.take_over(self)
        self._later(STRAGGLER_SECONDS, lambda: self._keeper.end_handover(self))

    # -- what the links bring --------------------------------------------------------------------------------------

    def on_batch(self, session: Session, batch: Batch) -> None:
        """Deliver a batch, keep it, or drop what has come on the other link."""
        if batch.subject == self._mark:
            self._brings_marks = self._brings_marks or session is self.new
            self._marks(session)
        elif batch.subject == self._last_mark:
            self._brought_last_mark()
        elif self._keeper.is_shared(batch.sid):
            self._keeper.deliver(batch)
        elif session is self.old:
            self._on_old(batch)
        else:
            self._on_new(batch)

    def _on_old(self, batch: Batch) -> None:
        with self._lock:
            if self.old.muted:
                return
            if self.old in self._marked:
                for key in _keys(batch):
                    if not self._drop_kept_locked(key):
                        self._ahead[key] = self._ahead.get(key, 0) + 1
            self._keeper.deliver(batch)

    def _drop_kept_locked(self, key: int) -> bool:
        """Forget the first such message that is kept; False if there is none."""
        kept = self._kept.get(key)
        if kept is None:
            return False
        kept.popleft()
        if not kept:
            del self._kept[key]
        return True

    def _on_new(self, batch: Batch) -> None:
        with self._lock:
            if self.phase is Phase.TAKEN_OVER:
                items = [item for item, key in zip(batch.items, _keys(batch), strict=True) if not self._met_locked(key)]
                if items:
                    self._keeper.deliver(Batch(batch.sid, batch.subject, items))
            elif self.new in self._marked:
                for item, key in zip(batch.items, _keys(batch), strict=True):
                    if not self._met_locked(key):
                        kept = _Kept(next(self._arrivals), Batch(batch.sid, batch.subject, [item]))
                        self._kept.setdefault(key, deque()).append(kept)

    def _met_locked(self, key: int) -> bool:
        """Whether the old link has brought one more of it; that one counts no more."""
        number = self._ahead.get(key, 0)
        if number > 1:
            self._ahead[key] = number - 1
        elif number:
            del self._ahead[key]
        return number > 0

    def _deliver_kept_locked(self) -> None:
        kept = sorted(one for ones in self._kept.values() for one in ones)
        self._kept.clear()
        for one in kept:
            if self._compared_from is not None and one.number > self._compared_from:
                self._keeper.deliver(one.batch)


class _Kept(NamedTuple):
    """A message that came on the new link; sorted by its place there."""

    number: int
    batch: Batch


def _keys(batch: Batch) -> list[int]:
    """What equal messages have in common, without holding them."""
    return [hash((batch.sid, batch.subject, item)) for item in batch.items]
