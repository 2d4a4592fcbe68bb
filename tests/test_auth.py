"""Credentials: where they come from at each attempt, what a real server makes of them, and that they show nowhere."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import natsync
from broker import QUICK, Events
from credentials import Key, Operator, encode, nkey_users
from natsync import auth
from natsync.errors import AuthorizationError, ConnectError, NatsError, NoServersError
from natsync.nkey import find_seed
from natsync.options import ConnectOptions, Server, parse_server
from natsync.testing import NatsServer, PeerConnection, ScriptedPeer, eventually
from natsync.transport import dial
from secrecy import MARKER, secret

#: Secrets of the tests; the suite looks for MARKER in whatever natsync logs or raises.
PASSWORD, TOKEN = f"{MARKER}-password", f"{MARKER}-token"
SERVER = Server("h", 1)

USERS = f'authorization {{ users = [ {{ user: "ada", password: "{PASSWORD}" }} ] }}\n'
TOKENS = f'authorization {{ token: "{TOKEN}" }}\n'


def fetched(server: Server = SERVER, **options: Any) -> dict[str, str]:
    """The fields of CONNECT for a server that asks for no signature."""
    return auth.fetch(ConnectOptions(**options), server).fields("")


def fields(nonce: str, **options: Any) -> dict[str, str]:
    """The fields of CONNECT for a server with this nonce."""
    return auth.fetch(ConnectOptions(**options), SERVER).fields(nonce)


def unavailable(**options: Any) -> str:
    """The text of the ConnectError of an attempt whose credentials cannot be had; its chain must hold no secret."""
    with pytest.raises(ConnectError) as caught:
        auth.fetch(ConnectOptions(**options), SERVER).fields("nonce")
    assert_clean(caught.value)
    return str(caught.value)


def assert_clean(error: BaseException, *secrets: str) -> None:
    """Neither the error nor any that it came of, shown or hidden, holds a secret."""
    waiting: list[object] = [error]
    seen = []
    while waiting:
        one = waiting.pop()
        if isinstance(one, BaseException) and one not in seen:
            seen.append(one)
            text = f"{one!s} {one!r} {one.args} {vars(one)} {''.join(traceback.format_exception(one))}"
            assert not [hidden for hidden in (MARKER, *secrets) if hidden in _without_code(text)]
            waiting += [one.__cause__, one.__context__, *getattr(one, "causes", {}).values()]


def _without_code(text: str) -> str:
    """A formatted traceback without the lines of source: the test's own name the marker."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


# -- where they come from --------------------------------------------------------------------------------------------


def test_without_credentials_there_are_none() -> None:
    assert fetched() == {}


def test_user_and_password_may_come_from_functions() -> None:
    assert fetched(user=lambda: "ada", password=lambda: PASSWORD) == {"user": "ada", "pass": PASSWORD}


def test_one_function_may_return_user_and_password() -> None:
    assert fetched(user=lambda: ("ada", PASSWORD)) == {"user": "ada", "pass": PASSWORD}


def test_a_user_alone_has_an_empty_password() -> None:
    assert fetched(user="ada") == fetched(user=lambda: "ada") == {"user": "ada", "pass": ""}


def test_a_token_may_come_from_a_function() -> None:
    assert fetched(token=lambda: TOKEN) == {"auth_token": TOKEN}


def test_credentials_of_the_url_go_first_and_no_function_is_called() -> None:
    called: list[int] = []
    server = parse_server(f"nats://eve:{PASSWORD}@h")
    assert fetched(server, token=lambda: called.append(1)) == {"user": "eve", "pass": PASSWORD}
    assert called == []


def test_functions_are_called_anew_for_each_attempt() -> None:
    numbers = iter(range(9))
    options = ConnectOptions(token=lambda: f"{TOKEN}-{next(numbers)}")
    assert [auth.fetch(options, SERVER).fields("") for _ in range(3)] == [
        {"auth_token": f"{TOKEN}-{n}"} for n in range(3)
    ]


