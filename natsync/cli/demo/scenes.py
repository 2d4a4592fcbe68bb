"""What the demo shows, one function a scene; each prints what happens and checks what it claims."""

import json
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import natsync
from natsync.cli.demo import third_party, wire
from natsync.cli.demo.handlers import TICK, Journal
from natsync.cli.demo.log import CaughtLog
from natsync.cli.demo.screen import Screen
from natsync.cli.demo.third_party import ThirdParty
from natsync.testing import NatsServer

#: Seconds that no scene comes near; a hang becomes an error.
LIMIT = 10.0

#: Seconds within which a handler must have stopped. It takes about 1 ms; a busy machine may need more.
STOP_LIMIT = 5.0

#: Deadline of the scene that runs into it: time for the lines that come, and then some.
DEADLINE = 2.5


@dataclass
class Stage:
    """Everything that is running while the scenes play."""

    screen: Screen
    client: natsync.Client
    service: ThirdParty
    journal: Journal
    log: CaughtLog
    server: NatsServer


@dataclass
class Watched:
    """A stream as the client saw it: each piece with the seconds since it began, how it ended and when."""

    begin: float
    pieces: list[tuple[float, bytes]]
    error: natsync.NatsError | None
    seconds: float

    def texts(self) -> list[str]:
        return [data.decode() for _, data in self.pieces]

    @property
    def first(self) -> float:
        """When the first piece came; 0 if none did."""
        return self.pieces[0][0] if self.pieces else 0.0

    @property
    def last(self) -> float:
        return self.pieces[-1][0] if self.pieces else 0.0


def watch(
    stage: Stage, subject: str, payload: str, show: Callable[[float, str], None], timeout: float = LIMIT
) -> Watched:
    """Stream from the subject, showing each piece the moment it is there."""
    begin = time.monotonic()
    pieces: list[tuple[float, bytes]] = []
    error: natsync.NatsError | None = None
    try:
        with stage.client.stream(subject, payload, timeout=timeout) as stream:
            for chunk in stream:
                pieces.append((time.monotonic() - begin, chunk))
                show(pieces[-1][0], chunk.decode())
    except natsync.StreamError as failure:
        error = failure
    return Watched(begin, pieces, error, time.monotonic() - begin)


def lines(stage: Stage) -> None:
    screen = stage.screen
    screen.scene("A slow HTTP service, line by line")
    screen.step("client", 'asks demo.relay for "/lines" and iterates over the answer')
    screen.step("handler", "reads GET /lines with requests and yields each line")
    screen.step("third party", f"takes {stage.service.pace} s for each line")
    seen = watch(stage, "demo.relay", "/lines", lambda at, text: screen.piece(at, text, "relay"))
    expected = third_party.text_lines()
    screen.check(seen.error is None and seen.texts() == expected, f"{len(expected)} lines, equal to the file, in order")
    first, last = seen.first, seen.last
    screen.check(
        last - first > (len(expected) - 1) * stage.service.pace / 2,
        f"forwarded as they came: the first after {first:.2f} s, the last after {last:.2f} s",
    )


def together(stage: Stage) -> None:
    screen = stage.screen
    ticks = 6
    screen.scene("Two streams at once on one connection")
    screen.step("client", f'asks demo.relay for "/pieces" and demo.ticker for {ticks} ticks, from two threads')
    screen.step("handler", "of the ticker returns at once; a thread of its own does the sending")
    seen = _watch_both(stage, {"relay": "/pieces", "ticker": str(ticks)})
    relay, ticker = seen["relay"], seen["ticker"]
    pieces = third_party.json_pieces()
    screen.check(relay.error is None and relay.texts() == pieces, f"{len(pieces)} JSON pieces, equal to the file")
    numbers = [json.loads(text)["tick"] for text in ticker.texts()]
    screen.check(
        ticker.error is None and numbers == list(range(1, ticks + 1)),
        f"{ticks} ticks, in order, none missing",
    )
    screen.check(relay.first < ticker.last and ticker.first < relay.last, "neither stream waited for the other")
    handler_thread, returned = stage.journal.ticker_returned.get(timeout=LIMIT)
    sending_thread = stage.journal.ticker_sent.get(timeout=LIMIT)
    screen.check(
        returned < ticks * TICK and handler_thread != sending_thread,
        f"the ticker's handler returned after {_ms(returned)}; the thread {sending_thread} sent",
    )


def _watch_both(stage: Stage, payloads: dict[str, str]) -> dict[str, Watched]:
    """Stream from several subjects at once, each in a thread; the main thread shows what comes."""
    arrivals: queue.SimpleQueue[tuple[float, str, str] | None] = queue.SimpleQueue()
    seen: dict[str, Watched] = {}

    def consume(who: str, payload: str) -> None:
        try:
            seen[who] = watch(stage, f"demo.{who}", payload, lambda at, text: arrivals.put((at, text, who)))
        finally:
            arrivals.put(None)

    for who, payload in payloads.items():
        threading.Thread(target=consume, args=(who, payload), name=f"demo-client-{who}").start()
    for _ in payloads:
        while (arrival := arrivals.get(timeout=LIMIT + 1)) is not None:
            stage.screen.piece(*arrival)
    return seen


