"""A real Chromium, headless, and nothing of it left afterwards."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from playwright.sync_api import expect, sync_playwright

from .servers import system_part, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, BrowserContext, Page

    from .servers import Server

PHONE = {"width": 360, "height": 780}

# Without the last ones it looks up its vendor's hosts, which a closed network refuses.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator[Browser]:
    path = system_part("chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Visitor:
    """A browser's profile, none of whose pages may report an error."""

    def __init__(self, browser: Browser) -> None:
        self.context: BrowserContext = browser.new_context(viewport=PHONE)  # type: ignore[arg-type]
        self.context.set_default_timeout(20_000)
        self.problems: list[str] = []
        self.context.on("console", lambda one: self.problems.append(f"{one.type}: {one.text}"))
        self.context.on("weberror", lambda error: self.problems.append(str(error.error)))

    def opens(self, server: Server, path: str) -> Page:
        page = self.context.new_page()
        page.goto(server.url + path)
        return page

    def logs_in(self, server: Server, name: str) -> Page:
        page = self.opens(server, "/notifications")
        page.fill("#name", name)
        page.click("#log-in")
        expect(page.locator("#state")).to_have_text("online")
        return page


def number_in(page: Page, selector: str) -> int:
    return int(re.sub(r"\D", "", page.locator(selector).text_content() or "") or 0)


def reaches(page: Page, selector: str, least: int) -> None:
    wait_for(lambda: number_in(page, selector) >= least, what=f"{selector} to reach {least}")
