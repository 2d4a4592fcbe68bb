"""`manage.py natsync_worker` as a child process: how it serves, ends, heals its database connections and reloads."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import natsync
from natsync.testing import NatsServer, eventually
from processes import PATIENCE, Child, child, run
from support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SITE = ROOT / "tests" / "django_site"


@pytest.fixture
def server(make_nats_server: Callable[..., NatsServer]) -> NatsServer:
    """A server of the test's own: the project's subjects are fixed."""
    return make_nats_server()


@pytest.fixture
def client(server: NatsServer) -> Iterator[natsync.Client]:
    with natsync.Client(server.url) as client:
        yield client


@pytest.fixture
def database(tmp_path: Path) -> dict[str, str]:
    """The environment with a database on disk that has the project's tables."""
    environment = {"SITE_DB": str(tmp_path / "site.sqlite3")}
    made = run(*manage("migrate", "--run-syncdb", "-v0"), env=environment)
    assert made.process.returncode == 0, made
    return environment


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A copy of the project that a test may change."""
    copy = tmp_path / "django_site"
    shutil.copytree(SITE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def manage(*arguments: str, site: Path = SITE) -> tuple[str, ...]:
    return sys.executable, str(site / "manage.py"), *arguments


@contextmanager
def worker(
    server: NatsServer, *arguments: str, env: dict[str, str] | None = None, site: Path = SITE
) -> Iterator[Child]:
    """A worker whose handlers are live."""
    with child(*manage("natsync_worker", *arguments, site=site), url=server.url, env=env) as running:
        running.wait_for_out("is ready")
        yield running


def pids(client: natsync.Client) -> set[int]:
    """The processes that answer a few requests; none if one is lost in a process that dies."""
    try:
        return {client.request("site.process", timeout=2).json()["pid"] for _ in range(20)}
    except (natsync.RequestTimeout, natsync.NoRespondersError):
        return set()


# -- serving ---------------------------------------------------------------------------------------------------


def test_it_serves_what_the_apps_register_and_says_so(server: NatsServer, client: natsync.Client) -> None:
    with worker(server) as running:
        assert client.request("site.version", timeout=PATIENCE).text() == "1"
        assert "serving site.version in queue group django_site" in running.out
        assert "serving site.noted" in running.out


@pytest.mark.parametrize(
    ("argument", "said"), [("--queue=mine", "site.version in queue group mine"), ("--queue=", "site.version")]
)
def test_the_queue_group_can_be_named(server: NatsServer, argument: str, said: str) -> None:
    with worker(server, argument) as running:
        assert f"serving {said}" in running.out


# -- ending ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_worker_ends_with_0(server: NatsServer, number: signal.Signals) -> None:
    with worker(server) as running:
        running.send(number)
        assert running.wait() == 0, running


def test_sigterm_drains(server: NatsServer, client: natsync.Client) -> None:
    with worker(server) as running, client.stream("site.slow", "0.7", timeout=PATIENCE) as stream:
        assert next(stream) == b"begun"
        running.send(signal.SIGTERM)
        assert list(stream) == [b"finished"]
        assert running.wait() == 0, running


def test_a_second_signal_cancels_and_the_status_is_4(server: NatsServer, client: natsync.Client) -> None:
    with worker(server) as running, client.stream("site.slow", "600", timeout=PATIENCE) as stream:
        assert next(stream) == b"begun"
        running.send(signal.SIGTERM)
        eventually(lambda: refuses(client, "site.version"), PATIENCE)  # it drains
        running.send(signal.SIGTERM)
        with pytest.raises(natsync.StreamError):
            list(stream)
        assert running.wait() == 4, running


def refuses(client: natsync.Client, subject: str) -> bool:
    try:
        client.request(subject, timeout=PATIENCE)
    except natsync.NoRespondersError:
        return True
    return False


def test_what_outlasts_the_shutdown_timeout_is_cancelled_and_the_status_is_4(
    server: NatsServer, client: natsync.Client
) -> None:
    with (
        worker(server, "--shutdown-timeout", "0.3") as running,
        client.stream("site.slow", "600", timeout=PATIENCE) as stream,
    ):
        assert next(stream) == b"begun"
        running.send(signal.SIGTERM)
        with pytest.raises(natsync.StreamError):
            list(stream)
        assert running.wait() == 4, running


def test_a_handler_that_heeds_nothing_does_not_keep_the_worker(server: NatsServer, client: natsync.Client) -> None:
    with (
        worker(server, "--shutdown-timeout", "0.2") as running,
        client.stream("site.stubborn", "600", timeout=PATIENCE) as stream,
    ):
        assert next(stream) == b"begun"
        running.send(signal.SIGTERM)
        assert running.wait() == 4, running


def test_without_a_server_the_status_is_1_and_one_line_says_why(server: NatsServer) -> None:
    server.stop()
    ended = run(*manage("natsync_worker"), url=server.url)
    assert ended.process.returncode == 1
    assert [line for line in ended.err if "no server could be reached" in line], ended
    assert "Traceback" not in "\n".join(ended.err)


def test_a_bad_setting_is_found_by_the_checks_and_the_status_is_1() -> None:
    ended = run(*manage("natsync_worker"), url="http://nowhere")
    assert ended.process.returncode == 1
    assert any("natsync.E003" in line for line in ended.err), ended


@pytest.mark.parametrize(
    "arguments", [["--workers", "0"], ["--shutdown-timeout", "soon"], ["--nonsense"], ["--workers=2", "--reload"]]
)
def test_the_status_of_a_wrong_command_line_is_2(server: NatsServer, arguments: list[str]) -> None:
    ended = run(*manage("natsync_worker", *arguments), url=server.url)
    assert ended.process.returncode == 2, ended


# -- several processes ---------------------------------------------------------------------------------------------


def test_workers_share_the_requests_and_drain_together(server: NatsServer, client: natsync.Client) -> None:
    with worker(server, "--workers", "3") as running:
        eventually(lambda: sum("is ready" in line for line in running.out) == 3, PATIENCE)
        eventually(lambda: len(pids(client)) == 3, PATIENCE)
        with client.stream("site.slow", "0.7", timeout=PATIENCE) as stream:
            assert next(stream) == b"begun"
            running.send(signal.SIGTERM)
            assert list(stream) == [b"finished"]
        assert running.wait() == 0, running


def test_a_killed_worker_is_replaced(server: NatsServer, client: natsync.Client) -> None:
    with worker(server, "--workers", "2") as running:
        eventually(lambda: len(pids(client)) == 2, PATIENCE)
        time.sleep(1.1)  # a worker that is killed within its first second is a fault that would strike all
        victim = min(eventually(lambda: pids(client), PATIENCE))
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: len(now := pids(client)) == 2 and victim not in now, PATIENCE)
        running.send(signal.SIGTERM)
        assert running.wait() == 0, running


def test_a_second_signal_reaches_the_workers_too(server: NatsServer, client: natsync.Client) -> None:
    with (
        worker(server, "--workers", "2") as running,
        client.stream("site.slow", "600", timeout=PATIENCE) as stream,
    ):
        assert next(stream) == b"begun"
        running.send(signal.SIGINT)
        eventually(lambda: refuses(client, "site.version"), PATIENCE)
        running.send(signal.SIGINT)
        assert running.wait() == 4, running


def test_workers_do_not_outlive_a_killed_parent(server: NatsServer, client: natsync.Client) -> None:
    with worker(server, "--workers", "2") as running:
        eventually(lambda: len(pids(client)) == 2, PATIENCE)
        running.send(signal.SIGKILL)
        eventually(lambda: refuses(client, "site.version"), PATIENCE)
        assert running.wait() == -signal.SIGKILL


def test_workers_that_cannot_begin_end_all(server: NatsServer) -> None:
    server.stop()
    assert run(*manage("natsync_worker", "--workers=2"), url=server.url).process.returncode == 1


GAUGE = """

