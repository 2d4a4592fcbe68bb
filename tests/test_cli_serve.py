"""`natsync serve` with several modules, worker processes, reloading and the connection options, as child processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

import natsync
from natsync.testing import NatsServer, eventually
from processes import NATSYNC, PATIENCE, Child, child, run

MODULE = """
import os
import natsync

subscriber = natsync.Subscriber()

@subscriber.handler("{prefix}.pid")
def pid(ctx, request):
    return os.getpid()

@subscriber.handler("{prefix}.version")
def version(ctx, request):
    return {version!r}

@subscriber.stream("{prefix}.slow")
def slow(ctx, request):
    yield "begun"
    ctx.wait(0.5)
    yield "ended"
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]  # each command takes seconds to start on a busy machine


@pytest.fixture
def url(nats_server: NatsServer) -> str:
    return nats_server.url


def write(directory: Path, name: str, version: str = "one") -> str:
    """A module of handlers; returns the prefix of its subjects."""
    prefix = f"serve.{directory.name}.{name}"
    (directory / f"{name}.py").write_text(dedent(MODULE.format(prefix=prefix, version=version)))
    return prefix


def pid_of(client: natsync.Client, prefix: str) -> int:
    return int(client.request(f"{prefix}.pid", timeout=PATIENCE).data)


def wait_for_serving(command: Child, count: int, what: str = ".pid") -> None:
    eventually(
        lambda: sum(f"{what} " in line for line in command.err) >= count, PATIENCE, f"not {count} in {command!r}"
    )


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "(python) Z" in Path(f"/proc/{pid}/stat").read_text() if Path(f"/proc/{pid}/stat").exists() else False


def test_several_modules_are_served_together_and_drain_together(
    url: str, natsync_client: natsync.Client, tmp_path: Path
) -> None:
    one, other = write(tmp_path, "one"), write(tmp_path, "other")
    with child(*NATSYNC, "serve", "one", "other:subscriber", url=url, cwd=tmp_path) as command:
        wait_for_serving(command, 2)
        assert pid_of(natsync_client, one) == pid_of(natsync_client, other) == command.process.pid
        streams = [natsync_client.stream(f"{prefix}.slow", timeout=PATIENCE) for prefix in (one, other)]
        assert [next(stream) for stream in streams] == [b"begun", b"begun"]
        command.send(signal.SIGTERM)
        assert [list(stream) for stream in streams] == [[b"ended"], [b"ended"]]
        assert command.wait() == 0
    groups = sorted(line.split()[-1] for line in command.err if ".pid in queue group" in line)
    assert groups == ["one", "other"]


def test_a_second_signal_cancels_what_several_modules_do(
    url: str, natsync_client: natsync.Client, tmp_path: Path
) -> None:
    prefixes = [write(tmp_path, name) for name in ("one", "other")]
    for name in ("one", "other"):
        path = tmp_path / f"{name}.py"
        path.write_text(path.read_text().replace("ctx.wait(0.5)", "ctx.wait(60)"))
    with child(*NATSYNC, "serve", "one", "other", url=url, cwd=tmp_path) as command:
        wait_for_serving(command, 2)
        streams = [natsync_client.stream(f"{prefix}.slow", timeout=PATIENCE) for prefix in prefixes]
        assert [next(stream) for stream in streams] == [b"begun", b"begun"]
        command.send(signal.SIGTERM)
        command.wait_for_err("shutting down: SIGTERM")
        command.send(signal.SIGTERM)
        assert command.wait() == 0
        for stream in streams:
            stream.close()


