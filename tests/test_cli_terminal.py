"""The command line as a person drives it: in a pseudo-terminal, screen by screen. The screens are in snapshots/."""

from __future__ import annotations

import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import natsync
from natsync.testing import NatsServer
from processes import NATSYNC, PATIENCE, child
from support import ROOT
from terminal import CTRL_C, check_snapshot, shell, terminal

pytestmark = pytest.mark.slow

INTERRUPTED = 130
USERS = 'authorization { users = [ { user: "ada", password: "engine" } ] }'

WORKER = """
import natsync

subscriber = natsync.Subscriber()

@subscriber.stream("top.words")
def words(ctx, request):
    yield "begun"
    ctx.wait(60)

@subscriber.handler("top.length")
def length(ctx, request):
    return len(request.data)
"""


@pytest.fixture
def url(nats_server: NatsServer) -> str:
    return nats_server.url


@pytest.fixture
def subscriber(nats_server: NatsServer) -> Iterator[natsync.Subscriber]:
    with natsync.Subscriber(nats_server.url) as subscriber:
        yield subscriber


@pytest.fixture
def numbers(subscriber: natsync.Subscriber) -> threading.Event:
    """A stream on cli.numbers that falls silent; the event is set when its handler has left."""
    left = threading.Event()

    @subscriber.stream("cli.numbers")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        try:
            for number in range(3):
                yield str(number)
            ctx.wait(PATIENCE)
        finally:
            left.set()

    return left


@pytest.fixture
def endless(subscriber: natsync.Subscriber) -> threading.Event:
    """A stream on cli.endless that goes on until it is cancelled; the event is set when its handler has left."""
    left = threading.Event()

    @subscriber.stream("cli.endless")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        try:
            while not ctx.wait(0.01):
                yield "again"
        finally:
            left.set()

    return left


@pytest.mark.parametrize("command", ["", "serve", "stream", "check"])
def test_help(command: str) -> None:
    with terminal(*NATSYNC, *filter(None, [command]), "--help", columns=80, lines=90) as screen:
        assert screen.wait() == 0
    check_snapshot(f"help-{command or 'natsync'}", screen.screen)


def test_without_arguments_the_help_is_shown() -> None:
    with terminal(*NATSYNC, columns=80, lines=90) as screen:
        screen.wait()
    assert "Usage: natsync" in screen.screen


@pytest.mark.parametrize("server", ["http://127.0.0.1:4222", "nats://127.0.0.1:port", "nats://"])
def test_a_wrong_url(server: str) -> None:
    with shell(f"natsync request -s {server} x; echo status $?") as screen:
        assert screen.wait() == 0
    check_snapshot(
        "wrong-url-" + {"h": "scheme", "t": "port", "/": "empty"}[server[-1] if server[0] == "n" else "h"],
        screen.screen,
    )


def test_no_server() -> None:
    with socket.socket() as bound:  # bound, but not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        with shell(
            f"natsync request -s nats://127.0.0.1:{bound.getsockname()[1]} x; echo status $?", columns=160
        ) as screen:
            assert screen.wait() == 0
    check_snapshot("no-server", screen.screen)


def test_a_wrong_password(make_nats_server) -> None:
    server = make_nats_server(config=USERS)
    line = "natsync request --user ada --password S3CRET x; echo status $?"
    with shell(line, url=server.url, columns=160) as screen:
        assert screen.wait() == 0
    assert "S3CRET" not in screen.screen
    check_snapshot("wrong-password", screen.screen)


def test_ctrl_c_in_mid_stream(url: str, numbers: threading.Event) -> None:
    with terminal(*NATSYNC, "stream", "cli.numbers", url=url) as screen:
        screen.wait_for(r"(?m)^2$")
        screen.type(CTRL_C)
        assert screen.wait() == INTERRUPTED
    assert numbers.wait(PATIENCE)  # the handler was told
    check_snapshot("ctrl-c", screen.screen)


