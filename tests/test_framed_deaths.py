"""Framed streams whose other side dies, freezes or leaves: who is told, of what, and how soon.

The side that dies is a process of its own. Options shorten grace and heartbeat so that each test takes seconds;
NATSYNC_ENDURANCE=full runs those with the defaults too.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

import natsync
from broker import QUICK
from framed import SUBJECT, Table
from natsync import timers
from natsync.streaming import peers
from natsync.testing import NatsServer, eventually
from numbered import (
    FULL,
    PATIENCE,
    Handled,
    Recording,
    Taking,
    bounded,
    serve,
    sized,
)
from processes import Child, child
from rawclient import END, RawClient

MakeServer = Callable[..., NatsServer]

pytestmark = pytest.mark.slow

#: Seconds by which a limit may be overrun on a busy machine, but not three times running: see `in_time`.
SLACK = 3.0
#: What protocol.md allows beyond grace, and beyond heartbeat and grace.
NOTICE = 3.0
#: Seconds of grace and heartbeat, in the names of their options.
SHORT: dict[str, Any] = {"resume_grace": 1.0, "heartbeat": 0.5}
DEFAULTS: dict[str, Any] = {"resume_grace": 10.0, "heartbeat": 5.0}
TIMES = [SHORT, DEFAULTS] if FULL else [SHORT]

# A client: python -c CLIENT URL OPTIONS MODE, options and mode being those of take() below.
CLIENT = """
import gc, itertools, signal, sys, time
import natsync
url, options, mode, ask = sys.argv[1], eval(sys.argv[2]), sys.argv[3], sys.argv[4]
client = natsync.connect(url, **options)
stream = client.stream("d.send", ask, window=eval((sys.argv[5:] or ["8192"])[0]))


def first():
    chunk = next(stream)
    print("first", flush=True)
    return chunk


if mode == "early":
    client.flush()  # or the request would be withdrawn
    stream.close()
elif mode == "end":
    client.flush()
elif mode == "read":
    first()
    for chunk in stream:
        pass
    print("complete", flush=True)
elif mode == "count":
    first()
    number = 1
    for number, chunk in enumerate(stream, 2):
        assert chunk == b"%d" % number, (number, chunk)
    print(f"complete {number}", flush=True)
elif mode == "hold":
    first()
    time.sleep(600)
elif mode == "interrupted":
    print("asked", flush=True)
    for chunk in stream:
        print("first", flush=True)
elif mode == "exit":
    first()
    print("left", flush=True)
    sys.exit(3)
"""

# A client that says when its responder is not heard from: python -c SUSPENDED URL OPTIONS
SUSPENDED = f"""
import sys
import natsync
from natsync.testing import eventually
with natsync.connect(sys.argv[1], **eval(sys.argv[2])) as client:
    stream = client.stream("{SUBJECT}")
    next(stream)
    print("first", flush=True)
    eventually(lambda: stream._call._offered._peer.suspended, {PATIENCE})
    print("suspended", flush=True)
    print("complete", len(list(stream)), flush=True)
