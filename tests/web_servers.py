"""Real WSGI servers as child processes, each on a free port of the loopback interface."""

from __future__ import annotations

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
    "sync": ["-m", "gunicorn", "--worker-class", "sync"],
    "gthread": ["-m", "gunicorn", "--worker-class", "gthread", "--threads", "16"],
    "gevent": ["-m", "gunicorn", "--worker-class", "gevent"],
    "gunicorn": ["-m", "gunicorn"],  # as a configuration file says
    "waitress": ["-m", "waitress", "--listen", "127.0.0.1:0", "--threads", "16"],
    "waitress-lookahead": ["-m", "waitress", "--listen", "127.0.0.1:0", "--threads", "16",
                           "--channel-request-lookahead", "1"],
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
    """A server of this kind with the application `module:name`, until the end of the block.

    It is ended by SIGTERM (Ctrl-C where that is its way) and has to leave with status 0; with quiet, a traceback in its
    log is a failure.
    """
    command = [sys.executable, *SERVERS[kind], *arguments]
    if kind == "werkzeug":
        command += [app, "run", "--port", "0", "--no-reload"]
    elif "gunicorn" in command:
        command += ["--bind", "127.0.0.1:0", "--graceful-timeout", "5", app]
    else:
        command.append(app)
    with (
        tempfile.TemporaryDirectory() as scratch,
        child(*command, url=url, cwd=cwd, env={"XDG_RUNTIME_DIR": scratch, **(env or {})}) as running,
    ):
        found: list[str] = []

        def listens() -> bool:
            found[:] = re.findall(r"http://127\.0\.0\.1:[1-9]\d*", "\n".join([*running.err, *running.out]))
            return bool(found) or running.process.poll() is not None

        eventually(listens, PATIENCE, f"{kind} does not listen: {running!r}")
        assert found, running
        yield Web(found[0], running)
        running.send(signal.SIGTERM if "gunicorn" in command else signal.SIGINT)
        running.wait()
    if quiet:
        assert not re.search(r"Traceback|ResourceWarning|SIGABRT|WORKER TIMEOUT", "\n".join(running.err)), running
