"""Frames that natsync itself never makes: what a server sends, and a CONNECT of any fields. For peers in tests."""

from __future__ import annotations

import json
from typing import Any


def encode_connect(fields: dict[str, Any]) -> bytes:
    """CONNECT with its options as JSON."""
    return b"CONNECT " + json.dumps(fields, separators=(",", ":")).encode() + b"\r\n"


def encode_info(fields: dict[str, Any]) -> bytes:
    """INFO with its fields as JSON; a server has a space before its end."""
    return b"INFO " + json.dumps(fields, separators=(",", ":")).encode() + b" \r\n"


def encode_err(text: str) -> bytes:
    """-ERR with its text in quotes."""
    return b"-ERR '" + text.encode() + b"'\r\n"


def encode_msg(subject: bytes, sid: bytes, reply: bytes | None, block: bytes | None, payload: bytes) -> bytes:
    """MSG, or HMSG if there is a header block."""
    to = b"%b %b" % (subject, sid) if reply is None else b"%b %b %b" % (subject, sid, reply)
    if block is None:
        return b"MSG %b %d\r\n%b\r\n" % (to, len(payload), payload)
    return b"HMSG %b %d %d\r\n%b%b\r\n" % (to, len(block), len(block) + len(payload), block, payload)
