"""Framed mode where the server restricts: between accounts, and for users that may not publish as they like.

There a reply subject does not arrive as it was sent, and each answer needs a permission.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import pytest

import natsync
from broker import SLACK, Outcome
from framed import Bench, bench_on, fill, offer
from natsync.streaming import framed_sender, peers
from natsync.testing import NatsServer
from rawclient import PATIENCE

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


# -- across accounts -------------------------------------------------------------------------------------------------

ACCOUNTS = """
accounts {
  SERVING: {
    users: [{user: serving, password: "S3CRET-1"}]
    exports: [{service: "framed.>", response_type: stream}]
  }
  ASKING: {
    users: [{user: asking, password: "S3CRET-2"}]
    imports: [{service: {account: SERVING, subject: "framed.>"}}]
  }
}
"""


ASKING = {"user": "asking", "pass": "S3CRET-2"}
SERVING = {"user": "serving", "password": "S3CRET-1"}


@pytest.fixture(scope="module")
def accounts() -> Iterator[NatsServer]:
    with NatsServer(config=ACCOUNTS) as server:
        yield server


@pytest.fixture
def across(accounts: NatsServer) -> Iterator[Bench]:
    """The requester is in one account, and subscribers held with SERVING are in another."""
    with bench_on(accounts.url, **ASKING) as bench:
        yield bench


def test_across_accounts_the_number_goes_in_a_header(across: Bench) -> None:
    _, sender = opened = across.open(offer(), **SERVING)
    sender.send(b"one")
    frame = opened[0].next()
    assert re.fullmatch(rb"_INBOX\.[0-9A-Za-z]+\.nsy1\.\d+", frame.stream)
    assert frame.block == b"NATS/1.0\r\nNatsync-Seq: d.1 " + frame.stream + b"\r\n\r\n"
    assert frame.payload == b"one"


def test_across_accounts_every_quarter_of_the_window_has_a_reply_subject(across: Bench) -> None:
    asker, sender = across.open(offer(w=16), **SERVING)
    fill(sender)
    frames = asker.frames(16)
    assert [frame.seq for frame in frames] == list(range(1, 17))
    answered = [frame.seq for frame in frames if frame.reply is not None]
    assert set(answered) >= {4, 8, 12, 16}
    assert len(answered) <= 5


@pytest.mark.parametrize("op", ["h", "e", "x"])
def test_across_accounts_probes_and_ends_have_a_reply_subject(across: Bench, op: str) -> None:
    asker, sender = across.open(offer(), **SERVING)
    fill(sender)
    asker.frames(8)
    if op == "e":
        sender.end()
    elif op == "x":
        sender.send_error("boom")
    else:
        asker.say(b"?")
    frame = asker.probe() if op == "h" else asker.next()  # before an end a probe may be due
    assert (frame.op, frame.reply is not None) == (op.encode(), True)


def test_across_accounts_the_users_headers_and_trailers_go_along(across: Bench) -> None:
    asker, sender = across.open(offer(), **SERVING)
    sender.set_header("A", "1")
    sender.send(b"one")
    sender.end(trailers={"B": "2"})
    first, last = asker.frames(2)
    assert (first.headers["A"], last.headers["B"]) == ("1", "2")


def test_across_accounts_a_frame_is_no_larger_than_max_payload(make_nats_server: Make) -> None:
    with bench_on(make_nats_server(config="max_payload: 4096\n" + ACCOUNTS).url, **ASKING) as bench:
        asker, sender = bench.open(offer(w=100, cap="b"), **SERVING)
        sender.send(b"x" * 4096)
        sender.send_many([b"y" * 500] * 20)
        data = b""
        while len(data) < 4096 + 10_000:
            frame = asker.next()
            assert len(frame.block or b"") + len(frame.payload) <= 4096
            count = int.from_bytes(frame.payload[:4], "big") if frame.op == b"b" else -1
            data += frame.payload[4 * count + 4 :]
        assert data == b"x" * 4096 + b"y" * 10_000


def test_an_account_sent_to_a_frames_reply_subject_arrives_across_accounts(across: Bench) -> None:
    asker, sender = across.open(offer(w=4), **SERVING)
    fill(sender)
    asker.frames(4)
    asker.say(b"!2 6 65536")
    assert asker.keys(2) == [(b"d", 3), (b"d", 4)]
    assert fill(sender) == 2


def test_a_stream_between_two_accounts_is_framed_and_complete(across: Bench) -> None:
    with natsync.Client(across.url, user="asking", password="S3CRET-2") as client:
        held = across.hold(**SERVING)
        stream = client.stream(held.subject, window=16, timeout=PATIENCE)
        sender = held.sender
        sending = Outcome(lambda: [sender.send(b"%d" % number) for number in range(500)] and sender.end(wait=PATIENCE))
        assert list(stream) == [b"%d" % number for number in range(500)]
        assert stream.mode == "framed"
        assert sending.within(PATIENCE) is None
        assert sending.value is True


def test_a_cancel_between_two_accounts_reaches_the_handler(across: Bench) -> None:
    held = across.hold(**SERVING)
    with natsync.Client(across.url, user="asking", password="S3CRET-2") as client:
        stream = client.stream(held.subject)
        held.sender.send(b"one")
        assert stream.next(PATIENCE) == b"one"
        stream.cancel("enough of it")
        assert held.sender.closed.wait(SLACK)
        with pytest.raises(natsync.StreamCancelled, match="enough of it"):
            held.sender.send(b"two")


@pytest.mark.usefixtures("impatient")
def test_a_requester_in_another_account_that_does_not_answer_is_lost(across: Bench) -> None:
    _, sender = across.open(offer(g=200), **SERVING)
    with contextlib.suppress(natsync.StreamClosed):  # it may be lost by now
        sender.send(b"one")
    assert sender.closed.wait(SLACK)
    with pytest.raises(natsync.ClientLost):
        sender.send(b"two")


# -- permissions -----------------------------------------------------------------------------------------------------

USERS = """
authorization {
  users = [
    {user: asking, password: "S3CRET-1"}
    {user: many, password: "S3CRET-2", permissions: {
      subscribe: ["framed.>", "_INBOX.>"], allow_responses: {max: -1, expires: "1m"}
    }}
    {user: one, password: "S3CRET-3", permissions: {subscribe: ["framed.>", "_INBOX.>"], allow_responses: true}}
  ]
}
"""


@pytest.fixture
def guarded(make_nats_server: Make) -> Iterator[Bench]:
    with bench_on(make_nats_server(config=USERS).url, user="asking", **{"pass": "S3CRET-1"}) as bench:
        yield bench


def test_a_responder_that_may_answer_often_can_stream(guarded: Bench) -> None:
    asker, sender = guarded.open(user="many", password="S3CRET-2")
    for _ in range(5):
        sender.send(b"x")
    sender.end()
    assert asker.keys(6) == [*((b"d", n) for n in range(1, 6)), (b"e", 6)]


def test_a_responder_that_may_answer_once_is_told_what_it_needs(
    guarded: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(framed_sender, "FIRST_REPEAT", 30.0)  # its own question would be refused, too
    _, sender = guarded.open(user="one", password="S3CRET-3")
    sender.send(b"x")
    assert sender.closed.wait(SLACK)
    with pytest.raises(natsync.StreamClosed, match=r"allow_responses.*max: -1") as caught:
        sender.send(b"y")
    assert caught.value.code == natsync.Code.PERMISSION_DENIED


def test_another_stream_of_a_responder_that_may_answer_once_is_not_concerned(
    guarded: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(framed_sender, "FIRST_REPEAT", 30.0)
    held = guarded.hold(user="one", password="S3CRET-3")
    _, first = guarded.open(held=held)
    _, second = guarded.open(held=held)
    first.send(b"x")
    assert first.closed.wait(SLACK)
    assert not second.is_closed()
