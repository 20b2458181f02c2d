"""The chat view of the page in a real Chromium."""

import json
import time

import pytest

pytest.importorskip("selenium")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.serve.browser import IN_BROWSER, open_browser
from tests.serve.test_page import open_page, wait, warnings

pytestmark = IN_BROWSER


@pytest.fixture(scope="module")
def wide():
    """Desktop window, light color scheme."""
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def phone():
    """Phone screen, dark color scheme."""
    with open_browser(390, 800, dark=True) as browser:
        yield browser


def fill(browser, name, value):
    """Type a value into a field of the settings, which are opened."""
    browser.execute_script("document.querySelector('.chat-settings').open = true")
    field = browser.find_element(By.ID, name)
    field.clear()
    field.send_keys(str(value))


def say(browser, text, turns):
    """Send a message by keyboard and wait for the end of the answer, the turn of that number."""
    browser.find_element(By.ID, "message").send_keys(text, Keys.ENTER)
    wait(browser, f"document.querySelectorAll('.turn').length === {turns} && "
         "document.querySelector('.turn:last-child .status').textContent.includes('seed')")  # fmt: skip


def answers(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('.turn-assistant .pieces')].map((row) => row.textContent)"
    )


def test_two_turns_show_the_answers_of_the_api(wide, served):
    openai = pytest.importorskip("openai")
    open_page(wide, served, "chat")
    assert "not trained on conversations" in wide.find_element(By.ID, "chat-note").text
    for name, value in (("system", "It returns"), ("chat-max", 12), ("chat-seed", 3)):
        fill(wide, name, value)
    texts = ["The list is\n<b>bold</b> & <script>alert(1)</script>", "the first item"]
    messages = [{"role": "system", "content": "It returns"}]
    message = wide.find_element(By.ID, "message")
    message.send_keys(texts[0].partition("\n")[0], Keys.SHIFT, Keys.ENTER)
    message.send_keys(Keys.NULL)  # releases Shift
    say(wide, texts[0].partition("\n")[2], 2)
    say(wide, texts[1], 4)
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        for turn, text in enumerate(texts):
            messages.append({"role": "user", "content": text})
            answer = client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=12, seed=3, temperature=0.8, top_p=0.95
            )
            content = answer.choices[0].message.content
            assert answers(wide)[turn] == content  # as text, never as HTML
            messages.append({"role": "assistant", "content": content})
    assert wide.execute_script("return document.querySelectorAll('#turns b, #turns script').length") == 0
    assert "reused" in wide.find_elements(By.CSS_SELECTOR, ".turn-assistant .status")[1].text
    exported = wide.execute_async_script(
        "const done = arguments[0]; URL.createObjectURL = (blob) => (blob.text().then(done), '#chat');"
        "document.getElementById('export').click()"
    )
    assert json.loads(exported) == {"messages": messages}
    assert warnings(wide) == []


def test_a_token_of_an_answer_shows_its_alternatives_by_keyboard(wide, served):
    open_page(wide, served, "chat")
    fill(wide, "chat-max", 8)
    say(wide, "The list", 2)
    wide.execute_script("document.querySelector('.turn-assistant .pieces').focus()")
    wide.switch_to.active_element.send_keys(Keys.HOME)
    card = wait(
        wide, "!document.getElementById('token-card').hidden && document.getElementById('token-card').innerText"
    )
    assert card.count("%") >= 5
    wide.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert wide.execute_script("return document.activeElement === document.querySelectorAll('.turn .piece')[1]")


def test_retry_reset_and_an_error(wide, served):
    open_page(wide, served, "chat")
    fill(wide, "chat-max", 8)
    say(wide, "The list", 2)
    first = answers(wide)
    wide.execute_script("document.querySelector('.turn:last-child .status').textContent = ''")
    wide.find_element(By.ID, "retry").click()
    wait(wide, "document.querySelector('.turn:last-child .status').textContent.includes('seed')")
    assert len(answers(wide)) == 1
    assert answers(wide) != first  # another seed
    wide.find_element(By.ID, "new-chat").click()
    assert answers(wide) == []
    assert wide.execute_script("return document.activeElement.id") == "message"
    wide.execute_script("document.getElementById('message').value = 'list '.repeat(400)")
    wide.find_element(By.ID, "send").click()
    wait(wide, "document.getElementById('chat-status').classList.contains('problem')")
    assert "the limit is 127 tokens" in wide.find_element(By.ID, "chat-status").text
    assert wide.find_element(By.ID, "message").get_attribute("value").startswith("list list")  # it can be shortened
    assert answers(wide) == []


def test_escape_stops_the_answer_and_frees_the_slot(wide, served, monkeypatch):
    monkeypatch.setattr(served.engines["tiny"], "context", 120)
    open_page(wide, served, "chat")
    wide.execute_script("document.getElementById('chat-temperature').value = 2")
    wide.find_element(By.ID, "message").send_keys("The list", Keys.ENTER)
    wide.find_element(By.ID, "message").send_keys(Keys.ESCAPE)
    wait(wide, "document.getElementById('chat-stop').disabled")
    end = time.monotonic() + 30
    while served.engines["tiny"].occupancy() != (0, 0):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_chat_is_the_first_view_of_a_run_trained_on_conversations(wide, served, loaded):
    folder = loaded.run.path / "corpus"
    folder.mkdir(exist_ok=True)
    manifest = folder / "manifest.json"
    manifest.write_text('{"chat_template": "0f"}')
    try:
        wide.get("about:blank")
        wide.get(served.url)
        wait(wide, "document.body.dataset.ready")
        assert wide.find_element(By.ID, "chat").is_displayed()
        assert wide.find_element(By.CSS_SELECTOR, "[role=tab]").text == "Chat"
        assert not wide.find_element(By.ID, "chat-note").is_displayed()
    finally:
        manifest.unlink()
    wide.get("about:blank")
    wide.get(served.url)
    wait(wide, "document.body.dataset.ready")
    assert wide.find_element(By.ID, "generate").is_displayed()


def test_a_phone_needs_no_horizontal_scrolling(phone, served):
    open_page(phone, served, "chat")
    fill(phone, "chat-max", 30)
    phone.execute_script("document.querySelector('.chat-settings').open = false")
    say(phone, "The list is a value of the first item " * 3, 2)
    assert phone.execute_script("return document.documentElement.scrollWidth") <= 390
    unnamed = phone.execute_script(
        "return [...document.querySelectorAll('button, input, select, textarea')].filter((e) => e.offsetParent && "
        "!(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    assert warnings(phone) == []
