"""Codecs: MessagePack and pydantic payloads, and handlers that take and return values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pydantic as real_pydantic
import pytest

import natsync
from natsync.contrib import msgpack, pydantic
from rawclient import PATIENCE
from support import run_python


class Numbers(real_pydantic.BaseModel):
    a: int
    b: int = 0


class Total(real_pydantic.BaseModel):
    sum: int


@pytest.fixture
def client(natsync_client: natsync.Client) -> natsync.Client:
    return natsync_client.open()


@pytest.fixture
def subscriber(natsync_subscriber: natsync.Subscriber) -> natsync.Subscriber:
    subscriber = natsync_subscriber

    @subscriber.handler("codec.msgpack.sum")
    @msgpack.typed
    def add(ctx: natsync.Context, numbers: Any) -> Any:
        return {"sum": sum(numbers)}

    @subscriber.stream("codec.msgpack.each")
    @msgpack.typed
    def each(ctx: natsync.Context, numbers: Any) -> Iterator[Any]:
        for number in numbers:
            yield [number, b"\x00raw"]

    @subscriber.handler("codec.pydantic.sum")
    @pydantic.typed
    def add_model(ctx: natsync.Context, numbers: Numbers) -> Total:
        return Total(sum=numbers.a + numbers.b)

    @subscriber.stream("codec.pydantic.each")
    @pydantic.typed
    def each_model(ctx: natsync.Context, several: list[Numbers]) -> Iterator[Total]:
        for numbers in several:
            yield Total(sum=numbers.a + numbers.b)

    return subscriber.open()


def test_msgpack_handlers_take_and_return_values(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    reply = client.request("codec.msgpack.sum", msgpack.encode([20, 22]), timeout=PATIENCE)
    assert msgpack.decode(reply) == msgpack.decode(reply.data) == {"sum": 42}
    with client.stream("codec.msgpack.each", msgpack.encode([1, 2]), timeout=PATIENCE) as stream:
        assert list(stream.map(msgpack.decode)) == [[1, b"\x00raw"], [2, b"\x00raw"]]


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x92\x01", b"\x01\x01"])
def test_what_is_not_one_msgpack_value_is_refused(
    client: natsync.Client, subscriber: natsync.Subscriber, data: bytes
) -> None:
    with pytest.raises(natsync.InvalidArgument, match=r"not a MessagePack value: \S"):
        msgpack.decode(data)
    for ask in (
        lambda: client.request("codec.msgpack.sum", data, timeout=PATIENCE),
        lambda: list(client.stream("codec.msgpack.each", data, timeout=PATIENCE)),
    ):
        with pytest.raises(natsync.HandlerError, match="not a MessagePack value") as refused:
            ask()
        assert refused.value.code == natsync.Code.INVALID_ARGUMENT


@pytest.mark.parametrize("value", [{1: "a"}, {None: 1}, {True: 1}, {1.5: [2]}, {b"k": 1, "k": 2}, {"in": [{-1: {}}]}])
def test_maps_with_keys_that_are_no_texts_come_back(value: object) -> None:
    assert msgpack.decode(msgpack.encode(value)) == value


def test_a_key_that_python_has_no_place_for_is_refused() -> None:
    with pytest.raises(natsync.InvalidArgument, match=r"not a MessagePack value: .*unhashable"):
        msgpack.decode(msgpack.encode({(1, 2): 3}))  # a list, as it comes


@pytest.mark.parametrize("value", [object(), 2**65, {1, 2}])
def test_what_has_no_msgpack_form_is_refused(value: object) -> None:
    with pytest.raises(natsync.InvalidArgument, match="no MessagePack form"):
        msgpack.encode(value)


def test_pydantic_handlers_take_and_return_models(client: natsync.Client, subscriber: natsync.Subscriber) -> None:
    reply = client.request("codec.pydantic.sum", pydantic.encode(Numbers(a=20, b=22)), timeout=PATIENCE)
    assert pydantic.decode(Total, reply) == pydantic.decode(Total, reply.data) == Total(sum=42)
    assert reply.json() == {"sum": 42}  # peers without pydantic
    asked = pydantic.encode([Numbers(a=1), Numbers(a=2, b=3)])
    with client.stream("codec.pydantic.each", asked, timeout=PATIENCE) as stream:
        assert list(stream.map(lambda chunk: pydantic.decode(Total, chunk).sum)) == [1, 5]


def test_what_does_not_fit_the_model_is_refused_and_said_where(
    client: natsync.Client, subscriber: natsync.Subscriber
) -> None:
    with pytest.raises(natsync.HandlerError, match="a: Field required; b: Input should be a valid integer") as refused:
        client.request("codec.pydantic.sum", json={"b": "secret"}, timeout=PATIENCE)
    assert refused.value.code == natsync.Code.INVALID_ARGUMENT
    assert "secret" not in str(refused.value)
    with pytest.raises(natsync.HandlerError, match=r"1\.a: Field required"):
        list(client.stream("codec.pydantic.each", json=[{"a": 1}, {}], timeout=PATIENCE))
    with pytest.raises(natsync.InvalidArgument, match="the payload: Invalid JSON"):
        pydantic.decode(Total, b"{")
    with pytest.raises(natsync.InvalidArgument, match="no JSON form"):
        pydantic.encode(object())


def test_a_typed_handler_needs_a_type() -> None:
    with pytest.raises(TypeError, match=r"\(ctx, model: Model\)"):
        pydantic.typed(lambda ctx, model: model)


@pytest.mark.parametrize(
    ("module", "missing"),
    [("msgpack", "msgpack"), ("pydantic", "pydantic"), ("prometheus", "prometheus_client"), ("otel", "opentelemetry")],
)
def test_a_missing_extra_says_in_one_line_what_to_install(module: str, missing: str) -> None:
    done = run_python(
        f"import sys\nsys.modules[{missing!r}] = None\nimport natsync\n"
        f"try:\n    import natsync.contrib.{module}\nexcept ImportError as error:\n    print(error)\n"
    )
    assert done.stdout.count("\n") == 1, done.stderr
    assert f'pip install "natsync[{module}]"' in done.stdout
