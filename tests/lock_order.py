"""Records in which order natsync's threads take its locks, and what they do while they hold one.

Switched on by `pytest --lock-order`. Locks that natsync's own files make are then replaced by ones that keep book;
everybody else's stay what they are. Two locks made at one place of the source count as one: what is looked at is the
graph "held → taken" between places. Three things are faults: a cycle in that graph, for two threads may then wait for
each other; a pair against the order that docs/threads.md states ("Locks"), or one that it does not state; and
a lock held over what may block: I/O, joining, sleeping, waiting, a user's callback, logging.

A lock that one thread takes and another gives back is no mutual exclusion but a signal (concurrency.Signal): to take
it is to wait. Attempts that do not block count as holding but not as taking.
"""

from __future__ import annotations

import functools
import linecache
import logging
import re
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import natsync

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = str(Path(natsync.__file__).resolve().parent) + "/"
#: Where the order is written, in its section "Locks".
PAGE = ROOT / "docs" / "threads.md"
TESTS = str(ROOT / "tests") + "/"
#: Parts of the package that are tools beside the library.
TOOLS = (PACKAGE + "testing/", PACKAGE + "cli/")
#: Frames kept of each stack.
DEPTH = 14
#: Where the interest of a stack ends.
RUNNERS = ("/_pytest/", "/pluggy/")
#: Locks that are signals: taken to wait, given back by another thread.
SIGNALS = {"Signal._lock", "concurrency.turn"}
#: Locks that are held over a wait on purpose: they admit one waiter at a time, and nobody else wants them.
TURNSTILES = {"Call._taking", "Replies._taking", "Stream._turn"}
#: Modules that interrupt natsync everywhere, thousands of times. They are left out: a lock of C is taken and entered in
#: one step, which an interrupt cannot divide; one of Python's may stay taken.
INTERRUPTED = {"test_interrupts"}
#: Tests that take natsync's locks themselves, to play a thread that is not there in a forked child.
TAKERS = {"test_in_a_child_a_handle_waits_for_no_lock_that_the_parent_held"}
#: Tests of what the recorder replaces: a socket's send() is one call into C.
REPLACED = {"test_a_socket_is_written_to_without_waiting"}
#: The names that the documented order uses for classes that are called otherwise.
DOCUMENTED = {
    "SenderCore": "Sender", "SubscriptionCore": "Subscription", "_Timers": "timers",
}  # fmt: skip

#: Under which name a worker of pytest-xdist sends its book.
BOOK = "natsync lock order"

Stack = tuple[tuple[str, int, str], ...]
_make_lock, _make_rlock = threading.Lock, threading.RLock
_START = threading.Thread.start.__code__


@dataclass(frozen=True)
class Nesting:
    """One lock taken under another, the first time that it was seen."""

    held: str
    taken: str
    thread: str
    held_at: Stack
    taken_at: Stack

    def __str__(self) -> str:
        return (
            f"{self.held} → {self.taken} in {self.thread}\n"
            f"  {self.held} was taken at\n{_shown(self.held_at)}\n  {self.taken} was taken at\n{_shown(self.taken_at)}"
        )


@dataclass(frozen=True)
class HeldOver:
    """A lock that was held over something that may block."""

    held: str
    what: str
    held_at: Stack
    at: Stack

    def __str__(self) -> str:
        return f"{self.held} is held over {self.what}; taken at\n{_shown(self.held_at)}\n  then\n{_shown(self.at)}"


