"""Worker processes of `natsync serve --workers` and `--reload`: started, watched, replaced, stopped together.

The parent imports nobody's module and has no connection; each worker is a `natsync serve` of its own. Workers are in a
process group of their own, so that a Ctrl-C reaches them once: by the parent.
"""

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

import click

from natsync.cli.gauges import forget_gauges
from natsync.cli.signals import awaited

log = logging.getLogger("natsync.serve")

#: Seconds that a worker gets beyond the shutdown timeout before it is killed.
GRACE = 5.0
#: What a worker writes once its handlers are live.
READY = b"1"


class _Worker:
    """One process, the pipe on which it says that it is ready, and whether it was told to stop."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], life: int) -> None:
        self.pipe, ready = os.pipe()
        os.set_blocking(self.pipe, False)
        self.stopping = False
        #: Whether its handlers were live at some time.
        self.was_ready = False
        #: Whether it may yet say so.
        self.starting = True
        try:
            self.process = subprocess.Popen(
                [*command, "--worker-of", f"{ready},{life}"],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=(ready, life),
                start_new_session=True,
            )
        finally:
            os.close(ready)

    def look(self) -> None:
        """See what it has said. Does not wait."""
        if self.starting:
            with suppress(BlockingIOError):
                self.was_ready = os.read(self.pipe, 1) == READY
                self.starting = False

    def stop(self) -> None:
        self.stopping = True
        self.process.terminate()

    def close(self) -> None:
        os.close(self.pipe)


class Supervisor:
    """Keeps `count` workers alive until SIGINT or SIGTERM; SIGUSR1 replaces them.

    The former workers serve until as many new ones are ready. If one of these ends before, the former ones go on.

    keep_going: whether a worker that ends before it was ready is left until the next SIGUSR1, as --reload does with a
    module that does not load; otherwise it ends everything, unless it was to replace one that serves.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        count: int,
        shutdown_timeout: float,
        *,
        keep_going: bool = False,
    ) -> None:
        self._command = command
        self._environment = environment
        self._count = count
        self._patience = shutdown_timeout + GRACE
        self._keep_going = keep_going
        self._workers: list[_Worker] = []
        self._new: list[_Worker] = []  # those of them that are to replace the others, once all are ready
        self._outdated = False  # the workers run what would not load any more
        self._failure: str | None = None
        self._signals = 0
        self._killers: list[threading.Timer] = []

    def run(self) -> None:
        """Run until told to stop; for the main thread.

        Raises:
            click.ClickException: a worker ended before it was ready, or had to be killed.
        """
        with ExitStack() as stack:
            next_signal = stack.enter_context(awaited(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD))
            # Workers read one end and see it closed when this process is gone, however it went.
            self._life, parents_end = os.pipe()
            stack.callback(os.close, self._life)
            stack.callback(os.close, parents_end)
            stack.callback(self._kill)
            self._fill()
            while self._workers or (self._keep_going and not self._signals):
                self._take(next_signal.wait(worker.pipe for worker in self._workers if worker.starting))
                self._hand_over()
        if self._failure is not None:
            raise click.ClickException(self._failure)

    def _take(self, number: signal.Signals | None) -> None:
        if number is None:
            for worker in self._workers:
                worker.look()
        elif number == signal.SIGCHLD:
            self._reap()
        elif number == signal.SIGUSR1:
            if not self._signals:
                self._reload()
        else:
            self._signals += 1
            self._end()

    def _start(self) -> _Worker:
        worker = _Worker(self._command, self._environment, self._life)
        self._workers.append(worker)
        log.info("worker %s started", worker.process.pid)
        return worker

    def _staying(self) -> list[_Worker]:
        """Those that neither were told to stop nor are to replace others."""
        return [worker for worker in self._workers if not worker.stopping and worker not in self._new]

    def _fill(self) -> None:
        """Start what is missing."""
        while len(self._staying()) < self._count:
            self._start()

    def _reload(self) -> None:
        log.info("replacing the workers")
        for worker in self._workers:
            worker.look()
        # What is still starting may have loaded what has changed since.
        self._stop(self._new + [worker for worker in self._staying() if not worker.was_ready])
        self._new = []
        if self._staying():
            self._new = [self._start() for _ in range(self._count)]
        else:
            self._outdated = False
            self._fill()

    def _hand_over(self) -> None:
        """Stop those that are replaced, once those that replace them are all ready."""
        if self._new and all(worker.was_ready for worker in self._new):
            former, self._new = self._staying(), []
            self._outdated = False
            self._stop(former)

    def _end(self) -> None:
        """Have all drain; again: those that were told before cancel what is under way."""
        self._new = []
        self._stop([worker for worker in self._workers if self._signals > 1 or not worker.stopping])

    def _stop(self, workers: list[_Worker]) -> None:
        """Have them drain, and kill those that take too long."""
        for worker in workers:
            worker.stop()
        if workers:
            killer = threading.Timer(self._patience, self._overdue, [workers])
            killer.daemon = True
            killer.start()
            self._killers.append(killer)

    def _overdue(self, workers: list[_Worker]) -> None:
        for worker in workers:
            if worker.process.poll() is None:
                self._failure = f"worker {worker.process.pid} did not stop in {self._patience:g} s and was killed"
                worker.process.kill()

    def _reap(self) -> None:
        for worker in [one for one in self._workers if one.process.poll() is not None]:
            worker.look()
            worker.close()
            self._workers.remove(worker)
            forget_gauges(worker.process.pid)
            self._ended(worker)
        if not any(worker.stopping for worker in self._workers):
            self._spare()

    def _ended(self, worker: _Worker) -> None:
        pid, status = worker.process.pid, worker.process.returncode
        if worker.stopping:
            log.info("worker %s stopped", pid)
        elif worker.was_ready:
            log.error("worker %s ended by itself (status %s): starting another", pid, status)
            if worker in self._new:
                self._new[self._new.index(worker)] = self._start()
            elif not self._new:  # else others have been started already
                self._fill()
        elif (worker in self._new or self._outdated) and (self._staying() or self._keep_going):
            then = "waiting for a change" if self._keep_going else "the others go on as they were"
            log.error("worker %s ended at its start (status %s): %s", pid, status, then)
            self._outdated = True
            new, self._new = [one for one in self._new if one is not worker], []
            self._stop(new)
        elif self._keep_going:
            log.error("worker %s ended at its start (status %s): waiting for a change", pid, status)
        else:
            self._failure = self._failure or f"a worker ended at its start, with status {status}"
            self._signals += 1
            self._end()

    def _spare(self) -> None:
        """None that was told to stop is left to be killed."""
        while self._killers:
            self._killers.pop().cancel()

    def _kill(self) -> None:
        """Nothing is left behind, whatever went wrong."""
        self._spare()
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
            worker.close()


def reload_on_change(directory: str) -> None:
    """Start a thread that sends this process SIGUSR1 whenever a Python file below the directory changes."""
    import watchfiles

    def watch() -> None:
        changes = watchfiles.watch(directory, watch_filter=watchfiles.PythonFilter(), raise_interrupt=False)
        for changed in changes:
            log.info("changed: %s", ", ".join(sorted(os.path.relpath(path, directory) for _, path in changed)))
            os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=watch, name="natsync-reload", daemon=True).start()


class Parent:
    """What a worker knows of the process that started it."""

    def __init__(self, descriptors: str) -> None:
        ready, life = descriptors.split(",")
        self._ready, self._life = int(ready), int(life)
        threading.Thread(target=self._watch, name="natsync-parent", daemon=True).start()

    def tell_ready(self) -> None:
        with suppress(OSError):
            os.write(self._ready, READY)

    def _watch(self) -> None:
        with suppress(OSError):
            os.read(self._life, 1)  # returns when the parent is gone
        os.kill(os.getpid(), signal.SIGTERM)
