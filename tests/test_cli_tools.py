"""check, services, top, bench, completion, and the finer points of request, pub and stream: as child processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import natsync
from natsync import monitor
from natsync.testing import NatsServer, eventually
from processes import NATSYNC, PATIENCE, Child, child, environment, run
from support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]  # each command takes seconds to start on a busy machine


@pytest.fixture
def url(nats_server: NatsServer) -> str:
    return nats_server.url


@pytest.fixture
def subscriber(nats_server: NatsServer) -> Iterator[natsync.Subscriber]:
    with natsync.Subscriber(nats_server.url) as subscriber:
        yield subscriber


@pytest.fixture
def service(url: str) -> Iterator[str]:
    """A micro service of nats-py's on the server; returns its name."""
    name = f"micro-{os.getpid()}"
    with child(sys.executable, str(ROOT / "tests" / "micro_peer.py"), url, name) as peer:
        peer.wait_for_out("ready")
        yield name


def json_of(result: Child) -> Any:
    return json.loads(result.out[-1])


# -- check -----------------------------------------------------------------------------------------------------------


def test_check_in_json_tells_each_step(url: str, service: str) -> None:
    result = run(
        *NATSYNC, "check", "--json", "--service", service, "--request", "tools.nobody", "--timeout", "10", url=url
    )
    report = json_of(result)
    assert (result.process.returncode, report["status"], report["ok"]) == (5, 5, False)
    server, found, request = report["checks"]
    assert (server["check"], server["ok"], server["url"]) == ("server", True, url)
    assert server["rtt_ms"] > 0
    assert (found["check"], found["instances"]) == ("service", 1)
    assert (request["check"], request["ok"]) == ("request", False)
    assert "tools.nobody" in request["error"]


def test_check_finds_a_service_missing(url: str) -> None:
    result = run(*NATSYNC, "check", "--service", "absent", url=url)
    assert result.process.returncode == 5
    assert result.err == ["natsync: service: no service answers on $SRV.PING.absent"]


def test_check_finds_a_failing_stream_unwell(url: str) -> None:
    with natsync.Subscriber(url) as subscriber:

        @subscriber.stream("tools.fails")
        def fails(ctx: natsync.HandlerContext, request: natsync.Message) -> list[bytes]:
            raise RuntimeError("database down")

        result = run(*NATSYNC, "check", "--request", "tools.fails", url=url)
    assert result.process.returncode == 1
    assert result.err == ["natsync: request: database down"]


def test_check_finds_a_slow_server_slow(url: str) -> None:
    result = run(*NATSYNC, "check", "--max-rtt", "0", url=url)
    assert result.process.returncode == 6
    assert "more than 0 ms" in result.err[0]


def test_check_tells_a_wrong_url_from_a_server_that_is_not_there(url: str) -> None:
    assert run(*NATSYNC, "check", "-s", "http://127.0.0.1:1").process.returncode == 2
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert run(*NATSYNC, "check", "-s", f"127.0.0.1:{bound.getsockname()[1]}").process.returncode == 3


def test_check_tells_a_certificate_that_is_not_trusted_from_a_server_that_is_not_there(
    make_nats_server, tmp_path: Path
) -> None:
    import trustme

    authority, stranger = trustme.CA(), trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "server.pem"))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    for name, one in (("ca", authority), ("stranger", stranger)):
        one.cert_pem.write_to_path(str(tmp_path / f"{name}.pem"))
    files = f'cert_file: "{tmp_path / "server.pem"}", key_file: "{tmp_path / "key.pem"}"'
    server = make_nats_server(config=f"tls {{ {files} }}")
    secure = server.url.replace("nats://", "tls://")
    assert run(*NATSYNC, "check", "--tlsca", str(tmp_path / "ca.pem"), url=secure).process.returncode == 0
    assert run(*NATSYNC, "check", "--tlsca", str(tmp_path / "stranger.pem"), url=secure).process.returncode == 4


def test_check_tells_what_the_user_may_not_do(make_nats_server) -> None:
    server = make_nats_server(
        config='authorization { users = [ { user: ada, password: engine, permissions: { publish: ["_INBOX.>"] } } ] }'
    )
    options = ("--user", "ada", "--password", "engine", "--request", "secret")
    assert run(*NATSYNC, "check", *options, url=server.url).process.returncode == 4


# -- services --------------------------------------------------------------------------------------------------------