class Recorder:
    """The book: what each thread holds now, and every pair and every blocking call under a lock seen so far."""

    def __init__(self) -> None:
        self.nestings: dict[tuple[str, str], Nesting] = {}
        self.held_over: dict[tuple[str, str], HeldOver] = {}
        self.locks: set[str] = set()
        self._local = threading.local()

    # -- what the locks tell -------------------------------------------------------------------------------------

    def holding(self) -> list[tuple[_Lock, Stack]]:
        """What the calling thread holds, in the order in which it took it."""
        held: list[tuple[_Lock, Stack]] | None = getattr(self._local, "held", None)
        if held is None:
            held = self._local.held = []
        return held

    def wants(self, lock: _Lock) -> None:
        """The calling thread is going to take a lock, and to wait for it if need be."""
        for held, at in self.holding():
            pair = (held.name, lock.name)
            if pair not in self.nestings:
                self.nestings[pair] = Nesting(*pair, threading.current_thread().name, at, _stack())

    def has(self, lock: _Lock) -> None:
        self.holding().append((lock, _stack()))

    def gives(self, lock: _Lock) -> None:
        held = self.holding()
        for index in range(len(held) - 1, -1, -1):
            if held[index][0] is lock:
                del held[index]
                return

    def blocks(self, what: str, allowed: object = None) -> None:
        """The calling thread is going to do what may block. `allowed` is given back while it lasts."""
        for held, at in self.holding():
            new = held is not allowed and held.name not in TURNSTILES and (held.name, what) not in self.held_over
            if new and _natsync_blocks(sys._getframe(1)):
                self.held_over[held.name, what] = HeldOver(held.name, what, at, _stack())

    # -- what comes of it ----------------------------------------------------------------------------------------

    def cycles(self) -> list[tuple[str, ...]]:
        """Every set of locks that can be waited for in a circle: the graph's strongly connected parts."""
        reach = {name: self._below(name) for name in self.locks}
        parts = {
            tuple(sorted(other for other in reach[name] if name in reach[other]))
            for name in reach
            if name in reach[name]
        }
        return sorted(parts)

    def _below(self, name: str) -> set[str]:
        found: set[str] = set()
        waiting = [name]
        while waiting:
            one = waiting.pop()
            for held, taken in self.nestings:
                if held == one and taken not in found:
                    found.add(taken)
                    waiting.append(taken)
        return found

    def against(self, order: list[set[str]]) -> list[Nesting]:
        """The pairs that the order does not allow: each lock may be taken under those of earlier places only."""
        place = {name: index for index, names in enumerate(order) for name in names}
        wrong = []
        for pair in self.nestings.values():
            first, second = (place.get(documented(name)) for name in (pair.held, pair.taken))
            if pair.held not in TURNSTILES and (first is None or second is None or first >= second):
                wrong.append(pair)
        return sorted(wrong, key=lambda pair: (pair.held, pair.taken))

    def faults(self, order: list[set[str]]) -> list[str]:
        """All that is wrong, in words."""
        told = []
        for cycle in self.cycles():
            pairs = [pair for key, pair in sorted(self.nestings.items()) if set(key) <= set(cycle)]
            told.append(f"a cycle of locks: {', '.join(cycle)}\n" + "\n".join(map(str, pairs)))
        told += [f"not in the documented order: {pair}" for pair in self.against(order)]
        told += [str(one) for _, one in sorted(self.held_over.items())]
        return told


class _Lock:
    """A threading.Lock that keeps book."""

    __slots__ = ("__weakref__", "_lock", "_recorder", "name")

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._lock = _make_lock()
        self._recorder = recorder
        self.name = name
        recorder.locks.add(name)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if blocking and timeout != 0:
            self._recorder.wants(self)
        taken = self._lock.acquire(blocking, timeout)
        if taken:
            self._recorder.has(self)
        return taken

    def release(self) -> None:
        self._recorder.gives(self)
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def _at_fork_reinit(self) -> None:
        self._lock = _make_lock()


class _RLock(_Lock):
    """The same for a threading.RLock: whoever holds it does not wait to take it once more."""

    __slots__ = ("_depth", "_owner")

    def __init__(self, recorder: Recorder, name: str) -> None:
        super().__init__(recorder, name)
        self._owner: int | None = None
        self._depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = threading.get_ident()
        if self._owner != me:
            if not super().acquire(blocking, timeout):
                return False
            self._owner = me
        self._depth += 1
        return True

    def release(self) -> None:
        if self._owner != threading.get_ident():
            raise RuntimeError("cannot release un-acquired lock")
        self._depth -= 1
        if not self._depth:
            self._owner = None
            super().release()


