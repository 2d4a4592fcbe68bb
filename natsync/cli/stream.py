"""`natsync stream`: one request, and each chunk of its answer as it comes."""

import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import IO

import click
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from natsync.cli.connection import connected, connection_options
from natsync.cli.output import PayloadPrinter, Screen, counted, in_bytes
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
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="File to write the chunks to, as they come; - is standard output.",
)
@click.option(
    "--progress/--no-progress",
    default=None,
    help="Count chunks and bytes on standard error; on if that is a terminal and the chunks go elsewhere.",
)
@connection_options
def stream(
    subject: str,
    payload: str,
    timeout: float | None,
    idle_timeout: float | None,
    headers: tuple[tuple[str, str], ...],
    raw: bool,
    pretty: bool,
    output: str | None,
    progress: bool | None,
) -> None:
    """Send PAYLOAD to SUBJECT and print the chunks of the answer, one a line.

    PAYLOAD `-` is read from standard input. Ctrl-C, or a reader that leaves the pipe, cancels the stream. What has come
    by then stays in the file of --output, which is as it was before if nothing has.
    """
    if output == "-":
        output = None
    data = read_payload(payload)
    if progress is None:
        progress = sys.stderr.isatty() and (output is not None or not sys.stdout.isatty())
    with ExitStack() as stack:
        client = stack.enter_context(connected())
        file = None if output is None else stack.enter_context(_opened(output))
        printer = PayloadPrinter(raw=raw, pretty=pretty, file=file)
        meter = stack.enter_context(Meter(subject, shown=progress))
        chunks = stack.enter_context(
            client.stream(subject, data, timeout=timeout, idle_timeout=idle_timeout, headers=group_headers(headers))
        )
        for chunk in chunks:
            if file is not None and not meter.chunks:
                _empty(file)
            printer.write(chunk)
            meter.count(chunk)
        if file is not None and not meter.chunks:
            _empty(file)
    if output is not None:
        click.echo(f"wrote {counted(meter.chunks, 'chunk')} ({in_bytes(meter.bytes)}) to {output}", err=True)


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    """The file of --output, which is written as chunks come: a failed stream leaves what came before.

    It is opened at once, so that one that cannot be written is told before anything is sent; and keeps what is in it
    until _empty(), so that a request that nobody answers costs no file.
    """
    is_new = not os.path.lexists(path)
    with open(path, "wb", opener=_keeping) as file:
        try:
            yield file
        except BaseException:
            if is_new and not os.fstat(file.fileno()).st_size:
                with suppress(OSError):
                    os.unlink(path)
            raise


def _keeping(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_TRUNC, 0o666)


def _empty(file: IO[bytes]) -> None:
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a pipe or device has no length
        file.truncate(0)


class Meter:
    """Counts chunks and bytes, and shows them on standard error while they come."""

    def __init__(self, subject: str, *, shown: bool) -> None:
        self.chunks = self.bytes = 0
        self._began = time.monotonic()
        self._progress = None
        if shown:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[numbers]}"))
            self._progress = Progress(*columns, TimeElapsedColumn(), console=Screen(stderr=True))
            self._task = self._progress.add_task(subject, total=None, numbers="waiting for the first chunk")

    def count(self, chunk: bytes) -> None:
        self.chunks += 1
        self.bytes += len(chunk)
        if self._progress is not None:
            seconds = max(time.monotonic() - self._began, 1e-6)
            rate = f"{in_bytes(self.bytes / seconds)}/s"
            self._progress.update(
                self._task, numbers=f"{counted(self.chunks, 'chunk')}, {in_bytes(self.bytes)}, {rate}"
            )

    def __enter__(self) -> "Meter":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
