"""nkeys, JWTs and .creds files made for one test, and the configuration of servers that accept them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from typing import Any, ClassVar

import nkeys

from secrecy import secret


class Key:
    """A key pair of a role: "user", "account" or "operator"."""

    PREFIXES: ClassVar = {
        "user": nkeys.PREFIX_BYTE_USER,
        "account": nkeys.PREFIX_BYTE_ACCOUNT,
        "operator": nkeys.PREFIX_BYTE_OPERATOR,
    }

    def __init__(self, role: str = "user") -> None:
        self.role = role
        self.seed: str = secret(nkeys.encode_seed(os.urandom(32), self.PREFIXES[role]).decode())
        self._pair = nkeys.from_seed(self.seed.encode())
        self.public: str = self._pair.public_key.decode()

    def sign(self, data: bytes) -> bytes:
        signature: bytes = self._pair.sign(data)
        return signature


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def make_jwt(issuer: Key, subject: Key, name: str, nats: dict[str, Any], lifetime: float | None = None) -> str:
    """A JWT of NATS: what the issuer says of the subject; lifetime in seconds from now, None = for ever."""
    now = int(time.time())
    claims: dict[str, Any] = {"iat": now, "iss": issuer.public, "name": name, "sub": subject.public}
    claims["nats"] = {"type": subject.role, "version": 2, **nats}
    if lifetime is not None:
        claims["exp"] = int(time.time() + lifetime)
    claims["jti"] = base64.b32encode(hashlib.sha256(json.dumps(claims).encode()).digest()).rstrip(b"=").decode()
    signed = ".".join(encode(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, claims))
    return secret(f"{signed}.{encode(issuer.sign(signed.encode()))}")


#: What nsc writes, with five dashes on BEGIN lines and six on END lines.
CREDS = """-----BEGIN NATS USER JWT-----
{jwt}
------END NATS USER JWT------

************************* IMPORTANT *************************
NKEY Seed printed below can be used to sign and prove identity.
NKEYs are sensitive and should be treated as secrets.

-----BEGIN USER NKEY SEED-----
{seed}
------END USER NKEY SEED------

*************************************************************
"""


class Operator:
    """An operator with one account: makes users, and the configuration of the server that knows the account."""

    LIMITS: ClassVar = {"subs": -1, "data": -1, "payload": -1}
    ACCOUNT_LIMITS: ClassVar = {**LIMITS, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}

    def __init__(self) -> None:
        self.key, self.account = Key("operator"), Key("account")
        self.revoked: dict[str, int] = {}
        self._jwt = make_jwt(self.key, self.key, "operator", {})  # once: a server takes no other in a reload

    def user(self, name: str = "ada", lifetime: float | None = None, key: Key | None = None) -> str:
        """The text of a .creds file for a new user."""
        key = key or Key()
        jwt = make_jwt(self.account, key, name, {**self.LIMITS, "pub": {}, "sub": {}}, lifetime)
        return CREDS.format(jwt=jwt, seed=key.seed)

    def config(self, lifetime: float | None = None, **limits: int) -> str:
        """A server's configuration; lifetime of the account in seconds, None = for ever."""
        claims: dict[str, Any] = {"limits": {**self.ACCOUNT_LIMITS, **limits}}
        if self.revoked:
            claims["revocations"] = self.revoked
        account = make_jwt(self.key, self.account, "account", claims, lifetime)
        return f"operator: {self._jwt}\nresolver: MEMORY\nresolver_preload: {{ {self.account.public}: {account} }}\n"


def nkey_users(*keys: Key) -> str:
    """The configuration of a server that lets the holders of these keys in."""
    users = ", ".join(f"{{ nkey: {key.public} }}" for key in keys)
    return f"authorization {{ users = [ {users} ] }}\n"
