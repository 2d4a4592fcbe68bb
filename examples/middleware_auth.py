"""Middleware that signs what is asked, and refuses what is not signed before a handler sees it.

    natsync server &                  # or any nats-server
    python examples/middleware_auth.py

Both sides share a key (SIGNING_KEY). The signature covers the subject, the caller's name and the payload; it does not
keep a recorded request from being sent again. What the responder found out is in a context variable for the handler.
"""

import contextlib
import hashlib
import hmac
import os
from contextvars import ContextVar

import natsync

KEY = os.environ.get("SIGNING_KEY", "a key for trying this out").encode()

caller = ContextVar("caller")


def signature(subject, name, data):
    text = b"\0".join((subject.encode(), name.encode(), data))
    return hmac.new(KEY, text, hashlib.sha256).hexdigest()


class Sign(natsync.Middleware):
    """For requesters: says who asks, and signs it."""

    def __init__(self, name):
        self.name = name

    def send(self, passage, data):
        if passage.side == "requester":
            passage.headers["Caller"] = self.name
            passage.headers["Signature"] = signature(passage.destination, self.name, data)
        return data


class Verify(natsync.Middleware):
    """For responders: refuses what is not signed."""

    def receive(self, passage, data):
        if passage.side == "responder":
            expected = signature(passage.destination, passage.headers.get("Caller", ""), data)
            if not hmac.compare_digest(expected, passage.headers.get("Signature", "")):
                raise natsync.HandlerError("the signature is missing or wrong", code=natsync.Code.UNAUTHENTICATED)
        return data

    @contextlib.contextmanager
    def around(self, passage):
        token = caller.set(passage.headers["Caller"])
        try:
            yield
        finally:
            caller.reset(token)


subscriber = natsync.Subscriber(middleware=[Verify()])


@subscriber.handler("greet", queue="greeters")
def greet(ctx, request):
    return f"{caller.get()} says {request.text()}"


@subscriber.stream("count", queue="greeters")
def count(ctx, request):
    for number in range(int(request.data)):
        yield f"{number} for {caller.get()}"


def main():
    with subscriber, natsync.Client(middleware=[Sign("alice")]) as alice, natsync.Client() as stranger:
        print(alice.request("greet", "hello", timeout=5).text())
        print([chunk.decode() for chunk in alice.stream("count", "2", timeout=5)])
        for name, ask in (
            ("request", lambda: stranger.request("greet", "hello", timeout=5)),
            ("stream", lambda: list(stranger.stream("count", "2", timeout=5))),
        ):
            try:
                ask()
            except natsync.HandlerError as error:
                print(f"a stranger's {name}: {error} ({natsync.Code(error.code).name})")


if __name__ == "__main__":
    main()
