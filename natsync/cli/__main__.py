"""Entry point of the `natsync` command.

Finds out whether click and rich are there, and says in one line what to install if they are not. The commands
themselves are collected in app.py.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

#: Exit status of a command that cannot start because an optional dependency is missing; that of usage errors.
MISSING_EXTRA = 2
#: 128 + SIGINT, as a shell reports it.
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command line (sys.argv by default) and leave with its exit status."""
    missing = [name for name in ("click", "rich") if find_spec(name) is None]
    if missing:
        print(f'natsync: {" and ".join(missing)} missing; install "natsync[cli]"', file=sys.stderr)
        sys.exit(MISSING_EXTRA)
    try:
        from natsync.cli.app import app

        app.main(arguments, prog_name="natsync")
    except KeyboardInterrupt:  # before a command has begun, or behind its end
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
