"""A headless Chromium that all tests of pages share (two of them in one process would be refused)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

ARGUMENTS = ["--no-sandbox", "--disable-background-networking", "--disable-gpu"]


def chromium_path() -> str | None:
    """A Chromium of the system; None lets Playwright look for its own."""
    named = os.environ.get("REGARD_CHROMIUM")
    found = (shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome"))
    return named or next((path for path in found if path), None)


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """The browser. Without one the tests are skipped on a desk and fail in continuous integration."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        _without_browser(f"playwright is not installed ({error}); pip install 'regard[dev]'")
    with sync_playwright() as playwright:
        try:
            launched = playwright.chromium.launch(executable_path=chromium_path(), args=ARGUMENTS)
        except Error as error:
            first = str(error).strip().splitlines()[0]
            _without_browser(f"no Chromium to test the page with ({first}); install chromium")
        yield launched
        launched.close()


def _without_browser(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