class _SignalLock:
    """A lock that is a signal: to take it is to wait."""

    __slots__ = ("_lock", "_recorder")

    def __init__(self, recorder: Recorder) -> None:
        self._lock = _make_lock()
        self._recorder = recorder

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if blocking and timeout != 0:
            self._recorder.blocks("waiting for a signal")
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        self._lock.release()


class _Maker:
    """Stands for threading.Lock or RLock. No function, for a class may have it for an attribute and not a method."""

    def __init__(self, recorder: Recorder, plain: Callable[[], Any], kept: type[_Lock]) -> None:
        self._recorder, self._plain, self._kept = recorder, plain, kept

    def __call__(self) -> Any:
        frame = sys._getframe(1)
        if not _is_ours(frame):
            return self._plain()
        name = _name(frame)
        signal = self._kept is _Lock and name in SIGNALS
        return _SignalLock(self._recorder) if signal else self._kept(self._recorder, name)


def documented(name: str) -> str:
    """What the documented order calls the class of a lock."""
    owner = name.partition(".")[0]
    return DOCUMENTED.get(owner, owner.lstrip("_"))


def documented_order(page: Path = PAGE) -> list[set[str]]:
    """The order as the page draws it: places from the outside in, each with the names that share it."""
    section = page.read_text(encoding="utf-8").partition("## Locks")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("    ")]
    drawn = " ".join(line.strip() for line in lines)
    assert "→" in drawn, f"{page} draws no lock order"
    return [set(map(str.strip, place.split(","))) for place in drawn.split("→")]


# -- putting it in place -----------------------------------------------------------------------------------------------


def _stack() -> Stack:
    """The calling frames outside this file, innermost first; kept as places, because most are never shown."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    places = []
    while frame is not None and len(places) < DEPTH and not any(tool in frame.f_code.co_filename for tool in RUNNERS):
        places.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(places)


def _natsync_blocks(frame: FrameType | None) -> bool:
    """Whether what is called here is called by natsync, not by what a test put in its place.

    That Thread.start() waits until the thread runs is no fault: the new thread needs no lock for it.
    """
    while frame is not None and frame.f_code is not _START:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            return True
        if file.startswith(TESTS) and file != __file__:
            return False
        frame = frame.f_back
    return False


def _shown(stack: Stack) -> str:
    lines = []
    for file, line, function in stack:
        where = file.removeprefix(f"{ROOT}/")
        lines.append(f"      {where}:{line} {function}: {linecache.getline(file, line).strip()}")
    return "\n".join(lines)


def _is_ours(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith(PACKAGE) and not file.startswith(TOOLS)


def _name(frame: FrameType) -> str:
    """Class and attribute of a lock that is being made in this frame; module and name, if it is no object's."""
    owner, attribute = _assigned(frame.f_code.co_filename, frame.f_lineno)
    if owner not in frame.f_locals:
        return f"{owner}.{attribute}"
    made_for = frame.f_locals[owner]
    kinds = [kind for kind in type(made_for).__mro__ if _defines(kind, frame)]
    return f"{(kinds or [type(made_for)])[0].__name__}.{attribute}"


@functools.cache
def _assigned(file: str, number: int) -> tuple[str, str]:
    """What a line of source assigns to: (variable, attribute), or (module, variable)."""
    made = re.match(r"\s*(?:(\w+)\.)?(\w+)\b.*=", linecache.getline(file, number))
    if made is None:
        return Path(file).stem, f"line {number}"
    return made[1] or Path(file).stem, made[2]


def _defines(kind: type, frame: FrameType) -> bool:
    """Whether it is this class's method that runs in the frame."""
    method = vars(kind).get(frame.f_code.co_name)
    return getattr(method, "__code__", None) is frame.f_code


