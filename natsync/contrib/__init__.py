"""natsync at home in other people's frameworks; each module needs the extra of its name.

Nothing in the library imports this package. `presence`, `body`, `sse` and `failures` are for every WSGI framework and
need no extra.
"""
