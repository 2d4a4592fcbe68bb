"""What a user's type checker says: mypy --strict over a small program, with natsync as a package that has types."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import natsync
from natsync.contrib.flask import NatSync
from natsync.options import ConnectOptions, Options
from support import ROOT

#: A line that ends with `#! code` is an error of that code, any other is none.
PROGRAM = """
import natsync
from natsync.contrib import msgpack, pydantic
from typing_extensions import assert_type

with natsync.testing.NatsServer() as server:
    assert_type(natsync.monitor.SUBJECT, str)
    natsync.nonsense  #! attr-defined
    client = natsync.Client(server.url, name="x", user=lambda: ("u", "p"), tls=False)
    natsync.Client(nam="x")  #! call-arg
    natsync.Client(user=5)  #! arg-type
    natsync.connect(tls="oops")  #! arg-type
    natsync.connect(server.url, heartbeat=1, hooks=natsync.Hooks())
    natsync.Subscriber(server.url, max_workers=2, token="t")
    natsync.Subscriber(max_wokers=2)  #! call-arg
    natsync.Subscriber().default_options(tokn="t")  #! call-arg
    pool = natsync.ConnectionPool(server.url, max_size=3, name="x")
    natsync.ConnectionPool(max_sise=3)  #! call-arg

    assert_type(pool.request("a", json=1, timeout=3, retry=natsync.Retry()), natsync.Message)
    pool.request("a", timeot=3)  #! call-arg
    pool.publish("a", b"", repyl="b")  #! call-arg
    pool.request_many("a", stall="1")  #! arg-type
    assert_type(pool.stream("a", window=3), natsync.Stream)
    pool.stream("a", windw=3)  #! call-arg
    pool.stream_request("a", b"", print, client_id=3)  #! arg-type

    texts = client.stream("a").map(bytes.decode)
    assert_type(next(texts), str)
    assert_type(texts.map(len).next(1), int)
    client.stream("a").map(str.upper)  #! arg-type
    assert_type(client.subscribe("a").map(natsync.Message.text).next(1), str)
    assert_type(list(client.request_many("a").map(lambda reply: len(reply.data))), list[int])
    with client.subscribe("a") as subscription:
        assert_type(subscription, natsync.Subscription)

subscriber = natsync.Subscriber()

@subscriber.handler("sum")
@msgpack.typed
def add(ctx: natsync.Context, numbers: list[int]) -> int:
    return sum(numbers)

@pydantic.typed
def double(ctx: natsync.Context, number: int) -> int:
    return 2 * number

assert_type(add(natsync.Context(), [1]), int)
double(natsync.Context(), "1")  #! arg-type
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_users_program_is_told_its_mistakes_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, "utf-8")
    done = subprocess.run(
        (
            *(sys.executable, "-m", "mypy", "--strict", "--python-version", "3.10", "--show-error-codes"),
            *("--config-file", str(ROOT / "setup.cfg"), "--cache-dir", str(tmp_path / "cache"), "program.py"),
        ),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        timeout=200,
        check=False,
    )
    told = re.findall(r"^program\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    marks = [
        (number, line.rpartition("  #! ")[2]) for number, line in enumerate(PROGRAM.splitlines(), 1) if "#!" in line
    ]
    assert [(int(number), code) for number, code in told] == marks, done.stdout + done.stderr
    assert f"Found {len(marks)} errors in 1 file" in done.stdout, done.stdout + done.stderr


def test_the_keywords_and_the_options_are_the_same() -> None:
    keywords = {name: one.__forward_arg__ for name, one in Options.__annotations__.items()}
    assert keywords == dict(ConnectOptions.__annotations__)
    assert not Options.__required_keys__


@pytest.mark.parametrize("verb", ["publish", "request", "request_many", "stream", "stream_request"])
def test_a_pools_verbs_take_what_the_clients_do(verb: str) -> None:
    mine, theirs = (
        inspect.signature(getattr(natsync.ConnectionPool, verb)),
        inspect.signature(getattr(natsync.Client, verb)),
    )
    assert mine == theirs


def test_flasks_stream_takes_what_the_clients_does() -> None:
    assert inspect.signature(NatSync.stream) == inspect.signature(natsync.Client.stream)


def test_annotations_can_be_evaluated() -> None:
    for made in (natsync.Client, natsync.connect, natsync.ConnectionPool, natsync.Subscriber):
        assert "options" in inspect.signature(made, eval_str=True).parameters
