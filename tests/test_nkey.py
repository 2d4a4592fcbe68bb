"""natsync.nkey: seeds, .creds files and signatures, and that no error of them quotes a secret."""

from __future__ import annotations

import base64
import sys

import nkeys
import pytest
from hypothesis import given
from hypothesis import strategies as st

from credentials import CREDS, Key, Operator, make_jwt
from natsync.errors import InvalidArgument
from natsync.nkey import check_library, check_seed, find_seed, parse_creds, sign

KEY = Key()
OPERATOR = Operator()
JWT = make_jwt(OPERATOR.account, KEY, "ada", {})
TEXT = CREDS.format(jwt=JWT, seed=KEY.seed)


def refused(function: object, text: str) -> str:
    """What the refusal says; nothing of the text may be in it, nor in what it stands in for."""
    assert callable(function)
    with pytest.raises(InvalidArgument) as caught:
        function(text)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert KEY.seed not in str(caught.value)
    return str(caught.value)


# -- seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", ["{}", " {}\n", "\r\n{}\r\n"])
def test_a_users_seed_is_taken_whatever_white_space_is_around(around: str) -> None:
    assert check_seed(around.format(KEY.seed)) == KEY.seed


@pytest.mark.parametrize(
    "seed",
    [
        "",
        "S",
        "SU",
        "hello",
        KEY.seed.lower(),
        KEY.seed[:-2],
        KEY.seed + "AA",
        KEY.public,
        "SÜ" + KEY.seed[2:],
        "=" * 58,
    ],
    ids=["empty", "S", "SU", "word", "lower", "short", "long", "public", "umlaut", "signs"],
)
def test_what_is_no_seed_is_refused(seed: str) -> None:
    assert "not an nkey seed" in refused(check_seed, seed)


@pytest.mark.parametrize("at", [5, 20, 40, 55])
def test_a_mistyped_seed_is_refused_by_its_checksum(at: int) -> None:
    other = "A" if KEY.seed[at] != "A" else "B"
    assert "checksum" in refused(check_seed, KEY.seed[:at] + other + KEY.seed[at + 1 :])


@pytest.mark.parametrize("role", ["account", "operator"])
def test_a_seed_of_another_role_is_refused_by_name(role: str) -> None:
    assert role in refused(check_seed, Key(role).seed)


@given(st.text())
def test_no_text_makes_the_check_fail_otherwise(text: str) -> None:
    with pytest.raises(InvalidArgument):
        check_seed(text)


@given(st.binary(min_size=32, max_size=32))
def test_every_seed_of_the_library_is_taken(raw: bytes) -> None:
    seed = nkeys.encode_seed(raw, nkeys.PREFIX_BYTE_USER).decode()
    assert check_seed(seed) == seed


@pytest.mark.parametrize(
    "text",
    [KEY.seed, f"\n{KEY.seed}\n", f"# Secret Seed:\n{KEY.seed}\n", TEXT, TEXT.replace("\n", "\r\n")],
    ids=["bare", "lines", "comment", "creds", "crlf"],
)
def test_a_seed_is_found_in_a_file(text: str) -> None:
    assert find_seed(text) == KEY.seed


@pytest.mark.parametrize("text", ["", "nothing here", JWT], ids=["empty", "words", "JWT"])
def test_a_file_without_a_seed_is_refused(text: str) -> None:
    refused(find_seed, text)


# -- .creds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("------END", "-----END").replace("------\n", "-----\n"),
        TEXT.replace("-----BEGIN", "------BEGIN"),
        f"\ufeffwritten by hand\n\n{TEXT}\nthe end",
        TEXT.replace(JWT, f"\n  {JWT}  \n"),
        "\n".join(reversed(TEXT.partition("\n\n****")[0::2])).replace("USER JWT------", "USER JWT------\n"),
        CREDS.partition("-----BEGIN USER")[0].format(jwt=JWT)
        + f"---BEGIN USER NKEY SEED---{KEY.seed}---END USER NKEY SEED---",
    ],
    ids=range(8),
)
def test_jwt_and_seed_are_found_in_creds(text: str) -> None:
    creds = parse_creds(text)
    assert (creds.jwt, creds.seed) == (JWT, KEY.seed)


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("", "NATS USER JWT"),
        (TEXT.replace("NATS USER JWT", "NATS JWT"), "NATS USER JWT"),
        (TEXT.partition("-----BEGIN USER")[0], "USER NKEY SEED"),
        (TEXT.replace("END USER NKEY SEED", "THE END"), "USER NKEY SEED"),
        (TEXT.replace("END NATS USER JWT", "THE END"), "NATS USER JWT"),
        (TEXT.replace(JWT, ""), "JWT"),
        (TEXT.replace(JWT, JWT.replace(".", ":")), "JWT"),
        (TEXT.replace(JWT, JWT.rpartition(".")[0]), "JWT"),
        (TEXT.replace(KEY.seed, ""), "seed"),
        (TEXT.replace(KEY.seed, KEY.seed[:-1]), "seed"),
    ],
    ids=range(10),
)
def test_creds_that_lack_something_say_what(text: str, missing: str) -> None:
    assert missing in refused(parse_creds, text)


def test_creds_do_not_show_themselves() -> None:
    creds = parse_creds(TEXT)
    assert KEY.seed not in repr(creds)
    assert JWT not in repr(creds)


PARTS = [f"-----{where} {what}-----" for where in ("BEGIN", "END") for what in ("NATS USER JWT", "USER NKEY SEED")]


@given(st.lists(st.sampled_from([*PARTS, "\n", "a.b.c", KEY.seed, "-"])))
def test_no_arrangement_of_the_parts_makes_the_parser_fail_otherwise(parts: list[str]) -> None:
    try:
        assert parse_creds("".join(parts)).seed == KEY.seed
    except InvalidArgument:
        pass


# -- signing ---------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=64))
def test_a_signature_is_of_the_nonce_by_the_key(nonce: bytes) -> None:
    key, signature = sign(KEY.seed, nonce)
    assert key == KEY.public
    assert "=" not in signature
    assert nkeys.from_seed(KEY.seed.encode()).verify(nonce, base64.urlsafe_b64decode(signature + "=="))


def test_the_library_is_found_where_it_is_installed() -> None:
    check_library()


def test_a_missing_library_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nkeys", None)
    with pytest.raises(InvalidArgument, match=r'pip install "natsync\[nkeys\]"'):
        check_library()
