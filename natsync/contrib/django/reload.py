"""--reload: Django's autoreloader around a worker, with an end that is as orderly as without.

Django's own run_with_reloader() kills the inner process when the outer one gets a signal, and leaves no room for
draining. So the two ends are here: the outer process, which runs the inner one again when a file has changed, and the
inner one's main thread, which watches the files while the worker runs in a thread of its own. What is watched, and how,
is Django's: once a second, by the files' times.
"""

from __future__ import annotations

import _thread
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from django.utils import autoreload

from natsync.cli.signals import awaited
from natsync.contrib.django.lifeline import follow
from natsync.contrib.django.worker import FAILED, STOPPED, Worker

log = logging.getLogger("natsync.worker")

#: Seconds that handlers get to finish when a file has changed; then they are cancelled.
RELOAD_SECONDS = 1.0
#: Seconds for cancelled handlers to leave, before the process goes without them.
LEAVE_SECONDS = 3.0
#: Seconds to wait for the first look at the files, which takes a fraction of one.
WATCH_SECONDS = 10.0
#: The variable by which the inner process knows the pipe that ends with the outer one.
LIFELINE = "NATSYNC_LIFELINE"
#: What the inner process says there when it has loaded the project.
BEGUN = b"1"
#: Seconds between two looks at the files while there is no inner process to look.
LOOK_SECONDS = 1.0
#: The status by which the inner process asks to be run again (django.utils.autoreload).
CHANGED = 3


def run_with_reload(make_worker: Callable[[], Worker], serve: Callable[[Worker], int]) -> int:
    """Run serve(make_worker()), again whenever a file has changed; the exit status. For the main thread.

    Both are called in the inner process. What they raise, such as the SyntaxError of a handlers.py, is shown, and the
    next change waited for; so is the next change if the inner process ends before it comes here, as with a models.py
    that does not load.
    """
    if os.environ.get(autoreload.DJANGO_AUTORELOAD_ENV) == "true":
        if (life := os.environ.get(LIFELINE)) is not None:
            os.write(int(life), BEGUN)
            follow(int(life))
        return _Inner(make_worker, serve).run()
    return _outer()


def _outer() -> int:
    ours, life = socket.socketpair()
    ours.setblocking(False)
    environment = {**os.environ, autoreload.DJANGO_AUTORELOAD_ENV: "true", LIFELINE: str(life.fileno())}
    with ours, life, awaited(signal.SIGINT, signal.SIGTERM, signal.SIGCHLD) as next_signal:
        told = False
        while True:
            # A change while the inner process begins counts: it may have loaded what was there before.
            before = _files()
            process = subprocess.Popen(autoreload.get_child_arguments(), env=environment, pass_fds=[life.fileno()])
            while process.poll() is None:
                number = next_signal()
                if number == signal.SIGCHLD:
                    continue
                told = True
                # A terminal's Ctrl-C goes to the inner process too.
                if number != signal.SIGINT or not sys.stdin.isatty():
                    process.send_signal(number)
            if told or (_has_begun(ours) and process.returncode != CHANGED):
                return _status(process.returncode)
            if process.returncode != CHANGED:
                log.error("the project does not load (status %d): waiting for a change", process.returncode)
                while _files() == before:
                    if next_signal.wait(timeout=LOOK_SECONDS) in (signal.SIGINT, signal.SIGTERM):
                        return STOPPED


def _has_begun(ours: socket.socket) -> bool:
    try:
        return ours.recv(1) == BEGUN
    except BlockingIOError:
        return False


def _files() -> dict[Path, float]:
    """The Python files beside every module that this process has loaded, and when they were changed."""
    found = {}
    for directory in {path.parent for path in autoreload.iter_all_python_module_files()}:
        for path in directory.glob("*.py"):
            with suppress(OSError):
                found[path] = path.stat().st_mtime
    return found


def _status(returncode: int) -> int:
    if returncode == CHANGED:  # told to stop while it was leaving for a change
        return 0
    return 128 - returncode if returncode < 0 else returncode


class _Reloader(autoreload.StatReloader):
    """Django's, that tells when it knows of the files as they were loaded: what is changed later is noticed.

    Attributes:
        loaded: to be set when all is loaded.
        watching: set once it has looked at the files after that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loaded = threading.Event()
        self.watching = threading.Event()

    def snapshot_files(self) -> Iterator[Any]:
        loaded = self.loaded.is_set()
        yield from super().snapshot_files()
        if loaded:
            self.watching.set()


class _Told(BaseException):
    """A signal came: leave the reloader's loop, wherever it is."""


class _Inner:
    """The inner process: files are watched in the main thread, the worker runs in another one."""

    def __init__(self, make_worker: Callable[[], Worker], serve: Callable[[Worker], int]) -> None:
        self._make_worker = make_worker
        self._serve = serve
        self._worker: Worker | None = None
        self._status: int | None = None
        self._finished = threading.Event()
        self._told = False
        self._reloader = _Reloader()

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._signalled)
        try:
            autoreload.start_django(self._reloader, self._work)
        except _Told:
            self._reloader.watching.set()
            self._finished.wait()
        except SystemExit:  # a file has changed
            self._told = True
            self._leave()
            raise
        return FAILED if self._status is None else self._status

    def _work(self) -> None:
        try:
            self._worker = worker = self._make_worker()
            if self._told:
                worker.tell("a signal")
            self._reloader.loaded.set()
            self._reloader.watching.wait(WATCH_SECONDS)
            self._status = self._serve(worker)
        finally:
            self._finished.set()
            if self._status is not None and not self._told:  # it has ended by itself: nothing to watch for
                _thread.interrupt_main(signal.SIGTERM)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._worker is not None:
            self._worker.tell(signal.Signals(number).name)
        if not self._told:
            self._told = True
            raise _Told

    def _leave(self) -> None:
        worker = self._worker
        if worker is None:
            return
        worker.tell("a file has changed")
        if not self._finished.wait(RELOAD_SECONDS):
            worker.tell("SIGTERM")  # as a second signal would: cancel
            if not self._finished.wait(LEAVE_SECONDS):
                log.warning("handlers are still running; the process goes without them")
