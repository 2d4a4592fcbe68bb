"""`flask natsync …`: try the application's connection to NATS from where the application runs."""

from __future__ import annotations

import time

import click
import flask
from flask.cli import AppGroup

from natsync.client import Client
from natsync.errors import NatsError

commands = AppGroup("natsync", help="Try the application's connection to NATS.")

_timeout = click.option(
    "--timeout", type=click.FloatRange(min=0), default=5.0, show_default=True, help="Seconds to wait at most."
)


def _client() -> Client:
    client: Client = flask.current_app.extensions["natsync"]
    return client


def _failed(error: NatsError) -> click.ClickException:
    return click.ClickException(" ".join(str(error).split()) or type(error).__name__)


@commands.command()
@_timeout
def check(timeout: float) -> None:
    """Connect as the application is configured to, and say how long a round trip takes."""
    client = _client()
    begin = time.perf_counter()
    try:
        client.open(timeout)
        opened = time.perf_counter() - begin
        trip = client.rtt(timeout)
    except NatsError as error:
        raise _failed(error) from error
    info = client.server_info
    click.echo(
        f"connected to {info.get('server_name')} (nats-server {info.get('version')}) in {opened * 1000:.1f} ms; "
        f"round trip {trip * 1000:.2f} ms"
    )


@commands.command()
@click.argument("subject")
@click.argument("payload", default="")
@_timeout
def request(subject: str, payload: str, timeout: float) -> None:
    """Send PAYLOAD to SUBJECT and print the reply."""
    client = _client()
    try:
        reply = client.request(subject, payload, timeout=timeout)
    except NatsError as error:
        raise _failed(error) from error
    click.echo(reply.data)


@commands.command()
@click.argument("subject")
@click.argument("payload", default="")
@_timeout
def stream(subject: str, payload: str, timeout: float) -> None:
    """Send PAYLOAD to SUBJECT and print the chunks of the answer, each on a line, as they come."""
    client = _client()
    try:
        with client.stream(subject, payload, timeout=timeout) as chunks:
            for chunk in chunks:
                click.echo(chunk)
    except NatsError as error:
        raise _failed(error) from error
