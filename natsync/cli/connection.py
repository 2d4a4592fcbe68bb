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

#: The environment variables of the options, by the option's name: those of the nats command.
ENVIRONMENT = {
    "server": "NATS_URL",
    "user": "NATS_USER",
    "password": "NATS_PASSWORD",
    "token": "NATS_TOKEN",
    "creds": "NATS_CREDS",
    "nkey": "NATS_NKEY",
    "tlsca": "NATS_CA",
    "tlscert": "NATS_CERT",
    "tlskey": "NATS_KEY",
}

#: The options that say who connects.
_KINDS = ("user", "creds", "nkey", "token")

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

    quieten_log()
    client = natsync.Client(server_given(), on_event=listen, **{"name": "natsync-cli", **options_given()})
    try:
        with client:
            yield client
    except natsync.NatsError as error:
        if not refusals:
            raise
        raise click.ClickException(f"the server says: {refusals[0]}") from error
    if refusals:
        raise click.ClickException(f"the server says: {refusals[0]}")


def quieten_log() -> None:
    """Errors are reported by the command; the library's log is shown only with --debug."""
    if click.get_current_context().meta.get(DEBUG):
        logging.basicConfig(level=logging.DEBUG)
    else:
        logging.getLogger("natsync").addHandler(logging.NullHandler())


def server_given() -> str | None:
    """The server that was named on the command line or in NATS_URL, if any."""
    url: str | None = _given("server")
    return url


def options_given() -> dict[str, Any]:
    """The options of the running command as keywords of Client and Subscriber.

    Raises:
        click.UsageError: they contradict each other.
        natsync.NatsError, OSError: a file of credentials or certificates is of no use.
    """
    named = {"name": _given("connection_name"), "inbox_prefix": _given("inbox_prefix")}
    return {**{key: value for key, value in named.items() if value is not None}, **_credentials(), **_tls()}


def child_environment() -> dict[str, str]:
    """The environment for a `natsync` that is to connect as the running command would.

    Secrets go this way, because other users of the machine can see a process's arguments.
    """
    environment = dict(os.environ)
    if any(_typed(kind) for kind in _KINDS):  # then another kind in the environment does not count
        for kind in _KINDS:
            environment.pop(ENVIRONMENT[kind], None)
        environment.pop(ENVIRONMENT["password"], None)
    named = {variable: _given(name) for name, variable in ENVIRONMENT.items() if _typed(name) or name == "server"}
    if _typed("user") and _given("password") is not None:
        named[ENVIRONMENT["password"]] = _given("password")
    return {**environment, **{variable: str(value) for variable, value in named.items() if value is not None}}


def child_options() -> list[str]:
    """The arguments that such a `natsync` needs beyond its environment."""
    options = ["--tlsfirst"] if _given("tlsfirst") else []
    for name in ("inbox_prefix", "connection_name"):
        if (value := _given(name)) is not None:
            options += [f"--{name.replace('_', '-')}", value]
    return [*options, "--debug"] if click.get_current_context().meta.get(DEBUG) else options


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


def _option(*names: str, help: str, path: bool = False) -> Callable[[_Command], _Command]:
    kind = _File(exists=True, dir_okay=False) if path else click.STRING
    env = ENVIRONMENT.get(names[-1].lstrip("-"))
    return click.option(
        *names, envvar=env, show_envvar=env is not None, help=help, type=kind, expose_value=False, callback=_remember
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

SERVER_OPTION = _option("-s", "--server", help="Server URL, or several with commas.")

_OPTIONS = (
    SERVER_OPTION,
    _option("--user", help="User name; without a password, a token."),
    _option("--password", help="Password."),
    _option("--token", help="Token."),
    _option("--creds", help="File of credentials (.creds).", path=True),
    _option("--nkey", help="File of a user's nkey seed.", path=True),
    _option("--tlsca", help="File of authorities to trust.", path=True),
    _option("--tlscert", help="File of our certificate.", path=True),
    _option("--tlskey", help="File of our private key.", path=True),
    *_TLS_FIRST,
    _option("--inbox-prefix", help="What the subjects of answers start with.  [default: _INBOX]"),
    _option("--connection-name", help="What the server's monitoring shows this connection as."),
    DEBUG_OPTION,
)
