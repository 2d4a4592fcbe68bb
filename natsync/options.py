"""How to connect: options checked and filled in from arguments, URLs and the environment.

Pure values. Secrets are held so that neither repr() nor an error shows them.
"""

from __future__ import annotations

import ipaddress
import itertools
import os
import ssl
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypedDict
from urllib.parse import SplitResult, unquote, urlsplit

from natsync import hooks as _hooks
from natsync import middleware as _middleware
from natsync import subject as _subject
from natsync.concurrency import check_timeout
from natsync.errors import InvalidArgument, InvalidURL
from natsync.nkey import check_library, check_seed, parse_creds

if sys.version_info >= (3, 11):
    from typing import Unpack as Unpack
elif TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack
else:
    Unpack = dict  # Python 3.10 has none; annotations can be evaluated all the same

#: What names servers: a URL, several separated by commas, or a list of them.
Servers: TypeAlias = "str | Iterable[str] | None"

#: A secret, or a function that is called for it at each attempt to connect.
Secret: TypeAlias = "str | Callable[[], str]"

#: What the text of a .creds file contains and no path does.
CREDS_MARK = "-----BEGIN NATS"

#: The options that say who connects, of which only one may be given; a password goes with its user.
CREDENTIALS = ("user", "token", "credentials", "nkey_seed")

#: The options that are True or False.
SWITCHES = ("tls_first", "reconnect", "retry_on_failed_connect", "randomize", "discover", "no_echo", "framed")

#: The port of a URL that names none. IANA's port for NATS.
DEFAULT_PORT = 4222
DEFAULT_URL = "nats://127.0.0.1:4222"
#: Seconds for dialing one server: TCP, TLS, INFO and PONG together. Default of nats.go (DefaultTimeout).
CONNECT_TIMEOUT = 2.0
#: Seconds between client PINGs. Default of nats.go (DefaultPingInterval).
PING_INTERVAL = 120.0
#: PINGs without PONG after which the link counts as stale. Default of nats.go (DefaultMaxPingOut).
MAX_PINGS_OUTSTANDING = 2
#: Seconds that one write may block before the link counts as dead. The server's own write_deadline is 10 s.
WRITE_TIMEOUT = 10.0
#: Seconds that a framed stream outlasts the silence of the other side: enough for a reconnect.
RESUME_GRACE = 10.0
#: Seconds of silence between the ends of idle streams before one asks. gRPC's servers ask after 2 hours, proxies cut
#: after 60 s, and a person gives up after 10.
HEARTBEAT = 5.0
#: The shortest heartbeat: a requester must not have itself asked all the time.
LEAST_HEARTBEAT = 0.1
#: Bytes kept for the next link while there is none. Default of nats.go (DefaultReconnectBufSize).
RECONNECT_BUFFER_BYTES = 8 << 20
#: Bytes of a control line's arguments that the server takes. Default of nats-server (max_control_line); INFO does not
#: tell it.
MAX_CONTROL_LINE = 4096
#: The least of it: that of the oldest servers. Lines that are no longer need no look at the option.
LEAST_CONTROL_LINE = 512
#: The part of a line that inbox_prefix may take: some lines have two inboxes.
INBOX_PART = 4


