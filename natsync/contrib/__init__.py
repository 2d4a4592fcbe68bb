"""Integrations with other packages: each module needs its own extra, and nothing in natsync imports them.

`presence`, `body`, `sse` and `failures` are what those for WSGI frameworks have in common, and need no extra.
"""
