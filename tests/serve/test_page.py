"""The page in a real Chromium: what a user does and sees."""

import shutil
import time

import pytest

from tokenizer import HybridTokenizer
from tokenizer.inspect.server import open_server

pytest.importorskip("selenium")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.serve.browser import chromium, open_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (chromium() and shutil.which("chromedriver")), reason="no Chromium with chromedriver here"),
]


@pytest.fixture(scope="module")
def wide():
    """A desktop's window, light."""
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def phone():
    """A phone's, dark."""
    with open_browser(360, 740, dark=True) as browser:
        yield browser


def wait(browser, script, seconds=30):
    """Until a script's value is true; that value."""
    end = time.monotonic() + seconds
    while not (value := browser.execute_script(f"return {script}")):
        assert time.monotonic() < end, f"never: {script}"
        time.sleep(0.01)
    return value


def open_page(browser, served, tab="write"):
    browser.get("about:blank")
    browser.get(f"{served.url}/#{tab}")
    wait(browser, "document.body.dataset.ready")


def write(browser, prompt, tokens=24, seed=3):
    """Fill the form, by keys, and wait for the text."""
    for name, value in (("prompt", prompt), ("max_tokens", tokens), ("seed", seed)):
        field = browser.find_element(By.ID, name)
        field.clear()
        field.send_keys(str(value))
    browser.find_element(By.ID, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    wait(browser, "document.querySelectorAll('.status').length && [...document.querySelectorAll('.status')]"
         ".every((line) => line.textContent.includes('seed'))")  # fmt: skip


def shown_text(browser, side=0):
    return browser.execute_script(
        "return [...document.querySelectorAll('.side')][arguments[0]].querySelector('.pieces').textContent", side
    )


def complaints(browser):
    """What the browser has to say, of a breach of the security policy among other things."""
    return [line["message"] for line in browser.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]


def test_two_runs_write_side_by_side_what_the_api_gives(wide, served):
    openai = pytest.importorskip("openai")
    open_page(wide, served)
    prompt = "The list is\n<b>bold</b> & <script>alert(1)</script>"
    write(wide, prompt)
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        for side, model in enumerate(("tiny", "other")):
            made = client.completions.create(
                model=model, prompt=prompt, max_tokens=24, seed=3, temperature=0.8, top_p=0.95
            )
            assert shown_text(wide, side) == prompt + made.choices[0].text  # as text, never as HTML
    assert wide.execute_script("return document.querySelectorAll('#sides b, #sides script').length") == 0
    assert complaints(wide) == []


def test_a_token_tells_its_kind_its_chances_and_its_parts_by_mouse_and_by_keys(wide, served, tokenizer):
    open_page(wide, served)
    write(wide, "It")
    kinds = wide.execute_script(
        "return [...document.querySelectorAll('.side .piece')].map((p) => [p.token.id, p.token.kind])"
    )
    assert all(tokenizer.explain_token(id_).kind == kind for id_, kind in kinds)
    number = next(i for i, (id_, _) in enumerate(kinds) if tokenizer.explain_token(id_).parts)
    wide.find_elements(By.CSS_SELECTOR, ".side .piece")[number].click()
    card = wait(wide, "!document.getElementById('token-card').hidden && document.querySelector('.tree') "
                "&& document.getElementById('token-card').innerText")  # fmt: skip
    made = tokenizer.explain_token(kinds[number][0])
    assert f"{made.kind} · id {made.id}" in card
    assert card.count("%") >= 5  # the token and its rivals
    for part in made.parts:
        assert part.name.replace(" ", "·").replace("\n", "↵") in card
    wide.switch_to.active_element.send_keys(Keys.HOME)
    assert wide.execute_script("return document.activeElement === document.querySelector('.side .piece')")
    wide.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert wide.execute_script("return document.activeElement === document.querySelectorAll('.side .piece')[1]")
    wide.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert wide.execute_script("return document.getElementById('token-card').hidden")


def test_stop_ends_the_text_and_frees_the_slot(wide, served):
    open_page(wide, served)
    wide.execute_script("document.getElementById('max_tokens').value = 100000")
    wide.find_element(By.ID, "go").click()
    wait(wide, "document.querySelectorAll('.side .piece').length > 20")
    wide.find_element(By.ID, "stop").click()
    wait(wide, "[...document.querySelectorAll('.status')].every((line) => line.textContent.includes('seed'))")
    end = time.monotonic() + 30
    while any(engine.state() != (0, 0) for engine in served.engines.values()):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert wide.find_element(By.ID, "stop").get_attribute("disabled")


def test_training_curves_are_drawn_from_the_metrics(wide, served):
    open_page(wide, served, "training")
    wait(wide, "document.querySelectorAll('.chart svg path').length >= 2")
    label = wide.find_element(By.CSS_SELECTOR, ".chart svg").get_attribute("aria-label")
    assert "validation ends at 2.5" in label
    assert "tiny, training" in label
    wide.find_element(By.CSS_SELECTOR, ".chart svg").send_keys(Keys.ARROW_LEFT)
    assert wide.find_element(By.CSS_SELECTOR, ".read").text.startswith("step 294")


def test_the_tokenizer_view_cuts_what_is_typed_by_two_vocabularies(wide, served, tokenizer):
    open_page(wide, served, "tokenizer")
    field = wait(wide, "document.getElementById('play-text')")
    wide.execute_script(
        "const s = document.querySelectorAll('#tokenizer select')[1]; s.value = 'english-8k';"
        "s.dispatchEvent(new Event('change'))"
    )
    field.clear()
    field.send_keys("The list, Naïve!")
    ids = [tokenizer.encode("The list, Naïve!"), HybridTokenizer.pretrained("english-8k").encode("The list, Naïve!")]
    wait(wide, "JSON.stringify([...document.querySelectorAll('#tokenizer .pieces')].map((row) => "
         f"[...row.querySelectorAll('.piece')].map((p) => p.token.id))) === '{ids}'.replaceAll(' ', '')")  # fmt: skip


@pytest.mark.parametrize("tab", ["write", "training", "tokenizer"])
def test_a_phone_needs_no_sideways_scrolling(phone, served, tab):
    open_page(phone, served, tab)
    if tab == "write":
        write(phone, "The list is a value of the first item " * 3)
    ready = {"write": ".side .piece", "training": ".chart svg", "tokenizer": "#tokenizer .piece"}[tab]
    wait(phone, f"document.querySelectorAll('{ready}').length")
    assert phone.execute_script("return document.documentElement.scrollWidth") <= 360
    # Dark, and every control has a name and the size of a finger or a form field.
    assert phone.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 31)"
    unnamed = phone.execute_script(
        "return [...document.querySelectorAll('button, input, select, textarea')].filter((e) => e.offsetParent && "
        "!(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    assert complaints(phone) == []


def test_tabs_answer_to_arrow_keys(wide, served):
    open_page(wide, served)
    wide.find_element(By.ID, "tab-write").send_keys(Keys.ARROW_RIGHT)
    assert wide.execute_script("return document.activeElement.id") == "tab-training"
    assert wide.find_element(By.ID, "training").is_displayed()
    assert not wide.find_element(By.ID, "write").is_displayed()


def test_the_tokenizers_own_page_needs_no_model(wide):
    import threading

    server = open_server(["english-8k"], HybridTokenizer.pretrained, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        wide.get(f"http://localhost:{server.server_address[1]}/")
        wait(wide, "document.querySelectorAll('.piece').length > 20")
        text = wide.execute_script("return document.getElementById('play-text').value")
        expected = [segment.id for segment in HybridTokenizer.pretrained("english-8k").segment(text)]
        assert (
            wide.execute_script("return [...document.querySelectorAll('.pieces .piece')].map((p) => p.token.id)")
            == expected
        )
        assert complaints(wide) == []
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
