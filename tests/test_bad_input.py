"""What cannot be sent is refused by a clear, typed error before anything is sent: no byte of it reaches the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import natsync
from natsync.testing import NatsServer, eventually
from rawclient import PATIENCE, RawClient, RecordingServer

Verb = Callable[..., object]


class Witness:
    """A client of a server that writes everything down."""

    def __init__(self, server: RecordingServer, client: natsync.Client) -> None:
        self.server = server
        self.client = client
        self.client.flush()
        self._before = list(server.requests)

    def assert_nothing_sent(self) -> None:
        self.client.flush()  # whatever was sent before has arrived
        assert self.server.requests == self._before
        assert self.client.status == "connected"
        assert self.client.stats()["waiting_replies"] == 0
        assert self.client.stats()["subscriptions"] == 0


@pytest.fixture
def witness() -> Iterator[Witness]:
    with RecordingServer() as server, natsync.connect(server.url) as client:
        yield Witness(server, client)


VERBS: dict[str, Verb] = {
    "publish": lambda client, subject, *args, **kwargs: client.publish(subject, *args, **kwargs),
    "request": lambda client, subject, *args, **kwargs: client.request(subject, *args, **kwargs),
    "stream": lambda client, subject, *args, **kwargs: client.stream(subject, *args, **kwargs),
    "stream_request": lambda client, subject, payload=b"", **kwargs: client.stream_request(
        subject, payload, lambda message: None, **kwargs
    ),
}
every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
every_asking_verb = pytest.mark.parametrize(
    "verb", [VERBS[name] for name in VERBS if name != "publish"], ids=[name for name in VERBS if name != "publish"]
)

#: Cannot be in any subject.
FORGED = ["", " ", "a b", "a\tb", "a\r\n", "a\r\nPUB b 1\r\nx", "a\nb", "a\0b", "\x7f"]
#: Have an empty token.
HOLES = [".", "a.", ".a", "a..b"]


# -- subjects ------------------------------------------------------------------------------------------------------


@every_verb
@pytest.mark.parametrize("subject", [*FORGED, *HOLES, "a.*", "*", ">", "a.>", "\ud800"], ids=repr)
def test_a_subject_that_cannot_be_published_to(witness: Witness, verb: Verb, subject: str) -> None:
    with pytest.raises(natsync.InvalidArgument, match=r"subject|encoded"):
        verb(witness.client, subject)
    witness.assert_nothing_sent()


@every_verb
@pytest.mark.parametrize("subject", [None, b"bytes", 5, ["a"]], ids=repr)
def test_a_subject_that_is_no_text(witness: Witness, verb: Verb, subject: Any) -> None:
    with pytest.raises(TypeError, match="str"):
        verb(witness.client, subject)
    witness.assert_nothing_sent()


@pytest.mark.parametrize("subject", [*FORGED, *HOLES, "a.>.b", ">.a"], ids=repr)
def test_a_subject_that_cannot_be_subscribed_to(witness: Witness, subject: str) -> None:
    with pytest.raises(natsync.InvalidArgument, match="subject"):
        witness.client.subscribe(subject)
    witness.assert_nothing_sent()


@pytest.mark.parametrize("queue", [*FORGED], ids=repr)
def test_a_queue_group_that_cannot_be_sent(witness: Witness, queue: str) -> None:
    with pytest.raises(natsync.InvalidArgument, match="queue"):
        witness.client.subscribe("b.x", queue=queue)
    witness.assert_nothing_sent()


@pytest.mark.parametrize("reply", [*FORGED, *HOLES, "a.*"], ids=repr)
def test_a_reply_subject_that_cannot_be_sent(witness: Witness, reply: str) -> None:
    with pytest.raises(natsync.InvalidArgument):
        witness.client.publish("b.x", b"", reply=reply)
    witness.assert_nothing_sent()


@pytest.mark.parametrize("prefix", ["", "a b", "a.*", "a..b", "a\r\nb"], ids=repr)
def test_an_inbox_prefix_that_cannot_be_sent(prefix: str) -> None:
    with pytest.raises(natsync.InvalidArgument):
        natsync.Client("nats://127.0.0.1", inbox_prefix=prefix)


@pytest.mark.parametrize("client_id", ["a\r\nb", "a\0b"], ids=repr)
def test_a_client_id_that_cannot_be_sent(witness: Witness, client_id: str) -> None:
    with pytest.raises(natsync.InvalidArgument):
        witness.client.stream_request("b.x", b"", lambda message: None, client_id=client_id)
    witness.assert_nothing_sent()


# -- headers -------------------------------------------------------------------------------------------------------


@every_verb
@pytest.mark.parametrize(
    "headers",
    [
        {"": "v"}, {"a b": "v"}, {"a:b": "v"}, {"a\r\nb": "v"}, {"ä": "v"}, {"k": "a\r\nb: c"}, {"k": "a\nb"},
        {"k": "a\rb"}, {"k": "a\0b"}, {"k": ["fine", "not\r\nfine"]},
    ],
    ids=repr,
)  # fmt: skip
def test_headers_that_would_forge_lines(witness: Witness, verb: Verb, headers: dict[str, Any]) -> None:
    with pytest.raises(natsync.InvalidArgument, match="header"):
        verb(witness.client, "b.x", headers=headers)
    witness.assert_nothing_sent()


@every_verb
@pytest.mark.parametrize(
    "headers", [{"k": 5}, {"k": None}, {"k": b"bytes"}, {5: "v"}, ["k"], "text", [("k", "v")], 7], ids=repr
)
def test_headers_of_the_wrong_type(witness: Witness, verb: Verb, headers: Any) -> None:
    with pytest.raises(TypeError, match="header"):
        verb(witness.client, "b.x", headers=headers)
    witness.assert_nothing_sent()


# -- payloads ------------------------------------------------------------------------------------------------------


@every_verb
@pytest.mark.parametrize(
    "payload", [None, 5, 1.5, True, ["a"], {"a": 1}, object()], ids=lambda value: type(value).__name__
)
def test_a_payload_that_is_neither_bytes_like_nor_text(witness: Witness, verb: Verb, payload: Any) -> None:
    with pytest.raises(TypeError, match="bytes-like or str"):
        verb(witness.client, "b.x", payload)
    witness.assert_nothing_sent()


@every_verb
def test_text_that_has_no_utf_8_form(witness: Witness, verb: Verb) -> None:
    with pytest.raises(ValueError):
        verb(witness.client, "b.x", "\ud800")
    witness.assert_nothing_sent()


@every_verb
@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", {"k": object()}], ids=lambda value: type(value).__name__)
def test_a_value_without_a_json_form(witness: Witness, verb: Verb, value: object) -> None:
    with pytest.raises(natsync.InvalidArgument, match="JSON"):
        verb(witness.client, "b.x", json=value)
    witness.assert_nothing_sent()


@every_verb
def test_a_payload_and_json_together(witness: Witness, verb: Verb) -> None:
    with pytest.raises(natsync.InvalidArgument, match="not both"):
        verb(witness.client, "b.x", b"payload", json=1)
    witness.assert_nothing_sent()


@every_verb
@pytest.mark.parametrize("extra", ["payload", "headers"])
def test_a_message_above_max_payload(witness: Witness, verb: Verb, extra: str) -> None:
    limit = witness.client.server_info["max_payload"]
    arguments: dict[str, Any] = {"headers": {"k": "v" * limit}} if extra == "headers" else {}
    with pytest.raises(natsync.MaxPayloadExceeded) as caught:
        verb(witness.client, "b.x", b"" if extra == "headers" else b"x" * (limit + 1), **arguments)
    assert caught.value.limit_bytes == limit
    assert caught.value.size_bytes > limit
    assert str(limit) in str(caught.value)
    witness.assert_nothing_sent()


def test_a_message_of_just_max_payload_is_sent(nats_server: NatsServer) -> None:
    with natsync.connect(nats_server.url) as client, RawClient(nats_server.url) as raw:
        raw.subscribe("b.limit")
        payload = b"x" * client.server_info["max_payload"]
        client.publish("b.limit", payload)
        assert raw.next().payload == payload
        client.flush()
        assert client.stats()["reconnects"] == 0


def test_a_respond_above_max_payload(nats_server: NatsServer) -> None:
    with natsync.connect(nats_server.url) as client, RawClient(nats_server.url) as raw:
        subscription = client.subscribe("b.respond")
        client.flush()
        raw.request("b.respond")
        request = subscription.next(PATIENCE)
        for bad in (b"x" * (2 << 20), None, 5):
            with pytest.raises((natsync.MaxPayloadExceeded, TypeError)):
                request.respond(bad)  # type: ignore[arg-type]
        request.respond(b"fine")
        assert raw.next().payload == b"fine"


@pytest.mark.parametrize(
    "options",
    [{"framed": False}, {"max_message_bytes": (2 << 20) - 1}],
    ids=["above max_payload, in plain mode", "above what the requester takes, in framed mode"],
)
def test_a_chunk_that_is_too_large_does_not_end_the_stream(
    nats_server: NatsServer, natsync_subscriber: natsync.Subscriber, options: dict[str, Any]
) -> None:
    refused: list[natsync.MaxPayloadExceeded] = []

    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        for send in (sender.send, sender.try_send):
            try:
                send(b"x" * (2 << 20))
            except natsync.MaxPayloadExceeded as error:
                refused.append(error)
        sender.send(b"fine")
        sender.end()

    natsync_subscriber.stream_subscribe("b.chunk", handler)
    with natsync.connect(nats_server.url, **options) as client:
        assert list(client.stream("b.chunk")) == [b"fine"]
    assert len(refused) == 2


# -- times and numbers ---------------------------------------------------------------------------------------------

BAD_TIMES = [-1, -0.001, float("nan"), float("-inf")]
NO_TIMES = ["1", b"1", True, [1]]


@every_asking_verb
@pytest.mark.parametrize("name", ["timeout", "idle_timeout"])
@pytest.mark.parametrize("value", [*BAD_TIMES, *NO_TIMES], ids=repr)
def test_times_that_make_no_sense(witness: Witness, verb: Verb, name: str, value: Any) -> None:
    if verb is VERBS["request"] and name == "idle_timeout":
        name = "timeout"
    error = TypeError if value in NO_TIMES else natsync.InvalidArgument
    with pytest.raises(error, match="seconds"):
        verb(witness.client, "b.x", **{name: value})
    witness.assert_nothing_sent()


@pytest.mark.parametrize("value", [*BAD_TIMES, *NO_TIMES], ids=repr)
def test_times_that_make_no_sense_in_waits(nats_server: NatsServer, value: Any) -> None:
    error = TypeError if value in NO_TIMES else natsync.InvalidArgument
    ctx = natsync.Context()
    with natsync.connect(nats_server.url) as client, natsync.ConnectionPool(nats_server.url) as pool:
        subscription = client.subscribe("b.x")
        stream = client.stream("b.x")
        waits: list[Callable[[], object]] = [
            lambda: client.flush(value),
            lambda: client.rtt(value),
            lambda: client.close(value),
            lambda: client.drain(value),
            lambda: subscription.next(value),
            lambda: subscription.drain(value),
            lambda: stream.next(value),
            lambda: pool.getconn(value),
            lambda: pool.close(value),
            lambda: ctx.wait(value),
            lambda: ctx.with_timeout(value),
        ]
        for wait in waits:
            with pytest.raises(error):
                wait()
        assert client.status == "connected"
        assert subscription.active
        stream.close()


def test_times_that_make_no_sense_in_a_sender_and_a_subscriber(
    natsync_client: natsync.Client, natsync_subscriber: natsync.Subscriber
) -> None:
    errors: list[str] = []

    def handler(ctx: natsync.HandlerContext, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        for call in (
            lambda: sender.send(b"x", timeout=-1),
            lambda: sender.send_many([b"x"], timeout=float("nan")),
            lambda: sender.end(wait=-1),
        ):
            try:
                call()
            except natsync.InvalidArgument as error:
                errors.append(str(error))
        sender.end()

    handle = natsync_subscriber.stream_subscribe("b.times", handler)
    assert list(natsync_client.stream("b.times")) == []
    assert len(errors) == 3
    for call in (
        lambda: handle.wait(-1),
        lambda: handle.stop(-1),
        lambda: natsync_subscriber.close(-1),
        lambda: natsync_subscriber.drain(-1),
        lambda: natsync_subscriber.serve_forever(shutdown_timeout=-1),
    ):
        with pytest.raises(natsync.InvalidArgument):
            call()
    assert not handle.stopped


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_messages": 0}, natsync.InvalidArgument),
        ({"max_messages": "3"}, TypeError),
        ({"pending_messages": 0}, natsync.InvalidArgument),
        ({"pending_messages": True}, TypeError),
        ({"pending_bytes": -1}, natsync.InvalidArgument),
        ({"concurrency": 0}, natsync.InvalidArgument),
        ({"concurrency": 1.5}, TypeError),
        ({"overflow": "block"}, natsync.InvalidArgument),
        ({"overflow": None}, natsync.InvalidArgument),
        ({"overflow": "error", "callback": print}, natsync.InvalidArgument),
        ({"callback": 5}, TypeError),
    ],
    ids=repr,
)
def test_limits_of_a_subscription_that_make_no_sense(
    witness: Witness, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        witness.client.subscribe("b.x", **arguments)
    witness.assert_nothing_sent()


@pytest.mark.parametrize(
    "callback",
    [lambda: None, lambda ctx, message: None, lambda message, *, wanted: None],
    ids=["nothing", "two", "keyword"],
)
def test_a_callback_that_cannot_be_called_with_a_message(witness: Witness, callback: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match=r"\(message\)"):
        witness.client.subscribe("b.x", callback)
    witness.assert_nothing_sent()


@pytest.mark.parametrize(
    ("window", "error"),
    [(0, natsync.InvalidArgument), (-5, natsync.InvalidArgument), ("8", TypeError), (True, TypeError)],
)
def test_a_window_that_makes_no_sense(witness: Witness, window: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="window"):
        witness.client.stream("b.x", window=window)
    witness.assert_nothing_sent()


@pytest.mark.parametrize("processor", [None, "text", 5], ids=repr)
def test_a_processor_that_cannot_be_called(witness: Witness, processor: Any) -> None:
    with pytest.raises(TypeError, match="processor"):
        witness.client.stream_request("b.x", b"", processor)
    witness.assert_nothing_sent()


@every_asking_verb
@pytest.mark.parametrize("retry", [3, True, "yes", object()], ids=lambda value: type(value).__name__)
def test_a_retry_that_is_no_policy(witness: Witness, verb: Verb, retry: Any) -> None:
    with pytest.raises(TypeError, match="Retry"):
        verb(witness.client, "b.x", retry=retry)
    witness.assert_nothing_sent()


@pytest.mark.parametrize(
    "arguments",
    [
        {"attempts": 0},
        {"attempts": True},
        {"attempts": 1.5},
        {"initial": -1},
        {"maximum": float("nan")},
        {"multiplier": 0.5},
    ],
    ids=repr,
)
def test_a_retry_policy_that_makes_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(natsync.InvalidArgument):
        natsync.Retry(**arguments)


@pytest.mark.parametrize(
    "limits", [{"max_workers": 0}, {"max_streams": -1}, {"max_workers": 2.5}, {"max_streams": True}], ids=repr
)
def test_limits_of_a_subscriber_that_make_no_sense(limits: dict[str, Any]) -> None:
    with pytest.raises(natsync.InvalidArgument):
        natsync.Subscriber("nats://127.0.0.1", **limits)


@pytest.mark.parametrize("limits", [{"pending_messages": 0}, {"pending_bytes": -1}], ids=repr)
def test_pending_limits_of_a_subscriber_are_checked_by_its_constructor(limits: dict[str, Any]) -> None:
    with pytest.raises(natsync.InvalidArgument):
        natsync.Subscriber("nats://127.0.0.1", **limits)


def test_sentinels_that_cannot_be_told_apart() -> None:
    for end, prefix in ((b"E", b""), (b"E:end", b"E:"), (b"E", b"E")):
        with pytest.raises(natsync.InvalidArgument):
            natsync.Sentinels(end=end, error_prefix=prefix)


# -- servers and options -------------------------------------------------------------------------------------------

MAKERS = [natsync.Client, natsync.Subscriber, natsync.ConnectionPool, natsync.connect]
every_maker = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


@every_maker
@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:4222", "ftp://x", "redis://x", "NATS//x", "", " ", ",", "nats://", "nats://:4222",
        "nats://127.0.0.1:0", "nats://127.0.0.1:65536", "nats://127.0.0.1:-1", "nats://127.0.0.1:port",
        "nats://127.0.0.1:4222/path", "nats://127.0.0.1?query", "nats://a b:4222", "nats://[::1", "nats://x\r\ny",
    ],
    ids=repr,
)  # fmt: skip
def test_a_url_that_names_no_nats_server(make: Callable[[Any], object], url: str) -> None:
    with pytest.raises(natsync.InvalidURL) as caught:
        make(url)
    assert isinstance(caught.value, ValueError)


@every_maker
@pytest.mark.parametrize("servers", [5, [5], [None], b"nats://127.0.0.1", [b"nats://127.0.0.1"]], ids=repr)
def test_servers_that_are_no_text(make: Callable[[Any], object], servers: Any) -> None:
    with pytest.raises(TypeError, match="servers"):
        make(servers)


@every_maker
def test_an_empty_list_of_servers(make: Callable[[Any], object]) -> None:
    with pytest.raises(natsync.InvalidURL):
        make([])


def test_a_bad_url_is_not_shown_because_it_may_hold_a_password() -> None:
    for url in (
        "nats://alice:S3CRET@127.0.0.1:port", "nats://alice:S3CRET@127.0.0.1:99999", "http://alice:S3CRET@127.0.0.1",
        "nats://alice:S3CRET@", "nats://alice:S3CRET@host/path", "nats://alice:S3CRET@[::1",
    ):  # fmt: skip
        with pytest.raises(natsync.InvalidURL) as caught:
            natsync.Client(url)
        assert "S3CRET" not in f"{caught.value} {caught.value!r} {caught.value.__cause__}"


@every_maker
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"connect_timeout": 0}, natsync.InvalidArgument),
        ({"connect_timeout": -1}, natsync.InvalidArgument),
        ({"connect_timeout": "2"}, TypeError),
        ({"connect_timeout": None}, (TypeError, natsync.InvalidArgument)),
        ({"ping_interval": -1}, natsync.InvalidArgument),
        ({"ping_interval": float("nan")}, natsync.InvalidArgument),
        ({"write_timeout": -1}, natsync.InvalidArgument),
        ({"max_pings_outstanding": 0}, natsync.InvalidArgument),
        ({"max_reconnects": -2}, natsync.InvalidArgument),
        ({"max_reconnects": 1.5}, TypeError),
        ({"reconnect_wait": -1}, natsync.InvalidArgument),
        ({"reconnect_jitter": 2}, natsync.InvalidArgument),
        ({"reconnect_jitter": float("nan")}, natsync.InvalidArgument),
        ({"reconnect_jitter": "a"}, TypeError),
        ({"reconnect_jitter": None}, TypeError),
        ({"reconnect_jitter": True}, TypeError),
        ({"inbox_prefix": 5}, TypeError),
        ({"inbox_prefix": "a b"}, natsync.InvalidArgument),
        ({"reconnect_buffer_bytes": -1}, natsync.InvalidArgument),
        ({"max_message_bytes": 0}, natsync.InvalidArgument),
        ({"tls": "yes"}, TypeError),
        ({"sentinels": "END"}, TypeError),
        ({"on_event": "print"}, TypeError),
        ({"name": 5}, TypeError),
        ({"user": 5}, TypeError),
        ({"password": b"bytes"}, TypeError),
        ({"token": 5}, TypeError),
        ({"no_such_option": 1}, TypeError),
    ],
    ids=repr,
)
def test_options_that_make_no_sense(
    make: Callable[..., object], options: dict[str, Any], error: type[Exception] | tuple[type[Exception], ...]
) -> None:
    (name,) = options
    with pytest.raises(error, match=name):
        make("nats://127.0.0.1:1", **options)


# -- afterwards ----------------------------------------------------------------------------------------------------


def test_after_all_that_the_client_still_works(nats_server: NatsServer) -> None:
    with natsync.connect(nats_server.url) as client:
        for bad in (
            lambda: client.publish("a b"),
            lambda: client.request("x", None),  # type: ignore[arg-type]
            lambda: client.stream("x", timeout=-1),
            lambda: client.subscribe("a..b"),
            lambda: client.publish("x", b"x" * (2 << 20)),
        ):
            with pytest.raises((ValueError, TypeError, natsync.MaxPayloadExceeded)):
                bad()
        subscription = client.subscribe("b.works")
        client.publish("b.works", b"1")
        assert subscription.next(PATIENCE).data == b"1"
        eventually(lambda: client.stats()["reconnects"] == 0)
