"""Framed mode at the responder: how a stream begins and ends, against a requester that speaks the protocol by hand.

Requesters that confirm late or never, cancel, fall silent, leave and come back; offers; deadlines; shutting down.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

import natsync
from broker import QUICK, SLACK, Outcome
from framed import Asker, Bench, Held, bench_on, is_gone, offer, sent
from natsync.streaming import peers
from natsync.testing import FaultProxy, NatsServer, eventually
from rawclient import END, ERROR, PATIENCE, RawMessage

Make = Callable[..., NatsServer]

#: Seconds within which the timers that are measured go off, on a busy machine.
EARLY, LATE = 0.9, 3.0


@pytest.fixture
def bench(nats_server: NatsServer) -> Iterator[Bench]:
    with bench_on(nats_server.url) as bench:
        yield bench


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that is not answered counts as a sign of death after 0.3 s already."""
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 0.3)


# -- the end of it ---------------------------------------------------------------------------------------------------


def test_an_end_that_is_not_confirmed_is_asked_about_until_it_is(bench: Bench) -> None:
    asker, sender = sent(bench, 1)
    sender.end()
    assert asker.next().key == (b"e", 2)
    assert asker.probe().key == (b"h", 2)
    asker.say(b"+2 10 65536")
    assert is_gone(asker)


def test_what_is_asked_right_behind_the_last_confirmation_is_answered_as_if_the_stream_had_never_been(
    bench: Bench,
) -> None:
    asker, sender = sent(bench, 1)
    sender.end()
    assert asker.next().key == (b"e", 2)
    asker.say_all(b"+2 10 65536", b"?")
    assert asker.next().key == (b"x", 0)


def test_end_does_not_wait(bench: Bench) -> None:
    _, sender = sent(bench, 1)
    begin = time.monotonic()
    assert sender.end()
    assert time.monotonic() - begin < 5


def test_end_with_wait_is_false_while_the_requester_has_not_confirmed_the_end(bench: Bench) -> None:
    asker, sender = sent(bench, 1)
    asker.say(b"+1 9 65536")
    assert sender.end(wait=0.2) is False


def test_end_with_wait_is_true_once_the_requester_has_confirmed_everything(bench: Bench) -> None:
    asker, sender = sent(bench, 1)
    ending = Outcome(lambda: sender.end(wait=PATIENCE))
    assert asker.next().key == (b"e", 2)
    assert ending.running
    asker.say(b"+2 10 65536")
    assert ending.within(PATIENCE) is None
    assert ending.value is True


def test_end_with_wait_is_false_if_the_requester_cancels_instead(bench: Bench) -> None:
    asker, sender = sent(bench, 1)
    ending = Outcome(lambda: sender.end(wait=PATIENCE))
    assert asker.next().key == (b"e", 2)
    asker.say(b"x 1 enough")
    assert ending.within(SLACK) is None
    assert ending.value is False


def test_an_error_end_is_asked_about_until_it_is_confirmed(bench: Bench) -> None:
    asker, sender = sent(bench, 1)
    sender.send_error("boom")
    error = asker.next()
    assert asker.probe().key == (b"h", 2)
    asker.say(b"!1 9 65536")
    assert asker.next() == error
    asker.say(b"+2 10 65536")
    assert is_gone(asker)


def test_a_refusal_is_repeated_until_it_is_confirmed(bench: Bench) -> None:
    held = bench.hold(max_streams=1)
    bench.open(held=held)
    asker = bench.ask(held)
    first = asker.frame()
    assert [asker.frame(), asker.frame()] == [first, first]
    asker.say(b"+0 0 0")
    eventually(lambda: is_gone(asker))  # another repetition may have been on its way


# -- cancelling ------------------------------------------------------------------------------------------------------


def test_a_cancel_is_answered_by_an_error_frame(bench: Bench) -> None:
    asker, _ = sent(bench, 1)
    asker.say(b"x 1 enough")
    answer = asker.next()
    assert answer.op == b"x"
    assert answer.headers["Natsync-Status"] == "1 CANCELLED"


