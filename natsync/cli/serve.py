"""`natsync serve module:attr …`: run the handlers of one's own modules until told to stop."""

import importlib
import logging
import os
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import click

import natsync
from natsync import monitor
from natsync.cli.connection import child_environment, child_options, connection_options, options_given, server_given
from natsync.cli.failures import MissingExtra
from natsync.cli.parameters import duration
from natsync.cli.running import serve_all
from natsync.cli.supervisor import Parent, Supervisor, reload_on_change

#: The attribute that is taken where the argument names only a module.
DEFAULT_ATTRIBUTE = "subscriber"

log = logging.getLogger("natsync.serve")

_LEVELS = ("debug", "info", "warning", "error")


@click.command(short_help="Serve the handlers of modules until SIGTERM or Ctrl-C.")
@click.argument("targets", metavar="MODULE[:ATTR]...", nargs=-1, required=True)
@click.option("--log-level", type=click.Choice(_LEVELS, case_sensitive=False), default="info", show_default=True)
@click.option(
    "--shutdown-timeout",
    type=duration,
    default=30.0,
    show_default=True,
    help="Most time that running handlers get to finish after SIGTERM or Ctrl-C.",
)
@click.option(
    "--queue",
    help="Queue group of handlers that name none, so that several processes share the requests. "
    "The module's name if it is left out; an empty name gives every process every request.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Serve in so many processes; one that dies is replaced.")
@click.option("--reload", is_flag=True, help="Start anew when a Python file below this directory changes.")
@click.option("--monitor", "monitored", is_flag=True, help="Answer `natsync top`.")
@click.option("--several", is_flag=True, hidden=True, help="Other processes serve the same.")
@click.option("--worker-of", hidden=True, help="Descriptors of a worker: to say that it is ready, and of its parent.")
@connection_options
def serve(
    targets: tuple[str, ...],
    log_level: str,
    shutdown_timeout: float,
    queue: str | None,
    workers: int | None,
    reload: bool,
    monitored: bool,
    several: bool,
    worker_of: str | None,
) -> None:
    """Serve the handlers of natsync.Subscribers until SIGTERM or Ctrl-C.

    ATTR is a Subscriber, or a function without arguments that returns one; "subscriber" if it is left out.
    Modules are looked for in the current directory first. The connection options are for what a Subscriber leaves
    open: --server becomes NATS_URL, credentials are for one that has none. The first signal lets running handlers
    finish, a second one cancels them. With --workers or --reload, SIGUSR1 replaces the processes, the old ones once
    the new ones serve.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    if workers is not None or reload:
        options = ["--log-level", log_level, "--shutdown-timeout", str(shutdown_timeout)]
        options += [] if queue is None else ["--queue", queue]
        options += ["--monitor"] if monitored else []
        options += ["--several"] if several or (workers or 1) > 1 else []
        _supervise([*options, *child_options(), *targets], workers or 1, shutdown_timeout, reload)
        return
    parent = None if worker_of is None else Parent(worker_of)
    if (server := server_given()) is not None:
        os.environ["NATS_URL"] = server  # before the import: the module may make its Subscriber right there
    given = options_given()
    subscribers: dict[natsync.Subscriber, str] = {}
    for target in targets:
        subscriber = load_subscriber(target)
        if subscriber not in subscribers:
            subscriber.default_queue = (target.partition(":")[0] if queue is None else queue) or None
            _take_options(subscriber, target, given, several or queue is not None)
            subscribers[subscriber] = target

    def announce() -> None:
        handles = [handle for subscriber in subscribers for handle in subscriber.handles]
        if monitored:
            for subscriber, target in subscribers.items():
                monitor.answer(subscriber, name=target)
        if parent is not None:
            parent.tell_ready()  # before anybody reads that it serves, and has it replaced
        for handle in handles:
            click.echo(f"serving {handle.subject}{_in_group(handle.queue)}", err=True)

    serve_all(list(subscribers), shutdown_timeout, announce)


def _take_options(subscriber: natsync.Subscriber, target: str, given: dict[str, Any], shared: bool) -> None:
    """Give the subscriber the connection options; its queue group it has.

    One that its module has opened is served only where neither comes too late: requests that every process runs, or
    a connection that is another user's, are noticed late. Without a group it may be if no other process is known of.

    Raises:
        click.ClickException: one does.
    """
    lonely = [one.subject for one in subscriber.handles if one.kind != "message" and one.queue is None]
    try:
        subscriber.default_options(**given)
    except RuntimeError:
        late = "the connection options"
    else:
        if subscriber.default_queue is None or not lonely:
            return
        subjects = ", ".join(map(repr, lonely))
        if not shared:
            text = "%r was open before it was served: %s in no queue group; if other processes serve it, all answer"
            log.warning(text, target, subjects)
            return
        late = f"the queue group of {subjects} (queue=, or --queue '' for none)"
    raise click.ClickException(
        f"{target!r} was open before it was served, too early for {late}: its module may only record, by the "
        "decorators stream(), handler() and subscribe() of a Subscriber that is not open"
    )


def _supervise(arguments: list[str], workers: int, shutdown_timeout: float, reload: bool) -> None:
    """Run worker processes with these arguments."""
    if reload:
        if find_spec("watchfiles") is None:
            raise MissingExtra('--reload needs watchfiles: pip install "natsync[reload]"')
        reload_on_change(os.getcwd())
    command = [sys.executable, "-m", "natsync", "serve"]
    Supervisor([*command, *arguments], child_environment(), workers, shutdown_timeout, keep_going=reload).run()


def load_subscriber(target: str) -> natsync.Subscriber:
    """The Subscriber that `module:attr` names.

    Raises:
        click.ClickException: there is no such module or attribute, its import fails, or it is something else.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name:
        raise click.BadParameter(f"{target!r} names no module; write module:attr", param_hint="MODULE[:ATTR]")
    found: object = _import(module_name)
    for name in (attribute or DEFAULT_ATTRIBUTE).split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise click.ClickException(f"{module_name!r} has no {attribute or DEFAULT_ATTRIBUTE!r}") from None
    if callable(found) and not isinstance(found, natsync.Subscriber):
        found = found()
    if not isinstance(found, natsync.Subscriber):
        raise click.ClickException(f"{target!r} is a {type(found).__name__}, not a natsync.Subscriber")
    return found


def _import(name: str) -> ModuleType:
    if sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise  # the module is there, but something that it imports is not
        hint = f"; write {name[:-3]!r}" if name.endswith(".py") else ""
        raise click.ClickException(f"no module {error.name!r} here or on sys.path{hint}") from error


def _in_group(queue: str | None) -> str:
    return "" if queue is None else f" in queue group {queue}"
