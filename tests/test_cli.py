"""The command line, run as a user runs it: child processes against a real nats-server."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

import natsync
from credentials import CREDS, Key, Operator, nkey_users
from natsync.cli.signals import Terminated, hangups, signals_unwind
from natsync.testing import NatsServer, eventually
from processes import NATSYNC, PATIENCE, Child, child, environment, run, started

OUTPUT_CLOSED = 141
INTERRUPTED = 130


@pytest.fixture
def url(nats_server: NatsServer) -> str:
    return nats_server.url


@pytest.fixture
def subscriber(nats_server: NatsServer) -> Iterator[natsync.Subscriber]:
    with natsync.Subscriber(nats_server.url) as subscriber:
        yield subscriber


@pytest.fixture
def nowhere() -> Iterator[str]:
    """A URL at which nothing listens, for as long as the test runs."""
    with socket.socket() as bound:  # bound, but not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        yield f"nats://127.0.0.1:{bound.getsockname()[1]}"


def assert_one_line_error(result: Child, status: int, *words: str) -> None:
    assert result.process.returncode == status, result
    assert len(result.err) == 1, result
    assert result.err[0].startswith("natsync: "), result
    for word in words:
        assert word in result.err[0], result


# -- without a server ----------------------------------------------------------------------------------------


def test_version_is_the_librarys() -> None:
    result = run(*NATSYNC, "--version")
    assert result.process.returncode == 0
    assert natsync.__version__ in result.out[0]


def test_help_names_the_commands() -> None:
    result = run(*NATSYNC, "--help")
    assert result.process.returncode == 0
    text = "\n".join(result.out)
    for command in ("demo", "server", "serve", "stream", "request", "pub", "sub"):
        assert f"  {command} " in text


def test_an_unknown_option_is_a_usage_error() -> None:
    assert run(*NATSYNC, "stream", "--nonsense", "x").process.returncode == 2


def test_a_duration_that_is_none_is_a_usage_error() -> None:
    result = run(*NATSYNC, "stream", "--timeout", "soon", "x")
    assert result.process.returncode == 2
    assert "'soon' is not a duration" in result.err[-1]


def test_a_negative_timeout_is_a_usage_error() -> None:
    assert run(*NATSYNC, "request", "--timeout=-1", "x").process.returncode == 2


def test_without_click_one_line_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['click'] = None; from natsync.cli.__main__ import main; main()"
    result = run(sys.executable, "-c", code)
    assert_one_line_error(result, 2, "click", "natsync[cli]")


def test_without_flask_the_demo_says_what_to_install() -> None:
    code = "import sys; sys.modules['flask'] = None; from natsync.cli.__main__ import main; main(['demo'])"
    result = run(sys.executable, "-c", code)
    assert_one_line_error(result, 2, "flask", 'pip install "natsync[demo]"')


def test_a_server_that_is_not_there_is_a_one_line_error(nowhere: str) -> None:
    result = run(*NATSYNC, "request", "-s", nowhere, "x")
    assert_one_line_error(result, 1, nowhere.removeprefix("nats://"))


def test_a_url_of_another_protocol_is_a_one_line_error() -> None:
    assert_one_line_error(run(*NATSYNC, "stream", "-s", "http://127.0.0.1:1", "x"), 1, "http")


def test_debug_adds_the_traceback(nowhere: str) -> None:
    result = run(*NATSYNC, "request", "--debug", "-s", nowhere, "x")
    assert result.process.returncode == 1
    assert any(line.startswith("Traceback") for line in result.err)
    assert any(line.startswith("natsync: ") for line in result.err)  # what was logged of the attempt may come behind it


# -- stream --------------------------------------------------------------------------------------------------


def test_stream_prints_each_chunk_when_it_comes(url: str, subscriber: natsync.Subscriber) -> None:
    go_on = threading.Event()

    @subscriber.stream("cli.piecewise")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        yield f"first for {request.text()}"
        go_on.wait(PATIENCE)
        yield "second"

    with child(*NATSYNC, "stream", "cli.piecewise", "me", url=url) as command:
        command.wait_for_out("first for me")
        assert command.out == ["first for me"]  # while the handler still holds the rest back
        go_on.set()
        assert command.wait() == 0
    assert command.out == ["first for me", "second"]
    assert command.err == []


def test_stream_reads_its_payload_from_stdin(url: str, subscriber: natsync.Subscriber) -> None:
    @subscriber.stream("cli.stdin")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        yield from request.data.split()

    result = run(*NATSYNC, "stream", "cli.stdin", "-", url=url, stdin=b"one two\nthree\n")
    assert result.out == ["one", "two", "three"]


def test_stream_sends_headers_with_all_their_values(url: str, subscriber: natsync.Subscriber) -> None:
    @subscriber.stream("cli.headers")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        yield from request.headers.get_all("Colour")

    result = run(*NATSYNC, "stream", "cli.headers", "-H", "Colour:red", "--header", "Colour: blue", url=url)
    assert result.out == ["red", "blue"]


def test_raw_writes_the_chunks_and_nothing_else(url: str, subscriber: natsync.Subscriber) -> None:
    @subscriber.stream("cli.raw")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        yield b"\x00\xff"
        yield b"\r\n\x80"

    with started([*NATSYNC, "stream", "cli.raw", "--raw"], url=url) as process:
        out, _ = process.communicate(timeout=PATIENCE)
    assert out == b"\x00\xff\r\n\x80"


def test_json_indents_what_is_json_and_leaves_the_rest(url: str, subscriber: natsync.Subscriber) -> None:
    @subscriber.stream("cli.json")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        yield '{"a":1}'
        yield "no json"

    result = run(*NATSYNC, "stream", "cli.json", "--json", url=url)
    assert result.out == ["{", '  "a": 1', "}", "no json"]


def test_no_responders_is_a_one_line_error(url: str) -> None:
    assert_one_line_error(run(*NATSYNC, "stream", "cli.nobody", url=url), 1, "no responders", "cli.nobody")


def test_an_error_in_mid_stream_comes_after_the_chunks(url: str, subscriber: natsync.Subscriber) -> None:
    @subscriber.stream("cli.fails")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        yield "one"
        raise RuntimeError("the well\nran dry")

    result = run(*NATSYNC, "stream", "cli.fails", url=url)
    assert result.out == ["one"]
    assert_one_line_error(result, 1, "the well ran dry")


def test_timeout_ends_a_stream_that_lasts_too_long(url: str, subscriber: natsync.Subscriber) -> None:
    @subscriber.stream("cli.endless")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        while not ctx.wait(0.02):
            yield "again"

    result = run(*NATSYNC, "stream", "cli.endless", "--timeout", "3", url=url)
    assert "again" in result.out
    assert_one_line_error(result, 1)


def test_idle_timeout_ends_a_stream_that_falls_silent(url: str, subscriber: natsync.Subscriber) -> None:
    released = threading.Event()

    @subscriber.stream("cli.silent")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        yield "one"
        released.wait(PATIENCE)

    try:
        result = run(*NATSYNC, "stream", "cli.silent", "--idle-timeout", "2", url=url)
    finally:
        released.set()
    assert result.out == ["one"]
    assert_one_line_error(result, 1)


def test_ctrl_c_ends_a_stream_quietly_and_cancels_it(url: str, subscriber: natsync.Subscriber) -> None:
    ended = threading.Event()

    @subscriber.stream("cli.interrupted")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        try:
            while not ctx.wait(0.02):
                yield "again"
        finally:
            ended.set()

    with child(*NATSYNC, "stream", "cli.interrupted", url=url) as command:
        command.wait_for_out("again")
        command.send(signal.SIGINT)
        assert command.wait() == INTERRUPTED
    assert command.err == []
    assert ended.wait(PATIENCE)


def test_a_reader_that_leaves_the_pipe_ends_a_stream_quietly(url: str, subscriber: natsync.Subscriber) -> None:
    ended = threading.Event()

    @subscriber.stream("cli.pipe")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        try:
            while not ctx.wait(0.01):
                yield "again"
        finally:
            ended.set()

    with (
        started([*NATSYNC, "stream", "cli.pipe"], url=url) as process,
        started(["head", "-n", "2"], stdin=process.stdout.fileno()) as head,
    ):
        process.stdout.close()
        out, _ = head.communicate(timeout=PATIENCE)
        assert process.wait(PATIENCE) == OUTPUT_CLOSED
        assert process.stderr.read() == b""
    assert out == b"again\nagain\n"
    assert ended.wait(PATIENCE)


# -- request, pub, sub ---------------------------------------------------------------------------------------


def test_request_prints_the_reply(url: str, subscriber: natsync.Subscriber) -> None:
    @subscriber.handler("cli.sum")
    def handler(ctx: natsync.Context, request: natsync.Message) -> dict[str, int]:
        return {"sum": sum(request.json())}

    result = run(*NATSYNC, "request", "cli.sum", "[1, 2, 3]", url=url)
    assert result.process.returncode == 0
    assert json.loads("".join(result.out)) == {"sum": 6}


def test_a_handlers_exception_is_a_one_line_error(url: str, subscriber: natsync.Subscriber) -> None:
    @subscriber.handler("cli.broken")
    def handler(ctx: natsync.Context, request: natsync.Message) -> None:
        raise LookupError("no such thing")

    assert_one_line_error(run(*NATSYNC, "request", "cli.broken", url=url), 1, "no such thing")


def test_the_environments_timeout_bounds_a_request(url: str, natsync_client: natsync.Client) -> None:
    with natsync_client.subscribe("cli.mute"):
        natsync_client.flush()
        result = run(*NATSYNC, "request", "cli.mute", url=url, env={"NATS_TIMEOUT": "200ms"})
    assert_one_line_error(result, 1, "no reply", "within 0.")


def test_pub_has_reached_the_server_when_it_ends(url: str, natsync_client: natsync.Client) -> None:
    with natsync_client.subscribe("cli.pub") as subscription:
        natsync_client.flush()
        result = run(*NATSYNC, "pub", "cli.pub", "häuser", "--reply", "answers.here", "-H", "Kind:test", url=url)
        assert result.process.returncode == 0
        message = subscription.next(timeout=PATIENCE)
    assert (message.text(), message.reply, message.headers["Kind"]) == ("häuser", "answers.here", "test")


def test_a_subject_with_a_space_is_a_one_line_error(url: str) -> None:
    assert_one_line_error(run(*NATSYNC, "pub", "two words", "x", url=url), 1, "two words")


def test_sub_leaves_after_count_messages(url: str, natsync_client: natsync.Client) -> None:
    with child(*NATSYNC, "sub", "cli.sub.*", "--count", "2", url=url) as command:
        command.wait_for_err("listening on cli.sub.*")
        natsync_client.publish("cli.sub.a", "one")
        natsync_client.publish("cli.sub.b", "two")
        assert command.wait() == 0
    assert command.out == ["one", "two"]


def test_sub_shows_subject_reply_and_headers_when_asked(url: str, natsync_client: natsync.Client) -> None:
    with child(*NATSYNC, "sub", "cli.verbose", "--count", "1", "-v", url=url) as command:
        command.wait_for_err("listening")
        natsync_client.publish("cli.verbose", "one", reply="back.here", headers={"Kind": "test"})
        assert command.wait() == 0
    assert command.out == ["# cli.verbose (reply back.here)", "# Kind: test", "one"]


def test_members_of_a_queue_group_share_the_messages(url: str, natsync_client: natsync.Client) -> None:
    arguments = (*NATSYNC, "sub", "cli.queue", "--queue", "group")
    with child(*arguments, url=url) as one, child(*arguments, url=url) as other:
        one.wait_for_err("listening")
        other.wait_for_err("listening")
        sent = [str(number) for number in range(50)]
        for text in sent:
            natsync_client.publish("cli.queue", text)
        eventually(lambda: len(one.out) + len(other.out) >= len(sent), PATIENCE)
    assert sorted(one.out + other.out, key=int) == sent


def test_ctrl_c_ends_sub_quietly(url: str) -> None:
    with child(*NATSYNC, "sub", "cli.idle", url=url) as command:
        command.wait_for_err("listening")
        command.send(signal.SIGINT)
        assert command.wait() == INTERRUPTED
    assert command.err == ["listening on cli.idle"]


# -- connection options --------------------------------------------------------------------------------------

USERS = 'authorization { users = [ { user: "ada", password: "engine" } ] }'
TOKEN = 'authorization { token: "sesame" }'


def test_credentials_come_from_the_environment(make_nats_server) -> None:
    server = make_nats_server(config=USERS)
    environment = {"NATS_USER": "ada", "NATS_PASSWORD": "engine"}
    assert run(*NATSYNC, "pub", "x", url=server.url, env=environment).process.returncode == 0


def test_an_option_wins_over_the_environment(make_nats_server) -> None:
    server = make_nats_server(config=USERS)
    environment = {"NATS_USER": "ada", "NATS_PASSWORD": "wrong"}
    result = run(*NATSYNC, "pub", "x", "--password", "engine", url=server.url, env=environment)
    assert result.process.returncode == 0, result


def test_connection_options_may_stand_before_the_command(make_nats_server, nowhere: str) -> None:
    server = make_nats_server(config=TOKEN)
    result = run(*NATSYNC, "-s", server.url, "--token", "sesame", "pub", "x", url=nowhere)
    assert result.process.returncode == 0, result


def test_a_user_without_a_password_is_a_token(make_nats_server) -> None:
    server = make_nats_server(config=TOKEN)
    assert run(*NATSYNC, "pub", "x", "--user", "sesame", url=server.url).process.returncode == 0


def test_a_password_without_a_user_is_a_usage_error(url: str) -> None:
    result = run(*NATSYNC, "pub", "x", "--password", "S3CRET", url=url)
    assert result.process.returncode == 2
    assert "--password needs --user" in result.err[-1]
    assert "S3CRET" not in "\n".join(result.err)


def test_wrong_credentials_are_a_one_line_error_that_does_not_show_them(make_nats_server) -> None:
    server = make_nats_server(config=USERS)
    result = run(*NATSYNC, "pub", "x", "--user", "ada", "--password", "S3CRET", url=server.url)
    assert_one_line_error(result, 1, "uthorization")
    assert "S3CRET" not in result.err[0]


@pytest.fixture
def creds_server(make_nats_server, tmp_path: Path) -> tuple[NatsServer, Path]:
    """A server in operator mode, and the .creds file of one of its users."""
    operator, path = Operator(), tmp_path / "ada.creds"
    path.write_text(operator.user())
    return make_nats_server(config=operator.config()), path


def test_creds_may_be_an_option_or_come_from_the_environment(creds_server: tuple[NatsServer, Path]) -> None:
    server, path = creds_server
    assert run(*NATSYNC, "pub", "x", "--creds", str(path), url=server.url).process.returncode == 0
    assert run(*NATSYNC, "pub", "x", url=server.url, env={"NATS_CREDS": str(path)}).process.returncode == 0
    at_home = {"NATS_CREDS": "~/ada.creds", "HOME": str(path.parent)}
    assert run(*NATSYNC, "pub", "x", url=server.url, env=at_home).process.returncode == 0
    assert_one_line_error(run(*NATSYNC, "pub", "x", url=server.url), 1, "uthorization")


def test_creds_that_are_garbled_are_a_one_line_error_that_does_not_show_them(
    creds_server: tuple[NatsServer, Path],
) -> None:
    server, path = creds_server
    text = path.read_text()
    path.write_text(text.replace("END NATS", "STOP"))
    result = run(*NATSYNC, "pub", "x", "--creds", str(path), url=server.url)
    assert_one_line_error(result, 1, "ada.creds", "NATS USER JWT")
    assert text.split()[4] not in result.err[0]


@pytest.mark.parametrize(
    "form", ["{}", "{}\n", "# the seed of ada\n{}\n", CREDS.replace("{jwt}", "a.b.c").replace("seed", "")]
)
def test_nkey_names_the_file_of_a_seed(make_nats_server, tmp_path: Path, form: str) -> None:
    key, path = Key(), tmp_path / "ada.nk"
    path.write_text(form.format(key.seed))
    server = make_nats_server(config=nkey_users(key))
    assert run(*NATSYNC, "pub", "x", "--nkey", str(path), url=server.url).process.returncode == 0
    assert run(*NATSYNC, "pub", "x", url=server.url, env={"NATS_NKEY": str(path)}).process.returncode == 0


def test_a_file_without_a_seed_is_a_one_line_error(url: str, tmp_path: Path) -> None:
    path = tmp_path / "ada.nk"
    path.write_text("S3CRET")
    result = run(*NATSYNC, "pub", "x", "--nkey", str(path), url=url)
    assert_one_line_error(result, 1, "ada.nk", "not an nkey seed")
    assert "S3CRET" not in result.err[0]


@pytest.mark.parametrize("option", ["--creds", "--nkey"])
@pytest.mark.parametrize("content", [b"\xff\xfe\x00garbage" * 50, b"x" * ((1 << 20) + 1)], ids=["binary", "large"])
def test_a_file_that_holds_no_secret_is_named_before_a_server_is_dialed(
    nowhere: str, tmp_path: Path, option: str, content: bytes
) -> None:
    path = tmp_path / "ada.creds"
    path.write_bytes(content)
    result = run(*NATSYNC, "pub", "x", option, str(path), url=nowhere)
    assert_one_line_error(result, 1, "ada.creds")
    assert "server" not in result.err[0]


def test_a_seed_behind_a_byte_order_mark_is_found(make_nats_server, tmp_path: Path) -> None:
    key, path = Key(), tmp_path / "ada.nk"
    path.write_text(key.seed, "utf-8-sig")
    server = make_nats_server(config=nkey_users(key))
    assert run(*NATSYNC, "pub", "x", "--nkey", str(path), url=server.url).process.returncode == 0


@pytest.mark.parametrize("option", ["--creds", "--nkey"])
def test_a_file_that_is_not_there_is_a_usage_error(url: str, option: str) -> None:
    assert run(*NATSYNC, "pub", "x", option, "nowhere", url=url).process.returncode == 2


def test_credentials_of_two_kinds_on_the_command_line_are_a_usage_error(
    creds_server: tuple[NatsServer, Path],
) -> None:
    server, path = creds_server
    result = run(*NATSYNC, "pub", "x", "--creds", str(path), "--token", "S3CRET", url=server.url)
    assert result.process.returncode == 2
    assert "--creds and --token" in result.err[-1]


def test_credentials_on_the_command_line_win_over_another_kind_in_the_environment(
    creds_server: tuple[NatsServer, Path],
) -> None:
    server, path = creds_server
    environment = {"NATS_USER": "ada", "NATS_PASSWORD": "S3CRET", "NATS_TOKEN": "S3CRET"}
    result = run(*NATSYNC, "pub", "x", "--creds", str(path), url=server.url, env=environment)
    assert result.process.returncode == 0, result


def test_of_two_kinds_in_the_environment_the_user_goes_first(creds_server: tuple[NatsServer, Path]) -> None:
    server, path = creds_server
    environment = {"NATS_USER": "ada", "NATS_PASSWORD": "S3CRET", "NATS_CREDS": str(path)}
    assert_one_line_error(run(*NATSYNC, "pub", "x", url=server.url, env=environment), 1, "uthorization")


PERMISSIONS = """
    authorization { users = [ { user: "ada", password: "engine", permissions: {
        publish: ["allowed", "_INBOX.>"], subscribe: ["allowed", "_INBOX.>"] } } ] }