def test_an_nkey_is_proved_by_key_and_signature() -> None:
    key = Key()
    expected = {"nkey": key.public, "sig": encode(key.sign(b"the-nonce"))}
    assert fields("the-nonce", nkey_seed=key.seed) == fields("the-nonce", nkey_seed=lambda: key.seed) == expected


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("how", [str, Path, "text"])
def test_creds_are_proved_by_jwt_and_signature(tmp_path: Path, how: Any, ending: str) -> None:
    key, path = Key(), tmp_path / "user.creds"
    text = Operator().user(key=key).replace("\n", ending)
    path.write_bytes(text.encode())
    sent = fields("the-nonce", credentials=text if how == "text" else how(path))
    assert sent == {"jwt": text.split()[4], "sig": encode(key.sign(b"the-nonce"))}


def test_the_creds_file_is_read_anew_for_each_attempt(tmp_path: Path) -> None:
    path, keys = tmp_path / "user.creds", [Key(), Key()]
    options = ConnectOptions(credentials=path)
    for key in keys:
        path.write_text(Operator().user(key=key))
        assert auth.fetch(options, SERVER).fields("n")["sig"] == encode(key.sign(b"n"))


def test_the_creds_file_may_be_in_ones_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "user.creds").write_text(Operator().user())
    assert set(fields("n", credentials="~/user.creds")) == {"jwt", "sig"}


def test_credentials_do_not_show_themselves() -> None:
    creds = Operator().user()
    for options in (
        {"token": TOKEN},
        {"user": "ada", "password": PASSWORD},
        {"nkey_seed": Key().seed},
        {"credentials": creds},
    ):
        given = ConnectOptions(**options)
        shown = f"{given!r} {auth.fetch(given, SERVER)!r}"
        assert not [value for value in options.values() if value in shown]


# -- what cannot be had ----------------------------------------------------------------------------------------------


def fail() -> str:
    raise LookupError(f"the vault did not take {TOKEN}")


@pytest.mark.parametrize(
    "options", [{"token": fail}, {"user": fail}, {"user": "ada", "password": fail}, {"nkey_seed": fail}]
)
def test_a_function_that_raises_is_told_by_type_and_place_alone(options: dict[str, Any]) -> None:
    text = unavailable(**options)
    assert "() raised LookupError (test_auth.py, line" in text


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_not_even_an_exit_of_a_function_ends_more_than_the_attempt(error: type[BaseException]) -> None:
    def leave() -> str:
        raise error(TOKEN)

    assert error.__name__ in unavailable(token=leave)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"token": lambda: None}, "token() returned NoneType, not a str"),
        ({"token": lambda: TOKEN.encode()}, "token() returned bytes"),
        ({"nkey_seed": lambda: [TOKEN]}, "nkey_seed() returned list"),
        ({"user": "ada", "password": lambda: 5}, "password() returned int"),
        ({"user": lambda: 5}, "user() returned int, not a str or a pair"),
        ({"user": lambda: ("ada", None)}, "user() returned (str, NoneType)"),
        ({"user": lambda: ("ada", TOKEN, "x", "y")}, "user() returned (str, str, str, …)"),
        ({"user": lambda: ("ada", TOKEN), "password": "x"}, "the option password is given too"),
    ],
)
def test_a_function_that_returns_something_else_is_told_by_type_alone(options: dict[str, Any], told: str) -> None:
    assert told in unavailable(**options)


def test_a_seed_that_a_function_returns_is_checked() -> None:
    seed = Key().seed
    other = "B" if seed[20] == "A" else "A"
    assert "nkey_seed: the nkey seed has a wrong checksum" in unavailable(
        nkey_seed=lambda: seed[:20] + other + seed[21:]
    )


def test_a_missing_creds_file_is_told_by_name(tmp_path: Path) -> None:
    text = unavailable(credentials=tmp_path / "nowhere.creds")
    assert "nowhere.creds' cannot be read: No such file or directory" in text


