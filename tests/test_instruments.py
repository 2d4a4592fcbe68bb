"""The suite's own instruments find what they are there to find: a shown credential, a broken order of locks."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import lock_order
import natsync
import secrecy
from lock_order import PACKAGE, ROOT, Recorder
from natsync.errors import ConnectError
from natsync.testing import eventually
from support import natsync_threads

#: A credential as the suite's own are; written so that no line of source in a traceback contains it.
PLANTED = "S3" + "CRET-planted"

log = logging.getLogger("natsync.test_instruments")


def found() -> str:
    """What the watch has found since the last call; taken, so that it does not fail the test."""
    return "\n".join(secrecy.watch.take())


# -- secrecy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.ERROR])
def test_a_credential_in_a_log_message_is_found(level: int) -> None:
    log.log(level, "connecting with %s", PLANTED)
    assert f"…connecting with {PLANTED}" in found()


def test_a_credential_in_an_argument_that_the_message_leaves_out_is_found() -> None:
    log.debug("connecting%.0s", [PLANTED])
    assert PLANTED in found()


def test_a_credential_in_a_logged_traceback_is_found() -> None:
    try:
        raise ValueError(PLANTED)
    except ValueError:
        log.exception("that went wrong")
    assert f"ValueError: {PLANTED}" in found()


def test_a_log_line_that_cannot_be_written_is_found() -> None:
    log.debug("%d messages", "many")
    assert "cannot be written: TypeError" in found()


def test_a_log_line_without_a_credential_is_no_find() -> None:
    before = secrecy.watch.records
    log.debug("connecting")
    assert secrecy.watch.records > before
    assert found() == ""


def plain() -> None:
    raise natsync.NatsError(f"refused: {PLANTED}")


def by_a_way_of_its_own() -> None:
    raise ConnectError(f"refused: {PLANTED}")


def with_a_cause() -> None:
    try:
        raise OSError(PLANTED)
    except OSError as error:
        raise natsync.TimedOut("not in time") from error


def while_handling_another() -> None:
    try:
        raise KeyError(PLANTED)
    except KeyError:
        raise natsync.StreamError("failed")  # noqa: B904


def as_one_of_many_causes() -> None:
    raise natsync.NoServersError({"nats://a:1": ValueError(PLANTED)})


def with_an_attribute() -> None:
    error = natsync.InvalidArgument("refused")
    error.password = PLANTED  # type: ignore[attr-defined]
    raise error


WAYS = [plain, by_a_way_of_its_own, with_a_cause, while_handling_another, as_one_of_many_causes, with_an_attribute]


@pytest.mark.parametrize("fail", WAYS)
def test_a_credential_in_an_exception_is_found_when_it_is_dropped(fail: Callable[[], None]) -> None:
    try:
        fail()
    except natsync.NatsError:
        pass
    assert PLANTED in found()


@pytest.mark.parametrize("fail", WAYS)
def test_a_credential_in_an_exception_that_somebody_keeps_is_found(fail: Callable[[], None]) -> None:
    with pytest.raises(natsync.NatsError) as caught:
        fail()
    assert PLANTED in found()
    assert caught.value is not None
    assert found() == ""  # told once


def test_an_exception_of_another_thread_is_read() -> None:
    def fail() -> None:
        with pytest.raises(natsync.NatsError):
            plain()

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join(10)
    assert PLANTED in found()


def test_an_exception_without_a_credential_is_read_and_no_find() -> None:
    before = secrecy.watch.exceptions
    with pytest.raises(natsync.InvalidURL):
        natsync.Client(f"nats://user:{PLANTED}@host:port")
    assert found() == ""
    assert secrecy.watch.exceptions > before


def test_a_secret_that_was_told_of_is_found_line_by_line_and_as_urls_have_it() -> None:
    assert secrecy.secret("first/line of a seed\n  second line\n") == "first/line of a seed\n  second line\n"
    assert secrecy.secret(b"a seed of bytes") == b"a seed of bytes"
    for shown in ("second line", "first%2Fline%20of%20a%20seed", "a seed of bytes"):
        log.info("it is %s", shown)
        assert f"it is {shown}" in found()


def test_a_test_that_shows_a_credential_fails(tmp_path: Path) -> None:
    (tmp_path / "test_planted.py").write_text(
        textwrap.dedent("""
            import logging

            def test_that_shows_it():
                logging.getLogger("natsync.x").info("password %s", "S3CRET")

            def test_that_does_not():
                logging.getLogger("natsync.x").info("password hidden")

            def test_that_fails_and_shows_it_in_its_report():
                raise ValueError("a S3CRET")
        """)
    )
    out = pytest_run(tmp_path)
    assert "1 failed, 2 passed, 1 error" in out  # the error is that of the first test, when it ends
    assert "credentials are shown in" in out
    assert "a log record of natsync.x (test_planted.py:5): …password S3CRET" in out
    assert "a credential is shown" in out


def pytest_run(directory: Path, *options: str) -> str:
    """The output of pytest on the tests of a directory, under the suite's conftest.py."""
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "conftest",
                "-p",
                "no:cacheprovider",
                "-c",
                str(ROOT / "setup.cfg"),
            ),
            *("--rootdir", str(directory), "-p", "no:randomly", *options, str(directory)),
        ],
        cwd=directory,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    return done.stdout + done.stderr


