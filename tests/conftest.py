"""What holds for every test: natsync's fixtures are there, and no thread of natsync is left behind."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import hypothesis
import pytest

from natsync.testing import eventually
from support import natsync_threads

#: Seconds that the threads of a closed client or server may take to go.
THREADS_GONE = 3.0


def pytest_configure(config: pytest.Config) -> None:
    # An installed natsync brings its plugin as an entry point under this name; a source tree does not.
    if not config.pluginmanager.has_plugin("natsync"):
        config.pluginmanager.register(importlib.import_module("natsync.testing.plugin"), "natsync")
    # No deadline an example: a shared machine may stall any of them.
    hypothesis.settings.register_profile("natsync", deadline=None)
    hypothesis.settings.load_profile("natsync")


@pytest.fixture(autouse=True)
def _no_thread_left_behind() -> Iterator[None]:
    before = natsync_threads()
    yield
    try:
        eventually(lambda: natsync_threads() <= before, THREADS_GONE)
    except AssertionError:
        names = sorted(thread.name for thread in natsync_threads() - before)
        pytest.fail(f"natsync threads outlive the test by {THREADS_GONE:g} s: {', '.join(names)}", pytrace=False)