def test_a_secret_given_in_place_of_the_file_is_not_told() -> None:
    seed = Key().seed
    text = unavailable(credentials=seed)
    assert "the file that the option credentials names cannot be read" in text
    assert seed not in text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "BEGIN to END NATS USER JWT"),
        (b"\xff\xfe\x00garbage" * 50, "BEGIN to END NATS USER JWT"),
        (b"x" * (auth.MAX_CREDS_BYTES + 1), "too large"),
    ],
)
def test_a_garbled_creds_file_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "user.creds"
    path.write_bytes(content)
    assert told in unavailable(credentials=path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff\xfe\x00garbage", "not an nkey seed"),
        (b"x" * (auth.MAX_CREDS_BYTES + 1), "cannot be read: it is too large"),
    ],
)
def test_a_file_of_a_seed_is_read_with_the_same_care(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "ada.nk"
    path.write_bytes(content)
    with pytest.raises(ConnectError, match=r"ada\.nk.*" + told):
        auth.read_file(path, find_seed)


def test_a_byte_order_mark_before_a_seed_does_not_matter(tmp_path: Path) -> None:
    path, seed = tmp_path / "ada.nk", Key().seed
    path.write_text(seed, "utf-8-sig")
    assert auth.read_file(path, find_seed) == seed


def test_a_directory_is_no_creds_file(tmp_path: Path) -> None:
    assert "Is a directory" in unavailable(credentials=tmp_path)


def test_a_file_name_that_cannot_be_is_told() -> None:
    assert "ValueError" in unavailable(credentials="nul\0byte.creds")


def test_creds_with_half_of_them_cut_off_do_not_show_the_rest(tmp_path: Path) -> None:
    path, text = tmp_path / "user.creds", Operator().user()
    path.write_text(text[: text.index("END USER")])
    with pytest.raises(ConnectError) as caught:
        auth.fetch(ConnectOptions(credentials=path), SERVER)
    assert_clean(caught.value, text.split()[4], text.split("-----")[6].strip())


def test_a_library_that_cannot_be_imported_fails_the_attempt_only(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ConnectOptions(nkey_seed=Key().seed)
    monkeypatch.setitem(sys.modules, "nkeys", None)
    with pytest.raises(ConnectError, match=r'pip install "natsync\[nkeys\]"'):
        auth.fetch(options, SERVER).fields("nonce")


def test_what_a_server_repeats_of_a_secret_is_hidden() -> None:
    creds = Operator().user()
    for options in ({"token": TOKEN}, {"user": "ada", "password": PASSWORD}, {"credentials": creds}):
        given = auth.fetch(ConnectOptions(**options), SERVER)
        for value in set(given.fields("nonce").values()) - {"ada"} - {given.fields("nonce").get("sig")}:
            assert given.hide(f"you said {value}, did you?") == "you said ***, did you?"


# -- what a real server makes of them --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def operator() -> Operator:
    return Operator()


@pytest.fixture(scope="module")
def operated(operator: Operator) -> Iterator[NatsServer]:
    """A server in operator mode: users prove who they are by a JWT of its account."""
    with NatsServer(config=operator.config()) as server:
        yield server


def works(server: NatsServer, **options: Any) -> bool:
    """Whether a client with these options gets an answer."""
    with natsync.connect(server.url, **options) as client:
        client.subscribe("auth.echo", lambda message: message.respond(message.data))
        return bool(client.request("auth.echo", b"x").data == b"x")


def refusal(server: NatsServer, *secrets: str, **options: Any) -> NatsError:
    """Why the server was not connected to; no secret is in it."""
    with pytest.raises(NoServersError) as raised:
        natsync.connect(server.url, **options)
    assert_clean(raised.value, *secrets)
    (cause,) = raised.value.causes.values()
    assert isinstance(cause, NatsError)
    return cause


@pytest.mark.parametrize(
    "options",
    [
        {"user": "ada", "password": PASSWORD},
        {"user": lambda: "ada", "password": lambda: PASSWORD},
        {"user": lambda: ("ada", PASSWORD)},
    ],
)
def test_a_user_with_the_right_password_is_let_in(
    make_nats_server: Callable[..., NatsServer], options: dict[str, Any]
) -> None:
    server = make_nats_server(config=USERS)
    assert works(server, **options)
    wrong = {**options, "password": f"{MARKER}-wrong"} if "password" in options else {"user": lambda: ("ada", MARKER)}
    assert isinstance(refusal(server, **wrong), AuthorizationError)


def test_a_token_of_a_function_is_let_in(make_nats_server: Callable[..., NatsServer]) -> None:
    server = make_nats_server(config=TOKENS)
    assert works(server, token=lambda: TOKEN)
    assert isinstance(refusal(server, token=lambda: f"{MARKER}-wrong"), AuthorizationError)


def test_an_nkey_user_is_let_in(make_nats_server: Callable[..., NatsServer]) -> None:
    key, other = Key(), Key()
    server = make_nats_server(config=nkey_users(key))
    assert works(server, nkey_seed=key.seed)
    assert works(server, nkey_seed=lambda: key.seed)
    assert isinstance(refusal(server, other.seed, nkey_seed=other.seed), AuthorizationError)


def test_a_user_with_creds_is_let_in(operated: NatsServer, operator: Operator, tmp_path: Path) -> None:
    path = tmp_path / "ada.creds"
    path.write_text(operator.user())
    assert works(operated, credentials=str(path))
    assert works(operated, credentials=path)
    assert works(operated, credentials=operator.user())


def test_creds_of_another_account_are_refused(operated: NatsServer) -> None:
    assert isinstance(refusal(operated, credentials=Operator().user()), AuthorizationError)


def test_a_jwt_with_the_seed_of_another_user_is_refused(operated: NatsServer, operator: Operator) -> None:
    key, other = Key(), Key()
    creds = operator.user(key=key).replace(key.seed, other.seed)
    assert isinstance(refusal(operated, credentials=creds), AuthorizationError)


def test_an_expired_jwt_is_refused(operated: NatsServer, operator: Operator) -> None:
    assert isinstance(refusal(operated, credentials=operator.user(lifetime=-10)), AuthorizationError)


def test_an_attempt_without_credentials_at_hand_is_no_refusal_of_the_server(
    operated: NatsServer, tmp_path: Path
) -> None:
    error = refusal(operated, credentials=tmp_path / "gone.creds")
    assert isinstance(error, ConnectError)
    assert not isinstance(error, AuthorizationError)


def test_functions_run_on_the_thread_that_connects(make_nats_server: Callable[..., NatsServer]) -> None:
    threads: list[str] = []

    def token() -> str:
        threads.append(threading.current_thread().name)
        return TOKEN

    assert works(make_nats_server(config=TOKENS), token=token, name="caller")
    assert threads == ["natsync-caller-supervisor"]


def test_the_time_of_a_function_is_not_that_of_the_server(make_nats_server: Callable[..., NatsServer]) -> None:
    def slow() -> str:
        time.sleep(2.2)  # the slowness itself
        return TOKEN

    assert works(make_nats_server(config=TOKENS), token=slow, connect_timeout=2.0)


# -- credentials that change while the client runs -------------------------------------------------------------------


def test_a_jwt_that_expires_ends_the_client_with_a_typed_error(operated: NatsServer, operator: Operator) -> None:
    events = Events()
    client = natsync.connect(operated.url, credentials=operator.user(lifetime=4.9), on_event=events, **QUICK)
    events.wait("closed")
    assert "Authentication Expired" in events.wait("error")["error"]
    with pytest.raises(natsync.ConnectionClosed) as raised:
        client.publish("x")
    assert isinstance(raised.value.__cause__, AuthorizationError)
    client.close()


def test_creds_replaced_in_time_let_the_client_go_on(operated: NatsServer, operator: Operator, tmp_path: Path) -> None:
    path, events = tmp_path / "ada.creds", Events()
    path.write_text(operator.user(lifetime=4.9))
    with natsync.connect(operated.url, credentials=path, on_event=events, **QUICK) as client:
        client.subscribe("jwt.echo", lambda message: message.respond(message.data))
        client.flush()
        fresh = tmp_path / "fresh.creds"
        fresh.write_text(operator.user())
        os.replace(fresh, path)
        events.wait("reconnected")
        assert "Authentication Expired" in events.wait("error")["error"]
        eventually(lambda: client.status == "connected")
        assert client.request("jwt.echo", b"x", timeout=10).data == b"x"
        assert "closed" not in events.names


def test_a_function_that_fails_for_a_while_is_asked_again(make_nats_server: Callable[..., NatsServer]) -> None:
    server, asked = make_nats_server(config=TOKENS), [0]

    def token() -> str:
        asked[0] += 1
        if 1 < asked[0] < 5:
            raise OSError(f"no {TOKEN} now")
        return TOKEN

    with natsync.connect(server.url, token=token, **QUICK) as client:
        server.restart()
        eventually(lambda: asked[0] >= 5, 10)
        client.flush()
        assert client.stats()["reconnects"] == 1


def test_a_password_changed_at_the_server_is_asked_for_anew(make_nats_server: Callable[..., NatsServer]) -> None:
    passwords, events, server = [PASSWORD], Events(), make_nats_server(config=USERS)
    with natsync.connect(server.url, user="ada", password=lambda: passwords[-1], on_event=events, **QUICK) as client:
        passwords.append(f"{MARKER}-changed")
        server.reload(USERS.replace(PASSWORD, passwords[-1]))
        events.wait("reconnected")
        client.flush()
        assert "Authorization Violation" in events.wait("disconnected")["reason"]


def test_credentials_that_are_right_after_one_refusal_let_the_client_go_on(
    make_nats_server: Callable[..., NatsServer],
) -> None:
    server, stale = make_nats_server(config=TOKENS), threading.Event()

    def token() -> str:
        if stale.is_set() and "authentication error" not in server.log():
            return f"{MARKER}-stale"
        return TOKEN

    with natsync.connect(server.url, token=token, **QUICK) as client:
        stale.set()
        server.restart()
        eventually(lambda: client.stats()["reconnects"] == 1, 10)
        client.flush()
    assert server.log().count("authentication error") == 1


def test_two_identical_refusals_end_the_client(make_nats_server: Callable[..., NatsServer]) -> None:
    events, server = Events(), make_nats_server(config=TOKENS)
    client = natsync.connect(server.url, token=TOKEN, on_event=events, **QUICK)
    server.reload(TOKENS.replace(TOKEN, f"{MARKER}-changed"))
    events.wait("closed")
    with pytest.raises(natsync.ConnectionClosed) as raised:
        client.publish("x")
    assert isinstance(raised.value.__cause__, AuthorizationError)
    assert_clean(raised.value)
    client.close()


def test_a_revoked_user_is_told_so(make_nats_server: Callable[..., NatsServer]) -> None:
    operator, key, events = Operator(), Key(), Events()
    server = make_nats_server(config=operator.config())
    client = natsync.connect(server.url, credentials=operator.user(key=key), on_event=events, **QUICK)
    operator.revoked[key.public] = int(time.time()) + 60
    server.reload(operator.config())
    assert "refused the credentials" in events.wait("closed")["reason"]
    assert "User Authentication Revoked" in events.wait("disconnected")["reason"]
    client.close()


def test_an_account_that_expires_ends_the_client_with_a_typed_error(
    make_nats_server: Callable[..., NatsServer],
) -> None:
    operator, events = Operator(), Events()
    server = make_nats_server(config=operator.config(lifetime=4.9))
    client = natsync.connect(server.url, credentials=operator.user(), on_event=events, **QUICK)
    assert "refused the credentials" in events.wait("closed")["reason"]
    assert "Account Authentication Expired" in events.wait("error")["error"]
    client.close()


def test_a_client_that_was_refused_connects_once_its_credentials_are_known(
    make_nats_server: Callable[..., NatsServer],
) -> None:
    server = make_nats_server(config=TOKENS.replace(TOKEN, f"{MARKER}-other"))
    client = natsync.Client(server.url, token=TOKEN)
    with pytest.raises(AuthorizationError):
        client.publish("x")
    server.reload(TOKENS)
    client.publish("x")
    client.flush()
    client.close()


# -- a server that has no room ---------------------------------------------------------------------------------------


def test_a_server_that_is_full_leaves_the_next_one(make_nats_server: Callable[..., NatsServer]) -> None:
    full, other = make_nats_server(config="max_connections: 1"), make_nats_server()
    with (
        natsync.connect(full.url) as first,
        natsync.connect([full.url, other.url], randomize=False) as second,
    ):
        assert (first.stats()["server"], second.stats()["server"]) == (full.url, other.url)
        error = refusal(full)
    assert "maximum connections exceeded" in str(error)
    assert not isinstance(error, AuthorizationError)


def test_an_account_that_is_full_is_no_refusal_of_the_credentials(make_nats_server: Callable[..., NatsServer]) -> None:
    operator = Operator()
    server = make_nats_server(config=operator.config(conn=1))
    with natsync.connect(server.url, credentials=operator.user()):
        error = refusal(server, credentials=operator.user())
    assert "maximum account active connections exceeded" in str(error)
    assert not isinstance(error, AuthorizationError)


def test_a_client_waits_for_room(make_nats_server: Callable[..., NatsServer], caplog: pytest.LogCaptureFixture) -> None:
    server = make_nats_server(config="max_connections: 1")
    first = natsync.connect(server.url)
    with (
        caplog.at_level(logging.INFO, "natsync"),
        natsync.connect(server.url, retry_on_failed_connect=True, **QUICK) as second,
    ):
        eventually(lambda: caplog.text.count("maximum connections exceeded") >= 3, 10)
        first.close()
        eventually(lambda: second.status == "connected", 10)


# -- a server that asks for less than was asked of it ----------------------------------------------------------------


@pytest.mark.parametrize("nonce", [None, "", 5, ["x"]])
@pytest.mark.parametrize("kind", ["nkey_seed", "credentials"])
def test_a_server_without_a_nonce_is_refused_with_nothing_sent(kind: str, nonce: Any) -> None:
    sent: list[bytes] = []

    def script(peer: PeerConnection) -> None:
        peer.send_info(nonce=nonce)
        sent.append(peer.recv_until_eof())

    with ScriptedPeer(script) as peer:
        value = Key().seed if kind == "nkey_seed" else Operator().user()
        with pytest.raises(NoServersError, match="demands less security") as raised:
            natsync.connect(peer.url, **{kind: value})
        assert_clean(raised.value)
    assert sent == [b""]


def test_a_real_server_that_knows_no_users_is_refused(nats_server: NatsServer) -> None:
    assert "demands less security" in str(refusal(nats_server, nkey_seed=Key().seed))


def test_a_server_that_has_lost_its_nonce_is_refused_at_the_reconnect() -> None:
    sent: list[bytes] = []

    def script(peer: PeerConnection) -> None:
        if peer.index == 0:
            peer.handshake(nonce="abc")
            return
        peer.send_info()
        sent.append(peer.recv_until_eof())

    with ScriptedPeer(script) as peer, natsync.connect(peer.url, nkey_seed=Key().seed, **QUICK):
        eventually(lambda: len(sent) >= 3)
    assert set(sent) == {b""}


# -- nothing shows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        lambda line: line + b"\r\n",
        lambda line: b"-ERR 'what is " + line + b"'\r\n",
        lambda line: b"-ERR 'Authorization Violation: " + line + b"'\r\n",
        lambda line: b"INFO " + line + b"\r\n",
        lambda line: b"INFO [" + line[8:] + b"]\r\n",
    ],
)
def test_a_server_that_repeats_the_credentials_does_not_get_them_shown(answer: Callable[[bytes], bytes]) -> None:
    def script(peer: PeerConnection) -> None:
        peer.send_info(nonce="abc")
        peer.send(answer(peer.recv_line()))
        peer.recv_until_eof()

    with ScriptedPeer(script) as peer:
        for options in ({"token": TOKEN}, {"user": "ada", "password": PASSWORD}, {"credentials": Operator().user()}):
            with pytest.raises(NoServersError) as raised:
                natsync.connect(peer.url, **options)
            assert_clean(raised.value, *(value for value in options.values() if value != "ada"))