# -- lock order --------------------------------------------------------------------------------------------------------


@pytest.fixture
def locks() -> type:
    """A class of natsync's, as far as the instrument can tell, with two locks and a signal."""
    source = """
        import threading, time

        class Signal:
            def __init__(self):
                self._lock = threading.Lock()
                self._lock.acquire()

        class Locks:
            def __init__(self):
                self._a = threading.Lock()
                self._b: threading.Lock = threading.Lock()
                self._changed = threading.Condition(self._a)
                self._event = threading.Event()
                self._again = threading.RLock()
                self._signal = Signal()

            def block(self):
                time.sleep(0)
                threading.Thread(target=int).start()  # waits until it runs, which needs no lock of ours
                self._signal._lock.acquire(timeout=0.001)
                self._event.wait(0.001)

            def join(self, thread):
                thread.join()

            def wait(self):
                self._changed.wait(0.001)  # gives back the lock that it waits with
    """
    space: dict[str, type] = {}
    file = PACKAGE + "planted.py"
    text = textwrap.dedent(source)
    lock_order.linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), space)
    return space["Locks"]


def test_a_lock_is_named_by_its_class_and_attribute(locks: type) -> None:
    with lock_order.recording() as recorder:
        locks()
    assert recorder.locks == {"Locks._a", "Locks._b", "Locks._again"}


def test_locks_that_others_make_are_left_alone() -> None:
    with lock_order.recording() as recorder:
        assert type(threading.Lock()) is type(lock_order._make_lock())
        threading.Event()
        threading.RLock()
    assert recorder.locks == set()


def test_two_locks_taken_in_both_orders_are_a_cycle_with_both_stacks(locks: type) -> None:
    with lock_order.recording() as recorder:
        both = locks()

        def forwards() -> None:
            with both._a, both._b:
                pass

        def backwards() -> None:
            with both._b, both._a:
                pass

        for function in (forwards, backwards):
            thread = threading.Thread(target=function, name=f"thread-{function.__name__}")
            thread.start()
            thread.join(10)
    (fault,) = [one for one in recorder.faults([{"Locks"}]) if one.startswith("a cycle")]
    assert recorder.cycles() == [("Locks._a", "Locks._b")]
    assert fault.count("was taken at") == 4
    for told in ("Locks._a → Locks._b in thread-forwards", "Locks._b → Locks._a in thread-backwards"):
        assert told in fault
    for function in ("forwards", "backwards"):
        assert f" {function}: with both._" in fault


def test_a_longer_cycle_is_found_too() -> None:
    recorder = Recorder()
    for pair in (("A.x", "B.x"), ("B.x", "C.x"), ("C.x", "A.x"), ("A.x", "D.x")):
        recorder.locks.update(pair)
        recorder.nestings[pair] = lock_order.Nesting(*pair, "thread", (), ())
    assert recorder.cycles() == [("A.x", "B.x", "C.x")]


def test_two_locks_of_one_place_under_each_other_are_a_cycle(locks: type) -> None:
    with lock_order.recording() as recorder:
        one, other = locks(), locks()
        with one._a, other._a:
            pass
    assert recorder.cycles() == [("Locks._a",)]


@pytest.mark.parametrize(
    ("order", "allowed"),
    [
        ([{"A"}, {"B"}], True),
        ([{"B"}, {"A"}], False),
        ([{"A", "B"}], False),
        ([{"A"}], False),
        ([{"A"}, {"C"}, {"B"}], True),
    ],
)
def test_a_pair_is_judged_by_the_documented_order(order: list[set[str]], allowed: bool) -> None:
    recorder = Recorder()
    recorder.nestings["A._lock", "_B._lock"] = lock_order.Nesting("A._lock", "_B._lock", "thread", (), ())
    assert (recorder.against(order) == []) is allowed


def test_the_documented_order_can_be_read() -> None:
    order = lock_order.documented_order()
    assert len(order) > 5
    assert order.index({"Links"}) < order.index({"Outbox"})


