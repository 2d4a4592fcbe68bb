"""How a command ends when something went wrong: one line on stderr and an exit status.

1 = the command failed, 2 = usage (click's own), 130 = Ctrl-C, 141 = the reader of our output has gone.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click

#: 128 + SIGINT and 128 + SIGPIPE: what a shell reports for a program that these signals end.
INTERRUPTED = 130
OUTPUT_CLOSED = 141

DEBUG = "natsync.cli.debug"


class MissingExtra(click.ClickException):
    """An optional dependency is not installed."""

    exit_code = 2


class OutputClosed(Exception):
    """Whoever read our standard output has gone (`natsync stream … | head`)."""


@contextmanager
def reported(ctx: click.Context) -> Iterator[None]:
    """Turn what a command raises into its exit status, with one line on stderr."""
    try:
        yield
    except KeyboardInterrupt:
        ctx.exit(INTERRUPTED)
    except OutputClosed:
        _drop_stdout()
        ctx.exit(OUTPUT_CLOSED)
    except (click.UsageError, click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        if ctx.meta.get(DEBUG):
            traceback.print_exc()
        click.echo(f"natsync: {one_line(error)}", err=True)
        ctx.exit(error.exit_code if isinstance(error, click.ClickException) else 1)


def one_line(error: BaseException) -> str:
    """The text of an exception without line breaks; its type's name where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def _drop_stdout() -> None:
    # The interpreter flushes sys.stdout once more at exit; it would complain about the broken pipe.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
