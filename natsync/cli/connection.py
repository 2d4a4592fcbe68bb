"""The connection options every command shares, and the client they make.

Names and environment variables are those of the `nats` command. An option may stand before or after the name
of the command; what is written on the command line wins over the environment.
"""

import logging
import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

import natsync
from natsync.auth import read_file
from natsync.cli.failures import DEBUG
from natsync.nkey import check_library, find_seed, parse_creds

#: Called as notice(name, info) with an event of the connection, see ConnectOptions.on_event.
Notice = Callable[[str, dict[str, Any]], None]

#: What the server says, in lower case, to something asked of it while it keeps the connection.
_REFUSALS = ("permissions violation", "maximum subscriptions exceeded", "invalid subject")

_KEY = "natsync.cli.connection."
_TYPED = "natsync.cli.typed."
_Command = TypeVar("_Command", bound=Callable[..., object])


def connection_options(command: _Command) -> _Command:
    """Add the connection options to a command; `connected` reads them, the function gets no argument."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@contextmanager
def connected(notice: Notice | None = None) -> Iterator[natsync.Client]:
    """A client as the options of the running command say, closed at the end of the block.

    notice(name, info) is told of the connection's events, on a worker. What the server refuses ends the block: its
    word is an error of the command, not only a line of the log.

    Raises:
        ConnectError: no server could be reached.
        AuthorizationError: the server does not accept the credentials.
        click.ClickException: the server refused something that was asked of it within the block.
    """
    refusals: list[str] = []

    def listen(name: str, info: dict[str, Any]) -> None:
        text = str(info.get("error", ""))
        if name == "error" and any(word in text.lower() for word in _REFUSALS):
            refusals.append(text)
            client.close()  # wakes whatever waits for an answer that will not come
        elif notice is not None:
            notice(name, info)

    _quieten_log()
    client = natsync.Client(_given("server"), name="natsync-cli", on_event=listen, **_credentials(), **_tls())
    try:
        with client:
            yield client
    except natsync.NatsError as error:
        if not refusals:
            raise
        raise click.ClickException(f"the server says: {refusals[0]}") from error
    if refusals:
        raise click.ClickException(f"the server says: {refusals[0]}")


def _quieten_log() -> None:
    """Errors are reported by the command; the library's log is shown only with --debug."""
    if click.get_current_context().meta.get(DEBUG):
        logging.basicConfig(level=logging.DEBUG)
    else:
        logging.getLogger("natsync").addHandler(logging.NullHandler())


def server_given() -> str | None:
    """The server that was named on the command line or in NATS_URL, if any."""
    url: str | None = _given("server")
    return url


def _given(name: str) -> Any:
    return click.get_current_context().meta.get(_KEY + name)


def _typed(name: str) -> bool:
    """Whether it was written on the command line, not in the environment."""
    return bool(click.get_current_context().meta.get(_TYPED + name))


def _credentials() -> dict[str, Any]:
    """The options that say who connects; of several kinds in the environment the first, as in the nats command."""
    if _typed("password") and _given("user") is None:
        raise click.UsageError("--password needs --user (NATS_USER)")
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "user": _user,
        "creds": _creds,
        "nkey": _nkey,
        "token": lambda: {"token": _given("token")},
    }
    given = [kind for kind in kinds if _given(kind) is not None]
    typed = [kind for kind in given if _typed(kind)]
    if len(typed) > 1:
        raise click.UsageError(f"--{typed[0]} and --{typed[1]} are credentials of different kinds: give one")
    chosen = (typed or given)[:1]
    return kinds[chosen[0]]() if chosen else {}


def _user() -> dict[str, str]:
    user, password = _given("user"), _given("password")
    if user and password is None:
        return {"token": user}  # as the nats command reads a user without a password
    return {"user": user, "password": password or ""}


def _creds() -> dict[str, Path]:
    """The file is read at each attempt to connect; now, too, to say what is wrong with it."""
    path = Path(_given("creds"))
    check_library()
    read_file(path, parse_creds)
    return {"credentials": path}


def _nkey() -> dict[str, Callable[[], str]]:
    """The file is read as _creds() has it."""
    path = Path(_given("nkey"))
    check_library()
    read_file(path, find_seed)
    return {"nkey_seed": lambda: read_file(path, find_seed)}


def _tls() -> dict[str, Any]:
    authorities, certificate, key = _given("tlsca"), _given("tlscert"), _given("tlskey")
    if key and not certificate:
        raise click.UsageError("--tlskey (NATS_KEY) needs --tlscert (NATS_CERT)")
    first = {"tls_first": True} if _given("tlsfirst") else {}
    if not (authorities or certificate):
        return first
    context = ssl.create_default_context(cafile=authorities)
    if certificate:
        context.load_cert_chain(certificate, key)
    return {"tls": context, **first}


def _remember(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
    if value is None:
        return
    name = str(parameter.name)
    typed = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    if typed or _KEY + name not in ctx.meta:
        ctx.meta[_KEY + name] = value
    if typed:
        ctx.meta[_TYPED + name] = True


def _remember_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[DEBUG] = True


class _File(click.Path):
    """A file that is there; `~` is one's home in the environment too, where no shell expands it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


def _option(*names: str, env: str, help: str, path: bool = False) -> Callable[[_Command], _Command]:
    kind = _File(exists=True, dir_okay=False) if path else click.STRING
    return click.option(
        *names, envvar=env, show_envvar=True, help=help, type=kind, expose_value=False, callback=_remember
    )


DEBUG_OPTION = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_remember_debug,
    help="Show the traceback of an error.",
)

#: TLS before the greeting. The second name is nsc's.
_TLS_FIRST = tuple(
    click.option(
        f"--{name}",
        "tlsfirst",
        flag_value=True,
        default=None,
        type=click.BOOL,
        expose_value=False,
        hidden=name != "tlsfirst",
        callback=_remember,
        help="Start TLS before the server's greeting.",
    )
    for name in ("tlsfirst", "tls-first")
)

SERVER_OPTION = _option("-s", "--server", env="NATS_URL", help="Server URL, or several with commas.")

_OPTIONS = (
    SERVER_OPTION,
    _option("--user", env="NATS_USER", help="User name; without a password, a token."),
    _option("--password", env="NATS_PASSWORD", help="Password."),
    _option("--token", env="NATS_TOKEN", help="Token."),
    _option("--creds", env="NATS_CREDS", help="File of credentials (.creds).", path=True),
    _option("--nkey", env="NATS_NKEY", help="File of a user's nkey seed.", path=True),
    _option("--tlsca", env="NATS_CA", help="File of authorities to trust.", path=True),
    _option("--tlscert", env="NATS_CERT", help="File of our certificate.", path=True),
    _option("--tlskey", env="NATS_KEY", help="File of our private key.", path=True),
    *_TLS_FIRST,
    DEBUG_OPTION,
)
