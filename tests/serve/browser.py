"""Headless Chromium, driven by selenium."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

_ARGUMENTS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --lang=en""".split()


def chromium() -> str | None:
    """Return the path of Chromium or Chrome, None if there is none."""
    return shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


IN_BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (chromium() and shutil.which("chromedriver")), reason="Chromium or chromedriver is not installed"
    ),
]
"""Marks of tests in a browser."""


@contextlib.contextmanager
def open_browser(width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Any]:
    """Open a browser with an empty profile; it emulates a phone if the width is below 600 pixels."""
    options = Options()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for argument in (*_ARGUMENTS, f"--user-data-dir={folder}"):
            options.add_argument(argument)
        options.binary_location = chromium() or ""
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        try:
            yield browser
        finally:
            browser.quit()
