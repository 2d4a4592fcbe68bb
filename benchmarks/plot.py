"""Draws run.py's ratios as bars: python plot.py FILE.png, the ratios as JSON on standard input. Needs matplotlib."""

from __future__ import annotations

import json
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

#: Inches of a bar's height and of the space between jobs.
BAR, GAP = 0.16, 0.35


def main() -> None:
    data = json.load(sys.stdin)
    baseline, jobs = data["baseline"], {name: job for name, job in data["jobs"].items() if job}
    bars = sum(len(job) for job in jobs.values())
    figure, axes = pyplot.subplots(figsize=(9, bars * BAR + len(jobs) * GAP + 0.8))
    place, ticks, names = 0.0, [], []
    for job, ratios in jobs.items():
        axes.text(0.0105, place - 0.55 * GAP, job, va="center", fontsize=8, fontweight="bold")
        for peer, ratio in ratios.items():
            ours = peer.startswith("natsync") or peer.endswith("natsync server")
            axes.barh(place, ratio, height=BAR * 0.85, color="#1f77b4" if ours else "#bbbbbb", left=0)
            axes.text(ratio * 1.05, place, f"{ratio:.2f}", va="center", fontsize=6)
            ticks.append(place)
            names.append(peer)
            place += BAR
        place += GAP
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.01, max(max(ratios.values()) for ratios in jobs.values()) * 2)
    axes.set_ylim(place, -GAP)
    axes.set_yticks(ticks, names, fontsize=7)
    axes.set_xlabel(f"speed as a multiple of {baseline} in the same run, logarithmic; to the right is faster")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.tight_layout()
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
