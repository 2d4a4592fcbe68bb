"""Errors as values: what remains of each in another process, and in a copy."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil

import pytest

import natsync
from natsync import errors
from natsync.supervisor import no_servers
from natsync.testing import ServerNotFound, ServerStartError
from support import run_python

#: Not loaded here: they need their extras, and run at import.
_EDGES = ("natsync.cli", "natsync.contrib", "natsync.__main__")

#: One of each class that is made otherwise than from a text alone.
SPECIAL: list[BaseException] = [
    natsync.NoServersError({"nats://a:1": natsync.ConnectError("refused"), "nats://b:2": OSError(111, "refused")}),
    no_servers({}),
    no_servers({"nats://a:1": natsync.AuthorizationError("wrong password")}),  # type: ignore[dict-item]
    natsync.PoolUnreachable("no connection", {"nats://a:1": natsync.ConnectError("refused")}),
    natsync.MaxPayloadExceeded(12, 10),
    natsync.NoRespondersError("a.b"),
    natsync.ConnectionLost("broke", sent=False),
    natsync.ConnectionClosed("closed", sent=True),
    natsync.RequestTimeout("late", sent=False),
    natsync.DrainTimeout("late", undone=["one", "two"], unhandled={"a": 2}, unsent=3),
    natsync.StreamRefused("full", retry_after=1.5, code=8),
    natsync.HandlerError("broken", code=404, details={"id": [3]}, last_seq=7),
    natsync.DeadlineExceeded("late", last_seq=2),
    ServerStartError("the port is taken", "line 1\nline 2"),
]


def classes() -> list[type[BaseException]]:
    for module in pkgutil.walk_packages(natsync.__path__, "natsync."):
        if not module.name.startswith(_EDGES):
            importlib.import_module(module.name)
    found, left = set[type[BaseException]](), [errors.NatsError]
    while left:
        one = left.pop()
        if one.__module__.startswith("natsync"):
            found.add(one)
            left += one.__subclasses__()
    return [*sorted(found, key=lambda one: one.__name__), ServerNotFound, ServerStartError]


def alike(one: BaseException, other: BaseException) -> None:
    assert type(other) is type(one)
    assert other is not one
    assert (str(other), repr(other), other.args) == (str(one), repr(one), one.args)
    assert repr(vars(other)) == repr(vars(one))  # exceptions among them are equal only to themselves


def examples() -> list[BaseException]:
    special = {type(one) for one in SPECIAL}
    return [*SPECIAL, *(kind("what went wrong") for kind in classes() if kind not in special)]


@pytest.mark.parametrize("error", examples(), ids=lambda error: type(error).__name__)
def test_every_error_stays_what_it_is_in_another_process_and_in_a_copy(error: BaseException) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        alike(error, pickle.loads(pickle.dumps(error, protocol)))
    alike(error, copy.copy(error))
    alike(error, copy.deepcopy(error))
    alike(error, pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error)))))


def test_an_error_of_a_users_own_class_stays_what_it_is_too() -> None:
    error = Own("ada", size_bytes=3)
    alike(error, pickle.loads(pickle.dumps(error)))
    alike(error, copy.copy(error))
    assert copy.copy(error).user == "ada"


class Own(natsync.HandlerError):
    def __init__(self, user: str, *, size_bytes: int) -> None:
        super().__init__(f"{user} is out of room", details={"bytes": size_bytes})
        self.user = user


class Unpicklable(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one}, {other}")


def test_a_cause_that_cannot_go_to_another_process_goes_as_a_text() -> None:
    held = OSError("held")
    held.lock = lambda: None  # type: ignore[attr-defined]
    causes: dict[str, BaseException] = {"a": Unpicklable("x", "y"), "b": held, "c": natsync.ConnectError("refused")}
    error = natsync.NoServersError(causes)
    again: natsync.NoServersError = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert [(type(one), str(one)) for one in again.causes.values()] == [
        (natsync.ConnectError, "Unpicklable('x, y')"),
        (natsync.ConnectError, "OSError('held')"),
        (natsync.ConnectError, "refused"),
    ]
    assert copy.copy(error).causes == causes


def test_details_that_cannot_go_to_another_process_go_as_a_text() -> None:
    again = pickle.loads(pickle.dumps(natsync.HandlerError("broken", details={"id": 3, "call": lambda: None})))
    assert str(again) == "broken"
    assert again.details["id"] == 3
    assert again.details["call"].startswith("<function")


PROCESSES = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
import natsync

def fails(port):
    natsync.connect(f"nats://127.0.0.1:{port}", connect_timeout=5)

def raised(call):
    try:
        call()
    except natsync.NoServersError as error:
        return list(error.causes), [type(one) for one in error.causes.values()]

expected = ["nats://127.0.0.1:1"], [natsync.ConnectError]
with ProcessPoolExecutor(1) as pool:
    assert raised(pool.submit(fails, 1).result) == expected
with multiprocessing.get_context("fork").Pool(1) as pool:
    assert raised(lambda: pool.apply_async(fails, (1,)).get(20)) == expected
print("fine")
"""


def test_an_error_raised_in_a_process_pool_reaches_its_parent() -> None:
    done = run_python(PROCESSES)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
