"""The third party of the demo: an HTTP service that takes its time, on a free port of the loopback interface.

    GET /lines    a text file, line by line
    GET /pieces   the elements of a JSON file, one a line
    GET /stalls   two lines of the text, and then nothing for as long as the reader stays
    GET /fails    500

It knows nothing of natsync or NATS.
"""

import json
import queue
import select
import socket
import threading
import time
from collections.abc import Iterator
from importlib import resources
from types import TracebackType
from typing import Any

from flask import Flask, Response, request
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler, make_server

#: Seconds between two lines: slow enough to be seen, fast enough not to bore.
PACE = 0.15

#: Lines that /stalls sends before it falls silent.
LINES_BEFORE_STALL = 2


class ThirdParty:
    """The service, from `with` to the end of its block; the block's end waits for its threads."""

    def __init__(self, pace: float = PACE) -> None:
        self.pace = pace
        self._reader_left: queue.SimpleQueue[float] = queue.SimpleQueue()
        self._stopping, self._stop = socket.socketpair()
        server = make_server("127.0.0.1", 0, _application(self), threaded=True, request_handler=_Quiet)
        assert isinstance(server, ThreadedWSGIServer)
        server.daemon_threads = False  # so that server_close() waits for the threads of requests
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="demo-http")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "ThirdParty":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.close()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._stopping.close()

    def slowly(self, lines: list[str]) -> Iterator[bytes]:
        """The lines, each after a pause."""
        for line in lines:
            time.sleep(self.pace)
            yield line.encode() + b"\n"

    def hold_until_reader_leaves(self, connection: socket.socket) -> None:
        """Block while the reader stays; notes when it has gone."""
        # A reader sends nothing after its request, so its socket becomes readable only by its end.
        ready, _, _ = select.select([connection, self._stopping], [], [])
        if connection in ready:
            self._reader_left.put(time.monotonic())

    def wait_for_reader_leaving(self, timeout: float) -> float | None:
        """time.monotonic() at which the next reader of /stalls was seen to go; None if none goes in time."""
        try:
            return self._reader_left.get(timeout=timeout)
        except queue.Empty:
            return None


def text_lines() -> list[str]:
    """The lines of the text file."""
    return _data("harbour.txt").splitlines()


def json_pieces() -> list[str]:
    """The elements of the JSON file, each as a line of JSON."""
    return [json.dumps(piece) for piece in json.loads(_data("forecast.json"))]


def _data(name: str) -> str:
    return resources.files("natsync.cli").joinpath(f"data/{name}").read_text("utf-8")


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"  # chunked: the reader gets each line when it is sent

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


def _application(service: ThirdParty) -> Flask:
    app = Flask("third party")

    @app.get("/lines")
    def lines() -> Response:
        return Response(service.slowly(text_lines()), mimetype="text/plain")

    @app.get("/pieces")
    def pieces() -> Response:
        return Response(service.slowly(json_pieces()), mimetype="application/x-ndjson")

    @app.get("/stalls")
    def stalls() -> Response:
        connection: socket.socket = request.environ["werkzeug.socket"]

        def body() -> Iterator[bytes]:
            yield from service.slowly(text_lines()[:LINES_BEFORE_STALL])
            service.hold_until_reader_leaves(connection)

        return Response(body(), mimetype="text/plain")

    @app.get("/fails")
    def fails() -> Response:
        return Response("the harbour office is closed\n", status=500, mimetype="text/plain")

    return app
