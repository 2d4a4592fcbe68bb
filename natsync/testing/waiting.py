"""Waiting for a condition that another thread or process makes true, bounded in time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Seconds between two looks: the first is short, so that a quick change costs little; each is longer up to
#: the last.
FIRST_PAUSE = 0.001
LAST_PAUSE = 0.05


def eventually(predicate: Callable[[], T], timeout: float = 5.0, message: str | None = None) -> T:
    """Call predicate until its value is true, and return that value.

    Blocks up to timeout seconds; predicate is called at least once, and once more when the time is up. An
    exception that it raises is not caught.

    Raises:
        AssertionError: the time is up; the text is message and the last value.
    """
    __tracebackhide__ = True  # pytest then shows the line that waited
    deadline = time.monotonic() + timeout
    pause = FIRST_PAUSE
    while True:
        remaining = deadline - time.monotonic()
        value = predicate()
        if value:
            return value
        if remaining <= 0:
            text = message or "the condition did not become true"
            raise AssertionError(f"{text} (waited {timeout:g} s, last value {value!r})")
        time.sleep(min(pause, remaining))
        pause = min(pause * 1.5, LAST_PAUSE)
