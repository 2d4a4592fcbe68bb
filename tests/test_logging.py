"""What the library logs is under natsync, and is the program's to show."""

from __future__ import annotations

import re

import pytest

from support import run_python
from test_layers import FILES

LOGGER = re.compile(r"getLogger\(([^)]*)\)")


@pytest.mark.parametrize("module", FILES)
def test_every_logger_is_under_natsync(module: str) -> None:
    for name in LOGGER.findall(FILES[module].read_text("utf-8")):
        assert re.fullmatch(r'"natsync(\.\w+)*"', name)


def test_a_program_that_has_not_set_up_logging_still_sees_what_went_wrong() -> None:
    done = run_python("import logging, natsync; logging.getLogger('natsync.connection').warning('lost')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "lost\n")


def test_a_program_that_has_set_up_logging_sees_it_once() -> None:
    body = "import logging, natsync; logging.basicConfig(); logging.getLogger('natsync.connection').warning('lost')"
    assert run_python(body).stderr == "WARNING:natsync.connection:lost\n"
