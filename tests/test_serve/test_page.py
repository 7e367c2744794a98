"""The page in a headless Chromium, which drives it as a person does."""

import os
import re
import shutil
import time

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from runtime import load
from runtime.scheduler import Scheduler
from test_serve.conftest import VERDICT, serving

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium, or no chromedriver, on PATH")


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,950"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


@pytest.fixture
def page(browser, served):
    browser.get(served.url)
    until(browser, lambda: text(browser, "name") == "doge-3m")
    return browser


@pytest.fixture
def slowly(monkeypatch, served):
    """There is time to see text come and to stop it: a step takes a hundredth of a second, no token ends a text."""
    monkeypatch.setattr(served.service.engine, "end_ids", frozenset())
    step = Scheduler.step

    def slow(scheduler):
        time.sleep(0.01)
        return step(scheduler)

    monkeypatch.setattr(Scheduler, "step", slow)


def until(browser, condition, seconds=30):
    WebDriverWait(browser, seconds, 0.02).until(lambda _: condition())


def find(browser, name):
    return browser.find_element(By.ID, name)


def text(browser, name):
    return find(browser, name).text


def enter(browser, name, value):
    field = find(browser, name)
    field.clear()
    field.send_keys(value)


def ended(browser):
    return "ended by" in text(browser, "end")


def test_a_prompt_is_continued_as_the_api_does(page, client):
    expected = client.completions.create(model="doge-3m", prompt="def main(", temperature=0, max_tokens=30)
    enter(page, "temperature", "0")
    enter(page, "max_tokens", "30")
    enter(page, "prompt", "def main(" + Keys.CONTROL + Keys.ENTER)
    until(page, lambda: ended(page))
    shown = find(page, "out").get_property("textContent")
    assert shown == "def main(" + expected.choices[0].text
    assert "30 tokens after 3" in text(page, "end")
    assert "ended by length" in text(page, "end")


def test_tokens_appear_one_after_the_other_and_stop_ends_them(page, served, slowly):
    enter(page, "max_tokens", "5000")
    enter(page, "temperature", "1")
    enter(page, "prompt", "import ")
    lengths = set()
    find(page, "send").click()
    until(page, lambda: lengths.add(len(text(page, "out"))) or len(lengths) > 4)
    find(page, "stop").click()
    until(page, lambda: ended(page))
    assert "ended by stopped" in text(page, "end")
    served.settle(10)
    length = len(text(page, "out"))
    assert length == len(text(page, "out"))
    assert find(page, "send").is_enabled()
    assert not find(page, "stop").is_enabled()


def test_a_chat_has_turns(page):
    find(page, "tab-chat").click()
    enter(page, "temperature", "0")
    enter(page, "max_tokens", "12")
    for number, message in enumerate(("Hello <b>you</b>", "And again"), 1):
        enter(page, "prompt", message)
        find(page, "send").click()
        until(page, lambda: ended(page))
        turns = page.find_elements(By.CSS_SELECTOR, ".turn")
        assert len(turns) == 2 * number
        assert turns[-2].text == message
        assert turns[-1].text
        until(page, lambda: find(page, "send").is_enabled())
    find(page, "clear").click()
    assert not page.find_elements(By.CSS_SELECTOR, ".turn")


def test_an_error_is_shown_and_goes_away(page):
    enter(page, "top_p", "7")
    enter(page, "prompt", "x")
    find(page, "send").click()
    until(page, lambda: "top_p is 7" in text(page, "problem"))
    enter(page, "top_p", "1")
    enter(page, "max_tokens", "2")
    find(page, "send").click()
    until(page, lambda: "ended by length" in text(page, "end"))
    assert not find(page, "problem").is_displayed()


def test_the_figures_move_while_text_is_written(page, served, slowly):
    enter(page, "max_tokens", "450")
    enter(page, "prompt", "x")
    find(page, "send").click()
    until(page, lambda: text(page, "used") == "1" and float(text(page, "speed")) > 0)
    assert text(page, "slots") == "4"
    find(page, "stop").click()
    served.settle()
    until(page, lambda: text(page, "used") == "0")


def test_the_verification_is_a_table(page):
    rows = page.find_elements(By.CSS_SELECTOR, "#checks tr")
    assert len(rows) == 2
    assert VERDICT["case"] in rows[1].text
    assert "passed" in rows[1].text
    assert "512" in text(page, "about")


def test_a_key_is_asked_for(browser, artifact, tmp_path):
    (tmp_path / "key").write_text("s3cret")
    with serving(load(artifact), api_key_file=tmp_path / "key") as locked:
        browser.get(locked.url)
        until(browser, lambda: find(browser, "access").is_displayed())
        assert "API key" in text(browser, "problem")
        enter(browser, "key", "s3cret" + Keys.TAB)
        until(browser, lambda: text(browser, "name") == "doge-3m")
        enter(browser, "max_tokens", "3")
        enter(browser, "prompt", "x")
        find(browser, "send").click()
        until(browser, lambda: ended(browser))
    browser.get_log("browser")  # the refused requests of this test


def test_nothing_is_asked_of_other_addresses_and_nothing_fails(page, served):
    page.get_log("performance")
    page.refresh()
    until(page, lambda: text(page, "slots") == "4")
    asked = set(
        re.findall(r'"url":"(https?://[^/"]+)', " ".join(each["message"] for each in page.get_log("performance")))
    )
    assert asked == {served.url}
    severe = [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    severe = [entry for entry in severe if "status of 400" not in entry["message"]]  # another test's
    assert severe == []


def test_what_a_person_sees(page):
    """With WM_SCREENSHOTS, a folder, pictures of the page are left there."""
    folder = os.environ.get("WM_SCREENSHOTS")
    enter(page, "temperature", "0.7")
    enter(page, "seed", "3")
    enter(page, "prompt", 'def read_lines(path):\n    """Read')
    find(page, "send").click()
    until(page, lambda: ended(page))
    if folder:
        page.save_screenshot(f"{folder}/prompt.png")
    find(page, "tab-chat").click()
    enter(page, "prompt", "Write a loop over the files of a folder.")
    find(page, "send").click()
    until(page, lambda: ended(page))
    if folder:
        page.save_screenshot(f"{folder}/chat.png")
    width = page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    page.set_window_size(430, 950)
    narrow = page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    if folder:
        page.save_screenshot(f"{folder}/narrow.png")
    page.set_window_size(1200, 950)
    assert width
    assert narrow
