"""--workers: several worker processes, started, watched, replaced and stopped together.

The parent has loaded the project and has no connection; each worker is a fork of it, in a process group of its own, so
that a Ctrl-C reaches it once: by the parent. A worker that is killed is replaced; one that ends by itself ends all.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess

from django.db import connections

from natsync.cli.gauges import forget_gauges
from natsync.cli.signals import awaited
from natsync.contrib.django.lifeline import follow
from natsync.contrib.django.worker import FAILED, STOPPED

log = logging.getLogger("natsync.worker")

#: Seconds that a worker gets beyond the shutdown timeout, before it is killed.
GRACE = 5.0
#: Seconds that a worker must have lived to be replaced when it is killed; sooner, something kills them all.
LEAST_LIFE = 1.0
STOPPING = (signal.SIGINT, signal.SIGTERM)

_clear = atexit._clear


def _nothing() -> None:
    pass


class Processes:
    """Keeps `count` processes that run serve() alive until SIGINT or SIGTERM. For the main thread.

    serve() returns the exit status of its process, and takes SIGTERM itself.
    """

    def __init__(self, serve: Callable[[], int], count: int, shutdown_timeout: float) -> None:
        self._serve = serve
        self._count = count
        self._patience = shutdown_timeout + GRACE
        self._alive: dict[ForkProcess, float] = {}  # and when each was started
        self._stopping = False
        self._status = STOPPED

    def run(self) -> int:
        """Until all have ended; the exit status: that of the worst."""
        connections.close_all()  # a connection must not be shared with a fork
        self._life, life = os.pipe()
        with awaited(signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM) as next_signal:
            try:
                self._parents_end = life
                for _ in range(self._count):
                    self._start()
                while self._alive:
                    self._take(next_signal())
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                for process in self._alive:
                    process.kill()
                    process.join()
                os.close(self._life)
                os.close(life)
        return self._status

    def _take(self, number: signal.Signals) -> None:
        if number == signal.SIGCHLD:
            self._reap()
        elif number == signal.SIGALRM:
            self._kill()
        else:
            self._stop(again=self._stopping)

    def _start(self) -> None:
        process = multiprocessing.get_context("fork").Process(target=self._child, name="natsync-worker")
        former = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # until the child has handlers of its own
        # From Python 3.13 on, multiprocessing has its children forget what was registered when the project was loaded.
        atexit._clear = _nothing
        try:
            process.start()
        finally:
            atexit._clear = _clear
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        self._alive[process] = time.monotonic()
        log.info("worker %s started", process.pid)

    def _child(self) -> None:
        atexit._clear = _clear
        os.setpgid(0, 0)
        os.close(self._parents_end)
        signal.set_wakeup_fd(-1)
        for number in (*STOPPING, signal.SIGCHLD, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        follow(self._life)
        try:
            status = self._serve()
        finally:
            # multiprocessing leaves by os._exit(): what a project's libraries want to send at the end would be lost.
            atexit._run_exitfuncs()
        sys.exit(status)

    def _stop(self, *, again: bool = False) -> None:
        """Have all drain; again: have those cancel that were told before."""
        if again or not self._stopping:
            for process in self._alive:
                process.terminate()
        if not self._stopping:
            signal.setitimer(signal.ITIMER_REAL, self._patience)
        self._stopping = True

    def _kill(self) -> None:
        for process in self._alive:
            log.error("worker %s did not stop in %g s and is killed", process.pid, self._patience)
            self._status = FAILED
            process.kill()

    def _reap(self) -> None:
        for process in [one for one in self._alive if not one.is_alive()]:
            lived = time.monotonic() - self._alive.pop(process)
            status = process.exitcode or 0
            forget_gauges(process.pid)
            if self._stopping:
                # SIGTERM ends one that had not begun.
                self._note(STOPPED if status == -signal.SIGTERM else FAILED if status < 0 else status)
            elif status < 0 and lived >= LEAST_LIFE:
                log.error("worker %s was killed by signal %d: starting another", process.pid, -status)
                self._start()
            else:
                log.error("worker %s ended by itself, with status %d: stopping all", process.pid, status)
                self._note(FAILED)
                self._stop()
            process.close()

    def _note(self, status: int) -> None:
        """A failure counts more than work that was cut short."""
        self._status = FAILED if FAILED in (self._status, status) else max(self._status, status)