import prometheus_client

GAUGE = prometheus_client.Gauge("busy", "", multiprocess_mode="livesum")


@subscriber.stream("site.busy")
def busy(ctx, request):
    GAUGE.inc()
    yield str(os.getpid())
    ctx.wait(60)
"""


def test_the_gauges_of_a_killed_worker_are_removed(
    server: NatsServer, client: natsync.Client, site: Path, tmp_path: Path
) -> None:
    with (site / "handlers.py").open("a") as handlers:
        handlers.write(GAUGE)
    counted = tmp_path / "metrics"
    counted.mkdir()
    env = {"PROMETHEUS_MULTIPROC_DIR": str(counted)}
    with worker(server, "--workers", "2", env=env, site=site) as running:
        eventually(lambda: sum("is ready" in line for line in running.out) == 2, PATIENCE)
        with client.stream("site.busy", timeout=PATIENCE) as stream:
            victim = int(next(stream))
            gauge = counted / f"gauge_livesum_{victim}.db"
            assert gauge.exists()
            os.kill(victim, signal.SIGKILL)
            eventually(lambda: not gauge.exists(), PATIENCE)
        running.send(signal.SIGTERM)
        running.wait()


EXIT = """

import atexit


@atexit.register
def leave():
    with open(os.environ["SITE_LEFT"], "a") as left:
        left.write(f"{os.getpid()}\\n")