FORKS = """
import multiprocessing
import os
import time
import natsync

context = multiprocessing.get_context("fork")
subscriber = natsync.Subscriber()

def work(begun):
    begun.set()
    while True:
        time.sleep(0.02)  # Python takes a signal that comes right before a sleep only when that is over

@subscriber.handler("{prefix}.fork")
def fork(ctx, request):
    begun = context.Event()
    process = context.Process(target=work, args=(begun,), daemon=True)
    process.start()
    begun.wait(10)  # Python forgets signals that come sooner
    os.kill(process.pid, int(request.data))
    process.join(10)
    process.kill()
    process.join()
    return process.exitcode
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("others", [(), ("other",)], ids=["alone", "with-another"])
def test_a_process_that_a_handler_forks_is_ended_by_signals_as_any(
    url: str, natsync_client: natsync.Client, tmp_path: Path, others: tuple[str, ...], number: signal.Signals
) -> None:
    for name in others:
        write(tmp_path, name)
    prefix = f"serve.{tmp_path.name}.forks"
    (tmp_path / "forks.py").write_text(FORKS.format(prefix=prefix))
    with child(*NATSYNC, "serve", "forks", *others, url=url, cwd=tmp_path) as command:
        wait_for_serving(command, 1, ".fork")
        assert int(natsync_client.request(f"{prefix}.fork", str(int(number)), timeout=PATIENCE).data) == -number
        command.send(signal.SIGTERM)
        assert command.wait() == 0


def test_one_of_several_modules_that_cannot_begin_ends_all(url: str, tmp_path: Path) -> None:
    write(tmp_path, "one")
    (tmp_path / "other.py").write_text("import natsync\nsubscriber = natsync.Subscriber('nats://127.0.0.1:1')\n")
    result = run(*NATSYNC, "serve", "one", "other", url=url, cwd=tmp_path)
    assert result.process.returncode == 1
    assert result.err[-1].startswith("natsync: no server could be reached (nats://127.0.0.1:1:")


def test_workers_share_the_requests_and_a_dead_one_is_replaced(
    url: str, natsync_client: natsync.Client, tmp_path: Path
) -> None:
    prefix = write(tmp_path, "one")
    with child(*NATSYNC, "serve", "one", "--workers", "2", url=url, cwd=tmp_path) as command:
        wait_for_serving(command, 2)
        pids: set[int] = set()
        eventually(lambda: pids.add(pid_of(natsync_client, prefix)) or len(pids) == 2, PATIENCE)
        assert command.process.pid not in pids
        victim = min(pids)
        os.kill(victim, signal.SIGKILL)
        command.wait_for_err(f"worker {victim} ended by itself")
        wait_for_serving(command, 3)
        eventually(lambda: pids.add(pid_of(natsync_client, prefix)) or len(pids) == 3, PATIENCE)
        command.send(signal.SIGTERM)
        assert command.wait() == 0
    assert all(gone(pid) for pid in pids)
    assert not any("Traceback" in line for line in command.err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_finish_their_streams_at_a_signal(
    url: str, natsync_client: natsync.Client, tmp_path: Path, number: signal.Signals
) -> None:
    prefix = write(tmp_path, "one")
    with child(*NATSYNC, "serve", "one", "--workers", "2", url=url, cwd=tmp_path) as command:
        wait_for_serving(command, 2)
        with natsync_client.stream(f"{prefix}.slow", timeout=PATIENCE) as stream:
            assert next(stream) == b"begun"
            command.send(number)
            assert list(stream) == [b"ended"]
        assert command.wait() == 0


def test_workers_end_when_their_parent_is_killed(url: str, natsync_client: natsync.Client, tmp_path: Path) -> None:
    prefix = write(tmp_path, "one")
    with child(*NATSYNC, "serve", "one", "--workers", "1", url=url, cwd=tmp_path) as command:
        wait_for_serving(command, 1)
        worker = pid_of(natsync_client, prefix)
        command.send(signal.SIGKILL)
        eventually(lambda: gone(worker), PATIENCE)


def test_a_worker_that_does_not_load_ends_serve(url: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    result = run(*NATSYNC, "serve", "broken", "--workers", "2", url=url, cwd=tmp_path)
    assert result.process.returncode == 1
    assert "natsync: division by zero" in result.err
    assert result.err[-1] == "natsync: a worker ended at its start, with status 1"


def test_sigusr1_replaces_the_workers_without_losing_a_stream(
    url: str, natsync_client: natsync.Client, tmp_path: Path
) -> None:
    prefix = write(tmp_path, "one")
    with child(*NATSYNC, "serve", "one", "--workers", "1", url=url, cwd=tmp_path) as command:
        wait_for_serving(command, 1)
        former = pid_of(natsync_client, prefix)
        with natsync_client.stream(f"{prefix}.slow", timeout=PATIENCE) as stream:
            assert next(stream) == b"begun"
            command.send(signal.SIGUSR1)
            assert list(stream) == [b"ended"]
        wait_for_serving(command, 2)
        eventually(lambda: gone(former), PATIENCE)  # until then both serve
        assert pid_of(natsync_client, prefix) != former
        command.send(signal.SIGTERM)
        assert command.wait() == 0


@contextmanager
def replaceable(url: str, tmp_path: Path, workers: int, status: int = 0) -> Iterator[tuple[Child, str]]:
    """A served module whose import waits as long as there is a file `hold`; the command and the prefix."""
    prefix = write(tmp_path, "one")
    path = tmp_path / "one.py"
    path.write_text(path.read_text() + "\nimport time\nwhile os.path.exists('hold'): time.sleep(0.01)\n")
    with child(*NATSYNC, "serve", "one", "--workers", str(workers), url=url, cwd=tmp_path) as command:
        wait_for_serving(command, workers)
        yield command, prefix
        command.send(signal.SIGTERM)
        assert command.wait() == status, command
    assert not any("Traceback" in line for line in command.err)


def wait_for_log(command: Child, text: str, count: int) -> None:
    eventually(lambda: sum(text in line for line in command.err) >= count, PATIENCE, f"not {count} in {command!r}")


def started_by(command: Child) -> list[int]:
    return [int(line.split()[-2]) for line in command.err if line.endswith(" started")]


def test_sigusr1_leaves_no_gap_in_which_requests_fail(url: str, natsync_client: natsync.Client, tmp_path: Path) -> None:
    with replaceable(url, tmp_path, 2) as (command, prefix):
        former = started_by(command)
        (tmp_path / "hold").touch()
        command.send(signal.SIGUSR1)
        wait_for_log(command, " started", 4)
        for _ in range(100):  # while the new ones import; each raises if nobody serves
            assert pid_of(natsync_client, prefix) in former
        (tmp_path / "hold").unlink()
        eventually(lambda: pid_of(natsync_client, prefix) and all(map(gone, former)), PATIENCE)
        assert pid_of(natsync_client, prefix) in started_by(command)[2:]


def test_sigusr1_leaves_the_workers_if_what_is_on_disk_does_not_load(
    url: str, natsync_client: natsync.Client, tmp_path: Path
) -> None:
    with replaceable(url, tmp_path, 2) as (command, prefix):
        former = started_by(command)
        good = (tmp_path / "one.py").read_text()
        (tmp_path / "one.py").write_text("1 / 0\n")
        command.send(signal.SIGUSR1)
        command.wait_for_err("ended at its start (status 1): the others go on as they were")
        eventually(lambda: all(map(gone, started_by(command)[2:])), PATIENCE)
        assert {pid_of(natsync_client, prefix) for _ in range(20)} <= set(former)
        os.kill(former[0], signal.SIGKILL)  # what replaces it does not load either
        wait_for_log(command, "the others go on as they were", 2)
        assert {pid_of(natsync_client, prefix) for _ in range(20)} == {former[1]}
        (tmp_path / "one.py").write_text(good)
        command.send(signal.SIGUSR1)
        eventually(lambda: pid_of(natsync_client, prefix) and gone(former[1]), PATIENCE)
        assert pid_of(natsync_client, prefix) in started_by(command)[-2:]


def test_a_second_sigusr1_starts_anew_what_is_not_ready(
    url: str, natsync_client: natsync.Client, tmp_path: Path
) -> None:
    with replaceable(url, tmp_path, 1) as (command, prefix):
        (tmp_path / "hold").touch()
        command.send(signal.SIGUSR1)
        wait_for_log(command, " started", 2)
        command.send(signal.SIGUSR1)
        wait_for_log(command, " started", 3)
        former, dropped, new = started_by(command)
        command.wait_for_err(f"worker {dropped} stopped")
        assert pid_of(natsync_client, prefix) == former
        (tmp_path / "hold").unlink()
        eventually(lambda: pid_of(natsync_client, prefix) == new, PATIENCE)


def test_sigterm_ends_the_workers_of_a_replacement_too(url: str, tmp_path: Path) -> None:
    with replaceable(url, tmp_path, 1) as (command, _):
        (tmp_path / "hold").touch()
        command.send(signal.SIGUSR1)
        wait_for_log(command, " started", 2)
    assert all(map(gone, started_by(command)))


@pytest.mark.parametrize("loads", [True, False])
def test_a_worker_that_dies_while_it_is_replaced_is_not_missed(
    url: str, natsync_client: natsync.Client, tmp_path: Path, loads: bool
) -> None:
    with replaceable(url, tmp_path, 1, status=0 if loads else 1) as (command, prefix):
        (tmp_path / "hold").touch()
        if not loads:
            with (tmp_path / "one.py").open("a") as module:
                module.write("1 / 0\n")
        command.send(signal.SIGUSR1)
        wait_for_log(command, " started", 2)
        former, new = started_by(command)
        os.kill(former, signal.SIGKILL)
        command.wait_for_err(f"worker {former} ended by itself")
        (tmp_path / "hold").unlink()
        if loads:
            wait_for_serving(command, 2)
            assert pid_of(natsync_client, prefix) == new
        else:  # nobody is left who serves
            command.wait()
            assert command.err[-1] == "natsync: a worker ended at its start, with status 1"


def test_the_gauges_of_a_killed_worker_count_no_more(url: str, natsync_client: natsync.Client, tmp_path: Path) -> None:
    prefix = write(tmp_path, "one")
    path = tmp_path / "one.py"
    hooks = "Subscriber(hooks=__import__('natsync.contrib.prometheus').contrib.prometheus.Metrics())"
    path.write_text(path.read_text().replace("Subscriber()", hooks).replace("ctx.wait(0.5)", "ctx.wait(60)"))
    counted = tmp_path / "metrics"
    counted.mkdir()
    env = {"PROMETHEUS_MULTIPROC_DIR": str(counted)}
    with child(*NATSYNC, "serve", "one", "--workers", "1", url=url, cwd=tmp_path, env=env) as command:
        wait_for_serving(command, 1)
        worker = pid_of(natsync_client, prefix)
        with natsync_client.stream(f"{prefix}.slow", timeout=PATIENCE) as stream:
            assert next(stream) == b"begun"
            assert active(counted) == 1
            os.kill(worker, signal.SIGKILL)
            command.wait_for_err(f"worker {worker} ended by itself")
            assert active(counted) == 0
            wait_for_serving(command, 2)
        command.send(signal.SIGTERM)
        assert command.wait() == 0


def active(directory: Path) -> float:
    """The streams that are being served, as a scrape of all processes says."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))
    return sum(
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "natsync_responses_active" and sample.labels["subject"].endswith(".slow")
    )


