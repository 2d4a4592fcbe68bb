"""Gauges of prometheus_client's multiprocess mode, which outlive the process that set them."""

import os
from contextlib import suppress
from pathlib import Path


def forget_gauges(pid: int | None) -> None:
    """Have the live gauges of a process that has ended count no more, if the environment names their directory.

    As prometheus_client's mark_process_dead() does, but a supervisor need not import that, nor fail with it.
    """
    if directory := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        with suppress(OSError):
            for path in Path(directory).glob(f"gauge_live*_{pid}.db"):
                path.unlink(missing_ok=True)
