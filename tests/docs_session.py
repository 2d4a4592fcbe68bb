"""A program that runs the Python blocks of one page in one namespace, as they come, a line of JSON each, on stdin.

It answers each with a line of JSON: what it printed, and the traceback if it raised. A block that serves for ever is
run in a thread; the answer comes when its handlers are live.
"""

from __future__ import annotations

import contextlib
import io
import json
import linecache
import sys
import threading
import traceback
from typing import Any

import natsync
from natsync.testing import eventually

PATIENCE = 20.0


class Session:
    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.serving: list[tuple[threading.Thread, list[str]]] = []

    def of(self, *kinds: type) -> list[Any]:
        return [value for value in self.namespace.values() if isinstance(value, kinds)]

    def run(self, page: str, code: str) -> str | None:
        """Run a block; its traceback if it raises."""
        linecache.cache[page] = (len(code), None, code.splitlines(keepends=True), page)
        try:
            exec(compile(code, page, "exec"), self.namespace)
        except BaseException:
            return traceback.format_exc()
        return None

    def serve(self, page: str, code: str) -> str | None:
        faults: list[str] = []
        thread = threading.Thread(target=lambda: faults.extend(filter(None, [self.run(page, code)])), daemon=True)
        thread.start()
        self.serving.append((thread, faults))
        live = lambda: any(one.status == "connected" and one.handles for one in self.of(natsync.Subscriber))  # noqa: E731
        try:
            eventually(lambda: faults or live(), PATIENCE, "no handler is live")
        except AssertionError as error:
            return str(error)
        return faults[0] if faults else None

    def end(self) -> str | None:
        """Close what the blocks have left open."""
        for subscriber in self.of(natsync.Subscriber):
            subscriber.stop()
            subscriber.close(2)
        for thread, _ in self.serving:
            thread.join(PATIENCE)
        for one in self.of(natsync.Client, natsync.ConnectionPool):
            one.close()
        faults = [fault for _, found in self.serving for fault in found]
        return "\n".join(faults) or None


def main() -> None:
    session = Session()
    answers = sys.stdout
    for line in sys.stdin:
        order = json.loads(line)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if order is None:
                fault = session.end()
            elif "serve_forever(" in order["code"]:
                fault = session.serve(order["page"], order["code"])
            else:
                fault = session.run(order["page"], order["code"])
        print(json.dumps({"printed": printed.getvalue(), "fault": fault}), file=answers, flush=True)


if __name__ == "__main__":
    main()
