"""Who connects: the credentials of one attempt, and the fields of CONNECT that prove them.

fetch() runs before the server is dialed, on the connection's supervisor thread: it calls the user's functions and reads
the .creds file, both anew for each attempt. What cannot be had fails the attempt with a ConnectError, not an
AuthorizationError: the server has refused nothing, and the next attempt may well find it.

No error of this module holds a secret, nor does any that it stands in for: what a user's function raised is named by
its type and place alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from natsync.errors import ConnectError, InvalidArgument
from natsync.nkey import INSTALL, Creds, find_seed, parse_creds, sign
from natsync.options import CREDS_MARK, ConnectOptions, Secret, Server

#: A .creds file has some thousand bytes; what is larger than this is something else.
MAX_CREDS_BYTES = 1 << 20
_Parsed = TypeVar("_Parsed")
#: What stands for a secret in the words of a server that repeats it.
HIDDEN = "***"
#: Secrets of fewer characters are not looked for: they occur in any text.
_LEAST_HIDDEN = 4


@dataclass(frozen=True)
class Credentials:
    """The credentials of one attempt."""

    plain: dict[str, str] = field(default_factory=dict, repr=False)
    seed: str | None = field(default=None, repr=False)
    jwt: str | None = field(default=None, repr=False)

    @property
    def signs(self) -> bool:
        """Whether a nonce of the server is needed."""
        return self.seed is not None

    def fields(self, nonce: str) -> dict[str, str]:
        """The fields of CONNECT, the nonce signed if a signature is due; they must never be shown.

        Raises:
            ConnectError: the nkeys library does not work.
        """
        if self.seed is None:
            return dict(self.plain)
        try:
            key, signature = sign(self.seed, nonce.encode())
        except Exception as error:
            failure = type(error).__name__
        else:
            return {"sig": signature, **({"nkey": key} if self.jwt is None else {"jwt": self.jwt})}
        raise ConnectError(f"the nkeys library cannot sign ({failure}); {INSTALL}")

    def hide(self, text: str) -> str:
        """A text of the server, without the secrets should it repeat them."""
        for secret in (*(self.plain.get(key) for key in ("pass", "auth_token")), self.jwt, self.seed):
            if secret is not None and len(secret) >= _LEAST_HIDDEN:
                text = text.replace(secret, HIDDEN)
        return text


def fetch(options: ConnectOptions, server: Server) -> Credentials:
    """The credentials for this server: those of its URL, else those of the options; maybe none.

    Blocks as long as the user's functions do.

    Raises:
        ConnectError: a function raised or returned something else, the .creds file cannot be read or used.
    """
    if server.token is not None:
        return Credentials({"auth_token": server.token})
    if server.user is not None:
        return Credentials({"user": server.user, "pass": server.password or ""})
    if options.token is not None:
        return Credentials({"auth_token": _called("token", options.token)})
    if options.user is not None:
        user, password = _user(options)
        return Credentials({"user": user, "pass": password})
    if options.nkey_seed is not None:
        text = _called("nkey_seed", options.nkey_seed)
        return Credentials(seed=_usable(find_seed, text, "nkey_seed"))
    if options.credentials is not None:
        creds = _creds(options.credentials)
        return Credentials(seed=creds.seed, jwt=creds.jwt)
    return Credentials()


def _user(options: ConnectOptions) -> tuple[str, str]:
    user = _result("user", options.user) if callable(options.user) else options.user
    password = "" if options.password is None else _called("password", options.password)
    if isinstance(user, str):
        return user, password
    if not isinstance(user, tuple) or len(user) != 2 or not all(isinstance(one, str) for one in user):
        raise ConnectError(f"user() returned {_kind(user)}, not a str or a pair of them")
    if options.password is not None:
        raise ConnectError("user() returned a password, and the option password is given too")
    return user


def _called(name: str, given: Secret) -> str:
    """The secret itself, of the function that returns it."""
    value = _result(name, given) if callable(given) else given
    if not isinstance(value, str):
        raise ConnectError(f"{name}() returned {_kind(value)}, not a str")
    return value


def _result(name: str, function: Callable[[], object]) -> object:
    try:
        return function()
    except BaseException as error:  # SystemExit, too, must not end the thread that connects
        failure = f"{name}() raised {type(error).__name__} {_place(error)}"
    # Outside of the handler, so that the error does not hold the user's, whose text may show a secret.
    raise ConnectError(f"no credentials for this attempt: {failure}")


def _place(error: BaseException) -> str:
    """The file and line where the user's code raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    return f"({os.path.basename(trace.tb_frame.f_code.co_filename)}, line {trace.tb_lineno})"


def _kind(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(one).__name__ for one in value[:3])}{', …' if len(value) > 3 else ''})"
    return type(value).__name__


def _creds(given: str | os.PathLike[str]) -> Creds:
    if isinstance(given, str) and CREDS_MARK in given:
        return parse_creds(given)
    return read_file(given, parse_creds)


def read_file(path: str | os.PathLike[str], parse: Callable[[str], _Parsed]) -> _Parsed:
    """What parse() makes of a file of secrets, such as find_seed() or parse_creds().

    Raises:
        ConnectError: the file cannot be read, or parse() does not accept what it holds; the text names the file.
    """
    return _usable(parse, _read(path), _name(path))


def _usable(parse: Callable[[str], _Parsed], text: str, name: str) -> _Parsed:
    try:
        return parse(text)
    except InvalidArgument as error:
        failure = str(error)
    raise ConnectError(f"no credentials for this attempt: {name}: {failure}")


def _read(given: str | os.PathLike[str]) -> str:
    try:
        with open(os.path.expanduser(given), encoding="utf-8-sig", errors="replace") as file:
            text = file.read(MAX_CREDS_BYTES + 1)
    except (OSError, ValueError) as error:
        failure = getattr(error, "strerror", None) or type(error).__name__
    else:
        if len(text) <= MAX_CREDS_BYTES:
            return text
        failure = "it is too large"
    raise ConnectError(f"no credentials for this attempt: {_name(given)} cannot be read: {failure}")


def _name(given: str | os.PathLike[str]) -> str:
    """The file by name, unless that may be a secret that was given in the file's stead."""
    text = os.fspath(given)
    if not isinstance(given, str) or os.sep in text or text.endswith((".creds", ".txt")):
        return f"the file {text!r}"
    return "the file that the option credentials names"
