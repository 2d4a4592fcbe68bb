"""Framed mode at the requester: frames put in order, credit given as chunks are consumed, losses asked for again.

It is bound to the first responder that answers, and turns others away. Frames are taken on the reader's thread, which
never waits; credit is given by the consumer's; questions that nobody answered are repeated by the timer's.
"""

from __future__ import annotations

import itertools
import threading
import time

from natsync.errors import Code, NoRespondersError, ProtocolError, ServerLost, StreamError
from natsync.message import Item
from natsync.mux import LinkLoss
from natsync.streaming import frames, terms
from natsync.streaming.calls import Calls
from natsync.streaming.frames import Ack, Address, Control, Op
from natsync.streaming.inlet import Inlet, refused, reported
from natsync.streaming.peers import FIRST_REPEAT, LONGEST_REPEAT, Peer, PeerName
from natsync.streaming.terms import Offer
from natsync.streaming.window import Incoming, Verdict
from natsync.timers import Alarm, lateness

#: Seconds within which everything that came is confirmed.
ACK_SECONDS = 0.2
#: Seconds for which a refusal waits for another responder to accept, where several may have been asked.
SECOND_OPINION_SECONDS = 0.02
#: What is added to the heartbeat on this side, so that as a rule it is the responder who asks.
_LATER = 1.1
#: Responders that are turned away by name, one by one; of more there is no end.
_MOST_TURNED_AWAY = 1000


