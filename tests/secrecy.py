"""Watches that no credential of the suite shows in what natsync says: log records and exceptions.

Every test runs under the watch (conftest.py). All records of the natsync loggers, from DEBUG up, are read as they are
made: message, arguments, formatted traceback. Every natsync exception is read when nobody holds it any more or the
test ends, whichever is first: its text, repr, arguments, attributes, and those of its chain of causes. What is looked
for is MARKER, which the test credentials contain, and what secret() was told where a format leaves no room for it.

Not watched: what child processes print, and what tests print themselves.
"""

from __future__ import annotations

import functools
import logging
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import quote

import natsync

#: What every credential of a test contains where its format allows.
MARKER = "S3CRET"
#: Characters shown on both sides of a find, for finding out where it comes from.
AROUND = 120
#: Characters of the shortest text that can be looked for.
SHORTEST = 6

V = TypeVar("V", str, bytes)


class Watch(logging.Handler):
    """Collects what was found since the last take(); any thread may log and raise meanwhile."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self._secrets = (MARKER,)  # replaced, never changed: other threads are reading it
        self._finds: list[str] = []
        self._alive: dict[int, weakref.ref[BaseException]] = {}
        self.exceptions = 0  # how many were read so far
        self.records = 0

    # -- what is secret ------------------------------------------------------------------------------------------

    def add(self, value: str) -> None:
        """Look for this text too, also as it stands in a URL; a text of several lines line by line."""
        for line in filter(None, map(str.strip, value.splitlines())):
            assert len(line) >= SHORTEST, "a secret this short is found everywhere"
            self._secrets = tuple({*self._secrets, line, quote(line, safe="")})

    def shows(self, text: str) -> str | None:
        """The part of the text around a secret that it contains, or None."""
        for one in self._secrets:
            at = text.find(one)
            if at >= 0:
                return text[max(0, at - AROUND) : at + len(one) + AROUND]
        return None

    def take(self) -> list[str]:
        """What was found since the last call, in words; exceptions that still live are read again for it."""
        for reference in list(self._alive.values()):
            error = reference()
            if error is not None:
                self._read(error)
        self._alive.clear()
        finds, self._finds = self._finds, []
        return list(dict.fromkeys(finds))

    def _look(self, where: str, text: str) -> None:
        shown = self.shows(text)
        if shown is not None:
            self._finds.append(f"{where}: …{shown}…")

    # -- log records ---------------------------------------------------------------------------------------------

    def emit(self, record: logging.LogRecord) -> None:
        self.records += 1
        where = f"a log record of {record.name} ({record.filename}:{record.lineno})"
        try:
            self._look(where, _written(record))
        except Exception as error:
            self._finds.append(f"{where} cannot be written: {error!r}")

    # -- exceptions ----------------------------------------------------------------------------------------------

    def made(self, error: BaseException) -> None:
        """Remember it without holding it; it is read once its chain is complete."""
        self._alive[id(error)] = weakref.ref(error)

    def gone(self, error: BaseException) -> None:
        """Nobody holds it any more; on the thread that let go of it."""
        if self._alive.pop(id(error), None) is not None:
            self._read(error)

    def _read(self, error: BaseException) -> None:
        self.exceptions += 1
        for link in _chain(error):
            where = f"an exception of type {type(link).__name__}"
            for text in (str, repr, _arguments, _attributes):
                try:
                    self._look(where, text(link))
                except Exception:  # a test's own class may not be showable
                    pass


def _written(record: logging.LogRecord) -> str:
    text = f"{record.getMessage()}\n{record.args!r}\n"
    if record.exc_info and record.exc_info[1] is not None:
        text += "".join(traceback.format_exception(record.exc_info[1]))
    return text


def _arguments(error: BaseException) -> str:
    return repr(error.args)


def _attributes(error: BaseException) -> str:
    return repr(vars(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, its causes and contexts, and what it carries in .causes."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        one = waiting.pop()
        if isinstance(one, BaseException) and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, one.__context__, *getattr(one, "causes", {}).values()]


watch = Watch()


def secret(value: V) -> V:
    """Say that a value is secret although it cannot contain MARKER: a seed, a JWT. Returns it."""
    watch.add(value if isinstance(value, str) else value.decode())
    return value


# -- putting it in place -----------------------------------------------------------------------------------------------


def install() -> None:
    """Read all that natsync logs and raises from now on; once a process."""
    _read_records()
    _call_with_self(natsync.NatsError, "__init__", watch.made)
    _call_with_self(natsync.NatsError, "__del__", watch.gone)
    for kind in _below(natsync.NatsError):
        if "__init__" in vars(kind):  # some reach the built-in exception by a way of their own
            _call_with_self(kind, "__init__", watch.made)


def _read_records() -> None:
    """Have natsync's loggers make every record for the watch, while all others see those that they would see anyway.

    A level of DEBUG would do the first, but then pytest holds each record, and what it is about, until the test ends.
    """
    enabled, call = logging.Logger.isEnabledFor, logging.Logger.callHandlers

    def is_enabled_for(self: logging.Logger, level: int) -> bool:
        return _is_ours(self) or enabled(self, level)

    def call_handlers(self: logging.Logger, record: logging.LogRecord) -> None:
        if _is_ours(self):
            watch.handle(record)
            if not enabled(self, record.levelno):
                return
        call(self, record)

    logging.Logger.isEnabledFor, logging.Logger.callHandlers = is_enabled_for, call_handlers  # type: ignore[method-assign]


def _is_ours(logger: logging.Logger) -> bool:
    return logger.name == "natsync" or logger.name.startswith("natsync.")


def _below(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


def _call_with_self(kind: type, name: str, tell: Callable[[Any], None]) -> None:
    """Have tell(object) called whenever this method of a class has run."""

    def inherited(self: Any, *args: Any, **kwargs: Any) -> None:
        method = getattr(super(kind, self), name, None)
        if method is not None:
            method(*args, **kwargs)

    original = vars(kind).get(name, inherited)

    @functools.wraps(original)
    def told(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        tell(self)

    setattr(kind, name, told)
