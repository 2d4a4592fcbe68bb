"""From measured figures to the Markdown table: medians, spreads, ratios, and what went wrong."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from jobs import Job

#: Different flaws of a row that its remark spells out.
SHOWN_FLAWS = 2


@dataclass
class Row:
    """All rounds of one pairing at one job."""

    job: Job
    pairing: str
    figures: list[float] = field(default_factory=list)
    flaws: list[str] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        return statistics.median(self.figures) if self.figures else None


def render(rows: list[Row], baselines: Iterable[str]) -> str:
    """The rows as a table, with a column of ratios to each baseline pairing that was measured."""
    present = [name for name in baselines if any(row.pairing == name and row.figures for row in rows)]
    lines = [
        _line(["job", "peers", "median", "spread", *(f"× {name}" for name in present), "remarks"]),
        _line(["---", "---", "---:", "---:", *("---:" for _ in present), "---"]),
    ]
    previous = None
    for row in rows:
        job_name = row.job.name if row.job is not previous else ""
        previous = row.job
        ratios = [_ratio(row, _baseline(rows, row.job, name)) for name in present]
        lines.append(_line([job_name, row.pairing, _median(row), _spread(row), *ratios, _remarks(row)]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _baseline(rows: list[Row], job: Job, pairing: str) -> float | None:
    return next((row.median for row in rows if row.job is job and row.pairing == pairing), None)


def _ratio(row: Row, baseline: float | None) -> str:
    """The row's speed as a multiple of the baseline's: above 1 is faster, for rates and for times alike.

    A row with a flaw gets none: the rate of what was not lost says nothing.
    """
    if row.flaws or not row.median or not baseline:
        return "–"
    ratio = baseline / row.median if row.job.less_is_better else row.median / baseline
    return f"{ratio:.2f}"


def _median(row: Row) -> str:
    return "–" if row.median is None else f"{row.median:,.0f} {row.job.unit}"


def _spread(row: Row) -> str:
    return f"{min(row.figures):,.0f} … {max(row.figures):,.0f}" if len(row.figures) > 1 else "–"


def _remarks(row: Row) -> str:
    """The first flaws, each different one once, with the number of rounds that had any."""
    if not row.flaws:
        return ""
    different = list(dict.fromkeys(row.flaws))
    more = "; …" if len(different) > SHOWN_FLAWS else ""
    rounds = "1 round" if len(row.flaws) == 1 else f"{len(row.flaws)} rounds"
    return f"{'; '.join(different[:SHOWN_FLAWS])}{more} ({rounds})"


def ratios(rows: list[Row], baseline: str) -> dict[str, object]:
    """For a picture: of each job, each pairing's speed as a multiple of the baseline's."""
    jobs = dict.fromkeys(row.job for row in rows)
    found: dict[str, dict[str, float]] = {}
    for job in jobs:
        of_job = found[job.name] = {}
        for row in rows:
            ratio = _ratio(row, _baseline(rows, job, baseline)) if row.job is job else "–"
            if ratio != "–":
                of_job[row.pairing] = float(ratio)
    return {"baseline": baseline, "jobs": found}
