"""examples/django_project in a real browser: Chromium, runserver and gunicorn, nats-server, `manage.py natsync_worker`
and a third party over HTTP.

gunicorn shows the browser's socket, which natsync looks at; runserver does not, so there only heartbeats find out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from selenium import webdriver

from chat import (
    Chat,
    Page,
    check_that_a_broker_that_dies_and_comes_back_is_not_seen,
    check_that_a_killed_worker_is_explained,
    check_that_tabs_do_not_disturb_each_other,
    check_that_tokens_appear_one_by_one,
    opened,
    quickest,
    time_to_stop,
    token_api,
    url_of,
)
from chromium import chromium
from natsync.testing import NatsServer
from processes import Child, child, run
from support import ROOT
from web_servers import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

PROJECT = ROOT / "examples" / "django_project"
HEARTBEAT = 1.0
#: What each is given: the application, and its arguments.
SERVERS = {
    "runserver": ("manage.py",),
    "gthread": ("mysite.wsgi", "--workers", "2", "--preload"),
}
#: Seconds in which the handler and its read of the third party end once the browser has left. What takes longer than
#: two heartbeats themselves is the browser's and this test's looking on.
LIMIT = {"runserver": 2 * HEARTBEAT + 0.3, "gthread": 1.0}


@contextmanager
def worker_of(broker: NatsServer, environment: dict[str, str]) -> Iterator[Child]:
    with child(sys.executable, "manage.py", "natsync_worker", url=broker.url, cwd=PROJECT, env=environment) as worker:
        worker.wait_for_out("is ready")
        yield worker


@contextmanager
def running_project(kind: str, directory: Path) -> Iterator[tuple[Chat, dict[str, str]]]:
    """The project with a database in this directory, and the environment of its processes."""
    environment = {"DATABASE": str(directory / "db.sqlite3"), "SSE_HEARTBEAT": str(HEARTBEAT)}
    assert run(sys.executable, "manage.py", "migrate", "-v0", cwd=PROJECT, env=environment).process.returncode == 0
    with ExitStack() as stack:
        broker = stack.enter_context(NatsServer())
        api = stack.enter_context(token_api())
        environment["TOKEN_API"] = url_of(api)
        worker = stack.enter_context(worker_of(broker, environment))
        web = stack.enter_context(serving(kind, *SERVERS[kind], url=broker.url, cwd=PROJECT, env=environment))
        yield Chat(broker, api, worker, web), environment


@pytest.fixture(params=SERVERS, scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def chat(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    with running_project(kind, tmp_path_factory.mktemp(kind)) as (chat, _):
        yield chat


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def page(browser: webdriver.Chrome, chat: Chat) -> Iterator[Page]:
    with opened(browser, chat) as page:
        yield page


def test_tokens_appear_one_by_one(page: Page) -> None:
    check_that_tokens_appear_one_by_one(page)


@pytest.mark.parametrize("way", ["stop", "close"])
@pytest.mark.parametrize("question", ["answer", "think"])
def test_stop_and_a_closed_tab_stop_handler_and_third_party(
    browser: webdriver.Chrome, chat: Chat, kind: str, way: str, question: str
) -> None:
    limit = LIMIT[kind]
    assert quickest(limit, lambda n: time_to_stop(browser, chat, way, f"{question} {way} {kind}{n}")) < limit


def test_tabs_do_not_disturb_each_other(chat: Chat, page: Page) -> None:
    check_that_tabs_do_not_disturb_each_other(chat, page)


def test_a_broker_that_dies_and_comes_back_is_not_seen_in_the_page(chat: Chat, page: Page) -> None:
    check_that_a_broker_that_dies_and_comes_back_is_not_seen(chat, page)


def test_notes_are_added_and_found_in_the_page(page: Page) -> None:
    for text in ("bread", "butter", "brown bread"):
        page.write("text", text)
        page.element("add").click()
        page.wait_for_state("added")
        page.ask("no such note", button="search")  # so that the next one is seen to be added
        page.wait_for_state("complete")
    page.ask("bread", button="search")
    page.wait_for_tokens(3)
    page.wait_for_state("complete")
    assert page.tokens == ["bread", "brown", "bread"]


def test_a_handler_that_fails_is_explained_in_its_own_words(page: Page) -> None:
    page.ask("fail please")
    page.wait_for_state("failed")
    assert page.status == "The answer is not complete: the token service answered 500. Please ask again."


def test_a_killed_worker_is_an_error_that_the_page_explains(browser: webdriver.Chrome, tmp_path: Path) -> None:
    with running_project("gthread", tmp_path) as (chat, environment), opened(browser, chat) as page:
        reason = "whoever was answering is gone"
        check_that_a_killed_worker_is_explained(chat, page, reason, lambda: worker_of(chat.broker, environment))