def test_a_cancel_ends_the_handlers_context_and_wakes_its_send(bench: Bench) -> None:
    held = bench.hold()
    asker, sender = bench.open(offer(w=1), held=held)
    sender.send(b"one")
    waiting = Outcome(lambda: sender.send(b"two"))
    asker.next()
    asker.say(b"x 1 enough of it")
    error = waiting.within(SLACK)
    assert isinstance(error, natsync.StreamCancelled)
    assert "enough of it" in str(error)
    assert sender.closed.wait(SLACK)
    eventually(lambda: held.ctx.cancelled)


def test_a_cancel_that_is_repeated_is_answered_as_of_an_unknown_stream(bench: Bench) -> None:
    asker, _ = sent(bench, 1)
    asker.say(b"x 1 enough")
    asker.next()
    asker.say(b"x 1 enough")
    answer = asker.next()
    assert (answer.key, answer.headers["Natsync-Reason"]) == ((b"x", 0), "lost")


def unknown(bench: Bench) -> Asker:
    """One whose stream is over and forgotten at the responder."""
    asker, _ = bench.open()
    asker.say(b"x 1 enough")
    assert asker.next().op == b"x"
    return asker


@pytest.mark.parametrize("payload", [b"x 1 enough", b"?", b"!3 4 5"])
def test_whoever_speaks_of_an_unknown_stream_is_told(bench: Bench, payload: bytes) -> None:
    asker = unknown(bench)
    asker.say(payload)
    answer = asker.next()
    assert answer.key == (b"x", 0)
    assert answer.payload.startswith(ERROR)
    assert answer.headers["Natsync-Status"] == "14 UNAVAILABLE"


def test_a_confirmation_of_an_unknown_stream_is_not_answered(bench: Bench) -> None:
    asker = unknown(bench)
    asker.say(b"+1 2 3")
    asker.say(b"x 1 the one that is answered")
    assert asker.next().key == (b"x", 0)
    asker.say(b"x 1 and that it is the next")
    assert asker.next().key == (b"x", 0)
    assert asker.desk.all(lambda message: True) == []


def test_a_stream_number_that_never_was_is_unknown(bench: Bench) -> None:
    asker, _ = bench.open()
    stream = (asker.control or b"").rsplit(b".", 3)[0]
    known, asker.control = asker.control, stream + b".999999.d.1"
    asker.say(b"?")
    assert asker.next().reply == stream + b".999999.x.0"
    asker.control = known


def test_a_cancel_reaches_a_stream_that_lingers(bench: Bench) -> None:
    asker, sender = sent(bench, 1)
    sender.end()
    asker.next()
    asker.say(b"x 1 enough")
    assert asker.next().op == b"x"
    assert is_gone(asker)


# -- requesters that are gone ----------------------------------------------------------------------------------------


def test_without_grace_a_requester_that_nobody_listens_for_is_lost_at_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 60.0)  # no silence is what tells
    held = bench.hold()
    asker, sender = bench.open(offer(g=0), held=held)
    asker.leave()
    with contextlib.suppress(natsync.ClientLost):  # an ACCEPT that came late may have found it out
        sender.send(b"one")
    assert sender.closed.wait(SLACK)
    with pytest.raises(natsync.ClientLost):
        sender.send(b"two")
    eventually(lambda: held.ctx.cancelled)


def test_a_sender_that_waits_for_credit_is_woken_when_its_requester_is_lost(bench: Bench) -> None:
    asker, sender = bench.open(offer(g=0, w=1))
    asker.leave()
    errors = [Outcome(lambda: [sender.send(b"x") for _ in range(3)]).within(SLACK)]
    assert isinstance(errors[0], natsync.ClientLost)


def test_the_grace_of_the_responder_counts_if_it_is_the_smaller(bench: Bench) -> None:
    asker, sender = bench.open(offer(g=60_000), resume_grace=0.3)
    begin = time.monotonic()
    asker.leave()
    sender.send(b"one")
    assert sender.closed.wait(SLACK)
    assert time.monotonic() - begin >= 0.3 * EARLY


