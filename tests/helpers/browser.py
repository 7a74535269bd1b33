"""A page in headless Chromium, and everything it complains of or asks the network for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@dataclass(frozen=True)
class Opened:
    """A page that has drawn its charts.

    Attributes:
        page: of Playwright's.
        console: all that was written to the console, and errors that nobody caught.
        requests: addresses that were asked for, but for files and what the page makes by itself.
        cpu_s: seconds that the main thread has computed by then.
    """

    page: Any
    console: list[str]
    requests: list[str]
    cpu_s: float


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped where there is none, but not in CI."""
    path = shutil.which("chromium")
    if path is None and "CI" not in os.environ:
        pytest.skip("needs Debian's chromium on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, file: Path, *, width: int = 1440, scheme: str = "light") -> Iterator[Opened]:
    """The file in a new window, when all charts are drawn."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    console: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: console.append(message.text))
    page.on("pageerror", lambda error: console.append(str(error)))
    page.on("request", lambda request: _is_local(request.url) or requests.append(request.url))
    session = context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(file.resolve().as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached", timeout=120_000)
    metrics = {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}
    yield Opened(page, console, requests, metrics["TaskDuration"])
    context.close()


def _is_local(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:"))