def test_output_into_head(url: str, endless: threading.Event) -> None:
    with shell("natsync stream --no-progress cli.endless | head -n 2; echo status $?", url=url) as screen:
        assert screen.wait() == 0
    assert endless.wait(PATIENCE)
    check_snapshot("head", screen.screen)


def test_help_into_head() -> None:
    with shell("natsync --help | head -n 1") as screen:
        assert screen.wait() == 0
    assert screen.screen == "Usage: natsync [OPTIONS] COMMAND [ARGS]...\n"


def test_a_stream_into_a_file_shows_its_progress(url: str, subscriber: natsync.Subscriber, tmp_path: Path) -> None:
    go_on = threading.Event()

    @subscriber.stream("cli.file")
    def handler(ctx: natsync.Context, request: natsync.Message) -> Iterator[bytes]:
        yield b"\x00" * 3000
        go_on.wait(PATIENCE)
        yield b"end"

    with terminal(*NATSYNC, "stream", "cli.file", "--raw", "-o", "out", url=url, cwd=tmp_path) as screen:
        screen.wait_for(r"cli\.file 1 chunk, 2\.9 KiB")
        go_on.set()
        assert screen.wait() == 0
    assert (tmp_path / "out").read_bytes() == b"\x00" * 3000 + b"end"
    check_snapshot(
        "stream-to-file", screen.screen, [(r"^\S", "*"), (r"[\d.]+ \w+/s", "RATE"), (r"\d:\d\d:\d\d", "TIME")]
    )


@pytest.mark.timeout(120)
def test_check_says_by_its_status_what_is_wrong(make_nats_server, subscriber: natsync.Subscriber, url: str) -> None:
    @subscriber.handler("cli.well")
    def well(ctx: natsync.Context, request: natsync.Message) -> str:
        return "well"

    @subscriber.handler("cli.ill")
    def ill(ctx: natsync.Context, request: natsync.Message) -> str:
        raise RuntimeError("the well ran dry")

    @subscriber.stream("cli.mute")
    def mute(ctx: natsync.Context, request: natsync.Message) -> Iterator[str]:
        ctx.wait(PATIENCE)
        yield ""

    locked = make_nats_server(config=USERS)
    gone = make_nats_server()
    gone.close()
    lines = [
        "natsync check",
        "natsync check --request cli.well",
        "natsync check --request cli.ill",
        "natsync check --timeout soon",
        f"natsync check -s {gone.url}",
        f"natsync check -s {locked.url}",
        "natsync check --request cli.nobody",
        "natsync check --request cli.mute --timeout 2s",
    ]
    script = "; ".join(f"echo {shlex.quote('$ ' + line)}; {line}; echo status $?" for line in lines)
    with shell(script, url=url, lines=60, columns=160) as screen:
        assert screen.wait(5 * PATIENCE) == 0
    masks = [(r"rtt_ms=\S+", "rtt_ms=RTT"), (r"took_ms=\S+", "took_ms=TOOK"), (r"version=\S+", "version=VERSION")]
    check_snapshot("check", screen.screen, [*masks, (r"within [\d.]+ s", "within TIME")])


