"""The examples' chat pages in a real browser: what is around them, a tab to drive, and what has to hold for each.

A page has the elements question, ask, stop, answer and status. Behind it are a web server in processes of its own, a
nats-server, a worker whose handler tells on stdout when it ends, and a third party that sends tokens over HTTP.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By

from natsync.testing import NatsServer, eventually
from processes import Child, child
from support import ROOT
from web_servers import Web

FLASK_CHAT = ROOT / "examples" / "flask_chat"
PATIENCE = 30.0
TOKENS = 60
PAUSE = 0.1


@dataclass
class Chat:
    """All that runs but the browser."""

    broker: NatsServer
    api: Child
    worker: Child
    web: Web


@contextmanager
def token_api() -> Iterator[Child]:
    """The third party, listening."""
    environment = {"PORT": "0", "TOKENS": str(TOKENS), "PAUSE": str(PAUSE)}
    with child(sys.executable, "token_api.py", cwd=FLASK_CHAT, env=environment) as api:
        api.wait_for_out("http://")
        yield api


def url_of(api: Child) -> str:
    return api.out[0].removeprefix("tokens at ")


class Page:
    """The chat page in a new tab."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        browser.switch_to.new_window("tab")
        self.handle = browser.current_window_handle
        browser.get(url)

    def element(self, name: str) -> Any:
        self.browser.switch_to.window(self.handle)
        return self.browser.find_element(By.ID, name)

    def write(self, name: str, text: str) -> None:
        field = self.element(name)
        field.clear()
        field.send_keys(text)

    def ask(self, question: str, button: str = "ask") -> None:
        self.write("question", question)
        self.element(button).click()

    def stop(self) -> None:
        self.element("stop").click()

    def close(self) -> None:
        self.element("answer")
        self.browser.close()

    @property
    def tokens(self) -> list[str]:
        text: str = self.browser.execute_script(
            "return [...arguments[0].children].map(token => token.textContent).join(' ')", self.element("answer")
        )
        return text.split()

    @property
    def state(self) -> str:
        return str(self.element("status").get_attribute("data-state"))

    @property
    def status(self) -> str:
        return str(self.element("status").text)

    def wait_for_tokens(self, count: int) -> None:
        eventually(lambda: len(self.tokens) >= count, PATIENCE, f"{self.status}: {self.tokens}")

    def wait_for_state(self, state: str) -> None:
        eventually(lambda: self.state == state, PATIENCE, f"never {state}: {self.status}")


@contextmanager
def opened(browser: webdriver.Chrome, chat: Chat) -> Iterator[Page]:
    """The page in a tab of its own; afterwards, only the empty tab at the beginning is left."""
    empty = browser.current_window_handle
    try:
        yield Page(browser, chat.web.url)
    finally:
        for handle in set(browser.window_handles) - {empty}:
            browser.switch_to.window(handle)
            browser.close()
        browser.switch_to.window(empty)


def answer(question: str, count: int = TOKENS) -> list[str]:
    words = question.split()
    return [f"{words[number % len(words)]}-{number + 1}" for number in range(count)]


# -- how soon all stops ------------------------------------------------------------------------------------------------


def seconds_until_all_stop(chat: Chat, question: str, leave: Callable[[], None]) -> float:
    """How long after leave() the handler and its read of the third party end, which both tell on stdout."""

    def told(process: Child, text: str) -> bool:
        return any(line.startswith(f"{question}: {text}") for line in process.out)

    assert not told(chat.worker, "the handler ended")
    begin = time.monotonic()
    leave()
    left = time.monotonic()  # a command to the browser takes its time, which counts
    eventually(
        lambda: told(chat.worker, "the handler ended") and told(chat.api, "the reader left"),
        PATIENCE,
        f"not stopped: {chat.worker.out} {chat.api.out}",
    )
    ended = time.monotonic()
    print(f"{question}: {ended - begin:.2f} s, of which leaving took {left - begin:.2f} s")  # shown by pytest -rP
    return ended - begin


