"""Payloads on standard output: at once, as they are, or as indented JSON. Bytes in, bytes out."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from natsync.cli.failures import OutputClosed


class PayloadPrinter:
    """Writes each payload as soon as it comes, so that a pipe gets it piece by piece."""

    def __init__(self, *, raw: bool = False, pretty: bool = False) -> None:
        self._end = b"" if raw else b"\n"
        self._pretty = pretty
        self._console = Console(highlight=False)

    def write(self, payload: bytes) -> None:
        """Print one payload and flush.

        Raises:
            OutputClosed: nobody reads our output any more.
        """
        with _reader_present():
            if not (self._pretty and self._write_json(payload)):
                sys.stdout.buffer.write(payload + self._end)
            sys.stdout.buffer.flush()

    def write_line(self, text: str) -> None:
        """Print a line about the payloads, the same whatever their form."""
        with _reader_present():
            sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + b"\n")
            sys.stdout.buffer.flush()

    def _write_json(self, payload: bytes) -> bool:
        """Print the payload indented; False, and nothing printed, if it is not JSON."""
        try:
            value = json.loads(payload)
        except ValueError:
            return False
        text = json.dumps(value, indent=2, ensure_ascii=False)
        if self._console.is_terminal:
            self._console.print_json(text)
        else:
            sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + self._end)
        return True


@contextmanager
def _reader_present() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise OutputClosed from error
