"""The group that all commands hang on: names, version, and what becomes of an exception."""

import click

import natsync
from natsync.cli.bench import bench
from natsync.cli.check import check
from natsync.cli.completion import completion
from natsync.cli.connection import connection_options
from natsync.cli.failures import reported
from natsync.cli.messages import pub, request, sub
from natsync.cli.serve import serve
from natsync.cli.server import server
from natsync.cli.services import services
from natsync.cli.showcase import demo
from natsync.cli.stream import stream
from natsync.cli.top import top


class App(click.Group):
    """A click group whose commands end with one line on stderr instead of a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        with reported(ctx):
            return super().invoke(ctx)


@click.group(cls=App, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(natsync.__version__, "-V", "--version", prog_name="natsync")
@connection_options
def app() -> None:
    """Streams, requests and messages over NATS, from ordinary blocking Python.

    The connection options may stand before the command or after it.
    """


for command in (demo, server, serve, request, stream, pub, sub, bench, check, services, top, completion):
    app.add_command(command)
