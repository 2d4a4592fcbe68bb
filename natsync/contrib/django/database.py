"""Database connections in handlers: checked before, put away after, closed with their thread.

Django does that for requests, by signals that no handler of NATS sends. Here it is done by hooks, on the thread that
runs the handler, around the whole of its run.
"""

from __future__ import annotations

from django.db import close_old_connections, connections, reset_queries

import natsync
from natsync.hooks import Exchange
from natsync.workers import at_thread_end


class BeforeHandler(natsync.Hooks):
    """Before each handler: connections that are too old or broken are closed, others checked when first used.

    The check is the one of CONN_HEALTH_CHECKS, whatever that is set to, and costs a handler that does not use the
    database nothing. The queries that DEBUG collects are forgotten.
    """

    def handler_started(self, exchange: Exchange) -> None:
        at_thread_end(connections.close_all)
        reset_queries()
        close_old_connections()
        for connection in connections.all(initialized_only=True):
            connection.health_check_enabled = True


class AfterHandler(natsync.Hooks):
    """After each handler: connections that broke, or that CONN_MAX_AGE wants no longer, are closed."""

    def handler_done(self, exchange: Exchange, seconds: float, error: BaseException | None) -> None:
        close_old_connections()
