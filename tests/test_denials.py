"""What the server does not allow reaches whoever asked for it, and nobody else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import natsync
from broker import QUICK, Broker, Events, Outcome, opened
from natsync.testing import NatsServer, PeerConnection, ScriptedPeer, eventually

USERS = """
authorization {
  users = [
    {user: all, password: "S3CRET-all"}
    {user: some, password: "S3CRET-some", permissions: {
      subscribe: {allow: [">"], deny: ["closed.>", "shared workers"]}
      publish: {deny: ["closed.>"]}
    }}
    {user: deaf, password: "S3CRET-deaf", permissions: {subscribe: {allow: ["open.>"]}, publish: ">"}}
    {user: boxed, password: "S3CRET-boxed", permissions: {subscribe: {allow: ["box.>"]}, publish: ">"}}
  ]
}
"""


@pytest.fixture
def server(make_nats_server: Callable[..., NatsServer]) -> NatsServer:
    return make_nats_server(config=USERS)


def as_user(server: NatsServer, user: str, **options: Any) -> natsync.Client:
    return natsync.Client(server.url, user=user, password=f"S3CRET-{user}", **options)


def test_only_the_denied_member_of_a_subject_is_ended(server: NatsServer) -> None:
    with as_user(server, "some") as client, as_user(server, "all") as other:
        allowed = client.subscribe("shared")
        denied = client.subscribe("shared", queue="workers")
        with pytest.raises(natsync.PermissionDenied, match="workers"):
            denied.next(timeout=5)
        other.publish("shared", b"hello")
        assert allowed.next(timeout=5).data == b"hello"
        assert allowed.active
        assert not denied.active


def test_a_user_who_may_not_have_an_inbox_is_told_at_the_first_request(server: NatsServer) -> None:
    with as_user(server, "deaf") as client:
        with pytest.raises(natsync.PermissionDenied, match="no answer can reach this client"):
            client.request("open.question", timeout=5)
        with pytest.raises(natsync.PermissionDenied):
            list(client.stream("open.question", timeout=5))
        assert client.stats()["waiting_replies"] == 0


def test_an_inbox_prefix_that_is_allowed_makes_requests_work(server: NatsServer) -> None:
    with as_user(server, "boxed", inbox_prefix="box") as client, as_user(server, "all") as other:
        other.subscribe("question", lambda message: message.respond(b"answer"))
        other.flush()
        assert client.request("question", timeout=5).data == b"answer"


def test_a_stream_that_may_not_be_asked_for_fails_and_others_go_on(server: NatsServer) -> None:
    with as_user(server, "some") as client, as_user(server, "all") as other:
        other.subscribe("open", lambda message: message.respond(b"answer"))
        other.flush()
        with pytest.raises(natsync.PermissionDenied, match=r"closed\.stream"):
            list(client.stream("closed.stream", timeout=5))
        assert client.request("open", timeout=5).data == b"answer"


def test_permissions_that_are_taken_away_end_the_subscription(server: NatsServer) -> None:
    with as_user(server, "all") as client:
        kept, lost = client.subscribe("kept"), client.subscribe("lost.it")
        client.flush()
        everything = '{user: all, password: "S3CRET-all"}'
        less = '{user: all, password: "S3CRET-all", permissions: {subscribe: {deny: ["lost.>"]}}}'
        server.reload(USERS.replace(everything, less))
        with pytest.raises(natsync.PermissionDenied):
            lost.next(timeout=5)
        client.publish("kept", b"still")
        assert kept.next(timeout=5).data == b"still"


def test_more_subscriptions_than_the_server_takes_fail_and_the_others_stay(
    make_nats_server: Callable[..., NatsServer],
) -> None:
    server = make_nats_server(config="max_subscriptions: 4")  # one is the inbox
    with natsync.connect(server.url) as client:
        subs = [client.subscribe(f"s.{number}") for number in range(6)]
        eventually(lambda: sum(not sub.active for sub in subs) == 3)
        assert [sub.active for sub in subs] == [True] * 3 + [False] * 3
        for sub in subs[3:]:
            with pytest.raises(natsync.PermissionDenied, match=r"(?i)maximum subscriptions"):
                sub.next(timeout=5)
        client.publish("s.0", b"x")
        assert subs[0].next(timeout=5).data == b"x"


def test_a_subscription_that_the_server_has_confirmed_is_not_ended_by_what_concerns_another() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer) as client:
        confirmed = client.subscribe("confirmed")
        client.flush()
        newest = client.subscribe("newest")
        eventually(lambda: len(broker.subscribed()) == 2)
        broker.newest.send(b"-ERR 'Maximum Subscriptions Exceeded'\r\n-ERR 'Maximum Subscriptions Exceeded'\r\n")
        with pytest.raises(natsync.PermissionDenied):
            newest.next(timeout=5)
        client.flush()
        assert confirmed.active


def test_a_reply_subject_that_is_not_allowed_fails_the_request_it_belongs_to() -> None:
    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer) as client:
        first = Outcome(lambda: client.request("a", timeout=5))
        second = Outcome(lambda: client.request("b", timeout=5))
        eventually(lambda: len(broker.published()) == 2)
        denied, other = sorted(broker.published(), key=lambda pub: pub.subject)
        assert denied.reply
        assert other.reply
        broker.newest.send(b"-ERR 'Permissions Violation for Publish with Reply of \"%b\"'\r\n" % denied.reply)
        assert isinstance(first.within(5), natsync.PermissionDenied)
        sid = broker.said[0][0].sid  # type: ignore[union-attr]
        broker.newest.send(b"MSG %b %b 2\r\nok\r\n" % (other.reply, sid))
        assert second.within(5) is None


def test_an_inbox_that_is_allowed_on_the_next_link_works_again() -> None:
    broker = Broker()
    events = Events()
    with ScriptedPeer(broker) as peer, opened(peer, on_event=events) as client:
        eventually(lambda: broker.said and broker.said[0])
        inbox = broker.said[0][0].subject  # type: ignore[union-attr]
        broker.newest.send(b"-ERR 'Permissions Violation for Subscription to \"%b\"'\r\n" % inbox)
        events.wait("error")
        with pytest.raises(natsync.PermissionDenied):
            client.request("a", timeout=5)
        broker.drop()
        events.wait("reconnected")
        asking = Outcome(lambda: client.request("a", timeout=5))
        eventually(lambda: broker.published())
        reply = broker.published()[0].reply
        broker.newest.send(b"MSG %b 1 2\r\nok\r\n" % reply)
        assert asking.within(5) is None


def test_a_handler_that_may_not_answer_is_told_what_its_user_needs(
    make_nats_server: Callable[..., NatsServer],
) -> None:
    server = make_nats_server(
        config="""
