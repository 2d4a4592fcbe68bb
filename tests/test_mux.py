"""natsync.mux: every answer reaches who waits for it, and nobody else."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import natsync.mux
from natsync.message import Item
from natsync.mux import DeepMux, LinkLoss, Mux
from natsync.protocol import Batch


class Waiter(natsync.mux.Waiter):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.told: list[Any] = []

    def deliver(self, items: list[Item]) -> None:
        self.items += items

    def link_lost(self, loss: LinkLoss) -> None:
        self.told.append(loss)

    def link_made(self) -> None:
        self.told.append("link made")

    def publish_denied(self, subject: bytes, error: Exception) -> None:
        self.told.append((subject, error))

    def connection_closed(self, reason: Exception) -> None:
        self.told.append(reason)


@pytest.fixture
def mux() -> Mux:
    return Mux("_INBOX.abc")


def enter(mux: Mux, waiter: natsync.mux.Waiter) -> tuple[bytes, bytes]:
    """Have the waiter wait at a new address: (token, inbox)."""
    token, inbox = mux.address()
    mux.register(token, waiter)
    return token, inbox


def answer(subject: bytes, *payloads: bytes) -> Batch:
    return Batch(b"1", subject, [(None, None, payload) for payload in payloads])


def test_one_wildcard_covers_every_inbox(mux: Mux) -> None:
    inboxes = [enter(mux, Waiter())[1] for _ in range(3)]
    assert mux.wildcard == b"_INBOX.abc.*"
    assert len(set(inboxes)) == 3
    for inbox in inboxes:
        assert inbox.startswith(b"_INBOX.abc.")
        assert inbox.count(b".") == 2


def test_an_answer_reaches_its_waiter_and_no_other(mux: Mux) -> None:
    waiters = [Waiter() for _ in range(12)]
    inboxes = [enter(mux, waiter)[1] for waiter in waiters]
    for number, inbox in enumerate(inboxes):
        mux.deliver(answer(inbox, b"%d" % number, b"more"))
    assert [waiter.items for waiter in waiters] == [
        [(None, None, b"%d" % number), (None, None, b"more")] for number in range(12)
    ]
    assert mux.late == 0


def test_a_late_answer_is_counted_and_shown(mux: Mux) -> None:
    waiter, shown = Waiter(), list[Any]()
    token, inbox = enter(mux, waiter)
    mux.unregister(token)
    mux.deliver(answer(inbox, b"1"))
    mux.on_late = lambda whose, items: shown.append((whose, items))
    mux.deliver(answer(inbox, b"2", b"3"))
    assert waiter.items == []
    assert mux.late == 3
    assert shown == [(token, [(None, None, b"2"), (None, None, b"3")])]


def test_a_late_answer_cannot_reach_whoever_comes_next(mux: Mux) -> None:
    token, inbox = enter(mux, Waiter())
    mux.unregister(token)
    later = [Waiter() for _ in range(100)]
    inboxes = [enter(mux, waiter)[1] for waiter in later]
    mux.deliver(answer(inbox, b"late"))
    assert inbox not in inboxes
    assert all(waiter.items == [] for waiter in later)


@pytest.mark.parametrize("subject", [b"_INBOX.abc.", b"_INBOX.abc", b"_INBOX.abc.1.2", b"_INBOX.abc.x", b"", b"other"])
def test_an_answer_to_an_unknown_inbox_is_late_and_no_error(mux: Mux, subject: bytes) -> None:
    waiter = Waiter()
    enter(mux, waiter)
    mux.deliver(answer(subject, b"x"))
    assert (waiter.items, mux.late) == ([], 1)


def test_who_unregisters_is_forgotten(mux: Mux) -> None:
    tokens = [enter(mux, Waiter())[0] for _ in range(3)]
    assert len(mux) == 3
    for token in tokens:
        mux.unregister(token)
        mux.unregister(token)
    assert len(mux) == 0


def test_ten_thousand_abandoned_requests_leave_nothing(mux: Mux) -> None:
    for _ in range(10_000):
        token, _ = enter(mux, Waiter())
        mux.unregister(token)
    assert len(mux) == 0
    assert not mux.waiters


def test_everybody_is_told_of_a_lost_link_a_denial_and_the_end(mux: Mux) -> None:
    waiters = [Waiter() for _ in range(3)]
    for waiter in waiters:
        enter(mux, waiter)
    loss = LinkLoss(OSError("gone"), 10, 5, 0, frozenset())
    denial, end = PermissionError("no"), RuntimeError("closed")
    mux.link_lost(loss)
    mux.link_made()
    mux.publish_denied(b"a", denial)
    mux.connection_closed(end)
    assert [waiter.told for waiter in waiters] == [[loss, "link made", (b"a", denial), end]] * 3


def test_watchers_are_told_before_the_waiters_and_get_no_answers(mux: Mux) -> None:
    order: list[str] = []

    class Noting(Waiter):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def link_made(self) -> None:
            order.append(self.name)

    watcher = Noting("watcher")
    _, inbox = enter(mux, Noting("waiter"))
    mux.watchers.append(watcher)
    mux.link_made()
    mux.deliver(answer(inbox, b"1"))
    assert order == ["watcher", "waiter"]
    assert watcher.items == []
    assert len(mux) == 1


def test_a_waiter_that_fails_keeps_no_other_from_being_told(mux: Mux, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Waiter):
        def link_made(self) -> None:
            raise RuntimeError("a fault of one")

    last = Waiter()
    enter(mux, Failing())
    enter(mux, last)
    mux.link_made()
    assert last.told == ["link made"]
    assert "a fault of one" in caplog.text


# -- a mux whose subjects go on ----------------------------------------------------------------------------------------


def test_a_deep_mux_covers_whatever_follows_the_token() -> None:
    mux = DeepMux("_INBOX.abc.nsy1")
    assert mux.wildcard == b"_INBOX.abc.nsy1.>"


@pytest.mark.parametrize("tail", [b"", b".d.5", b".h.0.more.still"])
def test_a_deep_mux_finds_its_waiter_whatever_follows_the_token(tail: bytes) -> None:
    mux = DeepMux("_INBOX.abc.nsy1")
    waiters = [Waiter() for _ in range(12)]
    inboxes = [enter(mux, waiter)[1] for waiter in waiters]
    mux.deliver(answer(inboxes[10] + tail, b"x"))
    assert [len(waiter.items) for waiter in waiters] == [0] * 10 + [1, 0]
    assert mux.late == 0


def test_a_deep_mux_tells_whose_a_late_message_was() -> None:
    mux, shown = DeepMux("_INBOX.abc.nsy1"), list[Any]()
    mux.on_late = lambda whose, items: shown.append((whose, items))
    mux.deliver(answer(b"_INBOX.abc.nsy1.77.d.5", b"x"))
    assert shown == [(b"77", [(None, None, b"x")])]


def test_a_waiter_may_unregister_itself_or_another_while_being_told(mux: Mux) -> None:
    tokens: list[bytes] = []

    class Leaving(Waiter):
        def connection_closed(self, reason: Exception) -> None:
            super().connection_closed(reason)
            for token in tokens:
                mux.unregister(token)

    waiters = [Leaving(), Leaving()]
    tokens += [enter(mux, waiter)[0] for waiter in waiters]
    mux.connection_closed(RuntimeError("closed"))
    assert len(mux) == 0
    assert waiters[0].told


def test_threads_that_register_at_once_get_tokens_of_their_own(mux: Mux) -> None:
    tokens: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: tokens.extend(enter(mux, Waiter())[0] for _ in range(500))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(set(tokens)) == len(mux) == 4000


# -- LinkLoss --------------------------------------------------------------------------------------------------------


def test_a_frame_that_was_handed_over_is_lost_with_the_link() -> None:
    frame, waiting, later = b"frame", b"waiting", b"later"
    loss = LinkLoss(OSError(), 100, 60, 20, frozenset([id(waiting)]))
    assert loss.took(frame, 50)
    assert loss.took(frame, 100)
    assert not loss.took(waiting, 100)  # it goes out on the next link
    assert not loss.took(later, 101)  # it was put after the loss
