"""nkeys and .creds files: what they must look like, and how a nonce is signed.

Pure. The nkeys library, an extra, is imported only where something is to be signed. No error quotes a secret, nor does
any that it stands in for: each is raised when the one that was caught is gone.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import importlib.util
import re
from dataclasses import dataclass, field

from natsync.errors import InvalidArgument

#: What to say where the nkeys library is needed and not there.
INSTALL = 'install the nkeys library: pip install "natsync[nkeys]"'

#: First byte of a decoded seed, with the upper bits of the role in its last three: NATS writes 18 << 3 as "S".
_SEED = 18 << 3
#: The roles that a seed may have, by their number on the wire; only a user's can connect.
_ROLES = {20 << 3: "user", 0: "account", 14 << 3: "operator", 13 << 3: "server", 2 << 3: "cluster", 23 << 3: "curve"}
#: How the seeds of a user, an account and an operator begin; other roles do not connect.
_SEED_STARTS = ("SU", "SA", "SO")
#: Two bytes of prefix, 32 of the Ed25519 seed, two of the checksum.
_SEED_BYTES = 36

_BLOCK = r"-{3,}\s*BEGIN %s\s*-{3,}(.*?)-{3,}\s*END %s\s*-{3,}"
_JWT_BLOCK = re.compile(_BLOCK % ("NATS USER JWT", "NATS USER JWT"), re.DOTALL)
_SEED_BLOCK = re.compile(_BLOCK % ("USER NKEY SEED", "USER NKEY SEED"), re.DOTALL)
_JWT = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+){2}")


@dataclass(frozen=True)
class Creds:
    """What a .creds file holds."""

    jwt: str = field(repr=False)
    seed: str = field(repr=False)


def check_seed(text: str) -> str:
    """The seed without white space around it, if it is a user's.

    Raises:
        InvalidArgument: it is malformed, mistyped, or of another role.
    """
    seed = text.strip()
    raw = _decoded(seed)
    if len(raw) != _SEED_BYTES or raw[0] & 0xF8 != _SEED:
        raise InvalidArgument('not an nkey seed: a user\'s has 58 characters and begins with "SU"')
    if binascii.crc_hqx(raw[:-2], 0) != int.from_bytes(raw[-2:], "little"):
        raise InvalidArgument("the nkey seed has a wrong checksum: it was mistyped or cut")
    role = (raw[0] & 0x07) << 5 | raw[1] >> 3
    if _ROLES.get(role) != "user":
        raise InvalidArgument(f"the nkey seed is one of a kind {_ROLES.get(role, 'unknown')!r}, not of a user")
    return seed


def _decoded(seed: str) -> bytes:
    try:
        return base64.b32decode(seed + "=" * (-len(seed) % 8))
    except (binascii.Error, ValueError):
        return b""


def find_seed(text: str) -> str:
    """The seed in a file that holds only that, or that has it between BEGIN and END lines.

    Raises:
        InvalidArgument: there is none, or it cannot be used.
    """
    block = _SEED_BLOCK.search(text)
    lines = (text if block is None else block[1]).split()
    return check_seed(next((line for line in lines if line.startswith(_SEED_STARTS)), ""))


def parse_creds(text: str) -> Creds:
    """JWT and seed of a .creds file; whatever stands around their blocks is passed over.

    Raises:
        InvalidArgument: one of the two is missing or garbled.
    """
    jwt, seed = _JWT_BLOCK.search(text), _SEED_BLOCK.search(text)
    if jwt is None or seed is None:
        missing = "NATS USER JWT" if jwt is None else "USER NKEY SEED"
        raise InvalidArgument(f"the credentials have no block from BEGIN to END {missing}")
    token = "".join(jwt[1].split())
    if not _JWT.fullmatch(token):
        raise InvalidArgument("the JWT in the credentials is garbled: three parts with dots between them are needed")
    return Creds(token, check_seed("".join(seed[1].split())))


def check_library() -> None:
    """See that the nkeys library is installed, without importing it.

    Raises:
        InvalidArgument: it is not.
    """
    if importlib.util.find_spec("nkeys") is None:
        raise InvalidArgument(f"nkeys and .creds files cannot be used: {INSTALL}")


def sign(seed: str, nonce: bytes) -> tuple[str, str]:
    """(public key, signature) as CONNECT carries them.

    Raises:
        ImportError: the nkeys library is not installed, or broken.
    """
    pair = importlib.import_module("nkeys").from_seed(seed.encode())
    signature = base64.urlsafe_b64encode(pair.sign(nonce)).rstrip(b"=")
    return pair.public_key.decode(), signature.decode()
