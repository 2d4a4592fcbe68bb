"""The benchmark's one command: python benchmarks/run.py. README.md beside it says what the figures mean.

It makes an environment of its own, runs every job with every pairing of peers in turn, round after round, and
prints one Markdown table. A peer that fails or loses data is a remark in the table. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lab
from jobs import FULL, QUICK, Job, jobs
from lab import Peer, PeerFailed
from table import Row, ratios, render

#: Environment variable naming a Go program that speaks the peers' command line.
GO_PEER = "NATSYNC_GO_PEER"

#: Pairings that the table's ratios are taken to, where they were measured.
BASELINES = ("nats-py", "Go")


#: What the forms of the two sides are measured at, beside the usual ones.
STREAMS = ("stream", "tokens", "large", "streams")
REQUESTS = ("request", "threads")


@dataclass(frozen=True)
class Pairing:
    """Who serves and who asks, under one name, at which kinds of jobs. sends, reads: the form, as peers name it."""

    name: str
    server: Peer
    client: Peer
    kinds: tuple[str, ...] = (*STREAMS, "first", *REQUESTS, "publish")
    sends: str = ""
    reads: str = ""


@dataclass(frozen=True)
class Limits:
    """What a run may take: seconds for one client, and seconds after which no measurement starts any more."""

    rounds: int
    client: float
    total: float


def pairings(python: str, go: Peer | None) -> list[Pairing]:
    natsync, nats_py, pynats2, grpcio = (
        lab.python_peer(name, python) for name in ("natsync", "nats-py", "pynats2", "grpcio")
    )
    pairs = [
        Pairing("natsync", natsync, natsync),
        Pairing("natsync, send_many", natsync, natsync, ("stream", "tokens"), sends="send_many"),
        Pairing("natsync, generator", natsync, natsync, ("stream", "tokens"), sends="generator"),
        Pairing("natsync, one chunk a message", natsync, natsync, ("stream",), sends="single"),
        Pairing("natsync, plain mode", natsync, natsync, ("stream", "streams"), reads="plain"),
        Pairing("natsync, callback", natsync, natsync, ("stream", "streams"), reads="callback"),
        Pairing("nats-py", nats_py, nats_py, (*STREAMS, *REQUESTS, "publish")),
        Pairing("nats-py, callback", nats_py, nats_py, ("stream", "streams"), reads="callback"),
        Pairing("pynats2", pynats2, pynats2, ("stream", "streams", *REQUESTS, "publish")),
        Pairing("grpcio", grpcio, grpcio, (*STREAMS, *REQUESTS)),
    ]
    if go:
        pairs.append(Pairing("Go", go, go))
        pairs.append(Pairing("natsync client, Go server", go, natsync, ("stream", "large", "first", *REQUESTS)))
        pairs.append(Pairing("Go client, natsync server", natsync, go, ("stream", *REQUESTS)))
    return pairs


def measured(job: Job, pairing: Pairing, server_binary: str, subject: str, timeout: float) -> dict[str, object]:
    """One measurement: a fresh nats-server, the job's server side, then its client's result.

    Raises:
        PeerFailed: one side did not start or gave no result.
    """

    def filled(arguments: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(subject if argument == "SUBJECT" else argument for argument in arguments)

    def in_form(arguments: tuple[str, ...], form: str) -> tuple[str, ...]:
        return (*filled(arguments), "-form", form) if form else filled(arguments)

    with contextlib.ExitStack() as stack:
        url = stack.enter_context(lab.nats_server(server_binary))
        if job.server is not None:
            stack.enter_context(lab.serving(pairing.server, in_form(job.server, pairing.sends), url))
        return lab.measure(pairing.client, in_form(job.client, pairing.reads), url, timeout)


def measure_into(row: Row, pairing: Pairing, server_binary: str, subject: str, timeout: float) -> None:
    """Add one measurement to the row: its figure and what was wrong with it."""
    try:
        result = measured(row.job, pairing, server_binary, subject, timeout)
        figure, flaw = row.job.figure(result), row.job.flaw(result)
    except PeerFailed as failure:
        row.flaws.append(str(failure))
        return
    except (KeyError, TypeError, ValueError) as error:
        row.flaws.append(f"result not understood: {error!r}")
        return
    row.figures.append(figure)
    if flaw:
        row.flaws.append(flaw)


def run(all_jobs: list[Job], pairs: list[Pairing], server_binary: str, limits: Limits) -> list[Row]:
    """Every job with every pairing, round after round; the order of the pairings turns round each time."""
    cells = [(job, pair) for job, pair in itertools.product(all_jobs, pairs) if job.kind in pair.kinds]
    rows = {cell: Row(cell[0], cell[1].name) for cell in cells}
    subjects = (f"bench.{number}" for number in itertools.count(1))
    longest = 0.0
    for number in range(limits.rounds):
        started = time.monotonic()
        if number and started + longest > limits.total:
            print(f"no time for round {number + 1}", file=sys.stderr)
            break
        order = pairs if number % 2 == 0 else pairs[::-1]
        for cell in itertools.product(all_jobs, order):
            if cell not in rows:
                continue
            if time.monotonic() > limits.total:
                rows[cell].flaws.append("not run, time was up")
                continue
            measure_into(rows[cell], cell[1], server_binary, next(subjects), limits.client)
            _progress(number, rows[cell])
        longest = max(longest, time.monotonic() - started)
    return list(rows.values())


def _rounds(rows: list[Row]) -> str:
    done = max((len(row.figures) for row in rows), default=0)
    return f"{done} round" + ("" if done == 1 else "s")


def _progress(number: int, row: Row) -> None:
    latest = f"{row.figures[-1]:,.0f} {row.job.unit}" if row.figures else "–"
    remark = f" ({row.flaws[-1]})" if row.flaws else ""
    print(f"round {number + 1}: {row.job.name}: {row.pairing}: {latest}{remark}", file=sys.stderr, flush=True)


def describe(python: str, server_binary: str) -> str:
    """One line on the machine and the versions, for whoever reads the table later."""
    names = ("natsync", "nats-py", "pynats2", "grpcio")
    script = (
        "import platform; from importlib.metadata import version, PackageNotFoundError\n"
        "print('Python', platform.python_version(), end='')\n"
        f"for name in {names!r}:\n"
        "    try: print(',', name, version(name), end='')\n"
        "    except PackageNotFoundError: pass\n"
    )
    versions = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=30).stdout
    server = subprocess.run([server_binary, "--version"], capture_output=True, text=True, timeout=30).stdout
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return f"{system}; {versions}; {server.strip().replace(': v', ' ')}; {time.strftime('%Y-%m-%d')}"


@contextlib.contextmanager
def environment(here: bool) -> Iterator[str]:
    """The interpreter for the Python peers: this one, measuring this checkout, or a new environment's."""
    if here:
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(lab.CHECKOUT) + (os.pathsep + path if path else "")
        yield sys.executable
        return
    with tempfile.TemporaryDirectory(prefix="natsync-bench-") as directory:
        print("making an environment …", file=sys.stderr, flush=True)
        yield lab.make_environment(Path(directory))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure natsync beside other NATS clients, in one run.")
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds, some minutes")
    parser.add_argument("--here", action="store_true", help="use this interpreter and its packages")
    parser.add_argument("--rounds", type=int, help="rounds to run (5; with --quick 2)")
    parser.add_argument("--only", help="run only the jobs whose name contains this text")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the ratios, too (with --here: needs matplotlib)")
    parser.add_argument("--peers", help="comma-separated: run only pairings whose name contains one of these")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    started = time.monotonic()
    rounds = options.rounds or (2 if options.quick else 5)
    limits = Limits(rounds, 10.0, started + 240.0) if options.quick else Limits(rounds, 60.0, started + 3600.0)
    chosen = [job for job in jobs(QUICK if options.quick else FULL) if (options.only or "") in job.name]
    with contextlib.ExitStack() as stack:
        python = stack.enter_context(environment(options.here))
        wanted = (options.peers or "").split(",")
        go = stack.enter_context(lab.go_peer(os.environ.get(GO_PEER)))
        every = pairings(python, go)
        pairs = [pair for pair in every if any(name in pair.name for name in wanted)]
        server_binary = lab.find_server(python)
        rows = run(chosen, pairs, server_binary, limits)
        print(f"{describe(python, server_binary)}; {_rounds(rows)}, {time.monotonic() - started:.0f} s\n")
        print(render(rows, BASELINES))
        if options.plot:
            lab.draw(python, ratios(rows, "Go" if go else "nats-py"), options.plot)


if __name__ == "__main__":
    main()
