"""natsync.resolver: host names are looked up off the caller's thread, once for all who ask."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from natsync import resolver
from natsync.concurrency import Deadline, Signal
from natsync.resolver import Lookup, look_up
from natsync.testing import eventually
from support import natsync_threads

#: Seconds that an answer may take on a busy machine.
SOON = 10.0
FOUND = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 1))]


class SlowResolver:
    """Stands in for socket.getaddrinfo and answers when it is told to."""

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.asked: list[str] = []

    def __call__(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(host)
        assert self.answer.wait(SOON * 3)
        return FOUND


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowResolver]:
    slow = SlowResolver()
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    yield slow
    slow.answer.set()


def resolver_threads() -> list[threading.Thread]:
    return [thread for thread in natsync_threads() if thread.name == "natsync-resolver"]


def wait_for(lookup: Lookup) -> bool:
    signal = Signal()
    lookup.await_by(signal)
    return signal.wait(Deadline.after(SOON))


def test_a_name_is_looked_up() -> None:
    lookup = look_up("localhost", 4222)
    assert wait_for(lookup)
    assert lookup.done
    assert lookup.error == ""
    assert {address[4][1] for address in lookup.addresses} == {4222}


@pytest.mark.parametrize("error", [socket.gaierror(-2, "Name or service not known"), OSError(5, "not known")])
def test_what_the_system_says_is_told(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    lookup = look_up("nobody.example", 1)
    assert wait_for(lookup)
    assert "not known" in lookup.error
    assert lookup.addresses == []


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..b"])
def test_a_name_that_cannot_be_is_told(host: str) -> None:
    lookup = look_up(host, 1)
    assert wait_for(lookup)
    assert lookup.error


def test_asking_does_not_wait(slow: SlowResolver) -> None:
    assert not look_up("slow.example", 1).done


def test_all_who_ask_for_a_name_share_one_thread(slow: SlowResolver) -> None:
    lookups = {look_up("slow.example", 1) for _ in range(50)}
    assert len(lookups) == 1
    assert len(resolver_threads()) == 1
    signals = [Signal() for _ in range(3)]
    for signal in signals:
        lookups.copy().pop().await_by(signal)
    slow.answer.set()
    assert all(signal.wait(Deadline.after(SOON)) for signal in signals)
    assert slow.asked == ["slow.example"]


def test_another_name_or_port_is_asked_for_by_itself(slow: SlowResolver) -> None:
    lookups = {look_up("slow.example", 1), look_up("slow.example", 2), look_up("other.example", 1)}
    assert len(lookups) == 3


def test_an_answer_is_not_kept(slow: SlowResolver) -> None:
    slow.answer.set()
    for _ in range(2):
        assert wait_for(look_up("quick.example", 1))
    assert slow.asked == ["quick.example"] * 2


def test_who_gives_up_is_forgotten(slow: SlowResolver) -> None:
    lookup, signal = look_up("slow.example", 1), Signal()
    lookup.await_by(signal)
    lookup.forget(signal)
    slow.answer.set()
    eventually(lambda: lookup.done)
    assert not signal.wait(Deadline.after(0))


def test_the_thread_is_a_daemon_that_ends_with_the_answer(slow: SlowResolver) -> None:
    lookup = look_up("slow.example", 1)
    (thread,) = resolver_threads()
    assert thread.daemon
    slow.answer.set()
    eventually(lambda: lookup.done)
    eventually(lambda: resolver_threads() == [])


def test_a_thread_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(resolver, "spawn", spawn)
    lookup = look_up("any.example", 1)
    assert wait_for(lookup)
    assert "can't start new thread" in lookup.error
    monkeypatch.undo()
    assert look_up("localhost", 1) is not lookup


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_the_parents_question(slow: SlowResolver) -> None:
    look_up("slow.example", 1)
    child = os.fork()
    if child == 0:  # not by the parent's event, whose lock its thread may hold just now
        socket.getaddrinfo = lambda *args, **options: FOUND  # type: ignore[assignment]
        os._exit(0 if wait_for(look_up("slow.example", 1)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
