"""examples/flask_chat in a real browser: Chromium, gunicorn, nats-server, `natsync serve` and a third party over HTTP.

NATSYNC_SCREENSHOT=docs/flask_chat.png writes a picture of the page.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from chromium import chromium
from natsync.testing import NatsServer, eventually
from processes import NATSYNC, Child, child
from support import ROOT
from web_servers import Web, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

CHAT = ROOT / "examples" / "flask_chat"
PATIENCE = 30.0
TOKENS = 60
PAUSE = 0.1
HEARTBEAT = 1.0


@dataclass
class Chat:
    """All that runs but the browser."""

    broker: NatsServer
    api: Child
    worker: Child
    web: Web


@contextmanager
def worker_of(broker: NatsServer, api_url: str) -> Iterator[Child]:
    with child(*NATSYNC, "serve", "worker", url=broker.url, cwd=CHAT, env={"TOKEN_API": api_url}) as worker:
        worker.wait_for_err("chat.ask")
        yield worker


@contextmanager
def running_chat(look: bool = True) -> Iterator[Chat]:
    environment = {"PORT": "0", "TOKENS": str(TOKENS), "PAUSE": str(PAUSE)}
    settings = {
        "FLASK_CHAT_LOOK": str(look).lower(),
        "FLASK_CHAT_HEARTBEAT": str(HEARTBEAT),
        "FLASK_NATSYNC_HEARTBEAT": "0.5",  # how soon a dead worker is noticed
        "FLASK_NATSYNC_RESUME_GRACE": "5",
    }
    command = ("--config", "../gunicorn.conf.py", "--workers", "2", "--preload")
    with ExitStack() as stack:
        broker = stack.enter_context(NatsServer())
        api = stack.enter_context(child(sys.executable, "token_api.py", cwd=CHAT, env=environment))
        api.wait_for_out("http://")
        worker = stack.enter_context(worker_of(broker, api.out[0].removeprefix("tokens at ")))
        web = stack.enter_context(serving("gthread", "app:app", *command, url=broker.url, cwd=CHAT, env=settings))
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
    yield from page_of(browser, chat)


def page_of(browser: webdriver.Chrome, chat: Chat) -> Iterator[Page]:
    """A page in a tab of its own; afterwards, only the empty tab at the beginning is left."""
    empty = browser.current_window_handle
    yield Page(browser, chat.web.url)
    for handle in set(browser.window_handles) - {empty}:
        browser.switch_to.window(handle)
        browser.close()
    browser.switch_to.window(empty)


class Page:
    """The chat page in a new tab."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        browser.switch_to.new_window("tab")
        self.handle = browser.current_window_handle
        browser.get(url)

    def _element(self, name: str) -> Any:
        self.browser.switch_to.window(self.handle)
        return self.browser.find_element(By.ID, name)

    def ask(self, question: str) -> None:
        field = self._element("question")
        field.clear()
        field.send_keys(question)
        self._element("ask").click()

    def stop(self) -> None:
        self._element("stop").click()

    def close(self) -> None:
        self._element("answer")
        self.browser.close()

    @property
    def tokens(self) -> list[str]:
        text: str = self.browser.execute_script(
            "return [...arguments[0].children].map(token => token.textContent).join(' ')", self._element("answer")
        )
        return text.split()

    @property
    def state(self) -> str:
        return str(self._element("status").get_attribute("data-state"))

    @property
    def status(self) -> str:
        return str(self._element("status").text)

    def wait_for_tokens(self, count: int) -> None:
        eventually(lambda: len(self.tokens) >= count, PATIENCE, f"{self.status}: {self.tokens}")

    def wait_for_state(self, state: str) -> None:
        eventually(lambda: self.state == state, PATIENCE, f"never {state}: {self.status}")


def answer(question: str, count: int = TOKENS) -> list[str]:
    words = question.split()
    return [f"{words[number % len(words)]}-{number + 1}" for number in range(count)]


def seconds_until_all_stop(chat: Chat, question: str, leave: Callable[[], None]) -> float:
    """How long after leave() the handler and its read of the third party end, which both tell on stdout."""

    def told(process: Child, text: str) -> bool:
        return any(line.startswith(f"{question}: {text}") for line in process.out)

    assert not told(chat.worker, "the handler ended")
    begin = time.monotonic()
    leave()
    left = time.monotonic()  # a command to the browser takes its time; all of it counts
    eventually(
        lambda: told(chat.worker, "the handler ended") and told(chat.api, "the reader left"),
        PATIENCE,
        f"not stopped: {chat.worker.out} {chat.api.out}",
    )
    print(f"{question}: {time.monotonic() - left:.2f} s after leaving, which took {left - begin:.2f} s")
    return time.monotonic() - left


def quickest(limit: float, measure: Callable[[int], float]) -> float:
    """The shortest of up to three times: a loaded machine may hold anything up, but not each time."""
    times: list[float] = []
    while len(times) < 3 and min(times, default=limit) >= limit:
        times.append(measure(len(times)))
    return min(times)