"""

# A responder that sends as Recording does: python -c SERVER URL OPTIONS
SERVER = """
import sys
import threading
import natsync
from numbered import Recording, serve
subscriber = natsync.Subscriber(sys.argv[1], **eval(sys.argv[2]))
subscriber.stream_subscribe("d.send", Recording(), queue="d")
serve(subscriber)
print("serving", flush=True)
threading.Event().wait()
"""


@pytest.fixture
def server(make_nats_server: MakeServer) -> NatsServer:
    return make_nats_server()


@pytest.fixture
def recording() -> Recording:
    return Recording()


def responder(url: str, recording: Recording, **options: Any) -> natsync.Subscriber:
    """A subscriber with d.send, to be closed."""
    subscriber = natsync.Subscriber(url, **{**QUICK, **options})
    subscriber.stream_subscribe("d.send", recording)
    return subscriber


def program(code: str, url: str, *arguments: object) -> Any:
    return child(sys.executable, "-c", code, url, *map(str, arguments), env={"PYTHONPATH": os.path.dirname(__file__)})


def stuck(handled: Handled) -> None:
    """Block until the handler waits for credit."""
    seen = -1

    def still() -> bool:
        nonlocal seen
        before, seen = seen, handled.reached
        return before == seen

    eventually(still, PATIENCE, "the handler goes on and on")


#: What the handler does when its client goes: how it is asked, and whether the client reads.
DOING = {"sending": ("steady", "read"), "blocked": ("fast", "hold"), "idle": ("idle", "hold")}


def under_way(process: Child, recording: Recording, doing: str) -> Handled:
    """The handler, doing what it should do when its client goes."""
    process.wait_for_out("first")
    handled = recording.wait()
    if doing == "blocked":
        stuck(handled)
        stuck(handled)
    return handled


def allowed(doing: str, times: dict[str, Any]) -> float:
    """Seconds from a client's death to the end of its handler's context."""
    idle = times["heartbeat"] if doing == "idle" else 0.0
    return float(times["resume_grace"] + idle + NOTICE)


#: By how much the responder's peers have looked late in this test, because the machine was busy.
looked_late: list[float] = []


@pytest.fixture(autouse=True)
def _late_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(due: float, now: float) -> float:
        late = timers.lateness(due, now)
        if late:
            looked_late.append(late)
        return late

    looked_late.clear()
    monkeypatch.setattr(peers, "lateness", noted)


class Late(AssertionError):
    """What was to come in time came later."""


def in_time(test: Callable[..., None]) -> Callable[..., None]:
    """Once more, up to twice, if it was Late: a busy machine may hold anything up, but not each time."""

    @functools.wraps(test)
    def tried(**fixtures: Any) -> None:
        for tries_left in (2, 1, 0):
            try:
                return test(**fixtures)
            except Late as error:
                print(f"late: {error}")
                if not tries_left:
                    raise
                looked_late.clear()
                if "recording" in fixtures:
                    fixtures["recording"].all.clear()

    return tried


def within(limit: float, took: float, why: object = "") -> None:
    if took > limit:
        raise Late(f"{took:.2f} s instead of {limit:g} s {why}")


def gone(handled: Handled, began: float, limit: float) -> None:
    """The handler is told that its client is gone, in time; if peers have looked late, with what they make up for."""
    most_made_up = 2 * peers.ANSWER_SECONDS  # of a question, and of a suspension
    took = handled.wait_ended(limit + SLACK + most_made_up) - began
    within(limit + (most_made_up + sum(looked_late) if looked_late else 0.0), took, looked_late)
    eventually(lambda: handled.error is not None, PATIENCE)
    with pytest.raises(natsync.ClientLost):
        handled.sender.send(b"x")


# -- a client that dies ------------------------------------------------------------------------------------------------


@bounded(60, 120)
@pytest.mark.parametrize("times", TIMES, ids=["short", "default"][: len(TIMES)])
@pytest.mark.parametrize("doing", DOING)
@in_time
def test_a_handler_is_told_in_time_that_its_client_was_killed_while_it_is(
    server: NatsServer, recording: Recording, doing: str, times: dict[str, Any]
) -> None:
    ask, mode = DOING[doing]
    with responder(server.url, recording, **times), program(CLIENT, server.url, times, mode, ask) as process:
        handled = under_way(process, recording, doing)
        process.send(signal.SIGKILL)
        gone(handled, time.monotonic(), allowed(doing, times))


@pytest.mark.parametrize("side", ["client", "responder"])
@pytest.mark.parametrize("doing", ["sending", "blocked"])
@in_time
def test_a_handler_is_told_within_a_second_if_either_side_gives_no_grace(
    server: NatsServer, recording: Recording, doing: str, side: str
) -> None:
    ask, mode = DOING[doing]
    none = {"resume_grace": 0.0, "heartbeat": 0.5}
    long = {"resume_grace": 10.0, "heartbeat": 0.5}
    here, there = (none, long) if side == "responder" else (long, none)
    with responder(server.url, recording, **here), program(CLIENT, server.url, there, mode, ask) as process:
        handled = under_way(process, recording, doing)
        process.send(signal.SIGKILL)
        limit = 1.0 if doing == "sending" else allowed(doing, none)
        gone(handled, time.monotonic(), limit)


@bounded(60, 120)
@pytest.mark.parametrize("times", TIMES, ids=["short", "default"][: len(TIMES)])
@pytest.mark.parametrize("doing", DOING)
@in_time
def test_a_frozen_client_is_given_up_as_a_dead_one_is_while_the_handler_is(
    server: NatsServer, recording: Recording, doing: str, times: dict[str, Any]
) -> None:
    ask, mode = DOING[doing]
    with responder(server.url, recording, **times), program(CLIENT, server.url, times, mode, ask) as process:
        handled = under_way(process, recording, doing)
        process.send(signal.SIGSTOP)
        gone(handled, time.monotonic(), allowed(doing, times))


@pytest.mark.parametrize("doing", DOING)
@in_time
def test_probes_find_a_dead_client_although_a_tap_keeps_the_broker_from_telling_while_the_handler_is(
    server: NatsServer, recording: Recording, doing: str
) -> None:
    ask, mode = DOING[doing]
    with RawClient(server.url) as tap:
        tap.subscribe(">")
        with responder(server.url, recording, **SHORT), program(CLIENT, server.url, SHORT, mode, ask) as process:
            handled = under_way(process, recording, doing)
            process.send(signal.SIGKILL)
            gone(handled, time.monotonic(), allowed(doing, SHORT))


def test_a_client_that_is_frozen_for_two_seconds_gets_the_whole_stream(server: NatsServer) -> None:
    """While chunks come; and nobody is given up."""
    count = sized(100_000, 1_000_000)
    times: dict[str, Any] = {"resume_grace": 6.0, "heartbeat": 0.5}
    with natsync.Subscriber(server.url, **times) as subscriber:
        serve(subscriber)
        code = CLIENT.replace("d.send", "n.send")
        with program(code, server.url, times, "count", f"plain {count}") as process:
            process.wait_for_out("first")
            process.send(signal.SIGSTOP)
            time.sleep(2.0)
            process.send(signal.SIGCONT)
            process.wait_for_out(f"complete {count}")
            assert process.wait() == 0
        assert subscriber.stats()["cancelled"] == 0


def test_a_client_that_was_frozen_while_its_responder_was_silent_reads_the_answer_before_it_gives_up(
    server: NatsServer,
) -> None:
    """The answer has come meanwhile, and the grace is over as it wakes."""
    times: dict[str, Any] = {"resume_grace": 2.0, "heartbeat": 30.0}
    table = Table(server.url)
    try:
        with program(SUSPENDED, server.url, times) as process:
            answer = table.answer()
            answer.send("d", 1, b"one")
            process.wait_for_out("first")
            table.raw.unsubscribe(answer.sid)
            answer.send("h", 1)  # which it answers, and hears that nobody listens
            process.wait_for_out("suspended")
            process.send(signal.SIGSTOP)
            time.sleep(times["resume_grace"] + 1.0)
            table.raw.subscribe(answer.peer + b".>")
            answer.send_all(("d", 2, b"two"), ("e", 3, END))
            table.raw.received()  # the server has it
            process.send(signal.SIGCONT)
            process.wait_for_out("complete 1")
            assert process.wait() == 0
    finally:
        table.close()


# -- a responder that dies ---------------------------------------------------------------------------------------------


def lost(taking: Taking, began: float, limit: float, recording_reached: int) -> None:
    """The consumer is told, in time, with the number of the last chunk."""
    error = taking.within(limit + SLACK)
    took = time.monotonic() - began
    assert isinstance(error, natsync.ServerLost)
    assert error.last_seq == taking.number >= recording_reached
    within(limit, took)


@bounded(60, 120)
@pytest.mark.parametrize("times", TIMES, ids=["short", "default"][: len(TIMES)])
@pytest.mark.parametrize("ask", ["fast", "steady", "idle", "silent"])
@in_time
def test_a_client_is_told_in_time_that_its_responder_was_killed_while_it_is(
    server: NatsServer, ask: str, times: dict[str, Any]
) -> None:
    with program(SERVER, server.url, times) as process, natsync.connect(server.url, **times, **QUICK) as client:
        process.wait_for_out("serving")
        taking = Taking(client.stream("d.send", ask))
        reached = {"fast": 20_000, "steady": 5, "idle": 1, "silent": 0}[ask]
        taking.reach(reached)
        if ask == "silent":
            eventually(lambda: taking._stream.mode == "framed", PATIENCE)  # type: ignore[attr-defined]
        process.send(signal.SIGKILL)
        lost(taking, time.monotonic(), times["heartbeat"] + times["resume_grace"] + NOTICE, reached)


@in_time
def test_what_came_from_a_responder_that_was_killed_is_consumed_before_the_error(server: NatsServer) -> None:
    with program(SERVER, server.url, SHORT) as process, natsync.connect(server.url, **SHORT, **QUICK) as client:
        process.wait_for_out("serving")
        stream = client.stream("d.send", "fast", window=1000)
        eventually(lambda: stream._call._waiting_chunks == 1000, PATIENCE)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        taking = Taking(stream)
        lost(taking, time.monotonic(), SHORT["heartbeat"] + SHORT["resume_grace"] + NOTICE, 1000)
        assert taking.number == 1000


# -- a client that leaves ----------------------------------------------------------------------------------------------


def by_break(stream: natsync.Stream) -> None:
    with stream:
        for _ in stream:
            break


def by_close(stream: natsync.Stream) -> None:
    next(stream)
    stream.close()


def by_exception(stream: natsync.Stream) -> None:
    with pytest.raises(ZeroDivisionError), stream:
        for _ in stream:
            1 / 0


def by_garbage(stream: natsync.Stream) -> None:
    next(stream)


LEAVING = [by_break, by_close, by_exception, by_garbage]
#: Seconds after which a handler knows that its client has left.
TOLD = 1.0


@pytest.mark.parametrize("ask", ["steady", "fast", "idle"])
@pytest.mark.parametrize("leave", LEAVING, ids=lambda leave: leave.__name__)
@in_time
def test_a_handler_is_cancelled_at_once_when_its_client_leaves(
    server: NatsServer, recording: Recording, leave: Callable[[natsync.Stream], None], ask: str
) -> None:
    with responder(server.url, recording), natsync.connect(server.url) as client:
        leave(client.stream("d.send", ask))
        began = time.monotonic()
        handled = recording.wait()
        within(TOLD, handled.wait_ended(TOLD + SLACK) - began)
        eventually(lambda: handled.error is not None, PATIENCE)
        with pytest.raises(natsync.StreamCancelled):
            handled.sender.send(b"x")


@pytest.mark.parametrize("ask", ["steady", "fast", "idle", "silent"])
@in_time
def test_a_handler_is_cancelled_at_once_when_a_script_gets_ctrl_c_while_it_reads(
    server: NatsServer, recording: Recording, ask: str
) -> None:
    with responder(server.url, recording), program(CLIENT, server.url, {}, "interrupted", ask) as process:
        process.wait_for_out("asked" if ask == "silent" else "first")
        handled = recording.wait()
        process.send(signal.SIGINT)
        process.wait()
        began = time.monotonic()
        within(TOLD, handled.wait_ended(TOLD + SLACK) - began)
        assert any("KeyboardInterrupt" in line for line in process.err)


@pytest.mark.parametrize("ask", ["steady", "fast", "idle"])
@in_time
def test_a_handler_is_cancelled_at_once_when_a_script_exits_in_mid_stream(
    server: NatsServer, recording: Recording, ask: str
) -> None:
    with responder(server.url, recording), program(CLIENT, server.url, {}, "exit", ask) as process:
        process.wait_for_out("left")
        assert process.wait() == 3
        began = time.monotonic()
        within(TOLD, recording.wait().wait_ended(TOLD + SLACK) - began)


@pytest.mark.parametrize("ask", ["steady", "silent"])
@in_time
def test_a_handler_is_cancelled_at_once_when_its_client_leaves_before_the_first_frame(
    server: NatsServer, recording: Recording, ask: str
) -> None:
    with responder(server.url, recording), natsync.connect(server.url) as client:
        for number in range(1, 21):
            stream = client.stream("d.send", ask)
            client.flush()  # or the request would be withdrawn
            stream.close()
            began = time.monotonic()
            handled = recording.wait(number)
            within(TOLD, handled.wait_ended(TOLD + SLACK) - began)


@pytest.mark.parametrize("mode", ["early", "end"])
@in_time
def test_a_handler_is_cancelled_at_once_when_a_script_ends_before_the_first_frame(
    server: NatsServer, recording: Recording, mode: str
) -> None:
    with responder(server.url, recording), program(CLIENT, server.url, {}, mode, "silent") as process:
        assert process.wait() == 0
        began = time.monotonic()
        within(TOLD, recording.wait().wait_ended(TOLD + SLACK) - began)


@in_time
def test_closing_the_client_cancels_every_handler_at_once(server: NatsServer, recording: Recording) -> None:
    with responder(server.url, recording):
        client = natsync.connect(server.url)
        streams = [client.stream("d.send", ask) for ask in ("steady", "fast", "idle", "silent") * 5]
        handled = [recording.wait(number + 1) for number in range(20)]
        client.close()
        began = time.monotonic()
        for one in handled:
            within(TOLD, one.wait_ended(TOLD + SLACK) - began)
        del streams
