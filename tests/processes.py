"""Commands as child processes whose output is read as it comes: for the tests of what users run."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import natsync
from natsync.testing import eventually

#: Seconds for a child to do what is waited for. A loaded machine needs a second for starting Python alone.
PATIENCE = 30.0

NATSYNC = (sys.executable, "-m", "natsync")


class Child:
    """A running command; .out and .err are the lines of its output so far."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((process.stdout, self.out), (process.stderr, self.err))
            if stream is not None
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: IO[bytes], lines: list[str]) -> None:
        with stream:
            for line in stream:
                lines.append(line.decode().rstrip("\n"))

    def wait_for_out(self, text: str) -> None:
        """Block until a line of standard output contains the text."""
        eventually(lambda: any(text in line for line in self.out), PATIENCE, f"no {text!r} on stdout of {self!r}")

    def wait_for_err(self, text: str) -> None:
        eventually(lambda: any(text in line for line in self.err), PATIENCE, f"no {text!r} on stderr of {self!r}")

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit status, once the command has ended and its output is complete."""
        status = self.process.wait(timeout)
        for reader in self._readers:
            reader.join(timeout)
        return status

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def __repr__(self) -> str:
        return f"{self.process.args}: status {self.process.poll()}, out {self.out}, err {self.err}"


@contextmanager
def child(
    *command: str,
    url: str | None = None,
    cwd: Path | None = None,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Child]:
    """Run a command for the length of the block; it is killed if it still runs at the end."""
    with started(command, url=url, cwd=cwd, env=env, stdin=subprocess.PIPE if stdin is not None else None) as process:
        running = Child(process)
        if stdin is not None:
            assert process.stdin is not None
            process.stdin.write(stdin)
            process.stdin.close()
        try:
            yield running
        finally:
            process.kill()
            running.wait()


@contextmanager
def started(
    command: Sequence[str],
    *,
    url: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: int | None = None,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
) -> "Iterator[subprocess.Popen[bytes]]":
    """A bare process for the length of the block, its environment without NATS settings of this machine."""
    # A run in the background of a script ignores SIGINT and would hand that down to the child.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment(url, env or {}),
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=stdout,
            stderr=stderr,
        )
    finally:
        signal.signal(signal.SIGINT, former)
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def run(
    *command: str, url: str | None = None, stdin: bytes | None = None, timeout: float = PATIENCE, **options: object
) -> Child:
    """Run a command to its end."""
    with child(*command, url=url, stdin=stdin, **options) as running:  # type: ignore[arg-type]
        running.wait(timeout)
    return running


def environment(url: str | None, more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without settings of NATS and of terminals, with the URL and more."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "NATS_SERVER_BIN" or not name.startswith(("NATS_", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"))
    }
    # The natsync of this run, wherever the child's own directory is.
    sources = [str(Path(natsync.__file__).parents[1]), kept.get("PYTHONPATH", "")]
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, sources))
    if url is not None:
        kept["NATS_URL"] = url
    return {**kept, **more}
