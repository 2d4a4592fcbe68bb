"""What natsync's errors are over HTTP."""

from __future__ import annotations

import json
import threading

import pytest

import natsync
from natsync import Code
from natsync.contrib.failures import error_data, http_headers, http_status
from natsync.testing import NatsServer

PATIENCE = 10.0

ERRORS: list[tuple[BaseException, int, Code]] = [
    (natsync.RequestTimeout("no reply on secret.subject"), 504, Code.DEADLINE_EXCEEDED),
    (natsync.IdleTimeout("secret.subject"), 504, Code.DEADLINE_EXCEEDED),
    (natsync.DeadlineExceeded("secret.subject"), 504, Code.DEADLINE_EXCEEDED),
    (natsync.PoolTimeout("secret.subject"), 504, Code.DEADLINE_EXCEEDED),
    (natsync.NoRespondersError("secret.subject"), 503, Code.UNAVAILABLE),
    (natsync.StreamRefused("secret.subject"), 503, Code.RESOURCE_EXHAUSTED),
    (natsync.HandlerError("too many requests wait on secret.subject", code=429), 503, Code.RESOURCE_EXHAUSTED),
    (natsync.NoServersError({"secret.subject": OSError()}), 503, Code.UNAVAILABLE),
    (natsync.ConnectionLost("secret.subject"), 503, Code.UNAVAILABLE),
    (natsync.ServerLost("the link broke: secret.server"), 503, Code.UNAVAILABLE),
    (natsync.ConnectionClosed("secret.subject"), 503, Code.UNAVAILABLE),
    (natsync.ReconnectBufferFull("secret.subject"), 503, Code.UNAVAILABLE),
    (natsync.PermissionDenied("secret.subject"), 502, Code.INTERNAL),
    (natsync.AuthorizationError("secret.subject"), 502, Code.INTERNAL),
    (natsync.MaxPayloadExceeded(3, 2), 413, Code.INVALID_ARGUMENT),
    (natsync.InvalidArgument("secret.subject"), 500, Code.INTERNAL),
    (ValueError("secret.subject"), 500, Code.INTERNAL),
    (natsync.ForkError("secret.subject"), 500, Code.UNKNOWN),
]


@pytest.mark.parametrize(("error", "status", "code"), ERRORS, ids=lambda one: type(one).__name__)
def test_status_and_code_and_no_word_of_the_inside(error: BaseException, status: int, code: Code) -> None:
    assert http_status(error) == status
    told = error_data(error)
    assert (told["code"], told["error"]) == (code, code.name)
    assert "secret" not in json.dumps(told)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (Code.UNKNOWN, 500),
        (Code.INTERNAL, 500),
        (Code.NOT_FOUND, 404),
        (Code.PERMISSION_DENIED, 403),
        (Code.UNAUTHENTICATED, 401),
        (Code.INVALID_ARGUMENT, 400),
        (Code.RESOURCE_EXHAUSTED, 429),
        (Code.UNAVAILABLE, 503),
        (Code.DEADLINE_EXCEEDED, 504),
        (Code.CANCELLED, 503),
        (99, 500),
    ],
)
def test_a_handlers_error_says_its_own_words_and_what_its_code_says(code: int, status: int) -> None:
    error = natsync.HandlerError("no such model", code=code)
    assert http_status(error) == status
    assert error_data(error)["message"] == "no such model"


@pytest.mark.parametrize(
    ("code", "status", "name"),
    [
        (400, 400, "INVALID_ARGUMENT"),
        (401, 401, "UNAUTHENTICATED"),
        (403, 403, "PERMISSION_DENIED"),
        (404, 404, "NOT_FOUND"),
        (409, 409, "ALREADY_EXISTS"),
        (422, 422, "UNKNOWN"),
        (499, 499, "UNKNOWN"),
        (500, 500, "UNKNOWN"),
        (501, 501, "UNIMPLEMENTED"),
        (502, 502, "UNKNOWN"),
        (503, 503, "UNAVAILABLE"),
        (504, 504, "DEADLINE_EXCEEDED"),
        (200, 500, "UNKNOWN"),
        (302, 500, "UNKNOWN"),
        (505, 500, "UNKNOWN"),
    ],
)
def test_a_code_of_http_from_another_service_is_the_status(code: int, status: int, name: str) -> None:
    error = natsync.HandlerError("no such model", code=code)
    assert http_status(error) == status
    assert error_data(error) == {"code": natsync.Code[name], "error": name, "message": "no such model"}


def test_a_request_for_which_a_responder_had_no_room_is_told_as_a_refusal(nats_server: NatsServer) -> None:
    entered, leave = threading.Event(), threading.Event()
    subscriber = natsync.Subscriber(nats_server.url)

    @subscriber.handler("cf.full", max_workers=1, pending_messages=1)
    def full(ctx: natsync.HandlerContext, request: natsync.Message) -> None:
        entered.set()
        leave.wait(PATIENCE)

    with subscriber, natsync.Client(nats_server.url) as client:
        client.publish("cf.full", b"", reply="cf.nobody")
        assert entered.wait(PATIENCE)
        client.publish("cf.full", b"", reply="cf.nobody")  # waits
        with pytest.raises(natsync.HandlerError) as caught:
            client.request("cf.full", timeout=PATIENCE)
        leave.set()
    assert (http_status(caught.value), http_headers(caught.value)) == (503, {"Retry-After": "1"})
    assert error_data(caught.value)["message"] == "the service is busy; try again later"


@pytest.mark.parametrize(("retry_after", "header"), [(None, "1"), (0.2, "1"), (2.5, "3"), (30, "30")])
def test_a_refusal_says_when_to_come_back(retry_after: float | None, header: str) -> None:
    error = natsync.StreamRefused("all slots are taken", retry_after=retry_after)
    assert http_headers(error) == {"Retry-After": header}
    assert error_data(error).get("retry_after") == retry_after


def test_other_errors_have_no_retry_after() -> None:
    assert http_headers(natsync.NoRespondersError("x")) == {}
