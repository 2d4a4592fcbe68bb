"""Two states of natsync beside each other: python benchmarks/compare.py OLD [NEW]. By hand; no test depends on it.

OLD and NEW name commits, or directories that hold a checkout; NEW is this checkout if left out. The jobs are run.py's,
natsync on both sides, the two states taking turns round after round. Printed are ratios: of the figures, and of the
processor time that both sides used, which says more on a busy machine. Above 1 means that NEW is better.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lab
from jobs import FULL, QUICK, Job, jobs
from lab import Peer, PeerFailed

#: Seconds that one client may take.
CLIENT_SECONDS = 60.0


@contextlib.contextmanager
def state(name: str) -> Iterator[Path]:
    """The directory with natsync as it was at a commit, or a directory as it is."""
    if Path(name).is_dir():
        yield Path(name).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="natsync-bench-") as directory:
        command = ["git", "-C", str(lab.CHECKOUT), "archive", "--format=tar", name, "natsync"]
        archive = subprocess.run(command, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", directory], input=archive, check=True)
        yield Path(directory)


def measured(job: Job, tree: Path, server_binary: str, subject: str) -> tuple[float, float]:
    """One measurement: the job's figure, and the seconds of processor time that both sides used.

    Raises:
        PeerFailed: no result, or a flawed one.
    """
    peer = Peer("natsync", (sys.executable, str(lab.HERE / "peers" / "natsync_peer.py")))
    os.environ["PYTHONPATH"] = str(tree)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(lab.nats_server(server_binary))
        before = _children_seconds()  # not the server's, which ends behind this block
        with contextlib.ExitStack() as sides:
            if job.server is not None:
                sides.enter_context(lab.serving(peer, _on(job.server, subject), url))
            result = lab.measure(peer, _on(job.client, subject), url, CLIENT_SECONDS)
        used = _children_seconds() - before
    flaw = job.flaw(result)
    if flaw:
        raise PeerFailed(flaw)
    return job.figure(result), used


def _on(arguments: tuple[str, ...], subject: str) -> tuple[str, ...]:
    return tuple(subject if argument == "SUBJECT" else argument for argument in arguments)


def _children_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure two states of natsync beside each other.")
    parser.add_argument("old", help="a commit, or a directory with a checkout")
    parser.add_argument("new", nargs="?", default=str(lab.CHECKOUT), help="the same; this checkout if left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", default="", help="run only the jobs whose name contains this text")
    options = parser.parse_args()
    chosen = [job for job in jobs(QUICK if options.quick else FULL) if options.only in job.name]
    server_binary = lab.find_server(sys.executable)
    subjects = (f"bench.{number}" for number in itertools.count(1))
    print(f"{options.old} → {options.new}, {options.rounds} rounds; above 1: the new state is better\n")
    print(
        "| job | old | new | new × old | … of each round | processor time |\n| --- | ---: | ---: | ---: | --- | ---: |"
    )
    with state(options.old) as old, state(options.new) as new:
        for job in chosen:
            found: dict[Path, list[tuple[float, float]]] = {old: [], new: []}
            for number in range(options.rounds):
                for tree in (old, new) if number % 2 == 0 else (new, old):
                    try:
                        found[tree].append(measured(job, tree, server_binary, next(subjects)))
                    except PeerFailed as failure:
                        print(f"{job.name}: {'old' if tree is old else 'new'}: {failure}", file=sys.stderr)
            print(_line(job, found[old], found[new]), flush=True)


def _line(job: Job, old: list[tuple[float, float]], new: list[tuple[float, float]]) -> str:
    if not old or not new:
        return f"| {job.name} | – | – | – | – | – |"
    figures = [statistics.median(figure for figure, _ in side) for side in (old, new)]
    used = [statistics.median(seconds for _, seconds in side) for side in (old, new)]
    power = -1 if job.less_is_better else 1
    each = ", ".join(f"{(after[0] / before[0]) ** power:.2f}" for before, after in zip(old, new, strict=False))
    ratio = (figures[1] / figures[0]) ** power
    shown = " | ".join(f"{figure:,.0f} {job.unit}" for figure in figures)
    return f"| {job.name} | {shown} | {ratio:.2f} | {each} | {used[0] / used[1]:.2f} |"


if __name__ == "__main__":
    main()