def test_a_requester_that_is_heard_again_within_the_grace_gets_everything(bench: Bench) -> None:
    asker, sender = suspended(bench)
    sender.send(b"c3")
    asker.say(b"!1 9 65536")
    assert [(frame.key, frame.payload) for frame in asker.frames(2)] == [((b"d", 2), b"c2"), ((b"d", 3), b"c3")]
    assert not sender.is_closed()


def received(held: Held) -> int:
    """Messages that the subscriber's connection has had from the server."""
    count: int = held.subscriber.stats()["connection"]["in_messages"]
    return count


def suspended(bench: Bench, grace: int = 5000) -> tuple[Asker, natsync.ResponseSender]:
    """A stream with c1 confirmed whose requester could not be reached by c2 and now listens again, in silence."""
    held = bench.hold()
    asker, sender = bench.open(offer(g=grace), held=held)
    sender.send(b"c1")
    asker.next()
    asker.say(b"+1 9 65536")
    asker.ping()
    asker.leave()
    asker.desk.all(lambda message: message.subject == asker.inbox)
    before = received(held)
    sender.send(b"c2")
    eventually(lambda: received(held) > before)  # the 503
    asker.return_()
    assert asker.probe().key == (b"h", 2)
    return asker, sender


def test_a_requester_that_is_not_heard_from_is_sent_nothing_but_questions(bench: Bench) -> None:
    asker, sender = suspended(bench)
    sender.send(b"c3")
    assert [asker.frame().key for _ in range(2)] == [(b"h", 2), (b"h", 2)]
    asker.say(b"!1 9 65536")
    assert [frame.payload for frame in asker.frames(2)] == [b"c2", b"c3"]


def test_nothing_is_sent_again_until_the_requester_has_said_what_it_has(bench: Bench) -> None:
    asker, sender = suspended(bench)
    sender.send(b"c3")
    asker.say(b"?")  # heard, but what has it?
    assert asker.probe().key == (b"h", 2)
    asker.say(b"+2 10 65536")
    assert asker.next().key == (b"d", 3)


def test_a_requester_that_never_comes_back_is_lost_after_the_grace(bench: Bench) -> None:
    asker, sender = bench.open(offer(g=300))
    begin = time.monotonic()
    asker.leave()
    sender.send(b"c1")
    assert sender.closed.wait(SLACK)
    assert time.monotonic() - begin >= 0.3 * EARLY
    with pytest.raises(natsync.ClientLost):
        sender.send(b"c2")


def test_a_requester_that_does_not_answer_is_lost_within_the_grace_and_three_seconds(bench: Bench) -> None:
    begin = time.monotonic()
    _, sender = bench.open(offer(g=200))
    sender.send(b"c1")
    assert sender.closed.wait(PATIENCE)
    assert 2.0 <= time.monotonic() - begin < 0.2 + 3 + SLACK
    with pytest.raises(natsync.ClientLost):
        sender.send(b"c2")


@pytest.mark.usefixtures("impatient")
def test_an_idle_requester_that_does_not_answer_is_lost(bench: Bench) -> None:
    begin = time.monotonic()
    asker, sender = bench.open(offer(g=200, hb=200))
    asker.say(b"+0 8 65536")
    assert asker.probe().key == (b"h", 0)
    assert time.monotonic() - begin >= 0.2 * EARLY - 0.05
    assert sender.closed.wait(SLACK)
    with pytest.raises(natsync.ClientLost):
        sender.send(b"c1")


@pytest.mark.usefixtures("impatient")
def test_an_idle_requester_that_answers_is_kept(bench: Bench) -> None:
    asker, sender = bench.open(offer(hb=200))
    asker.say(b"+0 8 65536")
    for _ in range(5):
        assert asker.probe().key == (b"h", 0)
        asker.say(b"+0 8 65536")
    sender.send(b"c1")
    assert asker.next().key == (b"d", 1)


def test_a_slow_reader_that_answers_is_not_taken_for_dead(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 1.5)
    asker, sender = bench.open(offer(g=0, hb=200, w=1))
    sender.send(b"one")
    asker.next()
    asker.say(b"+1 1 65536")  # it has it, and takes no more for now
    waiting = Outcome(lambda: sender.send(b"two"))
    for _ in range(12):  # which takes longer than that
        assert asker.probe().key == (b"h", 1)
        asker.say(b"+1 1 65536")
    assert waiting.running
    asker.say(b"+1 2 65536")
    assert waiting.within(PATIENCE) is None