def test_a_lock_that_may_be_taken_again_counts_until_it_is_given_back_as_often(locks: type) -> None:
    with lock_order.recording() as recorder:
        both = locks()
        with both._again:
            with both._again, both._a:
                pass
            assert [lock.name for lock, _ in recorder.holding()] == ["Locks._again"]
        assert recorder.holding() == []
        with pytest.raises(RuntimeError):
            both._again.release()
    assert set(recorder.nestings) == {("Locks._again", "Locks._a")}


def test_an_attempt_that_does_not_wait_is_no_nesting(locks: type) -> None:
    with lock_order.recording() as recorder:
        both = locks()
        with both._a:
            assert both._b.acquire(blocking=False)
            both._b.release()
    assert recorder.nestings == {}


def test_a_lock_held_over_what_blocks_is_found(locks: type) -> None:
    with lock_order.recording() as recorder:
        both = locks()
        thread = threading.Thread(target=int)
        thread.start()
        with both._a:
            both.block()
            both.join(thread)
            both.wait()
        with both._b, both._a:
            both.wait()
    assert set(recorder.held_over) == {
        ("Locks._a", "sleep()"), ("Locks._a", "Thread.join()"), ("Locks._a", "waiting for a signal"),
        ("Locks._a", "Event.wait()"), ("Locks._b", "Condition.wait()"),
    }  # fmt: skip


def test_a_lock_held_over_a_users_callback_is_found(locks: type) -> None:
    with lock_order.recording() as recorder:
        both, ctx = locks(), natsync.Context()
        ctx.on_cancel(lambda: None)
        source = "def end(lock, ctx):\n    with lock:\n        ctx.cancel()\n"
        space: dict[str, Callable[..., None]] = {}
        exec(compile(source, PACKAGE + "planted.py", "exec"), space)
        space["end"](both._a, ctx)
    assert ("Locks._a", "an on_cancel callback") in recorder.held_over


def test_a_lock_held_over_a_word_in_the_log_is_found(locks: type) -> None:
    with lock_order.recording() as recorder:
        source = "def warn(lock, log):\n    with lock:\n        log.warning('a word')\n"
        space: dict[str, Callable[..., None]] = {}
        exec(compile(source, PACKAGE + "planted.py", "exec"), space)
        space["warn"](locks()._a, logging.getLogger("natsync"))
    assert ("Locks._a", "logging") in recorder.held_over


def test_a_lock_given_back_before_what_blocks_is_no_fault(locks: type) -> None:
    with lock_order.recording() as recorder:
        both = locks()
        with both._a:
            both._changed.notify_all()
        both.block()
    assert recorder.faults([]) == []


def test_what_a_test_does_under_a_lock_is_no_fault_of_natsyncs(locks: type) -> None:
    with lock_order.recording() as recorder:
        with locks()._a:
            lock_order.time.sleep(0)
    assert recorder.faults([]) == []


def test_a_condition_takes_its_lock_again_after_waiting(locks: type) -> None:
    with lock_order.recording() as recorder:
        both = locks()
        with both._a:
            both._changed.wait(0.001)
            assert [lock.name for lock, _ in recorder.holding()] == ["Locks._a"]
        assert recorder.holding() == []


def test_natsync_under_the_instrument_works_and_keeps_the_order(nats_server: natsync.testing.NatsServer) -> None:
    before = natsync_threads()
    with lock_order.recording() as recorder:
        with natsync.Subscriber(nats_server.url) as subscriber, natsync.Client(nats_server.url) as client:
            subscriber.stream_subscribe("order.n", lambda ctx, request: iter([b"1", b"2"]))
            with client.stream("order.n", timeout=10) as stream:
                assert list(stream) == [b"1", b"2"]
    eventually(lambda: natsync_threads() <= before)
    assert {"Links._lock", "Outbox._lock", "Session._lock"} <= recorder.locks
    assert ("Links._lock", "Outbox._lock") in recorder.nestings
    assert "\n".join(recorder.faults(lock_order.documented_order())) == ""


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["one process", "workers"])
def test_a_run_with_a_broken_order_fails_and_shows_it(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "test_planted.py").write_text(
        textwrap.dedent("""
            from natsync.concurrency import Deadline
            from natsync.outbox import Outbox
            from natsync.workers import WorkerPool

            def test_against_the_order():
                pool, outbox = WorkerPool("natsync-planted", 1), Outbox(1)
                with outbox._lock:
                    pool.close(Deadline())
        """)
    )
    out = pytest_run(tmp_path, "--lock-order", *options)
    assert "1 passed" in out
    assert "not in the documented order: Outbox._lock → WorkerPool._lock" in out
    assert "1 faults" in out
