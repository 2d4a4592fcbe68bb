"""Integrations with other packages and frameworks: each module needs the extra of its name.

Nothing in the library imports this package. `presence`, `body`, `sse` and `failures` are for every WSGI framework and
need no extra.
"""
