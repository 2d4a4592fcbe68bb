"""Subscribers in the foreground: one, or several at once, until SIGINT or SIGTERM."""

import logging
import signal
import threading
from collections.abc import Callable

import natsync
from natsync.streaming.serving import Inbox

log = logging.getLogger("natsync.serve")

#: What the threads of several subscribers tell the main thread.
_READY, _ENDED = "ready", "ended"


def serve_all(
    subscribers: list[natsync.Subscriber], shutdown_timeout: float | None, ready: Callable[[], object]
) -> None:
    """Serve until SIGINT or SIGTERM, then let all drain at the same time; a second signal cancels.

    ready() is called once all of them are live. If one ends by itself, or cannot begin, all do.

    Raises:
        What Subscriber.serve_forever() raises, of the first that failed.
    """
    if len(subscribers) == 1:
        subscribers[0].serve_forever(shutdown_timeout=shutdown_timeout, ready=ready)
        return
    events = Inbox()
    failures: list[BaseException] = []

    def serve(subscriber: natsync.Subscriber) -> None:
        try:
            subscriber.serve_forever(shutdown_timeout=shutdown_timeout, ready=lambda: events.put(_READY))
        except BaseException as error:
            failures.append(error)
        finally:
            events.put(_ENDED)

    threads = [threading.Thread(target=serve, args=(one,), daemon=True) for one in subscribers]
    try:
        with events.signals(signal.SIGINT, signal.SIGTERM):
            for thread in threads:
                thread.start()
            _attend(subscribers, events, ready)
    finally:
        events.close()
    if failures:
        raise failures[0]


def _attend(subscribers: list[natsync.Subscriber], events: Inbox, ready: Callable[[], object]) -> None:
    """The main thread's part: returns when all have ended."""
    begun = ended = signals = 0
    while ended < len(subscribers):
        event = events.get()
        begun += event == _READY
        ended += event == _ENDED
        if event.startswith("SIG"):
            signals += 1
            log.info("shutting down: %s", event)
        if signals or ended:
            for subscriber in subscribers:
                subscriber.stop()  # without effect on one that has not begun: its _READY brings us here again
        elif begun == len(subscribers):
            ready()
        if signals > 1:
            for handle in (handle for subscriber in subscribers for handle in subscriber.handles):
                handle.cancel("the responder was told to stop at once")
