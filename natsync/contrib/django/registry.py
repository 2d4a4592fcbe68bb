"""Handlers of apps: what <app>/handlers.py registers, kept until a worker, or a test, serves it.

A Registry only records. Each worker, and each test, makes a natsync.Subscriber of its own from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from django.utils.module_loading import autodiscover_modules

import natsync
from natsync import subject as _subject
from natsync.contrib.django.conf import configured
from natsync.contrib.django.database import AfterHandler, BeforeHandler
from natsync.streaming import handlers
from natsync.streaming.subscriber import check_decorator, check_limit
from natsync.subscription import PENDING_BYTES, PENDING_MESSAGES, Overflow, check_limits

F = TypeVar("F", bound=Callable[..., Any])

#: The module of each app that is imported for its handlers.
MODULE = "handlers"


class Registry:
    """Records handlers by decorators with the signatures of natsync.Subscriber's; safe to fill at import.

    A function may be registered more than once. Nothing is opened; what cannot be served is refused where it stands.
    """

    def __init__(self) -> None:
        self._recorded: list[Callable[[natsync.Subscriber], object]] = []
        self.subjects: list[str] = []

    def stream(self, subject: str, *, queue: str | None = None, max_streams: int | None = None) -> Callable[[F], F]:
        """Answer requests on the subject with streams: of a generator function (ctx, request), or one that is
        given (ctx, request, sender). See natsync.Subscriber.stream()."""
        _check_place("stream", subject, queue)
        check_limit("max_streams", max_streams)

        def decorate(function: F) -> F:
            handlers.stream_runner(function)
            more: dict[str, Any] = {"queue": queue, "max_streams": max_streams}
            self._record(subject, lambda to: to.stream(subject, **more)(function))
            return function

        return decorate

    def handler(
        self,
        subject: str,
        *,
        queue: str | None = None,
        max_workers: int | None = None,
        pending_messages: int | None = None,
    ) -> Callable[[F], F]:
        """Answer requests on the subject with what function(ctx, request) returns. See natsync.Subscriber.handler()."""
        _check_place("handler", subject, queue)
        check_limit("max_workers", max_workers)
        check_limit("pending_messages", pending_messages)

        def decorate(function: F) -> F:
            handlers.single_runner(function)
            handlers.arguments(function, (2,), "(ctx, request)")
            more: dict[str, Any] = {"queue": queue, "max_workers": max_workers, "pending_messages": pending_messages}
            self._record(subject, lambda to: to.handler(subject, **more)(function))
            return function

        return decorate

    def subscribe(
        self, subject: str, *, queue: str | None = None, concurrency: int = 1, overflow: Overflow = "drop_new"
    ) -> Callable[[F], F]:
        """Have function(message) called for every message on the subject. See natsync.Subscriber.subscribe().

        The worker's default queue group does not count here: without queue= each worker process gets every message.
        """
        _check_place("subscribe", subject, queue)
        check_limits(None, PENDING_MESSAGES, PENDING_BYTES, overflow, concurrency, called=True)

        def decorate(function: F) -> F:
            handlers.arguments(function, (1,), "(message)")
            more: dict[str, Any] = {"queue": queue, "concurrency": concurrency, "overflow": overflow}
            self._record(subject, lambda to: to.subscribe(subject, **more)(function))
            return function

        return decorate

    def _record(self, subject: str, register: Callable[[natsync.Subscriber], object]) -> None:
        self.subjects.append(subject)
        self._recorded.append(register)

    def make_subscriber(
        self, *, queue: str | None = None, hooks: Sequence[natsync.Hooks] = (), **options: Any
    ) -> natsync.Subscriber:
        """A natsync.Subscriber with the settings of NATSYNC and all that is recorded, not open yet; close it.

        Around each of its handlers, the whole run of a generator included, database connections are looked after
        (natsync.contrib.django.database).

        Args:
            queue: the queue group of streams and request handlers that name none; None = none.
            hooks: more of them, inside those for the database.
            options: instead of those of NATSYNC.
        """
        config = configured()
        given: dict[str, Any] = {**config.options, **config.limits, **options}
        own = given.pop("hooks", None) or ()
        own = [own] if isinstance(own, natsync.Hooks) else own
        made = natsync.Subscriber(
            given.pop("servers", config.servers), hooks=[BeforeHandler(), *own, *hooks, AfterHandler()], **given
        )
        made.default_queue = queue
        for register in self._recorded:
            register(made)
        return made

    def __repr__(self) -> str:
        return f"<Registry: {len(self.subjects)} handlers>"


def _check_place(form: str, subject: str, queue: str | None) -> None:
    check_decorator(form, subject)
    _subject.subscribe_subject(subject)
    if queue is not None:
        _subject.queue_name(queue)


#: The registry that the worker serves: what handlers.py modules import.
subscriber = Registry()


def autodiscover() -> None:
    """Import the module `handlers` of every installed app that has one. Idempotent; what one raises is raised."""
    autodiscover_modules(MODULE)
