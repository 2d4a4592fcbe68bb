"""natsync.options: options and server URLs, checked before anything is dialed."""

from __future__ import annotations

import itertools
import ssl
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import nkeys
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsync import _pynats2
from natsync.errors import InvalidArgument, InvalidURL
from natsync.options import (
    DEFAULT_PORT,
    LEAST_HEARTBEAT,
    SWITCHES,
    ConnectOptions,
    Sentinels,
    Server,
    connect_options,
    parse_server,
    parse_servers,
)
from secrecy import MARKER, secret
from support import run_python, shown

# -- URLs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("nats://h:1", Server("h", 1)),
        ("nats://h", Server("h", DEFAULT_PORT)),
        ("nats://h/", Server("h", DEFAULT_PORT)),
        ("h", Server("h", DEFAULT_PORT)),
        ("h:65535", Server("h", 65535)),
        ("127.0.0.1:1", Server("127.0.0.1", 1)),
        ("tls://h:1", Server("h", 1, tls=True)),
        ("NATS://H:1", Server("h", 1)),
        ("nats://[::1]:1", Server("::1", 1)),
        ("[::1]", Server("::1", DEFAULT_PORT)),
        ("nats://u:p@h:1", Server("h", 1, user="u", password="p")),
        ("u:p@h", Server("h", DEFAULT_PORT, user="u", password="p")),
        ("nats://u:@h", Server("h", DEFAULT_PORT, user="u", password="")),
        ("nats://t@h", Server("h", DEFAULT_PORT, token="t")),
        ("nats://u%40x:p%2F%3A@h", Server("h", DEFAULT_PORT, user="u@x", password="p/:")),
        ("nats://u:p@ss@h", Server("h", DEFAULT_PORT, user="u", password="p@ss")),
        ("nats://@h", Server("h", DEFAULT_PORT)),
    ],
)
def test_a_url_names_a_server(url: str, server: Server) -> None:
    assert parse_server(url) == server


@pytest.mark.parametrize(
    "url",
    [
        "http://h", "ws://h", "x://h", "://h", "nats://", "nats:///", "nats://:4222", "nats://u:p@", "nats://h:port",
        "nats://h:99999", "nats://h:-1", "nats://h:0", "nats://h:1.5", "nats://h/path", "nats://h?a=1", "nats://h#x", "nats://[::1",
        "nats://a b", "nats://a\tb:1 2",
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(InvalidURL):
        parse_server(url)


def test_a_refused_url_is_also_what_pynats2_and_plain_code_would_catch() -> None:
    with pytest.raises(InvalidURL) as caught:
        parse_server("http://h")
    for kind in (InvalidArgument, ValueError, _pynats2.NATSInvalidUrlError, _pynats2.NATSInvalidSchemeError):
        assert isinstance(caught.value, kind)
    assert "http" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "nats://user:hunter2@h:port", "nats://user:hunter2@h:99999", "nats://user:hunter2@h/path", "nats://user:hunter2@",
        "ftp://user:hunter2@h", "nats://user:hun/hunter2@h", "nats://user:[hunter2@h", "nats://hunter2/x@h",
        "nats://hunter2#x@h:4222", "nats://hunter2?x@h", "nats://user:x#hunter2@h", "hunter2/x@h",
    ],
)  # fmt: skip
def test_a_refusal_never_shows_credentials(url: str) -> None:
    with pytest.raises(InvalidURL) as caught:
        parse_server(url)
    shown = f"{caught.value!s} {caught.value!r} {caught.value.line} {caught.value.__cause__} {caught.value.args}"
    assert "hunter2" not in shown
    assert caught.value.__context__ is None  # nor what it stands in for


def test_a_server_shows_neither_user_nor_password_nor_token() -> None:
    server = parse_server("nats://user:hunter2@h:1")
    assert "hunter2" not in f"{server} {server!r}"
    assert "user" not in str(server)
    assert "hunter2" not in repr(parse_server("nats://hunter2@h"))


@pytest.mark.parametrize(
    ("server", "text"),
    [
        (Server("h", 1), "nats://h:1"),
        (Server("h", 1, tls=True), "tls://h:1"),
        (Server("::1", 1), "nats://[::1]:1"),
        (Server("h", 1, user="u", password="p"), "nats://h:1"),
    ],
)
def test_a_server_reads_as_a_url(server: Server, text: str) -> None:
    assert str(server) == text


@given(st.sampled_from(["h", "a.example", "10.0.0.1", "::1"]), st.integers(1, 65535), st.booleans())
def test_what_a_server_reads_as_parses_to_it(host: str, port: int, tls: bool) -> None:
    server = Server(host, port, tls)
    assert parse_server(str(server)) == server


