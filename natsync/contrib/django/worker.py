"""One worker: serves the registered handlers in this process until it is told to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable

import natsync
from natsync.contrib.django.clients import close_client
from natsync.contrib.django.registry import Registry
from natsync.streaming.serving import Serving

log = logging.getLogger("natsync.worker")

#: Exit statuses of `manage.py natsync_worker`; 2 is argparse's for usage, 3 the autoreloader's between its processes.
STOPPED = 0
FAILED = 1
CUT_SHORT = 4


class _Closed(natsync.Hooks):
    """Tells the worker that its connection has ended for good."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def closed(self, reason: str | None) -> None:
        if reason is not None:
            self._worker.lost(reason)


class Worker:
    """Serves a registry once. run() may be called in any thread; tell() may be called from a signal handler.

    In the main thread run() takes SIGINT and SIGTERM itself. The first drains: no new requests, those under way get
    shutdown_timeout seconds. The second cancels them.
    """

    def __init__(
        self, registry: Registry, *, queue: str | None, shutdown_timeout: float, ready: Callable[[list[str]], object]
    ) -> None:
        self._registry = registry
        self._queue = queue
        self._shutdown_timeout = shutdown_timeout
        self._ready = ready
        self._serving = Serving()
        self._cut_short = False
        self._lost: str | None = None

    def tell(self, reason: str) -> None:
        """Have run() shut down; a reason that is the name of a signal cancels if it shuts down already. Does not wait.

        Before run() it counts too.
        """
        self._serving.stop(reason)

    def lost(self, reason: str) -> None:
        """There is no connection any more, and none will be made."""
        self._lost = reason
        self._serving.stop("the connection is closed")

    def run(self) -> int:
        """Open, serve, shut down; the exit status.

        ready() is called with a line for each handler once all are live.

        Raises:
            NoServersError: no server could be reached.
        """
        subscriber = self._registry.make_subscriber(queue=self._queue, hooks=[_Closed(self)])

        def begin() -> None:
            subscriber.open()
            self._ready([_line(handle.subject, handle.queue) for handle in subscriber.handles])

        try:
            self._serving.run(begin, lambda: self._drain(subscriber), lambda reason: self._cancel(subscriber, reason))
        finally:
            subscriber.close(0)
            close_client()
        if self._lost is not None:
            log.error("the connection has ended: %s", self._lost)
            return FAILED
        return CUT_SHORT if self._cut_short else STOPPED

    def _drain(self, subscriber: natsync.Subscriber) -> None:
        try:
            subscriber.drain(self._shutdown_timeout)
        except natsync.DrainTimeout as error:
            self._cut_short = True
            log.warning("%s", error)

    def _cancel(self, subscriber: natsync.Subscriber, reason: str) -> None:
        if sum(handle.cancel(reason) for handle in subscriber.handles):
            self._cut_short = True


def _line(subject: str, queue: str | None) -> str:
    return subject if queue is None else f"{subject} in queue group {queue}"
