"""The logging recipe of docs/observability.md does what the page says."""

from __future__ import annotations

import json
import re

import pytest

from natsync.testing import NatsServer
from support import ROOT, run_python

USE = """
import natsync

@subscriber.handler("log.echo")
def echo(ctx, request):
    return request.data

@subscriber.stream("log.words")
def words(ctx, request):
    yield from request.data.split()
    if request.data == b"bad one":
        raise ValueError("broken")

with subscriber, client:
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    client.request("log.echo", b"x", headers=trace, timeout=10)
    assert list(client.stream("log.words", b"one two", timeout=10)) == [b"one", b"two"]
    try:
        list(client.stream("log.words", b"bad one", timeout=10))
    except natsync.HandlerError:
        pass
"""


def recipe() -> str:
    page = (ROOT / "docs" / "observability.md").read_text("utf-8")
    (block,) = [one for one in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class JsonLines" in one]
    return str(block)


@pytest.mark.parametrize("logger", ["access", "natsync.streaming"])
def test_the_logging_recipe_writes_lines_of_json(nats_server: NatsServer, logger: str) -> None:
    done = run_python(recipe().replace("nats://127.0.0.1:4222", nats_server.url) + USE)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    own = [line for line in lines if line["logger"] == logger]
    if logger != "access":
        (failed,) = own
        assert (failed["level"], "ValueError: broken" in failed["exception"]) == ("ERROR", True)
        return
    told = {(line["message"], line["subject"], line["level"]) for line in own}
    assert told == {
        ("request", "log.echo", "INFO"),
        ("handled", "log.echo", "INFO"),
        ("stream", "log.words", "INFO"),
        ("streamed", "log.words", "INFO"),
        ("stream", "log.words", "ERROR"),
        ("streamed", "log.words", "ERROR"),
    }
    traced = [line for line in own if line["subject"] == "log.echo"]
    assert {line["trace_id"] for line in traced} == {"0af7651916cd43dd8448eb211c80319c"}
    complete = next(line for line in own if line["message"] == "stream" and line["level"] == "INFO")
    assert (complete["chunks"], complete["size_bytes"], complete["kind"]) == (2, 6, "stream")
    assert complete["seconds"] > 0