"""


def test_workers_run_the_functions_of_atexit_once_each(server: NatsServer, site: Path, tmp_path: Path) -> None:
    with (site / "handlers.py").open("a") as handlers:
        handlers.write(EXIT)
    left = tmp_path / "left"
    with worker(server, "--workers", "2", env={"SITE_LEFT": str(left)}, site=site) as running:
        eventually(lambda: sum("is ready" in line for line in running.out) == 2, PATIENCE)
        running.send(signal.SIGTERM)
        assert running.wait() == 0, running
    workers = [line.split()[2] for line in running.out if "is ready" in line]
    assert sorted(left.read_text().split()) == sorted([*workers, str(running.process.pid)])


# -- the database --------------------------------------------------------------------------------------------------


def test_handlers_use_the_orm_and_keep_their_connection(
    server: NatsServer, client: natsync.Client, database: dict[str, str]
) -> None:
    with worker(server, env=database):
        seen = [client.request("site.note", f"note {n}", timeout=PATIENCE).json() for n in range(20)]
        assert [one["notes"] for one in seen] == list(range(1, 21))
        threads = {one["thread"] for one in seen}  # one that has answered may not be back when the next request comes
        assert len({(one["thread"], one["connection"]) for one in seen}) == len(threads) < 20  # CONN_MAX_AGE is None
        client.publish("site.noted", "by a message")
        eventually(lambda: list(client.stream("site.notes", timeout=PATIENCE))[-1:] == [b"by a message"], PATIENCE)


def test_a_connection_that_dies_between_handlers_is_healed(
    server: NatsServer, client: natsync.Client, database: dict[str, str]
) -> None:
    with worker(server, env=database) as running:  # whose CONN_HEALTH_CHECKS is off
        client.request("site.note", "one", timeout=PATIENCE)
        for expected in (2, 3):
            client.request("site.kill-connection", timeout=PATIENCE)
            assert client.request("site.note", "another", timeout=PATIENCE).json()["notes"] == expected
        assert "Traceback" not in "\n".join(running.err)


# -- reloading -----------------------------------------------------------------------------------------------------


def change(site: Path, old: str, new: str, name: str = "handlers.py") -> None:
    path = site / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    touch(site, name)


def touch(site: Path, name: str = "handlers.py") -> None:
    path = site / name
    later = path.stat().st_mtime + 2  # the reloader compares times, which may be coarse
    os.utime(path, (later, later))


def answers(client: natsync.Client, text: str) -> bool:
    try:
        return client.request("site.version", timeout=PATIENCE).text() == text
    except natsync.NoRespondersError:
        return False


def test_a_changed_handler_is_served(server: NatsServer, client: natsync.Client, site: Path) -> None:
    with worker(server, "--reload", site=site) as running:
        assert answers(client, "1")  # at once: from the first answer on the files are watched
        change(site, '"SITE_VERSION", "1"', '"SITE_VERSION", "2"')
        eventually(lambda: answers(client, "2"), PATIENCE)
        running.send(signal.SIGTERM)
        assert running.wait() == 0, running


def test_a_change_cancels_what_is_under_way(server: NatsServer, client: natsync.Client, site: Path) -> None:
    with worker(server, "--reload", site=site) as running:
        with client.stream("site.slow", "600", timeout=PATIENCE) as stream:
            assert next(stream) == b"begun"
            change(site, '"1"', '"2"')
            with pytest.raises(natsync.StreamError):
                list(stream)
        eventually(lambda: answers(client, "2"), PATIENCE)
        running.send(signal.SIGINT)
        assert running.wait() == 0, running


def test_a_handler_that_does_not_load_is_waited_for(server: NatsServer, client: natsync.Client, site: Path) -> None:
    with worker(server, "--reload", site=site) as running:
        change(site, '"1")', '"1"')
        running.wait_for_err("SyntaxError")
        change(site, '"SITE_VERSION", "1"', '"SITE_VERSION", "2")')

        def mended() -> bool:
            touch(site)  # again and again: a file that did not load is watched from some moment later on
            return answers(client, "2")

        eventually(mended, PATIENCE)
        running.send(signal.SIGTERM)
        assert running.wait() == 0, running


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("views.py", "import gc\n", "import gc(\n"),  # found by the system checks
        ("models.py", "import models\n", "import models(\n"),  # by django.setup()
        ("settings.py", "USE_TZ = True\n", "USE_TZ = (\n"),
    ],
)
def test_a_project_that_does_not_load_is_waited_for(
    server: NatsServer, client: natsync.Client, site: Path, name: str, old: str, new: str
) -> None:
    with worker(server, "--reload", site=site) as running:
        assert answers(client, "1")
        change(site, old, new, name)
        running.wait_for_err("SyntaxError")
        assert running.process.poll() is None
        change(site, new, old, name)

        def mended() -> bool:
            touch(site, name)  # again: a file that did not load is watched from some moment later on
            with suppress(AssertionError):
                eventually(lambda: answers(client, "1"), 6)
                return True
            return False

        eventually(mended, PATIENCE, f"not mended: {running!r}")
        running.send(signal.SIGTERM)
        assert running.wait() == 0, running


def test_a_worker_that_waits_for_its_project_to_load_ends_at_a_signal(
    server: NatsServer, client: natsync.Client, site: Path
) -> None:
    with worker(server, "--reload", site=site) as running:
        assert answers(client, "1")
        change(site, "import models\n", "import models(\n", "models.py")
        running.wait_for_err("waiting for a change")
        running.send(signal.SIGTERM)
        assert running.wait() == 0, running


def test_with_reload_too_sigterm_drains_and_a_second_one_cancels(server: NatsServer, client: natsync.Client) -> None:
    with worker(server, "--reload") as running:
        with client.stream("site.slow", "0.7", timeout=PATIENCE) as stream:
            assert next(stream) == b"begun"
            running.send(signal.SIGTERM)
            assert list(stream) == [b"finished"]
        assert running.wait() == 0, running
    with worker(server, "--reload") as running, client.stream("site.slow", "600", timeout=PATIENCE) as stream:
        assert next(stream) == b"begun"
        running.send(signal.SIGTERM)
        eventually(lambda: refuses(client, "site.version"), PATIENCE)
        running.send(signal.SIGTERM)
        assert running.wait() == 4, running
