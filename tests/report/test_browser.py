"""The pages in a real browser; skipped without Chromium and chromedriver."""

import json
import shutil

import pytest

from slm_jax.cli.report import main
from slm_jax.report.page import write_report

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("google-chrome"))),
    reason="no Chromium with chromedriver",
)
webdriver = pytest.importorskip("selenium.webdriver")

QUIET = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage""".split()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for argument in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def open_page(browser, path, width=1280, dark=False):
    """Open a page at a width, and return the URLs that it requested."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get_log("performance")
    browser.get(path.as_uri())
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "chrome:"))]  # chrome: the start page


@pytest.fixture
def pages(copy, curriculum):
    """Reports of a run with all sections and of a curriculum, and their comparison."""
    run = copy("a-run-with-quite-a-long-name-20260101-120000-abcd")
    text = "x" * 300 + " <b>bold</b> " + "word " * 80
    run.samples.write_text(f"\n## Step 24\n\n    {text}\n")
    row = {"task": "BLiMP", "metric": "accuracy", "value": 0.61, "low": 0.6, "high": 0.62, "count": 1000, "step": 24}
    rows = [row | {"group": "all", "reference": "chance 50 %; people 88.6 %"}, row | {"group": "syntax / a / b"}]
    (run.path / "evaluation.json").write_text(json.dumps({"results": rows}))
    columns = "timestamp stage model device parameters dataset length loss perplexity accuracy version".split()
    (run.path / "benchmarks.csv").write_text(",".join(columns) + "\n" + ",".join(["some value 12.5"] * 11) + "\n")
    main([str(run.path), str(curriculum), "--to", str(run.path / "both.html")])
    return [write_report(run.path)[1], write_report(curriculum)[1], run.path / "both.html"]


def test_pages_fit_the_screen_and_request_and_log_nothing(browser, pages):
    for page in pages:
        for width, dark in ((360, False), (360, True), (1280, False)):
            assert open_page(browser, page, width, dark) == [page.as_uri()]
            browser.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
            page_width = browser.execute_script("return document.documentElement.scrollWidth")
            assert page_width <= browser.execute_script("return document.documentElement.clientWidth") <= width, (
                page,
                width,
            )
            color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert color == ("rgb(20, 24, 31)" if dark else "rgb(246, 247, 249)")
    assert browser.get_log("browser") == []


SHOWN = "return [...document.querySelectorAll('.view')].filter((v) => v.offsetParent).map((v) => v.className)"


def test_controls(browser, pages):
    open_page(browser, pages[0])
    assert all(name == "view axis-step lin" for name in browser.execute_script(SHOWN))
    charts = len(browser.execute_script(SHOWN))
    browser.find_element("css selector", "[value='tokens']").click()
    browser.find_element("css selector", ".log").click()
    shown = browser.execute_script(SHOWN)
    assert shown[0] == "view axis-tokens log"
    assert shown[1:] == ["view axis-tokens lin"] * (charts - 1)
    smooth = "return getComputedStyle(document.querySelector('.smooth')).display"
    assert browser.execute_script(smooth) != "none"
    browser.find_element("css selector", ".smoothing").click()
    assert browser.execute_script(smooth) == "none"


def test_values_are_displayed(browser, pages, trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    open_page(browser, pages[0])
    browser.find_element("css selector", ".smoothing").click()
    plot = browser.find_element("css selector", ".plot")
    keys = webdriver.Keys
    browser.execute_script("arguments[0].focus()", plot)
    readout = plot.find_element("css selector", ".readout")
    for pressed, step in ((keys.END, 24), (keys.ARROW_LEFT, 23), (keys.HOME, 1), (keys.ARROW_RIGHT, 2)):
        plot.send_keys(pressed)
        lines = readout.text.splitlines()
        assert lines[0] == f"step {step}"
        assert lines[1].startswith("training ")
        assert float(lines[1].split()[1]) == pytest.approx(rows[step - 1]["loss"], rel=1e-3)
    plot.send_keys(keys.ESCAPE)
    assert not readout.is_displayed()
    area = browser.find_element("css selector", ".area")
    webdriver.ActionChains(browser).move_to_element(area).perform()  # at its center
    assert readout.is_displayed()
    assert readout.text.startswith("step 12")
    assert "validation" in readout.text


def test_without_scripts(browser, pages):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        open_page(browser, pages[0])
        views = browser.find_elements("css selector", ".view.axis-step.lin")
        assert views
        assert all(view.is_displayed() for view in views)
        browser.find_element("css selector", "[value='seconds']").click()
        assert not views[0].is_displayed()
        assert browser.find_element("css selector", ".view.axis-seconds.lin").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
