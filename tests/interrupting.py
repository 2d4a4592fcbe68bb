"""Interrupts, or another thread's turn, at every moment of a call that Python allows for, one after the other.

A storm of signals, or of threads, only samples them.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """As a KeyboardInterrupt of a signal handler, but no other one."""


def moments(call: Callable[[], object], *functions: Callable[..., Any], anywhere: bool = False) -> Iterator[int]:
    """Make the call again and again, each time interrupted at the next moment of these functions; yields after each.

    The moments are those at which CPython runs signal handlers: where a function begins, and behind each call that
    returns. With anywhere, those before every single instruction. Ends when a call came to its end.
    """
    codes = {function.__code__ for function in functions}
    moment = 0
    while True:
        try:
            if not _stopped(call, codes, moment, anywhere, _interrupt):
                return
        except Interrupted:
            pass
        yield moment
        moment += 1


def turns(
    call: Callable[[], object], turn: Callable[[], object], *functions: Callable[..., Any], anywhere: bool = True
) -> Iterator[int]:
    """The same, but the call is not ended there: turn() is called, and then it goes on."""
    codes = {function.__code__ for function in functions}
    moment = 0
    while _stopped(call, codes, moment, anywhere, turn):
        yield moment
        moment += 1


def _interrupt() -> None:
    raise Interrupted


def _stopped(
    call: Callable[[], object], codes: set[Any], moment: int, anywhere: bool, stop: Callable[[], object]
) -> bool:
    """Whether the call came to that moment, where stop() was called."""
    seen = 0
    before: dict[FrameType, str] = {}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal seen
        if frame.f_code not in codes:
            return None
        frame.f_trace_opcodes = True
        if event == "exception":
            before[frame] = ""  # behind a call that raised no handler of a signal is run
        if event == "opcode":
            last, before[frame] = before.get(frame, "CALL"), dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if anywhere or last.startswith("CALL"):
                seen += 1
                if seen == moment + 1:
                    stop()
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(former)
        before.clear()  # which frames would outlive in a cycle, and with them whatever the call has dropped
    return seen > moment