def test_reload_serves_what_was_saved_and_survives_a_mistake(
    url: str, natsync_client: natsync.Client, tmp_path: Path
) -> None:
    prefix = write(tmp_path, "one", "first")

    def version() -> bytes:
        try:
            return natsync_client.request(f"{prefix}.version", timeout=PATIENCE).data
        except natsync.NoRespondersError:
            return b""

    with child(*NATSYNC, "serve", "one", "--reload", url=url, cwd=tmp_path) as command:
        wait_for_serving(command, 1)
        assert version() == b"first"
        # Whether the watch has begun cannot be seen: write until it was seen.
        eventually(lambda: write(tmp_path, "one", "second") and _soon(lambda: version() == b"second"), PATIENCE)
        (tmp_path / "one.py").write_text("def broken(:\n")
        command.wait_for_err("waiting for a change")
        assert version() == b"second"
        write(tmp_path, "one", "third")
        eventually(lambda: version() == b"third", PATIENCE)
        command.send(signal.SIGINT)
        assert command.wait() == 0


def _soon(condition: Callable[[], bool]) -> bool:
    """Whether it becomes true. watchfiles gathers changes for 1.6 s: to write more often would put off the reload."""
    try:
        eventually(condition, 8)
    except AssertionError:
        return False
    return True


