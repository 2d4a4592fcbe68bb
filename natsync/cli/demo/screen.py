"""How the demo looks: headings, pieces with their times, checks. Knows nothing of NATS.

Colours and the width are rich's business (NO_COLOR, COLUMNS, a pipe); where output is not UTF-8, plain
letters take the place of signs. Into a pipe no line is wrapped.
"""

from rich.table import Table
from rich.text import Text

from natsync.cli import output

#: Colours of those who take part; what belongs to one of them is printed in its colour.
_STYLES = {
    "nats-server": "blue",
    "third party": "yellow",
    "subscriber": "green",
    "handler": "green",
    "relay": "green",
    "ticker": "magenta",
    "client": "cyan",
}


#: Characters of a protocol line that are shown; the server's INFO has several hundred.
_WIRE_WIDTH = 100


class Screen:
    """Prints the demo and counts the checks that failed. Used by the main thread only."""

    def __init__(self) -> None:
        self._console = output.Screen()
        ascii_only = self._console.options.ascii_only
        self._bar, self._good, self._bad = ("| ", "ok", "FAILED") if ascii_only else ("│ ", "✓", "✗ FAILED")
        self._scenes = 0
        self.passed = 0
        self.failed = 0

    def title(self, text: str, below: str) -> None:
        self._print(Text(text, style="bold"))
        self._print(Text(below, style="dim"))
        self._print(Text())

    def scene(self, title: str) -> None:
        """A heading; scenes are numbered."""
        self._scenes += 1
        self._print(Text())
        self._console.rule(Text(f"{self._scenes}  {title}", style="bold"), align="left", style="dim")

    def step(self, who: str, text: str) -> None:
        """What one of those who take part does now."""
        self._row(Text(f"  {who:<12} ", _STYLES.get(who, "")), Text(text))

    def piece(self, seconds: float, text: str, who: str) -> None:
        """One piece, as it came, so many seconds after the request."""
        style = _STYLES.get(who, "")
        self._row(Text.assemble(_clock(seconds), (self._bar, style)), Text(text, style))

    def wire(self, direction: str, text: str) -> None:
        """One line of the NATS protocol; `<` from the server, `>` to it. A long one is cut."""
        style = _STYLES["client"] if direction == ">" else _STYLES["nats-server"]
        shown = text if len(text) <= _WIRE_WIDTH else text[:_WIRE_WIDTH] + " ..."
        self._row(Text(f"  {direction} ", style), Text(shown, no_wrap=True, overflow="ellipsis"))

    def error(self, error: BaseException, seconds: float) -> None:
        """An exception that the client got, so many seconds after the request."""
        kind = f"{type(error).__name__}: "
        self._row(_clock(seconds), Text.assemble((kind, "bold red"), str(error)))

    def check(self, ok: bool, text: str) -> None:
        """Say whether what the text claims is so; a claim that is not makes the demo fail."""
        if ok:
            self.passed += 1
            self._row(Text(f"  {self._good} ", "bold green"), Text(text))
        else:
            self.failed += 1
            self._row(Text(f"  {self._bad} ", "bold red"), Text(text, "red"))

    def verdict(self, seconds: float) -> None:
        """The last line."""
        self._print(Text())
        checks = f"{self.passed + self.failed} checks in {seconds:.1f} s"
        if self.failed:
            self._print(Text(f"{checks}, {self.failed} failed", style="bold red"))
        else:
            self._print(Text(f"{checks}, all passed", style="bold green"))

    def _row(self, head: Text, text: Text) -> None:
        """A line whose text, where it must be wrapped, stays right of its head."""
        if not self._console.is_terminal:
            self._print(Text.assemble(head, text))
            return
        grid = Table.grid()
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(head, text)
        self._console.print(grid)

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=not self._console.is_terminal)


def _clock(seconds: float) -> Text:
    return Text(f"  {seconds:7.3f} s ", "dim")
