"""The part of the suite that means something under gevent, with everything monkey-patched: `python gevent_job.py`.

Not a module of tests but what runs them: gevent is patched in before natsync, pytest or anything else is imported, so
it cannot be part of the main run. Threads are greenlets then, which are switched where they wait and nowhere else.
Tests that count on more than that are left out, each with its reason, which is printed. Further arguments are
pytest's. Needs gevent beside natsync[test].
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import sys  # noqa: E402
import threading  # noqa: E402
from pathlib import Path  # noqa: E402

import gevent  # noqa: E402
import pytest  # noqa: E402

HERE = Path(__file__).resolve().parent

#: The modules of tests that run: what users call, what a link must survive, and what waits.
MODULES = [
    "client", "subscription", "stream_client", "sender", "subscriber", "connection", "faults", "tls", "pool", "retry",
    "lifecycle", "gevent",
]  # fmt: skip

RAISES = "gevent: a read of a socket that is shut down raises instead of returning b''"
ANY_GREENLET = "gevent: a signal that a test raises comes to the greenlet that raises it, not to the main one"
NEVER_SWITCHES = "gevent: it sends in a tight loop of one process, whose other greenlets do not run meanwhile"
NO_THREADS = "gevent: it looks at what a thread is doing, and a greenlet is none"
#: What is left out: the end of a test's id, without parameters, and why.
LEFT_OUT = {
    "test_lifecycle.py::test_ctrl_c_in_force_reconnect_leaves_a_client_that_works": ANY_GREENLET,
    "test_stream_client.py::test_close_during_a_retrys_wait_wakes_the_waiting_next": NO_THREADS,
    "test_tls.py::test_shutdown_wakes_a_reader": RAISES,
    "test_sender.py::test_closing_wakes_a_blocked_read_from_a_third_party_on_cancel": RAISES,
    "test_sender.py::test_an_end_from_one_thread_comes_behind_every_send_that_had_returned": NEVER_SWITCHES,
}


class LeftOut:
    """The plugin that marks what is left out, and sees to it that the list names only tests that there are."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = set()
        for item in items:
            name = item.nodeid.rpartition("/")[2].partition("[")[0]
            if name in LEFT_OUT:
                found.add(name)
                item.add_marker(pytest.mark.skip(reason=LEFT_OUT[name]))
        modules = {item.nodeid.rpartition("/")[2].partition("::")[0] for item in items}
        gone = {name for name in LEFT_OUT if name.partition("::")[0] in modules} - found
        if gone and len(modules) > 1:
            raise pytest.UsageError(f"gevent_job.py leaves out tests that do not exist: {sorted(gone)}")


def main(arguments: list[str]) -> int:
    assert monkey.is_module_patched("threading")
    print(f"gevent {gevent.__version__}, threads are {threading.Thread(target=print).__class__.__mro__[-2]}")
    named = [argument for argument in arguments if argument.endswith(".py") or ".py::" in argument]
    modules = [] if named else [str(HERE / f"test_{name}.py") for name in MODULES]
    return int(pytest.main(["-rsfE", "-m", "not slow", *modules, *arguments], plugins=[LeftOut()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
