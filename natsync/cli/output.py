"""What commands print: payloads at once and as they are, tables, JSON. A reader that has gone ends the command."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NoReturn

from rich.console import Console, RenderableType
from rich.table import Table

from natsync.cli.failures import OutputClosed


class Screen(Console):
    """A console for tables and live output: standard output, or standard error with stderr=True.

    Colours and the width are rich's business (NO_COLOR, COLUMNS, a pipe); into a pipe nothing is cut to a width.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(highlight=False, stderr=stderr)

    def on_broken_pipe(self) -> NoReturn:
        raise OutputClosed

    def show(self, content: RenderableType) -> None:
        """Print a table or the like; as wide as it needs to be where no terminal sets a width."""
        if not self.is_terminal:
            self.width = _NO_WIDTH
        self.print(content)


#: Columns of what goes into a pipe: more than any has.
_NO_WIDTH = 10_000


def plain_table(*columns: str, right: tuple[str, ...] = (), folds: tuple[str, ...] = ()) -> Table:
    """A table without lines, so that `awk` and people read it alike.

    Columns named in `right` hold numbers; those in `folds` break their text where the terminal is too narrow.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name not in folds, overflow="fold")
    return table


def write_json(value: Any) -> None:
    """Print one line of JSON and flush.

    Raises:
        OutputClosed: nobody reads our output any more.
    """
    with _reader_present():
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def counted(count: int, noun: str) -> str:
    """A number of things: 1 chunk, 2 chunks."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def in_bytes(count: float) -> str:
    """A number of bytes for people: 999 B, 1.5 KiB, 3.0 MiB."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


class PayloadPrinter:
    """Writes each payload as soon as it comes, so that a pipe gets it piece by piece."""

    def __init__(self, *, raw: bool = False, pretty: bool = False, file: IO[bytes] | None = None) -> None:
        """file: where to write instead of standard output."""
        self._end = b"" if raw else b"\n"
        self._pretty = pretty
        self._file = file or sys.stdout.buffer
        self._console = Screen()
        self._colour = file is None and self._console.is_terminal

    def write(self, payload: bytes) -> None:
        """Print one payload and flush.

        Raises:
            OutputClosed: nobody reads our output any more.
        """
        with _reader_present():
            if not (self._pretty and self._write_json(payload)):
                self._file.write(payload + self._end)
            self._file.flush()

    def write_line(self, text: str) -> None:
        """Print a line about the payloads, the same whatever their form."""
        with _reader_present():
            self._file.write(text.encode("utf-8", "surrogateescape") + b"\n")
            self._file.flush()

    def _write_json(self, payload: bytes) -> bool:
        """Print the payload indented; False, and nothing printed, if it is not JSON."""
        try:
            value = json.loads(payload)
        except ValueError:
            return False
        text = json.dumps(value, indent=2, ensure_ascii=False)
        if self._colour:
            self._console.print_json(text)
        else:
            self._file.write(text.encode("utf-8", "surrogateescape") + self._end)
        return True


@contextmanager
def _reader_present() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise OutputClosed from error
