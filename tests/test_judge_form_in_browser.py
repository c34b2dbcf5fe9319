"""The form for human judges in a headless Chromium: opened, answered by keyboard, exported, read back."""

import json
import shutil
import time

import pytest

from helpers.judging import candidates, rows_of, run

selenium = pytest.importorskip("selenium", reason="the form is driven by selenium, which is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
HOSTILE = "</script><script>document.title = 'taken'</script> <b>bold</b>\nsecond line"


@pytest.fixture
def open_browser(tmp_path):
    """A function that opens the browser on one profile, whose storage survives the browser."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("the form is driven in Chromium by chromedriver: one of the two is missing")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    opened = []

    def start() -> Chrome:
        options = ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (
            *(
                "--headless=new --no-sandbox --disable-gpu --disable-background-networking "
                "--disable-sync --no-first-run --window-size=1200,800"
            ).split(),
            f"--user-data-dir={tmp_path / 'profile'}",
        ):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
        opened.append(Chrome(options=options, service=Service(DRIVER)))
        return opened[-1]

    yield start
    for browser in opened:
        browser.quit()


def test_answered_by_keyboard_remembered_exported_and_read_back(tmp_path, open_browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    files = candidates(tmp_path, 4, good=f"good {HOSTILE}")
    common = [*files, "--backend", "human", "--criterion", "helpful", "--out", "people.jsonl"]
    run(tmp_path, *common, "--form", "form.html")

    def page(browser):
        browser.get((tmp_path / "form.html").as_uri())
        return browser.find_element(By.TAG_NAME, "body"), lambda name: browser.find_element(By.ID, name)

    browser = open_browser()
    body, find = page(browser)
    assert browser.title != "taken" and "helps the person more" in find("question").text
    assert "a.jsonl" not in browser.page_source and "b.jsonl" not in browser.page_source
    find("person").send_keys("Ada B")  # keys in the name's field are no answers
    assert "0 answered" in find("status").text
    find("question").click()
    for n in range(2):  # the better text, on either side
        assert "<b>bold</b>\nsecond line" in find("a").text + find("b").text
        body.send_keys("a" if "good" in find("a").text else "b")
        assert f"{n + 1} answered" in find("status").text
    browser.quit()

    browser = open_browser()  # another day: the name and the two answers are still there
    body, find = page(browser)
    assert "2 answered" in find("status").text and find("person").get_attribute("value") == "Ada B"
    assert "Comparison 3 of 4" in find("status").text
    body.send_keys("e")
    body.send_keys("b" if "good" in find("a").text else "a")  # the worse one
    body.send_keys(Keys.ARROW_LEFT)
    assert "Comparison 3 of 4, answered equal" in find("status").text and "All done" in find("status").text
    find("export").click()
    deadline = time.monotonic() + 20
    while not (exported := list(tmp_path.glob("answers-*.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert exported[0].name == "answers-Ada_B.json" and len(json.loads(exported[0].read_text())["answers"]) == 4

    run(tmp_path, *common, "--answers", exported[0].name)
    rows = rows_of(tmp_path / "people.jsonl")
    assert sorted(row["verdict"] for row in rows) == ["a", "a", "b", "tie"]
    assert {row["judge"] for row in rows} == {"human:Ada B"}