@given(st.text(max_size=30))
def test_any_text_is_a_server_or_refused(text: str) -> None:
    try:
        server = parse_server(text)
    except InvalidURL:
        return
    assert server.host
    assert 0 < server.port < 65536


# -- several URLs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "servers",
    ["nats://a:1,nats://b:2", " nats://a:1 , nats://b:2 ,", ["nats://a:1", "b:2"], ("a:1,b:2",), iter(["a:1", "b:2"])],
    ids=shown,
)
def test_servers_are_a_url_or_several(servers: Any) -> None:
    assert parse_servers(servers) == [Server("a", 1), Server("b", 2)]


@pytest.mark.parametrize("servers", ["", " , ", [], [""], [" "]])
def test_no_server_at_all_is_refused(servers: Any) -> None:
    with pytest.raises(InvalidURL, match="no server URL"):
        parse_servers(servers)


@pytest.mark.parametrize("servers", [5, b"nats://h", [b"nats://h"], [None], ["h", 5]])
def test_servers_that_are_no_text_are_a_type_error(servers: Any) -> None:
    with pytest.raises(TypeError):
        parse_servers(servers)


def test_one_bad_url_among_several_is_refused() -> None:
    with pytest.raises(InvalidURL):
        parse_servers("nats://a,http://b")


def test_the_environment_names_the_servers_if_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_URL", "nats://env:7,other")
    assert parse_servers(None) == [Server("env", 7), Server("other", DEFAULT_PORT)]
    assert parse_servers("h") == [Server("h", DEFAULT_PORT)]


@pytest.mark.parametrize("value", [None, ""])
def test_without_any_word_the_server_is_here(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)
    if value is not None:
        monkeypatch.setenv("NATS_URL", value)
    assert parse_servers(None) == [Server("127.0.0.1", 4222)]


# -- options ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_valid_and_bounded() -> None:
    options = connect_options({})
    assert options == ConnectOptions()
    assert (options.reconnect_buffer_bytes, options.max_message_bytes) == (8 << 20, 64 << 20)


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"unknown option colour, pasword; options are .*password"):
        connect_options({"pasword": "x", "colour": "red", "name": "n"})


#: The options that are seconds.
TIMES = [
    "connect_timeout", "ping_interval", "write_timeout", "reconnect_wait", "reconnect_wait_max", "resume_grace",
    "heartbeat",
]  # fmt: skip


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("value", [-1, -0.001, float("nan")])
def test_a_negative_time_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidArgument, match=name):
        connect_options({name: value})


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("value", ["5", True, [1]])
def test_a_time_that_is_no_number_is_a_type_error(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        connect_options({name: value})


@pytest.mark.parametrize("value", [0, 0.0, None])
def test_connecting_needs_some_time_and_a_limit(value: float | None) -> None:
    with pytest.raises(InvalidArgument, match="connect_timeout"):
        connect_options({"connect_timeout": value})


@pytest.mark.parametrize("name", ["reconnect_wait", "reconnect_wait_max"])
def test_a_wait_between_walks_has_a_length(name: str) -> None:
    with pytest.raises((InvalidArgument, TypeError), match=name):
        connect_options({name: None})


@pytest.mark.parametrize("name", ["resume_grace", "heartbeat"])
@pytest.mark.parametrize("value", [None, float("inf")])
def test_silence_is_not_borne_for_ever(name: str, value: float | None) -> None:
    with pytest.raises(InvalidArgument, match=name):
        connect_options({name: value})


def test_a_silent_peer_may_be_given_up_at_the_first_sign() -> None:
    assert connect_options({"resume_grace": 0}).resume_grace == 0


def test_a_heartbeat_has_a_least_value() -> None:
    assert connect_options({"heartbeat": LEAST_HEARTBEAT}).heartbeat == LEAST_HEARTBEAT
    for value in (0, LEAST_HEARTBEAT / 2):
        with pytest.raises(InvalidArgument, match=f"heartbeat.*at least {LEAST_HEARTBEAT}"):
            connect_options({"heartbeat": value})


def test_streams_are_framed_unless_it_is_switched_off() -> None:
    assert connect_options({}).framed is True
    assert connect_options({"framed": False}).framed is False


def test_all_switches_are_known() -> None:
    assert {one.name for one in fields(ConnectOptions) if one.type == "bool"} == set(SWITCHES)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [1, 0, "no", "false", None])
def test_a_switch_is_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} is True or False, not {type(value).__name__}"):
        connect_options({name: value})


