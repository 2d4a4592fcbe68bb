"""docs/protocol.md says what the code does: its tables of letters, names, states and numbers, and its example."""

from __future__ import annotations

import re

from natsync import client, options
from natsync.streaming import (
    calls,
    framed_receiver,
    framed_sender,
    frames,
    framing,
    peers,
    plain_receiver,
    responder,
    terms,
)
from natsync.streaming import window as win
from support import ROOT

PAGE = (ROOT / "docs" / "protocol.md").read_text("utf-8")


def first_cells(head: str) -> set[str]:
    """The first column of the table whose head begins like this."""
    rows = PAGE.split(f"\n| {head} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return {row.split("|")[1].strip(" `") for row in rows}


def test_letters_and_names() -> None:
    assert first_cells("op | seq") == {value.decode() for key, value in vars(frames.Op).items() if key.isupper()}
    assert first_cells("first byte") == {value.decode() for key, value in vars(frames.Control).items() if key.isupper()}
    names = {value for key, value in vars(terms).items() if key.endswith("_HEADER")}
    assert set(re.findall(r"\b(?:Natsync|Nats-Service)-[A-Z][\w-]*\w", PAGE)) == names
    unsaid = {key: value or "none" for key, value in terms._UNSAID.items()}
    assert dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (\w+) \|[^|]*\|$", PAGE, re.MULTILINE)) == unsaid


def test_states() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \|$", PAGE, re.MULTILINE)
    tables = [*framed_sender.TRANSITIONS.items(), *peers.TRANSITIONS.items()]
    assert sorted(rows) == sorted((state.value, event.value, after.value) for (state, event), after in tables)


def test_numbers() -> None:
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "ms": 0.001, "s": 1}
    told = re.findall(r"\| (?:1/)?([\d,]+)(?: (\w+))? \|$", PAGE.split("## Numbers")[1], re.MULTILINE)
    assert [int(number.replace(",", "")) * units.get(unit, 1) for number, unit in told] == [
        client.STREAM_WINDOW, calls.WINDOW_BYTES, calls.ALL_WINDOWS_BYTES, calls.SHARED_WINDOWS_BYTES,
        calls.LEAST_WINDOW_BYTES, calls.TINY_WINDOW_BYTES, calls.FIRST_PART,
        terms.LEAST_WINDOW_BYTES, win.MOST_WINDOW, win.MOST_WINDOW_BYTES, win.BATCH_CHUNKS, win.BATCH_BYTES,
        win.BATCHED_CHUNK_BYTES, framing.GUARANTEED_BYTES, framing.KEPT_BYTES, options.RESUME_GRACE, options.HEARTBEAT,
        peers.ANSWER_SECONDS, peers.FIRST_REPEAT, peers.LONGEST_REPEAT, framed_receiver.ACK_SECONDS,
        framed_receiver.SECOND_OPINION_SECONDS, peers.OUTAGE_GRACES, calls._TOMBSTONES, terms.ERROR_TEXT,
        responder.RETRY_AFTER, plain_receiver.PENDING_CHUNKS, plain_receiver.PENDING_BYTES,
    ]  # fmt: skip


def test_the_example() -> None:
    for message in re.findall(r"```\n(H?PUB .*?)\n```", PAGE, re.DOTALL):
        line, _, rest = message.replace("\n", "\r\n").partition("\r\n")
        subject, reply, size = (line.split()[index].encode() for index in (1, 2, -1))
        address = frames.decode_address(reply, None)
        payload = bytes.fromhex(rest) if address and address.op == frames.Op.BATCH else rest.encode()
        assert len(payload) == int(size), message
        if address and address.op == frames.Op.BATCH:
            assert frames.encode_batch(frames.decode_batch(payload)) == payload
        elif frames.decode_address(subject, None):
            account = frames.decode_ack(payload)
            assert account is not None
            assert account.encode() == payload