class FramedReceiver:
    """What takes the frames of one stream."""

    mode = "framed"

    def __init__(self, inlet: Inlet, calls: Calls, window: int) -> None:
        self.resumes = 0  # how often it went on after a silence, or over another link
        options = calls.connection.options
        self._share = calls.budget.open()
        self.offer = Offer(
            window=window,
            window_bytes=self._share.given,
            grace=options.resume_grace,
            heartbeat=options.heartbeat,
            chunk_bytes=options.max_message_bytes,
        )
        self._inlet = inlet
        self._calls = calls
        self._lock = threading.Lock()
        self._incoming = Incoming(window, self.offer.window_bytes, options.max_message_bytes)
        self._consumed = self._consumed_bytes = 0
        self._over = False
        self._stream = self._prefix = b""  # of the responder that this is bound to
        self._control: bytes | None = None  # where it is spoken to: the newest reply subject
        self._refusal: Exception | None = None  # by one responder, while another may accept
        self._refusal_due = 0.0
        self._made_up = False  # for having looked late
        self._turned_away: set[bytes] = set()
        self._owed_at: float | None = None  # when what has come is to be confirmed
        self._missing: int | None = None  # something behind this seq did not come,
        self._missing_due = 0.0  # which is said again then
        self._repeat = FIRST_REPEAT
        self._peer: Peer | None = None
        self._peer_name: PeerName = (b"", 0.0, 0.0)
        self._alarm = Alarm(self._look)

    @property
    def refusing(self) -> bool:
        """Whether one responder has refused, and another may still answer."""
        return self._refusal is not None

    @property
    def known(self) -> dict[bytes, bytes]:
        """The responder's stream, and where it is spoken to; empty before the first answer."""
        return {} if self._control is None else {self._stream: self._control}

    def speaks_to(self, subject: bytes) -> bool:
        """Whether this is where it speaks to its responder."""
        return bool(self._stream) and subject.startswith(self._prefix)

    @property
    def gaps(self) -> int:
        return self._incoming.gaps

    @property
    def resent(self) -> int:
        return self._incoming.resent

    # -- frames (the reader) ---------------------------------------------------------------------------------------

    def deliver(self, items: list[Item]) -> None:
        chunks: list[bytes] = []
        answer: Ack | None = None
        end: tuple[bytes, int, bytes | None, bytes] | None = None  # op, seq, headers and payload of what ended it
        error: Exception | None = None
        heard = unreachable = False
        with self._lock:
            if self._over:
                return
            before = self._incoming.received
            say = b""
            try:
                index = 0
                while index < len(items):
                    run = self._next_ones(items, index)
                    if run:
                        self._incoming.take_next(run, chunks)
                        index += len(run)
                        self._control, heard = items[index - 1][0], True
                        continue
                    item = items[index]
                    index += 1
                    reply, block, payload = item
                    if block is None and self._stream and reply is not None and reply.startswith(self._prefix):
                        op, _, digits = reply[len(self._prefix) :].partition(b".")
                        seq = int(digits)
                        self._control = reply
                    else:
                        address = self._address(reply, block, payload)
                        if address is None:
                            unreachable = unreachable or frames.is_unheard(item)
                            continue
                        op, seq = address.op, address.seq
                    heard = True
                    if op == Op.DATA or op == Op.BATCH or op == Op.FRAGMENT:
                        if block is not None and seq == 1 and not self._incoming.received:
                            self._inlet.begun(terms.decode_headers(block))
                        verdict = self._incoming.take(op, seq, payload, chunks)
                        if verdict is not Verdict.TAKEN:
                            say = self._out_of_order(verdict) or say
                    elif op == Op.PROBE:
                        if seq > self._incoming.received:
                            say = Control.MISSING
                        else:
                            say, self._missing = say or Control.ACK, None
                    elif not seq:
                        if op == Op.REFUSED or op == Op.ERROR:  # turned away, or not known there any more
                            end = (op, seq, block, payload)
                            break
                    else:
                        verdict = self._incoming.take(op, seq, payload, chunks)
                        if verdict is Verdict.END or verdict is Verdict.ERROR:
                            end, say = (op, seq, block, payload), Control.ACK
                            break
                        say = self._out_of_order(verdict) or say
            except (ProtocolError, ValueError) as fault:
                error = StreamError(f"the responder breaks the protocol: {fault}", code=Code.INTERNAL)
            if self._incoming.received > before:
                self._missing = None
            answer = self._answer_locked(say, heard) if error is None else None
        self._after(heard, unreachable, chunks, answer)
        if error is not None:
            self._inlet.fail(error)
        elif end is not None:
            self._ended(*end)

    def _next_ones(self, items: list[Item], begin: int) -> list[bytes]:
        """The payloads from there on that are the chunks expected next, one in a message. Requires _lock."""
        run: list[bytes] = []
        if self._stream and self._incoming.between_chunks:
            seq = self._incoming.received
            for reply, block, payload in itertools.islice(items, begin, None):
                seq += 1
                if block is not None or reply != b"%b%b.%d" % (self._prefix, Op.DATA, seq):
                    break
                run.append(payload)
        return run

    def _after(self, heard: bool, unreachable: bool, chunks: list[bytes], answer: Ack | None) -> None:
        peer = self._peer
        if chunks:
            self._inlet.arrived(chunks)
        if answer is not None:  # behind it: to write takes longer than to wake the consumer
            self._tell(answer.encode())
        if peer is not None:
            if heard:
                peer.heard()
            elif unreachable:
                peer.unreachable()
        elif unreachable:
            self._inlet.finished(NoRespondersError(self._inlet.subject))

    def _out_of_order(self, verdict: Verdict) -> bytes:
        """What to answer to a frame that is not the next one. Requires _lock."""
        if verdict is Verdict.AGAIN:
            return Control.ACK  # what confirmed it may have been lost
        if self._missing == self._incoming.received:
            return b""  # it was said, and is repeated by the timer
        self._incoming.gaps += 1
        self._repeat = FIRST_REPEAT
        return Control.MISSING

    def _answer_locked(self, say: bytes, heard: bool) -> Ack | None:
        """The account that is due now; or one is put off, so that it covers what comes next too. Requires _lock."""
        if say:
            return self._account_locked(missing=say == Control.MISSING)
        if not heard:
            return None
        if self._incoming.is_due(self._credit()):  # fragments give their credit back as they come
            return self._account_locked()
        if self._owed_at is None:
            self._owed_at = time.monotonic() + ACK_SECONDS
            self._alarm.set_by(self._owed_at)
        return None

    def _credit(self) -> int:
        """How much credit may be out now: what the other streams leave, and never too little for two fragments."""
        return max(self.offer.window_bytes // 2, self._calls.budget.most(self._share))

    def _account_locked(self, *, missing: bool = False) -> Ack:
        """What is here, and the credit now. Requires _lock."""
        incoming = self._incoming
        account = incoming.account(self._credit(), missing=missing)
        self._calls.budget.change(self._share, incoming.granted_bytes)
        self._owed_at = None
        if missing:
            self._missing = incoming.received
            self._missing_due = time.monotonic() + self._repeat
            self._repeat = min(2 * self._repeat, LONGEST_REPEAT)
            self._alarm.set_by(self._missing_due)
        return account

    def _tell(self, payload: bytes) -> None:
        control = self._control
        if control is not None:
            self._calls.tell(control, self._inlet.inbox, payload)

    # -- which responder -------------------------------------------------------------------------------------------

    def _address(self, reply: bytes | None, block: bytes | None, payload: bytes) -> Address | None:
        """The address of a frame of this stream; None for anything else. Requires _lock."""
        address = frames.decode_address(reply, block)
        if address is None:
            return None
        if not self._stream:
            if address.op == Op.REFUSED and not self._is_final(address, reply, block, payload):
                return None
            self._bind(address)
        elif address.stream != self._stream:
            self._turn_away(address, reply)
            return None
        self._control = reply or self._control
        return address

    def _bind(self, address: Address) -> None:
        self._stream, self._prefix = address.stream, address.stream + b"."
        self._refusal = None
        self._inlet.decided(self)
        if address.op == Op.REFUSED:
            return
        heartbeat = self.offer.heartbeat * _LATER
        responder = address.stream.rpartition(b".")[0]
        self._peer_name = self._calls.peers.join(responder, self, heartbeat, self.offer.grace)

    def _is_final(self, address: Address, reply: bytes | None, block: bytes | None, payload: bytes) -> bool:
        """Whether a refusal is the answer: nobody else was asked. Else it is kept for a moment. Requires _lock."""
        headers = terms.decode_headers(block)
        if terms.ONLY_HEADER in headers:
            return True
        self._turn_away(address, reply, Ack(0, 0, 0).encode())  # so that it need not be repeated
        if self._refusal is None:
            self._refusal = refused(_error_text(payload), headers)
            self._refusal_due = time.monotonic() + SECOND_OPINION_SECONDS
            self._alarm.set_by(self._refusal_due)
        return False

    def _turn_away(self, address: Address, reply: bytes | None, payload: bytes | None = None) -> None:
        """Tell another responder, once, that somebody else was first. Requires _lock."""
        known = address.stream in self._turned_away and address.op != Op.PROBE  # it asks: so it has not heard
        known = known or len(self._turned_away) >= _MOST_TURNED_AWAY
        if reply is None or (known and payload is None) or (address.op == Op.ERROR and not address.seq):
            return
        self._turned_away.add(address.stream)
        if payload is None:
            self._calls.turn_away(self._inlet.inbox, reply)
        else:
            self._calls.tell(reply, self._inlet.inbox, payload)

    # -- the end ---------------------------------------------------------------------------------------------------

    def _ended(self, op: bytes, seq: int, block: bytes | None, payload: bytes) -> None:
        headers = terms.decode_headers(block)
        sentinels = self._calls.connection.options.sentinels
        if op == Op.END:
            self._inlet.finished(None, item=(None, block, sentinels.end), trailers=headers)
            return
        text = _error_text(payload)
        error: Exception
        if op == Op.REFUSED:
            error = refused(text, headers)
            self._tell(Ack(0, 0, 0).encode())
        elif seq:
            error = reported(text, headers)
        else:
            error = ServerLost(text)
            if self._peer is not None:
                self._peer.ask_all()
        item = (None, block, sentinels.error_prefix + text.encode("utf-8", "replace"))
        self._inlet.finished(error, item=item)

    def close(self, *, complete: bool) -> None:
        """Nothing more is wanted; complete: the responder ended it, and is told again if it asks. Idempotent."""
        with self._lock:
            self._over = True
            received, peer = self._incoming.received, self._peer
        self._calls.budget.close(self._share)
        self._alarm.clear()
        if peer is not None:
            self._calls.peers.leave(self._peer_name, peer, self)
        if complete and self._stream:
            self._calls.remember(self._inlet.token, self._stream, received)

    # -- the consumer ----------------------------------------------------------------------------------------------

    def consumed(self, chunks: int, size: int) -> None:
        """The application has taken chunks: give credit for others, if it is worth a message."""
        with self._lock:
            self._incoming.consume(chunks - self._consumed, size - self._consumed_bytes)
            self._consumed, self._consumed_bytes = chunks, size
            if self._over or not self._incoming.is_due(self._credit()):
                return
            answer = self._account_locked()
        self._tell(answer.encode())

    # -- the timer -------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        answer = refusal = None
        now = time.monotonic()
        with self._lock:
            if self._over:
                return
            if self._refusal is not None and lateness(self._refusal_due, now) and not self._made_up:
                self._made_up = True  # once: another's answer may have come meanwhile
                self._refusal_due = now + SECOND_OPINION_SECONDS
                self._alarm.set_by(self._refusal_due)
            elif self._refusal is not None and now >= self._refusal_due:
                refusal = self._refusal
            elif self._missing is not None and now >= self._missing_due:
                answer = self._account_locked(missing=True)
            elif self._owed_at is not None and now >= self._owed_at:
                answer = self._account_locked()
            due = [at for at in (self._owed_at, None if self._missing is None else self._missing_due) if at is not None]
            if due:
                self._alarm.set_by(min(due))
        if answer is not None:
            self._tell(answer.encode())
        if refusal is not None:
            self._inlet.finished(refusal)

    # -- the link, the peer ------------------------------------------------------------------------------------------

    def link_lost(self, loss: LinkLoss) -> None:
        """What is missing will be asked for over the next link."""

    def link_made(self) -> None:
        with self._lock:
            if self._over or not self._stream:
                return
            self.resumes += 1
            self._repeat = FIRST_REPEAT
            answer = self._account_locked(missing=True)
        self._tell(answer.encode())

    def met(self, peer: Peer) -> None:
        self._peer = peer

    def ask(self) -> None:
        self._tell(Control.PING)

    def suspend(self) -> None:
        """Nothing was under way from here."""

    def resume(self) -> None:
        """Heard from again; it may have given this stream up meanwhile."""
        self.resumes += 1
        self.ask()

    def give_up(self, why: str) -> None:
        self._inlet.fail(ServerLost(f"the responder is gone: {why}"))


def _error_text(payload: bytes) -> str:
    return payload.removeprefix(frames.ERROR_PREFIX).decode("utf-8", "replace")
