"""The process's client: made from settings at its first use, one for all threads."""

from __future__ import annotations

import threading
from typing import Any, cast

import natsync
from natsync.concurrency import after_fork_in_child
from natsync.contrib.django.conf import configured
from natsync.options import Options, Unpack

_lock = threading.Lock()
_client: natsync.Client | None = None


def get_client() -> natsync.Client:
    """The natsync.Client of this process, made from NATSYNC at the first call.

    Opens nothing: the client connects at its first use, in a forked child anew. It is not to be closed after a request.

    Raises:
        ImproperlyConfigured: the setting cannot be used.
    """
    global _client
    found = _client
    if found is None:
        with _lock:
            found = _client
            if found is None:
                found = _client = make_client()
    return found


def make_client(**options: Unpack[Options]) -> natsync.Client:
    """A client of one's own with the options of NATSYNC, and these instead of them; the caller closes it."""
    config = configured()
    return natsync.Client(config.servers, **{**config.options, **options})


def close_client(timeout: float = 2.0) -> None:
    """Flush and close the process's client, if there is one; the next use makes another.

    Blocks up to timeout seconds. Tests and scripts may want it; a process that ends does the same by itself.
    """
    global _client
    with _lock:
        found, _client = _client, None
    if found is not None:
        found.close(timeout)


class _Current:
    """Stands for get_client(), so that a module may import it before the settings are complete, or change."""

    def __getattr__(self, name: str) -> Any:
        return getattr(get_client(), name)

    def __repr__(self) -> str:
        return f"<the process's client: {_client!r}>"


#: get_client(), as an object that can be imported: client.request(…), client.stream(…).
client = cast(natsync.Client, _Current())


def _renew_in_child() -> None:
    """In a forked child: another thread of the parent may have held the lock at the fork."""
    global _lock
    _lock = threading.Lock()


after_fork_in_child(_renew_in_child)
