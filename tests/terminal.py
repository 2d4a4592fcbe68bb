"""Commands in a pseudo-terminal, with the screen as a person would see it, and screens kept as text.

NATSYNC_WRITE_SNAPSHOTS=1 has the snapshots in tests/snapshots/ written anew instead of compared; look at the difference
before it is committed.
"""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pyte

from natsync.testing import eventually
from processes import PATIENCE, environment

SNAPSHOTS = Path(__file__).parent / "snapshots"
WRITE = "NATSYNC_WRITE_SNAPSHOTS"
CTRL_C = "\x03"

#: Makes the terminal on standard input the controlling one, so that a Ctrl-C typed there is a SIGINT; then the command.
_LEADER = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A running command and its screen."""

    def __init__(self, process: "subprocess.Popen[bytes]", master: int, columns: int, lines: int) -> None:
        self.process = process
        self._master = master
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # EIO: the last process has left the terminal
            while data := os.read(self._master, 65536):
                with self._lock:
                    self._stream.feed(data)

    @property
    def screen(self) -> str:
        """What is on the screen, without the blanks at the ends of lines and of the screen."""
        with self._lock:
            lines = [line.rstrip() for line in self._screen.display]
        return "\n".join(lines).rstrip("\n") + "\n"

    def wait_for(self, pattern: str) -> str:
        """Block until the regular expression is on the screen; what is then."""

        def found() -> str:
            screen = self.screen
            return screen if re.search(pattern, screen) else ""

        try:
            return eventually(found, PATIENCE)
        except AssertionError:
            raise AssertionError(f"no {pattern!r} on the screen:\n{self.screen}") from None

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit status, once the command has ended and its last output is on the screen."""
        status = self.process.wait(timeout)
        self._reader.join(PATIENCE)
        return status


@contextmanager
def terminal(
    *command: str,
    url: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    columns: int = 100,
    lines: int = 40,
) -> Iterator[Terminal]:
    """Run a command in a terminal of its own for the length of the block; then it is killed, if it still runs."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    variables = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "PS1": "$ ", **(env or {})}
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child would inherit that it is ignored
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _LEADER, *command],
            cwd=cwd,
            env=environment(url, variables),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, former)
        os.close(slave)
    running = Terminal(process, master, columns, lines)
    try:
        yield running
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)
        running._reader.join(PATIENCE)
        os.close(master)


def shell(text: str, **options: Any) -> AbstractContextManager[Terminal]:
    """A line of shell in a terminal, in which `natsync` is this tree's command."""
    return terminal("sh", "-c", f'natsync() {{ {sys.executable} -m natsync "$@"; }}; {text}', **options)


def check_snapshot(name: str, text: str, masks: Sequence[tuple[str, str]] = ()) -> None:
    """Compare a screen with the one that is kept, after each (pattern, replacement) was applied to it."""
    for pattern, replacement in (*masks, (r"127\.0\.0\.1:\d+", "127.0.0.1:PORT")):
        text = re.sub(pattern, replacement, text)
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get(WRITE):
        SNAPSHOTS.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    assert text == path.read_text("utf-8"), f"the screen is not that of {path.name}; {WRITE}=1 writes it anew"