def test_tokens_appear_one_by_one(page: Page) -> None:
    # The page itself takes down when each token comes into view.
    page.browser.execute_script(
        "window.seen = []; new MutationObserver(changes => changes.forEach(change =>"
        " change.addedNodes.forEach(() => window.seen.push(performance.now()))))"
        ".observe(arguments[0], {childList: true})",
        page._element("answer"),
    )
    page.ask("one by one")
    page.wait_for_tokens(12)
    if os.environ.get("NATSYNC_SCREENSHOT"):
        page.browser.save_screenshot(os.environ["NATSYNC_SCREENSHOT"])
    page.wait_for_state("complete")
    assert page.tokens == answer("one by one")
    assert page.status == "That is the whole answer."
    seen = page.browser.execute_script("return window.seen")
    assert len(seen) == TOKENS
    apart = sum(later - earlier > PAUSE * 1000 / 2 for earlier, later in pairwise(seen))
    assert apart > TOKENS * 0.8, seen
    assert seen[-1] - seen[0] > (TOKENS - 1) * PAUSE * 1000 * 0.9


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


def time_to_stop(browser: webdriver.Chrome, chat: Chat, way: str, question: str) -> float:
    pages = page_of(browser, chat)
    page = next(pages)
    page.ask(question)
    page.wait_for_tokens(1)
    seconds = seconds_until_all_stop(chat, question, page.stop if way == "stop" else page.close)
    if way == "stop":
        assert page.status == "Stopped."
    assert next(pages, None) is None
    return seconds


def test_tabs_do_not_disturb_each_other(browser: webdriver.Chrome, chat: Chat, page: Page) -> None:
    page.ask("the first tab")
    second, third = Page(browser, chat.web.url), Page(browser, chat.web.url)
    second.ask("its neighbour")
    third.ask("one that goes")
    for tab in (third, second, page):
        tab.wait_for_tokens(3)
    third.close()
    chat.api.wait_for_out("one that goes: the reader left")
    second.wait_for_tokens(10)
    second.stop()
    stopped_at = len(second.tokens)
    chat.api.wait_for_out("its neighbour: the reader left")
    page.wait_for_state("complete")
    assert page.tokens == answer("the first tab")
    assert second.state == "stopped"
    assert second.tokens == answer("its neighbour", stopped_at)


def test_a_broker_that_dies_and_comes_back_is_not_seen_in_the_page(chat: Chat, page: Page) -> None:
    page.browser.execute_script(
        "window.states = []; new MutationObserver(() => window.states.push(arguments[0].dataset.state))"
        ".observe(arguments[0], {attributes: true})",
        page._element("status"),
    )
    page.ask("through a restart")
    page.wait_for_tokens(10)
    chat.broker.kill()
    chat.broker.restart()
    page.wait_for_state("complete")
    assert page.tokens == answer("through a restart")
    assert set(page.browser.execute_script("return window.states")) == {"asking", "answering", "complete"}
    assert sum(line.startswith("through a restart: ") for line in chat.worker.out) == 1


def test_a_killed_worker_is_an_error_that_the_page_explains(browser: webdriver.Chrome) -> None:
    with running_chat() as chat:
        pages = page_of(browser, chat)
        page = next(pages)
        page.ask("who answers this")
        page.wait_for_tokens(3)
        chat.worker.send(signal.SIGKILL)
        page.wait_for_state("failed")
        assert page.status == "The answer is not complete: whoever was answering is gone. Please ask again."
        before = page.tokens
        assert before == answer("who answers this", len(before))
        with worker_of(chat.broker, chat.api.out[0].removeprefix("tokens at ")):
            page.ask("and with a new one")
            page.wait_for_state("complete")
            assert page.tokens == answer("and with a new one")
        assert next(pages, None) is None


def test_a_killed_web_server_process_is_explained_too(browser: webdriver.Chrome) -> None:
    with running_chat() as chat:
        pages = page_of(browser, chat)
        page = next(pages)
        page.ask("think of the process")
        page.wait_for_tokens(1)
        for pid in gunicorn_workers(chat.web.running.process.pid):
            os.kill(pid, signal.SIGKILL)
        page.wait_for_state("failed")
        assert "the connection to the web server broke. Please ask again." in page.status
        chat.api.wait_for_out("think of the process: the reader left")  # the worker found out by itself
        assert next(pages, None) is None


def gunicorn_workers(master: int) -> list[int]:
    children = Path(f"/proc/{master}/task/{master}/children").read_text()
    return [int(pid) for pid in re.findall(r"\d+", children)]


def test_a_handler_that_fails_is_explained_in_its_own_words(page: Page) -> None:
    page.ask("fail please")
    page.wait_for_state("failed")
    assert page.status == "The answer is not complete: the token service answered 500. Please ask again."