def test_without_watchfiles_one_line_says_what_to_install(url: str, tmp_path: Path) -> None:
    write(tmp_path, "one")
    code = "import sys; sys.modules['watchfiles'] = None; from natsync.cli.__main__ import main; main()"
    result = run(NATSYNC[0], "-c", code, "serve", "one", "--reload", url=url, cwd=tmp_path)
    assert result.process.returncode == 2
    assert result.err == ['natsync: --reload needs watchfiles: pip install "natsync[reload]"']


USERS = 'authorization { users = [ { user: "ada", password: "S3CRET" } ] }'


@pytest.mark.parametrize("workers", [(), ("--workers", "1")], ids=["here", "in a worker"])
def test_serve_signs_in_as_its_options_say_where_the_module_leaves_it_open(
    make_nats_server, tmp_path: Path, workers: tuple[str, ...]
) -> None:
    server = make_nats_server(config=USERS)
    prefix = write(tmp_path, "one")
    environment = {"NATS_TOKEN": "wrong"}  # another kind than on the command line: does not count
    options = ("--user", "ada", "--password", "S3CRET", *workers)
    with child(*NATSYNC, "serve", "one", *options, url=server.url, cwd=tmp_path, env=environment) as command:
        wait_for_serving(command, 1)
        with natsync.Client(server.url, user="ada", password="S3CRET") as client:
            pid = pid_of(client, prefix)
            if workers:
                assert b"S3CRET" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        command.send(signal.SIGTERM)
        assert command.wait() == 0
    assert not any("S3CRET" in line for line in command.err)