@pytest.mark.timeout(120)
def test_top_follows_live_streams(url: str, natsync_client: natsync.Client, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    with (
        child(*NATSYNC, "serve", "worker", "--monitor", url=url, cwd=tmp_path) as serve,
        terminal(*NATSYNC, "top", "worker", "--interval", "1s", "--streams", "0", url=url, lines=12) as screen,
    ):
        serve.wait_for_err("serving top.length")
        screen.wait_for(r"top\.words +worker +1 +0 ")
        streams = [natsync_client.stream("top.words") for _ in range(3)]
        try:
            for stream in streams:
                assert next(stream) == b"begun"
            for _ in range(2):
                assert natsync_client.request("top.length", b"four", timeout=PATIENCE).data == b"4"
            shown = screen.wait_for(
                r"3 streams .*\n(.*\n)*top\.length +worker +1 +0 +\S+ +\S+ +2 .*\ntop\.words +worker +1 +3 "
            )
        finally:
            for stream in streams:
                stream.close()
        screen.wait_for(r"top\.words +worker +1 +0 +\d.* 3 +0$|top\.words +worker +1 +0 +\d.* 3 +0\n")
        screen.type(CTRL_C)
        assert screen.wait() == INTERRUPTED
    masks = [
        (r"127\.0\.0\.1:\d+", "ADDRESS"),
        (r"every \S+ s", "every N s"),
        (r"\d[\d,]*(\.\d)? [KM]?i?B|\b\d[\d,]*\.\d\b", "N"),
        (r"(?m)^worker +\S+ +\d+ +3 +\d+", "worker HOST PID 3 THREADS"),
        (r" {2,}", "  "),
    ]
    check_snapshot("top", shown, masks)


def test_top_says_how_a_subscriber_is_made_to_answer(url: str) -> None:
    with terminal(*NATSYNC, "top", "nobody", "--interval", "100ms", url=url, lines=8) as screen:
        shown = screen.wait_for("natsync serve --monitor")
        screen.type(CTRL_C)
        assert screen.wait() == INTERRUPTED
    check_snapshot("top-nobody", shown)


def test_services_are_listed_with_their_numbers(url: str, natsync_client: natsync.Client) -> None:
    peer = (sys.executable, str(ROOT / "tests" / "micro_peer.py"), url, "calc")
    with child(*peer) as service:
        service.wait_for_out("ready")
        assert natsync_client.request("calc.echo", b"four", timeout=PATIENCE).data == b"four"
        with pytest.raises(natsync.HandlerError):
            natsync_client.request("calc.fail", timeout=PATIENCE)
        with terminal(*NATSYNC, "services", "calc", url=url, columns=120, lines=6) as screen:
            assert screen.wait() == 0
    check_snapshot("services", screen.screen, [(r"\b\w{22}\b", "ID"), (r"\d+\.\d{3}", "TIME"), (r" {2,}", "  ")])


def test_bench_shows_bars_and_a_plot(url: str) -> None:
    command = ("bench", "request", "--messages", "1000", "--clients", "2")
    with terminal(*NATSYNC, *command, url=url, lines=30) as screen:
        assert screen.wait() == 0
    shown = screen.screen
    assert shown.count(" 500/500 ") == 2
    assert "requests a second" in shown
    assert "latency: p50" in shown
    assert "┤" in shown


def test_ctrl_c_ends_bench_and_its_other_side(url: str) -> None:
    with terminal(*NATSYNC, "bench", "stream", "--messages", "100000000", url=url, lines=10) as screen:
        screen.wait_for(r"stream 1 .* [1-9]\d*/100000000")
        screen.type(CTRL_C)
        assert screen.wait() == INTERRUPTED
    assert "Traceback" not in screen.screen


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    """In a real bash, with the script that `natsync completion bash` prints."""
    command = tmp_path / "natsync"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m natsync "$@"\n')
    command.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "INPUTRC": "/dev/null"}
    with terminal("bash", "--norc", "--noprofile", "-i", env=env, columns=80, lines=24) as screen:
        screen.wait_for(r"\$\s$")
        screen.type('eval "$(natsync completion bash)"; echo loaded\n')
        screen.wait_for(r"loaded\n\$\s$")
        screen.type("natsync serv\t\t")
        screen.wait_for(r"serve +server +services")
        screen.type("i\t")
        screen.wait_for(r"natsync services\s$")
        screen.type("--pi\t")
        shown = screen.wait_for(r"natsync services --ping")
        screen.type("\x15exit\n")  # Ctrl-U clears the line
        screen.wait()
    check_snapshot("completion", shown)