authorization {
  users = [
    {user: all, password: "S3CRET-all"}
    {user: mute, password: "S3CRET-mute", permissions: {subscribe: ">", publish: {deny: ">"}}}
  ]
}
"""
    )
    events = Events()
    subscriber = natsync.Subscriber(server.url, user="mute", password="S3CRET-mute", on_event=events)

    @subscriber.handler("q")
    def answer(ctx: natsync.Context, request: natsync.Message) -> bytes:
        return b"never arrives"

    with subscriber, as_user(server, "all") as client:
        with pytest.raises(natsync.RequestTimeout):
            client.request("q", timeout=0.3)
        told = events.wait("error")
        assert told["kind"] == "permission"
        assert "allow_responses" in told["advice"]


def test_errors_tell_their_kind() -> None:
    events = Events()
    broker = Broker()
    with ScriptedPeer(broker) as peer, opened(peer, on_event=events, **QUICK):
        broker.newest.send(b"-ERR 'Invalid Subject'\r\n-ERR 'Something New'\r\n")
        assert events.wait("error", 1)["kind"] == "permission"
        assert events.wait("error", 2)["kind"] == "unknown"


@pytest.mark.parametrize(
    "text",
    [
        "Maximum Payload Violation",
        "Maximum Control Line Exceeded",
        "Unknown Protocol Operation",
        "Stale Connection",
        "maximum connections exceeded",
        "Authentication Timeout",
    ],
)
def test_errors_behind_which_the_server_closes_are_told_and_the_link_made_again(text: str) -> None:
    events = Events()

    def leave(peer: Any) -> None:
        peer.handshake()
        peer.send(b"-ERR '%b'\r\n" % text.encode())

    broker = Broker(leave)
    with ScriptedPeer(broker) as peer, opened(peer, on_event=events, **QUICK) as client:
        assert events.wait("error")["error"] == text
        assert text in events.wait("disconnected")["reason"]
        events.wait("reconnected")
        client.flush()


@pytest.mark.parametrize("text", ["invalid client protocol", "no responders requires headers support"])
def test_a_server_that_says_twice_that_it_does_not_fit_this_client_ends_it(text: str) -> None:
    events = Events()

    def misfit(peer: PeerConnection) -> None:
        peer.send_info()
        peer.recv_line()
        peer.recv_line()
        peer.send(b"-ERR '%b'\r\n" % text.encode())

    broker = Broker(PeerConnection.handshake, misfit, misfit)
    with ScriptedPeer(broker) as peer, opened(peer, on_event=events) as client:
        told = events.wait("closed")
        assert text in str(told["reason"])
        assert client.status == "closed"
        assert peer.accepted == 3
        with pytest.raises(natsync.ConnectionClosed, match=text) as raised:
            client.publish("x")
        assert isinstance(raised.value.__cause__, natsync.ConnectError)
