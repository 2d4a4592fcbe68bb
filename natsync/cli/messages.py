"""`natsync request`, `pub` and `sub`: single messages."""

import threading
from collections.abc import Iterator
from typing import Any

import click

import natsync
from natsync.cli.connection import connected, connection_options
from natsync.cli.failures import one_line
from natsync.cli.output import PayloadPrinter
from natsync.cli.parameters import duration, group_headers, header, read_payload, timeout_option
from natsync.message import Message
from natsync.reply import raise_service_error

#: Seconds to wait for a reply. Default of the nats command (--timeout).
REPLY_TIMEOUT = 5.0

_Headers = tuple[tuple[str, str], ...]


@click.command()
@click.argument("subject")
@click.argument("payload", default="")
@timeout_option(REPLY_TIMEOUT, "Most time to wait for the reply, as 5, 250ms or 1m.")
@click.option(
    "-H",
    "--header",
    "headers",
    type=header,
    metavar="NAME:VALUE",
    multiple=True,
    help="A header of the request.",
)
@click.option(
    "--replies",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Wait for so many replies; 0 takes all that come within --timeout.",
)
@click.option("--raw", is_flag=True, help="No newline after the reply.")
@click.option("--json", "pretty", is_flag=True, help="Indent a reply that is JSON.")
@connection_options
def request(
    subject: str, payload: str, timeout: float, headers: _Headers, replies: int, raw: bool, pretty: bool
) -> None:
    """Send PAYLOAD to SUBJECT and print the reply.

    PAYLOAD `-` is read from standard input. A reply that is an error goes to standard error, and the exit status is 1.
    """
    printer = PayloadPrinter(raw=raw, pretty=pretty)
    data = read_payload(payload)
    fields = group_headers(headers)
    with connected() as client:
        if replies == 1:
            printer.write(client.request(subject, data, timeout=timeout, headers=fields).data)
            return
        came = failed = 0
        most = replies or None
        with client.request_many(subject, data, timeout=timeout, headers=fields, max_messages=most) as answers:
            for message in answers:
                came += 1
                try:
                    raise_service_error(message)
                except natsync.HandlerError as error:  # the others may have answered well
                    failed += 1
                    click.echo(f"natsync: {one_line(error)}", err=True)
                else:
                    printer.write(message.data)
    if came < max(replies, 1):
        raise natsync.TimedOut(f"{came} of {max(replies, 1)} replies from {subject!r} within {timeout:g} s")
    if failed:
        click.get_current_context().exit(1)


@click.command()
@click.argument("subject")
@click.argument("payload", default="")
@click.option("--reply", help="Subject for answers.")
@click.option(
    "-H",
    "--header",
    "headers",
    type=header,
    metavar="NAME:VALUE",
    multiple=True,
    help="A header of the message.",
)
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="Publish it so many times.")
@click.option("--sleep", "pause", type=duration, default=0.0, help="Wait so long between two of them, as 1 or 250ms.")
@connection_options
def pub(subject: str, payload: str, reply: str | None, headers: _Headers, count: int, pause: float) -> None:
    """Publish PAYLOAD to SUBJECT; returns when the server has it.

    PAYLOAD `-` is read from standard input.
    """
    data = read_payload(payload)
    fields = group_headers(headers)
    never = threading.Event()
    with connected() as client:
        for number in range(count):
            if number and pause:
                client.flush()  # what was published is not held back while we wait
                never.wait(pause)
            client.publish(subject, data, reply=reply, headers=fields)
        client.flush()


@click.command(short_help="Print messages as they come, until Ctrl-C.")
@click.argument("subject")
@click.option("--queue", help="Queue group: each message goes to one member.")
@click.option("--count", type=click.IntRange(min=1), help="Leave after so many messages.")
@click.option("-v", "--verbose", is_flag=True, help="Show subject, reply subject and headers of each.")
@click.option("--raw", is_flag=True, help="No newline after a message.")
@click.option("--json", "pretty", is_flag=True, help="Indent messages that are JSON.")
@connection_options
def sub(subject: str, queue: str | None, count: int | None, verbose: bool, raw: bool, pretty: bool) -> None:
    """Print the messages that come on SUBJECT, one a line, until Ctrl-C.

    Says on standard error when the server has the subscription.
    """
    printer = PayloadPrinter(raw=raw, pretty=pretty)
    with connected(_tell) as client:
        subscription = client.subscribe(subject, queue=queue, max_messages=count)
        client.flush()
        click.echo(f"listening on {subject}", err=True)
        for message in subscription:
            if verbose:
                for line in _envelope(message):
                    printer.write_line(line)
            printer.write(message.data)


def _tell(name: str, info: dict[str, Any]) -> None:
    """Say on standard error what happens to a subscription while it lasts."""
    texts = {
        "disconnected": "disconnected: {reason}",
        "reconnected": "connected again, to {server}",
        "slow_consumer": "messages come faster than they are printed: {dropped} lost so far",
    }
    if name in texts:
        click.echo(f"natsync: {texts[name].format(**info)}", err=True)


def _envelope(message: Message) -> Iterator[str]:
    """Everything of a message but its payload, each part a line."""
    yield f"# {message.subject}" + (f" (reply {message.reply})" if message.reply else "")
    for name, value in message.headers.fields():
        yield f"# {name}: {value}"