@pytest.mark.parametrize("name", ["ping_interval", "write_timeout"])
def test_pings_and_the_write_limit_can_be_switched_off(name: str) -> None:
    assert getattr(connect_options({name: None}), name) is None


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("max_pings_outstanding", 1),
        ("max_reconnects", -1),
        ("reconnect_buffer_bytes", 0),
        ("max_message_bytes", 1),
        ("max_control_line", 512),
    ],
)
def test_a_number_has_a_least_value(name: str, least: int) -> None:
    assert getattr(connect_options({name: least}), name) == least
    with pytest.raises(InvalidArgument, match=f"{name}.*at least {least}"):
        connect_options({name: least - 1})
    for value in (1.5, True, "1", None):
        with pytest.raises(TypeError, match=name):
            connect_options({name: value})


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_jitter_is_a_part_of_one(value: float) -> None:
    with pytest.raises(InvalidArgument, match="jitter"):
        connect_options({"reconnect_jitter": value})


@pytest.mark.parametrize("value", ["", "a b", "a.*", "a.", "a\r\nPUB x 0"])
def test_an_inbox_prefix_must_be_a_subject(value: str) -> None:
    with pytest.raises(InvalidArgument):
        connect_options({"inbox_prefix": value})


def test_an_inbox_prefix_leaves_room_in_a_control_line() -> None:
    assert connect_options({"inbox_prefix": "x" * 1024}).inbox_prefix == "x" * 1024
    for options in ({"inbox_prefix": "x" * 1025}, {"inbox_prefix": "x" * 129, "max_control_line": 512}):
        with pytest.raises(InvalidArgument, match=r"inbox_prefix: at most (1024|128) bytes"):
            connect_options(options)


@pytest.mark.parametrize("value", [True, False, None, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)])
def test_tls_is_a_context_or_a_choice(value: Any) -> None:
    assert connect_options({"tls": value}).tls is value


@pytest.mark.parametrize("value", [1, "yes", {}, object()])
def test_another_tls_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="tls"):
        connect_options({"tls": value})


SEED = secret(nkeys.encode_seed(bytes(32), nkeys.PREFIX_BYTE_USER).decode())


def name_of(options: dict[str, Any]) -> str:
    return "+".join(options) or "none"


@pytest.mark.parametrize(
    "secrets",
    [
        {"user": f"{MARKER}-user", "password": f"{MARKER}-password"},
        {"token": MARKER},
        {"nkey_seed": SEED},
        {"credentials": f"{MARKER}/user.creds"},
        {"token": lambda: MARKER},
    ],
    ids=name_of,
)
def test_options_do_not_show_secrets(secrets: dict[str, Any]) -> None:
    options = connect_options({**secrets, "name": "shown"})
    assert not [value for value in (MARKER, SEED) if value in repr(options)]
    assert "shown" in repr(options)


KINDS: list[dict[str, Any]] = [
    {"user": "ada", "password": MARKER},
    {"token": MARKER},
    {"credentials": "user.creds"},
    {"nkey_seed": SEED},
]


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(KINDS, 2)), ids=name_of)
def test_credentials_of_two_kinds_are_refused(one: dict[str, Any], other: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="give one") as caught:
        connect_options({**one, **other})
    assert not [value for value in (MARKER, SEED) if value in str(caught.value)]


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_credentials_of_one_kind_are_taken(kind: dict[str, Any]) -> None:
    options = connect_options(kind)
    assert {name: getattr(options, name) for name in kind} == kind


def test_a_password_without_a_user_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="without user"):
        connect_options({"password": MARKER})


@pytest.mark.parametrize("name", ["user", "password", "token", "nkey_seed", "credentials"])
@pytest.mark.parametrize("value", [5, b"S3CRET", ["S3CRET"], True])
def test_a_secret_of_a_wrong_type_is_a_type_error_that_does_not_show_it(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name) as caught:
        connect_options({"user": "ada", name: value} if name == "password" else {name: value})
    assert MARKER not in str(caught.value)


@pytest.mark.parametrize("name", ["user", "token", "nkey_seed"])
def test_functions_for_secrets_are_not_called_before_there_is_a_server(name: str) -> None:
    called: list[int] = []
    connect_options({name: lambda: called.append(1)})
    assert called == []


@pytest.mark.parametrize(
    "seed", ["", "SUnonsense", SEED[:-1] + "A", SEED.lower()], ids=["empty", "short", "checksum", "case"]
)
def test_a_seed_is_checked_when_it_is_given(seed: str) -> None:
    with pytest.raises(InvalidArgument, match="seed") as caught:
        connect_options({"nkey_seed": seed})
    assert not seed or seed not in str(caught.value)
    assert caught.value.__context__ is None


