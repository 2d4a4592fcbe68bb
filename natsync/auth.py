"""Credentials as fields of CONNECT. Pure; what it returns must never be logged."""

from __future__ import annotations

from natsync.options import ConnectOptions, Server


def connect_fields(options: ConnectOptions, server: Server) -> dict[str, str]:
    """The fields that prove who connects: those of the server's URL, else those of the options; maybe none."""
    own = (server.user, server.password, server.token)
    user, password, token = own if any(own) else options.secrets
    if token is not None:
        return {"auth_token": token}
    if user is not None:
        return {"user": user, "pass": password or ""}
    return {}
