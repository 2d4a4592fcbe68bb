"""Whether the client of a WSGI request is still there: a look at its socket, where the server exposes it.

A WSGI server learns that a client has left only from a write that fails. Who waits for the next chunk can look
meanwhile: a look takes a few microseconds, waits for nothing and reads nothing.
"""

from __future__ import annotations

import _socket  # the plain socket: gevent's and ssl's own recv() wait, or do not take flags
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

#: Seconds between two looks while there is nothing to send.
LOOK_SECONDS = 0.5

#: Called without arguments: whether the client has gone.
Gone = Callable[[], bool]

#: Where servers put the client's socket into the environ: Werkzeug's development server, gunicorn (every worker).
SOCKET_KEYS = ("werkzeug.socket", "gunicorn.socket")
#: In the environ of uWSGI, whose module `uwsgi` tells the client's descriptor in the thread that runs the request.
UWSGI_KEY = "uwsgi.version"
#: waitress's own function; it knows of a client that left only with channel_request_lookahead from 1 up.
WAITRESS_KEY = "waitress.client_disconnected"

_NOW = getattr(socket, "MSG_DONTWAIT", 0)
#: Makes the object non-blocking without a word to the kernel: the server's own flags stay as they are.
_NONBLOCKING = getattr(socket, "SOCK_NONBLOCK", 0)


def client_gone(environ: Mapping[str, Any]) -> Gone | None:
    """How to see whether the client of this request has gone; None where the server offers no way.

    Best effort: False may mean that it is not known (a proxy in between, TLS, bytes that the client has sent ahead).
    A client that has shut down its sending side alone counts as gone; browsers and HTTP libraries do not do that.
    The function may be called from any thread, under gevent too, until the response is over.
    """
    function = environ.get(WAITRESS_KEY)
    if callable(function):
        return lambda: bool(function())
    if not (_NOW and _NONBLOCKING):
        return None  # this system cannot look without waiting
    connection = next((environ[key] for key in SOCKET_KEYS if hasattr(environ.get(key), "fileno")), None)
    if connection is not None:
        return lambda: _ended(connection.fileno())
    if UWSGI_KEY in environ and "uwsgi" in sys.modules:
        descriptor = sys.modules["uwsgi"].connection_fd()
        return lambda: _ended(descriptor)
    return None


def _ended(descriptor: int) -> bool:
    """Whether the peer of a stream socket has closed or reset it, or it is closed here."""
    if descriptor < 0:
        return True
    # Of whatever family it is: that does not matter to recv().
    look = _socket.socket(socket.AF_INET, socket.SOCK_STREAM | _NONBLOCKING, 0, descriptor)
    try:
        return look.recv(1, socket.MSG_PEEK | _NOW) == b""
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True
    finally:
        look.detach()  # the descriptor is the server's
