"""Small helpers that several test modules share."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType

import pytest

#: For tests of what holds in one mode only, in modules whose fixtures have streams in both.
framed_only = pytest.mark.parametrize("mode", ["framed"])
plain_only = pytest.mark.parametrize("mode", ["plain"])

ROOT = Path(__file__).resolve().parent.parent


def shown(value: object) -> str:
    """A parameter in the name of its test, which must be the same in every process: its repr without an address."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def natsync_threads() -> set[threading.Thread]:
    """The live threads that natsync started, known by their names."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("natsync")}


def thread_frames() -> dict[int, FrameType]:
    """What each thread is doing, by thread id.

    Garbage is not collected meanwhile: in there, that stops Python 3.11 and older for ever.
    """
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        gc.enable()


#: Where threads wait between two tries: of a request, of a stream.
_BETWEEN_TRIES = {("natsync.retry", "sleep"), ("natsync.streaming.stream", "_wait_for_try")}


def between_two_tries() -> bool:
    """Whether a thread is in the wait of a retry."""
    for thread in thread_frames().values():
        frame: FrameType | None = thread
        while frame is not None:
            if (frame.f_globals.get("__name__"), frame.f_code.co_name) in _BETWEEN_TRIES:
                return True
            frame = frame.f_back
    return False


def run_python(code: str, *args: str, timeout: float = 55.0) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter with this one's sys.path; the outcome is the caller's to check."""
    bootstrap = f"import sys; sys.path[:] = {sys.path!r}\n"
    return subprocess.run(
        [sys.executable, "-c", bootstrap + code, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
