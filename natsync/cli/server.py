"""`natsync server`: a real nats-server in the foreground, for development."""

import signal
from contextlib import closing

import click

from natsync.cli.connection import DEBUG_OPTION
from natsync.cli.signals import awaited, hangups
from natsync.testing import NatsServer, ServerStartError

#: The port that clients expect. IANA's port for NATS.
DEFAULT_PORT = 4222


@click.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_PORT,
    show_default=True,
    help="Port on the loopback interface; 0 takes a free one.",
)
@click.option("--jetstream", is_flag=True, help="With JetStream; its data are removed at the end.")
@DEBUG_OPTION
def server(port: int, jetstream: bool) -> None:
    """Run a nats-server for development until SIGTERM or Ctrl-C.

    Prints its URL when it accepts connections. It listens on this machine only. It ends
    with its terminal, too, unless started by nohup.
    """
    with awaited(signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, *hangups()) as next_signal:
        with closing(_started(NatsServer(jetstream, port=port or None))) as running:
            click.echo(f"nats-server is ready: {running.url} pid {running.pid}")
            while (number := next_signal()) == signal.SIGCHLD and running.running:
                pass  # some other child, or a change of state that is not the end
        if number == signal.SIGCHLD:
            raise click.ClickException(f"the nats-server has ended by itself: {_last_line(running.log())}")


def _started(instance: NatsServer) -> NatsServer:
    try:
        return instance.start()
    except ServerStartError as error:
        raise click.ClickException(f"the nats-server did not start: {_last_line(error.log)}") from error


def _last_line(log: str) -> str:
    return (log.strip().splitlines() or ["its log is empty"])[-1]