def test_the_text_of_creds_is_checked_when_it_is_given() -> None:
    with pytest.raises(InvalidArgument, match="JWT"):
        connect_options({"credentials": "-----BEGIN NATS USER JWT-----\nabc"})


@pytest.mark.parametrize("path", ["nowhere/user.creds", Path("nowhere/user.creds")])
def test_a_creds_file_need_not_be_there_yet(path: Any) -> None:
    assert connect_options({"credentials": path}).credentials == path


@pytest.mark.parametrize("options", [{"nkey_seed": SEED}, {"nkey_seed": lambda: SEED}, {"credentials": "x.creds"}])
def test_nkeys_without_the_library_are_refused_with_what_to_install(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nkeys", None)
    with pytest.raises(InvalidArgument, match=r'pip install "natsync\[nkeys\]"'):
        connect_options(options)


def test_only_signing_imports_the_nkeys_library() -> None:
    code = """
        import sys, natsync
        natsync.Client(user="ada", password="x"), natsync.Client(nkey_seed=sys.argv[1])
        print([name for name in ("nkeys", "nacl") if name in sys.modules])
    """
    assert run_python(textwrap.dedent(code), SEED).stdout.strip() == "[]"


@pytest.mark.parametrize("value", [1, "yes", None])
def test_tls_first_is_a_choice(value: Any) -> None:
    with pytest.raises(TypeError, match="tls_first"):
        connect_options({"tls_first": value})


def test_tls_first_without_tls_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="contradict"):
        connect_options({"tls_first": True, "tls": False})


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("fe80::1%eth0", True),
        ("localhost", False),
        ("10.example", False),
        ("", False),
    ],
)
def test_a_server_knows_whether_its_host_is_an_address(host: str, address: bool) -> None:
    assert Server(host, 1).is_address is address


def test_options_cannot_be_changed_afterwards() -> None:
    with pytest.raises(AttributeError):
        ConnectOptions().name = "x"  # type: ignore[misc]


# -- sentinels -------------------------------------------------------------------------------------------------------


def test_the_default_sentinels_are_those_of_the_go_system() -> None:
    assert (Sentinels().end, Sentinels().error_prefix) == (b"__STREAM_END__", b"__STREAM_ERROR__:")


@pytest.mark.parametrize(
    ("payload", "forged"),
    [
        (b"__STREAM_END__", True),
        (b"__STREAM_END__ ", False),
        (b" __STREAM_END__", False),
        (b"__STREAM_END_", False),
        (b"__STREAM_ERROR__:", True),
        (b"__STREAM_ERROR__: boom", True),
        (b"__STREAM_ERROR__", False),
        (b"", False),
    ],
)
def test_a_chunk_that_looks_like_an_end_is_known(payload: bytes, forged: bool) -> None:
    assert Sentinels().forges(payload) is forged


def test_with_empty_sentinels_only_the_empty_chunk_and_errors_are_forged() -> None:
    assert Sentinels.EMPTY.end == b""
    assert Sentinels.EMPTY.forges(b"")
    assert Sentinels.EMPTY.forges(b"__STREAM_ERROR__:x")
    assert not Sentinels.EMPTY.forges(b"__STREAM_END__")


@given(st.binary(max_size=6), st.binary(min_size=1, max_size=6), st.binary(max_size=8))
def test_everything_that_ends_a_stream_begins_with_the_common_start(end: bytes, prefix: bytes, rest: bytes) -> None:
    if end.startswith(prefix):
        with pytest.raises(InvalidArgument):
            Sentinels(end, prefix)
        return
    sentinels = Sentinels(end, prefix)
    for payload in (end, prefix + rest, rest):
        assert payload.startswith(sentinels.common_start) or not sentinels.forges(payload)


def test_an_empty_error_prefix_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        Sentinels(error_prefix=b"")


def test_options_are_filled_where_they_are_at_their_defaults() -> None:
    options = connect_options({"name": "mine", "ping_interval": 5.0})
    filled = options.filled({"name": "other", "inbox_prefix": "_MINE", "user": "ada", "password": "S3CRET"})
    assert (filled.name, filled.inbox_prefix, filled.ping_interval) == ("mine", "_MINE", 5.0)
    assert (filled.user, filled.password) == ("ada", "S3CRET")
    assert (options.inbox_prefix, options.user) == ("_INBOX", None)  # and not changed themselves


def test_credentials_are_filled_only_where_there_are_none() -> None:
    given = {"user": "ada", "password": "S3CRET"}
    assert connect_options({"token": "S3CRET-token"}).filled(given).user is None
    assert connect_options({"user": "bob"}).filled(given).password is None
