"""`natsync stream`: one request, and each chunk of its answer as it comes."""

import click

from natsync.cli.connection import connected, connection_options
from natsync.cli.output import PayloadPrinter
from natsync.cli.parameters import duration, group_headers, header, read_payload


@click.command(short_help="Print the chunks of an answer as they come.")
@click.argument("subject")
@click.argument("payload", default="")
@click.option("--timeout", type=duration, help="Most time for the whole stream, as 30, 250ms or 5m.")
@click.option(
    "--idle-timeout",
    type=duration,
    envvar="NATS_TIMEOUT",
    show_envvar=True,
    help="Most time between two chunks.",
)
@click.option(
    "-H",
    "--header",
    "headers",
    type=header,
    metavar="NAME:VALUE",
    multiple=True,
    help="A header of the request.",
)
@click.option("--raw", is_flag=True, help="No newline after a chunk.")
@click.option("--json", "pretty", is_flag=True, help="Indent chunks that are JSON.")
@connection_options
def stream(
    subject: str,
    payload: str,
    timeout: float | None,
    idle_timeout: float | None,
    headers: tuple[tuple[str, str], ...],
    raw: bool,
    pretty: bool,
) -> None:
    """Send PAYLOAD to SUBJECT and print the chunks of the answer, one a line.

    PAYLOAD `-` is read from standard input. Ctrl-C, or a reader that leaves the pipe, cancels the stream.
    """
    printer = PayloadPrinter(raw=raw, pretty=pretty)
    data = read_payload(payload)
    with (
        connected() as client,
        client.stream(
            subject, data, timeout=timeout, idle_timeout=idle_timeout, headers=group_headers(headers)
        ) as chunks,
    ):
        for chunk in chunks:
            printer.write(chunk)
