"""`natsync serve module:attr`: run the handlers of one's own module until told to stop."""

import importlib
import logging
import os
import sys
from types import ModuleType

import click

import natsync
from natsync.cli.connection import DEBUG_OPTION, SERVER_OPTION, server_given
from natsync.cli.parameters import duration

#: The attribute that is taken where the argument names only a module.
DEFAULT_ATTRIBUTE = "subscriber"

_LEVELS = ("debug", "info", "warning", "error")


@click.command(short_help="Serve the handlers of a module until SIGTERM or Ctrl-C.")
@click.argument("target", metavar="MODULE[:ATTR]")
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
@SERVER_OPTION
@DEBUG_OPTION
def serve(target: str, log_level: str, shutdown_timeout: float, queue: str | None) -> None:
    """Serve the handlers of a natsync.Subscriber until SIGTERM or Ctrl-C.

    ATTR is a Subscriber, or a function without arguments that returns one; "subscriber" if it is left out.
    The module is looked for in the current directory first. --server is for a Subscriber that names no
    server itself: it becomes NATS_URL. The first signal lets running handlers finish, a second one cancels
    them.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    if (server := server_given()) is not None:
        os.environ["NATS_URL"] = server  # before the import: the module may make its Subscriber right there
    subscriber = load_subscriber(target)
    subscriber.default_queue = (target.partition(":")[0] if queue is None else queue) or None

    def announce() -> None:
        for handle in subscriber.handles:
            click.echo(f"serving {handle.subject}{_in_group(handle.queue)}", err=True)

    subscriber.serve_forever(shutdown_timeout=shutdown_timeout, ready=announce)


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
