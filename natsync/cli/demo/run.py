"""Starts what the demo needs, plays the scenes, stops everything, and says whether all was as claimed."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import natsync
from natsync.cli.demo import handlers
from natsync.cli.demo.log import CaughtLog
from natsync.cli.demo.scenes import SCENES, Stage
from natsync.cli.demo.screen import Screen
from natsync.cli.demo.third_party import ThirdParty
from natsync.cli.signals import signals_unwind
from natsync.testing import NatsServer

#: Seconds that threads which have nothing left to do may take to leave.
LEAVING = 5.0


def run() -> int:
    """Play the demo on standard output; the exit status: 0 only if every check passed."""
    begin = time.monotonic()
    screen = Screen()
    screen.title("natsync demo", "a slow third party, streamed over NATS to ordinary blocking Python")
    before = set(threading.enumerate())
    with signals_unwind(), _stage(screen) as stage:
        for scene in SCENES:
            scene(stage)
    screen.scene("The end")
    left = _threads_left(before) + (["nats-server"] if stage.server.running else [])
    screen.check(not left, f"everything is stopped; threads and processes left: {', '.join(left) or 'none'}")
    screen.verdict(time.monotonic() - begin)
    return 1 if screen.failed else 0


def _threads_left(before: set[threading.Thread]) -> list[str]:
    """Names of threads that were not there before, once those that are about to leave had time for it."""
    end = time.monotonic() + LEAVING
    for thread in set(threading.enumerate()) - before:
        thread.join(max(0.0, end - time.monotonic()))
    return [thread.name for thread in threading.enumerate() if thread not in before]


@contextmanager
def _stage(screen: Screen) -> Iterator[Stage]:
    """Start server, third party, subscriber and client; stop them in the other order."""
    journal = handlers.Journal()
    begin = time.monotonic()
    with CaughtLog() as log, NatsServer() as server:
        screen.step("nats-server", f"{server.url}, a real one, up after {time.monotonic() - begin:.2f} s")
        with ThirdParty() as service:
            screen.step("third party", f"{service.url}, a Flask application that takes its time")
            subscriber = natsync.Subscriber(server.url, name="demo-subscriber")
            handlers.install(subscriber, service.url, journal)
            with subscriber, natsync.Client(server.url, name="demo-client") as client:
                screen.step("subscriber", "serves demo.relay and demo.ticker on worker threads")
                screen.step("client", "one connection for all that follows")
                yield Stage(screen, client, service, journal, log, server)
