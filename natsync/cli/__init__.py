"""The `natsync` command line: one module per group of commands.

Needs click and rich (extra `cli`). Nothing in the library imports this package, and importing it imports
neither of the two: `__main__.main` does so when it runs.
"""
