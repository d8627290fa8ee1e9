"""The chat page in Chromium, for its tests."""

import pytest
from stub_api import Stub


@pytest.fixture
def stub():
    server = Stub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def context(chromium):
    context = chromium.new_context(viewport={"width": 1280, "height": 860})
    context.set_default_timeout(15_000)
    yield context
    context.close()


@pytest.fixture
def page(context, stub):
    """The page, loaded; it may not throw, and may not break its Content-Security-Policy."""
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None,
    )
    load(page, stub)
    yield page
    assert faults == []


def load(page, stub):
    page.goto(stub.url)
    page.wait_for_selector("#turns > *")
    page.locator("#model", has_text="tiny").wait_for()


def say(page, text, wait=True):
    """Send a message; wait: until the answer is over."""
    page.fill("#composer-text", text)
    page.press("#composer-text", "Enter")
    if wait:
        settled(page)


def settled(page):
    page.wait_for_selector("#send:not([hidden])")


def texts(page, selector):
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


def settings(page):
    """Open the settings."""
    if page.locator("#panel").is_hidden():
        page.click("#open-panel")
    return page.locator("#panel")
