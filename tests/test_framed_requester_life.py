"""Framed mode at the requester: how a stream ends, against a responder that speaks the protocol by hand.

Errors, cancels, timeouts, responders that fall silent or are gone, new links, forks.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import natsync
from broker import SLACK, Outcome
from framed import SUBJECT, Answer, Table, account, block, chunks, failure, failure_of, take
from natsync.streaming import peers
from natsync.streaming.calls import Calls
from natsync.testing import NatsServer, eventually
from rawclient import END, ERROR, PATIENCE
from support import run_python

#: The credit in bytes that the first stream of a connection asks for, and what it gives once it is answered.
FIRST_BYTES, BYTES = 4 << 20, 4 << 20
#: Seconds within which the timers that are measured go off, on a busy machine.
EARLY, LATE = 0.9, 3.0


@pytest.fixture
def table(nats_server: NatsServer) -> Iterator[Table]:
    table = Table(nats_server.url)
    yield table
    table.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that is not answered counts as a sign of death after 0.3 s already."""
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 0.3)


# -- errors ----------------------------------------------------------------------------------------------------------


def test_an_error_end_has_code_text_and_details(table: Table) -> None:
    stream, answer = table.open()
    answer.send("d", 1, b"c1")
    head = block(Natsync_Status="8 RESOURCE_EXHAUSTED", Natsync_Details='{"a": 1}')
    answer.send("x", 2, ERROR + b"boom", head)
    error = failure(stream)
    assert isinstance(error, natsync.HandlerError)
    assert (error.message, error.code, error.details, error.last_seq) == ("boom", 8, {"a": 1}, 1)


@pytest.mark.parametrize(
    "head",
    [None, block(), block(Natsync_Status="nonsense", Natsync_Details="{"), block(Natsync_Status="-1", A="1")],
)
def test_an_error_end_with_no_or_odd_headers_is_an_error_all_the_same(table: Table, head: bytes | None) -> None:
    stream, answer = table.open()
    answer.send("x", 1, ERROR + b"boom", head)
    error = failure(stream)
    assert (type(error), error.message) == (natsync.HandlerError, "boom")


def test_a_responder_that_does_not_know_the_stream_any_more_is_lost(table: Table) -> None:
    stream, answer = table.open()
    answer.send("d", 1, b"c1")
    answer.send("x", 0, ERROR + b"unknown", block(Natsync_Status="14 UNAVAILABLE", Natsync_Reason="lost"))
    error = failure(stream)
    assert isinstance(error, natsync.ServerLost)
    assert error.last_seq == 1


def test_a_stream_that_is_not_known_there_is_lost_even_if_no_header_says_so(table: Table) -> None:
    stream, answer = table.open()
    answer.send("x", 0, ERROR + b"unknown")
    assert isinstance(failure(stream), natsync.ServerLost)


def test_trailers_and_the_first_chunks_headers_are_to_be_had(table: Table) -> None:
    stream, answer = table.open()
    answer.send("d", 1, b"c1", block(X_Model="m"))
    answer.send("e", 2, END, block(X_Count="1"))
    assert list(stream) == [b"c1"]
    assert (dict(stream.headers), dict(stream.trailers)) == ({"X-Model": "m"}, {"X-Count": "1"})


# -- leaving ---------------------------------------------------------------------------------------------------------


def test_a_cancel_says_code_1_and_why(table: Table) -> None:
    stream, answer = table.open()
    stream.cancel("enough of it")
    assert answer.until(b"x ") == b"x 1 enough of it"


def test_a_stream_that_is_collected_cancels(table: Table) -> None:
    answer = table.open()[1]
    gc.collect()
    assert answer.until(b"x ").startswith(b"x 1 ")


def test_a_stream_whose_block_is_left_cancels(table: Table) -> None:
    stream, answer = table.open()
    with stream:
        answer.send("d", 1, b"c1")
        stream.next(PATIENCE)
    assert answer.until(b"x ").startswith(b"x 1 ")


def test_a_cancel_before_the_first_frame_reaches_the_responder_as_soon_as_it_says_where(table: Table) -> None:
    stream = table.client().stream(SUBJECT)
    answer = table.answer()
    stream.cancel("never mind")
    answer.send("a", 0)
    assert answer.control() == b"x 1 never mind"


