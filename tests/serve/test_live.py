"""The page in a real Chromium beside a running training process: curves, checkpoints, other runs."""

import itertools
import json
import os
import re
import sys
import time
import urllib.request

import pytest

pytest.importorskip("selenium")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from selenium.webdriver.common.by import By

from tests.helpers import ONE_BLOCK, words_of
from tests.processes import Process, command_environment
from tests.serve.browser import IN_BROWSER, open_browser
from tests.serve.test_page import warnings

pytestmark = IN_BROWSER

INTERVALS = {"eval.every": 500, "checkpoint.every": 500}
TINY = words_of({**ONE_BLOCK, **INTERVALS, "train.batch_size": 4, "eval.sample_tokens": 0})


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a command in a folder with texts, and returns its process and its log."""
    for name in "ab":
        text = "".join(f"Line {i} of {name}: the quick fox jumps over {i * 7 % 13} dogs.\n" for i in range(600))
        (tmp_path / f"{name}.txt").write_text(text)
    environment = command_environment(tmp_path / "cache")
    numbers = itertools.count()

    def start(*args):
        command = [sys.executable, "-m", *args]
        log = tmp_path / f"log-{next(numbers)}"
        with log.open("w") as output:
            return Process(command, cwd=tmp_path, env=environment, stdout=output, stderr=output), log

    return start


def wait_for(value, seconds=120, about=None):
    """Wait until a function returns something true, and return it; the file `about` explains why it does not."""
    end = time.monotonic() + seconds
    while not (result := value()):
        assert time.monotonic() < end, about.read_text() if about else "timeout"
        time.sleep(0.1)
    return result


def test_the_page_follows_a_training_run(start, tmp_path):
    other, _ = start("slm_jax.train", "a.txt", *TINY, "--run", "runs/other", "--train.steps", "300")
    assert other.wait(120) == 0
    training, _ = start("slm_jax.train", "b.txt", *TINY, "--run", "runs/mine", "--train.steps", "1000000")
    wait_for(lambda: (tmp_path / "runs" / "mine" / "checkpoints" / "500").is_dir())
    _, log = start("slm_jax.serve", "runs/", "--port", "0", "--slots", "2")
    (address,) = wait_for(lambda: re.findall(r"http://localhost:\d+", log.read_text())[:1], about=log)
    with open_browser() as browser:
        browser.get(f"{address}/#training")

        def text(selector):
            script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText).join(' | ')"
            return browser.execute_script(script, selector)  # at once: the page replaces elements

        def step():
            found = re.search(r"mine: step ([\d,]+) of 1,000,000", text(".run-states"))
            return int(found[1].replace(",", "")) if found else 0

        first = wait_for(step)
        chart = text(".readout")
        assert wait_for(lambda: step() > first)
        assert wait_for(lambda: text(".readout") != chart)
        saved = int(re.sub(r"\D", "", wait_for(lambda: text("button.load"))))
        browser.execute_script("document.querySelector('button.load').click()")
        served = wait_for(lambda: re.search(r", step ([\d,]+) is served", text(".run-states")))
        assert wait_for(
            lambda: (
                (served := re.search(r", step ([\d,]+) is served", text(".run-states")))
                and int(served[1].replace(",", "")) >= saved
            )
        ), served
        browser.execute_script(
            "const s = document.querySelectorAll('#training select')[1]; s.value = 'other';"
            "s.dispatchEvent(new Event('change'))"
        )
        wait_for(lambda: "other: step 300 of 300" in text(".run-states"))
        assert "validated on different text" in text(".caution")
        assert text(".run-states a") == "Report"
        browser.execute_script("document.querySelector('button.serve').click()")
        wait_for(lambda: "other: step 300 of 300, step 300 is served" in text(".run-states"), about=log)
        with urllib.request.urlopen(f"{address}/v1/models") as answer:
            assert [model["id"] for model in json.load(answer)["data"]] == ["other"]
        wait_for(lambda: text("#panels select") == "other")
        browser.execute_script("document.querySelector('#generation-form').requestSubmit()")
        assert wait_for(lambda: re.search(r"\d+ tokens · ", text("#panels .status")))
        assert "mine: step" in text(".run-states")  # the other way round
        assert text("button.serve") == "Serve in place of other"
        damaged = next((tmp_path / "runs" / "mine").glob("tokenizer.hybtok"))
        damaged.write_bytes(b"x")
        browser.execute_script("document.querySelector('button.serve').click()")
        wait_for(lambda: "tokenizer.hybtok" in text(".run-states .problem"))
        with urllib.request.urlopen(f"{address}/v1/models") as answer:
            assert [model["id"] for model in json.load(answer)["data"]] == ["other"]
        if folder := os.environ.get("SCREENSHOTS"):
            browser.save_screenshot(f"{folder}/live.png")
        browser.find_element(By.CSS_SELECTOR, ".run-states a").click()
        wait_for(lambda: len(browser.window_handles) == 2)
        browser.switch_to.window(browser.window_handles[1])
        wait_for(lambda: "other" in browser.title)
        assert browser.find_elements(By.CSS_SELECTOR, "svg path")
        browser.close()
        browser.switch_to.window(browser.window_handles[0])
        assert [line for line in warnings(browser) if "/api/load" not in line] == []  # 409 of the damaged run
    assert training.poll() is None


def test_the_server_follows_a_training_run(start, tmp_path):
    start("slm_jax.train", "a.txt", *TINY, "--run", "run", "--train.steps", "1000000")
    wait_for(lambda: (tmp_path / "run" / "checkpoints" / "500").is_dir())
    _, log = start("slm_jax.serve", "run", "--follow", "--port", "0", "--slots", "2")
    shown = wait_for(lambda: re.findall(r"run: serving step (\d+)", log.read_text())[1:], about=log)
    assert int(shown[-1]) > 500
