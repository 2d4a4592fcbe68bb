"""`natsync demo`: starts the demo if everything it needs is installed.

The demo itself is the package natsync.cli.demo; it is imported only when the command runs, because it needs
flask and requests.
"""

from importlib.util import find_spec

import click

from natsync.cli.connection import DEBUG_OPTION
from natsync.cli.failures import MissingExtra

#: What the extra `demo` brings besides click and rich. The server program is looked for by NatsServer itself.
_NEEDED = ("flask", "requests")


@click.command(short_help="Watch a slow third party streamed over NATS.")
@DEBUG_OPTION
def demo() -> None:
    """Watch a slow third party being streamed over NATS: pieces, an error, a timeout, a cancel.

    Starts everything itself (a nats-server, an HTTP service, a subscriber) on free loopback ports and stops
    it again; ends by itself within ten seconds or so. The exit status is 0 only if every step did what it
    says.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise MissingExtra(f'the demo needs {" and ".join(missing)}: pip install "natsync[demo]"')
    from natsync.cli.demo.run import run

    click.get_current_context().exit(run())
