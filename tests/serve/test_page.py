"""The page in a real Chromium: user actions and what is displayed."""

import time

import pytest

from tokenizer import HybridTokenizer
from tokenizer.inspect.server import open_server

pytest.importorskip("selenium")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.serve.browser import IN_BROWSER, open_browser

pytestmark = IN_BROWSER


@pytest.fixture(scope="module")
def wide():
    """Desktop window, light color scheme."""
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def phone():
    """Phone screen, dark color scheme."""
    with open_browser(360, 740, dark=True) as browser:
        yield browser


def wait(browser, script, seconds=30):
    """Wait until a script's value is true, and return it."""
    end = time.monotonic() + seconds
    while not (value := browser.execute_script(f"return {script}")):
        assert time.monotonic() < end, f"timeout: {script}"
        time.sleep(0.01)
    return value


def open_page(browser, served, tab="generate"):
    browser.get("about:blank")
    browser.get(f"{served.url}/#{tab}")
    wait(browser, "document.body.dataset.ready")


def generate(browser, prompt, tokens=24, seed=3):
    """Fill in the form by keyboard, submit it and wait for the text."""
    for name, value in (("prompt", prompt), ("max_tokens", tokens), ("seed", seed)):
        field = browser.find_element(By.ID, name)
        field.clear()
        field.send_keys(str(value))
    browser.find_element(By.ID, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    wait(browser, "document.querySelectorAll('.status').length && [...document.querySelectorAll('.status')]"
         ".every((line) => line.textContent.includes('seed'))")  # fmt: skip


def shown_text(browser, panel=0):
    return browser.execute_script(
        "return [...document.querySelectorAll('.panel')][arguments[0]].querySelector('.pieces').textContent", panel
    )


def warnings(browser):
    """Return the browser's warnings and errors, violations of the content security policy included."""
    return [line["message"] for line in browser.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]


def test_two_runs_side_by_side_show_the_text_of_the_api(wide, served):
    openai = pytest.importorskip("openai")
    open_page(wide, served)
    prompt = "The list is\n<b>bold</b> & <script>alert(1)</script>"
    generate(wide, prompt)
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        for panel, model in enumerate(("tiny", "other")):
            completion = client.completions.create(
                model=model, prompt=prompt, max_tokens=24, seed=3, temperature=0.8, top_p=0.95
            )
            assert shown_text(wide, panel) == prompt + completion.choices[0].text  # as text, never as HTML
    assert wide.execute_script("return document.querySelectorAll('#panels b, #panels script').length") == 0
    assert warnings(wide) == []


def test_a_token_shows_kind_probabilities_and_parts_by_mouse_and_keyboard(wide, served, tokenizer):
    open_page(wide, served)
    generate(wide, "It")
    kinds = wide.execute_script(
        "return [...document.querySelectorAll('.panel .piece')].map((p) => [p.token.id, p.token.kind])"
    )
    assert all(tokenizer.explain_token(id_).kind == kind for id_, kind in kinds)
    number = next(i for i, (id_, _) in enumerate(kinds) if tokenizer.explain_token(id_).parts)
    wide.find_elements(By.CSS_SELECTOR, ".panel .piece")[number].click()
    card = wait(wide, "!document.getElementById('token-card').hidden && document.querySelector('.tree') "
                "&& document.getElementById('token-card').innerText")  # fmt: skip
    explanation = tokenizer.explain_token(kinds[number][0])
    assert f"{explanation.kind} · id {explanation.id}" in card
    assert card.count("%") >= 5  # the token and its alternatives
    for part in explanation.parts:
        assert part.name.replace(" ", "·").replace("\n", "↵") in card
    wide.switch_to.active_element.send_keys(Keys.HOME)
    assert wide.execute_script("return document.activeElement === document.querySelector('.panel .piece')")
    wide.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert wide.execute_script("return document.activeElement === document.querySelectorAll('.panel .piece')[1]")
    wide.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert wide.execute_script("return document.getElementById('token-card').hidden")


def test_stop_ends_generation_and_frees_the_slot(wide, served):
    open_page(wide, served)
    wide.execute_script("document.getElementById('max_tokens').value = 100000")
    wide.find_element(By.ID, "go").click()
    wait(wide, "document.querySelectorAll('.panel .piece').length > 20")
    wide.find_element(By.ID, "stop").click()
    wait(wide, "[...document.querySelectorAll('.status')].every((line) => line.textContent.includes('seed'))")
    end = time.monotonic() + 30
    while any(engine.occupancy() != (0, 0) for engine in served.engines.values()):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert wide.find_element(By.ID, "stop").get_attribute("disabled")


def test_learning_curves_are_drawn_from_the_metrics(wide, served):
    open_page(wide, served, "training")
    wait(wide, "document.querySelectorAll('.chart svg path').length >= 2")
    label = wide.find_element(By.CSS_SELECTOR, ".chart svg").get_attribute("aria-label")
    assert "validation ends at 2.5" in label
    assert "tiny, training" in label
    wide.find_element(By.CSS_SELECTOR, ".chart svg").send_keys(Keys.ARROW_LEFT)
    assert wide.find_element(By.CSS_SELECTOR, ".readout").text.startswith("step 294")


def test_the_tokenizer_view_tokenizes_typed_text_with_two_vocabularies(wide, served, tokenizer):
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


@pytest.mark.parametrize("tab", ["generate", "training", "tokenizer"])
def test_a_phone_needs_no_horizontal_scrolling(phone, served, tab):
    open_page(phone, served, tab)
    if tab == "generate":
        generate(phone, "The list is a value of the first item " * 3)
    ready = {"generate": ".panel .piece", "training": ".chart svg", "tokenizer": "#tokenizer .piece"}[tab]
    wait(phone, f"document.querySelectorAll('{ready}').length")
    assert phone.execute_script("return document.documentElement.scrollWidth") <= 360
    # Dark color scheme, and every control has an accessible name.
    assert phone.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 31)"
    unnamed = phone.execute_script(
        "return [...document.querySelectorAll('button, input, select, textarea')].filter((e) => e.offsetParent && "
        "!(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    assert warnings(phone) == []


def test_arrow_keys_move_between_tabs(wide, served):
    open_page(wide, served)
    wide.find_element(By.ID, "tab-generate").send_keys(Keys.ARROW_RIGHT)
    assert wide.execute_script("return document.activeElement.id") == "tab-chat"
    assert wide.find_element(By.ID, "chat").is_displayed()
    assert not wide.find_element(By.ID, "generate").is_displayed()


def test_the_page_of_the_tokenizer_needs_no_model(wide):
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
        assert warnings(wide) == []
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