@dataclass(frozen=True)
class Sentinels:
    """The payloads that end a plain stream; both sides must agree on them.

    Sentinels.EMPTY ends with an empty message, as `nats request --wait-for-empty` and request-many clients expect.

    Attributes:
        end: the payload of the last message.
        error_prefix: what the payload of an error message starts with; the text follows.
    """

    EMPTY: ClassVar[Sentinels]

    end: bytes = b"__STREAM_END__"
    error_prefix: bytes = b"__STREAM_ERROR__:"

    def __post_init__(self) -> None:
        if not self.error_prefix or self.end.startswith(self.error_prefix):
            raise InvalidArgument("the error prefix must not be empty, and the end must not look like an error")

    @property
    def common_start(self) -> bytes:
        """What every payload that ends a stream starts with: one quick test passes ordinary chunks."""
        pairs = zip(self.end, self.error_prefix, strict=False)
        return bytes(one for one, other in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def forges(self, payload: bytes) -> bool:
        """Whether a chunk with this payload would be taken for the end of its stream."""
        return payload == self.end or payload.startswith(self.error_prefix)


Sentinels.EMPTY = Sentinels(end=b"")


@dataclass(frozen=True)
class Server:
    """One server's address; .user, .password and .token come from its URL.

    Attributes:
        tls_name: the name that its certificate must have, where it is not the host's.
    """

    host: str
    port: int
    tls: bool = False
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    tls_name: str | None = None

    @property
    def is_address(self) -> bool:
        """Whether the host is an IP address, not a name that needs to be resolved."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.tls else 'nats'}://{host}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class ConnectOptions:
    """Options of Client, Subscriber, ConnectionPool and connect().

    Attributes:
        name: what the server's monitoring shows this connection as.
        user, password, token: credentials; those in a server's URL go first. Each may be a function that returns it,
            called at every attempt to connect, on the connection's own thread; user() may return (user, password). What
            it raises fails that attempt, and only the exception's type is told.
        credentials: path of a .creds file, read at every attempt to connect; or the text of one. Needs the extra
            `nkeys`.
        nkey_seed: the seed of a user's nkey, or a function that returns it. Needs the extra `nkeys`.
        tls: an ssl.SSLContext, True for the system's default (which verifies), None to follow the URL and server, or
            False to speak no TLS: then a server that requires it is refused, and a tls:// URL is an InvalidArgument.
        tls_hostname: the name to verify, where it is not the URL's.
        tls_first: whether TLS starts before the server's greeting, for servers with handshake_first; implies TLS.
        connect_timeout: seconds for one server: TCP, TLS and handshake together.
        ping_interval: seconds between PINGs; None sends none.
        max_pings_outstanding: unanswered PINGs after which the link counts as lost.
        write_timeout: seconds a write may stand still before the link counts as lost; None waits for ever.
        reconnect: whether a lost link is made again.
        max_reconnects: walks over the servers before giving up for good; -1 never gives up.
        reconnect_wait, reconnect_wait_max: seconds between walks, doubling from the first to the second.
        reconnect_jitter: the part of a wait that is random, 0 to 1.
        reconnect_buffer_bytes: how much may wait for the next link; 0 refuses to publish without a link.
        retry_on_failed_connect: open() returns at once, and connecting goes on in the background until it succeeds.
        randomize: whether the servers are tried in random order.
        discover: whether servers that the cluster tells of are used too.
        no_echo: whether the server should withhold this connection's own messages from its subscriptions.
        inbox_prefix: first tokens of every inbox subject.
        max_message_bytes: largest message taken from the server.
        max_control_line: bytes that a subject, with its reply subject or queue group, may take in what is sent, the
            numbers behind it included; longer ones are an InvalidArgument, where the server would end the link. For
            servers configured otherwise: they do not tell.
        sentinels: what ends a plain stream.
        framed: whether streams with peers that are natsync too have credit, numbers and resumption; False speaks
            plain mode with everybody.
        resume_grace: seconds for which a framed stream waits for the other side when it is not heard from; 0 gives it
            up at the first sign. Of the two sides' values the smaller counts at the responder.
        heartbeat: seconds of silence after which the other side of framed streams is asked for a sign of life.
        on_event: called as on_event(name, info) on a worker, name being one of connected, disconnected, reconnected,
            closed, lame_duck, slow_consumer, error; info is a dict. reconnected comes without disconnected where
            another server has taken over from one in lame duck mode.
        hooks: a natsync.Hooks, or a list of them, for metrics and tracing.
        middleware: a list of natsync.Middleware, which messages pass in its order.
    """

    name: str | None = None
    user: str | Callable[[], str | tuple[str, str]] | None = field(default=None, repr=False)
    password: Secret | None = field(default=None, repr=False)
    token: Secret | None = field(default=None, repr=False)
    credentials: str | os.PathLike[str] | None = field(default=None, repr=False)
    nkey_seed: Secret | None = field(default=None, repr=False)
    tls: ssl.SSLContext | bool | None = None
    tls_hostname: str | None = None
    tls_first: bool = False
    connect_timeout: float = CONNECT_TIMEOUT
    ping_interval: float | None = PING_INTERVAL
    max_pings_outstanding: int = MAX_PINGS_OUTSTANDING
    write_timeout: float | None = WRITE_TIMEOUT
    reconnect: bool = True
    max_reconnects: int = -1
    reconnect_wait: float = 0.5
    reconnect_wait_max: float = 8.0
    reconnect_jitter: float = 0.5
    reconnect_buffer_bytes: int = RECONNECT_BUFFER_BYTES
    retry_on_failed_connect: bool = False
    randomize: bool = True
    discover: bool = True
    no_echo: bool = False
    inbox_prefix: str = "_INBOX"
    max_message_bytes: int = 64 << 20
    max_control_line: int = MAX_CONTROL_LINE
    sentinels: Sentinels = Sentinels()
    framed: bool = True
    resume_grace: float = RESUME_GRACE
    heartbeat: float = HEARTBEAT
    on_event: Callable[[str, dict[str, Any]], object] | None = field(default=None, repr=False)
    hooks: _hooks.HooksOption = field(default=None, repr=False)
    middleware: _middleware.MiddlewareOption = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in ("connect_timeout", "ping_interval", "write_timeout", "reconnect_wait", "reconnect_wait_max"):
            check_timeout(getattr(self, name), name)
        for name in ("reconnect_wait", "reconnect_wait_max"):
            if getattr(self, name) is None:
                raise InvalidArgument(f"{name}=None: a number of seconds")
        for name in ("resume_grace", "heartbeat"):
            if check_timeout(getattr(self, name), name) is None:
                raise InvalidArgument(f"{name}={getattr(self, name)}: a number of seconds")
        if self.heartbeat < LEAST_HEARTBEAT:
            raise InvalidArgument(f"heartbeat={self.heartbeat}: at least {LEAST_HEARTBEAT} s")
        for name in SWITCHES:  # "false", of a configuration in the environment, would be true
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is True or False, not {type(getattr(self, name)).__name__}")
        if not self.connect_timeout:
            raise InvalidArgument("connect_timeout must be more than 0 s")
        _check_whole("max_pings_outstanding", self.max_pings_outstanding, 1)
        _check_whole("max_reconnects", self.max_reconnects, -1)
        _check_whole("reconnect_buffer_bytes", self.reconnect_buffer_bytes, 0)
        _check_whole("max_message_bytes", self.max_message_bytes, 1)
        _check_whole("max_control_line", self.max_control_line, LEAST_CONTROL_LINE)
        if isinstance(self.reconnect_jitter, bool) or not isinstance(self.reconnect_jitter, int | float):
            raise TypeError(f"reconnect_jitter is a number from 0 to 1, not {type(self.reconnect_jitter).__name__}")
        if not 0 <= self.reconnect_jitter <= 1:
            raise InvalidArgument(f"reconnect_jitter={self.reconnect_jitter!r}: from 0 to 1")
        if len(_prefix(self.inbox_prefix)) > self.max_control_line // INBOX_PART:
            most = self.max_control_line // INBOX_PART
            raise InvalidArgument(f"inbox_prefix: at most {most} bytes, a quarter of max_control_line")
        for name in ("name", "tls_hostname"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"{name} is a str or None, not {type(getattr(self, name)).__name__}")
        if not isinstance(self.sentinels, Sentinels):
            raise TypeError(f"sentinels is a natsync.Sentinels, not {type(self.sentinels).__name__}")
        if self.on_event is not None and not callable(self.on_event):
            raise TypeError(f"on_event is a function (name, info), not {type(self.on_event).__name__}")
        object.__setattr__(self, "hooks", _hooks.checked(self.hooks))
        object.__setattr__(self, "middleware", _middleware.checked(self.middleware))
        if not isinstance(self.tls, ssl.SSLContext | bool | None):
            raise TypeError(f"tls is an ssl.SSLContext, True, False or None, not {type(self.tls).__name__}")
        if self.tls_first and self.tls is False:
            raise InvalidArgument("tls_first=True and tls=False contradict each other")
        self._check_credentials()

    def filled(self, given: Mapping[str, Any]) -> ConnectOptions:
        """These options, with those given where these are at their defaults; credentials only where there are none.

        Raises:
            What ConnectOptions() raises.
        """
        has_credentials = any(getattr(self, name) is not None for name in CREDENTIALS)
        open_ones = {one.name for one in fields(self) if getattr(self, one.name) == one.default}
        skipped = {*CREDENTIALS, "password"} if has_credentials else set()
        return replace(self, **{name: value for name, value in given.items() if name in open_ones - skipped})

    def _check_credentials(self) -> None:
        for name in ("user", "password", "token", "nkey_seed"):
            value = getattr(self, name)
            if not isinstance(value, str | None) and not callable(value):
                raise TypeError(f"{name} is a str, a function that returns one, or None, not {type(value).__name__}")
        if not isinstance(self.credentials, str | os.PathLike | None):
            raise TypeError(f"credentials is the path of a .creds file, not {type(self.credentials).__name__}")
        given = [name for name in CREDENTIALS if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidArgument(f"{' and '.join(given)} are credentials of different kinds: give one")
        if self.password is not None and self.user is None:
            raise InvalidArgument("password without user")
        if self.credentials is not None or self.nkey_seed is not None:
            check_library()
        if isinstance(self.nkey_seed, str):
            check_seed(self.nkey_seed)
        if isinstance(self.credentials, str) and CREDS_MARK in self.credentials:
            parse_creds(self.credentials)


def _prefix(prefix: str) -> bytes:
    if not isinstance(prefix, str):
        raise TypeError(f"inbox_prefix is a str, not {type(prefix).__name__}")
    try:
        return _subject.publish_subject(prefix)
    except InvalidArgument as error:
        raise InvalidArgument(f"inbox_prefix: {error}") from None


class Options(TypedDict, total=False):
    """The fields of ConnectOptions as keyword arguments, for type checkers, as `**options: Unpack[Options]`."""

    name: str | None
    user: str | Callable[[], str | tuple[str, str]] | None
    password: Secret | None
    token: Secret | None
    credentials: str | os.PathLike[str] | None
    nkey_seed: Secret | None
    tls: ssl.SSLContext | bool | None
    tls_hostname: str | None
    tls_first: bool
    connect_timeout: float
    ping_interval: float | None
    max_pings_outstanding: int
    write_timeout: float | None
    reconnect: bool
    max_reconnects: int
    reconnect_wait: float
    reconnect_wait_max: float
    reconnect_jitter: float
    reconnect_buffer_bytes: int
    retry_on_failed_connect: bool
    randomize: bool
    discover: bool
    no_echo: bool
    inbox_prefix: str
    max_message_bytes: int
    max_control_line: int
    sentinels: Sentinels
    framed: bool
    resume_grace: float
    heartbeat: float
    on_event: Callable[[str, dict[str, Any]], object] | None
    hooks: _hooks.HooksOption
    middleware: _middleware.MiddlewareOption


def _check_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a whole number, not {type(value).__name__}")
    if value < least:
        raise InvalidArgument(f"{name}={value!r}: at least {least}")


def connect_options(given: Mapping[str, Any]) -> ConnectOptions:
    """Options from keyword arguments.

    Raises:
        TypeError: there is no such option, or it is of the wrong type.
        InvalidArgument: its value makes no sense.
    """
    known = {one.name for one in fields(ConnectOptions)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise TypeError(f"unknown option {', '.join(unknown)}; options are {', '.join(sorted(known))}")
    return ConnectOptions(**given)


def connect_settings(servers: Servers, given: Mapping[str, Any]) -> tuple[list[Server], ConnectOptions]:
    """Servers, as parse_servers() reads them, and options, as connect_options() does, that go together.

    Raises:
        InvalidArgument: a server is to be spoken to over TLS by its URL, and not by the options.
        What those two raise.
    """
    parsed, options = parse_servers(servers), connect_options(given)
    safe = next((server for server in parsed if server.tls), None)
    if safe is not None and options.tls is False:
        raise InvalidArgument(f"{safe} and tls=False contradict each other: write nats://, or leave tls out")
    return parsed, options


def parse_servers(servers: Servers) -> list[Server]:
    """The servers meant by a URL, a comma-separated list of them or an iterable; NATS_URL or localhost for None.

    Raises:
        InvalidURL: a URL is empty, has an unknown scheme, an impossible port, or parts that NATS has no use for.
        TypeError: they are something else, or a URL is not a str.
    """
    if servers is None:
        servers = os.environ.get("NATS_URL") or DEFAULT_URL
    if isinstance(servers, bytes) or not isinstance(servers, Iterable):
        raise TypeError(f"servers is a URL as a str, an iterable of them or None, not {type(servers).__name__}")
    texts = [servers] if isinstance(servers, str) else list(servers)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"servers: a URL is a str, not {type(text).__name__}")
    urls = [url.strip() for text in texts for url in text.split(",") if url.strip()]
    if not urls:
        raise InvalidURL("no server URL given")
    return [parse_server(url) for url in urls]


def parse_server(url: str) -> Server:
    """One server from its URL: nats://host:port, tls://host:port or host:port, with user:password@ or token@ in front.

    Raises:
        InvalidURL: as for parse_servers().
    """
    if not isinstance(url, str):
        raise TypeError("a server URL is a str")
    # No part of the URL is quoted in an error: where it is malformed, any may hold credentials.
    if any(char.isspace() or not char.isprintable() for char in url):
        raise InvalidURL("a server URL contains white space or a control character")
    parts, port, fault = _split(url if "://" in url else f"nats://{url}")
    if parts is None:
        raise InvalidURL(f"a server URL cannot be parsed: {fault}")
    if parts.scheme not in ("nats", "tls"):
        raise InvalidURL(f"unknown scheme {parts.scheme!r} in a server URL; use nats:// or tls://")
    if not parts.hostname:
        raise InvalidURL("a server URL has no usable host name; write nats://host:port")
    if port == 0:
        raise InvalidURL("port 0 in a server URL")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise InvalidURL("a server URL has a path, query or fragment, which NATS has not; percent-encode / ? # in it")
    user, password, token = _userinfo(parts)
    return Server(parts.hostname, port or DEFAULT_PORT, parts.scheme == "tls", user, password, token)


def _split(url: str) -> tuple[SplitResult | None, int | None, str]:
    """(parts, port, ""), or (None, None, what is wrong): the ValueError quotes the URL, so nothing may chain to it."""
    try:
        parts = urlsplit(url)
        return parts, parts.port, ""
    except ValueError as error:
        about_port = "port" in str(error).lower()
    return None, None, "its port is not a number from 1 to 65535" if about_port else "malformed"


def _userinfo(parts: SplitResult) -> tuple[str | None, str | None, str | None]:
    """(user, password, token): a user without a password is a token."""
    if not parts.username:
        return None, None, None
    if parts.password is None:
        return None, None, unquote(parts.username)
    return unquote(parts.username), unquote(parts.password), None
