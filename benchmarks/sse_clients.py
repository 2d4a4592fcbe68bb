"""Many browsers at once on one gunicorn: does each get its whole stream, and what do its workers hold meanwhile?

    python benchmarks/sse_clients.py --clients 500 --worker-class gthread
    python benchmarks/sse_clients.py --clients 500 --worker-class gevent

Runs a nats-server, a responder, gunicorn with examples/flask_sse.py and all clients on this machine. All streams are
open at the same time before the first one ends. Needs natsync[flask,server] and gunicorn (and gevent). Linux only:
memory and threads are read from /proc. Ends by itself: after --limit seconds with status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import natsync
from natsync.testing import NatsServer

ROOT = Path(__file__).resolve().parent.parent
EVENTS = 10
END = b"event: end\ndata: \n\n"
#: What each client has to get: flask_sse.py's events for it.
EXPECTED = b": stream\n\n" + b"".join(b"data: %d\n\n" % number for number in range(EVENTS)) + END


def respond(subscriber: natsync.Subscriber, clients: int) -> None:
    """Send EVENTS chunks on each stream, the first at once and the others when all are there."""
    senders: list[natsync.ResponseSender] = []
    lock = threading.Lock()

    def go_on() -> None:
        for number in range(1, EVENTS):
            for sender in senders:
                sender.send(b"%d" % number)
        for sender in senders:
            sender.end()

    @subscriber.stream("words.upper", max_streams=clients)
    def handler(ctx: natsync.Context, request: natsync.Message, sender: natsync.ResponseSender) -> None:
        sender.send(b"0")
        with lock:
            senders.append(sender)
            if len(senders) == clients:
                threading.Thread(target=go_on).start()


def held(master: int) -> dict[str, int]:
    """What gunicorn's workers hold together."""
    workers = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    status = [Path(f"/proc/{worker}/status").read_text() for worker in workers]
    return {
        "rss_mib": sum(int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) for text in status) // 1024,
        "threads": sum(int(re.findall(r"Threads:\s+(\d+)", text)[0]) for text in status),
    }


def read_all(port: int, clients: int, limit: float, master: int) -> dict[str, object]:
    """Open all streams and read them to their end; what was seen."""
    begin = time.monotonic()
    bodies: dict[socket.socket, bytes] = {}
    first: list[float] = []
    peak: dict[str, int] = {}
    complete = 0
    with selectors.DefaultSelector() as selector:
        for number in range(clients):
            browser = socket.create_connection(("127.0.0.1", port), timeout=limit)
            browser.sendall(b"GET /upper?text=%d HTTP/1.0\r\nHost: here\r\n\r\n" % number)
            bodies[browser] = b""
            selector.register(browser, selectors.EVENT_READ)
        while selector.get_map() and time.monotonic() - begin < limit:
            for key, _ in selector.select(0.5):
                browser = key.fileobj
                assert isinstance(browser, socket.socket)
                received = browser.recv(65536)
                if not bodies[browser] and received:
                    first.append(time.monotonic() - begin)
                    if len(first) == clients:
                        peak = held(master)
                bodies[browser] += received
                if not received:
                    selector.unregister(browser)
                    browser.close()
                    complete += bodies[browser].partition(b"\r\n\r\n")[2] == EXPECTED
    for browser in bodies:
        browser.close()
    return {
        "clients": clients,
        "complete": complete,
        "last_first_byte_s": round(max(first, default=0.0), 2),
        "seconds": round(time.monotonic() - begin, 2),
        "all_open": peak,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--worker-class", choices=["gthread", "gevent"], default="gthread")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=60, help="seconds after which it gives up")
    chosen = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)  # gunicorn's; a port let go may be another's
    port, number = listener.getsockname()[1], listener.fileno()
    command = [sys.executable, "-m", "gunicorn", "--bind", f"fd://{number}", "--worker-class", chosen.worker_class]
    # Each worker may get all of them: which one accepts is the kernel's choice.
    command += ["--workers", str(chosen.workers), "--threads", str(chosen.clients), "--backlog", "2048"]
    command += ["--worker-connections", str(2 * chosen.clients), "--log-level", "warning", "flask_sse:app"]
    with NatsServer() as server, natsync.Subscriber(server.url) as subscriber, tempfile.TemporaryDirectory() as scratch:
        respond(subscriber, chosen.clients)
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "NATS_URL": server.url, "PYTHONPATH": paths, "XDG_RUNTIME_DIR": scratch}
        with listener:
            gunicorn = subprocess.Popen(command, cwd=ROOT / "examples", env=env, pass_fds=[number])
        try:
            wait_for_port(port, chosen.limit)
            report = read_all(port, chosen.clients, chosen.limit, gunicorn.pid)
        finally:
            gunicorn.terminate()
            gunicorn.wait(60)
    print(json.dumps({"worker_class": chosen.worker_class, "workers": chosen.workers, **report}))
    return int(report["complete"] != chosen.clients)


def wait_for_port(port: int, limit: float) -> None:
    deadline = time.monotonic() + limit
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port)) as probe:
                probe.sendall(b"HEAD /nothing HTTP/1.0\r\n\r\n")
                if probe.recv(1):
                    return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