def test_services_in_json_joins_what_info_and_stats_say(url: str, natsync_client: natsync.Client, service: str) -> None:
    assert natsync_client.request(f"{service}.echo", b"x", timeout=PATIENCE).data == b"x"
    with pytest.raises(natsync.HandlerError):
        natsync_client.request(f"{service}.fail", timeout=PATIENCE)
    (found,) = json_of(run(*NATSYNC, "services", service, "--json", "--timeout", "10", url=url))
    assert (found["name"], found["version"], found["description"]) == (service, "1.2.3", "an echo")
    assert found["started"]
    echo, fail = found["endpoints"]
    assert (echo["name"], echo["subject"], echo["num_requests"], echo["num_errors"]) == (
        "echo",
        f"{service}.echo",
        1,
        0,
    )
    assert (fail["num_requests"], fail["num_errors"]) == (1, 1)
    assert fail["last_error"]


def test_services_takes_the_id_of_one_instance(url: str, service: str) -> None:
    with child(sys.executable, str(ROOT / "tests" / "micro_peer.py"), url, service) as other:
        other.wait_for_out("ready")

        def two() -> Any:  # one may be late behind the other
            found = json_of(run(*NATSYNC, "services", service, "--ping", "--json", url=url))
            return found if len(found) == 2 else None

        both = eventually(two, PATIENCE)
        (one,) = json_of(run(*NATSYNC, "services", service, both[0]["id"], "--ping", "--json", url=url))
    assert one["id"] == both[0]["id"]
    assert one["rtt_ms"] > 0


def test_services_into_a_pipe_has_whole_columns(url: str, service: str) -> None:
    result = run(*NATSYNC, "services", service, "--timeout", "10", url=url)
    heading, *rows = [line.split() for line in result.out]
    assert heading[:3] == ["NAME", "VERSION", "ID"]
    assert [row[:2] + row[3:5] for row in rows] == [
        [service, "1.2.3", "echo", f"{service}.echo"],
        [service, "1.2.3", "fail", f"{service}.fail"],
    ]


def test_no_service_is_a_one_line_error(url: str) -> None:
    result = run(*NATSYNC, "services", "absent", url=url)
    assert (result.process.returncode, result.out) == (1, [])
    assert result.err == ["natsync: no service answers on $SRV.PING.absent"]


def test_an_answer_that_is_no_services_is_left_out(url: str, subscriber: natsync.Subscriber) -> None:
    subscriber.subscribe("$SRV.*.odd", lambda message: message.respond(b'{"type": "io.nats.micro.v1.ping_response"}'))
    assert run(*NATSYNC, "services", "odd", "--ping", url=url).process.returncode == 1


# -- top ---------------------------------------------------------------------------------------------------------------


def test_top_in_json_is_one_object_a_look(
    url: str, subscriber: natsync.Subscriber, natsync_client: natsync.Client
) -> None:
    subscriber.subscribe("tools.top", lambda message: None)
    monitor.answer(subscriber, name="json-top")
    result = run(*NATSYNC, "top", "json-top", "--json", "--count", "2", "--interval", "2s", url=url)
    assert result.process.returncode == 0
    first, second = (json.loads(line)["subscribers"][0] for line in result.out)
    assert first["out_bytes_rate"] is None
    assert second["out_bytes_rate"] > 0
    assert [entry["subject"] for entry in second["registrations"]] == ["tools.top"]


def test_top_into_a_pipe_prints_look_below_look(url: str, subscriber: natsync.Subscriber) -> None:
    monitor.answer(subscriber, name="piped-top")
    result = run(*NATSYNC, "top", "piped-top", "--count", "2", "--interval", "2s", url=url)
    assert sum(line.startswith("piped-top ") for line in result.out) == 2
    assert not any("\x1b" in line for line in result.out)


def test_top_shows_single_streams_the_longest_first(
    url: str, subscriber: natsync.Subscriber, natsync_client: natsync.Client
) -> None:
    subscriber.stream_subscribe("tools.single", lambda ctx, request, sender: (sender.send(b"12345"), ctx.wait(60)))
    monitor.answer(subscriber, name="single-top")
    streams = []
    for _ in range(3):
        streams.append(natsync_client.stream("tools.single"))
        assert streams[-1].next(10) == b"12345"
    command = [*NATSYNC, "top", "single-top", "--streams", "2", "--interval", "3s"]
    shown = run(*command, "--count", "1", url=url)
    found = [line.split() for line in shown.out if line.startswith("tools.single ") and "framed" in line]
    numbers = [int(words[2]) for words in found]
    assert len(numbers) == 2
    assert numbers == sorted(numbers)
    assert [words[-2:] for words in found] == [["framed", "open"]] * 2
    told = json.loads(run(*command, "--count", "1", "--json", url=url).out[0])["subscribers"][0]
    assert [one["number"] for one in told["open_streams"]] == numbers
    for stream in streams:
        stream.close()