@pytest.mark.parametrize("answer", [b"-ERR 'what is %b'\r\n", b"-ERR 'Authorization Violation: %b'\r\n", b"%b\r\n"])
def test_a_server_that_repeats_the_credentials_later_does_not_get_them_shown(
    answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "natsync")
    events = Events()
    # Not one that the whole suite is searched for: the parser quotes the line to the reader, which hides it.
    token = "a-token-of-this-test"

    def script(peer: PeerConnection) -> None:
        told = peer.handshake()["auth_token"].encode()
        if peer.index == 0:
            peer.send(answer % told)
        else:
            peer.hold()

    with ScriptedPeer(script) as peer:
        client = natsync.connect(peer.url, token=token, on_event=events, **QUICK)
        events.wait("reconnected")
        client.close(0)
    assert token not in repr(events.all)
    assert token not in caplog.text


def test_nothing_that_is_logged_shows_a_credential(
    make_nats_server: Callable[..., NatsServer], operator: Operator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Failures of each kind, with all of natsync's log records."""
    key, path = Key(), tmp_path / "user.creds"
    creds = Operator().user(key=key)
    path.write_text("-----BEGIN NATS USER JWT-----\n" + secret("eyJhbGciOi.broken.creds"))
    users, tokens, jwts, open_ = (make_nats_server(config=one) for one in (USERS, TOKENS, operator.config(), None))
    failing: list[tuple[str, dict[str, Any]]] = [
        (users.url, {"user": "ada", "password": f"{MARKER}-1"}),
        (users.url.replace("//", f"//ada:{MARKER}-2@"), {}),
        (users.url, {"user": lambda: ("ada", f"{MARKER}-3")}),
        (users.url, {"user": "ada", "password": fail}),
        (tokens.url, {"token": f"{MARKER}-4"}),
        (tokens.url, {"token": fail}),
        (tokens.url, {"token": lambda: TOKEN.encode()}),
        (jwts.url, {"credentials": creds}),
        (jwts.url, {"credentials": path}),
        (jwts.url, {"credentials": operator.user(lifetime=-10)}),
        (jwts.url, {"nkey_seed": key.seed}),
        (jwts.url, {"nkey_seed": lambda: key.seed[:-1]}),
        (open_.url, {"nkey_seed": key.seed}),
        (open_.url, {"credentials": creds}),
        (open_.url.replace("nats:", "tls:"), {"token": TOKEN}),
        (open_.url, {"token": TOKEN, "tls_first": True}),
    ]
    secrets = [MARKER, key.seed, key.seed[:-1], "broken.creds", creds.split()[4]]
    with caplog.at_level(logging.DEBUG, "natsync"):
        for url, options in failing:
            client = natsync.Client(url, **options, **QUICK)
            assert not [one for one in secrets if one in repr(client)]
            for _ in range(2):
                with pytest.raises(NatsError) as raised:
                    client.publish("x")
                assert_clean(raised.value, *secrets)
            client.close()
        with natsync.connect(open_.url, token=TOKEN) as client:
            client.flush()
    assert len(caplog.records) >= len(failing)
    logged = "\n".join(f"{record.getMessage()} {record.args!r} {record.exc_text}" for record in caplog.records)
    assert not [one for one in secrets if one in logged]


def test_connect_is_json_whatever_the_credentials_hold() -> None:
    lines: list[bytes] = []
    odd = f'{MARKER}"\r\nPUB x 0\r\n\u2028'

    def script(peer: PeerConnection) -> None:
        peer.send_info()
        lines.extend([peer.recv_line(), peer.recv_line()])
        peer.send(b"PONG\r\n")

    with ScriptedPeer(script) as peer:
        transport, _ = dial(parse_server(peer.url), ConnectOptions(user=lambda: (odd, odd)))
        transport.close()
    sent = json.loads(lines[0].removeprefix(b"CONNECT "))
    assert (sent["user"], sent["pass"], lines[1]) == (odd, odd, b"PING")
