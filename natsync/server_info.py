"""The fields of a server's INFO that can be relied on: what is of another type than it should be is left out.

Pure. Fields that natsync does not use are kept as they came.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def reliable(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without those of a wrong type.

    What speaks of TLS is never left out, but taken for true or false: less security must not come of a mistake.
    """
    kept = {name: value for name, value in fields.items() if name not in _CHECKS or _CHECKS[name](value)}
    kept.update({name: bool(fields[name]) for name in _ABOUT_TLS if name in fields})
    if "connect_urls" in kept:
        kept["connect_urls"] = [url for url in kept["connect_urls"] if isinstance(url, str)]
    return kept


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_choice(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_list(value: object) -> bool:
    return isinstance(value, list)


_ABOUT_TLS = ("tls_required", "tls_available")
_CHECKS: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("headers", "auth_required", "ldm", "jetstream"), _is_choice),
    **dict.fromkeys(("nonce", "server_id", "server_name", "version", "host", "client_ip", "cluster"), _is_text),
    **dict.fromkeys(("proto", "port", "client_id"), _is_number),
    "max_payload": _is_size,
    "connect_urls": _is_list,
}
