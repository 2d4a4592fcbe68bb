"""Peers: the connections at the other end of framed streams, whether they are heard from, and what follows if not.

All streams between two connections share one Peer on each side, so silence is noticed by one question, however many
streams are idle. While one's own link is down silence proves nothing, and its clock stands; but streams do not outlast
an outage for ever. It runs on the reader's and the timer's threads and
never waits; its lock is held for its own fields only.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeAlias

from natsync.connection import Connection
from natsync.mux import LinkLoss, Mux, Waiter
from natsync.timers import Alarm, lateness

#: Seconds after which a question that was not answered counts as a sign of death.
ANSWER_SECONDS = 2.0
#: Seconds to the first repetition of a question; each waits twice as long as the one before, up to the longest.
FIRST_REPEAT = 0.25
LONGEST_REPEAT = 2.0
#: Graces for which streams outlast an outage of one's own link: a minute, by default.
OUTAGE_GRACES = 6


class State(enum.Enum):
    """What is known of the other side."""

    HEARD = "heard"
    ASKED = "asked"  # a question is on its way
    SUSPENDED = "suspended"  # there are signs that it is gone, or between two links
    LOST = "lost"


class Event(enum.Enum):
    """What happens to it."""

    HEARD = "heard"
    ASKED = "asked"
    UNREACHABLE = "unreachable"  # the server says that nobody listens there
    UNANSWERED = "unanswered"
    OVERDUE = "overdue"  # suspended for longer than the grace
    OUTAGE = "outage"  # one's own link was down for too long


#: What is not listed changes nothing.
TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.HEARD, Event.ASKED): State.ASKED,
    (State.HEARD, Event.UNREACHABLE): State.SUSPENDED,
    (State.ASKED, Event.HEARD): State.HEARD,
    (State.ASKED, Event.UNREACHABLE): State.SUSPENDED,
    (State.ASKED, Event.UNANSWERED): State.SUSPENDED,
    (State.SUSPENDED, Event.HEARD): State.HEARD,
    (State.SUSPENDED, Event.OVERDUE): State.LOST,
    (State.HEARD, Event.OUTAGE): State.LOST,
    (State.ASKED, Event.OUTAGE): State.LOST,
    (State.SUSPENDED, Event.OUTAGE): State.LOST,
}


class Member(Protocol):
    """A stream of a peer. None of this may block or run user code."""

    def met(self, peer: Peer) -> None:
        """It is about to become a member: nothing was told it before."""

    def ask(self) -> None:
        """Send the other side something that it answers."""

    def suspend(self) -> None:
        """The other side is not heard from: send it nothing but questions."""

    def resume(self) -> None:
        """The other side is heard from again."""

    def give_up(self, why: str) -> None:
        """The other side is gone, as far as can be known."""


class Peer:
    """One connection over there."""

    def __init__(self, heartbeat: float, grace: float, is_linked: Callable[[], bool]) -> None:
        self.heartbeat = heartbeat
        self.grace = grace
        self.members: dict[Member, None] = {}  # whose turn it is to ask comes first
        self._is_linked = is_linked
        self._lock = threading.Lock()
        self._state = State.HEARD
        self._heard_at = self._since = time.monotonic()  # _since: when the state began
        self._down_since: float | None = None  # one's own link is
        self._elapsed = 0.0  # of a suspension, when it was lost
        self._repeat = FIRST_REPEAT
        self._made_up = False  # for having looked late
        self._asked_all_at = 0.0
        self._alarm = Alarm(self._look)

    @property
    def suspended(self) -> bool:
        """Whether there are signs that the other side is gone."""
        return self._state is State.SUSPENDED or self._state is State.LOST

    def join(self, member: Member) -> bool:
        """Whether it is a member now: of a peer that is lost nobody is."""
        with self._lock:
            if self._state is State.LOST:
                return False
            member.met(self)  # before it can be told of anything
            self.members[member] = None
            first = len(self.members) == 1
        if first:
            self._ring_by(self._heard_at + self.heartbeat)
        return True

    def leave(self, member: Member) -> bool:
        """Whether it was the last one."""
        with self._lock:
            self.members.pop(member, None)
            last = not self.members
        if last:
            self._alarm.clear()
        return last

    def heard(self) -> None:
        """Something came from there."""
        self._heard_at = time.monotonic()
        if self._state is not State.HEARD:
            self._on(Event.HEARD)

    def asked(self) -> None:
        """A member has asked for a sign of life."""
        if self._state is State.HEARD:
            self._on(Event.ASKED)

    def ask_all(self) -> None:
        """It does not know a stream that it should: whether it knows the others is asked, too; once in a while."""
        now = time.monotonic()
        with self._lock:
            if now - self._asked_all_at < ANSWER_SECONDS:
                return
            self._asked_all_at = now
            members = list(self.members)
        for member in members:
            member.ask()

    def unreachable(self) -> None:
        """The server says that nobody listens there."""
        self._on(Event.UNREACHABLE)

    def _on(self, event: Event, *, since: float | None = None, down_since: float | None = None) -> None:
        """Something has happened. since, down_since: the state or outage that it follows from, if that still lasts."""
        with self._lock:
            if since not in (None, self._since) or down_since not in (None, self._down_since):
                return
            before = self._state
            after = TRANSITIONS.get((before, event))
            if after is None:
                return
            self._state, self._since, self._repeat = after, time.monotonic(), FIRST_REPEAT
            self._made_up = False
            self._elapsed = 0.0
            members = list(self.members)
        if not members:
            return
        if after is State.ASKED:
            self._ring_by(self._since + ANSWER_SECONDS)
        elif after is State.SUSPENDED:
            self._ring(self._since + min(self._repeat, self.grace))
        elif after is State.HEARD:
            self._ring(self._heard_at + self.heartbeat)
        for member in members:
            if after is State.SUSPENDED:
                member.suspend()
            elif after is State.LOST:
                member.give_up(self._silence(event))
            elif before is State.SUSPENDED:
                member.resume()

    def _ring(self, when: float) -> None:
        self._alarm.set(when)
        self._hush()

    def _ring_by(self, when: float) -> None:
        self._alarm.set_by(when)
        self._hush()

    def _hush(self) -> None:
        if not self.members:  # the last one has left meanwhile
            self._alarm.clear()

    def _silence(self, event: Event) -> str:
        if event is Event.OUTAGE:
            return f"there was no link to a server for {OUTAGE_GRACES * self.grace:g} s"
        return f"it was not heard from for {self.grace:g} s" if self.grace else "nobody listens there any more"

    def _look(self) -> None:
        """The timer has come round: ask, or draw the conclusion."""
        now = time.monotonic()
        with self._lock:
            self._make_up_locked(now)
            down_since, state, since = self._down_since, self._state, self._since
        if down_since is not None:
            until = down_since + OUTAGE_GRACES * self.grace
            if now >= until:
                self._on(Event.OUTAGE, down_since=down_since)
            else:
                self._ring(until)
            return
        if state is State.SUSPENDED:
            if now - since >= self.grace:
                self._on(Event.OVERDUE, since=since)
                return
            self._ask_next(now, since + self.grace)
        elif state is State.ASKED:
            if now - since >= ANSWER_SECONDS:
                self._on(Event.UNANSWERED, since=since)
                return
            self._ask_next(now, since + ANSWER_SECONDS)
        elif state is State.HEARD:
            due = self._heard_at + self.heartbeat
            if now < due:
                self._ring(due)
                return
            self._on(Event.ASKED)
            self._ask_next(now, now + ANSWER_SECONDS)

    def _make_up_locked(self, now: float) -> None:
        """The time by which the look is late does not count, and an answer has a moment to be read. Requires _lock."""
        late = lateness(self._alarm.due, now)
        if not late or self._made_up:
            return  # once in each state or outage: a process may be late all the time
        self._made_up = self._state is not State.HEARD or self._down_since is not None
        self._repeat = FIRST_REPEAT
        if self._down_since is not None:
            moment = (OUTAGE_GRACES - 1) * self.grace  # the next link has a grace to come
            self._down_since = min(now, max(self._down_since + late, now - moment))
        else:
            limit = ANSWER_SECONDS if self._state is State.ASKED else self.grace
            self._since = min(now, max(self._since + late, now - max(0.0, limit - ANSWER_SECONDS)))

    def _ask_next(self, now: float, until: float) -> None:
        """Have the next member ask, and look again in a while, at the latest at `until`."""
        with self._lock:
            member = next(iter(self.members), None)
            if member is None:
                return
            del self.members[member]  # to the end of the line
            self.members[member] = None
            wait, self._repeat = self._repeat, min(2 * self._repeat, LONGEST_REPEAT)
        self._ring(min(now + wait, until))
        member.ask()

    def link_lost(self) -> None:
        """One's own link is gone: nothing can be heard, so nothing follows from hearing nothing."""
        with self._lock:
            if self._down_since is None:
                now = time.monotonic()
                self._make_up_locked(now)
                self._down_since, self._made_up = now, False
                self._elapsed = self._down_since - self._since if self._state is State.SUSPENDED else 0.0
        self._ring(self._down_since + OUTAGE_GRACES * self.grace)

    def link_made(self) -> None:
        if not self._is_linked():
            return  # lost again already
        now = time.monotonic()
        with self._lock:
            elapsed, self._elapsed = self._elapsed, 0.0
            self._down_since, self._made_up = None, False
            if self._state is State.SUSPENDED:
                self._since = now - elapsed
                due = now + min(FIRST_REPEAT, max(0.0, self.grace - elapsed))
            elif self._state is State.LOST:
                return
            else:
                self._state, self._heard_at, self._since = State.HEARD, now, now
                due = now + self.heartbeat
            self._repeat = FIRST_REPEAT
            empty = not self.members
        if not empty:
            self._ring(due)


