"""What is handed out: a wheel with natsync and nothing else, which a bare environment of each Python can use."""

from __future__ import annotations

import email
import email.message
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

import natsync
from natsync.testing import NatsServer
from support import ROOT

#: Minor versions of Python 3 that are supported.
MINORS = (10, 11, 12, 13)

#: What a source distribution has beside the package.
ALONG = ("benchmarks", "docs", "examples", "tests")
LYING_ABOUT = shutil.ignore_patterns("__pycache__", "*.sqlite3")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

USE = """
import sys
import natsync
assert "site-packages" in natsync.__file__
with natsync.Client(sys.argv[1]) as client, natsync.Subscriber(sys.argv[1]) as subscriber:
    subscriber.stream("bare")(lambda ctx, request: iter(request.text().split()))
    subscriber.handler("upper")(lambda ctx, request: request.data.upper())
    print(client.request("upper", b"it").text(), b" ".join(client.stream("bare", "works here", timeout=30)).decode())
"""


def run(*command: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def interpreter(minor: int) -> str | None:
    """A Python of that version that can make environments, from the PATH or of pyenv; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [shutil.which(f"python3.{minor}"), *map(str, sorted(pyenv.glob(f"versions/3.{minor}.*/bin/python")))]
    code = f"import sys, venv, ensurepip; assert sys.version_info[:2] == (3, {minor})"
    for path in filter(None, found):
        if subprocess.run([path, "-c", code], capture_output=True, check=False).returncode == 0:
            return path
    return None


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree without what lies about in it, beside a bare environment."""
    directory = tmp_path_factory.mktemp("release")
    for name in ("natsync", *ALONG):
        shutil.copytree(ROOT / name, directory / "tree" / name, ignore=LYING_ABOUT)
    for path in ROOT.glob("*"):
        if path.is_file():
            shutil.copy(path, directory / "tree" / path.name)
    python = interpreter(11) or interpreter(12) or interpreter(13) or interpreter(10)
    assert python is not None, "no Python 3.10 to 3.13 with venv and ensurepip"
    run(python, "-m", "venv", str(directory / "venv"), cwd=directory)
    return directory / "tree"


def pip(tree: Path, *arguments: str) -> None:
    """pip of the environment beside the tree."""
    run(str(tree.parent / "venv" / "bin" / "python"), "-m", "pip", "--quiet", *arguments, cwd=tree.parent)


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """The wheel, built from the tree."""
    pip(tree, "wheel", "--no-deps", "--wheel-dir", str(tree.parent / "out"), str(tree))
    (built,) = (tree.parent / "out").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_has_natsync_and_nothing_else(wheel: Path) -> None:
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "natsync").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    others = {name for name in names if not name.startswith(f"natsync-{natsync.__version__}.dist-info/")}
    assert others == package
    assert "natsync/py.typed" in others
    assert wheel.name == f"natsync-{natsync.__version__}-py3-none-any.whl"


def test_the_source_distribution_has_what_the_tests_and_the_documentation_need(tree: Path) -> None:
    pip(tree, "install", "setuptools")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tree.parent)!r}))"
    name = run(str(tree.parent / "venv" / "bin" / "python"), "-c", code, cwd=tree).splitlines()[-1]
    with tarfile.open(tree.parent / name) as archive:
        names = {one.partition("/")[2] for one in archive.getnames()}
    wanted = {str(path.relative_to(tree)) for along in ALONG for path in (tree / along).rglob("*") if path.is_file()}
    assert wanted - names == set()
    assert not [one for one in names if one.endswith(".sqlite3")]


def test_the_metadata_say_what_it_is(metadata: email.message.Message) -> None:
    assert metadata["Name"] == "natsync"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    classifiers = metadata.get_all("Classifier") or []
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in MINORS} | {"Typing :: Typed"} <= set(
        classifiers
    )
    core = [one for one in metadata.get_all("Requires-Dist") or [] if "extra ==" not in one]
    assert {re.match(r"[\w-]+", one)[0] for one in core} == {"pynats2", "tenacity"}  # type: ignore[index]
    description = metadata.get_payload(decode=True)
    assert isinstance(description, bytes)
    assert description.decode("utf-8").strip() == (ROOT / "README.md").read_text("utf-8").strip()


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert first is not None
    assert first[1] == natsync.__version__


@pytest.mark.parametrize("minor", MINORS)
def test_a_bare_environment_can_use_the_wheel(wheel: Path, minor: int, nats_server: NatsServer, tmp_path: Path) -> None:
    found = interpreter(minor)
    if found is None:
        pytest.skip(f"this machine has no Python 3.{minor}")
    run(found, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    python = str(tmp_path / "venv" / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", str(wheel), cwd=tmp_path)
    assert run(python, "-W", "error", "-c", USE, nats_server.url, cwd=tmp_path).strip() == "IT works here"
