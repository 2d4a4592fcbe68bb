"""A pipe that tells a child process that its parent is gone, however that went."""

from __future__ import annotations

import os
import signal
import threading


def follow(descriptor: int) -> None:
    """Have this process get SIGTERM when no process holds the other end of the pipe any more. Does not wait."""

    def watch() -> None:
        os.read(descriptor, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="natsync-lifeline", daemon=True).start()