def failure(stage: Stage) -> None:
    screen = stage.screen
    screen.scene("The third party fails")
    screen.step("client", 'asks demo.relay for "/fails"')
    screen.step("third party", "answers 500; raise_for_status() raises in the handler")
    seen = watch(stage, "demo.relay", "/fails", lambda at, text: screen.piece(at, text, "relay"))
    if seen.error is not None:
        screen.error(seen.error, seen.seconds)
    screen.check("500 Server Error" in str(seen.error), "the client got it as a StreamError, with the text")
    record = stage.log.next_with_traceback(LIMIT)
    screen.check(record is not None, "the subscriber logged it, with the handler's traceback")
    again = watch(stage, "demo.ticker", "1", lambda at, text: screen.piece(at, text, "ticker"))
    screen.check(again.error is None and len(again.pieces) == 1, "the next request works")


def deadline(stage: Stage) -> None:
    screen = stage.screen
    screen.scene("The third party stalls: a timeout")
    screen.step("client", f'asks demo.relay for "/stalls", timeout={DEADLINE} s for the whole stream')
    screen.step("third party", f"sends {third_party.LINES_BEFORE_STALL} lines and then nothing")
    seen = watch(stage, "demo.relay", "/stalls", lambda at, text: screen.piece(at, text, "relay"), timeout=DEADLINE)
    expired = seen.begin + DEADLINE
    if seen.error is not None:
        screen.error(seen.error, seen.seconds)
    screen.check(
        isinstance(seen.error, natsync.DeadlineExceeded) and isinstance(seen.error, TimeoutError),
        "DeadlineExceeded, which is also a TimeoutError",
    )
    screen.check(
        len(seen.pieces) == third_party.LINES_BEFORE_STALL and DEADLINE <= seen.seconds < DEADLINE + STOP_LIMIT,
        f"after {seen.seconds:.2f} s, and not before; the lines that came were delivered",
    )
    _check_stopped(stage, expired, "the deadline")


def cancel(stage: Stage) -> None:
    screen = stage.screen
    screen.scene("The client has seen enough: a cancel")
    screen.step("client", 'asks demo.relay for "/stalls" and cancels while nothing comes')
    begin = time.monotonic()
    with stage.client.stream("demo.relay", "/stalls", timeout=LIMIT) as stream:
        for _ in range(third_party.LINES_BEFORE_STALL):
            chunk = stream.next(timeout=LIMIT)
            screen.piece(time.monotonic() - begin, chunk.decode(), "relay")
        try:
            stream.next(timeout=0.3)
            silent = False
        except natsync.TimedOut:
            silent = True
        screen.check(silent, "nothing for 0.3 s: the handler is blocked in its HTTP read")
        cancelled = time.monotonic()
        stream.cancel("seen enough")
    screen.step("client", f"cancelled at {cancelled - begin:.3f} s")
    _check_stopped(stage, cancelled, "the cancel")


def _check_stopped(stage: Stage, since: float, what: str) -> None:
    """Check that the relay's handler and the third party's connection ended, and show how soon."""
    handler = stage.journal.wait_for_relay("/stalls", LIMIT)
    service = stage.service.wait_for_reader_leaving(LIMIT)
    stage.screen.check(
        handler is not None and handler - since < STOP_LIMIT,
        "the handler never stopped"
        if handler is None
        else f"the handler had stopped {_ms(handler - since)} after {what}",
    )
    stage.screen.check(
        service is not None and service - since < STOP_LIMIT,
        "the HTTP service never saw its reader leave"
        if service is None
        else f"the HTTP service saw its connection closed {_ms(service - since)} after {what}",
    )


def plain_client(stage: Stage) -> None:
    screen = stage.screen
    screen.scene("A plain NATS client: nothing but a socket")
    screen.step("client", "sends three lines of the NATS protocol; any client of any language can")
    chunks = wire.read_stream(stage.server.url, "demo.ticker", "3", screen.wire)
    numbers = [json.loads(chunk)["tick"] for chunk in chunks]
    screen.check(numbers == [1, 2, 3], f"3 chunks as they were sent, then {wire.END.decode()}")


def _ms(seconds: float) -> str:
    # What both sides time for themselves may come a hair early on one of them.
    return f"{max(seconds, 0) * 1000:.1f} ms"


SCENES: tuple[Callable[[Stage], None], ...] = (lines, together, failure, deadline, cancel, plain_client)
