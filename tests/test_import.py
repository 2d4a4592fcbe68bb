"""What importing natsync brings: few modules, no threads, and nothing that a fresh environment lacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from natsync.testing import NatsServer
from support import ROOT, run_python

#: Modules that importing natsync may bring, those of the standard library included: about 170 on Python 3.11. Counted,
#: because time depends on the machine; it takes about 0.1 s where they are compiled already.
MODULE_BUDGET = 220
#: Third-party packages that natsync imports.
OURS = {"natsync", "pynats2", "tenacity"}

REPORT = """
import json, sys, threading
events = []
def watch(name, args):
    if name.startswith(("socket.", "subprocess.", "os.fork")):
        events.append(name)
sys.addaudithook(watch)
before = set(sys.modules)
{body}
print(json.dumps({{
    "modules": sorted(set(sys.modules) - before),
    "threads": [thread.name for thread in threading.enumerate()],
    "events": events,
}}))
"""


def report_of(body: str) -> dict[str, Any]:
    """What a fresh interpreter has loaded and started once the body has run."""
    done = run_python(REPORT.format(body=body))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def packages(report: dict[str, Any]) -> set[str]:
    """The top-level names of the modules, without those of the standard library."""
    return {name.partition(".")[0] for name in report["modules"]} - set(sys.stdlib_module_names)


def test_importing_natsync_brings_no_third_party_package_but_pynats2_and_tenacity() -> None:
    # An environment may hold packages that tenacity itself looks for.
    assert packages(report_of("import natsync")) - packages(report_of("import tenacity")) <= OURS


def test_importing_natsync_does_not_bring_asyncio() -> None:
    loaded = set(report_of("import natsync")["modules"]) - set(report_of("import tenacity")["modules"])
    assert not {name for name in loaded if name.partition(".")[0] == "asyncio"}


def test_importing_natsync_stays_within_the_budget_of_modules() -> None:
    assert len(report_of("import natsync")["modules"]) <= MODULE_BUDGET


def test_importing_natsync_does_not_bring_its_edges() -> None:
    loaded = report_of("import natsync")["modules"]
    assert {"natsync.testing", "natsync.cli", "natsync.contrib", "natsync.services"}.isdisjoint(loaded)


def test_importing_natsync_starts_nothing() -> None:
    report = report_of("import natsync")
    assert report["threads"] == ["MainThread"]
    assert report["events"] == []


def test_constructors_start_nothing() -> None:
    body = """
import natsync
client = natsync.Client("nats://127.0.0.1:1")
pool = natsync.ConnectionPool("nats://127.0.0.1:1", min_size=0)
subscriber = natsync.Subscriber("nats://127.0.0.1:1")
@subscriber.stream("s")
def handler(ctx, request):
    yield b""
ctx = natsync.Context().with_timeout(None)
"""
    report = report_of(body)
    assert report["threads"] == ["MainThread"]
    assert report["events"] == []


def newest_interpreter() -> str | None:
    """The newest Python from 3.12 up on the PATH or among pyenv's; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [shutil.which(f"python3.{minor}") for minor in (12, 13, 14)]
    found += [str(path) for path in pyenv.glob("versions/3.1[2-9]*/bin/python")]
    usable: list[tuple[list[int], str]] = []
    for path in filter(None, found):
        # A shim of pyenv's may stand for a version that is not selected.
        code = "import sys, venv, ensurepip; print(*sys.version_info[:3])"
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            usable.append(([int(part) for part in done.stdout.split()], path))
    return max(usable)[1] if usable else None


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_fresh_environment_of_the_newest_python_can_use_natsync(tmp_path: Path, nats_server: NatsServer) -> None:
    interpreter = newest_interpreter()
    if interpreter is None:
        pytest.skip("this machine has no Python 3.12 or newer")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "natsync", source / "natsync", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=150, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(interpreter, "-m", "venv", str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", str(source))
    code = """
import importlib.util, sys
assert importlib.util.find_spec("pkg_resources") is None, "this environment has what natsync must do without"
import natsync
assert "site-packages" in natsync.__file__
with natsync.Client(sys.argv[1]) as client:
    client.subscribe("fresh", lambda message: message.respond(message.data.upper()))
    print(client.request("fresh", b"it works").text())
"""
    assert run(python, "-W", "error", "-c", code, nats_server.url).strip() == "IT WORKS"


def test_the_testing_tools_are_there_without_an_import_of_their_own() -> None:
    done = run_python(
        "import sys, natsync\n"
        "assert 'natsync.testing' not in sys.modules\n"
        "print(natsync.testing.NatsServer.__name__)\n"
        "assert not hasattr(natsync, 'nothing')\n"
    )
    assert done.stdout.strip() == "NatsServer", done.stderr


@pytest.mark.parametrize(("module", "name"), [("flask", "Flask"), ("django", "Django")])
def test_a_framework_that_is_missing_is_one_line_which_says_what_to_install(module: str, name: str) -> None:
    done = run_python(f"import sys; sys.modules['{module}'] = None\nimport natsync.contrib.{module}")
    assert done.stderr.splitlines()[-1].partition(": ")[2] == (
        f'natsync.contrib.{module} needs {name}: pip install "natsync[{module}]"'
    )


@pytest.mark.parametrize("module", ["body", "failures", "presence", "sse"])
def test_what_every_framework_needs_needs_none(module: str) -> None:
    loaded = packages(report_of(f"import natsync.contrib.{module}"))
    assert loaded - packages(report_of("import tenacity")) <= OURS
