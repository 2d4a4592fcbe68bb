"""Many browsers on one gunicorn, the small form of benchmarks/sse_clients.py."""

from __future__ import annotations

import json
import sys

import pytest

from processes import run
from support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.mark.parametrize("kind", ["gthread", "gevent"])
def test_each_of_many_clients_gets_its_whole_stream(kind: str) -> None:
    clients = 80
    result = run(
        *(sys.executable, "benchmarks/sse_clients.py", "--clients", str(clients), "--worker-class", kind),
        cwd=ROOT,
        timeout=120,
    )
    assert result.process.returncode == 0, result
    report = json.loads(result.out[-1])
    assert report["complete"] == clients
    # gthread holds a thread for each stream, gevent none; the rest is gunicorn's and natsync's own.
    assert report["all_open"]["threads"] - (clients if kind == "gthread" else 0) in range(2, 16), report
