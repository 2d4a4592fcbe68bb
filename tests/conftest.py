"""What holds for every test: natsync's fixtures are there, no thread of natsync is left behind, no credential shows.

`pytest --lock-order` runs the suite with instrumented locks and fails at the end if their order was broken.
"""

from __future__ import annotations

import importlib
import signal
from collections.abc import Generator, Iterator

import hypothesis
import pytest

import lock_order
import secrecy
from natsync.concurrency import run_waiting
from natsync.testing import eventually
from support import natsync_threads

#: Seconds that the threads of a closed client or server may take to go.
THREADS_GONE = 10.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--lock-order",
        action="store_true",
        help="record in which order natsync's locks are taken, and what is done under them; report at the end",
    )


def pytest_configure(config: pytest.Config) -> None:
    # An installed natsync brings its plugin as an entry point under this name; a source tree does not.
    if not config.pluginmanager.has_plugin("natsync"):
        config.pluginmanager.register(importlib.import_module("natsync.testing.plugin"), "natsync")
    # A shell that starts a job in the background has it ignore SIGINT, and then no Ctrl-C of a test would arrive.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # No deadline an example: a shared machine may stall any of them.
    hypothesis.settings.register_profile("natsync", deadline=None)
    hypothesis.settings.load_profile("natsync")
    secrecy.install()
    if config.getoption("--lock-order"):
        config.pluginmanager.register(lock_order.Plugin(), "natsync-lock-order")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    if config.getoption("dist") != "load":  # the user wants another one
        return None
    return importlib.import_module("scheduling").Scheduling(config, log)


@pytest.fixture(params=["framed", "plain"])
def mode(request: pytest.FixtureRequest) -> str:
    """The mode of streams between natsync's own sides, where both matter; support has marks for one of them."""
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture(autouse=True)
def _no_credential_shown() -> Iterator[None]:
    yield
    finds = secrecy.watch.take()
    if finds:
        pytest.fail("credentials are shown in\n" + "\n".join(finds), pytrace=False)


@pytest.fixture(autouse=True)
def _no_thread_left_behind(request: pytest.FixtureRequest, _no_credential_shown: None) -> Iterator[None]:
    before = natsync_threads()
    mark = request.node.get_closest_marker("threads_gone")
    patience = mark.args[0] if mark else THREADS_GONE
    yield
    run_waiting()  # what a test that let no thread start left to be logged must not be heard by the next one
    try:
        eventually(lambda: natsync_threads() <= before, patience)
    except AssertionError:
        names = sorted(thread.name for thread in natsync_threads() - before)
        pytest.fail(f"natsync threads outlive the test by {patience:g} s: {', '.join(names)}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test's report must not show a credential either: it is what gets pasted into an issue."""
    report = yield
    if report.failed:
        shown = [secrecy.watch.shows(text) for text in (str(call.excinfo and call.excinfo.value), report.caplog)]
        for text in filter(None, shown):
            report.sections.append(("a credential is shown", text))
    return report
