"""Which process of `pytest -n` runs which tests: those that share something expensive, together in one.

pytest-xdist deals a module's tests out to all processes, and each of them makes the module's fixtures for itself: a
browser, a web server, a wheel, a broker that is killed five times.
"""

from __future__ import annotations

import zlib
from pathlib import PurePath

from xdist.scheduler import LoadScopeScheduling

#: Modules with such fixtures.
TOGETHER = {
    "test_demo",
    "test_django_browser",
    "test_django_servers",
    "test_endurance",
    "test_flask_browser",
    "test_release",
    "test_web_servers",
}
#: Portions that all other tests are dealt out in; a portion each would take the scheduler long.
PORTIONS = 1500


class Scheduling(LoadScopeScheduling):
    """The modules first, each as a whole; then the portions."""

    def _split_scope(self, nodeid: str) -> str:
        module = PurePath(nodeid.partition("::")[0]).stem
        return module if module in TOGETHER else str(zlib.crc32(nodeid.encode()) % PORTIONS)