"""


@pytest.mark.parametrize(
    "command",
    [
        ("pub", "secret", "x"),
        ("request", "secret"),
        ("stream", "secret"),
        ("sub", "secret"),
    ],
)
def test_what_the_server_refuses_is_a_one_line_error(make_nats_server, command: tuple[str, ...]) -> None:
    server = make_nats_server(config=PERMISSIONS)
    environment = {"NATS_USER": "ada", "NATS_PASSWORD": "engine"}
    result = run(*NATSYNC, *command, url=server.url, env=environment)
    assert result.process.returncode == 1, result
    assert result.err[-1].startswith("natsync: the server says: Permissions Violation"), result


def test_sub_outlives_a_restart_of_the_server_and_says_so(make_nats_server) -> None:
    server = make_nats_server()
    with child(*NATSYNC, "sub", "cli.lasting", "--count", "1", url=server.url) as command:
        command.wait_for_err("listening")
        server.restart()
        command.wait_for_err("connected again")
        with natsync.Client(server.url) as client:

            def ended() -> bool:  # its SUB is on its way as it says so
                client.publish("cli.lasting", "still there")
                client.flush()
                return command.process.poll() is not None

            eventually(ended, PATIENCE)
        assert command.wait() == 0
    assert command.out == ["still there"]
    assert any("disconnected" in line for line in command.err)


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, str]:
    """Files of an authority, a server's certificate and key, and a client's, all of that authority."""
    import trustme

    authority = trustme.CA()
    files = {name: str(tmp_path / f"{name}.pem") for name in ("ca", "server", "server_key", "cert", "key")}
    authority.cert_pem.write_to_path(files["ca"])
    for identity, certificate, key in (("127.0.0.1", "server", "server_key"), ("ada@example.org", "cert", "key")):
        issued = authority.issue_cert(identity)
        issued.cert_chain_pems[0].write_to_path(files[certificate])
        issued.private_key_pem.write_to_path(files[key])
    return files


def test_tls_with_a_client_certificate_from_the_environment(make_nats_server, certificates) -> None:
    config = """
        tls {{ ca_file: "{ca}", cert_file: "{server}", key_file: "{server_key}", verify: true }}
    """
    server = make_nats_server(config=config.format(**certificates))
    environment = {f"NATS_{name.upper()}": certificates[name] for name in ("ca", "cert", "key")}
    assert run(*NATSYNC, "pub", "x", url=server.url, env=environment).process.returncode == 0
    without = {"NATS_CA": certificates["ca"]}
    assert_one_line_error(run(*NATSYNC, "pub", "x", url=server.url, env=without), 1)


@pytest.mark.parametrize("option", ["--tlsfirst", "--tls-first"])
def test_tlsfirst_starts_tls_before_the_greeting(make_nats_server, certificates, option: str) -> None:
    config = 'tls {{ handshake_first: true, cert_file: "{server}", key_file: "{server_key}" }}'
    server = make_nats_server(config=config.format(**certificates))
    command = (*NATSYNC, "pub", "x", "--tlsca", certificates["ca"])
    assert run(*command, option, url=server.url).process.returncode == 0
    assert run(*NATSYNC, option, *command[len(NATSYNC) :], url=server.url).process.returncode == 0
    assert_one_line_error(run(*command, url=server.url), 1, "tls_first")


def test_tlsfirst_without_any_file_verifies_as_usual(make_nats_server, certificates) -> None:
    config = 'tls {{ handshake_first: true, cert_file: "{server}", key_file: "{server_key}" }}'
    server = make_nats_server(config=config.format(**certificates))
    assert_one_line_error(run(*NATSYNC, "pub", "x", "--tlsfirst", url=server.url), 1, "CERTIFICATE_VERIFY_FAILED")


def test_a_key_without_a_certificate_is_a_usage_error(url: str, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.touch()
    assert run(*NATSYNC, "pub", "x", "--tlskey", str(key), url=url).process.returncode == 2


# -- serve ---------------------------------------------------------------------------------------------------

WORKER = """
    import natsync
    subscriber = natsync.Subscriber()

    @subscriber.stream("{prefix}.words", queue="group")
    def words(ctx, request):
        for word in request.text().split():
            yield word
            ctx.wait(0.05)

    @subscriber.handler("{prefix}.length")
    def length(ctx, request):
        return len(request.data)

    def make():
        return subscriber

    nothing = 3
