"""Real WSGI servers as child processes, each on a free port of the loopback interface."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from natsync.testing import eventually
from processes import PATIENCE, Child, child

#: What each is started with, behind the interpreter and in front of the application; threads for streams at once.
SERVERS = {
    "werkzeug": ["-m", "flask", "--app"],
    "runserver": ["-u"],  # Django's: the application is its manage.py
    "sync": ["-m", "gunicorn", "--worker-class", "sync"],
    "gthread": ["-m", "gunicorn", "--worker-class", "gthread", "--threads", "16"],
    "gevent": ["-m", "gunicorn", "--worker-class", "gevent"],
    "gunicorn": ["-m", "gunicorn"],  # as a configuration file says
    "waitress": ["-m", "waitress", "--listen", "127.0.0.1:0", "--threads", "16"],
    "waitress-lookahead": ["-m", "waitress", "--listen", "127.0.0.1:0", "--threads", "16",
                           "--channel-request-lookahead", "1"],
    "uwsgi": ["-c", "import pyuwsgi; pyuwsgi.run()", "--http-socket", "127.0.0.1:0", "--master", "--enable-threads",
              "--threads", "16", "--die-on-term", "--need-app", "--disable-logging"],
}  # fmt: skip


@dataclass
class Web:
    """A running server."""

    url: str
    running: Child


@contextmanager
def serving(
    kind: str,
    app: str,
    *arguments: str,
    url: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    quiet: bool = True,
) -> Iterator[Web]:
    """A server of this kind with the application `module:name`, for runserver manage.py, until the end of the block.

    It is ended by SIGTERM (Ctrl-C where that is its way), and gunicorn has to leave with status 0; with quiet, a
    traceback in its log is a failure.
    """
    command = [sys.executable, *SERVERS[kind]]
    if kind == "werkzeug":
        command += [*arguments, app, "run", "--port", "0", "--no-reload"]
    elif kind == "runserver":
        command += [app, "runserver", "127.0.0.1:0", "--noreload", *arguments]
    elif "gunicorn" in command:
        command += ["--bind", "127.0.0.1:0", "--graceful-timeout", "5", *arguments, app]
    else:
        command += [*arguments, *(["--module"] if kind == "uwsgi" else []), app]
    with (
        tempfile.TemporaryDirectory() as scratch,
        child(*command, url=url, cwd=cwd, env={"XDG_RUNTIME_DIR": scratch, **(env or {})}) as running,
    ):
        found: list[str] = []

        def listens() -> bool:
            if kind in ("runserver", "uwsgi"):  # the first says port 0 when it is told port 0, the other no URL
                found[:] = listening(running.process.pid)
            else:
                found[:] = re.findall(r"http://127\.0\.0\.1:[1-9]\d*", "\n".join([*running.err, *running.out]))
            return bool(found) or running.process.poll() is not None

        eventually(listens, PATIENCE, f"{kind} does not listen: {running!r}")
        assert found, running
        yield Web(found[0], running)
        running.send(signal.SIGTERM if "gunicorn" in command else signal.SIGINT)
        status = running.wait()
        # A test may have sent it one already: a second SIGTERM may find it without its handlers, about to leave.
        assert status in (0, -signal.SIGTERM) or "gunicorn" not in command, running
    if quiet:
        assert not re.search(r"Traceback|ResourceWarning|SIGABRT|WORKER TIMEOUT", "\n".join(running.err)), running


def listening(pid: int) -> list[str]:
    """The URLs where the process listens on the loopback interface, by the kernel's table."""
    inodes = set()
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                inodes.update(re.findall(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{name}")))
            except FileNotFoundError:
                continue
        with open(f"/proc/{pid}/net/tcp") as table:
            rows = [line.split() for line in list(table)[1:]]
    except OSError:
        return []  # it has ended
    return [f"http://127.0.0.1:{int(row[1].split(':')[1], 16)}" for row in rows if row[3] == "0A" and row[9] in inodes]
