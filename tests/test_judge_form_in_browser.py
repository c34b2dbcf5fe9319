"""The form for human judges in a headless Chromium: by keyboard and by touch, remembered, exported, read back."""

import csv
import io
import json
import shutil
import time
from collections import Counter

import pytest

from dpoctl.data.readers import load_rows
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

    def start(phone: bool = False) -> Chrome:
        options = ChromeOptions()
        if phone:
            metrics = {"width": 360, "height": 640, "pixelRatio": 2.0, "touch": True, "mobile": True}
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
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


def downloaded(path) -> str:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
    return path.read_bytes().decode()


def await_status(find, text: str) -> None:
    deadline = time.monotonic() + 10
    while text not in find("status").text:
        assert time.monotonic() < deadline, find("status").text
        time.sleep(0.02)


def reload(browser, find, text: str) -> None:
    """Load the page again; under load Chromium hands what was stored to a page's next process in its own time."""
    deadline = time.monotonic() + 10
    browser.refresh()
    while text not in find("status").text:
        assert time.monotonic() < deadline, find("status").text
        time.sleep(0.2)
        browser.refresh()


def tap(browser, element) -> None:
    """A finger on the middle of an element, where it is on the screen."""
    box = browser.execute_script("return arguments[0].getBoundingClientRect()", element)
    point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    assert 0 < point["x"] < 360 and 0 < point["y"] < 640, "not on the screen"
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


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
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    page(browser)
    other = browser.current_window_handle
    browser.switch_to.window(first)
    find("person").send_keys("Ada B")  # keys in the name's field are no answers
    assert "0 answered" in find("status").text
    find("question").click()
    for n in range(2):  # the better text, on either side
        assert "<b>bold</b>\nsecond line" in find("a").text + find("b").text
        body.send_keys("a" if "good" in find("a").text else "b")
        assert f"{n + 1} answered" in find("status").text
    browser.switch_to.window(other)  # a tab that was open before: it would write over these answers with its own
    await_status(find, "2 answered")
    assert find("person").get_attribute("value") == "Ada B"
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
    exported = downloaded(tmp_path / "answers-Ada_B.json")
    assert len(json.loads(exported)["answers"]) == 4

    run(tmp_path, *common, "--answers", "answers-Ada_B.json")
    rows = rows_of(tmp_path / "people.jsonl")
    assert sorted(row["verdict"] for row in rows) == ["a", "a", "b", "tie"]
    assert {row["judge"] for row in rows} == {"human:Ada B"}


def test_three_annotators_on_a_phone(tmp_path, open_browser):
    """Shares with an overlap, by touch: both bad, comments, a reload, three exports, all of which are read back."""
    from selenium.webdriver.common.by import By

    files = candidates(tmp_path, 12, good=f'good {"x" * 300} {HOSTILE}, "quoted"', bad="bad\n" * 40)
    common = [*files, "--backend", "human", "--criterion", "helpful", "--out", "people.jsonl"]
    run(tmp_path, *common, "--form", "form.html", "--annotators", "3", "--overlap", "0.25")
    browser = open_browser(phone=True)

    def find(name):
        return browser.find_element(By.ID, name)

    for n, person in enumerate(("Ada", "Ben", "Cleo"), start=1):
        browser.get((tmp_path / f"form-{n}.html").as_uri())
        assert "Comparison 1 of 6. 0 answered" in find("status").text  # 3 of all, and 9 / 3
        find("person").send_keys(person)
        assert browser.execute_script("return document.documentElement.scrollWidth") == 360
        for button in browser.find_elements(By.TAG_NAME, "button"):
            assert button.rect["height"] >= 44 and button.rect["width"] >= 44, button.text
        for i in range(5):
            choice = "pickX" if person == "Cleo" and i == 1 else "pickA" if "good" in find("a").text else "pickB"
            tap(browser, find(choice))
            await_status(find, f"{i + 1} answered")
        if person == "Ada":
            find("comment").send_keys('so, "very" good\nindeed')
        reload(browser, find, "Comparison 6 of 6. 5 answered")
        assert find("comment").get_attribute("value") == ('so, "very" good\nindeed' if person == "Ada" else "")
        tap(browser, find("pickA" if "good" in find("a").text else "pickB"))
        await_status(find, "All done")
        for button in ("export", "csv", "preferences"):  # scrolled to when all is answered
            tap(browser, find(button))
        exported = json.loads(downloaded(tmp_path / f"answers-{person}.json"))
        assert exported["of"] == len(exported["answers"]) == 6 and exported["share"] == n
        table = list(csv.DictReader(io.StringIO(downloaded(tmp_path / f"answers-{person}.csv").removeprefix("\ufeff"))))
        assert {row["id"]: row["choice"] for row in table} == exported["answers"]
        assert {row["id"]: row["comment"] for row in table if row["comment"]} == exported["comments"]
        downloaded(tmp_path / f"preferences-{person}.jsonl")
        pairs = load_rows(str(tmp_path / f"preferences-{person}.jsonl"), "preferences").rows
        assert len(pairs) == (5 if person == "Cleo" else 6)
        assert all(HOSTILE in pair["chosen"] and pair["rejected"].startswith("bad\n") for pair in pairs)
        assert {(p["prompt_id"], p["prompt"]) for p in pairs} <= {(f"p{i}", f"Question {i}?") for i in range(12)}

    run(tmp_path, *common, *(arg for p in ("Ada", "Ben", "Cleo") for arg in ("--answers", f"answers-{p}.json")))
    rows = rows_of(tmp_path / "people.jsonl")
    assert len(rows) == 18 and sum(row["verdict"] == "a" for row in rows) == 17
    assert [(row["judge"], row["verdict"]) for row in rows if row.get("both_bad")] == [("human:Cleo", "tie")]
    assert [row["comment"] for row in rows if "comment" in row] == ['so, "very" good\nindeed']
    assert sorted(Counter(row["prompt_id"] for row in rows).values()) == [1] * 9 + [3] * 3