def test_a_cancel_is_repeated_until_it_is_answered(table: Table) -> None:
    stream, answer = table.open()
    begin = time.monotonic()
    stream.cancel("enough")
    times = []
    for _ in range(3):
        assert answer.until(b"x ") == b"x 1 enough"
        times.append(time.monotonic() - begin)  # it may be read late, but never too early
    assert times[1] >= 0.25 * EARLY - 0.05
    assert times[2] >= 0.75 * EARLY - 0.05


def test_a_cancel_is_not_repeated_once_it_is_answered(table: Table) -> None:
    stream, answer = table.open()
    stream.cancel("enough")
    answer.until(b"x ")
    answer.send("x", 0, ERROR + b"cancelled", block(Natsync_Status="1 CANCELLED"))
    answer.send("h", 0)  # of a stream that is forgotten
    assert answer.until(b"x 410 ")
    answer.controls()
    with pytest.raises(TimeoutError):
        answer.control(timeout=0.6)


def test_a_cancel_is_answered_by_the_error_end_that_was_on_its_way(table: Table) -> None:
    stream, answer = table.open()
    stream.cancel("enough")
    answer.until(b"x ")
    answer.send("x", 5, ERROR + b"boom")
    answer.send("h", 5)
    assert answer.until(b"x 410 ")  # the end was read
    answer.controls()
    with pytest.raises(TimeoutError):
        answer.control(timeout=0.6)


def test_a_cancel_of_a_responder_that_is_gone_ends(table: Table) -> None:
    client = table.client()
    stream, answer = table.open(client)
    answer.leave()
    stream.cancel("enough")
    eventually(lambda: not client._core.mux.waiters, SLACK)


def test_chunks_for_a_stream_that_was_cancelled_are_dropped_and_not_confirmed(table: Table) -> None:
    stream, answer = table.open()
    stream.cancel("enough")
    answer.send_all(*chunks(1, 3), ("e", 4, END))
    answer.until(b"x ")
    with pytest.raises(natsync.StreamCancelled):
        stream.next(PATIENCE)
    assert not [said for said in answer.controls() if said.startswith((b"+1", b"+2", b"+3", b"+4"))]


def test_closing_the_client_tells_the_responders_of_its_streams(table: Table) -> None:
    client = table.client()
    stream, answer = table.open(client)
    client.close()
    assert answer.until(b"x ")
    assert isinstance(failure_of(stream), natsync.ConnectionClosed)


def test_closing_the_client_behind_a_cancel_still_tells_the_responder(table: Table) -> None:
    client = table.client()
    stream, answer = table.open(client)
    stream.cancel("enough")
    client.close()
    assert answer.until(b"x ") == b"x 1 enough"


def test_closing_the_client_behind_stream_tells_a_responder_that_answers_at_once(table: Table) -> None:
    client = table.client()
    stream = client.stream(SUBJECT)
    answer = table.answer()
    closing = Outcome(client.close)
    answer.send("a", 0)
    assert answer.until(b"x ")
    assert closing.within(SLACK) is None
    assert isinstance(failure_of(stream), natsync.ConnectionClosed)


