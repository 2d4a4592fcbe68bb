"""examples/django_project as its README says: migrate, worker, a web server, a browser; and its own tests."""

from __future__ import annotations

import json
import re
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

import natsync
from eventsource import Browser
from natsync.testing import NatsServer, eventually
from processes import PATIENCE, child, run
from support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

PROJECT = ROOT / "examples" / "django_project"
MANAGE = (sys.executable, "manage.py")
PYTHONPATH = {"PYTHONPATH": str(ROOT)}


def test_its_own_tests_pass() -> None:
    ended = run(*MANAGE, "test", cwd=PROJECT, env=PYTHONPATH)
    assert ended.process.returncode == 0, ended
    assert any("Ran 2 tests" in line for line in ended.err), ended


def test_its_migration_is_complete() -> None:
    assert run(*MANAGE, "makemigrations", "--check", cwd=PROJECT, env=PYTHONPATH).process.returncode == 0


def test_a_page_adds_and_finds_notes_with_the_worker(
    make_nats_server: Callable[..., NatsServer], tmp_path: Path
) -> None:
    server = make_nats_server()
    env = {**PYTHONPATH, "ALLOWED_HOSTS": "127.0.0.1 here", "DATABASE": str(tmp_path / "db.sqlite3")}
    assert run(*MANAGE, "migrate", "-v0", cwd=PROJECT, env=env).process.returncode == 0
    gunicorn = [sys.executable, "-m", "gunicorn", "-k", "gthread", "--threads", "4", "--bind", "127.0.0.1:0"]
    with (
        child(*MANAGE, "natsync_worker", url=server.url, cwd=PROJECT, env=env) as worker,
        child(*gunicorn, "mysite.wsgi", url=server.url, cwd=PROJECT, env=env) as web,
    ):
        worker.wait_for_out("is ready")
        web.wait_for_err("Listening at")
        eventually(lambda: re.search(r"http://127\.0\.0\.1:\d+", "\n".join(web.err)), PATIENCE)
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+", "\n".join(web.err))
        with urllib.request.urlopen(url, timeout=PATIENCE) as page:
            assert b"new EventSource" in page.read()
        for number in range(1, 21):
            body = urllib.parse.urlencode({"text": f"note {number}"}).encode()
            with urllib.request.urlopen(f"{url}/add", body, timeout=PATIENCE) as answer:
                assert json.load(answer) == {"id": number}
        with Browser(f"{url}/search?text=note+2") as browser:
            browser.read_all()
            found = [one.data for one in browser.events if one.event == "message"]
            assert found == ["note 2", "note 20"], (browser.body, worker)
        with natsync.Client(server.url) as client:  # a browser that leaves in the middle does not keep the worker
            assert client.request("notes.add", "the last", timeout=PATIENCE).json() == {"id": 21}
        with Browser(f"{url}/search?text=note") as browser:
            browser.wait_for(b"data: note 1\n\n")
            browser.leave()
        worker.process.terminate()
        assert worker.wait() == 0, worker
