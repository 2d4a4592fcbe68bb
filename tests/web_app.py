"""The Flask application that tests run under real servers; it tells of itself over NATS and at /stats."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import flask

import natsync
from natsync.contrib.flask import NatSync, sse_response
from natsync.contrib.sse import EventBody

app = flask.Flask(__name__)
nats = NatSync(app)
pool = natsync.ConnectionPool(min_size=0, max_size=8, timeout=30)


class Told:
    """A body that says over NATS when the server asks for more, and when it closes it."""

    def __init__(self, body: EventBody, subject: str) -> None:
        self._body = body
        self._client = nats.client
        self._subject = subject

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        data = next(self._body)
        self._client.publish(self._subject, b"pulled")
        return data

    def close(self) -> None:
        self._body.close()
        self._client.publish(self._subject, b"closed")


@app.get("/told/<name>")
def told(name: str) -> flask.Response:
    """Chunks without heartbeat or look, so that only a failed write tells that the browser has left."""
    body = EventBody(nats.client.stream("web.given"), heartbeat=None)
    return app.response_class(Told(body, f"web.told.{name}"), mimetype="text/event-stream")


@app.get("/events/<subject>")
def events(subject: str) -> flask.Response:
    look = flask.request.args.get("look", "yes") == "yes"
    return sse_response(nats.stream(subject), heartbeat=float(flask.request.args.get("heartbeat", 15)), look=look)


@app.get("/leased/<subject>")
def leased(subject: str) -> flask.Response:
    """The same over a connection that the pool lends for as long as the stream lasts."""
    return sse_response(pool.stream(subject), heartbeat=1)


@app.get("/ping")
def ping() -> str:
    return nats.client.request("web.echo", "pong").text()


@app.get("/stats")
def stats() -> dict[str, object]:
    """What the process holds now."""
    gc.collect()
    memory = Path("/proc/self/status").read_text()
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "sockets": sum(1 for fd in Path("/proc/self/fd").iterdir() if _is_socket(fd)),
        "streams": nats.client.stats().get("waiting_replies", 0),
        "leased": pool.stats()["leased"],
        "rss_kib": int(memory.partition("VmRSS:")[2].split()[0]),
        "os_threads": int(memory.partition("Threads:")[2].split()[0]),
        "pid": os.getpid(),
    }


def _is_socket(descriptor: Path) -> bool:
    try:
        return os.readlink(descriptor).startswith("socket:")
    except OSError:
        return False
