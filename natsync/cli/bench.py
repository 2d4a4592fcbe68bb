"""`natsync bench`: how fast this machine, this server and natsync are together. A quick look, not a study."""

import threading
import time
from collections.abc import Callable
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import natsync
from natsync.cli import plot
from natsync.cli.bench_peer import peer
from natsync.cli.connection import connected, connection_options
from natsync.cli.output import PayloadPrinter, Screen, in_bytes, write_json
from natsync.cli.parameters import duration
from natsync.subject import unique

#: How many, unless told otherwise: a second or two on an ordinary machine.
MESSAGES = {"stream": 200_000, "request": 5_000, "pub": 200_000}
#: Seconds between two looks at the counters: the grain of the plot.
TICK = 0.1


@click.command(short_help="Measure chunks, requests or messages a second.")
@click.argument("kind", type=click.Choice(("stream", "request", "pub")), default="stream")
@click.option("--messages", type=click.IntRange(min=1), help="Chunks, requests or messages in all.")
@click.option("--size", type=click.IntRange(min=0), default=128, show_default=True, help="Bytes of each.")
@click.option("--clients", type=click.IntRange(1, 1000), default=1, show_default=True, help="Threads that ask at once.")
@click.option("--timeout", type=duration, default=60.0, show_default=True, help="Most time for all of it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, and no bars and plot.")
@click.option("--no-plot", is_flag=True, help="Only the figures.")
@connection_options
def bench(
    kind: str, messages: int | None, size: int, clients: int, timeout: float, as_json: bool, no_plot: bool
) -> None:
    """Measure a stream's chunks, requests, or published messages a second through the server.

    The other side is a process of its own, which this command starts and ends. The threads share one connection, as
    those of a web server would.
    """
    messages = messages or MESSAGES[kind]
    clients = min(clients, messages)
    subject = f"natsync.bench.{unique()}"
    # The other side is forked before there is a connection, or a thread.
    with peer(kind, subject, messages, size) as other, connected() as client:
        other.wait_ready(timeout)
        run = Run(client, kind, subject, size, shares(messages, clients), timeout)
        run.go(shown=not as_json)
        figures = run.figures()
        if kind == "pub":
            arrived, last = other.wait_arrived()
            figures["arrived"] = arrived
            figures["arrived_per_second"] = round(arrived / max(last - run.began, 1e-9), 1)
    if as_json:
        write_json(figures)
        return
    printer = PayloadPrinter()
    for line in lines(figures):
        printer.write_line(line)
    if not no_plot:
        text = run.plot()
        if text:
            printer.write_line(text)


