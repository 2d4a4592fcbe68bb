"""A slow third party: a real HTTP service that sends lines as they come, chunked, or hangs in mid-answer."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ThirdParty:
    """An HTTP service on a free loopback port, for the length of a `with` block.

    GET /lines/<n> sends n lines, `pause` seconds apart; GET /hang sends one line and then nothing, until `released` is
    set; anything else is a 500. Nothing is buffered.
    """

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause
        self.released = threading.Event()
        self.hanging = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> ThirdParty:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler_of(party: ThirdParty) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _, what, *rest = self.path.split("/")
            if what not in ("lines", "hang"):
                self.send_error(500)
                return
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                self._lines(int(rest[0]) if rest else 1)
                if what == "hang":
                    party.hanging.set()
                    party.released.wait()
                self.wfile.write(b"0\r\n\r\n")
            except OSError:
                self.close_connection = True

        def _lines(self, count: int) -> None:
            for n in range(count):
                line = b'{"piece": %d}\n' % n
                self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
                party.released.wait(party.pause)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing on stderr."""

    return Handler
