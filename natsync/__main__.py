"""`python -m natsync`: the command line, under the interpreter of the caller's choice."""

from natsync.cli.__main__ import main

if __name__ == "__main__":
    main()