# -- bench -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stream", "request", "pub"])
def test_bench_in_json_gives_the_figures(url: str, kind: str) -> None:
    result = run(*NATSYNC, "bench", kind, "--messages", "600", "--clients", "3", "--size", "10", "--json", url=url)
    assert result.process.returncode == 0, result
    figures = json_of(result)
    assert (figures["kind"], figures["messages"], figures["clients"]) == (kind, 600, 3)
    assert figures["per_second"] > 0
    assert figures["bytes_per_second"] == pytest.approx(10 * figures["per_second"], rel=0.01)
    if kind == "pub":
        assert figures["arrived"] == 600
    else:
        latency = figures["latency_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]


def test_without_plotext_bench_says_what_to_install(url: str) -> None:
    code = "import sys; sys.modules['plotext'] = None; from natsync.cli.__main__ import main; main()"
    result = run(sys.executable, "-c", code, "bench", "request", "--messages", "2000", url=url)
    assert result.process.returncode == 0, result
    assert result.out[-1] == 'for a plot: pip install "natsync[cli]" (plotext 5)'


def test_bench_that_may_not_go_on_is_a_one_line_error(make_nats_server) -> None:
    server = make_nats_server(config='authorization { users = [ { user: "ada", password: "engine" } ] }')
    result = run(*NATSYNC, "bench", "--user", "ada", "--password", "S3CRET", url=server.url)
    assert result.process.returncode == 1
    assert len(result.err) == 1
    assert "S3CRET" not in result.err[0]


def test_bench_that_takes_too_long_is_a_one_line_error(url: str) -> None:
    result = run(*NATSYNC, "bench", "stream", "--messages", "100000000", "--timeout", "2", url=url)
    assert result.process.returncode == 1
    assert len(result.err) == 1


# -- completion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_answers_each_shells_question(shell: str) -> None:
    script = "\n".join(run(*NATSYNC, "completion", shell).out)
    assert "_NATSYNC_COMPLETE" in script
    words = {"COMP_WORDS": "natsync services --pi", "COMP_CWORD": "--pi" if shell == "fish" else "2"}
    answer = run(*NATSYNC, env={"_NATSYNC_COMPLETE": f"{shell}_complete", **words})
    assert any("--ping" in line for line in answer.out)


def test_bash_takes_the_completion_script() -> None:
    script = "\n".join(run(*NATSYNC, "completion", "bash").out)
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{script}\ncomplete -p natsync"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(None, {}),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("natsync")


def test_a_shell_that_is_not_known_is_a_usage_error() -> None:
    assert run(*NATSYNC, "completion", "tcsh").process.returncode == 2


# -- request, pub, stream ----------------------------------------------------------------------------------------------


def test_request_takes_several_replies(url: str, natsync_client: natsync.Client) -> None:
    with (
        natsync_client.subscribe("tools.many", lambda message: message.respond(b"one")),
        natsync_client.subscribe("tools.many", lambda message: message.respond(b"two")),
    ):
        natsync_client.flush()
        result = run(*NATSYNC, "request", "tools.many", "--replies", "2", url=url)
        assert (result.process.returncode, sorted(result.out)) == (0, ["one", "two"])
        result = run(*NATSYNC, "request", "tools.many", "--replies", "0", "--timeout", "3", url=url)
        assert (result.process.returncode, sorted(result.out)) == (0, ["one", "two"])
        result = run(*NATSYNC, "request", "tools.many", "--replies", "3", "--timeout", "3", url=url)
        assert result.process.returncode == 1
        assert result.err == ["natsync: 2 of 3 replies from 'tools.many' within 3 s"]


def test_several_replies_that_are_errors_are_told_as_a_single_one_is(
    url: str, subscriber: natsync.Subscriber, natsync_client: natsync.Client
) -> None:
    @subscriber.handler("tools.boom")
    def boom(ctx: natsync.Context, request: natsync.Message) -> None:
        raise natsync.HandlerError("boom", code=409)

    several = ("--replies", "0", "--timeout", "3")
    single, both = (run(*NATSYNC, "request", "tools.boom", *more, url=url) for more in ((), several))
    assert (single.process.returncode, single.out, single.err) == (1, [], ["natsync: boom"])
    assert (both.process.returncode, both.out, both.err) == (1, [], ["natsync: boom"])

    with natsync_client.subscribe("tools.boom", lambda message: message.respond(b"well")):
        natsync_client.flush()
        for replies in ("0", "2"):
            result = run(*NATSYNC, "request", "tools.boom", "--replies", replies, "--timeout", "2", url=url)
            assert (result.process.returncode, result.out, result.err) == (1, ["well"], ["natsync: boom"])


@pytest.mark.parametrize("replies", ["0", "2"])
def test_several_replies_from_nobody_are_told_as_one_is(url: str, replies: str) -> None:
    single = run(*NATSYNC, "request", "tools.nobody", url=url)
    several = run(*NATSYNC, "request", "tools.nobody", "--replies", replies, url=url)
    assert (single.process.returncode, single.out) == (several.process.returncode, several.out) == (1, [])
    assert single.err == several.err == ["natsync: no responders for 'tools.nobody': nothing subscribes to it now"]


def test_pub_repeats_a_message(url: str, natsync_client: natsync.Client) -> None:
    with natsync_client.subscribe("tools.repeated") as subscription:
        natsync_client.flush()
        run(*NATSYNC, "pub", "tools.repeated", "again", "--count", "3", "--sleep", "10ms", url=url)
        assert [subscription.next(PATIENCE).data for _ in range(3)] == [b"again"] * 3
        with pytest.raises(natsync.TimedOut):
            subscription.next(0)


def test_stream_into_a_file(url: str, subscriber: natsync.Subscriber, tmp_path: Path) -> None:
    @subscriber.stream("tools.file")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        yield b'{"a":1}'
        yield b"\xff"
        if request.data:
            raise RuntimeError("the well ran dry")

    result = run(*NATSYNC, "stream", "tools.file", "-o", "out", "--json", url=url, cwd=tmp_path)
    assert (result.process.returncode, result.out) == (0, [])
    assert result.err == ["wrote 2 chunks (8 B) to out"]
    assert (tmp_path / "out").read_bytes() == b'{\n  "a": 1\n}\n\xff\n'
    result = run(*NATSYNC, "stream", "tools.file", "fail", "-o", "out", "--raw", url=url, cwd=tmp_path)
    assert (result.process.returncode, result.err) == (1, ["natsync: the well ran dry"])
    assert (tmp_path / "out").read_bytes() == b'{"a":1}\xff'  # what came before the error


def test_a_stream_of_which_nothing_comes_leaves_the_file_as_it_was(
    url: str, subscriber: natsync.Subscriber, tmp_path: Path
) -> None:
    @subscriber.stream("tools.refusing")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        if request.data:
            return
        raise natsync.HandlerError("not today")
        yield

    (tmp_path / "keep").write_bytes(b"kept")
    for subject in ("tools.nobody", "tools.refusing"):
        for name in ("keep", "new"):
            assert run(*NATSYNC, "stream", subject, "-o", name, url=url, cwd=tmp_path).process.returncode == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"keep": b"kept"}
    for name in ("keep", "new"):  # an answer without chunks is an answer
        result = run(*NATSYNC, "stream", "tools.refusing", "end", "-o", name, url=url, cwd=tmp_path)
        assert (result.process.returncode, result.err) == (0, [f"wrote 0 chunks (0 B) to {name}"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"keep": b"", "new": b""}


def test_a_shorter_stream_leaves_nothing_of_the_file_before(
    url: str, subscriber: natsync.Subscriber, tmp_path: Path
) -> None:
    subscriber.stream("tools.short")(lambda ctx, request: [b"1", b"2"])
    (tmp_path / "out").write_bytes(b"what was there before")
    run(*NATSYNC, "stream", "tools.short", "--raw", "-o", "out", url=url, cwd=tmp_path)
    assert (tmp_path / "out").read_bytes() == b"12"
    result = run(*NATSYNC, "stream", "tools.short", "-o", os.devnull, url=url, cwd=tmp_path)
    assert result.process.returncode == 0


def test_output_to_a_dash_is_standard_output(url: str, subscriber: natsync.Subscriber, tmp_path: Path) -> None:
    subscriber.stream("tools.dash")(lambda ctx, request: [b"1", b"2"])
    result = run(*NATSYNC, "stream", "tools.dash", "-o", "-", url=url, cwd=tmp_path)
    assert (result.process.returncode, result.out, result.err) == (0, ["1", "2"], [])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_told_before_anything_is_sent(
    url: str, natsync_client: natsync.Client
) -> None:
    with natsync_client.subscribe("tools.unsent") as subscription:
        natsync_client.flush()
        result = run(*NATSYNC, "stream", "tools.unsent", "-o", "/nowhere/out", url=url)
        assert result.process.returncode == 1
        assert "/nowhere/out" in result.err[0]
        natsync_client.flush()
        assert subscription.pending == 0


def test_answers_come_on_subjects_with_the_prefix_that_was_given(url: str, natsync_client: natsync.Client) -> None:
    replies: list[str | None] = []

    def answer(message: natsync.Message) -> None:
        replies.append(message.reply)
        message.respond(b"x")

    with natsync_client.subscribe("tools.prefix", answer):
        natsync_client.flush()
        for more in ((), ("--replies", "1"), ("--replies", "0", "--timeout", "3")):
            run(*NATSYNC, "request", "tools.prefix", "--inbox-prefix", "_MINE.here", *more, url=url)
    eventually(lambda: len(replies) == 3, PATIENCE)
    assert all(reply and reply.startswith("_MINE.here.") for reply in replies)
