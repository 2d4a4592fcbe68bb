"""NATS message headers: a multi-valued mapping that keeps order and case, and its wire form.

Pure values. A header block is `NATS/1.0[ status[ description]]CRLF`, then `Key: value CRLF` lines up to an empty one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeAlias

from natsync.errors import InvalidArgument, ProtocolError

#: A reply with this header says that its handler failed, by the convention of NATS services (ADR-32).
SERVICE_ERROR = "Nats-Service-Error"
#: Of an error, a stream's or a reply: the details, as JSON.
DETAILS = "Natsync-Details"

HeaderInput: TypeAlias = "Mapping[str, str | Iterable[str]] | Headers | None"

_VERSION = b"NATS/1.0"
_KEY = re.compile(r"[!-9;-~]+")  # printable ASCII but the colon and the space
_FORBIDDEN_IN_VALUE = re.compile(r"[\r\n\0]")
_FORBIDDEN_IN_LINE = re.compile(rb"[\r\n\0]")  # received headers may be sent on, where these would forge fields


class Headers(MutableMapping[str, str]):
    """Header fields in the order they were added.

    Looking up ignores case, as with HTTP; what is sent and listed keeps it. A key may have several values: indexing
    gives the first, get_all() gives all, add() appends, assignment replaces.
    """

    __slots__ = ("_fields",)

    def __init__(self, fields: HeaderInput = None) -> None:
        self._fields: list[tuple[str, str]] = []
        if fields is None:
            return
        if isinstance(fields, Headers):
            self._fields = list(fields._fields)
        elif isinstance(fields, Mapping):
            for key, value in fields.items():
                if isinstance(value, str) or not isinstance(value, Iterable):
                    self.add(key, value)
                else:
                    for one in value:
                        self.add(key, one)
        else:
            raise TypeError(f"headers are a mapping of str to str or several str, not {type(fields).__name__}")

    def add(self, key: str, value: str) -> None:
        """Append a field, keeping those of the same key.

        Raises:
            InvalidArgument: the key is not a printable word without a colon, or the value has a line break or NUL.
            TypeError: key or value is not a str.
        """
        self._fields.append(_checked(key, value))

    def get_all(self, key: str) -> list[str]:
        """All values of the key, in order; an empty list if there is none."""
        wanted = key.lower()
        return [value for name, value in self._fields if name.lower() == wanted]

    def fields(self) -> list[tuple[str, str]]:
        """Every field as (key, value), in order, repeated keys included."""
        return list(self._fields)

    def __getitem__(self, key: str) -> str:
        wanted = key.lower()
        for name, value in self._fields:
            if name.lower() == wanted:
                return value
        raise KeyError(key)

    def __setitem__(self, key: str, value: str) -> None:
        field = _checked(key, value)
        self._drop(key)
        self._fields.append(field)

    def __delitem__(self, key: str) -> None:
        if not self._drop(key):
            raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        if not self._fields:  # most messages have none, and are asked several times
            return False
        return super().__contains__(key)

    def __bool__(self) -> bool:
        return bool(self._fields)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for name, _ in self._fields))

    def __len__(self) -> int:
        return len({name for name, _ in self._fields})

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Headers):
            return self._fields == other._fields
        if not isinstance(other, Mapping):
            return NotImplemented
        try:
            return self._fields == Headers(other)._fields
        except (TypeError, InvalidArgument):
            return False

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"Headers({self._fields!r})"

    def _drop(self, key: str) -> bool:
        wanted = key.lower()
        kept = [field for field in self._fields if field[0].lower() != wanted]
        found = len(kept) < len(self._fields)
        self._fields = kept
        return found

    def encode(self) -> bytes:
        """The header block as it goes on the wire."""
        lines = "".join(f"{key}: {value}\r\n" for key, value in self._fields)
        return _VERSION + b"\r\n" + lines.encode("utf-8", "surrogateescape") + b"\r\n"


def _checked(key: str, value: str) -> tuple[str, str]:
    if not isinstance(key, str) or not isinstance(value, str):
        raise TypeError(f"header {key!r}: key and value are str, not {type(key).__name__} and {type(value).__name__}")
    if not _KEY.fullmatch(key):
        raise InvalidArgument(f"header key {key!r} must be printable ASCII without spaces and colons")
    if _FORBIDDEN_IN_VALUE.search(value):
        raise InvalidArgument(f"the value of header {key!r} contains a line break or NUL")
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidArgument(f"the value of header {key!r} cannot be encoded as UTF-8") from None
    return key, value


def details_of(headers: Headers) -> Any:
    """The details of an error; as text if they are not JSON, None if there are none."""
    try:
        return json.loads(headers.get(DETAILS, "null"))
    except (ValueError, RecursionError):
        return headers[DETAILS]


def status_of(block: bytes) -> int | None:
    """The inline status of a header block, such as 503; None if it has none."""
    digits = block[len(_VERSION) + 1 : len(_VERSION) + 4]
    return int(digits) if len(digits) == 3 and digits.isdigit() else None


def decode(block: bytes) -> Headers:
    """Parse a header block as received; leading and trailing spaces of values are dropped.

    Raises:
        ProtocolError: it does not start with NATS/1.0, a line has no colon, or it has a lone line break or NUL.
    """
    first, _, rest = block.partition(b"\r\n")
    if not first.startswith(_VERSION):
        raise ProtocolError(f"header block starts with {first[:20]!r}, not NATS/1.0")
    headers = Headers()
    for line in rest.split(b"\r\n"):
        if not line:
            continue
        key, colon, value = line.partition(b":")
        if not colon or not key or _FORBIDDEN_IN_LINE.search(line):
            raise ProtocolError(f"header line without a key and a colon: {line[:40]!r}")
        headers._fields.append((_text(key), _text(value.strip())))
    return headers


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
