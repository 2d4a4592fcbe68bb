"""Keeps the library's log off the demo's screen, and lets the demo look into it."""

import logging
import queue
import time
from types import TracebackType


class CaughtLog(logging.Handler):
    """Catches what the logger `natsync` is given within the block."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        self._logger = logging.getLogger("natsync")

    def emit(self, record: logging.LogRecord) -> None:
        self._records.put(record)

    def next_with_traceback(self, timeout: float) -> logging.LogRecord | None:
        """The next record that has a traceback; None if there is none within so many seconds."""
        end = time.monotonic() + timeout
        try:
            while True:
                record = self._records.get(timeout=max(0.0, end - time.monotonic()))
                if record.exc_info:
                    return record
        except queue.Empty:
            return None

    def __enter__(self) -> "CaughtLog":
        self._propagated = self._logger.propagate
        self._logger.propagate = False
        self._logger.addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = self._propagated