"""


@pytest.fixture
def worker(tmp_path: Path) -> str:
    """A module in the current directory of the command; returns the prefix of its subjects."""
    prefix = f"cli.{tmp_path.name}"
    (tmp_path / "worker.py").write_text(dedent(WORKER.format(prefix=prefix)))
    return prefix


@pytest.mark.parametrize("target", ["worker", "worker:subscriber", "worker:make"])
def test_serve_runs_a_modules_handlers_until_sigterm(
    url: str, natsync_client: natsync.Client, tmp_path: Path, worker: str, target: str
) -> None:
    with child(*NATSYNC, "serve", target, url=url, cwd=tmp_path) as command:
        command.wait_for_err(f"{worker}.length")
        command.wait_for_err(f"{worker}.words")
        assert natsync_client.request(f"{worker}.length", "four", timeout=PATIENCE).data == b"4"
        command.send(signal.SIGTERM)
        assert command.wait() == 0
    assert not any("Traceback" in line for line in command.err)


@pytest.mark.parametrize(
    ("options", "group"),
    [((), " in queue group worker"), (("--queue", "mine"), " in queue group mine"), (("--queue", ""), "")],
)
def test_serve_puts_handlers_without_a_queue_group_into_one_and_says_so(
    url: str, tmp_path: Path, worker: str, options: tuple[str, ...], group: str
) -> None:
    with child(*NATSYNC, "serve", "worker", *options, url=url, cwd=tmp_path) as command:
        command.wait_for_err(f"{worker}.length")
        command.wait_for_err(f"{worker}.words")
        command.send(signal.SIGTERM)
        assert command.wait() == 0
    serving = [line.strip() for line in command.err if line.startswith("serving ")]
    assert sorted(serving) == sorted(
        [f"serving {worker}.words in queue group group", f"serving {worker}.length{group}"]
    )


def test_two_processes_of_serve_share_the_requests(
    url: str, natsync_client: natsync.Client, tmp_path: Path, worker: str
) -> None:
    with (
        child(*NATSYNC, "serve", "worker", url=url, cwd=tmp_path) as one,
        child(*NATSYNC, "serve", "worker", url=url, cwd=tmp_path) as other,
    ):
        for command in (one, other):
            command.wait_for_err(f"{worker}.length")
            command.wait_for_err(f"{worker}.words")
        inbox = natsync_client.subscribe("cli.answers")
        natsync_client.publish(f"{worker}.length", b"four", reply="cli.answers")
        assert inbox.next(PATIENCE).data == b"4"
        with pytest.raises(natsync.TimedOut):
            inbox.next(0.3)


def test_serve_lets_a_running_stream_finish_after_ctrl_c(
    url: str, natsync_client: natsync.Client, tmp_path: Path, worker: str
) -> None:
    sent = [str(number) for number in range(10)]
    with child(*NATSYNC, "serve", "worker", url=url, cwd=tmp_path) as command:
        command.wait_for_err(f"{worker}.words")
        with natsync_client.stream(f"{worker}.words", " ".join(sent), timeout=PATIENCE) as stream:
            got = [next(stream).decode()]
            command.send(signal.SIGINT)
            got += [chunk.decode() for chunk in stream]
        assert command.wait() == 0
    assert got == sent


def test_serve_takes_the_server_from_its_option(
    url: str, natsync_client: natsync.Client, tmp_path: Path, worker: str
) -> None:
    with child(*NATSYNC, "serve", "worker", "-s", url, cwd=tmp_path) as command:
        command.wait_for_err(f"{worker}.length")
        assert natsync_client.request(f"{worker}.length", timeout=PATIENCE).data == b"0"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("absent", "no module 'absent'"),
        ("worker.py", "write 'worker'"),
        ("worker:absent", "no 'absent'"),
        ("worker:nothing", "int"),
    ],
)
def test_serve_says_in_one_line_what_is_wrong_with_its_target(
    url: str, tmp_path: Path, worker: str, target: str, words: str
) -> None:
    assert_one_line_error(run(*NATSYNC, "serve", target, url=url, cwd=tmp_path), 1, words)


def test_serve_without_a_server_ends_with_one_line_after_the_log(nowhere: str, tmp_path: Path, worker: str) -> None:
    result = run(*NATSYNC, "serve", "worker", "--log-level", "error", url=nowhere, cwd=tmp_path)
    assert_one_line_error(result, 1, nowhere)


# -- server --------------------------------------------------------------------------------------------------


def server_url(command: Child) -> str:
    return next(word for word in command.out[0].split() if word.startswith("nats://"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_server_runs_until_a_signal(number: signal.Signals) -> None:
    with child(*NATSYNC, "server", "--port", "0") as command:
        command.wait_for_out("nats://")
        url = server_url(command)
        with natsync.Client(url) as client:
            client.flush()
        command.send(number)
        assert command.wait() == 0
    with pytest.raises(natsync.ConnectError):
        natsync.connect(url)


def test_server_and_its_nats_server_end_with_their_terminal(tmp_path: Path) -> None:
    outer, inner = pty.openpty()
    command = subprocess.Popen(
        # Its own session, whose terminal is the one that is opened first.
        [sys.executable, "-c", "import os, sys\nos.open(sys.argv[1], os.O_RDWR)\nos.execv(sys.argv[2], sys.argv[2:])",
         os.ttyname(inner), *NATSYNC, "server", "--port", "0"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=environment(None, {"TMPDIR": str(tmp_path)}), start_new_session=True,
    )  # fmt: skip
    os.close(inner)
    try:
        assert command.stdout is not None
        pid = int(command.stdout.readline().split()[-1])
        os.close(outer)
        assert command.wait(PATIENCE) == 0
    finally:
        command.kill()
        command.communicate()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_hangup_that_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `nohup natsync server` has it."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert hangups() == []
        with signals_unwind():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, former)
    monkeypatch.delattr(signal, "SIGHUP")  # as on Windows
    assert hangups() == []


def test_a_second_hangup_does_not_cut_short_what_the_first_one_unwinds() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    unwound = []
    try:
        with pytest.raises(Terminated) as ended, signals_unwind():
            try:
                os.kill(os.getpid(), signal.SIGHUP)
            finally:
                os.kill(os.getpid(), signal.SIGHUP)
                unwound.append(True)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, former)
    assert (ended.value.code, unwound) == (129, [True])


def test_server_offers_jetstream_when_asked() -> None:
    with child(*NATSYNC, "server", "--port", "0", "--jetstream") as command:
        command.wait_for_out("nats://")
        with natsync.Client(server_url(command)) as client:
            reply = client.request("$JS.API.INFO", timeout=PATIENCE)
            assert reply.json()["type"] == "io.nats.jetstream.api.v1.account_info_response"
        command.send(signal.SIGTERM)
        assert command.wait() == 0


def test_a_port_that_is_taken_is_a_one_line_error(nats_server: NatsServer) -> None:
    result = run(*NATSYNC, "server", "--port", str(nats_server.port))
    assert_one_line_error(result, 1, "address already in use")


def test_server_says_so_when_its_process_dies(nats_server: NatsServer) -> None:
    with child(*NATSYNC, "server", "--port", "0") as command:
        command.wait_for_out("nats://")
        os.kill(int(command.out[0].split()[-1]), signal.SIGKILL)
        command.wait()
    assert_one_line_error(command, 1, "ended by itself")