def instrument(recorder: Recorder, patch: pytest.MonkeyPatch) -> None:
    """Have all locks that natsync makes from now on, and all that may block, tell the recorder."""

    patch.setattr(threading, "Lock", _Maker(recorder, _make_lock, _Lock))
    patch.setattr(threading, "RLock", _Maker(recorder, _make_rlock, _RLock))
    for kind, name in (
        (socket.socket, "recv"), (socket.socket, "sendall"), (socket.socket, "send"), (socket.socket, "connect"),
        (threading.Thread, "join"),
    ):  # fmt: skip
        patch.setattr(kind, name, _telling(recorder, getattr(kind, name), f"{kind.__name__}.{name}()"))
    for module, name in ((time, "sleep"), (socket, "getaddrinfo"), (socket, "create_connection")):
        patch.setattr(module, name, _telling(recorder, getattr(module, name), f"{name}()"))
    for kind in (threading.Event, threading.Condition):
        patch.setattr(kind, "wait", _telling_wait(recorder, kind.wait))
    patch.setattr(natsync.Context, "on_cancel", _wrapping(recorder, natsync.Context.on_cancel, "an on_cancel callback"))
    patch.setattr(logging.Logger, "handle", _telling(recorder, logging.Logger.handle, "logging"))
    subscription = natsync.subscription.SubscriptionCore
    patch.setattr(subscription, "_run", _telling(recorder, subscription._run, "a subscription's callback"))
    handlers = natsync.streaming.handlers
    patch.setattr(handlers, "_callback", _telling(recorder, handlers._callback, "a stream's handler"))


def _telling(recorder: Recorder, function: Callable[..., Any], what: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def telling(*args: Any, **kwargs: Any) -> Any:
        recorder.blocks(what)
        return function(*args, **kwargs)

    return telling


def _telling_wait(recorder: Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
    """wait() of an Event or a Condition, which gives its own lock back meanwhile."""

    @functools.wraps(function)
    def wait(self: Any, timeout: float | None = None) -> Any:
        if sys._getframe(1).f_code.co_filename != threading.__file__:  # an Event's Condition: the Event has told
            recorder.blocks(f"{function.__qualname__}()", allowed=getattr(self, "_lock", None))
        return function(self, timeout)

    return wait


def _wrapping(recorder: Recorder, method: Callable[..., Any], what: str) -> Callable[..., Any]:
    """The same method with the callback that it is given wrapped."""

    @functools.wraps(method)
    def wrapping(self: Any, callback: Callable[..., Any]) -> Any:
        return method(self, _telling(recorder, callback, what))

    return wrapping


@contextmanager
def recording() -> Iterator[Recorder]:
    """Instrumented locks for the length of a block; what was made before it keeps its plain ones."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        instrument(recorder, patch)
        yield recorder


class Plugin:
    """The run under --lock-order: locks are instrumented from here on, faults fail the run at its end.

    With pytest-xdist each worker keeps a book of its own, looks for faults in it, and sends it to the run's end: pairs
    against the documented order are found in any one book, and a cycle that no such pair is part of cannot be.
    """

    def __init__(self) -> None:
        self.recorder = Recorder()
        self._faults: list[str] = []
        self._pairs: set[tuple[str, str]] = set()
        instrument(self.recorder, pytest.MonkeyPatch())
        natsync.concurrency._forked()  # makes the locks of modules anew, which were made before

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left_out = [item for item in items if item.path.stem in INTERRUPTED or item.name in TAKERS | REPLACED]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._faults += self.recorder.faults(documented_order())
        self._pairs |= self.recorder.nestings.keys()
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput[BOOK] = (
                list(self._faults), [list(pair) for pair in self._pairs], list(self.recorder.locks)
            )  # fmt: skip
        if self._faults and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of pytest-xdist has ended; before this process' own session does."""
        faults, pairs, locks = node.workeroutput[BOOK]
        self._faults += [fault for fault in faults if fault not in self._faults]
        self._pairs |= {(held, taken) for held, taken in pairs}
        self.recorder.locks |= set(locks)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("lock order")
        groups = defaultdict[str, list[str]](list)
        for held, taken in sorted(self._pairs):
            groups[held].append(taken)
        for held, taken in groups.items():
            terminalreporter.line(f"{held} → {', '.join(taken)}")
        for fault in self._faults:
            terminalreporter.line("")
            terminalreporter.line(fault, red=True)
        terminalreporter.line(f"{len(self.recorder.locks)} locks, {len(self._pairs)} pairs, {len(self._faults)} faults")