#: Name, heartbeat and grace.
PeerName: TypeAlias = "tuple[bytes, float, float]"


class Peers(Waiter):
    """The peers of one connection, by name."""

    def __init__(self, connection: Connection, mux: Mux) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._peers: dict[PeerName, Peer] = {}
        self._down = False
        mux.watchers.append(self)

    def join(self, name: bytes, member: Member, heartbeat: float, grace: float) -> PeerName:
        """Make the stream a member of the peer with this name; what leave() is to be told."""
        key = (name, heartbeat, grace)  # so that nobody decides over the patience with another's streams
        with self._lock:
            peer = self._peers.get(key)
            while peer is None or not peer.join(member):
                peer = self._peers[key] = Peer(heartbeat, grace, self._is_linked)
                if self._down:
                    peer.link_lost()
        return key

    def leave(self, key: PeerName, peer: Peer, member: Member) -> None:
        with self._lock:
            if peer.leave(member) and self._peers.get(key) is peer:
                del self._peers[key]

    def __len__(self) -> int:
        return len(self._peers)

    def _is_linked(self) -> bool:
        return self._connection.linked

    def _all(self) -> list[Peer]:
        with self._lock:
            return list(self._peers.values())

    def link_lost(self, loss: LinkLoss) -> None:
        self._down = True
        for peer in self._all():
            peer.link_lost()

    def link_made(self) -> None:
        self._down = not self._is_linked()  # it may be lost again already, and that have been told
        for peer in self._all():
            peer.link_made()
