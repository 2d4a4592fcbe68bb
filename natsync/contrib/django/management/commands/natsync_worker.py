"""`manage.py natsync_worker`: serve the handlers of all apps until told to stop."""

from __future__ import annotations

import logging
import math
import os
import sys
from argparse import ArgumentTypeError, RawDescriptionHelpFormatter
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser, DjangoHelpFormatter

import natsync
from natsync.contrib.django.conf import configured
from natsync.contrib.django.processes import Processes
from natsync.contrib.django.registry import autodiscover, subscriber
from natsync.contrib.django.reload import run_with_reload
from natsync.contrib.django.worker import Worker

#: Seconds that running handlers get to finish, unless told otherwise.
SHUTDOWN_SECONDS = 30.0

EPILOG = """\
The first SIGTERM or SIGINT drains: no new requests, those under way get --shutdown-timeout. A second one cancels them.

exit status:
  0  told to stop, and everything under way was finished
  1  could not start (no server, no handlers, a failed check), lost its connection for good, or a process was killed
  2  the command line cannot be used
  4  told to stop, and something under way had to be cancelled
"""


class Command(BaseCommand):
    """Serves what the apps' handlers.py modules registered with natsync.contrib.django.subscriber."""

    help = "Serve the NATS handlers of all apps (<app>/handlers.py) until SIGTERM or Ctrl-C."
    requires_system_checks = "__all__"

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        return super().create_parser(prog_name, subcommand, epilog=EPILOG, formatter_class=_Formatter, **kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--workers", type=_count, default=1, metavar="N", help="Serve in N processes; default 1.")
        parser.add_argument(
            "--queue",
            help="Queue group of streams and request handlers that name none, so that several processes share the "
            "requests. Default: NATSYNC['QUEUE'], or the name of the settings' package. An empty one gives every "
            "process every request.",
        )
        parser.add_argument(
            "--shutdown-timeout",
            type=_seconds,
            default=SHUTDOWN_SECONDS,
            metavar="SECONDS",
            help="Most time that running handlers get to finish; default %(default)g.",
        )
        parser.add_argument("--reload", action="store_true", help="Start anew when a file changes (for development).")

    def execute(self, *args: Any, **options: Any) -> Any:
        # With --reload the checks are made where a file that does not load is waited for.
        self._checks_later = options["reload"] and not options["skip_checks"]
        return super().execute(*args, **{**options, "skip_checks": options["skip_checks"] or options["reload"]})

    def handle(self, *args: Any, **options: Any) -> None:
        if options["reload"] and options["workers"] > 1:
            raise CommandError("--reload serves in one process: leave out --workers", returncode=2)
        try:
            queue = configured().queue if options["queue"] is None else options["queue"]
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from None
        self._queue = (default_queue() if queue is None else queue) or None
        self._shutdown_timeout = options["shutdown_timeout"]
        if not logging.getLogger("natsync").hasHandlers():
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
        if options["reload"]:
            status = run_with_reload(self._prepared, self._serve)
        else:
            status = self._without_reload(options["workers"])
        if status:
            sys.exit(status)

    def _without_reload(self, workers: int) -> int:
        autodiscover()
        if not subscriber.subjects:
            raise CommandError("no handlers: no installed app has a handlers.py that registers one")
        if workers == 1:
            return self._serve(self._worker())
        return Processes(lambda: self._serve(self._worker()), workers, self._shutdown_timeout).run()

    def _prepared(self) -> Worker:
        """The worker of the autoreloader's inner process; loading what it serves is part of what may fail there."""
        if self._checks_later:
            self.check()
        autodiscover()
        if not subscriber.subjects:
            self.stderr.write("no handlers yet: no installed app has a handlers.py that registers one")
        return self._worker()

    def _worker(self) -> Worker:
        return Worker(subscriber, queue=self._queue, shutdown_timeout=self._shutdown_timeout, ready=self._announce)

    def _serve(self, worker: Worker) -> int:
        try:
            return worker.run()
        except (natsync.NoServersError, natsync.AuthorizationError) as error:
            self.stderr.write(self.style.ERROR(str(error)))
            return 1

    def _announce(self, lines: list[str]) -> None:
        for line in lines:
            self.stdout.write(f"serving {line}")
        self.stdout.write(f"natsync worker {os.getpid()} is ready")
        self.stdout.flush()


class _Formatter(DjangoHelpFormatter, RawDescriptionHelpFormatter):
    """Django's order of options, and the epilog's own lines."""


def default_queue() -> str:
    """The name of the package that holds the settings: "mysite" for mysite.settings."""
    module = getattr(settings, "SETTINGS_MODULE", None) or "django"
    return str(module).partition(".")[0]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r}: a whole number from 1 up")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"{text!r}: a number of seconds")
    return value