def test_one_probe_serves_all_idle_streams_of_a_requester(bench: Bench) -> None:
    held = bench.hold()
    bench.raw.subscribe(b"_INBOX.many.*")
    streams = [bench.open(offer(hb=200), held=held, inbox=b"_INBOX.many.%d" % n)[0] for n in range(50)]
    for stream in streams:
        stream.say(b"+0 8 65536")
    by_inbox = {stream.inbox: stream for stream in streams}
    streams[-1].ping()  # all were heard
    begin = time.monotonic()
    bench.desk.all(lambda message: True)  # what ACCEPTs that were confirmed late have asked
    bench.raw.flush()
    asked: list[RawMessage] = []
    while len(asked) < 6:
        asked.append(bench.desk.pick(lambda message: message.subject in by_inbox))
        by_inbox[asked[-1].subject].say(b"+0 8 65536")
    assert time.monotonic() - begin >= 4 * 0.2 * EARLY
    assert len({message.subject for message in asked}) > 1  # they take turns


def test_requesters_on_two_connections_are_asked_each(bench: Bench) -> None:
    held = bench.hold()
    askers = [bench.open(offer(hb=200), held=held)[0] for _ in range(2)]
    for asker in askers:
        asker.say(b"+0 8 65536")
    for asker in askers:
        assert asker.probe().key == (b"h", 0)


@pytest.mark.parametrize("heartbeat", [0, 1])
def test_a_requester_cannot_have_itself_asked_all_the_time(bench: Bench, heartbeat: int) -> None:
    asker, _ = bench.open(offer(hb=heartbeat))
    count, until = 0, time.monotonic() + 0.5
    while (left := until - time.monotonic()) > 0:
        asker.say(b"+0 8 65536")
        try:
            asker.frame(left)
            count += 1
        except TimeoutError:
            break
    assert count <= 10  # the least heartbeat that the library takes from its own user is 0.1 s


def test_a_stream_outlasts_the_loss_of_the_responders_own_link(
    bench: Bench, make_fault_proxy: Callable[..., FaultProxy]
) -> None:
    proxy = make_fault_proxy()
    held = bench.hold(url=proxy.url, **QUICK)
    asker, sender = bench.open(held=held)
    sender.send(b"c1")
    sender.send(b"c2")
    asker.frames(2)
    proxy.reset()
    sender.send(b"c3")
    eventually(lambda: held.subscriber.stats()["connection"]["reconnects"] == 1)
    asker.desk.all(lambda message: message.subject == asker.inbox)  # what came over the lost link
    while asker.frame().op != b"h":
        pass
    asker.say(b"!1 9 65536")
    payloads: list[bytes] = []
    while payloads[-2:] != [b"c2", b"c3"]:
        payloads.append(asker.next().payload)
    sender.end()
    while asker.next().key != (b"e", 4):
        pass


# -- opening ---------------------------------------------------------------------------------------------------------


def test_a_request_that_comes_twice_is_answered_once(bench: Bench) -> None:
    held = bench.hold()
    asker, sender = bench.open(held=held)
    asker.ask()
    eventually(lambda: held.handle.stats["received"] == 2)
    sender.send(b"one")
    assert asker.next().key == (b"d", 1)
    assert len(held.arrived) == 1


def test_a_request_that_comes_twice_is_answered_again_once_the_first_stream_is_over(bench: Bench) -> None:
    held = bench.hold()
    asker, _ = bench.open(held=held)
    asker.say(b"x 1 enough")
    asker.next()
    asker.ask()
    assert asker.next().key == (b"a", 0)
    eventually(lambda: len(held.arrived) == 2)