def time_to_stop(browser: webdriver.Chrome, chat: Chat, way: str, question: str) -> float:
    """How long it takes from the click on the stop button (way "stop"), or on the tab's cross ("close")."""
    with opened(browser, chat) as page:
        page.ask(question)
        page.wait_for_tokens(1)
        seconds = seconds_until_all_stop(chat, question, page.stop if way == "stop" else page.close)
        if way == "stop":
            assert page.status == "Stopped."
        return seconds


def quickest(limit: float, measure: Callable[[int], float]) -> float:
    """The shortest of up to three times: a loaded machine may hold anything up, but not each time."""
    times: list[float] = []
    while len(times) < 3 and min(times, default=limit) >= limit:
        times.append(measure(len(times)))
    return min(times)


# -- what has to hold for each page ------------------------------------------------------------------------------------


def check_that_tokens_appear_one_by_one(page: Page, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Meanwhile is called with some of the tokens in view."""
    # The page itself takes down when each token comes into view.
    page.browser.execute_script(
        "window.seen = []; new MutationObserver(changes => changes.forEach(change =>"
        " change.addedNodes.forEach(() => window.seen.push(performance.now()))))"
        ".observe(arguments[0], {childList: true})",
        page.element("answer"),
    )
    page.ask("one by one")
    page.wait_for_tokens(12)
    meanwhile()
    page.wait_for_state("complete")
    assert page.tokens == answer("one by one")
    assert page.status == "That is the whole answer."
    seen = page.browser.execute_script("return window.seen")
    assert len(seen) == TOKENS
    apart = sum(later - earlier > PAUSE * 1000 / 2 for earlier, later in pairwise(seen))
    assert apart > TOKENS / 2, seen  # a busy machine shows some of them together
    assert seen[-1] - seen[0] > (TOKENS - 1) * PAUSE * 1000 * 0.7


def check_that_tabs_do_not_disturb_each_other(chat: Chat, page: Page) -> None:
    page.ask("the first tab")
    second, third = Page(page.browser, chat.web.url), Page(page.browser, chat.web.url)
    second.ask("its neighbour")
    third.ask("one that goes")
    for tab in (third, second, page):
        tab.wait_for_tokens(3)
    second.wait_for_tokens(10)
    second.stop()  # first: its answer goes on for six seconds only
    stopped_at = len(second.tokens)
    third.close()
    chat.api.wait_for_out("one that goes: the reader left")
    chat.api.wait_for_out("its neighbour: the reader left")
    page.wait_for_state("complete")
    assert page.tokens == answer("the first tab")
    assert second.state == "stopped"
    assert second.tokens == answer("its neighbour", stopped_at)


def check_that_a_broker_that_dies_and_comes_back_is_not_seen(chat: Chat, page: Page) -> None:
    page.browser.execute_script(
        "window.states = []; new MutationObserver(() => window.states.push(arguments[0].dataset.state))"
        ".observe(arguments[0], {attributes: true})",
        page.element("status"),
    )
    page.ask("through a restart")
    page.wait_for_tokens(10)
    chat.broker.kill()
    chat.broker.restart()
    page.wait_for_state("complete")
    assert page.tokens == answer("through a restart")
    assert set(page.browser.execute_script("return window.states")) == {"asking", "answering", "complete"}
    chat.worker.wait_for_out("through a restart: ")
    assert sum(line.startswith("through a restart: ") for line in chat.worker.out) == 1


def check_that_a_killed_worker_is_explained(
    chat: Chat, page: Page, reason: str, another: Callable[[], AbstractContextManager[Child]]
) -> None:
    """Kills the worker; another() is one more."""
    page.ask("who answers this")
    page.wait_for_tokens(3)
    chat.worker.send(signal.SIGKILL)
    page.wait_for_state("failed")
    assert page.status == f"The answer is not complete: {reason}. Please ask again."
    before = page.tokens
    assert before == answer("who answers this", len(before))
    with another():
        page.ask("and with a new one")
        page.wait_for_state("complete")
        assert page.tokens == answer("and with a new one")
