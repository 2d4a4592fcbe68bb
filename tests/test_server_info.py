"""natsync.server_info: what is relied on of a server's INFO."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsync.server_info import reliable

USUAL: dict[str, Any] = {
    "server_id": "NA", "server_name": "one", "version": "2.10.25", "proto": 1, "host": "0.0.0.0", "port": 4222,
    "headers": True, "max_payload": 1048576, "client_id": 5, "client_ip": "127.0.0.1", "nonce": "abc", "cluster": "c",
    "auth_required": True, "tls_required": True, "tls_available": False, "jetstream": False, "ldm": False,
    "connect_urls": ["127.0.0.1:4222", "[::1]:4222"], "git_commit": "abc", "xkey": "X", "something_new": {"a": [1]},
}  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def test_a_usual_info_is_kept_whole() -> None:
    assert reliable(USUAL) == USUAL


@pytest.mark.parametrize("value", ["1048576", 1.5, None, True, [1], 0, -1])
def test_a_size_that_is_none_is_left_out(value: Any) -> None:
    assert reliable({"max_payload": value, "version": "2"}) == {"version": "2"}


@pytest.mark.parametrize("name", ["headers", "ldm", "auth_required"])
@pytest.mark.parametrize("value", ["true", 1, None, []])
def test_a_choice_that_is_none_is_left_out(name: str, value: Any) -> None:
    assert reliable({name: value}) == {}


@pytest.mark.parametrize("name", ["tls_required", "tls_available"])
@pytest.mark.parametrize(("value", "meant"), [("true", True), (1, True), (["x"], True), (None, False), (0, False)])
def test_what_speaks_of_tls_is_never_left_out(name: str, value: Any, meant: bool) -> None:
    assert reliable({name: value}) == {name: meant}


@pytest.mark.parametrize("value", ["127.0.0.1:4222", {"a": 1}, None, 5])
def test_servers_that_are_no_list_are_left_out(value: Any) -> None:
    assert reliable({"connect_urls": value}) == {}


def test_of_a_list_of_servers_the_texts_are_kept() -> None:
    assert reliable({"connect_urls": ["a:1", 5, None, ["b:2"], "c:3"]}) == {"connect_urls": ["a:1", "c:3"]}


@pytest.mark.parametrize("value", [5, None, ["n"], {}])
def test_a_nonce_that_is_no_text_is_left_out(value: Any) -> None:
    assert reliable({"nonce": value}) == {}


def test_what_was_given_is_not_changed() -> None:
    fields = {"connect_urls": ["a:1", 5], "max_payload": "x"}
    reliable(fields)
    assert fields == {"connect_urls": ["a:1", 5], "max_payload": "x"}


@given(st.dictionaries(st.sampled_from(sorted(USUAL)), JSON))
def test_whatever_comes_what_is_used_has_its_type(fields: dict[str, Any]) -> None:
    kept = reliable(fields)
    assert kept.get("max_payload", 1) > 0
    assert all(isinstance(url, str) for url in kept.get("connect_urls", []))
    assert isinstance(kept.get("nonce", ""), str)
    for name in ("headers", "ldm", "tls_required", "tls_available"):
        assert isinstance(kept.get(name, True), bool)