@pytest.mark.parametrize(
    "text",
    [
        "2;w=8;b=65536;g=10000;hb=5000;cap=b",
        "0",
        "",
        "one;w=8",
        "1;w=0;b=65536",
        "1;w=-1;b=65536",
        "1;w=x;b=65536",
        "1;w=;b=65536",
        "1;w=9999999999999999999;b=65536",
        "1;w=8;b=0",
        "1;w=8;b=100",
        "1;w=8;g=1.5",
        "1;w=8;hb=soon",
        "1;w=\u0663",
    ],
)
def test_an_offer_that_makes_no_sense_or_is_of_another_version_is_answered_in_plain_mode(
    bench: Bench, text: str
) -> None:
    held = bench.hold()
    asker = bench.ask(held, text)
    held.sender.send(b"one")
    held.sender.end()
    first, last = asker.message(), asker.message()
    assert (first.payload, last.payload) == (b"one", END)
    assert b".nsy1." not in (first.reply or b"")


@pytest.mark.parametrize("text", ["1", "1;", "1;;;", "1;w=8;future=x", " 1 ; w = 8 ", "1;cap=zb"])
def test_an_offer_may_leave_out_what_has_a_default_and_say_what_is_not_known_yet(bench: Bench, text: str) -> None:
    assert bench.ask(bench.hold(), text).next().key == (b"a", 0)


def test_a_request_without_an_offer_is_answered_in_plain_mode(bench: Bench) -> None:
    held = bench.hold()
    asker = bench.ask(held, None)
    held.sender.send(b"one")
    assert b".nsy1." not in (asker.message().reply or b"")
    held.sender.end()


def test_a_responder_that_speaks_plain_with_everybody_does_so(bench: Bench) -> None:
    held = bench.hold(framed=False)
    asker = bench.ask(held)
    held.sender.send(b"one")
    assert b".nsy1." not in (asker.message().reply or b"")
    held.sender.end()


def test_the_handler_sees_attempt_cursor_and_the_users_headers_and_none_of_the_protocols(bench: Bench) -> None:
    held = bench.hold()
    asker = bench.ask(held, Natsync_Attempt="2", Natsync_Resume="17", X_Own="yes", Nats_Msg_Id="7")
    asker.next()
    ctx = held.ctx
    assert (ctx.attempt, ctx.resume_cursor, dict(ctx.metadata)) == (2, 17, {"X-Own": "yes"})


def test_a_deadline_that_passes_ends_the_stream_with_code_4(bench: Bench) -> None:
    held = bench.hold()
    asker = bench.ask(held, Natsync_Timeout="3000")
    assert asker.next().key == (b"a", 0)
    asker.say(b"+0 8 65536")  # whoever says nothing is told nothing
    error = asker.next()
    assert error.key == (b"x", 1)
    assert error.headers["Natsync-Status"] == "4 DEADLINE_EXCEEDED"
    assert error.headers["Natsync-Reason"] == "deadline"
    with pytest.raises(natsync.DeadlineExceeded):
        held.sender.send(b"late")


# -- shutting down ---------------------------------------------------------------------------------------------------


def test_what_is_not_done_by_the_drain_deadline_ends_with_code_14_and_the_cursor(bench: Bench) -> None:
    held = bench.hold()
    asker, sender = bench.open(held=held)
    for _ in range(3):
        sender.send(b"x")
    asker.frames(3)
    asker.say(b"+3 11 65536")
    draining = Outcome(lambda: held.subscriber.drain(0.3))
    eventually(lambda: held.ctx.draining)
    error = asker.next()
    asker.say(b"+4 12 65536")
    assert error.key == (b"x", 4)
    assert error.headers["Natsync-Status"] == "14 UNAVAILABLE"
    assert error.headers["Natsync-Reason"] == "lost"
    assert error.headers["Natsync-Resume"] == "3"
    assert isinstance(draining.within(PATIENCE), natsync.DrainTimeout)


def test_closing_waits_until_the_requester_has_the_end(bench: Bench) -> None:
    held = bench.hold()
    asker, sender = bench.open(held=held)
    sender.send(b"one")
    sender.end()
    asker.frames(2)
    closing = Outcome(lambda: held.subscriber.close(PATIENCE))
    assert asker.probe().key == (b"h", 2)
    asker.say(b"!0 8 65536")
    assert asker.keys(2) == [(b"d", 1), (b"e", 2)]
    assert closing.running
    asker.say(b"+2 10 65536")
    assert closing.within(PATIENCE) is None