def test_a_stream_left_while_the_client_closes_keeps_no_timer(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    client = table.client(resume_grace=30)
    stream = client.stream(SUBJECT)
    table.request()
    part = Calls.part

    def closed_first(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(Calls, "part", part)  # closing says farewell, too
        client.close()
        part(*args, **kwargs)

    monkeypatch.setattr(Calls, "part", closed_first)
    stream.close()
    eventually(lambda: not any(thread.name == "natsync-timer" for thread in threading.enumerate()), SLACK)


def test_a_stream_left_twice_while_the_client_closes_keeps_no_timer(table: Table) -> None:
    """By the closing first, and then by whoever drops it: the second farewell takes the place of the first."""
    client = table.client(resume_grace=30)
    stream = client.stream(SUBJECT)
    table.request()
    stream._call.connection_closing()
    stream.close()
    client.close()
    eventually(lambda: not any(thread.name == "natsync-timer" for thread in threading.enumerate()), SLACK)


def test_a_deadline_is_told_as_code_4(table: Table) -> None:
    stream, answer = table.open(timeout=3.0)
    assert isinstance(failure(stream), natsync.DeadlineExceeded)
    assert answer.until(b"x ").startswith(b"x 4 ")


def test_the_end_of_the_context_cancels(table: Table) -> None:
    ctx = natsync.Context().with_cancel()
    stream, answer = table.open(ctx=ctx)
    ctx.cancel("the user went away")
    assert answer.until(b"x ") == b"x 1 the user went away"
    assert isinstance(failure(stream), natsync.StreamCancelled)


def test_probes_are_no_chunks_and_do_not_hold_off_the_idle_timeout(table: Table) -> None:
    begin = time.monotonic()
    stream, answer = table.open(idle_timeout=0.4)
    waiting = Outcome(lambda: stream.next(PATIENCE))
    said = b"+"
    while not said.startswith(b"x 4 "):  # "x 410", to a probe that comes when it is over, may overtake it
        assert time.monotonic() - begin < PATIENCE
        answer.send("h", 0)
        said = answer.control()
    assert time.monotonic() - begin >= 0.4 * EARLY - 0.05
    assert isinstance(waiting.within(SLACK), natsync.IdleTimeout)


def test_the_idle_timeout_does_not_run_while_the_consumer_is_busy(table: Table) -> None:
    stream, answer = table.open(idle_timeout=2.5)
    answer.send("d", 1, b"c1")
    stream.next(PATIENCE)
    with pytest.raises(TimeoutError):  # busy for 3 s
        answer.until(b"x ", timeout=3.0)
    answer.send("d", 2, b"c2")
    assert stream.next(PATIENCE) == b"c2"


# -- responders that are gone ----------------------------------------------------------------------------------------


def test_a_responder_that_nobody_listens_for_is_lost_after_the_grace(table: Table) -> None:
    stream, answer = table.open(table.client(resume_grace=0.3))
    answer.send("d", 1, b"c1")
    assert stream.next(PATIENCE) == b"c1"
    assert answer.until(b"+1 ")
    begin = time.monotonic()
    answer.leave()
    answer.send("d", 2, b"c2")  # what confirms it comes back
    error = failure(stream)
    assert isinstance(error, natsync.ServerLost)
    assert error.last_seq == 2
    assert 0.3 * EARLY <= time.monotonic() - begin < SLACK


def test_without_grace_a_responder_that_nobody_listens_for_is_lost_at_once(table: Table) -> None:
    stream, answer = table.open(table.client(resume_grace=0))
    answer.leave()
    answer.send("h", 0)
    assert isinstance(failure(stream), natsync.ServerLost)


def test_a_responder_that_is_heard_again_within_the_grace_goes_on(table: Table) -> None:
    client = table.client()
    stream, answer = table.open(client)
    answer.send("d", 1, b"c1")
    assert answer.until(b"+1 ")
    answer.leave()
    before = client.stats()["in_messages"]
    answer.send("h", 1)
    eventually(lambda: client.stats()["in_messages"] >= before + 2)  # the probe, and the 503 to its answer
    table.raw.subscribe(answer.peer + b".>")
    assert answer.control() == b"?"
    answer.send("h", 2)
    assert answer.until(b"!").startswith(b"!1 ")
    answer.send_all(("d", 2, b"c2"), ("e", 3, END))
    assert list(stream) == [b"c1", b"c2"]


@pytest.mark.usefixtures("impatient")
def test_a_responder_that_says_nothing_is_asked_and_then_lost(table: Table) -> None:
    client = table.client(heartbeat=0.2, resume_grace=1.5)
    begin = time.monotonic()
    stream, answer = table.open(client)
    answer.send("d", 1, b"c1")
    assert answer.until(b"?") == b"?"
    assert time.monotonic() - begin >= 0.2 * EARLY - 0.05
    error = failure(stream)
    assert isinstance(error, natsync.ServerLost)
    assert error.last_seq == 1


def test_a_responder_that_answers_is_kept_however_long_it_has_nothing_to_send(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 1.5)
    stream, answer = table.open(table.client(heartbeat=0.2, resume_grace=0))
    for _ in range(10):  # which takes longer than that
        answer.until(b"?")
        answer.send("h", 0)
    answer.send_all(("d", 1, b"c1"), ("e", 2, END))
    assert list(stream) == [b"c1"]


def test_one_question_serves_all_streams_of_a_responder(table: Table) -> None:
    client = table.client(heartbeat=0.3)
    streams = [client.stream(SUBJECT) for _ in range(20)]
    first = table.answer()
    others = [Answer(table.desk, table.request()) for _ in streams[1:]]
    for number, other in enumerate(others, 2):
        other.peer, other.stream = first.peer, b"%b.%d" % (first.peer, number)
    everybody = {answer.stream: answer for answer in (first, *others)}
    for answer in everybody.values():
        answer.send("a", 0)
    eventually(lambda: all(stream.mode for stream in streams), PATIENCE)
    begin, asked = time.monotonic(), 0
    table.desk.all(lambda message: True)
    while asked < 4:
        message = table.desk.pick(lambda message: message.payload == b"?")
        asked += 1
        everybody[message.subject.rsplit(b".", 2)[0]].send("h", 0)
    assert time.monotonic() - begin >= 3 * 0.3 * EARLY
    for answer in others:
        answer.send("e", 1, END)
    for stream in streams[1:]:
        assert list(stream) == []


def test_a_responder_that_was_given_up_is_told_when_it_is_heard_again(table: Table) -> None:
    stream, answer = table.open(table.client(resume_grace=0))
    answer.leave()
    answer.send("h", 0)
    assert isinstance(failure(stream), natsync.ServerLost)
    table.raw.subscribe(answer.peer + b".>")
    answer.send("d", 1, b"c1")
    assert answer.until(b"x ").startswith((b"x 410 ", b"x 14 "))  # by what it sends, or by what is said again


def test_over_a_new_link_the_client_says_what_it_has(table: Table) -> None:
    client = table.client()
    stream, answer = table.open(client)
    answer.send_all(*chunks(1, 2))
    assert take(stream, 2) == [b"c1", b"c2"]
    answer.until(b"+2 ")
    client.force_reconnect()
    assert account(answer.until(b"!"))[:2] == (b"!", 2)
    answer.send_all(*chunks(2, 3), ("e", 4, END))
    assert list(stream) == [b"c3"]
    assert stream.stats["resumes"] >= 1


def test_nothing_is_lost_or_doubled_over_three_new_links(table: Table) -> None:
    client = table.client()
    stream, answer = table.open(client)
    for number in range(1, 4):
        answer.send("d", number, b"c%d" % number)
        assert stream.next(PATIENCE) == b"c%d" % number
        client.force_reconnect()
        assert answer.until(b"!%d " % number)
        answer.send("d", number, b"c%d" % number)
    answer.send("e", 4, END)
    assert list(stream) == []


# -- forks -----------------------------------------------------------------------------------------------------------

FORKING = f"""
import gc, os, sys
import natsync
client = natsync.connect(sys.argv[1])
stream = client.stream({SUBJECT!r})
assert stream.next(20) == b"c1"
cancelled = client.stream({SUBJECT!r})
client.flush()
cancelled.cancel("not the child")
pid = os.fork()
if not pid:
    for leave in (stream.close, stream.cancel, lambda: client.close(0.5)):
        try:
            leave()
        except natsync.NatsError:
            pass
    del stream, cancelled
    gc.collect()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
print("joined", flush=True)
assert list(stream) == [b"c2"], "the stream did not go on"
client.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
def test_a_child_that_closes_everything_disturbs_none_of_its_parents_streams(table: Table) -> None:
    program = Outcome(lambda: run_python(FORKING, table.url, timeout=20))
    answer = table.answer()
    answer.send("a", 0)
    answer.send("d", 1, b"c1")
    cancelled = table.answer()
    cancelled.send("a", 0)
    assert cancelled.until(b"x ") == b"x 1 not the child"
    cancelled.send("x", 0)
    answer.send("h", 1)
    answer.until(b"+1 ")
    answer.send_all(("d", 2, b"c2"), ("e", 3, END))
    assert answer.until(b"+3 ")
    assert program.within(PATIENCE * 2) is None
    done = program.value
    assert getattr(done, "returncode", None) == 0, getattr(done, "stderr", "")
    assert not [said for said in answer.controls() if said.startswith(b"x")]
