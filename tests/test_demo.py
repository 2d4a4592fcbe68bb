"""`natsync demo`, run as a user runs it: into a pipe, on a terminal, and interrupted."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import time

import pytest

import natsync
from natsync.cli.demo.third_party import json_pieces, text_lines
from processes import NATSYNC, Child, child, started

pytestmark = pytest.mark.slow

#: Seconds that a run may take.
LIMIT = 30.0

SCENES = (
    "A slow HTTP service, line by line",
    "Two streams at once on one connection",
    "The third party fails",
    "The third party stalls: a timeout",
    "The client has seen enough: a cancel",
    "A plain NATS client: nothing but a socket",
)


@pytest.fixture(scope="module")
def piped() -> tuple[Child, float]:
    """One run into a pipe, and the seconds it took."""
    begin = time.monotonic()
    with child(*NATSYNC, "demo") as command:
        command.wait(LIMIT + 5)
    return command, time.monotonic() - begin


def test_demo_ends_by_itself_with_status_0_in_time(piped: tuple[Child, float]) -> None:
    command, seconds = piped
    assert [line for line in command.out if "✗" in line] == []
    assert command.process.returncode == 0, command
    assert seconds < LIMIT
    assert command.err == []


def test_demo_plays_every_scene_in_order(piped: tuple[Child, float]) -> None:
    text = "\n".join(piped[0].out)
    assert sorted(SCENES, key=text.index) == list(SCENES)


def test_demo_prints_every_piece_of_both_files(piped: tuple[Child, float]) -> None:
    printed = [line.partition("│ ")[2] for line in piped[0].out]
    assert [line for line in printed if line in text_lines()][: len(text_lines())] == text_lines()
    assert [line for line in printed if line in json_pieces()] == json_pieces()


def test_demo_prints_pieces_with_growing_times(piped: tuple[Child, float]) -> None:
    rows = [re.match(r" +(\d+\.\d{3}) s │ (.*)", line) for line in piped[0].out]
    times = [float(row[1]) for row in rows if row][: len(text_lines())]
    assert times == sorted(times)
    assert times[-1] > 1.5  # a dozen lines, 0.15 s each


@pytest.mark.parametrize(
    "text",
    ["HandlerError: 500 Server Error", "DeadlineExceeded: ", "cancelled at ", "__STREAM_END__", "all passed"],
)
def test_demo_shows(piped: tuple[Child, float], text: str) -> None:
    assert any(text in line for line in piped[0].out)


def test_demo_into_a_pipe_is_plain_text(piped: tuple[Child, float]) -> None:
    assert not any("\x1b" in line for line in piped[0].out)


def run_on_terminal(**environment: str) -> tuple[int, str]:
    """Status and output of a run whose standard output is a terminal."""
    terminal, inner = pty.openpty()
    output = b""
    with started(
        [*NATSYNC, "demo"],
        stdout=inner,
        stderr=subprocess.DEVNULL,
        env={"TERM": "xterm-256color", **environment},
    ) as process:
        os.close(inner)
        with contextlib.suppress(OSError):  # EIO: the other end is closed, which is how a terminal ends
            while chunk := os.read(terminal, 65536):
                output += chunk
        os.close(terminal)
        return process.wait(LIMIT), output.decode()


def test_demo_on_a_terminal_has_colours_and_the_same_scenes() -> None:
    status, text = run_on_terminal(COLUMNS="100")
    assert status == 0, text
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert sorted(SCENES, key=plain.index) == list(SCENES)


def test_demo_respects_no_color_and_the_width_of_the_terminal() -> None:
    status, text = run_on_terminal(NO_COLOR="1", COLUMNS="60")
    assert status == 0, text
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", text)  # bold and dim may stay; colours do not
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert max(map(len, lines)) <= 60


def test_demo_needs_no_utf_8() -> None:
    with child(*NATSYNC, "demo", env={"PYTHONIOENCODING": "ascii"}) as command:
        assert command.wait(LIMIT + 5) == 0, command
    assert all(line.isascii() for line in command.out)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_in_the_middle_stops_everything(number: signal.Signals, status: int) -> None:
    with child(*NATSYNC, "demo") as command:
        command.wait_for_out(text_lines()[1])
        command.send(number)
        assert command.wait() == status
    assert command.err == []
    url = re.search(r"nats://[\d.:]+", "\n".join(command.out))
    assert url is not None
    with pytest.raises(natsync.ConnectError):
        natsync.connect(url[0])
