"""natsync.streaming.window: both ends of a stream over links that lose, double, reorder and break, at random.

A ledger beside them, kept from nothing but what they were given and what they said, knows what must hold at each step;
and once the links lose nothing any more, all that was given comes out once, in order, and nothing is kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natsync.streaming.frames import END_PAYLOAD, ERROR_PREFIX, Ack, Op, decode_batch
from natsync.streaming.terms import Offer
from natsync.streaming.window import GIVEN_BYTES, Frame, Incoming, Outgoing, Verdict

BLOCK = b"NATS/1.0\r\nA: %b\r\n\r\n" % (b"1" * 260)
#: Bytes that the least window allows in a fragment; the larger sizes lie around it and its multiples.
FRAGMENT = 1024
SMALL = (1, 0, 3, 100, 17, 700)
LARGE = (FRAGMENT, FRAGMENT - 1, FRAGMENT + 1, 2 * FRAGMENT, 3 * FRAGMENT + 1, 6 * FRAGMENT, 8193)
#: Each chunk is another piece of it, so that no two fragments are alike.
PATTERN = random.Random(0).randbytes(10_000)
PAYLOADS = (1 << 20, 2000, 100_000, FRAGMENT, 300)
#: What of the window in bytes the requester gives, in quarters. With much less than half of it, the largest fragment,
#: a quarter, would never get its credit.
QUARTERS = (4, 2, 3, 8)
#: What the responder may keep: little more than the largest chunk.
QUOTA_BYTES = 10_000

ENDS = {Op.END: Verdict.END, Op.ERROR: Verdict.ERROR}

windows = st.sampled_from([1, 2, 5, 16, 100, 1000])
windows_bytes = st.sampled_from([4 * FRAGMENT, 4 * FRAGMENT + 3, 10_000, 1 << 20])


class Ledger:
    """What was sent under each seq, and what follows from it. Item n of each list is of all up to seq n."""

    def __init__(self) -> None:
        self.frames: list[tuple[bytes, bytes | None, bytes]] = [(b"", None, b"")]
        self.offsets = [0]
        self.wholes = [0]  # chunks that are complete

    def enter(self, frame: Frame) -> None:
        """A frame as it is sent. A seq that was sent before must mean what it meant then."""
        op = Op.DATA if frame.op == Op.BATCH else frame.op
        payloads = decode_batch(frame.payload) if frame.op == Op.BATCH else [frame.payload]
        assert len(payloads) == frame.seqs
        for seq, payload in enumerate(payloads, frame.seq):
            one = (op, frame.block, payload)
            if seq == len(self.frames):
                self.frames.append(one)
                self.offsets.append(self.offsets[-1] + (0 if op in ENDS else len(payload)))
                self.wholes.append(self.wholes[-1] + (op == Op.DATA))
            assert self.frames[seq] == one

    def fragments(self, seq: int) -> int:
        """How many of the frames up to seq are fragments that others follow."""
        return sum(op == Op.FRAGMENT for op, _, _ in self.frames[: seq + 1])


class Simulation:
    """One stream: its two ends, what is under way between them, and what must hold."""

    def __init__(self, window: int, window_bytes: int, batches: bool, max_payload: int) -> None:
        self.window, self.window_bytes, self.portion_bytes = window, window_bytes, window_bytes
        self.batches, self.max_payload = batches, max_payload
        self.out = Outgoing(Offer(window, window_bytes, 10.0, 5.0, batches), max_payload, QUOTA_BYTES)
        self.into = Incoming(window, window_bytes, 1 << 20)
        self.frames: list[Frame] = []  # under way
        self.accounts: list[Ack] = []
        self.ledger = Ledger()
        self.given: list[bytes] = []
        self.given_frames = self.given_bytes = 0
        self.heard = self.told = Ack(0, window, window_bytes)  # the limits that the one knows, and the other gave
        self.taken: list[bytes] = []
        self.taken_bytes = 0
        self.consumed = self.consumed_bytes = 0
        self.reported = -1
        self.ends = 0

    # -- the responder -----------------------------------------------------------------------------------------------

    def give(self, size: int, block: bytes | None = None) -> bool:
        """Give a chunk of this size if it is taken; whether it was."""
        out = self.out
        if out.ended or (block is not None and len(block) >= out.fragment_bytes):
            return False
        chunk = PATTERN[len(self.given) % 1000 :][:size]
        assert out.takes(size) == self.may_take(size)
        if not out.takes(size):
            return False
        out.push(chunk, block)
        out.allow(True)  # from the first one on
        room = out.fragment_bytes - len(block or b"")
        self.given.append(chunk)
        self.given_frames += 1 + max(0, -(-(size - room) // out.fragment_bytes))
        self.given_bytes += size
        assert out.last == self.given_frames
        return True

    def give_several(self, number: int) -> None:
        for one in range(number, 2 * number + 1):
            self.give(SMALL[one % len(SMALL)])

    def give_without_lock(self, number: int) -> None:
        """As ResponseSender.send() does. Nothing else is looked at, or changed, until something takes it in."""
        out = self.out
        for one in range(number + 1):
            size = (*SMALL, GIVEN_BYTES)[one % (len(SMALL) + 1)]
            if out.number >= out.limit or out.number_bytes + size > out.limit_bytes:
                return
            assert self.may_take(size)
            self.given.append(PATTERN[len(self.given) % 1000 :][:size])
            out.number, out.number_bytes = out.number + 1, out.number_bytes + size
            out.given.append(self.given[-1])
            self.given_frames += 1
            self.given_bytes += size
            assert (out.number, out.number_bytes) == (len(self.given), self.given_bytes)

    def give_large(self, number: int) -> None:
        self.give(LARGE[number % len(LARGE)])

    def give_with_headers(self, number: int) -> None:
        self.give((*SMALL, *LARGE)[number], BLOCK)

    def may_take(self, size: int) -> bool:
        kept_bytes = self.given_bytes - self.ledger.offsets[self.out.acked]
        return (
            (not kept_bytes or kept_bytes + size <= QUOTA_BYTES)
            and self.given_frames < self.heard.limit
            and self.given_bytes + min(size, self.out.fragment_bytes) <= self.heard.limit_bytes
        )

    def end(self, number: int) -> None:
        if not self.out.ended:
            op, block, payload = ((Op.END, None, END_PAYLOAD), (Op.ERROR, BLOCK, ERROR_PREFIX))[number % 2]
            self.out.allow(False)
            self.out.push_end(op, block, payload)
            self.given_frames += 1

    def send(self, number: int) -> None:
        for _ in range(number + 1):
            begin = self.out.sent + 1
            frame = self.out.next()
            if frame is None:
                return
            last = frame.seq + frame.seqs - 1
            assert (frame.seq, last) == (begin, self.out.sent)
            assert frame.seqs == 1 or (frame.op == Op.BATCH and self.batches)
            assert len(frame.block or b"") + len(frame.payload) <= self.max_payload
            self.ledger.enter(frame)
            if frame.op not in ENDS:
                assert last <= self.heard.limit
                assert self.ledger.offsets[last] <= self.heard.limit_bytes
            self.frames.append(frame)

    def probe(self, _: int = 0) -> None:
        self.frames.append(Frame(Op.PROBE, self.out.sent, None, b"", 0))

    def hear(self, ack: Ack) -> None:
        """An account arrives."""
        out, heard, was_sent = self.out, self.heard, self.out.sent
        news = ack.received > out.acked or ack.limit > heard.limit or ack.limit_bytes > heard.limit_bytes
        acked = max(out.acked, ack.received)
        assert out.acknowledge(ack) == news
        assert out.acked == acked
        assert out.sent == (acked if ack.missing else max(acked, was_sent))
        self.heard = Ack(acked, max(heard.limit, ack.limit), max(heard.limit_bytes, ack.limit_bytes))

    # -- the requester -----------------------------------------------------------------------------------------------

    def take(self, frame: Frame) -> None:
        """A frame arrives, and is answered as need be."""
        into, before = self.into, self.into.received
        if frame.op == Op.PROBE:
            self.account(missing=frame.seq > before)
            return
        chunks: list[bytes] = []
        verdict = into.take(frame.op, frame.seq, frame.payload, chunks)
        last = frame.seq + frame.seqs - 1
        if frame.seq > before + 1:
            assert verdict is Verdict.GAP
        elif last <= before:
            assert verdict is Verdict.AGAIN
        else:
            assert verdict is ENDS.get(frame.op, Verdict.TAKEN)
        assert into.received == (before if verdict in (Verdict.GAP, Verdict.AGAIN) else last)
        assert chunks == self.given[len(self.taken) :][: len(chunks)]
        self.taken += chunks
        self.taken_bytes += sum(map(len, chunks))
        assert len(self.taken) == self.ledger.wholes[into.received]
        if verdict in ENDS.values():
            self.ends += 1
            assert self.taken == self.given
        if verdict in ENDS.values() or into.is_due(self.portion_bytes):
            self.account()
        elif verdict is Verdict.GAP and self.reported != into.received:
            self.reported = into.received
            self.account(missing=True)

    def consume(self, number: int) -> None:
        chunks = self.taken[self.consumed :][: number + 1]
        for chunk in chunks:
            self.into.consume(1, len(chunk))
        self.consumed += len(chunks)
        self.consumed_bytes += sum(map(len, chunks))
        if self.into.is_due(self.portion_bytes):
            self.account()

    def account(self, missing: bool = False) -> None:
        credited = self.consumed + self.ledger.fragments(self.into.received)
        limit = max(self.told.limit, credited + self.window)
        limit_bytes = max(self.told.limit_bytes, self.freed_bytes() + self.portion_bytes)
        self.told = self.into.account(self.portion_bytes, missing=missing)
        assert self.told == Ack(self.into.received, limit, limit_bytes, missing)
        self.accounts.append(self.told)

    def freed_bytes(self) -> int:
        """What came and holds no place: what was consumed, and fragments of a chunk that is still to be complete."""
        return self.consumed_bytes + self.ledger.offsets[self.into.received] - self.taken_bytes

    def change_portion(self, number: int) -> None:
        self.portion_bytes = self.window_bytes * QUARTERS[number % len(QUARTERS)] // 4

    # -- the links ---------------------------------------------------------------------------------------------------

    def deliver_frames(self, number: int) -> None:
        """Several arrive as they were sent."""
        for _ in range(min(number + 1, len(self.frames))):
            self.take(self.frames.pop(0))

    def overtake_frames(self, number: int) -> None:
        if self.frames:
            self.take(self.frames.pop(number % len(self.frames)))

    def double_frame(self, number: int) -> None:
        if self.frames:
            self.take(self.frames[number % len(self.frames)])

    def lose_frame(self, number: int) -> None:
        if self.frames:
            self.frames.pop(number % len(self.frames))

    def deliver_accounts(self, number: int) -> None:
        for _ in range(min(number + 1, len(self.accounts))):
            self.hear(self.accounts.pop(0))

    def overtake_accounts(self, number: int) -> None:
        if self.accounts:
            self.hear(self.accounts.pop(number % len(self.accounts)))

    def double_account(self, number: int) -> None:
        if self.accounts:
            self.hear(self.accounts[number % len(self.accounts)])

    def lose_account(self, number: int) -> None:
        if self.accounts:
            self.accounts.pop(number % len(self.accounts))

    def cut(self, number: int) -> None:
        """All that is under way vanishes. The next server may take less in a message."""
        self.frames.clear()
        self.accounts.clear()
        max_payload = PAYLOADS[number % len(PAYLOADS)]
        if self.out.adapt(max_payload):
            self.max_payload = max_payload
        else:  # the stream would fail; here it goes back to the server before
            self.out.adapt(self.max_payload)

    def cut_and_rewind(self, number: int) -> None:
        self.cut(number)
        self.out.rewind()

    def cut_and_ask(self, number: int) -> None:
        self.cut(number)
        self.account(missing=True)

    # -- what must hold ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        out, into, ledger = self.out, self.into, self.ledger
        given = len(out.given)
        assert out.acked <= out.sent <= out.highest <= out.last == self.given_frames - given
        assert out.acked <= into.received <= out.highest == len(ledger.frames) - 1
        assert out.kept_bytes + sum(map(len, out.given)) == self.given_bytes - ledger.offsets[out.acked]
        if not given:  # which this would take in
            assert out.blocked == (out.sent < out.last)
        assert into.granted_bytes == self.told.limit_bytes - self.freed_bytes()
        assert self.taken_bytes - self.consumed_bytes <= into.granted_bytes
        assert self.ends == (out.ended and into.received == out.last)

    def finish(self) -> None:
        """From now on the links lose nothing, the requester consumes, and probes go: all must come to its end."""
        more = [3 * FRAGMENT, 6 * FRAGMENT, 0, 1]
        rounds = 20 + 2 * (self.given_frames + 40)
        while self.out.acked < self.out.last or not self.out.ended:
            rounds -= 1
            assert rounds, "the stream has come to a standstill"
            while more and self.give(more[0]):
                del more[0]
            if not more:
                self.end(0)
            self.send(self.given_frames)
            self.probe()
            while self.frames:
                self.deliver_frames(0)
                self.consume(len(self.given))
            self.deliver_accounts(len(self.accounts))
            self.check()
        assert self.ends == 1
        assert self.taken == self.given
        assert self.out.next() is None
        assert (self.out.acked, self.out.kept_bytes) == (self.out.last, 0)


#: What may happen, each with a number that says which one, or how many; and how often it does.
STEPS: dict[str, tuple[Callable[[Simulation, int], object], float]] = {
    "nothing": (lambda simulation, _: simulation.check(), 0),
    "give several chunks": (Simulation.give_several, 20),
    "give chunks without the lock": (Simulation.give_without_lock, 20),
    "give a large chunk": (Simulation.give_large, 5),
    "give a chunk with headers": (Simulation.give_with_headers, 1),
    "send": (Simulation.send, 20),
    "deliver frames": (Simulation.deliver_frames, 20),
    "deliver a frame before others": (Simulation.overtake_frames, 2),
    "deliver a frame that comes again": (Simulation.double_frame, 4),
    "lose a frame": (Simulation.lose_frame, 2),
    "deliver accounts": (Simulation.deliver_accounts, 12),
    "deliver an account before others": (Simulation.overtake_accounts, 3),
    "deliver an account that comes again": (Simulation.double_account, 3),
    "lose an account": (Simulation.lose_account, 2),
    "consume": (Simulation.consume, 12),
    "account": (lambda simulation, _: simulation.account(), 2),
    "ask for what is missing": (lambda simulation, _: simulation.account(missing=True), 1),
    "probe": (Simulation.probe, 4),
    "another portion": (Simulation.change_portion, 1),
    "cut, then rewind": (Simulation.cut_and_rewind, 1),
    "cut, then ask": (Simulation.cut_and_ask, 1),
    "end": (Simulation.end, 0.2),
}

setups = st.builds(Simulation, windows, windows_bytes, st.booleans(), st.sampled_from(PAYLOADS))
#: A machine that is busy with other things may make the drawing slow.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@settings(patient, max_examples=60)
@given(setups, st.lists(st.tuples(st.sampled_from(list(STEPS)), st.integers(0, 11)), min_size=30, max_size=120))
def test_whatever_happens_chunks_come_out_once_and_in_order(
    simulation: Simulation, steps: list[tuple[str, int]]
) -> None:
    for name, number in steps:
        STEPS[name][0](simulation, number)
        simulation.check()
    simulation.finish()


@settings(patient, max_examples=120)
@given(setups, st.integers(0, 1 << 32))
def test_after_a_long_time_of_it_too(simulation: Simulation, seed: int) -> None:
    dice = random.Random(seed)
    steps, weights = zip(*STEPS.values(), strict=True)
    for step in dice.choices(steps, weights, k=400):
        step(simulation, dice.randrange(12))
        simulation.check()
    simulation.finish()


@pytest.mark.parametrize("name", STEPS)
def test_any_step_may_be_the_first_and_the_only_one(name: str) -> None:
    simulation = Simulation(5, 4 * FRAGMENT, True, 1 << 20)
    STEPS[name][0](simulation, 0)
    simulation.check()
    simulation.finish()