def test_a_module_that_takes_plain_messages_need_not_connect_at_its_import(make_nats_server, tmp_path: Path) -> None:
    server = make_nats_server(config=USERS)
    prefix = write(tmp_path, "one")
    path = tmp_path / "one.py"
    path.write_text(
        path.read_text()
        + f'\n@subscriber.subscribe("{prefix}.news")\ndef news(message):\n    message.respond(b"heard")\n'
    )
    options = ("--workers", "2", "--user", "ada", "--password", "S3CRET")
    with child(*NATSYNC, "serve", "one", *options, url=server.url, cwd=tmp_path) as command:
        wait_for_serving(command, 2)
        assert sum(line.endswith(".pid in queue group one") for line in command.err) == 2
        with natsync.Client(server.url, user="ada", password="S3CRET") as client:
            replies = client.request_many(f"{prefix}.news", timeout=PATIENCE, max_messages=2)
            assert [reply.data for reply in replies] == [b"heard", b"heard"]  # plain messages come to all
            assert len(list(client.request_many(f"{prefix}.pid", timeout=PATIENCE, stall=0.5))) == 1
        command.send(signal.SIGTERM)
        assert command.wait() == 0


OPEN = """
import natsync

subscriber = natsync.Subscriber({options})
subscriber.batch_stream_subscribe("{prefix}.batch", lambda request, index: ([b"1"], False), queue={queue!r})
"""


def write_open(directory: Path, name: str, *, queue: str | None, options: str = "") -> None:
    """A module that opens its Subscriber when it is imported."""
    text = OPEN.format(prefix=f"serve.{directory.name}.{name}", queue=queue, options=options)
    (directory / f"{name}.py").write_text(text)


def test_an_open_subscriber_is_refused_where_the_queue_group_comes_too_late(url: str, tmp_path: Path) -> None:
    write_open(tmp_path, "early", queue=None)
    for options in (("--queue", "q"), ("--workers", "2")):
        result = run(*NATSYNC, "serve", "early", *options, url=url, cwd=tmp_path)
        assert result.process.returncode == 1
        (line,) = {line for line in result.err if "too early" in line}
        assert line.startswith(
            "natsync: 'early' was open before it was served, too early for the queue group of 'serve."
        )
        assert "decorators stream(), handler() and subscribe()" in line


@pytest.mark.parametrize("options", [(), ("--workers", "1")])
def test_an_open_subscriber_without_a_queue_group_is_served_by_one_process(
    url: str, natsync_client: natsync.Client, tmp_path: Path, options: tuple[str, ...]
) -> None:
    write_open(tmp_path, "early", queue=None)
    with child(*NATSYNC, "serve", "early", *options, url=url, cwd=tmp_path) as command:
        command.wait_for_err("early.batch")
        command.wait_for_err("in no queue group")
        subject = f"serve.{tmp_path.name}.early.batch"
        eventually(lambda: list(natsync_client.stream(subject, timeout=PATIENCE)) == [b"1"])
        command.send(signal.SIGTERM)
        assert command.wait() == 0


def test_an_open_subscriber_is_refused_where_the_credentials_come_too_late(make_nats_server, tmp_path: Path) -> None:
    server = make_nats_server(config=USERS + "\nno_auth_user: ada")
    write_open(tmp_path, "early", queue="q")
    options = ("--user", "ada", "--password", "S3CRET")
    result = run(*NATSYNC, "serve", "early", *options, url=server.url, cwd=tmp_path)
    assert result.process.returncode == 1
    assert any("too early for the connection options" in line for line in result.err)
    assert not any("S3CRET" in line for line in result.err)


@pytest.mark.parametrize("queue", ["q", None])
def test_an_open_subscriber_for_which_nothing_comes_too_late_is_served(
    url: str, natsync_client: natsync.Client, tmp_path: Path, queue: str | None
) -> None:
    write_open(tmp_path, "early", queue=queue, options="token='own'")
    options = () if queue else ("--queue", "")
    with child(*NATSYNC, "serve", "early", *options, url=url, cwd=tmp_path, env={"NATS_TOKEN": "another"}) as command:
        command.wait_for_err("early.batch" if queue is None else "early.batch in queue group q")
        assert list(natsync_client.stream(f"serve.{tmp_path.name}.early.batch", timeout=PATIENCE)) == [b"1"]
        command.send(signal.SIGTERM)
        assert command.wait() == 0


def test_what_the_module_says_of_its_connection_stays(make_nats_server, tmp_path: Path) -> None:
    server = make_nats_server(config=USERS)
    prefix = write(tmp_path, "one")
    path = tmp_path / "one.py"
    path.write_text(path.read_text().replace("Subscriber()", "Subscriber(user='ada', password='S3CRET')"))
    with child(*NATSYNC, "serve", "one", url=server.url, cwd=tmp_path, env={"NATS_TOKEN": "wrong"}) as command:
        wait_for_serving(command, 1)
        with natsync.Client(server.url, user="ada", password="S3CRET") as client:
            assert pid_of(client, prefix) == command.process.pid
