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

from natsync.cli.signals import awaited

log = logging.getLogger("natsync.serve")

#: Seconds that a worker gets beyond the shutdown timeout before it is killed.
GRACE = 5.0
#: What a worker writes once its handlers are live.
READY = b"1"


class _Worker:
    """One process, the pipe on which it says that it is ready, and whether it was told to stop."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], life: int) -> None:
        self._ready, ready = os.pipe()
        os.set_blocking(self._ready, False)
        self.stopping = False
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
        self._was_ready = False

    @property
    def was_ready(self) -> bool:
        """Whether its handlers were live at some time."""
        if not self._was_ready:
            with suppress(BlockingIOError):
                self._was_ready = os.read(self._ready, 1) == READY
        return self._was_ready

    def stop(self) -> None:
        self.stopping = True
        self.process.terminate()

    def close(self) -> None:
        os.close(self._ready)


class Supervisor:
    """Keeps `count` workers alive until SIGINT or SIGTERM; SIGUSR1 replaces them.

    keep_going: whether a worker that ends before it was ready is left until the next SIGUSR1, as --reload does with a
    module that does not load; otherwise it ends everything.
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
                self._take(next_signal())
        if self._failure is not None:
            raise click.ClickException(self._failure)

    def _take(self, number: signal.Signals) -> None:
        if number == signal.SIGCHLD:
            self._reap()
        elif number == signal.SIGUSR1:
            if not self._signals:
                self._reload()
        else:
            self._signals += 1
            self._stop(again=self._signals > 1)

    def _fill(self) -> None:
        """Start what is missing."""
        while sum(not worker.stopping for worker in self._workers) < self._count:
            worker = _Worker(self._command, self._environment, self._life)
            self._workers.append(worker)
            log.info("worker %s started", worker.process.pid)

    def _reload(self) -> None:
        log.info("replacing the workers")
        self._stop()
        self._fill()

    def _stop(self, *, again: bool = False) -> None:
        """Have the workers drain; again = those too that were told before, who then cancel what is under way."""
        told = [worker for worker in self._workers if again or not worker.stopping]
        for worker in told:
            worker.stop()
        if told:
            killer = threading.Timer(self._patience, self._overdue, [told])
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
            self._workers.remove(worker)
            status = worker.process.returncode
            if worker.stopping:
                log.info("worker %s stopped", worker.process.pid)
            elif worker.was_ready:
                log.error("worker %s ended by itself (status %s): starting another", worker.process.pid, status)
            elif self._keep_going:
                log.error("worker %s ended at its start (status %s): waiting for a change", worker.process.pid, status)
            else:
                self._failure = self._failure or f"a worker ended at its start, with status {status}"
                self._signals += 1
                self._stop()
            if worker.was_ready and not worker.stopping and not self._signals:
                self._fill()
            worker.close()
        if not any(worker.stopping for worker in self._workers):
            self._spare()

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
