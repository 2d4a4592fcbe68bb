"""Budgets of retries: a token bucket for each subject, so that many callers together cannot multiply an outage.

A policy bounds what one caller does. When a thousand callers meet the same dead responder, each keeps within its own,
and the sum is a thousandfold load. So retries of one subject, of all threads of the process, spend from one bucket.
The numbers are those of Finagle's RetryBudget, with a larger burst: a fifth of the calls, and ten a second besides.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict

from natsync.concurrency import after_fork_in_child

log = logging.getLogger("natsync.retry")

#: Retries that may be made at once after a quiet time.
BURST = 100.0
#: Retries a second that are always allowed.
PER_SECOND = 10.0
#: Retries that each call (its first try) allows in addition.
PER_CALL = 0.2
#: Subjects that are remembered at most; the one that was not used for the longest time is forgotten, with its debt.
MOST_SUBJECTS = 1000


class Bucket:
    """The tokens of one subject. Safe from any thread."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._lock = threading.Lock()
        self._tokens = BURST
        self._since = time.monotonic()
        self._empty = False

    def called(self) -> None:
        """There is a call, which makes its first try."""
        with self._lock:
            self._tokens = min(BURST, self._filled_locked() + PER_CALL)

    def take(self) -> bool:
        """Spend a token for a retry; False if there is none, and the retry is not to be made."""
        with self._lock:
            tokens = self._filled_locked()
            enough = tokens >= 1
            self._tokens = tokens - enough
            first, self._empty = not enough and not self._empty, not enough
        if first:
            log.warning("too many retries on %r: some are left out until calls succeed again", self._subject)
        return enough

    def _filled_locked(self) -> float:
        now = time.monotonic()
        passed, self._since = now - self._since, now
        return min(BURST, self._tokens + passed * PER_SECOND)


class Budgets:
    """The buckets of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def of(self, subject: str) -> Bucket:
        """The subject's bucket."""
        with self._lock:
            bucket = self._buckets.pop(subject, None) or Bucket(subject)
            self._buckets[subject] = bucket
            if len(self._buckets) > MOST_SUBJECTS:
                self._buckets.popitem(last=False)
            return bucket

    def __len__(self) -> int:
        return len(self._buckets)


budgets = Budgets()


def of(subject: str) -> Bucket:
    """The bucket of a subject in this process."""
    return budgets.of(subject)


def _renew_in_child() -> None:
    global budgets
    budgets = Budgets()


after_fork_in_child(_renew_in_child)