def shares(total: int, parts: int) -> list[int]:
    """The total in nearly equal parts."""
    return [total // parts + (number < total % parts) for number in range(parts)]


class Run:
    """One measurement: the threads, what they have done, and when."""

    def __init__(
        self, client: natsync.Client, kind: str, subject: str, size: int, counts: list[int], timeout: float
    ) -> None:
        self._client = client
        self._kind = kind
        self._subject = subject
        self._payload = b"x" * size
        self._counts = counts
        self._timeout = timeout
        self._done = [0] * len(counts)
        self._latencies: list[list[float]] = [[] for _ in counts]
        self._failure: BaseException | None = None
        self._running = len(counts)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._samples: list[tuple[float, int]] = []
        self.began = self._seconds = 0.0

    def go(self, *, shown: bool) -> None:
        """Run the threads to their end, with a bar for each; raises what one of them raised."""
        work: dict[str, Callable[[int], None]] = {"stream": self._stream, "request": self._ask, "pub": self._publish}
        threads = [
            threading.Thread(target=self._work, args=(work[self._kind], number), daemon=True)
            for number in range(len(self._counts))
        ]
        columns = (BarColumn(), TaskProgressColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        screen = Screen(stderr=True)
        with Progress(
            TextColumn("{task.description}"),
            *columns,
            TimeRemainingColumn(),
            console=screen,
            disable=not (shown and screen.is_terminal),
        ) as progress:
            bars = [
                progress.add_task(f"{self._kind} {number + 1}", total=count, rate="")
                for number, count in enumerate(self._counts)
            ]
            self.began = time.monotonic()
            self._samples = [(0.0, 0)]
            for thread in threads:
                thread.start()
            while not self._over.wait(TICK):
                self._look(progress, bars)
            self._seconds = max(time.monotonic() - self.began, 1e-9)
            self._look(progress, bars)
        if self._failure is not None:
            raise self._failure

    def _look(self, progress: Progress, bars: list[Any]) -> None:
        seconds = time.monotonic() - self.began
        self._samples.append((seconds, sum(self._done)))
        for bar, done in zip(bars, self._done, strict=True):
            progress.update(bar, completed=done, rate=f"{done / max(seconds, 1e-9):,.0f}/s")
        if seconds > self._timeout and not self._over.is_set():
            raise natsync.TimedOut(f"{sum(self._done)} of {sum(self._counts)} within {self._timeout:g} s")

    def _work(self, function: Callable[[int], None], number: int) -> None:
        try:
            function(number)
        except BaseException as error:
            self._failure = self._failure or error
            self._over.set()
        with self._lock:
            self._running -= 1
            if not self._running:
                self._over.set()

    def _stream(self, number: int) -> None:
        began, count = time.monotonic(), self._counts[number]
        request = {"count": count, "size": len(self._payload)}
        with self._client.stream(self._subject, json=request, timeout=self._timeout) as chunks:
            for _ in chunks:
                if not self._done[number]:
                    self._latencies[number].append(time.monotonic() - began)
                self._done[number] += 1
        if self._done[number] != count:
            raise natsync.StreamError(f"{self._done[number]} of {count} chunks came")

    def _ask(self, number: int) -> None:
        latencies = self._latencies[number]
        for _ in range(self._counts[number]):
            began = time.monotonic()
            self._client.request(self._subject, self._payload, timeout=self._timeout)
            latencies.append(time.monotonic() - began)
            self._done[number] += 1

    def _publish(self, number: int) -> None:
        for _ in range(self._counts[number]):
            self._client.publish(self._subject, self._payload)
            self._done[number] += 1
        self._client.flush(self._timeout)

    # -- what came out ---------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """The figures, rounded: seconds, rates, and the latencies there are."""
        total, size = sum(self._counts), len(self._payload)
        found: dict[str, Any] = {
            "kind": self._kind,
            "messages": total,
            "size_bytes": size,
            "clients": len(self._counts),
            "seconds": round(self._seconds, 4),
            "per_second": round(total / self._seconds, 1),
            "bytes_per_second": round(total * size / self._seconds),
        }
        latencies = sorted(latency for one in self._latencies for latency in one)
        if latencies:
            found["latency_ms"] = {
                name: round(1e3 * latencies[min(len(latencies) - 1, int(part * len(latencies)))], 3)
                for name, part in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
            }
        return found

    def plot(self) -> str:
        """The rate over time."""
        pairs = list(zip(self._samples, self._samples[1:], strict=False))
        rates = [
            (late[1] - early[1]) / max(late[0] - early[0], 1e-9) for early, late in pairs if late[0] - early[0] > 0.02
        ]
        times = [late[0] for early, late in pairs if late[0] - early[0] > 0.02]
        return plot.curve(f"{UNITS[self._kind]} a second", times, rates, xlabel="seconds")


UNITS = {"stream": "chunks", "request": "requests", "pub": "messages"}


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures for people."""
    unit = UNITS[figures["kind"]]
    rate = f"{figures['per_second']:,.0f} {unit}/s   {in_bytes(figures['bytes_per_second'])}/s"
    head = f"{figures['messages']:,} {unit} of {figures['size_bytes']} B, {figures['clients']} at once"
    found = [f"{head}: {figures['seconds']:.2f} s", rate]
    if "arrived" in figures:
        found.append(f"arrived: {figures['arrived']:,}, {figures['arrived_per_second']:,.0f}/s")
    if latency := figures.get("latency_ms"):
        what = "first chunk after" if figures["kind"] == "stream" else "latency"
        found.append(f"{what}: " + "   ".join(f"{name} {value:.2f} ms" for name, value in latency.items()))
    return found
