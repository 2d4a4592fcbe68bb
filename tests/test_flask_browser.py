"""examples/flask_chat in a real browser: Chromium, gunicorn, nats-server, `natsync serve` and a third party over HTTP.

NATSYNC_SCREENSHOT=docs/flask_chat.png writes a picture of the page.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from selenium import webdriver

from chat import (
    FLASK_CHAT,
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
from processes import NATSYNC, Child, child
from web_servers import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

HEARTBEAT = 1.0


@contextmanager
def worker_of(broker: NatsServer, api: Child) -> Iterator[Child]:
    env = {"TOKEN_API": url_of(api)}
    with child(*NATSYNC, "serve", "worker", url=broker.url, cwd=FLASK_CHAT, env=env) as worker:
        worker.wait_for_err("chat.ask")
        yield worker


@contextmanager
def running_chat(look: bool = True) -> Iterator[Chat]:
    settings = {
        "FLASK_CHAT_LOOK": str(look).lower(),
        "FLASK_CHAT_HEARTBEAT": str(HEARTBEAT),
        "FLASK_NATSYNC_HEARTBEAT": "0.5",  # how soon a dead worker is noticed
        "FLASK_NATSYNC_RESUME_GRACE": "5",
    }
    command = ("--config", "../gunicorn.conf.py", "--workers", "2", "--preload")
    with ExitStack() as stack:
        broker = stack.enter_context(NatsServer())
        api = stack.enter_context(token_api())
        worker = stack.enter_context(worker_of(broker, api))
        web = stack.enter_context(serving("gthread", "app:app", *command, url=broker.url, cwd=FLASK_CHAT, env=settings))
        yield Chat(broker, api, worker, web)


@pytest.fixture(scope="module")
def chat() -> Iterator[Chat]:
    with running_chat() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def page(browser: webdriver.Chrome, chat: Chat) -> Iterator[Page]:
    with opened(browser, chat) as page:
        yield page


def test_tokens_appear_one_by_one(page: Page) -> None:
    def take_picture() -> None:
        if os.environ.get("NATSYNC_SCREENSHOT"):
            page.browser.save_screenshot(os.environ["NATSYNC_SCREENSHOT"])

    check_that_tokens_appear_one_by_one(page, take_picture)


@pytest.mark.parametrize("way", ["stop", "close"])
@pytest.mark.parametrize("kind", ["answer", "think"])
def test_stop_and_a_closed_tab_stop_handler_and_third_party_within_a_second(
    browser: webdriver.Chrome, chat: Chat, way: str, kind: str
) -> None:
    assert quickest(1.0, lambda number: time_to_stop(browser, chat, way, f"{kind} {way} look{number}")) < 1.0


@pytest.fixture(scope="module")
def blind_chat() -> Iterator[Chat]:
    with running_chat(look=False) as running:
        yield running


@pytest.mark.parametrize("way", ["stop", "close"])
def test_without_a_look_at_the_socket_both_stop_within_two_heartbeats(
    browser: webdriver.Chrome, blind_chat: Chat, way: str
) -> None:
    # What takes longer than the heartbeats themselves is the browser's and this test's looking on.
    limit = 2 * HEARTBEAT + 0.3
    assert quickest(limit, lambda number: time_to_stop(browser, blind_chat, way, f"think {way} blind{number}")) < limit


def test_tabs_do_not_disturb_each_other(chat: Chat, page: Page) -> None:
    check_that_tabs_do_not_disturb_each_other(chat, page)


def test_a_broker_that_dies_and_comes_back_is_not_seen_in_the_page(chat: Chat, page: Page) -> None:
    check_that_a_broker_that_dies_and_comes_back_is_not_seen(chat, page)


def test_a_killed_worker_is_an_error_that_the_page_explains(browser: webdriver.Chrome) -> None:
    with running_chat() as chat, opened(browser, chat) as page:
        reason = "whoever was answering is gone"
        check_that_a_killed_worker_is_explained(chat, page, reason, lambda: worker_of(chat.broker, chat.api))


def test_a_killed_web_server_process_is_explained_too(browser: webdriver.Chrome) -> None:
    with running_chat() as chat, opened(browser, chat) as page:
        page.ask("think of the process")
        page.wait_for_tokens(1)
        for pid in gunicorn_workers(chat.web.running.process.pid):
            os.kill(pid, signal.SIGKILL)
        page.wait_for_state("failed")
        assert "the connection to the web server broke. Please ask again." in page.status
        chat.api.wait_for_out("think of the process: the reader left")  # the worker found out by itself


def gunicorn_workers(master: int) -> list[int]:
    children = Path(f"/proc/{master}/task/{master}/children").read_text()
    return [int(pid) for pid in re.findall(r"\d+", children)]


def test_a_handler_that_fails_is_explained_in_its_own_words(page: Page) -> None:
    page.ask("fail please")
    page.wait_for_state("failed")
    assert page.status == "The answer is not complete: the token service answered 500. Please ask again."
